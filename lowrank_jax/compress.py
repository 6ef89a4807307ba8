"""Compress a dense model to low rank, by factors of its projections that preserve the activations of a text.

    python -m lowrank_jax.compress --from=runs/dense --rank=32 --out=runs/compressed [--mlp_rank=64] [--data=SOURCE]

`--from` is a run with config.model.rank=0, or its export with `--format=hf`. `--out` becomes a run's folder; training
it recovers what the rank costs (docs/export.md has the recipe). `--rank_split` divides the mean rank between Q, K, V
and O. Latents get no norm, as a dense model has none.

`--from` may also be BLOOM or MPT in Hugging Face form, which cannot become a run of ours. `--out` is then a folder of
the same kind, whose matrices are products of that rank, with their factors in a file.
"""

from lowrank_jax import cli
from lowrank_jax.config import UsageError, shown
from lowrank_jax.export import compression, foreign, import_weights, weights
from lowrank_jax.export.folder import unused, whole_folder


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--from", dest="source", required=True, help="the dense model: a run, or an export of it")
    parser.add_argument("--rank", type=int, required=True, help="mean rank of Q, K, V and O")
    parser.add_path("--out", required=True, help="the new folder")
    parser.add_argument("--rank_split", default="", help="shares of q,k,v,o (default: those in the run's config)")
    parser.add_argument("--mlp_rank", type=int, default=0, help="rank of the MLP's matrices (default: dense)")
    parser.add_argument("--data", default="", help="sources to calibrate with and measure on (default: the run's own)")
    tokens = compression.TOKENS
    parser.add_argument("--tokens", type=int, default=tokens, help=f"tokens to calibrate with (default {tokens:,})")
    args = parser.parse_args(argv)
    out = unused(args.out, "--out")
    for name, least in (("rank", 1), ("mlp_rank", 0), ("tokens", 1)):
        if not least <= (value := getattr(args, name)) <= weights.LARGEST:
            raise UsageError(f"--{name}={shown(value)} must be from {least} to {weights.LARGEST:,}")
    facts = {"from": args.source, "out": args.out, "rank": args.rank}
    split = compression.read_split(args.rank_split) if args.rank_split else None
    if foreign.family(args.source):
        if args.mlp_rank:
            raise UsageError("--mlp_rank is only for models of lowrank_jax, not for BLOOM or MPT")
        ranks, data = (args.rank, split or (1.0, 1.0, 1.0, 1.0)), args.data or compression.FALLBACK
        with whole_folder(out) as folder:
            return facts | foreign.compress(args.source, folder, *ranks, data, args.tokens)
    dense = compression.open_dense(args.source)
    ranks = (args.rank, split or dense.config.model.rank_split, args.mlp_rank)
    compression.low_rank(dense.config, *ranks)  # refuses impossible ranks before the work begins
    text, held_out = compression.texts(dense, args.data, args.tokens)
    config, params = compression.compress(dense, *ranks, text)
    facts |= {"ranks": list(config.model.ranks), "calibration_tokens": sum(batch["tokens"].size for batch in text)}
    facts |= compression.measure(dense, config, params, held_out)
    with whole_folder(out) as folder:
        import_weights.write(config, dense.tokenizer, params, dense.progress, folder)
    return facts


if __name__ == "__main__":
    cli.main(command)
