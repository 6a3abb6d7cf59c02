"""Mask tokens: their adapter acts on their rows and on no others, and decoding computes what training computed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from selfdraft import LLM, SamplingParams
from selfdraft.core.rows import Rows, chain_rows, group_rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import build
from selfdraft.errors import LoadError
from selfdraft.models import adapters as adapting
from selfdraft.models.adapters import CARD, EMBEDDINGS, MaskAdapter, gate_rows, load_adapter, load_adapters
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.models.identity import base_hash
from selfdraft.models.pocket import POCKET
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter, Target
from selfdraft.train.output import write_adapter
from selfdraft.train.run import make_student
from selfdraft.train.settings import Settings
from selfdraft.train.student import Batch, Student
from selfdraft.types import Budget, Skip
from tests.clocks import Ticking, on_passes
from tests.models import VOCAB, random_adapters, run, tiny_llama
from tests.test_oracle import MIXED, WAYS, decode, prompts, same_text, target_for

SPACE = range(VOCAB, VOCAB + 4)
S3D = range(VOCAB + 4, VOCAB + 7)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"natural": NATURAL, "canonical": Shapes(4, 64)}
SKIP = Skip(frozenset({1, 2}), frozenset({1, 2}))


def bare(adapter: MaskAdapter) -> MaskAdapter:
    """The same embeddings without an adapter: mask tokens as plain probes."""
    return replace(adapter, layers={}, whole_spans=False)


def targets(model: PreTrainedModel, shapes: Shapes, slots: int = 2) -> list[HFTarget]:
    """One whose masks have strong random adapters, one whose masks are probes as any others."""
    strong = random_adapters(model)
    return [
        on_passes(HFTarget(model, slots=slots, shapes=shapes, adapters=each)) for each in (strong, [*map(bare, strong)])
    ]


def known(target: HFTarget, tokens: list[int], slot: int = 0) -> Sequence:
    """A sequence of which all but the last token is in the cache."""
    sequence = Sequence(list(tokens), len(tokens), SamplingParams(), slot=slot)
    if len(tokens) > 1:
        target.forward(pack([(sequence, len(tokens) - 1, EMPTY)]))
        target.keep(slot, 0, range(len(tokens) - 1))
        sequence.num_cached = len(tokens) - 1
    return sequence


TREE = Draft((7, 8, 9), (-1, -1, 1), ("x",) * 3, 3)


def crowded(target: HFTarget) -> Rows:
    """Two slots; candidates in a tree, masks of both adapters under the root and under candidates, in one pass."""
    first, second = known(target, [3, 1, 4, 1, 5]), known(target, [2, 7, 1, 8], slot=1)
    masks = [*SPACE, S3D[0], S3D[1], *SPACE[:2]]
    draft = TREE.with_probes(masks, [-1, 0, 1, 2, -1, 4, -3, 6], "x")
    return pack([(first, 1, draft), (second, 1, Draft.chain([5, 6], "x").with_probes(S3D, [-1, 0, 1], "x"))])


def plain_rows(rows: Rows) -> list[int]:
    return [row for row, token in enumerate(rows.tokens) if token < VOCAB]


def remembered(target: HFTarget, rows: Rows, layer: int) -> list[Tensor]:
    """Keys and values of the prefix and of the rows that hold tokens, not masks, slot by slot."""
    found = []
    for span in rows.spans:
        keys, values = target.cache.view(layer, span.slot, span.base + span.size)
        mine = [row - span.start for row in plain_rows(rows) if span.start <= row < span.start + span.size]
        places = [*range(span.base), *(span.base + row for row in mine)]
        found += [keys[..., places, :].clone(), values[..., places, :].clone()]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_other_rows_keep_their_bits(shapes: str, dtype: str) -> None:
    said, caches = [], []
    for target in targets(tiny_llama(DTYPES[dtype]), SHAPES[shapes]):
        rows = crowded(target)
        said.append(target.forward(rows).clone())
        caches.append([tensor for layer in range(4) for tensor in remembered(target, rows, layer)])
    plain = plain_rows(rows)
    masks = [row for row in range(len(rows)) if row not in plain]
    assert torch.equal(said[0][plain], said[1][plain])
    assert all(torch.equal(one, other) for one, other in zip(*caches, strict=True))
    apart = (said[0][masks] - said[1][masks]).abs().amax(-1)
    assert (apart > 0.01).all(), "every mask row feels its adapter"


def test_each_mask_has_its_own_adapter_only() -> None:
    """Masks of both in one pass: those of one say the same when the adapter of the other is not there."""
    model, strong = tiny_llama(), random_adapters(tiny_llama())
    choices = {"both": strong, "space": [strong[0], bare(strong[1])], "s3d": [bare(strong[0]), strong[1]]}
    said = {}
    for name, adapters in choices.items():
        target = HFTarget(model, slots=2, adapters=adapters)
        rows = crowded(target)
        said[name] = target.forward(rows).clone()
    tokens = rows.tokens
    for name, mine in (("space", SPACE), ("s3d", S3D)):
        own = [row for row, token in enumerate(tokens) if token in mine]
        others = [row for row, token in enumerate(tokens) if token >= VOCAB and token not in mine]
        torch.testing.assert_close(said["both"][own], said[name][own], rtol=0, atol=1e-12)
        assert not torch.allclose(said["both"][others], said[name][others])


def test_in_a_skipped_pass_the_whole_span_of_s3d_is_gated() -> None:
    rows = group_rows([(0, 5, 3, S3D), (1, 4, 9, ()), (2, 7, 8, SPACE[:2]), (3, 7, 8, S3D[:1])], "x")
    strong = random_adapters(tiny_llama())

    def gated(*, skipped: bool) -> dict[int, list[int]]:
        return gate_rows(rows, strong, VOCAB, skipped=skipped)

    assert list(rows.tokens) == [3, *S3D, 9, 8, *SPACE[:2], 8, S3D[0]]
    assert gated(skipped=True) == {0: [6, 7], 1: [0, 1, 2, 3, 8, 9]}
    assert gated(skipped=False) == {0: [6, 7], 1: [1, 2, 3, 9]}


def test_a_skipped_pass_obeys_the_gate() -> None:
    """The first row of S3D's group feels the adapter; that of SPACE's group, and a neighbour without masks, do not."""
    said = []
    for target in targets(tiny_llama(), NATURAL, slots=3):
        for slot in range(3):
            known(target, [3, 1, 4, 1, 5], slot)
        rows = group_rows([(0, 4, 5, S3D), (1, 4, 5, SPACE[:2]), (2, 4, 5, ())], "x")
        said.append(target.forward(rows, SKIP).clone())
    same = [torch.equal(one, other) for one, other in zip(*said, strict=True)]
    assert same == [False, False, False, False, True, False, False, True]


def stale(passes: SequenceOf[str], shapes: Shapes = NATURAL) -> tuple[Tensor, Tensor]:
    """Logits of a verification after these drafting passes on its slot, and without any."""
    answers = []
    for drafted in (True, False):
        target = HFTarget(tiny_llama(), shapes=shapes, adapters=random_adapters(tiny_llama()))
        sequence = known(target, [3, 1, 4, 1, 5, 9])
        for name in passes if drafted else ():
            if name == "s3d":
                target.forward(group_rows([(0, 5, 9, S3D)], "x"), SKIP)
            else:
                target.forward(chain_rows([(0, 5, 9)]), SKIP)
        answers.append(target.forward(pack([(sequence, 1, Draft.chain([2, 6], "x"))])).clone())
    return answers[0], answers[1]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("passes", [["layer_skip", "s3d"], ["s3d"], ["s3d", "layer_skip"], ["layer_skip"]])
def test_no_state_of_a_gated_pass_is_built_on(passes: list[str], shapes: str) -> None:
    """S3D overwrites what a layer-skip draft has computed of the first blocks; what it writes is no state at all."""
    drafted, fresh = stale(passes, SHAPES[shapes])
    torch.testing.assert_close(drafted, fresh, rtol=0, atol=1e-11)


class Overwritten:
    """Drafts with layer skipping, then lets S3D run over the same slots, and proposes what the first one drafted."""

    def __init__(self, target: Target) -> None:
        self.first = build("layer_skip", target, {"skip_mlp": [3], "confidence_threshold": 0.0, "adaptive": False})
        self.second = build("s3d", target)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts = self.first.draft(sequences, budgets)
        self.second.draft(sequences, budgets)
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.first.observe(sequences, results)


def test_the_text_is_plain_when_a_gated_pass_overwrites_a_draft() -> None:
    target = target_for(WAYS["tight"])
    same_text(decode(target, Overwritten(target), MIXED[:6], WAYS["tight"]), MIXED[:6])


class Turns:
    """Deals sequences to drafters in turn; with `restless` each sequence changes its drafter at every step."""

    def __init__(self, target: Target, names: SequenceOf[str], *, restless: bool) -> None:
        self.drafters = [build(name, target) for name in names]
        self.restless = restless
        self.turn: dict[int, int] = {}
        self.used: set[str] = set()

    def _mine(self, sequence: Sequence) -> Drafter:
        return self.drafters[self.turn.setdefault(id(sequence), len(self.turn)) % len(self.drafters)]

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts: dict[int, Draft] = {}
        for drafter in self.drafters:
            mine = [(s, b) for s, b in zip(sequences, budgets, strict=True) if self._mine(s) is drafter]
            if mine:
                made = drafter.draft([s for s, _ in mine], [b for _, b in mine])
                drafts |= {id(s): draft for (s, _), draft in zip(mine, made, strict=True)}
        self.used |= {source for draft in drafts.values() for source in draft.sources}
        return [drafts[id(s)] for s in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for drafter in self.drafters:
            mine = [(s, r) for s, r in zip(sequences, results, strict=True) if self._mine(s) is drafter]
            drafter.observe([s for s, _ in mine], [r for _, r in mine])
        for sequence in sequences if self.restless else ():
            self.turn[id(sequence)] += 1


NAMES = ("s3d", "space", "lookup", "layer_skip")


@pytest.mark.parametrize("restless", [False, True], ids=["loyal", "restless"])
@pytest.mark.parametrize("way", ["batch", "tight", "chunk5"])
def test_drafters_mixed_in_one_batch(way: str, restless: bool) -> None:
    """One target, one pass for all: masks of two adapters beside rows that must not feel them."""
    target = target_for(WAYS[way])
    drafter = Turns(target, NAMES, restless=restless)
    same_text(decode(target, drafter, MIXED, WAYS[way]), MIXED)
    assert drafter.used == set(NAMES)


def trained() -> list[Path]:
    return [POCKET / f"selfdraft_{name}" for name in ("space", "s3d")]


@pytest.mark.skipif(not all(map(Path.is_dir, trained())), reason="the package holds no trained adapters for pocket")
@pytest.mark.parametrize("name", ["space", "s3d"])
def test_the_trained_adapters_of_pocket(name: str) -> None:
    """Found by themselves; the text is that of plain decoding, alone and in a batch, and masks guess it well."""
    llm = LLM("pocket", drafter=name, max_num_seqs=4, clock=Ticking())
    texts = [llm.encode(text) for text in ("def fibonacci(n):\n", "Once upon a time", "The quick brown fox")]
    for sampling in (SamplingParams(max_tokens=60), SamplingParams(max_tokens=60, temperature=0.9, seed=3)):
        plain = run(llm.target, "none", texts, sampling)
        for slots in (1, 3):
            drafted = run(llm.target, name, texts, sampling, slots=slots)
            assert [s.output for s in drafted] == [s.output for s in plain]
        assert sum(s.num_output_tokens for s in drafted) / sum(s.stats.num_steps for s in drafted) > 1.3


@cache
def tiny_mistral() -> MistralForCausalLM:
    """A window of 6 tokens: mask rows and their anchors see different prefixes."""
    torch.manual_seed(4)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=6,
        max_position_embeddings=256,
    )
    with torch.inference_mode(False):
        return MistralForCausalLM(config).double().eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "mistral": tiny_mistral}
RECIPES = {
    "space": Settings(recipe="space", masks=4, rank=3, link=5, groups=3),
    "space-bare": Settings(recipe="space", masks=2, rank=0, link=0, groups=3),
    "s3d": Settings(recipe="s3d", masks=3, rank=3, link=5, groups=3, skip_widths=(2,)),
    "s3d-deep": Settings(recipe="s3d", masks=2, rank=3, link=0, groups=3, skip_widths=(1, 3)),
}


def moved(model: PreTrainedModel, settings: Settings) -> Student:
    """A student whose adapter and link do something, as after training."""
    student = make_student(model, settings)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "link_up" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5)
    return student


def lesson(skip: Skip | None, sizes: tuple[int, ...] = (3, 3)) -> Batch:
    """Two texts of different lengths, the shorter one padded, with anchors at their starts, ends and between.

    The groups come in lots of `sizes`; the last lot is not full.
    """
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, VOCAB, (2, 20), generator=draw)
    tokens[1, 14:] = 0
    return Batch(tokens, torch.tensor([[0, 9, 17], [1, 7, 12]]), torch.tensor([20, 14]), sizes, skip)


def decoded(target: HFTarget, text: list[int], anchor: int, settings: Settings, skip: Skip | None) -> Tensor:
    """What the rows of a group under `anchor` say when decoding, [size, vocab], the link's shift for `text` added."""
    sequence = known(target, text[: anchor + 1])
    masks = target.extras.masks_for(settings.recipe).ids
    assert len(masks) == settings.masks
    if settings.recipe == "s3d":
        said = target.forward(group_rows([(0, anchor, text[anchor], masks)], "x"), skip)
        before = range(anchor, anchor + len(masks) + 1)
    else:
        draft = EMPTY.with_probes(masks, range(-1, len(masks) - 1), "x")
        said = target.forward(pack([(sequence, 1, draft)]))[1:]
        before = range(anchor + 1, anchor + len(masks) + 1)
    rows = []
    for row, place in zip(said, before, strict=True):
        shift = target.extras.masks_for(settings.recipe).shift(text[min(place, len(text) - 1)], torch.arange(VOCAB))
        rows.append(row if shift is None else row + shift)
    return torch.stack(rows)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MODELS)
def test_training_is_decoding(family: str, recipe: str, tmp_path: Path) -> None:
    """Rows of packed groups say what mask rows say under the same token with the adapter read back from its folder."""
    model, settings = MODELS[family](), RECIPES[recipe]
    student = moved(model, settings)
    write_adapter(tmp_path, student, model, settings, {})
    adapter = load_adapter(tmp_path, model)
    assert bool(adapter.layers) == bool(settings.rank)
    sizes = (settings.masks, max(1, settings.masks - 1))
    for skip in settings.skips(4):
        batch = lesson(skip, sizes)
        with torch.no_grad():
            answers = student(batch)
        said = {
            (*name.tolist(), int(place)): row
            for row, (name, place) in enumerate(zip(answers.groups, answers.places, strict=True))
        }
        assert len(said) == len(answers.said) == len(answers.wanted)
        wanted = set()
        for row, anchors in enumerate(batch.anchors.tolist()):
            text = batch.tokens[row, : batch.lengths[row]].tolist()
            with torch.inference_mode():
                stock = model(torch.tensor([text]), use_cache=False).logits[0]
            for group, anchor in enumerate(anchors):
                target = HFTarget(model, adapters=[adapter])
                rows = decoded(target, text, anchor, settings, skip)
                for i in range(sizes[group % 2] + (settings.recipe == "s3d")):
                    place = anchor + i + (settings.recipe == "space")
                    if place < len(text) - 1:
                        wanted.add((row, group, i))
                        mine = said[row, group, i]
                        torch.testing.assert_close(
                            answers.said[mine], rows[i], rtol=0, atol=1e-7
                        )  # the link is float32
                        torch.testing.assert_close(answers.wanted[mine], stock[place], rtol=0, atol=1e-9)
        assert {*said} == wanted
        assert len(wanted) >= 3 * settings.masks


def test_the_base_model_is_not_changed_by_training() -> None:
    before = {name: value.clone() for name, value in tiny_llama().state_dict().items()}
    student = moved(tiny_llama(), RECIPES["space"])
    optimizer = torch.optim.SGD(student.trainable(), lr=10.0)
    student(lesson(None)).said.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama().state_dict().items())
    names = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {name.rpartition("lora_")[2][:1] or name for name in names} >= {"A", "B"}
    assert {"masks", "link_down", "link_up"} <= names


def test_peft_reads_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install selfdraft[train]")
    student = moved(tiny_llama(), RECIPES["space"])
    write_adapter(tmp_path, student, tiny_llama(), RECIPES["space"], {})
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_llama()), tmp_path)
    layers = load_adapter(tmp_path, tiny_llama()).layers
    modules = dict(loaded.get_base_model().named_modules())
    assert len(layers) == 4 * 7
    for path, (down, up) in layers.items():
        delta = modules[path].get_delta_weight("default")
        torch.testing.assert_close((down @ up).T.double(), delta.double(), rtol=0, atol=1e-7)
        assert delta.abs().max() > 0.01


def test_the_same_seed_is_the_same_start() -> None:
    """Whatever the process has drawn before; and nothing is drawn from its generator."""
    starts = []
    for other in (1, 2):
        torch.manual_seed(other)
        state = torch.random.get_rng_state()
        starts.append([p.detach().clone() for p in make_student(tiny_llama(), RECIPES["space"]).trainable()])
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    third = make_student(tiny_llama(), replace(RECIPES["space"], seed=1)).trainable()
    assert not torch.equal(third[0], starts[0][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    settings = RECIPES["s3d"]
    write_adapter(place, moved(tiny_llama(), settings), tiny_llama(), settings, {"advice": {"num_masks": 2}})
    return place


def edit(place: Path, name: str, **changes: object) -> None:
    content = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps({**content, **changes}))


def reshape(place: Path, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({key: value.contiguous() for key, value in change(load_file(place / name)).items()}, place / name)


def truncate(place: Path, name: str) -> None:
    (place / name).write_bytes((place / name).read_bytes()[:-50])


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no card": (lambda p: (p / CARD).unlink(), f"no adapter folder: {CARD} is missing"),
    "no masks": (lambda p: (p / EMBEDDINGS).unlink(), f"{EMBEDDINGS} is missing"),
    "no adapter": (lambda p: (p / TENSORS).unlink(), f"{TENSORS} is missing"),
    "no config": (lambda p: (p / CONFIG).unlink(), f"{CONFIG} is missing"),
    "card no JSON": (lambda p: (p / CARD).write_text("{"), f"{CARD} cannot be read"),
    "card no text": (lambda p: (p / CARD).write_bytes(b"\xff\xfe\x00"), f"{CARD} cannot be read"),
    "card a list": (lambda p: (p / CARD).write_text("[]"), "not a JSON object"),
    "card empty": (lambda p: (p / CARD).write_text("{}"), "'method' and 'model' are missing"),
    "method": (lambda p: edit(p, CARD, method="medusa"), "method 'medusa' is unknown; there are s3d, space"),
    "advice": (lambda p: edit(p, CARD, advice=[1]), "'advice' is not a JSON object"),
    "other model": (lambda p: edit(p, CARD, model="f00"), "trained for another model (f00, this one is"),
    "config no JSON": (lambda p: (p / CONFIG).write_text("no"), f"{CONFIG} cannot be read"),
    "masks truncated": (lambda p: truncate(p, EMBEDDINGS), f"{EMBEDDINGS} cannot be read"),
    "adapter truncated": (lambda p: truncate(p, TENSORS), f"{TENSORS} cannot be read"),
    "adapter empty": (lambda p: (p / TENSORS).write_bytes(b""), f"{TENSORS} cannot be read"),
    "hidden": (
        lambda p: reshape(p, EMBEDDINGS, lambda t: {**t, "embeddings": t["embeddings"][:, :40]}),
        "mask embeddings of shape (3, 40); the model needs [masks, 48]",
    ),
    "no embeddings": (lambda p: reshape(p, EMBEDDINGS, lambda t: {"x": t["embeddings"]}), "shape None"),
    "half a link": (
        lambda p: reshape(p, EMBEDDINGS, lambda t: {k: v for k, v in t.items() if k != "link_up"}),
        "a link of shapes (48, 5) and (0,)",
    ),
    "dora": (
        lambda p: edit(p, CONFIG, use_dora=True),
        "only plain LoRA can be gated, this one has 'use_dora'",
    ),
    "rslora": (lambda p: edit(p, CONFIG, use_rslora=True), "this one has 'use_rslora'"),
    "ia3": (lambda p: edit(p, CONFIG, peft_type="IA3"), "this one has 'IA3'"),
    "no rank": (lambda p: edit(p, CONFIG, r=None), "lora_alpha=3 and r=None are no numbers"),
    "wrong width": (lambda p: reshape(p, TENSORS, lambda t: {k: v[:, :-1] for k, v in t.items()}), "does not fit"),
    "wrong layer": (
        lambda p: reshape(p, TENSORS, lambda t: {k.replace("layers.0", "layers.9"): v for k, v in t.items()}),
        "layer 'model.layers.9.",
    ),
    "one half": (
        lambda p: reshape(p, TENSORS, lambda t: dict(list(t.items())[1:])),
        "is no half of a plain LoRA pair",
    ),
    "a vector": (
        lambda p: reshape(p, TENSORS, lambda t: {**t, "base_model.model.lm_head.lora_magnitude_vector": torch.ones(3)}),
        "is no half of a plain LoRA pair",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_in_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_adapter(tmp_path, tiny_llama()).method == "s3d"
    spoil, words = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(LoadError) as raised:
        load_adapter(tmp_path, tiny_llama())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_adapter_knows_its_model(folder: Path) -> None:
    """In any type, but no other weights."""
    for dtype in DTYPES.values():
        assert load_adapter(folder, tiny_llama(dtype)).advice == {"num_masks": 2}
    with pytest.raises(LoadError, match="trained for another model"):
        load_adapter(folder, tiny_llama(seed=1))
    with pytest.raises(LoadError, match="is missing there"):
        load_adapter("/nowhere", tiny_llama())


def test_adapters_that_come_with_the_package_are_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model alone, and behind those that are named."""
    model = tiny_llama()
    monkeypatch.setattr(adapting, "SHIPPED", tmp_path)
    assert load_adapters([], model) == []
    shutil.copytree(folder, tmp_path / base_hash(model) / "selfdraft_s3d")
    assert [one.method for one in load_adapters([], model)] == ["s3d"]
    assert load_adapters([], tiny_llama(seed=1)) == []
    named = replace(load_adapter(folder, model), advice={"num_masks": 1})
    assert load_adapters([named], model) == [named]


def test_every_adapter_of_the_package_lies_where_its_model_finds_it() -> None:
    folders = [place.parent for place in adapting.SHIPPED.glob(f"*/*/{CARD}")]
    assert folders
    for place in folders:
        card = json.loads((place / CARD).read_text())
        assert (card["model"], f"selfdraft_{card['method']}") == (place.parent.name, place.name)
        places = card["settings"]["masks"] + (card["method"] == "s3d")  # its short pass guesses the next token, too
        assert len(card["held_out_acceptance"]) == places


def test_the_link_of_a_token_is_the_same_whenever_it_is_asked() -> None:
    """States of tokens are kept, and let go of when there are too many."""
    target = HFTarget(tiny_llama(), adapters=random_adapters(tiny_llama())[:1])
    (masks,) = target.extras.mask_tokens.values()
    ids = torch.arange(3, 9)
    fresh = [masks.shift(token, ids) for token in range(12)]
    assert not torch.equal(fresh[0], fresh[1])  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfdraft.models.target.LINK_STATES", 5)
        for token in [*range(12), 3, 3, 0]:
            assert torch.equal(masks.shift(token, ids), fresh[token])  # type: ignore[arg-type]


def test_advice_is_followed(folder: Path) -> None:
    target = on_passes(HFTarget(tiny_llama(), adapters=[load_adapter(folder, tiny_llama())]))
    drafter = build("s3d", target)
    assert len(drafter.short.ids) == 2  # type: ignore[attr-defined]
    assert [s.output for s in run(target, drafter, prompts()[:2], SamplingParams(max_tokens=10))] == [
        s.output for s in run(target, "none", prompts()[:2], SamplingParams(max_tokens=10))
    ]


@pytest.fixture(autouse=True)
def no_gradients_left() -> Iterator[None]:
    """Students freeze the shared tiny models; nothing else may stay."""
    yield
    assert all(p.grad is None for p in tiny_llama().parameters())
