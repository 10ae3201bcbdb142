"""Generative adversarial networks (Goodfellow et al., NeurIPS 2014) on images, and how good their samples are."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad, softplus
from torch.optim import Optimizer

from koala_lab import data
from koala_lab.checks import check_known, check_whole
from koala_lab.models import MODELS
from koala_lab.models.dcgan import GANS, Dcgan
from koala_lab.tasks._base import Task, autocast, closure_step
from koala_lab.tasks.classification import Classification

if TYPE_CHECKING:
    from koala_lab.config import RunConfig

LOSSES = ("non_saturating", "hinge")
CHUNK = 500  # images at once where nothing is trained


class Gan(Task):
    r"""A generator G against a discriminator D, each with an optimizer of its own and the same arguments.

    A step first moves D, on real images x and samples of G, then G, on new noise z. The losses of one pair are

    * ``"non_saturating"``: D pays :math:`-\log\sigma(D(x))-\log(1-\sigma(D(G(z))))`, G pays
      :math:`-\log\sigma(D(G(z)))`. All are positive; where G has won, D = 0 everywhere, they are 2 log 2 and log 2;
    * ``"hinge"``: D pays :math:`\max(0,1-D(x))+\max(0,1+D(G(z)))`, G pays :math:`-D(G(z))`, of either sign
      (Lim & Ye, arXiv 1705.02894).

    Training losses are the means of both, and the share of steps in which the loss of G was negative: below the target
    0 of KOALA's ``target_risk="relative"``, which then steps up the gradient.

    Test metrics are ``frechet_distance``, of samples to the test images, and ``frechet_distance_train``, to the
    training images (:func:`frechet_distance`, :func:`real_images`). G generates in evaluation mode, from noise that is
    the same for all runs. Two constants stand beside them: ``frechet_floor``, the distance of the training images to
    the test images, and ``frechet_untrained``, that of the samples before the first step to the test images.

    Args:
        config: its images are scaled to [-1, 1] and not augmented.
        device: where everything lives.
        loss: one of the two.
        features: the classifier whose features the distance is taken in, a name of :data:`koala_lab.models.MODELS`.
        samples: number of generated images in a distance.

    Raises:
        ValueError: for an option out of range, or a configuration that makes no sense for a GAN.
    """

    datasets = data.names(data.Images)
    networks = GANS
    losses: tuple[str, ...] = ("discriminator_loss", "generator_loss", "generator_loss_negative")
    network: Dcgan

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        loss: str = "non_saturating",
        features: str = "resnet8",
        samples: int = 1000,
    ) -> None:
        _check(config, loss, features, samples)
        self.config, self.device, self.loss, self.samples = config, device, loss, samples
        self.data = data.load(config.dataset, device=device, train_size=config.train_size)
        images = self.data.train_images
        self.steps_per_epoch = len(images) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch_size={config.batch_size} exceeds the {len(images)} training samples")
        options = dict(config.model_args)
        self.network = GANS[config.model](channels=images.shape[1], size=images.shape[-1], **options).to(device)
        self.parts = {"discriminator": self.network.discriminator, "generator": self.network.generator}
        self._features = features
        self.untrained = self.distances(self.network.eval())["frechet_distance"]

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        half = torch.full((self.data.train_images.shape[1],), 0.5)  # 0 to 1 becomes -1 to 1
        return data.batches(
            self.data.train_images,
            self.data.train_labels,
            self.config.batch_size,
            mean=half,
            std=half,
            generator=data.epoch_generator(self.config.seed, epoch),
            drop_last=True,
            start=start,
        )

    def _noise(self, count: int) -> Tensor:
        # Torch's default generator, whose state is part of a checkpoint.
        return torch.randn(count, self.network.latent, device=self.device)

    def discriminator_losses(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the losses of D, shape ``(B,)``, one for each pair of a real and a generated image."""
        with autocast(self.config, self.device):
            scores = self.network.discriminator(real), self.network.discriminator(fake)
        true, false = (score.float() for score in scores)
        hinge = self.loss == "hinge"
        losses: Tensor = (1 - true).relu() + (1 + false).relu() if hinge else softplus(-true) + softplus(false)
        return losses

    def generator_losses(self, noise: Tensor) -> Tensor:
        """Return the losses of G, shape ``(B,)``; the weights of D are constants in it."""
        with _frozen(self.network.discriminator), autocast(self.config, self.device):
            score: Tensor = self.network.discriminator(self.network(noise)).float()
        return -score if self.loss == "hinge" else softplus(-score)

    def step(self, batch: tuple[Tensor, Tensor], optimizers: Mapping[str, Optimizer]) -> Tensor:
        real = batch[0]
        with torch.no_grad(), autocast(self.config, self.device):
            fake = self.network(self._noise(len(real)))
        discriminator = closure_step(optimizers["discriminator"], lambda: self.discriminator_losses(real, fake))
        noise = self._noise(len(real))
        generator = closure_step(optimizers["generator"], lambda: self.generator_losses(noise))
        return torch.stack([discriminator, generator, (generator < 0).float()])

    def reference(self) -> RealImages:
        """Return what the samples are compared with."""
        return real_images(classifier(self.config, self._features), str(self.device))

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        constants = {"frechet_floor": self.reference().floor, "frechet_untrained": self.untrained}
        return self.distances(network) | constants

    @torch.no_grad()
    def distances(self, network: nn.Module) -> dict[str, float]:
        """Return how far samples of a generator are from the real images."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.samples, self.network.latent, generator=generator).to(self.device)
        reference = self.reference()
        fakes = (network(z) for z in torch.split(noise, CHUNK))
        samples = gaussian(torch.cat([reference.features((x + 1) / 2) for x in fakes]))
        return {
            "frechet_distance": frechet_distance(samples, reference.test),
            "frechet_distance_train": frechet_distance(samples, reference.train),
        }

    @torch.no_grad()
    def pictures(self) -> dict[str, str]:
        """Return ``"samples"``: 2 rows of 8 images, from the same noise in every run."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(16, self.network.latent, generator=generator).to(self.device)
        images = pad(self.network.eval()(noise).cpu(), (0, 1, 0, 1), value=1.0)  # a white line between them
        _, channels, height, width = images.shape
        grid = images.view(2, 8, channels, height, width).permute(0, 3, 1, 4, 2)  # row, y, column, x, colour
        pixels = ((grid.reshape(2 * height, 8 * width, channels) + 1) * 127.5).round().byte().squeeze(2).numpy()
        file = io.BytesIO()
        # A palette takes a third of the bytes, and the results are committed.
        Image.fromarray(pixels).quantize(16 if channels == 1 else 64).save(file, "PNG", optimize=True)
        return {"samples": base64.b64encode(file.getvalue()).decode()}


def _check(config: RunConfig, loss: str, features: str, samples: int) -> None:
    check_known("loss", loss, LOSSES)
    check_whole("samples", samples, 2)
    check_known("features", features, MODELS)
    if config.augment:
        raise ValueError("augment=True: a GAN would learn the black borders of random crops")
    if config.wrapper == "swa":
        raise ValueError("wrapper='swa': BatchNorm statistics of a generator cannot be taken on images")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Yield weights as constants, so that no gradient of theirs is computed."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


# ---- quality of samples ------------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """A Gaussian fitted to features: mean ``(d,)`` and covariance ``(d, d)``, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


def gaussian(features: Tensor) -> Gaussian:
    """Return the mean and unbiased covariance of features ``(N, d)``, N >= 2."""
    features = features.detach().to("cpu", torch.float64)
    return Gaussian(features.mean(0), features.T.cov())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    r"""Return the squared Fréchet distance of two Gaussians, the "FID" of Heusel et al. (NeurIPS 2017, eq. 6).

    .. math:: d^2 = |m_a - m_b|^2 + \mathrm{tr}\big(C_a + C_b - 2 (C_a C_b)^{1/2}\big)

    The square root has the eigenvalues of the symmetric :math:`C_a^{1/2} C_b C_a^{1/2}`, which serves covariances of
    any rank.

    >>> unit = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    >>> round(frechet_distance(unit, Gaussian(unit.mean + 3, 4 * unit.covariance)), 9)  # 2 * 3^2 + 2 * (2 - 1)^2
    20.0
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * overlap))


class RealImages:
    """Real images as a classifier trained on them sees them.

    Attributes:
        train, test: their features, fitted by Gaussians.
        floor: the distance between the two, which a generator that shows training images would reach.
        test_error: top-1 error of the classifier (%).
    """

    def __init__(self, task: Classification) -> None:
        network = task.network.eval()
        self.body = nn.Sequential(*list(network.children())[:-1])
        self._mean, self._std = (t.view(1, -1, 1, 1) for t in (task.data.mean, task.data.std))
        images = task.data.train_images, task.data.test_images
        self.train, self.test = (
            gaussian(torch.cat([self.features(part / 255) for part in torch.split(x, CHUNK)])) for x in images
        )
        self.floor = frechet_distance(self.train, self.test)
        self.test_error = task.evaluate(network)["test_error"]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer of the classifier sees, ``(B, d)``, for images ``(B, C, H, W)`` in [0, 1]."""
        features: Tensor = self.body((images - self._mean) / self._std)
        return features


def classifier(gan: RunConfig, model: str) -> RunConfig:
    """Configure the classifier behind the features of a GAN's images.

    It is always trained in the same way, and by none of the methods compared.
    """
    return type(gan)(
        dataset=gan.dataset,
        train_size=gan.train_size,
        model=model,
        optimizer="sgd",
        optimizer_args={"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        epochs=5,
        batch_size=64,
    )


@cache
def real_images(config: RunConfig, device: str) -> RealImages:
    """Train a :func:`classifier` and look at the real images; once per process.

    Args:
        config: The classifier.
        device: Where it lives.
    """
    with torch.random.fork_rng(), torch.enable_grad():  # the run that asks first must not notice
        torch.manual_seed(config.seed)
        task = Classification(config, torch.device(device))
        optimizer = torch.optim.SGD(task.network.parameters(), **dict(config.optimizer_args))
        for epoch in range(config.epochs):
            for batch in task.batches(epoch):
                task.step(batch, {"network": optimizer})
    return RealImages(task)
