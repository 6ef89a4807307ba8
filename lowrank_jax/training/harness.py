"""lm-evaluation-harness on a model in memory: its tasks, scored by our forward pass and answered by our engine.

Encoding and truncation are those of the harness's `hf` model with BOS, so both give the same figures. The package is
optional: only this file imports it, and `tasks` imports this file.
"""

import difflib
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lowrank_jax.config import RunConfig, UsageError
from lowrank_jax.inference import sampling
from lowrank_jax.inference.engine import Request
from lowrank_jax.inference.session import PADDED, SLOTS, Model
from lowrank_jax.machine import processes, sharding
from lowrank_jax.machine.interrupt import Interrupted
from lowrank_jax.model import network, precision

BATCH_TOKENS = 8192  # of a forward pass
LOGITS = 512  # tokens whose logits are in memory at once
FILES = (".yaml", ".yml")
MOST_NEW = 256  # tokens of an answer where the task has no limit, as in the harness

logging.getLogger("lm_eval").setLevel(logging.ERROR)
Pair = tuple[list[int], list[int]]  # ids of a context, which is never empty, and of what follows it


class Harness(TemplateLM):
    """A session.Model as the harness's LM; `length` is the most tokens that a prediction sees."""

    def __init__(self, model: Model, length: int, stop: Callable[[], bool] = lambda: False):
        super().__init__()
        self.model, self.length, self._stop = model, length, stop

    def _go_on(self) -> None:
        processes.record_progress()
        if self._stop():
            raise Interrupted

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = [] if add_special_tokens is False else [self.model.tokenizer.bos]
        return bos + self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        answers = self._score([(context, target) for _, context, target in requests])
        for (pair, *_), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, **_) -> list[float]:
        texts = [self.model.tokenizer.encode(request.args[0]) for request in requests]
        windows = [
            list(map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.length, 1)))
            for ids in texts
        ]
        scores = iter(self._score([pair for pairs in windows for pair in pairs]))
        return [sum(score for score, _ in itertools.islice(scores, len(pairs))) for pairs in windows]

    def generate_until(self, requests: list, **_) -> list[str]:
        texts, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(str(request.args[1]), []).append(i)
        for numbers in groups.values():  # of the same settings
            stop, most, drawing = _settings(requests[numbers[0]].args[1])
            room = max(self.length - most, 1)
            for part in (numbers[start : start + SLOTS] for start in range(0, len(numbers), SLOTS)):
                self._go_on()
                contexts = [self.tok_encode(requests[i].args[0])[-room:] for i in part]
                answers = self.model.texts([Request(ids, most, drawing) for ids in contexts], stop)
                for i, text in zip(part, answers):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the target, whether greedy decoding gives it) of each pair."""
        scores, params = [(0.0, True)] * len(pairs), self.model.params
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        for numbers, batch in _batches(pairs, self.length, sharding.row_shards(mesh)):
            self._go_on()
            placed = {key: sharding.put(x, sharding.of_rows(mesh, len(x))) for key, x in batch.items()}
            with jax.set_mesh(mesh):
                sums = _sums(self.model.config, params, **placed)
            nats, misses = (sharding.fetch(x) for x in sums)
            for row, i in enumerate(numbers):
                scores[i] = float(nats[row]), not misses[row]
        return scores


def _batches(pairs: Sequence[Pair], length: int, multiple: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yield (numbers of pairs, rows of their tokens), longest first, in few shapes; contexts are cut on the left."""
    rows = [(context + target)[-length - 1 :] for context, target in pairs]
    order = sorted((i for i, (_, target) in enumerate(pairs) if target), key=lambda i: -len(rows[i]))
    while order:
        width = -(-(len(rows[order[0]]) - 1) // PADDED) * PADDED
        count = max(BATCH_TOKENS // width // multiple, 1) * multiple
        numbers, order = order[:count], order[count:]
        batch = {key: np.zeros((count, width), np.int32) for key in ("tokens", "targets")}
        batch["weights"] = np.zeros((count, width), np.float32)
        for row, i in enumerate(numbers):
            ids, n = rows[i], len(rows[i]) - 1
            batch["tokens"][row, :n], batch["targets"][row, :n] = ids[:-1], ids[1:]
            batch["weights"][row, max(n - len(pairs[i][1]), 0) : n] = 1
        yield numbers, batch


@functools.partial(jax.jit, static_argnums=0)
def _sums(config: RunConfig, params: dict, tokens, targets, weights) -> tuple[jax.Array, jax.Array]:
    """Return each row's log-likelihood of its weighted targets, and how many of them are not the likeliest token."""
    x_BTD = network.features(config.model, params, tokens, None, precision.policy(config.precision).dtype)
    B, T = tokens.shape
    size = max(d for d in range(1, T + 1) if T % d == 0 and d * B <= max(LOGITS, B))
    in_parts = lambda x: x.reshape(B, T // size, size, *x.shape[2:]).swapaxes(0, 1)

    def add(sums, part):
        x, target, weight = part
        logits = network.logits(config.model, params, x)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        logprob = picked - jax.nn.logsumexp(logits, axis=-1)
        is_miss = (picked < logits.max(axis=-1)) * weight
        return (sums[0] + (logprob * weight).sum(1), sums[1] + is_miss.sum(1)), None

    return jax.lax.scan(add, (jnp.zeros(B), jnp.zeros(B)), tuple(map(in_parts, (x_BTD, targets, weights))))[0]


def _settings(options: dict) -> tuple[tuple[str, ...], int, sampling.Sampling]:
    """Return (stop strings, most new tokens, sampling) of a task's generation_kwargs."""
    until = options.get("until") or ()
    stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
    most = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MOST_NEW)
    known = {key: value for key, value in options.items() if key in sampling.NUMBERS and value is not None}
    is_greedy = not options.get("do_sample", known.get("temperature", 0) > 0)
    return stop, most, sampling.Sampling(**known | ({"temperature": 0} if is_greedy else {}))


def load(names: Sequence[str]) -> dict[str, list]:
    """Return the tasks and groups behind each name or path of a YAML file; their data is read or downloaded."""
    are_files, loaded = all(name.endswith(FILES) for name in names), {}
    known = TaskManager(include_defaults=not are_files)  # the index of the harness's own 14,000 files takes seconds
    for name in names:
        path = os.path.abspath(name) if name.endswith(FILES) else name
        try:
            parts = known.load([path])
        except Exception as e:  # of any kind: a task is a program, and its data comes from anywhere
            raise UsageError(_refusal(name, path, known.all_tasks, e)) from None
        loaded[name] = [parts["groups"][name]] if name in parts["groups"] else list(parts["tasks"].values())
    return loaded


def _refusal(name: str, path: str, known: Sequence[str], e: Exception) -> str:
    reason = " ".join(f"{type(_first(e)).__name__}: {_first(e)}".split())[:300]
    if os.path.isfile(path):
        return f"task {name} cannot be loaded ({reason}); correct the file, or the path of its data"
    if name.endswith(FILES):
        return f"task {name}: no such file"
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3))
        return f"task {name} is not one of lm-evaluation-harness{f'; did you mean {near}?' if near else ''}"
    remedy = "connect to the internet once, which stores it in ~/.cache/huggingface, or copy that folder here"
    return f"the data of task {name} cannot be read ({reason}); {remedy}"


def _first(e: BaseException) -> BaseException:
    cause = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return e if cause is None else _first(cause)


def evaluate(model: Model, loaded: dict[str, list], limit: int, stop: Callable[[], bool]) -> dict[str, dict]:
    """Return {task: {metric: value, questions}} of loaded tasks, on the first `limit` questions of each (0: all).

    Raises Interrupted once `stop()` is True.
    """
    longest = max(phase.lengths[-1] for phase in model.config.phases.values())  # as the `hf` export has it
    harness, tasks = Harness(model, longest, stop), [task for parts in loaded.values() for task in parts]
    options = {
        "log_samples": False,
        "bootstrap_iters": 0,
        "torch_random_seed": None,
        "task_manager": TaskManager(include_defaults=False),
    }
    said = lm_eval.simple_evaluate(harness, tasks=tasks, limit=limit or None, **options)
    counts = {name: {"questions": count["effective"]} for name, count in said.get("n-samples", {}).items()}
    return {name: _numbers(values) | counts.get(name, {}) for name, values in said["results"].items()}


def _numbers(values: dict) -> dict[str, float]:
    """Return a task's metrics by name, such as acc, or exact_match,strict-match of a filter."""
    names = {key: key.removesuffix(",none") for key, x in values.items() if "," in key and isinstance(x, int | float)}
    return {name: float(values[key]) for key, name in names.items() if math.isfinite(values[key])}
