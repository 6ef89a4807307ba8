"""A run on one page: loss.png and report.html, from the run's folder alone.

python -m lowrank_jax.report --workdir=runs/quickstart
"""

from lowrank_jax import cli
from lowrank_jax.machine import console


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--workdir", required=True, help="the run")
    args = parser.parse_args(argv)
    from lowrank_jax.training import mirror, report  # imports Matplotlib, after `cli.main` has seen to its cache

    with mirror.opened(args.workdir, writes=("loss.png", "report.html")) as folder:
        paths = {what: path.replace(folder, args.workdir, 1) for what, path in report.write(folder).items()}
    console.show(paths["report"])
    return paths


if __name__ == "__main__":
    cli.main(command)
