"""Kill a training again and again, and check that it ends like an uninterrupted one, to the last bit.

    python -m lowrank_jax verify_resume --folder=runs/verify     # 104 kills in 8 arms: 30 minutes on two cores
    python -m lowrank_jax verify_resume --config=configs/quickstart.py --precisions=fp32 --optimizers=muon --kills=9

An arm is a precision and an optimizer. Each arm trains the config twice: once uninterrupted, and once killed at random
moments and started again until it finishes. Half of the kills are SIGKILL and half SIGTERM. LOWRANK_FAULTS adds the
moments that chance may miss: the first save, and the first step of every further stage and of SFT. A run that finishes
too early is followed by another. The hashes of weights and data, the tokens, and every row of metrics.jsonl without its
speed are compared.

Without --config, a tiny model reads made-up text several times; this needs the repository's configs/default.py. With
--folder, arms that are done are not trained again. Exit status 0: all arms are equal.
"""

import argparse
import itertools
import json
import math
import pathlib
import random
import shutil
import signal
import sys
import tempfile

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.training import verify_resume
from lowrank_jax.training.verify_resume import Arm

DEFAULTS = pathlib.Path(__file__).parents[2] / "configs" / "default.py"


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="a config; --config.group.key=value changes a key of it")
    parser.add_argument("--kills", type=int, default=100, help="number of kills over all arms, at least")
    parser.add_argument("--precisions", default="fp32,bf16,fp16,fp8")
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_argument("--folder", help="where to train; kept, and resumed from (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    args, changes = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the trainer is killed too
    if args.kills < 1:
        raise UsageError(f"--kills={args.kills} must be at least 1")
    if not args.config and not DEFAULTS.is_file():
        raise UsageError("--config=FILE is missing; only a clone of the repository has the made-up run's defaults")
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="verify_resume_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(args.precisions.split(","), args.optimizers.split(",")))
    kills = math.ceil(args.kills / len(pairs))
    arms = [arm_of(folder, args, changes, kills, *pair) for pair in pairs]
    rows = verify_resume.verify_arms(folder, arms, args.seed)
    unequal = [row["arm"] for row in rows if not row["equal"]]
    result = {"equal": not unequal, "kills": sum(len(row["struck"]) for row in rows), "arms": rows}
    if unequal:
        if args.json:
            print(json.dumps(result), flush=True)
        raise RunFailure(f"not equal: {', '.join(unequal)}; the runs are in {folder}")
    if not args.folder:
        shutil.rmtree(folder)
    return result


def arm_of(
    folder: pathlib.Path, args: argparse.Namespace, changes: list[str], kills: int, precision: str, optimizer: str
) -> Arm:
    """Return the arm, its config checked, with the tokenizer that all arms share."""
    flags = [f"--config={args.config or DEFAULTS}"]
    if not args.config:
        flags += [f"--config.{setting}" for setting in verify_resume.tiny_settings(folder, precision)]
    flags += [*changes, f"--config.precision={precision}", f"--config.optim.name={optimizer}"]
    config = cli.read_config(flags)
    if not (config.tokenizer.path or config.init_from):
        flags.append(f"--config.tokenizer.path={verify_resume.learn_tokenizer(folder, config)}")
    name = f"{precision}-{optimizer}"
    return Arm(name, flags, folder / name, kills, random.Random(f"{args.seed} {name}"))


if __name__ == "__main__":
    cli.main(command)
