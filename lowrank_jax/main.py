"""Trains a model from raw text to chat: every phase of a config, or on from where the run in --workdir stopped.

python -m lowrank_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import functools

from lowrank_jax import cli, interrupt, train


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run's folder; if it holds a run, that run goes on")
    with interrupt.signals() as received:
        args, config = parser.parse_with_config(argv)
        finish = train.run(config, args.workdir, received, show=functools.partial(print, flush=True))
    print(f"done: step {finish['step']}, {finish['tokens']:,} tokens; report: {args.workdir}/report.html", flush=True)
    return finish


if __name__ == "__main__":
    cli.main(command)
