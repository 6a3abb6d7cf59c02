"""Decode several tokens per forward pass with no second model; the text is exactly what it would have been."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from selfdraft.errors import SelfdraftError
from selfdraft.types import SamplingParams, Skip, Stats

if TYPE_CHECKING:
    from selfdraft.async_llm import AsyncLLM
    from selfdraft.drafters import build as load_drafter
    from selfdraft.hf import generate
    from selfdraft.llm import LLM, CompletionOutput, Piece, RequestOutput

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Piece",
    "RequestOutput",
    "SamplingParams",
    "SelfdraftError",
    "Skip",
    "Stats",
    "generate",
    "load_drafter",
]

_LATE = {
    "LLM": ("selfdraft.llm", "LLM"),
    "AsyncLLM": ("selfdraft.async_llm", "AsyncLLM"),
    "CompletionOutput": ("selfdraft.llm", "CompletionOutput"),
    "Piece": ("selfdraft.llm", "Piece"),
    "RequestOutput": ("selfdraft.llm", "RequestOutput"),
    "generate": ("selfdraft.hf", "generate"),
    "load_drafter": ("selfdraft.drafters", "build"),
}


def __getattr__(name: str) -> object:
    """Names that need transformers are imported on first use, so that `selfdraft --help` answers at once."""
    if name not in _LATE:
        raise AttributeError(f"module 'selfdraft' has no attribute {name!r}")
    module, attribute = _LATE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """The public names, those that are not imported yet among them."""
    return sorted(__all__)
