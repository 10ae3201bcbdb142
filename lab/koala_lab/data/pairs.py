"""Pairs of sentences for translation: where they come from, and how they become tokens.

Both languages share one vocabulary of pieces of words: byte-pair encoding (Sennrich et al., ACL 2016) of the bytes of
the text, learned by Hugging Face's ``tokenizers`` from the whole training part, so that it does not depend on
``train_size``. Every text can be written in it, and comes back from it unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from koala_lab.data.formats import Array, Contents, DataError, reading
from koala_lab.data.registry import File

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL: Final = ("<pad>", "<eos>")
PAD, EOS = range(2)  # their numbers in every vocabulary: no token, and the end of a sentence

Lines = tuple[str, ...]
Part = tuple[Lines, Lines]  # source and target sentences
NUMBERS: Final = 10_000  # numbers below it, of which so many are for:
NUMBERS_TRAIN, NUMBERS_TEST = 3000, 500


def parallel_lines(contents: Contents) -> list[Part]:
    """Read pairs of plain text files, source and target, a sentence a line.

    Training pairs with an empty side, which WMT's corpora have, are left out.
    """
    parts: list[Part] = []
    for (source_name, source_raw), (target_name, target_raw) in zip(contents, contents, strict=True):
        source, target = _lines(source_name, source_raw), _lines(target_name, target_raw)
        if len(source) != len(target):
            raise DataError(f"{target_name} has {len(target)} lines for the {len(source)} lines of {source_name}")
        if not parts:
            whole = [i for i, pair in enumerate(zip(source, target, strict=True)) if all(pair)]
            source, target = tuple(source[i] for i in whole), tuple(target[i] for i in whole)
        if not source:
            raise DataError(f"{source_name} and {target_name} hold no pair of sentences")
        parts.append((source, target))
    return parts


def _lines(name: str, raw: bytes) -> Lines:
    with reading(name):
        # Not splitlines(): corpora from the web have U+2028 and its like within a line.
        return tuple(line.strip() for line in raw.decode("utf-8").removesuffix("\n").split("\n") if raw)


def number_words(contents: Contents) -> list[Part]:
    """Numbers below :data:`NUMBERS` in German and English words, each in one of the three parts.

    They stand in the order of the SHA-256 of their digits: as good as random, and the same everywhere.

    Args:
        contents: num2words' own sources, which make up the identity of the data; nothing is read from them here.
    """
    from num2words import num2words  # type: ignore[import-untyped]

    order = sorted(range(NUMBERS), key=lambda n: hashlib.sha256(str(n).encode()).digest())
    cuts = [0, NUMBERS_TRAIN, NUMBERS_TRAIN + NUMBERS_TEST, NUMBERS_TRAIN + 2 * NUMBERS_TEST]
    german, english = (tuple(num2words(n, lang=lang) for n in order[: cuts[-1]]) for lang in ("de", "en"))
    return [(german[a:b], english[a:b]) for a, b in pairwise(cuts)]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A row of the registry of parallel texts.

    Attributes
    ----------
    title
        Name to print.
    vocabulary
        Number of tokens.
    files
        Source and target of the training, validation and test part.
    parse
        Reads them, in this order.
    folders
        Where the files lie below a data folder, beside the folder itself and one with the name of the data set.
    source
        Where a person gets what cannot be downloaded as it is.
    """

    title: str
    vocabulary: int
    files: tuple[File, ...]
    parse: Callable[[Contents], list[Part]] = parallel_lines
    folders: tuple[str, ...] = ()
    source: str = ""
    archive: ClassVar[File | None] = None
    loader: ClassVar[str] = "holds pairs of sentences; load it with load_pairs"


@dataclass(frozen=True)
class Sentences:
    """Sentences of tokens, one after the other.

    Attributes
    ----------
    tokens
        int32, ``(N,)``, on a device. Each sentence ends with :data:`EOS`.
    starts
        int64, ``(sentences + 1,)``: where each begins, and the end of the last.
    """

    tokens: Tensor
    starts: Array

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> Array:
        """Number of tokens of each sentence, ``<eos>`` included."""
        return np.diff(self.starts)

    def padded(self, index: Array) -> Tensor:
        """Some of the sentences, side by side: int64 ``(len(index), longest)``, filled up with :data:`PAD`.

        The width is known on the CPU, so that nothing is read back from the device.
        """
        lengths = self.lengths[index]
        column = np.arange(lengths.max())
        missing = column >= lengths[:, None]
        place = np.where(missing, 0, self.starts[index, None] + column)
        tokens = self.tokens[torch.from_numpy(place).to(self.tokens.device)].long()
        return tokens.masked_fill_(torch.from_numpy(missing).to(tokens.device), PAD)

    def first(self, count: int | None) -> Sentences:
        """The sentences from the beginning on; ``None``: all."""
        starts = self.starts if count is None else self.starts[: count + 1]
        return Sentences(self.tokens[: starts[-1]], starts)

    def to(self, device: torch.device | str) -> Sentences:
        """The same on a device."""
        return Sentences(self.tokens.to(device), self.starts)


def learn(row: Pairs, train: Part) -> Tokenizer:
    """Learn a vocabulary of ``row.vocabulary`` tokens from both sides of the training part.

    Raises:
        DataError: if there is too little text for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # A word at the beginning of a sentence is the same as one within: both have a space before them.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=row.vocabulary,
        special_tokens=[*SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for side in train for line in side), trainer)
    if tokenizer.get_vocab_size() != row.vocabulary:
        raise DataError(
            f"the training part of {row.title} gives {tokenizer.get_vocab_size()} tokens instead of {row.vocabulary}: "
            "it is too small to be the whole"
        )
    return tokenizer


def tokenized(tokenizer: Tokenizer, lines: Sequence[str]) -> Sentences:
    """Write sentences in tokens, on the CPU."""
    pieces: list[Array] = []
    for k in range(0, len(lines), 10_000):  # the library's objects need far more memory than their numbers
        encodings = tokenizer.encode_batch_fast([*lines[k : k + 10_000]], add_special_tokens=False)
        pieces += [np.array([*encoding.ids, EOS], np.int32) for encoding in encodings]
    starts = np.cumsum([0, *map(len, pieces)])
    return Sentences(torch.from_numpy(np.concatenate(pieces)), starts)


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

PAIRS: Final[dict[str, Pairs]] = {
    "numbers": Pairs(
        title="numbers in words, German to English",  # the other way each would be one word, and BLEU counts four
        vocabulary=320,
        files=tuple(File(f"{name}.py", "", package="num2words") for name in ("base", "lang_EU", "lang_DE", "lang_EN")),
        parse=number_words,
    ),
    "multi30k": Pairs(
        title="Multi30k, English to German",
        vocabulary=2000,
        files=tuple(
            File(name, f"sha256:{content}", url=f"{_ADDRESS}{name}.gz", download=f"md5:{compressed}")
            for name, (compressed, content) in _MULTI30K.items()
        ),
    ),
    "wmt14-en-de": Pairs(
        title="WMT14, English to German",
        vocabulary=32_768,
        files=tuple(File(name, "") for name in _SIDES),
        source="https://www.statmt.org/wmt14/translation-task.html (as plain text, a sentence a line, not tokenized)",
    ),
}
