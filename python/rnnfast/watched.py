"""Whether eager calls may go past torch's dispatcher: the question of both short ways.

Dispatching an operator with Python kernels, and its autograd formula, takes several times what the
host has to do for a small layer. Where nothing wants to see operators, and all tensors are ordinary
ones, `direct` (CPU) and `cuda_direct` do without.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling


def watched() -> bool:
    """Whether something is active that wants to see, record or replace operator calls."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    )


PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
