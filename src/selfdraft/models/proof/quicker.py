"""Whether glue is fused on a GPU: both ways are captured when a model is loaded, and the quicker one is kept."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.kinds import first_line
from selfdraft.models.proof.shapes import first_blocks
from selfdraft.models.target import HFTarget
from selfdraft.types import Clock

TIMES = 20
"""Replays in a row that are timed at once."""


def quicker(model: PreTrainedModel, settings: GraphSettings, clock: Clock) -> tuple[GraphSettings, str]:
    """`settings`, or the same without glue where that is quicker or the only way; and what `runs` says of it."""
    apart = replace(settings, glue=None)
    if settings.glue is None:
        return settings, ""
    try:
        one = _seconds(model, settings, clock)
    except Exception as error:  # whatever stops a kernel, the stock forward is there
        return apart, f"; small kernels are not fused: {first_line(error)}"
    other = _seconds(model, apart, clock)
    told = f"two blocks take {1e3 * one:.3f} ms with small kernels fused, {1e3 * other:.3f} ms without"
    return (settings, f" ({told})") if one <= other else (apart, f"; small kernels are not fused: {told}")


def _seconds(model: PreTrainedModel, settings: GraphSettings, clock: Clock) -> float:
    """Of a replay of the first blocks."""
    target = HFTarget(first_blocks(model), graphs=settings)
    assert target.graphs is not None
    try:
        found = target.graphs.seconds(clock, TIMES)
        if settings.glue is not None and not target.graphs.fused:  # no tape, or one that broke when it was run
            raise RunnerUnavailable(str(target.graphs).rpartition("not fused: ")[2])
        return found
    finally:
        target.graphs.close()
