"""Serve text and image search over HTTP, wire-compatible with Search-R1's retrieval server.

SIGTERM or Ctrl-C finishes what is under way and ends. The address is this machine's own unless
--host says otherwise. With the environment variable OBM_SEARCH_TOKEN every request but /health has
to bring it as a bearer token. Needs the extra `serve`: pip install 'obm-warmstart[serve]'.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

LISTEN_BACKLOG = 2048
MOST = 10**15
"""Above every limit that makes sense; what lies beyond fits into no counter and no clock."""
MAX_PORT = 65535
EXAMPLES = (
    "obm serve",
    "obm serve --text runs/wiki-bm25 --text runs/wiki-e5 --images none --port 8000",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served, where, and within which limits."""
    parser.add_argument(
        "--text", metavar="INDEX", action="append",
        help="atlas, none, or a folder of `obm index`; several are fused by their ranks "
        "(default: atlas)",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="INDEX", default="atlas",
        help="atlas, atlas-robust (finds turned, cut and redrawn pictures, too), none, or a folder "
        "of `obm index` (default: atlas)",
    )  # fmt: skip
    parser.add_argument(
        "--rerank", metavar="MODEL",
        help="folder or hub id of a cross-encoder that reorders the first text hits",
    )  # fmt: skip
    parser.add_argument(
        "--rerank-depth", type=int, default=20, metavar="N", help="how many it reads (default: 20)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of encoders and cross-encoder"
    )
    parser.add_argument(
        "--in-memory", action="store_true",
        help="read the matrix of a BM25 index into memory instead of mapping its file",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, help="0 = any that is free (default: 8000)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--waiting", type=int, default=1024, metavar="N",
        help="queries that may wait; beyond, 429 (default: 1024)",
    )  # fmt: skip
    limits.add_argument(
        "--batch", type=int, default=64, metavar="N",
        help="queries that an index is asked at a time (default: 64)",
    )  # fmt: skip
    limits.add_argument(
        "--topk", type=int, default=100, metavar="N", help="most hits of a query (default: 100)"
    )
    limits.add_argument(
        "--body-mb", type=float, default=16, metavar="MB", help="largest request (default: 16)"
    )
    limits.add_argument(
        "--megapixels", type=float, default=25, metavar="N",
        help="largest picture, unpacked; a request may have four times as many (default: 25)",
    )  # fmt: skip
    limits.add_argument(
        "--answer-s", type=float, default=30, metavar="S",
        help="a request that waits longer is given up with 503, one that does not come whole "
        "with 408 (default: 30)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    for name in ("waiting", "batch", "topk", "body_mb", "megapixels", "answer_s", "rerank_depth"):
        value = getattr(options, name)
        if not 0 < value <= MOST:  # said so that nan is refused, too
            raise LaunchError(
                f"--{name.replace('_', '-')} has to be above 0 and at most {MOST:.0e}, got {value}"
            )
    if not 0 <= options.port <= MAX_PORT:
        raise LaunchError(
            f"--port has to be from 0 (any that is free) to {MAX_PORT}, got {options.port}"
        )
    try:
        import uvicorn

        from environments.serve import Limits, make_app
    except ImportError as error:
        raise LaunchError(
            f"serving needs {error.name}; pip install 'obm-warmstart[serve]'"
        ) from error
    from environments.wire import TOKEN_VARIABLE

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    token = os.environ.get(TOKEN_VARIABLE)
    text = _text_index(options)
    images = _image_index(options)
    if text is None and images is None:
        raise LaunchError("--text none and --images none leave nothing to serve")
    limits = Limits(
        body_bytes=int(options.body_mb * 2**20),
        topk=options.topk,
        pixels=int(options.megapixels * 1e6),
        waiting=options.waiting,
        batch=options.batch,
        answer_s=options.answer_s,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(text, images, limits=limits, token=token),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(options.answer_s) + 1,
        )
    )
    # uvicorn sends itself the signal again once it is done; that must not end us with an error
    signal.signal(signal.SIGTERM, lambda *_: None)
    listener = _listener(options.host, options.port)
    if not token and not _is_loopback(options.host):
        logging.warning("%s is open to others; set %s", options.host, TOKEN_VARIABLE)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port} ({_words(text, images)})", flush=True)
    server.run(sockets=[listener])
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens; not uvicorn's, which ends the process on a port that is taken.

    Raises:
        LaunchError: no such address on this machine, or the port is taken or not allowed.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(LISTEN_BACKLOG)  # whoever reads our line may connect at once
    # UnicodeError, TypeError: a name that no address can be looked up for
    except (OSError, UnicodeError, TypeError) as error:
        listener.close()
        code = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or "no address"
        if code in (errno.EADDRINUSE, errno.EACCES):
            raise LaunchError(
                f"--port {port} on {host}: {reason}; name another one, or 0 for any that is free"
            ) from error
        raise LaunchError(
            f"--host {host!r}: {reason}; name an address of this machine, such as 127.0.0.1"
        ) from error
    listener.set_inheritable(True)
    return listener


def _text_index(options: argparse.Namespace) -> Any:
    """The text indexes, fused if there are several, behind the cross-encoder if there is one."""
    names = [name for name in options.text or ["atlas"] if name != "none"]
    if not names:
        return None
    indexes = [_one_text_index(name, options) for name in names]
    index = indexes[0]
    if len(indexes) > 1:
        from environments.fusion import FusedTextIndex

        index = FusedTextIndex(indexes)
    if options.rerank:
        from environments.encoders import CrossEncoder
        from environments.fusion import RerankedTextIndex

        reranker = CrossEncoder(options.rerank, device=options.device)
        index = RerankedTextIndex(index, reranker, options.rerank_depth)
    return index


def _one_text_index(name: str, options: argparse.Namespace) -> Any:
    if name == "atlas":
        from environments.atlas.world import load_text_index

        return load_text_index(snippet_words=None)
    from environments.indexing import open_text_index

    return open_text_index(Path(name), device=options.device, mapped=not options.in_memory)


def _image_index(options: argparse.Namespace) -> Any:
    if options.images == "none":
        return None
    if options.images in ("atlas", "atlas-robust"):
        from environments.atlas.world import load_image_index

        return load_image_index(robust=options.images == "atlas-robust")
    from environments.indexing import open_image_index

    return open_image_index(Path(options.images), device=options.device)


def _words(text: Any, images: Any) -> str:
    parts = []
    if text is not None:
        parts.append(f"{len(text)} passages")
    if images is not None:
        parts.append(f"{len(images)} pictures")
    return ", ".join(parts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
