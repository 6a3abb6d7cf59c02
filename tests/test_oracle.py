"""The oracle: whatever the drafter, the sampling, the batch, the chunk, the type, the path that passes take or the
machine's prices, the text is that of plain decoding.

Plain decoding is written out here: a loop over the stock model's own forward that recomputes everything for every
token, with no engine, no cache, no tree and no attention function of ours.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from selfdraft.core.rows import pack
from selfdraft.core.sampler import choose, process
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import NAMES, build
from selfdraft.drafting.autoregressive import Chaining
from selfdraft.drafting.draft_length import ExitThreshold
from selfdraft.drafting.inner_passes import TOGETHER
from selfdraft.engine.engine import Engine
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.models.proof.shapes import probe_shapes
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter, Target
from selfdraft.types import Budget, SamplingParams, Skip
from tests.clocks import Machine, on_passes
from tests.models import VOCAB, random_adapters, tiny_llama, unavailable

OPTIONS: dict[str, dict[str, object]] = {
    "lookup": {"num_speculative_tokens": 6},
    "merged": {"memory": 300, "masks": True},
    "auto": {"masks": True},
    "auto with bits": {"masks": True, "bits": 4},
    "auto with skip": {"skip_set": Skip(frozenset({1}), frozenset({1}))},
    "auto with s3d": {"s3d": True},
}
"""Options of a drafter under test; a drafter that is not named runs with its defaults."""
CASES = (*NAMES, *(name for name in OPTIONS if name not in NAMES))

MASKS = 7
CANONICAL = Shapes(4, 64)
LENGTH = 26
EOS = frozenset({7})
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
STOCK = "plain float64"
KINDS = (STOCK, "plain float32", "plain bfloat16", "fast float32", "fast bfloat16")
"""Targets under test: the path that their passes take, and the type of their numbers."""


def no_echo(path: SequenceOf[int], logits: Tensor) -> Tensor:
    """Bans a token that depends on every token of the row's own path, and the one said last."""
    banned = logits.clone()
    banned[[sum(path) % VOCAB, path[-1]]] = float("-inf")
    return banned


GREEDY = SamplingParams(max_tokens=LENGTH)
WARM = replace(GREEDY, temperature=1.0)
PENALTIES = SamplingParams(
    max_tokens=LENGTH, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, ignore_eos=True
)
BOUNDS = SamplingParams(
    max_tokens=LENGTH,
    logit_bias={3: 1.5, 11: -2.0, 7: 4.0},
    bad_words_ids=((5,), (9, 12), (3, 3)),
    allowed_token_ids=(*range(1, VOCAB, 2), 12, 14, 16),
    min_tokens=9,
)
SAMPLINGS: dict[str, SamplingParams] = {
    "greedy": GREEDY,
    "temperature": replace(WARM, temperature=0.8),
    "top_k": replace(WARM, top_k=20),
    "top_p": replace(WARM, top_p=0.9),
    "min_p": replace(WARM, min_p=0.05),
    "all": replace(WARM, temperature=0.8, top_k=30, top_p=0.95, min_p=0.02),
    "penalties": PENALTIES,
    "penalties-sampled": replace(PENALTIES, temperature=0.7),
    "bounds": BOUNDS,
    "bounds-sampled": replace(BOUNDS, temperature=0.9),
    "processor": replace(GREEDY, logits_processors=(no_echo,)),
    "processor-sampled": replace(WARM, logits_processors=(no_echo,), top_k=8),
}


@dataclass(frozen=True)
class Way:
    """How a set of requests is run."""

    slots: int = 1
    chunk: int = 256
    rows: int = 1024
    shapes: Shapes = CANONICAL


WAYS = {
    "batch": Way(slots=16),
    "tight": Way(slots=3, shapes=NATURAL),
    "chunk5": Way(slots=16, chunk=5),
    "rows8": Way(slots=4, chunk=64, rows=8, shapes=NATURAL),
}


@cache
def prompts() -> list[list[int]]:
    """16 ragged prompts, half of whose text repeats so that lookup has something to find."""
    draw = random.Random(3)
    lengths = [1, 2, 3, 5, 7, 8, 11, 13, 16, 20, 25, 31, 40, 47, 55, 60]
    motif = [draw.randrange(VOCAB) for _ in range(6)]
    return [(motif * 10)[:n] if n % 2 else [draw.randrange(VOCAB) for _ in range(n)] for n in lengths]


MIXED = [(index, list(SAMPLINGS)[index % len(SAMPLINGS)]) for index in range(16)]
"""One ragged batch: request i has prompt i and its own sampling, so every sampling is in every batch."""


def plain(
    model: PreTrainedModel, prompt: SequenceOf[int], sampling: SamplingParams, seed: int, ends: frozenset[int] = EOS
) -> list[int]:
    """Plain decoding in plain words: the whole text through the stock model again for every token."""
    tokens = list(prompt)
    ends = frozenset() if sampling.ignore_eos else ends
    for written in range(1, sampling.max_tokens + 1):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        scores = process(logits, sampling, tokens, len(prompt), ends)
        if sampling.greedy:
            values = scores.tolist()
            token = values.index(max(values))
        else:
            token = choose(scores, sampling, seed, len(tokens))
        tokens.append(token)
        if token in ends and written >= sampling.min_tokens:
            break
    return tokens[len(prompt) :]


@cache
def expected(index: int, name: str) -> list[int]:
    """The plain text of a request, in float64."""
    return plain(tiny_llama(), prompts()[index], SAMPLINGS[name], 100 + index)


@cache
def narrow_shapes() -> Shapes:
    """Shapes in which the plain path rounds alike in bfloat16 on this machine: near ties would show any other."""
    shapes = probe_shapes(tiny_llama(torch.bfloat16))
    return shapes or pytest.skip("this machine rounds differently in bfloat16 for other numbers of rows")


def target_for(way: Way, kind: str = STOCK, model: PreTrainedModel | None = None) -> HFTarget:
    path, dtype = kind.split()
    model = model or tiny_llama(TYPES[dtype])
    if path == "fast" and unavailable():
        pytest.skip(unavailable())
    shapes = NATURAL if path == "fast" else narrow_shapes() if dtype == "bfloat16" else way.shapes
    adapters = random_adapters(model)
    return on_passes(HFTarget(model, slots=way.slots, shapes=shapes, adapters=adapters, fast=path == "fast"))


def request(target: Target, index: int, name: str) -> Sequence:
    return open_sequence(prompts()[index], SAMPLINGS[name], seed=100 + index, eos=EOS, context=target.max_length)


def decode(target: HFTarget, drafter: Drafter, wanted: SequenceOf[tuple[int, str]], way: Way) -> list[Sequence]:
    engine = Engine(target, drafter, slots=way.slots, chunk=way.chunk, rows=way.rows)
    sequences = [request(target, index, name) for index, name in wanted]
    for _ in engine.generate(sequences):
        pass
    return sequences


@cache
def text_of(kind: str, index: int, name: str) -> list[int]:
    """What a request must say: in float64 what the stock model says, in other types our own plain run, alone."""
    if kind == STOCK:
        return expected(index, name)
    target = target_for(Way(), kind)  # the bits of the stock model are not ours there
    return decode(target, build("none", target), [(index, name)], Way())[0].output


def same_text(sequences: SequenceOf[Sequence], wanted: SequenceOf[tuple[int, str]], kind: str = STOCK) -> None:
    """EQ: token for token."""
    for sequence, (index, name) in zip(sequences, wanted, strict=True):
        assert sequence.output == text_of(kind, index, name), (index, name)
        counted(sequence)


def counted(sequence: Sequence) -> None:
    """What is remembered and counted is what is in the text."""
    assert sequence.num_cached == len(sequence.tokens) - 1
    assert sequence.stats.num_output_tokens == sequence.num_output_tokens == len(sequence.sources)
    assert sum(source != "target" for source in sequence.sources) == sequence.stats.num_accepted_draft_tokens


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", CASES)
def test_alone(name: str, sampling: str, kind: str) -> None:
    target = target_for(Way(), kind)
    wanted = [(4 + list(SAMPLINGS).index(sampling), sampling)]
    same_text(decode(target, build(name.partition(" ")[0], target, OPTIONS.get(name)), wanted, Way()), wanted, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_ways(name: str, way: str, kind: str) -> None:
    target = target_for(WAYS[way], kind)
    same_text(decode(target, build(name.partition(" ")[0], target, OPTIONS.get(name)), MIXED, WAYS[way]), MIXED, kind)


MACHINES = {
    "unmeasured": None,
    "quick": Machine(whole=0.001, row=1e-7),
    "wide": Machine(whole=0.02, row=1e-7),
    "narrow": Machine(whole=0.01, row=0.01),
}
"""Where `auto` drafts otherwise: nothing is known of passes; copies, for trees would take too long; large trees, for
rows are nearly free; hardly anything, for rows are dear."""
ROUNDED = [kind for kind in KINDS if kind.startswith("fast")]
"""Kinds of targets whose rounded copy `auto` takes unasked."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [1, 3, 16])
@pytest.mark.parametrize("machine", MACHINES)
def test_auto_whatever_rows_cost(machine: str, way: int, kind: str) -> None:
    """All requests one after the other, three at a time, and all at once, with everything learned going on."""
    run = Way(slots=way)
    target = target_for(run, kind)
    prices = MACHINES[machine]
    drafter = build("auto", prices.run(target) if prices else target, {"bits": False})
    sequences = decode(target, drafter, MIXED, run)
    same_text(sequences, MIXED, kind)
    drafted = sum(sequence.stats.num_draft_tokens for sequence in sequences)
    copied = all(source in ("copy", "target") for sequence in sequences for source in sequence.sources)
    assert copied == (machine == "quick")
    assert {"wide": drafted > 1500, "narrow": drafted < 300}.get(machine, drafted > 0), drafted


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("way", [1, 3, 16])
@pytest.mark.parametrize("machine", ["wide", "narrow"])
def test_auto_with_a_copy_that_nobody_asked_for(machine: str, way: int, kind: str) -> None:
    run, prices = Way(slots=way), MACHINES[machine]
    assert prices is not None
    target = prices.run(target_for(run, kind))
    sequences = decode(target, build("auto", target), MIXED, run)
    same_text(sequences, MIXED, kind)
    assert any(sequence.stats.num_draft_passes for sequence in sequences) or way > TOGETHER


def test_the_oracle_agrees_with_generate() -> None:
    """The reference itself, where transformers can say the same: greedy without processors."""
    prompt = torch.tensor([prompts()[9]])
    said = tiny_llama().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LENGTH, do_sample=False)
    assert said[0, prompt.shape[1] :].tolist() == plain(tiny_llama(), prompts()[9], GREEDY, 0, frozenset())


# --- drafters that try to break it ------------------------------------------------------------------------------


class Adversary:
    """Drafts what `tree` says; knows the plain text of every request."""

    def __init__(self, target: HFTarget, tree: Callable[[Adversary, Sequence, Budget], Draft]) -> None:
        self.target, self.tree = target, tree

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self.tree(self, s, b) for s, b in zip(sequences, budgets, strict=True)]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        assert len(sequences) == len(results)

    def truth(self, sequence: Sequence) -> list[int]:
        """What plain decoding will say from here on."""
        index = sequence.seed - 100
        name = next(name for name, sampling in SAMPLINGS.items() if sampling is sequence.sampling)
        return expected(index, name)[sequence.num_output_tokens :]


def draw_for(sequence: Sequence) -> random.Random:
    return random.Random(len(sequence.tokens) * 1000 + sequence.seed)


def wrong(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    right = self.truth(sequence)[0]
    return Draft.branches([[(right + k) % VOCAB, (right + k + 1) % VOCAB] for k in range(1, 5)], "wrong")


def random_tree(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    draw, size = draw_for(sequence), 12
    parents = tuple(draw.randrange(-1, node) for node in range(size))
    return Draft(tuple(draw.randrange(VOCAB) for _ in range(size)), parents, ("random",) * size, size)


def hidden(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """A random tree with the truth in it, out of place: accepted rows must be found and moved."""
    draw, tokens, parents, truth = draw_for(sequence), list[int](), list[int](), [ROOT]
    for token in self.truth(sequence)[: draw.randrange(6)]:
        for _ in range(draw.randrange(3)):
            tokens.append((token + draw.randrange(1, VOCAB)) % VOCAB)
            parents.append(draw.choice(truth[-2:]))
        parents.append(truth[-1])
        truth.append(len(tokens))
        tokens.append(token)
    for _ in range(draw.randrange(4)):
        parents.append(draw.choice([truth[-1], len(tokens) - 1]))
        tokens.append(draw.randrange(VOCAB))
    return Draft(tuple(tokens), tuple(parents), ("hidden",) * len(tokens), len(tokens))


def twins(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """Every node twice; the truth goes on below the second twin, where nobody can follow, and below the first."""
    tokens, parents, above = list[int](), list[int](), (ROOT, ROOT)
    for token in self.truth(sequence)[:4]:
        tokens += [token, token]
        parents += above
        above = (len(tokens) - 2, len(tokens) - 1)
    return Draft(tuple(tokens), tuple(parents), ("twins",) * len(tokens), len(tokens))


def no_words(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """Ids that do not exist; those that do hang under them, or beside."""
    right = self.truth(sequence)[0]
    ids = (VOCAB, -1, right, 10**9, -(2**40), VOCAB + 1, right, VOCAB)
    return Draft(ids, (ROOT, ROOT, 0, ROOT, 1, ROOT, ROOT, 6), ("no words",) * len(ids), len(ids))


def too_long(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """The truth, and hundreds of tokens behind the end of the answer and of the context."""
    return Draft.chain(self.truth(sequence) + [1] * 700, "too long")


def knows(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    return Draft.chain(self.truth(sequence)[: min(4, budget.max_depth)], "knows")


def empty(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    return EMPTY


def probes(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """Rows nobody may accept, though they tell the truth."""
    truth = self.truth(sequence)[:3]
    return EMPTY.with_probes([*truth, *truth], [-1, *range(len(truth) - 1), *[-1] * len(truth)], "probes")


def mask_probes(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """Mask ids under the last token and under candidates, a window beside them, and ids past the last mask."""
    chain = hidden(self, sequence, budget)
    masks = [VOCAB, VOCAB + 1, VOCAB + MASKS - 1, VOCAB + MASKS, 5, VOCAB + 2]
    return chain.with_probes(masks, [-1, 0, -2 if len(chain) else -1, 2, -1 - len(chain), 4], "masks")


def scribble(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
    """Its own pass with most sublayers skipped, written behind the remembered tokens and left there."""
    truth = [(token + 1) % VOCAB for token in self.truth(sequence)[:3]]
    rows = pack([(sequence, 1, Draft.chain(truth[: budget.max_depth], "scribble"))])
    self.target.forward(rows, Skip(attention=frozenset({1, 2}), mlp=frozenset({0, 3})))
    return hidden(self, sequence, budget)


TREES = [wrong, random_tree, hidden, twins, no_words, too_long, knows, empty, probes, mask_probes, scribble]


@pytest.mark.parametrize("shapes", [NATURAL, CANONICAL], ids=["natural", "canonical"])
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)
def test_adversaries(tree: Callable[[Adversary, Sequence, Budget], Draft], shapes: Shapes) -> None:
    way = Way(slots=5, shapes=shapes, chunk=16)
    target = target_for(way)
    sequences = decode(target, Adversary(target, tree), MIXED, way)
    same_text(sequences, MIXED)
    accepted = sum(sequence.stats.num_accepted_draft_tokens for sequence in sequences)
    assert (accepted == 0) == (tree in (wrong, empty, probes)) or tree is random_tree


@pytest.mark.parametrize("size", [1, 3, LENGTH])
def test_a_drafter_that_knows_the_text_needs_the_fewest_steps(size: int) -> None:
    way = Way(shapes=NATURAL)
    target = target_for(way)
    sure = Adversary(target, lambda self, s, budget: Draft.chain(self.truth(s)[: min(size, budget.max_depth)], "sure"))
    for wanted in (MIXED[6], MIXED[7], MIXED[10]):
        (sequence,) = decode(target, sure, [wanted], way)
        same_text([sequence], [wanted])
        assert sequence.stats.num_steps == 1 + ceil((sequence.num_output_tokens - 1) / (size + 1))
        assert sequence.stats.draft_acceptance_rate == 1.0


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_chain_of_the_model_itself_is_always_right(name: str) -> None:
    """The short pass is the whole model: what is drafted sees the same path, noise, rules and end as the target."""
    target = target_for(Way(shapes=NATURAL))
    drafter = Chaining(target.forward, "itself", 5, ExitThreshold(0.0, 0.9, adaptive=False), target.clock)
    sequences = decode(target, drafter, [(index, name) for index in (6, 7, 9)], Way(shapes=NATURAL))
    same_text(sequences, [(index, name) for index in (6, 7, 9)])
    for sequence in sequences:
        assert sequence.stats.draft_acceptance_rate == 1.0


@pytest.mark.parametrize("where", ["draft", "observe", "too few"])
def test_a_drafter_that_raises_leaves_the_engine_usable(where: str) -> None:
    """No text is lost or doubled, whether the drafter is exchanged or simply asked again."""
    way = Way(slots=3)
    target = target_for(way)

    class Raises(Adversary):
        calls = 0

        def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
            self.calls += 1
            if where == "draft" and self.calls % 2:
                raise RuntimeError("planted")
            return super().draft(sequences, budgets)[: -1 if where == "too few" and self.calls % 2 else None]

        def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
            if where == "observe":
                raise RuntimeError("planted")

    engine = Engine(target, Raises(target, hidden), slots=way.slots)
    sequences = [request(target, index, name) for index, name in MIXED[:8]]
    for sequence in sequences:
        engine.submit(sequence)
    raised = steps = 0
    while not all(sequence.finished for sequence in sequences):
        try:
            engine.advance()
        except (RuntimeError, ValueError):
            raised += 1
        steps += 1
        if steps == 20:
            engine.drafter = build("lookup", target)
    assert raised > 5
    assert sorted(engine.slots.free) == [0, 1, 2]
    same_text(sequences, MIXED[:8])


# --- what else could show through ------------------------------------------------------------------------------


def test_two_engines_in_one_process() -> None:
    """Interleaved step by step, with other drafters, samplings, shapes: each says its own text."""
    ways = [Way(slots=2), Way(slots=3, shapes=NATURAL, chunk=5)]
    targets = [target_for(way) for way in ways]
    drafters: list[Drafter] = [build("lookup", targets[0]), Adversary(targets[1], hidden)]
    wanted = [MIXED[:6], MIXED[5:12]]
    engines = [Engine(t, d, slots=w.slots, chunk=w.chunk) for t, d, w in zip(targets, drafters, ways, strict=True)]
    sequences = [[request(t, *which) for which in some] for t, some in zip(targets, wanted, strict=True)]
    runs = [engine.generate(some) for engine, some in zip(engines, sequences, strict=True)]
    done = 0
    while done < 2:
        done = sum(next(run, None) is None for run in runs)
    for some, which in zip(sequences, wanted, strict=True):
        same_text(some, which)


def test_seeds() -> None:
    """The same seed twice is the same text; 32 seeds are (nearly) 32 texts, in one batch and in two slots."""

    def texts(slots: int, name: str) -> list[tuple[int, ...]]:
        target = target_for(Way(slots=slots))
        engine = Engine(target, build(name, target), slots=slots)
        sampling = replace(WARM, max_tokens=8)
        made = [
            open_sequence(prompts()[5], sampling, seed=seed, eos=EOS, context=target.max_length)
            for seed in range(-16, 16)
        ]
        for _ in engine.generate(made):
            pass
        return [tuple(sequence.output) for sequence in made]

    first = texts(32, "none")
    assert first == texts(2, "lookup")
    assert len(set(first)) >= 31


@pytest.mark.parametrize("shapes", [NATURAL, CANONICAL], ids=["natural", "canonical"])
def test_logits_and_cache_at_every_position(shapes: Shapes) -> None:
    """What the target said at each committed position, and what it remembers, equal a full recompute."""
    way = Way(slots=4, shapes=shapes, chunk=8)
    target, model = target_for(way), tiny_llama()
    engine = Engine(target, Adversary(target, hidden), slots=4, chunk=8)
    sequences = [request(target, index, name) for index, name in MIXED[3:10]]
    seen = dict.fromkeys(sequences, 0)
    for sequence, result in engine.generate(sequences):
        if result.logits is None:
            continue
        emitted = sequence.num_output_tokens - seen[sequence]
        seen[sequence] = sequence.num_output_tokens
        rows = [0, *(node + 1 for node in result.path)][:emitted]
        with torch.inference_mode():
            whole = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        at = len(sequence.tokens) - 1 - emitted
        torch.testing.assert_close(result.logits[rows], whole[at : at + emitted], rtol=0, atol=1e-11)
        fresh = target_for(Way(shapes=NATURAL))
        known = Sequence(list(sequence.tokens), 1, GREEDY, slot=0)
        fresh.forward(pack([(known, sequence.num_cached, EMPTY)]))
        for layer in range(target.layers):
            ours = target.cache.view(layer, sequence.slot, sequence.num_cached)
            theirs = fresh.cache.view(layer, 0, sequence.num_cached)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert seen == {sequence: sequence.num_output_tokens for sequence in sequences}


@pytest.mark.parametrize("kind", [STOCK, "fast float32"])
def test_the_cache_grows(kind: str) -> None:
    """Places for a handful of tokens at first: every growth happens amid the texts."""
    way = Way(slots=3, shapes=NATURAL, chunk=5)
    target = target_for(way, kind)
    target.cache.places = 4
    same_text(decode(target, Adversary(target, hidden), MIXED[4:10], way), MIXED[4:10], kind)
    assert 2 * 64 > target.cache.places > 32


@pytest.mark.parametrize("shapes", [NATURAL, CANONICAL], ids=["natural", "canonical"])
def test_the_end_at_every_place_of_a_block(shapes: Shapes) -> None:
    """An end id, or the limit, at every offset of an accepted block: nothing behind it is said or counted."""
    way = Way(slots=8, shapes=shapes)
    target = target_for(way)
    sampled = replace(WARM, top_k=30)
    whole = plain(tiny_llama(), prompts()[8], replace(sampled, ignore_eos=True), 4)
    sure = Adversary(
        target,
        lambda self, s, budget: Draft.chain((whole + [0] * 9)[s.num_output_tokens : s.num_output_tokens + 9], "sure"),
    )
    cases = [(replace(sampled, max_tokens=cut), frozenset[int]()) for cut in range(1, 13)]
    cases += [(sampled, frozenset({whole[cut], VOCAB - 1})) for cut in range(12)]
    cases += [(replace(sampled, ignore_eos=True, stop_token_ids=(whole[5],)), frozenset({whole[2]}))]
    sequences = [
        open_sequence(prompts()[8], sampling, seed=4, eos=eos, context=target.max_length) for sampling, eos in cases
    ]
    for _ in Engine(target, sure, slots=8).generate(sequences):
        pass
    cuts = set()
    for sequence, (sampling, eos) in zip(sequences, cases, strict=True):
        ends = frozenset(sampling.stop_token_ids) or eos
        cut = next((i + 1 for i, token in enumerate(whole) if token in ends), sampling.max_tokens)
        cuts.add((cut, bool(ends)))
        assert sequence.output == whole[:cut]
        assert (sequence.finish_reason, sequence.stop_reason) == (
            ("stop", whole[cut - 1]) if ends else ("length", None)
        )
        counted(sequence)
    assert len(cuts) > 20


def test_ties_go_to_the_lowest_id() -> None:
    """A head with every row twice: each choice is an exact tie."""
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        model.lm_head.weight[31:61] = model.lm_head.weight[1:31]
    for shapes in (NATURAL, CANONICAL):
        target = target_for(Way(shapes=shapes), model=model)
        for sampling in (GREEDY, replace(GREEDY, presence_penalty=0.5)):
            sequence = open_sequence(prompts()[7], sampling, seed=0, eos=EOS, context=target.max_length)
            for _ in Engine(target, build("lookup", target)).generate([sequence]):
                pass
            assert sequence.output == plain(model, prompts()[7], sampling, 0)
        assert any(token < 31 for token in sequence.output)


@cache
def tiny_window(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random Mistral whose window of 8 is far shorter than its texts."""
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return MistralForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [(STOCK, NATURAL), (STOCK, CANONICAL), ("fast float32", NATURAL)],
    ids=["natural", "canonical", "fast"],
)
def test_a_sliding_window(kind: str, shapes: Shapes) -> None:
    """Four windows long, with trees whose rows are out of place, and logits to the bit of the type's noise."""
    stock = tiny_window(TYPES[kind.split()[1]])
    target = target_for(Way(slots=2, shapes=shapes), kind, stock)
    whole = [plain(tiny_window(), prompts()[i], GREEDY, 0) for i in (6, 11)]

    def tree(self: Adversary, sequence: Sequence, budget: Budget) -> Draft:
        ahead = whole[sequence.seed][sequence.num_output_tokens :][:5]
        return Draft.branches([[(ahead[0] + 1) % VOCAB, 3, 4], ahead, [*ahead[:2], 9]], "tree")

    sequences = [open_sequence(prompts()[i], GREEDY, seed=n, eos=EOS, context=256) for n, i in enumerate((6, 11))]
    for sequence, result in Engine(target, Adversary(target, tree), slots=2, chunk=6).generate(sequences):
        if result.logits is not None:
            with torch.inference_mode():
                said = stock(input_ids=torch.tensor([sequence.tokens[:-1]]), use_cache=False).logits[0, -1]
            last = ([ROOT, *result.path][: len(result.tokens)])[-1]
            if not sequence.finished:
                torch.testing.assert_close(result.logits[last + 1], said, rtol=0, atol=1e-11 if kind == STOCK else 3e-6)
    assert [sequence.output for sequence in sequences] == whole
