"""Run an hf export in PEFT, TRL, accelerate, torch.compile, a pipeline, and quantised.

    pip install -r requirements-test.txt peft trl torchao bitsandbytes
    python scripts/studies/peer_smoke.py --export=exports/hf

Prints one line per check, and exits with 1 if any fails. A package that is not installed is named and left out.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"
TEXTS = ["The first thing that she saw", "A little town by the sea, where nothing much had ever happened", "Once"] * 2
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def load(folder: str, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def batch_of(folder: str, side: str = "left"):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side=side)
    return tokenizer(TEXTS[:3], padding=True, return_tensors="pt")


def lora(folder: str):
    """Train adapters of every matrix; cached, uncached and merged generation agree."""
    import torch
    from peft import LoraConfig, get_peft_model

    batch = batch_of(folder)
    for targets in ("all-linear", ["q.down", "q.up", "v.down", "v.up"]):
        net = get_peft_model(load(folder), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        labels, losses = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), []
        for _ in range(8):
            losses.append(net.train()(**batch, labels=labels).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.1, losses
        said = net.eval().generate(**batch, **GREEDY)
        assert torch.equal(said, net.generate(**batch, **GREEDY, use_cache=False))
        assert torch.equal(said, net.merge_and_unload().generate(**batch, **GREEDY))


def prompt_and_prefix_tuning(folder: str):
    """Prompt tuning trains; prefix tuning is refused, because the cache holds latents."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    batch = batch_of(folder)
    net = get_peft_model(load(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    net(**batch, labels=batch["input_ids"]).loss.backward()
    net = get_peft_model(load(folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    try:
        net(**batch)
    except ValueError as e:
        assert "prefix tuning is impossible" in str(e) and "\n" not in str(e), e
    else:
        raise AssertionError("prefix tuning was not refused")


def sft(folder: str):
    """Take 2 steps of SFTTrainer, padded, packed and padding-free: the first loss of all but packing is the same."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data, losses = datasets.Dataset.from_dict({"text": TEXTS}), {}
    kinds = {
        "left": {},
        "right": {},
        "padding-free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True},
    }
    for name, settings in kinds.items():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.padding_side = "left" if name == "left" else "right"
        with tempfile.TemporaryDirectory() as out:
            common = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
            common |= {
                "per_device_train_batch_size": 6,
                "save_strategy": "no",
                "bf16": False,
                "seed": 1,
                "lr_scheduler_type": "constant",
            }
            config = SFTConfig(
                out, gradient_checkpointing=False, loss_type="nll", **common | {"max_length": 64} | settings
            )
            trainer = SFTTrainer(load(folder), args=config, train_dataset=data, processing_class=tokenizer)
            trainer.train()
            losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    for name in ("right", "padding-free", "packed"):
        assert all(abs(a - b) < 2e-3 for a, b in zip(losses[name], losses["left"], strict=True)), losses


def offloading(folder: str):
    """Weights in files or in host memory between calls: generation is the same."""
    import torch
    from accelerate import cpu_offload, disk_offload

    batch = batch_of(folder)
    expected = load(folder).generate(**batch, **GREEDY)
    net = cpu_offload(load(folder), execution_device=torch.device("cpu"))
    assert torch.equal((net or load(folder)).generate(**batch, **GREEDY), expected)
    with tempfile.TemporaryDirectory() as out:
        net = load(folder)
        disk_offload(net, out, execution_device=torch.device("cpu"))
        assert torch.equal(net.generate(**batch, **GREEDY), expected)


def device_map(folder: str):
    import torch

    batch, expected = batch_of(folder), load(folder).generate(**batch_of(folder), **GREEDY)
    for settings in ("auto", "cpu", {"": "cpu"}):
        assert torch.equal(load(folder, device_map=settings).generate(**batch, **GREEDY), expected)
    with tempfile.TemporaryDirectory() as out:
        layers = {f"model.layers.{i}": "cpu" for i in range(len(load(folder).model.layers))}
        places = (
            {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"} | layers | {"model.layers.1": "disk"}
        )
        net = load(folder, device_map=places, offload_folder=out)
        assert torch.equal(net.generate(**batch, **GREEDY), expected)


def compiled(folder: str):
    import torch

    net, batch = load(folder), batch_of(folder)
    with torch.no_grad():
        expected = net(**batch).logits
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(**batch).logits, expected, atol=1e-4, rtol=0)
    said = net.generate(**batch, **GREEDY)
    assert torch.equal(net.generate(**batch, **GREEDY, cache_implementation="static"), said)


def pipeline(folder: str):
    from transformers import pipeline

    write = pipeline("text-generation", folder, trust_remote_code=True, tokenizer=folder)
    write.tokenizer.padding_side = "left"
    alone = [write(text, **GREEDY)[0]["generated_text"] for text in TEXTS[:3]]
    assert [out[0]["generated_text"] for out in write(TEXTS[:3], batch_size=3, **GREEDY)] == alone
    assert write([{"role": "user", "content": [{"type": "text", "text": "Hello."}]}], **GREEDY)


def quantised(folder: str):
    """torchao's weights in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    check_quantised(folder, TorchAoConfig(Int8WeightOnlyConfig()), 0.5)


def bits_and_bytes(folder: str):
    """bitsandbytes' weights in 8 bits; on a CPU its 4 bits take no matrix as narrow as a latent."""
    from transformers import BitsAndBytesConfig

    check_quantised(folder, BitsAndBytesConfig(load_in_8bit=True), 1.0)


def check_quantised(folder: str, config, most: float) -> None:
    """Cached generation is uncached generation, and logits are close."""
    import torch

    batch = batch_of(folder)
    net = load(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        gap = (net(**batch).logits - load(folder)(**batch).logits)[seen].abs().max()
    assert 0 < gap < most, gap
    assert torch.equal(net.generate(**batch, **GREEDY), net.generate(**batch, **GREEDY, use_cache=False))


CHECKS = {
    lora: "peft",
    prompt_and_prefix_tuning: "peft",
    sft: "trl",
    offloading: "accelerate",
    device_map: "accelerate",
    compiled: "torch",
    pipeline: "transformers",
    quantised: "torchao",
    bits_and_bytes: "bitsandbytes",
}


def main(args: list[str]) -> int:
    folder = next((arg.partition("=")[2] for arg in args if arg.startswith("--export=")), "")
    names = [arg for arg in args if not arg.startswith("--")]
    if not os.path.isfile(os.path.join(folder, "modeling_lowrank.py")):
        print("error: --export=FOLDER must be an export with --format=hf", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)  # threads of a busy machine wait for each other by spinning
    failed = 0
    for check, package in CHECKS.items():
        if names and check.__name__ not in names:
            continue
        if importlib.util.find_spec(package) is None:
            print(f"{check.__name__}: left out, pip install {package}")
            continue
        try:
            check(folder)
            print(f"{check.__name__}: passed")
        except Exception:
            failed += 1
            print(f"{check.__name__}: failed\n{traceback.format_exc()}")
    return int(failed > 0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
