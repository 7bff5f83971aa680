"""Other ways to run the same layer forward: ONNX Runtime and OpenVINO, with torch's weights.

Both read an ONNX graph of one LSTM or RNN node. Each is set to the threads of the run, float32
arithmetic and its lowest latency. Their threads spin for a while after a call and then sleep;
benchmarks/timing.py waits for that before each block, so each may spin as it does by default.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

NAMES = ("onnxruntime", "openvino")

# Where in torch's order i, f, g, o the gates of ONNX's order i, o, f, c stand.
ONNX_GATES = {4: (0, 3, 1, 2), 1: (0,)}

# IR version and operator set that releases of the last years read.
ONNX_IR, ONNX_OPSET = 10, 17

Outputs = dict[str, torch.Tensor]


class MissingPeerError(Exception):
    """A peer that was asked for is not installed."""


class Peer:
    """One layer in another library.

    Args:
        run: computes the layer on the input it was made for; the library's own outputs.
        names: of those outputs: "y" (T, 1, B, H), "h_n" and, for the LSTM, "c_n" (1, B, H).
    """

    def __init__(self, run: Callable[[], list], names: list[str]) -> None:
        self.run = run
        self._names = names

    def outputs(self) -> Outputs:
        """Results by name, shaped as torch's."""
        values = {
            name: torch.as_tensor(value).clone()
            for name, value in zip(self._names, self.run(), strict=True)
        }
        return {**values, "y": values["y"].squeeze(1)}


def require(name: str) -> None:
    """Sees to it that a peer can be used.

    Raises:
        MissingPeerError: it, or what builds its graphs, is not installed.
    """
    for module in (name, "onnx"):
        if importlib.util.find_spec(module) is None:
            raise MissingPeerError(f"{name} needs {module}: pip install '.[bench]'")


def version(name: str) -> str:
    """The version of an installed peer, without the name of its build."""
    return importlib.import_module(name).__version__.partition("-")[0]


def open_peer(name: str, layer: torch.nn.RNNBase, x: torch.Tensor, threads: int) -> Peer:
    """The float32 layer as peer `name` runs it on x (T, B, I)."""
    names = ["y", "h_n", "c_n"][: 3 if isinstance(layer, torch.nn.LSTM) else 2]
    return {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}[name](
        onnx_graph(layer, x, names), names, x, threads
    )


def onnx_graph(layer: torch.nn.RNNBase, x: torch.Tensor, names: list[str]) -> bytes:
    """One layer in one direction as an ONNX model with the input x and the outputs `names`."""
    from onnx import TensorProto, checker, helper, numpy_helper

    H = layer.hidden_size
    kind = "LSTM" if isinstance(layer, torch.nn.LSTM) else "RNN"
    order = ONNX_GATES[layer.weight_hh_l0.shape[0] // H]

    def reordered(parameter: torch.Tensor) -> torch.Tensor:
        return torch.cat([parameter.detach().split(H)[gate] for gate in order])

    biases = torch.cat([reordered(layer.bias_ih_l0), reordered(layer.bias_hh_l0)])
    weights = {
        "W": reordered(layer.weight_ih_l0),
        "R": reordered(layer.weight_hh_l0),
        "B": biases,
    }
    steps, batch, _ = x.shape
    shapes = {"y": [steps, 1, batch, H], "h_n": [1, batch, H], "c_n": [1, batch, H]}

    def value(name: str, shape: list[int]) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [helper.make_node(kind, ["x", *weights], names, hidden_size=H)],
        kind,
        [value("x", list(x.shape))],
        [value(name, shapes[name]) for name in names],
        # ONNX has a leading axis for directions.
        [numpy_helper.from_array(w[None].numpy(), name) for name, w in weights.items()],
    )
    opset = helper.make_opsetid("", ONNX_OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=ONNX_IR)
    checker.check_model(model)
    return model.SerializeToString()


def _open_onnxruntime(graph: bytes, names: list[str], x: torch.Tensor, threads: int) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return Peer(lambda: session.run(names, inputs), names)


def _open_openvino(graph: bytes, names: list[str], x: torch.Tensor, threads: int) -> Peer:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(graph),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            # Where the processor has bfloat16 instructions the default would be to use them.
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    outputs = [request.get_tensor(name) for name in names]

    def run() -> list:
        request.infer()
        return [tensor.data for tensor in outputs]

    return Peer(run, names)
