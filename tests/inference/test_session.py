"""Generation from a trained run: from Python, the command line and a conversation, with weights of every kind."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

import lowrank_jax
from lowrank_jax import cli, evaluate, generate
from lowrank_jax.config import UsageError
from lowrank_jax.data import chat
from lowrank_jax.data.tokenizer import EOS, TURN_END, TURN_START
from lowrank_jax.inference import quantize, session
from lowrank_jax.inference.engine import Request
from lowrank_jax.inference.sampling import PRESETS, Sampling
from lowrank_jax.inference.session import Conversation, Model
from lowrank_jax.inference.text_stream import Writer

IMPORT = """
import sys
from lowrank_jax.model.kernels import build
build.load = lambda source: sys.exit(f"{source} was loaded")
import lowrank_jax.inference.session
print([name for name in ("uvicorn", "starlette", "pydantic", "prometheus_client") if name in sys.modules])
"""


def test_importing_it_neither_imports_the_server_nor_loads_the_decoder_in_cpp(tmp_path):
    environment = os.environ | {"LOWRANK_CACHE": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True)
    assert process.stdout == "[]\n", process.stdout + process.stderr
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def model(reference):
    return lowrank_jax.load(str(reference))


@pytest.fixture
def command(model, monkeypatch, capsys):
    """Return a function that runs the command on the loaded run, and returns its result and its output."""
    monkeypatch.setattr(generate, "open_run", lambda folder, **which: model)

    def run(*flags: str) -> tuple[dict, str]:
        return generate.command(["--workdir=x", *flags]), capsys.readouterr().out

    return run


def test_prompts_of_any_number_and_length_get_what_each_gets_alone(model, monkeypatch):
    monkeypatch.setattr(session, "SLOTS", 2)  # fewer than there are prompts
    prompts = [model.prompt(text) for text in ("The cat", "a", "Every house in the town has a garden " * 4)] * 2
    batched = model.generate(prompts, max_new=12, seed=3, temperature=0.9, top_p=0.9)
    alone = [model.generate([p], max_new=12, seed=3 + i, temperature=0.9, top_p=0.9)[0] for i, p in enumerate(prompts)]
    assert batched == alone and len(set(map(tuple, alone))) == 6  # the same prompt with another seed, too
    assert all(type(i) is int for ids in batched for i in ids)  # which json can hold
    assert model.generate([], max_new=5) == []


@pytest.mark.parametrize("symbol", [EOS, TURN_END])
def test_the_end_of_a_text_and_of_a_turn_end_an_answer(model, symbol):
    likely = lambda symbol: {"temperature": 0.0, "logit_bias": ((model.tokenizer.special(symbol), 100),)}
    assert model.generate([[5]], max_new=3, **likely(symbol)) == [[model.tokenizer.special(symbol)]]
    assert model.generate([[5]], max_new=3, **likely(TURN_START)) == [[model.tokenizer.special(TURN_START)] * 3]


def test_a_stream_is_what_generate_returns_and_its_first_token_comes_alone(model):
    prompt = model.prompt("The")
    never = tuple((i, -100) for i in model.tokenizer.specials.values())
    pieces = list(model.stream(prompt, max_new=30, most=7, temperature=0.0, logprobs=2, logit_bias=never))
    (whole,) = model.generate([prompt], max_new=30, temperature=0.0, logit_bias=never)
    assert [i for piece in pieces for i in piece.ids] == whole
    assert len(pieces[0].ids) == 1 and max(len(piece.ids) for piece in pieces) <= 7
    assert pieces[-1].finish and not any(piece.finish for piece in pieces[:-1])
    logits = np.asarray(model.logits([prompt + whole]))[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    assert len(logprobs) == len(whole) == 30
    for row, token, (logprob, top) in zip(expected, whole, logprobs, strict=True):
        assert abs(row[token] - logprob) < 1e-4 and top[0][0] == row.argmax() and len(top) == 2
    writer = Writer(model.tokenizer)
    assert "".join(writer.add(piece.ids) for piece in pieces) + writer.end() == model.tokenizer.decode(whole)


def test_leaving_a_stream_early_frees_its_slot(model):
    stream = model.stream(model.prompt("The"), max_new=50)
    assert next(stream).ids
    engine = model.engine(1, 1)
    assert engine.free == engine.slots - 1
    stream.close()
    assert engine.free == engine.slots


@pytest.mark.parametrize("kind, size, error", [("bf16", 0.51, 0.02), ("int8", 0.35, 0.02), ("int4", 0.25, 0.06)])
def test_weights_of_every_kind_are_smaller_and_change_answers_a_little(model, command, kind, size, error):
    result, _ = command(f"--weights={kind}", "--prompt=The cat", "--max_tokens=6", "--logprobs=1", "--temperature=2")
    prompt, logprobs = model.prompt("The cat"), [token["logprob"] for token in result["logprobs"]]
    logits_TV = model.logits([prompt + result["tokens"]])[0, len(prompt) - 1 : -1]
    exact = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_TV)), np.asarray(result["tokens"])[:, None], 1)
    assert 1e-4 < np.abs(exact[:, 0] - logprobs).max() < error
    small = Model(model.config, model.tokenizer, model.params, kind)
    assert quantize.bytes_of(small.weights) < size * quantize.bytes_of(model.weights)


def test_an_unknown_kind_of_weights_is_refused(model):
    with pytest.raises(UsageError, match="weights must be one of auto, fp32, bf16, fp16, int8, int4, not 'int3'"):
        Model(model.config, model.tokenizer, model.params, "int3")


def test_evaluate_shows_what_small_weights_change(reference, capsys):
    (result,) = evaluate.command([f"--workdir={reference}", "--weights=int8", "--tokens=256"])["results"]
    assert 0 < abs(result["with"]["change"]) < 0.05
    assert result["with"]["weight_bytes"] < 0.6 * result["with"]["weight_bytes_before"]
    out = capsys.readouterr().out
    assert "int8 weights: " in out and "bits per byte" in out


def test_flags_reach_the_sampler_and_the_answer(command):
    flags = ["--prompt=The cat", "--max_tokens=30", "--seed=4", "--temperature=2"]
    plain, out = command(*flags, "--logprobs=3")
    assert out == "The cat" + plain["text"] + "\n"
    assert [x["id"] for x in plain["logprobs"]] == plain["tokens"] and len(plain["logprobs"][0]["top"]) == 3
    stop = plain["text"][5:8]
    stopped, out = command(*flags, f"--stop={stop}", "--stop=never said")
    assert stopped["text"] == plain["text"][: plain["text"].index(stop)] and stopped["finish_reason"] == "stop"
    assert out == "The cat" + stopped["text"] + "\n"
    assert command(*flags)[0]["tokens"] == plain["tokens"]
    biased, _ = command(*flags, "--logit_bias=7:100")
    assert biased["tokens"] == [7] * 30 and biased["finish_reason"] == "length"


def test_every_sampling_flag_is_read_and_changes_a_preset():
    def read(*flags: str) -> dict:
        parser = cli.Parser("")
        generate.add_sampling_flags(parser)
        return vars(generate.read_sampling(parser.parse_args(flags)))

    values = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "seed": 11, "penalty_last_n": 9}
    values |= {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.75, "no_repeat_ngram": 3}
    flags = [f"--{name}={value}" for name, value in values.items()]
    assert read(*flags, "--logit_bias=5:-1,7:2.5") == values | {"logit_bias": ((5, -1.0), (7, 2.5))}
    assert read("--preset=creative", "--top_k=3") == vars(PRESETS["creative"]) | {"top_k": 3}
    assert read("--preset=balanced", "--temperature=0") == vars(PRESETS["balanced"]) | {"temperature": 0}
    assert read() == vars(Sampling(temperature=0.8, top_p=0.95))


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--temperature=-1"], ["temperature"]),
        (["--top_p=1.5"], ["top_p"]),
        (["--logit_bias=5"], ["logit_bias", "ID:BIAS"]),
        (["--logit_bias=5:1,5:2"], ["once"]),
        (["--max_tokens=0"], ["--max_tokens"]),
        (["--logprobs=21"], ["--logprobs"]),
        (["--preset=wild"], ["preset", "balanced"]),
        (["--weights=int3"], ["int3", "int8"]),
        (["--chat", "--max_tokens=4096"], ["--max_tokens", "--context"]),
    ],
)
def test_an_error_names_the_wrong_flag(command, flags, names):
    with pytest.raises(UsageError) as e:
        command("--prompt=a", *flags)
    assert all(name in str(e.value) for name in names) and "\n" not in str(e.value)


def talk(
    monkeypatch, lines: list[str], context: int = 1000, system: str = "", first: str | None = None
) -> tuple[list[list[str]], str, dict]:
    """Hold a conversation in which each word is a token, and the nth answer is `yes n`.

    Returns the messages before each answer, the text that is shown, and the result.
    """
    histories, shown = [], []

    def answer(model, request, stop, show):
        histories.append(model.read)
        return {"text": f" yes {len(histories)}\n", "tokens": request.ids}

    def prompt(text, history, is_chat):
        assert is_chat
        messages = [*history, {"role": "user", "content": text}]
        model.read = [f"{m['role']}: {m['content']}" for m in messages]
        return [word for m in messages for word in m["content"].split()]

    model = types.SimpleNamespace(prompt=prompt)
    monkeypatch.setattr(session, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat = Conversation(model, lambda ids: Request(ids, 4), (), context, system, shown.append)
    result = chat.hold(first, first is None)
    return histories, "".join(shown), result


def test_an_answer_knows_all_turns_before_it_until_reset_forgets_them(monkeypatch):
    lines = ["One", "", "Two", "/reset", "Three", "/reset", "/reset", "Four"]
    histories, shown, result = talk(monkeypatch, lines, system="Be brief")
    assert histories == [
        ["system: Be brief", "user: One"],
        ["system: Be brief", "user: One", "assistant: yes 1", "user: Two"],
        ["system: Be brief", "user: Three"],
        ["system: Be brief", "user: Four"],
    ]
    assert result["prompt"] == "Four" and result["text"] == " yes 4\n" and shown == "\n" * 4


def test_a_new_tone_starts_over_and_an_unknown_command_is_no_message(monkeypatch):
    lines = ["One", "/system Be kind", "Two", "/nothing", "/system", "Three", "/7 is a number"]
    histories, shown, _ = talk(monkeypatch, lines, first="Zero")
    assert histories == [["user: Zero"]]  # standard input is not read
    histories, shown, _ = talk(monkeypatch, lines)
    assert histories == [
        ["user: One"],
        ["system: Be kind", "user: Two"],
        ["user: Three"],
        ["user: Three", "assistant: yes 3", "user: /7 is a number"],
    ]
    assert "unknown command /nothing" in shown


def test_a_conversation_is_answered_by_the_model(model, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One two.\n/nothing\nAnd then?\n"))
    result, out = command("--chat", "--max_tokens=8", "--seed=5", "--system=Be brief.")
    messages, texts = [{"role": "system", "content": "Be brief."}], []
    for question in ("One two.", "And then?"):
        messages.append({"role": "user", "content": question})
        ids = [model.tokenizer.bos, *chat.encode(model.tokenizer, messages, prompt=True)[0]]
        (tokens,) = model.generate([ids], 8, seed=5, top_p=0.95)
        texts.append(model.tokenizer.decode(tokens))
        messages.append({"role": "assistant", "content": texts[-1].strip()})
    assert result["tokens"] == tokens
    assert out == f"{texts[0]}\nunknown command /nothing; use /system TEXT or /reset\n{texts[1]}\n"


def test_a_full_context_keeps_the_system_and_the_newest_turns(monkeypatch, capfd):
    lines = ["a a", "b b", "c c", "d d d d d"]
    # With 4 new tokens: 1 + 2 + 4, then 1 + 2 + 2 + 2 + 4, which is 11 and all that fits.
    histories, _, _ = talk(monkeypatch, lines, context=11, system="S")
    assert histories == [
        ["system: S", "user: a a"],
        ["system: S", "user: a a", "assistant: yes 1", "user: b b"],
        ["system: S", "user: b b", "assistant: yes 2", "user: c c"],
        ["system: S", "user: d d d d d"],
    ]
    assert capfd.readouterr().err.count("is forgotten") == 3
    with pytest.raises(UsageError, match="a message of 8 tokens does not fit in --context=11"):
        talk(monkeypatch, ["x x x x x x x"], context=11, system="S")


def test_in_a_terminal_ctrl_c_stops_an_answer_and_not_the_conversation(reference):
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "lowrank_jax.generate", f"--workdir={reference}", "--chat", "--max_tokens=3000"]
    command += ["--logit_bias=2:-100", "--seed=1"]
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored below a job in the background
    )
    os.close(terminal)
    shown = b""

    def until(text: bytes, seconds: float = 60) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < end, shown
            shown += os.read(ours, 4096)

    until(b"> ")
    os.write(ours, b"Tell me everything\n")
    until(b"everything")
    shown = b""
    end = time.monotonic() + 60
    while len(shown) < 60 and time.monotonic() < end:
        shown += os.read(ours, 4096)
    shown = b""
    process.send_signal(signal.SIGINT)
    until(b"> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=30) == 0, shown
