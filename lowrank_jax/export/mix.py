"""Which type each matrix of a GGUF file is kept in: as llama.cpp's own quantiser chooses them.

`q4_k_m` keeps the head, and in half of the layers V and the MLP's last matrix, in 6 bits, the rest in 4.
"""

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}
MADE_BY_LLAMA, NEED_LLAMA = ("Q4_K", "Q6_K"), ("q4_k_m",)  # the package gguf cannot pack these
BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q5_0": 32, "Q4_K": 256, "Q6_K": 256}  # numbers that share a scale
NEXT = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16"}  # where blocks do not divide a row


def kind(name: str, columns: int, quant: str, layers: int, tied: bool) -> str:
    """The type of a matrix with rows of so many numbers, such as Q4_K; names: blk.3.attn_v, token_embd."""
    found = wanted(name, quant, layers, tied)
    while columns % BLOCKS[found]:
        found = NEXT[found]
    return found


def wanted(name: str, quant: str, layers: int, tied: bool) -> str:
    """The same if blocks divided every row."""
    return "Q6_K" if quant == "q4_k_m" and _sensitive(name, layers, tied) else TYPES[quant]


def _sensitive(name: str, layers: int, tied: bool) -> bool:
    if not name.startswith("blk."):
        return name == ("token_embd" if tied else "output")
    _, layer, part = name.split(".")
    i, eighth = int(layer), layers // 8
    more = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
    return more and part in ("attn_v", "ffn_down")
