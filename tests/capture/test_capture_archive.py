"""`.pt2` archives: honest ones are captured, crafted ones are refused before torch opens them."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import rewrite
from rewrite.capture.archive import check_graph, check_pickle
from rewrite.errors import SourceError, UnsafeSourceError


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.linear(x.reshape(x.shape[0], -1)).relu()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "small.pt2"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            Small().eval(), (torch.randn(3, 2, 2),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)
        )
        torch.export.save(exported, path)
    return path


class Trap:
    """What an attacker pickles: unpickling makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def _rewritten(archive: Path, target: Path, change: Callable[[str, bytes], bytes], **extra: bytes) -> Path:
    """`archive` with members changed, and others added."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as result:
        root = source.namelist()[0].split("/")[0]
        for name in source.namelist():
            result.writestr(name, change(name, source.read(name)))
        for name, content in extra.items():
            result.writestr(f"{root}/{name}", content)
    return target


def _refused(path: Path, trap: Path) -> None:
    with pytest.raises(UnsafeSourceError) as caught:
        rewrite.capture(path)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_honest_archive_is_captured(archive: Path) -> None:
    program = rewrite.capture(archive)
    assert [(i.name, i.shape) for i in program.inputs] == [("x", ("batch", 2, 2))]
    assert [value.name for value in program.model.graph.outputs] == ["scores"]


def test_trap_works_when_it_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_sample_inputs(archive: Path, tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "executed"
    saved = io.BytesIO()
    torch.save(Trap(trap), saved, pickle_protocol=max(protocol, 2))
    bare = pickle.dumps(Trap(trap), protocol=protocol)
    for number, content in enumerate((saved.getvalue(), bare)):
        crafted = _rewritten(
            archive, tmp_path / f"{number}.pt2", lambda n, c, new=content: new if "sample_inputs" in n else c
        )
        _refused(crafted, trap)


def test_pickled_weight(archive: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            table = json.loads(content)
            next(iter(table["config"].values()))["use_pickle"] = True
            return json.dumps(table).encode()
        return pickle.dumps(Trap(trap), protocol=0) if name.endswith("weight_0") else content

    _refused(_rewritten(archive, tmp_path / "crafted.pt2", change), trap)


def test_custom_object(archive: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("model_constants_config.json"):
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"k": entry}}).encode()
        return content

    member = {"data/constants/opaque_obj_0": pickle.dumps(Trap(trap))}
    _refused(_rewritten(archive, tmp_path / "crafted.pt2", change, **member), trap)


@pytest.mark.parametrize("member", ["data/aotinductor/model/kernel.so", "data/weights/code.py", "other.bin"])
def test_member_of_an_unknown_kind(archive: Path, tmp_path: Path, member: str) -> None:
    crafted = _rewritten(archive, tmp_path / "crafted.pt2", lambda _, c: c, **{member: b"x"})
    _refused(crafted, tmp_path / "executed")


def _graph(archive: Path) -> dict:
    with zipfile.ZipFile(archive) as source:
        return json.loads(source.read(next(n for n in source.namelist() if "models/" in n)))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "Symbol('s0').__class__",
        "[x for x in ()]",
        "open('f')",
        "Symbol('s0; x')",
        "(",
    ],
)
def test_symbolic_size_that_is_no_arithmetic(archive: Path, expression: str) -> None:
    program = _graph(archive)
    check_graph(program, "graph")
    program["graph_module"]["graph"]["sym_int_values"]["s"] = {"as_expr": {"expr_str": expression, "hint": None}}
    with pytest.raises(UnsafeSourceError):
        check_graph(program, "graph")


@pytest.mark.parametrize("target", ["torch.hub.load", "torch.os.system", "_operator.methodcaller", "math.__loader__"])
def test_target_that_is_no_operator(archive: Path, target: str) -> None:
    program = _graph(archive)
    program["graph_module"]["graph"]["nodes"][0]["target"] = target
    with pytest.raises(UnsafeSourceError, match=r"no operator"):
        check_graph(program, "graph")


def test_tree_that_imports(archive: Path) -> None:
    program = _graph(archive)
    spec = program["graph_module"]["module_call_graph"][0]["signature"]
    context = {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    spec["out_spec"] = json.dumps([1, tree])
    with pytest.raises(UnsafeSourceError, match=r"defaultdict"):
        check_graph(program, "graph")


def test_guard_in_python(archive: Path) -> None:
    program = _graph(archive)
    program["guards_code"] = ["L['x'].size()[0] <= 64"]
    check_graph(program, "graph")
    program["guards_code"] = ["__import__('os')"]
    with pytest.raises(UnsafeSourceError, match=r"guard"):
        check_graph(program, "graph")


def test_every_pickle_of_tensors_passes() -> None:
    for value in (torch.zeros(2), (torch.ones(3, dtype=torch.int64),), [torch.zeros(2, dtype=torch.bfloat16)]):
        saved = io.BytesIO()
        torch.save(value, saved)
        with zipfile.ZipFile(saved) as source:
            check_pickle(source.read(next(n for n in source.namelist() if n.endswith("data.pkl"))), "sample")


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("not a zip file")
    with pytest.raises(SourceError, match=r"not a \.pt2 archive"):
        rewrite.capture(tmp_path / "text.pt2")


def test_captured_archive_computes_what_the_module_computes(archive: Path, tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    program = rewrite.capture(archive)
    program.save(tmp_path / "model.onnx")
    torch.manual_seed(0)
    module = Small()
    x = torch.arange(20, dtype=torch.float32).reshape(5, 2, 2) / 16
    result = ReferenceEvaluator(onnx.load(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})[0]
    expected = module(x)["scores"].detach().numpy()
    # One dot product of four terms and a bias: five roundings of terms no larger than the result's bound.
    bound = 5 * np.finfo(np.float32).eps * (np.abs(x.numpy()).max() * 4 + 1)
    assert np.abs(result - expected).max() <= bound
