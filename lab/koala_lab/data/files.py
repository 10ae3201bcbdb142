"""Find, verify and download the files of a data set."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import TypeVar, cast

from koala_lab import paths
from koala_lab.data import folders
from koala_lab.data.folders import FOLDERS, Folders
from koala_lab.data.formats import Contents, DataError, reading
from koala_lab.data.pairs import PAIRS, Pairs
from koala_lab.data.registry import DATASETS, Dataset, File
from koala_lab.data.text import TEXTS, Text

Filed = Dataset | Text | Pairs  # in files with published checksums
Row = Filed | Folders
Kind = TypeVar("Kind", Dataset, Text, Pairs)

_ALLOW = "use it with --allow-unverified-data (KOALA_ALLOW_UNVERIFIED_DATA=1), and every result will say so"


@dataclass(frozen=True)
class Copy:
    """A verified or allowed copy of a data set: its archive, content files or folder, its identity and its tag."""

    files: tuple[Path, ...]
    identity: str
    tag: str


def row(name: str) -> Row:
    """Return the row of one of the registries, or raise ``ValueError`` with the nearest known name."""
    rows: dict[str, Row] = {**DATASETS, **FOLDERS, **TEXTS, **PAIRS}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown data set {name!r}; did you mean {near!r}? Known: {', '.join(rows)}")
    return rows[name]


def row_of(name: str, kind: type[Kind]) -> Kind:
    """Return the row of one registry; ``ValueError`` says how a data set of another one is loaded."""
    found = row(name)
    if not isinstance(found, kind):
        raise ValueError(f"{name} {found.loader}")
    return found


def _filed(name: str) -> Filed:
    found = row(name)
    assert not isinstance(found, Folders)
    return found


def identity(name: str, *, allow_unverified: bool | None = None) -> str:
    """Return what identifies the content of a data set: 64 hexadecimal digits, part of the key of every run.

    It is the SHA-256 of the published checksums of its files, and so a constant that needs no data. Only where
    unverified data are allowed, and an unverified copy is found, that copy's files are hashed instead; and files
    without a published checksum, because each version of their package has its own, always are. Of photographs in
    folders the numbers, names and sizes are hashed, where they are found.

    Parameters
    ----------
    name
        A name in :data:`DATASETS`, :data:`FOLDERS`, :data:`TEXTS` or :data:`PAIRS`.
    allow_unverified
        As in :func:`koala_lab.data.load`.

    Raises
    ------
    ValueError
        For an unknown name.
    DataError
        If a file of an unverified copy cannot be read.
    """
    dataset, may_differ = row(name), allowed(allow_unverified)
    if isinstance(dataset, Folders):
        root = _root(name)
        if root is None or (not may_differ and folders.difference(dataset, root)):
            return _manifest(
                name, [f"{part} {count}" for part, count in zip(folders.PARTS, dataset.counts, strict=True)]
            )
        return _manifest(name, folders.content(root))
    published = all(file.digest for file in _identifying(dataset))
    if (published and not may_differ) or (found := find(name)) is None:
        return _manifest(name, [f"{f.name} {f.digest}" for f in _identifying(dataset)])
    return checked(name, found, allow_unverified=may_differ).identity


def _identifying(dataset: Filed) -> tuple[File, ...]:
    """The content files; where these have no published checksums, but their archive has, the archive."""
    if dataset.archive and not all(file.digest for file in dataset.files):
        return (dataset.archive,)
    return dataset.files


def fetch(name: str, *, allow_unverified: bool | None = None) -> Copy:
    """Find a data set in ``KOALA_DATA`` or ``data/raw``, else download it to ``data/raw``; verify it.

    The first folder that holds the whole data set counts, even if its copy is refused.

    Raises
    ------
    ValueError
        For an unknown name.
    DataError
        If the data set is neither found nor can be downloaded, or its checksum is not the published one and
        ``allow_unverified`` (default: whether the environment has ``KOALA_ALLOW_UNVERIFIED_DATA=1``) is not given.
    """
    if isinstance(dataset := row(name), Folders):
        return _checked_folders(name, dataset, may_differ=allowed(allow_unverified))
    found = find(name)
    if found is None:
        _download(name)
        found = find(name)
        if found is None:
            raise DataError(f"the download of {name} to {paths.raw_dir()} left no complete copy there")
    return checked(name, found, allow_unverified=allowed(allow_unverified))


def allowed(allow_unverified: bool | None) -> bool:
    return os.environ.get("KOALA_ALLOW_UNVERIFIED_DATA") == "1" if allow_unverified is None else allow_unverified


def find(name: str) -> tuple[Path, ...] | None:
    """Return the archive or all content files in the first folder that has them."""
    dataset = _filed(name)
    for folder in paths.data_dirs():
        # A folder named after the data set comes first: MNIST and Fashion-MNIST use the same file names.
        places = [folder / sub for sub in (name, *dataset.folders, "")]
        if dataset.archive and (archive := _first(places, [dataset.archive.name])):
            return (archive,)
        if dataset.archive in _identifying(dataset):
            continue  # loose files could not be verified
        files = [_shipped(f) if f.package else _first(places, [f.name, f"{f.name}.gz"]) for f in dataset.files]
        if None not in files:
            return tuple(cast("list[Path]", files))
    return None


def _first(folders: list[Path], names: list[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _shipped(file: File) -> Path:
    spec = importlib.util.find_spec(file.package)  # does not import the package
    path = spec and spec.origin and _first([Path(spec.origin).parent], [file.name, f"{file.name}.gz"])
    if not path:
        raise DataError(f"{file.name} comes with the Python package {file.package}, which is missing or has changed")
    return path


def checked(name: str, found: tuple[Path, ...], *, allow_unverified: bool) -> Copy:
    """Compare checksums before anything is parsed."""
    dataset = _filed(name)
    expected = (dataset.archive,) if dataset.archive and found[0].name == dataset.archive.name else dataset.files
    for path, file in zip(found, expected, strict=True):
        kind, digest = (file.digest or "sha256:").split(":")
        if (actual := _digest(path, kind)) != digest and digest:
            break
    else:
        own = {f.name: f"sha256:{_digest(p, 'sha256')}" for p, f in zip(found, expected, strict=True) if not f.digest}
        lines = [f"{f.name} {f.digest or own[f.name]}" for f in _identifying(dataset)]
        return Copy(found, _manifest(name, lines), tag="")
    if not allow_unverified:
        raise DataError(
            f"{path} is not the published file of {dataset.title} ({kind} {actual}, expected {digest}): replace it, or "
            f"{_ALLOW}"
        )
    content = _manifest(name, [f"{p.name.removesuffix('.gz')} sha256:{_digest(p, 'sha256')}" for p in found])
    return Copy(found, content, tag=f"unverified: content {content[:8]}")


def _root(name: str) -> Path | None:
    """Return the first folder that has photographs for training and for tests."""
    roots = [folder / name for folder in paths.data_dirs()]
    return next((root for root in roots if all((root / part).is_dir() for part in folders.PARTS)), None)


def _checked_folders(name: str, dataset: Folders, *, may_differ: bool) -> Copy:
    """Compare the numbers of images and classes; nobody publishes more of them."""
    root = _root(name)
    if root is None:
        looked = " and ".join(str(p) for p in paths.data_dirs())
        raise DataError(
            f"{dataset.title} is not in {looked}: get it from {dataset.source}, unpack it as {name}/train/CLASS/*.JPEG "
            f"and {name}/val/CLASS/*.JPEG, and name the folder that holds {name} in KOALA_DATA"
        )
    content = _manifest(name, folders.content(root))
    if differs := folders.difference(dataset, root):
        if not may_differ:
            raise DataError(f"{differs}: complete it, or {_ALLOW}")
        return Copy((root,), content, tag=f"unverified: content {content[:8]}")
    return Copy((root,), content, tag="")


def _manifest(name: str, lines: list[str]) -> str:
    return hashlib.sha256("\n".join([f"koala data set 1: {name}", *lines]).encode()).hexdigest()


def _digest(path: Path, kind: str) -> str:
    stat = path.stat()
    return _hash_of(path, kind, (stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=256)  # every run of a grid asks for the same files
def _hash_of(path: Path, kind: str, _stamp: tuple[int, int]) -> str:
    with reading(str(path)), _opened(path) as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _opened(path: Path) -> BufferedIOBase:
    """Open for reading; a compressed file that is no archive gives its content."""
    if path.suffix == ".gz" and not path.name.endswith(".tar.gz"):
        return gzip.open(path)
    return path.open("rb")


def contents(name: str, copy: Copy) -> Contents:
    """Yield ``(name for messages, bytes)`` of the content files, in the registry's order.

    Those of a text's archive come in the order of the archive, so that one at a time is in memory.
    """
    dataset = _filed(name)
    if dataset.archive and copy.files[0].name == dataset.archive.name:
        names = [file.name for file in dataset.files]
        members = _members(copy.files[0], names)
        if not isinstance(dataset, Text):
            members = iter(sorted(members, key=lambda member: names.index(member[0])))
        yield from ((f"{copy.files[0]}/{base}", raw) for base, raw in members)
        return
    for path in copy.files:
        with reading(str(path)), _opened(path) as stream:
            raw = stream.read()
        yield str(path), raw


def _members(archive: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Read members of a tar archive by their base names, in the order of the archive, without unpacking it."""
    missing = dict.fromkeys(names)
    with reading(str(archive)), tarfile.open(archive) as tar:
        for member in tar:
            base = member.name.rsplit("/", 1)[-1]
            if base in missing and (stream := tar.extractfile(member)):
                del missing[base]
                yield base, stream.read()
        if missing:
            raise ValueError(f"it does not contain {next(iter(missing))}")


def _download(name: str) -> None:
    """Download to ``data/raw/<name>``; whatever goes wrong becomes one sentence with what to do."""
    dataset = _filed(name)
    wanted = [dataset.archive] if dataset.archive else [f for f in dataset.files if not f.package]
    what = ", ".join(f.name for f in wanted) if len(wanted) < 5 else f"{wanted[0].name} … {wanted[-1].name}"
    looked = " and ".join(str(p) for p in paths.data_dirs())
    advice = f"put {what} into a folder and name that folder in KOALA_DATA"
    if dataset.source:
        raise DataError(f"{dataset.title} is not in {looked}: get it from {dataset.source}, {advice}")
    try:
        import pooch  # type: ignore[import-untyped]

        for file in wanted:
            fname = f"{file.name}.gz" if file.url.endswith(f"{file.name}.gz") else file.name
            pooch.retrieve(file.url, file.download, fname=fname, path=paths.raw_dir() / name)
    except ImportError as error:
        raise DataError(f"{dataset.title} is not in {looked}: install pooch to download it, or {advice}") from error
    except (OSError, ValueError) as error:  # pooch raises ValueError for a wrong checksum
        reason = "its checksum is not the published one" if isinstance(error, ValueError) else type(error).__name__
        raise DataError(
            f"{dataset.title} is not in {looked}, and downloading {file.url} failed ({reason}): {advice}, or run "
            f"`koala data {name}` where there is a network"
        ) from error
