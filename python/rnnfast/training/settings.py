"""Everything that decides what a training run computes, in one record.

The record is stored with the run, so that it can be resumed, evaluated and sampled from without
repeating a flag.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..models.backends import BACKENDS, CELLS, MEMORY
from ..models.language_model import LanguageModel
from ..text.vocabulary import LEVELS

NONLINEARITIES = ("tanh", "relu")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("plateau", "cosine", "constant")
DTYPES = {"float32": torch.float32, "float64": torch.float64}

CHOICES: dict[str, tuple[str, ...]] = {
    "model": CELLS,
    "nonlinearity": NONLINEARITIES,
    "level": LEVELS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "dtype": tuple(DTYPES),
    "backend": BACKENDS,
    "memory": MEMORY,
}
# What may change when a run is resumed: how far it goes and on what it is computed. Any other
# change would make it another run.
RESUMABLE = frozenset(
    {"data", "epochs", "max_steps", "max_minutes", "log_interval", "backend", "memory", "device"}
)
SMALLEST = {
    "vocab_size": 3,
    "emsize": 1,
    "nhid": 1,
    "nlayers": 1,
    "bptt": 1,
    "reset_interval": 0,
    "batch_size": 1,
    "epochs": 1,
    "max_steps": 0,
    "max_minutes": 0,
    "eval_interval": 1,
    "eval_tokens": 1,
    "log_interval": 1,
    "seed": 0,
    "clip": 0,
}


DEFAULT_EMSIZE = 128


class SettingsError(ValueError):
    """A setting out of range; the message is one line for the user."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training run. Each is a flag of `rnnfast train`.

    Attributes:
        data: text files; none means the default text.
        level: what a token is: `char`, `byte` or `word`.
        vocab_size: largest word vocabulary.
        model: `lstm` or `rnn`.
        nonlinearity: of an `rnn`.
        emsize: size of the embedding; None means nhid where weights are tied, else 128.
        nhid, nlayers: size and number of the recurrent layers.
        dropout: see `LanguageModel`.
        tied: decoder and embedding share one matrix.
        bidirectional: must be False.
        bptt: steps of a chunk; gradients flow no further.
        reset_interval: chunks after which a row forgets its state, so that the model also learns to
            begin; 0 carries the state through the whole text.
        batch_size: rows of text read side by side, in each process.
        optimizer: `adam`, or `sgd` without momentum.
        lr: learning rate.
        schedule: `plateau` halves the rate when validation stops improving, `cosine` falls to a
            twentieth over the whole run, `constant` keeps it.
        clip: largest global norm of the gradient; 0 doesn't clip.
        epochs: passes over the training split.
        max_steps: stop after so many steps in all; 0 sets no limit.
        max_minutes: stop after so many minutes of this start; 0 sets no limit.
        eval_interval: steps between validations, each followed by a checkpoint.
        eval_tokens: most tokens a validation during training reads (the test reads all).
        log_interval: steps between log entries.
        seed: of the parameters and of dropout.
        device: `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32` or `float64`.
        backend: `rnnfast`, `torch` or `reference`.
        memory: of an `lstm` by `rnnfast`: `low` keeps less for the backward pass and takes longer.
    """

    data: tuple[str, ...] = ()
    level: str = "char"
    vocab_size: int = 10_000
    model: str = "lstm"
    nonlinearity: str = "tanh"
    emsize: int | None = None
    nhid: int = 256
    nlayers: int = 1
    dropout: float = 0.0
    tied: bool = False
    bidirectional: bool = False
    bptt: int = 64
    reset_interval: int = 32
    batch_size: int = 16
    optimizer: str = "adam"
    lr: float = 3e-3
    schedule: str = "plateau"
    clip: float = 1.0
    epochs: int = 10
    max_steps: int = 0
    max_minutes: float = 0.0
    eval_interval: int = 250
    eval_tokens: int = 50_000
    log_interval: int = 10
    seed: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "rnnfast"
    memory: str = "normal"

    def check(self) -> None:
        """Refuses settings out of range.

        Raises:
            SettingsError: naming the setting, what it is and what it should be.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        for name, smallest in SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < math.inf:
                raise SettingsError(f"{name} is {value}; it must be at least {smallest}")
        if not 0 < self.lr < math.inf:
            raise SettingsError(f"lr is {self.lr}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise SettingsError(f"device is {self.device!r}; it must be cpu or cuda") from error
        if device.type not in ("cpu", "cuda"):
            raise SettingsError(f"device is {self.device!r}; it must be cpu or cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SettingsError(f"device is {self.device!r}, but torch finds no CUDA device here")

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal record."""
        return dataclasses.asdict(self) | {"data": list(self.data)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TrainSettings:
        """The inverse of `to_json`.

        Raises:
            SettingsError: an unknown setting, or one out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(record) - known):
            raise SettingsError(f"unknown settings: {', '.join(unknown)}")
        settings = cls(**record | {"data": tuple(record.get("data", ()))})
        settings.check()
        return settings


def resumed_settings(stored: TrainSettings, given: dict[str, Any]) -> TrainSettings:
    """The settings of a resumed run: the stored ones, but for those given anew.

    Raises:
        SettingsError: a setting given anew that a run can't change.
    """
    for name, value in given.items():
        if name not in RESUMABLE and value != getattr(stored, name):
            raise SettingsError(
                f"{name} is {value}, but the run to resume has {getattr(stored, name)} and keeps it"
            )
    settings = dataclasses.replace(stored, **given)
    settings.check()
    return settings


def build_model(
    settings: TrainSettings, vocabulary_size: int, device: torch.device | str | None = None
) -> LanguageModel:
    """The untrained model that the settings describe.

    Args:
        settings: of the run.
        vocabulary_size: number of tokens.
        device: other than the one in the settings.

    Raises:
        SettingsError: settings that no model can have together.
    """
    emsize = settings.emsize
    if emsize is None:
        emsize = settings.nhid if settings.tied else DEFAULT_EMSIZE
    try:
        return LanguageModel(
            vocabulary_size,
            cell=settings.model,
            nonlinearity=settings.nonlinearity,
            emsize=emsize,
            nhid=settings.nhid,
            nlayers=settings.nlayers,
            dropout=settings.dropout,
            tied=settings.tied,
            backend=settings.backend,
            memory=settings.memory,
            bidirectional=settings.bidirectional,
            device=device or settings.device,
            dtype=DTYPES[settings.dtype],
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
