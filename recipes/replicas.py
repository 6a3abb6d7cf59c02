"""Replicas on Ray Serve under all that befalls them: `python -m recipes.replicas [--requests 200] [--kills 5]`.

Starts two replicas of the pocket model as `selfdraft serve --ray` does, and asks mixed requests (chats and completions,
whole and as streams, seeds, greedy and sampled). Every text must be that of plain decoding in one process: undisturbed,
while replicas are killed (SIGKILL) one after the other, and while all are restarted. Then one replica scales to two and
back under load. Prints one JSON object; ends with 1 when a request was lost, answered twice, or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from tests.replicas import Asked, Outcome, Replicas, mixed, plain
from tests.serving import wait_until


def verdicts(found: Iterable[tuple[Asked, Outcome]], wanted: Mapping[int, str]) -> dict[str, int]:
    """How the requests ended, counted."""
    counts: Counter[str] = Counter()
    for asked, outcome in found:
        text = wanted[asked.number]
        if not outcome.whole:
            counts["lost"] += 1
        elif len(outcome.ids) > 1:
            counts["of two answers"] += 1
        elif outcome.status != 200:
            counts[f"status {outcome.status}"] += 1
        elif outcome.error:
            counts["ended with an error" if text.startswith(outcome.text) else "wrong"] += 1
        else:
            counts["equal" if outcome.text == text else "wrong"] += 1
    return dict(counts)


def killing(replicas: Replicas, kills: int, seed: int) -> list[tuple[Asked, Outcome]]:
    """Requests while so many replicas are killed, each when the one before has been replaced."""
    draw, left, before = random.Random(seed), [kills], [replicas.names()]
    wait_until(lambda: len(replicas.names()) == 2)

    def look() -> bool:
        now = replicas.names()
        if len(now) == 2 and (now != before[0] or left[0] == kills):
            before[0] = now
            if not left[0]:
                return True
            left[0] -= 1
            os.kill(draw.choice(replicas.pids()), signal.SIGKILL)
        return False

    return replicas.asking(mixed(100, seed=1, most=96), look, clients=8)


def restarting(replicas: Replicas, restarts: int) -> list[tuple[Asked, Outcome]]:
    """Requests while all replicas are started anew, so many times."""
    found = []
    for number in range(1, restarts + 1):
        replicas.process.send_signal(signal.SIGHUP)
        over = partial(replicas.says, "all replicas are new", number)
        found += replicas.asking(mixed(100, seed=2), over)
    return found


def scaling(folder: Path) -> tuple[list[tuple[Asked, Outcome]], list[int]]:
    """Requests while one replica becomes two under load and one again without; how many there were."""
    seen = [1]
    options = ("--max-replicas", "2", "--target-requests", "2", "--scale-delay", "1")
    with Replicas(*options, log=folder / "scaling.log", replicas=1) as replicas:

        def have(count: int) -> bool:
            found = len(replicas.names()) == count
            if found:
                seen.append(count)
            return found

        found = replicas.asking(mixed(100, seed=3), lambda: have(2), clients=8)
        found += replicas.asking(mixed(100, seed=3), lambda: have(1), clients=1)
    return found, seen


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=["all", "mixed", "killing", "restarts", "scaling"], default="all")
    asked = parser.parse_args()
    report: dict[str, object] = {}

    def wants(part: str) -> bool:
        return asked.part in ("all", part)

    with tempfile.TemporaryDirectory() as name:
        if asked.part != "scaling":
            with Replicas(log=Path(name) / "log") as replicas:
                if wants("mixed"):
                    requests = mixed(asked.requests, asked.seed)
                    report["mixed"] = verdicts(zip(requests, replicas.ask_all(requests), strict=True), plain(requests))
                if wants("killing"):
                    found = killing(replicas, asked.kills, asked.seed)
                    report |= {"kills": asked.kills, "killing": verdicts(found, plain(mixed(100, seed=1, most=96)))}
                if wants("restarts"):
                    found = restarting(replicas, asked.restarts)
                    report |= {"restarts": asked.restarts, "restarting": verdicts(found, plain(mixed(100, seed=2)))}
        if wants("scaling"):
            found, report["replicas"] = scaling(Path(name))
            report["scaling"] = verdicts(found, plain(mixed(100, seed=3)))
    print(json.dumps(report))
    good = {"equal", "ended with an error"}
    parts = [part for part in report.values() if isinstance(part, dict)]
    return 0 if all({*part} <= good for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
