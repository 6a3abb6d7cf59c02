"""The proof at load tried on many models: every planted wrong must be refused, and no right model.

    PYTHONPATH=src:. python recipes/proof.py [FOLDER ...]     # families of the tests with outliers, and checkpoints

Prints a table in markdown: for each model and dtype the largest error of each part of the proof in units of its limit
(below 1 passes), and for each wrong the same error, which must be above 1. It plants them as the tests do, so it needs
the tests beside it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.test_families import FAMILIES, build
from tests.wrongs import outliers, wrongs_of
from transformers import PreTrainedModel

from selfdraft.errors import RunnerUnavailable, UnsupportedModel
from selfdraft.models.load import load_model
from selfdraft.models.proof.whole_model import prove
from selfdraft.models.target import HFTarget

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WRONGS = ("position", "shared cache", "window", "sink", "bias")


def models(folders: list[str]) -> Iterator[tuple[str, str, PreTrainedModel]]:
    for dtype, kind in DTYPES.items():
        for folder in folders:
            yield Path(folder).name, dtype, load_model(folder, dtype=kind)
        for name, family in FAMILIES.items():
            made = build(family.config, family.options, family.model, torch.float32)
            yield name, dtype, outliers(made).to(kind)


def right(model: PreTrainedModel) -> list[str]:
    """Error over limit in a wide dtype, in the model's own on the plain path, of the runner's blocks and passes."""
    try:
        plain = prove(HFTarget(model), model)
    except UnsupportedModel as error:
        return ["stock is not finite" if "not finite" in str(error) else f"REFUSED: {error}", "", "", ""]
    said = [f"{plain.exact:.1g}" if plain.exact is not None else "none", f"{plain.rounding:.2f}"]
    try:
        fast = prove(HFTarget(model, fast=True), model)
        return [*said, f"{fast.rounding:.2f}", f"{fast.blocks or 0:.1g}"]
    except RunnerUnavailable:
        return [*said, "", ""]
    except UnsupportedModel as error:
        return [*said, f"REFUSED: {error}", ""]


def refused(model: PreTrainedModel) -> dict[str, str]:
    """For each wrong its error over the limit, or what was said."""
    found = {}
    for wrong, plant in wrongs_of(model).items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            try:
                prove(HFTarget(model), model)
                found[wrong] = "PASSED"
            except UnsupportedModel as error:
                parts = re.search(r"differ by (\S+) of .* only (\S+) would", str(error))
                found[wrong] = f"{float(parts[1]) / float(parts[2]):.1g}" if parts else "refused"
    return found


def main(folders: list[str]) -> None:
    print("| model | dtype | wide | plain | fast | blocks | " + " | ".join(WRONGS) + " |")
    print("|" + "---|" * (6 + len(WRONGS)))
    for name, dtype, model in models(folders):
        own = right(model)
        planted = {} if own[0].startswith("stock") else refused(model)
        print("| " + " | ".join([name, dtype, *own, *(planted.get(wrong, "") for wrong in WRONGS)]) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
