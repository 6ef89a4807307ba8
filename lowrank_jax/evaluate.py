"""Held-out loss, perplexity and bits per byte, at any sequence length.

    python -m lowrank_jax.evaluate --workdir=runs/quickstart --lengths=256,512,1024

Each length cuts the same stream of held-out tokens into rows and scores the same targets: longer rows give them more
context. `--weights=int8` also measures the change that int8 weights make, with the program that generates text.
"""

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.inference import quantize
from lowrank_jax.machine import console
from lowrank_jax.training import evaluation
from lowrank_jax.training.trained import open_run


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_run()
    parser.add_argument("--lengths", default="", help="sequence lengths: 256,512,1024 (default: the longest trained)")
    parser.add_argument("--data", default="", help="a source to use instead of the held-out part of the first phase")
    parser.add_argument("--tokens", type=int, default=0, help="number of tokens (default: the config's eval_tokens)")
    parser.add_argument("--weights", choices=quantize.KINDS, help="also measure the change that these weights make")
    args = parser.parse_args(argv)
    try:
        lengths = [int(n) for n in args.lengths.split(",") if n.strip()]
    except ValueError:
        raise UsageError(f"--lengths={args.lengths} must be whole numbers, such as 256,512,1024") from None
    evaluation.check_sizes(lengths, args.tokens, "--")
    run, results = open_run(args.workdir, at=args.step, phase=args.phase), []
    for result in evaluation.of_run(run, lengths, args.data, args.tokens, args.weights or ""):
        results.append(result)
        shown = f"length {result['length']:6d}  loss {result['loss']:.4f}  perplexity {result['perplexity']:8.2f}"
        console.show(f"{shown}  bits per byte {result['bits_per_byte']:.4f}  ({result['tokens']} tokens)")
        if change := result.get("with"):
            before, after = change["weight_bytes_before"] / 1e6, change["weight_bytes"] / 1e6
            shown = f"  {args.weights} weights: {after:.1f} MB instead of {before:.1f} MB"
            console.show(f"{shown}, bits per byte {change['change']:+.4f}")
    return {"workdir": args.workdir, "step": run.progress.step, "results": results}


if __name__ == "__main__":
    cli.main(command)
