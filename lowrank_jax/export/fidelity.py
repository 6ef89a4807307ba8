"""Loss of an export in lower precision: errors of logits, KL divergence and bits per byte on held-out text."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from lowrank_jax.config import RunFailure, UsageError, read_sources
from lowrank_jax.data import stream
from lowrank_jax.export import verify
from lowrank_jax.training import evaluation
from lowrank_jax.training.trained import Trained

TOKENS = 1024  # to measure on
LIMIT = 0.5  # nats of KL divergence per token; beyond it something is wrong: q4_k_m of small models had 0.003 to 0.02
FALLBACK = "builtin:quickstart"  # read where the run's own data are out of reach


def measure(trained: Trained, output: Callable[[np.ndarray], np.ndarray], tokens: int = TOKENS) -> dict:
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
        model_TV = log_probs(verify.logits(trained, tokens_T, np.arange(len(tokens_T))))
        export_TV = log_probs(output(tokens_T))
        counts_TV = model_TV > verify.SMALLEST
        if not np.isfinite(export_TV[counts_TV]).all():
            raise RunFailure("the export's logits are not finite")
        gap_TV = np.where(counts_TV, model_TV - np.where(counts_TV, export_TV, 0), 0)
        worst = max(worst, np.abs(gap_TV).max())
        divergence, count = divergence + (np.exp(model_TV) * gap_TV).sum(), count + len(tokens_T)
        bits += _bits(export_TV, targets_T, weights_T)
        bits_before += _bits(model_TV, targets_T, weights_T)
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
    """Return what `measure` found as text for the command's last line."""
    errors = f"logits differ by at most {measured['max_abs_err']:.2g}, KL {measured['kl']:.2g} nats per token"
    bits = f"bits per byte {measured['bits_per_byte']:.4f} ({measured['bits_per_byte_change']:+.4f})"
    return f"{errors}, {bits} on {measured['measured_tokens']:,} tokens of {measured['measured_on']}"


def _rows(trained: Trained, tokens: int) -> tuple[list[dict], str]:
    """Return rows {tokens, targets, weights} of at most `tokens` tokens in total, and the name of their text."""
    tokenizer = trained.tokenizer
    p = dataclasses.replace(trained.config.pretrain, eval_tokens=tokens)
    longest = length = min(p.lengths[-1], tokens)
    while length > 1:
        try:
            documents = stream.open_held_out(p, tokenizer, trained.config.seed, chats=False)
            batches = evaluation.batches_of(documents, length, p.eval_tokens)
        except (UsageError, OSError):  # moved files, or a hub out of reach
            break
        if batches:
            return _cut(batches, tokens), "held-out text"
        length //= 2
    batch = stream.read_once(read_sources(FALLBACK, "source"), tokenizer).next(tokens // longest, longest)
    return _cut([batch], tokens), FALLBACK


def _cut(batches: list[stream.Batch], tokens: int) -> list[dict]:
    rows = [{key: x[i] for key, x in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]
    return rows[: max(1, tokens // len(rows[0]["tokens"]))]


def _bits(log_probs_TV: np.ndarray, targets_T: np.ndarray, weights_T: np.ndarray) -> float:
    return -(log_probs_TV[np.arange(len(targets_T)), targets_T] * weights_T).sum() / math.log(2)
