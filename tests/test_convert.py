"""convert() and revert() on real models: everything but the arithmetic's maker stays the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import rnnfast.modules as fast
import torch
from rnnfast.convert import convert, revert
from tolerance import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize

VOCABULARY, WIDTH = 11, 8


class Mixed(nn.Module):
    """Convolution, embedding, LSTM, transformer, and an RNN cell under a hand-written loop."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.lstm = nn.LSTM(WIDTH, WIDTH // 2, 2, bidirectional=True, batch_first=True)
        self.transformer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
        self.rnns = nn.ModuleList([nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)])
        self.cells = nn.ModuleDict(
            {"rnn": nn.RNNCell(WIDTH, WIDTH), "lstm": nn.LSTMCell(WIDTH, WIDTH)}
        )
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2).relu()
        x = self.lstm(x)[0]
        x = self.rnns[0](self.transformer(x))[0]
        x = self.gru(x)[0]
        h, state = None, None
        for step in x.unbind(1):
            h = self.cells["rnn"](step, h)
            state = self.cells["lstm"](h, state)
        return self.decoder(state[0])


SWAPPED = ["lstm", "rnns.0", "cells.rnn", "cells.lstm"]


def make_model():
    torch.manual_seed(0)
    return Mixed()


def tokens():
    return torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    return model(tokens()).log_softmax(-1)[:, 0].sum()


def test_a_mixed_model():
    model, reference = make_model(), make_model()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    assert convert(model) is model
    for name, module in model.named_modules():
        assert module is modules[name]
        assert (type(module).__module__ == fast.__name__) == (name in SWAPPED)
        assert type(module).__name__ == type(reference.get_submodule(name)).__name__
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(reference.state_dict())
    loss, expected = loss_of(model), loss_of(reference)
    loss.backward()
    expected.backward()
    K, T = 4 * WIDTH + 15, 8 * 5  # eight recurrent layers and cells of five steps
    assert_close(loss, expected, K=K, T=T)
    largest = max(p.grad.abs().max().item() for p in reference.parameters())
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(p.grad, q.grad, K=K, T=T, scale=largest, name=name)


def test_the_optimiser_keeps_its_parameters():
    """Two steps of SGD with momentum, converted after the first, equal two steps of torch.nn."""
    models, K, T = (make_model(), make_model()), 4 * WIDTH + 15, 2 * 8 * 5
    for model in models:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            if model is models[0] and step == 1:
                convert(model)
            optimiser.zero_grad()
            loss_of(model).backward()
            optimiser.step()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_close(p, q, K=K, T=T, scale=1.0, name=name)


def test_revert_is_the_inverse():
    model, reference = make_model(), make_model()
    before = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    assert revert(convert(model)) is model
    assert {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()} == before
    assert torch.equal(loss_of(model), loss_of(reference))
    made_by_hand = fast.LSTM(3, 4)
    assert type(revert(made_by_hand)) is nn.LSTM
    assert revert(make_model()).__class__ is Mixed


@pytest.mark.parametrize("cls", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_the_root_itself(cls):
    module = getattr(nn, cls)(3, 4)
    assert convert(module) is module
    assert type(module) is getattr(fast, cls)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(copy.deepcopy(module)) is getattr(fast, cls)
    assert type(revert(module)) is getattr(nn, cls)


def test_converting_twice_and_reverting_torch_change_nothing():
    module = fast.LSTM(3, 4, truncate=5)
    assert convert(module, truncate=7).truncate == 5
    assert type(revert(nn.LSTM(3, 4))) is nn.LSTM


def test_a_module_used_in_two_places_stays_one():
    shared = nn.LSTM(WIDTH, WIDTH)
    model = nn.ModuleList([shared, nn.ModuleList([shared]), nn.LSTM(WIDTH, WIDTH)])
    model[2].weight_hh_l0 = shared.weight_hh_l0
    convert(model)
    assert model[0] is model[1][0] is shared
    assert type(shared) is type(model[2]) is fast.LSTM
    assert model[2].weight_hh_l0 is shared.weight_hh_l0
    model[2](torch.randn(3, 2, WIDTH))[0].sum().backward()
    assert shared.weight_hh_l0.grad.abs().max() > 0


def test_hooks_buffers_and_modes_survive():
    module = nn.LSTM(3, 4, 2, dropout=0.5).eval()
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_forward_hook(lambda m, args, out: calls.append("after"))
    module.weight_hh_l0.register_hook(lambda g: calls.append("weight"))
    module.register_buffer("steps", torch.tensor(3))
    module.note = "mine"
    convert(module)
    module(torch.randn(2, 1, 3))[0].sum().backward()
    assert calls == ["before", "after", "weight"]
    assert not module.training
    assert module.steps == 3
    assert module.note == "mine"
    assert module.dropout == 0.5


def test_user_classes_are_left_alone():
    class Plain(nn.LSTM):
        pass

    class Own(nn.RNN):
        def forward(self, input, hx=None):
            return "mine"

    model = nn.ModuleList([Plain(3, 4), Own(3, 4), nn.LSTM(3, 4)])
    convert(model)
    assert [type(m) for m in model] == [Plain, Own, fast.LSTM]
    revert(model)
    assert [type(m) for m in model] == [Plain, Own, nn.LSTM]


def test_parametrized_modules():
    x, module = torch.randn(4, 2, 3), nn.LSTM(3, 4)
    parametrizations.weight_norm(module, "weight_hh_l0")
    copied = copy.deepcopy(module)  # shares the class that parametrize made
    want = module(x)[0]
    convert(module)
    assert isinstance(module, fast.LSTM)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    y = module(x)[0]
    assert_close(y, want, K=7, T=4)
    y.sum().backward()
    assert module.parametrizations.weight_hh_l0.original0.grad.abs().max() > 0
    assert not isinstance(copied, fast.LSTM)
    revert(module)
    assert not isinstance(module, fast.LSTM)
    assert torch.equal(module(x)[0], want)
    parametrize.remove_parametrizations(convert(module), "weight_hh_l0")
    assert type(module) is fast.LSTM


def test_truncate_is_set_on_sequences():
    model = convert(make_model(), truncate=3)
    assert model.lstm.truncate == model.rnns[0].truncate == 3
    assert not hasattr(model.cells["rnn"], "truncate")
    assert "truncate=3" in repr(model)
    with pytest.warns(UserWarning, match="can't truncate"):
        revert(model)
    assert "truncate" not in repr(model)
    assert "truncate" not in model.lstm.__dict__


@pytest.mark.parametrize(
    ("truncate", "error"), [(0, ValueError), ("3", TypeError), ((2, 4), ValueError)]
)
def test_a_bad_truncate_changes_nothing(truncate, error):
    """(2, 4) has no meaning for the bidirectional stack in the model, though it has for the RNN."""
    model = make_model()
    with pytest.raises(error, match="truncate"):
        convert(model, truncate=truncate)
    assert all(type(m).__module__ != fast.__name__ for m in model.modules())
