"""Live providers against a recorded fake of their services, over real HTTP on loopback."""

import io
import json
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from PIL import Image

pytest.importorskip("httpcore", reason="needs the extra live")

from environments.cache import ResultCache
from environments.cached import CachedIndex
from environments.episode import SearchEnvironment
from environments.errors import EnvironmentSetupError
from environments.fetch import PageRefusedError, SafeFetcher
from environments.jina import JinaReader
from environments.lens import ImageHost, SerpApiLens
from environments.providers import TEXT_PROVIDERS, ReadingIndex
from environments.results import Hit, Page
from environments.services import (
    KEY_VARIABLES,
    KeyMissingError,
    KeyRefusedError,
    MalformedReplyError,
    QuotaError,
    RateLimitedError,
    RequestRefusedError,
    Service,
    ServiceDownError,
    TokenBucket,
    retry_after_s,
)
from environments.summaries import BestSentences
from environments.tools import text_search
from environments.web import TooLargeError, TooSlowError, UnreachableError, WebError
from tests.environments.fake_services import REPLIES, FakeServices

KEY = "sk-Secret/Key+7"
PATHS = {"serper": "/serper/search", "brave": "/brave/web/search", "tavily": "/tavily/search"}
NAMES = list(PATHS)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for variable in KEY_VARIABLES.values():
        monkeypatch.setenv(variable, KEY)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("environments.services.FIRST_PAUSE_S", 0.01)


@pytest.fixture
def fake():
    with FakeServices() as services:
        yield services


def service(fake, name, **options):
    settings = {"timeout_s": 5.0, "retries": 2, **options}
    return Service(name, f"{fake.url}/{name}", KEY_VARIABLES[name], **settings)


def provider(fake, name, **options):
    return TEXT_PROVIDERS[name](service(fake, name, **options), "us", "en")


# ---------------------------------------------------------------- text


def test_serper_gives_organic_results_and_no_ready_answer(fake):
    (hits,) = provider(fake, "serper").search(["capital of France"], 3)
    assert hits[0] == Hit(
        "https://en.wikipedia.org/wiki/Paris",
        "Paris - Wikipedia",
        "Paris is the capital and largest city of France, with an estimated city population of "
        "2,048,472.",
        1.0,
        None,
        "https://en.wikipedia.org/wiki/Paris",
    )
    assert [hit.score for hit in hits] == [1.0, 1 / 2, 1 / 3]
    assert hits[1].title == "Capital of France & its history"
    assert hits[2].text == ""  # a result without a snippet
    (request,) = fake.requests
    assert request.json == {"q": "capital of France", "num": 3, "gl": "us", "hl": "en"}
    assert request.headers["x-api-key"] == KEY


def test_brave_gives_descriptions_without_markup(fake):
    (hits,) = provider(fake, "brave").search(["capital of France"], 5)
    assert [hit.text for hit in hits] == [
        "Paris is the capital of France & its largest city. Paris lies on the Seine.",
        "A country in Europe.",
    ]
    (request,) = fake.requests
    assert request.query["q"] == "capital of France"
    assert (request.query["count"], request.query["country"]) == ("5", "US")
    assert request.headers["x-subscription-token"] == KEY


def test_tavily_gives_contents(fake):
    (hits,) = provider(fake, "tavily").search(["capital of France"], 1)
    assert [(hit.id, hit.text) for hit in hits] == [
        ("https://en.wikipedia.org/wiki/Paris", "Paris is the capital of France.")
    ]
    (request,) = fake.requests
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.json == {
        "query": "capital of France", "max_results": 1, "search_depth": "basic",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_several_queries_are_answered_in_order(name, fake):
    assert len(provider(fake, name).search(["a", "b"], 2)) == 2
    assert len(fake.requests) == 2
    assert provider(fake, name).search([], 2) == []


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("serper", {"searchParameters": {"q": "x"}, "organic": [], "credits": 1}),
        ("serper", {"searchParameters": {"q": "x"}, "credits": 1}),
        ("brave", {"type": "search", "query": {"original": "x"}}),
        ("brave", {"query": {}, "web": {"results": []}}),
        ("tavily", {"query": "x", "results": []}),
    ],
)
def test_nothing_found_is_an_answer(name, body, fake):
    fake.say(PATHS[name], 200, body)
    assert provider(fake, name).search(["x"], 3) == [[]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>Bad gateway</html>", b'{"organic": [', b"\xff\xfe", b"[" * 100_000, b"null",
        b"7", b"[]", b"{}", b'{"organic": {}, "web": 3, "results": "x"}',
        b'{"organic": [1], "web": {"results": [null]}, "results": ["x"]}',
        b'{"organic": [{"title": "no link"}], "query": {}, "web": {"results": [{"url": 3}]},'
        b' "results": [{"url": "file:///etc/passwd"}]}',
    ],
)  # fmt: skip
def test_a_malformed_body_is_infrastructure(name, body, fake):
    fake.say(PATHS[name], 200, body, times=2)
    with pytest.raises(MalformedReplyError) as caught:
        provider(fake, name, retries=1).search(["x"], 3)
    assert caught.value.fault == "infrastructure"


@pytest.mark.parametrize(
    ("name", "longest", "query", "words"),
    [
        ("brave", "a " * 49 + "a", "a " * 50 + "a", "51 words, and at most 50"),
        ("brave", "ä" * 400, "ä" * 401, "401 characters, and at most 400"),
        ("tavily", "ä" * 400, "ä" * 401, "401 characters, and at most 400"),
    ],
)
def test_a_query_that_the_service_would_refuse_is_the_policys_fault(
    name, longest, query, words, fake, tmp_path
):
    index = provider(fake, name)
    assert index.search([longest], 2)[0]
    read = ReadingIndex(index, jina(fake))
    kept = [CachedIndex(each, ResultCache(tmp_path), "text_search") for each in (index, read)]
    # offline, too: a replay must not call a fault of the service what was the policy's
    offline = CachedIndex(index, ResultCache(tmp_path, "offline"), "text_search")
    for back_end in (index, read, *kept, offline):
        result = text_search(SearchEnvironment(back_end, None).start({"question": "q"}), query)
        assert (result.fault, result.retries) == ("model", 0)
        assert words in result.text
    assert len(fake.requests) == 1


def test_serper_takes_what_the_tool_takes(fake):
    assert provider(fake, "serper").search(["word " * 200], 2)[0]


def test_a_result_without_an_address_is_left_out(fake):
    rows = [
        {"title": "a"},
        {"url": "http://[", "title": "b"},
        {"url": "https://c.org/", "title": 7},
    ]
    fake.say("/tavily/search", 200, {"results": rows})
    (hits,) = provider(fake, "tavily").search(["x"], 3)
    assert hits == [Hit("https://c.org/", "7", "", 1.0, None, "https://c.org/")]


# ---------------------------------------------------------------- errors, as the services say them

ERRORS = [
    ("serper", 403, {"message": "Unauthorized.", "statusCode": 403}, KeyRefusedError),
    ("serper", 400, {"message": "Not enough credits", "statusCode": 400}, QuotaError),
    ("serper", 400, {"message": "Missing query parameter", "statusCode": 400}, RequestRefusedError),
    ("serper", 429, {"message": "Too many requests", "statusCode": 429}, RateLimitedError),
    ("serper", 500, b"oops", ServiceDownError),
    ("brave", 422, {"type": "ErrorResponse", "error": {"status": 422, "detail": "The provided "
     "subscription token is invalid.", "code": "SUBSCRIPTION_TOKEN_INVALID"}}, KeyRefusedError),
    ("brave", 422, {"type": "ErrorResponse", "error": {"status": 422, "detail": "Unable to "
     "validate request parameter(s)", "code": "VALIDATION"}}, RequestRefusedError),
    ("brave", 429, {"type": "ErrorResponse", "error": {"status": 429, "detail": "Request rate "
     "limit exceeded for plan.", "code": "RATE_LIMITED"}}, RateLimitedError),
    ("tavily", 401, {"detail": {"error": "Unauthorized: missing or invalid API key."}},
     KeyRefusedError),
    ("tavily", 432, {"detail": {"error": "This request exceeds your plan's set usage limit."}},
     QuotaError),
    ("tavily", 433, {"detail": {"error": "This request exceeds the pay-as-you-go limit."}},
     QuotaError),
    ("tavily", 400, {"detail": {"error": "Query is too long."}}, RequestRefusedError),
    ("tavily", 503, b"", ServiceDownError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "status", "body", "error"), ERRORS)
def test_an_error_has_its_type_and_says_who_and_why(name, status, body, error, fake):
    fake.say(PATHS[name], status, body, times=9)
    with pytest.raises(error) as caught:
        provider(fake, name, retries=1).search(["x"], 3)
    assert caught.value.fault == "infrastructure"
    assert caught.value.is_permanent  # the caller need not try what was tried here
    assert name in str(caught.value)
    assert str(status) in str(caught.value)
    passes = error in (RateLimitedError, ServiceDownError)
    assert len(fake.requests) == (2 if passes else 1)  # a refused key is not tried again


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_that_passes_is_not_noticed(name, fake):
    fake.say(PATHS[name], 503, b"")
    fake.say(PATHS[name], 200, b"{", {}, cut=True)
    index = provider(fake, name)
    assert index.search(["x"], 2)[0]
    assert len(fake.requests) == 3
    assert index.service.counts["requests"] == 3


def test_a_body_that_trickles_in_is_given_up_at_the_limit(fake):
    fake.say("/serper/search", 200, b"a" * 1000, piece_s=0.05)
    start = time.perf_counter()
    with pytest.raises(TooSlowError):
        provider(fake, "serper", timeout_s=0.4).search(["x"], 3)
    assert time.perf_counter() - start < 1.5


def test_a_body_beyond_all_measure_is_given_up(fake, monkeypatch):
    monkeypatch.setattr("environments.services.MAX_REPLY_BYTES", 1000)
    fake.say("/serper/search", 200, b'"' + b"a" * 2000 + b'"', times=3)
    with pytest.raises(TooLargeError):
        provider(fake, "serper").search(["x"], 3)


def test_a_dead_service_is_unreachable(fake):
    index = provider(fake, "serper", retries=1)
    fake.stop()
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1"):
        index.search(["x"], 3)
    assert index.service.counts["UnreachableError"] == 2


def test_a_service_is_asked_through_the_proxy_that_the_environment_names(fake, monkeypatch):
    monkeypatch.setenv("http_proxy", fake.url)
    monkeypatch.delenv("no_proxy", raising=False)
    far = Service("serper", "http://serper.example.org/serper", "SERPER_API_KEY")
    assert TEXT_PROVIDERS["serper"](far).search(["x"], 2)[0]
    (request,) = fake.requests
    assert request.headers["host"] == "serper.example.org"


def test_what_is_no_tls_is_not_talked_to(fake):
    plain = Service("serper", fake.url.replace("http:", "https:"), "SERPER_API_KEY", retries=0)
    with pytest.raises(UnreachableError):
        TEXT_PROVIDERS["serper"](plain).search(["x"], 2)
    assert fake.requests == []


# ---------------------------------------------------------------- rate


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_a_bucket_lets_a_burst_through_and_then_the_rate():
    clock = Clock()
    bucket = TokenBucket(2.0, burst=3, clock=clock, sleep=clock.sleep)
    assert all(bucket.take(100) for _ in range(5))
    assert clock.slept == [0.5, 0.5]  # 2 a second
    clock.now += 10  # a pause fills it, up to the burst
    assert all(bucket.take(100) for _ in range(4))
    assert len(clock.slept) == 3


def test_who_cannot_wait_is_turned_away_at_once_and_takes_no_place():
    clock = Clock()
    bucket = TokenBucket(0.1, clock=clock, sleep=clock.sleep)
    assert bucket.take(0)
    assert not bucket.take(9.9)
    assert not bucket.take(9.9)
    assert clock.slept == []
    assert bucket.take(10.1)


def test_a_closed_bucket_opens_again():
    clock = Clock()
    bucket = TokenBucket(100, clock=clock, sleep=clock.sleep)
    bucket.close(30)
    assert not bucket.take(29)
    assert bucket.take(31)
    assert clock.now == 30


def test_threads_together_keep_the_rate():
    bucket = TokenBucket(50.0)
    start = time.perf_counter()
    threads = [threading.Thread(target=bucket.take, args=(10,)) for _ in range(11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - start >= 0.19  # ten intervals of 20 ms after the first


def test_retry_after_is_honoured_and_holds_for_every_thread(fake):
    fake.say("/serper/search", 429, {"message": "slow down"}, {"Retry-After": "1"})
    index = provider(fake, "serper", bucket=TokenBucket(1000))
    start = time.perf_counter()
    assert index.search(["x"], 2)[0]
    assert time.perf_counter() - start >= 1.0
    assert len(fake.requests) == 2


def test_a_long_retry_after_fails_at_once_and_spares_the_service(fake):
    fake.say("/serper/search", 429, {"message": "slow down"}, {"Retry-After": "600"})
    index = provider(fake, "serper", bucket=TokenBucket(1000))
    start = time.perf_counter()
    with pytest.raises(RateLimitedError) as caught:
        index.search(["x"], 2)
    assert caught.value.retry_after_s == 600
    with pytest.raises(RateLimitedError, match="no place within its rate"):
        index.search(["y"], 2)
    assert time.perf_counter() - start < 1
    assert len(fake.requests) == 1


def test_braves_reset_of_the_second_is_honoured(fake):
    headers = {"X-RateLimit-Limit": "1, 15000", "X-RateLimit-Reset": "1, 1419704"}
    fake.say("/brave/web/search", 429, {"error": {"code": "RATE_LIMITED"}}, headers)
    start = time.perf_counter()
    assert provider(fake, "brave").search(["x"], 2)[0]
    assert time.perf_counter() - start >= 1.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "²"}, None),
        ({"x-ratelimit-reset": "²"}, None),
        ({"retry-after": f"Mon, 01 Jan 2024 00:00:00 +{'9' * 14}"}, None),
        ({"retry-after": "999999"}, 3600),
        ({"x-ratelimit-reset": "2, 99"}, 2),
        ({"x-ratelimit-reset": "1719400000"}, None),  # a moment, not a duration
        ({"x-ratelimit-reset": "-1"}, None),
        ({"retry-after": "Wed, 01 Jan 2020 00:00:00 GMT"}, 0),
    ],
)
def test_what_a_service_asks_for_is_read(headers, seconds):
    assert retry_after_s(headers) == seconds


def test_a_date_to_retry_after_is_read():
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < retry_after_s({"retry-after": moment}) <= 60


# ---------------------------------------------------------------- keys


def everything_said(caplog, error):
    """What a log, a traceback or a report could show."""
    chain = []
    while error is not None:
        chain += [str(error), repr(error), repr(error.args), str(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join([*chain, *(record.getMessage() for record in caplog.records)])


@pytest.mark.parametrize("name", [*NAMES, "serpapi"])
@pytest.mark.parametrize("status", [200, 400, 401, 403, 429, 500])
def test_a_service_that_repeats_the_key_does_not_get_it_into_any_text(
    name, status, fake, caplog, tmp_path
):
    echo = f"Invalid key {KEY} sk-Secret%2FKey%2B7 in /search?api_key=sk-Secret%2FKey%2B7"
    paths = {**PATHS, "serpapi": "/serpapi/search"}
    body = {"error": echo} if status != 200 else {"error": echo, "search_metadata": {}}
    fake.say(paths[name], status, body, times=9)
    is_lens = name == "serpapi"
    index = lens(fake, tmp_path) if is_lens else provider(fake, name, retries=1)
    with caplog.at_level(logging.DEBUG), pytest.raises(WebError) as caught:
        index.search([Image.new("RGB", (4, 4))] if is_lens else ["x"], 2)
    said = everything_said(caplog, caught.value)
    assert KEY not in said
    assert "sk-Secret" not in said
    assert len(fake.requests) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_no_log_line_and_no_repr_holds_the_key(name, fake, caplog):
    index = provider(fake, name)
    with caplog.at_level(logging.DEBUG):
        index.search(["x"], 2)
        fake.stop()
        with pytest.raises(UnreachableError) as caught:
            index.search(["x"], 2)
    shown = [everything_said(caplog, caught.value), repr(vars(index)), repr(vars(index.service))]
    assert "sk-Secret" not in "".join(shown) + json.dumps(index.identity)


@pytest.mark.parametrize("key", ["", "  "])
def test_without_a_key_no_request_is_made(key, fake, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", key)
    with pytest.raises(KeyMissingError, match="SERPER_API_KEY") as caught:
        provider(fake, "serper").search(["x"], 2)
    assert caught.value.is_permanent
    assert fake.requests == []


@pytest.mark.parametrize("key", ["sk secret", "sk-secret\r\nX-Evil: 1", "sk-sécret"])
def test_what_cannot_be_a_key_is_refused_without_repeating_it(key, fake, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", key)
    with pytest.raises(KeyMissingError) as caught:
        provider(fake, "serper").search(["x"], 2)
    assert "cret" not in repr(caught.value)
    assert fake.requests == []


@pytest.mark.parametrize(
    "url", ["ftp://x.org", "x.org", "http://", "https://u:p@x.org", "https://x.org/?api_key=1"]
)
def test_a_base_url_that_could_hold_a_key_is_refused(url):
    with pytest.raises(EnvironmentSetupError) as caught:
        Service("serper", url, "SERPER_API_KEY", setting="live.text_url")
    assert "live.text_url" in str(caught.value)
    assert "u:p" not in str(caught.value)
    assert "api_key=1" not in str(caught.value)


# ---------------------------------------------------------------- images


def lens(fake, folder, thumbnails=False, **options):
    host = ImageHost("https://pictures.example.org/", folder=folder)
    fetcher = SafeFetcher(allow_loopback=True) if thumbnails else None
    return SerpApiLens(service(fake, "serpapi", **options), host, fetcher, "us", "en")


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_lens_gets_the_public_url_of_a_served_picture(fake, tmp_path):
    picture = Image.new("RGB", (2000, 1000), "red")
    (hits,) = lens(fake, tmp_path).search([picture], 2)
    assert [hit.title for hit in hits] == ["Flag of Belarus - Wikipedia", "Buy a flag"]
    assert all(hit.image is None and hit.text == "" for hit in hits)
    (request,) = fake.requests
    assert request.query["engine"] == "google_lens"
    assert request.query["api_key"] == KEY
    (file,) = tmp_path.iterdir()
    assert request.query["url"] == f"https://pictures.example.org/{file.name}"
    with Image.open(file) as served:
        assert served.size == (1024, 512)  # scaled down before it leaves
        assert not served.getexif()


def test_a_picture_can_be_put_to_a_bucket(fake):
    upload = Service(
        "image_host", f"{fake.url}/bucket", KEY_VARIABLES["image_host"], is_key_required=False
    )
    host = ImageHost("https://cdn.example.org", upload=upload)
    url = host.publish(Image.new("RGB", (10, 10), "red"))
    (request,) = fake.requests
    assert (request.method, request.headers["authorization"]) == ("PUT", f"Bearer {KEY}")
    assert url == f"https://cdn.example.org/{request.path.removeprefix('/bucket/')}"
    assert Image.open(io.BytesIO(request.body)).size == (10, 10)
    fake.say(request.path, 403, b"denied", times=3)
    with pytest.raises(KeyRefusedError):
        host.publish(Image.new("RGB", (10, 10), "red"))


def test_small_pictures_come_along_and_a_missing_one_leaves_its_title(fake, tmp_path, monkeypatch):
    recorded = (REPLIES / "serpapi_lens.json").read_text().replace("BASE", fake.url)
    fake.say("/serpapi/search", 200, recorded.encode())
    fake.page("/thumbnails/1.png", png("red"), "image/png")
    fake.page("/thumbnails/2.png", png("blue"), "image/png")
    (hits,) = lens(fake, tmp_path, thumbnails=True).search([Image.new("RGB", (4, 4))], 3)
    assert [hit.image and hit.image.size for hit in hits] == [(256, 192), (256, 192), None]
    assert hits[0].image.getpixel((0, 0)) == (255, 0, 0)


def test_matches_of_one_page_keep_their_own_pictures(fake, tmp_path):
    link = "https://a.org/flags"
    matches = [
        {"title": name, "link": link, "thumbnail": f"{fake.url}/{name}.png"}
        for name in ("red", "blue")
    ]
    matches.insert(1, {"title": "no page", "link": [link], "thumbnail": f"{fake.url}/red.png"})
    fake.say("/serpapi/search", 200, {"search_metadata": {}, "visual_matches": matches})
    for name in ("red", "blue"):
        fake.page(f"/{name}.png", png(name), "image/png")
    (hits,) = lens(fake, tmp_path, thumbnails=True).search([Image.new("RGB", (4, 4))], 3)
    colours = [(hit.title, hit.image.getpixel((0, 0))) for hit in hits]
    assert colours == [("red", (255, 0, 0)), ("blue", (0, 0, 255))]


def test_a_picture_that_may_come_back_makes_a_result_partial_and_one_that_is_none_does_not(
    fake, tmp_path
):
    recorded = (REPLIES / "serpapi_lens.json").read_text().replace("BASE", fake.url)
    fake.say("/serpapi/search", 200, recorded.encode())
    fake.page("/thumbnails/1.png", png("red"), "image/png")
    fake.page("/thumbnails/2.png", b"", "image/png", status=503)
    fake.page("/thumbnails/missing.png", b"no picture", "image/png")
    (hits,) = lens(fake, tmp_path, thumbnails=True).search([Image.new("RGB", (4, 4))], 3)
    assert [(hit.image is None, hit.is_partial) for hit in hits] == [
        (False, False), (True, True), (True, False),
    ]  # fmt: skip


def test_if_no_picture_at_all_can_be_had_the_search_failed(fake, tmp_path):
    recorded = (REPLIES / "serpapi_lens.json").read_text().replace("BASE", fake.url)
    fake.say("/serpapi/search", 200, recorded.encode())
    for name in ("1", "2", "missing"):
        fake.page(f"/thumbnails/{name}.png", b"", "image/png", status=503)
    with pytest.raises(WebError) as caught:
        lens(fake, tmp_path, thumbnails=True).search([Image.new("RGB", (4, 4))], 3)
    assert caught.value.fault == "infrastructure"


def test_lens_without_results_found_nothing_and_other_errors_are_errors(fake, tmp_path):
    none = {"search_metadata": {"status": "Success"},
            "error": "Google Lens hasn't returned any results for this query."}  # fmt: skip
    fake.say("/serpapi/search", 200, none)
    assert lens(fake, tmp_path).search([Image.new("RGB", (4, 4))], 3) == [[]]
    for status, text, error in [
        (401, "Invalid API key. Your API key should be here.", KeyRefusedError),
        (429, "Your account has run out of searches.", QuotaError),
        (200, "Unsupported `type` value.", RequestRefusedError),
    ]:
        fake.say("/serpapi/search", status, {"error": text})
        with pytest.raises(error):
            lens(fake, tmp_path, retries=0).search([Image.new("RGB", (4, 4))], 3)


# ---------------------------------------------------------------- pages


def jina(fake, summarise=None, **options):
    return JinaReader(service(fake, "jina", is_key_required=False, **options), summarise)


def test_jina_reads_a_page_and_the_best_sentences_are_kept(fake):
    page = jina(fake, BestSentences(2)).read("https://en.wikipedia.org/wiki/Paris", "metro year")
    assert page.title == "Paris - Wikipedia"
    assert "Its metro opened in 1900." in page.text
    (request,) = fake.requests
    assert request.json == {"url": "https://en.wikipedia.org/wiki/Paris"}
    assert request.headers["authorization"] == f"Bearer {KEY}"


def test_jina_works_without_a_key(fake, monkeypatch):
    monkeypatch.delenv("JINA_API_KEY")
    jina(fake).read("https://en.wikipedia.org/wiki/Paris", "x")
    assert "authorization" not in fake.requests[0].headers


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://10.0.0.1/", "http://wiki.local/a"])
def test_nothing_local_is_told_to_jina(url, fake):
    with pytest.raises(PageRefusedError):
        jina(fake).read(url, "x")
    assert fake.requests == []


def test_a_page_that_jina_cannot_find_is_the_models_fault(fake):
    missing = {"code": 422, "name": "AssertionFailureError", "status": 42206,
               "readableMessage": "Failed to goto https://a.org/"}  # fmt: skip
    fake.say("/jina/", 422, missing)
    with pytest.raises(PageRefusedError) as caught:
        jina(fake).read("https://a.org/", "x")
    assert caught.value.fault == "model"
    warned = {"code": 200, "data": {"title": "", "url": "https://a.org/", "content": "Not found",
              "warning": "Target URL returned error 404: Not Found"}}  # fmt: skip
    fake.say("/jina/", 200, warned)
    with pytest.raises(PageRefusedError, match="404"):
        jina(fake).read("https://a.org/", "x")


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, {"code": 401, "readableMessage": "Invalid API key"}, KeyRefusedError),
        (402, {"code": 402, "readableMessage": "Account balance not enough"}, QuotaError),
        (429, {"code": 429, "readableMessage": "Rate limit exceeded"}, RateLimitedError),
        (503, b"", ServiceDownError),
        (200, {"data": None}, MalformedReplyError),
        (200, {"data": {"title": "no content"}}, MalformedReplyError),
        (200, [], MalformedReplyError),
    ],
)
def test_jinas_own_troubles_are_infrastructure(status, body, error, fake):
    fake.say("/jina/", status, body)
    with pytest.raises(error) as caught:
        jina(fake, retries=0).read("https://a.org/", "x")
    assert caught.value.fault == "infrastructure"


def test_found_pages_can_be_read_before_the_policy_sees_them(fake):
    index = ReadingIndex(provider(fake, "tavily"), jina(fake, BestSentences(1), retries=0))
    fake.say("/jina/", 503, b"")  # one of the two pages fails and keeps its snippet
    (hits,) = index.search(["highest point"], 2)
    texts = {hit.text for hit in hits}
    assert "The highest point is Montmartre." in texts
    assert len(texts & {"Paris is the capital of France.", "A country in Europe."}) == 1
    assert [hit.is_partial for hit in hits] == [
        hit.text != "The highest point is Montmartre." for hit in hits
    ]
    assert index.identity["read"]["reader"] == "jina"


def reading(*failures):
    """A search whose pages fail in this way, one each; None = is read."""

    class Found:
        def search(self, queries, k):
            return [[Hit(str(i), "t", "snippet") for i in range(len(failures))] for _ in queries]

    class Reader:
        def read(self, url, question):
            if failures[int(url)] is not None:
                raise failures[int(url)]
            return Page("t", "read", url)

    return ReadingIndex(Found(), Reader())


def test_only_a_page_that_may_come_back_makes_a_result_partial():
    down, gone = ServiceDownError("down"), PageRefusedError("gone")
    (hits,) = reading(None, down, gone).search(["q"], 3)
    assert [hit.text for hit in hits] == ["read", "snippet", "snippet"]
    assert [hit.is_partial for hit in hits] == [False, True, False]
    (hits,) = reading(gone, gone).search(["q"], 2)  # a page that is not there is a result
    assert [hit.is_partial for hit in hits] == [False, False]


def test_if_no_page_at_all_can_be_read_the_search_failed():
    with pytest.raises(ServiceDownError, match="one"):
        reading(ServiceDownError("one"), ServiceDownError("two")).search(["q"], 2)
    assert reading().search(["q"], 2) == [[]]


def test_the_policy_sees_all_that_was_read_and_of_other_hits_a_snippet(tmp_path):
    sentence = " ".join(["word"] * 199 + ["end."])

    class Found:
        identity = {"provider": "found"}

        def search(self, queries, k):
            return [[Hit("https://a.org/", "A", sentence)] for _ in queries]

    class Reader:
        identity = {"reader": "own"}

        def read(self, url, question):
            return Page("A", sentence, url)

    reading = ReadingIndex(Found(), Reader())
    cache = ResultCache(tmp_path)
    for index, n_words in [
        (reading, 200), (CachedIndex(reading, cache, "text_search"), 200),
        (Found(), 40), (CachedIndex(Found(), cache, "text_search"), 40),
    ]:  # fmt: skip
        episode = SearchEnvironment(index, None).start({"question": "q"})
        step = episode.step("<think> t </think> <search> q </search>")
        assert step.observation.count("word") == min(n_words, 199)
