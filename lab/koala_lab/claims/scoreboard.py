"""Verdicts as text and files: lines for a notebook, the scoreboard, and how two machines differ."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from warnings import warn

from koala_lab import paths
from koala_lab.claims.judge import MIXED, NOT_RUN, STATUSES, Verdict, available, find, load
from koala_lab.claims.schema import ANY, Claim
from koala_lab.files import read_json, set_aside, write_json
from koala_lab.parameters import PRESETS

NOT_YET = "not run yet"
BEGIN, END = "<!-- scoreboard:begin -->", "<!-- scoreboard:end -->"
WIDTH = 100  # columns of a notebook's output
SHOWN = (*STATUSES[:-1], NOT_YET, NOT_RUN)
APART = ("exact", "identity")  # kinds that are counted apart

_Judged = Mapping[tuple[str, str], Verdict]  # by claim id and preset


# ---- for a notebook


def lines(verdicts: Sequence[Verdict], claims: Sequence[Claim] = (), preset: str = "") -> str:
    """Return what is decided, one paragraph per claim of at most 100 columns, then a count of the rest.

    Args:
        verdicts: In the order to print.
        claims: All of a notebook; those without a test at ``preset`` and without a verdict are counted too.
        preset: The notebook's own.
    """
    shown = [v for v in verdicts if v.decided]
    texts = []
    for setting in dict.fromkeys((v.preset, v.setting) for v in shown):
        head = f"{_at(setting[0])}: {setting[1]}" if setting[1] else _at(setting[0])
        texts.append(_wrap(head, ""))
        texts += [_wrap(_sentence(v), "  ") for v in shown if (v.preset, v.setting) == setting]
    rest = Counter((v.preset, v.status, _short(v.detail)) for v in verdicts if not v.decided)
    seen = {v.claim_id for v in verdicts if v.preset in (preset, ANY, "custom")}
    rest[preset, NOT_RUN, ""] += sum(c.id not in seen for c in claims)
    for (at, status, why), count in rest.items():
        if count:
            texts.append(_wrap(f"{_at(at)}: {count} {status}{': ' + why if why else ''}", ""))
    if preset:
        texts.append(f"{len(claims)} claims in all")
    return "\n".join(texts) or "nothing judged yet"


def _at(preset: str) -> str:
    return "at any scale" if preset == ANY else preset


def _short(detail: str) -> str:
    """Say why nothing is decided, in words that several claims share."""
    if detail.startswith("the claim lists"):
        return ""
    return "the interval cannot tell" if "% interval)" in detail else detail


def _sentence(v: Verdict) -> str:
    rates = f"; rates {v.rates}" if v.rates else ""
    return f"{v.outcome}: {v.claim_id.split('.', 1)[1]}: {v.measured}, n = {v.n} {v.counted}{rates}"


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False)


# ---- files


def save(verdicts: Iterable[Verdict], notebook: str, folder: Path | None = None) -> Path:
    """Write one notebook's verdicts to ``verdicts/<notebook>.json`` in the report, or to another folder."""
    return write_verdicts(
        verdicts, folder / "verdicts.json" if folder else paths.report_dir() / "verdicts" / f"{notebook}.json"
    )


def write_verdicts(verdicts: Iterable[Verdict], path: Path) -> Path:
    """Write verdicts to a file."""
    write_json(path, {"verdicts": [asdict(v) for v in verdicts]})
    return path


def saved(folder: Path | None = None) -> list[Verdict]:
    """Read all verdicts below a folder, by default ``report/verdicts``, in the order of the file names.

    A damaged file is set aside with a warning. Verdicts are left out, with a warning, if their claim is no more, has
    changed since, or is judged by another notebook whose verdicts are there.
    """
    root = folder or paths.report_dir() / "verdicts"
    known = {claim_id: claim for paper in available() for claim_id, claim in load(paper).items()}

    def stale(verdict: Verdict, path: Path) -> bool:
        claim = known.get(verdict.claim_id)
        if claim is None or not _fits(verdict, claim):
            return True
        own = root / f"{claim.notebook}.json"
        return own != path and own.exists()

    found = []
    for path in sorted(root.rglob("*.json")):
        try:
            verdicts = read_verdicts(path)
        except ValueError as error:
            set_aside(path, error.__cause__ or error, "the report is made without it; run its notebook again")
            continue
        if old := [v.claim_id for v in verdicts if stale(v, path)]:
            left = f"which are left out; run its notebook again, or remove it: {', '.join(old)}"
            warn(f"{path} has verdicts on claims that are no more, have changed or have moved, {left}", stacklevel=2)
        found += [v for v in verdicts if not stale(v, path)]
    return found


def read_verdicts(path: Path) -> list[Verdict]:
    """Read the verdicts of one file; none if there is no such file."""
    if not path.exists():
        return []
    try:
        return [Verdict.from_json(entry) for entry in read_json(path)["verdicts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of verdicts ({error!r}): {restored(path)}") from error


def restored(path: Path) -> str:
    """Say how a damaged file of verdicts is made whole."""
    return "restore it from git" if path.is_relative_to(paths.results_dir()) else "run its notebook again"


def differences(here: Iterable[Verdict], there: Iterable[Verdict]) -> list[str]:
    """Return a line per claim and preset that two machines, or two kernel paths of one, judge differently.

    Args:
        here: Verdicts of one.
        there: Verdicts of the other; what only one of them has is left out.
    """
    other = {(v.claim_id, v.preset): v for v in there}
    found = []
    for v in here:
        w = other.get((v.claim_id, v.preset))
        if w is not None and w.outcome != v.outcome:
            known = " (known to be fragile)" if find(v.claim_id).fragile else ""
            found.append(f"{v.claim_id} at {v.preset}: {v.outcome} here, {w.outcome} there{known}")
    return found


# ---- the scoreboard


def scoreboard(verdicts: Iterable[Verdict], papers: Sequence[str] | None = None) -> str:
    """Print every paper's claims as Markdown: counts, then what is decided, table by table, and how many are not.

    ``ValueError`` for a verdict that does not fit its claim any more, and for two different verdicts on one claim and
    preset. "Not run yet" marks a claim that lists a test for the preset and has no verdict.
    """
    judged = _by_claim(verdicts)
    papers = papers or available()
    parts = [counts(judged.values(), papers)]
    for paper in papers:
        parts.append(f"\n## {paper_name(paper)}\n")
        groups: dict[str, list[Claim]] = {}
        for claim in load(paper).values():
            groups.setdefault(claim.where.split(",")[0], []).append(claim)
        for title, group in groups.items():
            parts += _group(title, group, judged)
        unstable = [f"- † {c.text}: {c.fragile}" for c in load(paper).values() if c.fragile]
        if unstable:
            parts += ["\nAnother processor flips:\n", *unstable]
        if notes := dict.fromkeys(f"- {c.where.split(',')[0]}: {c.note}" for c in load(paper).values() if c.note):
            parts.append("\n<details>\n<summary>Notes on the statements</summary>\n")
            parts += [*notes, "\n</details>"]
    return "\n".join(parts) + "\n"


def paper_name(paper: str) -> str:
    """Return a paper's name as a reader knows it: MEKA, KOALA++."""
    return paper.replace("_plus", "+").upper()


def counts(verdicts: Iterable[Verdict], papers: Sequence[str] | None = None) -> str:
    """Return one row per paper and scale, and a sentence on what has no scale."""
    judged = {(v.claim_id, v.preset): v for v in verdicts}
    papers = papers or available()
    text = [_row("paper", "scale", *SHOWN), _row("---", "---", *["---:"] * len(SHOWN))]
    for paper in papers:
        scaled = [c for c in load(paper).values() if not c.scale_free]
        for preset in PRESETS:
            found = Counter(_status(claim, preset, judged) for claim in scaled)
            name = f"{paper_name(paper)}, {len(scaled)} claims" if preset == PRESETS[0] else ""
            text.append(_row(name, preset, *(str(found[status]) for status in SHOWN)))
    text.append("")
    for paper in papers:
        groups: dict[str, list[str]] = {}
        for claim in load(paper).values():
            if claim.scale_free:
                name = {"identity": "identities", "exact": "exact statements"}.get(claim.kind, "on small problems")
                groups.setdefault(name, []).append(_status(claim, ANY, judged))
        told = [f"{len(found)} {name} ({_told(found)})" for name, found in sorted(groups.items())]
        text.append(f"- {paper_name(paper)}, without a scale, settled once: {'; '.join(told) or 'none'}.")
    return "\n".join(text) + "\n"


def _told(statuses: Iterable[str]) -> str:
    found = Counter(statuses)
    return ", ".join(f"{found[status]} {status}" for status in SHOWN if found[status])


def _by_claim(verdicts: Iterable[Verdict]) -> _Judged:
    judged: dict[tuple[str, str], Verdict] = {}
    for verdict in verdicts:
        claim = find(verdict.claim_id)
        if not _fits(verdict, claim):
            where = f"{claim.id}: the verdict at {verdict.preset!r}"
            raise ValueError(f"{where} is out of date; run {claim.notebook} again")
        if judged.setdefault((claim.id, verdict.preset), verdict) != verdict:
            raise ValueError(f"{claim.id}: two different verdicts at {verdict.preset!r}")
    return judged


def _fits(verdict: Verdict, claim: Claim) -> bool:
    """Say whether a verdict judges a claim as it stands now."""
    preset = PRESETS[0] if verdict.preset == ANY else verdict.preset
    lists = claim.scale_free if verdict.preset == ANY else verdict.preset in claim.judge
    listed = verdict.status in STATUSES and (verdict.status == NOT_RUN) != lists and preset in PRESETS
    return listed and verdict.paper == claim.paper


def _group(title: str, group: list[Claim], judged: _Judged) -> list[str]:
    """Return one table or section of a paper: a row per decided claim, a line for the rest."""
    shown, rest = [], Counter[tuple[str, str]]()
    for claim in group:
        for preset in (ANY,) if claim.scale_free else PRESETS:
            verdict = judged.get((claim.id, preset))
            if verdict is not None and verdict.decided:
                shown.append(_verdict_row(claim, verdict))
            else:
                rest[_at(preset), _status(claim, preset, judged)] += 1
    head = [f"\n**{title}**, {len(group)} claim{'s' * (len(group) > 1)}\n"]
    if shown:
        columns = ("claim", "who says so", "says", "scale", "verdict", "measured", "n", "on")
        head += [_row(*columns), _row(*["---"] * len(columns)), *shown, ""]
    told = [f"{count} {status} ({at})" for (at, status), count in sorted(rest.items())]
    return [*head, *([f"The rest: {', '.join(told)}."] if told else [])]


def _verdict_row(claim: Claim, v: Verdict) -> str:
    kind = f" ({claim.kind})" if claim.kind in APART else ""
    label = f"{claim.text if claim.kind != 'value' else claim.where} (`{claim.id}`)"
    mark = " †" if claim.fragile and v.preset in (PRESETS[0], ANY) else ""
    why = f"; {v.detail}" if v.status == MIXED else ""
    says, n = f"{claim.paper}{kind}", f"{v.n} {v.counted}"
    on = "; ".join(filter(None, (v.setting, v.rates and f"rates {v.rates}"))) or "–"
    return _row(label, claim.source, says, _at(v.preset), v.outcome + mark, v.measured + why, n, on)


def _status(claim: Claim, preset: str, judged: _Judged) -> str:
    verdict = judged.get((claim.id, preset))
    return verdict.status if verdict else NOT_YET if preset in claim.judge else NOT_RUN


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def replace_block(readme: str, block: str) -> str:
    """Replace what stands between the two scoreboard markers; doing it twice changes nothing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected the markers {BEGIN} and {END} once each, in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.split(END)[1]}"
