"""What calibration measured of a value: the range of every channel.

A pass that is calibrated holds these numbers as an option, so that it stays a function of its options and the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """Smallest and largest number seen in every channel (the last axis) of a value: two float64 vectors (d,)."""

    low: np.ndarray
    high: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        """max|x| of every channel (d,)."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def joined(self, other: ChannelRange) -> ChannelRange:
        """The range of both.

        >>> one, other = ChannelRange(np.zeros(2), np.ones(2)), ChannelRange(-np.ones(2), np.zeros(2))
        >>> one.joined(other).low.tolist()
        [-1.0, -1.0]
        """
        return ChannelRange(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


Statistics = Mapping[str, ChannelRange]
"""Ranges by the name of the value."""
