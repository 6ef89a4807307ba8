"""A run made of exported weights, for training to go on from: `init_from` takes it, and every other command opens it.

    python -m lowrank_jax.importer --from=exports/hf --workdir=runs/again
    python -m lowrank_jax.main --config=configs/quickstart.py --config.init_from=runs/again --workdir=runs/more

`--from` is a folder that `lowrank_jax.export` made with --format=hf or torch, also as transformers has saved it anew,
or a state dict (.safetensors, .pt, .bin) with such a config.json beside it.
"""

import os

import jax

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.export import import_weights
from lowrank_jax.export.folder import whole_folder
from lowrank_jax.machine import console


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, help="the export's folder, or a file of weights")
    parser.add_argument("--workdir", required=True, help="the run's folder to make")
    parser.add_argument("--tokenizer", default="", help="a tokenizer's folder or file (default: beside the weights)")
    parser.add_argument("--config", metavar="FILE", help="settings but for the model's (default: the exported run's)")
    args, rest = parser.parse_known_args(argv)
    if rest and not args.config:
        raise UsageError(f"unknown argument {rest[0]}" + " without --config=FILE" * rest[0].startswith("--config."))
    base = cli.read_config([f"--config={args.config}", *rest]) if args.config else None
    out = os.path.realpath(args.workdir)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"--workdir={args.workdir} is there already; name a folder that is new or empty")
    config, tok, params, progress = import_weights.open_export(args.source, args.tokenizer, base)
    with whole_folder(out) as made:
        facts = {"trained_step": progress.step, "trained_tokens": progress.tokens}
        sha256 = import_weights.write(config, tok, params, facts, made)
    size = sum(w.size for w in jax.tree.leaves(params))
    console.say(f"{args.workdir}: {size:,} parameters of {args.source}")
    return {"workdir": args.workdir, "from": args.source, "parameters": size, "params_sha256": sha256}


if __name__ == "__main__":
    cli.main(command)
