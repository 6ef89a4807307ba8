"""The thread that runs the engine, and the routes over it, with an engine that is told what to do."""

import asyncio
import contextlib
import json

import httpx2
import pytest

from lowrank_jax import api
from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.engine import Piece
from lowrank_jax.routes import Server, Settings
from lowrank_jax.sampling import Sampling
from lowrank_jax.scheduler import Full, Order, Scheduler, Stopping


class Fake:
    """An engine whose answer to a prompt is its first id, again and again; `order` is what it was given."""

    def __init__(self, slots: int, order: list, failures: list):
        self.slots, self.context, self.order, self.failures = slots, 64, order, failures
        self.rows = {}

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    def add(self, ids, max_new, sampling, logprobs) -> int:
        if len(ids) >= self.context:
            raise UsageError("too long")
        slot = next(slot for slot in range(self.slots) if slot not in self.rows)
        self.rows[slot] = [ids[0], max_new]
        self.order.append(ids[0])
        return slot

    def step(self) -> dict[int, Piece]:
        if self.failures and self.order[-1:] != [0]:  # not while it warms up
            raise self.failures.pop()
        pieces = {}
        for slot, row in list(self.rows.items()):
            row[1] -= 1
            pieces[slot] = Piece([row[0]], [], None if row[1] else "length")
            if not row[1]:
                del self.rows[slot]
        return pieces

    def drop(self, slot: int) -> None:
        del self.rows[slot]


def order(first: int, max_new: int = 5, length: int = 1) -> Order:
    return Order([first] * length, max_new, Sampling(), 0)


@contextlib.asynccontextmanager
async def scheduling(slots: int = 2, queue: int = 4, failures: tuple = ()):
    """A scheduler, the prompts' first ids in the order in which its engines got them, and their failures to come."""
    given, failing = [], list(failures)
    scheduler = Scheduler(lambda: Fake(slots, given, failing), slots, queue)
    scheduler.start()
    given.clear()
    try:
        yield scheduler, given, failing
    finally:
        scheduler.close()
        assert await asyncio.to_thread(scheduler.join, 10)


async def finish(ticket, count: int = 1) -> dict[int, list[int]]:
    """All ids of each of the ticket's orders."""
    ids, left = {}, count
    async for i, piece in ticket.pieces(asyncio.get_running_loop().time() + 10):
        ids.setdefault(i, []).extend(piece.ids)
        left -= piece.finish is not None
        if not left:
            return ids


def test_first_come_first_served_and_each_gets_its_own():
    async def run():
        async with scheduling(slots=2, queue=20) as (scheduler, given, _):
            tickets = [scheduler.submit([order(10 * n + 10), order(10 * n + 11)]) for n in range(6)]
            for n, ticket in enumerate(tickets):
                assert await finish(ticket, 2) == {0: [10 * n + 10] * 5, 1: [10 * n + 11] * 5}
            assert given == [10 * n + 10 + i for n in range(6) for i in range(2)]
            assert scheduler.waiting == scheduler.active == 0

    asyncio.run(run())


def test_what_is_too_much_is_refused_whole_and_what_is_cancelled_makes_room():
    async def run():
        async with scheduling(slots=1, queue=2) as (scheduler, given, _):
            long = [scheduler.submit([order(n, max_new=10**9)]) for n in (1, 2)]
            with pytest.raises(Full):
                scheduler.submit([order(3), order(4)])
            third = scheduler.submit([order(5)])
            with pytest.raises(Full):
                scheduler.submit([order(6)])
            long[1].cancel()  # it waits
            long[0].cancel()  # it has the slot
            assert await finish(third) == {0: [5] * 5}
            assert 3 not in given and 2 not in given

    asyncio.run(run())


def test_one_of_a_tickets_orders_may_end_early():
    async def run():
        async with scheduling() as (scheduler, *_):
            ticket = scheduler.submit([order(1, max_new=10**9), order(2, max_new=400)])
            ticket.cancel(0)
            async for i, piece in ticket.pieces(asyncio.get_running_loop().time() + 10):
                if i == 1 and piece.finish:
                    break
            while scheduler.active:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_failure_ends_what_is_under_way_and_a_new_engine_goes_on(capfd):
    async def run():
        async with scheduling(slots=1, failures=[ValueError("lost"), ValueError("lost")]) as (scheduler, *_):
            tickets = [scheduler.submit([order(n)]) for n in (1, 2, 3)]
            for ticket in tickets[:2]:
                with pytest.raises(RunFailure, match="lost"):
                    await finish(ticket)
            assert await finish(tickets[2]) == {0: [3] * 5}
            assert scheduler.failures == 2 and scheduler.alive
            with pytest.raises(UsageError, match="too long"):
                await finish(scheduler.submit([order(1, length=99)]))
            assert await finish(scheduler.submit([order(4)])) == {0: [4] * 5}

    asyncio.run(run())
    assert "ValueError: lost" in capfd.readouterr().err


def test_an_end_is_told_to_everyone_and_nobody_waits_longer_than_asked():
    async def run():
        async with scheduling(slots=1) as (scheduler, *_):
            tickets = [scheduler.submit([order(n, max_new=10**9)]) for n in (1, 2)]
            with pytest.raises(TimeoutError):
                async for _ in tickets[1].pieces(asyncio.get_running_loop().time() + 0.05):
                    raise AssertionError("it waits behind the first")
            scheduler.close()
            for ticket in tickets:
                with pytest.raises(Stopping):
                    await finish(ticket)
            with pytest.raises(Stopping):
                scheduler.submit([order(3)])

    asyncio.run(run())


def test_a_failing_engine_is_a_500_or_the_streams_last_event_and_the_server_lives_on(tok):
    async def run():
        async with scheduling(slots=1) as (scheduler, _, failures):
            settings = Settings(api.Limits("m", tok.vocab_size, 64, 64, 5), 10.0, "")
            app = httpx2.ASGITransport(Server(scheduler, tok, settings).app())
            async with httpx2.AsyncClient(transport=app, base_url="http://test") as client:
                ask = {"prompt": [500], "max_tokens": 5}
                failures.append(RuntimeError("lost"))
                response = await client.post("/v1/completions", json=ask)
                assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failure"
                failures.append(RuntimeError("lost"))
                response = await client.post("/v1/completions", json=ask | {"stream": True})
                *_, error, end = filter(None, response.text.split("\n"))
                assert response.status_code == 200 and end == "data: [DONE]"
                assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
                response = await client.post("/v1/completions", json=ask)
                assert response.json()["choices"][0]["text"] == tok.decode([500] * 5)
                assert "lowrank_engine_failures 2.0" in (await client.get("/metrics")).text
                scheduler.close()
                response = await client.post("/v1/completions", json=ask)
                assert response.status_code == 503 and response.json()["error"]["code"] == "stopping"
                await asyncio.to_thread(scheduler.join, 10)
                assert (await client.get("/healthz")).status_code == 503

    asyncio.run(run())
