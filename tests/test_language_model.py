"""The language model against torch.nn's, and what sampling from it means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rnnfast.models import LanguageModel, generate, next_token_probabilities
from rnnfast.text import Split
from rnnfast.training import evaluate
from rnnfast.training.loop import train_step
from tolerance import assert_close, tolerance
from torch import nn
from torch.nn import functional as F

V = 19
KINDS = [
    {"cell": "lstm"},
    {"cell": "rnn", "nonlinearity": "tanh"},
    {"cell": "rnn", "nonlinearity": "relu"},
]


def kind_id(kind):
    return "-".join(kind.values())


class Textbook(nn.Module):
    """The same model written out with torch.nn's modules, sharing nothing with LanguageModel."""

    def __init__(self, vocabulary_size, size, cell, nonlinearity="tanh"):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, size)
        if cell == "lstm":
            self.recurrent = nn.LSTM(size, size, 2)
        else:
            self.recurrent = nn.RNN(size, size, 2, nonlinearity=nonlinearity)
        self.decoder = nn.Linear(size, vocabulary_size)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens, state):
        hidden, state = self.recurrent(self.embedding(tokens), state)
        return self.decoder(hidden), state


def textbook_losses(model, chunks, lr, clip):
    """Losses of training steps, the loop written out."""
    losses, state = [], None
    for inputs, targets in chunks:
        logits, state = model(inputs, state)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        factor = min(1.0, clip / (norm + 1e-6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * factor * parameter.grad
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["rnnfast", "reference"])
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_ten_training_losses_equal_those_of_torch_nn(kind, backend, dtype):
    H, T, B, steps, lr, clip = 24, 7, 5, 10, 0.3, 0.55
    torch.manual_seed(3)
    model = LanguageModel(
        V, emsize=H, nhid=H, nlayers=2, tied=True, backend=backend, dtype=dtype, **kind
    )
    textbook = Textbook(V, H, **kind).to(dtype)
    textbook.load_state_dict(model.state_dict())
    # Skewed, so that there is something to learn at once.
    text = torch.randint(V, (steps * T + 1, B)) ** 3 // V**2
    chunks = [(text[t : t + T], text[t + 1 : t + T + 1]) for t in range(0, steps * T, T)]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses, norms, state = [], [], None
    for inputs, targets in chunks:
        loss, norm, state = train_step(model, optimizer, inputs, targets, state, clip=clip)
        losses.append(loss)
        norms.append(norm)
    expected = textbook_losses(textbook, chunks, lr, clip)
    # Errors of a gradient (sums of T*B terms) are handed on through T*steps steps of recurrence.
    assert_close(losses, expected, K=T * B * H, T=T * steps, dtype=dtype, name="losses")
    # The comparison means something only if training moved, and clipping both did and didn't act.
    assert expected[0] - expected[-1] > 0.1
    assert min(norms) < clip < max(norms)


def test_a_model_trained_with_one_backend_runs_with_the_others():
    torch.manual_seed(0)
    models = [
        LanguageModel(V, nhid=8, emsize=8, nlayers=2, backend=backend)
        for backend in ("torch", "rnnfast", "reference")
    ]
    tokens = torch.randint(V, (6, 3))
    expected, _ = models[0](tokens)
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        assert_close(model(tokens)[0], expected, K=16, T=6)


def test_less_memory_changes_no_bit_of_the_training():
    losses = []
    for memory in ("normal", "low"):
        torch.manual_seed(0)
        model = LanguageModel(V, nhid=8, emsize=8, nlayers=2, memory=memory)
        assert model.recurrent.memory == memory
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens, state = torch.randint(V, (6, 3)), None
        for _ in range(3):
            loss, _, state = train_step(model, optimizer, tokens, tokens, state, clip=1.0)
            losses.append(loss)
    assert losses[:3] == losses[3:]
    # Who else computes the layers has one way only.
    LanguageModel(V, nhid=8, backend="torch", memory="low")
    LanguageModel(V, nhid=8, cell="rnn", memory="low")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "least"}, "memory must be 'normal' or 'low', got 'least'"),
        ({"bidirectional": True}, "bidirectional makes no sense .* tokens that are to be predict"),
        ({"tied": True, "emsize": 8, "nhid": 9}, "emsize is 8 and nhid is 9"),
        ({"nlayers": 0}, "nlayers is 0; it must be at least 1"),
        ({"nhid": -1}, "nhid is -1"),
        ({"cell": "gru"}, "cell is 'gru'; it must be one of lstm, rnn"),
        ({"backend": "cudnn"}, "backend is 'cudnn'; it must be one of rnnfast, torch, reference"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(V, **options)


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_chunks_with_the_state_carried_give_what_the_whole_text_gives(kind):
    torch.manual_seed(0)
    model = LanguageModel(V, emsize=6, nhid=10, nlayers=2, dtype=torch.float64, **kind)
    tokens = torch.randint(V, (11, 2))
    whole, last_state = model(tokens)
    parts, state = [], None
    for chunk in tokens.split([3, 1, 5, 2]):
        logits, state = model(chunk, state)
        parts.append(logits)
    assert_close(torch.cat(parts), whole, K=16, T=11)
    for got, expected in zip(torch.cat(list(state)), torch.cat(list(last_state)), strict=True):
        assert_close(got, expected, K=16, T=11)


def test_a_prediction_sees_no_later_token():
    torch.manual_seed(0)
    model = LanguageModel(V, emsize=6, nhid=6)
    tokens = torch.randint(V - 1, (9, 2))
    changed = tokens.clone()
    changed[5:] += 1
    logits, changed_logits = model(tokens)[0], model(changed)[0]
    assert torch.equal(logits[:5], changed_logits[:5])
    assert not torch.equal(logits[5], changed_logits[5])


def test_dropout_acts_in_training_only_and_also_in_a_single_layer():
    torch.manual_seed(0)
    model = LanguageModel(V, emsize=6, nhid=6, nlayers=1, dropout=0.5)
    tokens = torch.randint(V, (4, 2))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_tied_weights_are_one_parameter():
    model = LanguageModel(V, emsize=6, nhid=6, tied=True)
    untied = LanguageModel(V, emsize=6, nhid=6)
    assert model.decoder.weight is model.embedding.weight
    saved = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == V * 6


def test_the_forget_gate_starts_with_a_bias_of_one():
    model = LanguageModel(V, emsize=4, nhid=5, nlayers=2)
    for layer in range(2):
        bias = model.recurrent.get_parameter(f"bias_ih_l{layer}")
        bias = bias + model.recurrent.get_parameter(f"bias_hh_l{layer}")
        assert torch.equal(bias[5:10], torch.ones(5))
        assert (bias.abs() < 1).sum() == 15


def uniform_model(dtype=torch.float64):
    model = LanguageModel(V, emsize=4, nhid=4, dtype=dtype)
    nn.init.zeros_(model.decoder.weight)
    nn.init.zeros_(model.decoder.bias)
    return model


@pytest.mark.parametrize("length", [2, 3, 300, 16 * 256 + 1, 5000])
def test_the_perplexity_of_a_uniform_model_is_the_size_of_the_vocabulary(length):
    tokens = torch.randint(V, (length,), dtype=torch.int32)
    score = evaluate(uniform_model(), Split(tokens, characters=3 * length), bptt=100)
    assert score.predictions == length - 1
    # A sum of `length` logarithms, each rounded; the exponential multiplies the error by at most V.
    assert score.perplexity == pytest.approx(V, rel=tolerance(torch.float64, K=length) * V)
    assert score.bits_per_character == pytest.approx(math.log2(V) / 3, rel=1e-12)


def test_evaluation_predicts_every_token_given_those_before_it_in_its_row():
    torch.manual_seed(0)
    model = LanguageModel(V, emsize=4, nhid=8, dtype=torch.float64)
    tokens = torch.randint(V, (600,), dtype=torch.int32)
    score = evaluate(model, Split(tokens, 600), bptt=7)
    # 599 predictions make two rows of 256 or more, the first of 300 and the second of 299.
    nats = 0.0
    for row in (tokens[:301], tokens[300:]):
        logits, _ = model(row[:-1, None].long())
        nats += F.cross_entropy(logits[:, 0], row[1:].long(), reduction="sum").item()
    assert score.predictions == 599
    assert score.loss == pytest.approx(nats / 599, rel=tolerance(torch.float64, K=600, T=300))


def test_evaluation_of_a_part_reads_the_beginnings_of_the_rows():
    torch.manual_seed(0)
    model = LanguageModel(V, emsize=4, nhid=8, dtype=torch.float64)
    tokens = torch.randint(V, (601,), dtype=torch.int32)
    score = evaluate(model, Split(tokens, 601), bptt=7, max_tokens=21)
    logits, _ = model(torch.stack([tokens[:10], tokens[300:310]], dim=1).long())
    targets = torch.stack([tokens[1:11], tokens[301:311]], dim=1).long()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert score.predictions == 20
    assert score.loss == pytest.approx(loss, rel=tolerance(torch.float64, K=20, T=10))


def test_evaluation_leaves_the_model_in_training_mode():
    model = LanguageModel(V, emsize=4, nhid=4, dropout=0.5)
    split = Split(torch.randint(V, (50,), dtype=torch.int32), 50)
    assert evaluate(model, split, bptt=8) == evaluate(model, split, bptt=8)
    assert model.training


LOGITS = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0]])


def test_temperature_divides_the_logits():
    for temperature in (0.5, 1.0, 3.0):
        expected = (LOGITS.double() / temperature).softmax(-1)
        assert_close(next_token_probabilities(LOGITS, temperature=temperature), expected)


def test_temperature_zero_leaves_the_likeliest_token():
    assert next_token_probabilities(LOGITS, temperature=0).tolist() == [[0, 1, 0, 0, 0]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_extreme_temperatures_stay_finite(temperature):
    probabilities = next_token_probabilities(1e4 * LOGITS, temperature=temperature)
    assert probabilities.isfinite().all()
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.argmax() == 1 or temperature == 1e300


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 99])
def test_top_k_keeps_exactly_k_tokens_with_their_proportions(top_k):
    probabilities = next_token_probabilities(LOGITS, top_k=top_k)[0]
    kept = probabilities.nonzero()[:, 0]
    assert len(kept) == min(top_k, 5)
    assert set(kept.tolist()) <= set(LOGITS[0].topk(min(top_k, 5)).indices.tolist()) | {2, 3}
    expected = LOGITS[0].double()[kept].softmax(-1)
    assert_close(probabilities[kept], expected)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=12),
    st.floats(1e-6, 1, exclude_min=True),
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_p(logits, p):
    logits = torch.tensor([logits])
    everything = next_token_probabilities(logits)[0]
    restricted = next_token_probabilities(logits, top_p=p)[0]
    kept = restricted > 0
    rounding = 1e-12
    assert everything[kept].sum() >= p - rounding
    if (~kept).any():
        assert everything[kept].min() >= everything[~kept].max()
    assert everything[kept].sum() - everything[kept].min() < p + rounding
    assert_close(restricted[kept], everything[kept] / everything[kept].sum())


def test_the_restrictions_apply_one_after_the_other():
    # Of the three likeliest at temperature 2 alone, what then reaches 70 %.
    scores = LOGITS[0].double() / 2
    three = scores[[1, 2, 3]].softmax(-1)
    assert three[0] < 0.7 < three[:2].sum()
    probabilities = next_token_probabilities(LOGITS, temperature=2.0, top_k=3, top_p=0.7)[0]
    assert probabilities.nonzero()[:, 0].tolist() in ([1, 2], [1, 3])


def test_excluded_tokens_are_never_drawn():
    probabilities = next_token_probabilities(LOGITS, excluded=[1, 4])[0]
    assert probabilities.nonzero()[:, 0].tolist() == [0, 2, 3]
    assert next_token_probabilities(LOGITS, temperature=0, excluded=[1]).argmax() in (2, 3)
    with pytest.raises(ValueError, match="all 5 tokens are excluded"):
        next_token_probabilities(LOGITS, excluded=range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"prime": []}, "the prime is empty"),
        ({"length": -1}, "length is -1"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    arguments = {"prime": [1], "length": 3} | options
    with pytest.raises(ValueError, match=message):
        generate(uniform_model(), **arguments)


def test_a_prime_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match=f"token {V} is outside"):
        generate(uniform_model(), [V], 3)


def test_tokens_are_drawn_with_their_probabilities():
    model = uniform_model()
    logits = torch.linspace(-1, 1, V, dtype=torch.float64)
    model.decoder.bias.data = logits
    draws = 20_000
    tokens = generate(model, [0], 10, num_samples=draws // 10, temperature=0.7, seed=5)
    counts = tokens.flatten().bincount(minlength=V).double()
    expected = draws * (logits / 0.7).softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # Mean V - 1, standard deviation sqrt(2 (V - 1)): five of them are passed once in a million.
    assert chi_square < V - 1 + 5 * math.sqrt(2 * (V - 1))


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_generation_carries_the_state(kind):
    torch.manual_seed(1)
    model = LanguageModel(V, emsize=8, nhid=8, nlayers=2, dtype=torch.float64, **kind)
    # Larger weights, so that the past matters.
    for parameter in model.parameters():
        parameter.data *= 3
    prime = [3, 1, 4, 1, 5]
    tokens = generate(model, prime, 12, temperature=0)[0].tolist()
    text = list(prime)
    for token in tokens:
        logits, _ = model(torch.tensor(text)[:, None])
        assert logits[-1, 0].argmax() == token
        text.append(token)
    assert len(set(tokens)) > 1


def test_the_seed_decides_the_samples():
    model = uniform_model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(model, [1, 2], 20, num_samples=3, seed=7)
    assert first.shape == (3, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generate(model, [1, 2], 20, num_samples=3, seed=7), first)
    assert not torch.equal(generate(model, [1, 2], 20, num_samples=3, seed=8), first)
    assert not torch.equal(first[0], first[1])


def test_generation_of_nothing_and_the_mode_of_the_model():
    model = LanguageModel(V, emsize=4, nhid=4, dropout=0.5)
    assert generate(model, [1], 0, num_samples=2).shape == (2, 0)
    assert model.training
    one = generate(model, [1], 30, temperature=0)
    assert torch.equal(one, generate(model, [1], 30, temperature=0))
