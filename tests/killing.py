"""Kills a training again and again, lets it go on, and compares what it leaves with an undisturbed run.

    python -m tests.killing FOLDER [--kills 10] [--seed 0] [--stride 1] -- OPTIONS OF selfdraft train

Kills (SIGKILL) come at random moments, and before every `stride`-th renaming of a file, where a run is most fragile.
Each run is a fork of this process, which has loaded the libraries. Prints what happened as JSON; ends with 1 when a
file differs or something was left behind. `tests/test_train.py` does the same with a tiny model and fewer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = ("selfdraft.cli", "selfdraft.llm", "selfdraft.train.run", "selfdraft.train.texts", "peft", "accelerate")


def start(options: SequenceOf[str], output: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """The id of a process that runs `selfdraft train` into `output`; what it says goes into a file beside."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = output.with_suffix(".log").open("a")
        prepare()
        sys.argv = ["selfdraft", "train", "--output", str(output), *options]
        import_module("selfdraft.cli").main()
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ends(child: int) -> bool:
    """True when it ended well, False when it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the training ended with an error; see its .log"
    return True


def kill_at_random(options: SequenceOf[str], folder: Path, kills: int, seconds: float, seed: int) -> list[Path]:
    """Outputs of trainings that were killed so many times in all; a new one begins where a kill came too late."""
    draw = random.Random(seed)
    outputs = [folder / "random0"]
    while kills:
        child = start(options, outputs[-1])
        time.sleep(draw.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        if ends(child):
            outputs.append(folder / f"random{len(outputs)}")
        else:
            kills -= 1
    assert ends(start(options, outputs[-1]))
    return outputs


def kill_at_renamings(options: SequenceOf[str], folder: Path, stride: int) -> list[Path]:
    """Outputs of trainings of which each was killed before another renaming, and then went on to the end."""

    def arm(left: int) -> None:
        rename = os.replace

        def replace(source: Path, goal: Path) -> None:
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            rename(source, goal)

        os.replace = replace  # type: ignore[assignment]

    outputs: list[Path] = []
    while not ends(start(options, output := folder / f"renaming{len(outputs)}", partial(arm, stride * len(outputs)))):
        assert ends(start(options, output))
        outputs.append(output)
    return outputs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def compare(options: SequenceOf[str], folder: Path, *, kills: int, seed: int = 0, stride: int = 1) -> dict[str, Any]:
    """What was done and which files, by output, are not those of an undisturbed run."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole"
    began = time.perf_counter()
    assert ends(start(options, whole))
    seconds = time.perf_counter() - began
    outputs = kill_at_random(options, folder, kills, seconds, seed)
    renamed = kill_at_renamings(options, folder, stride)
    wanted = contents(whole)
    odd = [
        f"{output.name}/{name}"
        for output in (*outputs, *renamed)
        for name, _ in sorted(contents(output).items() ^ wanted.items())
    ]
    report = {"kills": kills, "trainings": len(outputs), "kills_before_renamings": len(renamed)}
    return report | {"different": odd, "files": [*wanted], "seconds_undisturbed": round(seconds, 2)}


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
    report = compare(asked.options, asked.folder, kills=asked.kills, seed=asked.seed, stride=asked.stride)
    print(json.dumps(report))
    return 1 if report["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
