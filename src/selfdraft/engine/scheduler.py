"""Who goes next: pure decisions about slots and shares, no model, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from selfdraft.core.sequence import Sequence
from selfdraft.engine.slots import Held, Slots, Taken
from selfdraft.protocols import Drafter


def admit(
    waiting: deque[Sequence], slots: Slots, owners: Mapping[Sequence, str], running: SequenceOf[Sequence] = ()
) -> list[tuple[Sequence, Taken]]:
    """Give free slots to waiting sequences, first come first served. `owners`: who may reuse what a slot holds.

    A sequence keeps its place in the queue, and lets others pass, while a running one of the same owner reads a
    beginning that both have: several answers to one prompt prefill it once.
    """
    admitted: list[tuple[Sequence, Taken]] = []
    if not (waiting and slots.free):
        return admitted
    held = [held_by(one, owners[one]) for one in running if one in owners]
    coming = [prompt_of(one, owners[one]) for one in running if one in owners and reads(one)]
    later: list[Sequence] = []
    while waiting and slots.free:
        sequence = waiting.popleft()
        owner = owners.get(sequence)
        if slots.gains(sequence.tokens, owner, held, coming):
            later.append(sequence)
            continue
        taken = slots.take(sequence.tokens, owner, held)
        sequence.slot, sequence.num_cached = taken.slot, taken.count
        sequence.stats.num_cached_tokens = taken.count
        admitted.append((sequence, taken))
        if owner is not None and reads(sequence):
            coming.append(prompt_of(sequence, owner))
    waiting.extendleft(reversed(later))
    return admitted


def reads(sequence: Sequence) -> bool:
    """Whether more than one token of a running sequence is still to be prefilled."""
    return len(sequence.tokens) - sequence.num_cached > 1


def prompt_of(sequence: Sequence, owner: str) -> Held:
    """What the slot of a sequence will hold when its prompt has been read."""
    return Held(sequence.tokens[: sequence.prompt_length], sequence.prompt_length, owner, sequence.slot)


def held_by(sequence: Sequence, owner: str) -> Held:
    """What the slot of a sequence holds."""
    return Held(sequence.tokens[: sequence.num_cached], sequence.prompt_length, owner, sequence.slot)


def next_group(running: SequenceOf[Sequence], drafters: Mapping[Sequence, Drafter], last: Drafter) -> list[Sequence]:
    """The sequences of the drafter whose turn is next, `last` being the one that had the last step.

    A step has one drafter: what a pass costs is learned from its own rows alone.
    """
    order = list({id(drafters[sequence]): drafters[sequence] for sequence in running}.values())
    place = next((i for i, drafter in enumerate(order) if drafter is last), -1)
    turn = order[(place + 1) % len(order)]
    return [sequence for sequence in running if drafters[sequence] is turn]


def share(sequence: Sequence, chunk: int) -> int:
    """How many pending tokens go into one pass: chunks end at multiples of `chunk`, whatever else is running.

    So the shape of a prefill depends on the prompt alone, and its bits do too.
    """
    pending = len(sequence.tokens) - sequence.num_cached
    return min(pending, chunk - sequence.num_cached % chunk)


def plan(running: SequenceOf[Sequence], chunk: int, rows: int) -> list[tuple[Sequence, int]]:
    """The sequences of the next step with their shares: all that decode, then prefills while `rows` last.

    The first prefill always goes, however few rows are left: whoever decodes cannot keep a long prompt waiting.
    """
    shares = [(sequence, share(sequence, chunk)) for sequence in running]
    work = [(sequence, size) for sequence, size in shares if size == 1]
    decoding, left = len(work), rows - len(work)
    for sequence, size in shares:
        if size > 1 and (size <= left or len(work) == decoding):
            work.append((sequence, size))
            left -= size
    return work
