"""What the modules of a model say about how it computes: experts, quantised weights, layers that mix rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_experts(model: PreTrainedModel) -> bool:
    """True for a mixture of experts."""
    return any(name.endswith("experts") or "Experts" in type(m).__name__ for name, m in model.named_modules())


def is_quantised(model: PreTrainedModel) -> bool:
    """True for a checkpoint whose weights another library keeps in a form of its own."""
    return getattr(model.config, "quantization_config", None) is not None


def is_spread(model: PreTrainedModel) -> bool:
    """True when weights are spread over several processes, as `tp_plan` of transformers does."""
    tensors = (*model.parameters(), *model.buffers())
    return any("DTensor" in (type(tensor).__name__, type(tensor.data).__name__) for tensor in tensors)


def mixes_rows(model: PreTrainedModel) -> bool:
    """True when a layer of bitsandbytes treats columns apart in which any row of the pass has an outlier.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2. The probe of shapes cannot see it: its rows have no outliers.
    """
    states = (getattr(module, "state", None) for module in model.modules())
    return any(getattr(state, "threshold", 0.0) > 0.0 for state in states)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, and the next one where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
