"""Windows of truncated BPTT, and the helpers that carry state along streams."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from rnnfast import bptt


@pytest.mark.parametrize(
    ("truncate", "T", "expected"),
    [
        (None, None, (0, 0)),
        (None, 5, (0, 0)),
        (3, None, (3, 3)),
        (3, 5, (3, 3)),
        (3, 3, (0, 0)),
        (3, 2, (0, 0)),
        (3, 0, (0, 0)),
        (1, 2, (1, 1)),
        ((2, 4), 10, (2, 4)),
        ([2, 4], 10, (2, 4)),
        ((2, 4), 4, (0, 0)),  # blocks begin at 0 and 2, windows both at 0
        ((2, 4), 5, (2, 4)),
        ((2, 2), 2, (0, 0)),
        ((3, 10), 10, (3, 10)),  # the last block, step 9, has a window of 2 .. 9
        ((3, 12), 10, (0, 0)),
    ],
)
def test_parse_truncate(truncate, T, expected):
    assert bptt.parse_truncate(truncate, T) == expected


def test_parse_truncate_takes_any_integer():
    assert bptt.parse_truncate(torch.tensor(4)) == (4, 4)


@pytest.mark.parametrize(
    ("truncate", "error", "message"),
    [
        (0, ValueError, "k1=0, k2=0"),
        ((3, 2), ValueError, "1 <= k1 <= k2, got k1=3, k2=2"),
        ((1, 2, 3), ValueError, r"\(k1, k2\), got 3 values"),
        (True, TypeError, "got True"),
        (2.0, TypeError, "got 2.0"),
        ("2", TypeError, "got '2'"),
        ((2, None), TypeError, r"got \(2, None\)"),
        ({2, 3}, TypeError, "got {2, 3}"),
    ],
)
def test_parse_truncate_mistakes(truncate, error, message):
    with pytest.raises(error, match=message):
        bptt.parse_truncate(truncate)


@pytest.mark.parametrize("k1", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("T", [0, 1, 2, 6, 7, 8, 13])
def test_blocks_are_anchored_at_time_0(T, k1):
    forward = bptt.block_begins(T, k1)
    assert forward == list(range(0, T, k1))
    blocks = {frozenset(range(b, min(b + k1, T))) for b in forward}
    begins = bptt.block_begins(T, k1, reverse=True)
    ends = [*begins[1:], T]
    in_time = {
        frozenset(T - 1 - p for p in range(b, e)) for b, e in zip(begins, ends, strict=bool(T)) if T
    }
    assert in_time == blocks


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (2, 5), (3, 4), (4, 9), (5, 30)])
def test_windows_precede_their_blocks(k1, k2, reverse):
    blocks = bptt.block_begins(11, k1, reverse)
    windows = bptt.window_begins(11, k1, k2, reverse)
    for window, block in zip(windows, blocks, strict=True):
        assert window == 0 or block - window == k2 - k1
        assert 0 <= window <= block


def test_detach_keeps_structure_and_values():
    Pair = namedtuple("Pair", "h c")
    leaf = torch.ones(2, requires_grad=True)
    state = {"a": (leaf * 2, None), "b": [leaf * 3], "c": Pair(leaf, leaf * 4)}
    got = bptt.detach(state)
    assert got["a"][1] is None
    assert isinstance(got["b"], list)
    assert isinstance(got["c"], Pair)
    for before, after in ((state["a"][0], got["a"][0]), (state["c"].c, got["c"].c)):
        assert not after.requires_grad
        assert after.data_ptr() == before.data_ptr()
    assert bptt.detach(None) is None
    with pytest.raises(TypeError, match="got str"):
        bptt.detach((leaf, "h"))


def test_reset_sets_rows_back():
    began = torch.tensor([True, False, True])
    h = torch.randn(2, 3, 4, requires_grad=True)
    c = torch.randn(2, 3, 5)
    got_h, got_c = bptt.reset((h, c), began)
    for got, state in ((got_h, h), (got_c, c)):
        assert got[:, began].count_nonzero() == 0
        assert torch.equal(got[:, ~began], state[:, ~began])
    (gradient,) = torch.autograd.grad(got_h.sum(), h)
    assert torch.equal(gradient, (~began).float().view(1, 3, 1).expand_as(h))
    assert bptt.reset(None, began) is None
    cell = torch.randn(3, 4)
    assert bptt.reset(cell, began, batch_dim=0)[began].count_nonzero() == 0


def test_reset_to_a_learned_state():
    began = torch.tensor([True, False, True])
    state = {"h": torch.randn(2, 3, 4), "none": None}
    learned = torch.randn(2, 1, 4, requires_grad=True)
    got = bptt.reset(state, began, {"h": learned, "none": None})["h"]
    assert torch.equal(got[:, began], learned.expand(2, 2, 4))
    assert torch.equal(got[:, 1], state["h"][:, 1])
    (gradient,) = torch.autograd.grad(got.sum(), learned)
    assert torch.equal(gradient, torch.full((2, 1, 4), 2.0))


def test_reset_clears_even_nan():
    state = torch.full((1, 2, 3), float("nan"))
    assert bptt.reset(state, torch.tensor([True, True])).count_nonzero() == 0


@pytest.mark.parametrize(
    ("began", "batch_dim", "error"),
    [
        (torch.tensor([1, 0, 1]), 1, TypeError),
        (torch.tensor([True, False]), 1, ValueError),
        (torch.tensor([[True, False, True]]), 1, ValueError),
        (torch.tensor([True, False, True]), 0, ValueError),
        (torch.tensor([True, False, True]), 3, ValueError),
    ],
)
def test_reset_mistakes(began, batch_dim, error):
    with pytest.raises(error, match="began"):
        bptt.reset(torch.zeros(2, 3, 4), began, batch_dim=batch_dim)


def test_batchify_cuts_contiguous_rows():
    assert bptt.batchify(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert bptt.batchify(torch.arange(3), 3).tolist() == [[0], [1], [2]]
    for stream, batch_size in ((torch.arange(2), 3), (torch.arange(2), 0), (torch.arange(0), 1)):
        with pytest.raises(ValueError, match="batch_size must be from 1 to"):
            bptt.batchify(stream, batch_size)
    with pytest.raises(ValueError, match="1-D"):
        bptt.batchify(torch.zeros(2, 2), 1)


@pytest.mark.parametrize("start", [0, 3, 8])
@pytest.mark.parametrize("length", [1, 3, 4, 8, 9, 50])
def test_chunks_predict_every_column_once(length, start):
    rows = torch.arange(18).view(2, 9)
    pieces = list(bptt.chunks(rows, length, start))
    for inputs, targets in pieces:
        assert inputs.shape == targets.shape
        assert 1 <= inputs.shape[1] <= length
        assert torch.equal(inputs + 1, targets)
    seen = [t for _, targets in pieces for t in targets[0].tolist()]
    assert seen == list(range(start + 1, 9))


def test_chunks_mistakes():
    rows = torch.zeros(2, 9)
    for args, message in (
        ((rows[0], 3), "rows must have shape"),
        ((rows, 0), "length must be"),
        ((rows, 3, -1), "start must be"),
    ):
        with pytest.raises(ValueError, match=message):
            bptt.chunks(*args)


def test_carried_state_makes_chunks_one_sequence():
    """Chunk by chunk with the state carried is the whole stream in one go, up to rounding."""
    module = torch.nn.LSTM(1, 3, batch_first=True)
    rows, state, outputs = bptt.batchify(torch.rand(41), 2), None, []
    for inputs, _ in bptt.chunks(rows, 6):
        y, state = module(inputs.unsqueeze(-1), bptt.detach(state))
        outputs.append(y)
    want = module(rows[:, :-1].unsqueeze(-1))[0]
    torch.testing.assert_close(torch.cat(outputs, 1), want)
