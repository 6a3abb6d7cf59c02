"""Checkpoint to Target: load a folder or hub name, refuse what cannot be decoded exactly, prove the rest.

A model is never trusted by its name. It is refused for what its configuration says, then a few tokens go through the
adapter and are compared with the stock model's own forward pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from selfdraft.errors import LoadError, OptionError, RunnerUnavailable, UnsupportedModel
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.checkpoint import gguf, gguf_blocks
from selfdraft.models.checkpoint.end_ids import whole_ends
from selfdraft.models.checkpoint.folder import (
    check_folder,
    check_tokenizer_files,
    check_vocabulary,
    has_tokenizer,
    tokenizer_fault,
)
from selfdraft.models.checkpoint.load_errors import blaming
from selfdraft.models.checkpoint.lora import base_of, is_lora, merged
from selfdraft.models.checkpoint.places import find_gguf, place
from selfdraft.models.checkpoint.weights import check_weights
from selfdraft.models.device import check_placement
from selfdraft.models.exactness import MULTIPLES, NATURAL, Shapes
from selfdraft.models.facts import GROWING, context_of, ropes_of
from selfdraft.models.graph.cuda import cuda_settings, one_class
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.kinds import first_line, has_experts, is_quantised, mixes_rows
from selfdraft.models.kv_cache import KVCacheDtype, check_kv_cache_dtype
from selfdraft.models.packed.quantise import quantise_model
from selfdraft.models.proof.kept import ProofStore, Record, identity_of
from selfdraft.models.proof.one_class import equal_rows
from selfdraft.models.proof.quicker import quicker
from selfdraft.models.proof.shapes import probe_fast, probe_shapes
from selfdraft.models.proof.whole_model import prove
from selfdraft.models.runner import kernel_build
from selfdraft.models.target import Exactness, HFTarget
from selfdraft.types import Clock, Quantization

_log = logging.getLogger("selfdraft")


class Sizes(TypedDict):
    """What a target is made with, whichever way its passes run; see `open_target`."""

    slots: int
    context: int | None
    adapters: SequenceOf[MaskAdapter]
    kv_cache_dtype: KVCacheDtype
    clock: Clock


NO_ADAPTER = "selfdraft-merges-adapters-itself"
"""A subfolder that is nowhere: where transformers looks for an adapter, which it applies only if peft is installed."""
BITS = {"int8": 8, "int4": 4}
"""Bits of the weights by the option `quantization`."""
ATTENDING = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers whose whole memory is keys and values at positions."""


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
    lora: str | Path | None = None,
) -> PreTrainedModel:
    """A causal language model from a local folder, a GGUF file or a hub name, in eval mode; no pickle is opened.

    `dtype` None is the checkpoint's own; a checkpoint with a `quantization_config` loads as it is, and a GGUF file
    dequantised. `lora` is the folder of a LoRA adapter that is merged into the weights; a `path` that is such a folder
    itself stands for its base model with it merged.
    Errors: LoadError says what is wrong with which folder or name, and the way out.
    """
    if lora is not None:
        return merged(load_model(path, dtype=dtype, trust_remote_code=trust_remote_code), lora)
    if (file := find_gguf(path)) is not None:
        loaded = gguf.load_model(file, dtype)
        check_config(loaded.config)
        return loaded
    where = place(path)
    local = Path(where).is_dir()
    if local and is_lora(Path(where)):
        with _below(where):
            model = load_model(base_of(Path(where)), dtype=dtype, trust_remote_code=trust_remote_code)
        return merged(model, where)
    if local:
        check_folder(Path(where), trust_remote_code)
    config = _config(where, trust_remote_code, local)
    check_config(config)
    if getattr(config, "quantization_config", None) is not None:
        dtype = None
    with blaming(where):
        model, info = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` names them; transformers would only say that there are some
            adapter_kwargs={"subfolder": NO_ADAPTER},
        )
    check_weights(where, model, info)
    return model.eval()


def load_quantised(
    path: str | Path,
    quantization: Quantization,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
    lora: str | Path | None = None,
    compiled: bool = True,
    cache: bool = False,
) -> PreTrainedModel:
    """The model that a path and the option `quantization` of `LLM` stand for, in eval mode; see `load_model`.

    `compiled`: blocks of a GGUF file are worth keeping only where the fast runner can be built; else they are
    dequantised, which is logged. `cache`: the head of such a file is taken from the user's cache folder, and kept
    there. Errors: LoadError; OptionError for a checkpoint that is quantised already.
    """
    file = find_gguf(path)
    if quantization == "auto" and file is not None and lora is None and (not compiled or _kernels(file)):
        own = gguf_blocks.load_blocks(file, dtype, cache=cache)
        check_config(own.config)
        return own
    model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code, lora=lora)
    if quantization not in BITS:
        return model
    if is_quantised(model):
        raise OptionError(f"quantization={quantization!r}: {path} is quantised already; leave the option out")
    try:
        return quantise_model(model, BITS[quantization])
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error


def _kernels(file: Path) -> bool:
    """Whether there are kernels for block weights; if not, why is logged."""
    try:
        kernel_build.library()
    except RunnerUnavailable as error:
        _log.warning("%s: its blocks are dequantised, since the fast runner cannot run: %s", file, error)
        return False
    return True


def _config(where: str, trust_remote_code: bool, local: bool) -> PreTrainedConfig:
    """The configuration. End ids that transformers does not take, such as null, are left out and logged."""
    with blaming(where):
        try:
            return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=local)
        except StrictDataclassError:
            fields, _ = PreTrainedConfig.get_config_dict(where, local_files_only=local)
            kept = whole_ends(fields)
            if kept == fields or fields.get("model_type") not in CONFIG_MAPPING:
                raise
            return CONFIG_MAPPING[fields["model_type"]].from_dict(kept)


@contextmanager
def _below(folder: str) -> Iterator[None]:
    """Say of an error that it is about the base model of a LoRA adapter."""
    try:
        yield
    except LoadError as error:
        text = str(error)
        if not text.startswith(folder):
            text = f"{folder} is a LoRA adapter, and its base model: {error}; or give --model BASE and --lora DIR"
        raise type(error)(text) from error


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, cache: bool = False
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; of a LoRA adapter its own, or that of its base model.

    `cache`: that of a GGUF file is taken from the user's cache folder, and kept there.
    Errors: LoadError when there is none, or none can be made of its files.
    """
    if (file := find_gguf(path)) is not None:
        return gguf.load_tokenizer(file, cache=cache)
    where = place(path)
    folder = Path(where)
    if folder.is_dir():
        if not has_tokenizer(folder) and is_lora(folder):
            return load_tokenizer(base_of(folder), trust_remote_code=trust_remote_code, cache=cache)
        check_tokenizer_files(folder)
    try:
        with blaming(where, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                where, trust_remote_code=trust_remote_code, local_files_only=folder.is_dir()
            )
    except LoadError as error:
        if "trust_remote_code" in str(error) or not folder.is_dir() or (why := tokenizer_fault(folder)) is None:
            raise
        raise LoadError(f"{where}: cannot load the tokenizer: {why}") from error
    check_vocabulary(where, tokenizer)
    return tokenizer


def open_target(
    model: PreTrainedModel,
    *,
    slots: int,
    exactness: Literal["bitwise", "token"] = "bitwise",
    context: int | None = None,
    adapters: SequenceOf[MaskAdapter] = (),
    runner: Literal["auto", "plain", "fast"] = "auto",
    kv_cache_dtype: KVCacheDtype = "auto",
    proofs: ProofStore | None = None,
    clock: Clock = time.perf_counter,
) -> HFTarget:
    """A proven target with `slots` slots of at most `context` tokens (None: what the model has).

    `target.exactness` says which level was reached, which may be below the one asked for, and why; `target.runs` how
    passes are run. `runner` 'auto' takes the fast runner where it works. `kv_cache_dtype` 'int8' stores keys and
    values as codes of 8 bits with a scale for each token and head, 'auto' as they are. What was proved is kept in
    `proofs`, and not proved again; None keeps nothing. `clock` is what drafters and measurements read, in seconds.
    Errors: UnsupportedModel; OptionError when `context` is longer than the model's; RunnerUnavailable for 'fast'.
    """
    check_placement(model)
    check_supported(model)
    most = context_of(model)
    if context is not None and not 1 <= context <= most:
        growing = any(rope.get("rope_type") in GROWING for rope in ropes_of(model.config.get_text_config()))
        why = "; its rotary frequencies change beyond that, and with them the keys of old tokens" if growing else ""
        error = UnsupportedModel if growing else OptionError
        raise error(f"context={context}: this model has 1 to {most} positions here{why}")
    if runner not in ("auto", "plain", "fast"):
        raise OptionError(f"runner={runner!r} is unknown; there are 'auto', 'plain' and 'fast'")
    check_kv_cache_dtype(kv_cache_dtype)
    sizes = Sizes(slots=slots, context=context, adapters=adapters, kv_cache_dtype=kv_cache_dtype, clock=clock)
    if proofs is None or next(model.parameters()).device.type == "cuda":  # the proof is of graphs, made now
        return _proven(model, exactness, runner, sizes)
    told = {"exactness": exactness, "runner": runner, "context": context, "kv_cache_dtype": kv_cache_dtype}
    identity = identity_of(model, adapters, told)
    known = proofs.read(identity)
    if known is not None:
        with suppress(RunnerUnavailable):
            target = HFTarget(model, shapes=Shapes(*known.shapes), exactness=known.exactness, fast=known.fast, **sizes)
            target.runs = known.runs
            return target
    target = _proven(model, exactness, runner, sizes)
    proofs.keep(identity, Record.of(target.exactness, target.shapes, target.runs))
    return target


def _proven(model: PreTrainedModel, exactness: Literal["bitwise", "token"], runner: str, sizes: Sizes) -> HFTarget:
    """The target of `open_target`, tried and proved now."""
    why = "asked for"
    if runner != "plain":
        opening = _open_graphs if next(model.parameters()).device.type == "cuda" else _open_fast
        try:
            return opening(model, exactness, **sizes)
        except (RunnerUnavailable, UnsupportedModel) as error:
            if runner == "fast":
                raise
            why = str(error)
    shapes, level = _pick_shapes(model, exactness, sizes["kv_cache_dtype"])
    target = HFTarget(model, shapes=shapes, exactness=level, **sizes)
    target.runs = f"plain: {why}"
    prove(target, model)
    return target


def _open_fast(model: PreTrainedModel, exactness: Literal["bitwise", "token"], **sizes: Unpack[Sizes]) -> HFTarget:
    """A target with the fast runner. Its rows need no canonical shapes; that is tried, too, before it is promised."""
    if has_experts(model) or is_quantised(model):
        raise RunnerUnavailable("the fast runner has no experts and no quantised weights")
    if exactness == "bitwise":
        even = probe_fast(model, sizes["kv_cache_dtype"])
        why = "two blocks gave the same bits plain and drafted, in one and in many rows"
        level = Exactness("bitwise", why) if even else Exactness("token", "two blocks round differently in many rows")
    elif exactness == "token":
        level = Exactness("token", "asked for")
    else:
        raise OptionError(f"exactness={exactness!r} is unknown; there are 'bitwise' and 'token'")
    target = HFTarget(model, exactness=level, fast=True, **sizes)
    prove(target, model)
    return target


def _open_graphs(model: PreTrainedModel, exactness: Literal["bitwise", "token"], **sizes: Unpack[Sizes]) -> HFTarget:
    """A target whose decoding passes are CUDA graphs. Equal bits are tried, too, before they are promised.

    Errors: RunnerUnavailable.
    """
    if is_quantised(model):
        raise RunnerUnavailable("graphs have no quantised weights")
    if sizes["kv_cache_dtype"] != "auto":
        raise RunnerUnavailable("graphs store keys and values as they are; leave out kv_cache_dtype to have them")
    if exactness not in ("bitwise", "token"):
        raise OptionError(f"exactness={exactness!r} is unknown; there are 'bitwise' and 'token'")
    weight = next(p for p in model.parameters() if p.is_floating_point())
    settings, told = quicker(model, cuda_settings(weight.device, weight.dtype), sizes["clock"])
    if settings.glue is not None:
        try:
            return _graphs(model, exactness, settings, told, sizes)
        except UnsupportedModel as error:
            settings, told = replace(settings, glue=None), f"; small kernels are not fused: {error}"
    return _graphs(model, exactness, settings, told, sizes)


def _graphs(
    model: PreTrainedModel, exactness: Literal["bitwise", "token"], settings: GraphSettings, told: str, sizes: Sizes
) -> HFTarget:
    """A proven target with these graphs, and what `runs` says of them besides. Errors: UnsupportedModel."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    level = Exactness("token", "asked for")
    if exactness == "bitwise" and has_experts(model):
        level = Exactness("token", "each expert sees as many rows as are sent to it, and that number varies")
    elif exactness == "bitwise":
        one = replace(cuda_settings(weight.device, weight.dtype, one_class(sizes["slots"])), glue=settings.glue)
        equal, rows = equal_rows(model, one)
        if equal == rows:
            settings = one
            level = Exactness("bitwise", f"{rows} rows of two blocks had the same bits plain and drafted, in one graph")
        else:
            level = Exactness("token", f"{equal} of {rows} rows of two blocks had the same bits plain and drafted")
    target = HFTarget(model, exactness=level, graphs=settings, **sizes)
    target.runs += told
    prove(target, model)
    return target


def _pick_shapes(
    model: PreTrainedModel, exactness: Literal["bitwise", "token"], kv_cache_dtype: KVCacheDtype
) -> tuple[Shapes, Exactness]:
    if exactness == "token":
        return NATURAL, Exactness("token", "asked for")
    if exactness != "bitwise":
        raise OptionError(f"exactness={exactness!r} is unknown; there are 'bitwise' and 'token'")
    if has_experts(model):
        return NATURAL, Exactness("token", "each expert sees as many rows as are sent to it, and that number varies")
    if mixes_rows(model):
        why = "LLM.int8() picks outlier columns over all rows of a pass; llm_int8_threshold=0 makes rows independent"
        return NATURAL, Exactness("token", why)
    try:
        shapes = probe_shapes(model, kv_cache_dtype)
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError, AssertionError, UnsupportedModel) as error:
        return NATURAL, Exactness("token", f"the trial of shapes failed: {first_line(error)}")  # `prove` says more
    if shapes is None:
        why = f"two blocks round differently for other row counts, even in multiples of {MULTIPLES[-1]}"
        return NATURAL, Exactness("token", why)
    why = f"two blocks gave the same bits plain and drafted, with rows in multiples of {shapes.rows}"
    return shapes, Exactness("bitwise", f"{why} and attention in multiples of {shapes.width}")


def check_supported(model: PreTrainedModel) -> None:
    """Refuse what cannot be decoded exactly, for what it says of itself. Errors: UnsupportedModel names the cause."""
    check_config(model.config)
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{name} keeps a recurrent state, which cannot be rewound to an earlier token")
    text = model.config.get_text_config()
    if getattr(text, "alibi", False) is True:
        raise UnsupportedModel(f"{name} puts positions into the attention mask (ALiBi), which is not supported")
    if not any(getattr(module, "_supports_attention_backend", False) for module in model.modules()):
        raise UnsupportedModel(
            f"{name} does not use the attention interface of transformers; another function can't go in"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float64 and has_experts(model):
        raise UnsupportedModel(f"{name} has experts, which transformers does not compute in float64; use float32")


def check_config(config: PreTrainedConfig) -> None:
    """The part of `check_supported` that needs no weights. Errors: UnsupportedModel."""
    kind = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{kind!r} is an encoder-decoder model; only decoder-only models can be decoded here")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    chunk = getattr(text, "attention_chunk_size", None)
    if "chunked_attention" in kinds or (chunk and not kinds):
        raise UnsupportedModel(f"{kind!r} attends in chunks of {chunk} tokens, which is not supported")
    if odd := sorted(kinds - ATTENDING):
        raise UnsupportedModel(
            f"{kind!r} has layers of type {odd[0]!r}, whose state cannot be rewound to an earlier token"
        )
