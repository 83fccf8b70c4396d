"""How the trio is measured: the share of examples said exactly, and the table of results."""

from types import SimpleNamespace

import pytest
import torch

from compare.trio import exact_share, write_table
from train.sft import IGNORE, SFTExample

TOKENIZER = SimpleNamespace(pad_token_id=0)


class Counter(torch.nn.Module):
    """Its first choice after token t is t + 1, at every position."""

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 16).float())


@pytest.mark.parametrize("batch_size", [1, 64])
def test_an_example_counts_when_every_learned_token_is_the_first_choice(batch_size):
    right = SFTExample([9, 3, 4, 5], [IGNORE, IGNORE, 4, 5])  # 3 after 9 is not asked for
    wrong_once = SFTExample([3, 4, 7], [IGNORE, 4, 7])  # shorter: padded in a batch of both
    share = exact_share(Counter(), TOKENIZER, [right, wrong_once], batch_size)
    assert share == 0.5
    assert exact_share(Counter(), TOKENIZER, [right], batch_size) == 1.0
    assert exact_share(Counter(), TOKENIZER, [wrong_once], batch_size) == 0.0


def test_a_table_names_its_command_and_makes_its_folder(tmp_path):
    path = tmp_path / "results" / "trio.md"
    rows = [{"skill": "reads", "share": 0.5, "n": 2}, {"skill": "sees", "share": 1.0, "n": 3}]
    write_table(rows, path, "The trio", "obm atlas report")
    assert path.read_text(encoding="utf-8") == (
        "# The trio\n\nMade by `obm atlas report`.\n\n"
        "| skill | share | n |\n| --- | --- | --- |\n| reads | 0.5 | 2 |\n| sees | 1.0 | 3 |\n"
    )
