"""Learns a SentencePiece tokenizer that any run can then use with --config.tokenizer.path=OUT.

python scripts/train_tokenizer.py --sources="text:my/*.txt" --vocab_size=8192 --out=my_tokenizer
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import dataclasses

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.data import stream, tokenizer


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--sources", required=True, help="what to learn from, such as text:my/*.txt,json:more.jsonl")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--train_bytes", type=int, default=20_000_000, help="most text to read")
    parser.add_argument("--out", required=True, help="a folder to write")
    args = parser.parse_args(argv)
    if os.path.exists(args.out) and os.listdir(args.out):
        raise UsageError(f"--out={args.out} is not empty")
    default = os.path.join(os.path.dirname(__file__), "..", "configs", "default.py")
    config = cli.read_config([f"--config={default}", f"--config.pretrain.sources={args.sources}"])
    phase = dataclasses.replace(config.pretrain, eval_fraction=0.0)
    learnt = tokenizer.train(stream.texts([phase], args.train_bytes), args.vocab_size)
    learnt.save(args.out)
    print(f"{learnt.vocab_size} pieces in {args.out}", flush=True)
    return {"out": args.out, "vocab_size": learnt.vocab_size}


if __name__ == "__main__":
    cli.main(command)
