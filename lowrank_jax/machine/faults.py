"""Faults on request, so that recovery can be tested on the real program: LOWRANK_FAULTS="kill@step=12,nan@step=30".

| fault | effect |
|---|---|
| kill@step=N | SIGKILL before the N-th update (from 1) of the whole run |
| kill@save=N | SIGKILL while this process writes its N-th checkpoint |
| term@step=N | SIGTERM before the N-th update |
| term@save=N | SIGTERM while this process writes its N-th checkpoint |
| term@eval=N | SIGTERM before the N-th batch that this process evaluates |
| nan@step=N | the N-th update sees NaN losses |
| oom@step=N | before the N-th update a program asks for a petabyte, once, and takes the state with it |
| fp8@step=N | the look at bf16 before the N-th update finds fp8 to be off |
| io@read=N | reading the N-th record that this process reads fails with an I/O error, once |

With :I behind it (kill@step=12:1) a fault is for process I alone, of many.
"""

import itertools
import os
import re
import signal

from lowrank_jax.config import UsageError
from lowrank_jax.machine import processes

VARIABLE = "LOWRANK_FAULTS"
_KNOWN = {("kill", "step"), ("kill", "save"), ("term", "step"), ("nan", "step"), ("oom", "step"), ("fp8", "step")}
_KNOWN |= {("term", "save"), ("term", "eval"), ("io", "read")}

_reads, _evaluated = itertools.count(1), itertools.count(1)
_struck: set[tuple[str, str, int]] = set()


def check() -> None:
    """Raises UsageError where the variable names an unknown fault."""
    _parse()


def due(fault: str, place: str, count: int) -> bool:
    """Whether `fault@place=count` was asked for."""
    return (fault, place, count) in _parse()


def strike(place: str, count: int) -> None:
    """Sends this process the signal that was asked for here, if any."""
    if due("kill", place, count):
        os.kill(os.getpid(), signal.SIGKILL)
    if due("term", place, count):
        os.kill(os.getpid(), signal.SIGTERM)


def strike_evaluation() -> None:
    """`strike` before a batch is evaluated."""
    strike("eval", next(_evaluated))


def run_out_of_memory(step: int, state) -> None:
    """Gives `state` to a program that needs more memory than there is, if that was asked for at this step.

    So the error is the device's own, and the arrays are lost as those that a step is given.
    """
    fault = ("oom", "step", step)
    if due(*fault) and fault not in _struck:
        _struck.add(fault)
        import jax  # here, as processes that tokenise import this file and no JAX
        import jax.numpy as jnp

        greedy = lambda state: (jax.tree.map(jnp.copy, state), jnp.zeros(2**50, jnp.uint8))
        jax.block_until_ready(jax.jit(greedy, donate_argnums=0)(state))


def strike_read() -> None:
    """Raises OSError at the record that was asked for here, if any."""
    if os.environ.get(VARIABLE) and due("io", "read", next(_reads)):
        raise OSError("an I/O error, as LOWRANK_FAULTS asked for")


def _parse() -> set[tuple[str, str, int]]:
    faults = set()
    for item in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = re.fullmatch(r"(\w+)@(\w+)=(\d+)(:\d+)?", item.strip())
        if not match or match.groups()[:2] not in _KNOWN:
            known = ", ".join("@".join(fault) for fault in sorted(_KNOWN))
            raise UsageError(f"{VARIABLE}: unknown fault {item!r}; known: {known}")
        if match[4] in (None, f":{processes.index()}"):
            faults.add((match[1], match[2], int(match[3])))
    return faults
