"""Every test that the documentation or scripts/smoke.sh names exists, by its file and its function."""

import difflib
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "scripts" / "smoke.sh"]
TEST = re.compile(r"\btests/[\w/]+\.py(?:::\w+)?")


def functions(path: pathlib.Path) -> list[str]:
    return re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.M)


def missing(page: pathlib.Path) -> list[str]:
    """Return one line for each test on the page that does not exist."""
    lines = []
    for name in re.findall(TEST, page.read_text(encoding="utf-8")):
        file, _, function = name.partition("::")
        if not (ROOT / file).is_file():
            lines.append(f"{page.name} names {file}, which does not exist")
        elif function and function not in functions(ROOT / file):
            nearest = difflib.get_close_matches(function, functions(ROOT / file), n=1, cutoff=0)
            lines.append(f"{page.name} names {name}; the nearest name in that file is {nearest}")
    return lines


def test_every_test_that_the_documentation_names_exists():
    assert not [line for page in PAGES for line in missing(page)]


def test_every_claim_names_a_test_function():
    pages = (ROOT / "docs" / "claims.md").read_text() + (ROOT / "SECURITY.md").read_text()
    rows = [line for line in pages.splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.startswith(("| claim ", "| promise "))]
    assert len(claims) > 50
    assert not [row for row in claims if "::test_" not in row]
