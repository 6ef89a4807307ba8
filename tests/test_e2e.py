"""The commands as real processes: train, kill, resume, generate, evaluate, report, and every bad input's one line."""

import fcntl
import gzip
import html
import itertools
import json
import math
import os
import pathlib
import pty
import random
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import types

import pyarrow
import pyarrow.parquet
import pytest
import test_tables
from runs import ROOT, STEPS, TINY, WORDS, assert_one_line, last_json, launch, rows, run, same_end, train, train_args

from lowrank_jax.data import sources, tokenizer
from lowrank_jax.machine import console


def test_a_run_leaves_everything_the_contract_names(reference):
    steps = [row for row in rows(reference, "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert {"phase", "stage", "seq_len", "batch", "tokens", "lr", "grad_norm", "tokens_per_s", "mfu"} <= steps[0].keys()
    assert [row["seq_len"] for row in steps] == [16] * 3 + [32] * 3 + [64] * 3 + [64] * 4
    assert {row["seq_len"] * row["batch"] for row in steps} == {256}
    assert [row["phase"] for row in steps] == ["pretrain"] * 9 + ["sft"] * 4
    evals = [row for row in rows(reference, "metrics.jsonl") if "split" in row]
    assert [(row["split"], row["step"]) for row in evals] == [
        ("pretrain", 0), ("pretrain", 5), ("pretrain", 9), ("sft", 9), ("sft", 10), ("sft", 13), ("pretrain", 13)
    ]  # fmt: skip
    events = [event["event"] for event in rows(reference, "events.jsonl")]
    samples = [e for e in rows(reference, "events.jsonl") if e["event"] == "sample"]
    assert [(e["phase"], e["step"], e["prompt"]) for e in samples] == [
        ("pretrain", 9, "The cat"), ("sft", 13, "Hello, how are you?")
    ]  # fmt: skip
    page = html.unescape((reference / "report.html").read_bytes().decode())
    assert all(f"<b>{e['prompt']}</b> {console.visible(e['text'])}</pre>" in page for e in samples)
    assert events.count("stage") == 4 and events.count("phase") == 2 and events[-1] == "finish"
    assert all(e["compile_seconds"] > 0 for e in rows(reference, "events.jsonl") if e["event"] == "stage")
    for name in ("config.json", "tokenizer", "checkpoints", "report.html", "loss.png"):
        assert (reference / name).exists()
    assert (reference / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        len(list((reference / "checkpoints").glob("[0-9]*"))) == 3
    )  # every.keep of the quickstart, and the end of pretraining


def test_a_python_of_its_own_and_the_compilers_own_settings_train_alike(data, tmp_path):
    """All other runs are forks, with programs that compile quickly."""
    small = {"model.layers": 1, "pretrain.steps": 2, "pretrain.auto_grow": False, "pretrain.eval_fraction": 0.0}
    args = train_args(data, tmp_path / "run", **small | {"pretrain.sample": "", "sft.steps": 0})
    process = launch("main", "--json", *args, fresh=True, env={"XLA_FLAGS": ""})
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and last_json(out)["step"] == 2, err
    first, second = (row["loss"] for row in rows(tmp_path / "run", "metrics.jsonl"))
    assert first == pytest.approx(math.log(TINY["tokenizer.vocab_size"]), abs=0.3) and second < first


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(data, reference, tmp_path):
    """Before any whole checkpoint, at a new length, in a later save, at the end of a phase, at SFT and inside it."""
    for fault in ("kill@save=1", "kill@step=4", "kill@save=2", "kill@step=9", "kill@step=10", "kill@step=12"):
        code, _, err = train(data, tmp_path / "run", faults=fault)
        assert code == -signal.SIGKILL, err
    code, _, err = train(data, tmp_path / "run")
    assert code == 0, err
    assert same_end(tmp_path / "run", reference)


def test_signals_at_any_moment_save_and_exit_with_their_number(data, reference, tmp_path):
    """Before the first step, between any two, and before the first update of SFT."""
    metrics, saved = tmp_path / "run" / "metrics.jsonl", []
    for number, rows_before in ((signal.SIGINT, 0), (signal.SIGTERM, 4), (signal.SIGINT, 8)):
        process = launch("main", *train_args(data, tmp_path / "run"))
        assert process.stdout.readline().startswith("stage")  # the plan: from here on nothing may be lost
        while rows_before and not (metrics.exists() and len(metrics.read_text().splitlines()) >= rows_before):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number and "saved at step" in err
        last = rows(tmp_path / "run", "events.jsonl")[-1]
        saved.append(last["step"])
        assert last["event"] == "preempt" and (tmp_path / "run" / "checkpoints" / str(saved[-1])).is_dir()
    assert saved == sorted(saved)
    assert train(data, tmp_path / "run", faults="term@step=10")[0] == 128 + signal.SIGTERM
    assert train(data, tmp_path / "run")[0] == 0
    assert same_end(tmp_path / "run", reference)


def test_a_loss_that_is_not_finite_costs_one_update_also_in_a_run_that_is_killed(data, tmp_path):
    code, _, err = train(data, tmp_path / "alone", faults="nan@step=7")
    assert code == 0 and "step 7: skipped an update" in err, err
    (skip,) = [e for e in rows(tmp_path / "alone", "events.jsonl") if e["event"] == "skip"]
    assert (skip["step"], skip["reason"], skip["loss"]) == (7, "not finite", None)
    losses = {
        row["step"]: (row["loss"], row["skipped"]) for row in rows(tmp_path / "alone", "metrics.jsonl") if "lr" in row
    }
    assert losses[7] == (None, 1) and all(loss is not None for step, (loss, _) in losses.items() if step != 7)
    assert losses[6][1] == 0 and losses[9][1] == 1
    for fault in ("kill@step=8", "kill@step=7"):
        assert train(data, tmp_path / "killed", faults=f"nan@step=7,{fault}")[0] == -signal.SIGKILL
    assert train(data, tmp_path / "killed", faults="nan@step=7")[0] == 0
    assert same_end(tmp_path / "killed", tmp_path / "alone")


def test_losses_that_stay_not_finite_stop_the_run_with_its_last_good_weights(data, tmp_path):
    faults = ",".join(f"nan@step={n}" for n in range(11, 40))
    code, _, err = train(data, tmp_path / "run", faults=faults, sft__steps=40)
    assert_one_line(code, err, 1, "20 updates in a row", "step 30")
    code, out, err = train(data, tmp_path / "run", sft__steps=40)  # the data was at fault: on from the last checkpoint
    assert code == 0 and last_json(out)["step"] == TINY["pretrain.steps"] + 40, err


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_loses_nothing(data, reference, tmp_path):
    assert train(data, tmp_path / "run", faults="term@step=4")[0] == 143
    process = launch("main", *train_args(data, tmp_path / "run"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (90_000, 90_000))  # as on a full disk: large writes fail
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1  # beside our line, tensorstore's own threads print what failed in them
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "checkpoint could not be written" in line and str(tmp_path / "run") in line
    assert train(data, tmp_path / "run")[0] == 0
    assert same_end(tmp_path / "run", reference)


def test_a_finished_run_is_left_as_it_is(data, reference, tmp_path):
    copy = tmp_path / "run"  # other tests count on one finish of the reference
    subprocess.run(["cp", "-r", reference, copy], check=True)
    before, metrics = rows(copy, "events.jsonl")[-1], (copy / "metrics.jsonl").read_bytes()
    code, out, _ = train(data, copy)
    assert code == 0 and last_json(out)["params_sha256"] == before["params_sha256"]
    assert (copy / "metrics.jsonl").read_bytes() == metrics  # nothing was trained or evaluated


def test_damaged_or_missing_run_files_are_named_in_one_line(reference, data, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", reference, copy], check=True)
    (copy / "config.json").write_text('{"seed": ')
    for module, *args in (["main", *train_args(data, copy)], ["generate", f"--workdir={copy}", "--prompt=a"]):
        code, _, err = run(module, *args)
        assert_one_line(code, err, 2, "config.json", "damaged")
    (copy / "config.json").unlink()
    code, _, err = train(data, copy)
    assert_one_line(code, err, 2, "no config.json")
    code, _, err = train(data, data / "a.txt")
    assert_one_line(code, err, 2, "--workdir", "a.txt")


def test_what_does_not_change_the_weights_may_change_on_a_resume(reference, data, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", reference, copy], check=True)
    changes = {"model__remat": True, "model__scan": True, "model__attention": "reference", "sft__steps": 6}
    code, out, err = train(data, copy, **changes)
    assert code == 0 and last_json(out)["step"] == STEPS + 2, err


def test_more_steps_continue_a_finished_run(data, reference, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", reference, copy], check=True)
    code, out, err = train(data, copy, sft__steps=6)
    assert code == 0 and last_json(out)["step"] == STEPS + 2, err
    assert "sft.steps: 4 -> 6" in [e for e in rows(copy, "events.jsonl") if e["event"] == "start"][-1]["changed"]


def test_a_second_process_in_the_same_folder_is_refused(data, tmp_path):
    first = launch("main", *train_args(data, tmp_path / "run", sft__steps=4000))
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    code, _, err = train(data, tmp_path / "run")
    first.kill()
    first.communicate()
    assert_one_line(code, err, 2, "another process", str(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model__d": 64}, ["holds a different run", "model.d"]),
        ({"seed": 5}, ["holds a different run", "seed"]),
        ({"pretrain__steps": 20}, ["step 13", "sft"]),
        ({"sft__steps": 9, "sft__sources": "builtin:smalltalk"}, ["chats.jsonl", "builtin:smalltalk"]),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(data, reference, changes, names):
    before = (reference / "config.json").read_text()
    code, _, err = train(data, reference, **changes)
    assert_one_line(code, err, 2, *names)
    assert (reference / "config.json").read_text() == before


@pytest.fixture(scope="session")
def every_kind(data, tok, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A folder of every kind of source, some with mistakes in them, and the settings of a run that mixes them."""
    home = tmp_path_factory.mktemp("kinds")
    tok.save(home / "tokenizer")
    notes = (data / "notes.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in notes]
    broken = [*notes[:20], "{broken", '{"texts": "wrong key"}', '{"text": 7}', *notes[20:]]
    (home / "b.jsonl").write_text("\n".join(broken))
    packed = gzip.compress("\n".join(json.dumps({"text": os.urandom(9).hex()}) for _ in range(400)).encode())
    (home / "c.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (home / "d.txt").write_bytes(b"plain text here. " * 300 + b"caf\xe9 " + b"and more of it. " * 300)
    (home / "e.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts[:9]))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), home / "f.parquet", row_group_size=9)
    tokenize = [sys.executable, "-m", "lowrank_jax.data", "tokenize", f"--tokenizer={home}/tokenizer", "--shards=2"]
    tokenize += [f"--sources=json:{data}/notes.jsonl", f"--out={home}/g"]
    subprocess.run(tokenize, check=True, capture_output=True, cwd=ROOT)
    subprocess.run([sys.executable, "-c", test_tables.BUILDER, home], check=True, capture_output=True)
    specs = [
        f"{spec}{home}/{name}" for spec, name in (("json:", "c.jsonl.gz"), ("text:", "d.txt@3"), ("hf:", "e.csv@4"))
    ]
    specs += [{"spec": f"json:{home}/b.jsonl", "weight": "0:2/20:0.2"}, f"arrayrecord:{home}/g", "tfds:tiny"]
    specs += [{"spec": f"parquet:{home}/f.parquet", "text_key": "body"}, "builtin:smalltalk"]
    kinds = {str(spec["spec"] if isinstance(spec, dict) else spec).split(":")[0] for spec in specs}
    assert kinds == set(sources.KINDS)
    settings = {"tokenizer__path": home / "tokenizer", "pretrain__sources": json.dumps(specs)}
    return home, settings | {"pretrain__steps": 20, "pretrain__tokens_per_step": 512, "every__save": 4}


def kill_at(process: subprocess.Popen, metrics: pathlib.Path, step: int, seconds: float) -> None:
    """Kill a run `seconds` after it has logged a step."""
    is_reached = lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()
    while not is_reached() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.communicate()


def test_a_mix_of_every_kind_of_source_resumes_bit_for_bit_wherever_it_is_killed(
    data, every_kind, tmp_path, monkeypatch
):
    home, settings = every_kind
    monkeypatch.setenv("TFDS_DATA_DIR", str(home))
    code, _, err = train(data, tmp_path / "alone", **settings)
    assert code == 0 and "first row of sft, with marks around the trained tokens:\n" in err and "<|im_end|>]]" in err, (
        err
    )
    seed = int(os.environ.get("LOWRANK_TEST_SEED") or random.SystemRandom().randrange(10**6))
    draw = random.Random(seed)
    early, late = draw.randint(1, 12), draw.randint(13, 24)
    moment, after = draw.randint(early, late), draw.random() / 2
    kills = f"killed before step {early}, in a save, {after:.3f} s after step {moment} or before {late}"
    print(f"LOWRANK_TEST_SEED={seed}: {kills}")
    flaky = ",".join(f"io@read={n}" for n in range(200, 4000, 400))
    for faults in (f"kill@step={early}", f"kill@save={draw.randint(1, 2)},{flaky}"):
        code, _, err = train(data, tmp_path / "killed", faults=faults, **settings)
        assert code == -signal.SIGKILL, err
    process = launch("main", *train_args(data, tmp_path / "killed", **settings), faults=f"kill@step={late}")
    kill_at(process, tmp_path / "killed" / "metrics.jsonl", moment, after)
    assert process.returncode == -signal.SIGKILL
    code, _, err = train(data, tmp_path / "killed", faults=flaky, **settings)
    assert code == 0, err
    assert same_end(tmp_path / "killed", tmp_path / "alone")
    events = rows(tmp_path / "alone", "events.jsonl")
    skipped = {
        event["where"].split("/")[-1].split(",")[0]: event["reason"]
        for event in events
        if event["event"] == "skip" and "where" in event  # of a record, not of an update
    }
    assert set(skipped) == {"b.jsonl", "c.jsonl.gz", "d.txt"}
    assert "cut short" in skipped["c.jsonl.gz"] and "not UTF-8" in skipped["d.txt"]
    retries = [event for event in rows(tmp_path / "killed", "events.jsonl") if event["event"] == "retry"]
    assert retries and "LOWRANK_FAULTS" in retries[0]["reason"]
    read = next(event for event in events if event["event"] == "data")["sources"]
    assert all(source["documents"] for source in read) and any(source["epochs"] > 1 for source in read)
    assert sum(source["skipped"] for source in read) == 5


def test_data_that_goes_bad_in_the_middle_ends_the_run_with_its_state_saved(data, tok, tmp_path, monkeypatch, capfd):
    """And until then it is saved every 10 minutes, by a clock on which a step takes one."""
    from lowrank_jax import cli, main
    from lowrank_jax.data import reader, stream
    from lowrank_jax.training import loop as training
    from lowrank_jax.training.plan import Progress

    monkeypatch.chdir(ROOT)
    for module, name, value in ((reader, "WINDOW", 1 << 10), (stream, "CHECK_READ", 9)):
        monkeypatch.setattr(module, name, value)  # so that the mistake lies beyond what is read ahead
    clock, after = itertools.count(60, 60), Progress.after
    now = types.SimpleNamespace(monotonic=lambda: now.seconds, seconds=0)
    tick = lambda *step: setattr(now, "seconds", next(clock)) or after(*step)
    monkeypatch.setattr(training, "time", now)
    monkeypatch.setattr(Progress, "after", tick)
    good = (data / "notes.jsonl").read_text()
    (tmp_path / "late.jsonl").write_text(good * 2 + "{broken\n" + good * 2)
    tok.save(tmp_path / "tokenizer")  # to learn one would be to read everything
    changes = {"tokenizer__path": tmp_path / "tokenizer", "pretrain__sources": f"json:{tmp_path}/late.jsonl"}
    changes |= {"pretrain__max_skipped": 0, "pretrain__steps": 999, "every__save": 999, "every__save_minutes": 10}
    with pytest.raises(SystemExit) as exit:
        cli.main(main.command, train_args(data, tmp_path / "run", **changes))
    assert_one_line(exit.value.code, capfd.readouterr().err, 2, "late.jsonl, record 121", "not JSON")
    *_, last = events = rows(tmp_path / "run", "events.jsonl")
    assert last["event"] == "save" and 20 < last["step"] < 999
    saves = [event["step"] for event in events if event["event"] == "save"]
    assert saves == [*range(10, last["step"], 10), last["step"]]


NO_SKIP = {"sft__max_skipped": 0}
BAD = {
    "unknown key": ({"model__dd": 3}, ["dd"]),
    "plan out of order": ({"pretrain__grow_plan": "16,64,32"}, ["pretrain.grow_plan", "16,64,32"]),
    "heads": ({"model__heads": 5}, ["model.heads=5", "model.d=32"]),
    "missing file": ({"pretrain__sources": "text:/nowhere/*.txt"}, ["/nowhere/*.txt", "no such file"]),
    "empty corpus": ({"pretrain__sources": "text:{data}/empty.txt"}, ["empty.txt", "no text"]),
    "blank corpus": ({"pretrain__sources": "text:{data}/blank.txt"}, ["blank.txt", "no text"]),
    "no assistant": (
        {"sft__sources": "json:{data}/monologue.jsonl", **NO_SKIP},
        ["monologue.jsonl", "record 2", "assistant"],
    ),
    "broken json": ({"sft__sources": "json:{data}/broken.jsonl"}, ["broken.jsonl", "record 1"]),
    "text in sft": ({"sft__sources": "json:{data}/notes.jsonl"}, ["notes.jsonl", "messages"]),
    "not a number": ({"pretrain__steps": "many"}, ["steps"]),
    "tiny vocabulary": ({"tokenizer__vocab_size": 257}, ["vocab_size=257"]),
    "huge vocabulary": ({"tokenizer__vocab_size": 50000}, ["vocab_size=50000"]),
    "late mistake": ({"sft__sources": "json:{data}/late.jsonl", **NO_SKIP}, ["late.jsonl", "record 301", "assistant"]),
    "block too short": ({"sft__block": 2, "sft__tokens_per_step": 256}, ["sft.block"]),
    "kind": ({"pretrain__sources": "ftp:x"}, ["ftp"]),
    "tokens per step": ({"pretrain__tokens_per_step": 250}, ["tokens_per_step=250"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(data, tmp_path, case, monkeypatch, capfd):
    from lowrank_jax import cli, main

    (data / "empty.txt").with_suffix(".txt").write_text("") if case == "empty corpus" else None
    (data / "blank.txt").write_text(" \n\n\t\n") if case == "blank corpus" else None
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    bad = {"messages": [{"role": "user", "content": "hi"}]}
    (data / "monologue.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    (data / "late.jsonl").write_text(f"{json.dumps(good)}\n" * 300 + json.dumps(bad))
    (data / "broken.jsonl").write_text('{"messages": [\n')
    changes, names = BAD[case]
    changes = {key: str(value).replace("{data}", str(data)) for key, value in changes.items()}
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        cli.main(main.command, train_args(data, tmp_path / "run", **changes))
    assert_one_line(exit.value.code, capfd.readouterr().err, 2, *names)
    assert not (tmp_path / "run").exists()
    for name in ("empty.txt", "blank.txt"):  # *.txt is the good runs' source
        (data / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    "module, args, names",
    [
        ("main", ["--config=configs/quickstart.py"], ["--workdir"]),
        ("main", ["--workdir=/tmp/x"], ["--config"]),
        ("main", ["--config=configs/nope.py", "--workdir=/tmp/x"], ["nope.py", "no such file"]),
        ("plan", ["--config=configs/custom.py", "--topologi=x"], ["topologi"]),
        ("plan", ["--config=configs/preset.py:huge"], ["huge", "base17"]),
        ("plan", ["--config=configs/from_yaml.py:/nowhere.yaml"], ["/nowhere.yaml"]),
        ("generate", ["--workdir=/nowhere", "--prompt=x"], ["/nowhere", "no run"]),
        ("evaluate", ["--workdir=/nowhere"], ["/nowhere", "no run"]),
        ("report", ["--workdir=/nowhere"], ["/nowhere", "no run"]),
    ],
)
def test_wrong_flags_get_one_line(module, args, names):
    code, _, err = run(module, *args)
    assert_one_line(code, err, 2, *names)


@pytest.mark.parametrize("module", ["main", "plan", "evaluate", "generate", "report"])
def test_every_command_explains_itself(module):
    code, out, _ = run(module, "--help")
    assert code == 0 and "--json" in out and f"lowrank_jax.{module}" in out


def test_generate_streams_what_it_returns_and_repeats_with_its_seed(reference):
    args = ["--json", f"--workdir={reference}", "--prompt=The cat", "--max_tokens=40", "--seed=3"]
    code, out, err = run("generate", *args)
    assert code == 0, err
    result = last_json(out)
    assert out.startswith("The cat" + result["text"])
    assert result["finish_reason"] in ("stop", "length") and len(result["tokens"]) <= 40
    assert {"prompt", "prefill_seconds", "tokens_per_s"} <= result.keys()
    assert last_json(run("generate", *args)[1])["tokens"] == result["tokens"]
    assert last_json(run("generate", *args[:-1], "--seed=4")[1])["tokens"] != result["tokens"]


def test_chat_answers_every_line_of_standard_input(reference):
    lines = "Hello there.\n\n/reset\nAnd again.\n"
    code, out, err = run("generate", f"--workdir={reference}", "--chat", "--max_tokens=8", "--json", stdin=lines)
    assert code == 0, err
    assert last_json(out)["prompt"] == "And again." and len(out.strip().splitlines()) >= 3
    code, out, _ = run(
        "generate", f"--workdir={reference}", "--chat", "--max_tokens=8", "--prompt=Hi", "--json", stdin=""
    )
    assert code == 0 and last_json(out)["prompt"] == "Hi"


@pytest.fixture(scope="module")
def on_a_terminal(data, tmp_path_factory) -> tuple[pathlib.Path, bytes]:
    """A run of pretraining alone, and what it showed on a terminal."""
    folder = tmp_path_factory.mktemp("terminal") / "run"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = launch("main", *train_args(data, folder, sft__steps=0), stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(timeout=60) == 0
    return folder, shown


def test_a_terminal_gets_a_progress_bar(on_a_terminal):
    _, shown = on_a_terminal
    assert b"\r" in shown and b"tokens/s" in shown and b"9/9" in shown


def test_evaluate_reports_every_length_and_agrees_with_training(on_a_terminal):
    folder, _ = on_a_terminal
    code, out, err = run("evaluate", f"--workdir={folder}", "--lengths=16,64", "--json")
    assert code == 0, err
    short, long = last_json(out)["results"]
    assert (short["length"], long["length"]) == (16, 64) and short["tokens"] == long["tokens"] > 0
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in (short, long))
    last = [row for row in rows(folder, "metrics.jsonl") if "split" in row][-1]
    assert (last["step"], last["split"], last["eval_tokens"]) == (9, "pretrain", long["tokens"])
    measured = [long["loss"], long["bits_per_byte"]]
    assert measured == pytest.approx([last["eval_loss"], last["bits_per_byte"]], rel=1e-5)
    assert abs(short["loss"] - long["loss"]) > 1e-4  # the same targets with less context


def test_evaluate_reads_another_source(reference, tmp_path):
    """Two documents that fill two rows of 64 tokens; no weight is on the target that begins the second."""
    encode = tokenizer.load(str(reference / "tokenizer")).encode
    for name in "ab":
        text = " ".join((WORDS * 9)[: 48 + 4 * (name == "b")])
        assert 64 < len(encode(text)) + 2 < 96
        (tmp_path / f"{name}.txt").write_text(text)
    source = f"--data=text:{tmp_path}/a.txt@0.5,text:{tmp_path}/b.txt"
    code, out, err = run("evaluate", f"--workdir={reference}", source, "--tokens=256", "--json")
    assert code == 0 and last_json(out)["results"][0]["tokens"] == 127, err
