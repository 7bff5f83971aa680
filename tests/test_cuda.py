"""The CUDA kernels' own source on the emulator, against the textbook.

Sizes are chosen for the edges inside the kernels: tiles have 16 rows of weights, 8 columns (on
tensor cores 2 tiles of them side by side) and 16 to 64 terms, shared among 8 warps; in an LSTM
forward two tiles of rows go side by side; a block has 256 threads for its cells. What an emulator
can't show is in docs/cuda.md.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from by_layers import by_layers
from emulated import device, emulating, native, run
from one_layer import LAYOUTS, Case, assert_results, by_reference
from pairwise import pairwise
from rnnfast import cuda_ops
from tolerance import assert_close

RESIDENT = ["resident", "resident_cluster"]  # only on tensor cores
OURS = ["local", "cluster", "grid", *RESIDENT, "steps"]
METHODS = [*OURS, "gemm"]  # whose products are a library's
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALF = [torch.float16, torch.bfloat16]
TURNS = [(method, d) for method in OURS for d in (HALF if method in RESIDENT else DTYPES)]
LARGE = {"multiprocessors": 24}
SMALL = {"multiprocessors": 8, "shared_bytes": 131072}  # several groups, weights streamed from L2


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch hands out is full of NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case, dtype, method="", seed=1, **properties):
    with emulating(seed, **properties):
        assert_results(case, run(case, dtype, method), by_reference(case, dtype))


# Methods, their dtypes, sizes and cuts: overlapping windows are for two, and one exchanges vectors
# of whole 16 bytes.
ANY, APART = [9, 17, 40, 65], [None, (1, 1), (2, 2), (6, 6)]
KINDS = [
    (["cluster", "steps"], DTYPES, ANY, [*APART, (2, 3), (3, 11)]),
    (["local", "grid", "resident"], DTYPES, ANY, APART),
    (["resident_cluster"], HALF, [8, 24, 40, 72], APART),
]
PAIRWISE = [
    (choice.pop("dtype"), choice.pop("method"), choice.pop("properties"), Case(**choice))
    for methods, dtypes, sizes, cuts in KINDS
    for choice in pairwise(
        dtype=dtypes,
        method=methods,
        properties=[LARGE, SMALL],
        cell=["lstm", "tanh", "relu"],
        T=[1, 2, 3, 20],
        B=[1, 2, 9, 35],
        I=[0, 1, 5],
        H=sizes,
        reverse=[False, True],
        biases=["both", "none", "input"],
        layout=list(LAYOUTS),
        truncate=cuts,
    )
]


def can_run(case, dtype, method, properties):
    """Whether there are enough rows of weights for a cluster, and room for one group's columns."""
    if method == "steps":
        return True
    number = str(dtype).removeprefix("torch.")
    k1, k2 = case.truncate or (case.T, case.T)
    k1, k2 = min(k1, case.T), min(k2, -(-case.T // min(k1, case.T)) * min(k1, case.T))
    try:
        for backward in (False, True):
            sizes = (case.T, case.B, case.H, k1, k2, 1, method)
            native.plan(device(**properties), backward, case.cell, number, *sizes)
    except ValueError:
        return False
    return True


RUNNABLE = [choice for choice in PAIRWISE if can_run(choice[3], *choice[:3])]


@pytest.mark.parametrize(
    ("dtype", "method", "properties", "case"),
    RUNNABLE,
    ids=lambda value: (
        {24: "large", 8: "small"}[value["multiprocessors"]]
        if isinstance(value, dict)
        else str(value)
    ),
)
def test_pairwise(case, dtype, method, properties):
    check(case, dtype, method, **properties)


def test_every_method_and_dtype_is_among_them():
    assert len(RUNNABLE) > 0.7 * len(PAIRWISE)
    met = {(str(dtype), method) for dtype, method, *_ in RUNNABLE}
    assert met == {(str(dtype), method) for method, dtype in TURNS}


# (T, B, I, H)
EDGES = [
    ("lstm", 2, 8, 3, 16),  # whole tiles
    ("lstm", 2, 33, 3, 20),  # a second pass over columns, of one column
    ("tanh", 3, 2, 3, 260),  # all warps have terms; weights in registers, shared memory and L2
    ("lstm", 2, 70, 2, 12),  # more cells than threads
]


EDGE_CASES = [
    (Case(*sizes, reverse=sizes[1] % 2 == 0), method, dtype)
    for sizes, method, dtype in itertools.product(EDGES, METHODS, DTYPES)
]


@pytest.mark.parametrize(
    ("case", "method", "dtype"),
    [edge for edge in EDGE_CASES if can_run(edge[0], edge[2], edge[1], SMALL)],
    ids=str,
)
def test_edges_of_the_kernels(case, method, dtype):
    check(case, dtype, method, **SMALL)


# Windows have steps in which none begins or ends; one may be shorter, the last or the first.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize(("method", "dtype"), TURNS, ids=str)
def test_windows_of_many_steps(method, dtype, cell, reverse):
    for T, k in ((15, 5), (13, 5), (16, 5), (5, 5), (4, 5)):
        case = Case(cell, T, 3, 2, 24, truncate=(k, k), reverse=reverse)
        check(case, dtype, method, **SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(*EDGES[1], reverse=True), Case(*EDGES[2])], ids=str)
def test_products_by_torch_where_cublas_is_not_found(case, dtype, monkeypatch):
    monkeypatch.setattr(native, "has_products", lambda: False)
    check(case, dtype, "gemm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_groups_of_inputs_than_are_under_way(dtype):
    """Backward 2,120 terms: a third group of inputs takes the place of the first."""
    check(Case("lstm", 2, 9, 1, 530), dtype, "grid", multiprocessors=40)


# A little less and a little more than the units that local's kernels are made for, or a few: the
# columns that there are kernels for.
LOCAL = {
    "float32": {("lstm", 63): {1, 4}, ("tanh", 3): {1, 4}, ("tanh", 65): {1, 4}},
    "float64": {("lstm", 3): {1, 4}, ("tanh", 63): {1, 4}, ("tanh", 65): {1, 4}},
    "tf32": {("lstm", 63): {1, 4, 8}, ("tanh", 3): {1, 4, 8}, ("tanh", 65): {1, 4, 8}},
    "float16": {("lstm", 3): {1, 8}, ("lstm", 65): {8}, ("tanh", 63): {1, 8}},
    "bfloat16": {("lstm", 63): {1, 8}, ("tanh", 65): {1, 8}, ("tanh", 129): {8}},
}


@pytest.mark.parametrize(
    ("number", "cell", "H", "columns"),
    [(number, *of, n) for number, kernels in LOCAL.items() for of, n in kernels.items()],
    ids=str,
)
def test_every_local_kernel(cell, H, number, columns):
    """With fewer columns than a block has, and with more."""
    met = set()
    for B, k in itertools.product((3, 9), (None, (2, 2))):
        met |= check_every_plan(Case(cell, 3, B, 2, H, truncate=k), number, "local")
    passes = ("forward",) if (cell, H) == ("lstm", 65) else ("forward", "backward")
    assert met == {(which, 0, n) for which in passes for n in columns}


TENSOR_CORES = ["tf32", "float16", "bfloat16"]


@pytest.mark.parametrize("number", TENSOR_CORES)
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_every_resident_kernel(cell, number):
    met = set()
    for B, k in itertools.product((5, 17), (None, (2, 2))):
        met |= check_every_plan(Case(cell, 3, B, 2, 40, truncate=k), number, "resident")
    of_one = {(1, 8), (1, 16), (2, 16)}  # tiles of rows, columns
    of_four = {(4, 8), (4, 16), (2, 8), (2, 16)}
    shapes = {"forward": of_four if cell == "lstm" else of_one, "backward": of_one}
    assert met == {(which, *shape) for which, some in shapes.items() for shape in some}


# Units that no block is full of, terms for many steps of a warp; up to 13 blocks.
@pytest.mark.parametrize(("cell", "H"), [("lstm", 40), ("lstm", 104), ("tanh", 72)])
@pytest.mark.parametrize("number", TENSOR_CORES)
def test_every_resident_kernel_of_a_cluster(cell, H, number):
    met = set()
    for B, k in itertools.product((5, 9), (None, (2, 2))):
        case = Case(cell, 3, B, 2, H, truncate=k)
        met |= check_every_plan(case, number, "resident_cluster")
    of_tanh = {(2, 8), (4, 8)}  # tiles of rows, columns
    of_lstm = {"forward": {(4, 8), (8, 8)}, "backward": {(2, 8)}}
    shapes = of_lstm if cell == "lstm" else {"forward": of_tanh, "backward": of_tanh}
    assert met == {(which, *shape) for which, some in shapes.items() for shape in some}


def test_a_resident_kernel_of_many_terms():
    """An LSTM backward has 1,040: nine steps of a warp."""
    met = check_every_plan(Case("lstm", 2, 3, 2, 260), "tf32", "resident")
    assert ("backward", 1, 8) in met


def check_every_plan(case, number, method):
    """Results are the textbook's by each plan of a method: pass, tiles of rows, columns of each."""
    dtype = torch.float32 if number == "tf32" else getattr(torch, number)
    expected, met = by_reference(case, dtype), set()
    n, more = 0, True
    while more:
        layers, more = cuda_ops.Layers(native, method), False

        def plans(described, directions, which, cell, planned, *sizes, n=n):
            nonlocal more
            assert planned == number
            work = (described, which == "backward", cell, planned, *sizes, directions)
            found = native.plans(*work, method)
            if n >= len(found):
                return [native.plan(*work, "cluster")]
            more, about = True, found[n].as_dict()
            rows = 0 if method == "local" else about["row_tiles"]
            met.add((which, rows, about["group_columns"]))
            return [found[n]]

        layers.plans = plans
        torch.backends.cuda.matmul.allow_tf32 = number == "tf32"
        try:
            with emulating():
                results = by_layers(layers, case, dtype)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        if number == "tf32":  # which keeps as many bits of an operand as float16 does
            results = {name: value.half() for name, value in results.items()}
        assert_results(case, results, expected)
        n += 1
    return met


@pytest.mark.parametrize(("method", "dtype"), TURNS, ids=str)
def test_results_do_not_depend_on_the_order_of_threads(method, dtype):
    overlapping = method in ("cluster", "steps")  # the others are not for that
    case = Case("lstm", 4, 5, 2, 24, truncate=(2, 3) if overlapping else (2, 2))
    results = []
    for seed in (1, 2, 3):
        with emulating(seed, **SMALL):
            results.append(run(case, dtype, method))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("method", ["cluster", "resident", "resident_cluster"])
def test_a_thread_that_lags_behind_is_waited_for(method, seed):
    """As where places of numbers are emptied: no peer may fill them before."""
    native.set_laggard(True)
    try:
        check(Case("lstm", 5, 8, 2, 104), torch.bfloat16, method, seed=seed)
    finally:
        native.set_laggard(False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ["local", "grid", "steps"])
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_16_bits_without_tensor_cores(cell, method, dtype):
    check(Case(cell, 4, 9, 3, 40), dtype, method, **SMALL, capability=75, largest_cluster=1)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("cell", ["lstm", "relu"])
def test_tf32_where_torch_allows_it(cell, method):
    case = Case(cell, 4, 9, 3, 40)
    with emulating(**SMALL):
        exact = run(case, torch.float32, "grid" if method in RESIDENT else method)
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            rounded = run(case, torch.float32, method)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    if method != "local":  # which may be faster without tensor cores
        assert not torch.equal(exact["y"], rounded["y"])
    # TF32 keeps as many bits of an operand as float16 does.
    rounded = {name: value.half() for name, value in rounded.items()}
    assert_results(case, rounded, by_reference(case, torch.float32))


@pytest.mark.parametrize("case", [Case("lstm", 2, 3, 2, 4), Case("tanh", 2, 3, 2, 4)], ids=str)
def test_weights_that_are_not_finite_reach_what_they_touch(case):
    """A window begins with nothing, not with zero times the weights."""
    inputs, upstream = case.inputs(torch.float32), case.cotangents(torch.float32)
    layers = cuda_ops.Layers(native)
    inputs["w_hh"][0, 0] = float("nan")
    y = torch.zeros(2, 3, 4)
    wants = (False,) * 4
    if case.cell == "lstm":
        saved = (y, torch.zeros(2, 3, 4), torch.full((2, 3, 4, 4), 0.5))
        states, names = (inputs["h0"], inputs["c0"]), ("y", "h_n", "c_n", "c")
    else:
        saved, states, names = (y,), (inputs["h0"],), ("y", "h_n")
    backward = layers.lstm_layer_backward if case.cell == "lstm" else layers.rnn_layer_backward
    options = () if case.cell == "lstm" else ("tanh",)
    dh0 = backward(
        *map(upstream.get, names),
        *(inputs["x"], *states, inputs["w_ih"], inputs["w_hh"], *saved, *options),
        *(False, 1, 1, *wants),
    )[1]
    assert dh0[:, 0].isnan().all()
    assert dh0[:, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("H", "method", "dtype"),  # rows of whole 16 bytes, and others
    [(24, *turn) for turn in TURNS]
    + [(25, *turn) for turn in TURNS if turn[0] != "resident_cluster"],
    ids=str,
)
def test_a_nan_of_all_bits_is_a_number_that_has_arrived(H, method, dtype):
    """It stands for those that have not, and x, h0 and weights may bring it."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    nan = torch.tensor(-1, dtype=bits).view(dtype)
    inputs = Case("relu", 4, 3, 2, H).inputs(dtype)
    inputs["x"][1, 0] = inputs["h0"][1, 0] = nan
    layers = cuda_ops.Layers(native, method)
    with emulating(**SMALL):
        y, h_n = layers.rnn_layer(
            *map(inputs.get, ("x", "h0", "w_ih", "w_hh")), None, None, "relu", False, 0, 0
        )
    assert y[1:, 0].isnan().all()
    assert y[:, 1].isnan().all()
    assert y[0, 0].isfinite().all()
    assert y[:, 2].isfinite().all()
    assert torch.equal(h_n.isnan(), y[-1].isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("lstm", 5, 3, 4, 9),
        Case("lstm", 1, 2, 0, 17, biases="none"),
        Case("lstm", 6, 9, 2, 20, reverse=True, biases="input", layout="strided"),
        Case("lstm", 7, 2, 3, 5, truncate=(2, 3), biases="hidden"),
        Case("lstm", 0, 3, 2, 4, upstream=("h_n", "c_n")),
    ],
    ids=str,
)
def test_gates_computed_again(case, dtype):
    with emulating(**SMALL):
        assert_results(case, run(case, dtype, keep="cells"), by_reference(case, dtype))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 4), (3, 0, 2, 4)], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_nothing_to_do(cell, sizes):
    case = Case(cell, *sizes, upstream=("h_n", "c_n"))
    with emulating():
        results, want = run(case, torch.float32), by_reference(case, torch.float32)
    for name in results:
        assert torch.equal(results[name], want[name].float()), name


def test_a_launch_that_does_not_fit_is_an_error_that_names_it():
    plan = native.plan(device(), False, "lstm", "float32", 5, 3, 40, 5, 5, 1, "grid")
    with emulating(multiprocessors=1):
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8)
        keep = torch.zeros(160 * 160)
        arrays = [keep.data_ptr()] * 9
        with pytest.raises(
            RuntimeError, match=r"forward \(grid\) of LSTM, T 5, B 3, H 40: too many blocks"
        ):
            native.forward_float32(plan, [False], [arrays], scratch.data_ptr(), 0, 0)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("backward", [False, True])
def test_two_directions_in_one_launch(backward, method):
    """Each has its own weights, states and outputs; results are those of one at a time."""
    T, B, H = 5, 9, 20
    number = "tf32" if method in RESIDENT else "float64"
    dtype = torch.float32 if number == "tf32" else torch.float64
    stored = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)

    def filled(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype) / 2

    shapes = {
        False: [(T, B, 4 * H), (4 * H, H), (B, H), (B, H)],  # a, w_hh, h0, c0
        True: [
            *[(T, B, H), (B, H), (B, H), (T, B, H)],  # dy, dh_n, dc_n, dc
            *[(4 * H, H), (B, H), (T, B, H), (T, B, H), (T, B, 4, H)],  # w_hh, c0, y, c, gates
        ],
    }[backward]
    outputs = {
        False: [(T, B, H), (B, H), (B, H), (T, B, H), (T, B, 4, H)],  # y, h_n, c_n, c, gates
        True: [(T, B, 4 * H), (B, H), (B, H)],  # da, dh0, dc0
    }[backward]
    inputs = [[filled(*shape) for shape in shapes] for _ in range(2)]

    def launch(directions):
        results = [
            [torch.full(shape, torch.nan, dtype=dtype) for shape in outputs] for _ in directions
        ]
        arrays = [[*inputs[d], *results[n]] for n, d in enumerate(directions)]
        plan = native.plan(
            device(**SMALL), backward, "lstm", number, T, B, H, 2, 2, len(directions), method
        )
        scratch = torch.full((plan.scratch_bytes,), 255, dtype=torch.uint8)
        addresses = [[tensor.data_ptr() for tensor in layer] for layer in arrays]
        kernel = getattr(native, f"{'backward' if backward else 'forward'}_{stored}")
        with emulating(**SMALL):
            kernel(plan, [d == 1 for d in directions], addresses, scratch.data_ptr(), 0, 0)
        return results

    both = launch([0, 1])
    for n in range(2):
        for got, want in zip(both[n], launch([n])[0], strict=True):
            assert_close(got, want, K=4 * H, T=T)
