"""Check this machine's device: what it sees, whether numbers, memory and resumes are right, and how fast it is.

    python scripts/check_device.py --out=runs/device              # 8 minutes on a GPU; a CPU gets toy sizes
    python scripts/check_device.py --parts=sees,numerics --seconds=120

Each part is a process that prints one row per check, and is killed where its share of the time is over. Rows are
appended to OUT/check.jsonl as they come; check.json and check.md are written at the end, after Ctrl-C too. Exit status:
0 where no row is false, else 1. docs/gpu.md says what the tables mean.
"""

import collections
import contextlib
import datetime
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import console

# Shares of the time, in the order in which they run: first what matters most where the time runs out.
SHARES = {"sees": 25, "numerics": 85, "memory": 105, "speed": 110, "peers": 55, "decoding": 40, "resume": 60}
FOLDER = pathlib.Path(__file__).parent / "device"
KEPT = 0.85  # of a part's time, after which it starts nothing new; it is killed at the end
LISTED = 400  # characters of a figure in the Markdown


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--out", default="runs/device", help="folder of the results")
    parser.add_argument("--parts", default=",".join(SHARES), help="which, separated by commas")
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="toy sizes (default on a CPU)")
    sizes.add_argument("--full", action="store_true", help="full sizes, on a CPU too")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := [name for name in parts if name not in SHARES]:
        raise UsageError(f"--parts: {unknown[0]!r} is unknown; use some of {','.join(SHARES)}")
    if args.seconds <= 0:
        raise UsageError(f"--seconds={args.seconds:g} must be above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the report is written
    out, rows = pathlib.Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    (out / "check.jsonl").unlink(missing_ok=True)
    report = {"command": f"python scripts/check_device.py {' '.join(argv)}".strip()}
    report |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}

    def add(part: str, row: dict) -> None:
        rows.append({"part": part} | row)
        with open(out / "check.jsonl", "a", encoding="utf-8") as f:
            f.write(console.to_json(rows[-1]) + "\n")
        console.show(f"{part:9} {MARKS[row['ok']]:6} {row['check']}: {brief(row)}"[:200], needed=False)

    started = time.monotonic()
    try:
        small = args.small or not (args.full or on_accelerator())
        for position, name in enumerate(parts):
            left = args.seconds - (time.monotonic() - started)
            share = SHARES[name] / sum(SHARES[other] for other in parts[position:])
            for row in run_part(FOLDER / f"{name}.py", small, max(left * share, 1)):
                add(name, row)
    finally:
        report |= {"seconds": round(time.monotonic() - started, 1), "rows": rows}
        write(out, report)
    failed = [f"{row['part']}: {row['check']}" for row in rows if row["ok"] is False]
    if failed:
        if args.json:
            console.show(console.to_json(report))
        raise RunFailure(f"{len(failed)} of {len(rows)} checks failed ({', '.join(failed[:5])}); see {out}/check.md")
    return report


def on_accelerator() -> bool:
    """Ask another process: this one must not hold the memory of the device that the parts measure."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RunFailure(f"JAX finds no device: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
    return done.stdout.split()[-1] != "cpu"


# ---------------------------------------------------------------------------------------------------------- one part


def run_part(script: pathlib.Path, small: bool, seconds: float) -> Iterator[dict]:
    """Yield the part's rows as they come, and a false row where it fails, hangs or prints something else.

    The part and the processes that it starts are one process group, which is killed in the end, whatever happens.
    """
    if not script.is_file():
        yield {"check": "part", "ok": None, "reason": f"{script.name} is not in this checkout"}
        return
    line = [sys.executable, str(script), f"--seconds={KEPT * seconds:.0f}", *(["--small"] if small else [])]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process = subprocess.Popen(line, start_new_session=True, **streams)
    lines, errors = queue.Queue(), []
    readers = [
        threading.Thread(target=lambda: [lines.put(text) for text in process.stdout] and None or lines.put(None)),
        threading.Thread(target=lambda: errors.extend(process.stderr)),
    ]
    for reader in readers:
        reader.daemon = True
        reader.start()
    deadline, is_false = time.monotonic() + seconds, False
    try:
        while (text := lines.get(timeout=max(deadline - time.monotonic(), 0))) is not None:
            for row in filter(None, [row_of(text)]):
                is_false |= row["ok"] is False
                yield row
        status = process.wait(max(deadline - time.monotonic(), 0.1))
    except (queue.Empty, subprocess.TimeoutExpired):
        yield {"check": "part", "ok": False, "reason": f"killed after {seconds:.0f} s; the rows above are whole"}
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    readers[1].join(1)
    if status and not is_false:
        last = next((error.strip() for error in reversed(errors) if error.strip()), "no message")
        yield {"check": "part", "ok": False, "reason": f"exit status {status}: {last[:300]}"}


def row_of(text: str) -> dict | None:
    """Return a part's line as a row; None for an empty line, and a false row for a line that is none."""
    if not text.strip():
        return None
    with contextlib.suppress(ValueError):
        row = json.loads(text)
        if isinstance(row, dict) and isinstance(row.get("check"), str) and row.get("ok", 0) in (True, False, None):
            return {key: value for key, value in row.items() if key != "part"}
    return {"check": "part", "ok": False, "reason": f"printed a line that is no row: {text.strip()[:200]}"}


# ------------------------------------------------------------------------------------------------------------ reports

MARKS = {True: "ok", False: "FALSE", None: "-"}


def write(out: pathlib.Path, report: dict) -> None:
    """Write check.json and check.md."""
    facts = {row["check"]: row for row in report["rows"] if row["part"] == "sees" and row["check"] != "choices"}
    report |= {key: {k: v for k, v in facts.get(key, {}).items() if k not in HIDDEN} for key in ("versions", "device")}
    (out / "check.json").write_text(console.to_json(report, indent=1) + "\n", encoding="utf-8")
    (out / "check.md").write_text(markdown(report), encoding="utf-8")


BAR = "\\|"  # in a cell
HIDDEN = ("part", "check", "ok", "seconds")


def markdown(report: dict) -> str:
    """Return the report as Markdown: its facts, and a table for each part and kind of check."""
    rows, device = report["rows"], report["device"]
    counts = [sum(row["ok"] is value for row in rows) for value in MARKS]
    lines = ["# Device check", "", "| | |", "|---|---|"]
    facts = {"device": f"{device.get('devices', '?')} x {device.get('kind', 'not asked')}", "date": report["date"]}
    facts |= {"versions": shown(report["versions"]), "command": f"`{report['command']}`"}
    facts["rows"] = "{} ok, {} false, {} without a bound or not run".format(*counts)
    lines += [f"| {name} | {value} |" for name, value in (facts | {"seconds": report["seconds"]}).items()]
    if failed := [row for row in rows if row["ok"] is False]:
        lines += ["", "## Failed", ""]
        lines += [f"- {row['part']}: {row['check']}: {brief(row)}" for row in failed]
    for (part, _), of_table in grouped(rows).items():
        checks = dict.fromkeys(row["check"] for row in of_table)
        keys = list(dict.fromkeys(key for row in of_table for key in row if key not in HIDDEN))
        keys = ["ok", *["check"] * (len(checks) > 1), *keys, *["seconds"] * any("seconds" in row for row in of_table)]
        title = f"{part}: {next(iter(checks))}" if len(checks) == 1 else part
        lines += ["", f"## {title}", "", f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
        for row in of_table:
            cells = [shown(row[key]) if key in row else "" for key in keys[1:]]
            lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in [MARKS[row['ok']], *cells])} |")
    return "\n".join(lines) + "\n"


def grouped(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Return the rows of each table: those of one check, or of checks that come once and begin with the same word.

    A row with a `value` is a bound on figures of other rows, and stands in a table beside them.
    """
    counts = collections.Counter((row["part"], row["check"]) for row in rows)
    tables = {}
    for row in rows:
        check = row["check"]
        alike = check if counts[row["part"], check] > 1 else (check.split()[0], "value" in row)
        tables.setdefault((row["part"], alike), []).append(row)
    return tables


def shown(value) -> str:
    """Return a figure as short text."""
    if isinstance(value, float):
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    elif isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "-"}[value]
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, dict):
        text = ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    elif isinstance(value, list):
        text = ", ".join(map(shown, value))
    else:
        text = str(value)
    return text.replace("\n", " ")[:LISTED]


def brief(row: dict) -> str:
    return shown({key: value for key, value in row.items() if key not in HIDDEN})


if __name__ == "__main__":
    cli.main(command)
