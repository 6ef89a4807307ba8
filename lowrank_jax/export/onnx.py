"""A folder for ONNX Runtime: model.onnx with latents as inputs and outputs, tokenizer, sizes and a card.

torch's exporter makes the graph from lowrank.py. The graph cannot choose by length, so it always folds `up` into the
query and the output. `int8` holds matrices as ONNX Runtime's MatMulNBits: 8 bits, with a scale per 32 weights of a
column. Activations are rounded per row and block, so a row's results depend on no other row of the batch.
"""

import contextlib
import io
import logging
import os
import tempfile
import warnings

import numpy as np

from lowrank_jax.config import ModelConfig
from lowrank_jax.data import tokenizer
from lowrank_jax.export import folder as folders
from lowrank_jax.export import verify, weights
from lowrank_jax.export.torch import state
from lowrank_jax.training.trained import Trained

TYPES = ("f32", "int8")
FILE = "model.onnx"
BLOCK = 32  # weights of a column with one scale: ranks are multiples of it, and a scale costs 1 bit per weight
# Activations in 8 bits, too, per row and block: 0.34 ms per token of the quickstart instead of 5.3, KL 1e-4 not 5e-5.
ACCURACY = 4
ONE_FILE = 1 << 30  # bytes of weights: a protocol buffer ends at twice as many, so larger ones go into a second file
# int8 must only run and have lost no weight; `quality` measures what it costs.
TOLERANCES = {"f32": verify.TOLERANCE, "int8": 8.0}


def write(trained: Trained, folder: str, quant: str = "f32") -> str:
    """Write the files into a folder, which is created, and return it."""
    verify.need("torch", "onnx", "onnxscript", *(["onnxruntime"] if quant == "int8" else []))
    import onnx

    c, path = trained.config.model, os.path.join(folder, FILE)
    shapes = f"[rows, 1, tokens, {c.ranks[1] if c.rank else c.d}]"
    card = folders.packaged("cards/onnx.md", facts=folders.facts(trained), shapes=shapes)
    folders.write(trained, folder, {"README.md": card})
    with tempfile.TemporaryDirectory(dir=folder) as hidden:
        exact = path if quant == "f32" else os.path.join(hidden, FILE)
        _graph(trained, past_names(c), exact)
        if quant == "int8":
            _quantize(exact, path)
    model = onnx.load(path, load_external_data=False)
    # The origin of each node takes half of a small file, and has paths of this machine.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    onnx.save(model, path)
    return folder


def past_names(c: ModelConfig) -> list[str]:
    """Return the names of the cache's inputs; those of its outputs have `present` instead of `past_key_values`."""
    kinds = ("key",) if c.shared_kv and c.rank else ("key", "value")
    return [f"past_key_values.{i}.{kind}" for i in range(c.layers) for kind in kinds]


def _graph(trained: Trained, names: list[str], path: str) -> None:
    import torch

    from lowrank_jax.export.lowrank import LowRank

    class Graph(LowRank):
        def forward(self, input_ids, attention_mask, past):
            return super().forward(input_ids, past, attention_mask)

    c, tensors = trained.config.model, state(trained.params)
    with torch.device("meta"):
        net = Graph(weights.settings(c, trained.tokenizer, verify.longest(trained.config)))
    net.load_state_dict({name: torch.tensor(w) for name, w in tensors.items()}, assign=True)
    for layer in net.layers:
        layer.attention.fold = True
    rows, new, before = 2, 3, 4  # sizes of an example: the exporter would take 0 and 1 for fixed sizes
    widths = [c.ranks[1], c.ranks[2]][: len(names) // c.layers] if c.rank else [c.d, c.d]
    past = [[torch.zeros(rows, 1, before, width) for width in widths] for _ in range(c.layers)]
    example = (torch.zeros(rows, new, dtype=torch.long), torch.ones(rows, before + new, dtype=torch.long), past)
    latents = [[{0: "rows", 2: "past_tokens"} for _ in widths] for _ in range(c.layers)]
    with _quiet():
        torch.onnx.export(
            net.eval(),
            example,
            path,
            dynamo=True,
            external_data=sum(w.nbytes for w in tensors.values()) > ONE_FILE,
            verbose=False,
            input_names=["input_ids", "attention_mask", *names],
            output_names=["logits", *(name.replace("past_key_values", "present") for name in names)],
            dynamic_shapes=({0: "rows", 1: "tokens"}, {0: "rows", 1: "all_tokens"}, latents),
        )


def _quantize(exact: str, path: str) -> None:
    """Write the int8 form of a file, but for the factor folded into the heads: ONNX Runtime takes matrices alone."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    model = onnx.load(exact)
    heads = _transpose_tables(model.graph)
    matrices = {w.name for w in model.graph.initializer if len(w.dims) == 2}
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in matrices]
    config = nbits.DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, accuracy_level=ACCURACY, bits=8)
    with _quiet():
        quantizer = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
    model = quantizer.model.model
    _quantize_tables(model.graph, heads, nbits.DefaultWeightOnlyQuantizer(config))
    is_large = model.ByteSize() > ONE_FILE
    onnx.save(model, path, save_as_external_data=is_large, location=f"{FILE}.data")


def _transpose_tables(graph) -> dict[str, str]:
    """Replace each transposed table, such as a tied head, by a matrix of its own; return their names by the table's."""
    import onnx

    tables, names = {w.name: w for w in graph.initializer}, {}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in tables]:
        order = next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "perm")
        w = onnx.numpy_helper.to_array(tables[node.input[0]]).transpose(order)
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(w), node.output[0]))
        graph.node.remove(node)
        names[node.input[0]] = node.output[0]
    return names


def _quantize_tables(graph, heads: dict[str, str], quantizer) -> None:
    """Make each Gather read rows in 8 bits; a head that is tied to the table keeps the only copy."""
    import onnx

    tables, make = {w.name: w for w in graph.initializer if len(w.dims) == 2}, onnx.helper.make_node
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]:
        table, index, out = tables[node.input[0]], node.input[1], node.output[0]
        names = [f"{heads.get(table.name, table.name)}_{kind}" for kind in ("Q8", "scales")]
        if table.name not in heads:
            columns = np.ascontiguousarray(onnx.numpy_helper.to_array(table).T)  # the quantiser reads memory as it lies
            for name, w in zip(names, quantizer.qbits_block_quant(columns)):
                graph.initializer.append(onnx.numpy_helper.from_array(w, name))
        constants = {"zero": np.float32(128), "last": np.array([-1]), "width": np.array([0, 0, -1])}
        constants |= {"start": np.array([0]), "end": np.array(table.dims[1:])}
        for name, x in constants.items():
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(x), f"{out}_{name}"))
        steps = [
            make("Gather", [names[0], index], [f"{out}_rows"]),
            make("Cast", [f"{out}_rows"], [f"{out}_float"], to=onnx.TensorProto.FLOAT),
            make("Sub", [f"{out}_float", f"{out}_zero"], [f"{out}_centred"]),
            make("Gather", [names[1], index], [f"{out}_scales"]),
            make("Unsqueeze", [f"{out}_scales", f"{out}_last"], [f"{out}_scale"]),
            make("Mul", [f"{out}_centred", f"{out}_scale"], [f"{out}_blocks"]),
            make("Reshape", [f"{out}_blocks", f"{out}_width"], [f"{out}_padded"]),
            make("Slice", [f"{out}_padded", f"{out}_start", f"{out}_end", f"{out}_last"], [out]),
        ]
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for step in reversed(steps):
            graph.node.insert(at, step)
        graph.initializer.remove(table)


@contextlib.contextmanager
def _quiet():
    """Silence the exporter and the quantiser."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def check(trained: Trained, folder: str, quant: str = "f32") -> float:
    """Return the largest difference of two logits."""
    read = _reader(trained, folder)
    verify.check_ids(trained.tokenizer, tokenizer.load(folder).encode)
    return verify.check_cached(trained, read, TOLERANCES[quant])


def quality(trained: Trained, folder: str, quant: str = "f32", tokens: int = verify.MEASURED) -> dict:
    """Return what `quant` changes on held-out text, see `verify.measure`."""
    read = _reader(trained, folder)
    return verify.measure(trained, lambda row: read(row, np.arange(len(row)), None)[0], tokens)


def _reader(trained: Trained, folder: str):
    """Return the function `read` that `verify.check_cached` takes."""
    verify.need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.path.join(folder, FILE), options, providers=["CPUExecutionProvider"])
    names, widths = past_names(trained.config.model), {x.name: x.shape[-1] for x in session.get_inputs()}

    def read(tokens: np.ndarray, positions: np.ndarray, past):
        past = past or [np.zeros((1, 1, 0, widths[name]), np.float32) for name in names]
        mask = np.ones((1, past[0].shape[2] + len(tokens)), np.int64)
        inputs = {"input_ids": tokens[None].astype(np.int64), "attention_mask": mask, **dict(zip(names, past))}
        logits, *past = session.run(None, inputs)
        return logits[0, positions], past

    return read
