"""Starts real processes that decode together, as torchrun does, but as forks of one that has imported everything.

    python -m tests.ranks SCENARIO NUMBER

Every rank runs the scenario, a function below, and its output goes into a file. Prints JSON: for each rank its exit
code, what it returned, the lines that it wrote, and how many seconds after the first rank it ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from selfdraft.cli import main
from selfdraft.core.sequence import Sequence
from selfdraft.llm import LLM
from selfdraft.models import load  # noqa: F401
from selfdraft.parallel import join
from selfdraft.parallel.ranks import Ranks
from selfdraft.types import SamplingParams

LONGEST = 240.0
"""Seconds after which whatever still runs is killed."""
PROMPTS = (
    "Once upon a time there was a little dog",
    "def add(a, b):\n",
    "Tom has 3 apples and buys 4 more. How many apples",
    "The sun is warm. The sun is bright. The sun is",
)
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8, top_p=0.95, seed=5)
SIZES = {"method": "lookahead", "window_size": 6, "ngram_size": 4, "guess_set_size": 6}


def pocket(ranks: Ranks, model: str = "pocket", **options: object) -> LLM:
    return LLM(model, speculative_config={**SIZES, **options}, ranks=ranks, max_num_seqs=4)


def decode(llm: LLM, plainly: bool, requests: list[Sequence]) -> list[Sequence]:
    engine = llm.engine_for("none") if plainly else llm.engine
    for _ in engine.generate(requests):
        pass
    return requests


def texts(ranks: Ranks) -> object:
    """Greedy, sampled, penalised, with a stop, batched and alone: all against this rank's own plain decoding."""
    llm = pocket(ranks)
    ways = {"greedy": GREEDY, "sampled": SAMPLED, "unseeded": replace(SAMPLED, seed=None)}
    ways["penalised"] = replace(SAMPLED, repetition_penalty=1.3, min_tokens=4)
    ways["stop"] = replace(GREEDY, stop=(" to",), ignore_eos=False)
    found: dict[str, object] = {"bytes": ranks.message_bytes, "texts": {}}
    wrong = []
    for name, sampling in ways.items():
        requests = [llm.requests(prompt, sampling)[0] for prompt in PROMPTS]
        again = [
            llm.requests(prompt, replace(sampling, seed=one.seed))[0]
            for prompt, one in zip(PROMPTS, requests, strict=True)
        ]
        decode(llm, False, requests)
        wanted = [one.output for one in decode(llm, True, again)]
        wrong += [(name, i) for i, one in enumerate(requests) if one.output != wanted[i]]
        found["texts"][name] = wanted  # type: ignore[index]
        found[name] = [one.stats.num_steps for one in requests]
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    wrong += [("alone", i) for i, ids in enumerate(alone) if list(ids) != found["texts"]["greedy"][i]]  # type: ignore[index]
    sent = [ranks.messages, ranks.message_bytes, ranks.cache_bytes]
    return {**found, "wrong": wrong, "sent": sent, "a step": getattr(llm.engine.target, "bytes_per_step", None)}


def faults(ranks: Ranks) -> object:
    """A processor that raises on one rank alone: the request fails on all, and the next one is answered by all."""

    def broken(path: object, scores: torch.Tensor) -> torch.Tensor:
        if ranks.rank == ranks.size - 1 and len(path) > 20:  # type: ignore[arg-type]
            raise ValueError("broken here")
        return scores

    llm = pocket(ranks)
    params = [replace(GREEDY, logits_processors=(broken,)), GREEDY]
    first, second = llm.generate([PROMPTS[0], PROMPTS[1]], params, return_errors=True)
    return [str(first.error), list(second.outputs[0].token_ids)]


def killed(ranks: Ranks) -> object:
    """The last rank is killed in the middle of an answer."""
    return _ends(ranks, signal.SIGKILL)


def first_killed(ranks: Ranks) -> object:
    """Rank 0, which keeps the store by which ranks meet, is killed in the middle of an answer."""
    return _ends(ranks, signal.SIGKILL, 0)


def stopped(ranks: Ranks) -> object:
    """The last rank hangs in the middle of an answer."""
    return _ends(ranks, signal.SIGSTOP)


def _ends(ranks: Ranks, sign: int, which: int = -1) -> object:
    llm, last = pocket(ranks), ranks.rank == which % ranks.size
    for piece in llm.stream(PROMPTS[0], replace(GREEDY, max_tokens=240)):
        if piece.num_output_tokens > 20 and last:
            os.kill(os.getpid(), sign)
    return "came to the end"


def raises(ranks: Ranks) -> object:
    """The last rank has an error of its own in the middle of an answer."""
    llm = pocket(ranks)
    for piece in llm.stream(PROMPTS[0], replace(GREEDY, max_tokens=240)):
        if piece.num_output_tokens > 20 and ranks.rank == ranks.size - 1:
            raise ValueError("no room on the disk")
    return "came to the end"


def options_differ(ranks: Ranks) -> object:
    return pocket(ranks, window_size=6 + ranks.rank).drafter_name


def models_differ(ranks: Ranks) -> object:
    ranks.agree({"drafter": "lookahead", "the model's logits": f"of rank {ranks.rank}"})
    return "they agree"


def requests_differ(ranks: Ranks) -> object:
    return pocket(ranks).generate(PROMPTS[ranks.rank], GREEDY)[0].outputs[0].text


def command(*arguments: str) -> Callable[[], object]:
    """The command line, in every rank."""

    def run() -> object:
        sys.argv = ["selfdraft", *arguments]
        main()
        return None

    return run


BY_COMMAND = {
    "answers": command(
        *("generate", PROMPTS[0], "--model", "pocket", "--max-new-tokens", "24", "--lookahead-parallel", "--json"),
        "--ignore-eos",
    ),
    "wrong_drafter": command("generate", "x", "--model", "pocket", "--drafter", "lookup", "--lookahead-parallel"),
}
"""Scenarios that are what a user types."""
SCENARIOS: dict[str, Callable[[Ranks], object]] = {
    one.__name__: one
    for one in (texts, faults, killed, first_killed, stopped, raises, options_differ, models_differ, requests_differ)
}


def inside(name: str) -> object:
    """Run a scenario in this rank."""
    if name in BY_COMMAND:
        return BY_COMMAND[name]()
    with join() as ranks:
        return SCENARIOS[name](ranks)


def start(name: str, rank: int, size: int, port: int, place: Path) -> int:
    """The id of the process of a rank; what it returns and writes goes into files."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out, err = (os.open(f"{place}/{kind}{rank}", os.O_WRONLY | os.O_CREAT) for kind in ("out", "err"))
        os.dup2(out, 1)
        os.dup2(err, 2)
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        returned = inside(name)
        (place / f"said{rank}").write_text(json.dumps(returned))
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if os.environ.get("SELFDRAFT_TRACE"):
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(children: dict[int, int]) -> Iterator[tuple[int, int, float]]:
    """(rank, exit code, when) of each process as it ends; one that hangs alone is killed."""
    limit = time.monotonic() + LONGEST
    left = dict(children)
    while left:
        for rank, child in list(left.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del left[rank]
                yield rank, os.waitstatus_to_exitcode(status), time.monotonic()
        if len(left) == 1 and len(children) > 1 and _hangs(last := next(iter(left.values()))):
            os.kill(last, signal.SIGKILL)
        if time.monotonic() > limit:
            for child in left.values():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _hangs(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def run(name: str, size: int) -> list[dict[str, object]]:
    """What became of every rank of a scenario."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        children = {rank: start(name, rank, size, port, place) for rank in range(size)}
        ends = {rank: (code, when) for rank, code, when in ended(children)}
        first = min(when for _, when in ends.values())

        def read(kind: str, rank: int) -> str:
            file = place / f"{kind}{rank}"
            return file.read_text() if file.exists() else ""

        return [
            {
                "code": ends[rank][0],
                "after": round(ends[rank][1] - first, 2),
                "said": json.loads(read("said", rank) or "null"),
                "out": read("out", rank),
                "err": read("err", rank).splitlines(),
            }
            for rank in range(size)
        ]


if __name__ == "__main__":
    wanted = [part.rpartition(":") for part in sys.argv[1:]]
    print(json.dumps({name: run(name, int(size)) for name, _, size in wanted}))
