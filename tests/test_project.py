"""Files beside the code that would otherwise drift apart from it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from koala_lab import paths
from koala_lab.claims import replace_block

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAB = tomllib.loads((ROOT / "lab" / "pyproject.toml").read_text())["project"]
ON_CONDA_FORGE = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
PIP_ONLY = {"snakemake", "pytorch-optimizer"}  # come with `pip: -e ./lab[all]`
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


def test_profiles_name_options_of_snakemake() -> None:
    from snakemake.cli import get_argument_parser

    known = {name.removeprefix("--") for name in get_argument_parser()._option_string_actions}
    for file in sorted((ROOT / "profiles").glob("*/config.yaml")):
        assert set(yaml.safe_load(file.read_text())) <= known, file


def test_citation_names_the_version_and_the_three_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == LIBRARY["version"]
    assert citation["license"] == LIBRARY["license"] == "Apache-2.0"
    text = (ROOT / "CITATION.cff").read_text()
    for identifier in ("10.1609/aaai.v36i6.20599", "arXiv:2011.04803", "arXiv:2009.13586"):
        assert identifier in text
    assert len(citation["references"]) == 3


def test_the_readme_has_one_scoreboard_block_that_the_report_can_refresh() -> None:
    text = (ROOT / "README.md").read_text()
    assert "| new |" in replace_block(text, "| new |")


def test_a_test_run_has_a_store_and_a_report_of_its_own() -> None:
    for folder in (paths.runs_dir(), paths.report_dir(), paths.figures_dir()):
        assert not folder.is_relative_to(ROOT)
        assert folder.parent == paths.runs_dir().parent  # the one that conftest.py made, on every worker
