"""Claims with an address: one page per paper, and the table of all of them that a script filters."""

from __future__ import annotations

import html
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from koala_lab import claims, runs
from koala_lab import notebook as nb
from koala_lab.claims import ANY, NOT_RUN, PRESETS, Claim, Criterion, Verdict
from koala_lab.claims.judge import CONTRADICTED, INCONCLUSIVE, MIXED, REPRODUCED
from koala_lab.claims.scoreboard import NOT_YET
from koala_lab.report.equations import PAPERS
from koala_lab.report.shown import DAMAGED, Picture, Shown

Judged = Mapping[tuple[str, str], Verdict]  # by claim id and preset
Keys = Mapping[tuple[str, str], dict[str, list[str]]]  # by notebook and preset, the keys of the runs of each row

_RULES = {
    "value": "the 95 % interval of the mean lies within {0:g} of the paper's number",
    "better": "the 95 % interval of the paired difference lies above {0:g}",
    "no_worse": "the 90 % interval of the paired difference lies above -{0:g}",
    "on_par": "the 90 % interval of the paired difference lies within ± {0:g}",
    "insensitive": "the 90 % intervals of all pairs lie within ± {0:g}",
    "at_most": "the measured number is at most the expected one, tolerance {0:g}",
    "at_least": "the measured number is at least the expected one, tolerance {0:g}",
    "near": "the measured number is within {0:g} of the expected one",
    "never": "a count that must be 0 is 0, and is not 0 in a contrast",
    "vanishes": "it falls at least like the horizon to the power -{0:g} over three or more horizons",
    "holds": "the condition holds in every case",
}


def rule(criterion: Criterion) -> str:
    """Return how a claim is judged, as a sentence."""
    text = _RULES[criterion.test].format(criterion.margin)
    beyond = f"; contradicted only past {criterion.beyond:g}" if criterion.beyond is not None else ""
    seeds = f"; at least {criterion.n} seeds" if criterion.n else ""
    return text + beyond + seeds


def judged(verdicts: Iterable[Verdict]) -> Judged:
    """Return verdicts by claim and preset."""
    return {(v.claim_id, v.preset): v for v in verdicts}


def status(claim: Claim, preset: str, known: Judged) -> str:
    """Return the status of a claim at a preset, as the scoreboard counts it."""
    verdict = known.get((claim.id, preset))
    return verdict.status if verdict else NOT_YET if preset in claim.judge else NOT_RUN


def presets_of(claim: Claim) -> Sequence[str]:
    """Return the presets at which a claim can be judged; ``any`` for what has no scale."""
    return (ANY,) if claim.scale_free else PRESETS


def run_keys(notebooks: Iterable[Shown]) -> Keys:
    """Return the keys of the runs of every notebook and preset, by row; without a notebook that cannot be read."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    committed = nb.all_notebooks()
    for shown in (each for each in notebooks if each.state != DAMAGED):
        for preset in PRESETS:
            if preset != PRESETS[0] and not nb.preset_file(shown.name, preset).exists():
                continue
            try:
                declared = nb.declared_grid(committed[shown.name], preset)
            except ValueError as error:
                warnings.warn(f"{error}; its runs are not listed", stacklevel=2)
                continue
            if declared is not None:
                found[shown.name, preset] = {
                    row: [c.key for c in runs.expand({row: configs}, declared.seeds)]
                    for row, configs in declared.grid.items()
                }
    return found


def behind(claim: Claim, preset: str, keys: Keys) -> dict[str, list[str]]:
    """Return the keys of the runs that a claim is judged on, by row; all of its notebook where it names no row."""
    rows = keys.get((claim.notebook, PRESETS[0] if preset == ANY else preset), {})
    named = [row for row in ((claim.row,) if claim.row else claim.arms) if row in rows]
    return {row: rows[row] for row in named} or dict(rows)


def write(
    folder: Path, verdicts: Iterable[Verdict], notebooks: Sequence[Shown], pictures: Sequence[Picture], keys: Keys
) -> None:
    """Write ``claims/index.md`` and ``claims/<paper>.md`` into the folder of the site's sources."""
    known = judged(verdicts)
    (folder / "claims").mkdir(exist_ok=True)
    for paper in claims.available():
        _paper(paper, folder, known, notebooks, pictures, keys)
    (folder / "claims" / "index.md").write_text(_index(known), encoding="utf-8")


def _paper(
    paper: str, folder: Path, known: Judged, notebooks: Sequence[Shown], pictures: Sequence[Picture], keys: Keys
) -> None:
    every = {c.id: {p: behind(c, p, keys) for p in presets_of(c)} for c in claims.load(paper).values()}
    (folder / "claims" / f"{paper}_runs.json").write_text(json.dumps(every, indent=1), encoding="utf-8")
    titles = {s.name: s.title for s in notebooks}
    groups: dict[str, list[Claim]] = {}
    for claim in claims.load(paper).values():
        groups.setdefault(claim.where.split(",")[0], []).append(claim)
    parts = [
        f"# {claims.paper_name(paper)}: its claims\n",
        f"{len(every)} numbers and statements of the paper, in its order. Every claim keeps its address, "
        f"`claims/{paper}.html#` and its id. All of them in one table: [the claims of all papers](index.md). "
        f"The keys of the runs behind each: {{download}}`{paper}_runs.json`.\n",
    ]
    for title, group in groups.items():
        parts.append(f"\n## {title}\n\n```{{index}} ! {title.replace(';', ',')}\n```\n")  # search finds it first
        parts += [f"{_sources(name, titles, pictures, folder)}\n" for name in dict.fromkeys(c.notebook for c in group)]
        shared = [note for note, n in Counter(c.note for c in group if c.note).items() if n > 1]
        parts += [f"{note}\n" for note in shared]
        parts += [_claim(c, known, every[c.id], "" if c.note in shared else c.note, titles) for c in group]
    (folder / "claims" / f"{paper}.md").write_text("\n".join(parts), encoding="utf-8")


def _sources(name: str, titles: Mapping[str, str], pictures: Sequence[Picture], folder: Path) -> str:
    """Return links to a notebook, its figures and its stored runs."""
    if name not in titles:
        return f"`{name}` is not in this report."
    links = [f"[{titles[name]}](/notebooks/{name}.ipynb)"]
    for picture in (p for p in pictures if p.origin["notebook"] == name):
        short = html.escape(Path(picture.name).name)
        links.append(f'<a href="../{picture.address}">figure {short}</a>')
    for preset in PRESETS:
        file, place = runs.results_file(preset, name), f"results/{preset}/{name}.json"
        if file.exists():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / place)
            links.append(f"{{download}}`runs at {preset} <../{place}>`")
    return " · ".join(links)


def _claim(
    claim: Claim,
    known: Judged,
    behind_it: Mapping[str, Mapping[str, Sequence[str]]],
    note: str,
    titles: Mapping[str, str],
) -> str:
    """Return one claim as MyST, with the note that it alone has, inside an HTML element that carries its id."""
    value = claim.kind == "value"
    printed = f" · printed: **{claim.paper}**" if claim.paper != "statement" else ""
    place = f"{claim.text if value else claim.where} · {claim.source} · {claim.kind}{printed}"
    rates = f" · rates: {', '.join(f'{row} {how}' for row, how in claim.rates.items())}" if claim.rates else ""
    fragile = f"\n\n† Another processor flips the verdict at quick: {claim.fragile}" if claim.fragile else ""
    rows = [
        _verdict_row(claim, preset, known)
        for preset in presets_of(claim)
        if claim.scale_free or status(claim, preset, known) != NOT_RUN
    ]
    head = "<tr><th>scale</th><th>verdict</th><th>measured</th><th>n</th><th>on</th><th>judged by</th></tr>"
    table = f'<table class="verdicts"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>' if rows else ""
    counted = {at: sum(map(len, found.values())) for at, found in behind_it.items() if (claim.id, at) in known}
    told = ", ".join(f"{n} at {'quick' if at == ANY else at}" for at, n in counted.items() if n)
    names = list(dict.fromkeys(row for found in behind_it.values() for row in found))
    shown = ", ".join(f"`{row}`" for row in names[:6]) + (" and more" if len(names) > 6 else "")
    home = f"[{titles[claim.notebook]}](/notebooks/{claim.notebook}.ipynb)" if claim.notebook in titles else ""
    keys = f"{{download}}`their keys <{claim.id.split('.')[0]}_runs.json>`"
    tail = " · ".join(filter(None, (home, told and f"runs behind it: {told} (rows {shown}; {keys})")))
    return (
        f'<div class="claim" id="{claim.id}">\n\n**{claim.where if value else claim.text}** '
        f'<a class="address" href="#{claim.id}" title="address of this claim"><code>{claim.id}</code></a>\n\n'
        f"{place}{rates}{fragile}\n\n{note}\n\n{table}\n\n{tail}\n\n</div>\n"
    )


def _verdict_row(claim: Claim, preset: str, known: Judged) -> str:
    verdict = known.get((claim.id, preset))
    criterion = claim.judge.get(preset)
    by = rule(criterion) if criterion else ""
    why = verdict.detail if verdict and not verdict.decided else ""
    why = why.partition(" interval)")[2].lstrip("; ") if " interval)" in why else why  # the rule is said anyway
    scale = "any" if preset == ANY else preset
    now = status(claim, preset, known)
    cells = {
        "scale": scale,
        "verdict": _badge(now) + (f" ({html.escape(verdict.share)})" if verdict and verdict.share else ""),
        "measured": html.escape(verdict.measured) if verdict else "",
        "n": f"{verdict.n} {verdict.counted}" if verdict and verdict.n else "",
        "on": html.escape("; ".join(filter(None, (verdict.setting, verdict.rates)))) if verdict else "",
        "judged by": html.escape(f"{by}; {why}" if why else by),
    }
    return "<tr>" + "".join(f'<td data-label="{k}">{v}</td>' for k, v in cells.items()) + "</tr>"


def _badge(name: str) -> str:
    return f'<span class="{name.replace(" ", "-")}">{name}</span>'


# ---- the table of all claims


def _index(known: Judged) -> str:
    """Return the page with the table that ``claims.js`` filters; without scripts it shows all."""
    rows = []
    for paper in claims.available():
        for claim in claims.load(paper).values():
            tried = [preset for preset in presets_of(claim) if status(claim, preset, known) != NOT_RUN]
            rows += [_index_row(paper, claim, preset, known) for preset in tried or presets_of(claim)[:1]]
    names = ("paper", "place", "claim", "who says so", "scale", "verdict", "measured", "n")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        "---\nnosearch: true\n---\n# All claims\n\n"
        f"{len({(p, c) for p in claims.available() for c in claims.load(p)})} claims of "
        f"{len(claims.available())} papers, and what was found at each scale. `quick` is digits and synthetic "
        "problems, `desktop` small public data sets on two cores, `paper` the paper's own protocol; `any` is "
        "settled once: algebra, identities, small problems with known answers. A scale for which a claim lists "
        "no test has no row.\n\n"
        '```{raw} html\n<form id="claims-filter" hidden></form><p id="claims-count" role="status"></p>\n'
        f'<table class="verdicts" id="claims-table"><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + '\n</tbody></table>\n<script src="../_static/claims.js"></script>\n```\n'
    )


def _index_row(paper: str, claim: Claim, preset: str, known: Judged) -> str:
    verdict = known.get((claim.id, preset))
    now = status(claim, preset, known)
    link = f'<a href="{paper}.html#{claim.id}">{html.escape(claim.text)}</a>'
    cells = {
        "paper": claims.paper_name(paper),
        "place": html.escape(claim.where),
        "claim": link,
        "source": claim.source,
        "scale": preset,
        "verdict": _badge(now),
        "measured": html.escape(verdict.measured) if verdict else "",
        "n": str(verdict.n) if verdict and verdict.n else "",
    }
    data = {"paper": paper, "verdict": now, "scale": preset, "source": claim.source, "notebook": claim.notebook}
    attributes = " ".join(f'data-{k}="{html.escape(v)}"' for k, v in data.items())
    return f"<tr {attributes}>" + "".join(f'<td data-label="{k}">{v}</td>' for k, v in cells.items()) + "</tr>"


def tally(known: Judged, names: Iterable[str]) -> Counter[str]:
    """Return how many verdicts the claims of some notebooks have of each status, where any was reached."""
    wanted = {*names}
    mine = [c for paper in claims.available() for c in claims.load(paper).values() if c.notebook in wanted]
    found = Counter(status(c, preset, known) for c in mine for preset in presets_of(c))
    return Counter({name: n for name, n in found.items() if name not in (NOT_RUN, NOT_YET)})


def mosaic(known: Judged) -> str:
    """Return a picture of all claims: a square per claim in the paper's order, in the colour of its verdict.

    Where a claim was judged at several scales, the largest that decided anything counts.
    """
    parts = []
    for paper in sorted(claims.available(), key=lambda paper: [*PAPERS, paper].index(paper)):
        squares = []
        for claim in claims.load(paper).values():
            found = [status(claim, preset, known) for preset in presets_of(claim)]
            decided = [now for now in found if now in (REPRODUCED, MIXED, CONTRADICTED)]
            now = decided[-1] if decided else next((s for s in found if s == INCONCLUSIVE), NOT_YET)
            told = html.escape(f"{claim.where}: {claim.text} ({now})")
            where = f"claims/{paper}.html#{claim.id}"
            squares.append(f'<a class="{now.replace(" ", "-")}" href="{where}" title="{told}" aria-label="{told}"></a>')
        parts.append(f"<h3>{claims.paper_name(paper)}</h3><div>{''.join(squares)}</div>")
    legend = "".join(
        f'<span><a class="{name.replace(" ", "-")}"></a> {name}</span>'
        for name in (REPRODUCED, MIXED, INCONCLUSIVE, CONTRADICTED, NOT_YET)
    )
    said = "Every square is a number or a statement of a paper, in its order. Click one."
    return f'<figure class="mosaic">{"".join(parts)}<figcaption>{legend}<br>{said}</figcaption></figure>'


def verdict_words(found: Mapping[str, int]) -> str:
    """Return a tally as words with the colours of the verdicts."""
    order = (REPRODUCED, MIXED, INCONCLUSIVE, CONTRADICTED)
    return " · ".join(f'<span class="{name}">{found[name]} {name}</span>' for name in order if found.get(name))
