"""Data sets: formats, checksums, search order, subsets, batches. All files but the shipped ones are made here."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import os
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from koala_lab import data, paths
from koala_lab.data import DATASETS, Images
from koala_lab.data.formats import parse_csv

Arrays = dict[str, np.ndarray]
RNG = np.random.RandomState(7)


# --- tiny files of every format ---------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, *, train: int = 30, test: int = 20, side: int = 28, zipped: bool = True) -> Arrays:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, count in (("train", train), ("t10k", test)):
        arrays[f"{split}-images-idx3-ubyte"] = RNG.randint(0, 256, (count, side, side)).astype(np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        raw = idx_bytes(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return arrays


def write_cifar(folder: Path, files: tuple[str, ...], *, label_bytes: int = 1, count: int = 20) -> Arrays:
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for name in files:
        records[name] = RNG.randint(0, 256, (count, label_bytes + 3072)).astype(np.uint8)
        records[name][:, :label_bytes] = np.arange(count)[:, None] % 10
        (folder / name).write_bytes(records[name].tobytes())
    return records


CIFAR10 = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def write_npz(folder: Path, count: int = 4) -> Arrays:
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for i, name in enumerate([*(f"train_data_batch_{k}.npz" for k in range(1, 11)), "val_data.npz"]):
        images[name] = RNG.randint(0, 256, (count, 3072)).astype(np.uint8)
        # The official training files also hold the mean image.
        np.savez(folder / name, data=images[name], labels=np.arange(count) * 99 + i + 1, mean=np.zeros(3072))
    return images


def write_archive(folder: Path, name: str, inner: Path) -> Path:
    with tarfile.open(folder / name, "w:gz") as tar:
        tar.add(inner, arcname=inner.name)
    return folder / name


def publish(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> Images:
    """Make the copy at hand the published one: put its checksums into the registry."""
    row = DATASETS[name]
    files = []
    for path, file in zip(row.find() or (), row.files, strict=True):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        files.append(dataclasses.replace(file, digest=f"sha256:{hashlib.sha256(content).hexdigest()}"))
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(row, files=tuple(files), **changes))
    return DATASETS[name]


# --- the shipped data sets, and others where somebody has them --------------------------------------------------------


def test_digits_is_scikit_learns(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    assert digits.tag == ""
    assert torch.equal(digits.test_labels.bincount(), torch.full((10,), 50))
    # Together the two splits are the library's data set, image by image, with the right labels.
    pixels, target = load_digits(return_X_y=True)
    expected = sorted((*row, y) for row, y in zip(np.rint(pixels * 255 / 16).astype(int).tolist(), target, strict=True))
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1).tolist()
    labels = torch.cat([digits.train_labels, digits.test_labels]).tolist()
    assert sorted((*row, y) for row, y in zip(images, labels, strict=True)) == expected


def test_mnist5k(folder: Path) -> None:
    mnist = data.load("mnist5k")
    assert mnist.train_images.shape == (4000, 1, 28, 28)
    assert mnist.tag == ""
    assert torch.equal(mnist.test_labels.bincount(), torch.full((10,), 100))
    assert torch.equal(mnist.train_labels.bincount(), torch.full((10,), 400))
    every = {image.numpy().tobytes() for image in torch.cat([mnist.train_images, mnist.test_images])}
    assert len(every) == 5000, "an image is in both splits, or lost"


@pytest.mark.parametrize("name", [name for name in data.names(Images) if name != "imagenet32"])
def test_registry_statistics_are_those_of_the_training_images(name: str) -> None:
    if DATASETS[name].find() is None:
        pytest.skip(f"no copy of {name} in KOALA_DATA")
    loaded = data.load(name)
    pixels = loaded.train_images.double().div(255).transpose(0, 1).flatten(1)
    # MNIST's constants are those of all 60 000 images, CIFAR's are the paper's code's.
    torch.testing.assert_close(loaded.mean.double(), pixels.mean(1), atol=2e-3, rtol=0)
    torch.testing.assert_close(loaded.std.double(), pixels.std(1), atol=2e-3, rtol=0)


def test_real_fashion_mnist() -> None:
    if DATASETS["fashion-mnist"].find() is None:
        pytest.skip("no copy of Fashion-MNIST in KOALA_DATA")
    fashion = data.load("fashion-mnist", allow_unverified=False)
    assert fashion.train_images.shape == (60000, 1, 28, 28)
    assert fashion.tag == ""
    assert torch.equal(fashion.test_labels.bincount(), torch.full((10,), 1000))


def test_statistics_of_the_papers_code() -> None:
    cifar10, cifar100 = DATASETS["cifar10"], DATASETS["cifar100"]
    assert np.allclose(np.multiply(cifar10.mean, 255), (125.3, 123.0, 113.9))
    assert np.allclose(np.multiply(cifar10.std, 255), (63.0, 62.1, 66.7))
    assert np.allclose(np.multiply(cifar100.mean, 255), (129.3, 124.1, 112.4))
    assert np.allclose(np.multiply(cifar100.std, 255), (68.2, 65.4, 70.4))


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(folder: Path, zipped: bool) -> None:
    arrays = write_idx(folder, zipped=zipped)
    loaded = data.load("fashion-mnist", allow_unverified=True)
    assert np.array_equal(loaded.train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(loaded.test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(loaded.test_labels.numpy(), arrays["t10k-labels-idx1-ubyte"])


def test_mnist5k_t10k_trains_on_everything_and_tests_on_the_files(folder: Path) -> None:
    arrays = write_idx(folder / "mnist")
    loaded = data.load("mnist5k-t10k", allow_unverified=True)
    assert torch.equal(loaded.train_labels.bincount(), torch.full((10,), 500))
    assert np.array_equal(loaded.test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert loaded.tag


@pytest.mark.parametrize("archived", [True, False])
def test_cifar10(folder: Path, tmp_path: Path, archived: bool) -> None:
    inner = (tmp_path if archived else folder) / "cifar-10-batches-bin"
    records = write_cifar(inner, CIFAR10)
    if archived:
        write_archive(folder, "cifar-10-binary.tar.gz", inner)
    loaded = data.load("cifar10", allow_unverified=True)
    assert loaded.train_images.shape == (100, 3, 32, 32)
    # Third training file, record 4, green channel, row 2, column 3.
    assert loaded.train_images[44, 1, 2, 3] == records["data_batch_3.bin"][4, 1 + 1024 + 2 * 32 + 3]
    assert loaded.train_labels[44] == records["data_batch_3.bin"][4, 0]
    assert np.array_equal(loaded.test_images.flatten(1).numpy(), records["test_batch.bin"][:, 1:])


def test_cifar100_takes_the_fine_label(folder: Path) -> None:
    names = ("train.bin", "test.bin")
    write_cifar(folder, names, label_bytes=2)
    for name in names:
        records = np.frombuffer((folder / name).read_bytes(), np.uint8).reshape(-1, 3074).copy()
        records[:, 0], records[:, 1] = 3, 80 + np.arange(len(records)) % 20
        (folder / name).write_bytes(records.tobytes())
    loaded = data.load("cifar100", allow_unverified=True)
    assert set(loaded.train_labels.tolist()) == set(range(80, 100))


def test_imagenet32(folder: Path) -> None:
    images = write_npz(folder)
    loaded = data.load("imagenet32", allow_unverified=True)
    assert loaded.train_images.shape == (40, 3, 32, 32)
    assert loaded.train_labels[:6].tolist() == [0, 99, 198, 297, 1, 100]  # written as 1, 100, …; counted from 0
    assert np.array_equal(loaded.test_images.flatten(1).numpy(), images["val_data.npz"])


# --- checksums --------------------------------------------------------------------------------------------------------


def test_published_copy_is_verified(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(folder)
    publish(monkeypatch, "fashion-mnist")
    loaded = data.load("fashion-mnist")
    assert loaded.tag == ""
    assert loaded.identity == data.identity("fashion-mnist")
    # Compressed anew, the content is the same, and so is everything else.
    name = folder / "train-images-idx3-ubyte.gz"
    name.write_bytes(gzip.compress(gzip.decompress(name.read_bytes()), compresslevel=1, mtime=1))
    assert data.load("fashion-mnist").identity == loaded.identity


def test_published_archive_is_verified(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", CIFAR10)
    archive = write_archive(folder, "cifar-10-binary.tar.gz", tmp_path / "cifar-10-batches-bin")
    published = dataclasses.replace(
        DATASETS["cifar10"].archive, digest=f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    )
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(DATASETS["cifar10"], archive=published))
    loaded = data.load("cifar10")
    assert loaded.tag == ""
    assert loaded.identity == data.identity("cifar10")


def test_one_changed_byte_is_refused_before_parsing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(folder, zipped=False)

    def parse(*args: Any) -> Any:
        raise AssertionError("parsed before it was verified")

    publish(monkeypatch, "fashion-mnist", parse=parse)
    changed = folder / "t10k-images-idx3-ubyte"
    raw = bytearray(changed.read_bytes())
    expected = hashlib.sha256(raw).hexdigest()
    raw[-1] ^= 1
    changed.write_bytes(raw)
    with pytest.raises(data.DataError) as caught:
        data.load("fashion-mnist")
    message = str(caught.value)
    for part in (str(changed), expected, hashlib.sha256(raw).hexdigest(), "--allow-unverified-data"):
        assert part in message
    assert "\n" not in message


def test_allowed_copy_is_tagged_and_has_its_own_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(folder)
    monkeypatch.setenv("KOALA_ALLOW_UNVERIFIED_DATA", "1")
    loaded = data.load("fashion-mnist")
    published = data.identity("fashion-mnist", allow_unverified=False)
    assert loaded.tag == f"unverified: content {loaded.identity[:8]}"
    assert loaded.identity == data.identity("fashion-mnist") != published
    with pytest.raises(data.DataError):
        data.load("fashion-mnist", allow_unverified=False)
    write_idx(folder)  # other pixels
    assert data.load("fashion-mnist").identity not in {loaded.identity, published}


def test_permission_leaves_a_verified_copy_verified(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(folder)
    publish(monkeypatch, "fashion-mnist")
    loaded = data.load("fashion-mnist", allow_unverified=True)
    assert loaded.tag == ""
    assert loaded.identity == data.identity("fashion-mnist", allow_unverified=False)


IDENTITIES = {
    "digits": "3930513dcf28",
    "mnist5k": "d7bcedb5e8d1",
    "mnist5k-t10k": "66d156e7bed8",
    "mnist": "a2ecf0d31201",
    "fashion-mnist": "f152ff3284f8",
    "cifar10": "7fceb45844c2",
    "cifar100": "e70c1125f74a",
    "imagenet32": "d9a1d2fb42b4",
}


def test_identities_never_change(folder: Path) -> None:
    # They are part of the keys of stored runs: a change here makes every stored result unreachable.
    assert {name: data.identity(name)[:12] for name in data.names(Images)} == IDENTITIES
    assert all(len(data.identity(name)) == 64 for name in data.names(Images))


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged_idx(folder: Path, case: str) -> str:
    write_idx(folder, zipped=case == "truncated gzip")
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    match case:
        case "truncated gzip":
            images = images.with_suffix(".gz")
            images.write_bytes(images.read_bytes()[:-2000])
        case "truncated":
            images.write_bytes(images.read_bytes()[:-1])
        case "empty":
            images.write_bytes(b"")
        case "floats":
            images.write_bytes(b"\0\0\x0d\x03" + images.read_bytes()[4:])
        case "no dimensions":
            images.write_bytes(b"\0\0\x08\0\x05")
        case "27 pixels wide":
            write_idx(folder, side=27, zipped=False)
        case "label 10":
            labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
            return labels.name
        case "a label too few":
            labels.write_bytes(idx_bytes(np.zeros(29)))
            return labels.name
    return images.name


IDX_DAMAGE = [
    "truncated gzip",
    "truncated",
    "empty",
    "floats",
    "no dimensions",
    "27 pixels wide",
    "label 10",
    "a label too few",
]


@pytest.mark.parametrize("case", IDX_DAMAGE)
def test_damaged_idx_is_named(folder: Path, case: str) -> None:
    name = damaged_idx(folder, case)
    with pytest.raises(data.DataError, match=name):
        data.load("fashion-mnist", allow_unverified=True)


@pytest.mark.parametrize("case", ["half a record", "empty", "label 10"])
def test_damaged_cifar_is_named(folder: Path, case: str) -> None:
    write_cifar(folder, CIFAR10)
    path = folder / "data_batch_4.bin"
    raw = path.read_bytes()
    path.write_bytes({"half a record": raw[:-1500], "empty": b"", "label 10": b"\x0a" + raw[1:]}[case])
    with pytest.raises(data.DataError, match=r"data_batch_4\.bin"):
        data.load("cifar10", allow_unverified=True)


@pytest.mark.parametrize("case", ["truncated", "not an archive", "a file is missing"])
def test_damaged_archive_is_named(folder: Path, tmp_path: Path, case: str) -> None:
    inner = tmp_path / "cifar-10-batches-bin"
    write_cifar(inner, CIFAR10[1:] if case == "a file is missing" else CIFAR10)
    archive = write_archive(folder, "cifar-10-binary.tar.gz", inner)
    if case == "truncated":
        archive.write_bytes(archive.read_bytes()[:100_000])
    elif case == "not an archive":
        archive.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(data.DataError, match="data_batch_1" if case == "a file is missing" else "cifar-10-binary"):
        data.load("cifar10", allow_unverified=True)


@pytest.mark.parametrize("line", ["0,1,2,17,3", "0,1,2,-1,3", "0,1,2,3", "0,1,2,3,10", "0,1,x,3,4", "\x93NUMPY"])
def test_damaged_csv_is_named(line: str) -> None:
    # 2 x 2 pixels from 0 to 16 and a label from 0 to 9
    contents = iter([("digits.csv", f"{line}\n{line}\n".encode("latin-1"))])
    with pytest.raises(data.DataError, match=r"digits\.csv"):
        parse_csv(contents, (1, 2, 2), 10, test_size=1, largest=16)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize(
    "case", ["pickle", "not a zip", "no labels", "label 0", "label 1001", "floats", "28 pixels wide"]
)
def test_damaged_npz_is_named_and_nothing_is_unpickled(folder: Path, case: str) -> None:
    write_npz(folder)
    path = folder / "val_data.npz"
    good = {"data": np.zeros((2, 3072), np.uint8), "labels": np.array([1, 1000])}
    match case:
        case "not a zip":
            path.write_bytes(b"PK\x03\x04" + bytes(100))
        case "pickle":
            np.savez(path, data=np.array([Bomb(folder / "exploded")], dtype=object), labels=good["labels"])
        case "one array":
            np.save(path.with_suffix(""), good["data"])
            path.with_suffix(".npy").rename(path)
        case "no labels":
            np.savez(path, data=good["data"])
        case "label 0":
            np.savez(path, data=good["data"], labels=np.array([0, 5]))
        case "label 1001":
            np.savez(path, data=good["data"], labels=np.array([1, 1001]))
        case "floats":
            np.savez(path, data=np.zeros((2, 3072)), labels=good["labels"])
        case "28 pixels wide":
            np.savez(path, data=np.zeros((2, 3 * 28 * 28), np.uint8), labels=good["labels"])
    with pytest.raises(data.DataError, match=r"val_data\.npz"):
        data.load("imagenet32", allow_unverified=True)
    assert not (folder / "exploded").exists()


# --- where data sets are looked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "imagenet32", "mnist", "mnist5k-t10k"])
def test_missing_data_say_what_to_do(folder: Path, name: str) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load(name)
    message = str(caught.value)
    needed = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz", "imagenet32": "val_data.npz"}
    for part in ("KOALA_DATA", str(folder), DATASETS[name].title, needed.get(name, "t10k-images-idx3-ubyte")):
        assert part in message
    assert ("image-net.org" if name == "imagenet32" else f"koala data {name}") in message
    assert "\n" not in message


def test_first_complete_folder_counts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = functools.partial(data.load, "fashion-mnist", allow_unverified=True)
    write_idx(tmp_path / "raw" / "fashion-mnist", train=11)
    assert len(load().train_images) == 11
    write_idx(folder, train=12)
    assert len(load().train_images) == 12
    write_idx(tmp_path / "earlier", train=13)
    monkeypatch.setenv("KOALA_DATA", os.pathsep.join([str(tmp_path / "earlier"), str(folder)]))
    assert len(load().train_images) == 13
    (tmp_path / "earlier" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(load().train_images) == 12, "an incomplete copy is passed over"
    write_idx(folder / "fashion-mnist", train=14)
    assert len(load().train_images) == 14, "MNIST has the same file names: the data set's own folder comes first"


def test_unknown_name_suggests(folder: Path) -> None:
    for call in (data.load, data.identity, data.fetch):
        with pytest.raises(ValueError, match=r"'cifar-10'.*did you mean 'cifar10'"):
            call("cifar-10")


def test_download(folder: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the network is allowed here, but only to this server
    monkeypatch.setenv("KOALA_DATA", str(folder))
    monkeypatch.setattr(paths, "raw_dir", lambda: tmp_path / "raw")
    served, address = server
    write_cifar(tmp_path / "cifar-10-batches-bin", CIFAR10)
    archive = write_archive(served, "cifar-10-binary.tar.gz", tmp_path / "cifar-10-batches-bin")
    digest = f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    row = DATASETS["cifar10"]

    def published(digest: str, path: str) -> Images:
        file = data.File("cifar-10-binary.tar.gz", digest, url=f"{address}/{path}", download=digest)
        return dataclasses.replace(row, archive=file)

    monkeypatch.setitem(DATASETS, "cifar10", published("md5:" + "0" * 32, archive.name))
    with pytest.raises(data.DataError, match="checksum is not the published one"):
        data.fetch("cifar10")
    assert DATASETS["cifar10"].find() is None, "a wrong download stays nowhere"
    monkeypatch.setitem(DATASETS, "cifar10", published(digest, "nowhere/" + archive.name))
    with pytest.raises(data.DataError, match="HTTPError"):
        data.fetch("cifar10")
    monkeypatch.setitem(DATASETS, "cifar10", published(digest, archive.name))
    assert data.load("cifar10").tag == ""
    assert DATASETS["cifar10"].find() == (tmp_path / "raw" / "cifar10" / archive.name,)


# --- subsets ----------------------------------------------------------------------------------------------------------


def test_subset_is_balanced_fixed_and_nested(folder: Path) -> None:
    full, large, small = (data.load("mnist5k", train_size=n) for n in (None, 1003, 200))
    assert torch.equal(small.train_labels.bincount(), torch.full((10,), 20))
    counts = large.train_labels.bincount()
    assert counts.sum() == 1003
    assert counts.max() - counts.min() == 1
    pool, inner, outer = ({x.numpy().tobytes() for x in d.train_images} for d in (full, small, large))
    assert inner < outer < pool
    assert torch.equal(small.test_images, full.test_images)
    assert small.identity == full.identity
    # The same for everyone: other machines, other versions.
    assert hashlib.sha256(small.train_images.numpy().tobytes()).hexdigest()[:16] == "cd70c2d56ee328ba"


@pytest.mark.parametrize("size", [0, -5, 4001])
def test_impossible_subset(folder: Path, size: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 4000.*{size}"):
        data.load("mnist5k", train_size=size)


# --- batches ----------------------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.3, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
CROP = data.Augmentation(pad=4, flip=True)


def images_and_labels(count: int = 50, channels: int = 3, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator).byte(), torch.arange(count)


def epoch(images: torch.Tensor, labels: torch.Tensor, *, seed: int = 1, number: int = 0, **kwargs: Any) -> list[Any]:
    generator = data.epoch_generator(seed, number)
    kwargs = {"mean": MEAN[: images.shape[1]], "std": STD[: images.shape[1]], **kwargs}
    return list(data.batches(images, labels, 16, generator=generator, **kwargs))


def test_batches_in_order_are_normalised_images() -> None:
    images, labels = images_and_labels()
    got = list(data.batches(images, labels, 16, mean=MEAN, std=STD))
    assert [len(y) for _, y in got] == [16, 16, 16, 2]
    expected = (images / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(torch.cat([x for x, _ in got]), expected)
    assert torch.equal(torch.cat([y for _, y in got]), labels)
    assert images.dtype == torch.uint8


def test_batches_have_the_dtype_of_the_mean() -> None:
    images, labels = images_and_labels()
    x, _ = next(data.batches(images, labels, 4, mean=MEAN.double(), std=STD.double()))
    assert x.dtype == torch.float64


def test_shuffled_epoch_has_every_image_once_and_depends_on_seed_and_epoch() -> None:
    images, labels = images_and_labels()
    orders = {
        (seed, number): tuple(torch.cat([y for _, y in epoch(images, labels, seed=seed, number=number)]).tolist())
        for seed in (0, 1)
        for number in (0, 1)
    }
    assert all(sorted(order) == labels.tolist() for order in orders.values())
    assert len(set(orders.values())) == 4
    again = tuple(torch.cat([y for _, y in epoch(images, labels, seed=1, number=1)]).tolist())
    assert orders[1, 1] == again


def test_drop_last() -> None:
    images, labels = images_and_labels()
    assert [len(y) for _, y in epoch(images, labels, drop_last=True)] == [16, 16, 16]
    assert data.num_batches(50, 16) == 4
    assert data.num_batches(50, 16, drop_last=True) == 3
    assert data.num_batches(48, 16) == data.num_batches(48, 16, drop_last=True) == 3


def slow_crops(image: np.ndarray, pad: int, flip: bool) -> list[np.ndarray]:
    """All crops of an image, one after another, in the words of the paper: pad, crop, mirror."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    found = []
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + height, left : left + width]
            found.append(crop)
            if flip:
                found.append(crop[:, :, ::-1])
    return found


@pytest.mark.parametrize("augment", [CROP, data.Augmentation(pad=1, flip=False), data.Augmentation(pad=0, flip=True)])
def test_augmentation_is_uniform_over_the_crops_of_a_slow_loop(augment: data.Augmentation) -> None:
    images, labels = images_and_labels(count=6)
    expected = [{crop.tobytes(): i for i, crop in enumerate(slow_crops(x.numpy(), *augment))} for x in images]
    kinds = len(expected[0])
    repeats = 60 * kinds // 6
    seen = np.zeros(kinds, int)
    many = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    zero, one = torch.zeros(3), torch.ones(3) / 255  # (x / 255 - 0) / (1 / 255) = x
    for x, y in epoch(*many, augment=augment, mean=zero, std=one):
        for image, label in zip(x.round().byte(), y, strict=True):
            seen[expected[label][image.numpy().tobytes()]] += 1  # KeyError: not a crop of this image
    # 60 of each kind expected; a uniform draw stays within 6 standard deviations.
    assert seen.min() > 60 - 6 * 60**0.5
    assert seen.max() < 60 + 6 * 60**0.5


def test_augmentation_differs_within_a_batch_and_between_epochs() -> None:
    image, _ = images_and_labels(count=1)
    copies = image.repeat(32, 1, 1, 1), torch.zeros(32, dtype=torch.int64)
    first, second = (torch.cat([x for x, _ in epoch(*copies, augment=CROP, number=n)]) for n in (0, 1))
    assert len({x.numpy().tobytes() for x in first}) > 16
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "mnist5k-t10k", "fashion-mnist"])
def test_digits_and_clothes_are_not_mirrored(name: str) -> None:
    assert not DATASETS[name].augmentation.flip
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 3:5, 0:4] = 255  # the left half: mirrored, most of the light would be right of the middle
    augment = data.Augmentation(pad=1, flip=DATASETS[name].augmentation.flip)
    for x, _ in epoch(images, torch.arange(200), augment=augment, mean=torch.zeros(1), std=torch.ones(1)):
        assert (x[..., :4].sum((1, 2, 3)) > x[..., 4:].sum((1, 2, 3))).all()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet32"])
def test_natural_images_get_the_papers_augmentation(name: str) -> None:
    assert DATASETS[name].augmentation == (4, True)


@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_resumed_epoch_goes_on_with_the_same_batches(start: int) -> None:
    images, labels = images_and_labels()
    whole, rest = epoch(images, labels, augment=CROP), epoch(images, labels, augment=CROP, start=start)
    assert len(rest) == 4 - start
    for (x, y), (x_rest, y_rest) in zip(whole[start:], rest, strict=True):
        assert torch.equal(x, x_rest)
        assert torch.equal(y, y_rest)


def test_bad_arguments_are_named() -> None:
    images, labels = images_and_labels()
    call = functools.partial(data.batches, images, labels, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="batch_size 51 gives no batch of 50"):
        call(51, drop_last=True)
    with pytest.raises(ValueError, match="batch_size 0"):
        call(0)
    with pytest.raises(ValueError, match=r"start .* 4, got 5"):
        call(16, start=5)
    with pytest.raises(ValueError, match="augment needs a generator"):
        call(16, augment=CROP)


class DeviceOnly(TorchDispatchMode):
    """Fails on any operation that reads a value back or touches a tensor of another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in str(func), "a value was read back"
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == "meta", f"{func} touched a tensor on {leaf.device}"
        return out


def test_batches_stay_on_the_device() -> None:
    # The meta device has no values at all: reading one back, or copying to the host, raises.
    images = torch.empty(50, 3, 12, 12, dtype=torch.uint8, device="meta")
    labels = torch.empty(50, dtype=torch.int64, device="meta")
    mean = MEAN.to("meta")
    loop = data.batches(images, labels, 16, generator=data.epoch_generator(0, 0), augment=CROP, mean=mean, std=mean)
    with DeviceOnly():
        shapes = [(x.shape, x.device.type, y.device.type) for x, y in loop]
    assert shapes == [((n, 3, 12, 12), "meta", "meta") for n in (16, 16, 16, 2)]
    with pytest.raises(NotImplementedError), DeviceOnly():  # the guard does notice
        labels.cpu()
    with pytest.raises(AssertionError, match="touched a tensor on cpu"), DeviceOnly():
        torch.arange(3).to("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_sees_the_same_batches() -> None:
    images, labels = images_and_labels()
    expected = epoch(images, labels, augment=CROP)
    got = epoch(images.cuda(), labels.cuda(), augment=CROP, mean=MEAN.cuda(), std=STD.cuda())
    for (x, y), (x_cuda, y_cuda) in zip(expected, got, strict=True):
        torch.testing.assert_close(x_cuda.cpu(), x)
        assert torch.equal(y_cuda.cpu(), y)
