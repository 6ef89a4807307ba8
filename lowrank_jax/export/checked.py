"""JSON and weights in files that anyone may have written: safetensors and PyTorch's state dicts. No code in them runs.

Every fault is a UsageError of one line that names the file and the key or tensor.
"""

import contextlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator

import numpy as np

from lowrank_jax.config import UsageError, shown
from lowrank_jax.data import blocks
from lowrank_jax.export import verify

SAFE, PICKLED = ".safetensors", (".pt", ".pth", ".bin")
# What a folder may hold, the first of these that exists: a file or an index, else every file of the kind.
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = ("F64", "F32", "F16", "BF16")
SLACK = 10**8
JSON_BYTES = 1 << 24  # at most; the index of a model of 176 billion weights has 14,000
ADVICE = "save one with torch.save(net.state_dict(), path)"


def read_json(path: str) -> dict:
    """Return the object in a JSON file that anyone may have written; raises UsageError for any other content."""
    _require_file(path)
    try:
        with open(path, "rb") as f:
            content = f.read(JSON_BYTES + 1)
        if len(content) > JSON_BYTES:
            raise ValueError(f"it has more than {JSON_BYTES:,} bytes")
        values = json.loads(content.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"expected an object of keys, not {shown(values)}")
        return values
    except RecursionError:
        raise UsageError(f"{path} is damaged: its brackets are nested too deeply") from None
    except ValueError as e:
        raise UsageError(f"{path} is damaged: {' '.join(str(e).split())}") from None


def arrays(files: list[str]) -> dict[str, np.ndarray]:
    """Return the arrays of the files by name, as finite fp32 numbers."""
    result, origins = {}, {}
    for file in files:
        for name, w in (_pickled if file.endswith(PICKLED) else _safetensors)(file):
            if name in result:
                raise UsageError(f"{file}: {shown(name)} is in {origins[name]} too")
            if not np.isfinite(w).all():
                count = w.size - np.count_nonzero(np.isfinite(w))
                raise UsageError(f"{file}: {shown(name)} has {count:,} values that are NaN, infinite or too large")
            result[name], origins[name] = w, file
    return result


def weight_files(path: str) -> list[str]:
    """Return the files with the weights of a folder, or the one file; raises UsageError where there is none."""
    files = [path]
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        usual = next((name for name in USUAL if name in names), "")
        if usual.endswith(".json"):
            names = _shards(os.path.join(path, usual))
        elif usual:
            names = [usual]
        else:
            names = [n for n in names if n.endswith(SAFE)] or [n for n in names if n.endswith(PICKLED)]
        files = [os.path.join(path, name) for name in names]
    if not files:
        raise UsageError(f"--from={path} has no weights (model.safetensors)")
    for file in files:
        if not file.endswith((SAFE, *PICKLED)):
            raise UsageError(f"--from={file} must be a folder, or end in {SAFE}, {', '.join(PICKLED)}")
        _require_file(file)
    return files


def _require_file(path: str) -> None:
    if not os.path.isfile(path):
        raise UsageError(f"{path} is {'no regular file' if os.path.lexists(path) else 'missing'}")


def refuse_larger(files: list[str], parameters: int, sizes: dict[str, int]) -> None:
    """Raise UsageError where `sizes` of config.json ask for many more parameters than the files have bytes.

    Less of a difference is found by the shapes, which are named: 100 million parameters are described in a second.
    """
    if parameters > (size := sum(map(os.path.getsize, files))) + SLACK:
        key = max(sizes, key=sizes.get)
        count = f"{parameters:,} parameters (its {key} is {sizes[key]:,})"
        raise UsageError(f"config.json asks for {count}, but the weights have {size:,} bytes")


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Put the path in front of the message of a UsageError."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None


def _shards(index: str) -> list[str]:
    """Return the names of the files in an index; raises UsageError for any name but a file's in the same folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UsageError(f"{index} is damaged: it has no weight_map, which names the file of each weight")
    for weight, name in names.items():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith((SAFE, *PICKLED)):
            raise UsageError(f"{index}: {shown(weight)} is in {shown(name)}, which is no weight file beside it")
    return sorted(set(names.values()))


def _safetensors(path: str) -> Iterator[tuple[str, np.ndarray]]:
    verify.need("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as f:  # numpy has no bfloat16
            for name in f.keys():
                kind = f.get_slice(name).get_dtype()
                if kind not in FLOATS:
                    raise UsageError(f"{path}: {shown(name)} is {kind}; weights must be {', '.join(FLOATS)}")
                yield name, np.asarray(f.get_tensor(name), np.float32)
    except SafetensorError as e:
        raise UsageError(f"{path} is damaged: {blocks.one_line(e)}") from None


def _pickled(path: str) -> Iterator[tuple[str, np.ndarray]]:
    verify.need("torch")
    import torch

    size = os.path.getsize(path)
    try:
        if zipfile.is_zipfile(path) and sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > 2 * size:
            raise ValueError("it is compressed, which torch.save never does")  # kilobytes could fill the memory
        with warnings.catch_warnings(action="ignore"):  # of old protocols
            state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
    except OSError:
        raise
    except Exception as e:  # faults of zip files and pickles; torch advises to run forbidden classes
        reason = blocks.one_line(e)
        if "weights_only" in str(e):
            code = re.search(r"GLOBAL (\S+)", str(e))
            reason = f"it asks for {shown(code[1])}, and no code in it is run" if code else "it holds more than tensors"
        raise UsageError(f"{path} is no state dict: {reason}") from None
    if not isinstance(state, dict):
        raise UsageError(f"{path} is no state dict but a {type(state).__name__}; {ADVICE}")
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, w in state.items():
        if not isinstance(name, str) or not isinstance(w, torch.Tensor):
            raise UsageError(f"{path} is no state dict: {shown(name)} is a {type(w).__name__}, not a tensor; {ADVICE}")
        facts = {"sparse": w.layout != torch.strided, "quantised": w.is_quantized, "without data": w.is_meta}
        facts |= {str(w.dtype).removeprefix("torch."): w.dtype not in floats, "nested": w.is_nested}
        if unusable := [fact for fact, is_so in facts.items() if is_so]:
            raise UsageError(f"{path}: {shown(name)} is {unusable[0]}; weights must be dense, of {', '.join(FLOATS)}")
        if w.numel() > size:
            shape = f"{list(w.shape)} is a view of fewer numbers, larger than the file"
            raise UsageError(f"{path}: {shown(name)} {shape}; save its contiguous() copy")
        yield name, w.detach().resolve_neg().float().numpy()
