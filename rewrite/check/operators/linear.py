"""Matrix products, with a stored matrix read in blocks so that it is never whole in float64."""

from __future__ import annotations

import numpy as np

from rewrite.check.operators.registry import Call, Operand, dense, operator
from rewrite.ir import weights
from rewrite.ir.weights import Weight


def stored_axis(weight: Weight) -> int:
    """The axis of `weight` along which its stored bytes are cut into cheap blocks: the storage's axis 0."""
    if isinstance(weight, weights.Transpose):
        return weight.permutation.index(stored_axis(weight.inner))
    if isinstance(weight, weights.Scale | weights.Center):
        return stored_axis(weight.inner)
    return 0


def matmul(a: Operand, b: Operand, precision: type) -> np.ndarray:
    """`numpy.matmul` where one operand may be a stored matrix; a (..., m, k), b (..., k, n) → (..., m, n).

    A large stored matrix (k, n) is read in blocks of `weights.BLOCK_ELEMENTS` elements along the axis it is stored by;
    stacks of matrices (e, k, n) one matrix at a time.
    """
    if isinstance(a, Weight) and isinstance(b, Weight):
        return matmul(dense(a, precision), b, precision)
    if isinstance(a, Weight):
        if len(a.shape) != 2:
            return np.matmul(dense(a, precision), b)
        return np.swapaxes(matmul(np.swapaxes(b, -1, -2), weights.Transpose(a, (1, 0)), precision), -1, -2)
    if not isinstance(b, Weight):
        return np.matmul(a, b)
    if len(b.shape) == 3 and np.prod(b.shape) > weights.BLOCK_ELEMENTS:
        return _matmul_of_stack(a, b, precision)
    if len(b.shape) != 2 or np.prod(b.shape) <= weights.BLOCK_ELEMENTS:
        return np.matmul(a, dense(b, precision))
    return _matmul_in_blocks(a.reshape(-1, a.shape[-1]), b, precision).reshape(*a.shape[:-1], b.shape[1])


def _matmul_in_blocks(a: np.ndarray, b: Weight, precision: type) -> np.ndarray:
    """a (m, k), b (k, n) → (m, n): a sum over blocks of b's rows, or side by side over blocks of its columns."""
    k, n = b.shape
    result = np.zeros((len(a), n), precision)
    if stored_axis(b) == 0:
        for rows, columns in weights.row_blocks((k, n)):
            result += a[:, rows] @ b.read((rows, columns)).astype(precision, copy=False)
    else:
        for columns, rows in weights.row_blocks((n, k)):
            result[:, columns] = a @ b.read((rows, columns)).astype(precision, copy=False)
    return result


def _matmul_of_stack(a: np.ndarray, b: Weight, precision: type) -> np.ndarray:
    parts = []
    for index in range(b.shape[0]):
        matrix = b.read((slice(index, index + 1), *weights.whole(b.shape[1:]))).astype(precision, copy=False)
        own = a.ndim >= 3 and a.shape[-3] > 1
        parts.append(np.matmul(a[..., index : index + 1, :, :] if own else a, matrix))
    return np.concatenate(parts, axis=-3)


def swapped(x: Operand) -> Operand:
    """`x` with its last two axes exchanged, as a view or a lazy transpose."""
    if not isinstance(x, Weight):
        return np.swapaxes(x, -1, -2)
    rank = len(x.shape)
    return weights.Transpose(x, (*range(rank - 2), rank - 1, rank - 2))


def is_stored(*operands: Operand) -> bool:
    """Whether any operand is read when used."""
    return any(isinstance(operand, Weight) for operand in operands)


def _arrays(call: Call, *operands: Operand) -> tuple[Operand, ...]:
    """Everything but weights as arrays."""
    return tuple(x if isinstance(x, Weight) else dense(x, call.precision) for x in operands)


@operator("MatMul", lazy=True)
def matmul_operator(call: Call, a: Operand, b: Operand) -> np.ndarray:
    a, b = _arrays(call, a, b)
    if is_stored(a, b) and min(len(a.shape), len(b.shape)) == 1:
        a, b = dense(a, call.precision), dense(b, call.precision)
    return matmul(a, b, call.precision)


@operator("Gemm", lazy=True)
def gemm(call: Call, a: Operand, b: Operand, c: Operand = None) -> np.ndarray:
    """α·A·B + β·C, with C broadcast to the product's shape."""
    a, b = _arrays(call, a, b)
    a = swapped(a) if call.attribute("transA", 0) else a
    b = swapped(b) if call.attribute("transB", 0) else b
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    product = matmul(a, b, call.precision)
    product = product if alpha == 1 else alpha * product
    if c is None:
        return product
    c = dense(c, call.precision)
    return product + (c if beta == 1 else np.asarray(beta * c).astype(c.dtype))


@operator("Einsum")
def einsum(call: Call, *operands: np.ndarray) -> np.ndarray:
    return np.einsum(call.attribute("equation"), *operands, optimize=True)


@operator("FusedMatMul", domain="com.microsoft", lazy=True)
def fused_matmul(call: Call, a: Operand, b: Operand) -> np.ndarray:
    """α·op(A)·op(B); `transBatch` moves the first axis to the last but one before the product.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.FusedMatMul.
    """
    a, b = _arrays(call, a, b)
    if call.attribute("transBatchA", 0):
        a = np.moveaxis(dense(a, call.precision), 0, -2)
    if call.attribute("transBatchB", 0):
        b = np.moveaxis(dense(b, call.precision), 0, -2)
    a = swapped(a) if call.attribute("transA", 0) and len(a.shape) > 1 else a
    b = swapped(b) if call.attribute("transB", 0) and len(b.shape) > 1 else b
    alpha = call.real("alpha", 1.0)
    product = matmul(a, b, call.precision)
    return product if alpha == 1 else alpha * product
