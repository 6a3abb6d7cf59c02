"""What tells one model from another: the names under which something is kept about it.

Each is a hash, and each has its own question, for what must not be used again after one change outlives another:

| name | changes with | and not with | names |
|---|---|---|---|
| `config_hash` | the configuration, formats of blocks | weights | a profile: what a pass costs |
| `base_hash` | sizes, norms, embeddings | dtype, quantisation | the model that an adapter was trained for |
| `weights_hash` | the ends of every weight, dtype | code | the study of a skip set |
| `whole_hash` | configuration, code, modules, samples of all weights | | a proof: the strictest |

Their contents are part of file formats: another hash makes what users have kept useless.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from selfdraft.models.packed.layers import BlockEmbedding, block_layers, formats_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 256
"""Numbers of a weight that are read to tell it from another: these, evenly spread, and its first and last."""
ENDS = 64
"""Numbers that are read at either end of a weight."""


def config_hash(model: PreTrainedModel) -> str:
    """A name for the shape of a model: its configuration and the formats of its blocks, whatever its weights are."""
    blocks = formats_of(model)
    return hashlib.blake2b((_config(model) + (str(blocks) if blocks else "")).encode(), digest_size=12).hexdigest()


def base_hash(model: PreTrainedModel) -> str:
    """A hash by which an adapter knows its model: sizes, some embeddings and all norms, as bfloat16 in any dtype."""
    config = model.config.get_text_config()
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{config.vocab_size} {config.hidden_size} {config.num_hidden_layers}".encode())
    samples = [_table_samples(model.get_input_embeddings())]
    samples += [p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name.rsplit(".", 2)[-2]]
    for sample in samples:
        digest.update(_bytes(sample.to("cpu", torch.bfloat16)))
    return digest.hexdigest()


def _table_samples(table: nn.Module) -> Tensor:
    """Some numbers of the embeddings; of block weights those before they were rounded, where they are known."""
    if isinstance(table, BlockEmbedding):
        if table.samples is not None:
            return table.samples
        ids = torch.arange(0, table.num_embeddings, max(1, table.num_embeddings // 64))
        return table.rows(ids, torch.float32)[:, :16]
    weight = table.weight
    assert isinstance(weight, Tensor)
    return weight[:: max(1, len(weight) // 64), :16]


def weights_hash(model: PreTrainedModel) -> str:
    """A name for these very weights: of every parameter its name, type, shape and first and last values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(_heading(name, weight))
        flat = weight.detach().reshape(-1)
        digest.update(_bytes(torch.cat([flat[:ENDS], flat[-ENDS:]])))
    return digest.hexdigest()


def whole_hash(model: PreTrainedModel) -> str:
    """A name for this very model: its configuration, the code and tree of its modules, and samples of all weights."""
    tree = [f"{name} {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()]
    attention = str(getattr(model.config, "_attn_implementation", None))
    tree += [f"{name} {layer.extra_repr()}" for name, layer in block_layers(model)]
    texts = [_config(model), *tree, attention, _source(type(model))]
    weights = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return hash_of(*(text.encode() for text in texts), *samples_of(weights))


def samples_of(named: Iterable[tuple[str, Tensor]]) -> Iterable[bytes]:
    """For each tensor its name, type and shape, and some of its numbers."""
    for name, tensor in named:
        yield _heading(name, tensor)
        try:
            flat = tensor.detach().reshape(-1)
            yield _bytes(torch.cat([flat[:ENDS], flat[:: max(1, flat.numel() // SAMPLES)], flat[-ENDS:]]))
        except (RuntimeError, TypeError, NotImplementedError):  # a tensor of another library's own kind
            yield type(tensor).__name__.encode()


def hash_of(*parts: bytes) -> str:
    """A hash of parts, each with its length: no two lists of parts are read alike."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _config(model: PreTrainedModel) -> str:
    """The configuration without where it was loaded from, and by what."""
    kept = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return json.dumps(kept, sort_keys=True, default=str)


def _source(kind: type) -> str:
    """A checkpoint's own code is no part of a version."""
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):
        return ""


def _heading(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
