"""The Transformer language model, and everything whose value must agree between the scripts.

    python model.py count --preset gpt2-xl               # parameters, FLOPs and memory by part
    python model.py bench --preset small --batch_size 4  # time of forward, backward and step
    python model.py generate --prompt "def main("        # text from what train.py left in out/
    python model.py export --model out --out_dir hf      # the same model for transformers or vLLM

From scratch: layers, attention, loss, optimizer, schedule, sampling and the safetensors format are
written out below on torch tensors; torch.nn gives Module and Parameter only. `attention="sdpa"` is
the one named exception: PyTorch's fused kernel, with `"eager"` as its oracle.

Sources
[1] CS336 assignment 1 (basics) and 2 (systems) handouts, Stanford 2025 and 2026
[2] Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762
[3] Su et al. 2021, RoFormer (rotary position embedding), arXiv 2104.09864
[4] Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467
[5] Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202
[6] Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv 1711.05101
[7] Ainslie et al. 2023, GQA, arXiv 2305.13245
[8] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration (top-p), arXiv 1904.09751
[9] Llama 3.1 reference code: the "llama3" scaling of rotary frequencies

Dims: B batch, T time, C d_model, H query heads, G key/value heads, D d_head, F d_ff, V vocab_size,
N tokens (B*T flattened), L layers.
"""

import argparse
import bisect
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
import zipfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

CHOICES = {"pos": ("rope", "none"), "norm": ("pre", "post", "none"), "ffn": ("swiglu", "silu"),
           "attention": ("eager", "sdpa", "flash")}

# Shapes that the handouts name: [1] A1 transformer_accounting (gpt2*), A2 table of model sizes.
PRESETS = {
    name: dict(zip(("d_model", "num_layers", "num_heads", "d_ff", "context_length", "vocab_size"),
                   shape, strict=True))
    for name, *shape in (
        ("tinystories", 512, 4, 16, 1344, 256, 10_000),
        ("gpt2", 768, 12, 12, 2048, 1024, 50_257),
        ("gpt2-medium", 1024, 24, 16, 2752, 1024, 50_257),
        ("gpt2-large", 1280, 36, 20, 3392, 1024, 50_257),
        ("gpt2-xl", 1600, 48, 25, 4288, 1024, 50_257),
        ("small", 768, 12, 12, 3072, 512, 10_000),
        ("medium", 1024, 24, 16, 4096, 512, 10_000),
        ("large", 1280, 36, 20, 5120, 512, 10_000),
        ("xl", 2560, 32, 32, 10_240, 512, 10_000),
        ("10B", 4608, 50, 36, 12_288, 512, 10_000),
        ("8B", 4096, 34, 32, 11_008, 32_768, 151_936),  # the leaderboard of 2026
    )
}

# Dense bf16 matrix rate in FLOP/s by a word of the device's name (vendors' datasheets).
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "4090": 165e12, "3090": 71e12, "L4": 121e12, "A10": 125e12}

# What 2 CPU cores can teach in 5 minutes: chosen by bits per byte (README has the candidates).
CPU_MODEL = dict(vocab_size=2048, context_length=128, d_model=128, num_layers=4, num_heads=2,
                 tie_embeddings=True)

# About the most logits that linear_cross_entropy holds at one time, by kind of device. Measured:
# 1 GiB of bf16 keeps a GPU's matrix products large; a CPU is fastest while a chunk stays in its
# cache (8 MiB of float32). Not measured: mps.
CHUNK_LOGITS = {"cuda": 2**29, "cpu": 2**21, "mps": 2**25}


# -------------------------------------------------------------------------------------------------
# configuration


def setting(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. None means derived: `__post_init__` fills it in."""

    vocab_size: int = setting(10_000, "ids that the model knows")
    context_length: int = setting(512, "longest sequence, tokens")
    d_model: int = setting(512, "width of the residual stream")
    num_layers: int = setting(4, "Transformer blocks")
    num_heads: int = setting(16, "query heads")
    num_kv_heads: int | None = setting(None, "key/value heads (default: num_heads)")
    d_head: int | None = setting(None, "width of a head (default: d_model / num_heads)")
    d_ff: int | None = setting(None, "width inside the feed-forward layer (default: 8/3 d_model to "
                               "the nearest multiple of 64; 4 d_model with --ffn silu)")
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies")
    norm_eps: float = setting(1e-5, "epsilon inside RMSNorm's root")
    tie_embeddings: bool = setting(False, "output head = token embeddings")
    qkv_bias: bool = setting(False, "bias on q, k and v (Qwen2)")
    qk_norm: bool = setting(False, "RMSNorm on each head of q and k (Qwen3)")
    pos: str = setting("rope", "positions")
    norm: str = setting("pre", "place of RMSNorm")
    ffn: str = setting("swiglu", "feed-forward layer")
    attention: str = setting("sdpa", "attention kernel")
    rope_scaling: dict | None = None  # the "llama3" rule of a Hugging Face config [9]

    def __post_init__(self):
        derive = functools.partial(object.__setattr__, self)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got "
                                 f"{getattr(self, name)!r}; choose one of these")
        if self.num_kv_heads is None:
            derive("num_kv_heads", self.num_heads)
        if self.d_head is None:
            if self.num_heads < 1 or self.d_model % self.num_heads:
                raise ValueError(f"d_model must be a multiple of num_heads, got {self.d_model} and "
                                 f"{self.num_heads}; change one of them or give d_head")
            derive("d_head", self.d_model // self.num_heads)
        if self.d_ff is None:
            nearest = max(1, round(8 * self.d_model / 3 / 64)) * 64
            derive("d_ff", nearest if self.ffn == "swiglu" else 4 * self.d_model)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and f.default not in (True, False) and value < 1:
                raise ValueError(f"{f.name} must be at least 1, got {value}; raise it")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}; "
                                 "change it")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and "
                             f"{self.num_heads}; change one of them")
        if self.pos == "rope" and self.d_head % 2:
            raise ValueError(f"d_head must be even with pos=rope, got {self.d_head}; "
                             "change num_heads")


def add_model_flags(parser, **defaults):
    """Adds --preset and a flag for each field of ModelConfig; `defaults` replace the class's."""
    group = parser.add_argument_group("model")
    names = {name.lower(): name for name in PRESETS}
    group.add_argument("--preset", choices=PRESETS, type=lambda name: names.get(name.lower(), name),
                       help="a named shape; other flags override it")
    for f in fields(ModelConfig):
        if f.name == "rope_scaling":
            continue
        options = {"help": f.metadata["help"]}
        shown = defaults.get(f.name, f.default)
        if shown is not None and shown is not False:
            options["help"] += f" (default: {shown})"
        if f.default is False:
            options["action"] = argparse.BooleanOptionalAction
        elif f.name in CHOICES:
            options["choices"] = CHOICES[f.name]
        else:
            options["type"] = float if isinstance(f.default, float) else int
        group.add_argument(f"--{f.name}", **options)
    parser.set_defaults(model_defaults=defaults)


def add_training_flags(parser):
    """Adds the flags that train.py and ddp.py share: data, steps, optimizer, files, model."""
    import bpe
    add, at_least_1 = parser.add_argument, positive(int)
    add("--data", default="python", help="python (this Python's own source), "
        f"{', '.join(bpe.DATASETS)}, or a .txt, .jsonl(.gz), folder or .bin")
    add("--valid_data", help="validation text or .bin (default: 5%% of the documents)")
    add("--data_dir", default="data", help="where text, tokenizer and token files go")
    add("--tokenizer", help="a tokenizer.json (default: train one of --vocab_size)")
    add("--pattern", default="gpt2", choices=bpe.PATTERNS, help="how a new tokenizer cuts text")
    add("--errors", default="strict", choices=("strict", "replace"), help="on other than UTF-8")
    add("--num_workers", type=at_least_1, help="processes that prepare the data (default: all)")
    add("--batch_size", type=at_least_1, default=8, help="sequences a micro-batch")
    add("--grad_accum", type=at_least_1, default=1, help="micro-batches an update")
    add("--max_steps", type=at_least_1, default=3000, help="updates")
    add("--lr", type=positive(float), default=3e-3, help="highest learning rate")
    add("--min_lr", type=positive(float, zero=True), help="last rate (default: lr / 10)")
    add("--warmup_steps", type=positive(int, zero=True), default=100)
    add("--weight_decay", type=positive(float, zero=True), default=0.1)
    for name, default in (("beta1", 0.9), ("beta2", 0.95)):
        add(f"--{name}", type=positive(float, zero=True, below=1), default=default)
    add("--grad_clip", type=positive(float), default=1.0, help="largest norm of the gradient")
    add_recompute_flags(add)
    add("--eval_tokens", type=at_least_1, default=16_384, help="a validation; 4 times at the end")
    for name, steps in (("eval_every", 500), ("save_every", 500), ("log_every", 50)):
        add(f"--{name}", type=at_least_1, default=steps, help="steps")
    add("--out_dir", default="out")
    held = parser.add_mutually_exclusive_group().add_argument  # when --out_dir holds a run
    held("--resume", action="store_true", help="go on with the run in --out_dir, same flags")
    held("--overwrite", action="store_true", help="start anew in an --out_dir that holds a run")
    add("--seed", type=positive(int, zero=True, below=2**63), default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add_precision_flags(add)
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--prompt", default="def read(self", help="that the sample at the end continues")
    add("--sample_tokens", type=at_least_1, default=256)
    add_model_flags(parser, **CPU_MODEL)


def add_precision_flags(add):
    add("--param_dtype", default="float32", choices=("float32", "bfloat16"),
        help="of the weights and their gradients")
    add("--moment_dtype", choices=("float32", "bfloat16"), help="of AdamW's (default: as weights)")
    add("--stochastic_rounding", action="store_true", help="of bfloat16 weights")


def add_recompute_flags(add):
    add("--checkpoint_every", type=positive(int), nargs="*", default=[], help="keep only the input "
        "of groups of K blocks (K1 K2: nested)")
    add("--recompute", default="none", choices=(*RECOMPUTE, "auto"), help="what a block computes "
        "again in its backward pass; auto: as little as memory allows")


def check_recompute_flags(args):
    if args.checkpoint_every and args.recompute != "none":
        raise ValueError("checkpoint_every and recompute are two ways to the same, got both; leave "
                         "one out")


def choose_recomputation(args, num_layers, need, free):
    """The levels of RECOMPUTE that --recompute asks for. need(levels): bytes of a step."""
    check_recompute_flags(args)
    if args.recompute == "auto":
        return least_recomputation(num_layers, need, free)
    return (args.recompute,) * num_layers


def count_levels(levels):
    """{level: blocks}, without those of no block."""
    return {level: levels.count(level) for level in RECOMPUTE if level in levels}


def levels_in_words(levels):
    counts = [f"{level} in {n} blocks" for level, n in count_levels(levels).items()]
    return "" if set(levels) == {"none"} else f"; recompute: {', '.join(counts)}"


def prepare_run(args, prepare=lambda make: make()):
    """(config, training ids, validation ids, tokenizer or None, tokens a byte) of the flags of
    `add_training_flags`; the config's vocabulary is the tokenizer's where no flag says otherwise.

    prepare(make): calls make, which makes the data ready, when it is this process's turn
    raises ValueError where the vocabulary or the data is too small
    """
    import bpe
    train_ids, valid_ids, tokenizer, tokens_per_byte = prepare(lambda: bpe.prepare_data(
        args.data, config_from_flags(args).vocab_size, args.data_dir, args.valid_data,
        args.tokenizer, args.pattern, args.num_workers, args.errors,
    ))
    known = {"vocab_size": tokenizer.vocab_size} if tokenizer else {}
    config = config_from_flags(args, **known)
    if config.vocab_size < known.get("vocab_size", 0):
        raise ValueError(f"vocab_size must be at least {tokenizer.vocab_size}, which the tokenizer "
                         f"has, got {config.vocab_size}; leave --vocab_size out")
    for ids in (train_ids, valid_ids):  # too short ones are found before any work
        get_batch(ids, 1, config.context_length, "cpu", torch.Generator())
    return config, train_ids, valid_ids, tokenizer, tokens_per_byte


def config_from_flags(args, **overrides):
    """The ModelConfig that the flags of `add_model_flags` ask for. A flag that was given goes
    before `overrides`, they before the preset or, without one, the parser's defaults."""
    flags = {f.name: getattr(args, f.name, None) for f in fields(ModelConfig)}
    given = {name: value for name, value in flags.items() if value is not None}
    base = PRESETS[args.preset] if args.preset else args.model_defaults
    config = ModelConfig(**{**base, **overrides, **given})
    if config.attention == "flash":
        load_flash_attention()  # its absence is known before any work
    return config


@functools.cache
def triton_problem(device):
    """None where Triton kernels run on this CUDA device, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "triton needs compute capability 7.0"
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        return "triton needs a C compiler, such as gcc"
    return None


# -------------------------------------------------------------------------------------------------
# functions: softmax, attention, losses


def silu(x):
    """x * sigmoid(x), elementwise. source: [5]"""
    return x * torch.sigmoid(x)


def softmax(x, dim):
    """exp(x) / sum(exp(x)) along `dim`, same shape as x; the maximum is subtracted first, so that
    no exp overflows. softmax([0, ln 3]) = [1/4, 3/4]."""
    e = (x - x.detach().amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


ANNOTATE = False  # set by `bench`: name the parts of attention for nsys and torch.profiler


@contextlib.contextmanager
def annotate(name):
    """Marks a region for torch.profiler and, on CUDA, for nsys (NVTX); nothing unless ANNOTATE."""
    if not ANNOTATE:
        yield
        return
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield


def scaled_dot_product_attention(q, k, v, mask=None):
    """Attention output (..., Tq, Dv) = softmax(q k^T / sqrt(D)) v.

    q: (..., Tq, D), k: (..., Tk, D), v: (..., Tk, Dv), any leading dims that broadcast
    mask: bool, broadcasts to (..., Tq, Tk); True where the query may look, one key at least
    source: [2] section 3.2.1
    """
    with annotate("attention scores"):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
    with annotate("attention softmax"):
        weights = softmax(scores, dim=-1).to(v.dtype)
    with annotate("attention values"):
        return weights @ v


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target], a float32 scalar (float64 stays float64).

    logits: (..., V); targets: (...) int. Uniform logits over V classes give ln V.
    source: [1] A1 section 4.1. Perplexity is its exp.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = logits.detach().amax(-1, keepdim=True)
    log_total = (logits - peak).exp().sum(-1).log() + peak.squeeze(-1)
    return (log_total - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


def _exp_and_loss(logits, targets):
    """Of logits (n, V): e = exp(x - max), in their dtype; 1 / the sum of e, and the loss, both (n,)
    float32. Float32 logits are overwritten: on a CPU that halves the traffic."""
    picked = logits.gather(-1, targets.unsqueeze(-1)).float()
    x = logits.float()
    peak = x.amax(-1, keepdim=True)
    x = x.sub_(peak).exp_()
    total = x.sum(-1, keepdim=True)
    return x.to(logits.dtype), 1 / total.squeeze(-1), (total.log() + peak - picked).squeeze(-1)


@functools.cache
def _exp_and_loss_kernel():
    """`_exp_and_loss` in Triton, in place: a row comes from memory once, the second time from the
    cache. Half the time of torch.compile: 2.5% of a GPT-2 training step on an H200."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(logits, targets, inverse, loss, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits += row * V
        columns = tl.arange(0, BLOCK)
        picked = tl.load(logits + tl.load(targets + row)).to(tl.float32)
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        for i in range(0, V, BLOCK):
            x = tl.load(logits + i + columns, mask=i + columns < V, other=float("-inf"))
            peak = tl.maximum(peak, x.to(tl.float32))
        peak = tl.max(peak, 0)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, V, BLOCK):
            x = tl.load(logits + i + columns, mask=i + columns < V, other=float("-inf"))
            e = tl.exp(x.to(tl.float32) - peak)
            total += e
            tl.store(logits + i + columns, e, mask=i + columns < V)
        total = tl.sum(total, 0)
        tl.store(inverse + row, 1 / total)
        tl.store(loss + row, tl.log(total) + peak - picked)

    def launch(logits, targets):
        inverse, loss = torch.empty(2, len(logits), device=logits.device)
        # 32 warps: few rows at a time on the chip, so that they stay in its cache
        kernel[(len(logits),)](logits, targets, inverse, loss, logits.shape[1], BLOCK=4096,
                               num_warps=32)
        return logits, inverse, loss

    return launch


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of softmax cross entropy is (p - onehot): known as soon as the logits are. So
    each chunk of tokens is finished in the forward pass and its logits are dropped. The one-hot
    part goes through rows of `weight`, not the chunk: that saves a pass and keeps small p exact."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, row_weight, chunk, wants):
        w = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        fuse = hidden.is_cuda and hidden.dtype != torch.float64
        fuse = fuse and triton_problem(hidden.device) is None
        exp_and_loss = _exp_and_loss_kernel() if fuse else _exp_and_loss
        parts = (hidden.split(chunk), targets.split(chunk), row_weight.split(chunk))
        for i, (h, t, r) in enumerate(zip(*parts, strict=True)):
            e, inverse, losses = exp_and_loss(h @ w.T, t)
            loss += (losses * r).sum()
            scale = (r * inverse).unsqueeze(-1).to(h.dtype)  # p = e * inverse: on rows of C, not V
            r = r.unsqueeze(-1).to(h.dtype)
            if d_hidden is not None:
                torch.sub((e @ w).mul_(scale), w[t] * r,
                          out=d_hidden[i * chunk : i * chunk + len(h)])
            if d_weight is not None:
                if d_weight.dtype == h.dtype:
                    d_weight.addmm_(e.T, h * scale)
                elif h.is_cuda:  # adds up in float32, inside the matmul
                    torch.addmm(d_weight, e.T, h * scale, out_dtype=torch.float32, out=d_weight)
                else:
                    d_weight += e.T @ (h * scale)
                d_weight.index_add_(0, t, (h * r).float(), alpha=-1)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d_loss.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction="mean", chunk=None):
    """cross_entropy(hidden @ weight.T, targets), a float32 scalar, without the (N, V) logits.

    hidden: (..., C); weight: (V, C); targets: (...) int, `ignore_index` where a token has no loss
    reduction: "mean" over the tokens that have a loss, or "sum"
    chunk: tokens whose logits exist at one time. The gradients of both inputs are computed chunk by
    chunk in the forward pass: the memory is one chunk of logits and a float32 (V, C).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}; choose one")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    valid = targets != ignore_index
    row_weight = valid.float()
    if reduction == "mean":
        row_weight = row_weight / valid.sum().clamp(min=1)
    if chunk is None:
        most = max(1, CHUNK_LOGITS[kind] // weight.shape[0])
        pieces = max(1, -(-len(hidden) // most))  # of equal size: a short last one wastes a GPU
        tile = 128 if hidden.is_cuda else 1
        chunk = max(1, -(-len(hidden) // (pieces * tile)) * tile)
    wants = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    targets = targets.masked_fill(~valid, 0)
    return _LinearCrossEntropy.apply(hidden, weight, targets, row_weight, chunk, wants)


# -------------------------------------------------------------------------------------------------
# layers


class Linear(nn.Module):
    """y = x W^T (+ b): (..., in_features) to (..., out_features). weight: (out, in),
    N(0, 2 / (in + out)) cut at 3 sigma. source: [1] A1 section 3.4"""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__()
        kind = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **kind))
        self.bias = nn.Parameter(torch.zeros(out_features, **kind)) if bias else None
        std = math.sqrt(2 / (in_features + out_features))
        nn.init.trunc_normal_(self.weight, 0, std, -3 * std, 3 * std)

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(nn.Module):
    """Rows of weight (num_embeddings, embedding_dim): ids (...) int to (..., embedding_dim).
    N(0, 1) cut at 3. source: [1] A1 section 3.4.3"""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__()
        shape = (num_embeddings, embedding_dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, 0, 1, -3, 3)

    def forward(self, ids):
        # not weight[ids]: index_select's gradient is faster on a CPU and adds up in a fixed order
        rows = self.weight.index_select(0, ids.flatten())
        return rows.view(*ids.shape, rows.shape[1])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32, returned in x's
    dtype. source: [4]"""

    def __init__(self, d_model, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): (..., d_model) to (..., d_model). source: [5] equation 6"""

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


class SiLUFeedForward(nn.Module):
    """w2(silu(w1 x)): the ungated ablation of SwiGLU. source: [1] A1, swiglu_ablation"""

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x):
        return self.w2(silu(self.w1(x)))


class RotaryEmbedding(nn.Module):
    """Turns the pair (x[2j], x[2j+1]) at position p by the angle p * theta^(-2j/D). source: [3]

    forward(x, positions): x (..., T, D), positions (..., T) int, broadcast over x's leading dims;
    None means 0..T-1. The result has x's shape and dtype. No learned state; tables are float32.
    """

    def __init__(self, theta, d_head, context_length, scaling=None, device=None):
        super().__init__()
        pair = torch.arange(0, d_head, 2, dtype=torch.float32, device=device)
        frequency = theta ** (-pair / d_head)
        if scaling is not None:
            frequency = scale_rotary_frequencies(frequency, scaling)
        position = torch.arange(context_length, dtype=torch.float32, device=device)
        angle = torch.outer(position, frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _apply(self, fn, recurse=True):  # a cast of the model moves the tables, never rounds them
        return super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t).device), recurse)

    def forward(self, x, positions=None):
        index = slice(x.shape[-2]) if positions is None else positions
        while positions is not None and 1 < index.dim() < x.dim() - 1:
            index = index.unsqueeze(1)  # a row of positions a batch row serves all its heads
        cos, sin = self.cos[index], self.sin[index]
        pairs = x.unflatten(-1, (-1, 2))
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # the same turn as one complex product: 8 times faster on a CPU, not fusible on a GPU
            pairs = pairs.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
        else:
            # flip, not unbind and stack: keeps x's layout in memory, and is one kernel each way
            turned = pairs * cos.unsqueeze(-1) + pairs.flip(-1) * torch.stack((-sin, sin), -1)
        return turned.flatten(-2).to(x.dtype)


def make_rope(config, device=None):
    """The RotaryEmbedding of a model, None with pos=none."""
    c = config
    if c.pos == "none":
        return None
    return RotaryEmbedding(c.rope_theta, c.d_head, c.context_length, c.rope_scaling, device)


def scale_rotary_frequencies(frequency, scaling):
    """Llama 3.1's rule for long contexts, frequencies (D/2,) to (D/2,): long waves are slowed by
    `factor`, short ones stay, those between are blended. source: [9]"""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling["factor"])


class KVCache:
    """Keys and values of the tokens seen so far, preallocated. Row b holds lengths[b] of them.

    k, v: (L, B, G, max_length, D). Rows may differ in length: what lies beyond lengths[b] is stale,
    masked, and overwritten by the next token. `fixed`: `update` returns the whole of it, so that
    every token of a batch runs the same shapes, as a CUDA graph needs.
    """

    def __init__(self, config, batch_size, max_length, device, dtype):
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.d_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.end = 0  # on the host: max(lengths), so that slicing needs no device sync
        self.fixed = False

    def update(self, layer, k, v, positions):
        """Stores k and v (B, G, T, D) at `positions` (B, T); returns all (B, G, end, D) so far."""
        index = positions[:, None, :, None].expand_as(k)
        self.k[layer].scatter_(2, index, k.to(self.k.dtype))
        self.v[layer].scatter_(2, index, v.to(self.v.dtype))
        end = self.k.shape[3] if self.fixed else self.end + positions.shape[1]
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Keeps these rows, in this order; repeats let samples of one prompt share a prefill."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = self.lengths[rows]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with grouped keys and values: (B, T, C) to (B, T, C).
    source: [2] 3.2.2, [7]. `rope` is shared between layers when given."""

    def __init__(self, config, rope=None):
        super().__init__()
        c = self.config = config
        self.q_proj = Linear(c.d_model, c.num_heads * c.d_head, bias=c.qkv_bias)
        self.k_proj = Linear(c.d_model, c.num_kv_heads * c.d_head, bias=c.qkv_bias)
        self.v_proj = Linear(c.d_model, c.num_kv_heads * c.d_head, bias=c.qkv_bias)
        self.output_proj = Linear(c.num_heads * c.d_head, c.d_model)
        self.q_norm = RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else None
        self.rope = rope or make_rope(c)

    def forward(self, x, positions=None, cache=None, layer=0, mask=None):
        """x: (B, T, C); positions: (B, T) int, None for 0..T-1; layer: its number in `cache`;
        mask: bool (B, 1, T, T), of what a token sees, None for causal."""
        q = self.q_proj(x).unflatten(-1, (-1, self.config.d_head))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.config.d_head))  # (B, T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.config.d_head))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            # before the transpose, in memory's order: a GPU then copies neither q nor its gradient
            place = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            place = torch.atleast_2d(place)
            q, k = self.rope(q, place[..., None]), self.rope(k, place[..., None])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, D)
        if cache is not None:
            first = cache.end == 0
            seen_k, seen_v = cache.update(layer, k, v, positions)
            if not first:  # the first tokens see only themselves: plain causal attention
                k, v = seen_k.to(q.dtype), seen_v.to(q.dtype)
                mask = torch.arange(k.shape[2], device=x.device) <= positions[:, None, :, None]
        if mask is not None and cache is not None and self.config.attention == "flash" and (
                x.shape[1] == 1):
            y = load_flash_attention(name="flash_decode")(q, k, v, positions[:, 0] + 1)
        else:
            y = attend(q, k, v, mask, self.config.attention)
        return self.output_proj(y.transpose(1, 2).flatten(-2))


def load_flash_attention(device=None, name="flash_attention"):
    """A function of flash_attn.py, imported only where it is asked for.
    raises ValueError without that file, and where it does not run on `device`, if given"""
    try:
        import flash_attn
    except ModuleNotFoundError as missing:
        if missing.name != "flash_attn":
            raise
        raise ValueError("attention=flash needs flash_attn.py, got none; use sdpa") from None
    if device is not None:
        flash_attn.check_device(device)
    return getattr(flash_attn, name)


def attend(q, k, v, mask, backend):
    """Attention of grouped heads by the named back end, (B, H, Tq, D).

    q: (B, H, Tq, D); k, v: (B, G, Tk, D); mask: bool (B, 1, Tq, Tk), None for causal with Tq = Tk
    """
    if backend == "flash" and mask is None:
        return load_flash_attention()(q, k, v, causal=True)
    if backend == "eager":
        if mask is None:
            T = q.shape[2]
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return scaled_dot_product_attention(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1 and mask is not None:
        # a group's queries as so many tokens of one head: k and v are read once, by any kernel
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        return attend(q, k, v, mask, backend).flatten(1, 2).unsqueeze(2)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                                      is_causal=mask is None, enable_gqa=grouped)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to the residual stream: (B, T, C) to (B, T, C).
    norm "pre": x + f(norm(x)); "post": norm(x + f(x)); "none": x + f(x). source: [1] A1 3.5
    recompute: one of RECOMPUTE, what the backward pass computes again"""

    recompute = "none"

    def __init__(self, config, rope=None):
        super().__init__()
        c = config
        make_norm = (lambda: RMSNorm(c.d_model, c.norm_eps)) if c.norm != "none" else nn.Identity
        self.post_norm = c.norm == "post"
        self.ln1 = make_norm()
        self.attn = CausalSelfAttention(c, rope)
        self.ln2 = make_norm()
        self.ffn = (SwiGLU if c.ffn == "swiglu" else SiLUFeedForward)(c.d_model, c.d_ff)

    def forward(self, x, positions=None, cache=None, layer=0, mask=None):
        inputs = x, positions, cache, layer, mask
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return self.transform(*inputs)
        if self.recompute == "block":
            return recompute(self.transform, *inputs, use_reentrant=False)
        first, last = 4, 6 if isinstance(self.ffn, SwiGLU) else 5  # after q, k, v and output
        lost = tuple(range(first, last)) if self.recompute == "ffn" else ()
        if not self.post_norm:  # the sum of the last product and x is all that is made of it
            lost += (last,)
        contexts = functools.partial(products_contexts, lost)
        return recompute(self.transform, *inputs, use_reentrant=False, context_fn=contexts)

    def transform(self, x, positions, cache, layer, mask):
        if self.post_norm:
            x = self.ln1(x + self.attn(x, positions, cache, layer, mask))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), positions, cache, layer, mask)
        return x + self.ffn(self.ln2(x))


# What a block computes again in its backward pass, from nothing to all but its input. "cheap": what
# is neither a matrix product nor attention. "ffn": that, and the wide products of the feed-forward
# layer. source: [1] A2, gradient_checkpointing; the policies of torch.utils.checkpoint
RECOMPUTE = ("none", "cheap", "ffn", "block")


def products_contexts(lost):
    """A context_fn of torch.utils.checkpoint: matrix products and attention are kept, except the
    products whose numbers, in the order of the block, are in `lost`."""
    seen = {False: 0, True: 0}  # forward, and while recomputing

    def policy(context, op, *_, **__):
        name = op._schema.name.partition("::")[2]
        keep = "attention" in name
        if name in ("mm", "addmm"):
            keep = seen[context.is_recompute] not in lost
            seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class TransformerLM(nn.Module):
    """Token ids (B, T) to next-token logits (B, T, V). source: [1] A1 section 3.6

    `checkpoint_every` trades time for memory: (8,) keeps the input of every 8th block and computes
    the rest again in the backward pass; (8, 1) does that block by block within each group (nested).
    `recompute(levels)` chooses what is kept within each block.
    `text_bounds`: bos_token_id and eos_token_id of the Hugging Face folder that it came from;
    `generation_config`: what its generation_config.json holds, {} without one.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpoint_every, self.text_bounds, self.generation_config = (), {}, {}
        self.token_embeddings = Embedding(c.vocab_size, c.d_model)
        rope = make_rope(c)  # one table for all layers
        self.layers = nn.ModuleList(TransformerBlock(c, rope) for _ in range(c.num_layers))
        self.ln_final = RMSNorm(c.d_model, c.norm_eps) if c.norm == "pre" else nn.Identity()
        self.lm_head = Linear(c.d_model, c.vocab_size)
        if c.tie_embeddings:  # the head's small weights serve both: N(0, 1) would give huge logits
            self.token_embeddings.weight = self.lm_head.weight

    def renew_rope(self, device):
        """Makes the rotary tables on `device`, for the context_length that config has now."""
        rope = make_rope(self.config, device)
        for layer in self.layers:
            layer.attn.rope = rope

    def recompute(self, levels):
        """levels: one of RECOMPUTE for each block. raises ValueError"""
        unknown = [level for level in levels if level not in RECOMPUTE]
        if unknown or len(levels) != len(self.layers):
            raise ValueError(f"recompute takes one of {', '.join(RECOMPUTE)} for each of the "
                             f"{len(self.layers)} blocks, got {', '.join(map(str, levels))}; "
                             "correct them")
        for layer, level in zip(self.layers, levels, strict=True):
            layer.recompute = level

    def forward(self, ids, cache=None):
        return self.lm_head(self.hidden_states(ids, cache))

    def hidden_states(self, ids, cache=None, documents=None):
        """The input of the output head, (B, T, C). With `cache`, ids follow what it holds;
        documents: (B, T) int, a token sees those of its own number only (packed sequences)."""
        T, limit = ids.shape[1], self.config.context_length
        if T > limit:
            raise ValueError(f"at most context_length = {limit} tokens, got {T}; cut the input")
        positions = mask = None
        if documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]
            mask = same.tril()
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(T, device=ids.device)
        x = self.token_embeddings(ids)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream in the compute dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.checkpoint_every and self.training and torch.is_grad_enabled():
            x = recompute_blocks(list(self.layers), x, self.checkpoint_every, mask)
        else:
            for i, layer in enumerate(self.layers):
                x = layer(x, positions, cache, i, mask)
        if cache is not None:
            cache.lengths += T  # in place: a CUDA graph has its address
            cache.end += T
        return self.ln_final(x)

    def loss(self, ids, targets, reduction="mean"):
        """Next-token cross entropy of ids (B, T) against targets (B, T), without full logits."""
        hidden = self.hidden_states(ids)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction=reduction)


def recompute_blocks(blocks, x, spans, mask=None):
    """Runs `blocks` on x keeping only the input of each group of spans[0] of them; spans[1:] does
    the same within a group while it is recomputed. source: [1] A2, gradient_checkpointing"""
    if not spans:
        for block in blocks:
            x = block(x, mask=mask)
        return x
    for i in range(0, len(blocks), spans[0]):
        x = recompute(recompute_blocks, blocks[i : i + spans[0]], x, spans[1:], mask,
                      use_reentrant=False)
    return x


# -------------------------------------------------------------------------------------------------
# optimizer, schedule, clipping, batches, checkpoints


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; torch.optim.Optimizer gives groups and state_dict only.

    Each step, in the 2026 handout's order, g the gradient and t the step from 1:
        theta -= lr * weight_decay * theta
        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        theta -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    as torch.optim.AdamW does. The 2025 handout decays last and adds eps before correcting v:
    differences of order lr^2 and eps. raises ValueError on rates out of range.

    moment_dtype: of m and v, by default the parameter's. bfloat16's 8 bits hold v up: a decay by
      1 - beta2 is less than half of its last bit
    stochastic_rounding: bfloat16 parameters are rounded up or down by chance, by what lies nearer:
      right on average, where rounding to nearest would lose every update of less than half a bit.
      The chance is of the step and the number's place among this process's parameters: the same
      in each run on one kind of device and as many processes.
    source: [6] algorithm 2; stochastic rounding: Gupta et al. 2015, arXiv 1502.02551
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *,
                 moment_dtype=None, stochastic_rounding=False):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                "lr, eps and weight_decay must be at least 0 and betas in [0, 1), got "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}; correct them")
        rates = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        super().__init__(params, rates)
        self.moment_dtype, self.stochastic_rounding = moment_dtype, stochastic_rounding

    def __getstate__(self):
        """Of a copy."""
        return super().__getstate__() | {"moment_dtype": self.moment_dtype,
                                         "stochastic_rounding": self.stochastic_rounding}

    def load_state_dict(self, state_dict):
        """As torch.optim's, but m and v keep their dtype or take moment_dtype, if given."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            for key in ("m", "v") if i in state_dict["state"] else ():
                self.state[p][key] = state_dict["state"][i][key].to(
                    p.device, self.moment_dtype, copy=True)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_age = {}  # parameters that missed a gradient are at another t
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = 0
                        state["m"], state["v"] = (torch.zeros_like(p, dtype=self.moment_dtype)
                                                  for _ in range(2))
                    state["step"] += 1
                    by_age.setdefault((state["step"], p.device, p.dtype), []).append(p)
            for (t, _, _), params in by_age.items():
                self._update(params, t, group)
        return loss

    def _update(self, params, t, group):
        """One step of parameters that share t, device and dtype: _foreach is one kernel a list."""
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        decay = 1 - lr * group["weight_decay"]
        step_size, root = lr / (1 - beta1**t), math.sqrt(1 - beta2**t)
        grads = [p.grad for p in params]
        m = [self.state[p]["m"] for p in params]
        v = [self.state[p]["v"] for p in params]
        if params[0].is_cuda and _fusable(params, grads, m, v):
            narrow = self.stochastic_rounding and params[0].dtype == torch.bfloat16
            _adamw_kernel()(params, grads, m, v,
                            (decay, 1 - beta1, beta2, 1 - beta2, eps, step_size, root),
                            seed=t if narrow else None)
            return
        if self.stochastic_rounding or m[0].dtype != params[0].dtype:
            for i, tensors in enumerate(zip(params, grads, m, v, strict=True)):
                self._update_in_float32(*tensors, t << 32 | i, decay, betas=(beta1, beta2), eps=eps,
                                        step_size=step_size, root=root)
            return
        if decay != 1:
            torch._foreach_mul_(params, decay)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, root)
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(params, m, denominator, -step_size)

    def _update_in_float32(self, p, grad, m, v, seed, decay, betas, eps, step_size, root):
        """_update of one parameter, rounded once, at the end."""
        grad, theta = grad.float(), p.float() * decay
        mean = torch.lerp(m.float(), grad, 1 - betas[0])
        square = torch.addcmul(v.float() * betas[1], grad, grad, value=1 - betas[1])
        theta -= step_size * mean / (square.sqrt() / root + eps)
        m.copy_(mean)
        v.copy_(square)
        narrow = self.stochastic_rounding and p.dtype == torch.bfloat16
        p.copy_(round_stochastically(theta, seed) if narrow else theta)


def fold_seed(n):
    """The int n as a seed of 32 bits, which is all that torch's generator on a CPU looks at:
    numbers that differ above those bits, too, give other draws."""
    return (n ^ (n >> 32) * 0x9E3779B1) % 2**32


def round_stochastically(x, seed):
    """float32 x as bfloat16: up or down, each with the chance that makes the mean x. 16 random bits
    below bfloat16's last one are added, then cut off. seed: int; the same gives the same"""
    generator = torch.Generator(x.device).manual_seed(fold_seed(seed))
    noise = torch.randint(2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    rounded = (x.view(torch.int32) + noise & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _fusable(params, grads, m, v):
    """Whether the kernel below may take these CUDA tensors, which it reads 16 bytes at a time."""
    kinds = {x.dtype for x in (*params, *grads)}, {x.dtype for x in (*m, *v)}
    if triton_problem(params[0].device) or max(map(len, kinds)) > 1 or torch.float64 in kinds[0]:
        return False
    return all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (*params, *grads, *m, *v))


@functools.cache
def _adamw_kernel():
    """AdamW._update's arithmetic in one Triton kernel for all tensors of a list: each number comes
    from memory once, which is a third of the foreach version's bytes. With `seed` weights are
    rounded stochastically."""
    import triton
    import triton.language as tl

    BLOCK = 4096

    @triton.jit(do_not_specialize=["seed"])
    def kernel(table, owners, decay, new1, beta2, new2, eps, step_size, root, seed,
               KIND: tl.constexpr, MOMENTS: tl.constexpr, STOCHASTIC: tl.constexpr,
               BLOCK: tl.constexpr):
        row = table + tl.load(owners + tl.program_id(0)) * 6
        p = tl.multiple_of(tl.load(row).to(tl.pointer_type(KIND)), 16)
        g = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(KIND)), 16)
        m = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(MOMENTS)), 16)
        v = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(MOMENTS)), 16)
        i = (tl.program_id(0) - tl.load(row + 5)) * BLOCK + tl.arange(0, BLOCK)
        inside = i < tl.load(row + 4)
        gradient = tl.load(g + i, inside, 0.0).to(tl.float32)
        mean = tl.load(m + i, inside, 0.0).to(tl.float32)
        mean += new1 * (gradient - mean)
        square = tl.load(v + i, inside, 0.0).to(tl.float32) * beta2
        square += new2 * gradient * gradient
        theta = tl.load(p + i, inside, 0.0).to(tl.float32) * decay
        theta -= step_size * mean / (tl.sqrt_rn(square) / root + eps)
        tl.store(m + i, mean, inside)
        tl.store(v + i, square, inside)
        if STOCHASTIC:  # see round_stochastically
            place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            noise = tl.randint(seed, place).to(tl.int32, bitcast=True) & 0xFFFF
            bits = (theta.to(tl.int32, bitcast=True) + noise) & -65536
            theta = tl.where(tl.abs(theta) < float("inf"), bits.to(tl.float32, bitcast=True), theta)
        tl.store(p + i, theta, inside)

    @functools.lru_cache(maxsize=16)
    def plan(sizes, device):
        blocks = np.array([-(-n // BLOCK) for n in sizes])
        owners = np.repeat(np.arange(len(sizes)), blocks)
        return torch.from_numpy(owners).to(device), (np.cumsum(blocks) - blocks).tolist()

    def launch(params, grads, m, v, rates, seed=None):
        device = params[0].device
        sizes = tuple(p.numel() for p in params)
        owners, first = plan(sizes, device)
        rows = [[*map(torch.Tensor.data_ptr, tensors), n, start]
                for *tensors, n, start in zip(params, grads, m, v, sizes, first, strict=True)]
        table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        kind = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(len(owners),)](
                table, owners, *map(float, rates), seed or 0, KIND=kind[params[0].dtype],
                MOMENTS=kind[m[0].dtype], STOCHASTIC=seed is not None, BLOCK=BLOCK, num_warps=8)

    return launch


def optimizer_precision(args):
    """AdamW's keywords of the flags --moment_dtype and --stochastic_rounding.
    raises ValueError where they do not go with --param_dtype and --dtype"""
    narrow = args.param_dtype == "bfloat16"
    if args.stochastic_rounding and not narrow:
        raise ValueError("stochastic_rounding needs bfloat16 weights, got float32; add "
                         "--param_dtype bfloat16")
    if narrow and args.dtype == "float32":
        raise ValueError("dtype must be bfloat16 where param_dtype is, got float32; leave it out")
    return {"moment_dtype": args.moment_dtype and getattr(torch, args.moment_dtype),
            "stochastic_rounding": args.stochastic_rounding}


def optimizer_groups(model, weight_decay):
    """Parameter groups for AdamW: matrices decay; norms' gains and biases (1-D) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]


def last_rate(args):
    """The schedule's last rate: a tenth of --lr where --min_lr is not given. raises ValueError"""
    rate = args.lr / 10 if args.min_lr is None else args.min_lr
    if rate > args.lr:
        raise ValueError(f"min_lr must be at most lr, got {rate} and {args.lr}; lower it")
    return rate


def lr_cosine_schedule(step, max_lr, min_lr, warmup_steps, cosine_steps):
    """The learning rate at `step`: linear from 0 to max_lr over warmup_steps, a half cosine down to
    min_lr at cosine_steps, min_lr after. source: [1] A1 section 4.4"""
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= cosine_steps:
        return min_lr
    done = (step - warmup_steps) / (cosine_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def grad_norm(grads):
    """The joint L2 norm of a list of gradients, a scalar tensor; of none it is 0."""
    if not grads:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm, norm=None):
    """Scales the gradients in place so that their joint L2 norm is at most max_norm; returns the
    norm before, a scalar tensor (not read here: no device sync). source: [1] A1 section 4.5

    norm: the norm, where these parameters are not all there are (shards: see ddp.py)
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = grad_norm(grads) if norm is None else norm
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def get_batch(dataset, batch_size, context_length, device, generator=None, rows=slice(None)):
    """Random windows (x, y), both (batch_size, context_length) int64 on `device`, y one token on.

    dataset: 1-D array, memmap or tensor of token ids; only the windows are read. Starts are
    uniform, drawn from `generator` (a CPU torch.Generator; its state is the position in the data)
    or torch's own.
    rows: those of the batch to read and return; all are drawn, as every rank of ddp.py does
    raises ValueError where the data is shorter than a window and its target
    """
    if len(dataset) <= context_length:
        raise ValueError(f"the data must hold more than context_length = {context_length} tokens, "
                         f"got {len(dataset)}; give more text or a shorter --context_length")
    starts = torch.randint(len(dataset) - context_length, (batch_size, 1), generator=generator)
    windows = np.asarray(dataset)[starts[rows].numpy() + np.arange(context_length + 1)]
    windows = torch.from_numpy(windows.astype(np.int64))
    if torch.device(device).type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    windows = windows.to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@torch.no_grad()
def evaluate(hidden_states, model, dataset, num_tokens, batch_size, device, dtype=torch.float32):
    """Mean loss, nats a token, over about num_tokens tokens of `dataset` (1-D ids): windows of
    context_length that do not overlap, spread evenly, the same at every call.

    hidden_states: model.hidden_states, or its compiled form; dtype: to compute in
    """
    def loss_sum(x, y):
        with compute_context(device, dtype):
            hidden = hidden_states(x)
            return linear_cross_entropy(hidden, model.lm_head.weight, y, reduction="sum")

    T = min(model.config.context_length, len(dataset) - 1)
    total, tokens = evaluation_sum(loss_sum, dataset, T, num_tokens, batch_size, device)
    return total / tokens


@torch.no_grad()
def evaluation_sum(loss_sum, dataset, T, num_tokens, batch_size, device, rank=0, world_size=1):
    """The work of `evaluate`: (sum of losses on this rank, tokens on all ranks).

    loss_sum(x, y): sum of losses of x, y (B, T). Each rank takes every world_size-th window, and
    all take as many batches: a rank without a last window computes one that counts nothing.
    """
    windows = (len(dataset) - 1) // T
    chosen = np.linspace(0, windows - 1, min(windows, max(1, num_tokens // T))).astype(np.int64) * T
    mine = np.resize(chosen, -(-len(chosen) // world_size) * world_size)[rank::world_size]
    counted = len(chosen[rank::world_size])
    total = 0.0
    for first in range(0, len(mine), batch_size):
        starts = mine[first : first + batch_size, None]
        batch = torch.from_numpy(dataset[starts + np.arange(T + 1)].astype(np.int64)).to(device)
        x, y = batch[:, :-1], batch[:, 1:]
        if first + len(starts) > counted:
            y = y.clone()
            y[counted - first :] = -100
        total += loss_sum(x, y).item()
    return total, len(chosen) * T


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes `path`'s place when the block ends well, and is on disk by then; on
    an error, a full disk or Ctrl-C `path` stays as it was. A device or pipe is written into."""
    if os.path.exists(path) and not os.path.isfile(path):  # root could replace /dev/null
        with open(path, "wb") as f:
            yield f
        return
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # already in place when all went well
            os.remove(partial)


def save_checkpoint(model, optimizer, iteration, out, **extra):
    """Writes weights, optimizer state, iteration and `extra` (tensors, numbers, strings, lists,
    dicts) to `out`, a path or a binary file. A path is replaced only when the new file is complete
    and on disk, and what it held stays as NAME.prev: a kill or a full disk loses neither."""
    content = dict(model=model.state_dict(), optimizer=optimizer and optimizer.state_dict(),
                   iteration=iteration, **extra)
    if hasattr(out, "write"):
        torch.save(content, out)
        return
    with atomic_write(f"{out}.new") as f:
        try:
            torch.save(content, f)
        except RuntimeError as error:  # PyTorch's writer hides what the disk said
            reason = error.__context__ or "the disk may be full"
            raise OSError(f"{out} could not be written, got {reason}; make room, the one before is "
                          "kept") from None
    if os.path.exists(out):
        os.replace(out, f"{out}.prev")
    os.replace(f"{out}.new", out)


def in_short(error):
    """The kind of an exception and its message in one line of 100 characters."""
    return " ".join(f"{type(error).__name__} {error}".split())[:100]


def read_checkpoint(src):
    """The dict that `save_checkpoint` wrote, tensors on the CPU; weights only, no code is run.

    A path that is missing or damaged falls back to NAME.prev, and says so on stderr.
    raises FileNotFoundError when there is neither, ValueError when neither can be read.
    """
    def load(file):
        if not hasattr(file, "read"):
            with zipfile.ZipFile(file) as parts:  # torch.load does not look at the checksums
                if damaged := parts.testzip():
                    raise ValueError(f"{damaged} is damaged")
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"model", "iteration"} <= content.keys():
            raise ValueError("a checkpoint must hold model and iteration, got other contents; "
                             "give a file of save_checkpoint")
        return content

    if hasattr(src, "read"):
        try:
            return load(src)
        except Exception as error:  # see below
            raise ValueError(f"a checkpoint must be readable, got {in_short(error)}; give a file "
                             "of save_checkpoint, from its start") from None
    newest, tried = os.fspath(src), []
    for path in filter(os.path.exists, (newest, f"{newest}.prev")):
        try:
            content = load(path)
        except Exception as error:  # torch.load raises half a dozen types on damaged files
            tried.append(f"{path}: {in_short(error)}")
            continue
        for message in tried or ([f"{src} is missing"] if path != newest else []):
            print(f"warning: {message}; using {path}", file=sys.stderr)
        return content
    if tried:
        raise ValueError(f"a checkpoint must be readable, got {'; '.join(tried)}; "
                         "give another, or move it away to start anew")
    raise FileNotFoundError(f"no checkpoint at {src}; train one first")


def load_checkpoint(src, model, optimizer=None):
    """Restores model and optimizer from `src` (path or binary file); returns the iteration.
    raises ValueError, naming the first difference, when the checkpoint has another shape."""
    content = read_checkpoint(src)
    restore(content, model, optimizer)
    return content["iteration"]


def restore(content, model, optimizer=None):
    """Copies the state in `content` (of `read_checkpoint`) into model and optimizer."""
    for name, value in content.get("config", {}).items():  # some change no tensor's shape
        if name != "attention" and value != getattr(model.config, name, value):
            raise ValueError(f"the checkpoint must have the model's shape, got {name} {value} for "
                             f"{getattr(model.config, name)}; give the flags it was trained with")
    mine, theirs = model.state_dict(), content["model"]
    for name in sorted(mine.keys() | theirs.keys()):
        want, got = (tuple(s[name].shape) if name in s else "nothing" for s in (mine, theirs))
        if want != got:
            raise ValueError(f"the checkpoint must have the model's shape, got {name} {got} for "
                             f"{want}; give the flags it was trained with")
    model.load_state_dict(theirs)
    if optimizer is not None:
        if content.get("optimizer") is None:
            raise ValueError("the checkpoint must hold optimizer state, got none; load it without")
        optimizer.load_state_dict(content["optimizer"])


# -------------------------------------------------------------------------------------------------
# generation


@dataclass
class Completion:
    """One sampled continuation. `tokens` ends with the stop id if one was drawn; `logprobs[i]` is
    the natural log of tokens[i]'s probability under softmax(logits / temperature), before top-k and
    top-p (temperature 0: under softmax(logits)); `text` lacks the stop id and ends with the stop
    string that ended it, if one did; finish_reason is "stop" or "length"."""

    prompt_index: int
    tokens: list[int]
    logprobs: list[float]
    text: str = ""
    finish_reason: str = "length"


def sample(logits, uniform, temperature, top_k=0, top_p=1.0):
    """Next ids (B,) and their log-probabilities (B,), from logits (B, V) and uniform numbers (B,)
    in [0, 1): the draw is the inverse of the cumulative distribution, so a row's result depends on
    its own number alone. top_k 0 keeps all; top_p the fewest tokens whose mass reaches it [8]."""
    logits = logits.float()
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        sorted_logprobs, order = logprobs.sort(-1, descending=True)
        p = sorted_logprobs.exp()
        if top_k:
            p[:, top_k:] = 0
        p = p.masked_fill(p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True), 0)
    else:
        p, order = logprobs.exp(), None
    mass = p.cumsum(-1)
    # right=True never lands on a token of probability 0: its mass does not exceed its neighbour's
    rank = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    rank = rank.clamp(max=mass.shape[-1] - 1)  # acts on NaN only: `generate` names those
    ids = rank if order is None else order.gather(-1, rank)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, num_samples=1,
             stop_ids=(), stop_strings=(), tokenizer=None, seed=0, use_cache=True, first_row=0,
             graphs=None):
    """Samples `num_samples` continuations of each prompt: a list of Completion, prompt by prompt.

    prompts: lists or arrays of ids (or strings, with `tokenizer`), of any lengths, one batch
    temperature, top_k, top_p: see `sample`; stop_ids, stop_strings: end a row (strings need
    `tokenizer`); seed: row r draws from (seed, r), whatever the other rows are and when they end;
    first_row: the number of the first row, where these prompts are a part of a larger batch
    use_cache=False recomputes everything at every token: the oracle of the cached path.
    graphs: a dict that keeps a GPU's captured graphs and their caches, for a caller that generates
      again with the same model, whose weights change in place, and dtype
    When a row is full (context_length tokens), it goes on from its last context_length // 2 tokens.
    raises ValueError on arguments that it cannot use
    """
    for name, value in (("prompts", prompts), ("stop_strings", stop_strings)):
        if isinstance(value, str):
            raise ValueError(f"{name} must be a list, got the text {value[:40]!r}; put it into one")
    prompts, stop_ids, stop_strings = list(prompts), tuple(stop_ids), tuple(stop_strings)
    if prompts and isinstance(prompts[0], str):
        if tokenizer is None:
            raise ValueError("prompts of text need a tokenizer, got none; pass one")
        prompts = [tokenizer.encode(p) for p in prompts]
    try:
        prompts = [list(p.tolist() if hasattr(p, "tolist") else p) for p in prompts]
    except TypeError:
        raise ValueError(f"each prompt must be a list of ids, got {prompts[0]!r}; put the ids of "
                         "one prompt into a list of their own") from None
    check_generation(model, prompts, tokenizer, max_new_tokens, temperature, top_k, top_p,
                     num_samples, stop_strings)
    device, limit = next(model.parameters()).device, model.config.context_length
    rows = [Completion(i, [], []) for i in range(len(prompts)) for _ in range(num_samples)]
    generator, draws = torch.Generator(), torch.empty(len(rows), max_new_tokens)
    for r, row in enumerate(draws.unbind()):
        generator.manual_seed(fold_seed((seed << 20) + first_row + r))
        torch.rand(max_new_tokens, generator=generator, out=row)
    draws = draws.T.contiguous().to(device)
    windows = [clip_window(p, limit) for p in prompts]
    fixed = use_cache and replays(device) and max(map(len, windows)) + max_new_tokens <= limit
    last, cache = prefill(model, windows, 0 if fixed else max_new_tokens, device, use_cache)
    shared = torch.tensor([row.prompt_index for row in rows], device=device)
    drawn = Drawn(max_new_tokens, len(rows), stop_ids, stop_strings, tokenizer)
    sampling = temperature, top_k, top_p
    if fixed:
        decode_fixed(model, drawn, last[shared], cache, shared, draws, sampling, graphs)
    else:
        windows = [list(windows[row.prompt_index]) for row in rows]
        if cache:
            cache.select(shared)
        decode_ragged(model, drawn, last[shared], cache, draws, sampling, windows)
    drawn.fill(rows)
    if tokenizer:
        for row in rows:
            row.text = completion_text(row, stop_ids, stop_strings, tokenizer)
    return rows


def decode_ragged(model, drawn, last, cache, draws, sampling, windows):
    """Fills `drawn` with tokens: rows that end leave the batch, those that are full begin again.

    last: (B, C), the hidden state after each prompt; cache: of the prompts, None to do without
    draws: (max_new_tokens, B) in [0, 1); sampling: temperature, top_k and top_p of `sample`
    windows: the ids of each prompt
    """
    alive, limit, use_cache = np.arange(len(windows)), model.config.context_length, bool(cache)
    for n in range(len(draws)):
        ids, logprobs = sample(model.lm_head(last), draws[n], *sampling)
        keep = drawn.take(n, alive, ids.cpu(), logprobs.cpu())
        for r in alive:
            windows[r].append(int(drawn.ids[n, r]))
        left = len(draws) - n - 1
        if not len(keep) or not left:
            break
        if len(keep) < len(alive):
            alive, chosen = alive[keep], torch.from_numpy(keep).to(last.device)
            ids, draws = ids[chosen], draws[:, chosen]
            if cache:
                cache.select(chosen)
        if not use_cache or any(len(windows[r]) > limit for r in alive):
            for r in alive:
                windows[r] = clip_window(windows[r], limit)
            last, cache = prefill(model, [windows[r] for r in alive], left, last.device, use_cache)
        else:
            last = model.hidden_states(ids[:, None], cache)[:, 0]


# Rows up to which a batch stays as it is: fewer take no less time, and a graph of them is not free.
FEW_ROWS = 256


def decode_fixed(model, drawn, last, cache, shared, draws, sampling, graphs=None):
    """`decode_ragged` for a device that waits for its host: one token of all rows is one replay of
    a CUDA graph, and is looked at while the next is drawn. Rows that have ended go on, unread,
    until half of a large batch has. Every row must have room for all its tokens.

    last: (B, C); cache: of the prompts; shared: (B,) int, the prompt of each row
    graphs: {(B, sampling, dtype): DecodeStep} to take and keep steps in, None for none
    """
    alive, kept = np.arange(len(last)), {} if graphs is None else graphs
    room = -(-(cache.end + len(draws)) // 64) * 64  # prompts of many lengths share a graph
    size = min(room, model.config.context_length)

    def start(rows, source, ids, logprobs):
        key = len(rows), sampling, source.k.dtype
        step = kept.get(key)
        if step is None or step.cache.k.shape[3] < size:
            step = kept[key] = DecodeStep(model, source, len(rows), size, sampling)
        step.load(source, rows, ids, logprobs)
        return step

    step = start(shared, cache, *sample(model.lm_head(last), draws[0], *sampling))
    for n in range(len(draws)):
        on_host = step.on_host()
        if n + 1 < len(draws):
            step(draws[n + 1])
        try:
            going = drawn.take(n, alive, *on_host())
        except ValueError:  # numbers that are not finite stay in the caches
            kept.clear()
            raise
        if not len(going) or n + 1 == len(draws):
            break
        half = -(-len(alive) // 2)
        if len(going) <= half and len(alive) > FEW_ROWS:  # always so many, for the graph's sake
            ended = np.setdiff1d(np.arange(len(alive)), going)[: half - len(going)]
            places = np.concatenate((going, ended))
            alive, chosen = alive[places], torch.from_numpy(places).to(last.device)
            if graphs is None:
                kept.clear()
            draws = draws[:, chosen]
            step = start(chosen, step.cache, step.ids[chosen], step.logprobs[chosen])


class DecodeStep:
    """Draws the next token of every row of a batch into `ids` and `logprobs` (B,), by a CUDA graph
    from the second time on: hundreds of small kernels then cost the host one launch. It has a
    cache of its own, of `size` tokens and of the device and dtype of another."""

    def __init__(self, model, like, B, size, sampling):
        device = like.k.device
        self.model, self.sampling, self.graph, self.calls = model, sampling, None, 0
        self.cache = KVCache(model.config, B, size, device, like.k.dtype)
        self.cache.fixed = True
        self.ids = torch.zeros(B, dtype=torch.long, device=device)
        self.logprobs, self.uniform = torch.zeros(2, B, device=device)

    def load(self, source, rows, ids, logprobs):
        """Begins with these tokens of these rows (B,) of another cache, `source`."""
        end = source.k.shape[3]
        for mine, other in ((self.cache.k, source.k), (self.cache.v, source.v)):
            mine[:, :, :, :end].copy_(other[:, rows, :, : mine.shape[3]])
        self.cache.lengths.copy_(source.lengths[rows])
        self.cache.end = source.end
        self.ids.copy_(ids)
        self.logprobs.copy_(logprobs)

    def __call__(self, uniform):
        """uniform: (B,) in [0, 1)"""
        self.uniform.copy_(uniform)
        self.calls += 1
        if self.ids.device.type != "cuda" or self.calls == 1:  # a capture must find all compiled
            self.draw()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.draw()
        self.graph.replay()

    def draw(self):
        hidden = self.model.hidden_states(self.ids[:, None], self.cache)[:, 0]
        ids, logprobs = sample(self.model.lm_head(hidden), self.uniform, *self.sampling)
        self.ids.copy_(ids)
        self.logprobs.copy_(logprobs)

    def on_host(self):
        """A function that waits for what `ids` and `logprobs` hold now, and returns it."""
        copies = [x.to("cpu", non_blocking=True, copy=True) for x in (self.ids, self.logprobs)]
        mark = time_mark(self.ids.device)

        def wait():
            if isinstance(mark, torch.cuda.Event):
                mark.synchronize()
            return copies

        return wait


class Drawn:
    """The tokens drawn for R rows, on the host: whole arrays a token, since the device waits."""

    def __init__(self, room, R, stop_ids, stop_strings, tokenizer):
        self.ids, self.logprobs = np.zeros((room, R), np.int64), np.zeros((room, R), np.float32)
        self.lengths, self.is_over = np.zeros(R, np.int64), np.zeros(R, bool)
        self.stop_ids, self.stop_strings, self.tokenizer = [*stop_ids], stop_strings, tokenizer
        # a stop string may span tokens: a token is at least one byte, so this tail always holds it
        self.tail = 1 + max((len(s.encode()) for s in stop_strings), default=0)

    def take(self, n, rows, ids, logprobs):
        """Notes token n, ids (B,) and logprobs (B,), of rows (B,) that have not ended; returns the
        places in `rows` of those that go on. raises ValueError where logits are not finite"""
        places = np.flatnonzero(~self.is_over[rows])
        rows, ids, logprobs = rows[places], ids.numpy()[places], logprobs.numpy()[places]
        if not np.isfinite(logprobs).all():
            raise ValueError("the model's logits must be finite, got others; check its weights")
        self.ids[n, rows], self.logprobs[n, rows], self.lengths[rows] = ids, logprobs, n + 1
        is_over = np.isin(ids, self.stop_ids)
        for j in np.flatnonzero(~is_over) if self.stop_strings else ():
            tail = self.ids[max(0, n + 1 - self.tail) : n + 1, rows[j]].tolist()
            text = decode_known(self.tokenizer, tail)
            is_over[j] = any(s in text for s in self.stop_strings)
        self.is_over[rows] = is_over
        return places[~is_over]

    def fill(self, completions):
        """Gives each Completion its row."""
        ids, logprobs = self.ids.T.copy(), self.logprobs.T.copy()  # rows in one piece each
        for r, (row, end) in enumerate(zip(completions, self.lengths.tolist(), strict=True)):
            row.tokens, row.logprobs = ids[r, :end].tolist(), logprobs[r, :end].tolist()
            row.finish_reason = "stop" if self.is_over[r] else "length"


def replays(device):
    """Whether generation on this torch.device is faster as a CUDA graph of fixed shapes."""
    return device.type == "cuda"


def prefill(model, windows, room, device, use_cache):
    """The hidden state (B, C) after each window, and a cache of the windows with room for `room`
    more tokens, up to context_length (None without use_cache)."""
    lengths = torch.tensor([len(w) for w in windows], device=device)
    longest = max(len(w) for w in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.long)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window)] = torch.tensor(window)  # padded on the right: no real token sees the pad
    cache = None
    if use_cache:
        max_length = min(model.config.context_length, longest + room)
        dtype = next(model.parameters()).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        cache = KVCache(model.config, len(windows), max_length, device, dtype)
    hidden = model.hidden_states(ids.to(device), cache)
    if cache:
        cache.lengths = lengths
    return hidden[torch.arange(len(windows), device=device), lengths - 1], cache


def clip_window(tokens, context_length):
    """`tokens`, or their last context_length // 2 when there are more than context_length."""
    return tokens if len(tokens) <= context_length else tokens[-max(1, context_length // 2) :]


def decode_known(tokenizer, tokens):
    """The text of `tokens`, without ids that the model knows and its tokenizer does not."""
    size = getattr(tokenizer, "vocab_size", None)
    if hasattr(tokenizer, "__len__"):  # Hugging Face's, whose vocab_size omits added tokens
        size = len(tokenizer)
    if size is not None and max(tokens, default=0) >= size:
        tokens = [t for t in tokens if t < size]
    return tokenizer.decode(tokens)


def completion_text(row, stop_ids, stop_strings, tokenizer):
    """The row's text, without the stop id, cut behind the first stop string."""
    tokens = row.tokens[:-1] if row.tokens and row.tokens[-1] in stop_ids else row.tokens
    text = decode_known(tokenizer, tokens)
    ends = [text.find(s) + len(s) for s in stop_strings if s in text]
    return text[: min(ends)] if ends else text


def check_generation(model, prompts, tokenizer, max_new_tokens, temperature, top_k, top_p,
                     num_samples, stop_strings):
    """raises ValueError on arguments that `generate` cannot use."""
    V = model.config.vocab_size
    ids = [i for p in prompts for i in (min(p), max(p))] if all(map(len, prompts)) else []
    problems = [
        (not ids, "there must be a prompt, and each must hold at least one token, got none; give "
         "some text"),
        (ids and (min(ids) < 0 or max(ids) >= V), f"prompt ids must lie in 0..{V - 1}, got "
         f"{min(ids, default=0)}..{max(ids, default=0)}; use the model's tokenizer"),
        (min(max_new_tokens, num_samples) < 1, "max_new_tokens and num_samples must be at least 1, "
         f"got {max_new_tokens} and {num_samples}; raise them"),
        (not (temperature == 0 or 1e-6 <= temperature < math.inf), "temperature must be 0 or at "
         f"least 1e-6, got {temperature}; 0 draws the likeliest token"),
        (top_k < 0 or not 0 < top_p <= 1, "top_k must be at least 0 and top_p in (0, 1], got "
         f"{top_k} and {top_p}; correct them"),
        (stop_strings and tokenizer is None, "stop_strings need a tokenizer, got none; pass one"),
        ("" in stop_strings, "stop_strings must not be empty, got ''; leave it out"),
    ]
    for found, message in problems:
        if found:
            raise ValueError(message)


# -------------------------------------------------------------------------------------------------
# Hugging Face directories: config.json, model.safetensors (one or sharded), tokenizer.json

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
                      "U8": torch.uint8, "BOOL": torch.bool}

HF_FIELDS = {  # of ModelConfig: of config.json
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
    "d_model": "hidden_size", "num_layers": "num_hidden_layers", "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "d_head": "head_dim", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
HF_OPTIONAL = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6,
                   tie_word_embeddings=False)
LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor",
                 "original_max_position_embeddings")


def read_safetensors(path):
    """The tensors of one file, {name: view of a memory map; writing to one leaves the file alone}.
    The format: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape,
    data_offsets}}, the data. raises ValueError for a damaged file."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if size < start:
                raise ValueError("shorter than its header")
            header = json.loads(f.read(start - 8))
        data = np.memmap(path, dtype=np.uint8, mode="c")  # copy-on-write: torch wants writable
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = (start + offset for offset in entry["data_offsets"])
            if not start <= first <= last <= size:
                raise ValueError(f"tensor {name} lies outside the file")
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            raw = torch.from_numpy(data[first:last])
            aligned = first % dtype.itemsize == 0
            tensors[name] = (raw if aligned else raw.clone()).view(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error!r}; "
                         "copy it again") from None
    return tensors


def write_safetensors(tensors, path):
    """Writes {name: tensor} as one safetensors file, atomically."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[offset, end])
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    with atomic_write(path) as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            f.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def write_json(content, path):
    with atomic_write(path) as f:
        f.write(json.dumps(content, indent=2).encode())


def hf_names(config):
    """{our parameter name: Hugging Face's}, for Llama, Qwen2 and Qwen3 alike."""
    block = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm",
             "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
             "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
             "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj"}
    if config.qk_norm:
        block.update({"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"})
    names = {"token_embeddings.weight": "model.embed_tokens.weight",
             "ln_final.weight": "model.norm.weight"}
    for i in range(config.num_layers):
        for ours, theirs in block.items():
            names[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
            if config.qkv_bias and ours[-6:] in ("q_proj", "k_proj", "v_proj"):
                names[f"layers.{i}.{ours}.bias"] = f"model.layers.{i}.{theirs}.bias"
    if not config.tie_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    return names


def swap_rotary_layout(name, tensor, d_head, to_hf):
    """q and k rows between our pairs (2j, 2j+1) and Hugging Face's pairs (j, j + D/2); others as
    are. Only the order of a head's rows differs: scores are the same sums."""
    if not any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
        return tensor
    heads = tensor.unflatten(0, (-1, d_head // 2, 2) if to_hf else (-1, 2, d_head // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def config_from_hf(hf, path):
    """The ModelConfig of the config.json in `path`, given as a dict. raises ValueError for what we
    do not have and for what is no size."""
    file = os.path.join(path, "config.json")
    kind = hf.get("model_type")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5; before
    if not isinstance(rope, dict):
        raise ValueError(f"{file} must give rotary settings as an object, got {rope!r}; "
                         "copy it again")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    turned = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
    problems = [
        (kind not in ("llama", "qwen2", "qwen3"), f"model_type {kind!r} (llama, qwen2, qwen3)"),
        (hf.get("hidden_act", "silu") != "silu", f"hidden_act {hf.get('hidden_act')!r} (silu)"),
        (rope_type not in ("default", "llama3"), f"rope_type {rope_type!r} (default, llama3)"),
        (turned != 1, f"partial_rotary_factor {turned!r} (1, whole heads)"),
        (hf.get("mlp_bias"), "mlp_bias (none)"),
        (hf.get("attention_bias"), "attention_bias (a bias on o_proj)"),
        (hf.get("use_sliding_window"), "use_sliding_window (full attention)"),
        ("quantization_config" in hf, "quantization_config (unquantised weights)"),
    ]
    for found, what in problems:
        if found:
            raise ValueError(f"{path} must be a model that we can run, got {what}; "
                             "choose another model")
    hf = HF_OPTIONAL | {name: value for name, value in hf.items() if value is not None}
    hf["rope_theta"] = rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    scaling = rope if rope_type == "llama3" else None
    check_hf_sizes(hf, scaling, file)
    try:
        return ModelConfig(
            **{ours: hf[theirs] for ours, theirs in HF_FIELDS.items()},
            rope_theta=float(hf["rope_theta"]), rope_scaling=scaling,
            qkv_bias=kind == "qwen2",  # has biases on q, k and v, and no flag for them
            qk_norm=kind == "qwen3")
    except ValueError as error:  # sizes that contradict each other
        raise ValueError(f"{file}: {error}") from None


def check_hf_sizes(hf, scaling, file):
    """raises ValueError unless config.json's numbers are sizes that a model can have.
    scaling: llama3's rotary settings, None without."""
    whole = {name: hf.get(name) for name in HF_FIELDS.values()
             if name not in ("rms_norm_eps", "tie_word_embeddings")}
    real = {name: hf[name] for name in ("rms_norm_eps", "rope_theta")}
    if scaling is not None:
        real |= {name: scaling.get(name) for name in LLAMA3_FIELDS}
    for name, value in (whole | real).items():
        if name in HF_OPTIONAL and value is None:
            continue
        kinds, words = (int, "a whole number") if name in whole else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise ValueError(f"{file} must give {name} as {words} above 0, got {value!r}; "
                             "copy it again")
    if scaling is not None and real["low_freq_factor"] >= real["high_freq_factor"]:
        raise ValueError(f"{file} must give a low_freq_factor below its high_freq_factor, got "
                         f"{real['low_freq_factor']} and {real['high_freq_factor']}; "
                         "copy it again")


def config_to_hf(config, dtype):
    """The config.json that transformers, vLLM and llama.cpp read; ValueError if none fits."""
    c = config
    if (c.norm, c.pos, c.ffn) != ("pre", "rope", "swiglu") or (c.qkv_bias and c.qk_norm):
        raise ValueError("a Hugging Face model must have norm=pre, pos=rope, ffn=swiglu and not "
                         f"both qkv_bias and qk_norm, got norm={c.norm}, pos={c.pos}, "
                         f"ffn={c.ffn}; keep the checkpoint instead")
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    rope = {"rope_theta": c.rope_theta, "rope_type": "default", **(c.rope_scaling or {})}
    return dict(
        model_type=kind, architectures=[f"{kind.capitalize()}ForCausalLM"],
        **{theirs: getattr(c, ours) for ours, theirs in HF_FIELDS.items()}, hidden_act="silu",
        attention_bias=False, mlp_bias=False, use_sliding_window=False,
        rope_theta=c.rope_theta, rope_parameters=rope, rope_scaling=c.rope_scaling,
        torch_dtype=str(dtype).removeprefix("torch."), initializer_range=0.02)


def from_pretrained(path, device="cpu", dtype=None, **overrides):
    """The model in a Hugging Face directory: Llama 2/3, Qwen2/2.5 or Qwen3, one file or sharded.

    dtype: of the weights, None for that of the file; overrides: ModelConfig fields, such as
    attention="eager" or a shorter context_length. The tokenizer: bpe.Tokenizer.load(path).
    raises ValueError for another architecture, a damaged file, a tensor that is missing, misshapen
    or has no place in the model that config.json describes.
    """
    path = os.fspath(path)
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        raise ValueError(f"{path} must be a folder with a config.json, got none; "
                         "give a model folder")
    hf = read_json_object(file)
    stored = config_from_hf(hf, path)
    config = replace(stored, **overrides)
    tensors = {}
    for shard in find_shards(path):
        tensors.update(read_safetensors(shard))
    check_no_tensor_is_left(tensors, stored, path)
    with torch.device("meta"):
        model = TransformerLM(config)
    expected, state = model.state_dict(), {}
    for ours, theirs in hf_names(config).items():
        if theirs not in tensors:
            raise ValueError(f"{path} must hold the tensor {theirs}, got none; "
                             "copy the model again")
        tensor = swap_rotary_layout(ours, tensors[theirs], config.d_head, to_hf=False)
        want, got = tuple(expected[ours].shape), tuple(tensor.shape)
        if want != got:
            raise ValueError(f"{theirs} must have shape {want}, got {got}; "
                             f"config.json and weights in {path} do not belong together")
        state[ours] = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["token_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.token_embeddings.weight
    model.text_bounds = {name: hf[name] for name in ("bos_token_id", "eos_token_id")
                         if isinstance(hf.get(name), (int, list))}
    beside = os.path.join(path, "generation_config.json")
    if os.path.isfile(beside):
        model.generation_config = read_json_object(beside)
    model.renew_rope(device)  # its tables are not in the file: made on the real device
    return model


def read_json_object(file):
    """The dict in a JSON file of a model folder; ValueError for other contents."""
    try:
        with open(file, encoding="utf-8") as f:
            content = json.load(f)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{file} must be whole JSON, got {error}; copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}; "
                         "copy it again")
    return content


def check_no_tensor_is_left(tensors, config, path):
    """raises ValueError where the files hold a tensor that `config`, config.json's own, has no
    place for: without it the model would be another one."""
    names = hf_names(config)
    left = {name for name in tensors.keys() - set(names.values())
            if not name.endswith("rotary_emb.inv_freq")}  # a table, in files of old: made anew
    head, embeddings = (tensors.get(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    if (config.tie_embeddings and head is not None and embeddings is not None
            and head.dtype == embeddings.dtype and torch.equal(head, embeddings)):
        left -= {"lm_head.weight"}  # one matrix, stored twice
    if left:
        first, more = min(left), f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"config.json in {path} must account for every tensor, got {first}{more} "
                         "that it has no place for; use the config that belongs to these weights")


def find_shards(path):
    """The safetensors files of a model folder."""
    single, index = (os.path.join(path, f"model.safetensors{end}") for end in ("", ".index.json"))
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise ValueError(f"{path} must hold model.safetensors (or an index), got neither; "
                         "convert it")
    where = read_json_object(index).get("weight_map")
    files = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
    if not files or any(os.path.basename(name) != name for name in files):
        raise ValueError(f"{index} must have a weight_map of tensors to files beside it, got "
                         f"{files or where!r}; copy the model again")
    files = [os.path.join(path, name) for name in files]
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"{file} must exist, got none: {index} names it; copy the model again")
    return files


def save_pretrained(model, tokenizer, path, dtype=None):
    """Writes `path`/config.json, model.safetensors, tokenizer.json: loads in transformers, vLLM and
    llama.cpp's converter. tokenizer may be None; dtype: of the stored weights, None to keep."""
    config, state = model.config, model.state_dict()
    dtype = dtype or state["lm_head.weight"].dtype
    hf = config_to_hf(config, dtype)
    os.makedirs(path, exist_ok=True)
    tensors = {theirs: swap_rotary_layout(ours, state[ours], config.d_head, to_hf=True).to(dtype)
               for ours, theirs in hf_names(config).items()}
    hf.update(model.text_bounds)
    if tokenizer is not None:
        special = special_ids(tokenizer)
        end = {t: i for i, t in special.items()}.get("<|endoftext|>")
        tokenizer.save(os.path.join(path, "tokenizer.json"))
        settings = dict(tokenizer_class="PreTrainedTokenizerFast",
                        model_max_length=config.context_length)
        for name in ("bos_token", "eos_token"):
            ids = hf.setdefault(f"{name}_id", end)
            first = ids[0] if isinstance(ids, list) and ids else ids
            if first in special:
                settings[name] = special[first]
        write_json(settings, os.path.join(path, "tokenizer_config.json"))
    beside = Path(path, "generation_config.json")
    if model.generation_config:
        write_json(model.generation_config, beside)
    else:
        beside.unlink(missing_ok=True)  # another model's
    write_safetensors(tensors, os.path.join(path, "model.safetensors"))
    write_json(hf, os.path.join(path, "config.json"))


def load_model(path, device="cpu", dtype=None, **overrides):
    """(model, tokenizer or None) from a Hugging Face folder, or train.py's checkpoint or folder."""
    from bpe import Tokenizer
    if os.path.isfile(os.path.join(path, "config.json")):
        model, folder = from_pretrained(path, device, dtype, **overrides), path
    else:
        file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
        content = read_checkpoint(file)
        try:
            config = ModelConfig(**content["config"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} must hold a config, got {error}; "
                             "use one of train.py") from None
        config = replace(config, **overrides)
        if config.attention == "flash":  # a choice of where it was trained, not of the weights
            try:
                load_flash_attention(torch.device(device))
            except ValueError as reason:
                print(f"attention is sdpa, not flash: {reason}")
                config = replace(config, attention="sdpa")
        model = TransformerLM(config)
        restore(content, model)
        for name in ("text_bounds", "generation_config"):  # of the folder that it began with
            setattr(model, name, content.get(name, {}))
        model, folder = model.to(device=device, dtype=dtype), os.path.dirname(os.path.abspath(file))
    for candidate in (os.path.join(folder, *inner, "tokenizer.json") for inner in ((), ("model",))):
        if os.path.exists(candidate):
            return model, Tokenizer.load(candidate)
    return model, None


def end_ids(model, tokenizer):
    """The ids that end a text: those of the folder that the model came from, else the tokenizer's
    special tokens, but those that a reader is shown."""
    for given in (model.generation_config, model.text_bounds):
        ends = given.get("eos_token_id")
        if isinstance(ends, (int, list)):
            return tuple(ends) if isinstance(ends, list) else (ends,)
    shown = getattr(tokenizer, "shown_tokens", ())
    return tuple(i for i, text in special_ids(tokenizer).items() if text not in shown)


def special_ids(tokenizer):
    """{id: text} of a tokenizer's special tokens."""
    special = {text.encode(): text for text in tokenizer.special_tokens}
    return {i: special[token] for i, token in tokenizer.vocab.items() if token in special}


# -------------------------------------------------------------------------------------------------
# devices


def resolve_device(name="auto"):
    """torch.device for "auto" (CUDA, else MPS, else CPU) or a name; ValueError if not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    there = {"cpu": True, "mps": mps, "cuda": cuda}.get(name.split(":")[0], False)
    if cuda and name[5:].isdigit() and int(name[5:]) >= torch.cuda.device_count():
        there = False
    if not there:
        raise ValueError(f"device must be one that PyTorch finds here, got {name!r}; "
                         "use --device auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:1 or mps, got {name!r}; "
                         "use auto") from None
    if device.type == "cuda":  # kernels and events without a device of their own go there too
        torch.cuda.set_device(device.index or 0)
    return device


def resolve_dtype(name, device):
    """(torch dtype to compute in, reason or None) for "auto", "float32" or "bfloat16". bfloat16
    only where the card has it in hardware: emulation is slower than float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        reason = f"float32: bfloat16 needs an NVIDIA card from 2020 on, not {device}"
        return (torch.bfloat16, None) if has_bf16 else (torch.float32, reason)
    if name == "bfloat16" and device.type == "cuda" and not has_bf16:
        return torch.float32, "float32: this card has no bfloat16 in hardware"
    return getattr(torch, name), None


def compile_problem(device):
    """None where torch.compile is worth using, else the reason why not."""
    kind = device.type
    if kind != "cuda":
        return f"not compiled: on {kind} the compiler costs more than it gives in a short run"
    problem = triton_problem(device)
    return problem and f"not compiled: {problem}"


def compute_context(device, dtype):
    """Autocast to `dtype` on `device`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def time_mark(device):
    """A point in time for `seconds_between`: now, or on CUDA when the GPU has done all it was given
    so far, which the host does not wait for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    """Seconds from one time_mark to a later one; on CUDA waits until the GPU has reached it."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def is_out_of_memory(error):
    """Whether a RuntimeError says so; a CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device):
    """Bytes that are free on `device` (on a CPU: of the machine), infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as lines:  # Linux
            return 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    return math.inf


def refuse_hopeless(times, batch_size):
    """raises ValueError where a step needs `times` the free memory, at least two: the estimate is
    not that wrong, and a system that runs out of memory may kill the process without a word."""
    if times >= 2:
        raise ValueError("a step must fit in the free memory, got one that needs "
                         f"{times:.1f} times that with batch_size {batch_size}, which cannot be "
                         "halved; lower --batch_size, --context_length or --d_model")


def peak_flops(device):
    """The card's dense bf16 matrix rate, FLOP/s, or None for one that PEAK_FLOPS does not list."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((rate for part, rate in PEAK_FLOPS.items() if part in words), None)


# -------------------------------------------------------------------------------------------------
# accounting


def count_parameters(config):
    """{part: parameters}; their sum is the model's. source: [1] A1, transformer_accounting"""
    c = config
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.d_head
    norms = (0 if c.norm == "none" else 2 * c.d_model) + (2 * c.d_head if c.qk_norm else 0)
    bias = (c.num_heads + 2 * c.num_kv_heads) * c.d_head if c.qkv_bias else 0
    return {
        "token_embeddings": 0 if c.tie_embeddings else c.vocab_size * c.d_model,
        "attention": c.num_layers * (heads * c.d_model + bias),
        "feed-forward": c.num_layers * (3 if c.ffn == "swiglu" else 2) * c.d_model * c.d_ff,
        "norms": c.num_layers * norms + (c.d_model if c.norm == "pre" else 0),
        "lm_head": c.vocab_size * c.d_model,
    }


def count_matmul_flops(config, batch_size=1, causal=False):
    """{part: FLOPs} of the matrix products of one forward pass over whole contexts, 2mnk each; a
    backward pass takes twice as many. causal halves scores and values: what the mask leaves.
    source: [1] A1, 3.6"""
    c, T = config, config.context_length
    N, width = batch_size * T, c.num_heads * c.d_head
    pairs = N * T // 2 if causal else N * T
    products = {  # of a block
        "q, k, v projections": N * c.d_model * c.d_head * (c.num_heads + 2 * c.num_kv_heads),
        "attention scores": pairs * width, "attention values": pairs * width,
        "output projection": N * width * c.d_model,
        "feed-forward": N * (3 if c.ffn == "swiglu" else 2) * c.d_model * c.d_ff,
    }
    blocks = {part: 2 * c.num_layers * value for part, value in products.items()}
    return {**blocks, "lm_head": 2 * N * c.d_model * c.vocab_size}


def flops_per_token(config):
    """FLOPs of training on one token: 3 forward passes of matmuls, causal half of attention."""
    return 3 * sum(count_matmul_flops(config, causal=True).values()) / config.context_length


def estimate_memory(config, batch_size, dtype=torch.float32, checkpoint_every=(),
                    device_type="cuda", levels=(), param_dtype=torch.float32, moment_dtype=None):
    """{part: bytes} that a training step needs at its peak. levels: see `TransformerLM.recompute`.

    Activations are what autograd saves in this file's layers, uncompiled; a test compares them with
    what it really saves. source: [1] A1 adamwAccounting, A2 gradient_checkpointing
    """
    c, T = config, config.context_length
    parts = count_parameters(c)
    parameters = sum(parts.values())
    N, size = batch_size * T, 2 if dtype == torch.bfloat16 else 4
    q_width, kv_width = c.num_heads * c.d_head, c.num_kv_heads * c.d_head
    norm = 0 if c.norm == "none" else 4 * c.d_model + (2 if size == 2 else 1) * size * c.d_model
    attention = size * (c.d_model + 2 * q_width + 2 * kv_width)  # input, q, output, k, v
    if c.qk_norm:
        attention += 2 * 4 * (q_width + kv_width)  # input and normed, float32
    if c.attention == "eager":
        attention += c.num_heads * T * (8 if size == 4 else 6)  # exp and weights; exp in float32
        attention += 2 * size * (q_width - kv_width)
    ffn = size * (c.d_model + (5 if c.ffn == "swiglu" else 3) * c.d_ff)
    a_block = N * (2 * norm + attention + ffn)
    kept, inner = 0, c.num_layers  # inputs of groups; blocks whose activations exist at one time
    for span in checkpoint_every:
        kept, inner = kept + math.ceil(inner / span), min(span, inner)
    blocks = kept * N * c.d_model * size + inner * a_block
    logits = min(N * c.vocab_size, CHUNK_LOGITS[device_type]) * (size + 4)
    if any(level != "none" for level in levels):
        wide = (2 if c.ffn == "swiglu" else 1) * c.d_ff
        cheap = 2 * c.d_model + 2 * q_width + 2 * kv_width + wide  # input, and products
        cheap += c.d_model if c.norm == "post" else 0  # the last one
        of = {"none": a_block, "cheap": size * N * cheap, "ffn": size * N * (cheap - wide),
              "block": size * N * c.d_model}
        blocks = sum(of[level] for level in levels) + a_block  # and one that is computed again
        logits = max(0, logits - a_block)  # when the logits are gone
    head = N * (norm + size * c.d_model) + logits + 4 * c.vocab_size * c.d_model
    cast = 2 * (parameters - parts["token_embeddings"]) if size < param_dtype.itemsize else 0
    weights, moments = (d.itemsize * parameters for d in (param_dtype, moment_dtype or param_dtype))
    return {"parameters": weights, "gradients": weights,
            "optimizer (m and v)": 2 * moments, "weights cast to bfloat16": cast,
            "activations of the blocks": blocks, "final norm and loss": head}


def memory_of_flags(args, config, batch_size, dtype, device, levels):
    """`estimate_memory` under the flags that training and ddp.py bench share."""
    return estimate_memory(config, batch_size, dtype, args.checkpoint_every, device.type, levels,
                           getattr(torch, args.param_dtype),
                           args.moment_dtype and getattr(torch, args.moment_dtype))


def least_recomputation(num_layers, need, free):
    """The levels of RECOMPUTE, one for each block, with the least work whose need(levels), in
    bytes, is at most `free`; "block" for all where none is."""
    steps = [(a, b, n) for a, b in itertools.pairwise(RECOMPUTE)
             for n in ((num_layers,) if b == "cheap" else range(1, num_layers + 1))]
    levels = ("none",) * num_layers
    for before, after, n in steps:
        if need(levels) <= free:
            break
        levels = (after,) * n + (before,) * (num_layers - n)
    return levels


def largest_batch(config, budget_bytes, **options):
    """The largest batch size whose `estimate_memory` fits in budget_bytes; 0 if none does."""
    return bisect.bisect_right(range(1, 2**24), budget_bytes, key=lambda size: sum(
        estimate_memory(config, size, **options).values()))


# -------------------------------------------------------------------------------------------------
# verbs


def count(args):
    """Prints parameters, FLOPs, memory and step time of the model that the flags describe."""
    config = config_from_flags(args)
    B, T = args.batch_size, config.context_length
    parameters, flops = count_parameters(config), count_matmul_flops(config, B)
    options = dict(dtype=getattr(torch, args.dtype), checkpoint_every=args.checkpoint_every)
    options["levels"] = choose_recomputation(
        args, config.num_layers, lambda levels: sum(
            estimate_memory(config, B, **options, levels=levels).values()), args.memory_gib * 2**30)
    memory = estimate_memory(config, B, **options)
    print(f"{config}{levels_in_words(options['levels'])}")
    for title, table, unit, scale in (
        ("parameters", parameters, "", 1),
        (f"matmul FLOPs, one forward pass, batch {B} x {T} tokens", flops, " GFLOP", 1e9),
        (f"memory of a training step at its peak, {args.dtype}", memory, " GiB", 2**30),
    ):
        total = sum(table.values())
        print(f"\n{title}")
        for part, value in [*table.items(), ("total", total)]:
            shown = f"{value:,}" if scale == 1 else f"{value / scale:,.2f}"
            print(f"  {part:<28}{shown:>18}{unit} {value / total:7.1%}")
    step = 3 * sum(flops.values())
    seconds = step / (args.peak_tflops * 1e12 * args.utilisation)
    used = sum(memory.values())
    each = sum(estimate_memory(config, B + 1, **options).values()) - used
    best = largest_batch(config, args.memory_gib * 2**30, **options)
    rest = 10 * sum(parameters.values())  # about 10 operations a parameter: see AdamW's docstring
    days = args.train_steps * seconds / 86_400
    print(f"\ntraining step: {step / 1e12:,.3f} TFLOP of matmuls and {rest / 1e12:.4f} TFLOP of "
          f"AdamW,\n  {seconds * 1e3:,.1f} ms at {args.utilisation:.0%} of {args.peak_tflops:g} "
          f"TFLOP/s\n  {args.train_steps:,} such steps of {B * T:,} tokens: {days:,.1f} days\n"
          f"memory about this batch: {each / 2**30:.3f} GiB x sequences + "
          f"{(used - B * each) / 2**30:.2f} GiB\n"
          f"largest batch in {args.memory_gib:g} GiB: {best} sequences of {T} tokens")


def bench(args):
    """The harness of assignment 2: times forward, backward and step; prints a table, then JSON."""
    global ANNOTATE
    device = resolve_device(args.device)
    if args.memory_snapshot and device.type != "cuda":
        raise ValueError("memory_snapshot needs an NVIDIA GPU, got none; leave it out")
    if args.nanogpt:
        return race_nanogpt(args)
    dtype, reason = resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    check_recompute_flags(args)
    config = config_from_flags(args)
    if config.attention == "flash":  # known before the model is made
        load_flash_attention(device)
    B, T = args.batch_size, config.context_length
    started = time.perf_counter()
    with device:
        model = TransformerLM(config)
    model.checkpoint_every = args.checkpoint_every
    levels = choose_recomputation(args, config.num_layers, lambda levels: sum(
        estimate_memory(config, B, dtype, levels=levels, device_type=device.type).values()),
        free_memory(device))
    model.recompute(levels)
    ANNOTATE = not args.compile  # main() switches it off again
    hidden_states = torch.compile(model.hidden_states) if args.compile else model.hidden_states
    optimizer = AdamW(optimizer_groups(model, 0.1))
    x, y = torch.randint(config.vocab_size, (2, B, T), device=device)
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    print(f"{config}\n{sum(p.numel() for p in model.parameters()):,} parameters, batch {B}, "
          f"{dtype}, {device} ({card}), torch {torch.__version__}, compile {args.compile}, "
          f"checkpoint_every {args.checkpoint_every}{levels_in_words(levels)}"
          + (f"; {reason}" if reason else ""))
    if T > 1:
        check_forward(model, x, device, dtype)

    def forward():
        with compute_context(device, dtype):
            hidden = hidden_states(x)
            if args.full_logits:
                return cross_entropy(hidden @ model.lm_head.weight.T, y)
            return linear_cross_entropy(hidden, model.lm_head.weight, y)

    run = functools.partial(timed_pass, forward=forward, model=model, optimizer=optimizer,
                            device=device)
    results = {}
    for mode in ("forward", "backward", "step") if args.mode == "all" else (args.mode,):
        try:
            results[mode] = time_mode(run, mode, args, device)
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            results[mode] = {"out_of_memory": True}
            print(f"{mode:<9} out of memory: a smaller --batch_size or --checkpoint_every 1 "
                  "may fit")
    if args.show_dtypes:
        show_dtypes(model, forward)
    if args.profile:
        print_kernel_table(lambda: run("step" if args.mode == "all" else args.mode), device)
    print(json.dumps({"preset": args.preset, "batch_size": B, "dtype": str(dtype)[6:],
                      "context_length": T, "device": card, "compile": args.compile,
                      "attention": config.attention, "param_dtype": "float32",
                      "checkpoint_every": args.checkpoint_every,
                      "recompute": count_levels(levels), "results": results,
                      "total_s": round(time.perf_counter() - started, 1)}))


def timed_pass(mode, forward, model, optimizer, device):
    """{part: seconds} of one "forward" pass, of it and its "backward", or of a whole "step"."""
    marks = [synchronised_time(device)]
    with torch.set_grad_enabled(mode != "forward"), annotate("forward"):
        loss = forward()
    marks.append(synchronised_time(device))
    if mode != "forward":
        with annotate("backward"):
            loss.backward()
        marks.append(synchronised_time(device))
    if mode == "step":
        with annotate("optimizer"):
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        marks.append(synchronised_time(device))
    optimizer.zero_grad(set_to_none=True)
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    return dict(zip(("forward", "backward", "optimizer"), seconds, strict=False))


def check_forward(model, x, device, dtype):
    """Stops unless the loss in this precision agrees with plain attention and float32 logits."""
    x, y = x[:1, :64], x[:1, 1:65]
    x = x[:, : y.shape[1]]
    with torch.no_grad():
        with compute_context(device, dtype):
            got = model.loss(x, y).item()
        for layer in model.layers:
            layer.attn.config = replace(model.config, attention="eager")
        expected = cross_entropy(model(x), y).item()
        for layer in model.layers:
            layer.attn.config = model.config
    bound = 1e-4 if dtype == torch.float32 else 2e-2  # bf16 keeps 8 bits: 4e-3 a rounding
    print(f"check: loss {got:.5f}, plain float32 {expected:.5f}")
    if not abs(got - expected) <= bound * expected:
        raise ValueError(f"the fast loss must be within {bound} of the plain one, got {got} and "
                         f"{expected}; this is a bug")


def race_nanogpt(args):
    """Races our training step against that of the nanoGPT in the folder --nanogpt, same shape,
    batch, dtype and compiler, in turns of `repeats` steps without a pause; prints tokens a second.
    """
    device = resolve_device(args.device)
    dtype, _ = resolve_dtype(args.dtype, device)
    c, B = config_from_flags(args), args.batch_size
    spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(args.nanogpt, "model.py"))
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(
        block_size=c.context_length, vocab_size=c.vocab_size, n_layer=c.num_layers,
        n_head=c.num_heads, n_embd=c.d_model, dropout=0.0, bias=False)).to(device)
    ours = TransformerLM(c).to(device)
    make_fast = torch.compile if args.compile else lambda f: f
    their_forward, hidden_states = make_fast(theirs), make_fast(ours.hidden_states)
    their_optimizer = theirs.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    our_optimizer = AdamW(optimizer_groups(ours, 0.1), lr=6e-4, betas=(0.9, 0.95))
    x, y = torch.randint(c.vocab_size, (2, B, c.context_length), device=device)

    def their_step():
        with compute_context(device, dtype):
            _, loss = their_forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad(set_to_none=True)

    def our_step():
        with compute_context(device, dtype):
            loss = linear_cross_entropy(hidden_states(x), ours.lm_head.weight, y)
        loss.backward()
        clip_grad_norm_(ours.parameters(), 1.0)
        our_optimizer.step()
        our_optimizer.zero_grad(set_to_none=True)

    rates = {"nanoGPT": [], "lmzero": []}
    for turn in range(6):
        for name, step in (("nanoGPT", their_step), ("lmzero", our_step)):
            for _ in range(3):
                step()
            started = synchronised_time(device)
            for _ in range(args.repeats):
                step()
            seconds = synchronised_time(device) - started
            if turn:  # the first turn warms up
                rates[name].append(args.repeats * B * c.context_length / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:<8} {medians[name]:>12,.0f} tok/s, 5 turns of {args.repeats} steps from "
              f"{min(values):,.0f} to {max(values):,.0f}")
    print(json.dumps({"batch_size": B, "context_length": c.context_length, "dtype": str(dtype)[6:],
                      "compile": args.compile, "tokens_per_s": rates,
                      "ratio": round(medians["lmzero"] / medians["nanoGPT"], 4)}))


def synchronised_time(device):
    """Seconds on the clock once the device has finished: kernels run behind the host."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def time_mode(run, mode, args, device):
    """Times `run(mode)` after a warm-up: prints mean, spread and peak memory; returns them and the
    median, {part: {mean_ms, median_ms, std_ms}} and peak_gib."""
    cuda = device.type == "cuda"
    for _ in range(args.warmup_steps):
        run(mode)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        if args.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    repeats = [run(mode) for _ in range(args.repeats)]
    if cuda and args.memory_snapshot:
        torch.cuda.memory._dump_snapshot(f"{mode}_{args.memory_snapshot}")
        torch.cuda.memory._record_memory_history(enabled=None)
    peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
    row, line = {"peak_gib": peak_gib and round(peak_gib, 2)}, f"{mode:<9}"
    for part in [*repeats[0], "total"]:
        ms = [1e3 * (sum(r.values()) if part == "total" else r[part]) for r in repeats]
        mean, std = statistics.mean(ms), statistics.pstdev(ms)
        row[part] = dict(mean_ms=round(mean, 3), median_ms=round(statistics.median(ms), 3),
                         std_ms=round(std, 3))
        line += f"| {part} {row[part]['mean_ms']:.2f} +- {row[part]['std_ms']:.2f} ms "
    print(line + (f"| peak {peak_gib:.2f} GiB" if cuda else ""), flush=True)
    return row


def show_dtypes(model, forward):
    """Prints the dtype of each part under the chosen precision. source: [1] A2, mixed precision"""
    first = model.layers[0]
    parts = {"embedding": model.token_embeddings, "norm": first.ln1, "q_proj": first.attn.q_proj,
             "attention": first.attn, "feed-forward": first.ffn}
    seen = {"parameters": next(model.parameters()).dtype}
    hooks = [
        module.register_forward_hook(
            lambda m, i, out, name=name: seen.update({f"{name} output": out.dtype}))
        for name, module in parts.items()
    ]
    loss = forward()
    loss.backward()
    for hook in hooks:
        hook.remove()
    seen.update({"loss": loss.dtype, "gradients": first.attn.q_proj.weight.grad.dtype})
    model.zero_grad(set_to_none=True)
    for name, dtype in seen.items():
        print(f"  {name:<22}{dtype}")


def print_kernel_table(run, device):
    """The 15 costliest kernels (operators on a CPU) of one call, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        run()
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    averages = profiler.key_averages()
    print(averages.table(sort_by=key, row_limit=15, max_name_column_width=60))
    for part in averages:  # the ranges of scaled_dot_product_attention, with --attention eager
        if part.key.startswith("attention "):
            us = part.device_time_total if cuda else part.cpu_time_total
            print(f"{part.key:<20}{us / 1e3:10.3f} ms in {part.count} calls")


def generate_text(args):
    """Prints continuations of a prompt."""
    device = resolve_device(args.device)
    model, tokenizer = load_model(args.model, device)
    if tokenizer is None:
        raise ValueError(f"{args.model} must have a tokenizer.json beside it, got none; "
                         "copy it there")
    start, bos = "<|endoftext|>", model.text_bounds.get("bos_token_id")
    if start not in tokenizer.special_tokens:  # Llama's begin of text
        start = next((text for i, text in special_ids(tokenizer).items() if i == bos), start)
    prompts = args.prompt or [start]
    stop_ids = () if args.ignore_end else end_ids(model, tokenizer)
    rows = generate(model, prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                    args.num_samples, stop_ids, tuple(args.stop), tokenizer, args.seed)
    for row in rows:
        if len(rows) > 1:
            print(f"--- prompt {row.prompt_index}, {len(row.tokens)} tokens, {row.finish_reason}")
        print(prompts[row.prompt_index].removeprefix(start) + row.text)


def export(args):
    """Writes a Hugging Face directory from a checkpoint or another such directory."""
    model, tokenizer = load_model(args.model)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    save_pretrained(model, tokenizer, args.out_dir, dtype)
    print(f"wrote {args.out_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")


def positive(kind, zero=False, below=math.inf):
    """An argparse type: a number above 0, or from 0 on, and below another."""
    def convert(text):
        value = kind(text)
        if not 0 <= value < below or (value == 0 and not zero):
            top = "finite" if below == math.inf else f"below {below}"
            bound = "at least" if zero else "above"
            raise argparse.ArgumentTypeError(f"must be {top} and {bound} 0, got {text}; change it")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its message
    return convert


@contextlib.contextmanager
def stop_politely(received):
    """Notes SIGTERM and SIGINT (Ctrl-C) in the list `received`: the step in hand is finished."""
    before = {number: signal.signal(number, lambda number, frame: received.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_out_dir(args):
    """raises ValueError unless --out_dir is a folder, or can be one, for the run of the flags."""
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out_dir must be a folder, got the file {out_dir}; give another")
    holds_a_run = any((out_dir / f).exists() for f in ("log.jsonl", "checkpoint.pt"))
    if holds_a_run and not (args.resume or args.overwrite):
        raise ValueError(f"out_dir must be a new folder, got {out_dir}, which holds a run;"
                         " give --resume to go on, --overwrite to start anew, or another")


def clear_run(out_dir):
    """Removes what a run left in out_dir but its log, which that of the next one replaces."""
    for pattern in ("checkpoint.pt*", "tokenizer.json", "model/*.json", "model/*.safetensors"):
        for old in filter(Path.is_file, Path(out_dir).glob(pattern)):
            old.unlink()


def first_line(error):
    """The first line of an error, or its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def open_log(path, step, first, validates=False):
    """The log.jsonl of a run, to append to: what it holds up to `step`, or the record `first`.
    validates: whether that step's validation will be made, or made again"""
    kept = []
    if step and os.path.exists(path):
        with open(path, encoding="utf-8") as log:
            for line in log.read().splitlines():
                with contextlib.suppress(ValueError, TypeError, AttributeError):  # half a line
                    record = json.loads(line)
                    again = validates and record.get("step") == step and "valid_loss" in record
                    if record.get("step", 0) <= step and not again:
                        kept.append(line)
    with atomic_write(path) as file:
        file.write(("\n".join(kept or [json.dumps(first)]) + "\n").encode())
    return open(path, "a", encoding="utf-8")


def log_line(entry, max_steps, mfu, left_s):
    """The line that shows a record of a training step; mfu None where the peak is not known."""
    e, left, memory = entry, int(left_s), entry.get("memory_gib")
    return (f"step {e['step']}/{max_steps} | loss {e['loss']:.4f} | lr {e['lr']:.2e} | "
            f"norm {e['grad_norm']:.2f} | {e['step_ms']:.1f} ms | {e['tokens_per_s']:,.0f} tok/s | "
            f"mfu {'n/a' if mfu is None else f'{mfu:.1%}'} | "
            f"{'' if memory is None else f'mem {memory:.1f} GiB | '}"
            f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")


def stop_on_non_finite(entry, drawn_from, highest, sequences, saved):
    """raises FloatingPointError that names step and batch of a loss or gradient that is no number:
    `sequences` windows that began below `highest`, by a generator in the state `drawn_from`."""
    generator = torch.Generator().set_state(drawn_from)
    starts = torch.randint(highest, (sequences,), generator=generator)[:4].tolist()
    raise FloatingPointError(
        f"loss and gradient must be finite, got loss {entry['loss']} and norm {entry['grad_norm']} "
        f"at step {entry['step']}, on windows that start at training tokens "
        f"{', '.join(map(str, starts))} ...; lower --lr, "
        + ("no checkpoint was saved before" if saved is None else
           f"the last good checkpoint is of step {saved}"))


def export_and_sample(model, tokenizer, out_dir, prompt, num_tokens, seed):
    """The end of a run: writes the Hugging Face folder out_dir/model, prints a sample."""
    try:
        save_pretrained(model, tokenizer, out_dir / "model")
    except ValueError as reason:  # the ablations have no Hugging Face class
        print(f"{out_dir / 'model'} was not written: {reason}")
    if tokenizer:
        (row,) = generate(model, [prompt or "<|endoftext|>"], num_tokens, 0.8, top_p=0.95,
                          tokenizer=tokenizer, seed=seed, stop_ids=end_ids(model, tokenizer))
        print(f"--- sample\n{prompt}{row.text}\n---")


def saved_flags(out_dir, given=None):
    """The flags of the run in `out_dir`, of its checkpoint or before the first one of its log, but
    those that contradict what `given`, the flags of now, say."""
    flags = {}
    log_path = os.path.join(out_dir, "log.jsonl")
    with (contextlib.suppress(FileNotFoundError, KeyError, ValueError, IndexError),
          open(log_path, encoding="utf-8") as log):
        flags = json.loads(log.readline())["flags"]
    with contextlib.suppress(FileNotFoundError, KeyError):
        flags = dict(read_checkpoint(os.path.join(out_dir, "checkpoint.pt"))["flags"])
    for now, then in (("checkpoint_every", "recompute"), ("recompute", "checkpoint_every")):
        if getattr(given, now, "none") not in ([], "none"):
            flags.pop(then, None)
    return flags


def print_any_text():
    """Lets print() write what the terminal's encoding lacks, escaped, instead of stopping."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def build_parser():
    parser = argparse.ArgumentParser(prog="model.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    dtypes, counting, rate = ("float32", "bfloat16"), positive(int), positive(float)
    p = verbs.add_parser("count", help="parameters, FLOPs, memory, step time")
    add_model_flags(p)
    add = p.add_argument
    add("--batch_size", type=counting, default=1)
    add("--dtype", default="float32", choices=dtypes)
    add_recompute_flags(add)
    add("--peak_tflops", type=rate, default=19.5, help="of the device (19.5: A100, float32)")
    add("--utilisation", type=rate, default=0.5, help="share of the peak that is reached")
    add("--memory_gib", type=rate, default=80, help="of the device")
    add("--train_steps", type=counting, default=400_000)
    p.set_defaults(run=count)

    p = verbs.add_parser("bench", help="time and memory of forward, backward and step")
    add_model_flags(p)
    add = p.add_argument
    add("--mode", default="all", choices=("all", "forward", "backward", "step"))
    add("--batch_size", type=counting, default=4)
    add("--warmup_steps", type=positive(int, zero=True), default=5)
    add("--repeats", type=counting, default=10)
    add("--device", default="auto")
    add("--dtype", default="float32", choices=("auto", *dtypes))
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--full_logits", action="store_true", help="the plain loss, with all logits in memory")
    add_recompute_flags(add)
    add("--memory_snapshot", metavar="FILE", help="writes MODE_FILE for pytorch.org/memory_viz")
    add("--nanogpt", metavar="DIR", help="race the training step of the nanoGPT in this folder")
    add("--profile", action="store_true", help="print the costliest kernels")
    add("--show_dtypes", action="store_true", help="print the dtype of each part")
    p.set_defaults(run=bench)

    p = verbs.add_parser("generate", help="text from a trained model")
    add = p.add_argument
    add("--model", default="out", help="a Hugging Face folder, a checkpoint or its folder")
    add("--prompt", action="append", help="repeat for several (default: end or begin of text)")
    add("--max_new_tokens", type=int, default=256)
    add("--temperature", type=float, default=0.8, help="0: the likeliest token")
    add("--top_k", type=int, default=0, help="0: all")
    add("--top_p", type=float, default=0.95)
    add("--num_samples", type=int, default=1)
    add("--stop", action="append", default=[], help="a string that ends the text")
    add("--ignore_end", action="store_true", help="go on past the end-of-text token")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    p.set_defaults(run=generate_text)

    p = verbs.add_parser("export", help="write a Hugging Face directory")
    add = p.add_argument
    add("--model", required=True, help="a checkpoint, its folder or a Hugging Face folder")
    add("--out_dir", required=True)
    add("--dtype", choices=(*dtypes, "float16"), help="of the stored weights")
    p.set_defaults(run=export)
    return parser


def main(argv=None):
    global ANNOTATE
    parser = build_parser()
    args = parser.parse_args(argv)
    print_any_text()
    try:
        args.run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.exit(2, f"model.py {args.verb}: error: {first_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"model.py {args.verb}: interrupted\n")
    finally:
        ANNOTATE = False


if __name__ == "__main__":
    main()
