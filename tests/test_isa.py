"""Every instruction set can be forced, and all give the same results but for rounding."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from one_layer import Case, assert_results, by_operator
from rnnfast import _native

# RNNFAST_ISA is read when kernels are first asked for. Importing torch takes seconds, so one
# process imports it and each value is tried in a fork of that process.
SCRIPT = """
import json, os, sys
from rnnfast import build_info

for value in json.loads(sys.argv[1]):
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.environ["RNNFAST_ISA"] = value
            answer = build_info()["isa"]
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        os.write(writable, json.dumps(answer).encode())
        os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    print(os.read(readable, 10_000).decode())
"""


@pytest.fixture(scope="module")
def answers():
    """What build_info says under each value of RNNFAST_ISA: the name in use, or the error."""
    info = _native.build_info()
    values = [*info["isas_built"], "", "neon", "AVX2", "avx2 ", "avx512,avx2"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps(values)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(values, map(json.loads, done.stdout.splitlines()), strict=True))


def test_the_variable_forces_each(answers):
    for name in _native.build_info()["isas_available"]:
        assert answers[name] == name


def test_without_it_the_best_is_chosen(answers):
    assert answers[""] == _native.build_info()["isas_available"][-1]


def test_unknown_and_unsupported_names_are_errors_that_list_the_known_ones(answers):
    available = _native.build_info()["isas_available"]
    for name in answers.keys() - {*available, ""}:
        kind, message = answers[name]
        assert kind == "ValueError"
        assert f"RNNFAST_ISA is '{name}'" in message
        assert message.endswith(": " + ", ".join(available))


def test_what_is_available_was_built():
    info = _native.build_info()
    assert info["isas_available"][0] == "baseline"
    assert info["isas_available"] == [n for n in info["isas_built"] if n in info["isas_available"]]


def test_using_an_isa_ends_with_the_block():
    before = _native.build_info()["isa"]
    with _native.using_isa("baseline"):
        assert _native.build_info()["isa"] == "baseline"
    assert _native.build_info()["isa"] == before
    with pytest.raises(ZeroDivisionError), _native.using_isa("baseline"):
        raise ZeroDivisionError
    assert _native.build_info()["isa"] == before


def test_an_unknown_isa_changes_nothing():
    before = _native.build_info()
    with (
        pytest.raises(ValueError, match=r"'sse9'.*it can use: baseline"),
        _native.using_isa("sse9"),
    ):
        pass
    assert _native.build_info() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu"])
@pytest.mark.parametrize("truncate", [None, (4, 6)])
def test_all_give_the_same_but_for_rounding(truncate, cell, dtype):
    case = Case(cell, 20, 13, 70, 65, truncate=truncate)
    results = {}
    for name in _native.build_info()["isas_available"]:
        with _native.using_isa(name):
            results[name] = by_operator(case, dtype)
    for got in results.values():
        if dtype == torch.bfloat16 and cell == "relu":  # whose derivative jumps: see test_bfloat16
            got, results["baseline"] = (
                {k: r[k] for k in ("y", "h_n")} for r in (got, results["baseline"])
            )
        assert_results(case, got, results["baseline"], in_float32=dtype == torch.bfloat16)
