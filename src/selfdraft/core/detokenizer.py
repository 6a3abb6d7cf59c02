"""Text out of tokens, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no whole character yet
_WIDEST = 16
"""Most tokens that are decoded at once; an unfinished character is spread over four at most."""


class TextStream:
    """Grows a text token by token so that the pieces add up to the text of all tokens.

    A new token is decoded together with a few tokens before it (some tokenizers drop a leading space or join
    bytes across tokens); text that ends in an unfinished character waits for the next token. The cost of a token
    does not depend on how many came before.
    """

    def __init__(self, decode: Decode) -> None:
        self.size = 0
        """Characters of `text`."""
        self._decode = decode
        self._pieces: list[str] = []
        self._window: list[int] = []  # the tokens that are decoded: some context, then those that wait
        self._context = 0  # how many of the window are context
        self._known = ""  # the part of the window's text that is in `text`
        self._held = ""  # broken characters that no later token can mend, older than the window

    @property
    def text(self) -> str:
        """All of it; costs its length. To follow a growing text use `since`. Changes nothing: a step may be running."""
        return "".join(self._pieces)

    def since(self, start: int) -> str:
        """The text from character `start` on; costs what is returned."""
        left, parts = self.size - max(start, 0), []
        for piece in reversed(self._pieces):
            if left <= 0:
                break
            parts.append(piece[max(len(piece) - left, 0) :])
            left -= len(piece)
        return "".join(reversed(parts))

    def push(self, token: int) -> None:
        """Add one token; `text` grows by every character that is certain."""
        self._window.append(token)
        grown = self._decode(self._window)
        sure = grown.rstrip(_BROKEN)
        if self._known and grown == self._known and self._context == len(self._window) - 1:
            self._window.pop()  # says nothing here; kept, it would push out the context that does
            return
        if sure.startswith(self._known):
            self._grow(sure[len(self._known) :])
            self._known = sure
        elif sure == grown:  # the decoder takes back what it said, as byte fallback does in a run that stays broken
            self._grow(self._decode(self._window[self._context :]))
            self._known = grown
        if sure == grown:
            self._move()
        elif len(self._window) > _WIDEST:
            self._shorten(grown)

    def flush(self) -> None:
        """The end: take what still waits, broken or not."""
        if self._context < len(self._window) or self._held:
            grown = self._decode(self._window)
            whole = grown.startswith(self._known)
            self._grow(grown[len(self._known) :] if whole else self._decode(self._window[self._context :]))
            self._add(self._held)
            self._held, self._known, self._context = "", grown, len(self._window)

    def close(self, ending: str) -> None:
        """The end: take what still waits, then a text that belongs to none of the tokens."""
        self.flush()
        self._add(ending)

    def cut(self, size: int) -> None:
        """Keep the first `size` characters; what waits is dropped, too."""
        while self.size > size:
            piece = self._pieces.pop()
            self.size -= len(piece)
            if self.size < size:
                self._add(piece[: size - self.size])
        self._held, self._context = "", len(self._window)

    def settled(self, stops: Sequence[str]) -> int:
        """How many characters may be shown: all but a tail that could still grow into a stop string."""
        tail = self.since(self.size - max((len(stop) - 1 for stop in stops), default=0)) if stops else ""
        for start in range(len(tail)):
            if any(len(stop) > len(tail) - start and stop.startswith(tail[start:]) for stop in stops):
                return self.size - len(tail) + start
        return self.size

    def _grow(self, piece: str) -> None:
        if piece:
            self._add(self._held + piece)
            self._held = ""

    def _add(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self.size += len(piece)

    def _move(self) -> None:
        """Nothing waits: the newest tokens become the context, if they have a text of their own."""
        fresh = self._decode(self._window[self._context :])
        if fresh:
            self._window, self._known = self._window[self._context :], fresh
        self._context = len(self._window)
        if len(self._window) > _WIDEST:
            self._shorten(self._known)

    def _shorten(self, grown: str) -> None:
        """Forget the older half of the window, whose text is `grown`; what was known is counted from the end."""
        waiting = len(self._window) - self._context
        self._window = self._window[-(_WIDEST // 2) :]
        self._context = max(len(self._window) - waiting, 0)
        rest = self._decode(self._window)
        known = len(self._known) - (len(grown) - len(rest))
        self._held += _BROKEN * max(-known, 0)
        self._known = rest[: max(known, 0)]
