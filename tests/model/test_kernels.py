"""The C++ kernels: constants, functions and attributes that Python names too, and the cache of compiled libraries."""

import ctypes
import errno
import inspect
import os
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

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


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Return a function that yields the path of a tiny library, compiled where needed, and loads it."""
    (tmp_path / "toy.cc").write_text('extern "C" int answer() { return 42; }')
    (tmp_path / "common.h").write_text("")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))

    def load() -> str:
        with build._library("toy") as path:
            assert ctypes.CDLL(path).answer() == 42
            return path

    return load


def compilations(monkeypatch) -> list:
    lines, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda line, **options: lines.append(line) or run(line, **options))
    return lines


@pytest.mark.parametrize("damage", ["cut short", "a bit", "empty", "text", "a link"])
def test_a_damaged_library_is_built_again_and_never_loaded(library, monkeypatch, tmp_path, damage):
    path = pathlib.Path(library())
    content = path.read_bytes()
    if damage == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        flipped = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
        path.unlink()  # this process has it loaded
        path.write_bytes({"cut short": content[:4096], "a bit": flipped, "empty": b"", "text": b"x" * 5000}[damage])
    lines = compilations(monkeypatch)
    assert library() == library() == str(path) and len(lines) == 1
    assert path.is_file() and not path.is_symlink() and os.listdir(path.parent) == [path.name]
    if damage == "a link":
        assert (tmp_path / "elsewhere").read_bytes() == content


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_library_that_cannot_be_kept_is_used_and_told(library, monkeypatch, capsys, error):
    def copy(source, target):
        pathlib.Path(target, "half").write_bytes(b"half")
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(shutil, "copy", copy)
    path = library()
    assert not os.path.exists(path) and not os.listdir(os.environ["LOWRANK_CACHE"])
    assert f"cannot be written ({os.strerror(error)}), so every start compiles toy.cc again" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["the library", "the cache"])
def test_another_kind_of_file_in_its_place_is_left_alone_and_told(library, tmp_path, capsys, where):
    if where == "the library":
        path = pathlib.Path(library())
        path.unlink()
        path.mkdir()
    else:
        path = tmp_path / "cache"
        path.write_text("a file")
    kind = path.is_dir()
    library()
    assert path.exists() and path.is_dir() == kind
    assert "so every start compiles toy.cc again" in capsys.readouterr().err


def test_two_threads_that_build_at_once_leave_one_whole_library(library):
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(lambda _: library(), range(4)))
    assert build._is_whole(path) and os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
