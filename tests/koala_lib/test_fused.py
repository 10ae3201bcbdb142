"""The compiled passes: against foreach in every dtype and memory layout, how often they are compiled, and for what.

That they equal the reference for every option is tested with the references of KOALA and APOLLO.
"""

from __future__ import annotations

import copy
import math
import platform
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV
from koala_lib.optim._engine import compiled, passes
from koala_lib.optim._engine.compiled import CompiledPass
from koala_lib.optim._engine.lists import flat, memory_format
from koala_lib.optim._engine.passes import Passes
from koala_lib.optim.filter import LossFilter

USUAL = compiled.MIN_COMPILED  # the fixtures change it

pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("error:fused"),
]

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "KOALA-V": lambda p, **o: KoalaV(p, weight_decay=0.01, **o),
    "KOALA-M": lambda p, **o: KoalaM(p, weight_decay=0.01, **o),
    "KOALA-M, released": lambda p, **o: KoalaM(p, weight_decay=0.01, formulas="released", **o),
    "KOALA++": lambda p, **o: KoalaPlusPlus(p, weight_decay=0.01, **o),
    "APOLLO": lambda p, **o: Apollo(p, 0.05, sigma=0.1, warmup_steps=4, weight_decay=0.01, **o),
    "APOLLO, decoupled": lambda p, **o: Apollo(
        p, 0.05, sigma=0.1, warmup_steps=4, weight_decay=0.01, decoupled_weight_decay=True, **o
    ),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """With tensors of all kinds of layouts: 4-dimensional channels last, matrices, vectors."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(80, 3)
    return nn.Sequential(*layers).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train(net: nn.Sequential, optimizer: Any, steps: int = 8) -> None:
    """The loss differs from step to step, and so does lr; the third gradient is missing, the fifth loss infinite."""
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        if isinstance(optimizer, LossFilter):
            optimizer.predict()
        generator = torch.Generator().manual_seed(k)
        images = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64).to(net[0].weight.dtype)  # type: ignore[arg-type]
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(net(images).double(), torch.arange(6) % 3, reduction="none")
        losses.mean().backward()  # type: ignore[no-untyped-call]
        if k == 2:
            net[4].weight.grad = None
        if isinstance(optimizer, LossFilter):
            optimizer.step(loss=losses * math.inf if k == 4 else losses)
        else:
            optimizer.step()


def state(optimizer: Any) -> list[Tensor]:
    """Weights, state of the weights, filter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    return [p.detach() for p in params] + kept + [g["filter"] for g in optimizer.param_groups if "filter" in g]


def both(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    nets = network(dtype), network(dtype)
    optimizers = [
        OPTIMIZERS[name](net.parameters(), **path, **options)
        for net, path in zip(nets, ({"fused": True}, {"foreach": True}), strict=True)
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer)
    fused, foreach = map(state, optimizers)
    return fused, foreach


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@each
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_foreach_in_float64(name: str) -> None:
    fused, foreach = both(name)
    assert compilations() > 0
    for a, b in zip(fused, foreach, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# A rounding of a weight is eps/2 of it. Eight steps, and gradients at weights that differ, make of it some tens.
@each
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.2)], ids=str)
@pytest.mark.usefixtures("traced_passes")
def test_compiled_is_near_foreach_in_lower_precision(name: str, dtype: torch.dtype, bound: float) -> None:
    fused, foreach = both(name, dtype)
    precise = network()
    optimizer = OPTIMIZERS[name](precise.parameters(), foreach=True)
    train(precise, optimizer)
    exact = state(optimizer)
    far, usual = [], []  # from the truth, in units of each tensor
    for a, b, c in zip(fused, foreach, exact, strict=True):
        scale = float(c.abs().max()) + 1e-30
        assert float((a.double() - b.double()).abs().max()) <= bound * scale
        for errors, t in ((far, a), (usual, b)):
            errors.append(float((t.double() - c.double()).abs().max()) / scale)
    # And it is as near to the truth as foreach is; in a single tensor one of them can be lucky on some processor.
    assert max(far) <= 3 * max(usual) + 4 * torch.finfo(dtype).eps


@each
@pytest.mark.usefixtures("traced_passes")
def test_nothing_is_compiled_after_the_first_steps(name: str) -> None:
    """Neither for another learning rate, loss, weight decay nor shape."""
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters(), fused=True)
    train(net, optimizer, 1)
    once = compilations()
    assert 2 <= once <= 3  # passes
    train(net, optimizer)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.02
    train(net, optimizer)
    other = nn.Sequential(nn.Conv2d(3, 7, 2), nn.Tanh(), nn.Conv2d(7, 6, 2), nn.Flatten(), nn.Linear(96, 3)).double()
    train(other, OPTIMIZERS[name](other.parameters(), fused=True))
    assert compilations() == once


@each
@pytest.mark.parametrize("tensors", [1, 3, 9])
@pytest.mark.usefixtures("fresh_compiler")
def test_where_torch_compiles_nothing_fused_is_foreach(name: str, tensors: int) -> None:
    """As with TORCH_COMPILE_DISABLE=1, or inside torch's own modes: the passes are called, with full lists."""
    ends = []
    for path in ({"fused": True}, {"foreach": True}):
        params = [
            nn.Parameter(torch.linspace(-1, 1, compiled.MIN_COMPILED + i, dtype=torch.float64)) for i in range(tensors)
        ]
        optimizer = OPTIMIZERS[name](params, **path)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(3):
                for p in params:
                    p.grad = p.detach().sin()
                if isinstance(optimizer, LossFilter):
                    optimizer.predict()
                    optimizer.step(loss=torch.ones(3, dtype=torch.float64))
                else:
                    optimizer.step()
        ends.append(state(optimizer))
    assert compilations() == 0
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_wrong_arguments_say_nothing_of_the_compiler() -> None:
    params, velocities = ([torch.ones(compiled.MIN_COMPILED + n, dtype=torch.float64)] for n in (0, 1))
    with pytest.raises(RuntimeError, match="size"):
        passes._advance(params=params, velocities=velocities, averages=[], momentum=0.9, average_rate=None)
    assert CompiledPass.compiler_works is None


@each
@pytest.mark.usefixtures("traced_passes")
def test_fused_resumes_and_changes_into_foreach(name: str) -> None:
    """The path is no part of the state."""
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters(), fused=True)
    train(net, optimizer)
    twin = copy.deepcopy(net)
    continued = OPTIMIZERS[name](twin.parameters())
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    continued.param_groups[0]["fused"] = None
    train(net, optimizer)
    train(twin, continued)
    for a, b in zip(state(optimizer), state(continued), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("traced_passes")
def test_another_layout_of_the_gradient_is_treated_by_foreach() -> None:
    def step(**path: Any) -> Tensor:
        p = nn.Parameter(torch.arange(12, dtype=torch.float64).view(3, 4))
        p.grad = torch.arange(12, dtype=torch.float64).view(4, 3).t()  # columns
        optimizer = KoalaM([p], **path)
        optimizer.predict()
        optimizer.step(loss=torch.ones(2))
        return p.detach()

    assert torch.equal(step(fused=True), step())
    assert compilations() == 1  # the prediction, which has no gradient


@pytest.mark.usefixtures("traced_passes")
def test_strides_of_dimensions_of_size_one_do_not_matter() -> None:
    """A convolution of 1x1 lies in memory in one way, whatever format its strides tell of."""
    p = nn.Parameter(torch.arange(12, dtype=torch.float64).view(3, 4, 1, 1).to(memory_format=torch.channels_last))
    p.grad = p.detach().clone(memory_format=torch.contiguous_format)
    assert p.grad.stride() != p.stride()
    before = p.detach().clone()
    optimizer = Apollo([p], 0.1, fused=True, warmup_steps=0)
    optimizer.step()
    assert compilations() == 2
    torch.testing.assert_close(p.detach(), before - 0.1 * before / 0.01)


@pytest.mark.parametrize(
    "t",
    [torch.arange(6.0).view(2, 3), torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)],
    ids=["rows", "channels last"],
)
def test_flat_is_the_memory_of_the_tensor(t: Tensor) -> None:
    vector = flat(t, memory_format(t))
    assert vector is not None
    assert vector.shape == (t.numel(),)
    assert not vector._is_view()
    before = float(t.sum())
    vector += 1
    assert float(t.sum()) == before + t.numel()


def test_other_layouts_have_no_vector() -> None:
    for t in (torch.zeros(4, 4)[:, :2], torch.zeros(2, 3).t()):
        assert flat(t, memory_format(t)) is None
    images = torch.zeros(1, 2, 3, 4)
    assert flat(images, torch.channels_last) is None
    assert flat(images.to(memory_format=torch.channels_last), torch.contiguous_format) is None


@pytest.mark.usefixtures("fresh_compiler")
def test_long_tensors_are_compiled_by_eight_and_short_ones_treated_together() -> None:
    long = compiled.MIN_COMPILED
    sizes = [5, long, 7, 2 * long, 1, long - 1, 0] + [2 * long] * 8
    params = [torch.zeros(size, requires_grad=True) for size in sizes]
    buckets = Passes(KoalaV(params, fused=True), [], with_gradient=False).buckets
    assert [([len(p) for p in bucket.params], bucket.compiled) for bucket in buckets] == [
        ([long] + [2 * long] * 7, True), ([2 * long] * 2, True), ([5, 7, 1, long - 1, 0], False),
    ]  # fmt: skip


@pytest.mark.usefixtures("traced_passes")
def test_what_fills_a_list_changes_nothing() -> None:
    """A tensor ends the same alone in its list and among seven others, with the norms of its own."""
    sizes, values = torch.arange(compiled.MIN_COMPILED, compiled.MIN_COMPILED + 8), torch.arange(1.0, 9)

    def norms(count: int) -> Tensor:
        params = [torch.full((int(sizes[i]),), float(values[i]), dtype=torch.float64) for i in range(count)]
        return passes._norms(params=params, grads=[2 * p for p in params], weight_decay=0.5)  # type: ignore[no-any-return]

    assert norms(1).shape == (3, 1)
    assert torch.equal(norms(1), norms(8)[:, :1])
    torch.testing.assert_close(norms(8)[2], (sizes * values**2).double())
    assert compilations() == 1


@pytest.mark.usefixtures("traced_passes")
def test_mixed_lists_are_treated_by_foreach() -> None:
    params = [torch.ones(n, dtype=torch.float64) for n in (5, compiled.MIN_COMPILED)]
    assert passes._norms(params=params, grads=params, weight_decay=0.0).shape == (3, 2)
    assert compilations() == 0


@each
def test_the_usual_length_is_compiled(name: str, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short and one long tensor, of float32: the long one by real code, the short one by foreach."""
    for length in ("MIN_COMPILED", "MIN_COMPILED_LIST"):
        monkeypatch.setattr(compiled, length, USUAL)
    ends = []
    for path in ({"fused": True}, {"foreach": True}):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (100, USUAL)]
        optimizer = OPTIMIZERS[name](params, **path)
        for _ in range(2):
            for p in params:
                p.grad = p.detach().sin()
            if isinstance(optimizer, LossFilter):
                optimizer.predict()
                optimizer.step(loss=torch.ones(3))
            else:
                optimizer.step()
        ends.append(state(optimizer))
    assert 2 <= compilations() <= 3
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["KOALA-M", "KOALA++", "APOLLO"])
@pytest.mark.usefixtures("traced_passes")
def test_a_training_step_that_is_compiled_as_a_whole_is_the_plain_one(name: str, fused: bool | None) -> None:
    inputs = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def trained(compile: Callable[[Any], Any]) -> Tensor:
        torch.manual_seed(0)
        net = nn.Linear(5, 1).double()
        optimizer = OPTIMIZERS[name](net.parameters(), fused=fused)

        def step(x: Tensor) -> None:
            if isinstance(optimizer, LossFilter):
                optimizer.predict()
            optimizer.zero_grad()
            losses = (net(x).squeeze(1) - x.sum(1)).square()
            losses.mean().backward()
            if isinstance(optimizer, LossFilter):
                optimizer.step(loss=losses.detach())
            else:
                optimizer.step()

        whole = compile(step)
        for x in inputs:
            whole(x)
        return net.weight.detach()

    plain = trained(lambda function: function)
    before = compilations()
    torch.testing.assert_close(trained(torch.compile), plain, rtol=1e-12, atol=1e-12)
    assert compilations() > before


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have one kind of vectors")
def test_the_processor_is_part_of_what_compiled_code_is_found_by() -> None:
    """Code on disk that AVX-512 made, taken by a processor with AVX2, would compute wrong numbers."""
    from torch._inductor import config, cpu_vec_isa

    usual = cpu_vec_isa.pick_vec_isa()
    assert compiled.VARIANTS["options"].keys() == {"cpp.simdlen"}
    with config.patch(compiled.VARIANTS["options"]):
        assert cpu_vec_isa.pick_vec_isa() == usual, "the option is to say what is chosen anyway"
    assert config.cpp.simdlen is None
