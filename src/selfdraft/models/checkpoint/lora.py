"""LoRA adapters of the package peft: found, checked, and merged into the weights of their base model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import nn

from selfdraft.errors import LoadError, OptionError
from selfdraft.models.adapters import CARD
from selfdraft.models.checkpoint.folder import check_pointer, has_weights, read_json
from selfdraft.models.checkpoint.load_errors import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_lora(folder: Path) -> bool:
    """True for a folder that holds an adapter and no model. Errors: LoadError when it holds both, or other masks."""
    if not (folder / CONFIG).is_file():
        return False
    if (folder / CARD).is_file():
        if (folder / "config.json").is_file():
            return False
        raise LoadError(
            f"{folder} holds mask tokens of `selfdraft train`, not a model; give its model, and this as an adapter "
            "(--adapter DIR, or adapters=[DIR])"
        )
    if (folder / "config.json").is_file() and has_weights(folder):
        raise LoadError(
            f"{folder} holds a model and a LoRA adapter; move {CONFIG} and {WEIGHTS} into a folder of their own, and "
            "give that with --lora DIR (lora=DIR) if it is to be merged"
        )
    return True


def base_of(folder: Path) -> str:
    """The base model of a LoRA adapter: a local folder where there is one of its name, else the name.

    Errors: LoadError.
    """
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise LoadError(
            f"{folder} is a LoRA adapter and {CONFIG} names no base model; give the base model, and the folder with "
            "--lora DIR (lora=DIR)"
        )
    places = [Path(name).expanduser(), folder / name]
    if name.startswith("."):  # written beside the adapter; what lies so to the current folder is another's
        places.reverse()
    found = next((one for one in places if one.is_dir()), None)
    if found is None:
        return name
    if found.resolve() == folder.resolve() or is_lora(found):
        raise LoadError(
            f"{folder} is a LoRA adapter whose base model {name!r} is an adapter, too; give the model below them, and "
            "the folder with --lora DIR (lora=DIR)"
        )
    return str(found)


def merged(model: PreTrainedModel, place: str | Path) -> PreTrainedModel:
    """The model with the adapter of a folder merged into its weights; the same object, changed.

    Errors: LoadError when peft is not installed, or the adapter is broken or belongs to another model.
    """
    folder = Path(place).expanduser()
    _check_files(folder)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise LoadError(f"{folder} is a LoRA adapter; to merge it into its model: pip install peft") from error
    with blaming(folder, "LoRA adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing keys, which are an error below
        tuned = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    _check_keys(folder, tuned)
    if not hasattr(tuned.base_model, "merge_and_unload"):
        kind = read_json(folder / CONFIG).get("peft_type")
        raise LoadError(f"{folder}: an adapter of type {kind!r} cannot be merged into weights; LoRA can")
    with blaming(folder, "LoRA adapter"):
        whole: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    return whole.eval()


def _check_files(folder: Path) -> None:
    """Errors: LoadError."""
    if not folder.is_dir():
        raise LoadError(f"{folder}: there is no such folder; give the one that peft's `save_pretrained` wrote")
    if not (folder / CONFIG).is_file():
        raise LoadError(
            f"{folder} is no LoRA adapter: no {CONFIG}; give the folder that peft's `save_pretrained` wrote"
        )
    if (folder / CARD).is_file():
        raise LoadError(
            f"{folder} holds mask tokens of `selfdraft train`, which are never merged; give it as an adapter "
            "(--adapter DIR, or adapters=[DIR])"
        )
    read_json(folder / CONFIG)
    check_pointer(folder / WEIGHTS)
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        why = (
            "adapter_model.bin is a pickle, which can run code and is never opened" if pickle else "weights are missing"
        )
        raise LoadError(f"{folder}: no {WEIGHTS} ({why}); save the adapter as safetensors")


def _check_keys(folder: Path, tuned: object) -> None:
    """Errors: LoadError when the file has not just what the adapter's configuration and the model ask for."""
    from peft import get_peft_model_state_dict

    wanted = {*get_peft_model_state_dict(tuned, save_embedding_layers=False)}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            found = {*file.keys()}
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{folder / WEIGHTS} is cut off or damaged ({error}); download it again") from error
    absent, extra = sorted(wanted - found), sorted(key for key in found - wanted if "lora_" in key)
    if absent or extra:
        what = f"{len(absent)} of its weights are missing" if absent else f"{len(extra)} of its weights have no place"
        raise LoadError(
            f"{folder}: this LoRA adapter does not fit the model: {what}, the first is {(absent or extra)[0]}; "
            "give it with the model that it was trained on"
        )


def unwrapped(model: object, lora: str | Path | None = None) -> PreTrainedModel:
    """The transformers model inside what `torch.compile` or a parallel wrapper made of it; the object stays as it is.

    Errors: OptionError for `lora` with a loaded model; LoadError for a PeftModel, whose weights are not merged yet, and
    for what is no model of transformers.
    """
    from transformers import PreTrainedModel

    if lora is not None:
        raise OptionError(
            f"lora={str(lora)!r} with a loaded model: merging would change that model; give its folder or name, "
            "or merge it yourself with peft and pass the result"
        )
    while not isinstance(model, PreTrainedModel):
        kinds = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
        inner = vars(model).get("_modules", {}) if isinstance(model, nn.Module) else {}
        if "peft" in kinds:
            raise LoadError(
                f"{type(model).__name__} is a model of peft with its adapter beside the weights; merge it and pass the "
                "result: LLM(model.merge_and_unload()), which changes the model, or of a copy.deepcopy(model)"
            )
        if "_orig_mod" in inner:
            model = inner["_orig_mod"]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            raise LoadError(
                f"{type(model).__module__}.{type(model).__name__} is no model of transformers; give a PreTrainedModel, "
                "a folder, a GGUF file or a hub name"
            )
    return model
