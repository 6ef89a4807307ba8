"""Compression of a dense run to low rank: calibration on text, factors per matrix, and what they cost.

A matrix becomes the product of two thin ones that is best for real inputs. For inputs x with second moments L L^T, the
best product for x @ W follows from the SVD of L^T W (SVD-LLM, arXiv 2403.07378). Where a metric B B^T weighs errors of
the output, as the keys weigh those of a query, it is L^T W B.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lowrank_jax.config import ModelConfig, RunConfig, UsageError, read_sources
from lowrank_jax.data import stream
from lowrank_jax.export import import_weights
from lowrank_jax.machine import sharding
from lowrank_jax.machine.console import show
from lowrank_jax.model import network
from lowrank_jax.training import evaluation, run_folder
from lowrank_jax.training.trained import Trained, open_run

TOKENS = 32_768  # to calibrate on
BATCH_TOKENS = 8192  # that go through a layer at once
FALLBACK = "builtin:quickstart"  # calibrates models that were trained elsewhere
DAMPING = 1e-6  # of the mean variance: directions without input must not be divided by 0
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
                down, up = factors(w_IO, moments[name], ranks[name], metric_OO)
                low[group][name] = {"down": down, "up": up}
        layers.append(low)
    return config, trained.params | {"blocks": jax.tree.map(lambda *ws: np.stack(ws), *layers)}


def low_rank(config: RunConfig, rank: int, split: tuple[float, ...], mlp_rank: int) -> RunConfig:
    """Return the config of a dense model's compressed form; raises UsageError for impossible ranks."""
    c = config.model
    if c.rank:
        raise UsageError(f"--from has config.model.rank={c.rank}: only a dense model, with rank 0, can be compressed")
    if c.kv_heads:
        raise UsageError(f"--from has config.model.kv_heads={c.kv_heads}: only a model with 0 can be compressed")
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
        require_finite({f"{name} in layer {i}": moments for name, moments in sums.items()})
        yield block, sums


def require_finite(moments: dict[str, np.ndarray]) -> None:
    """Raise UsageError where a matrix gets inputs, of these second moments by its name, that fp32 cannot hold."""
    for name, moments_II in moments.items():
        if not np.isfinite(moments_II).all():
            raise UsageError(f"--from: the inputs of {name} are not finite; its weights are damaged or too large")


def _recording(c: ModelConfig, block: dict, sums: dict) -> Callable:
    """Return a product of an input and a matrix of the block that adds second moments to `sums`."""
    matrices = {name: block[group][name]["kernel"] for group, name in NAMES if "kernel" in block[group][name]}
    calls = dict.fromkeys(matrices, 0)

    def add(name: str, x: jax.Array) -> None:
        x_NI = x.reshape(-1, *x.shape[2:])
        moments = np.asarray(jnp.einsum("N...I,N...J->...IJ", x_NI, x_NI, precision="highest"), np.float64)
        sums[name] = sums.get(name, 0) + moments

    def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        same = [name for name, kernel in matrices.items() if np.array_equal(kernel, w)]
        name = min(same, key=calls.get, default=None)  # matrices with equal values come in their order
        if name:
            calls[name] += 1
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
            low = params["blocks"][group][name]
            if "up" in low and name in moments:
                product = np.asarray(low["down"][i], np.float64) @ np.asarray(low["up"][i], np.float64)
                row[name] = error(block[group][name]["kernel"], product, moments[name])
        rows.append(row)
    return rows


def measure(dense: Trained, config: RunConfig, params: dict, held_out: list[stream.Batch]) -> dict:
    """Print and return errors per layer, and bits per byte and parameters before and after."""
    lengths, bits, sizes = dense.tokenizer.byte_lengths(), [], []
    rows = errors(dense.config.model, dense.params, params, held_out)
    params = jax.device_put(params, sharding.whole(sharding.one_device()))
    for run_config, weights in ((dense.config, dense.params), (config, params)):
        bits.append(evaluation.evaluate(run_config, weights, held_out, lengths)["bits_per_byte"])
        sizes.append(sum(w.size for w in jax.tree.leaves(weights)))
    facts = report(rows, *bits, f", parameters {sizes[0]:,} -> {sizes[1]:,}")
    return facts | {"parameters_before": sizes[0], "parameters_after": sizes[1]}


def report(rows: list[dict], before: float, after: float, ending: str = "") -> dict:
    """Print and return relative errors, with a row per layer, and bits per byte."""
    if not np.isfinite([before, after]).all():
        raise UsageError("--from: the loss on the text is not finite; the weights are damaged or too large")
    show("layer " + "".join(f"{name:>8}" for name in rows[0]))
    for i, row in enumerate(rows):
        show(f"{i:5d} " + "".join(f"{value:8.3f}" for value in row.values()))
    show(f"bits per byte {before:.4f} -> {after:.4f}{ending}")
    return {"errors": rows, "bits_per_byte_before": before, "bits_per_byte_after": after}


def open_dense(source: str) -> Trained:
    """Open the dense model in a run's folder, or in an export for Hugging Face."""
    if run_folder.newest_checkpoint(source) is not None:
        return open_run(source)
    dense = import_weights.open_export(source)
    return dense._replace(params=jax.device_put(dense.params, sharding.whole(sharding.one_device())))


def texts(dense: Trained, data: str, tokens: int) -> tuple[list[stream.Batch], list[stream.Batch]]:
    """Return (batches to calibrate with, held-out batches to measure on) with rows of the longest trained length."""
    (phase, p), tok, seed = next(iter(dense.config.phases.items())), dense.tokenizer, dense.config.seed
    p, chats = dataclasses.replace(p, readers=1), phase == "sft" and not data
    if data:
        p = dataclasses.replace(p, sources=read_sources(data, "--data"), eval_fraction=max(p.eval_fraction, HELD_OUT))
    length = min(p.lengths[-1], tokens)
    rows = max(1, min(BATCH_TOKENS, tokens) // length)
    training = stream.open_phase(p, tok, seed, chats)
    text = [training.next(rows, length) for _ in range(-(-tokens // (rows * length)))]
    training.close()
    held_out = evaluation.batches_of(stream.open_held_out(p, tok, seed, chats), length, p.eval_tokens)
    if not held_out:
        raise UsageError(f"the held-out part of the text has no row of {length} tokens; name a longer text with --data")
    return text, held_out


def read_split(text: str) -> tuple[float, ...]:
    try:
        split = tuple(float(share) for share in text.split(","))
    except ValueError:
        split = ()
    if len(split) != 4 or not all(0 < share < 1e9 for share in split):  # neither NaN nor infinite
        raise UsageError(f"--rank_split={text} must be four shares above 0 for q,k,v,o, such as 1,1,3,3")
    return split


def factors(w_IO: np.ndarray, inputs_II: np.ndarray, rank: int, metric_OO: np.ndarray | None = None):
    """Return (down [I, R], up [R, O]) in fp32 with the least error for inputs with second moments `inputs_II`.

    At full rank the product is `w_IO`. Both factors have the same scale, as training wants them.
    """
    w_IO = np.asarray(w_IO, np.float64)
    left_II = _root(inputs_II)
    right_OO = np.eye(w_IO.shape[1]) if metric_OO is None else _root(metric_OO)
    p_IR, s_R, q_RO = np.linalg.svd(left_II.T @ w_IO @ right_OO, full_matrices=False)
    down_IR = np.linalg.solve(left_II.T, p_IR[:, :rank] * s_R[:rank])
    up_RO = np.linalg.solve(right_OO.T, q_RO[:rank].T).T
    return _balanced(down_IR, up_RO)


def error(w_IO: np.ndarray, product_IO: np.ndarray, inputs_II: np.ndarray) -> float:
    """Return the RMS of x @ (W - product) relative to that of x @ W, for second moments `inputs_II` of x."""
    size = lambda m_IO: np.einsum("IO,IJ,JO->", m_IO, inputs_II, m_IO, optimize=True)
    w_IO = np.asarray(w_IO, np.float64)
    return float((max(size(w_IO - product_IO), 0) / max(size(w_IO), 1e-300)) ** 0.5)


def _root(c: np.ndarray) -> np.ndarray:
    """Return a lower triangular L with L L^T = C, up to a little more on the diagonal."""
    c = np.asarray(c, np.float64)
    return np.linalg.cholesky(c + max(DAMPING * np.trace(c) / len(c), 1e-30) * np.eye(len(c)))


def _balanced(down_IR: np.ndarray, up_RO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of the same product with equal singular values: fp32 loses nothing, no factor learns slower."""
    q_IR, r_RR = np.linalg.qr(down_IR)
    t_OR, u_RR = np.linalg.qr(up_RO.T)
    p_RR, s_R, v_RR = np.linalg.svd(r_RR @ u_RR.T)
    root_R = s_R**0.5
    return (q_IR @ p_RR * root_R).astype(np.float32), (root_R[:, None] * (v_RR @ t_OR.T)).astype(np.float32)
