"""The proxy with bad days: what a client of the search server makes of each fate."""

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from environments.remote import RemoteTextIndex, SearchServer, SearchServerError
from launch.drill_network import Client
from launch.drill_proxy import FATES, Proxy

HIT = {"document": {"id": "1", "contents": '"Title"\ntext'}, "score": 2.5}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        body = json.dumps({"result": [[HIT]] * len(queries)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.daemon_threads = True
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1]
        found.shutdown()


class Loaded(random.Random):
    """Dice that always choose the same fate."""

    def __init__(self, fate):
        super().__init__(0)
        self.fate = fate

    def choice(self, options):
        return self.fate if self.fate in options else super().choice(options)

    def random(self):
        return 0.0


@pytest.mark.parametrize("fate", FATES)
def test_each_fate_is_one_error_and_the_healed_network_answers(server, fate, monkeypatch):
    monkeypatch.setattr("environments.remote.COOL_DOWN_S", 0.0)
    with Proxy(server, Loaded(fate), n_sound=1, n_bad=1, stall_s=3.0) as proxy:
        index = RemoteTextIndex(SearchServer(proxy.url, timeout_s=2.0, retries=0))
        [[first]] = index.search(["a"], 1)
        with pytest.raises(SearchServerError):
            index.search(["a"], 1)
        [[after]] = index.search(["a"], 1)
    assert first == after
    assert first.score == 2.5
    assert proxy.counts == {"pass": 2, fate: 1}
    assert proxy.n_doomed == 1


def test_a_client_with_patience_does_not_notice(server):
    with Proxy(server, random.Random(3), n_bad=3, share=1.0, stall_s=0.1) as proxy:
        dice = Loaded("reset")
        proxy._dice = dice
        index = RemoteTextIndex(SearchServer(proxy.url, timeout_s=10, retries=4))
        assert len(index.search(["a", "b"], 1)) == 2
    assert proxy.counts == {"reset": 3, "pass": 1}


def test_the_same_dice_give_the_same_fates(server):
    counts = []
    for _ in range(2):
        with Proxy(server, random.Random(5), n_bad=8, stall_s=0.01) as proxy:
            fates = [proxy._fate() for _ in range(40)]
        counts.append(fates)
    assert counts[0] == counts[1]
    assert sum(fate != "pass" for fate in counts[0]) == 8
    assert set(counts[0][-5:]) == {"pass"}


def test_the_client_counts_right_wrong_and_clear_errors(server, monkeypatch):
    monkeypatch.setattr("environments.remote.COOL_DOWN_S", 0.0)
    known = {"a": [("1", 2.5)], "b": [("1", 9.0)]}
    with (
        Proxy(server, Loaded("reset"), n_sound=4, n_bad=2) as proxy,
        Client(proxy.url, known) as client,
    ):
        while client.counts["right"] < 6 and not client.problems:
            time.sleep(0.01)
    assert client.problems == []
    assert client.counts["wrong"] >= 4
    assert client.counts["clear error"] == 2
