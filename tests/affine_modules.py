"""Norms that are affine in inference, as modules of tests."""

from __future__ import annotations

import torch
from torch import nn


class PRepBN(nn.Module):
    """BN(x) + α·x over tokens (SLAB, arXiv:2405.11582)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


class UnifiedNorm(nn.Module):
    """γ·x/√(v + ε) + β with a running quadratic mean (arXiv:2208.01313)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / torch.sqrt(self.running_var + 1e-5) + self.bias
