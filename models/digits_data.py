"""scikit-learn's handwritten digits, 8 × 8 with one channel: a fixed stratified split, shifts of one pixel, and the
same images as frames of a signal and as short clips."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

SPLIT_SEED = 0
# Where a digit is in each frame of a clip, as `shifted` takes it: from one corner to the opposite one.
CLIP_PATH = ((0, 0), (0, 1), (1, 1), (2, 1), (2, 2))


def digits(split: Literal["train", "held-out"]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 1, 8, 8) float32 in [0, 1] and labels (n,) int64 in 0…9; n = 1437 to train, 360 held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    dataset = load_digits()
    images = (dataset.images / 16).astype(np.float32)[:, None]
    labels = dataset.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])


def shifted(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Move each image by up to one pixel, filling with zeros.

    images: (batch, 1, 8, 8) float32.  offsets: (batch, 2) int in 0…2, of rows and columns; (1, 1) moves nothing.
    Returns (batch, 1, 8, 8) float32.

    >>> image = np.eye(8, dtype=np.float32)[None, None]
    >>> bool((shifted(image, np.array([[1, 1]])) == image).all())
    True
    >>> shifted(image, np.array([[0, 1]]))[0, 0, :3, :3]  # one row down
    array([[0., 0., 0.],
           [1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = (offsets[:, axis, None] + np.arange(8) for axis in (0, 1))
    return padded[np.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def as_images(images: np.ndarray) -> np.ndarray:
    """The images themselves: (n, 1, 8, 8)."""
    return images


def as_frames(images: np.ndarray) -> np.ndarray:
    """The rows of images (n, 1, 8, 8) as steps in time, one feature for each column: (n, 8 features, 8 steps).

    >>> as_frames(np.arange(64).reshape(1, 1, 8, 8))[0, :, 0]
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return np.ascontiguousarray(images[:, 0].swapaxes(1, 2))


def as_clips(images: np.ndarray) -> np.ndarray:
    """Images (n, 1, 8, 8) moved along `CLIP_PATH`, a step a frame: (n, 1, frames, 8, 8).

    >>> clips = as_clips(np.eye(8, dtype=np.float32)[None, None])
    >>> clips.shape, bool((clips[0, 0, 2] == np.eye(8)).all())
    ((1, 1, 5, 8, 8), True)
    """
    return np.stack([shifted(images, np.tile(place, (len(images), 1))) for place in CLIP_PATH], axis=2)


INPUTS = {"pixel_values": as_images, "frames": as_frames, "clip": as_clips}
"""What a network takes, by the name of its input, made of images (n, 1, 8, 8) in [0, 1]."""


def training_batches(batch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield shifted images (batch, 1, 8, 8) float32 and labels (batch,) int64, epoch after epoch without end."""
    (images, labels), random = digits("train"), np.random.default_rng(seed)
    while True:
        order = random.permutation(len(images))
        for chosen in (order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)):
            yield shifted(images[chosen], random.integers(3, size=(batch, 2))), labels[chosen]
