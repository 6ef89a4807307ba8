"""Compare reading data with Hugging Face `datasets`: tokens per second, memory, and the time to resume.

Compared: our stream of batches, and `datasets` with the usual recipe of map, shuffle and cut. Fair: both read the same
file, encode with the same tokenizer, put BOS and EOS around each document, and cut rows of 1,024 tokens, one after the
other on the same machine. Ours also makes segments and weights, hashes every batch, and can stop anywhere.

    python scripts/bench/data.py                      # writes 5 GB, and deletes them; about 20 minutes on 2 cores
    python scripts/bench/data.py --gb=0.1 --kills=3   # the same at small size

Each measurement has a process of its own; "a core" is a process that is pinned to one. Last, scripts/bench/kills.py
kills a training that reads every kind of source, and compares it with an uninterrupted one.
"""

import functools
import json
import os
import random
import resource
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.machine.console import say
from scripts.bench import harness, kills

ROWS, LENGTH = 16, 1024
DOCUMENT = 2000  # characters, about
VOCAB = 8192
RESUME_SHARE = 0.8  # of the big file, before the deep resume
TEXT, TOKENS = "json:{}/big.jsonl", "arrayrecord:{}/tokens"


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--gb", type=float, default=5.0, help="size of the generated file")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each rate's measurement")
    parser.add_argument("--kills", type=int, default=30, help="number of kills of the training")
    parser.add_argument("--folder", default=None, help="where to put the file (default: a temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure_all(folder, args.gb, args.seconds)
        results["kills"] = kills.verify(folder, args.kills)
    print(table(results), flush=True)
    return results


def measure_all(folder: str, gb: float, seconds: float) -> dict:
    say(f"writing {gb} GB of JSON lines, {gb / 50} GB more, and up to 0.2 GB of shards with `lowrank_jax tokenize`")
    measure("write", folder, gb)
    small, big = f"{folder}/small.jsonl", f"{folder}/big.jsonl"
    results = {"gb": gb, "quickstart_step": measure("step", folder)}
    for name in ("tokenizer", "text", "text_hf", "tokens", "tokens_hf"):
        results[name] = measure(name, folder, seconds, 1)
        if name in ("text", "tokens"):
            results[name]["all_cores"] = measure(name, folder, seconds, 0)["tokens_per_s"]
        say(f"{name}: {results[name]}")
    for name in ("memory", "memory_hf"):
        results[name] = {"small": measure(name, folder, small), "big": measure(name, folder, big)}
        say(f"{name}: {results[name]}")
    for name in ("resume", "resume_hf"):
        results[name] = {"start": measure(name, folder, 0.0), "deep": measure(name, folder, RESUME_SHARE)}
        say(f"{name}: {results[name]}")
    return results


def table(r: dict) -> str:
    """Return the results as Markdown."""
    rate = lambda x: f"{x['tokens_per_s'] / 1e6:.2f} Mtok/s a core"
    step, alone = r["quickstart_step"]["tokens_per_s"], r["tokenizer"]["tokens_per_s"]
    memory = lambda x: f"{x['small']['peak_mb']:.0f} / {x['big']['peak_mb']:.0f} MB"
    growth = lambda x: f"{x['big']['growth_mb']:.0f} MB"
    resume = lambda x: f"{x['start']['seconds']:.2f} / {x['deep']['seconds']:.2f} s"
    k, deep = r["kills"], RESUME_SHARE * r["gb"]
    rows = [
        ("pre-tokenised (arrayrecord / arrow)", rate(r["tokens"]), rate(r["tokens_hf"])),
        ("text, encoded while reading", rate(r["text"]), rate(r["text_hf"])),
        ("the tokenizer alone", rate(r["tokenizer"]), ""),
        ("text on all cores / tokenizer on one", f"{r['text']['all_cores'] / alone:.2f}", ""),
        ("text on one core / tokenizer on one", f"{r['text']['tokens_per_s'] / alone:.2f}", ""),
        ("quickstart's step", f"{step / 1e6:.4f} Mtok/s", ""),
        ("pre-tokenised / the step", f"{r['tokens']['tokens_per_s'] / step:.0f}", ""),
        ("text / the step", f"{r['text']['tokens_per_s'] / step:.0f}", ""),
        (f"peak memory, {r['gb'] / 50:g} / {r['gb']:g} GB file", memory(r["memory"]), memory(r["memory_hf"])),
        ("growth over the big file", growth(r["memory"]), growth(r["memory_hf"])),
        (f"resume to first batch, at 0 / {deep:g} GB", resume(r["resume"]), resume(r["resume_hf"])),
        (f"runs equal after {k['kills']} kills, {k['steps']} steps", str(k["equal"]), ""),
    ]
    lines = ["| | lowrank_jax | datasets |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


# ---------------------------------------------------------------------------------------- the files, and our own rates


def write(folder: str, gb: str) -> dict:
    """Write documents of about 2,000 characters from plays, shuffled anew in each repetition, up to `gb`."""
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
    kills.tokenize(folder, f"json:{folder}/shards.jsonl", f"{folder}/tokens")
    return {}


def step(folder: str) -> dict:
    """Return the tokens per second of the quickstart's step at its first length."""
    from lowrank_jax.data import stream, tokenizer
    from lowrank_jax.training.plan import stages_of

    config = cli.read_config([f"--config={harness.ROOT}/configs/quickstart.py"])
    tok = tokenizer.train(stream.texts([config.pretrain], 500_000), config.tokenizer.vocab_size)
    config = config.with_vocab(tok.vocab_size)
    stage = stages_of(config)[0]
    run, _ = harness.compiled_step(config, stage)
    batch = harness.random_batch(config, stage)
    seconds = harness.median_seconds(lambda: run(batch), 10)
    return {"tokens_per_s": stage.tokens_per_step / seconds}


def open_stream(folder: str, spec: str, cursor=None):
    from configs import default
    from lowrank_jax import config
    from lowrank_jax.data import stream, tokenizer

    values = default.phase(sources=spec.format(folder), block=LENGTH, tokens_per_step=ROWS * LENGTH)
    phase = config.RunConfig.from_dict(default.get_config().to_dict() | {"pretrain": values}).pretrain
    return stream.open_phase(phase, tokenizer.load(f"{folder}/tokenizer"), 0, False, (cursor, ""))


def rate(batches, seconds: str) -> dict:
    """Return the tokens per second of an iterator of batches, after the first ten."""
    for _ in range(10):
        next(batches)
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < float(seconds):
        tokens += next(batches)["tokens"].size
    return {"tokens_per_s": tokens / (time.perf_counter() - started)}


def pin(cores: str) -> None:
    """Let this process run on so many cores; 0: on all."""
    if int(cores):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])


def our_rate(folder: str, seconds: str, cores: str, spec: str) -> dict:
    pin(cores)
    documents = open_stream(folder, spec)
    return rate(iter(lambda: documents.next(ROWS, LENGTH), None), seconds)


def tokenizer_rate(folder: str, seconds: str, cores: str) -> dict:
    """Return the rate of the tokenizer alone, on the same documents in memory."""
    import numpy as np

    from lowrank_jax.data import tokenizer

    pin(cores)
    tok = tokenizer.load(f"{folder}/tokenizer")
    with open(f"{folder}/shards.jsonl") as f:
        texts = [json.loads(line)["text"] for line, _ in zip(f, range(20_000))]

    def encoded():
        while True:
            for text in texts:
                yield {"tokens": np.empty(len(tok.encode(text)) + 2)}

    return rate(encoded(), seconds)


# ----------------------------------------------------------------------------------------------- datasets, and memory


def _hf_rows(examples):
    """Yield batches by the usual recipe: concatenate the encoded documents, cut rows, stack them."""
    import numpy as np

    buffer, need = [], ROWS * LENGTH
    for example in examples:
        buffer += example["ids"]
        while len(buffer) > need:
            row = np.asarray(buffer[: need + 1], np.int32)
            yield {"tokens": row[:-1].reshape(ROWS, LENGTH), "targets": row[1:].reshape(ROWS, LENGTH)}
            buffer = buffer[need:]


def _hf_stream(path: str):
    import datasets

    return datasets.load_dataset("json", data_files=path, split="train", streaming=True)


def text_hf(folder: str, seconds: str, cores: str) -> dict:
    from lowrank_jax.data import tokenizer

    pin(cores)
    tok = tokenizer.load(f"{folder}/tokenizer")
    encode = lambda rows: {"ids": [[tok.bos, *tok.encode(t), tok.eos] for t in rows["text"]]}
    encoded = _hf_stream(f"{folder}/big.jsonl").map(encode, batched=True, remove_columns=["id", "text"])
    return rate(_hf_rows(encoded.shuffle(seed=0, buffer_size=1000)), seconds)


def tokens_hf(folder: str, seconds: str, cores: str) -> dict:
    """Return the rate of a shuffled Arrow dataset of ids on disk, as `datasets` stores the result of `map`."""
    import datasets

    from lowrank_jax.data import tokenizer

    pin(cores)
    datasets.disable_progress_bars()
    tok = tokenizer.load(f"{folder}/tokenizer")
    if not os.path.isdir(f"{folder}/arrow"):
        rows = _hf_stream(f"{folder}/shards.jsonl").take(20_000)
        encoded = [{"ids": [tok.bos, *tok.encode(row["text"]), tok.eos]} for row in rows]
        datasets.Dataset.from_list(encoded).save_to_disk(f"{folder}/arrow")

    def epochs():
        for epoch in range(1_000_000):
            yield from datasets.load_from_disk(f"{folder}/arrow").shuffle(seed=epoch)

    return rate(_hf_rows(epochs()), seconds)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _read_through(documents, total: float) -> dict:
    """Return the memory over a whole pass: its peak, and its growth after the first tenth."""
    done, after_start = 0, None
    for size in documents:
        done += size
        if after_start is None and done > total / 10:
            after_start = _peak_mb()
    return {"peak_mb": _peak_mb(), "growth_mb": _peak_mb() - (after_start or _peak_mb())}


def memory(folder: str, path: str) -> dict:
    """Return the memory of reading every document once, in the shuffled order of training, through every reader."""
    from lowrank_jax.config import read_sources
    from lowrank_jax.data import sources
    from lowrank_jax.data.reader import Limit, Part, Reader
    from lowrank_jax.data.stream import MOST_READERS

    source = sources.open_source(read_sources(f"json:{path}", "sources")[0])
    part, readers = Part(0, held_out=False, shuffled=True, endless=False), MOST_READERS
    many = [Reader(source, part, Limit(path, 0), False, share=(i, readers)) for i in range(readers)]

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
    """Return the seconds to open the big file with a cursor at `share` of it and to read the next batch."""
    documents = open_stream(folder, TEXT)
    documents.next(ROWS, LENGTH)
    cursor = json.loads(json.dumps(documents.cursor()))
    blocks = os.path.getsize(f"{folder}/big.jsonl") // (128 << 10)
    for lane in cursor["lanes"].values():
        lane["readers"][0]["block"] += int(float(share) * blocks) // cursor["readers"] * cursor["readers"]
    started = time.perf_counter()
    open_stream(folder, TEXT, cursor).next(ROWS, LENGTH)
    return {"seconds": time.perf_counter() - started}


def resume_hf(folder: str, share: str) -> dict:
    """Return the same with the state that `datasets` would have stored, unshuffled: its shuffle does not resume."""
    from lowrank_jax.data import tokenizer

    tok = tokenizer.load(f"{folder}/tokenizer")
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


MEASUREMENTS = {
    "write": write,
    "step": step,
    "text": functools.partial(our_rate, spec=TEXT),
    "text_hf": text_hf,
    "tokens": functools.partial(our_rate, spec=TOKENS),
    "tokens_hf": tokens_hf,
    "tokenizer": tokenizer_rate,
    "memory": memory,
    "memory_hf": memory_hf,
    "resume": resume,
    "resume_hf": resume_hf,
}
measure = functools.partial(harness.in_a_process, __file__)

if __name__ == "__main__":
    harness.main(command, lambda argv: MEASUREMENTS[argv[0]](*argv[1:]))
