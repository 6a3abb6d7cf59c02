"""The evaluation: every item through plain decoding and all drafters, one row for each, scores from the plain text."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field

from selfdraft.bench.measure import Gauge, Measured, Request, measure, take
from selfdraft.bench.peers import Peer
from selfdraft.bench.rows import Ledger, Row
from selfdraft.bench.tasks import Item
from selfdraft.core.sequence import Sequence
from selfdraft.drafters import copy_bits, masks_used
from selfdraft.engine.engine import Engine
from selfdraft.errors import PeerError, PromptTooLong
from selfdraft.models.machine_state import flip
from selfdraft.protocols import Drafter
from selfdraft.prove.record import first_difference

PLAIN = "none"
SAMPLES_APART = 2**20
"""Sample j of prompt i uses seed + i + j * SAMPLES_APART."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A drafter or peer with its options, under the name it has in the results."""

    label: str
    method: str
    options: Mapping[str, object] = field(default_factory=dict)
    edition: str | None = None
    """Of a peer: the package and its version."""
    own_plain: str | None = None
    """Of a peer that speculates: the label of the same engine without that, where it runs, too."""
    file: Mapping[str, object] | None = None
    """Of a peer over a file of its own: its name, size and date. Its texts are not compared with ours."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory that does not depend on the request, in bytes."""

    weights: int
    cache: Callable[[], int]
    """Keys and values as they are now: one cache for all drafters, made for the longest request so far."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Adapter and mask embeddings by the method that they were trained for."""
    copies: Callable[[], Mapping[int, int]] = dict
    """Rounded copies of the model as they are now, by the bits of a weight."""

    def beside(self, drafter: Drafter) -> dict[str, int]:
        """What a drafter needs beside the model."""
        copy = copy_bits(drafter)
        adapter = sum(self.adapters.get(method, 0) for method in masks_used(drafter))
        return {"adapter": adapter, "copy": self.copies().get(copy, 0) if copy is not None else 0}


@dataclass(slots=True)
class Bench:
    """How to run: everything but the items.

    `engines()` makes fresh engines over one target by label, plain decoding first; `open(history, stop, seed)` a
    request from what user and model said in turn. `conditions` are everything else that can change a result.
    """

    engines: Callable[[SequenceOf[Contender]], dict[str, Engine]]
    open: Callable[[SequenceOf[str], tuple[str, ...], int], Sequence]
    contenders: SequenceOf[Contender]
    """Plain decoding first, peers last."""
    conditions: Mapping[str, object]
    footprint: Footprint
    gauge: Gauge
    settle: Callable[[], None]
    runs: int = 3
    seed: int = 0
    samples: int = 1
    all_turns: bool = False
    greedy: bool = True
    """Whether another engine's text can be compared with ours: sampled ones come of other random numbers."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    """Other engines by label, loaded."""
    lost: dict[str, PeerError] = field(default_factory=dict)
    """Peers that failed on the way, and how; the run goes on without them."""
    distance: Callable[[], str | None] = lambda: None
    """How far the cores are apart now, in a word; None where that is not known."""
    log: Callable[[Sequence, SequenceOf[int]], None] | None = None
    """Told every request that was measured, with the tokens of its plain answer."""
    skipped: list[str] = field(default_factory=list)
    """What was left out, and why."""
    measured: int = 0
    """Rows of this run; the others were there before."""

    def skip(self, what: str) -> None:
        """Note once what is left out, and why."""
        if what not in self.skipped:
            self.skipped.append(what)


def run(bench: Bench, name: str, items: SequenceOf[Item], ledger: Ledger) -> Iterator[list[Row]]:
    """The rows of a task, item by item: those that the ledger has are taken from it, the others measured and booked.

    Prompt i (of its group) is sampled with seed + i. An item that does not fit into the context is skipped.
    """
    engines = bench.engines([contender for contender in bench.contenders if contender.edition is None])
    warm = False
    for item, seed in seeded(items, bench.seed):
        rows: list[Row] = []
        for question in turns(bench, name, item, seed, ledger):
            here = [c for c in bench.contenders if c.label not in bench.lost]
            missing = [c for c in here if question.known(c, ledger) is None]
            if missing and not warm:
                _warm_up(engines, question.request())
                warm = True
            for row in question.ask(engines, missing):
                ledger.append(row)
                bench.measured += 1
            found = [question.known(contender, ledger) for contender in bench.contenders]
            rows += [row for row in found if row is not None]
        yield rows


def seeded(items: SequenceOf[Item], seed: int) -> Iterator[tuple[Item, int]]:
    """Every item with its seed: the first of each group has `seed`, the next one more."""
    counts: dict[str, int] = {}
    for item in items:
        yield item, seed + counts.get(item.group, 0)
        counts[item.group] = counts.get(item.group, 0) + 1


def turns(bench: Bench, name: str, item: Item, seed: int, ledger: Ledger) -> Iterator[Question]:
    """The questions of an item, each behind the plain answers to those before it, up to one that does not fit.

    The plain answer to a question must be in the ledger when the next one is asked for.
    """
    history: list[str] = []
    for turn, said in enumerate(item.turns[: None if bench.all_turns else 1], 1):
        history.append(said)
        question = Question(bench, name.partition("/")[0] if item.group else name, item, turn, [*history], seed)
        try:
            question.request()()
        except PromptTooLong as error:
            bench.skip(f"{name}, {question.key}: {error}")
            return
        yield question
        history.append(question.plain_text(ledger))


def _warm_up(engines: Mapping[str, Engine], request: Request) -> None:
    """One unmeasured run each: first calls pay for what later ones reuse."""
    for engine in engines.values():
        for _ in engine.generate([request()]):
            pass


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of one item, and its rows."""

    bench: Bench
    task: str
    item: Item
    turn: int
    history: SequenceOf[str]
    seed: int

    @property
    def key(self) -> str:
        return self.item.key if self.turn == 1 else f"{self.item.key}#{self.turn}"

    def request(self, sample: int = 0) -> Request:
        seed = self.seed + sample * SAMPLES_APART
        return lambda: self.bench.open(self.history, self.item.stop, seed)

    def fingerprint(self, contender: Contender) -> str:
        """A hash of everything that can change this row."""
        facts = [self.bench.conditions, contender.method, contender.options, self.history, self.item.stop, self.seed]
        facts += [self.bench.runs, self.bench.samples]
        if contender.edition is not None:
            facts.append(contender.edition)
        if contender.own_plain is not None or contender.file is not None:
            facts.append([contender.own_plain, contender.file])
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()

    def known(self, contender: Contender, ledger: Ledger) -> Row | None:
        return ledger.rows.get((self.task, self.key, contender.label, self.fingerprint(contender)))

    def plain_text(self, ledger: Ledger) -> str:
        row = self.known(self.bench.contenders[0], ledger)
        return str(row["texts"][0]) if row is not None else ""

    def ask(self, engines: Mapping[str, Engine], missing: SequenceOf[Contender]) -> Iterator[Row]:
        """Measure the missing ones next to plain decoding, which also runs when its own row is there."""
        if not missing:
            return
        plain = self.bench.contenders[0].label
        wanted = {c.label for c in missing} | {c.own_plain for c in missing} | {plain}
        labels = [c.label for c in self.bench.contenders if c.label in wanted]
        running = {label: engines[label] for label in labels if label in engines}
        there = self.bench.peers.keys() - self.bench.lost.keys()
        peers = {label: self.bench.peers[label] for label in labels if label in there}
        bench, lost = self.bench, dict[str, PeerError]()
        before = bench.distance()
        backwards = bool(zlib.crc32(self.key.encode()) % 2)  # with one run, too, half of the prompts go the other way
        found = measure(
            running, self.request(), bench.runs, bench.gauge, bench.settle, peers, lost, backwards=backwards
        )
        distances = [one for one in (before, bench.distance()) if one is not None]
        for label, error in lost.items():
            bench.lost[label] = error
            bench.peers[label].close()
        if self.bench.log is not None:
            self.bench.log(self.request()(), found[plain].median.tokens)
        texts = self._more_samples(running, found)
        for contender in missing:
            if contender.label not in found:
                continue
            row = self._row(contender, found[contender.label], found[plain])
            if contender.edition is None:
                row |= self._inside(engines[contender.label].drafter, found[contender.label])
            row["cores"] = flip(distances) if distances else None
            if contender.own_plain is not None:
                own_plain = found.get(contender.own_plain)
                row |= against_own_plain(found[contender.label], own_plain, greedy=bench.greedy)
            if contender.label == plain:
                row["texts"] = texts
                judge = self.item.judge if self.turn == 1 else None
                row["scores"] = judge(texts) if judge is not None else {}
            yield row

    def _more_samples(self, engines: Mapping[str, Engine], found: Mapping[str, Measured]) -> list[str]:
        """Texts of all samples; those after the first are decoded once by everyone, for equality only."""
        plain, *drafted = engines
        texts = [found[plain].median.text]
        for sample in range(1, self.bench.samples):
            wanted = take(engines[plain], self.request(sample)(), self.bench.settle)
            texts.append(wanted.text)
            for label in drafted:
                found[label].equal &= take(engines[label], self.request(sample)(), self.bench.settle).same(wanted)
        return texts

    def _row(self, contender: Contender, own: Measured, plain: Measured) -> Row:
        best = own.median
        comparable = contender.edition is None or (contender.file is None and self.bench.greedy)
        return {
            "task": self.task,
            "group": self.item.group,
            "key": self.key,
            "drafter": contender.label,
            "peer": contender.edition,
            "fingerprint": self.fingerprint(contender),
            "options": dict(contender.options),
            "seed": self.seed,
            "tokens": len(best.tokens),
            "prompt_tokens": self.request()().prompt_length,
            "finish_reason": best.finish_reason,
            "texts_equal": own.equal if comparable else None,
            "first_difference": own.difference if comparable else None,
            "drafts": [best.stats.num_draft_tokens, best.stats.num_accepted_draft_tokens],
            "peer_file": contender.file,
            "seconds": best.seconds,
            "first_token_seconds": best.first_token_seconds,
            "plain_seconds": plain.median.seconds,
            "plain_first_token_seconds": plain.median.first_token_seconds,
            "all_seconds": [run.seconds for run in own.takes],
            "load_average": round(os.getloadavg()[0], 2),
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "conditions": dict(self.bench.conditions),
        }

    def _inside(self, drafter: Drafter, own: Measured) -> Row:
        """What is only known of our own engine: counts, where the time went, memory."""
        assert own.split is not None
        footprint = self.bench.footprint
        memory = {"weights": footprint.weights, "cache": footprint.cache(), "working": own.working_bytes}
        memory |= footprint.beside(drafter)
        memory["resident"] = own.resident_bytes
        return {"stats": own.median.stats.as_dict(), "split": asdict(own.split), "memory": memory}


def against_own_plain(own: Measured, plain: Measured | None, *, greedy: bool) -> Row:
    """What a peer that speculates is beside the same engine without it; nothing where that one is lost.

    Sampled texts are not compared: drafted or not, another engine draws other random numbers.
    """
    if plain is None:
        return {}
    wanted = plain.median
    apart = [found for one in own.takes if (found := first_difference(one.tokens, wanted.tokens)) is not None]
    return {
        "texts_equal_own_plain": not apart if greedy else None,
        "own_first_difference": min(apart, default=None) if greedy else None,
        "own_plain_seconds": wanted.seconds,
        "own_plain_first_token_seconds": wanted.first_token_seconds,
    }
