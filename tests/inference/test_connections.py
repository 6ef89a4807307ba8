"""Connections that are late, idle, unread or too many do not keep others from the server."""

import asyncio
import contextlib
import json
import resource
import socket

import pytest
from test_scheduler import routes_over, scheduling, settled

from lowrank_jax.inference.server import connections

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"  # the rest does not come


@contextlib.asynccontextmanager
async def listening(tok):
    """Yield a function that opens a connection to a server in this loop, and the server's scheduler."""
    listener, url = connections.bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    async with scheduling() as (scheduler, *_), asyncio.timeout(30):
        serving = asyncio.create_task(connections.listen(routes_over(tok, scheduler), listener, url, scheduler))
        await asyncio.sleep(0.05)
        yield lambda: asyncio.open_connection(*listener.getsockname()), scheduler
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def is_closed(reader: asyncio.StreamReader, seconds: float = 5.0) -> bool:
    """Read to the end; return False if it does not come in time."""
    with contextlib.suppress(ConnectionError):
        try:
            async with asyncio.timeout(seconds):
                while await reader.read(1 << 16):
                    pass
        except TimeoutError:
            return False
    return True


async def is_healthy(connect) -> bool:
    reader, writer = await connect()
    writer.write(HEALTH)
    status = await asyncio.wait_for(reader.readline(), 2)
    writer.close()
    return b" 200 " in status


@pytest.fixture
def hurry(monkeypatch):
    for name, seconds in (("HEAD_SECONDS", 0.3), ("IDLE_SECONDS", 0.8), ("READ_SECONDS", 0.3)):
        monkeypatch.setattr(connections, name, seconds)


def test_a_head_that_does_not_end_closes_the_connection(tok, hurry):
    async def run():
        async with listening(tok) as (connect, _):
            for start in (b"", b"GET /healthz HTTP/1.1\r\nHost: "):
                reader, writer = await connect()
                for letter in start:  # a letter at a time does not help
                    writer.write(bytes([letter]))
                    await asyncio.sleep(0.003)
                assert await is_closed(reader, 2)
            reader, writer = await connect()
            writer.write(HEALTH)
            assert b"200" in await reader.readline()
            writer.write(HEALTH[:9])  # the next head begins, and does not end
            assert await is_closed(reader, 0.7)
            reader, writer = await connect()
            writer.write(HEALTH)
            assert not await is_closed(reader, 0.5) and await is_closed(reader, 2)  # idle, as browsers are for a while

    asyncio.run(run())


def test_a_long_answer_is_no_idle_connection_and_pipelined_requests_are_answered(tok, hurry):
    async def run():
        async with listening(tok) as (connect, _):
            reader, writer = await connect()
            body = json.dumps({"prompt": [500], "max_tokens": 1200, "stream": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body + HEALTH)
            text = b""
            async with asyncio.timeout(20):
                while b'"ok"' not in text:
                    assert (part := await reader.read(1 << 16)), text[-300:]
                    text += part
            assert b"[DONE]" in text and text.count(b"data: ") > 1000  # it took longer than all limits

    asyncio.run(run())


def test_a_client_that_does_not_read_is_left(tok, hurry, monkeypatch):
    monkeypatch.setattr(connections, "GRACE", 0.1)

    async def run():
        async with listening(tok) as (connect, scheduler):
            _, writer = await connect()
            writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            writer.transport.pause_reading()
            body = json.dumps({"prompt": [500], "max_tokens": 10**8, "stream": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body)
            while not scheduler.active:
                await asyncio.sleep(0.01)
            await settled(scheduler)

    asyncio.run(run())


@pytest.mark.parametrize("start", [b"", HEALTH[:9], BODY])
def test_silent_connections_at_the_limit_of_files_lock_nobody_out(tok, monkeypatch, capfd, start):
    monkeypatch.setattr(connections.Connection, "has_warned", False)

    async def run():
        async with listening(tok) as (connect, _):
            monkeypatch.setattr(connections, "most_connections", lambda: 20)
            silent = [await connect() for _ in range(60)]
            for _, writer in silent:
                writer.write(start)
            assert await is_healthy(connect)
            closed = [await is_closed(reader, 0.02) for reader, _ in silent]
            assert closed == [True] * 41 + [False] * 19  # the longest silent ones

    asyncio.run(run())
    assert capfd.readouterr().err.count("more than 20 connections") == 1


@pytest.mark.parametrize("files, most", [(256, 96), (20, 16), (10**6, 10_000), (resource.RLIM_INFINITY, 10_000)])
def test_the_limit_leaves_files_for_the_server(monkeypatch, files, most):
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (files, files))
    assert connections.most_connections() == most


def test_a_lack_of_files_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(connections.Connection, "has_warned", False)
    loop = asyncio.new_event_loop()
    for _ in range(3):
        connections.report_once(loop, {"message": "socket.accept() out of system resource"})
    loop.close()
    assert capfd.readouterr().err.count("\n") == 1
