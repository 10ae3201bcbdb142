"""Per-sample moments against an explicit loop over samples, for every layer rule and every way around them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from koala_lab import models
from koala_lib.moments import SampleMoments, _calls, _products, _tangents, _vmap, observe, sample_moments

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def cubic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs of any shape to (B,), with curvature everywhere."""
    outputs = outputs.flatten(1)
    return (outputs**3 / 3 + outputs.sin() * targets[:, None]).mean(1)


def loop(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor, direction: Mapping[str, Tensor] | None
) -> SampleMoments:
    """The definition: one sample after the other, its gradient differentiated once more."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradients, products = [], [], []
    for i in range(len(inputs)):
        with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
            loss = loss_fn(model(inputs[i : i + 1]), targets[i : i + 1]).sum()
        graph = torch.autograd.grad(loss, list(named.values()), create_graph=True, materialize_grads=True)
        losses.append(loss.detach())
        gradients.append(torch.cat([g.detach().flatten() for g in graph]))
        if direction is not None:
            slope = torch.stack([(g * direction[name]).sum() for name, g in zip(named, graph, strict=True)]).sum()
            zero = [torch.zeros_like(p) for p in named.values()]
            second = (
                torch.autograd.grad(slope, list(named.values()), allow_unused=True) if slope.requires_grad else zero
            )
            second = [z if h is None else h for h, z in zip(second, zero, strict=True)]
            products.append(torch.cat([h.flatten() for h in second]))

    def split(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([p.numel() for p in named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}

    loss, gradient = torch.stack(losses), torch.stack(gradients)
    hvp = torch.stack(products) if products else None
    slope = curvature = None
    if hvp is not None and direction is not None:
        along = torch.cat([direction[name].flatten() for name in named])
        slope, curvature = gradient @ along, hvp @ along
    return SampleMoments(
        loss.mean(),
        loss.var(),
        split(gradient.mean(0)),
        gradient.var(0).mean(),
        None if hvp is None else split(hvp.mean(0)),
        None if hvp is None else hvp.var(0).mean(),
        None if slope is None else slope.var(),
        None if curvature is None else curvature.mean(),
        None if curvature is None else curvature.var(),
    )


SCALARS = ("loss", "loss_variance", "gradient_variance", "hvp_variance", "slope_variance", "curvature")
SCALARS += ("curvature_variance",)


def assert_equal(actual: SampleMoments, expected: SampleMoments, tolerance: float = 1e-9) -> None:
    for field in SCALARS:
        value, reference = getattr(actual, field), getattr(expected, field)
        assert (value is None) == (reference is None), field
        if value is not None:
            assert value.shape == ()
            assert not value.requires_grad
            # a mean may be small beside what it is the mean of
            spread = expected.curvature_variance if field == "curvature" else None
            least = 1e-14 if spread is None else max(1e-14, tolerance * float(spread) ** 0.5)
            torch.testing.assert_close(value.double(), reference.double(), rtol=tolerance, atol=least, msg=field)
    for field in ("gradient", "hvp"):
        value, reference = getattr(actual, field), getattr(expected, field)
        assert (value is None) == (reference is None), field
        if value is not None:
            assert list(value) == list(reference)
            scale = max(float(t.abs().max()) for t in reference.values())
            for name, t in reference.items():
                assert value[name].dtype != torch.float64 or tolerance < 1e-6
                assert not value[name].requires_grad
                error = float((value[name].double() - t.double()).abs().max()) / (scale + 1e-30)
                assert error < tolerance, f"{field} of {name} is off by {error:.1e}"


def direction_for(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}


def assert_along(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor, direction: Mapping[str, Tensor]
) -> None:
    """A pass along the direction, after moments along another one, beside the loop; in float64 to 1e-10."""
    expected = loop(model, loss_fn, inputs, targets, direction)
    assert expected.slope_variance is not None
    other = {name: torch.randn_like(d) for name, d in direction.items()}
    for name, d in direction.items():  # rows that torch gives no gradient
        other[name][d == 0] = 0
    found = observe(model, loss_fn, inputs, targets, other, "structured").along(direction)
    slope = sum(float((expected.gradient[name] * d).sum()) for name, d in direction.items())
    assert float(found.slope) == pytest.approx(slope, rel=1e-10, abs=1e-13)
    for field in ("slope_variance", "curvature", "curvature_variance"):
        assert getattr(found, field).dtype == torch.float64
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-10, atol=1e-13, msg=field)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How slopes and curvatures were found: by a "pass" of tangents, or from all "moments"."""
    ways: list[str] = []
    along = _tangents.Tape.along

    def spy(tape: _tangents.Tape, direction: Mapping[str, Tensor]) -> Any:
        try:
            found = along(tape, direction)
        except _calls.UnknownCallError:
            ways.append("moments")
            raise
        ways.append("pass")
        return found

    monkeypatch.setattr(_tangents.Tape, "along", spy)
    return ways


@pytest.fixture
def fallen_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parameters that were left to vmap."""
    names: list[str] = []
    run = _vmap.run

    def spy(*args: Any) -> Any:
        names.extend(args[-1])
        return run(*args)

    monkeypatch.setattr(_vmap, "run", spy)
    return names


# -- networks for every rule ------------------------------------------------------------------------------------------


class Apply(nn.Module):
    """A function of the input and of this module."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def noise(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2 + 0.2)


def twice(*layers: nn.Module) -> nn.Sequential:
    """The first layer meets inputs without a tangent, the others do not."""
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def image(channels: int, *size: int) -> Callable[[int], Tensor]:
    return lambda samples: torch.randn(samples, channels, *size)


def tokens(vocabulary: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda samples: torch.randint(vocabulary, (samples, *shape))


KNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: twice(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2)), image(4)),
    "linear, few positions": (lambda: twice(nn.Linear(9, 8), nn.Linear(8, 9)), image(3, 9)),
    "linear, many positions": (lambda: twice(nn.Linear(2, 3), nn.Linear(3, 2)), image(4, 3, 2)),
    "conv1d": (lambda: twice(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 2, stride=2)), image(2, 9)),
    "conv2d": (lambda: twice(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, (2, 3), bias=False)), image(2, 6, 7)),
    "conv2d, few positions": (lambda: twice(nn.Conv2d(6, 9, 3), nn.Conv2d(9, 8, 2)), image(6, 4, 4)),
    "conv2d, stride and padding": (
        lambda: twice(nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2)), nn.Conv2d(3, 2, 3, stride=(1, 2), padding=1)),
        image(2, 7, 6),
    ),
    "conv2d, dilation": (lambda: twice(nn.Conv2d(2, 3, 2, dilation=(2, 3)), nn.Conv2d(3, 2, 2)), image(2, 6, 6)),
    "conv2d, same": (
        lambda: twice(nn.Conv2d(2, 3, (4, 2), padding="same"), nn.Conv2d(3, 2, 3, padding="valid")),
        image(2, 5, 5),
    ),
    "conv2d, groups": (
        lambda: twice(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 2, groups=6), nn.Conv2d(6, 4, 2, groups=2)),
        image(4, 5, 5),
    ),
    "conv2d, groups, few positions": (lambda: twice(nn.Conv2d(8, 10, 2, groups=2)), image(8, 2, 3)),
    "conv2d, 1x1": (lambda: twice(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, stride=2)), image(3, 4, 4)),
    "conv2d, circular": (lambda: twice(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")), image(2, 4, 4)),
    "conv3d": (lambda: twice(nn.Conv3d(2, 3, 2, padding=1), nn.Conv3d(3, 2, 2)), image(2, 3, 4, 3)),
    "group norm": (
        lambda: twice(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 2), nn.GroupNorm(3, 6), nn.GroupNorm(6, 6, affine=False)),
        image(4, 3, 3),
    ),
    "group norm, one position": (lambda: twice(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 2)), image(4)),
    "group norm, images in a row": (lambda: twice(nn.Conv1d(2, 4, 2), nn.GroupNorm(1, 4)), image(2, 5)),
    "layer norm": (
        lambda: twice(nn.LayerNorm(4), nn.Linear(4, 6), nn.LayerNorm((3, 6)), nn.LayerNorm(6, bias=False)),
        image(3, 4),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 2)),
        tokens(5, 8),
    ),
    "embedding, padded": (
        lambda: nn.Sequential(nn.Embedding(4, 3, padding_idx=1), nn.Tanh(), nn.Linear(3, 2)),
        tokens(4, 3, 4),
    ),
    "embedding, padded, counted from the end": (
        lambda: Apply(
            lambda m, x: m.b(functional.embedding(x, m.a.weight, padding_idx=-2).tanh()),
            a=nn.Embedding(4, 3, padding_idx=2),
            b=nn.Linear(3, 2),
        ),
        tokens(4, 3, 4),
    ),
    "embedding, one token": (lambda: nn.Sequential(nn.Embedding(3, 4), nn.Tanh(), nn.Linear(4, 2)), tokens(3)),
    "activations in place": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.ELU(inplace=True), nn.GroupNorm(2, 4), nn.ELU(inplace=True), nn.Conv2d(4, 3, 2)
        ),
        image(2, 4, 4),
    ),
    "pooling and shortcuts": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            Apply(lambda m, x: x + m.inner(x), inner=nn.Conv2d(4, 4, 3, padding=1)),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        image(2, 5, 5),
    ),
    "unused parameters": (
        lambda: Apply(lambda m, x: m.a(x).tanh(), a=nn.Linear(3, 2), b=nn.Linear(3, 2), c=noise(4)),
        image(3),
    ),
}

# Networks with parameters that no single known layer accounts for, and the names of these.
PARTLY: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], set[str]]] = {
    "an unknown layer": (
        lambda: twice(nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(3, 2, 2), nn.Conv2d(2, 2, 2)),
        image(2, 4, 4),
        {"2.weight", "2.bias"},
    ),
    "a parameter by itself": (
        lambda: Apply(lambda m, x: m.b(m.scale * m.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2), scale=noise(4)),
        image(3),
        {"scale"},
    ),
    "a parameter before everything": (
        lambda: Apply(lambda m, x: m.a((x * m.scale).tanh()), a=nn.Linear(3, 4), scale=noise(3)),
        image(3),
        {"scale"},
    ),
    "a layer twice": (
        lambda: Apply(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 2)),
        image(3),
        {"a.weight", "a.bias"},
    ),
    "a weight in two ways": (
        lambda: Apply(lambda m, x: functional.linear(m.a(x).tanh(), m.a.weight), a=nn.Embedding(5, 3)),
        tokens(5, 4),
        {"a.weight"},
    ),
    "a weight made of parameters": (
        lambda: Apply(lambda m, x: functional.linear(x, m.u * m.v, m.b).tanh(), u=noise(2, 3), v=noise(3), b=noise(2)),
        image(3),
        {"u", "v"},
    ),
    "fixed batch statistics": (
        lambda: twice(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2)).eval(),
        image(2, 4, 4),
        {"2.weight", "2.bias"},
    ),
    "samples not in front": (
        lambda: Apply(
            lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().transpose(0, 1)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
        ),
        image(6, 3),
        {"a.weight", "a.bias"},
    ),
    "as many positions as samples": (
        lambda: Apply(
            lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().transpose(0, 1)[:, 0]), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
        ),
        lambda samples: torch.randn(samples, samples, 3),
        {"a.weight", "a.bias"},
    ),
    "as many places as samples": (
        lambda: Apply(
            lambda m, x: m.b((m.a(x) + m.place(torch.arange(x.shape[1]))).tanh()),
            a=nn.Embedding(4, 3),
            place=nn.Embedding(9, 3),
            b=nn.Linear(3, 2),
        ),
        lambda samples: torch.randint(4, (samples, samples)),
        {"a.weight", "place.weight", "b.weight", "b.bias"},
    ),
    "a table for all samples": (
        lambda: Apply(
            lambda m, x: (m.a(x) + m.b(torch.eye(3)[:1].double()).tanh()).tanh(), a=nn.Linear(3, 4), b=nn.Linear(3, 4)
        ),
        image(3),
        {"b.weight", "b.bias"},
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        image(7, 4),
        {"self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias"},
    ),
}


def prepared(
    create: Callable[[], nn.Module], draw: Callable[[int], Tensor], samples: int
) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(samples)
    model, inputs = create().double(), draw(samples)
    for p in model.parameters():  # norms start at one and zero
        nn.init.normal_(p, 0.3, 0.6)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    direction = direction_for(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            direction[f"{name}.weight"][module.padding_idx] = 0  # torch gives this row no gradient: it never moves
    return model, inputs, torch.randn(samples, dtype=torch.float64), direction


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("name", KNOWN)
def test_known_layers(name: str, samples: int, fallen_back: list[str]) -> None:
    model, *arguments = prepared(*KNOWN[name], samples)
    assert_equal(sample_moments(model, cubic, *arguments, "structured"), loop(model, cubic, *arguments))
    assert not fallen_back


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("name", PARTLY)
def test_other_parameters_fall_back_and_no_others(name: str, samples: int, fallen_back: list[str]) -> None:
    create, draw, left = PARTLY[name]
    model, *arguments = prepared(create, draw, samples)
    assert_equal(sample_moments(model, cubic, *arguments, "structured"), loop(model, cubic, *arguments))
    assert set(fallen_back) == left


ALL_MOMENTS = {"activations in place", "a weight made of parameters", "samples not in front", "attention"}
ALL_MOMENTS |= {"as many positions as samples", "as many places as samples", "a table for all samples"}


@pytest.mark.parametrize("name", KNOWN | PARTLY)
def test_a_pass_of_tangents(name: str, passes: list[str]) -> None:
    create, draw = (KNOWN | PARTLY)[name][:2]
    model, *arguments = prepared(create, draw, 5)
    assert_along(model, cubic, *arguments)
    assert passes == ["moments" if name in ALL_MOMENTS else "pass"]


ELEMENTARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda x, w: x.tanh(),
    "sigmoid": lambda x, w: torch.sigmoid(x),
    "softmax": lambda x, w: functional.softmax(x, 1),
    "log_softmax": lambda x, w: x.log_softmax(1),
    "gelu": lambda x, w: functional.gelu(x),
    "elu": lambda x, w: functional.elu(x),
    "selu": lambda x, w: functional.selu(x),
    "celu": lambda x, w: functional.celu(x),
    "softplus": lambda x, w: functional.softplus(x),
    "softsign": lambda x, w: functional.softsign(x),
    "logsigmoid": lambda x, w: functional.logsigmoid(x),
    "leaky_relu": lambda x, w: functional.leaky_relu(x),
    "relu6": lambda x, w: functional.relu6(8 * x),
    "hardtanh": lambda x, w: functional.hardtanh(x),
    "relu": lambda x, w: torch.relu(x),
    "powers": lambda x, w: (x.square() + 1).sqrt() + (x**2 + 1).rsqrt() + (x.square() + 1).reciprocal() ** 3,
    "exponentials": lambda x, w: x.sin().exp() + (x.square() + 1).log() + x.square().log1p() + x.cos(),
    "products": lambda x, w: x * w + w / (2 + x.sin()) + 1 / (2 + x.cos()) - (2 - x) * x,
    "sums": lambda x, w: torch.sub(w, x, alpha=2) + 3 + torch.add(x, w, alpha=-1) + (x.clone().add_(w).sub_(x) - 1),
    "matrices": lambda x, w: (x[:, :, None] @ x[:, None, :] * w).sum(2) + torch.bmm(x[:, None], x[:, :, None])[:, 0],
    "shapes": lambda x, w: torch.cat([x.view(-1, 2, 3).transpose(1, 2).flatten(1), -x[:, 1:].mean(1, keepdim=True)], 1),
    "more shapes": lambda x, w: functional.pad(torch.stack([x, x + w], 1).permute(0, 2, 1).reshape(-1, 12), (1, 2)),
}


@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_operations_have_their_second_derivatives(name: str, passes: list[str]) -> None:
    function = ELEMENTARY[name]
    model = Apply(lambda m, x: m.b(function(m.a(x), m.w).tanh()), a=nn.Linear(4, 6), w=noise(6), b=nn.LazyLinear(3))
    torch.manual_seed(0)
    model(torch.randn(2, 4))
    model, *arguments = prepared(lambda: model, image(4), 5)
    assert_along(model, cubic, *arguments)
    assert passes == ["pass"]


def test_pooling_over_one_two_and_three_dimensions(passes: list[str]) -> None:
    for dimensions, pool in ((1, nn.MaxPool1d), (2, nn.MaxPool2d), (3, nn.MaxPool3d)):
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        create = lambda: nn.Sequential(conv(2, 3, 2), pool(2, 1), nn.Tanh(), conv(3, 2, 2))  # noqa: B023, E731
        model, *arguments = prepared(create, image(2, *[5] * dimensions), 4)
        assert_along(model, cubic, *arguments)
    assert passes == ["pass"] * 3


def test_a_pass_leaves_out_what_it_cannot_know() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Flatten(0)).double()
    x, y, direction = torch.randn(4, 3).double(), torch.zeros(4).double(), direction_for(model)
    observation = observe(model, lambda o, t: o - t, x, y)
    assert observation.moments.hvp is None
    torch.manual_seed(1)
    found = observation.along(direction)  # with new noise
    torch.manual_seed(1)
    again = sample_moments(model, lambda o, t: o - t, x, y, direction)
    assert (found.slope_variance, found.curvature) == (again.slope_variance, again.curvature)


def test_a_pass_refuses_directions_that_do_not_fit() -> None:
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    along = observe(model, cubic, x, torch.randn(4)).along
    with pytest.raises(ValueError, match="direction lacks 'bias'"):
        along({"weight": torch.ones(1, 3)})


@pytest.mark.parametrize(
    "name", ["conv2d", "group norm", "embedding", "a layer twice", "attention", "unused parameters"]
)
def test_vmap(name: str) -> None:
    create, draw = (KNOWN | PARTLY)[name][:2]
    model, *arguments = prepared(create, draw, 3)
    assert_equal(sample_moments(model, cubic, *arguments, "vmap"), loop(model, cubic, *arguments))


@pytest.mark.parametrize("method", ["structured", "vmap"])
@pytest.mark.parametrize("name", ["linear, many positions", "conv2d", "group norm", "layer norm", "a layer twice"])
def test_without_direction(name: str, method: str) -> None:
    create, draw = (KNOWN | PARTLY)[name][:2]
    model, inputs, targets, _ = prepared(create, draw, 3)
    moments = sample_moments(model, cubic, inputs, targets, method=method)
    assert moments.hvp is None
    assert moments.hvp_variance is None
    assert_equal(moments, loop(model, cubic, inputs, targets, None))


@pytest.mark.parametrize("name", KNOWN)
def test_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, *arguments = prepared(*KNOWN[name], 5)
    expected = loop(model, cubic, *arguments)
    for size in (1, 150):
        monkeypatch.setattr(_products, "CHUNK", size)
        assert_equal(sample_moments(model, cubic, *arguments, "structured"), expected)


def test_chunks_of_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *arguments = prepared(*KNOWN["conv2d"], 5)
    expected = loop(model, cubic, *arguments)
    parameters = sum(p.numel() for p in model.parameters())
    for size in (1, 2 * parameters, 4 * parameters):
        monkeypatch.setattr(_vmap, "CHUNK", size)
        assert_equal(sample_moments(model, cubic, *arguments, "vmap"), expected)


@pytest.mark.parametrize("name", ["linear", "conv2d", "group norm", "layer norm", "embedding", "an unknown layer"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "0."])
def test_frozen_parameters(name: str, frozen: str) -> None:
    create, draw = (KNOWN | PARTLY)[name][:2]
    model, inputs, targets, _ = prepared(create, draw, 3)
    for key, p in model.named_parameters():
        p.requires_grad_(not (key.startswith(frozen) or key.endswith(frozen)))
    if not any(p.requires_grad for p in model.parameters()):
        model.get_submodule("2").requires_grad_()
    direction = direction_for(model)
    for along in (direction, None):
        assert_equal(sample_moments(model, cubic, inputs, targets, along), loop(model, cubic, inputs, targets, along))


SMALL = {"mlp_100": (1, 6), "cnn_3c3d": (3, 12), "resnet8_gn": (3, 8)}


def network(name: str, samples: int, image_size: int, channels: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = models.build(name, num_classes=10, in_channels=channels, image_size=image_size)
    return model, torch.randn(samples, channels, image_size, image_size), torch.randint(10, (samples,))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_networks_of_the_paper(
    name: str, layout: torch.memory_format, fallen_back: list[str], passes: list[str]
) -> None:
    model, inputs, targets = network(name, 3, SMALL[name][1], SMALL[name][0])
    model, inputs = model.double().to(memory_format=layout), inputs.double().contiguous(memory_format=layout)
    direction = direction_for(model)
    moments = sample_moments(model, cross_entropy, inputs, targets, direction, "structured")
    assert_equal(moments, loop(model, cross_entropy, inputs, targets, direction))
    assert_along(model, cross_entropy, inputs, targets, direction)
    assert passes == ["pass"]
    assert not fallen_back
    assert moments.hvp is not None
    for key, p in model.named_parameters():
        assert moments.gradient[key].stride() == moments.hvp[key].stride() == p.stride()


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("mlp_100", 28, 1), ("cnn_3c3d", 32, 3), ("resnet32_gn", 32, 3)]
)
def test_float32_at_full_size(name: str, size: int, channels: int) -> None:
    model, inputs, targets = network(name, 4, size, channels)
    direction = direction_for(model)
    moments = sample_moments(model, cross_entropy, inputs, targets, direction, "structured")
    exact = {key: d.double() for key, d in direction.items()}
    expected = sample_moments(model.double(), cross_entropy, inputs.double(), targets, exact, "vmap")
    assert_equal(moments, expected, 1e-5)


def test_auto_takes_vmap_where_torch_has_no_forward_mode_rule(fallen_back: list[str]) -> None:
    model = Apply(lambda m, x: m.b(torch.group_norm(m.a(x), 2).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    model, *arguments = prepared(lambda: model, image(3), 3)
    with pytest.raises(
        ValueError, match=r'native_group_norm_backward in the model or the loss has no forward.*method="vmap"'
    ):
        sample_moments(model, cubic, *arguments, "structured")
    assert_equal(sample_moments(model, cubic, *arguments), loop(model, cubic, *arguments))
    assert set(fallen_back) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_linear_model_has_no_product() -> None:
    model, inputs, targets, direction = prepared(lambda: nn.Linear(3, 1), image(3), 4)
    for method in ("structured", "vmap"):
        moments = sample_moments(model, lambda o, y: o[:, 0] - y, inputs, targets, direction, method)
        assert moments.hvp is not None
        assert not any(h.any() for h in moments.hvp.values())
        assert moments.hvp_variance == 0
        assert moments.gradient_variance == pytest.approx(float(inputs.var(0).sum() / 4), rel=1e-12)


def test_a_loss_may_change_the_outputs_in_place() -> None:
    model, *arguments = prepared(*KNOWN["linear"], 3)
    moments = sample_moments(model, lambda o, y: cubic(o.mul_(2).sub_(1), y), *arguments, "structured")
    assert_equal(moments, loop(model, lambda o, y: cubic(2 * o - 1, y), *arguments))


@pytest.mark.parametrize("method", ["structured", "vmap"])
def test_a_loss_need_not_depend_on_the_outputs(method: str) -> None:
    model, *arguments = prepared(*KNOWN["linear"], 3)
    moments = sample_moments(model, lambda o, y: y.square(), *arguments, method)
    assert moments.loss == arguments[1].square().mean()
    assert moments.hvp is not None
    assert not any(t.any() for t in (*moments.gradient.values(), *moments.hvp.values()))
    assert moments.gradient_variance == moments.hvp_variance == 0


def test_equal_samples_do_not_vary() -> None:
    model, inputs, targets, direction = prepared(*KNOWN["conv2d"], 4)
    same = inputs[:1].expand_as(inputs).contiguous(), targets[:1].expand_as(targets).contiguous()
    moments = sample_moments(model, cubic, *same, direction, "structured")
    for variance in (moments.loss_variance, moments.gradient_variance, moments.hvp_variance):
        assert variance is not None
        assert 0 <= variance < 1e-12


def test_nothing_is_left_behind() -> None:
    model, inputs, targets, direction = prepared(*KNOWN["group norm"], 3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs: list[weakref.ref[Tensor]] = []
    for module in model:
        module.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))

    def pass_along(*arguments: Any) -> None:
        observe(*arguments).along(direction)

    for run, method in itertools.product((sample_moments, pass_along), ("structured", "vmap")):
        run(model, cubic, inputs, targets, direction, method)
        assert outputs
        assert not any(o() is not None for o in outputs), "the graph outlives the call"
    assert model.training
    for name, p in model.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert p.grad is None
        assert torch.equal(p, before[name])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, Tensor) and "as_strided" not in str(func):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_memory_does_not_grow_with_batch_times_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "CHUNK", 4096)
    matrices, convolutions = [nn.Linear(64, 64), nn.Linear(64, 64)], [nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)]
    create, draw = (
        (lambda: twice(*matrices), image(64)) if name == "linear" else (lambda: twice(*convolutions), image(16, 7, 7))
    )
    model, *arguments = prepared(create, draw, 32)
    with Largest() as seen:
        sample_moments(model, cubic, *arguments, "structured")
    weights = max(p.numel() for p in model.parameters())
    assert seen.elements <= max(2 * 4096, 2 * arguments[0].numel())
    assert seen.elements < 32 * weights / 2


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "structured", "vmap"])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False).eval()])
def test_batch_norm_is_refused(layer: nn.Module, method: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), layer)
    with pytest.raises(ValueError, match=r"mixes the samples.*GroupNorm.*'1' \(BatchNorm2d\)"):
        sample_moments(model, cubic, torch.randn(3, 2, 4, 4), torch.randn(3), method=method)


@pytest.mark.parametrize("method", ["auto", "structured", "vmap"])
@pytest.mark.parametrize(
    ("norm", "named"),
    [
        (nn.utils.parametrizations.weight_norm, r"in '0.parametrizations.weight.0' \(_WeightNorm\) has no forward"),
        (nn.utils.parametrizations.spectral_norm, r"in '0.parametrizations.weight.0' \(_SpectralNorm\) has no forward"),
    ],
)
def test_an_operation_without_a_forward_mode_rule_is_named_with_its_layer(method: str, norm: Any, named: str) -> None:
    model = nn.Sequential(norm(nn.Linear(2, 3)))
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=named):
        sample_moments(model, cubic, torch.randn(4, 2), torch.randn(4), direction, method=method)


class _Doubled(torch.autograd.Function):
    """An operation of a user's own, as functorch cannot take it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Apply(lambda m, x: _Doubled.apply(x)), "setup_context"),
        (nn.RReLU(), "rrelu_with_noise"),
        (Apply(lambda m, x: x * x.sum().item()), "item"),
    ],
)
def test_what_torch_cannot_differentiate_by_sample_is_named_with_its_layer(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), layer)
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"cannot differentiate '1' \(\w+\) .*{reason}.*network without it") as error:
        sample_moments(model, cubic, torch.randn(4, 2), torch.randn(4), direction, method="vmap")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("method", ["auto", "structured", "vmap"])
@pytest.mark.parametrize(
    ("wrap", "what"), [(lambda x: (x,), "a tuple"), (lambda x: None, "a None"), (Tensor.long, "torch.int64")]
)
def test_losses_that_are_no_tensor_of_real_numbers_are_refused(wrap: Any, what: str, method: str) -> None:
    with pytest.raises(TypeError, match=f"loss_fn must return a tensor of real floating-point losses, got {what}"):
        sample_moments(
            nn.Linear(2, 1), lambda o, y: wrap(cubic(o, y)), torch.randn(3, 2), torch.randn(3), method=method
        )


@pytest.mark.parametrize("method", ["auto", "structured", "vmap"])
def test_recurrent_layers_have_gradients_but_no_products(method: str) -> None:
    model = Apply(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(2, 3, batch_first=True))
    x, y = torch.randn(3, 4, 2), torch.randn(3)
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'lstm' \(LSTM\) has no forward-mode derivative.*without it"):
        sample_moments(model, cubic, x, y, direction, method=method)
    gradient = sample_moments(model, cubic, x, y, method=method).gradient
    expected = torch.autograd.grad(cubic(model(x), y).mean(), list(model.parameters()))
    for g, e in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_functional_batch_norm_is_refused() -> None:
    model = Apply(lambda m, x: functional.batch_norm(m.a(x), None, None, training=True), a=nn.Linear(3, 4))
    with pytest.raises(ValueError, match="mixes the samples"):
        sample_moments(model, cubic, torch.randn(3, 3), torch.randn(3))


@pytest.mark.parametrize("method", ["auto", "structured", "vmap"])
@pytest.mark.parametrize(
    "loss_fn", [functional.mse_loss, lambda o, y: o, lambda o, y: (o[:, 0] - y).square().sum()[None].expand(2)]
)
def test_a_loss_that_is_not_one_per_sample_is_refused(loss_fn: Loss, method: str) -> None:
    with pytest.raises(ValueError, match="one loss per sample"):
        sample_moments(nn.Linear(2, 1), loss_fn, torch.randn(3, 2), torch.randn(3, 1), method=method)


def refusals() -> Iterator[tuple[str, dict[str, Any]]]:
    one = torch.ones(1, 2)
    yield "at least 2", {"inputs": torch.randn(1, 2), "targets": torch.randn(1)}
    yield "leading dimension", {"inputs": torch.randn(3, 2), "targets": torch.randn(4)}
    yield "leading dimension", {"targets": torch.tensor(1.0)}
    yield "method must be one of", {"method": "fast"}
    yield "lacks 'bias'", {"direction": {"weight": one}}
    yield "has 'what'", {"direction": {"weight": one, "bias": torch.ones(1), "what": one}}
    yield r"\(2, 1\), the parameter \(1, 2\)", {"direction": {"weight": one.mT, "bias": torch.ones(1)}}


@pytest.mark.parametrize(("message", "changes"), list(refusals()))
def test_arguments_that_do_not_fit(message: str, changes: dict[str, Any]) -> None:
    arguments = {"inputs": torch.randn(3, 2), "targets": torch.randn(3)} | changes
    with pytest.raises(ValueError, match=message):
        sample_moments(nn.Linear(2, 1), cubic, **arguments)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        sample_moments(nn.Linear(2, 1).requires_grad_(False), cubic, torch.randn(3, 2), torch.randn(3))


def test_inputs_that_are_overwritten_after_use_are_refused() -> None:
    model = Apply(lambda m, x: (m.a(x), x.mul_(2))[0], a=nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="modified in place"):
        sample_moments(model, cubic, torch.randn(3, 3), torch.randn(3), method="structured")
