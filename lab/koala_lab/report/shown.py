"""What there is to show: executed, failed and committed notebooks, figures and verdicts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from koala_lab import claims, paths
from koala_lab import notebook as nb
from koala_lab.checks import check_fields
from koala_lab.files import read_json

EXECUTED, FAILED, COMMITTED, DAMAGED = "executed", "failed", "not executed", "damaged"


class Shown(NamedTuple):
    """A notebook of the repository, and the file that is shown of it.

    Attributes:
        name: Path below ``notebooks/`` without suffix.
        title: Its heading; of a damaged one the reason.
        file: The executed notebook, the copy that its failure left, or the committed notebook.
        state: ``executed``, ``failed``, ``not executed`` or ``damaged``.
    """

    name: str
    title: str
    file: Path
    state: str


class Picture(NamedTuple):
    """A figure and what its sidecar says.

    Attributes:
        name: Path below ``figures/`` without suffix.
        png: The picture; PDF, JSON and CSV lie beside it.
        origin: The sidecar: ``notebook``, ``runs``, ``parameters`` and more.
        shown: Whether its notebook shows it, so that it has an address there.
    """

    name: str
    png: Path
    origin: dict[str, Any]
    shown: bool = False

    @property
    def address(self) -> str:
        """Return its place, from the first page of the site."""
        page = f"notebooks/{self.origin['notebook']}.html"
        return f"{page}#figure-{Path(self.name).name}" if self.shown else page


def anything_executed() -> bool:
    """Say whether the report folder holds what was executed; without it the committed state is shown."""
    return any((paths.report_dir() / "notebooks").rglob("*.ipynb"))


def notebooks() -> list[Shown]:
    """Return every notebook of the repository, in reading order."""
    return [_shown(name, file) for name, file in nb.all_notebooks().items()]


def _shown(name: str, committed: Path) -> Shown:
    executed = paths.report_dir() / "notebooks" / f"{name}.ipynb"
    failed = executed.with_name(f"{executed.stem}.failed.ipynb")
    for file, state in ((failed, FAILED), (executed, EXECUTED), (committed, COMMITTED)):
        if file.exists():
            try:
                return Shown(name, nb.title_of(file), file, state)
            except ValueError as error:
                if state != FAILED:  # a kernel that was killed leaves half a file
                    return Shown(name, str(error), file, DAMAGED)
                return Shown(name, _title(name, committed), committed, FAILED)
    return Shown(name, f"{committed} is gone", committed, DAMAGED)


def _title(name: str, committed: Path) -> str:
    try:
        return nb.title_of(committed)
    except ValueError:
        return name


def figures() -> list[Picture]:
    """Return the figures of the report, and where there is none of a name, the committed one."""
    found: dict[str, Picture] = {}
    known = nb.all_notebooks()
    for folder in dict.fromkeys((paths.figures_dir(), paths.ROOT / "figures")):
        for sidecar in sorted(folder.rglob("*.json")):
            name = sidecar.relative_to(folder).with_suffix("").as_posix()
            try:
                origin = read_json(sidecar)
                if "notebook" not in origin:  # the picture of the README
                    continue
                check_fields(origin, {"notebook": str, "runs": list})
            except ValueError as error:
                warnings.warn(
                    f"{sidecar} is no file of a figure ({error!r}), which is left out: run its notebook", stacklevel=2
                )
                continue
            png = sidecar.with_suffix(".png")
            if origin["notebook"] in known and png.exists():  # the template is not
                found.setdefault(name, Picture(name, png, origin))
    return [found[name] for name in sorted(found)]


def verdicts() -> list[claims.Verdict]:
    """Return the report's verdicts; where it holds no notebooks, the committed ones of what has not run since."""
    saved = claims.saved()
    if anything_executed():
        return saved
    folder = paths.report_dir() / "verdicts"
    notebook = {c.id: c.notebook for paper in claims.available() for c in claims.load(paper).values()}
    old = [v for v in committed_verdicts() if v.claim_id in notebook]
    return saved + [v for v in old if not (folder / f"{notebook[v.claim_id]}.json").exists()]


def committed_verdicts() -> list[claims.Verdict]:
    """Return the verdicts that the repository shows; none, with a warning, where their file is damaged."""
    try:
        return claims.read_verdicts(paths.results_dir() / "verdicts.json")
    except ValueError as error:
        warnings.warn(f"{error}; the report does without them", stacklevel=2)
        return []
