"""Compression of a dense run to low rank: calibration on text, factors per matrix, and what they cost."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lowrank_jax.config import ModelConfig, RunConfig, UsageError, read_sources
from lowrank_jax.data import stream
from lowrank_jax.export import factorize, import_weights
from lowrank_jax.machine import sharding
from lowrank_jax.model import network
from lowrank_jax.training import evaluation, run_folder
from lowrank_jax.training.trained import Trained, open_run

TOKENS = 32_768  # to calibrate on
BATCH_TOKENS = 8192  # that go through a layer at once
FALLBACK = "builtin:quickstart"  # calibrates models that were trained elsewhere
HELD_OUT = 0.1  # of the text in --data, to measure on
MATRICES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "out")}
NAMES = [(group, name) for group, names in MATRICES.items() for name in names]


def compress(trained: Trained, rank: int, split: tuple[float, ...], mlp_rank: int, batches: list[stream.Batch]):
    """Return (config, params) of the low-rank model, calibrated on `batches`; raises UsageError as `low_rank` does."""
    config, c = low_rank(trained.config, rank, split, mlp_rank), trained.config.model
    ranks = dict(zip(MATRICES["attention"], config.model.ranks)) | dict.fromkeys(MATRICES["mlp"], mlp_rank)
    layers = []
    for block, moments in activations(c, trained.params, batches):
        low = block | {group: dict(block[group]) for group in MATRICES}
        for group, name in NAMES:
            if ranks[name]:
                w_IO, metric_OO = block[group][name]["kernel"], _metric(block, name, moments)
                down, up = factorize.factors(w_IO, moments[name], ranks[name], metric_OO)
                low[group][name] = {"down": down, "up": up}
        layers.append(low)
    return config, trained.params | {"blocks": jax.tree.map(lambda *ws: np.stack(ws), *layers)}


def low_rank(config: RunConfig, rank: int, split: tuple[float, ...], mlp_rank: int) -> RunConfig:
    """Return the config of a dense model's compressed form; raises UsageError for impossible ranks."""
    c = config.model
    if c.rank:
        raise UsageError(f"--from has config.model.rank={c.rank}: only a dense model, with rank 0, can be compressed")
    if mlp_rank and c.mlp_rank:
        raise UsageError(f"--from has config.model.mlp_rank={c.mlp_rank} already; omit --mlp_rank")
    values = config.to_dict()
    values["model"] |= {"rank": rank, "rank_split": split, "latent_norm": False, "mlp_rank": mlp_rank or c.mlp_rank}
    low = RunConfig.from_dict(values)
    if (largest := max(low.model.ranks)) > c.d:
        shares = ",".join(f"{share:g}" for share in split)
        raise UsageError(f"--rank={rank} with --rank_split={shares} gives a rank of {largest}, above the width {c.d}")
    if mlp_rank > min(c.d, c.hidden):
        raise UsageError(f"--mlp_rank={mlp_rank} must not exceed {min(c.d, c.hidden)}")
    return low


def activations(c: ModelConfig, params: dict, batches: list[stream.Batch]) -> Iterator[tuple[dict, dict]]:
    """Yield (weights, {name: second moments [I, I] of a matrix's inputs}) of each layer of the dense model.

    The moments also have "keys" and "queries", those of each head [H, K, K].
    """
    xs = [network.embed(c, params, batch["tokens"]) for batch in batches]
    for i in range(c.layers):
        block, sums = jax.tree.map(lambda w, i=i: np.asarray(w[i]), params["blocks"]), {}
        matmul = _recording(c, block, sums)
        xs = [network.block(c, block, x, batch["segments"], matmul) for x, batch in zip(xs, batches)]
        yield block, sums


def _recording(c: ModelConfig, block: dict, sums: dict) -> Callable:
    """Return a product of an input and a matrix of the block that adds second moments to `sums`."""
    matrices = {name: block[group][name]["kernel"] for group, name in NAMES if "kernel" in block[group][name]}

    def add(name: str, x: jax.Array) -> None:
        x_NI = x.reshape(-1, *x.shape[2:])
        moments = np.asarray(jnp.einsum("N...I,N...J->...IJ", x_NI, x_NI, precision="highest"), np.float64)
        sums[name] = sums.get(name, 0) + moments

    def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        name = next((name for name, kernel in matrices.items() if np.array_equal(kernel, w)), None)
        if name:
            add(name, x)
        if name in ("q", "k"):
            add("queries" if name == "q" else "keys", y.reshape(*y.shape[:-1], c.heads, c.head_dim))
        return y

    return matmul


def _metric(block: dict, name: str, moments: dict) -> np.ndarray | None:
    """Return the weights of output errors: the keys of its head for a query, the columns of O for a value."""
    if name in ("q", "k"):
        return scipy.linalg.block_diag(*moments["keys" if name == "q" else "queries"])
    if name == "v":
        o_XD = np.asarray(block["attention"]["o"]["kernel"], np.float64)
        return o_XD @ o_XD.T
    return None


def errors(c: ModelConfig, dense: dict, params: dict, batches: list[stream.Batch]) -> list[dict]:
    """Return {name: relative error of a matrix's output} of each layer, for the dense model's inputs of `batches`."""
    rows = []
    for i, (block, moments) in enumerate(activations(c, dense, batches)):
        row = {}
        for group, name in NAMES:
            factors = params["blocks"][group][name]
            if "up" in factors and name in moments:
                product = np.asarray(factors["down"][i], np.float64) @ np.asarray(factors["up"][i], np.float64)
                row[name] = factorize.error(block[group][name]["kernel"], product, moments[name])
        rows.append(row)
    return rows


def measure(dense: Trained, config: RunConfig, params: dict, held_out: list[stream.Batch]) -> dict:
    """Print and return errors per layer, and bits per byte and parameters before and after."""
    rows = errors(dense.config.model, dense.params, params, held_out)
    print_errors(list(rows[0]), rows)
    lengths, bits, sizes = dense.tokenizer.byte_lengths(), [], []
    params = jax.device_put(params, sharding.whole(sharding.one_device()))
    for run_config, weights in ((dense.config, dense.params), (config, params)):
        bits.append(evaluation.evaluate(run_config, weights, held_out, lengths)["bits_per_byte"])
        sizes.append(sum(w.size for w in jax.tree.leaves(weights)))
    print(f"bits per byte {bits[0]:.4f} -> {bits[1]:.4f}, parameters {sizes[0]:,} -> {sizes[1]:,}", flush=True)
    both = lambda name, pair: {f"{name}_before": pair[0], f"{name}_after": pair[1]}
    return {"errors": rows} | both("bits_per_byte", bits) | both("parameters", sizes)


def print_errors(names: list[str], rows: list[dict]) -> None:
    """Print a table of relative errors with a row per layer."""
    print("layer " + "".join(f"{name:>8}" for name in names))
    for i, row in enumerate(rows):
        print(f"{i:5d} " + "".join(f"{row[name]:8.3f}" for name in names), flush=True)


def open_dense(source: str) -> Trained:
    """Open the dense model in a run's folder, or in an export for Hugging Face."""
    if run_folder.newest_checkpoint(source) is not None:
        return open_run(source)
    dense = import_weights.open_export(source)
    return dense._replace(params=jax.device_put(dense.params, sharding.whole(sharding.one_device())))


def texts(dense: Trained, data: str, tokens: int) -> tuple[list[stream.Batch], list[stream.Batch]]:
    """Return (batches to calibrate with, held-out batches to measure on) with rows of the longest trained length."""
    p, tok, seed = dataclasses.replace(dense.config.pretrain, readers=1), dense.tokenizer, dense.config.seed
    if data:
        p = dataclasses.replace(p, sources=read_sources(data, "--data"), eval_fraction=max(p.eval_fraction, HELD_OUT))
    length = min(p.lengths[-1], tokens)
    rows = max(1, min(BATCH_TOKENS, tokens) // length)
    training = stream.open_phase(p, tok, seed, False)
    text = [training.next(rows, length) for _ in range(-(-tokens // (rows * length)))]
    training.close()
    held_out = evaluation.held_out(p, tok, seed, False, length, lambda *_, **__: None)
    if not held_out:
        raise UsageError(f"the held-out part of the text has no row of {length} tokens; name a longer text with --data")
    return text, held_out


def read_split(text: str) -> tuple[float, ...]:
    try:
        split = tuple(float(share) for share in text.split(","))
    except ValueError:
        split = ()
    if len(split) != 4 or min(split) <= 0:
        raise UsageError(f"--rank_split={text} must be four shares above 0 for q,k,v,o, such as 1,1,3,3")
    return split
