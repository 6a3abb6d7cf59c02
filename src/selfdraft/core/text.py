"""Text out of tokens, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_BROKEN = "�"  # what a tokenizer writes for bytes that are no whole character yet


class TextStream:
    """Grows a text token by token so that the pieces add up to the text of all tokens.

    A new token is decoded together with a few tokens before it (some tokenizers drop a leading space or join
    bytes across tokens); text that ends in an unfinished character waits for the next token.
    """

    def __init__(self, decode: Decode) -> None:
        self.text = ""
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0  # tokens from here on give context
        self._read = 0  # tokens before this are in `text`

    def push(self, token: int) -> None:
        """Add one token; `text` grows by every character that is certain."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._start : self._read])
        grown = self._decode(self._tokens[self._start :])
        if grown.endswith(_BROKEN) or not grown.startswith(known):
            return
        self.text += grown[len(known) :]
        self._start, self._read = self._read, len(self._tokens)

    def flush(self) -> None:
        """The end: take what still waits, broken or not."""
        if self._read < len(self._tokens):
            known = self._decode(self._tokens[self._start : self._read])
            grown = self._decode(self._tokens[self._start :])
            self.text += grown[len(known) :] if grown.startswith(known) else grown
            self._read = len(self._tokens)

    def settled(self, stops: Sequence[str]) -> int:
        """How many characters may be shown: all but a tail that could still grow into a stop string."""
        longest = 0
        for stop in stops:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return len(self.text) - longest
