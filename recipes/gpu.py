"""On a machine with one NVIDIA GPU and no network: is it right, what do passes take, how fast is it?

    python recipes/gpu.py pack --out .whl          # before, where there is a network: the wheels that are needed there
    python recipes/gpu.py check                    # graphs against the plain path, bits, plain decoding
    python recipes/gpu.py time                     # passes by rows and context, their kernels, memory of graphs
    python recipes/gpu.py speed --traces DIR       # the figures of docs/gpu.md
    python recipes/gpu.py host                     # without a GPU: microseconds of the host's work in a step
    python recipes/gpu.py page gpu/*.json          # its tables; --into docs/gpu.md writes them there

Each of the three runs takes less than ten minutes, and writes OUT/VERB.json after each figure. Every part is a process
of its own: what fails, or does not end in four minutes, does not stop the next part. Models are random weights of real
shapes, made on the device; recorded answers are forced upon them. Without a GPU a run ends with code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from gpu_runs.packing import be_installed, pack

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "src")]  # where the project runs from its source
SUITE = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "tests/test_gpu.py")


ASKED_SECONDS = 120.0
"""Most that the first answer of a GPU may take."""


def options() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("check", "time", "speed"):
        run = verbs.add_parser(verb)
        run.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the JSON file (default: gpu)")
        run.add_argument("--minutes", type=float, default=9.0, help="no part begins later (default: 9)")
        run.add_argument("--shape", default="1b,8b", help="models, the smallest first (default: 1b,8b)")
        if verb == "speed":
            run.add_argument("--traces", type=Path, help="folder with recorded answers of an 8B model, *.jsonl")
            run.add_argument("--requests", type=int, default=8, help="answers of each file (default: 8)")
            run.add_argument("--tokens", type=int, default=192, help="tokens of an answer (default: 192)")
            run.add_argument("--model", type=Path, help="folder of a real checkpoint to decode, too")
            run.add_argument("--verified", type=int, default=20_000, help="tokens to compare (default: 20000)")
    packed = verbs.add_parser("pack")
    packed.add_argument("--out", type=Path, default=Path(".whl"), help="folder of the wheels (default: .whl)")
    packed.add_argument("--python", default="3.12", help="of the machine with the GPU (default: 3.12)")
    verbs.add_parser("host")
    page = verbs.add_parser("page")
    page.add_argument("files", type=Path, nargs="*", help="what runs have written")
    page.add_argument("--into", type=Path, help="the page that gets the tables; else they are printed")
    return parser


def main(arguments: SequenceOf[str] | None = None) -> int:
    """The exit code: 1 where a check failed, 2 where nothing could be run."""
    told = options().parse_args(arguments)
    if told.verb == "pack":
        return pack(told.out, told.python)
    be_installed(ROOT)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # parts are forked: nothing may open the GPU before
    if told.verb == "host":
        from gpu_runs.host import host

        return host()
    if told.verb == "page":
        return _page(told)
    try:
        return _run(told)
    except NothingRuns as error:
        print(f"recipes/gpu.py {told.verb}: {error}", file=sys.stderr)
        return 2


class NothingRuns(Exception):
    """Why no part can be begun, and the way out."""


def _page(told: argparse.Namespace) -> int:
    from gpu_runs import page

    try:
        if told.into is None:
            print(page.tables(told.files), end="")
        else:
            page.write(told.into, told.files)
    except (page.Unreadable, OSError) as error:
        print(f"recipes/gpu.py page: {error}", file=sys.stderr)
        return 2
    return 0


def _run(told: argparse.Namespace) -> int:
    import torch
    from gpu_runs.bench import SHAPES, cuda_bench
    from gpu_runs.parts import Run

    from selfdraft.errors import SelfdraftError

    shapes = told.shape.split(",")
    if odd := [shape for shape in shapes if shape not in SHAPES]:
        raise NothingRuns(f"--shape {odd[0]!r} is unknown; there are {', '.join(SHAPES)}")
    facts, forks = _machine()
    bench = cuda_bench(SUITE, getattr(torch, str(facts["dtype"])))
    try:
        told.out.mkdir(parents=True, exist_ok=True)
        settings = _speed_settings(told) if told.verb == "speed" else None
    except (SelfdraftError, OSError) as error:
        raise NothingRuns(str(error)) from error
    run = Run(told.verb, bench, told.out, told.minutes, facts=facts, forks=forks)
    if told.verb == "check":
        from gpu_runs.check import check

        return check(run, shapes)
    if told.verb == "time":
        from gpu_runs.times import time

        return time(run, shapes)
    from gpu_runs.speed import speed

    assert settings is not None, "made above"
    return speed(run, shapes, settings)


def _machine() -> tuple[dict[str, object], bool]:
    """The conditions of the first GPU, and whether a process that was forked can use it. Errors: NothingRuns."""
    from gpu_runs.parts import CheckFailed, apart

    try:
        (facts,) = apart(_asked, ASKED_SECONDS)
        return facts, True
    except CheckFailed as error:
        if not error.trace:
            raise NothingRuns(str(error)) from error
        print(f"parts share one process: {error}", file=sys.stderr)
    try:
        (facts,) = _asked()
        return facts, False
    except CheckFailed as error:
        raise NothingRuns(str(error)) from error


def _asked() -> Iterator[dict[str, object]]:
    """The conditions, when the GPU has answered once. Errors: CheckFailed where there is none that can be used."""
    import torch
    from gpu_runs.bench import cuda_bench
    from gpu_runs.parts import CheckFailed, conditions

    from selfdraft.errors import SelfdraftError
    from selfdraft.models.device import BFLOAT16_FROM, pick_device
    from selfdraft.models.graph.cuda import cuda_settings

    try:
        device = pick_device("cuda")
        able = torch.cuda.get_device_capability(device) >= BFLOAT16_FROM
        dtype = torch.bfloat16 if able else torch.float16
        cuda_settings(device, dtype)
    except SelfdraftError as error:
        raise CheckFailed(str(error)) from error
    torch.zeros(1, device=device).item()
    yield conditions(cuda_bench(SUITE, dtype))


def _speed_settings(told: argparse.Namespace):  # type: ignore[no-untyped-def]
    from gpu_runs.bench import CONTEXT
    from gpu_runs.speed import Settings, read_answers

    answers = {}
    if told.traces is not None:
        answers = read_answers(told.traces, told.requests, told.tokens, CONTEXT // 4)
        if not answers:
            raise NothingRuns(f"--traces {told.traces}: no *.jsonl there")
    return Settings(answers, told.model, told.verified)


if __name__ == "__main__":
    sys.exit(main())
