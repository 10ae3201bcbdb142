"""Texts for language models: what they are, how they become tokens, and where they are split.

A text in one file is cut into 90 % for training, 5 % for validation and 5 % for testing, in this order; of two files
the second is the test text, and the last tenth of the first is for validation; three files are the three parts. The
vocabulary is that of the whole training part, so that it does not depend on ``train_size``; all other tokens are
``<unk>``.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np

from koala_lib.data.formats import Array, Contents, reading
from koala_lib.data.registry import File

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"


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
        One to three files, see the head of this module.
    min_count
        Words that the training part has less often are ``<unk>``.
    folders
        Where the files lie below a data folder, beside the folder itself and one with the text's name.
    decode
        From the bytes of a file to its text.
    """

    title: str
    unit: str
    files: tuple[File, ...]
    min_count: int = 1
    folders: tuple[str, ...] = ()
    decode: Callable[[bytes], str] = _utf8
    archive: ClassVar[File | None] = None  # texts are plain files that anybody may download
    source: ClassVar[str] = ""
    loader: ClassVar[str] = "is a text; load it with load_text"


def encode(row: Text, contents: Contents) -> tuple[list[Array], tuple[str, ...]]:
    """Read, cut and number the tokens of a text.

    Returns
    -------
    tuple
        Training, validation and test part, int64 ``(N,)``; and the vocabulary, sorted, with ``<unk>`` where it is
        needed.

    Raises
    ------
    DataError
        If a file cannot be decoded, or is too short to be cut.
    """
    streams: list[list[str]] = []
    for name, raw in contents:
        with reading(name):
            streams.append(_tokens(row.decode(raw), row.unit))
            if len(streams[-1]) < 40:
                raise ValueError(f"it holds {len(streams[-1])} {row.unit}s, too few for training and test")
    parts = _parts(streams)
    counts = Counter(parts[0])
    known = {token for token, count in counts.items() if count >= row.min_count}
    if any(token not in known for part in parts for token in part):
        known.add(UNKNOWN)
    vocabulary = tuple(sorted(known))
    number = {token: i for i, token in enumerate(vocabulary)}
    unknown = number.get(UNKNOWN, -1)
    return [_numbers(part, number, unknown) for part in parts], vocabulary


def _tokens(text: str, unit: str) -> list[str]:
    if unit == "character":
        return list(text)
    return [token for line in text.splitlines() for token in (*line.split(), END_OF_LINE)]


def _parts(streams: list[list[str]]) -> list[list[str]]:
    if len(streams) == 3:
        return streams
    first = streams[0]
    cuts = [0.9, 0.95] if len(streams) == 1 else [0.9]
    at = [0, *(round(cut * len(first)) for cut in cuts), len(first)]
    return [first[a:b] for a, b in pairwise(at)] + streams[1:]


def _numbers(tokens: Iterable[str], number: dict[str, int], unknown: int) -> Array:
    return np.fromiter((number.get(token, unknown) for token in tokens), np.int64)


# Checksums: of tinyshakespeare and of WikiText-2's three files as a number of public projects list them; our copies of
# tinyshakespeare, valid.txt and test.txt have them. topics.py differs between versions of Python: it is whatever this
# Python has, and the checksum of its content is part of the key of a run.
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
}
