"""Layer skipping: the exit threshold, the skip sets, and states that are not computed twice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from selfdraft.core.rows import chain_rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import build
from selfdraft.drafters.layer_skip import LayerSkip, choose_skip
from selfdraft.drafting.draft_length import ExitThreshold, StepSeconds, ThroughputExit, Verified
from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import read_skip, skip_of
from selfdraft.models import pocket
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams, Skip
from tests.clocks import Ticking
from tests.models import run, tiny_target
from tests.outside import WANTED, outside

PUBLISHED = outside("data/published_skip_layers.json")


@contextmanager
def counted(target: HFTarget) -> Iterator[list[int]]:
    """A list that grows by the number of rows whenever the first block's MLP runs."""
    seen: list[int] = []
    mlp = next(m for name, m in target._view.named_modules() if name.endswith("layers.0.mlp.down_proj"))
    hook = mlp.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    yield seen
    hook.remove()  # the layer is shared with the model


def prefill(target: HFTarget, sequence: Sequence) -> Tensor:
    logits = target.forward(pack([(sequence, len(sequence.tokens), EMPTY)]))
    target.keep(0, 0, range(len(sequence.tokens)))
    sequence.num_cached = len(sequence.tokens)
    return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shapes", [Shapes(4, 64), NATURAL])
def test_verification_resumes_behind_the_drafted_blocks(dtype: torch.dtype, shapes: Shapes) -> None:
    """The same logits and the same cache as without a drafting pass before; fewer rows in the first block."""
    skip = Skip(frozenset({2}), frozenset({2, 3}))
    answers, caches, rows = [], [], []
    for drafted in (True, False):
        target = tiny_target(dtype, shapes=shapes)
        sequence = Sequence([3, 1, 4, 1, 5], 5, SamplingParams(), slot=0)
        prefill(target, sequence)
        sequence.tokens.append(9)
        if drafted:
            for i, token in enumerate((9, 2, 6)):
                target.forward(chain_rows([(0, sequence.num_cached + i, token)]), skip)
        with counted(target) as seen:
            answers.append(target.forward(pack([(sequence, 1, Draft.chain([2, 6, 7], "x"))])))
        caches.append([target.cache.view(layer, 0, 9)[0].clone() for layer in range(4)])
        rows.append(sum(seen))
    assert rows == ([4, 4] if shapes.canonical else [1, 4])  # canonical: one row is padded to four
    for one, other in [(answers[0], answers[1]), *zip(*caches, strict=True)]:
        if shapes.canonical:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("tokens", [[8, 6, 7], [9, 2, 8]])
def test_states_of_other_tokens_are_not_taken(tokens: list[int]) -> None:
    """A drafted row counts only for its own token at its own place, behind the same tokens."""
    target, fresh = tiny_target(), tiny_target()
    logits = []
    for each in (target, fresh):
        sequence = Sequence([3, 1, 4], 3, SamplingParams(), slot=0)
        prefill(each, sequence)
        if each is target:
            for i, token in enumerate((9, 2, 6)):
                each.forward(chain_rows([(0, 3 + i, token)]), Skip(frozenset({2})))
        sequence.tokens.append(tokens[0])
        logits.append(each.forward(pack([(sequence, 1, Draft.chain(tokens[1:], "x"))])))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


def test_states_of_another_place_are_not_taken() -> None:
    """A slot got another request: its first tokens are those that were drafted, but they stand elsewhere."""
    target, fresh = tiny_target(), tiny_target()
    sequence = Sequence([3, 1, 4], 3, SamplingParams(), slot=0)
    prefill(target, sequence)
    for i, token in enumerate((9, 2)):
        target.forward(chain_rows([(0, 3 + i, token)]), Skip(frozenset({2})))
    said = [prefill(each, Sequence([9, 2, 5], 3, SamplingParams(), slot=0)) for each in (target, fresh)]
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=1e-12)


def test_states_that_enter_another_block_are_not_taken() -> None:
    """A draft whose second pass leaves out other blocks than its first."""
    target, fresh = tiny_target(), tiny_target()
    logits = []
    for each in (target, fresh):
        sequence = Sequence([3, 1, 4], 3, SamplingParams(), slot=0)
        prefill(each, sequence)
        sequence.tokens.append(9)
        if each is target:
            each.forward(chain_rows([(0, 3, 9)]), Skip(frozenset({3})))
            each.forward(chain_rows([(0, 4, 2)]), Skip(frozenset({1})))
        logits.append(each.forward(pack([(sequence, 1, Draft.chain([2, 6], "x"))])))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


def test_a_tree_is_not_resumed() -> None:
    target, fresh = tiny_target(), tiny_target()
    draft = Draft.branches([[2, 6], [5, 6]], "x")
    logits = []
    for each in (target, fresh):
        sequence = Sequence([3, 1, 4], 3, SamplingParams(), slot=0)
        prefill(each, sequence)
        sequence.tokens.append(9)
        if each is target:
            each.forward(chain_rows([(0, 3, 9)]), Skip(frozenset({2})))
        logits.append(each.forward(pack([(sequence, 1, draft)])))
    assert torch.equal(logits[0], logits[1])


def test_a_whole_model_draft_is_always_accepted() -> None:
    """Skipping one MLP that does nothing drafts what the target says: the cache is shared as it should be."""
    target = tiny_target()
    last = next(m for name, m in target._view.named_modules() if name.endswith("layers.3.mlp.down_proj"))
    assert isinstance(last, nn.Linear)
    saved = last.weight.clone()
    try:
        with torch.no_grad():
            last.weight.zero_()
        drafter = LayerSkip(target, skip_mlp=[3], num_speculative_tokens=5, confidence_threshold=0.0, adaptive=False)
        (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(max_tokens=61))
    finally:
        with torch.no_grad():
            last.weight.copy_(saved)
    assert sequence.stats.draft_acceptance_rate == 1.0
    assert sequence.stats.mean_acceptance_length > 5


def test_sampled_drafts_share_the_noise() -> None:
    """The same, sampled: the drafter draws with the noise of the target, so nothing is ever rejected."""
    target = tiny_target()
    drafter = LayerSkip(target, skip_mlp=[3], num_speculative_tokens=5, confidence_threshold=0.0, adaptive=False)
    sampling = SamplingParams(temperature=1.0, max_tokens=100, seed=4)
    (sequence,) = run(target, drafter, [[1, 2, 3]], sampling)
    alone = LayerSkip(target, skip_mlp=[3], num_speculative_tokens=5, confidence_threshold=0.0, adaptive=False)
    shifted = SamplingParams(temperature=1.0, max_tokens=100, seed=5)
    (other,) = run(target, alone, [[1, 2, 3]], shifted)
    assert sequence.output != other.output
    assert sequence.stats.draft_acceptance_rate > 0.5


def test_the_threshold_follows_acceptance_and_stays_a_probability() -> None:
    exit_ = ExitThreshold(0.6, 0.9)
    exit_.update(1.0, capped=False)  # mean 0.5, below the target: stricter
    assert exit_.value == pytest.approx(0.9 * 0.6 + 0.1 * 0.61)
    for _ in range(20):
        exit_.update(1.0, capped=False)
    before = exit_.value
    exit_.update(1.0, capped=True)  # at the length limit nothing is learned about being lax
    assert exit_.value == pytest.approx(before, abs=1e-9)
    exit_.update(1.0, capped=False)
    assert exit_.value == pytest.approx(before - 0.001)
    for _ in range(5000):
        exit_.update(0.0, capped=False)
    assert exit_.value == 1.0
    for _ in range(5000):
        exit_.update(1.0, capped=False)
    assert exit_.value == 0.0


def test_low_confidence_ends_the_draft_but_is_still_verified() -> None:
    target = tiny_target()
    drafter = LayerSkip(target, skip_attention=[2], confidence_threshold=1.0, adaptive=False)
    (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(max_tokens=30))
    assert sequence.stats.num_draft_tokens == sequence.stats.num_spec_steps > 0


def test_skip_sets() -> None:
    assert choose_skip(4, None, None, 2) == Skip(frozenset({2, 3}), frozenset({2, 3}))
    assert choose_skip(4, [1], None, None) == Skip(frozenset({1}))
    assert choose_skip(12, None, None, None).first >= 3, "the first blocks stay whole"
    for wrong in ([4], [-1]):
        with pytest.raises(OptionError, match=r"skip_attention holds .*blocks 0 to 3"):
            choose_skip(4, wrong, None, None)
    with pytest.raises(OptionError, match="empty"):
        choose_skip(4, [], [], None)
    with pytest.raises(OptionError, match="exit_layer"):
        choose_skip(4, [1], None, 2)
    with pytest.raises(OptionError, match="exit_layer=4"):
        choose_skip(4, None, None, 4)
    with pytest.raises(OptionError, match="confidence_threshold"):
        build("layer_skip", tiny_target(), {"confidence_threshold": 1.5})
    for no_list in (3, "3"):
        with pytest.raises(OptionError, match=r"skip_mlp=.* is no list of block numbers"):
            build("layer_skip", tiny_target(), {"skip_mlp": no_list})


def test_published_sets_are_taken() -> None:
    if not PUBLISHED.is_file():
        pytest.skip(WANTED)
    for name, sets in json.loads(PUBLISHED.read_text()).items():
        layers = 80 if "70b" in name else 40
        skip = choose_skip(layers, sets["attention"], sets["mlp"], None)
        assert len(skip.attention) == len(sets["attention"])


# sets in files


def test_a_set_out_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    sets = {"a": {"attention": [1, 2], "mlp": [3], "agreement": 0.9}, "b#1": {"attention": [], "mlp": [1]}}
    path.write_text(json.dumps(sets))
    assert choose_skip(4, None, None, None, f"{path}#a") == Skip(frozenset({1, 2}), frozenset({3}))
    drafter = build("layer_skip", tiny_target(), {"skip_set": f"{path}#a"})
    assert isinstance(drafter, LayerSkip)
    assert drafter.skip == Skip(frozenset({1, 2}), frozenset({3}))
    path.write_text(json.dumps({"a": sets["a"]}))
    assert read_skip(path, 4) == drafter.skip
    odd = tmp_path / "odd#name.json"
    odd.write_text(json.dumps({"a": sets["a"]}))
    assert read_skip(odd, 4) == drafter.skip
    assert read_skip(f"{odd}#a", 4) == drafter.skip


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('{"a": {"attention": [1', "", "not valid JSON"),
        ("[1, 2]", "", "holds no skip set"),
        ("{}", "", "holds no skip set"),
        ('{"a": [1]}', "", "'a' is no skip set"),
        ('{"a": {"attention": [1]}}', "", "'mlp' of 'a' must be a list of block numbers, not None"),
        ('{"a": {"attention": [1.5], "mlp": []}}', "", "'attention' of 'a' must be a list"),
        ('{"a": {"attention": [true], "mlp": []}}', "", "'attention' of 'a' must be a list"),
        ('{"a": {"attention": [-1], "mlp": []}}', "", "'attention' of 'a' must be a list"),
        ('{"a": {"attention": [1], "mlp": [4]}}', "", "'mlp' of .* holds 4: the model has blocks 0 to 3"),
        ('{"a": {"attention": [], "mlp": []}}', "", "the skip set is empty"),
        ('{"a": {"attention": [1], "mlp": []}}', "#b", "holds no set 'b'; there are: a"),
        ('{"a": {"attention": [1], "mlp": []}, "b": {"attention": [2], "mlp": []}}', "", "holds 2 sets: name one as"),
    ],
)
def test_broken_sets_are_named(tmp_path: Path, content: str, name: str, said: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(content)
    with pytest.raises(OptionError, match=said) as caught:
        read_skip(f"{path}{name}", 4)
    assert "set.json" in str(caught.value) or "empty" in said
    assert "\n" not in str(caught.value)


def test_sets_that_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.json' cannot be read"):
        build("layer_skip", tiny_target(), {"skip_set": "nowhere.json"})
    with pytest.raises(OptionError, match="no path"):
        build("layer_skip", tiny_target(), {"skip_set": 3})
    for other in ({"exit_layer": 2}, {"skip_mlp": [1]}):
        with pytest.raises(OptionError, match="skip_set names a set"):
            build("layer_skip", tiny_target(), {"skip_set": "a.json", **other})


def test_published_file_is_read() -> None:
    if not PUBLISHED.is_file():
        pytest.skip(WANTED)
    for name, size in {"llama-2-13b": 34, "llama-2-13b-chat": 34, "codellama-13b": 34, "llama-2-70b": 84}.items():
        skip = read_skip(f"{PUBLISHED}#{name}", 80 if "70b" in name else 40)
        assert len(skip.attention) + len(skip.mlp) == size
    with pytest.raises(OptionError, match="holds 4 sets"):
        read_skip(PUBLISHED, 80)
    with pytest.raises(OptionError, match="the model has blocks 0 to 39"):
        read_skip(f"{PUBLISHED}#llama-2-70b", 40)


def test_the_pocket_models_set() -> None:
    """It came out of a search, whose figures are beside it."""
    place = Path(pocket.__file__).parent / "selfdraft_skip.json"
    skip = read_skip(place, 12)
    (record,) = json.loads(place.read_text()).values()
    assert skip == skip_of(record)
    assert record["sets_tried"] >= 1000
    assert 0 < record["c"] < 1 < record["measured"]


def test_the_checkpoints_own_set_comes_first() -> None:
    target = tiny_target()
    target.tuned["layer_skip"] = {"skip_set": Skip(frozenset({3}))}
    assert LayerSkip(target).skip == Skip(frozenset({3}))
    assert LayerSkip(target, skip_mlp=[1]).skip == Skip(frozenset(), frozenset({1}))
    target.tuned.clear()
    assert LayerSkip(target).skip == choose_skip(4, None, None, None)


# the exit that follows the throughput


def simulate(exit_: ThroughputExit | ExitThreshold, link: float, row: float, steps: int, seed: int = 1) -> float:
    """Tokens per second of `steps` rounds of a model whose confidences are true: 1 second a step, rows on top."""
    draw = random.Random(seed)
    tokens = seconds = 0.0
    for step in range(steps):
        confidences: list[float] = []
        accepted, wrong = 0, False
        while len(confidences) < 12:
            chance = draw.choice([0.99, 0.9, 0.6, 0.3])
            confidences.append(chance)
            wrong = wrong or draw.random() > chance
            accepted += not wrong
            if exit_.stops(confidences):
                break
        rows = len(confidences) + 1
        spent = StepSeconds(link * len(confidences), 1 + row * rows, rows)
        exit_.observe([Verified(tuple(confidences), accepted, len(confidences) == 12)], spent)
        if step >= steps // 2:  # the first half is for learning
            tokens += accepted + 1
            seconds += spent.drafting + spent.verifying
    return tokens / seconds


class Fixed(ThroughputExit):
    def observe(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("link", "row"), [(0.05, 0.0), (0.3, 0.0), (0.6, 0.02), (0.1, 0.2)])
def test_the_throughput_exit_comes_near_the_best_threshold(link: float, row: float) -> None:
    """Nobody tells it a target rate; the best fixed one of 20 thresholds is hardly faster."""
    best = max(simulate(Fixed(value / 20), link, row, 2000) for value in range(21))
    learned = ThroughputExit(0.6)
    assert simulate(learned, link, row, 2000) >= 0.96 * best
    assert 0.0 <= learned.value <= 1.0


def test_the_throughput_exit_follows_cost_and_stays_a_probability() -> None:
    cheap, dear = ThroughputExit(0.6), ThroughputExit(0.6)
    simulate(cheap, 0.02, 0.0, 500)
    simulate(dear, 0.7, 0.0, 500)
    assert cheap.value < 0.3 < dear.value
    for _ in range(200):
        dear.observe([Verified((0.9,), 0, False)], StepSeconds(100.0, 0.001, 2))
    assert dear.value == 1.0
    assert dear.confidence.chance(0.9) < 0.3, "confidence that is not borne out is not believed"
    for _ in range(200):
        cheap.observe([Verified((0.9,), 1, False)], StepSeconds(0.0, 1.0, 2))
    assert 0.0 <= cheap.value < 0.01
    before = cheap.value
    cheap.observe([], StepSeconds(5.0, 5.0, 1))
    assert cheap.value == before


def test_exit_policies_keep_their_state_and_the_text() -> None:
    """Two requests, one after the other: the second starts where the first ended, and both have the plain text."""
    prompts = [[1, 2, 3], [5, 4, 3, 2]]
    sampling = SamplingParams(max_tokens=40)
    plain = [sequence.output for sequence in run(tiny_target(), "none", prompts, sampling)]
    for policy in ("target", "throughput"):
        target = tiny_target()
        drafter = LayerSkip(target, exit_policy=policy, skip_mlp=[2])
        drafter.clock = Ticking()
        values = [drafter.exit.value]
        states = []
        for prompt, wanted in zip(prompts, plain, strict=True):
            (sequence,) = run(target, drafter, [prompt], sampling)
            assert sequence.output == wanted
            values.append(drafter.exit.value)
            states.append(repr(drafter.exit))
        assert values[1] != values[0], policy
        assert states[1] != states[0], policy
        if isinstance(drafter.exit, ThroughputExit):
            assert drafter.exit.steps.steps > 10
            assert 0.0 < drafter.exit.links.value < 2.0


def test_exit_policies_are_checked() -> None:
    with pytest.raises(OptionError, match="exit_policy='speed' is unknown; there are target and throughput"):
        build("layer_skip", tiny_target(), {"exit_policy": "speed"})
    with pytest.raises(OptionError, match="adaptive=False belongs to"):
        build("layer_skip", tiny_target(), {"exit_policy": "throughput", "adaptive": False})
