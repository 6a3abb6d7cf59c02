"""Where a model runs: the device that an option names, what a GPU must be able to do, and how much fits into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from selfdraft.errors import LoadError, OptionError, UnsupportedModel
from selfdraft.models.kinds import is_spread
from selfdraft.models.runner import kernel_build
from selfdraft.types import check_device, check_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BFLOAT16_FROM = (8, 0)
"""Compute capability (Ampere) from which on a GPU multiplies bfloat16."""
USED = 0.92
"""Share of the free memory that keys and values may take, ..."""
KEPT_FREE = 2**30
"""... beside these bytes for what passes compute."""
GIB = 2**30
BEHIND = 256
"""Places behind the longest text: rows of a draft stand there before they are kept."""


def pick_device(name: str, size: int = 0) -> torch.device:
    """The device of the option `device`; `size` are the bytes of the weights, 0 where they are not known.

    'auto': the first GPU with bfloat16 units that has room for the weights, else the CPU. Nothing is loaded.
    Errors: OptionError for a name that there is not, and for a GPU that is not there.
    """
    check_device(name)
    if name == "auto":
        return next((gpu for gpu in map(_gpu, range(_count())) if _suits(gpu, size)), torch.device("cpu"))
    if name == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None and torch.version.hip is None:
        raise OptionError(
            f"device={name!r}: this torch ({torch.__version__}) was built without CUDA; install a CUDA build "
            "(https://pytorch.org), or use device 'cpu'"
        )
    count, index = _count(), int(name.partition(":")[2] or 0)
    if not count:
        raise OptionError(
            f"device={name!r}: torch finds no GPU here; see what nvidia-smi says of the driver, or use device 'cpu'"
        )
    if index >= count:
        there = "there is only cuda:0" if count == 1 else f"there are cuda:0 to cuda:{count - 1}"
        raise OptionError(f"device={name!r}: {there}")
    return _gpu(index)


def _count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def _suits(device: torch.device, size: int) -> bool:
    return torch.cuda.get_device_capability(device) >= BFLOAT16_FROM and size < USED * free_bytes(device) - KEPT_FREE


def file_bytes(folder: Path) -> int:
    """Bytes of the weights in a checkpoint's folder; 0 where they lie elsewhere."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def chunk_on(device: torch.device) -> int:
    """Tokens of one piece of a prompt: on a GPU so many that launches and reading the weights do not count."""
    return 2048 if device.type == "cuda" else 256


def free_bytes(device: torch.device) -> int:
    """Bytes that a GPU has left."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def bfloat16_units() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself; torch emulates their products where it does not."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def dtype_on(name: str | torch.dtype, device: torch.device, runner: str = "auto") -> torch.dtype | None:
    """The dtype to load in on a device, for the option `dtype`; None is the checkpoint's own.

    'auto' is the checkpoint's own, but float16 on a GPU without bfloat16 units, and float32 on a CPU where products of
    bfloat16 are emulated, so that every further row costs as much as the first: without units, and without the fast
    runner, whose kernels widen bfloat16 as they read it. Errors: OptionError for bfloat16 on such a GPU, and
    for an unknown name.
    """
    name = str(name).removeprefix("torch.") if isinstance(name, torch.dtype) else name
    check_dtype(name)
    able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= BFLOAT16_FROM
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if dtype == torch.bfloat16 and not able:
            major, minor = torch.cuda.get_device_capability(device)
            raise OptionError(
                f"dtype='bfloat16': {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no "
                "bfloat16 units, which come with 8.0; use dtype 'float16' or 'float32'"
            )
        return dtype
    if device.type == "cpu":
        return None if bfloat16_units() or (runner != "plain" and kernel_build.vectors()) else torch.float32
    return None if able else torch.float16


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on the device. Errors: LoadError when its weights do not fit there."""
    if device.type == "cpu":
        return model
    size, free = weight_bytes(model), free_bytes(device)
    if size > free:
        raise LoadError(
            f"{device} has {free / GIB:.1f} GiB free, and the weights take {size / GIB:.1f} GiB: free some of it, give "
            "a smaller dtype, or use device 'cpu'"
        )
    with in_memory_of(device):
        return model.to(device)


@contextmanager
def in_memory_of(device: torch.device) -> Iterator[None]:
    """Loading and proving a model on a device. Errors: LoadError when its memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoadError(
            f"{device} has too little memory to load this model and to prove it, which takes some blocks of it in a "
            "wide dtype: free some of it, give a smaller dtype, or use device 'cpu'"
        ) from error


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights; shared ones count once."""
    found = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.parameters()}
    return sum(found.values())


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens fit: `free` bytes beside the weights, `token_bytes` of keys and values a token, `slots` requests.

    `context`: most tokens that the model has.
    """

    free: int
    token_bytes: int
    slots: int
    context: int

    @property
    def places(self) -> int:
        """Tokens of a request that fit when all slots are full."""
        bytes_left = max(int(USED * self.free) - KEPT_FREE, 0)
        return min(self.context, max(bytes_left // (self.token_bytes * self.slots) - BEHIND, 0))

    def take(self, wanted: int | None) -> int:
        """Tokens of a request: those that are wanted, or as many as fit. Errors: OptionError with the numbers."""
        needed = wanted or min(self.context, 2)
        if self.places < needed:
            each, free = self.token_bytes / 2**20, self.free / GIB
            raise OptionError(
                f"no memory for {self.slots} requests of {needed} tokens: {free:.1f} GiB are free beside the weights, "
                f"and a token takes {each:.3f} MiB of keys and values, so {self.places} tokens fit; lower max_num_seqs "
                "or max_model_len, or give kv_cache_dtype='int8'"
            )
        return wanted or self.places


def check_placement(model: PreTrainedModel) -> None:
    """Refuse a model whose passes would not run, or not be ours. Errors: UnsupportedModel says why."""
    name = type(model).__name__
    tensors = [*model.parameters(), *model.buffers()]
    if is_spread(model):
        raise UnsupportedModel(
            f"{name} is split over several processes (tp_plan), which is not supported: each would draft by its own "
            "clock, and all would wait for one another for ever; load it without tp_plan, on one device"
        )
    kinds = {tensor.device.type for tensor in tensors}
    if "meta" in kinds:
        raise UnsupportedModel(
            f"{name} has weights that are not in memory (on 'meta', or moved to disk by device_map); load it whole, on "
            "one device"
        )
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise UnsupportedModel(
            f"{name} lies on {len(devices)} devices ({', '.join(devices)}), and has to lie on one; load it "
            "without device_map, then model.to('cuda:0')"
        )
    for path, module in model.named_modules():
        if not module._modules or "forward" not in vars(module):
            continue
        if "_hf_hook" in vars(module):
            raise UnsupportedModel(
                f"{name}: accelerate's hooks (device_map) run modules in their own way; load it without device_map, or "
                "call accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        raise UnsupportedModel(
            f"{name}: the forward of module {path or 'model'!r} was replaced (use_kernels, or a patch); load the model "
            "without that"
        )


def gpu_facts(device: torch.device) -> dict[str, object]:
    """What a figure or a bit depends on where a model lies on a GPU; nothing on another device."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "compute_capability": f"{major}.{minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "tf32": uses_tf32(),
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver where Linux tells it."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", told)
    return found[0] if found else None


def uses_tf32() -> bool:
    """Whether products of float32 may be rounded to TF32 on a GPU."""
    return torch.get_float32_matmul_precision() != "highest"
