"""Pairs of sentences for translation: where they come from, and how they become tokens.

Both languages share one vocabulary of pieces of words: byte-pair encoding (Sennrich et al., ACL 2016) of the bytes of
the text, learned by Hugging Face's ``tokenizers`` from the whole training part, so that it does not depend on
``train_size``. Every text can be written in it, and comes back from it unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
from torch import Tensor

from koala_lab.data.formats import Array, Contents, DataError, reading
from koala_lab.data.source import Copy, Data, Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL: Final = ("<pad>", "<eos>")
PAD, EOS = range(2)  # their numbers in every vocabulary: no token, and the end of a sentence

Lines = tuple[str, ...]
Part = tuple[Lines, Lines]  # source and target sentences
NUMBERS: Final = 10_000  # numbers below it, of which so many are for:
NUMBERS_TRAIN, NUMBERS_TEST = 3000, 500


def parallel_lines(contents: Contents) -> list[Part]:
    """Read pairs of plain text files, source and target, a sentence per line.

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


@dataclass(frozen=True)
class Sentences:
    """Sentences of tokens, one after the other.

    Attributes:
        tokens: int32, ``(N,)``, on a device. Each sentence ends with :data:`EOS`.
        starts: int64, ``(sentences + 1,)``: where each begins, and the end of the last.
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
        """Return some of the sentences, side by side: int64 ``(len(index), longest)``, filled up with :data:`PAD`.

        The width is known on the CPU, so that nothing is read back from the device.
        """
        lengths = self.lengths[index]
        column = np.arange(lengths.max())
        missing = column >= lengths[:, None]
        place = np.where(missing, 0, self.starts[index, None] + column)
        tokens = self.tokens[torch.from_numpy(place).to(self.tokens.device)].long()
        return tokens.masked_fill_(torch.from_numpy(missing).to(tokens.device), PAD)

    def first(self, count: int | None) -> Sentences:
        """Return the sentences from the beginning on; ``None``: all."""
        starts = self.starts if count is None else self.starts[: count + 1]
        return Sentences(self.tokens[: starts[-1]], starts)

    def to(self, device: torch.device | str) -> Sentences:
        """Return the same on a device."""
        return Sentences(self.tokens.to(device), self.starts)


@dataclass(frozen=True, kw_only=True)
class PairData(Data):
    """Pairs of sentences on a device.

    Attributes:
        train: Source and target sentences.
        validation: As ``train``.
        test: As ``train``.
        test_lines: Source and target of the test part as text.
        tokenizer: From text to tokens and back.
    """

    train: tuple[Sentences, Sentences]
    validation: tuple[Sentences, Sentences]
    test: tuple[Sentences, Sentences]
    test_lines: Part
    tokenizer: Tokenizer

    @property
    def size(self) -> int:
        """Number of training pairs."""
        return len(self.train[0])

    def first(self, train_size: int) -> Self:
        """Return the same with the beginning of the training part."""
        source, target = self.train
        return replace(self, train=(source.first(train_size), target.first(train_size)))

    def to(self, device: torch.device | str) -> Self:
        """Return the same on a device."""
        train, validation, test = (
            (source.to(device), target.to(device)) for source, target in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


@dataclass(frozen=True, kw_only=True)
class Pairs(Source):
    """A row of parallel text: source and target of the training, validation and test part, in this order.

    Attributes:
        vocabulary: Number of tokens.
        parse: Reads the files, in their order.
    """

    vocabulary: int
    parse: Callable[[Contents], list[Part]] = parallel_lines

    def read(self, copy: Copy) -> PairData:
        """Read the lines, learn the vocabulary and write all sentences in tokens."""
        parts = self.parse(self.contents(copy))
        tokenizer = learn(self, parts[0])
        train, validation, test = (
            (tokenized(tokenizer, source), tokenized(tokenizer, target)) for source, target in parts
        )
        return PairData(
            train=train,
            validation=validation,
            test=test,
            test_lines=parts[-1],
            tokenizer=tokenizer,
            **self.origin(copy),
        )


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
