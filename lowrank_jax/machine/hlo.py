"""What a compiled program does, read from its text (`Compiled.as_text`, or `written` here).

It is the program of one device. A loop's body counts as often as it runs, every branch of a conditional as if taken,
and a loop whose trip count is not in the text as one run. Sizes are of arrays, without a TPU's padding to tiles.
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
        """f8e4m3fn, bf16, s4: the first number is of bits; pred has a byte, and a token nothing."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * (int(bits[0]) / 8 if bits else self.dtype == "pred")


class Instruction(NamedTuple):
    """`arrays` is its result, a tuple's one after the other; `args` what is in the parentheses, `rest` what follows."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    args: str
    rest: str
    root: bool

    def called(self, *keys: str) -> list[str]:
        found = [re.search(rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.rest) for key in keys]
        return [name for f in found if f for name in ([f[1]] if f[1] else re.findall(r"%([\w.\-]+)", f[2]))]


class Module(NamedTuple):
    """`runs` says how often each computation runs, `fused` which are inside a fusion, with nothing in memory."""

    computations: dict[str, dict[str, Instruction]]
    runs: dict[str, int]
    fused: set[str]
    devices: int


class Collective(NamedTuple):
    """`bytes` is of one run and the whole array on a device: an all-gather's result, and what goes into any other.

    `sizes` are the elements of the arrays that `bytes` is of, as several may travel together. `groups` are places in
    the list of the mesh's devices; for a permutation, (from, to).
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


# ------------------------------------------------------------------------------------------------------------- text


@contextlib.contextmanager
def written():
    """(compiler options, a function that gives the text of the last program compiled with them, or None).

    The compiler writes it itself: `Compiled.as_text` cannot print all of a TPU's programs (jax 0.10.2: INTERNAL, where
    collectives are asynchronous). A program has another key in a compilation cache each time.
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
        if started := _COMPUTATION.match(line):
            current = computations[started[1]] = {}
            instruction = None
        elif made := _INSTRUCTION.match(line):
            instruction = _instruction(line, made)
            current[instruction.name] = instruction
        elif instruction and not re.match(r"\}(, execution_thread.*)?$", line):  # Pallas writes some on several lines
            instruction = current[instruction.name] = instruction._replace(rest=instruction.rest + line)
    counts = [re.search(rf"\b{key}=(\d+)", text.split("\n", 1)[0]) for key in ("num_partitions", "replica_count")]
    return Module(computations, *_runs(computations), math.prod(int(count[1]) for count in counts if count))


def _instruction(line: str, made: re.Match) -> Instruction:
    start = made.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    args = line[opened + 1 : closed - 1]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(re.search(r"S\([1-9]", layout)))
        for dtype, dims, layout in _ARRAY.findall(line, start, end)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", args))
    return Instruction(made[2], line[end:opened].strip(), arrays, operands, args, line[closed:], bool(made[1]))


def _closing(line: str, opened: int) -> int:
    """The place after the parenthesis that closes the one at `opened`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opened):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


# ------------------------------------------------------------------------------------------------------------- loops


def _runs(computations: dict) -> tuple[Counter, set[str]]:
    """How often each computation runs, and those inside fusions. Callers stand below what they call."""
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
    """The trip count that XLA noted, or, on a TPU where it notes none, that of a counter compared with a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition, body = (computations[loop.called(key)[0]] for key in ("condition", "body"))
    test = next(i for i in condition.values() if i.root)
    limit = next((n for n in (_constant(condition, name) for name in test.operands) if n is not None), None)
    counter = next((condition[n] for n in test.operands if condition[n].opcode == "get-tuple-element"), None)
    if test.opcode != "compare" or limit is None or counter is None:
        return 1
    at = int(re.search(r"index=(\d+)", counter.rest)[1])
    first = _constant(caller, caller[loop.operands[0]].operands[at]) if caller[loop.operands[0]].operands else None
    after = body[next(i for i in body.values() if i.root).operands[at]]
    steps = [_constant(body, name) for name in after.operands] if after.opcode == "add" else []
    step = next((n for n in steps if n), 1)
    last = limit + (step if re.search("direction=[LG]E", test.rest) else 0)
    return max(-(((first or 0) - last) // step), 0)


def _constant(computation: dict, name: str) -> int | None:
    i = computation[name]
    while i.opcode in ("copy", "bitcast", "convert"):
        i = computation[i.operands[0]]
    return int(i.args) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.args) else None


# ------------------------------------------------------------------------------------------------------- collectives


def collectives(text: str) -> list[Collective]:
    """What the devices exchange.

    One that two instructions start and finish, or that a TPU spreads over fusions, is one; a TPU's all-reduce of which
    each device keeps a slice is a reduce-scatter.
    """
    module, found = parse(text), []
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
            op_name = re.search(r'op_name="([^"]*)"', i.rest)
            found.append(
                Collective(kind, size, sizes, module.runs[name], groups, arrays[0].dtype, op_name[1] if op_name else "")
            )
    return found


def collective_bytes(text: str) -> dict[str, float]:
    """{kind: bytes of a step}, each as in `Collective` times its runs; only kinds that there are."""
    found = Counter()
    for c in collectives(text):
        found[c.kind] += c.bytes * c.times
    return dict(found)


def has(computation: dict, word: str) -> bool:
    return any(i.opcode == word or f'custom_call_target="{word}"' in i.rest for i in computation.values())


def continues(i: Instruction, computation: dict) -> bool:
    """Whether it is a later part of a collective that a TPU spreads over fusions, where each has a copy of it."""
    return "chain_id=" in i.rest and not has(computation, "AsyncCollectiveStart")


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """replica_groups in any of XLA's three ways, or a permutation's pairs."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        return tuple(tuple(numbers(group)) for group in re.findall(r"\{([^{}]*)\}", listed[1]))
    tiles = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    iota = lambda sizes, order: np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes)))
    if tiled := re.search(rf"replica_groups=\[([\d,]+)\]<={tiles}", rest):
        ids = iota(numbers(tiled[2]), numbers(tiled[3])).reshape(numbers(tiled[1]))
    elif mesh := re.search(
        rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\((?:{tiles}|([\d,]+))\))? \{{(.*?)\}}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = iota(numbers(mesh[2]), numbers(mesh[3])) if mesh[2] else np.array(numbers(mesh[4]), int)
        ids = order if order.size else np.arange(math.prod(sizes.values()))
        axes = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", mesh[5])  # whole, or with what is before the part, and it
        part = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in axes}
        # An axis is cut into what is before, in, and after the part that the group has of it.
        cuts = {name: part.get(name, (size, 1)) for name, size in sizes.items()}
        ids = ids.reshape([n for name, (a, b) in cuts.items() for n in (a, b, sizes[name] // (a * b))])
        inside = [3 * list(sizes).index(name) + 1 for name in part]
        ids = np.moveaxis(ids, inside, range(-len(inside), 0)).reshape(-1, math.prod(b for _, b in part.values()))
    else:  # {} are all
        ids = np.arange(devices).reshape(1, -1)
    return tuple(map(tuple, ids.tolist()))


# --------------------------------------------------------------------------------------------- matmuls and attention


def f8_matmuls(text: str) -> int:
    """Matmuls that multiply float8 by float8; a loop's count once, however often it runs.

    They are dots (on their own or inside a Triton fusion), cuBLASLt calls on a GPU, and convolutions on a TPU. XLA may
    have made one of two that share an operand, such as a SwiGLU's gate and up.
    """
    pairs = [
        [computation[name].arrays[0].dtype for name in i.operands[:2]]
        for computation in parse(text).computations.values()
        for i in computation.values()
        if i.opcode in ("dot", "scaled-dot", "convolution") or 'target="__cublas$lt$matmul$f8' in i.rest
    ]
    return sum(all(dtype.startswith("f8") for dtype in pair) for pair in pairs)


def squares(text: str, length: int) -> list[str]:
    """The shapes in a program, fusions' insides too, with two or more dimensions of at least `length`: f32[8,512,512].

    A T x T array of a layout in which two dimensions are one, such as [T*T], is not among them; a weight may be.
    """
    found = {f"{dtype}[{dims}]" for dtype, dims, _ in _ARRAY.findall(text)}
    wide = lambda shape: sum(int(n) >= length for n in re.findall(r"\d+", shape.split("[")[1])) > 1
    return sorted(filter(wide, found))


def attention_kernel(text: str) -> str | None:
    """`cudnn` or `splash` where the program calls such a fused attention, else None."""
    for computation in parse(text).computations.values():
        for i in computation.values():
            if 'custom_call_target="__cudnn$fmha' in i.rest:
                return "cudnn"
            if "splash" in i.rest.split("backend_config=")[0] and 'target="tpu_custom_call"' in i.rest:
                return "splash"
    return None
