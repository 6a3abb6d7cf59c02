"""Which conversation a request belongs to, and where it goes: all turns to one replica, which has the beginning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

CHARACTERS, TOKENS = 256, 64
"""How much of the beginning of a text completion's prompt tells its conversation."""


def conversation_of(path: str, body: bytes, authorization: str = "") -> str:
    """The name of a conversation: a digest, the same for each of its turns; empty where there is nothing to reuse.

    A cache key that the client gives says it; else the messages up to the first of the user, which every later turn
    repeats, or the beginning of the prompt. `authorization`: callers share nothing, so each
    has conversations of its own.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # whichever replica gets it says what is wrong
    if not isinstance(given, dict):
        return ""
    key = given.get("prompt_cache_key") or given.get("cache_salt")
    if not isinstance(key, str):
        key = _opening(given.get("messages")) if path.endswith("/chat/completions") else _beginning(given.get("prompt"))
    if not key:
        return ""
    told = "\0".join([authorization, path, key]).encode("utf-8", "surrogatepass")
    return hashlib.sha256(told).hexdigest()[:32]


def _opening(messages: object) -> str:
    """The messages up to the first one of the user."""
    if not isinstance(messages, list):
        return ""
    found = []
    for message in messages:
        found.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return json.dumps(found, sort_keys=True)


def _beginning(prompt: object) -> str:
    """The beginning of a prompt, or of the first one of several."""
    if isinstance(prompt, str):
        return prompt[:CHARACTERS]
    if isinstance(prompt, list) and prompt:
        return _beginning(prompt[0]) if isinstance(prompt[0], str | list) else json.dumps(prompt[:TOKENS])
    return ""


def preferred(key: str, loads: Mapping[str, int], slots: int) -> list[list[str]]:
    """The replicas for a conversation, best first. `loads`: requests of each replica; `slots`: how many run at once.

    Each replica draws a number for the conversation, and the highest wins (rendezvous hashing, Thaler and Ravishankar
    1998): when a replica comes or goes, only its own conversations move. One whose slots are all taken comes behind
    those that have a free one, then the one with the fewest requests. Without a key the fewest requests decide.
    """
    if not key:
        return [[*loads]] if loads else []
    drawn = sorted(loads, key=lambda name: hashlib.sha256(f"{key}\0{name}".encode()).digest(), reverse=True)
    busy = [name for name in drawn if loads[name] >= slots]
    return [*([name] for name in drawn if loads[name] < slots), *([busy] if busy else [])]
