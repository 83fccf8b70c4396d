"""The text of each token of a turn, so that the texts join to what the turn says.

A byte-level tokenizer (GPT-2's, Qwen's) cuts emoji and rarer scripts within a character, and such a
piece has no text by itself. The character goes to the token that completes it; those before it get
an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """Cuts turns into the texts of their tokens, special tokens included.

    Args:
        tokenizer: of the policy.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """One text a token; together they are the decoded sequence, whatever the tokenizer."""
        whole = self._decode(token_ids)
        texts: list[str] = []
        for is_whole, run in groupby(token_ids, lambda token: BROKEN not in self._text(token)):
            ids = list(run)
            texts += [self._text(i) for i in ids] if is_whole else cut(ids, self._decode)
        # a token's text depends on its place where words, and not tokens, bring their spaces
        return texts if "".join(texts) == whole else cut(list(token_ids), self._decode)

    def _text(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def _decode(self, token_ids: Sequence[int]) -> str:
        # turns end with whichever special token was sampled, and that is worth seeing
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def cut(token_ids: list[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Cuts a decoded sequence where the text of its beginnings stops agreeing with the whole.

    Decodes every beginning, so the time grows with the square of the length.
    """
    whole, texts, begin = decode(token_ids), [], 0
    for n in range(1, len(token_ids) + 1):
        end = len(whole)
        if n < len(token_ids):
            end = max(begin, n_equal(decode(token_ids[:n]), whole))
        texts.append(whole[begin:end])
        begin = end
    return texts


def n_equal(one: str, other: str) -> int:
    """Characters at the beginning of both texts that are equal."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
