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

from selfdraft.models import views
from selfdraft.models.adapters import EMBEDDINGS, linked
from selfdraft.models.attention import additive_mask, kernel, register
from selfdraft.models.identity import base_hash
from selfdraft.models.reference import Model
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
        old_key, old_value = packed.prefix[module.layer_idx]
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
    skip: Skip | None = None
    """Sublayers that the drafting pass leaves out."""


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
        self.model: Model = views.clone(base, NAME).eval()
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
        """Rows of a group."""
        return len(self.masks) + int(self.lead)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the rows that learn [b, m, n, vocab], what they should say, and which of them count [b, m, n].

        There are m groups of n rows: row i predicts the token i + 1 (with `lead`) or i + 2 places behind its anchor,
        and should say what the untouched model says there, logits of the same shape.
        """
        causal = _causal(batch.tokens)
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            reader = self.model if self.tuned else self._teacher[0]
            text = reader(input_ids=batch.tokens, position_ids=causal.queries, use_cache=False, packed=causal).logits
        said, pack = self._draft(batch, causal)
        if self.link_down.shape[1]:
            before = batch.tokens.gather(1, pack.queries.clamp(max=batch.tokens.shape[1] - 1))
            said = said + linked(self._teacher[0], before, self.link_down, self.link_up)
        shape = (*batch.anchors.shape, self.size)
        behind = pack.queries  # the row of the text at a draft row's position predicts the same token
        counts = behind < batch.lengths[:, None] - 1
        place = behind.clamp(max=text.shape[1] - 1)
        if self.tuned:
            return self._with_text(batch, text, said.view(*shape, -1), place.view(shape), counts.view(shape))
        wanted = text.gather(1, place[..., None].expand(-1, -1, text.shape[2]))
        return said.view(*shape, -1), wanted.view(*shape, -1), counts.view(shape)

    def _draft(self, batch: Batch, text: Pack) -> tuple[Tensor, Pack]:
        """Logits [b, groups * size, vocab] of the group rows and their pack."""
        pack = self._group_pack(batch, text)
        said = self._drafting(batch.skip)(
            inputs_embeds=self._inputs(batch), position_ids=pack.queries, use_cache=False, packed=pack
        ).logits
        return said, pack

    def _with_text(
        self, batch: Batch, text: Tensor, said: Tensor, place: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The text's own rows learn too, in further groups. What all of them should say are tokens, [b, m, n]."""
        size = self.size
        following = F.pad(batch.tokens, (0, 1))[:, 1:]
        wanted = following.gather(1, place.flatten(1)).view(place.shape)
        inside = torch.arange(text.shape[1], device=text.device) < batch.lengths[:, None] - 1
        count = -text.shape[1] % size
        rows = F.pad(text, (0, 0, 0, count)).view(len(text), -1, size, text.shape[2])
        goals = F.pad(following, (0, count)).view(len(text), -1, size)
        valid = F.pad(inside, (0, count)).view(len(text), -1, size)
        return torch.cat([said, rows], 1), torch.cat([wanted, goals], 1), torch.cat([counts, valid], 1)

    def _inputs(self, batch: Batch) -> Tensor:
        count, groups = batch.anchors.shape
        masks = self.masks.expand(count, groups, -1, -1)
        if self.lead:
            table = self._teacher[0].get_input_embeddings()
            first = table(batch.tokens.gather(1, batch.anchors)).to(masks.dtype)
            masks = torch.cat([first[:, :, None], masks], 2)
        dtype = next(p.dtype for p in self._teacher[0].parameters() if p.is_floating_point())
        return masks.flatten(1, 2).to(dtype)

    def _group_pack(self, batch: Batch, text: Pack) -> Pack:
        """Group row i stands i (with `lead`) or i + 1 behind its anchor; it sees the text before it and its group."""
        size, count, groups = self.size, *batch.anchors.shape
        device = batch.tokens.device
        offsets = torch.arange(size, device=device) + (0 if self.lead else 1)
        queries = (batch.anchors[..., None] + offsets).flatten(1)
        last = batch.anchors - int(self.lead)
        places = torch.arange(batch.tokens.shape[1], device=device)
        sees = (places <= last[..., None]).repeat_interleave(size, 1)
        group = torch.arange(groups * size, device=device) // size
        own = torch.ones(groups * size, groups * size, dtype=torch.bool, device=device).tril()
        own &= group[:, None] == group
        sees = torch.cat([sees, own.expand(count, -1, -1)], 2)
        return Pack(sees, torch.cat([text.places, queries], 1), queries, text.store)

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


def _causal(tokens: Tensor) -> Pack:
    count, size = tokens.shape
    places = torch.arange(size, device=tokens.device)
    return Pack((places <= places[:, None])[None], places.expand(count, -1), places.expand(count, -1))


def linear_names(model: Model, blocks: SequenceOf[int]) -> list[str]:
    """Full paths of the linear layers of these decoder blocks, experts and routers left out."""
    every = views.blocks(model, int(model.config.get_text_config().num_hidden_layers))
    paths = {id(module): name for name, module in model.named_modules()}
    found = []
    for index in blocks:
        for name, module in every[index].named_modules():
            weight = getattr(module, "weight", None)
            linear = isinstance(weight, Tensor) and (hasattr(module, "in_features") or hasattr(module, "nx"))
            if linear and not any(word in name for word in ("expert", "router", "gate.")):
                found.append(paths[id(module)])
    return found
