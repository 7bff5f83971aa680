"""The problems that are timed, and how much arithmetic and memory traffic a layer needs.

The sizes span what decides which resource runs out: batch 1 reads all of W_hh for every step
(cache bandwidth), large batches are bound by arithmetic, one step or a small hidden size by call
overhead.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

GATES = {"LSTM": 4, "RNN": 1, "LSTMCell": 4, "RNNCell": 1}
MODES = ("forward", "training")

# Training runs the products of the forward pass again for the gradient of their input and again for
# the gradient of their weights; it reads W_hh once a step going forward and once going back.
FLOPS_FACTOR = {"forward": 1, "training": 3}
WEIGHT_READS_PER_STEP = {"forward": 1, "training": 2}


def is_step(cell: str) -> bool:
    """Whether the module of this name does one step of a sequence at a time."""
    return cell.endswith("Cell")


@dataclass(frozen=True, order=True)
class Shape:
    """One layer in one direction: cell, T steps, B batch rows, I input size, H hidden size.

    LSTMCell and RNNCell are the modules that do one step: T is 1.
    """

    cell: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.cell}:{self.steps},{self.batch},{self.input_size},{self.hidden_size}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads ``CELL:T,B,I,H``, for example ``LSTM:35,20,650,650``.

        Raises:
            ValueError: the cell is unknown, there are not four positive integers after it, or a
                module for one step is given more of them.
        """
        cell, _, numbers = text.partition(":")
        if cell not in GATES:
            raise ValueError(f"shape {text!r}: the cell is {cell!r}, expected {' or '.join(GATES)}")
        try:
            sizes = [int(number) for number in numbers.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"shape {text!r}: expected {cell}:T,B,I,H with four positive integers")
        if is_step(cell) and sizes[0] != 1:
            raise ValueError(f"shape {text!r}: {cell} has T = 1, got {sizes[0]}")
        return cls(cell, *sizes)

    @property
    def gates(self) -> int:
        """G: pre-activations per hidden unit."""
        return GATES[self.cell]

    def flops(self, mode: str) -> int:
        """Multiplications and additions of one call: forward 2TBGH(I+H)."""
        rows = self.steps * self.batch * self.gates * self.hidden_size
        return FLOPS_FACTOR[mode] * 2 * rows * (self.input_size + self.hidden_size)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of W_hh (G*H, H), the part of the layer that every step has to read."""
        return self.gates * self.hidden_size**2 * itemsize

    def recurrent_traffic(self, mode: str, itemsize: int) -> int:
        """Bytes of W_hh read from cache by one call."""
        return WEIGHT_READS_PER_STEP[mode] * self.steps * self.weight_bytes(itemsize)


SIZES = (
    (1, 1, 128, 128),
    (50, 1, 128, 128),
    (100, 1, 512, 512),
    (100, 1, 1024, 1024),
    (100, 16, 256, 256),
    (35, 20, 650, 650),
    (50, 64, 1024, 1024),
    (200, 128, 128, 128),
    (1000, 16, 64, 64),
)
QUICK_SIZES = ((1, 1, 128, 128), (50, 1, 128, 128), (100, 16, 256, 256), (35, 20, 650, 650))
# One step for one stream, as in real time: what a call costs, and what reading the weights costs.
STEP_SIZES = ((1, 1, 128, 128), (1, 1, 512, 512))

# Few steps of few streams, as a server batches them.
SERVE_SIZES = tuple((T, B, H, H) for T in (1, 5) for B in (1, 2, 4, 8, 32) for H in (128, 512))

# The wide suite: sizes nobody chose. The points of the Halton sequence, which fill a cube evenly,
# with a prime for each of T, B, I and H, spread on logarithmic scales between these bounds; a size
# whose LSTM forward pass takes more than WIDE_FLOPS is left out, so that the suite takes minutes.
WIDE_BOUNDS = ((1, 4000), (1, 256), (16, 2048), (16, 2048))
WIDE_PRIMES = (2, 3, 5, 7)
WIDE_FLOPS = 40e9
WIDE_COUNT = 20


def radical_inverse(n: int, base: int) -> float:
    """The digits of n mirrored at the point: 6 is 110 in base 2, so 0.011, or 3/8."""
    value, weight = 0.0, 1.0
    while n:
        n, digit = divmod(n, base)
        weight /= base
        value += digit * weight
    return value


def wide_sizes() -> list[tuple[int, ...]]:
    """The first WIDE_COUNT sizes (T, B, I, H) of the sequence that are cheap enough."""
    sizes: list[tuple[int, ...]] = []
    for n in itertools.count(1):
        if len(sizes) == WIDE_COUNT:
            break
        drawn = tuple(
            round(low * (high / low) ** radical_inverse(n, prime))
            for (low, high), prime in zip(WIDE_BOUNDS, WIDE_PRIMES, strict=True)
        )
        if Shape("LSTM", *drawn).flops("forward") <= WIDE_FLOPS:
            sizes.append(drawn)
    return sizes


SUITES: dict[str, tuple[Shape, ...]] = {
    "none": (),
    "quick": tuple(Shape(cell, *sizes) for cell in ("LSTM", "RNN") for sizes in QUICK_SIZES),
    "full": tuple(Shape(cell, *sizes) for cell in ("LSTM", "RNN") for sizes in SIZES),
    "wide": tuple(Shape(cell, *sizes) for cell in ("LSTM", "RNN") for sizes in wide_sizes()),
    "serve": tuple(Shape(cell, *sizes) for cell in ("LSTM", "RNN") for sizes in SERVE_SIZES),
    "step": tuple(Shape(cell, *sizes) for cell in GATES for sizes in STEP_SIZES),
}


@dataclass(frozen=True)
class StepSize:
    """One training step of a language model: `bptt` tokens of each of `batch` streams.

    `optimizer` is a class of torch.optim.
    """

    name: str
    cell: str
    layers: int
    hidden_size: int
    batch: int
    bptt: int
    vocabulary: int
    optimizer: str = "SGD"

    @property
    def tokens(self) -> int:
        """Tokens learned from in one step."""
        return self.batch * self.bptt


# Layers and batch as `rnnfast train` has them by default, and deeper; and the medium model of
# Zaremba et al. 2014 as users know it from PyTorch's word_language_model.
STEPS = (
    StepSize("character LSTM 1x256", "LSTM", 1, 256, 16, 64, vocabulary=100, optimizer="Adam"),
    StepSize("character LSTM 3x512", "LSTM", 3, 512, 16, 64, vocabulary=100, optimizer="Adam"),
    StepSize("word LSTM 2x650", "LSTM", 2, 650, batch=20, bptt=35, vocabulary=10_000),
    StepSize("word RNN 2x650", "RNN", 2, 650, batch=20, bptt=35, vocabulary=10_000),
)
