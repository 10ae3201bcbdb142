"""Who may import whom: the library torch alone, the laboratory itself from the ground up, and nobody private names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # from the ground up
    *("checks", "files", "paths", "parameters", "claims", "theory", "baselines", "data", "models", "tasks", "config"),
    *("runs", "plots", "notebook", "report", "bench", "cli"),
]


def imported(tree: ast.Module) -> Iterator[str]:
    """Everything that a module imports, wherever it does so, with the name that it takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def for_types_only(tree: ast.Module) -> set[str]:
    """What is imported under ``if TYPE_CHECKING``."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {name for block in blocks for name in imported(ast.Module(block.body, []))}


def breaches(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module, by its dotted name; notebooks have no floors."""
    tree = ast.parse(source)
    package, *inside = module.split(".")
    names = set(imported(tree))
    if package == "koala_lib":
        allowed = {*sys.stdlib_module_names, "torch", "koala_lib"}
        return [f"{module} imports {name}" for name in sorted(names) if name.split(".")[0] not in allowed]
    private = [
        n for n in names if n.split(".")[0] == "koala_lib" and any(part.startswith("_") for part in n.split("."))
    ]
    found = [f"{module} imports the private {name}" for name in sorted(private)]
    if package == "koala_lab" and inside:
        floor = FLOORS.index(inside[0])
        for name in sorted(names - for_types_only(tree)):
            above = [part for part in name.split(".")[1:2] if part in FLOORS and FLOORS.index(part) > floor]
            if name.startswith("koala_lab.") and above:
                found.append(f"{module} imports {name} from a floor above")
    return found


def sources(package: str) -> Iterator[tuple[str, str]]:
    """Dotted names and sources of a package of the repository, or of its notebooks; tests may look inside."""
    folder = ROOT / "lab" if package == "koala_lab" else ROOT
    for path in sorted((folder / package).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text()
    for path in sorted((folder / package).rglob("*.ipynb")) if package == "notebooks" else ():
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        lines = "\n".join("".join(c["source"]) for c in cells).splitlines()
        yield f"notebooks.{path.stem}", "\n".join("" if line.startswith(("%", "!")) else line for line in lines)


@pytest.mark.parametrize("package", ["koala_lib", "koala_lab", "notebooks"])
def test_imports_go_down(package: str) -> None:
    found = [breach for module, source in sources(package) for breach in breaches(module, source)]
    assert found == []
    assert len(list(sources(package))) > 10, "the rule looked at something"


PLANTED = {
    "numpy in the library": ("koala_lib.kalman", "import numpy as np"),
    "the laboratory in the library": ("koala_lib.optim.koala", "def f():\n    from koala_lab import data"),
    "a private module": ("koala_lab.runs.trace", "from koala_lib.optim._engine.lists import squared_norms"),
    "a private name": ("notebooks.10_koala", "from koala_lib.optim.meka import _Observed"),
    "a private module of an import": ("koala_lab.baselines.svrg", "import koala_lib.optim._engine.checks"),
    "the floor above": ("koala_lab.theory.koala", "from koala_lab.runs import Store"),
    "the floor above, late": ("koala_lab.data.text", "def f():\n    from koala_lab import config"),
    "the top": ("koala_lab.report", "import koala_lab.cli"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_broken_rule_is_found(case: str) -> None:
    assert len(breaches(*PLANTED[case])) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("koala_lib.optim.meka", "import math\nimport torch.nn as nn\nfrom koala_lib.optim._engine import lists"),
        ("koala_lab.runs.trace", "from koala_lab.data import batches\nfrom koala_lib.optim.filter import LossFilter"),
        ("koala_lab.tasks.gan", "if TYPE_CHECKING:\n    from koala_lab.config import RunConfig"),
        ("koala_lab.bench.cost", "from koala_lab.bench.steps import stored\nimport numpy"),
    ],
)
def test_a_kept_rule_is_left_alone(module: str, source: str) -> None:
    assert breaches(module, source) == []


def test_every_module_of_the_laboratory_has_a_floor() -> None:
    names = {
        p.stem for p in (ROOT / "lab" / "koala_lab").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert names - {"__init__"} == set(FLOORS)


def test_the_root_of_the_library_has_at_most_nine_entries() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "koala_lib"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len({Path(file).parts[1] for file in listed}) <= 9


@pytest.mark.parametrize("command", ["--help", "list --help"])
def test_the_command_starts_without_torch(command: str) -> None:
    heavy = ("torch", "numpy", "matplotlib", "pandas", "nbformat", "koala_lab.data")
    script = (
        "import sys; from typer.testing import CliRunner; from koala_lab.cli import app\n"
        f"result = CliRunner().invoke(app, {command.split()!r}); assert result.exit_code == 0, result.output\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
