"""A folder with notebooks and presets in the place of the repository, for tests of nb, command and workflow."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from koala_lab.notebook.execute import normal_form

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMETERS = """preset: str = "quick"
device: str = "cpu"
seed: int = 0
n_seeds: int = 2
lr: float = 0.1  # step size
widths: list[int] = [1, 2]"""

GRID = """from koala_lab.config import RunConfig

grid = {"sgd": RunConfig(dataset="digits", model="resnet8", optimizer="sgd", optimizer_args={"lr": lr}, epochs=1)}"""


class Project:
    """A folder with notebooks, presets, results and a store, in the place of the repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("notebooks", "data"):
            (root / part).mkdir()
        for name in ("claims", "equations.yaml"):
            (root / "data" / name).symlink_to(REPOSITORY / "data" / name)

    def notebook(self, name: str, *cells: str, grid: bool = False) -> Path:
        """A notebook: parameters cell, start cell, perhaps a grid, then the given code; a last line ``# checked``
        tags a cell for nbval."""
        code = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
        code.append(new_code_cell(f"from koala_lab import notebook as nb\n\nrun = nb.start({name!r})"))
        if grid:
            code.append(new_code_cell(GRID, metadata={"tags": ["grid"]}))
        for source in cells:
            tags = {"tags": ["nbval-check-output"]} if source.endswith("# checked") else {}
            code.append(new_code_cell(source, metadata=tags))
        path = self.root / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(normal_form(new_notebook(cells=[new_markdown_cell(f"# {name}"), *code])), path)
        return path

    def preset(self, preset: str, name: str, text: str) -> Path:
        path = self.root / "notebooks" / "presets" / preset / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
