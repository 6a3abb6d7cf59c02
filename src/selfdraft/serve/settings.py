"""What the operator decides: limits, keys, names. Nothing here is read from a client."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from selfdraft import remote
from selfdraft.errors import OptionError
from selfdraft.files.api_keys import KEY_VARIABLE, keys_in, keys_of_environment
from selfdraft.types import within

LOOPBACK = (*remote.LOOPBACK, "[::1]")
"""As an address to listen at, and in the Host header of a request."""
TIMES = ("body_timeout", "queue_timeout", "request_timeout", "shutdown_timeout", "stall_timeout", "stream_pace")
"""Settings in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and switches of a server. Errors: OptionError for a value out of range."""

    model_name: str = "smollm2"
    """The name under which clients ask for the model; a path is never read from a client."""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    """API keys; none means that no key is asked for."""
    no_auth: bool = False
    """Bind to other addresses than loopback although there is no key."""
    allowed_hosts: tuple[str, ...] = ()
    """Host headers that are taken besides loopback; ('*',) takes all. Only checked when bound to loopback."""
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 64
    """Requests that wait for a slot; more are refused with 429."""
    max_output_tokens: int = 4096
    """Most tokens of one answer."""
    max_body: int = 2 * 2**20
    """Bytes of a request."""
    body_timeout: float = 60.0
    """Seconds that a client has to send its body."""
    queue_timeout: float = 60.0
    """Seconds that a request may wait for a slot."""
    request_timeout: float = 600.0
    """Seconds that a request may take from its arrival to its end."""
    shutdown_timeout: float = 30.0
    """Seconds that requests have to end after SIGTERM."""
    stall_timeout: float = 120.0
    """A step that takes longer than these seconds makes the server unhealthy."""
    kv_tokens: int | None = None
    """Most tokens, prompt and answer together, of all requests that run; None: as many as the slots hold."""
    drafters: tuple[str, ...] = ()
    """Drafters that a request may ask for besides the server's own and `none`."""
    task_profiles: Mapping[str, Path] = field(default_factory=dict)
    """What was learned on earlier text of one kind, by the name under which a request may ask for it."""
    shared_memory: bool = False
    """Earlier answers of all callers are drafted from. Then the time of an answer tells of other callers' texts."""
    prefix_reuse: bool = True
    """A prompt that begins as an earlier one of the same caller prefills only the rest."""
    stream_pace: float = 0.0
    """Seconds between two events of a stream, each padded to the same sizes; 0 sends each step when it is done."""
    details: bool = False
    """Clients may ask who drafted each token and for statistics of their request."""
    vllm_metrics: bool = False
    """Export the speculative decoding counters under vLLM's names, too."""
    page: bool = True

    def __post_init__(self) -> None:
        within("port", self.port, 0, 65535)
        within("max_queue", self.max_queue, 0, 2**20)
        within("max_output_tokens", self.max_output_tokens, 1, 2**20)
        within("max_body", self.max_body, 1024, 2**30)
        for name in TIMES:
            within(name, getattr(self, name), 0.0, 1e6)
        if self.kv_tokens is not None:
            within("kv_tokens", self.kv_tokens, 1, 2**31)
        if not self.local and not self.keys and not self.no_auth:
            raise OptionError(
                f"--host {self.host} can be reached from other machines, and no API key is set: give --api-key-file or "
                f"the environment variable {KEY_VARIABLE}, or say --no-auth if anybody may use it"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def reuses(self) -> bool:
        """Whether prompts of one caller reuse what earlier ones prefilled: callers must be told apart for that."""
        return self.prefix_reuse and (self.local or bool(self.keys))


@dataclass(frozen=True, slots=True)
class Keys:
    """The API keys, as digests. `salt` makes the names of callers meaningless outside this process."""

    digests: tuple[bytes, ...]
    salt: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def of(cls, keys: tuple[str, ...]) -> Keys:
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    def caller(self, given: str | None) -> str | None:
        """The name of the caller with this key; None for a wrong one. Takes the same time for each wrong key."""
        if not self.digests:
            return "anybody"
        digest = hashlib.sha256((given or "").encode("utf-8", "surrogatepass")).digest()
        found = False
        for known in self.digests:
            found |= hmac.compare_digest(digest, known)
        return hmac.new(self.salt, digest, "sha256").hexdigest()[:16] if found else None


def read_keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys of the options, of a file with one key a line, and of the environment. Errors: OptionError."""
    keys = [key.strip() for key in given or () if key.strip()]
    keys += keys_in(file) if file is not None else []
    found = tuple(dict.fromkeys([*keys, *keys_of_environment()]))
    if short := next((key for key in found if len(key) < 8), None):
        raise OptionError(f"an API key of {len(short)} characters is too easy to guess: take 8 or more")
    return found
