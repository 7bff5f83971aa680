"""Which tensors the short way to the CUDA kernels takes: the core's answer against Python's."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from rnnfast import _native
from rnnfast.watched import PLAIN_TYPES
from short_way import Subclass
from torch._subclasses import FakeTensorMode

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.complex64]
CPU = torch.device("cpu")
DEVICES = [CPU, *map(torch.device, ("cpu:0", "meta", "cuda", "cuda:0", "cuda:1"))]
NO_TENSORS = [1, "x", (), [], object(), torch.float32, np.zeros((2, 3), np.float32)]

pytestmark = [
    pytest.mark.usefixtures("reading"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]


def are_plain(tensors, shapes, dtype=torch.float32, device=CPU):
    return _native.core.are_plain(tensors, shapes, dtype, device)


def as_python_says(tensors, shapes, dtype, device):
    """Whether each of the tensors is absent, or one whose data_ptr() leads to its very elements.

    A sparse tensor has no storage, which is a RuntimeError; a lazy negation and lazy zeros are not
    there to be read; nor are the elements of an empty tensor.
    """
    try:
        for tensor, shape in zip(tensors, shapes, strict=True):
            if tensor is not None and (
                type(tensor) not in PLAIN_TYPES
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or tensor.device != device
                or tensor.is_neg()
                or tensor.data_ptr() == 0
            ):
                return False
    except RuntimeError:
        return False
    return True


def inside(transform):
    """The tensor that a transformation of torch.func hands on, used after it has ended."""

    def of(x):
        seen = []
        transform(lambda x: (seen.append(x), x.sum())[1])(x)
        return seen[0]

    return of


# Each from one of shape (2, 3), to one of that shape where there can be.
TENSORS = {
    "itself": lambda x: x,
    "parameter": torch.nn.Parameter,
    "buffer": lambda x: torch.nn.Buffer(x) if hasattr(torch.nn, "Buffer") else x,
    "gradient wanted": lambda x: x.clone().requires_grad_(),
    "transposed": lambda x: x.t().contiguous().t(),
    "part": lambda x: torch.stack((x, x), 1)[:, 1],
    "expanded": lambda x: x[:1].expand(2, 3),
    "lazy copy": lambda x: torch._lazy_clone(x) if hasattr(torch, "_lazy_clone") else x,
    "of inference": torch.inference_mode()(lambda x: x.clone()),
    "other dtype": lambda x: x.abs().to(torch.float8_e5m2),
    "truth": lambda x: x > 0,
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter of a subclass": lambda x: torch.nn.Parameter(x.as_subclass(Subclass)),
    "lazy negation": lambda x: torch._neg_view(x),
    "negated parameter": lambda x: torch.nn.Parameter(torch._neg_view(x)),
    "imaginary part": lambda x: torch.complex(x, x).conj().imag,
    "lazy zeros": lambda x: torch._efficientzerotensor(2, 3, dtype=x.dtype),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "sparse by rows": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "uninitialised": lambda x: torch.nn.UninitializedParameter(),
    "left grad": inside(torch.func.grad),
    "left vmap": inside(torch.vmap),
    "no memory": lambda x: x.clone().set_(),
    "empty": lambda x: x.new_empty(0, 3),
    "empty part": lambda x: x[:0],
    "number": lambda x: x[0, 0],
    "five axes": lambda x: x.view(1, 2, 1, 3, 1),
    "many axes": lambda x: x.view(*[1] * 61, 2, 3),
}


def made(kind, dtype=torch.float32):
    """The tensor, unless there is none of this kind and dtype."""
    try:
        return TENSORS[kind](torch.ones(2, 3).to(dtype))
    except (RuntimeError, NotImplementedError):
        return None


def shape_of(tensor):
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # of a nested or an uninitialised one
        return (2, 3)


@pytest.mark.parametrize("kind", TENSORS)
def test_the_core_says_what_python_would(kind):
    assert made(kind) is not None
    for tensor in filter(lambda t: t is not None, (made(kind, dtype) for dtype in DTYPES)):
        own = shape_of(tensor)
        shapes = [own, (2, 3), (3, 2), (6,), (), (2, 3, 1), (1, 2, 3), (0, 3), own[:-1], (2**70, 3)]
        shapes += [torch.Size(own), list(own), (2.5, 3), ("2", 3), None, 6]
        asked = [(own, dtype, device) for dtype in (*DTYPES, None) for device in DEVICES]
        asked += [(shape, tensor.dtype, tensor.device) for shape in shapes]
        asked += [(own, tensor.dtype, device) for device in ("cpu", None)]
        for shape, dtype, device in asked:
            call = ((tensor,), (shape,), dtype, device)
            assert _native.core.are_plain(*call) is as_python_says(*call), call[1:]


def test_which_are_plain():
    """That the comparison above compares something."""
    plain = {kind for kind in TENSORS if are_plain((made(kind),), ((2, 3),))}
    assert plain - {"buffer", "left grad", "left vmap"} == {
        *("itself", "parameter", "gradient wanted", "transposed", "part", "expanded", "lazy copy"),
        "of inference",
    }


def test_all_of_them_have_to_be():
    x, other = torch.ones(2, 3), torch.ones(4, dtype=torch.float64)
    assert are_plain((), ())
    assert are_plain((None, None), (None, (1, 2)))
    assert are_plain([x, None, x[0]], [(2, 3), (), (3,)])
    assert are_plain(iter((x, x)), iter((x.shape, x.shape)))
    for wrong in (other, x.to("meta"), x[:0], *NO_TENSORS):
        for place in range(3):
            tensors, shapes = [x, x, x], [x.shape] * 3
            tensors[place] = wrong
            shapes[place] = getattr(wrong, "shape", ())
            assert not are_plain(tensors, shapes)


def test_a_device_is_looked_at_in_every_tensor():
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    shapes = (x.shape,) * 2
    for given in ((x, y.to("meta")), (y.to("meta"), x)):
        for device in DEVICES:
            assert not are_plain(given, shapes, device=device)
    assert not are_plain((x, y), shapes, device=torch.device("cuda:0"))
    assert are_plain((None, None), shapes, device=torch.device("cuda:0"))


def test_anything_may_stand_in_the_place_of_an_argument():
    x = torch.ones(2, 3)
    for wrong in NO_TENSORS:
        assert not are_plain((wrong,), ((2, 3),))
        assert not are_plain((x,), (wrong,))
        assert are_plain((x,), (x.shape,), dtype=wrong) is (wrong is torch.float32)
    for wrong in (None, *NO_TENSORS[:-1]):  # an array makes an array of every comparison
        assert not are_plain((x,), ((2, wrong),))
        assert not are_plain((x,), (x.shape,), device=wrong)
    for wrong in (None, 1, object()):
        for call in ((wrong, ()), ((), wrong)):
            with pytest.raises(TypeError, match="iterable"):
                are_plain(*call)
    for call in (((x,), ()), ((), (x.shape,)), ((None,), ())):
        with pytest.raises(ValueError, match="differ in number"):
            are_plain(*call)
    for count in (0, 1, 3, 5):
        with pytest.raises(ValueError, match="number of arguments"):
            _native.core.are_plain(*[()] * count)
    with pytest.raises(TypeError):
        _native.core.are_plain(tensors=(), shapes=(), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, MemoryError])
def test_only_a_runtime_error_is_an_answer(error, monkeypatch):
    def is_neg(_):
        raise error("is_neg")

    x = torch.ones(2, 3)
    monkeypatch.setattr(torch.Tensor, "is_neg", is_neg, raising=False)
    if issubclass(error, RuntimeError):
        assert not are_plain((x,), (x.shape,))
    else:
        with pytest.raises(error, match="is_neg"):
            are_plain((x,), (x.shape,))


@pytest.mark.parametrize("which", ["tensors", "shapes"])
def test_a_list_may_change_while_it_is_read(which, monkeypatch):
    """As another thread may do whenever reading a tensor lets it run."""
    tensors = [torch.ones(2, n) for n in range(1, 5)]
    shapes = [(2, n) for n in range(1, 5)]
    changing = tensors if which == "tensors" else shapes
    others = []

    def is_neg(_):
        changing.clear()
        others.extend([1] * 4 for _ in range(20))  # where its items stood
        return False

    monkeypatch.setattr(torch.Tensor, "is_neg", is_neg, raising=False)
    assert are_plain(tensors, shapes)
    assert len(others) == 80
    assert changing == []


@pytest.mark.parametrize("kind", TENSORS)
def test_no_object_is_kept_or_lost(kind):
    tensor, plain, dtype, device = made(kind), torch.ones(2, 3), torch.float32, torch.device("cpu")
    shape, own, large = (2, 3), shape_of(tensor), (2**70, 3)
    tensors, shapes, lists = (plain, None, tensor), (shape, shape, own), ([tensor], [own])
    objects = [tensor, plain, dtype, device, shape, own, large, tensors, shapes, *lists]
    objects += [None, True, False, torch.Tensor, torch.device, RuntimeError]

    def calls():
        are_plain(tensors, shapes, dtype, device)
        are_plain(*lists, dtype, device)
        are_plain((plain, tensor), (shape, large), dtype, device)
        for wrong in (None, "cpu", torch.device("meta")):
            are_plain(tensors, shapes, dtype, wrong)
        with suppress(ValueError):
            are_plain(tensors, lists[1], dtype, device)

    calls()
    gc.collect()
    gc.disable()  # what other tests have left holds these objects, too
    try:
        before = [sys.getrefcount(o) for o in objects]
        for _ in range(60):
            calls()
        changes = [sys.getrefcount(o) - b for o, b in zip(objects, before, strict=True)]
    finally:
        gc.enable()
    assert max(map(abs, changes)) < 30, changes


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch publishes no table"
)
def test_tensors_are_read_through_the_exchange_table_where_there_is_one(monkeypatch, request):
    """Reading attributes is for torch versions that have none."""
    x, read = torch.ones(2, 3), []
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: read.append(1) or 1, raising=False)
    assert are_plain((x, x), (x.shape, x.shape))
    assert len(read) == (2 if "attributes" in request.node.callspec.id else 0)
