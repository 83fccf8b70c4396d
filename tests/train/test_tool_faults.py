"""Training against services that fail, hang, are busy, die and come back; several calls a turn."""

import itertools
import json
import math
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

from environments.episode import SearchEnvironment
from environments.tools import Hit, ServiceError
from train.health import HealthMonitor, Settings

REWARDS = {"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1}
LATENCY_S = 0.02  # stands for 5 s
LIMIT_S = 0.25  # stands for environment.timeout_s
ASK_TEXT = "<think> b </think> <search> capital of France </search>"
HITS = [Hit("france/capital", "France", "the capital of France Paris"), Hit("fr", "France")]


class Service:
    """A back end over a bad line: `fate(number of the call)` says what becomes of each call."""

    def __init__(self, fate):
        self.fate, self.lock, self.counter = fate, threading.Lock(), itertools.count()
        self.release = threading.Event()
        self.n_calls, self.n_failures = 0, 0

    def search(self, queries, k):
        with self.lock:  # calls come from several threads
            fate = self.fate(next(self.counter))
            self.n_calls += 1
            self.n_failures += fate is not None
        time.sleep(LATENCY_S)
        if fate == "hang":
            self.release.wait(60)
        if fate == "busy":
            raise ServiceError("429", retry_after_s=0.01)
        if fate is not None:
            raise ConnectionError(fate)
        return [HITS[:k] for _ in queries]


def asks_twice(question, turn):
    """Two text searches and an answer, right in every other episode."""
    if turn < 2:
        return ASK_TEXT
    word = "Paris" if next(_answers) % 2 else "Rome"
    return f"<think> c </think> <answer> {word} </answer>"


_answers = itertools.count()


def train(make_trainer, service, *, steps=2, tool_workers=8, **settings):
    """A short training against the service; the trainer afterwards, and its seconds."""
    world = SearchEnvironment(
        service,
        None,
        timeout_s=settings.pop("timeout_s", LIMIT_S),
        backoff_s=0.005,
        retries=settings.pop("retries", 0),
        text_searches=settings.pop("text_searches", 2),
        max_turns=settings.pop("max_turns", 4),
    )
    trainer = make_trainer(
        script=settings.pop("script", asks_twice),
        environment=world,
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=4,
        **settings,
    )
    trainer.engine.tool_workers = tool_workers
    start = time.perf_counter()
    try:
        trainer.train()
    finally:
        if hasattr(service, "release"):
            service.release.set()
    return trainer, time.perf_counter() - start


def logged(trainer, name):
    return [line[name] for line in trainer.metric_lines]


def assert_nothing_is_lost(trainer, n=8):
    """Every episode of the last step is there, ended for a reason, and has its faults on record."""
    assert len(trainer.last_trajectories) == n
    for trajectory in trainer.last_trajectories:
        assert trajectory.stop_reason
        assert trajectory.turns
        for turn in trajectory.turns:
            assert turn.is_error == (turn.fault is not None)
            assert turn.fault in (None, "infrastructure")


def test_thirty_percent_errors_are_the_services_fault_and_training_goes_on(make_trainer):
    rng = np.random.default_rng(0)
    service = Service(lambda number: "reset" if rng.random() < 0.3 else None)
    trainer, _ = train(make_trainer, service, steps=3, timeout_s=60.0)
    assert trainer.state.global_step == 3
    assert_nothing_is_lost(trainer)
    assert 0.15 < service.n_failures / service.n_calls < 0.45
    failing = [t for t in trainer.last_trajectories if any(u.is_error for u in t.turns)]
    assert 0 < len(failing) < 8
    assert all((t.rewards["total"] is None) == (t in failing) for t in trainer.last_trajectories)
    # two calls an episode: about 1 - 0.7 ** 2 of the episodes meet an error
    rates = logged(trainer, "search/failure_rate")
    assert rates == logged(trainer, "search/service_failure_rate")
    assert 0.2 < sum(rates) / len(rates) < 0.8
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_retries_carry_a_training_through_thirty_percent_errors(make_trainer):
    rng = np.random.default_rng(1)
    service = Service(lambda number: "reset" if rng.random() < 0.3 else None)
    trainer, _ = train(make_trainer, service, retries=9, timeout_s=60.0)
    assert logged(trainer, "search/failure_rate") == [0.0, 0.0]
    assert all(t.rewards["total"] is not None for t in trainer.last_trajectories)
    retries = logged(trainer, "search/retries_per_episode")
    assert sum(retries) * 8 == pytest.approx(service.n_failures)
    assert service.n_failures > 0


def test_a_rate_limit_is_waited_for(make_trainer):
    """Of ten calls in a row five are answered, as a service with a quota does."""
    service = Service(lambda number: "busy" if number % 10 < 5 else None)
    trainer, _ = train(make_trainer, service, steps=1, retries=9, timeout_s=60.0)
    assert logged(trainer, "search/failure_rate") == [0.0]
    assert logged(trainer, "search/retries_per_episode")[0] > 0


def test_a_service_that_dies_and_comes_back_costs_only_the_steps_in_between(make_trainer):
    state = {"is_dead": False}
    service = Service(lambda number: "refused" if state["is_dead"] else None)

    def die_and_return(question, turn):
        step = trainer_box[0].state.global_step if trainer_box else 0
        state["is_dead"] = step == 1
        return asks_twice(question, turn)

    trainer_box = []
    original = make_trainer

    def remembering(**settings):
        trainer_box.append(original(**settings))
        return trainer_box[0]

    trainer, _ = train(remembering, service, steps=3, script=die_and_return, timeout_s=60.0)
    assert logged(trainer, "search/service_failure_rate") == [0.0, 1.0, 0.0]
    assert trainer.state.global_step == 3
    assert_nothing_is_lost(trainer)
    # nothing is learnt from the step without a service, and nothing breaks
    assert logged(trainer, "grad_norm")[1] == 0.0
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps([["france/capital", "France", "the capital of France Paris"]]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Server:
    """A real process behind a real socket, and its client."""

    def __init__(self):
        self.port, self.process = 0, None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.port)], stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.process.stdout.readline())

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def search(self, queries, k):
        address = f"http://127.0.0.1:{self.port}"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            address, timeout=5
        ) as reply:
            return [[Hit(*hit) for hit in json.load(reply)][:k] for _ in queries]


def test_a_server_is_killed_and_restarted_during_training(make_trainer):
    server, trainers = Server(), []

    def remember(**settings):
        trainers.append(make_trainer(**settings))
        return trainers[-1]

    def by_step(question, turn):
        is_wanted = trainers[0].state.global_step != 1
        if is_wanted and server.process is None:
            server.start()
        elif not is_wanted:
            server.kill()
        return asks_twice(question, turn)

    try:
        trainer, _ = train(remember, server, steps=3, script=by_step, retries=1, timeout_s=10.0)
    finally:
        server.kill()
    assert logged(trainer, "search/service_failure_rate") == [0.0, 1.0, 0.0]
    assert trainer.state.global_step == 3
    assert_nothing_is_lost(trainer)


@pytest.mark.parametrize("tool_workers", [0, 8])
def test_nobody_waits_for_a_service_that_hangs(make_trainer, tool_workers):
    service = Service(lambda number: "hang" if number % 3 == 0 else None)
    trainer, seconds = train(make_trainer, service, steps=1, retries=5, tool_workers=tool_workers)
    n_hung = sum(u.fault is not None for t in trainer.last_trajectories for u in t.turns)
    assert n_hung >= 16 // 3
    # one deadline a call, retries or not: eight episodes of two calls, one after the other at worst
    assert seconds < 16 * LIMIT_S + 30
    slowest = max(u.seconds for t in trainer.last_trajectories for u in t.turns)
    assert slowest < LIMIT_S + 2
    assert_nothing_is_lost(trainer)


def test_three_failures_in_a_row_are_fatal_and_masked(make_trainer):
    service = Service(lambda number: "refused")

    def asks_on(question, turn):
        return ASK_TEXT if turn < 3 else "<think> c </think> <answer> Rome </answer>"

    trainer, _ = train(
        make_trainer,
        service,
        steps=1,
        script=asks_on,
        text_searches=5,
        max_turns=5,
        rewards={**REWARDS, "infrastructure_fault": "mask"},
    )
    assert logged(trainer, "search/fatal_rate") == [1.0]
    assert logged(trainer, "search/service_failure_rate") == [1.0]
    assert all(sum(t.mask_before_fatal) == 0 for t in trainer.last_trajectories)


def test_health_names_the_service(make_trainer):
    service = Service(lambda number: "refused")
    trainer, _ = train(make_trainer, service, steps=3)
    monitor = HealthMonitor(Settings(max_completion_tokens=300, max_new_tokens=40))
    said = []
    for step, line in enumerate(trainer.metric_lines):
        said += monitor.check({"step": step, **line})
    (warning,) = [w for w in said if w.code == "tools_fail"]
    assert "in 100% by the service" in warning.message


# ---------------------------------------------------------------- JSON calls, several a turn


def json_turns(question, turn):
    calls = [
        '<tool_call>\n{"name": "text_search", "arguments": {"query": "capital"}}\n</tool_call>',
        '<tool_call>\n{"name": "image_search", "arguments": {}}\n</tool_call>',
    ]
    turns = ["\n".join(calls) + "<|im_end|>", "<answer> Paris </answer><|im_end|>"]
    return turns[turn] if turn < len(turns) else None


def test_the_real_engine_runs_several_calls_in_one_turn(make_engine, environment, questions):
    world = SearchEnvironment(
        environment.text_index,
        environment.image_index,
        dialect="hermes",
        thumbnails=True,
        top_k_image=2,
    )
    engine = make_engine(
        environment=world,
        script=json_turns,
        max_new_tokens_per_turn=300,
        max_completion_tokens=900,
    )
    for trajectory in engine.rollout(questions[:2], group_size=2):
        asked, answered = trajectory.turns
        assert asked.action["type"] == "parallel"
        assert [action["type"] for action in asked.actions] == ["search", "image_search"]
        assert (trajectory.count("search"), trajectory.count("image_search")) == (1, 1)
        assert trajectory.n_calls == 2
        assert asked.call_faults == [None, None]
        assert asked.hits == ["france/capital", "italy/capital", "fr", "it"]
        assert answered.action == {"type": "answer", "text": "Paris"}
        assert trajectory.stop_reason == "answer"
        # the policy's end token is not repeated by the frame
        end = engine.tokenizer.eos_token_id
        assert asked.token_ids[-1] == end
        assert asked.observation_ids[0] != end
        decoded = engine.tokenizer.decode(asked.token_ids + asked.observation_ids)
        assert decoded.count("<|im_end|>") == 2
        n_pads = sum(i == engine.image_token_id for i in asked.observation_ids)
        assert n_pads == sum(engine.encode_image(image).n_tokens for image in asked.images) > 0


def test_a_training_with_json_calls_counts_every_call(make_trainer, environment):
    world = SearchEnvironment(environment.text_index, environment.image_index, dialect="hermes")
    trainer = make_trainer(
        script=json_turns,
        environment=world,
        per_device_train_batch_size=8,
        max_completion_length=900,
        generation_kwargs={"max_new_tokens": 300},
    )
    trainer.train()
    with_picture = [t for t in trainer.last_trajectories if t.images]
    assert all(t.rewards["total"] == pytest.approx(1.0) for t in with_picture)
    assert logged(trainer, "search/calls_per_episode") == [2.0]
    assert logged(trainer, "search/rate_text") == [1.0]
    # the question without a picture has no image search to offer, and says so
    failing = sum(not t.images for t in trainer.last_trajectories) / 8
    assert logged(trainer, "search/failure_rate") == [failing]
    assert logged(trainer, "search/service_failure_rate") == [0.0]
