"""What an author wrote is what is captured: norms, parametrizations and scales on their own parameters, or an error."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from affine_modules import PRepBN, UnifiedNorm
from families import perturb
from torch import nn
from torch.nn.utils import parametrizations

import rewrite
from rewrite.capture.finish import quiet
from rewrite.capture.parameters import check_parameters
from rewrite.check.reference import evaluate
from rewrite.errors import SourceError, UnsupportedOperatorError
from rewrite.ir.program import Program

# ── Structures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def old(function: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(module)


class Structures(nn.Module):
    """Each structure once, on an image of 3 × 6 × 6."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.volume = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2))
        self.tokens = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8, affine=False))
        self.norm, self.unified = PRepBN(8), UnifiedNorm(8)
        self.new_weight_norm = parametrizations.weight_norm(nn.Linear(8, 8))
        self.old_weight_norm = old(torch.nn.utils.weight_norm, nn.Conv1d(8, 8, 3, padding=1))
        self.new_spectral_norm = parametrizations.spectral_norm(nn.Conv1d(8, 8, 1))
        self.old_spectral_norm = old(torch.nn.utils.spectral_norm, nn.Linear(8, 8))
        self.layer_scale = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem((x - self.pixel_mean) / self.pixel_std)
        x = self.volume(x.unsqueeze(1)).flatten(1, 2).flatten(2)
        x = self.tokens(x).transpose(1, 2)
        x = self.unified(torch.tanh(self.norm(x)))
        x = self.new_weight_norm(torch.tanh(x)).transpose(1, 2)
        x = self.new_spectral_norm(torch.tanh(self.old_weight_norm(x))).transpose(1, 2)
        return x + self.layer_scale * self.old_spectral_norm(torch.tanh(x))


OPERATORS = {"BatchNormalization": 4, "ReduceL2": 2, "Conv": 5, "MatMul": 6, "Sqrt": 1, "Div": 6}
"""Four batch norms, ‖v‖ of two weights, σ = uᵀ(Wv) of two more beside two linear layers, √(v + ε), (x − mean)/std."""


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return perturb(Structures()).eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def exported(module: nn.Module, image: torch.Tensor) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (image,), dynamic_shapes=({0: torch.export.Dim.AUTO},))


def check_structures(program: Program, module: nn.Module, image: torch.Tensor) -> None:
    """Every structure is there on the module's own parameters, bit for bit, and the function is the module's."""
    counted = Counter(node.op_type for node in program.original.graph)
    assert {kind: counted[kind] for kind in OPERATORS} == OPERATORS
    held = {name: value.const_value for name, value in program.original.graph.initializers.items()}
    state = {name: tensor for name, tensor in module.state_dict().items() if "num_batches" not in name}
    assert set(state) <= set(held)
    for name, tensor in state.items():
        assert np.array_equal(held[name].numpy(), tensor.numpy()), name
    # What is no parameter is a number, or the γ = 1 and β = 0 of a batch norm without any.
    others = {name: tensor for name, tensor in held.items() if name not in state and tensor.dtype.is_floating_point()}
    assert all(tensor.size == 1 or len(np.unique(tensor.numpy())) == 1 for tensor in others.values()), others
    with torch.no_grad():
        wanted = module(image).numpy()
    (found,) = evaluate(program.original, {program.inputs[0].name: image.numpy()}).values()
    assert np.abs(found - wanted).max() <= 64 * np.finfo(np.float32).eps * np.abs(wanted).max()


def test_structures_of_a_module(module: nn.Module, image: torch.Tensor) -> None:
    program = rewrite.capture(module, (image,))
    check_structures(program, module, image)
    # Nothing is read or copied: what is captured is the module's memory.
    parameters = dict(module.named_parameters())
    for name in ("stem.0.weight", "new_weight_norm.parametrizations.weight.original1", "old_spectral_norm.weight_orig"):
        held = program.original.graph.initializers[name].const_value.numpy()
        assert np.shares_memory(held, parameters[name].detach().numpy()), name


@pytest.mark.slow
def test_structures_of_an_exported_program_and_of_its_archive(
    module: nn.Module, image: torch.Tensor, tmp_path: Path
) -> None:
    program = exported(module, image)
    check_structures(rewrite.capture(program), module, image)
    torch.export.save(program, tmp_path / "model.pt2")
    check_structures(rewrite.capture(tmp_path / "model.pt2"), module, image)


@pytest.mark.parametrize("family", ["resnet", "wav2vec2"])
def test_structures_of_a_checkpoint(
    family: str, family_program: Callable[[str], Program], family_checkpoint: Callable[[str], Path]
) -> None:
    from safetensors.numpy import load_file

    program = family_program(family)
    stored = load_file(family_checkpoint(family) / "model.safetensors")
    held = {name: value.const_value for name, value in program.original.graph.initializers.items()}
    shared = {name for name in stored if name in held}
    assert all(np.array_equal(stored[name], held[name].numpy()) for name in shared)
    operators = Counter(node.op_type for node in program.original.graph)
    if family == "resnet":
        assert operators["BatchNormalization"] == len([name for name in shared if name.endswith("running_var")]) == 15
    else:
        assert operators["ReduceL2"] == 1
        assert {name for name in held if ".parametrizations.weight.original" in name}


# ── What is not captured ────────────────────────────────────────────────────────────────────────────────────────────


class Normalized(nn.Module):
    """A convolution, and a batch norm used as it is given."""

    def __init__(self, use: Callable[[torch.Tensor, nn.Module], torch.Tensor]) -> None:
        super().__init__()
        self.kernel, self.norm, self.use = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.kernel(x), self.norm)


def test_a_program_exported_in_training_mode_is_refused(image: torch.Tensor) -> None:
    """The exporter writes its batch norms frozen, and would be 1.5 off on a range of 5."""
    training = exported(perturb(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train(), image)
    with pytest.raises(SourceError, match=r"^1 normalizes by the statistics of the batch.*call module.eval\(\) before"):
        rewrite.capture(training)


def test_a_norm_that_always_takes_its_batch_is_refused_if_it_has_statistics(image: torch.Tensor) -> None:
    def batch(x: torch.Tensor, norm: Any) -> torch.Tensor:
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)

    def own(x: torch.Tensor, norm: Any) -> torch.Tensor:
        return nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)

    with pytest.raises(SourceError, match="normalizes by the statistics of the batch"):
        rewrite.capture(perturb(Normalized(batch)), (image,))
    # Without statistics of its own it is written out, and then it is no batch norm with constants.
    module = perturb(Normalized(own)).eval()
    program = rewrite.capture(module, (image,))
    norm = next(node for node in program.original.graph if node.op_type == "BatchNormalization")
    assert not any(value.is_initializer() for value in norm.inputs[3:])
    with torch.no_grad():
        wanted = module(image).numpy()
    (found,) = evaluate(program.original, {program.inputs[0].name: image.numpy()}).values()
    assert np.abs(found - wanted).max() <= 64 * np.finfo(np.float32).eps * np.abs(wanted).max()


def test_an_orthogonal_parametrization_is_refused_with_what_to_do(image: torch.Tensor) -> None:
    """matrix_exp, a solve and Householder products have no operator in ONNX."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), parametrizations.orthogonal(nn.Linear(64, 64)))
    with pytest.raises(UnsupportedOperatorError, match=r'remove_parametrizations\(.*"2".*"weight"\)'):
        rewrite.capture(module, (image,))
    torch.nn.utils.parametrize.remove_parametrizations(module[2], "weight")
    assert rewrite.capture(module, (image,)).original.graph.initializers["2.weight"].shape == ir.Shape([64, 64])


# ── Exporters that change parameters ────────────────────────────────────────────────────────────────────────────────


class Pair(nn.Module):
    """Two convolutions of one shape, a batch norm, and a layer that nothing needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
        self.spare = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.spare(x.mean((2, 3)))
        return self.second(torch.relu(self.norm(self.first(x))))


Spoiled = tuple[torch.export.ExportedProgram, ir.Model]


@pytest.fixture(scope="module")
def pair(image: torch.Tensor) -> Spoiled:
    """A program, and what the exporter makes of it."""
    with quiet():
        program = exported(perturb(Pair()).eval(), image)
        written = torch.onnx.export(program, args=(), optimize=False, opset_version=23, dynamo=True, verbose=False)
    assert written is not None
    return program, written.model


def refused(pair: Spoiled, spoil: Callable[[ir.Graph], None], reason: str) -> None:
    """An exporter whose result `spoil` has been at is an error."""
    program, model = pair[0], pair[1].clone()
    spoil(model.graph)
    with pytest.raises(SourceError, match=reason):
        check_parameters(model, program)


def test_what_the_exporter_writes_passes(pair: Spoiled) -> None:
    program, model = pair
    check_parameters(model, program)
    assert not any(name.startswith("spare") for name in model.graph.initializers)


def test_a_copy_of_a_parameter_passes(pair: Spoiled) -> None:
    program, model = pair[0], pair[1].clone()
    copied(model.graph, "first.weight", lambda tensor: tensor.clone())
    check_parameters(model, program)


def copied(graph: ir.Graph, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = graph.initializers[name].const_value
    graph.initializers[name].const_value = type(tensor)(change(tensor.raw.detach()), name=name)


def test_a_weight_under_the_name_of_another_is_an_error(pair: Spoiled) -> None:
    def collide(graph: ir.Graph) -> None:
        graph.initializers["second.weight"].const_value = graph.initializers["first.weight"].const_value

    refused(pair, collide, r"another tensor under the name of the parameter second\.weight")


def test_a_batch_norm_folded_under_the_name_of_its_kernel_is_an_error(pair: Spoiled) -> None:
    state = pair[0].state_dict
    scale = (state["norm.weight"] / torch.sqrt(state["norm.running_var"] + 1e-5)).detach()

    def fold(graph: ir.Graph) -> None:
        copied(graph, "first.weight", lambda tensor: tensor * scale[:, None, None, None])

    refused(pair, fold, r"another tensor under the name of the parameter first\.weight")


def test_a_norm_that_is_left_out_is_an_error(pair: Spoiled) -> None:
    def leave_out(graph: ir.Graph) -> None:
        norm = next(node for node in graph if node.op_type == "BatchNormalization")
        norm.outputs[0].replace_all_uses_with(norm.inputs[0])

    refused(pair, leave_out, r"depend on the parameter norm\.bias \(and 3 more\), and what the exporter")


def test_a_capture_asks(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an exporter does to a parameter ends the capture, and names the parameter."""
    original = torch.onnx.export

    def export(*args: Any, **options: Any) -> Any:
        written = original(*args, **options)
        copied(written.model.graph, "weight", lambda tensor: tensor * 2.0)
        return written

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(SourceError, match="another tensor under the name of the parameter weight"):
        rewrite.capture(nn.Conv2d(3, 4, 3), (image,))
    assert torch.onnx.export is export
