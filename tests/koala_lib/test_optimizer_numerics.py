"""Precision, cost and speed paths of the optimizers in `optimizers.CASES`, and that they do optimise."""

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import koala_lib
from koala_lab import models
from koala_lib import Apollo, KoalaM, KoalaPlusPlus, KoalaV, kalman
from koala_lib.optim._engine.passes import MIN_ALONE, squared_norms
from koala_lib.optim._engine.sharded import times_shards
from tests.support.cases import (
    CASES,
    Case,
    Net,
    advance,
    assert_same,
    each_case,
    each_filter,
    evaluate,
    kept,
    losses_of,
    snapshot,
    trained,
    weights,
)
from tests.support.guards import NoHostReads, NoTransfers

# --- precision --------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dtypes(net: nn.Module, optimizer: Any) -> list[torch.dtype]:
    return [t.dtype for p in net.parameters() for t in (p, *kept(optimizer, p).values())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_dtype(case: Case, dtype: torch.dtype) -> None:
    """Weights and state keep the dtype, the filter is float64; 20 steps end within 10 roundings of float64."""
    net, optimizer = trained(case, 20, dtype)
    assert set(dtypes(net, optimizer)) == {dtype}
    exact, _ = trained(case, 20)
    scale = float(weights(exact).abs().max())
    torch.testing.assert_close(weights(net), weights(exact), rtol=0, atol=10 * scale * torch.finfo(dtype).eps)
    if case.filters:
        assert optimizer.param_groups[0]["filter"].dtype == torch.float64
        assert evaluate(net, optimizer, 0).dtype == dtype
        returned = optimizer.step(lambda: evaluate(net, optimizer, 20))
        assert returned.dtype == dtype
        assert returned.shape == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_filter
def test_half_precision_rounds_a_step_once(case: Case, dtype: torch.dtype) -> None:
    def after(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        start, gradient = (torch.randn(500, generator=generator).to(torch.bfloat16).to(torch.float16) for _ in "xg")
        p = nn.Parameter(start.to(dtype))
        optimizer = case([p], weight_decay=0.0, lr=100.0)  # a step of about 0.1 g
        optimizer.predict()
        p.grad = gradient.to(dtype)
        optimizer.step(loss=torch.tensor(0.5, dtype=dtype))
        return p.detach()

    # Float32 within, so that a value that lies between two numbers may rarely fall to the other side.
    assert (after(dtype) != after(torch.float64).to(dtype)).sum() <= 2


@each_case
def test_mixed_dtypes(case: Case) -> None:
    def run(foreach: bool) -> Net:
        net = Net()
        net.weight.data = net.weight.data.float()
        net.bias.data = net.bias.data.bfloat16()
        optimizer = case(net.parameters(), foreach=foreach)
        before = dtypes(net, optimizer)
        advance(net, optimizer, range(20))
        assert [p.dtype for p in net.parameters()] == before
        assert all(v.dtype == p.dtype for p in net.parameters() for v in kept(optimizer, p).values())
        return net

    exact, _ = trained(case, 20)
    assert torch.equal(weights(run(True)), weights(run(False)))
    torch.testing.assert_close(weights(run(False)), weights(exact), rtol=0, atol=0.1)


BAD = [(torch.nan, 1.0), (torch.inf, 1.0), (1.0, torch.nan), (1.0, torch.inf)]


@pytest.mark.parametrize(("bad_loss", "bad_gradient"), BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_filter
def test_a_non_finite_loss_or_gradient_is_a_missing_observation(
    case: Case, dtype: torch.dtype, bad_loss: float, bad_gradient: float
) -> None:
    net, optimizer = trained(case, 2, dtype)
    optimizer.predict()
    predicted = snapshot(net, optimizer)
    losses = evaluate(net, optimizer, 2).detach()
    losses[1] *= bad_loss
    net.out.grad[2] *= bad_gradient
    optimizer.step(loss=losses)
    assert optimizer.skipped_steps == 1
    after = snapshot(net, optimizer)
    for group in ("predicted", "filter"):
        del after[f"group.0.{group}"], predicted[f"group.0.{group}"]
    assert_same(after, predicted)
    advance(net, optimizer, range(3, 5))
    assert weights(net).isfinite().all()
    assert optimizer.skipped_steps == 1


# --- what a step may cost -----------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [Tensor.item, bool, float, lambda t: t in [0, 1], lambda t: torch.ones(1)[t > 0]])
def test_the_guard_sees_reads(read: Callable[[Tensor], Any]) -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="reads a tensor back"):
        read(torch.ones(1))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@each_case
@pytest.mark.usefixtures("kept_on_device")
def test_a_step_reads_nothing_back(case: Case, lr: Any) -> None:
    net = Net()
    optimizer = case(net.parameters(), lr=lr)
    with NoHostReads():
        advance(net, optimizer, range(3))
        net.out.grad = None
        optimizer.step(lambda: losses_of(net, 3) * torch.nan)


@pytest.mark.parametrize(
    "move",
    [
        lambda: torch.where(torch.ones(2, device="meta") > 0, torch.ones(2, device="meta"), torch.ones(())),
        lambda: torch.ones(2).to("meta"),
        lambda: torch.ones(2).new_tensor([1.0]),
    ],
    ids=["a number where it is copied", "a tensor", "numbers"],
)
def test_the_guard_sees_transfers(move: Callable[[], Any]) -> None:
    with NoTransfers(), pytest.raises(AssertionError, match=r"host|between"):
        move()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@each_case
@pytest.mark.usefixtures("kept_on_device")
def test_a_step_copies_nothing_from_or_to_the_host(case: Case, lr: Any, device: str) -> None:
    params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in ((3, 4), ())]
    optimizer = case(params, lr=lr)
    with NoTransfers():
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step(lambda: torch.zeros(5, device=device))


def test_sums_over_shards_copy_nothing_from_the_host() -> None:
    params = [nn.Parameter(torch.empty(n)) for n in (3, 4)]
    with NoTransfers():
        assert times_shards(torch.zeros(3, 2), params).shape == (3, 2)


@each_case
@pytest.mark.usefixtures("kept_on_device")
def test_a_step_needs_no_values(case: Case) -> None:
    """It runs on tensors without data, where even tolist() fails."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(3, 4)), nn.Parameter(torch.empty(()))]
        optimizer = case(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step(lambda: torch.empty(5))
        with pytest.raises(DataDependentOutputException):
            float(params[1].detach())


@pytest.mark.parametrize("cls", [KoalaV, KoalaM, KoalaPlusPlus, Apollo])
def test_a_step_can_be_read(cls: Any) -> None:
    """The default step on one tensor passes through few functions in few files."""
    p = nn.Parameter(torch.ones(1))
    optimizer = cls([p])
    root, called = str(Path(koala_lib.__file__).parent), set()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            called.add((code.co_filename, code.co_firstlineno, code.co_name))

    for _ in range(2):  # the first one makes the state
        p.grad = torch.ones(1)
        called.clear()
        sys.setprofile(see)
        optimizer.step(lambda: torch.ones(3))
        sys.setprofile(None)
    functions = sorted(each for each in called if not each[-1].startswith("<"))  # comprehensions are a part of theirs
    assert 3 <= len(functions) <= 20, functions
    assert len({file for file, *_ in functions}) <= 4, functions


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"positive_semidefinite": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_grows_by_forty_orders_of_magnitude_leaves_finite_weights(dtype: Any, options: Any) -> None:
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = KoalaPlusPlus([p], **options)
    for size in (1.0, 1e-9, 1e-9, 1e30, 1e30, 1e-9, 1.0):
        p.grad = (torch.tensor([1.0, -2.0, 0.5]) * size).to(dtype)
        optimizer.step(lambda: torch.ones(3))
    assert p.isfinite().all()
    assert all(t.isfinite().all() for t in kept(optimizer, p).values())


class Operations(TorchDispatchMode):
    """Counts everything that is dispatched, views and copies included."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def operations(cls: Any, shapes: Sequence[tuple[int, ...]]) -> int:
    """Count the operations of a default step on an accelerator, which tensors without data stand for."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer, loss = cls(params), torch.empty((), device="meta")
    for _ in range(2):  # the first one makes the state
        for p in params:
            p.grad = torch.empty_like(p)
        with Operations() as counted:
            optimizer.step(lambda: loss)
    return counted.number


# A launch costs an accelerator as much as some 10 000 numbers. KOALA-M spends 80 of its own on the filter's scalars.
@pytest.mark.parametrize(("cls", "most"), [(KoalaV, 60), (KoalaM, 95), (KoalaPlusPlus, 170), (Apollo, 60)])
def test_the_number_of_tensors_costs_no_launches(cls: Any, most: int) -> None:
    sizes = [tuple(p.shape) for p in models.build("resnet110", num_classes=10).parameters()]
    assert len(sizes) == 335
    assert operations(cls, sizes) == operations(cls, sizes[:5]) <= most


@pytest.mark.usefixtures("kept_on_device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "foreach" in signature(case.factory).parameters], ids=str)
def test_lists_of_tensors_step_as_single_ones_where_scalars_stay_on_the_device(case: Case, dtype: torch.dtype) -> None:
    """Some weights lie with their channels last, one has no gradient for a while, one is long."""
    ends = []
    for foreach in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=order))
            for shape, order in (
                ((2, 3, 2, 2), torch.channels_last),
                ((4, 3), torch.contiguous_format),
                ((MIN_ALONE,), torch.contiguous_format),
                ((), torch.contiguous_format),
                ((5,), torch.contiguous_format),
            )
        ]
        optimizer = case(params, foreach=foreach)
        for k in range(4):
            for i, p in enumerate(params):
                p.grad = None if i == k == 1 else (p.detach() * 0.1 + k).to(dtype)
            optimizer.step(lambda: torch.ones(3, dtype=dtype))
        ends.append([t for p in params for t in (p.detach(), *kept(optimizer, p).values())])
    for one, other in zip(*ends, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=16 * scale * torch.finfo(dtype).eps)


@each_case
def test_memory(case: Case) -> None:
    """State per parameter: the tensors named in the table and no others. Nothing of a step outlives it."""
    gc.freeze()  # what exists already is not searched
    net, optimizer = trained(case, 2)
    for p in net.parameters():
        assert kept(optimizer, p).keys() == case.state
        for t in kept(optimizer, p).values():
            assert t.shape == p.shape
            assert not t.requires_grad
            assert t.numel() == 0 or t.data_ptr() != p.data_ptr()

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    before = alive()
    assert before >= 10  # weights and gradients
    advance(net, optimizer, range(2, 6))
    assert alive() == before
    if case.filters:
        optimizer.predict()
        losses = evaluate(net, optimizer, 6)
        optimizer.step(loss=losses)
        graph = weakref.ref(losses)
        del losses
        assert graph() is None
    gc.unfreeze()


# --- foreach and fused --------------------------------------------------------------------------------------


def eventful(net: nn.Module, optimizer: Any) -> None:
    """Ten steps; `out` is without gradient for a while, all are once, and one loss is NaN."""
    for k in range(10):

        def closure(k: int = k) -> Tensor:
            losses = evaluate(net, optimizer, k)
            for p in net.parameters() if k == 2 else [net.out] if k in (4, 5) else []:
                p.grad = None
            return losses * torch.nan if k == 7 else losses

        optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_case
def test_foreach_equals_the_loop(case: Case, dtype: torch.dtype) -> None:
    runs = {}
    for foreach in (False, True):
        net = Net(dtype)
        optimizer = case(net.parameters(), foreach=foreach)
        eventful(net, optimizer)
        runs[foreach] = snapshot(net, optimizer)
        del runs[foreach]["group.0.foreach"]
    assert_same(runs[True], runs[False])


def fused_and_foreach() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    nets = Net(), Net()
    for net, path in zip(nets, ({"fused": True}, {"foreach": True}), strict=True):
        optimizer = KoalaM(net.parameters(), weight_decay=0.3, **path)
        eventful(net, optimizer)
    fused, foreach = (dict(net.state_dict()) for net in nets)
    return fused, foreach


@pytest.mark.usefixtures("no_compiler")
def test_fused_without_a_compiler_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        fused, foreach = fused_and_foreach()
        assert_same(fused, foreach)
    assert [str(w.message) for w in recwarn if "fused" in str(w.message)] == [
        "fused=True needs a working compiler (RuntimeError: no compiler); using foreach"
    ]


# --- norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other"])
@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 1025, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squared_norms(dtype: torch.dtype, size: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(size)
    values = (torch.rand(size, generator=generator) + 0.5).to(dtype)
    if layout == "transposed" and size > 1:
        values = values[: size // 5 * 5].view(5, -1).t()
    elif layout == "every other":
        values = values.repeat_interleave(2)[::2]
    (squared,) = squared_norms([values])
    assert squared.dtype == torch.float64
    assert squared.shape == ()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert float(squared) == pytest.approx(float(values.double().square().sum()), rel=tolerance, abs=0)


def test_squared_norms_of_several_tensors_keep_their_order() -> None:
    tensors = [torch.full((n,), float(n)) for n in (3, 0, 2000, 1)]
    assert [float(n) for n in squared_norms(tensors)] == pytest.approx([27.0, 0.0, 8e9, 1.0], rel=1e-6)
    assert squared_norms([]).shape == (0,)


@pytest.mark.parametrize("scale", [1e-16, 5e17])
def test_squared_norms_neither_overflow_nor_vanish(scale: float) -> None:
    for size in (100, 5000):
        (squared,) = squared_norms([torch.full((size,), scale)])
        assert float(squared) == pytest.approx(size * scale**2, rel=1e-5)


# --- it optimises --------------------------------------------------------------------------------------------


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> float:
    x = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(x)
        value.backward()
        return value

    solver.step(closure)
    return float(loss(x).detach())


def parabola(x: Tensor) -> Tensor:
    return (torch.tensor([1.0, 3.0, 10.0], dtype=x.dtype) * x**2).sum() / 2


def logistic(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator, dtype=x.dtype)
    labels = torch.sign(inputs[:, 0] + 0.8 * torch.randn(40, generator=generator, dtype=x.dtype))
    return torch.nn.functional.softplus(-labels * (inputs @ x)).mean()


@pytest.mark.parametrize("loss", [parabola, logistic])
@each_case
def test_converges(case: Case, loss: Callable[[Tensor], Tensor]) -> None:
    start = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    x = nn.Parameter(start.clone())
    optimizer = case([x], weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k / 10))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    for _ in range(300):
        optimizer.step(closure)
        scheduler.step()
    best = minimum(loss, start)
    left = (float(loss(x).detach()) - best) / (float(loss(start)) - best)
    # A KOALA-V that estimates its process noise starts without any and is slow to wake up.
    assert left < (0.25 if case.name == "V-adaptive" else 0.05)


@pytest.mark.parametrize("kind", [torch.tensor, float])
def test_a_covariance_stays_positive_where_rounding_would_take_it_below_zero(kind: Any) -> None:
    """Position and velocity vary as one, and a nearly exact observation leaves nothing of either."""
    for i in range(200):
        A, C = 0.01 + 1e-3 * i, 0.03 + 7e-4 * i
        B = C * C / A
        P = kalman.MomentumCovariance(*(kind(value) for value in (A, C, B)))
        new = kalman.condition_momentum(P, kind(2e38), kind(2e-40))
        assert float(new.velocity_variance) >= 0
        assert float(new.covariance) ** 2 <= float(new.variance) * float(new.velocity_variance) * (1 + 1e-6)
