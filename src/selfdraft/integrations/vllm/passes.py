"""Drafting passes through vLLM's own model, with its weights and its paged KV cache.

The rows stand behind the last verified token of each request, in blocks that vLLM has given to it already; its next
step computes the same places anew, so nothing has to be undone. A draft ends where the request's last block does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.errors import UnsupportedModel
from selfdraft.protocols import DraftExtras
from selfdraft.types import PassVariant, Skip

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""A decoder layer of the Llama kind: x += self_attn(norm(x)), then x += mlp(norm(x))."""
FAMILIES = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of vLLM whose layers are of that kind."""


class ShortPasses:
    """The target of a drafter that runs vLLM's model with sublayers left out; `runner` is set before the first pass."""

    num_mask_ids = 0
    runner: GPUModelRunner

    def __init__(self, vocab: int, context: int, layers: int) -> None:
        self.vocab, self.max_length = vocab, context
        self.extras = DraftExtras(time.perf_counter, num_layers=layers)

    def check_model(self) -> None:
        """Errors: UnsupportedModel when its layers cannot be run one by one."""
        inner = getattr(self.runner.model, "model", None)
        layers = list(getattr(inner, "layers", []))
        kinds = sorted({type(layer).__name__ for layer in layers})
        fits = all({name for name, _ in layer.named_children()} == PARTS for layer in layers)
        if not layers or not fits or not set(kinds) <= set(FAMILIES):
            raise UnsupportedModel(
                f"LayerSkip cannot run the layers of {type(self.runner.model).__name__} ({', '.join(kinds) or 'none'}) "
                f"one by one; it knows {', '.join(FAMILIES)}: take Merged"
            )

    def room(self, sequence: Sequence) -> int:
        """Rows that fit behind the verified tokens into the blocks that the request has."""
        table = self.runner.input_batch.block_table[0]
        return int(table.num_blocks_per_row[sequence.slot]) * int(table.block_size) - sequence.num_cached

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        """Logits [rows, vocab] of a pass with one row for each sequence; `slot` of a span is its batch row."""
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        assert all(span.size == 1 for span in rows.spans), "a chain is drafted row by row"
        assert isinstance(short, Skip)
        runner, device = self.runner, self.runner.device
        table = runner.input_batch.block_table[0]
        places = torch.tensor([span.slot for span in rows.spans], device=device)
        blocks = table.block_table.gpu[places]
        positions, tokens = torch.tensor([rows.positions, rows.tokens], device=device)
        column = (positions // table.block_size).unsqueeze(1)
        slots = blocks.gather(1, column).squeeze(1).long() * table.block_size + positions % table.block_size
        starts = torch.arange(len(rows) + 1, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=(positions + 1).int(),
            num_reqs=len(rows),
            num_actual_tokens=len(rows),
            max_query_len=1,
            max_seq_len=max(rows.positions) + 1,
            block_table_tensor=blocks,
            slot_mapping=slots,
            positions=positions,
        )
        metadata: dict[str, object] = {}
        mapping: dict[str, Tensor] = {}
        for group in (group for groups in runner.attn_groups for group in groups):
            built = group.build_metadata_for_drafting(common, draft_index=0)
            metadata |= dict.fromkeys(group.layer_names, built)
            mapping |= dict.fromkeys(group.layer_names, slots)
        with set_forward_context(metadata, runner.vllm_config, num_tokens=len(rows), slot_mapping=mapping):
            hidden = self._layers(tokens, positions, short)
        logits: Tensor = runner.model.compute_logits(hidden)
        return logits

    def _layers(self, tokens: Tensor, positions: Tensor, skip: Skip) -> Tensor:
        """Hidden states [rows, width] behind the last norm."""
        inner = self.runner.model.model
        hidden: Tensor = inner.embed_input_ids(tokens)
        for index, layer in enumerate(inner.layers):
            if index not in skip.attention:
                hidden = hidden + layer.self_attn(positions, layer.input_layernorm(hidden))
            if index not in skip.mlp:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed: Tensor = inner.norm(hidden)
        return normed

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """vLLM itself keeps what it verified."""

    def reuse(self, slot: int, source: int, count: int) -> None:
        """vLLM itself reuses what it has."""

    def next_boundary(self, position: int) -> int:
        return self.max_length
