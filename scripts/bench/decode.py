"""Decoding beside Hugging Face and llama.cpp: the same random weights, greedy, on this machine's CPU.

    pip install torch transformers xllamacpp   # what is missing is left out of the table
    python scripts/bench/decode.py

Each runtime is a process of its own and they take turns, so that a noisy machine slows them alike; of each figure the
best of the rounds counts. Tokens a second of one row are those after the first; of several, all of them over the whole
time, prompts included. The first token is that of one prompt of 1,500 tokens.
"""

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.model import costs

PRESETS = {"small": 8192, "base": 16_384}  # and the vocabulary: 29 and 98 million parameters as dense models
LONG, ROWS, CONTEXT = 1500, (1, 8), 2048
OURS = {"ours fp32": "fp32", "ours bf16": "bf16", "ours int8": "int8"}
LLAMA = {"llama.cpp f16": "dense-f16", "llama.cpp f16 latent": "latent-f16"}
THEIRS = {"transformers fp32": "hf"}


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    return [[1, *(300 + (7 * i + 31 * row) % (vocab - 300) for i in range(length - 1))] for row in range(rows)]


def counts(new: int) -> dict[int, int]:
    """How many tokens are asked for after prompts of each length."""
    return {16: new, LONG: max(2, new // 4)}


def config_of(preset: str, vocab: int):
    here = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "preset.py")
    # Without the latents' norm, so that llama.cpp can have the same model; one rank for all, as its latent form needs.
    flags = [f"--config={here}:{preset}", f"--config.model.vocab={vocab}", "--config.model.latent_norm=False"]
    flags += ["--config.model.rank_split=1,1,1,1", "--config.precision=fp32"]
    return cli.read_config(flags)


def build(preset: str, vocab: int, folder: str) -> None:
    """A model with random weights, for each runtime in its form."""
    import jax

    from lowrank_jax.export import gguf, hf

    trained = make(preset, vocab)
    with open(os.path.join(folder, "params.pickle"), "wb") as f:
        pickle.dump(jax.device_get(trained.params), f)
    hf.write(trained, os.path.join(folder, "hf"))
    for form in ("dense", "latent"):
        gguf.write(trained, os.path.join(folder, f"{form}-f16"), attn=form, quant="f16")


def make(preset: str, vocab: int):
    """A run's model with random weights, the factors that start at zero included."""
    import jax
    import numpy as np

    from lowrank_jax.data import stream, tokenizer
    from lowrank_jax.machine import sharding
    from lowrank_jax.model import network
    from lowrank_jax.training.trained import Trained

    config, rng = config_of(preset, vocab), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: network.init(config.model, jax.random.key(0)))
    draw = lambda w: rng.standard_normal(w.shape, np.float32) * w.shape[-2] ** -0.5 if w.ndim > 1 else 1.0
    params = jax.tree.map_with_path(
        lambda path, w: np.ones(w.shape, np.float32) if path[-1].key == "gain" else draw(w), shapes
    )
    params["embed"]["table"] *= (vocab / config.model.d) ** 0.5 / config.model.d**0.5
    params = jax.device_put(params, sharding.whole(sharding.one_device()))
    texts = stream.texts([cli.read_config(["--config=configs/quickstart.py"]).pretrain], 5_000_000)
    return Trained(config, tokenizer.train(texts, vocab), params, {"step": 0})


# ------------------------------------------------------------------------------------- one runtime, in its own process


def ours(preset: str, vocab: int, folder: str, kind: str, new: int) -> dict:
    import jax

    from lowrank_jax.inference import engine, sampling
    from lowrank_jax.machine import sharding

    config = config_of(preset, vocab)
    with open(os.path.join(folder, "params.pickle"), "rb") as f:
        params = jax.device_put(pickle.load(f), sharding.whole(sharding.one_device()))
    weights = engine.prepare(config, params, kind)
    del params
    greedy, found = sampling.PRESETS["det"], {}

    def run(rows: int, length: int, new: int) -> tuple[float, float]:
        """Seconds until the first token, and tokens a second."""
        e = engine.Engine(config.model, weights, (), rows, CONTEXT)  # which has read no prompt yet
        started, first = time.perf_counter(), None
        for prompt in prompts(rows, length, vocab):
            e.add(engine.Request(prompt, new, greedy))
        while e.free < rows:
            if e.step():
                first = first or time.perf_counter()
        whole = time.perf_counter() - started
        first -= started
        return first, (new - 1) / (whole - first) if rows == 1 else rows * new / whole

    for rows in ROWS:
        run(rows, LONG, 2)  # compiles
        for length, count in counts(new).items():
            best = [run(rows, length, count) for _ in range(2)]
            found[f"{rows} rows, {length}"] = max(speed for _, speed in best)
            found[f"first {rows} rows, {length}"] = min(first for first, _ in best)
    for size in (2048, 8192):
        e = engine.Engine(config.model, weights, (), 1, size)
        found[f"cache {size}"] = sum(x.nbytes for x in jax.tree.leaves(e._cache))
    return found


def transformers(folder: str, vocab: int, new: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    net, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval(), {}

    def seconds(rows: int, length: int, count: int) -> float:
        started = time.perf_counter()
        ids = torch.tensor(prompts(rows, length, vocab))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **options)
        return time.perf_counter() - started

    for rows in ROWS:
        seconds(rows, 16, 2)
        for length, count in counts(new).items():
            first = found[f"first {rows} rows, {length}"] = seconds(rows, length, 1)
            whole = seconds(rows, length, count)
            found[f"{rows} rows, {length}"] = (count - 1) / (whole - first) if rows == 1 else rows * count / whole
    c = net.config
    for size in (2048, 8192):
        found[f"cache {size}"] = size * c.num_hidden_layers * (c.rank_k + c.rank_v) * 4
    return found


def llama(path: str, vocab: int, new: int, rows: int) -> dict:
    import xllamacpp

    params, found = xllamacpp.CommonParams(), {}
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = path, CONTEXT * rows, rows, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], count: int, answers: list) -> None:
        request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        answers.append((answer if isinstance(answer, dict) else json.loads(answer))["timings"])

    for length, count in counts(new).items():
        best = []
        for _ in range(2):
            answers = []
            threads = [threading.Thread(target=ask, args=(p, count, answers)) for p in prompts(rows, length, vocab)]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            whole = time.perf_counter() - started
            reading = max(t["prompt_ms"] for t in answers) / 1e3
            best.append((reading, answers[0]["predicted_per_second"] if rows == 1 else rows * count / whole))
        found[f"{rows} rows, {length}"] = max(speed for _, speed in best)
        found[f"first {rows} rows, {length}"] = min(reading for reading, _ in best)
    return found


def child(argv: list[str]) -> None:
    what, preset, vocab, folder, new = argv[0], argv[1], int(argv[2]), argv[3], int(argv[4])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "build":
        found = build(preset, vocab, folder)
    elif what in OURS.values():
        found = ours(preset, vocab, folder, what, new)
    elif what == "hf":
        found = transformers(os.path.join(folder, "hf"), vocab, new)
    else:
        found = llama(os.path.join(folder, what, "model.gguf"), vocab, new, int(argv[5]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("\n" + json.dumps((found or {}) | {"peak_mb": peak / 1024, "start_mb": before / 1024}))


def measure(*args) -> dict:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, args)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"left out: {args[0]} ({reason[:150]})", file=sys.stderr, flush=True)
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


# --------------------------------------------------------------------------------------------------- all, side by side


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--presets", default=",".join(PRESETS), help="of configs/preset.py")
    parser.add_argument("--new", type=int, default=129, help="tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(argv)
    results = []
    for preset in args.presets.split(","):
        vocab, config = PRESETS[preset], config_of(preset, PRESETS[preset])
        with tempfile.TemporaryDirectory() as folder:
            measure("build", preset, vocab, folder, args.new)
            rows = {}
            for _ in range(args.rounds):
                for name, what in {**OURS, **THEIRS, **LLAMA}.items():
                    parts = [
                        measure(what, preset, vocab, folder, args.new, n) for n in (ROWS if name in LLAMA else (0,))
                    ]
                    for key, value in (pair for part in parts for pair in part.items()):
                        better = min if key.startswith(("first", "cache", "peak")) else max
                        rows.setdefault(name, {})[key] = better(value, rows.get(name, {}).get(key, value))
        results += [{"preset": preset, "runtime": name} | row for name, row in rows.items()]
        _print(preset, config, rows)
    return {"results": results}


def _print(preset: str, config, rows: dict) -> None:
    own, dense = costs.parameters(config.model)["total"] / 1e6, costs.dense_parameters(config.model)["total"] / 1e6
    kv = costs.kv_bytes_per_token(config.model, 4)
    print(
        f"\n{preset}: {own:.1f} million parameters, merged {dense:.1f}; cache bytes a token in fp32: {kv}", flush=True
    )
    columns = {f"{n} rows, {length}": f"{n} x {length}" for length in (16, LONG) for n in ROWS}
    print(
        f"{'tokens a second':22s}"
        + "".join(f"{title:>12s}" for title in columns.values())
        + f"{'first, s':>12s}{'peak MB':>10s}"
    )
    for name, row in rows.items():
        cells = "".join(f"{row[key]:12.0f}" if key in row else f"{'-':>12s}" for key in columns)
        first = row.get(f"first 1 rows, {LONG}")
        print(f"{name:22s}{cells}{first if first else float('nan'):12.2f}{row.get('peak_mb', 0):10.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        cli.main(command)
