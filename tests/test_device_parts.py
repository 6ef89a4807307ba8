"""The parts of scripts/check_device.py that time steps and decoding, at toy sizes, and the peers beside them."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.model import costs, loss, network
from scripts.device import decoding, part, peers, speed

ARM = {"preset": "1b", "length": 32, "precision": "fp32", "model": "low rank", "small": True, "trace": False}
MAIN = "step of 1b, 4096 tokens, bf16"


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"model.d": 32, "model.layers": 1, "model.heads": 2, "model.rank": 8, "optim.name": "adamw"}
    monkeypatch.setattr(speed, "TINY", speed.TINY | sizes)
    monkeypatch.setattr(speed, "STEPS", 2)
    monkeypatch.setattr(decoding, "ROUNDS", 1)


# -------------------------------------------------------------------------------------------------------------- speed


def test_a_step_is_timed(tiny):
    row = speed.measure(ARM)
    assert row["tokens_per_s"] == pytest.approx(512 / row["seconds"]) and row["batch"] == 16
    assert row["mfu"] is None  # this CPU's peak is in no table


STREAM = """
planes {{ name: "{plane}" lines {{ name: "{line}"
  events {{ metadata_id: 1 duration_ps: 3000000000 {stat} }} events {{ metadata_id: 2 duration_ps: 1000000000 {stat} }}
  events {{ metadata_id: 3 duration_ps: 500000000 {stat} }} events {{ metadata_id: 4 duration_ps: 500000000 {stat} }} }}
  lines {{ name: "Steps" events {{ metadata_id: 1 duration_ps: 9000000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "nvjet_hsh_128x256" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "cudnn_sdpa_sm90_flash_fprop" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "loop_add_fusion_3" }} }}
  event_metadata {{ key: 4 value {{ id: 4 name: "loop_add_fusion_12" }} }}
  stat_metadata {{ key: 7 value {{ id: 7 name: "hlo_op" }} }} }}
"""


@pytest.mark.parametrize("plane, line, stat", [
    ("/device:GPU:0", "Stream #13(Compute)", ""),
    ("/device:TPU:0", "XLA Ops", ""),
    ("/host:CPU", "tf_XLAEigen/1", 'stats { metadata_id: 7 str_value: "x" }'),
])  # fmt: skip
def test_kernels_of_a_trace_are_summed_by_name_and_kind(plane, line, stat):
    profile = jax.profiler.ProfileData.from_text_proto(STREAM.format(plane=plane, line=line, stat=stat))
    row = speed.summary(speed.kernel_times(profile))
    assert row["kernels_ms"] == pytest.approx(5) and row["kinds_ms"] == {"matmul": 3, "attention": 1, "other": 1}
    assert row["top_kernels"][0] == {"kernel": "nvjet_hsh_128x256", "ms": 3, "calls": 1, "share": 0.6}
    assert {"kernel": "loop_add_fusion", "ms": 1, "calls": 2, "share": 0.2} in row["top_kernels"]


def test_mfu_is_model_flops_over_the_peak():
    config = speed.config_of(ARM | {"small": False, "length": 4096, "precision": "bf16"})
    weights = 24 * (8 * 2048 * 256 + 3 * 2048 * config.model.hidden) + 32_000 * 2048
    flops = 6 * weights + 24 * 6 * 4096 * 2048  # per token: 6 per weight, and causal attention's two products
    assert speed.mfu(config, 4096, 50_000.0, 989e12) == pytest.approx(flops * 50_000 / 989e12)
    assert speed.mfu(config, 4096, 50_000.0, None) is None


def test_every_arm_is_the_preset_but_for_its_length():
    arms = speed.arms(small=False)
    assert len({arm["check"] for arm in arms}) == len(arms)
    for arm in arms[:4]:
        config = speed.config_of(arm)
        assert config.precision == arm["precision"] and config.optim.name == "muon"
        assert config.pretrain.lengths == (arm["length"],) and "sft" not in config.phases
        assert bool(config.model.rank) == (arm["model"] == "low rank")


def test_bounds_follow_as_soon_as_both_figures_are_known():
    row = lambda check, tokens, mfu=0.4: {"check": check, "tokens_per_s": tokens, "mfu": mfu}
    rows = [row(MAIN, 120.0, 0.55)]
    assert speed.judge(rows) == [part.bound(f"MFU, {MAIN}", 0.55, 0.5)]
    rows += [row(f"{MAIN}, dense twin", 100.0), row(MAIN.replace("bf16", "fp8"), 132.0)]
    verdicts = {bound["check"]: bound["ok"] for bound in speed.judge(rows)}
    assert verdicts == {
        f"MFU, {MAIN}": True,
        f"{MAIN} / dense twin": True,
        f"{MAIN.replace('bf16', 'fp8')} / bf16": False,
    }
    other = [row("step of base, 1024 tokens, bf16", 1.0), row("step of base, 1024 tokens, bf16, dense twin", 2.0)]
    assert [bound["ok"] for bound in speed.judge(other)] == [None]


# ----------------------------------------------------------------------------------------------------------- decoding


def test_decoding_is_timed_while_all_rows_decode(tiny):
    config = speed.config_of(ARM)
    e = decoding.random_engine(config, "fp32", 2)
    row = decoding.figures(e, 2, 40, 20)
    assert 0 < row["first_token_seconds"] <= row["all_first_token_seconds"] and row["tokens_per_s"] > 0
    cache = costs.kv_bytes_per_token(config.model, 2)
    assert row["cache_bytes"] == 80 * cache["latent"] and row["dense_cache_bytes"] == 80 * cache["dense"]
    reads, prefill = [], e._prefill
    e._prefill = lambda *args: reads.append(args) or prefill(*args)
    decoding.decode(e, 2, 40, 5, seed=1)  # `figures` has read these prompts: every row decodes from the first step on
    assert not reads
    decoding.decode(e, 2, 40, 5, seed=2)
    assert reads


# -------------------------------------------------------------------------------------------------------------- peers


@pytest.fixture(scope="module")
def dense():
    """A dense model of toy size with random weights, two rows of tokens, and documents that are packed into them."""
    c = costs.dense_twin(speed.config_of(ARM).model)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    shapes = jax.eval_shape(lambda: network.init(c, jax.random.key(0)))
    params = jax.tree.map(lambda w: jax.random.normal(next(keys), w.shape) * 0.2 + 0.1, shapes)
    tokens_BT = jax.random.randint(next(keys), (2, 48), 0, c.vocab)
    segments_BT = jnp.asarray(np.repeat([[1, 2], [5, 6]], [20, 28], axis=1), jnp.int32)
    return c, params, tokens_BT, segments_BT


@pytest.mark.parametrize("attend, packed", [("flex", True), ("sdpa", True), ("sdpa", False)])
def test_the_peer_is_the_same_model(dense, attend, packed, monkeypatch):
    torch = pytest.importorskip("torch")
    from torch.nn.attention import flex_attention

    from scripts.bench import torch_gpt

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # no compiler: 4 s less
    c, params, tokens_BT, segments_BT = dense
    segments_BT = segments_BT if packed else jnp.ones_like(segments_BT)
    x_BTD = network.features(c, params, tokens_BT, segments_BT)
    ours = loss.through_head(*network.head(c, params, x_BTD), tokens_BT, jnp.ones(tokens_BT.shape))[0] / tokens_BT.size
    net = torch_gpt.GPT(c, torch_gpt.flex(c.heads, "cpu") if attend == "flex" else torch_gpt.sdpa)
    load(net, params)
    tokens, segments = (torch.from_numpy(np.array(x)).long() for x in (tokens_BT, segments_BT))
    mask = torch_gpt.document_mask(segments) if attend == "flex" else torch_gpt.alibi_mask(c.heads, segments)
    with torch.no_grad():
        theirs = net(tokens, mask, tokens)
    np.testing.assert_allclose(float(theirs), float(ours), rtol=1e-5)


def load(net, params: dict) -> None:
    """Give the peer our weights."""
    import torch

    put = lambda to, w, transposed=True: to.weight.data.copy_(torch.from_numpy(np.array(w.T if transposed else w)))
    put(net.table, params["embed"]["table"], transposed=False)
    put(net.norm, params["norm"]["gain"])
    for n, block in enumerate(net.blocks):
        ours = jax.tree.map(lambda w, n=n: w[n], params["blocks"])
        for name, linear in zip("qkvo", block.qkvo):
            put(linear[0], ours["attention"][name]["kernel"])
        for name in ("gate", "up", "out"):
            put(getattr(block, name), ours["mlp"][name]["kernel"])
        for name, norm in zip(("attention_norm", "mlp_norm"), block.norms):
            put(norm, ours[name]["gain"])


def test_a_peers_step_is_timed(tiny):
    pytest.importorskip("torch")
    arm = ARM | {"attend": "sdpa", "precision": "bf16"}
    row = peers.train(arm)
    assert row["tokens_per_s"] > 0 and row["microbatch"] == 8 and row["kernel"] in ("FLASH_ATTENTION", "MATH")
    assert 4 < row["loss"] < 7  # ln 256 = 5.5
    assert "no gradient" in peers.train(arm | {"attend": "flex"})["reason"]


def test_ours_is_judged_beside_the_fastest_peer_when_all_are_done():
    what = speed.MAIN
    rows = [{"check": f"{what}: PyTorch dense with flex", "tokens_per_s": 100.0}]
    rows += [{"check": f"{what}: ours", "tokens_per_s": 125.0}]
    assert peers.judge(rows) == []
    failed = {"check": f"{what}: PyTorch dense with sdpa", "ok": False}
    assert peers.judge([*rows, failed]) == [part.bound(f"{what}: ours / fastest peer", 1.25, 1.2)]
    assert len(peers.judge([*rows, {"check": "time left"}])) == 1


def test_a_machine_without_pytorch_or_gpu_says_so(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda small: "PyTorch sees no GPU")
    (arm,) = peers.arms(small=False)
    assert peers.measure(arm) == {"reason": "PyTorch sees no GPU"}


# -------------------------------------------------------------------------------------------------- a part's processes

PART = """
import os, sys
sys.path.insert(0, {root!r})
from scripts.device import part

def measure(arm):
    print("a library's line")
    if arm["check"] == "dies":
        sys.stderr.write("Aborted")
        os.kill(os.getpid(), 9)
    if arm["check"] == "fails":
        raise ValueError("no such kernel")
    return {{"process": os.getpid()}}

arms = lambda small: [{{"check": name, "process": name == "alone"}} for name in "first second dies fails alone".split()]
if __name__ == "__main__":
    part.main(__file__, arms, measure, lambda rows: [part.bound("rows", len(rows), 2)] if len(rows) > 1 else [])
"""


@pytest.fixture
def toy(tmp_path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(PART.format(root=part.ROOT))
    return str(path)


def test_an_arm_that_dies_costs_itself_alone(toy):
    done = subprocess.run([sys.executable, toy], capture_output=True, text=True, timeout=120)
    rows = {row["check"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows) == ["first", "second", "rows", "dies", "fails", "alone"]
    assert rows["first"]["process"] == rows["second"]["process"] != rows["alone"]["process"]
    assert rows["rows"]["ok"] is True and rows["first"]["ok"] is None
    assert rows["dies"]["ok"] is False and rows["dies"]["reason"].endswith("status -9: Aborted")
    assert rows["fails"]["ok"] is False and rows["fails"]["reason"] == "ValueError: no such kernel"


def test_no_arm_begins_after_the_budget(toy, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(part, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    rows = []
    for row in part.run(toy, [{"check": "first"}, {"check": "second"}, {"check": "late"}, {"check": "later"}], 100.0):
        rows.append(row)
        now[0] += 60
    assert [row["check"] for row in rows] == ["first", "second", "time left"]
    assert rows[-1]["reason"].endswith("left out: late, later") and rows[-1]["ok"] is None
