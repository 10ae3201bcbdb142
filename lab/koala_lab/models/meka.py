"""Networks of the MEKA paper (Appendix E.2): an MLP, DeepOBS' "3c3d", ResNet-32 with group normalisation.

None of them has batch statistics, so every sample has a gradient of its own. What the paper leaves open is said at
each network. They use ReLU and map ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

from torch import Tensor, nn
from torch.nn import functional


def mlp(*, num_classes: int, in_channels: int, image_size: int, hidden: int = 100) -> nn.Sequential:
    """Build a perceptron with one hidden layer, for MNIST 79 510 parameters; torch's initial weights."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(in_channels * image_size**2, hidden),
            relu=nn.ReLU(inplace=True),
            output=nn.Linear(hidden, num_classes),
        )
    )


def cnn_3c3d(*, num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Build three convolutions with max-pooling and three linear layers, for CIFAR-10 895 210 parameters.

    As in DeepOBS (Schneider, Balles and Hennig, ICLR 2019): convolutions 5x5 "valid" to 64 channels, 3x3 "valid" to
    96, 3x3 "same" to 128; after each, max-pooling 3x3 with stride 2 and TensorFlow's "same" padding; linear layers
    512, 256 and ``num_classes``. Convolutions start Xavier-normal, linear layers Xavier-uniform, biases at zero.

    Raises:
        ValueError: For images below 9 pixels: nothing would be left for the second convolution.
    """
    if image_size < 9:
        raise ValueError(f"the network 3c3d needs images of at least 9 pixels, got {image_size}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = in_channels, image_size
    for i, (width, kernel, padding) in enumerate(((64, 5, 0), (96, 3, 0), (128, 3, 1)), start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, kernel, padding=padding)
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
        size = size - kernel + 1 + 2 * padding
        layers[f"maxpool{i}"] = nn.MaxPool2d(3, 2, padding=size % 2, ceil_mode=True)  # half the size, rounded up
        channels, size = width, -(-size // 2)
    layers["flatten"] = nn.Flatten()
    layers["dense1"], layers["relu4"] = nn.Linear(channels * size**2, 512), nn.ReLU(inplace=True)
    layers["dense2"], layers["relu5"] = nn.Linear(512, 256), nn.ReLU(inplace=True)
    layers["dense3"] = nn.Linear(256, num_classes)
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            (nn.init.xavier_normal_ if isinstance(layer, nn.Conv2d) else nn.init.xavier_uniform_)(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)


class PreActivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), 3x3 convolutions (He et al., ECCV 2016, figure 1 b).

    Where the shape changes, the shortcut takes every second pixel and pads the channels with zeros: option A of the
    first paper, which its networks for CIFAR-10 use.
    """

    def __init__(self, in_channels: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, width - in_channels
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        residual = self.conv1(self.norm1(x).relu_())
        residual = self.conv2(self.norm2(residual).relu_())
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return residual + x  # type: ignore[no-any-return]


class PreActivationResNet(nn.Sequential):
    """Residual network of 6 ``depth`` + 2 layers for small images, ResNet-32 with ``depth`` 5: 464 154 parameters.

    Three stages of widths 16, 32 and 64 (He et al., CVPR 2016, section 4.2) with pre-activation blocks (He et al., ECCV
    2016) and group normalisation (Wu and He, ECCV 2018) in place of BatchNorm. The paper does not say how many groups;
    we take 8. Convolutions start Kaiming-normal with ``fan_out``, as in :class:`koala_lab.models.resnet.ResNet`.
    """

    def __init__(self, depth: int, *, num_classes: int, in_channels: int, groups: int = 8) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(depth):
                blocks.append(PreActivationBlock(channels, width, 2 if stage > 1 and i == 0 else 1, groups))
                channels = width
            layers[f"layer{stage}"] = nn.Sequential(*blocks)
        layers["norm"], layers["relu"] = nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)
        layers["avgpool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        layers["fc"] = nn.Linear(channels, num_classes)
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# Networks whose linear layers depend on the height and width of the images, and the others.
SIZED: Final[dict[str, Callable[..., nn.Module]]] = {"mlp_100": mlp, "cnn_3c3d": cnn_3c3d}
UNSIZED: Final[dict[str, Callable[..., nn.Module]]] = {
    "resnet8_gn": partial(PreActivationResNet, 1),
    "resnet32_gn": partial(PreActivationResNet, 5),
}
