"""Trains one model on many devices: data parallel, sharded optimizer, fully sharded; under torchrun.

    torchrun --standalone --nproc_per_node=2 ddp.py train --strategy fsdp   # train.py's flags, N ranks
    torchrun --standalone --nproc_per_node=2 ddp.py bench --preset xl       # step time and memory
    torchrun --standalone --nproc_per_node=2 ddp.py comm --limits           # what the links can do
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
import hashlib
import json
import math
import os
import statistics
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn

import bpe
import model as lm

STRATEGIES = ("naive", "flat", "overlap", "zero1", "fsdp", "torch_ddp", "torch_fsdp")
MiB = 2**20
SECOND_BACKWARD = ("a gradient changed after its synchronisation began: run all but the last "
                   "backward pass of an update under no_sync()")

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
    return dist.get_backend() == "nccl"


def wait_for(works):
    """Waits for asynchronous collectives; on CUDA it is the current stream that waits."""
    started = time.perf_counter()
    for work in works:
        work.wait()
    COUNT["waited_s"] += time.perf_counter() - started


def start_mean(tensor):
    """Starts the all-reduce of `tensor` to its mean over the ranks; the function that it returns
    waits for it."""
    COUNT["issued"] += 1
    op = dist.ReduceOp.AVG if averages() else dist.ReduceOp.SUM
    work = dist.all_reduce(tensor, op, async_op=True)

    def finish():
        wait_for([work])
        if not averages():
            tensor.div_(num_ranks())

    return finish


def start_mean_to_owners(chunks):
    """Starts a reduce-scatter of unequal parts: rank r shall have the mean of chunks[r] (1-D).
    Returns (this rank's part, which is ready after finish; finish)."""
    COUNT["issued"] += 1
    op = dist.ReduceOp.AVG if averages() else dist.ReduceOp.SUM
    mine = chunks[this_rank()]
    if averages() and all(map(len, chunks)):
        mine = torch.empty_like(mine)
        works = [dist.reduce_scatter(mine, chunks, op, async_op=True)]
    else:  # gloo takes equal parts only, nobody empty ones
        works = [dist.reduce(chunk, r, op, async_op=True) for r, chunk in enumerate(chunks)
                 if len(chunk)]

    def finish():
        wait_for(works)
        if not averages():
            mine.div_(num_ranks())

    return mine, finish


@torch.no_grad()
def send_from_owners(tensors, owners, at_once_bytes=256 * MiB):
    """Gives every rank the values that rank owners[i] has in tensors[i]: an all-gather of unequal
    parts."""
    if num_ranks() == 1:
        return
    if not averages():
        COUNT["issued"] += 1
        wait_for([dist.broadcast(t.detach(), r, async_op=True)
                  for t, r in zip(tensors, owners, strict=True)])
        return
    parts, size = [], math.inf
    for i in sorted(range(len(tensors)), key=lambda i: str(tensors[i].dtype)):  # stable
        if size >= at_once_bytes or tensors[i].dtype != tensors[parts[-1][0]].dtype:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += tensors[i].nbytes
    for part in parts:
        of_rank = [[tensors[i] for i in part if owners[i] == r] for r in range(num_ranks())]
        COUNT["issued"] += 1
        if not all(of_rank):
            wait_for([dist.broadcast(tensors[i].detach(), owners[i], async_op=True) for i in part])
            continue
        chunks = [flatten(ts) if r == this_rank() else ts[0].new_empty(sum(t.numel() for t in ts))
                  for r, ts in enumerate(of_rank)]
        dist.all_gather(chunks, chunks[this_rank()].clone())
        for r, (ts, chunk) in enumerate(zip(of_rank, chunks, strict=True)):
            if r != this_rank():
                torch._foreach_copy_(ts, split_like(chunk, ts))


def start_gathers(pairs, group=None):
    """Starts all-gathers, (whole (N * n, ...), part (n, ...)) each, as one launch where the back
    end can; returns the works to wait for."""
    COUNT["issued"] += 1
    if num_ranks() == 1:
        for whole, part in pairs:
            whole.copy_(part)
        return []
    if averages():
        with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as works:
            for whole, part in pairs:
                _all_gather(whole, part, group)
        return [works]
    return [_all_gather(whole, part, group, async_op=True) for whole, part in pairs]


def start_reduce_scatters(pairs, group=None):
    """As `start_gathers`, for reduce-scatters of (part, whole): sums, with NCCL means."""
    COUNT["issued"] += 1
    if num_ranks() == 1:
        for part, whole in pairs:
            part.copy_(whole)
        return []
    if averages():
        with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as works:
            for part, whole in pairs:
                _reduce_scatter(part, whole, dist.ReduceOp.AVG, group)
        return [works]
    return [_reduce_scatter(part, whole, group=group, async_op=True) for part, whole in pairs]


@torch.no_grad()
def broadcast_module(module):
    """Gives every rank the parameters and buffers that rank 0 has."""
    if num_ranks() > 1:
        COUNT["issued"] += 1
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
        wait_for([dist.broadcast(t.detach(), 0, async_op=True) for t in tensors])


def flatten(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split_like(flat, tensors):
    """Views of 1-D `flat` in the shapes of `tensors`."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def gather_rows(part, rows):
    """The whole tensor (rows, ...) on every rank, of which each rank holds `part`: rows r*n to
    (r+1)*n of it, n = rows / N rounded up; the last ranks may hold fewer or none."""
    n = -(-rows // num_ranks())
    whole = part.new_empty(n * num_ranks(), *part.shape[1:])
    wait_for(start_gathers([(whole, pad_rows(part.detach(), n))]))
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


class SameGradients:
    """Finds ranks that have a gradient which others lack, after each synchronisation; on a GPU one
    step late, so that the host need not wait for it."""

    def __init__(self, names):
        self.names, self.present, self.mine, self.table, self.done = names, None, None, None, None

    def compare(self, present, device):
        """present: for each name, whether this rank had its gradient. raises ValueError"""
        self.report()
        if not present:
            return
        if present != self.present:
            mine = torch.tensor(present, dtype=torch.uint8)
            self.mine = (mine.pin_memory() if device.type == "cuda" else mine).to(
                device, non_blocking=True)
            self.present = present
        table = self.mine.new_empty(num_ranks() * len(present))
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
        table, self.table = self.table.view(num_ranks(), -1).bool(), None
        for i in (table != table[0]).any(0).nonzero().flatten().tolist():
            have = [r for r in range(num_ranks()) if table[r, i]]
            lack = [r for r in range(num_ranks()) if not table[r, i]]
            raise ValueError(f"every rank must use the same parameters, got a gradient of "
                             f"{self.names[i]} on ranks {have} and none on {lack}; use it on all "
                             "or on none of them")


# -------------------------------------------------------------------------------------------------
# data parallel: every rank has the whole model


class Replicated(nn.Module):
    """What the data-parallel wrappers share. A rank runs forward and backward on its part of the
    batch; `finish_gradient_synchronization()` then makes every gradient the mean over the ranks.
    A parameter that no rank used keeps no gradient. `with no_sync():` accumulates without
    communication. raises ValueError there when ranks used different parameters."""

    rows = {}  # of FSDP: {name: rows of the whole tensor}

    def __init__(self, module):
        super().__init__()
        self.module = module
        broadcast_module(module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in named]
        self.same = SameGradients([name for name, _ in named])
        self.syncing = True

    def forward(self, *inputs, **named_inputs):
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

    def gradients(self):
        """All gradients, zeros for missing ones, and for each whether it is there."""
        present = [p.grad is not None for p in self.trained]
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained], present


class NaiveDDP(Replicated):
    """An all-reduce for each gradient, one after the other, after the backward pass: as many
    latencies as parameters, and the links idle during the backward pass. source: [1]"""

    def finish_gradient_synchronization(self):
        if num_ranks() > 1 and self.trained:
            grads, present = self.gradients()
            for grad in grads:
                start_mean(grad)()
            self.same.compare(present, grads[0].device)


class FlatDDP(Replicated):
    """One all-reduce of all gradients (of a dtype) after the backward pass: a single latency, for
    one copy of the gradients. source: [1]"""

    def finish_gradient_synchronization(self):
        if num_ranks() == 1 or not self.trained:
            return
        grads, present = self.gradients()
        for dtype in dict.fromkeys(g.dtype for g in grads):
            alike = [i for i, g in enumerate(grads) if g.dtype == dtype]
            flat = flatten([grads[i] for i in alike])
            start_mean(flat)()
            for i, view in zip(alike, split_like(flat, [grads[i] for i in alike]), strict=True):
                if present[i]:
                    self.trained[i].grad = view
        self.same.compare(present, grads[0].device)


class DDP(Replicated):
    """All-reduces of buckets of gradients, each started when the backward pass has made its last
    one, so that communication hides behind the rest of it. source: [2]

    Buckets are filled in reverse order of the parameters, about that of the backward pass, and
    start in the same order on all ranks: one that is complete waits for those before it.
    owner: {parameter: rank}, of a ShardedOptimizer: the mean goes to that rank alone, the others
    keep no gradient (ZeRO, stages 1 and 2 [3]). For that many bytes once, not twice, over the link.
    """

    def __init__(self, module, bucket_mb=25.0, owner=None):
        super().__init__(module)
        self.owner = owner
        self.buckets, size, kind = [], math.inf, None
        for i in reversed(range(len(self.trained))):
            p = self.trained[i]
            if size >= bucket_mb * MiB or kind != (p.dtype, p.device):
                self.buckets.append([])
                size, kind = 0, (p.dtype, p.device)
            self.buckets[-1].append(i)
            size += p.nbytes
        self.bucket_of = {i: b for b, bucket in enumerate(self.buckets) for i in bucket}
        for i, p in enumerate(self.trained):
            p.register_post_accumulate_grad_hook(functools.partial(self.ready, i))
        self.reset()

    def reset(self):
        self.waiting = [set(bucket) for bucket in self.buckets]
        self.started, self.present, self.in_flight = 0, [False] * len(self.trained), []

    def ready(self, i, _):
        """The hook: gradient i is complete on this rank."""
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
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for i, p in zip(bucket, params, strict=True):
            self.present[i] = p.grad is not None
        if self.owner is None:
            flat = flatten(grads)
            finish = start_mean(flat)
        else:
            chunks = []
            for r in range(num_ranks()):
                theirs = [g for g, p in zip(grads, params, strict=True) if self.owner[p] == r]
                chunks.append(flatten(theirs) if theirs else grads[0].new_empty(0))
            flat, finish = start_mean_to_owners(chunks)
            for p in params:
                p.grad = None
            keep = [k for k, p in enumerate(params) if self.owner[p] == this_rank()]
            params, grads = [params[k] for k in keep], [grads[k] for k in keep]
            bucket = [bucket[k] for k in keep]
            while len(self.in_flight) > 1:  # what others own is freed when it has been sent
                self.in_flight.pop(0)()
        self.in_flight.append(finish)
        for i, p, view in zip(bucket, params, split_like(flat, grads), strict=True):
            p.grad = view if self.present[i] else None

    def finish_gradient_synchronization(self):
        if num_ranks() == 1 or not self.trained:
            return
        while self.started < len(self.buckets):  # parameters that this backward pass did not reach
            self.start_next()
        for finish in self.in_flight:
            finish()
        present = self.present
        self.reset()
        self.same.compare(present, self.trained[0].device)


class ShardedOptimizer(torch.optim.Optimizer):
    """Any optimizer, its state spread over the ranks: each parameter belongs to one rank, which
    alone updates it and sends the result to the others. source: [1], [3] stage 1

    Parameters go, largest first, to the rank that has the fewest elements; `owner` tells whose a
    parameter is. Whole parameters, so that optimizers which look at a matrix as one work too: a
    matrix larger than 1/N of the model makes its owner's part larger than 1/N.
    Gradients: the same on all ranks, or (DDP with owner=) those of the own parameters only.
    """

    def __init__(self, params, optimizer_cls, **kwargs):
        self.optimizer_cls, self.kwargs, self.inner = optimizer_cls, kwargs, None
        self.owner, self.elements = {}, [0] * num_ranks()
        super().__init__(params, dict(kwargs))
        self.state = self.inner.state

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
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
        params = [p for group in self.param_groups for p in group["params"]]
        send_from_owners(params, [self.owner[p] for p in params])
        return loss

    def load_state_dict(self, state_dict):
        """Takes the whole state, keeps this rank's part."""
        params = [p for group in self.param_groups for p in group["params"]]
        mine = {i: s for i, s in state_dict["state"].items()
                if self.owner[params[i]] == this_rank()}
        super().load_state_dict({**state_dict, "state": mine})
        self.inner.state = self.state


# -------------------------------------------------------------------------------------------------
# fully sharded: every rank has rows of each weight


class ShardedParameter:
    """A parameter of FSDP: `shard`, this rank's rows, which the optimizer sees, and `full`, whose
    memory exists only between `allocate` and `free`."""

    def __init__(self, name, param, places, dtype):
        self.name, self.places, self.shape = name, places, param.shape
        self.n = -(-len(param) // num_ranks())
        self.shard = nn.Parameter(my_rows(param.detach(), len(param)).clone(), param.requires_grad)
        with torch.no_grad():
            self.buffer = param.new_empty(self.n * num_ranks(), *param.shape[1:], dtype=dtype)
            # .data: the gathers that fill the buffer are no change that autograd should object to
            self.full = nn.Parameter(self.buffer[: len(param)].data, param.requires_grad)
        self.nbytes, self.accumulated = self.buffer.nbytes, None
        self.free()

    def show(self, param):
        """Puts the shard or the full weight where the module looks for it."""
        for module, attribute in self.places:
            module._parameters[attribute] = param

    def allocate(self):
        self.buffer.untyped_storage().resize_(self.nbytes)

    def free(self):
        # the tensors that autograd saved share this storage: it is filled again before they are used
        self.buffer.untyped_storage().resize_(0)
        self.show(self.shard)

    def take_gradient(self, dtype):
        """The whole gradient in `dtype`, with those of passes under no_sync; None without any."""
        grad, self.full.grad = self.full.grad, None
        if self.accumulated is not None:
            grad = self.accumulated if grad is None else self.accumulated.add_(grad)
            self.accumulated = None
        return None if grad is None else grad.to(dtype)


class Unit:
    """Parameters that FSDP gathers and frees together: those of one block."""

    def __init__(self, fsdp, module, params):
        self.fsdp, self.module, self.params = fsdp, module, params
        self.trained = [s for s in params if s.full.requires_grad]
        # a frozen weight may be needed after the last gradient is there
        self.frees_early = len(self.trained) == len(params)
        self.gathering, self.works, self.sent, self.in_backward = False, None, None, False
        for s in self.trained:
            s.full.register_post_accumulate_grad_hook(functools.partial(self.ready, s))
        self.reset()

    def reset(self):
        self.waiting, self.present, self.in_backward = set(self.trained), None, False

    def start_gather(self):
        if self.gathering:
            return
        self.gathering = True
        for s in self.params:  # on the stream that computes: there its memory is used and freed
            s.allocate()
        with self.fsdp.on_stream("gather"):
            self.sent = [(s.buffer, pad_rows(s.shard.detach().to(s.buffer.dtype), s.n))
                         for s in self.params]
            self.works = start_gathers(self.sent)

    def gather(self):
        """The whole weights are there for what is computed from now on."""
        self.start_gather()
        if self.works is not None:
            wait_for(self.works)
            if num_ranks() == 1:  # a copy, which no collective's end stands for
                self.fsdp.join("gather")
            self.works = self.sent = None
            for s in self.params:
                s.show(s.full)

    def free(self):
        if self.gathering:
            self.gather()  # one that was started and not used must end before its memory goes
            self.gathering = False
            for s in self.params:
                s.free()

    def ready(self, s, _):
        """The hook: the gradient of s is complete in this backward pass."""
        if s in self.waiting:
            self.waiting.remove(s)
            if not self.waiting:
                self.fsdp.unit_done(self)
        elif self.present is not None or not self.waiting:
            raise RuntimeError(SECOND_BACKWARD)


class FSDP(nn.Module):
    """Fully sharded data parallel: each rank keeps 1/N of the rows of every sharded parameter, of
    its gradient and of its optimizer state. source: [1], [3] stage 3, [4]

    Sharded are the parameters of every Linear and Embedding, ours and torch.nn's, and of modules of
    the classes `shard_types`; others (norms) are replicated. The unit of communication is an item
    of a ModuleList or Sequential; what lies outside of those is one more unit, the root, gathered
    from the start of the forward pass to the end of the backward pass.
    A unit's weights are sent in compute_dtype, `prefetch` units ahead of their use, freed after it,
    gathered again in the backward pass; its gradients are reduced in reduce_dtype as soon as they
    are complete. The shards stay in the dtype the module had.

    parameters() are the shards and the replicated parameters, for an optimizer made after wrapping.
    """

    def __init__(self, module, compute_dtype=None, shard_types=None, reduce_dtype=torch.float32,
                 prefetch=2):
        super().__init__()
        self.module, self.reduce_dtype, self.prefetch = module, reduce_dtype, prefetch
        self.compute_dtype, self.syncing, self.in_backward = compute_dtype, True, False
        broadcast_module(module)
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        cuda = self.device.type == "cuda"
        self.streams = {k: torch.cuda.Stream() if cuda else None for k in ("gather", "reduce")}
        # of its own, so that a reduction which comes early on one rank cannot meet another's gather
        self.reduce_group = dist.new_group() if num_ranks() > 1 else None
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        first = {p: name for name, p in module.named_parameters()}
        self.first_name = {name: first[p] for name, p in
                           module.named_parameters(remove_duplicate=False)}
        del first  # of the whole weights
        self.units = self.make_units((lm.Linear, lm.Embedding, nn.Linear, nn.Embedding,
                                      *(shard_types or ())))
        self.rows = {s.name: s.shape[0] for unit in self.units for s in unit.params}
        sharded = {s.name: s.shard for unit in self.units for s in unit.params}
        self.replicated = {name: p for name, p in module.named_parameters() if name not in sharded}
        self.same, self.reductions, self.copied = SameGradients(self.names), [], None
        for i, unit in enumerate(self.units[1:], 1):
            unit.module.register_forward_pre_hook(functools.partial(self.before_forward, i))
            unit.module.register_forward_hook(functools.partial(self.after_forward, i))

    def make_units(self, types):
        """The root unit, then one for each outermost item of a container, in the module's order."""
        item_of = {}  # submodule: its item; None where two share it

        def find_items(module, inside_of=None):
            for child in module.children():
                is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
                item = child if is_list and inside_of is None else inside_of
                item_of[child] = item if item_of.get(child, item) is item else None
                find_items(child, item)

        find_items(self.module)
        sharded = {p: None for m in self.module.modules() if isinstance(m, types)
                   for p in m.parameters(recurse=False) if p.dim()}
        places = {}
        for m in self.module.modules():
            for attribute, p in m._parameters.items():
                if p in sharded:
                    places.setdefault(p, []).append((m, attribute))
        homes = {}
        for name, p in self.module.named_parameters():
            if p in sharded:
                home = {item_of.get(m) for m, _ in places[p]}  # tied across units: of the root
                homes.setdefault(home.pop() if len(home) == 1 else None, []).append((name, p))
        items = [None, *(m for m in self.module.modules() if m in homes)]
        if self.compute_dtype is not None:
            for m in {m for p in sharded for m, _ in places[p]}:
                m.register_forward_pre_hook(self.cast_inputs)
        units = []
        for item in items:
            params = []
            for name, p in homes.get(item, ()):
                dtype = self.compute_dtype if self.compute_dtype and p.is_floating_point() else None
                params.append(ShardedParameter(name, p, places[p], dtype or p.dtype))
            units.append(Unit(self, item, params))
        return units

    def cast_inputs(self, _, inputs):
        return tuple(x.to(self.compute_dtype) if torch.is_tensor(x) and x.is_floating_point()
                     else x for x in inputs)

    def on_stream(self, name):
        """Runs on a stream of that name, behind all that the current one was given so far."""
        stream = self.streams[name]
        if stream is None:
            return contextlib.nullcontext()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def join(self, name):
        """The current stream waits for the one of that name."""
        if self.streams[name] is not None:
            torch.cuda.current_stream().wait_stream(self.streams[name])

    no_sync = Replicated.no_sync

    def local_parameters(self):
        return {name.removeprefix("module."): p for name, p in self.named_parameters()}

    # --- forward

    def forward(self, *inputs, **named_inputs):
        for unit in self.units:  # also what a forward pass without a backward pass has left
            unit.free()
            unit.in_backward = False
            if unit.present is None:
                unit.waiting = set(unit.trained)
        self.in_backward = False
        self.units[0].gather()
        for unit in self.units[1 : 1 + self.prefetch]:
            unit.start_gather()
        outputs = self.module(*inputs, **named_inputs)
        if torch.is_grad_enabled():
            self.watch_gradient(0, outputs)
        else:
            self.units[0].free()
        return outputs

    def before_forward(self, i, *_):
        if not self.in_backward:  # else a checkpointed block is computed again
            for unit in self.units[i : i + 1 + self.prefetch]:
                unit.start_gather()
        self.units[i].gather()

    def after_forward(self, i, _, inputs, outputs):
        unit, grad = self.units[i], torch.is_grad_enabled()
        last = i == len(self.units) - 1 and not self.in_backward  # needed first in backward: stays
        if not unit.in_backward and not (last and grad):
            unit.free()
        if grad and not self.in_backward:
            self.watch_gradient(i, outputs)

    def watch_gradient(self, i, outputs):
        for tensor in torch.utils._pytree.tree_leaves(outputs):
            if torch.is_tensor(tensor) and tensor.requires_grad:
                tensor.register_hook(functools.partial(self.before_backward, i))

    # --- backward

    def before_backward(self, i, _):
        """A gradient of an output of unit i is there: its backward pass begins."""
        self.in_backward = self.units[i].in_backward = True
        previous = self.units[max(1, i - self.prefetch) : i] if i else self.units[-self.prefetch :]
        for unit in (self.units[i], *reversed(previous)):
            if unit.waiting or not unit.trained:  # else it had its backward pass: two outputs
                unit.start_gather()
        self.units[i].gather()

    def unit_done(self, unit):
        """All gradients of the unit are complete: frees its weights, and reduces when syncing."""
        unit.waiting, unit.in_backward = set(unit.trained), False
        if unit.frees_early:
            unit.free()
        if not self.syncing:
            for s in unit.trained:
                s.accumulated = s.take_gradient(self.reduce_dtype)
            return
        unit.waiting = set()
        for later in reversed(self.units):  # the root last; in the same order on all ranks
            if later.present is None and later.trained:
                if later.waiting:
                    return
                self.reduce(later)

    def reduce(self, unit):
        """Starts the reduce-scatter of the unit's gradients into the gradients of its shards."""
        grads = [(s, s.full.grad, s.accumulated) for s in unit.trained]
        unit.present = {s: grad is not None or more is not None for s, grad, more in grads}
        if self.copied is not None:  # the gradients of the unit before may be freed now
            torch.cuda.current_stream().wait_event(self.copied[1])
        with self.on_stream("reduce"):
            pairs, borrowed = [], False
            for s in unit.trained:
                grad = s.take_gradient(self.reduce_dtype)
                if grad is None:
                    grad = s.shard.new_zeros(s.shape, dtype=self.reduce_dtype)
                whole = pad_rows(grad, len(s.buffer))
                borrowed = borrowed or any(whole is g for _, *gs in grads for g in gs)
                pairs.append((torch.empty_like(whole[: s.n]), whole))
            works = start_reduce_scatters(pairs, self.reduce_group)
            if self.device.type != "cuda":
                self.reductions.append((unit, pairs, works))
                return
            self.copied = grads, torch.cuda.Event()
            if not borrowed:  # by the collective itself: read until it ends
                self.copied[1].record()
            wait_for(works)  # the stream "reduce" does, not the host
            self.add_to_shards(unit, [part for part, _ in pairs])
            if borrowed:
                self.copied[1].record()

    def add_to_shards(self, unit, parts):
        for s, part in zip(unit.trained, parts, strict=True):
            if unit.present[s]:
                part = part[: len(s.shard)].to(s.shard.dtype)
                part = part if averaged() else part / num_ranks()
                s.shard.grad = part if s.shard.grad is None else s.shard.grad + part

    def finish_gradient_synchronization(self):
        for unit in reversed(self.units):
            if unit.present is None and unit.trained:
                self.reduce(unit)
        for unit, pairs, works in self.reductions:
            wait_for(works)
            self.add_to_shards(unit, [part for part, _ in pairs])
        present = {s.name: there for unit in self.units for s, there in (unit.present or {}).items()}
        self.reductions, self.copied, self.in_backward = [], None, False
        for unit in self.units:
            unit.free()
            unit.reset()
        self.join("reduce")
        trained = [p for p in self.replicated.values() if p.requires_grad]
        present.update({name: p.grad is not None for name, p in self.replicated.items()})
        if num_ranks() > 1:
            for dtype in dict.fromkeys(p.dtype for p in trained):
                alike = [p for p in trained if p.dtype == dtype]
                flat = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in alike])
                start_mean(flat)()
                for p, view in zip(alike, split_like(flat, alike), strict=True):
                    p.grad = None if p.grad is None else view
            self.same.compare([present[name] for name in self.names], self.device)

    @torch.no_grad()
    def gather_full_params(self):
        """{name: whole tensor in the shards' dtype}, on every rank; tied names share one tensor."""
        full = {}
        for name, p in self.local_parameters().items():
            full[name] = gather_rows(p, self.rows[name]) if name in self.rows else p.detach()
        return {name: full[first] for name, first in self.first_name.items()}


def averaged():
    """Whether a reduce-scatter gave the mean already."""
    return num_ranks() == 1 or averages()
