"""Model sizes by name: --config=preset:base17. All have R = d/8: attention with 75% fewer parameters.

The two large presets were planned and never trained: `lowrank_jax.plan --topology` shows their needs (docs/scaling.md).
"""

from lowrank_jax.config import UsageError
from lowrank_jax.configs import default

PRESETS = {
    "small": {"d": 512, "layers": 8, "heads": 16, "rank": 64},
    "smallx2": {"d": 512, "layers": 16, "heads": 16, "rank": 64},
    "base": {"d": 768, "layers": 12, "heads": 24, "rank": 96},
    "base17": {"d": 768, "layers": 17, "heads": 24, "rank": 96},
    # 0.98 and 6.8 billion parameters. Heads of width 64, or 80 with ALiBi's channels, suit cuDNN's attention. By an
    # H200's compiler, a step of 1b at 4,096 tokens moves 2.4 TB through memory as it is, 3.9 TB with scan=True, and
    # computes 22% more with remat=True. Where not even one row fits, the memory gate rematerialises by itself.
    "1b": {"d": 2048, "layers": 24, "heads": 32, "rank": 256, "scan": False},
    "7b": {"d": 4096, "layers": 44, "heads": 64, "rank": 512, "remat": True},
}
# Tokens per step are a power of two, so 16, 64 or 256 devices divide the rows of every length.
LARGE = {
    "1b": {"tokens_per_step": 2**19, "microbatch_tokens": 32_768, "grow_every_steps": 10_000, "lr": 2e-3},
    "7b": {"tokens_per_step": 2**21, "microbatch_tokens": 65_536, "grow_every_steps": 20_000, "lr": 1e-3},
}


def get_config(name: str = ""):
    if name not in PRESETS:
        raise UsageError(f"--config=preset:NAME needs a NAME out of {', '.join(PRESETS)}, not {name!r}")
    c = default.get_config()
    c.model.update(PRESETS[name])
    c.pretrain.update(microbatch_tokens=12_288)
    c.sft.update(steps=1_000, microbatch_tokens=12_288, block=1024)
    if name in LARGE:
        c.tokenizer.update(vocab_size=32_000)
        c.pretrain.update(LARGE[name], block=1024, auto_grow=True, grow_plan="1024,2048,4096")
        c.sft.update(LARGE[name], block=4096, lr=LARGE[name]["lr"] / 5)
    return c
