"""Networks of the MEKA paper: parameter counts, the pooling of 3c3d, blocks written out, samples by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from koala_lab import models
from koala_lab.models.meka import PreActivationBlock

# 3c3d as the DeepOBS papers count it; ResNet-32 as He et al. (2016) do: 0.46 M, with BatchNorm in other places.
COUNTS = {("mlp_100", 1, 28): 784 * 100 + 100 + 1010, ("cnn_3c3d", 3, 32): 895_210, ("resnet32_gn", 3, 32): 464_154}


@pytest.mark.parametrize(("name", "channels", "size"), COUNTS)
def test_parameter_count(name: str, channels: int, size: int) -> None:
    model = models.build(name, num_classes=10, in_channels=channels, image_size=size)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name, channels, size]
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", ["mlp_100", "cnn_3c3d", "resnet8_gn", "resnet32_gn"])
def test_samples_do_not_see_each_other(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, num_classes=4, in_channels=1, image_size=12).double()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [9, 12, 28, 32, 33])
def test_pooling_of_3c3d_pads_as_tensorflow_does(size: int) -> None:
    """Output ceil(n / 2); the padding it needs is shared out, the odd one at the end."""
    model = models.build("cnn_3c3d", num_classes=10, in_channels=1, image_size=size)
    x = torch.randn(2, 1, size, size)
    pools = 0
    for layer in model:
        if isinstance(layer, nn.Flatten):
            break
        expected = None
        if isinstance(layer, nn.MaxPool2d):
            n = x.shape[-1]
            padding = max((-(-n // 2) - 1) * 2 + 3 - n, 0)
            sides = (padding // 2, padding - padding // 2)
            expected = functional.max_pool2d(functional.pad(x, sides * 2, value=-torch.inf), 3, 2)
            pools += 1
        x = layer(x)
        if expected is not None:
            torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert pools == 3


def test_3c3d_refuses_images_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="at least 9 pixels, got 8"):
        models.build("cnn_3c3d", num_classes=10, in_channels=1, image_size=8)


def test_initial_weights_of_3c3d() -> None:
    torch.manual_seed(0)
    model = models.build("cnn_3c3d", num_classes=10)
    conv, dense = model.get_submodule("conv2").weight.detach(), model.get_submodule("dense1").weight.detach()
    assert float(conv.std()) == pytest.approx((2 / (9 * (64 + 96))) ** 0.5, rel=0.02)
    assert float(dense.abs().max()) == pytest.approx((6 / (1152 + 512)) ** 0.5, rel=1e-3)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_the_formula(stride: int) -> None:
    torch.manual_seed(0)
    block = PreActivationBlock(4, 4 * stride, stride, groups=2)
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 4, 6, 6)
    kept = x.clone()

    def normalised(y: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
        parts = y.reshape(3, 2, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        return (parts.view_as(y) * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

    h = functional.conv2d(normalised(x, block.norm1), block.conv1.weight, stride=stride, padding=1)
    h = functional.conv2d(normalised(h, block.norm2), block.conv2.weight, padding=1)
    h[:, :4] += x[:, :, ::stride, ::stride]
    torch.testing.assert_close(block(x), h, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, kept), "the shortcut reads the input after the residual branch"
