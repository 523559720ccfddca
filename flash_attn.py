"""FlashAttention-2 from zero: plain attention, the paper's tiles in PyTorch, and Triton kernels.

    python flash_attn.py bench           # errors, then ms and TFLOP/s beside PyTorch's own kernels
    python flash_attn.py bench --sweep   # T 128 to 65,536 and D 16 to 128 beside plain attention
    TRITON_INTERPRET=1 python flash_attn.py bench --check_only   # errors alone: needs no GPU

Each step of the staircase computes the same thing. `attention` holds all scores, a (Tq, Tk) matrix,
and is the oracle. `FlashAttentionPyTorch` holds one tile of them at a time, and reads as the paper
does. `FlashAttentionTriton` is that in kernels. `flash_attention` is what other scripts call. The
memory of all but the first grows linearly in T, forward and backward.

Sources
[1] Dao 2023, FlashAttention-2, arXiv 2307.08691 (Algorithms 1 and 2)
[2] CS336 assignment 2 (systems) handout, Stanford 2026
[3] Milakov and Gimelshein 2018, Online normalizer calculation for softmax, arXiv 1805.02867
[4] Ainslie et al. 2023, GQA, arXiv 2305.13245
[5] NVIDIA CUDA C++ Programming Guide, table of compute capabilities (shared memory of a block)
[6] NVIDIA CUDA Driver API, cuLaunchKernel and Tensor Map Object Management

Dims: B batch, H query heads, G key/value heads, T time (Tq queries, Tk keys), D d_head.
In kernels: i a query, j a key, m the first query of a tile, n the first key of one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import numbers
import re
import statistics
import sys
import threading
import typing

import torch

LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E); a GPU's own instruction is exp2

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# tl.dot's max_num_imprecise_acc, which float32 ignores: any number but 0 keeps triton from making
# dot(a, b, acc) of acc + dot(a, b).
UNFUSED = 1

MAX_D = 256  # wider heads would need tiles that no card's shared memory holds

# Largest relative error against float32 that `check` lets pass, about four times what SDPA has
# with random inputs. Rounding of p, ds and the outputs: 2^-9 a time in bfloat16, 2^-12 in float16.
ERROR_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
REFERENCE_TILE = 2048  # of the float32 tiles that it compares with

# What bench measures: B x H x T x D.
GPU_SHAPES = "1x16x16384x64,1x16x16384x128,4x16x4096x128,8x12x1024x64"
CPU_SHAPES = "1x2x64x32,2x1x100x64"
SWEEP_D = 16, 32, 64, 128
SWEEP_T = tuple(2**n for n in range(7, 17))  # of --sweep, batch 1
PLAIN_T = 256, 1024, 4096, 8192, 16_384  # of --pytorch_attention, batch 8
PLAIN_SAMPLES = 100  # of it too, as [2] asks
SAMPLES = 5  # of any timing, at least
PARTS = "forward", "backward", "both", "replayed"
NO_MEMORY = "out of memory"
REPLAYED_BELOW_MS = 1  # longer work hides what the host does
OURS = ("ours", "deterministic", "portable")
RIVALS = (*OURS, "flash2", "cudnn", "flex", "plain")


# -------------------------------------------------------------------------------------------------
# plain attention: the oracle


def document_bounds(cu_seqlens, T):
    """(first, end), each int32 (T,): the document of token t is tokens first[t] to end[t] - 1.
    Tokens outside all documents get first = end. cu_seqlens [0, 2, 3] and T 3 give [0, 0, 2] and
    [2, 2, 3].
    """
    cu_seqlens = cu_seqlens.clamp(0, T)  # whatever it holds, no address is out of bounds
    position = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True)
    return (torch.cat((cu_seqlens[:1], cu_seqlens))[document],
            torch.cat((cu_seqlens, cu_seqlens[-1:]))[document])


def attention(q, k, v, causal=True, scale=None, cu_seqlens=None):
    """(o, lse) of softmax(scale q k^T) v, computed in the dtype of the inputs with all scores in
    memory: o (..., H, Tq, D) and lse (..., H, Tq), the natural log of the sum of exp(score).

    Arguments as `flash_attention`; heads and batch may be missing. A query that sees no key gives
    o = 0 and lse = -inf.
    """
    Tq, Tk = q.shape[-2], k.shape[-2]
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    i = torch.arange(Tq, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    if causal:
        scores = scores.masked_fill(j > i + Tk - Tq, -math.inf)
    if cu_seqlens is not None:
        first, end = document_bounds(cu_seqlens, Tq)
        scores = scores.masked_fill((j < first[:, None]) | (j >= end[:, None]), -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return weights @ v, lse


# -------------------------------------------------------------------------------------------------
# tiles in PyTorch


def tiled_forward(q, k, v, causal, scale, q_tile, k_tile):
    """(o, lse) of `attention`, with one (q_tile, k_tile) tile of scores at a time. lse and all
    arithmetic are float32 at least. source: [1] Algorithm 1, whose names these are; [3]"""
    Tq, Tk = q.shape[-2], k.shape[-2]
    kind = torch.promote_types(q.dtype, torch.float32)
    O, L = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=kind, device=q.device)
    for i in range(0, Tq, q_tile):
        Q_i = q[..., i : i + q_tile, :].to(kind)
        O_i = torch.zeros_like(Q_i)
        l_i = torch.zeros_like(Q_i[..., 0])
        m_i = torch.full_like(l_i, -math.inf)
        keys = min(Tk, i + q_tile + Tk - Tq) if causal else Tk  # none above the diagonal
        for j in range(0, keys, k_tile):
            K_j, V_j = k[..., j : j + k_tile, :].to(kind), v[..., j : j + k_tile, :].to(kind)
            S = Q_i @ K_j.mT * scale
            if causal:
                S = S.masked_fill(~S.new_ones(S.shape[-2:]).tril(i - j + Tk - Tq).bool(), -math.inf)
            m_new = torch.maximum(m_i, S.amax(-1))
            P = torch.exp(S - m_new[..., None])
            rescale = torch.exp(m_i - m_new)  # what came before was measured from the old maximum
            l_i = rescale * l_i + P.sum(-1)
            O_i = rescale[..., None] * O_i + P @ V_j
            m_i = m_new
        O[..., i : i + q_tile, :] = O_i / l_i.clamp(min=1)[..., None]  # below 1 only without keys
        L[..., i : i + q_tile] = m_i + l_i.log()
    return O, L


def tiled_backward(q, k, v, o, lse, do, causal, scale, q_tile, k_tile):
    """(dq, dk, dv): scores are computed again, tile by tile, from lse. source: [1] Algorithm 2"""
    Tq, Tk = q.shape[-2], k.shape[-2]
    kind = lse.dtype
    D = (o.to(kind) * do.to(kind)).sum(-1)
    dQ, dK, dV = (torch.zeros_like(x, dtype=kind) for x in (q, k, v))
    for j in range(0, Tk, k_tile):
        keys = slice(j, min(j + k_tile, Tk))
        K_j, V_j = k[..., keys, :].to(kind), v[..., keys, :].to(kind)
        first = max(0, j - (Tk - Tq)) // q_tile * q_tile if causal else 0
        for i in range(first, Tq, q_tile):
            rows = slice(i, min(i + q_tile, Tq))
            Q_i, dO_i = q[..., rows, :].to(kind), do[..., rows, :].to(kind)
            P = torch.exp(Q_i @ K_j.mT * scale - lse[..., rows, None])
            if causal:
                P = P.tril(i - j + Tk - Tq)
            dV[..., keys, :] += P.mT @ dO_i
            dS = P * (dO_i @ V_j.mT - D[..., rows, None]) * scale
            dQ[..., rows, :] += dS @ K_j
            dK[..., keys, :] += dS.mT @ Q_i
    return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype)


def autocast_inputs(*tensors):
    """The tensors in the dtype that autocast has for their device, where it is on."""
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return [x.to(dtype) if x.dtype in DTYPES.values() else x for x in tensors]
    return tensors


class FlashAttentionPyTorch(torch.autograd.Function):
    """`apply(q, k, v, is_causal=False)`: q (..., Tq, D), k and v (..., Tk, D) to (..., Tq, D).
    Saves one tensor of shape (..., Tq) for the backward pass: lse. source: [2] flash_forward"""

    Q_TILE = 64
    K_TILE = 64

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        q, k, v = autocast_inputs(q, k, v)
        check_shapes(*map(as_heads, (q, k, v)), is_causal)
        if not q.is_floating_point():
            raise ValueError(f"q, k and v must be floating point, got {str(q.dtype)[6:]}; cast "
                             "them")
        if q.shape[:-2] != k.shape[:-2]:
            raise ValueError(f"q and k must have the same leading dimensions, got {tuple(q.shape)} "
                             f"and {tuple(k.shape)}; use flash_attention for grouped heads")
        ctx.causal, ctx.scale = is_causal, q.shape[-1] ** -0.5
        tiles = FlashAttentionPyTorch.Q_TILE, FlashAttentionPyTorch.K_TILE
        with torch.autocast(q.device.type, enabled=False):  # float32 in the tiles stays float32
            o, lse = tiled_forward(q, k, v, is_causal, ctx.scale, *tiles)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():  # once_differentiable forgets it where do needs none
            raise NotImplementedError("gradients of FlashAttentionPyTorch must be taken once, got "
                                      "create_graph=True; use `attention` for second derivatives")
        tiles = FlashAttentionPyTorch.Q_TILE, FlashAttentionPyTorch.K_TILE
        with torch.autocast(do.device.type, enabled=False):
            grads = tiled_backward(*ctx.saved_tensors, do, ctx.causal, ctx.scale, *tiles)
        return *grads, None


# -------------------------------------------------------------------------------------------------
# kernels
#
# Plain functions until `load_kernels` compiles them: importing this file imports no triton, and
# triton's interpreter finds names only among a module's globals.
#
# Rows of a tile that lie beyond the end are loaded as zeros and never stored. Only tiles that the
# diagonal, an end or the edge of a document crosses are masked: each kernel runs the same loop over
# [lo, a) masked, [a, b) plain, [b, hi) masked, and tiles outside [lo, hi) are never visited.

tl = None  # triton.language, once `load_kernels` has run
gl = None  # triton.experimental.gluon.language, once `load_gluon_kernels` has
KERNELS = {}  # name: function
GLUON_KERNELS = {}
# Arguments whose values compile nothing anew.
NOT_SPECIALIZED = {"H", "G", "Tq", "Tk", "heads", "section", "programs"}


def kernel(function):
    KERNELS[function.__name__] = function
    return function


def gluon_kernel(function):
    GLUON_KERNELS[function.__name__] = function
    return function


@kernel
def pick_tile(tiles, heads, section):
    """(head, tile) of this program. `section` heads run at a time, so many that what they read
    again and again fits in the L2 cache: tile 0 of each of these heads, then tile 1 of each."""
    pid = tl.program_id(0)
    start = pid // (section * tiles) * section
    width = tl.minimum(section, heads - start)
    pid -= start * tiles
    return start + pid % width, pid // width


@kernel
def head_of(pointer, strides, b, h):
    return pointer + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@kernel
def offsets(strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Where the elements of a tile lie, counted from its first one: (ROWS, COLUMNS)."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    return row * strides[2] + column * strides[3]


@kernel
def below(count, N: tl.constexpr, ALL: tl.constexpr):
    """(N,): whether 0, 1, ... are below count. A constant if ALL are: the load has no mask then."""
    mask = tl.full((N,), 1, tl.int1)
    if not ALL:
        mask = tl.arange(0, N) < count
    return mask


@kernel
def load_tile(pointer, strides, at, t, T, D, ALL_T: tl.constexpr, ALL_D: tl.constexpr,
              UPCAST: tl.constexpr):
    """Rows t, t + 1, ... of a head, as many as `at` has: (ROWS, COLUMNS)."""
    rows, columns = below(T - t, at.shape[0], ALL_T), below(D, at.shape[1], ALL_D)
    x = tl.load(pointer + tl.cast(t, tl.int64) * strides[2] + at, rows[:, None] & columns[None, :],
                0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@kernel
def store_tile(pointer, strides, x, t, T, D, ALL_T: tl.constexpr, ALL_D: tl.constexpr,
               WIDE: tl.constexpr):
    rows, columns = below(T - t, x.shape[0], ALL_T), below(D, x.shape[1], ALL_D)
    at = offsets(strides, x.shape[0], x.shape[1], WIDE)
    tl.store(pointer + tl.cast(t, tl.int64) * strides[2] + at, x.to(pointer.dtype.element_ty),
             rows[:, None] & columns[None, :])


@kernel
def load_bounds(first, end, t, T, SPANS: tl.constexpr):
    """(first, end) of the documents of tokens t; zeros where there are no documents."""
    lo, hi = tl.zeros_like(t), tl.zeros_like(t)
    if SPANS:
        lo, hi = tl.load(first + t, t < T, 0), tl.load(end + t, t < T, 0)
    return lo, hi


@kernel
def keys_of(m, Tq, Tk, first, end, CAUSAL: tl.constexpr, SPANS: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, a, b, hi) for the query tile at m: it sees keys in [lo, hi), each query all of [a, b).
    A cu_seqlens that does not increase gives a wrong answer, but no address out of bounds."""
    last = tl.minimum(m + BLOCK_M, Tq) - 1
    lo, a, b, hi = 0, 0, Tk, Tk
    if CAUSAL:
        b = m + 1 + Tk - Tq
        hi = last + 1 + Tk - Tq
    if SPANS:
        lo = tl.maximum(tl.load(first + m), 0) // BLOCK_N * BLOCK_N
        a = tl.cdiv(tl.maximum(tl.load(first + last), 0), BLOCK_N) * BLOCK_N
        b = tl.minimum(b, tl.load(end + m))
        hi = tl.minimum(hi, tl.load(end + last))
        a = tl.minimum(a, hi)
    return lo, a, tl.maximum(a, b // BLOCK_N * BLOCK_N), hi


@kernel
def queries_of(n, Tq, Tk, first, end, CAUSAL: tl.constexpr, SPANS: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, a, b, hi) for the key tile at n: queries in [lo, hi) see it, those in [a, b) all of it.
    """
    last = tl.minimum(n + BLOCK_N, Tk) - 1
    lo, a, b, hi = 0, 0, Tq, Tq
    if CAUSAL:
        lo = tl.maximum(n + Tq - Tk, 0)
        a = tl.maximum(last + Tq - Tk, 0)
    if SPANS:
        lo = tl.maximum(lo, tl.load(first + n))
        a = tl.maximum(a, tl.load(first + last))
        b = tl.minimum(b, tl.load(end + n))
        hi = tl.minimum(hi, tl.load(end + last))
    lo = lo // BLOCK_M * BLOCK_M
    a = tl.minimum(tl.cdiv(a, BLOCK_M) * BLOCK_M, hi)
    return lo, a, tl.maximum(a, b // BLOCK_M * BLOCK_M), hi


@kernel
def mask_scores(s, i, j, t, first, end, Tq, Tk, CAUSAL: tl.constexpr, SPANS: tl.constexpr):
    """s, -inf where query i does not see key j, or token t is not in [first, end)."""
    seen = j < Tk
    if CAUSAL:
        seen = j <= i + (Tk - Tq)  # all j < Tk, for queries that exist
    if SPANS:
        seen &= (first <= t) & (t < end)
    return tl.where(seen, s, float("-inf"))


@kernel
def forward_kernel(q, k, v, o, lse, first, end, q_strides, k_strides, v_strides, o_strides, H, Tq,
                   Tk, D, heads, section, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
                   SPANS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
                   EVEN_D: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, LOG2_E: tl.constexpr = LOG2_E,
                   UNFUSED: tl.constexpr = UNFUSED):
    """o and lse of one query tile of one head. source: [1] Algorithm 1; [3]"""
    tiles = tl.cdiv(Tq, BLOCK_M)
    head, tile = pick_tile(tiles, heads, section)
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    b, h, m = head // H, head % H, tile * BLOCK_M
    i = m + tl.arange(0, BLOCK_M)
    first_i, end_i = load_bounds(first, end, i, Tq, SPANS)
    q_at = offsets(q_strides, BLOCK_M, BLOCK_D, WIDE)
    k_at = offsets(k_strides, BLOCK_N, BLOCK_D, WIDE)
    v_at = offsets(v_strides, BLOCK_N, BLOCK_D, WIDE)
    k = head_of(k, k_strides, b, h // GROUP)
    v = head_of(v, v_strides, b, h // GROUP)
    q = load_tile(head_of(q, q_strides, b, h), q_strides, q_at, m, Tq, D, EVEN_M, EVEN_D, UPCAST)

    EXACT: tl.constexpr = lse.dtype.element_ty == v.dtype.element_ty  # float32 inputs
    if not EXACT:
        scale *= LOG2_E  # scores in units of log 2: then exp2(s * scale - base) is one FMA
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # the row's largest score so far
    total = tl.zeros((BLOCK_M,), tl.float32)  # its sum of exp2(score - peak)
    bounds = keys_of(m, Tq, Tk, first, end, CAUSAL, SPANS, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        if part == 1 or SPANS or (part == 2 and (CAUSAL or not EVEN_N)):
            for n in range(bounds[part], bounds[part + 1], BLOCK_N):
                k_tile = load_tile(k, k_strides, k_at, n, Tk, D, EVEN_N or part == 1, EVEN_D,
                                   UPCAST)
                v_tile = load_tile(v, v_strides, v_at, n, Tk, D, EVEN_N or part == 1, EVEN_D,
                                   UPCAST)
                s = tl.dot(q, k_tile.T, input_precision=PRECISION)
                if part != 1:
                    j = (n + tl.arange(0, BLOCK_N))[None, :]
                    s = mask_scores(s, i[:, None], j, j, first_i[:, None], end_i[:, None], Tq, Tk,
                                    CAUSAL, SPANS)
                new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
                base = new_peak
                if SPANS:  # a row may have seen no key yet, and -inf minus -inf is not a number
                    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                if EXACT:  # natural units, which lse has, and a sum of its own for each tile, which
                    # an unfused dot has: one chain through all T terms would be 3 times less exact
                    p = tl.exp2((s * scale - base[:, None]) * LOG2_E)
                    shrink = tl.exp2((peak - base) * LOG2_E)
                    acc = acc * shrink[:, None] + tl.dot(p, v_tile, input_precision=PRECISION,
                                                         max_num_imprecise_acc=UNFUSED)
                else:
                    p = tl.exp2(s * scale - base[:, None])
                    shrink = tl.exp2(peak - base)
                    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None],
                                 input_precision=PRECISION)
                total = total * shrink + tl.sum(p, 1)
                peak = new_peak

    total = tl.where(total == 0, 1.0, total)  # no key seen: o = 0, lse = -inf
    acc = acc / total[:, None]
    store_tile(head_of(o, o_strides, b, h), o_strides, acc, m, Tq, D, EVEN_M, EVEN_D, WIDE)
    peak = peak if EXACT else peak / LOG2_E
    tl.store(lse + tl.cast(head, tl.int64) * Tq + i, peak + tl.log(total), i < Tq)


@kernel
def delta_kernel(o, do, delta, o_strides, do_strides, H, Tq, D, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """delta = rowsum(o * do) in float32. source: [1] Algorithm 2, line 4"""
    tiles = tl.cdiv(Tq, BLOCK_M)
    head, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h, i = head // H, head % H, m + tl.arange(0, BLOCK_M)
    o_at = offsets(o_strides, BLOCK_M, BLOCK_D, True)
    do_at = offsets(do_strides, BLOCK_M, BLOCK_D, True)
    o = load_tile(head_of(o, o_strides, b, h), o_strides, o_at, m, Tq, D, False, False, True)
    do = load_tile(head_of(do, do_strides, b, h), do_strides, do_at, m, Tq, D, False, False, True)
    tl.store(delta + tl.cast(head, tl.int64) * Tq + i, tl.sum(o * do, 1), i < Tq)


@kernel
def dq_kernel(q, k, v, do, lse, delta, dq, first, end, q_strides, k_strides, v_strides, do_strides,
              dq_strides, H, Tq, Tk, D, heads, section, scale, GROUP: tl.constexpr,
              CAUSAL: tl.constexpr, SPANS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
              EVEN_D: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, LOG2_E: tl.constexpr = LOG2_E,
              UNFUSED: tl.constexpr = UNFUSED):
    """dq of one query tile of one head: the loop of `forward_kernel`, with lse known."""
    tiles = tl.cdiv(Tq, BLOCK_M)
    head, tile = pick_tile(tiles, heads, section)
    if CAUSAL:
        tile = tiles - 1 - tile
    b, h, m = head // H, head % H, tile * BLOCK_M
    i = m + tl.arange(0, BLOCK_M)
    first_i, end_i = load_bounds(first, end, i, Tq, SPANS)
    q_at = offsets(q_strides, BLOCK_M, BLOCK_D, WIDE)
    do_at = offsets(do_strides, BLOCK_M, BLOCK_D, WIDE)
    k_at = offsets(k_strides, BLOCK_N, BLOCK_D, WIDE)
    v_at = offsets(v_strides, BLOCK_N, BLOCK_D, WIDE)
    k = head_of(k, k_strides, b, h // GROUP)
    v = head_of(v, v_strides, b, h // GROUP)
    q = load_tile(head_of(q, q_strides, b, h), q_strides, q_at, m, Tq, D, EVEN_M, EVEN_D, UPCAST)
    do = load_tile(head_of(do, do_strides, b, h), do_strides, do_at, m, Tq, D, EVEN_M, EVEN_D,
                   UPCAST)
    row = tl.cast(head, tl.int64) * Tq + i
    EXACT: tl.constexpr = lse.dtype.element_ty == dq.dtype.element_ty  # as in forward_kernel
    lse_i = tl.load(lse + row, i < Tq, 0.0)
    if not EXACT:
        lse_i *= LOG2_E
    delta_i = tl.load(delta + row, i < Tq, 0.0)
    if SPANS:  # a query that sees no key has no p
        lse_i = tl.where(lse_i == float("-inf"), float("inf"), lse_i)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bounds = keys_of(m, Tq, Tk, first, end, CAUSAL, SPANS, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        if part == 1 or SPANS or (part == 2 and (CAUSAL or not EVEN_N)):
            for n in range(bounds[part], bounds[part + 1], BLOCK_N):
                k_tile = load_tile(k, k_strides, k_at, n, Tk, D, EVEN_N or part == 1, EVEN_D,
                                   UPCAST)
                v_tile = load_tile(v, v_strides, v_at, n, Tk, D, EVEN_N or part == 1, EVEN_D,
                                   UPCAST)
                s = tl.dot(q, k_tile.T, input_precision=PRECISION)
                if part != 1:
                    j = (n + tl.arange(0, BLOCK_N))[None, :]
                    s = mask_scores(s, i[:, None], j, j, first_i[:, None], end_i[:, None], Tq, Tk,
                                    CAUSAL, SPANS)
                if EXACT:
                    p = tl.exp2((s * scale - lse_i[:, None]) * LOG2_E)
                else:
                    p = tl.exp2(s * (scale * LOG2_E) - lse_i[:, None])
                dp = tl.dot(do, v_tile.T, input_precision=PRECISION)
                ds = p * (dp - delta_i[:, None])
                if EXACT:
                    acc += tl.dot(ds, k_tile, input_precision=PRECISION,
                                  max_num_imprecise_acc=UNFUSED)
                else:
                    acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    dq = head_of(dq, dq_strides, b, h)
    store_tile(dq, dq_strides, acc * scale, m, Tq, D, EVEN_M, EVEN_D, WIDE)


@kernel
def dkdv_kernel(q, k, v, do, lse, delta, dk, dv, first, end, q_strides, k_strides, v_strides,
                do_strides, dk_strides, dv_strides, H, Tq, Tk, D, heads, section, scale,
                GROUP: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr,
                EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr,
                WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                LOG2_E: tl.constexpr = LOG2_E, UNFUSED: tl.constexpr = UNFUSED):
    """dk and dv of one key tile of one key head, from all query heads that share it: nothing is
    added up in memory. Scores are transposed here, (BLOCK_N, BLOCK_M). source: [1] Algorithm 2"""
    head, tile = pick_tile(tl.cdiv(Tk, BLOCK_N), heads, section)  # tile 0 is the longest
    b, g, n = head // (H // GROUP), head % (H // GROUP), tile * BLOCK_N
    j = n + tl.arange(0, BLOCK_N)
    first_j, end_j = load_bounds(first, end, j, Tk, SPANS)
    q_at = offsets(q_strides, BLOCK_M, BLOCK_D, WIDE)
    do_at = offsets(do_strides, BLOCK_M, BLOCK_D, WIDE)
    k_at = offsets(k_strides, BLOCK_N, BLOCK_D, WIDE)
    v_at = offsets(v_strides, BLOCK_N, BLOCK_D, WIDE)
    k = load_tile(head_of(k, k_strides, b, g), k_strides, k_at, n, Tk, D, EVEN_N, EVEN_D, UPCAST)
    v = load_tile(head_of(v, v_strides, b, g), v_strides, v_at, n, Tk, D, EVEN_N, EVEN_D, UPCAST)

    EXACT: tl.constexpr = lse.dtype.element_ty == dk.dtype.element_ty  # as in forward_kernel
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bounds = queries_of(n, Tq, Tk, first, end, CAUSAL, SPANS, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        if part == 1 or SPANS or (CAUSAL if part == 0 else not EVEN_M):
            lo = bounds[part]
            length = tl.cdiv(bounds[part + 1] - lo, BLOCK_M) * BLOCK_M
            for step in range(lo, lo + GROUP * length, BLOCK_M):  # nested loops would spill
                h, m = g, step
                if GROUP > 1:
                    h, m = g * GROUP + (step - lo) // length, lo + (step - lo) % length
                q_tile = load_tile(head_of(q, q_strides, b, h), q_strides, q_at, m, Tq, D,
                                   EVEN_M or part == 1, EVEN_D, UPCAST)
                do_tile = load_tile(head_of(do, do_strides, b, h), do_strides, do_at, m, Tq, D,
                                    EVEN_M or part == 1, EVEN_D, UPCAST)
                i = m + tl.arange(0, BLOCK_M)
                row = (tl.cast(b, tl.int64) * H + h) * Tq + i
                exists = below(Tq - m, BLOCK_M, EVEN_M or part == 1)
                lse_i = tl.load(lse + row, exists, float("inf"))  # inf: p = 0
                delta_i = tl.load(delta + row, exists, 0.0)
                if SPANS:
                    lse_i = tl.where(lse_i == float("-inf"), float("inf"), lse_i)
                s = tl.dot(k, q_tile.T, input_precision=PRECISION)
                if part != 1:
                    s = mask_scores(s, i[None, :], j[:, None], i[None, :], first_j[:, None],
                                    end_j[:, None], Tq, Tk, CAUSAL, SPANS)
                if EXACT:
                    p = tl.exp2((s * scale - lse_i[None, :]) * LOG2_E)
                    dv_acc += tl.dot(p, do_tile, input_precision=PRECISION,
                                     max_num_imprecise_acc=UNFUSED)
                else:
                    p = tl.exp2(s * (scale * LOG2_E) - (lse_i * LOG2_E)[None, :])
                    dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc,
                                    input_precision=PRECISION)
                dp = tl.dot(v, do_tile.T, input_precision=PRECISION)
                ds = p * (dp - delta_i[None, :])
                if EXACT:
                    dk_acc += tl.dot(ds, q_tile, input_precision=PRECISION,
                                     max_num_imprecise_acc=UNFUSED)
                else:
                    dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc,
                                    input_precision=PRECISION)

    dk, dv = head_of(dk, dk_strides, b, g), head_of(dv, dv_strides, b, g)
    store_tile(dk, dk_strides, dk_acc * scale, n, Tk, D, EVEN_N, EVEN_D, WIDE)
    store_tile(dv, dv_strides, dv_acc, n, Tk, D, EVEN_N, EVEN_D, WIDE)


@kernel
def decode_kernel(q, k, v, o, lse, lengths, q_strides, k_strides, v_strides, G, D, chunk, splits,
                  scale, GROUP: tl.constexpr, ROWS: tl.constexpr, EVEN_D: tl.constexpr,
                  UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  LOG2_E: tl.constexpr = LOG2_E):
    """o and lse of the one query of each of the GROUP heads that share a key head, over `chunk` of
    the row's keys: `forward_kernel` with heads for queries, so that keys are read once."""
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    b, g = head // G, head % G
    end = tl.minimum((split + 1) * chunk, tl.load(lengths + b).to(tl.int32))
    row, rows = tl.arange(0, ROWS), below(GROUP, ROWS, False)
    columns = below(D, BLOCK_D, EVEN_D)
    q = head_of(q, q_strides, b, g * GROUP)
    q_at = row[:, None] * q_strides[1] + tl.arange(0, BLOCK_D)[None, :] * q_strides[3]
    queries = tl.load(q + q_at, rows[:, None] & columns[None, :], 0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    k, v = head_of(k, k_strides, b, g), head_of(v, v_strides, b, g)
    k_at, v_at = (offsets(k_strides, BLOCK_N, BLOCK_D, False),
                  offsets(v_strides, BLOCK_N, BLOCK_D, False))
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for n in range(split * chunk, end, BLOCK_N):
        k_tile = load_tile(k, k_strides, k_at, n, end, D, False, EVEN_D, UPCAST)
        v_tile = load_tile(v, v_strides, v_at, n, end, D, False, EVEN_D, UPCAST)
        s = tl.dot(queries, k_tile.T, input_precision="ieee") * (scale * LOG2_E)
        s = tl.where((n + tl.arange(0, BLOCK_N) < end)[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p, shrink = tl.exp2(s - new_peak[:, None]), tl.exp2(peak - new_peak)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
    total = tl.where(total == 0, 1.0, total)  # no key in this chunk: o = 0, lse = -inf
    at = ((tl.cast(b, tl.int64) * G + g) * GROUP + row) * splits + split  # (B, H, splits)
    tl.store(o + at[:, None] * D + tl.arange(0, BLOCK_D)[None, :],
             (acc / total[:, None]).to(o.dtype.element_ty), rows[:, None] & columns[None, :])
    tl.store(lse + at, peak / LOG2_E + tl.log(total), rows)


# -------------------------------------------------------------------------------------------------
# kernels for Hopper (sm_90) in Gluon: same mathematics, with the chip's units scheduled by hand
#
# A producer warp brings tiles by TMA into rings in shared memory; consumer warpgroups multiply them
# with asynchronous wgmma. full and empty mbarriers pass each slot of a ring back and forth: use
# number n of a ring of S slots waits for phase (n // S) % 2 of slot n % S. In mbarrier.arrive one
# thread arrives for all of its warps, which the compiler makes meet first.


@gluon_kernel
def make_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """(N, 1) mbarriers, each of which completes a phase when COUNT threads have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon_kernel
def wait_for(barriers, use, SLOTS: gl.constexpr, EMPTY: gl.constexpr):
    """Waits until the slot of this use is full or, with EMPTY, free again after the use before."""
    mbarrier.wait(barriers.index(use % SLOTS), use // SLOTS % 2 ^ EMPTY)


@gluon_kernel
def load_async(descriptor, at, barriers, slot, tile):
    """Starts the copy of the block at `at` into `tile`; its bytes complete the barrier's phase."""
    tma.async_copy_global_to_shared(descriptor, at, barriers.index(slot), tile)


@gluon_kernel
def matrix(tile, ROWS: gl.constexpr, D: gl.constexpr):
    """A (1, 1, ROWS, D) tile as the two-dimensional operand that wgmma takes."""
    return tile._reinterpret(tile.dtype, [ROWS, D], gl.NVMMASharedLayout(128, 16, 2))


@gluon_kernel
def hopper_turns(sizes, BLOCK_M: gl.constexpr):
    """How many tiles of queries this program gets. They are dealt longest first, back and forth
    over the programs, so that all end together."""
    H, G, heads, Tq, Tk, programs = sizes
    tiles, pid = gl.cdiv(Tq, BLOCK_M) * heads, gl.program_id(0)
    whole = tiles // programs
    place = gl.where(whole % 2 == 0, pid, programs - 1 - pid)
    return whole + (place < tiles % programs).to(gl.int32)


@gluon_kernel
def hopper_tile(turn, sizes, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(b, h, g, m, number of key tiles) of this program's tile number `turn`."""
    H, G, heads, Tq, Tk, programs = sizes
    pid = gl.program_id(0)
    place = turn * programs + gl.where(turn % 2 == 0, pid, programs - 1 - pid)
    head, m = place % heads, (gl.cdiv(Tq, BLOCK_M) - 1 - place // heads) * BLOCK_M
    b, h = head // H, head % H
    keys = Tk
    if CAUSAL:
        keys = gl.minimum(m + BLOCK_M + Tk - Tq, Tk)
    return b, h, h // (H // G), m, gl.cdiv(keys, BLOCK_N)


@gluon_kernel
def hopper_forward_producer(inputs, rings, barriers, sizes, CAUSAL: gl.constexpr,
                            WORKERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    q_desc, k_desc, v_desc = inputs
    q_ring, k_ring, v_ring, o_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    ROWS: gl.constexpr = q_ring.shape[3]  # queries of a worker
    SLOTS: gl.constexpr = k_ring.shape[0]
    row_bytes: gl.constexpr = 2 * BLOCK_D
    use = 0
    for turn in range(hopper_turns(sizes, WORKERS * ROWS)):
        b, h, g, m, tiles = hopper_tile(turn, sizes, CAUSAL, WORKERS * ROWS, BLOCK_N)
        wait_for(q_empty, turn, 2, True)
        mbarrier.expect(q_full.index(turn % 2), WORKERS * ROWS * row_bytes)
        for w in gl.static_range(WORKERS):
            load_async(q_desc, [b, h, m + w * ROWS, 0], q_full, turn % 2,
                       q_ring.index(turn % 2 * WORKERS + w))
        for i in range(tiles):
            n, slot = (tiles - 1 - i) * BLOCK_N, use % SLOTS  # from the diagonal to the left
            wait_for(k_empty, use, SLOTS, True)
            mbarrier.expect(k_full.index(slot), BLOCK_N * row_bytes)
            load_async(k_desc, [b, g, n, 0], k_full, slot, k_ring.index(slot))
            wait_for(v_empty, use, SLOTS, True)
            mbarrier.expect(v_full.index(slot), BLOCK_N * row_bytes)
            load_async(v_desc, [b, g, n, 0], v_full, slot, v_ring.index(slot))
            use += 1


@gluon_kernel
def hopper_softmax(s, peak, total, n, i, i_first, Tq, Tk, scale, CAUSAL: gl.constexpr):
    """(p, peak, total, shrink) after the scores of the keys from n on, masked where need be."""
    BLOCK_N: gl.constexpr = s.shape[1]
    columns: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    if n + BLOCK_N > (i_first + Tk - Tq + 1 if CAUSAL else Tk):
        j = (n + gl.arange(0, BLOCK_N, layout=columns))[None, :]
        s = gl.where(j <= (i + Tk - Tq)[:, None] if CAUSAL else j < Tk, s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1))
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak) * scale  # a row without a key yet
    p = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(peak * scale - base)
    return p, new_peak, total * shrink + gl.sum(p, 1), shrink


@gluon_kernel
def hopper_forward_consumer(outputs, rings, barriers, sizes, worker: gl.constexpr,
                            CAUSAL: gl.constexpr, WORKERS: gl.constexpr, BLOCK_N: gl.constexpr,
                            BLOCK_D: gl.constexpr, LOG2_E: gl.constexpr):
    """The loop of `forward_kernel` for the ROWS queries of a warpgroup. The scores of a tile are
    asked for before the output of the last one, so that the tensor cores work during softmax."""
    o_desc, lse, scale = outputs
    q_ring, k_ring, v_ring, o_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    H, G, heads, Tq, Tk, programs = sizes
    ROWS: gl.constexpr = q_ring.shape[3]
    SLOTS: gl.constexpr = k_ring.shape[0]
    dtype: gl.constexpr = q_ring.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    no_s = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    o_tile = matrix(o_ring.index(worker), ROWS, BLOCK_D)
    use = 0
    for turn in range(hopper_turns(sizes, WORKERS * ROWS)):
        b, h, g, m, tiles = hopper_tile(turn, sizes, CAUSAL, WORKERS * ROWS, BLOCK_N)
        i_first = m + worker * ROWS
        i = i_first + gl.arange(0, ROWS, layout=rows)
        peak = gl.full([ROWS], float("-inf"), gl.float32, rows)
        total = gl.zeros([ROWS], gl.float32, rows)
        o = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        q = matrix(q_ring.index(turn % 2 * WORKERS + worker), ROWS, BLOCK_D)
        wait_for(q_full, turn, 2, False)
        wait_for(k_full, use, SLOTS, False)
        k = matrix(k_ring.index(use % SLOTS), BLOCK_N, BLOCK_D)
        s = warpgroup_mma(q, k.permute((1, 0)), no_s, use_acc=False)
        mbarrier.arrive(k_empty.index(use % SLOTS))
        p, peak, total, shrink = hopper_softmax(s, peak, total, (tiles - 1) * BLOCK_N, i,
                                                i_first, Tq, Tk, scale, CAUSAL)
        p = gl.convert_layout(p.to(dtype), p_layout)
        for t in range(1, tiles):
            last, use = use, use + 1
            wait_for(k_full, use, SLOTS, False)
            k = matrix(k_ring.index(use % SLOTS), BLOCK_N, BLOCK_D)
            s_async = warpgroup_mma(q, k.permute((1, 0)), no_s, use_acc=False, is_async=True)
            wait_for(v_full, last, SLOTS, False)
            v = matrix(v_ring.index(last % SLOTS), BLOCK_N, BLOCK_D)
            o_async = warpgroup_mma(p, v, o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_async])
            mbarrier.arrive(k_empty.index(use % SLOTS))
            p_new, peak, total, shrink = hopper_softmax(
                s, peak, total, (tiles - 1 - t) * BLOCK_N, i, i_first, Tq, Tk, scale, CAUSAL)
            o = warpgroup_mma_wait(0, deps=[o_async])
            mbarrier.arrive(v_empty.index(last % SLOTS))
            o *= gl.convert_layout(shrink, o_rows)[:, None]
            p = gl.convert_layout(p_new.to(dtype), p_layout)
        mbarrier.arrive(q_empty.index(turn % 2))
        wait_for(v_full, use, SLOTS, False)
        v = matrix(v_ring.index(use % SLOTS), BLOCK_N, BLOCK_D)
        o = warpgroup_mma(p, v, o)
        mbarrier.arrive(v_empty.index(use % SLOTS))
        use += 1
        gl.store(lse + gl.cast(b * H + h, gl.int64) * Tq + i,
                 peak * (scale / LOG2_E) + gl.log(total), i < Tq)
        o *= gl.convert_layout(1.0 / total, o_rows)[:, None]
        tma.store_wait(0)  # the tile before has left shared memory
        block_barrier()
        o_tile.store(o.to(dtype))
        fence_async_shared()
        block_barrier()
        tma.async_copy_shared_to_global(o_desc, [b, h, i_first, 0], o_ring.index(worker))
    tma.store_wait(0)


@gluon_kernel
def hopper_forward_kernel(q_desc, k_desc, v_desc, o_desc, lse, scale, H, G, heads, Tq, Tk, programs,
                          CAUSAL: gl.constexpr, WORKERS: gl.constexpr, ROWS: gl.constexpr,
                          BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, SLOTS: gl.constexpr,
                          LOG2_E: gl.constexpr):
    """o and lse, by one program an SM: a producer, and WORKERS consumers of ROWS queries each.
    scale: that of the scores times log2(e), so that exp2(s * scale - base) is one FMA"""
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [2 * WORKERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    o_ring = gl.allocate_shared_memory(dtype, [WORKERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    rings = (q_ring, k_ring, v_ring, o_ring)
    barriers = (make_barriers(2, 1), make_barriers(2, WORKERS), make_barriers(SLOTS, 1),
                make_barriers(SLOTS, WORKERS), make_barriers(SLOTS, 1),
                make_barriers(SLOTS, WORKERS))
    sizes = (H, G, heads, Tq, Tk, programs)
    fence_async_shared()
    block_barrier()
    inputs, outputs = (q_desc, k_desc, v_desc), (o_desc, lse, scale)
    # 64 K registers for 4 * WORKERS + 4 warps; Gluon takes these lists only as they are written
    if WORKERS == 2:
        gl.warp_specialize([
            (hopper_forward_consumer, (outputs, rings, barriers, sizes, 0, CAUSAL, WORKERS,
                                       BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_forward_consumer, (outputs, rings, barriers, sizes, 1, CAUSAL, WORKERS,
                                       BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_forward_producer, (inputs, rings, barriers, sizes, CAUSAL, WORKERS, BLOCK_N,
                                       BLOCK_D)),
        ], [4, 1], [240, 24])
    else:
        gl.warp_specialize([
            (hopper_forward_consumer, (outputs, rings, barriers, sizes, 0, CAUSAL, WORKERS,
                                       BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_forward_consumer, (outputs, rings, barriers, sizes, 1, CAUSAL, WORKERS,
                                       BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_forward_consumer, (outputs, rings, barriers, sizes, 2, CAUSAL, WORKERS,
                                       BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_forward_producer, (inputs, rings, barriers, sizes, CAUSAL, WORKERS, BLOCK_N,
                                       BLOCK_D)),
        ], [4, 4, 1], [160, 160, 24])


@kernel
def hopper_prepare_kernel(o, do, lse, stats, dq_sum, o_strides, do_strides, H, Tq, padded, D,
                          BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                          LOG2_E: tl.constexpr):
    """For each tile of queries lse * log2(e), then delta = rowsum(o * do), beside each other; and
    zeros into dq_sum. Queries from Tq to `padded` get lse = inf, which makes their p 0."""
    tiles = padded // BLOCK_M
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h, m = head // H, head % H, tile * BLOCK_M
    row, i = tl.arange(0, BLOCK_M), m + tl.arange(0, BLOCK_M)
    o_at = offsets(o_strides, BLOCK_M, BLOCK_D, True)
    do_at = offsets(do_strides, BLOCK_M, BLOCK_D, True)
    o = load_tile(head_of(o, o_strides, b, h), o_strides, o_at, m, Tq, D, False, False, True)
    do = load_tile(head_of(do, do_strides, b, h), do_strides, do_at, m, Tq, D, False, False, True)
    lse_i = tl.load(lse + tl.cast(head, tl.int64) * Tq + i, i < Tq, float("inf"))
    stats += tl.cast(head, tl.int64) * padded * 2 + m * 2
    tl.store(stats + row, lse_i * LOG2_E)
    tl.store(stats + BLOCK_M + row, tl.sum(o * do, 1))
    dq_sum += (tl.cast(head, tl.int64) * padded + m) * BLOCK_D
    at = tl.arange(0, BLOCK_M * BLOCK_D)
    tl.store(dq_sum + at, tl.zeros_like(at).to(tl.float32))


@kernel
def hopper_finish_kernel(dq_sum, dq, dq_strides, H, Tq, padded, D, scale, NARROW: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """dq = scale * dq_sum, which with NARROW lies as `add_registers` left it."""
    tiles = padded // BLOCK_M
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h, m = head // H, head % H, tile * BLOCK_M
    dq_sum += (tl.cast(head, tl.int64) * padded + m) * BLOCK_D
    x = tl.load(dq_sum + tl.arange(0, BLOCK_M * BLOCK_D)) * scale
    if NARROW:
        x = x.reshape(4, 2, BLOCK_D // 16, 8, 4, 2, 2).permute(0, 5, 3, 1, 2, 4, 6)
    store_tile(head_of(dq, dq_strides, b, h), dq_strides, x.reshape(BLOCK_M, BLOCK_D), m, Tq, D,
               False, False, True)


@gluon_kernel
def hopper_backward_producer(inputs, tiles, rings, barriers, place, sizes, SLOTS: gl.constexpr,
                             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    q_desc, k_desc, v_desc, do_desc, stats_desc = inputs
    k_tile, v_tile, ds_tile, dq_tile = tiles
    q_ring, do_ring, stats_ring = rings
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
    b, g, n, m_first, steps_a_head = place
    H, group, Tq, Tk, padded = sizes
    mbarrier.expect(kv_full.index(0), 2 * BLOCK_N * BLOCK_D * 2)
    load_async(k_desc, [b, g, n, 0], kv_full, 0, k_tile)
    load_async(v_desc, [b, g, n, 0], kv_full, 0, v_tile)
    for step in range(group * steps_a_head):
        h, slot = g * group + step // steps_a_head, step % SLOTS
        m = m_first + step % steps_a_head * BLOCK_M
        wait_for(q_empty, step, SLOTS, True)
        mbarrier.expect(q_full.index(slot), BLOCK_M * BLOCK_D * 2 + BLOCK_M * 8)
        load_async(q_desc, [b, h, m, 0], q_full, slot, q_ring.index(slot))
        load_async(stats_desc, [((b * H + h) * padded + m) * 2], q_full, slot,
                   stats_ring.index(slot))
        wait_for(do_empty, step, SLOTS, True)
        mbarrier.expect(do_full.index(slot), BLOCK_M * BLOCK_D * 2)
        load_async(do_desc, [b, h, m, 0], do_full, slot, do_ring.index(slot))


@gluon_kernel
def hopper_backward_writer(dq_sum, tiles, barriers, place, sizes, BLOCK_M: gl.constexpr):
    """Adds each finished dq tile to dq_sum in memory, which TMA does in the L2 cache."""
    k_tile, v_tile, ds_tile, dq_tile = tiles
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
    b, g, n, m_first, steps_a_head = place
    H, group, Tq, Tk, padded = sizes
    for step in range(group * steps_a_head):
        h, m = g * group + step // steps_a_head, m_first + step % steps_a_head * BLOCK_M
        wait_for(dq_full, step, 1, False)
        tma_reduce_add(dq_sum, [(b * H + h) * padded + m, 0], dq_tile)
        tma.store_wait(0)
        mbarrier.arrive(dq_empty.index(0))


@gluon_kernel
def add_registers(dq_sum, dq, row):
    """Adds dq (64, D), an accumulator of 4 x 2 warps, to the 64 * D floats from row * D on, in the
    order in which threads hold it: 16 bytes a thread at one time, side by side in a warp."""
    BLOCK_M: gl.constexpr = dq.shape[0]
    BLOCK_D: gl.constexpr = dq.shape[1]
    # (warp, row bit 3, row bits 0-2, warp, column / 8, column / 2, column bit 0), to which lane
    # (row bits 0-2, column / 2) and its registers (row bit 3, column bit 0) come last
    x = dq.reshape([4, 2, 8, 2, BLOCK_D // 16, 4, 2]).permute((0, 3, 4, 2, 5, 1, 6))
    x = x.reshape([BLOCK_M * BLOCK_D])
    layout: gl.constexpr = x.type.layout
    at = gl.arange(0, BLOCK_M * BLOCK_D, layout=layout) // 4 * 4
    base = (dq_sum + gl.cast(row, gl.int64) * BLOCK_D).to(gl.int64)
    base = gl.full([BLOCK_M * BLOCK_D], base, gl.int64, layout)
    # pack=4 gives a thread's registers four by four, which are neighbours because the two bits that
    # tell them apart (row bit 3, column bit 0) were moved last
    gl.inline_asm_elementwise(
        "{ .reg .b64 address; mad.wide.u32 address, $8, 4, $12;"
        " red.relaxed.gpu.global.add.v4.f32 [address], {$4, $5, $6, $7}; }",
        "=r,=r,=r,=r,f,f,f,f,r,r,r,r,l,l,l,l", [x, at, base], gl.int32, is_pure=False, pack=4)


@gluon_kernel
def hopper_backward_consumer(outputs, tiles, rings, barriers, place, sizes, CAUSAL: gl.constexpr,
                             NARROW: gl.constexpr, SLOTS: gl.constexpr, BLOCK_M: gl.constexpr,
                             BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, LOG2_E: gl.constexpr):
    """The loop of `dkdv_kernel` by two warpgroups, with dq = ds k beside it. Scores are transposed,
    (BLOCK_N, BLOCK_M): p goes from registers straight into dv += p do.

    NARROW, for D up to 64, has registers to spare: k and v stay in them as left operands, the next
    scores are asked for before dq is written out, and dq is added from registers.
    """
    dk_desc, dv_desc, dq_sum, scale = outputs
    k_tile, v_tile, ds_tile, dq_tile = tiles
    q_ring, do_ring, stats_ring = rings
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
    b, g, n, m_first, steps_a_head = place
    H, group, Tq, Tk, padded = sizes
    dtype: gl.constexpr = q_ring.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    no_s = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    no_dq = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, q_layout)
    dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, kv_layout)
    dv = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, kv_layout)
    j = (n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout)))[:, None]
    k, v = matrix(k_tile, BLOCK_N, BLOCK_D), matrix(v_tile, BLOCK_N, BLOCK_D)
    wait_for(kv_full, 0, 1, False)
    k_left, v_left = k, v
    steps = group * steps_a_head
    if NARROW:
        k_left = k.load(gl.DotOperandLayout(0, s_layout, 2))
        v_left = v.load(gl.DotOperandLayout(0, s_layout, 2))
        wait_for(q_full, 0, SLOTS, False)
        q = matrix(q_ring.index(0), BLOCK_M, BLOCK_D)
        s = warpgroup_mma(k_left, q.permute((1, 0)), no_s, use_acc=False)
    m, row = m_first, (b * H + g * group) * padded
    for step in range(steps):
        slot = step % SLOTS
        q = matrix(q_ring.index(slot), BLOCK_M, BLOCK_D)
        do = matrix(do_ring.index(slot), BLOCK_M, BLOCK_D)
        if not NARROW:
            wait_for(q_full, step, SLOTS, False)
            s_async = warpgroup_mma(k_left, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
        wait_for(do_full, step, SLOTS, False)
        dp_async = warpgroup_mma(v_left, do.permute((1, 0)), no_s, use_acc=False, is_async=True)
        if not NARROW:
            s = warpgroup_mma_wait(1, deps=[s_async])
        stats = stats_ring.index(slot)
        lse, delta = stats.slice(0, BLOCK_M), stats.slice(BLOCK_M, BLOCK_M)
        if n + BLOCK_N > (m + Tk - Tq + 1 if CAUSAL else Tk):
            i = (m + gl.arange(0, BLOCK_M, layout=columns))[None, :]
            s = gl.where(j <= i + Tk - Tq if CAUSAL else j < Tk, s, float("-inf"))
        p = gl.exp2(s * (scale * LOG2_E) - lse.load(columns)[None, :])
        dp = warpgroup_mma_wait(0, deps=[dp_async])
        p_left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, kv_layout, 2))
        dv_async = warpgroup_mma(p_left, do, dv, is_async=True)
        ds = p * (dp - delta.load(columns)[None, :])
        ds_tile.store(ds.to(dtype))
        fence_async_shared()
        block_barrier()
        dq_async = warpgroup_mma(ds_tile.permute((1, 0)), k, no_dq, use_acc=False, is_async=True)
        dk_async = warpgroup_mma(ds_tile, q, dk, is_async=True)
        if NARROW:  # the last step asks for its own scores again, in vain
            ahead = gl.minimum(step + 1, steps - 1)
            wait_for(q_full, ahead, SLOTS, False)
            q_ahead = matrix(q_ring.index(ahead % SLOTS), BLOCK_M, BLOCK_D)
            s_async = warpgroup_mma(k_left, q_ahead.permute((1, 0)), no_s, use_acc=False,
                                    is_async=True)
            dq, dv = warpgroup_mma_wait(2, deps=[dq_async, dv_async])
            mbarrier.arrive(do_empty.index(slot))
            add_registers(dq_sum, dq, row + m)
            dk, s = warpgroup_mma_wait(0, deps=[dk_async, s_async])
        else:
            dq, dv = warpgroup_mma_wait(1, deps=[dq_async, dv_async])
            mbarrier.arrive(do_empty.index(slot))
            wait_for(dq_empty, step, 1, True)
            dq_tile.store(dq)
            fence_async_shared()
            block_barrier()
            mbarrier.arrive(dq_full.index(0))
            dk = warpgroup_mma_wait(0, deps=[dk_async])
        block_barrier()  # nobody reads ds_tile any more
        mbarrier.arrive(q_empty.index(slot))
        m += BLOCK_M
        if m >= Tq:  # on to the next query head of the group
            m, row = m_first, row + padded
    v.store(dv.to(dtype))
    k.store((dk * scale).to(dtype))
    fence_async_shared()
    block_barrier()
    tma.async_copy_shared_to_global(dv_desc, [b, g, n, 0], v_tile)
    tma.async_copy_shared_to_global(dk_desc, [b, g, n, 0], k_tile)
    tma.store_wait(0)


@gluon_kernel
def hopper_backward_kernel(q_desc, k_desc, v_desc, do_desc, stats_desc, dq_sum, dk_desc, dv_desc,
                           scale, H, G, heads, Tq, Tk, padded, CAUSAL: gl.constexpr,
                           NARROW: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                           BLOCK_D: gl.constexpr, SLOTS: gl.constexpr, LOG2_E: gl.constexpr):
    """dk and dv of one tile of keys; its part of dq is added to dq_sum, in whatever order the tiles
    come: dq differs in its last bits from run to run.

    dq_sum: float32 (rows, BLOCK_D), a pointer with NARROW, else a descriptor
    """
    pid = gl.program_id(0)
    b, g, n = pid % heads // G, pid % heads % G, pid // heads * BLOCK_N  # tile 0 is the longest
    m_first = 0
    if CAUSAL:
        m_first = gl.maximum(n + Tq - Tk, 0) // BLOCK_M * BLOCK_M
    place = (b, g, n, m_first, gl.cdiv(Tq - m_first, BLOCK_M))
    sizes = (H, H // G, Tq, Tk, padded)
    dtype: gl.constexpr = q_desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ds_tile = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_M], flat)
    k_tile = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    dq_tile = ds_tile
    if not NARROW:
        dq_tile = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_D], dq_sum.layout)
    q_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    stats = gl.allocate_shared_memory(gl.float32, [SLOTS, 2 * BLOCK_M], stats_desc.layout)
    tiles, rings = (k_tile, v_tile, ds_tile, dq_tile), (q_ring, do_ring, stats)
    barriers = (make_barriers(1, 1), make_barriers(SLOTS, 1), make_barriers(SLOTS, 1),
                make_barriers(SLOTS, 1), make_barriers(SLOTS, 1), make_barriers(1, 1),
                make_barriers(1, 1))
    fence_async_shared()
    block_barrier()
    inputs = (q_desc, k_desc, v_desc, do_desc, stats_desc)
    outputs = (dk_desc, dv_desc, dq_sum, scale)
    if NARROW:
        gl.warp_specialize([
            (hopper_backward_consumer, (outputs, tiles, rings, barriers, place, sizes, CAUSAL,
                                        NARROW, SLOTS, BLOCK_M, BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_backward_producer, (inputs, tiles, rings, barriers, place, sizes, SLOTS,
                                        BLOCK_M, BLOCK_N, BLOCK_D)),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (hopper_backward_consumer, (outputs, tiles, rings, barriers, place, sizes, CAUSAL,
                                        NARROW, SLOTS, BLOCK_M, BLOCK_N, BLOCK_D, LOG2_E)),
            (hopper_backward_producer, (inputs, tiles, rings, barriers, place, sizes, SLOTS,
                                        BLOCK_M, BLOCK_N, BLOCK_D)),
            (hopper_backward_writer, (dq_sum, tiles, barriers, place, sizes, BLOCK_M)),
        ], [1, 1], [24, 24])


def arguments_of(function):
    return function.__code__.co_varnames[:function.__code__.co_argcount]


@functools.cache
def load_kernels():
    """Makes every function above a Triton kernel. Returns whether they are interpreted."""
    try:
        import triton
        import triton.language
    except ImportError:
        raise ValueError("triton must be installed for these kernels, got none; install it, or use "
                         "FlashAttentionPyTorch") from None
    for name, function in KERNELS.items():
        sizes = NOT_SPECIALIZED.intersection(arguments_of(function))
        globals()[name] = triton.jit(function, do_not_specialize=sorted(sizes))
    globals()["tl"] = triton.language
    interpreted, library = (not isinstance(f, triton.JITFunction)
                            for f in (forward_kernel, tl.cdiv))
    if interpreted != library:
        raise ValueError("TRITON_INTERPRET must be set before triton is imported, got it changed "
                         "after; set it in the shell")
    return interpreted


@functools.cache
def load_gluon_kernels():
    """Makes the kernels for Hopper. Returns whether this triton has what they are written in."""
    try:
        from triton.experimental import gluon
        from triton.experimental.gluon import language
        from triton.experimental.gluon.language import _core
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
        from triton.runtime import driver
        from triton._C.libtriton import ir

        @_core.builtin
        def tma_reduce_add(descriptor, at, tile, _semantic=None):  # triton has it from 3.8 on
            _semantic.builder.create_async_tma_reduce(
                ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle,
                _semantic._convert_to_ir_values(at, require_i64=False), tile.handle)

        ir.DESCRIPTOR_REDUCE_KIND.ADD  # missing names show here, not while compiling
        names = ("tma", "mbarrier", "fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait")
        globals().update({name: getattr(hopper, name) for name in names}, gl=language,
                         tma_reduce_add=tma_reduce_add, TensorDescriptor=TensorDescriptor,
                         triton_driver=driver)
        # the name until triton 3.6, and since
        globals()["block_barrier"] = getattr(language, "thread_barrier", None) or language.barrier
    except (ImportError, AttributeError) as missing:
        print("flash_attn: the portable kernels run, which are slower here: this triton's Gluon is "
              f"not what the others need ({missing})", file=sys.stderr, flush=True)
        return False
    for name, function in GLUON_KERNELS.items():
        sizes = ()
        if name == "hopper_forward_kernel":
            sizes = NOT_SPECIALIZED.intersection(arguments_of(function))
        elif name == "hopper_backward_kernel":  # with heads known, triton 3.7 needs no more
            sizes = {"Tq", "Tk"}                # registers than there are where G is 1
        globals()[name] = gluon.jit(function, do_not_specialize=sorted(sizes))
    return True


# -------------------------------------------------------------------------------------------------
# launches


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by kernel, card, bits of the dtype and padded D (that of
# 64 serves narrower heads). "any": fits the 99 KiB of shared memory that a block has on compute
# capability 8.6, 8.9 and 12.0 [5]. Where T is a multiple of the tile, those of 16 bits without
# documents spill no registers on 8.0 or 9.0, causal or not, with D 64 and 128.
CONFIGS = {
    ("forward", "hopper", 16): {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
    ("forward", "any", 16): {64: (128, 128, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("forward", "any", 32): {64: (64, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 32, 8, 1)},
    ("backward_dkdv", "hopper", 16): {64: (64, 128, 8, 2), 128: (64, 128, 8, 2),
                                      256: (32, 32, 8, 2)},
    ("backward_dkdv", "any", 16): {64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    ("backward_dkdv", "any", 32): {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("backward_dq", "hopper", 16): {64: (128, 128, 8, 2), 128: (128, 64, 8, 3),
                                    256: (64, 32, 8, 2)},
    ("backward_dq", "any", 16): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
    ("backward_dq", "any", 32): {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
}
INTERPRETED = (32, 32, 4, 1)  # small, so that short sequences have several tiles
DELTA_ROWS = 64


@functools.cache
def _config(kernel, capability, dtype, d):
    """Tile sizes and launch options of "forward", "backward_dkdv" or "backward_dq" for heads of
    width d.

    capability: (major, minor) of the card, None for the interpreter
    """
    padded = max(16, 1 << (d - 1).bit_length())  # the least that tl.dot takes
    values = INTERPRETED
    if capability is not None:
        bits = torch.finfo(dtype).bits
        card = "hopper" if capability[0] == 9 and bits == 16 else "any"
        values = CONFIGS[kernel, card, bits][max(64, padded)]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return {**dict(zip(names, values, strict=True)), "BLOCK_D": padded}


@functools.cache
def _card(device):
    """(compute capability, bytes of L2 cache) of a GPU; (None, ...) where interpreted."""
    if load_kernels():
        return None, 2**25
    if device.type != "cuda":
        raise ValueError("flash attention needs a CUDA GPU, or TRITON_INTERPRET=1 set before "
                         f"triton is imported, got {device}; move the tensors, or take "
                         "FlashAttentionPyTorch or another attention")
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8 or torch.version.hip:
        raise ValueError("flash attention needs an NVIDIA GPU of compute capability 8.0 or more, "
                         f"got {properties.name}; take another attention")
    return (properties.major, properties.minor), properties.L2_cache_size


def check_device(device):
    """raises ValueError unless the kernels run on this torch.device"""
    _card(device)


def on_device(x):
    """The context in which kernels start on the device of x: nothing to do, mostly."""
    index = x.device.index
    if index is None or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)


@functools.cache
def _say_once(kernel, dtype, d, causal, documents):
    print(f"flash_attn: compiling {kernel} for {str(dtype)[6:]}, D {d}, "
          f"{'causal' if causal else 'not causal'}{', documents' * documents}: some seconds",
          file=sys.stderr, flush=True)


def _say_why(kind, text, said=set()):  # noqa: B006, remembered on purpose
    """Prints the text the first time that there is one of this kind."""
    if kind not in said:
        said.add(kind)
        print(f"flash_attn: {text}", file=sys.stderr, flush=True)


def _launch(name, kernel, tensors, strided, shape, causal, scale, spans, allow_tf32):
    """Starts the kernel of a name in CONFIGS on the tiles of all heads.

    strided: those of `tensors` whose strides it takes, q first; shape: (B, H, G, Tq, Tk, D)
    """
    B, H, G, Tq, Tk, D = shape
    q, group = strided[0], H // G
    capability, cache_bytes = _card(q.device)
    config = _config(name, capability, q.dtype, D)
    if capability is not None:
        _say_once(name, q.dtype, D, causal, spans is not None)
    row_bytes = 2 * D * q.itemsize
    if name == "backward_dkdv":  # the programs of a key head all read q and do of its query heads
        tiles, heads = -(-Tk // config["BLOCK_N"]), B * G
        section = cache_bytes // 2 // (group * Tq * row_bytes)
    else:  # those of the query heads of a group all read its k and v
        tiles, heads = -(-Tq // config["BLOCK_M"]), B * H
        section = cache_bytes // 2 // (Tk * row_bytes) * group
    section = min(heads, max(1, section))
    strides = [x.stride() for x in strided]
    first, end = spans or (None, None)
    with on_device(q):
        kernel[(tiles * heads,)](
            *tensors, first, end, *strides, H, Tq, Tk, D, heads, section, scale, GROUP=group,
            CAUSAL=causal, SPANS=spans is not None, EVEN_M=Tq % config["BLOCK_M"] == 0,
            EVEN_N=Tk % config["BLOCK_N"] == 0, EVEN_D=D == config["BLOCK_D"],
            WIDE=max(128 * s[2] + MAX_D * s[3] for s in strides) >= 2**31,  # within a tile
            UPCAST=capability is None,  # the interpreter has no bfloat16 arithmetic
            PRECISION="tf32" if allow_tf32 else "ieee", **config)


# Measured on an H200 (see README). Three consumers of 64 queries are 5 to 10% faster than two where
# sequences are long and D is 64, 30% slower where they are short; at D 128 two fill the registers.
HOPPER_LONG = 4096
HOPPER_M, HOPPER_N = 64, 128  # queries of a warpgroup or step, keys of a tile
PORTABLE_ONLY = False  # set by `rival`: Hopper too runs the kernels for other cards


def _tma_rows(shape, strides):
    """Whether whole multiples of 16 bytes (of 16-bit numbers) lie between the rows of x."""
    *outer, last = strides
    return last == 1 and all(n == 1 or (s > 0 and s % 8 == 0)
                             for n, s in zip(shape[:-1], outer, strict=True))


def _hopper_takes(device, dtype, q_shape, k_shape, *strides):
    return (_card(device)[0] == (9, 0) and dtype.itemsize == 2
            and q_shape[-1] in range(8, 129, 8)  # outputs lie dense, in rows of 16 bytes too
            and all(map(_tma_rows, (q_shape, k_shape, k_shape), strides))
            and load_gluon_kernels())


def parameter_bytes(ptx):
    """Sizes of the parameters of the kernel in a text of PTX, in order."""
    entry = ptx[ptx.index(".entry"):]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bfu](\d+)[^,\n]*?(?:\[(\d+)\])?,?$",
                       entry[:entry.index(")")], re.M)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def typed(types, arguments):
    """(type, argument) of those that are not built into a compiled kernel, tuples taken apart."""
    for kind, x in zip(types, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from typed(kind, x)
        elif kind != "constexpr":
            yield kind, x


@functools.cache
def cuda_driver():
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class PreparedLaunch:
    """A compiled kernel with its arguments as the CUDA driver takes them: `prepared(tensors)` fills
    their addresses in, starts it, and returns 0 or the driver's error. source: [6]

    arguments: all of the first launch, the tensors (or their TensorDescriptors) first
    raises ValueError where the kernel does not take what is expected here
    """

    NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    MAP_BYTES, MAP_ALIGNED = 128, 64  # a CUtensorMap: what TMA knows of a tensor
    MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType

    def __init__(self, compiled, programs, arguments, device):
        self.compiled, metadata = compiled, compiled.metadata  # kept, as long as it may be started
        self.driver, self.lock, self.places = cuda_driver(), threading.Lock(), None
        self.values, self.pointers, self.maps = [], [], []  # of tensors by their number
        layouts = list(metadata.tensordesc_meta or ())
        for i, (kind, x) in enumerate(typed(compiled.src.signature.values(), arguments)):
            if kind.startswith("tensordesc"):
                tensor_map = self.encode(x, layouts.pop(0))
                self.maps.append((i, ctypes.c_void_p(ctypes.addressof(tensor_map))))
                self.values += [tensor_map, *map(ctypes.c_int32, x.shape),
                                *map(ctypes.c_int64, x.strides)]
            elif kind.startswith("*"):
                self.values.append(ctypes.c_void_p())
                self.pointers.append((i, self.values[-1]))
            else:
                self.values.append(self.NUMBERS[kind](x))
        self.values += [ctypes.c_void_p(), ctypes.c_void_p()]  # scratch memory, which none needs
        sizes = [ctypes.sizeof(value) for value in self.values]
        if (sizes != parameter_bytes(compiled.asm["ptx"]) or metadata.num_ctas > 1
                or metadata.global_scratch_size or metadata.profile_scratch_size
                or metadata.launch_pdl or metadata.launch_cooperative_grid):
            raise ValueError(f"{metadata.name} must be a kernel with parameters of {sizes} bytes")
        self.addresses = (ctypes.c_void_p * len(sizes))(*map(ctypes.addressof, self.values))
        self.settings = [ctypes.c_void_p(compiled.function), *map(ctypes.c_uint, (
            programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared))]
        self.stream = functools.partial(triton_driver.active.get_current_stream, device.index)

    def encode(self, descriptor, layout):
        sizes, x = ctypes.c_uint64 * len(descriptor.shape), descriptor.base
        space = ctypes.create_string_buffer(self.MAP_BYTES + self.MAP_ALIGNED)
        tensor_map = (ctypes.c_char * self.MAP_BYTES).from_buffer(
            space, -ctypes.addressof(space) % self.MAP_ALIGNED)
        block = (ctypes.c_uint32 * len(descriptor.shape))
        error = self.driver.cuTensorMapEncodeTiled(  # innermost dimension first
            tensor_map, self.MAP_TYPES[x.dtype], len(descriptor.shape),
            ctypes.c_void_p(x.data_ptr()), sizes(*reversed(descriptor.shape)),
            sizes(*(s * x.itemsize for s in reversed(descriptor.strides[:-1]))),
            block(*reversed(layout["block_size"])), block(*[1] * len(descriptor.shape)),
            0, layout["swizzle"], 2, 0)  # not interleaved; 128 bytes to L2; 0 outside
        if error:
            raise ValueError(f"CUDA must take {descriptor.shape} for TMA, got its error {error}")
        return tensor_map

    def __call__(self, tensors):
        places = [x.data_ptr() for x in tensors]
        with self.lock:  # threads of one process share what is written here
            if places != self.places:  # memory is used again and again: mostly they are the same
                self.places = None  # until all are written, whatever interrupts
                for i, pointer in self.pointers:
                    pointer.value = places[i]
                for i, tensor_map in self.maps:
                    place = ctypes.c_void_p(places[i])
                    error = self.driver.cuTensorMapReplaceAddress(tensor_map, place)
                    if error:
                        return error
                self.places = places
            return self.driver.cuLaunchKernel(*self.settings, ctypes.c_void_p(self.stream()),
                                              self.addresses, None)


class Launch:
    """A kernel for inputs of one shape: `launch(*tensors)` starts it. Triton does the first time,
    and compiles it; then the CUDA driver is asked directly, because triton looks at all arguments
    anew, for longer than a short kernel runs. (Hooks into triton's launches see the first alone.)

    blocks: for each tensor (shape, strides, block) for TMA, which copies such blocks and brings
    zeros from outside, or None for a pointer; numbers: the arguments after the tensors
    """

    def __init__(self, kernel, programs, blocks, numbers, constants, num_warps):
        self.kernel, self.programs, self.blocks, self.numbers = kernel, programs, blocks, numbers
        self.constants, self.num_warps, self.prepared = constants, num_warps, None

    @staticmethod
    def describe(x, shape, strides, block):
        # the stride of a dimension of 1 may be anything; TMA wants a multiple of 16 bytes
        *outer, last = [HOPPER_M if n == 1 else s for n, s in zip(shape, strides, strict=True)]
        swizzle, bits = (0, 32) if len(block) == 1 else (128, 32 if len(block) == 2 else 16)
        return TensorDescriptor(x, list(shape), [*outer, 1], list(block),
                                gl.NVMMASharedLayout(swizzle, bits, len(block)))

    def __call__(self, *tensors):
        if self.prepared and self.prepared(tensors) == 0:
            return
        arguments = [x if block is None else self.describe(x, *block)
                     for x, block in zip(tensors, self.blocks, strict=True)] + list(self.numbers)
        compiled = self.kernel[(self.programs,)](*arguments, **self.constants,
                                                 num_warps=self.num_warps)
        if self.prepared is None:
            self.prepared = prepare_launch(compiled, self.programs,
                                           [*arguments, *self.constants.values()],
                                           tensors[0].device)


def prepare_launch(*arguments):
    """A PreparedLaunch, or False where the driver or triton is another than is known here."""
    try:
        return PreparedLaunch(*arguments)
    except (ValueError, AttributeError, LookupError, TypeError, OSError) as problem:
        _say_why(type(problem), f"triton starts kernels, which takes longer ({problem!r})")
        return False


def _heads_block(shape, strides, rows, wide):
    return shape, strides, (1, 1, rows, wide)


def _strides_like(shape, strides):
    """Those of `torch.empty_like` of such a tensor."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


@functools.lru_cache(256)
def _plan_hopper_forward(device, dtype, q_shape, k_shape, q, k, v, causal, scale):
    """The launch for tensors of these shapes and strides; None where the portable kernels run."""
    if not _hopper_takes(device, dtype, q_shape, k_shape, q, k, v):
        return None
    (B, H, Tq, D), (_, G, Tk, _) = q_shape, k_shape
    wide, heads, o = 64 if D <= 64 else 128, B * H, _strides_like(q_shape, q)
    workers = 3 if wide == 64 and Tk >= HOPPER_LONG else 2
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = min(processors, -(-Tq // (HOPPER_M * workers)) * heads)
    _say_once("forward", dtype, D, causal, False)
    blocks = [_heads_block(q_shape, q, HOPPER_M, wide), _heads_block(k_shape, k, HOPPER_N, wide),
              _heads_block(k_shape, v, HOPPER_N, wide), _heads_block(q_shape, o, HOPPER_M, wide),
              None]
    return Launch(hopper_forward_kernel, programs, blocks,
                  (scale * LOG2_E, H, G, heads, Tq, Tk, programs),
                  dict(CAUSAL=causal, WORKERS=workers, ROWS=HOPPER_M, BLOCK_N=HOPPER_N,
                       BLOCK_D=wide, SLOTS=2, LOG2_E=LOG2_E), 4)


@functools.lru_cache(256)
def _plan_hopper_backward(device, dtype, q_shape, k_shape, q, k, v, o, do, causal, scale):
    """(rows, width) of the sum of dq and the three launches, for tensors of these shapes and
    strides; () where o or do must be copied before; None where the portable kernels run."""
    (B, H, Tq, D), (_, G, Tk, _) = q_shape, k_shape
    if Tq < HOPPER_M or not _hopper_takes(device, dtype, q_shape, k_shape, q, k, v):
        return None
    if not (_tma_rows(q_shape, o) and _tma_rows(q_shape, do)):
        return ()
    wide, narrow = (64, True) if D <= 64 else (128, False)
    tiles = -(-Tq // HOPPER_M)
    padded, rows = tiles * HOPPER_M, B * H * tiles * HOPPER_M
    _say_once("backward", dtype, D, causal, False)
    dq, dk, dv = map(_strides_like, (q_shape, k_shape, k_shape), (q, k, v))
    sizes = dict(BLOCK_M=HOPPER_M, BLOCK_D=wide)
    prepare = Launch(hopper_prepare_kernel, tiles * B * H, 5 * [None],
                     (o, do, H, Tq, padded, D), dict(sizes, LOG2_E=LOG2_E), 4)
    blocks = [_heads_block(q_shape, q, HOPPER_M, wide), _heads_block(k_shape, k, HOPPER_N, wide),
              _heads_block(k_shape, v, HOPPER_N, wide), _heads_block(q_shape, do, HOPPER_M, wide),
              ((2 * rows,), (1,), (2 * HOPPER_M,)),
              None if narrow else ((rows, wide), (wide, 1), (HOPPER_M, wide)),
              _heads_block(k_shape, dk, HOPPER_N, wide), _heads_block(k_shape, dv, HOPPER_N, wide)]
    backward = Launch(hopper_backward_kernel, -(-Tk // HOPPER_N) * B * G, blocks,
                      (scale, H, G, B * G, Tq, Tk, padded),
                      dict(CAUSAL=causal, NARROW=narrow, BLOCK_M=HOPPER_M, BLOCK_N=HOPPER_N,
                           BLOCK_D=wide, SLOTS=3 if narrow else 2, LOG2_E=LOG2_E), 8)
    finish = Launch(hopper_finish_kernel, tiles * B * H, 2 * [None],
                    (dq, H, Tq, padded, D, scale), dict(NARROW=narrow, **sizes), 4)
    return (rows, wide), prepare, backward, finish


def _forward(q, k, v, causal, scale, spans, allow_tf32):
    """(o, lse): o in shape, dtype and order of memory as q; lse (B, H, Tq) float32, natural log.

    spans: None, or the pair of `document_bounds`
    """
    (B, H, Tq, D), (_, G, Tk, _) = q.shape, k.shape
    _card(q.device)
    o, lse = torch.empty_like(q), q.new_empty((B, H, Tq), dtype=torch.float32)
    if q.numel() == 0 or Tk == 0:
        return o.zero_(), lse.fill_(-math.inf)
    if spans is None and not PORTABLE_ONLY:
        plan = _plan_hopper_forward(q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(),
                                    v.stride(), causal, scale)
        if plan and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0:
            with on_device(q):
                plan(q, k, v, o, lse)
            return o, lse
    _launch("forward", forward_kernel, (q, k, v, o, lse), (q, k, v, o), (B, H, G, Tq, Tk, D),
            causal, scale, spans, allow_tf32)
    return o, lse


def _hopper_backward(q, k, v, o, lse, do, causal, scale):
    """(dq, dk, dv), or None where the portable kernels run."""
    plan = _plan_hopper_backward(q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(),
                                 v.stride(), o.stride(), do.stride(), causal, scale)
    if plan is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return None
    if not plan or (o.data_ptr() | do.data_ptr() | lse.data_ptr()) % 16:
        # such as the expanded gradient of o.sum(), or a slice at an odd place: copied once
        o, do, lse = (x if x.data_ptr() % 16 == 0 and _tma_rows(x.shape, x.stride())
                      else x.clone(memory_format=torch.contiguous_format) for x in (o, do, lse))
        return _hopper_backward(q, k, v, o, lse, do, causal, scale)
    shape, prepare, backward, finish = plan
    with on_device(q):  # memory is asked for when it is needed: the GPU waits for the launches
        stats, dq_sum = lse.new_empty(2 * shape[0]), lse.new_empty(shape)
        prepare(o, do, lse, stats, dq_sum)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        backward(q, k, v, do, stats, dq_sum, dk, dv)
        dq = torch.empty_like(q)
        finish(dq_sum, dq)
    return dq, dk, dv


def _backward(q, k, v, o, lse, do, causal, scale, spans, allow_tf32, deterministic):
    """(dq, dk, dv), each in shape, dtype and order of memory as q, k, v. Only the Hopper kernel
    adds to what other programs wrote, in whatever order: all else is deterministic anyway."""
    if not (deterministic or spans or PORTABLE_ONLY or q.numel() == 0 or k.numel() == 0):
        grads = _hopper_backward(q, k, v, o, lse, do, causal, scale)
        if grads:
            return grads
    (B, H, Tq, D), (_, G, Tk, _) = q.shape, k.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0 or Tk == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    with on_device(q):
        delta_kernel[(-(-Tq // DELTA_ROWS) * B * H,)](
            o, do, delta, o.stride(), do.stride(), H, Tq, D, BLOCK_M=DELTA_ROWS,
            BLOCK_D=1 << (D - 1).bit_length(), num_warps=4)
    rest = (B, H, G, Tq, Tk, D), causal, scale, spans, allow_tf32
    _launch("backward_dkdv", dkdv_kernel, (q, k, v, do, lse, delta, dk, dv),
            (q, k, v, do, dk, dv), *rest)
    _launch("backward_dq", dq_kernel, (q, k, v, do, lse, delta, dq), (q, k, v, do, dq), *rest)
    return dq, dk, dv


# Keys of a tile of `decode_kernel` by bits of the dtype. A program a head pair would leave most of
# a card idle where there are few: the keys are then split until each multiprocessor has
# DECODE_WAVES.
DECODE_KEYS, DECODE_WAVES = {16: 64, 32: 32}, 2


@functools.cache
def _multiprocessors(device):
    return 8 if load_kernels() else torch.cuda.get_device_properties(device).multi_processor_count


def _decode(q, k, v, lengths, scale):
    (B, H, _, D), (_, G, S, _) = q.shape, k.shape
    capability, _ = _card(q.device)
    block_n = DECODE_KEYS[torch.finfo(q.dtype).bits] if capability else INTERPRETED[1]
    wanted = -(-DECODE_WAVES * _multiprocessors(q.device) // (B * G))
    chunk = -(-S // min(wanted, -(-S // block_n)) // block_n) * block_n
    splits = -(-S // chunk)
    o = q.new_empty(B, H, splits, D, dtype=q.dtype if splits == 1 else torch.float32)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    if capability is not None:
        _say_once("decode", q.dtype, D, False, False)
    padded = max(16, 1 << (D - 1).bit_length())
    with on_device(q):
        decode_kernel[(B * G * splits,)](
            q, k, v, o, lse, lengths, q.stride(), k.stride(), v.stride(), G, D, chunk, splits,
            scale, GROUP=H // G, ROWS=max(16, 1 << (H // G - 1).bit_length()), EVEN_D=padded == D,
            UPCAST=capability is None, BLOCK_N=block_n, BLOCK_D=padded, num_warps=4, num_stages=2)
    if splits > 1:
        o = (o * lse.softmax(-1)[..., None]).sum(2, keepdim=True).to(q.dtype)
    return o


# -------------------------------------------------------------------------------------------------
# what users call


def check_shapes(q, k, v, causal):
    """ValueError unless q (B, H, Tq, D), k and v (B, G, Tk, D) belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4:
            raise ValueError(f"{name} must be 4-D (B, H, T, D), got shape {tuple(x.shape)}; "
                             "add or flatten dimensions")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and "
                         f"{v.device}; move them")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; "
                         "cast them")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and "
                         f"{tuple(v.shape)}; change one of them")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same B and D, got shapes {tuple(q.shape)} and "
                         f"{tuple(k.shape)}; change one of them")
    if q.shape[3] == 0:
        raise ValueError(f"D must be at least 1, got shape {tuple(q.shape)}; give q, k and v width")
    H, G = q.shape[1], k.shape[1]
    if G == 0 or H % G:
        raise ValueError(f"heads of q must be a multiple of those of k and v, got {H} and {G}; "
                         "change one of them")
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"causal attention needs at least as many keys as queries, got Tq "
                         f"{q.shape[2]} and Tk {k.shape[2]}; the last query sees all keys")


class Kind(typing.NamedTuple):
    """All of a tensor that the checks look at, so that the next one like it need not be checked."""
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@functools.lru_cache(1024)
def check_kinds(q, k, v, causal, scale):
    """The scale, as a float; ValueError unless `flash_attention` takes tensors of these kinds."""
    check_shapes(q, k, v, causal)
    D = q.shape[3]
    if q.dtype not in DTYPES.values():
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {str(q.dtype)[6:]}; cast q, k, v")
    if D > MAX_D:
        raise ValueError(f"D must be at most {MAX_D}, got {D}; split the heads")
    if not (scale is None or 1e-30 < scale < 1e30):
        raise ValueError(f"scale must be a number between 1e-30 and 1e30, got {scale}; change it")
    return float(D**-0.5 if scale is None else scale)


def check_inputs(q, k, v, causal, scale, cu_seqlens=None):
    """The scale, as a float; ValueError unless `flash_attention` can take these."""
    compiling = torch.compiler.is_compiling()
    check = check_kinds.__wrapped__ if compiling else check_kinds
    if isinstance(scale, torch.Tensor):  # it would get no gradient
        raise ValueError("scale must be a number, got a tensor; multiply q by it")
    if not (scale is None or compiling or isinstance(scale, numbers.Real)):
        raise ValueError(f"scale must be a number or None, got {scale!r}; convert it")
    scale = check(*(Kind(x.shape, x.dtype, x.device) for x in (q, k, v)), bool(causal), scale)
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, torch.Tensor):
            raise ValueError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}; "
                             "torch.tensor(..., dtype=torch.int32, device=q.device)")
        B, Tq, Tk = q.shape[0], q.shape[2], k.shape[2]
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError("cu_seqlens must be int32 (N + 1,), got "
                             f"{str(cu_seqlens.dtype)[6:]} {tuple(cu_seqlens.shape)}; convert it")
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens must be on the device of q, got {cu_seqlens.device} and "
                             f"{q.device}; move it")
        if B != 1 or Tq != Tk:
            raise ValueError(f"B must be 1 and Tq equal Tk with cu_seqlens, got B {B}, Tq {Tq} and "
                             f"Tk {Tk}; pack the documents into one sequence")
    return scale


def as_heads(x):
    """(..., T, D) as (B, H, T, D)."""
    if x.dim() == 4 or x.dim() < 2:
        return x
    if x.dim() == 2:
        return x[None, None]
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)


def in_shape(x, shape):
    return x if x.shape == shape else x.view(shape)  # a view that changes nothing costs 2 us


class FlashAttentionTriton(torch.autograd.Function):
    """`apply(q, k, v, is_causal=False)`: q (..., Tq, D), k and v (..., Tk, D) to (..., Tq, D).
    Saves one tensor of shape (..., Tq) for the backward pass: lse. source: [2] flash_forward

    checked: (scale, spans, allow_tf32, deterministic) of `flash_attention`, which has checked the
      inputs; spans is None or the pair of `document_bounds`
    """

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, checked=None):
        if checked is None:
            q, k, v = (x.resolve_neg() for x in autocast_inputs(q, k, v))
            if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
                raise ValueError("q, k and v must have the same dimensions before the heads, got "
                                 f"shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
                                 "change them")
        heads = as_heads(q), as_heads(k), as_heads(v)
        if checked is None:
            scale = check_inputs(*heads, is_causal, None)
            checked = scale, None, False, torch.are_deterministic_algorithms_enabled()
        scale, spans, allow_tf32, deterministic = checked
        if torch.compiler.is_compiling():
            o, lse = _forward_op(*heads, *(spans or (None, None)), bool(is_causal), scale,
                                 allow_tf32, deterministic)
        else:
            o, lse = _forward(*heads, is_causal, scale, spans, allow_tf32)
        o, lse = in_shape(o, q.shape), in_shape(lse, q.shape[:-1])
        ctx.save_for_backward(q, k, v, o, lse, *(spans or ()))
        ctx.settings = is_causal, scale, allow_tf32, deterministic
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, *spans = ctx.saved_tensors
        causal, scale, allow_tf32, deterministic = ctx.settings
        heads = [as_heads(x) for x in (q, k, v, o)]
        lse = in_shape(lse, heads[0].shape[:-1])
        do = as_heads(do.resolve_neg())
        # with create_graph, the operator says no to a second derivative
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            grads = _backward_op(*heads, lse, do, *(spans or (None, None)), causal, scale,
                                 allow_tf32, deterministic)
        else:
            grads = _backward(*heads, lse, do, causal, scale, spans or None, allow_tf32,
                              deterministic)
        grads = [in_shape(g, x.shape) for g, x in zip(grads, (q, k, v), strict=True)]
        return *grads, None, None


# The same two functions as operators that torch.compile does not look into. Eager calls go through
# FlashAttentionTriton, which costs less time on the host.


@torch.library.custom_op("lmzero::flash_attention_forward", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? end, bool causal, float scale, "
    "bool allow_tf32, bool deterministic) -> (Tensor, Tensor)"))
def _forward_op(q, k, v, first, end, causal, scale, allow_tf32, deterministic):
    return _forward(q, k, v, causal, scale, None if first is None else (first, end), allow_tf32)


@_forward_op.register_fake
def _(q, k, v, first, end, causal, scale, allow_tf32, deterministic):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("lmzero::flash_attention_backward", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? first, Tensor? end, "
    "bool causal, float scale, bool allow_tf32, bool deterministic) -> (Tensor, Tensor, Tensor)"))
def _backward_op(q, k, v, o, lse, do, first, end, causal, scale, allow_tf32, deterministic):
    spans = None if first is None else (first, end)
    return _backward(q, k, v, o, lse, do, causal, scale, spans, allow_tf32, deterministic)


@_backward_op.register_fake
def _(q, k, v, o, lse, do, first, end, causal, scale, allow_tf32, deterministic):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, first, end, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, first, end)


def _differentiate(ctx, do, d_lse):
    q, k, v, o, lse, first, end = ctx.saved_tensors
    return *_backward_op(q, k, v, o, lse, do, first, end, *ctx.settings), *6 * (None,)


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


def flash_attention(q, k, v, causal=True, scale=None, cu_seqlens=None, deterministic=None,
                    allow_tf32=False):
    """softmax(scale q k^T) v with memory linear in T: (B, H, Tq, D) in the dtype of q.

    q: (B, H, Tq, D); k, v: (B, G, Tk, D), H a multiple of G: query head h uses key head h // (H/G).
      Any strides, nothing of these is copied (a gradient of o may be, once). D up to 256;
      float32, float16 or bfloat16
    causal: query i sees keys up to i + Tk - Tq, so the last query sees all
    scale: of the scores, default D ** -0.5
    cu_seqlens: (N + 1,) int32, increasing: N documents packed into one sequence (B 1, Tq = Tk), the
      i-th is tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1 and sees only itself. Tokens outside all
      of them see nothing and give 0.
    deterministic: gradients equal bit for bit from run to run. None: as
      torch.use_deterministic_algorithms says
    allow_tf32: float32 inputs may be rounded to TF32 in products
    raises ValueError for inputs that do not fit together, and without a GPU
    """
    causal = bool(causal)
    q, k, v = autocast_inputs(q, k, v)
    q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    scale = check_inputs(q, k, v, causal, scale, cu_seqlens)
    spans = None if cu_seqlens is None else document_bounds(cu_seqlens, q.shape[2])
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():
        return torch.ops.lmzero.flash_attention_forward(
            q, k, v, *(spans or (None, None)), causal, scale, allow_tf32, deterministic)[0]
    return FlashAttentionTriton.apply(q, k, v, causal, (scale, spans, allow_tf32, deterministic))


def flash_decode(q, k, v, lengths, scale=None):
    """Attention of one new query a row over a cache, for generation: (B, H, 1, D). No gradients.

    q: (B, H, 1, D); k, v: (B, G, S, D), as `flash_attention` takes them
    lengths: (B,) int on the same device, how many of its S keys each row sees, 1 to S. Never read
      by the host, so that a CUDA graph can hold the call.
    """
    scale = check_inputs(q, k, v, False, scale)
    if q.shape[2] != 1 or lengths.shape != q.shape[:1] or lengths.device != q.device:
        raise ValueError("flash_decode takes one query and one length a row on one device, got q "
                         f"{tuple(q.shape)}, lengths {tuple(lengths.shape)} on {lengths.device}; "
                         "use flash_attention for more queries")
    return _decode(q.detach(), k.detach(), v.detach(), lengths, scale)


# -------------------------------------------------------------------------------------------------
# the command line: bench


def count_flops(shape, causal):
    """{part: FLOPs} of attention (B, H, T, D): two products forward, five backward; half if causal.
    "replayed" is "both" again from a CUDA graph, which takes the host no time."""
    B, H, T, D = shape
    forward = 4 * B * H * T * T * D / (2 if causal else 1)
    return dict(zip(PARTS, (forward, 2.5 * forward, 3.5 * forward, 3.5 * forward), strict=True))


def format_shape(shape):
    return "x".join(map(str, shape))


def name_row(name, shape, dtype):
    return {"shape": format_shape(shape), "dtype": str(dtype)[6:], "rival": name}


def make_inputs(shape, dtype, device):
    """q, k, v, do of unit variance, the same for every call."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(shape, generator=generator, device=device).to(dtype)
                   for _ in range(4))
    return *(x.requires_grad_() for x in (q, k, v)), do


def plain_attention(q, k, v, causal):
    """What one writes first, all in the dtype of the inputs: q, k, v (..., T, D) to (..., T, D)."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        t = torch.arange(q.shape[-2], device=q.device)
        scores = scores.masked_fill(t > t[:, None], -math.inf)
    return scores.softmax(-1) @ v


@functools.lru_cache(maxsize=1)
def compile_flex(T, causal):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch.compiler.reset()  # it keeps a limited number of shapes
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T) if causal else None
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


@contextlib.contextmanager
def rival(name, T, causal):
    """The attention of q, k, v with this name: one of RIVALS, or "compiled", which is plain under
    torch.compile. Forward and backward are to run in this context."""
    global PORTABLE_ONLY
    before = PORTABLE_ONLY
    if name == "plain":
        yield functools.partial(plain_attention, causal=causal)
    elif name == "compiled":
        torch.compiler.reset()
        yield torch.compile(functools.partial(plain_attention, causal=causal), dynamic=False)
    elif name == "flex":
        yield compile_flex(T, causal)
    elif name in ("flash2", "cudnn"):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        sdpa = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if name == "flash2" else
                         SDPBackend.CUDNN_ATTENTION):
            yield functools.partial(sdpa, is_causal=causal)
    else:
        PORTABLE_ONLY = name == "portable"
        try:
            yield functools.partial(flash_attention, causal=causal,
                                    deterministic=name == "deterministic")
        finally:
            PORTABLE_ONLY = before


def relative_error(x, reference, do):
    """norm(x - reference) / norm(reference); over norm(do) where the reference is 0 but for
    rounding, as the gradient of a query that sees one key."""
    size, largest = torch.linalg.norm(reference), torch.linalg.norm(do)
    error = torch.linalg.norm(x.double() - reference.double())
    return (error / torch.where(size > 1e-5 * largest, size, largest)).item()


def check(name, shape, dtype, causal, device):
    """{"o", "dq", "dk", "dv": norm(x - ref) / norm(ref)} of one of OURS with random inputs against
    float32 tiles in PyTorch; ValueError where one is above ERROR_BOUND."""
    with rival(name, shape[2], causal) as attend:
        for _ in range(2):  # see Launch: only from the second time on it is what will be timed
            q, k, v, do = make_inputs(shape, dtype, device)
            o = attend(q, k, v)
            got = o, *torch.autograd.grad(o, (q, k, v), do)
    q, k, v, do = (x.detach().float() for x in (q, k, v, do))
    settings = causal, shape[3] ** -0.5, REFERENCE_TILE, REFERENCE_TILE
    o, lse = tiled_forward(q, k, v, *settings)
    expected = o, *tiled_backward(q, k, v, o, lse, do, *settings)
    errors = {part: relative_error(x, reference, do) for part, x, reference
              in zip(("o", "dq", "dk", "dv"), got, expected, strict=True)}
    if not all(error <= ERROR_BOUND[dtype] for error in errors.values()):  # nan is an error too
        raise ValueError(f"errors of {name} at {format_shape(shape)} {str(dtype)[6:]} must be "
                         f"within {ERROR_BOUND[dtype]} of float32, got {errors}; this is a bug")
    return errors


def check_all(names, shapes, dtype, causal, device):
    """One row for each shape and each name of OURS, printed as they come."""
    rows = []
    for shape in shapes:
        for name in names:
            try:
                errors = check(name, shape, dtype, causal, device)
                shown = " ".join(f"{part} {error:.1e}" for part, error in errors.items())
            except torch.OutOfMemoryError:
                errors, shown = {"error": NO_MEMORY}, NO_MEMORY
            rows.append({**name_row(name, shape, dtype), **errors})
            print(f"{format_shape(shape):<16}{name:<15}error against float32: {shown}", flush=True)
    return rows


def time_ms(work, samples, replay=False):
    """[median, 0.2 quantile, 0.8 quantile] of `samples` runs of work or more, in ms: each with an
    empty L2 cache, or `replay`, from a CUDA graph."""
    from triton.testing import do_bench, do_bench_cudagraph
    run, run_ms = (do_bench_cudagraph, 20) if replay else (do_bench, 100)
    times = []
    while len(times) < samples:  # one alone may take longer than run_ms
        times += run(work, rep=run_ms, return_mode="all")
        run_ms = (samples - len(times) + 1) * max(times)
    return torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def measure(name, shape, dtype, causal, device, samples):
    """{part: `time_ms`} of a rival; "kept_mib" of the output and what its backward pass needs;
    "peak_mib" of what both take at once, results included and inputs not; and "error": why the
    rest did not run, if so."""
    torch.cuda.empty_cache()
    used = torch.cuda.memory_allocated
    row = {}
    try:
        q, k, v, do = make_inputs(shape, dtype, device)
        with rival(name, shape[2], causal) as attend:
            row["forward"] = time_ms(lambda: attend(q, k, v), samples)
            before = used()  # the inputs, and what a rival or a library keeps for good
            o = attend(q, k, v)
            row["kept_mib"] = (used() - before) / 2**20
            row["backward"] = time_ms(functools.partial(torch.autograd.grad, o, (q, k, v), do,
                                                        retain_graph=True), samples)
            del o

            def both():
                return torch.autograd.grad(attend(q, k, v), (q, k, v), do)

            row["both"] = time_ms(both, samples)
            torch.cuda.reset_peak_memory_stats()  # not what timing itself takes
            both()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if row["both"][0] < REPLAYED_BELOW_MS:
                with contextlib.suppress(RuntimeError):  # not all that runs can be captured
                    row["replayed"] = time_ms(both, SAMPLES, replay=True)
    except torch.OutOfMemoryError:
        row["error"] = NO_MEMORY
    except (RuntimeError, ImportError) as error:  # a rival that this card or version does not have
        if name in OURS:
            raise
        row["error"] = (str(error).strip() or repr(error)).splitlines()[0][:30]
    return row


def summarise(rows):
    """One row of several by `measure`: the median of medians, the extremes of the quantiles."""
    summary = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        if key == "error":
            summary[key] = values[0]
        elif key.endswith("mib"):
            summary[key] = round(max(values), 3)
        else:
            median, low, high = zip(*values, strict=True)
            values = statistics.median(median), min(low), max(high)
            summary[key] = dict(zip(("ms", "low_ms", "high_ms"), (round(x, 4) for x in values)))
    return summary


def format_time(t, flops):
    return f"{t['ms']:.3f} ({t['low_ms']:.3f} to {t['high_ms']:.3f}) {flops / t['ms'] / 1e9:.0f}"


def time_all(names, shapes, dtype, causal, device, repeats, samples):
    """One row for each shape and rival, printed with TFLOP/s: all rivals of a shape in turns,
    `repeats` times, each time another one first."""
    results, widths = [], (16, 14, 36, 36, 36, 32, 12, 12)

    def show(*cells):
        print("".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)),
              flush=True)

    mask = "causal" if causal else "not causal"
    print(f"\n{str(dtype)[6:]}, {mask}: ms (0.2 to 0.8 quantile), TFLOP/s, MiB beyond the inputs")
    show("BxHxTxD", "", *PARTS, "kept MiB", "peak MiB")
    for shape in shapes:
        flops, rows = count_flops(shape, causal), {name: [] for name in names}
        for turn in range(repeats):
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                if not any("error" in row for row in rows[name]):
                    rows[name].append(measure(name, shape, dtype, causal, device, samples))
        for name in names:
            row = summarise(rows[name])
            results.append({**name_row(name, shape, dtype), **row})
            cells = [format_time(row[part], flops[part]) if part in row else row.get("error", "")
                     for part in PARTS]
            cells += (f"{row[key]:,.2f}" if key in row else "" for key in ("kept_mib", "peak_mib"))
            show(format_shape(shape), name, *cells)
    return results


def refuse_unused(args):
    """ValueError for a flag that the chosen table would ignore."""
    table = next((name for name in ("check_only", "sweep", "pytorch_attention")
                  if getattr(args, name)), None)
    for flag in ("shapes", "rivals", "repeats"):
        useful = table is None or (table, flag) == ("check_only", "shapes")
        if getattr(args, flag) is not None and not useful:
            raise ValueError(f"--{flag} must come without --{table}, which has no use for it, got "
                             "both; drop one")
    if args.calling_thread and args.check_only:
        raise ValueError("--calling_thread must come without --check_only, which times nothing, "
                         "got both; drop one")
    if args.compile and not args.pytorch_attention:
        raise ValueError("--compile must come with --pytorch_attention, got it without; add that")


def find_device(check_only):
    """(type of device, its name); ValueError where bench cannot run."""
    interpreted = load_kernels()
    if torch.cuda.is_available() and not interpreted:
        return "cuda", torch.cuda.get_device_name()
    if not (check_only and interpreted):
        found = "TRITON_INTERPRET" if interpreted else "none"
        raise ValueError(f"bench must have a CUDA GPU, got {found}; TRITON_INTERPRET=1 and "
                         "--check_only check small shapes on a CPU, where times say nothing")
    return "cpu", "CPU, interpreted"


def bench(args):
    """Prints the conditions, the errors of ours, times, and all of these in one JSON line."""
    refuse_unused(args)
    device, card = find_device(args.check_only)
    causal, dtypes, repeats, samples = not args.not_causal, ["bfloat16"], 1, SAMPLES
    if args.sweep:  # [2] flash_benchmarking
        names, dtypes = ["ours", "plain"], ["bfloat16", "float32"]
        shapes = [(1, 1, T, D) for D in SWEEP_D for T in SWEEP_T]
    elif args.pytorch_attention:  # [2]
        names, samples = ["compiled" if args.compile else "plain"], PLAIN_SAMPLES
        shapes = [(8, 1, T, D) for D in SWEEP_D for T in PLAIN_T]
    else:
        names, repeats = args.rivals or list(RIVALS), args.repeats or 3
        shapes = args.shapes or parse_shapes(GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    dtypes = [args.dtype] if args.dtype else dtypes
    import triton
    conditions = {"device": card, "torch": torch.__version__, "triton": triton.__version__,
                  "dtype": " and ".join(dtypes), "causal": causal,
                  "backward_thread": "calling" if args.calling_thread else "autograd's",
                  "repeats": repeats, "samples": samples}
    print(" | ".join(f"{name} {value}" for name, value in conditions.items()), flush=True)
    errors, times = [], []
    for dtype in map(DTYPES.get, dtypes):
        ours = [name for name in names if name in OURS]
        errors += check_all(ours, shapes, dtype, causal, device)
        if not args.check_only:
            with torch.autograd.set_multithreading_enabled(not args.calling_thread):
                times += time_all(names, shapes, dtype, causal, device, repeats, samples)
    print(json.dumps({**conditions, "errors": errors, "times": times}))


def positive(text):
    """An argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}; "
                                         "for example 3")
    return int(text)


def parse_shapes(text):
    """An argparse type: "1x2x64x32,8x1x128x64" gives two (B, H, T, D)."""
    with contextlib.suppress(ValueError, TypeError):
        shapes = [tuple(map(int, re.fullmatch(r"[0-9x]+", shape)[0].split("x")))
                  for shape in text.split(",")]
        if all(len(s) == 4 and min(s) >= 1 and s[3] <= MAX_D for s in shapes):
            return shapes
    raise argparse.ArgumentTypeError(f"each must be BxHxTxD, four numbers from 1 on and D at most "
                                     f"{MAX_D}, got {text!r}; for example 1x16x16384x64")


def parse_rivals(text):
    """An argparse type: names of RIVALS, each once."""
    names = text.split(",")
    if not set(names) <= set(RIVALS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be of {','.join(RIVALS)}, each once, got {text!r}; "
                                         "choose among these")
    return names


def build_parser():
    parser = argparse.ArgumentParser(prog="flash_attn.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("bench", help="time and errors, beside PyTorch's kernels")
    add = p.add_argument
    add("--shapes", type=parse_shapes, metavar="BxHxTxD,...",
        help=f"default {GPU_SHAPES} (on a CPU {CPU_SHAPES})")
    add("--dtype", choices=DTYPES, help="default bfloat16, with --sweep float32 too")
    add("--not_causal", action="store_true", help="every query sees every key")
    add("--rivals", type=parse_rivals, help=f"default {','.join(RIVALS)}")
    add("--repeats", type=positive, help="turns of all rivals (default 3)")
    add("--calling_thread", action="store_true",
        help="run all backward passes in the thread that asks for them, not in autograd's own")
    add("--compile", action="store_true", help="with --pytorch_attention: compiled")
    table = p.add_mutually_exclusive_group()
    add = table.add_argument
    add("--check_only", action="store_true", help="errors, no times")
    add("--sweep", action="store_true",
        help="instead: T 128 to 65,536 and D 16 to 128, beside plain attention")
    add("--pytorch_attention", action="store_true",
        help="instead: plain attention alone, batch 8, no heads")
    p.set_defaults(run=bench)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        line = (str(error) or repr(error)).splitlines()[0]
        parser.exit(2, f"flash_attn.py {args.verb}: error: {line}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"flash_attn.py {args.verb}: interrupted\n")


if __name__ == "__main__":
    main()
