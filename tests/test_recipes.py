"""The recipes of CONTRIBUTING.md, followed on a copy of the repository with toy components."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def listed(recipe: str, name: str) -> set[str]:
    """The files in the table of a recipe."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"### {recipe}\n")[1].split("\n#")[0]
    return {file.replace("<name>", name) for file in re.findall(r"^\| `([^`]+)` \|", section, re.M)}


class Copy:
    """The files of the repository in another folder, which knows what was changed there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.changed = folder, set[str]()
        for name in ("koala_lib", "lab", "tests", "notebooks", "data/claims", "data/results"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "conftest.py", "CHANGELOG.md"):
            shutil.copy(ROOT / file, folder / file)

    def write(self, file: str, text: str) -> None:
        assert not (self.folder / file).exists()
        (self.folder / file).write_text(text, encoding="utf-8")
        self.changed.add(file)

    def insert(self, file: str, before: str, text: str) -> None:
        """Put a text before the first place where another stands."""
        old = (self.folder / file).read_text(encoding="utf-8")
        assert before in old, f"{file} has no {before!r}"
        (self.folder / file).write_text(old.replace(before, text + before, 1), encoding="utf-8")
        self.changed.add(file)

    def python(self, *arguments: str) -> str:
        """Run Python there, with the code that lies there, and return what it printed."""
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}:{self.folder / 'lab'}", "PYTEST_ADDOPTS": ""}
        environment |= {"KOALA_ROOT": str(self.folder), "KOALA_RUNS": str(self.folder / "runs")}
        command = [sys.executable, *arguments]
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        return run.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


REFERENCE = '''"""Toy slowly: KOALA-V whose weights do not drift."""

from koala_lib.reference.koala import ReferenceKoalaV


class ReferenceToy(ReferenceKoalaV):
    def __init__(self, groups, **options):
        super().__init__(groups, process_noise=0.0, **options)
'''
OPTIMIZER = '''"""Toy: KOALA-V whose weights do not drift."""

from koala_lib.optim.koala import KoalaV


class Toy(KoalaV):
    """KOALA-V with Q = 0."""

    def __init__(self, params, lr=1.0, **options):
        super().__init__(params, lr, process_noise=0.0, **options)
'''
TEST = """import torch
from koala_lib import Toy
from koala_lib.reference import ReferenceToy


def test_toy_equals_its_reference():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    y = x.detach().clone()
    fast, slow = Toy([x]), ReferenceToy([{"params": [y]}])
    for _ in range(3):
        fast.predict()
        slow.predict()
        loss = x.square().sum().reshape(1)
        (x.grad,) = torch.autograd.grad(loss.sum(), x)
        fast.step(loss=loss)
        slow.update(loss.detach(), [2 * y])
    torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=0)
    assert fast.filter_state()["process_noise"] == 0
"""
TRAIN = """
from koala_lab import plots
from koala_lab.config import RunConfig
from koala_lab.runs.training import train
config = RunConfig(dataset={dataset!r}, model="mlp_100",
                   optimizer={optimizer!r}, optimizer_args={{"lr": {lr}}}, epochs=2, train_size=200)
result = train(config)
print(result.status, plots.label({optimizer!r}), result.epochs[-1]["train_loss"] < result.epochs[0]["train_loss"])
"""


def test_the_recipe_for_an_optimizer(copy: Copy) -> None:
    copy.write("koala_lib/reference/toy.py", REFERENCE)
    copy.write("koala_lib/optim/toy.py", OPTIMIZER)
    copy.write("tests/koala_lib/test_toy.py", TEST)
    for folder, name in (("reference", "ReferenceToy"), ("optim", "Toy")):
        file = f"koala_lib/{folder}/__init__.py"
        copy.insert(file, "__all__ = [", f"from koala_lib.{folder}.toy import {name}\n\n")
        copy.insert(file, (copy.folder / file).read_text().split("__all__ = [")[1].split(",")[0], f'"{name}", ')
    copy.insert("koala_lib/__init__.py", "\n__all__ = [", "    from koala_lib.optim import Toy\n")
    copy.insert("koala_lib/__init__.py", '"KoalaM"', '"Toy", ')
    registry = "lab/koala_lab/baselines/registry.py"
    copy.insert(registry, '    "koala_v": ', '    "toy": Method(Toy),\n')
    copy.insert(registry, "from koala_lib.optim import ", "from koala_lib.optim import Toy\n")
    copy.insert("lab/koala_lab/plots/look.py", '    "koala_m": _SAFE', '    "toy": "#117733",\n')
    copy.insert("lab/koala_lab/plots/look.py", '    "koala_m": "KOALA-M"', '    "toy": "Toy",\n')
    copy.insert("tests/support/cases.py", '    Case("V", ', '    Case("Toy", Toy),\n')
    copy.insert("tests/support/cases.py", "from koala_lib import ", "from koala_lib import Toy\n")
    copy.insert("CHANGELOG.md", "### Fixed", "- Toy.\n\n")
    assert copy.changed == listed("An optimizer", "toy")

    trained = copy.python("-c", TRAIN.format(dataset="digits", optimizer="toy", lr=1.0))
    assert trained.split() == ["done", "Toy", "True"]
    tests = ["tests/koala_lib/test_toy.py", "tests/koala_lib/test_optimizer_contract.py", "tests/test_layers.py"]
    selected = "(toy or Toy or imports or floor) and not another_optimizer"  # Toy takes the state of its base class
    told = copy.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", selected)
    assert int(re.findall(r"(\d+) passed", told)[0]) > 20


ROW = """    Images(
        name="toy",
        title="digits again",
        samples=1_297,
        shape=(1, 8, 8),
        num_classes=10,
        mean=(0.3053,),
        std=(0.3759,),
        augmentation=Augmentation(pad=1, flip=False),
        files=(_DIGITS,),
        parse=partial(parse_csv, test_size=500, largest=16),
    ),
"""


def test_the_recipe_for_a_data_set(copy: Copy) -> None:
    copy.insert("lab/koala_lab/data/registry.py", '    Images(\n        name="digits",', ROW)
    test = 'def test_toy() -> None:\n    assert data.load("toy").train_images.shape == (1297, 1, 8, 8)\n\n\n'
    copy.insert("tests/koala_lab/test_data.py", "def test_", test)
    copy.insert("CHANGELOG.md", "### Fixed", "- Toy.\n\n")
    run = "RunConfig(dataset='toy', model='mlp_100', optimizer='sgd', epochs=1, train_size=200)"
    imports = "from koala_lab.runs import references; from koala_lab.config import RunConfig"
    before = (copy.folder / "data" / "results" / "references.json").read_text()
    copy.python("-c", f"{imports}; references.store([{run}], print)")
    assert (copy.folder / "data" / "results" / "references.json").read_text() != before
    copy.changed.add("data/results/references.json")
    only_sometimes = {"lab/koala_lab/data/formats.py"}
    assert copy.changed == listed("A data set", "toy") - only_sometimes

    assert copy.python("-c", TRAIN.format(dataset="toy", optimizer="sgd", lr=0.1)).split() == ["done", "SGD", "True"]
    told = copy.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/koala_lab/test_data.py", "-k", "toy")
    assert int(re.findall(r"(\d+) passed", told)[0]) >= 2
