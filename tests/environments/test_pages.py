"""What is read out of pages and pictures, and how it is summarised."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("httpcore", reason="needs the extra live")
pytest.importorskip("trafilatura", reason="needs the extra live")

import contextlib

from environments.fetch import Fetched, PageRefusedError, SafeFetcher
from environments.pages import DirectReader, extract_page
from environments.pictures import PictureError, decode_picture, fetch_picture
from environments.services import KEY_VARIABLES, MalformedReplyError, Service
from environments.summaries import (
    INSTRUCTION,
    MAX_SENTENCE_WORDS,
    BestSentences,
    ModelSummary,
    split_sentences,
)
from tests.environments.fake_services import FakeServices

ARTICLE = """<html><head><title>Paris &amp; its river</title><script>var x = "steal()";</script>
<style>p {color: red}</style></head><body>
<nav><a href="/">Home</a> <a href="/login">Log in</a></nav>
<article><h1>Paris</h1>
<p>Paris is the capital and most populous city of France, on the river Seine.</p>
<p>The metro of Paris was opened in the year 1900 for the world fair.</p>
<p>Its twenty districts are numbered in a spiral that starts at the Louvre.</p>
<p>The highest natural point of the city is Montmartre, 130 metres high.</p>
<p>Its mayor is elected for six years by the council of the city.</p>
<p>Many people come each year to see the tower that Gustave Eiffel built.</p>
</article><footer>Cookies and imprint</footer></body></html>"""


@pytest.fixture
def fake():
    with FakeServices() as services:
        yield services


def fetched(body, kind="text/html", charset="utf-8"):
    return Fetched("https://example.org/notes%20a.txt", kind, charset, body)


# ---------------------------------------------------------------- text


def test_the_main_text_is_kept_and_the_rest_is_not():
    page = extract_page(fetched(ARTICLE.encode()))
    assert page.title in ("Paris & its river", "Paris")
    assert "most populous city of France" in page.text
    assert "Montmartre, 130 metres" in page.text
    for noise in ("steal()", "color: red", "Log in", "<p>"):
        assert noise not in page.text


def test_plain_text_is_left_alone():
    page = extract_page(fetched("Hällo <b>".encode(), "text/plain"))
    assert (page.title, page.text) == ("notes a.txt", "Hällo <b>")


@pytest.mark.parametrize(
    ("charset", "body", "text"),
    [
        ("iso-8859-1", "Müller".encode("latin-1"), "Müller"),
        ("utf-16", "Müller".encode("utf-16"), "Müller"),
        ("", "Müller".encode(), "Müller"),
        ("no-such-charset", "Müller".encode(), "Müller"),
        ("hex", b"Mueller", "Mueller"),  # a codec of Python that is no charset
        ("utf-8", b"M\xff", "M�"),
        ("punycode", b"Mller-kva", "Mller-kva"),  # takes the square of the length
        ("unicode_escape", b"a\\u0062", "a\\u0062"),
        ("windows-1251", "Москва".encode("cp1251"), "Москва"),
        ("Shift_JIS", "東京".encode("shift_jis"), "東京"),
    ],
)
def test_every_charset_ends_in_text(charset, body, text):
    assert extract_page(fetched(body, "text/plain", charset)).text == text


@pytest.mark.parametrize(
    "body",
    [b"", b"\x00" * 1000, b"\xff\xfe\x00", b"<html>", b"<div>" * 20_000, b"<b>" * 50_000 + b"x",
     b"<table><tr><td>x" * 3000, b"<!DOCTYPE x [<!ENTITY a 'b'><!ENTITY c '&a;&a;'>]><p>&c;</p>",
     b"<svg><script>x</script></svg>", b"<p>" + b"&#0;" * 1000],
)  # fmt: skip
def test_broken_and_hostile_html_is_a_page_with_little_text(body):
    page = extract_page(fetched(body, charset=""))
    assert isinstance(page.text, str)
    assert isinstance(page.title, str)


@given(st.binary(max_size=300), st.sampled_from(["", "utf-8", "utf-16", "cp1252"]))
def test_any_bytes_are_some_page(body, charset):
    page = extract_page(fetched(body, charset=charset))
    assert isinstance(page.text, str)


def test_a_page_is_read_for_a_question(fake):
    fake.page("/old", "", status=301, Location="/paris")
    fake.page("/paris", ARTICLE)
    reader = DirectReader(SafeFetcher(allow_loopback=True), BestSentences(2))
    page = reader.read(f"{fake.url}/old", "When was the metro opened?")
    assert "1900" in page.text
    assert page.text == "Paris The metro of Paris was opened in the year 1900 for the world fair."
    assert page.url == f"{fake.url}/paris"


def test_what_lies_beyond_the_limit_of_characters_is_not_looked_at(fake):
    fake.page("/x", "a " * 50 + "needle.", "text/plain")
    reader = DirectReader(SafeFetcher(allow_loopback=True), None, max_chars=100)
    assert reader.read(f"{fake.url}/x", "needle").text == ("a " * 50).strip()


# ---------------------------------------------------------------- summaries


def test_best_sentences_share_words_with_the_question_and_keep_their_order():
    text = "The fox is red. The moon is far. Seas are deep. A red moon rose over seas. It is late."
    assert BestSentences(2)(text, "red moon") == "The fox is red. A red moon rose over seas."


def test_without_a_shared_word_the_first_sentences_stand():
    assert BestSentences(2)("One two. Three four. Five six.", "zebra") == "One two. Three four."
    assert BestSentences(2)("Only one.", "") == "Only one."
    assert BestSentences(2)("", "x") == ""


@given(st.text(max_size=400), st.text(max_size=40))
def test_a_summary_consists_of_sentences_of_the_page(text, question):
    summary = BestSentences()(text, question)
    assert len(summary) <= len(text)
    assert set(summary.split()) <= set(text.split()) or "。" in text or "！" in text or "？" in text


def test_a_text_without_full_stops_is_cut_into_pieces():
    pieces = split_sentences("word " * 150)
    assert [len(piece.split()) for piece in pieces] == [MAX_SENTENCE_WORDS, MAX_SENTENCE_WORDS, 30]
    assert split_sentences("一。二！三") == ["一。", "二！", "三"]


def summary_of(fake, monkeypatch=None, key=None):
    if key:
        monkeypatch.setenv(KEY_VARIABLES["summary"], key)
    service = Service(
        "summary", f"{fake.url}/llm/v1", KEY_VARIABLES["summary"], is_key_required=False, retries=0
    )
    return ModelSummary(service, "qwen")


def test_a_model_writes_at_most_five_sentences_and_its_thoughts_stay_out(fake, monkeypatch):
    summary = summary_of(fake, monkeypatch, "sk-summary")("Long page.", "What is it?")
    assert summary == "One. Two. Three. Four. Five."
    (request,) = fake.requests
    assert request.headers["authorization"] == "Bearer sk-summary"
    system, user = request.json["messages"]
    assert (request.json["model"], request.json["temperature"]) == ("qwen", 0)
    assert system == {"role": "system", "content": INSTRUCTION}
    assert "What is it?" in user["content"]
    assert "Long page." in user["content"]


def test_an_endpoint_without_a_key_gets_none(fake):
    summary_of(fake)("Long page.", "What is it?")
    assert "authorization" not in fake.requests[0].headers


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"message": {}}]}, [], b"oops"])
def test_a_malformed_summary_is_infrastructure(body, fake):
    fake.say("/llm/v1/chat/completions", 200, body)
    with pytest.raises(MalformedReplyError) as caught:
        summary_of(fake)("Long page.", "q")
    assert caught.value.fault == "infrastructure"


# ---------------------------------------------------------------- pictures


def png(size=(30, 20), mode="RGB", kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


def claimed_png(width, height):
    """A PNG of a few bytes that claims to be huge."""

    def chunk(name, data):
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "GIF"), ("RGBA", "PNG"), ("L", "BMP"),
     ("RGB", "WEBP")],
)  # fmt: skip
def test_every_allowed_kind_becomes_a_small_rgb_picture(mode, kind):
    content = png((600, 300), mode, kind)
    picture = decode_picture(content, max_side=100)
    assert (picture.mode, picture.size) == ("RGB", (100, 50))


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", png()[:40], claimed_png(60_000, 60_000), claimed_png(7000, 7000),
     claimed_png(100, 100), png(kind="TIFF"), b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
)  # fmt: skip
def test_what_is_no_picture_or_claims_too_much_is_refused(content):
    with pytest.raises(PictureError):
        decode_picture(content)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(content):
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"BM"):
        with contextlib.suppress(PictureError):
            assert decode_picture(head + content).mode == "RGB"


def test_broken_exif_and_sixteen_bits_cost_no_picture():
    assert decode_picture(png(exif=b"Exif\0\0XX*\0")).size == (30, 20)
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 32_768, dtype=np.uint16)).save(buffer, "PNG")
    assert decode_picture(buffer.getvalue()).getpixel((0, 0)) == (128, 128, 128)  # 32768 // 256


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_transparent_picture_is_seen_on_white(mode):
    drawing = Image.new("LA", (2, 1))
    drawing.putpixel((0, 0), (0, 255))  # a black point; the other is black too, under nothing
    drawing = drawing.convert("RGBA")
    buffer = io.BytesIO()
    (drawing.quantize(2) if mode == "P" else drawing.convert(mode)).save(buffer, "PNG")
    assert Image.open(buffer).mode == mode
    picture = decode_picture(buffer.getvalue())
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_pictures_are_fetched_as_safely_as_pages(fake):
    fake.page("/p.png", png(), "image/png")
    fake.page("/page", ARTICLE)
    fetcher = SafeFetcher(allow_loopback=True)
    assert fetch_picture(fetcher, f"{fake.url}/p.png").size == (30, 20)
    with pytest.raises(PageRefusedError):
        fetch_picture(fetcher, f"{fake.url}/page")
    with pytest.raises(PageRefusedError):
        fetch_picture(fetcher, "http://10.0.0.1/p.png")
    assert fetcher.refused == {"type": 1, "address": 1}
