"""What a training run leaves on disk, and how it survives a crash.

A run is a directory:

    run.json            settings, vocabulary, and which text it was
    last.safetensors    all that is needed to go on: model, optimiser, random numbers, carried state
    best.safetensors    the model that predicted the validation split best
    log.jsonl           one JSON object a line: training steps, validations, the test

A checkpoint is ONE file, its numbers in the safetensors header, so that replacing it is one rename:
a reader sees the old one or the new one, whole, also after a crash or with a full disk. Nothing is
pickled, so opening somebody else's run executes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..models.language_model import LanguageModel
from ..text.vocabulary import Vocabulary, vocabulary_from_json
from .settings import TrainSettings, build_model

FORMAT = 1
LAST = "last"
BEST = "best"
_METADATA_KEY = "rnnfast"


class CheckpointError(ValueError):
    """A run that can't be read or written; the message is one line for the user."""


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json.

    Attributes:
        settings: of the run.
        vocabulary: of the run.
        fingerprint: of the text, see `Corpus`.
        world_size: processes that train it.
    """

    settings: TrainSettings
    vocabulary: Vocabulary
    fingerprint: str
    world_size: int


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record_file = self.path / "run.json"
        self.log_file = self.path / "log.jsonl"

    def checkpoint_file(self, name: str) -> Path:
        """Where the checkpoint `last` or `best` lies."""
        return self.path / f"{name}.safetensors"

    def create(self) -> None:
        """Makes the directory.

        Raises:
            CheckpointError: it already holds a run, or can't be made.
        """
        if self.record_file.exists():
            raise CheckpointError(
                f"{self.path} already holds a run; --resume continues it, another --save keeps both"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make directory {self.path}: {reason(error)}") from error

    def write_record(self, record: RunRecord) -> None:
        """Replaces run.json.

        Raises:
            CheckpointError: it can't be written.
        """
        content = {
            "format": FORMAT,
            "settings": record.settings.to_json(),
            "vocabulary": record.vocabulary.to_json(),
            "fingerprint": record.fingerprint,
            "world_size": record.world_size,
        }
        write_atomically(self.record_file, (json.dumps(content, indent=1) + "\n").encode())

    def read_record(self) -> RunRecord:
        """The content of run.json.

        Raises:
            CheckpointError: this is no run, or a damaged one, or one of a later version.
        """
        if not self.record_file.is_file():
            raise CheckpointError(f"{self.path} is not a run: it has no run.json")
        try:
            content = json.loads(self.record_file.read_bytes())
            check_format(self.record_file, content)
            return RunRecord(
                TrainSettings.from_json(content["settings"]),
                vocabulary_from_json(content["vocabulary"]),
                content["fingerprint"],
                content["world_size"],
            )
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"cannot read {self.record_file}: {reason(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.record_file} is damaged: {error}") from error

    def load_model(self, name: str, model: nn.Module) -> None:
        """Fills a model with the parameters of a checkpoint.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        file = self.checkpoint_file(name)
        tensors, _ = read_checkpoint(file)
        fill_model(model, tensors, file)

    def open_model(
        self, name: str, *, backend: str | None = None, device: str | None = None
    ) -> tuple[RunRecord, LanguageModel]:
        """The model of a checkpoint, ready to use, and the record of its run.

        Args:
            name: of the checkpoint, `last` or `best`.
            backend, device: other than those it was trained with.

        Raises:
            CheckpointError: this is no run, or the checkpoint is missing or damaged.
            SettingsError: an unknown backend or device.
        """
        record = self.read_record()
        changes = {"backend": backend, "device": device}
        settings = dataclasses.replace(
            record.settings, **{key: value for key, value in changes.items() if value is not None}
        )
        settings.check()
        model = build_model(settings, len(record.vocabulary))
        self.load_model(name, model)
        return record, model.eval()


def fill_model(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Copies the tensors of a checkpoint into a model.

    Raises:
        CheckpointError: the tensors are those of another model.
    """
    parameters = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    try:
        model.load_state_dict(parameters)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file} does not fit the model that run.json describes: {one_line(error)}"
        ) from error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers under the names that a checkpoint gives them."""
    # Copies, since tied weights share memory, which the format doesn't allow.
    return {
        f"model.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def write_checkpoint(file: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Replaces a checkpoint.

    Args:
        file: its path.
        tensors: on the CPU.
        record: a JSON object; kept in the header of the file.

    Raises:
        CheckpointError: it can't be written; what was there before is intact.
    """
    metadata = {_METADATA_KEY: json.dumps(record | {"format": FORMAT})}
    write_atomically(file, safetensors_bytes(tensors, metadata=metadata))


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, on the CPU, and its JSON record.

    Raises:
        CheckpointError: it is missing, unreadable, truncated or otherwise damaged.
    """
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint {file}")
    try:
        with safe_open(file, framework="pt") as content:
            record = json.loads((content.metadata() or {})[_METADATA_KEY])
            check_format(file, record)
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, record
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {reason(error)}") from error
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {one_line(error)}") from error


def check_format(file: Path, record: dict[str, Any]) -> None:
    """Refuses what another version has written.

    Raises:
        CheckpointError: the record has another format number.
    """
    if record["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {record['format']}; this version reads {FORMAT}")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the content of a file all at once, on stable storage when this returns.

    Raises:
        CheckpointError: it can't be written; what was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with removed_on_failure(temporary):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {reason(error)}; what was there before is intact"
        ) from error


@contextlib.contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Removes a half-written file when its writing fails or is interrupted."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_directory(path: Path) -> None:
    """Puts a rename on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    """Why the system refused, without the path, which the message names anyway."""
    return error.strerror or str(error)


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())
