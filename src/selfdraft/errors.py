"""The tree of errors. Everything below `SelfdraftError` is for the user and says what to do.

SelfdraftError
├── LoadError             the checkpoint cannot be used
│   ├── UnsupportedModel  its architecture cannot be decoded exactly here
│   └── MissingMasks      a method needs mask tokens that the checkpoint does not have
├── RequestError          one request is wrong; nothing else is touched
│   └── PromptTooLong     the prompt does not fit into the context
├── OptionError           an option is unknown, out of range, or belongs to another method
├── PeerError             another engine, run for comparison, failed or cannot take this checkpoint
├── ServerError           a server that is asked over HTTP cannot be reached, refuses, or breaks off its answer
├── RankError             processes that decode together cannot meet, differ, or one of them has ended
├── RunnerUnavailable     the fast runner cannot be used here for this model; the plain one can
└── EngineError           a fault inside a step (NaN logits, no room); the engine stays usable
"""

from __future__ import annotations

WIDEST = 80
"""Most characters of a value that are shown in an error."""


def shown(value: object) -> str:
    """A value as it is written in an error: its repr, cut where it is long, and its type when it has none."""
    try:
        words = repr(value)
    except Exception:  # a number of thousands of digits, or a class of the user's
        return f"<{type(value).__name__}>"
    return words if len(words) <= WIDEST else f"{words[:WIDEST]}..."


class SelfdraftError(Exception):
    """Base of all errors meant for the user."""


class LoadError(SelfdraftError):
    """The checkpoint cannot be used."""


class UnsupportedModel(LoadError):
    """The architecture cannot be decoded exactly here."""


class MissingMasks(LoadError):
    """A drafter needs mask tokens that the target does not have."""


class RequestError(SelfdraftError, ValueError):
    """One request is wrong."""


class PromptTooLong(RequestError):
    """The prompt does not fit into the context."""


class OptionError(SelfdraftError, ValueError):
    """An option is unknown, out of range, or belongs to another method."""


class PeerError(SelfdraftError):
    """Another engine, run for comparison, failed or cannot take this checkpoint."""


class ServerError(SelfdraftError):
    """A server that is asked over HTTP cannot be reached, refuses, or breaks off its answer.

    `status` is that of HTTP, None where there was none; `wait` the seconds that it asks for before another try. `gone`:
    it takes no connection. `code` is its own word for the error.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        wait: float | None = None,
        gone: bool = False,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.wait, self.gone, self.code = status, wait, gone, code


class RankError(SelfdraftError):
    """Processes that decode together cannot meet, differ in model or options, or one of them has ended."""


class RunnerUnavailable(SelfdraftError):
    """The fast runner cannot be used on this machine or for this model."""


class EngineError(SelfdraftError, RuntimeError):
    """A fault inside a step; the engine itself stays usable. `request` is the sequence it belongs to, if one alone."""

    def __init__(self, message: str, request: object = None) -> None:
        super().__init__(message)
        self.request = request
        self.outputs: tuple[object, ...] = ()
        """What `LLM.generate` has for all prompts of the call: answers, and errors in their places."""
