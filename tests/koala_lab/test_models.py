"""Networks: parameter counts against published totals, shapes, initial values, an independent forward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from koala_lab import data, models

# Parameters of torchvision's networks for ImageNet, as its documentation publishes them.
PUBLISHED = {"resnet18": 11_689_512, "resnet50": 25_557_032, "wide_resnet50_2": 68_883_240, "resnext50": 25_028_904}
FEATURES = {"resnet8": 32, "resnet18": 512, "resnet50": 2048, "wide_resnet50_2": 2048, "resnext50": 2048}
PAPER = sorted(PUBLISHED)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, **kwargs: int) -> nn.Module:
    """The network without its numbers: quick, whatever its size."""
    with torch.device("meta"):
        return models.build(name, **kwargs)


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("name", PAPER)
def test_parameter_count_follows_from_torchvisions(name: str, classes: int) -> None:
    stem = 64 * 3 * (7 * 7 - 3 * 3)  # 7x7 there, 3x3 here
    head = (FEATURES[name] + 1) * (1000 - classes)
    assert count(on_meta(name, num_classes=classes)) == PUBLISHED[name] - stem - head


def test_parameter_count_of_resnet18_in_the_paper() -> None:
    assert count(on_meta("resnet18", num_classes=100)) == 11_220_132
    assert count(on_meta("resnet18", num_classes=10)) == 11_173_962


@pytest.mark.parametrize(("name", "depth", "width"), [("resnet8", 1, 8), ("resnet56", 9, 16), ("resnet110", 18, 16)])
def test_parameter_count_of_the_thin_networks(name: str, depth: int, width: int) -> None:
    def block(a: int, b: int) -> int:
        shortcut = a * b + 2 * b if a != b else 0
        return 9 * a * b + 9 * b * b + 4 * b + shortcut

    widths = (width, 2 * width, 4 * width)
    firsts = sum(block(a, b) for a, b in zip((width, *widths), widths, strict=False))
    others = sum(block(b, b) for b in widths) * (depth - 1)
    stem, head = 9 * 3 * width + 2 * width, (4 * width + 1) * 10
    assert count(on_meta(name, num_classes=10)) == stem + firsts + others + head


def test_apollos_networks() -> None:
    """1.73 M parameters (README of its code); 6n + 2 layers with n = 18; ResNeXt-50 with ImageNet's stem."""
    thin = on_meta("resnet110", num_classes=10)
    assert round(count(thin) / 1e6, 2) == 1.73
    weighted = [m for name, m in thin.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "down" not in name]
    assert len(weighted) == 110
    large = on_meta("resnext50", num_classes=1000, image_size=224)
    assert count(large) == PUBLISHED["resnext50"]
    middle = [m.conv2 for m in large.modules() if hasattr(m, "conv3")]
    assert {m.groups for m in middle} == {32}
    assert [m.out_channels for m in middle] == [128] * 3 + [256] * 4 + [512] * 6 + [1024] * 3
    sizes = []
    for stage in ("maxpool", "layer1", "layer4"):
        large.get_submodule(stage).register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
    assert large(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert sizes == [(64, 56, 56), (256, 56, 56), (2048, 7, 7)]


@pytest.mark.parametrize(
    ("name", "norms"), [("resnet8", 9), ("resnet18", 20), ("resnet50", 53), ("wide_resnet50_2", 53), ("resnet110", 111)]
)
def test_batch_norm_follows_every_convolution(name: str, norms: int) -> None:
    model = on_meta(name, num_classes=10)
    buffers = dict(model.named_buffers())
    for kind in ("running_mean", "running_var", "num_batches_tracked"):
        assert sum(key.endswith(kind) for key in buffers) == norms
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == norms
    assert all(m.bias is None for m in convolutions)


def test_names_are_torchvisions() -> None:
    names = set(on_meta("resnet50", num_classes=10).state_dict())
    for name in (
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",  # 64 to 256 channels at stride 1
        "layer1.0.downsample.1.bias",
        "layer3.5.bn3.weight",
        "layer4.2.conv3.weight",
        "fc.weight",
        "fc.bias",
    ):
        assert name in names
    assert "layer1.0.downsample.0.weight" not in on_meta("resnet18", num_classes=10).state_dict()


@pytest.mark.parametrize("name", PAPER)
def test_maps_shrink_after_the_first_stage_only(name: str) -> None:
    model = on_meta(name, num_classes=10)
    sizes = []
    for stage in range(1, 5):
        model.get_submodule(f"layer{stage}").register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    wide = 1 if name == "resnet18" else 4
    assert sizes == [(64 * wide, 32, 32), (128 * wide, 16, 16), (256 * wide, 8, 8), (512 * wide, 4, 4)]


def test_bottleneck_width_and_stride() -> None:
    for name, width, groups in (("resnet50", 128, 1), ("wide_resnet50_2", 256, 1), ("resnext50", 256, 32)):
        block = on_meta(name, num_classes=10).get_submodule("layer2.0")
        assert block.conv2.weight.shape == (width, width // groups, 3, 3)
        assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize(("side", "stem"), [(8, 8), (16, 16), (28, 14), (32, 16)])
def test_resnet8_halves_larger_images_at_once(side: int, stem: int) -> None:
    model = models.build("resnet8", num_classes=10, in_channels=1, image_size=side)
    assert model.conv1(torch.zeros(1, 1, side, side)).shape == (1, 8, stem, stem)
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = models.build("resnet18", num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            out, _, height, width = module.weight.shape
            expected = math.sqrt(2 / (out * height * width))  # Kaiming-normal, fan_out
            error = abs(module.weight.std().item() / expected - 1)
            assert error < 5 / math.sqrt(2 * module.weight.numel()), name  # five standard errors of a deviation
            assert module.weight.abs().max() > 3 * expected, f"{name} is not normal"
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    bound = 1 / math.sqrt(512)  # torch's default of a linear layer is uniform
    assert 0.99 * bound < model.fc.weight.abs().max() <= bound


def test_seed_decides_the_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in models.build("resnet8", num_classes=10).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def slow_resnet8(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The network written out: He et al. 2016, with batch statistics computed by hand."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (state[f"{name}.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    x = norm(conv(x, "conv1"), "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        b, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        inner = norm(conv(x, f"{b}.conv1", stride), f"{b}.bn1").clamp(min=0)
        inner = norm(conv(inner, f"{b}.conv2"), f"{b}.bn2")
        shortcut = x if stage == 1 else norm(conv(x, f"{b}.downsample.0", stride), f"{b}.downsample.1")
        x = (inner + shortcut).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_forward_pass_and_gradient_against_the_formulas() -> None:
    torch.manual_seed(0)
    model = models.build("resnet8", num_classes=5, in_channels=2, image_size=8).double()
    for parameter in model.parameters():  # BatchNorm's ones and zeros would hide a mistake
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    state = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in model.state_dict().items()}
    got, expected = model(x), slow_resnet8(x, state)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=name)


def test_evaluation_uses_the_running_statistics() -> None:
    torch.manual_seed(0)
    model = models.build("resnet8", num_classes=10)
    x = torch.randn(16, 3, 8, 8) + 2
    model.train()
    model(x)
    assert model.bn1.num_batches_tracked == 1
    assert model.bn1.running_mean.abs().max() > 0
    model.eval()
    torch.testing.assert_close(model(x)[:4], model(x[:4]))  # an image's logits do not depend on its batch


def test_resnet8_learns_digits() -> None:
    digits = data.load("digits")
    torch.manual_seed(0)
    model = models.build("resnet8", num_classes=10, in_channels=1, image_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels, statistics = digits.train_images, digits.train_labels, {"mean": digits.mean, "std": digits.std}
    for epoch in range(4):
        generator = data.epoch_generator(0, epoch)
        for x, y in data.batches(images, labels, 32, generator=generator, drop_last=True, **statistics):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()
    ((x, y),) = data.batches(digits.test_images, digits.test_labels, 500, **statistics)
    error = (model(x).argmax(1) != y).float().mean().item()
    assert error < 0.15  # chance: 0.9; about 0.03 after four epochs


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'resnet-18'.*did you mean 'resnet18'"):
        models.build("resnet-18", num_classes=10)
    with pytest.raises(ValueError, match="num_classes must be a whole number >= 1, got 0"):
        models.build("resnet8", num_classes=0)
