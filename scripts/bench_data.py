"""How fast data arrives, what it holds in memory, and what a resume costs: ours beside Hugging Face `datasets`.

    python scripts/bench_data.py            # writes a 5 GB file, and deletes it; about 10 minutes on 2 cores
    python scripts/bench_data.py --gb=0.1   # the same in little

Both sides do the same job in the same run: read the same file, encode with the same tokenizer, put BOS and EOS around
each document, cut the stream into rows of 1,024 tokens. Rates are per second of processor time over all threads
(per core), so that a busy machine distorts them less. Every measurement has a process of its own.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

sys.path[0] = str(pathlib.Path(__file__).parents[1])

ROWS, LENGTH = 16, 1024
DOCUMENT = 2000  # characters, about
VOCAB = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5.0, help="size of the generated file")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each rate is measured")
    parser.add_argument("--folder", default=None, help="where to put the file (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = bench(folder, args.gb, args.seconds)
    print(table(results))
    print(json.dumps(results))


def bench(folder: str, gb: float, seconds: float) -> dict:
    tell = lambda text: print(text, file=sys.stderr, flush=True)
    tell(f"writing {gb} GB of JSON lines, {gb / 50} GB more, and 0.2 GB of shards with scripts/tokenize.py")
    in_process("write", folder, gb)
    small, big = f"{folder}/small.jsonl", f"{folder}/big.jsonl"
    step = in_process("step", folder)
    results = {"gb": gb, "quickstart_step": step}
    for name in ("tokenizer", "text", "text_hf", "tokens", "tokens_hf"):
        results[name] = in_process(name, folder, seconds)
        tell(f"{name}: {results[name]}")
    for name in ("memory", "memory_hf"):
        results[name] = {"small": in_process(name, folder, small), "big": in_process(name, folder, big)}
        tell(f"{name}: {results[name]}")
    for name in ("resume", "resume_hf"):
        results[name] = {"start": in_process(name, folder, 0.0), "deep": in_process(name, folder, 0.8)}
        tell(f"{name}: {results[name]}")
    return results


def in_process(name: str, *args):
    """The JSON that `python scripts/bench_data.py NAME ARGS` prints last, from a fresh process."""
    command = [sys.executable, __file__, name, *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(r: dict) -> str:
    rate = lambda x: f"{x['per_core'] / 1e6:.2f} Mtok/s a core"
    step = r["quickstart_step"]["tokens_per_s"]
    memory = lambda x: f"{x['small']['peak_mb']:.0f} / {x['big']['peak_mb']:.0f} MB"
    growth = lambda x: f"{x['big']['growth_mb']:.0f} MB"
    resume = lambda x: f"{x['start']['seconds']:.2f} / {x['deep']['seconds']:.2f} s"
    rows = [
        ("pre-tokenised (arrayrecord / arrow)", rate(r["tokens"]), rate(r["tokens_hf"])),
        ("text, encoded on the fly", rate(r["text"]), rate(r["text_hf"])),
        ("the tokenizer alone", rate(r["tokenizer"]), ""),
        ("text over tokenizer alone", f"{r['text']['per_core'] / r['tokenizer']['per_core']:.2f}", ""),
        ("quickstart's step", f"{step / 1e6:.4f} Mtok/s", ""),
        ("pre-tokenised over the step", f"{r['tokens']['tokens_per_s'] / step:.0f}", ""),
        ("text over the step", f"{r['text']['tokens_per_s'] / step:.0f}", ""),
        (f"peak memory, {r['gb'] / 50:g} / {r['gb']:g} GB file", memory(r["memory"]), memory(r["memory_hf"])),
        ("growth over the big file", growth(r["memory"]), growth(r["memory_hf"])),
        (f"resume to first batch, at 0 / {0.8 * r['gb']:g} GB", resume(r["resume"]), resume(r["resume_hf"])),
    ]
    lines = ["| | lowrank_jax | datasets |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {ours} | {theirs} |" for what, ours, theirs in rows])


# ------------------------------------------------------------------------------------------ what each process measures


def write(folder: str, gb: str) -> dict:
    """Plays in documents of about 2,000 characters, in an order of their own each time around, up to `gb`."""
    from lowrank_jax.data import builtin, tokenizer

    texts = [document["text"] for document in builtin.load("plays")]
    text = "\n\n".join(texts)
    tokenizer.train(texts, VOCAB).save(f"{folder}/tokenizer")
    parts = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    draw = random.Random(0)
    for name, size in (("big", float(gb)), ("small", float(gb) / 50), ("shards", min(0.2, float(gb)))):
        written, number = 0, 0
        with open(f"{folder}/{name}.jsonl", "w") as f:
            while written < size * 1e9:
                draw.shuffle(parts)
                for part in parts:
                    written += f.write(json.dumps({"id": number, "text": part}) + "\n")
                    number += 1
                    if written >= size * 1e9:
                        break
    script = str(pathlib.Path(__file__).with_name("tokenize.py"))
    command = [sys.executable, script, f"--tokenizer={folder}/tokenizer", f"--sources=json:{folder}/shards.jsonl"]
    subprocess.run([*command, f"--out={folder}/tokens"], check=True, stdout=sys.stderr)
    return {}


def step(folder: str) -> dict:
    """Tokens a second that the quickstart's step takes in, at its first length."""
    import jax

    from lowrank_jax import cli, stages
    from lowrank_jax import step as step_module
    from lowrank_jax.data import stream, tokenizer

    config = cli.read_config(["--config=configs/quickstart.py"])
    tok = tokenizer.train(stream.texts([config.pretrain], 500_000), config.tokenizer.vocab_size)
    config = config.with_vocab(tok.vocab_size)
    stage = stages.plan(config)[0]
    documents = stream.open_phase(config.pretrain, tok, 0, chats=False)
    state = step_module.init_state(config)
    run, _ = step_module.compile_step(config, stage, state)
    batches = [step_module.to_device(documents.next(stage.batch, stage.seq_len), stage) for _ in range(13)]
    for i, batch in enumerate(batches):
        if i == 3:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state, _ = run(state, batch)
    jax.block_until_ready(state)
    return {"tokens_per_s": 10 * stage.tokens_per_step / (time.perf_counter() - started)}


def _ours(folder: str, spec: str, cursor=None):
    from configs import default
    from lowrank_jax import config
    from lowrank_jax.data import stream, tokenizer

    values = default.phase(sources=spec, block=LENGTH, tokens_per_step=ROWS * LENGTH)
    phase = config.RunConfig.from_dict(default.get_config().to_dict() | {"pretrain": values}).pretrain
    return stream.open_phase(phase, tokenizer.load(f"{folder}/tokenizer"), 0, chats=False, cursor=cursor)


def _rate(batches, seconds: float) -> dict:
    """Tokens a second that an iterator of batches gives, after the first ten."""
    for _ in range(10):
        next(batches)
    tokens, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        tokens += next(batches)["tokens"].size
    return {
        "tokens_per_s": tokens / (time.perf_counter() - started),
        "per_core": tokens / (time.process_time() - cpu),
    }


def _batches(documents):
    while True:
        yield documents.next(ROWS, LENGTH)


def text(folder: str, seconds: str) -> dict:
    return _rate(_batches(_ours(folder, f"json:{folder}/big.jsonl")), float(seconds))


def tokens(folder: str, seconds: str) -> dict:
    return _rate(_batches(_ours(folder, f"arrayrecord:{folder}/tokens")), float(seconds))


def tokenizer(folder: str, seconds: str) -> dict:
    """The tokenizer on the same documents, already in memory, and nothing else."""
    from lowrank_jax.data import tokenizer as tokenizer_module

    tok = tokenizer_module.load(f"{folder}/tokenizer")
    with open(f"{folder}/shards.jsonl") as f:
        texts = [json.loads(line)["text"] for line, _ in zip(f, range(20_000))]
    import numpy as np

    def encode():
        while True:
            for t in texts:
                yield {"tokens": np.empty(len(tok.encode(t)) + 2)}

    return _rate(encode(), float(seconds))


def _hf_rows(examples):
    """The usual recipe: concatenate what is encoded, cut it into rows, stack them."""
    import numpy as np

    buffer = []
    need = ROWS * LENGTH
    for example in examples:
        buffer += example["ids"]
        while len(buffer) > need:
            row = np.asarray(buffer[: need + 1], np.int32)
            yield {"tokens": row[:-1].reshape(ROWS, LENGTH), "targets": row[1:].reshape(ROWS, LENGTH)}
            buffer = buffer[need:]


def _hf_stream(path: str):
    import datasets

    return datasets.load_dataset("json", data_files=path, split="train", streaming=True)


def text_hf(folder: str, seconds: str) -> dict:
    from lowrank_jax.data import tokenizer as tokenizer_module

    tok = tokenizer_module.load(f"{folder}/tokenizer")
    encode = lambda rows: {"ids": [[tok.bos, *tok.encode(t), tok.eos] for t in rows["text"]]}
    encoded = _hf_stream(f"{folder}/big.jsonl").map(encode, batched=True, remove_columns=["id", "text"])
    return _rate(_hf_rows(encoded.shuffle(seed=0, buffer_size=1000)), float(seconds))


def tokens_hf(folder: str, seconds: str) -> dict:
    """An Arrow dataset of ids on disk, shuffled, as `datasets` stores what `map` has encoded."""
    import datasets

    from lowrank_jax.data import tokenizer as tokenizer_module

    tok = tokenizer_module.load(f"{folder}/tokenizer")
    if not os.path.isdir(f"{folder}/arrow"):
        rows = _hf_stream(f"{folder}/shards.jsonl").take(20_000)
        made = [{"ids": [tok.bos, *tok.encode(row["text"]), tok.eos]} for row in rows]
        datasets.Dataset.from_list(made).save_to_disk(f"{folder}/arrow")

    def epochs():
        for epoch in range(1_000_000):
            yield from datasets.load_from_disk(f"{folder}/arrow").shuffle(seed=epoch)

    return _rate(_hf_rows(epochs()), float(seconds))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _read_through(documents, total: float) -> dict:
    """Memory over a whole pass: its peak, and how far it rose after the first tenth."""
    done, after_start = 0, None
    for size in documents:
        done += size
        if after_start is None and done > total / 10:
            after_start = _peak_mb()
    return {"peak_mb": _peak_mb(), "growth_mb": _peak_mb() - (after_start or _peak_mb())}


def memory(folder: str, path: str) -> dict:
    """Every document once, in the shuffled order of training, through every reader, packed in rows."""
    from lowrank_jax import stages
    from lowrank_jax.config import read_sources
    from lowrank_jax.data import sources
    from lowrank_jax.data.reader import Limit, Part, Reader

    source = sources.open_source(read_sources(f"json:{path}", "sources")[0])
    part, readers = Part(0, held_out=False, shuffled=True, endless=False), stages.MOST_READERS
    many = [Reader(source, part, Limit(path, 0, None), False, 0, (i, readers), None) for i in range(readers)]

    def documents():
        while many:
            for reader in list(many):
                document = reader.next()
                if document is None:
                    many.remove(reader)
                else:
                    yield len(document["text"])

    return _read_through(documents(), os.path.getsize(path))


def memory_hf(folder: str, path: str) -> dict:
    stream = _hf_stream(path).shuffle(seed=0, buffer_size=1000)
    return _read_through((len(row["text"]) for row in stream), os.path.getsize(path))


def resume(folder: str, share: str) -> dict:
    """Seconds from a cursor that is `share` of the way through the big file to the next batch, opening included."""
    spec = f"json:{folder}/big.jsonl"
    documents = _ours(folder, spec)
    documents.next(ROWS, LENGTH)
    cursor = json.loads(json.dumps(documents.cursor()))
    blocks = os.path.getsize(f"{folder}/big.jsonl") // (128 << 10)
    for lane in cursor["lanes"].values():
        lane["readers"][0]["block"] += int(float(share) * blocks) // cursor["readers"] * cursor["readers"]
    started = time.perf_counter()
    _ours(folder, spec, cursor).next(ROWS, LENGTH)
    return {"seconds": time.perf_counter() - started}


def resume_hf(folder: str, share: str) -> dict:
    """The same with the state that `datasets` itself would have stored, unshuffled: its shuffle does not resume."""
    from lowrank_jax.data import tokenizer as tokenizer_module

    tok = tokenizer_module.load(f"{folder}/tokenizer")
    path = f"{folder}/big.jsonl"
    stream = _hf_stream(path)
    row = next(iter(stream))
    rows = int(float(share) * os.path.getsize(path) / (len(row["text"]) * 1.08))
    started = time.perf_counter()
    stream = _hf_stream(path)
    state = stream.state_dict()
    inner = state["examples_iterable"]
    while "shard_example_idx" not in inner:
        inner = inner["examples_iterable"]
    inner["shard_example_idx"] = rows
    stream.load_state_dict(state)
    next(_hf_rows({"ids": [tok.bos, *tok.encode(row["text"]), tok.eos]} for row in stream))
    return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in globals() and not sys.argv[1].startswith("-"):
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
