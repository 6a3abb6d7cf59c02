"""Kills a training again and again, lets it go on, and compares what it leaves with an undisturbed run.

    python -m tests.killing FOLDER [--kills 10] [--seed 0] [--stride 1] -- OPTIONS OF selfdraft train

Kills come at random moments (SIGKILL), and once before every single renaming of a file, where a run is most fragile.
Each run is a fork of one process that has loaded the libraries. Prints what happened as JSON; 0 when all is equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

RESULTS = ("adapter_model.safetensors", "masks.safetensors", "adapter_config.json", "selfdraft.json", "own_texts.jsonl")
LIBRARIES = ("selfdraft.cli", "selfdraft.llm", "selfdraft.train.run", "selfdraft.train.texts", "peft", "accelerate")


def start(options: list[str], output: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """The id of a process that runs `selfdraft train` into `output`; what it says goes into a file beside."""
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(output.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare()
        sys.argv = ["selfdraft", "train", "--output", str(output), *options]
        import_module("selfdraft.cli").main()
    except SystemExit as ending:
        os._exit(int(ending.code or 0))
    finally:
        os._exit(1)


def wait(child: int) -> bool:
    """True when it ended well, False when it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the training ended with an error; see its .log"
    return True


def kill_at_random(options: list[str], folder: Path, kills: int, seconds: float, draw: random.Random) -> list[Path]:
    """Outputs of trainings that were killed so many times in all; the last one has ended."""
    outputs = [folder / "random0"]
    while kills:
        child = start(options, outputs[-1])
        time.sleep(draw.uniform(0.0, seconds))
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:  # too late: the next kill meets a new training
            outputs.append(folder / f"random{len(outputs)}")
            continue
        os.kill(child, signal.SIGKILL)
        kills -= not wait(child)
    assert wait(start(options, outputs[-1]))
    return outputs


def kill_at_renamings(options: list[str], folder: Path, stride: int) -> list[Path]:
    """Outputs of trainings of which each was killed before another renaming, and then went on to the end."""

    def armed(number: int) -> None:
        rename = os.replace
        left = [number]

        def replace(source: Path, goal: Path) -> None:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            rename(source, goal)

        os.replace = replace  # type: ignore[assignment]

    outputs: list[Path] = []
    while True:
        output = folder / f"renaming{len(outputs)}"
        if wait(start(options, output, partial(armed, stride * len(outputs)))):
            return outputs
        assert wait(start(options, output))
        outputs.append(output)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="Kill before every so manyth renaming.")
    parser.add_argument("options", nargs="+")
    asked = parser.parse_args()
    for name in LIBRARIES:
        import_module(name)
    import_module("torch").set_num_threads(1)
    whole = asked.folder / "whole"
    began = time.perf_counter()
    assert wait(start(asked.options, whole))
    seconds = time.perf_counter() - began
    outputs = kill_at_random(asked.options, asked.folder, asked.kills, seconds, random.Random(asked.seed))
    renamed = kill_at_renamings(asked.options, asked.folder, asked.stride)
    wanted = {name: (whole / name).read_bytes() for name in RESULTS if (whole / name).exists()}
    odd = [
        f"{output.name}/{name}"
        for output in (*outputs, *renamed)
        for name, content in wanted.items()
        if not (output / name).exists() or (output / name).read_bytes() != content
    ]
    left = {file.name for output in (*outputs, *renamed) for file in output.iterdir()} - {*RESULTS}
    report = {"kills": asked.kills, "trainings": len(outputs), "kills_before_renamings": len(renamed)}
    report |= {"different": odd, "left": sorted(left), "files": sorted(wanted)}
    print(json.dumps(report | {"seconds_undisturbed": round(seconds, 2)}))
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
