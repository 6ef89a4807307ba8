"""Turn exported weights into a run: `config.init_from` trains from it, and every other command opens it.

    python -m lowrank_jax.importer --from=exports/hf --workdir=runs/again
    python -m lowrank_jax.main --config=configs/quickstart.py --config.init_from=runs/again --workdir=runs/more

`--from` is a folder that `lowrank_jax.export` wrote with --format=hf or torch, also after transformers has saved it
again, or a state dict (.safetensors, .pt, .bin) with such a config.json in its folder.
"""

import jax

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.export import import_weights
from lowrank_jax.export.folder import unused, whole_folder
from lowrank_jax.machine import console


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--from", dest="source", required=True, help="the export's folder, or a file of weights")
    parser.add_path("--workdir", required=True, help="the run's new folder")
    parser.add_path("--tokenizer", default="", help="a tokenizer's folder or file (default: the export's)")
    parser.add_path("--config", metavar="FILE", help="all settings but the model's (default: the exported run's)")
    args, rest = parser.parse_known_args(argv)
    if rest and not args.config:
        raise UsageError(f"unknown argument {rest[0]}" + " without --config=FILE" * rest[0].startswith("--config."))
    base = cli.read_config([f"--config={args.config}", *rest]) if args.config else None
    out = unused(args.workdir, "--workdir")
    config, tokenizer, params, progress = import_weights.open_export(args.source, args.tokenizer, base)
    with whole_folder(out) as folder:
        sha256 = import_weights.write(config, tokenizer, params, progress, folder)
    size = sum(w.size for w in jax.tree.leaves(params))
    console.say(f"{args.workdir}: {size:,} parameters from {args.source}")
    return {"workdir": args.workdir, "from": args.source, "parameters": size, "params_sha256": sha256}


if __name__ == "__main__":
    cli.main(command)
