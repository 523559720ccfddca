"""ddp.py on 2 and 4 gloo ranks of this machine: the same numbers as one process, nothing lost, no hang.

Checks that need ranks run in one start of the processes for each number of ranks (a start costs
seconds): the functions of CHECKS on all ranks in turn, RUNS through main([...]) one after another.
"""

import copy
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint

import ddp
import model as lm
import train

ROOT = Path(__file__).resolve().parent.parent
F32 = dict(rtol=0, atol=1e-5)  # the contract's bound; sums over ranks come in another order
DEVICE = "cpu"  # of the checks on ranks; run_checks sets it
CPU = dict(env={**os.environ, "OMP_NUM_THREADS": "1"})
CHECKS = {}
WRAPPERS = ("NaiveDDP", "FlatDDP", "DDP", "zero1", "FSDP")


def on_ranks(function):
    CHECKS[function.__name__] = function
    return function


# -------------------------------------------------------------------------------------------------
# what runs on the ranks


class Toy(nn.Module):
    """Sizes that neither 2 nor 4 divides, one part in a container and one outside of it."""

    def __init__(self, tied=False, frozen=False):
        super().__init__()
        self.emb = lm.Embedding(7, 5)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 9), nn.ReLU(), lm.Linear(9, 5), lm.RMSNorm(5)) for _ in range(4))
        self.head = lm.Linear(5, 7)
        self.unused = nn.Linear(3, 3)
        if tied:
            self.head.weight = self.emb.weight
        if frozen:
            self.layers[0][2].weight.requires_grad_(False)
            self.layers[2][0].weight.requires_grad_(False)
            self.layers[2][3].weight.requires_grad_(False)

    def forward(self, ids):
        x = self.emb(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def wrap(kind, module, make=functools.partial(torch.optim.AdamW, lr=0.1)):
    if kind == "zero1":
        optimizer = ddp.ShardedOptimizer(module.parameters(), make.func, **make.keywords)
        return ddp.DDP(module, 1e-4, optimizer.owner), optimizer
    small = {"bucket_mb": 1e-4} if kind == "DDP" else {}  # 105 bytes: nearly a bucket a parameter
    wrapper = getattr(ddp, kind)(module, **small)
    return wrapper, make(wrapper.parameters())


def weights(wrapper):
    if isinstance(wrapper, ddp.FSDP):
        return wrapper.gather_full_params()
    return dict(wrapper.module.named_parameters(remove_duplicate=False))


def batch(rows, step):
    return torch.randint(7, (2, rows, 3), generator=seeded(step), device="cpu").to(DEVICE)


def seeded(seed):
    return torch.Generator("cpu").manual_seed(seed)


def same(a, b):
    """Bit for bit on a CPU; a GPU adds the rows of an embedding's gradient in any order."""
    return torch.equal(a, b) if DEVICE == "cpu" else torch.allclose(a, b, rtol=0, atol=1e-5)


def mine(tensor):
    rows = len(tensor) // ddp.num_ranks()
    return tensor[ddp.this_rank() * rows :][:rows]


def loss_of(module, x, y):
    return lm.cross_entropy(module(x), y)


def assert_gradients(wrapper, plain, scale=1.0):
    """The wrapper's are `scale` times the plain module's, as far as this rank keeps them."""
    for name, p in wrapper.local_parameters().items():
        grad = plain.get_parameter(name).grad
        if p.grad is None:
            assert grad is None or wrapper.owner, name
            continue
        part = ddp.my_rows(grad, len(grad)) if name in wrapper.rows else grad
        assert torch.allclose(p.grad, scale * part, **F32), name


def units_held(wrapper):
    """How many units but the root have whole weights."""
    return sum(u.params[0].buffer.untyped_storage().nbytes() > 0 for u in wrapper.units[1:])


@on_ranks
def every_wrapper_trains_as_one_process_does(folder):
    N = ddp.num_ranks()
    for tied in (False, True):
        for frozen in (False, True):
            for accumulate in (False, True) if N == 2 else (True,):
                for kind in WRAPPERS:
                    torch.manual_seed(0)
                    plain = Toy(tied, frozen)
                    start = copy.deepcopy(plain.state_dict())
                    torch.manual_seed(ddp.this_rank() + 1)
                    module = Toy(tied, frozen)  # other weights on each rank: rank 0's are sent
                    if ddp.this_rank() == 0:
                        module.load_state_dict(start)
                    wrapper, optimizer = wrap(kind, module)
                    reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
                    for step in range(3):
                        x, y = batch(4 * N, step)
                        reference.zero_grad()
                        loss_of(plain, x, y).backward()
                        reference.step()
                        optimizer.zero_grad()
                        x, y = mine(x), mine(y)
                        if accumulate:
                            issued = ddp.COUNT["issued"]
                            with wrapper.no_sync():
                                (loss_of(wrapper, x[:2], y[:2]) / 2).backward()
                            assert kind == "FSDP" or ddp.COUNT["issued"] == issued
                            x, y = x[2:], y[2:]
                        (loss_of(wrapper, x, y) / (1 + accumulate)).backward()
                        wrapper.finish_gradient_synchronization()
                        optimizer.step()
                    got = weights(wrapper)
                    for name, p in plain.named_parameters(remove_duplicate=False):
                        case = (kind, tied, frozen, accumulate, name)
                        assert torch.allclose(got[name], p, **F32), case


@on_ranks
def a_parameter_that_no_rank_used_keeps_no_gradient(folder):
    for kind in WRAPPERS:
        wrapper, _ = wrap(kind, Toy())
        loss_of(wrapper, *map(mine, batch(8, 0))).backward()
        wrapper.finish_gradient_synchronization()
        assert all(p.grad is None for p in wrapper.module.unused.parameters()), kind


@on_ranks
def ranks_that_used_different_parameters_are_named(folder):
    last = ddp.num_ranks() - 1
    for kind in WRAPPERS:
        wrapper, _ = wrap(kind, Toy())
        loss = loss_of(wrapper, *map(mine, batch(8, 0)))
        if ddp.this_rank() == last:
            loss = loss + wrapper.module.unused(torch.ones(3)).sum()
        if kind == "FSDP" and ddp.this_rank() == last:  # its weights are there from forward to backward
            assert wrapper.module.unused.weight.shape == (3, 3)
        loss.backward()
        with pytest.raises(ValueError, match=rf"unused\.\w+ on ranks \[{last}\] and none on \[0"):
            wrapper.finish_gradient_synchronization()
            wrapper.check_same()  # a GPU's are compared one step late


@on_ranks
def a_second_backward_pass_without_no_sync_is_refused(folder):
    for kind in ("DDP", "FSDP"):
        wrapper, _ = wrap(kind, Toy())
        loss_of(wrapper, *map(mine, batch(8, 0))).backward()
        with pytest.raises(RuntimeError, match="no_sync"):
            loss_of(wrapper, *map(mine, batch(8, 1))).backward()
        wrapper.finish_gradient_synchronization()


@on_ranks
def fsdp_in_float32_equals_one_process_bit_for_bit(folder):
    if ddp.num_ranks() != 2:  # a sum of two is the same in either order
        return
    make = functools.partial(torch.optim.SGD, lr=0.1)
    for same_data in (True, False):
        torch.manual_seed(0)
        plain = Toy(tied=True)
        wrapper, optimizer = wrap("FSDP", copy.deepcopy(plain), make)
        reference = make(plain.parameters())
        for step in range(5):
            x, y = batch(8, step)
            reference.zero_grad()
            optimizer.zero_grad()
            if same_data:
                loss_of(plain, x, y).backward()
            else:
                for half in (slice(4), slice(4, 8)):
                    (loss_of(plain, x[half], y[half]) / 2).backward()
                x, y = mine(x), mine(y)
            loss_of(wrapper, x, y).backward()
            reference.step()
            wrapper.finish_gradient_synchronization()
            optimizer.step()
        got = weights(wrapper)
        for name, p in plain.named_parameters():
            assert same(got[name], p), (same_data, name)


@on_ranks
def fsdp_computes_in_half_precision_and_keeps_float32(folder):
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        plain = Toy()
        for layer in plain.layers:  # ReLU and RMSNorm enlarge the rounding of what is almost zero
            layer[1], layer[3] = nn.SiLU(), nn.Identity()
        wrapper = ddp.FSDP(copy.deepcopy(plain), compute_dtype=dtype)
        make = functools.partial(torch.optim.SGD, lr=1e-3)
        reference, optimizer = make(plain.parameters()), make(wrapper.parameters())
        for step in range(3):
            x, y = batch(8 * ddp.num_ranks(), step)
            reference.zero_grad()
            loss_of(plain, x, y).backward()
            reference.step()
            optimizer.zero_grad()
            logits = wrapper(mine(x))
            assert logits.dtype == dtype
            lm.cross_entropy(logits, mine(y)).backward()
            wrapper.finish_gradient_synchronization()
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in wrapper.parameters())
            optimizer.step()
        got = weights(wrapper)
        for name, p in plain.named_parameters():  # 1e-3 (lr) of a gradient that 8 bits round
            assert got[name].dtype == torch.float32
            assert torch.allclose(got[name], p, rtol=0, atol=1e-4), (dtype, name)


@on_ranks
def fsdp_keeps_an_nth_of_the_rows_and_frees_whole_weights(folder):
    N, r = ddp.num_ranks(), ddp.this_rank()
    torch.manual_seed(0)
    wrapper, _ = wrap("FSDP", Toy())
    shapes = {name: tuple(p.shape) for name, p in wrapper.module.named_parameters()}
    rows = -(-7 // N)
    assert shapes["emb.weight"] == (max(0, min(rows, 7 - r * rows)), 5)
    assert shapes["layers.0.3.weight"] == (5,)  # a norm: replicated
    rows = -(-9 // N)
    assert shapes["layers.0.0.bias"] == (max(0, min(rows, 9 - r * rows)),)
    seen = []
    for layer in wrapper.module.layers:
        layer[1].register_forward_hook(lambda *_: seen.append(units_held(wrapper)))
    with torch.no_grad():
        wrapper(batch(2, 0)[0])
    assert seen == [3, 3, 2, 1]  # a block and the two after it; those before it are freed
    loss_of(wrapper, *map(mine, batch(8, 0))).backward()
    wrapper.finish_gradient_synchronization()
    assert not any(s.buffer.untyped_storage().nbytes() for u in wrapper.units for s in u.params)
    assert {name: tuple(p.shape) for name, p in wrapper.module.named_parameters()} == shapes


@on_ranks
def fsdp_shards_classes_that_are_named_and_weights_that_blocks_share(folder):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x):
            return x @ self.weight

    torch.manual_seed(0)
    plain = nn.Sequential(Scale(), lm.Linear(5, 5), Scale())
    plain[2].weight = plain[0].weight
    wrapper = ddp.FSDP(copy.deepcopy(plain), shard_types=(Scale,))
    assert set(wrapper.rows) == {"0.weight", "1.weight"}
    x = torch.randn(8, 5, generator=seeded(0), device="cpu").to(DEVICE)
    plain(x).square().mean().backward()
    wrapper(mine(x)).square().mean().backward()
    wrapper.finish_gradient_synchronization()
    assert_gradients(wrapper, plain)
    full = wrapper.gather_full_params()
    assert torch.equal(full["2.weight"], plain[2].weight) and full["0.weight"] is full["2.weight"]


@on_ranks
def a_forward_pass_without_a_backward_pass_leaves_no_old_weights(folder):
    torch.manual_seed(0)
    wrapper, _ = wrap("FSDP", Toy(), functools.partial(torch.optim.SGD, lr=0.1))
    x, y = map(mine, batch(8, 0))
    before = loss_of(wrapper, x, y)
    with torch.no_grad():
        for p in wrapper.local_parameters().values():
            p.add_(0.5)
        after = loss_of(wrapper, x, y)
        full = wrapper.gather_full_params()
        plain = Toy()
        plain.load_state_dict(full)
        assert torch.allclose(after, loss_of(plain, x, y), **F32) and abs(after - before) > 1e-3


@on_ranks
def the_sharded_optimizer_takes_any_class_groups_and_schedules(folder):
    N, r = ddp.num_ranks(), ddp.this_rank()
    for cls, options in ((torch.optim.AdamW, dict(lr=0.1)), (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
                         (torch.optim.Adafactor, dict(lr=0.1)), (lm.AdamW, dict(lr=0.1))):  # fmt: skip
        torch.manual_seed(0)
        plain = nn.Sequential(*(nn.Linear(7, 7) for _ in range(6)))
        module, late = copy.deepcopy(plain), nn.Parameter(torch.ones(3))
        plain_late = nn.Parameter(torch.ones(3))
        groups = lambda m: [{"params": [*m[:3].parameters()], "weight_decay": 0.5},  # noqa: E731
                            {"params": [*m[3:].parameters()], "weight_decay": 0.0}]  # fmt: skip
        reference = cls(groups(plain), **options)
        optimizer = ddp.ShardedOptimizer(groups(module), cls, **options)
        for o, p in ((reference, plain_late), (optimizer, late)):
            o.add_param_group({"params": [p], "lr": 0.01})
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (reference, optimizer)]
        for step in range(4):
            x = torch.randn(4, 7, generator=seeded(step), device="cpu").to(DEVICE)
            for o, m, p, schedule in zip((reference, optimizer), (plain, module), (plain_late, late), schedules):
                o.zero_grad()
                (m(x).square().mean() + p.square().sum()).backward()
                o.step()
                schedule.step()
        for p, expected in zip((*module.parameters(), late), (*plain.parameters(), plain_late)):
            assert same(p, expected), cls  # the same arithmetic on one of the ranks
        own = {p for p, owner in optimizer.owner.items() if owner == r}
        assert set(optimizer.state) <= own and len(own) > 0
        sizes = [sum(p.numel() for p, o in optimizer.owner.items() if o == k) for k in range(N)]
        assert max(sizes) - min(sizes) <= 7 * 7  # of the largest parameter at most
        whole = {i: s for i, s in reference.state_dict()["state"].items()}
        again = ddp.ShardedOptimizer(groups(module), cls, **options)
        again.add_param_group({"params": [late], "lr": 0.01})
        again.load_state_dict({"state": whole, "param_groups": optimizer.state_dict()["param_groups"]})
        assert set(again.state) == set(optimizer.state) == set(again.inner.state)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Stack(nn.Module):
    """Blocks, and a head whose forward pass is `run` if there is one."""

    def __init__(self, block=Block, n=4, run=None):
        super().__init__()
        self.layers, self.head, self.run = nn.ModuleList(block() for _ in range(n)), nn.Linear(6, 5), run

    def forward(self, x):
        if self.run is not None:
            return self.run(self, x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def vectors(step, rows=4):
    return torch.randn(rows * ddp.num_ranks(), 6, generator=seeded(step), device="cpu").to(DEVICE)


def assert_fsdp_trains_as_one_process(plain, steps=2):
    wrapper = ddp.FSDP(copy.deepcopy(plain))
    reference, optimizer = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, wrapper))
    for step in range(steps):
        x = vectors(step)
        for module, o, part in ((plain, reference, x), (wrapper, optimizer, mine(x))):
            o.zero_grad()
            module(part.clone()).square().mean().backward()
            if module is wrapper:
                wrapper.finish_gradient_synchronization()
            o.step()
    full = wrapper.gather_full_params()
    for name, p in plain.named_parameters():
        assert torch.allclose(full[name], p, **F32), name
    return wrapper


@on_ranks
def fsdp_makes_units_of_modules_that_are_called(folder):
    def lists(model, x):
        for a, b in model.layers:
            x = x + b(torch.relu(a(x)))
        return model.head(x)

    def dicts(model, x):
        for layer in model.layers:
            x = x + layer["b"](torch.relu(layer["a"](x)))
        return model.head(x)

    torch.manual_seed(0)
    pair = lambda: nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])  # noqa: E731
    wrapper = assert_fsdp_trains_as_one_process(Stack(pair, run=lists))
    assert len(wrapper.units) == 1 + 8
    named = lambda: nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})  # noqa: E731
    assert_fsdp_trains_as_one_process(Stack(named, run=dicts))


@on_ranks
def weights_that_are_not_here_tell_their_shape_and_refuse_the_rest(folder):
    def from_outside(model, x):
        weight = model.layers[2].a.weight
        assert weight.shape == (9, 6) and weight.device == x.device and weight.requires_grad
        assert isinstance(weight, nn.Parameter) and next(model.layers[2].parameters()) is weight
        return nn.functional.linear(x, weight)

    for use in (from_outside, lambda model, x: model.layers[3].a.weight * 2,
                lambda model, x: torch.cat([model.layers[3].a.weight]),
                lambda model, x: model.layers[0].a(x)):  # fmt: skip
        wrapper = ddp.FSDP(Stack(run=use))
        with pytest.raises(RuntimeError, match=r"layers.\d.a.weight outside of it"):
            wrapper(vectors(0))
    wrapper.module.run = None
    wrapper(vectors(0))  # as if nothing had been
    with pytest.raises(RuntimeError, match="head.weight outside of it"):
        ddp.FSDP(Stack()).module(vectors(0))


@on_ranks
def parameters_are_the_shards_while_whole_weights_are_in_the_module(folder):
    wrapper = ddp.FSDP(Stack())
    before = list(wrapper.named_parameters())
    loss = wrapper(mine(vectors(0))).sum()
    assert all(p is q and n == m for (n, p), (m, q) in zip(wrapper.named_parameters(), before, strict=True))
    loss.backward()
    wrapper.finish_gradient_synchronization()
    assert [*wrapper.module.parameters()] == [p for _, p in before]


@on_ranks
def ranks_that_take_other_paths_do_not_mix_weights_and_are_named(folder):
    N, r = ddp.num_ranks(), ddp.this_rank()

    def some(model, x):
        for i in model.path:
            x = model.layers[i](x)
        return model.head(x)

    torch.manual_seed(0)
    plain = Stack(n=8, run=some)
    for path in ([0, 1], [5, 6, 7], [0, 7], [3]):
        wrapper = ddp.FSDP(copy.deepcopy(plain))
        plain.path = wrapper.module.path = path if r == 0 else range(8)
        x = vectors(0)
        with torch.no_grad():
            assert torch.allclose(wrapper(x), plain(x), **F32)
        outputs = wrapper(x)
        assert torch.allclose(outputs, plain(x), **F32)
        outputs.sum().backward()
        lacks = next(i for i in range(8) if i not in path)
        with pytest.raises(ValueError, match=rf"layers.{lacks}.\w.weight on ranks \[1.* none on \[0\]"):
            wrapper.finish_gradient_synchronization()
            wrapper.check_same()
    for lost, run in (("a", lambda block, x: x + block.b(block.a(x).detach())),
                      ("b", lambda block, x: x + block.a(x).sum())):  # fmt: skip
        wrapper = ddp.FSDP(copy.deepcopy(plain))
        wrapper.module.path = range(8)
        if r == 0:
            wrapper.module.layers[4].forward = functools.partial(run, wrapper.module.layers[4])
        wrapper(vectors(0)).sum().backward()
        with pytest.raises(ValueError, match=rf"layers.4.{lost}.\w+ on ranks \[1.* none on \[0\]"):
            wrapper.finish_gradient_synchronization()
            wrapper.check_same()
    wrapper = ddp.FSDP(copy.deepcopy(plain))  # as many gathers, of others
    again = [0, 1, 2, 3, 4, 5, 6, 7, 1, 2]
    wrapper.module.path = again if r == 0 else [*again[:8], 2, 1]
    wrapper(vectors(0)).sum().backward()
    others = ", ".join(map(str, range(1, N)))
    with pytest.raises(ValueError, match=rf"same order, got another on ranks \[{others}\]"):
        wrapper.finish_gradient_synchronization()
        wrapper.check_same()


@on_ranks
def blocks_that_are_used_twice_train_as_in_one_process(folder):
    torch.manual_seed(0)
    assert_fsdp_trains_as_one_process(Stack(run=lambda model, x: model.head(
        nn.Sequential(*model.layers, *reversed(model.layers))(x))))  # fmt: skip


@on_ranks
def fsdp_frees_blocks_in_the_backward_pass_frozen_ones_too(folder):
    for frozen in ("none", "a.bias", "a.", "all but the first"):
        torch.manual_seed(0)
        plain = Stack(n=10)
        for i, layer in enumerate(plain.layers):
            for name, p in layer.named_parameters():
                p.requires_grad_(i == 0 if frozen == "all but the first" else not name.startswith(frozen))
        wrapper = assert_fsdp_trains_as_one_process(plain)
        seen = []

        def watch(module, x, y, seen=seen, wrapper=wrapper):
            y.register_hook(lambda _: seen.append(units_held(wrapper)))

        for layer in wrapper.module.layers:
            layer.register_forward_hook(watch)
        wrapper(mine(vectors(0))).sum().backward()
        assert len(seen) == 10 and max(seen) == 3, (frozen, seen)  # a block, and the two before it
        assert units_held(wrapper) == 0
        wrapper.finish_gradient_synchronization()


@on_ranks
def a_weight_that_is_also_used_detached_is_there_for_that(folder):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.a(nn.functional.linear(torch.tanh(x), self.a.weight.detach()))

    torch.manual_seed(0)
    assert_fsdp_trains_as_one_process(Stack(Both))


@on_ranks
def fsdp_takes_a_model_on_the_cpu_and_drops_each_whole_weight(folder):
    torch.manual_seed(0)
    model = tiny_model(tie_embeddings=True).cpu()
    expected = {name: p.clone().to(DEVICE) for name, p in model.state_dict().items()}
    ids = torch.arange(8, device="cpu").view(1, 8).to(DEVICE)
    outputs = copy.deepcopy(model).to(DEVICE)(ids)
    if ddp.this_rank():
        with torch.device("meta"):
            model = tiny_model(tie_embeddings=True)
    left = [weakref.ref(p) for p in model.parameters() if p.dim() > 1]
    alive, make = [], ddp.ShardedParameter.__init__

    def count(self, *args):
        make(self, *args)
        alive.append(sum(ref() is not None for ref in left))

    ddp.ShardedParameter.__init__ = count
    try:
        wrapper = ddp.FSDP(model, device=DEVICE)
    finally:
        ddp.ShardedParameter.__init__ = make
    assert alive == [*range(len(left), 0, -1)]
    assert all(p.device.type == DEVICE.split(":")[0] for p in (*wrapper.parameters(), *wrapper.buffers()))
    full = wrapper.gather_full_params()
    assert full.keys() == expected.keys() and all(torch.equal(full[n], p) for n, p in expected.items())
    assert torch.allclose(wrapper(ids), outputs, **F32)
    with pytest.raises(ValueError, match="meta; pass device="):
        ddp.FSDP(nn.Linear(2, 2, device="meta"))


@on_ranks
def wrappers_clip_by_the_norm_of_the_whole_gradient(folder):
    torch.manual_seed(0)
    start, (x, y) = Toy(tied=True), batch(4 * ddp.num_ranks(), 0)
    plain = copy.deepcopy(start)
    loss_of(plain, x, y).backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    for kind in WRAPPERS:
        wrapper, _ = wrap(kind, copy.deepcopy(start))
        loss_of(wrapper, mine(x), mine(y)).backward()
        wrapper.finish_gradient_synchronization()
        assert torch.allclose(wrapper.clip_grad_norm_(0.1), expected, **F32), kind
        assert_gradients(wrapper, plain)


@on_ranks
def clipping_takes_norms_that_a_dtype_cannot_square_and_ranks_that_own_no_gradient(folder):
    for dtype, rtol in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)):  # float32 adds
        for kind in ("FSDP", "zero1"):
            wrapper, _ = wrap(kind, nn.Linear(3, 1, bias=False).to(dtype))  # one parameter, on one rank
            wrapper(torch.full((1, 3), 1e3, dtype=dtype)).sum().backward()
            wrapper.finish_gradient_synchronization()
            assert math.isclose(wrapper.clip_grad_norm_(1.0).item(), 1e3 * 3**0.5, rel_tol=rtol), (kind, dtype)
            for p in wrapper.local_parameters().values():
                expected = torch.full_like(p, 3**-0.5)
                assert p.grad is None or torch.allclose(p.grad, expected, rtol=2 * rtol, atol=0), (kind, dtype)


@on_ranks
def torch_checkpoint_trains_the_same_reentrant_or_not(folder):
    def checkpointed(model, x, reentrant):
        x.requires_grad_()
        for layer in model.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        return model.head(x)

    def whole_spans(model, x, reentrant):
        x.requires_grad_()
        for span in (model.layers[:3], model.layers[3:]):
            x = torch.utils.checkpoint.checkpoint(nn.Sequential(*span), x, use_reentrant=reentrant)
        return model.head(x)

    for run in (checkpointed, whole_spans):
        for reentrant in (True, False):
            torch.manual_seed(0)
            plain = Stack(n=6, run=functools.partial(run, reentrant=reentrant))
            assert_fsdp_trains_as_one_process(plain)


@dataclass
class Output:
    hidden: torch.Tensor
    more: dict


@on_ranks
def blocks_may_return_dataclasses_and_pass_tensors_on_but_no_unknown_types(folder):
    class Returns(Block):
        make = staticmethod(lambda x: Output(None, {"x": x}))

        def forward(self, x):
            return self.make(super().forward(x))

    def unpack(model, x):
        for layer in model.layers:
            x = layer(x).more["x"]
        return model.head(x)

    class PassesOn(Block):
        def forward(self, x, before):
            return super().forward(x) + 0.1 * before[-1], [*before, x]

    def residual(model, x):
        before = [x]
        for layer in model.layers:
            x, before = layer(x, before)
        return model.head(x + 0.1 * sum(before))

    torch.manual_seed(0)
    assert_fsdp_trains_as_one_process(Stack(Returns, run=unpack))
    wrapper = assert_fsdp_trains_as_one_process(Stack(PassesOn, run=residual))
    loss = wrapper(mine(vectors(0))).sum()
    issued = ddp.COUNT["issued"]
    loss.backward()
    assert ddp.COUNT["issued"] - issued == 4 + 1 + 3  # reductions; gathers, the last block was here
    Returns.make = staticmethod(lambda x: SimpleNamespace(more={"x": x}))
    with pytest.raises(TypeError, match="got SimpleNamespace from a Returns"):
        ddp.FSDP(Stack(Returns, run=unpack))(vectors(0))


@on_ranks
def a_wrapper_goes_on_after_an_exception(folder):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError

    def in_backward(model, x):
        for i, layer in enumerate(model.layers):
            x = layer(Fails.apply(x) if i == 1 else x)
        return model.head(x)

    def in_forward(model, x):
        model.layers[1](model.layers[0](x))
        raise ArithmeticError

    torch.manual_seed(0)
    plain, x = Stack(), vectors(0)
    plain(x).sum().backward()
    for kind in WRAPPERS:
        for fails in (in_backward, in_forward):
            wrapper, _ = wrap(kind, copy.deepcopy(plain))
            for p in wrapper.parameters():
                p.grad = None
            wrapper.module.run = fails
            with pytest.raises(ArithmeticError):
                wrapper(mine(x).requires_grad_()).sum().backward()
            wrapper.module.run = None
            for p in wrapper.parameters():
                p.grad = None
            wrapper(mine(x)).sum().backward()
            wrapper.finish_gradient_synchronization()
            assert_gradients(wrapper, plain, 1 / ddp.num_ranks())


@on_ranks
def a_model_without_weights_outside_of_its_blocks_trains(folder):
    torch.manual_seed(0)
    wrapper = assert_fsdp_trains_as_one_process(nn.Sequential(Block(), nn.ReLU(), Block()))
    assert not wrapper.units[0].params


@on_ranks
def zero_grad_drops_what_no_sync_accumulated_also_after_an_exception(folder):
    torch.manual_seed(0)
    plain, x = Stack(), vectors(0)
    plain(x).square().mean().backward()
    for kind in ("NaiveDDP", "FlatDDP", "DDP", "FSDP"):
        wrapper, _ = wrap(kind, copy.deepcopy(plain))
        wrapper.zero_grad()
        with wrapper.no_sync():
            wrapper(3 * mine(x)).square().mean().backward()
        with pytest.raises(TypeError):
            wrapper("no tensor")
        wrapper.zero_grad()
        wrapper(mine(x)).square().mean().backward()
        wrapper.finish_gradient_synchronization()
        assert_gradients(wrapper, plain)
    engine = ddp.Engine("fsdp", tiny_model(), torch.float32, 0.1, 1e-2, (0.9, 0.95))
    x, y = torch.randint(53, (2, 4, 8), generator=seeded(0), device="cpu").to(DEVICE)
    expected = engine.loss_and_gradient(x, y, 2, 1.0)
    with engine.wrapper.no_sync():
        engine.loss_sum(y, x).backward()
    assert torch.equal(engine.loss_and_gradient(x, y, 2, 1.0), expected)


@on_ranks
def a_loss_that_a_block_keeps_on_itself_is_no_silent_nan(folder):
    class Keeps(Block):
        def forward(self, x):
            y = super().forward(x)
            self.aux = self.b(torch.tanh(self.a(y))).square().mean()
            return y

    wrapper = ddp.FSDP(Stack(Keeps))
    loss = wrapper(mine(vectors(0))).sum() + sum(layer.aux for layer in wrapper.module.layers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_ranks
def the_state_between_forward_and_backward_is_of_the_shards(folder):
    wrapper = ddp.FSDP(Stack())
    before = {name: p.clone() for name, p in wrapper.state_dict().items()}
    loss = wrapper(mine(vectors(0))).sum()
    between = wrapper.state_dict()
    assert before.keys() == between.keys() and all(torch.equal(before[n], p) for n, p in between.items())
    loss.backward()


@on_ranks
def collectives_have_one_order_whatever_a_rank_uses(folder):
    r, skipped = ddp.this_rank(), (3, 4)

    def all_but_some(model, x, run=lambda layer, x: layer(x)):
        for i, layer in enumerate(model.layers):
            x = x if r == 0 and i in skipped and not model.whole else run(layer, x)
        return model.head(x)

    def checkpointed(reentrant):
        return functools.partial(all_but_some, run=lambda layer, x: torch.utils.checkpoint.checkpoint(
            layer, x, use_reentrant=reentrant))  # fmt: skip

    def dropped(model, x):
        for i, layer in enumerate(model.layers):
            y = layer(x)
            x = x if r == 0 and i == 5 else y
        return model.head(x)

    reentrant = checkpointed(True)
    for run in (all_but_some, reentrant, checkpointed(False), dropped):
        wrapper, seen = ddp.FSDP(Stack(n=8, run=run)), []
        wrapper.module.whole = True
        x = vectors(0).requires_grad_()
        if run is not reentrant:  # which leaves no graph that would tell
            wrapper(x)  # without a backward pass
        wrapper.module.whole = False
        loss = wrapper(x).sum()
        for unit in wrapper.units:

            def start(unit=unit, real=unit.start, seen=seen):
                seen.extend([unit.index] * (unit.state == "away"))
                real()

            unit.start = start
        real = wrapper.reduce
        wrapper.reduce = lambda unit, seen=seen, real=real: (seen.append(-unit.index), real(unit))
        loss.backward()
        assert len(seen) > 12
        theirs = [None] * ddp.num_ranks()
        dist.all_gather_object(theirs, seen)
        with pytest.raises(ValueError, match="must use the same parameters"):
            wrapper.finish_gradient_synchronization()
            wrapper.check_same()
        assert all(order == theirs[0] for order in theirs), (run, theirs)


@on_ranks
def a_compiled_wrapper_trains_and_blocks_with_compiled_hooks_are_refused(folder):
    model = Stack(n=1)
    model.layers[0].compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"got Block.compile\(\); assign"):
        ddp.FSDP(model)
    torch.manual_seed(0)
    plain = Stack(n=1)
    wrapper, x = ddp.FSDP(copy.deepcopy(plain)), vectors(0)
    plain(x).square().mean().backward()
    torch.compile(wrapper, backend="aot_eager")(mine(x)).square().mean().backward()
    wrapper.finish_gradient_synchronization()
    whole = plain.head.weight.grad
    assert torch.allclose(wrapper.local["head.weight"].grad, ddp.my_rows(whole, len(whole)), **F32)


@on_ranks
def inputs_by_name_are_cast_too(folder):
    class Named(Block):
        def forward(self, x):
            return x + self.b(input=torch.relu(self.a(input=x)))

    wrapper = ddp.FSDP(Stack(Named), compute_dtype=torch.bfloat16)
    outputs = wrapper(vectors(0))
    assert outputs.dtype == torch.bfloat16
    outputs.sum().backward()


@on_ranks
def parameters_without_an_owner_or_unfrozen_later_are_named(folder):
    model = Stack()
    optimizer = ddp.ShardedOptimizer(model.layers.parameters(), torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match=r"got none for head.weight, head.bias"):
        ddp.DDP(model, owner=optimizer.owner)
    for kind in ("NaiveDDP", "FlatDDP", "DDP", "FSDP"):
        model = Stack()
        model.head.requires_grad_(False)
        wrapper, _ = wrap(kind, model)
        wrapper.module.head.requires_grad_(True)
        wrapper(vectors(0)).sum().backward()
        with pytest.raises(ValueError, match=r"got head.weight, head.bias trained since"):
            wrapper.finish_gradient_synchronization()


@on_ranks
def a_disagreement_of_the_last_step_can_be_asked_for(folder):
    wrapper = ddp.DDP(nn.Linear(2, 2))
    wrapper.check_same()
    wrapper.same.table = torch.tensor([[1, 1, 0]] + [[1, 0, 0]] * (ddp.num_ranks() - 1)).flatten()
    with pytest.raises(ValueError, match=r"a gradient of bias on ranks \[0\] and none on"):
        wrapper.check_same()  # as it comes from a GPU, a step late
    wrapper.check_same()


@on_ranks
def torchs_wrappers_take_inputs_by_name_and_end_no_sync_after_an_exception(folder):
    class Named(nn.Linear):
        def forward(self, *, x):
            return super().forward(x)

    expected = None
    for kind in ("TorchDDP", "TorchFSDP"):
        torch.manual_seed(0)
        wrapper = getattr(ddp, kind)(Named(6, 5))
        with pytest.raises(ArithmeticError), wrapper.no_sync():
            raise ArithmeticError
        wrapper(x=mine(vectors(0))).square().sum().backward()
        wrapper.finish_gradient_synchronization()
        norm = wrapper.clip_grad_norm_(1.0)
        expected = norm if expected is None else expected
        assert torch.allclose(norm, expected, rtol=1e-5, atol=0)  # the sum is of shards, or not


@on_ranks
def the_sharded_optimizer_keeps_counters_of_groups_and_refuses_foreign_parts(folder):
    class Counts(torch.optim.SGD):
        def __init__(self, params, lr, k=0):
            super().__init__(params, lr, momentum=0.9)
            for group in self.param_groups:
                group["k"] = k

        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] += 1
            return super().step(closure)

    N, r = ddp.num_ranks(), ddp.this_rank()
    model = Stack()
    optimizer = ddp.ShardedOptimizer(model.parameters(), Counts, lr=0.1)
    for _ in range(3):
        model(vectors(0)).sum().backward()
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == optimizer.inner.param_groups[0]["k"] == 3
    part = optimizer.state_dict()
    assert part["part"] == [r, N] and 0 < len(part["state"]) < len([*model.parameters()])
    again = ddp.ShardedOptimizer(model.parameters(), Counts, lr=0.1)
    again.load_state_dict(part)
    assert set(again.state) == set(optimizer.state)
    assert again.param_groups[0]["k"] == 3
    with pytest.raises(ValueError, match=rf"rank {r} of {N} keeps, got that of rank {N} of {N + 1}"):
        again.load_state_dict({**part, "part": [N, N + 1]})
    theirs = {i: {} for i, (p, owner) in enumerate(again.owner.items()) if owner != r}
    with pytest.raises(ValueError, match="must be the whole optimizer's"):
        again.load_state_dict({**part, "state": theirs})


class Views(nn.Module):
    """What lies in memory with gaps, or only once for all its elements."""

    def __init__(self, k):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.gaps = nn.Parameter(torch.ones(3, 2)[:, 0])
        self.gaps.data = torch.full((3, 4), 1.0 * k)[:, 1]
        every = torch.full((8, 8), 1.0 * k)
        self.register_buffer("once", torch.full((1, 1), 1.0 * k).expand(50, 50))
        self.register_buffer("some", every[::2, ::2])
        self.register_buffer("all_but_the_first_rows", every[1:].t())
        self.register_buffer("between", torch.full((4, 4), 1.0 * k)[1::2])

    def forward(self, x):
        return self.layer(x) * self.gaps + self.some.mean()


@on_ranks
def parameters_and_buffers_with_gaps_and_expanded_ones_are_sent(folder):
    for kind in WRAPPERS:
        module = Views(k=5 + ddp.this_rank()).to(DEVICE)
        wrapper, optimizer = wrap(kind, module)
        assert module.gaps.eq(5).all() and all(buffer.eq(5).all() for buffer in module.buffers()), kind
        wrapper(torch.ones(2, 3, device=DEVICE)).sum().backward()
        wrapper.finish_gradient_synchronization()
        optimizer.step()
        assert module.gaps.ne(5).all(), kind
        parts = module.gaps.new_empty(3 * ddp.num_ranks())
        ddp._all_gather(parts, module.gaps.detach().contiguous())
        assert parts.view(-1, 3).eq(parts[:3]).all(), kind


@on_ranks
def wrappers_of_wrappers_shards_to_a_sharded_optimizer_and_lost_hooks_are_refused(folder):
    wrapper = ddp.FSDP(nn.Linear(4, 4))  # 4 ranks, or 2, divide it: nothing else would tell
    with pytest.raises(ValueError, match="got DDP around FSDP"):
        ddp.DDP(nn.Sequential(wrapper))
    with pytest.raises(ValueError, match="got those of FSDP"):
        ddp.ShardedOptimizer(wrapper.parameters(), torch.optim.SGD, lr=0.1)
    module = nn.Linear(4, 4)
    module.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(ValueError, match="got one on weight, which would never run"):
        ddp.FSDP(module)


@on_ranks
def fsdp_keeps_marks_of_parameters_and_gathers_values_that_stay(folder):
    module = Toy()
    module.head.weight.no_decay = True
    wrapper = ddp.FSDP(module)
    assert dict(wrapper.named_parameters())["module.head.weight"].no_decay
    full = wrapper.gather_full_params()
    with torch.no_grad():
        for p in wrapper.parameters():
            p.add_(1)
    later = wrapper.gather_full_params()
    assert all(torch.allclose(later[name], p + 1, **F32) for name, p in full.items())


@on_ranks
def sparse_gradients_are_averaged(folder):
    ids = torch.arange(8, device=DEVICE).view(8, 1) % 3
    plain = nn.Embedding(5, 3)
    plain.load_state_dict({"weight": torch.ones(5, 3)})
    plain(ids).square().mean().backward()
    for kind in WRAPPERS:
        module = nn.Embedding(5, 3, sparse=True)
        module.load_state_dict(plain.state_dict())
        wrapper, _ = wrap(kind, module.to(DEVICE))
        wrapper(mine(ids)).square().mean().backward()
        wrapper.finish_gradient_synchronization()
        for p in wrapper.parameters():
            if p.grad is not None:
                grad = plain.weight.grad.to(DEVICE)
                grad = ddp.my_rows(grad, 5) if kind == "FSDP" else grad
                assert torch.allclose(p.grad.to_dense() if p.grad.is_sparse else p.grad, grad, **F32), kind


@on_ranks
def the_sharded_optimizer_is_copied_and_takes_schedules_that_read_defaults(folder):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = ddp.ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)  # of the betas, too
    assert optimizer.inner.defaults["betas"] == (0.9, 0.999)
    copies = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), copies):
        m(torch.ones(2, 3)).sum().backward()
        o.step()
    assert all(same(p, q) for p, q in zip(model.parameters(), copies[0].parameters(), strict=True))
    assert set(copies[1].state) <= set(copies[0].parameters())


def tiny_model(**changes):
    torch.manual_seed(0)
    config = lm.ModelConfig(**{**dict(vocab_size=53, context_length=8, d_model=12, num_layers=4, num_heads=2,
                                      d_ff=20), **changes})  # fmt: skip
    return lm.TransformerLM(config)


def engine_steps(strategy, compiled=False, dtype=torch.float32, spans=(), levels=None, **changes):
    """(loss over all ranks, norm) of three steps on one batch."""
    model = tiny_model(**changes)
    model.checkpoint_every = spans
    model.recompute(levels or ["none"] * len(model.layers))
    engine = ddp.Engine(strategy, model, dtype, 0.1, 1e-2, (0.9, 0.95), compiled, bucket_mb=1e-3)
    x, y = torch.randint(53, (2, 8, 8), generator=seeded(0), device="cpu").to(DEVICE)
    rows = []
    for _ in range(3):
        stats = engine.loss_and_gradient(mine(x), mine(y), len(mine(x)) // 2, 1.0)
        engine.optimizer.step()
        dist.all_reduce(stats[0])
        rows.append(stats)
    return torch.stack(rows)


@on_ranks
def checkpointed_blocks_train_the_same_under_each_strategy(folder):
    expected = engine_steps("naive")
    assert expected[2, 0] < expected[0, 0]
    for strategy in ddp.STRATEGIES if ddp.num_ranks() == 2 else ("zero1", "fsdp"):
        for spans in ((1,), (3, 1)):
            got = engine_steps(strategy, spans=spans)
            assert torch.allclose(got, expected, **F32), (strategy, spans)
        got = engine_steps(strategy, levels=("block", "ffn", "cheap", "none"))
        assert torch.allclose(got, expected, **F32), strategy


@on_ranks
def compiled_blocks_train_the_same_under_each_strategy(folder):
    if ddp.num_ranks() != 2:  # nothing that depends on their number is compiled, and it takes long
        return
    torch.compile, real = functools.partial(torch.compile, backend="aot_eager"), torch.compile  # no C++
    try:
        for dtype, bound in ((torch.float32, F32), (torch.bfloat16, dict(rtol=2e-2, atol=0))):
            expected = engine_steps("naive", dtype=dtype, num_layers=2)
            for strategy in ddp.STRATEGIES if dtype == torch.float32 else ("fsdp", "torch_fsdp"):
                spans = (1,) if strategy == "fsdp" else ()
                got = engine_steps(strategy, True, dtype, spans, num_layers=2)
                assert torch.allclose(got, expected, **bound), (strategy, dtype)
    finally:
        torch.compile = real


@on_ranks
def a_wrapper_that_is_dropped_frees_its_weights(folder):
    for strategy in ddp.STRATEGIES:
        model = tiny_model()
        engine = ddp.Engine(strategy, model, torch.float32, 0.1, 1e-2, (0.9, 0.95), bucket_mb=1e-3)
        x, y = torch.zeros(2, 1, 8, dtype=torch.long)
        engine.loss_and_gradient(x, y, 1, 1.0)
        left = [weakref.ref(model), weakref.ref(next(iter(engine.parameters.values())))]
        del model, engine
        gc.collect()
        assert [ref() for ref in left] == [None, None], strategy


@on_ranks
def bfloat16_agrees_between_strategies(folder):
    expected = engine_steps("naive", dtype=torch.bfloat16)
    for strategy in ddp.STRATEGIES[1:]:
        got = engine_steps(strategy, dtype=torch.bfloat16)
        # 8 bits, rounded at other places where weights are sent in bfloat16: 4e-3 a rounding
        assert torch.allclose(got, expected, rtol=2e-2, atol=0), (strategy, got, expected)


def step_8b_in_small(shape, seed, attention, levels=("ffn", "ffn", "cheap", "cheap"), compiled=False,
                     spoil=lambda engine: None, steps=3):  # fmt: skip
    """{kind: (losses, {name: weight}, {name: v})} of steps on other data each, by which v tells its rate. "got": of
    bench --preset 8b, weights and v on rank 0 alone; "plain", "exact": of one process that computes all sequences by
    the plain layers, in bfloat16 and in float32. And "start": the weights before."""
    batches = torch.randint(shape["vocab_size"], (steps, 2, ddp.num_ranks(), shape["context_length"]),
                            generator=seeded(seed), device="cpu").to(DEVICE)  # fmt: skip

    def make(attention, dtype):
        torch.manual_seed(seed)
        with torch.device("cpu"):
            config = lm.ModelConfig(**shape, num_layers=4, tie_embeddings=False, attention=attention)
            model = lm.TransformerLM(config).to(torch.bfloat16)  # the same weights in all
        return model.to(DEVICE, dtype)

    def plain(dtype):
        model, losses = make("eager", dtype), []
        optimizer = torch.optim.AdamW(lm.optimizer_groups(model, 0.1), 1e-3, (0.9, 0.95), foreach=False)
        for x, y in batches:
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten()))
            losses[-1].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        named = dict(model.named_parameters())
        return (torch.stack(losses), {n: p.detach().cpu().float() for n, p in named.items()},
                {n: optimizer.state[p]["exp_avg_sq"].cpu().float() for n, p in named.items()})  # fmt: skip

    model, losses = make(attention, torch.bfloat16), []
    start = {name: p.detach().cpu().float() for name, p in model.named_parameters()}
    model.recompute(levels)
    engine = ddp.Engine("fsdp", model, torch.bfloat16, 0.1, 1e-3, (0.9, 0.95), compiled, reduce_dtype=torch.bfloat16)
    spoil(engine)
    for x, y in batches:
        stats = engine.loss_and_gradient(mine(x), mine(y), 1, 1.0)
        dist.all_reduce(stats[0])
        losses.append(stats[0])
        engine.optimizer.step()
    whole = {name: p.float() for name, p in engine.whole_model().items()}
    v = {}
    for name, p in engine.parameters.items():
        part = engine.optimizer.state[p]["v"]
        v[name] = (ddp.gather_rows(part, engine.rows[name]) if name in engine.rows else part).cpu().float()
    return {"got": (torch.stack(losses), whole, v), "plain": plain(torch.bfloat16), "exact": plain(torch.float32),
            "start": start}  # fmt: skip


def check_8b_step_in_small(runs):
    (losses, got, got_v), (plain_losses, plain, _), (exact_losses, exact, exact_v) = (
        runs[kind] for kind in ("got", "plain", "exact"))  # fmt: skip
    # a loss is the mean of many rounded ones: no further off than one rounding of itself, to 8 bits
    for seen in (exact_losses, plain_losses):
        assert torch.allclose(losses, seen, rtol=2**-8, atol=0), (losses, seen)
    if not got:  # whole on rank 0 alone
        return
    ours, theirs, both = 0, 0, 0
    for name, start in runs["start"].items():
        # a gradient went through some 32 roundings of 2^-9: as a random walk 1%, its square 2%; 3 times that
        assert (got_v[name] - exact_v[name]).norm() < 0.06 * exact_v[name].norm(), (name, "v")
        # the same weights, rounded alike, by gradients 1% apart: as far from float32's as the plain run, to a quarter
        far, bound = (got[name] - exact[name]).norm(), 1.25 * (plain[name] - exact[name]).norm()
        assert far <= bound, (name, far, bound)
        # an update (lr times a ratio near 1) is about as large as a weight's last bit, so what is rounded off is noise
        # of its size at most: the mean over n numbers, how much of float32's update is there, differs by 1 / sqrt(n)
        true = exact[name] - start
        parts = [(w[name] - start).mul(true).sum() / true.square().sum() for w in (got, plain)]
        assert abs(parts[0] - parts[1]) <= max(true.numel() ** -0.5, 0.01), (name, parts)
        ours, theirs = (sum_ + part * true.square().sum() for sum_, part in zip((ours, theirs), parts, strict=True))
        both += true.square().sum()
    assert abs(ours - theirs) <= 0.01 * both  # 38,000 numbers and more, whose noise is 1 / 195 of it


@on_ranks
def the_8b_step_in_small_is_the_plain_one_within_rounding(folder):
    """bench --preset 8b --param_dtype bfloat16 on 4 blocks, context 2,048 on GPUs."""
    cuda = DEVICE != "cpu"
    shape = dict(vocab_size=4096, context_length=2048, d_model=512, num_heads=4, d_ff=1376) if cuda else dict(
        vocab_size=59, context_length=64, d_model=32, num_heads=2, d_ff=88)  # fmt: skip
    check_8b_step_in_small(step_8b_in_small(shape, 0, "flash" if cuda else "sdpa", compiled=cuda))


@on_ranks
def a_wrong_8b_step_is_noticed(folder):
    """What the check above is worth: a matrix that never trains, other rates, a block left out."""
    if DEVICE != "cpu" or ddp.num_ranks() != 2:
        return

    def before_step(engine, change):
        real = engine.optimizer.step
        engine.optimizer.step = lambda: (change(engine), real())

    def lose(name):
        return lambda engine: before_step(engine, lambda e: e.parameters[name].grad.zero_())

    def rates(**changes):
        return lambda engine: [group.update(changes) for group in engine.optimizer.param_groups]

    def leave_out(engine):
        engine.wrapper.module.model.layers[2].transform = lambda x, *_: x + 0 * sum(
            p.sum() for p in engine.wrapper.module.model.layers[2].parameters())

    shape = dict(vocab_size=59, context_length=64, d_model=32, num_heads=2, d_ff=88)
    for spoil in (lose("layers.2.attn.q_proj.weight"), lose("layers.3.ln2.weight"), rates(betas=(0.9, 0.999)),
                  rates(betas=(0.8, 0.95)), rates(lr=1.1e-3), rates(lr=0.9e-3), leave_out):  # fmt: skip
        runs = step_8b_in_small(shape, 0, "sdpa", spoil=spoil)
        try:
            check_8b_step_in_small(runs)
        except AssertionError:
            continue
        assert ddp.this_rank() > 0, spoil  # which sees the losses alone


@on_ranks
def collectives_on_unequal_parts_are_right(folder):
    N, r = ddp.num_ranks(), ddp.this_rank()
    chunks = [torch.full((k,), r + 1.0) for k in range(N)]  # rank 0's is empty
    part, finish = ddp.start_mean_to_owners(chunks)
    finish()
    assert part.tolist() == [(N + 1) / 2] * r
    tensors = [torch.full((2, k), float(r)) for k in (1, 2, 3)]
    ddp.send_from_owners(tensors, [1, 0, 1])
    assert [t.unique().tolist() for t in tensors] == [[1.0], [0.0], [1.0]]
    for rows in (1, 3, 8):
        whole = torch.arange(rows * 2.0).view(rows, 2)
        assert torch.equal(ddp.gather_rows(ddp.my_rows(whole, rows), rows), whole)


def run_checks(rank, n, folder, kind, names):
    global DEVICE
    torch.set_num_threads(1)
    if kind == "cuda":
        DEVICE = f"cuda:{rank}"
        F32["atol"] = 1e-4  # its kernels add in other orders, and AdamW divides by small numbers
        torch.cuda.set_device(rank)
        torch.set_default_device(DEVICE)
    from torch import _dynamo  # noqa: F401: see ddp.Ranks.start_group

    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/store",
                            rank=rank, world_size=n, timeout=timedelta(seconds=60))  # fmt: skip
    outcomes = {}
    for name in names:
        began = time.perf_counter()
        try:
            CHECKS[name](folder)
            outcomes[name] = None
        except BaseException:  # noqa: BLE001: told by the test
            outcomes[name] = traceback.format_exc()
        print(f"rank {rank}: {name} {time.perf_counter() - began:.1f} s", flush=True)
        Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
        if outcomes[name]:  # the ranks may be out of step now
            break
    dist.destroy_process_group()


def threads_of_groups():
    """Those of the process group and of the watchdog: Python may abort one when it ends."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]  # Linux
    return [name for name in names if "gloo" in name] + [t for t in threading.enumerate() if t.name == "watchdog"]


def run_mains(rank, n, folder, runs):
    """main(argv) for each (port, argv), as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                      MASTER_ADDR="127.0.0.1")  # fmt: skip
    held = runs[0][1][0] == "bench"  # by PyTorch's own mesh
    for port, argv in runs:
        os.environ["MASTER_PORT"] = str(port)
        assert ddp.main(argv) == 0
        held = held or "torch_fsdp" in argv
        assert held or not threads_of_groups()
    if held:
        sys.stdout.flush()
        os._exit(0)


def spawn(function, n, *args):
    """Processes of a server that has imported this file, and with it torch, once."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", __name__])
    torch.multiprocessing.start_processes(function, (n, *args), n, start_method="forkserver")


def run_main_into(rank, n, path, port, argv):
    """main(argv), what rank 0 prints into a file."""
    if rank == 0:
        sys.stdout = open(path, "w")  # noqa: SIM115
    run_mains(rank, n, None, [(port, argv)])
    sys.stdout.flush()
    os._exit(0)  # PyTorch's own mesh may hold threads


def printed_on_2_ranks(folder, *argv):
    spawn(run_main_into, 2, folder / "out.txt", free_ports(1)[0], [*map(str, argv)])
    return (folder / "out.txt").read_text()


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@functools.cache
def outcomes(n, folder, kind):
    """{check: the errors of the ranks, None where it passed}. A check that fails ends its processes,
    which may be out of step; new ones go on with the next."""
    found, left = {}, [*CHECKS]
    while left:
        at = folder / f"ranks_{n}_{kind}_{len(found)}"
        at.mkdir()
        problem = "did not run"
        try:
            spawn(run_checks, n, str(at), kind, left)
        except Exception as error:  # noqa: BLE001: told by the test
            problem = str(error)
        results = [json.loads(path.read_text()) for path in sorted(at.glob("*.json"))]
        results += [{}] * (n - len(results))
        failed = next((name for name in left if any(r.get(name, problem) for r in results)), left[-1])
        done, left = left[: left.index(failed) + 1], left[left.index(failed) + 1 :]
        found.update({name: [r.get(name, problem) for r in results] for name in done})
    return found


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 NVIDIA GPUs")


@pytest.mark.parametrize("n, kind", [(2, "cpu"), (4, "cpu"), pytest.param(2, "cuda", marks=two_gpus)])
@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(check, n, kind, tmp_path_factory):
    for rank, error in enumerate(outcomes(n, tmp_path_factory.getbasetemp(), kind)[check]):
        assert error is None, f"rank {rank}:\n{error}"


# -------------------------------------------------------------------------------------------------
# runs: equal to train.py's

TINY = ("--vocab_size 300 --context_length 16 --d_model 16 --num_layers 2 --num_heads 2 --batch_size 4 "
        "--max_steps 6 --warmup_steps 2 --eval_every 4 --eval_tokens 64 --save_every 2 --log_every 1 "
        "--sample_tokens 8 --num_workers 1 --device cpu").split()  # fmt: skip
VARIANTS = {  # of train.py's flags; 301 ids, width 18 and 3 heads: sizes that 4 does not divide
    "tied": [],
    "odd": "--grad_accum 3 --no-tie_embeddings --vocab_size 301 --d_model 18 --num_heads 3".split(),
}


def make_corpus(folder):
    rng = random.Random(0)
    folder.mkdir(parents=True)
    names = "alpha beta gamma delta value index result count item name".split()
    for i in range(30):
        lines = [f"def {rng.choice(names)}_{i}({rng.choice(names)}):\n    return {rng.choice(names)} + {j}\n"
                 for j in range(12)]  # fmt: skip
        (folder / f"file_{i:02d}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and the runs of train.py on it that others are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    make_corpus(folder / "corpus")
    for name, more in VARIANTS.items():
        train.main(flags(folder, f"train_{name}", *more))
    train.main(flags(folder, "train_20", "--max_steps", "20"))
    yield folder
    torch.set_num_threads(threads)


def flags(folder, out, *more):
    return [*TINY, "--data", str(folder / "corpus"), "--data_dir", str(folder / "data"), "--out_dir",
            str(folder / out), *more]  # fmt: skip


def numbers(folder, out):
    """What a run logged, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()[1:]]
    return [{k: r[k] for k in ("step", "loss", "lr", "grad_norm", "valid_loss") if k in r} for r in records]


def assert_same_run(folder, out, expected, atol):
    got, want = numbers(folder, out), numbers(folder, expected)
    assert [r.keys() for r in got] == [r.keys() for r in want]
    for g, w in zip(got, want):
        assert all(abs(g[k] - w[k]) <= atol for k in w), (g, w)
    got, want = (torch.load(folder / o / "checkpoint.pt", weights_only=True) for o in (out, expected))
    assert got["model"].keys() == want["model"].keys() and got["config"] == want["config"]
    for name, tensor in want["model"].items():
        assert torch.allclose(got["model"][name], tensor, rtol=0, atol=atol), name
    assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
    assert got["optimizer"]["state"].keys() == want["optimizer"]["state"].keys()
    for i, state in want["optimizer"]["state"].items():
        assert got["optimizer"]["state"][i]["step"] == state["step"]
        for key in ("m", "v"):
            assert torch.allclose(got["optimizer"]["state"][i][key], state[key], rtol=0, atol=atol), (i, key)
    assert torch.equal(got["generator"], want["generator"])


@pytest.mark.parametrize("strategy", ddp.STRATEGIES)
def test_one_rank_equals_train_py_bit_for_bit(folder, strategy, capsys):
    out = f"one_{strategy}"
    assert ddp.main(["train", *flags(folder, out, "--max_steps", "20", "--strategy", strategy)]) == 0
    assert_same_run(folder, out, "train_20", atol=0)
    assert "--- sample" in capsys.readouterr().out
    assert (folder / out / "model/model.safetensors").read_bytes() == (
        folder / "train_20/model/model.safetensors").read_bytes()


@functools.cache
def runs_on(n, folder):
    runs = [["train", *flags(folder, f"{strategy}_{name}_{n}", *more, "--strategy", strategy)]
            for name, more in VARIANTS.items() for strategy in ddp.STRATEGIES
            if n == 2 or name == "odd"]
    runs = [[*argv[:-4], "--batch_size", "4", *argv[-4:]] for argv in runs]
    spawn(run_mains, n, str(folder), [*zip(free_ports(len(runs)), runs, strict=True)])


@pytest.mark.parametrize("strategy", ddp.STRATEGIES)
@pytest.mark.parametrize("n", [2, 4])
def test_several_ranks_equal_train_py(folder, n, strategy):
    runs_on(n, folder)
    for name in VARIANTS if n == 2 else ["odd"]:
        assert_same_run(folder, f"{strategy}_{name}_{n}", f"train_{name}", atol=1e-5)


def cut_to(step, folder, out):
    """What a run killed after its checkpoint of `step` leaves."""
    os.replace(folder / out / "checkpoint.pt.prev", folder / out / "checkpoint.pt")
    assert torch.load(folder / out / "checkpoint.pt", weights_only=True)["iteration"] == step


def test_a_run_goes_on_under_other_strategies_other_numbers_of_ranks_and_in_train_py(folder, monkeypatch):
    argv = flags(folder, "chain", "--max_steps", "20", "--save_every", "1")
    real = train.Trainer.save

    def save(self):
        real(self)
        if self.step == 4:  # its validation comes after the checkpoint
            raise InterruptedError("stopped")

    monkeypatch.setattr(train.Trainer, "save", save)
    with pytest.raises(SystemExit):
        train.main(argv)
    monkeypatch.undo()
    for n, strategy, step in ((2, "zero1", 7), (4, "fsdp", 11), (1, "naive", 14), (2, "torch_fsdp", 17)):
        spawn(run_until, n, free_ports(1)[0], ["train", *argv, "--resume", "--strategy", strategy], step)
        assert torch.load(folder / "chain/checkpoint.pt", weights_only=True)["iteration"] == step
    assert train.main([*argv, "--resume"]) == 0
    assert_same_run(folder, "chain", "train_20", atol=1e-5)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_bfloat16_weights_train_as_in_train_py_and_go_on_bit_for_bit(folder, strategy):
    narrow = ["--param_dtype", "bfloat16", "--moment_dtype", "float32"]
    if not (folder / "train_narrow").exists():
        train.main(flags(folder, "train_narrow", *narrow))
    argv = ["train", *flags(folder, f"narrow_{strategy}", *narrow, "--strategy", strategy)]
    whole, again = ([(port, argv + more)] for port, more in zip(free_ports(2), ([], ["--resume"]), strict=True))
    spawn(run_mains, 2, None, whole)
    assert_same_run(folder, f"narrow_{strategy}", "train_narrow", atol=2e-2)  # bits of bfloat16, below 4
    sizes = {(folder / run / "model/model.safetensors").stat().st_size
             for run in (f"narrow_{strategy}", "train_narrow")}  # fmt: skip
    assert len(sizes) == 1  # two bytes a weight
    path = folder / f"narrow_{strategy}/checkpoint.pt"
    before = torch.load(path, weights_only=True)
    cut_to(4, folder, f"narrow_{strategy}")
    spawn(run_mains, 2, None, again)
    after = torch.load(path, weights_only=True)
    assert all(w.dtype == torch.bfloat16 and torch.equal(w, after["model"][k]) for k, w in before["model"].items())


def run_until(rank, n, port, argv, step):
    """main(argv), killed after the checkpoint of `step`."""
    real = ddp.Trainer.save

    def save(self):
        real(self)
        if self.step == step:
            sys.stdout.flush()
            dist.barrier()  # not before rank 0 has written
            time.sleep(0.0 if rank else 1.0)  # the store ends with rank 0
            os._exit(0)

    ddp.Trainer.save = save
    run_mains(rank, n, None, [(port, argv)])


def run_and_watch_the_end(rank, n, port, argv):
    """main(argv), in which rank 0 goes on writing the model only while the last rank lives."""
    real = ddp.Trainer.export

    def export(self, weights):
        for _ in range(2):  # the first may be a late sign
            before = self.watch.states()[-1]
            while self.watch.states()[-1] == before:
                time.sleep(0.1)
        real(self, weights)

    ddp.Trainer.export = export
    run_mains(rank, n, None, [(port, argv)])


def test_the_ranks_wait_while_rank_0_writes_the_model(folder):
    argv = ["train", *flags(folder, "waits", "--timeout", "20")]
    spawn(run_and_watch_the_end, 2, free_ports(1)[0], argv)
    assert (folder / "waits/model/model.safetensors").exists()


# -------------------------------------------------------------------------------------------------
# killed, stopped and wrongly started


def start_ranks(n, argv, per_rank=None, folder_of=lambda r: None, **environment):
    """n processes as several hosts would start them, without torchrun; [Popen]."""
    (port,) = free_ports(1)
    started = []
    for r in range(n):
        env = {**CPU["env"], "RANK": str(r), "WORLD_SIZE": str(n), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE":
               str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}  # fmt: skip
        more = per_rank(r) if per_rank else []
        started.append(subprocess.Popen([sys.executable, "-u", ROOT / "ddp.py", *argv, *more], env=env, text=True,
                                        cwd=folder_of(r), stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    return started


def ends_with_one_line(processes, *patterns, timeout=60):
    """All end by themselves, none with 0, and together they wrote one error line."""
    lines = []
    for p in processes:
        _, err = p.communicate(timeout=timeout)
        assert p.returncode not in (0, None)
        lines += [line for line in err.splitlines() if line.startswith("ddp.py: error")]
        assert "Traceback" not in err, err
    assert len(lines) == 1, lines
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]


def test_a_batch_that_the_ranks_do_not_divide_is_one_line(folder):
    argv = ["train", *flags(folder, "bad", "--batch_size", "3")]
    ends_with_one_line(start_ranks(2, argv), r"got 3 \* 1 and 2;")


def test_ranks_with_different_flags_are_named(folder):
    argv = ["train", *flags(folder, "bad", "--batch_size", "6")]
    different = start_ranks(3, argv, lambda r: ["--lr", "0.5", "--seed", "7"] if r == 2 else [])
    ends_with_one_line(different, "--lr 0.5 for 0.003, --seed 7 for 0 on rank 2")


def test_a_flag_that_one_rank_alone_has_is_named(folder):
    argv = ["train", *flags(folder, "bad", "--batch_size", "6")]
    for flag, shown in (("--resume", "--resume True for False on rank 1"),
                        ("--no_such", "rank 1: unrecognized arguments: --no_such")):
        ends_with_one_line(start_ranks(2, argv, lambda r: [flag] if r else []), shown)  # noqa: B023
    ends_with_one_line(start_ranks(2, argv, lambda r: [] if r else ["--no_such"]), "unrecognized", timeout=50)


def test_ranks_with_other_data_are_named(folder, tmp_path):
    for r in range(2):
        (tmp_path / str(r)).mkdir()
        words = random.Random(r).choices([name for name in dir(torch) if len(name) > 5], k=5000)
        (tmp_path / str(r) / "text.txt").write_text(" ".join(words))
    argv = ["train", *flags(folder, "bad"), "--data", "text.txt", "--data_dir", "made", "--out_dir", "out"]
    ranks = start_ranks(2, argv, folder_of=lambda r: tmp_path / str(r))
    ends_with_one_line(ranks, "the same data, got tokenizer", "on rank 1")


def stop_one_at(text, ranks, pattern):
    """Stops rank 1 when rank 0 has printed the text: the others must end, in one line."""
    for line in ranks[0].stdout:
        if text in line:
            ranks[1].send_signal(signal.SIGSTOP)
            break
    try:
        ends_with_one_line([ranks[0], *ranks[2:]], pattern, "within 3 s")
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_rank_that_is_silent_before_the_first_step_is_named(folder):
    ranks = start_ranks(2, ["train", *flags(folder, "silent", "--timeout", "3", "--max_steps", "100000")])
    stop_one_at("memory", ranks, r"rank 1 stopped answering at step \d+, ")


def test_a_restart_goes_on_only_with_the_run_that_this_torchrun_began(folder, capsys, monkeypatch):
    def restarted(*more):
        ddp.main(["train", *argv, *more])
        return capsys.readouterr().out

    argv = flags(folder, "restarted", "--max_steps", "3")
    assert ddp.main(["train", *argv]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    for others in (None, "before"):  # began without torchrun, and under another one
        if others:
            (folder / "restarted/.torchrun").write_text(others)
        assert_refused(capsys, ["train", *argv], "which holds a run")
    (folder / "restarted/.torchrun").write_text("now")
    assert "resumed" in restarted("--max_steps", "4")
    assert "resumed" in restarted("--overwrite")  # a rank died when the run had ended: it is not lost
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "resumed" not in restarted("--overwrite")


def start_twice(rank, n, port):
    """Under torchrun of several hosts, whose store outlives a start: only the last one's rank was killed."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # fmt: skip
    before = ddp.Ranks(30)
    assert before.restarts == 0
    before.collect(f"before {rank}")
    before.share(lambda: "before")  # all have come so far
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(rank == n - 1))
    again = ddp.Ranks(30)
    told = again.collect(rank)
    assert rank or (told == [*range(n)] and again.restarts == 1)
    again.share(lambda: None)


def test_a_restart_that_one_host_alone_counts_meets_the_others_and_knows_nothing_of_before():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(start_twice, 3, store.port)


def test_ranks_that_do_not_answer_are_named_and_no_timer_ends_the_process_before(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("lmzero/start/1", "one that was killed")
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port,
                            TORCHELASTIC_USE_AGENT_STORE=True).items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    running, meet = [], ddp.Ranks.meet

    def counted(self, store):
        running.extend(t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set())
        return meet(self, store)

    monkeypatch.setattr(ddp.Ranks, "meet", counted)
    with pytest.raises(ValueError, match=r"all 2 ranks must meet .* no answer from ranks \[1\]"):
        ddp.Ranks(0.5)
    assert not running


def test_an_address_alone_is_no_start_of_several_ranks(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "host0")  # as clusters set it for all
    assert ddp.Ranks(1).world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE and MASTER_ADDR must be set together"):
        ddp.Ranks(1)


@pytest.mark.parametrize("strategy", ["overlap", "zero1", "fsdp"])
def test_a_run_goes_on_with_another_micro_batch_and_moments_of_another_dtype(folder, strategy):
    argv = ["train", *flags(folder, f"other_{strategy}", "--strategy", strategy)]
    for more in (["--max_steps", "2"], ["--resume", "--batch_size", "8"]):
        moments = "float32" if "--resume" in more else "bfloat16"
        assert ddp.main([*argv, "--param_dtype", "bfloat16", "--moment_dtype", moments, *more]) == 0
    saved = torch.load(folder / f"other_{strategy}/checkpoint.pt", weights_only=True)
    assert saved["micro_batch_size"] == 8
    assert {state["m"].dtype for state in saved["optimizer"]["state"].values()} == {torch.float32}


def test_the_log_has_the_share_of_the_peak_where_that_is_known(folder, monkeypatch):
    monkeypatch.setattr(lm, "peak_flops", lambda device: 1e9)
    assert ddp.main(["train", *flags(folder, "mfu")]) == 0
    first, *records = map(json.loads, (folder / "mfu/log.jsonl").read_text().splitlines())
    config = lm.from_pretrained(folder / "mfu/model").config
    for r in filter(lambda r: "loss" in r, records):
        assert abs(r["mfu"] / (r["tokens_per_s"] * lm.flops_per_token(config) / 1e9) - 1) < 1e-9


def test_a_strategys_own_flag_is_left_behind_with_it(folder, capsys):
    for more in (["--bucket_mb", "1"], ["--resume", "--strategy", "fsdp", "--reduce_dtype", "bfloat16"],
                 ["--resume", "--strategy", "naive"]):  # fmt: skip
        assert ddp.main(["train", *flags(folder, "left", *more)]) == 0
    first, *_ = (folder / "left/log.jsonl").read_text().splitlines()
    assert json.loads(first)["flags"]["bucket_mb"] == 1
    assert capsys.readouterr().out.count("resumed") == 2


@pytest.mark.parametrize("module", [train, ddp])
def test_a_validation_that_was_cut_off_is_made_when_the_run_goes_on_and_a_whole_one_logged_once(
    folder, module, monkeypatch
):
    verb = ["train"] * (module is ddp)
    argv = [*verb, *flags(folder, f"cut_{module.__name__}")]
    real = module.Trainer.validate

    def validate(self, num_tokens):
        if self.step == 4:
            raise InterruptedError("stopped")
        real(self, num_tokens)

    monkeypatch.setattr(module.Trainer, "validate", validate)
    with pytest.raises(SystemExit):
        module.main(argv)
    monkeypatch.undo()
    for _ in range(2):  # the second finds a run that has ended
        assert module.main([*argv, "--resume"]) == 0
        assert numbers(folder, f"cut_{module.__name__}") == numbers(folder, "train_tied")


def test_an_error_without_a_text_is_told_by_its_class(folder, monkeypatch, capsys):
    def fail(*_):
        raise ValueError

    monkeypatch.setattr(train, "Trainer", fail)
    with pytest.raises(SystemExit):
        train.main(flags(folder, "new"))
    assert capsys.readouterr().err == "train.py: error: ValueError\n"


def test_nccl_without_a_gpu_is_one_line(folder):
    argv = ["train", *flags(folder, "bad", "--backend", "nccl")]
    ends_with_one_line(start_ranks(2, argv), "nccl needs an NVIDIA GPU")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args, ranks = SimpleNamespace(device="auto", backend="auto"), SimpleNamespace(world_size=4, local_rank=0)
    with pytest.raises(ValueError, match="got 4 ranks and 2 GPUs"):
        ddp.device_of_rank(args, ranks)


def test_a_port_in_use_is_one_line(folder):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        argv = ["train", *flags(folder, "bad", "--init_timeout", "2")]
        port = str(busy.getsockname()[1])
        ends_with_one_line(start_ranks(2, argv, MASTER_PORT=port), f"must be free, got 127.0.0.1:{port}")


def test_a_rank_that_never_comes_ends_the_wait(folder):
    argv = ["train", *flags(folder, "bad", "--init_timeout", "1")]
    ends_with_one_line(start_ranks(1, argv, WORLD_SIZE="2"), "all 2 ranks must meet at 127.0.0.1")


def assert_refused(capsys, argv, pattern):
    with pytest.raises(SystemExit) as stop:
        ddp.main(argv)
    assert stop.value.code == 2
    assert re.search(pattern, capsys.readouterr().err.splitlines()[-1]), argv


def test_flags_that_are_wrong_are_one_line_of_rank_0(folder, capsys, monkeypatch):
    for argv, pattern in ((["train", "--strategy", "zero9"], "zero9"), (["comm", "--sizes_mb", "-1"], "above 0"),
                          (["train", "--strategy", "fsdp", "--bucket_mb", "3"], "overlap, zero1, torch_ddp, got fsdp"),
                          (["train", "--strategy", "flat", "--reduce_dtype", "bfloat16"], "torch_fsdp, got flat"),
                          (["train", *flags(folder, "new"), "--recompute", "ffn", "--checkpoint_every", "1", "--data",
                            "no/such"], "got both"),
                          (["train", *flags(folder, "train_tied")], "holds a run")):  # fmt: skip
        assert_refused(capsys, argv, pattern)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        ddp.main(["train", "--strategy", "zero9"])
    assert not capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_rank_that_stops_answering_is_named_with_its_step(folder):
    argv = ["train", *flags(folder, "stopped", "--max_steps", "100000", "--timeout", "3", "--save_every", "100000",
                            "--eval_every", "100000", "--batch_size", "6")]  # fmt: skip
    stop_one_at("step 20/", start_ranks(3, argv), r"rank 1 stopped answering at step \d\d+, ")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_to_one_rank_saves_the_same_step_on_all_and_stops(folder):
    argv = ["train", *flags(folder, "polite", "--max_steps", "100000", "--save_every", "100000", "--eval_every",
                            "100000", "--strategy", "fsdp")]  # fmt: skip
    ranks = start_ranks(2, argv)
    for line in ranks[0].stdout:
        if line.startswith("step 5/"):
            ranks[1].send_signal(signal.SIGTERM)
            break
    out = "".join(ranks[0].stdout)
    assert [p.wait(timeout=60) for p in ranks] == [128 + signal.SIGTERM] * 2
    saved = torch.load(folder / "polite/checkpoint.pt", weights_only=True)["iteration"]
    assert f"saved at step {saved}, --resume goes on" in out
    for p in ranks:
        p.communicate()


def rank_process(token, rank):
    """The newest process of that rank among those that torchrun started with this token."""
    for path in sorted(Path("/proc").glob("[0-9]*/environ"), key=lambda p: -int(p.parent.name)):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"LMZERO_TEST={token}".encode() in variables and f"RANK={rank}".encode() in variables:
            return int(path.parent.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process in Linux's /proc")
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_a_killed_rank_is_restarted_by_torchrun_and_the_run_ends_as_undisturbed(folder, strategy):
    argv = flags(folder, f"killed_{strategy}", "--max_steps", "80", "--save_every", "5", "--eval_every", "40")
    whole = [*argv[: argv.index("--out_dir") + 1], str(folder / "whole"), *argv[argv.index("--out_dir") + 2 :]]
    if not (folder / "whole").exists():
        assert train.main(whole) == 0
    token, rng = str(random.random()), random.Random(time.time_ns())
    step, victim = rng.randrange(1, 70), rng.randrange(2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", str(ROOT / "ddp.py"), "train", *argv, "--strategy", strategy]  # fmt: skip
    process = subprocess.Popen(command, env={**CPU["env"], "LMZERO_TEST": token, "PYTHONUNBUFFERED": "1"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"step {step}/"):
            os.kill(rank_process(token, victim), signal.SIGKILL)
            break
    seen += process.communicate(timeout=120)[0]
    assert process.returncode == 0, seen
    assert f"killed at step {step}" and ("resumed" in seen or "starting from the beginning" in seen), seen
    assert_same_run(folder, f"killed_{strategy}", "whole", atol=1e-5)


# -------------------------------------------------------------------------------------------------
# bench, comm, limits


def run_under_torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "ddp.py"), *map(str, argv)]  # fmt: skip
    done = subprocess.run(command, **CPU, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_times_every_strategy_and_ends_in_one_json_line(tmp_path):
    out = printed_on_2_ranks(
        tmp_path, "bench", "--d_model", 32, "--num_layers", 2, "--num_heads", 2, "--d_ff", 64, "--context_length", 16,
        "--vocab_size", 100, "--batch_size", 2, "--grad_accum", 2, "--device", "cpu", "--steps", 1, "--warmup_steps", 2,
        "--trace", tmp_path / "trace.json", "--recompute", "cheap", "--moment_dtype", "bfloat16", "--reduce_dtype",
        "float32",
    )  # fmt: skip
    answer = json.loads(out.splitlines()[-1])
    assert {"grad_accum": 2, "attention": "sdpa", "param_dtype": "float32", "moment_dtype": "bfloat16",
            "reduce_dtype": "float32"}.items() <= answer.items()  # fmt: skip
    rows = answer["strategies"]
    assert list(rows) == list(ddp.STRATEGIES)
    for name, row in rows.items():
        assert row["low_ms"] <= row["ms"] <= row["high_ms"] and row["tokens_per_s"] > 0
        assert sum(line.startswith(f"{name} ") for line in out.splitlines()) == 1
        assert row["recompute"] == {"cheap": 2}
    whole = rows["overlap"]["state_gib"]
    assert rows["zero1"]["state_gib"] < 0.55 * whole and rows["fsdp"]["state_gib"] < 0.55 * whole  # 1/2, norms
    assert json.loads((tmp_path / "trace_overlap.json").read_text())["traceEvents"]


def test_bench_takes_the_leaderboards_step_by_its_preset_and_other_flags_before_it():
    def parsed(line):
        return ddp.parse(ddp.build_parser(), line.split())

    args = parsed("bench --preset 8b --steps 5 --attention sdpa")
    assert (args.batch_size, args.strategies, args.param_dtype, args.recompute) == (1, ["fsdp"], "bfloat16", "auto")
    assert (args.steps, args.attention) == (5, "sdpa")
    assert parsed("bench --preset 8b --checkpoint_every 2").recompute == "none"
    assert parsed("bench --preset xl").param_dtype == "float32"
    assert parsed("bench --preset 8b --strategies zero1").reduce_dtype is None


def test_bench_refuses_before_any_work_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    def no_flash(device=None):  # it runs on a CPU where all tests do, in triton's interpreter
        raise ValueError("no flash here")

    monkeypatch.setattr(lm, "TransformerLM", None)
    monkeypatch.setattr(lm, "load_flash_attention", no_flash)
    for argv, pattern in ((["--strategies", "zero1", "naive", "--reduce_dtype", "bfloat16"], "got zero1, naive; leave"),
                          (["--strategies", "fsdp", "--bucket_mb", "3"], "torch_ddp, got fsdp"),
                          (["--trace", str(tmp_path)], "a file must be named, got the folder"),
                          (["--recompute", "auto", "--checkpoint_every", "1"], "got both"),
                          (["--preset", "8b", "--device", "cpu"], "no flash here")):  # fmt: skip
        assert_refused(capsys, ["bench", *argv], pattern)
    assert_refused(capsys, ["comm", "--device", "cpu", "--sizes_mb", "1e12"], "can't allocate memory")
    monkeypatch.setattr(lm, "free_memory", lambda device: 2**30)
    assert_refused(capsys, ["bench", "--preset", "xl", "--device", "cpu"], "must fit in the free memory, got one")


def test_bytes_of_a_step_are_what_the_xl_model_took():
    config = lm.ModelConfig(**lm.PRESETS["xl"])
    args = SimpleNamespace(checkpoint_every=[], param_dtype="float32", moment_dtype=None, reduce_dtype=None)
    need = lambda strategy, accumulates: ddp.bytes_of_step(  # noqa: E731
        strategy, 2, accumulates, args, config, 4, torch.bfloat16, torch.device("cuda"), ("none",) * 32, compiled=True)
    for strategy, measured_gib in (("naive", 51.14), ("flat", 63.65), ("overlap", 51.18), ("torch_ddp", 65.09),
                                   ("zero1", 38.88), ("fsdp", 26.52), ("torch_fsdp", 26.52)):  # fmt: skip
        assert measured_gib <= need(strategy, False) / 2**30 <= 1.1 * measured_gib, strategy
    kept = 4 * ddp.parameters_of(config)  # whole gradients in float32, beside the activations
    assert need("fsdp", True) - need("fsdp", False) > 0.8 * kept


def test_bench_refuses_strategies_that_disagree_and_updates_that_do_not_lower_the_loss():
    checks = {"naive": [2.0, 1.0, 1.9], "fsdp": [2.0, 1.005, 1.9]}
    ddp.check_agree(checks, 1e-2)
    with pytest.raises(ValueError, match="fsdp must agree with naive"):
        ddp.check_agree(checks, 1e-3)
    for after in (2.0, math.nan):
        with pytest.raises(ValueError, match="must lower the loss"):
            ddp.check_agree({"naive": [2.0, 1.0, after]}, 1e-2)


def test_comm_times_checks_and_plots_collectives(tmp_path):
    plot = ["--plot", tmp_path / "comm.png"] if find_spec("matplotlib") else []
    out = printed_on_2_ranks(tmp_path, "comm", "--sizes_mb", 0.1, 1, "--repeats", 5, "--limits", "--device", "cpu",
                             *plot)  # fmt: skip
    answer = json.loads(out.splitlines()[-1])
    assert [(r["operation"], r["mb"]) for r in answer["rows"]] == [
        (o, s) for o in ("all_reduce", "reduce_scatter", "all_gather", "broadcast") for s in (0.1, 1)]  # fmt: skip
    assert answer["limits"]["C_flop_per_s"] > 0 and "bound by computation" in out
    if plot:
        assert plot[1].read_bytes().startswith(b"\x89PNG")


def test_exposed_time_is_communication_beside_which_nothing_runs():
    comm, rest = ddp.COMMUNICATION, ddp.REST
    assert ddp.exposed_us([(0, 4, comm), (3, 5, rest)]) == (4, 3)
    assert ddp.exposed_us([(0, 10, "matmul"), (2, 5, comm)]) == (3, 0)
    assert ddp.exposed_us([(0, 2, comm), (1, 3, comm), (5, 6, comm), (2, 9, "loss")]) == (4, 2)
    assert ddp.exposed_us([]) == (0, 0)


def test_shares_of_a_step_are_of_the_operations_that_launched_the_work():
    def host(name, begin, end, thread=1):
        return {"cat": "cpu_op", "name": name, "ts": begin, "dur": end - begin, "tid": thread}

    def work(launched, begin, end, name="kernel", thread=1, number=itertools.count()):
        of = {"args": {"correlation": next(number)}}
        return [{"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 1, "tid": thread, **of},
                {"cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "tid": 7, **of}]  # fmt: skip

    events = [{"name": "a process", "ph": "M"}, host("aten::mm", 0, 5), *work(2, 100, 110), *work(6, 110, 115),
              host("_LinearCrossEntropy", 10, 30), host("aten::mm", 12, 14), *work(13, 115, 125), *work(20, 125, 130),
              host("lmzero::flash_attention_forward", 31, 40), *work(35, 130, 150),
              host("aten::_scaled_dot_product_cudnn_attention_backward", 33, 36, thread=2),
              *work(34, 150, 180, thread=2), *work(50, 178, 190, "ncclDevKernel_AllGather"),
              host("Optimizer.step#AdamW.step", 41, 60), *work(55, 190, 195)]  # fmt: skip
    assert ddp.shares_of_parts(ddp.kernels_by_part(events)) == {
        "loss": 0.1579, "optimizer": 0.0526, "matmul": 0.1053, "attention backward": 0.3158,
        "attention forward": 0.2105, "rest": 0.0526, "communication not hidden": 0.1053, "idle": 0.0,
    }  # fmt: skip
    assert ddp.shares_of_parts([]) == {}


def test_limits_are_where_communication_takes_as_long_as_computation():
    B, D, F, C, W = 100_000, 3000, 8000, 9e14, 4e11
    compute = lambda N: 6 * B * D * F / N / C  # noqa: E731
    N = ddp.fsdp_limit(B, C, W)
    assert (N - 1) / N * 6 * D * F / W == pytest.approx(compute(N))
    N = ddp.data_parallel_limit(B, C, W)
    assert 2 * (N - 1) / N * 6 * D * F / W == pytest.approx(2 * compute(N))
    N = ddp.tensor_parallel_limit(F, C, W)
    assert 2 * (N - 1) / N * 2 * B * D / W == pytest.approx(compute(N))
    # both, over the same links: no point of a grid that is bound by computation has more ranks
    N, (X, Y) = ddp.fsdp_tensor_parallel_limit(B, F, C, W, overlapped=False)
    time_of = lambda x, y: ((x - 1) / x * 6 * D * F / y + 2 * (y - 1) / y * 2 * B * D / x) / W  # noqa: E731
    assert time_of(X, Y) == pytest.approx(compute(X * Y)) and N == pytest.approx(X * Y)
    grid = [x * y for x in range(1, 60) for y in range(1, 12) if time_of(x, y) <= compute(x * y)]
    assert 0.9 * N < max(grid) <= N * (1 + 1e-9)
    both, (X, Y) = ddp.fsdp_tensor_parallel_limit(B, F, C, W)
    assert both == pytest.approx(ddp.fsdp_limit(B, C, W) * ddp.tensor_parallel_limit(F, C, W))
    assert ddp.ring_all_reduce_seconds(8, 4, 1) == 12 and ddp.alternate_ring_all_reduce_seconds(8, 4, 1) == 24


# -------------------------------------------------------------------------------------------------
# alone, and on GPUs


def test_importing_the_script_does_nothing():
    code = "import ddp, torch; assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr


def test_wrappers_work_without_a_process_group():
    for kind in WRAPPERS:
        torch.manual_seed(0)
        plain = Toy(tied=True)
        wrapper, optimizer = wrap(kind, copy.deepcopy(plain))
        reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
        for o, m in ((reference, plain), (optimizer, wrapper)):
            loss_of(m, *batch(4, 0)).backward()
            if m is wrapper:
                m.finish_gradient_synchronization()
            o.step()
        got = weights(wrapper)
        for name, p in plain.named_parameters():
            assert torch.equal(got[name], p), (kind, name)


@two_gpus
def test_two_gpus_train_as_one_under_every_strategy(folder):
    def losses(out):
        return [r["loss"] for r in numbers(folder, out) if "loss" in r]

    argv = flags(folder, "gpu_1", "--device", "cuda", "--dtype", "float32", "--no-compile")
    train.main(argv)
    for strategy in ddp.STRATEGIES:
        out = f"gpu_{strategy}"
        run_under_torchrun("train", *argv, "--out_dir", folder / out, "--strategy", strategy)
        # float32 matrix products of a GPU, rows of the batch on two of them
        assert losses(out) == pytest.approx(losses("gpu_1"), abs=1e-4), strategy
