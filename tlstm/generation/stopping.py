"""Stop strings: does the newest token of a text complete one of them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What is asked of a tokenizer here."""

    def decode(self, ids: list[int], /) -> str: ...


class StopStrings:
    """Finds stop strings in the decoded text, also where they straddle tokens or begin in the prompt.

    A text ends with the token that completes a stop string: one that lies wholly in the prompt does not count. Only the
    last few tokens are decoded, enough to hold the longest stop string even where a token is a single byte of a
    character, so the cost of a step does not grow with the text.

    Args:
        texts: the stop strings.
        tokenizer: anything with `decode(list of ids) -> str`.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Decoder) -> None:
        if not callable(getattr(tokenizer, "decode", None)):
            raise ValueError(
                f"stop_strings: expected a tokenizer with decode(ids), got {type(tokenizer).__name__}; pass "
                "generate(..., tokenizer=tokenizer)"
            )
        self.texts = list(texts)
        self._decode = tokenizer.decode
        self.window = 4 * max(map(len, self.texts)) + 8  # tokens: at most 4 bytes a character, and some to spare

    def completed_by_last(
        self,
        ids: list[int],  # the newest `window` tokens of a text, or all of a shorter one
    ) -> bool:
        """True where the last of `ids` completes a stop string."""
        text = self._decode(ids)
        # What the last token adds begins where the two decodings part: an incomplete character may be rewritten.
        before = self._decode(ids[:-1])
        settled = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
        return any(text.find(stop, max(0, settled - len(stop) + 1)) >= 0 for stop in self.texts)
