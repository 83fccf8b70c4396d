"""Merges of a real pretrained language model with two fine-tunes, each of which learnt one habit.

Every bound has room: beside it stands what was measured, the range over three seeds of the
fine-tunes and both habits. Losses are nats a token of held-out answers.
"""

import functools
import json
import math
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from merge.engine import merge
from merge.shards import SafetensorsFile
from tests.merge.pretrained import (
    END_OF_ANSWER,
    HABITS,
    MISSING,
    calibrate,
    find_weights,
    fine_tune,
    load_model,
    measure_english,
    measure_habits,
    save_base,
    write_answer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_weights() is None, reason=MISSING),
    # The first test pays for the trio: half a minute, which a busy machine makes several.
    pytest.mark.timeout(900),
]

EMBEDDING = "model.embed_tokens.weight"
LINEAR = "model.layers.{}.mlp.down_proj.weight"
TASKS = tuple(HABITS)


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Role -> checkpoint folder; 0.3 GB each, so they do not outlive the tests."""
    folder = tmp_path_factory.mktemp("pretrained")
    base = save_base(find_weights(), folder / "base")
    tuned = {role: fine_tune(base, habit, folder / role) for role, habit in HABITS.items()}
    yield {"base": base, **tuned}
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stats(trio, tmp_path_factory):
    """Task -> second moments."""
    folder = tmp_path_factory.mktemp("moments")
    return {role: calibrate(trio[role], role, folder / f"{role}.safetensors") for role in TASKS}


@pytest.fixture(scope="module")
def losses_of(trio):
    """Measures a folder's held-out losses by habit, each folder once."""
    tokenizer = AutoTokenizer.from_pretrained(trio["base"])
    return functools.cache(lambda folder: measure_habits(load_model(folder), tokenizer))


@pytest.fixture(scope="module")
def merged(trio, stats, tmp_path_factory):
    """Merges the trio by a method, each set of settings once; returns the folder."""
    made = {}
    folder = tmp_path_factory.mktemp("merged")

    def run(method, density, **options):
        key = json.dumps([method, density, options], sort_keys=True)
        if key not in made:
            made[key] = folder / f"{method}-{len(made)}"
            merge(**trio, output=made[key], method=method, density=density, stats=stats, **options)
        return made[key]

    yield run
    shutil.rmtree(folder)


def stored_bits(folder, name):
    """The bf16 items of a tensor, as integers in which neighbouring values differ by one."""
    file = SafetensorsFile(folder / "model.safetensors")
    return np.frombuffer(file.read_bytes(name), np.int16).astype(np.int32)


def test_each_fine_tune_learns_its_own_habit_alone(trio, losses_of):
    base = losses_of(trio["base"])
    for task, other in (TASKS, TASKS[::-1]):
        assert base[task] > 2.5  # 3.3, 4.0
        assert losses_of(trio[task])[task] < 0.3  # 0.02 to 0.08
        assert losses_of(trio[task])[other] > 2.5  # 3.2 to 3.6


def test_short_training_leaves_most_bf16_weights_as_they_were_or_one_step_away(trio):
    for task in TASKS:
        for layer in (0, 15, 29):
            before = stored_bits(trio["base"], LINEAR.format(layer))
            steps = np.abs(stored_bits(trio[task], LINEAR.format(layer)) - before)
            assert np.mean(steps == 0) > 0.4  # 0.55 to 0.62
            assert np.mean(steps <= 1) > 0.7  # 0.80 to 0.85


@pytest.mark.parametrize(("method", "density"), [("ties", 0.5), ("obm", 0.2)])
def test_each_tensor_keeps_exactly_its_density_or_all_that_changed(trio, merged, method, density):
    record = json.loads((merged(method, density) / "merge.json").read_text())
    n_short = n_full = 0
    for layer in (0, 15, 29):
        name = LINEAR.format(layer)
        before = stored_bits(trio["base"], name)
        k = math.floor(density * before.size + 0.5)
        for task in TASKS:
            n_changed = np.count_nonzero(stored_bits(trio[task], name) != before)
            kept = record["tensors"][name]["density"][task] * before.size
            assert round(kept) == min(k, n_changed), (name, task)
            n_short += n_changed < k
            n_full += n_changed >= k
    assert (n_short if density == 0.5 else n_full) > 0


def test_a_threshold_on_such_updates_would_keep_more_than_the_density(trio):
    name = LINEAR.format(29)
    before = SafetensorsFile(trio["base"] / "model.safetensors").read(name)
    for task in TASKS:
        delta = np.abs(SafetensorsFile(trio[task] / "model.safetensors").read(name) - before)
        at_a_tenth, at_a_half = np.quantile(delta, [0.9, 0.5], method="higher")
        assert np.mean(delta >= at_a_tenth) > 0.15  # 0.25, 0.27
        assert at_a_half == 0.0


@pytest.mark.parametrize(
    ("method", "density", "share"),
    [
        ("task_arithmetic", 1.0, 0.06),  # up to 0.01
        ("ties", 0.5, 0.2),
        ("obm", 0.5, 0.06),  # below 0.01
        ("obm", 0.2, 0.1),  # 0.01 to 0.03
    ],
)
def test_a_merge_has_both_habits(trio, merged, losses_of, method, density, share):
    base, losses = losses_of(trio["base"]), losses_of(merged(method, density))
    for task in TASKS:
        specialist = losses_of(trio[task])[task]
        forgotten = (losses[task] - specialist) / (base[task] - specialist)
        assert forgotten < share, (task, losses)


def test_obm_keeps_general_language(trio, merged):
    tokenizer = AutoTokenizer.from_pretrained(trio["base"])
    base = measure_english(load_model(trio["base"]), tokenizer)
    after = measure_english(load_model(merged("obm", 0.5)), tokenizer)
    assert math.exp(base) < 40  # perplexity 24: the weights came out of the file right
    assert math.exp(after - base) < 1.3  # 1.10, 1.11


def test_embeddings_are_the_vlms_bit_by_bit_and_stay_tied(trio, merged):
    folder = merged("obm", 0.5)
    assert set(SafetensorsFile(folder / "model.safetensors").tensors) == set(
        SafetensorsFile(trio["vlm"] / "model.safetensors").tensors
    )
    output = stored_bits(folder, EMBEDDING)
    np.testing.assert_array_equal(output, stored_bits(trio["vlm"], EMBEDDING))
    for role in ("base", "agent"):
        assert np.any(output != stored_bits(trio[role], EMBEDDING))
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_merged_model_writes_both_answers_and_the_same_ones_again(trio, merged):
    folder = merged("obm", 0.5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder)
    for habit in HABITS.values():
        prompt, answer = habit[-1]
        written = write_answer(model, tokenizer, prompt)
        assert written == answer + END_OF_ANSWER
        assert written == write_answer(model, tokenizer, prompt)


def test_at_density_a_fifth_obm_keeps_more_than_magnitude_and_far_more_than_chance(
    trio, merged, losses_of
):
    ones, fifths = dict.fromkeys(TASKS, 1.0), dict.fromkeys(TASKS, 0.2)
    obm = losses_of(merged("obm", 0.2))  # 0.06 to 0.13
    # Breadcrumbs without outliers keeps the largest entries, and adds.
    magnitude = losses_of(merged("breadcrumbs", 0.2, outliers=0.0))  # 0.15 to 0.25
    # DARE divides what it keeps by the density; a weight of the density undoes that.
    norms_whole = {"match": r"norm\.weight$", "weights": ones}
    chance = losses_of(merged("dare", 0.2, weights=fifths, rules=[norms_whole]))  # 1.8 to 1.9
    for task in TASKS:
        assert obm[task] < 0.8 * magnitude[task]  # 0.43 to 0.53
        assert obm[task] < 0.25 * chance[task]  # 0.03 to 0.08
