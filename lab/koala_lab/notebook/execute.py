"""Execute one notebook as papermill does, strictly, and leave a file that is the same on every re-run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill  # type: ignore[import-untyped]
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode, from_dict
from papermill.exceptions import PapermillExecutionError  # type: ignore[import-untyped]

from koala_lab import notebook as nb
from koala_lab.files import write_bytes
from koala_lab.parameters import from_text, resolve

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class NotebookFailed(Exception):
    """A cell raised; the message names it."""


class _OwnKernelSpec(KernelSpecManager):
    """Only the interpreter that runs this; an installed "python3" may belong to another environment."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        quiet = get_kernel_dict(extra_arguments=["--log-level=ERROR"])
        return KernelSpec(resource_dir=RESOURCES, **quiet)


class _OwnKernel(AsyncKernelManager):
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return _OwnKernelSpec()


def normal_form(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between two executions of the same notebook.

    Kept are sources, tags, ids, execution counts (renumbered) and outputs; dropped are timings, papermill's and
    jupytext's metadata and the interpreter's version; consecutive pieces of one stream become one.

    Args:
        notebook: Changed in place.

    Returns:
        The notebook.
    """
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = from_dict(_METADATA)  # type: ignore[no-untyped-call]
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = from_dict({"tags": tags} if tags else {})  # type: ignore[no-untyped-call]
        if cell.cell_type != "code":
            continue
        cell.outputs = _tidy(cell.outputs)
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    return notebook


def _tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Return outputs without empty displays (a cleared progress line) and with split streams joined."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "display_data" and not any(output.data.values()):
            continue
        same = kept and output.output_type == "stream" and kept[-1].get("name") == output.name
        if same:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook to a temporary name and rename it."""
    text: str = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    write_bytes(path, (text.removesuffix("\n") + "\n").encode())


def parameters(path: Path, preset: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Return what papermill is to inject: the preset's overrides and a command line's, checked against the notebook.

    Args:
        path: The notebook.
        preset: ``quick``, ``desktop`` or ``paper``.
        given: Texts by name; each is read as its declared type.

    Raises:
        ValueError: For an unknown or ill-typed parameter or a missing preset.
    """
    schema = nb.declared_in(path)
    wanted = {**nb.overrides(path, preset), **from_text(schema, given)}
    resolved = resolve(schema, wanted)
    return {name: resolved[name] for name in wanted}


def execute(path: Path, output: Path, values: Mapping[str, Any]) -> None:
    """Execute a notebook in its own kernel and write it in normal form.

    While it runs, and if a cell fails, the notebook is ``<output stem>.failed.ipynb``; ``output`` appears only
    after success. A kernel that does not start is tried once more.

    Args:
        path: The notebook.
        output: Executed notebook; may be ``path`` itself.
        values: Checked parameters to inject.

    Raises:
        NotebookFailed: Naming the failed cell, its error and the kept file.
        OSError: If it cannot be written; what stood at ``output`` is untouched.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = output.with_name(f"{output.stem}.failed.ipynb")
    environment = {"KOALA_BATCH": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    # A backend of windows needs a screen, and a kernel that optimises leaves assertions out.
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONOPTIMIZE": ""}
    os.environ.update(environment)  # the kernel inherits it
    for attempt in (1, 2):
        try:
            executed = papermill.execute_notebook(
                str(path),
                str(kept),
                dict(values),
                cwd=str(path.parent),  # as in Jupyter
                kernel_name="python3",
                language="python",
                kernel_manager_class=_OwnKernel,
                shutdown_kernel="immediate",
                progress_bar=sys.stderr.isatty(),
            )
            break
        except PapermillExecutionError as error:
            notebook = nbformat.read(kept, as_version=4)  # type: ignore[no-untyped-call]
            write(normal_form(notebook), kept)
            raise NotebookFailed(_sentence(path, kept, error)) from None
        except DeadKernelError:
            raise NotebookFailed(f"{nb.name_of(path)}: the kernel died; {kept} shows how far it came") from None
        except OSError as error:  # of a full disk; what is there of the kept file is of no use
            kept.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {kept}: {error.strerror or error}; {output} is as it was; make room and start again"
            ) from error
        except RuntimeError as error:  # jupyter_client's error for a kernel that never answered
            if attempt == 2 or "Kernel" not in str(error):
                raise
    write(normal_form(executed), output)
    kept.unlink(missing_ok=True)  # only then: the disk may be full


def _sentence(path: Path, kept: Path, error: PapermillExecutionError) -> str:
    lines = str(error.source).strip().splitlines() or [""]
    what = f"{error.ename}: {error.evalue}".splitlines()[0].rstrip(": ")
    return f"{nb.name_of(path)}: cell [{error.exec_count}] '{lines[0]}' failed with {what}; see {kept}"
