"""The optimizers that KOALA is compared with, each against the formula of its own paper.

The formulas below are written down from the papers, a few lines each, for one tensor in float64. Where the library
computes something else, a second function adds just that, the library must equal it to 1e-10, and
`test_how_far_the_library_is_from_the_paper` bounds what it amounts to:

* Adamax adds eps to |g|; AMSGrad corrects the bias of m and v and adds eps. Neither paper has these.
* Yogi starts m and v at 1e-6 and corrects their bias as Adam does. The paper has no bias correction and starts v at a
  squared gradient, here that of the first point.
* AdamP adds eps to the root of v before the bias correction, its authors after it, and eps to |x| in the projection.
* RAdam rectifies from rho > 5 on, as its authors' code, the paper from rho > 4; it adds eps to the root of v.
* AdaHessian is the library's with the average over convolution kernels that it leaves out.
* AdamW's paper multiplies the decay by the schedule alone; torch by the learning rate, so that the paper's λ is lr λ.

The others are the papers' to rounding: AdaBelief as in the last version of its paper, with eps inside the average and
again outside the root; Lookahead too, but its default alpha is 0.5 where KOALA's Table 8 takes 0.8.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lab import tasks
from koala_lab.baselines.apollo_readme import image_rows
from koala_lab.baselines.registry import OPTIMIZERS, lookahead
from koala_lab.config import RunConfig
from koala_lab.runs import training as train
from koala_lib import KoalaM
from tests.support.cases import Net, losses_of

B1, B2 = 0.9, 0.999
GRADIENT_ONLY = [name for name, method in OPTIMIZERS.items() if not method.own_forward]
State = dict[str, Any]  # what a formula keeps between steps, empty before the first


# ---------------------------------------------------------------- the papers' formulas: x, g, state, step -> new x


def sgd(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, momentum: float, weight_decay: float) -> Tensor:
    """Heavy ball with the learning rate outside the velocity, as every table with SGD means it; L2 decay."""
    s["v"] = momentum * s.get("v", 0) + g + weight_decay * x
    return x - lr * s["v"]


def moments(g: Tensor, s: State) -> tuple[Tensor, Tensor]:
    s["m"] = B1 * s.get("m", 0) + (1 - B1) * g
    s["v"] = B2 * s.get("v", 0) + (1 - B2) * g**2
    return s["m"], s["v"]


def adam(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float = 0, eps: float = 1e-8) -> Tensor:
    """Kingma & Ba 2015, Algorithm 1; the decay is part of the loss."""
    m, v = moments(g + weight_decay * x, s)
    return x - lr * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + eps)


def adamw(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float) -> Tensor:
    """Loshchilov & Hutter 2019, Algorithm 2, for a decay of lr * weight_decay."""
    return adam(x, g, s, t, lr=lr) - lr * weight_decay * x


def adamax(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float, eps: float = 0) -> Tensor:
    """Kingma & Ba 2015, Algorithm 2, for eps = 0."""
    m, _ = moments(g + weight_decay * x, s)
    s["u"] = torch.maximum(B2 * s.get("u", torch.zeros_like(x)), (g + weight_decay * x).abs() + eps)
    return x - lr / (1 - B1**t) * m / s["u"]


def adamax_built(*args: Any, **options: Any) -> Tensor:
    return adamax(*args, **options, eps=1e-8)


def adadelta(
    x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float, rho: float, eps: float
) -> Tensor:
    """Zeiler 2012, Algorithm 1, for lr = 1."""
    g = g + weight_decay * x
    s["g2"] = rho * s.get("g2", torch.zeros_like(x)) + (1 - rho) * g**2
    u2 = s.get("u2", torch.zeros_like(x))
    u = (u2 + eps).sqrt() / (s["g2"] + eps).sqrt() * g
    s["u2"] = rho * u2 + (1 - rho) * u**2
    return x - lr * u


def amsgrad(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float) -> Tensor:
    """Reddi et al. 2018, Algorithm 2."""
    m, v = moments(g + weight_decay * x, s)
    s["max"] = torch.maximum(s.get("max", torch.zeros_like(x)), v)
    return x - lr * m / s["max"].sqrt()


def amsgrad_built(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float) -> Tensor:
    m, v = moments(g + weight_decay * x, s)
    s["max"] = torch.maximum(s.get("max", torch.zeros_like(x)), v)
    return x - lr * (m / (1 - B1**t)) / ((s["max"] / (1 - B2**t)).sqrt() + 1e-8)


def yogi_moments(g: Tensor, s: State) -> tuple[Tensor, Tensor]:
    s["m"] = B1 * s["m"] + (1 - B1) * g
    s["v"] = s["v"] - (1 - B2) * torch.sign(s["v"] - g**2) * g**2
    return s["m"], s["v"]


def yogi(x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float, eps: float, **_: bool) -> Tensor:
    """Zaheer et al. 2018, Algorithm 2, started as in its section 5."""
    g = g + weight_decay * x
    s.setdefault("m", torch.zeros_like(x))
    s.setdefault("v", g**2)
    m, v = yogi_moments(g, s)
    return x - lr * m / (v.sqrt() + eps)


def yogi_built(
    x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float, eps: float, **_: bool
) -> Tensor:
    for moment in ("m", "v"):
        s.setdefault(moment, torch.full_like(x, 1e-6))
    m, v = yogi_moments(g + weight_decay * x, s)
    return x - lr * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + eps)


def tangential(x: Tensor, g: Tensor, p: Tensor, eps: float) -> tuple[Tensor, str]:
    """Heo et al. 2021, eqs. 10-12: p without its part along x where g is nearly orthogonal to x, for every output
    channel or, failing that, for the layer as a whole."""
    for name, rows in (("channel", x.shape[:1].numel() if x.ndim else 1), ("layer", 1)):
        w, d, q = (t.reshape(rows, -1) for t in (x, g, p))
        cosine = (w * d).sum(1).abs() / (w.norm(dim=1) * d.norm(dim=1))
        if x.ndim > 1 and cosine.max() < 0.1 / math.sqrt(w.shape[1]):
            unit = w / (w.norm(dim=1, keepdim=True) + eps)
            return (q - unit * (unit * q).sum(1, keepdim=True)).reshape(x.shape), name
    return p, "none"


def adamp(
    x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float, eps: float = 1e-8, eps_norm: float = 0
) -> Tensor:
    """Heo et al. 2021, Algorithm 2, with Adam's bias correction; scale-invariant weights decay by a tenth."""
    m, v = moments(g, s)
    q, case = tangential(x, g, (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + eps), eps_norm)
    s.setdefault("cases", set()).add(case)
    return x * (1 - lr * weight_decay * (1 if case == "none" else 0.1)) - lr * q


def adamp_built(x: Tensor, g: Tensor, s: State, t: int, **options: float) -> Tensor:
    return adamp(x, g, s, t, **options, eps=1e-8 / math.sqrt(1 - B2**t), eps_norm=1e-8)


def fromage(x: Tensor, g: Tensor, s: State, t: int, *, lr: float) -> Tensor:
    """Bernstein et al. 2020, Algorithm 1; plain descent where weights or gradient are zero, as in the authors' code."""
    ratio = x.norm() / g.norm() if x.norm() > 0 and g.norm() > 0 else 1.0
    return (x - lr * ratio * g) / math.sqrt(1 + lr**2)


def adabelief(
    x: Tensor, g: Tensor, s: State, t: int, *, lr: float, weight_decay: float, eps: float, **_: bool
) -> Tensor:
    """Zhuang et al. 2020 (arXiv v5), Algorithm 2; the decay is part of the loss."""
    g = g + weight_decay * x
    s["m"] = B1 * s.get("m", 0) + (1 - B1) * g
    s["s"] = B2 * s.get("s", 0) + (1 - B2) * (g - s["m"]) ** 2 + eps
    return x - lr * (s["m"] / (1 - B1**t)) / ((s["s"] / (1 - B2**t)).sqrt() + eps)


def radam(
    x: Tensor,
    g: Tensor,
    s: State,
    t: int,
    *,
    lr: float,
    weight_decay: float,
    eps: float = 0,
    least: float = 4,
    **_: bool,
) -> Tensor:
    """Liu et al. 2020, Algorithm 2, with AdamW's decay."""
    m, v = moments(g, s)
    longest = 2 / (1 - B2) - 1
    rho = longest - 2 * t * B2**t / (1 - B2**t)
    step = m / (1 - B1**t)
    if rho > least:
        rectification = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
        step = step * math.sqrt(rectification) * math.sqrt(1 - B2**t) / (v.sqrt() + eps)
    return x - lr * weight_decay * x - lr * step


def radam_built(*args: Any, **options: Any) -> Tensor:
    return radam(*args, **options, eps=1e-8, least=5)


# ---------------------------------------------------------------- trajectories

WD = {"weight_decay": 0.05}  # large, to be seen
IN_GRADIENT = {"weight_decouple": False}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, **WD},
    "adam": {"lr": 3e-2, **WD},
    "adamw": {"lr": 3e-2, **WD},
    "adadelta": {"lr": 1.0, "rho": 0.95, "eps": 1e-6, **WD},
    "adamax": {"lr": 3e-2, **WD},
    "amsgrad": {"lr": 3e-2, **WD},
    "yogi": {"lr": 1e-2, "eps": 1e-3, **WD, **IN_GRADIENT},
    "adamp": {"lr": 3e-2, **WD},
    "fromage": {"lr": 1e-2},
    "adabelief": {"lr": 1e-2, "eps": 1e-8, **WD, **IN_GRADIENT},
    "radam": {"lr": 3e-2, "decoupled_weight_decay": True, **WD},
}
PAPER: dict[str, Callable[..., Tensor]] = {name: globals()[name] for name in ARGUMENTS}
BUILT = PAPER | {
    "adamax": adamax_built,
    "amsgrad": amsgrad_built,
    "yogi": yogi_built,
    "adamp": adamp_built,
    "radam": radam_built,
}
each = pytest.mark.parametrize("name", ARGUMENTS)

SHAPES: list[tuple[int, ...]] = [(), (5,), (4, 3, 3, 3), (6, 7), (3, 4)]  # of scale, bias, convolution, two matrices
STEPS = 20


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    tensors[1].zero_()  # biases start at zero
    return tensors


def gradient(i: int, x: Tensor, t: int) -> Tensor:
    """A gradient that depends on the weights. As below BatchNorm, that of the convolution is orthogonal to the weights
    of every channel, and that of the first matrix to the weights as a whole."""
    generator = torch.Generator().manual_seed(100 * t + i)
    g = x / 2 + torch.randn(x.shape, generator=generator, dtype=torch.float64)
    rows = {2: 4, 3: 1}.get(i)
    if rows is None:
        return g
    w, d = x.reshape(rows, -1), g.reshape(rows, -1)
    return (d - w * (w * d).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)).reshape(x.shape)


def by_library(name: str) -> list[Tensor]:
    params = [nn.Parameter(x) for x in start()]
    optimizer = OPTIMIZERS[name](params, **ARGUMENTS[name])
    for t in range(1, STEPS + 1):
        for i, p in enumerate(params):
            p.grad = gradient(i, p.detach(), t)
        optimizer.step()
    return [p.detach() for p in params]


def by_formula(formula: Callable[..., Tensor], **options: Any) -> tuple[list[Tensor], list[State]]:
    tensors, states = start(), [{} for _ in SHAPES]
    for t in range(1, STEPS + 1):
        tensors = [
            formula(x, gradient(i, x, t), s, t, **options) for i, (x, s) in enumerate(zip(tensors, states, strict=True))
        ]
    return tensors, states


@each
def test_the_library_computes_the_formula(name: str) -> None:
    want, states = by_formula(BUILT[name], **ARGUMENTS[name])
    for x, y, first in zip(by_library(name), want, start(), strict=True):
        assert (y - first).abs().max() > 1e-2  # it moved: the comparison means something
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    if name == "adamp":
        assert [s["cases"] for s in states[:4]] == [{"none"}, {"none"}, {"channel"}, {"layer"}]
        assert "none" in states[4]["cases"]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("adamax", 1e-10, 1e-6), ("adamp", 1e-12, 1e-5), ("amsgrad", 0.5, 1.0), ("radam", 1e-3, 1.0), ("yogi", 0.1, 1.0)],
)
def test_how_far_the_library_is_from_the_paper(name: str, least: float, most: float) -> None:
    """Largest distance after 20 steps over all tensors, relative to the way that the paper's formula went."""
    paper, _ = by_formula(PAPER[name], **ARGUMENTS[name])
    apart = max(float((x - y).abs().max()) for x, y in zip(by_library(name), paper, strict=True))
    way = max(float((y - x).abs().max()) for x, y in zip(start(), paper, strict=True))
    assert least < apart / way < most


@each
def test_it_trains_a_network(name: str) -> None:
    """Convolutions, BatchNorm and the memory layout of a real run."""
    lr = 1.0 if name == "adadelta" else 1e-2  # its step has the units of the weights
    config = RunConfig(
        dataset="digits", model="resnet8", optimizer=name, optimizer_args=ARGUMENTS[name] | {"lr": lr},
        epochs=3, batch_size=32, train_size=320,
    )  # fmt: skip
    result = train.train(config)
    assert result.status == "done"
    assert result.epochs[-1]["train_loss"] < 0.9 * result.epochs[0]["train_loss"]


# ---------------------------------------------------------------- AdaHessian, which needs second derivatives


def smooth_loss(x: list[Tensor]) -> Tensor:
    """A function of all tensors whose Hessian changes and is not diagonal."""
    return sum((p**4).sum() / 4 - (p**2).sum() for p in x) + torch.cat([p.flatten() for p in x]).sum() ** 2 / 9


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_adahessian_computes_its_formula(power: float) -> None:
    """Yao et al. 2021, Algorithm 1, with D = z (H z) for a random sign z of every weight, averaged over the kernels of
    convolutions (spatial averaging, eq. 10); decoupled decay as APOLLO's tables have it."""
    lr, decay, eps = 0.03, 0.05, 1e-2
    shapes = [(3, 2, 2, 3), (4, 3), (5,)]
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(x.clone()) for x in first]
    optimizer = OPTIMIZERS["adahessian"](params, lr=lr, weight_decay=decay, eps=eps, hessian_power=power)
    theta, m, v = [x.clone() for x in first], [0.0] * 3, [0.0] * 3
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        smooth_loss(params).backward(create_graph=True)
        torch.manual_seed(t)
        optimizer.step()

        torch.manual_seed(t)
        z = [torch.randint_like(x, 0, 2) * 2 - 1 for x in theta]
        flat, sizes = torch.cat([x.flatten() for x in theta]), [x.numel() for x in theta]

        def flat_loss(y: Tensor, sizes: list[int] = sizes) -> Tensor:
            return smooth_loss([part.view(shape) for part, shape in zip(y.split(sizes), shapes, strict=True)])

        g, H = torch.func.grad(flat_loss)(flat), torch.func.hessian(flat_loss)(flat)
        signs = torch.cat([part.flatten() for part in z])
        diagonal = (signs * (H @ signs)).split(sizes)
        for i, shape in enumerate(shapes):
            D = diagonal[i].view(shape)
            if len(shape) == 4:
                D = D.mean((2, 3), keepdim=True).expand(shape)
            m[i] = B1 * m[i] + (1 - B1) * g.split(sizes)[i].view(shape)
            v[i] = B2 * v[i] + (1 - B2) * D**2
            root = (v[i] / (1 - B2**t)).sqrt() ** power + eps
            theta[i] = theta[i] - lr * decay * theta[i] - lr * m[i] / (1 - B1**t) / root
        for p, x in zip(params, theta, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-10)
    assert all((x - y).abs().max() > 1e-2 for x, y in zip(theta, first, strict=True))


def test_adahessian_trains_a_network_and_resumes(tmp_path: Path) -> None:
    options = {"lr": 0.15, "eps": 1e-2, "weight_decay": 1e-3}
    config = RunConfig(
        dataset="digits", model="resnet8", optimizer="adahessian", optimizer_args=options,
        epochs=2, batch_size=32, train_size=96,
    )  # fmt: skip
    whole = train.train(config)
    assert whole.epochs[-1]["train_loss"] < whole.epochs[0]["train_loss"]

    def stop(done: int, steps: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train.train(config, checkpoint=checkpoint, checkpoint_seconds=0, on_step=stop)
    resumed = train.train(config, checkpoint=checkpoint)
    assert resumed.provenance["weights_sha256"] == whole.provenance["weights_sha256"]


def test_every_optimizer_that_is_not_ours_has_a_formula_here() -> None:
    ours = {name for name in GRADIENT_ONLY if OPTIMIZERS[name].make.__module__.startswith("koala_lib.")}
    assert {"koala_v", "koala_m", "apollo"} <= ours
    assert set(GRADIENT_ONLY) - ours - {"adahessian", "sdlbfgs", "apollo_variant"} == set(ARGUMENTS)  # tested elsewhere


@pytest.mark.parametrize("name", GRADIENT_ONLY)
def test_a_misspelt_argument_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="weight_dekay"):
        OPTIMIZERS[name]([nn.Parameter(torch.ones(2))], weight_dekay=0.1)


def test_fromage_has_no_weight_decay() -> None:
    with pytest.raises(TypeError, match="Fromage has no argument 'weight_decay'; it has lr, p_bound"):
        OPTIMIZERS["fromage"]([nn.Parameter(torch.ones(2))], weight_decay=5e-4)


# ---------------------------------------------------------------- Lookahead around KOALA-M

KOALA = {"weight_decay": 5e-3, "formulas": "released", "momentum": 0.9}


def take(optimizer: Any, net: Net, k: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = losses_of(net, k)
        losses.mean().backward()
        return losses

    optimizer.step(closure)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("alpha", [0.8, 0.5])
def test_lookahead_around_koala_m_is_the_papers_outer_loop(alpha: float) -> None:
    """Zhang et al. 2019, Algorithm 1: after k inner steps, φ += α (θ - φ) and θ = φ."""
    net, by_hand, alone = Net(), Net(), Net()
    wrapped = lookahead(KoalaM(net.parameters(), **KOALA), k=5, alpha=alpha)
    inner, plain = KoalaM(by_hand.parameters(), **KOALA), KoalaM(alone.parameters(), **KOALA)
    slow = [p.detach().clone() for p in by_hand.parameters()]
    for k in range(1, 24):
        take(wrapped, net, k)
        take(inner, by_hand, k)
        take(plain, alone, k)
        if k % 5 == 0:
            for phi, theta in zip(slow, by_hand.parameters(), strict=True):
                phi += alpha * (theta.detach() - phi)
                theta.data.copy_(phi)
        torch.testing.assert_close(weights(net), weights(by_hand), rtol=0, atol=1e-12)
        assert torch.equal(weights(net), weights(alone)) == (k < 5)


@pytest.mark.parametrize("stop", [5, 7])  # right after an outer step, and between two
def test_lookahead_around_koala_m_resumes_bit_for_bit(stop: int) -> None:
    def fresh() -> tuple[Net, Any, Any]:
        net = Net()
        optimizer = lookahead(KoalaM(net.parameters(), **KOALA), k=5, alpha=0.8)
        return net, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9], gamma=0.2)

    def go(net: Net, optimizer: Any, schedule: Any, first: int, last: int) -> None:
        for k in range(first, last):
            take(optimizer, net, k)
            schedule.step()

    whole, again = fresh(), fresh()
    go(*whole, 0, 17)
    go(*again, 0, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in again], file)
    file.seek(0)
    resumed = fresh()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*resumed, stop, 17)
    assert torch.equal(weights(resumed[0]), weights(whole[0]))
    assert resumed[1].optimizer.filter_state() == whole[1].optimizer.filter_state()
    assert resumed[1].param_groups[0]["lr"] == pytest.approx(0.04)


# ---------------------------------------------------------------- SWA around a run with KOALA-M


def test_swa_evaluates_the_mean_of_the_weights_with_its_own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Izmailov et al. 2018, Algorithm 1: every chosen epoch weighs the same; BatchNorm sees the training data anew."""
    torch.set_num_threads(1)
    config = RunConfig(
        dataset="digits", model="resnet8", optimizer="koala_m", optimizer_args=KOALA,
        epochs=6, batch_size=64, milestones=(2, 4), gamma=0.2, train_size=320,
    )  # fmt: skip
    seen: list[nn.Module] = []
    evaluate = tasks.TASKS["classification"].evaluate

    def watch(task: Any, network: nn.Module) -> dict[str, float]:
        seen.append(copy.deepcopy(getattr(network, "module", network)))
        return evaluate(task, network)

    monkeypatch.setattr(tasks.TASKS["classification"], "evaluate", watch)
    plain = train.train(config)
    swa = train.train(config.but(wrapper="swa", wrapper_args={"start": 3, "every": 2}))
    raw, tested = seen[:6], seen[6:]

    assert plain.epochs[:2] == swa.epochs[:2]  # no average yet
    assert plain.provenance["weights_sha256"] == swa.provenance["weights_sha256"]  # training goes on as it was
    for epoch, members in {3: (3,), 4: (3,), 5: (3, 5), 6: (3, 5)}.items():
        mean = torch.stack([weights(raw[e - 1]).double() for e in members]).mean(0)
        torch.testing.assert_close(weights(tested[epoch - 1]).double(), mean, rtol=0, atol=1e-6)
    assert (weights(tested[5]) - weights(raw[5])).abs().max() > 1e-3

    task = tasks.create(config, torch.device("cpu"))
    mine, theirs = copy.deepcopy(tested[5]).train(), dict(tested[5].named_buffers())
    inputs: dict[str, list[Tensor]] = {}
    for name, module in mine.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for x, _ in task.batches(5):
            mine(x)
    assert inputs
    for name, batches in inputs.items():
        mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
        variance = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)
        torch.testing.assert_close(theirs[f"{name}.running_mean"], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs[f"{name}.running_var"], variance, rtol=1e-4, atol=1e-5)


def test_apollos_image_rows_are_the_readmes() -> None:
    """Table and commands of XuezheMax/apollo at 7adf28f: rates, weight decays, warm-ups; ImageNet has other decays."""
    cifar, imagenet = image_rows(500), image_rows(500, "imagenet")
    wanted = {  # rate, decay on CIFAR-10 and on ImageNet, where the warm-up starts
        "sgd": (0.1, 5e-4, 1e-4, None), "adam": (1e-3, 0.25, 0.1, None), "radam": (1e-3, 0.25, 0.1, None),
        "adabelief": (1e-3, 0.25, 0.1, None), "adahessian": (0.15, 1e-3, 1e-3, 1e-3),
        "apollo": (0.01, 2.5e-4, 1e-4, 1e-5), "apollow": (0.01, 2.5e-2, 1e-2, 1e-5),
    }  # fmt: skip
    for row, (lr, decay, of_imagenet, start) in wanted.items():
        args = cifar[row]["optimizer_args"]
        assert (args["lr"], args["weight_decay"]) == (lr, decay)
        assert imagenet[row]["optimizer_args"]["weight_decay"] == of_imagenet
        assert args.get("warmup_init_lr", cifar[row].get("warmup_init_lr")) == start
    for name, fields in cifar.items():
        config = RunConfig(dataset="digits", model="resnet8", epochs=1, **fields)
        OPTIMIZERS[config.optimizer]([nn.Parameter(torch.zeros(2))], **dict(config.optimizer_args))
        warm = config.warmup_steps or dict(config.optimizer_args).get("warmup_steps", 0)
        assert warm == (500 if name.startswith("apollo") or name in ("adahessian", "sgd_equivalent") else 0)
    assert not image_rows(0)["adahessian"].get("warmup_steps")
