"""Residual networks with the stem for small images.

Layers carry torchvision's names, so state dicts and published parameter counts can be compared. The one structural
difference is the stem: a 3x3 convolution and no max-pooling (He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, section 4.2), as in the experiments of KOALA (AAAI 2022) and in those of APOLLO on CIFAR-10.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar, Final

from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class _Block(nn.Module):
    """What both kinds of block share: the shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return (self.residual(x) + shortcut).relu_()


class BasicBlock(_Block):
    """Two 3x3 convolutions; the first has the stride."""

    expansion: Final = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, width, stride)
        self.conv1, self.bn1 = _conv(in_channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        """Compute what the block adds to its shortcut."""
        x = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(x))  # type: ignore[no-any-return]


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride, as in torchvision."""

    expansion: Final = 4
    widening: ClassVar[int] = 1
    groups: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        inner, outer = width * self.widening, width * self.expansion
        super().__init__(in_channels, outer, stride)
        self.conv1, self.bn1 = _conv(in_channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, self.groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, outer, 1), nn.BatchNorm2d(outer)

    def residual(self, x: Tensor) -> Tensor:
        """Compute what the block adds to its shortcut."""
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        return self.bn3(self.conv3(x))  # type: ignore[no-any-return]


class WideBottleneck(Bottleneck):
    """Bottleneck with twice the inner width (Zagoruyko & Komodakis, BMVC 2016; torchvision's width_per_group=128)."""

    widening: ClassVar[int] = 2


class GroupedBottleneck(WideBottleneck):
    """Its 3x3 convolution in 32 groups of 4 channels in the first stage (ResNeXt 32x4d; Xie et al., CVPR 2017)."""

    groups: ClassVar[int] = 32


class ResNet(nn.Sequential):
    """Residual network for small images: ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck` or :class:`WideBottleneck`.
        depths, widths: Number of blocks and width of every stage; each stage but the first halves height and width.
        num_classes, in_channels: Number of classes and of input channels.
        stem_stride: Stride of the 3x3 stem.
        large_images: The stem for ImageNet instead: a 7x7 convolution and max-pooling, each with stride 2.

    Notes:
        Convolutions start Kaiming-normal with ``fan_out``, BatchNorm at 1 and 0, the linear layer at torch's default,
        as in torchvision and in the released code of KOALA. All of it is drawn from torch's default generator.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        num_classes: int,
        in_channels: int,
        stem_stride: int = 1,
        large_images: bool = False,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = _conv(in_channels, widths[0], *((7, 2) if large_images else (3, stem_stride)))
        layers["bn1"] = nn.BatchNorm2d(widths[0])
        layers["relu"] = nn.ReLU(inplace=True)
        if large_images:
            layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks: list[nn.Module] = []
            for i in range(depth):
                blocks.append(block(channels, width, 2 if stage > 1 and i == 0 else 1))
                channels = width * block.expansion
            layers[f"layer{stage}"] = nn.Sequential(*blocks)
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels, num_classes)
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
