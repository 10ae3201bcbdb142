"""A row of the registry: where a data set comes from, how it is found, verified, downloaded and read."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import tarfile
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from koala_lab import paths
from koala_lab.data.formats import Contents, DataError, reading

if TYPE_CHECKING:
    import torch

ALLOW = "use it with --allow-unverified-data (KOALA_ALLOW_UNVERIFIED_DATA=1), and every result will say so"


@dataclass(frozen=True)
class File:
    """A file and its published checksum.

    Attributes:
        name: File name. A file that is not an archive may also lie there as ``name`` + ``.gz``.
        digest: ``"sha256:…"`` or ``"md5:…"`` of an archive, or of the uncompressed content of any other file, so that a
            recompressed copy counts as the same data. Empty where nobody publishes one.
        package: Python package that ships the file; ``name`` is then relative to it.
        url: Address.
        download: Checksum of what comes from there.
    """

    name: str
    digest: str
    package: str = ""
    url: str = ""
    download: str = ""


@dataclass(frozen=True)
class Copy:
    """A verified or allowed copy of a data set.

    Attributes:
        files: Its archive, content files or folder.
        identity: See :func:`koala_lab.data.identity`.
        tag: Empty for verified data, else ``"unverified: content 1a2b3c4d"``, to be shown beside every result.
    """

    files: tuple[Path, ...]
    identity: str
    tag: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """What every loaded data set has; the name and title of its row, the identity and tag of its copy."""

    name: str
    title: str
    identity: str
    tag: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Size of the training part: what ``train_size`` counts."""

    @abstractmethod
    def first(self, train_size: int) -> Self:
        """Return the same with a smaller training part."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Return the same on a device."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of the registry of data sets. A subclass is a kind of data, and reads it.

    Attributes:
        name: Name in the registry.
        title: Name to print.
        samples: Size of the training part, what ``train_size`` counts (images, tokens, pairs of sentences); ``None``
            where it depends on the copy.
        files: The content files, those of the training part first.
        archive: A tar archive that holds all of them. Where they have no checksums of their own, only it will do.
        folders: Where the files lie below a data folder, beside the folder itself and one with the data set's name.
        source: Where a person gets what cannot be downloaded as it is.
    """

    name: str
    title: str
    samples: int | None = None
    files: tuple[File, ...] = ()
    archive: File | None = None
    folders: tuple[str, ...] = ()
    source: str = ""

    @abstractmethod
    def read(self, copy: Copy) -> Data:
        """Read a verified copy onto the CPU.

        Raises:
            DataError: If it is damaged.
        """

    def origin(self, copy: Copy) -> dict[str, str]:
        """Return the fields that every :class:`Data` has."""
        return {"name": self.name, "title": self.title, "identity": copy.identity, "tag": copy.tag}

    # -- found and verified --------------------------------------------------------------------------------------------

    def identity(self, *, may_differ: bool) -> str:
        """Return what identifies the content, see :func:`koala_lab.data.identity`."""
        identifying = self._identifying()
        published = all(file.digest for file in identifying)
        if (published and not may_differ) or (found := self.find()) is None:
            return self.manifest([f"{file.name} {file.digest}" for file in identifying])
        return self.checked(found, may_differ=may_differ).identity

    def fetch(self, *, may_differ: bool) -> Copy:
        """Find the data set, else download it; verify it. Errors as in :func:`koala_lab.data.fetch`."""
        found = self.find()
        if found is None:
            self.download()
            found = self.find()
            if found is None:
                raise DataError(f"the download of {self.name} to {paths.raw_dir()} left no complete copy there")
        return self.checked(found, may_differ=may_differ)

    def find(self) -> tuple[Path, ...] | None:
        """Return the archive or all content files in the first data folder that has them."""
        for folder in paths.data_dirs():
            # A folder named after the data set comes first: MNIST and Fashion-MNIST use the same file names.
            places = [folder / sub for sub in (self.name, *self.folders, "")]
            if self.archive and (archive := _first(places, [self.archive.name])):
                return (archive,)
            if self.archive in self._identifying():
                continue  # loose files could not be verified
            files = [shipped(f) if f.package else _first(places, [f.name, f"{f.name}.gz"]) for f in self.files]
            if None not in files:
                return tuple(cast("list[Path]", files))
        return None

    def checked(self, found: tuple[Path, ...], *, may_differ: bool) -> Copy:
        """Compare checksums before anything is parsed."""
        expected = (self.archive,) if self.archive and found[0].name == self.archive.name else self.files
        for path, file in zip(found, expected, strict=True):
            kind, digest = (file.digest or "sha256:").split(":")
            if (actual := _digest(path, kind)) != digest and digest:
                break
        else:
            own = {
                f.name: f"sha256:{_digest(p, 'sha256')}" for p, f in zip(found, expected, strict=True) if not f.digest
            }
            lines = [f"{f.name} {f.digest or own[f.name]}" for f in self._identifying()]
            return Copy(found, self.manifest(lines), tag="")
        if not may_differ:
            raise DataError(
                f"{path} is not the published file of {self.title} ({kind} {actual}, expected {digest}): replace it, "
                f"or {ALLOW}"
            )
        return self.unverified(found, [f"{p.name.removesuffix('.gz')} sha256:{_digest(p, 'sha256')}" for p in found])

    def unverified(self, found: tuple[Path, ...], lines: list[str]) -> Copy:
        """Return a copy that is identified by its own content, and tagged."""
        content = self.manifest(lines)
        return Copy(found, content, tag=f"unverified: content {content[:8]}")

    def manifest(self, lines: list[str]) -> str:
        """Return the identity of a data set with such content: 64 hexadecimal digits."""
        return hashlib.sha256("\n".join([f"koala data set 1: {self.name}", *lines]).encode()).hexdigest()

    def _identifying(self) -> tuple[File, ...]:
        """Return the content files; where these have no published checksums, but their archive has, the archive."""
        if self.archive and not all(file.digest for file in self.files):
            return (self.archive,)
        return self.files

    def missing(self, advice: str) -> str:
        """Return the sentence that says that there is no copy, and what to do."""
        return f"{self.title} is not in {' and '.join(str(p) for p in paths.data_dirs())}{advice}"

    def download(self) -> None:
        """Download to ``data/raw/<name>``; whatever goes wrong becomes one sentence with what to do."""
        wanted = [self.archive] if self.archive else [f for f in self.files if not f.package]
        what = ", ".join(f.name for f in wanted) if len(wanted) < 5 else f"{wanted[0].name} … {wanted[-1].name}"
        advice = f"put {what} into a folder and name that folder in KOALA_DATA"
        if self.source:
            raise DataError(self.missing(f": get it from {self.source}, {advice}"))
        try:
            import pooch  # type: ignore[import-untyped]

            for file in wanted:
                fname = f"{file.name}.gz" if file.url.endswith(f"{file.name}.gz") else file.name
                pooch.retrieve(file.url, file.download, fname=fname, path=paths.raw_dir() / self.name)
        except (OSError, ValueError) as error:  # pooch raises ValueError for a wrong checksum
            reason = "its checksum is not the published one" if isinstance(error, ValueError) else type(error).__name__
            raise DataError(
                self.missing(
                    f", and downloading {file.url} failed ({reason}): {advice}, or run `koala data {self.name}` where "
                    "there is a network"
                )
            ) from error

    # -- read ----------------------------------------------------------------------------------------------------------

    def contents(self, copy: Copy, *, in_order: bool = True) -> Contents:
        """Yield ``(name for messages, bytes)`` of the content files.

        Args:
            copy: A verified copy.
            in_order: In the order of ``files``. Else those of an archive come in its own, one at a time in memory.
        """
        if self.archive and copy.files[0].name == self.archive.name:
            names = [file.name for file in self.files]
            members = _members(copy.files[0], names)
            if in_order:
                members = iter(sorted(members, key=lambda member: names.index(member[0])))
            yield from ((f"{copy.files[0]}/{base}", raw) for base, raw in members)
            return
        for path in copy.files:
            with reading(str(path)), _opened(path) as stream:
                raw = stream.read()
            yield str(path), raw


def allowed(allow_unverified: bool | None) -> bool:
    """Return whether unverified data may be used; ``None`` asks the environment."""
    return os.environ.get("KOALA_ALLOW_UNVERIFIED_DATA") == "1" if allow_unverified is None else allow_unverified


def _first(folders: list[Path], names: list[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def shipped(file: File) -> Path:
    """Return where a Python package has a file, without importing the package."""
    spec = importlib.util.find_spec(file.package)
    path = spec and spec.origin and _first([Path(spec.origin).parent], [file.name, f"{file.name}.gz"])
    if not path:
        raise DataError(f"{file.name} comes with the Python package {file.package}, which is missing or has changed")
    return path


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
