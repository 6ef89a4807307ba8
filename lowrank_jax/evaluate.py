"""Held-out loss, perplexity and bits per byte, at any sequence length.

    python -m lowrank_jax.evaluate --workdir=runs/quickstart --lengths=256,512,1024

Each length cuts the same stream of held-out tokens into rows and scores the same targets: a longer row means more
context for them. `--weights=int8` tells as well what weights of that kind change, by the program that generates.
"""

from lowrank_jax import cli
from lowrank_jax.config import PhaseConfig, UsageError, read_sources
from lowrank_jax.data import stream
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference import quantize
from lowrank_jax.training import evaluation
from lowrank_jax.training.trained import open_run


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument(
        "--lengths", default="", help="sequence lengths, such as 256,512,1024 (default: the longest trained)"
    )
    parser.add_argument("--data", default="", help="a source to use instead of the held-out part of pretraining")
    parser.add_argument("--tokens", type=int, default=0, help="how many tokens (default: the config's eval_tokens)")
    parser.add_argument("--weights", choices=quantize.KINDS, help="tells as well what such weights change")
    args = parser.parse_args(argv)
    try:
        asked = [int(n) for n in args.lengths.split(",") if n.strip()]
    except ValueError:
        raise UsageError(f"--lengths={args.lengths} must be whole numbers, such as 256,512,1024") from None
    if args.tokens < 0 or any(n < 1 for n in asked):
        raise UsageError("--lengths and --tokens must be above 0")
    run = open_run(args.workdir)
    config, phase = run.config, run.config.pretrain
    tokens, results, cut = args.tokens or phase.eval_tokens, [], {}
    for length in asked or [phase.lengths[-1]]:
        cut[length] = evaluation.batches_of(_open(args.data, phase, run.tokenizer, config.seed), length, tokens)
        if not cut[length]:
            raise UsageError(f"the data does not fill one row of {length} tokens")
    shared = min(tokens, *(sum(batch["tokens"].size for batch in batches) for batches in cut.values()))
    if shared < tokens:
        print(f"{tokens} tokens were asked for; the data fills rows of every length with {shared}", flush=True)
    for length, batches in cut.items():
        evaluation.ignore_after(batches, shared)
        result = evaluation.evaluate(config, run.params, batches, run.tokenizer.byte_lengths())
        results.append({"length": length} | result)
        print(
            f"length {length:6d}  loss {result['loss']:.4f}  perplexity {result['perplexity']:8.2f}  "
            f"bits per byte {result['bits_per_byte']:.4f}  ({result['tokens']} tokens)",
            flush=True,
        )
        if args.weights:
            changed = evaluation.compare_weights(
                config, run.params, batches, run.tokenizer.byte_lengths(), args.weights
            )
            results[-1]["with"] = changed
            print(
                f"  {args.weights} weights: {changed['weight_bytes'] / 1e6:.1f} MB instead of "
                f"{changed['weight_bytes_before'] / 1e6:.1f} MB, bits per byte {changed['change']:+.4f}",
                flush=True,
            )
    return {"workdir": args.workdir, "step": run.progress.step, "results": results}


def _open(data: str, phase: PhaseConfig, tokenizer: Tokenizer, seed: int) -> stream.Stream:
    if not data:
        return stream.open_held_out(phase, tokenizer, seed, chats=False)
    return stream.read_once(read_sources(data, "--data"), tokenizer)


if __name__ == "__main__":
    cli.main(command)
