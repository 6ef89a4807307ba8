"""The engine's thread and the routes over it, with an engine that plays a script."""

import asyncio
import concurrent.futures
import contextlib
import json
import signal
import time
import types
import weakref

import httpx2
import openai
import pytest

from lowrank_jax.config import UsageError
from lowrank_jax.inference.engine import Piece, Request
from lowrank_jax.inference.server import api, bodies, connections, routes
from lowrank_jax.inference.server import scheduler as scheduler_module
from lowrank_jax.inference.server.api import Problem, Settings
from lowrank_jax.inference.server.routes import Server
from lowrank_jax.inference.server.scheduler import Scheduler, Ticket


class Fake:
    """An engine that answers a prompt by repeating its first id, which takes `pace` seconds per token.

    `order` has the first ids that it received, `mosts` the most tokens of its steps.
    """

    is_reading, pace, mosts = False, 0.001, ()

    def __init__(self, slots: int, order: list, failures: list):
        self.slots, self.context, self.order, self.failures = slots, 64, order, failures
        self.rows = {}

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    def add(self, request: Request) -> int:
        ids = request.ids
        if len(ids) >= self.context:
            raise UsageError("too long")
        slot = next(slot for slot in range(self.slots) if slot not in self.rows)
        self.rows[slot] = [ids[0], request.max_new]
        self.order.append(ids[0])
        return slot

    def step(self, most: int = 1) -> dict[int, Piece]:
        if self.failures and self.order[-1:] != [0]:  # not while it warms up
            raise self.failures.pop()
        self.mosts += ((len(self.rows), most),)
        count = min([most if self.pace > 0.001 else 1, *(row[1] for row in self.rows.values())])
        time.sleep(self.pace * count)  # the loop has its turns
        pieces = {}
        for slot, row in list(self.rows.items()):
            row[1] -= count
            pieces[slot] = Piece([row[0]] * count, [], None if row[1] else "length")
            if not row[1]:
                del self.rows[slot]
        return pieces

    def drop(self, slot: int) -> None:
        del self.rows[slot]


def request(first: int, max_new: int = 5, length: int = 1) -> Request:
    return Request([first] * length, max_new)


@contextlib.asynccontextmanager
async def scheduling(slots: int = 2, queue: int = 4, failures: tuple = ()):
    """Yield a scheduler, the first ids of prompts in the order in which its engines got them, and failures to come."""
    order, failing = [], list(failures)
    scheduler = Scheduler(lambda: Fake(slots, order, failing), slots + queue)
    scheduler.start()
    order.clear()
    try:
        yield scheduler, order, failing
    finally:
        scheduler.close()
        await asyncio.to_thread(scheduler.thread.join, 10)
        assert not scheduler.thread.is_alive()


async def finish(ticket, count: int = 1) -> dict[int, list[int]]:
    """Return all ids of each of the ticket's requests."""
    ids, left = {}, count
    async for i, piece in ticket.pieces(asyncio.get_running_loop().time() + 10):
        ids.setdefault(i, []).extend(piece.ids)
        left -= piece.finish is not None
        if not left:
            return ids


def test_first_come_first_served_and_each_gets_its_own():
    async def run():
        async with scheduling(slots=2, queue=20) as (scheduler, order, _):
            tickets = [scheduler.submit([request(10 * n + 10), request(10 * n + 11)]) for n in range(6)]
            for n, ticket in enumerate(tickets):
                assert await finish(ticket, 2) == {0: [10 * n + 10] * 5, 1: [10 * n + 11] * 5}
            assert order == [10 * n + 10 + i for n in range(6) for i in range(2)]
            assert not scheduler.waiting and not scheduler.active

    asyncio.run(run())


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_decoding_loop_is_short_while_a_request_may_wait_for_its_end(monkeypatch, is_reading):
    monkeypatch.setattr(Fake, "pace", 0.004)
    monkeypatch.setattr(Fake, "is_reading", is_reading)

    async def run():
        async with scheduling(slots=2) as (scheduler, *_):
            for count in (1, 2):
                await finish(scheduler.submit([request(1, max_new=60)] * count), count)
            steps = {rows: [most for n, most in scheduler._engine.mosts if n == rows][-3:] for rows in (1, 2)}
            assert max(steps[1]) <= 2  # 8 ms
            assert max(steps[2]) <= 2 if is_reading else min(steps[2]) > 4  # 50 ms, on a busy machine fewer steps

    asyncio.run(run())


def test_a_slot_is_free_before_the_client_sees_the_end(monkeypatch):
    async def run():
        async with scheduling(slots=1, queue=0) as (scheduler, *_):
            put, places = Ticket.put, []
            note = lambda ticket, i, piece: (
                places.append((piece.finish, len(scheduler.active))),
                put(ticket, i, piece),
            )
            monkeypatch.setattr(Ticket, "put", note)
            for n in (1, 2):  # there is no queue, and yet the second is taken
                assert await finish(scheduler.submit([request(n, max_new=2)])) == {0: [n] * 2}
            assert places == [(None, 1), ("length", 0)] * 2

    asyncio.run(run())


def test_a_full_queue_refuses_all_requests_of_a_call_and_cancelling_makes_room():
    async def run():
        async with scheduling(slots=1, queue=2) as (scheduler, order, _):
            long = [scheduler.submit([request(n, max_new=10**9)]) for n in (1, 2)]
            with pytest.raises(Problem, match="too many requests"):
                scheduler.submit([request(3), request(4)])
            third = scheduler.submit([request(5)])
            with pytest.raises(Problem, match="too many requests"):
                scheduler.submit([request(6)])
            long[1].cancel()  # it waits
            long[0].cancel()  # it has the slot
            assert await finish(third) == {0: [5] * 5}
            assert 3 not in order and 2 not in order

    asyncio.run(run())


def test_one_request_of_a_ticket_may_end_early():
    async def run():
        async with scheduling() as (scheduler, *_):
            ticket = scheduler.submit([request(1, max_new=10**9), request(2, max_new=400)])
            ticket.cancel(0)
            async for i, piece in ticket.pieces(asyncio.get_running_loop().time() + 10):
                if i == 1 and piece.finish:
                    break
            while scheduler.active:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_failure_ends_active_requests_and_a_new_engine_goes_on(capfd):
    async def run():
        async with scheduling(slots=1, failures=[ValueError("lost"), ValueError("lost")]) as (scheduler, *_):
            tickets = [scheduler.submit([request(n)]) for n in (1, 2, 3)]
            for ticket in tickets[:2]:
                with pytest.raises(Problem, match="the engine failed .*lost"):
                    await finish(ticket)
            assert await finish(tickets[2]) == {0: [3] * 5}
            assert scheduler.failures == 2 and scheduler.thread.is_alive()
            with pytest.raises(Problem, match="too long"):
                await finish(scheduler.submit([request(1, length=99)]))
            assert await finish(scheduler.submit([request(4)])) == {0: [4] * 5}

    asyncio.run(run())
    assert "ValueError: lost" in capfd.readouterr().err


def test_closing_ends_every_request_and_nobody_waits_past_the_deadline():
    async def run():
        async with scheduling(slots=1) as (scheduler, *_):
            tickets = [scheduler.submit([request(n, max_new=10**9)]) for n in (1, 2)]
            with pytest.raises(TimeoutError):
                async for _ in tickets[1].pieces(asyncio.get_running_loop().time() + 0.05):
                    raise AssertionError("it waits behind the first")
            scheduler.close()
            for ticket in tickets:
                with pytest.raises(Problem, match="stopping"):
                    await finish(ticket)
            with pytest.raises(Problem, match="stopping"):
                scheduler.submit([request(3)])

    asyncio.run(run())


def routes_over(tok, scheduler: Scheduler, timeout: float = 10.0, **access):
    """Return the routes as an application with a context so large that only `max_tokens` ends an answer."""
    access = {"hosts": ("test",)} | access
    settings = Settings("m", tok.vocab_size, 10**9, max_tokens=10**8, answers=5, timeout=timeout, **access)
    return Server(scheduler, tok, settings).app()


def client_of(app, key: str = "none") -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(app))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, max_retries=0, http_client=http)


async def settled(scheduler: Scheduler) -> None:
    """Return once no answer waits or has a slot."""
    async with asyncio.timeout(10):
        while scheduler.active or scheduler.waiting:
            await asyncio.sleep(0.002)


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDLESS = {"model": "m", "prompt": [500], "max_tokens": 10**8}


def test_only_v1_needs_the_key(tok):
    async def run():
        async with scheduling() as (scheduler, *_):
            app = routes_over(tok, scheduler, keys=("s3cret",))
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
                for path, body in ((CHAT, "{}"), (TEXT, "{"), ("/v1/nothing", "")):
                    for key in (None, "Bearer s3cre", "Bearer s3crets", "s3cret", "Bearer "):
                        response = await http.post(path, content=body, headers={"Authorization": key} if key else {})
                        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                for scheme in ("Bearer", "bearer", "BEARER"):
                    response = await http.get("/v1/models", headers={"Authorization": f"{scheme} s3cret"})
                    assert response.status_code == 200
                assert (await http.get("/healthz")).status_code == 200 and "<html" in (await http.get("/")).text
            with pytest.raises(openai.AuthenticationError):
                await client_of(app, "wrong").models.list()
            client = client_of(app, "s3cret")
            assert [m.id for m in (await client.models.list()).data] == ["m"]
            with pytest.raises(openai.BadRequestError, match="at most 100000000"):
                await client.completions.create(**ENDLESS | {"max_tokens": 10**8 + 1})
            assert (await client.completions.create(**ENDLESS | {"max_tokens": 3})).usage.completion_tokens == 3

    asyncio.run(run())


def test_a_full_queue_refuses_and_says_when_to_come_again(tok):
    async def run():
        async with scheduling(slots=1, queue=1) as (scheduler, *_):
            client = client_of(routes_over(tok, scheduler))
            before = [scheduler.submit([request(n, max_new=10**9)]) for n in (1, 2)]
            with pytest.raises(openai.RateLimitError) as e:
                await client.completions.create(**ENDLESS)
            assert e.value.response.headers["retry-after"] == "1" and e.value.code == "queue_full"
            for ticket in before:
                ticket.cancel()
            await settled(scheduler)
            assert (await client.completions.create(**ENDLESS | {"max_tokens": 3})).usage.completion_tokens == 3

    asyncio.run(run())


def test_an_answer_past_the_timeout_is_an_error_and_frees_its_slots(tok):
    async def run():
        async with scheduling() as (scheduler, *_), asyncio.timeout(8):
            client = client_of(routes_over(tok, scheduler, timeout=0.25))
            with pytest.raises(openai.InternalServerError, match="within 0.25 seconds") as e:
                await client.completions.create(**ENDLESS, n=2)
            assert e.value.status_code == 504 and e.value.code == "timeout"
            await settled(scheduler)
            texts = []
            with pytest.raises(openai.APIError, match="within 0.25 seconds"):
                async for chunk in await client.completions.create(**ENDLESS, stream=True):
                    texts.append(chunk.choices[0].text)
            assert texts
            await settled(scheduler)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def asking(tok):
    """Yield an HTTP client of the routes over the script's engine."""
    async with scheduling() as (scheduler, *_), asyncio.timeout(8):
        transport = httpx2.ASGITransport(routes_over(tok, scheduler))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http


def test_a_body_that_does_not_arrive_is_an_error(tok, monkeypatch):
    assert bodies.SECONDS == 30  # as the documentation says
    monkeypatch.setattr(bodies, "SECONDS", 0.2)

    async def half():
        yield b'{"prompt": '
        await asyncio.Event().wait()

    async def run():
        async with asking(tok) as http:
            response = await http.post(TEXT, content=half())
            assert response.status_code == 408 and "did not arrive" in response.json()["error"]["message"]

    asyncio.run(run())


def test_large_bodies_have_a_bound_together_and_leave_small_ones_alone(tok, monkeypatch):
    monkeypatch.setattr(bodies, "MOST_LARGE", 150_000)
    large = json.dumps({"prompt": [1], "max_tokens": 1, "user": "a" * 80_000}).encode()
    small = large.replace(b"a" * 80_000, b"a")

    async def run():
        ends = [asyncio.Event() for _ in range(2)]

        async def slow(end):
            yield large[:-10]
            await end.wait()
            yield large[-10:]

        async with asking(tok) as http:
            first = asyncio.create_task(http.post(TEXT, content=slow(ends[0])))
            await asyncio.sleep(0.05)
            refused = await http.post(TEXT, content=large)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "bodies_full"
            assert (await http.post(TEXT, content=b"x" * (5 << 20))).status_code == 413
            assert (await http.post(TEXT, content=small)).status_code == 200
            ends[0].set()
            assert (await first).status_code == 200
            assert (await http.post(TEXT, content=large)).status_code == 200

    asyncio.run(run())


def test_large_bodies_are_parsed_one_at_a_time(tok, monkeypatch):
    running, most, read = [], {}, api.read

    def noting(data, *args, **options):
        running.append(len(data))
        most[len(data)] = max(most.get(len(data), 0), running.count(len(data)))
        time.sleep(0.05)
        running.remove(len(data))
        return read(data, *args, **options)

    monkeypatch.setattr(api, "read", noting)
    rests = []
    monkeypatch.setattr(bodies, "time", types.SimpleNamespace(sleep=rests.append))
    small, large = ({"prompt": [1], "max_tokens": 1, "user": "a" * n} for n in (1, 80_000))

    async def run():
        async with asking(tok) as http:
            answers = await asyncio.gather(*(http.post(TEXT, json=body) for body in (large, small) * 3))
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(run())
    assert sorted(most.items())[0][1] > 1 and sorted(most.items())[1][1] == 1
    assert len(rests) == 3 and all(0.003 < rest < 0.005 for rest in rests)  # 0.2 s for 4 MB


def test_the_values_of_a_refused_body_are_gone_before_the_next_is_read(tok, monkeypatch):
    class Values(list):
        pass

    class Here(concurrent.futures.Executor):
        def submit(self, read, *args):
            future = concurrent.futures.Future()
            try:
                future.set_result(read(*args))
            except Problem as e:
                future.set_exception(e)
            kept.append(values[-1]() is not None)
            return future

    def reading(*_, **__):
        parsed = Values()
        values.append(weakref.ref(parsed))
        raise Problem(400, f"{len(parsed)} values")

    values, kept = [], []
    monkeypatch.setattr(api, "read", reading)
    monkeypatch.setattr(bodies.Bodies, "reader_of", lambda *_: Here())

    async def run():
        async with asking(tok) as http:
            assert (await http.post(TEXT, json={})).status_code == 400

    asyncio.run(run())
    assert kept == [False]


def test_streams_that_are_read_slowly_have_a_bound_together(monkeypatch):
    monkeypatch.setattr(scheduler_module, "MOST_UNREAD", 300)
    monkeypatch.setattr(Ticket, "unread_of_all", 0)
    most = []

    async def run():
        async with scheduling(slots=4, queue=20) as (scheduler, *_):
            for _ in range(4):  # one after the other: streams that have ended wait for their readers too
                unread = [scheduler.submit([request(3, 100)]) for _ in range(3)]
                quick = scheduler.submit([request(5, 100)])
                async for _, piece in quick.pieces(asyncio.get_running_loop().time() + 10):
                    most.append(Ticket.unread_of_all)
                    if piece.finish:
                        break
                quick.cancel()
            assert max(most) <= 300
            with pytest.raises(Problem, match="too slowly"):
                await finish(unread[0])
            await settled(scheduler)
            for ticket in unread:
                ticket.cancel()

    asyncio.run(run())
    assert max(most) > 100


def test_a_stream_that_nobody_reads_ends_and_frees_its_slot(tok, monkeypatch):
    monkeypatch.setattr(routes, "SLOW", 0.2)
    scope = {"type": "http", "method": "POST", "path": TEXT, "query_string": b"", "headers": [], "root_path": ""}

    async def run():
        sent, body = [], iter([json.dumps(ENDLESS | {"stream": True}).encode()])

        async def receive():
            for part in body:
                return {"type": "http.request", "body": part, "more_body": False}
            await asyncio.Event().wait()  # the client does not leave

        async def send(message):
            sent.append(message)
            if len(sent) == 3:  # and after its first two messages takes nothing
                assert len(scheduler.active) == 1
                await asyncio.Event().wait()

        async with scheduling() as (scheduler, *_), asyncio.timeout(8):
            await routes_over(tok, scheduler, timeout=0.2)(scope, receive, send)
            assert len(sent) == 3 and sent[0]["status"] == 200
            await settled(scheduler)

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_a_short_answer_finishes_and_a_long_one_ends_with_an_error(tok, monkeypatch, number):
    monkeypatch.setattr(connections, "GRACE", 0.5)
    listener, url = connections.bind("127.0.0.1", 0)

    async def run():
        async with scheduling() as (scheduler, *_), asyncio.timeout(30):
            app = routes_over(tok, scheduler)
            serving = asyncio.create_task(connections.listen(app, listener, url, scheduler))
            client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
            long = await client.completions.create(**ENDLESS, stream=True)
            short = await client.completions.create(**ENDLESS | {"max_tokens": 40}, stream=True)
            await anext(aiter(long))
            await anext(aiter(short))
            signal.raise_signal(number)
            assert [chunk.choices[0].finish_reason async for chunk in short][-1] == "length"
            with pytest.raises(openai.APIError, match="stopping"):
                async for _ in long:
                    pass
            assert await serving == number

    asyncio.run(run())


def test_each_of_several_answers_has_its_own_index(tok):
    """Two prompts with two answers each, whole and as a stream, while another client is served."""

    async def run():
        async with scheduling(slots=3, queue=20) as (scheduler, *_):
            client = client_of(routes_over(tok, scheduler))
            call = {"model": "m", "prompt": [[400], [300]], "n": 2, "max_tokens": 4}
            beside = client.completions.create(model="m", prompt=[200], max_tokens=4)
            whole, other = await asyncio.gather(client.completions.create(**call), beside)
            expected = [tok.decode([i] * 4) for i in (400, 400, 300, 300)]
            assert len(set(expected)) == 2 and [c.text for c in whole.choices] == expected
            assert [c.index for c in whole.choices] == [0, 1, 2, 3]
            assert [c.text for c in other.choices] == [tok.decode([200] * 4)]
            texts = [""] * 4
            async for chunk in await client.completions.create(**call, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == expected

    asyncio.run(run())


def test_a_failing_engine_is_a_500_or_the_streams_last_event_and_the_server_lives_on(tok):
    async def run():
        async with scheduling(slots=1) as (scheduler, _, failures):
            transport = httpx2.ASGITransport(routes_over(tok, scheduler))
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"prompt": [500], "max_tokens": 5}
                failures.append(RuntimeError("lost"))
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failure"
                failures.append(RuntimeError("lost"))
                response = await client.post("/v1/completions", json=body | {"stream": True})
                *_, error, end = filter(None, response.text.split("\n"))
                assert response.status_code == 200 and end == "data: [DONE]"
                assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
                response = await client.post("/v1/completions", json=body)
                assert response.json()["choices"][0]["text"] == tok.decode([500] * 5)
                assert "lowrank_engine_failures 2.0" in (await client.get("/metrics")).text
                scheduler.close()
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 503 and response.json()["error"]["code"] == "stopping"
                await asyncio.to_thread(scheduler.thread.join, 10)
                assert (await client.get("/healthz")).status_code == 503

    asyncio.run(run())
