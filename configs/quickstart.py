"""From the plays' raw text to a model that answers, in a few minutes on a laptop CPU.

    bash scripts/quickstart.sh

It takes about 10 CPU minutes. Two choices make it quick (scripts/bench/step.py): a microbatch of 1,024 tokens instead
of 4,096 stays in the processor's cache, and unrolled layers are faster than scanned ones.
"""

from lowrank_jax.configs import default


def get_config():
    c = default.get_config()
    c.model.update(d=256, layers=4, heads=8, rank=32, scan=False)
    c.tokenizer.update(vocab_size=2048, train_bytes=6_000_000)
    c.pretrain.update(
        sources="builtin:quickstart@0.6, builtin:quickchat@0.4",
        steps=330,
        tokens_per_step=4096,
        microbatch_tokens=1024,
        block=128,
        auto_grow=True,
        grow_plan="128,256,512",
        grow_every_steps=120,
        eval_fraction=0.02,
        eval_tokens=16_384,
        sample="ROMEO:\n",
    )
    c.sft.update(
        sources="builtin:chitchat@0.9, builtin:smalltalk@0.1",
        steps=130,
        tokens_per_step=4096,
        microbatch_tokens=1024,
        block=512,
        eval_fraction=0.02,
        eval_tokens=16_384,
        sample="Hello, how are you?",
    )
    c.every.update(log=5, eval=65, save=65, keep=2)
    return c
