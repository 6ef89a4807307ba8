"""Compare training with PyTorch: the same shapes and text, AdamW in fp32, on this machine's CPU.

Compared: tokens per second, memory and the first step of our step and of a GPT with ALiBi as one would write it in
PyTorch. Fair: both have the same layers, batch, microbatch and optimizer, and PyTorch's attention mask is [1, H, T, T],
which its fast kernel needs. Arms run in processes of their own and take turns; each figure is a median.

    pip install torch   # without it only our arms are in the table
    python scripts/bench/train.py

PyTorch's model (torch_gpt.py) has ALiBi as the mask of scaled_dot_product_attention; it runs eagerly and by
torch.compile. The naive low-rank arm keeps the D x D projections and adds factors behind them, as is often seen.
The product rate is that of fp32 products [2048, 2048] in PyTorch or JAX, whichever is higher.
"""

import os
import resource
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure
from lowrank_jax.machine import startup
from lowrank_jax.model import costs
from scripts.bench import harness

SHAPES = (("small", 256), ("small", 1024), ("base", 256))  # preset, length
TOKENS, MICROBATCH_TOKENS = 2048, 512  # per step, and in memory at once: at least a row
VOCAB = 8192
LAYOUTS = ("lowrank", "dense")  # of our model
ARMS = {
    "ours": ("jax", "lowrank"),
    "ours, dense twin": ("jax", "dense"),
    "PyTorch dense": ("torch", "eager"),
    "PyTorch dense, compiled": ("torch", "compiled"),
    "PyTorch low rank, naive": ("torch", "naive"),
}
GEMM, GEMM_ROUNDS = 2048, 12


def config_of(preset: str, length: int, dense: bool):
    path = os.path.join(harness.ROOT, "configs", "preset.py")
    flags = [f"--config={path}:{preset}", f"--config.model.vocab={VOCAB}", "--config.precision=fp32"]
    flags += [f"--config.pretrain.block={length}", "--config.pretrain.auto_grow=False", "--config.sft.steps=0"]
    flags += [f"--config.pretrain.tokens_per_step={TOKENS}", "--config.optim.name=adamw", "--config.model.scan=False"]
    flags += [f"--config.pretrain.microbatch_tokens={MICROBATCH_TOKENS}", "--config.pretrain.steps=100"]
    flags += ["--config.model.rank=0"] if dense else []
    return cli.read_config(flags)


def stage_of(config):
    from lowrank_jax.training.plan import stages_of

    (stage,) = stages_of(config)
    return stage


def write_tokens(folder: str) -> str:
    """Write the token ids [N] of the quickstart's prose and return the file's path."""
    import numpy as np

    from lowrank_jax.data import stream, tokenizer

    config = cli.read_config([f"--config={harness.ROOT}/configs/quickstart.py"])
    prose = list(stream.texts([config.pretrain], 3_000_000))
    tok = tokenizer.train(prose, VOCAB)
    path = os.path.join(folder, "tokens.npy")
    np.save(path, np.asarray([i for document in prose for i in tok.encode(document)], np.int32))
    return path


def batches(path: str, length: int):
    """Yield (tokens, targets) [TOKENS / length, length] without end."""
    import numpy as np

    ids, start, rows = np.load(path), 0, TOKENS // length
    while True:
        start = 0 if start + TOKENS + 1 > len(ids) else start
        yield ids[start : start + TOKENS].reshape(rows, -1), ids[start + 1 : start + TOKENS + 1].reshape(rows, -1)
        start += TOKENS


# ---------------------------------------------------------------------------------------------------- one measurement


def our_step(kind: str, preset: str, length: int, path: str):
    """Return a function that trains a step and returns its loss."""
    import numpy as np

    config, source = config_of(preset, length, dense=kind == "dense"), batches(path, length)
    step, _ = harness.compiled_step(config, stage_of(config))
    ones = np.ones((TOKENS // length, length), np.int32)

    def run() -> float:
        tokens, targets = next(source)
        batch = {"tokens": tokens, "targets": targets, "segments": ones, "weights": ones.astype(np.float32)}
        return float(step(batch)["loss"])

    return run


def torch_step(kind: str, preset: str, length: int, path: str):
    """Return the same for PyTorch, which accumulates gradients over microbatches of as many rows as ours."""
    import torch

    from scripts.bench import torch_gpt

    torch.set_num_threads(os.cpu_count() or 1)
    config, source = config_of(preset, length, dense=True), batches(path, length)
    rank = config_of(preset, length, dense=False).model.rank if kind == "naive" else 0
    net = torch_gpt.GPT(config.model, naive_rank=rank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.95, 0.95), weight_decay=0.1, fused=True)
    loss_of, rows = torch.compile(net) if kind == "compiled" else net, stage_of(config).microbatch
    mask = torch_gpt.alibi_mask(config.model.heads, torch.ones(1, length, dtype=torch.int32))

    def run() -> float:
        tokens, targets = (torch.from_numpy(x.astype("int64")) for x in next(source))
        optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, len(tokens) // rows
        for some_tokens, some_targets in zip(tokens.split(rows), targets.split(rows)):
            loss = loss_of(some_tokens, mask, some_targets) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return total

    return run


def product_rate() -> dict:
    """Return the FLOPs per second of fp32 products [2048, 2048]: the higher median of JAX and PyTorch."""
    import jax
    import jax.numpy as jnp

    x, product = jnp.ones((GEMM, GEMM)), jax.jit(lambda x: x @ x)
    seconds = [harness.median_seconds(lambda: product(x).block_until_ready(), GEMM_ROUNDS)]
    try:
        import torch

        y = torch.ones(GEMM, GEMM)
        seconds.append(harness.median_seconds(lambda: y @ y, GEMM_ROUNDS))
    except ImportError:
        pass
    return {"flops": 2 * GEMM**3 / min(seconds)}


def time_arm(framework: str, kind: str, preset: str, length: int, path: str, steps: int) -> dict:
    started = time.perf_counter()
    run = (our_step if framework == "jax" else torch_step)(kind, preset, length, path)
    run()
    first = time.perf_counter() - started
    losses = []
    seconds = harness.median_seconds(lambda: losses.append(run()), steps)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_s": TOKENS / seconds, "first_step_seconds": first, "loss": losses[-1], "peak_mb": peak_mb}


def child(argv: list[str]) -> dict:
    name, *rest = argv
    if name == "text":
        return {"path": write_tokens(rest[0])}
    if name == "rate":
        return product_rate()
    if name == "parts":
        from scripts.bench import parts

        layout, preset, length, flops, steps = rest
        return {"parts": parts.of_step(config_of(preset, int(length), layout == "dense"), float(flops), int(steps))}
    kind, preset, length, path, steps = rest
    return time_arm(name, kind, preset, int(length), path, int(steps))


def measure(*arguments) -> dict:
    """Return a measurement of a process of its own; empty, with a line on stderr, where a package is missing."""
    environment = {"JAX_PLATFORMS": "cpu"} | (startup.environment() if arguments[0] in ("jax", "parts") else {})
    try:
        return harness.in_a_process(__file__, *arguments, **environment)
    except RunFailure as e:
        print(f"left out: {e}", file=sys.stderr, flush=True)
        return {}


# ------------------------------------------------------------------------------------------------- all of them in turns


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--shapes", default=",".join(f"{p}:{n}" for p, n in SHAPES), help="preset:length, ...")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each arm and round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = measure("text", folder)["path"]
        for preset, length in ((p, int(n)) for p, n in (shape.split(":") for shape in args.shapes.split(","))):
            rates, samples = [], {name: [] for name in ARMS}
            for _ in range(args.rounds):
                rates.append(measure("rate"))
                for name, arm in ARMS.items():
                    samples[name].append(measure(*arm, preset, length, path, args.steps))
            rate = harness.medians(rates)["flops"]
            rows = {name: row for name, some in samples.items() if (row := harness.medians(some))}
            print_arms(preset, length, rows, rate)
            parts = {layout: measure("parts", layout, preset, length, rate, args.steps)["parts"] for layout in LAYOUTS}
            print_parts(parts)
            shape = {"preset": preset, "length": length}
            results += [shape | {"arm": name, "gemm_flops": rate} | row for name, row in rows.items()]
            results += [shape | {"layout": layout, "parts": rows} for layout, rows in parts.items()]
    return {"results": results}


def print_arms(preset: str, length: int, rows: dict, rate: float) -> None:
    reference = max((row["tokens_per_s"] for name, row in rows.items() if name.startswith("PyTorch dense")), default=0)
    print(f"\n{preset}, {length} tokens, fp32; products at {rate / 1e9:.0f} GFLOP/s", flush=True)
    print(f"{'':26s}{'tokens/s':>10s}{'/ PyTorch':>10s}{'of rate':>9s}{'peak MB':>9s}{'first step, s':>15s}")
    for name, row in rows.items():
        flops = costs.train_flops_per_token(config_of(preset, length, dense=name != "ours").model, length)
        # The naive layers cost more FLOPs than either of ours.
        share = f"{row['tokens_per_s'] * flops / rate:9.0%}" if "naive" not in name else f"{'-':>9s}"
        ratio = f"{row['tokens_per_s'] / reference:10.2f}" if reference else f"{'-':>10s}"
        memory = f"{row['peak_mb']:9.0f}{row['first_step_seconds']:15.1f}"
        print(f"{name:26s}{row['tokens_per_s']:10.0f}{ratio}{share}{memory}", flush=True)


def print_parts(parts: dict[str, list[dict]]) -> None:
    print(f"{'':18s}" + "".join(f"{f'{layout}, ms':>14s}{'roofline':>10s}{'GFLOP/s':>9s}" for layout in parts))
    for rows in zip(*parts.values()):
        cells = (f"{r['ms']:14.0f}{r['roofline_ms']:10.0f}{r['gflops']:9.0f}" for r in rows)
        print(f"{rows[0]['part']:18s}" + "".join(cells), flush=True)


if __name__ == "__main__":
    harness.main(command, child)
