"""Generators and discriminators of images: DCGAN (Radford, Metz & Chintala, ICLR 2016, arXiv 1511.06434).

Strided convolutions instead of pooling, BatchNorm everywhere but at the generator's output and the discriminator's
input, ReLU in the generator with tanh at the end, LeakyReLU in the discriminator, all weights from N(0, 0.02^2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Final

from torch import Tensor, nn


class Dcgan(nn.Module):
    """A generator and a discriminator that mirror each other.

    ``generator`` maps noise ``(B, latent)`` to images ``(B, channels, size, size)`` in [-1, 1], ``discriminator`` maps
    such images to scores ``(B,)``, logits without a sigmoid. The image is halved while its side is even and above 4
    pixels: 8 and 32 end at 4x4, 28 at 7x7. Calling the module generates.

    Args:
        channels, size: Channels of the images, and their height and width in pixels.
        width: Channels at half the resolution; each further halving doubles them.
        latent: Dimension of the noise.

    Raises:
        ValueError: If the images cannot be halved once.

    Notes:
        As the authors' network for 64x64 pixels, with fewer halvings; kernels are 4x4 instead of 5x5, so that strides
        divide them and no checkerboard is built in. Weights are drawn from torch's default generator.

    Examples:
        >>> import torch
        >>> gan = Dcgan(channels=1, size=28, width=16, latent=32)
        >>> images = gan(torch.zeros(2, 32))
        >>> images.shape, gan.discriminator(images).shape
        (torch.Size([2, 1, 28, 28]), torch.Size([2]))
    """

    def __init__(self, *, channels: int, size: int, width: int, latent: int) -> None:
        super().__init__()
        halvings, side = 0, size
        while side % 2 == 0 and side > 4:
            halvings, side = halvings + 1, side // 2
        if halvings == 0:
            raise ValueError(f"images of {size}x{size} pixels cannot be halved: a DCGAN needs an even side above 4")
        self.latent = latent
        widths = [width * 2**i for i in range(halvings)]
        self.discriminator = nn.Sequential(*_discriminator(channels, widths, side))
        self.generator = nn.Sequential(*_generator(channels, widths[::-1], side, latent))
        self.apply(_initialise)

    def forward(self, noise: Tensor) -> Tensor:
        """Generate images ``(B, channels, size, size)`` in [-1, 1] from noise ``(B, latent)``."""
        images: Tensor = self.generator(noise)
        return images


def _discriminator(channels: int, widths: list[int], side: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2)]
    return [*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, 1), nn.Flatten(0)]


def _generator(channels: int, widths: list[int], side: int, latent: int) -> list[nn.Module]:
    first = widths[0]
    layers: list[nn.Module] = [nn.Linear(latent, first * side**2, bias=False), nn.Unflatten(1, (first, side, side))]
    layers += [nn.BatchNorm2d(first), nn.ReLU()]
    for wide, narrow in pairwise(widths):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()]
    return [*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


# By name: called with channels and size.
GANS: Final[dict[str, Callable[..., Dcgan]]] = {
    "dcgan": partial(Dcgan, width=64, latent=100),  # the published width of the layer next to the image
    "dcgan_small": partial(Dcgan, width=16, latent=32),  # ours, for runs on a CPU
}
