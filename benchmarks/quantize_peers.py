"""Quantizers of others, each as a function of a float ONNX file; runs under the interpreter that has them installed.

    PYTHON benchmarks/quantize_peers.py SOURCE OUT CALIBRATION METHOD…

SOURCE is a float model, CALIBRATION an `.npz` whose entries `INDEX/NAME` are sets of inputs. Every method writes
OUT/METHOD/model.onnx, and one line of JSON on stdout says how long it took or why it failed. This file imports nothing
of the project, since neural-compressor and Olive want other versions of what it imports.

The methods are those of `METHODS`: a format, as the recipes of `rewrite` name it, and what makes it.

* `ort-*`: onnxruntime.quantization. Its `quant_pre_process` runs first. `all` quantizes every operator that it can,
  `matmuls` only contractions with constants, as our recipes do. Activations are uint8 and weights int8 for static
  quantization, as its documentation recommends for x86 with VNNI.
* `inc-*`: neural-compressor 2.x, of whose weight-only algorithms onnxruntime bundles all but AWQ; `ort-*-smooth-*` is
  onnxruntime's own option, which imports neural-compressor.
* `onc-*`: onnx-neural-compressor, which has the same and a static quantization of its own.
* `olive-*`: Olive's ONNX passes. Its static quantization and its GPTQ call what is here already.

A method of level 4 takes the codes of the one of level 0 where they were made before: only the kernel differs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Sets = list[dict[str, np.ndarray]]
CONTRACTIONS = ["MatMul", "Gemm", "Conv"]


@dataclass(frozen=True)
class Method:
    """What makes a quantized file: `run(source, target, calibration)`, and the name of the packages it needs."""

    format: str
    package: str
    run: Callable[[Path, Path, Sets], None]


class Reader:
    """The calibration sets, as onnxruntime's CalibrationDataReader and neural-compressor's loaders want them."""

    def __init__(self, sets: Sets) -> None:
        self.sets, self.place = sets, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.place += 1
        return self.sets[self.place - 1] if self.place <= len(self.sets) else None

    def rewind(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return len(self.sets)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.sets)


class Pairs(list[tuple[dict[str, np.ndarray], None]]):
    """The calibration sets as neural-compressor's loaders give them: inputs and labels, one set at a time."""

    batch_size = 1

    def __init__(self, sets: Sets) -> None:
        super().__init__((one, None) for one in sets)


# ------------------------------------------------------------------------------------------- onnxruntime.quantization


def _reader(sets: Sets) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    return type("Sets", (Reader, CalibrationDataReader), {})(sets)


def preprocessed(source: Path) -> Path:
    """What `quant_pre_process` makes of a model, beside it; without the symbolic shapes where it has none for them."""
    from onnxruntime.quantization import quant_pre_process

    made = source.with_name("preprocessed.onnx")
    if not made.exists():
        try:
            quant_pre_process(source, made)
        except Exception:  # noqa: BLE001 — its symbolic shape inference knows fewer operators than the runtime has
            quant_pre_process(source, made, skip_symbolic_shape=True)
    return made


def _dynamic(source: Path, target: Path, sets: Sets, **options: Any) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    # It takes an Attention of ai.onnx for the runtime's own, and writes a model that does not load.
    kinds = [kind for kind in IntegerOpsRegistry if kind != "Attention"]
    quantize_dynamic(preprocessed(source), target, kinds, weight_type=QuantType.QInt8, **options)


def _static(
    source: Path,
    target: Path,
    sets: Sets,
    calibrator: str,
    smooth: float | None = None,
    only: bool = False,
    **more: Any,
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    extra: dict[str, Any] = {} if smooth is None else {"SmoothQuant": True, "SmoothQuantAlpha": smooth}
    if only:
        extra["MatMulConstBOnly"] = True
        extra["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
        more["op_types_to_quantize"] = CONTRACTIONS
    # A string: its SmoothQuant takes a path for a model.
    quantize_static(
        str(preprocessed(source)), target, _reader(sets), calibrate_method=CalibrationMethod[calibrator],
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, extra_options=extra, **more,
    )  # fmt: skip


def _nbits(source: Path, target: Path, sets: Sets, algorithm: str, level: int, **options: Any) -> None:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    config = {
        "gptq": nbits.GPTQWeightOnlyQuantConfig,
        "hqq": nbits.HQQWeightOnlyQuantConfig,
        "k-quant": nbits.KQuantWeightOnlyQuantConfig,
        "inc-rtn": nbits.RTNWeightOnlyQuantConfig,
        "rtn": None,
    }[algorithm]
    keys = {"bits", "block_size", "is_symmetric"}
    given = {key: value for key, value in options.items() if key in keys} | {"accuracy_level": level}
    if config is not None:
        own = {key: value for key, value in options.items() if key not in keys}
        if algorithm == "gptq":
            own["calibration_data_reader"] = _reader(sets)
        if algorithm == "hqq":
            own |= {"block_size": options["block_size"], "bits": options["bits"]}
        given["algo_config"] = config(**own)
    with as_matmuls(source) as matmuls:
        quantizer = nbits.MatMulNBitsQuantizer(onnx.load(matmuls), **given)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)
    made = onnx.load(target)
    found = [node for node in made.graph.node if node.op_type == "MatMulNBits"]
    for node in found:
        _set_level(node, level)
    if not found:
        raise ValueError("it quantized nothing")
    onnx.save(made, target)


def _at_level(earlier: Path, target: Path, level: int) -> None:
    """An artifact at another accuracy level: the codes are the same."""
    import onnx

    model = onnx.load(earlier)
    for node in [node for node in model.graph.node if node.op_type == "MatMulNBits"]:
        _set_level(node, level)
    onnx.save(model, target)


def _set_level(node: Any, level: int) -> None:
    """Write the accuracy level, which HQQ, among others, leaves out."""
    import onnx

    for attribute in [one for one in node.attribute if one.name == "accuracy_level"]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))


@contextlib.contextmanager
def as_matmuls(source: Path) -> Iterator[Path]:
    """The model with every Gemm as MatMul and Add: MatMulNBits quantizers look at no Gemm. They would lose by that what
    their own dynamic quantizer gets by the same call."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    made = source.with_name("matmuls.onnx")
    if not made.exists():
        model = ONNXModel(onnx.load(preprocessed(source)))
        model.replace_gemm_with_matmul()
        model.topological_sort()
        model.save_model_to_file(str(made), False)
    yield made


def _ort_methods() -> Iterator[tuple[str, Method]]:
    for channel in (False, True):
        for reduced in (False, True):
            name = "ort-dynamic" + "-per-channel" * channel + "-reduce-range" * reduced
            yield name, Method("int8-dynamic", "ort", partial(_dynamic, per_channel=channel, reduce_range=reduced))
    for calibrator in ("MinMax", "Entropy", "Percentile", "Distribution"):
        for only in (False, True):
            name = f"ort-static-{calibrator.lower()}-{'matmuls' if only else 'all'}"
            yield name, Method("int8-static", "ort", partial(_static, calibrator=calibrator, only=only))
            each = partial(_static, calibrator=calibrator, only=only, per_channel=True)
            yield f"{name}-per-channel", Method("int8-static", "ort", each)
    for alpha in (0.5, 0.8):
        for only in (False, True):
            each = partial(_static, calibrator="MinMax", only=only, per_channel=True, smooth=alpha)
            name = f"ort-static-smooth-{alpha}-{'matmuls' if only else 'all'}-per-channel"
            yield name, Method("int8-static", "inc", each)
    for level, form in ((0, "int4-weight"), (4, "int4-weight-int8-activation")):
        common = {"level": level, "bits": 4}
        for block in (32, 128):
            for symmetric in (False, True):
                name = f"ort-rtn-{block}-{'sym' if symmetric else 'asym'}-level{level}"
                each = partial(_nbits, algorithm="rtn", block_size=block, is_symmetric=symmetric, **common)
                yield name, Method(form, "ort", each)
            each = partial(_nbits, algorithm="hqq", block_size=block, **common)
            yield f"ort-hqq-{block}-level{level}", Method(form, "ort", each)
        for name, options in {
            "gptq": {},
            "gptq-act-order": {"actorder": True},
            "gptq-act-order-mse": {"actorder": True, "mse": True},
        }.items():
            for symmetric in (False, True):
                each = partial(_gptq, options=options, is_symmetric=symmetric, **common)
                yield f"ort-{name}-32-{'sym' if symmetric else 'asym'}-level{level}", Method(form, "ort", each)
        each = partial(_nbits, algorithm="k-quant", block_size=32, is_symmetric=False, **common)
        yield f"ort-k-quant-32-level{level}", Method(form, "ort", each)


def _gptq(source: Path, target: Path, sets: Sets, options: dict[str, Any], **common: Any) -> None:
    # `block_size` of the quantizer is the group that shares a scale; that of the configuration, how many columns are
    # quantized before their error is spread, stays 128.
    _nbits(source, target, sets, algorithm="gptq", block_size=32, **common, **options)


# ------------------------------------------------------------------------------- neural-compressor, in both editions


def _inc_awq(source: Path, target: Path, sets: Sets, scheme: str, level: int) -> None:
    from neural_compressor.adaptor.ox_utils.weight_only import awq_quantize

    with as_matmuls(source) as matmuls:
        made = awq_quantize(
            str(matmuls),
            Pairs(sets),
            {},
            num_bits=4,
            group_size=32,
            scheme=scheme,
            n_samples=len(sets),
            accuracy_level=level,
        )
    made.save(str(target))


def _onc_smooth(source: Path, target: Path, sets: Sets, alpha: float) -> None:
    from onnx_neural_compressor.quantization import config, quantize
    from onnxruntime.quantization import QuantFormat

    extra = {"SmoothQuant": True, "SmoothQuantAlpha": alpha}
    chosen = config.StaticQuantConfig(
        _rewindable(sets), per_channel=True, quant_format=QuantFormat.QDQ, extra_options=extra
    )
    quantize(str(preprocessed(source)), str(target), chosen)


def _rewindable(sets: Sets) -> Any:
    from onnx_neural_compressor import data_reader

    return type("Sets", (Reader, data_reader.CalibrationDataReader), {})(sets)


def _compressor_methods() -> Iterator[tuple[str, Method]]:
    for level, form in ((0, "int4-weight"), (4, "int4-weight-int8-activation")):
        for scheme in ("asym", "sym"):
            each = partial(_inc_awq, scheme=scheme, level=level)
            yield f"inc-awq-32-{scheme}-level{level}", Method(form, "inc", each)
    for alpha in (0.5, 0.8):
        yield f"onc-static-smooth-{alpha}-per-channel", Method("int8-static", "onc", partial(_onc_smooth, alpha=alpha))


# ---------------------------------------------------------------------------------------------------------------- Olive


def _olive(source: Path, target: Path, sets: Sets, name: str, **options: Any) -> None:
    import onnx

    # Olive would report its use; these two keep it from that.
    os.environ |= {"OLIVE_DISABLE_TELEMETRY": "1", "CI": "1"}
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    kinds = {
        "rtn": "rtn_quantization:OnnxBlockWiseRtnQuantization",
        "hqq": "hqq_quantization:OnnxHqqQuantization",
        "k-quant": "kquant_quantization:OnnxKQuantQuantization",
        "dynamic": "quantization:OnnxDynamicQuantization",
    }
    place, kind = kinds[name].split(":")
    module = importlib.import_module(f"olive.passes.onnx.{place}")
    with as_matmuls(source) as matmuls:
        made = create_pass_from_dict(getattr(module, kind), options, disable_search=True)
        given = made.run(ONNXModelHandler(str(matmuls)), str(target.parent / "olive"))
    onnx.save(onnx.load(given.model_path), target)
    shutil.rmtree(target.parent / "olive")


def _olive_methods() -> Iterator[tuple[str, Method]]:
    for level, form in ((0, "int4-weight"), (4, "int4-weight-int8-activation")):
        common: dict[str, Any] = {"block_size": 32, "accuracy_level": level}
        for symmetric in (False, True):
            each = partial(_olive, name="rtn", is_symmetric=symmetric, **common)
            yield f"olive-rtn-32-{'sym' if symmetric else 'asym'}-level{level}", Method(form, "olive", each)
        yield f"olive-k-quant-32-level{level}", Method(form, "olive", partial(_olive, name="k-quant", **common))
        yield f"olive-hqq-32-level{level}", Method(form, "olive", partial(_olive, name="hqq", **common))
    each = partial(_olive, name="dynamic", per_channel=True)
    yield "olive-dynamic-per-channel", Method("int8-dynamic", "olive", each)


METHODS: dict[str, Method] = dict(_ort_methods()) | dict(_compressor_methods()) | dict(_olive_methods())
"""By name."""


def load_sets(path: Path) -> Sets:
    """Sets of inputs, in their order, of an `.npz` with entries `INDEX/NAME`."""
    with np.load(path) as stored:
        places = sorted({int(name.split("/")[0]) for name in stored.files})
        return [
            {name.split("/")[1]: stored[name] for name in stored.files if name.split("/")[0] == str(place)}
            for place in places
        ]


def run(name: str, source: Path, out: Path, sets: Sets) -> dict[str, Any]:
    """Make one method's file; what went wrong is part of the answer."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin, answer = time.perf_counter(), {"method": name}
    try:
        earlier = out / name.replace("level4", "level0") / "model.onnx"
        if earlier.parent != folder and earlier.exists():
            _at_level(earlier, folder / "model.onnx", 4)
        else:
            METHODS[name].run(source, folder / "model.onnx", sets)
    except Exception as error:  # noqa: BLE001 — a method that fails is a result of the benchmark
        text = " ".join(str(error).split())
        answer["failure"] = f"{type(error).__name__}: {text}"[:400]
        shutil.rmtree(folder, ignore_errors=True)
    return {**answer, "seconds": time.perf_counter() - begin}


def main() -> None:
    source, out, calibration = map(Path, sys.argv[1:4])
    # What the libraries print goes to stderr; stdout is ours.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sets = load_sets(calibration)
    for name in sys.argv[4:]:
        logging.disable(logging.WARNING)
        print(json.dumps(run(name, source, out, sets)), file=answers, flush=True)


if __name__ == "__main__":
    main()
