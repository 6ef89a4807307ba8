"""Tasks of lm-evaluation-harness, such as hellaswag or a YAML file of one's own: optional, see harness.py."""

import functools
import importlib.util
from collections.abc import Callable

from lowrank_jax.config import UsageError
from lowrank_jax.inference.session import Model


def check(names: tuple[str, ...], flag: str) -> None:
    """Raise UsageError where there are no names, or where the harness is not installed."""
    if not names:
        raise UsageError(f"{flag} names no task; name some, such as hellaswag,my_task.yaml")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"{flag} needs lm-evaluation-harness, which is not installed: pip install lm_eval")


@functools.cache
def load(names: tuple[str, ...]) -> dict[str, list]:
    """Return the tasks of each name with their data; raises UsageError for one that cannot be had."""
    from lowrank_jax.training import harness  # takes seconds to import

    return harness.load(names)


def run(model: Model, names: tuple[str, ...], limit: int, stop: Callable[[], bool] = lambda: False) -> dict[str, dict]:
    """Return {task: {metric: value, questions}}, on the first `limit` questions of each task (0: all)."""
    from lowrank_jax.training import harness

    return harness.evaluate(model, load(names), limit, stop)


def describe(results: dict[str, dict]) -> str:
    numbers = lambda of: ", ".join(f"{name} {value:.4g}" for name, value in of.items())
    return "; ".join(f"{task}: {numbers(values)}" for task, values in results.items())
