"""rl.py: losses against independent references, rollouts, and every verb in runs of seconds."""

import gzip
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as lm
import rl
from bpe import Tokenizer

pytestmark = pytest.mark.usefixtures("same_random_numbers_in_every_order_of_tests", "one_thread")
ROOT = Path(__file__).resolve().parent.parent
F64 = dict(rtol=1e-9, atol=1e-12)  # two orders of adding up a few numbers in float64
F32 = dict(rtol=1e-5, atol=1e-5)  # the same in float32, of values about 1


def close(got, want, **tolerance):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), **tolerance or F64)


def tiny_model(vocab_size=12, **config):
    torch.manual_seed(1)
    shape = dict(vocab_size=vocab_size, context_length=24, d_model=16, num_layers=2, num_heads=2, d_ff=32)
    return lm.TransformerLM(lm.ModelConfig(**{**shape, **config}))


class Logits(torch.nn.Module):
    """A model whose logits are a table (V, V) of the newest token: any model, for what needs no more."""

    def __init__(self, vocab_size=5, wrapped=False, dtype=torch.float64):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab_size, vocab_size, dtype=dtype))
        self.wrapped = wrapped

    def forward(self, ids):
        logits = self.table[ids]
        return SimpleNamespace(logits=logits) if self.wrapped else logits


class Words:
    """A tokenizer with Hugging Face's methods: an id a word, begin 1, end 2, pad 0."""

    def __init__(self, bos=1, eos=2, pad=0):
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.words = bos, eos, pad, {}

    def encode(self, text, add_special_tokens=True):
        ids = [self.words.setdefault(w, len(self.words) + 3) for w in text.split()]
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id else ids

    def decode(self, ids):
        words = {i: w for w, i in self.words.items()}
        return " ".join(words.get(i, "?") for i in ids)


# -------------------------------------------------------------------------------------------------
# masks, entropy, log-probabilities


def test_masked_mean_and_normalize_count_only_what_the_mask_has():
    x = torch.tensor([[1.0, 2.0, math.inf], [4.0, math.nan, 6.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    for m in (mask, mask.bool(), mask.float()):
        close(rl.masked_normalize(x, m, 2.0), 6.5)
        close(rl.masked_normalize(x, m, 2.0, dim=1), [1.5, 5.0])
        close(rl.masked_mean(x, m), 13 / 4)
        close(rl.masked_mean(x, m, dim=0), [2.5, 2.0, 6.0])
    empty = rl.masked_mean(torch.ones(2, 2), torch.tensor([[1, 0], [1, 0]]), dim=0)
    assert empty[0] == 1 and empty[1].isnan()  # as the handout's definition has it: 0 / 0


def test_entropy_is_that_of_the_softmax_and_survives_extreme_logits():
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    p = torch.distributions.Categorical(logits=logits)
    close(rl.compute_entropy(logits), p.entropy())
    close(rl.compute_entropy(torch.zeros(5, 8)), torch.full((5,), math.log(8)), **F32)
    extreme = torch.tensor([[1e4, 0.0, 0.0], [3.0, 3.0, -math.inf], [-1e30, 0.0, 0.0]])
    close(rl.compute_entropy(extreme), [0.0, math.log(2), math.log(2)], **F32)
    close(rl.compute_entropy(torch.full((2, 8), 1e30)), [math.log(8)] * 2, **F32)
    assert rl.compute_entropy(torch.zeros(4, dtype=torch.bfloat16)).dtype == torch.float32


def plain_log_probs(hidden, weight, targets, temperature):
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("N, chunk", [(1, 1), (13, 4), (13, 100), (40, 16)])
@pytest.mark.parametrize("uses", ["log_probs", "entropy", "both"])
def test_chunked_log_probs_and_entropies_have_the_values_and_gradients_of_plain_ones(N, chunk, uses):
    hidden, weight = torch.randn(N, 6).double().requires_grad_(), torch.randn(9, 6).double().requires_grad_()
    targets, g = torch.randint(9, (N,)), torch.randn(2, N).double()
    g[{"log_probs": 1, "entropy": 0}.get(uses, slice(0))] = 0
    results = []
    for function in (lambda *a: rl.linear_log_probs(*a, chunk=chunk), plain_log_probs):
        values = function(hidden, weight, targets, 0.7)
        loss = sum((v * w).sum() for v, w in zip(values, g) if w.any())
        results.append((*values, *torch.autograd.grad(loss, (hidden, weight))))
    for got, want in zip(*results, strict=True):
        close(got, want)


class PeakMemory(TorchDispatchMode):
    """Elements that tensors made inside hold at one time, at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    weakref.finalize(storage, self.free, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropies_hold_one_chunk_of_logits_and_a_quarter_at_most(dtype):
    N, V, C, chunk = 512, 4096, 2, 128
    hidden, weight = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(V, (N,))
    with PeakMemory() as memory:
        log_probs, entropy = rl.linear_log_probs(hidden, weight, targets, chunk=chunk)
        (log_probs.sum() + entropy.sum()).backward()
    one_chunk = chunk * V * dtype.itemsize
    small = 4 * (V * C + N * C) * 4  # gradients of both inputs and their sums, float32
    assert one_chunk <= memory.peak <= 1.25 * one_chunk + small


def test_log_probs_of_any_model_are_of_its_logits():
    ids = torch.randint(5, (3, 7))
    plain, wrapped = Logits(), Logits(wrapped=True)
    wrapped.load_state_dict(plain.state_dict())
    want = plain.table[ids[:, :-1]].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for model in (plain, wrapped):
        found = rl.get_response_log_probs(model, ids[:, :-1], ids[:, 1:], return_token_entropy=True)
        close(found["log_probs"], want)
        close(found["token_entropy"], rl.compute_entropy(plain.table[ids[:, :-1]]))
    assert set(rl.get_response_log_probs(plain, ids[:, :-1], ids[:, 1:])) == {"log_probs"}
    far = rl.get_response_log_probs(lambda ids: torch.full((*ids.shape, 5), 2.0**20), ids[:, :-1], ids[:, 1:])
    close(far["log_probs"], torch.full((3, 6), -math.log(5)), **F32)  # where float32 has eighths only


def test_log_probs_of_our_model_are_those_of_its_full_logits_and_only_where_the_mask_asks():
    model, ids = tiny_model(), torch.randint(12, (3, 9))
    x, y = ids[:, :-1], ids[:, 1:]
    found = rl.get_response_log_probs(model, x, y, return_token_entropy=True)
    full = rl.get_response_log_probs(model.forward, x, y, return_token_entropy=True)  # any callable
    for name, value in found.items():
        close(value, full[name], **F32)
    mask = torch.rand(3, 8) < 0.4
    some, entropy = rl.token_log_probs(model, x, y, mask)
    close(some, found["log_probs"] * mask, **F32)
    close(entropy, found["token_entropy"] * mask, **F32)


# -------------------------------------------------------------------------------------------------
# text to tokens


def test_prompt_and_output_are_tokenized_apart_padded_and_the_mask_is_on_the_labels_of_outputs():
    tokenizer = Words()
    got = rl.tokenize_prompt_and_output(["a b c", "a"], ["d", "b c"], tokenizer)
    assert got["input_ids"].tolist() == [[3, 4, 5], [3, 4, 5]]
    assert got["labels"].tolist() == [[4, 5, 6], [4, 5, 0]]
    assert got["response_mask"].tolist() == [[False, False, True], [True, True, False]]
    ours = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    got = rl.tokenize_prompt_and_output(["ab", ""], ["c<|endoftext|>", "xyz"], ours)
    assert rl.tokenize_prompt_and_output([], [], ours)["labels"].shape == (0, 0)
    assert got["input_ids"].tolist() == [[97, 98, 99], [120, 121, 122]]
    assert got["labels"].tolist() == [[98, 99, 256], [121, 122, 256]]  # padded with the end
    assert got["response_mask"].tolist() == [[False, True, True], [True, True, False]]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_a_packed_dataset_cuts_the_joined_documents_and_shifts_labels_across_the_cut(tmp_path):
    path = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": f"p{i}", "response": "r " * i} for i in range(1, 9)])
    tokenizer = Words()
    template = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\n{}\n\n### Response:\n{}")  # fmt: skip
    stream = []
    for i in range(1, 9):
        stream += [*tokenizer.encode(template.format(f"p{i}", "r " * i)), 2]
    data = rl.PackedSFTDataset(tokenizer, path, 7, shuffle=False)
    assert len(data) == (len(stream) - 1) // 7
    for i in range(len(data)):
        assert data[i]["input_ids"].tolist() == stream[7 * i : 7 * i + 7]
        assert data[i]["labels"].tolist() == stream[7 * i + 1 : 7 * i + 8]
    assert len(list(data)) == len(data)  # ends, as a sequence does
    batches = rl.iterate_batches(data, 4, shuffle=False)
    assert len(batches) == math.ceil(len(data) / 4)
    assert torch.cat([b["labels"] for b in batches]).equal(torch.stack([d["labels"] for d in data]))
    mixed = rl.PackedSFTDataset(tokenizer, path, 7, shuffle=True)
    assert len(mixed) == len(data) and mixed.ids.tolist() != stream
    shuffled = [tuple(x.tolist()) for b in rl.iterate_batches(data, 4, shuffle=True) for x in b["labels"]]
    assert sorted(shuffled) == sorted(tuple(d["labels"].tolist()) for d in data)
    with pytest.raises(ValueError, match="end-of-text token"):
        rl.PackedSFTDataset(Words(eos=None), path, 7, shuffle=False)


def test_documents_in_one_row_do_not_see_each_other():
    model = tiny_model()
    a, b = torch.randint(12, (1, 5)), torch.randint(12, (1, 6))
    packed = model.hidden_states(torch.cat((a, b), 1), documents=torch.tensor([[0] * 5 + [1] * 6]))
    close(packed[:, :5], model.hidden_states(a), **F32)
    close(packed[:, 5:], model.hidden_states(b), **F32)  # rotary positions are relative
    model.checkpoint_every = (1,)
    again = model.hidden_states(torch.cat((a, b), 1), documents=torch.tensor([[0] * 5 + [1] * 6]))
    close(again, packed, **F32)


# -------------------------------------------------------------------------------------------------
# rewards, advantages and the handout's losses


def test_group_normalized_rewards_are_those_of_a_worked_example():
    raw = [0.2, 0.5, 0.0, 0.4, 0.9, 0.7, 0.2, 0.0]
    graded = dict(zip("abcdefgh", raw, strict=True))

    def reward(response, truth):
        assert truth == "t"
        return {"reward": graded[response], "format_reward": 1.0, "answer_reward": 1.0}

    def compute(by_std, eps=1e-6):
        return rl.compute_group_normalized_rewards(reward, list("abcdefgh"), ["t"] * 8, 4, eps, by_std)

    advantages, rewards, metadata = compute(True)
    want = [-0.33824, 1.01472, -1.24021, 0.56373, 1.07062, 0.59479, -0.59479, -1.07062]
    close(advantages, want, rtol=0, atol=5e-6)  # the digits of `want`
    close(rewards, raw, **F32)
    assert metadata["reward_mean"] == pytest.approx(2.9 / 8)
    close(compute(False)[0], [r - 0.275 for r in raw[:4]] + [r - 0.45 for r in raw[4:]], **F32)
    for responses in ("abcdefgh", ""):
        with pytest.raises(ValueError, match=f"groups of 3, got {len(responses)}"):
            rl.compute_group_normalized_rewards(reward, list(responses), ["t"] * len(responses), 3, 1e-6, True)


def test_a_group_of_equal_rewards_gives_exactly_zero():
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7, [0.0] * 7], dtype=torch.float32)
    assert (rewards - rewards.mean(1, keepdim=True)).any()  # what rounding leaves, before / eps
    for baseline in ("mean", "leave_one_out"):
        for by_std in (False, True):
            assert not rl.compute_advantages(rewards, baseline, by_std).any()
    with pytest.raises(ValueError, match="at least 2 with a baseline or a std, got 1"):
        rl.compute_advantages(rewards[:, :1])
    assert rl.compute_advantages(rewards[:, :1], "none").equal(rewards[:, :1])
    mixed = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    close(rl.compute_advantages(mixed, "none", True, eps=0), [[2**0.5, 0], [0, 0]], **F32)


def test_advantages_have_their_identities():
    rewards = torch.rand(6, 5, dtype=torch.float64)
    centred = rl.compute_advantages(rewards)
    close(centred.sum(1), torch.zeros(6), rtol=0, atol=1e-14)
    others = (rewards.sum(1, keepdim=True) - rewards) / 4
    close(rl.compute_advantages(rewards, "leave_one_out"), rewards - others)
    close(rl.compute_advantages(rewards, "leave_one_out"), 5 / 4 * centred)
    scaled = rl.compute_advantages(rewards, normalize_by_std=True, eps=1e-30)
    close(scaled.std(1), torch.ones(6))
    close(rl.compute_advantages(10 * rewards, normalize_by_std=True, eps=1e-30), scaled)


def test_a_reward_function_that_fails_is_named_with_its_response():
    def broken(response, truth):
        raise KeyError("boxed")

    for function in (broken, lambda r, t: {"reward": math.nan}, lambda r, t: {}):
        with pytest.raises(ValueError, match="reward function must grade every response.*'the response'"):
            rl.grade(function, ["the response"], [""])


def inputs_of_losses(B=4, T=6):
    log_probs = torch.randn(B, T, dtype=torch.float64).mul(0.5).sub(1).requires_grad_()
    old = (log_probs + torch.randn(B, T) * 0.4).detach()
    mask = torch.arange(T) < torch.tensor([[T], [3], [1], [4]])
    return log_probs, old, torch.randn(B, 1, dtype=torch.float64), mask


def test_the_handouts_losses_are_their_formulas():
    log_probs, old, advantages, mask = inputs_of_losses()
    rewards = torch.rand(4, 1, dtype=torch.float64)
    compute = rl.compute_policy_gradient_loss
    close(compute(log_probs, "no_baseline", raw_rewards=rewards)[0], -rewards * log_probs)
    close(compute(log_probs, "reinforce_with_baseline", advantages=advantages)[0], -advantages * log_probs)
    close(rl.compute_naive_policy_gradient_loss(rewards, log_probs), -rewards * log_probs)
    ratio = (log_probs - old).exp()
    for kind in ("grpo_no_clip", "GRPO-No-Clip"):
        close(compute(log_probs, kind, advantages=advantages, old_log_probs=old)[0], -ratio * advantages)
    loss, metadata = compute(log_probs, "grpo_clip", None, advantages, old, 0.1)
    clipped = ratio.clamp(0.9, 1.1) * advantages
    close(loss, -torch.minimum(ratio * advantages, clipped))
    close(loss, rl.compute_grpo_clip_loss(advantages, log_probs, old, 0.1)[0])
    assert metadata["clipped"].equal(clipped < ratio * advantages)  # where the minimum is the clipped one
    assert metadata["clipped"].any() and not metadata["clipped"].all()
    for kind, words in (("grpo_clip", "advantages, old_log_probs, cliprange"), ("no_baseline", "raw_rewards")):
        with pytest.raises(ValueError, match=f"needs {words}, got none"):
            compute(log_probs, kind)
    with pytest.raises(ValueError, match="loss_type must be one of"):
        compute(log_probs, "ppo")


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_ratio_beyond_floating_point_leaves_finite_gradients(ratio):
    log_probs, mask = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1, 1], [1, 0]])
    old = torch.tensor([[-300.0, -300.0], [0.0, -math.inf]])  # the last one is masked
    loss = rl.policy_loss(log_probs, old, torch.ones(2, 1), mask, ratio=ratio)[0]
    (gradient,) = torch.autograd.grad(rl.masked_normalize(loss, mask, 1), log_probs)
    close(gradient, [[0, 0], [-1, 0]], **F32)  # the first row is clipped


def test_microbatch_steps_leave_the_gradient_of_the_loss_that_they_return():
    log_probs, old, advantages, mask = inputs_of_losses()
    loss, _ = rl.sft_microbatch_train_step(log_probs, mask, 2, 42.0)
    want = -sum(log_probs[i][mask[i]].sum() / 42 for i in range(4)) / 4 / 2
    close(loss, want)
    close(log_probs.grad, torch.autograd.grad(want, log_probs)[0])
    log_probs.grad = None
    loss, metadata = rl.grpo_microbatch_train_step(log_probs, mask, 3, "grpo_clip", None, advantages, old, 0.2)
    tokens = rl.compute_grpo_clip_loss(advantages, log_probs, old, 0.2)[0]
    want = sum(tokens[i][mask[i]].mean() for i in range(4)) / 4 / 3
    close(loss, want)
    close(log_probs.grad, torch.autograd.grad(want, log_probs)[0])
    assert 0 <= metadata["clipped_share"] <= 1


# -------------------------------------------------------------------------------------------------
# the GRPO family against a reference written token by token

FAMILY = {
    "reinforce": dict(surrogate="reinforce"),
    "ratio": dict(surrogate="ratio"),
    "clip": dict(),
    "clip-higher": dict(clip_high=0.28),
    "dual clip": dict(dual_clip=1.5),
    "sequence ratio": dict(ratio="sequence", clip_low=0.05, clip_high=0.1),
    "sequence ratio without clip": dict(ratio="sequence", surrogate="ratio"),
    "cispo": dict(surrogate="cispo", clip_high=0.1),
    "k1": dict(kl_coef=0.3, kl="k1"),
    "k2": dict(kl_coef=0.3, kl="k2"),
    "k3": dict(kl_coef=0.3, kl="k3"),
    "entropy bonus": dict(entropy_coef=0.2),
    "truncated importance weights": dict(importance_cap=1.1),
    "all at once": dict(clip_high=0.3, dual_clip=2.0, kl_coef=0.1, entropy_coef=0.1, importance_cap=1.2),
}


def grpo_flags(**changes):
    return SimpleNamespace(**{**vars(rl.parse(["grpo"])), **changes})


def fake_run(model, device="cpu", **changes):
    run = SimpleNamespace(model=model, args=grpo_flags(**changes), device=torch.device(device), gaps=[],
                          reference=True if changes.get("kl_coef") else None)  # fmt: skip
    run.collate = lambda rows: rl.pad_pairs([(r["prompt_ids"], r["tokens"]) for r in rows]).values()
    return run


def sampled_rows(model, lengths=(4, 1, 6, 3), noise=0.4, V=5):
    """Rows as sample_groups gives them; what was stored differs from the model by `noise`."""
    rows = []
    for length in lengths:
        ids = torch.randint(V, (2 + length,))
        exact = model(ids[None, 1:-1])[0].log_softmax(-1).gather(-1, ids[2:, None])[:, 0].detach()
        rows.append(dict(prompt_ids=ids[:2].tolist(), tokens=ids[2:].tolist(),
                         advantage=torch.randn(()).item(), finish_reason="stop"))  # fmt: skip
        for name in ("logprobs", "old_log_probs", "ref_log_probs"):
            rows[-1][name] = exact + noise * torch.randn(length, dtype=torch.float64)
    return rows


def reference_loss(model, rows, f, temperature):
    """The loss of FAMILY's flags f: loops over sequences and tokens, scalars only."""
    total, all_tokens = 0, sum(len(r["tokens"]) for r in rows)
    for row in rows:
        ids, n, A = row["prompt_ids"] + row["tokens"], len(row["tokens"]), row["advantage"]
        distributions = [torch.softmax(model.table[ids[1 + t]] / temperature, 0) for t in range(n)]
        p = [d[ids[2 + t]] for t, d in enumerate(distributions)]
        ratios = [p[t] / math.exp(row["old_log_probs"][t]) for t in range(n)]
        if f.ratio == "sequence":
            ratios = [math.prod(ratios) ** (1 / n)] * n
        for t, rho in enumerate(ratios):
            if f.surrogate == "reinforce":
                objective = A * p[t].log()
            elif f.surrogate == "ratio":
                objective = rho * A
            elif f.surrogate == "cispo":
                objective = min(rho.item(), 1 + f.clip_high) * A * p[t].log()
            else:
                objective = min(rho * A, min(max(rho, 1 - f.clip_low), 1 + f.clip_high) * A)
                if f.dual_clip and A < 0:
                    objective = max(objective, f.dual_clip * A)
            if f.importance_cap:
                objective = objective * min(math.exp(row["old_log_probs"][t] - row["logprobs"][t]), f.importance_cap)
            if f.kl_coef:
                r = math.exp(row["ref_log_probs"][t]) / p[t]
                kl = {"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": r - 1 - r.log()}[f.kl]
                objective = objective - f.kl_coef * kl
            entropy = -sum(q * q.log() for q in distributions[t])
            objective = objective + f.entropy_coef * entropy
            weight = {"response": 1 / (n * len(rows)), "tokens": 1 / all_tokens,
                      "constant": 1 / (f.max_new_tokens * len(rows))}[f.length_norm]  # fmt: skip
            total = total - weight * objective
    return total


@pytest.mark.parametrize("length_norm", ["response", "tokens", "constant"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_member_of_the_family_has_the_value_and_gradient_of_its_formula(name, length_norm):
    changes = dict(FAMILY[name], length_norm=length_norm, max_new_tokens=8, temperature=1.3)
    model = Logits()
    run, rows = fake_run(model, **changes), sampled_rows(model)
    loss, values = rl.grpo_loss(run, rows, sequences=len(rows), tokens=sum(len(r["tokens"]) for r in rows))
    want = reference_loss(model, rows, run.args, 1.3)
    close(loss, want, rtol=1e-6, atol=1e-9)
    (got_gradient,), (want_gradient,) = (torch.autograd.grad(x, model.table) for x in (loss, want))
    close(got_gradient, want_gradient, rtol=1e-6, atol=1e-9)
    assert all(torch.isfinite(torch.as_tensor(v)) for v in values)


def gradient(model, rows, **changes):
    run = fake_run(model, **changes)
    loss, values = rl.grpo_loss(run, rows, len(rows), sum(len(r["tokens"]) for r in rows))
    return torch.autograd.grad(loss, model.table)[0], dict(zip(rl.GRPO_VALUES, values, strict=True))


def test_on_policy_all_ratio_losses_have_reinforces_gradient_and_clip_nothing():
    model = Logits()
    rows = sampled_rows(model, noise=0)
    for row in rows:
        del row["old_log_probs"]
    want, _ = gradient(model, rows, surrogate="reinforce")
    for changes in (dict(), dict(dual_clip=3.0), dict(surrogate="ratio"), dict(surrogate="cispo"),
                    dict(ratio="sequence", length_norm="response")):  # fmt: skip
        got, values = gradient(model, rows, **changes)
        if "length_norm" in changes:
            want, _ = gradient(model, rows, surrogate="reinforce", length_norm="response")
        close(got, want)
        assert values["clip_low"] == values["clip_high"] == 0 and values["gap"] < 1e-12


def test_a_constant_added_to_all_rewards_leaves_the_mean_gradient_as_it_is():
    logits, rewards = torch.randn(6).double().requires_grad_(), torch.randn(6, 1).double()
    log_p = logits.log_softmax(0)[:, None]  # all outcomes, as a batch of responses of one token

    def mean_gradient(constant):
        losses = rl.compute_policy_gradient_loss(log_p, "no_baseline", raw_rewards=rewards + constant)[0]
        return torch.autograd.grad((log_p.detach().exp() * losses).sum(), logits, retain_graph=True)[0]

    close(mean_gradient(7.0), mean_gradient(0.0))


def test_grpo_is_dr_grpo_up_to_a_scale_when_all_responses_have_the_greatest_length():
    model = Logits()
    rows = sampled_rows(model, lengths=(6, 6, 6))
    losses = [gradient(model, rows, length_norm=n, max_new_tokens=6)[0] for n in ("response", "constant", "tokens")]
    close(losses[1], losses[0])
    close(losses[2], losses[0])


def test_the_loss_of_an_update_does_not_depend_on_how_it_is_cut_into_micro_batches():
    model = Logits()
    rows = sampled_rows(model)
    tokens = sum(len(r["tokens"]) for r in rows)
    lengths = [[rl.row_length(row) for row in part] for part in rl.micro_batches(rows, 3, 20)]
    assert [n for part in lengths for n in part] == sorted(map(rl.row_length, rows)) and len(lengths) > 1
    assert all(len(part) <= 3 and len(part) * max(part) <= 20 for part in lengths), lengths
    assert [len(part) for part in rl.micro_batches(rows, 3)] == [3, 1]
    assert [len(part) for part in rl.micro_batches(rows, 9, 1)] == [1] * 4  # a row is never cut
    for length_norm in ("response", "tokens", "constant"):
        run = fake_run(model, length_norm=length_norm, clip_high=0.3, ratio="sequence")
        whole, _ = rl.grpo_loss(run, rows, len(rows), tokens)
        parts = [rl.grpo_loss(run, [r], len(rows), tokens)[0] for r in rows]
        close(sum(parts), whole)


def test_kl_estimates_agree_with_the_kl_on_average_and_k3_is_never_negative():
    p, q = (torch.randn(6, dtype=torch.float64).softmax(0) for _ in range(2))
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):  # unbiased: their mean over all outcomes, weighted by p
        close((p * rl.kl_estimate(p.log(), q.log(), kind)).sum(), exact)
    assert (rl.kl_estimate(torch.randn(99), torch.randn(99), "k3") >= 0).all()
    close(rl.kl_estimate(p.log(), q.log(), "k2"), (p / q).log() ** 2 / 2)


def test_the_overlong_penalty_falls_from_zero_to_minus_one_over_the_buffer():
    penalties = [rl.overlong_penalty(n, 20, 4) for n in (1, 16, 17, 18, 20, 25)]
    assert penalties == [0, 0, -0.25, -0.5, -1, -1]
    assert rl.overlong_penalty(20, 20, 0) == 0


def test_dpo_is_ln_2_where_the_policy_is_the_reference_and_else_its_formula():
    tokenizer, policy, reference = Words(), Logits(99), Logits(99, wrapped=True)
    pair = ("what now", "this one please", "that")
    same = rl.compute_per_instance_dpo_loss(policy, policy, tokenizer, 0.5, *pair)
    close(same, math.log(2))
    loss = rl.compute_per_instance_dpo_loss(policy, reference, tokenizer, 0.5, *pair)

    def log_prob(model, response):
        text = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\nwhat now\n\n### Response:\n{response}")  # fmt: skip
        ids = [*tokenizer.encode(text), 2]
        return sum(model.table[a].log_softmax(0)[b] for a, b in zip(ids, ids[1:]))

    margin = sum(sign * log_prob(model, response) for sign, model, response in
                 ((1, policy, pair[1]), (-1, policy, pair[2]), (-1, reference, pair[1]), (1, reference, pair[2])))
    close(loss, -torch.sigmoid(0.5 * margin).log())
    loss.backward()
    assert policy.table.grad.any() and reference.table.grad is None
    assert rl.dpo_loss(*torch.tensor([-1e4, 0.0, 0.0, -1e4]), 1.0).isfinite()


# -------------------------------------------------------------------------------------------------
# rollouts

DIGITS = Tokenizer({i: c.encode() for i, c in enumerate("0123456789+=")}, [], ["<|endoftext|>"])


def digit_model(**config):
    return tiny_model(DIGITS.vocab_size, **config)


def test_log_probs_of_a_rollout_are_those_of_training():
    model = digit_model()
    for temperature in (1.0, 0.6):
        rows = rl.rollout(model, DIGITS, ["1+2=", "34+567="], 10, temperature, group_size=3, seed=5)
        assert [r["prompt_index"] for r in rows] == [0, 0, 0, 1, 1, 1]
        batch = rl.pad_pairs([(r["prompt_ids"], r["tokens"]) for r in rows])
        mask = batch.pop("response_mask")
        found = rl.token_log_probs(model, **batch, mask=mask, temperature=temperature)[0][mask]
        sampled = torch.tensor([p for r in rows for p in r["logprobs"]])
        assert (found - sampled).abs().max() < 1e-4


def test_a_rollout_is_the_same_however_its_prompts_are_split_and_for_any_model():
    model, prompts = digit_model(), ["1+2=", "34+567=", "8+8=", "9="]
    whole = rl.rollout(model, DIGITS, prompts, 6, group_size=2, seed=3)
    parts = [r for i in (0, 2) for r in
             rl.rollout(model, DIGITS, prompts[i : i + 2], 6, group_size=2, seed=3, first_row=2 * i)]
    foreign = rl.rollout(torch.nn.Sequential(model), DIGITS, prompts, 6, group_size=2, seed=3)
    for other in (parts, foreign):
        assert [r["tokens"] for r in other] == [r["tokens"] for r in whole]
    assert [r["tokens"] for r in rl.rollout(model, DIGITS, prompts, 6, group_size=2, seed=4)] != \
        [r["tokens"] for r in whole]  # fmt: skip


def test_matrices_that_are_cast_once_sample_as_under_autocast():
    run = SimpleNamespace(model=digit_model(qkv_bias=True), dtype=torch.bfloat16, sampler=None)
    for _ in range(2):  # the second time after an update
        with torch.no_grad(), lm.compute_context(torch.device("cpu"), run.dtype):
            live, cast = (rl.rollout(m, DIGITS, ["1+2=", "34+567="], 8, group_size=4)
                          for m in (run.model, rl.Run.cast_model(run)))  # fmt: skip
        assert live == cast
        for p in run.model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    assert run.sampler.lm_head.weight.dtype == torch.bfloat16
    run.dtype = torch.float32
    assert rl.Run.cast_model(run) is run.model


def test_a_rollout_ends_at_the_end_token_or_behind_a_stop_string():
    model = digit_model()
    rows = rl.rollout(model, DIGITS, ["1="], 20, group_size=40, stop=["7"], seed=0)
    ended = {r["finish_reason"] for r in rows}
    assert ended == {"stop", "length"} or ended == {"stop"}
    for row in rows:
        last = row["tokens"][-1]
        assert (row["finish_reason"] == "stop") == (last in (DIGITS.special_ids["<|endoftext|>"], 7))
        assert "<|endoftext|>" not in row["text"] and ("7" in row["text"]) == (last == 7)
    with pytest.raises(ValueError, match="fit the context of 24 tokens, got 2 \\+ 23"):
        rl.rollout(model, DIGITS, ["1="], 23)
    assert rl.rollout(model, DIGITS, [], 4) == []


def test_only_end_tokens_end_a_text_not_all_special_ones():
    tags = Tokenizer(DIGITS.vocab, [], ["<|endoftext|>", "<think>", "</answer>"])
    assert rl.end_ids(tags) == (tags.special_ids["<|endoftext|>"],)
    assert rl.end_ids(Words(eos=9)) == (9,) and rl.end_ids(Words(eos=None)) == ()
    assert rl.pad_id(Words(pad=None)) == 2 and rl.pad_id(Words(pad=None, eos=None)) == 0


def test_tokens_that_were_added_to_a_tokenizer_are_in_the_text_and_end_it():
    class Added(Words):  # Hugging Face's vocab_size omits what was added, its len() does not
        vocab_size = 3

        def __len__(self):
            return 3 + len(self.words)

    tokenizer, model = Added(), Logits(vocab_size=8)
    ids = tokenizer.encode("a </think> </answer>", add_special_tokens=False)
    model.table.data.zero_()[ids, [*ids[1:], 2]] = 50.0  # each is followed by the next, the last by the end
    (row,) = rl.rollout(model, tokenizer, [ids[:1]], 6, temperature=0)
    assert row["text"] == "</think> </answer>" and row["finish_reason"] == "stop"
    (row,) = rl.rollout(model, tokenizer, [ids[:1]], 6, temperature=0, stop=["</think>"])
    assert row["text"] == "</think>" and len(row["tokens"]) == 1


def test_a_sequence_begins_with_the_begin_token_of_its_tokenizer_once():
    ours = Tokenizer(DIGITS.vocab, [], ["<|endoftext|>", "<|begin_of_text|>"])
    begin = ours.special_ids["<|begin_of_text|>"]
    for text in ("12", "<|begin_of_text|>12"):
        assert rl.encode_prompt(ours, text) == [begin, 1, 2]
        assert rl.encode_prompt(DIGITS, "12") == [1, 2]
    assert rl.encode_prompt(Words(), "a b") == [1, 3, 4]
    assert rl.encode_prompt(Words(bos=2), "a b") == [3, 4]  # as GPT-2's, which begins with nothing


def test_the_begin_token_may_have_any_name_where_tokenizer_json_puts_it_first(tmp_path):
    ours = Tokenizer(DIGITS.vocab, [], ["<|endoftext|>", "<bos>"])
    begin, end = (ours.special_ids[t] for t in ("<bos>", "<|endoftext|>"))
    special = {"<bos>": {"id": "<bos>", "ids": [begin], "tokens": ["<bos>"]}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    for first, ids in ([{"SpecialToken": {"id": "<bos>", "type_id": 0}}], [begin, 1, 2]), ([], [1, 2]):
        template = {"type": "TemplateProcessing", "single": [*first, text], "pair": [text], "special_tokens": special}
        for processor in (template, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}):
            ours.post_processor = processor
            ours.save(tmp_path / "tokenizer.json")
            assert rl.encode_prompt(Tokenizer.load(tmp_path / "tokenizer.json"), "12") == ids and end not in ids


def test_any_model_and_any_tokenizer_do():
    class Bare:  # neither end nor begin, called as Hugging Face's are
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) % 5 for c in text], "attention_mask": [1] * len(text)}

        def decode(self, ids):
            return "".join(map(str, ids))

    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(5, 5))

        def forward(self, ids):
            return torch.nn.functional.dropout(self.table[ids], 0.5, self.training)

    def reward(response, truth):
        return {"reward": 0.0}

    noisy, table = Noisy(), torch.randn(5, 5)
    for model in (noisy, lambda ids: table[ids]):  # with a buffer, without anything
        first, second = (rl.log_generations(model, Bare(), ["ab"], ["x"], reward, 12, temperature=0)["examples"]
                         for _ in range(2))  # fmt: skip
        assert first == second and first[0]["length"] == 12
        batch = rl.tokenize_prompt_and_output(["ab"], ["cd"], Bare())
        assert batch["labels"].tolist() == [[3, 4, 0]]
        close(rl.compute_per_instance_dpo_loss(model.eval() if model is noisy else model, lambda ids: model(ids),
                                               Bare(), 0.1, "a", "b", "c"), math.log(2), **F32)
        noisy.train()
    rl.log_generations(noisy, Bare(), ["ab"], ["x"], reward, 2)
    assert noisy.training
    nothing = rl.log_generations(noisy, Bare(), [], [], reward)
    assert nothing["examples"] == [] and math.isnan(nothing["summary"]["length"])


def test_log_generations_gives_examples_and_the_means_over_them():
    def reward(response, truth):
        right = float(len(response) % 2 == 0)
        return {"reward": right, "format_reward": 1.0, "answer_reward": right}

    for model in (digit_model(), torch.nn.Sequential(digit_model())):
        log = rl.log_generations(model, DIGITS, ["1+1=", "2+2=", "5="], ["2", "4", "5"], reward, max_new_tokens=8)
        lengths = [e["length"] for e in log["examples"]]
        assert log["summary"]["length"] == pytest.approx(sum(lengths) / 3)
        assert [e["ground_truth"] for e in log["examples"]] == ["2", "4", "5"]
        right = [e["length"] for e in log["examples"] if e["reward"]]
        if right:
            assert log["summary"]["length_right"] == pytest.approx(sum(right) / len(right))
        assert 0 < log["summary"]["entropy"] <= math.log(13)


# -------------------------------------------------------------------------------------------------
# verbs

TINY = ("--task addition --digits 1 --max_new_tokens 3 --eval_problems 6 --eval_samples 2 --examples 30 "
        "--max_steps 4 --save_every 1 --eval_every 2 --device cpu --lr 3e-3").split()  # fmt: skip
SHAPE = "--context_length 12 --d_model 16 --num_layers 1 --num_heads 2 --d_ff 16".split()
SAMPLED = "--problems 60 --prompts_per_step 5 --group_size 8 --rollout_batch 16 --micro_batch_size 10".split()
VERBS = {
    "sft": ["--batch_size", "6"],
    "ei": [*SAMPLED, "--batch_size", "4", "--epochs", "2"],
    "grpo": [*SAMPLED, *"--kl_coef 0.1 --kl_in reward --dynamic_sampling 3 --updates_per_rollout 2 --epochs 2 "
             "--entropy_coef 0.01 --length_norm response".split()],
    "dpo": ["--batch_size", "6"],
}  # fmt: skip


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps(out):
    """What the log says of each step, but for times."""
    timed = {"elapsed_s", "step_ms", "tokens_per_s", "rollout_share"}
    return [{k: v for k, v in r.items() if k not in timed} for r in records(out)[1:]]


def fails(capsys, argv, *patterns):
    """main(argv) exits with 2 and one line on stderr that has all patterns."""
    with pytest.raises(SystemExit) as stop:
        rl.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    for pattern in patterns:
        assert re.search(pattern, error[0]), error


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that knows some additions of one digit: what the other verbs start from."""
    out = tmp_path_factory.mktemp("start") / "sft"
    assert rl.main(["sft", *TINY, *SHAPE, "--max_steps", "60", "--save_every", "60", "--eval_every", "60",
                    "--lr", "0.02", "--out_dir", str(out)]) == 0  # fmt: skip
    return out / "model"


def flags(verb, start, out, *more):
    return [verb, *TINY, *VERBS[verb], "--model", str(start), "--out_dir", str(out), *more]


def test_sft_learns_and_leaves_log_checkpoint_and_model(start):
    first, *rest = records(start.parent)
    losses = [r["loss"] for r in rest if "loss" in r]
    assert first["flags"]["task"] == "addition" and len(losses) == 60
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert "pass@2" in rest[-1] and rest[-1]["step"] == 60
    model, tokenizer = lm.load_model(start)
    assert tokenizer.sha256 == DIGITS.sha256
    assert lm.read_checkpoint(start.parent / "checkpoint.pt")["iteration"] == 60


def test_a_step_of_grpo_logs_what_happened(start, tmp_path, capsys):
    assert rl.main(flags("grpo", start, tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.count("the loss is no measure") == 1 and "near zero" not in out  # there is a bonus in it
    assert rl.main(flags("grpo", start, tmp_path / "plain", "--entropy_coef", "0", "--max_steps", "2")) == 0
    assert capsys.readouterr().out.count("a loss near zero is normal") == 1
    line = next(line for line in out.splitlines() if line.startswith("step 2/4 | loss"))
    for word in ("reward", "format", "answer", "no signal", "len", "len wrong", "entropy", "clip-", "clip+", "kl",
                 "gap", "norm", "tok/s", "rollout"):  # fmt: skip
        assert f"| {word} " in line or word == "tok/s" and word in line, (word, line)
    assert all(r["gap"] <= r["gap_max"] < 1e-4 for r in records(tmp_path) if "gap" in r)
    assert all(math.isfinite(v) for r in steps(tmp_path) for v in r.values())
    assert [r["step"] for r in records(tmp_path) if "pass@2" in r] == [0, 4]  # what the steps have changed


def test_steps_of_rollouts_that_a_run_keeps_draw_from_the_weights_of_now(start, tmp_path, monkeypatch):
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    assert rl.main(flags("grpo", start, plain)) == 0
    made, init = [], lm.DecodeStep.__init__
    monkeypatch.setattr(lm, "replays", lambda device: True)
    monkeypatch.setattr(lm.DecodeStep, "__init__", lambda step, *args: made.append(args[2]) or init(step, *args))
    assert rl.main(flags("grpo", start, kept)) == 0
    assert made and len(made) == len({*made})  # one a size of batch, for all steps and evaluations
    names = ("reward", "length", "no_signal", "entropy", "greedy", "pass@2")
    for a, b in zip(steps(plain), steps(kept), strict=True):
        assert {k: a[k] for k in names if k in a} == pytest.approx({k: b[k] for k in names if k in b}, abs=1e-4)


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_is_resumed_gives_the_same_numbers_bit_for_bit(verb, start, tmp_path):
    assert rl.main(flags(verb, start, tmp_path / "whole")) == 0
    assert rl.main(flags(verb, start, tmp_path / "cut", "--max_steps", "2")) == 0
    assert rl.main([verb, "--resume", "--out_dir", str(tmp_path / "cut"), "--max_steps", "4"]) == 0
    whole, cut = (steps(tmp_path / name) for name in ("whole", "cut"))
    cut = [r for r in cut if "pass@2" not in r or r["step"] == 4]  # the end of the first part
    assert [r for r in cut if "loss" in r] == [r for r in whole if "loss" in r]
    assert cut[-1] == whole[-1]
    weights = [lm.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")]
    for name, tensor in weights[0]["model"].items():
        assert tensor.equal(weights[1]["model"][name])


def test_a_rate_without_decay_follows_the_rate_that_a_resumed_run_is_given(start, tmp_path):
    sft = flags("sft", start, tmp_path, "--max_steps", "2")
    assert rl.main(sft) == 0
    assert rl.main(["sft", "--resume", "--out_dir", str(tmp_path), "--max_steps", "4", "--lr", "1e-4"]) == 0
    assert [r["lr"] for r in steps(tmp_path) if "lr" in r] == [3e-3] * 2 + [1e-4] * 2


def test_a_shape_without_a_hugging_face_class_is_trained_and_said_to_be_left_in_the_checkpoint(tmp_path, capsys):
    assert rl.main(["sft", *TINY, *SHAPE, "--pos", "none", "--max_steps", "1", "--out_dir", str(tmp_path)]) == 0
    assert re.search(r"model was not written \(.*keep the checkpoint instead\) after", capsys.readouterr().out)
    assert not (tmp_path / "model").exists()
    grpo = flags("grpo", tmp_path, tmp_path / "g", "--max_steps", "1")
    assert rl.main(grpo) == 0


def test_a_run_that_is_killed_goes_on_bit_for_bit(start, tmp_path):
    argv = flags("grpo", start, tmp_path / "killed", "--max_steps", "100000", "--eval_every", "100000")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, ROOT / "rl.py", *argv], env=env, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "killed" / "checkpoint.pt.prev").exists():  # two steps are saved
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = lm.read_checkpoint(tmp_path / "killed" / "checkpoint.pt")["iteration"]
    end = str(saved + 2)
    assert rl.main(["grpo", "--resume", "--out_dir", str(tmp_path / "killed"), "--max_steps", end]) == 0
    assert rl.main(flags("grpo", start, tmp_path / "whole", "--max_steps", end, "--eval_every", "100000")) == 0
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_run_that_is_killed_before_it_evaluates_does_so_when_it_goes_on(step, start, tmp_path, monkeypatch):
    def killed(run):
        if run.step == step:
            raise KeyboardInterrupt
        plain(run)

    plain = rl.validate
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rl, "validate", killed)
        rl.main(flags("sft", start, tmp_path / "killed"))
    assert rl.main(["sft", "--resume", "--out_dir", str(tmp_path / "killed"), *([] if step else flags(
        "sft", start, tmp_path)[1:-2])]) == 0  # fmt: skip
    assert rl.main(flags("sft", start, tmp_path / "whole")) == 0
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")
    before = records(tmp_path / "whole")
    assert rl.main(["sft", "--resume", "--out_dir", str(tmp_path / "whole")]) == 0
    assert records(tmp_path / "whole") == before  # what is done is not done again


def test_a_run_that_fails_at_once_leaves_nothing_and_overwrites_nothing(start, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("broken")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(rl, "rollout", broken)
        fails(capsys, flags("grpo", start, out), "broken")
        assert not out.exists()
        assert rl.main(flags("sft", start, out, "--eval_problems", "0")) == 0
        files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        fails(capsys, flags("grpo", start, out, "--overwrite"), "broken")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    fails(capsys, flags("grpo", out / "model", out, "--overwrite"), "must leave the model to start from")
    assert rl.main(flags("sft", start, out, "--overwrite", "--max_steps", "1")) == 0
    assert lm.read_checkpoint(out / "checkpoint.pt")["iteration"] == 1


def test_two_ranks_give_the_result_of_one(start, tmp_path):
    code = ("import sys, torch, rl\nfrom test_rl import VERBS, flags\nfrom pathlib import Path\n"
            "import torch._dynamo  # see rl.start_ranks\n"
            "torch.distributed.init_process_group('gloo')\n"
            "for verb in VERBS:\n    assert rl.main(flags(verb, sys.argv[1], Path(sys.argv[2]) / verb)) == 0\n"
            "torch.distributed.destroy_process_group()\n")  # fmt: skip
    (tmp_path / "ranks.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           tmp_path / "ranks.py", start, tmp_path / "two"], env=env, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for verb in VERBS:
        assert rl.main(flags(verb, start, tmp_path / "one" / verb)) == 0
        one, two = (steps(tmp_path / n / verb) for n in ("one", "two"))
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):  # the order of adding up differs
            assert a.keys() == b.keys()
            rounding = ("gap", "gap_max")
            assert {k: pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in a.items() if k not in rounding} == \
                {k: v for k, v in b.items() if k not in rounding}  # fmt: skip


def test_expert_iteration_trains_on_what_is_rewarded_alone(start, tmp_path, monkeypatch):
    trained = []
    plain = rl.sft_loss
    monkeypatch.setattr(rl, "sft_loss", lambda run, rows, tokens: (trained.extend(rows), plain(run, rows, tokens))[1])
    updates, update = [], rl.Run.update
    monkeypatch.setattr(rl.Run, "update", lambda *args: (updates.append(update(*args)), updates[-1])[1])
    assert rl.main(flags("ei", start, tmp_path)) == 0
    assert trained and all(row["reward"] == 1 for row in trained)
    logged = [r for r in records(tmp_path) if "kept" in r]
    assert sum(r["kept"] for r in logged) * 2 == len(trained)  # two epochs
    for r in logged:  # means over a step's updates
        of_step = [updates.pop(0) for _ in range(2 * -(-r["kept"] // 4))]
        for name in ("loss", "grad_norm") if of_step else ():
            assert r[name] == pytest.approx(sum(u[name] for u in of_step) / len(of_step))
    assert not updates


def test_dpo_starts_at_ln_2_and_learns_to_prefer(start, tmp_path):
    assert rl.main(flags("dpo", start, tmp_path, "--max_steps", "40", "--lr", "0.01", "--save_every", "40")) == 0
    losses = [r for r in records(tmp_path) if "loss" in r]
    assert losses[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0]["accuracy"] == 0.5  # ties count half
    assert sum(r["accuracy"] for r in losses[-5:]) / 5 > 0.9
    assert {"chosen", "rejected", "margin"} <= losses[0].keys()
    tokens = losses[0]["tokens_per_s"] * losses[0]["step_ms"] / 1e3  # of 12 sequences, an end in each
    assert tokens == pytest.approx(round(tokens)) and 12 * (4 + 1 + 1) <= round(tokens) <= 12 * (4 + 2 + 1)
    held = [r for r in records(tmp_path) if "held_out_loss" in r]
    assert (held[0]["step"], held[0]["held_out_accuracy"], held[-1]["step"]) == (0, 0.5, 40)
    assert held[0]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not any("greedy" in r for r in records(tmp_path))
    args = rl.parse(flags("dpo", start, tmp_path))
    problems, _, _ = rl.task_problems(args, rl.addition_task(args))
    pairs = rl.task_preferences([{**p, "response": p["answer"]} for p in problems])
    (policy, tokenizer), (reference, _) = lm.load_model(tmp_path / "model"), lm.load_model(start)
    expected = []
    for p in pairs:
        sides = [rl.pad_pairs([(tokenizer.encode(p["prompt"]), [*tokenizer.encode(p[side]), *rl.end_ids(tokenizer)])])
                 for side in ("response", "rejected")]  # fmt: skip
        sums = [rl.token_log_probs(m, *side.values())[0].sum() for m in (policy, reference) for side in sides]
        expected.append(rl.dpo_loss(*sums, args.beta).item())
    assert held[-1]["held_out_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)  # float32


def test_preferences_of_a_task_pair_a_right_response_with_anothers():
    pairs = [{"prompt": str(i), "response": r} for i, r in enumerate("aabc")]
    made = [(p["prompt"], p["response"], p["rejected"]) for p in rl.task_preferences(pairs)]
    assert made == [("1", "a", "b"), ("2", "b", "c"), ("3", "c", "a")]


def byte_model(folder, **config):
    """A model of bytes in a Hugging Face folder."""
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    lm.save_pretrained(tiny_model(tokenizer.vocab_size, **config), tokenizer, folder)
    return ["--model", str(folder), "--device", "cpu", "--max_steps", "2", "--lr", "1e-3"]


def test_files_are_learnt_from_in_every_verb_and_what_is_too_long_is_counted(tmp_path, capsys):
    base = byte_model(tmp_path / "m", context_length=64)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": "1+1=", "response": "\\boxed{2}", "ground_truth": "2"},
        {"prompt": "1+2=", "response": "\\boxed{4}", "ground_truth": "3"},
        {"prompt": "1+3=", "response": "\\boxed{4}" + " " * 60, "ground_truth": "4"}])  # fmt: skip
    sft = ["sft", *base, "--data", pairs, "--batch_size", "2"]
    assert rl.main([*sft, "--out_dir", str(tmp_path / "a")]) == 0
    assert "dropped 1 of 3 examples" in capsys.readouterr().out
    assert rl.main([*sft, "--correct_only", "--out_dir", str(tmp_path / "b")]) == 0
    assert "2 of 3 examples have a right answer, 0 no ground_truth" in capsys.readouterr().out
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": "1+1=", "response": "3", "ground_truth": "2"},
                                                   {"prompt": "1+1=", "response": "2"}])  # fmt: skip
    fails(capsys, ["sft", *base, "--data", wrong, "--correct_only", "--out_dir", str(tmp_path / "w")],
          "needs right answers, got none: 0 of 2 .*, 1 no ground_truth")
    assert rl.main([*sft, "--packed", "--out_dir", str(tmp_path / "c")]) == 0
    problems = write_jsonl(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "#### 2"},
                                                  {"question": "?" * 70, "answer": "#### 3"}])  # fmt: skip
    grpo = ["grpo", *base, "--data", problems, "--valid_data", problems, "--max_new_tokens", "4",
            "--prompts_per_step", "1", "--group_size", "2", "--eval_samples", "0"]  # fmt: skip
    assert rl.main([*grpo, "--out_dir", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "dropped 1 of 2 prompts" in out and "not used" not in out
    assert rl.main([*grpo, "--out_dir", str(tmp_path / "d2"), "--examples", "1", "--problems", "3"]) == 0
    out = capsys.readouterr().out
    assert "dropped 1 of 2 prompts" in out and out.count("dropped") == 1  # the held-out ones
    assert "not used in this run: --problems\n" in out
    more = ["--kl", "k1", "--surrogate", "ratio", "--clip_low", "0.1", "--out_dir", str(tmp_path / "d3")]
    assert rl.main([*grpo, *more]) == 0
    assert "not used in this run: --kl, --clip_low\n" in capsys.readouterr().out
    fails(capsys, [*grpo, "--dual_clip", "0.5", "--out_dir", str(tmp_path / "d4")], "dual_clip must be above 1")
    fails(capsys, [*grpo, "--out_dir", problems], "out_dir must be a folder")
    assert rl.main([*sft, "--max_steps", "1", "--prompt", "r1_zero", "--context_length", "600",
                    "--out_dir", str(tmp_path / "r1")]) == 0  # fmt: skip
    assert "not used" not in capsys.readouterr().out
    assert records(tmp_path / "d")[-1]["greedy"] in (0, 1)
    run = rl.Run(rl.parse([*grpo, "--prompt", "r1_zero", "--context_length", "600", "--stop", "\n\n",
                           "--out_dir", str(tmp_path / "d5")]))  # fmt: skip
    assert run.stop == ("</answer>", "\n\n")
    preferences = write_jsonl(tmp_path / "f.jsonl", [{"prompt": "hi", "chosen": "yes", "rejected": "no"}])
    dpo = ["dpo", *base, "--data", preferences, "--batch_size", "1", "--out_dir"]
    assert rl.main([*dpo, str(tmp_path / "e")]) == 0
    assert "held-out" not in capsys.readouterr().out
    assert rl.main([*dpo, str(tmp_path / "e2"), "--valid_data", preferences]) == 0
    assert records(tmp_path / "e2")[1]["held_out_accuracy"] == 0.5
    assert rl.main([*sft, "--valid_data", problems, "--max_new_tokens", "4", "--out_dir", str(tmp_path / "g")]) == 0
    assert records(tmp_path / "g")[-1]["greedy"] in (0, 1)


def test_countdown_runs_through_sft_and_grpo(tmp_path):
    common = ("--task countdown --numbers 3 --max_new_tokens 40 --eval_problems 3 --examples 20 --max_steps 2 "
              "--device cpu --eval_samples 0").split()  # fmt: skip
    shape = "--context_length 128 --d_model 16 --num_layers 1 --num_heads 2 --d_ff 16".split()
    assert rl.main(["sft", *common, *shape, "--batch_size", "4", "--out_dir", str(tmp_path / "sft")]) == 0
    assert rl.main(["grpo", *common, "--model", str(tmp_path / "sft/model"), "--problems", "9", "--prompts_per_step",
                    "2", "--group_size", "2", "--algorithm", "dr_grpo", "--out_dir", str(tmp_path / "grpo")]) == 0  # fmt: skip
    assert records(tmp_path / "grpo")[0]["flags"]["length_norm"] == "constant"


def test_problems_of_several_kinds_are_also_reported_by_kind(tmp_path, monkeypatch):
    def reward(response, numbers, target):
        right = float(len(numbers) == 3)
        return {"reward": right, "format_reward": right, "answer_reward": right}

    monkeypatch.setattr(rl, "countdown_reward", reward)
    assert rl.main("sft --task countdown --numbers 3 4 --max_new_tokens 2 --eval_problems 3 --examples 20 --max_steps 1 "
                   "--device cpu --eval_samples 2 --context_length 128 --d_model 16 --num_layers 1 --num_heads 2 "
                   f"--d_ff 16 --batch_size 4 --out_dir {tmp_path / 'sft'}".split()) == 0  # fmt: skip
    last = next(r for r in records(tmp_path / "sft") if "pass@2" in r)
    for name in ("greedy", "pass@1", "pass@2"):
        assert [last[name], last[f"{name} of 3 numbers"], last[f"{name} of 4 numbers"]] == [2 / 3, 1, 0]


def test_preferences_of_countdown_choose_right_answers_only(tmp_path):
    args = rl.parse("dpo --task countdown --numbers 3 --eval_problems 9 --examples 60 --device cpu --context_length 112 "
                    f"--d_model 16 --num_layers 1 --num_heads 2 --d_ff 16 --out_dir {tmp_path}".split())  # fmt: skip
    args.min_lr = args.lr
    run = rl.Run(args)
    assert 20 < len(run.examples) < 60  # the others gave up
    problems = {p["prompt"]: p["answer"] for p in run.task.problems(69)}
    for row in run.examples + run.held_out:
        prompt, response = (run.tokenizer.decode(row[k]) for k in ("prompt_ids", "tokens"))
        assert rl.countdown_reward(response.removesuffix("<|endoftext|>"), *problems[prompt]) == RIGHT


def test_grpo_goes_on_behind_the_problems_that_its_model_has_learnt_from(tmp_path, monkeypatch):
    sft = ("sft --task addition --digits 2 --examples 50 --eval_problems 4 --max_steps 1 --batch_size 2 --device cpu "
           f"--max_new_tokens 4 --d_model 16 --num_layers 1 --num_heads 2 --d_ff 16 --out_dir {tmp_path / 'sft'}")  # fmt: skip
    assert rl.main(sft.split()) == 0
    task = rl.addition_task(rl.parse(sft.split()))
    for given, first in (([], 54), (["--examples", "7"], 11), (["--eval_problems", "2"], 54)):
        for model in ("sft/model", "sft"):
            args = rl.parse(["grpo", "--task", "addition", "--digits", "2", "--eval_problems", "4", *given,
                             "--model", str(tmp_path / model)])  # fmt: skip
            held, _, unsolved = rl.task_problems(args, task, 5)
            assert (held, unsolved) == (task.problems(args.eval_problems), task.problems(first + 5)[first:])
            assert (args.examples, args.held) == (first - 4, 4)  # so in the log, for whoever goes on from there
    for before, now, held, first in (("3 4", "3", 5, 25), ("3", "3 4", 20, 100), ("3 4", "3 4", 10, 50)):
        former = dict(task="countdown", digits=3, numbers=[*map(int, before.split())], held=10, examples=40)
        args = rl.parse(f"grpo --task countdown --numbers {now} --model x --eval_problems 5".split())
        with monkeypatch.context() as patch:  # so many of each kind of problems have been learnt from
            patch.setattr(rl.lm, "saved_flags", lambda folder, former=former: former)
            task = SimpleNamespace(problems=lambda n: [*range(n)])
            assert rl.task_problems(args, task, 3) == ([*range(5)], [], [first, first + 1, first + 2])
        assert args.held == held
    with pytest.raises(ValueError, match="--eval_problems must be at most the 4 that were held out before, got 5"):
        rl.task_problems(rl.parse([*sft.split(), "--eval_problems", "5", "--model", str(tmp_path / "sft")]), task)


def test_an_algorithm_is_a_set_of_flags_that_others_override():
    for name, changes in rl.ALGORITHMS.items():
        args = vars(rl.parse(["grpo", "--algorithm", name]))
        assert {k: args[k] for k in changes} == changes
    args = rl.parse(["grpo", "--algorithm", "dapo", "--clip_high", "0.4"])
    assert (args.clip_high, args.overlong) == (0.4, "mask")


def test_a_resumed_run_takes_another_algorithm_whole_and_keeps_what_was_given_to_its_own(tmp_path):
    given = ["grpo", "--algorithm", "dapo", "--clip_high", "0.4", "--lr", "1e-3"]
    write_jsonl(tmp_path / "log.jsonl", [{"flags": {**vars(rl.parse(given)), "take_step": None, "prepare": None,
                                                    "measure": None, "run": None}}])  # fmt: skip
    resume = ["grpo", "--resume", "--out_dir", str(tmp_path)]
    for name, clip_high in (("dapo", 0.4), ("dr_grpo", 0.2)):
        args, fresh = rl.parse([*resume, "--algorithm", name]), rl.parse(["grpo", "--algorithm", name])
        assert (args.lr, args.clip_high) == (1e-3, clip_high)
        assert {k: getattr(args, k) for k in rl.ALGORITHMS[name]} == rl.ALGORITHMS[name] | (
            {"clip_high": clip_high} if name == "dapo" else {})
        assert args.overlong == fresh.overlong and args.dynamic_sampling == fresh.dynamic_sampling


def test_commands_of_the_readme_are_accepted():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(`python rl\.py[^`\n]*)\n([^`\n]*`)", r"\1 \2", text)  # one in prose may go over a line's end
    commands = re.findall(r"python rl\.py ((?:sft|ei|grpo|dpo|eval|bench|plot)\b[^`#;|\n]*)", text)
    commands = [shlex.split(c.replace("$n", "8")) for c in commands if not {"--help", "..."} & {*c.split()}]
    assert len(commands) > 12
    for words in commands:
        assert rl.parse(words).verb == words[0]


def test_held_out_problems_are_in_no_training_set(start):
    args = rl.parse(flags("grpo", start, "x"))
    task = rl.addition_task(args)
    held, solved, _ = rl.task_problems(args, task)
    held_again, _, unsolved = rl.task_problems(args, task, args.problems)
    assert [p["prompt"] for p in task.problems(64)[:9]] == [p["prompt"] for p in task.problems(9)]
    prompts = [{p["prompt"] for p in part} for part in (held, solved, unsolved)]
    assert held == held_again and [len(p) for p in prompts] == [6, 30, 60]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_it_is_said_when_nothing_has_taught_anything_for_many_steps(tmp_path, capsys):
    data = write_jsonl(tmp_path / "p.jsonl", [{"question": "What?", "answer": "~"}])  # no response has it
    argv = ["grpo", *byte_model(tmp_path / "m"), "--data", data, "--max_new_tokens", "4", "--max_steps", "10",
            "--prompts_per_step", "1", "--group_size", "2", "--out_dir", str(tmp_path / "out")]  # fmt: skip
    assert rl.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("taught anything for 10 steps") == 1
    assert "1 of 1 answers cannot be read" in out


def test_a_gap_between_sampling_and_training_stops_the_run(start, tmp_path, capsys, monkeypatch):
    argv = flags("grpo", start, tmp_path, "--epochs", "1", "--dynamic_sampling", "0")
    fails(capsys, [*argv, "--max_gap", "0"], "must agree to 0.0, got a mean gap of .* at step 1")
    plain = rl.rollout

    def one_token_off(*args, **kwargs):
        rows = plain(*args, **kwargs)
        rows[-1]["logprobs"][0] += 0.5
        return rows

    monkeypatch.setattr(rl, "rollout", one_token_off)
    fails(capsys, [*argv, "--overwrite"], "must agree to 0.0001, .* the largest 5.00e-01, at step 1")


def test_a_gradient_that_is_no_number_stops_the_run(start, tmp_path, capsys):
    fails(capsys, flags("sft", start, tmp_path, "--lr", "1e30"), "gradient must be finite.*at step")


def test_bad_input_is_refused_in_one_line(start, tmp_path, capsys, monkeypatch):
    out, task = ["--out_dir", str(tmp_path / "out")], ["--task", "addition", "--device", "cpu"]
    model = ["--model", str(start), *out]
    fails(capsys, ["grpo", "--data", "x", *out], "--model or --task must say what to train")
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "response": "b"}])
    packed = ["sft", "--packed", "--data", one, *byte_model(tmp_path / "bytes", context_length=300), *out]
    fails(capsys, packed, "more than context_length = 300 tokens, got")
    fails(capsys, [*packed, "--examples", "1"], "takes a whole file")
    fails(capsys, ["sft", *task, "--packed", *out], "--task or --data must .* got task and packed")
    fails(capsys, ["grpo", *task, "--group_size", "1", *out], "at least 2 with a baseline")
    fails(capsys, ["sft", *task, *model, "--d_model", "8"], "leave those out")
    fails(capsys, ["grpo", *model], "--task or --data must")
    fails(capsys, ["sft", "--task", "countdown", *model], "another tokenizer")
    fails(capsys, ["sft", "--task", "countdown", "--numbers", "1", *out], "two numbers or more, got 1")
    fails(capsys, ["sft", *model, "--data", str(tmp_path / "none.jsonl")], "none.jsonl")
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "", "response": "x"}])
    fails(capsys, ["sft", *model, "--data", empty], "empty.jsonl:1")
    missing = write_jsonl(tmp_path / "missing.jsonl", [{"prompt": "a", "other": "x"}])
    fails(capsys, ["sft", *model, "--data", missing], "missing.jsonl:1")
    fails(capsys, ["grpo", *task, "--digits", "1", *out], "as many problems as are asked for")
    fails(capsys, ["grpo", *task, "--overlong_buffer", "9", "--max_new_tokens", "8", *out], "got 9 and 8")
    fails(capsys, ["sft", *task, "--lr", "1e-3", "--min_lr", "1e-2", *out], "got 0.01 and 0.001")
    for flag, value in (("--top_p", "2"), ("--clip_low", "2"), ("--stop", ""), ("--lr", "-1"), ("--kl", "k4")):
        fails(capsys, ["grpo", *task, *out, flag, value], f"argument {flag}: ")
    fails(capsys, ["grpo", *task, "--max_new_tokens", "50", *SHAPE, *out], "some prompts must fit")
    fails(capsys, ["grpo", *task, "--resume", "--out_dir", str(start.parent)], "same verb, got grpo for a run of sft")
    other = Path(write_jsonl(tmp_path / "log.jsonl", [{"flags": {"lr": 1e-3}}])).parent
    fails(capsys, ["grpo", *task, "--resume", "--out_dir", str(other)], "same verb, got grpo for a run of train.py")
    with monkeypatch.context() as patch:  # on two hosts, of which one lacks the checkpoint
        patch.setattr(rl.Run, "gather", lambda *_: torch.tensor([60.0, 0.0]))
        fails(capsys, ["sft", "--resume", "--out_dir", str(start.parent)], r"all ranks must .* got steps \[60, 0\]")
    lacking = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>", "<pad>"])
    lacking.save(tmp_path / "bytes/tokenizer.json")
    padded = write_jsonl(tmp_path / "padded.jsonl", [{"prompt": "a" * 400, "response": "<pad>"}])
    for more in ([], ["--packed"]):
        argv = ["sft", "--model", str(tmp_path / "bytes"), *more, "--data", padded, *out]
        fails(capsys, argv, "below the model's 257, got 257")
    fails(capsys, ["sft", *task, "--out_dir", str(start.parent)], "holds a run")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps({"model_type": "mamba"}))
    fails(capsys, ["sft", "--model", str(tmp_path / "odd"), *task, *out], "mamba")
    lm.save_pretrained(tiny_model(12), Tokenizer(dict(list(DIGITS.vocab.items())[:12]), [], []), tmp_path / "endless")
    fails(capsys, ["sft", "--model", str(tmp_path / "endless"), "--data", missing, *out], "token that ends a text")
    assert not (tmp_path / "out").exists()  # refused before any work


def test_bench_ends_in_one_line_of_json(capsys):
    assert not rl.main("bench --prompts 2 --group_size 2 --prompt_tokens 4 --new_tokens 4 --repeats 2 --device cpu "
                       "--vocab_size 50 --context_length 16 --d_model 16 --num_layers 1 --num_heads 2".split())  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rollout_tok_per_s"] > 0 and result["gap"] < 1e-4


def test_a_plot_has_a_panel_for_each_thing_that_its_runs_log_by_steps(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="plots need matplotlib").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(
        {(a.get_ylabel(), a.get_xlabel()): [line.get_xydata().tolist() for line in a.lines] for a in self.axes}))
    steps = [{"flags": {}}, {"step": 0, "elapsed_s": 1, "greedy": 0.25}] + [
        {"step": i, "elapsed_s": 3 * i, "reward": i / 10, "entropy": 2 - i, "loss": 0} for i in (1, 2)]  # fmt: skip
    logs = [write_jsonl(tmp_path / name, steps) for name in ("a.jsonl", "b.jsonl")]
    rl.main(["plot", *map(str, logs)])
    (panels,) = drawn
    assert panels["reward or loss", "step"] == [[[1, 0.1], [2, 0.2]]] * 2
    assert panels["entropy, nats a token", "step"] == [[[1, 1], [2, 0]]] * 2
    assert panels["held-out data, share right", "step"] == [[[0, 0.25]]] * 2
    assert panels["held-out data, share right", "seconds"] == [[[1, 0.25]]] * 2
    assert len(panels) == 4
    pairs = [{"step": 1, "elapsed_s": 1, "loss": 0.6},
             {"step": 2, "elapsed_s": 2, "held_out_accuracy": 0.9, "held_out_loss": 0.5}]  # fmt: skip
    rl.main(["plot", write_jsonl(tmp_path / "dpo.jsonl", pairs)])
    assert drawn[-1]["held-out data, share right", "step"] == [[[2, 0.9]]]
    assert drawn[-1]["held-out data, loss", "step"] == [[[2, 0.5]]]


def test_packed_pairs_that_are_held_out_have_the_loss_of_the_plain_definition(tmp_path, capsys):
    base = byte_model(tmp_path / "m", context_length=32)
    pairs = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "1+1=", "response": "2"}] * 3)
    other = write_jsonl(tmp_path / "v.jsonl", [{"prompt": "say", "response": "so be it"}] * 2)
    out = tmp_path / "out"
    assert rl.main(["sft", *base, "--data", str(pairs), "--valid_data", str(other), "--packed", "--batch_size", "2",
                    "--micro_batch_size", "3", "--lr", "0.01", "--out_dir", str(out)]) == 0  # fmt: skip
    assert "13 windows of 32 tokens: one pass is 7 steps" in capsys.readouterr().out
    model = lm.from_pretrained(out / "model")
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    windows, losses = rl.PackedSFTDataset(tokenizer, other, 32, shuffle=False), []
    assert len(windows) > 2
    for window in windows:
        ends = window["input_ids"] == rl.end_ids(tokenizer)[0]
        documents = (ends.cumsum(0) - ends.long())[None]
        hidden = model.hidden_states(window["input_ids"][None], documents=documents)
        logits = hidden @ model.lm_head.weight.T
        losses.append(torch.nn.functional.cross_entropy(logits[0], window["labels"]).item())
    found = [r["held_out_loss"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines())
             if "held_out_loss" in r]  # fmt: skip
    assert found[-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5) and found[-1] < found[0]  # float32 sums


def test_a_plot_is_drawn_or_what_it_lacks_is_said(start, tmp_path, capsys, monkeypatch):
    argv = ["plot", str(start.parent / "log.jsonl"), "--out", str(tmp_path / "curves.png")]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        fails(capsys, argv, "needs matplotlib, got none")
    pytest.importorskip("matplotlib")
    assert not rl.main(argv)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "curves.png" in capsys.readouterr().out
    log = write_jsonl(tmp_path / "log.jsonl", [{"flags": {}}])
    fails(capsys, ["plot", log], "must hold steps to draw, got none")
    fails(capsys, ["plot", write_jsonl(tmp_path / "g.jsonl", [{"reward": 1.0}])], "must hold steps to draw")
    Path(log).write_text("step,loss\n")
    fails(capsys, ["plot", log], r"log\.jsonl must be a run's log")


def test_the_demonstration_compares_grpo_with_more_sft(tmp_path, capsys, monkeypatch):
    small = ["--examples 30 --digits 1 --eval_problems 4 --eval_samples 2 --device cpu", "--max_steps 3"]
    monkeypatch.setattr(rl, "DEMO", f"{rl.DEMO} {small[0]}")
    monkeypatch.setattr(rl, "DEMO_SFT", small[1])
    monkeypatch.setattr(rl, "DEMO_GRPO", "--max_steps 2 --prompts_per_step 2 --group_size 2 --problems 10")
    monkeypatch.setattr(rl, "DEMO_CONTROL", "--max_steps 2")
    assert rl.main(["demo", "--out_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    table = out[out.index("held-out problems solved") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["sft", "control", "grpo"]
    fails(capsys, ["demo", "--out_dir", str(tmp_path)], "holds a demonstration; give --overwrite")


def test_every_flag_says_what_it_means():
    _, verbs = rl.build_parser()
    for name, parser in verbs.items():
        flags = [a for a in parser._actions if a.option_strings and not a.required]
        assert all(a.help for a in flags), (name, [a.dest for a in flags if not a.help])
        assert parser.format_help()


pytestmark = pytest.mark.usefixtures("same_random_numbers_in_every_order_of_tests", "one_thread")
ROOT = Path(__file__).resolve().parent.parent
RIGHT, WRONG, UNFORMATTED = (
    dict(reward=right, format_reward=form, answer_reward=right) for right, form in ((1, 1), (0, 1), (0, 0)))

# -------------------------------------------------------------------------------------------------
# grading

SAME = [
    (r"{1 \over 3}", "1/3"), ("12 inches", r"12\text{ in}"), ("3 miles per hour", "3 mph"),
    ("60 min", r"60\text{ minutes}"), ("USD 20", "20"), (r"US\$20", "20 dollars"), ("5 EUR", "€5"), ("1.000,5", "1000.5"),
    (r"\emptyset", r"\varnothing"), (r"\{\}", r"\emptyset"), (r"\mathbb{R}", r"(-\infty, \infty)"),
    ("B) 12", "B"), (r"-\infty", r"-\infty"), (r"[3,4]\cup[1,2]", r"[1,2]\cup[3,4]"),
    (r"(-\infty,1)\cup(2,\infty)", "x<1 or x>2"), ("9 hrs", "9 hours"),
    ("5", "5"), ("5", "5.0"), ("1/2", "0.5"), (r"\frac12", "0.5"), (r"\frac{1}{2}", r"$\frac{1}{2}$"),
    (r"\dfrac{3}{4}", ".75"), (r"-\frac{3}{4}", r"\frac{-3}{4}"), ("7,425,000", "7425000"), ("1 000", "1000"),
    ("1000,99", "1000.99"), ("1,22", "1.22"), ("$1,000.99", "1000.99"), (r"10\%", "10"), ("10%", "0.1"),
    (r"10\%", r"10\%"), (r"10\text{ units}", "10"), (r"10\text{ cm}^2", "10"),
    (r"10 \text{ cm}^2", r"10\text{ square cm}"), (r"45^\circ", "45"), (r"45^{\circ}", "45 degrees"), (r"\$10", "10"),
    ("10 dollars", "$10"), ("5 million", "5000000"), ("$2.5 million", "2,500,000"), ("7 3/4", "7.75"),
    (r"7\frac34", "31/4"), (r"-7\frac{3}{4}", "-7.75"), (r"\frac1{72}", "1/72"), (r"\sqrt3", r"\sqrt{3}"),
    (r"\sqrt{12}", r"2\sqrt3"), (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"), ("(1,2)", "( 1, 2 )"),
    (r"\left(1,2\right)", "(1,2)"), ("[1,2)", "[1, 2)"), (r"\{1,2\}", "{2,1}"), ("1,2", "2, 1"), ("1 and 2", "1,2"),
    ("x=5", "5"), ("5", "x=5"), ("x=1 or x=2", "1,2"), (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"), (r"\pm 3", "3,-3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), (r"\text{Evelyn}", "evelyn"),
    ("(C)", "C"), (r"\text{(C)}", "C"), ("C. 12", "C"), ("(x+1)^2", "x^2+2x+1"), ("2x+4y+z-19=0", "z=19-2x-4y"),
    ("y=2x+3", "2x+3"), ("f(x)=2x+3", "2x+3"), (r"x \in [1,2]", "[1,2]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"), ("3+4i", "4i+3"), (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"), (r"\sin\frac{\pi}{6}", "1/2"), (r"\binom{5}{2}", "10"), ("5!", "120"),
    (r"0.\overline{3}", "1/3"), ("1101_2", "1101_{2}"), ("2^{2013}", "2^{2013}"), (r"1.5\times10^3", "1500"),
    ("1.5e3", "1500"), ("sqrt(2)/2", r"\frac{\sqrt2}{2}"), ("2*x**2", "2x^2"), ("√2", r"\sqrt2"), ("2π", r"2\pi"),
    (r"\boxed{5}", "5"), ("The answer is $x=5$. I hope it is correct.", "5"),
    (r"So the final answer is \boxed{\frac{1}{2}}.", "0.5"), ("Thus #### 42", "42"), ("2+3=5", "5"),
    (r"\frac{x}{2}", "0.5x"), (r"10,\!000", "10000"), ("1{,}000", "1000"), ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\text{June 20}", "June 20"), ("12:00", "12:00"), ("3:4", "3 : 4"), (r"\mathbb{R}", r"\mathbb R"),
    ("a_1+a_2", "a_2+a_{1}"), (r"\frac{1}{x-1}-\frac{1}{x+1}", r"\frac{2}{x^2-1}"), (r"(-\infty,5)", "x<5"),
    (r"\overline{AB}", r"\overline{AB}"), (r"\lfloor 3.7\rfloor", "3"), ("|-3|", "3"), (r"\sqrt[3]{-8}", "-2"),
    ("27^{1/3}", "3"), ("10^{-3}", "0.001"), (r"50^\circ\text{C}", "50"), (r"\textbf{(B)}", "B"), ("$5$ apples", "5"),
    (r"\$5", "5 dollars"), ("5 or -5", r"\pm5"), (r"\frac{3\pi}{2}", r"1.5\pi"), (r"\tan^{-1} x", r"\arctan x"),
    (r"2 \cdot 3^{4}", "162"), ("x^2 y", "yx^2"),
    (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), ("p - q", "-(q-p)"),
    ("18", "#### 18"), (r"36\pi \text{ cm}^3", r"36\pi"), (r"\frac{\pi}{4}", "pi/4"), ("{1, 2, 3}", r"\{3,2,1\}"),
    ("5,000", "5000"), ("-5", "−5"), ("2,3", "2.3"), ("2.35", "2,35"), (r"\sin\pi", "0"), (r"\cos\frac{5\pi}{2}", "0"),
    (r"(\sqrt2-1)(\sqrt2+1)-1", "0"), (r"\log_2(\sqrt2)", "1/2"), (r"\pi 10^{-20}", r"10^{-20}\pi"),
    ("xy", "yx"), ("Dry", "dry"), (r"x \cdot y", "xy"), ("(x,y)=(1,2)", "(1,2)"), ("f(2)=4", "4"), ("n!", "n!"),
    ("5 meters", "5 m"), ("5 m", "5m"), ("80 km/h", "80"), ("80 miles per hour", "80"), ("5€", "5"),
    (r"\angle ABC = 30^\circ", "30"),
    (r"1/3 \approx 0.333", "1/3"), (r"x = \sqrt2 ≈ 1.41", r"\sqrt2"), (r"\lg 100", "2"), ("a", "A"), ("(c)", "(C)"),
    ("x = 2, 3", "3, 2"), (r"x \ne 0", r"x\neq0"), (r"12\,\text{m/s}", "12 m/s"), (r"9.8 m/s^2", r"9.8\text{ m/s}^2"),
    ("x = 2, 3", "x=2, x=3"), ("-3<x<7", r"x \in (-3,7)"), (r"\cos 60^\circ", "1/2"),
    (r"\pm1, \pm i", "1,-1,i,-i"), (r"\frac{p}{q}=\frac59", "5/9"), (r"\frac{dy}{dx}=2x", "2x"),
    (r"\{x \mid x>1\}", r"(1,\infty)"), (r"\{ t : 0 \le t < 2 \}", "[0,2)"),
]  # fmt: skip
DIFFERENT = [
    ("1, 1, 2", "1, 2"), ("C. 12 or D. 13", "C"), ("1.2.3", "12.3."), ("x > 5", "y > 5"), (r"x \ge 5", "x > 5"),
    ("5 apples", "5 oranges"), (r"\$5", "5 cents"), ("45 degrees", "45 radians"), ("5 more", "5"), ("3 - 2 = 2", "2"),
    (r"[1,2]\cup[3,4]", "[1,2],[3,4]"), ("0^0", "1"), (r"1/\infty", "0"), (r"\infty+1", r"\infty"), ("1.000,5", "1.0005"),
    ("3 miles per hour", "3 km/h"), ("60 min", "60 h"), (r"\emptyset", "0"), (r"\mathbb{Z}", r"\mathbb{R}"),
    (r"{1 \over 2}", "2"), ("USD 5", "EUR 5"), ("B) 12", "C"), ("5 in", "5 ft"), ("9 in", "81"),
    ("0.33", "1/3"), ("3.14", r"\pi"), ("3.14159265358979", r"\pi"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"),
    ("(1,2)", r"\{1,2\}"), ("(1,2)", "1,2"), ("5 or 6", "5"), ("5, 6", "5"), ("10 m", "10 cm"), ("x=5", "y=5"),
    ("2+2=5", "5"), (r"10\%", r"1000\%"), ("10 million", "10"), ("2xy", "2"), ("3 quarters", "3"), ("east", "seat"),
    ("x^2+y^2=1", "1"), ("0=0", "x+y=3"), (r"\sqrt{x^2}", "x"), ("1101_2", "13"), ("yx", "xyz"),
    ("x>5", r"(5,\infty)"), ("5 squared", "5"), ("x=2,y=1", "x=1,y=2"), ("2,1", "x=1,y=2"), ("", "5"), ("", ""),
    ("5", ""), ("nan", "5"), (r"\frac{", r"\frac{"), ("{", "{"), ("9^9^9^9", "9^9^9^9"),
    ("2003^{2002^{2001}}", "2003^{2002^{2001}}"), ("10**10**8", "10**10**8"), ("1/0", "1/0"), ("x=5=6", "6"),
    ("no", "on"), ("A", "B"), ("(A) 5", "(B) 5"), ("-5", "5"), ("5", "-5"), ("1.414213562373095", r"\sqrt2"),
    ("x", "5"), ("5", "x"), ("2x", "x"), ("12", "1,2"), ("1:2", "0.5"), ("5!", "5"), ("x=1", "1,2"), ("2^{10}", "10"),
    ("not 5", "5"), (r"\text{not }5", "5"), ("2.3", "2,3"), ("2.3", "x=2,3"), (r"\pi 10^{-16}", "0"),
    (r"\sqrt{2}\times 10^{-19}", r"\sqrt{3}\times 10^{-19}"), (r"\exp(-40)", "0"),
    (r"(1+\sqrt2)10^{-19}", r"(1+\sqrt3)10^{-19}"), ("(y,x)=(1,2)", "(1,2)"), ("(x,y)=5", "5"), ("f(2)=4", "f(4)=8"),
    ("x(2)=4", "4"), ("n!", "n"), ("n!", "m!"), ("5 m", "5 km"), ("5 m", "5 g"), ("80 km/h", "80 mph"), ("5€", "$5"),
    (r"1/3 \approx 0.333", "0.333"), (r"x \approx 0.333", "x"), (r"x \approx 0.333", "1/3"), (r"\approx 5", "5"),
    ("A", "a"), ("x", "X"),
    ("on", "no"), ("5m", "5"), ("x=2, 3", "y=2, y=3"), ("x=2, 3", "x=2, y=3"), ("-3<y<7", r"x \in (-3,7)"),
    (r"-3 \le x<7", r"x \in (-3,7)"), (r"\{x \mid x>1\}", r"[1,\infty)"), (r"\{3:4\}", "4"),
    (r"\frac{q}{p}=5/9", "p/q=5/9"), (r"\{x \mid 5\}", "5"), (r"\cos 60^\circ", "60"), (r"\pm1, \pm i", "1,i"), ("1<v<2", "(1,2)"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_spellings_of_one_value_match(answer, gold):
    assert rl.answers_match(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_what_is_not_the_same_value_does_not_match(answer, gold):
    assert not rl.answers_match(answer, gold)


def test_numbers_are_graded_like_their_texts():
    assert rl.answers_match(5, 5.0) and rl.answers_match("0.5", 0.5)
    assert not rl.answers_match(float("nan"), float("nan"))


@pytest.mark.parametrize("gold", [None, "None", "N/A", "null", math.nan, "", " ", ".", "{", r"\frac{",
                                  "(1, 2", "1/0", "9^9^9^9", r"0^{-1}", "???",
                                  r"2003^{2002^{2001}}", "10**10**8", "1000!", "x^{9999999}", r"\log 0",
                                  r"e^{e^{e^{e^e}}}", "(" * 400 + "1" + ")" * 400, "2^" * 400 + "2",
                                  "9" * 5000, r"\sin" * 300 + "1", "-" * 999 + "1)", "2 + 2 = 5"])  # fmt: skip
def test_a_gold_that_cannot_be_read_is_told_and_never_rewarded(gold):
    assert not rl.is_gradable(gold) and rl.is_gradable("5")
    boxed = rf"</think> <answer>\boxed{{{gold}}}</answer>"
    for response in (str(gold), "5", "", boxed, f"</think> <answer>{gold}</answer>"):
        assert not rl.answers_match(response, gold)
        assert rl.r1_zero_reward(response, gold)["reward"] == 0
        assert rl.question_only_reward(response, gold)["reward"] == 0


def test_a_bracket_type_is_part_of_an_interval_and_of_no_list():
    for a, b in itertools.permutations(["(1, 2)", "[1, 2)", "(1, 2]", "[1, 2]", r"\{1, 2\}"], 2):
        assert rl.answers_match(a, a) and not rl.answers_match(a, b)


def test_an_inequality_may_be_answered_by_its_interval_but_does_not_answer_one():
    for inequality, interval in ((r"0 < x \le 1", "(0, 1]"), ("x > 5", r"(5, \infty)"), (r"7 \geq y", r"(-\infty, 7]"),
                                 (r"5 < x < \infty", r"(5, \infty)")):
        assert rl.answers_match(interval, inequality) and rl.answers_match(inequality, inequality)
        assert not rl.answers_match(inequality, interval)


def test_random_fractions_match_exactly_when_they_are_equal():
    rng = random.Random(0)
    for _ in range(2000):
        a, b, c, d = (rng.randint(-12, 12) or 1 for _ in range(4))
        spelled = rng.choice([rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"({a})/({b})", rf"${a} \div {b}$"])
        assert rl.answers_match(spelled, rf"\dfrac{{{c}}}{{{d}}}") == (Fraction(a, b) == Fraction(c, d))


def test_random_polynomials_match_exactly_when_their_coefficients_are_equal():
    rng = random.Random(0)
    for _ in range(300):
        p, q, r, s = (rng.randint(1, 4) for _ in range(4))
        expanded = f"{p * r}x^2 + {p * s + q * r}xy + {q * s}y^{{2}}"
        assert rl.answers_match(f"({p}x + {q}y)({r}x + {s}y)", expanded)
        assert not rl.answers_match(f"({p}x + {q}y)({r}x + {s + 1}y)", expanded)


def test_the_answer_is_found_where_responses_put_it():
    for response, answer in [
            (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
            (r"\boxed{1} and \boxed{2}", "1, 2"), (r"\boxed{1}. Then \boxed{2}", "2"), (r"\boxed 5 ok", "5"),
            (r"\fbox{7}", "7"), (r"\boxed{3", None), (r"\boxed{\boxed{4}}", "4"), ("none", None)]:  # fmt: skip
        assert rl.last_boxed(response) == answer
    for response, answer in [
            ("<answer>1</answer> <answer>2</answer>", "2"), ("16 - 3 = 13\n#### 13", "13"),
            ("So the final answer is 42. Good luck!", "42"), ("Answer: $x = 3$.", "$x = 3$"),
            (r"Hence \(y = 2\) is what we want", "$y = 2$"), ("x" * 5000, ""), ("17", "17")]:  # fmt: skip
        assert rl.final_answer(response) == answer


@pytest.mark.parametrize(("response", "free", "strict"), [
    ("2 + 3</think> <answer>5</answer>", RIGHT, RIGHT), ("2 + 3</think> <answer> \\boxed{5} </answer>", RIGHT, RIGHT),
    ("hm</think>\n\n<answer>5</answer>", RIGHT, UNFORMATTED), ("hm</think><answer>5</answer>", RIGHT, UNFORMATTED),
    ("hm</think> <answer>6</answer>", WRONG, WRONG), ("hm</think> <answer>5", UNFORMATTED, UNFORMATTED),
    ("hm <answer>5</answer>", UNFORMATTED, UNFORMATTED), ("5", UNFORMATTED, UNFORMATTED),
    ("", UNFORMATTED, UNFORMATTED),
    ("</answer></think> <answer>5", UNFORMATTED, UNFORMATTED),
    ("<answer>5</answer> </think> <answer> oops", UNFORMATTED, UNFORMATTED),
    ("</think> <answer>5</answer> no </think> <answer>6</answer>", WRONG, WRONG),
    ("a</think> <answer>6</answer> <answer>5</answer>", RIGHT, RIGHT)])  # fmt: skip
def test_r1_zero_reward_wants_tags_then_the_answer(response, free, strict):
    assert rl.r1_zero_reward(response, "5") == free
    assert rl.r1_zero_reward(response, "5", strict=True) == strict


def test_question_only_reward_wants_a_box_behind_all_thinking():
    assert rl.question_only_reward(r"so \boxed{0.5}", r"\frac12") == RIGHT
    assert rl.question_only_reward(r"so \boxed{0.6}", r"\frac12") == WRONG
    assert rl.question_only_reward("so 0.5", r"\frac12") == UNFORMATTED
    assert rl.question_only_reward(r"<think> maybe \boxed{0.5}", r"\frac12") == UNFORMATTED
    assert rl.question_only_reward(r"<think> hm </think> \boxed{0.5}", r"\frac12") == RIGHT
    assert rl.question_only_reward(r"<think>\boxed{0.5}</think> no idea", r"\frac12") == UNFORMATTED
    assert rl.question_only_reward(r"\fbox{5}", 5) == RIGHT
    for refused in (r"\fbox{5}", r"\boxed{5} hmm \fbox{5}", r"\boxed{5} hmm \boxed 5"):
        assert rl.question_only_reward(refused, 5, strict=True) == UNFORMATTED
    assert rl.question_only_reward(r"\boxed{7}", ["6", "7"]) == RIGHT  # any of several golds


def test_hostile_texts_are_graded_without_an_error():
    atoms = [*"0159.,;:!|_^{}()[]<>=+-*/%$&~'\" xyei", "\\", r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(",
             r"\pm", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\{", r"\log_",
             r"\sin", r"\binom", r"\overline{",
             r"\cup", r"\le", "and", "answer is", "####", "</think> <answer>", "</answer>", "٣", "²", "½", "∞", "\x00",
             "\ud800", "\n",
             "9" * 50, "million", r"^\circ", r"\infty", "1e999"]  # fmt: skip
    rng = random.Random(0)
    for _ in range(4000):
        text = "".join(rng.choice(atoms) for _ in range(rng.randint(1, 12)))
        other = text[: rng.randint(0, len(text))]
        for answer, gold in ((text, "5"), ("5", text), (text, other), (text, text)):
            assert rl.answers_match(answer, gold) in (True, False)
        for form in (rl.r1_zero_reward, rl.question_only_reward):
            assert set(form(text, other)) == {"reward", "format_reward", "answer_reward"}
        number = rl.parse_gsm8k_response(text)
        assert number is None or float(number) >= 0 or number[0] == "-"
        rl.parse_mmlu_response({"options": [*"abcd"]}, text)
        rl.countdown_reward(text, [1, 2], 3)


@pytest.mark.parametrize("piece", ["9", "{", "}", "(", r"\frac", r"\boxed{", "$", r"\(", "1,", "1 ", "9^", "-",
                                   "</think>", "<answer>", "answer is ", r"\text{a}", " ", r"\pm", "x^{999}+",
                                   r"\\", r"\sqrt"])  # fmt: skip
def test_a_megabyte_of_anything_is_no_answer(piece):
    text = piece * (1_000_000 // len(piece))
    for response in (text, rf"\boxed{{{text}}}", f"</think> <answer>{text}</answer>"):
        assert not rl.answers_match(response, "5") and not rl.answers_match("5", response)
        assert rl.r1_zero_reward(response, response)["reward"] == 0
        assert rl.question_only_reward(response, "5")["reward"] == 0


def test_numbers_beyond_floating_point_are_no_error():
    assert not rl.answers_match(r"\pi", "2^{2013}") and not rl.answers_match("2^{2013}", r"\pi")
    assert not rl.answers_match(r"x = \infty", r"y = \infty")


def test_threads_grade_like_one():
    jobs = [(a, g) for a, _ in SAME for _, g in SAME[::7]]
    alone = list(itertools.starmap(rl.answers_match, jobs))
    rl.readings.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(rl.answers_match, *zip(*jobs, strict=True))) == alone


@pytest.mark.parametrize(("output", "letter"), [
    ("The correct answer is B. There is more.", "B"), ("The correct answer is (C).", "C"), ("Answer: D", "D"),
    ("The correct answer is **A**", "A"), ("B", "B"), ("(D)", "D"), ("C. because", "C"), ("I think A is it", None),
    ("The correct answer is 10000 polygons.", None), ("The correct answer is Apples", None), ("", None),
    ("The correct answer is E", None), ("The answer is A. No: the answer is B.", "B"),
    ("B or C? </think> <answer> D </answer>", "D"), ("The correct answer is _B_", "B"), ("`B`", "B"), ("[B].", "B"),
    (r"Thus $\boxed{\text{C}}$.", "C"), ("the correct answer is b.", "B"), ("The correct answer is (a) or so", "A"),
    ("The correct answer is a dog", None), ("The correct answer is A good one", None),
    ("The correct answer is A because", "A")])  # fmt: skip
def test_mmlu_responses_give_a_letter_or_none(output, letter):
    assert rl.parse_mmlu_response({"options": ["1", "2", "3", "4"]}, output) == letter


@pytest.mark.parametrize(("output", "number"), [
    ("48 / 2 = 24 in May. 48 + 24 = 72 altogether.", "72"), ("She has $1,234.50.", "1234.50"), ("none", None),
    ("", None), ("It is -5", "-5"), ("16-3", "3"), ("3 - 5", "5"), ("-$7", "-7"), ("$-7", "-7"), ("1,2", "2"),
    ("1.2.3", "3"), ("- 3", "-3"), ("x = - 3", "-3"), ("it is −7", "-7"), (r"it is -\$5", "-5"), ("2 or\n- 3", "3"),
    (".5", ".5"), ("12,345,678 of them", "12345678"), ("1234,567", "567"),
    ("x" * 10**6 + "1 " + "y" * 10**6, "1")])  # fmt: skip
def test_gsm8k_responses_give_their_last_number_or_none(output, number):
    assert rl.parse_gsm8k_response(output) == number


# -------------------------------------------------------------------------------------------------
# data


def write(path, *written):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        for record in written:
            file.write((record if isinstance(record, str) else json.dumps(record)) + "\n")
    return str(path)


def test_records_are_read_from_jsonl_gz_json_and_csv(tmp_path):
    written = [{"prompt": "2\u2028?", "answer": "2"}, {"prompt": "3?", "answer": "3"}]
    for path in (write(tmp_path / "a.jsonl", *written, ""), write(tmp_path / "a.jsonl.gz", *written),
                 write(tmp_path / "a.json", written)):  # fmt: skip
        assert rl.read_problems(path) == written
    for name in ("a.csv", "a.csv.gz"):
        path = write(tmp_path / name, "id,prompts_final", '1,"one, two"')
        assert rl.read_examples("sst", path, "question_only")[0]["prompt"] == "one, two"


def test_fields_go_by_their_usual_names(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"problem": "p", "solution": r"so \boxed{1}"})
    assert rl.read_problems(path) == [{"prompt": "p", "answer": r"so \boxed{1}"}]
    path = write(tmp_path / "b.jsonl", {"instruction": "i", "output": "o", "ground_truth": "g"},
                 {"prompt": "p", "response": "r"}, {"instruction": "Add", "input": "2 3", "output": "5"})  # fmt: skip
    assert rl.read_pairs(path) == [dict(prompt="i", response="o", ground_truth="g"),
                                   dict(prompt="p", response="r", ground_truth=None),
                                   dict(prompt="Add\n\n2 3", response="5", ground_truth=None)]
    talk = "\n\nHuman: hi\n\nAssistant: {}"
    path = write(tmp_path / "c.jsonl", {"chosen": talk.format("good"), "rejected": talk.format("bad")},
                 {"chosen": talk.format("a") + talk.format("b"), "rejected": talk.format("c")},
                 {"prompt": "p", "chosen": "c", "rejected": "r"})  # fmt: skip
    assert rl.read_preferences(path) == [dict(prompt="hi", chosen="good", rejected="bad"),
                                              dict(prompt="p", chosen="c", rejected="r")]  # fmt: skip
    assert capsys.readouterr().out.startswith("dropped 1 of 3 pairs")


@pytest.mark.parametrize(("lines", "message"), [
    (['{"prompt": "a"}'], r"b\.jsonl:1 must have the field response or .*, got prompt"),
    (['{"prompt": "a", "response": "b"}', '{"prompt": " ", "response": "b"}'], r":2 must have text in prompt"),
    (['{"prompt": "a", "response": ""}'], r":1 must have text in response"),
    (['{"prompt": "a", "response": ["b"]}'], r'must have text in response .*, got \["b"\]'),
    (['{"prompt": "a", "response": "b"}', '{"prompt"'], r":2 must be JSON"), (["[[1]]"], r":1 must be an object"),
    (["[" * 10**5], r"must be JSON"), ([""], r"at least one record"), (["3"], r":1 must be an object")])  # fmt: skip
def test_records_that_are_wrong_are_named_in_one_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as error:
        rl.read_pairs(write(tmp_path / "b.jsonl", *lines))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
    damaged = bytearray(gzip.compress(b"{}" * 999))
    damaged[10] ^= 2  # the kind of the first block: there is none of the number
    (tmp_path / "bad.jsonl.gz").write_bytes(damaged)
    for name in ("missing.jsonl", "latin.jsonl", "cut.jsonl.gz", "bad.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{name}.* must be JSON or csv that can be read"):
            rl.read_pairs(tmp_path / name)
    with pytest.raises(ValueError, match="must hold pairs"):
        rl.read_preferences(write(tmp_path / "d.jsonl", {"chosen": "a", "rejected": "b"}))
    with pytest.raises(ValueError, match="x_test.csv:2 must be a question, four options and a letter"):
        rl.read_mmlu(write(tmp_path / "x_test.csv", "q,1,2,3,4,A", "q,1,2,3,4,E"))


def test_prompts_end_where_the_model_goes_on_and_hold_any_question():
    for name, template in rl.PROMPTS.items():
        assert template.count("{question}") == 1, name
    assert rl.PROMPTS["r1_zero"].endswith("User: {question}\nAssistant: <think>")
    assert rl.PROMPTS["alpaca"].endswith("### Instruction:\n{question}\n\n### Response:\n")
    assert rl.PROMPTS["system"].endswith("# Query:\n```{question}```\n\n# Answer:\n```")


# -------------------------------------------------------------------------------------------------
# evaluation


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c <= n and k <= n:
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert rl.pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    with pytest.raises(ValueError, match="k must lie in 1..n"):
        rl.pass_at_k(4, 2, 5)


@pytest.fixture
def model_folder(tmp_path):
    """An untrained model of 256 bytes and an end, which answers nonsense."""
    torch.manual_seed(0)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    config = lm.ModelConfig(vocab_size=257, context_length=700, d_model=16, num_layers=1, num_heads=2)
    lm.save_pretrained(lm.TransformerLM(config), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def eval_flags(tmp_path, folder, task, data, *more, out="eval"):
    return ["eval", "--task", task, "--data", data, "--model", str(folder), "--out_dir", str(tmp_path / out),
            "--device", "cpu", "--max_new_tokens", "6", "--batch_size", "2", *more]  # fmt: skip


def written(tmp_path, out="eval"):
    return sorted(rl.read_generations(tmp_path / out)[0].items(), key=str)


def gsm8k(tmp_path):
    return write(tmp_path / "g.jsonl", *({"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(5)))


def test_a_shorter_context_is_the_runs_and_not_that_of_the_model_it_leaves(tmp_path, capsys):
    base = byte_model(tmp_path / "m", context_length=64)
    pairs = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "1+1=", "response": "2"}] * 3)
    for length, kept in (("16", 64), ("80", 80)):
        out = tmp_path / length
        assert rl.main(["sft", *base, "--data", pairs, "--packed", "--context_length", length, "--batch_size", "2",
                        "--out_dir", str(out)]) == 0  # fmt: skip
        assert lm.from_pretrained(out / "model").config.context_length == kept
        assert rl.main(["sft", "--resume", "--out_dir", str(out), "--max_steps", "3"]) == 0
    for folder in ("m", "80"):  # a model folder, and a run's checkpoint
        model, _ = rl.load_model(tmp_path / folder)
        assert rl.main(["sft", *base, "--model", str(tmp_path / folder), "--data", pairs, "--context_length", "90",
                        "--out_dir", str(tmp_path / f"{folder}90")]) == 0  # fmt: skip
        longer, ids = lm.from_pretrained(tmp_path / f"{folder}90/model"), torch.arange(90)[None]
        assert longer(ids).shape == (1, 90, 257) and model.config.context_length < 90
    fails(capsys, [*eval_flags(tmp_path, out, "gsm8k", gsm8k(tmp_path)), "--max_new_tokens", "80"],
          "must leave room for a prompt in the model's context of 80 tokens")


def test_a_model_folder_tells_its_end_token_whatever_its_name_is(tmp_path, model_folder, capsys):
    file = model_folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<eos>"))
    _, tokenizer = rl.load_model(model_folder)
    assert rl.end_ids(tokenizer) == (256,) and rl.end_ids(Tokenizer.load(file)) == ()
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256], "top_p": 0.8}))
    pairs = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "1+1=", "response": "2"}])
    sft = ["sft", "--data", pairs, "--max_steps", "1", "--device", "cpu", "--model"]
    assert rl.main([*sft, str(model_folder), "--out_dir", str(tmp_path / "a")]) == 0
    assert rl.main([*sft, str(tmp_path / "a"), "--out_dir", str(tmp_path / "b")]) == 0  # from the checkpoint
    left = (json.loads((tmp_path / "b/model" / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert [*left] == [config | {"torch_dtype": "float32"}, {"eos_token_id": [256], "top_p": 0.8}]
    (model_folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert rl.end_ids(rl.load_model(model_folder)[1]) == (256,)  # from the other file
    (model_folder / "generation_config.json").unlink()
    assert rl.main(eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path))) == 0
    assert "has no end token" in capsys.readouterr().out
    Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<x>", "<|endoftext|>"]).save(file)
    fails(capsys, [*sft, str(model_folder), "--out_dir", str(tmp_path / "c")], "got id 257, for a model of 257 ids")
    many = Tokenizer({i: bytes([i]) for i in range(253)}, [], ["<|endoftext|>", "<x>", "<|im_end|>"])
    many.save(file)
    for named, ends in (([255, 253], (255, 253)), (255, (255, 253)), (None, (253, 255))):
        (model_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert rl.end_ids(rl.load_model(model_folder)[1]) == ends  # first what other programs stop at


def test_an_evaluation_leaves_every_generation_and_its_results(tmp_path, model_folder, monkeypatch):
    texts = iter(["it is 1", "1 or 3", "none", "4", "5.0"])
    monkeypatch.setattr(rl, "rollout", lambda m, t, prompts, *a: [
        dict(text=next(texts), finish_reason="stop") for _ in prompts])  # fmt: skip
    assert rl.main(eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path), "--prompt", "alpaca")) == 0
    result = json.loads((tmp_path / "eval/results.json").read_text())
    assert result["accuracy"] == 0.6 and result["examples"] == 5
    kinds = ("format_and_answer_right", "format_right_answer_wrong", "format_and_answer_wrong")
    assert [result[k] for k in kinds] == [3, 1, 1]
    assert [r["response"] for _, r in written(tmp_path)] == ["it is 1", "1 or 3", "none", "4", "5.0"]
    assert "### Instruction:\n0 + 1?\nAnswer:" in written(tmp_path)[0][1]["prompt"]


def test_an_evaluation_that_was_killed_goes_on_to_the_same_end(tmp_path, model_folder, capsys, monkeypatch):
    flags = ("--num_samples", "3", "--pass_at", "1", "3", "--prompt", "question_only")
    data = gsm8k(tmp_path)
    rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, out="whole"))
    assert len(written(tmp_path, "whole")) == 5 * (1 + 3)
    assert json.loads((tmp_path / "whole/results.json").read_text())["pass@3"] == 0
    rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags))
    file = tmp_path / "eval/generations.jsonl"
    file.write_bytes(file.read_bytes()[:-900])  # in the middle of a line, and of a batch
    assert len(written(tmp_path)) < 20
    with pytest.raises(SystemExit):
        rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags))
    with pytest.raises(SystemExit):
        rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, "--seed", "1", "--resume"))
    rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, "--resume"))
    assert written(tmp_path) == written(tmp_path, "whole")
    capsys.readouterr()
    text = Path(data).read_text()
    for change in (("#### 3", "#### 4"), ("2 + 1?", "2 + 2?"), (text.splitlines(True)[-1], "")):
        Path(data).write_text(text.replace(*change))
        fails(capsys, eval_flags(tmp_path, model_folder, "math", data, *flags, "--resume"),
              "needs the examples of the evaluation in .*another one in place [35];")
    Path(data).write_text(text)
    monkeypatch.setattr(rl, "rollout", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, "--overwrite"))
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["generations.jsonl"]  # no results of before


def test_two_ranks_evaluate_like_one(tmp_path, model_folder):
    flags = ("--num_samples", "2", "--pass_at", "2")
    rl.main(eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path), *flags, out="one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "rl.py"]
    subprocess.run([*command, *eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path), *flags, out="two")],
                   check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)  # fmt: skip
    assert written(tmp_path, "two") == written(tmp_path, "one") and len(written(tmp_path, "one")) == 15
    assert (tmp_path / "two/results.json").exists()
    second = map(json.loads, (tmp_path / "two/generations.1.jsonl").read_text().splitlines())
    assert {r["sample"] for r in second if "sample" in r} == {None, 0, 1}  # some greedy, some sampled


def test_outputs_are_in_the_files_that_other_graders_read(tmp_path, model_folder, capsys, monkeypatch):
    data = write(tmp_path / "alpaca.json", [{"instruction": "Say {hi}", "dataset": "helpful_base", "output": "?"}])
    rl.main(eval_flags(tmp_path, model_folder, "alpaca_eval", data, "--prompt", "system", out="a"))
    (row,) = json.loads((tmp_path / "a/alpaca_eval.json").read_text())
    assert set(row) == {"instruction", "output", "generator", "dataset"} and row["instruction"] == "Say {hi}"
    assert row["dataset"] == "helpful_base" and row["generator"] == str(model_folder)
    code = "So:\n```python\nprint(1)  # Query: 1\n```"
    for prompt, reply, output in (("alpaca", code, code), ("system", "Hi!```\n\n# Query:", "Hi!")):
        row = {"text": reply, "finish_reason": "stop"}
        monkeypatch.setattr(rl, "generate_responses", lambda *_, row=row: [[row]])
        rl.main(eval_flags(tmp_path, model_folder, "alpaca_eval", data, "--prompt", prompt, "--overwrite", out="a"))
        assert json.loads((tmp_path / "a/alpaca_eval.json").read_text())[0]["output"] == output
    monkeypatch.undo()
    (tmp_path / "b").mkdir()
    published = write(tmp_path / "b/alpaca_eval.json", [{"instruction": "Say {hi}"}])
    fails(capsys, eval_flags(tmp_path, model_folder, "alpaca_eval", published, out="b"), "no file that eval writes")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["alpaca_eval.json"]
    data = write(tmp_path / "sst.csv", "harm_area,prompts_final", "x,Tell me how", "x,Tell me why")
    rl.main(eval_flags(tmp_path, model_folder, "sst", data, "--prompt", "system", out="s"))
    rows = [json.loads(line) for line in (tmp_path / "s/sst.jsonl").read_text().splitlines()]
    assert [r["prompts_final"] for r in rows] == ["Tell me how", "Tell me why"]
    assert set(rows[0]) == {"prompts_final", "output"}


def test_mmlu_is_asked_as_the_handout_says(tmp_path, model_folder):
    write(tmp_path / "m/high_school_biology_test.csv".replace("m/", ""), '"What, then?",one,two,three,four,B')
    (example,) = rl.read_examples("mmlu", tmp_path / "high_school_biology_test.csv", "question_only")
    assert len(rl.read_mmlu(write(tmp_path / "long.csv", f"{'q' * 200_000},1,2,3,4,A"))[0]["question"]) == 200_000
    assert example["prompt"].endswith("Question: What, then?\nA. one\nB. two\nC. three\nD. four\nAnswer:")
    assert "about high school biology" in example["prompt"]
    assert rl.grade_response("mmlu", "system", example, "The correct answer is B.") == RIGHT
    assert rl.grade_response("mmlu", "system", example, "The correct answer is C.") == WRONG
    assert rl.grade_response("mmlu", "system", example, "Who knows?") == UNFORMATTED
    assert rl.grade_response("mmlu", "r1_zero", example, "A? </think> <answer> B </answer>") == RIGHT
    assert rl.grade_response("mmlu", "r1_zero", example, "The correct answer is B.") == UNFORMATTED


def test_prompts_that_do_not_fit_are_counted_and_wrong(tmp_path, model_folder):
    data = write(tmp_path / "g.jsonl", {"question": "1?", "answer": "1"}, {"question": "x" * 800, "answer": "1"})
    rl.main(eval_flags(tmp_path, model_folder, "math", data, "--prompt", "question_only"))
    assert json.loads((tmp_path / "eval/results.json").read_text())["too_long"] == 1
    assert [r["finish_reason"] == "too long" for _, r in written(tmp_path)] == [False, True]
    words, model = Words(), Logits(vocab_size=8)  # whose sequences begin with a token
    model.config = SimpleNamespace(context_length=5, vocab_size=8, max_position_embeddings=5)
    fits, too_long = rl.generate_responses(model, words, ["a b", "a b c"], 2)
    assert fits[0]["finish_reason"] != "too long" and too_long[0]["finish_reason"] == "too long"


def test_a_begin_token_counts_when_a_prompt_is_just_too_long():
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>", "<|begin_of_text|>"])
    config = lm.ModelConfig(vocab_size=258, context_length=8, d_model=16, num_layers=1, num_heads=2)
    texts = rl.generate_responses(lm.TransformerLM(config), tokenizer, ["1234", "12345"], 3)
    assert [group[0]["finish_reason"] == "too long" for group in texts] == [False, True]


def test_flags_that_do_not_fit_are_told_in_one_line(tmp_path, model_folder, capsys):
    for more, message in ((("--num_samples", "2", "--pass_at", "4"), "must be at least every --pass_at"),
                          (("--data", "nowhere.jsonl"), "nowhere.jsonl must be JSON")):  # fmt: skip
        with pytest.raises(SystemExit):
            rl.main(eval_flags(tmp_path, model_folder, "math", gsm8k(tmp_path), *more))
        assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


# -------------------------------------------------------------------------------------------------
# small tasks


def test_additions_are_different_right_and_the_first_of_more():
    problems = rl.addition_problems(200, 3, 0)
    assert len({p["prompt"] for p in problems}) == 200 and problems == rl.addition_problems(300, 3, 0)[:200]
    assert all(sum(map(int, p["prompt"].rstrip("=").split("+"))) == int(p["answer"]) for p in problems)
    assert problems != rl.addition_problems(200, 3, 1) and len(rl.addition_problems(100, 1, 0)) == 100
    with pytest.raises(ValueError, match="there are 100 sums"):
        rl.addition_problems(101, 1, 0)


def test_more_countdown_problems_than_there_are_is_told_in_seconds_not_searched_for():
    with pytest.raises(ValueError, match=r"must be 50000 problems of 2 numbers, got \d+; ask for less"):
        rl.countdown_problems(50_000, 2, 0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_countdown_problems_have_solutions_that_the_reward_accepts(count):
    problems, rng = rl.countdown_problems(60, count, 0), random.Random(0)
    assert problems == rl.countdown_problems(90, count, 0)[:60]
    assert len({(*sorted(p["numbers"]), p["target"]) for p in problems}) == 60
    for p in problems:
        numbers, target = p["numbers"], p["target"]
        assert len(numbers) == count and 1 <= target <= 99
        assert rl.countdown_reward(f"</think> <answer>{p['solution']}</answer>", numbers, target) == RIGHT
        trace = rl.countdown_trace(numbers, target, rng)
        assert rl.countdown_reward(trace, numbers, target) in ([RIGHT] if count == 2 else [RIGHT, WRONG])
        text = rl.countdown_prompt(numbers, target) + trace
        assert set(re.sub("|".join(rl.COUNTDOWN_TAGS), "", text)) - {*"no"} <= set(rl.COUNTDOWN_ALPHABET)


def test_traces_begin_anew_when_an_attempt_fails_and_answer_what_they_ended_with():
    rng, problems = random.Random(0), rl.countdown_problems(300, 3, 0)
    traces = [rl.countdown_trace(p["numbers"], p["target"], rng) for p in problems]
    for p, trace in zip(problems, traces, strict=True):
        *failed, last = trace.partition("</think>")[0].split(" no ")
        assert len({*failed}) == len(failed) < 8
        for a, b, c, end in re.findall(r"(\d+)[-+*/](\d+)=(\d+) \d+[-+*/]\d+=(\d+)", "\n".join(failed)):
            assert int(c) <= rl.COUNTDOWN_MOST and int(end) != p["target"]
            left = p["numbers"].copy()
            for used in (a, b):
                left.remove(int(used))
            ends = rl.results((int(c), c, 3), (left[0], str(left[0]), 3))
            values = [value for _, value in ends]
            assert int(end) in values and p["target"] not in values, (p, trace)
        right = int(last.rpartition("=")[2]) == p["target"]
        assert rl.countdown_reward(trace, p["numbers"], p["target"]) == (RIGHT if right else WRONG)
    for a, op, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", " ".join(traces)):
        a, b = int(a), int(b)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[op] == int(c)


def test_two_of_three_traces_end_with_their_first_attempt():
    rng = random.Random(0)
    traces = [rl.countdown_trace([1, 1, 1], 99, rng) for _ in range(900)]  # no way: patience alone ends them
    assert 515 < sum(" no " not in trace for trace in traces) < 685  # 600, within 6 standard deviations
    assert max(trace.count(" no ") for trace in traces) == 7  # of 10 different attempts, each once
    long = [rl.countdown_trace([1] * 20, 99, rng) for _ in range(60)]
    assert {trace.count(" no ") for trace in long} == {0, 1}


@pytest.mark.parametrize(("answer", "right"), [
    ("(3+5)*2", True), ("2*(5+3)", True), ("(3+5)*2 ", True), ("3*2+5*2", False), ("16", False), ("3+5+2", False),
    ("3+5*2", False), ("(3+5)*2*1", False), ("(3+5)(2)", False), ("(3+5)**2", False), ("3+5*2=16", False),
    ("((3+5)*2", False), ("", False), ("2**3+5", False), ("(5+3)/2", False), ("3 5*2", False), ("5//3/2", False),
    ("2/(3-5)", False)])  # fmt: skip
def test_countdown_wants_each_number_once_and_the_exact_target(answer, right):
    got = rl.countdown_reward(f"hm</think> <answer>{answer}</answer>", [2, 3, 5], 16)
    assert got == (RIGHT if right else WRONG)
    for unfinished in (f"hm <answer>{answer}</answer>", f"<answer>{answer}</answer> </think> <answer> hm"):
        assert rl.countdown_reward(unfinished, [2, 3, 5], 16) == UNFORMATTED


def test_countdown_values_are_exact_fractions():
    answer = "</think> <answer>8/(3-8/3)</answer>"
    assert rl.countdown_reward(answer, [3, 3, 8, 8], 24) == RIGHT
    assert rl.countdown_reward("</think> <answer>3/(2-2)</answer>", [2, 2, 3], 1) == WRONG
