"""The CUDA kernels on a GPU: against the textbook and cuDNN, in graphs and on streams.

Needs a GPU and a build with CUDA; `benchmarks/gpu_check.sh` runs it. Everywhere else the same
kernels are tested on the emulator, tests/test_cuda.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from by_layers import by_layers
from one_layer import Case, assert_results, by_reference
from rnnfast import LSTM, RNN, _native, cuda_direct, cuda_ops, direct, functional
from torch.nn.utils.rnn import pack_sequence

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.cuda is None, reason="needs a GPU and CUDA kernels"
)

METHODS = ["local", "cluster", "grid", "resident", "resident_cluster", "steps", "gemm"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CASES = [
    Case("lstm", 5, 3, 4, 40),
    Case("tanh", 20, 9, 3, 65, reverse=True),
    Case("relu", 7, 35, 1, 33, truncate=(2, 2)),
    Case("lstm", 11, 2, 3, 20, truncate=(2, 5), reverse=True),
    Case("lstm", 6, 17, 8, 128),
    Case("lstm", 4, 16, 8, 384),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_method(case, method, dtype):
    layers = cuda_ops.Layers(_native.cuda, method)
    try:
        results = by_layers(layers, case, dtype, "cuda")
    except ValueError as error:
        # The planner refuses, before any launch, what this method cannot run.
        assert f"the method {method} cannot run this problem" in str(error)  # noqa: PT017
        assert method != "steps"
        return
    assert_results(case, results, by_reference(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_planner_s_choice_gives_the_same_every_time(dtype):
    layers, case = cuda_ops.Layers(_native.cuda), Case("lstm", 64, 16, 32, 512)
    first = by_layers(layers, case, dtype, "cuda")
    assert_results(case, first, by_reference(case, dtype))
    for _ in range(5):
        for name, value in by_layers(layers, case, dtype, "cuda").items():
            assert torch.equal(value, first[name]), name


def error_of(module, x, exact):
    y = module(x)[0]
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.fixture
def allow_tf32(request):
    """TF32 for both libraries, or for none."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = request.param
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.mark.usefixtures("allow_tf32")
@pytest.mark.parametrize(
    ("dtype", "allow_tf32"),
    [
        *((dtype, False) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        (torch.float32, True),
    ],
    indirect=["allow_tf32"],
    ids=["float32", "float16", "bfloat16", "tf32"],
)
@pytest.mark.parametrize(("H", "B"), [(64, 3), (256, 16), (768, 16)])
def test_error_no_larger_than_cudnn_s(H, B, dtype):
    """Over 1024 steps, against the same weights in float64, which cuDNN computes."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(H, H, device="cuda", dtype=dtype)
    ours = LSTM(H, H, device="cuda", dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = torch.nn.LSTM(H, H, device="cuda", dtype=torch.float64)
    exact.load_state_dict({name: v.double() for name, v in theirs.state_dict().items()})
    x = torch.randn(1024, B, H, device="cuda", dtype=dtype)
    with torch.no_grad():
        want = exact(x.double())[0]
        assert error_of(ours, x, want) <= 1.1 * error_of(theirs, x, want)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, torch.nn.LSTM), (RNN, torch.nn.RNN)])
def test_modules_train_as_torch_s(ours, theirs, layers, bidirectional):
    torch.manual_seed(0)
    options = {"num_layers": layers, "bidirectional": bidirectional, "dtype": torch.float64}
    want, got = (cls(7, 33, **options).cuda() for cls in (theirs, ours))
    got.load_state_dict(want.state_dict())
    x = torch.randn(19, 5, 7, dtype=torch.float64, device="cuda")
    for module in (want, got):
        module(x)[0].square().sum().backward()
    torch.testing.assert_close(got(x)[0], want(x)[0])
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("H", [33, 700])
@pytest.mark.parametrize("truncate", [None, 4, (4, 7)], ids=str)
@pytest.mark.parametrize("cls", [LSTM, RNN])
def test_directions_side_by_side_are_those_one_after_the_other(cls, truncate, H, monkeypatch):
    module = cls(7, H, bidirectional=True, truncate=truncate, device="cuda", dtype=torch.float64)
    x = torch.randn(13, 5, 7, device="cuda", dtype=torch.float64, requires_grad=True)

    def results():
        y, _ = module(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    together = results()
    monkeypatch.setattr(functional, "_IN_ONE_LAUNCH", {})
    torch.testing.assert_close(together, results())


@pytest.mark.parametrize("truncate", [None, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cls", [LSTM, RNN])
def test_packed_sequences(cls, bidirectional, truncate):
    options = {"num_layers": 2, "bidirectional": bidirectional, "truncate": truncate}
    module = cls(7, 33, **options, dtype=torch.float64)
    sequences = [torch.randn(n, 7, dtype=torch.float64) for n in (3, 40, 1, 12, 40)]

    def results(device):
        module.to(device)
        y, state = module(pack_sequence([s.to(device) for s in sequences], enforce_sorted=False))
        state = state if cls is LSTM else (state,)
        loss = sum(values.sin().sum() for values in (y.data, *state))
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        return [values.cpu() for values in (y.data, *state, *gradients)]

    torch.testing.assert_close(results("cuda"), results("cpu"))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_under_autocast(bidirectional):
    module = LSTM(7, 33, bidirectional=bidirectional, device="cuda")
    x = torch.randn(13, 5, 7, device="cuda")
    want = module(x)[0]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = module(x)[0]
        assert torch.equal(y, want)
        y.sum().backward()


def test_more_steps_than_16_bits_count():
    torch.manual_seed(0)
    module = LSTM(3, 8, device="cuda", dtype=torch.float64)
    x = torch.randn(70_000, 1, 3, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        y, _ = module(x)
        head, middle = module(x[:69_000])
        tail, _ = module(x[69_000:], middle)
    torch.testing.assert_close(y, torch.cat((head, tail)))


@pytest.mark.parametrize("H", [32, 256])
def test_in_a_graph_and_on_another_stream(H):
    module = LSTM(16, H, device="cuda")
    x = torch.randn(12, 4, 16, device="cuda")
    with torch.no_grad():
        want = module(x)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = module(x)[0]
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(other, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)[0]
        for scale in (1.0, 2.0):
            x.copy_(torch.randn_like(x) * scale)
            graph.replay()
            assert torch.equal(y, module(x)[0])


@pytest.mark.parametrize("backward", [False, True])
def test_zeros_that_a_graph_begins_with_are_its_own(backward):
    """Nothing that a capture writes may be kept for other calls, which come before it is run."""
    module = LSTM(16, 72, device="cuda", dtype=torch.bfloat16).requires_grad_(backward)
    x, other = (torch.randn(12, 4, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    parameters = list(module.parameters())

    def run(x):
        y = module(x)[0]
        return [y, *torch.autograd.grad(y.sum(), parameters)] if backward else [y]

    run(x[:, :3])  # other sizes: only what torch makes once is there before the capture
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        captured = run(x)
    want = run(other)
    torch.cuda.synchronize()
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, captured, run(x)))
    assert all(map(torch.equal, want, run(other)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2}, {"bidirectional": True}, {"truncate": 4}, {"batch_first": True}],
    ids=str,
)
@pytest.mark.parametrize("cls", [LSTM, RNN])
def test_the_short_way_gives_the_operators_bits(cls, options, dtype, monkeypatch):
    module = cls(7, 33, **options, device="cuda", dtype=dtype)
    x = torch.randn(13, 5, 7, device="cuda", dtype=dtype, requires_grad=True)

    def results():
        y, _ = module(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    short = results()
    for way in (direct, cuda_direct):
        monkeypatch.setattr(way, "_watched", lambda: True)
    assert all(map(torch.equal, short, results()))


def test_nothing_waits_for_the_device():
    module = LSTM(16, 64, device="cuda")
    x = torch.randn(12, 4, 16, device="cuda")
    module(x)[0].sum().backward()  # what happens once has happened
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mixed_devices_and_layouts():
    module = LSTM(5, 7, device="cuda")
    with pytest.raises(RuntimeError, match="device cpu"):
        module(torch.randn(3, 2, 5))
    x = torch.randn(5, 2, 3, device="cuda").permute(2, 1, 0)
    torch.testing.assert_close(module(x)[0], module(x.contiguous())[0])


@pytest.mark.usefixtures("reading")
def test_the_core_reads_a_gpu_s_tensors():
    core, x = _native.core, torch.ones(2, 3, device="cuda")
    call = (x.shape, x.shape), x.dtype, x.device
    assert core.are_plain((x, torch.nn.Parameter(x)), *call)
    others = [x.cpu(), x.cpu().pin_memory(), x.half(), x[:1], x.to_sparse(), torch._neg_view(x)]
    for other in others:
        assert not core.are_plain((x, other), *call)
        assert not core.are_plain((other, x), *call)
    for device in ("cpu", "cuda", f"cuda:{x.device.index + 1}"):
        assert not core.are_plain((x, x), *call[:2], torch.device(device))


def test_out_of_memory_is_torch_s_error():
    module = LSTM(8, 512, device="cuda")
    free = torch.cuda.mem_get_info()[0]
    steps = free // (4 * 4 * 512) + 1  # more pre-activations than fit
    x = torch.zeros(1, 1, 8, device="cuda").expand(steps, 1, 8)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        module(x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    for dtype, H in itertools.product((torch.float32, torch.bfloat16), (32, 256)):
        module = LSTM(16, H, device="cuda:0", dtype=dtype)
        x = torch.randn(12, 4, 16, device="cuda:0", dtype=dtype)
        want = module(x)[0].to("cuda:1")
        assert torch.equal(module.to("cuda:1")(x.to("cuda:1"))[0], want)
        pair = (x, x.to("cuda:1")), (x.shape, x.shape), dtype
        assert not any(_native.core.are_plain(*pair, t.device) for t in pair[0])
