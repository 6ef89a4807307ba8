"""A dense model made low-rank: factors of its projections that do the least harm to a text's activations.

    python -m lowrank_jax.compress --from=runs/dense --rank=32 --out=runs/compressed [--mlp_rank=64] [--data=SOURCE]

`--from` is a run with config.model.rank=0, or what `lowrank_jax.export --format=hf` made of it; `--out` becomes a run's
folder, whose training recovers what the rank costs (docs/export.md has the recipe). The mean rank is shared out between
Q, K, V and O as `--rank_split` says. There is no norm on the latents: a dense model has none.

`--from` may also be BLOOM or MPT in Hugging Face form, whose architecture is not ours: `--out` is then a folder of the
same kind with products of that rank in it, and their factors beside them.
"""

import os

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.export import compression, foreign, import_weights
from lowrank_jax.export.folder import whole_folder


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, help="the dense model: a run, or an export of it")
    parser.add_argument("--rank", type=int, required=True, help="mean rank of Q, K, V and O")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--rank_split", default="", help="shares of q,k,v,o (default: those in the run's config)")
    parser.add_argument("--mlp_rank", type=int, default=0, help="rank of the MLP's matrices (default: left dense)")
    parser.add_argument("--data", default="", help="sources to calibrate with and measure on (default: the run's own)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=compression.TOKENS,
        help=f"tokens to calibrate with (default {compression.TOKENS:,})",
    )
    args = parser.parse_args(argv)
    out = os.path.realpath(args.out)
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"--out={args.out} is there already; name a folder that is new or empty")
    if args.rank < 1 or args.mlp_rank < 0 or args.tokens < 1:
        raise UsageError("--rank and --tokens must be above 0, and --mlp_rank not below")
    facts = {"from": args.source, "out": args.out, "rank": args.rank}
    if foreign.family(args.source):
        if args.mlp_rank:
            raise UsageError("--mlp_rank is for models of our own")
        shares = compression.read_split(args.rank_split) if args.rank_split else (1.0, 1.0, 1.0, 1.0)
        with whole_folder(out) as made:
            return facts | foreign.compress(
                args.source, made, args.rank, shares, args.data or compression.OTHER, args.tokens
            )
    dense = compression.open_dense(args.source)
    split = compression.read_split(args.rank_split) if args.rank_split else dense.config.model.rank_split
    compression.low_rank(
        dense.config, args.rank, split, args.mlp_rank
    )  # what cannot be is refused before anything is computed
    text, held_out = compression.texts(dense, args.data, args.tokens)
    config, params = compression.compress(dense, args.rank, split, args.mlp_rank, text)
    facts |= {"ranks": list(config.model.ranks), "calibration_tokens": sum(batch["tokens"].size for batch in text)}
    facts |= compression.measure(dense, config, params, held_out)
    with whole_folder(out) as made:
        facts_of_dense = {"trained_step": dense.progress.step, "trained_tokens": dense.progress.tokens}
        import_weights.write(config, dense.tokenizer, params, facts_of_dense, made)
    return facts


if __name__ == "__main__":
    cli.main(command)
