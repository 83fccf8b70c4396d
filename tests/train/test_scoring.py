"""The scoring forward against one plain forward a row: any mask, any number of buckets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from train.scoring import ScoredRows, score_rows, why_not_shared
from train.vision import ImageStore

TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7]]
COMPLETIONS = [[10, 11, 12, 13], [14, 15], [16, 17, 18]]
MASKS = [[1, 1, 0, 1], [0, 1], [1, 0, 1]]
"""The second row's first token is not the policy's."""


@pytest.fixture
def rows():
    masks = [np.array(mask, bool) for mask in MASKS]
    return ScoredRows(PROMPTS, COMPLETIONS, masks, [[], [], []], width=4, n_buckets=1)


def plainly(model):
    """Log-probs and entropies [3, 4], one row at a time, 0 where the mask is."""
    logps, entropies = torch.zeros(3, 4), torch.zeros(3, 4)
    for i, (prompt, completion, mask) in enumerate(zip(PROMPTS, COMPLETIONS, MASKS, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        log_probs = (logits / TEMPERATURE).log_softmax(-1)
        for t, token in enumerate(completion):
            if mask[t]:
                at = log_probs[len(prompt) + t - 1]  # predicted by the token before it
                logps[i, t] = at[token]
                entropies[i, t] = -(at.exp() * at).sum()
    return logps, entropies


@pytest.mark.parametrize("n_buckets", [1, 2, 3, 5])
def test_scores_are_those_of_a_plain_forward_in_any_number_of_buckets(
    fresh_policy, rows, n_buckets
):
    model = fresh_policy[0].eval()
    logps, entropies = plainly(model)
    found = score_rows(model, replace(rows, n_buckets=n_buckets), TEMPERATURE)
    torch.testing.assert_close(found[0], logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], entropies, atol=1e-5, rtol=1e-5)


def test_rows_that_read_their_prompts_themselves_get_the_same_scores(fresh_policy, rows):
    model = fresh_policy[0].eval()
    logps, entropies = plainly(model)
    model.set_attn_implementation("eager")  # takes no mask of a prefix
    assert why_not_shared(model) is not None
    found = score_rows(model, rows, TEMPERATURE)
    torch.testing.assert_close(found[0], logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], entropies, atol=1e-5, rtol=1e-5)


def test_logits_that_are_too_many_to_keep_give_the_same_scores(fresh_policy, rows, monkeypatch):
    model = fresh_policy[0].eval()
    monkeypatch.setattr("train.scoring.MAX_LOGITS", 1)
    for found, expected in zip(score_rows(model, rows, TEMPERATURE), plainly(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_without_a_picture_the_tower_sees_a_blank_one_and_gets_a_gradient_of_nought(
    fresh_policy, rows
):
    model, processor = fresh_policy
    blank = ImageStore(processor.image_processor).encode(Image.new("RGB", (56, 56)))
    logps, _ = score_rows(model, rows, TEMPERATURE, blank=blank)
    torch.testing.assert_close(logps, plainly(model.eval())[0], atol=1e-5, rtol=1e-5)
    logps.sum().backward()
    tower = list(model.model.visual.parameters())
    assert all(parameter.grad is not None for parameter in tower)
    assert all(not parameter.grad.any() for parameter in tower)
