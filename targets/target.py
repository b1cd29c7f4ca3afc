"""What a target is, and the session file it writes beside a model.

`session.json`, beside `model.onnx`, is how the model is meant to be opened:

    target                    the target's name
    providers                 ONNX Runtime's execution providers in order, each as [name, options]
    graph_optimization_level  "disable_all", "basic", "extended", "layout" or "all"
    config                    session configuration entries, key to string value
    numerics                  what these options may change in the numbers, in words; empty where nothing

`open_session` opens a folder by it. The runtime's own options stay the user's to set: `open_session(folder,
intra_op_num_threads=4)`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewrite.errors import RequestError, SourceError, UnsupportedOperatorError
from rewrite.ir.edit import Editor
from rewrite.ir.program import Program, save_model

if TYPE_CHECKING:
    import onnxruntime

MODEL_FILE, SESSION_FILE = "model.onnx", "session.json"
MAXIMUM_OPSET, MAXIMUM_IR = 26, 13
LEVELS = {
    "disable_all": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}

MOVES = frozenset(
    {"Cast", "Clip", "Concat", "Constant", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze", "SimplifiedLayerNormalization", "LayerNormalization", "Shape", "Size"}
)
"""All that ONNX Runtime 1.31 runs on bfloat16 on a CPU: data movement and two norms."""


class Target(ABC):
    """One runtime on one device."""

    name: str
    device: str
    dtypes: tuple[ir.DataType, ...]
    """The floating types it can run a network in, the usual one first."""
    steps: tuple[Callable[[Editor], None], ...]
    """The lowering, in order; each edits a clone."""
    divisions: tuple[Callable[[Editor], None], ...] = ()
    """Those of `steps` that take weights apart: codes cannot be, so it is done before anything is quantized."""
    costs: Mapping[str, float] = {}
    """What its kernels take, by the names of the passes' options (`norm_ns` of center-residual): nanoseconds for each
    number of the value they work on. Where a pass has such an option and it was not set, it decides by these."""
    multiply_ns: Mapping[tuple[int, int], float] = {}
    """What an entry of a matrix takes where one row is multiplied with it, by bits and accuracy level (floating point
    is 0 and 0); empty where nothing was measured."""
    kernels: frozenset[str] = frozenset()
    """What it multiplies in few bits with, by the names of `rewrite.quantize_rule`."""

    @abstractmethod
    def lacks(self, dtype: ir.DataType, node: ir.Node) -> bool:
        """Whether the runtime has no kernel for `node` on operands of `dtype`."""

    @abstractmethod
    def session(self) -> dict[str, Any]:
        """The content of `session.json`."""

    def lower(self, program: Program, dtype: str | None = None) -> ir.Model:
        """A lowered clone of the program's model; the program stays as it is.

        `dtype` asks for the floating type of the weights; it is that of the capture, since norms and masks are written
        differently in half precision and only the source knows how.

        Raises:
            UnsupportedOperatorError: an operator has no kernel for its dtype here, or the opset is too new.
            RequestError: the program was captured in another dtype than `dtype`.
        """
        held = _weight_dtype(program.model)
        if dtype is not None and held is not None and held != dtype:
            raise RequestError(
                f"the weights are {held}, not {dtype}", where=program.source, remedy=f"capture with dtype={dtype!r}"
            )
        model = program.model.clone()
        opset = model.opset_imports.get("", 0)
        if opset > MAXIMUM_OPSET:
            raise UnsupportedOperatorError(
                f"opset {opset}; {self.name} runs at most {MAXIMUM_OPSET}",
                where=program.source,
                remedy="export at opset 23",
            )
        self.check_kernels(model)
        editor = Editor(model, self.name)
        for step in self.steps:
            step(editor)
        editor.clean()
        model.ir_version = min(max(model.ir_version or 10, 10), MAXIMUM_IR)
        return model

    def divide_weights(self, model: ir.Model) -> None:
        """Take the weights of `model` apart in place, as its lowering would in floating point."""
        editor = Editor(model, self.name)
        for step in self.divisions:
            step(editor)
        editor.clean()

    def check_kernels(self, model: ir.Model) -> None:
        """Refuse a model with an operator this target cannot run."""
        for node in model.graph.all_nodes():
            dtypes = [value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.dtype]
            for dtype in dtypes:
                if dtype.is_floating_point() and node.domain == "" and self.lacks(dtype, node):
                    raise UnsupportedOperatorError(
                        f"{self.name} has no {dtype.name.lower()} kernel for {node.op_type}",
                        where=f"node {node.name or node.outputs[0].name}",
                        remedy="convert with --dtype float32",
                    )

    def write_session(self, folder: str | Path) -> None:
        """Write `session.json` beside a model."""
        (Path(folder) / SESSION_FILE).write_text(json.dumps(self.session(), indent=2) + "\n")

    def save(self, program: Program, folder: str | Path) -> ir.Model:
        """Lower and write `model.onnx`, its weights and `session.json` into `folder`; returns the lowered model."""
        model = self.lower(program)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder / MODEL_FILE)
        self.write_session(folder)
        return model


def _weight_dtype(model: ir.Model) -> str | None:
    """The name of the floating type that most weights are in, by elements; None without weights."""
    sizes: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            name = tensor.dtype.numpy().name
            sizes[name] = sizes.get(name, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _described(folder: Path) -> dict[str, Any]:
    path = folder / SESSION_FILE
    if not path.is_file():
        raise SourceError(f"no {SESSION_FILE}", where=str(folder), remedy="give a folder written by `rewrite convert`")
    return json.loads(path.read_text())


def session_options(
    folder: str | Path, *, config: Mapping[str, str] | None = None, **options: Any
) -> onnxruntime.SessionOptions:
    """ONNX Runtime's SessionOptions for the model in `folder`.

    `options` are attributes of SessionOptions (`intra_op_num_threads=1`); `config` adds or replaces configuration
    entries.
    """
    import onnxruntime

    described = _described(Path(folder))
    made = onnxruntime.SessionOptions()
    level = LEVELS[described["graph_optimization_level"]]
    made.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for key, content in {**described["config"], **(config or {})}.items():
        made.add_session_config_entry(key, content)
    for key, content in options.items():
        if not hasattr(made, key):
            raise RequestError(f"SessionOptions has no {key}", remedy="see ONNX Runtime's SessionOptions")
        setattr(made, key, content)
    return made


def open_session(
    folder: str | Path, *, config: Mapping[str, str] | None = None, providers: list | None = None, **options: Any
) -> onnxruntime.InferenceSession:
    """Open the model in `folder` as its `session.json` says; see `session_options`. `providers` replaces the providers.

    Where the file sets `session.set_denormal_as_zero`, the first session of a process also sets it for the thread that
    opens it: numbers below 1e-38 become zero in that thread from then on, in NumPy too. What compares numbers opens
    its sessions in a process of its own, or gives `config={"session.set_denormal_as_zero": "0"}`.
    """
    import onnxruntime

    folder = Path(folder)
    chosen = providers or [(name, given) for name, given in _described(folder)["providers"]]
    wanted = [provider if isinstance(provider, str) else provider[0] for provider in chosen]
    absent = [name for name in wanted if name not in onnxruntime.get_available_providers()]
    if absent:
        raise RequestError(
            f"this ONNX Runtime has no {absent[0]}", where=str(folder), remedy="install the package that has it"
        )
    _measure_float_limits()
    made = session_options(folder, config=config, **options)
    return onnxruntime.InferenceSession(folder / MODEL_FILE, made, providers=chosen)


def _measure_float_limits() -> None:
    """Let NumPy measure its float types now: once denormals are flushed it would warn that they are."""
    for kind in (np.float16, np.float32, np.float64):
        np.finfo(kind)
