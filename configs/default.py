"""Every key with its default. Other configs start from `get_config()` and change what differs.

Any key can also be set on the command line: --config.model.d=768 --config.pretrain.sources="text:my/*.txt".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    # type_safe is off because sources may be text or a list; lowrank_jax/config.py checks every key and type.
    return ConfigDict(run() | groups(), type_safe=False)


def run() -> dict:
    return {
        "seed": 0,
        # fp32 | bf16 | fp16 (with a dynamic loss scale) | fp8 (the MLP's and other wide matmuls; the rest is bf16) |
        # auto, which is bf16 on an accelerator and fp32 on a CPU. Weights and optimizer state are always kept in fp32.
        "precision": "auto",
        "memory_gb": 0.0,  # GiB of a device that training may use; 0: 90% of what the device has
        "init_from": "",  # a run's folder to take the first weights (and the tokenizer) from, also a shallower one's
        "track": "tensorboard",  # any of tensorboard, wandb, mlflow; empty: none
        "profile": 0,  # steps to trace with jax.profiler once training is under way, into FOLDER/profile; 0: off
    }


def groups() -> dict:
    return {
        "model": {
            "vocab": 0,  # 0: the tokenizer's size
            "d": 512,  # width
            "layers": 8,
            "heads": 16,  # must divide d
            # The figures of rank, rank_split, latent_norm and lr are those of docs/results.md.
            # Mean rank R of Q, K, V, O. R = d/8 has 75% fewer attention parameters than dense, and ended 0.010 bits per
            # byte higher after the same steps. R = d/4 ended 0.020 lower than d/8, with twice the cache. 0: dense, no
            # latents.
            "rank": 64,
            # Shares of the 4R ranks for q, k, v, o. An even split ended 0.008 bits per byte higher.
            "rank_split": (1.0, 1.0, 3.0, 3.0),
            "shared_kv": False,  # one latent for K and V: 7dR parameters instead of 8dR, and half the cache
            # RMSNorm on the q, k, v latents. Ended 0.023 bits per byte higher; llama.cpp has no place for it.
            "latent_norm": False,
            "mlp": 0,  # width of the SwiGLU; 0: 8/3 d, rounded up to a multiple of 64
            "mlp_rank": 0,  # factors the MLP's matrices too; 0: off
            "embed_rank": 0,  # factors the embedding and head; 0: off
            "tied": True,  # the head is the embedding; False: one more table of its size
            # splash (TPU) | cudnn (GPU) | native (CPU, fp32) | chunked | reference; auto is the platform's, and chunked
            # where that cannot be
            "attention": "auto",
            # One compiled block for all layers, so that compile time does not grow with depth. False unrolls them: the
            # quickstart's step runs 1.1 times as fast on a CPU (scripts/bench/step.py ... model.scan=True).
            "scan": True,
            # Recompute each block in the backward pass: less memory, a third more work. Done anyway where not even one
            # row fits without it.
            "remat": False,
        },
        # How many devices along each axis; their product is the number of devices, on one machine or many. Only memory
        # and speed depend on it, and a run may go on with another.
        "mesh": {
            "data": 0,  # parts of a batch, each with weights of its own; 0: chosen with fsdp
            # Parts of a batch and of the weights. 0: with data as many parts as the rows of every stage come out even
            # in, as many of them fsdp as leave 128 of the model's width to each.
            "fsdp": 0,
            "tensor": 0,  # parts of the heads and of the MLP's width; 0: what is left
        },
        "optim": {
            "name": "muon",  # muon (matrices; AdamW for the rest) | adamw
            "beta1": 0.95,
            "beta2": 0.95,
            "weight_decay": 0.1,  # on the blocks' matrices
            "clip": 1.0,  # gradient norm; 0: off
            "z_loss": 0.0,  # weight of the mean squared log of the softmax's normaliser, such as 1e-4
            "label_smoothing": 0.0,  # share of the target that is spread over the vocabulary
            # Decay of an average of the weights over the steps of a phase, such as 0.999: that average is what is
            # evaluated, used, and trained on from in the next phase. 0: off
            "ema": 0.0,
            # An update whose loss or gradient norm is not finite is skipped, and so is one whose loss or log gradient
            # norm lies this many running deviations above the running mean; 0: only the former.
            "skip_sigma": 8.0,
        },
        "tokenizer": {
            "path": "",  # a SentencePiece model, or a run's tokenizer folder; empty: learn one from the sources
            "vocab_size": 32_000,  # size of the one to learn
            "train_bytes": 20_000_000,  # how much text to learn it from
        },
        "pretrain": phase(),
        "sft": phase(
            sources="builtin:quickchat",
            steps=0,  # 0: no SFT
            lr=6e-4,
            warmup=0.05,
        ),
        "every": {
            "log": 10,  # steps
            "eval": 500,  # steps; also before the first and after the last step of a phase
            "save": 1000,  # steps; also at the end of a phase
            "save_minutes": 15.0,  # and at least this often; 0: off
            "keep": 3,  # newest checkpoints to keep
            "fp8_check": 100,  # steps; loss and gradient are computed in bf16 too, and fp8 given up where they disagree
        },
    }


def phase(**changes) -> dict:
    """The keys of a phase; `pretrain` and `sft` have the same."""
    return {
        # "kind:location, kind:location@weight, ...": text, json, parquet, hf, tfds, arrayrecord or builtin, see
        # docs/custom_dataset.md. Weights are shares of the tokens, 1 unless given; @0:0.7/1000:0.3 changes with the
        # step of the phase. Or a list (on the command line, as JSON text) of {"spec": "json:my/*.jsonl",
        # "weight": 2.0, "text_key": "body", "messages_key": "turns", "split": "train"}.
        "sources": "builtin:quickstart",
        "steps": 0,  # 0: tokens_per_param x parameters / tokens_per_step
        "tokens_per_param": 25.0,
        "tokens_per_step": 49_152,  # 3 x 2^14: divisible by 256, 512, 768, 1024, 1536, 2048, ...
        # Most tokens at a time on a device (but a whole row); the rest is accumulated. 0: as many as fit into memory.
        # Lowered where even these do not fit.
        "microbatch_tokens": 0,
        "block": 1024,  # sequence length, or with auto_grow the first one
        "auto_grow": False,
        "grow_plan": "",  # rising lengths, such as 256,512,1024
        "grow_every_steps": 1000,  # steps at each length; the last one keeps the rest
        # Peak: the best of 0.0015, 0.003, 0.006 and 0.012 for dense and low rank. SFT has a fifth of it.
        "lr": 3e-3,
        "lr_core": 0.0,  # peak of the blocks' weights; 0: lr
        "lr_head": 0.0,  # peak of the embedding (the head, too) and the last norm; 0: lr
        # Weights that stay as they are, as a regular expression of their paths, such as "embed|norm" or "^blocks".
        "freeze": "",
        "schedule": "wsd",  # wsd (warmup, stable, linear decay) | cosine | linear
        "warmup": 0.02,  # share of the phase's steps
        "cooldown": 0.3,  # share of the phase's steps (wsd)
        "lr_end": 0.0,  # where the schedule ends, as a share of lr
        "eval_fraction": 0.01,  # share of each source's documents that is held out
        "eval_tokens": 49_152,  # how many held-out tokens an evaluation reads
        "max_skipped": 100,  # records of each source that may be unusable; each is in events.jsonl. 0: none
        "readers": 0,  # readers that fill a batch: as many hosts can read shares of their own. 0: up to 8
        "sample": "",  # what the model is to continue (sft: to answer) at the end of the phase; empty: nothing
    } | changes
