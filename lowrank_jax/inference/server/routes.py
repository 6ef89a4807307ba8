"""The server's routes: HTTP around requests (api.py), the scheduler and answers; streams, metrics, the chat page.

Whatever goes wrong is told in OpenAI's shape, and the server lives on. A client that leaves gives its slots back.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import pathlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import NamedTuple

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference.sampling import PRESETS
from lowrank_jax.inference.server import api
from lowrank_jax.inference.server.answers import Answer, Shapes
from lowrank_jax.inference.server.api import Problem, Question
from lowrank_jax.inference.server.scheduler import Full, Order, Scheduler, Stopping, Ticket

PAGE = pathlib.Path(__file__).with_name("chat.html")
MOST_BYTES = 4 << 20  # of a body
SLOW = 30.0  # seconds that a body may take to arrive, and an answer to be taken
CLIENT_GONE = 499  # what the metrics call a request whose client did not wait
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Settings(NamedTuple):
    limits: api.Limits
    timeout: float  # seconds from a request to the end of its answer
    key: str  # empty: everybody may ask


class Metrics:
    """What /metrics tells."""

    def __init__(self, scheduler: Scheduler):
        prometheus.disable_created_metrics()
        self.registry = prometheus.CollectorRegistry()
        own = {"registry": self.registry}
        prometheus.ProcessCollector(**own)
        self.requests = prometheus.Counter("lowrank_requests", "Requests", ["route", "status"], **own)
        self.read = prometheus.Counter("lowrank_prompt_tokens", "Tokens of prompts", **own)
        self.written = prometheus.Counter("lowrank_generated_tokens", "Tokens of answers", **own)
        self.first = prometheus.Histogram(
            "lowrank_time_to_first_token_seconds", "From a request to each answer's first token", buckets=SECONDS, **own
        )
        self.each = prometheus.Histogram(
            "lowrank_time_per_token_seconds", "Of each answer, the mean after the first token", buckets=SECONDS, **own
        )
        for name, what, value in (
            ("lowrank_queue_length", "Answers that wait for a slot", lambda: scheduler.waiting),
            ("lowrank_active_rows", "Answers that have a slot", lambda: scheduler.active),
            ("lowrank_engine_failures", "Times the engine had to be made anew", lambda: scheduler.failures),
        ):
            prometheus.Gauge(name, what, **own).set_function(value)


class Server:
    """The routes, over one scheduler."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, settings: Settings):
        self.scheduler, self.tokenizer, self.settings = scheduler, tokenizer, settings
        self.metrics = Metrics(scheduler)
        page = PAGE.read_text(encoding="utf-8")
        self._page, self._policy = page, _policy(page)
        self._started = int(time.time())

    def app(self) -> Callable:
        """The ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/healthz", self.health),
            Route("/metrics", self.tell_metrics),
        ]
        handlers = {Problem: _tell_problem, HTTPException: _tell_http, ClientDisconnect: _tell_gone, 500: _tell_crash}
        return self._outside(Starlette(routes=routes, exception_handlers=handlers))

    def _outside(self, app: Callable) -> Callable:
        """Around all routes: the key, the headers that every response has, and the count of requests."""

        async def outside(scope, receive, send):
            status = CLIENT_GONE

            async def sending(message):
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                await send(message)

            try:
                if problem := self._unwelcome(scope):
                    await _refusal(problem)(scope, receive, sending)
                else:
                    await app(scope, receive, sending)
            finally:
                status = CLIENT_GONE if "client_gone" in scope else status
                route = scope["route"].path if "route" in scope else "other"
                self.metrics.requests.labels(route, str(status)).inc()

        return outside

    def _unwelcome(self, scope) -> Problem | None:
        if not scope["path"].startswith("/v1/"):
            return None
        headers = dict(scope["headers"])
        wanted = f"Bearer {self.settings.key}".encode()
        if self.settings.key and not hmac.compare_digest(headers.get(b"authorization", b""), wanted):
            return Problem(401, "the API key is missing or wrong", code="invalid_api_key")
        # A browser names the page that asks. Without a key, any page could set this machine to work.
        origin = headers.get(b"origin")
        if not self.settings.key and origin is not None and origin.partition(b"//")[2] != headers.get(b"host"):
            return Problem(403, "pages of other sites may ask with an API key alone", code="foreign_origin")
        return None

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer"}
        return HTMLResponse(self._page, headers={**headers, "Cache-Control": "no-cache", "X-Frame-Options": "DENY"})

    async def health(self, request: Request) -> Response:
        alive = self.scheduler.alive
        return _json({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    async def tell_metrics(self, request: Request) -> Response:
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, headers={"Content-Type": prometheus.CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.limits.model:
            raise Problem(404, f"the model {name[:100]!r} does not exist", "model", "model_not_found")
        return _json(self._model())

    def _model(self) -> dict:
        limits = self.settings.limits
        presets = {name: {"temperature": s.temperature, "top_p": s.top_p} for name, s in PRESETS.items()}
        facts = {"context": limits.context, "max_tokens": min(limits.max_tokens, limits.context), "presets": presets}
        return {"id": limits.model, "object": "model", "created": self._started, "owned_by": "lowrank_jax", **facts}

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        body = await _body(request)
        # A long prompt takes a while to encode: others need not wait for it.
        question = await asyncio.to_thread(api.read, body, is_chat, self.tokenizer, self.settings.limits)
        work = Work(self, question, deadline)
        if question.stream:
            return Stream(work, self.settings.timeout + SLOW)
        try:
            response = await _while_connected(request.scope, request.receive, work.whole())
        finally:
            work.ticket.cancel()
        return Response(status_code=CLIENT_GONE) if response is None else _json(response)


class Work:
    """A request that has been taken; raises Problem where it is not. Whoever made it cancels its ticket in the end."""

    def __init__(self, server: Server, question: Question, deadline: float):
        self._server, self._question, self._deadline = server, question, deadline
        samplings, prompts = question.samplings(), [ids for ids in question.prompts for _ in range(question.n)]
        logprobs = 0 if question.logprobs is None else max(1, question.logprobs)
        orders = [Order(list(ids), question.max_tokens, s, logprobs) for ids, s in zip(prompts, samplings)]
        self._answers = [Answer(question, server.tokenizer) for _ in orders]
        self._shapes = Shapes(question, server.settings.limits.model)
        self._began = time.monotonic()
        with _problems(server.settings):
            self.ticket: Ticket = server.scheduler.submit(orders)
        server.metrics.read.inc(sum(map(len, question.prompts)))

    async def whole(self) -> dict:
        """The response to a request that is no stream."""
        texts, told = [""] * len(self._answers), [[] for _ in self._answers]
        async for i, text, tokens in self._pieces():
            texts[i] += text
            told[i] += tokens
        return self._shapes.whole(texts, told, self._answers)

    async def events(self) -> AsyncIterator[dict]:
        """The events of a stream; what goes wrong is the last of them."""
        try:
            for i in range(len(self._answers)) if self._question.is_chat else ():
                yield self._shapes.first(i)
            async for i, text, tokens in self._pieces():
                finish = self._answers[i].finish
                if text or tokens or finish:
                    yield self._shapes.piece(i, text, tokens, finish)
            if self._question.tells_usage:
                yield self._shapes.last(self._answers)
        except Problem as e:
            yield e.body()

    async def _pieces(self) -> AsyncIterator[tuple[int, str, list]]:
        """Of each new piece: whose it is, and what the client is told, until all answers have ended."""
        left, firsts = len(self._answers), [0.0] * len(self._answers)
        with _problems(self._server.settings):
            async for i, piece in self.ticket.pieces(self._deadline):
                answer, now = self._answers[i], time.monotonic()
                if answer.finish:  # at a stop string, which the engine does not know
                    continue
                before = answer.tokens
                text, told = answer.add(piece)
                if not before:
                    firsts[i] = now
                    self._server.metrics.first.observe(now - self._began)
                self._server.metrics.written.inc(answer.tokens - before)
                if answer.finish:
                    left -= 1
                    self.ticket.cancel(i)
                    if answer.tokens > 1 and before:
                        self._server.metrics.each.observe((now - firsts[i]) / (answer.tokens - 1))
                yield i, text, told
                if not left:
                    return


class Stream:
    """A response of server-sent events, for as long as the client listens."""

    def __init__(self, work: Work, seconds: float):
        self._work, self._seconds = work, seconds  # which a client that does not read would exceed

    async def __call__(self, scope, receive, send):
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await _while_connected(scope, receive, self._send(send))
        finally:
            self._work.ticket.cancel()

    async def _send(self, send) -> None:
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._work.events():
            body = f"data: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _while_connected(scope, receive, work: Coroutine):
    """What `work` returns, or None when the client went away before."""

    async def leaving():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        scope["client_gone"] = True
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: Request) -> bytes:
    """The request's body; of one that is too large the rest is read and forgotten, or the client could not listen."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(SLOW):
            async for part in request.stream():
                size += len(part)
                if size <= MOST_BYTES:
                    parts.append(part)
                elif size > 16 * MOST_BYTES:
                    break
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {SLOW:.0f} seconds") from None
    if size > MOST_BYTES:
        raise Problem(413, f"the body must have at most {MOST_BYTES} bytes")
    return b"".join(parts)


@contextlib.contextmanager
def _problems(settings: Settings):
    """Turns what the scheduler raises into what the client is told."""
    try:
        yield
    except Full:
        raise Problem(429, "too many requests are waiting; try again soon", code="queue_full") from None
    except Stopping:
        raise Problem(503, "the server is stopping", code="stopping") from None
    except TimeoutError:
        raise Problem(504, f"there was no answer within {settings.timeout:g} seconds", code="timeout") from None
    except UsageError as e:
        raise Problem(400, str(e)) from None
    except RunFailure as e:
        raise Problem(500, str(e), code="engine_failure") from None


def _json(value: dict, status: int = 200, headers: dict | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def _refusal(problem: Problem, headers: dict | None = None) -> Response:
    headers = dict(headers or {})
    if problem.status in (429, 503):
        headers["Retry-After"] = "1"
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(problem.body(), problem.status, headers)


async def _tell_problem(request: Request, problem: Problem) -> Response:
    return _refusal(problem)


async def _tell_http(request: Request, e: HTTPException) -> Response:
    return _refusal(Problem(e.status_code, f"{request.method} {request.url.path[:100]}: {e.detail}"), e.headers)


async def _tell_gone(request: Request, e: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _tell_crash(request: Request, e: Exception) -> Response:
    return _refusal(Problem(500, "the server made a mistake"))


def _policy(page: str) -> str:
    """A content security policy under which the page runs its own script and style, and talks to this server alone."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    rules = {"default-src": "'none'", "script-src": hashes("script"), "style-src": hashes("style")}
    rules |= {"connect-src": "'self'", "img-src": "data:"}
    rules |= dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    return "; ".join(f"{name} {value}" for name, value in rules.items())
