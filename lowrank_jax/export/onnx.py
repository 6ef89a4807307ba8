"""A folder for ONNX Runtime: model.onnx with the latents going in and out, tokenizer, sizes and a card.

The graph is that of lowrank.py, by torch's exporter, with `up` folded into the query and the output at every length: it
cannot choose by it. `int8` is ONNX Runtime's dynamic quantisation: matrices in 8 bits with a scale for each column,
what they are multiplied by rounded as it comes.
"""

import contextlib
import io
import logging
import os
import tempfile
import warnings

import numpy as np

from lowrank_jax.config import ModelConfig, UsageError
from lowrank_jax.data import tokenizer
from lowrank_jax.export import fidelity, verify, weights
from lowrank_jax.export import folder as folders
from lowrank_jax.training.trained import Trained

TYPES = ("f32", "int8")
FILE = "model.onnx"
NEEDS = "torch onnx onnxscript"
ONE_FILE = 1 << 30  # bytes of weights: a protocol buffer ends at twice as many, and others go into a file beside it
# Of int8, `check` asks only that the file runs and has not lost a weight: what it costs is measured, see `quality`.
TOLERANCES = {"f32": verify.TOLERANCE, "int8": 8.0}


def write(trained: Trained, folder: str, quant: str = "f32") -> str:
    """Writes the files into `folder`, which it makes, and returns it; raises UsageError for a foreign tokenizer that
    cannot be described, and where a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch  # noqa: F401

        if quant == "int8":
            import onnxruntime  # noqa: F401
    except ImportError:
        packages = NEEDS + (" onnxruntime" if quant == "int8" else "")
        raise UsageError(f"--format=onnx needs packages that are not all here: pip install {packages}") from None
    c = trained.config.model
    names = past_names(c)
    shapes = f"[rows, 1, tokens, {c.ranks[1] if c.rank else c.d}]"
    texts = {"README.md": CARD.format(facts=folders.facts(trained.config, trained.progress), shapes=shapes)}
    folders.write(trained, folder, {}, texts)
    _graph(trained, names, os.path.join(folder, FILE))
    _strip(os.path.join(folder, FILE))
    if quant == "int8":
        _quantize(os.path.join(folder, FILE))
    return folder


def past_names(c: ModelConfig) -> list[str]:
    """Inputs of the latents before; what comes out has `present` instead of `past_key_values`."""
    kinds = ("key",) if c.shared_kv and c.rank else ("key", "value")
    return [f"past_key_values.{i}.{kind}" for i in range(c.layers) for kind in kinds]


def _graph(trained: Trained, names: list[str], path: str) -> None:
    import torch

    from lowrank_jax.export.lowrank import LowRank

    c = trained.config.model
    found = weights.tensors(trained.params)
    with torch.device("meta"):
        net = LowRank(weights.settings(c, trained.tokenizer, verify.longest(trained.config)))
    state = {name.removeprefix(weights.PREFIX): torch.tensor(w) for name, w in found.items()}
    net.load_state_dict(state, assign=True)
    for layer in net.layers:
        layer.attention.fold = True

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, input_ids, attention_mask, past):
            return self.net(input_ids, past, attention_mask)

    rows, new, before = 2, 3, 4  # of an example: 0 and 1 would be taken for fixed sizes
    widths = [c.ranks[1], c.ranks[2]][: len(names) // c.layers] if c.rank else [c.d, c.d]
    past = [[torch.zeros(rows, 1, before, width) for width in widths] for _ in range(c.layers)]
    example = (torch.zeros(rows, new, dtype=torch.long), torch.ones(rows, before + new, dtype=torch.long), past)
    latents = [[{0: "rows", 2: "past_tokens"} for _ in widths] for _ in range(c.layers)]
    with _quiet():
        torch.onnx.export(
            Graph().eval(),
            example,
            path,
            dynamo=True,
            external_data=sum(w.nbytes for w in found.values()) > ONE_FILE,
            verbose=False,
            input_names=["input_ids", "attention_mask", *names],
            output_names=["logits", *(name.replace("past_key_values", "present") for name in names)],
            dynamic_shapes=({0: "rows", 1: "tokens"}, {0: "rows", 1: "all_tokens"}, latents),
        )


def _strip(path: str) -> None:
    """Takes out where each node came from: half of a small file, with paths of this machine in it."""
    import onnx

    found = onnx.load(path, load_external_data=False)
    for part in (found, found.graph, *found.graph.node, *found.graph.value_info, *found.graph.initializer):
        del part.metadata_props[:]
    onnx.save(found, path)


def _quantize(path: str) -> None:
    """Replaces the file by its int8 form.

    ONNX Runtime takes matrices alone: what folds `up` into the heads is a matrix for each head, and stays as it is.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    found = onnx.load(path)
    _turn_tables(found.graph)
    matrices = {w.name: len(w.dims) == 2 for w in found.graph.initializer}
    others = [node.name for node in found.graph.node if node.op_type == "MatMul" and not matrices.get(node.input[1])]
    large = found.ByteSize() > ONE_FILE
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as hidden, _quiet():
        quantize_dynamic(
            found,
            os.path.join(hidden, FILE),
            per_channel=True,
            weight_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gather"],
            nodes_to_exclude=others,
            use_external_data_format=large,
        )
        os.remove(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.data")
        for name in os.listdir(hidden):
            os.replace(os.path.join(hidden, name), os.path.join(os.path.dirname(path), name))


def _turn_tables(graph) -> None:
    """Makes a transposed table, such as a tied head, a matrix of its own, or it would not be taken."""
    import onnx

    tables = {w.name: w for w in graph.initializer}
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in tables]
    for node in turned:
        order = next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "perm")
        w = onnx.numpy_helper.to_array(tables[node.input[0]]).transpose(order)
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(w), node.output[0]))
        graph.node.remove(node)


@contextlib.contextmanager
def _quiet():
    """Without what the exporter and the quantiser tell of their own work."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def check(trained: Trained, folder: str, quant: str = "f32") -> float:
    """The largest difference of two logits, of prompts read as a whole and token by token.

    Raises RunFailure where it is too large or the tokenizer is another, NotInstalled where nothing here runs it.
    """
    read = _reader(trained, folder)
    verify.check_ids(trained.tokenizer, tokenizer.load(folder).encode)
    return verify.check(verify.difference_of_reader(trained, read), TOLERANCES[quant])


def quality(trained: Trained, folder: str, quant: str = "f32", tokens: int = fidelity.TOKENS) -> dict:
    """What `quant` changes on held-out text, see `fidelity.measure`; raises NotInstalled where nothing here runs it."""
    read = _reader(trained, folder)
    return fidelity.measure(trained, lambda row: read(row, np.arange(len(row)), None)[0], tokens)


def _reader(trained: Trained, folder: str):
    """`read` for `verify.difference_of_reader`."""
    try:
        import onnxruntime
    except ImportError:
        raise verify.NotInstalled("pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.path.join(folder, FILE), options, providers=["CPUExecutionProvider"])
    names, widths = past_names(trained.config.model), {x.name: x.shape[-1] for x in session.get_inputs()}

    def read(tokens: np.ndarray, places: np.ndarray, past):
        past = past or [np.zeros((1, 1, 0, widths[name]), np.float32) for name in names]
        mask = np.ones((1, past[0].shape[2] + len(tokens)), np.int64)
        given = {"input_ids": tokens[None].astype(np.int64), "attention_mask": mask, **dict(zip(names, past))}
        logits, *past = session.run(None, given)
        return logits[0, places], past

    return read


CARD = """# A low-rank ALiBi language model for ONNX Runtime

Trained with lowrank_jax: pre-norm RMSNorm, SwiGLU, ALiBi, attention in low rank. What goes from step to step are
latents, not keys and values: for each layer `past_key_values.N.key` and, unless the two are one, `.value`
in, `present.N.key` and `.value` out, {shapes} (of a value the last size may be another). It runs at any length.

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("model.onnx")
tokenizer = Tokenizer.from_file("tokenizer.json")
text = tokenizer.encode("Once upon a time").ids
sizes = {{x.name: x.shape[-1] for x in session.get_inputs() if x.name.startswith("past")}}
past, new = [np.zeros((1, 1, 0, size), np.float32) for size in sizes.values()], np.array([text])
for count in range(len(text), len(text) + 50):
    given = {{"input_ids": new, "attention_mask": np.ones((1, count), np.int64), **dict(zip(sizes, past))}}
    logits, *past = session.run(None, given)
    new = logits[:, -1:].argmax(-1)
    text.append(int(new[0, 0]))
print(tokenizer.decode(text))
```

Rows of different lengths are padded on the left, with 0 in `attention_mask`.

{facts}"""
