"""What a line has for the viewer: texts of tokens, small pictures, advantages, masked turns."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

import environments.atlas
from configs.sections import Config, Models, Tracking
from train.callbacks import Recorder
from train.pictures import PictureFolder
from train.token_texts import TokenTexts, cut
from train.trajectories import Trajectory, Turn, first_masked_turn, gold_of, turn_advantages

ATLAS = Path(environments.atlas.__file__).parent / "checkpoints" / "vlm"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ATLAS)


@pytest.mark.parametrize(
    "text",
    [
        "<think> Zürich </think> <search> capital of Peru </search>",
        "flags 😀 and a family 👩\u200d👩\u200d👧, in 日本語 and العربية",
        "line\u2028separator \u202ereversed, a null \x00 and <|im_end|>",
        "",
    ],
)
def test_texts_of_tokens_join_to_the_decoded_turn(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = TokenTexts(tokenizer)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(texts)


def test_a_character_goes_to_the_token_that_completes_it(tokenizer):
    # four bytes of the smile, a token each
    ids = tokenizer("a😀b", add_special_tokens=False)["input_ids"]
    assert TokenTexts(tokenizer)(ids) == ["a", "", "", "", "😀", "b"]


def test_a_character_that_is_never_completed_is_a_mark_of_its_own(tokenizer):
    smile = tokenizer("😀", add_special_tokens=False)["input_ids"]
    letter = tokenizer("b", add_special_tokens=False)["input_ids"]
    ids = [*smile[:2], *letter, *smile[:1]]
    texts = TokenTexts(tokenizer)(ids)
    assert texts == ["\ufffd", "", "b", "\ufffd"]
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_tokenizer_whose_words_bring_their_spaces_is_cut_by_its_beginnings():
    class Words:
        """Puts a space between words, and none before the first, as SentencePiece does."""

        def decode(self, ids, **settings):
            return " ".join("abc"[i] for i in ids)

    assert TokenTexts(Words())([0, 1, 2]) == ["a", " b", " c"]
    assert cut([2], Words().decode) == ["c"]


def episode(n_turns=2, picture=None):
    turns = [
        Turn("a", [1, 2], [-0.12345, -1e-9], {"type": "search", "query": "q"}, [0.5, 0.5], "obs",
             [7, 8, 9]),
        Turn("b", [3], [-1.0], {"type": "answer", "text": "Paris"}, [0.5]),
    ]  # fmt: skip
    images = [picture] if picture is not None else []
    return Trajectory("q1", "two", True, "What?", [4], images, turns[:n_turns], "answer", "Paris")


def test_a_line_has_tokens_and_rounded_logprobs_where_they_were_asked_for():
    plain = episode()
    assert "tokens" not in plain.to_dict(step=0)["turns"][0]
    plain.turns[0].tokens = ["a", ""]
    first, second = plain.to_dict(step=0)["turns"]
    assert first["tokens"] == ["a", ""]
    assert json.dumps(first["logprobs"]) == "[-0.123, 0.0]"  # not -0.0
    assert "tokens" not in second


def test_an_advantage_a_turn_and_the_first_turn_without_loss():
    two = episode()
    assert turn_advantages(two, 0.75) == [0.75, 0.75]
    # tokens: turn 0 is 0-1, its observation 2-4, turn 1 is 5
    assert turn_advantages(two, [0.1, 0.1, 0.1, 0.1, 0.1, 0.9]) == [0.1, 0.9]
    assert first_masked_turn(two, [1, 1, 0, 0, 0, 1]) is None
    assert first_masked_turn(two, [1, 1, 0, 0, 0, 0]) == 1
    assert first_masked_turn(two, [0] * 6) == 0
    longer = episode()
    longer.turns[1].token_ids = [3, 4]  # 5 and 6: a turn is known by its first token
    assert turn_advantages(longer, [0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.8]) == [0.1, 0.9]
    two.advantages, two.masked_from = [0.123456, -1.0], 1
    row = two.to_dict(step=1)
    assert (row["advantages"], row["masked_from"]) == ([0.1235, -1.0], 1)
    assert not {"advantages", "masked_from"} & episode().to_dict(step=1).keys()


def test_gold_is_right_answers_and_hits_that_lead_there():
    question = {"answers": ["Paris"], "gold_passages": ["fr/government"], "entity": "fr"}
    assert gold_of(question) == {"answers": ["Paris"], "hits": ["fr/government", "fr"]}
    assert gold_of({"answers": [1889], "entity": None}) == {"answers": ["1889"], "hits": []}


def make_recorder(folder, is_main=True, **tracking):
    tracking = Tracking(wandb="disabled", **tracking)
    config = Config("x", models=Models(init="atlas://vlm"), tracking=tracking)
    return Recorder(folder, config, is_main)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]


def test_the_recorder_writes_tokens_gold_and_each_picture_once(tmp_path, tokenizer):
    recorder = make_recorder(tmp_path)
    recorder.use_tokenizer(tokenizer)
    photo = Image.new("RGB", (600, 300), "red")
    question = {"answers": ["Paris"], "gold_passages": [], "entity": "fr"}
    recorder.trajectories(0, "eval", [episode(picture=photo)] * 2, [question] * 2)
    rows = rows_of(tmp_path)
    assert "".join(rows[0]["turns"][0]["tokens"]) == tokenizer.decode([1, 2])
    assert rows[0]["gold"] == {"answers": ["Paris"], "hits": ["fr"]}
    (path,) = (tmp_path / "pictures").iterdir()
    assert path.name == f"{rows[0]['images'][0]}.webp"
    with Image.open(path) as kept:
        assert (kept.format, kept.size) == ("WEBP", (256, 128))
    path.write_bytes(b"as it is")
    make_recorder(tmp_path).trajectories(5, "eval", [episode(picture=photo)])  # a resumed run
    assert path.read_bytes() == b"as it is"


def test_other_settings_and_other_processes_keep_neither_tokens_nor_pictures(tmp_path, tokenizer):
    photo = Image.new("RGB", (8, 8))
    recorder = make_recorder(tmp_path, token_logprobs=False, picture_size=0)
    recorder.use_tokenizer(tokenizer)
    recorder.trajectories(0, "eval", [episode(picture=photo)])
    (row,) = rows_of(tmp_path)
    assert "tokens" not in row["turns"][0]
    assert "gold" not in row
    assert not (tmp_path / "pictures").exists()
    make_recorder(tmp_path / "other", is_main=False).trajectories(0, "eval", [episode()])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
def test_pictures_of_every_mode_are_kept_and_small_ones_keep_their_size(tmp_path, mode):
    photo = Image.new(mode, (40, 1))
    row = episode(picture=photo).to_dict(step=0)
    PictureFolder(tmp_path, 256).add(episode(picture=photo), row)
    (path,) = (tmp_path / "pictures").glob("*.webp")
    with Image.open(path) as kept:
        assert kept.size == (40, 1)
        kept.load()
