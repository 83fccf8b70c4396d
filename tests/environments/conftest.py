"""Servers for tests over real HTTP."""

import threading
import time

import pytest


@pytest.fixture
def serve():
    """Serves an application on a free port of this machine, over real HTTP: `serve(app) -> url`."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    running = []

    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        listener = server.config.bind_socket()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
