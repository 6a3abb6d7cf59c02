"""The one place where chosen tokens become output: end ids, stop strings, limits, statistics, token by token.

Nothing behind the stop is emitted, remembered or counted.
"""

from __future__ import annotations

from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result


def commit(sequence: Sequence, result: Result) -> int:
    """Append the tokens of `result` up to the stop; returns how many were emitted.

    The sequence then remembers the accepted rows under them; its last token is always pending.
    """
    emitted = 0
    for token in result.tokens:
        _append(sequence, result, emitted, token)
        emitted += 1
        _finish(sequence, token)
        if sequence.finished:
            break
    if sequence.finished and sequence.stream is not None:
        sequence.stream.flush()
    if emitted:
        accepted = min(emitted, len(result.path))
        sequence.stats.count(result.draft.num_candidates, accepted, emitted)
    return emitted


def _append(sequence: Sequence, result: Result, number: int, token: int) -> None:
    sequence.tokens.append(token)
    drafted = number < len(result.path)
    sequence.sources.append(result.draft.sources[result.path[number]] if drafted else "target")
    if result.logprobs:
        sequence.logprobs.append(result.logprobs[number])


def _finish(sequence: Sequence, token: int) -> None:
    """Text and stop rules of the newest token.

    Stops come before limits, so a stop at the very limit is still reported as a stop. A token that ends the output
    has no text, but for a stop string that is this token and wanted in the output.
    """
    may_stop = sequence.num_output_tokens >= sequence.sampling.min_tokens
    if may_stop and token in sequence.stop_ids:
        name = sequence.stop_tokens.get(token)
        sequence.finish_reason, sequence.stop_reason = "stop", token if name is None else name
        if name is not None and sequence.sampling.include_stop_str_in_output and sequence.stream is not None:
            sequence.stream.close(name)
        return
    if sequence.stream is not None:
        old = sequence.stream.size
        sequence.stream.push(token)
        if may_stop and _cut(sequence, old):
            return
    if may_stop and any(stops(sequence.tokens) for stops in sequence.sampling.stopping_criteria):
        sequence.finish_reason = "stop"
    elif sequence.remaining <= 0:
        sequence.finish_reason = "length"


def _cut(sequence: Sequence, old: int) -> bool:
    """Cut the text at the first stop string that ends behind character `old`; of several the earliest start wins.

    Those that ended before were looked at before: they came too early for `min_tokens`.
    """
    stream = sequence.stream
    assert stream is not None
    places = []
    for stop in sequence.sampling.stop:
        start = max(old - len(stop) + 1, 0)
        place = stream.since(start).find(stop)
        if place >= 0:
            places.append((start + place, stop))
    if not places:
        return False
    place, stop = min(places)
    stream.cut(place + len(stop) * sequence.sampling.include_stop_str_in_output)
    sequence.finish_reason, sequence.stop_reason = "stop", stop
    return True
