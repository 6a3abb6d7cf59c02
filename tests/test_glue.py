"""Passes of fixed shape as tapes with fused glue: the text, the choice at load, the kernels, how many there are."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Set
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfdraft.core.rows import Rows, tree_rows
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters import build
from selfdraft.errors import RunnerUnavailable
from selfdraft.models import load
from selfdraft.models.attention import Scores
from selfdraft.models.graph.glue_source import source_of
from selfdraft.models.graph.graph_runner import CLASSES, GraphSettings
from selfdraft.models.graph.plain_glue import Glue, Memory, plain_glue
from selfdraft.models.graph.plain_glue import Rows as RowProgram
from selfdraft.models.graph.plain_tree_attention import Reach
from selfdraft.models.graph.tape_pass import TapePass
from selfdraft.models.runner import codes
from selfdraft.models.runner.graph import VIEWS
from selfdraft.models.runner.tape import Buffer, Instr, Kind, Operand, Slot
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.clocks import Ticking, on_passes
from tests.glue_kernels import ARCHITECTURES, HIDDEN, SEEN
from tests.graphs import settings
from tests.models import random_adapters, run, tiny_llama
from tests.test_families import FAMILIES, NEW
from tests.test_families import build as build_family
from tests.test_families import prompts as family_prompts
from tests.test_graphs import ONE, replays
from tests.test_oracle import MIXED, OPTIONS, Way, decode, same_text

ALL = os.environ.get("SELFDRAFT_TEST_GRAPHS") == "all"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install 'selfdraft[gpu]'"
)
ERROR, UNIT = 1e-6, 2**-8
"""Relative to the largest number of a row: in float32, and the unit of bfloat16."""
PLAIN = [name for name, family in FAMILIES.items() if not family.experts]
SOME = ("mistral", "gemma2", "gemma3", "phi", "gpt2", "opt", "cohere")


def glued(slots: int = 1, dtype: torch.dtype = torch.float32, **changes: object) -> HFTarget:
    """A tiny LLaMA through graphs of tapes."""
    model = tiny_llama(dtype)
    made = settings(glue=plain_glue, **changes)
    return on_passes(HFTarget(model, slots=slots, adapters=random_adapters(model), graphs=made))


# --- the text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [(ONE,), CLASSES], ids=["one", "many"])
@pytest.mark.parametrize("name", ["none", "lookup", "merged", "space", "s3d", "layer_skip"])
def test_the_text_is_that_of_an_independent_loop(name: str, classes: tuple[int, ...]) -> None:
    """With trees, masks and skipped sublayers; the loop computes in float64, far from ties."""
    target = glued(4, classes=classes)
    same_text(decode(target, build(name, target, OPTIONS.get(name)), MIXED, Way(slots=4)), MIXED)
    assert replays(target) > 10
    assert target.graphs is not None
    tapes = target.graphs._tapes.values()
    assert all(isinstance(tape, TapePass) for _, tape in tapes)
    assert len(tapes) >= {"space": 2, "layer_skip": 2, "s3d": 2}.get(name, 1)


@pytest.mark.parametrize("name", PLAIN if ALL else SOME)
def test_every_family_says_what_its_stock_forward_says(name: str) -> None:
    """Logits of a tree, of masks, and of a plain row, in float32 and bfloat16."""
    family = FAMILIES[name]
    for dtype, near in ((torch.float32, 2e-5), (torch.bfloat16, 0.08)):
        model = build_family(family.config, family.options, family.model, dtype)
        said = []
        for glue in (plain_glue, None):
            graphs = settings(glue=glue, piece=16, shortest=32, classes=(8,))
            target = HFTarget(model, adapters=random_adapters(model), graphs=graphs)
            assert ("small kernels fused" in target.runs) == (glue is not None), target.runs
            said.append(passes(target))
        spread = said[1].double().abs().max()
        assert (said[0].double() - said[1].double()).abs().max() < near * spread


def passes(target: HFTarget) -> Tensor:
    """Answers of rows behind a prompt of 5: a plain one, a tree, and the tree with masks."""
    tree = Draft((7, 8, 9), (-1, -1, 1), ("",) * 3, 3)
    probed = tree.with_probes([*target.extras.masks_for("space").ids][:2], [-1, 0], "space")
    prompt = family_prompts()[0]
    target.forward(Rows((*prompt,), (*range(5),), tree_rows([(0, 0, 1, Draft.chain(prompt[1:], ""))]).spans, (4,)))
    target.keep(0, 0, range(5))
    rows = [tree_rows([(0, 5, 11, draft)]) for draft in (EMPTY, tree, probed)]
    return torch.cat([target.forward(one) for one in rows])


def test_rows_whose_gate_is_closed_keep_their_bits() -> None:
    """A row beside one with masks, and alone; of one class of rows both passes are of the same shape."""
    target = glued(2, classes=(ONE,))
    masks = Draft((7,), (-1,), ("",), 1).with_probes([*target.extras.masks_for("space").ids][:1], [-1], "space")
    alone, beside = (target.forward(tree_rows([(0, 0, 5, EMPTY), *more])) for more in ([], [(1, 0, 6, masks)]))
    assert torch.equal(alone[0], beside[0])


def test_a_family_decodes_the_text_of_its_stock_forward() -> None:
    """Gemma 2: (1 + w) in its norms, soft caps, windows; with masks."""
    family = FAMILIES["gemma2"]
    model = build_family(family.config, family.options, family.model, torch.float32)
    texts = []
    for glue in (plain_glue, None):
        graphs = settings(glue=glue, piece=16, shortest=32)
        target = on_passes(HFTarget(model, slots=2, adapters=random_adapters(model), graphs=graphs))
        texts.append(
            [one.output for one in run(target, "space", family_prompts(), SamplingParams(max_tokens=NEW), slots=2)]
        )
    assert texts[0] == texts[1]


# --- what is no tape --------------------------------------------------------------------------------------------


def test_a_family_that_is_no_tape_runs_its_stock_forward() -> None:
    family = FAMILIES["mixtral"]
    model = build_family(family.config, family.options, family.model, torch.float32)
    target = on_passes(HFTarget(model, slots=2, graphs=settings(glue=plain_glue)))
    assert target.runs.startswith("fast: graphs, classes of 1 to 128 rows; small kernels are not fused: ")
    stock = on_passes(HFTarget(model, slots=2, graphs=settings()))
    texts = [run(one, "lookup", family_prompts(), SamplingParams(max_tokens=NEW), slots=2) for one in (target, stock)]
    assert [one.output for one in texts[0]] == [one.output for one in texts[1]]
    assert replays(target) > 0


def test_a_pass_with_masks_that_is_no_tape_runs_its_stock_forward() -> None:
    """One kind of pass falls back, the others do not."""

    def some(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> RowProgram:
        if any(one.slot == Slot.EMBEDS for instr in instrs for one in instr.reads):
            raise RunnerUnavailable("starts from embeddings")
        return plain_glue(instrs, outside)

    model = tiny_llama(torch.float32)
    target = on_passes(HFTarget(model, slots=4, adapters=random_adapters(model), graphs=settings(glue=some)))
    same_text(decode(target, build("space", target), MIXED, Way(slots=4)), MIXED)
    assert target.graphs is not None
    kinds = Counter(type(tape) for _, tape in target.graphs._tapes.values())
    assert kinds == {TapePass: 1, str: 1}
    assert target.runs.endswith("small kernels fused")


def test_a_kernel_that_breaks_at_its_first_launch_is_given_up_for_its_kind_of_pass_alone() -> None:
    """The choice at load is made with plain passes; a kernel of one with masks is compiled when it is first run."""

    def some(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> RowProgram:
        masked = any(one.slot == Slot.EMBEDS for instr in instrs for one in instr.reads)
        return broken if masked else plain_glue(instrs, outside)

    def broken(memory: Memory, count: int) -> None:
        raise ValueError("no such instruction")

    model = tiny_llama(torch.float32)
    target = on_passes(HFTarget(model, slots=4, adapters=random_adapters(model), graphs=settings(glue=some)))
    same_text(decode(target, build("space", target), MIXED, Way(slots=4)), MIXED)
    assert target.graphs is not None
    assert sorted(str(tape) for _, tape in target.graphs._tapes.values() if isinstance(tape, str)) == [
        "no such instruction"
    ]
    assert target.runs.endswith("small kernels fused")
    assert replays(target) > 0


def test_types_that_tapes_do_not_compute_in() -> None:
    assert "computes in float32 and bfloat16, not in torch.float64" in glued(dtype=torch.float64).runs


# --- the choice at load -----------------------------------------------------------------------------------------


def opened(monkeypatch: pytest.MonkeyPatch, glue: Glue, clock: Ticking) -> HFTarget:
    """What is done at load on a GPU, with a capture that needs none."""

    def here(device: torch.device, dtype: torch.dtype, classes: tuple[int, ...] = CLASSES) -> GraphSettings:
        return settings(classes=classes, places=64, glue=glue)

    monkeypatch.setattr(load, "cuda_settings", here)
    sizes = load.Sizes(slots=2, context=None, adapters=(), kv_cache_dtype="auto", clock=clock)
    return load._open_graphs(tiny_llama(torch.float32), "bitwise", **sizes)


def test_the_quicker_way_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(1e-3)

    def slow(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> RowProgram:
        program = plain_glue(instrs, outside)

        def rows(memory: Memory, count: int) -> None:
            clock()
            program(memory, count)

        return rows

    said = "two blocks take 0.050 ms with small kernels fused, 0.050 ms without"
    target = opened(monkeypatch, plain_glue, clock)
    assert target.runs == f"fast: graphs, one class of 64 rows, small kernels fused ({said})"
    assert target.exactness.level == "bitwise"
    target = opened(monkeypatch, slow, clock)
    assert target.graphs is not None
    assert target.graphs.settings.glue is None
    assert target.runs.startswith("fast: graphs, one class of 64 rows; small kernels are not fused: two blocks take ")


def test_glue_that_is_wrong_or_breaks_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof at load is of the passes that will be used; without glue they are proved again."""

    def bent(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> RowProgram:
        program = plain_glue(instrs, outside)

        def rows(memory: Memory, count: int) -> None:
            program(memory, count)
            for instr in instrs:
                if instr.code == codes.GLU:
                    memory[instr.target].mul_(1.05)

        return rows

    def broken(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> RowProgram:
        def rows(memory: Memory, count: int) -> None:
            raise ValueError("no kernel image is available")

        return rows

    for glue, why in ((bent, "LlamaForCausalLM answers differently on tree rows"), (broken, "no kernel image")):
        target = opened(monkeypatch, glue, Ticking(1e-3))
        assert f"rows; small kernels are not fused: {why}" in target.runs
        assert target.graphs is not None
        assert target.graphs.settings.glue is None


# --- how many kernels -------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute: each is a kernel at least."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        name = str(func).split(".")[1]
        if name not in VIEWS | {"empty", "empty_like", "new_empty", "as_strided", "_reshape_alias", "detach"}:
            self.count += 1
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def two_kernels(
    query: Tensor, keys: Tensor, values: Tensor, sheet: Mapping[str, Tensor], reach: Reach, scores: Scores
) -> Tensor:
    """In place of Triton's attention: it launches two as well."""
    return query.contiguous()[..., : values.shape[-1]].neg().neg()


def one_kernel(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> RowProgram:
    """In place of a kernel of glue: one operation."""
    source = source_of(instrs, outside)

    def rows(memory: Memory, count: int) -> None:
        for buffer in source.writes:
            memory[buffer] = torch.empty(count, buffer.width, dtype=buffer.dtype)
        memory[source.writes[0]].fill_(0.0)

    return rows


def launches(blocks: int, glue: Glue | None) -> int:
    model = build_family("Llama", {"num_hidden_layers": blocks}, dtype=torch.bfloat16)
    target = HFTarget(model, graphs=settings(glue=glue, attention=two_kernels, classes=(1,)))
    assert target.graphs is not None
    [*target.graphs.warm_up()]
    (graph,) = target.graphs._graphs.values()
    with torch.inference_mode(), Launches() as seen:
        graph.run()
    return int(seen.count)


def test_launches_of_a_llama_block() -> None:
    """Seven products, two of attention, two that store keys and values, and four kernels of glue."""
    stock, fused = (launches(4, glue) - launches(3, glue) for glue in (None, one_kernel))
    assert (stock, fused) == (41, 15)


# --- the kernels ------------------------------------------------------------------------------------------------


def told(what: str, folder: Path, **environment: str) -> dict[str, dict[str, float]]:
    """What `tests.glue_kernels` prints, in a process of its own; what it compiles is kept in `folder`."""
    command = [sys.executable, "-m", "tests.glue_kernels", what]
    around = os.environ | {"TRITON_CACHE_DIR": str(folder)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=around, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return said


@needs_triton
def test_the_kernels_say_what_the_specification_says(tmp_path: Path) -> None:
    said = told("interpreted", tmp_path, TRITON_INTERPRET="1")
    assert {name.split()[0] for name in said} == {*SEEN}
    for name, found in said.items():
        assert found["alone"] == 1, f"{name}: a row has other bits among others"
        if name.endswith("float32"):
            assert found["fused"] < ERROR, (name, found)
        else:  # rounded at the same places: no further from float64 than the specification by a unit
            assert found["fused"] <= found["plain"] + UNIT, (name, found)
            assert found["equal"] > 0.999, (name, found)


@needs_triton
def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    """For each architecture and width of models, without a GPU."""
    said = told("compiled", tmp_path)
    assert len(said) >= len(ARCHITECTURES) * len(HIDDEN) * 5
    assert not {name: counted for name, counted in said.items() if counted["spilled"]}


def vector(code: int, out: Operand, *inputs: Operand, wide: int = 8, more: tuple[int, ...] = ()) -> Instr:
    return Instr(Kind.GLUE, code, out, inputs, (1, 1, 1, wide), more)


def test_what_is_read_elsewhere_goes_through_memory_behind_a_barrier() -> None:
    """A norm, then a rotary embedding of its result: the other half of a head is another thread's."""
    line = (0, 0, 0, 1)
    x, y, z, angle = (Buffer(torch.float32, 8) for _ in range(4))
    norm = Instr(Kind.GLUE, codes.RMS_NORM, Operand(y, 0, line), (Operand(x, 0, line),), (1, 1, 1, 8), (0,), (1e-6, 0))
    turn = vector(codes.ROTARY, Operand(z, 0, line), *(Operand(one, 0, line) for one in (y, angle, angle)), more=(0, 0))
    text = source_of([norm, turn], {z}).text.splitlines()
    barrier = text.index("    tl.debug_barrier()")
    assert any("tl.store" in one for one in text[:barrier])
    assert any("(k8 ^ 4)" in one for one in text[barrier:])


def test_what_nobody_reads_is_not_stored_and_long_rows_are_cut() -> None:
    line = (0, 0, 0, 1)
    x, y, z = (Buffer(torch.bfloat16, 3000) for _ in range(3))
    double = vector(codes.ADD, Operand(y, 0, line), Operand(x, 0, line), Operand(x, 0, line), wide=3000)
    silu = vector(codes.SILU, Operand(z, 0, line), Operand(y, 0, line), wide=3000)
    source = source_of([double, silu], {z})
    assert source.writes == (z,)
    assert source.text.count("tl.store") == 1
    assert source.chunks == 3
    assert source_of([double, silu], {y, z}).writes == (y, z)


def test_an_operation_without_a_kernel_is_refused() -> None:
    x, y = (Operand(Buffer(torch.float32, 8), 0, (0, 0, 0, 1)) for _ in range(2))
    with pytest.raises(RunnerUnavailable, match="no kernel of glue for the operation 36"):
        source_of([vector(codes.POW, y, x, x)], set())
