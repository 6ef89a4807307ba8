"""Compare decoding with llama.cpp and transformers: the same random weights, greedy, on this machine's CPU.

Compared: tokens per second, time to the first token and memory, in a table for each width of the weights. Fair: every
table has weights of one width on all sides (fp32 and f32, bf16 and f16, int8 and q8_0), two threads each, the same
prompts, and each runtime in the best form it has; runtimes take turns in processes of their own; figures are medians.

    pip install torch transformers xllamacpp   # a runtime that is missing is left out
    python scripts/bench/decode.py

llama.cpp has attention merged (`dense`) or as one key and value head of latents (`latent`). Its cache is f32 beside f32
weights, and elsewhere its default, f16. transformers runs the exported model with its dynamic cache, and with its
static cache and a compiled forward pass. Tokens per second of one row are those after the first; those of several rows
are all of them over the whole time, prompts included.
"""

import json
import os
import pickle
import resource
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

from lowrank_jax import cli
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.model import costs
from scripts.bench import harness

PRESETS = {"small": 8192, "base": 16_384}  # and the vocabulary: 29 and 98 million parameters as dense models
LONG, ROWS, CONTEXT, THREADS = 1500, (1, 8), 2048, 2
RUNTIMES = {  # width of the weights: {name: (program, form)}
    "32": {
        "ours fp32": ("ours", "fp32"),
        "llama.cpp f32": ("llama", "dense-f32"),
        "llama.cpp f32 latent": ("llama", "latent-f32"),
        "transformers f32": ("transformers", "dynamic"),
        "transformers f32 static": ("transformers", "static"),
    },
    "16": {
        "ours bf16": ("ours", "bf16"),
        "llama.cpp f16": ("llama", "dense-f16"),
        "llama.cpp f16 latent": ("llama", "latent-f16"),
    },
    "8": {
        "ours int8": ("ours", "int8"),
        "llama.cpp q8_0": ("llama", "dense-q8_0"),
        "llama.cpp q8_0 latent": ("llama", "latent-q8_0"),
    },
}


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    return [[1, *(300 + (7 * i + 31 * row) % (vocab - 300) for i in range(length - 1))] for row in range(rows)]


def new_tokens(new: int) -> dict[int, int]:
    """Return the number of new tokens by the length of the prompt."""
    return {16: new, LONG: max(2, new // 4)}


def config_of(preset: str):
    path = os.path.join(harness.ROOT, "configs", "preset.py")
    # llama.cpp has no norm on latents, and its latent form needs one rank for all.
    flags = [f"--config={path}:{preset}", f"--config.model.vocab={PRESETS[preset]}", "--config.precision=fp32"]
    return cli.read_config([*flags, "--config.model.latent_norm=False", "--config.model.rank_split=1,1,1,1"])


def build(preset: str, folder: str, widths: list[str]) -> dict:
    """Write a model with random weights in the form of every runtime."""
    import jax

    from lowrank_jax.export import gguf, hf

    model = random_model(preset)
    with open(os.path.join(folder, "params.pickle"), "wb") as f:
        pickle.dump(jax.device_get(model.params), f)
    for width in widths:
        for program, form in RUNTIMES[width].values():
            if program == "llama":
                attn, quant = form.split("-")
                gguf.write(model, os.path.join(folder, form), attn=attn, quant=quant)
    if "32" in widths:
        hf.write(model, os.path.join(folder, "hf"))
    return {}


def random_model(preset: str):
    """Return a model with random weights, the factors that start at zero included."""
    import jax
    import numpy as np

    from lowrank_jax.data import stream, tokenizer
    from lowrank_jax.machine import sharding
    from lowrank_jax.model import network
    from lowrank_jax.training.plan import Progress
    from lowrank_jax.training.trained import Trained

    config, rng, vocab = config_of(preset), np.random.default_rng(0), PRESETS[preset]
    shapes = jax.eval_shape(lambda: network.init(config.model, jax.random.key(0)))
    draw = lambda w: rng.standard_normal(w.shape, np.float32) * w.shape[-2] ** -0.5
    params = jax.tree.map_with_path(
        lambda path, w: np.ones(w.shape, np.float32) if path[-1].key == "gain" else draw(w), shapes
    )
    params["embed"]["table"] *= (vocab / config.model.d) ** 0.5 / config.model.d**0.5
    params = jax.device_put(params, sharding.whole(sharding.one_device()))
    quickstart = cli.read_config([f"--config={harness.ROOT}/configs/quickstart.py"])
    texts = stream.texts([quickstart.pretrain], 5_000_000)
    return Trained(config, tokenizer.train(texts, vocab), params, Progress())


# -------------------------------------------------------------------------------- a runtime, in a process of its own


class Measured(dict):
    """Figures by name: `N rows, LENGTH` in tokens per second, `first N rows, LENGTH` in seconds."""

    def add(self, rows: int, length: int, count: int, first: float, whole: float) -> None:
        self[f"first {rows} rows, {length}"] = first
        self[f"{rows} rows, {length}"] = (count - 1) / (whole - first) if rows == 1 else rows * count / whole


def ours(preset: str, folder: str, weights: str, new: int) -> Measured:
    import jax

    from lowrank_jax.inference import engine, sampling
    from lowrank_jax.machine import sharding

    config, measured = config_of(preset), Measured()
    with open(os.path.join(folder, "params.pickle"), "rb") as f:
        params = jax.device_put(pickle.load(f), sharding.whole(sharding.one_device()))
    prepared = engine.prepare(config, params, weights)
    del params

    def run(rows: int, length: int, count: int) -> tuple[float, float]:
        """Return the seconds until the first token and until the last."""
        e = engine.Engine(config.model, prepared, (), rows, CONTEXT)  # it has read no prompt yet
        started, first = time.perf_counter(), None
        for prompt in prompts(rows, length, PRESETS[preset]):
            e.add(engine.Request(prompt, count, sampling.PRESETS["det"]))
        while e.free < rows:
            if e.step():
                first = first or time.perf_counter()
        return first - started, time.perf_counter() - started

    for rows in ROWS:
        run(rows, LONG, 2)  # compiles
        for length, count in new_tokens(new).items():
            measured.add(rows, length, count, *run(rows, length, count))
    return measured


def transformers(preset: str, folder: str, cache: str, new: int) -> Measured:
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(THREADS)
    path, measured = os.path.join(folder, "hf"), Measured()
    net = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    if cache == "static":
        net.forward = torch.compile(net.forward)

    def seconds(rows: int, length: int, count: int, past) -> float:
        if past:
            past.reset()
        ids = torch.tensor(prompts(rows, length, PRESETS[preset]))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "past_key_values": past}
        options |= {"max_new_tokens": count, "min_new_tokens": count}
        started = time.perf_counter()
        net.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return time.perf_counter() - started

    for rows in ROWS:
        for length, count in new_tokens(new).items():
            past = StaticCache(config=net.config, max_cache_len=length + count) if cache == "static" else None
            for _ in range(3):  # compiles with an empty cache, with one that has its memory, and for any position
                seconds(rows, length, min(4, count), past)
            measured.add(rows, length, count, *(seconds(rows, length, n, past) for n in (1, count)))
    return measured


def llama(preset: str, folder: str, form: str, new: int) -> Measured:
    import xllamacpp

    measured = Measured()
    for rows in ROWS:
        params = xllamacpp.CommonParams()
        params.model.path = os.path.join(folder, form, "model.gguf")
        params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT * rows, rows, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        if form.endswith("f32"):
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)

        def ask(prompt: list[int], count: int, answers: list, server=server) -> None:
            request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
            answer = server.handle_completions(request | {"cache_prompt": False})
            answers.append((answer if isinstance(answer, dict) else json.loads(answer))["timings"])

        def run(length: int, count: int, ask=ask, rows=rows) -> tuple[float, float]:
            answers, texts = [], prompts(rows, length, PRESETS[preset])
            threads = [threading.Thread(target=ask, args=(prompt, count, answers)) for prompt in texts]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            whole, first = time.perf_counter() - started, max(t["prompt_ms"] for t in answers) / 1e3
            # The server's own time of the tokens after the first, without the request's overhead.
            return first, first + (count - 1) / answers[0]["predicted_per_second"] if rows == 1 else whole

        run(16, 2)
        for length, count in new_tokens(new).items():
            measured.add(rows, length, count, *run(length, count))
        del server
    return measured


def child(argv: list[str]) -> dict:
    program, preset, folder, form, new = argv
    if program == "build":
        return build(preset, folder, form.split(","))
    measure = {"ours": ours, "llama": llama, "transformers": transformers}[program]
    measured = measure(preset, folder, form, int(new))
    return measured | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# ------------------------------------------------------------------------------------------------- all of them in turns


def command(argv: list[str]) -> dict:
    parser = cli.Parser(__doc__)
    parser.add_argument("--presets", default=",".join(PRESETS), help="of configs/preset.py")
    parser.add_argument("--widths", default=",".join(RUNTIMES), help="bits of the weights")
    parser.add_argument("--new", type=int, default=129, help="tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    presets, widths = args.presets.split(","), args.widths.split(",")
    if unknown := ({*presets} - {*PRESETS}) | ({*widths} - {*RUNTIMES}):
        raise UsageError(f"{min(unknown)} is none of {', '.join([*PRESETS, *RUNTIMES])}")
    environment = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    results = []
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            harness.in_a_process(__file__, "build", preset, folder, args.widths, 0, **environment)
            samples = {width: {name: [] for name in RUNTIMES[width]} for width in widths}
            for width, name in [(w, name) for _ in range(args.rounds) for w in widths for name in RUNTIMES[w]]:
                program, form = RUNTIMES[width][name]
                try:
                    row = harness.in_a_process(__file__, program, preset, folder, form, args.new, **environment)
                    samples[width][name].append(row)
                except RunFailure as e:
                    print(f"left out: {e}", file=sys.stderr, flush=True)
        for width in widths:
            rows = {name: harness.medians(some) for name, some in samples[width].items() if some}
            print_table(preset, width, rows)
            results += [{"preset": preset, "weight_bits": int(width), "runtime": name} | rows[name] for name in rows]
    return {"results": results}


def print_table(preset: str, width: str, rows: dict) -> None:
    c = config_of(preset).model
    size, merged = costs.parameters(c)["total"] / 1e6, costs.parameters(costs.dense_twin(c))["total"] / 1e6
    print(
        f"\n{preset}, weights of {width} bits: {size:.1f} million parameters, {merged:.1f} merged; medians", flush=True
    )
    columns = {f"{n} rows, {length}": f"{n} x {length}" for length in (16, LONG) for n in ROWS}
    titles = "".join(f"{title:>12s}" for title in columns.values())
    print(f"{'tokens per second':26s}{titles}{'first, s':>12s}{'peak MB':>10s}")
    for name, row in rows.items():
        cells = "".join(f"{row[key]:12.0f}" for key in columns)
        print(f"{name:26s}{cells}{row[f'first 1 rows, {LONG}']:12.2f}{row['peak_mb']:10.0f}", flush=True)


if __name__ == "__main__":
    harness.main(command, child)
