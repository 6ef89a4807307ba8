"""Requests of OpenAI's text API, checked and read. What one may hold:

- `messages` (chat): texts, or lists of parts {"type": "text", "text": ...}; `prompt` (completions): a text, texts, or
  token ids, which are taken as they are.
- `model`: the served model's name; may be left out.
- `max_tokens`, `max_completion_tokens`: most new tokens; 16 for completions, else up to the context, where every
  answer ends.
- `temperature`, `top_p`, `presence_penalty`, `frequency_penalty`, `logit_bias`, `n`, `stop`, `stream`,
  `stream_options`, `logprobs`, `top_logprobs`: as OpenAI documents them.
- `seed`: a random one if left out; answer i of `n` is drawn with `seed` + i.
- `top_k`, `min_p`, `repetition_penalty`, `penalty_last_n`, `no_repeat_ngram`: see sampling.Sampling.
- `preset`: one of sampling.PRESETS, which the fields above then change.
- `user`, `metadata`, `store` and the others of IGNORED: ignored, as they do not change the answer.

Any other field is refused, as are tools, images and response formats: a client that asks for something and does not get
it should know. A field that is null, or asks for what is done anyway (NEUTRAL), counts as absent.
"""

import dataclasses
import json
import re
import secrets
from dataclasses import dataclass

from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import Tokenizer
from lowrank_jax.inference.engine import TOP
from lowrank_jax.inference.sampling import PRESETS, Sampling

COMPLETION_TOKENS = 16  # OpenAI's default for completions
MOST_STOPS = 4
IGNORED = set(
    "user metadata store safety_identifier prompt_cache_key prompt_cache_retention service_tier "
    "parallel_tool_calls".split()
)
NEUTRAL = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
_DRAWN = {f.name for f in dataclasses.fields(Sampling)} - {"logit_bias", "seed"}
_COMMON = set("model max_tokens n stop stream stream_options logprobs preset logit_bias seed".split()) | _DRAWN
_FIELDS = {
    True: _COMMON | {"messages", "max_completion_tokens", "top_logprobs"},
    False: _COMMON | {"prompt"},
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Problem(Exception):
    """What goes wrong with a request, as the client is told it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What the server can do."""

    model: str  # its name
    vocab: int
    context: int  # most tokens of a prompt and its answer
    max_tokens: int  # of an answer
    answers: int  # of one request


@dataclass(frozen=True)
class Question:
    """A request that has been read. It is answered `n` times for each prompt, prompt by prompt."""

    is_chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    logprobs: int | None  # how many alternatives to each token are told; None: nothing is
    stream: bool
    tells_usage: bool  # at the end of a stream

    def samplings(self) -> list[Sampling]:
        """How each of the answers is drawn."""
        seeds = [(self.sampling.seed + i) % 2**63 for i in range(self.n)]
        return [dataclasses.replace(self.sampling, seed=seed) for _ in self.prompts for seed in seeds]


def read(body: bytes, is_chat: bool, tokenizer: Tokenizer, limits: Limits) -> Question:
    """The request in `body`; raises Problem where it cannot be answered as it is meant."""
    fields = _fields(body, is_chat)
    model = _take(fields, "model", str, "a text", limits.model)
    if model != limits.model:
        raise Problem(
            404, f"the model {model[:100]!r} does not exist: this is {limits.model!r}", "model", "model_not_found"
        )
    prompts = _conversation(fields, tokenizer) if is_chat else _prompts(fields, tokenizer, limits)
    for ids in prompts:
        if len(ids) >= limits.context:
            text = f"the prompt has {len(ids)} tokens, and with its answer must fit in a context of {limits.context}"
            raise Problem(400, text, "messages" if is_chat else "prompt", "context_length_exceeded")
    n = _count(fields, "n", 1)
    if n * len(prompts) > limits.answers:
        raise Problem(400, f"this server gives at most {limits.answers} answers to a request", "n")
    stream = _take(fields, "stream", bool, "true or false", False)
    options = _take(fields, "stream_options", dict, "an object", {})
    return Question(
        is_chat,
        tuple(map(tuple, prompts)),
        n,
        _max_tokens(fields, is_chat, limits),
        _sampling(fields, limits),
        _stops(fields),
        _logprobs(fields, is_chat),
        stream,
        _take(options, "include_usage", bool, "true or false", False, "stream_options"),
    )


def _fields(body: bytes, is_chat: bool) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        fields = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise Problem(400, f"the body is not JSON: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(fields, dict):
        raise Problem(400, "the body must be a JSON object")
    for name, value in fields.items():
        if name in _FIELDS[is_chat] or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise Problem(400, f"unknown field {name[:100]!r}", name[:100], "unknown_parameter")
        if value is not None and not any(value == v and type(value) is type(v) for v in NEUTRAL[name]):
            raise Problem(400, f"{name} is not supported by this server", name, "unsupported_parameter")
    return fields


def _take(fields: dict, name: str, kind, what: str, default=None, param: str | None = None):
    """The field's value if it is of the kind, the default if it is absent or null."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Problem(400, f"{name} must be {what}", param or name)
    return value


def _count(fields: dict, name: str, default: int, least: int = 1) -> int:
    value = _take(fields, name, int, "an integer", default)
    if value < least:
        raise Problem(400, f"{name} must be at least {least}, not {value}", name)
    return value


def _conversation(fields: dict, tokenizer: Tokenizer) -> list[list[int]]:
    messages = _take(fields, "messages", list, "a list of messages")
    if not messages:
        raise Problem(400, "messages must be a list with at least one message", "messages")
    told = [_message(i, message) for i, message in enumerate(messages)]
    try:
        return [[tokenizer.bos, *chat.encode(tokenizer, told, prompt=True)[0]]]
    except UsageError as e:
        raise Problem(400, str(e), "messages") from None


def _message(i: int, message) -> dict:
    where = f"messages[{i}]"
    if not isinstance(message, dict):
        raise Problem(400, f"{where} must be an object with role and content", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise Problem(400, f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
    for name in message.keys() - {"role", "content", "name"}:
        if message[name]:  # clients send back what they got, with its nulls
            raise Problem(400, f"{where}.{name[:100]} is not supported by this server", f"{where}.{name[:100]}")
    return {"role": _ROLES[role], "content": _content(where, message.get("content"))}


def _content(where: str, content) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Problem(400, f"{where}.content must be a text or a list of parts", f"{where}.content")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Problem(
                400, f'{where}.content may only have parts {{"type": "text", "text": ...}}', f"{where}.content"
            )
    return "".join(part["text"] for part in parts)


def _prompts(fields: dict, tokenizer: Tokenizer, limits: Limits) -> list[list[int]]:
    what = "a text, a list of texts, a list of token ids or a list of such lists, none of them empty"
    prompt = _take(fields, "prompt", (str, list), what)
    many = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if not many or not all(isinstance(one, str) or _is_ids(one) for one in many):
        raise Problem(400, f"prompt must be {what}", "prompt")
    for i in (i for one in many if not isinstance(one, str) for i in one):
        if not 0 <= i < limits.vocab:
            raise Problem(400, f"prompt has the token id {i}, which is not between 0 and {limits.vocab - 1}", "prompt")
    if len(many) > limits.answers:  # told before all of them are encoded
        raise Problem(400, f"this server gives at most {limits.answers} answers to a request", "prompt")
    return [[tokenizer.bos, *tokenizer.encode(one)] if isinstance(one, str) else one for one in many]


def _is_ids(prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)


def _max_tokens(fields: dict, is_chat: bool, limits: Limits) -> int:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    asked = _count(fields, name, min(limits.max_tokens, limits.context if is_chat else COMPLETION_TOKENS))
    if asked > limits.max_tokens and limits.max_tokens < limits.context:
        raise Problem(400, f"{name} must be at most {limits.max_tokens}, not {asked}", name)
    return min(asked, limits.context)


def _sampling(fields: dict, limits: Limits) -> Sampling:
    preset = _take(fields, "preset", str, "a text")
    if preset is not None and preset not in PRESETS:
        raise Problem(400, f"preset must be one of {', '.join(PRESETS)}", "preset")
    values = dataclasses.asdict(PRESETS[preset]) if preset else {"temperature": 1.0}  # OpenAI's default
    seed = _take(fields, "seed", int, "an integer")
    values["seed"] = secrets.randbits(63) if seed is None else seed % 2**63
    values["logit_bias"] = _biases(fields, limits)
    values |= {name: fields[name] for name in _DRAWN if fields.get(name) is not None}
    try:
        return Sampling(**values)
    except UsageError as e:
        named = re.match(r"\w+", str(e))  # the message begins with the setting's name
        raise Problem(400, str(e), named[0] if named and named[0] in values else None) from None


def _biases(fields: dict, limits: Limits) -> tuple[tuple[int, float], ...]:
    what = f"an object of token ids, 0 to {limits.vocab - 1}, with a number from -100 to 100 each"
    biases = []
    for key, bias in _take(fields, "logit_bias", dict, what, {}).items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < limits.vocab
        is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not is_id or not is_number or abs(bias) > 100:
            raise Problem(400, f"logit_bias must be {what}", "logit_bias")
        biases.append((int(key), float(bias)))
    return tuple(biases)


def _stops(fields: dict) -> tuple[str, ...]:
    what = f"a text or at most {MOST_STOPS} texts, none of them empty"
    stop = _take(fields, "stop", (str, list), what, [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise Problem(400, f"stop must be {what}", "stop")
    return tuple(stops)


def _logprobs(fields: dict, is_chat: bool) -> int | None:
    name, wanted = "logprobs", True
    if is_chat:
        wanted, name = _take(fields, "logprobs", bool, "true or false", False), "top_logprobs"
    count = _take(fields, name, int, "an integer", 0 if is_chat else None)
    if count is None:
        return None
    if not 0 <= count <= TOP:
        raise Problem(400, f"{name} must be between 0 and {TOP}, not {count}", name)
    if count and not wanted:
        raise Problem(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return count if wanted else None
