"""Exports for transformers in training and behind other libraries: padding, packing, offloading, chats of parts."""

import exports
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, DynamicCache

from lowrank_jax.export import hf

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
LENGTHS = (5, 17, 11)


@pytest.fixture(scope="module", params=["usual", "all in low rank", "dense"])
def folder(request, make, tok, tmp_path_factory) -> str:
    model = exports.trained(make, tok, **exports.MODELS[request.param])
    return hf.write(model, str(tmp_path_factory.mktemp("hf") / "out"))


@pytest.fixture(scope="module")
def usual(make, tok, tmp_path_factory) -> str:
    return hf.write(exports.trained(make, tok), str(tmp_path_factory.mktemp("hf") / "usual"))


def load(folder: str, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def texts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(4, 521, (n,), generator=draw) for n in LENGTHS]


def padded(side: str, width: int = 20) -> dict[str, torch.Tensor]:
    """Return a batch of the texts with padding on one side; labels are -100 there."""
    batch = {"input_ids": torch.zeros(3, width, dtype=int), "attention_mask": torch.zeros(3, width, dtype=int)}
    for i, text in enumerate(texts()):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        batch["input_ids"][i, place], batch["attention_mask"][i, place] = text, 1
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def gradients(net, loss) -> torch.Tensor:
    net.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def outside(net, batch):
    """The loss of a program that shifts logits itself, and counts every position, padding too."""
    logits, labels = net(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["input_ids"]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("count", [None, 33])  # as the Trainer counts labels
def test_left_and_right_padding_train_alike(folder, count):
    net, result = load(folder).train(), {}
    for side in ("left", "right"):
        batch = padded(side)
        if count:
            batch["num_items_in_batch"] = (batch["labels"][:, 1:] != -100).sum()
        loss = net(**batch).loss
        result[side] = loss.detach(), gradients(net, loss)
    alone = [net(text[None], labels=text[None]).loss for text in texts()]
    weights = torch.tensor([len(text) - 1.0 for text in texts()])
    expected = (torch.stack(alone) * weights).sum() / weights.sum()
    result["alone"] = expected.detach(), gradients(net, expected)
    for side in ("left", "right"):
        torch.testing.assert_close(result[side], result["alone"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_has_no_gradient_whatever_the_loss(folder, attention):
    net = load(folder, attn_implementation=attention).train()
    for side in ("left", "right"):
        batch = padded(side)
        logits = net(batch["input_ids"], batch["attention_mask"]).logits
        assert not logits[batch["attention_mask"] == 0].any()
        assert not gradients(net, (logits * (batch["attention_mask"] == 0)[..., None]).sum()).any()
        assert gradients(net, outside(net, batch)).norm() < 2000
    blind = (torch.ones(1, 1, 8, 8).tril() * (torch.arange(8) > 2)).bool()
    logits = net(texts()[1][None, :8], attention_mask=blind).logits
    assert not logits[0, :3].any() and logits[0, 3:].abs().max() > 0


def test_steps_of_adamw_end_alike(usual):
    ends, weights = {}, {}
    for side in ("left", "right"):
        net, batch = load(usual).train(), padded(side)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            (loss := net(**batch).loss).backward()
            optimizer.step()
        ends[side], weights[side] = loss.item(), torch.cat([p.detach().flatten() for p in net.parameters()])
    print(ends, (weights["left"] - weights["right"]).abs().max())
    assert ends["left"] == pytest.approx(ends["right"], abs=1e-4) and ends["left"] < 5


def packings() -> dict[str, dict]:
    """Return ways to say which tokens of one row belong together; the last has padding behind it."""
    flat = {"return_tensors": "pt"}
    features = [{"input_ids": text.tolist()} for text in texts()]
    collated = DataCollatorWithFlattening(**flat)(features)
    lengths = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True, **flat)(features)
    numbers = DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True, **flat)(features)
    pad = torch.nn.functional.pad
    mask = {"attention_mask": pad(torch.ones_like(collated["input_ids"]), (0, 3))}
    return {
        "position_ids": dict(collated),
        "cu_seq_lens": dict(lengths),
        "seq_idx": dict(numbers),
        "with a mask": {key: pad(x, (0, 3), value=-100 * (key == "labels")) for key, x in collated.items()} | mask,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_as_alone(folder, attention):
    net = load(folder, attn_implementation=attention)
    with torch.no_grad():
        alone = torch.cat([net(text[None]).logits[0] for text in texts()])
        loss = sum(net(text[None], labels=text[None]).loss * (len(text) - 1) for text in texts()) / (sum(LENGTHS) - 3)
    for i, batch in enumerate(packings().values()):
        net.train(i % 2 == 1)
        out = net(**batch)
        torch.testing.assert_close(out.logits[0, : len(alone)], alone, atol=2e-5, rtol=0)
        assert out.past_key_values is None
        torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=0)
        whole = batch | {"labels": batch["input_ids"]}  # labels across documents do not count
        if "attention_mask" not in batch:
            torch.testing.assert_close(net(**whole).loss, loss, atol=1e-5, rtol=0)


def test_rows_with_several_documents_each(usual):
    net, (a, b, c) = load(usual), texts()
    ids = torch.stack([torch.cat([a, c]), b[:16]])
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(11)]), torch.arange(16)])
    lengths = torch.tensor([0, 5, 16, 32])
    for extra in ({"position_ids": positions}, {"cu_seq_lens_q": lengths}):
        logits = net(ids, **extra).logits
        for got, text in ((logits[0, :5], a), (logits[0, 5:], c), (logits[1], b[:16])):
            torch.testing.assert_close(got, net(text[None]).logits[0], atol=2e-5, rtol=0)


def test_positions_of_one_document_change_nothing(usual):
    net, text = load(usual), texts()[1][None]
    expected = net(text).logits
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    hidden = net(text, attention_mask=mask).logits
    for positions in (torch.arange(17), torch.arange(17)[None] + 5):
        torch.testing.assert_close(net(text, position_ids=positions).logits, expected)
    for positions in (mask.cumsum(-1) - 1, (mask.cumsum(-1) - 1).clamp(min=0)):  # as generation counts them
        torch.testing.assert_close(net(text, attention_mask=mask, position_ids=positions).logits, hidden)
    hole = torch.ones_like(text)
    hole[0, 7] = 0
    expected = net(text, attention_mask=hole).logits
    for positions in (hole.cumsum(-1) - 1, torch.arange(17)[None]):
        torch.testing.assert_close(net(text, attention_mask=hole, position_ids=positions).logits, expected)


def test_what_cannot_be_honoured_is_refused_in_one_line(usual):
    net, batch = load(usual), packings()["position_ids"]
    with pytest.raises(ValueError, match="packed documents .* past_key_values=None"):
        net(batch["input_ids"], position_ids=batch["position_ids"], past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 32, but the batch has 1 x 33 tokens"):
        net(batch["input_ids"], cu_seq_lens_q=torch.tensor([0, 5, 32]))
    prefix = DynamicCache([(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))] * 2)
    with pytest.raises(ValueError, match=r"\[4, 4\] numbers .* \[4, 12\]: prefix tuning is impossible, use LoRA"):
        net(batch["input_ids"], past_key_values=prefix)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        net()


@torch.no_grad()
def test_attentions_come_from_eager_alone(usual, caplog):
    net, batch = load(usual, attn_implementation="eager"), padded("left")
    out = net(batch["input_ids"], batch["attention_mask"], output_attentions=True)
    assert [weights.shape for weights in out.attentions] == [(3, 8, 20, 20)] * 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8, 20))
        assert not weights[0, :, 15:, :15].any() and not weights[1, :, 3:].triu(4).any()
    assert net(batch["input_ids"]).attentions is None
    step = net(
        batch["input_ids"][:, :1], past_key_values=net(batch["input_ids"]).past_key_values, output_attentions=True
    )
    assert [weights.shape for weights in step.attentions] == [(3, 8, 1, 21)] * 2
    net = load(usual)
    assert net(batch["input_ids"], output_attentions=True).attentions is None


@torch.no_grad()
def test_weights_may_be_elsewhere_between_calls(folder):
    from accelerate import cpu_offload

    net, ids = load(folder), texts()[1][None]
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = net.generate(ids, **greedy), net(ids).logits
    cpu_offload(net, execution_device=torch.device("cpu"))
    assert next(net.parameters()).is_meta
    torch.testing.assert_close((net.generate(ids, **greedy), net(ids).logits), expected)


def test_embeddings_go_in_as_they_come_out(folder):
    net, ids = load(folder), texts()[1][None]
    torch.testing.assert_close(net(inputs_embeds=net.get_input_embeddings()(ids)).logits, net(ids).logits)


def test_the_tokenizer_pads_right_for_training_and_left_for_generation(usual, tok):
    assert AutoTokenizer.from_pretrained(usual, trust_remote_code=False).padding_side == "right"
    left = AutoTokenizer.from_pretrained(usual, trust_remote_code=False, padding_side="left")
    net, prompts = load(usual), ["The cat", "A much longer beginning of some text, and"]
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    both = net.generate(**left(prompts, padding=True, return_tensors="pt"), **greedy)
    for prompt, said in zip(prompts, both):
        alone = net.generate(**left(prompt, return_tensors="pt"), **greedy)[0]
        assert torch.equal(said[-len(alone) :], alone)


def test_chats_take_parts_of_text(usual, make):
    tokenizer = AutoTokenizer.from_pretrained(usual, trust_remote_code=False)
    messages = [{"role": "system", "content": " be\n brief "}, *make.chat(3, 1)]
    cut = lambda text: [{"type": "text", "text": part} for part in (text[:3], text[3:])]
    parts = [message | {"content": cut(message["content"])} for message in messages]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = tokenizer.apply_chat_template(messages, **options)
    assert tokenizer.apply_chat_template(parts, **options) == expected and any(expected["assistant_masks"])
    assert tokenizer.apply_chat_template([messages[0], *parts[1:]], **options) == expected
    with pytest.raises(Exception, match="parts of type text alone"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])
