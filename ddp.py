"""Trains one model on many devices: data parallel, sharded optimizer, fully sharded data parallel.

    torchrun --standalone --nproc_per_node=2 ddp.py train --strategy fsdp  # train.py's flags
    torchrun --standalone --nproc_per_node=2 ddp.py bench --preset xl      # step time and memory
    torchrun --standalone --nproc_per_node=2 ddp.py comm --limits          # what the links can do
    python ddp.py train                                                     # one rank: train.py

A run's update, log and checkpoint are train.py's: the same flags give the same numbers on any
number of ranks under any strategy, and each resumes the other's runs. From plain to fast:

    naive      an all-reduce for each gradient, after the backward pass
    flat       one all-reduce of all gradients, after the backward pass
    overlap    all-reduces of buckets, while the backward pass computes the rest
    zero1      gradients reduced to the one rank that keeps the optimizer state of their parameter
    fsdp       each rank keeps rows of every weight; whole ones exist while a layer needs them
    torch_ddp, torch_fsdp    PyTorch's own engines

Sources
[1] CS336 assignment 2 (systems) handout, Stanford 2025 and 2026, the parts on distributed training
[2] Li et al. 2020, PyTorch Distributed (buckets, overlap), arXiv 2006.15704
[3] Rajbhandari et al. 2019, ZeRO, arXiv 1910.02054
[4] Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277
[5] Austin et al. 2025, How to Scale Your Model, chapters on sharding and training
[6] NCCL tests, PERFORMANCE.md: algorithm and bus bandwidth

Dims: N ranks; B tokens of a batch over all ranks, D d_model, F d_ff; C FLOP/s of a device, W bytes
a second that a device can send.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import uuid
import weakref
import zlib
from dataclasses import asdict, fields, is_dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import model as lm

STRATEGIES = ("naive", "flat", "overlap", "zero1", "fsdp", "torch_ddp", "torch_fsdp")
TAKEN_BY = {"bucket_mb": ("overlap", "zero1", "torch_ddp"), "reduce_dtype": ("fsdp", "torch_fsdp")}
MiB = 2**20
TOKENS, D_FF = 2**20, 10_240  # B and F of which comm --limits speaks
BUCKET_MB = 25.0
SECOND_BACKWARD = ("a gradient changed after its synchronisation began: run all but the last "
                   "backward pass of an update (torch.autograd.grad is one) under no_sync(), call "
                   "finish_gradient_synchronization() after the last, and checkpoint what is used "
                   "more than once with use_reentrant=False")
NOT_HERE = ("the weights of a block must be used in its own forward pass, called through FSDP's, "
            "got {} outside of it; do this inside the block, or call the wrapper")

# -------------------------------------------------------------------------------------------------
# collectives

# of this process: `issued` tells the watchdog how far a rank came; `waited_s`, what a CPU waited
COUNT = {"issued": 0, "waited_s": 0.0}
# names since torch 2.12 first: the older ones warn there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def averages():
    """Whether the back end divides by itself: NCCL does, in the same pass; gloo only adds."""
    return num_ranks() == 1 or dist.get_backend() == "nccl"


def mean_op():
    return dist.ReduceOp.AVG if averages() else dist.ReduceOp.SUM


def batches():
    """Whether the back end takes many tensors, or unequal ones, in one launch: NCCL does."""
    return num_ranks() > 1 and dist.get_backend() == "nccl"


def wait_for(works):
    """Waits for asynchronous collectives; on CUDA it is the current stream that waits."""
    started = time.perf_counter()
    for work in works:
        work.wait()
    COUNT["waited_s"] += time.perf_counter() - started


def mean_after(works, tensor):
    """The function that waits for `works`, which reduce `tensor` by mean_op(), and ends it."""
    def finish():
        wait_for(works)
        if not averages():
            tensor.div_(num_ranks())

    return finish


def start_mean(tensor):
    """Starts the all-reduce of `tensor` to its mean over the ranks; the function that it returns
    waits for it."""
    COUNT["issued"] += 1
    return mean_after([dist.all_reduce(tensor, mean_op(), async_op=True)], tensor)


def start_mean_to_owners(chunks):
    """Starts a reduce-scatter of unequal parts: rank r shall have the mean of chunks[r] (1-D).
    Returns (this rank's part, which is ready after finish; finish)."""
    COUNT["issued"] += 1
    mine = chunks[this_rank()]
    if batches() and all(map(len, chunks)):
        mine = torch.empty_like(mine)
        works = [dist.reduce_scatter(mine, chunks, mean_op(), async_op=True)]
    else:  # gloo takes equal parts only, nobody empty ones
        works = [dist.reduce(chunk, r, mean_op(), async_op=True) for r, chunk in enumerate(chunks)
                 if len(chunk)]
    return mine, mean_after(works, mine)


def broadcast_each(tensors, owners):
    """Gives every rank, in place, the values that rank owners[i] has in tensors[i]."""
    COUNT["issued"] += 1
    # an element that is expanded is one; gloo reads on from the first, NCCL refuses gaps
    whole = [t.detach()[tuple(slice(0, 1 if step == 0 else None) for step in t.stride())]
             for t in tensors]
    sent = [t.contiguous() for t in whole]
    wait_for([dist.broadcast(t, r, async_op=True) for t, r in zip(sent, owners, strict=True)])
    for t, values in zip(whole, sent, strict=True):
        if values is not t:
            t.copy_(values)


@torch.no_grad()
def send_from_owners(tensors, owners, at_once_bytes=256 * MiB):
    """Gives every rank the values that rank owners[i] has in tensors[i]: an all-gather of unequal
    parts."""
    if num_ranks() == 1:
        return
    if not batches():
        broadcast_each(tensors, owners)
        return
    order = sorted(range(len(tensors)), key=lambda i: str(tensors[i].dtype))  # stable
    for part in cut(order, at_once_bytes, tensors.__getitem__):
        of_rank = [[tensors[i] for i in part if owners[i] == r] for r in range(num_ranks())]
        if not all(of_rank):
            broadcast_each([tensors[i] for i in part], [owners[i] for i in part])
            continue
        COUNT["issued"] += 1
        chunks = [flatten(ts) if r == this_rank() else ts[0].new_empty(sum(t.numel() for t in ts))
                  for r, ts in enumerate(of_rank)]
        dist.all_gather(chunks, chunks[this_rank()].clone())
        for r, (ts, chunk) in enumerate(zip(of_rank, chunks, strict=True)):
            if r != this_rank():
                torch._foreach_copy_(ts, split_like(chunk, ts))


def over_ranks(number, device, op=dist.ReduceOp.SUM):
    """The sum of a number, or what else `op` says, over the ranks."""
    if num_ranks() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def start_each(collective, pairs, group=None, **options):
    """Starts collective(output, input) for each pair, an all-gather (whole (N * n, ...), part
    (n, ...)) or a reduce-scatter the other way round, as one launch where the back end can;
    returns the works to wait for."""
    COUNT["issued"] += 1
    if num_ranks() == 1:
        for output, input in pairs:
            output.copy_(input)
        return []
    if not batches():
        return [collective(*pair, group=group, async_op=True, **options) for pair in pairs]
    with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as works:
        for pair in pairs:
            collective(*pair, group=group, **options)
    return [works]


@torch.no_grad()
def broadcast_module(module):
    """Gives every rank the parameters and buffers that rank 0 has."""
    if num_ranks() > 1:
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
        broadcast_each(tensors, [0] * len(tensors))


@torch.no_grad()
def receive(tensor, device):
    """`tensor` on `device`, with the values that rank 0 has; elsewhere it may be on meta."""
    if tensor.is_meta and this_rank() == 0:
        raise ValueError("rank 0 must have the values of the weights, got a module on meta")
    tensor = (torch.empty_like(tensor, device=device) if tensor.is_meta
              else tensor.detach().to(device))
    if num_ranks() > 1:
        broadcast_each([tensor], [0])
    return tensor


def recomputing():
    """Whether a backward pass is running: a forward pass then is that of a checkpointed block."""
    return torch._C._current_graph_task_id() != -1


def call(function, *inputs, **named_inputs):
    return function(*inputs, **named_inputs)


def tensors_in(outputs, unit):
    """The tensors in what a unit's module returned. raises TypeError where some may be missed"""
    for leaf in torch.utils._pytree.tree_leaves(outputs):
        if torch.is_tensor(leaf):
            yield leaf
        elif is_dataclass(leaf):
            yield from tensors_in([getattr(leaf, field.name) for field in fields(leaf)], unit)
        elif unit.module is not None and not isinstance(leaf, (int, float, str, type(None))):
            raise TypeError("a block under FSDP must return tensors, or containers or dataclasses "
                            f"of them, got {type(leaf).__name__} from a "
                            f"{type(unit.module).__name__}")


def flatten(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def cut(items, nbytes, tensor_of):
    """Lists of items, in order, whose tensors share a dtype and have together at least nbytes, if
    as many follow of that dtype."""
    parts, size, dtype = [], 0, None
    for item in items:
        tensor = tensor_of(item)
        if size >= nbytes or tensor.dtype != dtype:
            parts.append([])
            size, dtype = 0, tensor.dtype
        parts[-1].append(item)
        size += tensor.nbytes
    return parts


def split_like(flat, tensors):
    """Views of 1-D `flat` in the shapes of `tensors`."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def dense_gradient(p):
    """The gradient of a parameter: zeros where it has none, the whole of a sparse one."""
    return torch.zeros_like(p) if p.grad is None else (
        p.grad.to_dense() if p.grad.is_sparse else p.grad)


def means_by_dtype(params):
    """Gives the gradients their means over the ranks, by one all-reduce for all of a dtype."""
    for dtype in dict.fromkeys(p.dtype for p in params):
        alike = [p for p in params if p.dtype == dtype]
        grads = [dense_gradient(p) for p in alike]
        flat = flatten(grads)
        start_mean(flat)()
        for p, view in zip(alike, split_like(flat, grads), strict=True):
            p.grad = None if p.grad is None else view


def gather_rows(part, rows):
    """The whole tensor (rows, ...) on every rank, of which each rank holds `part`: rows r*n to
    (r+1)*n of it, n = rows / N rounded up; the last ranks may hold fewer or none."""
    n = -(-rows // num_ranks())
    whole = part.new_empty(n * num_ranks(), *part.shape[1:])
    wait_for(start_each(_all_gather, [(whole, pad_rows(part.detach(), n))]))
    return whole[:rows]


def pad_rows(tensor, n):
    """tensor (up to n, ...) with rows of zeros up to n; itself where it has them and is whole."""
    if len(tensor) == n:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(n - len(tensor), *tensor.shape[1:])])


def my_rows(tensor, rows):
    """This rank's rows of a whole tensor: see `gather_rows`."""
    n = -(-rows // num_ranks())
    return tensor[this_rank() * n : (this_rank() + 1) * n]


def first_names(module):
    """{name: name}: to each of a module's parameters the first of those that it is tied under."""
    first = {}
    return {name: first.setdefault(id(p), name)
            for name, p in module.named_parameters(remove_duplicate=False)}


def weakly(method, *first):
    """A hook that does not keep the method's object alive: Python's collector does not see cycles
    through the hooks of a tensor."""
    method = weakref.WeakMethod(method)
    return lambda tensor: method()(*first, tensor) if method() else None


class SameGradients:
    """Finds ranks that have a gradient which others lack, after each synchronisation; on a GPU one
    step late, so that the host need not wait for it."""

    def __init__(self, names):
        self.names, self.sent, self.mine, self.table, self.done = names, None, None, None, None

    def compare(self, present, device, order=0):
        """present: for each name, whether this rank had its gradient; order: a number that stands
        for the order of what else must be the same. raises ValueError"""
        self.report()
        if not present:
            return
        if [*present, order] != self.sent:
            self.sent = [*present, order]
            mine = torch.tensor(self.sent, dtype=torch.int32, device="cpu")
            self.mine = (mine.pin_memory() if device.type == "cuda" else mine).to(
                device, non_blocking=True)
        table = self.mine.new_empty(num_ranks() * len(self.sent))
        _all_gather(table, self.mine)
        self.table = table.to("cpu", non_blocking=device.type == "cuda")
        if device.type == "cuda":
            self.done = torch.cuda.Event()
            self.done.record()
        else:
            self.report()

    def report(self):
        if self.table is None:
            return
        if self.done is not None:
            self.done.synchronize()
        table, self.table = self.table.view(num_ranks(), -1), None
        for i in (table != table[0]).any(0).nonzero().flatten().tolist():
            if i == len(self.names):
                other = (table[:, i] != table[0, i]).nonzero().flatten().tolist()
                raise ValueError(f"every rank must use its blocks in the same order, got another "
                                 f"on ranks {other} than on rank 0")
            have = [r for r in range(num_ranks()) if table[r, i]]
            lack = [r for r in range(num_ranks()) if not table[r, i]]
            raise ValueError(f"every rank must use the same parameters, got a gradient of "
                             f"{self.names[i]} on ranks {have} and none on {lack}; use it on all "
                             "or on none of them")


# -------------------------------------------------------------------------------------------------
# data parallel: every rank has the whole model


class Wrapper(nn.Module):
    """What all wrappers share. A rank runs forward and backward on its part of the batch;
    `finish_gradient_synchronization()` then makes every gradient the mean over the ranks; it raises
    ValueError when they used different parameters. A parameter that no rank used keeps no gradient.
    `with no_sync():` accumulates without communication of gradients."""

    rows = {}  # of sharded parameters: {name: rows of the whole tensor}
    owner = None  # {parameter: the one rank that has its gradient}
    same = None

    def __init__(self, module):
        super().__init__()
        inner = [type(m).__name__ for m in module.modules() if isinstance(m, Wrapper)]
        if inner:
            raise ValueError("a module must have one wrapper, around all of it, got "
                             f"{type(self).__name__} around {inner[0]}; wrap the module itself")
        self.module, self.syncing, self.backward_began, self.frozen = module, True, False, {}

    def forward(self, *inputs, **named_inputs):
        self.reset_if_unfinished()
        return self.module(*inputs, **named_inputs)

    @contextlib.contextmanager
    def no_sync(self):
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    def local_parameters(self):
        """{name: parameter} that this rank's optimizer sees."""
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm):
        """Scales the gradients in place so that the norm of the whole gradient, shards of all ranks
        together, is at most max_norm; returns the norm before, a scalar tensor."""
        params = self.local_parameters()
        if num_ranks() == 1 or not (self.rows or self.owner):
            return lm.clip_grad_norm_(params.values(), max_norm)
        parts, whole = [], []  # whole gradients are the same on all ranks and count once
        for name, p in params.items():
            if p.grad is not None:
                (parts if self.owner or name in self.rows else whole).append(p.grad)
        device = next(iter(params.values())).device
        parts, whole = (lm.grad_norm(grads).to(device) for grads in (parts, whole))
        square = parts.double().square()  # on all ranks, and a square that float16 cannot hold
        dist.all_reduce(square)
        norm = (square + whole.double().square()).sqrt()
        norm = norm.to(torch.promote_types(parts.dtype, whole.dtype))
        return lm.clip_grad_norm_(params.values(), max_norm, norm)

    def check_same(self):
        """raises ValueError when ranks used different parameters in the last step: on a GPU a
        synchronisation tells it of the one before only."""
        if self.same is not None:
            self.same.report()

    def watch_frozen(self):
        self.frozen = {n: p for n, p in self.local_parameters().items() if not p.requires_grad}

    def refuse_unfrozen(self):
        names = [name for name, p in self.frozen.items() if p.requires_grad]
        if names:
            raise ValueError("parameters must be frozen or not before the model is wrapped, got "
                             f"{', '.join(names)} trained since; set requires_grad, then wrap")

    def begin_backward(self):
        """Called by hooks in a backward pass; autograd calls `end_backward` if it comes to it."""
        if not self.backward_began:
            self.backward_began = True
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def end_backward(self):
        self.backward_began = False

    def reset_if_unfinished(self):
        if self.backward_began and not recomputing():  # an exception ended it
            self.reset()

    def reset(self):
        """Forgets the update under way and its gradients, after an exception in its backward pass
        (on all ranks); the next forward pass calls it."""
        self.backward_began = False
        for p in self.local_parameters().values():
            p.grad = None


class Replicated(Wrapper):
    """Every rank has all weights, and rank 0's at the start."""

    def __init__(self, module):
        super().__init__(module)
        broadcast_module(module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in named]
        self.same = SameGradients([name for name, _ in named])
        self.watch_frozen()

    def finish_gradient_synchronization(self):
        self.refuse_unfrozen()
        if num_ranks() > 1 and self.trained:
            present = self.synchronise()
            self.same.compare(present, self.trained[0].device)


class NaiveDDP(Replicated):
    """An all-reduce for each gradient, one after the other, after the backward pass: as many
    latencies as parameters, and the links idle during the backward pass. source: [1]"""

    def synchronise(self):
        for p in self.trained:
            start_mean(torch.zeros_like(p) if p.grad is None else p.grad)()
        return [p.grad is not None for p in self.trained]


class FlatDDP(Replicated):
    """One all-reduce of all gradients (of a dtype) after the backward pass: a single latency, for
    one copy of the gradients. source: [1]"""

    def synchronise(self):
        means_by_dtype(self.trained)
        return [p.grad is not None for p in self.trained]


class DDP(Replicated):
    """All-reduces of buckets of gradients, each started when the backward pass has made its last
    one, so that communication hides behind the rest of it. source: [2]

    Buckets are filled in reverse order of the parameters, about that of the backward pass, and
    start in the same order on all ranks: one that is complete waits for those before it.
    owner: {parameter: rank}, of a ShardedOptimizer: the mean goes to that rank alone, the others
    keep no gradient (ZeRO, stages 1 and 2 [3]); those left from an update before must be dropped,
    or they are divided again. For that many bytes once, not twice, over the link;
    buckets then grow, up to 8 times, until every rank owns a part: all links are in use.
    """

    in_flight_bytes = 512 * MiB  # of gradients for other ranks, which are kept until they are sent

    def __init__(self, module, bucket_mb=BUCKET_MB, owner=None):
        super().__init__(module)
        self.owner = owner
        foreign = [name for name, p in module.named_parameters()
                   if owner is not None and p.requires_grad and p not in owner]
        if foreign:
            raise ValueError("owner must name a rank for every parameter that is trained, got none "
                             f"for {', '.join(foreign)}; give them to the optimizer or freeze them")
        self.buckets, size, kind, owners = [], 0, None, set()
        for i in reversed(range(len(self.trained))):
            p = self.trained[i]
            full = size >= bucket_mb * MiB and (owner is None or len(owners) == num_ranks()
                                                or size >= 8 * bucket_mb * MiB)
            if full or kind != (p.dtype, p.device):
                self.buckets.append([])
                size, kind, owners = 0, (p.dtype, p.device), set()
            self.buckets[-1].append(i)
            size += p.nbytes
            owners.add(owner and owner[p])
        self.bucket_of = {i: b for b, bucket in enumerate(self.buckets) for i in bucket}
        for i, p in enumerate(self.trained):
            p.register_post_accumulate_grad_hook(weakly(self.ready, i))
        self.clear()

    def reset(self):
        super().reset()
        for finish, _ in self.in_flight:
            finish()
        self.clear()

    def clear(self):
        self.waiting = [set(bucket) for bucket in self.buckets]
        self.started, self.present, self.in_flight = 0, [False] * len(self.trained), []

    def ready(self, i, _):
        """The hook: gradient i is complete on this rank."""
        self.begin_backward()
        if not self.syncing or num_ranks() == 1:
            return
        if i not in self.waiting[self.bucket_of[i]]:
            raise RuntimeError(SECOND_BACKWARD)
        self.waiting[self.bucket_of[i]].remove(i)
        while self.started < len(self.buckets) and not self.waiting[self.started]:
            self.start_next()

    def start_next(self):
        bucket = self.buckets[self.started]
        self.started += 1
        params = [self.trained[i] for i in bucket]
        grads = [dense_gradient(p) for p in params]
        for i, p in zip(bucket, params, strict=True):
            self.present[i] = p.grad is not None
        if self.owner is None:
            flat = flatten(grads)
            finish, nbytes = start_mean(flat), 0
        else:
            chunks = []
            for r in range(num_ranks()):
                theirs = [g for g, p in zip(grads, params, strict=True) if self.owner[p] == r]
                chunks.append(flatten(theirs) if theirs else grads[0].new_empty(0))
            flat, finish = start_mean_to_owners(chunks)
            nbytes = sum(chunk.nbytes for chunk in chunks)
            for p in params:
                p.grad = None
            keep = [k for k, p in enumerate(params) if self.owner[p] == this_rank()]
            params, grads = [params[k] for k in keep], [grads[k] for k in keep]
            bucket = [bucket[k] for k in keep]
            while sum(n for _, n in self.in_flight) > self.in_flight_bytes:
                self.in_flight.pop(0)[0]()
        self.in_flight.append((finish, nbytes))
        for i, p, view in zip(bucket, params, split_like(flat, grads), strict=True):
            p.grad = view if self.present[i] else None

    def synchronise(self):
        while self.started < len(self.buckets):  # parameters that this backward pass did not reach
            self.start_next()
        for finish, _ in self.in_flight:
            finish()
        present = self.present
        self.clear()
        return present


class ShardedOptimizer(torch.optim.Optimizer):
    """Any optimizer, its state spread over the ranks: each parameter belongs to one rank, which
    alone updates it and sends the result to the others. source: [1], [3] stage 1

    Parameters go, largest first, to the rank that has the fewest elements; `owner` tells whose a
    parameter is. Whole parameters, so that optimizers which look at a matrix as one work too: a
    matrix larger than 1/N of the model makes its owner's part larger than 1/N.
    Gradients: the same on all ranks, or (DDP with owner=) those of the own parameters only. What an
    optimizer computes from all of its parameters (Prodigy's d) is of a rank's own ones here.
    """

    def __init__(self, params, optimizer_cls, **kwargs):
        self.optimizer_cls, self.kwargs, self.inner = optimizer_cls, kwargs, None
        self.owner, self.elements = {}, [0] * num_ranks()
        super().__init__(params, dict(kwargs))
        self.state, self.defaults = self.inner.state, self.inner.defaults

    def __getstate__(self):  # of a copy
        own = ("optimizer_cls", "kwargs", "inner", "owner", "elements")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if any(hasattr(p, "is_shard") for p in group["params"]):
            raise ValueError("params must be whole on every rank, got those of FSDP, whose "
                             "optimizer state is sharded already; give them to optimizer_cls")
        for p in sorted(group["params"], key=lambda p: -p.numel()):
            self.owner[p] = self.elements.index(min(self.elements))
            self.elements[self.owner[p]] += p.numel()
        mine = [p for p in group["params"] if self.owner[p] == this_rank()]
        if self.inner is None:
            self.inner = self.optimizer_cls([{**group, "params": mine}], **self.kwargs)
        else:
            self.inner.add_param_group({**group, "params": mine})
        for name, value in self.inner.param_groups[-1].items():  # the class's own defaults
            group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure=None):
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: v for name, v in group.items() if name != "params"})  # schedules
        loss = self.inner.step(closure) if closure is not None else self.inner.step()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: v for name, v in inner.items() if name != "params"})  # its counters
        params = [p for group in self.param_groups for p in group["params"]]
        send_from_owners(params, [self.owner[p] for p in params])
        return loss

    def state_dict(self):
        """This rank's part, which says so where there are others."""
        part = {"part": [this_rank(), num_ranks()]} if num_ranks() > 1 else {}
        return {**super().state_dict(), **part}

    def load_state_dict(self, state_dict):
        """Takes the whole state, of which it keeps this rank's part, or that part. raises
        ValueError for another's"""
        params = [p for group in self.param_groups for p in group["params"]]
        mine = {i: s for i, s in state_dict["state"].items()
                if self.owner[params[i]] == this_rank()}
        part, own = state_dict.get("part"), [this_rank(), num_ranks()]
        if part is not None and (part != own or len(mine) < len(state_dict["state"])):
            raise ValueError("state_dict must be the whole optimizer's, or the part that this rank "
                             f"{own[0]} of {own[1]} keeps, got that of rank {part[0]} of "
                             f"{part[1]}; save and load one for each rank")
        super().load_state_dict({**state_dict, "state": mine})
        self.inner.state = self.state


# -------------------------------------------------------------------------------------------------
# fully sharded: every rank has rows of each weight


class NotHere(torch.Tensor):
    """Stands in a module for a weight that is not gathered: tells its shape, dtype and device, and
    refuses to be computed with."""

    tells = {"shape", "size", "ndim", "dim", "numel", "dtype", "device", "layout", "requires_grad",
             "is_cuda", "is_cpu", "is_meta", "is_leaf", "grad", "is_floating_point", "is_complex"}

    @classmethod
    def __torch_function__(cls, function, types, args=(), named=None):
        is_property = function.__name__ == "__get__"
        if (function.__self__ if is_property else function).__name__ in cls.tells:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(named or {}))
        names = [t.parameter_name for t in torch.utils._pytree.tree_leaves((args, named))
                 if isinstance(t, cls)]
        raise RuntimeError(NOT_HERE.format(" and ".join(names)))


class ShardedParameter:
    """A parameter of FSDP: `shard`, this rank's rows, which the optimizer sees, and `full`, whose
    memory exists only between `allocate` and `free`."""

    def __init__(self, name, whole, trained, places, dtype):
        self.name, self.places, self.shape = name, places, whole.shape
        self.n = -(-len(whole) // num_ranks())
        self.shard = nn.Parameter(my_rows(whole, len(whole)).clone(), trained)
        self.shard.is_shard = True
        with torch.no_grad():
            self.buffer = whole.new_empty(self.n * num_ranks(), *whole.shape[1:], dtype=dtype)
            # .data: the gathers that fill the buffer are no change that autograd should object to
            self.full = nn.Parameter(self.buffer[: len(whole)].data, trained)
            self.absent = torch.Tensor._make_subclass(NotHere, self.full.data, trained)
        self.absent.parameter_name, self.absent._is_param = name, True
        self.nbytes, self.accumulated = self.buffer.nbytes, None
        self.free()

    def show(self, param):
        """Puts the shard, the full weight or what says that it is absent where the module looks."""
        for module, attribute in self.places:
            module._parameters[attribute] = param

    def allocate(self):
        self.buffer.untyped_storage().resize_(self.nbytes)

    def free(self):
        # what autograd saved shares this storage, which is filled again before it is used
        self.buffer.untyped_storage().resize_(0)
        self.set_version(1)

    def set_version(self, version):
        """0: as autograd saved it. 1: autograd refuses to read what has been freed, or is still
        coming, in a backward pass that no output of the unit has announced."""
        torch._C._autograd._unsafe_set_version_counter((self.full,), (version,))

    def take_gradient(self, dtype):
        """The whole gradient in `dtype`, with those of passes under no_sync; None without any."""
        grad, self.full.grad = self.full.grad, None
        grad = grad.to_dense() if grad is not None and grad.is_sparse else grad
        if self.accumulated is not None:
            grad = self.accumulated if grad is None else self.accumulated.add_(grad)
            self.accumulated = None
        return None if grad is None else grad.to(dtype)


class Call:
    """A forward pass of a unit."""


class Unit:
    """Parameters that FSDP gathers and frees together: those of one block, or of the root.

    Its weights:    away --start--> coming --gather--> here --free--> away
    Its gradients:  waiting (for some of this backward pass) --reduce--> present --reset--> waiting
    """

    def __init__(self, fsdp, index, module, params):
        self.fsdp, self.index, self.module, self.params = fsdp, index, module, params
        self.trained = [s for s in params if s.full.requires_grad]
        self.state, self.works, self.sent = "away", [], None
        self.called_at = 0  # autograd's count of operations when its forward pass began
        # forward passes whose backward pass has not begun and may come: autograd's graph holds a
        # Call while it can reach it; nothing holds one without a graph, of a reentrant checkpoint
        self.calls, self.without_graph = weakref.WeakSet(), []
        self.in_backward = False  # since a gradient of its output is there
        for i, s in enumerate(self.trained):
            s.full.register_post_accumulate_grad_hook(weakly(self.ready, i))
        self.reset()
        self.show()

    def reset(self):
        self.waiting, self.present = set(self.trained), None
        self.calls.clear()
        self.without_graph.clear()

    def complete(self):
        """Whether no gradient of the pass under way can come any more: all are there, or those that
        are missing belong to parameters that this rank did not use."""
        called = self.calls or self.without_graph
        unused = self.index > 0 and not called and not self.in_backward
        return not self.waiting or unused

    def show(self):
        """What the module sees: between passes the shards, else the weights if they are here."""
        for s in self.params:
            s.show(s.full if self.state == "here" else s.absent if self.fsdp.in_pass else s.shard)

    def start(self):
        """away -> coming"""
        if self.state != "away":
            return
        self.state = "coming"
        if not self.params:  # a root without weights
            return
        for s in self.params:  # on the stream that computes: there its memory is used and freed
            s.allocate()
        with self.fsdp.on_stream("gather"):
            self.sent = [(s.buffer, my_rows(s.buffer, len(s.buffer))) for s in self.params]
            torch._foreach_copy_([part[: len(s.shard)] for s, (_, part) in
                                  zip(self.params, self.sent, strict=True)],
                                 [s.shard.detach() for s in self.params])
            self.works = start_each(_all_gather, self.sent)  # in place

    def gather(self):
        """away, coming -> here, for what is computed from now on."""
        self.start()
        if self.state == "coming":
            wait_for(self.works)
            if num_ranks() == 1:  # a copy, which no collective's end stands for
                self.fsdp.join("gather")
            self.state, self.works, self.sent = "here", [], None
            for s in self.params:
                s.set_version(0)
            self.show()

    def free(self):
        """any -> away"""
        self.in_backward = False
        if self.state != "away":
            self.gather()  # one that was started and not used must end before its memory goes
            self.state = "away"
            for s in self.params:
                s.free()
        self.show()

    def ready(self, i, _):
        """The hook: the gradient of trained[i] is complete in this backward pass."""
        self.fsdp.begin_backward()
        if self.present is not None or not self.waiting:
            raise RuntimeError(SECOND_BACKWARD)
        self.waiting.discard(self.trained[i])
        if not self.waiting:
            self.fsdp.unit_done(self)


class FSDP(Wrapper):
    """Fully sharded data parallel: each rank keeps 1/N of the rows of every sharded parameter, of
    its gradient and of its optimizer state. source: [1], [3] stage 3, [4]

    Sharded are the parameters of every Linear and Embedding, ours and torch.nn's, and of modules of
    the classes `shard_types`; others (norms) are replicated. The unit of communication is an item
    of a ModuleList, ModuleDict or Sequential; what lies outside of those is one more unit, the
    root, gathered from the start of the forward pass to the end of the backward pass.
    A unit's weights are sent in compute_dtype, `prefetch` units ahead of their use, freed after it,
    gathered again in the backward pass; its gradients are reduced in reduce_dtype as soon as they
    are complete. The shards stay in the dtype the module had.
    Every pass gathers every unit, in the module's order (backward: reversed) whichever of them a
    rank uses, so that ranks which take different paths do not mix up weights. Some things all ranks
    must do alike: a unit needed once more or out of order is gathered again; checkpoints that span
    several units gather them before they reduce those above.
    A tensor that depends on a unit's weights must leave it as an output: nothing announces the
    backward pass of a loss that a block keeps on itself, in which autograd then refuses weights
    that it finds "modified by an inplace operation". zero_grad() of this wrapper drops what passes
    under no_sync accumulated; that of the optimizer, which cannot see it, does not. torch.compile
    compiles blocks, as in Engine; of a wrapper it compiles nothing.

    device: where to train, by default where the module is. A module on the CPU is moved there
    parameter by parameter, so that no device ever holds all of it; ranks other than 0, whose values
    do not matter, may make theirs under torch.device("meta") (.to("meta") unties tied weights).
    parameters() are the shards and the replicated parameters, for an optimizer made after wrapping;
    so is state_dict(), which is this rank's: see gather_full_params. copy.deepcopy cannot copy what
    the hooks refer to: copy the module before wrapping it.
    """

    reduce_bytes = 96 * MiB  # of gathered weights whose gradients are reduced in one launch

    def __init__(self, module, compute_dtype=None, shard_types=None, reduce_dtype=torch.float32,
                 prefetch=2, device=None):
        super().__init__(module)
        self.reduce_dtype, self.prefetch, self.compute_dtype = reduce_dtype, prefetch, compute_dtype
        self.uncompiled = torch.compiler.disable(call)
        self.grad_enabled = False  # in the last forward pass
        self.in_pass = False  # from the start of a forward pass to the end of its backward pass
        self.device = torch.device(device or next((p.device for p in module.parameters()), "cpu"))
        if self.device.type == "meta":
            raise ValueError("FSDP must know where to train, got a module on meta; pass device=")
        self.streams = {k: torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
                        for k in ("gather", "reduce")}
        # of its own, so that a reduction which comes early on one rank cannot meet another's gather
        self.reduce_group = dist.new_group() if num_ranks() > 1 else None
        self.first_name = first_names(module)
        self.units = self.make_units((lm.Linear, lm.Embedding, nn.Linear, nn.Embedding,
                                      *(shard_types or ())))
        self.sharded = [s for unit in self.units for s in unit.params]
        self.rows = {s.name: s.shape[0] for s in self.sharded}
        self.local = dict(module.named_parameters())
        self.replicated = {n: p for n, p in self.local.items() if n not in self.rows}
        self.watch_frozen()
        self.same = SameGradients([name for name, p in self.local.items() if p.requires_grad])
        self.reductions, self.reduced, self.again = [], None, 0
        self.next_up, self.next_down, self.at = len(self.units), 0, 0
        for m in (module, *(unit.module for unit in self.units[1:])):
            if m._compiled_call_impl is not None:
                raise ValueError("blocks must be compiled without the hooks that gather weights, "
                                 f"got {type(m).__name__}.compile(); assign torch.compile("
                                 "block.forward) to block.forward")
        for i, unit in enumerate(self.units[1:], 1):
            unit.module.register_forward_pre_hook(functools.partial(self.before_forward, i),
                                                  prepend=True)  # before what uses the weights
            unit.module.register_forward_hook(functools.partial(self.after_forward, i))

    def make_units(self, types):
        """The root unit, then one for each outermost item of a container, in the module's order."""
        lists = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # not called
        item_of = {}  # submodule: its item; None where two share it

        def find_items(module, inside_of=None):
            for child in module.children():
                is_item = (isinstance(module, (*lists, nn.Sequential)) and inside_of is None
                           and not isinstance(child, lists))
                item = child if is_item else inside_of
                item_of[child] = item if item_of.get(child, item) is item else None
                find_items(child, item)

        find_items(self.module)
        places, self.units_of, plan = {}, {}, []
        for m in self.module.modules():
            for attribute, p in m._parameters.items():
                places.setdefault(id(p), []).append((m, attribute))
        for name, p in self.module.named_parameters():
            where = places[id(p)]
            home = {item_of.get(m) for m, _ in where}  # tied across units: of the root
            sharded = p.dim() > 0 and any(isinstance(m, types) for m, _ in where)
            plan.append((name, where, home.pop() if len(home) == 1 else None, sharded))
            del p  # names, not parameters: each whole weight goes when it has been cut
        homes = {home for _, _, home, sharded in plan if sharded}
        items = [None, *(m for m in self.module.modules() if m in homes)]
        params, first_trained = {item: [] for item in items}, None
        for name, where, home, sharded in plan:
            module, attribute = where[0]
            trained = module._parameters[attribute].requires_grad
            if sharded and module._parameters[attribute]._backward_hooks:
                raise ValueError(f"sharded parameters must have no hooks, got one on {name}, which "
                                 "would never run; hook what the module returns")
            whole = receive(module._parameters[attribute], self.device)
            if trained and first_trained is None:
                first_trained = items.index(home) if home in params else 0
            if sharded:
                dtype = self.compute_dtype if whole.is_floating_point() else None
                s = ShardedParameter(name, whole, trained, where, dtype or whole.dtype)
                s.shard.__dict__.update(vars(module._parameters[attribute]))  # marks of its user
                params[home].append(s)
                s.show(s.shard)
            elif whole.device != module._parameters[attribute].device:
                for m, a in where:
                    m._parameters[a] = nn.Parameter(whole, trained)
        for m in self.module.modules():
            for name, buffer in m._buffers.items():
                m._buffers[name] = None if buffer is None else receive(buffer, self.device)
        units = [Unit(self, i, item, params[item]) for i, item in enumerate(items)]
        for unit in units:
            for m, _ in (place for s in unit.params for place in s.places):
                if m not in self.units_of:
                    m.register_forward_pre_hook(self.before_use, with_kwargs=True)
                self.units_of.setdefault(m, set()).add(unit)
        # no gradient flows further: frozen blocks before all that is trained
        self.lowest = max(1, len(units) if first_trained is None else first_trained)
        return units

    def before_use(self, module, inputs, named):
        """Of a module with sharded weights: refuses to compute with shards, casts inputs."""
        if not torch.compiler.is_compiling():  # blocks alone are compiled, whose weights are here
            for unit in self.units_of[module]:
                if unit.state != "here":
                    raise RuntimeError(NOT_HERE.format(unit.params[0].name))
        if self.compute_dtype is not None:
            return (tuple(self.cast(x) for x in inputs),
                    {name: self.cast(x) for name, x in named.items()})

    def cast(self, x):
        return x.to(self.compute_dtype) if torch.is_tensor(x) and x.is_floating_point() else x

    def on_stream(self, name):
        """Runs on a stream of that name, behind all that the current one was given so far."""
        stream = self.streams[name]
        if stream is None:
            return contextlib.nullcontext()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def join(self, name):
        """The current stream waits for the one of that name."""
        if self.streams[name] is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.streams[name])

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """The shards and the replicated parameters, also while whole weights are in the module."""
        prefix = prefix and prefix + "."
        return ((f"{prefix}module.{name}", p) for name, p in self.local_parameters().items())

    def local_parameters(self):
        return self.local

    def free_all(self, in_pass, but=()):
        """Frees the units that are not in `but`."""
        self.in_pass = in_pass
        for unit in self.units:
            if unit not in but:
                unit.free()

    def reset(self):
        super().reset()
        for *_, works in self.reductions:
            wait_for(works)
        self.join("reduce")
        self.drop_accumulated()
        self.clear()

    def drop_accumulated(self):
        for s in self.sharded:
            s.full.grad = s.accumulated = None

    def zero_grad(self, set_to_none=True):
        """Drops what passes under no_sync have accumulated, too; an optimizer's zero_grad, which
        sees the shards alone, does not."""
        super().zero_grad(set_to_none)
        self.drop_accumulated()

    @contextlib.contextmanager
    def showing_shards(self):
        for s in self.sharded:
            s.show(s.shard)
        try:
            yield
        finally:
            for unit in self.units:
                unit.show()

    def state_dict(self, *args, **named):
        with self.showing_shards():
            return super().state_dict(*args, **named)

    def load_state_dict(self, *args, **named):
        with self.showing_shards():
            return super().load_state_dict(*args, **named)

    def clear(self):
        """No pass is under way and no gradient is waited for."""
        self.reductions, self.reduced, self.again, self.backward_began = [], None, 0, False
        self.free_all(in_pass=False)
        for unit in self.units:
            unit.reset()

    # --- forward

    def forward(self, *inputs, **named_inputs):
        return self.uncompiled(self.gathering_forward, *inputs, **named_inputs)

    def gathering_forward(self, *inputs, **named_inputs):
        if recomputing():
            self.begin_backward()
            return self.module(*inputs, **named_inputs)
        self.grad_enabled = grad = torch.is_grad_enabled()
        self.reset_if_unfinished()
        self.free_all(in_pass=True)  # what a forward pass without a backward pass has left
        self.next_up = 0
        self.start_up_to(self.prefetch)
        self.units[0].gather()
        outputs = self.module(*inputs, **named_inputs)
        self.start_up_to(len(self.units))  # what this rank did not use: others may have
        # the last is needed first in the backward pass
        self.free_all(in_pass=grad, but=(self.units[0], self.units[-1]) if grad else ())
        if grad:
            self.watch_gradients(self.units[0], Call(), outputs)
        return outputs

    def start_up_to(self, i):
        for unit in self.units[self.next_up : i + 1]:
            unit.start()
        self.next_up = max(self.next_up, i + 1)

    def start_down_to(self, i):
        while self.next_down >= max(1, i):
            self.units[self.next_down].start()
            self.next_down -= 1

    def need(self, unit):
        """Gathers a unit that neither pass has started: used again, or out of order."""
        if unit.state == "away":  # the order of these is compared at the end
            self.again = (self.again * 31 + unit.index) % 2**31
        unit.gather()

    def before_forward(self, i, *_):
        unit = self.units[i]
        if recomputing():  # a checkpointed block
            self.begin_backward()
            expected = unit.calls or unit.in_backward
            if unit.without_graph and torch.is_grad_enabled():  # a reentrant one's
                expected = unit.without_graph.pop()
                self.end_others(unit)
            if expected:
                self.go_down_to(i)
            else:  # of the whole model, whose forward pass called no unit with a graph
                self.start_down_to(i - self.prefetch)
        else:
            self.start_up_to(i + self.prefetch)
            for skipped in self.units[1:i]:
                if skipped.state == "coming":
                    skipped.free()
        self.need(unit)
        unit.called_at = torch.autograd._get_sequence_nr()

    def after_forward(self, i, _, inputs, outputs):
        unit, grad, call = self.units[i], torch.is_grad_enabled(), Call()
        if grad:
            self.watch_gradients(unit, call, outputs)
        if self.grad_enabled and not recomputing():
            unit.calls.add(call)
            if not grad:
                unit.without_graph.append(call)
        if not recomputing() and not (grad and i == len(self.units) - 1):
            unit.free()

    def watch_gradients(self, unit, call, outputs):
        """Has `before_backward` called before the first operation of the unit's backward pass: the
        one that made an output. Not one from before the unit, which it only passes on."""
        for tensor in tensors_in(outputs, unit):
            if tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= unit.called_at:
                tensor.register_hook(functools.partial(self.before_backward, unit, call))

    # --- backward: autograd runs the operations of the forward pass in reverse order

    def begin_backward(self):
        if not self.backward_began:
            super().begin_backward()
            self.in_pass, self.next_down, self.at = True, len(self.units) - 1, len(self.units) - 1
            for unit in self.units:
                if unit.present is None:
                    unit.waiting = set(unit.trained)
                unit.show()
            self.units[0].gather()

    def before_backward(self, unit, call, _):
        """A gradient of an output of the unit is there: its backward pass begins, those of the
        units called after it are over."""
        self.begin_backward()
        unit.calls.discard(call)
        if unit is not self.units[0]:
            self.end_others(unit)
            self.go_down_to(unit.index)
            self.need(unit)
            unit.in_backward = True
        else:
            self.start_down_to(len(self.units) - self.prefetch)

    def end_others(self, unit):
        for other in self.units[1:]:
            if other.in_backward and other is not unit:
                other.free()

    def go_down_to(self, index):
        """Reduces the units above and gathers those that are needed next; the units between, which
        this rank did not use, in turn as if it had: on a GPU a gather waits for the reductions
        before it, which all ranks must therefore start in the same order."""
        for i in (*range(self.at, index, -1), index):
            self.reduce_complete(i)
            self.start_down_to(i - self.prefetch)
        self.at = min(self.at, index)

    def end_backward(self):
        super().end_backward()
        self.go_down_to(self.lowest)
        self.free_all(in_pass=False)
        self.reduce_complete()

    def unit_done(self, unit):
        """All gradients of the unit are complete: accumulated here, or reduced when its backward
        pass is over and its weights are freed."""
        if not self.syncing:
            unit.waiting = set(unit.trained)
            for s in unit.trained:
                s.accumulated = s.take_gradient(self.reduce_dtype)

    def reduce_complete(self, above=-1):
        """Reduces, when syncing, the units above one whose gradients are all there."""
        for unit in reversed(self.units[above + 1 :]):  # the same order on all ranks, the root last
            if unit.present is None and unit.trained:
                if not (self.syncing and unit.complete()):
                    return
                self.reduce(unit)

    def reduce(self, unit):
        """Starts the reduce-scatter of the unit's gradients into the gradients of its shards, some
        at a time: copies in reduce_dtype exist of those alone."""
        grads = {s: (s.full.grad, s.accumulated) for s in unit.trained}
        unit.present = {s: any(g is not None for g in gs) for s, gs in grads.items()}
        if self.reduced is not None:  # the gradients of the unit before may be freed now
            torch.cuda.current_stream(self.device).wait_event(self.reduced[1])
            self.reduced = None
        with self.on_stream("reduce"):
            for some in cut(unit.trained, self.reduce_bytes, lambda s: s.buffer):
                self.start_reduction(unit, some)
                if self.device.type == "cuda":
                    self.end_reductions()  # the stream "reduce" waits, not the host
            if self.device.type == "cuda":
                self.reduced = grads, torch.cuda.Event()
                self.reduced[1].record()

    def start_reduction(self, unit, some):
        pairs = []
        for s in some:
            grad = s.take_gradient(self.reduce_dtype)
            if grad is None:
                grad = s.shard.new_zeros(s.shape, dtype=self.reduce_dtype)
            whole = pad_rows(grad, len(s.buffer))
            pairs.append((whole if num_ranks() == 1 else torch.empty_like(whole[: s.n]), whole))
        works = start_each(_reduce_scatter, pairs, self.reduce_group, op=mean_op())
        self.reductions.append((unit, some, pairs, works))

    def end_reductions(self):
        for unit, some, pairs, works in self.reductions:
            wait_for(works)
            for s, (part, _) in zip(some, pairs, strict=True):
                if unit.present[s]:
                    part = part[: len(s.shard)].to(s.shard.dtype)
                    part = part if averages() else part / num_ranks()
                    s.shard.grad = part if s.shard.grad is None else s.shard.grad + part
        self.reductions = []

    def finish_gradient_synchronization(self):
        self.refuse_unfrozen()
        for unit in reversed(self.units):
            if unit.present is None and unit.trained:
                self.reduce(unit)
        self.end_reductions()
        self.join("reduce")
        present = {s.name: there for unit in self.units
                   for s, there in (unit.present or {}).items()}
        present.update({name: p.grad is not None for name, p in self.replicated.items()})
        again = self.again
        self.clear()
        if num_ranks() > 1:
            means_by_dtype([p for p in self.replicated.values() if p.requires_grad])
            self.same.compare([present[name] for name in self.same.names], self.device, again)

    @torch.no_grad()
    def gather_full_params(self):
        """{name: whole tensor in the shards' dtype}, on every rank; tied names share one tensor."""
        full = {}
        for name, p in self.local_parameters().items():
            full[name] = (gather_rows(p, self.rows[name]) if name in self.rows
                          else p.detach().clone())
        return {name: full[first] for name, first in self.first_name.items()}


# -------------------------------------------------------------------------------------------------
# PyTorch's own engines, behind the same interface


class TorchDDP(Wrapper):
    """torch.nn.parallel.DistributedDataParallel."""

    def __init__(self, module, bucket_mb=BUCKET_MB):
        super().__init__(module)
        self.engine = nn.parallel.DistributedDataParallel(
            module, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
        self.no_sync = self.engine.no_sync

    def forward(self, *inputs, **named_inputs):
        return self.engine(*inputs, **named_inputs)

    def finish_gradient_synchronization(self):
        pass  # its backward pass ends with it


class TorchFSDP(Wrapper):
    """torch.distributed.fsdp.fully_shard of each block, then of the rest. The optimizer sees plain
    tensors that share the memory of its DTensors, as it does under FSDP."""

    def __init__(self, module, compute_dtype=None, reduce_dtype=torch.float32):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        super().__init__(module)
        broadcast_module(module)
        self.rows = {name: len(p) for name, p in module.named_parameters()}
        device = next(module.parameters()).device.type
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
        options = dict(mesh=init_device_mesh(device, (num_ranks(),)), mp_policy=policy)
        for container in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
            for item in container:
                fully_shard(item, **options)
        self.module = fully_shard(module, **options)
        self.plain = {name: nn.Parameter(p.to_local().detach(), p.requires_grad)
                      for name, p in module.named_parameters()}

    @contextlib.contextmanager
    def no_sync(self):
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def local_parameters(self):
        return self.plain

    def finish_gradient_synchronization(self):
        for name, p in self.module.named_parameters():
            self.plain[name].grad, p.grad = None if p.grad is None else p.grad.to_local(), None


# -------------------------------------------------------------------------------------------------
# one strategy as a whole: wrapper, optimizer, norm, and the state that a checkpoint holds


class LanguageModelLoss(nn.Module):
    """The module that is wrapped: ids and targets (B, T) to the sum of the losses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model.loss(x, y, reduction="sum")


class Engine:
    """`strategy` around a TransformerLM: `loss_and_gradient` and `optimizer.step()` are a step.

    device: where to train. A model on the CPU is moved there, under fsdp without ever being whole
    on it. precision: keywords of AdamW, as lm.optimizer_precision gives them"""

    def __init__(self, strategy, model, dtype, weight_decay, lr, betas, compiled=False, *,
                 bucket_mb=BUCKET_MB, reduce_dtype=torch.float32, device=None, precision=None):
        self.device = torch.device(device or next(model.parameters()).device)
        if strategy != "fsdp":
            model.to(self.device)
        self.first_name = first_names(model)
        if compiled:  # block by block: a whole model's gradients would all be ready at the end
            for block in model.layers:
                block.forward = torch.compile(block.forward)
        module = LanguageModelLoss(model)
        sent_in = dtype if dtype != torch.float32 else None
        make_adamw = functools.partial(lm.AdamW, **precision or {})
        if strategy == "zero1":
            self.optimizer = ShardedOptimizer(lm.optimizer_groups(model, weight_decay), make_adamw,
                                              lr=lr, betas=betas)
            self.wrapper = DDP(module, bucket_mb, self.optimizer.owner)
        else:
            self.wrapper = {
                "naive": lambda: NaiveDDP(module), "flat": lambda: FlatDDP(module),
                "overlap": lambda: DDP(module, bucket_mb),
                "fsdp": lambda: FSDP(module, sent_in, reduce_dtype=reduce_dtype,
                                     device=self.device),
                "torch_ddp": lambda: TorchDDP(module, bucket_mb),
                "torch_fsdp": lambda: TorchFSDP(module, sent_in, reduce_dtype),
            }[strategy]()
            local = SimpleNamespace(parameters=self.wrapper.local_parameters().values)
            self.optimizer = make_adamw(lm.optimizer_groups(local, weight_decay), lr, betas)
        self.moment_dtype = (precision or {}).get("moment_dtype")
        self.parameters = {name.removeprefix("model."): p
                           for name, p in self.wrapper.local_parameters().items()}
        self.owner = self.wrapper.owner
        self.rows = {name.removeprefix("model."): n for name, n in self.wrapper.rows.items()}
        # FSDP's weights have the dtype to compute in, and its activations follow them
        self.autocast = None if "fsdp" in strategy else dtype

    def loss_sum(self, x, y):
        with lm.compute_context(self.device, self.autocast or torch.float32):
            return self.wrapper(x, y)

    def loss_and_gradient(self, x, y, micro_batch_size, grad_clip, watch=lambda what: None):
        """Leaves the clipped mean gradient over the tokens of all ranks in the parameters, of which
        x, y (B, T) int64 are this rank's; returns the tensor (its part of the loss, gradient norm
        before clipping). Gradients are means over the ranks: hence losses over tokens / N."""
        self.zero_grad()
        total = torch.zeros((), device=self.device)
        parts = [*zip(x.split(micro_batch_size), y.split(micro_batch_size), strict=True)]
        for i, (x_part, y_part) in enumerate(parts):
            watch(f"forward and backward, micro-batch {i + 1} of {len(parts)}")
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.wrapper.no_sync():
                loss = self.loss_sum(x_part, y_part) / y.numel()
                loss.backward()
            total += loss.detach()
        watch("waiting for the gradients of the others")
        self.wrapper.finish_gradient_synchronization()
        norm = self.wrapper.clip_grad_norm_(grad_clip)
        return torch.stack((total / num_ranks(), norm))

    def zero_grad(self):
        self.wrapper.zero_grad()
        for p in self.parameters.values():  # torch_fsdp's are not the wrapper's
            p.grad = None

    def whole_model(self):
        """On rank 0 {name: whole tensor on the CPU}, as model.state_dict() has it; else empty.
        Tensor by tensor: no rank ever holds all of them on its device."""
        whole = {}
        for name, p in self.parameters.items():
            tensor = gather_rows(p, self.rows[name]) if name in self.rows else p.detach()
            if this_rank() == 0:
                whole[name] = tensor.cpu()
        return {name: whole[first] for name, first in self.first_name.items()} if whole else {}

    def state_parameters(self):
        """(number, parameter, name) in the order in which optimizer.state_dict() counts them."""
        names = {p: name for name, p in self.parameters.items()}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [(i, p, names[p]) for i, p in enumerate(params)]

    def whole_optimizer(self, ranks):
        """On rank 0 what optimizer.state_dict() would be on one device, tensors on the CPU."""
        part = self.optimizer.state_dict()  # this rank's
        layouts = ranks.collect({i: layout_of(state) for i, state in part["state"].items()})
        layout = ranks.share(lambda: {i: state for each in layouts for i, state in each.items()})
        whole = {}
        for i, p, name in self.state_parameters():
            if str(i) in layout:  # not one that was never updated
                mine = part["state"].get(i, {})
                whole[i] = {key: value if not isinstance(value, list) else
                            self.fetch(mine.get(key), *value, name, self.owner and self.owner[p])
                            for key, value in layout[str(i)].items()}
        return {"state": whole, "param_groups": part["param_groups"]}

    def fetch(self, tensor, shape, dtype, name, owner):
        """A tensor of the optimizer's state, whole and on the CPU, for rank 0."""
        if name in self.rows:
            tensor = gather_rows(tensor, self.rows[name])
        elif owner and this_rank() == owner:
            dist.send(tensor.contiguous(), 0)
        elif owner and this_rank() == 0:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            dist.recv(tensor, owner)
        return tensor.cpu() if this_rank() == 0 else None

    @torch.no_grad()
    def load_optimizer(self, saved, ranks):
        """Takes over the state of `whole_optimizer`, which rank 0 alone has; each rank keeps its
        part of a tensor, and one tensor is whole on the devices at a time."""
        layout = ranks.share(lambda: {i: layout_of(v) for i, v in saved["state"].items()})
        for i, p, name in self.state_parameters():
            if str(i) not in layout:
                continue
            state = {}
            for key, value in layout[str(i)].items():
                if isinstance(value, list):
                    shape, dtype = value
                    value = receive(saved["state"][i][key] if this_rank() == 0 else torch.empty(
                        shape, dtype=getattr(torch, dtype), device="meta"), self.device)
                    value = value.to(self.moment_dtype or value.dtype)
                    if name in self.rows:
                        value = my_rows(value, self.rows[name]).clone()
                state[key] = value
            if not self.owner or self.owner[p] == this_rank():
                self.optimizer.state[p] = state


def layout_of(state):
    """JSON of a parameter's optimizer state: [shape, dtype] for tensors, and what else there is."""
    return {key: [list(v.shape), str(v.dtype)[6:]] if torch.is_tensor(v) else v
            for key, v in state.items()}


# -------------------------------------------------------------------------------------------------
# ranks: who is there, what they agree on, and who stopped answering


WEEK_S = 7 * 86_400  # data may be prepared for hours
TOLD = "told"  # the store's count of ranks that wanted to tell why the run ends: the first does
SAME = {"flags": "start them with one command",
        "data": "share data_dir, or prepare the same text with the same Python on every host"}


class Agreed(ValueError):
    """An error that every rank has: rank 0 alone tells it."""


class Ranks:
    """This process among those that torchrun started, and the store through which they talk before
    and beside the process group."""

    def __init__(self, init_timeout):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.count, self.init_timeout, self.watch, self.start = 0, init_timeout, None, None
        if {"MASTER_ADDR", "RANK"} <= os.environ.keys():
            self.store = self.connect()
        elif self.rank or self.world_size > 1:
            raise ValueError("RANK, WORLD_SIZE and MASTER_ADDR must be set together, got rank "
                             f"{self.rank} of {self.world_size} without; start with torchrun")
        else:  # plain python
            self.store = dist.HashStore()

    def connect(self):
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        # another program's port may take a connection and never answer: torch waits for ever
        limit = threading.Timer(self.init_timeout + 5, os._exit, [2])
        limit.daemon = True
        limit.start()
        try:
            timeout = timedelta(seconds=self.init_timeout)
            store = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
            limit.cancel()  # what follows ends by itself, and says why
            self.start = self.start or self.meet(store)
            return dist.PrefixStore(self.start, store)
        except (dist.DistError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise ValueError(f"MASTER_PORT must be free, got {where}, which another program "
                                 "uses; choose another port, or torchrun --standalone") from None
            raise ValueError(f"all {self.world_size} ranks must meet at {where} within "
                             f"{self.init_timeout:g} s, got {' '.join(str(error).split())[:160]}; "
                             "start them all, and see that this host reaches that one") from None
        finally:
            limit.cancel()

    def meet(self, store):
        """A name that the processes of this start share. torchrun's store outlives them, and what
        those before said is of no use; a host counts no restart that another's rank made it do."""
        me, until, silent = uuid.uuid4().hex, time.monotonic() + self.init_timeout, [0]
        store.set(f"lmzero/start/{self.rank}", me)
        if self.rank == 0:
            self.restarts = max(self.restarts, store.add("lmzero/starts", 1) - 1)
        while time.monotonic() < until:
            if self.rank == 0:
                names = [store.get(f"lmzero/start/{r}").decode() for r in range(self.world_size)]
                store.set("lmzero/start", " ".join(names))
                silent = [r for r, name in enumerate(names)
                          if r and not store.check([f"{me}/{name}"])]
                if not silent:
                    return me
            elif me in (names := store.get("lmzero/start").decode().split()):
                store.set(f"{names[0]}/{me}", "")
                return names[0]
            time.sleep(0.02)
        raise dist.DistStoreError(f"no answer from ranks {silent}")

    def key(self):
        self.count += 1
        return f"lmzero/{self.count}"

    def wait(self, key, limit_s=WEEK_S):
        self.store.wait([key], timedelta(seconds=limit_s))
        return json.loads(self.store.get(key))

    def share(self, function):
        """What function() returns on rank 0, JSON; its ValueError or OSError is raised on all."""
        key = self.key()
        if self.rank == 0:
            try:
                answer = {"value": function()}
            except (ValueError, OSError) as error:
                answer = {"error": str(error)}
            self.store.set(key, json.dumps(answer))
        answer = self.wait(key)
        if "error" in answer:
            heard = self.store.add(f"{key}/heard", 1)
            until = time.monotonic() + 5  # the store may end with rank 0
            while self.rank == 0 and heard < self.world_size and time.monotonic() < until:
                time.sleep(0.01)
                heard = self.store.add(f"{key}/heard", 0)
            raise Agreed(answer["error"])
        return answer["value"]

    def collect(self, value, limit_s=WEEK_S):
        """On rank 0 the values of all ranks, JSON; None on the others."""
        key = self.key()
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return [self.wait(f"{key}/{r}", limit_s) for r in range(self.world_size)]
        return None

    def agree(self, function, limit_s=None):
        """What function() returns on this rank; the ValueError or OSError that it has on one is
        raised on all as a ValueError, which names that rank."""
        result = problem = None
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = self.collect(problem, limit_s or self.init_timeout)

        def verdict():
            for rank, problem in enumerate(problems):
                if problem:
                    raise ValueError(f"rank {rank}: {problem}" if rank else problem)

        self.share(verdict)
        return result

    def in_turns(self, function):
        """function() on rank 0, then on the first rank of each other host, then on all others: the
        first finds or makes what the next ones find."""
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        return [self.agree(function if turn == number else lambda: None, WEEK_S)
                for number in range(3)][turn]

    def same(self, what, values, limit_s=WEEK_S):
        """ValueError on every rank, naming the first that differs, unless `values` (JSON, a dict)
        are the same on all."""
        found = self.collect(values, limit_s)

        def verdict():
            for rank, theirs in enumerate(found):
                differ = [f"{name} {theirs.get(name)} for {found[0].get(name)}" for name in
                          sorted(theirs.keys() | found[0].keys())
                          if theirs.get(name) != found[0].get(name)]
                if differ:
                    raise ValueError(f"all ranks must have the same {what}, got "
                                     f"{', '.join(differ)} on rank {rank}; {SAME[what]}")

        self.share(verdict)

    def start_group(self, device, backend, timeout):
        """The process group, proven by a first collective that has a short time limit."""
        if backend == "auto":
            backend = "nccl" if device.type == "cuda" else "gloo"
        self.watch = Watchdog(self, timeout)
        self.watch("the first collective", limit_s=self.init_timeout, hint="see that the hosts "
                   "reach each other: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the network "
                   "card, NCCL_DEBUG=INFO says more")
        # optimizers do; imported later it would keep the group, whose threads Python may abort
        from torch import _dynamo  # noqa: F401

        dist.init_process_group(backend, store=dist.PrefixStore("group", self.store),
                                rank=self.rank, world_size=self.world_size,
                                timeout=timedelta(seconds=timeout + 60))  # the watchdog is first
        if self.world_size > 1:
            one = torch.ones((), device=device)
            dist.all_reduce(one)
            assert one.item() == self.world_size, (one.item(), self.world_size)
        self.watch("starting", limit_s=math.inf)

    def close(self):
        if self.watch is not None:
            self.watch.end()
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # groups that a model's hooks held, and their threads

    def claim(self, without_store):
        """Whether this rank is the first that wants to tell about an error."""
        if self.watch is not None and self.watch.reports:
            self.watch.thread.join()  # it says more, and ends the process
        try:
            return self.store.add(TOLD, 1) == 1
        except RuntimeError:
            return without_store and not (self.watch is not None and self.watch.told)


class Watchdog:
    """A thread that tells the others that this process lives, and ends it, naming the ranks that
    stopped answering, when the main thread has not come on for `limit_s` seconds, or when the next
    rank (of the last: rank 0) has given no sign of life for as long as `default_s`.

    watch(what, step, limit_s): the main thread is at `what` of `step` now."""

    def __init__(self, ranks, limit_s):
        self.ranks, self.default_s, self.ended = ranks, limit_s, threading.Event()
        self.step, self.beat, self.hint = 0, 0, ""
        self.reports = self.told = False  # whether this rank, or any, is about to tell why it ends
        self("starting", limit_s=math.inf)
        if ranks.world_size > 1:
            self.all = ranks.connect()  # one that no wait() holds up
            self.store = dist.PrefixStore("watch", self.all)
            self.thread = threading.Thread(target=self.run, name="watchdog", daemon=True)
            self.thread.start()

    def end(self):
        self.ended.set()
        if self.ranks.world_size > 1:  # one that is in the store when Python ends would abort it
            self.thread.join(60)

    def __call__(self, what, step=None, limit_s=None, hint=""):
        self.what, self.hint = what, hint
        self.step = self.step if step is None else step
        self.since = time.monotonic()
        self.limit_s = self.default_s if limit_s is None else limit_s

    def run(self):
        try:
            neighbour = str((self.ranks.rank + 1) % self.ranks.world_size)
            seen, seen_at = None, time.monotonic()
            while not self.ended.wait(min(1.0, self.limit_s / 5)):
                self.tell()
                sign = self.store.get(neighbour) if self.store.check([neighbour]) else None
                if sign != seen:
                    seen, seen_at = sign, time.monotonic()
                if time.monotonic() - min(self.since + self.limit_s,
                                          seen_at + self.default_s) > 0:
                    self.report()
        except RuntimeError:  # the store has gone, and rank 0 with it
            if not self.ended.wait(10):  # neither over, nor did the main thread see it
                os._exit(1)

    def tell(self):
        self.beat += 1
        self.told = self.told or self.all.check([TOLD])
        state = json.dumps([self.beat, self.step, COUNT["issued"]])
        self.store.set(str(self.ranks.rank), state)

    def states(self):
        ranks = map(str, range(self.ranks.world_size))
        return [json.loads(self.store.get(r)) if self.store.check([r]) else None for r in ranks]

    def report(self):
        """Ends the process; the first to come here tells who is to blame: the ranks whose beat has
        stopped, else those that have come least far."""
        try:
            self.reports = True
            first = self.all.add(TOLD, 1) == 1
            before = self.states()
            for _ in range(4 if first else 6):  # none shall seem dead while the first one looks
                time.sleep(1)
                self.tell()
            if first:
                self.blame(before, self.states())
        finally:
            os._exit(1)

    def blame(self, before, now):
        silent = [r for r, (a, b) in enumerate(zip(before, now, strict=True)) if a == b]
        place = {r: state[1:] for r, state in enumerate(now) if state}
        behind = silent or [r for r, at in place.items() if at == min(place.values())]
        names = f"rank{'s' * (len(behind) > 1)} {', '.join(map(str, behind))}"
        how = ("stopped answering" if silent else "fell behind" if len(behind) < len(place)
               else "wait for each other")
        print(f"ddp.py: error: {names} {how} at step {self.step}, rank {self.ranks.rank} was at: "
              f"{self.what}; no progress within {min(self.limit_s, self.default_s):g} s; "
              f"{self.hint or 'give a longer --timeout if that is too short'}",
              file=sys.stderr, flush=True)


def device_of_rank(args, ranks):
    """The device of this rank. raises ValueError where it has none"""
    name = args.device
    if ranks.world_size > 1 and ":" in name:
        raise ValueError(f"several ranks must take a GPU each, got --device {name}; give cuda, and "
                         "CUDA_VISIBLE_DEVICES to choose among them")
    if ranks.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        gpus, needed = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if max(needed, ranks.local_rank + 1) > gpus:
            raise ValueError(f"a host must have a GPU for each of its ranks, got {needed} ranks "
                             f"and {gpus} GPUs; lower --nproc_per_node, or --device cpu")
        name = f"cuda:{ranks.local_rank}"
    device = lm.resolve_device(name)
    if ranks.world_size > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"several ranks must be on CPUs or NVIDIA GPUs, got {device}; "
                         "give --device cpu")
    if args.backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend=nccl needs an NVIDIA GPU for each rank, got device {device}; "
                         "give --backend gloo")
    return device


# -------------------------------------------------------------------------------------------------
# train: train.py's run, in the same order


class Trainer:
    """The state of a run and what happens to it; `run` is the loop."""

    def __init__(self, args, ranks, device):
        self.args, self.ranks, self.started = args, ranks, time.perf_counter()
        self.device, self.watch = device, ranks.watch
        self.out_dir = Path(args.out_dir)
        self.checkpoint = self.out_dir / "checkpoint.pt"
        ranks.share(self.make_out_dir)
        lm.check_recompute_flags(args)
        self.min_lr = lm.last_rate(args)
        precision = lm.optimizer_precision(args)
        narrow = args.param_dtype == "bfloat16"  # then all is computed in it
        self.dtype, reason = lm.resolve_dtype("bfloat16" if narrow else args.dtype, self.device)
        problem = lm.compile_problem(self.device)
        self.compiled = problem is None if args.compile is None else args.compile
        for note in filter(None, (reason, problem if args.compile is None else None)):
            print(note)
        if args.attention == "flash":  # said before the data is made ready
            lm.load_flash_attention(self.device)
        (self.config, self.train_ids, self.valid_ids, self.tokenizer,
         self.tokens_per_byte) = lm.prepare_run(args, ranks.in_turns)
        config = self.config
        self.tokenizer_hash = self.tokenizer.sha256 if self.tokenizer else None
        ranks.same("data", {"tokenizer": self.tokenizer_hash, "training": digest(self.train_ids),
                            "validation": digest(self.valid_ids)})
        self.micro_batch_size, self.sequences = args.batch_size, args.batch_size * args.grad_accum
        share = self.sequences // ranks.world_size
        self.rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
        self.fit_to_memory()
        torch.manual_seed(args.seed)
        self.model = lm.TransformerLM(config)  # on the CPU: under FSDP no GPU ever holds it whole
        self.model.to(getattr(torch, args.param_dtype))
        self.model.checkpoint_every = args.checkpoint_every
        self.model.recompute(self.levels)
        self.generator = torch.Generator().manual_seed(args.seed)  # the place in the data
        self.step, self.saved = 0, None
        content = self.load() if args.resume else None
        self.engine = Engine(
            args.strategy, self.model, self.dtype, args.weight_decay, args.lr,
            (args.beta1, args.beta2), self.compiled, **strategy_settings(args), device=self.device,
            precision=precision)
        self.optimizer = self.engine.optimizer
        if self.step:
            self.engine.load_optimizer(content and content["optimizer"], ranks)
        del content
        self.log = None
        if ranks.rank == 0:
            if args.overwrite:
                lm.clear_run(self.out_dir)
            if self.tokenizer:  # of this run, whatever becomes of data_dir
                self.tokenizer.save(self.out_dir / "tokenizer.json")
            self.log = self.open_log()
            if "TORCHELASTIC_RUN_ID" in os.environ:
                marker_of(args).write_text(os.environ["TORCHELASTIC_RUN_ID"])
        self.pending = None  # the newest step: its numbers are read while the next one runs
        self.eta_from = None  # (step, time) of the first step: it may compile, and is not counted
        self.signals, self.stopping = [], False
        print(f"{parameters_of(config):,} parameters, {ranks.world_size} x {self.device.type}, "
              f"{args.strategy}, {str(self.dtype)[6:]}"
              f"{', compiled in the first step' if self.compiled else ''}")

    def make_out_dir(self):
        lm.check_out_dir(self.args)
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def fit_to_memory(self):
        """Says what memory a step will need; halves the micro-batch, on all ranks, until that is
        free on each."""
        args, device, N = self.args, self.device, self.ranks.world_size
        free = free_memory(device)
        share = self.sequences // N
        size = min(self.micro_batch_size, share)

        def bytes_with(levels):
            return bytes_of_step(args.strategy, N, size < share, args, self.config, size,
                                 self.dtype, device, levels, self.compiled)

        while True:
            self.levels = lm.choose_recomputation(args, self.config.num_layers, bytes_with, free)
            need = bytes_with(self.levels)
            print(f"memory: about {need / 2**30:.2f} of {free / 2**30:.1f} GiB free on {device}"
                  f"{lm.levels_in_words(self.levels)}")
            if need <= free or size % 2:
                break
            size //= 2
        lm.refuse_hopeless(over_ranks(need / free, device, dist.ReduceOp.MAX), size)
        least = int(over_ranks(size, device, dist.ReduceOp.MIN))
        if least < min(self.micro_batch_size, share):
            self.micro_batch_size = least
            print(f"not enough memory: micro-batches of {self.micro_batch_size}, the same update")

    def open_log(self):
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else str(self.device)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        first = {"flags": self.flags(), "versions": versions, "device": card,
                 "ranks": self.ranks.world_size}
        validates = self.step % self.args.eval_every == 0 or self.step >= self.args.max_steps
        return lm.open_log(self.out_dir / "log.jsonl", self.step, first, validates)

    def record(self, **entry):
        if self.log:
            entry["elapsed_s"] = round(time.perf_counter() - self.started, 3)
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()

    def flags(self):
        skip = ("model_defaults", "resume", "overwrite", "verb", "run")
        return {name: value for name, value in vars(self.args).items() if name not in skip}

    def save(self):
        """Rank 0 writes the one checkpoint, as train.py does; the others only send their part."""
        self.watch("saving the checkpoint", self.step, limit_s=math.inf)  # disks may be slow
        self.engine.wrapper.check_same()  # of the last step: GPUs tell one step late
        weights, state = self.engine.whole_model(), self.engine.whole_optimizer(self.ranks)
        if self.ranks.rank == 0:
            lm.save_checkpoint(
                SimpleNamespace(state_dict=lambda: weights),
                SimpleNamespace(state_dict=lambda: state),
                self.step, self.checkpoint, config=asdict(self.config), flags=self.flags(),
                generator=self.generator.get_state(),
                elapsed_s=time.perf_counter() - self.started,
                micro_batch_size=self.micro_batch_size, tokenizer_hash=self.tokenizer_hash,
            )
        self.ranks.share(lambda: None)  # the others wait here, where nothing has a time limit
        self.watch("going on after the checkpoint")
        self.saved = self.step

    def load(self):
        """Rank 0 reads the checkpoint and puts its weights in the model, from where they reach the
        other ranks; returns its contents there, None where there are none."""
        content = {}

        def read():
            try:
                content.update(lm.read_checkpoint(self.checkpoint))
            except FileNotFoundError:
                print(f"no checkpoint in {self.out_dir} yet: starting from the beginning")
                return None
            if content.get("tokenizer_hash", "") != self.tokenizer_hash:
                raise ValueError(f"{self.checkpoint} must be of a run with this tokenizer, got "
                                 f"another; give the same text, or --tokenizer {self.out_dir}"
                                 "/tokenizer.json")
            lm.restore(content, self.model)
            size = self.micro_batch_size
            if content["flags"]["batch_size"] == self.args.batch_size:  # halved for good reason
                size = min(size, content["micro_batch_size"])
            return [content["iteration"], content["generator"].tolist(), size,
                    content["elapsed_s"]]

        if (found := self.ranks.share(read)) is None:
            return None
        self.step, state, self.micro_batch_size, elapsed_s = found
        self.generator.set_state(torch.tensor(state, dtype=torch.uint8))
        self.saved = self.step
        self.started -= elapsed_s
        print(f"resumed {self.checkpoint} at step {self.step}")
        return content or None

    def settle(self):
        """Waits for the pending step, checks its numbers, and logs them when it is time."""
        if self.pending is None:
            return
        (step, stats, done, drawn_from, lr), self.pending = self.pending, None
        seconds = lm.seconds_between(self.step_began, done)  # waits for the step
        self.step_began, now = done, time.perf_counter()
        loss, norm, *stop = stats.tolist()
        self.stopping = self.stopping or bool(stop and stop[0])
        entry = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            lm.stop_on_non_finite(entry, drawn_from, len(self.train_ids)
                                  - self.config.context_length, self.sequences, self.saved)
        self.eta_from = self.eta_from or (step, now)
        args, tokens = self.args, self.sequences * self.config.context_length
        if step % args.log_every and step not in (1, args.max_steps):
            return
        rate, peak = tokens / seconds, lm.peak_flops(self.device)
        mfu = peak and rate * lm.flops_per_token(self.config) / peak / self.ranks.world_size
        mean_s = (now - self.eta_from[1]) / max(1, step - self.eta_from[0]) or seconds
        entry.update(step_ms=seconds * 1e3, tokens_per_s=rate, **({"mfu": mfu} if mfu else {}))
        if self.device.type == "cuda":  # of the rank that used most
            entry["memory_gib"] = over_ranks(torch.cuda.max_memory_allocated() / 2**30,
                                             self.device, dist.ReduceOp.MAX)
        print(lm.log_line(entry, args.max_steps, mfu, mean_s * (args.max_steps - step)), flush=True)
        self.record(**entry)

    def validate(self, num_tokens):
        def loss_sum(x, y):
            self.watch("validation", self.step)
            return self.engine.loss_sum(x, y)

        T = min(self.config.context_length, len(self.valid_ids) - 1)
        total, tokens = lm.evaluation_sum(
            loss_sum, self.valid_ids, T, num_tokens, self.micro_batch_size,
            self.device, self.ranks.rank, self.ranks.world_size)
        loss = over_ranks(total, self.device) / tokens
        bits, perplexity = loss / math.log(2) * self.tokens_per_byte, math.exp(min(loss, 700))
        print(f"step {self.step}/{self.args.max_steps} | validation loss {loss:.4f} | perplexity "
              f"{perplexity:.2f} | bits per byte {bits:.4f}", flush=True)
        self.record(step=self.step, valid_loss=loss, perplexity=perplexity, bits_per_byte=bits)

    def run(self):
        """Trains to max_steps; returns 0, or 128 + the signal that stopped it after a save."""
        args, T = self.args, self.config.context_length
        loop_started, self.step_began = time.perf_counter(), lm.time_mark(self.device)
        while self.step < args.max_steps:
            if self.step and self.step % args.eval_every == 0:  # also where it was resumed
                self.settle()
                self.validate(args.eval_tokens)
                self.step_began = lm.time_mark(self.device)
            self.watch("forward and backward", self.step + 1)
            lr = lm.lr_cosine_schedule(self.step + 1, args.lr, self.min_lr, args.warmup_steps,
                                       args.max_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            drawn_from = self.generator.get_state()
            batch = lm.get_batch(self.train_ids, self.sequences, T, self.device, self.generator,
                                 self.rows)
            stats = self.train_step(*batch)
            self.settle()
            self.step += 1
            on_cuda = self.device.type == "cuda"  # its copy waits for its turn, the host does not
            stats = stats.to("cpu", non_blocking=on_cuda)
            self.pending = (self.step, stats, lm.time_mark(self.device), drawn_from, lr)
            if not on_cuda:
                self.settle()
            stopping = self.stopping if self.ranks.world_size > 1 else bool(self.signals)
            saving = self.step % args.save_every == 0 or self.step == args.max_steps or stopping
            if saving:
                self.settle()
                self.save()
                if stopping:
                    number = self.signals[0] if self.signals else signal.SIGTERM
                    print(f"signal {number}: saved at step {self.step}, --resume goes on")
                    return 128 + number
                self.step_began = lm.time_mark(self.device)
        self.finish(time.perf_counter() - loop_started)
        return 0

    def train_step(self, x, y):
        """One update; returns loss and norm over all ranks and, if there are several, whether one
        of them was told to stop: a signal reaches them at different steps."""
        stats = self.engine.loss_and_gradient(x, y, self.micro_batch_size, self.args.grad_clip,
                                              self.watch)
        self.optimizer.step()
        if self.ranks.world_size == 1:
            return stats
        told = torch.full((), float(bool(self.signals)), device=self.device)
        summed = torch.stack((stats[0], told))
        dist.all_reduce(summed)
        return torch.stack((summed[0], stats[1], summed[1]))

    def finish(self, loop_s):
        """Last validation, Hugging Face folder, sample, times."""
        self.validate(4 * self.args.eval_tokens)
        weights = self.engine.whole_model() if self.engine.rows else {}
        self.watch("writing the model", limit_s=math.inf)
        self.ranks.share(lambda: self.export(weights))  # a rank that is gone ends the run
        self.ranks.collect("heard")  # the store may end with rank 0
        print(f"time: {time.perf_counter() - self.started:.0f} s, {loop_s:.0f} s of it in steps")

    def export(self, weights):
        """Of rank 0, which has the weights that are not in the model."""
        model = self.model
        if weights:  # a whole model, which the sharded one is not
            model = lm.TransformerLM(self.config).to(getattr(torch, self.args.param_dtype))
            model.load_state_dict(weights)
            if 4 * parameters_of(self.config) < lm.free_memory(self.device) / 2:
                model = model.to(self.device)
        for block in model.layers:
            block.__dict__.pop("forward", None)  # the compiled one: not for texts of all lengths
        lm.export_and_sample(model, self.tokenizer, self.out_dir, self.args.prompt,
                             self.args.sample_tokens, self.args.seed)


def free_memory(device):
    """Bytes for this rank: those of a host share its CPU's."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return lm.free_memory(device) / each


def bytes_of_step(strategy, N, accumulates, args, config, batch_size, dtype, device, levels,
                  compiled=False):
    """Bytes that a rank of N needs for a step of micro-batches of batch_size sequences."""
    if compiled and not args.checkpoint_every and strategy != "torch_ddp":  # measured: not there
        # torch.compile's backward passes, too, compute again what is no product
        levels = ["cheap" if level == "none" else level for level in levels]
    parts = lm.memory_of_flags(args, config, batch_size, dtype, device, levels)
    grads, blocks = parts.pop("gradients"), parts.pop("activations of the blocks")
    sharded, copies = (), 0
    if strategy == "zero1":
        sharded = ("optimizer (m and v)",)
    if "fsdp" in strategy:
        sharded = ("parameters", "optimizer (m and v)")
        # the weights of some blocks are whole at a time
        whole = parts["parameters"] * dtype.itemsize / getattr(torch, args.param_dtype).itemsize
        parts["weights cast to bfloat16"] = whole * min(1, 8 / config.num_layers)
        added = getattr(torch, args.reduce_dtype or "float32").itemsize
        grads = parameters_of(config) * added if accumulates else grads / N  # no_sync keeps whole
    else:
        blocks += parts.pop("weights cast to bfloat16")  # freed with them
        copies = grads if strategy in ("flat", "torch_ddp") else 0
        parts["in flight"] = min(grads, DDP.in_flight_bytes + 8 * BUCKET_MB * MiB)  # and a bucket
    rest = sum(value / (N if part in sharded else 1) for part, value in parts.items())
    if strategy == "torch_ddp":  # its buckets are there from the start
        rest, copies = rest + grads, 0
    # a backward pass that does not add to gradients makes them while it frees activations
    return rest + (max(blocks + grads, copies + grads) if accumulates else
                   max(blocks, copies + grads))


def digest(ids):
    """A text that tells token arrays apart: their length, and a checksum of a part of them."""
    sample = np.ascontiguousarray(ids[:: max(1, len(ids) // 100_000)])
    return f"{len(ids):,} tokens of checksum {zlib.crc32(sample):08x}"


def parameters_of(config):
    return sum(lm.count_parameters(config).values())


def check_strategy_flags(args, chosen):
    for flag, strategies in TAKEN_BY.items():
        if getattr(args, flag) is not None and not set(chosen) & set(strategies):
            raise ValueError(f"{flag} must come with one of the strategies "
                             f"{', '.join(strategies)}, got {', '.join(chosen)}; leave it out")


def train(args, ranks):
    """train.py's run, on the ranks that torchrun started."""
    def check():
        device = device_of_rank(args, ranks)
        sequences = args.batch_size * args.grad_accum
        if sequences % ranks.world_size:
            raise ValueError(f"batch_size * grad_accum must be a multiple of the number of ranks, "
                             f"got {args.batch_size} * {args.grad_accum} and {ranks.world_size}; "
                             "change one of them")
        check_strategy_flags(args, [args.strategy])
        return device

    device = ranks.agree(check)
    ranks.start_group(device, args.backend, args.timeout)
    trainer = Trainer(args, ranks, device)
    with lm.stop_politely(trainer.signals):
        return trainer.run()


# -------------------------------------------------------------------------------------------------
# bench: step time, communication that is not hidden, memory

COLUMNS = {  # of the table, after those of the time: {title: (key of a row, width, format)}
    "tok/s": ("tokens_per_s", 10, ",.0f"), "mfu": ("mfu", 6, ".1%"),
    "communicating": ("communicating_ms", 14, ".2f"), "exposed": ("exposed_ms", 8, ".2f"),
    "hidden": ("hidden", 7, ".1%"), "init": ("init_gib", 7, ".2f"),
    "before": ("before_gib", 7, ".2f"), "step": ("step_gib", 7, ".2f"),
    "state": ("state_gib", 7, ".2f")}


def bench(args, ranks):
    """Times training steps on random ids under each strategy, rivals in the same processes; prints
    a table, then JSON. source: [1] the benchmarking problems of data parallelism"""
    device = ranks.agree(functools.partial(check_bench, args, ranks))
    ranks.start_group(device, args.backend, args.timeout)
    narrow = args.param_dtype == "bfloat16"  # then all is computed in it
    dtype, reason = lm.resolve_dtype("bfloat16" if narrow else args.dtype, device)
    config = lm.config_from_flags(args)
    cuda = device.type == "cuda"
    compiled = lm.compile_problem(device) is None if args.compile is None else args.compile
    card = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    conditions = {
        "preset": args.preset, "ranks": ranks.world_size, "device": card,
        "torch": torch.__version__, "batch_size": args.batch_size, "grad_accum": args.grad_accum,
        "context_length": config.context_length, "attention": config.attention,
        "dtype": str(dtype)[6:], "param_dtype": args.param_dtype,
        "moment_dtype": args.moment_dtype or args.param_dtype,
        "reduce_dtype": args.reduce_dtype or "float32", "bucket_mb": args.bucket_mb or BUCKET_MB,
        "compile": compiled, "checkpoint_every": args.checkpoint_every,
        "recompute": args.recompute}
    print(f"{config}\n{parameters_of(config):,} parameters; batch_size of a rank"
          + "".join(f"; {name} {value}" for name, value in conditions.items())
          + (f"; {reason}" if reason else ""))
    print("ms: median of turns (lowest to highest), the slowest rank's. communicating, exposed: "
          + ("in NCCL's kernels, and with no other kernel beside them, by torch.profiler" if cuda
             else "not known on CPUs, and waiting for collectives of ours")
          + "; hidden: the rest.\nGiB of rank 0: allocated after init, highest before the "
          "optimizer's step, highest in it, optimizer state", flush=True)
    print(f"{'strategy':<11}|{'ms a step':>26} |"
          + " |".join(f"{title:>{width}}" for title, (_, width, _) in COLUMNS.items()))
    rows, checks = {}, {}
    for strategy in args.strategies:
        row = bench_strategy(strategy, args, ranks, config, device, dtype, compiled, checks)
        rows[strategy] = row
        cells = [f"{'n/a' if row[key] is None else format(row[key], form):>{width}}"
                 for key, width, form in COLUMNS.values()]
        print(f"{strategy:<11}|{spread(row)} |" + " |".join(cells), flush=True)
        if row.get("shares"):
            print("  of a step: " + ", ".join(f"{part} {share:.1%}" for part, share
                                              in row["shares"].items()), flush=True)
    print(json.dumps({**conditions, "strategies": rows}))
    return 0


def in_ms(seconds):
    return {"ms": 1e3 * statistics.median(seconds), "low_ms": 1e3 * min(seconds),
            "high_ms": 1e3 * max(seconds)}


def spread(row, digits=2):
    """A cell: the median (lowest to highest) of `in_ms`."""
    ms, low, high = (f"{row[k]:.{digits}f}" for k in ("ms", "low_ms", "high_ms"))
    return f"{f'{ms} ({low}-{high})':>26}"


def check_path(path):
    if path and Path(path).is_dir():
        raise ValueError(f"a file must be named, got the folder {path}; add a name to it")
    if path and not os.access(Path(path).absolute().parent, os.W_OK):
        raise ValueError(f"a file must be in a folder that can be written, got {path}; make that")


# What the leaderboard's step is run with where no flag says otherwise. source: [1] A2, leaderboard
STEP_8B = dict(batch_size=1, strategies=["fsdp"], attention="flash", param_dtype="bfloat16",
               reduce_dtype="bfloat16", recompute="auto", warmup_steps=2, repeats=2)


def check_bench(args, ranks):
    """The device of this rank. raises ValueError before any work"""
    device = device_of_rank(args, ranks)
    check_path(args.trace)
    check_strategy_flags(args, args.strategies)
    lm.check_recompute_flags(args)
    lm.optimizer_precision(args)
    if args.attention == "flash":
        lm.load_flash_attention(device)
    if args.warmup_steps < 2:  # the second shows that the first one's update was right
        raise ValueError(f"warmup_steps must be at least 2, got {args.warmup_steps}; give more")
    if args.batch_size % args.grad_accum:
        raise ValueError(f"batch_size must be a multiple of grad_accum, got {args.batch_size} and "
                         f"{args.grad_accum}; change one of them")
    return device


def check_agree(checks, bound):
    """Stops unless the update lowered the loss, and all strategies had the loss and the gradient
    norm of the first before it and its loss after it. checks: {strategy: these three}"""
    first = next(iter(checks))
    for name, check in checks.items():
        if not check[2] < check[0]:  # nor nan
            raise ValueError(f"an update must lower the loss of its batch, got {check[0]} and then "
                             f"{check[2]} under {name}; this is a bug")
        for got, expected in zip(check, checks[first], strict=True):
            if not abs(got - expected) <= bound * abs(expected):
                raise ValueError(f"{name} must agree with {first} within {bound} in "
                                 f"loss, norm and next loss, got {checks}; this is a bug")


def bench_engine(strategy, args, config, device, dtype, compiled):
    """(Engine around a model of random weights, what its blocks compute again)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    free = 0.95 * free_memory(device)

    def bytes_with(levels):
        return bytes_of_step(strategy, num_ranks(), args.grad_accum > 1, args, config,
                             args.batch_size // args.grad_accum, dtype, device, levels, compiled)

    levels = lm.choose_recomputation(args, config.num_layers, bytes_with, free)
    if device.type == "cpu":  # whose system kills a process without a word
        lm.refuse_hopeless(over_ranks(bytes_with(levels) / free, device, dist.ReduceOp.MAX),
                           args.batch_size)
    torch.manual_seed(0)
    with device:
        model = lm.TransformerLM(config)
    model.to(getattr(torch, args.param_dtype))
    model.checkpoint_every = args.checkpoint_every
    model.recompute(levels)
    if args.recompute == "auto":
        print(f"{strategy}{lm.levels_in_words(levels) or '; recompute: none'}")
    engine = Engine(strategy, model, dtype, 0.1, 1e-4, (0.9, 0.95), compiled,
                    **strategy_settings(args), precision=lm.optimizer_precision(args))
    gc.collect()
    return engine, levels


def bench_strategy(strategy, args, ranks, config, device, dtype, compiled, checks):
    """A row of bench's table. checks: check_agree's, to which this strategy's are added"""
    cuda = device.type == "cuda"
    ranks.watch(f"preparing {strategy}")
    engine, levels = bench_engine(strategy, args, config, device, dtype, compiled)
    row = {"init_gib": torch.cuda.memory_allocated() / 2**30 if cuda else None,
           "recompute": lm.count_levels(levels)}
    generator = torch.Generator().manual_seed(ranks.rank)
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, config.context_length),
                         generator=generator).to(device)

    def gradient():
        return engine.loss_and_gradient(x, y, args.batch_size // args.grad_accum, 1.0)

    def step():
        stats = gradient()
        engine.optimizer.step()
        return stats

    check = []
    for i in range(args.warmup_steps):
        ranks.watch(f"warming up {strategy}", i)
        stats = step()
        if i < 2:
            check += [over_ranks(stats[0].item(), device), stats[1].item()]
    row["check"] = checks[strategy] = check[:3]
    narrow = "bfloat16" in (args.dtype, args.param_dtype, args.reduce_dtype) or dtype.itemsize == 2
    check_agree(checks, 2e-2 if narrow else 1e-4)  # before any time is taken
    seconds, waited = [], []
    for turn in range(args.repeats):
        ranks.watch(f"timing {strategy}", turn)
        began, waited_before = lm.synchronised_time(device), COUNT["waited_s"]
        for _ in range(args.steps):
            step()
        took = lm.synchronised_time(device) - began
        waited.append((COUNT["waited_s"] - waited_before) / args.steps)
        seconds.append(over_ranks(took, device, dist.ReduceOp.MAX) / args.steps)
    row["before_gib"] = peak_gib(gradient, cuda)
    row["step_gib"] = peak_gib(engine.optimizer.step, cuda)
    rate = ranks.world_size * x.numel() / statistics.median(seconds)
    peak = lm.peak_flops(device)
    row.update(in_ms(seconds), tokens_per_s=rate,
               mfu=peak and rate * lm.flops_per_token(config) / ranks.world_size / peak)
    row["state_gib"] = sum(v.nbytes for state in engine.optimizer.state.values()
                           for v in state.values() if torch.is_tensor(v)) / 2**30
    row.update(communicating_ms=None, exposed_ms=None, hidden=None)
    if cuda or args.trace:
        steps = 3
        events = profile_steps(step, args, strategy, ranks, device, steps)
    if cuda:
        kernels = kernels_by_part(events)
        together, exposed = (1e-3 * us / steps for us in exposed_us(kernels))
        row.update(communicating_ms=together, exposed_ms=exposed,
                   hidden=1 - exposed / together if together else None,
                   shares=shares_of_parts(kernels))
    elif not strategy.startswith("torch"):
        row["exposed_ms"] = 1e3 * statistics.median(waited)
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}


def peak_gib(run, cuda):
    """The most GPU memory that was allocated at a time while run() ran; None without."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def profile_steps(step, args, strategy, ranks, device, steps):
    """Runs steps under torch.profiler on rank 0, writes --trace, and returns its events."""
    from torch.profiler import ProfilerActivity, profile
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    ranks.watch(f"profiling {strategy}")
    traced = profile(activities=activities) if ranks.rank == 0 else contextlib.nullcontext()
    with traced as profiler:
        for _ in range(steps):
            step()
        lm.synchronised_time(device)
    if ranks.rank:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        if args.trace:
            path = Path(args.trace)
            if len(args.strategies) > 1:
                path = path.with_name(f"{path.stem}_{strategy}{path.suffix}")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


# What operations, by a part of their names, belong to; the outermost one decides.
PARTS = {"LinearCrossEntropy": "loss", "Optimizer.step": "optimizer", "aten::mm": "matmul",
         "aten::addmm": "matmul", "attention_backward": "attention backward",
         "attention": "attention forward"}
COMMUNICATION, REST = "communication", "rest"


def kernels_by_part(events):
    """[(begin, end, part)] in microseconds of what a device did, of a Chrome trace's events: the
    part is that of the operation on the host which was running when the work was launched."""
    operations, launched = {}, {}
    for e in sorted((e for e in events if "ts" in e), key=lambda e: (e["ts"], -e.get("dur", 0))):
        spans = operations.setdefault(e.get("tid"), [])
        if e.get("cat") in ("cpu_op", "user_annotation"):
            part = next((part for name, part in PARTS.items() if name in e["name"]), None)
            if part and (not spans or spans[-1][1] <= e["ts"]):
                spans.append((e["ts"], e["ts"] + e["dur"], part))
        elif (e.get("cat") in ("cuda_runtime", "cuda_driver")
              and spans and e["ts"] <= spans[-1][1]):
            launched[e["args"].get("correlation")] = spans[-1][2]
    return [(e["ts"], e["ts"] + e["dur"], COMMUNICATION if "nccl" in e["name"].lower()
             else launched.get(e["args"].get("correlation"), REST)) for e in events
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def shares_of_parts(kernels):
    """{part: share of the time from the first to the last work}, of communication what is not
    hidden, and "idle": of `kernels_by_part`."""
    if not kernels:
        return {}
    total = max(end for _, end, _ in kernels) - min(begin for begin, _, _ in kernels)
    shares = {part: 0.0 for part in (*PARTS.values(), REST)}
    for begin, end, part in kernels:
        if part != COMMUNICATION:
            shares[part] += (end - begin) / total
    shares["communication not hidden"] = exposed_us(kernels)[1] / total
    shares["idle"] = max(0.0, 1 - sum(shares.values()))  # some parts may run at a time
    return {part: round(share, 4) for part, share in shares.items()}


def exposed_us(kernels):
    """(time in communication, time in communication while nothing else runs), of `kernels_by_part`,
    in any order. [(0, 4, COMMUNICATION), (3, 5, REST)] gives (4, 3)."""
    edges = sorted((t, change, part == COMMUNICATION) for begin, end, part in kernels
                   for t, change in ((begin, 1), (end, -1)))
    running, together, exposed, before = {True: 0, False: 0}, 0.0, 0.0, 0.0
    for t, change, kind in edges:
        if running[True]:
            together += t - before
            exposed += 0 if running[False] else t - before
        running[kind] += change
        before = t
    return together, exposed


# -------------------------------------------------------------------------------------------------
# comm: what the links can do, and where training becomes bound by them


OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


def bus_factor(operation, N):
    """Bus bandwidth is size / time times this: the bytes that each link must carry, whatever the
    algorithm, for a whole tensor of that size. source: [6]"""
    return {"all_reduce": 2 * (N - 1) / N, "reduce_scatter": (N - 1) / N,
            "all_gather": (N - 1) / N, "broadcast": 1.0}[operation]


def time_collective(operation, size, device, repeats):
    """Seconds of each of `repeats` collectives on a float32 tensor of `size` bytes, the slowest
    rank's; checked against what it must give first."""
    N, r = num_ranks(), this_rank()
    n = max(1, size // 4 // N)  # elements of a part
    whole, part = (torch.full((k,), r + 1.0, device=device) for k in (n * N, n))
    run = {"all_reduce": lambda: dist.all_reduce(whole),
           "reduce_scatter": lambda: _reduce_scatter(part, whole),
           "all_gather": lambda: _all_gather(whole, part),
           "broadcast": lambda: dist.broadcast(whole, 0)}[operation]
    run()
    result = part if operation == "reduce_scatter" else whole
    each = torch.arange(1.0, N + 1, device=device)  # what the ranks brought
    want = {"all_gather": each[:, None], "broadcast": each[0]}.get(operation, each.sum())
    if N > 1 and not (result.view(-1, n) == want).all():
        raise ValueError(f"{operation} must give {want.flatten().tolist()}, got "
                         f"{result[::n].tolist()}; this is a bug")
    seconds = []
    for _ in range(5 + repeats):
        whole.fill_(1.0)
        dist.all_reduce(torch.ones((), device=device))  # all begin together
        began = lm.synchronised_time(device)
        run()
        took = lm.synchronised_time(device) - began
        seconds.append(over_ranks(took, device, dist.ReduceOp.MAX))
    return seconds[5:]


def comm(args, ranks):
    """Times collectives of many sizes; prints a table, with --limits what it means, then JSON.
    source: [1] distributed_communication_single_node"""
    def check():
        device = device_of_rank(args, ranks)
        check_path(args.plot)
        if args.plot and find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib, got none; pip install matplotlib")
        return device

    device = ranks.agree(check)
    ranks.start_group(device, args.backend, args.timeout)
    N, backend, rows = num_ranks(), dist.get_backend(), []
    print(f"{N} ranks, {backend}, {device.type}, torch {torch.__version__}, float32; median of "
          f"{args.repeats} (lowest to highest), the slowest rank's; GB = 1e9 bytes")
    print(f"{'operation':<15}|{'MB':>7} |{'ms':>26} |{'GB/s':>8} |{'bus GB/s':>9}")
    for operation in OPERATIONS:
        for size in args.sizes_mb:
            ranks.watch(f"{operation} of {size:g} MB")
            seconds = time_collective(operation, int(size * 1e6), device, args.repeats)
            rate = size * 1e-3 / statistics.median(seconds)
            row = {"operation": operation, "mb": size, **in_ms(seconds), "gb_per_s": rate,
                   "bus_gb_per_s": rate * bus_factor(operation, N)}
            rows.append(row)
            print(f"{operation:<15}|{size:>7g} |{spread(row, 3)} |{rate:>8.2f} |"
                  f"{row['bus_gb_per_s']:>9.2f}", flush=True)
    answer = {"ranks": N, "backend": backend, "torch": torch.__version__, "rows": rows}
    if args.limits:
        answer["limits"] = show_limits(rows, device)
    print(json.dumps(answer), flush=True)
    if args.plot and ranks.rank == 0:
        plot_comm(rows, args.plot)
    return 0


def plot_comm(rows, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for operation in dict.fromkeys(row["operation"] for row in rows):
        points = [(r["mb"], r["bus_gb_per_s"]) for r in rows if r["operation"] == operation]
        axis.plot(*zip(*points, strict=True), marker=".", label=operation)
    axis.set(xscale="log", yscale="log", xlabel="MB", ylabel="bus bandwidth, GB/s")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def ring_all_reduce_seconds(size, N, W):
    """A reduce-scatter and an all-gather around a ring: 2 (N - 1) steps, each sends size / N bytes.
    source: [5] sharding. 8 bytes on 4 ranks at 1 byte a second take 12 s."""
    return 2 * (N - 1) * size / N / W


def alternate_ring_all_reduce_seconds(size, N, W):
    """Each of N - 1 steps passes a whole tensor on to the next rank, which adds it to its sum:
    N / 2 times the bytes of `ring_all_reduce_seconds`, for half the steps. source: [1] section 8
    8 bytes on 4 ranks at 1 byte a second take 24 s."""
    return (N - 1) * size / W


# The limits below are of a feed-forward block w2(silu(w1 x) * w3 x), three matrices of D x F, in
# 2-byte numbers, on B tokens over all ranks; W is what a rank can send, C what it can compute, and
# communication hides completely behind computation. It computes 2 B (3 D F) FLOPs forward, and
# twice that backward. source: [1] section 8, by the method of [5] training


def data_parallel_limit(B, C, W):
    """The most ranks at which data parallel training is bound by computation.

    Backward, a rank computes 12 B D F / N FLOPs, and all-reduces 3 gradients of 2 D F bytes, which
    sends 2 (N - 1) / N * 6 D F bytes. Computation takes longer while
    12 B D F / (N C) >= 12 D F (N - 1) / (N W), that is N <= 1 + B W / C: B / N of about C / W
    tokens a rank, whatever the model's size.
    """
    return 1 + B * W / C


def fsdp_limit(B, C, W):
    """As `data_parallel_limit`, for FSDP. Forward: 6 B D F / N FLOPs against an all-gather of
    6 D F bytes, (N - 1) / N of it sent; backward twice both (gather, and reduce-scatter): the same
    limit, N <= 1 + B W / C."""
    return 1 + B * W / C


def tensor_parallel_limit(F, C, W):
    """As `data_parallel_limit`, for tensor parallelism: w1 and w3 split by columns, w2 by rows.

    Forward: 6 B D F / N FLOPs, and an all-reduce of the output, 2 B D bytes, which sends
    2 (N - 1) / N * 2 B D. 6 B D F / (N C) >= 4 B D (N - 1) / (N W), that is
    N <= 1 + 3 F W / (2 C), whatever the batch.
    """
    return 1 + 3 * F * W / (2 * C)


def fsdp_tensor_parallel_limit(B, F, C, W, overlapped=True):
    """The most ranks N = X Y, and (X, Y), for FSDP over X of them and tensor parallelism over Y.

    Forward, in units of 6 B D F / N: computing takes 1 / C; the gathers of 6 D F / Y bytes over X
    ranks a = (X - 1) / B / W; the all-reduces of 2 B D / X bytes over Y b = 2 (Y - 1) / (3 F) / W.
    overlapped: over links of their own, a and b <= 1 / C each: both limits above, multiplied.
    Otherwise, over the same links, a + b <= 1 / C: N = (1 + B a W) (1 + 3 F b W / 2) is largest
    where a W = (W / C + 2 / (3 F) - 1 / B) / 2.
    """
    if overlapped:
        X, Y = fsdp_limit(B, C, W), tensor_parallel_limit(F, C, W)
        return X * Y, (X, Y)
    a = min(max((W / C + 2 / (3 * F) - 1 / B) / 2, 0), W / C)
    X, Y = 1 + B * a, 1 + 1.5 * F * (W / C - a)
    return X * Y, (X, Y)


def show_limits(rows, device):
    """Prints the limits for the measured C and W, and returns them."""
    dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        began = lm.synchronised_time(device)
        for _ in range(3):
            a @ b
        seconds.append((lm.synchronised_time(device) - began) / 3)
    C, N = 2 * n**3 / statistics.median(seconds[3:]), num_ranks()
    W = 1e9 * max(row["bus_gb_per_s"] for row in rows if row["operation"] != "broadcast")
    if N == 1:
        print("limits need 2 ranks, got 1")
        return None
    B, F = TOKENS, D_FF
    own, (X, Y) = fsdp_tensor_parallel_limit(B, F, C, W)
    shared, (X1, Y1) = fsdp_tensor_parallel_limit(B, F, C, W, overlapped=False)
    limits = {  # {name: (number, how it came about)}
        "data_parallel_ranks": (data_parallel_limit(B, C, W), "1 + B W / C"),
        "fsdp_ranks": (fsdp_limit(B, C, W), "1 + B W / C"),
        "tensor_parallel_ranks": (tensor_parallel_limit(F, C, W), "1 + 3 F W / 2 C"),
        "fsdp_tensor_parallel_ranks": (own, f"{X:,.1f} by {Y:,.1f}, over links of their own"),
        "fsdp_tensor_parallel_ranks_shared_links": (shared, f"{X1:,.1f} by {Y1:,.1f}"),
        "ring_all_reduce_s": (ring_all_reduce_seconds(1e9, N, W), f"1 GB on {N} ranks"),
        "alternate_ring_all_reduce_s": (alternate_ring_all_reduce_seconds(1e9, N, W), "the same")}
    print(f"C {C / 1e12:.3g} TFLOP/s ({str(dtype)[6:]} matrices of {n}), W {W / 1e9:.3g} GB/s (the "
          f"best bus bandwidth of a ring above): C / W = {C / W:,.0f}\n"
          f"bound by computation up to so many ranks, for B {B:,} tokens and d_ff F {F:,}:")
    for name, (value, how) in limits.items():
        print(f"  {name} {value:,.{4 if name.endswith('_s') else 1}f} ({how})")
    return {"C_flop_per_s": C, "W_bytes_per_s": W, "tokens_a_rank": C / W,
            **{name: value for name, (value, _) in limits.items()}}


# -------------------------------------------------------------------------------------------------
# command line


def build_parser():
    parser = argparse.ArgumentParser(prog="ddp.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    counting, rate = lm.positive(int), lm.positive(float)

    def add_verb(name, run, text):
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(run=run)
        verb.add_argument("--backend", default="auto", choices=("auto", "nccl", "gloo"))
        verb.add_argument("--init_timeout", type=rate, default=60, help="s, to meet and to begin")
        verb.add_argument("--timeout", type=rate, default=600, help="s without progress, then stop")
        return verb

    def add_strategy_flags(add):
        add("--bucket_mb", type=rate, help=f"gradients of a bucket (default {BUCKET_MB:g})")
        add("--reduce_dtype", choices=("float32", "bfloat16"), help="in which gradients are added "
            "(default float32)")

    p = add_verb("train", train, "train.py on many devices")
    p.add_argument("--strategy", default="overlap", choices=STRATEGIES)
    add_strategy_flags(p.add_argument)
    lm.add_training_flags(p)

    shown = " ".join(f"--{flag} {' '.join(value) if isinstance(value, list) else value}"
                     for flag, value in STEP_8B.items())
    p = add_verb("bench", bench, "time and memory of a step; --preset 8b: the leaderboard's, as it "
                 f"is run best ({shown})")
    add = p.add_argument
    add("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    add_strategy_flags(add)
    add("--batch_size", type=counting, default=4, help="sequences a rank")
    add("--grad_accum", type=counting, default=1, help="parts of them")
    add("--warmup_steps", type=counting, default=5, help="2 or more")
    add("--repeats", type=counting, default=5, help="turns")
    add("--steps", type=counting, default=3, help="of a turn, without a pause")
    lm.add_recompute_flags(add)
    lm.add_precision_flags(add)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--trace", metavar="FILE", help="write a Chrome trace of rank 0 here")
    lm.add_model_flags(p)
    p.set_defaults(preset="small")

    p = add_verb("comm", comm, "bandwidth of collectives, and what it allows")
    add = p.add_argument
    add("--sizes_mb", type=rate, nargs="+", default=[1, 10, 100, 1000])
    add("--repeats", type=counting, default=10)
    add("--device", default="auto")
    add("--plot", metavar="FILE", help="draw the bus bandwidths")
    add("--limits", action="store_true", help="measure C too; print how far each way scales")
    return parser


def strategy_settings(args):
    """Engine's keywords of those strategy flags that were given."""
    given = {name: getattr(args, name) for name in TAKEN_BY if getattr(args, name) is not None}
    return {k: getattr(torch, v) if k == "reduce_dtype" else v for k, v in given.items()}


def raise_last_line(text):
    if text:
        raise ValueError(text.splitlines()[-1].partition("error: ")[2])


def marker_of(args):
    """The file that says that the run in out_dir was begun by the torchrun that runs now."""
    return Path(args.out_dir) / ".torchrun"


def went_on(args, ranks):
    """On rank 0: whether torchrun --max-restarts starts again a run that had begun, which then goes
    on, whatever was asked first. One that was refused, or killed before, is asked as at first."""
    mine = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if ranks.restarts:
        return marker_of(args).exists() and marker_of(args).read_text() == mine
    marker_of(args).unlink(missing_ok=True)  # of a torchrun before
    return False


def with_defaults(parser, argv, verb, **defaults):
    """What argv says, over other defaults than the parser's."""
    verbs = next(action for action in parser._actions if action.dest == "verb")
    verbs.choices[verb].set_defaults(**defaults)
    return parser.parse_args(argv)


def parse(parser, argv):
    args = parser.parse_args(argv)
    if args.verb == "bench" and args.preset == "8B":
        defaults = dict(STEP_8B)
        if args.checkpoint_every:
            del defaults["recompute"]
        given, args = args.reduce_dtype, with_defaults(parser, argv, "bench", **defaults)
        if not set(args.strategies) & set(TAKEN_BY["reduce_dtype"]):
            args.reduce_dtype = given
    return args


def resumed_flags(parser, argv, given, ranks):
    """The flags given now, before those of the run that goes on."""
    saved = ranks.share(lambda: lm.saved_flags(given.out_dir, given))
    args = with_defaults(parser, argv, "train", **{**saved, "out_dir": given.out_dir})
    for flag, strategies in TAKEN_BY.items():  # of another strategy, before
        if getattr(given, flag) is None and args.strategy not in strategies:
            setattr(args, flag, None)
    args.resume, args.overwrite = True, False
    return args


def main(argv=None):
    lm.print_any_text()
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # a tenth of a full GPU is lost to gaps without
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    rank = int(os.environ.get("RANK", 0))
    with contextlib.ExitStack() as stack:
        if rank:  # rank 0 speaks for all
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        ranks = None
        try:
            parser, args, refused = build_parser(), None, io.StringIO()
            try:
                with contextlib.redirect_stderr(refused if rank else sys.stderr):
                    args = parse(parser, argv)
            except SystemExit as stop:
                if rank == 0 and stop.code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                    with contextlib.suppress(ValueError, RuntimeError):  # it has told why
                        Ranks(60).agree(functools.partial(raise_last_line, "error: flags"))
                if not (rank and stop.code):
                    raise
            ranks = Ranks(args.init_timeout if args else 60)
            ranks.agree(functools.partial(raise_last_line, refused.getvalue()))
            ranks.same("flags", {f"--{name}": str(value) for name, value in vars(args).items()
                                 if name not in ("run", "model_defaults")}, args.init_timeout)
            if args.verb == "train" and (args.resume or ranks.share(lambda: went_on(args, ranks))):
                args = resumed_flags(parser, argv, args, ranks)
            return args.run(args, ranks)
        except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
            return fail(ranks, rank, error, 2)
        except RuntimeError as error:
            if lm.is_out_of_memory(error):
                return fail(ranks, rank, error, 2)
            if is_of_collectives(error):
                cause = re.search(r"Last error:\n?(.*)", str(error))
                return fail(ranks, rank, "a collective failed, another rank may be gone: "
                            + (cause[1] if cause else str(error)), 1)
            traceback.print_exc(file=sys.__stderr__)  # before anything that waits for other ranks
            return fail(ranks, rank, repr(error), 1)
        except KeyboardInterrupt:
            return fail(ranks, rank, "interrupted", 130)
        finally:
            if ranks is not None:
                ranks.close()


def is_of_collectives(error):
    """Whether an error says that other processes cannot be reached; gloo's have no class."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Broken pipe"))


def fail(ranks, rank, error, code):
    """Tells the error in one line, once; exits this rank, and so torchrun ends the others."""
    if rank and not isinstance(error, Agreed):
        time.sleep(1)  # rank 0 may have the same to tell
    first = rank == 0
    if ranks is not None and not isinstance(error, Agreed):
        first = ranks.claim(without_store=rank == 0 or code == 1)  # it ended with rank 0
    if first:
        print(f"ddp.py: error: {f'rank {rank}: ' if rank else ''}{lm.first_line(error)}",
              file=sys.stderr, flush=True)
    if ranks is not None and ranks.world_size > 1:
        sys.stdout.flush()
        if rank == 0 and not isinstance(error, Agreed):
            time.sleep(2)  # the store ends with rank 0: the others shall find who has told
        os._exit(code)  # not through destructors that wait for the other ranks
    raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main())
