"""ONNX Runtime on an emulated processor without VNNI: plain int8 weights as wrong as simulated, safe ones right."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from rewrite.quantize.format import Format
from rewrite.quantize.rounding import round_to_nearest
from rewrite.quantize.saturation import saturating_product, unsaturated

QEMU = shutil.which("qemu-x86_64")
SCRIPT = Path(__file__).parent / "saturating_runtime.py"
FILTER = (8, 4, 3, 3)


def pairs_of_taps(filters: np.ndarray) -> np.ndarray:
    """Filters (M, C, H, W) as columns in the order in which QLinearConv pairs their taps: channels fastest."""
    return np.moveaxis(filters, 1, -1).reshape(len(filters), -1).T


def as_filters(columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(columns.T.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed")
def test_the_runtime_saturates_without_vnni_as_simulated_and_not_with_safe_codes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    form = Format(8, signed=True, symmetric=True)
    weight, filters = rng.standard_normal((65, 24)), rng.standard_normal(FILTER)
    inputs = {
        "x": rng.integers(230, 256, (5, 65)).astype(np.uint8),
        "image": rng.integers(230, 256, (1, FILTER[1], 3, 3)).astype(np.uint8),
    }
    make, nodes, constants, expected = onnx.helper.make_node, [], {}, {}
    step = np.float32(2.0**12)
    for kind, choose in (("plain", round_to_nearest), ("safe", unsaturated)):
        codes, taps = choose(weight, form).codes, choose(pairs_of_taps(filters), form).codes
        constants |= {
            f"{kind}_codes": codes,
            f"{kind}_filters": as_filters(taps, FILTER),
            "one": np.float32(1),
            "zero_u8": np.uint8(0),
            "zero_s8": np.int8(0),
            "step": step,
            "middle": np.uint8(128),
        }
        quantizers = ["one", "zero_u8", f"{kind}_filters", "one", "zero_s8", "step", "middle"]
        nodes += [
            make("MatMulInteger", ["x", f"{kind}_codes"], [f"{kind}_product"]),
            make("QLinearConv", ["image", *quantizers], [f"{kind}_conv"]),
        ]
        patch = pairs_of_taps(inputs["image"]).T.astype(np.uint8)
        for exact in (True, False):
            product, conv = (
                a.astype(np.int64) @ b.astype(np.int64) if exact else saturating_product(a, b)
                for a, b in ((inputs["x"], codes), (patch, taps))
            )
            expected[kind, exact] = product, np.clip(np.rint(conv / step) + 128, 0, 255).reshape(1, -1, 1, 1)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "saturating",
        [info(name, onnx.TensorProto.UINT8, array.shape) for name, array in inputs.items()],
        [
            info(n.output[0], onnx.TensorProto.INT32 if "product" in n.output[0] else onnx.TensorProto.UINT8, None)
            for n in nodes
        ],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **inputs)
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, str(SCRIPT), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(tmp_path / "outputs.npz") as found:
        for kind in ("plain", "safe"):
            for result, exact, saturated in zip(("product", "conv"), expected[kind, True], expected[kind, False]):
                assert np.array_equal(found[f"{kind}_{result}"], saturated)
                assert np.array_equal(saturated, exact) == (kind == "safe")
