"""Why drafts were rejected: kinds on results made by hand, sums, a wrapper that changes nothing, the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfdraft.bench import explain as explaining
from selfdraft.bench import measure as measuring
from selfdraft.bench import run as running
from selfdraft.bench.measure import Take
from selfdraft.core.commit import commit
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result, walk
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError
from selfdraft.protocols import Drafter, Target, needs_of
from selfdraft.prove.rejections import KINDS, NEAR, UNDRAFTED, Explained, Rejection, Summary, explain
from selfdraft.testing import PROMPTS, SAMPLINGS, Adversary, FakeTarget, check_drafter
from selfdraft.types import Budget, SamplingParams
from tests.terminal import Done, one_line, typed

GREEDY = SamplingParams(max_tokens=40)
PROMPT = [1, 2, 3, 4]
SEEN, UNSEEN, DRAFTED = 2, 9, 7


class Scripted:
    """A drafter that says what it was given."""

    def __init__(self, *drafts: Draft) -> None:
        self.drafts = list(drafts)
        self.observed = 0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self.drafts.pop(0) if self.drafts else EMPTY for _ in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.observed += 1


def opened(sampling: SamplingParams = GREEDY, ends: frozenset[int] = frozenset()) -> Sequence:
    return open_sequence(PROMPT, sampling, seed=0, eos=ends, context=100)


def scores(**by_token: float) -> torch.Tensor:
    """Logits of one row: 0, but for tokens as `t7=3.0`."""
    row = torch.zeros(16)
    for name, score in by_token.items():
        row[int(name[1:])] = score
    return row


def step(
    watched: Explained, sequence: Sequence, draft: Draft, chosen: SequenceOf[int], rows: torch.Tensor | None = None
) -> Result:
    """One step in which the target chooses these tokens along its path; without `rows` it is sure of them."""
    said = iter(chosen)
    path, tokens = walk(draft, lambda node: next(said))
    if rows is None:
        rows = torch.zeros(1 + len(draft), 16)
        for node, token in zip((-1, *path), tokens, strict=True):
            rows[node + 1, token] = 8.0
    result = Result(draft, tuple(path), tuple(tokens), (), rows, proposed=draft, nodes=tuple(range(len(draft))))
    commit(sequence, result)
    watched.observe([sequence], [result])
    return result


def rejected(draft: Draft, chosen: SequenceOf[int], rows: torch.Tensor | None = None) -> Rejection:
    """The one rejection of a step."""
    watched = Explained(Scripted())
    step(watched, opened(), draft, chosen, rows)
    summary = watched.summary()
    assert sum(tally.count for tally in summary.kinds.values()) == summary.rejected == 1
    (found,) = summary.examples
    assert summary.kinds[found.kind].count == 1
    return found


def behind(source: str, deep: bool) -> Draft:
    """A wrong token of a source, at depth 1, or at depth 2 behind a right one."""
    if not deep:
        return Draft.chain([DRAFTED], source)
    return Draft((5, DRAFTED), (-1, 0), ("recycling", source), 2)


CASES = {
    "copy": ("copy", False, SEEN, "copy broken"),
    "a joined copy": ("context+copy", False, UNSEEN, "copy broken"),
    "memory's alignment": ("memory-align", False, SEEN, "copy broken"),
    "a copied prediction": ("prediction-copy", True, SEEN, "copy broken"),
    "lookup": ("lookup", True, UNSEEN, "copy broken"),
    "suffix": ("suffix", False, SEEN, "copy broken"),
    "copy and masks": ("masks+copy", True, SEEN, "copy broken"),
    "a deep mask": ("masks", True, UNSEEN, "mask too deep"),
    "space": ("space", True, SEEN, "mask too deep"),
    "s3d": ("s3d", True, SEEN, "mask too deep"),
    "the first mask": ("masks", False, SEEN, "other guess"),
    "the first mask, unseen": ("masks", False, UNSEEN, "unseen word"),
    "masks with another source": ("masks+context", True, SEEN, "other guess"),
    "lookahead is no lookup": ("lookahead", False, SEEN, "other guess"),
    "unseen": ("context", True, UNSEEN, "unseen word"),
    "the rest": ("recycling", False, SEEN, "other guess"),
    "accepted in this step": ("recycling", True, 5, "other guess"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_rejection_has_one_kind(name: str) -> None:
    source, deep, chosen, kind = CASES[name]
    found = rejected(behind(source, deep), [5, chosen] if deep else [chosen])
    assert (found.kind, found.sources, found.depth) == (kind, source, 1 + deep)
    assert (found.drafted, found.chosen, found.chosen_rank) == (DRAFTED, chosen, None)
    assert found.before == ((*PROMPT, 5) if deep else (*PROMPT,))


def test_every_kind_has_a_case() -> None:
    assert {kind for *_, kind in CASES.values()} | {"near tie"} == {*KINDS}


@pytest.mark.parametrize(("gap", "kind"), [(0.0, "near tie"), (NEAR, "near tie"), (NEAR + 0.01, "copy broken")])
def test_a_near_tie_goes_before_all_others(gap: float, kind: str) -> None:
    rows = torch.stack([scores(t2=4.0, t7=4.0 - gap), scores()])
    found = rejected(Draft.chain([DRAFTED], "copy"), [SEEN], rows)
    assert found.kind == kind
    assert found.margin == pytest.approx(gap, abs=1e-6)


def test_rank_and_margin_are_those_of_the_row_of_the_place() -> None:
    row = scores(t2=4.0, t3=3.0, t5=1.0, t7=1.0, t8=1.0)
    found = rejected(behind("recycling", True), [5, SEEN], torch.stack([scores(t5=9.0), row, scores(t7=9.0)]))
    assert found.target_rank == 4  # behind 2, 3, and 5, which ties and has the lower id
    logs = row.log_softmax(-1)
    assert found.margin == pytest.approx(float(logs[SEEN] - logs[DRAFTED]))


def test_the_likeliest_candidate_is_the_one_that_is_explained() -> None:
    draft = Draft((6, DRAFTED, 8), (-1, -1, -1), ("copy", "context", "align"), 3, (0.2, 0.5, 0.3))
    found = rejected(draft, [SEEN])
    assert (found.drafted, found.sources, found.chance, found.others) == (DRAFTED, "context", 0.5, (8, 6))
    assert found.kind == "other guess"


def test_probes_were_not_drafted() -> None:
    watched, sequence = Explained(Scripted()), opened()
    step(watched, sequence, EMPTY.with_probes([DRAFTED], [-1], "masks"), [SEEN])
    assert watched.summary().rejected == 0
    found = rejected(Draft.chain([DRAFTED], "context").with_probes([SEEN], [-1], "masks"), [SEEN])
    assert found.others == ()


def test_a_token_that_limits_cut_has_its_rank() -> None:
    watched, sequence = Explained(Scripted()), opened()
    whole = Draft((99, 5, DRAFTED, 6, SEEN), (-1, -1, 1, 1, 1), ("context",) * 5, 5, (0.05, 0.9, 0.5, 0.1, 0.3))
    clipped, nodes = whole.clip(Budget(3, 9, 9), 16)  # 99 is no token, and the fourth node is one too many
    assert nodes == (1, 2, 3)
    rows = torch.stack([scores(t5=9.0), scores(t2=9.0), scores(), scores()])
    result = Result(clipped, (0,), (5, SEEN), (), rows, proposed=whole, nodes=nodes)
    commit(sequence, result)
    watched.observe([sequence], [result])
    (found,) = watched.summary().examples
    assert (found.chosen_rank, found.others) == (2, (6,))


def test_noise_that_chose_the_less_likely_is_a_near_tie() -> None:
    watched, sequence = Explained(Scripted()), opened(replace(GREEDY, temperature=0.5, top_k=3))
    rows = torch.stack([scores(t2=2.0, t7=3.0), scores()])
    step(watched, sequence, Draft.chain([DRAFTED], "copy"), [SEEN], rows)
    (found,) = watched.summary().examples
    assert (found.kind, found.margin, found.target_rank) == ("near tie", -1.0, 1)


def test_penalties_and_bans_count_in_the_margin() -> None:
    watched = Explained(Scripted())
    rows = torch.stack([scores(t2=2.0, t7=3.0), scores()])
    banned = replace(GREEDY, logit_bias={DRAFTED: -math.inf})
    step(watched, opened(banned), Draft.chain([DRAFTED], "recycling"), [SEEN], rows)
    step(watched, opened(replace(GREEDY, logit_bias={SEEN: 1.25})), Draft.chain([DRAFTED], "copy"), [SEEN], rows)
    near, other = watched.summary().examples
    assert (near.kind, near.margin) == ("near tie", 0.25)
    assert (other.kind, other.margin, other.as_dict(str)["margin"]) == ("other guess", math.inf, None)


def test_what_was_not_drafted_says_why() -> None:
    watched, sequence = Explained(Scripted()), opened()
    step(watched, sequence, EMPTY, [5])
    assert watched.summary().undrafted == dict(zip(UNDRAFTED, (1, 0, 0), strict=True))
    step(watched, sequence, EMPTY, [6])
    step(watched, sequence, EMPTY, [6])
    step(watched, sequence, Draft.chain([1, 2], "copy", (0.5, 0.25)), [1, 2, 3])
    summary = watched.summary()
    assert dict(zip(UNDRAFTED, (1, 2, 1), strict=True)) == summary.undrafted
    assert (summary.tokens, summary.accepted.count, summary.accepted.mean) == (6, 2, 0.375)
    assert summary.sources == {"copy": [2, 0]}


def test_accepted_tokens_by_rank() -> None:
    watched, sequence = Explained(Scripted()), opened()
    draft = Draft((5, 6, 8), (-1, -1, 1), ("copy", "context", "context"), 3, (0.2, 0.7, 0.9))
    step(watched, sequence, draft, [5, 1])
    step(watched, sequence, draft, [6, 8, 1])
    assert watched.summary().accepted_by_rank == {2: 1, 1: 2}


def test_nothing_behind_a_stop_is_counted() -> None:
    watched, sequence = Explained(Scripted()), opened(ends=frozenset({2}))
    step(watched, sequence, Draft.chain([1, 2, DRAFTED], "copy"), [1, 2, 3])
    summary = watched.summary()
    assert (summary.tokens, summary.accepted.count, summary.rejected) == (2, 2, 0)


def test_examples_are_a_sample_of_all() -> None:
    watched, sequence = Explained(Scripted(), 3), opened()
    for chosen in range(10, 16):
        step(watched, sequence, Draft.chain([DRAFTED], "copy"), [chosen])
        step(watched, sequence, Draft.chain([DRAFTED], "recycling"), [SEEN])
    summary = watched.summary()
    assert summary.rejected == 12
    assert [one.kind for one in summary.examples] == ["copy broken", "other guess", "copy broken"]
    drawn = set()
    for seed in range(40):
        watched._random.seed(seed)
        step(watched, sequence, Draft.chain([DRAFTED], "copy"), [seed % 16 if seed % 16 != DRAFTED else 0])
        drawn |= {one.before for one in watched.summary().examples}
    assert len(drawn) > 3  # later ones take the places of earlier ones
    assert Explained(Scripted(), 0).summary().examples == []


def test_a_summary_does_not_move_on() -> None:
    watched, sequence = Explained(Scripted()), opened()
    before = watched.summary()
    step(watched, sequence, Draft.chain([DRAFTED], "copy"), [SEEN])
    assert (before.tokens, before.rejected, before.examples) == (0, 0, [])


def test_json() -> None:
    watched = Explained(Scripted())
    step(watched, opened(), Draft.chain([DRAFTED], "copy", (0.25,)), [SEEN])
    step(watched, opened(), Draft.chain([DRAFTED], "copy"), [DRAFTED, SEEN])
    told = json.loads(json.dumps(watched.summary().as_dict(lambda ids: f"<{len(ids)}>"), allow_nan=False))
    assert told["kinds"]["copy broken"] == {"count": 1, "share": 1.0, "mean_chance": 0.25}
    assert told["kinds"]["near tie"] == {"count": 0, "share": 0.0, "mean_chance": None}
    assert told["sources"] == {"copy": {"accepted": 1, "rejected": 1}}
    (example,) = told["examples"]
    assert (example["drafted"], example["chosen"]) == ({"id": DRAFTED, "text": "<1>"}, {"id": SEEN, "text": "<1>"})
    assert example["before"] == "<4>"
    assert Explained(Scripted()).summary().as_dict(str)["kinds"]["near tie"]["share"] is None


@pytest.mark.parametrize("examples", [-1, 10_001])
def test_the_number_of_examples_is_checked(examples: int) -> None:
    with pytest.raises(OptionError, match=f"examples={examples} is out of range"):
        Explained(Scripted(), examples)


# the wrapper


def fixed(name: str) -> Callable[[Target], Drafter]:
    """A drafter whose trees no clock decides."""
    options = {"min_probability": 0.05} if name in ("context", "recycling", "merged") else {}
    return lambda target: build(name, target, options)


MAKERS: dict[str, Callable[[Target], Drafter]] = {
    **{name: fixed(name) for name in ("lookup", "suffix", "context", "recycling", "merged")},
    "adversary": Adversary,
}


def logged(drafter: Drafter, log: list[Draft]) -> Drafter:
    """The drafter, with every draft also in a list."""
    whole = drafter.draft

    def draft(sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        found = whole(sequences, budgets)
        log.extend(found)
        return found

    drafter.draft = draft  # type: ignore[method-assign]
    return drafter


def decoded(make: Callable[[Target], Drafter], sampling: SamplingParams, *, ends: frozenset[int]) -> list[Sequence]:
    target = FakeTarget(slots=2)
    engine = Engine(target, make(target), slots=2)
    sequences = [open_sequence(prompt, sampling, seed=sampling.seed or 0, eos=ends, context=160) for prompt in PROMPTS]
    for _ in engine.generate(sequences):
        pass
    return sequences


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "truncated", "penalties"])
@pytest.mark.parametrize("name", MAKERS)
def test_drafts_and_texts_are_unchanged_and_the_sums_add_up(name: str, sampling: SamplingParams) -> None:
    ends = frozenset({11, 30})
    bare, wrapped = list[Draft](), list[Draft]()
    plain = decoded(lambda target: logged(MAKERS[name](target), bare), sampling, ends=ends)
    watched: list[Explained] = []

    def make(target: Target) -> Drafter:
        watched.append(Explained(MAKERS[name](target)))
        return logged(watched[0], wrapped)

    explained = decoded(make, sampling, ends=ends)
    assert [one.output for one in explained] == [one.output for one in plain]
    assert wrapped == bare
    assert any(len(draft) for draft in bare)
    found = watched[0].summary()
    adds_up(found, explained)
    assert found.rejected
    assert len(found.examples) <= 8


def adds_up(found: Summary, sequences: SequenceOf[Sequence]) -> None:
    """Every token is counted once, and the engine's own statistics agree."""
    undrafted = sum(found.undrafted.values())
    assert found.tokens == found.accepted.count + found.rejected + undrafted
    assert found.tokens == sum(one.num_output_tokens for one in sequences)
    assert found.accepted.count == sum(one.stats.num_accepted_draft_tokens for one in sequences)
    assert found.accepted.count == found.accepted_by_rank.total() == sum(hit for hit, _ in found.sources.values())
    assert found.rejected == sum(missed for _, missed in found.sources.values())
    assert found.undrafted["first token"] <= len(sequences)


def test_the_oracle() -> None:
    check_drafter(lambda target: Explained(build("lookup", target)))


def test_the_drafter_learns_first() -> None:
    """Drafters time a step until `observe`: what is noted here must not count as theirs."""
    seen: list[int] = []

    class Early(Scripted):
        def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
            seen.append(watched.summary().tokens)

    watched = Explained(Early())
    step(watched, opened(), EMPTY, [5])
    assert (seen, watched.summary().tokens) == ([0], 1)


def test_what_the_drafter_declares_is_passed_on() -> None:
    target = FakeTarget()
    prediction = build("prediction", target)
    assert needs_of(Explained(prediction)) == needs_of(prediction) != needs_of(Scripted())


def test_explain_and_the_drafter_is_back() -> None:
    target = FakeTarget()
    drafter = build("lookup", target)
    engine = Engine(target, drafter)
    sequences = [open_sequence(prompt, GREEDY, seed=0, eos=frozenset(), context=160) for prompt in PROMPTS]
    adds_up(explain(engine, sequences), sequences)
    assert engine.drafter is drafter
    target.fails = True
    with pytest.raises(RuntimeError, match="planted"):
        explain(engine, [opened()])
    assert engine.drafter is drafter


# the command line


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `selfdraft bench` on the pocket model with two drafters that no clock rules."""
    cheap = ("--model", "pocket", "--tasks", "quick/math", "--limit", 2, "--max-new-tokens", 32, "--runs", 1)
    fixed = json.dumps({"method": "recycling", "min_probability": 0.05})
    drafters = ("--drafters", "lookup", "--speculative-config", fixed, "--threads", 1, "--ignore-eos")
    return lambda *given: typed(monkeypatch, capsys, "bench", *cheap, *drafters, *given)


def test_bench_explains_beside_what_it_times(bench: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    measure, take = measuring.measure, measuring.take

    def timed(engines: dict[str, Engine], *rest: object, **options: object) -> object:
        order.append("timed")
        assert not any(isinstance(engine.drafter, Explained) for engine in engines.values())
        return measure(engines, *rest, **options)  # type: ignore[arg-type]

    def extra(engine: Engine, *rest: object) -> Take:
        order.append("explained")
        assert isinstance(engine.drafter, Explained)
        return take(engine, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "measure", timed)
    monkeypatch.setattr(explaining, "take", extra)
    done = bench("--explain", 2, "--json")
    assert (done.code, done.err) == (0, "")
    assert order == ["timed"] * 2 + ["explained"] * 4
    plain, *drafted = done.said
    assert plain["rejections"] is None
    for record in drafted:
        found = record["rejections"]
        assert found["texts_equal"]
        assert found["tokens"] == record["tokens"] == 64
        undrafted = sum(found["undrafted"].values())
        assert found["accepted"]["count"] + found["rejected"] + undrafted == 64
        assert sum(one["count"] for one in found["kinds"].values()) == found["rejected"] > 0
        assert 0 < len(found["examples"]) <= 2
        assert all(one["before"] and one["kind"] in KINDS for one in found["examples"])
    assert all("copy" not in one["sources"] for one in drafted[1]["rejections"]["examples"])


def test_bench_shows_tables_and_a_picture(bench: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench("--explain", 1, "--pictures", tmp_path)
    assert done.code == 0
    for drafter in ("lookup", "recycling"):
        assert f"quick/math, {drafter}: what became of 64 tokens" in done.out
    assert all(done.out.count(f"\n  {kind} ") == 2 for kind in KINDS)
    assert done.out.count("\n  1. ") == 2
    assert "\n  2. " not in done.out
    assert "the target chose" in done.out
    assert (tmp_path / "rejections.png").read_bytes().startswith(b"\x89PNG")


def test_bench_without_examples_and_without_explaining(bench: Callable[..., Done]) -> None:
    done = bench("--explain", 0)
    assert "near tie" in done.out
    assert "the target chose" not in done.out
    assert all("rejections" not in record for record in bench("--json").said)


def test_a_text_that_differs_ends_with_1(bench: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    take = measuring.take
    monkeypatch.setattr(explaining, "take", lambda *given: replace(take(*given), text="another"))
    done = bench("--explain", 0)
    assert done.code == 1
    assert "a text of this run DIFFERS from plain decoding" in done.err


def test_a_wrong_number_is_one_line(bench: Callable[..., Done]) -> None:
    one_line(bench("--explain", -1), "'--explain'")
