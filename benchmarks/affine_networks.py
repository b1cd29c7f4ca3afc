"""Networks of realistic size whose norms and branches are affine at inference, of the blocks of `models/`.

Weights are random, and so are the norms' scales and shifts; running statistics are those of random images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any


def repvgg(quick: bool):
    """RepVGG-A0: widths 48, 48, 96, 192, 1280 in 1, 2, 4, 14, 1 blocks, strides 2 (arXiv:2101.03697, table 2)."""
    from torch import nn

    from rewrite.models.digits_convolutional import RepVGG, RepVGGBlock

    widths, depths = (3, 48, 48, 96, 192, 1280), (1, 1, 1, 2, 1) if quick else (1, 2, 4, 14, 1)
    blocks = []
    for (before, width), depth in zip(pairwise(widths), depths):
        blocks += [RepVGGBlock(before, width, stride=2), *(RepVGGBlock(width, width) for _ in range(depth - 1))]
    model = RepVGG()
    model.blocks, model.head = nn.Sequential(*blocks), nn.Linear(1280, 1000)
    return model


def mobilenet(quick: bool):
    """The widths and depths of MobileNetV2 (arXiv:1801.04381, table 2)."""
    from torch.nn import BatchNorm2d, Conv2d, Linear, Sequential

    from rewrite.models.digits_convolutional import InvertedResidual, MobileNet

    model = MobileNet()
    model.stem, model.norm_stem = Conv2d(3, 32, 3, 2, padding=1, bias=False), BatchNorm2d(32)
    model.depthwise, model.norm_depthwise = Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), BatchNorm2d(32)
    model.pointwise = Conv2d(32, 16, 1, bias=False)
    blocks, before = [], 16
    for width, depth, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for place in range(1 if quick else depth):
            blocks.append(InvertedResidual(before, width, stride if place == 0 else 1, expansion=6))
            before = width
    model.blocks, model.head = Sequential(*blocks), Linear(1280, 1000)
    model.last, model.norm_last = Conv2d(320, 1280, 1, bias=False), BatchNorm2d(1280)
    return model


def densenet(quick: bool):
    """Two dense blocks of 12 layers that grow by 32 each, behind a 7 × 7 stem of stride 4."""
    from torch import nn

    from rewrite.models.digits_convolutional import DenseNet

    model = DenseNet(layers=2 if quick else 12, growth=32)
    model.stem = nn.Conv2d(3, 64, 7, stride=4, padding=3, bias=False)
    return model


def vit(norm: str, quick: bool):
    """DeiT-tiny but for the class token: 196 patches, width 192, 12 blocks, 3 heads (arXiv:2012.12877, table 1)."""
    import torch
    from torch import nn

    from rewrite.models import digits_transformers as parts

    norms = {"layernorm": nn.LayerNorm, "prepbn": parts.RepBatchNorm, "un": parts.UnifiedNorm}
    model = parts.VisionTransformer(norms[norm], channels=192, depth=2 if quick else 12, heads=3)
    model.patches, model.head = nn.Conv2d(3, 192, 16, stride=16), nn.Linear(192, 1000)
    model.positions = nn.Parameter(torch.randn(196, 192) * 0.02)
    for block in model.blocks:
        block.up, block.down = nn.Linear(192, 768), nn.Linear(768, 192)
    return model


NETWORKS: dict[str, tuple[Callable[[bool], Any], int]] = {
    "repvgg-160": (repvgg, 160),
    "mobilenet-160": (mobilenet, 160),
    "repvgg-64": (repvgg, 64),
    "densenet-128": (densenet, 128),
    **{f"vit-{norm}": (partial(vit, norm), 224) for norm in ("layernorm", "prepbn", "un")},
}
"""How each is built, and the side of its image."""


def made(network: str, quick: bool):
    """A network in eval mode, each norm's scale and shift random and its statistics measured on random images."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    build, size = NETWORKS[network]
    model = build(quick)
    with torch.no_grad():
        for part in model.modules():
            if "Norm" in type(part).__name__ and isinstance(getattr(part, "weight", None), nn.Parameter):
                part.weight.uniform_(0.7, 1.3)
                part.bias.normal_(0, 0.1)
                part.momentum = 0.5
            if hasattr(part, "alpha"):
                part.alpha.uniform_(0.2, 0.8)
        model.train()
        for _ in range(4):
            model(torch.randn(8, 3, size, size))
    return model.eval()


def side_of(network: str) -> int:
    """The pixels of a side of a network's image."""
    return NETWORKS[network][1]
