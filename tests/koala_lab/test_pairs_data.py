"""Pairs of sentences: parts, tokens, checksums, what a missing or damaged file says. Small files are made here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from koala_lab import data
from koala_lab.data import DATASETS, Pairs, source
from koala_lab.data.pairs import EOS, PAD, SPECIAL, Sentences, learn, parallel_lines, tokenized

ENGLISH, GERMAN = "a cat sits\na dog runs\n", "eine Katze sitzt\nein Hund läuft\n"
SMALL = Pairs(name="made-here", title="made here", vocabulary=262, files=())


def parts_of(*texts: str | bytes) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    raw = (text.encode() if isinstance(text, str) else text for text in texts)
    return parallel_lines(iter([(f"{i}.txt", content) for i, content in enumerate(raw)]))


# --- lines ------------------------------------------------------------------------------------------------------------


def test_files_are_read_in_pairs() -> None:
    parts = parts_of(ENGLISH, GERMAN, "one\n", "eins\n", "two", "zwei")
    assert parts == [
        (("a cat sits", "a dog runs"), ("eine Katze sitzt", "ein Hund läuft")),
        (("one",), ("eins",)),
        (("two",), ("zwei",)),
    ]


def test_only_a_line_feed_ends_a_line() -> None:
    [(source, target)] = parts_of("one\u2028more \x0b\r\ntwo\n", "eins\u0085mehr\nzwei\n")
    assert source == ("one\u2028more", "two")
    assert target == ("eins\u0085mehr", "zwei")


def test_empty_lines_are_left_out_of_the_training_part_only() -> None:
    train, validation = parts_of("a\n\nb\nc\n", "A\nX\n \nC\n", "a\n\n", "\nB\n")
    assert train == (("a", "c"), ("A", "C"))
    assert validation == (("a", ""), ("", "B"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("a\nb\n", "A\n"), "1.txt has 1 lines for the 2 lines of 0.txt"),
        (("", ""), "0.txt and 1.txt hold no pair of sentences"),
        (("a\n", "\n"), "0.txt and 1.txt hold no pair of sentences"),
        (("a\n", "A\n", "", ""), "2.txt and 3.txt hold no pair of sentences"),
        (("a\n", b"\xff\xfe"), "1.txt cannot be read.*utf-8"),
    ],
)
def test_damage_is_named(texts: tuple[str | bytes, ...], message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        parts_of(*texts)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_vocabulary_begins_with_the_special_tokens_and_has_all_bytes() -> None:
    tokenizer = learn(SMALL, parts_of(ENGLISH, GERMAN)[0])
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [PAD, EOS]
    assert tokenizer.get_vocab_size() == 262
    [sentence] = tokenizer.encode_batch(["a cat"])
    assert len(sentence.ids) < len("a cat") + 1, "nothing was merged"


def test_a_vocabulary_that_is_too_large_is_refused() -> None:
    with pytest.raises(data.DataError, match=r"the training part of made here gives \d+ tokens instead of 3000"):
        learn(dataclasses.replace(SMALL, vocabulary=3000), parts_of(ENGLISH, GERMAN)[0])


TOKENIZER = learn(SMALL, parts_of(ENGLISH, GERMAN)[0])


@given(st.lists(st.text().filter(lambda text: not any(token in text for token in SPECIAL)), min_size=1, max_size=4))
def test_every_text_comes_back(lines: list[str]) -> None:
    lines = [line.strip().encode(errors="ignore").decode() for line in lines]
    sentences = tokenized(TOKENIZER, lines)
    assert len(sentences) == len(lines)
    for i, line in enumerate(lines):
        [tokens] = sentences.padded(np.array([i])).tolist()
        assert tokens[-1] == EOS
        assert EOS not in tokens[:-1]
        assert TOKENIZER.decode(tokens[:-1]).strip() == line.strip()


def test_sentences_side_by_side() -> None:
    sentences = Sentences(torch.tensor([7, 8, EOS, EOS, 9, EOS], dtype=torch.int32), np.array([0, 3, 4, 6]))
    assert sentences.lengths.tolist() == [3, 1, 2]
    assert sentences.padded(np.array([2, 0])).tolist() == [[9, EOS, PAD], [7, 8, EOS]]
    assert sentences.padded(np.array([1])).tolist() == [[EOS]]
    assert sentences.padded(np.array([1])).dtype == torch.int64
    assert (len(sentences.first(2)), len(sentences.first(None)), len(sentences.first(9))) == (2, 3, 3)
    assert sentences.first(2).padded(np.array([0, 1])).tolist() == [[7, 8, EOS], [EOS, PAD, PAD]]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_are_words_of_num2words_and_no_number_is_in_two_parts() -> None:
    from num2words import num2words

    parts = DATASETS["numbers"].parse(iter([]))
    assert [len(source) for source, _ in parts] == [len(target) for _, target in parts] == [3000, 500, 500]
    value = {num2words(n): n for n in range(10_000)}
    numbers = [value[english] for _, target in parts for english in target]
    assert len(set(numbers)) == len(numbers) == 4000
    german = [line for source, _ in parts for line in source]
    assert german == [num2words(n, lang="de") for n in numbers]
    for part in (numbers[:3000], numbers[3000:3500], numbers[3500:]):
        assert 4300 < sum(part) / len(part) < 5700, "no part has the small or the large ones"


def test_tokens_are_the_same_in_every_process(folder: Path) -> None:
    code = (
        "import hashlib, sys; from koala_lab import data; pairs = data.load('numbers');"
        "print(hashlib.sha256(pairs.train[0].tokens.numpy().tobytes() + pairs.test[1].tokens.numpy().tobytes())"
        ".hexdigest(), pairs.identity)"
    )
    environments = [
        {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "3"},
    ]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | change, capture_output=True, text=True, check=True
        ).stdout
        for change in environments
    }
    assert len(printed) == 1


def test_each_version_of_num2words_has_its_own_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = data.identity("numbers")
    assert here == data.load("numbers").identity
    (folder / "lang.py").write_text("another version")
    monkeypatch.setattr(source, "shipped", lambda file: folder / "lang.py")
    assert data.identity("numbers") != here


def test_train_size_takes_the_beginning_and_leaves_the_rest(folder: Path) -> None:
    whole, short = data.load("numbers"), data.load("numbers", train_size=7)
    for side in (0, 1):
        assert len(short.train[side]) == 7
        index = np.arange(7)
        assert torch.equal(short.train[side].padded(index), whole.train[side].padded(index))
        assert torch.equal(short.test[side].tokens, whole.test[side].tokens)
    assert short.identity == whole.identity
    for size in (0, -1, 3001):
        with pytest.raises(ValueError, match=f"train_size must be between 1 and 3000.*{size}"):
            data.load("numbers", train_size=size)


# --- files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make six small files; where checksums are published, make theirs the published ones."""
    published = []
    for i, file in enumerate(DATASETS[name].files):
        raw = (GERMAN if i % 2 else ENGLISH).encode() * (1 + i // 2)
        (folder / file.name).write_bytes(raw)
        published.append(file if not file.digest else dataclasses.replace(file, digest=_sha256(raw)))
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], files=tuple(published), vocabulary=262))


def _sha256(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


@pytest.mark.parametrize("name", ["multi30k", "wmt14-en-de"])
def test_six_files_are_three_parts_in_two_languages(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).mkdir()
    write(folder / name, monkeypatch, name)
    pairs = data.load(name)
    assert [len(part[0]) for part in (pairs.train, pairs.validation, pairs.test)] == [2, 4, 6]
    assert pairs.test_lines == (("a cat sits", "a dog runs") * 3, ("eine Katze sitzt", "ein Hund läuft") * 3)
    [tokens] = pairs.train[1].padded(np.array([1])).tolist()
    assert pairs.tokenizer.decode(tokens).strip() == "ein Hund läuft"
    assert (pairs.tag, pairs.identity) == ("", data.identity(name))
    assert "English to German" in pairs.title


def test_a_changed_file_of_multi30k_is_refused_and_of_wmt14_has_another_identity(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {}
    for name, file in (("multi30k", "val.de"), ("wmt14-en-de", "newstest2013.de")):
        (folder / name).mkdir()
        write(folder / name, monkeypatch, name)
        before[name] = data.load(name).identity
        path = folder / name / file
        path.write_bytes(path.read_bytes().replace(b"Katze", b"Kater", 1))
    assert data.load("wmt14-en-de").identity != before["wmt14-en-de"]
    with pytest.raises(data.DataError, match=r"val.de is not the published file of Multi30k.*--allow-unverified-data"):
        data.load("multi30k")
    assert data.load("multi30k", allow_unverified=True).tag.startswith("unverified: content ")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("multi30k", ("train.en", "test_2016_flickr.de", "`koala data multi30k`")),
        ("wmt14-en-de", ("train.en", "statmt")),
    ],
)
def test_missing_files_say_what_to_do(folder: Path, name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load(name)
    for part in (DATASETS[name].title, str(folder), "KOALA_DATA", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identities_never_change(folder: Path) -> None:
    # Part of the keys of stored runs; the others have that of the files or the version of num2words that are there.
    assert data.identity("multi30k")[:12] == "bb5dda6ca1b5"


def test_the_published_multi30k() -> None:
    if data.DATASETS["multi30k"].find() is None:
        pytest.skip("no copy of multi30k in KOALA_DATA")
    pairs = data.load("multi30k")
    assert [len(part[1]) for part in (pairs.train, pairs.validation, pairs.test)] == [29_000, 1014, 1000]
    # The identity does not tell how the text is cut into tokens: this does.
    digest = hashlib.sha256(pairs.train[1].tokens.numpy().tobytes() + pairs.test[0].tokens.numpy().tobytes())
    assert (pairs.tokenizer.get_vocab_size(), digest.hexdigest()[:12]) == (2000, "ba0db7189081")
