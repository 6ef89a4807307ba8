"""Kill a training again and again, and check that it ends like an uninterrupted one, to the last bit.

    python -m lowrank_jax verify_resume --folder=runs/verify     # 104 kills in 8 arms: 30 minutes on two cores
    python -m lowrank_jax verify_resume --config=configs/quickstart.py --precisions=fp32 --optimizers=muon --kills=9

An arm, a precision and an optimizer, trains the config once uninterrupted, and then killed and resumed until it has its
kills. Half are SIGKILL, half SIGTERM: at random moments, at the first save, and at the first step of SFT and of every
longer sequence. Hashes of weights and data, tokens, and all metrics but the speed are compared; status 0: all equal.
Without --config, a tiny model reads made-up text several times.
"""

import math
import os
import pathlib
import random
import secrets
import shutil
import signal
import sys
import tempfile

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import console
from lowrank_jax.training import mirror, verify_resume


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_path("--config", metavar="FILE", help="a config; --config.group.key=value changes a key of it")
    parser.add_argument("--kills", type=int, default=100, help="number of kills over all arms, at least")
    parser.add_argument("--precisions", default="fp32,bf16,fp16,fp8")
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_path("--folder", help="where to train; kept, and arms that it has are not trained again")
    parser.add_path("--bucket", default="", help="such as s3://bucket/verify: train the killed runs in it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    args, changes = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the trainer is killed too
    if args.kills < 1:
        raise UsageError(f"--kills={args.kills} must be at least 1")
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="verify_resume_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if args.bucket:
        os.environ[mirror.VARIABLE] = str(folder)  # for the local copies of runs in a bucket
    arms, pairs = [], [(p, o) for p in args.precisions.split(",") for o in args.optimizers.split(",")]
    for precision, optimizer in pairs:
        name, kills = f"{precision}-{optimizer}", math.ceil(args.kills / len(pairs))
        settings = [] if args.config else verify_resume.tiny_settings(folder, precision)
        flags = [f"--config={args.config or 'default'}", *(f"--config.{setting}" for setting in settings), *changes]
        flags += [f"--config.precision={precision}", f"--config.optim.name={optimizer}"]
        bucket = args.bucket and f"{args.bucket}/{secrets.token_hex(4)}-{name}"
        cli.read_config(flags)  # a mistake in any arm is reported before the first one trains
        arms.append(verify_resume.Arm(folder / name, flags, kills, random.Random(f"{args.seed} {name}"), bucket))
    rows = verify_resume.verify_arms(folder, arms, args.seed)
    unequal = [row["arm"] for row in rows if not row["equal"]]
    result = {"equal": not unequal, "kills": sum(len(row["struck"]) for row in rows), "arms": rows}
    if unequal:
        if args.json:
            console.show(console.to_json(result))
        raise RunFailure(f"not equal: {', '.join(unequal)}; the runs are in {folder}")
    if not args.folder:
        shutil.rmtree(folder)
    return result


if __name__ == "__main__":
    cli.main(command)
