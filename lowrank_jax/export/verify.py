"""Comparison of an export with the model: logits for random prompts, ids of texts and chats, and the loss on text."""

import dataclasses
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
from scipy.special import log_softmax

from lowrank_jax.config import ModelConfig, RunConfig, RunFailure, UsageError, read_sources
from lowrank_jax.data import chat, stream
from lowrank_jax.data.probes import PROBE
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.model import network
from lowrank_jax.training import evaluation, plan
from lowrank_jax.training.trained import Trained

TOLERANCE = 1e-4  # largest difference of two fp32 logits
POSITIONS = 16  # compared in each prompt
CHUNK, STEPS = 512, 5  # tokens read at once, so that their biases fit into memory; tokens read one by one
SMALLEST = -80.0  # fp32 has no probabilities below e^-80
MEASURED = 1024  # tokens of text to measure lower precision on
LIMIT = 0.5  # nats of KL divergence per token; beyond it something is wrong: q4_k_m of small models had 0.003 to 0.02
FALLBACK = "builtin:quickstart"  # read where the run's own data are out of reach
TEXTS = (
    PROBE,
    " leading, trailing ",
    "\n\n\n",
    "x = [1, 23, 456]\n\tif x:\r\n        return -x  # 100%\n",
    "na\u00efve caf\u00e9, \u4f60\u597d, \u0440\u0443\u0441\u0441\u043a\u0438\u0439, \U0001f468\u200d\U0001f469",
    "e\u0301 \u00a0\u2028\ufeff <0x41> aaaaaaa bababab        spaces",
)
CHAT = (
    {"role": "user", "content": "What is it?\n\n  Say so."},
    {"role": "assistant", "content": "A test."},
    {"role": "user", "content": "And now?"},
)


class NotInstalled(UsageError):
    """A package is missing; the message says what to install."""


def need(*packages: str) -> None:
    """Raise NotInstalled unless all packages are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise NotInstalled(f"packages are missing: pip install {' '.join(missing)}")


def longest(config: RunConfig) -> int:
    """Return the length of the longest sequence in the run's training."""
    return max(stage.seq_len for stage in plan.stages_of(config))


def prompts(trained: Trained) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (random token ids [T], positions in them [P]): short prompts, and prompts beyond the trained length."""
    draw, n = np.random.default_rng(0), longest(trained.config)
    rows = [draw.integers(trained.config.model.vocab, size=T) for T in (1, 13, n + 1, n + n // 2 + 7)]
    return [(row, np.unique(np.linspace(0, len(row) - 1, POSITIONS).astype(int))) for row in rows]


def logits(trained: Trained, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the model's logits [P, V] at the positions [P] of the token ids [T], computed in full fp32."""
    c = dataclasses.replace(trained.config.model, attention="chunked")  # the kernels of GPUs and TPUs are less exact
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(c, trained.params, tokens[None], positions))[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(c: ModelConfig, params: dict, tokens_BT: jax.Array, positions_P: jax.Array) -> jax.Array:
    x_BTD = network.features(c, params, tokens_BT)
    return network.logits(c, params, x_BTD[:, positions_P])


def check(trained: Trained, outputs: list[Callable], tolerance: float = TOLERANCE, log_probs: bool = False) -> float:
    """Return the largest difference between the model's logits and those of each `output(tokens, positions)`.

    With `log_probs`, the outputs are log-probabilities. They differ from logits by one number per row. Raises
    RunFailure where the difference exceeds the tolerance or is NaN.
    """
    worst = 0.0
    for tokens, positions in prompts(trained):
        expected = logits(trained, tokens, positions)
        if log_probs:
            expected = np.asarray(jax.nn.log_softmax(expected))
        counts = expected > (SMALLEST if log_probs else -np.inf)
        gaps = [np.abs(expected - output(tokens, positions))[counts].max() for output in outputs]
        worst = float(np.max([worst, *gaps]))  # of numbers and NaN, np.max returns NaN
    if not worst <= tolerance:
        raise RunFailure(f"the export's logits differ from the model's by {worst:.2g}, more than {tolerance:g}")
    return worst


def check_cached(trained: Trained, read: Callable, tolerance: float = TOLERANCE) -> float:
    """Do the same for a program with a cache, reading each prompt as a whole and token by token.

    `read(tokens [T], positions [P] among them, cache or None)` returns (logits [P, V], cache).
    """
    return check(trained, [functools.partial(_in_parts, read, steps) for steps in (0, STEPS)], tolerance)


def _in_parts(read: Callable, steps: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return logits [P, V] at the positions; the last `steps` tokens are read one by one, the others in chunks."""
    whole = max(len(tokens) - steps, 1)
    cuts = [*range(0, whole, CHUNK), *range(whole, len(tokens)), len(tokens)]
    cache, parts = None, []
    for start, end in itertools.pairwise(cuts):
        is_inside = (positions >= start) & (positions < end)
        part, cache = read(tokens[start:end], positions[is_inside] - start, cache)
        parts.append(part)
    return np.concatenate(parts)


def check_ids(tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> None:
    """Raise RunFailure where the export's tokenizer, `encode`, gives a text other ids."""
    for text in TEXTS:
        if tokenizer.encode(text) != encode(text):
            raise RunFailure(f"the export's tokenizer gives other ids for {text!r}")


def check_chat(tokenizer: Tokenizer, encode: Callable[[list[dict]], list[int]]) -> None:
    """Raise RunFailure where the export gives other ids to a conversation that the assistant is to continue."""
    messages = list(CHAT)
    try:
        expected = [tokenizer.bos, *chat.encode(tokenizer, messages, prompt=True)[0]]
    except UsageError:  # the template does not take such a conversation
        return
    if expected != encode(messages):
        raise RunFailure("the export's chat template gives other ids")


def measure(trained: Trained, output: Callable[[np.ndarray], np.ndarray], tokens: int = MEASURED) -> dict:
    """Return {max_abs_err, kl, bits_per_byte, bits_per_byte_change, measured_tokens, measured_on} as plain values.

    `output` gives the export's logits [T, V] for token ids [T]; each row may be shifted, as errors are those of
    log-probabilities. `kl` goes from the model to the export, in nats per token. Unlike in `evaluate`, documents that
    are packed into one row see each other. Raises RunFailure where logits are not finite or belong to another model.
    """
    rows, name = _rows(trained, tokens)
    worst = divergence = bits = bits_before = size = count = 0.0
    byte_lengths = trained.tokenizer.byte_lengths()
    log_probs = lambda logits_TV: log_softmax(np.asarray(logits_TV, np.float64), axis=-1)
    for row in rows:
        tokens_T, targets_T, weights_T = row["tokens"], row["targets"], row["weights"]
        positions_T = np.arange(len(tokens_T))
        model_TV, export_TV = log_probs(logits(trained, tokens_T, positions_T)), log_probs(output(tokens_T))
        counts_TV = model_TV > SMALLEST
        if not np.isfinite(export_TV[counts_TV]).all():
            raise RunFailure("the export's logits are not finite")
        gap_TV = np.where(counts_TV, model_TV - np.where(counts_TV, export_TV, 0), 0)
        worst = max(worst, np.abs(gap_TV).max())
        divergence, count = divergence + (np.exp(model_TV) * gap_TV).sum(), count + len(tokens_T)
        bits -= (export_TV[positions_T, targets_T] * weights_T).sum() / math.log(2)
        bits_before -= (model_TV[positions_T, targets_T] * weights_T).sum() / math.log(2)
        size += (byte_lengths[targets_T] * weights_T).sum()
    if divergence / count > LIMIT:
        raise RunFailure(f"the export is another model: KL divergence of {divergence / count:.2g} nats per token")
    size = max(size, 1)
    return {
        "max_abs_err": float(worst),
        "kl": float(divergence / count),
        "bits_per_byte": float(bits / size),
        "bits_per_byte_change": float((bits - bits_before) / size),
        "measured_tokens": int(count),
        "measured_on": name,
    }


def describe(measured: dict) -> str:
    """Return the result of `measure` as text for the command's last line."""
    errors = f"logits differ by at most {measured['max_abs_err']:.2g}, KL {measured['kl']:.2g} nats per token"
    bits = f"bits per byte {measured['bits_per_byte']:.4f} ({measured['bits_per_byte_change']:+.4f})"
    return f"{errors}, {bits} on {measured['measured_tokens']:,} tokens of {measured['measured_on']}"


def _rows(trained: Trained, tokens: int) -> tuple[list[dict], str]:
    """Return rows {tokens, targets, weights} of at most `tokens` tokens in total, and the name of their text."""
    phase, p = next(iter(trained.config.phases.items()))
    p = dataclasses.replace(p, eval_tokens=tokens)
    longest = length = min(p.lengths[-1], tokens)
    batches = []
    while length > 1 and not batches:
        try:
            documents = stream.open_held_out(p, trained.tokenizer, trained.config.seed, chats=phase == "sft")
            batches = evaluation.batches_of(documents, length, tokens)
        except (UsageError, OSError):  # moved files, or a hub out of reach
            break
        length //= 2
    name = "held-out text" if batches else FALLBACK
    if not batches:
        text = stream.read_once(read_sources(FALLBACK, "source"), trained.tokenizer)
        batches = [text.next(tokens // longest, longest)]
    rows = [{key: x[i] for key, x in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]
    return rows[: max(1, tokens // len(rows[0]["tokens"]))], name
