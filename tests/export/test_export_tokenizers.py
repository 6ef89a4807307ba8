"""The same ids for a text in SentencePiece, in the tokenizer.json of exports, and in llama.cpp."""

import random

import exports
import pytest
import tokenizers

from lowrank_jax.data import builtin, chat, tokenizer
from lowrank_jax.export import gguf, hf_tokenizer

pytestmark = pytest.mark.slow

COUNT = 1200
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|im_end", "|im_start|>", "<0x0A>", "[INST]")
EMOJI = (
    "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1eb\U0001f1f7",
    "\u2764\ufe0f",
    "\U0001f3fd",
)
SCRIPTS = (
    "\u4f60\u597d",
    "\u0440\u0443\u0441",
    "\u0639\u0631",
    "\u0e44\u0e17\u0e22",
    "na\u00efve",
    "e\u0301",
    "\ufb01",
    "\u212b",
)
SPACES = (" ", "  ", "     ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\u200b", "\ufeff")


@pytest.fixture(scope="module")
def prose() -> str:
    return "\n\n".join(document["text"] for document in builtin.load("quickstart")[:400])


@pytest.fixture(scope="module")
def learnt(prose) -> tokenizer.Tokenizer:
    return tokenizer.train([prose], 1500)


@pytest.fixture(scope="module")
def strings(prose) -> list[str]:
    draw = random.Random(1)
    words = prose.split()
    kinds = (
        lambda: draw.choice(words),
        lambda: " ".join(draw.choices(words, k=4)),
        lambda: draw.choice(EMOJI),
        lambda: draw.choice(SCRIPTS),
        lambda: draw.choice(SPACES),
        lambda: draw.choice(SPECIAL),
        lambda: chr(draw.choice([*range(1, 32), 127, *range(128, 160)])),
        lambda: chr(
            draw.choice(
                [draw.randrange(0x20, 0x2500), draw.randrange(0xE000, 0x10000), draw.randrange(0x10000, 0x110000)]
            )
        ),
        lambda: str(draw.randrange(10**9)),
        lambda: draw.choice("abeo .,") * draw.randint(2, 30),
    )
    mixtures = [
        draw.choice(("", " ", "  ")) + "".join(draw.choice(kinds)() for _ in range(draw.randint(1, 10)))
        for _ in range(COUNT)
    ]
    return ["", " ", *SPACES, *SPECIAL, *EMOJI, *SCRIPTS, *mixtures]


def test_1200_strings_have_the_same_ids_everywhere(make, learnt, strings, tmp_path):
    path = gguf.write(exports.trained(make, learnt, latent_norm=False), str(tmp_path / "gguf"))
    exported = tokenizers.Tokenizer.from_str(hf_tokenizer.files(learnt, 64)["tokenizer.json"])
    exported.encode_special_tokens = True  # text that looks like a special token stays text
    assert len(set(strings)) >= 1200
    with gguf.serve(path, learnt.vocab_size, 100) as run:
        for text in strings:
            ids = learnt.encode(text)
            assert learnt.decode(ids) == text and not set(ids) & set(learnt.specials.values())
            assert exported.encode(text, add_special_tokens=False).ids == ids, repr(text)
            assert run.encode(text) == ids, repr(text)


def test_conversations_render_to_the_text_and_ids_of_training(make, learnt, strings, tmp_path):
    import transformers

    model = exports.trained(make, learnt, latent_norm=False)
    path = gguf.write(model, str(tmp_path / "gguf"))
    (tmp_path / "hf").mkdir()
    for name, text in hf_tokenizer.files(learnt, 64).items():
        (tmp_path / "hf" / name).write_text(text, encoding="utf-8", newline="")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    said = [text for text in strings if not any(name in text for name in (*learnt.specials, "<unk>"))]
    with gguf.serve(path, learnt.vocab_size, 100) as run:
        for i in range(40):
            roles = ["system"] * (i % 2) + ["user", "assistant", "user"]
            messages = [{"role": role, "content": said[5 * i + j]} for j, role in enumerate(roles)]
            ids = [learnt.bos, *chat.encode(learnt, messages, prompt=True)[0]]
            text = chat.render(learnt, messages, True).translate(
                dict.fromkeys(map(ord, chat.OPEN + chat.CLOSE + chat.BREAK))
            )
            assert exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith(text)
            assert exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
            assert run.encode_chat(messages) == ids, messages
