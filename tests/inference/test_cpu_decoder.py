"""The decoder in C++ computes what decoder.py does for every kind of model, weights and rows, and builds anywhere."""

import functools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import GREEDY, SETTINGS, answers, assert_nothing_is_compiled, prompt
from test_network import jit, make, some_tokens, toy

from lowrank_jax.inference import cpu_decoder, decoder, quantize
from lowrank_jax.inference.engine import Engine
from lowrank_jax.machine import sharding
from lowrank_jax.model.kernels import build

pytestmark = pytest.mark.slow

# Ranks of 16 and 48, a last panel that is not full of anything, and the query absorbed in one matrix.
SMALL = {"d": 96, "heads": 6, "rank": 32, "mlp": 40, "vocab": 257}
MODELS = {
    "small": {},
    "linear latents": {"latent_norm": False, "rank_split": (1.0, 1.0, 1.0, 1.0)},
    "shared": {"shared_kv": True},
    "factored": {"mlp_rank": 20, "embed_rank": 12},
    "untied": {"tied": False},
    "untied and factored": {"tied": False, "embed_rank": 12},
    "query in two": {"heads": 12, "rank": 64},
    "odd heads": {"d": 100, "heads": 5},
}
SIZE, WINDOW = 384, 32
reference = jit(decoder.read, static_argnums=0)


@functools.cache
def weights(name: str, kind: str):
    c = toy(**SMALL | MODELS[name])
    params = jax.device_put(make(c), sharding.whole(sharding.one_device()))
    w = decoder.prepare(c, params, kind, {"bf16": jnp.bfloat16, "fp16": jnp.float16}.get(kind, jnp.float32))
    packed = cpu_decoder.pack(c, w)
    assert packed is not None
    return c, widened(w), packed


def widened(w: decoder.Weights) -> decoder.Weights:
    """Return the same numbers in float32."""
    integers = lambda x: isinstance(x, quantize.qwix.QArray)
    whole = lambda x: (quantize.qwix.dequantize(x) if integers(x) else x).astype(jnp.float32)
    return jax.tree.map(whole, w, is_leaf=integers)


def some_latents(c, rows: int, seed: int = 0) -> tuple[dict, tuple]:
    """Return a cache and a window that are full of numbers."""
    draw = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(draw.standard_normal(x.shape, np.float32))
    cache = decoder.empty_cache(c, rows + 2, SIZE, jnp.float32)
    return jax.tree.map(fill, (cache, decoder.empty_window(c, rows, WINDOW, jnp.float32)))


def both(name: str, kind: str, B: int, T: int, offset: int = 5):
    """Return (hidden states, window, logits) of decoder.py and of the C++, for rows with 0 to 3 cached blocks."""
    c, w, packed = weights(name, kind)
    cache, window = some_latents(c, B)
    starts = jnp.asarray([(0, 1, 127, 128, 129, 300)[b % 6] for b in range(B)], jnp.int32)
    tokens = some_tokens(c, B, T)
    place = decoder.Place(starts, offset, 1)
    x, after = reference(c, w, cache, window, tokens, place)
    y, native_after = jax.jit(cpu_decoder.read, static_argnums=0)(c, packed, cache, window, tokens, place)
    return (x, after, decoder.logits(w, x[:, -1])), (y, native_after, jax.jit(decoder.logits)(packed, y[:, -1]))


def assert_equal(a, b, tolerance: float = 2e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(x).max())))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name):
    assert_equal(*both(name, "fp32", B=3, T=1))


@pytest.mark.parametrize("name", ["query in two", "untied and factored"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "int4"])
def test_small_weights_give_the_products_of_their_values(name, kind):
    assert_equal(*both(name, kind, B=3, T=1))


@pytest.mark.parametrize(
    ("B", "T", "offset"), [(1, 1, 0), (1, 1, 31), (2, 1, 3), (8, 1, 15), (15, 1, 7), (1, 8, 0), (2, 3, 9)]
)
def test_every_number_of_rows_and_tokens(B, T, offset):
    c = weights("small", "fp32")[0]
    assert decoder.absorbs(c, T)
    assert_equal(*both("small", "fp32", B, T, offset))


def test_the_absorbed_query_is_used_where_it_is_less_work():
    assert weights("small", "fp32")[2].layers[0].query is not None
    assert weights("query in two", "fp32")[2].layers[0].query is None
    assert jax.tree.leaves(weights("small", "int4")[2].layers)[0].dtype == jnp.uint8


def test_many_tokens_use_the_expanded_form_with_the_same_panels():
    c, w, packed = weights("factored", "int8")
    T = 48
    assert not decoder.absorbs(c, T)
    cache, _ = some_latents(c, 2)
    window = decoder.empty_window(c, 2, T, jnp.float32)
    tokens, starts = some_tokens(c, 2, T), jnp.asarray([0, 200], jnp.int32)
    place = decoder.Place(starts)
    expected = reference(c, w, cache, window, tokens, place)
    assert_equal(expected, cpu_decoder.read(c, packed, cache, window, tokens, place))


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_an_engine_gives_the_same_tokens(kind):
    c, w, packed = weights("small", kind)
    drawn = [GREEDY, SETTINGS[3], SETTINGS[5], GREEDY]
    requests = [(prompt(n), 20, s) for n, s in zip((3, 300, 40, 9), drawn)]
    in_cpp, in_xla = (answers(Engine(c, x, (), 4, 700), requests, late=1) for x in (packed, w))
    assert in_cpp == in_xla


def test_no_length_compiles_anything():
    c, _, packed = weights("small", "fp32")
    assert_nothing_is_compiled(Engine(c, packed, (), 1, 1000))


def test_calls_from_several_threads_do_not_interfere():
    c, _, packed = weights("small", "fp32")
    alone = {n: answers(Engine(c, packed, (), 2, 700), [(prompt(n), 60, GREEDY)]) for n in (5, 17, 33)}
    results = {}

    def go(n: int) -> None:
        e = Engine(c, packed, (), 2, 700)
        results[n] = [answers(e, [(prompt(n), 60, GREEDY)]) for _ in range(4)]

    threads = [threading.Thread(target=go, args=(n,)) for n in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [alone[n]] * 4 for n in alone}


@pytest.mark.parametrize("changes", [{"rank": 20}, {"rank": 0}])
def test_models_that_the_cpp_cannot_read_are_not_packed(changes):
    c = toy(**SMALL | changes)
    params = jax.device_put(make(c), sharding.whole(sharding.one_device()))
    assert cpu_decoder.pack(c, decoder.prepare(c, params, "fp32", jnp.float32)) is None


PROBE = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
if os.environ["PATH"] == "/nowhere":
    sys.modules["ziglang"] = None  # no compiler out of a package either
if sys.argv[1] == "alone":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from lowrank_jax.inference import quantize
from lowrank_jax.model.kernels import build
build.FLAGS = ("-O0", *build.FLAGS[1:])  # 10 CPU seconds less
if not build.load("decode"):
    sys.exit("not built")
w = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32)
x = np.ones((3, 50), np.float32)
y = jax.jit(quantize.times)(x, quantize.in_panels(w))
np.testing.assert_allclose(y, x @ w, atol=1e-4)
print(build.compiler()[0])
"""


def probe(folder, *args: str, **environment: str) -> subprocess.Popen:
    environment = os.environ | {"LOWRANK_CACHE": str(folder)} | environment
    command = [sys.executable, "-c", PROBE, *(args or ("-",))]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_may_build_it_at_once_and_a_third_reuses_it(tmp_path):
    for process in [probe(tmp_path), probe(tmp_path)]:
        errors = process.communicate()[1]
        assert process.returncode == 0 and "will be slow" not in errors, errors
    assert [name[:7] for name in os.listdir(tmp_path)] == ["decode-"]
    built = os.stat(tmp_path / os.listdir(tmp_path)[0]).st_mtime_ns
    third = probe(tmp_path, "alone")
    third.communicate()
    assert third.returncode == 0
    assert [os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)] == [built]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "false"}, "returned non-zero exit status 1"),
        ({"CXX": "g++ '"}, "No closing quotation"),
        ({"CXX": "no-such-compiler"}, "No such file or directory: 'no-such-compiler'"),
        ({"PATH": "/nowhere"}, "there is no C++ compiler; install g++, or pip install ziglang"),
    ],
)
def test_where_it_cannot_be_compiled_one_line_says_why(tmp_path, environment, reason):
    errors = probe(tmp_path, **environment).communicate()[1]
    assert "this CPU will be slow, as decode.cc is not compiled" in errors and reason in errors
    assert "not built" in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_without_the_cpp_weights_are_not_packed(monkeypatch):
    c, w, _ = weights("small", "fp32")
    monkeypatch.setattr(build, "load", lambda source: False)
    assert cpu_decoder.pack(c, w) is None
