"""LSTM and RNN layers on fused kernels, as drop-in torch modules."""

from . import bptt, functional
from ._native import build_info
from .convert import convert, revert
from .explain import explain
from .frozen import freeze, thaw
from .halved import halved_recurrence
from .modules import LSTM, RNN, LSTMCell, RNNCell

__all__ = [
    "LSTM",
    "RNN",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "bptt",
    "build_info",
    "convert",
    "explain",
    "freeze",
    "functional",
    "halved_recurrence",
    "revert",
    "thaw",
]

__version__ = "0.1.0"
