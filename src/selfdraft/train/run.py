"""One training from a loaded model to a finished folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from selfdraft.errors import OptionError
from selfdraft.models.adapters import CHECKPOINT, MaskAdapter
from selfdraft.models.reference import Model, Tokenizer
from selfdraft.train.loop import Progress, train
from selfdraft.train.output import MODEL, tidy, write_adapter, write_model
from selfdraft.train.settings import Settings
from selfdraft.train.start import begin_with
from selfdraft.train.student import Student, linear_names
from selfdraft.train.texts import Text, split

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

PATIENCE = timedelta(days=30)
"""How long processes wait for the one that writes the target's texts."""


def place_of(asked: str, alone: Callable[[], torch.device]) -> torch.device:
    """Where this process trains: where accelerate says if it was told of a CPU or of several processes, else `alone`().

    `asked` is the option `device`. Errors: OptionError when it is another kind of device than accelerate's; those of
    `alone`.
    """
    state = _processes()
    several = state.num_processes > 1
    if several or _told_of_cpu():
        given: torch.device = state.device
        if asked not in ("auto", given.type):
            why = f"gives each of {state.num_processes} processes its device" if several else "was told to use the CPU"
            raise OptionError(f"device={asked!r}: accelerate {why}, here {given}; leave out --device")
        return given
    state.device = place = alone()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def _processes() -> PartialState:
    """Processes and devices as accelerate sees them; always the same ones. Errors: OptionError."""
    try:
        from accelerate import PartialState

        import_module("peft")
    except ImportError as error:
        raise OptionError("training needs accelerate and PEFT: pip install 'selfdraft[train]'") from error
    try:
        return PartialState(cpu=_told_of_cpu(), timeout=PATIENCE)
    except (ValueError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise OptionError(f"accelerate cannot start here: {why}") from error


def _told_of_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process, or its variable says so."""
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def accelerator_for(model: Model) -> Accelerator:
    """Devices, processes and mixed precision as `place_of` found them, or as accelerate does. Errors: OptionError."""
    _processes()
    from accelerate import Accelerator, DistributedDataParallelKwargs

    weight = next(p for p in model.parameters() if p.is_floating_point())
    dtype = str(weight.dtype).removeprefix("torch.")
    mixed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # every step of S3D leaves out other blocks
    try:
        accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[unused])
    except ValueError as error:  # not on this device; or this process has trained in another precision before
        why = str(error).partition("\n")[0]
        raise OptionError(f"{dtype} cannot be trained here: {why}") from error
    if mixed == "fp16" and accelerator.device.type == "cpu":
        raise OptionError("float16 cannot be trained on a CPU; use --dtype bfloat16 or float32")
    return accelerator


def make_student(model: Model, settings: Settings) -> Student:
    """A fresh student: the adapter sits on layers (`settings.modules`) of the blocks that a drafting pass runs."""
    from peft import LoraConfig

    layers = int(model.config.get_text_config().num_hidden_layers)
    skips = settings.skips(layers)
    run = [i for i in range(layers) if any(skip is None or i not in skip.attention for skip in skips)]
    lora = None
    if settings.rank:
        lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank,
            target_modules=linear_names(model, run, settings.modules),
            lora_dropout=0.0,
        )
    return Student(
        model,
        masks=settings.masks,
        lora=lora,
        lead=settings.recipe == "s3d",
        tuned=settings.sar_sft,
        link=settings.link,
        seed=settings.seed,
    )


def run(
    model: Model,
    tokenizer: Tokenizer | None,
    texts: SequenceOf[Text],
    settings: Settings,
    output: Path,
    accelerator: Accelerator,
    *,
    start: MaskAdapter | None = None,
    every: int = 100,
) -> Iterator[Progress]:
    """Train, or go on training, and write the adapter into `output`. Yields after every step. Errors: OptionError.

    `start`: the adapter to begin with. `model` moves to the accelerator's device; with `sar_sft` it is the tuned model
    afterwards.
    """
    model.to(accelerator.device)
    student = make_student(model, settings)
    if start is not None:
        begin_with(student, start)
    last = Progress(settings.steps, 0.0)
    for last in train(student, texts, settings, accelerator, output / CHECKPOINT, every=every):
        yield last
    if not accelerator.is_main_process:
        return
    measured = split(texts)[1]
    facts: dict[str, object] = {
        "held_out_acceptance": [round(share, 4) for share in last.acceptance],
        "held_out_texts": len(measured) if len(measured) < len(texts) else 0,
        "advice": {"skip_widths": [len(skip.mlp) for skip in settings.skips(student.layers) if skip]},
        "texts": len(texts),
        "tokens": sum(len(text.tokens) for text in texts),
    }
    if settings.sar_sft:
        model = student.merged()
        write_model(output, model, tokenizer)
        write_adapter(output / MODEL / f"selfdraft_{settings.recipe}", student, model, settings, facts)
    write_adapter(output, student, model, settings, facts)
    tidy(output)
