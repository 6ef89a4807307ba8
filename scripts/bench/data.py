"""How fast data arrives, what it holds in memory, and what a resume costs: ours beside Hugging Face `datasets`.

    python scripts/bench/data.py                      # writes 5 GB, and deletes them; about 20 minutes on 2 cores
    python scripts/bench/data.py --gb=0.1 --kills=3   # the same in little

Both sides do the same job in the same run: read the same file, encode with the same tokenizer, put BOS and EOS around
each document, cut the stream into rows of 1,024 tokens. Ours also makes segments and weights, hashes every batch, and
can stop anywhere. Every measurement has a process of its own; "a core" is a process held on one.

Last, a run of the trainer that reads every kind of source is killed again and again at random moments (SIGKILL), and
its data_sha256 compared with that of a run that nothing interrupted.
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

sys.path[0] = str(pathlib.Path(__file__).parents[2])

ROWS, LENGTH = 16, 1024
DOCUMENT = 2000  # characters, about
VOCAB = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5.0, help="size of the generated file")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each rate is measured")
    parser.add_argument("--kills", type=int, default=30, help="how often the trainer is killed")
    parser.add_argument("--folder", default=None, help="where to put the file (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = bench(folder, args.gb, args.seconds)
        results["kills"] = in_process("kills", folder, args.kills)
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
        results[name] = in_process(name, folder, seconds, 1)
        if name in ("text", "tokens"):
            results[name]["all_cores"] = in_process(name, folder, seconds, 0)["tokens_per_s"]
        tell(f"{name}: {results[name]}")
    for name in ("memory", "memory_hf"):
        results[name] = {"small": in_process(name, folder, small), "big": in_process(name, folder, big)}
        tell(f"{name}: {results[name]}")
    for name in ("resume", "resume_hf"):
        results[name] = {"start": in_process(name, folder, 0.0), "deep": in_process(name, folder, 0.8)}
        tell(f"{name}: {results[name]}")
    return results


def in_process(name: str, *args):
    """The JSON that `python scripts/bench/data.py NAME ARGS` prints last, from a fresh process."""
    command = [sys.executable, __file__, name, *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(r: dict) -> str:
    rate = lambda x: f"{x['tokens_per_s'] / 1e6:.2f} Mtok/s a core"
    step = r["quickstart_step"]["tokens_per_s"]
    memory = lambda x: f"{x['small']['peak_mb']:.0f} / {x['big']['peak_mb']:.0f} MB"
    growth = lambda x: f"{x['big']['growth_mb']:.0f} MB"
    resume = lambda x: f"{x['start']['seconds']:.2f} / {x['deep']['seconds']:.2f} s"
    rows = [
        ("pre-tokenised (arrayrecord / arrow)", rate(r["tokens"]), rate(r["tokens_hf"])),
        ("text, encoded on the fly", rate(r["text"]), rate(r["text_hf"])),
        ("the tokenizer alone", rate(r["tokenizer"]), ""),
        (
            "text with all cores, over the tokenizer on one",
            f"{r['text']['all_cores'] / r['tokenizer']['tokens_per_s']:.2f}",
            "",
        ),
        ("text on one core, over the same", f"{r['text']['tokens_per_s'] / r['tokenizer']['tokens_per_s']:.2f}", ""),
        ("quickstart's step", f"{step / 1e6:.4f} Mtok/s", ""),
        ("pre-tokenised over the step", f"{r['tokens']['tokens_per_s'] / step:.0f}", ""),
        ("text over the step", f"{r['text']['tokens_per_s'] / step:.0f}", ""),
        (f"peak memory, {r['gb'] / 50:g} / {r['gb']:g} GB file", memory(r["memory"]), memory(r["memory_hf"])),
        ("growth over the big file", growth(r["memory"]), growth(r["memory_hf"])),
        (f"resume to first batch, at 0 / {0.8 * r['gb']:g} GB", resume(r["resume"]), resume(r["resume_hf"])),
    ]
    k = r["kills"]
    rows.append((f"runs equal after {k['kills']} kills, {k['steps']} steps", str(k["equal"]), ""))
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

    from lowrank_jax import cli
    from lowrank_jax.data import stream, tokenizer
    from lowrank_jax.training import step as step_module
    from lowrank_jax.training.plan import stages_of

    config = cli.read_config(["--config=configs/quickstart.py"])
    tok = tokenizer.train(stream.texts([config.pretrain], 500_000), config.tokenizer.vocab_size)
    config = config.with_vocab(tok.vocab_size)
    stage = stages_of(config)[0]
    documents = stream.open_phase(config.pretrain, tok, 0, chats=False)
    state = step_module.first_state(config, step_module.init_params(config))
    run = step_module.lower(config, stage).compile()
    batches = [jax.device_put(documents.next(stage.batch, stage.seq_len)) for _ in range(13)]
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
    return stream.open_phase(phase, tokenizer.load(f"{folder}/tokenizer"), 0, False, (cursor, ""))


def _rate(batches, seconds: str) -> dict:
    """Tokens a second that an iterator of batches gives, after the first ten."""
    for _ in range(10):
        next(batches)
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < float(seconds):
        tokens += next(batches)["tokens"].size
    return {"tokens_per_s": tokens / (time.perf_counter() - started)}


def _batches(documents):
    while True:
        yield documents.next(ROWS, LENGTH)


def _hold(cores: str) -> None:
    if int(cores):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])


def text(folder: str, seconds: str, cores: str) -> dict:
    _hold(cores)
    return _rate(_batches(_ours(folder, f"json:{folder}/big.jsonl")), seconds)


def tokens(folder: str, seconds: str, cores: str) -> dict:
    _hold(cores)
    return _rate(_batches(_ours(folder, f"arrayrecord:{folder}/tokens")), seconds)


def tokenizer(folder: str, seconds: str, cores: str) -> dict:
    """The tokenizer on the same documents, already in memory, and nothing else."""
    from lowrank_jax.data import tokenizer as tokenizer_module

    _hold(cores)
    tok = tokenizer_module.load(f"{folder}/tokenizer")
    with open(f"{folder}/shards.jsonl") as f:
        texts = [json.loads(line)["text"] for line, _ in zip(f, range(20_000))]
    import numpy as np

    def encode():
        while True:
            for t in texts:
                yield {"tokens": np.empty(len(tok.encode(t)) + 2)}

    return _rate(encode(), seconds)


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


def text_hf(folder: str, seconds: str, cores: str) -> dict:
    from lowrank_jax.data import tokenizer as tokenizer_module

    _hold(cores)
    tok = tokenizer_module.load(f"{folder}/tokenizer")
    encode = lambda rows: {"ids": [[tok.bos, *tok.encode(t), tok.eos] for t in rows["text"]]}
    encoded = _hf_stream(f"{folder}/big.jsonl").map(encode, batched=True, remove_columns=["id", "text"])
    return _rate(_hf_rows(encoded.shuffle(seed=0, buffer_size=1000)), seconds)


def tokens_hf(folder: str, seconds: str, cores: str) -> dict:
    """An Arrow dataset of ids on disk, shuffled, as `datasets` stores what `map` has encoded."""
    import datasets

    from lowrank_jax.data import tokenizer as tokenizer_module

    _hold(cores)
    datasets.disable_progress_bars()
    tok = tokenizer_module.load(f"{folder}/tokenizer")
    if not os.path.isdir(f"{folder}/arrow"):
        rows = _hf_stream(f"{folder}/shards.jsonl").take(20_000)
        made = [{"ids": [tok.bos, *tok.encode(row["text"]), tok.eos]} for row in rows]
        datasets.Dataset.from_list(made).save_to_disk(f"{folder}/arrow")

    def epochs():
        for epoch in range(1_000_000):
            yield from datasets.load_from_disk(f"{folder}/arrow").shuffle(seed=epoch)

    return _rate(_hf_rows(epochs()), seconds)


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
    from lowrank_jax.config import read_sources
    from lowrank_jax.data import sources
    from lowrank_jax.data.reader import Limit, Part, Reader
    from lowrank_jax.training.plan import MOST_READERS

    source = sources.open_source(read_sources(f"json:{path}", "sources")[0])
    part, readers = Part(0, held_out=False, shuffled=True, endless=False), MOST_READERS
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


TINY = """model.d=16 model.layers=1 model.heads=2 model.rank=2 pretrain.steps=300 pretrain.tokens_per_step=1024
pretrain.microbatch_tokens=0 pretrain.block=32 pretrain.grow_plan=32,64,128 pretrain.grow_every_steps=90
pretrain.eval_tokens=1024 pretrain.sample= sft.steps=150 sft.tokens_per_step=1024 sft.microbatch_tokens=0 sft.block=64
sft.auto_grow=True sft.grow_plan=64,128 sft.grow_every_steps=60 sft.eval_tokens=1024 sft.sample= every.log=1
every.eval=100000 every.save=7"""
TFDS = """import pathlib, sys
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(sys.argv[1])
    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))
    def _split_generators(self, manager):
        return {"train": ((i, {"text": text}) for i, text in enumerate(open(sys.argv[2]).read().split("\\n\\n")))}
    def _generate_examples(self):
        pass
Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def kills(folder: str, count: str) -> dict:
    """Kills a run of the trainer at random moments until it is through, and compares it with one left alone."""
    args = ["--config=configs/quickstart.py", f"--config.tokenizer.path={folder}/tokenizer"]
    args += [f"--config.{setting}" for setting in TINY.split()]
    args += [f"--config.{phase}.sources={json.dumps(specs)}" for phase, specs in _every_kind(folder).items()]
    env = os.environ | {"TFDS_DATA_DIR": f"{folder}/kinds", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(workdir: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "lowrank_jax.main", *args, f"--workdir={workdir}"]
        return subprocess.Popen(command, env=env, cwd=sys.path[0], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def events(workdir: str) -> list[dict]:
        path = pathlib.Path(workdir, "events.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    assert start(f"{folder}/alone").wait() == 0
    draw, done, workdir, struck = random.Random(0), 0, f"{folder}/killed", []
    pace = 450 / (int(count) or 1)  # steps between two kills
    while True:
        process, before = start(workdir), len(events(workdir))
        while process.poll() is None and not any(e["event"] == "stage" for e in events(workdir)[before:]):
            time.sleep(0.05)
        target = min(max((e["step"] for e in events(workdir)), default=0) + draw.uniform(0, 2 * pace), 448)
        metrics = pathlib.Path(workdir, "metrics.jsonl")
        while done < int(count) and process.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= target:
                break
            time.sleep(0.002)
        if done < int(count) and process.poll() is None:
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
            done += 1
            struck.append(json.loads(metrics.read_text().splitlines()[-1])["step"])
        if process.wait() == 0:
            break
    one, other = events(f"{folder}/alone")[-1], events(workdir)[-1]
    keys = ("data_sha256", "params_sha256", "step")
    equal = all(one[key] == other[key] for key in keys)
    read = [source for e in events(workdir) if e["event"] == "data" for source in e["sources"]]
    return {"kills": done, "steps": one["step"], "equal": equal, "killed_at": struck, "read": read}


def _every_kind(folder: str) -> dict[str, list[dict]]:
    """Small sources of every kind, of which a run reads several epochs."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    from lowrank_jax.data import builtin

    home = pathlib.Path(folder, "kinds")
    home.mkdir()
    texts = [document["text"][:700] for document in builtin.load("plays")[:480]]
    lines = lambda some: "".join(json.dumps({"text": text}) + "\n" for text in some)
    (home / "a.txt").write_text("\n\n".join(texts))  # pieces of 2 KB, enough for every reader
    (home / "b.jsonl").write_text(lines(texts[80:160]))
    (home / "c.jsonl.gz").write_bytes(gzip.compress(lines(texts[160:240]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[240:320]}), home / "d.parquet", row_group_size=10)
    (home / "csv").mkdir()
    (home / "csv" / "train.csv").write_text(
        "text\n" + "".join(json.dumps(t.replace('"', "")) + "\n" for t in texts[320:400])
    )
    (home / "e.txt").write_text("\n\n".join(text.replace("\n\n", "\n") for text in texts[400:]))
    (home / "tiny").mkdir()
    subprocess.run([sys.executable, "-c", TFDS, str(home), str(home / "e.txt")], check=True, stdout=subprocess.DEVNULL)
    script = str(pathlib.Path(__file__).with_name("tokenize.py"))
    tokenize = [sys.executable, script, f"--tokenizer={folder}/tokenizer", f"--sources=json:{home}/b.jsonl"]
    subprocess.run([*tokenize, f"--out={home}/tokens", "--shards=3"], check=True, stdout=subprocess.DEVNULL)
    chats = [{"spec": "builtin:smalltalk"}, {"spec": f"json:{home}/chats.jsonl", "weight": "0:1/70:0.2"}]
    (home / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in builtin.load("chitchat")[:100]))
    specs = ["text:{}/a.txt", "json:{}/b.jsonl", "json:{}/c.jsonl.gz", "parquet:{}/d.parquet", "hf:{}/csv", "tfds:tiny"]
    prose = [{"spec": spec.format(home)} for spec in (*specs, "arrayrecord:{}/tokens", "builtin:bible")]
    prose[0]["weight"] = "0:1/120:0.1"
    return {"pretrain": prose, "sft": chats}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in globals() and not sys.argv[1].startswith("-"):
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
