"""The machine that something was measured or proved on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    return _told("model name") or platform.processor()


def cpu_vendor() -> str:
    """Who made the processor, where Linux tells it: GenuineIntel, AuthenticAMD."""
    return _told("vendor_id")


def cpu_flags() -> set[str]:
    """What the processor can do, where Linux on x86-64 tells it: avx2, avx512_vnni and so on."""
    return set(_told("flags").split()) if platform.machine() == "x86_64" else set()


def _told(field: str) -> str:
    """What Linux says of the first processor; nothing where there is no such field."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def machine_of(dtype: torch.dtype | None, device: torch.device) -> dict[str, object]:
    """What else a figure or a bit depends on where a model lies: its dtype, the device, threads, versions."""
    import torch

    from selfdraft.models.device import gpu_facts

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": f"{device.type} {name or platform.machine()} {cpu_name()}".strip(),
        **gpu_facts(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "selfdraft": version("selfdraft"),
    }
