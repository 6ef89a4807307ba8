"""Tokenises sources once, in parallel, into shards that `arrayrecord:DIR` reads many times faster than text."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from tqdm import tqdm

from lowrank_jax.config import RunFailure, SourceConfig, UsageError
from lowrank_jax.data import chat, packing, shards, sources, tokenizer
from lowrank_jax.data.blocks import Source
from lowrank_jax.data.reader import ONCE, Limit, Reader
from lowrank_jax.machine.console import say

BLOCKS, FEWEST, MOST = 4, 8, 64  # by default there is one shard for 4 blocks, within these limits


class Job(NamedTuple):
    """Sources to write as shards; 0 shards stand for a number that fits the sources."""

    tokenizer_path: str
    configs: Sequence[SourceConfig]
    chats: bool
    max_skipped: int
    shards: int


def write(job: Job, out: str, workers: int = 0) -> tuple[dict, str]:
    """Write a new folder of shards; return its facts and the last unusable record.

    The files do not depend on the number of workers (0: one per core). The folder appears complete or not at all.
    """
    out, tok = os.path.abspath(out), tokenizer.load(job.tokenizer_path)
    if job.chats:
        chat.check(tok)
    blocks = sum(source.blocks for source in _open(job))
    count = job.shards or min(max(blocks // BLOCKS, FEWEST), MOST)
    workers = min(workers or len(os.sched_getaffinity(0)), count)
    folder = f"{out}.partial-{time.time_ns()}"
    os.makedirs(folder)
    try:
        parts = _run(job._replace(shards=count), folder, workers)
        totals = {key: sum(part[key] for part in parts) for key in ("documents", "tokens", "skipped")}
        last = next((part["last"] for part in parts if part["last"]), "")
        if totals["skipped"] > job.max_skipped * len(job.configs):
            raise UsageError(f"{last}; {totals['skipped']} such records, and max_skipped={job.max_skipped}")
        if not totals["documents"]:
            names = ",".join(config.spec for config in job.configs)
            raise UsageError(f"there is no text in {names}" + (f"; for example, {last}" if last else ""))
        for name in dict.fromkeys(name for part in parts for name in part["unused"]):
            keys = sorted(set().union(*(part["unused"].get(name, ()) for part in parts)))
            say(f"unused: {name}, {', '.join(keys)}")
        facts = {"format": shards.FORMAT, "tokenizer_sha256": tok.sha256, "vocab_size": tok.vocab_size}
        facts |= {"chats": job.chats, **totals, "shards": count}
        meta = facts | {"records": {_file(i, count): part["documents"] for i, part in enumerate(parts)}}
        pathlib.Path(folder, shards.META).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return facts, last


def _run(job: Job, folder: str, workers: int) -> list[dict]:
    """Return the counts of each shard, after `workers` processes have written them all."""
    spawn = multiprocessing.get_context("spawn")  # a fork would not survive the readers' threads
    pool = ProcessPoolExecutor(workers, spawn, _start, (job, folder))
    try:
        return list(tqdm(pool.map(_write_shard, range(job.shards)), total=job.shards, unit="shard", disable=None))
    except BrokenProcessPool:
        raise RunFailure("a worker process died, perhaps for lack of memory; try fewer --workers") from None
    finally:
        children = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in children:
            process.terminate()
            process.join()


def _start(job: Job, folder: str) -> None:
    global _job, _folder, _tokenizer, _sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers,
    parent = multiprocessing.parent_process()  # and if that is killed they end themselves
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _job, _folder, _tokenizer, _sources = job, folder, tokenizer.load(job.tokenizer_path), _open(job)


def _write_shard(shard: int) -> dict:
    """Write one shard, which holds an equal part of every source in turn, and return its counts."""
    counts = {"documents": 0, "tokens": 0, "skipped": 0, "last": "", "unused": {}}
    with contextlib.closing(shards.open_writer(os.path.join(_folder, _file(shard, _job.shards)))) as writer:
        for config, source in zip(_job.configs, _sources):
            limit = Limit(config.spec, _job.max_skipped)
            reader = Reader(source, ONCE, limit, _job.chats, share=(shard, _job.shards))
            for document in iter(reader.next, None):
                try:
                    ids, said = packing.encode_document(_tokenizer, document, _job.chats)
                except UsageError as e:  # the chat template does not take it
                    reader.refuse(str(e))
                    continue
                if "messages" in document:
                    limit.report_unused(chat.unused(_tokenizer, document))
                writer.write(shards.encode_record(ids, said))
                counts["documents"] += 1
                counts["tokens"] += len(ids)
            counts["skipped"] += limit.skipped
            counts["unused"] |= {config.spec: limit.unused} if limit.unused else {}
            counts["last"] = counts["last"] or str(limit.last or "")
    return counts


def _open(job: Job) -> list[Source]:
    for config in job.configs:
        if config.spec.startswith("arrayrecord:"):
            raise UsageError(f"source {config.spec} is tokenised already")
    return [sources.open_source(config, job.chats) for config in job.configs]


def _file(shard: int, count: int) -> str:
    return f"part-{shard:05d}-of-{count:05d}{shards.SUFFIX}"
