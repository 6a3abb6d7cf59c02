"""Verbs in several processes: joining the ranks, and one clear line on each when one of them ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from selfdraft.cli import terminal

if TYPE_CHECKING:
    from selfdraft.llm import LLM
    from selfdraft.parallel import Ranks

LookaheadParallel = Annotated[
    bool,
    typer.Option(
        "--lookahead-parallel",
        help="Split lookahead's rows over the processes of: torchrun --nproc_per_node N -m selfdraft generate ...",
    ),
]


@contextmanager
def joined(wanted: bool) -> Iterator[Ranks | None]:
    """The ranks, if they are wanted. A launcher that ends this process gets one line, too. Errors: RankError."""
    if not wanted:
        yield None
        return
    from selfdraft.parallel import join

    with join() as ranks:
        before = signal.signal(signal.SIGTERM, _asked_to_end)
        try:
            yield ranks
        finally:
            signal.signal(signal.SIGTERM, before if ranks.running else signal.SIG_IGN)


def _asked_to_end(number: int, _: object) -> NoReturn:
    from selfdraft.errors import RankError

    signal.signal(number, signal.SIG_IGN)
    raise RankError("this rank was told to end: another rank has ended, or the run was stopped")


def show_ranks(llm: LLM, ranks: Ranks) -> None:
    """How many ranks there were, and what they exchanged."""
    from selfdraft.parallel.lookahead import LookaheadRanks

    line, shared = terminal.counted(ranks.size, "rank"), llm.engine.target
    if isinstance(shared, LookaheadRanks):
        line += f": {shared.bytes_per_step} bytes a step and request from each rank"
    terminal.show_dim(f"{line}, {ranks.cache_bytes / 1024:.0f} KiB of keys and values in all")
