"""A file of prompts on Ray Data, its driver killed at random: `python -m recipes.ray_batches [--rows 500] [--kills 4]`.

Answers rows with the pocket model as `selfdraft generate --ray` does, and kills the driver (SIGKILL) after a random
number of blocks, again and again, until a run comes to its end. Each row must be there once, with the tokens of plain
decoding in one process. Prints one JSON object; ends with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.serving import pocket, wait_until
from tests.test_ray_data import answers, kill, start, write_rows

from selfdraft import SamplingParams


def run_for(blocks: int, rows: Path, folder: Path, options: Sequence[str]) -> int:
    """A run that is killed when it has answered so many more blocks; how many there are then."""

    def done() -> int:
        return len([*folder.glob("part-*")])

    goal = done() + blocks
    process = start(rows, folder, *options)
    wait_until(lambda: done() >= goal or process.poll() is not None)
    kill(process)
    return done()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, killed_after = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as name:
        rows, folder = Path(name) / "rows.jsonl", Path(name) / "answers"
        prompts = write_rows(rows, asked.rows)
        options = ("--block-rows", "8", "--workers", str(asked.workers))
        for _ in range(asked.kills):
            more = draw.randrange(1, max(2, asked.rows // 8 // asked.kills))
            killed_after.append(run_for(more, rows, folder, options))
        assert start(rows, folder, *options).wait(600) == 0, folder.with_suffix(".log").read_text()
        found = answers(folder)
    plain = pocket("none").generate(prompts, SamplingParams(max_tokens=8, temperature=0.8, seed=3))
    ids = [row["id"] for row in found]
    wanted = [f"row-{i}" if i % 3 == 0 else i for i in range(asked.rows)]
    equal = sum(row["token_ids"] == [*one.outputs[0].token_ids] for row, one in zip(found, plain, strict=False))
    report = {"rows": len(ids), "once each, in order": ids == wanted, "equal": equal, "blocks at kills": killed_after}
    print(json.dumps(report))
    return 0 if ids == wanted and equal == asked.rows else 1


if __name__ == "__main__":
    sys.exit(main())
