"""Every gold answer of the atlas scores 1, and every other question's answer 0."""

from collections import defaultdict
from pathlib import Path

import pytest

from environments.atlas.entities import load_entities
from environments.atlas.questions import KINDS, list_questions
from environments.benchmarks.registry import BENCHMARKS, load_benchmark
from rewards.answer import correctness, kind_of
from rewards.metrics import METRICS
from rewards.normalize import normalize_answer

COPIES = Path(__file__).parents[1] / "compare" / "benchmarks"
FILES = {
    "fvqa_train": "fvqa_train.parquet",
    "fvqa_test": "fvqa_test.parquet",
    "infoseek": "infoseek/infoseek_val.jsonl",
    "mmsearch": "mmsearch.parquet",
    "livevqa": "livevqa.json",
    "nq_hotpotqa_test": "nq_hotpotqa.parquet",
}
MATCHES = ("exact", "typed", "contains", "f1")


@pytest.fixture(scope="module")
def questions():
    """One question for each distinct set of answers, all relations included."""
    relations = sorted({name for entity in load_entities().values() for name in entity.relations})
    rows = (
        row
        for split in ("train", "dev", "test")
        for kind in KINDS
        for row in list_questions(split, kind, relations)
    )
    distinct = {tuple(row["answers"]): row for row in rows}
    assert len(distinct) > 1000
    return list(distinct.values())


def test_every_gold_answer_scores_one_in_every_way(questions):
    for question in questions:
        for gold in question["answers"]:
            for match in MATCHES:
                assert correctness(gold, question, match) == 1.0, (gold, match)


def test_every_gold_answer_scores_one_in_every_metric_of_answers(questions):
    for name, metric in METRICS.items():
        if metric.reads != "answer":
            continue
        for question in questions:
            for gold in question["answers"]:
                assert metric.strict(gold, question) == 1.0, (name, gold)
                assert metric.official(gold, question) == 1.0, (name, gold)


def test_another_questions_answer_is_right_only_where_it_is_the_same_answer(questions):
    """Exact match of all pairs at once: forms that two questions share are shared answers."""
    owners = defaultdict(set)
    for number, question in enumerate(questions):
        for gold in question["answers"]:
            owners[normalize_answer(gold)].add(number)
    for form, numbers in owners.items():
        spellings = {
            gold
            for number in numbers
            for gold in questions[number]["answers"]
            if normalize_answer(gold) == form
        }
        plain = {"".join(filter(str.isalnum, gold.casefold())) for gold in spellings}
        assert len(plain) <= 2, spellings  # one name, spelt with an article or an accent at most


def test_no_kind_makes_another_questions_answer_right(questions):
    """Typed matching of every gold answer that is no plain name against all answers there are."""
    answers = sorted({gold for question in questions for gold in question["answers"]})
    typed = [q for q in questions if any(kind_of(gold) != "text" for gold in q["answers"])]
    assert len(typed) > 50
    for question in typed:
        own = {normalize_answer(gold) for gold in question["answers"]}
        for answer in answers:
            right = correctness(answer, question, "typed")
            assert right == float(normalize_answer(answer) in own), (answer, question["answers"])


def test_softer_ways_are_bounded_by_what_the_answers_share(questions):
    """Containment among the answers of one relation: only an answer that holds the other."""
    by_relation = defaultdict(list)
    for question in questions:
        by_relation[question["relation"]].append(question)
    for rows in by_relation.values():
        for question in rows[:40]:
            for other in rows[:40]:
                answer = other["answers"][0]
                padded = f" {normalize_answer(answer)} "
                holds = any(f" {normalize_answer(g)} " in padded for g in question["answers"])
                assert correctness(answer, question, "contains") <= float(holds)


# ---------------------------------------------------------------- copies of the benchmarks


@pytest.mark.parametrize("name", FILES)
def test_gold_answers_of_a_benchmarks_copy(name):
    """Gold scores 1, another question's answer 0, by our rules and by the benchmark's metrics."""
    images = str(COPIES / "infoseek" / "oven_images") if name == "infoseek" else None
    rows = load_benchmark(name, source=str(COPIES / FILES[name]), images=images)
    metrics = [METRICS[m] for m in BENCHMARKS[name].metrics]
    metrics = [metric for metric in metrics if metric.reads == "answer"]
    assert len(rows) > 1
    assert metrics
    for question in rows:
        golds = [gold for gold in question["answers"] if normalize_answer(gold)]
        assert golds, question["id"]
        for gold in golds:
            assert correctness(gold, question, "typed") == 1.0, (question["id"], gold)
            assert all(metric.strict(gold, question) == 1.0 for metric in metrics)
            assert all(metric.official(gold, question) == 1.0 for metric in metrics)
        own = set(map(normalize_answer, golds))
        for other in rows:
            foreign = [gold for gold in other["answers"] if normalize_answer(gold) not in own]
            if own & set(map(normalize_answer, other["answers"])):
                continue  # the same answer in other words
            for gold in foreign:
                assert correctness(gold, question, "exact") == 0.0
                assert correctness(gold, question, "typed") == 0.0, (gold, golds)
