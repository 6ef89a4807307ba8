"""Whether an export computes what the model computes: the same logits for random prompts, the same ids for texts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np

from lowrank_jax.config import ModelConfig, RunConfig, RunFailure, UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import PROBE, Tokenizer
from lowrank_jax.model import network
from lowrank_jax.training.plan import make
from lowrank_jax.training.trained import Trained

TOLERANCE = 1e-4  # largest difference of two fp32 logits
PLACES = 16  # of a prompt, where logits are compared
CHUNK, STEPS = 512, 5  # tokens that a program reads at a time, so that their biases fit into memory; tokens one by one
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


class NotInstalled(Exception):
    """The program that would run the export is not here; the message says what to install."""


def longest(config: RunConfig) -> int:
    """The longest sequence that the run trains on."""
    return max(stage.seq_len for stage in make(config).stages)


def prompts(trained: Trained) -> list[tuple[np.ndarray, np.ndarray]]:
    """(random token ids [T], places in them [P]), short ones and ones beyond what the run was trained to."""
    draw, n = np.random.default_rng(0), longest(trained.config)
    rows = [draw.integers(trained.config.model.vocab, size=T) for T in (1, 13, n + 1, n + n // 2 + 7)]
    return [(row, np.unique(np.linspace(0, len(row) - 1, PLACES).astype(int))) for row in rows]


def logits(trained: Trained, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[P, V] of our model at the places [P] among the token ids [T], computed in full fp32."""
    c = dataclasses.replace(trained.config.model, attention="chunked")  # the kernels of GPUs and TPUs are less exact
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(c, trained.params, tokens[None], places))[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(c: ModelConfig, params: dict, tokens_BT: jax.Array, places_P: jax.Array) -> jax.Array:
    x_BTD = network.features(c, params, tokens_BT)
    return network.logits(c, params, x_BTD[:, places_P])


def difference(trained: Trained, *theirs: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """Between our logits and each `theirs(tokens, places)`, the largest of all prompts; NaN where one is NaN."""

    def largest(prompt) -> float:
        ours = logits(trained, *prompt)
        return np.max([np.abs(ours - each(*prompt)).max() for each in theirs])

    return float(np.max([largest(prompt) for prompt in prompts(trained)]))


def difference_of_reader(trained: Trained, read: Callable) -> float:
    """The same for a program that has a cache, which each prompt goes through twice: as a whole, and as it is decoded.

    `read(tokens [T], places [P] among them, cache or None)` gives (logits [P, V], cache).
    """
    return difference(trained, *(functools.partial(_in_parts, read, steps) for steps in (0, STEPS)))


def _in_parts(read: Callable, steps: int, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Logits [P, V] at the places: read in chunks, the last `steps` tokens one by one."""
    whole = max(len(tokens) - steps, 1)
    cuts = [*range(0, whole, CHUNK), *range(whole, len(tokens)), len(tokens)]
    cache, rows = None, []
    for start, end in itertools.pairwise(cuts):
        found, cache = read(tokens[start:end], places[(places >= start) & (places < end)] - start, cache)
        rows.append(found)
    return np.concatenate(rows)


def log_prob_difference(trained: Trained, theirs: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """The same of log-probabilities, which differ from logits by what a whole row has in common.

    Those below -80 do not count: fp32 has no such probabilities.
    """

    def largest(prompt) -> float:
        ours = np.asarray(jax.nn.log_softmax(logits(trained, *prompt)))
        return np.abs(ours - theirs(*prompt))[ours > -80].max()

    return float(max(largest(prompt) for prompt in prompts(trained)))


def check(found: float, tolerance: float = TOLERANCE) -> float:
    """The difference that was found; raises RunFailure where it is too large, or not a number."""
    if not found <= tolerance:
        raise RunFailure(f"the export's logits differ from the model's by {found:.2g}, more than {tolerance:g}")
    return found


def check_ids(tokenizer: Tokenizer, theirs: Callable[[str], list[int]]) -> None:
    """Raises RunFailure where a text has other ids in the export."""
    for text in TEXTS:
        if tokenizer.encode(text) != theirs(text):
            raise RunFailure(f"the export's tokenizer gives other ids for {text!r}")


def check_chat(tokenizer: Tokenizer, theirs: Callable[[list[dict]], list[int]]) -> None:
    """Raises RunFailure where a conversation that the assistant is to go on with has other ids in the export."""
    messages = list(CHAT)
    try:
        ours = [tokenizer.bos, *chat.encode(tokenizer, messages, prompt=True)[0]]
    except UsageError:  # a template that takes no such conversation
        return
    if ours != theirs(messages):
        raise RunFailure("the export's chat template gives other ids")
