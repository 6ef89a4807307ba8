"""Activation-aware SVD: a matrix as the product of two thin ones that is best for real inputs.

For inputs x with second moments L L^T, the best product for x @ W follows from the SVD of L^T W (SVD-LLM, arXiv
2403.07378). Where a metric B B^T weighs errors of the output, as the keys weigh those of a query, it is L^T W B.
"""

import numpy as np

DAMPING = 1e-6  # of the mean variance: directions without input must not be divided by 0


def factors(w_IO: np.ndarray, inputs_II: np.ndarray, rank: int, metric_OO: np.ndarray | None = None):
    """Return (down [I, R], up [R, O]) in fp32 with the least error for inputs with second moments `inputs_II`.

    At full rank the product is `w_IO`. Both factors have the same scale, as training wants them.
    """
    w_IO = np.asarray(w_IO, np.float64)
    left_II = _root(inputs_II)
    right_OO = np.eye(w_IO.shape[1]) if metric_OO is None else _root(metric_OO)
    p_IR, s_R, q_RO = np.linalg.svd(left_II.T @ w_IO @ right_OO, full_matrices=False)
    down_IR = np.linalg.solve(left_II.T, p_IR[:, :rank] * s_R[:rank])
    up_RO = np.linalg.solve(right_OO.T, q_RO[:rank].T).T
    return _balanced(down_IR, up_RO)


def error(w_IO: np.ndarray, product_IO: np.ndarray, inputs_II: np.ndarray) -> float:
    """Return the RMS of x @ (W - product) relative to that of x @ W, for second moments `inputs_II` of x."""
    size = lambda m_IO: np.einsum("IO,IJ,JO->", m_IO, inputs_II, m_IO, optimize=True)
    w_IO = np.asarray(w_IO, np.float64)
    return float((max(size(w_IO - product_IO), 0) / max(size(w_IO), 1e-300)) ** 0.5)


def _root(c: np.ndarray) -> np.ndarray:
    """Return a lower triangular L with L L^T = C, up to a little more on the diagonal."""
    c = np.asarray(c, np.float64)
    return np.linalg.cholesky(c + max(DAMPING * np.trace(c) / len(c), 1e-30) * np.eye(len(c)))


def _balanced(down_IR: np.ndarray, up_RO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of the same product with equal singular values: fp32 loses nothing, no factor learns slower."""
    q_IR, r_RR = np.linalg.qr(down_IR)
    t_OR, u_RR = np.linalg.qr(up_RO.T)
    p_RR, s_R, v_RR = np.linalg.svd(r_RR @ u_RR.T)
    root_R = s_R**0.5
    return (q_IR @ p_RR * root_R).astype(np.float32), (root_R[:, None] * (v_RR @ t_OR.T)).astype(np.float32)
