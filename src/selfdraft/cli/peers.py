"""Other engines at the command line of bench: which are asked for, which are here, and how they are started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import parse_config
from selfdraft.errors import OptionError, PeerError, PromptTooLong
from selfdraft.files.atomic import cache_folder
from selfdraft.types import comma_separated

if TYPE_CHECKING:
    from selfdraft.bench.peers import Kind, Peer
    from selfdraft.bench.run import Bench, Contender
    from selfdraft.bench.tasks import Item
    from selfdraft.cli.bench import Subject
    from selfdraft.llm import LLM
    from selfdraft.types import SamplingParams

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
Files = Annotated[
    list[str] | None,
    typer.Option("--peer-model", help="llama.cpp=FILE.gguf: the file that llama.cpp loads. Default: the checkpoint."),
]
PeerTimeout = Annotated[float, typer.Option(help="Most seconds for a peer to load, and for each answer.", min=1)]


@dataclass(frozen=True, slots=True)
class FoundPeer:
    """A peer that was asked for and is here."""

    contender: Contender
    options: dict[str, int]
    engine: str
    """As the worker calls it."""
    python: str
    mode: str | None = None
    """The engine's own name of its method, where it has several."""
    file: Path | None = None
    """A GGUF file that the user gave."""


def find_peers(
    names: str | None,
    configs: Sequence[str] | None,
    pythons: Sequence[str] | None,
    models: Sequence[str] | None,
    model: str,
    drafters: Sequence[Contender],
) -> list[FoundPeer]:
    """The peers that were asked for and are here, looked up before a model is loaded. Errors: OptionError."""
    from selfdraft.bench.peers import PEERS

    configs, pythons = configs or [], pythons or []
    file = _gguf(models or [], model, names, configs)
    wanted = _wanted(names, configs)
    homes = _homes(pythons)
    engines = {PEERS[method].engine for method, _, _ in wanted.values()}
    unused = next((engine for engine in homes if engine not in engines), None)
    if unused is not None:
        raise OptionError(f"--peer-python {unused}={homes[unused]} has no use: --peers names none of {unused}")
    found = Lookup(homes, file)
    if names is not None and "llama.cpp" in wanted and "llama.cpp" in comma_separated(names) and found.server:
        wanted = _with_modes(wanted)
    twice = next((label for label in wanted if label in [one.label for one in drafters]), None)
    if twice is not None:
        raise OptionError(f'a drafter and a peer are called {twice!r}; give the --peer-config another "name"')
    found_peers = []
    for label, (method, options, named) in wanted.items():
        found_peer = found.look_up(label, method, options, wanted)
        if isinstance(found_peer, FoundPeer):
            found_peers.append(found_peer)
        elif named:
            python = f"; give --peer-python {PEERS[method].engine}=PATH of a Python that has it"
            raise OptionError(f"--peers: {found_peer}{python if 'does not have' in found_peer else ''}")
        else:
            terminal.note(f"left out: {found_peer}")
    return found_peers


def check_merged(peers: Sequence[FoundPeer], model: str, lora: Path | None) -> None:
    """Errors: OptionError when a peer would read the base model and not the one with the LoRA adapter merged in."""
    folder = Path(model).expanduser()
    if lora is None and not ((folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()):
        return
    for peer in peers:
        if peer.engine not in ("transformers", "llama.cpp"):
            raise OptionError(
                f"--peers {peer.engine}: it reads the checkpoint's folder, without the LoRA adapter "
                f"{lora or model}; leave it out, or merge the adapter with peft and save the model"
            )


def _gguf(models: Sequence[str], model: str, names: str | None, configs: Sequence[str]) -> Path | None:
    """The GGUF file for llama.cpp: the one given, or the model itself when it is one. Errors: OptionError."""
    from selfdraft.bench.peers import PEERS

    asked = [*_wanted(names, configs).values()]
    given = None
    for told in models:
        engine, sign, path = told.partition("=")
        if engine != "llama.cpp" or not sign or not path:
            raise OptionError(f"--peer-model {told} is not llama.cpp=FILE.gguf")
        if not any(PEERS[method].engine == engine for method, _, _ in asked):
            raise OptionError(f"--peer-model {told} has no use: --peers names none of llama.cpp")
        given = Path(path).expanduser()
        try:
            with given.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise OptionError(f"--peer-model {told} cannot be read: {error.strerror}") from error
        if magic != b"GGUF":
            raise OptionError(f"--peer-model {told} is no GGUF file: it does not begin with GGUF")
    own = Path(model).expanduser()
    return given or (own if own.suffix == ".gguf" and own.is_file() else None)


class Lookup:
    """Which engines are in which Python; each is looked up once."""

    def __init__(self, homes: Mapping[str, str], file: Path | None) -> None:
        self._homes, self._file = homes, file
        self._editions: dict[tuple[str, str], str | None] = {}

    @property
    def server(self) -> bool:
        """llama.cpp's server is there, and has a file to load."""
        from selfdraft.bench.peers import SERVER

        return self._file is not None and self.edition(SERVER, "llama.cpp") is not None

    def edition(self, worker: str, engine: str) -> str | None:
        """The package of an engine and its version; None where its Python lacks it."""
        from selfdraft.bench.peers import foreign, local

        if engine == "transformers":
            return local.edition()
        python = self._homes.get(engine, sys.executable)
        if (worker, python) not in self._editions:
            self._editions[worker, python] = foreign.edition(worker, python, engine)
        return self._editions[worker, python]

    def look_up(self, label: str, method: str, options: dict[str, int], wanted: Wanted) -> FoundPeer | str:
        """The peer; or the words that say what it lacks."""
        from selfdraft.bench.peers import PACKAGES, PEERS, SERVER
        from selfdraft.bench.run import Contender

        kind = PEERS[method]
        python = self._homes.get(kind.engine, sys.executable)
        file = self._file if kind.engine == "llama.cpp" else None
        workers = kind.workers or (kind.engine,)
        if workers == (SERVER,) and file is None:
            return f"{label} needs a GGUF file: --peer-model llama.cpp=FILE.gguf"
        able = [worker for worker in workers if worker != SERVER or file is not None]
        for worker in able:
            if edition := self.edition(worker, kind.engine):
                own_plain = next((name for name, (other, _, _) in wanted.items() if other == kind.plain), None)
                if kind.engine == "llama.cpp" and worker != SERVER and self.server:
                    own_plain = None  # the plain one comes out of the other package
                about = _about(file) if file is not None else None
                contender = Contender(label, method, options, edition, own_plain, about)
                return FoundPeer(contender, options, worker, python, kind.mode, file)
        lack = f"{label} needs {' or '.join(PACKAGES[worker] for worker in able)}, which {python} does not have"
        pip = {SERVER: f" ({python} -m pip install xllamacpp)"}.get(able[0], "")
        if SERVER in workers and file is None:
            pip = " (or xllamacpp with a GGUF file: --peer-model llama.cpp=FILE.gguf)"
        return lack + pip


def _about(file: Path) -> dict[str, object]:
    """What tells two states of a file apart."""
    state = file.stat()
    return {"name": file.name, "bytes": state.st_size, "modified": state.st_mtime_ns}


Wanted = dict[str, tuple[str, dict[str, int], bool]]
"""Label to peer, options, and whether it was named."""


def _with_modes(wanted: Wanted) -> Wanted:
    """The n-gram methods of llama.cpp's server behind its plain decoding."""
    from selfdraft.bench.peers import PEERS, SERVER

    modes: Wanted = {name: (name, kind.options, True) for name, kind in PEERS.items() if kind.workers == (SERVER,)}
    made: Wanted = {}
    for label, entry in wanted.items():
        made[label] = entry
        if label == "llama.cpp":
            made |= {name: mode for name, mode in modes.items() if name not in wanted}
    return made


def _wanted(names: str | None, configs: Sequence[str]) -> Wanted:
    """Label to peer, options, and whether it was named. Errors: OptionError."""
    from selfdraft.bench.peers import PEERS

    every = names == "all"
    found: Wanted = {}
    for name in [*PEERS] if every else comma_separated(names or ""):
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
    """The peer of that name. Errors: OptionError names the nearest."""
    from difflib import get_close_matches

    from selfdraft.bench.peers import PEERS

    if name not in PEERS:
        close = get_close_matches(name, PEERS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: all, {', '.join(PEERS)}"
        raise OptionError(f"there is no peer {name!r}; {hint}")
    return PEERS[name]


def _homes(pythons: Sequence[str]) -> dict[str, str]:
    """Engine to its Python. Errors: OptionError."""
    from selfdraft.bench.peers import HOMES

    homes = {}
    for told in pythons:
        engine, sign, path = told.partition("=")
        if engine not in HOMES or not sign or not path:
            raise OptionError(f"--peer-python {told} is not ENGINE=PATH with one of {', '.join(HOMES)}")
        homes[engine] = str(Path(path).expanduser())
    return homes


@contextmanager
def running_peers(
    setting: Bench, subject: Subject, llm: LLM, items: Mapping[str, Sequence[Item]], sampling: SamplingParams
) -> Iterator[None]:
    """The peers that were found become contenders, loaded one after another; at the end they are closed.

    One that does not start is in `setting.lost`, and the run goes on without it.
    """
    running: dict[str, Peer] = {}
    try:
        context = _longest(setting, items, llm.target.max_length) if subject.found_peers else 0
        for found_peer in subject.found_peers:
            label = found_peer.contender.label
            try:
                with terminal.waiting(f"starting {label}"):
                    running[label] = _start(found_peer, llm, subject, context, sampling)
            except PeerError as error:
                setting.lost[label] = error
                terminal.note(f"left out: {error}")
        setting.peers = running
        setting.contenders = [
            *setting.contenders,
            *(one.contender for one in subject.found_peers if one.contender.label in running),
        ]
        yield
        for label in running.keys() & setting.lost.keys():
            terminal.note(f"lost on the way: {setting.lost[label]}; the same command with --output asks it again")
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


def _start(found: FoundPeer, llm: LLM, subject: Subject, context: int, sampling: SamplingParams) -> Peer:
    """A peer that was found, loaded with the same checkpoint, and how it chooses. Errors: PeerError."""
    import torch

    from selfdraft.bench.measure import settler
    from selfdraft.bench.peers import foreign, gguf, local
    from selfdraft.models.checkpoint.embedded import checkpoint
    from selfdraft.models.checkpoint.places import find_gguf
    from selfdraft.models.reference import folder_of

    weight = next(llm.model.parameters())
    label, options = found.contender.label, found.options
    if found.engine == "transformers":
        chosen = {} if sampling.greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}
        return local.Transformers(label, llm.model, options, settler(weight.device), chosen)
    if found.file is not None:
        path = found.file
    elif found.engine == "llama.cpp":
        path = gguf.cached(llm.model, cache_folder("gguf"))
    elif find_gguf(checkpoint(subject.model)) is not None:
        raise PeerError(f"peer {label}: {found.engine} is not given GGUF files here; give --model a checkpoint folder")
    else:
        path = folder_of(checkpoint(subject.model))
    settings = {
        "model": str(path),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "context": context,
        "device": weight.device.type,
        "options": options,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **({"mode": found.mode} if found.mode is not None else {}),
    }
    return foreign.Foreign(label, found.engine, found.python, settings, subject.timeout)
