"""A dense model made low-rank: factors of its projections that do the least harm to a text's activations.

    python -m lowrank_jax.compress --from=runs/dense --rank=32 --out=runs/compressed [--mlp_rank=64] [--data=SOURCE]

`--from` is a run with config.model.rank=0, or what `lowrank_jax.export --format=hf` made of it; `--out` becomes a run's
folder, whose training recovers what the rank costs (docs/export.md has the recipe). The mean rank is shared out between
Q, K, V and O as `--rank_split` says. There is no norm on the latents: a dense model has none.

`--from` may also be BLOOM or MPT in Hugging Face form, whose architecture is not ours: `--out` is then a folder of the
same kind with products of that rank in it, and their factors beside them.
"""

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
ROWS = 8192  # tokens that go through a layer at a time
OTHER = "builtin:quickstart"  # calibrates models that were trained elsewhere
HELD_OUT = 0.1  # of a --data, to measure on
MATRICES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "out")}


def compress(trained: Trained, rank: int, split: tuple[float, ...], mlp_rank: int, batches: list[stream.Batch]):
    """(config, params) of the low-rank model, by the text in `batches`; raises UsageError for impossible ranks."""
    config, c = low_rank(trained.config, rank, split, mlp_rank), trained.config.model
    ranks = dict(zip(MATRICES["attention"], config.model.ranks)) | dict.fromkeys(MATRICES["mlp"], mlp_rank)

    def factored(block: dict, group: str, name: str, seen: dict) -> dict:
        w_IO = block[group][name]
        if not ranks[name]:
            return w_IO
        down, up = factorize.factors(w_IO["kernel"], seen[name], ranks[name], _metric(block, name, seen))
        return {"down": down, "up": up}

    layers = []
    for block, seen in activations(c, trained.params, batches):
        made = {g: {name: factored(block, g, name, seen) for name in names} for g, names in MATRICES.items()}
        layers.append(block | made)
    return config, trained.params | {"blocks": jax.tree.map(lambda *ws: np.stack(ws), *layers)}


def low_rank(config: RunConfig, rank: int, split: tuple[float, ...], mlp_rank: int) -> RunConfig:
    """The config of the compressed model of a dense one; raises UsageError for what cannot be."""
    c = config.model
    if c.rank:
        raise UsageError(f"--from has config.model.rank={c.rank}: only a dense model, with rank 0, can be compressed")
    if mlp_rank and c.mlp_rank:
        raise UsageError(f"--from has config.model.mlp_rank={c.mlp_rank} already; leave --mlp_rank out")
    values = config.to_dict()
    values["model"] |= {"rank": rank, "rank_split": split, "latent_norm": False, "mlp_rank": mlp_rank or c.mlp_rank}
    made = RunConfig.from_dict(values)
    if not 0 < max(made.model.ranks) <= c.d:
        shown = ",".join(f"{s:g}" for s in split)
        raise UsageError(
            f"--rank={rank} with --rank_split={shown} makes the largest rank {max(made.model.ranks)}; "
            f"it must be between 1 and the width of {c.d}"
        )
    if mlp_rank > min(c.d, c.hidden):
        raise UsageError(f"--mlp_rank={mlp_rank} must not exceed {min(c.d, c.hidden)}")
    return made


def activations(c: ModelConfig, params: dict, batches: list[stream.Batch]) -> Iterator[tuple[dict, dict]]:
    """(weights, {name: second moments [I, I]}) of each layer: of the dense model's inputs to its matrices.

    Those of the keys and queries are there too, of each head alone [H, K, K], as "keys" and "queries".
    """
    xs = [network.embed(c, params, batch["tokens"]) for batch in batches]
    for i in range(c.layers):
        block, sums = _layer(params, i), {}
        matmul = _noting(c, block, sums)
        xs = [network.block(c, block, x, batch["segments"], matmul) for x, batch in zip(xs, batches)]
        yield block, sums


def _layer(params: dict, i: int) -> dict:
    return jax.tree.map(lambda w: np.asarray(w[i]), params["blocks"])


def _noting(c: ModelConfig, block: dict, sums: dict) -> Callable:
    """The product of an input and a matrix of the block, which adds to `sums`."""
    matrices = {n: block[g][n]["kernel"] for g, names in MATRICES.items() for n in names if "kernel" in block[g][n]}
    of_outputs = {"q": "queries", "k": "keys"}

    def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        for name in [n for n, kernel in matrices.items() if np.array_equal(kernel, w)][:1]:
            _add(sums, name, x)
            if name in of_outputs:
                _add(sums, of_outputs[name], y.reshape(*y.shape[:-1], c.heads, c.head_dim))
        return y

    return matmul


def errors(c: ModelConfig, dense: dict, params: dict, batches: list[stream.Batch]) -> list[dict]:
    """Of each layer {name: error of a matrix's output beside its size}, for the dense model's inputs of other text."""
    found = []
    for i, (block, seen) in enumerate(activations(c, dense, batches)):
        row = {}
        for name, group in ((name, group) for group, names in MATRICES.items() for name in names):
            made = params["blocks"][group][name]
            if "up" in made and name in seen:
                product = np.asarray(made["down"][i], np.float64) @ np.asarray(made["up"][i], np.float64)
                row[name] = factorize.error(block[group][name]["kernel"], product, seen[name])
        found.append(row)
    return found


def _add(sums: dict, name: str, x: jax.Array) -> None:
    """Adds the second moments of `x` [B, T, ..., I] to those of the name."""
    x_NI = x.reshape(-1, *x.shape[2:])
    found = np.asarray(jnp.einsum("N...I,N...J->...IJ", x_NI, x_NI, precision="highest"), np.float64)
    sums[name] = sums[name] + found if name in sums else found


def _metric(block: dict, name: str, seen: dict) -> np.ndarray | None:
    """What an error of the output costs: of a query, by the keys of its head; of a value, by what O makes of it."""
    if name in ("q", "k"):
        return scipy.linalg.block_diag(*seen["keys" if name == "q" else "queries"])
    if name == "v":
        o_XD = np.asarray(block["attention"]["o"]["kernel"], np.float64)
        return o_XD @ o_XD.T
    return None


def measure(dense: Trained, config: RunConfig, params: dict, held_out: list[stream.Batch]) -> dict:
    """Prints and returns errors per layer, bits per byte and parameters, before and after."""
    rows = errors(dense.config.model, dense.params, params, held_out)
    names = list(rows[0])
    print("layer " + "".join(f"{name:>8}" for name in names))
    for i, row in enumerate(rows):
        print(f"{i:5d} " + "".join(f"{row[name]:8.3f}" for name in names), flush=True)
    lengths, bits, sizes = dense.tokenizer.byte_lengths(), [], []
    for c, weights in (
        (dense.config, dense.params),
        (config, jax.device_put(params, sharding.whole(sharding.one_device()))),
    ):
        bits.append(evaluation.evaluate(c, weights, held_out, lengths)["bits_per_byte"])
        sizes.append(sum(w.size for w in jax.tree.leaves(weights)))
    print(f"bits per byte {bits[0]:.4f} -> {bits[1]:.4f}, parameters {sizes[0]:,} -> {sizes[1]:,}", flush=True)
    both = lambda name, pair: {f"{name}_before": pair[0], f"{name}_after": pair[1]}
    return {"errors": rows} | both("bits_per_byte", bits) | both("parameters", sizes)


def open_dense(source: str) -> Trained:
    """The dense model in a run's folder, or in one that was exported for Hugging Face."""
    if run_folder.newest_checkpoint(source) is not None:
        return open_run(source)
    config, tok, params, progress = import_weights.open_export(source)
    return Trained(config, tok, jax.device_put(params, sharding.whole(sharding.one_device())), progress)


def texts(dense: Trained, data: str, tokens: int) -> tuple[list[stream.Batch], list[stream.Batch]]:
    """(batches to calibrate with, held-out batches to measure on), rows as long as the longest in training."""
    p, tok, seed = dense.config.pretrain, dense.tokenizer, dense.config.seed
    if data:
        p = dataclasses.replace(p, sources=read_sources(data, "--data"), eval_fraction=max(p.eval_fraction, HELD_OUT))
    p = dataclasses.replace(p, readers=1)
    length = min(p.lengths[-1], tokens)
    rows = max(1, min(ROWS, tokens) // length)
    training = stream.open_phase(p, tok, seed, False)
    text = [training.next(rows, length) for _ in range(-(-tokens // (rows * length)))]
    training.close()
    held_out = evaluation.held_out(p, tok, seed, False, length, lambda *_, **__: None)
    if not held_out:
        raise UsageError(f"the held-out part of the text has no row of {length} tokens; name a longer one with --data")
    return text, held_out


def read_split(text: str) -> tuple[float, ...]:
    try:
        split = tuple(float(share) for share in text.split(","))
    except ValueError:
        split = ()
    if len(split) != 4 or min(split) <= 0:
        raise UsageError(f"--rank_split={text} must be four shares above 0 for q,k,v,o, such as 1,1,3,3")
    return split
