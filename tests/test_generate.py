"""Generating from a trained run: from Python, from the command line, in a conversation, with weights of every kind."""

import io
import json
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
from runs import assert_one_line, last_json, run

import lowrank_jax
from lowrank_jax import generate
from lowrank_jax.config import UsageError
from lowrank_jax.writer import Writer


@pytest.fixture(scope="module")
def model(reference):
    return lowrank_jax.load(str(reference))


def test_prompts_of_any_number_and_length_get_what_each_gets_alone(model):
    prompts = [model.prompt(text) for text in ("The cat", "a", "Every house in the town has a garden " * 4)] * 13
    batched = model.generate(prompts, max_new=12, seed=3, temperature=0.9, top_p=0.9)
    for i in (0, 1, 2, 20, len(prompts) - 1):
        assert model.generate([prompts[i]], max_new=12, seed=3 + i, temperature=0.9, top_p=0.9) == [batched[i]]
    assert batched[0] != batched[3]  # the same prompt with another seed
    assert model.generate([], max_new=5) == []


def test_a_stream_is_what_generate_returns_and_its_first_token_comes_alone(model):
    prompt = model.prompt("The")
    pieces = list(model.stream(prompt, max_new=30, most=7, temperature=0.0, logprobs=2))
    (whole,) = model.generate([prompt], max_new=30, temperature=0.0)
    assert [i for piece in pieces for i in piece.ids] == whole
    assert len(pieces[0].ids) == 1 and max(len(piece.ids) for piece in pieces) <= 7
    assert pieces[-1].finish and not any(piece.finish for piece in pieces[:-1])
    logits = np.asarray(model.logits([prompt + whole]))[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    told = [told for piece in pieces for told in piece.logprobs]
    for row, token, (logprob, top) in zip(expected, whole, told):
        assert abs(row[token] - logprob) < 1e-4 and top[0][0] == row.argmax() and len(top) == 2
    writer = Writer(model.tokenizer)
    assert "".join(writer.add(piece.ids) for piece in pieces) + writer.end() == model.tokenizer.decode(whole)


def test_leaving_a_stream_early_frees_its_slot(model):
    for _ in range(3):
        assert next(model.stream(model.prompt("The"), max_new=50)).ids
    assert list(model.stream(model.prompt("The"), max_new=5))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_weights_of_every_kind_generate(reference, kind):
    small = lowrank_jax.load(str(reference), weights=kind)
    (ids,) = small.generate([small.prompt("The cat")], max_new=6, temperature=0.0)
    assert 1 <= len(ids) <= 6


def test_a_kind_that_there_is_not_is_refused(reference):
    with pytest.raises(UsageError, match="weights must be one of auto, fp32, bf16, fp16, int8, int4, not 'int3'"):
        lowrank_jax.load(str(reference), weights="int3")


def test_evaluate_tells_what_small_weights_change(reference):
    code, out, err = run("evaluate", f"--workdir={reference}", "--weights=int8", "--tokens=256", "--json")
    assert code == 0, err
    told = last_json(out)["results"][0]["with"]
    assert abs(told["change"]) < 0.05 and told["weight_bytes"] < 0.6 * told["weight_bytes_before"]
    assert "int8 weights: " in out and "bits per byte" in out


def test_flags_reach_the_sampler_and_the_answer(reference):
    args = ["--json", f"--workdir={reference}", "--prompt=The cat", "--max_tokens=30", "--preset=det"]
    code, out, err = run("generate", *args, "--logprobs=3")
    assert code == 0, err
    plain = last_json(out)
    assert [x["id"] for x in plain["logprobs"]] == plain["tokens"] and len(plain["logprobs"][0]["top"]) == 3
    stop = plain["text"][5:8]
    stopped = last_json(run("generate", *args, f"--stop={stop}", "--stop=never said")[1])
    assert stopped["text"] == plain["text"][: plain["text"].index(stop)] and stopped["finish_reason"] == "stop"
    banned = plain["tokens"][0]
    biased = last_json(run("generate", *args, f"--logit_bias={banned}:-100", "--repetition_penalty=1.5")[1])
    assert banned not in biased["tokens"][:1]


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
def test_a_wrong_flag_gets_one_line(reference, flags, names):
    code, _, err = run("generate", f"--workdir={reference}", "--prompt=a", *flags)
    assert_one_line(code, err, 2, *names)


def talk(monkeypatch, lines: list[str], context: int = 1000, **flags) -> tuple[list[list[str]], str, dict]:
    """A conversation in which a message has a token for each word, and the nth answer is `yes n`.

    Returns the messages behind each answer, what is shown, and the result.
    """
    histories, shown = [], []

    def answer(run, prompt, args, show):
        histories.append(run.read)
        return {"text": f" yes {len(histories)}\n", "tokens": prompt}

    def prompt(text, history, is_chat):
        assert is_chat
        messages = [*history, {"role": "user", "content": text}]
        run.read = [f"{m['role']}: {m['content']}" for m in messages]
        return [word for m in messages for word in m["content"].split()]

    run = types.SimpleNamespace(prompt=prompt)
    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    args = {"prompt": None, "system": "", "max_tokens": 4, "context": context, "json": True} | flags
    result = generate.converse(run, types.SimpleNamespace(**args), shown.append)
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
    histories, shown, _ = talk(monkeypatch, lines, prompt="Zero", json=True)
    assert histories == [["user: Zero"]]  # with a prompt and --json nothing else is read
    histories, shown, _ = talk(monkeypatch, lines)
    assert histories == [
        ["user: One"],
        ["system: Be kind", "user: Two"],
        ["user: Three"],
        ["user: Three", "assistant: yes 3", "user: /7 is a number"],
    ]
    assert "there is no /nothing" in shown


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
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lowrank_jax.generate", f"--workdir={reference}", "--chat", "--max_tokens=3000"]
    command += ["--logit_bias=2:-100", "--seed=1"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored below a job in the background
    )
    os.close(theirs)
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


def test_python_users_get_a_model_that_json_can_hold(model):
    ids = model.generate([model.prompt("a")], max_new=3)[0]
    assert json.dumps(ids)
