"""The search server over real HTTP: Search-R1's own client, pictures, refusals, limits, the end."""

import asyncio
import base64
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from PIL import Image

from environments.atlas.entities import load_flag
from environments.atlas.photos import render_photo
from environments.atlas.world import load_image_index, load_text_index
from environments.batching import Batcher
from environments.tools import Hit
from environments.wire import decode_image

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from environments import serve as serving  # after the skip
from environments.serve import Limits, make_app
from tests.coroutines import run_coroutine

ROOT = Path(__file__).parents[2]
FRANCE = "France has the capital Paris."


class SlowIndex:
    """Answers when it is let; remembers what it was asked."""

    def __init__(self):
        self.released, self.batches = threading.Event(), []

    def __len__(self):
        return 1

    def search(self, queries, k):
        self.batches.append(list(queries))
        self.released.wait(20)
        return [[Hit(query, query, "text", 1.0)] for query in queries]


@pytest.fixture
def atlas_app():
    return make_app(load_text_index(snippet_words=None), load_image_index())


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_text(data):
    return base64.b64encode(data).decode()


# --- Search-R1's client: the bodies of its functions (Apache-2.0), its address aside


class SearchR1Client:
    def __init__(self, search_url, topk):
        self.search_url, self.topk = search_url, topk

    def batch_search(self, queries):
        results = self._batch_search(queries)["result"]
        return [self._passages2string(result) for result in results]

    def _batch_search(self, queries):
        payload = {"queries": queries, "topk": self.topk, "return_scores": True}
        return requests.post(self.search_url, json=payload).json()

    def _passages2string(self, retrieval_result):
        format_reference = ""
        for idx, doc_item in enumerate(retrieval_result):
            content = doc_item["document"]["contents"]
            title = content.split("\n")[0]
            text = "\n".join(content.split("\n")[1:])
            format_reference += f"Doc {idx + 1}(Title: {title}) {text}\n"
        return format_reference


def test_the_client_of_search_r1_works_unmodified(serve, atlas_app):
    client = SearchR1Client(serve(atlas_app) + "/retrieve", topk=3)
    queries = ["capital of France", "xylophone", "capital of Mali"]
    france, nothing, mali = client.batch_search(queries)
    assert france.startswith(f"Doc 1(Title: France) {FRANCE}")
    assert france.count("\n") == 3
    assert re.findall(r"Doc (\d)\(Title: ", france) == ["1", "2", "3"]
    assert nothing == ""
    assert "Bamako" in mali.splitlines()[0]


def test_without_scores_come_bare_documents_and_three_is_the_default(serve, atlas_app):
    url = serve(atlas_app) + "/retrieve"
    bare = requests.post(url, json={"queries": ["capital of France"]}).json()["result"]
    null = {"queries": ["capital of France"], "topk": None, "return_scores": False}
    assert requests.post(url, json=null).json()["result"] == bare
    assert len(bare[0]) == 3
    assert bare[0][0]["id"] == "fr/government"
    assert bare[0][0]["contents"].startswith(f"France\n{FRANCE}")


def test_whole_passages_come_unless_snippets_are_asked_for(serve, atlas_app):
    url = serve(atlas_app) + "/retrieve"
    request = {"queries": ["currency of Guyana"], "topk": 1}
    (whole,) = requests.post(url, json=request).json()["result"][0]
    (short,) = requests.post(url, json={**request, "snippet_words": 6}).json()["result"][0]
    title, text = short["contents"].split("\n")
    assert (short["id"], title) == (whole["id"], "Guyana")
    assert len(text.split()) <= 6 < len(whole["contents"].split())
    assert text in whole["contents"]


# --- pictures


def test_pictures_come_as_base64_or_as_files(serve, atlas_app):
    url = serve(atlas_app) + "/retrieve_images"
    photos = [render_photo(load_flag(iso), 5, 0.3) for iso in ("fr", "jp")]
    request = {"images": [as_text(png(photo)) for photo in photos], "topk": 2}
    result = requests.post(url, json={**request, "return_scores": True}).json()["result"]
    local = load_image_index().search(photos, 2)
    assert [[item["document"]["id"] for item in hits] for hits in result] == [
        [hit.id for hit in hits] for hits in local
    ]
    assert [[item["score"] for item in hits] for hits in result] == [
        [hit.score for hit in hits] for hits in local
    ]
    files = [("image", ("photo.png", png(photo), "image/png")) for photo in photos]
    fields = {"topk": "2", "return_scores": "true", "return_images": "false"}
    assert requests.post(url, files=files, data=fields).json()["result"] == result


def test_small_pictures_of_the_hits_come_when_asked_for(serve, atlas_app):
    url = serve(atlas_app) + "/retrieve_images"
    request = {"images": [as_text(png(render_photo(load_flag("jp"), 5, 0.3)))], "topk": 1}
    assert "image" not in requests.post(url, json=request).json()["result"][0][0]
    (hit,) = requests.post(url, json={**request, "return_images": True}).json()["result"][0]
    image = Image.open(io.BytesIO(base64.b64decode(hit["image"])))
    assert image.tobytes() == load_image_index().thumbnails["jp"].tobytes()


def test_a_photo_is_searched_upright_as_questions_are():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert decode_image(file.getvalue(), 1000).size == (10, 20)


def bomb(width=100_000, height=100_000):
    """A PNG of a few bytes whose header announces ten thousand million pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("picture", "status", "says"),
    [
        (as_text(bomb()), 413, "pixels"),
        (as_text(bomb(5001, 5000)), 413, "at most 25000000"),
        (as_text(b"%PDF-1.4 not a picture"), 415, "none of PNG"),
        (as_text(png(Image.new("RGB", (64, 64)))[:70]), 400, "broken"),
        ("no base64 !", 400, "base64"),
    ],
)
def test_a_bad_picture_is_refused(serve, atlas_app, picture, status, says):
    answer = requests.post(serve(atlas_app) + "/retrieve_images", json={"images": [picture]})
    assert answer.status_code == status
    assert says in answer.json()["error"]


class Nothing:
    """An image index that finds nothing."""

    def search(self, images, k):
        return [[] for _ in images]


@pytest.mark.parametrize("as_files", [False, True])
def test_pictures_that_are_large_together_are_refused_before_one_is_decoded(
    serve, monkeypatch, as_files
):
    decoded = []
    decode = serving.decode_image
    monkeypatch.setattr(
        serving, "decode_image", lambda data, most: decoded.append(data) or decode(data, most)
    )
    url = serve(make_app(None, Nothing(), limits=Limits(pixels=100))) + "/retrieve_images"

    def ask(*sizes):
        pictures = [png(Image.new("RGB", size)) for size in sizes]
        if as_files:
            files = [("image", ("photo.png", data, "image/png")) for data in pictures]
            return requests.post(url, files=files)
        return requests.post(url, json={"images": [as_text(data) for data in pictures]})

    refused = ask(*[(10, 10)] * 4, (1, 1))  # 401 pixels, where four pictures have 400
    assert (refused.status_code, decoded) == (413, [])
    assert "more than 400 pixels together" in refused.json()["error"]
    assert ask(*[(10, 10)] * 4).json()["result"] == [[]] * 4
    assert ask(*[(2, 2)] * 100).json()["result"] == [[]] * 100


def test_a_few_kilobytes_do_not_claim_all_of_the_memory(serve):
    url = serve(make_app(None, Nothing())) + "/retrieve_images"
    answer = requests.post(url, json={"images": [as_text(bomb(5000, 5000))] * 5})
    assert answer.status_code == 413
    assert "more than 100000000 pixels together" in answer.json()["error"]


# --- requests that are refused


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("{", 400, "no JSON"),
        ("[1]", 400, "no JSON object"),
        ("[" * 100_000, 400, "no JSON"),
        ("{}", 422, "queries has to be a list"),
        ('{"queries": "text"}', 422, "queries has to be a list"),
        ('{"queries": [1]}', 422, "queries has to be a list"),
        ('{"queries": ["a"], "topk": 0}', 422, "topk has to be a whole number from 1 to 100"),
        ('{"queries": ["a"], "topk": 101}', 422, "topk"),
        ('{"queries": ["a"], "topk": true}', 422, "topk"),
        ('{"queries": ["a"], "topk": "\\u00b2"}', 422, "topk"),
        ('{"queries": ["a"], "topk": "' + "9" * 5000 + '"}', 422, "topk"),
        ('{"queries": ["' + "a" * 40_000 + '"]}', 413, "characters"),
        ('{"queries": [' + ",".join(['"a"'] * 513) + "]}", 413, "513 are too many"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(serve, atlas_app, body, status, says):
    answer = requests.post(serve(atlas_app) + "/retrieve", data=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]


def test_too_large_a_body_is_refused_announced_or_not(serve):
    url = serve(make_app(SlowIndex(), None, limits=Limits(body_bytes=1000))) + "/retrieve"
    assert requests.post(url, data=b"x" * 2000).status_code == 413
    pieces = (b"x" * 100 for _ in range(20))
    answer = requests.post(url, data=pieces)  # chunked: no length is announced
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["error"]


def test_a_body_that_does_not_come_to_an_end_is_given_up(serve):
    url = serve(make_app(SlowIndex(), None, limits=Limits(answer_s=0.5)))
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
        client.sendall(head + b"{")
        answer = b"".join(iter(lambda: client.recv(1000), b""))  # until it closes the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come whole within 0.5 s" in answer


def test_what_is_not_served_is_404_and_a_failing_index_500(serve):
    class Broken:
        def search(self, queries, k):
            raise RuntimeError("secret path")

    url = serve(make_app(Broken(), None))
    assert requests.post(url + "/retrieve_images", json={"images": []}).status_code == 404
    failed = requests.post(url + "/retrieve", json={"queries": ["a"]})
    assert failed.status_code == 500
    assert failed.json() == {"error": "the search failed (RuntimeError)"}
    assert requests.get(url + "/retrieve").status_code == 405


def test_the_token_is_wanted_everywhere_but_for_health(serve):
    index = SlowIndex()
    index.released.set()
    url = serve(make_app(index, None, token="open sesame"))
    body = {"queries": ["a"]}
    assert requests.get(url + "/health").json() == {"status": "ok", "text": 1, "images": None}
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "open sesame"}):
        refused = requests.post(url + "/retrieve", json=body, headers=headers)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert requests.get(url + "/metrics", headers=headers).status_code == 401
    headers = {"Authorization": "Bearer open sesame"}
    assert requests.post(url + "/retrieve", json=body, headers=headers).status_code == 200
    assert len(index.batches) == 1


# --- queues


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    assert condition()


def metric(url, line):
    for row in requests.get(url + "/metrics").text.splitlines():
        if row.startswith(line + " "):
            return float(row.split()[-1])
    return 0.0


def test_what_waits_is_answered_together_and_a_repeated_query_asked_once(serve):
    index = SlowIndex()
    url = serve(make_app(index, None, limits=Limits(batch=4)))
    waiting = 'obm_search_waiting{endpoint="text"}'

    def ask(*queries):
        return requests.post(url + "/retrieve", json={"queries": queries}).json()["result"]

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, "first")
        wait_for(lambda: index.batches)
        others = [pool.submit(ask, *queries) for queries in (["b"], ["b", "c"], ["d"], ["e"])]
        wait_for(lambda: metric(url, waiting) == 5)
        index.released.set()
        answers = [[hits[0]["id"] for hits in other.result()] for other in others]
        assert first.result()[0][0]["id"] == "first"
    assert answers == [["b"], ["b", "c"], ["d"], ["e"]]
    # threads decide the order of arrival; at most four at a time, whole requests, b twice
    assert [len(batch) for batch in index.batches] in ([1, 3, 1], [1, 4, 1], [1, 3, 2])
    assert metric(url, waiting) == 0
    assert metric(url, 'obm_search_queries_total{endpoint="text"}') == 6
    assert metric(url, 'obm_search_requests_total{endpoint="text",status="200"}') == 5
    assert metric(url, 'obm_search_batch_queries_count{endpoint="text"}') == 3


def test_a_query_that_the_index_cannot_take_fails_alone():
    class Picky:
        def search(self, queries, k):
            if "bad" in queries:
                raise ValueError("bad")
            return [[Hit(query, query)] for query in queries]

    async def ask(*queries):
        sizes = []
        batcher = Batcher(Picky().search, on_batch=sizes.append)
        asked = (batcher.ask([query], 1) for query in queries)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.close()
        return answers, sizes

    (first, error, last), sizes = run_coroutine(ask("a", "bad", "b"))
    assert sizes == [3]
    assert (first, last) == ([[Hit("a", "a")]], [[Hit("b", "b")]])
    assert isinstance(error, ValueError)


def test_beyond_the_queue_the_answer_is_429_and_the_server_lives_on(serve):
    index = SlowIndex()
    url = serve(make_app(index, None, limits=Limits(waiting=2)))

    def ask(query):
        return requests.post(url + "/retrieve", json={"queries": [query]})

    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(ask, "first")
        wait_for(lambda: index.batches)
        others = [pool.submit(ask, str(i)) for i in range(10)]
        wait_for(lambda: metric(url, 'obm_search_refused_total{endpoint="text"}') == 8)
        index.released.set()
        statuses = sorted(other.result().status_code for other in others)
        refused = next(o.result() for o in others if o.result().status_code == 429)
        assert first.result().status_code == 200
    assert statuses == [200] * 2 + [429] * 8
    assert refused.headers["Retry-After"] == "1"
    assert "wait already" in refused.json()["error"]
    assert ask("later").status_code == 200


def test_beyond_the_queue_no_picture_is_decoded(serve, monkeypatch):
    index = SlowIndex()
    url = serve(make_app(None, index, limits=Limits(waiting=1)))
    decoded = []
    monkeypatch.setattr(
        serving, "decode_image", lambda data, most: decoded.append(data) or str(len(decoded))
    )
    picture = as_text(png(Image.new("RGB", (4, 4))))

    def ask():
        return requests.post(url + "/retrieve_images", json={"images": [picture]})

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        wait_for(lambda: index.batches)
        second = pool.submit(ask)
        wait_for(lambda: metric(url, 'obm_search_waiting{endpoint="images"}') == 1)
        refused = ask()
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert metric(url, 'obm_search_refused_total{endpoint="images"}') == 1
        assert len(decoded) == 2
        index.released.set()
        assert {first.result().status_code, second.result().status_code} == {200}


def test_a_request_that_waits_too_long_is_given_up_and_not_searched(serve):
    index = SlowIndex()
    url = serve(make_app(index, None, limits=Limits(answer_s=2.0)))

    def ask(query):
        return requests.post(url + "/retrieve", json={"queries": [query]}).status_code

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, "first")
        wait_for(lambda: index.batches)
        assert pool.submit(ask, "second").result() == 503
        assert first.result() == 503
    index.released.set()
    assert ask("third") == 200
    assert index.batches == [["first"], ["third"]]


# --- the command


def start_command(*arguments):
    """The server as a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "serve", "--port", "0", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if found := re.search(r"serving on (http://\S+)", line):
            return process, found[1]
    raise AssertionError(f"no server: exit code {process.wait()}")


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way_and_ends_with_0(tmp_path):
    process, url = start_command("--images", "none")
    try:
        assert requests.get(url + "/health").json()["images"] is None
        queries = [f"capital of {i} France {i}" for i in range(400)]
        request = {"queries": queries, "topk": 3, "return_scores": True}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(requests.post, url + "/retrieve", json=request)
            wait_for(lambda: metric(url, 'obm_search_batch_queries_count{endpoint="text"}') == 1)
            process.send_signal(signal.SIGTERM)
            assert len(answer.result().json()["result"]) == 400
        assert process.wait(20) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(url + "/health")
    finally:
        process.kill()


def test_an_impossible_limit_is_one_line(capsys):
    from launch.cli import main

    assert main(["serve", "--waiting", "0"]) == 2
    assert "--waiting has to be above 0" in capsys.readouterr().err
    assert main(["serve", "--text", "none", "--images", "none"]) == 2
    assert "nothing to serve" in capsys.readouterr().err


def refusal(capsys, *arguments):
    """The one line that `obm serve` refuses these arguments with."""
    from launch.cli import main

    assert main(["serve", "--images", "none", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, value) for name in ("--body-mb", "--megapixels", "--answer-s")
          for value in ("nan", "inf", "-inf", "1e308", "0")),
        ("--waiting", "-1"),
        ("--rerank-depth", "9" * 400),
        ("--topk", "9" * 400),
    ],
)  # fmt: skip
def test_a_limit_that_is_no_number_of_use_is_one_line(capsys, option, value):
    assert f"{option} has to be above 0 and at most" in refusal(capsys, f"{option}={value}")


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_no_machine_has_is_one_line(capsys, port):
    assert f"to 65535, got {port}" in refusal(capsys, f"--port={port}")


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refusal(capsys, "--port", str(port))
    assert f"--port {port} on 127.0.0.1: Address already in use; name another one" in said


@pytest.mark.parametrize("host", ["192.0.2.1", "nosuch.invalid", "a" * 70, "::zz"])
def test_a_host_that_is_not_this_machine_is_one_line(capsys, host):
    said = refusal(capsys, "--host", host, "--port", "0")
    assert f"--host '{host}': " in said
    assert "name an address of this machine" in said
