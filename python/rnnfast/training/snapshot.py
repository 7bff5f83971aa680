"""Optimiser, carried state and random numbers as named tensors, and back: what besides the model
makes a resumed run take the very same steps.

With several processes, each has its own rows, so its own carried state and random numbers; the
checkpoint holds those of all. The model and the optimiser are the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.language_model import State
from .distributed import Engine


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's tensors as `optimizer.<parameter>.<name>`, and the rest as a JSON object."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in content["state"].items():
        for name, value in values.items():
            key = f"optimizer.{parameter}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().contiguous()
            else:
                numbers[key] = value
    return tensors, {"groups": content["param_groups"], "numbers": numbers}


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """The inverse of `optimizer_to_tensors`."""
    state: dict[int, dict[str, Any]] = {}
    stored = {key: value for key, value in tensors.items() if key.startswith("optimizer.")} | extra[
        "numbers"
    ]
    for key, value in stored.items():
        _, parameter, name = key.split(".", 2)
        state.setdefault(int(parameter), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": extra["groups"]})


def state_to_tensors(state: State | None, engine: Engine) -> dict[str, Tensor]:
    """The carried state of all processes as `state.0` and, for an LSTM, `state.1`, side by side in
    the batch: each (layers, batch of all processes, nhid). None gives no tensor."""
    parts = () if state is None else state if isinstance(state, tuple) else (state,)
    return {
        f"state.{number}": torch.cat(engine.gather(part.detach()), dim=1)
        for number, part in enumerate(parts)
    }


def state_from_tensors(
    tensors: dict[str, Tensor], device: torch.device, engine: Engine
) -> State | None:
    """The inverse of `state_to_tensors`: the share of this process."""
    parts = tuple(
        tensors[key].chunk(engine.world_size, dim=1)[engine.rank].to(device).contiguous()
        for key in ("state.0", "state.1")
        if key in tensors
    )
    if not parts:
        return None
    return parts if len(parts) == 2 else parts[0]


def random_to_tensors(device: torch.device, engine: Engine) -> dict[str, Tensor]:
    """The random number generators of all processes as `random.cpu` and, on a GPU, `random.cuda`:
    uint8, one row for each process."""
    tensors = {"random.cpu": torch.stack(engine.gather(torch.get_rng_state()))}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.stack(engine.gather(torch.cuda.get_rng_state(device)))
    return tensors


def random_from_tensors(tensors: dict[str, Tensor], device: torch.device, engine: Engine) -> None:
    """The inverse of `random_to_tensors`; a generator that the checkpoint lacks stays as it is."""
    # Copies, since torch reads a state from where its storage begins.
    torch.set_rng_state(tensors["random.cpu"][engine.rank].clone())
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"][engine.rank].clone(), device)
