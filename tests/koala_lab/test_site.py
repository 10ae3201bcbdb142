"""The site: every link leads somewhere, nothing is asked of another server, and a browser has no complaint."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_plus, unquote, urldefrag

import filelock
import pytest

from koala_lab import claims, report
from koala_lab.report import equations, staging
from koala_lab.report.code import ROOT
from tests.support.browser import Browser, executable

pytestmark = pytest.mark.filterwarnings("ignore:.*:sphinx.deprecation.RemovedInSphinx11Warning")
WIDTHS = (1280, 390)
THEMES = ("light", "dark")
KEPT = ((1280, "light"), (390, "dark"))  # of which pictures are kept


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site of the committed notebooks, made once for all workers; KOALA_SITE names another to test."""
    if given := os.environ.get("KOALA_SITE"):
        return Path(given).resolve()
    folder = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    made = folder / "site"
    with filelock.FileLock(folder / "site.lock"), pytest.MonkeyPatch.context() as patch:
        if not (made / "index.html").exists():
            patch.setenv("KOALA_REPORT", str(made))
            patch.setenv("KOALA_FIGURES", str(ROOT / "figures"))
            report.build()
    return made


class Links(html.parser.HTMLParser):
    """The addresses of a page: what it loads, where it leads, and its own anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.anchors: set[str] = set()
        self.unnamed: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and "href" in found:
            self.loads.append(found["href"])
        if tag == "a" and "href" in found:
            self.leads.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.unnamed.append(found.get("src", ""))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {page: Links(page) for page in sorted(site.rglob("*.html")) if "_static" not in page.parts}


def test_no_link_is_dead_and_no_page_asks_another_server(site: Path, pages: dict[Path, Links]) -> None:
    dead = []
    for page, links in pages.items():
        for address in links.loads + links.leads:
            if address.startswith(("http:", "https:", "//")):
                assert address not in links.loads, f"{page} loads {address}"
                continue
            if address.startswith(("data:", "mailto:")):
                continue
            file, anchor = urldefrag(address)
            target = (page.parent / unquote(file.split("?")[0])).resolve() if file else page
            known = pages.get(target)
            fine = target.exists() and (not anchor or known is None or unquote(anchor) in known.anchors)
            if not fine and "claims/index.html#" not in address:  # the filter's settings
                dead.append(f"{page.relative_to(site)}: {address}")
    assert not dead, "\n".join(dead)
    assert len(pages) > 60


def test_every_claim_has_its_address_and_every_image_a_text(site: Path, pages: dict[Path, Links]) -> None:
    for paper in claims.available():
        anchors = pages[site / "claims" / f"{paper}.html"].anchors
        assert {*claims.load(paper)} <= anchors
    unnamed = {str(page.relative_to(site)): links.unnamed for page, links in pages.items() if links.unnamed}
    assert not unnamed


def test_a_claim_says_what_was_found_at_which_scale_and_from_which_runs(site: Path) -> None:
    verdict = next(v for v in report.shown.verdicts() if v.preset == "quick" and v.decided and v.setting)
    page = (site / "claims" / f"{claims.find(verdict.claim_id).id.split('.')[0]}.html").read_text(encoding="utf-8")
    block = page.split(f'id="{verdict.claim_id}"')[1].split('class="claim"')[0]
    for word in (verdict.status, verdict.setting, f"{verdict.n} {verdict.counted}", "runs behind it"):
        assert word in block
    assert f"{claims.find(verdict.claim_id).notebook}.html" in block
    [kept] = (site / "_downloads").rglob(f"{verdict.claim_id.split('.')[0]}_runs.json")
    assert json.loads(kept.read_text())[verdict.claim_id]["quick"]


def test_plumbing_is_folded_and_verdicts_are_tables(site: Path) -> None:
    page = (site / "notebooks" / "koala" / "20_table2_dynamics_and_noise.html").read_text(encoding="utf-8")
    for words in ("Show the parameters", "Show the runs", "Show imports and start"):
        assert words in page
    table = page.split('<table class="verdicts">')[1].split("</table>")[0]
    assert "koala.html#koala.table2." in table
    assert "reproduced: table2" not in page  # no verdict is left as text
    assert "figure-table2" in page


def test_launch_links_say_what_to_do_and_name_what_the_repository_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binder builds environment.yml and opens the notebook; Colab has neither, so the page says how to get both."""
    [table2] = [n for n in report.shown.notebooks() if n.name == "koala/20_table2_dynamics_and_noise"]
    monkeypatch.delenv("KOALA_REPOSITORY", raising=False)
    assert "mybinder" not in staging.head(table2, fresh=False)
    monkeypatch.setenv("KOALA_REPOSITORY", "someone/filters")
    told = staging.head(table2, fresh=False)
    place = f"notebooks/{table2.name}.ipynb"
    assert f"https://mybinder.org/v2/gh/someone/filters/HEAD?urlpath=lab/tree/{place}" in told
    assert f"https://colab.research.google.com/github/someone/filters/blob/HEAD/{place}" in told
    assert "!git clone https://github.com/someone/filters && pip install -e filters -e filters/lab" in told
    assert (ROOT / place).is_file()
    for file in ("environment.yml", "pyproject.toml", "lab/pyproject.toml"):
        assert (ROOT / file).is_file()


def test_verdicts_of_one_notebook_do_not_hide_the_committed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOALA_REPORT", str(tmp_path))
    old = report.shown.committed_verdicts()
    name = claims.find(old[0].claim_id).notebook
    claims.save([dataclasses.replace(old[0], measured="now")], name)
    found = report.shown.verdicts()
    assert [v.measured for v in found if claims.find(v.claim_id).notebook == name] == ["now"]
    rest = [v for v in old if claims.find(v.claim_id).notebook != name]
    assert len(rest) > 100
    assert [v for v in found if claims.find(v.claim_id).notebook != name] == rest


# ---- the equations


def test_no_equation_is_missing_without_a_reason() -> None:
    assert equations.problems(equations.load(), equations.code_marks(ROOT)) == []


def test_a_missing_equation_is_noticed() -> None:
    listed = equations.load()
    marks = [m for m in equations.code_marks(ROOT) if (m.paper, m.number) != ("koala", 13)]
    marks.append(marks[0]._replace(paper="koala", number=14))
    listed["apollo"] = listed["apollo"][:-1]
    found = " ".join(equations.problems(listed, marks))
    assert "koala eq. 13: no docstring or comment marks it" in found
    assert "koala eq. 14: it is marked in the code, so no_code is out of date" in found
    assert "apollo eq. 14: marked in the code, and not in data/equations.yaml" in found


def test_marks_are_read_with_their_owner_and_their_paper(tmp_path: Path) -> None:
    file = tmp_path / "koala.py"
    file.write_text(
        '"""Eq. 1, x(2)."""\n\n\nclass A:\n    def f(self):\n'
        '        """MEKA, eqs. 3 and (5)-(6)."""\n        x = 1  # (9)\n'
    )
    found = [(m.paper, m.number, m.line, m.owner) for m in equations.in_code(file)]
    assert sorted(found, key=lambda m: m[1]) == [
        ("koala", 1, 1, ""),
        ("meka", 3, 6, "A.f"),
        ("meka", 5, 6, "A.f"),
        ("meka", 6, 6, "A.f"),
        ("koala", 9, 7, "A.f"),
    ]


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = executable()
    if program is None:
        pytest.skip("there is no Chromium on this machine; Debian's package is chromium")
    with Browser(program) as found:
        yield found


def documents(site: Path) -> list[Path]:
    pages = (page for page in sorted(site.rglob("*.html")) if not {"_static", "code"} & {*page.parts})
    return [*pages, *sorted((site / "code").rglob("*.html"))[:2]]


def test_every_page_opens_on_a_desk_and_on_a_telephone(site: Path, browser: Browser) -> None:
    problems = []
    for page in documents(site):
        name = page.relative_to(site).with_suffix("").as_posix()
        browser.size(WIDTHS[0])
        browser.open(page)
        browser.run("window.MathJax?.startup?.promise.then(() => true)")
        for theme in THEMES:
            browser.run(f"document.documentElement.dataset.theme = '{theme}'")
            for width in WIDTHS:
                browser.size(width)
                wide = browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                if wide > 0:
                    problems.append(f"{name} scrolls by {wide} at {width}, {theme}")
                if (width, theme) in KEPT:
                    browser.picture(site / "screenshots" / f"{name}_{width}_{theme}.png")
        problems += [f"{name}: {error}" for error in browser.errors]
        asked = [r for r in browser.requests if not r.startswith(("file:", "data:", "blob:"))]
        problems += [f"{name} asks for {request}" for request in asked]
    assert not problems, "\n".join(problems)


def test_search_finds_an_equation(site: Path, browser: Browser) -> None:
    browser.size(1280)
    browser.open(site / "search.html", "?q=eq.+25")
    browser.wait_for("document.querySelectorAll('#search-results li a').length > 3")
    found = browser.run("[...document.querySelectorAll('#search-results li a')].map((a) => a.getAttribute('href'))")
    assert any(link.startswith("equations/koala.html#") for link in found[:3]), found[:5]
    assert not browser.errors


@pytest.mark.parametrize(
    ("sought", "page"),
    [
        ("Table 7", "notebooks/koala/25_table7_recent_optimizers.html"),
        ("Table 7", "claims/koala.html"),
        ("Figure 2", "notebooks/apollo/21_learning_rate_robustness.html"),
        ("Theorem 1", "notebooks/koala/11_convergence_theorem.html"),
        ("Algorithm 1", "api/koala_lib.reference.koala.html"),
        ("Algorithm 1", "api/koala_lib.reference.apollo.html"),
        ("misprint", "notebooks/01_notation.html"),
        ("assumptions", "notebooks/koala/11_convergence_theorem.html"),
        ("MEKA eq. 11", "equations/meka.html"),
        ("condition_momentum", "api/koala_lib.kalman.html"),
    ],
)
def test_search_lists_an_item_of_a_paper_among_the_first(site: Path, browser: Browser, sought: str, page: str) -> None:
    browser.size(1280)
    browser.open(site / "search.html", f"?q={quote_plus(sought)}")
    browser.wait_for("/finished|found/.test(document.querySelector('#search-results').innerText)")
    found = browser.run("[...document.querySelectorAll('#search-results li a')].map((a) => a.getAttribute('href'))")
    assert page in [urldefrag(link)[0] for link in found[:6]], found[:6]


def test_the_table_of_claims_filters_by_itself_and_by_its_address(site: Path, browser: Browser) -> None:
    browser.size(1280)
    browser.open(site / "claims" / "index.html")
    shown = "[...document.querySelectorAll('#claims-table tbody tr')].filter((row) => !row.hidden)"
    every = browser.run(f"{shown}.length")
    for name, value in (("paper", "meka"), ("verdict", "contradicted"), ("scale", "desktop"), ("source", "paper")):
        browser.run(
            f"(() => {{ const field = document.forms['claims-filter'].elements['{name}']; field.value = '{value}';"
            " field.dispatchEvent(new Event('input', { bubbles: true })) })()"
        )
    left = browser.run(f"{shown}.map((row) => ({{...row.dataset}}))")
    wanted = {"paper": "meka", "verdict": "contradicted", "scale": "desktop", "source": "paper"}
    assert 0 < len(left) < every
    assert all(row.items() >= wanted.items() for row in left)
    expected = [
        v
        for v in report.shown.verdicts()
        if v.preset == "desktop" and v.status == "contradicted" and v.claim_id.startswith("meka.")
    ]
    assert len(left) == sum(claims.find(v.claim_id).source == "paper" for v in expected)
    address = browser.run("location.hash")
    browser.open("about:blank")
    browser.open(site / "claims" / "index.html", address)
    assert browser.run(f"{shown}.length") == len(left)


def test_the_explorable_answers_its_sliders(site: Path, browser: Browser) -> None:
    browser.size(1280)
    browser.open(site / "be_the_filter.html")
    before = browser.run("document.querySelector('#be-the-filter .told').textContent")
    browser.run(
        "(() => { const slider = document.querySelector('#be-the-filter input'); slider.value = 3;"
        " slider.dispatchEvent(new Event('input')) })()"
    )
    assert browser.run("document.querySelector('#be-the-filter .told').textContent") != before
    assert not browser.errors


def test_without_a_browser_the_pages_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert executable() is None
