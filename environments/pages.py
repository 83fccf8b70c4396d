"""Reads a page of the open web for a policy: fetch it safely, keep its text, answer the question.

    reader = DirectReader(SafeFetcher(), BestSentences())
    page = reader.read("https://example.org/paris", "capital of France")

trafilatura (Apache-2.0) finds the main text; it is part of the extra `live`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from environments.fetch import Fetched, SafeFetcher
from environments.results import Page

Summarise = Callable[[str, str], str]
"""(page text, question) -> what the policy gets to read."""

PAGE_CHARS = 30_000
"""So much of a page's text is summarised, as in MMSearch-R1's recipe."""


CHARSETS = frozenset({
    "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "ascii", "cp866", "cp874", "tis-620",
    "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "gbk", "gb2312", "gb18030", "big5",
    "big5hkscs", "euc_jp", "iso2022_jp", "shift_jis", "cp932", "euc_kr", "cp949",
    *(f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))),
    *(f"cp{page}" for page in range(1250, 1259)),
})  # fmt: skip
"""Those of the web (WHATWG's Encoding Standard), by the names of Python's codecs. Others, such as
punycode, which takes the square of a page's length, are no page's own."""


class DirectReader:
    """Reads pages from this machine.

    Args:
        fetcher: fetches.
        summarise: picks what the question asks for; None = the text as it is.
        max_chars: of the page's text that are looked at.
    """

    def __init__(
        self,
        fetcher: SafeFetcher,
        summarise: Summarise | None = None,
        max_chars: int = PAGE_CHARS,
    ) -> None:
        self.fetcher, self.summarise, self.max_chars = fetcher, summarise, max_chars

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells readers apart by."""
        return {
            "reader": "direct",
            "max_bytes": self.fetcher.max_bytes,
            **summary_identity(self.summarise, self.max_chars),
        }

    def read(self, url: str, question: str) -> Page:
        """A page, cut down to what the question needs.

        Raises:
            PageRefusedError: the model's fault; it may read the message.
            WebError: the page's server failed.
        """
        page = extract_page(self.fetcher.fetch(url))
        return summarised(page, question, self.summarise, self.max_chars)


def extract_page(fetched: Fetched) -> Page:
    """Title and main text, without navigation, scripts and comments; "" if nothing is left."""
    import trafilatura

    if fetched.content_type == "text/plain":
        title = unquote(urlsplit(fetched.url).path.rpartition("/")[2])
        return Page(title, decode_text(fetched), fetched.url)
    # with a charset the bytes are ours to decode; without one the page's own head may name it
    html: str | bytes = decode_text(fetched) if fetched.charset else fetched.body
    found: Any = trafilatura.bare_extraction(html, with_metadata=True, include_comments=False)
    if found is None:
        return Page("", "", fetched.url)
    return Page(str(found.title or ""), str(found.text or ""), fetched.url)


def decode_text(fetched: Fetched) -> str:
    """The body as text; what does not fit its charset becomes U+FFFD. A charset that the web does
    not have (CHARSETS) is read as UTF-8."""
    try:
        name = codecs.lookup(fetched.charset or "utf-8").name
    except (LookupError, ValueError):  # none of that name; no name at all
        name = "utf-8"
    return fetched.body.decode(name if name in CHARSETS else "utf-8", errors="replace")


def summarised(page: Page, question: str, summarise: Summarise | None, max_chars: int) -> Page:
    """The page with its text cut and summarised."""
    text = page.text[:max_chars].strip()
    if summarise is not None and text:
        text = summarise(text, question)
    return Page(page.title, text, page.url)


def summary_identity(summarise: Summarise | None, max_chars: int) -> dict[str, Any]:
    """What a summary adds to the identity of a page reader."""
    return {"summary": getattr(summarise, "identity", None), "max_chars": max_chars}


def check_reading() -> None:
    """Raises ImportError where the library that extracts text is missing."""
    import trafilatura  # noqa: F401
