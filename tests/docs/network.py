"""Watches that nothing is sent anywhere: every process of a test, whatever it is written in.

Two nets. In a Python process an audit hook sees every name that is looked up and every address that
is connected to; what is not this machine is written down and refused. Programs that are not
Python's (wandb's core, git) take the proxies of the environment: one that listens here writes down
whom they ask for, and hangs up.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
from pathlib import Path

LOG = "TESTS_NETWORK_LOG"
"""Variable that names the file to write to; the hook of a child process reads it."""
LOCAL = {"", "localhost", "0.0.0.0", "::", socket.gethostname()}
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex")
SENDS = ("socket.connect", "socket.sendto", "socket.sendmsg")
CLEARED = (
    "WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED", "WANDB_ERROR_REPORTING",
    # of a run in this process: a child would share its service, which knows no kill of a child
    "WANDB_SERVICE",
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE", "HF_TOKEN", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY",
)  # fmt: skip
"""What a tester may have set, and a stranger has not."""


def is_local(host: object) -> bool:
    """Whether a name or an address is this machine's; no name is, too."""
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback or name in LOCAL
    except ValueError:
        return name in LOCAL


def watch(event: str, arguments: tuple) -> None:
    """The audit hook."""
    path = os.environ.get(LOG)
    if path is None or event not in (*LOOKUPS, *SENDS):
        return
    if event in LOOKUPS:
        host = arguments[0]
    else:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a socket of the file system
    if not is_local(host):
        write_down(path, f"{event} {host!r} by {' '.join(sys.argv)[:200]}")
        raise PermissionError(f"{host!r} is not this machine")


def write_down(path: str, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


class Network:
    """The nets around one test, spread in a folder of their own.

    Used as a context; `environment()` is for child processes, this process is watched as well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "network.log"
        folder.mkdir(parents=True)
        self.log.touch()
        here = Path(__file__).resolve()
        (folder / "sitecustomize.py").write_text(
            "import sys\n"
            f"sys.path.append({str(here.parents[2])!r})\n"
            "from tests.docs.network import watch\n"
            "sys.addaudithook(watch)\n"
        )
        self._proxy = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> Network:
        _hook_once()
        os.environ[LOG] = str(self.log)
        threading.Thread(target=self._hang_up, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        del os.environ[LOG]
        self._proxy.close()

    def environment(self, path: str) -> dict[str, str]:
        """Variables of a child process whose PYTHONPATH is `path`."""
        proxy = f"http://127.0.0.1:{self._proxy.getsockname()[1]}"
        kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
        proxies = {name: proxy for way in ("http", "https", "all")
                   for name in (f"{way}_proxy", f"{way}_proxy".upper())}  # fmt: skip
        return kept | proxies | {
            "no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{path}",
            LOG: str(self.log),
            # no login of the tester's
            "HOME": str(self.folder), "NETRC": str(self.folder / "netrc"),
            "HF_HOME": str(self.folder / "hf"),
        }  # fmt: skip

    def sent(self) -> list[str]:
        """What was sent, or would have been: one line each."""
        return self.log.read_text(encoding="utf-8").splitlines()

    def _hang_up(self) -> None:
        while True:
            try:
                asked, _ = self._proxy.accept()
            except OSError:
                return
            with asked:
                line = asked.recv(300).partition(b"\r\n")[0]
            write_down(str(self.log), f"proxy {line.decode(errors='replace')}")


def _hook_once() -> None:
    """A hook cannot be taken away: one for all tests, which looks at the variable."""
    if not getattr(sys, "_tests_network_hook", False):
        sys.addaudithook(watch)
        sys._tests_network_hook = True  # type: ignore[attr-defined]
