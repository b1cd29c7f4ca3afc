"""The shipped checkpoints open without a network, are trained, and are as good as their cards say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import rewrite
from rewrite.capture.archive import refuse_code
from rewrite.models import reference
from rewrite.models.archive import save_archive
from rewrite.models.digits_transformers import (
    ProgressiveNorm,
    UnifiedNorm,
    VisionTransformer,
    progressive_norms,
    reparameterized,
)
from rewrite.models.evaluate import held_out_quality
from rewrite.models.reference import load

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"
LANGUAGE_MODELS = {"bytegpt": 2.3, "bytellama": 2.2}  # held-out bits per byte, at most
CLASSIFIERS = {"digits-vit": 0.96, "digits-resnet": 0.97}  # held-out accuracy, at least
# Plain modules: held-out accuracy, at least, and their BatchNormalization nodes.
CONVOLUTIONAL = {
    "digits-repvgg": (0.97, 15),
    "digits-densenet": (0.97, 19),
    "digits-mobilenet": (0.97, 16),
    "digits-conv1d": (0.97, 6),
    "digits-conv3d": (0.97, 6),
}
TRANSFORMERS = {"digits-prepbn-vit": (0.95, 7), "digits-un-vit": (0.95, 0)}
DECODER = {"digits-decoder": (0.02, 5)}  # held-out squared error, at most
MODULES = {**CONVOLUTIONAL, **TRANSFORMERS, **DECODER}
NAMES = [*LANGUAGE_MODELS, *CLASSIFIERS, *MODULES]
SIZE_LIMIT_BYTES = 25e6
SLICE_WINDOWS = 96


@pytest.fixture(autouse=True)
def one_thread():
    """Run torch on one thread, as the training did, and give back the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quality_on_card(name: str) -> float:
    """The number that the card gives as `Held-out bits per byte: **1.23**` or `Held-out accuracy: **0.99**`."""
    found = re.search(r"^Held-out [a-z ]+: \*\*([\d.]+)\*\*", (CHECKPOINTS / name / "README.md").read_text(), re.M)
    assert found, f"{name}/README.md has no line 'Held-out …: **number**'"
    return float(found[1])


@pytest.mark.parametrize("name", NAMES)
def test_card_gives_data_command_and_seed(name):
    card = (CHECKPOINTS / name / "README.md").read_text()
    script = f"train_{name.replace('-', '_')}"
    assert f"python -m rewrite.models.{script} --out models/checkpoints/{name} --seed " in card
    assert (CHECKPOINTS.parent / f"{script}.py").is_file()
    assert "## Data" in card


def test_checkpoints_fit_the_size_limit():
    assert sorted(folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir()) == sorted(NAMES)
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*")) <= SIZE_LIMIT_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_float32_and_finite(name):
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied to the embedding
    for key, tensor in tensors.items():
        assert tensor.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32), key
        assert tensor.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_is_trained(name):
    """No norm has its initial scale, shift or statistics, which would hide a rewrite that forgets them."""
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    norm = re.compile(r"(ln_|norm)\w*\.(weight|bias|running_mean|running_var|running_square)$")
    found = {key: tensor for key, tensor in tensors.items() if norm.search(key)}
    assert found
    for key, tensor in found.items():
        assert tensor.std() > 5e-3, key
        if key.endswith("running_var"):
            assert (tensor > 0).all(), key


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_bits_per_byte_on_a_slice_of_the_held_out_files(name):
    measure, value = held_out_quality(CHECKPOINTS / name, SLICE_WINDOWS)
    assert measure == "bits per byte"
    assert value < LANGUAGE_MODELS[name]
    assert quality_on_card(name) < LANGUAGE_MODELS[name]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_accuracy_is_that_of_the_card(name):
    measure, value = held_out_quality(CHECKPOINTS / name)
    assert measure == "accuracy"
    assert value >= CLASSIFIERS[name]
    assert abs(value - quality_on_card(name)) <= 1.5 / 360  # one image may sit on the edge between two classes


@pytest.mark.parametrize("name", MODULES)
def test_quality_of_a_plain_module_is_that_of_the_card(name):
    measure, value = held_out_quality(CHECKPOINTS / name)
    bound, _ = MODULES[name]
    if name in DECODER:
        assert measure == "squared error"
        assert value <= bound
        assert abs(value - quality_on_card(name)) <= 1e-4
    else:
        assert measure == "accuracy"
        assert value >= bound
        assert abs(value - quality_on_card(name)) <= 1.5 / 360


@pytest.mark.parametrize("name", MODULES)
def test_archive_is_safe_to_load_and_computes_what_the_module_computes(name):
    network, module = load(CHECKPOINTS / name)
    path = CHECKPOINTS / name / "model.pt2"
    refuse_code(path)
    content = path.read_bytes()
    assert str(CHECKPOINTS.parent).encode() not in content
    assert b"site-packages" not in content
    inputs = network.example(batch=5)
    with torch.no_grad():
        expected = module(**inputs)
        assert torch.equal(torch.export.load(path).module()(**inputs), expected)
    assert expected.std() > 0


def test_archive_is_made_again_of_the_weights(tmp_path):
    shutil.copy(CHECKPOINTS / "digits-decoder" / "model.safetensors", tmp_path)
    network, module = load(tmp_path)
    save_archive(module, network, tmp_path / "model.pt2")
    made, shipped = (torch.export.load(folder / "model.pt2") for folder in (tmp_path, CHECKPOINTS / "digits-decoder"))
    inputs = network.example(batch=3)
    with torch.no_grad():
        assert torch.equal(made.module()(**inputs), shipped.module()(**inputs))


def test_weights_that_name_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="none of digits-repvgg"):
        load(tmp_path)


def test_progressive_norm_becomes_the_norm_that_is_shipped():
    torch.manual_seed(0)
    model = VisionTransformer(ProgressiveNorm)
    images = torch.rand(4, 1, 8, 8)
    model(images)  # running statistics
    with pytest.raises(ValueError, match="λ is not 0"):
        reparameterized(model)
    for norm in progressive_norms(model):
        norm.share = 0.0
    with torch.no_grad():
        assert torch.equal(reparameterized(model)(images), model.eval()(images))


def test_unified_norm_leaves_outliers_out_and_smooths_the_rest():
    torch.manual_seed(0)
    norm = UnifiedNorm(3, warmup=8)
    for _ in range(12):
        norm(torch.randn(8, 5, 3))
    calm = norm.running_square.clone()
    x = torch.randn(8, 5, 3, requires_grad=True)
    spike = norm(100 * x)
    assert norm.outliers >= 1
    assert torch.allclose(spike.square().mean((0, 1)), torch.ones(3), atol=1e-3)  # by its own quadratic mean
    spike.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    before = norm.outliers
    smoothed = norm(torch.randn(8, 5, 3))
    assert norm.outliers >= before
    assert smoothed.isfinite().all()
    norm.eval()
    assert torch.allclose(norm(x), x / (norm.running_square + norm.eps).sqrt())
    assert (norm.running_square > calm).any()


@pytest.mark.parametrize(
    "name", [name if name == "digits-prepbn-vit" else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
)
def test_capture_of_the_folder_keeps_every_batch_norm(name, tmp_path):
    program = rewrite.capture(CHECKPOINTS / name)
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("BatchNormalization") == MODULES[name][1]
    ir.save(program.model, tmp_path / "model.onnx")
    measure, value = held_out_quality(CHECKPOINTS / name)
    captured_measure, captured_value = held_out_quality(tmp_path)
    assert captured_measure == measure
    assert captured_value == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_factory_gives_the_shipped_network(name):
    module, inputs = getattr(reference, name.replace("-", "_"))()
    assert not module.training
    with torch.no_grad():
        assert torch.equal(module(**inputs), load(CHECKPOINTS / name)[1](**inputs))


@pytest.mark.slow
def test_factory_is_a_source():
    program = rewrite.capture("rewrite.models.reference:digits_un_vit")
    assert [(given.name, given.shape) for given in program.inputs] == [("pixel_values", ("batch", 1, 8, 8))]


def test_bare_name_is_refused():
    """`import models` would claim the name under which other projects' checkpoints were pickled."""
    root = CHECKPOINTS.parents[1]
    outcome = subprocess.run(
        [sys.executable, "-c", "import models"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode != 0
    assert "import rewrite.models" in outcome.stderr
