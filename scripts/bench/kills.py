"""Kill a training that reads every kind of source, and compare it with an uninterrupted one (for data.py)."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

from lowrank_jax.data import builtin
from lowrank_jax.training import run_folder
from scripts.bench import harness

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


def verify(folder: str, count: int) -> dict:
    """Return whether a training on every kind of source ends the same with and without kills."""
    flags = [f"--config={harness.ROOT}/configs/quickstart.py", f"--config.tokenizer.path={folder}/tokenizer"]
    flags += [f"--config.{setting}" for setting in TINY.split()]
    flags += [f"--config.{phase}.sources={json.dumps(specs)}" for phase, specs in write_every_kind(folder).items()]
    study = ["--precisions=fp32", "--optimizers=muon", f"--kills={count}", f"--folder={folder}/kills", "--json"]
    line = [sys.executable, "-m", "lowrank_jax", "verify_resume", *flags, *study]
    env = os.environ | {"TFDS_DATA_DIR": f"{folder}/kinds"}
    done = subprocess.run(line, env=env, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    events = run_folder.read_rows(f"{folder}/kills/fp32-muon/alone", "events.jsonl")
    read = [source for event in events if event["event"] == "data" for source in event["sources"]]
    return {"kills": result["kills"], "equal": result["equal"], "steps": events[-1]["step"], "read": read}


def write_every_kind(folder: str) -> dict[str, list[dict]]:
    """Write small sources of every kind, and return the phases' sources; a run reads several epochs of them."""
    import pyarrow
    import pyarrow.parquet

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
    tokenize(folder, f"json:{home}/b.jsonl", f"{home}/tokens", "--shards=3")
    chats = [{"spec": "builtin:smalltalk"}, {"spec": f"json:{home}/chats.jsonl", "weight": "0:1/70:0.2"}]
    (home / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in builtin.load("chitchat")[:100]))
    specs = ["text:{}/a.txt", "json:{}/b.jsonl", "json:{}/c.jsonl.gz", "parquet:{}/d.parquet", "hf:{}/csv", "tfds:tiny"]
    prose = [{"spec": spec.format(home)} for spec in (*specs, "arrayrecord:{}/tokens", "builtin:bible")]
    prose[0]["weight"] = "0:1/120:0.1"
    return {"pretrain": prose, "sft": chats}


def tokenize(folder: str, sources: str, out: str, *flags: str) -> None:
    """Write shards of the sources with the benchmark's tokenizer."""
    line = [sys.executable, "-m", "lowrank_jax", "tokenize", f"--tokenizer={folder}/tokenizer", f"--sources={sources}"]
    subprocess.run([*line, f"--out={out}", *flags], cwd=harness.ROOT, check=True, stdout=sys.stderr)
