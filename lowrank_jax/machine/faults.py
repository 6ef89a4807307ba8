"""Faults on request, which test recovery in the real program: LOWRANK_FAULTS="kill@step=12,nan@step=30".

| fault | effect |
|---|---|
| kill@step=N | SIGKILL before the N-th update (from 1) of the whole run |
| kill@save=N | SIGKILL while this process writes its N-th checkpoint |
| term@step=N | SIGTERM before the N-th update |
| term@save=N | SIGTERM while this process writes its N-th checkpoint |
| term@eval=N | SIGTERM before the N-th batch that this process evaluates |
| nan@step=N | the losses of the N-th update are NaN |
| oom@step=N | before the N-th update a program asks for a petabyte, once, and destroys the state |
| fp8@step=N | the comparison with bf16 before the N-th update reports that fp8 is wrong |
| io@read=N | the N-th record that this process reads fails with an I/O error, once |

A fault that ends in :I (kill@step=12:1) strikes process I alone.
"""

import itertools
import os
import re
import signal

from lowrank_jax.config import UsageError
from lowrank_jax.machine import processes

VARIABLE = "LOWRANK_FAULTS"
_KNOWN = "fp8@step io@read kill@save kill@step nan@step oom@step term@eval term@save term@step".split()

_reads, _evaluations = itertools.count(1), itertools.count(1)
_struck: set[tuple[str, str, int]] = set()


def due(fault: str, place: str, count: int) -> bool:
    """Return whether the variable names `fault@place=count` for this process."""
    return (fault, place, count) in check()


def strike(place: str, count: int) -> None:
    """Send this process the signal that is due at this place, if any."""
    for fault, number in (("kill", signal.SIGKILL), ("term", signal.SIGTERM)):
        if due(fault, place, count):
            os.kill(os.getpid(), number)


def strike_evaluation() -> None:
    strike("eval", next(_evaluations))


def run_out_of_memory(step: int, state) -> None:
    """Donate `state` to a program that needs a petabyte, if that fault is due at this step.

    So the error is the device's own, and the state's arrays are lost as they would be in a real step.
    """
    fault = ("oom", "step", step)
    if due(*fault) and fault not in _struck:
        _struck.add(fault)
        import jax  # not at the top: processes that tokenise import this file and must not wait for JAX
        import jax.numpy as jnp

        greedy = lambda state: (jax.tree.map(jnp.copy, state), jnp.zeros(2**50, jnp.uint8))
        jax.block_until_ready(jax.jit(greedy, donate_argnums=0)(state))


def strike_read() -> None:
    """Raise OSError at the record whose read is due to fail, if any."""
    if os.environ.get(VARIABLE) and due("io", "read", next(_reads)):
        raise OSError("an I/O error, as LOWRANK_FAULTS asked for")


def check() -> set[tuple[str, str, int]]:
    """Return the (fault, place, count) that the variable names for this process; raises UsageError for unknown ones."""
    faults = set()
    for item in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = re.fullmatch(r"(\w+)@(\w+)=(\d+)(:\d+)?", item.strip())
        if not match or f"{match[1]}@{match[2]}" not in _KNOWN:
            raise UsageError(f"{VARIABLE}: unknown fault {item!r}; known: {', '.join(_KNOWN)}")
        if match[4] in (None, f":{processes.index()}"):
            faults.add((match[1], match[2], int(match[3])))
    return faults
