"""Where an answer ends: at every place of an accepted block it ends as in plain decoding, and nothing comes behind.

A drafter that knows the text drafts past every stop. What must come out is computed here token by token, in the
plainest way, from the text without any stop.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations

import pytest
from torch import Tensor

from selfdraft.core.commit import commit
from selfdraft.core.detokenizer import TextStream
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafters.none import NoDrafter
from selfdraft.engine.engine import Engine
from selfdraft.models.exactness import NATURAL
from selfdraft.models.target import HFTarget
from selfdraft.types import Budget, SamplingParams
from tests.clocks import on_passes
from tests.models import VOCAB, tiny_llama

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
SEED = 4
LENGTH = 24
BLOCKS = range(1, 9)
WARM = SamplingParams(temperature=1.0, max_tokens=LENGTH, logprobs=1)
"""Sampled, because greedy text of a random model repeats itself: here every token says another thing."""
SLOTS = 12

Case = tuple[SamplingParams, frozenset[int]]
"""A request and the model's end-of-sequence ids."""


def piece(token: int) -> str:
    """Three letters out of four, so that pieces overlap in many ways."""
    return "".join("abcd"[token // power % 4] for power in (16, 4, 1))


def decode(tokens: SequenceOf[int]) -> str:
    return "".join(map(piece, tokens))


class Oracle:
    """Drafts the true text, stop or no stop; `decoys` puts wrong branches before it, so that rows have to move."""

    def __init__(self, block: int, *, decoys: bool = False) -> None:
        self.block, self.decoys = block, decoys
        self.texts: dict[Sequence, list[int]] = {}

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self._one(sequence) for sequence in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        assert all(result.tokens for result in results), "these prompts are prefilled in one step"

    def _one(self, sequence: Sequence) -> Draft:
        right = self.texts[sequence][sequence.num_output_tokens :][: self.block]
        wrong = [[(right[0] + 1) % VOCAB, right[0]], [right[0], *[(t + 2) % VOCAB for t in right[1:3]]]]
        return Draft.branches([*wrong, right] if self.decoys and right else [right], "oracle")


@dataclass
class Ending:
    """How an answer must end."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    stop_reason: int | str | None = None


def expected(case: Case, full: SequenceOf[int], room: int = LENGTH) -> Ending:
    """The rules in plain words, over the text `full` that has no stop in it."""
    sampling, eos = case
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos)
    said = Ending()
    for token in full:
        said.tokens.append(token)
        early = len(said.tokens) < sampling.min_tokens
        if token in ends and not early:
            said.finish_reason, said.stop_reason = "stop", token
            return said
        before, said.text = said.text, said.text + piece(token)
        # the ends of `before` were looked at when it was the whole text
        starts = [
            (place, s) for s in sampling.stop for place in range(len(said.text)) if said.text.startswith(s, place)
        ]
        fresh = [(place, s) for place, s in starts if place + len(s) > len(before)]
        if fresh and not early:
            place, stop = min(fresh)
            said.text = said.text[: place + len(stop)] if sampling.include_stop_str_in_output else said.text[:place]
            said.finish_reason, said.stop_reason = "stop", stop
            return said
        if len(said.tokens) == min(sampling.max_tokens, room):
            said.finish_reason = "length"
            return said
    raise AssertionError("the text is too short for this case")


@cache
def target_with(context: int) -> HFTarget:
    return on_passes(HFTarget(tiny_llama(), slots=SLOTS, shapes=NATURAL, context=context))


def play(
    cases: SequenceOf[Case],
    texts: SequenceOf[list[int]],
    oracle: Oracle | None,
    *,
    prompt: SequenceOf[int] = PROMPT,
    context: int = 512,
) -> list[Sequence]:
    """Run the cases side by side; what a client was shown on the way must still be there in the end."""
    target = target_with(context)
    engine = Engine(target, oracle or NoDrafter(target), slots=SLOTS)
    sequences = [
        open_sequence(prompt, sampling, seed=SEED, eos=eos, context=context, stream=TextStream(decode))
        for sampling, eos in cases
    ]
    if oracle is not None:
        oracle.texts = dict(zip(sequences, texts, strict=True))
    shown: dict[Sequence, str] = {}
    for sequence, _ in engine.generate(sequences):
        assert sequence.stream is not None
        if not sequence.finished:
            shown[sequence] = sequence.stream.text[: sequence.stream.settled(sequence.sampling.stop)]
    for sequence, text in shown.items():
        assert sequence.stream is not None
        assert sequence.stream.text.startswith(text), "a character was shown and then cut"
    return sequences


def check(sequence: Sequence, case: Case, said: Ending) -> None:
    assert sequence.stream is not None
    assert sequence.output == said.tokens, case
    assert sequence.stream.text == said.text, case
    assert (sequence.finish_reason, sequence.stop_reason) == (said.finish_reason, said.stop_reason), case
    written, stats = sequence.num_output_tokens, sequence.stats
    assert written == len(sequence.output) == len(sequence.sources) == len(sequence.logprobs)
    assert [entry.token for entry in sequence.logprobs] == sequence.output
    assert stats.num_output_tokens == written
    assert stats.num_accepted_draft_tokens == sequence.sources.count("oracle")
    assert stats.num_accepted_draft_tokens + sequence.sources.count("target") == written
    assert sum(k * steps for k, steps in stats.acceptance_histogram.items()) == stats.num_accepted_draft_tokens
    assert sum(stats.acceptance_histogram.values()) == stats.num_spec_steps <= stats.num_steps
    assert sequence.num_cached == len(sequence.tokens) - 1, "the newest token is pending, nothing is cached behind it"


@cache
def full() -> list[int]:
    """The text when nothing stops it."""
    (sequence,) = play([(WARM, frozenset())], [[]], None)
    assert len(set(sequence.output[:12])) == 12, "every offset must be reachable; choose another seed"
    return sequence.output


@cache
def banned(ends: frozenset[int], count: int) -> list[int]:
    """The text when nothing stops it and `ends` cannot be among the first `count` tokens, said by a processor."""

    def ban(path: SequenceOf[int], scores: Tensor) -> Tensor:
        scores = scores.clone()
        if len(path) - len(PROMPT) < count:
            scores[sorted(ends)] = float("-inf")
        return scores

    (sequence,) = play([(replace(WARM, logits_processors=(ban,)), frozenset())], [[]], None)
    return sequence.output


def same(cases: Iterable[Case], block: int, *, decoys: bool = False, plain: bool = True) -> list[Sequence]:
    """All cases, drafted and plain, end as they must."""
    cases = list(cases)
    drafted = play(cases, [full()] * len(cases), Oracle(block, decoys=decoys))
    for sequence, case in zip(drafted, cases, strict=True):
        check(sequence, case, expected(case, full()))
    for sequence, case in zip(play(cases, [], None) if plain else [], cases, strict=plain):
        check(sequence, case, expected(case, full()))
    return drafted


def stops(*texts: str, **options: object) -> Case:
    return replace(WARM, stop=texts, **options), frozenset()  # type: ignore[arg-type]


# --- ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoys", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_one_eos_id_at_every_offset(block: int, decoys: bool) -> None:
    sequences = same([(WARM, frozenset({token})) for token in full()[:12]], block, decoys=decoys)
    assert [sequence.num_output_tokens for sequence in sequences] == list(range(1, 13))
    assert all(s.stats.num_steps == 1 + -(-(s.num_output_tokens - 1) // (block + 1)) for s in sequences), (
        "drafts were accepted"
    )


@pytest.mark.parametrize("block", [2, 5, 8])
def test_several_eos_ids(block: int) -> None:
    text = full()
    absent = next(token for token in range(VOCAB) if token not in text)
    pairs = [frozenset({a, b, absent}) for a, b in combinations(text[:9], 2)]
    for sequence, ends in zip(same([(WARM, e) for e in pairs], block), pairs, strict=True):
        assert sequence.num_output_tokens == min(text.index(token) for token in ends - {absent}) + 1


@pytest.mark.parametrize("block", [1, 4, 8])
def test_ignored_eos_and_no_eos_at_all(block: int) -> None:
    cases = [(replace(WARM, ignore_eos=True), frozenset({token})) for token in full()[:10]]
    for sequence in same([*cases, (WARM, frozenset())], block):
        assert (sequence.output, sequence.finish_reason) == (full(), "length")


@pytest.mark.parametrize("block", [1, 3, 7])
def test_stop_token_ids_beside_eos(block: int) -> None:
    text = full()
    for ignore in (False, True):
        cases = [(replace(WARM, stop_token_ids=(text[i],), ignore_eos=ignore), frozenset({text[5]})) for i in range(10)]
        for i, sequence in enumerate(same(cases, block)):
            assert sequence.stop_reason == text[i if ignore else min(i, 5)]


# --- strings ----------------------------------------------------------------------------------------------------


@cache
def substrings() -> list[str]:
    """Every string of 1 to 12 characters in the first 10 tokens: in one token, over two to five, ending anywhere."""
    text = decode(full()[:10])
    return sorted({text[start : start + size] for size in range(1, 13) for start in range(len(text) - size + 1)})


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_stop_string(block: int, include: bool) -> None:
    """All of them over the blocks: block b takes every eighth string and, of the long ones, half."""
    chosen = [s for i, s in enumerate(substrings()) if i % 8 == block - 1 or (len(s) >= 4 and i % 2 == include)]
    sequences = same([stops(s, include_stop_str_in_output=include) for s in chosen], block, plain=False)
    for sequence, stop in zip(sequences, chosen, strict=True):
        assert sequence.stream is not None
        assert (stop in sequence.stream.text) == include


def test_every_stop_string_plainly() -> None:
    for sequence, stop in zip(play([stops(s) for s in substrings()], [], None), substrings(), strict=True):
        check(sequence, stops(stop), expected(stops(stop), full()))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("block", [2, 6])
def test_two_stop_strings_in_the_same_token(block: int, include: bool) -> None:
    """The one that starts first wins, whatever the order they were given in."""
    text = decode(full())
    cases = []
    for token in range(1, 9):
        first, second = text[3 * token - 2 : 3 * token + 2], text[3 * token : 3 * token + 3]
        for pair in ((first, second), (second, first), (second[0], second), (second, second[0])):
            cases.append(stops(*pair, include_stop_str_in_output=include))
    same(cases, block)


@pytest.mark.parametrize("block", [1, 4])
def test_the_prompt_is_no_part_of_the_text(block: int) -> None:
    """A stop string in the prompt, or begun in it, does not match."""
    prompt, text = decode(PROMPT), decode(full())
    begun = [prompt[-k:] + text[:m] for k in range(1, 7) for m in range(1, 7)]
    cases = [stops(s) for s in [*begun, prompt, prompt[-3:]]]
    sequences = same(cases, block)
    passed = [s for s, (sampling, _) in zip(sequences, cases, strict=True) if sampling.stop[0] not in text]
    assert len(passed) > 20
    assert all(sequence.finish_reason == "length" for sequence in passed)


# --- limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoys", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_max_tokens_around_the_block(block: int, decoys: bool) -> None:
    cases = [(replace(WARM, max_tokens=most), frozenset[int]()) for most in range(1, block + 3)]
    for most, sequence in enumerate(same(cases, block, decoys=decoys), 1):
        assert sequence.output == full()[:most]
        assert sequence.finish_reason == "length"


@pytest.mark.parametrize("block", [1, 3, 8])
def test_stop_and_limit_in_the_same_token_are_a_stop(block: int) -> None:
    text = full()
    cases: list[Case] = []
    for size in range(1, 11):
        last = replace(WARM, max_tokens=size)
        cases += [(last, frozenset({text[size - 1]})), (replace(last, stop_token_ids=(text[size - 1],)), frozenset())]
        cases.append((replace(last, stop=(decode(text[:size])[-7:],)), frozenset()))
    assert all(sequence.finish_reason == "stop" for sequence in same(cases, block))


@pytest.mark.parametrize("block", [1, 4, 8])
def test_a_stop_behind_the_limit_is_a_length(block: int) -> None:
    text = full()
    cases: list[Case] = [(replace(WARM, max_tokens=size), frozenset({text[size]})) for size in range(1, 11)]
    cases += [stops(decode(text[: size + 1])[-6:-1], max_tokens=size) for size in range(3, 11)]
    assert sum(sequence.finish_reason == "length" for sequence in same(cases, block)) >= 14


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("as_eos", [False, True])
def test_min_tokens_bans_the_ends_before(block: int, as_eos: bool) -> None:
    cases: list[Case] = []
    texts: list[list[int]] = []
    for least in range(9):
        for token in full()[:6:2]:
            ends = frozenset({token})
            options = replace(WARM, min_tokens=least, stop_token_ids=() if as_eos else (token,))
            cases.append((options, ends if as_eos else frozenset()))
            texts.append(banned(ends, least))
    for oracle in (Oracle(block), None):
        for sequence, case, text in zip(play(cases, texts, oracle), cases, texts, strict=True):
            said = expected(case, text)
            check(sequence, case, said)
            assert len(said.tokens) > case[0].min_tokens or said.finish_reason == "length"


@pytest.mark.parametrize("block", [1, 3, 8])
def test_min_tokens_lets_early_stop_strings_pass(block: int) -> None:
    """A string that is complete too early is text like any other: it is not found again afterwards."""
    text = decode(full())
    cases = []
    for least in range(1, 9):
        for start in range(0, 18, 4):
            cases.append(stops(text[start : start + 4], min_tokens=least))
    same(cases, block)
    early = expected(stops(text[2:5], min_tokens=8), full())
    assert len(early.tokens) >= 8
    assert text[2:5] in early.text


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("left", range(1, 10))
def test_context_limit(left: int, block: int) -> None:
    """A prompt that leaves `left` places: exactly so many tokens, and no row behind the last place."""
    context = 40
    prompt = [(7 * i + 3) % VOCAB for i in range(context - left)]
    free = (WARM, frozenset[int]())
    (whole,) = play([free], [[]], None, prompt=prompt)
    text = whole.output
    cases: list[Case] = [free, (WARM, frozenset({text[left - 1]})), (replace(WARM, max_tokens=left), frozenset())]
    for oracle in (Oracle(block), Oracle(block, decoys=True), None):
        for sequence, case in zip(play(cases, [text] * 3, oracle, prompt=prompt, context=context), cases, strict=True):
            check(sequence, case, expected(case, text, left))
            assert len(sequence.tokens) <= context
        assert expected(cases[1], text, left).finish_reason == "stop"


def test_broken_characters_at_the_end_are_text() -> None:
    """At a limit or an end id what waits comes out; behind a stop string it does not."""
    table: dict[int, bytes] = {0: b"a", 1: b"\xf0\x9f", 2: b"stop\xf0", 3: b""}

    def halves(tokens: SequenceOf[int]) -> str:
        return b"".join(table[token] for token in tokens).decode("utf-8", errors="replace")

    def ending(sampling: SamplingParams, tokens: list[int]) -> tuple[str, object]:
        """Commit tokens by hand, as one block."""
        stream = TextStream(halves)
        sequence = open_sequence([0], sampling, seed=0, eos=frozenset(), context=99, stream=stream)
        path = tuple(range(len(tokens) - 1))
        assert commit(sequence, Result(Draft.chain(tokens[:-1], "hand"), path, tuple(tokens))) == len(tokens)
        return stream.text, sequence.finish_reason

    broken = "\N{REPLACEMENT CHARACTER}"
    assert ending(SamplingParams(max_tokens=2), [0, 1]) == ("a" + broken, "length")
    assert ending(SamplingParams(stop_token_ids=(3,)), [0, 1, 3]) == ("a" + broken, "stop")
    assert ending(SamplingParams(stop=("stop",)), [0, 2]) == ("a", "stop")
    assert ending(SamplingParams(stop=("stop",), include_stop_str_in_output=True), [0, 2]) == ("astop", "stop")


def test_an_end_id_before_min_tokens_is_a_token_like_any_other() -> None:
    """A processor may force one: then it has its text and ends nothing."""
    sampling = SamplingParams(min_tokens=2, stop_token_ids=(3,))
    stream = TextStream(decode)
    sequence = open_sequence([0], sampling, seed=0, eos=frozenset(), context=99, stream=stream)
    assert commit(sequence, Result(Draft.chain([3, 5, 3], "hand"), (0, 1, 2), (3, 5, 3, 5))) == 3
    assert (sequence.output, sequence.stop_reason, stream.text) == ([3, 5, 3], 3, decode([3, 5]))
