"""Print size, speed with one thread, and the influence of other rows for ONNX exports.

python scripts/bench/onnx_exports.py exports/onnx exports/int8
"""

import os
import sys
import time

import numpy as np
import onnxruntime

LENGTH, STEPS = 256, 60


def measure(folder: str) -> str:
    """Return a row of a table for the export in a folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = os.path.join(folder, "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    widths = {x.name: x.shape[-1] for x in session.get_inputs() if x.name.startswith("past")}

    def read(ids, past=None):
        past = past or [np.zeros((len(ids), 1, 0, width), np.float32) for width in widths.values()]
        mask = np.ones((len(ids), past[0].shape[2] + ids.shape[1]), np.int64)
        logits, *past = session.run(None, {"input_ids": ids, "attention_mask": mask, **dict(zip(widths, past))})
        return logits, past

    ids = np.random.default_rng(0).integers(4, session.get_outputs()[0].shape[-1], size=(1, LENGTH))
    read(ids)
    start = time.perf_counter()
    logits, past = read(ids)
    prompt_ms, start = (time.perf_counter() - start) * 1e3, time.perf_counter()
    for _ in range(STEPS):
        _, past = read(ids[:, :1], past)
    token_ms = (time.perf_counter() - start) / STEPS * 1e3
    beside, _ = read(np.concatenate([ids, np.full((5, LENGTH), 7)]))
    files = [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith("model.onnx")]
    size = sum(map(os.path.getsize, files)) / 1e6
    return f"| {folder} | {size:.1f} | {prompt_ms:.1f} | {token_ms:.2f} | {np.abs(beside[0] - logits[0]).max():.2g} |"


if __name__ == "__main__":
    print(f"| export | MB | {LENGTH} tokens read, ms | token, ms | change of logits beside other rows |")
    print("|---|---|---|---|---|")
    for folder in sys.argv[1:]:
        print(measure(folder))
