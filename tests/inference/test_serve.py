"""The server as a real process, used by OpenAI's own client: answers, streams, errors, other clients, its end."""

import concurrent.futures
import http.client
import json
import signal
import socket
import threading
import time

import openai
import pytest
from runs import WORDS, assert_one_line, last_json
from servers import serving, until

import lowrank_jax
from lowrank_jax import cli, serve
from lowrank_jax.config import RunFailure
from lowrank_jax.data.tokenizer import EOS, TURN_END
from lowrank_jax.inference import quantize
from lowrank_jax.inference.server.api import Settings
from scripts.bench import load_server

HELLO = [{"role": "user", "content": "The cat sat."}]
LONG = {"prompt": "The dogs", "max_tokens": 4000, "temperature": 0.9}


@pytest.fixture(scope="module")
def server(reference):
    with serving(reference, "--slots=4", "--context=4096", "--queue=16") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return ask(server)


@pytest.fixture(scope="module")
def model(reference):
    """The run in this process: its answers are those that the server must give."""
    return lowrank_jax.load(reference)


@pytest.fixture(scope="module")
def endless(model) -> dict:
    """A long request; no stop symbol ends its answer."""
    return LONG | {"model": "reference", "logit_bias": {str(i): -100 for i in model.tokenizer.specials.values()}}


def greedy(client, prompt: str, **options):
    options = {"max_tokens": 24, "temperature": 0} | options
    return client.completions.create(model="reference", prompt=prompt, **options)


def drawn(model, prompt: str, seed: int, max_new: int = 24, **sampling) -> str:
    """Return the text that the library draws at temperature 1 after a prompt."""
    (tokens,) = model.generate([model.prompt(prompt)], max_new, seed, temperature=1.0, **sampling)
    return model.tokenizer.decode(tokens)


def test_answers_are_those_of_the_library(client, model):
    ids = model.prompt("The cat")
    (tokens,) = model.generate([ids], max_new=24, seed=7, temperature=1.0)
    sampled = {"temperature": 1.0, "seed": 7}
    response = greedy(client, "The cat", **sampled)
    assert response.choices[0].text == model.tokenizer.decode(tokens) and len(set(tokens)) > 9
    assert response.usage.prompt_tokens == len(ids) and response.usage.completion_tokens == len(tokens)
    assert greedy(client, ids, **sampled).choices[0].text == response.choices[0].text  # ids are taken as they are
    (tokens,) = model.generate([ids], max_new=24, temperature=0)
    assert greedy(client, "The cat").choices[0].text == model.tokenizer.decode(tokens)
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    chat = client.chat.completions.create(model="reference", messages=messages, max_tokens=24, **sampled)
    (tokens,) = model.generate([model.prompt("The cat sat.", messages[:1], is_chat=True)], 24, seed=7, temperature=1.0)
    assert chat.choices[0].message.content == model.tokenizer.decode(tokens)
    assert chat.choices[0].message.role == "assistant" and chat.choices[0].finish_reason in ("stop", "length")
    assert [m.id for m in client.models.list()] == ["reference"]
    assert client.models.retrieve("reference").owned_by == "lowrank_jax"


@pytest.mark.parametrize("symbol", [EOS, TURN_END])
def test_the_end_of_a_text_and_of_a_turn_end_an_answer(client, model, symbol):
    bias = {str(model.tokenizer.special(symbol)): 100}
    ask = {"model": "reference", "messages": HELLO, "max_tokens": 9, "logit_bias": bias}
    chat = client.chat.completions.create(**ask)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("", "stop")
    assert chat.usage.completion_tokens == 1


def test_a_stream_has_the_content_of_the_whole_response(client):
    ask = {"model": "reference", "messages": HELLO, "max_tokens": 60, "temperature": 0.8, "seed": 3}
    ask |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    deltas = [c.choices[0] for c in chunks[:-1]]
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert [t for d in deltas for t in d.logprobs.content] == whole.choices[0].logprobs.content
    assert [d.finish_reason for d in deltas if d.finish_reason] == [whole.choices[0].finish_reason]
    assert len([d for d in deltas if d.delta.content]) > 2  # in pieces
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == [] and chunks[0].usage is None


def test_logprobs_belong_to_the_text(client):
    chat = client.chat.completions.create(
        model="reference", messages=HELLO, max_tokens=20, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    assert "".join(t.token for t in chat.logprobs.content) == chat.message.content != ""
    for token in chat.logprobs.content:  # greedy: the likeliest is the one that was taken
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0
        assert token.top_logprobs[0].token == token.token and bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob
    text = greedy(client, "The cat", logprobs=0).choices[0]
    places = list(zip(text.logprobs.text_offset, text.logprobs.tokens))
    assert len(places) > 20 and all(text.text[at:].startswith(token) for at, token in places)
    assert text.logprobs.top_logprobs == [{t: p} for t, p in zip(text.logprobs.tokens, text.logprobs.token_logprobs)]
    assert greedy(client, "The cat").choices[0].logprobs is None


def test_seeds_choices_and_many_prompts(client, model):
    draw = lambda **options: [c.text for c in greedy(client, "The cat", temperature=1.0, **options).choices]
    assert draw(seed=4, n=3) == [drawn(model, "The cat", seed) for seed in (4, 5, 6)]
    assert draw() != draw()  # random without a seed
    prompts = ["The cat", "Two dogs", "A mat"]
    expected = [drawn(model, prompt, seed) for prompt in prompts for seed in (4, 5)]
    together = greedy(client, prompts, n=2, temperature=1.0, seed=4)
    assert [c.index for c in together.choices] == list(range(6)) and len(set(expected)) == 6
    assert [c.text for c in together.choices] == expected
    streamed = [""] * 6
    for chunk in greedy(client, prompts, n=2, temperature=1.0, seed=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_an_answer_ends_before_its_stop_string_and_at_its_limits(client, endless):
    full = client.completions.create(**endless | {"max_tokens": 200, "seed": 1}).choices[0].text
    stop = full[60:64]
    cut = client.completions.create(**endless | {"max_tokens": 200, "seed": 1}, stop=[stop, "not in it"], logprobs=1)
    assert cut.choices[0].text == full[: full.index(stop)] and cut.choices[0].finish_reason == "stop"
    places = cut.choices[0].logprobs.text_offset
    assert places and all(at < len(cut.choices[0].text) for at in places) and cut.usage.completion_tokens < 200
    stream = list(client.completions.create(**endless | {"max_tokens": 200, "seed": 1}, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in stream) == cut.choices[0].text
    assert stream[-1].choices[0].finish_reason == "stop"
    limited = client.chat.completions.create(model="reference", messages=HELLO, max_completion_tokens=1)
    assert limited.usage.completion_tokens == 1
    prompt = [5] * 4090  # the context ends an answer too
    end = client.completions.create(**endless | {"prompt": prompt, "max_tokens": 100})
    assert end.usage.completion_tokens == 6 and end.choices[0].finish_reason == "length"


def test_fields_that_change_the_answer_are_used_or_refused_and_others_ignored(client):
    plain = greedy(client, "The cat").choices[0].text
    extra = {"metadata": {"a": "b"}, "user": "me", "store": True, "tools": [], "response_format": {"type": "text"}}
    assert greedy(client, "The cat", extra_body=extra).choices[0].text == plain
    first = greedy(client, "The cat", logprobs=1, max_tokens=1, extra_body={"preset": "det"}).choices[0]
    assert plain.startswith(first.text)
    other = greedy(client, "The cat", frequency_penalty=2.0, extra_body={"no_repeat_ngram": 2}).choices[0].text
    assert other != plain
    parts = [{"type": "text", "text": "The cat"}, {"type": "text", "text": " sat."}]
    ask = {"model": "reference", "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(messages=HELLO, **ask)
    in_parts = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **ask)
    assert in_parts.choices[0].message.content == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}], **ask)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(messages=HELLO, response_format={"type": "json_object"}, **ask)


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ERRORS = {
    "not JSON": (CHAT, b'{"messages": [', 400, None, "not JSON"),
    "deep JSON": (CHAT, b"[" * 100_000, 400, None, "not JSON"),
    "not UTF-8": (CHAT, b'{"\xff": 1}', 400, None, "not JSON"),
    "NaN": (TEXT, b'{"prompt": "a", "temperature": NaN}', 400, None, "not JSON"),
    "a list": (CHAT, [1], 400, None, "object"),
    "no messages": (CHAT, {}, 400, "messages", "messages"),
    "messages": (CHAT, {"messages": "hi"}, 400, "messages", "list"),
    "a message": (CHAT, {"messages": ["hi"]}, 400, "messages", "messages[0]"),
    "role": (CHAT, {"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role", "system"),
    "content": (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content", "text"),
    "image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content",
        "parts",
    ),
    "type": (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "number"),
    "range": (TEXT, {"prompt": "a", "top_p": 1.5}, 400, "top_p", "top_p"),
    "negative": (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "at least 1"),
    "n": (TEXT, {"prompt": "a", "n": 0}, 400, "n", "at least 1"),
    "many": (TEXT, {"prompt": "a", "n": 21}, 400, "n", "20"),
    "a prompt of nothing": (TEXT, {"prompt": []}, 400, "prompt", "prompt"),
    "an id": (TEXT, {"prompt": [10**9]}, 400, "prompt", "token id"),
    "bias": (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
    "stops": (TEXT, {"prompt": "a", "stop": list("abcde")}, 400, "stop", "4"),
    "logprobs": (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    "many logprobs": (TEXT, {"prompt": "a", "logprobs": 99}, 400, "logprobs", "20"),
    "echo": (TEXT, {"prompt": "a", "echo": True}, 400, "echo", "not supported"),
    "unknown": (TEXT, {"prompt": "a", "temprature": 1}, 400, "temprature", "unknown"),
    "preset": (TEXT, {"prompt": "a", "preset": "wild"}, 400, "preset", "balanced"),
    "stream": (TEXT, {"prompt": "a", "stream": "yes"}, 400, "stream", "true or false"),
    "model": (TEXT, {"prompt": "a", "model": "\ud800"}, 404, "model", "does not exist"),
    "too long": (TEXT, {"prompt": [5] * 4096}, 400, "prompt", "4096"),
    "a long chat": (CHAT, {"messages": [{"role": "user", "content": "x" * 9999}]}, 400, "messages", "4096"),
    "too large": (CHAT, b" " * (5 << 20), 413, None, "bytes"),
    "route": ("/v1/embeddings", {}, 404, None, "/v1/embeddings"),
    "method": ("/healthz", {}, 405, None, "/healthz"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_have_openais_shape(server, case):
    path, body, status, param, words = ERRORS[case]
    got, headers, response = server.post(path, body)
    error = response["error"]
    assert (got, error["param"]) == (status, param) and words in error["message"], (got, error)
    assert error["type"] == "invalid_request_error" and headers["content-type"] == "application/json"
    if "long" in case:
        assert error["code"] == "context_length_exceeded"
    assert json.loads(server.get("/healthz"))["status"] == "ok"


def test_a_client_that_disconnects_frees_its_slot(server, client, endless):
    for _ in range(3):  # more than there are slots, twice over
        streams = [client.completions.create(**endless, stream=True) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
            stream.response.close()
        assert until(lambda: server.metric("lowrank_active_rows") == 0)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(endless))
    assert until(lambda: server.metric("lowrank_active_rows") == 1)
    connection.close()
    assert until(lambda: server.metric("lowrank_active_rows") == 0)
    assert 'lowrank_requests_total{route="/v1/completions",status="499"}' in server.get("/metrics")


def test_sixteen_clients_are_not_mixed_up(server, client, model, endless):
    """All answers have one length, so that only their content shows whose they are."""
    prompts = [f"{WORDS[i]} {WORDS[i * 5 % 18]} sat" for i in range(16)]
    never = tuple((int(i), bias) for i, bias in endless["logit_bias"].items())
    alone = [drawn(model, prompt, seed, logit_bias=never) for seed, prompt in enumerate(prompts)]

    def ask(i: int) -> str:
        options = {"temperature": 1.0, "seed": i, "logit_bias": endless["logit_bias"]}
        if i % 2:
            return greedy(client, prompts[i], **options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in greedy(client, prompts[i], **options, stream=True))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone
        assert list(pool.map(ask, reversed(range(16)))) == alone[::-1]
    assert len(set(alone)) == 16 and server.metric("lowrank_queue_length") == 0


def test_a_load_is_answered_and_a_wrong_answer_would_be_noticed(server, model, endless):
    port = int(server.url.rsplit(":", 1)[1])
    questions = load_server.questions(4, [int(i) for i in endless["logit_bias"]])
    never = tuple((int(i), bias) for i, bias in endless["logit_bias"].items())
    known = [drawn(model, q["prompt"], q["seed"], q["max_tokens"], logit_bias=never) for q in questions]
    assert load_server.alone(port, questions) == known and len(set(known)) == 4
    result = load_server.run(port, questions, known, clients=12, seconds=1.0)
    assert result["requests"] >= 12 and result["dropped"] == result["mixed_up"] == result["still_active"] == 0
    assert result["tokens_per_s"] > 0 and result["rss_mb"]["end"] > 0 and "p99" in load_server.table(result)
    load = load_server.Load(port, questions, [known[1], known[0], *known[2:]])
    thread = threading.Thread(target=load.client, args=(0,))
    thread.start()
    assert until(lambda: len(load.answers) > len(load.mixed) > 0, 60)
    load.over.set()
    thread.join()
    assert set(load.mixed) <= {0, 1} and not load.dropped
    with pytest.raises(RunFailure, match="alike"):
        load_server.alone(port, [questions[0] | {"seed": 1}] * 2)


def test_metrics_add_up(server, client):
    names = (
        "lowrank_prompt_tokens_total",
        "lowrank_generated_tokens_total",
        "lowrank_time_to_first_token_seconds_count",
    )
    before = [server.metric(name) for name in names]
    usage = greedy(client, "The cat", n=2).usage
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after)] == [usage.prompt_tokens, usage.completion_tokens, 2]
    assert server.metric("lowrank_engine_failures") == 0 and server.metric("process_resident_memory_bytes") > 1e8


def test_a_page_of_another_site_cannot_use_the_server(server):
    own = server.url.removeprefix("http://")
    for origin in (server.url, "https://evil.example", f"http://{own}.example", "null"):
        status, _, response = server.post(TEXT, {"prompt": "a", "max_tokens": 1}, {"Origin": origin})
        assert status == (200 if origin == server.url else 403), origin
        assert status == 200 or response["error"]["code"] == "foreign_origin"


def ask(served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0, timeout=60)


class Idle:
    """An engine that does nothing; the class keeps the arguments of the last one."""

    free, context = 1, 16

    def __init__(self, config, weights, stop_ids, slots: int, context: int):
        Idle.settings = {"stop_ids": sorted(stop_ids), "slots": slots, "context": context}
        Idle.weight_bytes = quantize.bytes_of(weights)

    def add(self, request) -> None: ...


def test_flags_and_the_environment_reach_the_server_and_its_engine(model, monkeypatch):
    monkeypatch.setattr(serve, "open_run", lambda folder, **which: model)
    monkeypatch.setattr(serve.engine, "Engine", Idle)
    monkeypatch.setenv("LOWRANK_API_KEY", "of the environment")
    ends = sorted([model.tokenizer.eos, model.tokenizer.special(TURN_END)])

    name = socket.gethostname().lower()
    mine = lambda host: (host, name, f"{name}.local")

    def start(*flags: str) -> tuple[Settings, int]:
        server, scheduler = serve.prepare(serve.arguments(["--workdir=/runs/mine/", *flags]))
        scheduler.start()
        scheduler.close()
        scheduler.thread.join(10)
        assert not scheduler.thread.is_alive()
        return server.settings, scheduler.room

    limits = {"hosts": mine("127.0.0.1"), "most_letters": 4096 * int(model.tokenizer.byte_lengths().max())}
    limits |= {"cache_bytes": (64, 512)}  # of a token, in fp32
    expected = Settings("mine", 400, 4096, 4096, answers=72, timeout=600.0, keys=("of the environment",), **limits)
    assert start() == (expected, 72) and Idle.settings == {"stop_ids": ends, "slots": 8, "context": 4096}
    whole = Idle.weight_bytes
    flags = ["--slots=3", "--context=99", "--queue=2", "--weights=int8", "--api_key=k,l", "--model_name=m"]
    limits = {"hosts": mine("my.site"), "most_letters": 99 * int(model.tokenizer.byte_lengths().max())}
    limits |= {"origins": ("https://a.b", "http://c:1"), "reuses_prefixes_of_all": False, "cache_bytes": (64, 512)}
    expected = Settings("m", 400, 99, 7, answers=5, timeout=2.5, keys=("k", "l"), **limits)
    flags += ["--host=my.site", "--allow-origin=https://a.b, http://c:1"]
    assert start(*flags, "--max_tokens=7", "--timeout=2.5") == (expected, 5)
    assert start("--reuse=key")[0].reuses_prefixes_of_all is False
    assert start("--api_key=k,l", "--reuse=all")[0].reuses_prefixes_of_all is True
    start(*flags)
    assert Idle.settings == {"stop_ids": ends, "slots": 3, "context": 99} and Idle.weight_bytes < 0.35 * whole


def test_active_requests_have_a_few_seconds_after_a_signal(reference, endless):
    with serving(reference, "--slots=1", "--context=32768", "--json") as server:
        stream = ask(server).completions.create(**endless | {"max_tokens": 30000}, stream=True)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="stopping"):  # it had a few seconds
            list(stream)
        assert server.process.wait(20) == 128 + signal.SIGTERM and time.monotonic() - began < 15
        assert last_json(server.process.stdout.read())["stopped_by"] == "SIGTERM"
        assert not any("Traceback" in line for line in server.lines), server.lines
        with pytest.raises(OSError):
            server.get("/healthz")


FLAGS = {
    "no run": (["--workdir=/nowhere", "--port=0"], ["/nowhere", "no run"]),
    "no workdir": ([], ["--workdir"]),
    "flag": (["--workdir=x", "--prot=1"], ["prot"]),
    "port": (["--workdir=x", "--port=70000"], ["--port", "65535"]),
    "host": (["--workdir=x", "--host=no.such.host.invalid"], ["no.such.host.invalid"]),
    "slots": (["--workdir=x", "--slots=0"], ["--slots"]),
    "context": (["--workdir=x", "--context=1"], ["--context"]),
    "timeout": (["--workdir=x", "--timeout=nan"], ["--timeout"]),
    "key": (["--workdir=x", "--api_key="], ["--api_key"]),
    "keys": (["--workdir=x", "--api_key= , "], ["--api_key", "LOWRANK_API_KEY"]),
    "origin": (["--workdir=x", "--allow-origin=example.org"], ["--allow-origin", "https://"]),
    "weights": (["--workdir=x", "--weights=int3"], ["--weights", "int8"]),
}


@pytest.fixture
def handlers():
    """Restore the signal handlers that a command changes in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag_gets_one_line(case, capfd, handlers):
    args, names = FLAGS[case]
    with pytest.raises(SystemExit) as exit:
        cli.main(serve.command, args)
    assert_one_line(exit.value.code, capfd.readouterr().err, 2, *names)


def test_a_port_in_use_is_an_error_at_once(capfd, handlers):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exit:
        cli.main(serve.command, ["--workdir=x", f"--port={taken.getsockname()[1]}"])
    assert_one_line(exit.value.code, capfd.readouterr().err, 1, "in use")


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        serve.command(["--help"])
    assert exit.value.code == 0 and "--slots" in (out := capsys.readouterr().out) and "lowrank_jax.serve" in out
