"""Held-out loss, perplexity and bits per byte, at any sequence length, or tasks of lm-evaluation-harness.

    python -m lowrank_jax.evaluate --workdir=runs/quickstart --lengths=256,512,1024
    python -m lowrank_jax.evaluate --workdir=runs/quickstart --sources=json:my_chats.jsonl --phase=pretrain
    python -m lowrank_jax.evaluate --workdir=runs/quickstart --tasks=hellaswag,my_task.yaml --limit=200

Each length cuts the same stream of held-out tokens into rows and scores the same targets: longer rows give them more
context. Chats are scored as in SFT: in the template, on the assistant's tokens alone. A run with SFT shows both.
`--weights=int8` also measures the change that int8 weights make, with the program that generates text.
"""

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.inference import quantize
from lowrank_jax.inference.session import Model
from lowrank_jax.machine import console
from lowrank_jax.training import evaluation, tasks
from lowrank_jax.training.trained import open_run


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_run()
    add = parser.add_argument
    add("--lengths", default="", help="sequence lengths: 256,512,1024 (default: the longest trained)")
    add("--data", "--sources", default="", help="sources to use instead of the held-out parts of the run")
    add("--tokens", type=int, default=0, help="number of tokens (default: the config's eval_tokens)")
    add("--weights", choices=quantize.KINDS, help="also measure the change that these weights make")
    add("--tasks", help="run these instead: names and YAML files of lm-evaluation-harness, hellaswag,my_task.yaml")
    add("--limit", type=int, default=0, help="most questions of each task (default: all)")
    args = parser.parse_args(argv)
    if args.tasks is not None:
        return _tasks(args)
    try:
        lengths = [int(n) for n in args.lengths.split(",") if n.strip()]
    except ValueError:
        raise UsageError(f"--lengths={args.lengths} must be whole numbers, such as 256,512,1024") from None
    evaluation.check_sizes(lengths, args.tokens, "--")
    run, results = open_run(args.workdir, at=args.step, phase=args.phase), []
    for result in evaluation.of_run(run, lengths, args.data, args.tokens, args.weights or ""):
        results.append(result)
        for row in (result, result["chats"]) if "chats" in result else (result,):
            shown = f"length {row['length']:6d}  loss {row['loss']:.4f}  perplexity {row['perplexity']:8.2f}"
            shown += f"  bits per byte {row['bits_per_byte']:.4f}  ({row['tokens']} tokens"
            console.show(f"{shown}{' of answers' * (row['scored'] == 'chats')})")
        if change := result.get("with"):
            before, after = change["weight_bytes_before"] / 1e6, change["weight_bytes"] / 1e6
            shown = f"  {args.weights} weights: {after:.1f} MB instead of {before:.1f} MB"
            console.show(f"{shown}, bits per byte {change['change']:+.4f}")
    return {"workdir": args.workdir, "step": run.progress.step, "phase": run.progress.phase, "results": results}


def _tasks(args) -> dict:
    names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    tasks.check(names, f"--tasks={args.tasks}")
    if args.limit < 0:
        raise UsageError(f"--limit={args.limit} must be at least 0")
    run = open_run(args.workdir, at=args.step, phase=args.phase)
    results = tasks.run(Model(run.config, run.tokenizer, run.params), names, args.limit)
    console.show(tasks.describe(results).replace("; ", "\n"))
    facts = {"workdir": args.workdir, "step": run.progress.step, "phase": run.progress.phase}
    return facts | {"results": [], "tasks": results}


if __name__ == "__main__":
    cli.main(command)
