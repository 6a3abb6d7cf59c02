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
        _check_stop(sequence, token)
        if sequence.finished:
            break
    if sequence.finished and sequence.stream is not None and not isinstance(sequence.stop_reason, str):
        sequence.stream.flush()
    if emitted:
        accepted = min(emitted, len(result.path))
        sequence.stats.count(result.draft.candidates, accepted, emitted)
    return emitted


def _append(sequence: Sequence, result: Result, number: int, token: int) -> None:
    sequence.tokens.append(token)
    drafted = number < len(result.path)
    sequence.sources.append(result.draft.sources[result.path[number]] if drafted else "target")
    if result.logprobs:
        sequence.logprobs.append(result.logprobs[number])
    if sequence.stream is not None and token not in sequence.ends:
        sequence.stream.push(token)


def _check_stop(sequence: Sequence, token: int) -> None:
    """Stops come before limits, so a stop at the very limit is still reported as a stop."""
    if sequence.written >= sequence.sampling.min_tokens:
        if token in sequence.ends:
            sequence.finish_reason, sequence.stop_reason = "stop", token
            return
        if _stop_string(sequence):
            return
    if sequence.room <= 0:
        sequence.finish_reason = "length"


def _stop_string(sequence: Sequence) -> bool:
    """Cut the text at the first stop string it holds; of several that end in one token the earliest start wins."""
    stream = sequence.stream
    if stream is None or not sequence.sampling.stop:
        return False
    places = [(stream.text.find(stop), stop) for stop in sequence.sampling.stop if stop in stream.text]
    if not places:
        return False
    place, stop = min(places)
    stream.text = stream.text[: place + len(stop) * sequence.sampling.include_stop_str_in_output]
    sequence.finish_reason, sequence.stop_reason = "stop", stop
    return True
