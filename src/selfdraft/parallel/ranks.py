"""The processes that decode together: joining, small collectives, and the end of all when one of them ends."""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from selfdraft.errors import EngineError, RankError
from selfdraft.types import Clock

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells every process in its environment."""
BEAT = 0.5
"""Seconds between two signs of life of a rank."""
PATIENCE, LOADING = 7.0, 60.0
"""Seconds without a sign of life after which a rank counts as dead: while it decodes, and while it loads, when kernels
are built and a busy machine may give no time to the thread that signs."""
LONGEST = timedelta(minutes=30)
"""How long a collective may wait for a rank that is alive."""
LEFT = "selfdraft/left"


def join(*, clock: Clock = time.monotonic) -> Ranks:
    """Meet the other processes that torchrun has started, each a rank; returns when all are there.

    From then on a rank that dies, hangs or raises ends all others: a thread watches for signs of life, writes one line
    to standard error, and ends the process with code 1. Errors: RankError when torchrun has not started this process.
    """
    missing = [name for name in NAMES if not os.environ.get(name)]
    if missing:
        raise RankError(
            f"no ranks to join ({', '.join(missing)} not set): start the processes with "
            "torchrun --nproc_per_node N -m selfdraft generate ... --lookahead-parallel"
        )
    try:
        store, rank, size = next(rendezvous("env://", timeout=LONGEST))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST)
        return Ranks(rank, size, store, clock)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the ranks cannot meet: {str(error).splitlines()[0]}") from error


class Ranks:
    """This process among those that decode together. `rank` counts from 0, `size` is how many there are."""

    def __init__(self, rank: int, size: int, store: Store, clock: Clock) -> None:
        self.rank, self.size = rank, size
        self.messages = self.message_bytes = self.cache_bytes = 0
        """Collectives of a step so far; bytes that this rank gave to them; bytes of keys and values sent or received"""
        self._store = store
        self._watch = Watch(self, store.clone(), clock)  # type: ignore[attr-defined]
        self._seeds = random.Random(self._shared("seed", str(secrets.randbits(62))))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.leave(f"{type(error).__name__}: {error}")

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which shows the text."""
        return self.rank == 0

    @property
    def running(self) -> bool:
        """Whether this rank is still with the others."""
        return self._watch.running

    def as_dict(self) -> dict[str, int]:
        """Ready for JSON."""
        return {
            "size": self.size,
            "messages": self.messages,
            "message_bytes": self.message_bytes,
            "cache_bytes": self.cache_bytes,
        }

    def seed(self) -> int:
        """A fresh seed for a request without one: the same on all ranks, which ask for seeds in the same order."""
        return self._seeds.getrandbits(62)

    def gather(self, message: Tensor) -> Tensor:
        """The messages of all ranks [size, ...]; each gives one of the same shape and type. Errors: RankError."""
        found = [torch.empty_like(message) for _ in range(self.size)]
        with self._collective():
            dist.all_gather(found, message)
        self.messages += 1
        self.message_bytes += message.numel() * message.element_size()
        return torch.stack(found)

    def send(self, data: Tensor, source: int) -> None:
        """Fill `data` on all ranks with that of the rank `source`. Errors: RankError."""
        with self._collective():
            dist.broadcast(data, source)
        self.cache_bytes += data.numel() * data.element_size()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Compare what all ranks say of themselves. Errors: RankError names the first fact that differs."""
        mine = {name: json.dumps(fact, sort_keys=True, default=str) for name, fact in facts.items()}
        with self._collective():
            self._store.set(f"selfdraft/facts/{self.rank}", json.dumps(mine))
            told = [json.loads(self._store.get(f"selfdraft/facts/{rank}")) for rank in range(self.size)]
        for name in dict.fromkeys(name for one in told for name in one):
            said = [one.get(name, "nothing") for one in told]
            other = next((rank for rank, one in enumerate(said) if one != said[0]), None)
            if other is not None:
                self._wait_for_all("differ")
                raise RankError(
                    f"the ranks differ in {name}: rank 0 has {said[0]}, rank {other} has {said[other]}; "
                    "start all of them with the same model and options"
                )
        self._watch.patience = PATIENCE

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks run: an error that is not one request's alone ends the others, too."""
        try:
            yield
        except EngineError as error:
            if error.request is None:
                self.leave(str(error))
            raise
        except RankError:
            raise
        except BaseException as error:
            self.leave(f"{type(error).__name__}: {error}")
            raise

    def leave(self, why: str) -> None:
        """End before the others are done: they end, too, and say why. Doing so twice changes nothing."""
        if self._watch.stop():
            self._watch.tell(f"rank {self.rank}: {' '.join(why.split())[:200]}")
            self._destroy()

    def close(self) -> None:
        """The good end, when all ranks have come to it. Errors: RankError when one does not."""
        if self._watch.running:
            with self._collective():
                dist.barrier()
            self._watch.stop()
            self._destroy()

    def _destroy(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _shared(self, name: str, value: str) -> str:
        """What rank 0 says."""
        if self.leads:
            self._store.set(f"selfdraft/{name}", value)
        return str(self._store.get(f"selfdraft/{name}").decode())

    def _wait_for_all(self, name: str) -> None:
        """Return when all ranks are here, so that each can say the same before the first one ends."""
        self._watch.stop()
        with suppress(RuntimeError):  # rank 0 has seen all of them, and the store has gone with it
            self._store.set(f"selfdraft/{name}/at/{self.rank}", "")
            self._store.wait([f"selfdraft/{name}/at/{rank}" for rank in range(self.size)], timedelta(seconds=5))

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not self._watch.stop():
                raise RankError(f"rank {self.rank} has left the others") from error
            why = self._watch.left() or f"another rank has ended, or the network to it ({_reason(error)})"
            raise RankError(f"rank {self.rank} ends: {why}") from error


def _reason(error: RuntimeError) -> str:
    """What gloo says, without the place in its source."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return first.rpartition("] ")[2].partition(". This is")[0][:120]


class Watch:
    """A thread that gives a sign of life twice a second and looks for those of the others.

    It writes into the store that the ranks met by, over a connection of its own. When a rank has left or gives no sign,
    or the store cannot be reached, the process ends, even while its main thread waits in a collective.
    """

    def __init__(self, ranks: Ranks, store: Store, clock: Clock, end: Callable[[str], None] | None = None) -> None:
        self._me, self._others = ranks.rank, [rank for rank in range(ranks.size) if rank != ranks.rank]
        self._store, self._clock = store, clock
        self._end = end or _end
        self.patience = LOADING
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._beat(0)
        for rank in self._others:
            self._store.get(f"selfdraft/beat/{rank}")
        self._thread = threading.Thread(target=self._run, name="selfdraft-ranks", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return not self._stopped.is_set()

    def stop(self) -> bool:
        """Watch no longer. Returns whether it was this call that ended it."""
        with self._lock:
            first = self.running
            self._stopped.set()
        return first

    def tell(self, why: str) -> None:
        """Say to all others that this rank has left, and why."""
        try:
            self._store.set(LEFT, why)
        except RuntimeError:
            return  # the store has gone, and they see that

    def left(self) -> str:
        """Which rank has left, and why; '' when none has said so."""
        try:
            return f"another one has left ({self._store.get(LEFT).decode()})" if self._store.check([LEFT]) else ""
        except RuntimeError:
            return ""

    def _beat(self, count: int) -> None:
        self._store.set(f"selfdraft/beat/{self._me}", str(count))

    def _run(self) -> None:
        signs = dict.fromkeys(self._others, (b"", self._clock()))
        count = 0
        while not self._stopped.wait(BEAT):
            count += 1
            try:
                self._beat(count)
                why = self._look(signs)
            except RuntimeError:
                why = "the store of the ranks cannot be reached: the rank or launcher that keeps it has ended"
            if why and self.stop():
                self._end(f"rank {self._me} ends: {why}")

    def _look(self, signs: dict[int, tuple[bytes, float]]) -> str:
        """What is wrong with the others, or ''. `signs`: what each said last, and when it first said so."""
        if why := self.left():
            return why
        now = self._clock()
        for rank, (last, since) in signs.items():
            found = self._store.get(f"selfdraft/beat/{rank}")
            if found != last:
                signs[rank] = found, now
            elif now - since > self.patience:
                return f"rank {rank} has given no sign of life for {self.patience:.0f} seconds: it has ended or hangs"
        return ""


def _end(line: str) -> None:
    """End the process at once: its main thread may wait in a collective that nothing else can end."""
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    os._exit(1)
