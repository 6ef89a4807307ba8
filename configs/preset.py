"""Model sizes by name: --config=configs/preset.py:base17. R = d/8 throughout: attention with 75% fewer parameters."""

from configs import default
from lowrank_jax.config import UsageError

PRESETS = {
    "small": {"d": 512, "layers": 8, "heads": 16, "rank": 64},
    "smallx2": {"d": 512, "layers": 16, "heads": 16, "rank": 64},
    "base": {"d": 768, "layers": 12, "heads": 24, "rank": 96},
    "base17": {"d": 768, "layers": 17, "heads": 24, "rank": 96},
}


def get_config(name: str = ""):
    if name not in PRESETS:
        raise UsageError(f"--config=configs/preset.py:NAME needs a NAME out of {', '.join(PRESETS)}, not {name!r}")
    c = default.get_config()
    c.model.update(PRESETS[name])
    c.pretrain.update(microbatch_tokens=12_288)
    c.sft.update(steps=1_000, microbatch_tokens=12_288, block=1024)
    return c
