"""The shipped checkpoints open without a network, are trained, and are as good as their cards say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewrite.models.evaluate import held_out_quality

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"
LANGUAGE_MODELS = {"bytegpt": 2.3, "bytellama": 2.2}  # held-out bits per byte, at most
CLASSIFIERS = {"digits-vit": 0.96, "digits-resnet": 0.97}  # held-out accuracy, at least
NAMES = [*LANGUAGE_MODELS, *CLASSIFIERS]
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
    norm = re.compile(r"(ln_|norm)\w*\.(weight|bias|running_mean|running_var)$")
    found = {key: tensor for key, tensor in tensors.items() if norm.search(key)}
    assert found
    for key, tensor in found.items():
        assert tensor.std() > 5e-3, key


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
