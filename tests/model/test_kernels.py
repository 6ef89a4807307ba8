"""The C++ kernels and Python agree on the constants, functions and attributes that both name."""

import inspect
import pathlib
import re

import pytest

from lowrank_jax.inference import cpu_decoder, decoder, quantize
from lowrank_jax.model import attention, network
from lowrank_jax.model.kernels import build

SOURCES = {
    path.name: path.read_text() for path in pathlib.Path(build.SOURCES).iterdir() if path.suffix in (".cc", ".h")
}


def constants(file: str, name: str) -> set[float]:
    """Return the values that a file's `constexpr` definitions give a name."""
    pattern = rf"constexpr [^;{{]*?\b{name} = ([-\d.e]+)f?[,;]"
    return {float(value) for value in re.findall(pattern, SOURCES[file])}


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("common.h", "MASKED", attention.MASKED),
        ("decode.cc", "COLUMNS", quantize.COLUMNS),
        ("decode.cc", "BLOCK", decoder.BLOCK),
        ("decode.cc", "EPS", network.EPS),
    ],
)
def test_constants_are_those_of_python(file, name, value):
    assert constants(file, name) == {value}


def test_widths_are_multiples_of_every_number_of_lanes():
    """Heads of attend.cc, ranks and windows of decode.cc, and panels fill whole vectors on every processor."""
    lanes = constants("common.h", "LANES")
    assert lanes == {4, 8, 16} and build.LANES == max(lanes)
    assert quantize.COLUMNS % (2 * max(lanes)) == 0  # a word of bfloat16 or int4 holds columns of both halves
    assert decoder.BLOCK % max(lanes) == 0


def test_int4_is_stored_with_the_offset_that_is_subtracted():
    (offset,) = re.findall(r"column \* step\[v\] - (\d+)\.f \* step\[v\]", SOURCES["decode.cc"])
    assert f".astype(jnp.int8) + {offset}).astype(jnp.uint8)" in inspect.getsource(quantize.in_panels.__wrapped__)


@pytest.mark.parametrize("source", build.TARGETS)
def test_every_function_is_registered_under_its_name(source):
    assert set(re.findall(r"XLA_FFI_DEFINE_HANDLER_SYMBOL\(\s*(\w+),", SOURCES[f"{source}.cc"])) == set(
        build.TARGETS[source]
    )


def test_the_decoders_call_has_the_attributes_that_it_reads():
    call = inspect.getsource(cpu_decoder.read)
    attributes = re.findall(r'\.Attr<\w+>\("(\w+)"\)', SOURCES["decode.cc"])
    assert len(attributes) == 9 and all(re.search(rf"\b{name}=", call) for name in attributes)
