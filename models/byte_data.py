"""The sources of Python's standard library as bytes, split by whole files into training and held-out.

`python -m rewrite.models.byte_data` prints the size and digest of each part, which vary with the Python version.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

CONTEXT = 256
"""Bytes that the language models see at most."""

Split = Literal["train", "held-out"]

# Character tables and help topics: generated text that is far easier to predict than code.
GENERATED = {"encodings", "pydoc_data"}
# Tests are larger than all the rest, and not every distribution of Python ships them.
TESTS = {"test", "tests", "idle_test"}


def is_held_out(path: str) -> bool:
    """Say whether a file is held out, by a hash of its path: about one file in ten, whatever the Python version.

    path: relative to the standard library, with forward slashes.

    >>> is_held_out("argparse.py"), is_held_out("calendar.py")
    (False, True)
    """
    return hashlib.sha256(path.encode()).digest()[0] < 26


def sources() -> Iterator[tuple[str, bytes]]:
    """Yield (path relative to the standard library, content) of every source file, in order of the path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
        parts = path.removesuffix(".py").split("/")
        if parts[0] in sys.stdlib_module_names - GENERATED and not TESTS.intersection(parts):
            yield path, (root / path).read_bytes()


def corpus(split: Split) -> np.ndarray:
    """The files of one split, joined: (n,) uint8."""
    parts = [content for path, content in sources() if is_held_out(path) == (split == "held-out")]
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def windows(data: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut windows of bytes and, for each byte, the byte that follows it.

    data: (n,) uint8.  starts: (batch,) int, each at most n − context − 1.
    Returns inputs and targets, both (batch, context) int64.

    >>> windows(np.array([5, 6, 7, 8], dtype=np.uint8), np.array([0, 1]), 2)
    (array([[5, 6],
           [6, 7]]), array([[6, 7],
           [7, 8]]))
    """
    cut = data[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return cut[:, :-1], cut[:, 1:]


def training_batches(batch: int, context: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield windows of the training bytes at uniformly drawn offsets, without end: two (batch, context) int64."""
    data, random = corpus("train"), np.random.default_rng(seed)
    while True:
        yield windows(data, random.integers(len(data) - context, size=batch), context)


if __name__ == "__main__":
    for split in ("train", "held-out"):
        content = corpus(split)
        print(f"{split}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
