"""The proof at load: tokens go through the adapter as a tree and are compared with the stock model's own pass.

Real models round far more than random ones: in bfloat16 the logits of a stock LLaMA differ from their exact values by
tens of percent. So what is computed is proven apart from how it is rounded (docs/decisions/007-proof-at-load.md):

1. the plain path against the stock pass, both in float64 on the same weights (`wide.py`): only a mistake is left;
2. on the fast runner, every block alone in float32 against that float64 pass (`blocks.py`);
3. the passes that will be used, in the model's own dtype, against the same: they may round, but not much more than
   the stock model does on the same tokens;
4. where keys and values are stored as codes, which round far more: the passes that will be used against those of the
   plain path with the same codes. The first three parts are done without codes, for they would hide a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfdraft.core.rows import Rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.errors import UnsupportedModel
from selfdraft.models import views
from selfdraft.models.device import uses_tf32
from selfdraft.models.facts import context_of
from selfdraft.models.kinds import first_line, has_experts, is_quantised
from selfdraft.models.packed.layers import has_blocks
from selfdraft.models.proof.blocks import Blocks, check_blocks, check_layers
from selfdraft.models.proof.wide import Wide
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams

EXACT = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest error in a wide dtype, relative to the spread of the logits: rounding is at 1e-14 and 1e-5."""
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Errors in the model's own dtype that need no excuse."""
CODED = 0.005
"""The same where a code may be the next one: numbers that are rounded to codes differ in their last place before."""
NOISE = 4.0
"""Beyond that a pass may be 4 times as far off as the stock model's own pass is."""
TOKENS, FAMILIAR = 12, 4096
"""Length of the prompt, whose tokens are among the first ids: those of common pieces of text."""
WINDOW = 160
"""The prompt is longer than windows of up to 160 tokens; of larger windows the size itself is checked."""
AFTER = 9
"""Tokens behind the prompt."""
BROKEN = (RuntimeError, TypeError, AttributeError, ValueError, KeyError, IndexError, AssertionError)


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, a tree of six behind the next token, and a chain of two behind what is kept of it.

    `texts` are the two paths through it as plain texts of the same length; `passes` say for every row of each of the
    three passes which text it stands in and where.
    """

    size: int
    texts: tuple[tuple[int, ...], tuple[int, ...]]
    passes: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, target: HFTarget, model: PreTrainedModel) -> Case:
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        size = max(TOKENS, window + 4) if isinstance(window, int) and window <= WINDOW else TOKENS
        size = max(2, min(size, context_of(model) - AFTER))
        draw = torch.Generator().manual_seed(5)
        ids = torch.randint(0, min(target.vocab, FAMILIAR), (size + AFTER,), generator=draw).tolist()
        other = list(ids)
        other[size + 1 :] = [(token + 1) % target.vocab for token in ids[size + 1 :]]
        tree = [(0, size), (1, size + 1), (0, size + 1), (0, size + 2), (1, size + 2), (0, size + 3), (1, size + 3)]
        chain = [(0, size + 4), (0, size + 5), (0, size + 6)]
        return cls(size, (tuple(ids), tuple(other)), (tuple((0, i) for i in range(size)), tuple(tree), tuple(chain)))

    @property
    def answered(self) -> list[tuple[int, int]]:
        """(text, place) of every row whose logits are asked for, in order."""
        return [self.passes[0][-1], *self.passes[1], *self.passes[2]]

    def run(self, forward: Callable[[Rows], Tensor], keep: Callable[[int, int, SequenceOf[int]], None]) -> Tensor:
        """What `forward` says to the three passes, one behind the other; the right path is kept."""
        main, size = list(self.texts[0]), self.size
        sequence = Sequence(main[:size], size, SamplingParams(), slot=0)
        tree = Draft(self._tokens(1), (-1, -1, 1, 0, 2, 3), ("",) * 6, 6)
        said = []
        for known, draft, kept in (
            (size, EMPTY, range(size)),
            (size + 1, tree, (0, 2, 3, 5)),
            (size + 5, Draft.chain(list(self._tokens(2)), ""), (0, 1, 2)),
        ):
            sequence.tokens = main[:known]
            said.append(forward(pack([(sequence, known - sequence.num_cached, draft)])))
            keep(0, sequence.num_cached, [*kept])
            sequence.num_cached += len(kept)
        return torch.cat(said)

    def _tokens(self, number: int) -> tuple[int, ...]:
        return tuple(self.texts[text][place] for text, place in self.passes[number][1:])


def prove(target: HFTarget, model: PreTrainedModel) -> Report:
    """Compare what `target` computes with the stock pass of `model`, as the head of this file says.

    Slot 0 holds rubbish afterwards, which nobody remembers. Errors: UnsupportedModel says what differs.
    """
    name = type(model).__name__
    case = Case.of(target, model)
    unrounded = target.unrounded()
    said = _tried(name, lambda: case.run(unrounded.forward, unrounded.keep))
    _check_calls(unrounded, name)
    stock = views.clone(model, _own_attention(model)).eval()
    report = Report(name, coarse=target.facts.device.type == "cuda" and uses_tf32())
    own = _stock(stock, case, nullcontext())
    if not bool(own.isfinite().all()):
        kind = str(own.dtype).removeprefix("torch.")
        raise UnsupportedModel(f"{name} overflows in {kind}: its own logits are not finite; take dtype float32")
    exact = _exact(target, stock, case, report)
    reference = own if exact is None else exact.logits
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    noise = (lambda: _error(own, reference)) if exact is not None else (lambda: _unrest(stock, case, own))
    report.compare("its own dtype", _error(said, reference), ROUNDING.get(dtype, 0.1), noise)
    if target.runner is not None and exact is not None:
        check_layers(model, name)
        report.blocks = check_blocks(target, _rounded(stock, target, case) if has_blocks(model) else exact, case, name)
    if unrounded is not target:
        _check_codes(target, case, report, reference)
    return report


def _check_codes(target: HFTarget, case: Case, report: Report, reference: Tensor) -> None:
    """The fourth part of the proof: rounded once more than the plain path with codes, but not by more than that is."""
    twin = target.plainly(target.cache.dtype)
    wanted = _tried(report.name, lambda: case.run(twin.forward, twin.keep))
    said = _tried(report.name, lambda: case.run(target.forward, target.keep))
    if not bool(wanted.isfinite().all()):
        raise UnsupportedModel(f"{report.name} has keys or values that 8 bits cannot hold; take kv_cache_dtype 'auto'")
    report.compare("codes of 8 bits", _error(said, wanted), CODED, lambda: _error(wanted, reference))


def _exact(target: HFTarget, stock: PreTrainedModel, case: Case, report: Report) -> Blocks | None:
    """The first part of the proof. Returns what the stock model computes in a wide dtype; None where that fails."""
    wide = wide_of(stock)
    if wide is None:
        return None
    blocks = Blocks(stock, target.layers)
    try:
        blocks.logits = _stock(blocks.model, case, Wide(wide))
    except torch.OutOfMemoryError:
        raise
    except (*BROKEN, NotImplementedError):  # code that insists on its dtype: the third part is left
        return None
    twin = target.plainly()
    with Wide(wide):
        said = _tried(report.name, lambda: case.run(twin.forward, twin.keep))
    noise = lambda: _unrest(stock, case, blocks.logits, Wide(wide))  # noqa: E731
    report.compare(str(wide).removeprefix("torch."), _error(said, blocks.logits), EXACT[wide], noise)
    return blocks


def _rounded(stock: PreTrainedModel, target: HFTarget, case: Case) -> Blocks:
    """What a model of block weights computes in float32, its rows rounded to 8 bits as on the fast runner."""
    blocks = Blocks(stock, target.layers)
    blocks.logits = _stock(blocks.model, case, Wide(torch.float32))
    return blocks


def wide_of(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype to prove in: float64 where there is one; experts are not computed in it, quantised weights in none."""
    if is_quantised(model):
        return None
    device = next(model.parameters()).device.type
    return torch.float32 if device == "mps" or has_experts(model) else torch.float64


TF32 = (
    ". TF32 is on, which alone may do this: torch.set_float32_matmul_precision('highest') turns it off, and the model "
    "is loaded again"
)


@dataclass(slots=True)
class Report:
    """What was measured, for `recipes/proof.py`: the error of each part in units of the largest that passes."""

    name: str
    exact: float | None = None
    rounding: float = 0.0
    blocks: float | None = None
    codes: float | None = None
    coarse: bool = False
    """Products of float32 are rounded to TF32."""

    def compare(self, where: str, error: float, usual: float, noise: Callable[[], float]) -> None:
        """Errors: UnsupportedModel, when an error is larger than usual and than what the model's own rounding does."""
        limit = usual if error <= usual else max(usual, NOISE * noise())
        if where == "its own dtype":
            self.rounding = error / limit
        elif where == "codes of 8 bits":
            self.codes = error / limit
        else:
            self.exact = error / limit
        if not error <= limit:  # NaN is refused too
            raise UnsupportedModel(
                f"{self.name} answers differently on tree rows: in {where} its logits differ by {error:.2g} of their "
                f"spread, and only {limit:.2g} would be rounding; it keeps state elsewhere or sees other tokens"
                f"{TF32 if self.coarse else ''}"
            )


def _tried(name: str, run: Callable[[], Tensor]) -> Tensor:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        raise UnsupportedModel(f"{name} cannot run on tree rows: {first_line(error)}") from error


def _own_attention(model: PreTrainedModel) -> str:
    """The attention that the model came with; flash attention knows no wide dtype."""
    own = str(getattr(model.config, "_attn_implementation", None) or "eager")
    return "eager" if "flash" in own else own


@torch.inference_mode()
def _stock(stock: PreTrainedModel, case: Case, context: AbstractContextManager[object]) -> Tensor:
    """Logits of the stock pass for every row that is asked for: both texts whole, in one pass without a cache."""
    device = next(stock.parameters()).device
    with context:
        logits = stock(torch.tensor(case.texts, device=device), use_cache=False).logits
    return torch.stack([logits[text, place] for text, place in case.answered])


@torch.inference_mode()
def _unrest(
    stock: PreTrainedModel, case: Case, logits: Tensor, context: AbstractContextManager[object] | None = None
) -> float:
    """How far the stock model is from itself: each row once more as the last of a text of its own."""
    device = next(stock.parameters()).device
    with context or nullcontext():
        alone = [
            stock(torch.tensor([case.texts[text][: place + 1]], device=device), use_cache=False).logits[0, -1]
            for text, place in case.answered
        ]
    return _error(torch.stack(alone), logits)


def _error(said: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error over all rows, in units of each row's spread; NaN when one is not finite."""
    said, wanted = said.double(), wanted.double()
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean(-1).clamp(min=1e-24)
    return float(((said - wanted).square().mean(-1) / spread).mean().sqrt())


def _check_calls(target: HFTarget, name: str) -> None:
    """Every layer came through our attention once, with the window that the configuration promises."""
    assert target.last is not None
    calls = target.last.calls
    layers = sorted(layer for layer, _ in calls)
    if layers != list(range(target.layers)):
        missing = sorted(set(range(target.layers)) - set(layers))
        what = f"layer {missing[0]} did not use the attention interface" if missing else "a layer attends twice"
        raise UnsupportedModel(f"{name} keeps state elsewhere: {what}")
    for layer, window in calls:
        wanted = window_of(target.config, layer)
        if window != wanted and min(window or target.max_length, wanted or target.max_length) < target.max_length:
            raise UnsupportedModel(f"{name}: layer {layer} attends with window {window}, its config says {wanted}")


def window_of(config: object, layer: int) -> int | None:
    """The sliding window of a layer in tokens, as the text configuration says; None: it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return int(window) if window and slides else None
