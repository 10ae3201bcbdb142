"""Networks of the papers, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from torch import Tensor, nn

from koala_lab.checks import check_known, check_whole
from koala_lab.models import meka
from koala_lab.models.resnet import BasicBlock, Bottleneck, GroupedBottleneck, ResNet, WideBottleneck

__all__ = ["INITIALISATIONS", "MODELS", "build"]

# Classifiers of images: (B, in_channels, H, W) to logits (B, num_classes).
MODELS: Final[dict[str, Callable[..., nn.Module]]] = {
    "resnet8": partial(ResNet, BasicBlock, (1, 1, 1), (8, 16, 32)),
    "resnet8_w16": partial(ResNet, BasicBlock, (1, 1, 1), (16, 32, 64)),
    "resnet8_w32": partial(ResNet, BasicBlock, (1, 1, 1), (32, 64, 128)),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    "wide_resnet50_2": partial(ResNet, WideBottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet56": partial(ResNet, BasicBlock, (9, 9, 9), (16, 32, 64)),
    "resnet110": partial(ResNet, BasicBlock, (18, 18, 18), (16, 32, 64)),
    "resnext50": partial(ResNet, GroupedBottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    **meka.SIZED,
    **meka.UNSIZED,
}

# Of these the stem has stride 2 above 16 pixels, which makes a training step four times cheaper.
SMALL: Final = ("resnet8", "resnet8_w16", "resnet8_w32")

# Weights of convolutions and linear layers in KOALA's Table 5; torch's defaults of these functions.
INITIALISATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def build(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int = 32, init: str = "released"
) -> nn.Module:
    """Build a classifier of images by name, on the CPU in float32.

    Args:
        name: ``"resnet18"``, ``"resnet50"`` and ``"wide_resnet50_2"`` are KOALA's networks, ``"resnet110"`` (three
            stages of 18 basic blocks, widths 16/32/64, 1.73 M parameters) and ``"resnext50"`` (32x4d) are APOLLO's.
            ``"resnet56"`` is ``"resnet110"`` with 9 blocks per stage, 0.86 M. ``"resnet8"`` (stages of one block,
            widths 8/16/32, 0.02 M parameters), ``"resnet8_w16"`` (16/32/64, 0.08 M) and ``"resnet8_w32"`` (32/64/128,
            0.31 M) are ours, for runs on a CPU. ``"mlp_100"``, ``"cnn_3c3d"`` and ``"resnet32_gn"`` are MEKA's
            (:mod:`koala_lab.models.meka`), without BatchNorm, and ``"resnet8_gn"`` is the last with three blocks in
            place of fifteen.
        num_classes: Number of classes.
        in_channels: Number of channels of the images.
        image_size: Height and width of the images in pixels. ``"mlp_100"`` and ``"cnn_3c3d"`` are made for it.
            The small ``"resnet8"`` ones have a stem with stride 2 above 16 pixels, which makes a training step on 28x28
            images four times cheaper; ``"resnext50"`` has ImageNet's stem above 64. The others do not look at it.
        init: ``"released"`` keeps what the network's class says; else a name of :data:`INITIALISATIONS`, drawn for the
            weights of all convolutions and linear layers. Biases and BatchNorm stay as they are.

    Raises:
        ValueError: For an unknown name or a number below 1.

    Notes:
        Weights are drawn from torch's default generator: call ``torch.manual_seed`` before.

    Examples:
        >>> import torch
        >>> net = build("resnet8", num_classes=10, in_channels=1, image_size=8)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_known("model", name, MODELS)
    check_known("init", init, ("released", *INITIALISATIONS))
    for what, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        check_whole(what, value, 1)
    options = {"stem_stride": 2} if name in SMALL and image_size > 16 else {}
    if name == "resnext50" and image_size > 64:
        options = {"large_images": True}
    if name in meka.SIZED:
        options["image_size"] = image_size
    network = MODELS[name](num_classes=num_classes, in_channels=in_channels, **options)
    if init != "released":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                INITIALISATIONS[init](module.weight)
    return network
