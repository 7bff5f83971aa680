"""Data parallel training: torch's own engine, started by torchrun.

Each process reads its own rows of the text, and torch averages the gradients, so N processes with
batch size B take the same steps as one process with batch size N*B. Without torchrun the same code
runs with a world of one process and no communication.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed, nn


class DivergedProcessesError(RuntimeError):
    """Processes that must agree don't; the message is one line for the user."""


class Engine:
    """One process among `world_size`, here the only one.

    Attributes:
        rank: number of this process, 0 .. world_size - 1; only rank 0 writes files and reports.
        world_size: number of processes.
    """

    rank = 0
    world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process, given the one in the settings."""
        return torch.device(name)

    def wrap(self, model: nn.Module) -> nn.Module:
        """A module with the same forward whose backward averages gradients over the processes."""
        return model

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum of every process's list."""
        return values

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor (of equal shape), on the CPU, in the order of the ranks."""
        return [tensor.cpu()]

    def from_main(self, text: str) -> str:
        """The text that rank 0 has; what the others pass doesn't matter."""
        return text

    def share_parameters(self, model: nn.Module) -> None:
        """Gives every process the parameters that rank 0 has."""

    def wait_for_all(self) -> None:
        """Returns when every process has got here. A process that left while another still worked
        could be aborted by the threads that gloo keeps."""

    def close(self) -> None:
        """Leaves the group of processes."""

    def check_same(self, text: str, what: str) -> None:
        """Refuses to go on with processes that have different texts.

        Raises:
            DivergedProcessesError: this process's `text` isn't that of rank 0.
        """
        if self.from_main(text) != text:
            raise DivergedProcessesError(
                f"{what} of process {self.rank} differs from that of process 0"
            )


class ProcessGroup(Engine):
    """One of several processes, joined by torch.distributed: gloo for the CPU, NCCL for CUDA."""

    def __init__(self, device: str):
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Messages of the training loop itself are CPU tensors, also where the gradients aren't.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()

    def device(self, name: str) -> torch.device:
        device = torch.device(name)
        return (
            torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        )

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.tolist()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.cpu().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor)
        return parts

    def from_main(self, text: str) -> str:
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        distributed.broadcast(length, 0)
        if self.rank != 0:
            content = torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(content, 0)
        return bytes(content.numpy()).decode()

    def share_parameters(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            distributed.broadcast(parameter.data, 0)

    def wait_for_all(self) -> None:
        distributed.barrier()

    def close(self) -> None:
        distributed.destroy_process_group()


def start_engine(device: str) -> Engine:
    """The engine for this process: torchrun tells by WORLD_SIZE how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ProcessGroup(device)
    return Engine()
