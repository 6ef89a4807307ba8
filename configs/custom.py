"""The 250M model: 20 layers of width 1024 with rank-128 attention, grown from 256 to 2048 tokens.

    python -m lowrank_jax.main --config=configs/custom.py --workdir=runs/custom \\
        --config.pretrain.sources="json:my/*.jsonl"

`python -m lowrank_jax.plan --config=configs/custom.py` prints its stages, parameters and cache.
"""

from lowrank_jax.configs import default


def get_config():
    c = default.get_config()
    c.model.update(d=1024, layers=20, heads=32, rank=128, remat=True)
    c.tokenizer.update(vocab_size=32_000)
    c.pretrain.update(
        steps=150_000,  # 7.4 billion tokens, about 30 a parameter
        tokens_per_step=49_152,
        microbatch_tokens=12_288,
        block=256,
        auto_grow=True,
        grow_plan="256,512,768,1024,1536,2048",
        grow_every_steps=25_000,
        lr=3e-3,
    )
    c.sft.update(steps=3_000, tokens_per_step=49_152, microbatch_tokens=12_288, block=2048, lr=6e-4)
    return c
