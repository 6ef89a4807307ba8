"""Facts about a compiled program, read from its text (`Compiled.as_text`, or `written` in this file).

The text is the program of one device. A loop's body counts as often as it runs, a loop of unknown trip count once, and
every branch of a conditional as if taken. Sizes are of arrays, without a TPU's padding to tiles.
"""

import contextlib
import dataclasses
import functools
import itertools
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


@dataclasses.dataclass(eq=False)
class Instruction:
    """An instruction; `arrays` is its result (of a tuple, every part), `args` the text between its parentheses."""

    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple["Instruction", ...]
    args: str
    rest: str  # the text behind the parentheses
    home: "Computation"
    calls: dict[str, list["Computation"]]  # by the name of the attribute
    target: str  # the function that a custom call calls, else nothing

    @property
    def is_matmul(self) -> bool:  # a TPU's compiler writes convolutions
        return self.opcode in ("dot", "scaled-dot", "convolution") or self.target.startswith("__cublas")

    @property
    def continues(self) -> bool:
        """Return whether it is a later part of a collective that a TPU spreads over fusions, each with a copy of it."""
        return "chain_id=" in self.rest and not self.home.has("AsyncCollectiveStart")


@dataclasses.dataclass(eq=False)
class Computation:
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    root: Instruction | None = None
    runs: int = 0  # in a step
    fused: bool = False  # inside a fusion, which keeps nothing in memory

    def has(self, word: str) -> bool:
        """Return whether an instruction has this opcode, or this target of a custom call."""
        return any(word in (i.opcode, i.target) for i in self.instructions)

    def parameter(self, position: int) -> Instruction:
        return next(i for i in self.instructions if i.opcode == "parameter" and i.args == str(position))


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
_NAME = re.compile(r"%([\w.\-]+)")
# The header of a computation, or the name of an instruction.
_START = re.compile(r"^(?:(?:ENTRY )?%([\w.\-]+) \(.*\{$|[ \t]+(ROOT )?%([\w.\-]+) = )", re.M)
_CALLS = "body|condition|calls|to_apply|called_computations|branch_computations|true_computation|false_computation"
_CALL = re.compile(rf"\b({_CALLS})=(%[\w.\-]+|\{{[^}}]*\}})")


@functools.lru_cache(maxsize=2)
def parse(text: str) -> list[Computation]:
    """Return the program's computations. Callers stand behind what they call, so the last is the program."""
    computations = {}
    for start, after in itertools.pairwise([*_START.finditer(text), None]):
        if start[1]:
            computation, names = Computation(), {}
            computations[start[1]] = computation
        else:
            words = text[start.end() : after and after.start()]  # several lines, where Pallas wrote it
            i = names[start[3]] = _instruction(words, computation, names, computations)
            computation.instructions.append(i)
            computation.root = i if start[2] else computation.root
    _count_runs(list(computations.values()))
    return list(computations.values())


def running(text: str) -> list[Instruction]:
    """Return the instructions that a step runs, each once."""
    return [i for computation in parse(text) if computation.runs for i in computation.instructions]


def _instruction(words: str, home: Computation, names: dict, computations: dict) -> Instruction:
    end = _closing(words, 0) if words[0] == "(" else words.index(" ")
    opening = words.index("(", end)
    closing = _closing(words, opening)
    args, rest = words[opening + 1 : closing - 1], words[closing:]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(re.search(r"S\([1-9]", layout)))
        for dtype, dims, layout in _ARRAY.findall(words, 0, end)
    )
    calls = {key: [computations[name] for name in _NAME.findall(called)] for key, called in _CALL.findall(rest)}
    operands = tuple(names[name] for name in _NAME.findall(args))
    target = (re.search(r'custom_call_target="([^"]*)"', rest) or [None, ""])[1]
    opcode = words[end:opening].strip()
    if opcode == "fusion-start":  # since JAX 0.11, for GPUs; its tuple also has the operands
        opcode, arrays = "fusion", calls["calls"][0].root.arrays
    return Instruction(opcode, arrays, operands, args, rest, home, calls, target)


def _closing(line: str, opening: int) -> int:
    """Return the place behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.end()
    return len(line)


def _count_runs(computations: list[Computation]) -> None:
    computations[-1].runs = 1
    for computation in reversed(computations):
        for i in computation.instructions if computation.runs else ():
            if i.opcode == "while":
                trips = _trips(i)
                i.calls["body"][0].runs += computation.runs * trips
                i.calls["condition"][0].runs += computation.runs * (trips + 1)
            elif i.opcode in ("fusion", "call", "custom-call", "conditional", "async-start"):
                for callee in set(itertools.chain(*i.calls.values())):
                    callee.runs += computation.runs
                    callee.fused |= i.opcode == "fusion" or computation.fused


def _trips(loop: Instruction) -> int:
    """Return the trip count that XLA noted, or else (on a TPU) that of a counter compared with a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    test, result = loop.calls["condition"][0].root, loop.calls["body"][0].root
    limit = next((n for n in map(_constant, test.operands) if n is not None), None)
    counter = next((i for i in test.operands if i.opcode == "get-tuple-element"), None)
    if test.opcode != "compare" or limit is None or counter is None:
        return 1
    index = int(re.search(r"index=(\d+)", counter.rest)[1])
    before, after = loop.operands[0].operands, result.operands[index]
    first = _constant(before[index]) if before else None
    step = next(filter(None, map(_constant, after.operands)), 1) if after.opcode == "add" else 1
    last = limit + (step if re.search("direction=[LG]E", test.rest) else 0)
    return max(-(((first or 0) - last) // step), 0)


def _constant(i: Instruction) -> int | None:
    while i.opcode in ("copy", "bitcast", "convert"):
        i = i.operands[0]
    return int(i.args) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.args) else None


def collectives(text: str) -> list[Collective]:
    """Return the program's collectives.

    Two instructions that start and finish a collective, or fusions over which a TPU spreads it, count once. A TPU's
    all-reduce of which each device keeps a slice is a reduce-scatter.
    """
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    devices, result = math.prod(map(int, counts)), []
    for i in running(text):
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or i.continues:
            continue
        if kind == "all-reduce" and i.home.fused and i.home.has("dynamic-slice"):
            kind = "reduce-scatter"
        groups = _groups(i.rest, devices)
        arrays = [array for operand in i.operands for array in operand.arrays]
        parts = len(groups[0]) if kind == "all-gather" else 1
        size, sizes = sum(array.bytes for array in arrays) * parts, tuple(array.size * parts for array in arrays)
        result.append(Collective(kind, size, sizes, i.home.runs, groups))
    return result


def collective_bytes(text: str) -> dict[str, float]:
    """Return {kind: bytes of a step} over all runs, for the kinds that occur."""
    totals = Counter()
    for c in collectives(text):
        totals[c.kind] += c.bytes * c.times
    return dict(totals)


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
    pairs = [[operand.arrays[0].dtype for operand in i.operands[:2]] for i in running(text) if i.is_matmul]
    return sum(all(dtype.startswith("f8") for dtype in pair) for pair in pairs)
