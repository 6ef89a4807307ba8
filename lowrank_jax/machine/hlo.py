"""Facts about a compiled program, read from its text (`Compiled.as_text`, or `written` in this file).

The text is the program of one device. A loop's body counts as often as it runs, a loop of unknown trip count once, and
every branch of a conditional as if taken. Sizes are of arrays, without a TPU's padding to tiles.
"""

import contextlib
import functools
import math
import pathlib
import re
import tempfile
from collections import Counter
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a TPU's VMEM or another memory that is not HBM: S(1) and above in the layout

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Size in bytes. The first number of f8e4m3fn, bf16 or s4 is its bits; pred has a byte, and a token nothing."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * (int(bits[0]) / 8 if bits else self.dtype == "pred")


class Instruction(NamedTuple):
    """An instruction; `arrays` is its result (of a tuple, every part), `args` the text between its parentheses."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    args: str
    rest: str  # the text behind the parentheses
    root: bool

    def called(self, *keys: str) -> list[str]:
        """Return the names of the computations that its attributes `keys` call."""
        matches = [re.search(rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.rest) for key in keys]
        return [name for m in matches if m for name in ([m[1]] if m[1] else re.findall(r"%([\w.\-]+)", m[2]))]


class Module(NamedTuple):
    computations: dict[str, dict[str, Instruction]]
    runs: dict[str, int]  # number of runs of each computation in a step
    fused: set[str]  # computations inside a fusion, which keep nothing in memory
    devices: int


class Collective(NamedTuple):
    """Instructions that exchange data once; `bytes` and `sizes` (elements of each array) are of one run.

    They measure whole arrays on a device: the result of an all-gather, the operands of any other kind. `groups` are
    places in the list of the mesh's devices; for a permutation, (from, to).
    """

    kind: str
    bytes: float
    sizes: tuple[int, ...]
    times: int
    groups: tuple[tuple[int, ...], ...]
    dtype: str
    op_name: str

    @property
    def group_size(self) -> int:
        return len(self.groups[0])


@contextlib.contextmanager
def written():
    """Yield (compiler options, a function that returns the text of the last program compiled with them, or None).

    The compiler writes the text itself: `Compiled.as_text` fails for some TPU programs (jax 0.10.2: INTERNAL, where
    collectives are asynchronous). With these options a program gets a new key in a compilation cache each time.
    """
    with tempfile.TemporaryDirectory() as folder:

        def read() -> str | None:
            texts = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda file: file.stat().st_mtime)
            return texts[-1].read_text() if texts else None

        yield {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}, read


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")


@functools.lru_cache(maxsize=2)
def parse(text: str) -> Module:
    computations, current, instruction = {}, {}, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[1]] = {}
            instruction = None
        elif start := _INSTRUCTION.match(line):
            instruction = _instruction(line, start)
            current[instruction.name] = instruction
        elif instruction and not re.match(r"\}(, execution_thread.*)?$", line):  # Pallas breaks some over several lines
            instruction = current[instruction.name] = instruction._replace(rest=instruction.rest + line)
    counts = [re.search(rf"\b{key}=(\d+)", text.split("\n", 1)[0]) for key in ("num_partitions", "replica_count")]
    return Module(computations, *_runs(computations), math.prod(int(count[1]) for count in counts if count))


def _instruction(line: str, start: re.Match) -> Instruction:
    end = _closing(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
    opening = line.index("(", end)
    closing = _closing(line, opening)
    args = line[opening + 1 : closing - 1]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(re.search(r"S\([1-9]", layout)))
        for dtype, dims, layout in _ARRAY.findall(line, start.end(), end)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", args))
    return Instruction(start[2], line[end:opening].strip(), arrays, operands, args, line[closing:], bool(start[1]))


def _closing(line: str, opening: int) -> int:
    """Return the place behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.end()
    return len(line)


def _runs(computations: dict) -> tuple[Counter, set[str]]:
    """Return the number of runs of each computation, and those inside fusions. Callers stand below what they call."""
    runs, fused = Counter(list(computations)[-1:]), set()  # the last is the program
    for name in reversed(computations):
        for i in computations[name].values() if runs[name] else ():
            if i.opcode == "while":
                trips = _trips(i, computations[name], computations)
                runs.update({i.called("body")[0]: runs[name] * trips})
                runs.update({i.called("condition")[0]: runs[name] * (trips + 1)})
            elif i.opcode in ("fusion", "call", "custom-call", "conditional", "async-start"):
                keys = ("calls", "called_computations", "branch_computations", "true_computation", "false_computation")
                inner = i.called(*keys, *(["to_apply"] if i.opcode == "call" else []))
                runs.update({callee: runs[name] for callee in inner})
                fused |= set(inner) if i.opcode == "fusion" or name in fused else set()
    return runs, fused


def _trips(loop: Instruction, caller: dict, computations: dict) -> int:
    """Return the trip count that XLA noted, or else (on a TPU) that of a counter compared with a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition, body = (computations[loop.called(key)[0]] for key in ("condition", "body"))
    test = next(i for i in condition.values() if i.root)
    limit = next((n for n in (_constant(condition, name) for name in test.operands) if n is not None), None)
    counter = next((condition[n] for n in test.operands if condition[n].opcode == "get-tuple-element"), None)
    if test.opcode != "compare" or limit is None or counter is None:
        return 1
    index = int(re.search(r"index=(\d+)", counter.rest)[1])
    first = _constant(caller, caller[loop.operands[0]].operands[index]) if caller[loop.operands[0]].operands else None
    after = body[next(i for i in body.values() if i.root).operands[index]]
    steps = [_constant(body, name) for name in after.operands] if after.opcode == "add" else []
    step = next((n for n in steps if n), 1)
    last = limit + (step if re.search("direction=[LG]E", test.rest) else 0)
    return max(-(((first or 0) - last) // step), 0)


def _constant(computation: dict, name: str) -> int | None:
    i = computation[name]
    while i.opcode in ("copy", "bitcast", "convert"):
        i = computation[i.operands[0]]
    return int(i.args) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.args) else None


def collectives(text: str) -> list[Collective]:
    """Return the program's collectives.

    Two instructions that start and finish a collective, or fusions over which a TPU spreads it, count once. A TPU's
    all-reduce of which each device keeps a slice is a reduce-scatter.
    """
    module, result = parse(text), []
    for name, computation in module.computations.items():
        for i in computation.values() if module.runs[name] else ():
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or continues(i, computation):
                continue
            if kind == "all-reduce" and name in module.fused and has(computation, "dynamic-slice"):
                kind = "reduce-scatter"
            groups = _groups(i.rest, module.devices)
            arrays = [array for operand in i.operands for array in computation[operand].arrays]
            parts = len(groups[0]) if kind == "all-gather" else 1
            size, sizes = sum(array.bytes for array in arrays) * parts, tuple(array.size * parts for array in arrays)
            op_name = (re.search(r'op_name="([^"]*)"', i.rest) or [None, ""])[1]
            result.append(Collective(kind, size, sizes, module.runs[name], groups, arrays[0].dtype, op_name))
    return result


def collective_bytes(text: str) -> dict[str, float]:
    """Return {kind: bytes of a step} over all runs, for the kinds that occur."""
    totals = Counter()
    for c in collectives(text):
        totals[c.kind] += c.bytes * c.times
    return dict(totals)


def has(computation: dict, word: str) -> bool:
    """Return whether an instruction has this opcode, or this target of a custom call."""
    return any(i.opcode == word or f'custom_call_target="{word}"' in i.rest for i in computation.values())


def continues(i: Instruction, computation: dict) -> bool:
    """Return whether it is a later part of a collective that a TPU spreads over fusions, each with a copy of it."""
    return "chain_id=" in i.rest and not has(computation, "AsyncCollectiveStart")


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Read replica_groups in any of XLA's three notations, or a permutation's pairs."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        return tuple(tuple(numbers(group)) for group in re.findall(r"\{([^{}]*)\}", listed[1]))
    tiles = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    mesh_form = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\((?:{tiles}|([\d,]+))\))? \{{(.*?)\}}"
    iota = lambda sizes, order: np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes)))
    if tiled := re.search(rf"replica_groups=\[([\d,]+)\]<={tiles}", rest):
        ids = iota(numbers(tiled[2]), numbers(tiled[3])).reshape(numbers(tiled[1]))
    elif mesh := re.search(mesh_form, rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = iota(numbers(mesh[2]), numbers(mesh[3])) if mesh[2] else np.array(numbers(mesh[4]), int)
        ids = order if order.size else np.arange(math.prod(sizes.values()))
        # A group spans a whole axis, or with :(before)size a part of it; an axis is cut into (before, part, after).
        axes = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", mesh[5])
        part = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in axes}
        cuts = {name: part.get(name, (size, 1)) for name, size in sizes.items()}
        ids = ids.reshape([n for name, (a, b) in cuts.items() for n in (a, b, sizes[name] // (a * b))])
        inside = [3 * list(sizes).index(name) + 1 for name in part]
        ids = np.moveaxis(ids, inside, range(-len(inside), 0)).reshape(-1, math.prod(b for _, b in part.values()))
    else:  # {}: all devices
        ids = np.arange(devices).reshape(1, -1)
    return tuple(map(tuple, ids.tolist()))


def f8_matmuls(text: str) -> int:
    """Count the matmuls of float8 by float8, a loop's once: dots, cuBLASLt calls, and a TPU's convolutions.

    XLA may merge two matmuls that share an operand, such as a SwiGLU's gate and up.
    """
    pairs = [
        [computation[name].arrays[0].dtype for name in i.operands[:2]]
        for computation in parse(text).computations.values()
        for i in computation.values()
        if i.opcode in ("dot", "scaled-dot", "convolution") or 'target="__cublas$lt$matmul$f8' in i.rest
    ]
    return sum(all(dtype.startswith("f8") for dtype in pair) for pair in pairs)


def attention_kernel(text: str) -> str | None:
    """Return `cudnn` or `splash` where the program calls such a fused attention, else None."""
    for computation in parse(text).computations.values():
        for i in computation.values():
            if 'custom_call_target="__cudnn$fmha' in i.rest:
                return "cudnn"
            if "splash" in i.rest.split("backend_config=")[0] and 'target="tpu_custom_call"' in i.rest:
                return "splash"
    return None
