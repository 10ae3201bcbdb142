"""The store: trained once, written whole or not at all, committed results, tables."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from koala_lab import runs
from koala_lab.config import RunConfig
from koala_lab.files import write_json
from koala_lab.runs import Store
from koala_lab.runs.training import RunResult

CONFIG = RunConfig(dataset="digits", model="resnet8", optimizer="koala_m", epochs=2, batch_size=64, train_size=128)


def result_of(config: RunConfig, error: float = 5.0) -> RunResult:
    epochs = tuple({"train_loss": 1.0 / e, "test_error": error / e} for e in range(1, config.epochs + 1))
    return RunResult(config.key, config, "done", epochs, None, {"seconds": 1.0, "data": {"tag": ""}})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("KOALA_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("KOALA_RUNS", str(tmp_path / "runs"))
    return Store()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Replaces training by an instant result; lists what was trained."""
    seen: list[RunConfig] = []

    def train(config: RunConfig, **_: object) -> RunResult:
        seen.append(config)
        return result_of(config)

    monkeypatch.setattr("koala_lab.runs.store.train", train)
    return seen


def test_put_and_get(store: Store) -> None:
    assert store.get(CONFIG.key) is None
    store.put(result_of(CONFIG))
    assert store.get(CONFIG.key) == result_of(CONFIG)
    assert Store(store.root).get(CONFIG.key) == result_of(CONFIG)


def test_a_run_is_trained_once_in_the_order_asked_for(store: Store, trained: list[RunConfig]) -> None:
    grid = [CONFIG.but(seed=s) for s in (2, 0, 1)]
    seen: list[tuple[int, int, int]] = []
    results = runs.run_all(grid, store=store, progress=lambda i, n, c: seen.append((i, n, c.seed)))
    assert [r.config.seed for r in results] == [2, 0, 1]
    assert seen == [(0, 3, 2), (1, 3, 0), (2, 3, 1)]
    runs.run_all([*grid, CONFIG.but(seed=7)], store=store)
    assert [c.seed for c in trained] == [2, 0, 1, 7]


def test_real_training_through_the_store_leaves_no_checkpoint(store: Store) -> None:
    result = store.run(CONFIG.but(epochs=1), checkpoint_seconds=0)
    folder = store.root / result.key
    assert (folder / "run.json").exists()
    assert not (folder / "checkpoint.pt").exists()
    assert store.get(result.key) == result


def test_two_that_want_the_same_run_train_it_once(store: Store, trained: list[RunConfig]) -> None:
    threads = [threading.Thread(target=store.run, args=(CONFIG,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1


def test_a_damaged_record_is_set_aside_and_repeated(store: Store, trained: list[RunConfig]) -> None:
    store.put(result_of(CONFIG))
    file = store.root / CONFIG.key / "run.json"
    file.write_text(file.read_text()[:40])
    with pytest.warns(UserWarning, match=r"is damaged .*, and the run will be repeated"):
        store.run(CONFIG)
    assert trained == [CONFIG]
    assert file.with_name("run.json.damaged").exists()
    assert store.get(CONFIG.key) == result_of(CONFIG)


def test_a_full_disk_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(result_of(CONFIG))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        message = (
            r"run .* is trained, but cannot write .*run.json: No space left on device; what stood there is as it was"
        )
        with pytest.raises(OSError, match=message), pytest.warns(UserWarning, match="trying again in"):
            store.put(result_of(CONFIG, error=1.0))
    assert waited == [1, 10, 20]
    assert store.get(CONFIG.key) == result_of(CONFIG)
    assert [p.name for p in (store.root / CONFIG.key).iterdir()] == ["run.json"]


def test_committed_results_count_as_done(store: Store, trained: list[RunConfig]) -> None:
    file = runs.results_file("desktop", "koala/20_table2")
    runs.merge_results(file, [CONFIG], [result_of(CONFIG)])
    assert store.run(CONFIG) == result_of(CONFIG)
    assert trained == []


def test_committed_results_keep_the_key_they_were_made_with(store: Store) -> None:
    stale = result_of(CONFIG)
    record = stale.to_json() | {"key": "0123456789abcdef"}  # another version of the algorithm, or other data
    write_json(runs.results_file("desktop", "x"), {"runs": [record]})
    assert store.get(CONFIG.key) is None
    assert store.get("0123456789abcdef") is not None


def test_merging_follows_the_grid(store: Store) -> None:
    file = runs.results_file("desktop", "x")
    one, two, three = (CONFIG.but(seed=s) for s in (1, 2, 3))
    runs.merge_results(file, [two, one, three], [result_of(one), result_of(two)])
    assert [r.config.seed for r in runs.read_results(file)] == [2, 1]
    first = file.stat().st_mtime_ns
    runs.merge_results(file, [two, one, three], [result_of(one)])
    assert file.stat().st_mtime_ns == first  # nothing new, nothing written
    runs.merge_results(file, [one, two], [result_of(one, error=9.0)])
    assert [r.final["test_error"] for r in runs.read_results(file)] == [4.5, 2.5]
    runs.merge_results(file, [three, two], [result_of(three)])
    assert [r.config.seed for r in runs.read_results(file)] == [3, 2]


def test_merging_keeps_runs_on_another_copy_of_the_data(store: Store) -> None:
    file = runs.results_file("paper", "x")
    copy = RunResult("00aa", CONFIG, "done", ({"test_error": 1.0},), None, {"data": {"tag": "unverified: content 12"}})
    gone = RunResult("00bb", CONFIG.but(epochs=9), "done", (), None, {"data": {"tag": "unverified: content 12"}})
    write_json(file, {"runs": [copy.to_json(), gone.to_json()]})
    runs.merge_results(file, [CONFIG], [result_of(CONFIG)])
    assert [r.key for r in runs.read_results(file)] == [CONFIG.key, "00aa"]


def test_results_that_are_none_are_named(tmp_path: Path) -> None:
    assert runs.read_results(tmp_path / "missing.json") == []
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"runs": [{"key": "a"}]}))
    with pytest.raises(
        ValueError, match=r"broken.json is no file of results \(.*field 'config': expected dict, got None"
    ):
        runs.read_results(broken)


def test_a_grid_is_trained_seed_by_seed_and_shared_runs_once() -> None:
    other = CONFIG.but(optimizer="sgd")
    grid = {"one": CONFIG, "two": [other, CONFIG.but(dataset="mnist")], "same": CONFIG}
    wanted = runs.expand(grid, [3, 4], pilot={"two": [other.but(epochs=1)]})
    assert [(c.optimizer, c.dataset, c.epochs, c.seed) for c in wanted] == [
        ("koala_m", "digits", 2, 3), ("sgd", "digits", 2, 3), ("koala_m", "mnist", 2, 3), ("sgd", "digits", 1, 3),
        ("koala_m", "digits", 2, 4), ("sgd", "digits", 2, 4), ("koala_m", "mnist", 2, 4),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="row 'one': expected RunConfigs without a seed"):
        runs.expand({"one": CONFIG.but(seed=1)}, [0])


def test_a_table_names_rows_and_candidates() -> None:
    config = CONFIG.but(optimizer_args={"momentum": 0.5})
    rates = [CONFIG.but(optimizer="sgd", optimizer_args={"lr": lr}) for lr in (0.1, 0.3)]
    failed = RunResult(config.but(seed=1).key, config.but(seed=1), "failed", ({"test_error": 3.0},), 7, {})
    results = [failed, result_of(config), *map(result_of, rates), result_of(CONFIG.but(epochs=9))]
    table = runs.frame({"koala": config, "sgd": rates, "again": config}, results)
    assert table[["row", "seed", "candidate", "status"]].values.tolist() == [
        ["koala", 0, 0, "done"], ["koala", 1, 0, "failed"], ["sgd", 0, 0, "done"], ["sgd", 0, 1, "done"],
        ["again", 0, 0, "done"], ["again", 1, 0, "failed"],
    ]  # fmt: skip
    assert table["lr"].tolist()[2:4] == [0.1, 0.3]
    assert table["momentum"][0] == 0.5
    assert table["test_error"].isna().tolist() == [False, True, False, False, False, True]
    curves = runs.learning_curves(table[table["row"] == "koala"], results)
    errors = curves[curves["metric"] == "test_error"]
    assert errors[["seed", "epoch", "value"]].values.tolist() == [[0, 1, 5.0], [0, 2, 2.5], [1, 1, 3.0]]
    summary = runs.summary(table[table["row"] == "koala"], ["test_error"])
    assert summary.loc[("digits", "koala")].tolist()[2:] == [1, 1]
    assert runs.frame({"koala": config}, []).empty


def test_runs_on_another_copy_of_the_data_are_found_unless_the_official_ones_are_there() -> None:
    copy = RunResult("00aa", CONFIG, "done", ({"test_error": 1.0},), None, {"data": {"tag": "unverified"}})
    assert runs.frame({"a": CONFIG}, [copy])[["key", "data"]].values.tolist() == [["00aa", "unverified"]]
    for results in ([copy, result_of(CONFIG)], [result_of(CONFIG), copy]):
        assert runs.frame({"a": CONFIG}, results)["key"].tolist() == [CONFIG.key]


def test_busy_while_somebody_holds_the_run(store: Store) -> None:
    assert not store.busy(CONFIG.key)
    with store.lock(CONFIG.key):
        held: list[bool] = []
        other = threading.Thread(target=lambda: held.append(Store(store.root).busy(CONFIG.key)))
        other.start()
        other.join()
        assert held == [True]
    assert not store.busy(CONFIG.key)
