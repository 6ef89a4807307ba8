"""Run folders on file systems that fail: nothing good is lost, and nothing foreign ends a run or is touched."""

import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
import runs

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.export import folder as export_folder
from lowrank_jax.machine import storage
from lowrank_jax.training import checkpoint, memory, report, run_folder
from lowrank_jax.training.checkpoint import Checkpoints
from lowrank_jax.training.plan import Progress, make

# Orbax leaves coroutines behind where it fails to read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STATE = {"x": jnp.arange(30_000, dtype=jnp.float32), "y": jnp.ones((3, 4))}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(checkpoint, "LISTING_PAUSE", 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(str(folder)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(STATE, Progress(step=step))
    return folder


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")


def restored_step(folder, **options) -> int:
    with Checkpoints(str(folder), **options) as checkpoints:
        return checkpoints.restore(STATE)[1].step


def entries(folder) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def damage(folder, step: int) -> None:
    (folder / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()


# ----------------------------------------------------------------------------------------------- unreadable for now

AT = 'Error reading local file "/r/checkpoints/3/state/manifest.ocdbt": Failed to open: "/r/3/state/manifest.ocdbt": '
VERDICTS = [
    (OSError(errno.EIO, "Input/output error"), "unread"),
    (PermissionError(errno.EACCES, "Permission denied"), "unread"),
    (TimeoutError("no answer"), "unread"),
    (ValueError(f"UNKNOWN: {AT}Input/output error [os_error_code='5']"), "unread"),
    (ValueError(f"UNKNOWN: {AT}Remote I/O error"), "unread"),
    (ValueError(f"PERMISSION_DENIED: {AT}Permission denied"), "unread"),
    (ValueError(f"ABORTED: {AT}Stale file handle"), "unread"),
    (ValueError(f"DEADLINE_EXCEEDED: {AT}Connection timed out"), "unread"),
    (ValueError(f"RESOURCE_EXHAUSTED: {AT}Too many open files"), "unread"),
    (ValueError(f"NOT_FOUND: {AT}No such device or address"), "unread"),
    (ValueError(f"FAILED_PRECONDITION: {AT}Transport endpoint is not connected"), "unread"),
    (ValueError("UNAVAILABLE: the storage server sends no answer"), "unread"),
    (FileNotFoundError("File /r/checkpoints/3/meta/metadata not found."), "damaged"),
    (IsADirectoryError(errno.EISDIR, "Is a directory"), "damaged"),
    (
        ValueError('NOT_FOUND: Metadata at "x/.zarray" in OCDBT database at local file "/r/3/" does not exist'),
        "damaged",
    ),
    (ValueError('DATA_LOSS: Error decoding local file "/r/3": CRC-32C checksum verification failed'), "damaged"),
    (ValueError("OUT_OF_RANGE: Requested byte range [0, 83392) is not valid for value of size 0"), "damaged"),
    (ValueError("FAILED_PRECONDITION: Truncated Zstd-compressed stream; at byte 0"), "damaged"),
    (json.JSONDecodeError("Expecting value", "", 0), "damaged"),
    (KeyError("tree_metadata"), "damaged"),
    (RuntimeError("can't start new thread"), "unknown"),
]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("e, verdict", VERDICTS, ids=lambda x: str(x)[:30])
def test_an_error_is_damage_only_where_the_contents_say_so(e, verdict, wrapped):
    if wrapped:
        outer = Exception("Encountered error while reading array index")
        outer.__cause__, e = e, outer
    assert checkpoint._verdict(e) == verdict


@pytest.mark.parametrize("e", [e for e, verdict in VERDICTS if verdict != "damaged"][::4], ids=lambda e: str(e)[:30])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_checkpoint_that_cannot_be_read_is_read_again_and_then_ends_the_run_untouched(run, monkeypatch, e, read_only):
    before, read = sorted(run.rglob("checkpoints/**")), Checkpoints._read
    with Checkpoints(str(run), read_only=read_only) as checkpoints:
        original, failures = checkpoints._manager.restore, [e] * 2

        def restore(step, args):
            if failures:
                raise failures.pop()
            return original(step, args=args)

        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        if checkpoint._verdict(e) == "unread":
            assert checkpoints.restore(STATE)[1].step == 3 and not failures
        failures[:] = [e] * 99
        with pytest.raises(RunFailure, match=f"^{run}/checkpoints/3 cannot be read: .*; it stays as it is") as failure:
            checkpoints.restore(STATE)
        assert "\n" not in str(failure.value) and Checkpoints._read is read
    assert sorted(run.rglob("checkpoints/**")) == before


UNDER_SHIM = """
import json, os, sys
from lowrank_jax import evaluate, main
from lowrank_jax.config import RunFailure
from lowrank_jax.machine import storage
storage.PAUSES = (0, 0)
workdir, train = json.loads(sys.argv[1])
def attempt(shim, command, argv):
    os.environ["FAULTY_FILES"] = shim
    try:
        return command(argv)
    except RunFailure as e:
        return str(e)
part = f"{workdir}/checkpoints/{max(map(int, os.listdir(workdir + '/checkpoints')))}/"
look = [f"--workdir={workdir}"]
results = [attempt(f"5:1000:read:{part}state/manifest.ocdbt", evaluate.command, look)]
results += [attempt(f"116:1:read:{part}state/d/", evaluate.command, look)]
results += [attempt(f"13:1000:read:{part}state/_METADATA", main.command, train)]
results += [sorted(os.listdir(f"{workdir}/checkpoints"))]
results += [attempt(f"5:1:read:{part}state/manifest.ocdbt", main.command, train)]
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> str:
    """A library that lets opens of a real process fail."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("no C++ compiler")
    library, source = tmp_path_factory.mktemp("shim") / "faulty_files.so", "scripts/bench/faulty_files.cc"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], cwd=runs.ROOT, check=True)
    return str(library)


def test_a_real_process_reads_over_failing_opens_and_gives_up_without_a_loss(data, reference, shim, tmp_path):
    """In `evaluate` and a resume, opens that fail for good change nothing, and one that fails once costs nothing."""
    workdir = shutil.copytree(reference, tmp_path / "run")
    saved = entries(workdir)
    arguments = json.dumps([str(workdir), runs.train_args(data, workdir)])
    env = os.environ | runs.ENVIRONMENT | {"LD_PRELOAD": shim}
    done = subprocess.run(
        [sys.executable, "-c", UNDER_SHIM, arguments], cwd=runs.ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    unread, evaluated, refused, left, finish = runs.last_json(done.stdout)
    assert "Input/output error (3 attempts); it stays as it is" in unread and evaluated["results"]
    assert "Permission denied" in refused and left == saved and finish["step"] == runs.STEPS
    assert "Traceback" not in done.stderr and runs.same_end(workdir, reference)
    assert {e["event"] for e in runs.rows(workdir, "events.jsonl")} & {"restore_failed", "retry"} == {"retry"}


# ---------------------------------------------------------------------------------------------- damaged and foreign


def test_a_damaged_checkpoint_is_renamed_and_told_and_nothing_of_it_is_lost(run, capsys):
    for expected in (["1", "2", "3.damaged"], ["1", "2", "3.damaged", "3.damaged2"]):
        damage(run, 3)
        content = sorted((run / "checkpoints" / "3").rglob("*"))
        assert restored_step(run, read_only=True) == 2 and "3" in entries(run)
        assert restored_step(run) == 2 and entries(run) == expected
        assert len(sorted((run / "checkpoints" / expected[-1]).rglob("*"))) == len(content)
        with Checkpoints(str(run)) as checkpoints:
            assert checkpoints.save(STATE, Progress(step=3))
    assert "is damaged (NOT_FOUND: " in (err := capsys.readouterr().err) and "using step 2; it is 3.damaged2" in err


def test_a_checkpoint_of_another_step_is_damaged(run):
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "9")
    assert restored_step(run) == 3 and "9.damaged" in entries(run)


def test_a_checkpoint_that_the_run_did_not_save_is_told(run, tmp_path, capsys):
    """It may be of another run, or an older copy; the same bytes, copied by hand, are the run's own."""
    with Checkpoints(str(tmp_path / "other")) as checkpoints:
        checkpoints.save(STATE | {"y": jnp.zeros((3, 4))}, Progress(step=9))
    with Checkpoints(str(run)) as checkpoints:
        run_folder.log_event(str(run), "save", 9, checksum=checkpoints.save(STATE, Progress(step=9)))
    (run / "checkpoints" / "9").rename(tmp_path / "9")
    for source, is_told in ((tmp_path / "9", False), (tmp_path / "other" / "checkpoints" / "9", True)):
        shutil.rmtree(run / "checkpoints" / "9", ignore_errors=True)
        shutil.copytree(source, run / "checkpoints" / "9")
        for options in ({}, {"read_only": True}):
            assert restored_step(run, **options) == 9
            assert ("step 9 is not the one that" in capsys.readouterr().err) == is_told


def add_strays(checkpoints: pathlib.Path) -> None:
    for name in ("999999", "12.orbax-checkpoint-tmp-17", "\u0661\u0662", "007", "5"):
        (checkpoints / name).mkdir()
    (checkpoints / "5" / "state").mkdir()
    for name in ("notes.txt", "7~", ".swp", "4", "100", "-3", "1e3", "9" * 200):
        (checkpoints / name).write_text("of somebody")
    (checkpoints / "6").symlink_to(checkpoints / "3")
    (checkpoints / "8").symlink_to("nowhere")


@pytest.mark.parametrize("keep", [1, 2])
def test_strays_neither_end_a_run_nor_count_nor_vanish(run, keep, capsys):
    add_strays(run / "checkpoints")
    strays = set(entries(run)) - {"1", "2", "3"}
    assert run_folder.newest_checkpoint(str(run)) == 3 and restored_step(run, read_only=True) == 3
    with Checkpoints(str(run), keep=keep) as checkpoints:
        assert checkpoints.steps() == [3, 2, 1] and checkpoints.restore(STATE)[1].step == 3
        for step in (4, 5, 6, 7, 8):
            assert checkpoints.save(STATE, Progress(step=step))
        checkpoints.wait()
        assert checkpoints.steps() == [8, 7][:keep] and checkpoints.restore(STATE)[1].step == 8
    left = set(entries(run))
    renamed = {f"{step}.stray" for step in (4, 5, 6, 8)}
    assert left == strays - {"4", "5", "6", "8"} | renamed | {"8", "7"} - ({"7"} if keep == 1 else set())
    assert (run / "checkpoints" / "4.stray").read_text() == "of somebody"
    assert "it is 4.stray from now on" in capsys.readouterr().err


def test_a_reader_beside_a_training_that_keeps_one_checkpoint_reads_the_newer_one(run, monkeypatch):
    """The checkpoint is deleted while it is read: as a whole, half, or just before it is opened."""
    for harm in ("state", "meta", "", "state/manifest.ocdbt"):
        home = run / "checkpoints"
        newest = run_folder.newest_checkpoint(str(run))
        with Checkpoints(str(run), read_only=True) as checkpoints:
            original, failures = checkpoints._manager.restore, [newest]

            def restore(step, args, harm=harm, original=original, failures=failures, home=home):
                if failures:
                    path = home / str(failures.pop())
                    with Checkpoints(str(run)) as trainer:
                        trainer.save(STATE, Progress(step=step + 1))
                    shutil.rmtree(path / harm) if (path / harm).is_dir() else (path / harm).unlink()
                return original(step, args=args)

            monkeypatch.setattr(checkpoints._manager, "restore", restore)
            assert checkpoints.restore(STATE)[1].step == newest + 1
        shutil.rmtree(home / str(newest), ignore_errors=True)


def test_a_checkpoint_whose_parts_cannot_be_looked_at_is_no_stray(run, monkeypatch):
    lstat, failures = os.lstat, [OSError(errno.EIO, "Input/output error")] * 2

    def fail(path, **options):
        if failures and str(path).endswith("state"):
            raise failures.pop()
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", fail)
    assert run_folder.checkpoint_steps(str(run)) == [3, 2, 1] and not failures
    failures[:] = [OSError(errno.EIO, "Input/output error")] * 99
    with pytest.raises(OSError, match="Input/output error"):
        run_folder.newest_checkpoint(str(run))


# ------------------------------------------------------------------------------------------------- rows and files


@pytest.fixture(scope="module")
def ledger(make, tmp_path_factory) -> tuple[pathlib.Path, object, object]:
    """A folder with config, metrics and events of every kind that code reads, and its config and plan."""
    folder = tmp_path_factory.mktemp("ledger")
    config = make.run_config(pretrain__sources="text:x", pretrain__steps=4, pretrain__block=16, sft__steps=0)
    plan = make_plan(config)
    run_folder.write_config(str(folder), config)
    stage = plan.stages[0]
    train = {"phase": "pretrain", "stage": stage.name, "seq_len": 16, "batch": 8, "loss": 2.5, "lr": 0.01}
    for step in range(1, 5):
        rest = {"grad_norm": 1.25, "tokens_per_s": 512.5, "mfu": None, "skipped": 0}
        run_folder.append(str(folder), "metrics.jsonl", {"step": step, "tokens": 128 * step} | train | rest)
    evaluation = {"split": "pretrain", "eval_loss": 2.25, "bits_per_byte": 1.5, "eval_tokens": 64}
    run_folder.append(str(folder), "metrics.jsonl", {"step": 4, "phase": "pretrain", "stage": stage.name} | evaluation)
    settings = {"microbatch": 8, "remat": False, "precision": "fp32", "attention": "chunked"}
    conditions = memory.fit_conditions(config, plan.mesh, 2**33)
    fit = {"stage": stage.name, "peak_bytes": 10**6, "note": ""} | settings | conditions
    events = [("start", {"resumes": False, "changed": []}), ("compile", fit)]
    events += [("oom", {"device": conditions["device"], "microbatch_tokens": 64, "remat": False, "reason": "x"})]
    events += [("stage", {"stage": stage.name, "seq_len": 16, "compile_seconds": 1.5, "stall_seconds": 0.5})]
    events += [("save", {"data_sha256": "ab" * 32, "blocked_seconds": 0.125}), ("skip", {"loss": None, "reason": "x"})]
    events += [("data", {"phase": "pretrain", "sources": []}), ("sample", {"phase": "p", "prompt": "a", "text": "b"})]
    for event, facts in [*events, ("finish", {"tokens": 512})]:
        run_folder.log_event(str(folder), event, 4, **facts)
    return folder, config, plan


def make_plan(config):
    import jax

    return make(config, jax.devices()[:1])


def read_everything(folder, config, plan) -> None:
    """Read the files in every way in which a start, a resume and a report do."""
    events = run_folder.read_rows(str(folder), "events.jsonl")
    memory.fits_from_ledger(events, config, plan.stages, plan.mesh, 2**33)
    run_folder.milestones(str(folder)), run_folder.finished_step(str(folder))
    rows = run_folder.read_rows(str(folder), "metrics.jsonl")
    report._glance(rows, events, {"params": {"total": 1}}), report._eval_summary(report._split(rows)[1])
    report._switches(events, []), report._warnings(config, rows, events), report._run(events)
    report._saving(rows, events), [report._flat(event) for event in events]
    report._tokens(report._split(rows)[0], [row["step"] for row in rows])
    run_folder.rewind_metrics(str(folder), 4)


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("age", ["new", "old"])
def test_a_flipped_bit_or_a_torn_line_costs_that_line_alone_and_is_told(ledger, tmp_path, name, age, capsys):
    """An old run's lines have no checksum: what still reads as a row there may be used, but ends nothing."""
    source, config, plan = ledger
    lines, draw = (source / name).read_bytes().splitlines(), random.Random(0)
    if age == "old":
        lines = [line[: line.rindex(b', "crc"')] + b"}" for line in lines]
    whole = [json.dumps({key: x for key, x in json.loads(line).items() if key != "crc"}) for line in lines]
    for case in range(60):
        folder = shutil.copytree(source, tmp_path / str(case))
        number, changed = draw.randrange(len(lines)), list(lines)
        line = bytearray(lines[number])
        if case % 5:
            line[draw.randrange(len(line))] ^= 1 << draw.randrange(8)
        else:
            line = line[: draw.randrange(1, len(line))]
        changed[number] = bytes(line)
        (folder / name).write_bytes(b"\n".join(changed) + b"\n")
        capsys.readouterr()
        rows = [json.dumps(row) for row in run_folder.read_rows(str(folder), name)]
        assert {*whole[:number], *whole[number + 1 :]} <= {*rows}
        read_everything(folder, config, plan)
        warnings = capsys.readouterr().err.count("damaged lines are passed over")
        assert warnings == (len(rows) < len(lines))
        assert warnings or age == "old" or b'"crc"' not in line  # without its checksum it is the line of an old run
        if name == "metrics.jsonl" and warnings:
            assert bytes(line).split(b"\n")[0] in (folder / "metrics.jsonl.damaged").read_bytes()


FOREIGN = [b"[1]", b"3", b"null", b"\xff\xfe{}", b"[" * 10**5, b'{"step": 1}', b'{"event": 1}', b"\0\0"]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[:9]))
def test_foreign_lines_are_passed_over(ledger, tmp_path, line):
    source, config, plan = ledger
    folder = shutil.copytree(source, tmp_path / "run")
    names = ("events.jsonl", "metrics.jsonl")
    before = [run_folder.read_rows(str(folder), name) for name in names]
    for name in names:
        (folder / name).write_bytes(line + b"\n" + (folder / name).read_bytes())
    assert [run_folder.read_rows(str(folder), name) for name in names] == before
    read_everything(folder, config, plan)


def test_what_an_editor_does_to_text_costs_no_line(ledger, tmp_path, capsys):
    """A BOM at the start, CRLF line ends and blank lines at the end."""
    source, config, _ = ledger
    folder = shutil.copytree(source, tmp_path / "run")
    for name in ("config.json", "metrics.jsonl", "events.jsonl"):
        text = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert run_folder.read_config(str(folder)) == config and not capsys.readouterr().err
    for name in ("metrics.jsonl", "events.jsonl"):
        assert run_folder.read_rows(str(folder), name) == run_folder.read_rows(str(source), name)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_named_pipe_or_a_folder_in_place_of_a_ledger_is_named_and_not_waited_for(ledger, tmp_path, name):
    for kind in (os.mkfifo, os.mkdir):
        folder = shutil.copytree(ledger[0], tmp_path / kind.__name__)
        (folder / name).unlink()
        kind(folder / name)
        with pytest.raises(OSError, match=f"{name} cannot be read: (it is no regular file|is a directory)"):
            run_folder.read_rows(str(folder), name)


def test_a_run_whose_checkpoints_are_away_does_not_begin_again_unseen(ledger, tmp_path, capsys):
    folder = shutil.copytree(ledger[0], tmp_path / "run")
    (folder / "checkpoints").symlink_to(tmp_path / "unmounted")
    for look in (run_folder.newest_checkpoint, run_folder.strays):
        with pytest.raises(UsageError, match="checkpoints is a broken link to .*unmounted"):
            look(str(folder))
    run_folder.rewind_metrics(str(folder), 0)
    assert "has no checkpoint after step 0, so training begins again" in capsys.readouterr().err
    run_folder.rewind_metrics(str(folder), 0)
    assert not capsys.readouterr().err


def test_a_folder_that_no_checkpoint_can_be_in_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "caf\udce9"  # Latin-1
    with pytest.raises(UsageError, match="need a path in UTF-8"), run_folder.lock(str(folder)):
        pass
    assert not os.listdir(tmp_path)


def test_a_run_whose_folder_is_moved_away_is_named(ledger, tmp_path, monkeypatch):
    folder = shutil.copytree(ledger[0], tmp_path / "run")
    lstat, failures = os.lstat, [OSError(errno.EIO, "Input/output error")] * 2

    def fail(path, **options):
        if failures:
            raise failures.pop()
        return lstat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fail)
        run_folder.check_presence(str(folder))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RunFailure, match="was removed or moved while it was trained"):
        run_folder.check_presence(str(folder))


def test_nothing_is_written_through_links_in_a_run_folder(ledger, tmp_path):
    source, config, _ = ledger
    folder, outside = shutil.copytree(source, tmp_path / "run"), tmp_path / "outside"
    outside.write_text("precious")
    for name in ("report.html", "loss.png", "report.html.tmp", ".lock", "metrics.jsonl.damaged"):
        (folder / name).symlink_to(outside)
    with pytest.raises(UsageError, match="symbolic link; remove it"), run_folder.lock(str(folder)):
        pass
    report.write(str(folder))
    run_folder.write_config(str(folder), config)
    (folder / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        with pytest.raises(OSError, match="symbolic link"):
            run_folder.append(str(folder), name, {"step": 1})
    run_folder.write_config(str(folder), config)
    assert outside.read_text() == "precious" and (folder / "loss.png").read_bytes()[1:4] == b"PNG"


def test_what_a_killed_replacement_left_is_removed_with_time(tmp_path):
    old, new, other = (tmp_path / name for name in (".config.json.0123abcd.tmp", ".a.89abcdef.tmp", ".notes.tmp"))
    for path in (old, new, other):
        path.write_text("half")
    os.utime(old, (0, 0))
    with run_folder.lock(str(tmp_path)):
        assert not old.exists() and new.exists() and other.exists()


# --------------------------------------------------------------------------------------------------------- exports


def test_an_export_clears_what_a_killed_one_left_and_nothing_else(tmp_path):
    killed, running, foreign = (tmp_path / f".export-{name}" for name in ("killed00", "running0", "foreign0"))
    for path in (killed, running, foreign):
        (path / "export").mkdir(parents=True)
    for path in (killed, running):
        (path / export_folder.LOCK).touch()
    with storage.lock(str(running / export_folder.LOCK)), export_folder.whole_folder(str(tmp_path / "out")) as folder:
        os.makedirs(folder)
    assert sorted(os.listdir(tmp_path)) == [".export-foreign0", ".export-running0", "out"]


def test_a_full_disk_is_named_by_an_export_and_leaves_nothing(tmp_path):
    with pytest.raises(RunFailure, match=f"^{tmp_path}/out cannot be written: no space left on device$"):
        with export_folder.whole_folder(str(tmp_path / "out")):
            raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_by_a_checkpoint_and_costs_no_other(run, monkeypatch):
    long = f'RESOURCE_EXHAUSTED: Error writing "params" in OCDBT database at local file "/{"r" * 600}": '
    with Checkpoints(str(run), keep=1) as checkpoints:
        with monkeypatch.context() as patch:

            def save(*_, **__):
                raise ValueError(f"{long}Failed to write: No space left on device [os_error_code='28']")

            patch.setattr(checkpoints._manager, "save", save)
            with pytest.raises(RunFailure, match=f"written to {run}: .*No space left on device$"):
                checkpoints.save(STATE, Progress(step=4))
    assert {"1", "2", "3"} <= set(entries(run))


# --------------------------------------------------------------------------------------------------------- streams

CLOSED = """
import os, sys
from lowrank_jax.machine import console, startup
startup.open_streams()
f = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
sys.stdout.isatty(), sys.stderr.isatty()
for _ in range(3):
    console.show("a line", needed=False), console.say("a warning")
os.write(f, b"%d" % f)
"""


@pytest.mark.parametrize("how", [">&-", ">&- 2>&- <&-", ">/dev/full", "| true"])
def test_output_that_nobody_takes_harms_nothing(tmp_path, how):
    path = tmp_path / "file"
    line = f"sleep 0.2; \"{sys.executable}\" -c '{CLOSED}' {path}; echo $? > {path}.status"
    line = f"( {line} ) {how}" if "|" in how else line.replace(f" {path};", f" {path} {how};")
    done = subprocess.run(["bash", "-c", line], cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
    assert (tmp_path / "file.status").read_text() == "0\n", done.stderr
    assert int(path.read_text()) > 2 and "Error" not in done.stderr
