"""Every family, captured from its checkpoint folder, computes in ONNX Runtime what torch computes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from capture_comparison import noise_ratio
from families import FAMILIES, VOCABULARY

import rewrite
from rewrite.capture.safetensors_file import StoredTensor
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor

SIZES = {"unpadded": (2, 9), "padded": (3, 12)}
SAMPLES = 16000
"""The length of sound that a checkpoint is captured for."""
TIED = {"gpt2", "opt", "bloom", "qwen2", "gemma2", "cohere", "falcon", "falcon_parallel", "falcon_sequential"}


@pytest.fixture(scope="module")
def captured(family_checkpoint: Callable[[str], Path]) -> Callable[[str], Program]:
    programs: dict[str, Program] = {}

    def capture(name: str) -> Program:
        if name not in programs:
            programs[name] = rewrite.capture(family_checkpoint(name))
        return programs[name]

    return capture


def _inputs(examples: dict[str, torch.Tensor], batch: int, sequence: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    if "pixel_values" in examples:
        return {"pixel_values": torch.randn(batch, *examples["pixel_values"].shape[1:], generator=generator)}
    if "input_values" in examples:
        return {"input_values": torch.randn(batch, SAMPLES, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    if (batch, sequence) == SIZES["padded"]:
        mask[0, :4] = 0
        mask[1, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def _softmax_in_its_own_precision() -> Iterator[None]:
    """Eager attention takes its softmax in float32 whatever the model's dtype; in float64 a masked row becomes NaN."""
    original = torch.nn.functional.softmax

    def softmax(values: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_: object) -> torch.Tensor:
        return original(values, dim=dim, dtype=None if values.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = original


def _session(program: Program, folder: Path) -> onnxruntime.InferenceSession:
    program.save(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", FAMILIES)
def test_family_computes_what_torch_computes(name: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured(name)
    model, examples = FAMILIES[name]()
    precise = copy.deepcopy(model).double()
    if name == "mixtral":
        # The grouped kernel has no float64.
        precise.set_experts_implementation("eager")
    longest = max(max(parameter.shape, default=1) for parameter in model.parameters())
    session = _session(program, tmp_path)
    for batch, sequence in SIZES.values():
        inputs = _inputs(examples, batch, sequence)
        results = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eager = model(**inputs)
            with _softmax_in_its_own_precision():
                reference = precise(**wide)
        for output, actual in zip(session.get_outputs(), results):
            e, r = eager[output.name].numpy(), reference[output.name].double().numpy()
            if "attention_mask" in inputs and actual.ndim == 3:
                # What a padded position computes is not defined: kernels disagree on a row that attends to nothing.
                real = inputs["attention_mask"].numpy().astype(bool)
                actual, e, r = actual[real], e[real], r[real]
            assert noise_ratio(actual, e, r) <= longest**0.5, output.name


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_described_and_shaped(name: str, captured: Callable[[str], Program]) -> None:
    program = captured(name)
    graph = program.model.graph
    assert program.model.opset_imports[""] == 23
    assert not program.model.functions
    kinds = {i.name: (i.kind, i.low, i.shape[0]) for i in program.inputs}
    if "pixel_values" in kinds:
        assert kinds == {"pixel_values": ("image", None, "batch")}
        assert [isinstance(d, int) for d in program.inputs[0].shape] == [False, True, True, True]
    elif "input_values" in kinds:
        assert kinds == {"input_values": ("number", None, "batch")}
        assert program.inputs[0].shape[1:] == (SAMPLES,)
    else:
        assert kinds == {
            "input_ids": ("token_ids", 0, "batch"),
            "attention_mask": ("attention_mask", 0, "batch"),
        }
        assert all(i.shape == ("batch", "sequence") for i in program.inputs)
        assert [i.high for i in program.inputs] == [VOCABULARY, 2]
    for node in graph:
        assert node.op_type not in {"Constant", "Identity", "CastLike", "SplitToSequence", "SequenceAt"}
        for value in node.outputs:
            assert value.shape is not None, value.name
            assert value.dtype is not None, value.name
            # Proofs and passes reason about the channels; only how many rows an expert gets is unknown.
            if value.dtype.is_floating_point() and len(value.shape) >= 2:
                assert isinstance(value.shape[-1], int) or value.shape[-1].value, value
    named = [node.name for node in graph]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_weights_stay_on_disk(name: str, captured: Callable[[str], Program]) -> None:
    model, _ = FAMILIES[name]()
    initializers = captured(name).model.graph.initializers
    parameters = dict(model.named_parameters())
    bound = [n for n, v in initializers.items() if isinstance(v.const_value, StoredTensor | MaterializedTensor)]
    assert set(bound) <= set(dict(model.named_parameters(remove_duplicate=False))) | set(dict(model.named_buffers()))
    # Pooling heads and mask tokens that no output depends on are dead; nothing else is missing.
    lost = set(parameters) - set(bound)
    assert all("mask_token" in n or "token_type" in n or n == "masked_spec_embed" for n in lost), lost
    for n in bound:
        stored = initializers[n].const_value
        expected = (parameters.get(n) if n in parameters else model.state_dict()[n]).detach().numpy()
        assert np.array_equal(stored.numpy(), expected), n


@pytest.mark.parametrize("name", sorted(TIED))
def test_tied_weight_is_one_initializer(name: str, captured: Callable[[str], Program]) -> None:
    model, _ = FAMILIES[name]()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    initializers = captured(name).model.graph.initializers
    tables = [v for v in initializers.values() if v.shape == ir.Shape([VOCABULARY, 48])]
    assert len(tables) == 1
    assert {use.node.op_type for use in tables[0].uses()} >= {"Gather"}
    assert len(tables[0].uses()) == 2


def test_batch_normalization_survives_capture(captured: Callable[[str], Program]) -> None:
    model, _ = FAMILIES["resnet"]()
    layers = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert layers > 10
    assert sum(node.op_type == "BatchNormalization" for node in captured("resnet").model.graph) == layers


def test_experts_are_stacked_as_expressions(captured: Callable[[str], Program]) -> None:
    tensors = [v.const_value for n, v in captured("mixtral").model.graph.initializers.items() if "experts" in n]
    assert sum(isinstance(tensor, MaterializedTensor) for tensor in tensors) == 4


def test_longest_sequence_is_recorded(captured: Callable[[str], Program]) -> None:
    assert captured("gpt2").model.metadata_props["rewrite.maximum.sequence"] == "64"
