"""Whole evaluations: modes, chunks, shards, intervals."""

import fcntl
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compare.benchmarks import load_benchmark
from compare.errors import CompareError
from compare.evaluate import (
    HEADLINES,
    cost_aware_score,
    measure_episode,
    run_evaluation,
    summarize_episodes,
)
from compare.modes import MODES, Asker, environment_of, rule_query
from configs.sections import Config, Environment, Rollout
from environments.dialects import DIALECTS
from environments.episode import SearchEnvironment
from environments.tools import Hit, ToolResult
from train.files import write_json
from train.policy import load_policy
from train.tiny import make_tiny_checkpoints
from train.trajectories import Trajectory, Turn
from train.worlds import load_eval_questions

COPIES = Path(__file__).parent / "benchmarks"
CONFIG = Config(
    "out",
    environment=Environment(eval_size=5, eval_kinds=["two", "text"], max_turns=3),
    grpo={"max_completion_length": 96, "generation_kwargs": {"max_new_tokens": 6}},
)
HEADER = {"arm": "tiny", "seed": 0}


class CountingIndex:
    """A back end that says the same to everyone and remembers what it was asked."""

    in_memory = True

    def __init__(self, title, text=""):
        self.hit = Hit(f"id/{title}", title, text)
        self.asked = []

    def search(self, queries, k):
        self.asked += queries
        return [[self.hit] for _ in queries]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_tiny_checkpoints(tmp_path_factory.mktemp("tiny"), seed=0)["vlm"]
    model, processor = load_policy(folder)
    return model.eval(), processor


@pytest.fixture
def world():
    images, texts = CountingIndex("France"), CountingIndex("France", "the capital is Paris")
    return SearchEnvironment(texts, images, image_searches=1, text_searches=2, max_turns=4)


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("query", ["rule", "policy"])
def test_the_workflow_makes_exactly_its_two_searches(tiny, world, query):
    questions = load_eval_questions(CONFIG)
    pictured = [q for q in questions if q["image"] is not None]
    assert 0 < len(pictured) < len(questions)
    episodes = Asker(CONFIG, *tiny, mode="rag", query=query, environment=world).ask(questions)
    assert len(world.image_index.asked) == len(pictured)
    assert len(world.text_index.asked) == len(questions)
    for question, episode in zip(questions, episodes, strict=True):
        has_picture = question["image"] is not None
        measured = measure_episode(episode, question)
        assert measured["image_calls"] == int(has_picture)
        assert measured["text_calls"] == 1
        # an untrained policy writes no query, so both ways end in the rule's
        expected = f"France {question['question']}" if has_picture else question["question"]
        assert episode.turns[int(has_picture)].action["query"] == expected
        assert "the capital is Paris" in episode.prompt
        assert episode.prompt.endswith(DIALECTS["search_r1"].direct_text.format(**question))
        # what the policy wrote counts: the last turn, and the query where it was asked for one
        assert len(episode.turns) == 2 + has_picture
        *_, search, last = episode.turns
        assert bool(search.token_ids) == bool(search.logprobs) == (query == "policy")
        assert measured["n_tokens"] == len(search.token_ids) + len(last.token_ids) > 0


@pytest.mark.parametrize(("words_shown", "is_whole"), [(40, False), (300, True)])
def test_the_workflow_shows_a_read_page_at_a_pages_length(tiny, world, words_shown, is_whole):
    # 1,400 characters, beyond those of a snippet
    world.text_index.hit = Hit("id/France", "France", f"{'words ' * 230}the capital is Paris")
    world.text_index.words_shown = words_shown
    asker = Asker(CONFIG, *tiny, mode="rag", environment=world)
    (episode,) = asker.ask(load_eval_questions(CONFIG)[:1])
    assert ("the capital is Paris" in episode.prompt) == is_whole


def test_the_policy_writes_the_query_where_it_can(tiny, world, monkeypatch):
    asker = Asker(CONFIG, *tiny, mode="rag", query="policy", environment=world)
    roll_out, asked = asker._roll_out, []

    def scripted(questions):
        asked.append(questions)
        episodes = roll_out(questions)
        for episode in episodes:
            episode.turns[-1].text = "<think> x </think> <answer> capital of France </answer>"
        return episodes

    monkeypatch.setattr(asker, "_roll_out", scripted)
    asker.ask(load_eval_questions(CONFIG)[:2])
    assert world.text_index.asked == ["capital of France"] * 2
    assert len(asked) == 2


def test_the_workflows_searches_go_at_the_same_time_where_tools_have_threads(tiny, world):
    meeting, search = threading.Barrier(2, timeout=10), world.text_index.search

    def meet(queries, k):
        meeting.wait()  # alone it would break
        return search(queries, k)

    world.text_index.search = meet
    config = replace(CONFIG, rollout=Rollout(tool_workers=2))
    asker = Asker(config, *tiny, mode="rag", environment=world)
    episodes = asker.ask(load_eval_questions(CONFIG)[:2])
    assert [episode.turns[-2].fault for episode in episodes] == [None, None]


def test_direct_offers_no_tool_and_ends_after_one_turn(tiny, world):
    questions = load_eval_questions(CONFIG)
    asker = Asker(CONFIG, *tiny, mode="direct", environment=world)
    call = "<think> x </think> <search> <img> </search>"
    asker._engine.script = lambda question, turn: call
    episodes = asker.ask(questions)
    assert not world.image_index.asked
    for question, episode in zip(questions, episodes, strict=True):
        assert len(episode.turns) == 1
        assert episode.stop_reason in ("turn_limit", "length")
        assert "<search>" not in episode.prompt
        assert measure_episode(episode, question)["image_calls"] == 0


def test_prompted_explains_the_tools_and_agent_asks_as_in_training(world):
    texts = {}
    for mode in ("prompted", "agent"):
        environment = environment_of(world, mode)
        messages = environment.dialect.prompt("Who?", True)
        texts[mode] = messages[-1]["content"][-1]["text"]
        assert environment.budgets == world.budgets
    assert texts["agent"] == world.dialect.prompt("Who?", True)[-1]["content"][-1]["text"]
    assert "For example" in texts["prompted"]
    assert texts["prompted"].endswith("Question: Who?")
    assert len(texts["prompted"]) > 4 * len(texts["agent"])
    # MMSearch-R1's prompt explains them already
    other = replace(world.dialect, name="mmsearch_r1", agent_text="{question}!")
    world.dialect = other
    assert environment_of(world, "prompted").dialect is other


def test_a_mode_leaves_the_world_as_it_was(world):
    before = (world.dialect, dict(world.budgets))
    for mode in MODES:
        environment_of(world, mode)
    assert (world.dialect, world.budgets) == before


def test_a_query_without_a_match_is_the_question():
    nothing = ToolResult("Nothing found.", tool="image")
    assert rule_query({"question": "Who?"}, nothing) == "Who?"
    assert rule_query({"question": "Who?"}, None) == "Who?"


def test_an_unknown_mode_is_refused(tiny, world):
    with pytest.raises(CompareError, match="no mode 'guess'; choose one of direct"):
        Asker(CONFIG, *tiny, mode="guess", environment=world)


# ---------------------------------------------------------------- chunks


class Scripted:
    """Answers by question number; counts what it is asked and may fail."""

    def __init__(self, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def ask(self, questions):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [question["id"] for question in questions]
        return [self.episode(question) for question in questions]

    @staticmethod
    def episode(question):
        number = int(question["id"])
        turns = [Turn("", [1], [0.0], {"type": "search", "query": "x"}, observation="y")]
        turns = turns * (number % 3)
        answer = "Paris" if number % 2 else "Rome"
        text = f"<think> x </think> <answer> {answer} </answer>"
        turns.append(Turn(text, [1, 2], [0.0, 0.0], {"type": "answer", "text": answer}))
        return Trajectory(question["id"], question["kind"], False, "", [], [], turns, "answer")


def numbered(n):
    return [
        {
            "id": str(i), "kind": "ab"[i % 2], "split": "test", "question": "?", "image": None,
            "answers": ["Paris"], "metrics": ["em"],
        }
        for i in range(n)
    ]  # fmt: skip


def evaluate_into(folder, asker, n=10, plan=None, **options):
    return run_evaluation(
        numbered(n), lambda: asker, folder, plan=plan or {"model": "a"}, header=HEADER,
        batch=3, bootstrap=50, **options,
    )  # fmt: skip


def files_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_an_evaluation_that_was_killed_goes_on_to_the_same_files(tmp_path):
    whole = evaluate_into(tmp_path / "whole", Scripted())
    with pytest.raises(KeyboardInterrupt):
        evaluate_into(tmp_path / "broken", Scripted(fail_at=6))
    assert not (tmp_path / "broken" / "eval.json").exists()
    rest = Scripted()
    assert evaluate_into(tmp_path / "broken", rest) == whole
    assert rest.asked == ["6", "7", "8", "9"]
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")
    assert not (tmp_path / "whole" / "episodes").exists()


def test_chunks_of_an_older_version_are_scored_as_new_ones(tmp_path):
    """They were written without the question, which MMSearch's strict metric reads."""
    whole = evaluate_into(tmp_path / "whole", Scripted())
    assert evaluate_into(tmp_path / "old", Scripted(), shard=(0, 2)) is None
    for path in (tmp_path / "old" / "episodes").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            del line["question"]["question"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate_into(tmp_path / "old", Scripted()) == whole
    assert files_of(tmp_path / "old") == files_of(tmp_path / "whole")


def test_shards_together_are_one_evaluation(tmp_path):
    whole = evaluate_into(tmp_path / "whole", Scripted())
    askers = [Scripted(), Scripted()]
    assert evaluate_into(tmp_path / "parts", askers[1], shard=(1, 2)) is None
    assert evaluate_into(tmp_path / "parts", askers[0], shard=(0, 2)) == whole
    assert askers[0].asked == ["0", "1", "2", "6", "7", "8"]
    assert askers[1].asked == ["3", "4", "5", "9"]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_a_shard_that_comes_last_finds_the_result(tmp_path):
    evaluate_into(tmp_path / "e", Scripted())

    def never():
        raise AssertionError("nothing is left to ask")

    def again(header=HEADER, plan=None, batch=3):
        plan = plan or {"model": "a"}
        return run_evaluation(
            numbered(2), never, tmp_path / "e", plan=plan, header=header, batch=batch, shard=(3, 4)
        )

    assert again()["metrics"]["n"] == 10
    assert not (tmp_path / "e" / "episodes").exists()
    others = ({"header": {**HEADER, "mode": "rag"}}, {"plan": {"model": "b"}}, {"batch": 4})
    for other in others:
        with pytest.raises(CompareError, match="holds another evaluation"):
            again(**other)
    # an older version wrote its result without the plan
    path = tmp_path / "e" / "eval.json"
    record = json.loads(path.read_text())
    del record["plan"]
    path.write_text(json.dumps(record))
    assert again(plan={"model": "b"}) == record


def test_another_plan_in_the_folder_is_refused(tmp_path):
    evaluate_into(tmp_path, Scripted(), shard=(0, 2))
    with pytest.raises(CompareError, match="evaluation with another model; go on with its own"):
        evaluate_into(tmp_path, Scripted(), plan={"model": "b"}, shard=(1, 2))


def test_plan_and_result_are_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    """Of two that start together with other plans, both would find none."""
    is_held = {}

    def watched(path, value):
        with (tmp_path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held[path.name] = False
            except BlockingIOError:
                is_held[path.name] = True
        write_json(path, value)

    monkeypatch.setattr("compare.evaluate.write_json", watched)
    evaluate_into(tmp_path, Scripted())
    assert is_held == {"plan.json": True, "eval.json": True}


def test_nothing_to_ask_is_refused(tmp_path):
    with pytest.raises(CompareError, match="no question"):
        evaluate_into(tmp_path, Scripted(), n=0)


def test_every_line_keeps_trajectory_measures_and_what_scores_it(tmp_path):
    record = evaluate_into(tmp_path, Scripted())
    lines = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").open()]
    assert [line["question_id"] for line in lines] == [str(i) for i in range(10)]
    assert lines[1]["phase"] == "eval"
    assert lines[1]["question"] == {
        "id": "1", "question": "?", "answers": ["Paris"], "split": "test", "metrics": ["em"]
    }  # fmt: skip
    assert lines[2]["measured"]["text_calls"] == 2
    assert record["metrics"]["official/em"] == record["metrics"]["strict/em"] == 0.5


def test_the_tiny_policy_gives_equal_numbers_whole_resumed_and_in_shards(tiny, tmp_path):
    """Real episodes: a chunk is always rolled out as one batch, so no bit may differ."""
    questions = load_benchmark("livevqa", source=str(COPIES / "livevqa.json"))
    questions += load_eval_questions(CONFIG)

    def run(folder, shard=(0, 1), limit=None):
        asker = Asker(CONFIG, *tiny)
        return run_evaluation(
            questions[:limit], lambda: asker, tmp_path / folder, plan={}, header=HEADER,
            batch=3, shard=shard, picture_size=48,
        )  # fmt: skip

    def content(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "trajectories.jsonl").open()]
        for line in lines:
            for turn in line["turns"]:
                turn["seconds"] = 0.0  # of the tools
        return lines

    whole = run("whole")
    assert whole["metrics"]["n"] == 7
    assert run("parts", (1, 2)) is None
    assert run("parts", (0, 2))["metrics"] == whole["metrics"]
    assert content("parts") == content("whole")
    for folder in ("whole", "parts"):  # every part keeps its own questions' pictures
        kept = {path.stem for path in (tmp_path / folder / "pictures").iterdir()}
        assert kept == {key for line in content(folder) for key in line["images"]}
    for line, question in zip(content("whole"), questions, strict=True):
        assert line["gold"]["answers"] == [str(answer) for answer in question["answers"]]
        assert all(turn["tokens"] for turn in line["turns"])


# ---------------------------------------------------------------- numbers


def measured(accuracy, image=0, text=0, tokens=0, kind="two", split="test"):
    return {
        "kind": kind, "split": split, "seen": None, "searched": image + text > 0, "entity": False,
        "passage": False, "accuracy": accuracy, "n_text": text, "n_image": image,
        "n_tokens": tokens, "stop_reason": "answer", "text_calls": text, "image_calls": image,
        "page_calls": 0, "n_calls": text + image,
    }  # fmt: skip


def test_the_cost_aware_score_by_hand():
    # 100 * 0.5^2 / (0.5 + 2 * 1.5 + 1) = 25 / 4.5
    assert cost_aware_score(0.5, 500, 1.5) == pytest.approx(25 / 4.5)
    assert cost_aware_score(1.0, 0, 0) == 100.0
    assert cost_aware_score(0.0, 10, 1) == 0.0


def test_headlines_by_hand_in_all_and_by_group():
    episodes = [
        measured(True, image=1, text=2, tokens=100),
        measured(False, text=1, tokens=300),
        measured(True, kind="look", split="dev"),
        measured(False, image=1, kind="look"),
    ]
    metrics, intervals = summarize_episodes(episodes, bootstrap=20)
    assert {name: metrics[name] for name in HEADLINES} == {
        "accuracy": 0.5, "sr_img": 0.5, "sr_txt": 0.5, "sr_any": 0.75, "calls": 1.25,
        "cas": pytest.approx(25 / (0.1 + 2.5 + 1)),
    }  # fmt: skip
    assert metrics["kind/two/sr_txt"] == 1.0
    assert metrics["kind/look/calls"] == 0.5
    assert metrics["split/dev/accuracy"] == 1.0
    assert metrics["split/test/n"] == 3
    assert "seen/n" not in metrics
    assert "unseen/n" not in metrics
    assert intervals["split/dev/accuracy"] == [1.0, 1.0]
    low, high = intervals["accuracy"]
    assert 0.0 <= low <= 0.5 <= high <= 1.0


def test_an_interval_is_that_of_a_mean_of_coin_tosses():
    tosses = np.random.default_rng(0).random(400) < 0.3
    _, intervals = summarize_episodes([measured(bool(toss)) for toss in tosses], bootstrap=2000)
    mean, half = tosses.mean(), 1.96 * tosses.std() / np.sqrt(400)
    # the bootstrap's own noise is a few percent of the half width
    assert intervals["accuracy"] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    again = summarize_episodes([measured(bool(toss)) for toss in tosses], bootstrap=2000)[1]
    assert again == intervals


def test_questions_about_one_entity_are_drawn_together():
    """Fifty places asked eight times, each answered alike: as sure as fifty questions, not 400."""
    known = np.random.default_rng(0).random(50) < 0.3
    episodes = [{**measured(bool(k)), "about": f"p{i}"} for i, k in enumerate(known)] * 8
    _, intervals = summarize_episodes(episodes, bootstrap=2000)
    mean, half = known.mean(), 1.96 * known.std() / np.sqrt(50)
    assert intervals["accuracy"] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    # places of other sizes: the share is that of the questions drawn
    uneven = [{**measured(i == 0), "about": f"p{min(i, 1)}"} for i in range(4)]
    _, intervals = summarize_episodes(uneven, bootstrap=200)
    assert intervals["accuracy"] == [0.0, 1.0]


def test_refused_calls_and_those_of_the_last_turn_are_not_counted_as_searches():
    def turn(observation, fault=None):
        call = {"type": "search", "query": "x"}
        return Turn("", [1], [0.0], call, observation=observation, fault=fault)

    turns = [turn("found"), turn("No searches left", "model"), turn("failed", "infrastructure")]
    episode = Trajectory("q", "two", False, "", [], [], [*turns, turn(None)], "turn_limit")
    question = {"kind": "two", "answers": ["x"]}
    result = measure_episode(episode, question)
    assert result["n_text"] == 4
    assert result["text_calls"] == 2
    assert result["split"] == "all"


def test_of_several_calls_in_a_turn_each_is_counted_by_its_own_fault():
    calls = [{"type": "search", "query": "x"}, {"type": "image_search", "region": "full"}] * 2
    turn = Turn("", [1], [0.0], {"type": "parallel", "calls": calls}, observation="found",
                is_error=True, fault="model", call_faults=[None, None, None, "model"])  # fmt: skip
    episode = Trajectory("q", "two", False, "", [], [], [turn], "turn_limit")
    result = measure_episode(episode, {"kind": "two", "answers": ["x"]})
    # the second image search was refused; the others were carried out
    assert (result["text_calls"], result["image_calls"]) == (2, 1)
