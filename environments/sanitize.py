"""Retrieved text as data: it can hold no tag, no special token and no picture.

Everything that a tool, a web page or a question brings into a prompt passes `sanitize`. Only the
frame around it, which a dialect writes, holds tags and special tokens. Cost: linear in the text;
whoever needs a few hundred characters of ten million cuts first (`one_line`, `with_marks`).
"""

import unicodedata
from collections.abc import Iterable

IMAGE_MARK = "\ufffc"
"""Stands for one returned image in an observation; the policy expands it to its image tokens."""

MAX_OBSERVATION_CHARS = 8000
"""Hard cap on one observation's text, whatever a tool returns."""

_REPLACED = {
    "\r\n": "\n",
    **dict.fromkeys("\r\u2028\u2029", "\n"),
    # normal forms, which some tokenizers apply, turn the wide and small forms into real brackets,
    # and take the struck-through signs apart
    **dict.fromkeys("<＜﹤≮", "‹"),
    **dict.fromkeys(">＞﹥≯", "›"),
    IMAGE_MARK: "",
}
_JOINERS = "\u200c\u200d"  # part of Persian and Indic spelling and of emoji


def sanitize(text: str) -> str:
    """Makes retrieved text harmless: data that can hold no tag and no special token.

    Every `<` becomes `‹` and `>` becomes `›` (so do their wide forms), IMAGE_MARK, control, format
    (bidi, zero width, tags) and surrogate characters are removed; newline and tab stay. Total and
    idempotent; text without such characters comes back unchanged.
    """
    for bad, good in _REPLACED.items():  # several times as fast as one table
        text = text.replace(bad, good)
    if text.isprintable():  # the common case, much faster
        return text
    # which characters there are is soon known, and few of them are bad
    return text.translate({ord(ch): None for ch in set(text) if not _is_harmless(ch)})


def _is_harmless(ch: str) -> bool:
    return ch in "\n\t" + _JOINERS or unicodedata.category(ch) not in ("Cc", "Cf", "Cs")


def one_line(text: str, limit: int = MAX_OBSERVATION_CHARS) -> str:
    """Sanitised text on one line, cut at `limit` characters."""
    # cut first: a passage of many megabytes must not cost seconds
    return " ".join(sanitize(text[: 4 * limit]).split())[:limit].rstrip()


def with_marks(text: str, n_images: int, limit: int = MAX_OBSERVATION_CHARS) -> str:
    """Sanitised text of at most `limit` characters with exactly `n_images` marks.

    The policy expands each mark to image tokens, and their number must equal the number of images:
    superfluous marks are dropped, missing ones added at the end.
    """
    parts: list[str] = []
    room, n_marks = limit, 0
    for i, piece in enumerate(text[: 4 * limit].split(IMAGE_MARK)):
        if 0 < i <= n_images:
            parts.append(IMAGE_MARK)
            n_marks += 1
        clean = sanitize(piece)[:room]
        room -= len(clean)
        parts.append(clean)
    return "".join(parts).strip() + f" {IMAGE_MARK}" * (n_images - n_marks)


def encodable(text: str) -> str:
    """The text with lone surrogates replaced: JSON can spell them, no file and no request can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def forgeable(special_tokens: Iterable[str]) -> list[str]:
    """Special tokens that sanitised text could still spell; a policy's tokenizer must have none.

    Those of the Qwen family all stand in angle brackets; `[INST]` for one would pass.
    """
    return [token for token in special_tokens if token.strip() and sanitize(token) == token]
