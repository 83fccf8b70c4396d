"""Safe fetching: what a policy must not reach, and bodies that are huge, slow or no pages."""

import gzip
import ipaddress
import logging
import socket
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpcore", reason="needs the extra live")

from environments.fetch import (
    PageRefusedError,
    PageUnavailableError,
    SafeFetcher,
    check_url,
    content_type,
    is_public,
)
from environments.web import (
    TooLargeError,
    TooSlowError,
    UnreachableError,
    exchange,
    read_body,
)
from tests.environments.fake_services import FakeServices

PAGE = "<html><head><title>T</title></head><body><p>hello</p></body></html>"


@pytest.fixture
def fake():
    with FakeServices() as services:
        yield services


@pytest.fixture
def fetcher():
    return SafeFetcher(timeout_s=3, max_bytes=10_000, allow_loopback=True)


def refusal(fetcher, url):
    with pytest.raises(PageRefusedError) as caught:
        fetcher.fetch(url)
    assert caught.value.fault == "model"
    return caught.value.reason


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255",
        "192.168.0.1", "169.254.169.254", "169.254.1.1", "100.64.0.1", "100.100.100.200",
        "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.9",
        "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "fe80::1", "fc00::1",
        "fd00:ec2::254", "ff02::1", "2001:db8::1", "2002:7f00:1::", "2001:0:7f00:1::", "100::1",
        "fec0::1", "4000::1", "3fff::1", "2001:10::1",
    ],
)  # fmt: skip
def test_no_address_but_a_public_one_passes(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses_pass(address):
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_an_address_is_judged_alike_in_all_its_ipv6_forms(ip):
    mapped, translated = (ipaddress.ip_address(f"{head}{ip}") for head in ("::ffff:", "64:ff9b::"))
    assert is_public(ip) == is_public(mapped) == is_public(translated)
    if is_public(ip):
        assert ip.is_global
        assert not ip.is_private
        assert not ip.is_loopback
        assert not ip.is_multicast


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.org/x", "scheme"),
        ("gopher://example.org:80/_GET", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("data:text/html,hi", "scheme"),
        ("//example.org/x", "scheme"),
        ("example.org", "scheme"),
        ("http://", "malformed"),
        ("http:///etc/passwd", "malformed"),
        ("http://user:secret@example.org/", "credentials"),
        ("http://example.org@127.0.0.1/", "credentials"),
        ("http://@127.0.0.1/", "credentials"),
        ("http://example.org\\@127.0.0.1/", "malformed"),
        ("http://exa mple.org/", "malformed"),
        ("http://example.org/\r\nHost: internal", "malformed"),
        ("http://example.org/\x00", "malformed"),
        ("http://127.0.0.1/", "address"),
        ("http://127.0.0.1./", "address"),
        ("http://2130706433/", "host"),
        ("http://0x7f000001/", "host"),
        ("http://0x7f.1/", "host"),
        ("http://127.1/", "host"),
        ("http://0177.0.0.1/", "host"),
        ("http://134744072/", "host"),  # 8.8.8.8: public, and in disguise all the same
        ("http://１２７.0.0.1/", "address"),
        ("http://①②⑦.⓪.⓪.①/", "address"),
        ("http://[::1]/", "address"),
        ("http://[::ffff:127.0.0.1]/", "address"),
        ("http://[fe80::1%25eth0]/", "malformed"),
        ("http://169.254.169.254/latest/meta-data/", "address"),
        ("http://localhost/", "host"),
        ("http://localhost./", "host"),
        ("http://router/", "host"),
        ("http://printer.local/", "host"),
        ("http://metadata.google.internal/", "host"),
        ("http://example.org:22/", "port"),
        ("http://example.org:6379/", "port"),
        ("http://example.org:99999/", "malformed"),
        ("http://" + "a" * 70 + ".org/", "malformed"),
        ("http://example.org/" + "a" * 3000, "malformed"),
    ],
)
def test_a_bad_url_is_refused_before_any_look_up(url, reason, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked up"))
    fetcher = SafeFetcher()
    assert refusal(fetcher, url) == reason
    assert fetcher.refused == {reason: 1}


@pytest.mark.parametrize(
    ("url", "checked"),
    [
        ("HTTPS://Example.ORG", "https://example.org/"),
        (" http://example.org/a?b=c#d ", "http://example.org/a?b=c"),
        ("http://example.org:8080/ä?ö=ü", "http://example.org:8080/%C3%A4?%C3%B6=%C3%BC"),
        ("http://bücher.example/%20x", "http://xn--bcher-kva.example/%20x"),
        ("http://[2606:4700::1111]/", "http://[2606:4700::1111]/"),
    ],
)
def test_a_good_url_becomes_ascii(url, checked):
    assert check_url(url) == checked


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "http://[", "file://"]))
def test_any_text_is_either_refused_or_a_plain_url(text, head):
    try:
        url = check_url(head + text)
    except PageRefusedError:
        return
    assert url.isascii()
    assert url.startswith(("http://", "https://"))
    assert " " not in url
    assert check_url(url) == url  # nothing is left to normalise, so nothing to disagree about


# ---------------------------------------------------------------- names and redirects


def resolve_to(monkeypatch, *answers):
    """Makes names resolve to these addresses, one list a look-up; returns the names asked for."""
    asked, queue = [], list(answers)

    def getaddrinfo(host, port, *arguments, **options):
        asked.append(host)
        addresses = queue.pop(0) if len(queue) > 1 else queue[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def connections(monkeypatch):
    """Records where a connection is tried; none succeeds."""
    tried = []

    def create_connection(address, *arguments, **options):
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", create_connection)
    return tried


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"]])
def test_a_name_with_a_private_address_is_never_connected_to(addresses, monkeypatch):
    resolve_to(monkeypatch, addresses)
    tried = connections(monkeypatch)
    assert refusal(SafeFetcher(), "http://rebind.example.org/") == "address"
    assert tried == []


def test_the_checked_address_is_the_one_connected_to(monkeypatch):
    # a name that answers with a private address as soon as it is asked a second time
    asked = resolve_to(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
    tried = connections(monkeypatch)
    with pytest.raises(UnreachableError):
        SafeFetcher().fetch("http://rebind.example.org/")
    assert asked == ["rebind.example.org"]
    assert tried == [("93.184.216.34", 80)]


def unresolved(monkeypatch, code):
    """Makes every look-up fail."""

    def getaddrinfo(*arguments, **options):
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


NO_DATA = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)  # not known everywhere


@pytest.mark.parametrize("code", [socket.EAI_NONAME, NO_DATA])
def test_a_name_that_does_not_exist_is_told_to_the_model(code, monkeypatch):
    unresolved(monkeypatch, code)
    fetcher = SafeFetcher()
    with pytest.raises(PageRefusedError, match="There is no such host") as caught:
        fetcher.fetch("https://made-up.example.org/page")
    assert (caught.value.fault, caught.value.reason) == ("model", "name")
    assert fetcher.refused == {"name": 1}


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM])
def test_a_name_service_that_fails_is_infrastructure(code, monkeypatch):
    unresolved(monkeypatch, code)
    fetcher = SafeFetcher()
    with pytest.raises(UnreachableError) as caught:
        fetcher.fetch("https://example.org/page")
    assert (caught.value.fault, fetcher.refused) == ("infrastructure", {})


def test_a_service_whose_name_is_not_known_is_infrastructure(monkeypatch):
    unresolved(monkeypatch, socket.EAI_NONAME)
    with pytest.raises(UnreachableError) as caught:
        exchange("GET", "http://api.example.org/", headers={}, timeout_s=2, max_bytes=100)
    assert caught.value.fault == "infrastructure"


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (b"/stra\xc3\x9fe?q=\xc3\xa4", "/stra%C3%9Fe?q=%C3%A4"),  # UTF-8 as it is
        (b"/stra%C3%9Fe", "/stra%C3%9Fe"),
        (b"/stra\xdfe", "/stra%C3%9Fe"),  # Latin-1, which RFC 9110 has in mind
    ],
)
def test_a_redirect_may_hold_letters_that_are_not_ascii(location, path, fake, fetcher):
    fake.page("/old", "", status=301, Location=location.decode("latin-1"))
    fake.page("/stra%C3%9Fe", PAGE)
    assert fetcher.fetch(f"{fake.url}/old").url == f"{fake.url}{path}"


def test_redirects_are_checked_hop_by_hop(fake, fetcher, caplog):
    fake.page("/to-file", "", status=302, Location="file:///etc/passwd")
    fake.page("/to-private", "", status=307, Location="http://10.0.0.1/admin")
    fake.page("/to-metadata", "", status=301, Location="//169.254.169.254/latest")
    fake.page("/round", "", status=302, Location="/round")
    fake.page("/good", "", status=303, Location="there#part")
    fake.page("/there", PAGE)
    with caplog.at_level(logging.WARNING):
        assert refusal(fetcher, f"{fake.url}/to-file") == "scheme"
        assert refusal(fetcher, f"{fake.url}/to-private") == "address"
        assert refusal(fetcher, f"{fake.url}/to-metadata") == "address"
        assert refusal(fetcher, f"{fake.url}/round") == "redirects"
    assert fetcher.refused == {"scheme": 1, "address": 2, "redirects": 1}
    assert len([r for r in caplog.records if "refused to fetch" in r.message]) == 4
    fetched = fetcher.fetch(f"{fake.url}/good")
    assert (fetched.url, fetched.body.decode()) == (f"{fake.url}/there", PAGE)


def test_a_redirect_to_this_machine_is_refused_without_the_test_setting(fake, monkeypatch):
    fetcher = SafeFetcher(timeout_s=2)
    assert refusal(fetcher, f"{fake.url}/good") == "address"
    assert fake.requests == []


def test_no_proxy_stands_between_a_checked_address_and_its_page(fake, monkeypatch):
    # a proxy would look the name up again, and could be led anywhere
    monkeypatch.setenv("http_proxy", fake.url)
    resolve_to(monkeypatch, ["93.184.216.34"])
    tried = connections(monkeypatch)
    with pytest.raises(UnreachableError):
        SafeFetcher().fetch("http://example.org/")
    assert tried == [("93.184.216.34", 80)]
    assert fake.requests == []


def test_no_cookie_and_no_credential_goes_along(fake, fetcher):
    fake.page("/a", "", status=302, Location="/b", Set_Cookie="session=1")
    fake.page("/b", PAGE)
    fetcher.fetch(f"{fake.url}/a")
    for request in fake.requests:
        assert not {"cookie", "authorization", "referer"} & set(request.headers)


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("application/pdf", "type"),
        ("application/octet-stream", "type"),
        ("image/png", "type"),
        ("text/html-not", "type"),
        ("", "type"),
    ],
)
def test_a_body_of_another_kind_is_not_read(kind, reason, fake, fetcher):
    fake.page("/x", b"x", kind)
    assert refusal(fetcher, f"{fake.url}/x") == reason


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_page_that_is_not_there_is_told_to_the_model(status, fake, fetcher):
    fake.page("/x", PAGE, status=status)
    with pytest.raises(PageRefusedError, match=str(status)) as caught:
        fetcher.fetch(f"{fake.url}/x")
    assert caught.value.fault == "model"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_in_trouble_is_infrastructure(status, fake, fetcher):
    fake.page("/x", PAGE, status=status)
    with pytest.raises(PageUnavailableError) as caught:
        fetcher.fetch(f"{fake.url}/x")
    assert caught.value.fault == "infrastructure"


def test_a_body_up_to_the_limit_passes_and_one_byte_more_does_not(fake, fetcher):
    fake.page("/fits", b"a" * 10_000, "text/plain")
    fake.page("/over", b"a" * 10_001, "text/plain")
    assert len(fetcher.fetch(f"{fake.url}/fits").body) == 10_000
    assert refusal(fetcher, f"{fake.url}/over") == "size"


def test_a_body_that_lies_about_its_length_is_counted_as_it_streams(fake, fetcher):
    # chunked: no length is announced
    chunks = b"".join(b"3e8\r\n" + b"a" * 1000 + b"\r\n" for _ in range(50)) + b"0\r\n\r\n"
    fake.say("/x", 200, chunks, {"Content-Type": "text/plain", "Transfer-Encoding": "chunked"})
    assert refusal(fetcher, f"{fake.url}/x") == "size"


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate"])
def test_compressed_pages_are_read(encoding, fake, fetcher):
    packed = zlib.compress(PAGE.encode()) if encoding == "deflate" else gzip.compress(PAGE.encode())
    fake.page("/x", packed, Content_Encoding=encoding)
    assert fetcher.fetch(f"{fake.url}/x").body.decode() == PAGE
    raw = zlib.compressobj(wbits=-15)
    fake.page("/raw", raw.compress(PAGE.encode()) + raw.flush(), Content_Encoding="deflate")
    assert fetcher.fetch(f"{fake.url}/raw").body.decode() == PAGE


def test_a_decompression_bomb_is_stopped_at_the_limit(fake, fetcher):
    bomb = gzip.compress(bytes(50_000_000))  # 50 MB in 50 kB
    small_enough = gzip.compress(bytes(9_000_000))
    assert len(small_enough) < fetcher.max_bytes
    fake.page("/bomb", bomb, Content_Encoding="gzip")
    fake.page("/small", small_enough, Content_Encoding="gzip")
    assert refusal(fetcher, f"{fake.url}/bomb") == "size"
    assert refusal(fetcher, f"{fake.url}/small") == "size"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_never_in_memory(encoding):
    packed = zlib.compress(bytes(9_000_000)) if encoding == "deflate" else gzip.compress(
        bytes(9_000_000)
    )  # fmt: skip
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        read_body([packed], {"content-encoding": encoding}, 10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"x", "br"),
        (b"x", "gzip, gzip"),
        (b"no gzip", "gzip"),
        (gzip.compress(b"abc", mtime=0)[:-4], "gzip"),
    ],
)
def test_broken_or_unknown_compression_is_refused(content, encoding, fake, fetcher):
    fake.page("/x", content, Content_Encoding=encoding)
    assert refusal(fetcher, f"{fake.url}/x") == "encoding"


def test_a_body_that_trickles_in_ends_at_the_time_limit(fake):
    fetcher = SafeFetcher(timeout_s=0.5, allow_loopback=True)
    fake.say("/x", 200, b"a" * 1000, {"Content-Type": "text/plain"}, piece_s=0.05)
    start = time.perf_counter()
    with pytest.raises(TooSlowError, match=r"within 0\.[45]"):
        fetcher.fetch(f"{fake.url}/x")
    assert time.perf_counter() - start < 1.5


def test_headers_that_trickle_in_end_at_the_time_limit():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        start = time.perf_counter()
        with pytest.raises(TooSlowError):  # accepted by the kernel, never answered
            exchange("GET", f"http://127.0.0.1:{port}/", headers={}, timeout_s=0.3, max_bytes=100)
        assert time.perf_counter() - start < 1.5


def test_a_hanging_name_service_ends_at_the_time_limit(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(2))
    start = time.perf_counter()
    with pytest.raises(TooSlowError):
        SafeFetcher(timeout_s=0.2).fetch("http://slow.example.org/")
    assert time.perf_counter() - start < 1


def test_a_dead_server_and_a_torn_body_are_infrastructure(fake, fetcher):
    fake.say("/torn", 200, b"a" * 100, {"Content-Type": "text/plain"}, cut=True)
    with pytest.raises(UnreachableError):
        fetcher.fetch(f"{fake.url}/torn")
    fake.stop()
    with pytest.raises(UnreachableError) as caught:
        fetcher.fetch(f"{fake.url}/x")
    assert caught.value.fault == "infrastructure"


@pytest.mark.parametrize(
    ("header", "read"),
    [
        ("text/html", ("text/html", "")),
        ('Text/HTML; Charset="UTF-8"', ("text/html", "utf-8")),
        ("text/plain;x=y; charset=latin-1 ", ("text/plain", "latin-1")),
        ("", ("", "")),
    ],
)
def test_content_types_are_read_without_their_parameters(header, read):
    assert content_type({"content-type": header}) == read
