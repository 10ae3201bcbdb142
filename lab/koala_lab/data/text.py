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
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np

from koala_lab.data.formats import Array, Contents, reading
from koala_lab.data.registry import File

UNKNOWN, BEGIN, END_OF_LINE = "<unk>", "<bos>", "<eos>"


def pydoc_topics(raw: bytes) -> str:
    """The help texts in the source of ``pydoc_data.topics``, every paragraph once.

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
class Text:
    """A row of the registry of texts.

    Attributes
    ----------
    title
        Name to print.
    unit
        What a token is: ``"character"``, or ``"word"``: what stands between spaces, and ``<eos>`` at the end of a line.
    files
        One or more files, see the head of this module.
    min_count
        Words that the training part has less often are ``<unk>``.
    sentences
        Whether each line is a sentence by itself: it begins with ``<bos>``, and empty lines are left out.
    by_frequency
        Whether tokens are numbered from the most frequent of the training part on, as an adaptive softmax needs it, and
        equally frequent ones in the order of the alphabet, as all others.
    archive
        A tar archive that holds all files; where these have no checksums of their own, only the archive will do.
    folders
        Where the files lie below a data folder, beside the folder itself and one with the text's name.
    decode
        From the bytes of a file to its text.
    """

    title: str
    unit: str
    files: tuple[File, ...]
    min_count: int = 1
    sentences: bool = False
    by_frequency: bool = False
    archive: File | None = None
    folders: tuple[str, ...] = ()
    decode: Callable[[bytes], str] = _utf8
    source: ClassVar[str] = ""  # texts are files that anybody may download
    loader: ClassVar[str] = "is a text; load it with load_text"


def encode(row: Text, contents: Contents) -> tuple[list[Array], tuple[str, ...]]:
    """Read, cut and number the tokens of a text.

    Tokens are numbers as soon as they are read, and it takes 8 bytes for each at most, beside the file that is read.

    Args:
        row: what the text is.
        contents: its files, in the registry's order; those of an archive in any order.

    Returns
    -------
    tuple
        Training, validation and test part, int32 ``(N,)``; and the vocabulary, sorted, with ``<unk>`` where it is
        needed.

    Raises
    ------
    DataError
        If a file cannot be decoded, or is too short to be cut.
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
    """Training, validation and test part, each in one piece or more."""
    if len(streams) > 2:
        return [streams[:-2], streams[-2:-1], streams[-1:]]
    first = streams[0]
    cuts = [0.9, 0.95] if len(streams) == 1 else [0.9]
    at = [0, *(round(cut * len(first)) for cut in cuts), len(first)]
    return [[first[a:b]] for a, b in pairwise(at)] + [streams[1:]] * (len(streams) - 1)


def _vocabulary(row: Text, counts: dict[str, int]) -> tuple[str, ...]:
    """The known tokens in their final order, from how often the training part has each token of the whole text."""
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

TEXTS: Final[dict[str, Text]] = {
    "pydoc-topics": Text(title="Python's help texts", unit="character", files=(_TOPICS,), decode=pydoc_topics),
    "tinyshakespeare": Text(title="tiny Shakespeare", unit="character", files=_SHAKESPEARE),
    "wikitext-2": Text(title="WikiText-2", unit="word", files=_WIKITEXT2),
    "wikitext-2-valid": Text(
        title="WikiText-2, trained on its validation text",
        unit="word",
        files=_WIKITEXT2[1:],
        min_count=10,  # ours, for runs on a CPU: 2400 words instead of 13 000
        folders=("wikitext-2",),
    ),
    # Chelba et al., arXiv 1312.3005. Words that occur less than three times are unknown. The first of the fifty parts
    # of the held-out text is the usual test text; which is for validation nobody says: here the second, as large.
    "one-billion-words": Text(
        title="One Billion Words",
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
}
