"""What is known of a stock model without its weights, and the model itself, loaded when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from selfdraft.models.checkpoint.end_ids import declared_ends
from selfdraft.models.identity import config_hash
from selfdraft.models.packed.layers import formats_of
from selfdraft.models.rounded import rounded_weights
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from selfdraft.models.adapters import Frame


@dataclass(frozen=True, slots=True)
class Facts:
    """What targets and front doors ask of a model beside its passes."""

    vocab: int
    layers: int
    context: int
    """Most positions."""
    dtype: torch.dtype
    """Of its weights."""
    device: torch.device
    config: str
    """A hash of the configuration."""
    ends: Mapping[str, object]
    """What each part of the checkpoint says of the ids that end a text (`checkpoint/end_ids.py`)."""
    generation: Mapping[str, object]
    """Numbers and switches of the generation config."""
    formats: Mapping[str, int]
    """How many layers of block weights there are of each format, by its words; none in a model of float weights."""
    rounded_weights: int
    """How many weights a rounded copy would round; 0 where some layers would stay as they are."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Facts:
        text = model.config.get_text_config()
        weight = next(p for p in model.parameters() if p.is_floating_point())
        settings = vars(getattr(model, "generation_config", None) or object)
        return cls(
            int(text.vocab_size),
            int(text.num_hidden_layers),
            context_of(model),
            weight.dtype,
            weight.device,
            config_hash(model),
            declared_ends(model),
            {name: value for name, value in settings.items() if isinstance(value, int | float) and name[0] != "_"},
            formats_of(model),
            rounded_weights(model),
        )

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON; `of_dict` reads it."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}

    @classmethod
    def of_dict(cls, given: JsonObject) -> Facts:
        """Errors: TypeError, AttributeError or RuntimeError for what `as_dict` did not make."""
        dtype, device = getattr(torch, given["dtype"]), torch.device(given["device"])
        return cls(**{**given, "dtype": dtype, "device": device})


class Stock:
    """A stock model with what is known of it.

    `load` brings the model when it is first asked for; `frame` is what adapters are checked against.
    """

    def __init__(self, facts: Facts, load: Callable[[], PreTrainedModel], frame: Frame | None = None) -> None:
        self.facts = facts
        self._load, self._frame = load, frame
        self._model: PreTrainedModel | None = None
        self._lock = threading.RLock()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Stock:
        stock = cls(Facts.of(model), lambda: model)
        stock._model = model
        return stock

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    @property
    def model(self) -> PreTrainedModel:
        """The model. Errors: LoadError where it is loaded now and cannot be."""
        with self._lock, torch.inference_mode(False):
            if self._model is None:
                self._model = self._load()
            return self._model

    @property
    def frame(self) -> Frame:
        from selfdraft.models.adapters import Frame

        if self._frame is None:
            self._frame = Frame.of(self.model)
        return self._frame


def context_of(model: PreTrainedModel) -> int:
    """Most positions the model has; transformers names it differently from family to family.

    Rotary frequencies that depend on the current length ('dynamic', 'longrope') would make old keys wrong as the text
    grows; they are constant up to a first length, and that is the context then.
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    most = next((int(value) for name in names if (value := getattr(config, name, None))), 2048)
    for rope in ropes_of(config):
        if rope.get("rope_type") in GROWING:
            first = rope.get("original_max_position_embeddings")
            first = first or getattr(config, "original_max_position_embeddings", None)
            most = min(most, int(first or most))
    return most


GROWING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the current length."""


def ropes_of(config: PreTrainedConfig) -> list[JsonObject]:
    """The rotary settings of a text configuration: one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in rope.values() if isinstance(each, dict)] or [rope]
