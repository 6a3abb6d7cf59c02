"""Other engines at the command line of bench: which are asked for, which are here, and how they are started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft import show
from selfdraft.cli.options import parse_config
from selfdraft.errors import OptionError, PeerError, PromptTooLong

if TYPE_CHECKING:
    from selfdraft.bench.peers import Kind, Peer
    from selfdraft.bench.run import Bench, Contender
    from selfdraft.bench.tasks import Item
    from selfdraft.llm import LLM

Peers = Annotated[
    str | None, typer.Option(help="Other engines, with commas, or 'all' that are here: transformers, llama.cpp, vllm.")
]
PeerConfigs = Annotated[
    list[str] | None,
    typer.Option(help='A peer with options: \'{"peer": "vllm-ngram", "name": "k8", "num_speculative_tokens": 8}\'.'),
]
Pythons = Annotated[
    list[str] | None,
    typer.Option("--peer-python", help="ENGINE=PATH: the Python that has llama.cpp or vllm. Default: this one."),
]
Patience = Annotated[float, typer.Option(help="Most seconds for a peer to load, and for each answer.", min=1)]


@dataclass(frozen=True, slots=True)
class Guest:
    """A peer that was asked for and is here."""

    contender: Contender
    options: dict[str, int]
    engine: str
    python: str
    named: bool
    """By the user; one of 'all' that cannot start is left out."""


def invited(
    names: str | None, configs: Sequence[str], pythons: Sequence[str], drafters: Sequence[Contender], *, greedy: bool
) -> list[Guest]:
    """The peers that were asked for and are here, looked up before a model is loaded. Errors: OptionError."""
    from selfdraft.bench.peers import PACKAGES, PEERS, local
    from selfdraft.bench.run import Contender

    wanted = _wanted(names, configs)
    twice = next((label for label in wanted if label in [one.label for one in drafters]), None)
    if twice is not None:
        raise OptionError(f'a drafter and a peer are called {twice!r}; give the --peer-config another "name"')
    homes = _homes(pythons)
    engines = {PEERS[method].engine for method, _, _ in wanted.values()}
    idle = next((engine for engine in homes if engine not in engines), None)
    if idle is not None:
        raise OptionError(f"--peer-python {idle}={homes[idle]} has no use: --peers names none of {idle}")
    if wanted and not greedy:
        raise OptionError("--peers: other engines are compared at --temperature 0; their random numbers are others")
    editions: dict[str, str | None] = {"transformers": local.edition()}
    guests = []
    for label, (method, options, named) in wanted.items():
        engine = PEERS[method].engine
        python = homes.get(engine, sys.executable)
        if engine not in editions:
            from selfdraft.bench.peers import foreign

            editions[engine] = foreign.edition(engine, python)
        if edition := editions[engine]:
            guests.append(Guest(Contender(label, method, options, edition), options, engine, python, named))
            continue
        lack = f"{label} needs {PACKAGES[engine]}, which {python} does not have"
        if named:
            raise OptionError(f"--peers: {lack}; give --peer-python {engine}=PATH of a Python that has it")
        show.note(f"left out: {lack}")
    return guests


def _wanted(names: str | None, configs: Sequence[str]) -> dict[str, tuple[str, dict[str, int], bool]]:
    """Label to peer, options, and whether it was named. Errors: OptionError."""
    from selfdraft.bench.peers import PEERS

    every = names == "all"
    found: dict[str, tuple[str, dict[str, int], bool]] = {}
    for name in [*PEERS] if every else [part.strip() for part in (names or "").split(",") if part.strip()]:
        found[name] = (name, _kind(name).options, not every)
    for config in configs:
        options = parse_config(config, "--peer-config") or {}
        method, label = options.pop("peer", None), options.pop("name", None)
        if not isinstance(method, str):
            raise OptionError(f'--peer-config {config} has no "peer"; there are: {", ".join(PEERS)}')
        known = _kind(method).options
        for name, value in options.items():
            if name not in known:
                there = f"it has: {', '.join(known)}" if known else "it has none"
                raise OptionError(f"--peer-config: {method} has no option {name!r}; {there}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"--peer-config: {name}={value!r} must be a whole number, at least 1")
        label = str(label) if label else method
        if label in found:
            raise OptionError(f'two peers are called {label!r}; give each --peer-config a "name" of its own')
        found[label] = (method, known | {name: int(str(value)) for name, value in options.items()}, True)
    if names is not None and not found:
        raise OptionError(f"--peers {names!r} names no peer; there are: all, {', '.join(PEERS)}")
    return found


def _kind(name: str) -> Kind:
    from difflib import get_close_matches

    from selfdraft.bench.peers import PEERS

    if name not in PEERS:
        close = get_close_matches(name, PEERS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: all, {', '.join(PEERS)}"
        raise OptionError(f"there is no peer {name!r}; {hint}")
    return PEERS[name]


def _homes(pythons: Sequence[str]) -> dict[str, str]:
    """Engine to its Python. Errors: OptionError."""
    from selfdraft.bench.peers import PACKAGES

    homes = {}
    for told in pythons:
        engine, sign, path = told.partition("=")
        if engine not in PACKAGES or not sign or not path:
            raise OptionError(f"--peer-python {told} is not ENGINE=PATH with one of {', '.join(PACKAGES)}")
        homes[engine] = str(Path(path).expanduser())
    return homes


@contextmanager
def joined(
    setting: Bench, guests: Sequence[Guest], llm: LLM, model: str, items: Mapping[str, Sequence[Item]], patience: float
) -> Iterator[None]:
    """The guests become contenders, loaded one after another; at the end they are closed. Errors: PeerError."""
    running: dict[str, Peer] = {}
    try:
        context = _longest(setting, items, llm.target.context) if guests else 0
        for guest in guests:
            label = guest.contender.label
            try:
                with show.waiting(f"starting {label}"):
                    running[label] = _start(guest, llm, model, context, patience)
            except PeerError as error:
                if guest.named:
                    raise
                show.note(f"left out: {error}")
        setting.peers = running
        setting.contenders = [*setting.contenders, *(g.contender for g in guests if g.contender.label in running)]
        yield
    finally:
        for peer in running.values():
            peer.close()


def _longest(setting: Bench, items: Mapping[str, Sequence[Item]], context: int) -> int:
    """Positions that the longest prompt and its answer take: what other engines have to make room for."""
    if setting.all_turns:
        return context
    most = 64
    for item in (item for questions in items.values() for item in questions):
        with suppress(PromptTooLong):
            request = setting.open(item.turns[:1], (), 0)
            most = max(most, request.prompt_length + request.sampling.max_tokens)
    return min(most, context)


def _start(guest: Guest, llm: LLM, model: str, context: int, patience: float) -> Peer:
    import torch

    from selfdraft.bench.measure import settler
    from selfdraft.bench.peers import foreign, gguf, local
    from selfdraft.models.embedded import checkpoint
    from selfdraft.models.stock import folder_of

    weight = next(llm.model.parameters())
    label, options = guest.contender.label, guest.options
    if guest.engine == "transformers":
        return local.Transformers(label, llm.model, options, settler(weight.device))
    path = folder_of(checkpoint(model))
    if guest.engine == "llama.cpp":
        path = gguf.cached(llm.model, Path.home() / ".cache" / "selfdraft" / "gguf")
    settings = {
        "model": str(path),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "context": context,
        "device": weight.device.type,
        "options": options,
    }
    return foreign.Foreign(label, guest.engine, guest.python, settings, patience)
