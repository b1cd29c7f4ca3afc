"""The product of two thin matrices that makes good for most of a quantization error.

    minimize  ‖E − A·B‖  or  ‖X(E − A·B)‖      over A (K, r), B (r, N)

The first is solved by the r largest singular values of E (Eckart and Young). The second, with XᵀX = C·Cᵀ, is the first
for Cᵀ·E, and A is carried back by C⁻ᵀ; here C is the square root of XᵀX by its eigenvectors, which needs no damping:
where XᵀX is singular, A has nothing along what X never reaches.

Shapes    X (n, K)   E (K, N)   A (K, r)   B (r, N)
Source    Yao, Wu et al. 2023, ZeroQuant-FP, arXiv:2307.09782, §3 (LoRC); Chai et al. 2023, INT2.1, arXiv:2306.08162
"""

from __future__ import annotations

import numpy as np

from rewrite.errors import RequestError


def correction(error: np.ndarray, rank: int, hessian: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A (K, r) and B (r, N), float64, with the least ‖E − A·B‖, or ‖X(E − A·B)‖ where XᵀX (K, K) is given.

    error  W − Ŵ (K, N)
    rank   r, more than 0; columns of A beyond the rank of E are zero. Singular values are shared by A and B in equal
           parts, so that both have numbers of one size

    Raises RequestError for another rank, and for matrices that do not fit or are not finite.
    """
    error = np.asarray(error, np.float64)
    if error.ndim != 2 or not np.all(np.isfinite(error)) or rank < 1:
        raise RequestError(
            f"a correction of rank {rank} of {error.shape}", remedy="a finite matrix, and a rank of 1 or more"
        )
    back = None
    if hessian is not None:
        hessian = np.asarray(hessian, np.float64)
        if hessian.shape != (len(error), len(error)) or not np.all(np.isfinite(hessian)):
            raise RequestError(f"a Hessian of shape {hessian.shape}", remedy=f"({len(error)}, {len(error)}), finite")
        values, vectors = np.linalg.eigh(hessian)
        reached = values > len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
        roots = np.sqrt(values[reached])
        back = vectors[:, reached] / roots
        error = roots[:, None] * (vectors[:, reached].T @ error)
    left, sizes, right = _largest(error, rank)
    parts = np.sqrt(sizes)
    a, b = left * parts, parts[:, None] * right
    if back is not None:
        a = back @ a
    missing = rank - len(sizes)
    return np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))


def _largest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `rank` largest singular values (or all there are) and their vectors, (K, r), (r,), (r, N)."""
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], sizes[:rank], right[:rank]
