"""GANs: networks, a training step against a hand-written one, the quality measure, the sign of the residual."""

from __future__ import annotations

import base64
import copy
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import Tensor, nn

from koala_lab import data
from koala_lab.config import RunConfig
from koala_lab.models.dcgan import GANS, Dcgan
from koala_lab.runs import training as train
from koala_lab.tasks import gan
from koala_lab.tasks.gan import Gan, Gaussian, frechet_distance
from koala_lib.optim import KoalaM, KoalaV
from tests.support.guards import NoHostReads

QUICK = RunConfig(
    task="gan",
    task_args={"samples": 100},
    dataset="digits",
    model="dcgan_small",
    optimizer="adam",
    optimizer_args={"lr": 2e-3, "betas": [0.5, 0.999]},
    epochs=2,
    batch_size=64,
    train_size=320,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def task_of(seed: int = 0, **options: Any) -> Gan:
    torch.manual_seed(seed)
    return Gan(QUICK, torch.device("cpu"), **{"samples": 100} | options)


def confident(task: Gan, score: float) -> None:
    """Shift all scores of the discriminator."""
    last = [m for m in task.network.discriminator if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.fill_(score)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("channels", "size", "deepest"), [(1, 8, 4), (1, 28, 7), (3, 32, 4)])
def test_generator_and_discriminator_mirror_each_other(channels: int, size: int, deepest: int) -> None:
    torch.manual_seed(0)
    network = Dcgan(channels=channels, size=size, width=8, latent=5)
    images = network(torch.randn(3, 5))
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert network.discriminator(images).shape == (3,)
    down = [m for m in network.discriminator if isinstance(m, nn.Conv2d)]
    up = [m for m in network.generator if isinstance(m, nn.ConvTranspose2d)]
    assert len(down) == len(up) == int(math.log2(size / deepest))
    assert [m.weight.shape for m in down] == [m.weight.shape for m in reversed(up)]
    assert network.discriminator[0].in_channels == channels
    assert isinstance(network.discriminator[1], nn.LeakyReLU)  # no BatchNorm where the image enters


def test_parameters_counted_by_hand() -> None:
    network = GANS["dcgan_small"](channels=1, size=28)
    discriminator = (16 * 16 + 16) + 16 * 32 * 16 + 2 * 32 + (32 * 49 + 1)
    generator = 32 * (32 * 49) + 2 * 32 + 32 * 16 * 16 + 2 * 16 + (16 * 16 + 1)
    assert sum(p.numel() for p in network.discriminator.parameters()) == discriminator
    assert sum(p.numel() for p in network.generator.parameters()) == generator


def test_weights_start_as_in_dcgan() -> None:
    torch.manual_seed(0)
    for module in GANS["dcgan"](channels=3, size=32).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert module.bias.abs().max() == 0
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias is None or module.bias.abs().max() == 0


def test_an_odd_image_is_refused() -> None:
    with pytest.raises(ValueError, match="images of 7x7 pixels cannot be halved"):
        Dcgan(channels=1, size=7, width=8, latent=5)


# ---------------------------------------------------------------- losses


def test_losses_are_their_formulas() -> None:
    task = task_of()
    real, _ = next(task.batches(0))
    noise = torch.randn(len(real), task.network.latent)
    fake = task.network(noise)
    D = task.network.discriminator
    for shift in (-1.5, 0.0, 1.5):
        confident(task, shift)
        true, false = D(real).double(), D(fake).double()
        task.loss = "non_saturating"
        paid = -true.sigmoid().log() - (1 - false.sigmoid()).log()
        torch.testing.assert_close(task.discriminator_losses(real, fake).double(), paid, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(task.generator_losses(noise).double(), -false.sigmoid().log(), rtol=1e-5, atol=1e-6)
        task.loss = "hinge"
        paid = (1 - true).clamp(min=0) + (1 + false).clamp(min=0)
        torch.testing.assert_close(task.discriminator_losses(real, fake).double(), paid, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(task.generator_losses(noise).double(), -false, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "of_d", "of_g"), [("non_saturating", 2 * math.log(2), math.log(2)), ("hinge", 2, 0)])
def test_an_untrained_pair_already_has_the_losses_of_the_games_end(loss: str, of_d: float, of_g: float) -> None:
    task = task_of(loss=loss)
    real, _ = next(task.batches(0))
    noise = torch.randn(len(real), task.network.latent)
    assert task.discriminator_losses(real, task.network(noise)).mean().item() == pytest.approx(of_d, abs=0.05)
    assert task.generator_losses(noise).mean().item() == pytest.approx(of_g, abs=0.05)


def test_the_discriminator_is_a_constant_in_the_loss_of_the_generator() -> None:
    task = task_of()
    task.generator_losses(torch.randn(4, task.network.latent)).mean().backward()
    assert all(p.grad is None and p.requires_grad for p in task.network.discriminator.parameters())
    assert all(p.grad is not None for p in task.network.generator.parameters())


# ---------------------------------------------------------------- one training step


def adam_by_hand(params: list[Tensor], grads: tuple[Tensor, ...], state: dict[str, Any], lr: float) -> None:
    state["t"] += 1
    with torch.no_grad():
        for p, g, m, v in zip(params, grads, state["m"], state["v"], strict=True):
            m.mul_(0.5).add_(0.5 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            unbiased = m / (1 - 0.5 ** state["t"]), v / (1 - 0.999 ** state["t"])
            p.sub_(lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8))


@pytest.fixture
def double() -> Iterator[None]:
    """Noise and batches in float64."""
    yield torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)


def test_three_steps_equal_a_hand_written_gan(request: pytest.FixtureRequest) -> None:
    task = task_of()
    task.network.double().train()
    request.getfixturevalue("double")
    other = copy.deepcopy(task.network)
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=1e-3, betas=(0.5, 0.999)) for n, p in task.parts.items()}
    D, G = list(other.discriminator.parameters()), list(other.generator.parameters())
    states = [{"t": 0, "m": list(map(torch.zeros_like, p)), "v": list(map(torch.zeros_like, p))} for p in (D, G)]
    start = [p.detach().clone() for p in other.parameters()]

    for k, (real, _) in zip(range(3), task.batches(0), strict=False):
        torch.manual_seed(k)
        first, second = torch.randn(64, other.latent), torch.randn(64, other.latent)
        torch.manual_seed(k)
        losses = task.step((real, None), optimizers)

        fake = other.generator(first).detach()
        of_d = -(other.discriminator(real).sigmoid().log() + (1 - other.discriminator(fake).sigmoid()).log())
        adam_by_hand(D, torch.autograd.grad(of_d.mean(), D), states[0], 1e-3)
        of_g = -other.discriminator(other.generator(second)).sigmoid().log()
        adam_by_hand(G, torch.autograd.grad(of_g.mean(), G), states[1], 1e-3)
        assert losses.tolist() == pytest.approx([of_d.mean().item(), of_g.mean().item(), 0.0], rel=1e-6)
    # Losses are taken in float32, so 1e-7 of a gradient is lost; a step moves a weight by 1e-3.
    for mine, theirs in zip(task.network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    assert max((a - b).abs().max() for a, b in zip(start, other.parameters(), strict=True)) > 1e-3


def test_each_player_is_moved_by_its_own_optimizer_only() -> None:
    for frozen in ("discriminator", "generator"):
        task = task_of()
        before = {n: [p.detach().clone() for p in m.parameters()] for n, m in task.parts.items()}
        rates = {n: 0.0 if n == frozen else 1.0 for n in task.parts}
        optimizers = {n: KoalaM(m.parameters(), lr=rates[n]) for n, m in task.parts.items()}
        task.step(next(task.batches(0)), optimizers)
        moved = {
            n: any(not torch.equal(a, b) for a, b in zip(before[n], m.parameters(), strict=True))
            for n, m in task.parts.items()
        }
        assert moved == {n: n != frozen for n in task.parts}


def test_a_step_reads_nothing_back_to_the_host() -> None:
    task = task_of()
    optimizers = {n: KoalaM(m.parameters(), formulas="released") for n, m in task.parts.items()}
    batches = task.batches(0)
    with NoHostReads():
        for _ in range(3):
            assert task.step(next(batches), optimizers).shape == (len(task.losses),)


# ---------------------------------------------------------------- the sign of the residual


@pytest.mark.parametrize("method", [KoalaV, KoalaM])
@pytest.mark.parametrize("start", [2.0, -2.0])
def test_a_relative_target_turns_round_below_zero_and_an_absolute_one_does_not(method: Any, start: float) -> None:
    slope = torch.tensor([3.0, -4.0], dtype=torch.float64)
    P = 1.1 if method is KoalaV else 0.2  # predicted variance of the first step
    gain = P * 25 / (P * 25 + 9.0)
    for target, after in (("relative", (1 - gain) * start), ("absolute", start - gain)):
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = method([x], target_risk=target, measurement_noise=9.0)
        optimizer.predict()
        loss = slope @ x + start
        loss.backward()
        optimizer.step(loss=loss)
        assert (slope @ x + start).item() == pytest.approx(after, abs=1e-12)


@pytest.mark.parametrize("target", ["relative", "absolute"])
def test_r_does_not_see_the_sign(target: str) -> None:
    estimates = []
    for sign in (1.0, -1.0):
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = KoalaM([x], target_risk=target)
        optimizer.predict()
        losses = sign * torch.stack([x.sum(), 3 * x.sum()])
        losses.mean().backward()
        optimizer.step(loss=losses)
        estimates.append(optimizer.filter_state()["measurement_noise"])
    assert estimates[0] == estimates[1] == pytest.approx(0.9 * 1.0 + 0.1 * (2**2 + 6**2) / 2)


@pytest.mark.parametrize("target", ["relative", "absolute"])
def test_a_generator_ahead_under_the_hinge_loss_is_turned_back_by_the_relative_target_only(target: str) -> None:
    task = task_of(loss="hinge")
    with torch.no_grad():
        for p in task.network.discriminator.parameters():
            p.mul_(10)  # so that its scores depend on the image
    confident(task, 5.0)
    noise = torch.randn(64, task.network.latent)
    optimizer = KoalaV(task.network.generator.parameters(), lr=0.01, target_risk=target)
    before = task.generator_losses(noise).mean()
    assert before < 0
    optimizer.predict()
    losses = task.generator_losses(noise)
    losses.mean().backward()
    optimizer.step(loss=losses)
    after = task.generator_losses(noise).mean()
    assert (after > before) == (target == "relative")
    assert abs(after - before) > 1e-4


@pytest.mark.parametrize(("loss", "share"), [("hinge", 1.0), ("non_saturating", 0.0)])
def test_negative_losses_are_counted(loss: str, share: float) -> None:
    task = task_of(loss=loss)
    confident(task, 5.0)
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=1e-6) for n, m in task.parts.items()}
    losses = dict(zip(task.losses, task.step(next(task.batches(0)), optimizers).tolist(), strict=True))
    assert losses["generator_loss_negative"] == share
    assert (losses["generator_loss"] < 0) == bool(share)


# ---------------------------------------------------------------- quality of samples


def random_gaussian(rank: int, size: int, seed: int) -> Gaussian:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, rank))
    return Gaussian(torch.from_numpy(rng.normal(size=size)), torch.from_numpy(root @ root.T))


@pytest.mark.parametrize(("ranks", "tolerance"), [((6, 6), 1e-9), ((9, 40), 1e-9), ((3, 6), 1e-5), ((2, 2), 1e-5)])
def test_frechet_distance_against_a_general_matrix_square_root(ranks: tuple[int, int], tolerance: float) -> None:
    a, b = (random_gaussian(rank, 6, seed) for seed, rank in enumerate(ranks))
    product = (a.covariance @ b.covariance).numpy()
    root = linalg.sqrtm(product + 1e-13 * np.eye(6))  # which a singular product does not have for certain
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=tolerance)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=tolerance)


def test_frechet_distance_in_the_limits() -> None:
    a = random_gaussian(6, 6, 0)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    shift = torch.arange(6.0).double()
    assert frechet_distance(a, Gaussian(a.mean + shift, a.covariance)) == pytest.approx(55.0)
    nothing = Gaussian(a.mean, torch.zeros_like(a.covariance))  # a generator of one picture
    assert frechet_distance(a, nothing) == pytest.approx(a.covariance.trace().item())
    one, two = (Gaussian(torch.tensor([m]).double(), torch.tensor([[s**2]]).double()) for m, s in ((1, 2), (4, 7)))
    assert frechet_distance(one, two) == pytest.approx((1 - 4) ** 2 + (2 - 7) ** 2)


def test_gaussian_is_numpys_mean_and_covariance() -> None:
    features = np.random.default_rng(0).normal(size=(40, 5)) + 3
    fitted = gan.gaussian(torch.from_numpy(features).float())
    assert fitted.mean.dtype == fitted.covariance.dtype == torch.float64
    np.testing.assert_allclose(fitted.mean, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(fitted.covariance, np.cov(features.T), rtol=1e-5, atol=1e-6)


def test_features_are_those_of_a_classifier_trained_as_any_other_run() -> None:
    config = gan.classifier(QUICK.but(train_size=320), "resnet8")
    result = train.train(config)
    reference = gan.real_images(config, "cpu")
    assert float(f"{reference.test_error:.6g}") == result.final["test_error"] < 15
    images = data.load("digits", train_size=320)
    for part, fitted in ((images.train_images, reference.train), (images.test_images, reference.test)):
        features = reference.features(part / 255)
        assert features.shape == (len(part), 32)
        torch.testing.assert_close(fitted.mean, features.double().mean(0), rtol=1e-5, atol=1e-5)
    assert reference.floor == pytest.approx(frechet_distance(reference.train, reference.test))
    x, _ = next(data.batches(images.test_images, images.test_labels, 50, mean=images.mean, std=images.std))
    torch.testing.assert_close(reference.features(images.test_images[:50] / 255), reference.body(x))


def test_the_run_that_asks_first_for_the_classifier_does_not_notice() -> None:
    gan.real_images.cache_clear()
    first = train.train(QUICK.but(epochs=1))
    again = train.train(QUICK.but(epochs=1))
    assert gan.real_images.cache_info().misses == 1
    assert first.provenance["weights_sha256"] == again.provenance["weights_sha256"]
    assert first.epochs == again.epochs


def test_metrics_are_the_distances_of_samples_from_the_same_noise() -> None:
    task = task_of()
    metrics = task.evaluate(task.network.eval())
    state = torch.get_rng_state()
    assert task.evaluate(task.network) == metrics
    assert torch.equal(state, torch.get_rng_state())
    noise = torch.randn(100, task.network.latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = gan.gaussian(task.reference().features((task.network(noise) + 1) / 2))
    assert metrics["frechet_distance"] == pytest.approx(frechet_distance(samples, task.reference().test), rel=1e-4)
    assert metrics["frechet_distance_train"] == pytest.approx(
        frechet_distance(samples, task.reference().train), rel=1e-4
    )
    assert metrics["frechet_untrained"] == metrics["frechet_distance"]
    assert metrics["frechet_floor"] == task.reference().floor


def test_pictures_are_the_samples_in_their_order() -> None:
    task = task_of()
    with torch.no_grad():
        task.network.generator[-2].weight.mul_(50)  # black and white instead of grey
    picture = Image.open(io.BytesIO(base64.b64decode(task.pictures()["samples"])))
    pixels = torch.from_numpy(np.array(picture.convert("L"))).float()
    assert pixels.shape == (2 * 9, 8 * 9)
    with torch.no_grad():
        images = task.network.eval()(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    shown = pixels.view(2, 9, 8, 9).permute(0, 2, 1, 3).reshape(16, 9, 9)
    assert images.std() > 0.3
    assert (shown[:, :8, :8] - (images[:, 0] + 1) * 127.5).abs().max() < 40  # 16 shades
    assert (shown[:, 8] == 255).all()
    assert len(task.pictures()["samples"]) < 2000


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("optimizer", ["adam", "koala_m"])
def test_a_run_learns_and_reports(optimizer: str) -> None:
    arguments = {"koala_m": {"momentum": 0.5, "formulas": "released"}}.get(optimizer, QUICK.optimizer_args)
    result = train.train(QUICK.but(epochs=6, optimizer=optimizer, optimizer_args=arguments, train_size=None))
    assert result.status == "done"
    assert result.final["frechet_distance"] < 0.5 * result.final["frechet_untrained"]
    assert {"discriminator_loss", "generator_loss", "frechet_distance_train"} < set(result.final)
    assert result.final["generator_loss_negative"] == 0
    assert set(result.pictures) == {"samples"}


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adam", "koala_m"])
def test_resume_at_a_random_step_gives_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    arguments = {"adam": QUICK.optimizer_args}.get(optimizer, {})
    config = QUICK.but(optimizer=optimizer, optimizer_args=arguments, task_args={"samples": 100, "loss": "hinge"})
    whole = train.train(config)
    stop = random.SystemRandom().randrange(1, 10)

    def interrupt(done: int, total: int) -> None:
        if done == stop + 1:
            raise _Interrupt

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(_Interrupt):
        train.train(config, checkpoint=checkpoint, checkpoint_seconds=0, on_step=interrupt)
    torch.manual_seed(12345)  # the noise of the rest must come from the checkpoint
    rest = train.train(config, checkpoint=checkpoint)
    assert rest.epochs == whole.epochs, f"stopped after {stop}"
    assert rest.provenance["weights_sha256"] == whole.provenance["weights_sha256"], f"stopped after {stop}"
    assert rest.pictures == whole.pictures


def test_the_key_knows_the_task_and_its_options() -> None:
    keys = {
        QUICK.key,
        QUICK.but(task_args={}).key,
        QUICK.but(task_args={"samples": 200}).key,
        QUICK.but(task_args={"samples": 100, "loss": "hinge"}).key,
        QUICK.but(model="dcgan").key,
        QUICK.but(task="classification", task_args={}, model="resnet8").key,
    }
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_args": {"los": "hinge"}}, "task 'gan' has no option 'los'; it has loss, features, samples"),
        ({"task_args": {"loss": "wasserstein"}}, "loss 'wasserstein' is unknown; known are non_saturating, hinge"),
        ({"task_args": {"features": "inception"}}, "features 'inception' is unknown; known are resnet8"),
        ({"task_args": {"samples": 1}}, "samples must be a whole number >= 2, got 1"),
        ({"model_args": {"init": "orthogonal"}}, "init"),
        ({"augment": True}, "augment=True: a GAN would learn the black borders"),
        ({"wrapper": "swa", "wrapper_args": {"start": 1}}, "wrapper='swa'"),
        ({"batch_size": 512}, "batch_size=512 exceeds the 320 training samples"),
    ],
)
def test_what_a_gan_cannot_do_is_said_in_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        train.train(QUICK.but(**change))
    assert "\n" not in str(raised.value)


def test_a_classifier_is_no_gan() -> None:
    with pytest.raises(ValueError, match="model 'resnet8' is unknown; known are dcgan, dcgan_small of task 'gan'"):
        QUICK.but(model="resnet8")
