"""Break the code on purpose, one small change at a time, and check that the tests notice.

    python scripts/studies/mutate.py           # every mutation of scripts/studies/mutations/*.toml, two at a time
    python scripts/studies/mutate.py --only=guard --jobs=1

A mutation replaces one piece of text in one file and names the tests that must then fail. Each runs in a copy of the
tracked files. The same tests first run without any mutation and must pass; --trust skips this. Outcomes are appended to
--results as one JSON object a line, and a second start resumes from there. --out gets the table at the end.

The mutations were chosen by hand, for what a user would lose. mutmut 3 and cosmic-ray derive thousands of mutants from
rules; a test process imports JAX for 2 CPU seconds and compiles for longer, so only a sample of them could run.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300  # after which a mutation's tests count as failed: the mutation lets something wait forever


def read_mutations(folder: pathlib.Path = ROOT / "scripts" / "studies" / "mutations") -> list[dict]:
    """Return every mutation with its `area`, in the order of files and tables."""
    areas = [(path.stem, tomllib.loads(path.read_text())) for path in sorted(folder.glob("*.toml"))]
    return [{"area": area} | mutation for area, tables in areas for mutation in tables["mutation"]]


def mutated(mutation: dict, text: str) -> str:
    """Return a file's text with the mutation; raises ValueError unless its text occurs exactly once."""
    count = text.count(mutation["find"])
    if count != 1:
        raise ValueError(f"{mutation['name']}: {count} places in {mutation['file']} have {mutation['find']!r}")
    return text.replace(mutation["find"], mutation["replace"])


def key(mutation: dict) -> str:
    return hashlib.sha256(json.dumps(mutation, sort_keys=True).encode()).hexdigest()[:16]


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
    """Copy the tracked files into `folder`, with uncommitted changes, and link the environment."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    return folder


def run_tests(folder: pathlib.Path, tests: list[str], *options: str) -> tuple[int, str]:
    """Return pytest's exit status, -1 for a time-out, and its last line about a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "LOWRANK_TEST_CACHE": str(folder.parent / "cache")}
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        out, _ = process.communicate(timeout=SECONDS if not options else None)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return -1, f"no end within {SECONDS} s"
    failures = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return process.returncode, (failures or out.strip().splitlines()[-1:] or [""])[-1][:300]


def try_mutation(folders: queue.Queue, mutation: dict) -> dict:
    folder = folders.get()
    path = folder / mutation["file"]
    original = path.read_text()
    try:
        path.write_text(mutated(mutation, original))
        status, line = run_tests(folder, mutation["tests"])
    finally:
        path.write_text(original)
        folders.put(folder)
    if status not in (-1, 0, 1):  # pytest had no tests, or could not collect them: that proves nothing
        raise SystemExit(f"error: {mutation['name']}: pytest ended with {status}: {line}")
    return {
        "key": key(mutation),
        "area": mutation["area"],
        "name": mutation["name"],
        "fails": status != 0,
        "line": line,
    }


def table(mutations: list[dict], outcomes: dict[str, dict]) -> str:
    """Return the page of docs/mutations.md."""
    counts = collections.Counter(outcome["fails"] for outcome in outcomes.values())
    survivors = [m for m in mutations if key(m) in outcomes and not outcomes[key(m)]["fails"]]
    rows = [
        f"| {m['area']} | {m['name']} | `{m['file']}` | {'yes' if outcomes[key(m)]['fails'] else '**no**'} |"
        for m in mutations
        if key(m) in outcomes
    ]
    named = "\n".join(f"- {m['name']} (`{m['file']}`)" for m in survivors) or "None survives."
    return f"""# Mutations

Do the tests fail when the code is wrong? `python scripts/studies/mutate.py` breaks the code in {len(rows)} ways, each a
change that a user would notice, and runs the tests that should fail. In the area `blind`,
72 mutations were chosen without reading the tests. 57 of them were caught at first, and the other 15 have tests since.
Most mutations of the other areas were written together with the tests.

**{counts[True]} of {len(rows)} mutations fail at least one test.**

## Survivors

{named}

## All

| area | mutation | file | noticed |
|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose area or name contains it")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="number of parallel test runs (2)")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mutation first")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "runs" / "mutations.jsonl", metavar="FILE")
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="FILE", help="the table, as Markdown")
    args = parser.parse_args()
    mutations = [m for m in read_mutations() if args.only in m["area"] or args.only in m["name"]]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    outcomes = {outcome["key"]: outcome for outcome in map(json.loads, lines)}
    left = [m for m in mutations if key(m) not in outcomes]
    with tempfile.TemporaryDirectory() as home, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        folders: queue.Queue = queue.Queue()
        for i in range(args.jobs):
            folders.put(copy_tree(pathlib.Path(home, str(i))))
        if left and not args.trust:
            first, tests = folders.get(), sorted({test for m in left for test in m["tests"]})
            status, line = run_tests(first, tests, f"-n{args.jobs}")
            if status:
                print(f"error: without any mutation the tests fail: {line}", file=sys.stderr)
                return 1
            folders.put(first)
        tried = [pool.submit(try_mutation, folders, mutation) for mutation in left]
        for outcome in (future.result() for future in concurrent.futures.as_completed(tried)):
            outcomes[outcome["key"]] = outcome
            print(f"{'noticed ' if outcome['fails'] else 'SURVIVED'} {outcome['area']}: {outcome['name']}", flush=True)
            with args.results.open("a") as f:
                f.write(json.dumps(outcome) + "\n")
    outcomes = {key(m): outcomes[key(m)] for m in mutations}
    if args.out:
        args.out.write_text(table(mutations, outcomes))
    print(f"{sum(outcome['fails'] for outcome in outcomes.values())} of {len(outcomes)} mutations fail a test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
