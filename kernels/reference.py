"""Dense attention in numpy, the only oracle: float64 for the truth, and a low-precision baseline for the error budget.

No code of the kernels is used here, and nothing is clever: scores are a full [T, S] matrix, so keep the shapes small.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


class ReferenceResult(NamedTuple):
    """Attention and its gradients: `[B, T, N, H]` output and dq, `[B, S, K, H]` dk and dv, `[B, N, T]` lse."""

    output: Float[np.ndarray, "B T N H"]
    lse: Float[np.ndarray, "B N T"]
    dq: Float[np.ndarray, "B T N H"]
    dk: Float[np.ndarray, "B S K H"]
    dv: Float[np.ndarray, "B S K H"]


def visible_pairs(
    q_positions: Int[np.ndarray, " T"],
    k_positions: Int[np.ndarray, " S"],
    q_segment_ids: Int[np.ndarray, "B T"] | None = None,
    k_segment_ids: Int[np.ndarray, "B S"] | None = None,
    *,
    is_causal: bool = False,
) -> Bool[np.ndarray, "B T S"]:
    """The dense mask, said once more in the plainest way (B is 1 without segment ids)."""
    q_pos, k_pos = np.asarray(q_positions)[:, None], np.asarray(k_positions)[None, :]
    visible = (q_pos >= k_pos) if is_causal else np.ones((q_pos.size, k_pos.size), bool)
    visible = visible[None]
    if q_segment_ids is not None and k_segment_ids is not None:
        q_seg, k_seg = np.asarray(q_segment_ids)[:, :, None], np.asarray(k_segment_ids)[:, None, :]
        visible = visible & (q_seg == k_seg) & (q_seg != 0)
    return visible


def reference_attention(
    query: Shaped[np.ndarray, "B T N H"],
    key: Shaped[np.ndarray, "B S K H"],
    value: Shaped[np.ndarray, "B S K H"],
    visible: Bool[np.ndarray, "B T S"],
    *,
    d_out: Shaped[np.ndarray, "B T N H"] | None = None,
    d_lse: Shaped[np.ndarray, "B N T"] | None = None,
    scale: float | None = None,
    low_precision: np.dtype | None = None,
    lse: Float[np.ndarray, "B N T"] | None = None,
    delta: Float[np.ndarray, "B N T"] | None = None,
) -> ReferenceResult:
    """Dense attention and its gradients for the cotangents `d_out` and `d_lse` (zero where None).

    With `lse` and `delta`, the logsumexps over all keys and the sums of output times `d_out`, the keys may be a part of
    all keys: `dk` and `dv` are then whole, output and `dq` the shares of these keys.

    With `low_precision=None` everything is float64. With a dtype it is the baseline that tolerances are measured by:
    attention in one piece as a good dense implementation does it, float32 scores and sums, with the probabilities and
    their gradients rounded to that dtype before each product, and results rounded to it.
    """
    work = np.float64 if low_precision is None else np.float32

    def rounded(x: np.ndarray) -> np.ndarray:
        return x if low_precision is None else x.astype(low_precision).astype(work)

    batch, num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    group = num_heads // num_kv_heads
    factor = work(head_dim**-0.5 if scale is None else scale)
    q = np.asarray(query).astype(work).reshape(batch, num_queries, num_kv_heads, group, head_dim)
    k, v = np.asarray(key).astype(work), np.asarray(value).astype(work)
    d_o = np.zeros_like(q) if d_out is None else np.asarray(d_out).astype(work).reshape(q.shape)
    d_l = np.zeros((batch, num_heads, num_queries), work) if d_lse is None else np.asarray(d_lse).astype(work)
    d_l = d_l.reshape(batch, num_kv_heads, group, num_queries)

    seen = np.broadcast_to(visible, (batch, *visible.shape[1:]))[:, None, None]
    scores = np.where(seen, factor * np.einsum("btkgh,bskh->bkgts", q, k, optimize=True), -np.inf)
    if lse is None:
        top = scores.max(axis=-1, keepdims=True)
        exp = np.exp(scores - np.where(np.isneginf(top), work(0), top))
        total = exp.sum(axis=-1, keepdims=True)
        some = total > 0
        probs = exp / np.where(some, total, work(1))
        lse = np.where(some, top + np.log(np.where(some, total, work(1))), -np.inf)[..., 0]
    else:
        lse = lse.astype(work).reshape(batch, num_kv_heads, group, num_queries)
        probs = np.exp(scores - np.where(np.isneginf(lse), work(0), lse)[..., None])
    output = rounded(np.einsum("bkgts,bskh->btkgh", rounded(probs), v, optimize=True))

    d_probs = np.einsum("btkgh,bskh->bkgts", d_o, v, optimize=True)
    own = np.einsum("btkgh,btkgh->bkgt", d_o, output) if delta is None else delta.astype(work).reshape(d_l.shape)
    d_scores = rounded(probs * (d_probs - (own - d_l)[..., None]))
    dq = factor * np.einsum("bkgts,bskh->btkgh", d_scores, k, optimize=True)
    dk = factor * np.einsum("bkgts,btkgh->bskh", d_scores, q, optimize=True)
    dv = np.einsum("bkgts,btkgh->bskh", rounded(probs), d_o, optimize=True)
    return ReferenceResult(
        output.reshape(query.shape),
        lse.reshape(batch, num_heads, num_queries),
        rounded(dq).reshape(query.shape),
        rounded(dk),
        rounded(dv),
    )
