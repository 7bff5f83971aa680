"""The modules give what torch.nn's give, and are made, printed, copied and saved as torch.nn's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from against_torch import assert_agree, tensors
from rnnfast.modules import LSTM, RNN, LSTMCell, RNNCell
from tolerance import STORED_FORWARD, assert_close
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

TWINS = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
}
INFOS = [info for info in module_db if info.module_cls in TWINS]
SEQUENCES = [(torch.nn.RNN, RNN), (torch.nn.LSTM, LSTM)]
ALL = list(TWINS.items())


def info_id(info):
    return info.module_cls.__name__


def twin_id(value):
    return getattr(value, "__name__", None)


def pair(theirs, ours, *args, **kwargs):
    """(ours, theirs), made under the same seed, so with the same weights."""
    torch.manual_seed(0)
    reference = theirs(*args, **kwargs)
    torch.manual_seed(0)
    return ours(*args, **kwargs), reference


def state(cls, *shape, dtype=None):
    if cls in (torch.nn.LSTM, torch.nn.LSTMCell):
        return (torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))
    return torch.randn(shape, dtype=dtype)


def test_every_torch_module_info_is_found():
    assert {info.module_cls for info in INFOS} == set(TWINS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("info", INFOS, ids=info_id)
def test_module_info_inputs(info, dtype, training):
    samples = info.module_inputs_func(
        info,
        device="cpu",
        dtype=dtype,
        requires_grad=False,
        training=training,
        with_packed_sequence=True,
    )
    assert len(samples) >= 2
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        ours, theirs = pair(
            info.module_cls, TWINS[info.module_cls], *args, dtype=dtype, device="cpu", **kwargs
        )
        assert not sample.forward_input.kwargs
        assert_agree(ours.train(training), theirs.train(training), *sample.forward_input.args)


@pytest.mark.parametrize("info", INFOS, ids=info_id)
def test_module_info_errors_have_torch_types(info):
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert len(samples) >= 4
    for sample in samples:
        cls = TWINS[info.module_cls]
        constructor = sample.module_error_input.constructor_input
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type):
                cls(*constructor.args, **constructor.kwargs)
        else:
            module = cls(*constructor.args, **constructor.kwargs)
            forward = sample.module_error_input.forward_input
            with pytest.raises(sample.error_type, match=f"^{cls.__name__}: ") as caught:
                module(*forward.args, **forward.kwargs)
            assert type(caught.value) is sample.error_type
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES, ids=twin_id)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (2, 3), (17, 2)])
def test_sequences_against_torch(theirs, ours, batch_first, bidirectional, bias, T, B):
    a, b = pair(
        theirs,
        ours,
        3,
        5,
        num_layers=2,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
    )
    x = torch.randn(*((B, T) if batch_first else (T, B)), 3)
    assert_agree(a, b, x)
    assert_agree(a, b, x, state(theirs, 2 * (1 + bidirectional), B, 5))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearity_positional_and_by_name(nonlinearity):
    x = torch.randn(5, 2, 3)
    assert_agree(*pair(torch.nn.RNN, RNN, 3, 4, 1, nonlinearity), x)
    assert_agree(*pair(torch.nn.RNN, RNN, 3, 4, nonlinearity=nonlinearity), x)
    assert_agree(*pair(torch.nn.RNNCell, RNNCell, 3, 4, True, nonlinearity), x[0])


@pytest.mark.parametrize(("theirs", "ours"), ALL, ids=twin_id)
def test_empty_batch(theirs, ours):
    cell = theirs in (torch.nn.RNNCell, torch.nn.LSTMCell)
    x = torch.empty(0, 3) if cell else torch.empty(4, 0, 3)
    assert_agree(*pair(theirs, ours, 3, 5), x)
    assert_agree(*pair(theirs, ours, 3, 5), x, state(theirs, *((0, 5) if cell else (1, 0, 5))))


@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES, ids=twin_id)
def test_empty_sequence_is_an_error_as_in_torch(theirs, ours):
    for x in (torch.empty(0, 2, 3), torch.empty(0, 3)):
        for module in pair(theirs, ours, 3, 5):
            with pytest.raises(RuntimeError):
                module(x)


@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES, ids=twin_id)
def test_non_contiguous_everything(theirs, ours):
    a, b = pair(theirs, ours, 3, 4, 2, bidirectional=True)
    for module in (a, b):
        for name, weight in list(module.named_parameters()):
            strided = torch.stack((weight, weight), -1)[..., 1].detach()
            assert not strided.is_contiguous()
            setattr(module, name, torch.nn.Parameter(strided))
    x = torch.randn(3, 2, 7).permute(2, 1, 0)
    hx = torch.randn(6, 4, 5)[:, :, 1:].permute(1, 0, 2)[:, ::3]
    assert not x.is_contiguous()
    assert not hx.is_contiguous()
    assert_agree(a, b, x, (hx, hx * 2) if theirs is torch.nn.LSTM else hx)
    assert_agree(a, b, x.flip(0)[1:, :, :])
    expanded = torch.randn(4, 1, 4).expand(4, 2, 4)
    assert_agree(a, b, x, (expanded, expanded) if theirs is torch.nn.LSTM else expanded)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES, ids=twin_id)
def test_dropout_is_torch_dropout_under_the_same_seed(theirs, ours, batch_first):
    a, b = pair(theirs, ours, 3, 6, num_layers=3, dropout=0.5, batch_first=batch_first)
    x = torch.randn(5, 4, 3)
    assert_agree(a, b, x, seed=3)
    assert not torch.equal(a(x)[0], a(x)[0])
    assert_agree(a.eval(), b.eval(), x)
    assert torch.equal(a(x)[0], a(x)[0])


def test_dropout_statistics():
    """With identity-like layers the share of zeros and the mean tell p, within 5 deviations."""
    p, n = 0.3, 40_000
    rnn = RNN(1, 1, num_layers=2, nonlinearity="relu", bias=False, dropout=p)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            weight.fill_(0.0 if "hh" in name else 1.0)
    torch.manual_seed(0)
    y = rnn(torch.ones(1, n, 1))[0]
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs((y == 0).double().mean() - p) < 5 * deviation
    assert abs(y.double().mean() - 1) < 5 * deviation / (1 - p)


@pytest.mark.parametrize(("theirs", "ours"), ALL, ids=twin_id)
def test_same_seed_same_weights_and_state_dict_both_ways(theirs, ours):
    a, b = pair(theirs, ours, 3, 5)
    assert list(a.state_dict()) == list(b.state_dict())
    for got, want in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(got, want)
    other = theirs(3, 5)
    other.load_state_dict(a.state_dict())
    b.load_state_dict(ours(3, 5).state_dict())
    a.load_state_dict(other.state_dict())
    for got, want in zip(a.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, want)
    torch.manual_seed(7)
    a.reset_parameters()
    torch.manual_seed(7)
    b.reset_parameters()
    for got, want in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("theirs", "ours"), ALL, ids=twin_id)
def test_copies_and_pickles_compute_the_same(theirs, ours):
    module = ours(3, 5, **({"truncate": (2, 3)} if issubclass(ours, torch.nn.RNNBase) else {}))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = torch.randn(4, 3) if ours in (RNNCell, LSTMCell) else torch.randn(4, 2, 3)
    for copied in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is ours
        assert repr(copied) == repr(module)
        for got, want in zip(tensors(copied(x)), tensors(module(x)), strict=True):
            assert torch.equal(got, want)
        for p, q in zip(copied.parameters(), module.parameters(), strict=True):
            assert p.data_ptr() != q.data_ptr()


def test_repr():
    assert repr(LSTM(3, 5, 2, batch_first=True)) == repr(torch.nn.LSTM(3, 5, 2, batch_first=True))
    assert repr(LSTM(3, 5, truncate=7)) == "LSTM(3, 5, truncate=7)"
    assert repr(RNN(3, 5, bias=False, truncate=[7, 9])) == "RNN(3, 5, bias=False, truncate=(7, 9))"
    assert repr(RNNCell(3, 5, nonlinearity="relu")) == "RNNCell(3, 5, nonlinearity=relu)"
    assert repr(LSTMCell(3, 5)) == "LSTMCell(3, 5)"


@pytest.mark.parametrize(
    ("truncate", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        ((5, 4), ValueError),
        ((0, 4), ValueError),
        ((1, 2, 3), ValueError),
        ((), ValueError),
        ("35", TypeError),
        (3.0, TypeError),
        (True, TypeError),
        ((3, None), TypeError),
    ],
)
@pytest.mark.parametrize("cls", [RNN, LSTM])
def test_bad_truncate(cls, truncate, error):
    with pytest.raises(error, match="truncate"):
        cls(3, 5, truncate=truncate)
    module = cls(3, 5)
    module.truncate = truncate
    with pytest.raises(error, match="truncate"):
        module(torch.zeros(4, 2, 3))


@pytest.mark.parametrize("cls", [RNN, LSTM])
def test_truncate_without_a_window_in_a_bidirectional_stack(cls):
    for good in (4, (4, 4), None):
        cls(3, 5, num_layers=2, bidirectional=True, truncate=good)
    cls(3, 5, num_layers=1, bidirectional=True, truncate=(4, 6))
    with pytest.raises(ValueError, match="bidirectional"):
        cls(3, 5, num_layers=2, bidirectional=True, truncate=(4, 6))
    module = cls(3, 5, num_layers=2, bidirectional=True)
    module.truncate = (4, 6)
    with pytest.raises(ValueError, match="bidirectional"), torch.no_grad():
        module(torch.zeros(4, 2, 3))


@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES, ids=twin_id)
def test_half_and_double_conversions(theirs, ours):
    a, b = pair(theirs, ours, 3, 5, 2)
    assert_agree(a.double(), b.double(), torch.randn(4, 2, 3, dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(4, 2, 3)
        rounded = a.to(dtype).float()
        want = rounded(x.to(dtype).float())[0]
        y = a.to(dtype)(x.to(dtype))[0]
        assert y.dtype == dtype
        if dtype == torch.float16:
            assert torch.equal(y, want.to(dtype))
        else:
            assert_close(y, want, K=8, T=8, stored=STORED_FORWARD)


@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES, ids=twin_id)
def test_weights_may_be_parametrized_or_replaced(theirs, ours):
    a, b = pair(theirs, ours, 3, 5)
    x = torch.randn(4, 2, 3)
    for module in (a, b):
        parametrizations.weight_norm(module, "weight_hh_l0")
    assert_agree(a, b, x)
    replaced = {name: p * 0.5 for name, p in theirs(3, 5).named_parameters()}
    a, b = pair(theirs, ours, 3, 5)
    got, want = (torch.func.functional_call(m, replaced, (x,))[0] for m in (a, b))
    assert_close(got, want, K=8, T=4)


def test_flatten_parameters_moves_nothing():
    module = LSTM(3, 5)
    before = [p.data_ptr() for p in module.parameters()]
    assert module.flatten_parameters() is None
    assert [p.data_ptr() for p in module.parameters()] == before


def test_packed_input_gives_packed_output():
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    y, _ = LSTM(2, 4)(packed)
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)
