"""Encodes sources once, in parallel, into shards that `arrayrecord:DIR` reads several times faster than text.

    python scripts/tokenize.py --tokenizer=runs/mine/tokenizer --sources="json:my/*.jsonl" --out=my_tokens

A run that uses them names the same tokenizer: --config.tokenizer.path=runs/mine/tokenizer.
"""

import os
import sys

# Python put this folder in front of its own modules, one of which is called tokenize too.
sys.path[0] = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")

import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, wait

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from lowrank_jax import cli
from lowrank_jax.config import SourceConfig, UsageError, read_sources
from lowrank_jax.data import packing, sources, tables, tokenizer
from lowrank_jax.data.reader import Limit, Reader
from lowrank_jax.data.stream import ONCE

OPTIONS = f"group_size:{tables.RUN},uncompressed"  # a run of records, as they are read; ids hardly compress
TOLD = 5

_progress = None  # documents done by each shard, shared with the process that shows them


def _start(progress) -> None:
    global _progress
    _progress = progress


def write_shard(
    tokenizer_path: str,
    configs: tuple[SourceConfig, ...],
    chats: bool,
    max_skipped: int,
    share: tuple[int, int],
    path: str,
) -> dict:
    """Writes one share of all documents; returns what it counted. The share's documents do not depend on the others."""
    tok = tokenizer.load(tokenizer_path)
    dtype = tables.token_dtype(tok.vocab_size)
    counts, told = {"documents": 0, "tokens": 0, "skipped": 0}, []
    note = lambda event, **facts: told.append(f"{event}: {facts.get('where', facts['source'])}: {facts['reason']}")
    writer = ArrayRecordWriter(path, OPTIONS)
    for config in configs:
        limit = Limit(config.spec, max_skipped, note)
        reader = Reader(sources.open_source(config, chats), ONCE, limit, chats, 0, share, None)
        while (document := reader.next()) is not None:
            ids, said = packing.encode_document(tok, document, chats)
            writer.write(tables.encode(ids, said, dtype))
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            _progress[share[0]] = counts["documents"]
        counts["skipped"] += limit.skipped
    writer.close()
    return counts | {"told": told}


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--tokenizer", required=True, help="a run's tokenizer folder, a SentencePiece model, a tokenizer.json"
    )
    parser.add_argument("--sources", required=True, help="what to encode, such as text:my/*.txt,json:more.jsonl")
    parser.add_argument("--out", required=True, help="a folder to make")
    parser.add_argument("--chats", action="store_true", help="for SFT: only what the assistant says carries weight")
    parser.add_argument("--shards", type=int, default=16, help="files to write")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes; what is written does not depend on it"
    )
    parser.add_argument("--max_skipped", type=int, default=100, help="records of a source that may be unusable")
    args = parser.parse_args(argv)
    if args.shards < 1 or args.workers < 1 or args.max_skipped < 0:
        raise UsageError("--shards and --workers must be at least 1, --max_skipped at least 0")
    if os.path.exists(args.out):
        raise UsageError(f"--out={args.out} exists already; name a folder that does not")
    tok, configs = tokenizer.load(args.tokenizer), read_sources(args.sources, "--sources")
    for config in configs:
        sources.open_source(config, args.chats)
    started, partial = time.monotonic(), f"{args.out.rstrip('/')}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        done = _in_parallel(args, configs, partial)
        totals = {key: sum(counts[key] for counts in done) for key in ("documents", "tokens", "skipped")}
        told = [line for counts in done for line in counts["told"]]
        if totals["skipped"] > args.max_skipped * len(configs):
            raise UsageError(
                f"{totals['skipped']} records cannot be used, and --max_skipped={args.max_skipped}; {told[0]}"
            )
        if not totals["documents"]:
            raise UsageError(f"there is no text in {args.sources}" + (f"; {told[0]}" if told else ""))
        facts = {
            "format": tables.FORMAT,
            "tokenizer_sha256": tok.sha256,
            "vocab_size": tok.vocab_size,
            "chats": args.chats,
        }
        facts |= totals | {"shards": args.shards, "dtype": tables.token_dtype(tok.vocab_size).str}
        with open(os.path.join(partial, tables.META), "w", encoding="utf-8") as f:
            f.write(json.dumps(facts, indent=2) + "\n")
        os.rename(partial, args.out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.monotonic() - started
    for line in told[:TOLD]:
        print(line, file=sys.stderr)
    print(
        f"{args.out}: {totals['documents']:,} documents, {totals['tokens']:,} tokens, {totals['skipped']} records "
        f"skipped, {totals['tokens'] / seconds / 1e6:.2f} million tokens/s",
        flush=True,
    )
    return facts | {"out": args.out, "seconds": seconds}


def _in_parallel(args, configs: tuple[SourceConfig, ...], folder: str) -> list[dict]:
    spawn = multiprocessing.get_context("spawn")  # JAX and the readers have threads, which a fork would not survive
    progress = spawn.Array("q", args.shards)
    paths = [os.path.join(folder, f"part-{i:05d}-of-{args.shards:05d}.array_record") for i in range(args.shards)]
    with ProcessPoolExecutor(min(args.workers, args.shards), spawn, _start, (progress,)) as pool:
        facts = (args.tokenizer, configs, args.chats, args.max_skipped)
        running = [pool.submit(write_shard, *facts, (i, args.shards), path) for i, path in enumerate(paths)]
        with tqdm(total=args.shards, unit="shard", disable=not sys.stderr.isatty()) as bar:
            while True:
                done, waiting = wait(running, timeout=0.5)
                bar.n = len(done)
                bar.set_postfix_str(f"{np.sum(progress[:]):,} documents")
                failed = next((f for f in done if f.exception()), None)
                if failed:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise failed.exception()
                if not waiting:
                    return [f.result() for f in running]


if __name__ == "__main__":
    cli.main(command)
