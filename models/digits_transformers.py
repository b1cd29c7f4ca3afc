"""A small vision transformer, and the norms that can take LayerNorm's place and are affine at inference."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RepBatchNorm(nn.Module):
    """BN(x) + α·x over the channels of tokens (Guo et al. 2024, SLAB, arXiv:2405.11582, eq. 4).

    x (batch, tokens, channels) → the same shape.  α is one trained number.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.norm(x) + self.alpha * x
        return x.transpose(1, 2)


class ProgressiveNorm(nn.Module):
    """λ·LN(x) + (1 − λ)·RepBN(x), with λ going down from 1 to 0 in training (SLAB, eq. 3).

    `share` is λ, which whoever trains the network sets; at inference only `rep` is left (`reparameterized`).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.share = 1.0
        self.layer = nn.LayerNorm(channels)
        self.rep = RepBatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return self.rep(x)
        return self.share * self.layer(x) + (1 - self.share) * self.rep(x)


class UnifiedNormStep(torch.autograd.Function):
    """x / √(v + ε) with smoothed statistics of the forward and of the backward pass; see `UnifiedNorm`."""

    @staticmethod
    def forward(ctx, x: Tensor, square: Tensor, smooth: bool, gradients: Tensor, place: int, eps: float) -> Tensor:
        z = x / (square + eps).sqrt()
        ctx.save_for_backward(z, square)
        ctx.smooth, ctx.gradients, ctx.place, ctx.eps = smooth, gradients, place, eps
        return z

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        z, square = ctx.saved_tensors
        own = (gradient * z).mean((0, 1))
        ctx.gradients[ctx.place] = own
        inner = ctx.gradients.mean(0) if ctx.smooth else own
        return (gradient - inner * z) / (square + ctx.eps).sqrt(), None, None, None, None, None


class UnifiedNorm(nn.Module):
    """γ·x / √(v + ε) + β with the quadratic mean v of each channel (Yang et al. 2022, arXiv:2208.01313).

    At inference v is a constant, so the whole is affine.  In training v is the geometric mean of the quadratic means,
    over batch and tokens, of the last `window` steps, and the gradient's statistic the arithmetic mean of the same
    window (the paper's fluctuation smoothing).  A step is left out of the window, and normalized by its own quadratic
    mean, where the window's arithmetic and geometric means differ by more than `window` times the variance of the
    roots before it (outlier filtration).  Smoothing starts after `warmup` steps.

    x (batch, tokens, channels) → the same shape.  `running_square` (channels,) is the running average of v.
    """

    running_square: Tensor
    squares: Tensor
    gradients: Tensor

    def __init__(
        self, channels: int, window: int = 4, warmup: int = 100, momentum: float = 0.9, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.window, self.warmup, self.momentum, self.eps = window, warmup, momentum, eps
        self.step = 0
        self.outliers = 0
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_square", torch.ones(channels))
        self.register_buffer("squares", torch.ones(window, channels), persistent=False)
        self.register_buffer("gradients", torch.zeros(window, channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            z = self._normalized(x)
        else:
            z = x / (self.running_square + self.eps).sqrt()
        return self.weight * z + self.bias

    def _normalized(self, x: Tensor) -> Tensor:
        place = self.step % self.window
        with torch.no_grad():
            own = x.square().mean((0, 1))
            spread = self.squares.sqrt().var(0)
            self.squares[place] = own
            geometric = self.squares.clamp(min=self.eps).log().mean(0).exp()
            smooth = self.step >= max(self.warmup, self.window)
            if smooth and bool((self.squares.mean(0) - geometric > self.window * spread).any()):
                self.squares[place] = self.running_square
                self.outliers += 1
                smooth = False
            square = geometric if smooth else own
            self.running_square.lerp_(square, 1 - self.momentum)
        self.step += 1
        return UnifiedNormStep.apply(x, square, smooth, self.gradients, place, self.eps)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention, queries, keys and values by one matrix.  x (batch, tokens, channels) → the same."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then the same of a two-layer perceptron.  x (batch, tokens, channels) → the same."""

    def __init__(self, channels: int, heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.attention = Attention(channels, heads)
        self.norm2 = norm(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches of 2 × 2, learned positions, Pre-Norm blocks, a last norm, the mean of the tokens, a classifier.

    pixel_values (batch, 1, 8, 8) → logits (batch, 10).  `norm` makes each norm of the channels: nn.LayerNorm,
    RepBatchNorm, ProgressiveNorm or UnifiedNorm.
    """

    def __init__(self, norm: Callable[[int], nn.Module], channels: int = 40, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, channels, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, channels) * 0.02)
        self.blocks = nn.Sequential(*(Block(channels, heads, norm) for _ in range(depth)))
        self.norm_last = norm(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm_last(self.blocks(x)).mean(1))


def progressive_norms(model: nn.Module) -> list[ProgressiveNorm]:
    """The norms of a network whose λ is to be set."""
    return [part for part in model.modules() if isinstance(part, ProgressiveNorm)]


def reparameterized(trained: VisionTransformer) -> VisionTransformer:
    """The network with RepBatchNorm alone that a trained one with ProgressiveNorm is at λ = 0; weights are copied.

    Raises ValueError where a λ is not 0: the networks would differ.
    """
    if any(norm.share for norm in progressive_norms(trained)):
        raise ValueError("λ is not 0 in every norm: LayerNorm still has a share in the trained network")
    weights = {key.replace(".rep.", "."): value for key, value in trained.state_dict().items() if ".layer." not in key}
    model = VisionTransformer(RepBatchNorm)
    model.load_state_dict(weights)
    return model.eval()
