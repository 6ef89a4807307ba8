"""The command `tokenize`: a run reads from its shards the tokens that it would have encoded itself."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lowrank_jax.config import UsageError, read_sources
from lowrank_jax.data import packing, shards, sources, tokenizer

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def command(*args, name: str = "tokenize", **options) -> subprocess.Popen:
    argv = [sys.executable, "-m", "lowrank_jax.data", name, *map(str, args)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)


def run(*args, status: int = 0, **options) -> tuple[str, str]:
    process = command(*args, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def on_the_fly(tok, spec: str, chats: bool) -> list[tuple]:
    source = sources.open_source(*read_sources(spec, "sources"), chats)
    documents = [source.document(row) for block in range(source.blocks) for row in source.rows(block)]
    return plain(packing.encode_document(tok, document, chats) for document in documents)


def from_shards(folder) -> list[tuple]:
    source = shards.ArrayRecord(str(folder))
    documents = [source.document(row) for block in range(source.blocks) for row in source.rows(block)]
    return plain((document["ids"], document["said"]) for document in documents)


def plain(encoded) -> list[tuple]:
    return sorted((ids.tolist(), np.asarray(said).tolist()) for ids, said in encoded)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def world(tok, make, tmp_path_factory):
    """A tokenizer, texts in many blocks, and conversations of which one cannot be used."""
    folder = tmp_path_factory.mktemp("tokenize")
    tok.save(str(folder / "tok"))
    make.write_jsonl(folder / "text.jsonl", [{"text": make.prose(20 + i % 50, seed=i)} for i in range(600)])
    talks = [{"messages": make.chat(2 + 2 * (i % 3), seed=i)} for i in range(40)]
    make.write_jsonl(folder / "chat.jsonl", [*talks, {"messages": [], "id": 1}])
    return folder


def test_shards_hold_the_ids_of_a_run_whatever_the_number_of_workers(world, tok):
    spec = f"json:{world}/text.jsonl"
    args = (f"--tokenizer={world}/tok", f"--sources={spec}", "--shards=3")
    out, err = run(*args, f"--out={world}/one", "--workers=1")
    run(*args, f"--out={world}/three", "--workers=3")
    assert contents(world / "one") == contents(world / "three")
    assert sorted(contents(world / "one")) == ["meta.json", *(f"part-0000{i}-of-00003.array_record" for i in range(3))]
    encoded = from_shards(world / "one")
    assert encoded == on_the_fly(tok, spec, False) and len(encoded) == 600
    tokens = sum(len(ids) for ids, _ in encoded)
    assert out.startswith(f"600 documents, {tokens:,} tokens in 3 shards of {world}/one: ") and out.count("\n") == 1
    assert "tokens/s" in out and err == ""
    meta = json.loads((world / "one" / "meta.json").read_text())
    assert (meta["documents"], meta["tokens"], meta["shards"], meta["chats"]) == (600, tokens, 3, False)
    assert (meta["vocab_size"], meta["tokenizer_sha256"]) == (tok.vocab_size, tok.sha256)


def test_only_the_assistants_tokens_carry_weight_and_bad_records_are_counted(world, tok):
    spec = f"json:{world}/chat.jsonl"
    args = (f"--tokenizer={world}/tok", f"--sources={spec}", f"--out={world}/chats", "--chats", "--json")
    out, err = run(*args)
    assert "skipped 1 unusable records; for example, " in err and "'messages' is empty" in err
    assert "chat.jsonl, record 41" in err or "chat.jsonl, line 41" in err
    assert json.loads(out.splitlines()[-1])["skipped"] == 1
    lines = (world / "chat.jsonl").read_text().splitlines(keepends=True)
    (world / "good.jsonl").write_text("".join(lines[:-1]))
    encoded = from_shards(world / "chats")
    assert encoded == on_the_fly(tok, f"json:{world}/good.jsonl", True) and len(encoded) == 40
    assert all(any(said) and not all(said[1:]) for _, said in encoded)
    assert shards.ArrayRecord(str(world / "chats")).chats


def test_mistakes_are_one_line_and_status_2(world):
    (world / "full").mkdir()
    (world / "full" / "x").write_text("mine")
    good = {"--tokenizer": f"{world}/tok", "--sources": f"json:{world}/text.jsonl", "--out": f"{world}/new"}
    (world / "no_text.jsonl").write_text('{"body": 1}\n' * 3)
    cases = [
        ({"--out": f"{world}/full"}, f"--out={world}/full exists already; name a folder that does not"),
        ({"--tokenizer": f"{world}/none"}, "none"),
        ({"--sources": f"json:{world}/none*"}, "no such file"),
        ({"--sources": "text.jsonl"}, "must be kind:location"),
        (
            {"--sources": f"json:{world}/no_text.jsonl"},
            f"no text in json:{world}/no_text.jsonl; for example, ",
        ),
        ({"--sources": f"json:{world}/chat.jsonl", "--max_skipped": "0"}, "chat.jsonl"),
        ({"--workers": "-1"}, "must not be negative"),
        ({"--sheep": "1"}, "unrecognized arguments"),
    ]
    for changes, message in cases:
        out, err = run(*(f"{key}={value}" for key, value in (good | changes).items()), status=2)
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert (world / "full" / "x").read_text() == "mine"
    assert not (world / "new").exists() and not list(world.glob("*.partial-*"))


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_leaves_nothing_that_opens_and_no_process(world, make, tmp_path, sign):
    make.write_jsonl(tmp_path / "big.jsonl", [{"text": make.prose(2000)}] * 6000)
    out = tmp_path / "out"
    args = (f"--tokenizer={world}/tok", f"--sources=json:{tmp_path}/big.jsonl", f"--out={out}", "--workers=2")
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    process = command(*args, preexec_fn=listen)
    end = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob("out.partial-*/*")) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # it must not end before it is killed
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) >= 2
    process.send_signal(sign)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == (-sign if sign == signal.SIGKILL else 128 + sign)
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    assert not out.exists()
    left = list(tmp_path.glob("out.partial-*"))
    assert len(left) == (sign == signal.SIGKILL)
    for folder in left:
        with pytest.raises(UsageError, match="meta.json: no such file"):
            shards.ArrayRecord(str(folder))


def test_tokenised_sources_are_refused(world, tok):
    run(f"--tokenizer={world}/tok", f"--sources=json:{world}/text.jsonl", f"--out={world}/first")
    args = (f"--tokenizer={world}/tok", f"--sources=arrayrecord:{world}/first", f"--out={world}/second")
    assert "is tokenised already" in run(*args, status=2)[1]


def test_no_process_of_the_command_imports_jax(world):
    """The 1 s of importing JAX would be paid by every worker."""
    args = (f"--tokenizer={world}/tok", f"--sources=json:{world}/text.jsonl", f"--out={world}/no_jax", "--workers=2")
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "JAX_COMPILATION_CACHE_DIR": ""}  # with a cache `cli` needs JAX
    _, err = run(*args, env=env)
    imported = [line.rsplit("|", 1)[-1].strip() for line in err.splitlines() if line.startswith("import time:")]
    assert "jax" not in imported
    assert imported.count("lowrank_jax.data.packing") >= 2  # the command and at least the worker that wrote the shards


def test_a_tokenizer_is_learnt_and_saved(world):
    args = (f"--sources=json:{world}/text.jsonl", "--vocab_size=521", f"--out={world}/learnt")
    assert run(*args, name="learn_tokenizer")[0] == f"521 pieces in {world}/learnt\n"
    assert tokenizer.load(f"{world}/learnt").vocab_size == 521
    assert "is not empty" in run(*args, name="learn_tokenizer", status=2)[1]


def test_an_unknown_command_is_one_line_and_status_2():
    assert run(name="sheep", status=2)[1].startswith("error: unknown command 'sheep'; use ")
