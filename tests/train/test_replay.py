"""A rollout replays bit for bit from its cache, with every service dead."""

import io
import json

import pytest

pytest.importorskip("httpcore", reason="needs the extra live")
pytest.importorskip("trafilatura", reason="needs the extra live")

from configs.schema import load_config
from environments.cache import ResultCache
from tests.environments.fake_services import FakeServices
from train.run import run_training
from train.worlds import load_environment

KEY = "sk-key-of-the-run"
PAGE = """<html><head><title>Paris</title></head><body><article>
<p>Paris is the capital of France and lies on the river Seine, says page number {n}.</p>
<p>Its metro was opened in the year 1900, for the fair of that year, with one line.</p>
</article></body></html>"""


@pytest.fixture
def fake(monkeypatch):
    for name in ("SERPER_API_KEY", "SERPAPI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    with FakeServices() as services:
        yield services


def config_of(tmp_path, fake, *overrides):
    """Live text, live pictures with thumbnails and pages of this machine, all cached."""
    path = tmp_path / "settings.yaml"
    path.write_text(
        f"""
output: {tmp_path / "run"}
environment:
  dialect: search_r1
  text_provider: serper
  image_provider: serpapi
  page_reader: direct
  thumbnails: true
  visits: 1
  text_searches: 2
  top_k_image: 2
  invalid_ends: false
  cache: {tmp_path / "cache"}
live:
  text_url: {fake.url}/serper
  image_url: {fake.url}/serpapi
  image_host: {tmp_path / "served"}
  image_host_url: https://pictures.example.org
  allow_loopback: true
  requests_per_second: 1000
  retries: 0
"""
    )
    return load_config(path, list(overrides))


def answers(fake, png):
    """Replies that count up: asked again, every service says something else."""

    def answer(request):
        n = len(fake.requests)
        if request.path == "/serper/search":
            url = f"{fake.url}/pages/paris"
            fake.page("/pages/paris", PAGE.format(n=n))
            return {
                "searchParameters": {},
                "organic": [
                    {"title": f"Paris {n}", "link": url, "snippet": f"{request.json['q']} {n}"}
                ],
            }
        if request.path == "/serpapi/search":
            for i in range(2):
                fake.page(f"/t/{n}-{i}.png", png(n * 2 + i), "image/png")
            return {
                "search_metadata": {},
                "visual_matches": [
                    {
                        "title": f"Match {n}-{i}",
                        "link": f"https://example.org/{n}-{i}",
                        "thumbnail": f"{fake.url}/t/{n}-{i}.png",
                    }
                    for i in range(2)
                ],
            }
        return None

    return answer


def png(seed):
    from tests.train.conftest import noise_image

    buffer = io.BytesIO()
    noise_image(seed, 56, 28 * (1 + seed % 2)).save(buffer, "PNG")
    return buffer.getvalue()


def script_for(fake):
    """Every tool once, a refused page, then free sampling."""
    searches = ["<think> see </think> <search> <img> </search>"]
    searches += ["<think> go on </think> <search> capital of France {n} </search>"]
    visits = [f"<think> read </think> <visit> {fake.url}/pages/paris </visit>"]
    refused = [f"<think> read </think> <visit> {fake.url}/pages/none </visit>"]

    def script(question, turn):
        number = int(question["id"][1:])
        last = visits if number % 2 else refused
        turns = [*searches, *last] if question["image"] is not None else [searches[1], *last]
        return turns[turn].format(n=number % 3) if turn < len(turns) else None

    return script


def recorded(trajectories, with_floats):
    """All that is in them but wall times.

    Log-probs are bit-equal where equal batches are computed, that is without tool threads: a batch
    holds the rows whose tool has answered, and that is a matter of time.
    """
    left_out = {"images", "seconds"} | (set() if with_floats else {"logprobs", "entropies"})
    return [
        {
            **{k: v for k, v in vars(t).items() if k not in ("images", "turns")},
            "turns": [
                {
                    **{k: v for k, v in vars(turn).items() if k not in left_out},
                    "images": [(i.mode, i.size, i.tobytes()) for i in turn.images],
                }
                for turn in t.turns
            ],
        }
        for t in trajectories
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tool_workers", [0, 4])
def test_a_run_replays_from_its_cache_when_the_services_are_dead(
    tool_workers, fake, tmp_path, make_engine, questions
):
    fake.answer = answers(fake, png)
    options = {
        "script": script_for(fake), "seed": 3, "max_completion_tokens": 900,
        "max_new_tokens_per_turn": 60, "tool_workers": tool_workers,
    }  # fmt: skip
    live = ["environment.max_turns=6", "environment.visit_urls=any"]

    environment = load_environment(config_of(tmp_path, fake, *live))
    first = make_engine(environment=environment, **options).rollout(questions, group_size=3)
    n_asked = len(fake.requests)
    turns = [turn for t in first for turn in t.turns]
    assert any(turn.images for turn in turns)
    assert {turn.fault for turn in turns} == {None, "model"}
    assert any("says page number" in (turn.observation or "") for turn in turns)
    n_searches = sum(len(turn.hits) > 0 for turn in turns)
    assert n_asked < n_searches  # equal questions of a group are asked once

    fake.stop()
    replay = load_environment(config_of(tmp_path, fake, *live, "environment.cache_mode=offline"))
    second = make_engine(environment=replay, **options).rollout(questions, group_size=3)
    assert recorded(second, tool_workers == 0) == recorded(first, tool_workers == 0)
    assert replay.text_index.cache.counts["misses"] == 0

    # without the cache the same run is full of faults: the services really are dead
    alone = load_environment(config_of(tmp_path, fake, *live, "environment.cache=null"))
    third = make_engine(environment=alone, **options).rollout(questions[:1])
    assert {turn.fault for t in third for turn in t.turns} >= {"infrastructure"}

    # and nothing that was written anywhere holds a key
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_replay_needs_no_key_no_host_and_no_service(fake, tmp_path, monkeypatch):
    ResultCache(tmp_path / "cache").close()
    for name in ("SERPER_API_KEY", "SERPAPI_API_KEY"):
        monkeypatch.delenv(name)
    fake.stop()
    load_environment(
        config_of(tmp_path, fake, "environment.cache_mode=offline", "live.image_host=null")
    )


RUN = """
output: {output}
seed: 1
models: {{init: atlas://agent}}
environment:
  train_size: 8
  eval_size: 4
  kinds: [text]
  eval_kinds: [text]
  text_provider: serper
  cache: {cache}
live: {{text_url: "{url}/serper", requests_per_second: 1000, retries: 0}}
grpo:
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 120
  generation_kwargs: {{max_new_tokens: 40}}
  max_steps: 2
  learning_rate: 1.0e-4
  temperature: 0.8
compare: {{eval_every: 2}}
tracking: {{wandb: disabled}}
"""


def lines_of(folder, name):
    """A record of a run without what a clock decides, and without how the tools were served."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for row in rows:
        for key in list(row):
            clocks = ("time", "device_s", "speed/", "eval/time", "tools/")
            if key.startswith(clocks) or key == "step_time":
                del row[key]
        for turn in row.get("turns", []):
            turn.pop("seconds", None)
    return rows


@pytest.mark.slow
def test_a_training_replays_from_its_cache_and_leaves_no_key_anywhere(fake, tmp_path):
    def answer(request):
        n = len(fake.requests)
        hit = {
            "title": f"T{n}",
            "link": f"https://a.org/{n}",
            "snippet": f"the currency is leu {n}",
        }
        return {"searchParameters": {}, "organic": [hit]}

    fake.answer, fake.keys = answer, {"serper": KEY}
    path = tmp_path / "settings.yaml"
    values = {"cache": tmp_path / "cache", "url": fake.url}
    path.write_text(RUN.format(output=tmp_path / "first", **values))
    first = run_training(load_config(path))
    assert len(fake.requests) > 3
    fake.stop()
    overrides = [f"output={tmp_path / 'again'}", "environment.cache_mode=offline"]
    again = run_training(load_config(path, overrides))
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        assert lines_of(again, name) == lines_of(first, name)
    counted, again_counted = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
        for folder in (first, again)
    )
    assert counted["tools/serper_requests"] == counted["tools/cache_stored"] > 0
    assert again_counted["tools/cache_hits"] > 0
    assert "tools/serper_requests" not in again_counted
    texts = (first / "trajectories.jsonl").read_text()
    assert "the currency is leu" in texts
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file
