"""Tokenises sources once, in parallel, into shards that `arrayrecord:DIR` reads many times faster than text."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from tqdm import tqdm

from lowrank_jax.config import RunFailure, SourceConfig, UsageError
from lowrank_jax.data import packing, shards, sources, tokenizer
from lowrank_jax.data.blocks import Source
from lowrank_jax.data.reader import ONCE, Limit, Reader, describe
from lowrank_jax.data.records import BadRecord

BLOCKS, FEWEST, MOST = 4, 8, 64  # by default there is one shard for 4 blocks, within these limits


class Job(NamedTuple):
    """A worker process's part of the arguments of `write`."""

    tokenizer_path: str
    configs: Sequence[SourceConfig]
    chats: bool
    max_skipped: int
    shards: int
    folder: str


def write(
    tokenizer_path: str,
    configs: Sequence[SourceConfig],
    out: str,
    chats: bool = False,
    count: int = 0,
    workers: int = 0,
    max_skipped: int = 100,
) -> tuple[dict, str]:
    """Write the tokenised sources as `count` shards in a new folder; 0 stands for a default.

    Returns the facts of the folder, and the last record that could not be used. The files do not depend on the number
    of worker processes. The folder appears complete or not at all.
    """
    out, tok = os.path.abspath(out), tokenizer.load(tokenizer_path)
    blocks = sum(source.blocks for source in _open(configs, chats))
    count = count or min(max(blocks // BLOCKS, FEWEST), MOST)
    workers = min(workers or len(os.sched_getaffinity(0)), count)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    folder = tempfile.mkdtemp(prefix=os.path.basename(out) + ".partial-", dir=os.path.dirname(out))
    try:
        parts = _run(Job(tokenizer_path, configs, chats, max_skipped, count, folder), workers, blocks)
        totals = {key: sum(part[key] for part in parts) for key in ("documents", "tokens", "skipped")}
        last = next((part["last"] for part in parts if part["last"]), "")
        if totals["skipped"] > max_skipped * len(configs):
            raise UsageError(f"{last}; {totals['skipped']} such records, and max_skipped={max_skipped}")
        if not totals["documents"]:
            names = ",".join(config.spec for config in configs)
            raise UsageError(f"there is no text in {names}" + (f"; for example, {last}" if last else ""))
        facts = {"format": shards.FORMAT, "tokenizer_sha256": tok.sha256, "vocab_size": tok.vocab_size}
        facts |= {"chats": chats, **totals, "shards": count}
        records = {os.path.basename(_path("", i, count)): part["documents"] for i, part in enumerate(parts)}
        with open(os.path.join(folder, shards.META), "w", encoding="utf-8") as f:
            f.write(json.dumps(facts | {"records": records}, indent=1) + "\n")
        os.umask(mask := os.umask(0))
        os.chmod(folder, 0o777 & ~mask)  # mkdtemp's folder is for its owner only
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return facts, last


def _run(job: Job, workers: int, blocks: int) -> list[dict]:
    """Return the counts of each shard, after `workers` processes have written them all."""
    spawn = multiprocessing.get_context("spawn")  # a fork would not survive the readers' threads
    done = spawn.Array("d", job.shards, lock=False)  # the part of each shard that is written, from 0 to 1
    pool = ProcessPoolExecutor(workers, spawn, _start, (job, done))
    try:
        running = [pool.submit(_write_shard, shard) for shard in range(job.shards)]
        with tqdm(total=blocks, unit="block", disable=None) as bar:
            waiting = set(running)
            while waiting:
                ended, waiting = wait(waiting, 0.2, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                bar.update(round(sum(done) / job.shards * blocks) - bar.n)
        return [future.result() for future in running]
    except BrokenProcessPool:
        raise RunFailure("a worker process died, perhaps for lack of memory; try fewer --workers") from None
    finally:
        children = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in children:
            process.terminate()
        for process in children:
            process.join()


def _start(job: Job, done) -> None:
    """Prepare a worker process: open what all of its shards need."""
    global _job, _done, _tokenizer, _sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers,
    parent = multiprocessing.parent_process()  # and if that is killed they end themselves
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _job, _done, _tokenizer, _sources = job, done, tokenizer.load(job.tokenizer_path), _open(job.configs, job.chats)


def _write_shard(shard: int) -> dict:
    """Write one shard, which holds an equal part of every source in turn, and return its counts."""
    counts, last = {"documents": 0, "tokens": 0, "skipped": 0}, ""
    with contextlib.closing(shards.open_writer(_path(_job.folder, shard, _job.shards))) as writer:
        for i, (config, source) in enumerate(zip(_job.configs, _sources)):
            limit = Limit(config.spec, _job.max_skipped)
            reader = Reader(source, ONCE, limit, _job.chats, share=(shard, _job.shards))
            while (document := reader.next()) is not None:
                try:
                    ids, said = packing.encode_document(_tokenizer, document, _job.chats)
                except UsageError as e:  # the chat template does not take it
                    limit.skip(BadRecord(f"source {config.spec}", str(e)))
                    continue
                writer.write(shards.encode_record(ids, said))
                counts["documents"] += 1
                counts["tokens"] += len(ids)
                _done[shard] = (i + reader.cursor()["block"] / source.blocks) / len(_sources)
            counts["skipped"] += limit.skipped
            last = last or (describe(limit.last) if limit.last else "")
    _done[shard] = 1.0
    return counts | {"last": last}


def _open(configs: Sequence[SourceConfig], chats: bool) -> list[Source]:
    all_sources = [sources.open_source(config, chats) for config in configs]
    for config, source in zip(configs, all_sources):
        if hasattr(source, "tokenizer_sha256"):
            raise UsageError(f"source {config.spec} is tokenised already")
    return all_sources


def _path(folder: str, shard: int, count: int) -> str:
    return os.path.join(folder, f"part-{shard:05d}-of-{count:05d}{shards.SUFFIX}")
