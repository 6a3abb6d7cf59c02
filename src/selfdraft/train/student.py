"""A model learning to draft: one pass of the untouched model, and one of mask groups that read its keys and values.

Every group hangs under one token of the text (its anchor) and stands there just as it will when decoding: it sees the
text up to the anchor through the untouched model's cache, and itself. Many groups share a text, under a block mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from selfdraft.errors import OptionError
from selfdraft.models import views
from selfdraft.models.adapters import EMBEDDINGS, Ends, link_state, linked
from selfdraft.models.attention import additive_mask, kernel, register
from selfdraft.models.identity import base_hash
from selfdraft.models.reference import Model
from selfdraft.train.head import Head, shortlist
from selfdraft.train.settings import Modules
from selfdraft.types import Skip

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "selfdraft_packed"


@dataclass(eq=False, slots=True)
class Pack:
    """What one packed pass needs to know; travels to the attention function as a keyword argument.

    `sees` [batch or 1, n, keys] says who may see whom before any window; `places` [batch, keys] and `queries`
    [batch, n] are positions. With `prefix` the keys are those of the text, then the pass's own.
    """

    sees: Tensor
    places: Tensor
    queries: Tensor
    prefix: dict[int, tuple[Tensor, Tensor]] | None = None
    store: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values [batch, key heads, n, dim] of every layer of this pass."""
    masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [batch, 1, heads * n, keys], heads of one group beneath each other."""
        key = (window, heads, dtype)
        if key not in self.masks:
            self.masks[key] = additive_mask(self.sees, self.places, self.queries, window, heads, dtype)
        return self.masks[key]


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed: Pack | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Registered with transformers under NAME. Queries [batch, heads, n, dim] -> ([batch, n, heads, dim], None)."""
    assert packed is not None
    assert isinstance(module.layer_idx, int)
    if packed.prefix is None:
        packed.store[module.layer_idx] = (key, value)
    else:
        # lots of groups share a text
        old_key, old_value = (old.repeat_interleave(len(key) // len(old), 0) for old in packed.prefix[module.layer_idx])
        key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
    batch, heads, count, dim = query.shape
    shared = heads // key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    asked = query.reshape(batch, key.shape[1], shared * count, dim)
    mask = packed.mask(sliding_window, shared, query.dtype)
    said = kernel(asked, key, value, mask, scale, softcap, s_aux)
    return said.reshape(batch, heads, count, -1).transpose(1, 2), None


register(NAME, attend_packed)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts and the anchors of their mask groups. Shapes: tokens [b, t], anchors [b, groups], lengths [b]."""

    tokens: Tensor
    anchors: Tensor
    lengths: Tensor
    sizes: tuple[int, ...]
    """Masks of each group of a lot; the groups of a text come in lots of so many, the last one may be shorter."""
    skip: Skip | None = None
    """Sublayers that the drafting pass leaves out."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What n rows say, and what they should: the rows of mask groups that stand inside their text, alone."""

    said: Tensor
    """Logits [n, tokens], over the whole vocabulary or a list that stands for it."""
    wanted: Tensor
    """Logits of the untouched model of the same shape, or the tokens themselves [n]."""
    groups: Tensor
    """[n, 2]: which text, and which of its groups; -1 for rows of the text itself."""
    places: Tensor
    """[n]: which row of its group."""
    weight: Tensor | None = None
    """The log of how many tokens each one of a list stands for [tokens]."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of the groups of a lot, beneath each other: group of a row, and its place in the group, [rows]."""

    groups: Tensor
    places: Tensor

    @classmethod
    def of(cls, sizes: SequenceOf[int], device: torch.device) -> Layout:
        counts = torch.tensor(sizes)  # on the host: how many rows that are a GPU would be asked and waited for
        groups = torch.arange(len(sizes)).repeat_interleave(counts)
        starts = (counts.cumsum(0) - counts)[groups]
        return cls(groups.to(device), (torch.arange(len(groups)) - starts).to(device))


class Student(nn.Module):
    """The mask embeddings and a low-rank adapter over a frozen model.

    `lead`: groups start with a copy of the anchor token, computed in the drafting pass too (S3D); else the anchor's
    own row is the untouched model's (SPACE). `tuned`: the adapter acts on every row and learns the text itself, as in
    SPACE's own fine-tuning. `link`: rank of the map that tells a row which token came before (see `MaskAdapter.link`);
    0 leaves it out. The same `seed` gives the same start. `base` is frozen by this; its weights are shared, and changed
    by `merged` alone.
    """

    def __init__(
        self,
        base: Model,
        *,
        masks: int,
        lora: LoraConfig | None,
        lead: bool,
        tuned: bool = False,
        link: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        from peft import get_peft_model

        self.lead, self.tuned = lead, tuned
        self.fingerprint = base_hash(base)
        self.layers = int(base.config.get_text_config().num_hidden_layers)
        base.requires_grad_(False)
        self._teacher = [views.clone(base, NAME).eval()]  # in a list: its weights are not this module's to save
        self.head = None if tuned else Head.of(self._teacher[0])
        self.model: Model = views.clone(base, NAME).eval()
        if self.head is not None:
            self.model = self.head.replaced(self.model, nn.Identity())
        if lora is not None:
            with torch.random.fork_rng(devices=[]):  # PEFT draws from the generator of the process
                torch.default_generator.manual_seed(seed)
                self.model = get_peft_model(self.model, lora)
        self._views: dict[Skip, Model] = {}
        table = base.get_input_embeddings().weight.detach().float()
        draw = torch.Generator().manual_seed(seed)
        hidden = table.shape[1]
        noise = torch.randn(masks, hidden, generator=draw).to(table.device)
        self.masks = nn.Parameter(table.mean(0) + noise * table.std(0))
        self.link_down = nn.Parameter(torch.randn(hidden, link, generator=draw).to(table.device) / hidden**0.5)
        self.link_up = nn.Parameter(torch.zeros(link, hidden, device=table.device))

    @property
    def size(self) -> int:
        """Most rows of a group."""
        return len(self.masks) + int(self.lead)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, batch: Batch, chance: torch.Generator | None = None) -> Answers:
        """What the rows of the groups say, and what they should.

        Row i predicts the token i + 1 (with `lead`) or i + 2 places behind its anchor, and should say what the
        untouched model says there. With `chance` only a list of tokens is looked at, where the vocabulary is large.
        """
        causal = _causal(batch.tokens)
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            reader = self.model if self.tuned else self._teacher[0]
            text = reader(input_ids=batch.tokens, position_ids=causal.queries, use_cache=False, packed=causal).logits
        layout = Layout.of([size + int(self.lead) for size in batch.sizes], batch.tokens.device)
        pack = self._group_pack(batch, causal, layout)
        states = self._drafting(batch.skip)(
            inputs_embeds=self._inputs(batch, layout), position_ids=pack.queries, use_cache=False, packed=pack
        ).logits.flatten(0, 1)
        rows, named, places, behind = self._counting(batch, layout, pack)
        wanted, states = text[named[:, 0], behind], states[rows]
        before = batch.tokens[named[:, 0], behind]
        link = bool(self.link_down.shape[1])
        few = None if chance is None or self.head is None else shortlist(wanted, chance)
        if self.head is not None and few is not None:
            if link:
                states = states + link_state(
                    self._teacher[0].get_input_embeddings(), before, self.link_down, self.link_up
                ).to(states.dtype)
            return Answers(self.head(states, few.ids), wanted[:, few.ids], named, places, few.weight)
        said = states if self.head is None else self.head(states)  # without a head the states are logits
        if link:
            said = said + linked(Ends.of(self._teacher[0]), before, self.link_down, self.link_up)
        if self.tuned:
            following = batch.tokens[named[:, 0], behind + 1]
            return _with_text(batch, text, Answers(said, following, named, places))
        return Answers(said, wanted, named, places)

    def _counting(self, batch: Batch, layout: Layout, pack: Pack) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows that count, out of those of all lots, [n]; text and group of each [n, 2]; its place in the group [n].

        And the place of the text whose row predicts the same token [n].
        """
        count, groups = batch.anchors.shape
        lots = len(pack.queries) // count
        number = torch.arange(lots, device=pack.queries.device)[:, None] * len(batch.sizes) + layout.groups
        texts = torch.arange(count, device=number.device).repeat_interleave(lots)[:, None]
        inside = (pack.queries < batch.lengths[texts] - 1) & (number < groups).repeat(count, 1)
        rows = inside.flatten().nonzero().squeeze(1)
        parts = (texts, number.repeat(count, 1), layout.places, pack.queries)
        text, group, place, behind = (part.expand_as(inside).reshape(-1)[rows] for part in parts)
        return rows, torch.stack([text, group], 1), place, behind

    def _inputs(self, batch: Batch, layout: Layout) -> Tensor:
        """Embeddings of the rows of all lots [b * lots, rows, hidden]."""
        anchors = _in_lots(batch)
        masks = self.masks[(layout.places - int(self.lead)).clamp(min=0)].expand(len(anchors), -1, -1)
        if self.lead:
            count = len(batch.tokens)
            first = batch.tokens.gather(1, anchors.view(count, -1)).view_as(anchors)[:, layout.groups]
            known = self._teacher[0].get_input_embeddings()(first).to(masks.dtype)
            masks = torch.where((layout.places == 0)[:, None], known, masks)
        dtype = next(p.dtype for p in self._teacher[0].parameters() if p.is_floating_point())
        return masks.to(dtype)

    def _group_pack(self, batch: Batch, text: Pack, layout: Layout) -> Pack:
        """Group row i stands i (with `lead`) or i + 1 behind its anchor; it sees the text before it and its group."""
        anchors = _in_lots(batch)[:, layout.groups]
        queries = anchors + layout.places + (0 if self.lead else 1)
        last = anchors - int(self.lead)
        places = torch.arange(batch.tokens.shape[1], device=anchors.device)
        sees = places <= last[..., None]
        own = (layout.groups[:, None] == layout.groups) & (layout.places <= layout.places[:, None])
        sees = torch.cat([sees, own.expand(len(anchors), -1, -1)], 2)
        known = text.places.repeat_interleave(len(anchors) // len(batch.tokens), 0)
        return Pack(sees, torch.cat([known, queries], 1), queries, text.store)

    def _drafting(self, skip: Skip | None) -> Model:
        if skip is None:
            return self.model
        if skip not in self._views:
            stock = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
            self._views[skip] = views.skipping(stock, self.layers, skip)
        return self._views[skip]

    def save(self, folder: Path) -> None:
        """Adapter in PEFT's format and mask embeddings into an existing folder."""
        if hasattr(self.model, "peft_config") and not self.tuned:
            self.model.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            config = folder / "adapter_config.json"
            facts = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": None}  # no path of this machine
            config.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", "utf-8")
        learned = {"embeddings": self.masks}
        if self.link_down.shape[1]:
            learned |= {"link_down": self.link_down, "link_up": self.link_up}
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in learned.items()}
        save_file(tensors, folder / EMBEDDINGS)

    def merged(self) -> Model:
        """The model with the adapter in its weights, once training has ended; `base` itself is changed by this."""
        model: Model = self.model.merge_and_unload() if hasattr(self.model, "peft_config") else self.model
        return model


def _with_text(batch: Batch, text: Tensor, groups: Answers) -> Answers:
    """The text's own rows learn too, each as a first place. What all of them should say are tokens, [n]."""
    inside = torch.arange(text.shape[1] - 1, device=text.device) < batch.lengths[:, None] - 1
    rows = text[:, :-1][inside]
    texts = inside.nonzero()[:, :1]
    named = torch.cat([groups.groups, torch.cat([texts, -torch.ones_like(texts)], 1)])
    places = torch.cat([groups.places, texts.new_zeros(len(rows))])
    wanted = torch.cat([groups.wanted, batch.tokens[:, 1:][inside]])
    return Answers(torch.cat([groups.said, rows]), wanted, named, places)


def _in_lots(batch: Batch) -> Tensor:
    """Anchors [b * lots, groups of a lot]; a lot that is not full is filled up with groups that do not count."""
    return F.pad(batch.anchors, (0, -batch.anchors.shape[1] % len(batch.sizes))).view(-1, len(batch.sizes))


def _causal(tokens: Tensor) -> Pack:
    count, size = tokens.shape
    places = torch.arange(size, device=tokens.device)
    return Pack((places <= places[:, None])[None], places.expand(count, -1), places.expand(count, -1))


def linear_names(model: Model, blocks: SequenceOf[int], modules: Modules = "all") -> list[str]:
    """Full paths of the linear layers of these decoder blocks, experts and routers left out.

    `modules`: all of them, those of attention, or the last one of attention, its output. Errors: OptionError when a
    block has no attention of a known name.
    """
    every = views.blocks(model, int(model.config.get_text_config().num_hidden_layers))
    paths = {id(module): name for name, module in model.named_modules()}
    found = []
    for index in blocks:
        inside: nn.Module = every[index]
        if modules != "all":
            name = views.attention_of(inside)
            if name is None:
                raise OptionError(f"modules={modules!r}: block {index} has no attention; give --modules all")
            inside = inside._modules[name] or inside
        linear = [paths[id(module)] for name, module in inside.named_modules() if _is_linear(name, module)]
        found += linear[-1:] if modules == "output" else linear
    return found


def _is_linear(name: str, module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    linear = isinstance(weight, Tensor) and (hasattr(module, "in_features") or hasattr(module, "nx"))
    return linear and not any(word in name for word in ("expert", "router", "gate."))
