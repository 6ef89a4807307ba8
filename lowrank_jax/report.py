"""A run on one page: loss.png and report.html, from the run's folder alone.

python -m lowrank_jax.report --workdir=runs/quickstart
"""

from lowrank_jax import cli
from lowrank_jax.training import report


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--workdir", required=True, help="the run")
    paths = report.write(parser.parse_args(argv).workdir)
    print(paths["report"], flush=True)
    return paths


if __name__ == "__main__":
    cli.main(command)
