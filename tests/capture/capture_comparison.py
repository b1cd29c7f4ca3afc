"""When do two float32 evaluations of one network agree?

Both are compared with a float64 evaluation r. The error of a sum of k rounded terms is between about u (blocked, fused)
and √k·u (one after the other) in root mean square, whatever the order; so two correct implementations of the same
network differ in their distance from r by a factor of at most about √k, with k the longest sum. A wrong one is off by
many orders of magnitude more.
"""

from __future__ import annotations

import numpy as np


def noise_ratio(actual: np.ndarray, eager: np.ndarray, reference: np.ndarray) -> float:
    """‖actual − r‖ / ‖eager − r‖, the denominator at least half an ulp of every element; inf where not comparable."""
    if actual.shape != reference.shape or actual.dtype != eager.dtype or not np.isfinite(actual).all():
        return float("inf")
    unit = np.finfo(eager.dtype).eps
    noise = max(
        float(np.linalg.norm(eager.astype(np.float64) - reference)), unit / 2 * float(np.linalg.norm(reference))
    )
    return float(np.linalg.norm(actual.astype(np.float64) - reference)) / noise


def agrees(actual: np.ndarray, eager: np.ndarray, reference: np.ndarray, longest_sum: int) -> bool:
    """Whether `actual` is as near to `reference` (float64) as `eager` is, up to √longest_sum."""
    return noise_ratio(actual, eager, reference) <= longest_sum**0.5
