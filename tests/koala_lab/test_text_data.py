"""Texts: tokens, splits, vocabulary, checksums, what a missing or damaged file says. All files are made here."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import tarfile
from pathlib import Path

import pytest
import torch

from koala_lab import data, paths
from koala_lab.config import RunConfig
from koala_lab.data import DATASETS, File, Text, source
from koala_lab.data.text import encode, pydoc_topics
from koala_lab.runs.training import train

LINES = "the cat sat\n\nthe dog ran far\n"
CHARACTERS = Text(name="made-here", title="made here", unit="character", files=())
WORDS = Text(name="made-here", title="made here", unit="word", files=())


def encoded(row: Text, *texts: str) -> tuple[list[list[str]], tuple[str, ...]]:
    """The parts as tokens again, and the vocabulary."""
    parts, vocabulary = encode(row, iter([(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]))
    return [[vocabulary[i] for i in part] for part in parts], vocabulary


# --- tokens and parts -------------------------------------------------------------------------------------------------


def test_one_file_is_cut_into_ninety_five_and_five_percent() -> None:
    text = "".join(chr(97 + i * i % 7) for i in range(200))
    (train, validation, test), vocabulary = encoded(CHARACTERS, text)
    assert [len(train), len(validation), len(test)] == [180, 10, 10]
    assert "".join(train + validation + test) == text
    assert vocabulary == tuple(sorted(set(text)))


def test_of_two_files_the_second_is_the_test_text() -> None:
    first, second = "ab" * 50, "ba" * 25
    (train, validation, test), _ = encoded(CHARACTERS, first, second)
    assert ("".join(train), "".join(validation), "".join(test)) == (first[:90], first[90:], second)


def test_three_files_are_the_three_parts() -> None:
    texts = ["ab" * 30, "aab" * 20, "abb" * 20]
    parts, _ = encoded(CHARACTERS, *texts)
    assert ["".join(part) for part in parts] == texts


def test_words_end_at_spaces_and_lines_in_eos() -> None:
    (train, _, _), vocabulary = encoded(WORDS, LINES * 5, LINES * 5, LINES * 5)
    assert train[:10] == ["the", "cat", "sat", "<eos>", "<eos>", "the", "dog", "ran", "far", "<eos>"]
    assert vocabulary == ("<eos>", "cat", "dog", "far", "ran", "sat", "the")


def test_what_the_training_part_does_not_have_or_has_rarely_is_unknown() -> None:
    rare = dataclasses.replace(WORDS, min_count=3)
    train = "a a a b b c c c " + "a " * 40
    (got, _, test), vocabulary = encoded(rare, train, "a " * 40, "a b c d " * 10)
    assert vocabulary == ("<unk>", "a", "c")  # one end of a line is too few
    assert got[:8] == ["a", "a", "a", "<unk>", "<unk>", "c", "c", "c"]
    assert test[:4] == ["a", "<unk>", "c", "<unk>"]


def test_a_text_without_unknown_tokens_has_no_token_for_them() -> None:
    assert "<unk>" not in encoded(CHARACTERS, "ab" * 100)[1]
    assert "<unk>" in encoded(CHARACTERS, "ab" * 100 + "c")[1], "c is in the test part only"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff\xfe" * 100, "0.txt cannot be read.*utf-8"),
        (b"too short", "0.txt cannot be read: it holds 9 characters"),
        (b"", "it holds 0 characters"),
    ],
)
def test_damage_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        encode(CHARACTERS, iter([("0.txt", raw)]))


# --- the help texts of Python -----------------------------------------------------------------------------------------


def test_pydoc_topics_are_the_librarys_paragraphs_each_once(folder: Path) -> None:
    from pydoc_data.topics import topics

    loaded = data.load("pydoc-topics")
    text = "".join(loaded.vocabulary[i] for i in torch.cat([loaded.train, loaded.validation, loaded.test]).tolist())
    have = {p.strip("\n") for topic in topics.values() for p in topic.split("\n\n")} - {""}
    parts = text.replace("<unk>", "?").split("\n\n")
    assert len(parts) == len(set(parts)) == len(have)
    assert len(set(parts) - have) <= text.count("<unk>")
    assert len(text) > 200_000
    assert loaded.unit == "character"
    assert loaded.tag == ""
    assert 50 < len(loaded.vocabulary) < 200


def test_topics_are_read_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAN", raising=False)
    source = "import os\nos.environ['RAN'] = 'yes'\ntopics = {'a': 'one\\n\\ntwo', 'b': 'two\\n\\n\\nthree'}\n"
    paragraphs = pydoc_topics(source.encode()).split("\n\n")
    assert sorted(paragraphs) == ["one", "three", "two"]
    assert "RAN" not in os.environ


@pytest.mark.parametrize("source", [b"topics = {}", b"x = 1", b"topics = open('x')", b"topics = {"])
def test_another_python_module_is_refused(source: bytes) -> None:
    row = dataclasses.replace(DATASETS["pydoc-topics"], files=())
    with pytest.raises(data.DataError, match=r"topics\.py cannot be read"):
        encode(row, iter([("topics.py", source)]))


def test_each_version_of_the_help_texts_has_its_own_identity(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = data.identity("pydoc-topics")
    assert here == data.load("pydoc-topics").identity
    other = tmp_path / "topics.py"
    other.write_text("topics = " + repr({"a": "\n\n".join(f"paragraph {i}" for i in range(50))}))
    monkeypatch.setattr(source, "shipped", lambda file: other)
    changed = data.identity("pydoc-topics")
    assert changed == data.load("pydoc-topics").identity != here
    assert data.load("pydoc-topics").tag == "", "no version is less official than another"
    assert len(data.load("pydoc-topics").train) < 1000, "the other file was read"


# --- loading ----------------------------------------------------------------------------------------------------------


def test_train_size_takes_the_beginning_and_leaves_the_rest(folder: Path) -> None:
    whole, short = data.load("pydoc-topics"), data.load("pydoc-topics", train_size=1000)
    assert torch.equal(short.train, whole.train[:1000])
    assert torch.equal(short.test, whole.test)
    assert torch.equal(short.validation, whole.validation)
    assert short.vocabulary == whole.vocabulary
    assert short.identity == whole.identity
    assert whole.train.dtype == torch.int32
    for size in (0, -1, len(whole.train) + 1):
        with pytest.raises(ValueError, match=rf"train_size must be between 1 and {len(whole.train)}.*{size}"):
            data.load("pydoc-topics", train_size=size)


def test_texts_and_images_are_not_mixed_up(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'shakespeare'.*did you mean 'tinyshakespeare'"):
        data.load("shakespeare")
    for task, other in (("classification", "pydoc-topics"), ("language_model", "digits"), ("gan", "imagenet")):
        with pytest.raises(ValueError, match=f"dataset '{other}' is unknown; known are .* of task '{task}'"):
            RunConfig(task=task, dataset=other, model="resnet8", optimizer="sgd", epochs=1)


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, **contents: str) -> None:
    """Make files of a text, and their checksums the published ones."""
    published = []
    for file in DATASETS[name].files:
        raw = contents[file.name.split(".")[0]].encode()
        (folder / file.name).write_bytes(raw)
        published.append(dataclasses.replace(file, digest=f"sha256:{hashlib.sha256(raw).hexdigest()}"))
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], files=tuple(published)))


def test_wikitext2_trained_on_its_validation_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "wikitext-2").mkdir()
    words = dict(valid=" = Title = \n" + "the cat <unk>\n" * 60, test="the dog sat\n" * 20)
    write(folder / "wikitext-2", monkeypatch, "wikitext-2-valid", **words)
    loaded = data.load("wikitext-2-valid")
    assert "validation text" in loaded.title
    assert loaded.vocabulary == ("<eos>", "<unk>", "cat", "the")  # "=" and "Title" occur less than ten times
    assert [loaded.vocabulary[i] for i in loaded.test[:4]] == ["the", "<unk>", "<unk>", "<eos>"]
    assert len(loaded.train) + len(loaded.validation) == 4 + 60 * 4
    assert loaded.identity == data.identity("wikitext-2-valid")


def test_a_changed_file_is_refused_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, monkeypatch, "tinyshakespeare", tinyshakespeare="To be, or not to be. " * 20)
    published = data.load("tinyshakespeare").identity
    file = folder / "tinyshakespeare.txt"
    file.write_bytes(file.read_bytes().replace(b"not", b"now", 1))
    with pytest.raises(data.DataError) as caught:
        data.load("tinyshakespeare")
    for part in (str(file), "is not the published file", "--allow-unverified-data"):
        assert part in str(caught.value)
    allowed = data.load("tinyshakespeare", allow_unverified=True)
    assert allowed.tag.startswith("unverified: content ")
    assert allowed.identity == data.identity("tinyshakespeare", allow_unverified=True) != published


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tinyshakespeare", "tinyshakespeare.txt"),
        ("wikitext-2", "train.txt"),
        ("wikitext-2-valid", "valid.txt"),
        ("one-billion-words", "1-billion-word-language-modeling-benchmark-r13output.tar.gz"),
    ],
)
def test_missing_texts_say_what_to_do(folder: Path, name: str, file: str) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load(name)
    for part in (DATASETS[name].title, str(folder), file, "KOALA_DATA", f"koala data {name}"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- One Billion Words ------------------------------------------------------------------------------------------------

BILLION = DATASETS["one-billion-words"]
SHARDS = {f"training/news.en-{i:05}-of-00100": f"shard number{i} . \n" + "the cat sat . \n" * 8 for i in range(1, 100)}
SHARDS["training/news.en-00007-of-00100"] += "rare rare\n\nthrice thrice thrice dogs\u2028dogs\n  \n"
HELD_OUT = {f"heldout/news.en.heldout-{i:05}-of-00050": f"held cat {i} .\n" * 8 for i in range(3)}
# The real archive is in no order, and its folder of held-out text also has all the fifty parts in one file.
MEMBERS = {"heldout/news.en-00000-of-00100": "not for us\n" * 20, **HELD_OUT, **dict(reversed(SHARDS.items()))}


def write_billion(folder: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, str] = MEMBERS) -> Path:
    """Make an archive, and its checksum the published one."""
    assert BILLION.archive
    path = folder / BILLION.archive.name
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, text in members.items():
            entry = tarfile.TarInfo(f"1-billion-word-language-modeling-benchmark-r13output/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    publish_billion(path, monkeypatch)
    return path


def publish_billion(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    row = dataclasses.replace(BILLION, archive=File(path.name, digest, url=f"https://example.org/{path.name}"))
    monkeypatch.setitem(DATASETS, "one-billion-words", row)


def test_one_billion_words_are_its_shards_in_order_with_both_ends_of_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_billion(folder, monkeypatch)
    loaded = data.load("one-billion-words")
    assert loaded.tag == ""
    assert loaded.identity == data.identity("one-billion-words")

    lines = [line.split() for _, text in sorted(SHARDS.items()) for line in text.split("\n") if line.strip()]
    counts: dict[str, int] = {}
    for word in (word for words in lines for word in words):
        counts[word] = counts.get(word, 0) + 1
    expected = [t for words in lines for t in ("<bos>", *(w if counts[w] > 2 else "<unk>" for w in words), "<eos>")]
    assert [loaded.vocabulary[i] for i in loaded.train] == expected
    assert [loaded.vocabulary[i] for i in loaded.test[:6]] == ["<bos>", "<unk>", "cat", "<unk>", ".", "<eos>"]
    assert (len(loaded.validation), len(loaded.test)) == (48, 48)


def test_the_parts_of_the_held_out_text_are_not_mixed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {name: text.replace(" 0 ", " the ").replace(" 1 ", " sat ") for name, text in MEMBERS.items()}
    write_billion(folder, monkeypatch, words)
    loaded = data.load("one-billion-words")
    assert (loaded.vocabulary[loaded.test[3]], loaded.vocabulary[loaded.validation[3]]) == ("the", "sat")


def test_words_seen_three_times_are_known_and_numbered_by_frequency(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_billion(folder, monkeypatch)
    loaded = data.load("one-billion-words")
    # 99 * 9 + 2 sentences, 99 * 9 full stops; 99 numbers, two times rare and two dogs are unknown
    assert loaded.vocabulary == ("<bos>", "<eos>", ".", "cat", "sat", "the", "<unk>", "shard", "thrice")
    counts = loaded.train.bincount()
    assert counts.tolist() == [893, 893, 891, 792, 792, 792, 103, 99, 3]


def test_words_as_rare_as_each_other_do_not_depend_on_the_order_of_the_archive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    for members in (MEMBERS, dict(reversed(MEMBERS.items()))):
        write_billion(folder, monkeypatch, members)
        loaded.append(data.load("one-billion-words"))
    assert loaded[0].vocabulary == loaded[1].vocabulary
    assert torch.equal(loaded[0].train, loaded[1].train)
    assert torch.equal(loaded[0].test, loaded[1].test)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "tar.gz cannot be read: "),
        ("not an archive", "tar.gz cannot be read: "),
        ("a shard is missing", "it does not contain news.en-00042-of-00100"),
        ("an empty shard", "news.en-00042-of-00100 cannot be read: it holds 0 words, too few"),
        ("not UTF-8", "news.en-00042-of-00100 cannot be read: .*utf-8"),
    ],
)
def test_a_damaged_archive_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str, message: str) -> None:
    name, members = "training/news.en-00042-of-00100", dict(MEMBERS)
    if case == "a shard is missing":
        del members[name]
    elif case == "an empty shard":
        members[name] = ""
    path = write_billion(folder, monkeypatch, members)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "not an archive":
        path.write_bytes(b"<html>not found</html>")
    elif case == "not UTF-8":
        with tarfile.open(path, "w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = 100
            tar.addfile(entry, io.BytesIO(b"\xff\xfe" * 50))
    publish_billion(path, monkeypatch)  # what a checksum does not find
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("one-billion-words")
    assert "\n" not in str(caught.value)


def test_an_unpacked_copy_does_not_count(folder: Path) -> None:
    # The files in the archive have no published checksums.
    for file in BILLION.files:
        (folder / file.name).write_text("the cat sat .\n" * 10)
    assert data.DATASETS["one-billion-words"].find() is None
    published = data.identity("one-billion-words")
    assert data.identity("one-billion-words", allow_unverified=True) == published


def test_another_archive_has_another_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = data.identity("one-billion-words")
    write_billion(folder, monkeypatch)
    monkeypatch.setitem(DATASETS, "one-billion-words", BILLION)
    assert data.identity("one-billion-words") == published
    with pytest.raises(data.DataError, match="is not the published file of One Billion Words"):
        data.load("one-billion-words")
    allowed = data.load("one-billion-words", allow_unverified=True)
    assert allowed.tag.startswith("unverified: content ")
    assert allowed.identity == data.identity("one-billion-words", allow_unverified=True) != published


def test_one_billion_words_train_an_adaptive_softmax(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_billion(folder, monkeypatch)
    config = RunConfig(
        task="language_model",
        task_args={"sequence_length": 20, "clip_norm": 1.0, "pieces": 2},
        dataset="one-billion-words",
        model="lstm",
        model_args={"embedding": 4, "hidden": 16, "layers": 2, "dropout": 0.1, "cutoffs": [3, 5]},
        optimizer="apollo",
        optimizer_args={"lr": 0.1, "warmup_steps": 5, "warmup_init_lr": 1e-5},
        epochs=4,
        batch_size=32,
    )
    result = train(config)
    assert result.status == "done"
    assert result.epochs[-1]["train_loss"] < math.log(9), "better than the same probability for all words"


def test_identities_never_change(folder: Path) -> None:
    # They are part of the keys of stored runs; the help texts have the identity of their version of Python.
    known = {name: data.identity(name)[:12] for name in data.names(Text) if name != "pydoc-topics"}
    assert known == {
        "tinyshakespeare": "65ffe4a52b0e",
        "wikitext-2": "80575953714c",
        "wikitext-2-valid": "2cee406b2c0d",
        "one-billion-words": "4d3756ff2987",
    }


# The identity does not tell how a text is cut and which words are known: these numbers do.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tinyshakespeare", (1_003_855, 55_769, 55_770, 65)),
        ("wikitext-2", (2_088_628, 217_646, 245_569, 33_278)),
        ("wikitext-2-valid", (195_881, 21_765, 245_569, 2_357)),
    ],
)
def test_sizes_of_the_published_texts(name: str, sizes: tuple[int, ...]) -> None:
    if data.DATASETS[name].find() is None:
        pytest.skip(f"no copy of {name} in KOALA_DATA")
    text = data.load(name)
    assert (len(text.train), len(text.validation), len(text.test), len(text.vocabulary)) == sizes


def test_download_under_another_name(
    folder: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the network is allowed here, but only to this server
    monkeypatch.setenv("KOALA_DATA", str(folder))
    monkeypatch.setattr(paths, "raw_dir", lambda: tmp_path / "raw")
    served, address = server
    raw = b"First Citizen: Before we proceed any further, hear me speak. " * 5
    (served / "input.txt").write_bytes(raw)
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    file = File("tinyshakespeare.txt", digest, url=f"{address}/input.txt", download=digest)
    monkeypatch.setitem(DATASETS, "tinyshakespeare", dataclasses.replace(DATASETS["tinyshakespeare"], files=(file,)))
    loaded = data.load("tinyshakespeare")
    assert loaded.tag == ""
    assert "".join(loaded.vocabulary[i] for i in loaded.train[:13]) == "First Citizen"
    assert data.DATASETS["tinyshakespeare"].find() == (tmp_path / "raw" / "tinyshakespeare" / "tinyshakespeare.txt",)
