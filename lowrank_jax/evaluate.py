"""Held-out loss, perplexity and bits per byte, at any sequence length.

    python -m lowrank_jax.evaluate --workdir=runs/quickstart --lengths=256,512,1024

Each length cuts the same stream of held-out tokens into rows and scores the same targets: longer rows give them more
context. `--weights=int8` also measures the change that int8 weights make, with the program that generates text.
"""

from lowrank_jax import cli
from lowrank_jax.config import MOST_LENGTH, UsageError, read_sources
from lowrank_jax.data import stream
from lowrank_jax.inference import quantize
from lowrank_jax.machine import console
from lowrank_jax.training import evaluation
from lowrank_jax.training.trained import Trained, open_run


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--workdir", required=True, help="the run")
    parser.add_argument("--lengths", default="", help="sequence lengths: 256,512,1024 (default: the longest trained)")
    parser.add_argument("--data", default="", help="a source to use instead of the held-out part of the first phase")
    parser.add_argument("--tokens", type=int, default=0, help="number of tokens (default: the config's eval_tokens)")
    parser.add_argument("--weights", choices=quantize.KINDS, help="also measure the change that these weights make")
    args = parser.parse_args(argv)
    try:
        lengths = [int(n) for n in args.lengths.split(",") if n.strip()]
    except ValueError:
        raise UsageError(f"--lengths={args.lengths} must be whole numbers, such as 256,512,1024") from None
    if args.tokens < 0 or any(n < 1 for n in lengths):
        raise UsageError("--lengths and --tokens must be above 0")
    if any(n > MOST_LENGTH for n in lengths):
        raise UsageError(f"--lengths={max(lengths)} must be at most {MOST_LENGTH}")
    run, results = open_run(args.workdir), []
    phase = next(iter(run.config.phases.values()))
    lengths = lengths or [phase.lengths[-1]]
    byte_lengths = run.tokenizer.byte_lengths()
    for length, batches in _batches(run, args.data, lengths, args.tokens or phase.eval_tokens).items():
        result = evaluation.evaluate(run.config, run.params, batches, byte_lengths)
        results.append({"length": length} | result)
        shown = f"length {length:6d}  loss {result['loss']:.4f}  perplexity {result['perplexity']:8.2f}"
        bits, tokens = result["bits_per_byte"], result["tokens"]
        console.show(f"{shown}  bits per byte {bits:.4f}  ({tokens} tokens)")
        if args.weights:
            change = evaluation.compare_weights(run.config, run.params, batches, byte_lengths, args.weights)
            results[-1]["with"] = change
            before, after = change["weight_bytes_before"] / 1e6, change["weight_bytes"] / 1e6
            shown = f"  {args.weights} weights: {after:.1f} MB instead of {before:.1f} MB"
            console.show(f"{shown}, bits per byte {change['change']:+.4f}")
    return {"workdir": args.workdir, "step": run.progress.step, "results": results}


def _batches(run: Trained, data: str, lengths: list[int], tokens: int) -> dict[int, list[stream.Batch]]:
    """Return the batches of every length, with weight on the same targets only."""
    batches, (name, phase) = {}, next(iter(run.config.phases.items()))
    for length in lengths:
        if data:
            documents = stream.read_once(read_sources(data, "--data"), run.tokenizer)
        else:
            documents = stream.open_held_out(phase, run.tokenizer, run.config.seed, chats=name == "sft")
        batches[length] = evaluation.batches_of(documents, length, tokens)
        if not batches[length]:
            raise UsageError(f"the data does not fill one row of {length} tokens; use shorter --lengths or more data")
    shared = min(tokens, *(sum(batch["tokens"].size for batch in rows) for rows in batches.values()))
    if shared < tokens:
        console.show(f"the data fills rows of every length with {shared} tokens, fewer than {tokens}")
    for rows in batches.values():
        evaluation.ignore_after(rows, shared)
    return batches


if __name__ == "__main__":
    cli.main(command)
