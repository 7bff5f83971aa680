"""ReferenceRNN and ReferenceLSTM stand in for torch.nn's modules, result for result."""

import copy
import pickle

import pytest
import torch
from rnnfast.reference_modules import ReferenceLSTM, ReferenceRNN
from tolerance import assert_close

T, B, INPUTS, HIDDEN = 6, 3, 4, 5
PAIRS = [(ReferenceLSTM, torch.nn.LSTM), (ReferenceRNN, torch.nn.RNN)]
OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "dropout": 1.0, "bidirectional": True},
    {"num_layers": 3, "dropout": 0.4, "bidirectional": True, "batch_first": True},
]
CASES = [
    *((pair, options) for pair in PAIRS for options in OPTIONS),
    (PAIRS[1], {"nonlinearity": "relu", "num_layers": 2, "dropout": 0.2}),
    (PAIRS[0], {"proj_size": 3, "num_layers": 2, "dropout": 0.2, "bidirectional": True}),
]


def build(cls, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return cls(INPUTS, HIDDEN, dtype=dtype, **options)


def states(result):
    """y and the final states in one list."""
    y, h = result
    return [y, *h] if isinstance(h, tuple) else [y, h]


def run(module, x, hx=None):
    """Outputs, and gradients of x, hx and the parameters; seeded, so dropout is the same."""
    x = x.clone().requires_grad_()
    leaves = [x, *module.parameters()]
    if hx is not None:
        hx = tuple(s.clone().requires_grad_() for s in hx)
        leaves += hx
        hx = hx if isinstance(module, torch.nn.LSTM) else hx[0]
    torch.manual_seed(3)
    outputs = states(module(x, hx))
    loss = sum(o.sin().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_same(actual, expected, layers):
    K = T * B + 4 * HIDDEN
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, K=K, T=T * layers)
        assert a.dtype == e.dtype


def initial(module, rows):
    """Random initial states, (L*D, rows, .) or without the rows."""
    shape = (module.num_layers * (2 if module.bidirectional else 1), *rows)
    sizes = [module.proj_size or HIDDEN]
    sizes += [HIDDEN] * isinstance(module, torch.nn.LSTM)
    dtype = next(module.parameters()).dtype
    return [torch.randn(*shape, size, dtype=dtype) for size in sizes]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("pair", "options"), CASES, ids=[f"{p[1].__name__}-{o}" for p, o in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_matches_torch_nn(pair, options, dtype, training):
    """Same seed, so the same initial weights and the same dropout masks."""
    ours, theirs = (build(cls, dtype, **options).train(training) for cls in pair)
    size = (B, T, INPUTS) if ours.batch_first else (T, B, INPUTS)
    layers = ours.num_layers
    x = torch.randn(size, dtype=dtype)
    assert_same(run(ours, x), run(theirs, x), layers)
    hx = initial(ours, (B,))
    assert_same(run(ours, x, hx), run(theirs, x, hx), layers)
    x, hx = torch.randn(T, INPUTS, dtype=dtype), initial(ours, ())
    assert_same(run(ours, x), run(theirs, x), layers)
    assert_same(run(ours, x, hx), run(theirs, x, hx), layers)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_no_rows_and_strided_input(ours, theirs):
    ours, theirs = build(ours, num_layers=2), build(theirs, num_layers=2)
    for x in (torch.zeros(T, 0, INPUTS), torch.randn(INPUTS, B, T).permute(2, 1, 0)[:, ::2]):
        x = x.double()
        assert_same(run(ours, x), run(theirs, x), 2)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_truncate_is_detaching(ours, theirs, batch_first):
    """truncate=k trains like torch.nn on chunks of k steps with the state detached in between."""
    ours = build(ours, truncate=4, num_layers=2, batch_first=batch_first)
    theirs = build(theirs, num_layers=2, batch_first=batch_first)
    x = torch.randn((B, T, INPUTS) if batch_first else (T, B, INPUTS)).double()
    ours(x)[0].sin().sum().backward()
    state = None
    for chunk in x.split(4, dim=1 if batch_first else 0):
        y, state = theirs(chunk, state)
        y.sin().sum().backward()
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    grads = [[p.grad for p in m.parameters()] for m in (ours, theirs)]
    assert_same(*grads, 2)
    full = build(type(theirs), num_layers=2, batch_first=batch_first)
    full(x)[0].sin().sum().backward()
    assert (ours.weight_hh_l0.grad - full.weight_hh_l0.grad).abs().max() > 1e-3


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_wide_windows_reach_the_backward_pass(ours, theirs):
    x = torch.randn(T, B, INPUTS).double()
    narrow, wide, whole = (run(build(ours, truncate=(1, k2)), x)[-1] for k2 in (1, 2, T))
    assert (narrow - wide).abs().max() > 1e-6
    assert (wide - whole).abs().max() > 1e-6
    assert_close(whole, run(build(theirs), x)[-1], K=T * B + 4 * HIDDEN, T=T)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_is_torchs_module(ours, theirs):
    ours = build(ours, num_layers=2, truncate=(2, 3))
    theirs = build(theirs, num_layers=2)
    assert isinstance(ours, type(theirs))
    assert repr(ours).endswith("(4, 5, num_layers=2, truncate=(2, 3))")
    assert repr(build(type(ours))).endswith("(4, 5)")
    torch.manual_seed(9)
    theirs.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, INPUTS).double()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.truncate == (2, 3)
        for a, b in zip(states(twin(x)), states(ours(x)), strict=True):
            assert torch.equal(a, b)


def test_gradients_can_be_clipped_in_place():
    module = build(ReferenceLSTM)
    module(torch.randn(T, B, INPUTS).double())[0].sum().backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-2)  # clip_grad_norm_ adds 1e-6 to the norm


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_stale_graphs_raise(ours, theirs):
    module, x = build(ours), torch.randn(T, B, INPUTS).double()
    loss = module(x)[0].sum()
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = module(x)[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = module(x)[0].sum()
    with pytest.raises(RuntimeError, match="create_graph is True, expected False"):
        torch.autograd.grad(loss, [module.weight_hh_l0], create_graph=True)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_mistakes_raise_what_torch_raises(ours, theirs):
    ours, theirs = build(ours, num_layers=2), build(theirs, num_layers=2)
    lstm = isinstance(theirs, torch.nn.LSTM)

    def h(*shape):
        state = torch.zeros(shape).double()
        return (state, state) if lstm else state

    x = torch.zeros(T, B, INPUTS).double()
    wrong = [
        ("0 time steps", torch.zeros(0, B, INPUTS).double()),
        ("input has 1 dimensions", torch.zeros(INPUTS).double()),
        ("Expected 4, got 3", x[..., 1:]),
        ("dtype", x.float()),
        (r"Expected hidden.* size \(2, 3, 5\), got \[2, 4, 5\]", x, h(2, B + 1, HIDDEN)),
        ("hx has 2 dimensions, expected 3", x, h(2, HIDDEN)),
        ("hx has 3 dimensions, expected 2", x[:, 0], h(2, 1, HIDDEN)),
    ]
    for message, *arguments in wrong:
        with pytest.raises((RuntimeError, ValueError), match=r"\w") as expected:
            theirs(*arguments)
        with pytest.raises(expected.type, match=message):
            ours(*arguments)


def test_mistakes_of_our_own_are_named():
    module = build(ReferenceLSTM)
    x = torch.zeros(T, B, INPUTS).double()
    with pytest.raises(TypeError, match="input is a PackedSequence"):
        module(torch.nn.utils.rnn.pack_padded_sequence(x, [T] * B))
    with pytest.raises(RuntimeError, match=r"hx must be a pair"):
        module(x, torch.zeros(1, B, HIDDEN).double())
    with pytest.raises(RuntimeError, match=r"torch\.float32, input has torch\.float64"):
        module(x, (torch.zeros(1, B, HIDDEN), torch.zeros(1, B, HIDDEN)))
    with pytest.raises(RuntimeError, match=r"torch\.bfloat16 on cpu"):
        module.bfloat16()(x.bfloat16())
    with pytest.raises(RuntimeError, match="on meta"):
        build(ReferenceLSTM, device="meta")(x.to("meta"))
    with pytest.raises(ValueError, match="expected k1 = k2 for 2 bidirectional layers"):
        ReferenceLSTM(2, 2, 2, bidirectional=True, truncate=(1, 2))
    with pytest.raises(ValueError, match="truncate"):
        ReferenceRNN(2, 2, truncate=0)
    with pytest.raises(TypeError, match="truncate"):
        ReferenceRNN(2, 2, truncate="full")
