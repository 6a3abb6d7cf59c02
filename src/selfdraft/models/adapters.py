"""Mask tokens: learned placeholder embeddings, and a low-rank adapter that acts on their rows alone.

S3D (arXiv 2405.20314) and SPACE (arXiv 2402.11809) let mask tokens guess several next tokens at once; SPACE changes the
model's weights for that. Here the weights stay as they are: a row gate leaves every other row what the untouched
checkpoint computes, bit for bit, so the text is that of the original model (gated low-rank adapter: arXiv 2507.11851).
The adapter is stored in PEFT's LoRA format, the embeddings and what is known about both beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfdraft.core.rows import Rows
from selfdraft.errors import LoadError
from selfdraft.models import views
from selfdraft.models.exactness import out_of, width_of
from selfdraft.models.identity import base_hash
from selfdraft.models.packed.layers import BlockLinear
from selfdraft.models.runner.trace_ops import gate
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "selfdraft.json"
CHECKPOINT = "training.pt"
"""Beside them while training has not ended."""
EMBEDDINGS = "masks.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the path of a module."""
WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for the tensors of an adapter."""
METHODS = ("s3d", "space")
SHIPPED = Path(__file__).parent / "trained"
"""Adapters that come with this package: in a folder for each base model, by its `base_hash`."""
PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
"""Settings of a LoRA that change its arithmetic; adapters for masks have none of them."""


@dataclass(frozen=True, slots=True)
class MaskAdapter:
    """The masks of one method.

    `embeddings` [masks, hidden]; mask j of a group predicts the token j + 2 places behind the row it hangs under.
    `layers` holds, for each adapted linear layer by its path, (down [in, rank], up [rank, out], scaled).
    """

    method: str
    embeddings: Tensor
    layers: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole_spans: bool = False
    """In a pass with skipped sublayers the known tokens of a span with masks use the adapter too (S3D)."""
    advice: JsonObject = field(default_factory=dict)
    """Options of the drafter that were found best for this adapter."""
    link: tuple[Tensor, Tensor] | None = None
    """(down [hidden, rank], up [rank, hidden]): what a row says is shifted by the token that came before.

    Masks guess without knowing one another's tokens; the drafter knows them when it makes the tree. The shift is linear
    in the token's embedding, so it costs no pass (the sampler head of arXiv 2507.11851, without its hidden layer).
    """
    acceptance: tuple[float, ...] = ()
    """Share of held-out tokens that each place guessed right when training ended; (): unknown."""

    @property
    def bytes(self) -> int:
        tensors = [self.embeddings, *self.parts, *(self.link or ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def parts(self) -> list[Tensor]:
        """The matrices of all adapted layers, one layer after the other."""
        return [part for pair in self.layers.values() for part in pair]

    def fitted(self, dtype: torch.dtype, device: torch.device) -> MaskAdapter:
        """The same adapter for weights of this type on this device."""
        layers = {path: (down.to(device, dtype), up.to(device, dtype)) for path, (down, up) in self.layers.items()}
        link = None if self.link is None else (self.link[0].to(device), self.link[1].to(device))
        return replace(self, embeddings=self.embeddings.to(device), layers=layers, link=link)


class Ends(NamedTuple):
    """The two ends of a model: what makes states of tokens, and what makes logits of states."""

    table: Callable[[Tensor], Tensor]
    head: nn.Linear | BlockLinear | Tensor
    """A layer, or weights [vocab, hidden] alone."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Ends:
        return cls(model.get_input_embeddings(), model.get_output_embeddings())

    @property
    def weights(self) -> Tensor | None:
        """The weights of the head [vocab, hidden], where they are floats."""
        return float_weights(self.head)


@dataclass(slots=True)
class Gate:
    """Which rows of the running pass use which adapter; set and cleared by the target around the pass."""

    rows: dict[int, slice | Tensor] = field(default_factory=dict)
    traced: bool = False
    """The pass is being written down (`trace.py`): any row may use any adapter then."""
    columns: SequenceOf[Tensor] | None = None
    """In a pass of fixed shape, for each adapter which of all rows [n] use it (not 0); they lie on the device."""


class Gated(nn.Module):
    """A linear layer with `up(down(x))` added on the rows that the gate names, and on no others."""

    def __init__(self, layer: nn.Module, parts: SequenceOf[tuple[int, Tensor, Tensor]], gate: Gate) -> None:
        super().__init__()
        self.layer, self.parts, self.gate = layer, parts, gate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        for number, down, up in self.parts:
            if self.gate.traced:
                y = gate(y, x, down, up, number)
                continue
            if self.gate.columns is not None:
                on = self.gate.columns[number].view(*[1] * (y.dim() - 2), -1, 1) != 0
                y = torch.where(on, y + (x @ down @ up).to(y.dtype), y)
                continue
            rows = self.gate.rows.get(number)
            if rows is None:
                continue
            asked, said = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])  # some layers (OPT's) see no batch axis
            if isinstance(rows, Tensor):
                said.index_add_(0, rows, (asked[rows] @ down @ up).to(y.dtype))
            elif y.dtype == up.dtype == x.dtype:
                said[rows].addmm_(asked[rows].mm(down), up)  # small layers are nothing but calls: two, not five
            else:
                said[rows] += (asked[rows] @ down @ up).to(y.dtype)
        return y


def gated(stock: PreTrainedModel, adapters: SequenceOf[MaskAdapter], gate: Gate) -> PreTrainedModel:
    """A view of `stock` whose adapted layers obey the gate; adapter i, fitted to it, is number i there.

    Errors: LoadError."""
    parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for number, adapter in enumerate(adapters):
        for path, (down, up) in adapter.layers.items():
            parts.setdefault(path, []).append((number, down, up))

    def along(module: nn.Module, path: str) -> nn.Module:
        if path in parts:
            return Gated(module, parts.pop(path), gate)
        if not any(name.startswith(path and path + ".") for name in parts):
            return module
        return views.with_children(module, lambda name, child: along(child, f"{path}.{name}" if path else name))

    changed = cast("PreTrainedModel", along(stock, ""))
    if parts:
        path, ((number, _, _), *_) = next(iter(parts.items()))
        raise LoadError(f"the adapter of {adapters[number].method!r} has a layer {path!r}, the model has not")
    return changed


def linked(ends: Ends, before: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Shift of the logits by the tokens `before` [..., n]: [..., n, vocab]."""
    return shift_of(ends.head, link_state(ends.table, before, down, up))


def float_weights(head: nn.Linear | BlockLinear | Tensor) -> Tensor | None:
    """The weights [vocab, hidden] of an output layer, where they are floats that lie row after row."""
    found = head if isinstance(head, Tensor) else None if isinstance(head, BlockLinear) else head.weight
    return found if found is not None and found.is_floating_point() else None


def shift_of(head: nn.Linear | BlockLinear | Tensor, state: Tensor, ids: Tensor | None = None) -> Tensor:
    """What link states [..., hidden] add to all logits: [..., vocab], or only to those of `ids` [k]: [..., k]."""
    if isinstance(head, BlockLinear) and ids is not None:
        return F.linear(state, head.rows(ids, state.dtype))
    if (table := float_weights(head)) is not None:
        weight = table if ids is None else table[ids]
        return F.linear(state.to(weight.dtype), weight)
    assert isinstance(head, nn.Module)
    shift: Tensor = head(state)  # quantised: only the layer itself can read its weights
    if head.bias is not None:
        shift = shift - head.bias  # a shift has none
    return shift if ids is None else shift[..., ids]


def shifts_of(head: nn.Linear | BlockLinear | Tensor, states: Tensor, ids: Tensor) -> Tensor:
    """What link states [n, b, hidden] add to the logits of `ids` [n, k], row by row: [n, b, k]."""
    if (weight := float_weights(head)) is not None:
        return torch.bmm(states.to(weight.dtype), weight[ids].mT)
    wanted = ids[:, None].expand(-1, states.shape[1], -1)
    return shift_of(head, states).gather(2, wanted)  # quantised: only the layer itself can read its weights


def link_state(table: Callable[[Tensor], Tensor], before: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What the tokens `before` [..., n] add to what the output layer is given: [..., n, hidden]."""
    embedded = table(before).to(down.dtype)
    return F.rms_norm(embedded, embedded.shape[-1:]) @ down @ up


def gate_rows(rows: Rows, adapters: SequenceOf[MaskAdapter], vocab: int, *, skipped: bool) -> dict[int, list[int]]:
    """For each adapter that acts in this pass, its rows: those with its mask ids (see `whole_spans`)."""
    found: dict[int, list[int]] = {}
    first = vocab
    for number, adapter in enumerate(adapters):
        stop = first + len(adapter.embeddings)
        mine = [row for row, token in enumerate(rows.tokens) if first <= token < stop]
        first = stop
        if skipped and adapter.whole_spans:
            own = set(mine)
            spans = (range(span.start, span.start + span.size) for span in rows.spans)
            mine = [row for span in spans if own.intersection(span) for row in span]
        if mine:
            found[number] = mine
    return found


def placed(acting: Mapping[int, SequenceOf[int]], device: torch.device) -> dict[int, slice | Tensor]:
    """Rows of every adapter as `Gate` takes them: rows in a row as a slice, others where the pass runs."""
    return {
        number: slice(mine[0], mine[-1] + 1)
        if mine[-1] - mine[0] + 1 == len(mine)
        else torch.tensor(mine, device=device)
        for number, mine in acting.items()
    }


@dataclass(frozen=True, slots=True)
class Frame:
    """What an adapter is checked against: the name of its base model, and the sizes that it has to fit."""

    base: str
    hidden: int
    layers: Mapping[str, tuple[int, int]]
    """Input and output width of every linear-like layer, by its path."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Frame:
        wide = {path: (module, out_of(module)) for path, module in model.named_modules()}
        layers = {path: (width_of(module), out) for path, (module, out) in wide.items() if out is not None}
        return cls(base_hash(model), int(model.config.get_text_config().hidden_size), layers)


def load_adapter(folder: str | Path, model: PreTrainedModel | Frame) -> MaskAdapter:
    """The adapter that `selfdraft train` wrote into `folder`. Errors: LoadError says what is wrong, and the way out."""
    frame = model if isinstance(model, Frame) else Frame.of(model)
    place = Path(folder).expanduser()
    card = _json(place, CARD)
    _check_card(place, card, frame)
    tensors = _tensors(place / EMBEDDINGS)
    embeddings = tensors.get("embeddings")
    hidden = frame.hidden
    if embeddings is None or embeddings.ndim != 2 or embeddings.shape[1] != hidden:
        shape = None if embeddings is None else tuple(embeddings.shape)
        raise LoadError(f"{place / EMBEDDINGS}: mask embeddings of shape {shape}; the model needs [masks, {hidden}]")
    settings, advice = card.get("settings") or {}, card.get("advice", {})
    needed = settings.get("rank") and not settings.get("sar_sft")
    layers = _layers(place, frame) if needed or (place / WEIGHTS).exists() else {}
    link = None
    if "link_down" in tensors or "link_up" in tensors:
        link = _link(place / EMBEDDINGS, tensors, hidden)
    acceptance = _acceptance(card.get("held_out_acceptance"))
    return MaskAdapter(str(card["method"]), embeddings, layers, card["method"] == "s3d", advice, link, acceptance)


def _acceptance(given: object) -> tuple[float, ...]:
    """As the card says it; () when it says nothing that can be used."""
    shares = given if isinstance(given, list) else []
    known = all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares)
    return tuple(map(float, shares)) if known else ()


def _link(path: Path, tensors: Mapping[str, Tensor], hidden: int) -> tuple[Tensor, Tensor]:
    down, up = (tensors.get(name, torch.empty(0)) for name in ("link_down", "link_up"))
    if down.ndim != 2 or down.shape[0] != hidden or up.shape != (down.shape[1], hidden):
        raise LoadError(f"{path}: a link of shapes {tuple(down.shape)} and {tuple(up.shape)} does not fit this model")
    return down, up


def load_adapters(places: SequenceOf[str | Path | MaskAdapter], model: PreTrainedModel | Frame) -> list[MaskAdapter]:
    """Adapters out of folders, or given as they are, and those that come with this package for the model.

    Of several for one method the first counts. Errors: LoadError.
    """
    frame = model if isinstance(model, Frame) else Frame.of(model)
    found: dict[str, MaskAdapter] = {}
    for place in [*places, *find_adapters(SHIPPED / frame.base)]:
        adapter = place if isinstance(place, MaskAdapter) else load_adapter(place, frame)
        found.setdefault(adapter.method, adapter)
    return list(found.values())


def find_adapters(folder: Path) -> list[Path]:
    """Adapters that lie in a checkpoint's folder, each in one of its own named selfdraft_*."""
    return sorted(path.parent for path in folder.glob(f"selfdraft_*/{CARD}"))


def _check_card(place: Path, card: JsonObject, frame: Frame) -> None:
    if not isinstance(card.get("method"), str) or not isinstance(card.get("model"), str):
        raise LoadError(f"{place / CARD}: 'method' and 'model' are missing; was it written by selfdraft train?")
    if card["method"] not in METHODS:
        raise LoadError(f"{place / CARD}: method {card['method']!r} is unknown; there are {', '.join(METHODS)}")
    for name in ("settings", "advice"):
        if not isinstance(card.get(name, {}), dict):
            raise LoadError(f"{place / CARD}: {name!r} is not a JSON object; was it written by selfdraft train?")
    mine = frame.base
    if card["model"] != mine:
        raise LoadError(
            f"{place}: this adapter was trained for another model ({card['model']}, this one is {mine}); "
            "train one: selfdraft train --model DIR --output DIR"
        )


def _layers(place: Path, frame: Frame) -> dict[str, tuple[Tensor, Tensor]]:
    """(down [in, rank], up [rank, out]) by module path out of PEFT's files; the scale is put into `up`."""
    config = _json(place, "adapter_config.json")
    odd = [name for name in PLAIN if config.get(name)]
    if config.get("peft_type") != "LORA" or odd:
        what = odd[0] if odd else config.get("peft_type")
        raise LoadError(f"{place}: only plain LoRA can be gated, this one has {what!r}")
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise LoadError(f"{place / 'adapter_config.json'}: lora_alpha={alpha!r} and r={rank!r} are no numbers to use")
    tensors = _tensors(place / WEIGHTS)
    layers = {}
    while tensors:
        name = next(iter(tensors))
        path = name.removeprefix(PREFIX).partition(".lora_")[0]
        down, up = (tensors.pop(f"{PREFIX}{path}.lora_{part}.weight", None) for part in "AB")
        if down is None or up is None:
            raise LoadError(f"{place / WEIGHTS}: tensor {name!r} is no half of a plain LoRA pair")
        wide, out = frame.layers.get(path, (None, None))
        if wide is None or (*down.shape, *up.shape) != (rank, wide, out, rank):
            raise LoadError(f"{place}: layer {path!r} of the adapter does not fit this model")
        layers[path] = (down.T.contiguous(), (alpha / rank * up.T).contiguous())
    return layers


def _json(place: Path, name: str) -> JsonObject:
    try:
        content = json.loads((place / name).read_text("utf-8"))
    except FileNotFoundError:
        begun = name == CARD and (place / CHECKPOINT).exists()
        why = "its training has not ended; run selfdraft train again, with the same options, and it goes on"
        raise LoadError(f"{place} is no adapter folder: {why if begun else f'{name} is missing there'}") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{place / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{place / name}: not a JSON object")
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except FileNotFoundError:
        raise LoadError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
