"""Run the common model and generation tests of Hugging Face transformers against the exported class.

    pip install -r requirements-test.txt parameterized
    git clone --depth=1 --branch=v5.23.0 https://github.com/huggingface/transformers /tmp/transformers
    python scripts/studies/peer_tests.py --transformers=/tmp/transformers [options of pytest, such as -k generate]

The checkout's version must be that of the installed package. Its tests are imported and never copied.
"""

import os
import sys
import unittest

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
CHECKOUT = "LOWRANK_TRANSFORMERS"  # the environment variable that tells pytest's import of this file
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
# Latents of the first are as wide as its heads: tests that fix the cache's width run unchanged.
MODELS = {
    "LowRank": {"rank_q": 8, "rank_k": 8, "rank_v": 8, "rank_o": 8},
    "OneLatent": {
        "rank_q": 6,
        "rank_k": 8,
        "rank_v": 8,
        "rank_o": 10,
        "shared_kv": True,
        "mlp_rank": 6,
        "embed_rank": 12,
    },
    "OwnHead": {"rank_q": 0, "rank_k": 0, "rank_v": 0, "rank_o": 0, "embed_rank": 12, "tie_word_embeddings": False},
}
WIDTHS = ("test_generate_with_static_cache", "test_past_key_values_format")  # fix the cache's width to that of heads


def main(args: list[str]) -> int:
    """Run pytest on this file; return its exit status."""
    paths = [arg.partition("=")[2] for arg in args if arg.startswith("--transformers=")]
    if len(paths) != 1 or not os.path.isfile(os.path.join(paths[0], "tests", "test_modeling_common.py")):
        print("error: --transformers=PATH must be a checkout of huggingface/transformers", file=sys.stderr)
        return 2
    import pytest

    os.environ[CHECKOUT] = os.path.abspath(paths[0])
    rest = [arg for arg in args if not arg.startswith("--transformers=")]
    return pytest.main(
        [__file__, "-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={paths[0]}", "-c", "/dev/null", *rest]
    )


def cases() -> dict[str, type]:
    """Return a test class for each of MODELS."""
    sys.path[:0] = [os.environ[CHECKOUT], ROOT]
    import torch
    import transformers
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_configuration_common import ConfigTester
    from tests.test_modeling_common import ModelTesterMixin, ids_tensor
    from transformers.models.auto import modeling_auto as names

    from lowrank_jax.export import modeling_lowrank as ours

    torch.set_num_threads(1)
    transformers.AutoConfig.register(ours.LowRankConfig.model_type, ours.LowRankConfig)
    transformers.AutoModel.register(ours.LowRankConfig, ours.LowRankModel)
    transformers.AutoModelForCausalLM.register(ours.LowRankConfig, ours.LowRankForCausalLM)

    names.MODEL_MAPPING_NAMES[ours.LowRankConfig.model_type] = "LowRankModel"
    names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ours.LowRankConfig.model_type] = "LowRankForCausalLM"

    class Tester:
        """A model's tester, as the mixins ask for it."""

        batch_size, seq_length, is_training, vocab_size = 5, 7, True, 99

        def __init__(self, changes: dict):
            self.settings = SIZES | {"vocab_size": self.vocab_size} | changes
            vars(self).update(SIZES)

        def get_config(self):
            return ours.LowRankConfig(**self.settings)

        def prepare_config_and_inputs_for_common(self):
            ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def check_cache(self, batch_size, past_key_values, seq_length, config):
        widths = config.rank_k or config.hidden_size, 0 if config.shared_kv else config.rank_v or config.hidden_size
        for layer in past_key_values.layers:
            self.assertEqual(layer.keys.shape, (batch_size, 1, seq_length, widths[0]))
            self.assertEqual(layer.values.shape, (batch_size, 1, seq_length, widths[1]))

    def case(name: str, changes: dict) -> type:
        def set_up(self):
            if name != "LowRank" and self._testMethodName.startswith(WIDTHS):
                self.skipTest("latents of this model are not as wide as its heads")
            self.model_tester = Tester(changes)
            self.config_tester = ConfigTester(self, config_class=ours.LowRankConfig, **SIZES | changes)

        members = {
            "all_model_classes": (ours.LowRankModel, ours.LowRankForCausalLM),
            "all_generative_model_classes": (ours.LowRankForCausalLM,),
            "setUp": set_up,
            "test_config": lambda self: self.config_tester.run_common_tests(),
        }
        if name != "LowRank":
            members["_check_past_key_values_for_generate"] = check_cache
        return type(name, (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase), members)

    return {name: case(name, changes) for name, changes in MODELS.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif CHECKOUT in os.environ:
    globals().update(cases())
