"""Tests of flash_attn.py against plain attention in float64, written here from the definition.

On an NVIDIA GPU they run the real kernels; elsewhere the same kernels in Triton's interpreter, on a
seeded subset of the shapes. An error is norm(x - exact) / norm(exact), and what is allowed is:
- on a GPU 1.5 times that of PyTorch's own scaled_dot_product_attention on the same inputs (the
  issue's figure) or `Exact.floor`, which counts where PyTorch's is almost zero;
- in the interpreter INTERPRETED: float32 sums of some hundred terms (2^-24 a rounding, times the root
  of 129, times a few steps); float16 rounds p, ds and the results to 11 bits (2^-11 each, some steps);
  bfloat16 has 8 bits, which the interpreter truncates to (2^-7 each, all errors of one sign).
A gradient that cancels (a row that sees one key has dq = 0) is measured against the terms that do.
"""

import ctypes
import itertools
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    if os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
        # triton's own functions become interpreted ones when it is imported with the variable set;
        # torch.utils.flop_counter, which other tests use, may have imported it before (its compiled
        # part knows nothing of this, and cannot be loaded twice)
        for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
            if not name.startswith("triton._C"):
                del sys.modules[name]

import flash_attn as FA
import model as M

ROOT = pathlib.Path(__file__).resolve().parent.parent
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FLOAT32 = 4 * INTERPRETED[torch.float32]  # on a GPU too, where tiles are wider
NO_KERNELS = ""
if find_spec("triton") is None:
    NO_KERNELS = "triton is not installed"
elif not (ON_GPU or INTERPRETER):
    NO_KERNELS = "needs an NVIDIA GPU, or TRITON_INTERPRET=1"

kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("same_random_numbers_in_every_order_of_tests", "one_thread")


@pytest.fixture(autouse=True, scope="module")
def _interpreter_patches_the_language_once_a_kernel():
    # and not at every call of a helper in it, which is 40% of the time of these tests
    if NO_KERNELS or not INTERPRETER:
        yield
        return
    from triton.runtime import interpreter

    patch, run_kernel, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        languages = interpreter.tl, interpreter.tl.core
        seen = tuple(id(v) for v in function.__globals__.values() if any(v is x for x in languages))
        if seen not in patched:
            patched.add(seen)
            return patch(function)

    def run_afresh(self, *args, **kwargs):
        patched.clear()
        return run_kernel(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", patch_once)
        change.setattr(interpreter.GridExecutor, "__call__", run_afresh)
        yield


# -------------------------------------------------------------------------------------------------
# the oracle, inputs, and how far apart the two are


def visible(Tq, Tk, causal, lengths=None):
    """bool (Tq, Tk): query i sees key j. The last query stands at the last key; `lengths` of packed
    documents keep each to itself."""
    see = torch.ones(Tq, Tk, dtype=torch.bool)
    if causal:
        for i in range(Tq):
            see[i, max(0, i + Tk - Tq + 1) :] = False
    if lengths is not None:
        document = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])
        see &= document[:, None] == document[None, :]
    return see


class Exact:
    """Attention by its definition in float64, and its gradients by autograd where `do` is given.

    `size` is what an error of each is divided by: its norm, or that of the terms which cancel in it.
    """

    def __init__(self, q, k, v, see, scale=None, do=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
        q, k, v = leaves[0], *(t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in leaves[1:])
        see = see.to(q.device)
        scores = (q @ k.mT * scale).masked_fill(~see, -math.inf)
        sees_some = see.any(-1)[:, None]
        p = torch.where(sees_some, scores, 0.0).softmax(-1) * sees_some
        o = p @ v
        self.value = {"o": o.detach()}
        self.size = {"o": o.detach().norm()}
        self.lse = torch.logsumexp(scores, -1).detach()
        if do is None:
            return
        do = do.double()
        grads = torch.autograd.grad(o, leaves, do)
        self.value.update(zip(("dq", "dk", "dv"), grads, strict=True))
        with torch.no_grad():
            terms = scale * p * (do @ v.mT)
            terms = {"dq": (terms @ k).norm(), "dk": (terms.mT @ q).norm(), "dv": grads[2].norm()}
        for name, size in terms.items():
            self.size[name] = torch.maximum(size, self.value[name].norm())

    def floor(self, dtype, name):
        """An error for which nothing is to blame: half of what rounding the result makes, or three
        roundings of a float32; where terms cancel, what two float32 sums of up to 256 numbers in
        other orders differ by."""
        cancels = self.value[name].norm() < 0.1 * self.size[name]
        return max(torch.finfo(dtype).eps / 4, 3 * 2**-23) + cancels.item() * 2**-21

    def errors(self, results):
        return {n: ((x.double() - self.value[n]).norm() / self.size[n].clamp_min(1e-30)).item()
                for n, x in zip(self.value, results, strict=True)}  # fmt: skip

    def check(self, results, allowed):
        """Each error is within `allowed`, one number or one for each name. NaN is not."""
        if not isinstance(allowed, dict):
            allowed = dict.fromkeys(self.value, allowed)
        errors = self.errors(results)
        wrong = {n: f"{e:.2e} > {allowed[n]:.2e}" for n, e in errors.items() if not e <= allowed[n]}
        assert not wrong, wrong


def run(attend, q, k, v, do):
    """(o, dq, dk, dv) of attend(q, k, v), whose arguments keep their strides."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = attend(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def flash(q, k, v, do, **options):
    return run(lambda *qkv: FA.flash_attention(*qkv, **options), q, k, v, do)


def pytorch(q, k, v, do, see, scale):
    """PyTorch's attention in the same dtype: the yardstick on a GPU, with strides that it knows."""
    Tq, Tk = see.shape
    causal = Tq == Tk and torch.equal(see, torch.ones_like(see).tril())
    mask = None if causal or see.all() else see.to(q.device)
    grouped = q.shape[1] != k.shape[1]
    options = dict(attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return run(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options),
               *(t.clone(memory_format=torch.contiguous_format) for t in (q, k, v, do)))  # fmt: skip


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def assert_accurate(q, k, v, do=None, causal=True, scale=None, lengths=None, slack=1.0):
    """flash_attention is right: on a GPU with either backward, measured against PyTorch's errors."""
    do = torch.randn(q.shape, dtype=q.dtype, device=q.device) if do is None else do
    see = visible(q.shape[2], k.shape[2], causal, lengths)
    exact = Exact(q, k, v, see, scale, do)
    allowed = dict.fromkeys(exact.value, INTERPRETED[q.dtype] * slack)
    if ON_GPU:
        theirs = exact.errors(pytorch(q, k, v, do, see, scale))
        allowed = {n: max(1.5 * error, exact.floor(q.dtype, n)) for n, error in theirs.items()}
    options = dict(causal=causal, scale=scale)
    if lengths is not None:
        options["cu_seqlens"] = cumulative(lengths)
    for deterministic in (False, False, True) if ON_GPU else (None,):  # see flash_attn.Launch
        results = flash(q, k, v, do, deterministic=deterministic, **options)
        for result, like in zip(results, (q, q, k, v), strict=True):
            assert (result.shape, result.dtype) == (like.shape, like.dtype)
        exact.check(results, allowed)
    return results


def make(B=1, H=2, G=None, Tq=40, Tk=None, D=16, dtype=torch.float32, layout="contiguous"):
    """Standard normal q (B, H, Tq, D), k and v (B, G, Tk, D), laid out in memory as `layout` says."""
    G, Tk = G or H, Tq if Tk is None else Tk
    shapes = (B, H, Tq, D), (B, G, Tk, D), (B, G, Tk, D)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    if layout == "fused":  # what one projection to q, k and v gives
        packed = random(B, Tq, (H + 2 * G) * D)
        parts = packed.split((H * D, G * D, G * D), -1)
        return [part.unflatten(-1, (-1, D)).transpose(1, 2) for part in parts]
    if layout == "transposed":  # memory in the order (B, T, H, D)
        return [random(b, t, h, d).transpose(1, 2) for b, h, t, d in shapes]
    if layout == "columns":  # memory in the order (B, H, D, T): the last stride is not 1
        return [random(b, h, d, t).mT for b, h, t, d in shapes]
    if layout == "islands":  # NaN on every side in memory
        return [F.pad(random(*shape), (3, 5, 2, 70), value=math.nan)[:, :, 2 : 2 + shape[2], 3:-5]
                for shape in shapes]  # fmt: skip
    if layout == "expanded":  # one batch row seen B times
        return [random(1, *shape[1:]).expand(shape) for shape in shapes]
    assert layout == "contiguous", layout
    return [random(*shape) for shape in shapes]


# -------------------------------------------------------------------------------------------------
# importing


def start(code, *arguments, **env):
    """Starts `code` in the project's folder; TRITON_INTERPRET is unset there unless given."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env={**clean, **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def python(code, *arguments, **env):
    """(exit status, standard output, standard error) of `start`."""
    process = start(code, *arguments, **env)
    out, err = process.communicate()
    return process.returncode, out, err


def test_importing_flash_attn_imports_no_triton_and_starts_nothing():
    code = """
import sys, flash_attn, torch
assert not torch.cuda.is_initialized()
print([name for name in ("triton", "model", "bpe", "matplotlib") if name in sys.modules])
"""
    assert python(code) == (0, "[]\n", "")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_still_works_beside_a_file_of_the_name_of_its_optional_package():
    code = """
import torch, transformers
from transformers.utils import is_flash_attn_2_available
assert not is_flash_attn_2_available()
config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48,
                                  num_hidden_layers=2, num_attention_heads=4)
ids, logits = torch.arange(20)[None], {}
for attention in ("eager", "sdpa"):
    torch.manual_seed(0)
    config._attn_implementation = attention
    logits[attention] = transformers.LlamaForCausalLM(config)(ids).logits
print((logits["eager"] - logits["sdpa"]).abs().max().item())
"""
    status, out, err = python(code, HF_HUB_OFFLINE="1")
    assert status == 0, err
    assert float(out) < 1e-5  # float32, logits near 1


# -------------------------------------------------------------------------------------------------
# plain attention, and Algorithm 1 in PyTorch


def test_plain_attention_worked_example():
    # equal scores give the mean of the keys that a query sees: the first, then both
    v = torch.tensor([[1.0], [3.0]]).expand(1, 1, 2, 1)
    o, lse = FA.attention(torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1), v, causal=True)
    close(o.flatten(), torch.tensor([1.0, 2.0]))
    close(lse.flatten(), torch.tensor([0.0, math.log(2)]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (7, 7), (5, 9), (9, 5)])
def test_plain_attention_is_the_definition(causal, Tq, Tk):
    q, k, v = (t.cpu().double().requires_grad_() for t in make(B=2, H=4, G=2, Tq=Tq, Tk=Tk, D=6))
    do = torch.randn(q.shape, dtype=torch.float64)
    exact = Exact(q, k, v, visible(Tq, Tk, causal), 0.7, do)
    o, lse = FA.attention(q, k, v, causal, 0.7)
    grads = torch.autograd.grad(o, (q, k, v), do)
    assert o.dtype == torch.float64
    for ours, theirs in zip((o, *grads), exact.value.values(), strict=True):
        close(ours, theirs)
    close(lse, exact.lse)  # queries that see no key have -inf


def test_plain_attention_keeps_packed_documents_apart():
    lengths = [3, 0, 1, 5]
    q, k, v = (t.cpu().double() for t in make(H=2, G=1, Tq=9, D=4))
    for causal in (False, True):
        exact = Exact(q, k, v, visible(9, 9, causal, lengths))
        o, lse = FA.attention(q, k, v, causal, cu_seqlens=cumulative(lengths).cpu())
        close(o, exact.value["o"])
        close(lse, exact.lse)


FUNCTIONS = [
    pytest.param("FlashAttentionPyTorch", id="PyTorch"),
    pytest.param("FlashAttentionTriton", id="Triton", marks=kernels),
]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead, Tq, Tk, D", [((2,), 65, 65, 64), ((2, 2), 33, 33, 16),
                                             ((3,), 1, 1, 32), ((1, 2), 17, 70, 40)])  # fmt: skip
def test_both_functions_equal_the_definition_and_save_one_log_sum_exp(name, causal, lead, Tq, Tk, D):
    q, k, v = (torch.randn(*lead, t, D, device=DEVICE).requires_grad_() for t in (Tq, Tk, Tk))
    do = torch.randn_like(q)
    exact = Exact(*(t.view(-1, 1, *t.shape[-2:]) for t in (q, k, v)), visible(Tq, Tk, causal),
                  do=do.view(-1, 1, Tq, D))  # fmt: skip
    o = getattr(FA, name).apply(q, k, v, causal)
    saved = [t for t in o.grad_fn.saved_tensors if t.shape == q.shape[:-1]]
    assert len(saved) == 1 and saved[0].dtype == torch.float32
    close(saved[0].double().view(exact.lse.shape), exact.lse, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(o, (q, k, v), do)
    results = [t.view(-1, 1, *t.shape[-2:]) for t in (o.detach(), *grads)]
    exact.check(results, FLOAT32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_functions_are_not_causal_unless_told(name):
    q, k, v = (torch.randn(2, 20, 16, device=DEVICE) for _ in range(3))
    function = getattr(FA, name)
    assert torch.equal(function.apply(q, k, v), function.apply(q, k, v, False))
    assert not torch.allclose(function.apply(q, k, v), function.apply(q, k, v, True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_of_either_is_refused_not_forgotten(name):
    q, k, v = (torch.randn(2, 9, 16, device=DEVICE).requires_grad_() for _ in range(3))
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(getattr(FA, name).apply(q, k, v).sum(), q, create_graph=True)
        (first.square().sum() + q.sum()).backward()  # a gradient of q there is anyway


def test_the_pytorch_function_rounds_its_inputs_under_autocast_and_nothing_else():
    def attend(q, k, v):
        return FA.FlashAttentionPyTorch.apply(q, k, v, True)

    q, k, v, do = (torch.randn(2, 70, 16, device=DEVICE) for _ in range(4))
    inputs, do = (q, k.half(), v.bfloat16()), do.bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = run(attend, *inputs, do)
    assert [t.dtype for t in under] == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    by_hand = run(attend, *(t.bfloat16() for t in inputs), do)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(under, by_hand, strict=True))


# -------------------------------------------------------------------------------------------------
# the matrix of shapes


AXES = dict(
    causal=(False, True),
    T=(1, 17, 128, 129, 1000, 4096),
    D=(16, 32, 64, 80, 96, 128, 192, 256),
    heads=("equal", "grouped"),
    dtype=DTYPES,
    layout=("contiguous", "transposed", "fused"),
)


def matrix():
    """Every case on a GPU. In the interpreter, where a tile takes a millisecond, short ones and of
    these a seeded choice that has every value of each axis together with every value of each other."""
    axes = AXES if ON_GPU else {**AXES, "T": (1, 17, 128, 129)}
    # dtype and D first: neighbours share compiled kernels
    order = [axes[name] for name in ("dtype", "D", "causal", "T", "heads", "layout")]
    cases = [(causal, T, D, heads, dtype, layout)
             for dtype, D, causal, T, heads, layout in itertools.product(*order)]  # fmt: skip
    if ON_GPU:
        return cases
    random.Random(0).shuffle(cases)
    chosen, met = [], set()
    for least in (15, 6, 3, 1):  # those first that add much
        for case in cases:
            pairs = set(itertools.combinations(enumerate(case), 2))
            if len(pairs - met) >= least:
                chosen.append(case)
                met |= pairs
    return chosen


def title(value):
    if isinstance(value, bool):
        return "causal" if value else "full"
    return str(value).removeprefix("torch.")


@kernels
@pytest.mark.parametrize("causal, T, D, heads, dtype, layout", matrix(), ids=title)
def test_every_shape_is_as_accurate_as_pytorch(causal, T, D, heads, dtype, layout):
    B, G = (1 if T > 1000 else 2, 2) if ON_GPU else (1, 1)
    H = 2 * G if heads == "grouped" else G
    assert_accurate(*make(B, H, G, T, None, D, dtype, layout), causal=causal)


# What the matrix above does not reach of the kernels for Hopper; other cards run the same cases.


@needs_gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [
    dict(B=3, H=70, G=35, Tq=130, D=64), dict(B=3, H=70, G=35, Tq=130, D=128),
    dict(B=1, H=8, G=8, Tq=4200, D=64),
])  # fmt: skip
def test_programs_that_take_several_tiles_in_turn_are_right(shape, causal):
    assert_accurate(*make(**shape, dtype=torch.bfloat16), causal=causal)


@needs_gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("Tq, Tk, causal", [
    (65, 300, True), (1, 4097, True), (130, 200, True), (64, 66, True), (300, 65, False), (200, 1, False),
])  # fmt: skip
def test_sixteen_bit_queries_and_keys_may_be_of_different_numbers(Tq, Tk, causal, D):
    assert_accurate(*make(B=2, H=4, G=2, Tq=Tq, Tk=Tk, D=D, dtype=torch.bfloat16), causal=causal)


@needs_gpu
@pytest.mark.parametrize("D", [20, 64, 100, 104])
def test_sixteen_bit_heads_may_be_slices_between_poison(D):
    def island(t):  # rows a multiple of 16 bytes apart, as the copy engine needs them
        wide = -(-D // 8) * 8 + 16
        return F.pad(t, (8, wide - 8 - D, 2, 70), value=math.nan)[:, :, 2:-70, 8 : 8 + D]

    inputs = make(B=2, H=2, G=1, Tq=150, D=D, dtype=torch.bfloat16)
    assert_accurate(*map(island, inputs))


@needs_gpu
@pytest.mark.parametrize("T", [63, 64, 200])
def test_a_gradient_at_an_odd_place_in_memory_is_read_right(T):
    q, k, v = make(B=2, H=2, Tq=T, D=64, dtype=torch.bfloat16)
    aligned = torch.randn_like(q)
    odd = torch.cat([aligned.new_zeros(1), aligned.flatten()])[1:].view(q.shape)
    assert odd.data_ptr() % 16 == 2 and odd.is_contiguous()
    assert_accurate(q, k, v, aligned)  # compiles for aligned gradients first
    assert_accurate(q, k, v, odd)


@kernels
@pytest.mark.parametrize("ends", [[0, 16, -7], [-9, -3], [0, 40, -1, -1], [2**31 - 1], [2**31 - 8, 2**31 - 1]])
def test_nonsense_in_cu_seqlens_reads_nothing_out_of_bounds(ends):
    q, k, v = (t.requires_grad_() for t in make(G=1, Tq=96, layout="islands"))  # NaN all around
    ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    o = FA.flash_attention(q, k, v, cu_seqlens=ends)
    for x in (o, *torch.autograd.grad(o.sum(), (q, k, v))):
        assert torch.isfinite(x).all()


@kernels
def test_a_second_derivative_is_refused_not_forgotten():
    q, k, v = (t.requires_grad_() for t in make(Tq=9))
    (first,) = torch.autograd.grad(FA.flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        first.square().sum().backward()


@kernels
def test_a_tensor_as_scale_and_a_lazily_negated_query_are_not_misread():
    q, k, v = make(Tq=9)
    with pytest.raises(ValueError, match="scale must be a number"):
        FA.flash_attention(q, k, v, scale=torch.tensor(0.5))
    assert torch.equal(FA.flash_attention(torch._neg_view(q), k, v), FA.flash_attention(-q, k, v))
    apply = FA.FlashAttentionTriton.apply
    assert torch.equal(apply(torch._neg_view(q), k, torch._neg_view(v)), apply(-q, k, -v))


@kernels
def test_leading_dimensions_that_only_have_the_same_product_are_refused():
    q, k = zeros(2, 3, 2, 9, 16), zeros(3, 2, 2, 9, 16)
    for function in (FA.FlashAttentionTriton, FA.FlashAttentionPyTorch):
        with pytest.raises(ValueError, match="same"):
            function.apply(q, k, k)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_in_pytorch_refuse_integers(causal):
    with pytest.raises(ValueError, match="floating point, got int32"):
        FA.FlashAttentionPyTorch.apply(*3 * [torch.ones(2, 8, 16, dtype=torch.int32)], causal)


@kernels
@pytest.mark.parametrize("layout", ["columns", "islands", "expanded"])
@pytest.mark.parametrize("causal, D", [(True, 40), (False, 16)])
def test_unusual_strides_are_read_where_they_lie(layout, causal, D):
    q, k, v = make(B=2, G=1, Tq=35, D=D, layout=layout)
    assert_accurate(q, k, v, causal=causal)
    if layout == "islands":
        assert torch.isnan(q.as_strided((1,), (1,), q.storage_offset() - 1)).all()  # they are there


class Operations(TorchDispatchMode):
    """The names of the operations that PyTorch ran."""

    def __enter__(self):
        self.names = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@kernels
@pytest.mark.parametrize("layout", ["transposed", "fused"])
def test_nothing_is_copied_whatever_the_strides(layout):
    q, k, v = (t.requires_grad_() for t in make(B=2, G=1, layout=layout))
    with Operations() as forward:
        o = FA.flash_attention(q, k, v)
    do = torch.randn_like(o)
    with Operations() as backward:
        torch.autograd.grad(o, (q, k, v), do)
    copies = {"clone", "contiguous", "_to_copy", "repeat_interleave", "cat"}
    assert forward.names and not copies & set(forward.names + backward.names)


@kernels
def test_the_output_lies_in_memory_in_the_order_of_the_query():
    for layout in ("contiguous", "transposed"):
        q, k, v = make(B=2, layout=layout)
        assert FA.flash_attention(q, k, v).stride() == q.stride()


# -------------------------------------------------------------------------------------------------
# lengths, heads, scales, gradients


@kernels
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 33), (7, 40), (33, 70), (64, 66)])
def test_causal_is_aligned_to_the_end_of_the_keys(Tq, Tk):
    q, k, v = make(G=1, Tq=Tk, D=32)
    whole = FA.flash_attention(q, k, v)
    last = q[:, :, Tk - Tq :]
    # the same sums in other tiles
    close(FA.flash_attention(last, k, v), whole[:, :, Tk - Tq :], rtol=1e-5, atol=1e-5)
    assert_accurate(last, k, v)


@kernels
@pytest.mark.parametrize("Tq, Tk", [(1, 70), (70, 1), (40, 17), (17, 40), (65, 32)])
def test_queries_and_keys_may_be_of_different_numbers(Tq, Tk):
    assert_accurate(*make(G=1, Tq=Tq, Tk=Tk, D=24), causal=False)


@kernels
def test_grouped_heads_are_repeated_heads_whose_gradients_add_up():
    q, k, v = make(H=6, G=2, Tq=20)
    do = torch.randn_like(q)
    o, dq, dk, dv = flash(q, k, v, do)
    wide = flash(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), do)
    sums = [t.unflatten(1, (2, 3)).sum(2) for t in wide[2:]]
    for ours, theirs in zip((o, dq, dk, dv), (*wide[:2], *sums), strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-5)  # the same float32 sums in another order


@kernels
@pytest.mark.parametrize("H, G", [(3, 1), (6, 3), (5, 5)])
def test_any_number_of_heads_that_divides(H, G):
    assert_accurate(*make(B=2, H=H, G=G, Tq=7, D=16))


@kernels
@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-4])
def test_any_scale_above_zero(scale):
    assert_accurate(*make(Tq=45), scale=scale)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits_stay_finite_and_accurate(dtype, causal):
    q, k, v = make(H=1, Tq=70, D=64, dtype=dtype)
    # logits of 30 standard deviations; in float32 one of 100 carries a rounding of 100 * 2^-24,
    # which exp passes on as a relative error: ten times what a logit near 1 does, and some
    slack = 20.0 if dtype == torch.float32 else 2.0
    assert_accurate(30 * q, k, v, causal=causal, slack=slack)


@kernels
def test_logits_that_would_overflow_exp_do_not():
    q, k, v = make(Tq=40)
    results = flash(1000 * q, k, v, torch.randn_like(q))
    assert all(t.isfinite().all() for t in results)
    far = FA.flash_attention(torch.full_like(q, -1e4), torch.ones_like(k), v)  # all scores -4e4
    mean = v.cumsum(2) / torch.arange(1, 41, device=DEVICE)[:, None]
    close(far, mean, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_one_key_is_that_key(dtype):
    q, k, v = make(B=2, Tq=20, Tk=1, dtype=dtype)
    o, dq, _, dv = assert_accurate(q, k, v, torch.ones_like(q), causal=False)
    eps = torch.finfo(dtype).eps
    close(o, v.expand_as(o), rtol=2 * eps, atol=0)  # p / p, times v
    close(dv, torch.full_like(dv, 20), rtol=2 * eps, atol=0)
    assert_accurate(*make(B=2, Tq=1, dtype=dtype))
    first = FA.flash_attention(*make(Tq=70, dtype=dtype)[:2], v70 := make(Tq=70, dtype=dtype)[2])
    close(first[:, :, 0], v70[:, :, 0], rtol=2 * eps, atol=0)


@kernels
@pytest.mark.parametrize("D, dtype", [(24, torch.float32)] + ON_GPU * [
    (D, dtype) for D in (64, 80, 128) for dtype in DTYPES])  # fmt: skip
@pytest.mark.parametrize("causal, layout", [(False, "contiguous"), (True, "transposed")])
def test_every_element_of_every_buffer_is_written(monkeypatch, causal, layout, D, dtype):
    inputs = make(G=1, Tq=300 if ON_GPU else 40, D=D, dtype=dtype, layout=layout)
    made = []

    def poisoned(make_tensor):
        def poison(*args, **kwargs):
            made.append(make_tensor(*args, **kwargs))
            return made[-1].fill_(math.nan if made[-1].is_floating_point() else 2**7 - 1)

        return poison

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
                         (torch.Tensor, "new_empty")):  # fmt: skip
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    assert_accurate(*inputs, causal=causal)
    assert sum(t.shape[-1:] == (D,) for t in made) >= 4  # o and its gradients were made there


@kernels
@pytest.mark.parametrize("causal, ends", [
    (True, (5, 20, 61)), (False, (5, 20, 61)), (False, (0, 0, 50)), (True, (33, 34)), (True, (7,)),
])  # fmt: skip
def test_a_token_outside_all_documents_sees_nothing_and_is_zero(causal, ends):
    q, k, v = make(H=2, G=1, Tq=70)
    owner = torch.full((70,), -1)
    for n, (first, end) in enumerate(itertools.pairwise(ends)):
        owner[first:end] = n
    see = visible(70, 70, causal) & (owner[:, None] == owner) & (owner >= 0)
    do = torch.randn_like(q)
    exact = Exact(q, k, v, see, None, do)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    for deterministic in (False, False, True) if ON_GPU else (None,):  # see flash_attn.Launch
        results = flash(q, k, v, do, causal=causal, cu_seqlens=cu_seqlens, deterministic=deterministic)
        exact.check(results, FLOAT32)
        assert all((t[:, :, owner < 0] == 0).all() for t in results)
    spans = FA.document_bounds(cu_seqlens, 70)
    _, lse = FA._forward(q, k, v, causal, 0.25, spans, False)
    close(lse.double(), exact.lse, rtol=1e-6, atol=1e-6)  # -inf where nothing is seen


@kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_sum_exp_is_that_of_the_scores(causal, dtype):
    q, k, v = make(B=2, G=1, Tq=50, Tk=70, D=40, dtype=dtype)
    exact = Exact(q, k, v, visible(50, 70, causal), 0.4)
    _, lse = FA._forward(q, k, v, causal, 0.4, None, False)
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:-1]
    # float32 whatever the inputs are: their products are summed unrounded
    close(lse.double(), exact.lse, rtol=1e-6, atol=2e-6)


@kernels
def test_the_gradient_of_a_sum_whose_strides_are_all_zero():
    q, k, v = make(G=1, Tq=40, D=24)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    FA.flash_attention(*leaves).sum().backward()  # its gradient is one 1, expanded
    exact = Exact(q, k, v, visible(40, 40, True), do=torch.ones_like(q))
    exact.check((exact.value["o"], *(t.grad for t in leaves)), FLOAT32)


@kernels
@pytest.mark.parametrize("layout", ["transposed", "columns", "islands", "expanded"])
def test_the_gradient_of_the_output_may_have_any_strides(layout):
    do = make(B=2, H=1, Tq=35, D=24, layout=layout)[0]
    assert_accurate(*make(B=2, H=1, Tq=35, D=24), do)


@kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_some_of_the_inputs_may_want_a_gradient(wanted):
    inputs = make(G=1)
    do = torch.randn_like(inputs[0])
    every = flash(*inputs, do, deterministic=True)[1:]
    for i in wanted:
        inputs[i].requires_grad_()
    o = FA.flash_attention(*inputs, deterministic=True)
    grads = torch.autograd.grad(o, [inputs[i] for i in wanted], do)
    assert all(torch.equal(g, every[i]) for g, i in zip(grads, wanted, strict=True))


@kernels
def test_one_tensor_may_be_query_key_and_value():
    x = make(Tq=40)[0].requires_grad_()
    do = torch.randn_like(x)
    (dx,) = torch.autograd.grad(FA.flash_attention(x, x, x), x, do)
    exact = Exact(x, x, x, visible(40, 40, True), do=do)
    total = sum(exact.value[name] for name in ("dq", "dk", "dv"))
    assert (dx.double() - total).norm() / total.norm() < FLOAT32


@kernels
@pytest.mark.parametrize("B, Tq, Tk, causal", [(2, 0, 0, True), (2, 0, 5, True), (2, 0, 5, False),
                                               (2, 5, 0, False), (0, 5, 5, True)])  # fmt: skip
def test_nothing_to_attend_to_gives_zeros(B, Tq, Tk, causal):
    q, k, v = make(B=B, G=1, Tq=Tq, Tk=Tk)
    o, *grads = flash(q, k, v, torch.randn_like(q), causal=causal)
    for result, like in zip((o, *grads), (q, q, k, v), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
        assert (result == 0).all()


@kernels
def test_two_runs_of_the_deterministic_backward_are_equal_bit_for_bit():
    inputs = make(H=4, G=2, Tq=1000 if ON_GPU else 33, D=64, dtype=torch.float16)
    do = torch.randn_like(inputs[0])
    first, second = (flash(*inputs, do, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kernels
@pytest.mark.parametrize("asked, of_torch, expected", [
    (None, False, False), (None, True, True), (True, False, True), (False, True, False),
])  # fmt: skip
def test_deterministic_means_what_pytorch_was_told_unless_given(monkeypatch, asked, of_torch, expected):
    seen, real = [], FA._backward

    def spy(*args):
        seen.append(args[-1])
        return real(*args)

    monkeypatch.setattr(FA, "_backward", spy)
    q, k, v = make(H=1, Tq=5)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(of_torch)
        flash(q, k, v, torch.randn_like(q), deterministic=asked)
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == [expected]


# -------------------------------------------------------------------------------------------------
# packed documents


PACKED = {
    "one": [40],
    "empty ones": [0, 20, 0, 0, 30, 0],
    "one token each": [1] * 34,
    "across tiles": [5, 33, 1, 40, 20],
    "on the edges of tiles": [16, 16, 32, 32],
}


@kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed_documents_are_as_accurate_as_any(causal, lengths):
    q, k, v = make(H=2, G=1, Tq=sum(lengths), D=24, layout="transposed")
    assert_accurate(q, k, v, causal=causal, lengths=lengths)


@kernels
@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_equal_separate_calls(causal):
    lengths = [5, 40, 0, 1, 20]
    q, k, v = make(H=1, Tq=sum(lengths), D=16)
    do = torch.randn_like(q)
    packed = flash(q, k, v, do, causal=causal, cu_seqlens=cumulative(lengths))
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v, do)), strict=True)
    apart = zip(*(flash(*part, causal=causal) for part in parts), strict=True)
    for together, alone in zip(packed, apart, strict=True):
        close(together, torch.cat(alone, 2), rtol=1e-5, atol=1e-5)  # the same sums in other tiles


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_many_packed_documents_of_many_lengths_on_a_gpu(causal, D, dtype):
    lengths = [random.Random(i).randrange(300) for i in range(20)] + [1500, 1, 0]
    assert_accurate(*make(H=4, G=2, Tq=sum(lengths), D=D, dtype=dtype), causal=causal, lengths=lengths)


# -------------------------------------------------------------------------------------------------
# under PyTorch's own machinery


@kernels
def test_autocast_casts_the_inputs_and_the_gradients_back():
    q, k, v = make(G=1)
    inputs = q, k.half(), v
    do = torch.randn(q.shape, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = flash(*inputs, do, deterministic=True)
    assert [t.dtype for t in under] == [torch.bfloat16, torch.float32, torch.float16, torch.float32]
    by_hand = flash(*(t.bfloat16() for t in inputs), do, deterministic=True)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(under, by_hand, strict=True))
    if ON_GPU:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # not for these
            assert FA.flash_attention(q, k, v).dtype == torch.float32


@kernels
def test_recomputing_it_in_the_backward_gives_the_same_gradients():
    inputs = make(G=1)
    do = torch.randn_like(inputs[0])

    def block(q, k, v):
        return FA.flash_attention(q.sin(), k, v, deterministic=True).cos()

    kept = run(block, *inputs, do)
    again = run(lambda *qkv: checkpoint(block, *qkv, use_reentrant=False), *inputs, do)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.fixture
def compiler():
    """torch.compile without graph breaks: with Inductor on a GPU; without code generation elsewhere,
    where a C++ compiler may be missing and the tracing is what there is to test."""
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    torch._dynamo.reset()


@kernels
@pytest.mark.parametrize("packed, layout", [(False, "contiguous"), (True, "transposed")])
def test_compiled_without_a_graph_break_it_gives_the_same_numbers(compiler, packed, layout):
    def block(q, k, v, ends):
        return FA.flash_attention(2 * q, k, v, scale=0.3, cu_seqlens=ends, deterministic=True) + 1

    ends = cumulative([10, 0, 25, 5]) if packed else None
    inputs = make(B=1 if packed else 2, G=1, layout=layout)
    do = torch.randn_like(inputs[0])
    eager = run(lambda *qkv: block(*qkv, ends), *inputs, do)
    compiled = compiler(block)
    graph = run(lambda *qkv: compiled(*qkv, ends), *inputs, do)
    for ours, theirs in zip(graph, eager, strict=True):
        strides = [[n for n, size in zip(t.stride(), t.shape, strict=True) if size > 1]
                   for t in (ours, theirs)]  # fmt: skip
        assert strides[0] == strides[1]
        close(ours, theirs, rtol=1e-6, atol=1e-6)  # the same kernels; + 1 may be fused, and rounded once


@kernels
@pytest.mark.parametrize("causal", [True, False])
def test_the_autograd_function_compiles_without_a_graph_break_too(compiler, causal):
    inputs = make()
    do = torch.randn_like(inputs[0])
    compiled = compiler(FA.FlashAttentionTriton.apply)  # as the handout's leaderboard does
    eager = run(lambda *qkv: FA.FlashAttentionTriton.apply(*qkv, causal), *inputs, do)
    for ours, theirs in zip(run(lambda *qkv: compiled(*qkv, causal), *inputs, do), eager, strict=True):
        close(ours, theirs, rtol=0, atol=0)  # the same kernels, and nothing around them


@kernels
def test_compiled_it_takes_other_lengths_and_autocast_and_recomputation(compiler):
    def block(q, k, v):
        return checkpoint(FA.flash_attention, q, k, v, use_reentrant=False)

    compiled = compiler(block)
    for T in (40, 21):  # from the second on, lengths are symbols in the graph
        inputs = make(Tq=T)
        do = torch.randn_like(inputs[0])
        for a, b in zip(run(compiled, *inputs, do), run(block, *inputs, do), strict=True):
            close(a, b, rtol=1e-6, atol=1e-6)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        do = do.bfloat16()
        for a, b in zip(run(compiled, *inputs, do), run(block, *inputs, do), strict=True):
            assert a.dtype == b.dtype
            close(a, b)


# -------------------------------------------------------------------------------------------------
# on a GPU only


def free_gib():
    return torch.cuda.mem_get_info()[0] / 2**30


@needs_gpu
@pytest.mark.parametrize("far", ["batch", "head", "token", "column"])
def test_strides_beyond_32_bits(far):
    if free_gib() < 20:
        pytest.skip(f"needs 20 GiB of GPU memory, {free_gib():.0f} are free")
    shape = (2, 2, 130, 64)
    step = {"batch": 1, "head": 1, "token": 129, "column": 63}[far]  # steps to the last element
    big = -(-(2**31 + 2**20) // step)
    stride = {"batch": (big, 130 * 64, 64, 1), "head": (130 * 64, big, 64, 1),
              "token": (128, 64, big, 1), "column": (260, 130, 1, big)}[far]  # fmt: skip
    places = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    memory = torch.empty(places + 2 * 2**20, dtype=torch.bfloat16, device="cuda")
    tensors = []
    for i in range(3):  # three tensors that lie side by side in the same memory
        tensors.append(memory.as_strided(shape, stride, i * 2**19))
        tensors[-1].copy_(torch.randn(shape))
    assert places > 2**31
    assert_accurate(*tensors)
    assert_accurate(*tensors, do=tensors[1], causal=False)


@needs_gpu
def test_tensors_of_more_elements_than_32_bits_count_and_more_heads_than_a_grid_is_high():
    B, T, D = 2**16 + 9, 128, 256
    if free_gib() < 60:
        pytest.skip(f"needs 60 GiB of GPU memory, {free_gib():.0f} are free")
    q, k, v = (torch.randn(B, 1, T, D, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert q.numel() > 2**31
    do = torch.randn_like(q)
    for deterministic in (False, True):
        results = flash(q, k, v, do, deterministic=deterministic)
        for rows in (slice(0, 2), slice(B - 2, B)):
            exact = Exact(q[rows], k[rows], v[rows], visible(T, T, True), None, do[rows])
            exact.check([t[rows] for t in results], 2 * torch.finfo(torch.bfloat16).eps)
        del results


@needs_gpu
def test_float32_is_not_rounded_to_tf32_unless_that_is_allowed():
    q, k, v = make(Tq=300, D=64)
    exact = Exact(q, k, v, visible(300, 300, True), None, do := torch.randn_like(q))
    exact.check(flash(q, k, v, do), FLOAT32)
    rounded = flash(q, k, v, do, allow_tf32=True)
    exact.check(rounded, 2**-9)  # TF32 has 11 bits
    assert min(exact.errors(rounded).values()) > 2**-15


@needs_gpu
def test_a_first_call_that_compiles_says_so_once(capfd):
    q, k, v = make(Tq=20, D=23)  # of no other test
    for _ in range(2):
        flash(q, k, v, torch.randn_like(q))
    said = [line for line in capfd.readouterr().err.splitlines() if "compiling" in line]
    assert 0 < len(said) == len(set(said)) and all("23" in line for line in said)


@needs_gpu
def test_memory_grows_linearly_with_the_length():
    def peak(T):
        q, k, v = (t.requires_grad_() for t in make(1, 4, 4, T, None, 64, torch.bfloat16))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        FA.flash_attention(q, k, v).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    short, long = peak(4096), peak(16384)
    assert long < 4.2 * short  # four times as long; memory is given in pieces of 2 MiB at most
    # o and three gradients of 2 bytes, three rows of 4 bytes a head, dq in float32, and no T x T
    assert long < 4 * 16384 * (64 * (4 * 2 + 4) + 64) * 1.2


@needs_gpu
def test_the_model_learns_as_it_does_with_pytorchs_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # text in which a letter depends on the one before it
    chain = (3 * torch.randn(61, 61)).softmax(-1).cumsum(-1).double().numpy()
    text = [0]
    for u in torch.rand(40_000).tolist():
        text.append(min(int(chain[text[-1]].searchsorted(u)), 60))
    text = torch.tensor(text)

    def losses(attention, backend):
        torch.manual_seed(1)
        config = M.ModelConfig(vocab_size=61, context_length=256, d_model=128, num_layers=2,
                               num_heads=2, d_ff=256, attention=attention)  # fmt: skip
        model = M.TransformerLM(config).cuda()
        optimizer = M.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for _ in range(200):
            starts = torch.randint(len(text) - 257, (16, 1))
            rows = text[starts + torch.arange(257)].cuda()
            with torch.autocast("cuda", dtype=torch.bfloat16), sdpa_kernel(backend):
                loss = model.loss(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        return torch.stack(curve).float().cpu()

    theirs = [losses("sdpa", b) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                                          SDPBackend.MATH)]  # fmt: skip
    ours = losses("flash", SDPBackend.MATH)
    assert ours[-20:].mean() < ours[:5].mean() - 1  # there is something to learn, and it is learned

    def apart(a, b):
        return (a - b).abs().mean().item()

    # PyTorch's three back ends differ from each other by roundings alone: so far may ours be away
    noise = max(apart(a, b) for a, b in itertools.combinations(theirs, 2))
    assert noise > 0
    distance = min(apart(ours, a) for a in theirs)
    assert distance < 1.5 * noise, (distance, noise)


# -------------------------------------------------------------------------------------------------
# in the model


@kernels
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_model_gives_the_same_logits_and_gradients_as_with_pytorchs_attention(num_kv_heads):
    shape = dict(vocab_size=61, context_length=32, d_model=32, num_layers=2, num_heads=4, d_ff=48,
                 num_kv_heads=num_kv_heads)  # fmt: skip
    models = [M.TransformerLM(M.ModelConfig(**shape, attention=a)).to(DEVICE) for a in ("flash", "sdpa")]
    models[0].load_state_dict(models[1].state_dict())
    ids, targets = torch.randint(61, (2, 2, 21), device=DEVICE)
    logits, grads = [], []
    for model in models:
        logits.append(model(ids))
        loss = F.cross_entropy(logits[-1].flatten(0, 1), targets.flatten())
        grads.append(torch.autograd.grad(loss, tuple(model.parameters())))
    close(*logits, rtol=1e-5, atol=1e-5)  # float32 sums of at most 61 terms, two layers deep
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, rtol=1e-5, atol=1e-5)


@kernels
@torch.no_grad()
def test_a_model_that_reads_a_prompt_with_flash_attention_goes_on_from_its_cache():
    config = M.ModelConfig(vocab_size=61, context_length=32, d_model=32, num_layers=2, num_heads=4,
                           num_kv_heads=2, d_ff=48, attention="flash")  # fmt: skip
    model = M.TransformerLM(config).to(DEVICE)
    ids = torch.randint(61, (2, 20), device=DEVICE)
    cache = M.KVCache(config, 2, 20, DEVICE, torch.float32)
    pieces = [model(piece, cache) for piece in ids.split((11, 1, 8), 1)]
    close(torch.cat(pieces, 1), model(ids), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# bad input


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


def ends(*values, dtype=torch.int32, device=DEVICE):
    return torch.tensor(values, dtype=dtype, device=device)


REFUSED = {  # what is wrong: (what differs from a right call, what the message must show)
    "query of three dims": (dict(q=zeros(4, 8, 16)), ["(4, 8, 16)"]),
    "key of five dims": (dict(k=zeros(1, 1, 2, 8, 16)), ["(1, 1, 2, 8, 16)"]),
    "value of two dims": (dict(v=zeros(8, 16)), ["(8, 16)"]),
    "dtypes differ": (dict(k=zeros(1, 2, 8, 16, dtype=torch.float16)), ["float32", "float16"]),
    "value's dtype differs": (dict(v=zeros(1, 2, 8, 16, dtype=torch.bfloat16)), ["float32", "bfloat16"]),
    "devices differ": (dict(k=zeros(1, 2, 8, 16, device="meta")), [DEVICE, "meta"]),
    "float64": ({n: zeros(1, 2, 8, 16, dtype=torch.float64) for n in "qkv"}, ["float64"]),
    "integers": ({n: zeros(1, 2, 8, 16, dtype=torch.int32) for n in "qkv"}, ["int32"]),
    "D of 257": ({n: zeros(1, 2, 8, 257) for n in "qkv"}, ["256", "257"]),
    "D of 0": ({n: zeros(1, 2, 8, 0) for n in "qkv"}, ["0"]),
    "key's D differs": (dict(k=zeros(1, 2, 8, 32)), ["16", "32"]),
    "value's D differs": (dict(v=zeros(1, 2, 8, 24)), ["16", "24"]),
    "key's and value's D differ from the query's": (
        dict(k=zeros(1, 2, 8, 32), v=zeros(1, 2, 8, 32)), ["16", "32"]),
    "lengths of key and value differ": (dict(v=zeros(1, 2, 9, 16)), ["8", "9"]),
    "heads of key and value differ": (dict(v=zeros(1, 4, 8, 16)), ["2", "4"]),
    "batches differ": (dict(k=zeros(3, 2, 8, 16), v=zeros(3, 2, 8, 16)), ["1", "3"]),
    "batches of key and value differ": (dict(v=zeros(5, 2, 8, 16)), ["1", "5"]),
    "heads that do not divide": (dict(k=zeros(1, 3, 8, 16), v=zeros(1, 3, 8, 16)), ["4", "3"]),
    "more key heads than query heads": (dict(k=zeros(1, 8, 8, 16), v=zeros(1, 8, 8, 16)), ["4", "8"]),
    "a scale below zero": (dict(scale=-0.5), ["-0.5"]),
    "a scale of zero": (dict(scale=0.0), ["0.0"]),
    "a scale that is no number": (dict(scale=math.nan), ["nan"]),
    "an infinite scale": (dict(scale=math.inf), ["inf"]),
    "a list of scales": (dict(scale=[0.5]), ["[0.5]", "number"]),
    "no key heads": (dict(k=zeros(1, 0, 8, 16), v=zeros(1, 0, 8, 16)), ["4", "0"]),
    "causal with fewer keys": (dict(k=zeros(1, 2, 7, 16), v=zeros(1, 2, 7, 16)), ["7", "8", "causal"]),
    "cu_seqlens of int64": (dict(cu_seqlens=ends(0, 8, dtype=torch.int64)), ["int64", "int32"]),
    "cu_seqlens as a list": (dict(cu_seqlens=[0, 8]), ["list", "tensor"]),
    "cu_seqlens of two dims": (dict(cu_seqlens=ends(0, 8)[None]), ["(1, 2)"]),
    "cu_seqlens elsewhere": (dict(cu_seqlens=ends(0, 8, device="meta")), [DEVICE, "meta"]),
    "cu_seqlens of a batch": (
        dict({n: zeros(3, 2, 8, 16) for n in "qkv"}, cu_seqlens=ends(0, 8)), ["3", "1"]),
    "cu_seqlens with more keys": (
        dict(k=zeros(1, 2, 9, 16), v=zeros(1, 2, 9, 16), cu_seqlens=ends(0, 8)), ["8", "9"]),
}  # fmt: skip


@kernels
@pytest.mark.parametrize("changes, shown", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_with_its_values_before_any_work(monkeypatch, changes, shown):
    def not_reached(*args):
        raise AssertionError("a kernel was reached")

    monkeypatch.setattr(FA, "_forward", not_reached)
    right = dict(q=zeros(1, 4, 8, 16), k=zeros(1, 2, 8, 16), v=zeros(1, 2, 8, 16))
    with pytest.raises(ValueError) as error:
        FA.flash_attention(**{**right, **changes})
    message = str(error.value)
    assert "\n" not in message and "got" in message
    for value in shown:
        assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message), (value, message)


CALLS = """
import torch, flash_attn
q = torch.randn(1, 1, 4, 16)
for call in (flash_attn.flash_attention, flash_attn.FlashAttentionTriton.apply):
    try:
        call(q, q, q, True)
    except ValueError as error:
        print(str(error))
"""


def test_without_a_gpu_and_the_interpreter_one_line_says_what_is_needed():
    status, out, err = python(CALLS, CUDA_VISIBLE_DEVICES="")
    assert (status, len(out.splitlines()), err) == (0, 2, "")  # a line for each call
    if find_spec("triton") is not None:
        assert out.count("GPU") == out.count("TRITON_INTERPRET=1") == 2


def test_without_triton_one_line_says_so():
    status, out, err = python("import sys; sys.modules['triton'] = None\n" + CALLS)
    assert (status, len(out.splitlines()), err) == (0, 2, "")
    assert all("triton" in line for line in out.splitlines())


# -------------------------------------------------------------------------------------------------
# the operators, and what the compiler makes of the kernels


@kernels
@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_are_what_pytorch_asks_of_custom_operators(packed):
    q, k, v = make(G=1, Tq=5, layout="transposed")
    spans = FA.document_bounds(cumulative([2, 3]), 5) if packed else (None, None)
    settings = True, 0.25, False, True  # causal, scale, allow_tf32, deterministic
    operators = torch.ops.lmzero
    o, lse = operators.flash_attention_forward(q, k, v, *spans, *settings)
    backward = (q, k, v, o, lse, torch.randn_like(o), *spans, *settings)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    checks = {  # that they name what they change and alias, and that their fakes give the right shapes
        torch.library.opcheck(operators.flash_attention_forward.default, (*leaves, *spans, *settings),
                              test_utils=("test_schema", "test_autograd_registration",
                                          "test_faketensor"))[name]
        for name in ("test_schema", "test_autograd_registration", "test_faketensor")
    } | set(torch.library.opcheck(operators.flash_attention_backward.default, backward,
                                  test_utils=("test_schema", "test_faketensor")).values())  # fmt: skip
    assert checks == {"SUCCESS"}


class Driver:
    """As much of the CUDA driver as a PreparedLaunch asks for; `started` has (settings, stream,
    addresses that its parameters hold) of each launch. `refuse` calls fail."""

    def __init__(self):
        self.started, self.maps, self.refuse = [], {}, ""

    def cuTensorMapEncodeTiled(self, tensor_map, kind, rank, place, sizes, strides, block, *rest):
        assert (kind, rank, list(sizes), strides[0], list(block)) == (9, 2, [64, 40], 128, [64, 8])
        assert ctypes.addressof(tensor_map) % 64 == 0  # as the driver demands
        self.maps[ctypes.addressof(tensor_map)] = place.value
        return self.refuse == "encode"

    def cuTensorMapReplaceAddress(self, tensor_map, place):
        if self.refuse == "interrupt":
            raise KeyboardInterrupt
        self.maps[tensor_map.value] = place.value
        return 7 * (self.refuse == "replace")

    def cuLaunchKernel(self, function, *arguments):
        *grid, stream, parameters, extra = arguments
        values = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        pointer = ctypes.cast(values[0], ctypes.POINTER(ctypes.c_void_p))[0]
        number = ctypes.cast(values[6], ctypes.POINTER(ctypes.c_int32))[0]
        self.started.append((pointer, self.maps[values[1]], number, stream.value,
                             [g.value for g in grid]))
        return 0


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2,
	.param .u32 kernel_param_3,
	.param .u64 kernel_param_4,
	.param .u64 kernel_param_5,
	.param .u32 kernel_param_6,
	.param .f32 kernel_param_7,
	.param .u64 .ptr .global .align 1 kernel_param_8,
	.param .u64 .ptr .global .align 1 kernel_param_9
)
.reqntid 128
"""


@pytest.fixture
def launches(monkeypatch):
    """(driver, function that prepares launches of a kernel with a pointer, a tensor for TMA, a tuple
    of strides of which the last is built in, and a float)."""
    driver, active = Driver(), SimpleNamespace(get_current_stream=lambda device: 99)
    monkeypatch.setattr(FA, "cuda_driver", lambda: driver)
    monkeypatch.setattr(FA, "triton_driver", SimpleNamespace(active=active), raising=False)
    types = {"x": "*fp32", "y": "tensordesc<bf16[8, 64],...>", "strides": ("i32", "constexpr"),
             "scale": "fp32", "BLOCK": "constexpr"}

    def prepare(x, y, ptx=PTX, **changes):
        metadata = dict(name="kernel", num_ctas=1, num_warps=4, shared=1024, global_scratch_size=0,
                        profile_scratch_size=0, launch_pdl=False, launch_cooperative_grid=False,
                        tensordesc_meta=[{"swizzle": 3, "block_size": [8, 64]}]) | changes
        compiled = SimpleNamespace(metadata=SimpleNamespace(**metadata), asm={"ptx": ptx},
                                   src=SimpleNamespace(signature=types), function=5)
        y = SimpleNamespace(base=y, shape=[40, 64], strides=[64, 1])
        return FA.prepare_launch(compiled, 6, [x, y, (77, 1), 0.5, 128], x.device)

    return driver, prepare


def tensors():
    return torch.zeros(4), torch.zeros(40, 64, dtype=torch.bfloat16)


def test_a_prepared_launch_starts_its_kernel_on_the_tensors_it_is_given(launches):
    driver, prepare = launches
    first, second = tensors(), tensors()
    launch = prepare(*first)
    for x, y in (first, first, second):
        assert launch((x, y)) == 0
        assert driver.started.pop() == (x.data_ptr(), y.data_ptr(), 77, 99,
                                        [6, 1, 1, 128, 1, 1, 1024])  # fmt: skip


@pytest.mark.parametrize("refuse", ["interrupt", "replace"])
def test_what_stops_between_two_addresses_leaves_none_of_the_tensors_before(launches, refuse):
    driver, prepare = launches
    first, second = tensors(), tensors()
    launch = prepare(*first)
    launch(first)
    driver.refuse = refuse
    if refuse == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            launch(second)
    else:
        assert launch(second) == 7
    assert len(driver.started) == 1
    driver.refuse = ""
    assert launch(second) == 0
    assert driver.started[-1][:2] == (second[0].data_ptr(), second[1].data_ptr())


@pytest.mark.parametrize("change", [
    dict(ptx=PTX.replace(".u32 kernel_param_6", ".u64 kernel_param_6")), dict(tensordesc_meta=None),
    dict(tensordesc_meta=[None]), dict(num_ctas=2), dict(launch_pdl=True), dict(global_scratch_size=8),
])  # fmt: skip
def test_a_kernel_of_another_kind_is_left_to_triton_and_said_once(launches, capfd, change, monkeypatch):
    monkeypatch.setattr(FA._say_why, "__defaults__", (set(),))
    driver, prepare = launches
    assert prepare(*tensors(), **change) is False and prepare(*tensors(), **change) is False
    assert capfd.readouterr().err.count("flash_attn: triton starts kernels") == 1


def test_without_the_cuda_driver_triton_starts_the_kernels(launches, monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(FA, "cuda_driver", missing)
    assert launches[1](*tensors()) is False


COMPILE = """
import sys
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
import flash_attn

class Card:  # as much of a driver as compiling asks for
    def get_current_target(self):
        return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    print("KERNEL", kernel.metadata.name, D, kernel.metadata.shared, flush=True)
    return kernel  # not to be started

driver.set_active(Card())
run, jit.JITFunction.run = jit.JITFunction.run, compile_only
flash_attn.load_kernels()
flash_attn._card = lambda device: (capability, 2**25)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
took = lambda *arguments: 0  # but preparing a launch compares its arguments with the kernel's
flash_attn.cuda_driver = lambda: SimpleNamespace(cuTensorMapEncodeTiled=took)
flash_attn._say_why = lambda kind, text: sys.exit(text)
capability = int(sys.argv[1][0]), int(sys.argv[1][1])
for D in map(int, sys.argv[2:]):
    q = torch.zeros(1, 2, 1024, D, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 1024, D, dtype=torch.bfloat16)
    for hopper in (False, True) if capability == (9, 0) else (False,):
        flash_attn._hopper_takes = lambda *inputs: hopper and flash_attn.load_gluon_kernels()
        flash_attn._plan_hopper_forward.cache_clear()
        flash_attn._plan_hopper_backward.cache_clear()
        o, lse = flash_attn._forward(q, k, k, True, 0.125, None, False)
        flash_attn._backward(q, k, k, o, lse, o, True, 0.125, None, False, not hopper)
    flash_attn._decode(q[:, :, :1], k, k, torch.tensor([9]), 0.125)
"""
# KiB of a block; source: CUDA C++ Programming Guide, technical specifications per compute capability
SHARED_KIB = {"80": 163, "86": 99, "90": 227}


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """{card: process}: the kernels compiled side by side for each, for heads of these widths."""
    widths, folder = {"90": (64, 128), "80": (64, 128), "86": (128,)}, tmp_path_factory.mktemp("cache")
    processes = {
        card: start(COMPILE, card, *map(str, widths[card]), TRITON_CACHE_DIR=str(folder / card),
                    CUDA_VISIBLE_DEVICES="", TRITON_DUMP_PTXAS_LOG="1")
        for card in widths
    }  # fmt: skip
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True, scope="module")
def _compile_while_other_tests_run(request):
    # the interpreter keeps one core busy, this another; it saves a fifth of the time of this file
    selected = (item.originalname for item in request.session.items)
    if not ON_GPU and not NO_KERNELS and COMPILE_TEST in selected:
        request.getfixturevalue("compilers")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_without_spills_within_the_shared_memory_of_each_card(compilers):
    for card, process in compilers.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        found = re.findall(r"^KERNEL (\w+ \d+) (\d+)$", out, re.M)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", out + err)
        assert len(found) == len(spills) >= 3  # forward, and one or more for the gradients
        for (name, shared), spilt in zip(found, spills, strict=True):
            assert spilt == ("0", "0"), (card, name, spilt)
            assert int(shared) <= SHARED_KIB[card] * 1024, (card, name, shared)


COMPILE_TEST = test_kernels_compile_without_spills_within_the_shared_memory_of_each_card.__name__


# -------------------------------------------------------------------------------------------------
# the command line


def bench(capsys, *arguments):
    """(exit status, standard output, standard error) of `flash_attn.py bench ...`."""
    try:
        status = FA.main(["bench", *arguments]) or 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_check_only_prints_errors_and_one_line_of_json(capsys, dtype):
    status, out, _ = bench(capsys, "--check_only", "--shapes", "1x2x33x16,2x1x5x24", "--dtype", dtype)
    lines = out.splitlines()
    content = json.loads(lines[-1])
    assert status == 0 and "triton" in lines[0] and content["dtype"] == dtype
    names = [(row["shape"], row["rival"]) for row in content["errors"]]
    assert names == list(itertools.product(("1x2x33x16", "2x1x5x24"), FA.OURS))
    for row in content["errors"]:
        errors = [row[part] for part in ("o", "dq", "dk", "dv")]
        # against float32 tiles, which carry an error of their own: twice what one of them has
        assert 0 < max(errors) < 2 * INTERPRETED[getattr(torch, dtype)]
    assert content["times"] == []


@kernels
def test_bench_checks_a_single_token_whose_gradients_vanish(capsys):
    status, out, _ = bench(capsys, "--check_only", "--shapes", "1x1x1x16")
    assert status == 0 and "NaN" not in out.splitlines()[-1]


@kernels
@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
@pytest.mark.parametrize("value", [math.nan, 3.0])
def test_bench_stops_where_a_result_is_wrong(monkeypatch, capsys, name, value):
    def spoiled(results):
        names = ("o", "lse") if len(results) == 2 else ("dq", "dk", "dv")
        spoilt = dict(zip(names, results, strict=True))
        if name in spoilt:
            spoilt[name][0, 0, 2, 1] = value
        return tuple(spoilt.values())

    for function in ("_forward", "_backward"):
        real = getattr(FA, function)
        monkeypatch.setattr(FA, function, lambda *args, real=real: spoiled(real(*args)))
    status, _, err = bench(capsys, "--check_only", "--shapes", "1x1x8x16", "--dtype", "float32")
    assert status == 2 and len(err.splitlines()) == 1 and name in err


@kernels
@pytest.mark.parametrize("arguments, shown", [
    ("--check_only --shapes 1x2x8", ["1x2x8", "BxHxTxD"]),
    ("--check_only --shapes 1x2x0x16", ["1x2x0x16"]),
    ("--check_only --shapes 1x1x8x300", ["256", "300"]),
    ("--shapes=", ["BxHxTxD", "''"]),
    ("--rivals ours,flash9", ["flash9", "cudnn"]),
    ("--rivals ours,plain,ours", ["ours,plain,ours", "once"]),
    ("--rivals=", ["''", "cudnn"]),
    ("--rivals compiled", ["compiled", "cudnn"]),  # a name of --compile's own
    ("--repeats 0", ["repeats", "0"]),
    ("--repeats 1.5", ["repeats", "1.5", "whole"]),
    ("--dtype float64", ["float64"]),
    ("--no_such_flag", ["no_such_flag"]),
    # flags that would change nothing
    ("--compile", ["--compile"]),
    ("--check_only --rivals plain", ["--rivals", "--check_only"]),
    ("--check_only --sweep", ["--sweep", "--check_only"]),
    ("--check_only --calling_thread", ["--calling_thread", "--check_only"]),
    ("--check_only --shapes 1x1x1_0x16", ["1x1x1_0x16"]),
    ("--sweep --pytorch_attention", ["--sweep", "--pytorch_attention"]),
    ("--sweep --shapes 1x1x8x16", ["--shapes", "--sweep"]),
    ("--sweep --rivals plain", ["--rivals", "--sweep"]),
    ("--pytorch_attention --repeats 2", ["--repeats", "--pytorch_attention"]),
])  # fmt: skip
def test_bad_flags_are_one_line_before_any_work(capsys, arguments, shown):
    status, _, err = bench(capsys, *arguments.split())
    assert status == 2 and "Traceback" not in err
    assert all(text in err.splitlines()[-1] for text in shown), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("arguments", [[], ["--sweep"], ["--pytorch_attention"]])
def test_bench_without_a_gpu_says_what_it_needs(capsys, arguments):
    status, out, err = bench(capsys, *arguments)
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert "GPU" in err and "--check_only" in err


def test_bench_on_a_gpu_without_triton_is_one_line():
    code = """
import sys
sys.modules["triton"] = None
import torch, flash_attn
torch.cuda.is_available = lambda: True
flash_attn.main(["bench", *sys.argv[1:]])
"""
    for arguments in ([], ["--pytorch_attention"]):
        status, out, err = python(code, *arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1) and "triton" in err


@kernels
@pytest.mark.parametrize("replay, function", [(False, "do_bench"), (True, "do_bench_cudagraph")])
def test_a_time_is_of_enough_runs_however_long_one_takes(monkeypatch, replay, function):
    from triton import testing

    def measured(work, rep, return_mode):  # as many runs as fit, but one at least
        return list(itertools.islice(runs_ms, max(1, int(rep / 125))))

    runs_ms = itertools.count(125.0)
    monkeypatch.setattr(testing, function, measured)
    assert FA.time_ms(None, 5, replay) == pytest.approx([127.5, 126, 129])
    assert next(runs_ms) == 131  # 1 run, which shows how long 5 others take


@kernels
@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_rival_is_the_definition(causal):
    q, k, v = (t.cpu().double().requires_grad_() for t in make(B=2, Tq=9, D=6))
    exact = Exact(q, k, v, visible(9, 9, causal))
    with FA.rival("plain", 9, causal) as attend:
        close(attend(q, k, v), exact.value["o"])


@kernels
def test_the_portable_rival_leaves_the_kernels_for_hopper_out_while_it_runs(monkeypatch):
    def not_reached(*args):
        raise AssertionError("a kernel for Hopper was reached")

    for name in ("_plan_hopper_forward", "_plan_hopper_backward"):
        monkeypatch.setattr(FA, name, not_reached)
    FA.check("portable", (1, 1, 64, 16), torch.bfloat16, True, DEVICE)
    for name in FA.OURS:
        with pytest.raises(KeyError), FA.rival(name, 64, True):
            assert (name == "portable") == FA.PORTABLE_ONLY
            raise KeyError  # whatever goes wrong in it
        assert not FA.PORTABLE_ONLY


class Simulated:
    """bench as on a GPU where every run takes 2 ms (1 to 3), that holds 3 MiB, 4 with an output,
    and 8 at the peak; plain attention of 32 tokens or more does not fit. `log` is what was done."""

    def __init__(self, monkeypatch):
        self.log, self.times, self.samples, change = [], [2.0, 1.0, 3.0], set(), monkeypatch.setattr
        change(FA, "find_device", lambda check_only: ("cpu", "a simulated GPU"))
        change(FA, "time_ms", self.time_ms)
        for name, attend in (("flash_attention", self.flash), ("plain_attention", self.plain)):
            change(FA, name, attend)
        change(torch.cuda, "memory_allocated", self.allocated)
        change(torch.cuda, "reset_peak_memory_stats", lambda: self.log.append("reset"))
        change(torch.cuda, "max_memory_allocated", self.peak)
        for name in ("SWEEP_T", "PLAIN_T"):
            change(FA, name, (16, 32))
        change(FA, "SWEEP_D", (8,))

    def time_ms(self, work, samples, replay=False):
        work()
        self.log.append("replay" if replay else "time")
        self.samples.add(samples)
        return self.times

    def flash(self, q, k, v, causal, deterministic):
        self.log.append("attend")
        return FA.FlashAttentionPyTorch.apply(q, k, v, causal)

    def plain(self, q, k, v, causal):
        if q.shape[2] >= 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 TiB.")
        return self.flash(q, k, v, causal, False)

    def allocated(self):
        return (3 + (self.log[-1] == "attend")) * 2**20

    def peak(self):
        assert self.log[-3:] == ["time", "reset", "attend"]  # of one run, after all were timed
        return 8 * 2**20


TIME = {"ms": 2.0, "low_ms": 1.0, "high_ms": 3.0}
MEASURED = {"forward": TIME, "kept_mib": 1.0, "backward": TIME, "both": TIME, "peak_mib": 5.0}
NO_MEMORY = {"error": "out of memory"}


def table(out):
    """(content of the JSON line, {(shape, rival): its last line of the table})."""
    *lines, last = out.splitlines()
    rows = {tuple(line.split()[:2]): line for line in lines if line[:1].isdigit()}
    return json.loads(last), rows


@kernels
def test_the_sweep_has_ours_and_plain_at_each_size_and_out_of_memory_is_a_cell(monkeypatch, capsys):
    gpu = Simulated(monkeypatch)
    status, out, err = bench(capsys, "--sweep")
    content, lines = table(out)
    assert (status, err, gpu.samples) == (0, "", {FA.SAMPLES}) and content["device"] == "a simulated GPU"
    expected = [
        dict(shape=shape, dtype=dtype, rival=rival,
             **NO_MEMORY if (shape, rival) == ("1x1x32x8", "plain") else MEASURED)
        for dtype in ("bfloat16", "float32") for shape in ("1x1x16x8", "1x1x32x8")
        for rival in ("ours", "plain")
    ]  # fmt: skip
    assert content["times"] == expected
    assert [row["rival"] for row in content["errors"]] == ["ours"] * 4
    full = lines.pop(("1x1x32x8", "plain"))
    assert len(lines) == 3 and full.count("out of memory") == len(FA.PARTS)
    for line in lines.values():
        assert line.count("2.000 (1.000 to 3.000)") == 3 and line.split()[-2:] == ["1.00", "5.00"]


@kernels
@pytest.mark.parametrize("flags, rival", [([], "plain"), (["--compile", "--dtype", "float32"], "compiled")])
def test_pytorch_attention_is_a_batch_of_8_a_hundred_times(monkeypatch, capsys, flags, rival):
    gpu = Simulated(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    status, out, _ = bench(capsys, "--pytorch_attention", *flags)
    content, lines = table(out)
    assert status == 0 and gpu.samples == {100} and content["errors"] == []
    names = [dict(shape=f"8x1x{T}x8", dtype=content["dtype"], rival=rival) for T in (16, 32)]
    assert content["times"] == [{**names[0], **MEASURED}, {**names[1], **NO_MEMORY}]
    assert "out of memory" in lines["8x1x32x8", rival]


@kernels
def test_a_shape_whose_check_does_not_fit_takes_nothing_from_the_others(monkeypatch, capsys):
    def check(name, shape, *rest):
        if shape[2] == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"o": 0.0}

    Simulated(monkeypatch)
    monkeypatch.setattr(FA, "check", check)
    status, out, _ = bench(capsys, "--shapes", "1x1x32x8,1x1x16x8", "--rivals", "ours")
    content, lines = table(out)
    assert status == 0 and [row.get("error") for row in content["errors"]] == [FA.NO_MEMORY, None]
    assert len(content["times"]) == 2 and lines["1x1x16x8", "ours"].count("2.000") == 3


@kernels
def test_what_fitted_before_memory_ran_out_is_shown(monkeypatch, capsys):
    gpu = Simulated(monkeypatch)

    def time_ms(work, samples):
        if gpu.log.count("time") % 3 == 2:  # both
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(work, samples)

    real = gpu.time_ms
    monkeypatch.setattr(FA, "time_ms", time_ms)
    _, out, _ = bench(capsys, "--shapes", "1x1x16x8", "--rivals", "ours")
    content, lines = table(out)
    (row,) = content["times"]
    assert (row["forward"], row["error"], "both" in row) == (TIME, "out of memory", False)
    line = lines["1x1x16x8", "ours"]
    assert line.count("(1.000 to 3.000)") == line.count("out of memory") == 2


@kernels
def test_short_work_is_timed_from_a_graph_too_where_it_can_be_captured(monkeypatch):
    gpu = Simulated(monkeypatch)
    gpu.times = [0.5, 0.4, 0.6]
    arguments = "ours", (1, 1, 16, 8), torch.float32, True, "cpu", 5
    assert FA.measure(*arguments)["replayed"] == gpu.times and gpu.log[-1] == "replay"

    def time_ms(work, samples, replay=False):
        if replay:
            raise RuntimeError("operation not permitted when stream is capturing")
        return gpu.time_ms(work, samples)

    monkeypatch.setattr(FA, "time_ms", time_ms)
    row = FA.measure(*arguments)
    assert row["both"] == gpu.times and not {"replayed", "error"} & set(row)


@kernels
def test_rivals_take_turns_and_one_that_does_not_run_is_asked_once(monkeypatch, capsys):
    def measure(name, *rest):
        turns.append(name)
        if name == "flex":
            return {"error": "no such thing here"}
        ms = float(len(turns))
        return {"forward": [ms, ms - 1, ms + 1]}

    turns = []
    Simulated(monkeypatch)
    monkeypatch.setattr(FA, "measure", measure)
    status, out, _ = bench(capsys, "--rivals", "plain,flex,cudnn", "--shapes", "1x1x8x16")
    content, lines = table(out)
    assert status == 0 and turns == ["plain", "flex", "cudnn", "cudnn", "plain", "cudnn", "plain"]
    forward = {row["rival"]: row.get("forward") for row in content["times"]}
    assert forward == {"plain": {"ms": 5.0, "low_ms": 0.0, "high_ms": 8.0}, "flex": None,
                       "cudnn": {"ms": 4.0, "low_ms": 2.0, "high_ms": 7.0}}  # fmt: skip
    assert lines["1x1x8x16", "flex"].count("no such thing here") == len(FA.PARTS)


@needs_gpu
def test_bench_on_a_gpu_times_its_rivals_and_ends_in_json(capsys):
    rivals = ["ours", "deterministic", "portable", "flash2", "plain"]
    B, H, T, D = shape = 1, 2, 1024, 64
    status, out, _ = bench(capsys, "--shapes", FA.format_shape(shape), "--repeats", "1",
                           "--rivals", ",".join(rivals))  # fmt: skip
    content, _ = table(out)
    assert status == 0 and [row["rival"] for row in content["times"]] == rivals
    assert [row["rival"] for row in content["errors"]] == rivals[:3]
    for row in content["times"]:
        for part in ("forward", "backward", "both"):
            assert 0 < row[part]["low_ms"] <= row[part]["ms"] <= row[part]["high_ms"]
        one = B * H * T * D * 2 / 2**20  # MiB of q, as of o and each gradient
        scores = B * H * T * T * 2 / 2**20
        if row["rival"] == "plain":
            assert row["kept_mib"] > scores and row["peak_mib"] > 2 * scores
        else:  # o, lse, three gradients and a few sums in float32
            assert one <= row["kept_mib"] < 2 * one and 4 * one <= row["peak_mib"] < 12 * one


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H, G, S, D", [(1, 2, 1, 300, 16), (3, 6, 2, 70, 40), (5, 4, 4, 33, 64)])
def test_decoding_attends_to_each_row_s_own_number_of_keys(B, H, G, S, D, dtype):
    q, k, v = (torch.randn(B, n, t, D, dtype=dtype, device=DEVICE) for n, t in ((H, 1), (G, S), (G, S)))
    lengths = torch.randint(1, S + 1, (B,), device=DEVICE)
    lengths[0] = S
    stale = torch.arange(S, device=DEVICE)[None, :] >= lengths[:, None]
    k[stale[:, None].expand(B, G, S)] = math.nan  # what lies beyond a row's length is never looked at
    v[stale[:, None].expand(B, G, S)] = math.nan
    got = FA.flash_decode(q, k, v, lengths)
    for b, n in enumerate(lengths.tolist()):
        row = [x[b : b + 1, :, : x.shape[2] if x is q else n].double() for x in (q, k, v)]
        exact = FA.attention(*row, causal=False)[0]
        error = (got[b].double() - exact[0]).norm() / exact.norm()
        assert got.dtype == dtype and error < (FA.ERROR_BOUND if ON_GPU else INTERPRETED)[dtype]


@kernels
def test_decoding_takes_a_cache_of_any_strides():
    k, v = (torch.randn(2, 50, 2, 32, device=DEVICE).transpose(1, 2) for _ in range(2))
    q = torch.randn(2, 1, 4, 32, device=DEVICE).transpose(1, 2)
    lengths = torch.tensor([50, 7], device=DEVICE)
    whole = FA.flash_decode(q.contiguous(), k.contiguous(), v.contiguous(), lengths)
    assert torch.equal(FA.flash_decode(q, k, v, lengths), whole)
    close(FA.flash_decode(q[:1], k[:1], v[:1], lengths[:1], scale=0.5),
          FA.attention(q[:1], k[:1], v[:1], causal=False, scale=0.5)[0])  # fmt: skip
    with pytest.raises(ValueError, match="one query and one length a row"):
        FA.flash_decode(k, k, v, lengths)


@kernels
def test_generation_with_flash_attention_gives_the_tokens_of_sdpa(monkeypatch):
    monkeypatch.setattr(M, "replays", lambda device: ON_GPU)
    shape = dict(vocab_size=61, context_length=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48)
    weights, made = M.TransformerLM(M.ModelConfig(**shape)).state_dict(), []
    for attention in ("sdpa", "flash"):
        model = M.TransformerLM(M.ModelConfig(**shape, attention=attention)).to(DEVICE)
        model.load_state_dict(weights)
        rows = M.generate(model, [[3], [5, 17, 2, 40]], 6, num_samples=2, seed=1)
        made.append([row.tokens for row in rows])
    assert made[0] == made[1]
