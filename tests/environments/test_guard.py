"""Services that fail, hang, are busy or come back: deadlines, retries, calls side by side."""

import random
import threading
import time
from collections import Counter

import pytest

from environments import guard as guard_module
from environments.guard import BadCall, ServiceError, guard, pause_s, side_by_side
from environments.results import ToolResult, combined, infrastructure_fault, model_fault, shorten
from environments.tools import Hit


class Service:
    """Raises what it is told to, call by call, then answers."""

    def __init__(self, *errors, seconds=0.0):
        self.errors, self.seconds = list(errors), seconds
        self.times = []

    def __call__(self):
        self.times.append(time.perf_counter())
        time.sleep(self.seconds)
        if self.errors:
            raise self.errors.pop(0)
        return ToolResult("fine", hits=["h"])


@pytest.fixture
def pauses(monkeypatch):
    """Pauses that were asked for; none is taken."""
    asked = []
    monkeypatch.setattr(guard_module.time, "sleep", asked.append)
    return asked


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_a_service_that_recovers_is_asked_again(timeout_s, pauses):
    service = Service(ConnectionError(), TimeoutError())
    result = guard(service, "text", timeout_s, retries=2, backoff_s=0.1)
    assert (result.text, result.retries, result.fault) == ("fine", 2, None)
    assert len(service.times) == 3


def test_the_last_failure_is_what_is_reported(pauses):
    service = Service(*[ConnectionError()] * 9)
    result = guard(service, "text", 5.0, retries=3, backoff_s=0.1)
    assert (result.fault, result.retries, len(service.times)) == ("infrastructure", 3, 4)
    assert "ConnectionError" in result.text


def test_pauses_double_and_are_spread(pauses):
    guard(Service(*[OSError()] * 4), "text", None, retries=3, backoff_s=1.0)
    waits = [pause for pause in pauses if pause]
    assert len(waits) == 3
    for attempt, pause in enumerate(waits):
        assert 0.5 * 2**attempt <= pause <= 1.5 * 2**attempt
    assert len({pause_s(0, 1.0) for _ in range(20)}) == 20


def test_jitter_leaves_the_seeded_random_numbers_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    pause_s(0, 1.0)
    assert random.random() == expected


def test_a_busy_service_says_when_to_come_back(pauses):
    guard(Service(ServiceError("429", retry_after_s=7.0)), "text", None, retries=1, backoff_s=0.1)
    assert [pause for pause in pauses if pause] == [7.0]


def test_whoever_would_come_back_after_the_deadline_does_not_wait():
    service = Service(ServiceError("429", retry_after_s=60.0))
    start = time.perf_counter()
    result = guard(service, "text", 5.0, retries=3, backoff_s=0.01)
    assert time.perf_counter() - start < 2
    assert (result.fault, len(service.times)) == ("infrastructure", 1)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (BadCall("Private addresses are not read."), "model"),
        (ServiceError("401", is_permanent=True), "infrastructure"),
    ],
)
def test_what_no_retry_can_help_is_not_retried(error, fault, pauses):
    service = Service(error)
    result = guard(service, "page", 5.0, retries=3, backoff_s=0.1)
    assert (result.fault, result.retries, len(service.times)) == (fault, 0, 1)
    shows_message = str(error) in result.text
    assert shows_message == (fault == "model")  # a service's message may hold a key


def test_a_back_end_in_memory_is_asked_once(pauses):
    service = Service(RuntimeError())
    service.in_memory = True
    assert guard(service, "text", 5.0, service, retries=3).fault == "infrastructure"
    assert len(service.times) == 1


def test_one_deadline_holds_for_all_attempts():
    service = Service(*[OSError()] * 100, seconds=0.05)
    start = time.perf_counter()
    result = guard(service, "text", 1.0, retries=100, backoff_s=0.02)
    assert time.perf_counter() - start < 3
    assert result.fault == "infrastructure"
    assert 1 < len(service.times) < 10


def test_when_no_thread_can_be_had_that_is_a_failure_like_any_other(monkeypatch, pauses):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = guard(Service(), "text", 5.0, retries=1, backoff_s=0.1)
    assert (result.fault, result.retries) == ("infrastructure", 1)
    assert [r.text for r in side_by_side([Service(), Service()])] == ["fine", "fine"]


def test_calls_side_by_side_take_as_long_as_the_slowest():
    start = time.perf_counter()
    results = side_by_side(
        [
            lambda: guard(Service(seconds=0.3), "text", 5.0),
            lambda: guard(Service(seconds=0.3), "image", 5.0),
            lambda: guard(Service(seconds=30.0), "page", 0.4),
        ]
    )
    assert time.perf_counter() - start < 2.0
    assert [result.fault for result in results] == [None, None, "infrastructure"]
    assert side_by_side([]) == []


@pytest.mark.parametrize(
    ("parts", "is_error", "fault"),
    [
        ([ToolResult("a"), ToolResult("b")], False, None),
        ([ToolResult("a"), model_fault("b")], True, "model"),
        ([model_fault("b"), infrastructure_fault("c"), ToolResult("a")], True, "infrastructure"),
    ],
)
def test_faults_of_several_calls_become_one(parts, is_error, fault):
    result = combined(parts, 1.5)
    assert (result.is_error, result.fault, result.seconds) == (is_error, fault, 1.5)
    assert result.each == parts


def test_a_dead_service_does_not_fill_the_log(caplog, monkeypatch):
    monkeypatch.setattr(guard_module, "_failures", Counter())
    for _ in range(120):
        guard(Service(ConnectionError("refused")), "text", None)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert messages == [
        f"text search failed ({n} so far): ConnectionError('refused')" for n in (1, 10, 100)
    ]


def test_shortening_reaches_every_part():
    part = ToolResult("a b c", documents=[Hit("i", "T", "one two three")])
    result = shorten(combined([part, part], 0.0), 2)
    assert [p.documents[0].text for p in result.parts] == ["one two [cut]"] * 2
