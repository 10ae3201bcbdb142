"""Texts for language models: what they are, how they become tokens, and where they are split.

A text in one file is cut into 90 % for training, 5 % for validation and 5 % for testing, in this order; of two files
the second is the test text, and the last tenth of the first is for validation; of three files and more the last two are
for validation and testing. The vocabulary is that of the whole training part, so that it does not depend on
``train_size``; all other tokens are ``<unk>``.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor

from koala_lab.data.formats import Array, Contents, reading
from koala_lab.data.source import Copy, Data, Source

UNKNOWN, BEGIN, END_OF_LINE = "<unk>", "<bos>", "<eos>"


def pydoc_topics(raw: bytes) -> str:
    """Return the help texts in the source of ``pydoc_data.topics``, every paragraph once.

    Long topics quote short ones, and what is both in the training and in the test text would be easy to predict. The
    topics stand in the order of the SHA-256 of their names, so that neighbours of the alphabet are spread.
    """
    topics: dict[str, str] = {}
    try:
        body = ast.parse(raw).body
    except SyntaxError as error:
        raise ValueError("it is no Python source") from error
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics":
            topics = ast.literal_eval(node.value)
    if not topics:
        raise ValueError("it assigns no topics")
    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    paragraphs = (p.strip("\n") for name in order for p in topics[name].split("\n\n"))
    return "\n\n".join(p for p in dict.fromkeys(paragraphs) if p)


def _utf8(raw: bytes) -> str:
    return raw.decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class TextData(Data):
    """A text on a device.

    Attributes:
        train: Tokens, int32, ``(N,)``, in the order of the text.
        validation: As ``train``.
        test: As ``train``.
        vocabulary: The tokens by number.
        unit: ``"character"`` or ``"word"``.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    unit: str

    @property
    def size(self) -> int:
        """Number of training tokens."""
        return len(self.train)

    def first(self, train_size: int) -> Self:
        """Return the same with the beginning of the training part."""
        return replace(self, train=self.train[:train_size])

    def to(self, device: torch.device | str) -> Self:
        """Return the same on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in ("train", "validation", "test")})


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """A row of text, in one or more files; see the head of this module.

    Attributes:
        unit: What a token is: ``"character"``, or ``"word"``: what stands between spaces, and ``<eos>`` at the end of a
            line.
        min_count: Words that the training part has less often are ``<unk>``.
        sentences: Whether each line is a sentence by itself: it begins with ``<bos>``, and empty lines are left out.
        by_frequency: Whether tokens are numbered from the most frequent of the training part on, as an adaptive softmax
            needs it, and equally frequent ones in the order of the alphabet, as all others.
        decode: From the bytes of a file to its text.
    """

    unit: str
    min_count: int = 1
    sentences: bool = False
    by_frequency: bool = False
    decode: Callable[[bytes], str] = _utf8

    def read(self, copy: Copy) -> TextData:
        """Read, cut and number the tokens."""
        parts, vocabulary = encode(self, self.contents(copy, in_order=False))
        train, validation, test = map(torch.from_numpy, parts)
        return TextData(
            train=train,
            validation=validation,
            test=test,
            vocabulary=vocabulary,
            unit=self.unit,
            **self.origin(copy),
        )


def encode(row: Text, contents: Contents) -> tuple[list[Array], tuple[str, ...]]:
    """Read, cut and number the tokens of a text.

    Tokens are numbers as soon as they are read, and it takes 8 bytes for each at most, beside the file that is read.

    Args:
        row: What the text is.
        contents: Its files, in the registry's order; those of an archive in any order.

    Returns:
        Training, validation and test part, int32 ``(N,)``; and the vocabulary, sorted, with ``<unk>`` where it is
        needed.

    Raises:
        DataError: If a file cannot be decoded, or is too short to be cut.
    """
    first_seen: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    streams: dict[str, Array] = {}
    for name, raw in contents:
        with reading(name):
            tokens = _tokens(row, row.decode(raw))
            streams[name] = stream = np.fromiter(map(first_seen.__getitem__, tokens), np.int32)
            if len(stream) < 40:
                raise ValueError(f"it holds {len(stream)} {row.unit}s, too few for training and test")
    order = {file.name: i for i, file in enumerate(row.files)} if row.archive else {}
    parts = _parts([streams[name] for name in sorted(streams, key=lambda n: order.get(n.rsplit("/", 1)[-1], 0))])
    counts = np.zeros(len(first_seen), np.int64)
    for piece in parts[0]:
        counts += np.bincount(piece, minlength=len(counts))
    vocabulary = _vocabulary(row, dict(zip(first_seen, counts.tolist(), strict=True)))
    number = {token: i for i, token in enumerate(vocabulary)}
    unknown = number.get(UNKNOWN, -1)
    final = np.fromiter((number.get(token, unknown) for token in first_seen), np.int32)
    return [_renumbered(pieces, final) for pieces in parts], vocabulary


def _tokens(row: Text, text: str) -> Iterator[str]:
    if row.unit == "character":
        return iter(text)
    if row.sentences:  # not splitlines(): U+2028 and its like stand within a line
        sentences = (line.split() for line in text.split("\n"))
        return (token for words in sentences if words for token in (BEGIN, *words, END_OF_LINE))
    return (token for line in text.splitlines() for token in (*line.split(), END_OF_LINE))


def _parts(streams: list[Array]) -> list[list[Array]]:
    """Return training, validation and test part, each in one piece or more."""
    if len(streams) > 2:
        return [streams[:-2], streams[-2:-1], streams[-1:]]
    first = streams[0]
    cuts = [0.9, 0.95] if len(streams) == 1 else [0.9]
    at = [0, *(round(cut * len(first)) for cut in cuts), len(first)]
    return [[first[a:b]] for a, b in pairwise(at)] + [streams[1:]] * (len(streams) - 1)


def _vocabulary(row: Text, counts: dict[str, int]) -> tuple[str, ...]:
    """Return the known tokens in their final order, from their counts in the training part."""
    known = {token: count for token, count in counts.items() if count >= row.min_count}
    if len(known) < len(counts):
        known[UNKNOWN] = known.get(UNKNOWN, 0) + sum(counts.values()) - sum(known.values())
    return tuple(sorted(known, key=lambda token: (-known[token] if row.by_frequency else 0, token)))


def _renumbered(pieces: list[Array], final: Array) -> Array:
    whole, end = np.empty(sum(map(len, pieces)), np.int32), 0
    for piece in pieces:  # one by one: all of a large text at once would be in memory three times
        start, end = end, end + len(piece)
        whole[start:end] = final[piece]
    return whole
