"""A few minutes on a laptop CPU: from the plays' raw text to a model that answers.

    bash scripts/quickstart.sh
"""

from configs import default


def get_config():
    c = default.get_config()
    c.model.update(d=256, layers=6, heads=8, rank=32, scan=False)
    c.tokenizer.update(vocab_size=2048, train_bytes=6_000_000)
    c.pretrain.update(
        sources="builtin:quickstart@0.7, builtin:quickchat@0.3",
        steps=300,
        tokens_per_step=6144,
        microbatch_tokens=1024,
        block=128,
        auto_grow=True,
        grow_plan="128,256,512",
        grow_every_steps=100,
        lr=1e-2,
        eval_fraction=0.02,
        eval_tokens=16_384,
    )
    c.sft.update(
        sources="builtin:quickchat",
        steps=100,
        tokens_per_step=6144,
        microbatch_tokens=1024,
        block=512,
        lr=5e-3,
        eval_fraction=0.02,
        eval_tokens=16_384,
    )
    c.every.update(log=5, eval=50, save=50, keep=2)
    return c
