"""The report: a site of executed notebooks, claims, equations and the library. A view of files; it trains nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from koala_lab import claims, paths
from koala_lab.files import write_bytes
from koala_lab.report import claim_pages, overview, pages, shown, staging

_HOW = """Made by `make figures` from the verdicts of the notebooks; nothing here is typed. A table lists what is
decided: `reproduced`, `contradicted`, or `mixed`, where data sets or conditions differ. The rest is counted:
`inconclusive` (the measurements cannot tell, or nothing could have failed, or no network has learned the task),
`not run yet`, and `not run at this scale`, where the claim lists no test for it. † marks verdicts that another
processor flips.
"""

_PAGES = ("*.html", *(f"{folder}/**/*.html" for folder in ("notebooks", "claims", "equations", "api", "code")))
_CONFIGURATION = Path(__file__).parent / "site"


def build() -> Path:
    """Make the site in the report folder from what lies there; from the committed notebooks where nothing was executed.

    Returns:
        Its first page, ``index.html``.

    Raises:
        RuntimeError: If Sphinx cannot make it.
    """
    from sphinx.cmd.build import build_main

    site = paths.report_dir()
    with TemporaryDirectory() as work:
        sources, extra, made = (Path(work) / name for name in ("sources", "extra", "made"))
        assemble(sources, extra)
        options = ["-q", "-E", "-d", f"{work}/doctrees", "-c", str(_CONFIGURATION), "-D", f"html_extra_path={extra}"]
        if code := build_main([*options, str(sources), str(made)]):
            raise RuntimeError(f"Sphinx cannot make the site of {site}: it ended with {code}; see its messages above")
        for page in (page for pattern in _PAGES for page in site.glob(pattern)):
            page.unlink(missing_ok=True)  # some are of notebooks that are no more
        for folder in ("_images", "_downloads", "_static"):
            shutil.rmtree(site / folder, ignore_errors=True)
        shutil.copytree(made, site, dirs_exist_ok=True)
    return site / "index.html"


def assemble(sources: Path, extra: Path) -> None:
    """Write what Sphinx makes the site from.

    Args:
        sources: Folder for its pages.
        extra: Folder for what the site has besides.
    """
    sources.mkdir(parents=True)
    fresh = shown.anything_executed()
    notebooks, pictures, verdicts = shown.notebooks(), shown.figures(), shown.verdicts()
    by_name = {picture.name: picture for picture in pictures}
    placed = {name for each in notebooks for name in staging.stage(each, sources, by_name, fresh)}
    differing = claims.differences(claims.saved(), shown.committed_verdicts())
    pictures = [picture._replace(shown=picture.name in placed) for picture in pictures]
    claim_pages.write(sources, verdicts, notebooks, pictures, claim_pages.run_keys(notebooks))
    pages.write(sources, extra, notebooks, pictures, claim_pages.judged(verdicts), differing, fresh)


def committed() -> Path:
    """Return where the verdicts that the repository shows are committed."""
    return paths.results_dir() / "verdicts.json"


def differences(folder: Path | None = None) -> list[str]:
    """Return where the verdicts in the report folder differ from those below another one, or from the committed ones.

    Args:
        folder: Such as the ``verdicts`` of a report that was made under another kernel path.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder of verdicts")
    there = claims.read_verdicts(committed()) if folder is None else claims.saved(folder)
    return claims.differences(claims.saved(), there)


def scoreboard_page(verdicts: list[claims.Verdict]) -> str:
    """Return SCOREBOARD.md."""
    return f"# Scoreboard\n\n{_HOW}\n{claims.scoreboard(verdicts)}"


def refresh_committed() -> list[Path]:
    """Write what the repository shows of the verdicts: README's count rows, SCOREBOARD.md, picture, verdicts."""
    verdicts = claims.saved()
    readme, board = paths.ROOT / "README.md", paths.ROOT / "SCOREBOARD.md"
    text = claims.replace_block(readme.read_text(encoding="utf-8"), claims.counts(verdicts))
    write_bytes(readme, text.encode())
    write_bytes(board, scoreboard_page(verdicts).encode())
    return [readme, board, overview.save(), claims.write_verdicts(verdicts, committed())]
