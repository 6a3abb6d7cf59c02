"""The verb `train`: mask tokens and their gated adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import DEFAULT_MODEL, Device, Dtype, EngineSizes, Lora, Model, Threads, open_llm
from selfdraft.errors import OptionError
from selfdraft.types import check_device, within

if TYPE_CHECKING:
    from selfdraft.core.sequence import Sequence
    from selfdraft.llm import LLM
    from selfdraft.train.loop import Progress as Training
    from selfdraft.train.settings import Settings

MASKS = {"space": 5, "s3d": 4}
OWN_TEXTS = "own_texts.jsonl"
Distill = Annotated[
    bool, typer.Option("--distill", help="Let the model continue the prompts of the data, and learn from that.")
]
DistillTemperature = Annotated[
    float, typer.Option(help="Every second continuation is sampled with it; the others are greedy.")
]
Modules = Annotated[
    Literal["all", "attention", "output"],
    typer.Option(help="Linear layers with an adapter: all, those of attention, or its output projection alone."),
]
StartFrom = Annotated[
    str | None,
    typer.Option(
        help="Begin with the adapter in this folder, or with 'bundled', one that comes with selfdraft.",
        metavar="DIR|bundled",
    ),
]
SkipWidths = Annotated[str | None, typer.Option(help="s3d: numbers of middle blocks to skip, with commas between.")]
SarSft = Annotated[
    bool, typer.Option("--sar-sft", help="space: tune the model itself, as the paper does; writes a new model.")
]


def train(
    output: Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoint and the target's own texts.")],
    data: Annotated[list[Path], typer.Option(help="Text or jsonl files; more of them may follow without the option.")],
    more: Annotated[list[Path] | None, typer.Argument(help="More data files.", show_default=False)] = None,
    recipe: Annotated[Literal["s3d", "space"], typer.Option(help="The drafter that shall use the masks.")] = "space",
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    distill: Distill = False,
    distill_tokens: Annotated[int, typer.Option(help="Most tokens of such a continuation.", min=8)] = 160,
    distill_temperature: DistillTemperature = 0.8,
    masks: Annotated[int | None, typer.Option(help="Mask tokens of a group. Default: 5 for space, 4 for s3d.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter; 0 trains the mask embeddings alone.")] = 32,
    link: Annotated[int, typer.Option(help="Rank of the map that tells a mask the token before; 0: none.")] = 128,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Texts of a step, over all processes.")] = 8,
    groups: Annotated[int, typer.Option(help="Mask groups under each text.")] = 48,
    thinning: Annotated[float, typer.Option(help="Share of groups that go on to one more mask; 1: all do.")] = 0.7,
    modules: Modules = "all",
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    max_length: Annotated[int, typer.Option(help="Most tokens of a text.")] = 384,
    hard_share: Annotated[float, typer.Option(help="Share of the loss on the likeliest token, not all of them.")] = 0.5,
    skip_widths: SkipWidths = None,
    sar_sft: SarSft = False,
    start_from: StartFrom = None,
    seed: Annotated[int, typer.Option(help="Same seed, same adapter.")] = 0,
    every: Annotated[int, typer.Option(help="Steps between checkpoints and measurements.", min=1)] = 100,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train mask tokens for s3d or space. The model's own weights stay as they are; a killed run goes on."""
    from selfdraft.train.output import check_output
    from selfdraft.train.settings import Settings
    from selfdraft.train.start import digest_of

    settings = Settings(recipe=recipe, masks=MASKS[recipe] if masks is None else masks, seed=seed)
    settings = replace(settings, rank=rank, link=link, sar_sft=sar_sft, skip_widths=_widths(skip_widths))
    settings = replace(settings, start="" if start_from is None else digest_of(start_from))
    settings = replace(settings, steps=steps, batch_size=batch_size, groups=groups, learning_rate=learning_rate)
    settings = replace(settings, max_length=max_length, hard_share=hard_share, thinning=thinning, modules=modules)
    check_device(device)
    check_output(output)
    card = _finished(output, settings)
    own = _Own(distill_tokens, distill_temperature, max_length - distill_tokens) if distill else None
    opening = partial(open_llm, model, "none", None, dtype, "token", threads, lora=lora)
    llm = _open(opening, model, device, own, settings)
    if card is not None:
        _check_model(llm, card, output)
        return
    _train(llm, [*data, *(more or ())], own, settings, output, every, start_from)


def _finished(output: Path, settings: Settings) -> Mapping[str, object] | None:
    """The card of a training with these settings that has ended before. Errors: OptionError when another one has."""
    from selfdraft.train.output import finished
    from selfdraft.train.settings import first_change

    card = finished(output)
    before = {} if card is None else card.get("settings")
    odd = first_change(before if isinstance(before, dict) else {}, settings.as_dict())
    if card is not None and odd is not None:
        raise OptionError(f"{output} holds a finished adapter that was trained with {odd}; choose another --output")
    return card


def _check_model(llm: LLM, card: Mapping[str, object], output: Path) -> None:
    """A finished training is left as it is. Errors: OptionError when it was that of another model."""
    from selfdraft.models.identity import base_hash
    from selfdraft.train.output import tidy

    if card.get("model") != base_hash(llm.model):
        raise OptionError(f"{output} holds a finished adapter of another model; choose another --output")
    tidy(output)  # a kill may have come between the last two files
    terminal.note(f"{output} holds this adapter already, finished; to train on other data choose another --output")


@dataclass(frozen=True)
class _Own:
    """How the model writes the texts that it learns from."""

    most: int
    temperature: float
    room: int
    """Most tokens of a prompt; of longer ones the end is kept."""

    def __post_init__(self) -> None:
        if self.room < 8:
            raise OptionError(f"distill_tokens={self.most} leaves no room for a prompt; give a higher --max-length")
        within("distill_temperature", self.temperature, 0.0, inf, open_low=True)


def _open(opening: Callable[..., LLM], model: str, device: str, own: _Own | None, settings: Settings) -> LLM:
    """The model where this process trains, as floats: gradients go through them.

    Keys and values of a GPU are made at load: no more than own texts need, since the steps need the rest.
    """
    from selfdraft.llm import where_of
    from selfdraft.train.run import place_of

    place = place_of(device, lambda: where_of(model, device, "none"))
    sizes = EngineSizes(1 if own is None else settings.batch_size)
    if place.type != "cuda":  # to another device that accelerate found the model moves when it trains
        return opening(quantization="none", engine=sizes, device="cpu")
    sizes = replace(sizes, max_model_len=settings.max_length)
    runner = "plain" if own is None else "auto"
    return opening(quantization="none", engine=sizes, device=str(place), runner=runner)


def _own_texts(llm: LLM, files: list[Path], output: Path, settings: Settings, own: _Own) -> None:
    """The model's own continuations of the prompts, written into the output folder as they come."""
    from selfdraft.models.identity import base_hash
    from selfdraft.train.output import make_output
    from selfdraft.train.texts import read_prompts, write_own
    from selfdraft.types import SamplingParams

    prompts = [ids[-own.room :] for ids in read_prompts(files, llm.encode, llm.target.vocab)]
    make_output(output)
    greedy = SamplingParams(max_tokens=own.most)
    sampled = SamplingParams(max_tokens=own.most, temperature=own.temperature)
    origin = {
        "model": base_hash(llm.model),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "prompts": hashlib.blake2b(json.dumps(prompts).encode(), digest_size=12).hexdigest(),
        "distill_tokens": own.most,
        "distill_temperature": own.temperature,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
    }

    def request(number: int) -> Callable[[], Sequence]:
        sampling = replace(sampled if number % 2 else greedy, seed=settings.seed + number)
        return lambda: llm.requests(prompts[number], sampling)[0]

    path = output / OWN_TEXTS
    requests = [request(i) for i in range(len(prompts))]
    with terminal.progress(len(prompts), quiet=False, what="writing own texts") as advance:
        before = 0
        # plainly: what drafts are made must not depend on the clock, or a killed run would end with other bytes
        for done in write_own(llm.engine_for("none"), requests, path, settings.batch_size * 2, origin):
            for _ in range(done - before):
                advance()
            before = done


def _train(
    llm: LLM,
    files: list[Path],
    own: _Own | None,
    settings: Settings,
    output: Path,
    every: int,
    start_from: str | None,
) -> None:
    """Train on the files, or on the model's own continuations of them, and say how the adapter is used."""
    from selfdraft.train.output import MODEL, make_output
    from selfdraft.train.run import accelerator_for, run
    from selfdraft.train.start import read_start
    from selfdraft.train.texts import read_texts

    settings.skips(llm.target.layers)
    context = llm.target.facts.context
    room = context - settings.masks - 1
    if settings.max_length > room:
        raise OptionError(
            f"max_length={settings.max_length} with {settings.masks} masks does not fit into the context of "
            f"{context}; give --max-length {room}"
        )
    start = None if start_from is None else read_start(start_from, llm.model, settings.recipe)
    accelerator = accelerator_for(llm.model)
    if own is not None:
        if accelerator.is_main_process:
            _own_texts(llm, files, output, settings, own)
        accelerator.wait_for_everyone()
        files = [output / OWN_TEXTS]
    texts = read_texts(files, llm.encode, settings.max_length, llm.target.vocab)
    make_output(output)
    with training_bar(settings.steps, quiet=not accelerator.is_main_process) as report:
        for state in run(llm.model, llm.tokenizer, texts, settings, output, accelerator, start=start, every=every):
            report(state)
    if accelerator.is_main_process:
        use = f"--model {output / MODEL}" if settings.sar_sft else f"--adapter {output}"
        terminal.note(f"the adapter is in {output}: selfdraft generate ... --drafter {settings.recipe} {use}")
    accelerator.end_training()


@contextmanager
def training_bar(total: int, *, quiet: bool) -> Iterator[Callable[[Training], None]]:
    """A progress bar with loss and held-out acceptance per mask; a line for each measurement where there is no bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    err = terminal.err
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    said = TextColumn("{task.fields[said]}")
    with Progress(*columns, said, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total, said="")

        def report(state: Training) -> None:
            if state.acceptance:
                shares = " ".join(f"{share:.2f}" for share in state.acceptance)
                line = f"loss {state.loss:.3f}, held-out acceptance per mask {shares}"
                bar.update(task, completed=state.step, said=line)
                if not (quiet or err.is_terminal):
                    terminal.note(f"step {state.step} of {total}: {line}")
            bar.update(task, completed=state.step)

        yield report


def _widths(text: str | None) -> tuple[int, ...]:
    """The numbers of a list with commas. Errors: OptionError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise OptionError(f"--skip-widths {text!r} is not a list of whole numbers such as 4,6,8") from None
