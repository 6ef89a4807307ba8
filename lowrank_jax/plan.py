"""The plan of a config before anything is trained or rented: its stages, its parameters, the size of its cache.

    python -m lowrank_jax.plan --config=configs/custom.py [--json]
    python -m lowrank_jax.plan --config=configs/custom.py --topology=v5e:4x4

    python -m lowrank_jax.plan --config=configs/custom.py --topology=8xh100 --price=2.5

With a topology, every stage's real step is compiled for it without such hardware: the compiler reports memory,
collectives and kernels. Times are estimates from the chip's published peaks, which no program reaches.
"""

import math

from lowrank_jax import cli
from lowrank_jax.config import UsageError
from lowrank_jax.machine import console, devices
from lowrank_jax.training import forecast
from lowrank_jax.training.plan import make


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--topology", default="", help=f"compile every stage for it: {devices.TOPOLOGIES}")
    parser.add_argument("--price", type=float, default=0.0, metavar="DOLLARS", help="of a device's hour: adds the cost")
    args, config = parser.parse_with_config(argv)
    if not 0 <= args.price < math.inf:
        raise UsageError(f"--price={args.price} must be the dollars of a device's hour, such as 2.5")
    if args.price and not args.topology:
        raise UsageError("--price needs the time of a step: add --topology, such as --topology=8xh100")
    config = forecast.resolve_vocab(config)
    plan = forecast.for_topology(config, args.topology) if args.topology else forecast.describe(config, make(config))
    plan |= forecast.price(plan, args.price)
    if args.price and plan["est_cost"] is None:
        console.say(f"no cost: the peaks of {plan['device_kind']} are not known, so neither is the time of a step")
    console.show(forecast.table(plan))
    return plan


if __name__ == "__main__":
    cli.main(command)
