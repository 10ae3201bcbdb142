"""Files that are there whole or not at all: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
        raise OSError(f"cannot write {path}: {reason}; nothing was lost, free some space and start again") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; errors as in `replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file of indented lines; errors as in `replacing`."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_torch(path: Path, state: Any) -> None:
    """Write what ``torch.load`` reads; errors as in `replacing`."""
    import torch

    with replacing(path) as file:
        torch.save(state, file)
