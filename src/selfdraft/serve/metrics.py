"""Prometheus counters of a server, under our own prefix and, when asked for, under vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
POSITIONS = 16
"""Draft positions that are counted apart; deeper ones are counted together with the last."""


class Metrics:
    """The counters, in a registry of their own."""

    def __init__(self, *, vllm: bool = False) -> None:
        self.registry = registry = CollectorRegistry()
        self._prefixes = ["selfdraft", *(["vllm"] if vllm else [])]

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"selfdraft_{name}", words, labels, registry=registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"selfdraft_{name}", words, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests that have ended, by how", ("outcome",))
        self.cancelled = counter("requests_cancelled", "Requests whose client has gone")
        self.responses = counter("http_responses", "HTTP responses by route and status", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that have ended")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated")
        self.steps = counter("steps", "Forward passes of the target")
        self.running = Gauge("selfdraft_requests_running", "Answers being generated", registry=registry)
        self.waiting = Gauge("selfdraft_requests_waiting", "Requests without a slot", registry=registry)
        self.queue_seconds = histogram("queue_seconds", "Seconds from arrival to a slot", SECONDS)
        self.first_token_seconds = histogram("time_to_first_token_seconds", "Seconds to the first token", SECONDS)
        self.token_seconds = histogram("time_per_output_token_seconds", "Seconds per further token", TOKEN_SECONDS)
        self.request_seconds = histogram("request_seconds", "Seconds from arrival to the end", SECONDS)
        self._drafting = [_Drafting(prefix, registry) for prefix in self._prefixes]

    def saw_answer(self, result: Result | None, emitted: int) -> None:
        """One answer got `emitted` tokens. `result`: what the step said of it; None where it failed for another one."""
        self.generation_tokens.inc(emitted)
        if result is not None and (drafted := result.draft.num_candidates):
            for one in self._drafting:
                one.saw(drafted, min(len(result.path), emitted))

    def saw_end(
        self,
        arrived: float,
        first: float | None,
        now: float,
        sequences: SequenceOf[Sequence],
        error: Exception | None,
    ) -> None:
        """A request has ended."""
        reasons = {sequence.finish_reason for sequence in sequences}
        outcome = type(error).__name__ if error is not None else "abort" if "abort" in reasons else "ok"
        self.requests.labels(outcome).inc()
        self.request_seconds.observe(now - arrived)
        self.prompt_tokens.inc(sequences[0].prompt_length)
        tokens = max(sequence.num_output_tokens for sequence in sequences)
        if first is not None and tokens > 1:
            self.token_seconds.observe((now - first) / (tokens - 1))

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)


class _Drafting:
    """The counters of speculative decoding, with the names that vLLM gave them, under one prefix."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        separator = ":" if prefix == "vllm" else "_"

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{prefix}{separator}spec_decode_{name}", words, labels, registry=registry)

        self.drafts = counter("num_drafts", "Drafts that were verified")
        self.draft_tokens = counter("num_draft_tokens", "Draft tokens that were verified")
        self.accepted = counter("num_accepted_tokens", "Draft tokens that were accepted")
        self.by_position = counter("num_accepted_tokens_per_pos", "Accepted draft tokens by position", ("position",))
        self._positions = [self.by_position.labels(str(place)) for place in range(POSITIONS)]

    def saw(self, drafted: int, accepted: int) -> None:
        self.drafts.inc()
        self.draft_tokens.inc(drafted)
        self.accepted.inc(accepted)
        for place in range(accepted):
            self._positions[min(place, POSITIONS - 1)].inc()
