"""Drafters whose guesses cost no pass: their indices, what they take to be likely, their memory, one tree of all."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build, memory_of, with_memory
from selfdraft.drafting.alignment import PATIENCE, Aligned, realign
from selfdraft.drafting.context_tree import BREAK, ORDER, ContextTree, Node
from selfdraft.drafting.mixing import CLASSES, LEVELS, MIDDLES, STEPS, Credit, Merger, Paths
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.source_tree import SourceTreeDrafter
from selfdraft.drafting.sources import ANCHOR, Copies, Reader
from selfdraft.drafting.successors import topk
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.memory_file import load_memory, save_memory
from selfdraft.files.token_log import Logged
from selfdraft.protocols import Drafter
from selfdraft.replay.replay import open_drafter, replay
from selfdraft.types import Budget, SamplingParams
from tests.models import run, tiny_target
from tests.test_replay import call, traces

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)
WIDE = Budget(max_nodes=64, max_depth=64, max_probe_depth=256)
MOTIF = [17, 4, 33, 8, 51, 22, 9]
FREE = {"min_probability": 0.0}
"""No row has a price: trees do not depend on a clock."""


def opened(tokens: SequenceOf[int], **sampling: object) -> Sequence:
    params = SamplingParams(max_tokens=100, **sampling)  # type: ignore[arg-type]
    return open_sequence(tokens, params, seed=0, eos=frozenset(), context=512)


def one(drafter: Drafter, sequence: Sequence, budget: Budget = WIDE) -> Draft:
    return drafter.draft([sequence], [budget])[0]


def go_on(drafter: Drafter, sequence: Sequence, tokens: SequenceOf[int], draft: Draft = Draft()) -> None:  # noqa: B008
    """What a step does to a sequence, as far as a reader of tokens can see."""
    sequence.tokens += tokens
    drafter.observe([sequence], [Result(draft, (), tuple(tokens))])


# the context tree


def entries(node: Node) -> int:
    return sum(1 + (entries(child) if isinstance(child, Node) else 0) for child in node.after.values())


@settings(max_examples=200, deadline=None)
@given(texts)
def test_counts_are_those_of_brute_force(text: list[int]) -> None:
    """Every context of the end, told by order: how often it stood before, and how often each token followed."""
    tree = ContextTree(text)
    for order in range(1, ORDER + 1):
        context = text[len(text) - order :]
        ends = [end for end in range(order, len(text)) if text[end - order : end] == context]
        if len(context) < order or not ends:
            assert len(tree.state) < order
            continue
        node = tree.state[order - 1]
        assert isinstance(node, Node)
        assert (node.total, node.last) == (len(ends), ends[-1])
        seen = {token: child.seen if isinstance(child, Node) else 1 for token, child in node.after.items()}
        assert seen == {token: sum(text[end] == token for end in ends) for token in {text[end] for end in ends}}
        assert all(text[child - 1] == token for token, child in node.after.items() if isinstance(child, int))


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_a_state_that_was_stepped_to_is_the_one_of_the_end(text: list[int], more: list[int]) -> None:
    """Incremental and rebuilt agree: a tree that has read a text finds the same contexts by steps."""
    tree, state = ContextTree(text), list[Node | int]()
    for token in more:
        state = tree.step(state, token)
    for order, node in enumerate(state, 1):
        context = more[-order:]
        ends = [end for end in range(order, len(text) + 1) if text[end - order : end] == context]
        assert ends
        assert node == ends[0] if isinstance(node, int) else node.seen == len(ends)
    longest = next((k for k in range(ORDER, 0, -1) if _stands(text, more[-k:], k)), 0)
    unique = bool(state) and isinstance(state[-1], int)
    assert len(state) == longest or (unique and len(state) < longest)


def _stands(text: list[int], context: list[int], order: int) -> bool:
    return len(context) == order and any(text[i : i + order] == context for i in range(len(text) - order + 1))


@pytest.mark.parametrize("period", [1, 2, 13, 4000])
def test_the_tree_grows_with_the_text_only(period: int) -> None:
    """Linear memory: at most ORDER + 1 entries a token, and far less where nothing is repeated."""
    sizes = []
    for length in (2000, 4000):
        tree = ContextTree([place % period for place in range(length)])
        sizes.append(entries(tree._root))
    assert sizes[1] <= max(sizes[0] + 2000, (ORDER + 1) * period)
    assert sizes[1] <= 4000


def test_nothing_reaches_over_a_separation() -> None:
    tree = ContextTree([1, 2])
    tree.separate()
    for token in (3, 1, 2):
        tree.push(token)
    assert not tree.guess(tree.state)  # what followed 1 2 was the end
    assert BREAK not in tree.guess(tree.step([], 2))
    assert not tree.guess([])
    state = tree.step(tree.step([], 2), 3)
    assert len(state) == 1


def test_the_frequent_and_the_latest_continuations_are_named() -> None:
    text = [token for follower in [*range(10, 40), 11, 11, 12, 7] for token in (5, follower)]
    tree = ContextTree([*text, 5])
    told = dict(tree.guess(tree.state))
    assert {11, 12, 7} <= set(told)
    assert len(told) <= 9
    assert told[7] % 2 == 1  # the latest
    assert told[11] > told[12]


# following


@pytest.mark.parametrize(
    ("at", "token", "wanted"),
    [
        (Aligned(2, 3, 1), 30, Aligned(3, 4, 1)),
        (Aligned(2, 4, 1), 30, Aligned(3, 5, 0)),  # differences fade
        (Aligned(2), 40, Aligned(4, 1, 1)),  # a token was dropped
        (Aligned(2), 99, Aligned(2, 0, 1)),  # one was added, or changed
        (Aligned(2, 0, PATIENCE), 99, None),
        (Aligned(2, 0, PATIENCE), 30, Aligned(3, 1, PATIENCE)),
        (Aligned(5), 10, Aligned(5, 0, 1)),  # at the end
    ],
)
def test_realign(at: Aligned, token: int, wanted: Aligned | None) -> None:
    assert realign([10, 20, 30, 40, 50], at, token) == wanted


def test_an_alignment_does_not_reach_into_another_output() -> None:
    assert realign([1, 2, BREAK, 7], Aligned(1), 7) == Aligned(1, 0, 1)


@settings(deadline=None)
@given(texts)
def test_a_match_is_one_and_as_long_as_the_contexts_say(text: list[int]) -> None:
    reader = Reader(ContextTree(), own=True)
    for size, token in enumerate(text, 1):
        reader.push(token)
        place, length = reader.match.place, reader.match.length
        assert length >= len(reader.contexts)
        if length:
            assert place < size
            assert text[place - length : place] == text[size - length : size]


def test_a_copy_goes_on_behind_a_changed_token() -> None:
    """The text repeats with one token changed: the alignment names what stands behind it, though nothing matches."""
    told = list(range(100, 130))
    sequence = opened([*told, 1, *told[:8], 77])
    draft = one(build("context", tiny_target(), FREE), sequence)
    chains = {draft.tokens[0], *(draft.tokens[n] for n in range(len(draft)) if draft.parents[n] == ROOT)}
    assert {told[8], told[9]} <= chains
    assert any("align" in source for source in draft.sources)
    assert 8 > ANCHOR


# the tree


def scores_by_path(draft: Draft) -> dict[tuple[int, ...], float]:
    found: dict[int, tuple[tuple[int, ...], float]] = {ROOT: ((), 1.0)}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        path, chance = found[parent]
        found[node] = ((*path, token), chance * draft.probabilities[node])
    return dict(list(found.values())[1:])


def test_levels_cover_all_chances() -> None:
    assert list(MIDDLES) == sorted(MIDDLES)
    assert len(MIDDLES) == LEVELS + 1 == len(STEPS) + 2


def test_duplicates_are_one_node_that_keeps_all_its_sources() -> None:
    drafter = build("merged", tiny_target(), {**FREE, "memory": 1000})
    assert isinstance(drafter, SourceTreeDrafter)
    assert drafter.memory is not None
    drafter.memory.add(MOTIF * 2)
    sequence = opened([*MOTIF, *MOTIF, *MOTIF[:3]], prediction=tuple(MOTIF[3:]))
    draft = one(drafter, sequence)
    children = [(parent, token) for parent, token in zip(draft.parents, draft.tokens, strict=True)]
    assert len(set(children)) == len(children)
    assert draft.tokens[0] == MOTIF[3]
    assert draft.sources[0] == "context+copy+memory+prediction"


def test_the_tree_is_best_first_and_within_the_budget() -> None:
    sequence = opened([*MOTIF, *MOTIF, 5, *MOTIF[:4], 6, *MOTIF[:3]])
    drafter = build("context", tiny_target(), FREE)
    whole = scores_by_path(one(drafter, sequence))
    values = list(whole.values())
    assert values == sorted(values, reverse=True)
    small = one(drafter, sequence, Budget(max_nodes=3, max_depth=64, max_probe_depth=64))
    assert scores_by_path(small) == dict(list(whole.items())[:3])
    assert max(one(drafter, sequence, Budget(max_nodes=64, max_depth=2, max_probe_depth=64)).depths) == 2
    assert len(one(drafter, sequence, Budget(max_nodes=0, max_depth=9, max_probe_depth=64))) == 0
    assert len(one(drafter, sequence, Budget(max_nodes=9, max_depth=0, max_probe_depth=64))) == 0


def test_a_node_must_be_worth_its_price() -> None:
    sequence = opened([*MOTIF, *MOTIF, 5, *MOTIF[:4], 6, *MOTIF[:3]])
    free = scores_by_path(one(build("context", tiny_target(), FREE), sequence))
    dear = scores_by_path(one(build("context", tiny_target(), {"min_probability": 0.3}), sequence))
    assert dear == {path: chance for path, chance in free.items() if chance >= 0.3}
    assert 0 < len(dear) < len(free)


def test_every_source_is_scored_whether_it_was_run_or_not() -> None:
    """A budget of one node, and every guess of every source at every verified token is booked."""
    reader = Reader(ContextTree(), own=True)
    for token in [1, 2, 3, 1, 2, 4, 1, 2]:
        reader.push(token)
    credit = Credit()
    merger = Merger([Copies("copy", reader)], credit)
    merger.tree(Budget(1, 9, 9), [0.0])
    merger.score([4, 1, 9])
    means = credit.counts["copy"]._means
    assert sorted(mean.value > mean.guess for mean in means.values()) == [False, True, True]


def test_paths_are_corrected_by_how_often_their_depth_came_true() -> None:
    paths = Paths()
    foretold = [0.0] * CLASSES
    foretold[1], foretold[-1] = 0.5, 2.0
    for _ in range(300):
        paths.observe(foretold, 1)  # the first depth always, the deepest never
    assert paths.ratios[1] > 1.5
    assert paths.ratios[-1] < 0.2
    assert paths.ratios[2:-1] == [1.0] * (CLASSES - 3)


def test_what_paths_are_worth_moves_the_chances_of_the_tree() -> None:
    """Behind many trees that were accepted less deep than foretold, deep nodes are thought less likely."""
    sequence = opened([*MOTIF, *MOTIF, *MOTIF[:3]])
    drafter = build("context", tiny_target(), FREE)
    assert isinstance(drafter, SourceTreeDrafter)
    before = scores_by_path(one(drafter, sequence))
    ratios = drafter.tree.credit.paths.ratios
    ratios[:] = [1.0 if depth < 3 else 0.25 for depth in range(CLASSES)]
    after = scores_by_path(one(drafter, sequence))
    deep = tuple([*MOTIF[3:], *MOTIF][:3])
    assert after[deep[:1]] == before[deep[:1]]
    assert after[deep] == pytest.approx(before[deep] / 4)
    ratios[:] = [9.0] * CLASSES
    assert max(scores_by_path(one(drafter, sequence)).values()) <= 1.0


def test_credit_learns_which_source_is_right() -> None:
    """The latest continuation is always right and the copy never: soon the tree says so."""
    drafter = build("context", tiny_target(), FREE)
    sequence = opened([1])
    for turn in range(60):
        go_on(drafter, sequence, [5, 10 + turn % 2, 6], one(drafter, sequence))
    (best, *_), draft = [10 + 60 % 2], one(drafter, opened([*sequence.tokens, 5]))
    assert draft.tokens[0] == best
    assert draft.probabilities[0] > 0.5


def test_learning_while_nothing_was_drafted_changes_nothing_else() -> None:
    sequence, other = opened(MOTIF * 2), opened(MOTIF * 2)
    drafter = build("merged", tiny_target(), {**FREE, "recycling": False})
    drafter.observe([sequence], [Result(Draft())])
    assert one(drafter, sequence) == one(build("merged", tiny_target(), FREE), other)


@pytest.mark.parametrize("name", ["context", "recycling", "prediction", "merged"])
def test_notes_die_with_the_sequence(name: str) -> None:
    drafter = build(name, tiny_target())
    sequence = opened(MOTIF * 2)
    one(drafter, sequence)
    assert isinstance(drafter, SourceTreeDrafter)
    assert len(drafter.tree) == 1
    del sequence
    gc.collect()
    assert len(drafter.tree) == 0


def test_trees_start_small_until_the_price_of_a_row_is_known() -> None:
    drafter = build("context", tiny_target())
    assert isinstance(drafter, SourceTreeDrafter)
    now = [0.0]
    drafter.timer.clock = lambda: now[0]
    sequence, sizes = opened(MOTIF * 20), []
    for _ in range(14):
        draft = one(drafter, sequence)
        sizes.append(len(draft))
        now[0] += 1.0 + 0.01 * (1 + len(draft))
        go_on(drafter, sequence, [MOTIF[(len(sequence.tokens)) % 7]], draft)
    assert sizes[:6] == [1, 2, 4, 8, 16, 32]
    assert drafter.row_cost.time.per_row == pytest.approx(0.01, rel=0.01)
    assert drafter.row_cost.tokens > 0


# recycling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sign", ["mixed", "negative"])
def test_topk_of_a_wide_vocabulary(dtype: torch.dtype, sign: str) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5000, generator=draw).to(dtype)
    logits = -logits.abs() if sign == "negative" else logits
    for k in (1, 8, 16):
        values, ids = topk(logits, k)
        assert torch.equal(values, logits.topk(k).values)
        assert torch.equal(logits.gather(1, ids), values)
    assert topk(logits[:, :5], 8)[1].shape == (3, 5)


@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=60), SamplingParams(max_tokens=60, temperature=0.9)])
@pytest.mark.parametrize("name", ["recycling", "merged"])
def test_runners_up_are_guessed_and_the_text_is_plain(name: str, sampling: SamplingParams) -> None:
    prompts = [MOTIF * 2, list(range(0, 60, 3))]
    plain = run(tiny_target(), "none", prompts, sampling)
    target = tiny_target()
    found = run(target, build(name, target, FREE), prompts, sampling)
    assert [s.output for s in found] == [s.output for s in plain]
    assert any("recycling" in source for s in found for source in s.sources)


# prediction


def test_a_prediction_that_is_nearly_right_saves_most_steps() -> None:
    sampling = SamplingParams(max_tokens=60)
    (plain,) = run(tiny_target(), "none", [MOTIF], sampling)
    edited = [*plain.output[:20], 1, 2, *plain.output[20:30], *plain.output[33:]]
    for guess, most in ((plain.output, 6), (edited, 22), ([60 - t for t in plain.output], 60)):
        told = SamplingParams(max_tokens=60, prediction=tuple(guess))
        target = tiny_target()
        (found,) = run(target, build("prediction", target, FREE), [MOTIF], told)
        assert found.output == plain.output
        assert found.stats.num_steps <= most
        assert found.stats.num_steps >= 2


def test_a_request_without_a_prediction_is_decoded_plainly() -> None:
    (found,) = run(tiny_target(), "prediction", [MOTIF * 4], SamplingParams(max_tokens=20))
    assert found.stats.num_draft_tokens == 0


# memory


def test_a_memory_is_bounded_and_keeps_the_latest() -> None:
    memory = Memory(20)
    for turn in range(30):
        memory.add([turn] * 3)
        assert memory.size == sum(map(len, memory.outputs)) <= 20
        assert len(memory.tree.text) == memory.size + len(memory.outputs)
        assert memory.outputs[-1] == (turn,) * 3
    memory.add(range(50))
    assert memory.outputs[-1] == tuple(range(30, 50))
    assert memory.size == 20
    memory.add([])
    assert memory.size == 20


def test_outputs_are_remembered_by_this_drafter_only_and_only_if_asked() -> None:
    sampling = SamplingParams(max_tokens=30)
    target = tiny_target()
    drafter = build("merged", target, {**FREE, "memory": 100, "recycling": False})
    (first,) = run(target, drafter, [[5, 6]], sampling)
    (again,) = run(target, drafter, [[5, 6]], sampling)
    assert again.output == first.output
    assert again.stats.num_steps < first.stats.num_steps / 2
    for other in (build("merged", target, {**FREE, "memory": 100}), build("merged", target, FREE)):
        assert isinstance(other, SourceTreeDrafter)
        assert "memory" not in "".join(one(other, opened([5, 6, *first.output])).sources)


def test_a_memory_file_comes_back_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    path, memory = tmp_path / "memory.json", Memory(50)
    memory.add(MOTIF)
    memory.add([1, 2])
    save_memory(path, memory, "vocab:61")
    again = Memory(50)
    assert load_memory(path, again, "vocab:61") == "vocab:61"
    assert again.outputs == memory.outputs
    cases: list[tuple[str, Memory, str, type[Exception]]] = [
        (path.read_text(), Memory(50), "another tokenizer", OptionError),
        (path.read_text(), Memory(5), "holds 9 tokens", OptionError),
        ('{"selfdraft_memory": 1, "outp', Memory(50), "is broken", RequestError),
        ("[]", Memory(50), "no memory file", RequestError),
        ("[" * 10**5, Memory(50), "is broken", RequestError),
        (json.dumps({"selfdraft_memory": 1, "outputs": [[1, -2]]}), Memory(50), "lists of token ids", RequestError),
    ]
    for text, mine, says, kind in cases:
        path.write_text(text)
        with pytest.raises(kind, match=says):
            load_memory(path, mine, "vocab:7" if "another" in says else None)
        assert mine.size == 0
    with pytest.raises(RequestError, match="cannot be read"):
        load_memory(tmp_path / "none", memory, None)
    with pytest.raises(RequestError, match="cannot be written"):
        save_memory(tmp_path / "no" / "memory", memory, None)
    assert [file.name for file in tmp_path.iterdir()] == ["memory.json"]


def test_a_drafter_without_memory_says_so() -> None:
    with pytest.raises(OptionError, match=r"lookup.*keeps no memory.*merged"):
        with_memory("lookup", {})
    with pytest.raises(OptionError, match="no memory that is on"):
        memory_of(build("merged", tiny_target()))
    assert with_memory("merged", {"memory": 9})["memory"] == 9
    assert memory_of(build("merged", tiny_target(), with_memory("merged", {}))).size == 0


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("context", "num_speculative_tokens", 0),
        ("recycling", "min_probability", 1.5),
        ("prediction", "num_speculative_tokens", 257),
        ("merged", "memory", -1),
        ("merged", "memory", 2**24 + 1),
        ("merged", "memory", 1.5),
        ("merged", "recycling", 1),
    ],
)
def test_values_out_of_range_are_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(OptionError, match=option):
        build(name, tiny_target(), {option: value})


def test_a_log_has_no_logits() -> None:
    with pytest.raises(OptionError, match=r"recycling.*reads logits"):
        open_drafter("merged", {"recycling": True})
    with pytest.raises(OptionError, match="a log holds tokens only"):
        open_drafter("recycling")


# the front doors


def test_a_prediction_as_text_and_who_reads_none() -> None:
    from selfdraft import LLM
    from tests.test_llm import TEXTS, model, tokenizer

    llm = LLM(model(), tokenizer=tokenizer(), drafter="merged", speculative_config=FREE)
    plain = llm.generate(TEXTS[0], SamplingParams(max_tokens=20))[0].outputs[0]
    told = llm.generate(TEXTS[0], SamplingParams(max_tokens=20, prediction=plain.token_ids))[0].outputs[0]
    assert told.token_ids == plain.token_ids
    assert any("prediction" in source for source in told.sources)
    (request,) = llm.requests(TEXTS[0], SamplingParams(prediction="a dog"))
    assert llm.tokenizer is not None
    assert list(request.sampling.prediction) == llm.tokenizer("a dog", add_special_tokens=False)["input_ids"]
    with pytest.raises(RequestError, match="token id 99999 in the prediction"):
        llm.generate(TEXTS[0], SamplingParams(prediction=(99999,)))
    llm.use("lookup")
    with pytest.raises(RequestError, match=r"'lookup' reads no prediction; these do: prediction"):
        llm.generate(TEXTS[0], SamplingParams(prediction="a dog"))


def test_memory_and_prediction_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.test_llm import TEXTS, model, tokenizer

    folder, memory, log, wish = (tmp_path / name for name in ("model", "memory.json", "log.jsonl", "wish.txt"))
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    wish.write_text(TEXTS[1])
    words = ["generate", TEXTS[0], "--model", folder, "--drafter", "merged", "--max-new-tokens", 24, "--json"]
    words += ["--memory", memory, "--log", log, "--prediction", wish, "--speculative-config", json.dumps(FREE)]
    steps = []
    for _ in range(2):
        code, out, _ = call(monkeypatch, capsys, *words)
        assert code == 0
        steps.append(json.loads(out)["results"][0]["num_steps"])
    assert steps[1] < steps[0]
    assert len(json.loads(memory.read_text())["outputs"]) == 2
    replayed = ["replay", log, "--drafter", "merged", "--memory", memory]
    code, out, _ = call(monkeypatch, capsys, *replayed, "--json")
    assert code == 0
    assert len(json.loads(memory.read_text())["outputs"]) == 4
    foreign = json.loads(memory.read_text()) | {"tokenizer": "vocab:7"}
    memory.write_text(json.dumps(foreign))
    for wrong, says in (
        (replayed, "of another tokenizer (vocab:7"),
        (words, "of another tokenizer (vocab:7"),
        ([*replayed[:3], "lookup", *replayed[4:]], "keeps no memory"),
        ([*words, "--prediction", tmp_path / "none"], "cannot be read"),
    ):
        code, _, err = call(monkeypatch, capsys, *wrong)
        assert code == 2
        assert says in err
        assert len(err.strip().splitlines()) == 1
    assert json.loads(memory.read_text()) == foreign


# on what a real model answered


class Gauge:
    """Predicted against actual acceptance, behind the first tokens."""

    def __init__(self, drafter: Drafter, behind: int) -> None:
        self.drafter, self.left = drafter, behind
        self.predicted = self.accepted = 0.0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return self.drafter.draft(sequences, budgets)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for result in results:
            self.left -= len(result.tokens)
            if self.left < 0:
                self.predicted += sum(scores_of_nodes(result.draft))
                self.accepted += len(result.path)
        self.drafter.observe(sequences, results)


def scores_of_nodes(draft: Draft) -> list[float]:
    found = [1.0] * (len(draft) + 1)  # the last one is ROOT
    for node, parent in enumerate(draft.parents):
        found[node] = found[parent] * draft.probabilities[node]
    return found[:-1]


@pytest.mark.parametrize("name", ["sharegpt", "instructcoder"])
def test_predicted_acceptance_is_the_actual_one_within_5_percent(name: str) -> None:
    gauge = Gauge(open_drafter("merged", {**FREE, "memory": 2**18}), 2000)
    replay(traces(name, 40), gauge, 16)
    assert gauge.predicted == pytest.approx(gauge.accepted, rel=0.05)


def test_one_tree_is_better_than_each_of_its_members() -> None:
    requests: list[Logged] = traces("instructcoder", 20)
    merged = replay(requests, open_drafter("merged", {"memory": 2**18}), 32).tokens_per_forward
    for name in ("lookup", "suffix", "context"):
        options = {"num_speculative_tokens": 32}
        assert merged > 1.02 * replay(requests, open_drafter(name, options), 32).tokens_per_forward
