"""lstm_layer and rnn_layer refuse what would make a kernel read or write out of bounds.

The modules check more and say it better; these are the operators called directly.
"""

from __future__ import annotations

import pytest
import torch
from one_layer import Case
from rnnfast import _native, ops

CELLS = ["lstm", "tanh", "relu"]


def arguments(cell):
    case = Case(cell, 3, 2, 4, 5)
    inputs = case.inputs(torch.float32)
    inputs |= {"reverse": False, "k1": 0, "k2": 0}
    return inputs | ({"keep": "all"} if cell == "lstm" else {"nonlinearity": cell})


MISTAKES = {
    "x 2-D": ({"x": (2, 4)}, "x has 2 dimensions.*3"),
    "x 4-D": ({"x": (1, 3, 2, 4)}, "x has 4 dimensions.*3"),
    "x features": ({"x": (3, 2, 7)}, r"w_ih has shape .* should have \(\d+, 7\)"),
    "x batch": ({"x": (3, 9, 4)}, r"h0 has shape \(2, 5\), but should have \(9, 5\)"),
    "h0 units": ({"h0": (2, 6)}, r"h0 has shape \(2, 6\), but should have \(2, 5\)"),
    "h0 3-D": ({"h0": (1, 2, 5)}, r"h0 has shape \(1, 2, 5\)"),
    "w_ih rows": ({"w_ih": (21, 4)}, r"w_ih has shape \(21, 4\)"),
    "w_ih transposed": ({"w_ih": (4, 20)}, r"w_ih has shape \(4, 20\)"),
    "w_hh rows": ({"w_hh": (19, 5)}, r"w_hh has shape \(19, 5\)"),
    "w_hh 1-D": ({"w_hh": (5,)}, "w_hh has shape"),
    "w_hh 0-D": ({"w_hh": ()}, "w_hh has"),
    "b_ih": ({"b_ih": (3,)}, r"b_ih has shape \(3,\)"),
    "b_hh 2-D": ({"b_hh": (1, 20)}, r"b_hh has shape \(1, 20\)"),
}
NUMBERS = [(0, 1), (1, 0), (2, 1), (-1, -1), (-1, 3), (5, 4)]


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test if native code is reached."""

    def reached(*_):
        pytest.fail("the kernel ran")

    for name in ("forward", "layer_backward_float32", "layer_backward_float64"):
        monkeypatch.setattr(_native.core, name, reached)


def call(cell, **changes):
    given = arguments(cell) | changes
    optional = [given.get("b_ih"), given.get("b_hh")]
    head = [given["x"], given["h0"], *([given["c0"]] if cell == "lstm" else [])]
    head += [given["w_ih"], given["w_hh"], *optional]
    if cell == "lstm":
        return ops.lstm_layer(*head, given["reverse"], given["k1"], given["k2"], given["keep"])
    return ops.rnn_layer(*head, given["nonlinearity"], given["reverse"], given["k1"], given["k2"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_shapes(mistake, cell, no_kernel):
    shapes, message = MISTAKES[mistake]
    with pytest.raises(RuntimeError, match=message):
        call(cell, **{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_wrong_c0(no_kernel):
    with pytest.raises(RuntimeError, match=r"c0 has shape \(2, 4\), but should have \(2, 5\)"):
        call("lstm", c0=torch.zeros(2, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_wrong_dtypes(cell, no_kernel):
    given = {name: v for name, v in arguments(cell).items() if isinstance(v, torch.Tensor)}
    for name, value in given.items():
        with pytest.raises(RuntimeError, match=r"torch\.float64"):
            call(cell, **{name: value.double()})
    for dtype in (torch.float16, torch.int64, torch.complex64):
        with pytest.raises(NotImplementedError, match=f"float32 and float64, not in {dtype}"):
            call(cell, **{name: value.to(dtype) for name, value in given.items()})


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_wrong_devices(cell, no_kernel):
    given = {name: v for name, v in arguments(cell).items() if isinstance(v, torch.Tensor)}
    for name, value in given.items():
        with pytest.raises(RuntimeError, match=f"{name}.*device|device.*meta"):
            call(cell, **{name: value.to("meta")})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("k1", "k2"), NUMBERS)
@pytest.mark.parametrize("T", [0, 3])
def test_wrong_windows(T, k1, k2, cell, no_kernel):
    with pytest.raises(RuntimeError, match=f"k1 is {k1} and k2 is {k2}"):
        call(cell, x=torch.zeros(T, 2, 4), k1=k1, k2=k2)


def test_unknown_keep(no_kernel):
    for T in (0, 3):
        with pytest.raises(ValueError, match=r"keep is 'gates', but should be 'nothing', 'cells'"):
            call("lstm", x=torch.zeros(T, 2, 4), keep="gates")
    given = arguments("lstm").items()
    on_meta = {name: v.to("meta") for name, v in given if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=r"keep is 'gates'"):
        call("lstm", **on_meta, keep="gates")


def test_unknown_nonlinearity(no_kernel):
    with pytest.raises(ValueError, match=r"nonlinearity is 'gelu'.*'tanh' or 'relu'"):
        call("tanh", nonlinearity="gelu")


def test_no_units_is_an_error():
    shapes = {"h0": (2, 0), "c0": (2, 0), "w_ih": (0, 4), "w_hh": (0, 0), "b_ih": (0,)}
    with pytest.raises((RuntimeError, ValueError)):
        call("lstm", b_hh=None, **{name: torch.zeros(s) for name, s in shapes.items()})


BACKWARD_SHAPES = {
    "dy": (3, 2, 5),
    "dh_n": (2, 5),
    "dc_n": (2, 5),
    "dc": (3, 2, 5),
    "x": (3, 2, 4),
    "h0": (2, 5),
    "c0": (2, 5),
    "w_ih": (20, 4),
    "w_hh": (20, 5),
    "y": (3, 2, 5),
    "c": (3, 2, 5),
    "gates": (3, 2, 4, 5),
}


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize("name", BACKWARD_SHAPES)
def test_wrong_shapes_and_dtypes_going_back(name, cell, no_kernel):
    shapes = dict(BACKWARD_SHAPES)
    if cell == "tanh":
        if name in ("dc_n", "dc", "c0", "c", "gates"):
            return
        shapes |= {"w_ih": (5, 4), "w_hh": (5, 5)}
        names = ["dy", "dh_n", "x", "h0", "w_ih", "w_hh", "y"]
        run, tail = torch.ops.rnnfast.rnn_layer_backward, ["tanh"]
    else:
        names, run, tail = list(shapes), torch.ops.rnnfast.lstm_layer_backward, []
    tail += [False, 0, 0, True, True, True, True]
    tensors = {key: torch.zeros(shapes[key]) for key in names}
    for wrong in (tensors[name].double(), tensors[name][..., :-1], tensors[name][None]):
        with pytest.raises(RuntimeError, match="should"):
            run(*(tensors | {name: wrong}).values(), *tail)


@pytest.mark.parametrize("name", ["b_ih", "b_hh"])
def test_wrong_biases_going_back_without_gates(name, no_kernel):
    shapes = BACKWARD_SHAPES | {"gates": None}
    tensors = [shape if shape is None else torch.zeros(shape) for shape in shapes.values()]
    for wrong in (torch.zeros(19), torch.zeros(20, 1), torch.zeros(20).double()):
        with pytest.raises(RuntimeError, match=rf"{name} (is|has shape).*should"):
            torch.ops.rnnfast.lstm_layer_backward(
                *tensors, False, 0, 0, *[True] * 4, **{name: wrong}
            )
