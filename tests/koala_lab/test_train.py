"""One run: configuration and key, learning, failure, and the same bits after an interruption."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from koala_lab import config, data
from koala_lab.config import RunConfig
from koala_lab.runs import provenance
from koala_lab.runs import training as train
from koala_lab.runs.training import RunResult
from koala_lab.tasks import Classification, create
from tests.support.guards import NoHostReads

QUICK = RunConfig(
    dataset="digits",
    model="resnet8",
    optimizer="koala_m",
    optimizer_args={"weight_decay": 5e-4},
    epochs=2,
    batch_size=64,
    milestones=(1,),
    gamma=0.2,
    augment=True,
    train_size=320,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_key_is_canonical() -> None:
    same = RunConfig.from_dict(json.loads(json.dumps(QUICK.to_dict())))
    assert same == QUICK
    assert same.key == QUICK.key
    assert len(QUICK.key) == 16
    assert QUICK.but(optimizer_args={"lr": 1}).key == QUICK.but(optimizer_args={"lr": 1.0}).key
    assert (
        QUICK.but(optimizer_args=[("momentum", 0.5), ("lr", 1.0)]).key
        == QUICK.but(optimizer_args={"lr": 1.0, "momentum": 0.5}).key
    )


def test_everything_in_a_config_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.TASKS, "other", Classification)
    changes = {
        "task": "other",
        "task_args": {"a": 1},
        "model_args": {"init": "orthogonal"},
        "wrapper": "swa",
        "wrapper_args": {"start": 1},
        "dataset": "mnist5k",
        "model": "resnet18",
        "optimizer": "koala_v",
        "optimizer_args": {},
        "epochs": 3,
        "batch_size": 32,
        "milestones": (),
        "gamma": 0.1,
        "augment": False,
        "train_size": None,
        "seed": 1,
        "precision": "bfloat16",
        "final_lr": 0.0,
        "warmup_steps": 5,
        "warmup_init_lr": 0.1,
        "inverse_sqrt": True,
    }
    assert set(changes) == set(QUICK.to_dict())
    needed = {"final_lr": {"milestones": ()}, "inverse_sqrt": {"milestones": (), "warmup_steps": 5}}
    keys = {QUICK.but(**{name: value} | needed.get(name, {})).key for name, value in changes.items()}
    assert len(keys | {QUICK.key}) == len(changes) + 1


def test_a_run_at_another_rate_or_length_keeps_its_proportions() -> None:
    apollo = {"lr": 0.01, "weight_decay": 2.5e-4, "warmup_steps": 100, "warmup_init_lr": 1e-5, "eps": 1e-4}
    run = QUICK.but(optimizer="apollo", optimizer_args=apollo, epochs=40, milestones=(20, 30))
    scaled = dict(run.scaled(3).optimizer_args)
    assert scaled == apollo | {"lr": 0.03, "weight_decay": 8.33333e-5, "warmup_init_lr": 3e-5}
    short = run.shortened(10)
    assert (short.epochs, short.milestones, dict(short.optimizer_args)["warmup_steps"]) == (10, (5, 8), 25)
    assert run.scaled(1) == run.shortened(40) == run
    ramp = {"warmup_steps": 3, "warmup_init_lr": 1e-4, "final_lr": 1e-3, "milestones": ()}
    cosine = QUICK.but(**ramp, epochs=4, optimizer_args={"lr": 1.0}).scaled(10).shortened(1)
    assert (cosine.warmup_steps, cosine.warmup_init_lr, cosine.final_lr) == (1, 1e-3, 1e-2)
    none = run.but(optimizer_args=apollo | {"warmup_init_lr": None})
    assert dict(none.scaled(3).optimizer_args)["warmup_init_lr"] is None


def test_key_follows_data_and_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    before = QUICK.key
    monkeypatch.setitem(config.VERSION, "koala_m", config.VERSION["koala_m"] + 1)
    bumped = QUICK.key
    monkeypatch.setattr(data, "identity", lambda name: "another copy")
    assert len({before, bumped, QUICK.key}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "digit"}, "dataset 'digit' is unknown; known are .*digits"),
        ({"model": "vgg"}, "model 'vgg'"),
        ({"task": "sorting"}, "task 'sorting' is unknown; known are classification"),
        ({"wrapper": "sam"}, "wrapper 'sam' is unknown; known are lookahead, swa"),
        ({"optimizer": "koala"}, "optimizer 'koala' is unknown; known are .*koala_m"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number >= 1, got 1\.5"),
        ({"train_size": -1}, "train_size must be"),
        ({"milestones": (3, 1)}, r"milestones must be increasing epochs, got \(3, 1\)"),
        ({"gamma": 0}, r"gamma must be a finite number in \(0, 1\], got 0"),
        ({"final_lr": -1.0, "milestones": ()}, r"final_lr must be a finite number >= 0, got -1\.0"),
        ({"inverse_sqrt": True, "warmup_steps": 3}, "inverse_sqrt=True needs warmup_steps of 1 or more, and neither"),
        ({"inverse_sqrt": True, "milestones": ()}, "inverse_sqrt=True needs warmup_steps of 1 or more, and neither"),
        ({"final_lr": 0.0}, "final_lr asks for a cosine schedule and milestones for steps"),
        ({"warmup_steps": 2.5}, r"warmup_steps must be a whole number >= 0, got 2\.5"),
        ({"warmup_init_lr": float("nan")}, "warmup_init_lr must be a finite number >= 0, got nan"),
        ({"optimizer": "apollo", "warmup_steps": 5}, "put warmup_steps into optimizer_args"),
    ],
)
def test_bad_config_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QUICK.but(**change)


@pytest.mark.parametrize("optimizer", ["koala_m", "sgd", "yogi"])
def test_unknown_optimizer_argument_is_an_error(optimizer: str) -> None:
    with pytest.raises(TypeError, match="momentun"):
        train.train(QUICK.but(optimizer=optimizer, optimizer_args={"lr": 0.1, "momentun": 0.9}))


@pytest.mark.parametrize("where", ["task_args", "model_args", "wrapper_args"])
def test_other_unknown_arguments_are_errors(where: str) -> None:
    with pytest.raises(TypeError, match="depht"):
        train.train(QUICK.but(**{where: {"depht": 3}}, wrapper="lookahead"))


def test_a_new_field_at_its_default_leaves_the_key_alone() -> None:
    spelled_out = QUICK.but(task="classification", wrapper="", gamma=0.2, precision="float32", model_args={})
    assert spelled_out.key == QUICK.key


def test_keys_of_committed_runs_are_as_before() -> None:
    """The second was computed before there were cosine schedule and warm-up; the first has KOALA's version 2."""
    assert QUICK.key == "c6e80fdfcd349e62"
    assert QUICK.but(optimizer="sgd", milestones=(), optimizer_args={"lr": 0.1}).key == "a69b728815aff962"


def test_batch_larger_than_the_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size=512 exceeds the 320 training samples"):
        train.train(QUICK.but(batch_size=512))


def test_a_run_learns_and_reports() -> None:
    steps: list[tuple[int, int]] = []
    result = train.train(QUICK.but(epochs=4, milestones=(3,)), on_step=lambda *s: steps.append(s))
    assert steps == [(i, 20) for i in range(1, 21)]
    assert result.status == "done"
    assert [m["lr"] for m in result.epochs] == [1.0, 1.0, 1.0, 0.2]
    losses = [m["train_loss"] for m in result.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert result.final["test_error"] < 60  # chance is 90 %
    assert result.final["test_error_top5"] < result.final["test_error"]
    assert result.final == result.epochs[-1]
    assert result.provenance["threads"] == 1
    assert result.provenance["parameters"] == 19810
    assert RunResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_metrics_against_a_plain_evaluation() -> None:
    run = train.TrainingRun(QUICK, torch.device("cpu"))
    metrics = run.evaluate()
    images = data.load("digits")
    x = (images.test_images.double() / 255 - images.mean.double()) / images.std.double()
    logits = run.task.network.eval().double()(x)
    order = logits.argsort(dim=1, descending=True)
    hits = order == images.test_labels[:, None]
    assert metrics["test_error"] == pytest.approx(100 * (1 - hits[:, 0].double().mean().item()), abs=0.21)
    assert metrics["test_error_top5"] == pytest.approx(100 * (1 - hits[:, :5].sum(1).double().mean().item()), abs=0.21)
    loss = torch.nn.functional.cross_entropy(logits, images.test_labels).item()
    assert metrics["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_a_run_of_apollo_says_how_many_weights_are_above_the_floor() -> None:
    """The mean over the steps of each epoch, here counted by hand; the metric is not part of the key."""
    config = QUICK.but(optimizer="apollo", optimizer_args={"lr": 0.05, "warmup_steps": 0}, epochs=2)
    result, run = train.train(config), train.TrainingRun(config, torch.device("cpu"))
    for epoch in result.epochs:
        counts = []
        run.begin_epoch()
        for batch in run.task.batches(run.epoch, run.step):
            run.train_step(batch)
            kept = run.optimizers["network"].state.values()
            counts.append(sum(int((s["curvature"].abs() > 0.01).sum()) for s in kept) / 19810)
        run.end_epoch()
        assert epoch["above_floor"] == pytest.approx(sum(counts) / len(counts), rel=1e-5)
    assert 0 < result.final["above_floor"] < 1
    flat = config.but(optimizer_args={"lr": 0.05, "warmup_steps": 0, "eps": 1e6})
    assert train.train(flat).final["above_floor"] == 0


def test_a_warm_up_rises_and_the_inverse_square_root_falls_from_its_end() -> None:
    """lr min(t / w, sqrt(w / t)), which is fairseq's, step by step over an epoch's end; with 5 steps in an epoch."""
    ramp = {"warmup_steps": 4, "inverse_sqrt": True, "milestones": ()}
    run = train.TrainingRun(QUICK.but(optimizer="sgd", optimizer_args={"lr": 0.1}, **ramp), torch.device("cpu"))
    rates = []
    for _ in range(2):
        run.begin_epoch()
        for batch in run.task.batches(run.epoch, run.step):
            with run.warm_up():
                rates.append(run.optimizers["network"].param_groups[0]["lr"])
            run.train_step(batch)
        run.end_epoch()
    assert rates == pytest.approx([0.1 * min(t / 4, math.sqrt(4 / max(t, 1))) for t in range(10)])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_other_optimizers_of_the_tables_train(optimizer: str) -> None:
    rate = {"sgd": 0.1, "adam": 1e-2}[optimizer]
    plain = QUICK.but(epochs=6, milestones=(), augment=False)
    result = train.train(plain.but(optimizer=optimizer, optimizer_args={"lr": rate}))
    assert result.epochs[-1]["train_loss"] < 0.7 * result.epochs[0]["train_loss"]


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    first, again, other = (train.train(QUICK.but(epochs=1, seed=s)) for s in (0, 0, 1))
    assert first.provenance["weights_sha256"] == again.provenance["weights_sha256"]
    assert first.epochs == again.epochs
    assert first.provenance["weights_sha256"] != other.provenance["weights_sha256"]


def test_a_run_that_diverges_is_recorded_with_its_step() -> None:
    result = train.train(QUICK.but(optimizer="sgd", optimizer_args={"lr": 1e12}, epochs=3))
    assert result.status == "failed"
    assert result.failed_step in (1, 2)  # the first step already throws the weights away
    assert result.final == {}
    assert result.epochs == ()


# ---------------------------------------------------------------- schedules


class _Rates:
    """Learning rates of every step of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.run, self.rates = train.TrainingRun(config, torch.device("cpu")), []
        (optimizer,) = self.run.optimizers.values()
        optimizer.register_step_pre_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))

    def train(self) -> list[float]:
        for epoch in range(self.run.config.epochs):
            for batch in self.run.task.batches(epoch):
                self.run.train_step(batch)
            self.run.end_epoch()
        return self.rates


COSINE = QUICK.but(optimizer="sgd", optimizer_args={"lr": 0.5}, milestones=(), final_lr=0.1, epochs=4)


def test_a_cosine_schedule_ends_at_its_final_rate() -> None:
    expected = [0.1 + 0.4 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    run = _Rates(COSINE)
    assert run.train() == pytest.approx([lr for lr in expected for _ in range(5)], rel=1e-12)
    assert [m["lr"] for m in run.run.epochs] == pytest.approx(expected, rel=1e-5)
    assert run.run.optimizers["network"].param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [3, 8])
def test_a_warm_up_rises_linearly_and_then_leaves_the_schedule_alone(steps: int) -> None:
    config = QUICK.but(optimizer="sgd", optimizer_args={"lr": 0.5}, warmup_steps=steps, warmup_init_lr=0.1)
    plain = _Rates(config.but(warmup_steps=0)).train()
    warm = _Rates(config).train()
    assert warm[:steps] == pytest.approx([0.1 + 0.4 * k / steps for k in range(steps)])
    assert warm[steps:] == plain[steps:]
    assert plain == [0.5] * 5 + [0.1] * 5


class _Interrupt(Exception):
    pass


WRAPPERS = {"lookahead": {"k": 3, "alpha": 0.8}, "swa": {"start": 1, "every": 1}}


SGD = QUICK.but(optimizer="sgd", optimizer_args={"lr": 0.1, "momentum": 0.9})
RESUMED = {
    f"{optimizer} {wrapper}".strip(): start.but(wrapper=wrapper, wrapper_args=WRAPPERS.get(wrapper, {}))
    for optimizer, start in {
        "koala_m": QUICK.but(optimizer_args={}),
        "koala_v": QUICK.but(optimizer="koala_v", optimizer_args={}),
        "sgd": SGD,
        "adam": QUICK.but(optimizer="adam", optimizer_args={}),
    }.items()
    for wrapper in ("", *WRAPPERS)
} | {
    "sgd cosine": SGD.but(milestones=(), final_lr=0.01),
    "sgd warm-up": SGD.but(warmup_steps=8),
    "apollo": QUICK.but(optimizer="apollo", optimizer_args={"warmup_steps": 4}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_at_a_random_step_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    config = RESUMED[name]
    whole = train.train(config)
    stop = random.SystemRandom().randrange(1, 10)

    def interrupt(done: int, total: int) -> None:
        if done == stop + 1:  # a checkpoint is written after the call, so `stop` is the last step that was kept
            raise _Interrupt

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(_Interrupt):
        train.train(config, checkpoint=checkpoint, checkpoint_seconds=0, on_step=interrupt)
    seen: list[int] = []
    rest = train.train(config, checkpoint=checkpoint, on_step=lambda done, total: seen.append(done))
    assert seen == list(range(stop + 1, 11)), f"stopped after {stop}"
    assert rest.epochs == whole.epochs, f"stopped after {stop}"
    assert rest.provenance["weights_sha256"] == whole.provenance["weights_sha256"], f"stopped after {stop}"


def test_kill_9_and_resume_give_the_same_bits(tmp_path: Path) -> None:
    config = QUICK.but(epochs=8)
    checkpoint = tmp_path / "checkpoint.pt"
    script = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; from koala_lab.runs.training import RunConfig, train\n"
        "train(RunConfig.from_dict(json.loads(sys.argv[1])), checkpoint=Path(sys.argv[2]), checkpoint_seconds=0)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(config.to_dict()), str(checkpoint)])
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.SystemRandom().uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    saved = torch.load(checkpoint, weights_only=True)  # whole, although the process died at any point
    resumed, whole = train.train(config, checkpoint=checkpoint), train.train(config)
    assert resumed.provenance["weights_sha256"] == whole.provenance["weights_sha256"], saved["counters"]
    assert resumed.epochs == whole.epochs


def test_bits_do_not_depend_on_the_threads_of_the_caller() -> None:
    config = QUICK.but(epochs=1)
    alone = train.train(config)
    torch.set_num_threads(2)
    assert train.train(config).provenance["weights_sha256"] == alone.provenance["weights_sha256"]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("damage", ["another run", "empty", "cut off", "foreign", "no checkpoint"])
def test_a_checkpoint_that_is_of_no_use_is_set_aside(tmp_path: Path, damage: str) -> None:
    config, file = QUICK.but(epochs=1), tmp_path / "checkpoint.pt"
    run = train.TrainingRun(QUICK.but(seed=5) if damage == "another run" else config, torch.device("cpu"))
    run.begin_epoch()
    run.save(file)
    whole = file.read_bytes()
    if damage == "no checkpoint":
        torch.save({"something": 1}, file)
    elif damage != "another run":
        file.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 2], "foreign": b"{}"}[damage])
    with pytest.warns(UserWarning, match=r"checkpoint.pt is damaged .*; it is kept as .*, and the run begins anew"):
        result = train.train(config, checkpoint=file)
    assert result.provenance["weights_sha256"] == train.train(config).provenance["weights_sha256"]
    assert file.with_name("checkpoint.pt.damaged").exists()


def test_a_run_stops_at_a_time_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config, checkpoint = QUICK.but(epochs=2), tmp_path / "checkpoint.pt"
    for steps in (1, 2):  # each call makes one step, for its time is over at once
        with pytest.raises(train.Stopped, match=f"stopped after step {steps}$"):
            train.train(config, checkpoint=checkpoint, until=time.monotonic())
    rest: list[int] = []
    resumed = train.train(config, checkpoint=checkpoint, on_step=lambda done, _: rest.append(done))
    assert rest[0] == 3
    assert resumed.provenance["weights_sha256"] == train.train(config).provenance["weights_sha256"]


def test_a_disk_that_is_full_for_a_checkpoint_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = QUICK.but(epochs=1)
    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        with pytest.warns(
            UserWarning, match=r"cannot write .*checkpoint.pt: No space.*goes on without a new checkpoint"
        ):
            result = train.train(config, checkpoint=tmp_path / "checkpoint.pt", checkpoint_seconds=0.0)
    assert result.provenance["weights_sha256"] == train.train(config).provenance["weights_sha256"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer", ["koala_m", "apollo"])
def test_a_step_reads_nothing_back_to_the_host(optimizer: str, kept_on_device: None) -> None:
    config = QUICK.but(optimizer=optimizer, optimizer_args={"lr": 0.01})
    run = train.TrainingRun(config, torch.device("cpu"))
    batches = run.task.batches(0)
    with NoHostReads():
        for _ in range(3):
            run.train_step(next(batches))
    assert run.step == 3


def test_bfloat16_autocast_is_recorded_and_changes_the_numbers() -> None:
    exact, rough = train.train(QUICK.but(epochs=1)), train.train(QUICK.but(epochs=1, precision="bfloat16"))
    assert rough.config.precision == "bfloat16"
    assert exact.epochs != rough.epochs
    assert rough.epochs[0]["train_loss"] == pytest.approx(exact.epochs[0]["train_loss"], rel=0.1)


def test_provenance_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance.paths, "ROOT", tmp_path)
    provenance._commit.cache_clear()
    try:
        assert provenance.provenance("cpu")["commit"] == ""
    finally:
        provenance._commit.cache_clear()


def test_provenance_inside_a_foreign_repository_is_not_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "of others"], check=True)
    (tmp_path / "unpacked").mkdir()
    found = {}
    for folder in (tmp_path, tmp_path / "unpacked"):
        monkeypatch.setattr(provenance.paths, "ROOT", folder)
        provenance._commit.cache_clear()
        found[folder.name] = provenance.provenance("cpu")["commit"]
    provenance._commit.cache_clear()
    assert len(found[tmp_path.name]) == 12
    assert found["unpacked"] == ""


def test_provenance_names_the_processor_and_the_kernels_that_run_on_it() -> None:
    here = train.train(QUICK.but(epochs=1)).provenance
    assert here["device"] == f"cpu ({provenance.device_name('cpu')})"
    assert here["kernels"] == torch.backends.cpu.get_cpu_capability()
    assert {"python", "torch", "numpy", "koala-lib"} <= set(here["versions"])
    script = "from koala_lab.runs.provenance import provenance; print(provenance('cpu')['kernels'])"
    lowered = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    assert subprocess.check_output([sys.executable, "-c", script], env=lowered, text=True).strip() == "DEFAULT"


# ---------------------------------------------------------------- a validation set


def test_a_validation_set_is_held_out_of_the_training_set_and_balanced() -> None:
    whole, held = (create(QUICK.but(task_args=a), torch.device("cpu")) for a in ({}, {"validation_size": 100}))
    assert isinstance(whole, Classification)
    assert isinstance(held, Classification)
    assert len(held.data.train_labels) == len(whole.data.train_labels) == 320
    images, labels = held._evaluated["validation"]
    assert torch.bincount(labels).tolist() == [10] * 10
    everything = {x.numpy().tobytes() for x in data.load("digits", train_size=420).train_images}
    trained, unseen = ({x.numpy().tobytes() for x in part} for part in (held.data.train_images, images))
    assert trained | unseen == everything
    assert len(trained & unseen) == 0
    assert torch.equal(held.data.test_images, whole.data.test_images)


def test_a_run_with_a_validation_set_measures_both() -> None:
    final = train.train(QUICK.but(task_args={"validation_size": 100})).final
    assert set(final) > {"test_error", "test_error_top5", "test_loss", "validation_error", "validation_error_top5"}
    assert final["validation_error"] == pytest.approx(round(final["validation_error"]))  # of 100 samples
    assert final["validation_loss"] != final["test_loss"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QUICK.but(task_args={"validation_size": -1}), "validation_size must be a whole number >= 0, got -1"),
        (QUICK.but(task_args={"validation_size": 0.5}), "validation_size must be a whole number >= 0, got 0.5"),
        (QUICK.but(train_size=None, task_args={"validation_size": 1297}), "leaves nothing of the 1297 training"),
        (QUICK.but(task_args={"validation_size": 1200}), "train_size must be between 1 and 1297"),
    ],
)
def test_an_impossible_validation_set_is_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(config, torch.device("cpu"))
