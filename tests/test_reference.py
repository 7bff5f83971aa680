"""The reference against torch.nn and against finite differences, in float64; and its edges: masks,
empty sequences, dtypes, extreme values, mistakes. Truncation has its own file.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import Problem, assert_same, forward_reference, named_gradients, reference_results
from rnnfast import reference


def torch_results(p, upstream):
    """Outputs and gradients from torch.nn over the whole sequence; it has no per-step cells."""
    module, inputs = p.module(), p.inputs()
    y, h = module(inputs[0], tuple(inputs[1:]) if p.lstm else inputs[1])
    outputs = [y, *h] if p.lstm else [y, h]
    leaves = [*inputs, *module.parameters()]
    gradients = torch.autograd.grad(outputs, leaves, upstream[: len(outputs)])
    return dict(zip(("y", "h_n", "c_n"), outputs, strict=False)) | named_gradients(p, gradients)


PROBLEMS = [
    Problem(cell, *sizes)
    for cell in ("lstm", "tanh", "relu")
    for sizes in [  # T, B, input_size, H, P, L, D, bias
        (7, 3, 5, 4, 0, 1, 1, True),
        (1, 1, 1, 1, 0, 1, 1, True),
        (2, 1, 3, 17, 0, 1, 1, False),
        (5, 2, 17, 3, 0, 3, 1, True),
        (6, 3, 2, 5, 0, 1, 2, False),
        (5, 2, 3, 4, 0, 3, 2, True),
        (4, 17, 1, 2, 0, 2, 2, False),
        (3, 0, 2, 3, 0, 2, 2, True),
        (5, 2, 3, 4, 2, 1, 1, True),
        (5, 3, 2, 5, 3, 2, 2, False),
        (4, 2, 3, 5, 1, 3, 1, True),
    ]
    if cell == "lstm" or sizes[4] == 0
]


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_matches_torch_nn(p):
    upstream = p.upstream()
    if p.lstm:
        upstream[3].zero_()  # torch.nn shows no per-step cell states
    assert_same(p, reference_results(p, upstream), torch_results(p, upstream))


@pytest.mark.parametrize(("cell", "P"), [("lstm", 0), ("lstm", 1), ("tanh", 0)])
def test_finite_differences(cell, P):
    """Every entry of every input and weight, by central differences of sum(output * upstream)."""
    p = Problem(cell, T=3, B=2, input_size=2, H=2, P=P, L=2, D=2)
    upstream = [u.numpy() for u in p.upstream()]
    arrays = [t.detach().numpy().copy() for t in (*p.inputs(), *p.module().parameters())]

    def terms():
        outputs, _ = forward_reference(p, arrays)
        return np.concatenate(
            [(o * u).ravel() for o, u in zip(outputs.values(), upstream, strict=True)]
        )

    # Central differences are off by step^2 / 6 times the third derivative, and by the rounding of
    # the two losses over 2 * step.
    step = 1e-5
    bound = 10 * step**2 + 10 * np.finfo(np.float64).eps * np.abs(terms()).sum() / step
    results = reference_results(p, p.upstream())
    gradients = [value for name, value in results.items() if name.startswith("d")]
    for array, gradient in zip(arrays, gradients, strict=True):
        for at in np.ndindex(array.shape):
            value = array[at]
            array[at] = value + step
            above = terms().sum()
            array[at] = value - step
            below = terms().sum()
            array[at] = value
            assert abs((above - below) / (2 * step) - gradient[at]) < bound


def test_dropout_masks_multiply_the_outputs_between_layers():
    p = Problem("lstm", L=2)
    upstream = p.upstream()[:3]
    x, h0, c0 = inputs = p.inputs()
    weights = list(p.module().parameters())
    mask = torch.tensor(np.random.default_rng(0).choice([0.0, 2.0], (p.T, p.B, p.H)))
    options = (True, 1, 0.0, True, False, False)
    below, *final0 = torch.lstm(x, (h0[:1], c0[:1]), weights[:4], *options)
    y, *final1 = torch.lstm(below * mask, (h0[1:], c0[1:]), weights[4:], *options)
    outputs = [y, *(torch.cat(s) for s in zip(final0, final1, strict=True))]
    expected = torch.autograd.grad(outputs, [*inputs, *weights], upstream)
    arrays = [t.detach().numpy() for t in (*inputs, *weights)]
    actual, saved = forward_reference(p, arrays, dropout_masks=[mask.numpy()])
    dx, dstate0, dweights = reference.lstm_backward(saved, *(u.numpy() for u in upstream))
    actual |= named_gradients(p, [dx, *dstate0, *dweights])
    assert_same(p, actual, {"y": y} | named_gradients(p, expected))


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("truncate", [None, 2])
def test_no_steps_hand_the_state_through(cell, D, truncate):
    """T = 0, which torch.nn refuses: the final state is the initial one, and so its gradient."""
    p = Problem(cell, T=0, L=2, D=D)
    upstream = p.upstream()
    results = reference_results(p, upstream, truncate)
    assert results["y"].shape == (0, p.B, D * p.H)
    for name, state, d in zip("hc", p.inputs()[1:], upstream[1:3], strict=False):
        np.testing.assert_array_equal(results[f"{name}_n"], state.detach())
        np.testing.assert_array_equal(results[f"d{name}0"], d)
    for name, _ in p.module().named_parameters():
        assert not results[f"d{name}"].any()


def test_missing_states_and_gradients_are_zeros():
    p = Problem("lstm", L=2)
    x, h0, c0, *weights = (t.detach().numpy() for t in (*p.inputs(), *p.module().parameters()))
    dy, *others = (u.numpy() for u in p.upstream())
    zeros = [np.zeros_like(u) for u in others]
    *got, saved = reference.lstm(x, None, weights, num_layers=2)
    *want, other = reference.lstm(x, (0 * h0, 0 * c0), weights, num_layers=2)
    for a, b in zip(flat(got), flat(want), strict=True):
        np.testing.assert_array_equal(a, b)
    got, want = reference.lstm_backward(saved, dy), reference.lstm_backward(other, dy, *zeros)
    for a, b in zip(flat(got), flat(want), strict=True):
        np.testing.assert_array_equal(a, b)
    nothing = reference.lstm_backward(saved, None)
    assert not any(a.any() for a in flat(nothing))


def flat(nested):
    """The arrays in nested tuples and lists."""
    if isinstance(nested, np.ndarray):
        return [nested]
    return [array for inner in nested for array in flat(inner)]


@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu"])
def test_dtype_follows_the_inputs(cell):
    p = Problem(cell, P=2 if cell == "lstm" else 0, L=2, D=2)
    arrays = [t.detach().numpy() for t in (*p.inputs(), *p.module().parameters())]
    for given, wanted in ((np.float32, np.float32), (np.float64, np.float64), (int, np.float64)):
        outputs, saved = forward_reference(p, [a.astype(given) for a in arrays])
        backward = reference.lstm_backward if p.lstm else reference.rnn_backward
        gradients = backward(saved, np.ones_like(outputs["y"]), truncate=2)
        assert {a.dtype.type for a in (*outputs.values(), *flat(gradients))} == {wanted}


def test_no_two_gradients_share_memory():
    """Clipping scales every gradient in place; one buffer under two names would be scaled twice."""
    p = Problem("lstm", L=2)
    gradients = [v for k, v in reference_results(p, p.upstream()).items() if k.startswith("d")]
    for i, a in enumerate(gradients):
        assert not any(np.shares_memory(a, b) for b in gradients[:i])


def test_extreme_and_non_finite_values():
    sigmoid = reference.sigmoid(np.array([-np.inf, -1e4, -700.0, 0.0, 40.0, 1e4, np.inf, np.nan]))
    expected = [0.0, 0.0, np.exp(-700.0), 0.5, 1.0, 1.0, 1.0, np.nan]
    np.testing.assert_allclose(sigmoid, expected, rtol=4 * np.finfo(np.float64).eps)
    one = np.ones((1, 1))
    for cell in ("tanh", "relu"):
        x = np.array([np.nan, 1e9, -1e9]).reshape(1, 3, 1)
        y, _, saved = reference.rnn(x, None, [one, one], nonlinearity=cell)
        high, low = (1e9, 0) if cell == "relu" else (1, -1)
        np.testing.assert_array_equal(y.ravel(), [np.nan, high, low])
        dx, _, _ = reference.rnn_backward(saved, np.ones_like(y))
        expected = [1, 1, 0] if cell == "relu" else [np.nan, 0, 0]  # relu' (NaN) = 1 as in torch
        np.testing.assert_array_equal(dx.ravel(), expected)


def test_mistakes_are_named():
    p = Problem("lstm", L=2, D=2)
    x, h0, c0, *weights = (t.detach().numpy() for t in (*p.inputs(), *p.module().parameters()))
    stack = {"num_layers": 2, "bidirectional": True}
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\), expected \(T, B, I\)"):
        reference.lstm(x[0], None, weights, **stack)
    with pytest.raises(ValueError, match="weights has 15 arrays"):
        reference.lstm(x, None, weights[1:], **stack)
    with pytest.raises(ValueError, match=r"h0 has shape \(4, 2, 4\), expected \(4, 3, 4\)"):
        reference.lstm(x, (h0[:, 1:], c0), weights, **stack)
    with pytest.raises(ValueError, match=r"c0 has shape \(1, 3, 4\), expected \(4, 3, 4\)"):
        reference.lstm(x, (h0, c0[:1]), weights, **stack)
    with pytest.raises(ValueError, match="reverse and bidirectional"):
        reference.lstm(x, None, weights, reverse=True, **stack)
    with pytest.raises(ValueError, match="dropout_masks has 2 arrays, expected 1"):
        reference.lstm(x, None, weights, dropout_masks=[1, 1], **stack)
    with pytest.raises(ValueError, match="nonlinearity is 'sine'"):
        reference.rnn(x, None, weights, nonlinearity="sine")
    y, _, _, saved = reference.lstm(x, (h0, c0), weights, **stack)
    with pytest.raises(ValueError, match=r"dy has shape \(7, 3, 7\), expected \(7, 3, 8\)"):
        reference.lstm_backward(saved, y[..., 1:])
    with pytest.raises(ValueError, match=r"dc_n has shape .* expected \(4, 3, 4\)"):
        reference.lstm_backward(saved, y, h0, c0[1:])
    with pytest.raises(ValueError, match="k2 = 3 > k1 = 2, expected k1 = k2"):
        reference.lstm_backward(saved, y, truncate=(2, 3))
    for truncate in (0, -1, (3, 2), (0, 2)):
        with pytest.raises(ValueError, match="expected k2 >= k1 >= 1"):
            reference.lstm_backward(saved, y, truncate=truncate)
    for truncate in ("2", 2.0, (1, None)):
        with pytest.raises(TypeError, match="integer"):
            reference.lstm_backward(saved, y, truncate=truncate)


def test_reference_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
