"""The server's routes: HTTP around API calls (api.py), the scheduler and answers; streams, metrics, the chat page.

Every error has OpenAI's shape and leaves the server running. A client that disconnects frees its slots.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import ipaddress
import json
import pathlib
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference.sampling import PRESETS
from lowrank_jax.inference.server import api
from lowrank_jax.inference.server.answers import Reply
from lowrank_jax.inference.server.api import CLIENT_GONE, Call, Problem, Settings
from lowrank_jax.inference.server.bodies import Bodies
from lowrank_jax.inference.server.scheduler import Scheduler
from lowrank_jax.machine.console import finite, to_json

PAGE = pathlib.Path(__file__).with_name("page")
SLOW = 30.0  # seconds that a client may take to read its answer
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}  # of errors


class Metrics:
    """The numbers of /metrics."""

    def __init__(self, scheduler: Scheduler):
        prometheus.disable_created_metrics()
        self.registry = prometheus.CollectorRegistry()
        own = {"registry": self.registry}
        prometheus.ProcessCollector(**own)
        self.requests = prometheus.Counter("lowrank_requests", "Requests", ["route", "status"], **own)
        self.read = prometheus.Counter("lowrank_prompt_tokens", "Tokens of prompts", **own)
        self.written = prometheus.Counter("lowrank_generated_tokens", "Tokens of answers", **own)
        latency = lambda name, what: prometheus.Histogram(name, what, buckets=SECONDS, **own)
        self.first = latency("lowrank_time_to_first_token_seconds", "From a request to each answer's first token")
        self.each = latency("lowrank_time_per_token_seconds", "Mean of each answer, after its first token")
        gauge = lambda name, what, value: prometheus.Gauge(name, what, **own).set_function(value)
        gauge("lowrank_queue_length", "Answers that wait for a slot", lambda: len(scheduler.waiting))
        gauge("lowrank_active_rows", "Answers that have a slot", lambda: len(scheduler.active))
        gauge("lowrank_engine_failures", "Times that the engine failed and was replaced", lambda: scheduler.failures)


class Server:
    """The routes, over one scheduler."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, settings: Settings):
        self.scheduler, self.tokenizer, self.settings = scheduler, tokenizer, settings
        self.metrics = Metrics(scheduler)
        self._bodies = Bodies()
        self._writing = asyncio.Lock()
        self._page = _joined(PAGE)
        openai = {"id": settings.model, "object": "model", "created": int(time.time()), "owned_by": "lowrank_jax"}
        limits = {"context": settings.context, "max_tokens": min(settings.max_tokens, settings.context)}
        presets = {name: {"temperature": p.temperature, "top_p": p.top_p} for name, p in PRESETS.items()}
        cache = dict(zip(("cache_bytes_per_token", "dense_cache_bytes_per_token"), settings.cache_bytes))
        self._model = {**openai, **limits, **cache, "presets": presets}

    def app(self) -> Callable:
        """Return the ASGI application: the routes, behind the check of the key and the count of requests."""
        routes = [
            Route("/", self.page),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/responses", self.no_responses, methods=["GET", "POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/healthz", self.health),
            Route("/metrics", self.show_metrics),
        ]
        handlers = dict.fromkeys((Problem, HTTPException, ClientDisconnect, 500), _respond_to)
        inside = Starlette(routes=routes, exception_handlers=handlers)

        async def guarded(scope, receive, send):
            problem = self._unwelcome(scope)
            await (_refusal(problem) if problem else inside)(scope, receive, send)

        if origins := self.settings.origins or (("*",) if self.settings.keys else ()):
            shared = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "max_age": 600}
            guarded = CORSMiddleware(guarded, allow_origins=origins, **shared)  # answers a browser that asks first

        async def app(scope, receive, send):
            status = CLIENT_GONE

            async def sending(message):
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                await send(message)

            try:
                await guarded(scope, receive, sending)
            finally:
                status = CLIENT_GONE if "client_gone" in scope else status
                route = scope["route"].path if "route" in scope else "other"
                self.metrics.requests.labels(route, str(status)).inc()

        return app

    def _unwelcome(self, scope) -> Problem | None:
        """Return the reason why this caller gets no answer; set the scope's `owner` to the holder of its key."""
        headers, settings = dict(scope["headers"]), self.settings
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
        # A page of another site can give its own name this machine's address (DNS rebinding): it sends that name.
        if not settings.keys and not _is_own(host, settings.hosts):
            message = f"without an API key, this server does not answer to the name {host[:100]!r}"
            return Problem(403, f"{message}; start it with --host=NAME or with a key", code="unknown_host")
        if not scope["path"].startswith("/v1/"):
            return None
        # Browsers name the page that sends a request. Without a key, any page could use this server.
        is_foreign = bool(origin) and origin.partition("//")[2] != host
        if is_foreign and not (settings.keys and not settings.origins) and not {"*", origin} & set(settings.origins):
            message = "pages of other sites need --allow-origin, or a server with an API key"
            return Problem(403, message, code="foreign_origin")
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(sent.strip(), key.encode()) for key in settings.keys]
        if settings.keys and not (scheme.lower() == b"bearer" and any(matches)):
            return Problem(401, "the API key is missing or wrong", code="invalid_api_key")
        if not settings.reuses_prefixes_of_all:
            scope["owner"] = str(matches.index(True)) if matches else ""
        return None

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": _policy(self._page), "Referrer-Policy": "no-referrer"}
        return HTMLResponse(self._page, headers=headers | {"Cache-Control": "no-cache", "X-Frame-Options": "DENY"})

    async def health(self, request: Request) -> Response:
        alive = self.scheduler.thread.is_alive()
        return _json({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, headers={"Content-Type": prometheus.CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.model:
            raise Problem(404, f"the model {name[:100]!r} does not exist", "model", "model_not_found")
        return _json(self._model)

    async def no_responses(self, request: Request) -> Response:
        message = "this server has no Responses API; use /v1/chat/completions (client.chat.completions.create)"
        raise Problem(404, message, code="unsupported_endpoint")

    async def answer(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        async with self._bodies.body(request.stream()) as data:
            call = await self._read(request, data, request.url.path.endswith("/chat/completions"))
        if call is None:
            return Response(status_code=CLIENT_GONE)
        work = Work(self, call, deadline)
        if call.stream:
            return self._stream(work)
        try:
            response = await _while_connected(request.scope, request.receive, work.whole())
        finally:
            work.ticket.cancel()
        if response is None:
            return Response(status_code=CLIENT_GONE)
        async with self._writing:  # one at a time: log-probabilities take ten times the memory of their JSON
            return Response(await asyncio.to_thread(_in_pieces, response), media_type="application/json")

    async def _read(self, request: Request, data: bytes, is_chat: bool) -> Call | None:
        """Read the call in a thread, for which other requests need not wait; return None if the client leaves."""
        has_left, owner = threading.Event(), request.scope.get("owner", "")

        def read() -> Call | Problem:
            try:
                return api.read(data, is_chat, self.tokenizer, self.settings, owner, has_left.is_set)
            except Problem as e:
                e.__traceback__ = e.__context__ = None  # they hold the body's values, 110 MB, until the loop has a turn
                return e
            finally:
                self._bodies.rest_after(data)

        work = asyncio.get_running_loop().run_in_executor(self._bodies.reader_of(data), read)
        try:
            call = await _while_connected(request.scope, request.receive, _awaited(work))
        finally:
            has_left.set()
        if isinstance(call, Problem):
            raise call
        return call

    def _stream(self, work: "Work") -> Callable:
        """Return an ASGI response of server-sent events, for as long as the client stays and reads."""
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        response = StreamingResponse(work.events(), headers=headers)

        async def respond(scope, receive, send):
            try:
                with contextlib.suppress(TimeoutError):  # the client stopped reading
                    async with asyncio.timeout(self.settings.timeout + SLOW):
                        await _while_connected(scope, receive, response.stream_response(send))
            finally:
                work.ticket.cancel()

        return respond


class Work:
    """An API call in progress; raises Problem if it is refused. Its owner must cancel the ticket in the end."""

    def __init__(self, server: Server, call: Call, deadline: float):
        self._server, self._call, self._deadline = server, call, deadline
        self._began = time.monotonic()
        self.ticket = server.scheduler.submit(call.requests)
        self._reply = Reply(call, server.tokenizer, server.settings.model)
        server.metrics.read.inc(call.prompt_tokens)

    async def whole(self) -> dict:
        """Return the response to a call that is no stream."""
        async for _ in self._pieces():
            pass
        return self._reply.whole()

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of a stream; an error is the last before its end."""
        event = lambda value: f"data: {to_json(value)}\n\n"
        try:
            for i in range(len(self._call.requests)) if self._call.is_chat else ():
                yield event(self._reply.first(i))
            async for i, text, tokens in self._pieces():
                if text or tokens or self._reply.answers[i].finish:
                    yield event(self._reply.piece(i, text, tokens))
            if self._call.include_usage:
                yield event(self._reply.last())
        except Problem as e:
            yield event(e.body())
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[tuple[int, str, list]]:
        """Yield (number of the answer, new text, new tokens) until all answers have ended."""
        firsts, metrics, answers = {}, self._server.metrics, self._reply.answers
        try:
            async for i, piece in self.ticket.pieces(self._deadline):
                answer, now = answers[i], time.monotonic()
                if answer.finish:  # at a stop string, which the engine does not know
                    continue
                before = answer.tokens
                text, tokens = answer.add(piece)
                metrics.written.inc(answer.tokens - before)
                if not before:
                    firsts[i] = now
                    metrics.first.observe(now - self._began)
                if answer.finish:
                    self.ticket.cancel(i)
                    if before:
                        metrics.each.observe((now - firsts[i]) / (answer.tokens - 1))
                yield i, text, tokens
                if all(answer.finish for answer in answers):
                    return
        except TimeoutError:
            seconds = f"{self._server.settings.timeout:g} seconds"
            raise Problem(504, f"there was no answer within {seconds}", code="timeout") from None


async def _while_connected(scope, receive, work: Coroutine):
    """Return the result of `work`, or None if the client disconnects first."""

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


async def _awaited(future):
    return await future


def _in_pieces(value: dict) -> bytes:
    """Return JSON, encoded in Python: C's encoder would hold all threads until a large value is done."""
    text = io.StringIO()
    for piece in json.JSONEncoder().iterencode(finite(value)):
        text.write(piece)
    return text.getvalue().encode()


def _is_own(host: str, names: tuple[str, ...]) -> bool:
    """Return whether a Host header names this machine: an address, localhost, or one of `names`; or nothing."""
    name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in ("", "localhost", *names) or name.endswith(".localhost")


def _json(value: dict, status: int = 200, headers: dict | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def _refusal(problem: Problem, headers: dict | None = None) -> Response:
    return _json(problem.body(), problem.status, {**(headers or {}), **HEADERS.get(problem.status, {})})


async def _respond_to(request: Request, e: Exception) -> Response:
    if isinstance(e, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    if isinstance(e, HTTPException):
        return _refusal(Problem(e.status_code, f"{request.method} {request.url.path[:100]}: {e.detail}"), e.headers)
    return _refusal(e if isinstance(e, Problem) else Problem(500, "the server failed; its log says why"))


def _joined(folder: pathlib.Path) -> str:
    """Return the chat page as one file: index.html with the scripts and styles that it names."""
    text = lambda match: (folder / match[1]).read_text(encoding="utf-8")
    page = (folder / "index.html").read_text(encoding="utf-8")
    page = re.sub('<link rel="stylesheet" href="([^"]+)">', lambda m: f"<style>{text(m)}</style>", page)
    return re.sub('<script src="([^"]+)"></script>', lambda m: f"<script>{text(m)}</script>", page)


def _policy(page: str) -> str:
    """Return a content security policy that allows the page its own script and style, and this server alone."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    own = f"script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
