"""The grammar of the notebooks, and that nbval would notice if one of them stopped being true."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import papermill
import pytest
import torch
import yaml

from koala_lab import claims, paths
from koala_lab import notebook as nb
from koala_lab.notebook import execute
from koala_lab.parameters import resolve
from koala_lib import KoalaM, reference

NOTEBOOKS = nb.all_notebooks()
PRESETS = sorted(paths.presets().rglob("*.yaml"))
TAGS = {"parameters", "grid", "nbval-check-output"}
CLAIM_ID = re.compile(r"(?<![\w./])(?:koala|koala_plus_plus|meka|apollo)\.[a-z0-9_]+\.[a-z0-9_.]*[a-z0-9_](?![\w{*.])")

TEMPLATE = paths.notebooks() / "_template.ipynb"
FOUND = "## What was found"
FRAMEWORKS = "03_frameworks"  # it shows the classes that frameworks ask for
USERS_LOOPS = {"00_start_here", "02_going_further", FRAMEWORKS}  # these show the loops that users write

ANSWERS = [name for name in NOTEBOOKS if "/" in name]  # those on a paper; they follow the whole grammar

each = pytest.mark.parametrize("name", NOTEBOOKS)


def cells(name: str, kind: str = "code") -> list[Any]:
    return [c for c in nbformat.read(NOTEBOOKS[name], as_version=4).cells if c.cell_type == kind]


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def text_of(cell: Any) -> str:
    """What nbval compares: streams and plain text."""
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)


def test_there_are_notebooks() -> None:
    assert {"00_start_here", "01_notation"} <= set(NOTEBOOKS)


@each
def test_the_parameters_cell_says_the_same_to_us_and_to_papermill(name: str) -> None:
    schema = nb.declared_in(NOTEBOOKS[name])
    seen = papermill.inspect_notebook(str(NOTEBOOKS[name]))
    assert list(seen) == list(schema)
    for p in schema.values():
        assert seen[p.name]["inferred_type_name"] == p.kind
        assert ast.literal_eval(seen[p.name]["default"]) == p.default
    assert schema["preset"].default == "quick"
    if nb.tagged_source(NOTEBOOKS[name], "grid"):
        assert {"device", "seed", "n_seeds"} <= set(schema)


@each
def test_size_and_shape(name: str) -> None:
    book, code = nbformat.read(NOTEBOOKS[name], as_version=4), cells(name)
    assert len(book.cells) <= 25
    for cell in code:
        assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 25, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef) or name == FRAMEWORKS, f"class {node.name} belongs into koala_lab"
            if isinstance(node, ast.For | ast.While) and name not in USERS_LOOPS:
                called = {
                    n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                }
                assert "backward" not in called, "a training loop belongs into koala_lab"
    assert Counter(t for c in book.cells for t in tags(c) if t != "nbval-check-output") <= Counter(TAGS)
    assert {t for c in book.cells for t in tags(c)} <= TAGS
    assert "parameters" in tags(code[0])
    assert re.search(rf'= nb\.start\("{name}"\)$', code[1].source, re.M), (
        'the second code cell ends with nb.start("...")'
    )
    for before, cell in zip([None, *book.cells], book.cells, strict=False):
        introduced = cell.cell_type == "markdown" or before.cell_type == "markdown" or "grid" in tags(before)
        assert introduced or cell in code[:2], f"no text before: {cell.source}"


@each
def test_the_first_cell_says_what_and_how_long_and_links_to_the_index(name: str) -> None:
    first = cells(name, "markdown")[0].source
    assert first.startswith("# ")
    assert "quick" in first, "name the running time"
    if name != "00_start_here":
        assert "00_start_here.ipynb" in first


@each
def test_it_is_committed_executed_in_normal_form_without_traces_of_a_machine(name: str) -> None:
    file = NOTEBOOKS[name]
    book, content = nbformat.read(file, as_version=4), file.read_text(encoding="utf-8")
    for number, cell in enumerate(cells(name), start=1):
        assert cell.execution_count == number, "execute it: koala notebook NAME --in-place"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"prints to stderr: {cell.source}"
    assert nbformat.writes(execute.normal_form(book)) + "\n" == content
    assert file.stat().st_size <= 300_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", content)


@each
def test_nbval_has_something_to_compare(name: str) -> None:
    checked = [c for c in cells(name) if "nbval-check-output" in tags(c)]
    assert checked
    assert all(text_of(c).strip() for c in checked), "a checked cell prints nothing"


def test_the_hooks_of_the_recipe_for_frameworks_act_on_training_only() -> None:
    """Section 6 of 02: no evaluation moves a weight, nor an averaged copy, to which hooks are copied."""
    [source] = [c.source for c in cells("02_going_further") if "register_forward_pre_hook" in c.source]
    recipe = source.split("framework(model, optimizer, loss)\nprint")[0]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    toy = SimpleNamespace(make_model=lambda: model, batch=None, STEPS=0)
    names: dict[str, Any] = {"toy": toy, "torch": torch, "KoalaM": KoalaM}
    exec(recipe, names)
    optimizer, x, y = names["optimizer"], torch.randn(8, 3), torch.randn(8)

    def train() -> None:
        optimizer.zero_grad()
        names["loss"](model(x), y).backward()
        optimizer.step()

    def weights() -> list[Any]:
        return [p.detach().clone() for p in model.parameters()]

    for _ in range(2):
        train()
    before = weights()
    names["loss"](model.eval()(x), y)  # with gradients: it forgets no_grad
    with torch.no_grad():
        names["loss"](model.train()(x), y)  # it forgets eval
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.optim.swa_utils.update_bn([x], averaged)
    with torch.no_grad():
        names["loss"](averaged.train()(x), y)
    assert all(map(torch.equal, weights(), before))
    train()
    assert not any(map(torch.equal, weights()[:1], before))


def test_mekas_algorithm_stands_beside_lines_of_the_reference() -> None:
    source = Path(reference.__file__).with_name("meka.py").read_text(encoding="utf-8")
    text = "\n".join(c.source for c in cells("meka/12_step_size_rules", "markdown"))
    lines = re.findall(r"^\| [^|]+ \| `([^`|]+)` \|$", text.split("appendix A) beside the code")[1], re.M)
    assert len(lines) > 15
    assert [line for line in lines if line not in source] == []


# ---------------------------------------------------------------- claims

ALL_CLAIMS = {i: c for f in sorted(paths.claims_dir().glob("*.yaml")) for i, c in claims.load(f.stem).items()}


@each
def test_claim_ids_in_a_notebook_exist(name: str) -> None:
    named = {i for c in cells(name) + cells(name, "markdown") for i in CLAIM_ID.findall(c.source)}
    assert named <= set(ALL_CLAIMS)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_notebook_judges_exactly_its_claims(name: str) -> None:
    """``ctx.verdicts()`` refuses to leave one out, and counts those that it had."""
    mine = {i for i, c in ALL_CLAIMS.items() if c.notebook == name}
    printed = "".join(text_of(c) for c in cells(name))
    assert re.findall(r"^(\d+) claims(?: in all)?$", printed, re.M) == [str(len(mine))]


def test_every_claim_has_a_notebook() -> None:
    assert {c.notebook for c in ALL_CLAIMS.values()} <= set(ANSWERS)


# ---------------------------------------------------------------- the grammar


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """All statements below some, at any depth."""
    return [n for top in body for n in ast.walk(top) if isinstance(n, ast.stmt)]


def slips(source: str) -> list[str]:
    """What a cell does against the grammar: one statement per line, 100 columns, no code golf."""
    found = [f"{len(line)} columns: {line}" for line in source.splitlines() if len(line) > 100]
    every = statements(ast.parse(source).body)
    lines = Counter(s.lineno for s in every)
    found += [f"{n} statements in line {line}" for line, n in lines.items() if n > 1]
    for s in every:
        if isinstance(s, ast.Expr) and isinstance(s.value, ast.Tuple):
            found.append(f"a tuple as a statement in line {s.lineno}")
        if isinstance(s, ast.Assign) and isinstance(s.value, ast.Lambda):
            found.append(f"a function without a def in line {s.lineno}")
        if isinstance(s, ast.ClassDef):
            found.append(f"a class in line {s.lineno}")
    return found


@pytest.mark.parametrize(
    ("source", "slip"),
    [
        ("a = 1; b = 2", "2 statements"), ("if a: b = 2", "2 statements"), ("f(), g()", "tuple as a statement"),
        ("f = lambda x: x", "function without"), ("class A:\n    pass", "a class"), ("a = " + "1" * 100, "104 columns"),
    ],
)  # fmt: skip
def test_slips_are_seen(source: str, slip: str) -> None:
    assert any(slip in found for found in slips(source))
    assert slips("a = 1\nif a:\n    b = (2, 3)") == []


@pytest.mark.parametrize("name", [*ANSWERS, TEMPLATE.stem])
def test_the_grammar(name: str) -> None:
    book = nbformat.read(NOTEBOOKS.get(name, TEMPLATE), as_version=4)
    code = [c for c in book.cells if c.cell_type == "code"]
    assert not [slip for c in code for slip in slips(c.source)]
    text = [c.source for c in book.cells if c.cell_type == "markdown"]
    headings = [line for source in text for line in source.splitlines() if line.startswith("## ")]
    assert headings.index(FOUND) <= 2, "begin with what was found"
    assert any(h.startswith("## Deviations") for h in headings)
    first_figure = next((i for i, c in enumerate(book.cells) if "figure(" in c.source), len(book.cells))
    assert next(i for i, c in enumerate(book.cells) if FOUND in c.source) < first_figure
    [last] = [i for i, c in enumerate(code) if c.source.splitlines()[-1] == "ctx.verdicts()"]
    assert not any("judge(" in c.source or "judge_table(" in c.source for c in code[last + 1 :]), "judged, never saved"
    printed = "".join(output.get("text", "") for output in code[last].outputs)
    assert max(map(len, printed.splitlines())) <= 100


def test_the_template_runs(tmp_path: Path) -> None:
    execute.execute(TEMPLATE, tmp_path / "made.ipynb", {})
    book = nbformat.read(tmp_path / "made.ipynb", as_version=4)
    assert "0 claims in all" in "".join(text_of(c) for c in book.cells if c.cell_type == "code")
    assert TEMPLATE.stem not in NOTEBOOKS


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("file", PRESETS, ids=lambda f: f"{f.relative_to(paths.presets())}")
def test_a_preset_overrides_parameters_that_exist_with_the_right_types(file: Path) -> None:
    preset, name = file.relative_to(paths.presets()).with_suffix("").as_posix().split("/", 1)
    assert preset in ("desktop", "paper")
    schema = nb.declared_in(NOTEBOOKS[name])
    given = nb.overrides(NOTEBOOKS[name], preset)
    resolve(schema, given)
    assert any(given[p] != schema[p].default for p in given if p != "preset"), "a preset is another scale"
    grid = nb.grid_of(NOTEBOOKS[name], preset)
    assert len({c.key for c in grid}) == len(grid)
    # YAML 1.1 reads 010 as 8, 1_0 as 10, 3:30 as 210 and `on` as True; YAML 1.2 and people do not.
    plain = yaml.load(file.read_text(), yaml.BaseLoader)
    for parameter, value in given.items():
        if not isinstance(value, str | list):
            text = plain[parameter]
            assert text in ("true", "false", "null") or re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?", text), text


# ---------------------------------------------------------------- nbval


def nbval(folder: Path) -> dict[str, str]:
    """Outcome of each notebook of a folder under nbval."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-current-env",
        "-rA",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    done = subprocess.run([*command, "."], cwd=folder, env=environment, capture_output=True, text=True)
    outcome = dict.fromkeys((f.stem for f in folder.glob("*.ipynb")), "passed")
    assert re.search(r"\d+ passed", done.stdout), done.stdout + done.stderr
    for line in re.findall(r"^(?:FAILED|ERROR) \S*?(\w+)\.ipynb", done.stdout, re.M):
        outcome[line] = "failed"
    return outcome


def flip(source: Path, target: Path) -> None:
    """Copy a notebook with one digit changed in the output of a checked cell."""
    book = nbformat.read(source, as_version=4)
    checked = [c for c in book.cells if "nbval-check-output" in tags(c)]
    stream = next(o for c in checked for o in c.outputs if re.search(r"\d", o.get("text", "")))
    stream.text = re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), stream.text, count=1)
    nbformat.write(book, target)


def test_nbval_fails_when_a_stored_digit_is_changed(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("print(f'{1 / 3:.3f}')", metadata={"tags": ["nbval-check-output"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "plain.ipynb")
    (tmp_path / "nbval").mkdir()
    (tmp_path / "nbval" / "pytest.ini").write_text("[pytest]\n")
    made = tmp_path / "nbval" / "made.ipynb"
    execute.execute(tmp_path / "plain.ipynb", made, {})
    flip(made, made.with_stem("made_flipped"))
    flip(NOTEBOOKS["01_notation"], made.with_stem("real_flipped"))
    assert nbval(made.parent) == {"made": "passed", "made_flipped": "failed", "real_flipped": "failed"}
