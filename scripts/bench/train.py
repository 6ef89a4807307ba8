"""Training beside PyTorch: the same shapes and text, AdamW in fp32, on this machine's CPU.

    pip install torch   # what is missing is left out of the table
    python scripts/bench/train.py

Each arm is a process of its own; they take turns for some rounds, and of each the best step counts. PyTorch's model is
what one would write there: a dense GPT with RMSNorm, SwiGLU, a tied head, and ALiBi as the bias of
scaled_dot_product_attention, as it is and by torch.compile; and low rank as it is mostly seen, with the full D x D
projections kept and an up-projection of the same size behind them. The peak is that of fp32 products [2048, 2048]
in PyTorch and JAX, the larger one.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.machine import startup
from lowrank_jax.model import costs

SHAPES = (("small", 256), ("small", 1024), ("base", 256))  # preset, length
TOKENS, AT_ONCE = 2048, 512  # of a step; of which ours has so many in memory at a time, PyTorch all
VOCAB = 8192
LAYOUTS = ("lowrank", "dense")  # of ours
ARMS = {
    "ours": ("jax", "lowrank"),
    "ours, dense twin": ("jax", "dense"),
    "PyTorch dense": ("torch", "eager"),
    "PyTorch dense, compiled": ("torch", "compiled"),
    "PyTorch low rank, naive": ("torch", "naive"),
}


def config_of(preset: str, length: int, dense: bool):
    here = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "preset.py")
    flags = [f"--config={here}:{preset}", f"--config.model.vocab={VOCAB}", "--config.precision=fp32"]
    flags += [f"--config.pretrain.block={length}", "--config.pretrain.auto_grow=False", "--config.sft.steps=0"]
    flags += [f"--config.pretrain.tokens_per_step={TOKENS}", f"--config.pretrain.microbatch_tokens={AT_ONCE}"]
    flags += ["--config.optim.name=adamw", "--config.model.scan=False"]
    flags += ["--config.model.rank=0"] if dense else []
    return cli.read_config(flags)


def text(folder: str) -> str:
    """The path of token ids [N] of the quickstart's prose."""
    import numpy as np

    from lowrank_jax.data import stream, tokenizer

    prose = list(stream.texts([cli.read_config(["--config=configs/quickstart.py"]).pretrain], 3_000_000))
    tok = tokenizer.train(prose, VOCAB)
    path = os.path.join(folder, "tokens.npy")
    np.save(path, np.asarray([i for document in prose for i in tok.encode(document)], np.int32))
    return path


def batches(path: str, length: int):
    """Endless {tokens, targets} [TOKENS / length, length]."""
    import numpy as np

    tokens, at, rows = np.load(path), 0, TOKENS // length
    while True:
        at = 0 if at + TOKENS + 1 > len(tokens) else at
        yield tokens[at : at + TOKENS].reshape(rows, -1), tokens[at + 1 : at + TOKENS + 1].reshape(rows, -1)
        at += TOKENS


# ------------------------------------------------------------------------------------------ one arm, in its own process


def ours(kind: str, preset: str, length: int, path: str):
    """A function that takes a step and returns its loss."""
    import jax
    import numpy as np

    from lowrank_jax.training import step
    from lowrank_jax.training.plan import stages_of

    config = config_of(preset, length, dense=kind == "dense")
    (stage,) = stages_of(config)
    state, given = step.first_state(config, step.init_params(config)), batches(path, length)
    compiled = step.lower(config, stage).compile()
    ones = np.ones((stage.batch, length), np.int32)

    def run() -> float:
        nonlocal state
        tokens, targets = next(given)
        batch = {"tokens": tokens, "targets": targets, "segments": ones, "weights": ones.astype(np.float32)}
        state, metrics = compiled(state, jax.device_put(batch))
        return float(metrics["loss"])

    return run


def theirs(kind: str, preset: str, length: int, path: str):
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    c = config_of(preset, length, dense=True).model
    net = torch_model(c, length, naive=kind == "naive", rank=config_of(preset, length, dense=False).model.rank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.95, 0.95), weight_decay=0.1, fused=True)
    forward, given = torch.compile(net) if kind == "compiled" else net, batches(path, length)

    def run() -> float:
        tokens, targets = (torch.from_numpy(x.astype("int64")) for x in next(given))
        loss = torch.nn.functional.cross_entropy(forward(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return run


def torch_model(c, length: int, naive: bool, rank: int):
    import torch
    from torch import nn
    from torch.nn import functional as F

    from lowrank_jax.model.attention import alibi_slopes

    def projection():
        dense = nn.Linear(c.d, c.d, bias=False)
        return (
            nn.Sequential(dense, nn.Linear(c.d, rank, bias=False), nn.Linear(rank, c.d, bias=False)) if naive else dense
        )

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.RMSNorm(c.d, eps=1e-6) for _ in range(2)])
            self.qkvo = nn.ModuleList([projection() for _ in range(4)])
            self.gate, self.up = (nn.Linear(c.d, c.hidden, bias=False) for _ in range(2))
            self.out = nn.Linear(c.hidden, c.d, bias=False)

        def forward(self, x, bias):
            h, (B, T, _) = self.norms[0](x), x.shape
            q, k, v = (w(h).view(B, T, c.heads, -1).transpose(1, 2) for w in self.qkvo[:3])
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape)
            x = x + self.qkvo[3](o)
            h = self.norms[1](x)
            return x + self.out(F.silu(self.gate(h)) * self.up(h))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(c.vocab, c.d)
            nn.init.normal_(self.table.weight, std=0.02)
            self.blocks, self.norm = nn.ModuleList([Block() for _ in range(c.layers)]), nn.RMSNorm(c.d, eps=1e-6)
            at = torch.arange(length)
            distance = (at[:, None] - at).float()
            bias = -torch.from_numpy(alibi_slopes(c.heads))[:, None, None] * distance
            self.register_buffer("bias", bias.masked_fill(distance < 0, float("-inf")), persistent=False)

        def forward(self, tokens):
            x = self.table(tokens)
            for block in self.blocks:
                x = block(x, self.bias)
            return self.norm(x) @ self.table.weight.T

    return Net()


def peak() -> float:
    """FLOPs a second of the best product of two [2048, 2048] in fp32."""
    import jax
    import jax.numpy as jnp

    n, best = 2048, float("inf")
    runs = []
    x = jnp.ones((n, n))
    product = jax.jit(lambda x: x @ x)
    runs.append(lambda: product(x).block_until_ready())
    try:
        import torch

        y = torch.ones(n, n)
        runs.append(lambda: y @ y)
    except ImportError:
        pass
    for run in runs:
        for _ in range(12):
            started = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def child(argv: list[str]) -> None:
    what = argv[0]
    if what == "text":
        found = {"path": text(argv[1])}
    elif what == "peak":
        found = {"flops": peak()}
    elif what == "parts":
        from scripts.bench import parts as bench_parts

        _, dense, preset, length, flops, steps = argv
        config = config_of(preset, int(length), dense == "dense")
        found = {"parts": bench_parts.of_step(config, float(flops), int(steps))}
    else:
        kind, preset, length, path, steps = argv[1], argv[2], int(argv[3]), argv[4], int(argv[5])
        started = time.perf_counter()
        run = (ours if what == "jax" else theirs)(kind, preset, length, path)
        losses = [run()]
        found, times = {"first_step_seconds": time.perf_counter() - started}, []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(run())
            times.append(time.perf_counter() - started)
        found |= {"tokens_per_s": TOKENS / min(times), "loss": losses[-1]}
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(found))


def measure(*args) -> dict:
    ours = args[0] in ("jax", "parts")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (startup.environment() if ours else {})
    command = [sys.executable, __file__, "--child", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"left out: {' '.join(map(str, args[:2]))} ({reason[:150]})", file=sys.stderr, flush=True)
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------------------------------------------- all, side by side


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--shapes", default=",".join(f"{p}:{n}" for p, n in SHAPES), help="preset:length, ...")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each arm and round")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = measure("text", folder)["path"]
        for preset, length in ((p, int(n)) for p, n in (shape.split(":") for shape in args.shapes.split(","))):
            rows: dict[str, dict] = {}
            best = 0.0
            for _ in range(args.rounds):
                best = max(best, measure("peak")["flops"])
                for name, arm in ARMS.items():
                    for key, value in measure(*arm, preset, length, path, args.steps).items():
                        better = max if key == "tokens_per_s" else min
                        row = rows.setdefault(name, {})
                        row[key] = better(value, row.get(key, value))
            _print(preset, length, rows, best)
            parts = {which: measure("parts", which, preset, length, best, args.steps)["parts"] for which in LAYOUTS}
            _print_parts(parts)
            results += [{"preset": preset, "length": length, "arm": n, "gemm_flops": best} | r for n, r in rows.items()]
            results += [{"preset": preset, "length": length, "layout": n, "parts": r} for n, r in parts.items()]
    return {"results": results}


def _print(preset: str, length: int, rows: dict, best: float) -> None:
    reference = max((row["tokens_per_s"] for name, row in rows.items() if name.startswith("PyTorch dense")), default=0)
    print(f"\n{preset}, {length} tokens; products at most {best / 1e9:.0f} GFLOP/s", flush=True)
    print(f"{'':26s}{'tokens/s':>10s}{'/ PyTorch':>10s}{'of peak':>9s}{'peak MB':>9s}{'first step, s':>15s}")
    for name, row in rows.items():
        # PyTorch's naive layers cost more; its share is not told.
        known = costs.train_flops_per_token(config_of(preset, length, dense=name != "ours").model, length)
        share = f"{row['tokens_per_s'] * known / best:9.0%}" if "naive" not in name else f"{'-':>9s}"
        ratio = f"{row['tokens_per_s'] / reference:10.2f}" if reference else f"{'-':>10s}"
        print(
            f"{name:26s}{row['tokens_per_s']:10.0f}{ratio}{share}{row['peak_mb']:9.0f}{row['first_step_seconds']:15.1f}",
            flush=True,
        )


def _print_parts(parts: dict[str, list[dict]]) -> None:
    print(f"{'':18s}" + "".join(f"{f'{which}, ms':>14s}{'at least':>10s}{'GFLOP/s':>9s}" for which in parts))
    for rows in zip(*parts.values()):
        cells = (f"{r['ms']:14.0f}{r['roofline_ms']:10.0f}{r['gflops']:9.0f}" for r in rows)
        print(f"{rows[0]['part']:18s}" + "".join(cells), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        cli.main(command)
