"""Files, functions and names stay small and plain: the limits of CONTRIBUTING.md, checked on the source.

python tests/test_house.py lowrank_jax/data tests/data   # what breaks them in some folders or files
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, PARAMETERS, PACKAGE_LINES, README_LINES = 400, 60, 7, 19_000, 110
README_WORDS, DOCS_WORDS = 18, 20  # a sentence, on average
VAGUE = {"found", "made", "there", "here", "told", "asked", "held", "given"}
OPENINGS = ("What ", "Whether ", "How ", "Of ", "One ", "Where ")
PACKAGE = sorted((ROOT / "lowrank_jax").rglob("*.py"))
PYTHON = PACKAGE + sorted(f for folder in ("configs", "scripts", "tests") for f in (ROOT / folder).rglob("*.py"))


def names_in(tree: ast.AST) -> set[tuple[str, int]]:
    """Return (name, line) of every variable, parameter and attribute that the code assigns."""
    stored = [n for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Store)]
    names = {(n.id, n.lineno) for n in stored if isinstance(n, ast.Name)}
    names |= {(n.attr, n.lineno) for n in stored if isinstance(n, ast.Attribute)}
    return names | {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}


def faults(path: pathlib.Path) -> list[str]:
    """Return one line for each limit that a Python file breaks."""
    text, lines = path.read_text(encoding="utf-8"), []
    tree, in_package = ast.parse(text), path in PACKAGE
    if in_package and text.count("\n") > FILE_LINES:
        lines.append(f"1: {text.count(chr(10))} lines, more than {FILE_LINES}")
    for name, line in sorted(names_in(tree), key=lambda pair: pair[1]):
        if name.strip("_") in VAGUE:
            lines.append(f"{line}: the name {name!r} does not say what it holds")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if (ast.get_docstring(node) or "").startswith(OPENINGS):
                lines.append(
                    f"{getattr(node, 'lineno', 1)}: a docstring opens with {ast.get_docstring(node).split()[0]}"
                )
        if in_package and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            count = len(a.posonlyargs + a.args + a.kwonlyargs) - (a.args[:1] != [] and a.args[0].arg in ("self", "cls"))
            if count > PARAMETERS:
                lines.append(f"{node.lineno}: {node.name} has {count} parameters, more than {PARAMETERS}")
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                lines.append(f"{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    return [f"{path.relative_to(ROOT)}:{line}" for line in lines]


def words_per_sentence(markdown: str) -> float:
    """Return the mean length of the sentences in a page, without code, tables, headings and links' targets."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    kept = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!", "<"))]
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(kept))
    sentences = [s for block in blocks for s in re.split(r"(?<=[.!?])\s+", block) if len(s.split()) > 2]
    return sum(len(s.split()) for s in sentences) / max(len(sentences), 1)


def test_python_keeps_the_limits():
    assert not [line for path in PYTHON for line in faults(path)]


def test_the_package_is_six_rooms_and_thirteen_files_of_at_most_19_000_lines():
    entries = [p for p in (ROOT / "lowrank_jax").iterdir() if p.name not in ("__pycache__", "configs")]
    assert sum(p.is_dir() for p in entries) == 6 and sum(p.suffix == ".py" for p in entries) <= 13
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in PACKAGE) <= PACKAGE_LINES


def test_pages_are_short_and_plain():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= README_LINES and words_per_sentence(readme) <= README_WORDS
    for page in sorted((ROOT / "docs").rglob("*.md")):
        words = words_per_sentence(page.read_text(encoding="utf-8"))
        assert words <= DOCS_WORDS, f"{page.name}: {words:.1f} words a sentence"


if __name__ == "__main__":
    wanted = [ROOT / name for name in sys.argv[1:] or ["."]]
    print("\n".join(line for path in PYTHON if any(path.is_relative_to(w) for w in wanted) for line in faults(path)))
    for page in sorted(
        p for p in ROOT.rglob("*.md") if any(p.is_relative_to(w) for w in wanted) and ".venv" not in p.parts
    ):
        print(f"{page.relative_to(ROOT)}: {words_per_sentence(page.read_text(encoding='utf-8')):.1f} words a sentence")
