"""The product of two thin matrices that makes good for most of a quantization error.

    minimize  ‖E − A·B‖  or  ‖X(E − A·B)‖      over A (K, r), B (r, N)

The first is solved by the r largest singular values of E (Eckart and Young). The second by those of C·E, where
XᵀX = Cᵀ·C: its best approximation is C·E·V·Vᵀ, V its first r right singular vectors, so that A = E·V and B = Vᵀ do it
without C⁻¹, also where XᵀX is singular. Both come from eigenvectors of a Gram matrix, that of the shorter side.

Shapes    X (n, K)   E (K, N)   A (K, r)   B (r, N)   C (K, K)   V (N, r)
Source    Yao, Wu et al. 2023, ZeroQuant-FP, arXiv:2307.09782, §3 (LoRC); Chai et al. 2023, INT2.1, arXiv:2306.08162
"""

from __future__ import annotations

import numpy as np

from rewrite.errors import RequestError


def correction(error: np.ndarray, rank: int, hessian: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A (K, r) and B (r, N), float64, with the least ‖E − A·B‖, or ‖X(E − A·B)‖ where XᵀX (K, K) is given.

    error  W − Ŵ (K, N)
    rank   r, more than 0; where E has a smaller rank, what is left of A and B is zero. A column of A is as long as the
           row of B that it meets, so that both have numbers of one size

    Raises RequestError for another rank, and for matrices that do not fit or are not finite.
    """
    error = np.asarray(error, np.float64)
    if error.ndim != 2 or not error.size or not np.all(np.isfinite(error)) or rank < 1:
        raise RequestError(f"rank {rank} of an error of shape {error.shape}", remedy="a finite matrix, 1 or more")
    weighted = error
    if hessian is not None:
        hessian = np.asarray(hessian, np.float64)
        if hessian.shape != (len(error), len(error)) or not np.all(np.isfinite(hessian)):
            raise RequestError(f"a Hessian of shape {hessian.shape}", remedy=f"({len(error)}, {len(error)}), finite")
        weighted = _root(hessian) @ error
    right = _right_vectors(weighted, rank)
    a, b = error @ right, right.T
    lengths = np.sqrt(np.linalg.norm(a, axis=0))
    a, b = a / np.where(lengths > 0, lengths, 1.0), b * lengths[:, None]
    missing = rank - len(lengths)
    return np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))


def _root(hessian: np.ndarray) -> np.ndarray:
    """C (K, K) with XᵀX = Cᵀ·C."""
    try:
        return np.linalg.cholesky(hessian).T
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(hessian)
        return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


def _right_vectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The right singular vectors (N, r) of the largest singular values of a matrix (K, N) that are not zero."""
    size = float(np.max(np.abs(matrix)))
    matrix = matrix / size if size else matrix
    wide = len(matrix) < matrix.shape[1]
    squares, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    kept = squares > max(matrix.shape) * np.finfo(np.float64).eps * squares[-1]
    vectors = vectors[:, kept][:, ::-1][:, :rank]
    return np.linalg.qr(matrix.T @ vectors)[0] if wide else vectors
