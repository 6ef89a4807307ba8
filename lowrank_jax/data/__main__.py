"""Commands that prepare data: `python -m lowrank_jax.data tokenize` and `learn_tokenizer`; each has --help."""

import os
import signal
import sys
import time

import lowrank_jax.__main__
from lowrank_jax import cli
from lowrank_jax.config import UsageError, read_sources
from lowrank_jax.data import pretokenize, stream, tokenizer
from lowrank_jax.machine import console

MOST_SHARDS, MOST_WORKERS = 99_999, 1024  # the names of shards have five digits
MAX_SKIPPED = 100  # records of a source that may be unusable, as in configs/default.py


def tokenize(argv: list[str]) -> dict:
    """Tokenise sources once, in parallel, into shards that `arrayrecord:DIR` reads many times faster than text.

        python -m lowrank_jax tokenize --tokenizer=runs/mine/tokenizer --sources="json:my/*.jsonl" --out=my_tokens

    A run that uses the shards names the same tokenizer: --config.tokenizer.path=runs/mine/tokenizer.
    """
    parser = cli.Parser(tokenize.__doc__)
    flag = parser.add_argument
    parser.add_path("--tokenizer", required=True, help="a run's folder of it, a SentencePiece model, a tokenizer.json")
    flag("--sources", required=True, help="what to read, such as text:my/*.txt,json:more.jsonl")
    parser.add_path("--out", required=True, help="a folder to create")
    flag("--chats", action="store_true", help="for SFT: only what the assistant says carries weight")
    flag("--shards", type=int, default=0, help="files to write (default: by the size of the sources)")
    flag("--workers", type=int, default=0, help="processes (default: one per core); the shards do not depend on it")
    flag("--max_skipped", type=int, default=MAX_SKIPPED, help="records of a source that may be unusable")
    args = parser.parse_args(argv)
    if min(args.shards, args.workers, args.max_skipped) < 0:
        raise UsageError("--shards, --workers and --max_skipped must not be negative")
    if args.shards > MOST_SHARDS or args.workers > MOST_WORKERS:
        raise UsageError(f"--shards must be at most {MOST_SHARDS:,}, and --workers at most {MOST_WORKERS:,}")
    if os.path.exists(args.out):
        raise UsageError(f"--out={args.out} exists already; name a folder that does not")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started, configs = time.monotonic(), read_sources(args.sources, "--sources")
    job = pretokenize.Job(args.tokenizer, configs, args.chats, args.max_skipped, args.shards)
    facts, last = pretokenize.write(job, args.out, args.workers)
    size, seconds = sum(entry.stat().st_size for entry in os.scandir(args.out)), time.monotonic() - started
    if facts["skipped"]:
        console.say(f"skipped {facts['skipped']:,} unusable records; for example, {last}")
    totals = f"{facts['documents']:,} documents, {facts['tokens']:,} tokens in {facts['shards']} shards of {args.out}"
    console.show(f"{totals}: {size / 1e6:,.1f} MB, {facts['tokens'] / seconds:,.0f} tokens/s")
    return facts | {"out": args.out, "bytes": size, "seconds": seconds}


def learn_tokenizer(argv: list[str]) -> dict:
    """Learn a SentencePiece tokenizer that any run can use with --config.tokenizer.path=OUT.

    python -m lowrank_jax learn_tokenizer --sources="text:my/*.txt" --vocab_size=8192 --out=my_tokenizer
    """
    parser = cli.Parser(learn_tokenizer.__doc__)
    parser.add_argument("--sources", required=True, help="what to learn from, such as text:my/*.txt,json:more.jsonl")
    parser.add_argument("--vocab_size", type=int, default=0, help="pieces (default: by the size of the sources)")
    parser.add_argument("--train_bytes", type=int, default=20_000_000, help="most text to read")
    parser.add_path("--out", required=True, help="a folder to write")
    args = parser.parse_args(argv)
    if os.path.exists(args.out) and os.listdir(args.out):
        raise UsageError(f"--out={args.out} is not empty")
    configs = read_sources(args.sources, "--sources")
    size = args.vocab_size or tokenizer.pieces_for(stream.corpus_bytes(configs))
    learnt = tokenizer.train(stream.source_texts(configs, args.train_bytes, MAX_SKIPPED), size)
    learnt.save(args.out)
    console.show(f"{learnt.vocab_size} pieces in {args.out}")
    return {"out": args.out, "vocab_size": learnt.vocab_size}


if __name__ == "__main__":
    lowrank_jax.__main__.main()
