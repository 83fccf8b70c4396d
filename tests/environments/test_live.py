"""From settings to back ends: what is built, and what is refused before a run starts."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("httpcore", reason="needs the extra live")

from configs.sections import Environment, Live
from environments.cached import CachedIndex, CachedReader
from environments.errors import EnvironmentSetupError
from environments.jina import JinaReader
from environments.lens import SerpApiLens
from environments.live import live_tools, tool_counts
from environments.pages import DirectReader
from environments.providers import BraveSearch, ReadingIndex, SerperSearch, TavilySearch
from environments.summaries import BestSentences, ModelSummary


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("SERPER", "BRAVE", "TAVILY", "SERPAPI"):
        monkeypatch.setenv(f"{name}_API_KEY", "sk-key")
    monkeypatch.delenv("JINA_API_KEY", raising=False)


def tools(live=None, **environment):
    return live_tools(Environment(**environment), Live(**(live or {})), "own text", "own images")


def test_without_providers_the_worlds_own_tools_stay():
    assert tools() == ("own text", "own images", None)


def test_the_defaults_import_nothing_for_the_net():
    code = (
        "import sys, environments.live, environments.episode; from configs.sections import *\n"
        "environments.live.live_tools(Environment(), Live(), 1, 2)\n"
        "print(sorted({'httpcore', 'httpx', 'sqlite3', 'trafilatura', 'requests'} & "
        "set(sys.modules)))"
    )
    # what measures coverage in child processes has a database of its own
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "made", "url"),
    [
        ("serper", SerperSearch, "https://google.serper.dev"),
        ("brave", BraveSearch, "https://api.search.brave.com/res/v1"),
        ("tavily", TavilySearch, "https://api.tavily.com"),
    ],
)
def test_a_text_provider_replaces_text_search_alone(name, made, url):
    text, images, reader = tools(text_provider=name, timeout_s=7.0)
    assert isinstance(text, made)
    assert (text.service.url, text.service.timeout_s, text.country) == (url, 7.0, "us")
    assert (images, reader) == ("own images", None)
    assert "url" not in text.identity
    assert tools({"text_url": "http://x.org/"}, text_provider=name)[0].identity["url"] == (
        "http://x.org"
    )


def test_an_image_provider_needs_a_place_for_pictures(tmp_path):
    with pytest.raises(EnvironmentSetupError, match=r"live\.image_host"):
        tools(image_provider="serpapi")
    with pytest.raises(EnvironmentSetupError, match=r"live\.image_host_url"):
        tools({"image_host": str(tmp_path)}, image_provider="serpapi")
    _, images, _ = tools({"image_host": "https://bucket.org/x"}, image_provider="serpapi")
    assert isinstance(images, SerpApiLens)
    assert images.host.public_url == "https://bucket.org/x"
    assert images.fetcher is None
    _, images, _ = tools(
        {"image_host": str(tmp_path), "image_host_url": "https://p.org"},
        image_provider="serpapi", thumbnails=True,
    )  # fmt: skip
    assert images.fetcher is not None
    assert not images.fetcher.allow_loopback


def test_pages_are_read_here_or_by_a_service_and_summarised_with_or_without_a_model():
    pytest.importorskip("trafilatura", reason="needs the extra live")
    _, _, direct = tools({"page_bytes": 5}, page_reader="direct")
    assert isinstance(direct, DirectReader)
    assert isinstance(direct.summarise, BestSentences)
    assert direct.fetcher.max_bytes == 5
    live = {"summary_url": "http://localhost:8000/v1", "summary_model": "qwen"}
    _, _, jina = tools(live, page_reader="jina")
    assert isinstance(jina, JinaReader)
    assert isinstance(jina.summarise, ModelSummary)
    assert direct.identity != jina.identity
    text, _, _ = tools({"read_results": True}, text_provider="brave", page_reader="jina")
    assert isinstance(text, ReadingIndex)


@pytest.mark.parametrize(
    ("live", "environment", "says"),
    [
        ({"summary_url": "http://x.org/v1"}, {"page_reader": "jina"}, "live.summary_model"),
        ({"read_results": True}, {}, "environment.text_provider"),
        ({"read_results": True}, {"text_provider": "serper"}, "environment.page_reader"),
        ({"text_url": "x.org"}, {"text_provider": "serper"}, "live.text_url"),
        ({}, {"cache_mode": "offline"}, "environment.cache_mode"),
    ],
)
def test_settings_that_do_not_fit_are_named(live, environment, says):
    with pytest.raises(EnvironmentSetupError, match=says.replace(".", r"\.")):
        tools(live, **environment)


def test_a_missing_key_is_found_before_the_run(monkeypatch):
    monkeypatch.delenv("BRAVE_API_KEY")
    with pytest.raises(EnvironmentSetupError, match="BRAVE_API_KEY") as caught:
        tools(text_provider="brave")
    assert caught.value.exit_code == 2


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(EnvironmentSetupError, match=r"obm-warmstart\[live\]"):
        tools(page_reader="direct")


def test_the_rate_is_that_of_all_processes_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    text, _, _ = tools({"requests_per_second": 4.0}, text_provider="serper")
    assert text.service.bucket.per_second == 0.5


def test_what_the_parts_of_an_environment_count_is_found_once(tmp_path):
    from environments.episode import SearchEnvironment
    from environments.retrieval import BM25TextIndex

    own = BM25TextIndex(["1"], ["Mali"], ["Bamako ."])
    assert tool_counts(SearchEnvironment(own, None)) == {}
    live = {"image_host": "https://bucket.org/x", "read_results": True}
    back_ends = live_tools(
        Environment(
            cache=str(tmp_path / "c"), text_provider="brave", image_provider="serpapi",
            page_reader="jina", thumbnails=True,
        ),
        Live(**live), None, None,
    )  # fmt: skip
    text, images, reader = back_ends
    text.cache.counts.update(hits=3)
    text.index.index.service.counts.update(requests=2, TooSlowError=1)
    reader.reader.service.counts.update(requests=5)
    images.index.fetcher.refused.update(address=4)
    images.index.host.upload.counts.update(requests=7)
    assert tool_counts(SearchEnvironment(*back_ends)) == {
        "tools/brave_TooSlowError": 1, "tools/brave_requests": 2, "tools/cache_hits": 3,
        "tools/image_host_requests": 7, "tools/jina_requests": 5, "tools/refused_address": 4,
    }  # fmt: skip


def test_every_tool_goes_through_one_cache(tmp_path):
    from environments.retrieval import BM25TextIndex

    pytest.importorskip("trafilatura", reason="needs the extra live")
    environment = Environment(
        cache=str(tmp_path / "c"), page_reader="direct", text_provider="brave"
    )
    text, images, reader = live_tools(environment, Live(), None, None)
    assert isinstance(text, CachedIndex)
    assert isinstance(reader, CachedReader)
    assert images is None
    assert text.cache is reader.cache
    own = BM25TextIndex(["1"], ["Mali"], ["Bamako ."])
    text, _, _ = live_tools(Environment(cache=str(tmp_path / "c")), Live(), own, None)
    assert text.in_memory
    assert text.search(["Mali"], 1) == own.search(["Mali"], 1)
