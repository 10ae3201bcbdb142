"""Runs, then notebooks, then the report.

    snakemake --cores all                         quick: the notebooks train what they need
    snakemake --cores all --config preset=desktop each run is a job (also preset=paper, device=cuda)

With --workflow-profile profiles/local or profiles/slurm it goes on after a kill.
"""

import hashlib
import os
import shlex
import sys
from pathlib import Path

import koala_lab
import koala_lib
from koala_lab import notebook as nb
from koala_lab import paths
from koala_lab.bench.cost import Costs, minutes
from koala_lab.cli import FAILED, plan
from koala_lab.runs import Store

LIBRARY, LAB = (Path(package.__file__).parent for package in (koala_lib, koala_lab))
if unknown := config.keys() - {"preset", "device"}:
    sys.exit(f"koala: --config has no {', '.join(sorted(unknown))}; it has preset and device")
PRESET = config.get("preset", "quick")
DEVICE = config.get("device", "cpu")
KOALA = f"{shlex.quote(sys.executable)} -m koala_lab.cli"
REPORT = os.path.relpath(paths.report_dir() if PRESET == "quick" else paths.report_dir() / PRESET)
INTO = f"KOALA_REPORT={shlex.quote(os.path.abspath(REPORT))}"

NOTEBOOKS = {
    name: os.path.relpath(path)
    for name, path in nb.all_notebooks().items()
    if PRESET == "quick" or nb.preset_file(name, PRESET).exists()
}
if not NOTEBOOKS:
    sys.exit(f"koala: no notebook has the preset {PRESET!r}")

# A job leaves a mark instead of owning the stored run, because Snakemake removes the output of a job that it repeats.
# A run that has a result but no mark was made elsewhere and needs no job.
GRIDS = {} if PRESET == "quick" else {n: {c.key: c for c in grid} for n, grid in plan(PRESET).items()}
CONFIGS = {key: config for grid in GRIDS.values() for key, config in grid.items()}
MARK = REPORT + "/runs/{key}"
STORE = Store()
KNOWN = {key: result for key in CONFIGS if (result := STORE.get(key))}
COSTS = Costs(KNOWN.values(), device=DEVICE)


def marks(name):
    return [m for k in GRIDS.get(name, {}) if os.path.exists(m := MARK.format(key=k)) or k not in KNOWN]


def digest(*files):
    """One word for the content of many files; as a parameter of a rule it repeats the rule when the content changes."""
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()[:16]


BESIDE = {LAB / "bench/cost.py", LAB / "cli.py", *(LAB / "report").rglob("*.py")}  # no notebook uses these
SHARED = digest(
    *LIBRARY.rglob("*.py"),
    *(f for f in LAB.rglob("*.py") if f not in BESIDE),
    *paths.claims_dir().glob("*.yaml"),
    *paths.notebooks().glob("*.py"),  # scripts that notebooks launch
    *paths.results_dir().glob("*.json"),  # the committed benchmark
)


def stored(name):
    """Results of other presets that a notebook shows."""
    files = paths.results_dir().glob(f"*/{name}.json")
    return sorted(os.path.relpath(f) for f in files if f.relative_to(paths.results_dir()).parts[0] != PRESET)


def overrides(name):
    return [] if PRESET == "quick" else os.path.relpath(nb.preset_file(name, PRESET))


localrules:
    all,
    report,


rule all:
    input:
        f"{REPORT}/index.html",


rule run:
    output:
        touch(MARK),
    resources:
        runtime=lambda w, attempt: minutes(COSTS.seconds(CONFIGS[w.key]), attempt=attempt),
        gpu=int(DEVICE.startswith("cuda")),
    message:
        "run {wildcards.key}"
    shell:
        "{KOALA} run --preset {PRESET} --device {DEVICE} --key {wildcards.key} || [ $? -eq {FAILED} ]"


rule notebook:
    input:
        notebook=lambda w: NOTEBOOKS[w.name],
        overrides=lambda w: overrides(w.name),
        runs=lambda w: marks(w.name),
        stored=lambda w: stored(w.name),
    output:
        REPORT + "/notebooks/{name}.ipynb",
    params:
        shared=SHARED,
    message:
        "notebook {wildcards.name}"
    shell:
        "{INTO} {KOALA} notebook {input.notebook:q} --preset {PRESET} -o {output:q}"


rule report:
    input:
        expand(REPORT + "/notebooks/{name}.ipynb", name=NOTEBOOKS),
    output:
        REPORT + "/index.html",
    params:
        shared=digest(*(f for f in (LAB / "report").rglob("*") if f.is_file() and f.suffix != ".pyc"), paths.equations()),
    message:
        "report"
    shell:
        "{INTO} {KOALA} report"


onerror:
    shell("{INTO} {KOALA} report && echo 'The report has what succeeded: {REPORT}/index.html'")
