"""Pages read by r.jina.ai instead of this machine."""

from __future__ import annotations

from typing import Any

from environments.fetch import PageRefusedError, check_url
from environments.pages import PAGE_CHARS, Summarise, summarised, summary_identity
from environments.providers import other_url
from environments.results import Page
from environments.services import MalformedReplyError, RequestRefusedError, Service


class JinaReader:
    """Reads pages by r.jina.ai: `POST /` with the URL, text back.

    The fetching is done by Jina, from Jina's network; local names and addresses are refused here
    all the same, so that none of them is told to a stranger.

    Args:
        service: where to ask; the key is optional, and without one the rate is low.
        summarise: picks what the question asks for; None = the text as it is.
        max_chars: of the page's text that are looked at.
    """

    name = "jina"

    def __init__(
        self, service: Service, summarise: Summarise | None = None, max_chars: int = PAGE_CHARS
    ) -> None:
        self.service, self.summarise, self.max_chars = service, summarise, max_chars

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache tells readers apart by."""
        return {
            "reader": self.name,
            **other_url(self.name, self.service),
            **summary_identity(self.summarise, self.max_chars),
        }

    def read(self, url: str, question: str) -> Page:
        """A page, cut down to what the question needs.

        Raises:
            PageRefusedError: the model's fault; it may read the message.
            WebError: Jina failed.
        """
        url, key = check_url(url), self.service.key()
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "X-Return-Format": "text",
        }
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            reply = self.service.ask("POST", "/", headers=headers, json_body={"url": url})
        except RequestRefusedError as error:
            # 400 and 422: Jina has no complaint about us but found no page there
            raise PageRefusedError("The page cannot be read.", "status") from error
        data = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("content", data.get("text")), str):
            raise MalformedReplyError(f"{self.name}: the reply lacks data.content")
        if "returned error 404" in str(data.get("warning") or ""):
            raise PageRefusedError("The page cannot be read (HTTP 404).", "status")
        text = str(data.get("content", data.get("text")))
        page = Page(str(data.get("title") or ""), text, str(data.get("url") or url))
        return summarised(page, question, self.summarise, self.max_chars)
