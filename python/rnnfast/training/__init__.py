"""Training of language models: from settings and text to checkpoints, by truncated BPTT."""

from .checkpoint import CheckpointError, RunDirectory
from .evaluation import Score, evaluate
from .run import TrainingResult, train
from .settings import SettingsError, TrainSettings

__all__ = [
    "CheckpointError",
    "RunDirectory",
    "Score",
    "SettingsError",
    "TrainSettings",
    "TrainingResult",
    "evaluate",
    "train",
]
