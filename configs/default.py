"""Every key with its default. Other configs start from `get_config()` and change some keys.

Any key can also be set on the command line: --config.model.d=768 --config.pretrain.sources="text:my/*.txt".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    # type_safe is off because sources may be text or a list; lowrank_jax/config.py checks every key and type.
    return ConfigDict(run() | groups(), type_safe=False)


def run() -> dict:
    return {
        "seed": 0,  # of the weights and of the order of the data
        # fp32 | bf16 | fp16 (with a dynamic loss scale) | fp8 (the MLP's and other wide matmuls; the rest is bf16) |
        # auto: bf16 on an accelerator, fp32 on a CPU. Weights and optimizer state are always fp32.
        "precision": "auto",
        "memory_gb": 0.0,  # GiB of a device that training may use; 0: 90% of the device's memory
        "init_from": "",  # folder of a run whose weights and tokenizer start this one; that model may be shallower
        "track": "tensorboard",  # any of tensorboard, wandb, mlflow, separated by commas; empty: none
        "profile": 0,  # early steps to trace with jax.profiler, into FOLDER/profile; 0: none
        "tasks": "",  # of lm-evaluation-harness, run every `every.tasks` steps: hellaswag,my_task.yaml
        "task_limit": 200,  # most questions of each; 0: all
    }


def groups() -> dict:
    return {
        # The figures for rank, rank_split, latent_norm and lr come from docs/results.md.
        "model": {
            "vocab": 0,  # size of the vocabulary; 0: the tokenizer's
            "d": 512,  # width
            "layers": 8,  # depth: blocks of attention and MLP
            "heads": 16,  # must divide d
            # Heads of keys and values, each for heads / kv_heads heads of queries (GQA, arXiv 2305.13245; 1 is MQA);
            # 0: as many as heads. Only dense models' caches shrink by it, and no export takes it.
            "kv_heads": 0,
            # Mean rank R of Q, K, V, O; 0: dense, without latents. R = d/8 has 75% fewer attention parameters than
            # dense and ended 0.010 bits per byte higher after the same steps. R = d/4 ended 0.020 lower than d/8, with
            # twice the cache.
            "rank": 64,
            # Shares of the 4R ranks for q, k, v, o. An even split ended 0.008 bits per byte higher. A share of 0 keeps
            # q or o dense: rank 20 and 1,1,3,0 have the cache of rank 32 and 1,1,3,3, and a dense o.
            "rank_split": (1.0, 1.0, 3.0, 3.0),
            "shared_kv": False,  # one latent for K and V: 7dR parameters instead of 8dR, and half the cache
            # RMSNorm on the q, k, v latents. Ended 0.023 bits per byte higher after 0.5M tokens, and 0.001 to 0.005
            # lower after 4.2M with another start of the factors. llama.cpp cannot represent it.
            "latent_norm": False,
            "mlp": 0,  # width of the SwiGLU; 0: 8/3 d, rounded up to a multiple of 64
            "mlp_rank": 0,  # rank of the MLP's matrices; 0: not factored
            "embed_rank": 0,  # rank of the embedding and the head; 0: not factored
            "tied": True,  # the head is the embedding; False: the head has a table of its own
            # splash (TPU) | cudnn (GPU) | native (CPU, fp32) | chunked | reference | auto: the platform's own kernel,
            # or chunked where that kernel cannot run
            "attention": "auto",
            # True compiles one block for all layers, so compile time does not grow with depth. False compiles each
            # layer: the quickstart's step is 1.1 times as fast on a CPU (scripts/bench/step.py ... model.scan=True).
            "scan": True,
            # Recompute each block in the backward pass: less memory for a third more work. It is switched on by itself
            # where not even one row fits without it.
            "remat": False,
        },
        # Devices along each axis; their product is the number of devices, on one machine or many. The mesh changes only
        # memory and speed, and a run may resume on another mesh.
        "mesh": {
            "data": 0,  # parts of a batch, each with a copy of the weights; 0: chosen with fsdp
            # Parts of both the batch and the weights. 0: data x fsdp is the largest number of devices that divides the
            # rows of every stage, and fsdp takes as much of it as keeps d / fsdp a multiple of 128.
            "fsdp": 0,
            "tensor": 0,  # parts of the heads and of the MLP's width; 0: the devices that data x fsdp leaves
        },
        "optim": {
            "name": "muon",  # muon (for matrices; AdamW for the rest) | adamw
            "beta1": 0.95,  # decay of the mean of gradients
            "beta2": 0.95,  # decay of the mean of squared gradients (AdamW)
            "weight_decay": 0.1,  # on the blocks' matrices
            "clip": 1.0,  # largest norm of the gradient; 0: no limit
            "z_loss": 0.0,  # weight of the mean squared log of the softmax's normaliser, such as 1e-4
            "label_smoothing": 0.0,  # share of each target that is spread over the vocabulary
            # Decay of an average of the weights over a phase's steps, such as 0.999. The average is evaluated, saved
            # for use, and trained further in the next phase. 0: no average
            "ema": 0.0,
            # An update is skipped where its loss or gradient norm is not finite, or where its loss or log gradient norm
            # lies this many running deviations above the running mean. 0: only where it is not finite
            "skip_sigma": 8.0,
        },
        "tokenizer": {
            "path": "",  # a SentencePiece model or a run's tokenizer folder; empty: learn a tokenizer from the sources
            # Pieces of the learned tokenizer. 0: the square root of the sources' bytes, from 512 to 32,000: 1,088 for
            # 1.2 MB, 2,240 for 5 MB, 32,000 from 1 GB on (`pieces_for` in lowrank_jax/data/tokenizer.py says why)
            "vocab_size": 0,
            "train_bytes": 20_000_000,  # bytes of text to learn it from
        },
        "pretrain": phase(),
        "sft": phase(
            sources="builtin:quickchat",
            steps=0,  # 0: no SFT
            lr=6e-4,
            warmup=0.05,
        ),
        "every": {
            "log": 10,  # steps between two logged losses
            "eval": 500,  # steps between two evaluations; a phase's first and last weights are evaluated, too
            "save": 1000,  # steps between two checkpoints; a phase's end is saved, too
            "save_minutes": 15.0,  # longest time between two checkpoints; 0: no limit
            "keep": 3,  # newest checkpoints that are kept; each phase's last one is kept besides
            "tasks": 0,  # steps between two runs of `tasks`; a phase's end runs them, too. 0: never
            "fp8_check": 100,  # steps between two comparisons of fp8 with bf16; where they differ, bf16 takes over
        },
    }


def phase(**changes) -> dict:
    """Return the keys of a phase; `pretrain` and `sft` have the same."""
    return {
        # "kind:location, kind:location@weight, ..." with text, json, parquet, hf, tfds, arrayrecord or builtin as kind
        # (docs/custom_dataset.md). Weights are shares of the tokens and 1 by default; @0:0.7/1000:0.3 changes with the
        # step of the phase. Or a list (on the command line, as JSON text) of {"spec": "json:my/*.jsonl",
        # "weight": 2.0, "text_key": "body", "messages_key": "turns", "split": "train"}.
        "sources": "builtin:quickstart",
        # -1: tokens_per_param x parameters / tokens_per_step. 0: none. With pretrain.steps=0, SFT trains the weights of
        # init_from alone; without init_from, it means -1, as in older configs.
        "steps": -1,
        "tokens_per_param": 25.0,  # tokens to train on for each parameter, with steps=-1
        "tokens_per_step": 49_152,  # 3 x 2^14: divisible by 256, 512, 768, 1024, 1536, 2048, ...
        # Most tokens of a microbatch on a device, but at least one row; gradients of microbatches are accumulated. It
        # is lowered where they do not fit into memory. 0: as many tokens as fit
        "microbatch_tokens": 0,
        "block": 1024,  # sequence length; with auto_grow the first one
        "auto_grow": False,  # train on longer and longer sequences
        "grow_plan": "",  # rising sequence lengths, such as 256,512,1024
        "grow_every_steps": 1000,  # steps at each length; the last length takes the remaining steps
        # Peak learning rate: the best of 0.0015, 0.003, 0.006 and 0.012 for dense and low rank. SFT has a fifth of it.
        "lr": 3e-3,
        "lr_core": 0.0,  # peak for the blocks' weights; 0: lr
        "lr_head": 0.0,  # peak for the embedding, the head and the last norm; 0: lr
        # Regular expression of the paths of weights that are not trained, such as "embed|norm" or "^blocks".
        "freeze": "",
        "schedule": "wsd",  # wsd (warm-up, stable, linear decay) | cosine | linear
        "warmup": 0.02,  # share of the phase's steps
        "cooldown": 0.3,  # share of the phase's steps (wsd)
        "lr_end": 0.0,  # last learning rate, as a share of lr
        "eval_fraction": 0.01,  # share of each source's documents that is held out
        "eval_tokens": 49_152,  # held-out tokens that an evaluation reads
        "max_skipped": 100,  # unusable records of a source that are skipped and logged in events.jsonl; 0: none
        "readers": 0,  # readers that fill a batch; as many hosts can read separate shares. 0: up to 8
        "sample": "",  # prompt that the model continues (SFT: answers) at the end of the phase; empty: none
    } | changes
