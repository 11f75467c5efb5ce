"""The README says what is there."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import auto_ablation, auto_classes, auto_verdicts, erase
from benchmarks.harness import recorded
from common.settings import Settings
from tests.support.stack import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_every_setting_is_in_the_table() -> None:
    """The settings table is the settings: names, defaults and meanings."""
    rows = [
        f"| `WEIGHTWASH_{name.upper()}` | "
        f"{'' if field.default is None else f'`{field.default}`'} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    assert [line for line in README.splitlines() if line.startswith("| `WEIGHTWASH_")] == rows


def test_every_module_is_in_the_tree() -> None:
    """The file tree names every module of the three packages."""
    tree = README.split("## What is where")[1]
    words = set(re.findall(r"[\w.]+", tree))
    for package in ("common", "service", "worker"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if path.name not in {"__init__.py", "__main__.py"}:
                assert path.name in words or path.stem in words, path


@pytest.mark.parametrize(
    ("name", "rendered"),
    [
        ("erase", erase.tables(recorded(erase.RESULTS))),
        ("verdicts", auto_verdicts.tables(recorded(auto_verdicts.RESULTS))),
        ("classes", auto_classes.table(recorded(auto_classes.RESULTS))),
        ("ablation", auto_ablation.table(recorded(auto_ablation.RESULTS))),
    ],
)
def test_tables_are_the_recorded_results(name: str, rendered: str) -> None:
    """What the tables say is what the benchmark renders of its recorded rows."""
    shown = README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    assert shown.strip() == rendered.strip()


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CHANGELOG.md", "docs"])
def test_every_link_leads_somewhere(name: str) -> None:
    """A link to a file of the project names one that is there, and a heading that it has."""
    top = REPOSITORY / name
    for page in sorted(top.rglob("*.md")) if top.is_dir() else [top]:
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
        for path, heading in links:
            linked = (page.parent / path) if path else page
            assert linked.exists(), (page, path)
            assert not heading or heading in _anchors(linked), (page, path, heading)


@pytest.mark.parametrize(
    "target", ["help", "demo", "run", "test", "check", "migrate", "bench", "fuzz"]
)
def test_make_knows_its_targets(target: str) -> None:
    """Every command of the README is a target of the Makefile, and ``make help`` lists it."""
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(rf"make {target} ", listed)
