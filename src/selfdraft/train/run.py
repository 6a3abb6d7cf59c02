"""One training from a loaded model to a finished folder."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from selfdraft.errors import OptionError
from selfdraft.models.adapters import CHECKPOINT
from selfdraft.models.reference import Model, Tokenizer
from selfdraft.train.loop import Progress, train
from selfdraft.train.output import MODEL, tidy, write_adapter, write_model
from selfdraft.train.settings import Settings
from selfdraft.train.student import Student, linear_names
from selfdraft.train.texts import Text, split

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(model: Model) -> Accelerator:
    """Devices, processes and mixed precision as `accelerate launch` or the machine says. Errors: OptionError."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        import_module("peft")
    except ImportError as error:
        raise OptionError("training needs accelerate and PEFT: pip install 'selfdraft[train]'") from error
    weight = next(p for p in model.parameters() if p.is_floating_point())
    dtype = str(weight.dtype).removeprefix("torch.")
    mixed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
    # every step of S3D leaves out other blocks; and while one process writes the target's texts, the others wait
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    try:
        accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[unused, patience])
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
    every: int = 100,
) -> Iterator[Progress]:
    """Train, or go on training, and write the adapter into `output`. Yields after every step. Errors: OptionError.

    `model` moves to the accelerator's device; with `sar_sft` it is the tuned model afterwards.
    """
    model.to(accelerator.device)
    student = make_student(model, settings)
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
