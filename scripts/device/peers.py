"""Compare the training step and decoding with PyTorch and transformers, on the same accelerator and in the same run.

    python scripts/device/peers.py               # one JSON object a line; --small: toy sizes on a CPU

Training: PyTorch's dense GPT with ALiBi (bench/torch_gpt.py) on the same shapes, with bf16 activations and fp32
weights, fused AdamW, torch.compile on each block and on the head with its loss (as torchtitan compiles), attention by
FlexAttention with a block mask or by scaled_dot_product_attention with a mask. The masks are built before the clock
starts. Its microbatch is ours, or half of that as often as memory runs out; ours is the step of speed.py. Every arm is
a process of its own, since both frameworks take the whole memory.

Decoding: transformers' `generate` of the exported model in bf16, with a static cache, with which it compiles its
forward pass by itself on a GPU. Ours has weights of the same shapes. Tokens per second are those after the first.
"""

import atexit
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from scripts.device import part, speed

STEPS, NEW, LEAST = 3, 65, 1.2
ATTENTION = ("flex", "sdpa")


def arms(small: bool) -> list[dict]:
    """Return the arms, most important first; a single one that says so, where there is no PyTorch or no GPU for it."""
    if reason := missing(small):
        return [{"check": "PyTorch", "reason": reason}]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ours = lambda preset, length: {"run": "ours", "preset": preset, "length": length, "model": "low rank"}
    torch = lambda preset, length, attend: {"run": "torch", "preset": preset, "length": length, "attend": attend}
    plan = [torch("1b", 64, "sdpa"), ours("1b", 64)] if small else []
    for preset, length in () if small else (("1b", 4096), ("base", 1024)):
        plan += [torch(preset, length, "flex"), ours(preset, length), torch(preset, length, "sdpa")]
    shapes = [("small", 2, 16)] if small else [("base", 1, 1500), ("base", 64, 1500)]
    plan.insert(3, {"run": "export", "preset": shapes[0][0]})
    decoding = [{"preset": preset, "rows": rows, "length": length} for preset, rows, length in shapes]
    plan[4:4] = [{"run": run} | arm for arm in decoding for run in ("generate", "decode")]
    shared = {"small": small, "folder": folder, "precision": "bf16", "trace": False}
    return [{"check": name_of(arm), "process": name_of(arm)} | shared | arm for arm in plan]


def missing(small: bool) -> str:
    """Return why there is nothing to compare with, or an empty text."""
    if not importlib.util.find_spec("torch"):
        return "PyTorch is not installed"
    import torch

    return "" if small or torch.cuda.is_available() else "PyTorch sees no GPU; --small compares toy sizes on a CPU"


def name_of(arm: dict) -> str:
    if arm["run"] == "export":
        return f"export of {arm['preset']} for transformers"
    if arm["run"] in ("torch", "ours"):
        who = "ours" if arm["run"] == "ours" else f"PyTorch dense with {arm['attend']}"
        return f"step of {arm['preset']}, {arm['length']} tokens: {who}"
    who = "ours" if arm["run"] == "decode" else "transformers"
    return f"decoding of {arm['preset']}, {arm['rows']} x {arm['length']} tokens: {who}"


def measure(arm: dict) -> dict:
    run = {"ours": speed.measure, "torch": train, "export": export, "generate": generate, "decode": decode}
    return run[arm["run"]](arm) if "run" in arm else {"reason": arm["reason"]}


# ---------------------------------------------------------------------------------------------------------- training


def train(arm: dict) -> dict:
    """Return the figures of PyTorch's step, with the largest microbatch that fits."""
    import torch

    from lowrank_jax.training.plan import stages_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arm["attend"] == "flex":
        return {"reason": "FlexAttention has no gradient on a CPU"}
    config = speed.config_of(arm | {"model": "dense"})
    (stage,) = stages_of(config)
    rows, started = stage.microbatch, time.perf_counter()
    while True:
        try:
            run, facts = stepper(config.model, stage, rows, arm["attend"], device)
            run()
            break
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows, run = rows // 2, None
            torch.cuda.empty_cache()
    facts |= {"first_step_seconds": time.perf_counter() - started, "microbatch": rows, "batch": stage.batch}
    facts |= {"torch": torch.__version__, "compiled": device == "cuda"}
    seconds = statistics.median(run() for _ in range(STEPS))
    tokens_per_s = stage.tokens_per_step / seconds
    facts |= {"seconds": seconds, "tokens_per_s": tokens_per_s}
    if device == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    return facts


def stepper(c, stage, rows: int, attend: str, device: str):
    """Return (a function that trains a step and returns its seconds, facts); compiled on a GPU."""
    import torch

    from scripts.bench import torch_gpt

    torch.manual_seed(0)
    with torch.device(device):
        net = torch_gpt.GPT(c, torch_gpt.flex(c.heads, device) if attend == "flex" else torch_gpt.sdpa, torch.bfloat16)
        tokens = torch.randint(c.vocab, (stage.batch, stage.seq_len))
        segments = torch.ones(rows, stage.seq_len, dtype=torch.int32)
        q = torch.zeros(rows, c.heads, stage.seq_len, c.head_dim, dtype=torch.bfloat16)
    is_flex, head = attend == "flex", torch_gpt.cross_entropy
    mask = torch_gpt.document_mask(segments) if is_flex else torch_gpt.alibi_mask(c.heads, segments, torch.bfloat16)
    facts = {}
    if not is_flex:
        chosen = torch._fused_sdp_choice(q.requires_grad_(), q, q, mask)
        facts["kernel"] = torch.nn.attention.SDPBackend(chosen).name
    if device == "cuda":
        head = torch.compile(head)
        for block in net.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.95, 0.95), weight_decay=0.1, fused=True)

    def run() -> float:
        started, total = time.perf_counter(), torch.zeros((), device=device)
        for micro in tokens.split(rows):
            loss = head(net.table.weight, net.features(micro, mask), micro) / (stage.batch / rows)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        facts["loss"] = float(total)  # waits for the device
        return time.perf_counter() - started

    return run, facts


# ---------------------------------------------------------------------------------------------------------- decoding


def export(arm: dict) -> dict:
    """Write a model with random weights for transformers."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from lowrank_jax.export import hf
    from scripts.bench import decode as bench

    hf.write(bench.random_model(arm["preset"]), arm["folder"])
    return {}


def generate(arm: dict) -> dict:
    """Return the figures of transformers' generate."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, StaticCache, __version__

    device, rows, length = "cuda" if torch.cuda.is_available() else "cpu", arm["rows"], arm["length"]
    net = AutoModelForCausalLM.from_pretrained(arm["folder"], trust_remote_code=True, dtype=torch.bfloat16)
    net = net.eval().to(device)
    past = StaticCache(config=net.config, max_cache_len=length + NEW)

    def seconds(new: int) -> float:
        past.reset()
        ids = torch.randint(5, net.config.vocab_size, (rows, length), device=device)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "past_key_values": past}
        started = time.perf_counter()
        out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options)
        out.cpu()
        return time.perf_counter() - started

    started = time.perf_counter()
    for _ in range(3):  # compiles with an empty cache, with one that has its memory, and for any position
        seconds(4)
    facts = {"compile_seconds": time.perf_counter() - started, "transformers": __version__}
    first, whole = (statistics.median(seconds(new) for _ in range(STEPS)) for new in (1, NEW))
    return facts | {"all_first_token_seconds": first, "tokens_per_s": rows * (NEW - 1) / (whole - first)}


def decode(arm: dict) -> dict:
    """Return the figures of our engine for weights of the same shapes."""
    from scripts.bench import decode as bench
    from scripts.device import decoding

    config = bench.config_of(arm["preset"])
    return decoding.figures(decoding.random_engine(config, "bf16", arm["rows"]), arm["rows"], arm["length"], NEW)


def judge(rows: list[dict]) -> list[dict]:
    """Return our speed over the fastest peer's, for each measurement whose peers are all done."""
    done, results = {row["check"]: row.get("tokens_per_s") for row in rows}, []
    for name, ours in done.items():
        what, _, who = name.partition(": ")
        peers = ["transformers"] if "decoding" in what else [f"PyTorch dense with {attend}" for attend in ATTENTION]
        peers = [done.get(f"{what}: {peer}", "open") for peer in peers]
        if who == "ours" and ours and ("open" not in peers or "time left" in done):
            if speeds := [tokens for tokens in peers if tokens and tokens != "open"]:
                least = LEAST if what == speed.MAIN else None
                results.append(part.bound(f"{what}: ours / fastest peer", ours / max(speeds), least))
    return results


if __name__ == "__main__":
    part.main(__file__, arms, measure, judge)
