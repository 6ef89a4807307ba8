"""What an export of lower precision changes: errors of logits, KL divergence and bits per byte on held-out text."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lowrank_jax.config import RunFailure, UsageError, read_sources
from lowrank_jax.data import stream
from lowrank_jax.export import verify
from lowrank_jax.training import evaluation
from lowrank_jax.training.trained import Trained

TOKENS = 1024  # to measure on
LIMIT = 0.5  # nats of KL divergence a token, beyond which it is another model: q4_k_m of small ones had 0.003 to 0.02
SMALLEST = -80.0  # log-probabilities of fp32 end here
OTHER = "builtin:quickstart"  # where the run's own data are out of reach


def measure(trained: Trained, theirs: Callable[[np.ndarray], np.ndarray], tokens: int = TOKENS) -> dict:
    """{max_abs_err, kl, bits_per_byte, bits_per_byte_change, measured_tokens, measured_on}, as plain values.

    `theirs` gives logits [T, V] for token ids [T], each row shifted as it likes: errors are of log-probabilities. `kl`
    is of ours to theirs, in nats a token; `bits_per_byte` is theirs. It is measured as the run is evaluated, but for
    documents packed in one row, which see each other in both. Raises RunFailure where theirs are no numbers or
    of another model.
    """
    rows, name = _rows(trained, tokens)
    worst = divergence = bits = bits_before = size = count = 0.0
    byte_lengths = trained.tokenizer.byte_lengths()
    for row in rows:
        tokens_T, targets_T, weights_T = row["tokens"], row["targets"], row["weights"]
        ours_TV = _log_probs(verify.logits(trained, tokens_T, np.arange(len(tokens_T))))
        theirs_TV = _log_probs(theirs(tokens_T))
        seen_TV = ours_TV > SMALLEST
        if not np.isfinite(theirs_TV[seen_TV]).all():
            raise RunFailure("the export's logits are not finite")
        gap_TV = np.where(seen_TV, ours_TV - np.where(seen_TV, theirs_TV, 0), 0)
        worst = max(worst, np.abs(gap_TV).max())
        divergence, count = divergence + (np.exp(ours_TV) * gap_TV).sum(), count + len(tokens_T)
        bits += _bits(theirs_TV, targets_T, weights_T)
        bits_before += _bits(ours_TV, targets_T, weights_T)
        size += (byte_lengths[targets_T] * weights_T).sum()
    if divergence / count > LIMIT:
        raise RunFailure(
            f"the export is not the model any more: KL divergence of {divergence / count:.2g} nats a token"
        )
    size = max(size, 1)
    return {
        "max_abs_err": float(worst),
        "kl": float(divergence / count),
        "bits_per_byte": float(bits / size),
        "bits_per_byte_change": float((bits - bits_before) / size),
        "measured_tokens": int(count),
        "measured_on": name,
    }


def describe(found: dict) -> str:
    """One line for the person who watches."""
    errors = f"logits differ by at most {found['max_abs_err']:.2g}, KL {found['kl']:.2g} nats a token"
    bits = f"bits per byte {found['bits_per_byte']:.4f} ({found['bits_per_byte_change']:+.4f})"
    return f"{errors}, {bits} on {found['measured_tokens']:,} tokens of {found['measured_on']}"


def _rows(trained: Trained, tokens: int) -> tuple[list[dict], str]:
    """Rows {tokens, targets, weights} of at most so many tokens together, and the name of their text."""
    p, tokenizer = trained.config.pretrain, trained.tokenizer
    p = dataclasses.replace(p, eval_tokens=tokens)
    length = min(p.lengths[-1], tokens)
    while length > 1:
        try:
            batches = evaluation.held_out(p, tokenizer, trained.config.seed, False, length, lambda *_, **__: None)
        except (UsageError, OSError):  # files that were moved, a hub that is out of reach
            break
        if batches:
            return _cut(batches, tokens), "held-out text"
        length //= 2
    length = min(p.lengths[-1], tokens)
    batch = stream.read_once(read_sources(OTHER, "source"), tokenizer).next(tokens // length, length)
    return _cut([batch], tokens), OTHER


def _cut(batches: list[stream.Batch], tokens: int) -> list[dict]:
    rows = [{key: x[i] for key, x in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]
    return rows[: max(1, tokens // len(rows[0]["tokens"]))]


def _bits(log_probs_TV: np.ndarray, targets_T: np.ndarray, weights_T: np.ndarray) -> float:
    return -(log_probs_TV[np.arange(len(targets_T)), targets_T] * weights_T).sum() / math.log(2)


def _log_probs(logits_TV: np.ndarray) -> np.ndarray:
    x_TV = np.asarray(logits_TV, np.float64)
    x_TV = x_TV - x_TV.max(-1, keepdims=True)
    return x_TV - np.log(np.exp(x_TV).sum(-1, keepdims=True))
