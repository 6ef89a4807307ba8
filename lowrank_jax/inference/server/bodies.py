"""The bodies of requests: together they take bounded memory, and large ones are parsed one at a time.

Parsed JSON takes up to thirty times the memory of its text, and no other thread runs while it is parsed: 4 MB of empty
lists take 110 MB and 0.25 s.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from lowrank_jax.inference.server.api import Problem

MOST_BYTES = 4 << 20  # of a body
LARGE = 64 << 10  # bytes; larger bodies share one thread and MOST_LARGE
MOST_LARGE = 48 << 20  # bytes of all large bodies that arrive or wait to be parsed
SECONDS = 30.0  # for a body to arrive
READERS = 4  # threads that parse small bodies: their turns of the interpreter must leave time for the event loop


class Bodies:
    """Receives bodies, and has the threads that parse them."""

    def __init__(self):
        self._large_bytes = 0
        self._small_readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._large_reader = ThreadPoolExecutor(1, thread_name_prefix="large_reader")

    def reader_of(self, data: bytes) -> ThreadPoolExecutor:
        """Return the threads that may parse a body."""
        return self._small_readers if len(data) <= LARGE else self._large_reader

    def rest_after(self, data: bytes) -> None:
        """Let the event loop have some turns before the next body is parsed, the longer the larger this one was.

        Each of its system calls lets a parsing thread run, for 0.1 s with 4 MB: without a rest, four such bodies in a
        row made /healthz wait 0.6 s.
        """
        if len(data) > LARGE:
            time.sleep(0.2 * len(data) / MOST_BYTES)

    @contextlib.asynccontextmanager
    async def body(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the body that arrives in a stream; it counts until the block ends."""
        parts = []
        try:
            try:
                async with asyncio.timeout(SECONDS):
                    await self._receive(stream, parts)
            except TimeoutError:
                raise Problem(408, f"the body did not arrive within {SECONDS:.0f} seconds") from None
            yield b"".join(parts)
        finally:
            self._forget(parts)

    async def _receive(self, stream: AsyncIterator[bytes], parts: list[bytes]) -> None:
        """Fill `parts`. A body that is refused is read to its end, because the client reads no error before."""
        size, problem = 0, None
        async for part in stream:
            size += len(part)
            if size > 16 * MOST_BYTES:
                break
            if problem:
                continue
            parts.append(part)
            self._large_bytes += _counted(size) - _counted(size - len(part))
            if size > MOST_BYTES:
                problem = Problem(413, f"the body must have at most {MOST_BYTES} bytes")
            elif size > LARGE and self._large_bytes > MOST_LARGE:
                message = f"too many bodies of more than {LARGE} bytes arrive at once; try again soon"
                problem = Problem(503, message, code="bodies_full")
            if problem:
                self._forget(parts)
        if problem:
            raise problem

    def _forget(self, parts: list[bytes]) -> None:
        self._large_bytes -= _counted(sum(map(len, parts)))
        parts.clear()


def _counted(size: int) -> int:
    return size if size > LARGE else 0
