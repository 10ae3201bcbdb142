"""Files that are there whole or not at all: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends without an error; missing folders are made.

    Raises:
        OSError: If it cannot be written (a full disk, say); what stood at ``path`` before is untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write {path}: {reason}; what stood there is as it was; make room and start again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; errors as in `replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file of indented lines; errors as in `replacing`."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ValueError: If it is no JSON, or no mapping, or cannot be read; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # such as a file that another user keeps to himself
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what it should be: expected a mapping, got {type(content).__name__}")
    return content


def write_torch(path: Path, state: Any) -> None:
    """Write what ``torch.load`` reads; errors as in `replacing`."""
    import torch

    buffer = io.BytesIO()  # torch tells of a full disk in words of its own
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read_torch(path: Path, device: object) -> Any:
    """Read what `write_torch` wrote, onto a device.

    Raises:
        Exception: Of many kinds for a file that is damaged; one whose bytes have changed is refused by its checksums.
    """
    import torch

    with zipfile.ZipFile(path) as archive:
        if changed := archive.testzip():
            raise ValueError(f"the checksum of its part {changed} is wrong")
    return torch.load(path, map_location=device, weights_only=True)  # type: ignore[arg-type]


class _Loader(yaml.SafeLoader):
    """Refuses a key written twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"key {twice[0]!r} appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: If it is no YAML, or has a key twice; the message names file and line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error


def set_aside(path: Path, reason: BaseException, then: str) -> None:
    """Rename a damaged file to ``<name>.damaged``, with a warning that says why, and what happens then."""
    kept = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, kept)
    except OSError:  # of a folder that is not ours
        kept = path
    text = " ".join(f"{type(reason).__name__}: {reason}".split())
    warnings.warn(f"{path} is damaged ({text[:150]}); it is kept as {kept.name}, and {then}", stacklevel=3)
