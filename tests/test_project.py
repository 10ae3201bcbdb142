"""Files beside the code that would otherwise drift apart from it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from functools import cache
from pathlib import Path

import jsonschema  # comes with nbformat
import pytest
import torch
import yaml
from packaging.specifiers import SpecifierSet

from koala_lab import claims, paths, report
from koala_lab.claims import BEGIN, END, replace_block
from koala_lab.report import overview

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAB = tomllib.loads((ROOT / "lab" / "pyproject.toml").read_text())["project"]
ON_CONDA_FORGE = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
FRAMEWORKS = {"lightning", "transformers", "accelerate", "skorch", "pytorch-ignite"}
PIP_ONLY = {"snakemake", "pytorch-optimizer", "sphinx-mathjax-offline"} | FRAMEWORKS  # come with `pip: -e ./lab[all]`
ON_CLUSTERS = {"slurm"}  # extras that are not part of `all`


def _split(requirement: str) -> tuple[str, str]:
    name, bound = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
    return name.lower().replace("_", "-"), bound


def test_environment_yml_has_the_requirements_of_both_distributions_with_the_same_bounds() -> None:
    extras = LAB["optional-dependencies"]
    listed = [r for extra, requirements in extras.items() if extra not in {"all", *ON_CLUSTERS} for r in requirements]
    wanted = dict(map(_split, LIBRARY["dependencies"] + LAB["dependencies"] + listed))
    assert wanted.pop("koala-lib") == ""
    wanted = {ON_CONDA_FORGE.get(n, n): bound for n, bound in wanted.items() if n not in PIP_ONLY}
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    *conda, last = dependencies
    assert last == {"pip": ["-e .", "-e ./lab[all]"]}
    given = dict(map(_split, conda))
    assert given.pop("pip") == ""
    assert given.pop("python") == LIBRARY["requires-python"] == LAB["requires-python"]
    assert given == wanted


def test_what_is_installed_here_is_within_the_bounds_of_environment_yml() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    on_pypi = {conda: pypi for pypi, conda in ON_CONDA_FORGE.items()}
    for name, bound in map(_split, environment["dependencies"][:-1]):
        if name == "python":
            found = ".".join(map(str, sys.version_info[:3]))
        else:
            found = importlib.metadata.version(on_pypi.get(name, name))
        assert SpecifierSet(bound).contains(found), f"{name}{bound}: {found}"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What the two distributions are built from, in a folder with a space and an umlaut in its name."""
    folder = tmp_path / "Müller's copy"
    (folder / "lab").mkdir(parents=True)
    for name in ("pyproject.toml", "lab/pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "environment.yml"):
        shutil.copy(ROOT / name, folder / name)
    for package in ("koala_lib", "lab/koala_lab"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    (folder / "tests" / "test_of_the_checkout.py").touch()
    return folder


def python(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pip_section_of_environment_yml_works_in_a_folder_with_spaces(copied: Path) -> None:
    """As conda does: the lines go into a file beside environment.yml, and pip runs there, wherever conda was called."""
    lines = yaml.safe_load((copied / "environment.yml").read_text())["dependencies"][-1]["pip"]
    requirements = copied / "condaenv.x1y2.requirements.txt"
    requirements.write_text("\n".join(lines))
    offline = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    said = python(copied, "-m", "pip", "install", "-U", *offline, "-r", str(requirements))
    version = LIBRARY["version"]
    assert f"Would install koala-lab-{version} koala-lib-{version}" in said


def test_a_source_distribution_has_no_tests_without_their_helpers(copied: Path) -> None:
    build = "import setuptools.build_meta as b; print(b.build_sdist('made'))"
    file = copied / "made" / python(copied, "-c", build).split()[-1]
    with tarfile.open(file) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "koala_lib/optim/koala.py" in names
    assert not [name for name in names if name.startswith(("tests", "lab"))]


def test_the_library_needs_torch_alone_and_the_two_distributions_share_a_version() -> None:
    assert [_split(r)[0] for r in LIBRARY["dependencies"]] == ["torch"]
    assert LIBRARY["version"] == LAB["version"]


def test_all_is_all_extras_but_those_for_clusters() -> None:
    extras = dict(LAB["optional-dependencies"])
    [everything] = extras.pop("all")
    assert everything == f"koala-lab[{','.join(e for e in extras if e not in ON_CLUSTERS)}]"


def test_every_make_target_has_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", text, re.M)[0].split()) - {"FORCE"}
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make (\w+) +\S", shown, re.M)) == targets


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Makefile and an environment whose packages come from there, as `make setup` leaves it."""
    folder = tmp_path_factory.mktemp("a checkout")
    for name in ("lab", ".ci"):
        (folder / name).mkdir()
    for name in ("Makefile", ".ci/environment.py", "pyproject.toml", "lab/pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for package in ("koala_lib", "lab/koala_lab"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    venv.create(folder / ".venv", symlinks=True)
    [site] = (folder / ".venv" / "lib").glob("python*/site-packages")
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").touch()
    (site / "editable.pth").write_text(f"{folder}\n{folder / 'lab'}\n")
    (folder / ".venv" / ".installed").touch()
    return folder


def setup_says(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "TORCH", "MAKEFLAGS", "PYTHONPATH")}
    command = ["make", "-n", "-C", folder, "setup", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_keeps_an_environment_that_is_whole(checkout: Path) -> None:
    for arguments in ((), (f"PYTHON={sys.executable}",)):
        assert "Nothing to be done" in setup_says(checkout, *arguments)


def test_make_notices_an_environment_that_cannot_be_used(checkout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    rebuilt = "rm -rf .venv"
    assert f'.venv belongs to {checkout}; it is made anew" && {rebuilt}' in setup_says(copy)
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    assert f'and not 3.99; it is made anew" && {rebuilt}' in setup_says(checkout, f"PYTHON={other}")
    [site] = (copy / ".venv" / "lib").glob("python*/site-packages")
    (site / "editable.pth").write_text(f"{tmp_path / 'moved'}\n")
    assert f'.venv belongs to a folder that is gone; it is made anew" && {rebuilt}' in setup_says(copy)
    shutil.rmtree(site / "pip")
    assert f'.venv has no pip; it is made anew" && {rebuilt}' in setup_says(copy)
    (copy / ".venv" / "bin" / "python").unlink()
    assert f'.venv does not run; it is made anew" && {rebuilt}' in setup_says(copy)


def test_make_keeps_caches_in_the_checkout_where_the_home_folder_takes_none(tmp_path: Path) -> None:
    for home, inside in (("/nowhere", True), (str(tmp_path), False)):
        command = ["make", "-C", ROOT, "--no-print-directory", "--eval", "caches: ; @env", "caches"]
        environment = {"PATH": os.environ["PATH"], "HOME": home}
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        caches = re.findall(r"^(?:XDG_CACHE_HOME|IPYTHONDIR|JUPYTER_\w+|MPLCONFIGDIR)=(.*)$", shown, re.M)
        assert len(caches) == 6 * inside
        assert all(folder.startswith(f"{ROOT}/.snakemake/") for folder in caches)


def test_profiles_name_options_of_snakemake() -> None:
    from snakemake.cli import get_argument_parser

    known = {name.removeprefix("--") for name in get_argument_parser()._option_string_actions}
    for file in sorted((ROOT / "profiles").glob("*/config.yaml")):
        assert set(yaml.safe_load(file.read_text())) <= known, file


def test_citation_names_the_version_and_the_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == LIBRARY["version"]
    assert citation["license"] == LIBRARY["license"] == "Apache-2.0"
    text = (ROOT / "CITATION.cff").read_text()
    for identifier in ("10.1609/aaai.v36i6.20599", "arXiv:2506.04432", "arXiv:2011.04803", "arXiv:2009.13586"):
        assert identifier in text
    assert len(citation["references"]) == 4


# What the schema of the Citation File Format 1.2.0 asks of the keys that are used here.
PERSON = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"family-names": {"type": "string"}, "given-names": {"type": "string"}, "name": {"type": "string"}},
}
PEOPLE = {"type": "array", "minItems": 1, "uniqueItems": True, "items": PERSON}
TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer"}
REFERENCE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["authors", "title", "type"],
    "properties": {
        "type": {"enum": ["article", "conference-paper"]},
        "authors": PEOPLE,
        "doi": {"type": "string", "pattern": r"^10\.\d{4,9}(\.\d+)?/[A-Za-z0-9:/_;\-\.\(\)\[\]\\]+$"},
        "identifiers": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "value"],
                "properties": {"type": {"enum": ["doi", "url", "swh", "other"]}, "value": TEXT},
            },
        },
        **dict.fromkeys(("title", "collection-title", "notes"), TEXT),
        **dict.fromkeys(("volume", "issue", "start", "end", "year"), COUNT),
    },
}
CITATION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["authors", "cff-version", "message", "title"],
    "properties": {
        "cff-version": {"const": "1.2.0"},
        "type": {"enum": ["software", "dataset"]},
        "date-released": {"type": "string", "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "authors": PEOPLE,
        "references": {"type": "array", "minItems": 1, "uniqueItems": True, "items": REFERENCE},
        **dict.fromkeys(("abstract", "license", "message", "title", "version"), TEXT),
    },
}


def test_the_citation_file_is_valid_and_of_the_latest_release() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    citation = yaml.load(text, yaml.BaseLoader) | {"references": yaml.safe_load(text)["references"]}
    jsonschema.validate(citation, CITATION)
    for wrong in ({"year": "2022"}, {"type": "paper"}, {"journl": "x"}, {"authors": []}):
        damaged = citation | {"references": [citation["references"][0] | wrong]}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(damaged, CITATION)
    releases = re.findall(r"^## \[(\d\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert releases[0] == (citation["version"], citation["date-released"])


def test_the_readme_has_one_scoreboard_block_that_the_report_can_refresh() -> None:
    text = (ROOT / "README.md").read_text()
    assert "| new |" in replace_block(text, "| new |")


def test_the_readme_is_short_and_its_code_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    names = {"model": model, "x": x, "y": y, "loss_fn": torch.nn.CrossEntropyLoss(reduction="none")}
    exec(code, names)
    assert names["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(x), y).item(), abs=1.0)


@cache
def files_and_folders() -> set[str]:
    found = {Path(name) for name in os.listdir(ROOT)} - {Path(".venv"), Path(".git")}
    found |= {file.relative_to(ROOT) for folder in found for file in (ROOT / folder).rglob("*")}
    return {path.as_posix() for path in found} | {p.with_suffix("").as_posix() for p in found if p.suffix == ".ipynb"}


@pytest.mark.parametrize("page", ["README.md", "SCOREBOARD.md", "CONTRIBUTING.md"])
def test_what_a_page_links_to_and_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link} - {""}
    inline = {
        word for word in re.findall(r"`([\w./-]+)`", text) if re.search(r"/|\.(py|md|toml|yaml|yml|ipynb)$", word)
    }
    for path in links | inline:
        assert any(f"/{name}".endswith("/" + path.rstrip("/")) for name in files_and_folders()), path


def test_readme_and_scoreboard_show_the_committed_verdicts_on_the_claims_as_they_are() -> None:
    verdicts = claims.read_verdicts(report.committed())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replace_block(readme, claims.counts(verdicts)) == readme, "run `make figures`"
    assert report.scoreboard_page(verdicts) == (ROOT / "SCOREBOARD.md").read_text(encoding="utf-8"), (
        "run `make figures`"
    )


def test_the_picture_shows_the_count_rows_of_the_readme() -> None:
    rows = overview.count_rows((ROOT / "README.md").read_text())
    assert [row._asdict() for row in rows] == json.loads((ROOT / "figures" / "overview.json").read_text())["rows"]
    assert sum(row.counts.get("reproduced", 0) for row in rows) > 0
    head = "| paper | scale | reproduced | contradicted | not run yet |\n|---|---|---|---|---|"
    lines = "| MEKA, 7 claims | quick | 2 | 0 | 5 |\n|  | paper | 0 | 0 | 7 |"
    exact = "3 exact statements (2 reproduced, 1 contradicted); 4 identities (4 reproduced)."
    table = f"{BEGIN}\n{head}\n{lines}\n\n- MEKA, without a scale, settled once: {exact}\n{END}"
    assert overview.count_rows(table) == [
        ("MEKA", 7, "exact", {"reproduced": 6, "contradicted": 1}),
        ("MEKA", 7, "quick", {"reproduced": 2}),
    ]


def test_a_test_run_has_a_store_and_a_report_of_its_own() -> None:
    for folder in (paths.runs_dir(), paths.report_dir(), paths.figures_dir()):
        assert not folder.is_relative_to(ROOT)
        assert folder.parent == paths.runs_dir().parent  # the one that conftest.py made, on every worker


def test_the_site_is_published_with_the_torch_of_the_makefile() -> None:
    ci, site = (
        yaml.load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(), yaml.BaseLoader)["jobs"]
        for name in ("ci", "site")
    )
    assert site["publish"]["env"]["TORCH"] == ci["test"]["env"]["TORCH"]
    runs = [step["run"] for step in site["publish"]["steps"] if "run" in step]
    assert runs == ["make site"]
    [upload] = [step for step in site["publish"]["steps"] if "upload-pages-artifact" in step.get("uses", "")]
    assert upload["with"]["path"] == paths.ROOT.joinpath("report").name


def test_the_workflow_runs_what_ci_runs_with_the_torch_of_the_makefile() -> None:
    workflow = yaml.load((ROOT / ".github" / "workflows" / "ci.yml").read_text(), yaml.BaseLoader)
    assert set(workflow["on"]) == {"push", "pull_request"}
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    [torch] = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert job["env"]["TORCH"] == f"{torch} --index-url https://download.pytorch.org/whl/cpu"
    assert f"{torch} --index-url" in (ROOT / "README.md").read_text()
