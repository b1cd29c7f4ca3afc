"""Inputs for a captured network: made up from its signature, or given as an `.npz` and validated."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rewrite.errors import InputsError
from rewrite.ir.program import Input, signature

SIZES = ((1, 7), (2, 16), (3, 33))
"""(batch, sequence) of the random inputs; odd sizes, so that a swapped or merged axis shows."""

_MAXIMUM = "rewrite.maximum."
_IMAGE_SIZE = 32


def generate_inputs(
    model: ir.Model, seed: int = 0, *, sizes: Sequence[tuple[int, int]] | None = None
) -> list[dict[str, np.ndarray]]:
    """Several sets of inputs: random ones of each size, then edge cases; the same for the same seed.

    Edge cases: one token, the lowest and the highest id everywhere, attention masks padded on the left and on the
    right, an all-zero image. A dynamic dimension has one size over all inputs; `rewrite.maximum.<dimension>` caps it.
    """
    inputs = signature(model)
    maxima = maxima_of(model)
    cases: list[tuple[tuple[int, int], str]] = [(size, "random") for size in (SIZES if sizes is None else sizes)]
    kinds = {given.kind for given in inputs}
    batch, length = cases[0][0] if len(cases) == 1 else cases[1][0]
    if kinds & {"token_ids", "position_ids"}:
        cases.append(((1, 1), "random"))
    if "token_ids" in kinds:
        cases += [((batch, length), "lowest"), ((batch, length), "highest")]
    if "attention_mask" in kinds:
        cases += [((batch, length), "left"), ((batch, length), "right")]
    if "image" in kinds:
        cases.append(((1, 1), "zero"))
    made, seen = [], set()
    for index, (size, case) in enumerate(cases):
        rng = np.random.default_rng([seed, index])
        shapes = {given.name: _shape(given, size, maxima) for given in inputs}
        if (key := (case, tuple(sorted(shapes.items())))) in seen:
            continue
        seen.add(key)
        made.append({given.name: _array(given, shapes[given.name], case, rng) for given in inputs})
    return made


def maxima_of(model: ir.Model) -> dict[str, int]:
    """The largest size of each named dimension that has one."""
    return {
        key.removeprefix(_MAXIMUM): int(value)
        for key, value in model.metadata_props.items()
        if key.startswith(_MAXIMUM)
    }


def _shape(given: Input, size: tuple[int, int], maxima: Mapping[str, int]) -> tuple[int, ...]:
    """Axis 0 is the batch where it is dynamic; other dynamic axes have the sequence's size (an image's: 32)."""
    batch, length = size
    shape = []
    for axis, dimension in enumerate(given.shape):
        if isinstance(dimension, int):
            shape.append(dimension)
            continue
        chosen = batch if axis == 0 else _IMAGE_SIZE if given.kind == "image" else length
        shape.append(min(chosen, maxima.get(dimension, chosen)))
    return tuple(shape)


def _array(given: Input, shape: tuple[int, ...], case: str, rng: np.random.Generator) -> np.ndarray:
    dtype = given.dtype.numpy()
    if given.kind == "attention_mask":
        return _attention_mask(given, shape, case).astype(dtype)
    if given.kind == "position_ids":
        return beside_text(given, shape)
    if given.dtype == ir.DataType.BOOL:
        return rng.integers(0, 2, shape).astype(dtype)
    if given.dtype.is_floating_point():
        return (np.zeros(shape) if case == "zero" else rng.standard_normal(shape)).astype(dtype)
    low = 0 if given.low is None else given.low
    high = low + 2 if given.high is None else given.high
    if given.kind == "token_ids" and case in ("lowest", "highest"):
        return np.full(shape, low if case == "lowest" else high - 1, dtype)
    return rng.integers(low, high, shape).astype(dtype)


def beside_text(given: Input, shape: tuple[int, ...]) -> np.ndarray:
    """What goes with a text that has no padding and one part: a mask that hides nothing, positions, or token types."""
    if given.kind == "attention_mask":
        made = _attention_mask(given, shape, "full")
    elif given.kind == "position_ids":
        positions = np.arange(shape[-1]) + (given.low or 0)
        top = positions.max(initial=0) if given.high is None else given.high - 1
        made = np.broadcast_to(np.minimum(positions, top), shape)
    else:
        made = np.full(shape, given.low or 0)
    return made.astype(given.dtype.numpy())


def _attention_mask(given: Input, shape: tuple[int, ...], case: str) -> np.ndarray:
    """1 for a token, 0 for padding; row i of a padded case has i + 1 paddings, as long as one token is left."""
    if given.dtype.is_floating_point() and len(shape) != 2:
        return np.zeros(shape)  # an additive mask: nothing is masked
    mask = np.ones(shape)
    if case in ("left", "right") and len(shape) == 2:
        for row in range(shape[0]):
            padding = min(row + 1, shape[1] - 1)
            if padding:
                mask[row, slice(None, padding) if case == "left" else slice(shape[1] - padding, None)] = 0
    return mask


def label(inputs: Mapping[str, np.ndarray]) -> str:
    """What to call a set of inputs in a table: the shape of the first one, and whether a mask hides any of it.

    >>> label({"input_ids": np.zeros((2, 7), int), "attention_mask": np.ones((2, 7), int)})
    '2 × 7'
    """
    first = next(iter(inputs.values()), np.zeros(()))
    shape = " × ".join(map(str, first.shape)) or "scalar"
    masks = [array for name, array in inputs.items() if name == "attention_mask"]
    return f"{shape}, padded" if any((mask == 0).any() for mask in masks) else shape


def load_inputs(path: str | Path, model: ir.Model) -> list[dict[str, np.ndarray]]:
    """One set of inputs from an `.npz` with an array per input, validated against the signature.

    Raises `InputsError` with one line: what is wrong, where, what to do. Pickled arrays are refused, never loaded.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputsError("is a single array", where=str(path), remedy="save with numpy.savez, one per input")
            names = list(archive.files)
            check_names(names, model, str(path))
            arrays = {name: archive[name] for name in names}
    except FileNotFoundError:
        raise InputsError("does not exist", where=str(path), remedy="give an .npz file") from None
    except IsADirectoryError:
        raise InputsError("is a folder", where=str(path), remedy="give an .npz file") from None
    except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputsError(
            f"cannot be read without unpickling: {error}".splitlines()[0],
            where=str(path),
            remedy="save plain numeric arrays with numpy.savez",
        ) from error
    validate_inputs(arrays, model, where=str(path))
    return [arrays]


def check_names(names: Sequence[str], model: ir.Model, where: str) -> None:
    """Raise `InputsError` unless `names` are those of the inputs of `model`."""
    expected = [given.name for given in signature(model)]
    if missing := [name for name in expected if name not in names]:
        raise InputsError(f"lacks {', '.join(missing)}", where=where, remedy=f"expected {', '.join(expected)}")
    if extra := [name for name in names if name not in expected]:
        raise InputsError(f"has unknown {', '.join(extra)}", where=where, remedy=f"expected {', '.join(expected)}")


def validate_inputs(arrays: Mapping[str, np.ndarray], model: ir.Model, where: str = "inputs") -> None:
    """Check names, types, shapes, dimensions shared by name, maxima, id ranges and finiteness.

    Raises `InputsError` at the first that fails.
    """
    check_names(list(arrays), model, where)
    maxima, sizes = maxima_of(model), {}
    for given in signature(model):
        array, place = arrays[given.name], f"{where}: {given.name}"
        if array.dtype != given.dtype.numpy():
            raise InputsError(f"has type {array.dtype}", where=place, remedy=f"convert it to {given.dtype.numpy()}")
        _check_shape(given, array.shape, maxima, sizes, place)
        _check_values(given, array, place)


def _check_shape(given: Input, shape: tuple[int, ...], maxima: Mapping[str, int], sizes: dict, place: str) -> None:
    wanted = f"expected [{', '.join(map(str, given.shape))}]"
    if len(shape) != len(given.shape):
        raise InputsError(f"has {len(shape)} axes, shape {list(shape)}", where=place, remedy=wanted)
    for axis, (size, dimension) in enumerate(zip(shape, given.shape)):
        if size == 0:
            raise InputsError(f"is empty on axis {axis}", where=place, remedy=wanted)
        if isinstance(dimension, int):
            if size != dimension:
                raise InputsError(f"has {size} on axis {axis}", where=place, remedy=wanted)
            continue
        if size > maxima.get(dimension, size):
            raise InputsError(
                f"has {dimension} {size}", where=place, remedy=f"the network takes at most {maxima[dimension]}"
            )
        known, first = sizes.setdefault(dimension, (size, given.name)) if dimension != "None" else (size, "")
        if known != size:
            raise InputsError(f"has {dimension} {size}, {first} has {known}", where=place, remedy="make them agree")


def _check_values(given: Input, array: np.ndarray, place: str) -> None:
    if given.dtype.is_floating_point():
        if not np.isfinite(array.astype(np.float64)).all():
            raise InputsError("has entries that are not finite", where=place, remedy="remove NaN and infinity")
        return
    if given.dtype == ir.DataType.BOOL or not array.size:
        return
    low, high = int(array.min()), int(array.max())
    if (given.low is not None and low < given.low) or (given.high is not None and high >= given.high):
        bounds = f"[{'' if given.low is None else given.low}, {'' if given.high is None else given.high})"
        raise InputsError(f"has values from {low} to {high}", where=place, remedy=f"expected {bounds}")
