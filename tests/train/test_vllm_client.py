"""The vLLM client and engine against a small HTTP server that says what a test wants it to."""

import inspect
import json
import math
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from configs.errors import ConfigError
from configs.schema import load_config, shipped_config
from configs.sections import Rollout
from train.grpo import SearchGRPOTrainer
from train.leash import name_myself
from train.rollout import RolloutEngine
from train.settings import describe_step, free_port, resolved_grpo
from train.vllm_client import (
    BIAS,
    Sampling,
    ServerImage,
    VLLMClient,
    VLLMError,
    place_images,
    read_reply,
)
from train.vllm_rollout import VLLMRolloutEngine, _handover_folder

PAD = 9
SERVER_INFO = {
    "vllm_config": {
        "model_config": {"logprobs_mode": "processed_logprobs", "max_logprobs": -1},
        "parallel_config": {"worker_extension_cls": "train.vllm_worker.PolicyWorker"},
    }
}


def choice(tokens, logprobs=None, name="token_id", **more):
    """One drawn sequence, with the field name of vLLM 0.32 (`token_id`) or 0.31 (`token`)."""
    values = logprobs or [-1.0] * len(tokens)
    names = [i if name == "token_id" else f"token_id:{i}" for i in tokens]
    pairs = zip(names, values, strict=True)
    content = [{name: i, "logprob": v, "top_logprobs": []} for i, v in pairs]
    return {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "stop", **more}


class FakeServer:
    """Answers by path; an answer is a value, or (status, value), or a function of the body.

    A list of answers is used up one by one, its last one stays.
    """

    def __init__(self):
        self.answers = {
            "/health": None,
            "/v1/models": {"data": [{"id": "policy", "max_model_len": 1024}]},
            "/server_info": SERVER_INFO,
            "/weight_info": {"weight_version": "1"},
            "/reset_prefix_cache": {"success": True},
            **dict.fromkeys(("/pause", "/resume", "/collective_rpc", "/update_weight_version")),
            **dict.fromkeys(("/reset_mm_cache", "/reset_encoder_cache")),
        }
        self.requests = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = self.path.partition("?")[0]
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                fake.requests.append((path, body))
                status, value = fake.answer(path, body)
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass  # a client that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body):
        if path not in self.answers:
            return 404, {"detail": "Not Found"}
        value = self.answers[path]
        if isinstance(value, list):
            value = value.pop(0) if len(value) > 1 else value[0]
        if callable(value):
            value = value(body)
        return value if isinstance(value, tuple) else (200, value)

    def bodies(self, path):
        return [body for asked, body in self.requests if asked == path]

    @property
    def paths(self):
        return [path for path, _ in self.requests]


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def client(server):
    return VLLMClient(server.url, timeout_s=5.0, retries=2, wait_s=0.01)


GENERATE = "/inference/v1/generate"
RENDER = "/v1/chat/completions/render"


# ---------------------------------------------------------------- replies


@pytest.mark.parametrize("name", ["token_id", "token"])
def test_both_names_of_the_token_field_are_read(server, client, name):
    server.answers[GENERATE] = {"choices": [choice([5, 6], [-0.5, -1.5], name)]}
    reply = client.generate([1, 2], [], Sampling(max_tokens=4))
    assert reply.token_ids == [5, 6]
    assert reply.logprobs == [-0.5, -1.5]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_are_those_of_the_full_distribution(temperature):
    """Logits 1, 2, 3 with token 2 barred: the server sees softmax((1, 2, 3 + b) / T)."""
    sampling = Sampling(max_tokens=1, temperature=temperature, barred=(2,))
    bias = BIAS * max(1.0, temperature)
    seen = [logit / temperature for logit in (1.0, 2.0, 3.0 + bias)]
    normalizer = math.log(sum(math.exp(value) for value in seen))
    entry = {
        "token_id": 1,
        "logprob": seen[1] - normalizer,
        "top_logprobs": [{"token_id": 2, "logprob": seen[2] - normalizer}],
    }
    reply = read_reply(
        {"choices": [{"token_ids": [1], "logprobs": {"content": [entry]}}]}, sampling
    )
    true = [logit / temperature for logit in (1.0, 2.0, 3.0)]
    expected = true[1] - math.log(sum(math.exp(value) for value in true))
    assert reply.logprobs[0] == pytest.approx(expected, abs=1e-9)
    assert reply.logprobs[0] < entry["logprob"] - 0.1


GOOD = choice([5, 6])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "no choice"),
        ({}, "no choice"),
        ({"choices": []}, "no choice"),
        ({"choices": [GOOD, GOOD]}, "no choice"),
        ({"choices": [{**GOOD, "logprobs": None}]}, "no choice"),
        ({"choices": [{**GOOD, "token_ids": None}]}, "no token ids"),
        ({"choices": [{**GOOD, "token_ids": [5, -6]}]}, "no token ids"),
        ({"choices": [{**GOOD, "token_ids": ["5", "6"]}]}, "no token ids"),
        ({"choices": [{**GOOD, "token_ids": []}]}, "no tokens"),
        ({"choices": [{**GOOD, "finish_reason": "abort"}]}, "no tokens"),
        ({"choices": [{**GOOD, "token_ids": [5]}]}, "another number of log-probs"),
        ({"choices": [{**GOOD, "token_ids": [5, 7]}]}, "log-prob of token 6 stands where 7"),
        ({"choices": [choice([5, 6, 7, 8, 9])]}, "5 tokens where 4 were asked"),
        ({"choices": [choice([5], [-9999.0])]}, "no log-prob for token 5"),
        ({"choices": [choice([5], [math.nan])]}, "no log-prob for token 5"),
        ({"choices": [choice([5], name="text")]}, "without token or number"),
        (
            {"choices": [choice([5], weight_versions=[{"version": "a"}, {"version": "b"}])]},
            "several versions",
        ),
    ],
)
def test_a_reply_that_does_not_fit_is_refused_by_name(server, client, reply, reason):
    server.answers[GENERATE] = reply
    with pytest.raises(VLLMError, match=rf"{server.url}{GENERATE}: .*{reason}"):
        client.generate([1, 2], [], Sampling(max_tokens=4))
    assert len(server.requests) == 1  # asking again would not help


def test_a_missing_logprob_of_a_barred_token_is_an_error(server, client):
    server.answers[GENERATE] = {"choices": [choice([5])]}
    with pytest.raises(VLLMError, match="lacks the log-prob of token 2"):
        client.generate([1], [], Sampling(max_tokens=4, barred=(2,)))


def test_what_is_no_json_is_an_error(server, client):
    server.answers[GENERATE] = (200, b"<html>a proxy</html>")
    with pytest.raises(VLLMError, match="is no JSON"):
        client.generate([1], [], Sampling(max_tokens=4))


# ---------------------------------------------------------------- requests


def test_a_request_leaves_nothing_to_the_servers_defaults(server, client):
    server.answers[GENERATE] = {
        "choices": [choice([5])],
    }
    client.model = "policy"
    client.generate([1, 2], [], Sampling(3, 0.7, 11, ("</a>",), (4,)))
    (body,) = server.bodies(GENERATE)
    assert body["token_ids"] == [1, 2]
    assert "features" not in body
    assert body["sampling_params"] == {
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 11,
        "stop": ["</a>"],
        "stop_token_ids": [4],
        "logprobs": 0,
        "output_kind": 2,
    }


def test_placeholders_are_looked_up_in_our_tokens():
    images = [ServerImage("a", "", 2), ServerImage("b", "", 3)]
    tokens = [1, PAD, PAD, 2, PAD, PAD, PAD]
    assert place_images(tokens, images, PAD) == [
        {"offset": 1, "length": 2},
        {"offset": 4, "length": 3},
    ]


def test_pictures_that_touch_are_told_apart_by_their_sizes():
    images = [ServerImage("a", "", 2), ServerImage("b", "", 1)]
    places = place_images([PAD, PAD, PAD], images, PAD)
    assert places == [{"offset": 0, "length": 2}, {"offset": 2, "length": 1}]


@pytest.mark.parametrize("tokens", [[1, PAD], [1, PAD, PAD, PAD], [1], [PAD, 1, PAD]])
def test_placeholders_that_do_not_fit_the_pictures_are_refused(tokens):
    with pytest.raises(ValueError, match="placeholders"):
        place_images(tokens, [ServerImage("a", "", 2)], PAD)


def test_a_placeholder_without_a_picture_is_refused(client):
    """The server would answer, from garbage."""
    with pytest.raises(ValueError, match="1 image placeholders for 0 images"):
        client.generate([1, PAD], [], Sampling(max_tokens=1), PAD)


def rendered(body):
    return {
        "features": {
            "mm_hashes": {"image": ["h"]},
            "kwargs_data": {"image": ["data"]},
            "mm_placeholders": {"image": [{"offset": 6, "length": 2}]},
        }
    }


def test_a_picture_travels_once_and_is_named_afterwards(server, client):
    server.answers |= {RENDER: rendered, GENERATE: {"choices": [choice([5])]}}
    image = client.encode(Image.new("RGB", (4, 4)))
    for _ in range(2):
        client.generate([1, PAD, PAD], [image], Sampling(max_tokens=1), PAD)
    first, second = (body["features"] for body in server.bodies(GENERATE))
    assert first["kwargs_data"] == {"image": ["data"]}
    assert second["kwargs_data"] == {"image": [None]}
    assert second["mm_placeholders"] == {"image": [{"offset": 1, "length": 2}]}


def test_a_picture_that_the_server_forgot_is_sent_again(server, client):
    def answer(body):
        has_data = body["features"]["kwargs_data"]["image"] == ["data"]
        return {"choices": [choice([5])]} if has_data else (500, {"error": "cache miss"})

    server.answers |= {RENDER: rendered, GENERATE: answer}
    image = client.encode(Image.new("RGB", (4, 4)))
    for _ in range(2):
        assert client.generate([PAD, PAD], [image], Sampling(1), PAD).token_ids == [5]
    assert len(server.bodies(GENERATE)) == 3


def test_features_of_another_kind_are_refused(server, client):
    server.answers[RENDER] = {"features": None}
    with pytest.raises(VLLMError, match=f"{RENDER}: returns no features"):
        client.encode(Image.new("RGB", (4, 4)))


# ---------------------------------------------------------------- trouble


def test_a_failed_request_is_tried_again(server, client):
    server.answers[GENERATE] = [(500, {"error": {"message": "oops"}}), {"choices": [choice([5])]}]
    assert client.generate([1], [], Sampling(max_tokens=1)).token_ids == [5]
    assert len(server.requests) == 2


def test_a_server_that_keeps_failing_is_one_clear_error(server, client):
    server.answers[GENERATE] = (500, {"error": {"message": "EngineDeadError"}})
    with pytest.raises(VLLMError, match=r"HTTP 500: EngineDeadError \(3 attempts .*docs/vllm.md"):
        client.generate([1], [], Sampling(max_tokens=1))
    assert len(server.requests) == 3


def test_a_refused_request_is_not_tried_again(server, client):
    server.answers[GENERATE] = (400, {"error": {"message": "prompt too long"}})
    with pytest.raises(VLLMError, match="HTTP 400: prompt too long"):
        client.generate([1], [], Sampling(max_tokens=1))
    assert len(server.requests) == 1


def test_a_server_that_does_not_answer_in_time_is_one_clear_error(server):
    release = threading.Event()
    server.answers["/health"] = lambda body: release.wait(10) and None
    client = VLLMClient(server.url, timeout_s=0.1, retries=1, wait_s=0.01)
    with pytest.raises(VLLMError, match=rf"{server.url}/health: TimeoutError.*2 attempts of 0.1 s"):
        client.check()
    release.set()


def test_a_dead_server_is_one_clear_error():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        VLLMError, match=rf"rollout.url: {url}/health: ConnectionRefused.*docs/vllm"
    ):
        VLLMClient(url, retries=1, wait_s=0.01).check()


def test_a_connection_that_the_server_closed_is_opened_again(server):
    client = VLLMClient(server.url, retries=0)
    client.policy_version()
    client._local.connection.sock.shutdown(socket.SHUT_RDWR)
    assert client.policy_version() == "1"


@pytest.mark.parametrize("url", ["ftp://host", "127.0.0.1:8000", "file:///etc/passwd", "http://"])
def test_only_http_urls_are_taken(url):
    with pytest.raises(VLLMError, match="is no server; write http://host:port"):
        VLLMClient(url)


@pytest.mark.parametrize("rest", ["user:secret@host:8000", "secret@host", "host:8000?key=secret"])
def test_an_address_with_a_key_is_refused_and_not_shown(rest):
    with pytest.raises(VLLMError, match="holds more than host and path") as caught:
        VLLMClient(f"http://{rest}")
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- what the server is


def test_the_check_says_what_is_served(server, client):
    info = client.check(n_barred=5)
    assert (info.model, info.max_tokens, client.model) == ("policy", 1024, "policy")


def _info(section, key, value):
    return {"vllm_config": {k: {**v, key: value} if k == section else v
                            for k, v in SERVER_INFO["vllm_config"].items()}}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "fix"),
    [
        (_info("model_config", "logprobs_mode", "raw_logprobs"), "--logprobs-mode processed"),
        (_info("model_config", "max_logprobs", 5), "--max-logprobs -1"),
        (_info("parallel_config", "worker_extension_cls", ""), "--worker-extension-cls"),
        ({}, "lacks 'vllm_config'"),
        ((404, {}), "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_without_a_needed_option_is_refused_with_the_option(server, client, answer, fix):
    server.answers["/server_info"] = answer
    with pytest.raises(VLLMError, match=fix):
        client.check(n_barred=5)


# ---------------------------------------------------------------- weights


def test_an_update_pauses_loads_forgets_and_resumes_in_that_order(server, client):
    client.update_policy("/weights", "run-3")
    assert server.paths == [
        "/pause",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/update_weight_version",
        "/resume",
    ]
    assert server.bodies("/collective_rpc") == [{"method": "load_policy", "args": ["/weights"]}]
    assert server.bodies("/update_weight_version") == [{"new_version": "run-3"}]


def test_pictures_are_sent_again_after_an_update(server, client):
    server.answers |= {RENDER: rendered, GENERATE: {"choices": [choice([5])]}}
    image = client.encode(Image.new("RGB", (4, 4)))
    client.generate([PAD, PAD], [image], Sampling(max_tokens=1), PAD)
    client.update_policy("/weights", "1")
    client.generate([PAD, PAD], [image], Sampling(max_tokens=1), PAD)
    assert server.bodies(GENERATE)[-1]["features"]["kwargs_data"] == {"image": ["data"]}


def test_a_failed_update_leaves_no_paused_server(server, client):
    server.answers["/collective_rpc"] = (500, {"error": "no such file"})
    with pytest.raises(VLLMError, match="/collective_rpc: HTTP 500: no such file"):
        client.update_policy("/weights", "1")
    assert server.paths[-1] == "/resume"


def test_a_cache_that_was_not_reset_is_an_error(server, client):
    server.answers["/reset_prefix_cache"] = {"success": False}
    with pytest.raises(VLLMError, match="are other requests running"):
        client.update_policy("/weights", "1")


def test_a_handover_that_was_killed_is_cleared_away_by_the_next(tmp_path):
    here, numbering = f"policy-{socket.gethostname()}-", Path("/proc/self/ns/pid").stat().st_ino
    ours = f"{here}{numbering}-"
    alive = f"{ours}{name_myself()}-abc"
    # of another machine, and of a container whose processes have numbers of their own
    others = {"policy-elsewhere-1-999999999:1-abc", f"{here}{numbering + 1}-999999999:1-abc"}
    for name in (f"{ours}999999999:1-abc", alive, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    with _handover_folder(tmp_path) as folder:
        assert {path.name for path in tmp_path.iterdir()} == {alive, *others, folder.name}
    assert {path.name for path in tmp_path.iterdir()} == {alive, *others}


# ---------------------------------------------------------------- the engine on the fake


@pytest.fixture
def say(server, policy, environment):
    """Engine on a server that says the given texts, one a request, as far as it may."""
    model, processor = policy
    tokenizer = processor.tokenizer

    def make(texts, question=None, version="1", **settings):
        queue = list(texts)

        def answer(body):
            ids = tokenizer(queue.pop(0), add_special_tokens=False)["input_ids"]
            params = body["sampling_params"]
            ids = ids[: params["max_tokens"]]
            drawn = choice(ids, weight_versions=[{"version": version}])
            for entry in drawn["logprobs"]["content"]:
                told = params["logprob_token_ids"][:-1]
                entry["top_logprobs"] = [{"token_id": i, "logprob": -150.0} for i in told]
            return {"choices": [drawn]}

        server.answers |= {GENERATE: answer, RENDER: rendered}
        options = {"max_new_tokens_per_turn": 60, "max_completion_tokens": 200, **settings}
        return VLLMRolloutEngine(
            model,
            processor,
            environment,
            client=VLLMClient(server.url, retries=0, timeout_s=5),
            **options,
        )

    return make


def text_question(questions):
    return next(question for question in questions if question["image"] is None)


SEARCH = "<think> a </think> <search> capital of France </search>"
ANSWER = "<answer> Paris </answer>"


def test_an_episode_is_a_chain_of_requests_with_growing_context(say, server, questions):
    (trajectory,) = say([SEARCH, ANSWER]).rollout([text_question(questions)])
    assert trajectory.answer == "Paris"
    assert [turn.action["type"] for turn in trajectory.turns] == ["search", "answer"]
    first, second = (body["token_ids"] for body in server.bodies(GENERATE))
    turn = trajectory.turns[0]
    assert first == trajectory.prompt_ids
    assert second == first + turn.token_ids + turn.observation_ids
    seeds = [body["sampling_params"]["seed"] for body in server.bodies(GENERATE)]
    assert len(set(seeds)) == 2


def test_a_turn_goes_on_where_the_server_stopped_too_early(say, server, questions):
    """As where a token goes on behind the tag: a turn ends where its text ends with one."""
    (trajectory,) = say(["<think> so", SEARCH, ANSWER]).rollout([text_question(questions)])
    assert len(trajectory.turns) == 2
    assert trajectory.turns[0].text == "<think> so" + SEARCH
    assert len(server.bodies(GENERATE)) == 3


def test_what_a_server_says_behind_the_stop_is_dropped(say, questions):
    (trajectory,) = say([SEARCH + " and more", ANSWER]).rollout([text_question(questions)])
    assert trajectory.turns[0].text == SEARCH


def test_a_turn_that_is_cut_ends_the_episode_as_length(say, questions):
    engine = say([SEARCH], max_new_tokens_per_turn=5)
    (trajectory,) = engine.rollout([text_question(questions)])
    assert trajectory.stop_reason == "length"
    assert len(trajectory.completion_ids) == 5


def test_entropies_are_estimated_by_the_surprise_of_the_drawn_token(say, questions):
    (trajectory,) = say([ANSWER]).rollout([text_question(questions)])
    (turn,) = trajectory.turns
    assert turn.entropies == [-logprob for logprob in turn.logprobs]


def test_weights_of_another_run_are_refused(say, questions):
    with pytest.raises(VLLMError, match="answers with the weights 7, not with 1"):
        say([ANSWER], version="7").rollout([text_question(questions)])


def test_every_process_sends_pictures_again_after_an_update_by_the_first(say, server):
    engine = say([])
    engine.client._known.add("h")
    engine.confirm_policy(1)
    assert engine.client._known == set()
    assert server.paths.count("/collective_rpc") == 0


def test_an_engine_without_a_trainer_sends_its_policy_first(say, server, questions):
    engine = say([ANSWER, ANSWER])
    for _ in range(2):
        engine.rollout([text_question(questions)])
    assert server.paths.count("/collective_rpc") == 1


def test_weights_that_the_shared_memory_cannot_hold_are_not_begun(say, monkeypatch, tmp_path):
    engine = say([], sync_folder=tmp_path)
    n_bytes = sum(parameter.nbytes for parameter in engine.model.parameters())
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: room._replace(free=n_bytes - 1))
    with pytest.raises(VLLMError, match=r"rollout\.sync_dir: .* GB free, .*--shm-size"):
        engine.send_policy(engine.model, 1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda place: room._replace(free=n_bytes))
    engine.send_policy(engine.model, 1)


def test_an_episode_that_the_server_could_not_hold_is_refused(say, server, questions):
    server.answers["/v1/models"] = {"data": [{"id": "policy", "max_model_len": 210}]}
    with pytest.raises(VLLMError, match="--max-model-len"):
        say([ANSWER]).rollout([text_question(questions)])


def test_a_picture_of_another_size_on_the_server_is_refused(say, questions):
    with pytest.raises(VLLMError, match="makes 2 tokens of a picture of which the policy makes 4"):
        say([ANSWER]).rollout([questions[0]])


def test_a_nucleus_is_refused(say):
    with pytest.raises(ValueError, match=r"top_p 0\.9 does not go with a vLLM server"):
        say([], top_p=0.9)


def test_both_engines_have_the_protocols_members():
    from train.episodes import Engine

    members = [name for name in vars(Engine) if not name.startswith("_")]
    assert {"rollout", "rollout_rows", "prepare", "send_policy"} <= set(members)
    for engine in (RolloutEngine, VLLMRolloutEngine):
        assert all(callable(getattr(engine, name)) for name in members)


# ---------------------------------------------------------------- correction and settings


def test_trl_still_corrects_where_we_switch_it_on():
    made = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert made.count("if self.use_vllm and self.vllm_importance_sampling_correction:") >= 3
    assert "(old_per_token_logps - sampling_per_token_logps) * mask" in made
    used = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]' in used
    assert "use_vllm" not in inspect.getsource(GRPOTrainer._prepare_inputs)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # tokens of row 0 are twice, of row 1 four times as probable in training as in sampling
        ("token_truncate", lambda n: (2.0, 3.0)),
        ("token_mask", lambda n: (2.0, 0.0)),
        ("sequence_truncate", lambda n: (min(2.0**n, 3.0), 3.0)),
        ("sequence_mask", lambda n: (0.0 if n > 1 else 2.0, 0.0)),
    ],
)
def test_the_ratio_is_that_of_training_to_sampling(
    fresh_policy, environment, questions, tmp_path, correction, expected
):
    model, processor = fresh_policy
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
        activation_checkpointing=False, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=60, generation_kwargs={"max_new_tokens": 12},
    )  # fmt: skip
    trainer = SearchGRPOTrainer(
        model,
        args=args,
        questions=questions,
        environment=environment,
        rewards={"accuracy": 1.0, "format": 0.1, "search_penalty": 0.1},
        processing_class=processor,
    )
    trainer._correct_importance(
        Rollout(backend="vllm", importance_correction=correction, importance_cap=3.0)
    )
    roll_out = trainer.engine.rollout_rows

    def rollout_rows(*args, **kwargs):
        trajectories = roll_out(*args, **kwargs)
        for factor, trajectory in zip((2, 4, 1, 1), trajectories, strict=True):
            for turn in trajectory.turns:
                turn.logprobs = [value - math.log(factor) for value in turn.logprobs]
        return trajectories

    trainer.engine.rollout_rows = rollout_rows
    trainer.model.train()
    batch = trainer._generate_and_score_completions(
        [trainer.train_dataset[i // 2] for i in range(4)]
    )
    ratio = batch["importance_sampling_ratio"]
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    ratio = ratio.expand(mask.shape)
    for row in (0, 1):
        wanted = expected(int(mask[row].sum()))[row]
        assert torch.allclose(ratio[row][mask[row]], torch.tensor(wanted), rtol=1e-4)
    assert torch.allclose(ratio[2:][mask[2:]], torch.tensor(1.0), atol=1e-4)
    batch["advantages"] = torch.ones(4)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    # at the first step the loss is minus the mean over tokens of ratio * advantage
    assert loss.item() == pytest.approx(-(ratio[mask].mean()).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("grpo.top_p=0.9", "set it to 1.0, or rollout.backend to in_process"),
        ("grpo.temperature=2.5", "takes 2.0 at most"),
        ("grpo.loss_type=vespo", "use token_truncate"),
        ("grpo.use_vllm=true", "rollout.backend: vllm"),
    ],
)
def test_settings_that_do_not_go_with_a_server_are_refused(override, fix):
    overrides = [
        "rollout.backend=vllm",
        "rollout.importance_correction=sequence_mask",
        override,
    ]
    with pytest.raises(ConfigError, match=fix):
        resolved_grpo(load_config(shipped_config("demo"), overrides))


def test_a_dry_run_says_who_draws_the_tokens():
    config = load_config(shipped_config("demo"), ["rollout.backend=vllm"])
    rows = dict(describe_step(config, 1))
    assert rows["rollout"] == "vLLM at http://127.0.0.1:8000, correction token_truncate"
