"""Any stock decoder of transformers as a Target: its own forward on flat rows, our attention, our cache."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from selfdraft.core.cache import KVCache
from selfdraft.core.rows import Rows
from selfdraft.errors import OptionError
from selfdraft.models import view
from selfdraft.models.attention import NAME, attend, make_plan
from selfdraft.models.shapes import NATURAL, Shapes
from selfdraft.types import Skip

AttentionInterface.register(NAME, attend)  # transformers' own table of attention functions: adds a name, changes none


class HFTarget:
    """A stock model and its memory of every slot. See `selfdraft.protocols.Target`.

    `model` is used through a view and never touched. `shapes` sets the exactness level (`shapes.py`).
    `mask_embeddings` [masks, hidden] are the learned placeholder tokens, if any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int = 1,
        context: int | None = None,
        shapes: Shapes = NATURAL,
        mask_embeddings: Tensor | None = None,
    ) -> None:
        self.config = model.config.get_text_config()
        self.shapes = shapes
        self.slots = slots
        self._view = view.clone(model).eval()
        self._skipping: dict[Skip, PreTrainedModel] = {}
        self._context = context or context_of(model)
        self._masks = mask_embeddings
        self._device = next(model.parameters()).device
        self.cache = KVCache(slots, shapes.edge(255, 256))

    @property
    def vocab(self) -> int:
        return int(self.config.vocab_size)

    @property
    def masks(self) -> int:
        return 0 if self._masks is None else self._masks.shape[0]

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def context(self) -> int:
        return self._context

    def edge(self, position: int) -> int:
        return self.shapes.edge(position, self._context)

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        self.cache.keep(slot, base, order)

    @torch.inference_mode()
    def forward(self, rows: Rows, skip: Skip | None = None) -> Tensor:
        self._make_room(rows)
        plan = make_plan(rows, self.cache, self.shapes, self._device)
        padding = self.shapes.round_rows(len(rows)) - len(rows)
        tokens = torch.nn.functional.pad(rows.tokens, (0, padding))[None].to(self._device)
        positions = torch.nn.functional.pad(rows.positions, (0, padding))[None].to(self._device)
        asked = list(rows.answers)
        asked += [0] * (self.shapes.round_rows(len(asked)) - len(asked))
        output = self.view(skip)(
            **self._inputs(tokens),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=torch.tensor(asked, dtype=torch.int64, device=self._device),
            selfdraft=plan,
        )
        logits: Tensor = output.logits[0, : len(rows.answers)]
        return logits

    def view(self, skip: Skip | None) -> PreTrainedModel:
        """The model with the sublayers of `skip` left out; made once per set."""
        if skip is None or not (skip.attention or skip.mlp):
            return self._view
        if skip not in self._skipping:
            outside = [i for i in skip.attention | skip.mlp if not 0 <= i < self.layers]
            if outside:
                raise OptionError(f"block {outside[0]} cannot be skipped: the model has blocks 0 to {self.layers - 1}")
            self._skipping[skip] = view.skipping(self._view, self.layers, skip)
        return self._skipping[skip]

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Token ids [1, n], or embeddings [1, n, hidden] where mask ids are among them."""
        if self._masks is None or not bool((tokens >= self.vocab).any()):
            return {"input_ids": tokens}
        stock = self._view.get_input_embeddings()(tokens.clamp(max=self.vocab - 1))
        learned = self._masks[(tokens - self.vocab).clamp(min=0)].to(stock.dtype)
        return {"inputs_embeds": torch.where((tokens >= self.vocab)[..., None], learned, stock)}

    def _make_room(self, rows: Rows) -> None:
        last = max(span.base + span.size for span in rows.spans)
        self.cache.reserve(max(last, self.shapes.edge(int(rows.positions.max()), 0)))


def context_of(model: PreTrainedModel) -> int:
    """Most positions the model has; transformers names it differently from family to family."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return 2048
