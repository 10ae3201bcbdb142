#!/usr/bin/env python3
"""Kill, fill, cut and corrupt what the pipeline works with, and prove that nothing is lost: `make faults`.

    python -P tests/faults.py [--minutes 30] [--seed 0] [--only runs notebooks disks files locks filters]
    python -P tests/faults.py --minutes 1 --without rename    (or lock, or key: the campaign must notice)

Every attempt ends in one of three ways: as if nothing had happened (the same hash of the weights), with a warning that
names the file, or with one sentence. Anything else is a failure and is listed. The last report of each kind is
committed in ``data/results/faults.json``. It is no part of `make test`: half an hour on two cores.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, seed, settings, strategies

from koala_lab import claims, files, paths, runs
from koala_lab.config import RunConfig
from koala_lab.files import read_yaml, write_json
from koala_lab.notebook import declared_in
from koala_lab.runs.provenance import provenance
from koala_lab.runs.store import read_results
from koala_lib import KoalaM, KoalaPlusPlus, KoalaV, kalman

BASE = RunConfig(dataset="digits", train_size=320, model="mlp_100", optimizer="koala_m", epochs=3, batch_size=32)
CONFIGS = [
    BASE,
    BASE.but(optimizer="koala_v", optimizer_args={"weight_decay": 5e-4}),
    BASE.but(optimizer="apollo", optimizer_args={"warmup_steps": 5}),
    BASE.but(optimizer="meka", optimizer_args={"lr": 0.1, "step_size": "constant"}),
    BASE.but(optimizer="adam", optimizer_args={"lr": 1e-3}, wrapper="swa", wrapper_args={"start": 2}),
]
CHILD_FAILED = 99


class Report:
    """Counts of attempts and of outcomes, and what went wrong."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def note(self, kind: str, outcome: str) -> None:
        self.attempts[kind] += 1
        self.outcomes[f"{kind}: {outcome}"] += 1

    def fail(self, kind: str, what: str) -> None:
        self.note(kind, "FAILED")
        self.failures.append(f"{kind}: {what}")
        print(f"FAILED {kind}: {what}", file=sys.stderr)


def child(work: Callable[[], object]) -> int:
    """Fork a process that works; its warnings and errors go nowhere, what counts are the files it leaves."""
    pid = os.fork()
    if pid:
        return pid
    code = CHILD_FAILED
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        work()
        code = 0
    except BaseException as error:
        code = 2 if isinstance(error, OSError) and "cannot write" in str(error) else CHILD_FAILED
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hash_of(result: runs.RunResult) -> str:
    return str(result.provenance["weights_sha256"])


def whole(path: Path) -> bool:
    """Say whether a file is whole: JSON, or a checkpoint, which is a ZIP archive with checksums."""
    try:
        if path.suffix == ".pt":
            return zipfile.ZipFile(path).testzip() is None
        return bool(json.loads(path.read_text()))
    except (ValueError, zipfile.BadZipFile):
        return False


def leftovers(folder: Path, allowed: tuple[str, ...]) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and not p.name.endswith(allowed)]


@contextmanager
def store() -> Iterator[runs.Store]:
    folder = Path(tempfile.mkdtemp(prefix="koala-faults-"))
    try:
        yield runs.Store(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- kills


class _SlowFile:
    """Writes in pieces with pauses between them, so that many a kill comes in the middle of a file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: Any) -> None:
        piece = len(content) // 8 + 1
        for start in range(0, len(content), piece):
            self._file.write(content[start : start + piece])
            self._file.flush()
            time.sleep(0.002)


def _on_a_slow_disk(replacing: Any) -> Any:
    @contextmanager
    def slowly(path: Path) -> Iterator[Any]:
        with replacing(path) as file:
            yield _SlowFile(file)

    return slowly


def kill_runs(report: Report, rng: random.Random, end: float) -> None:
    """SIGKILL a training at random moments until it is done: the weights are those of an undisturbed one."""
    expected, length = {}, {}
    for config in CONFIGS:
        started = time.monotonic()
        expected[config] = hash_of(runs.training.train(config))
        length[config] = time.monotonic() - started
    while time.monotonic() < end:
        config = rng.choice(CONFIGS)
        with store() as s:

            def work(config: RunConfig = config, s: runs.Store = s) -> None:
                files.replacing = _on_a_slow_disk(files.replacing)  # in the child alone
                s.run(config, checkpoint_seconds=0.0)

            for _ in range(200):
                pid = child(work)
                time.sleep(rng.uniform(0, length[config]))
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
                report.note("run killed", "while it ran" if code == -signal.SIGKILL else "after it was done")
                for file in (s.root / config.key / "run.json", s.checkpoint(config.key)):
                    if file.exists() and not whole(file):
                        report.fail("run killed", f"{config.label}: half a {file.name} stands in the place of a whole")
                if s.get(config.key):
                    break
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = s.run(config)
            if hash_of(result) != expected[config]:
                report.fail("run killed", f"{config.label}: other weights than undisturbed")
            if caught:
                report.fail("run killed", f"a kill damaged a file: {caught[0].message}")
            if s.busy(config.key):
                report.fail("run killed", f"{config.label}: the lock is still held")


def kill_notebooks(report: Report, rng: random.Random, end: float) -> None:
    """SIGKILL the execution of a notebook: its output is there whole or not at all, and the next execution is whole."""
    command = [sys.executable, "-m", "koala_lab.cli", "notebook", "01_notation", "-o"]
    while time.monotonic() < end:
        folder = Path(tempfile.mkdtemp(prefix="koala-faults-"))
        output = folder / "out.ipynb"
        environment = os.environ | {"KOALA_REPORT": str(folder / "report"), "KOALA_RUNS": str(folder / "runs")}
        process = subprocess.Popen(
            [*command, str(output)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=rng.uniform(0.5, 15))
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        report.note("notebook killed", "while it ran" if code < 0 else "after it was done")
        if output.exists() and not whole(output):
            report.fail("notebook killed", "half an output was taken for whole")
        again = subprocess.run([*command, str(output)], env=environment, capture_output=True, text=True, check=False)
        if again.returncode or not json.loads(output.read_text())["cells"]:
            report.fail("notebook killed", f"the next execution ends with {again.returncode}: {again.stderr[-200:]}")
        shutil.rmtree(folder, ignore_errors=True)


# ---- full disks


def fill_disks(report: Report, rng: random.Random, end: float) -> None:
    """Let no file grow beyond a random size: a run goes on without checkpoints, or tells that there is no room."""
    expected = {config: hash_of(runs.training.train(config)) for config in CONFIGS}
    while time.monotonic() < end:
        config, size = rng.choice(CONFIGS), rng.choice([0, 1, 100, 2000, 4096, 20_000, 100_000, 400_000])
        with store() as s:

            def work(config: RunConfig = config, s: runs.Store = s, size: int = size) -> None:
                time.sleep = lambda _: None  # type: ignore[assignment]
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                s.run(config, checkpoint_seconds=0.0)

            code = ended(child(work))
            report.note("disk full", {0: "done", 2: "told in a sentence"}.get(code, f"exit {code}"))
            if code not in (0, 2):
                report.fail("disk full", f"{config.label}, files of {size} bytes: exit {code}")
            if rest := leftovers(s.root, ("lock", "checkpoint.pt", "run.json")):
                report.fail("disk full", f"left behind: {rest}")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if hash_of(s.run(config)) != expected[config]:
                    report.fail("disk full", f"{config.label}: other weights once there was room")


# ---- damaged files


def damage(path: Path, rng: random.Random) -> str:
    """Empty, cut or garble a file; return which."""
    content = path.read_bytes()
    how = rng.choice(["emptied", "cut", "garbled", "of another kind"])
    start = rng.randrange(len(content) - 1) if how != "emptied" else 0
    noise = bytes(rng.randrange(256) for _ in range(64))
    path.write_bytes(
        {
            "emptied": b"",
            "cut": content[:start],
            "garbled": content[:start] + noise + content[start + len(noise) :],
            "of another kind": rng.choice([b"[]", b"null", b"{}", b"PK\x03\x04", noise]),
        }[how]
    )
    return how


def one_sentence(error: BaseException, name: str) -> bool:
    return isinstance(error, ValueError) and name in str(error) and len(str(error).splitlines()) == 1


def corrupt_files(report: Report, rng: random.Random, end: float) -> None:
    """Damage each kind of file: records and checkpoints are made anew, files of people are named in a sentence."""
    config = BASE
    result = runs.training.train(config)
    while time.monotonic() < end:
        kind = rng.choice(["record", "checkpoint", "results", "verdicts", "preset", "claims", "notebook"])
        with store() as s, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                outcome = CORRUPTED[kind](s, config, result, rng)
            except Exception as error:
                report.fail(f"damaged {kind}", f"{type(error).__name__}: {error}")
                continue
            if outcome == "set aside" and not any("is damaged" in str(w.message) for w in caught):
                outcome = "no difference" if not caught else f"another warning: {caught[0].message}"
            report.note(f"damaged {kind}", outcome)


def _record(s: runs.Store, config: RunConfig, result: runs.RunResult, rng: random.Random) -> str:
    s.put(result)
    damage(s.root / config.key / "run.json", rng)
    again = s.run(config)
    if hash_of(again) != hash_of(result):
        raise AssertionError("other weights")
    return "set aside"


def _checkpoint(s: runs.Store, config: RunConfig, result: runs.RunResult, rng: random.Random) -> str:
    run = runs.training.TrainingRun(config, torch.device("cpu"))
    run.begin_epoch()
    run.save(s.checkpoint(config.key))
    damage(s.checkpoint(config.key), rng)
    if hash_of(s.run(config)) != hash_of(result):
        raise AssertionError("other weights")
    return "set aside"


def _told(read: Callable[[Path], Any], path: Path, rng: random.Random) -> str:
    how = damage(path, rng)
    try:
        read(path)
    except Exception as error:
        if not one_sentence(error, path.name):
            raise AssertionError(f"{how}: {type(error).__name__}: {error}") from error
        return "told in a sentence"
    return "still readable"


def _results(s: runs.Store, config: RunConfig, result: runs.RunResult, rng: random.Random) -> str:
    file = s.root / "results.json"
    write_json(file, {"runs": [result.to_json()]})
    return _told(read_results, file, rng)


def _verdicts(s: runs.Store, config: RunConfig, result: runs.RunResult, rng: random.Random) -> str:
    file = claims.write_verdicts(claims.saved()[:3], s.root / "verdicts.json")
    return _told(claims.read_verdicts, file, rng)


def _copied(read: Callable[[Path], Any], path: Path, s: runs.Store, rng: random.Random) -> str:
    shutil.copy(path, s.root / path.name)
    return _told(read, s.root / path.name, rng)


CORRUPTED: dict[str, Callable[..., str]] = {
    "record": _record,
    "checkpoint": _checkpoint,
    "results": _results,
    "verdicts": _verdicts,
    "preset": lambda s, c, r, rng: _copied(read_yaml, next(paths.presets().rglob("*.yaml")), s, rng),
    "claims": lambda s, c, r, rng: _copied(claims.read, paths.claims_dir() / "apollo.yaml", s, rng),
    "notebook": lambda s, c, r, rng: _copied(declared_in, paths.notebooks() / "01_notation.ipynb", s, rng),
}


# ---- locks and keys


def contend(report: Report, rng: random.Random, end: float) -> None:
    """Let several processes want one run: it is trained once. A record of another run is not taken for it."""
    while time.monotonic() < end:
        config = rng.choice(CONFIGS[:4]).but(epochs=1)
        with store() as s:

            def work(config: RunConfig = config, s: runs.Store = s) -> None:
                original = runs.store.train

                def counted(*args: Any, **options: Any) -> Any:
                    with (s.root / "trainings").open("a") as file:
                        file.write("x")
                    return original(*args, **options)

                runs.store.train = counted
                s.run(config)

            pids = [child(work) for _ in range(3)]
            if codes := [code for code in map(ended, pids) if code]:
                report.fail("run contended for", f"exit codes {codes}")
            trained = len((s.root / "trainings").read_text())
            report.note("run contended for", "trained once")
            if trained != 1:
                report.fail("run contended for", f"trained {trained} times")
            other = config.but(seed=7)
            shutil.copytree(s.root / config.key, s.root / other.key)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = runs.Store(s.root).get(other.key)
            report.note("record of another run", "not taken")
            if found is not None:
                report.fail("record of another run", "taken for this run's")


# ---- filters

FILTER_STEPS = 1_000_000  # of covariances, and of whole filters: losses, gradients and weights
WORKERS = 2  # processes that drive the latter
SIZES = (0.0, 1e-30, 1e-8, 1.0, 1e8, 1e30, math.inf, math.nan)  # of gradients and losses
COMMON = ("usual", "wild")  # how often the last ones come
DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # in float16 a step of 1e5 is infinite


def drive_filters(report: Report, rng: random.Random, end: float) -> None:
    """Drive a million steps of covariances, then a million of whole optimizers chosen by Hypothesis, if time allows."""
    _drive_covariances(report, rng)
    with store() as s:
        counts = [s.root / f"{number}.json" for number in range(WORKERS)]
        seeds = [rng.randrange(2**32) for _ in counts]

        def work(file: Path, seed: int) -> None:
            mine = Report()
            _drive_optimizers(mine, random.Random(seed), end)
            write_json(file, {"steps": mine.attempts["filter step"], "failures": mine.failures})

        codes = [ended(pid) for pid in [child(partial(work, *job)) for job in zip(counts, seeds, strict=True)]]
        if any(codes):
            report.fail("filter step", f"exit codes {codes}")
        for found in (files.read_json(file) for file in counts if file.exists()):
            report.attempts["filter step"] += found["steps"]
            report.failures += found["failures"]


def _drive_optimizers(report: Report, rng: random.Random, end: float) -> None:
    choices = strategies.fixed_dictionaries(
        {
            "make": strategies.sampled_from([KoalaV, KoalaM, KoalaPlusPlus]),
            "formulas": strategies.sampled_from(["paper", "released"]),
            "blocks": strategies.sampled_from(["tensor", "global"]),
            "target_risk": strategies.sampled_from(["relative", "absolute"]),
            "weight_decay": strategies.sampled_from([0.0, 0.02]),
            "lr": strategies.sampled_from([1e-3, 0.01, 1.0]),
            "positive_semidefinite": strategies.booleans(),
        }
    )
    dtypes = strategies.lists(strategies.sampled_from(DTYPES), min_size=1, max_size=2)

    @settings(max_examples=20, deadline=None, database=None)
    @given(choices, dtypes, strategies.sampled_from(COMMON), strategies.integers(0, 2**32 - 1))
    def episode(options: dict[str, Any], dtypes: list[torch.dtype], mix: str, seed: int) -> None:
        if time.monotonic() < end:
            _episode(report, dict(options), dtypes, mix, random.Random(seed))

    while report.attempts["filter step"] < FILTER_STEPS / WORKERS:
        try:
            seed(rng.randrange(2**32))(episode)()
        except AssertionError as error:
            report.failures.append("filter step: " + " ".join(str(error).split()))
        if time.monotonic() >= end:
            return


def _drive_covariances(report: Report, rng: random.Random, filters: int = 10_000) -> None:
    """Predict and condition many covariances at once, with gradients and noises over sixty orders of magnitude."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))

    def drawn() -> torch.Tensor:
        exponents = 120 * torch.rand(filters, generator=generator, dtype=torch.float64) - 60
        return torch.where(torch.rand(filters, generator=generator) < 0.1, 0.0, 10**exponents)

    P = drawn()
    M = kalman.MomentumCovariance(P, torch.zeros_like(P), drawn())
    while report.attempts["covariance step"] < FILTER_STEPS:
        g, Q, q, R = drawn(), drawn(), drawn(), drawn()
        R = torch.where(R == 0, 1.0, R)  # S > 0, as the optimizers see to
        P = kalman.condition_position(kalman.predict_position(P, Q), g, R)
        M = kalman.condition_momentum(kalman.predict_momentum(M, 0.9, Q, q), g, R)
        report.attempts["covariance step"] += 2 * filters
        A, C, B = M
        right = {name: (v >= 0) & v.isfinite() for name, v in {"P": P, "A": A, "B": B}.items()}
        right["C"] = C.abs() <= A.sqrt() * B.sqrt() * (1 + 1e-6)
        for name, holds in right.items():
            if not holds.all():
                i = int((~holds).nonzero()[0])
                values = [float(v[i]) for v in (P, A, C, B, g, Q, q, R)]
                report.fail("covariance step", f"{name} of P, A, C, B = {values[:4]} after g, Q, q, R = {values[4:]}")
                return


def _episode(
    report: Report, options: dict[str, Any], dtypes: list[torch.dtype], mix: str, rng: random.Random, steps: int = 1000
) -> None:
    """Drive one filter; raise an AssertionError where a covariance is not positive or a weight is not finite."""
    often = [8, 2, 8, 40, 8, 2, 1, 1] if mix == "usual" else [1] * len(SIZES)
    unit = torch.randn(8, 3, generator=torch.Generator().manual_seed(rng.randrange(2**32)))
    grads = {dtype: [[(row * size).to(dtype) for row in unit] for size in SIZES] for dtype in dtypes}
    losses = [unit[:, 0].abs() * size for size in SIZES]
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    make = options.pop("make")
    known = inspect.signature(make).parameters
    optimizer = make(params, **{name: value for name, value in options.items() if name in known})
    for step in range(steps):
        optimizer.predict()
        for p in params:
            p.grad = rng.choice(rng.choices(grads[p.dtype], often)[0])
        optimizer.step(loss=rng.choices(losses, often)[0])
        state = optimizer.filter_state()
        report.attempts["filter step"] += 1
        covariance = state.pop("covariance", 0.0)
        product = state.get("variance", 0.0) * state.get("velocity_variance", 0.0)
        assert all(0 <= value < math.inf for value in state.values()), f"step {step}: {state}"
        assert covariance**2 <= product * (1 + 1e-6), f"step {step}: covariance {covariance} of {state}"
        if step % 20 == 0 or step == steps - 1:  # what is not finite stays so
            assert all(p.isfinite().all() for p in params), f"step {step}: weights {params}"


# ---- the campaign itself: without a safeguard it must fail


@contextmanager
def _in_place(path: Path) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        yield file


@contextmanager
def _unlocked(self: runs.Store, key: str) -> Iterator[None]:
    (self.root / key).mkdir(parents=True, exist_ok=True)
    yield


def _trusted(path: Path) -> Any:
    return files.read_json(path) | {"key": path.parent.name}


SAFEGUARDS: dict[str, tuple[str, Any, str, Any]] = {
    "rename": ("runs", files, "replacing", _in_place),
    "lock": ("locks", runs.Store, "lock", _unlocked),
    "key": ("locks", runs.store, "read_json", _trusted),
}  # the kind of attempts that must notice, and what takes the place of the safeguard


@contextmanager
def without(safeguard: str) -> Iterator[None]:
    """Take one safeguard away: the rename, the lock, or the check of a record's key."""
    _, where, name, other = SAFEGUARDS[safeguard]
    before = getattr(where, name)
    setattr(where, name, other)
    try:
        yield
    finally:
        setattr(where, name, before)


KINDS: dict[str, tuple[Callable[[Report, random.Random, float], None], float]] = {
    "runs": (kill_runs, 0.3),
    "notebooks": (kill_notebooks, 0.1),
    "disks": (fill_disks, 0.1),
    "files": (corrupt_files, 0.1),
    "locks": (contend, 0.1),
    "filters": (drive_filters, 0.3),
}  # and their shares of the time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--keep", action="store_true", help="write it to data/results/faults.json, kind by kind")
    parser.add_argument("--without", choices=SAFEGUARDS, help="take a safeguard away; exit code 0 if it is missed")
    given = parser.parse_args()
    if given.without:
        report = Report()
        with without(given.without):
            KINDS[SAFEGUARDS[given.without][0]][0](
                report, random.Random(given.seed), time.monotonic() + 60 * given.minutes
            )
        print(f"without the {given.without}: {len(report.failures)} failures in {dict(report.attempts)}")
        return 0 if report.failures else 1
    torch.set_num_threads(1)
    file = paths.results_dir() / "faults.json"
    content, failures = files.read_json(file) if file.exists() else {}, 0
    shares = sum(KINDS[kind][1] for kind in given.only)
    for kind in given.only:
        work, share = KINDS[kind]
        report, started = Report(), time.monotonic()
        try:
            work(report, random.Random(given.seed), started + 60 * given.minutes * share / shares)
        except Exception as error:  # nothing of the pipeline may raise through the campaign
            report.fail(kind, f"{type(error).__name__}: {error}")
        content[kind] = {
            "minutes": round((time.monotonic() - started) / 60, 1),
            "seed": given.seed,
            "attempts": dict(report.attempts),
            "outcomes": dict(sorted(report.outcomes.items())),
            "failures": report.failures,
            "provenance": provenance(torch.device("cpu")),
        }
        failures += len(report.failures)
        print(kind, json.dumps(content[kind], indent=1))
        if given.keep:
            write_json(file, {kind: content[kind] for kind in KINDS if kind in content})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
