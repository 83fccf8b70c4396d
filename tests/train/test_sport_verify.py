"""Scores of executed steps, by facts and by a model; what a model may and may not do to them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configs.errors import ConfigError
from configs.sections import Sport
from train.chat import last_object, make_chat, quoted
from train.sport_tasks import reword, usable_wording
from train.sport_verify import FactVerifier, ModelVerifier, Step, fact_score
from train.trajectories import Trajectory, Turn

QUESTION = {
    "id": "q", "kind": "two", "question": "What is the capital of this place?",
    "answers": ["Paris"], "entity_names": ["France", "French Republic"],
    "gold_passages": ["fr/government"], "relation": "capital", "image": "a photo",
}  # fmt: skip


def turn(kind, words="", hits=(), observation="results", **values):
    keys = {"search": "query", "answer": "text", "image_search": "region", "invalid": "reason"}
    shown = None if kind in ("answer", "invalid") else observation
    action = {"type": kind, keys[kind]: words}
    return Turn(f"{kind} {words}", [1], [0.0], action, observation=shown, hits=list(hits), **values)


GOOD = turn("search", "capital of France", ["fr/government", "fr/economy"])
PHOTO = turn("image_search", "full", ["fr"], "Doc 1(Title: France) Doc 2(Title: Italy)")


@pytest.mark.parametrize(
    ("past", "step", "score"),
    [
        # .1 legal + .3 names the entity + .6 the gold passage for the first time
        ([], GOOD, 1.0),
        ([], turn("search", "capital of French Republic", ["it/economy"]), 0.4),
        ([], turn("search", "capital of Italy", ["it/government"]), 0.1),
        # the passage without the name, as by luck
        ([], turn("search", "Paris", ["fr/government"]), 0.7),
        ([], PHOTO, 0.4),
        ([PHOTO], GOOD, 1.0),  # another tool: the name counts again
        ([GOOD], turn("search", "France capital city", ["fr/government"]), 0.1),  # nothing new
        ([GOOD], turn("search", " Capital of france ", ["fr/government"]), 0.0),  # the same again
        ([], turn("answer", "paris"), 1.0),
        ([], turn("answer", "Rome"), 0.1),
        ([], turn("invalid", "text"), 0.0),
        ([], turn("search", "capital of France", is_error=True, fault="model"), 0.0),
        ([], turn("search", "capital of France", observation=None), 0.0),  # the last turn
        ([], turn("search", "capital of France", is_error=True, fault="infrastructure"), None),
    ],
)
def test_a_step_is_scored_by_what_came_back(past, step, score):
    found = fact_score(QUESTION, past, step)
    assert found == (score if score is None else pytest.approx(score))


def test_without_gold_passages_a_text_with_the_answer_is_evidence():
    question = {"id": "q", "question": "?", "answers": ["Paris"]}
    assert fact_score(question, [], turn("search", "x", [], "It is Paris.")) == pytest.approx(0.7)
    assert fact_score(question, [], turn("search", "x", [], "Parisians")) == pytest.approx(0.1)
    # what an image search returns is no evidence of a fact
    assert fact_score(question, [], turn("image_search", "full", [], "Paris")) == pytest.approx(0.1)


def step_of(*turns, past=()):
    candidates = [Trajectory("q", "two", True, "", [], [], turns=[*past, t]) for t in turns]
    return Step(QUESTION, list(past), candidates)


def test_the_verifier_scores_every_candidate_of_every_step():
    scores = FactVerifier().score([step_of(GOOD, turn("answer", "Rome")), step_of(PHOTO)])
    assert scores == [pytest.approx([1.0, 0.1]), pytest.approx([0.4])]


# ---------------------------------------------------------------- a model


class Endpoint:
    """An OpenAI-compatible service that replies with what it is told to."""

    def __init__(self):
        self.reply, self.status, self.seen = "", 200, []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.seen.append((dict(self.headers), body))
                reply = endpoint.reply(body) if callable(endpoint.reply) else endpoint.reply
                data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
                self.send_response(endpoint.status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint():
    service = Endpoint()
    yield service
    service.server.shutdown()
    service.server.server_close()


def chat_of(endpoint):
    return make_chat(Sport(llm_url=endpoint.url, llm_model="m", llm_timeout_s=5.0))


def test_a_models_scores_are_read_by_ten(endpoint, monkeypatch):
    monkeypatch.setenv("OBM_SPORT_KEY", "secret-key")
    endpoint.reply = 'I think {"a": 1} first.\n{"reason": "new", "scores": [9, 2.5]}'
    verifier = ModelVerifier(chat_of(endpoint))
    assert verifier.score([step_of(GOOD, turn("answer", "Rome"))]) == [[0.9, 0.25]]
    headers, body = endpoint.seen[0]
    assert headers["Authorization"] == "Bearer secret-key"
    shown = json.loads(body["messages"][1]["content"])
    assert shown["right_answers"] == ["Paris"]
    assert len(shown["candidates"]) == 2


@pytest.mark.parametrize(
    "reply",
    [
        '{"scores": [9]}', '{"scores": [9, 11]}', '{"scores": [9, "8"]}', '{"scores": [true, 1]}',
        "9 and 2", '{"scores": [9, 2]} and that is all', "[9, 2]",
    ],
)  # fmt: skip
def test_a_reply_without_a_score_for_each_is_no_verdict(endpoint, reply):
    endpoint.reply = reply
    verifier = ModelVerifier(chat_of(endpoint))
    assert verifier.score([step_of(GOOD, PHOTO)]) == [[None, None]]
    assert verifier.last_error


def test_a_dead_service_is_no_verdict_and_its_error_is_kept(endpoint):
    endpoint.status = 401
    verifier = ModelVerifier(chat_of(endpoint))
    assert verifier.score([step_of(GOOD, PHOTO)]) == [[None, None]]
    assert "401" in verifier.last_error


def test_a_model_cannot_score_what_a_service_cut_short(endpoint):
    endpoint.reply = '{"scores": [9, 2]}'
    failed = turn("search", "x", is_error=True, fault="infrastructure")
    assert ModelVerifier(chat_of(endpoint)).score([step_of(failed, GOOD)]) == [[None, 0.2]]


def test_what_a_policy_writes_is_quoted_without_tags_and_special_tokens():
    text = quoted({"step": "<|im_end|></answer> \u200bscores", "list": ["<b>"], "n": 3})
    assert text == {"step": "‹|im_end|›‹/answer› scores", "list": ["‹b›"], "n": 3}
    assert quoted("x" * 5000).endswith("[cut]")


def test_the_last_object_of_a_reply_is_the_outermost():
    assert last_object('{"a": {"b": 1}}') == {"a": {"b": 1}}
    assert last_object('```json\n{"a": 1}\n```') == {"a": 1}
    assert last_object("{" * 100) is None


@pytest.mark.parametrize("missing", ["llm_url", "llm_model"])
def test_a_model_needs_an_address_and_a_name(missing):
    values = {"llm_url": "http://x/v1", "llm_model": "m"} | {missing: None}
    with pytest.raises(ConfigError, match=rf"sport\.{missing}: missing"):
        make_chat(Sport(**values))


# ---------------------------------------------------------------- wording


@pytest.mark.parametrize(
    ("text", "is_used"),
    [
        ("Which city is the  capital of\nthis place?", True),
        ("What is the capital of France?", False),  # names what the photo shows
        ("Is Paris the capital of this place?", False),
        ("Which city governs this place?", False),  # no longer asks for the same
        ("", False),
        (None, False),
        ("capital " * 61, False),
    ],
)
def test_a_wording_that_gives_away_or_asks_otherwise_is_not_used(text, is_used):
    assert (usable_wording(text, QUESTION) is not None) == is_used


def test_a_text_question_must_go_on_naming_its_place():
    task = {**QUESTION, "image": None}
    assert usable_wording("Name the capital of France.", task)
    assert usable_wording("Name the capital of it.", task) is None


def test_tasks_keep_the_graphs_words_where_the_model_fails(endpoint):
    def reply(body):
        asked = json.loads(body["messages"][1]["content"])["question"]
        return '{"question": "Name the capital of this place."}' if "?" in asked else "no"

    endpoint.reply = reply
    worded = reword([QUESTION, {**QUESTION, "question": "Say it."}], chat_of(endpoint))
    assert [task["question"] for task in worded] == ["Name the capital of this place.", "Say it."]
    assert worded[0]["answers"] == ["Paris"]
