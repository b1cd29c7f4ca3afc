"""Convolutional networks whose BatchNorms, branches and shifts are affine at inference; all take digits.

Where a BatchNorm stands decides what can become of it: behind a convolution it is that convolution's scale and bias,
in front of one it is too unless padding or a non-linear function is between. Each network here has places of both.
"""

import torch
from torch import Tensor, nn

# Of all pixels of the training images, rounded.
MEAN, DEVIATION = 0.3, 0.38


class RepVGGBlock(nn.Module):
    """ReLU of 3 × 3, 1 × 1 and identity branches, each with its BatchNorm, summed (Ding et al. 2021, arXiv:2101.03697).

    x (batch, channels_in, height, width) → (batch, channels_out, height / stride, width / stride). There is an
    identity branch where input and output have the same shape.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.square = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, groups=groups, bias=False)
        self.norm_square = nn.BatchNorm2d(channels_out)
        self.point = nn.Conv2d(channels_in, channels_out, 1, stride, groups=groups, bias=False)
        self.norm_point = nn.BatchNorm2d(channels_out)
        same = channels_in == channels_out and stride == 1
        self.norm_identity = nn.BatchNorm2d(channels_out) if same else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_square(self.square(x)) + self.norm_point(self.point(x))
        if self.norm_identity is not None:
            y = y + self.norm_identity(x)
        return torch.relu(y)


class RepVGG(nn.Module):
    """A plain stack of RepVGG blocks, some in two groups as in the paper's g2 variants, and a linear classifier.

    pixel_values (batch, 1, 8, 8) → logits (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            RepVGGBlock(1, 16),
            RepVGGBlock(16, 32, stride=2),
            RepVGGBlock(32, 32, groups=2),
            RepVGGBlock(32, 32),
            RepVGGBlock(32, 40, stride=2),
            RepVGGBlock(40, 40, groups=2),
        )
        self.head = nn.Linear(40, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(pixel_values).mean((2, 3)))


class DenseLayer(nn.Module):
    """x with the result of BN → ReLU → 1 × 1 → BN → ReLU → 3 × 3 appended (Huang et al. 2017, arXiv:1608.06993).

    x (batch, channels, height, width) → (batch, channels + growth, height, width).
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition (BN → ReLU → 1 × 1 → average pooling) between them.

    Each layer's first BatchNorm reads what many layers wrote and stands in front of a ReLU, so it stays; the second
    one reads a convolution. pixel_values (batch, 1, 8, 8) → logits (batch, 10).
    """

    def __init__(self, layers: int = 4, growth: int = 12) -> None:
        super().__init__()
        first = 2 * growth
        between = first + layers * growth
        last = between // 2 + layers * growth
        self.stem = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.norm_stem = nn.BatchNorm2d(first)
        self.block1 = nn.Sequential(*(DenseLayer(first + n * growth, growth) for n in range(layers)))
        self.norm_transition = nn.BatchNorm2d(between)
        self.transition = nn.Conv2d(between, between // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.block2 = nn.Sequential(*(DenseLayer(between // 2 + n * growth, growth) for n in range(layers)))
        self.norm_last = nn.BatchNorm2d(last)
        self.head = nn.Linear(last, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.block1(torch.relu(self.norm_stem(self.stem(pixel_values))))
        x = self.pool(self.transition(torch.relu(self.norm_transition(x))))
        x = torch.relu(self.norm_last(self.block2(x)))
        return self.head(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """1 × 1 to more channels, depthwise 3 × 3, 1 × 1 back, each with BatchNorm (Sandler et al. 2018, arXiv:1801.04381).

    ReLU6 behind the first two, nothing behind the last, to which the input is added where the shapes agree.
    x (batch, channels_in, height, width) → (batch, channels_out, height / stride, width / stride).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        width = channels_in * expansion
        self.expand = nn.Conv2d(channels_in, width, 1, bias=False)
        self.norm_expand = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.norm_depthwise = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, channels_out, 1, bias=False)
        self.norm_project = nn.BatchNorm2d(channels_out)
        self.residual = channels_in == channels_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norm_expand(self.expand(x)))
        y = nn.functional.relu6(self.norm_depthwise(self.depthwise(y)))
        y = self.norm_project(self.project(y))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A stem, a depthwise separable convolution as in MobileNetV1, inverted residuals as in V2, and a classifier.

    pixel_values (batch, 1, 8, 8) → logits (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm_stem = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm_depthwise = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.norm_pointwise = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 24, stride=2),
            InvertedResidual(24, 24),
            InvertedResidual(24, 32, stride=2),
            InvertedResidual(32, 32),
        )
        self.last = nn.Conv2d(32, 96, 1, bias=False)
        self.norm_last = nn.BatchNorm2d(96)
        self.head = nn.Linear(96, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm_stem(self.stem(pixel_values)))
        x = nn.functional.relu6(self.norm_depthwise(self.depthwise(x)))
        x = nn.functional.relu6(self.norm_pointwise(self.pointwise(x)))
        x = nn.functional.relu6(self.norm_last(self.last(self.blocks(x))))
        return self.head(x.mean((2, 3)))


class ConvolutionModule(nn.Module):
    """x + the Conformer's convolution module of x (Gulati et al. 2020, arXiv:2005.08100, §2.2), with a BatchNorm first.

    BN → 1 → GLU → depthwise → BN → SiLU → 1. The first BatchNorm, where the paper has a LayerNorm, stands in front of
    a convolution without padding.  x (batch, channels, time) → the same shape.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.pointwise1 = nn.Conv1d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.norm_depthwise = nn.BatchNorm1d(channels)
        self.pointwise2 = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.glu(self.pointwise1(self.norm(x)), dim=1)
        y = nn.functional.silu(self.norm_depthwise(self.depthwise(y)))
        return x + self.pointwise2(y)


class Conv1dNet(nn.Module):
    """Convolutions over the rows of an image as over frames of speech: a stem, two Conformer modules, a dilated end.

    The input is normalized first, by numbers of the training data that are buffers, as front ends of speech models do.
    frames (batch, 8 features, 8 steps) → logits (batch, 10).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1))
        self.register_buffer("deviation", torch.ones(8, 1))
        self.stem = nn.Conv1d(8, channels, 3, bias=False)
        self.norm_stem = nn.BatchNorm1d(channels)
        self.conformer1 = ConvolutionModule(channels, 3)
        self.conformer2 = ConvolutionModule(channels, 5)
        self.dilated = nn.Conv1d(channels, 2 * channels, 3, padding=2, dilation=2, bias=False)
        self.norm_dilated = nn.BatchNorm1d(2 * channels)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, frames: Tensor) -> Tensor:
        x = (frames - self.mean) / self.deviation
        x = torch.relu(self.norm_stem(self.stem(x)))
        x = self.conformer2(self.conformer1(x))
        x = torch.relu(self.norm_dilated(self.dilated(x)))
        return self.head(x.mean(2))


class FactoredBlock(nn.Module):
    """ReLU of x + a (2 + 1)-D convolution of x: in space, then in time, each with BatchNorm.

    Source: Tran et al. 2018, arXiv:1711.11248.  x (batch, channels, time, height, width) → the same shape.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(channels, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm_space = nn.BatchNorm3d(width)
        self.time = nn.Conv3d(width, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm_time = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm_space(self.space(x)))
        return torch.relu(x + self.norm_time(self.time(y)))


class Conv3dNet(nn.Module):
    """3 × 3 × 3 convolutions with BatchNorm around two (2 + 1)-D residual blocks.

    The input is normalized in front of a padded convolution: its scale can go into the kernel, its shift cannot.
    clip (batch, 1, time, 8, 8) → logits (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 12, 3, padding=1, bias=False)
        self.norm_stem = nn.BatchNorm3d(12)
        self.block1 = FactoredBlock(12, 20)
        self.down = nn.Conv3d(12, 24, 3, stride=2, padding=1, bias=False)
        self.norm_down = nn.BatchNorm3d(24)
        self.block2 = FactoredBlock(24, 32)
        self.head = nn.Linear(24, 10)

    def forward(self, clip: Tensor) -> Tensor:
        x = (clip - MEAN) / DEVIATION
        x = self.block1(torch.relu(self.norm_stem(self.stem(x))))
        x = self.block2(torch.relu(self.norm_down(self.down(x))))
        return self.head(x.mean((2, 3, 4)))


class Autoencoder(nn.Module):
    """An image through a few numbers and back, by a decoder of transposed convolutions as in DCGAN (arXiv:1511.06434).

    Every convolution, transposed one (one of them in groups, one with output padding) and linear layer but the last
    has a BatchNorm behind it.  pixel_values (batch, 1, 8, 8) → reconstruction (batch, 1, 8, 8) in 0…1.
    """

    def __init__(self, code: int = 12) -> None:
        super().__init__()
        self.encode1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.norm_encode1 = nn.BatchNorm2d(16)
        self.encode2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm_encode2 = nn.BatchNorm2d(32)
        self.to_code = nn.Linear(32 * 4, code)
        self.from_code = nn.Linear(code, 32 * 4, bias=False)
        self.norm_code = nn.BatchNorm1d(32 * 4)
        self.decode1 = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, groups=2, bias=False)
        self.norm_decode1 = nn.BatchNorm2d(32)
        self.decode2 = nn.ConvTranspose2d(32, 24, 3, stride=2, padding=1, output_padding=1)
        self.norm_decode2 = nn.BatchNorm2d(24)
        self.paint = nn.ConvTranspose2d(24, 1, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.norm_encode1(self.encode1(pixel_values)))
        x = torch.relu(self.norm_encode2(self.encode2(x)))
        x = torch.relu(self.norm_code(self.from_code(self.to_code(x.flatten(1)))))
        x = x.unflatten(1, (32, 2, 2))
        x = torch.relu(self.norm_decode1(self.decode1(x)))
        x = torch.relu(self.norm_decode2(self.decode2(x)))
        return torch.sigmoid(self.paint(x))
