"""Tokenises sources once, in parallel, into shards that `arrayrecord:DIR` reads many times faster than text.

    python scripts/tokenize.py --tokenizer=runs/mine/tokenizer --sources="json:my/*.jsonl" --out=my_tokens

A run that uses them names the same tokenizer: --config.tokenizer.path=runs/mine/tokenizer.
"""

import os
import sys

# Python puts this folder first on the path, where this file would hide the standard library's `tokenize`: from itself,
# and from every other script here. The former takes its folder off the path; the latter are handed the real module.
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]
if __name__ == "tokenize":
    del sys.modules["tokenize"]
    import tokenize  # noqa: F401
else:
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    import contextlib
    import json
    import multiprocessing
    import shutil
    import signal
    import tempfile
    import threading
    import time
    from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    from lowrank_jax import cli
    from lowrank_jax.config import RunFailure, UsageError, read_sources
    from lowrank_jax.data import packing, sources, tables, tokenizer
    from lowrank_jax.data.reader import Limit, Reader, describe
    from lowrank_jax.data.records import BadRecord
    from lowrank_jax.data.stream import ONCE

BLOCKS, FEWEST, MOST = 4, 8, 64  # unless --shards says how many: a shard for 4 blocks, within these limits


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("--tokenizer", required=True, help="a run's tokenizer folder, a SentencePiece model, a tokenizer.json")
    flag("--sources", required=True, help="what to read, such as text:my/*.txt,json:more.jsonl")
    flag("--out", required=True, help="a folder to make")
    flag("--chats", action="store_true", help="for SFT: only what the assistant says carries weight")
    flag("--shards", type=int, default=0, help="files to write (default: by the size of the sources)")
    flag(
        "--workers", type=int, default=0, help="processes (default: one a core); what is written does not depend on it"
    )
    flag("--max_skipped", type=int, default=100, help="records of a source that may be unusable")
    args = parser.parse_args(argv)
    if min(args.shards, args.workers, args.max_skipped) < 0:
        raise UsageError("--shards, --workers and --max_skipped must not be negative")
    out, started = os.path.abspath(args.out), time.monotonic()
    if os.path.exists(out):
        raise UsageError(f"--out={args.out} exists already; name a folder that does not")
    learnt, configs = tokenizer.load(args.tokenizer), read_sources(args.sources, "--sources")
    blocks = sum(source.blocks for source in _open(configs, args.chats))
    shards = args.shards or min(max(blocks // BLOCKS, FEWEST), MOST)
    workers = min(args.workers or len(os.sched_getaffinity(0)), shards)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.makedirs(os.path.dirname(out), exist_ok=True)
    folder = tempfile.mkdtemp(prefix=os.path.basename(out) + ".partial-", dir=os.path.dirname(out))
    try:
        job = (args.tokenizer, configs, args.chats, args.max_skipped, shards, folder)
        parts = _run(workers, job, blocks)
        totals = {key: sum(part[key] for part in parts) for key in ("documents", "tokens", "skipped")}
        last = next((part["last"] for part in parts if part["last"]), "")
        if totals["skipped"] > args.max_skipped * len(configs):
            raise UsageError(f"{last}; {totals['skipped']} such records, and --max_skipped={args.max_skipped}")
        if not totals["documents"]:
            raise UsageError(f"there is no text in {args.sources}" + (f"; for one, {last}" if last else ""))
        facts = {"format": tables.FORMAT, "tokenizer_sha256": learnt.sha256, "vocab_size": learnt.vocab_size}
        facts |= {"chats": args.chats, **totals, "shards": shards}
        records = {os.path.basename(_path("", i, shards)): part["documents"] for i, part in enumerate(parts)}
        with open(os.path.join(folder, tables.META), "w", encoding="utf-8") as f:
            f.write(json.dumps(facts | {"records": records}, indent=1) + "\n")
        os.umask(mask := os.umask(0))
        os.chmod(folder, 0o777 & ~mask)  # mkdtemp's is for its owner only
        os.rename(folder, out)  # whole or not at all
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if totals["skipped"]:
        print(
            f"skipped {totals['skipped']:,} records that cannot be used; for one, {last}", file=sys.stderr, flush=True
        )
    size, seconds = sum(entry.stat().st_size for entry in os.scandir(out)), time.monotonic() - started
    print(
        f"{totals['documents']:,} documents, {totals['tokens']:,} tokens in {shards} shards of {out}: "
        f"{size / 1e6:,.1f} MB, {totals['tokens'] / seconds:,.0f} tokens/s",
        flush=True,
    )
    return facts | {"out": args.out, "bytes": size, "seconds": seconds}


def _run(workers: int, job: tuple, blocks: int) -> list[dict]:
    """What each shard holds, after `workers` processes have written them all."""
    spawn, shards = multiprocessing.get_context("spawn"), job[-2]  # a fork would not survive the readers' threads
    os.environ["PYTHONSAFEPATH"] = "1"  # or a process that starts in scripts/ would find this file as `tokenize` again
    done = spawn.Array("d", shards, lock=False)  # how much of each shard is written, from 0 to 1
    pool = ProcessPoolExecutor(workers, spawn, _start, (job, done))
    try:
        running = [pool.submit(_write, shard) for shard in range(shards)]
        with tqdm(total=blocks, unit="block", disable=None) as bar:
            waiting = set(running)
            while waiting:
                ended, waiting = wait(waiting, 0.2, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                bar.update(round(sum(done) / shards * blocks) - bar.n)
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


def _start(job: tuple, done) -> None:
    """Prepares a worker process: opens what all of its shards need."""
    global _job, _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers,
    parent = multiprocessing.parent_process()  # and where that was killed they end themselves
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    path, configs, chats, *rest = job
    _job, _done = (tokenizer.load(path), configs, _open(configs, chats), chats, *rest), done


def _write(shard: int) -> dict:
    """Writes one shard, its part of every source in turn, which depends on the number of shards alone; counts it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    learnt, configs, opened, chats, max_skipped, shards, folder = _job
    counts, last = {"documents": 0, "tokens": 0, "skipped": 0}, ""
    with contextlib.closing(ArrayRecordWriter(_path(folder, shard, shards), tables.WRITER_OPTIONS)) as writer:
        for i, (config, source) in enumerate(zip(configs, opened)):
            limit = Limit(config.spec, max_skipped, lambda *_, **__: None)
            reader = Reader(source, ONCE, limit, chats, 0, (shard, shards), None)
            while (document := reader.next()) is not None:
                try:
                    ids, said = packing.encode_document(learnt, document, chats)
                except UsageError as e:  # the chat template does not take it
                    limit.skip(BadRecord(f"source {config.spec}", str(e)))
                    continue
                writer.write(tables.encode_record(ids, said))
                counts["documents"] += 1
                counts["tokens"] += len(ids)
                _done[shard] = (i + reader.cursor()["block"] / source.blocks) / len(opened)
            counts["skipped"] += limit.skipped
            last = last or (describe(limit.last) if limit.last else "")
    _done[shard] = 1.0
    return counts | {"last": last}


def _open(configs, chats: bool) -> list:
    opened = [sources.open_source(config, chats) for config in configs]
    for config, source in zip(configs, opened):
        if hasattr(source, "tokenizer_sha256"):
            raise UsageError(f"source {config.spec} is tokenised already")
    return opened


def _path(folder: str, shard: int, shards: int) -> str:
    return os.path.join(folder, f"part-{shard:05d}-of-{shards:05d}{tables.SUFFIX}")


if __name__ == "__main__":
    cli.main(command)
