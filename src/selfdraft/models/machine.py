"""The machine that something was measured or proved on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def machine_of(model: nn.Module) -> dict[str, object]:
    """What else a figure or a bit depends on where a model lies: its dtype, the device, threads, versions."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    device = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else platform.processor()
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": f"{weight.device.type} {device or platform.machine()} {cpu_name()}".strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "selfdraft": version("selfdraft"),
    }
