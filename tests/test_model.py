"""Tests of model.py: worked examples, independent oracles (torch.nn.functional, torch.optim, float64
recomputation, transformers and safetensors where installed) and properties. All run on a CPU; those
that need a GPU skip.

Tolerances: F32 holds where both sides do the same sums of some 100 float32 terms in another order
(2^-24 a rounding, times sqrt(100), times a few steps); CONTRACT_* stand in the issue's text.
"""

import contextlib
import functools
import copy
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import time
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as M

ROOT = pathlib.Path(__file__).resolve().parent.parent
F32 = dict(rtol=1e-5, atol=1e-5)
CONTRACT_LOSS = dict(rtol=1e-5, atol=1e-5)  # linear_cross_entropy against the plain one
CONTRACT_ADAMW = dict(rtol=1e-6, atol=1e-6)
CONTRACT_LOGITS = dict(rtol=0, atol=1e-4)  # against transformers
BF16_EPS = 2**-8  # spacing of bfloat16 at 1: 8 significant bits

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("same_random_numbers_in_every_order_of_tests", "one_thread")


def tiny(**changes):
    shape = dict(vocab_size=61, context_length=32, d_model=32, num_layers=2, num_heads=4, d_ff=48)
    return M.ModelConfig(**{**shape, **changes})


def randomised(model):
    """The model with gains and biases that are not the identity, so that forgetting one shows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(*shape, vocab=61):
    return torch.randint(vocab, shape)


def double(tensor):
    """A float64 copy that is a leaf and wants a gradient."""
    return tensor.detach().double().requires_grad_()


def leaf(*shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


# -------------------------------------------------------------------------------------------------
# importing


def test_importing_model_imports_no_optional_module_and_starts_nothing():
    code = (
        "import sys, model, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "names = ('triton', 'bpe', 'flash_attn', 'transformers', 'safetensors', 'requests', 'matplotlib')\n"
        "print([n for n in names if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


# -------------------------------------------------------------------------------------------------
# layers, one by one


def test_linear_is_x_times_weight_transposed_plus_bias_for_any_leading_dims():
    for bias, lead in itertools.product((False, True), ((), (5,), (2, 3), (2, 1, 3))):
        layer = randomised(M.Linear(7, 4, bias=bias))
        x = torch.randn(*lead, 7)
        assert layer.weight.shape == (4, 7)
        close(layer(x), F.linear(x, layer.weight, layer.bias), **F32)


def truncated_std(sigma):
    """Standard deviation of N(0, sigma^2) cut at 3 sigma: variance 1 - 2 * 3 phi(3) / (2 Phi(3) - 1)."""
    phi = math.exp(-4.5) / math.sqrt(2 * math.pi)
    return sigma * math.sqrt(1 - 6 * phi / math.erf(3 / math.sqrt(2)))


def assert_truncated_normal(weight, sigma):
    n = weight.numel()
    # the sample's std has relative error 1/sqrt(2n), its mean sigma/sqrt(n): five of each
    assert weight.std().item() == pytest.approx(truncated_std(sigma), rel=5 / math.sqrt(2 * n))
    assert abs(weight.mean().item()) < 5 * sigma / math.sqrt(n)
    assert weight.abs().max() <= 3 * sigma * (1 + 1e-6)
    if n > 50_000:  # P(|x| > 2.9 sigma) is 1e-3 after the cut, so the cut is at 3 and no lower
        assert weight.abs().max() > 2.9 * sigma


def test_linear_starts_normal_with_variance_2_over_in_plus_out_cut_at_three_sigma():
    assert_truncated_normal(M.Linear(400, 600).weight, math.sqrt(2 / 1000))
    assert M.Linear(4, 3, bias=True).bias.tolist() == [0, 0, 0]


def test_embedding_starts_standard_normal_cut_at_three():
    assert_truncated_normal(M.Embedding(1000, 200).weight, 1.0)


def test_every_weight_of_a_whole_model_starts_as_its_layer_says():
    config = tiny(vocab_size=500, d_model=64, num_kv_heads=2, d_ff=160, qkv_bias=True, qk_norm=True)
    for name, p in M.TransformerLM(config).named_parameters():
        if name == "token_embeddings.weight":
            assert_truncated_normal(p, 1.0)
        elif p.dim() == 2:
            assert_truncated_normal(p, math.sqrt(2 / sum(p.shape)))
        else:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name


def test_embedding_looks_up_rows_and_sends_gradients_to_them():
    layer = M.Embedding(10, 3)
    ids = torch.tensor([[1, 9, 1], [0, 1, 2]])
    assert torch.equal(layer(ids), F.embedding(ids, layer.weight))
    layer(ids).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [1, 3, 1, 0, 0, 0, 0, 0, 0, 1]
    for shape in ((), (0,), (2, 0)):  # one id, none
        assert layer(torch.ones(shape, dtype=torch.long)).shape == (*shape, 3)


def test_rmsnorm_worked_example_and_equal_to_torch_with_gradients():
    worked = M.RMSNorm(2, eps=0.0)(torch.tensor([3.0, 4.0]))  # rms of (3, 4) is sqrt(12.5)
    close(worked, torch.tensor([3.0, 4.0]) / math.sqrt(12.5), **F32)
    layer = randomised(M.RMSNorm(16, eps=1e-3))
    ours = leaf(2, 5, 16)
    theirs, gain = double(ours), double(layer.weight)
    expected = F.rms_norm(theirs, (16,), gain, 1e-3)
    weights = torch.randn(2, 5, 16)
    y = layer(ours)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    close(y, expected.float(), **F32)
    close(ours.grad, theirs.grad.float(), **F32)
    close(layer.weight.grad, gain.grad.float(), **F32)


def test_rmsnorm_computes_in_float32_and_returns_the_dtype_of_its_input():
    layer = randomised(M.RMSNorm(64))
    x = (300 * torch.randn(8, 64)).to(torch.bfloat16)
    assert torch.equal(layer(x), layer(x.float()).bfloat16())  # one rounding, at the very end
    big = torch.full((1, 64), 1000.0, dtype=torch.float16)  # its square overflows float16
    close(layer(big).float(), layer.weight.detach()[None], rtol=2**-10, atol=0)  # float16: 11 bits
    assert layer(big).dtype == torch.float16


def test_silu_equals_torch_and_survives_extremes():
    x = torch.tensor([-1e4, -88.0, -1.0, 0.0, 1.0, 1e4])
    close(M.silu(x), F.silu(x), **F32)


def test_swiglu_and_its_silu_ablation_are_the_published_formulas():
    x = torch.randn(2, 3, 16)
    gated, plain = M.SwiGLU(16, 40), M.SiLUFeedForward(16, 40)
    w1, w2, w3 = (m.weight for m in (gated.w1, gated.w2, gated.w3))
    close(gated(x), F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2), **F32)
    close(plain(x), F.linear(F.silu(F.linear(x, plain.w1.weight)), plain.w2.weight), **F32)


def test_softmax_worked_example():
    close(M.softmax(torch.tensor([0.0, math.log(3)]), 0), torch.tensor([0.25, 0.75]), **F32)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_softmax_equals_torch_along_any_dim_with_gradients(dim):
    ours = leaf(3, 4, 5)
    theirs, weights = double(ours), torch.randn(3, 4, 5)
    y, expected = M.softmax(ours, dim), torch.softmax(theirs, dim)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    close(y, expected.float(), **F32)
    close(ours.grad, theirs.grad.float(), **F32)


def test_softmax_is_stable_for_large_values_and_blind_to_a_shift():
    x = torch.tensor([1e4, 1e4 - 1, -1e4])
    close(M.softmax(x, 0), torch.softmax(x.double(), 0).float(), **F32)
    y = torch.randint(-8, 8, (5, 7)).float()  # integers: adding 1000 to them is exact
    assert torch.equal(M.softmax(y, 1), M.softmax(y + 1000, 1))


# rotary positions


def rotate_by_hand(x, positions, theta):
    """Each adjacent pair as one complex number, times exp(i p theta^(-2j/D)), in float64."""
    D = x.shape[-1]
    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones(()).double(), positions.double()[..., None] * frequency)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def test_rope_worked_example():
    rope = M.RotaryEmbedding(100.0, 4, 8)  # frequencies 1 and 1/10
    y = rope(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([2]))
    expected = [math.cos(2), math.sin(2), -math.sin(0.2), math.cos(0.2)]
    close(y, torch.tensor([expected]), **F32)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_turns_adjacent_pairs_like_complex_multiplication(theta):
    rope = M.RotaryEmbedding(theta, 16, 64)
    x = torch.randn(2, 3, 64, 16)
    # float32 angles up to 64 carry an error of 64 * 2^-24 = 4e-6
    close(rope(x), rotate_by_hand(x, torch.arange(64), theta).float(), rtol=0, atol=3e-5)


def test_rope_takes_positions_of_any_order_one_list_or_one_a_row():
    rope = M.RotaryEmbedding(10_000.0, 8, 50)
    x = torch.randn(2, 3, 4, 8)
    scattered = torch.tensor([7, 0, 49, 12])
    close(rope(x, scattered), rotate_by_hand(x, scattered, 1e4).float(), rtol=0, atol=3e-5)
    by_row = torch.stack((scattered, torch.tensor([1, 2, 3, 30])))[:, None]  # (B, 1, T): any head
    close(rope(x, by_row), rotate_by_hand(x, by_row, 1e4).float(), rtol=0, atol=3e-5)
    strided = torch.arange(40).view(10, 4).T[1, ::3]  # not contiguous: 1, 13, 25, 37
    assert not strided.is_contiguous()
    close(rope(x, strided), rope(x, strided.contiguous()), rtol=0, atol=0)
    assert torch.equal(rope(x), rope(x, torch.arange(4)))


def test_rope_scores_depend_on_relative_position_only_and_lengths_are_kept():
    rope = M.RotaryEmbedding(10_000.0, 16, 100)
    q, k = torch.randn(2, 16).unbind(0)

    def score(m, n):
        return rope(q[None], torch.tensor([m]))[0] @ rope(k[None], torch.tensor([n]))[0]

    for m, n in ((5, 3), (17, 0), (40, 60)):
        close(score(m + 31, n + 31), score(m, n), rtol=0, atol=1e-4)  # 16 terms at angles off by 6e-6
    x = torch.randn(100, 16)
    close(rope(x).norm(dim=-1), x.norm(dim=-1), **F32)
    assert torch.equal(rope(x)[0], x[0])


def test_rope_has_no_learned_state_and_keeps_the_dtype_of_its_input():
    rope = M.RotaryEmbedding(10_000.0, 8, 16)
    assert list(rope.parameters()) == [] and rope.state_dict() == {}
    x = torch.randn(16, 8).bfloat16()
    assert torch.equal(rope(x), rope(x.float()).bfloat16())


def test_rope_tables_stay_float32_when_a_model_is_cast_to_bfloat16():
    # a bfloat16 cosine has 8 bits: 0.4% of every query and key, in the one part that needs no cast
    model = M.TransformerLM(tiny(context_length=400))
    fine = model.layers[0].attn.rope.cos.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.layers[0].attn.rope.cos.float(), fine)


def test_a_model_cast_to_bfloat16_runs_and_stays_close():
    model = M.TransformerLM(tiny())
    ids = tokens(2, 32)
    expected = model(ids).double()
    logits = model.to(torch.bfloat16)(ids)
    assert logits.dtype == torch.bfloat16
    # about 30 roundings in sequence, of weights too, each at most half of BF16_EPS: their root times 2
    assert relative_error(logits, expected) < 10 * BF16_EPS


def test_llama3_frequencies_slow_long_waves_keep_short_ones_and_blend_between():
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=1000)  # fmt: skip
    turns = torch.tensor([0.5, 1.0, 2.5, 4.0, 10.0])  # full turns within the original context
    frequency = turns * 2 * math.pi / 1000
    kept = M.scale_rotary_frequencies(frequency, scaling) / frequency
    close(kept, torch.tensor([1 / 8, 1 / 8, 0.5 + 0.5 / 8, 1.0, 1.0]), **F32)


# -------------------------------------------------------------------------------------------------
# attention


def test_attention_worked_example_averages_the_values_that_the_mask_allows():
    q, k = torch.zeros(2, 4), torch.randn(3, 4)  # equal scores: plain means
    v = torch.tensor([[1.0], [2.0], [6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    close(M.scaled_dot_product_attention(q, k, v, mask), torch.tensor([[1.5], [3.0]]), **F32)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch_for_any_leading_dims_with_gradients(lead, masked):
    ours = [leaf(*lead, t, d) for t, d in ((5, 8), (7, 8), (7, 6))]
    theirs = [double(t) for t in ours]
    mask = None
    if masked:
        mask = torch.rand(5, 7) < 0.6  # broadcasts over the leading dims
        mask[:, 2] = True  # every query needs one key
    y = M.scaled_dot_product_attention(*ours, mask)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    close(y, expected.float(), **F32)
    for a, b in zip(ours, theirs, strict=True):
        close(a.grad, b.grad.float(), **F32)


def test_attention_takes_one_mask_a_row_and_broadcast_queries():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8)
    mask = torch.rand(3, 1, 5, 6) < 0.5
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q.expand(3, 4, 5, 8), k, v, attn_mask=mask)
    close(M.scaled_dot_product_attention(q, k, v, mask), expected, **F32)


def attention_by_hand(x, state, c, prefix):
    """Causal attention of the contract, head by head in float64, from the named weights."""
    heads, group = [], c.num_heads // c.num_kv_heads
    T = x.shape[1]

    def project(name, head):
        rows = slice(head * c.d_head, (head + 1) * c.d_head)
        y = x @ state[f"{prefix}{name}_proj.weight"][rows].T
        if c.qkv_bias:
            y = y + state[f"{prefix}{name}_proj.bias"][rows]
        if c.qk_norm and name != "v":
            y = F.rms_norm(y, (c.d_head,), state[f"{prefix}{name}_norm.weight"], c.norm_eps)
        if c.pos == "rope" and name != "v":
            y = rotate_by_hand(y, torch.arange(T), c.rope_theta)
        return y

    for h in range(c.num_heads):
        q, k, v = project("q", h), project("k", h // group), project("v", h // group)
        scores = q @ k.mT / math.sqrt(c.d_head)
        scores = scores + torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ state[f"{prefix}output_proj.weight"].T


def logits_by_hand(model, ids):
    """The whole model of the contract in float64, from nothing but its config and named weights."""
    c, state = model.config, {name: p.double() for name, p in model.state_dict().items()}

    def norm(x, name):
        return F.rms_norm(x, (c.d_model,), state[name + ".weight"], c.norm_eps)

    def ffn(x, prefix):
        up = F.silu(x @ state[prefix + "w1.weight"].T)
        if c.ffn == "swiglu":
            up = up * (x @ state[prefix + "w3.weight"].T)
        return up @ state[prefix + "w2.weight"].T

    def attention(x, prefix):
        return attention_by_hand(x, state, c, prefix)

    x = state["token_embeddings.weight"][ids]
    for i, (ln, part, prefix) in itertools.product(
        range(c.num_layers), (("ln1", attention, "attn."), ("ln2", ffn, "ffn."))
    ):
        ln, prefix = f"layers.{i}.{ln}", f"layers.{i}.{prefix}"
        if c.norm == "pre":
            x = x + part(norm(x, ln), prefix)
        elif c.norm == "post":
            x = norm(x + part(x, prefix), ln)
        else:
            x = x + part(x, prefix)
    return (norm(x, "ln_final") if c.norm == "pre" else x) @ state["lm_head.weight"].T


VARIANTS = {
    "the default": {},
    "grouped heads": dict(num_kv_heads=2),
    "one key head": dict(num_kv_heads=1),
    "wide heads": dict(d_head=16),
    "Qwen2's biases": dict(qkv_bias=True, num_kv_heads=2),
    "Qwen3's head norms": dict(qk_norm=True, num_kv_heads=2, d_head=16),
    "tied embeddings": dict(tie_embeddings=True),
    "post-norm": dict(norm="post"),
    "no norm": dict(norm="none"),
    "no positions": dict(pos="none"),
    "no gate": dict(ffn="silu", d_ff=None),
    "another base and epsilon": dict(rope_theta=500.0, norm_eps=0.1),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_equals_a_float64_recomputation_in_every_variant(variant, attention):
    model = randomised(M.TransformerLM(tiny(attention=attention, **VARIANTS[variant])))
    ids = tokens(2, 20)
    expected = logits_by_hand(model, ids)
    assert expected.std() > 0.1  # so that the tolerance below means something
    # float32 rounding through 2 blocks; without norms values grow to about 30
    scale = expected.abs().max().item()
    close(model(ids), expected.float(), rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_eager_and_sdpa_give_the_same_logits_and_gradients(kv_heads):
    eager = randomised(M.TransformerLM(tiny(attention="eager", num_kv_heads=kv_heads)))
    sdpa = M.TransformerLM(tiny(attention="sdpa", num_kv_heads=kv_heads))
    sdpa.load_state_dict(eager.state_dict())
    ids, targets = tokens(2, 24), tokens(2, 24)
    close(eager(ids), sdpa(ids), **F32)
    for model in (eager, sdpa):
        model.loss(ids, targets).backward()
    for (name, a), b in zip(eager.named_parameters(), sdpa.parameters(), strict=True):
        close(a.grad, b.grad, **F32, msg=lambda text, name=name: f"{name}: {text}")


def test_attention_layer_stands_alone_and_takes_positions_of_each_row():
    c = tiny(num_kv_heads=2)
    attention = M.CausalSelfAttention(c)
    x = torch.randn(2, 6, 32)
    state = {name: p.double() for name, p in attention.state_dict().items()}
    close(attention(x), attention_by_hand(x.double(), state, c, "").float(), **F32)
    # only relative positions matter, so shifted rows give the same output; stretched ones do not
    shifted = torch.arange(6) + torch.tensor([[3], [9]])
    close(attention(x, shifted), attention(x), rtol=0, atol=1e-4)  # angles to 15, float32
    assert not torch.allclose(attention(x, shifted * 2), attention(x), atol=1e-3)


def test_flash_attention_comes_from_flash_attn_when_it_is_asked_for_and_only_then(monkeypatch):
    calls = []

    def stand_in(q, k, v, causal=True):
        calls.append((tuple(q.shape), tuple(k.shape), causal))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attention=stand_in))
    flash, sdpa = (M.TransformerLM(tiny(attention=a, num_kv_heads=2)) for a in ("flash", "sdpa"))
    flash.load_state_dict(sdpa.state_dict())
    ids = tokens(2, 16)
    close(flash(ids), sdpa(ids), **F32)
    assert calls == [((2, 4, 16, 8), (2, 2, 16, 8), True)] * 2  # (B, H, T, D) and (B, G, T, D), a layer


@torch.no_grad()
def test_a_cache_fed_piece_by_piece_gives_the_logits_of_the_whole():
    for attention in ("eager", "sdpa"):
        model = M.TransformerLM(tiny(attention=attention, num_kv_heads=2))
        ids = tokens(3, 20)
        cache = M.KVCache(model.config, 3, 20, "cpu", torch.float32)
        pieces = [model(piece, cache) for piece in ids.split([7, 1, 5, 1, 6], 1)]
        close(torch.cat(pieces, 1), model(ids), **F32)
        assert cache.lengths.tolist() == [20, 20, 20]


def test_future_tokens_do_not_change_logits():
    for attention in ("eager", "sdpa"):
        model = M.TransformerLM(tiny(attention=attention, num_kv_heads=2))
        ids = tokens(1, 20)
        changed = ids.clone()
        changed[:, 11:] = (changed[:, 11:] + 1) % 61
        a, b = model(ids), model(changed)
        close(a[:, :11], b[:, :11], rtol=0, atol=1e-6)  # the same sums; blocking may differ
        assert not torch.allclose(a[:, 11:], b[:, 11:], atol=1e-2)


def test_without_positions_earlier_tokens_are_a_bag_and_with_rope_they_are_not():
    ids = tokens(1, 12)
    shuffled = torch.cat((ids[:, :11].flip(1), ids[:, 11:]), 1)
    # one block: in a second one, causality itself would give positions away
    bag = M.TransformerLM(tiny(pos="none", num_layers=1))
    close(bag(ids)[:, -1], bag(shuffled)[:, -1], **F32)
    rope = M.TransformerLM(tiny(num_layers=1))
    assert not torch.allclose(rope(ids)[:, -1], rope(shuffled)[:, -1], atol=1e-2)


# -------------------------------------------------------------------------------------------------
# configuration and names


def test_parameter_names_and_shapes_are_the_fixed_ones():
    c = tiny(num_kv_heads=2, d_head=10)
    expected = {"token_embeddings.weight": (61, 32), "ln_final.weight": (32,), "lm_head.weight": (61, 32)}
    for i in range(2):
        block = {"ln1": (32,), "attn.q_proj": (40, 32), "attn.k_proj": (20, 32), "attn.v_proj": (20, 32),
                 "attn.output_proj": (32, 40), "ln2": (32,), "ffn.w1": (48, 32), "ffn.w2": (32, 48),
                 "ffn.w3": (48, 32)}  # fmt: skip
        expected |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
    state = M.TransformerLM(c).state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == expected
    assert set(dict(M.TransformerLM(c).named_parameters())) == set(expected)


def test_ablations_change_the_parameters_and_nothing_else():
    full = set(M.TransformerLM(tiny()).state_dict())

    def lost(**flags):
        state = set(M.TransformerLM(tiny(**flags)).state_dict())
        assert state <= full
        return {name.split(".", 2)[-1] if name.startswith("layers") else name for name in full - state}

    assert lost(norm="post") == {"ln_final.weight"}
    assert lost(norm="none") == {"ln_final.weight", "ln1.weight", "ln2.weight"}
    assert lost(ffn="silu") == {"ffn.w3.weight"}
    assert lost(pos="none") == lost(attention="eager") == lost(attention="flash") == set()


def test_tied_embeddings_are_one_parameter_with_the_heads_small_start():
    model = M.TransformerLM(tiny(tie_embeddings=True))
    assert model.token_embeddings.weight is model.lm_head.weight
    assert sum(p.shape == (61, 32) for p in model.parameters()) == 1
    assert model.lm_head.weight.abs().max() <= 3 * math.sqrt(2 / (61 + 32)) + 1e-6


@pytest.mark.parametrize("d_model, heads, d_ff", [(512, 16, 1344), (768, 12, 2048), (1600, 25, 4288)])
def test_d_ff_defaults_to_eight_thirds_of_d_model_in_multiples_of_64(d_model, heads, d_ff):
    assert M.ModelConfig(d_model=d_model, num_heads=heads).d_ff == d_ff
    assert M.ModelConfig(d_model=d_model, num_heads=heads, ffn="silu").d_ff == 4 * d_model


def test_a_config_derives_what_is_not_given_and_keeps_what_is():
    c = M.ModelConfig(d_model=96, num_heads=6)
    assert (c.num_kv_heads, c.d_head) == (6, 16)
    c = M.ModelConfig(d_model=96, num_heads=6, num_kv_heads=3, d_head=8, d_ff=100)
    assert (c.num_kv_heads, c.d_head, c.d_ff) == (3, 8, 100)


@pytest.mark.parametrize(
    "bad, named",
    [
        (dict(d_model=10, num_heads=3), "d_model"), (dict(num_heads=4, num_kv_heads=3), "num_kv_heads"),
        (dict(num_kv_heads=0), "num_kv_heads"), (dict(d_model=12, num_heads=4), "d_head"),
        (dict(vocab_size=0), "vocab_size"), (dict(context_length=0), "context_length"),
        (dict(num_layers=-1), "num_layers"), (dict(d_ff=0), "d_ff"), (dict(d_head=0), "d_head"),
        (dict(pos="alibi"), "pos"), (dict(norm="batch"), "norm"), (dict(ffn="relu"), "ffn"),
        (dict(attention="fast"), "attention"),
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_refused_by_the_name_of_its_flag(bad, named):
    with pytest.raises(ValueError, match=named) as caught:
        tiny(**{"d_ff": None, **bad})
    assert "\n" not in str(caught.value) and "got" in str(caught.value)


def test_more_tokens_than_the_context_are_refused():
    model = M.TransformerLM(tiny())
    assert model(tokens(1, 32)).shape == (1, 32, 61)
    with pytest.raises(ValueError, match="context_length = 32.*got 33"):
        model(tokens(1, 33))


# -------------------------------------------------------------------------------------------------
# gradient checkpointing


@pytest.mark.parametrize("spans", [(1,), (2,), (3,), (4, 1), (9,)])
def test_gradient_checkpointing_changes_memory_and_not_gradients(spans):
    model = M.TransformerLM(tiny(num_layers=5))
    ids, targets = tokens(2, 16), tokens(2, 16)
    model.loss(ids, targets).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.checkpoint_every = spans
    with kept_by_autograd(model) as kept:
        loss = model.loss(ids, targets)
    assert sum(t.shape == (2, 16, 32) for t in kept.values()) <= math.ceil(5 / spans[0]) + 3
    loss.backward()
    for p, expected in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.grad, expected)  # the same operations on the same numbers


@pytest.mark.parametrize("levels, compiled", [
    (["cheap"] * 3, False), (["ffn"] * 3, False), (["block"] * 3, False), (["none", "ffn", "cheap"], False),
    (["block", "ffn", "cheap"], True),
], ids=str)  # fmt: skip
def test_what_is_computed_again_is_the_same(levels, compiled):
    model = M.TransformerLM(tiny(num_layers=3))
    ids, targets = tokens(2, 16), tokens(2, 16)
    if compiled:
        for block in model.layers:
            block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition")
    model.loss(ids, targets).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.recompute(levels)
    model.loss(ids, targets).backward()
    for p, expected in zip(model.parameters(), plain, strict=True):
        same = functools.partial(torch.allclose, rtol=1e-5, atol=1e-6) if compiled else torch.equal
        assert same(p.grad, expected)


def test_levels_compute_the_same_products_again_whatever_widths_are_equal():
    def flops(level, d_ff):
        model = M.TransformerLM(tiny(d_ff=d_ff))
        model.recompute([level] * len(model.layers))
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model.loss(tokens(2, 16), tokens(2, 16)).backward()
        return counter.get_total_flops()

    config = tiny()
    for d_ff in (config.d_model, 2 * config.d_model + 3):
        plain = flops("none", d_ff)
        assert flops("cheap", d_ff) == plain
        wide = 2 * 2 * 2 * 16 * config.d_model * d_ff * config.num_layers  # w1, w3; 2 FLOPs; 2 x 16 tokens
        assert flops("ffn", d_ff) == plain + wide


def test_levels_of_recomputation_are_checked():
    model = M.TransformerLM(tiny())
    n = len(model.layers)
    for levels, got in ((["chaep"] * n, "chaep"), (["cheap"] * (n + 1), "cheap, cheap"), ([], "got ;")):
        with pytest.raises(ValueError, match=f"for each of the {n} blocks.*{got}"):
            model.recompute(levels)


def test_flags_of_a_run_give_way_to_those_that_contradict_them(tmp_path):
    for saved, given, expected in (
        ({"recompute": "cheap", "lr": 1.0}, {"checkpoint_every": [1], "recompute": "none"}, {"lr": 1.0}),
        ({"checkpoint_every": [2]}, {"checkpoint_every": [], "recompute": "auto"}, {}),
        ({"recompute": "cheap"}, {"checkpoint_every": [], "recompute": "none"}, {"recompute": "cheap"}),
    ):
        (tmp_path / "log.jsonl").write_text(json.dumps({"flags": saved}))
        assert M.saved_flags(tmp_path, types.SimpleNamespace(**given)) == expected


@contextlib.contextmanager
def kept_by_autograd(model, cast_weights=False):
    """{storage: tensor} that autograd saves inside, without parameters and tables, and (unless
    cast_weights) without copies of parameters in another dtype."""
    own = [*model.parameters(), *model.buffers()]
    skip = {t.untyped_storage().data_ptr() for t in own}
    shapes = {s for p in model.parameters() if p.dim() == 2 for s in (p.shape, p.shape[::-1])}
    kept = {}

    def pack(t):
        at = t.untyped_storage().data_ptr()
        is_cast = t.shape in shapes and t.dtype == torch.bfloat16
        if at not in skip and (cast_weights or not is_cast):
            kept[at] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


# -------------------------------------------------------------------------------------------------
# cross entropy


def test_cross_entropy_worked_examples():
    close(M.cross_entropy(torch.zeros(4, 10), torch.arange(4)), torch.tensor(math.log(10)), **F32)
    two = M.cross_entropy(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
    close(two, torch.tensor(math.log(4 / 3)), **F32)


def test_cross_entropy_equals_torch_for_any_leading_dims_with_gradients():
    for lead in ((7,), (2, 5), (2, 3, 4)):
        ours, targets = leaf(*lead, 11, scale=3), torch.randint(11, lead)
        theirs = double(ours)
        expected = F.cross_entropy(theirs.flatten(0, -2), targets.flatten())
        loss = M.cross_entropy(ours, targets)
        loss.backward()
        expected.backward()
        close(loss, expected.float(), **F32)
        close(ours.grad, theirs.grad.float(), **F32)


def test_cross_entropy_is_finite_and_right_for_logits_of_ten_thousand():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], requires_grad=True)
    loss = M.cross_entropy(logits, torch.tensor([0, 0]))
    assert loss.item() == 1e4  # 0 for the first row, 20000 for the second
    loss.backward()
    close(logits.grad, torch.tensor([[0.0, 0, 0], [-0.5, 0, 0.5]]), rtol=0, atol=0)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits, targets = torch.randn(64, 100).bfloat16(), torch.randint(100, (64,))
    loss = M.cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(logits.double(), targets).float(), **F32)


def plain_loss(hidden, weight, targets, reduction="mean", ignore_index=-100):
    """The oracle: all logits, torch's loss."""
    logits = (hidden @ weight.T).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction=reduction, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 7, 13, 30, 64, None])
def test_linear_cross_entropy_equals_the_plain_loss_and_its_gradients_for_any_chunk(chunk, reduction):
    hidden, weight, targets = leaf(2, 15, 8), leaf(37, 8), torch.randint(37, (2, 15))
    h, w = double(hidden), double(weight)
    loss = M.linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=chunk)
    expected = plain_loss(h, w, targets, reduction)
    (-2.5 * loss).backward()  # an upstream gradient other than 1
    (-2.5 * expected).backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    close(loss, expected.float(), **CONTRACT_LOSS)
    close(hidden.grad, h.grad.float(), **CONTRACT_LOSS)
    close(weight.grad, w.grad.float(), **CONTRACT_LOSS)


def test_linear_cross_entropy_equals_this_files_own_cross_entropy():
    hidden, weight, targets = torch.randn(9, 8), torch.randn(20, 8), torch.randint(20, (9,))
    close(M.linear_cross_entropy(hidden, weight, targets),
          M.cross_entropy(hidden @ weight.T, targets), **CONTRACT_LOSS)  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore", [-100, 0, 5])
def test_linear_cross_entropy_leaves_ignored_tokens_out_of_mean_and_gradient(ignore, reduction):
    hidden, weight, targets = leaf(20, 8), leaf(37, 8), torch.randint(37, (20,))
    targets[[0, 3, 4, 5, 19]] = ignore  # at 0 and 5, ids of the vocabulary
    h, w = double(hidden), double(weight)
    loss = M.linear_cross_entropy(hidden, weight, targets, ignore, reduction, chunk=6)
    expected = plain_loss(h, w, targets, reduction, ignore)
    loss.backward()
    expected.backward()
    close(loss, expected.float(), **CONTRACT_LOSS)
    close(hidden.grad, h.grad.float(), **CONTRACT_LOSS)
    close(weight.grad, w.grad.float(), **CONTRACT_LOSS)
    assert hidden.grad[[0, 3, 4, 5, 19]].abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_ignored_tokens_alone_sends_no_gradient_as_in_torch(reduction):
    hidden, weight = leaf(6, 8), leaf(37, 8)
    targets = torch.full((6,), -100)
    loss = M.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    loss.backward()
    if reduction == "sum":
        assert loss.item() == 0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0  # torch: nan loss, but these


def test_linear_cross_entropy_is_right_for_confident_and_for_hopeless_predictions():
    weight = torch.eye(3, requires_grad=True)
    hidden = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 1e4]], requires_grad=True)
    loss = M.linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), reduction="sum")
    loss.backward()
    assert loss.item() == 1e4
    close(hidden.grad, torch.tensor([[0.0, 0, 0], [0, -1, 1]]), rtol=0, atol=0)


def test_linear_cross_entropy_with_a_frozen_side_gives_the_other_its_gradient():
    targets = torch.randint(37, (10,))
    for frozen in ("hidden", "weight"):
        hidden, weight = leaf(10, 8), leaf(37, 8)
        h, w = double(hidden), double(weight)
        (hidden if frozen == "hidden" else weight).requires_grad_(False)
        M.linear_cross_entropy(hidden, weight, targets, chunk=4).backward()
        plain_loss(h, w, targets).backward()
        live, expected = (weight, w) if frozen == "hidden" else (hidden, h)
        close(live.grad, expected.grad.float(), **CONTRACT_LOSS)
        assert (hidden if frozen == "hidden" else weight).grad is None


class Sizes(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation inside returns."""

    largest = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return result


def test_linear_cross_entropy_without_gradients_computes_only_the_value():
    hidden, weight, targets = leaf(12, 8), leaf(500, 8), torch.randint(500, (12,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = M.linear_cross_entropy(hidden, weight, targets, chunk=2)
    assert not loss.requires_grad
    assert counter.get_total_flops() == 2 * 12 * 8 * 500  # the logits and no gradient
    close(loss, plain_loss(hidden, weight, targets).detach(), **CONTRACT_LOSS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_never_makes_a_full_logits_tensor(dtype):
    N, V, C = 256, 512, 8
    hidden, weight, targets = leaf(N, C, dtype=dtype), leaf(V, C), torch.randint(V, (N,))
    with Sizes() as sizes:
        M.linear_cross_entropy(hidden, weight, targets, chunk=32).backward()
    assert sizes.largest <= 32 * V
    with Sizes() as sizes:
        plain_loss(hidden.float(), weight, targets).backward()
    assert sizes.largest == N * V  # the measure does see one


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def test_linear_cross_entropy_of_bfloat16_hidden_keeps_float32_loss_and_weight_gradient():
    hidden, weight, targets = leaf(64, 32, dtype=torch.bfloat16), leaf(100, 32), torch.randint(100, (64,))
    h, w = double(hidden), double(weight.detach().bfloat16())  # the product is of bfloat16 numbers
    loss = M.linear_cross_entropy(hidden, weight, targets, chunk=10)
    expected = plain_loss(h, w, targets)
    loss.backward()
    expected.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (
        torch.float32, torch.bfloat16, torch.float32)  # fmt: skip
    # logits of size 6 rounded to 8 bits are off by 0.02 each; the mean of 64 of them by a tenth
    assert loss.item() == pytest.approx(expected.item(), abs=0.01)
    # the probabilities, the products and the stored gradient are each rounded to 8 bits
    assert relative_error(hidden.grad, h.grad) < 3 * BF16_EPS
    assert relative_error(weight.grad, w.grad) < 3 * BF16_EPS


def test_linear_cross_entropy_follows_autocast():
    hidden, weight, targets = leaf(64, 32), leaf(100, 32), torch.randint(100, (64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = M.linear_cross_entropy(hidden, weight, targets, chunk=10)
    loss.backward()
    with torch.no_grad():
        explicit = M.linear_cross_entropy(hidden.bfloat16(), weight, targets, chunk=10)
    assert torch.equal(loss, explicit)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    h, w = double(hidden), double(weight)
    plain_loss(h, w, targets).backward()
    # as above, and the inputs are rounded too
    assert relative_error(hidden.grad, h.grad) < 5 * BF16_EPS
    assert relative_error(weight.grad, w.grad) < 5 * BF16_EPS


def test_the_loss_of_a_model_is_cross_entropy_of_its_logits():
    for tied in (False, True):
        model = M.TransformerLM(tiny(tie_embeddings=tied))
        ids, targets = tokens(2, 16), tokens(2, 16)
        targets[0, :5] = -100
        expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
        loss = model.loss(ids, targets)
        close(loss, expected, **CONTRACT_LOSS)
        for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected_gradients, strict=True):
            close(a, b, **CONTRACT_LOSS)
        total = model.loss(ids, targets, reduction="sum")
        close(total, expected * 27, **F32)  # 2 * 16 - 5 tokens


def test_another_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction"):
        M.linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), reduction="none")


# -------------------------------------------------------------------------------------------------
# bfloat16 on the CPU


def test_a_model_under_autocast_stays_close_to_float32():
    model = M.TransformerLM(tiny())
    ids = tokens(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    # about 20 roundings in sequence, each at most half of BF16_EPS, add up like their square root
    assert relative_error(logits, model(ids).double()) < 10 * BF16_EPS


# -------------------------------------------------------------------------------------------------
# AdamW


def test_adamw_worked_example_of_a_first_step():
    # decay: 1 - 0.1 * 0.5 * 1 = 0.95; Adam's first step is lr * sign(g): 0.95 - 0.1 = 0.85
    p = torch.nn.Parameter(torch.tensor([1.0]))
    p.grad = torch.tensor([3.0])
    M.AdamW([p], lr=0.1, weight_decay=0.5, eps=0.0).step()
    close(p.data, torch.tensor([0.85]), **F32)


def two_optimizers(dtype=torch.float32, device="cpu"):
    """Ours and torch's on equal parameters, in two groups that differ in everything."""
    shapes = ((5, 7), (11,), (3, 4, 2), (1,), (6, 6))
    start = [torch.randn(s, device=device).to(dtype) for s in shapes]
    both = []
    for kind, options in ((M.AdamW, {}), (torch.optim.AdamW, dict(foreach=True))):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [dict(params=params[:3], weight_decay=0.3),
                  dict(params=params[3:], weight_decay=0.0, lr=0.02, betas=(0.7, 0.8), eps=1e-4)]  # fmt: skip
        both.append((kind(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, **options), params))
    return both


def take_steps(both, steps, misses=True):
    for t in steps:
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * t + i)).to(p)
                     for i, p in enumerate(both[0][1])]  # fmt: skip
        for optimizer, params in both:
            for group, base in zip(optimizer.param_groups, (0.01, 0.02), strict=True):
                group["lr"] = base * (1 + math.sin(t))  # another rate at every step, also 0.003 of it
            for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
                p.grad = None if misses and (t + i) % 4 == 0 else g.clone()
            optimizer.step()


def test_adamw_equals_torch_over_50_steps_with_groups_changing_rates_and_missing_gradients():
    ours, theirs = both = two_optimizers()
    take_steps(both, range(50))
    for a, b in zip(ours[1], theirs[1], strict=True):
        close(a.data, b.data, **CONTRACT_ADAMW)


def test_adamw_of_bfloat16_parameters_equals_torch():
    ours, theirs = both = two_optimizers(torch.bfloat16)
    take_steps(both, range(20))
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == torch.bfloat16
        close(a.data, b.data, rtol=BF16_EPS, atol=1e-3)  # one rounding of the stored number


def test_adamw_goes_on_from_its_state_dict_bit_for_bit():
    (straight, params), _ = two_optimizers()
    torch.manual_seed(0)
    (broken, resumed), _ = two_optimizers()
    take_steps([(straight, params)], range(20))
    take_steps([(broken, resumed)], range(9))
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    torch.manual_seed(0)
    (fresh, _), _ = two_optimizers()
    fresh = M.AdamW([dict(params=resumed[:3]), dict(params=resumed[3:])])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    take_steps([(fresh, resumed)], range(9, 20))
    assert fresh.param_groups[1]["betas"] == (0.7, 0.8) and fresh.param_groups[0]["weight_decay"] == 0.3
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)


def test_stochastic_rounding_gives_a_neighbour_of_bfloat16_that_is_right_on_average():
    low, high = 1.0, 1.0 + 2**-7  # neighbours in bfloat16
    x = torch.full((100_000,), low + (high - low) / 4)
    rounded = M.round_stochastically(x, seed=3)
    assert rounded.dtype == torch.bfloat16 and set(rounded.tolist()) == {low, high}
    share = (rounded == high).float().mean().item()
    assert share == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / 1e5))  # 6 standard deviations
    assert torch.equal(rounded, M.round_stochastically(x, seed=3))
    assert not torch.equal(rounded, M.round_stochastically(x, seed=4))
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(M.round_stochastically(-exact.float(), 0), -exact)
    odd = M.round_stochastically(torch.tensor([math.inf, -math.inf, math.nan]), 0)
    assert odd[:2].tolist() == [math.inf, -math.inf] and odd[2].isnan()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_adamw_with_float32_moments_is_the_float32_one_whose_weights_are_rounded_every_step(device):
    narrow = torch.nn.Parameter(torch.randn(40, 30).bfloat16().to(device))
    wide = torch.nn.Parameter(narrow.detach().float())
    ours = M.AdamW([narrow], lr=0.01, weight_decay=0.1, moment_dtype=torch.float32)
    exact = torch.optim.AdamW([wide], lr=0.01, weight_decay=0.1)
    for t in range(20):
        grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(t)).bfloat16().to(device)
        narrow.grad, wide.grad = grad, grad.float()
        ours.step()
        exact.step()
        one_bit = wide.detach().abs() * 2**-7  # float32's last bits may turn a tie the other way
        assert ((narrow.detach().float() - wide.detach()).abs() <= one_bit).all()
        wide.data.copy_(narrow.detach())
    assert ours.state[narrow]["v"].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_small_updates_of_bfloat16_weights_are_lost_to_the_nearest_but_not_to_stochastic_rounding(device):
    def trained(**options):  # 100 steps of 1e-3 down from 1, where half of the last bit is 2e-3
        p = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16, device=device))
        optimizer = M.AdamW([p], lr=1e-3, weight_decay=0.0, **options)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float().mean().item()

    assert trained() == 1
    # a step up by less than a bit moves the mean by 1e-3 +- 4e-3 / sqrt(2000): 0.9 within 1e-2
    assert trained(stochastic_rounding=True, moment_dtype=torch.float32) == pytest.approx(0.9, abs=1e-2)


ADAMW_KERNEL = """
import torch, model as M
def run(kind, moments, seed):
    torch.manual_seed(0)
    p, m, v = torch.randn(5000).to(kind), *(torch.rand(2, 5000).to(moments) / 9)
    g = torch.randn(5000).to(kind)
    exact = g.double()
    theta = p.double() * 0.9 - 0.01 * (m.double() * 0.8 + exact * 0.2) / ((v.double() * 0.7 + exact**2 * 0.3).sqrt() + 1)
    M._adamw_kernel()([p], [g], [m], [v], (0.9, 0.2, 0.7, 0.3, 1.0, 0.01, 1.0), seed)
    return p, theta
p, theta = run(torch.float32, torch.float32, None)
assert (p - theta).abs().max() < 1e-6
p, theta = run(torch.bfloat16, torch.float32, 3)
bit = theta.abs().log2().floor().exp2() * 2**-7  # the last one of bfloat16
assert ((p.double() - theta).abs() < bit + 1e-6).all()
assert abs(((p.double() - theta) / bit)[theta.abs() > 0.01].mean()) < 0.05  # sigma is 0.006
assert not torch.equal(p, run(torch.bfloat16, torch.float32, 4)[0])
"""


def test_the_fused_adamw_is_right_and_rounds_stochastically_in_tritons_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", ADAMW_KERNEL], cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [dict(moment_dtype=torch.float32), dict(stochastic_rounding=True)])
def test_adamw_of_bfloat16_goes_on_from_its_state_dict_bit_for_bit(options):
    def run(steps, p, optimizer):
        for t in steps:
            p.grad = torch.randn(33, generator=torch.Generator().manual_seed(t)).bfloat16()
            optimizer.step()

    straight, broken = (torch.nn.Parameter(torch.linspace(-1, 1, 33).bfloat16()) for _ in range(2))
    run(range(12), straight, M.AdamW([straight], **options))
    first = M.AdamW([broken], **options)
    run(range(5), broken, first)
    second = M.AdamW([broken], **options)
    second.load_state_dict(first.state_dict())
    assert second.state[broken]["m"].dtype == options.get("moment_dtype", torch.bfloat16)
    run(range(5, 12), broken, second)
    assert torch.equal(straight, broken)


def test_adamw_that_is_told_a_moment_dtype_takes_over_moments_of_another():
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = torch.linspace(-1, 1, 8)
    first, second = M.AdamW([p]), M.AdamW([p], moment_dtype=torch.bfloat16)
    first.step()
    second.load_state_dict(first.state_dict())
    for key in ("m", "v"):
        assert torch.equal(second.state[p][key], first.state[p][key].bfloat16())


def test_adamw_leaves_a_parameter_without_gradient_alone_and_runs_a_closure():
    p, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = M.AdamW([p, frozen], weight_decay=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert frozen.tolist() == [1, 1] and p.max() < 1


@pytest.mark.parametrize("bad", [dict(lr=-1), dict(eps=-1), dict(weight_decay=-1), dict(betas=(0.9, 1.0))])
def test_adamw_refuses_rates_out_of_range(bad):
    with pytest.raises(ValueError, match="at least 0"):
        M.AdamW([torch.nn.Parameter(torch.ones(1))], **bad)


def test_matrices_decay_and_gains_and_biases_do_not_and_frozen_ones_are_left_out():
    model = M.TransformerLM(tiny(qkv_bias=True, tie_embeddings=True))
    model.layers[0].ffn.w1.weight.requires_grad_(False)
    decayed, free = M.optimizer_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in free["params"]} == {1}
    everything = {id(p) for group in (decayed, free) for p in group["params"]}
    assert everything == {id(p) for p in model.parameters()} - {id(model.layers[0].ffn.w1.weight)}


# -------------------------------------------------------------------------------------------------
# schedule, clipping, batches


def test_the_schedule_by_hand():
    def rate(step):
        return M.lr_cosine_schedule(step, 1.0, 0.1, 10, 30)

    # warm-up 0 to 10; the cosine's quarters: cos(45 deg) = 0.7071, cos(90 deg) = 0
    expected = {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 15: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 20: 0.55,
                25: 0.1 + 0.45 * (1 - math.sqrt(0.5)), 30: 0.1, 31: 0.1, 10**6: 0.1}  # fmt: skip
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, abs=1e-12), step
    falling = [rate(step) for step in range(10, 31)]
    assert falling == sorted(falling, reverse=True)


def test_the_schedule_without_warm_up_or_without_cosine():
    assert M.lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert [M.lr_cosine_schedule(t, 1.0, 0.1, 2, 2) for t in (0, 1, 2)] == [0.0, 0.5, 0.1]


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_equals_torch(max_norm):
    ours = [torch.nn.Parameter(torch.zeros(s)) for s in ((4, 5), (7,), (2, 3, 2), (3,))]
    for p in ours[:3]:  # the last has no gradient
        p.grad = torch.randn_like(p)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    norm = M.clip_grad_norm_(iter(ours), max_norm)  # a generator, as model.parameters() is
    close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm), **F32)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        close(a.grad, b.grad, **F32)
        if max_norm == 1e6:
            assert torch.equal(a.grad, b.grad)  # below the limit nothing is touched
    assert ours[3].grad is None


def test_clipping_worked_example_and_nothing_to_clip():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert M.clip_grad_norm_([p], 1.0).item() == 5
    close(p.grad, torch.tensor([0.6, 0.8]), **F32)
    p.grad *= 5
    assert M.clip_grad_norm_(p, 1.0).item() == pytest.approx(5)  # one tensor, as torch's takes it
    close(p.grad, torch.tensor([0.6, 0.8]), **F32)
    assert M.clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0


def test_clipping_returns_a_nonfinite_norm_so_that_the_caller_can_stop():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([math.nan, 1.0])
    assert M.clip_grad_norm_([p], 1.0).isnan()


@pytest.mark.parametrize("dtype, top", [(np.uint16, 65_535), (np.uint32, 4_000_000_000)])
def test_get_batch_reads_memmaps_of_either_width_as_int64(tmp_path, dtype, top):
    data = np.arange(top - 200, top, dtype=dtype)
    data.tofile(tmp_path / "data.bin")
    dataset = np.memmap(tmp_path / "data.bin", dtype=dtype, mode="r")
    x, y = M.get_batch(dataset, 6, 9, "cpu")
    assert x.shape == y.shape == (6, 9) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)  # the data counts up by one, so y is x one token later
    assert x.min() >= top - 200 and y.max() < top


def test_get_batch_draws_every_start_alike_the_first_and_last_included():
    dataset = np.arange(12, dtype=np.uint16)
    x, _ = M.get_batch(dataset, 8000, 4, "cpu", torch.Generator().manual_seed(1))
    counts = torch.bincount(x[:, 0], minlength=8)
    assert len(counts) == 8  # starts 0 to 7: the window of 5 that begins at 7 ends with the last token
    assert (counts - 1000).abs().max() < 150  # five standard deviations of a binomial (8000, 1/8)


def test_get_batch_takes_the_only_window_there_is_and_refuses_shorter_data():
    x, y = M.get_batch(np.array([5, 6, 7], dtype=np.uint16), 2, 2, "cpu")
    assert x.tolist() == [[5, 6], [5, 6]] and y.tolist() == [[6, 7], [6, 7]]
    with pytest.raises(ValueError, match="more than context_length = 3.*got 3"):
        M.get_batch(np.array([5, 6, 7], dtype=np.uint16), 2, 3, "cpu")


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_get_batch_takes_tensors_and_lists_too(kind):
    x, y = M.get_batch(kind(range(100)), 4, 8, "cpu", torch.Generator().manual_seed(1))
    assert torch.equal(x + 1, y) and x.dtype == torch.int64 and x.shape == (4, 8)


def test_a_file_object_that_holds_no_checkpoint_is_refused_in_one_line():
    file = io.BytesIO()
    M.save_checkpoint(torch.nn.Linear(2, 2), None, 3, file)  # and not rewound
    for damaged in (file, io.BytesIO(b"not a checkpoint"), io.BytesIO(file.getvalue()[:400])):
        with pytest.raises(ValueError, match="a checkpoint must be readable, got") as error:
            M.read_checkpoint(damaged)
        assert "\n" not in str(error.value)


def test_get_batch_is_reproducible_from_a_generators_seed_and_state():
    dataset = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint16)

    def draw(generator, n=1):
        return [M.get_batch(dataset, 4, 16, "cpu", generator)[0] for _ in range(n)]

    first = draw(torch.Generator().manual_seed(3), 6)
    generator = torch.Generator().manual_seed(3)
    draw(generator, 4)
    state, resumed = generator.get_state(), torch.Generator()
    resumed.set_state(state)
    for a, b in zip(first[4:], draw(resumed, 2), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_is_the_mean_loss_of_even_windows_for_any_batch_size(batch_size):
    model = M.TransformerLM(tiny(context_length=8))
    dataset = np.random.default_rng(0).integers(0, 61, 8 * 20 + 5).astype(np.uint16)

    def by_hand(starts):
        rows = torch.from_numpy(np.stack([dataset[i : i + 9] for i in starts]).astype(np.int64))
        with torch.no_grad():
            return M.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).item()

    def evaluate(tokens):
        return M.evaluate(model.hidden_states, model, dataset, tokens, batch_size, "cpu")

    everything = by_hand(range(0, 160, 8))
    assert evaluate(10**9) == evaluate(160) == pytest.approx(everything, rel=1e-5)  # float32 sums
    assert evaluate(24) == pytest.approx(by_hand([0, 72, 152]), rel=1e-5)  # first, middle, last window


# -------------------------------------------------------------------------------------------------
# checkpoints


def trained(steps=2, **changes):
    model = M.TransformerLM(tiny(**changes))
    optimizer = M.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(tokens(2, 8), tokens(2, 8)).backward()
        optimizer.step()
    return model, optimizer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["string", "path", "file object"])
def test_a_checkpoint_restores_model_optimizer_and_iteration(tmp_path, kind):
    model, optimizer = trained()
    out = {"string": str(tmp_path / "c.pt"), "path": tmp_path / "c.pt", "file object": io.BytesIO()}[kind]
    M.save_checkpoint(model, optimizer, 17, out)
    if kind == "file object":
        out.seek(0)
    other, other_optimizer = trained(1)
    assert M.load_checkpoint(out, other, other_optimizer) == 17
    assert same(model, other)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # one more step each: state is there
        o.zero_grad()
        m.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
        o.step()
    assert other_optimizer.state_dict()["state"][0]["step"] == 3 and same(model, other)


def test_a_checkpoint_may_hold_more_and_may_lack_the_optimizer(tmp_path):
    model, optimizer = trained()
    extra = dict(config={"d_model": 32}, rng=torch.get_rng_state(), best=1.5, seen=[1, "a", None])
    M.save_checkpoint(model, None, 3, tmp_path / "c.pt", **extra)
    content = M.read_checkpoint(tmp_path / "c.pt")
    assert torch.equal(content.pop("rng"), extra.pop("rng"))
    assert {name: content[name] for name in extra} == extra
    assert M.load_checkpoint(tmp_path / "c.pt", model) == 3
    with pytest.raises(ValueError, match="optimizer"):
        M.load_checkpoint(tmp_path / "c.pt", model, optimizer)


def test_saving_keeps_the_previous_checkpoint_and_no_other_file(tmp_path):
    model, _ = trained(0)
    for iteration in (1, 2, 3):
        M.save_checkpoint(model, None, iteration, tmp_path / "c.pt")
    assert sorted(os.listdir(tmp_path)) == ["c.pt", "c.pt.prev"]
    assert M.read_checkpoint(tmp_path / "c.pt")["iteration"] == 3
    assert M.read_checkpoint(tmp_path / "c.pt.prev")["iteration"] == 2


@pytest.mark.parametrize("error", [OSError("no space left on device"), RuntimeError("writer"),
                                   pickle.PicklingError("cannot"), KeyboardInterrupt()])  # fmt: skip
def test_a_failing_save_leaves_the_old_checkpoint_as_it_was(tmp_path, monkeypatch, error):
    model, _ = trained(0)
    M.save_checkpoint(model, None, 1, tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()

    def fail_half_way(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail_half_way)
    expected = OSError if isinstance(error, RuntimeError) else type(error)  # what a full disk is
    with pytest.raises(expected):
        M.save_checkpoint(model, None, 2, tmp_path / "c.pt")
    assert os.listdir(tmp_path) == ["c.pt"] and (tmp_path / "c.pt").read_bytes() == before


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(tmp_path, monkeypatch, capsys):
    model, _ = trained(0)
    M.save_checkpoint(model, None, 1, tmp_path / "c.pt")
    replace, calls = os.replace, []

    def killed_at_the_second(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with contextlib.suppress(KeyboardInterrupt):
        M.save_checkpoint(model, None, 2, tmp_path / "c.pt")
    monkeypatch.undo()
    assert M.read_checkpoint(tmp_path / "c.pt")["iteration"] in (1, 2)
    if not (tmp_path / "c.pt").exists():
        assert "c.pt.prev" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_falls_back_to_the_previous_one_and_says_so(tmp_path, capsys, left):
    model, _ = trained(0)
    for iteration in (1, 2):
        M.save_checkpoint(model, None, iteration, tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    assert M.read_checkpoint(tmp_path / "c.pt")["iteration"] == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "c.pt:" in said and "using" in said and "c.pt.prev" in said


def test_damaged_foreign_and_missing_checkpoints_are_named_errors(tmp_path):
    (tmp_path / "text.pt").write_text("hello world")
    torch.save({"a": 1}, tmp_path / "foreign.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("text.pt", "foreign.pt", "empty.pt"):
        with pytest.raises(ValueError, match=name) as caught:
            M.read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        M.read_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("changes, named", [
    (dict(d_model=48), "layers.0.attn.k_proj.weight"), (dict(num_layers=3), "layers.2"),
    (dict(num_layers=1), "layers.1"), (dict(ffn="silu", d_ff=48), "layers.0.ffn.w3.weight"),
    (dict(qkv_bias=True), "layers.0.attn.k_proj.bias"),
])  # fmt: skip
def test_a_checkpoint_of_another_shape_is_refused_in_one_line_and_changes_nothing(tmp_path, changes, named):
    M.save_checkpoint(trained(0)[0], None, 1, tmp_path / "c.pt")
    model = M.TransformerLM(tiny(**changes))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=named) as caught:
        M.load_checkpoint(tmp_path / "c.pt", model)
    assert "\n" not in str(caught.value) and same(model, before)


class Malicious:
    """Unpickling this creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_is_not_run(tmp_path):
    content = dict(model={}, iteration=1, payload=Malicious(tmp_path / "ran"))
    torch.save(content, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(ValueError, match=name):
            M.read_checkpoint(tmp_path / name)
        with open(tmp_path / name, "rb") as file, pytest.raises(Exception, match="(?i)weights.?only|unsupported"):
            M.read_checkpoint(file)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload was live


# -------------------------------------------------------------------------------------------------
# generation


class PairTokenizer:
    """Stands in for bpe.Tokenizer: id i is two letters, the last id is <|endoftext|>."""

    special_tokens = ["<|endoftext|>"]

    def __init__(self, size=61):
        self.vocab = {i: bytes((97 + i // 8, 65 + i % 8)) for i in range(size - 1)}
        self.vocab[size - 1] = b"<|endoftext|>"

    def encode(self, text):
        ids, by_bytes = [], {b.decode(): i for i, b in self.vocab.items()}
        while text:
            piece = "<|endoftext|>" if text.startswith("<|endoftext|>") else text[:2]
            ids.append(by_bytes[piece])
            text = text[len(piece) :]
        return ids

    def decode(self, ids):
        return b"".join(self.vocab[i] for i in ids).decode()

    def save(self, path):
        pathlib.Path(path).write_text(str(len(self.vocab)))

    @classmethod
    def load(cls, path):
        path = pathlib.Path(path)
        return cls(int((path / "tokenizer.json" if path.is_dir() else path).read_text()))


def exact_model(**changes):
    """A model in float64: two paths to the same logits cannot differ by enough to turn an argmax."""
    return randomised(M.TransformerLM(tiny(**changes))).double().eval()


RAGGED = [[3], [5, 17, 2, 40, 11, 8], [60, 1, 1], list(range(30))]


def window_of(tokens_so_far, limit):
    """What the model sees, by the contract: when full, its last limit // 2 tokens."""
    window = []
    for t in tokens_so_far:
        window.append(t)
    return window[-(limit // 2) :] if len(window) > limit else window


def continue_by_hand(model, prompt, n, choose):
    """Token by token with whole forward passes, one prompt at a time."""
    window, out, logprobs = list(prompt), [], []
    for _ in range(n):
        window = window_of(window, model.config.context_length)
        logits = model(torch.tensor([window]))[0, -1]
        out.append(choose(logits))
        logprobs.append(logits.log_softmax(-1)[out[-1]].item())
        window.append(out[-1])
    return out, logprobs


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=2, attention="eager"), dict(pos="none"),
                                     dict(qk_norm=True, qkv_bias=True), dict(norm="post")])  # fmt: skip
@torch.no_grad()
def test_greedy_with_the_cache_equals_whole_forward_passes_for_every_prompt_of_a_ragged_batch(changes):
    model = exact_model(**changes)
    cached = M.generate(model, RAGGED, 40, temperature=0)  # 40 tokens: past the context of 32, twice
    plain = M.generate(model, RAGGED, 40, temperature=0, use_cache=False)
    for prompt, a, b in zip(RAGGED, cached, plain, strict=True):
        out, logprobs = continue_by_hand(model, prompt, 40, lambda logits: logits.argmax().item())
        assert a.tokens == b.tokens == out
        assert a.logprobs == pytest.approx(logprobs, abs=1e-5)  # returned as float32
        assert a.finish_reason == "length"
    assert len({tuple(row.tokens) for row in cached}) == 4  # the prompts do matter


def test_a_prompt_longer_than_the_context_is_continued_from_its_end():
    model = exact_model()
    long = (RAGGED[3] * 3)[:50]
    row = M.generate(model, [long], 5, temperature=0)[0]
    with torch.no_grad():
        assert row.tokens == continue_by_hand(model, long, 5, lambda logits: logits.argmax().item())[0]


def test_a_long_row_that_ends_early_does_not_disturb_the_others():
    model = exact_model()
    alone = M.generate(model, [[3]], 28, temperature=0)[0]
    long = M.generate(model, [list(range(30))], 1, temperature=0)[0]
    stop = long.tokens[0]
    alone_until = alone.tokens.index(stop) + 1 if stop in alone.tokens else 28
    rows = M.generate(model, [list(range(30)), [3]], 28, temperature=0, stop_ids=(stop,))
    assert rows[0].tokens == [stop] and rows[0].finish_reason == "stop"
    assert rows[1].tokens == alone.tokens[:alone_until]


def test_sampling_with_the_cache_equals_sampling_without():
    model = exact_model()
    options = dict(temperature=0.9, top_k=20, top_p=0.9, num_samples=3, seed=4)
    cached = M.generate(model, RAGGED, 20, **options)
    plain = M.generate(model, RAGGED, 20, use_cache=False, **options)
    assert [row.tokens for row in cached] == [row.tokens for row in plain]
    for a, b in zip(cached, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)  # float32


def check_fixed_shapes(model, monkeypatch):
    """That decode_fixed, which a GPU takes, gives what decode_ragged gives, whichever rows end when, and
    with the graphs and stale caches of former calls."""
    ragged, sizes, graphs = RAGGED[:3], [], {}
    call = M.DecodeStep.__call__
    monkeypatch.setattr(M, "FEW_ROWS", 2)
    monkeypatch.setattr(M.DecodeStep, "__call__",
                        lambda step, u: sizes.append(len(u)) or call(step, u))  # fmt: skip
    for stops in ((), range(0, 12), range(0, 61, 2)):
        options = dict(temperature=0.9, top_p=0.95, num_samples=4, seed=3, stop_ids=stops)
        for prompts, kept in ((ragged, None), (ragged[::-1], graphs), (ragged, graphs)):
            plain, fixed = [], []
            for replays, rows in ((False, plain), (True, fixed)):
                monkeypatch.setattr(M, "replays", lambda device, answer=replays: answer)
                rows += M.generate(model, prompts, 20, **options, graphs=kept)
            assert [(r.tokens, r.finish_reason) for r in plain] == [(r.tokens, r.finish_reason) for r in fixed]
            for a, b in zip(plain, fixed, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)  # float32
    assert sizes[0] == 12 and min(sizes) < 4  # the batch has shrunk
    assert {12, 6, 3} <= {rows for rows, *_ in graphs}  # to sizes that come again


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=2, attention="eager"), dict(num_kv_heads=2), dict(qk_norm=True)])
def test_generation_in_fixed_shapes_gives_the_tokens_of_the_plain_loop(changes, monkeypatch):
    check_fixed_shapes(exact_model(**changes), monkeypatch)


def test_rows_that_would_outgrow_the_context_are_not_decoded_in_fixed_shapes(monkeypatch):
    model = exact_model()
    plain = M.generate(model, RAGGED, 10, temperature=0)
    monkeypatch.setattr(M, "replays", lambda device: True)
    monkeypatch.setattr(M, "decode_fixed", None)  # RAGGED[3] has 30 of 32 tokens
    assert [row.tokens for row in M.generate(model, RAGGED, 10, temperature=0)] == [r.tokens for r in plain]


def test_sampling_is_reproducible_by_seed_and_independent_of_the_company_in_the_batch():
    model = exact_model()
    global_state = torch.get_rng_state()

    def sampled(prompts, seed=0, n=12):
        return [row.tokens for row in M.generate(model, prompts, n, temperature=1.0, seed=seed)]

    pair = sampled([RAGGED[1], RAGGED[2]])
    assert pair == sampled([RAGGED[1], RAGGED[2]]) and pair != sampled([RAGGED[1], RAGGED[2]], seed=1)
    assert sampled([RAGGED[1]]) == pair[:1]  # alone
    assert sampled([RAGGED[3], RAGGED[2]])[1] == pair[1]  # beside another, longer one
    assert sampled([RAGGED[1], RAGGED[2]], n=5) == [row[:5] for row in pair]
    assert torch.equal(torch.get_rng_state(), global_state)


def test_neighbouring_seeds_share_no_samples():
    # a trainer that counts its seed up by one must not see last step's samples again, one row later
    model = exact_model()
    rows = [M.generate(model, [RAGGED[1]], 8, num_samples=4, seed=seed) for seed in (0, 1, 2)]
    assert len({tuple(row.tokens) for group in rows for row in group}) == 12


def test_seeds_and_steps_beyond_32_bits_give_other_draws():
    # rl.py's rounds have (seed << 20) + count; torch's generator on a CPU drops what is above 32 bits
    model, seeds = exact_model(), (0, 4096, 1 << 20, 7 << 20, 1 << 40)
    rows = [M.generate(model, [RAGGED[1]], 8, seed=seed)[0].tokens for seed in seeds]
    assert len(set(map(tuple, rows))) == len(seeds)
    x = torch.full((64,), 1.001)
    assert len({M.round_stochastically(x, t << 32 | 3).float().sum().item() for t in range(6)}) > 1
    assert [M.fold_seed(n) for n in (0, 5, 2**32 - 1)] == [0, 5, 2**32 - 1]


def test_stochastic_rounding_moves_all_weights_in_time_and_a_copied_optimizer_goes_on():
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = M.AdamW([p], 1e-4, weight_decay=0, moment_dtype=torch.float32, stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    for _ in range(50):
        optimizer.step()
    assert (p == 1).float().mean() < 0.5  # 0.974 where each step draws the same
    other = copy.deepcopy(optimizer)
    optimizer.step()
    other.param_groups[0]["params"][0].grad = torch.ones_like(p)
    other.step()
    assert torch.equal(other.param_groups[0]["params"][0], p)


@pytest.mark.parametrize("wrong", [{"rope_theta": 0.0}, {"norm_eps": -1.0}, {"norm_eps": math.nan}], ids=str)
def test_a_base_or_epsilon_that_no_model_has_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{[*wrong][0]} must be finite and above 0"):
        tiny(**wrong)


def test_a_text_is_no_list_of_prompts():
    with pytest.raises(ValueError, match="prompts must be a list, got the text 'def main'"):
        M.generate(exact_model(), "def main", 4)


@pytest.mark.parametrize("prompt", [[1, 2, 3], torch.tensor([1, 2, 3]), np.array([1, 2, 3])], ids=str)
def test_the_ids_of_one_prompt_are_no_list_of_prompts(prompt):
    with pytest.raises(ValueError, match=r"each prompt must be a list of ids, got .*1.*; put"):
        M.generate(exact_model(), prompt, 4)


def test_several_samples_of_a_prompt_come_in_order_differ_and_share_one_prefill():
    model, seen = exact_model(), []
    inner = model.hidden_states
    model.hidden_states = lambda ids, cache=None: seen.append(tuple(ids.shape)) or inner(ids, cache)
    rows = M.generate(model, RAGGED[:2], 6, num_samples=3)
    assert [row.prompt_index for row in rows] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(row.tokens) for row in rows}) == 6
    assert seen == [(2, 6)] + [(6, 1)] * 5
    del model.hidden_states
    with torch.no_grad():
        for row in rows:  # each sample's log-probabilities are those of its own continuation
            ids = torch.tensor([RAGGED[row.prompt_index] + row.tokens])
            logprobs = model(ids)[0].log_softmax(-1)[-7:-1].gather(-1, torch.tensor(row.tokens)[:, None])
            assert row.logprobs == pytest.approx(logprobs[:, 0].tolist(), abs=1e-5)  # float32


def test_logprobs_are_those_of_the_tempered_distribution_before_top_k_and_top_p():
    model = exact_model()
    row = M.generate(model, [RAGGED[1]], 10, temperature=0.5, top_k=5, top_p=0.8, seed=2)[0]
    with torch.no_grad():
        logits = model(torch.tensor([RAGGED[1] + row.tokens]))[0, 5:-1]
    expected = (logits / 0.5).log_softmax(-1).gather(-1, torch.tensor(row.tokens)[:, None])[:, 0]
    assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-5)  # float32


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    model = exact_model()
    greedy = [row.tokens for row in M.generate(model, RAGGED, 10, temperature=0)]
    assert [row.tokens for row in M.generate(model, RAGGED, 10, temperature=1.5, top_k=1)] == greedy
    assert [row.tokens for row in M.generate(model, RAGGED, 10, temperature=1.5, top_p=1e-6)] == greedy


def test_a_stop_id_ends_a_row_is_returned_and_is_no_part_of_the_text():
    model, tokenizer = exact_model(), PairTokenizer()
    free = M.generate(model, RAGGED, 10, temperature=0)
    stop = free[1].tokens[4]
    rows = M.generate(model, RAGGED, 10, temperature=0, stop_ids=[stop], tokenizer=tokenizer)
    for row, before in zip(rows, free, strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else None
        assert row.tokens == before.tokens[:end] and len(row.logprobs) == len(row.tokens)
        assert row.finish_reason == ("length" if end is None else "stop")
        assert row.text == tokenizer.decode(row.tokens if end is None else row.tokens[:-1])


def test_a_stop_string_that_spans_tokens_ends_a_row_and_its_text():
    model, tokenizer = exact_model(), PairTokenizer()
    free = M.generate(model, RAGGED, 10, temperature=0, tokenizer=tokenizer)
    for start, length in ((3, 2), (6, 5), (4, 4), (1, 1)):  # letters; a token is two of them
        stop = free[1].text[start : start + length]
        end = free[1].text.index(stop) + len(stop)
        row = M.generate(model, [RAGGED[1]], 10, temperature=0, stop_strings=["zz", stop],
                         tokenizer=tokenizer)[0]  # fmt: skip
        assert row.text == free[1].text[:end] and row.finish_reason == "stop"
        assert row.tokens == free[1].tokens[: math.ceil(end / 2)]  # no token more than needed


def test_prompts_may_be_strings_and_the_mode_of_the_model_is_kept():
    model, tokenizer = exact_model(), PairTokenizer()
    model.train()
    texts = [tokenizer.decode(p) for p in RAGGED]
    rows = M.generate(model, texts, 4, temperature=0, tokenizer=tokenizer)
    assert [r.tokens for r in rows] == [r.tokens for r in M.generate(model, RAGGED, 4, temperature=0)]
    assert model.training and all(p.grad is None for p in model.parameters())


def filtered(logits, temperature, top_k, top_p):
    """The distribution to draw from, token by token in float64: top-k, then the nucleus of the rest."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or None]
    kept, mass, total = [], 0.0, sum(p[i] for i in order)
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i]
    return torch.tensor([p[i] / mass if i in kept else 0.0 for i in range(len(p))])


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 5, 1.0),
                                                       (1.0, 0, 0.7), (1.3, 7, 0.8), (1.0, 99, 0.999)])  # fmt: skip
def test_the_frequencies_of_sample_are_the_filtered_probabilities(temperature, top_k, top_p):
    logits = torch.randn(20)
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n  # evenly spaced: each count is right to within one draw
    ids, logprobs = M.sample(logits.expand(n, 20), uniform, temperature, top_k, top_p)
    frequency = torch.bincount(ids, minlength=20) / n
    close(frequency, filtered(logits, temperature, top_k, top_p), rtol=0, atol=2 / n)
    close(logprobs, (logits / temperature).log_softmax(-1)[ids], **F32)


def test_sample_never_draws_what_has_no_probability_even_at_the_ends():
    logits = torch.tensor([-math.inf, 2.0, -math.inf, 1.0, -math.inf]).expand(3, 5)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])  # the least and the greatest that torch.rand gives
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.99)):
        ids, logprobs = M.sample(logits, uniform, 1.0, top_k, top_p)
        assert set(ids.tolist()) == {1, 3} and logprobs.isfinite().all()


@pytest.mark.parametrize("bad, named", [
    (dict(prompts=[[]]), "prompt"), (dict(prompts=[]), "prompt"), (dict(prompts=[[61]]), "61"),
    (dict(prompts=[[-1]]), "-1"), (dict(max_new_tokens=0), "max_new_tokens"), (dict(top_k=-1), "top_k"),
    (dict(temperature=-0.1), "temperature"), (dict(top_p=0.0), "top_p"), (dict(top_p=1.5), "top_p"),
    (dict(num_samples=0), "num_samples"), (dict(stop_strings=["x"]), "tokenizer"),
    (dict(stop_strings=["x", ""], tokenizer=object()), "must not be empty"),
    (dict(prompts=["x"]), "tokenizer"), (dict(stop_strings="ab"), "stop_strings must be a list"),
    (dict(temperature=1e-45), "temperature must be 0 or"),
])  # fmt: skip
def test_generation_refuses_what_it_cannot_do(bad, named):
    with pytest.raises(ValueError, match=named):
        M.generate(M.TransformerLM(tiny()), **{"prompts": [[1]], "max_new_tokens": 2, **bad})


@pytest.mark.parametrize("kind", [torch.tensor, np.array, iter], ids=["tensor", "array", "iterator"])
def test_prompts_and_stops_of_any_kind_of_sequence_are_those_of_a_list(kind):
    model, tokenizer, prompts = exact_model(), PairTokenizer(), [[1, 2, 3], [4, 5, 6]]
    expected = M.generate(model, prompts, 12, seed=1, tokenizer=tokenizer)
    stop_id, text = expected[0].tokens[4], expected[1].text
    stops = dict(stop_ids=[stop_id], stop_strings=[text[6:8]])
    expected = M.generate(model, prompts, 12, seed=1, tokenizer=tokenizer, **stops)
    got = M.generate(model, kind(prompts), 12, seed=1, tokenizer=tokenizer,
                     **{name: iter(value) for name, value in stops.items()})  # fmt: skip
    assert got == expected and any(row.finish_reason == "stop" for row in got)


# -------------------------------------------------------------------------------------------------
# safetensors


def some_tensors():
    return {
        "a": torch.randn(3, 5), "b.c": torch.randn(7).bfloat16(), "half": torch.randn(1, 3).half(),
        "d": torch.randn(2, 2, 2).double(), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "ids": torch.arange(3),
        "strided": torch.randn(4, 6).T, "last": torch.randn(9),
    }  # fmt: skip


def test_safetensors_files_are_those_of_the_safetensors_package_in_both_directions(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="the oracle of the file format")
    tensors = some_tensors()
    M.write_safetensors(tensors, tmp_path / "ours.safetensors")
    package.save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs.safetensors")
    for read in (package.load_file(tmp_path / "ours.safetensors"),
                 M.read_safetensors(tmp_path / "theirs.safetensors"),
                 M.read_safetensors(tmp_path / "ours.safetensors")):  # fmt: skip
        assert read.keys() == tensors.keys()
        for name, t in tensors.items():
            assert read[name].dtype == t.dtype and torch.equal(read[name], t), name


def test_safetensors_layout_by_hand(tmp_path):
    M.write_safetensors({"x": torch.tensor([1.0, -2.0])}, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header["x"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert raw[8 + length :] == struct.pack("<2f", 1.0, -2.0)
    assert (8 + length) % 8 == 0 and os.listdir(tmp_path) == ["x.safetensors"]


def test_safetensors_are_views_of_one_memory_map_and_writing_to_them_leaves_the_file(tmp_path):
    M.write_safetensors({"a": torch.ones(1000), "b": torch.ones(10)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    read = M.read_safetensors(tmp_path / "x.safetensors")
    assert read["b"].data_ptr() - read["a"].data_ptr() == 4000  # no copies: as far apart as in the file
    read["a"].zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_a_truncated_safetensors_file_is_refused_by_name_wherever_it_is_cut(tmp_path):
    path = tmp_path / "x.safetensors"
    M.write_safetensors({"a": torch.ones(8), "b": torch.ones(8)}, path)
    whole = path.read_bytes()
    for length in (0, 3, 8, 20, len(whole) - 64, len(whole) - 33, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.safetensors") as caught:
            M.read_safetensors(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [
    b"[1]", b"{", b'"x"', b'{"a": [1]}', b'{"a": {"dtype": "I3", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 40]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}',
])  # fmt: skip
def test_a_foreign_or_lying_safetensors_header_is_refused_by_name(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="x.safetensors"):
        M.read_safetensors(path)


def test_writing_safetensors_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    M.write_safetensors({"a": torch.ones(8)}, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        M.write_safetensors({"a": torch.zeros(8)}, path)
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------------------------
# Hugging Face directories

LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama with grouped heads, tied": (
        "LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama with wide heads": ("LlamaConfig", dict(head_dim=16, num_key_value_heads=1)),
    "llama 3 scaling": ("LlamaConfig", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16)),
}  # fmt: skip


def hf_random_model(family):
    transformers = pytest.importorskip("transformers", reason="the oracle of Hugging Face layouts")
    kind, options = FAMILIES[family]
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
                 tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1000.0))  # fmt: skip
    config = getattr(transformers, kind)(**{**shape, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():  # its own start is N(0, 0.02): too small for logits to tell
            p.normal_(0, 0.2) if p.dim() == 2 else p.add_(0.3 * torch.randn_like(p))
    return transformers, model


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_transformers_model_saved_to_disk_gives_the_same_logits_here(tmp_path, family, shards):
    _, theirs = hf_random_model(family)
    theirs.save_pretrained(tmp_path, **(dict(max_shard_size="20KB") if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    ids = tokens(2, 64)
    ours = M.from_pretrained(tmp_path)
    expected = theirs(ids).logits
    assert expected.std() > 0.3
    close(ours(ids), expected, **CONTRACT_LOGITS)
    close(M.from_pretrained(tmp_path, attention="eager")(ids), expected, **CONTRACT_LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_saved_here_gives_the_same_logits_in_transformers(tmp_path, family):
    transformers, theirs = hf_random_model(family)
    theirs.save_pretrained(tmp_path / "source")
    ours = randomised(M.from_pretrained(tmp_path / "source"))
    M.save_pretrained(ours, None, tmp_path / "export")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(back) is type(theirs)
    ids = tokens(2, 64)
    close(back(ids).logits.float(), ours(ids), **CONTRACT_LOGITS)


EXPORTABLE = [{}, dict(num_kv_heads=2, tie_embeddings=True), dict(qkv_bias=True), dict(qk_norm=True, d_head=6),
              dict(rope_scaling=LLAMA3, rope_theta=500.0)]  # fmt: skip


@pytest.mark.parametrize("changes", EXPORTABLE)
def test_export_and_import_give_back_config_and_weights_bit_for_bit(tmp_path, changes):
    model = randomised(M.TransformerLM(tiny(**changes)))
    M.save_pretrained(model, None, tmp_path)
    back = M.from_pretrained(tmp_path)
    assert back.config == M.ModelConfig(**{**vars(model.config), "rope_scaling": back.config.rope_scaling})
    assert (back.config.rope_scaling is None) == (model.config.rope_scaling is None)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], p), name
    ids = tokens(2, 32)
    assert torch.equal(back(ids), model(ids))
    assert all(p.requires_grad and p.is_leaf for p in back.parameters())
    back.loss(ids, ids).backward()
    assert all(p.grad is not None for p in back.parameters())


def test_weights_are_stored_and_read_in_the_dtype_that_is_asked_for(tmp_path):
    model = M.TransformerLM(tiny())
    M.save_pretrained(model, None, tmp_path, dtype=torch.bfloat16)
    kept = M.from_pretrained(tmp_path)
    wide = M.from_pretrained(tmp_path, dtype=torch.float32, context_length=16)
    for name, p in model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], p.bfloat16()), name
        assert wide.state_dict()[name].dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert wide.config.context_length == 16
    assert kept.layers[0].attn.rope.cos.dtype == torch.float32


def test_a_loaded_model_does_not_hang_on_its_files(tmp_path):
    model = M.TransformerLM(tiny())
    M.save_pretrained(model, None, tmp_path)
    back = M.from_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / "model.safetensors")))
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_configs_from_before_transformers_5_are_read_alike(tmp_path):
    M.save_pretrained(M.TransformerLM(tiny(rope_scaling=LLAMA3, rope_theta=500.0)), None, tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    new = M.config_from_hf(hf, "x")
    old = {name: value for name, value in hf.items() if name not in ("rope_parameters", "rope_scaling")}
    old |= dict(rope_theta=500.0, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert M.config_from_hf(old, "x").rope_theta == new.rope_theta == 500.0
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert M.config_from_hf(old, "x").rope_scaling[name] == new.rope_scaling[name]
    del old["rope_scaling"], old["head_dim"]
    plain = M.config_from_hf(old, "x")
    assert plain.rope_scaling is None and plain.d_head == 8


def refusal_of_a_changed_config(folder, change, named):
    M.save_pretrained(M.TransformerLM(tiny()), None, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named) as caught:
        M.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("change, named", [
    (dict(model_type="gpt2"), "gpt2"), (dict(hidden_act="gelu"), "gelu"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(attention_bias=True), "attention_bias"), (dict(use_sliding_window=True), "sliding_window"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn"),
    (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "linear"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)), "partial_rotary_factor 0.25"),
])  # fmt: skip
def test_architectures_that_are_not_ours_are_refused_by_name(tmp_path, change, named):
    assert str(tmp_path) in refusal_of_a_changed_config(tmp_path, change, named)


@pytest.mark.parametrize("change, named", [
    (dict(num_hidden_layers=1), r"model\.layers\.1\.input_layernorm\.weight and 11 more"),
    (dict(model_type="llama"), r"model\.layers\.0\.self_attn\.k_proj\.bias and 5 more"),
    (dict(tie_word_embeddings=True), r"got lm_head\.weight that"),
])  # fmt: skip
def test_tensors_that_the_config_does_not_account_for_are_refused_by_name(tmp_path, change, named):
    M.save_pretrained(M.TransformerLM(tiny(qkv_bias=True)), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=named) as caught:
        M.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_rotary_tables_a_tied_head_stored_twice_and_layers_left_on_purpose_are_no_loss(tmp_path):
    model = M.TransformerLM(tiny(tie_embeddings=True))
    M.save_pretrained(model, None, tmp_path)
    tensors = M.read_safetensors(tmp_path / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    M.write_safetensors(tensors, tmp_path / "more.safetensors")
    os.replace(tmp_path / "more.safetensors", tmp_path / "model.safetensors")
    assert same(M.from_pretrained(tmp_path), model)
    assert len(M.from_pretrained(tmp_path, num_layers=1).layers) == 1


@pytest.mark.parametrize("change, named", [
    (dict(hidden_size=None), "hidden_size as a whole number above 0, got None"),
    (dict(intermediate_size=None), "intermediate_size as a whole"), (dict(hidden_size="32"), "hidden_size.*'32'"),
    (dict(num_hidden_layers=True), "num_hidden_layers"), (dict(num_attention_heads=0), "num_attention_heads"),
    (dict(vocab_size=61.0), "vocab_size"), (dict(rms_norm_eps="small"), "rms_norm_eps as a number"),
    (dict(num_key_value_heads=3), "divide"), (dict(rope_parameters=dict(rope_theta="x")), "rope_theta as a number"),
    (dict(rope_parameters="llama3"), "object"),
    (dict(rope_parameters={k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}), "low_freq_factor"),
    (dict(rope_parameters={**LLAMA3, "factor": None}), "factor as a number above 0, got None"),
    (dict(rope_parameters={**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor below"),
])  # fmt: skip
def test_a_config_whose_numbers_are_none_is_refused_by_file_and_field(tmp_path, change, named):
    assert str(tmp_path / "config.json") in refusal_of_a_changed_config(tmp_path, change, named)


def test_fields_that_may_be_null_take_their_defaults(tmp_path):
    M.save_pretrained(M.TransformerLM(tiny()), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(head_dim=None, num_key_value_heads=None, tie_word_embeddings=None, rms_norm_eps=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = M.from_pretrained(tmp_path).config
    assert (read.d_head, read.num_kv_heads, read.tie_embeddings, read.norm_eps) == (8, 4, False, 1e-6)


@pytest.mark.parametrize("text, named", [
    ("{}", "weight_map"), ('{"weight_map": ', "whole JSON"), ("[1]", "JSON object"),
    ('{"weight_map": ["a"]}', "weight_map"), ('{"weight_map": {}}', "weight_map"),
    ('{"weight_map": {"lm_head.weight": 3}}', "must exist"), ('{"weight_map": {"lm_head.weight": "a"}}', "must exist"),
])  # fmt: skip
def test_a_damaged_index_of_shards_is_refused_by_file_and_what_must_hold(tmp_path, text, named):
    M.save_pretrained(M.TransformerLM(tiny()), None, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=named) as caught:
        M.from_pretrained(tmp_path)
    assert "model.safetensors.index.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [dict(norm="post"), dict(norm="none"), dict(pos="none"), dict(ffn="silu"),
                                     dict(qkv_bias=True, qk_norm=True)])  # fmt: skip
def test_a_shape_that_no_hugging_face_model_has_is_not_exported(tmp_path, changes):
    with pytest.raises(ValueError, match="Hugging Face"):
        M.save_pretrained(M.TransformerLM(tiny(**changes)), None, tmp_path / "out")


def test_damaged_model_folders_are_refused_by_what_is_wrong(tmp_path):
    def folder(name):
        M.save_pretrained(M.TransformerLM(tiny()), None, tmp_path / name)
        return tmp_path / name

    def refused(path, named):
        with pytest.raises(ValueError, match=named) as caught:
            M.from_pretrained(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path, "config.json")
    path = folder("no weights")
    (path / "model.safetensors").unlink()
    refused(path, "model.safetensors")
    path = folder("truncated")
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[:-10])
    refused(path, "model.safetensors")
    path = folder("a tensor less")
    tensors = M.read_safetensors(path / "model.safetensors")
    M.write_safetensors({n: t for n, t in tensors.items() if n != "model.norm.weight"},
                        path / "model.safetensors")  # fmt: skip
    refused(path, "model.norm.weight")
    path = folder("another width")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused(path, r"mlp\.\w+\.weight.*\(64, 32\).*\(48, 32\)|mlp\.\w+\.weight")
    path = folder("a config without widths")
    (path / "config.json").write_text('{"model_type": "llama"}')
    refused(path, "config.json|vocab_size")
    path = folder("a broken config")
    (path / "config.json").write_text('{"model_type": ')
    refused(path, "config.json")
    path = folder("an index that leaves the folder")
    os.rename(path / "model.safetensors", tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "index")


# -------------------------------------------------------------------------------------------------
# accounting


GRID = [
    dict(zip(("num_kv_heads", "tie_embeddings", "qkv_bias", "qk_norm", "norm", "pos", "ffn"), v, strict=True))
    for v in itertools.product((4, 1), (False, True), (False, True), (False, True), ("pre", "post", "none"),
                               ("rope", "none"), ("swiglu", "silu"))
]  # fmt: skip


def test_count_parameters_equals_the_real_model_over_a_grid_of_configs():
    for changes in GRID + [dict(d_head=10), dict(d_head=16, num_kv_heads=2), dict(num_layers=3, d_ff=7)]:
        config = tiny(**changes)
        with torch.device("meta"):
            model = M.TransformerLM(config)
        assert sum(M.count_parameters(config).values()) == sum(p.numel() for p in model.parameters()), changes


def test_parameters_of_the_gpt2_preset_by_hand():
    parts = M.count_parameters(M.ModelConfig(**M.PRESETS["gpt2"]))
    assert parts == {
        "token_embeddings": 50_257 * 768, "attention": 12 * 4 * 768**2,
        "feed-forward": 12 * 3 * 768 * 2048, "norms": 25 * 768, "lm_head": 50_257 * 768,
    }  # fmt: skip


def test_every_preset_is_a_valid_shape_of_about_the_size_in_its_name():
    def billions(name):
        return sum(M.count_parameters(M.ModelConfig(**M.PRESETS[name])).values()) / 1e9

    sizes = {name: billions(name) for name in M.PRESETS}
    assert sizes["small"] < sizes["medium"] < sizes["large"] < 1 < sizes["xl"] < sizes["10B"]
    assert 8 < sizes["10B"] < 14 and 1.5 < sizes["gpt2-xl"] < 1.8


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=2), dict(d_head=16), dict(ffn="silu"),
                                     dict(tie_embeddings=True, num_kv_heads=1, d_ff=40)])  # fmt: skip
def test_count_matmul_flops_equals_what_torch_counts_in_a_real_forward_pass(changes):
    config = tiny(attention="eager", **changes)  # FlopCounterMode does not see inside the CPU's sdpa
    model = M.TransformerLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(3, 32))
    assert sum(M.count_matmul_flops(config, 3).values()) == counter.get_total_flops()


def test_matmul_flops_by_hand_and_the_causal_half():
    # C = 32, 4 query heads and 2 key heads of 8, F = 48
    config = tiny(num_layers=1, num_kv_heads=2, context_length=8)
    N, parts = 2 * 8, M.count_matmul_flops(config, 2)
    assert parts == {
        "q, k, v projections": 2 * N * 32 * (32 + 16 + 16), "attention scores": 2 * N * 8 * 32,
        "attention values": 2 * N * 8 * 32, "output projection": 2 * N * 32 * 32,
        "feed-forward": 2 * N * 3 * 32 * 48, "lm_head": 2 * N * 32 * 61,
    }  # fmt: skip
    causal = M.count_matmul_flops(config, 2, causal=True)
    assert causal["attention scores"] == N * 8 * 32 and causal["lm_head"] == parts["lm_head"]
    assert M.flops_per_token(config) == pytest.approx(3 * sum(causal.values()) / N)


MEMORY_CONFIGS = {
    **{name: VARIANTS[name] for name in VARIANTS if name not in ("tied embeddings", "another base and epsilon")},
    "eager": dict(attention="eager"),
    "eager, grouped heads": dict(attention="eager", num_kv_heads=1),
    "eager, wide heads": dict(attention="eager", d_head=32, num_kv_heads=2),
}


def memory_config(**changes):
    return tiny(**{**dict(d_model=64, d_ff=176, context_length=96, num_layers=3), **changes})


def saved_bytes(model, dtype):
    """What autograd really keeps of the blocks for the backward pass of a batch of 3."""
    x = torch.randn(3, 96, 64).to(dtype).requires_grad_()
    cast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with cast, kept_by_autograd(model) as kept:
        y = M.recompute_blocks(list(model.layers), x, ())
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("name, dtype", [
    (name, dtype) for name in MEMORY_CONFIGS for dtype in (torch.float32, torch.bfloat16)
    # a CPU's autocast keeps exp in bfloat16, CUDA's in float32: the test on CUDA has that case
    if dtype == torch.float32 or "eager" not in name
])  # fmt: skip
def test_estimated_activations_are_within_a_tenth_of_what_autograd_saves(name, dtype):
    config = memory_config(**MEMORY_CONFIGS[name])
    estimate = M.estimate_memory(config, 3, dtype=dtype)["activations of the blocks"]
    assert estimate == pytest.approx(saved_bytes(M.TransformerLM(config), dtype), rel=0.1)


class Live(TorchDispatchMode):
    """Follows the bytes of all storages made inside that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive and key not in held:
                    self.alive.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, key, size)
        return result

    def drop(self, key, size):
        self.alive.discard(key)
        self.now -= size


def peak_of_a_pass(config, spans, level="none"):
    """(bytes kept by the forward pass, peak bytes of forward and backward without any gradient kept)"""
    model = M.TransformerLM(config)
    model.recompute([level] * config.num_layers)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x = torch.randn(3, 96, 64, requires_grad=True)
    with Live() as live:
        y = M.recompute_blocks(list(model.layers), x, spans)
        kept = live.now - y.numel() * 4
        y.sum().backward()
    return kept, live.peak


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_estimated_activations_under_gradient_checkpointing_are_within_a_tenth_of_the_peak(attention):
    config = memory_config(num_layers=8, attention=attention)
    x_bytes = 3 * 96 * 64 * 4
    kept, peak = peak_of_a_pass(config, ())
    working = peak - kept  # the backward pass's own temporaries, which are no activations
    for spans, inputs in (((1,), 8), ((2,), 4), ((3,), 3), ((8,), 1), ((4, 1), 2), ((4, 2), 2), ((8, 4, 1), 1)):
        kept, peak = peak_of_a_pass(config, spans)
        assert kept <= inputs * x_bytes  # the first input was made outside
        estimate = M.estimate_memory(config, 3, checkpoint_every=spans)["activations of the blocks"]
        assert estimate == pytest.approx(peak - working + x_bytes, rel=0.1), spans


@pytest.mark.parametrize("changes", [{}, {"attention": "eager"}, {"ffn": "silu"}, {"num_kv_heads": 1}], ids=str)
def test_estimated_activations_of_each_level_of_recomputation_are_what_is_kept(changes):
    config = memory_config(num_layers=8, **changes)
    a_block = M.estimate_memory(config, 3)["activations of the blocks"] / 8
    sizes = []
    for level in M.RECOMPUTE[1:]:
        kept, _ = peak_of_a_pass(config, (), level)
        estimate = M.estimate_memory(config, 3, levels=[level] * 8)["activations of the blocks"] - a_block
        assert kept <= estimate <= 1.4 * kept + 3 * 96 * 64 * 4, level  # the first input was made outside
        sizes.append(kept)
    assert 8 * a_block > sizes[0] > sizes[1] > sizes[2]


def test_as_little_is_computed_again_as_fits_into_memory():
    cost = {"none": 10, "cheap": 7, "ffn": 3, "block": 1}
    found = {free: M.least_recomputation(4, lambda levels: sum(cost[level] for level in levels), free)
             for free in (40, 39, 28, 27, 24, 20, 11, 10, 3)}  # fmt: skip
    assert found == {
        40: ("none",) * 4, 39: ("cheap",) * 4, 28: ("cheap",) * 4, 27: ("ffn",) + ("cheap",) * 3,
        24: ("ffn",) + ("cheap",) * 3, 20: ("ffn",) * 2 + ("cheap",) * 2, 11: ("block",) + ("ffn",) * 3,
        10: ("block",) + ("ffn",) * 3, 3: ("block",) * 4,
    }  # fmt: skip


def test_bfloat16_weights_and_moments_take_half_the_memory():
    config, half = tiny(), torch.bfloat16
    n = sum(M.count_parameters(config).values())
    for moments, bytes_each in ((None, 2), (torch.float32, 4)):
        parts = M.estimate_memory(config, 2, half, param_dtype=half, moment_dtype=moments)
        assert [parts[k] / n for k in ("parameters", "gradients", "optimizer (m and v)")] == [2, 2, 2 * bytes_each]
        assert parts["weights cast to bfloat16"] == 0


def test_memory_of_weights_gradients_and_optimizer_is_sixteen_bytes_a_parameter():
    config = tiny()
    n = sum(M.count_parameters(config).values())
    parts = M.estimate_memory(config, 2)
    assert (parts["parameters"], parts["gradients"], parts["optimizer (m and v)"]) == (4 * n, 4 * n, 8 * n)


def test_the_largest_batch_fits_and_one_more_does_not():
    config = tiny(context_length=128)
    for budget in (2**22, 2**26, 2**28):
        best = M.largest_batch(config, budget)
        if best:
            assert sum(M.estimate_memory(config, best).values()) <= budget
        assert sum(M.estimate_memory(config, best + 1).values()) > budget
    assert M.largest_batch(config, 1000) == 0


# -------------------------------------------------------------------------------------------------
# command line

SHAPE = "--vocab_size 61 --context_length 16 --d_model 32 --num_layers 2 --num_heads 4 --d_ff 48"


def run(arguments, capsys):
    M.main(arguments.split() if isinstance(arguments, str) else arguments)
    return capsys.readouterr().out


def test_count_prints_parts_that_add_up_and_the_time_of_a_step(capsys):
    out = run(f"count {SHAPE} --batch_size 2 --peak_tflops 0.001 --utilisation 0.5", capsys)
    config = M.ModelConfig(61, 16, 32, 2, 4, d_ff=48)
    parameters, flops = M.count_parameters(config), sum(M.count_matmul_flops(config, 2).values())
    for part, value in parameters.items():
        assert any(line.split()[: len(part.split())] == part.split() and f"{value:,}" in line
                   for line in out.splitlines()), part  # fmt: skip
    assert f"{sum(parameters.values()):,}" in out
    assert f"{3 * flops / 0.5e9 * 1e3:,.1f} ms" in out
    for part in M.count_matmul_flops(config):
        assert part in out
    for part in M.estimate_memory(config, 2):
        assert part in out


def test_count_takes_presets_which_other_flags_override(capsys):
    assert f"{sum(M.count_parameters(M.ModelConfig(**M.PRESETS['gpt2-xl'])).values()):,}" in run(
        "count --preset gpt2-xl", capsys)  # fmt: skip
    out = run("count --preset gpt2 --num_layers 3 --context_length 16384 --tie_embeddings", capsys)
    config = M.ModelConfig(**{**M.PRESETS["gpt2"], "num_layers": 3, "tie_embeddings": True})
    assert f"{sum(M.count_parameters(config).values()):,}" in out and "16384" in out


def test_the_memory_that_count_prints_falls_with_checkpointing(capsys):
    plain = run("count --preset gpt2 --batch_size 4", capsys)
    less = run("count --preset gpt2 --batch_size 4 --checkpoint_every 1", capsys)

    def gib(out):
        (line,) = [line for line in out.splitlines() if "activations" in line]
        return float(line.split("GiB")[0].split()[-1].replace(",", ""))

    assert gib(less) < gib(plain) / 3


def test_count_says_memory_as_so_much_a_sequence_and_so_much_besides(capsys):
    for flags in ("--preset gpt2-xl --batch_size 8 --attention eager --d_ff 6400", "--preset gpt2 --batch_size 3"):
        out = run(f"count {flags}", capsys)
        (line,) = [line for line in out.splitlines() if line.startswith("memory about this batch")]
        each, besides = (float(x) for x in re.findall(r"([0-9.]+) GiB", line))
        config = M.config_from_flags(M.build_parser().parse_args(f"count {flags}".split()))
        for batch in ((8, 9) if "xl" in flags else (3, 4)):
            used = sum(M.estimate_memory(config, batch).values()) / 2**30
            assert abs(batch * each + besides - used) < 0.01 + batch * 1e-3  # what is printed is rounded


def bench(flags, capsys):
    out = run(f"bench {SHAPE} --batch_size 2 --warmup_steps 1 --repeats 2 --device cpu {flags}", capsys)
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("mode, parts", [
    ("forward", {"forward", "total"}), ("backward", {"forward", "backward", "total"}),
    ("step", {"forward", "backward", "optimizer", "total"}),
])  # fmt: skip
def test_bench_times_one_mode_and_ends_in_one_json_line(capsys, mode, parts):
    out, result = bench(f"--mode {mode}", capsys)
    assert set(result["results"]) == {mode} and parts <= set(result["results"][mode])
    for part in parts:
        row = result["results"][mode][part]
        assert row["mean_ms"] > 0 and row["median_ms"] > 0 and row["std_ms"] >= 0
    assert f"{mode:<9}|" in out and "torch" in out


def test_bench_runs_every_mode_with_bfloat16_checkpointing_and_full_logits(capsys):
    out, result = bench("--dtype bfloat16 --checkpoint_every 1 --full_logits --show_dtypes", capsys)
    assert list(result["results"]) == ["forward", "backward", "step"] and result["dtype"] == "bfloat16"
    dtypes = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    dtypes = {name.strip(): dtype for name, dtype in dtypes.items()}
    assert dtypes["q_proj output"] == dtypes["feed-forward output"] == "torch.bfloat16"
    assert dtypes["parameters"] == dtypes["gradients"] == dtypes["loss"] == "torch.float32"


def test_bench_counts_all_the_time_of_the_forward_pass(capsys, monkeypatch):
    inner = M.TransformerLM.hidden_states

    def slow(*args):
        time.sleep(0.02)
        return inner(*args)

    monkeypatch.setattr(M.TransformerLM, "hidden_states", slow)
    _, result = bench("--mode step", capsys)
    row = result["results"]["step"]
    # sleep never takes less than it is told to: bounds from below alone
    assert row["forward"]["mean_ms"] >= 20 and row["total"]["mean_ms"] >= 20


def test_count_says_what_auto_chose_and_bench_names_it(capsys):
    M.main("count --preset small --batch_size 64 --recompute auto --memory_gib 36".split())
    assert "; recompute: cheap in " in capsys.readouterr().out
    _, answer = bench("--mode forward --recompute cheap", capsys)
    assert list(answer["recompute"]) == ["cheap"] and answer["attention"] == "sdpa"


def test_bench_prints_a_kernel_table_and_leaves_no_trace(capsys):
    out, _ = bench("--attention eager --mode backward --profile", capsys)
    assert "aten::" in out and "# of Calls" in out
    assert M.ANNOTATE is False  # later work in this process is not annotated


def test_scores_softmax_and_values_are_named_ranges_for_the_profiler(monkeypatch):
    monkeypatch.setattr(M, "ANNOTATE", True)
    q = torch.randn(2, 4, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        M.scaled_dot_product_attention(q, q, q)
    names = {event.key for event in profiler.key_averages()}
    assert {"attention scores", "attention softmax", "attention values"} <= names


@pytest.mark.parametrize("arguments, named", [
    ("count --nope 1", "--nope"), ("count --preset nope", "nope"), ("nope", "nope"), ("", "verb"),
    ("count --d_model 10 --num_heads 3", "d_model"), ("count --norm batch", "norm"),
    ("count --batch_size 0", "batch_size"), ("count --batch_size -3", "batch_size"),
    ("count --checkpoint_every 1 --recompute ffn", "leave one out"),
    (f"bench {SHAPE} --device cpu --attention flash --recompute auto --checkpoint_every 1", "leave one out"),
    ("count --checkpoint_every 0", "checkpoint_every"), ("count --checkpoint_every -1", "checkpoint_every"),
    ("count --utilisation 0", "utilisation"), ("count --peak_tflops 0", "peak_tflops"),
    (f"bench {SHAPE} --device tpu", "tpu"), (f"bench {SHAPE} --device cpu --batch_size 0", "batch_size"),
    (f"bench {SHAPE} --device cpu --repeats 0", "repeats"),
    (f"bench {SHAPE} --device cpu --mode forward --checkpoint_every 0", "checkpoint_every"),
    (f"bench {SHAPE} --device cpu --memory_snapshot x", "memory_snapshot"),
])  # fmt: skip
def test_bad_flags_end_in_one_line_and_exit_code_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as caught:
        M.main(arguments.split())
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in last and named in last


@pytest.fixture
def pair_tokenizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "bpe", types.SimpleNamespace(Tokenizer=PairTokenizer))
    return PairTokenizer()


def test_generate_prints_text_from_a_model_folder(tmp_path, capsys, pair_tokenizer):
    model = M.TransformerLM(tiny(context_length=16))
    M.save_pretrained(model, pair_tokenizer, tmp_path)
    prompt = pair_tokenizer.decode([4, 5, 6])
    flags = ["generate", "--model", str(tmp_path), "--prompt", prompt, "--max_new_tokens", "6", "--device", "cpu"]
    out = run([*flags, "--temperature", "0", "--ignore_end"], capsys)
    expected = M.generate(model, [[4, 5, 6]], 6, temperature=0, tokenizer=pair_tokenizer)[0]
    assert out.strip() == prompt + expected.text
    several = run([*flags, "--num_samples", "2", "--prompt", "aA", "--seed", "3"], capsys)
    assert several.count("--- prompt 0") == several.count("--- prompt 1") == 2
    assert several == run([*flags, "--num_samples", "2", "--prompt", "aA", "--seed", "3"], capsys)
    stop = expected.text[1:3]
    out = run([*flags, "--temperature", "0", "--ignore_end", "--stop", stop], capsys)
    assert out.strip() == prompt + expected.text[: expected.text.index(stop) + 2]


def save_run_folder(path, model, tokenizer):
    """What train.py leaves: checkpoint.pt, and model/ in Hugging Face layout."""
    M.save_checkpoint(model, None, 5, path / "checkpoint.pt", config=vars(model.config))
    M.save_pretrained(model, tokenizer, path / "model")


def test_export_writes_a_model_folder_from_a_checkpoint_and_its_run_folder(tmp_path, capsys, pair_tokenizer):
    model = M.TransformerLM(tiny())
    (tmp_path / "run").mkdir()
    save_run_folder(tmp_path / "run", model, pair_tokenizer)
    for i, source in enumerate(("run", "run/checkpoint.pt", "run/model")):
        out = run(["export", "--model", str(tmp_path / source), "--out_dir", str(tmp_path / f"hf{i}")], capsys)
        assert f"{sum(p.numel() for p in model.parameters()):,}" in out
        assert same(M.from_pretrained(tmp_path / f"hf{i}"), model)
        assert (tmp_path / f"hf{i}" / "tokenizer.json").exists()
    run(["export", "--model", str(tmp_path / "run"), "--out_dir", str(tmp_path / "b"), "--dtype", "bfloat16"], capsys)
    assert M.from_pretrained(tmp_path / "b").lm_head.weight.dtype == torch.bfloat16


def test_where_a_text_ends_is_kept_from_a_model_folder_to_its_export(tmp_path, capsys, pair_tokenizer):
    model = exact_model()
    M.save_pretrained(model, pair_tokenizer, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    flags = ["generate", "--device", "cpu", "--temperature", "0", "--prompt", "aA", "--max_new_tokens", "8", "--model"]
    text = run([*flags, str(tmp_path / "a")], capsys).strip()
    third = pair_tokenizer.encode(text)[3]  # of the tokens after the prompt
    config.update(bos_token_id=1, eos_token_id=[59, third])  # as Llama 3 has several
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    assert text.startswith(run([*flags, str(tmp_path / "a")], capsys).strip() + pair_tokenizer.decode([third]))
    run(["export", "--model", str(tmp_path / "a"), "--out_dir", str(tmp_path / "b")], capsys)
    exported = json.loads((tmp_path / "b/config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (1, [59, third])


def test_a_folder_keeps_no_generation_settings_of_the_model_before(tmp_path):
    model = M.TransformerLM(tiny())
    model.generation_config = {"eos_token_id": 7}
    M.save_pretrained(model, None, tmp_path)
    assert M.from_pretrained(tmp_path).generation_config == {"eos_token_id": 7}
    M.save_pretrained(M.TransformerLM(tiny()), None, tmp_path)
    assert M.from_pretrained(tmp_path).generation_config == {}


def test_without_a_prompt_a_text_begins_as_the_models_own_do(tmp_path, capsys):
    bpe = pytest.importorskip("bpe")
    vocab = {i: bytes([i]) for i in range(256)}
    tokenizer = bpe.Tokenizer(vocab, [], ["<|begin_of_text|>", "<|end_of_text|>"])
    model = M.TransformerLM(tiny(vocab_size=258))
    model.text_bounds = {"bos_token_id": 256, "eos_token_id": 257}
    M.save_pretrained(model, tokenizer, tmp_path)
    flags = ["generate", "--model", str(tmp_path), "--device", "cpu", "--max_new_tokens", "6"]
    assert run(flags, capsys) == run([*flags, "--prompt", "<|begin_of_text|>"], capsys)
    assert "<|" not in run(flags, capsys)


def test_a_token_that_a_reader_is_shown_does_not_end_a_text():
    tokenizer = PairTokenizer()
    tokenizer.special_tokens, tokenizer.shown_tokens = ["<|endoftext|>", "aA"], {"aA"}
    assert M.end_ids(M.TransformerLM(tiny()), tokenizer) == (60,)


def test_an_exported_tokenizer_names_its_end_of_text_token(tmp_path):
    M.save_pretrained(M.TransformerLM(tiny()), PairTokenizer(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 60
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_generate_and_export_refuse_what_is_not_there_in_one_line(tmp_path, capsys, pair_tokenizer):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    M.save_pretrained(M.TransformerLM(tiny()), None, tmp_path / "no tokenizer")
    for arguments, named in (
        (["generate", "--model", str(tmp_path / "none")], "none"),
        (["generate", "--model", str(tmp_path)], "checkpoint.pt"),
        (["generate", "--model", str(tmp_path / "no tokenizer"), "--device", "cpu"], "tokenizer.json"),
        (["export", "--model", str(tmp_path / "none"), "--out_dir", str(tmp_path / "x")], "none"),
    ):
        with pytest.raises(SystemExit) as caught:
            M.main(arguments)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.count("\n") == 1 and named in err


def test_generate_and_export_work_with_the_real_tokenizer(tmp_path, capsys):
    bpe = pytest.importorskip("bpe", reason="bpe.py is not there yet")
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"<|endoftext|>"}
    tokenizer = bpe.Tokenizer(vocab, [], ["<|endoftext|>"])
    (tmp_path / "run").mkdir()
    save_run_folder(tmp_path / "run", M.TransformerLM(tiny(vocab_size=257)), tokenizer)
    flags = ["--max_new_tokens", "5", "--device", "cpu", "--prompt", "def f("]
    assert run(["generate", "--model", str(tmp_path / "run"), *flags], capsys).startswith("def f(")
    run(["export", "--model", str(tmp_path / "run"), "--out_dir", str(tmp_path / "hf")], capsys)
    assert bpe.Tokenizer.load(tmp_path / "hf" / "tokenizer.json").encode("a<|endoftext|>") == [97, 256]


def test_devices_and_dtypes_are_resolved_with_a_reason_for_each_fallback():
    cpu = M.resolve_device("cpu")
    assert cpu == torch.device("cpu")
    assert M.resolve_dtype("float32", cpu) == (torch.float32, None)
    dtype, reason = M.resolve_dtype("auto", cpu)
    assert dtype == torch.float32 and "bfloat16" in reason
    assert "not compiled" in M.compile_problem(cpu) and M.peak_flops(cpu) is None
    with pytest.raises(ValueError, match="abacus"):
        M.resolve_device("abacus")


# -------------------------------------------------------------------------------------------------
# on a GPU


@needs_cuda
def test_cuda_bfloat16_forward_is_close_to_float32_on_the_cpu():
    model = M.TransformerLM(tiny(d_model=128, num_layers=4, num_kv_heads=2))
    ids = tokens(4, 32)
    expected = model(ids).double()
    model.cuda()
    # float32 without TF32: rounding of some 100 terms in other orders, 4 blocks
    assert relative_error(model(ids.cuda()).cpu(), expected) < 1e-5
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(ids.cuda())
    assert logits.dtype == torch.bfloat16
    # some 40 roundings in sequence, each at most half of BF16_EPS, add up like their square root
    assert relative_error(logits.cpu(), expected) < 10 * BF16_EPS


@needs_cuda
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 3 * BF16_EPS)])
def test_cuda_linear_cross_entropy_equals_float64(dtype, error):
    # 1e-5 is the contract's; in bfloat16 probabilities, products and the stored gradient are rounded
    h0, w0, targets = torch.randn(300, 64).to(dtype), torch.randn(1000, 64), torch.randint(1000, (300,))
    targets[::7] = -100
    hidden, weight = h0.cuda().requires_grad_(), w0.cuda().requires_grad_()
    loss = M.linear_cross_entropy(hidden, weight, targets.cuda(), chunk=77)
    loss.backward()
    h, w = double(h0), double(w0.to(dtype))
    expected = plain_loss(h, w, targets)
    expected.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=max(error / 4, 1e-5))
    assert relative_error(hidden.grad.cpu(), h.grad) < error
    assert relative_error(weight.grad.cpu(), w.grad) < error


@needs_cuda
def test_cuda_batches_are_those_of_the_cpu():
    dataset = np.random.default_rng(0).integers(0, 60_000, 5000).astype(np.uint16)
    pairs = [M.get_batch(dataset, 4, 16, device, torch.Generator().manual_seed(3)) for device in ("cpu", "cuda")]
    for a, b in zip(*pairs, strict=True):
        assert b.is_cuda and b.dtype == torch.int64 and torch.equal(a, b.cpu())


@needs_cuda
def test_cuda_adamw_equals_torch():
    ours, theirs = both = two_optimizers(device="cuda")
    take_steps(both, range(50))
    for a, b in zip(ours[1], theirs[1], strict=True):
        close(a.data, b.data, **CONTRACT_ADAMW)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_fused_adamw_equals_the_foreach_one_and_takes_views_and_strides(dtype, monkeypatch):
    def start(i, seed):  # the last two cannot be fused: not aligned, not contiguous
        x = torch.randn(shapes[i], generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        return torch.cat([x.new_zeros(1), x.flatten()])[1:] if i == 3 else x.T if i == 4 else x

    shapes = [(5000, 3), (4096,), (1,), (33,), (8, 6)]
    results = []
    for fusable in (M._fusable, lambda *lists: False):
        monkeypatch.setattr(M, "_fusable", fusable)
        params = [torch.nn.Parameter(start(i, i)) for i in range(5)]
        if len(results) == 0:
            assert [fusable(g, g, g, g) for g in (params[:3], params[3:4], params[4:])] == [True, False, False]
        optimizer = M.AdamW([dict(params=[p]) for p in params[3:]] + [dict(params=params[:3])], lr=0.01)
        for t in range(20):
            for i, p in enumerate(params):
                p.grad = start(i, 100 * t + i)
            optimizer.step()
        results.append([p.detach().double() for p in params])
    for a, b in zip(*results, strict=True):  # bfloat16 is rounded once a step, not at every operation
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 3e-2)


@needs_cuda
def test_cuda_compiled_model_gives_the_same_loss_and_gradients():
    pytest.importorskip("triton", reason="torch.compile needs triton on CUDA")
    model = M.TransformerLM(tiny(d_model=64)).cuda()
    ids, targets = tokens(2, 32).cuda(), tokens(2, 32).cuda()

    def gradients(hidden_states):
        loss = M.linear_cross_entropy(hidden_states(ids), model.lm_head.weight, targets)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for a, b in zip(gradients(torch.compile(model.hidden_states)), gradients(model.hidden_states), strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)  # fused kernels add in another order


@needs_cuda
def test_cuda_greedy_with_the_cache_equals_greedy_without():
    model = exact_model().cuda()
    cached = M.generate(model, RAGGED, 40, temperature=0)
    plain = M.generate(model, RAGGED, 40, temperature=0, use_cache=False)
    assert [row.tokens for row in cached] == [row.tokens for row in plain]


@needs_cuda
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_cuda_generation_by_graph_gives_the_tokens_of_the_plain_loop(attention, monkeypatch):
    if attention == "flash":
        pytest.importorskip("triton", reason="flash attention needs triton")
    model = exact_model(num_kv_heads=2, d_head=16, attention=attention)
    check_fixed_shapes(model.float().cuda(), monkeypatch)


@needs_cuda
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cuda_estimated_activations_in_bfloat16_are_within_a_tenth_of_what_autograd_saves(attention):
    config = memory_config(attention=attention)
    model = M.TransformerLM(config).cuda()
    x = torch.randn(3, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16), kept_by_autograd(model) as kept:
        y = M.recompute_blocks(list(model.layers), x, ())
    assert y.requires_grad
    saved = sum(t.untyped_storage().nbytes() for t in kept.values())
    estimate = M.estimate_memory(config, 3, dtype=torch.bfloat16)["activations of the blocks"]
    assert estimate == pytest.approx(saved, rel=0.1)


@needs_cuda
def test_cuda_bench_reports_peak_memory_and_writes_a_snapshot(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--batch_size 2 --warmup_steps 1 --repeats 2 --device cuda --dtype bfloat16 --mode step"
    out = run(f"bench {SHAPE} {flags} --attention eager --profile --memory_snapshot s.pickle", capsys)
    assert json.loads(out.splitlines()[-1])["results"]["step"]["peak_gib"] is not None
    assert any(name.endswith("s.pickle") for name in os.listdir(tmp_path))
    compiled = run(f"bench {SHAPE} {flags} --compile", capsys)
    assert json.loads(compiled.splitlines()[-1])["compile"] is True
