"""Pages and pictures of the open web, fetched so that a policy cannot reach what it must not.

A URL comes out of a model or out of a search result: both are strangers. So only http and https;
no credentials; every address of the host has to be a public one, and the checked address is the one
connected to; each redirect starts again from there; size, time and content type are limited. What
is refused is the model's fault, is logged and is counted by reason in `SafeFetcher.refused`.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn
from urllib.parse import quote, urljoin, urlsplit

from environments.sanitize import one_line
from environments.web import (
    NoSuchHostError,
    TooLargeError,
    UnreadableBodyError,
    WebError,
    exchange,
)

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

PAGE_TYPES = ("text/html", "application/xhtml+xml", "text/plain")
PICTURE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp")
PORTS = (80, 443, 8080, 8443)
MAX_URL_CHARS = 2048
MAX_REDIRECTS = 5
USER_AGENT = "Mozilla/5.0 (compatible; obm-warmstart)"
# private by name: these never leave a site's own network
LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".intranet", ".lan", ".home.arpa", ".corp")
# IANA's special-purpose blocks, written out because Python's own table differs between versions;
# 168.63.129.16 is public by number but a cloud's service for its own machines
_NOT_PUBLIC_V4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
)))  # fmt: skip
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
# 2001::/23 with Teredo and 2002::/16 (6to4) carry an IPv4 address of the sender's choice inside
_NOT_PUBLIC_V6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class PageRefusedError(WebError):
    """A URL that is not fetched, or a page that is not there; the model may read the message."""

    fault: Literal["model", "infrastructure"] = "model"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class PageUnavailableError(WebError):
    """The page's server has a problem of its own for now."""


@dataclass(frozen=True)
class Fetched:
    """A fetched body.

    Attributes:
        url: after redirects.
        content_type: without parameters, lower case.
        charset: as the server names it, or "".
        body: decompressed.
    """

    url: str
    content_type: str
    charset: str
    body: bytes


class SafeFetcher:
    """Fetches public URLs.

    Args:
        timeout_s: for one fetch, redirects included.
        max_bytes: largest body, as sent and as decompressed.
        allow_loopback: also fetch from this machine, any port; for tests only.

    Attributes:
        refused: how often, by reason.
    """

    def __init__(
        self, *, timeout_s: float = 10.0, max_bytes: int = 2_000_000, allow_loopback: bool = False
    ) -> None:
        self.timeout_s, self.max_bytes = timeout_s, max_bytes
        self.allow_loopback = allow_loopback
        self.refused: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fetch(self, url: str, types: tuple[str, ...] = PAGE_TYPES) -> Fetched:
        """The body behind a URL.

        Args:
            url: as the model or a search result wrote it.
            types: content types that are wanted; `image/*` = all of its kind, "" = none is named.

        Raises:
            PageRefusedError: not allowed, not there, or not of these types.
            WebError: the server failed.
        """
        asked, deadline = url, time.monotonic() + self.timeout_s
        try:
            for _ in range(MAX_REDIRECTS + 1):
                url = check_url(url, self.allow_loopback)
                reply = exchange(
                    "GET",
                    url,
                    headers={"User-Agent": USER_AGENT, "Accept": ", ".join(filter(None, types))},
                    timeout_s=max(deadline - time.monotonic(), 0.0),
                    max_bytes=self.max_bytes,
                    check_address=self._check_address,
                    wants_body=lambda status, headers: _wants_body(status, headers, types),
                )
                if reply.status == 200:
                    kind, charset = content_type(reply.headers)
                    return Fetched(url, kind, charset, reply.body)
                url = urljoin(url, _location(reply.headers))
            _refuse("redirects", f"It redirects more than {MAX_REDIRECTS} times.")
        except TooLargeError:
            self._note(asked, "size")
            raise PageRefusedError("The page is too large.", "size") from None
        except UnreadableBodyError:
            self._note(asked, "encoding")
            raise PageRefusedError("The page cannot be decompressed.", "encoding") from None
        except NoSuchHostError:
            # whoever wrote the address made the name up; a service's own name is another matter
            self._note(asked, "name")
            raise PageRefusedError("There is no such host.", "name") from None
        except PageRefusedError as refusal:
            self._note(asked, refusal.reason)
            raise

    def _check_address(self, address: str) -> None:
        ip = ipaddress.ip_address(address)
        if not (is_public(ip) or (self.allow_loopback and ip.is_loopback)):
            _refuse("address", "Only public web pages can be read.")

    def _note(self, url: str, reason: str) -> None:
        with self._lock:
            self.refused[reason] += 1
        logger.warning("refused to fetch %s: %s", one_line(url, 120), reason)


def check_url(url: str, allow_loopback: bool = False) -> str:
    """The URL in ASCII, without fragment, after every check that needs no look-up.

    Raises:
        PageRefusedError: no http(s) URL, credentials, a host in disguise, a local name or an
            unusual port.
    """
    if len(url) > MAX_URL_CHARS or re.search(r"[\x00-\x20\x7f\\]", url.strip()):
        _refuse("malformed", "This is no valid URL.")
    try:
        parts = urlsplit(url.strip())
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode().lower().rstrip(".")
    except (ValueError, UnicodeError):
        _refuse("malformed", "This is no valid URL.")
    if parts.scheme.lower() not in ("http", "https"):
        _refuse("scheme", "Only http and https pages can be read.")
    if parts.username is not None or parts.password is not None:
        _refuse("credentials", "A URL with a user name or password is not read.")
    host = _check_host(host, allow_loopback)
    if port is not None and port not in PORTS and not allow_loopback:
        _refuse("port", f"Only the ports {', '.join(map(str, PORTS))} can be read.")
    place = f"[{host}]" if ":" in host else host
    path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*-._")
    query = "?" + quote(parts.query, safe="/%:=&?~+!$,;'@()*-._[]") if parts.query else ""
    return f"{parts.scheme.lower()}://{place}{'' if port is None else f':{port}'}{path}{query}"


def _check_host(host: str, allow_loopback: bool) -> str:
    """The host, if it is a full name or an address in its usual form.

    `2130706433`, `0177.0.0.1` and `0x7f.1` are 127.0.0.1 to the system's look-up: a host whose
    last label is a number has to be four plain decimals.
    """
    if not host or "%" in host:
        _refuse("malformed", "This is no valid URL.")
    last = host.rpartition(".")[2]
    if ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last):
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            _refuse("host", "Write the host by its name.")
        if not is_public(ip) and not (allow_loopback and ip.is_loopback):
            _refuse("address", "Only public web pages can be read.")
        return host
    is_local = host.endswith(LOCAL_SUFFIXES) or "." not in host
    if is_local and not (allow_loopback and host == "localhost"):
        _refuse("host", "Only public web pages can be read.")
    return host


def is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet.

    Not so: private, loopback, link-local, shared, reserved, documentation, multicast and
    unspecified addresses, cloud metadata services, IPv6 tunnels with an IPv4 address inside, and
    IPv4-mapped or NAT64 forms of any of these.
    """
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(ip.ipv4_mapped)
        if ip in _NAT64:
            return is_public(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        return ip in _PUBLIC_V6 and ip.is_global and not any(ip in n for n in _NOT_PUBLIC_V6)
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC_V4)


def content_type(headers: dict[str, str]) -> tuple[str, str]:
    """Content type and charset, lower case, of the header Content-Type; "" where there is none."""
    kind, *parameters = headers.get("content-type", "").lower().split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset":
            return kind.strip(), value.strip(" \"'")
    return kind.strip(), ""


def _location(headers: dict[str, str]) -> str:
    """Where a redirect leads. Its bytes may be UTF-8 as they are, which `exchange` reads as Latin-1
    like all headers; encoded so, they would name another page."""
    location = headers["location"]
    try:
        return location.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return location


def _wants_body(status: int, headers: dict[str, str], types: tuple[str, ...]) -> bool:
    """True for a page, False for a redirect; anything else has no body that is worth reading."""
    if status in (301, 302, 303, 307, 308) and headers.get("location"):
        return False
    if status in (408, 425, 429) or status >= 500:
        raise PageUnavailableError(f"the page's server answers with HTTP {status}")
    if status != 200:
        _refuse("status", f"The page cannot be read (HTTP {status}).")
    kind = content_type(headers)[0]
    if not {kind, f"{kind.partition('/')[0]}/*"} & set(types):
        _refuse("type", "The page is of a kind that cannot be read.")
    return True


def _refuse(reason: str, message: str) -> NoReturn:
    raise PageRefusedError(message, reason)
