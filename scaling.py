"""Scaling laws: a training API with a hard budget, a sweep of runs behind it, and fits to them.

    python scaling.py serve --backend law &          # the API; --backend train really trains
    python scaling.py plan --budget_s 43200 --speed 4e14 --flops 6N    # plan.json: 12 hours of runs
    python scaling.py sweep --plan plan.json         # results.jsonl, a line a run
    python scaling.py fit results.jsonl --flops 6N --budget 1e20    # N_opt, D_opt, loss, how sure
    python scaling.py plan results.jsonl --target_s 172800 --speed 4e14 --flops 6N   # what to train

The last predicts a loss within 0.5% of the law's, for a model whose loss is within 1% of the best.
A run table is JSON (a list of objects), CSV or JSONL; a run has a loss and two of parameters N,
tokens D and FLOPs C; the third is from C = 6 N D. Losses are in nats a token. N is what the table
says; sweeps and plans count the weights of blocks and norms, without embeddings and head.

Sources
[1] CS336 assignment 3 (scaling) handout and its training API, Stanford 2026
[2] Hoffmann et al. 2022, Chinchilla, arXiv 2203.15556
[3] Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, arXiv 2404.10102
[4] Porian et al. 2024, Resolving Discrepancies in Compute-Optimal Scaling, arXiv 2406.19146
[5] DeepSeek LLM 2024, arXiv 2401.02954
[6] Li et al. 2025, Step Law, arXiv 2503.04715
[7] Bergsma et al. 2025, Power Lines, arXiv 2505.13738
[8] Yang et al. 2022, Tensor Programs V (muP), arXiv 2203.03466
[9] Akima 1970, A New Method of Interpolation, J. ACM 17(4)

Dims: S bootstrap samples or starts, K budgets, n runs of a profile or of a table, P constants.
"""

import argparse
import collections
import contextlib
import csv
import hashlib
import hmac
import http.server
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import operator
import os
import queue
import re
import signal
import sqlite3
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import bpe
import model as lm

# What run tables call a quantity; the first name is ours.
COLUMNS = {
    "parameters": ("parameters", "Model Size", "model_size", "n_params", "N"),
    "tokens": ("tokens", "tokens_trained", "Training Tokens", "D"),
    "flops": ("flops_exact", "flops", "compute_budget", "Training FLOP", "flops_budget", "C"),
    "loss": ("loss", "final_loss", "val_loss"),
}
SAME_BUDGET = 1.1  # runs whose FLOPs differ by less are one profile [4]: real runs round steps
LEVEL = (2.5, 97.5)  # percentiles of an interval: 95%
STARTS = ("grid", "projection")  # of a parametric fit
LEAST_EXPONENT = 1e-3  # of one; with less the loss does not fall, and no optimum exists
MAX_LR = 3e-3  # train.py's, at width 128
# Of a run whose batch is above 1: the Step Law was measured from 2e9 tokens on, where its batch
# leaves 17 thousand. Below 2.7e6 tokens it leaves fewer than 1000, and half its batch gave real
# runs a loss lower by 0.6 to 1%.
LEAST_STEPS = 1000


# -------------------------------------------------------------------------------------------------
# tables of runs


def load_runs(path):
    """The rows of a .json list, .jsonl or .csv as dicts; numbers stay as the file spells them."""
    where = ""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for i, line in enumerate(text.split("\n"), 1):
                where = f"line {i}: "
                rows += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError, csv.Error) as problem:
        raise ValueError(f"{path} must be JSON, JSONL or CSV, got {where}{problem}; repair or "
                         "remove that line") from None
    return rows


def number_above_zero(value, name, i):
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 < float(value) < math.inf:
            return float(value)
    raise ValueError(f"{name} must be a finite number above 0, got {value!r} in run {i}; correct "
                     "or remove it")


def run_arrays(runs, rule="exact"):
    """{parameters, tokens, flops, loss: (n,) float64, rows: the n rows used} of a list of dicts.

    Runs whose `status` is there and not "completed" are left out. rule: "6N" passes over a column
    flops_exact, which counts head and attention. raises ValueError that names the
    row, from 1, when a number is missing, not finite or not above 0.
    """
    for i, row in enumerate(runs, 1):
        if not isinstance(row, dict):
            raise ValueError("each run must be an object with a loss and two of parameters, tokens "
                             f"and FLOPs, got {row!r:.40} as run {i}; write one object a run")
    rows = [(i, row) for i, row in enumerate(runs, 1)
            if row.get("status", "completed") == "completed"]
    if not rows:
        raise ValueError(f"a run table must hold completed runs, got 0 of {len(runs)}; give one "
                         "with results")
    present = {str(key) for _, row in rows for key in row}
    present -= {"flops_exact"} if rule == "6N" else set()
    found = {name: next((c for c in names if c in present), None)
             for name, names in COLUMNS.items()}
    known = [name for name in ("parameters", "tokens", "flops") if found[name]]
    if not found["loss"] or len(known) < 2:
        raise ValueError("columns must give loss and two of parameters, tokens, flops, got "
                         f"{', '.join(sorted(present)) or 'none'}; rename them")
    arrays = {name: np.array([number_above_zero(row.get(found[name]), found[name], i)
                              for i, row in rows]) for name in (*known, "loss")}
    n, d, c = (arrays.get(name) for name in ("parameters", "tokens", "flops"))
    arrays |= {"parameters": c / (6 * d) if n is None else n,
               "tokens": c / (6 * n) if d is None else d, "flops": 6 * n * d if c is None else c}
    return {**arrays, "rows": [row for _, row in rows]}


# -------------------------------------------------------------------------------------------------
# a fitted law


@dataclass
class Fit:
    """A fitted law: theta (P,), and samples (S, P) of it from the bootstrap or None."""

    theta: np.ndarray
    samples: np.ndarray | None
    runs: dict  # what run_arrays gave
    details: dict = field(default_factory=dict)
    widen: float = 1.0  # the samples' deviations, in logs, are so many times too small
    conditions: tuple = ()  # what optimum takes besides theta and FLOPs

    def at(self, flops):
        """{flops, parameters, tokens, loss} of the best run for `flops`, and *_interval, 95%."""
        return {"flops": float(flops)} | self.summary(lambda theta: dict(zip(
            ("parameters", "tokens", "loss"), self.optimum(theta, float(flops), *self.conditions),
            strict=True)))

    def exponents(self):
        """{name: value} of the law's exponents and constants; with samples {name_interval: ...}."""
        return self.summary(self.constants)

    def summary(self, quantities):
        """{name: float} of quantities(theta), and with samples {name_interval: [low, high]}, where
        they have finite bounds."""
        result = {name: float(value) for name, value in quantities(self.theta).items()}
        with np.errstate(all="ignore"):  # of few or odd runs some samples overflow
            for name, draws in quantities(self.samples).items() if self.samples is not None else ():
                bounds = np.percentile(self.widened(result[name], draws), LEVEL)
                if np.isfinite(bounds).all():
                    result[f"{name}_interval"] = bounds.tolist()
        return result

    def widened(self, value, draws):
        return draws if self.widen == 1 else value * (draws / value) ** self.widen


# -------------------------------------------------------------------------------------------------
# IsoFLOP profiles


def isoflop_profiles(runs):
    """[(flops, log N (n,), loss (n,), log D (n,))] by budget, each sorted by N; of runs of one size
    the best, so that a profile may hold a learning-rate sweep."""
    cuts, profiles = [], []
    for i in np.argsort(runs["flops"], kind="stable"):
        if not cuts or runs["flops"][i] > SAME_BUDGET * runs["flops"][cuts[-1][0]]:
            cuts.append([])
        cuts[-1].append(i)
    for members in cuts:
        flops = float(np.median(runs["flops"][members]))
        best = {runs["parameters"][i]: i for i in sorted(members, key=lambda i: -runs["loss"][i])}
        chosen = [best[size] for size in sorted(best)]
        if len(chosen) < 3:
            raise ValueError(f"a profile must have at least 3 model sizes, got {len(chosen)} at "
                             f"{flops:.3g} FLOPs; add runs of that budget, remove it, or give "
                             "the --flops that the sweep was planned with")
        profiles.append((flops, np.log(runs["parameters"][chosen]), runs["loss"][chosen],
                         np.log(runs["tokens"][chosen])))
    if len(profiles) < 3:
        raise ValueError(f"a power law needs at least 3 compute budgets, got {len(profiles)} "
                         f"({', '.join(f'{p[0]:.3g}' for p in profiles)} FLOPs); add runs")
    return profiles


def lowest_run(x, y):
    """(x, y, inside) of the lowest of y (S, n) over x (n,). source: [1], the minimum-loss run"""
    best = y.argmin(1)
    return x[best], y.min(1), (best > 0) & (best < len(x) - 1)


def lowest_of_parabola(x, y):
    """(x, y, inside) of the vertex of the least-squares parabola through y (S, n).
    source: [2] approach 2"""
    centre, width = x.mean(), np.ptp(x) / 2
    z = (x - centre) / width
    c, b, a = np.linalg.lstsq(np.stack([z**0, z, z**2], 1), y.T, rcond=None)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(a > 0, -b / (2 * a), np.where(b > 0, z[0], z[-1]))
    inside = (a > 0) & (z[0] < vertex) & (vertex < z[-1])
    vertex = vertex.clip(z[0], z[-1])
    return centre + width * vertex, c + b * vertex + a * vertex**2, inside


def akima_slopes(x, y):
    """Slopes (S, n) at x (n,) of Akima's interpolant of y (S, n). source: [9]"""
    m = np.diff(y) / np.diff(x)
    for _ in range(2):  # two more slopes at each end, of the parabola through the last points
        m = np.concatenate([2 * m[:, :1] - m[:, 1:2], m, 2 * m[:, -1:] - m[:, -2:-1]], 1)
    left, right = np.abs(m[:, 3:] - m[:, 2:-1]), np.abs(m[:, 1:-2] - m[:, :-3])
    total = left + right
    even = total <= 1e-9 * np.abs(m).max(1, keepdims=True)  # neither side bends: the mean
    left, right = np.where(even, 0.5, left), np.where(even, 0.5, right)
    return (left * m[:, 1:-2] + right * m[:, 2:-1]) / np.where(even, 1, total)


def lowest_of_akima(x, y):
    """(x, y, inside) of the lowest point of Akima's interpolant, a cubic on each piece; no shape
    is assumed. source: [4] [9]"""
    h, slope = np.diff(x), akima_slopes(x, y)
    d, rise = slope[:, :-1] * h, np.diff(y)  # y + d t + c t^2 + b t^3 for t in 0..1
    c, b = 3 * rise - 2 * d - slope[:, 1:] * h, d + slope[:, 1:] * h - 2 * rise
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt((c * c - 3 * b * d).clip(0))
        q = -(c + np.where(c >= 0, root, -root))  # both zeros of the slope, without cancellation
        t = np.stack([q / (3 * b), d / q, np.zeros_like(d), np.ones_like(d)])
    t = np.where((t > 0) & (t <= 1), t, 0.0)
    value = y[:, :-1] + t * (d + t * (c + t * b))
    value, place = np.moveaxis(value, 0, -1), np.moveaxis(x[:-1] + t * h, 0, -1)
    value, place = value.reshape(len(y), -1), place.reshape(len(y), -1)
    best = value.argmin(1)[:, None]
    place = np.take_along_axis(place, best, 1)[:, 0]
    return place, value.min(1), (x[0] < place) & (place < x[-1])


PROFILE_METHODS = {"minimum": lowest_run, "minimum_linear": lowest_run,
                   "parabola": lowest_of_parabola, "akima": lowest_of_akima}


def fit_line(x, y):
    """(intercept (S,), slope (S,)) of the least-squares line through y (S, K) over x (K,)."""
    z = x - x.mean()
    slope = y @ z / (z @ z)
    return y.mean(1) - slope * x.mean(), slope


def fit_power(x, y, offset):
    """(E, log K, exponent), each (S,), that minimise sum (E + K e^(exponent x) - y)^2; without
    `offset` E = 0. x (K,) is a log, y (S, K). For a given exponent E and K are linear (variable
    projection), so the search is over one number: a grid, made finer around the best ten times."""
    z = x - x.mean()
    low, high = (-2.0, -0.005) if offset else (-2.0, 2.0)
    middle, half = np.full(len(y), (low + high) / 2), (high - low) / 2
    for _ in range(10):
        g = (middle[:, None] + np.linspace(-half, half, 41)).clip(low, high)
        basis = np.exp(g[:, :, None] * z)  # (S, 41, K)
        k = np.einsum("sgk,sk->sg", basis, y) / (basis**2).sum(2)
        e = np.zeros_like(k)
        if offset:
            mean_b, mean_y = basis.mean(2), y.mean(1, keepdims=True)
            spread = basis - mean_b[:, :, None]
            k_free = np.einsum("sgk,sk->sg", spread, y) / (spread**2).sum(2)
            e = mean_y - k_free * mean_b
            e, k = np.where(e > 0, e, 0), np.where(e > 0, k_free, k)  # a loss is not below 0
        error = ((e[:, :, None] + k[:, :, None] * basis - y[:, None]) ** 2).sum(2)
        pick = error.argmin(1)[:, None]
        e, k, middle = (np.take_along_axis(v, pick, 1)[:, 0] for v in (e, k, g))
        half /= 10
    return e, np.log(k.clip(1e-300)) - middle * x.mean(), middle


class IsoflopFit(Fit):
    """theta: log k_N, a, log k_D, b, E, log K, gamma of N_opt = k_N C^a, D_opt = k_D C^b and
    loss = E + K C^-gamma (E = 0 below 4 budgets, which three constants would meet exactly)."""

    def summary(self, quantities):
        """Below 4 budgets without intervals of the loss: they would leave out that E is unknown."""
        result, few = super().summary(quantities), len(self.details["minima"]) < 4
        return {k: v for k, v in result.items() if not few or k not in (
            "loss_interval", "E_interval", "K_interval", "gamma_interval")}

    @staticmethod
    def optimum(theta, flops):
        kn, a, kd, b, e, k, gamma = np.moveaxis(theta, -1, 0)
        c = np.log(flops)
        return np.exp(kn + a * c), np.exp(kd + b * c), e + np.exp(k - gamma * c)

    @staticmethod
    def constants(theta):
        names = ("k_N", "a", "k_D", "b", "E", "K", "gamma")
        values = np.moveaxis(theta, -1, 0)
        return {n: np.exp(v) if n[0] in "kK" else v for n, v in zip(names, values, strict=True)}


def profile_minima(profiles, losses, method, jitter=None):
    """(log N, log D, loss, inside), each (S, K): where profiles are lowest, for losses [(S, n)].
    jitter: a generator that moves a lowest run by up to half a step of its grid."""
    found = []
    for (_, log_n, _, log_tokens), y in zip(profiles, losses, strict=True):
        place, value, inside = PROFILE_METHODS[method](log_n, y)
        if jitter is not None and method.startswith("minimum"):
            place = place + np.interp(place, log_n, np.gradient(log_n)) * jitter.uniform(
                -0.5, 0.5, len(place))
        found.append((place, np.interp(place, log_n, log_tokens), value, inside))
    return [np.stack(values, 1) for values in zip(*found, strict=True)]


def laws_through(budgets, log_n, log_d, loss, method):
    """theta (S, 7) of IsoflopFit for minima (S, K) at `budgets` (K,)."""
    c, laws = np.log(budgets), []
    for v in (log_n, log_d):
        if method == "minimum_linear":
            scale = v.mean(1)
            _, k, exponent = fit_power(c, np.exp(v - scale[:, None]), offset=False)
            laws += [k + scale, exponent]
        else:
            laws += fit_line(c, v)
    if len(c) < 4:
        k, exponent = fit_line(c, np.log(loss))
        e = np.zeros_like(k)
    else:
        e, k, exponent = fit_power(c, loss, offset=True)
    return np.stack([*laws, e, k, -exponent], 1)


def bootstrap_minima(profiles, method, samples, seed):
    """Shifts (log N, log D, log loss) of the minima, each (S, K).

    Noise is drawn from the residuals of a smooth curve through each profile, widened for the
    constants that the curves took, and added to these curves. None where no residual is left.
    """
    rng, curves, residuals, freedom = np.random.default_rng(seed), [], [], 0
    for _, log_n, loss, _ in profiles:
        degree = 3 if len(loss) >= 6 else 2
        z = (log_n - log_n.mean()) / np.ptp(log_n)
        curves.append(np.polyval(np.polyfit(z, np.log(loss), degree), z))
        residuals.append(np.log(loss) - curves[-1])
        freedom += len(loss) - degree - 1
    if freedom < 1:
        return None
    residuals = np.concatenate(residuals)
    residuals = residuals * math.sqrt(len(residuals) / freedom)
    noisy = [np.exp(curve + rng.choice(residuals, (samples, len(curve)))) for curve in curves]
    x, d, loss, _ = profile_minima(profiles, noisy, method, rng)
    x0, d0, loss0, _ = profile_minima(profiles, [np.exp(curve)[None] for curve in curves], method)
    return x - x0, d - d0, np.log(loss / loss0)


def fit_isoflop(runs, method="minimum", bootstrap=0, seed=42, rule="exact"):
    """The IsoflopFit of a list of runs (dicts, see run_arrays).

    method: "minimum" the lowest run of each budget and a straight line in log-log, which is the
      handout's advice; "minimum_linear" the same runs, fitted in N itself; "parabola" in log N;
      "akima" interpolation.
    bootstrap: samples of the losses' noise (a lowest run also moves within its half grid step).
    raises ValueError with fewer than 3 budgets or 3 sizes of one, or a minimum at a profile's end.
    source: [1] [2] approach 2, [4]
    """
    if method not in PROFILE_METHODS:
        raise ValueError(f"method must be one of {', '.join(PROFILE_METHODS)}, got {method!r}; "
                         "choose one of these")
    runs = run_arrays(runs, rule)
    profiles = isoflop_profiles(runs)
    budgets = [p[0] for p in profiles]
    x, d, loss, inside = profile_minima(profiles, [p[2][None] for p in profiles], method)
    for (flops, log_n, _, _), ok in zip(profiles, inside[0], strict=True):
        if not ok:
            raise ValueError(f"a profile must have its minimum inside, got none by {method} at "
                             f"{flops:.3g} FLOPs, N {math.exp(log_n[0]):.3g} to "
                             f"{math.exp(log_n[-1]):.3g}; add smaller or larger models there")
    theta, samples = laws_through(budgets, x, d, loss, method)[0], None
    if bootstrap and (shifts := bootstrap_minima(profiles, method, bootstrap, seed)):
        dx, dd, dloss = shifts
        samples = laws_through(budgets, x + dx, d + dd, loss * np.exp(dloss), method)
    minima = [{"flops": c, "parameters": math.exp(n), "tokens": math.exp(t), "loss": float(y)}
              for c, n, t, y in zip(budgets, x[0], d[0], loss[0], strict=True)]
    return IsoflopFit(theta, samples, runs, {"method": method, "minima": minima,
                                             "profiles": profiles})


# -------------------------------------------------------------------------------------------------
# the parametric law L(N, D) = E + A / N^alpha + B / D^beta


def huber_objective(theta, log_n, log_d, target, weight, delta):
    """(sum of Huber losses (S,), its gradient (S, 5)) for theta (S, 5): log A, log B, log E, alpha,
    beta. target: log loss (n,) or (S, n); weight: (S, n) or None. source: [2] equation (3)

    Naive: Huber(logsumexp(a - alpha log N, b - beta log D, e) - log L). Exponents are held within
    +-300, where float64 needs no maximum taken out."""
    a, b, e, alpha, beta = theta[:, :, None].unbind(1)
    p = (a - alpha * log_n).clamp_(-300, 300).exp_()
    q = (b - beta * log_d).clamp_(-300, 300).exp_()
    r = e.clamp(-300, 300).exp()
    total = p + q + r
    error = total.log().sub_(target)
    psi = error.clamp(-delta, delta)  # the derivative of Huber's loss
    value = psi * (error - psi / 2)
    if weight is not None:
        value, psi = value * weight, psi * weight
    psi = psi.div_(total)
    p, q = p.mul_(psi), q.mul_(psi)
    gradient = (p.sum(1), q.sum(1), psi.sum(1) * r[:, 0], -(p @ log_n), -(q @ log_d))
    return value.sum(1), torch.stack(gradient, 1)


def minimise(objective, x, per_row=(), iterations=2000):
    """(x (S, P), value (S,)) of local minima from the starts x (S, P), all rows at once.

    objective(x, *rows of per_row) -> (value (S,), gradient (S, P)). Quasi-Newton (BFGS): with five
    unknowns the whole P x P inverse Hessian is smaller than L-BFGS's memory of ten steps, and the
    steps are L-BFGS's with nothing forgotten. Line search: bisection to the weak Wolfe conditions,
    which Huber's kinks do not stop. Each evaluation serves every row, wherever its search is; a row
    that is done leaves the batch.
    """
    S, P = x.shape
    best_x, best = x.clone(), torch.full((S,), math.inf, dtype=x.dtype)
    value, gradient = objective(x, *per_row)
    eye = torch.eye(P, dtype=x.dtype)
    inverse = eye / gradient.norm(dim=1).clamp(min=1e-12)[:, None, None]
    row, fresh = torch.arange(S), torch.ones(S, dtype=torch.bool)
    step, low = torch.ones(S, dtype=x.dtype), torch.zeros(S, dtype=x.dtype)
    high, tries = torch.full_like(step, math.inf), torch.zeros(S)
    direction = -(inverse @ gradient[:, :, None])[:, :, 0]
    for _ in range(iterations):
        move = step[:, None] * direction
        new_value, new_gradient = objective(x + move, *per_row)
        slope = (gradient * direction).sum(1)
        too_far = ~(new_value <= value + 1e-4 * step * slope)
        too_near = ~too_far & ((new_gradient * direction).sum(1) < 0.9 * slope)
        taken = ~(too_far | too_near)
        high, low = torch.where(too_far, step, high), torch.where(too_near, step, low)

        change = new_gradient - gradient  # the BFGS update of the rows that took their step
        curvature = (move * change).sum(1)
        scale = curvature / (change * change).sum(1)
        inverse = torch.where((taken & fresh)[:, None, None], scale[:, None, None] * eye, inverse)
        product = (inverse @ change[:, :, None])[:, :, 0]
        outer = move[:, :, None] * product[:, None, :]
        rho = (1 / curvature)[:, None, None]
        weight = (1 + (change * product).sum(1)[:, None, None] * rho) * rho
        updated = inverse + weight * move[:, :, None] * move[:, None] - rho * (outer + outer.mT)
        keep = (taken & (curvature > 0))[:, None, None] & torch.isfinite(updated)
        inverse = torch.where(keep, updated, inverse)

        gain = value - new_value
        x = torch.where(taken[:, None], x + move, x)
        gradient = torch.where(taken[:, None], new_gradient, gradient)
        value = torch.where(taken, new_value, value)
        direction = torch.where(taken[:, None], -(inverse @ gradient[:, :, None])[:, :, 0],
                                direction)
        longer = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        step = torch.where(taken, 1.0, longer)
        low, high = torch.where(taken, 0.0, low), torch.where(taken, math.inf, high)
        tries, fresh = torch.where(taken, 0.0, tries + 1), fresh & ~taken

        best_x[row], best[row] = x, value
        done = (tries > 40) | (taken & (gain <= 1e-13 * value)) | ~torch.isfinite(direction).all(1)
        if done.any():
            left = ~done
            state = (row, x, value, gradient, inverse, direction, step, low, high, tries, fresh)
            row, x, value, gradient, inverse, direction, step, low, high, tries, fresh = (
                v[left] for v in state)
            per_row = tuple(v[left] for v in per_row)
        if not len(row):
            break
    return best_x, best


def grid_starts():
    """(4500, 5) log A, log B, log E, alpha, beta. source: [2] appendix D.3, as in [3]"""
    large, exponent = np.arange(0, 30, 5.0), np.arange(0, 2.5, 0.5)
    log_e = np.arange(-1, 1.5, 0.5)
    return np.array(list(itertools.product(large, large, log_e, exponent, exponent)))


def projected_starts(log_n, log_d, loss, count=16):
    """(count, 5) starts by variable projection: for given alpha and beta the constants E, A, B are
    linear, so that least squares of the relative error leaves a search in two dimensions, over a
    grid here. What 4,500 starts find, from 16."""
    exponents = torch.linspace(0.04, 1.6, 40, dtype=torch.float64)
    alpha, beta = (v.reshape(-1, 1) for v in torch.meshgrid(exponents, exponents, indexing="ij"))
    columns = torch.stack([torch.exp(-alpha * log_n), torch.exp(-beta * log_d),
                           torch.ones(len(alpha), len(loss), dtype=torch.float64)], 2)
    columns = columns / loss[None, :, None]
    size = columns.norm(dim=1, keepdim=True)
    columns = columns / size
    square = columns.mT @ columns + 1e-12 * torch.eye(3, dtype=torch.float64)
    constants = torch.linalg.solve(square, columns.sum(1)[:, :, None])
    error = ((columns @ constants)[:, :, 0] - 1).square().sum(1)
    constants = constants[:, :, 0] / size[:, 0]
    error = torch.where((constants > 0).all(1), error, error + 1e3)  # last, and never none
    pick = error.argsort()[:count]
    logs = constants[pick].clamp(min=1e-6).log()
    return torch.cat([logs, alpha[pick], beta[pick]], 1)


def flops_over_6n(parameters, tokens, flops):
    """(k, h) of C = 6 N D (1 + k N^-h): the line through the logs of what runs have above 6 N D, or
    h = 0 where some have less; None within 1% of 6 N D. Head and attention are most of the FLOPs of
    tiny models and few of large ones'."""
    extra, z = flops / (6 * parameters * tokens) - 1, np.log(parameters)
    if np.abs(extra).max() < 0.01:
        return None
    if extra.min() <= 0:
        return float(np.median(extra)), 0.0
    ((start,), (slope,)) = fit_line(z, np.log(extra)[None])
    h = float(np.clip(-slope, 0, 0.9))
    return math.exp(start + (slope + h) * z.mean()), h


class ChinchillaFit(Fit):
    """theta: log A, log B, log E, alpha, beta; conditions: what flops_over_6n says of the runs."""

    @staticmethod
    def predict(theta, parameters, tokens):
        """Loss of N parameters trained on D tokens, nats a token."""
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        log_n, log_d = np.log(parameters), np.log(tokens)
        return np.exp(e) + np.exp(a - alpha * log_n) + np.exp(b - beta * log_d)

    @classmethod
    def optimum(cls, theta, flops, overhead=None):
        """(N, D, loss) that minimise the loss under 6 N D = flops, or under 6 N D (1 + k N^-h) with
        overhead (k, h), see flops_over_6n. source: [2] equation (4)"""
        a, b, _, alpha, beta = np.moveaxis(theta, -1, 0)
        log_g = (np.log(alpha / beta) + a - b) / (alpha + beta)
        log_n = log_g + beta / (alpha + beta) * np.log(flops / 6)
        k, h = overhead or (0.0, 0.0)
        low, high = np.full_like(log_n, -300.0), np.full_like(log_n, 300.0)
        for _ in range(50 if overhead else 0):  # bisection: the loss falls with N below the best
            log_n = (low + high) / 2
            factor = 1 + k * np.exp(-h * log_n)
            over = h * (1 - 1 / factor)  # d log(N factor) / d log N is 1 - over
            falls = (alpha + beta) * (log_g - log_n) + beta * np.log(flops / 6 / factor)
            falls = falls > np.log1p(-over)
            low, high = np.where(falls, log_n, low), np.where(falls, high, log_n)
        n = np.exp(log_n)
        d = flops / 6 / n / (1 + k * n**-h)
        return n, d, cls.predict(theta, n, d)

    @staticmethod
    def constants(theta):
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        return {"alpha": alpha, "beta": beta, "E": np.exp(e), "A": np.exp(a), "B": np.exp(b),
                "a": beta / (alpha + beta), "b": alpha / (alpha + beta)}


def fit_chinchilla(parameters, tokens, losses, bootstrap=0, seed=42, starts="grid", delta=1e-3,
                   flops=None):
    """The ChinchillaFit of n runs: parameters N, tokens D, losses in nats, each (n,).

    flops: (n,) C of the runs, 6 N D if None; `at` finds the best N and D for the FLOPs a token that
      these have (see flops_over_6n).

    Minimises the sum, not the mean, of Huber losses of log L: with the mean, an optimiser that
    stops at an absolute tolerance stops early, which made [2]'s printed fit [3].
    starts: "grid", the 4,500 of [2], or "projection", 16 of variable projection.
    bootstrap: samples, each fitted from the best fit with other weights of the runs, from a gamma
      distribution of mean 1 and variance 1/4; intervals are twice as wide, to make up for the
      variance, and wider for the five constants. Drawing runs with replacement, as [3] does, leaves
      some out, and a fit that is nearly one of least absolute errors rests on few: its 95%
      intervals held the truth 97 to 100% of the time. What these are worth, with 1% noise: 90 to
      98% on 60 runs; more on 25, and of one constant or another 87 to 100% on grids.
    details: objective, residuals (n,) of log L, predicted - measured.
    raises ValueError below 6 runs or 3 values of N or D, or when the loss does not fall with both.
    source: [2] equation (3), [3]
    """
    if starts not in STARTS:
        raise ValueError(f"starts must be {' or '.join(STARTS)}, got {starts!r}; choose one")
    if not len(parameters) == len(tokens) == len(losses):
        raise ValueError("parameters, tokens and losses must have one length, got "
                         f"{len(parameters)}, {len(tokens)} and {len(losses)}; align them")
    arrays = run_arrays([{"parameters": n, "tokens": d, "loss": y} for n, d, y in
                         zip(parameters, tokens, losses, strict=True)])
    if flops is not None:
        arrays["flops"] = np.asarray(flops, float)
    log_n, log_d, target = (torch.from_numpy(np.log(arrays[name]))
                            for name in ("parameters", "tokens", "loss"))
    distinct = [len(v.unique()) for v in (log_n, log_d)]
    if len(target) < 6 or min(distinct) < 3:
        raise ValueError("five constants need at least 6 runs with 3 values of N and of D, got "
                         f"{len(target)} with {distinct[0]} and {distinct[1]}; add runs")
    # The same problem around the means of log N and log D, where A and alpha hardly interact:
    centre = torch.zeros(5, 5, dtype=torch.float64)  # log A' = log A - alpha * mean(log N), ...
    centre[3, 0], centre[4, 1] = -log_n.mean(), -log_d.mean()
    log_n, log_d = log_n - log_n.mean(), log_d - log_d.mean()
    if starts == "grid":
        first = torch.from_numpy(grid_starts())
        first = first + first @ centre
    else:
        first = projected_starts(log_n, log_d, target.exp())

    def objective(theta, weight=None):
        return huber_objective(theta, log_n, log_d, target, weight, delta)

    with contextlib.ExitStack() as stack:  # of so few numbers threads would wait for each other
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        ends, values = minimise(objective, first)
        best, samples = ends[values.argmin()], None
        if not (best[3:] > LEAST_EXPONENT).all():
            raise ValueError("the loss must fall with N and D, got exponents "
                             f"{best[3]:.3g} and {best[4]:.3g}; check the table or add runs")
        if bootstrap:
            weights = np.random.default_rng(seed).gamma(4, 1 / 4, (bootstrap, len(target)))
            ends, _ = minimise(objective, best.repeat(bootstrap, 1), (torch.from_numpy(weights),))
            ends[:, 3:].clamp_(min=LEAST_EXPONENT)
            samples = (ends - ends @ centre).numpy()
    theta = (best - best @ centre).numpy()
    if theta[:3].max() > 700:  # exp overflows; a law has some 1e3 there
        raise ValueError("A and B must be finite, got exponents alpha "
                         f"{theta[3]:.3g} and beta {theta[4]:.3g} of one odd run or few; check the "
                         "table or add runs")
    predicted = ChinchillaFit.predict(theta, arrays["parameters"], arrays["tokens"])
    return ChinchillaFit(theta, samples, arrays, {
        "method": "chinchilla", "objective": float(values.min()),
        "residuals": np.log(predicted / arrays["loss"])},
        2 * math.sqrt(len(target) / (len(target) - 5)),
        (flops_over_6n(*(arrays[k] for k in ("parameters", "tokens", "flops"))),))


# -------------------------------------------------------------------------------------------------
# laws for learning rate, batch size and width


def step_law(parameters, tokens):
    """(peak learning rate, batch in tokens) for N parameters without embeddings on D tokens.
    source: [6]"""
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def deepseek_law(flops):
    """{lr, batch_tokens, flops_per_token, tokens} for C FLOPs = flops_per_token * tokens, where
    flops_per_token leaves embeddings out and counts attention. source: [5] equations (1), (4)"""
    return {"lr": 0.3118 * flops**-0.1250, "batch_tokens": 0.2920 * flops**0.3271,
            "flops_per_token": 0.1715 * flops**0.5243, "tokens": 5.8316 * flops**0.4757}


def power_lines_batch(tokens, reference_batch, reference_tokens):
    """Best batch for D tokens, in the reference's unit, from the best one of another D: as D^0.383,
    whatever N is. source: [7]"""
    return reference_batch * (tokens / reference_tokens) ** 0.383


def mup_rules(width, base_width, d_head):
    """What muP changes, with Adam, from a model of base_width to one of width: factors on learning
    rates, initial standard deviations and outputs, and the scale of attention scores.
    source: [8] table 8"""
    m = width / base_width
    return {"hidden_lr": 1 / m, "embedding_lr": 1.0, "norm_lr": 1.0, "hidden_std": m**-0.5,
            "embedding_std": 1.0, "output_multiplier": 1 / m, "attention_scale": 1 / d_head}


def most_lr(width):
    """The highest learning rate for a width: the Step Law asks 0.4 of width 48 on many tokens, with
    which real runs are unstable. MAX_LR from width 128 on, below it more by muP."""
    return MAX_LR * max(1.0, mup_rules(width, 128, 64)["hidden_lr"])


# -------------------------------------------------------------------------------------------------
# the training API: what a request may hold [1]

SEQUENCE, EVAL_TOKENS = 512, 2**18  # tokens of a sequence and of an evaluation: fixed by [1]
BUDGET_S, MOST_S, MOST_TOKENS = 43_200.0, 43_200.0, 500_000_000_000  # of a user; of one run
VOCAB_SIZE = 32_000  # of its tokenizer
API_KEY = "12345678"  # of the one user where --users names none
MOST_EVALS = 10_000  # that a law answers: 0.4 s of every user's time
REQUIRED = object()


class Refusal(ValueError):
    """An answer that is no success: HTTP status, JSON body, more headers."""

    def __init__(self, status, body, headers=()):
        super().__init__(f"the server must take the request, got {status} {str(body)[:300]}; "
                         "correct it")
        self.status, self.body, self.headers = status, body, headers


class Invalid(Exception):
    """A wrong scalar: (type, what it should be, context) of its entry in a 422 body."""


def add_error(errors, kind, loc, message, value, ctx=None):
    entry = {"type": kind, "loc": list(loc), "msg": message, "input": value}
    errors.append(entry if ctx is None else {**entry, "ctx": ctx})


def to_boolean(value):
    word = value.lower() if isinstance(value, str) else value
    for answer, words in ((True, (1, "1", "on", "t", "true", "y", "yes")),
                          (False, (0, "0", "off", "f", "false", "n", "no"))):
        if word in words:
            return answer
    if isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 2**63
                                  and value == int(value)):
        raise Invalid("bool_parsing", "a valid boolean, unable to interpret input")
    raise Invalid("bool_type", "a valid boolean")


def to_integer(value):
    """An int from an int, a bool, a whole float, or text of digits."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Invalid("finite_number", "a finite number")
        if value != int(value):
            raise Invalid("int_from_float", "a valid integer, got a number with a fractional part")
    elif isinstance(value, str):
        value = value.strip()
        if not re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*(\.0+)?", value) or len(value) > 4000:
            raise Invalid("int_parsing", "a valid integer, unable to parse string as an integer")
        value = value.split(".")[0]
    elif not isinstance(value, int):
        raise Invalid("int_type", "a valid integer")
    return int(value)


def to_number(value):
    """A float from a number, a bool or text."""
    try:
        if isinstance(value, (int, float)) or (isinstance(value, str) and value.isascii()):
            return float(value)
    except (ValueError, OverflowError):
        pass
    if isinstance(value, str):
        raise Invalid("float_parsing", "a valid number, unable to parse string as a number")
    raise Invalid("float_type", "a valid number")


def to_dtype(value):
    if value in ("float32", "bfloat16"):
        return value
    words = "'float32' or 'bfloat16'"
    raise Invalid("literal_error", words, {"expected": words})


BOUNDS = {"le": ("less_than_equal", "less than or equal to", operator.le),
          "ge": ("greater_than_equal", "greater than or equal to", operator.ge),
          "gt": ("greater_than", "greater than", operator.gt)}


def scalar(convert, **bounds):
    """A parser of what `convert` takes, within `bounds` (NaN is within none), of which the first
    that is broken is reported. A parser returns its value's parsed form or adds to `errors`."""
    def parse(value, loc, errors):
        try:
            result = convert(value)
            for name, bound in bounds.items():
                kind, text, holds = BOUNDS[name]
                if not holds(result, bound):
                    raise Invalid(kind, f"{text} {bound:.15g}", {name: bound})
            return result
        except Invalid as problem:
            kind, text, *ctx = problem.args
            add_error(errors, kind, loc, f"Input should be {text}", value, *ctx)

    return parse


def record(**fields):
    """A parser of an object with just these fields: name=parser, or name=(parser, default)."""
    fields = {k: v if isinstance(v, tuple) else (v, REQUIRED) for k, v in fields.items()}

    def parse(value, loc, errors):
        if not isinstance(value, dict):
            return add_error(errors, "model_attributes_type", loc, "Input should be a valid "
                             "dictionary or object to extract fields from", value)
        result = {}
        for name, (parser, default) in fields.items():
            if name in value:
                result[name] = parser(value[name], (*loc, name), errors)
            elif default is REQUIRED:
                add_error(errors, "missing", (*loc, name), "Field required", value)
            else:
                result[name] = default
        for name in value:
            if name not in fields:
                add_error(errors, "extra_forbidden", (*loc, name),
                          "Extra inputs are not permitted", value[name])
        return result

    return parse


boolean, integer, number = scalar(to_boolean), scalar(to_integer), scalar(to_number)
above_zero = scalar(to_integer, gt=0)
number_or_null = scalar(lambda value: None if value is None else to_number(value))
SCHEDULE = {"peak_value": 3e-4, "final_lr_frac": 0.1, "warmup_frac": 0.05, "init_value": 0.0}
parse_schedule = record(**{name: (number, default) for name, default in SCHEDULE.items()})
OPTIMIZERS = {  # AdamW alone has beta1
    "SGDConfig": record(lr_scheduler=parse_schedule, grad_clip_norm=(number_or_null, 1.0)),
    "AdamWConfig": record(
        lr_scheduler=(parse_schedule, SCHEDULE), weight_decay=(number, 0.01), beta1=(number, 0.9),
        beta2=(number, 0.95), eps=(number, 1e-8), eps_root=(number, 1e-8),
        grad_clip_norm=(number_or_null, 1.0))}


def parse_optimizer(value, loc, errors):
    """As the first kind that fits; errors are reported of both."""
    found = []
    for name, parser in OPTIMIZERS.items():
        own = []
        result = parser(value, (*loc, name), own)
        if not own:
            return result
        found += own
    errors += found


parse_fields = record(
    architecture_config=record(
        attention_bias=boolean, head_dim=integer, hidden_size=integer, intermediate_size=integer,
        num_attention_heads=integer, num_hidden_layers=integer, num_key_value_heads=integer,
        rms_norm_eps=number, rope_theta=integer, tie_word_embeddings=boolean,
        dtype=scalar(to_dtype), vocab_size=integer),
    optimizer_config=parse_optimizer, train_batch_size=above_zero, val_batch_size=above_zero,
    n_evals=(above_zero, 16), total_train_tokens=scalar(to_integer, le=MOST_TOKENS, gt=0),
    max_runtime_seconds=scalar(to_number, le=MOST_S, ge=1.0),
    model_seed=(scalar(to_integer, ge=0), 0))


def rules_of(config):
    """(kept?, text) of each rule between fields, in the contract's order; lazily, since a later one
    divides by what an earlier one checks."""
    a, o = config["architecture_config"], config["optimizer_config"]
    lr, clip, evals = o["lr_scheduler"], o["grad_clip_norm"], config["n_evals"]
    heads, kv_heads = a["num_attention_heads"], a["num_key_value_heads"]
    steps, rest = divmod(config["total_train_tokens"], SEQUENCE * config["train_batch_size"])
    yield rest == 0, "total_train_tokens must be divisible by seq_len * train_batch_size"
    yield steps % evals == 0, "total optimizer steps must be divisible by n_evals"
    yield (EVAL_TOKENS % (SEQUENCE * config["val_batch_size"]) == 0,
           "n_val_tokens must be divisible by seq_len * val_batch_size")
    for name in ("head_dim", "hidden_size", "intermediate_size", "num_attention_heads",
                 "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        yield a[name] > 0, f"{name} must be positive"
    yield (a["hidden_size"] == heads * a["head_dim"],
           "hidden_size must equal num_attention_heads * head_dim")
    yield heads % kv_heads == 0, "num_attention_heads must be divisible by num_key_value_heads"
    yield (heads == kv_heads,
           "num_key_value_heads must equal num_attention_heads; GQA is not supported")
    yield a["head_dim"] % 2 == 0, "head_dim must be even for RoPE"
    yield (a["intermediate_size"] >= a["hidden_size"],
           "intermediate_size should usually >= hidden_size")
    yield not a["rms_norm_eps"] <= 0, "rms_norm_eps must be positive"  # `not`: NaN passes
    yield a["rope_theta"] > 0, "rope_theta must be positive"
    yield 0 <= lr["warmup_frac"] < 1, "warmup_frac must be in [0, 1)"
    yield 0 <= lr["final_lr_frac"] <= 1, "final_lr_frac must be in [0, 1]"
    yield not lr["init_value"] < 0, "initial learning rate must be nonnegative"
    yield not lr["peak_value"] <= 0, "peak learning rate must be positive"
    yield clip is None or not clip <= 0, "grad_clip_norm must be positive or None"
    if "beta1" in o:
        yield not o["weight_decay"] < 0, "weight_decay must be nonnegative"
        yield 0 <= o["beta1"] < 1, "beta1 must be in [0, 1)"
        yield 0 <= o["beta2"] < 1, "beta2 must be in [0, 1)"
        yield not o["eps"] <= 0, "eps must be positive"
        yield not o["eps_root"] < 0, "eps_root must be nonnegative"


def parse_config(value, loc=("body",), errors=None):
    """A training config from a request's object: defaults filled in, keys in the contract's order.
    Entries for a 422 are added to `errors`; without it they are raised as a Refusal."""
    own = []
    config = parse_fields(value, loc, own)
    if not own and (broken := next((text for kept, text in rules_of(config) if not kept), None)):
        add_error(own, "value_error", loc, f"Value error, {broken}", value, {"error": {}})
    if own and errors is None:
        raise Refusal(422, {"detail": own})
    if own:
        errors += own
    return config


parse_final = record(training_config=parse_config, predicted_final_loss=scalar(to_number, gt=0.0))


def config_id(config):
    """The contract's unique_id of a parsed config, 20 hex digits: equal configs are duplicates."""
    def typed(module, name, value):
        return {"__type__": f"cs336_scaling.training.{module}.{name}", "__value__": value}

    optimizer = dict(config["optimizer_config"])
    optimizer["lr_scheduler"] = typed("optimizer", "WarmupCosineDecay", optimizer["lr_scheduler"])
    kind = "AdamWConfig" if "beta1" in optimizer else "SGDConfig"
    whole = typed("training_config", "TrainingConfig", {
        **config, "optimizer_config": typed("optimizer", kind, optimizer),
        "architecture_config": typed("model.basic_model", "BasicTransformerConfig",
                                     config["architecture_config"])})
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2s(text.encode(), digest_size=10).hexdigest()


def to_wire(value):
    """Compact JSON text, floats as the reference writes them: 30.0, 1e-6, 0.00001, null for NaN."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "null"
        text = np.format_float_positional(value) if "e-05" in repr(value) else repr(value)
        return re.sub(r"e-0(\d)", r"e-\1", text)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{to_wire(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_wire, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------
# what a training config trains, and what it costs


def shape_of(config):
    """model.py's ModelConfig of a parsed training config: QK-norm, SwiGLU, RoPE, pre-norm [1]."""
    a = config["architecture_config"]
    return lm.ModelConfig(
        vocab_size=a["vocab_size"], context_length=SEQUENCE, d_model=a["hidden_size"],
        num_layers=a["num_hidden_layers"], num_heads=a["num_attention_heads"],
        num_kv_heads=a["num_key_value_heads"], d_head=a["head_dim"], d_ff=a["intermediate_size"],
        rope_theta=a["rope_theta"], norm_eps=a["rms_norm_eps"], qkv_bias=a["attention_bias"],
        tie_embeddings=a["tie_word_embeddings"], qk_norm=True)


def body_parameters(shape):
    """N: the weights of the blocks and norms, without embeddings and head."""
    parts = lm.count_parameters(shape)
    return parts["attention"] + parts["feed-forward"] + parts["norms"]


def hard_limit(max_runtime_s):
    """Seconds after which a run is ended in the middle of a chunk too. source: [1]"""
    return 1.05 * max_runtime_s + 10


def completed(used_s, val_losses):
    return {"state": "completed", "used": used_s, "val_losses": val_losses}


def out_of_time(used_s, val_losses):
    reason = {"partial_val_losses": list(val_losses), "reason": "timeout"}
    return {"state": "failed", "used": used_s, "reason": reason}


def failed(failure, used_s=0.0):
    reason = {"failure": " ".join(failure.split())[:500], "reason": "unexpected"}
    return {"state": "failed", "used": used_s, "reason": reason}


class Law:
    """A loss surface: N weights without embeddings and head, D training tokens, b tokens a step,
    L = E + (A / N^alpha + B / D^beta) (1 + 0.05 ln^2(lr / lr*) + 0.02 ln^2(b / b*)).

    b* is the Step Law's, lr* too as far as most_lr(width) lets it. Seed 0 has the refitted
    Chinchilla constants [3], another seed a random surface whose best D / N at 1e18 FLOPs lies
    between 8 and 40. A measured loss is exp(noise * z) times that, z from N(0, 1) by seed and
    config: the same run gives the same losses. A run lasts 6 N D / flops_per_s simulated seconds.
    """

    def __init__(self, seed=0, noise=0.002, flops_per_s=4e14):
        self.seed, self.noise, self.flops_per_s = seed, noise, flops_per_s
        E, A, B, alpha, beta = 1.81722, 477.83, 2143.4, 0.34731, 0.36717
        if seed:
            rng = np.random.default_rng(seed)
            E, (alpha, beta) = rng.uniform(1.5, 2.2), rng.uniform(0.28, 0.42, 2)
            ratio, part = math.exp(rng.uniform(math.log(8), math.log(40))), rng.uniform(0.4, 0.9)
            N = math.sqrt(1e18 / (6 * ratio))
            A = part * N**alpha  # at the optimum alpha A / N^alpha = beta B / D^beta
            B = part * alpha / beta * (ratio * N) ** beta
        self.theta = np.array([math.log(A), math.log(B), math.log(E), alpha, beta])

    def loss(self, N, D, lr=None, batch_tokens=None, highest_lr=math.inf):
        """Loss without noise; lr and batch_tokens None for the best ones."""
        best_lr, best_batch = step_law(N, D)
        best_lr = min(best_lr, highest_lr)
        off = 0.05 * math.log((lr or best_lr) / best_lr) ** 2
        off += 0.02 * math.log((batch_tokens or best_batch) / best_batch) ** 2
        E = math.exp(self.theta[2])
        return float(E + (ChinchillaFit.predict(self.theta, N, D) - E) * (1 + off))

    def run(self, config):
        """What a run of this config ends with, by the contract's rule for its time."""
        shape, n = shape_of(config), config["n_evals"]
        N, highest_lr = float(body_parameters(shape)), most_lr(shape.d_model)
        if n > MOST_EVALS:
            raise ValueError(f"n_evals must be at most {MOST_EVALS} here, got {n}; lower it")
        tokens, batch_tokens = config["total_train_tokens"], SEQUENCE * config["train_batch_size"]
        limit = config["max_runtime_seconds"]
        lr = config["optimizer_config"]["lr_scheduler"]["peak_value"]
        z = np.random.default_rng([self.seed, int(config_id(config), 16)]).standard_normal(n)
        chunk_s, losses = 6 * N * tokens / self.flops_per_s / n, []
        for i in range(n):
            if i * chunk_s > limit:
                return out_of_time(i * chunk_s, losses)
            if (i + 1) * chunk_s > hard_limit(limit):
                return out_of_time(hard_limit(limit), losses)
            loss = self.loss(N, tokens * (i + 1) / n, lr, batch_tokens, highest_lr)
            losses.append(loss * math.exp(self.noise * z[i]))
        return (out_of_time if n * chunk_s > limit else completed)(n * chunk_s, losses)


class OptaxAdamW(lm.AdamW):
    """model.py's AdamW with optax's eps_root: sqrt(v_hat + eps_root) + eps in the denominator. At
    the contract's 1e-8 it outweighs v where gradients are below 1e-4: it cannot be left out."""

    eps_root = 0.0

    def _update(self, params, t, group):
        if not self.eps_root:
            return super()._update(params, t, group)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for p in params:
            m, v = self.state[p]["m"], self.state[p]["v"]
            m.lerp_(p.grad, 1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            denominator = (v / (1 - beta2**t) + self.eps_root).sqrt_().add_(group["eps"])
            p.mul_(1 - lr * group["weight_decay"])
            p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))


class TrainingRun:
    """One real training run of a parsed config; `run` is the loop, `report` hears of it."""

    def __init__(self, config, train_ids, valid_ids, device, val_tokens=EVAL_TOKENS,
                 report=lambda **message: None):
        self.config, self.device, self.report = config, device, report
        self.train_ids, self.valid_ids, self.val_tokens = train_ids, valid_ids, val_tokens
        shape, tokens = shape_of(config), config["total_train_tokens"]
        if tokens >= len(train_ids):
            raise ValueError(f"total_train_tokens must be below {len(train_ids)}, which the "
                             "server's text has (no token is trained on twice), got "
                             f"{tokens}; lower it")
        self.dtype = torch.float32  # bfloat16 is emulated on other devices: slower than float32
        if device.type == "cuda":
            self.dtype, _ = lm.resolve_dtype(config["architecture_config"]["dtype"], device)
        # float32 weights, gradients, AdamW's two moments; about 50 kB of objects a layer
        copies, free = 4 if "beta1" in config["optimizer_config"] else 2, lm.free_memory(device)
        needed = 4 * copies * sum(lm.count_parameters(shape).values()) + 5e4 * shape.num_layers
        if needed > free:
            raise ValueError(f"the model must fit in {free / 2**30:.1f} GiB of free memory, got "
                             f"{needed / 2**30:.1f} GiB; make it smaller")
        torch.manual_seed(config["model_seed"])
        self.model = lm.TransformerLM(shape).to(device)
        self.params = list(self.model.parameters())
        self.steps = tokens // (SEQUENCE * config["train_batch_size"])
        # Shuffled, the same for all runs: in the text's own order more tokens are other subjects
        self.order = np.random.default_rng(0).permutation((len(train_ids) - 1) // SEQUENCE)
        self.optimizer, o = None, config["optimizer_config"]  # None: SGD
        if "beta1" in o:
            self.optimizer = OptaxAdamW(self.params, 0.0, (o["beta1"], o["beta2"]), o["eps"],
                                        o["weight_decay"])  # decays all, as the contract
            self.optimizer.eps_root = o["eps_root"]
        fits = lm.largest_batch(shape, 0.8 * lm.free_memory(device), dtype=self.dtype,
                                device_type=device.type)
        most = 8 if device.type == "cpu" else fits  # more does not stay in a CPU's cache
        self.micro_batch = max(1, min(config["train_batch_size"], most, fits))

    def sequences(self, step):
        """The token windows (B, SEQUENCE + 1) of a step."""
        batch = self.config["train_batch_size"]
        starts = self.order[step * batch : (step + 1) * batch] * SEQUENCE
        windows = self.train_ids[starts[:, None] + np.arange(SEQUENCE + 1)]
        return torch.from_numpy(windows.astype(np.int64)).to(self.device)

    def learning_rate(self, step):
        """Of step 0, 1, ...: from init_value to peak_value over the warm-up, then a half cosine."""
        s = self.config["optimizer_config"]["lr_scheduler"]
        warmup = int(self.steps * s["warmup_frac"])
        lr = lm.lr_cosine_schedule(step, s["peak_value"], s["peak_value"] * s["final_lr_frac"],
                                   warmup, self.steps)
        return lr + (s["init_value"] * (1 - step / warmup) if step < warmup else 0.0)

    def train_step(self, step):
        windows = self.sequences(step)
        self.model.zero_grad(set_to_none=True)
        for part in windows.split(self.micro_batch):
            with lm.compute_context(self.device, self.dtype):
                loss = self.model.loss(part[:, :-1], part[:, 1:], reduction="sum")
            (loss / (len(windows) * SEQUENCE)).backward()
        clip, lr = self.config["optimizer_config"]["grad_clip_norm"], self.learning_rate(step)
        if clip is not None:
            lm.clip_grad_norm_(self.params, clip)
        if self.optimizer is None:
            with torch.no_grad():
                torch._foreach_add_(self.params, [p.grad for p in self.params], alpha=-lr)
            return
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def run(self):
        """What the run ends with. The clock runs from the first step and is read before each of the
        n_evals chunks and at the end, as the contract says."""
        n, limit, losses = self.config["n_evals"], self.config["max_runtime_seconds"], []
        started = time.perf_counter()
        self.report(kind="started")
        for chunk in range(n):
            if (used := time.perf_counter() - started) > limit:
                return out_of_time(used, losses)
            for step in range(chunk * self.steps // n, (chunk + 1) * self.steps // n):
                self.train_step(step)
            losses.append(lm.evaluate(  # waits for the device
                self.model.hidden_states, self.model, self.valid_ids, self.val_tokens,
                min(self.config["val_batch_size"], self.micro_batch), self.device, self.dtype))
            self.report(kind="val_losses", val_losses=losses)
        used = time.perf_counter() - started
        return (out_of_time if used > limit else completed)(used, losses)


# -------------------------------------------------------------------------------------------------
# the training API: what is kept, and how it survives a kill

SCHEMA = """
CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, sunet_id TEXT UNIQUE, key TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS experiments (
  id INTEGER PRIMARY KEY AUTOINCREMENT, user INTEGER NOT NULL, unique_id TEXT NOT NULL,
  config TEXT NOT NULL, max_runtime REAL NOT NULL, state TEXT NOT NULL DEFAULT 'queued',
  queued_at TEXT NOT NULL, dispatched_at TEXT, run_id TEXT, attempts INTEGER NOT NULL DEFAULT 0,
  used REAL, val_losses TEXT NOT NULL DEFAULT '[]', reason TEXT, ended_at TEXT,
  UNIQUE (user, unique_id));
CREATE INDEX IF NOT EXISTS by_state ON experiments (state, user);
CREATE INDEX IF NOT EXISTS by_user ON experiments (user, state, max_runtime, used);
CREATE TABLE IF NOT EXISTS final_submissions (
  user INTEGER PRIMARY KEY, config TEXT NOT NULL, loss REAL NOT NULL, submitted_at TEXT NOT NULL);
BEGIN IMMEDIATE; COMMIT;
"""
USED = """SELECT COALESCE(SUM(CASE WHEN state IN ('queued', 'running') THEN max_runtime
  ELSE MIN(MAX(1.0, COALESCE(used, 1.0)), max_runtime) END), 0.0) FROM experiments WHERE user = ?"""
# The queued experiments that may start now, users with the fewest runs first: the place of one is
# its user's running count plus its rank among that user's, then its age [1].
SELECT_FOR_DISPATCH = """
WITH running AS (SELECT user, COUNT(*) AS runs FROM experiments WHERE state = 'running'
  GROUP BY user)
SELECT experiments.* FROM experiments LEFT JOIN running USING (user) WHERE state = 'queued'
ORDER BY COALESCE(runs, 0) + ROW_NUMBER() OVER (PARTITION BY user ORDER BY queued_at, id),
  queued_at, id
LIMIT MAX(0, ? - (SELECT COUNT(*) FROM experiments WHERE state = 'running'))"""
MAX_ATTEMPTS = 3  # a run that took the server down so often is failed at start, not tried again
LOCK_WAIT_S = 5


def utc_now():
    return datetime.now(UTC).replace(tzinfo=None).isoformat() + "Z"


class Store:
    """Users, experiments and final submissions in one SQLite file.

    Writers take turns; each is answered after its commit has reached the disk (WAL,
    synchronous=FULL): what was acknowledged survives a kill or a power cut, and a budget is read
    and reserved without a race. Readers have connections of their own and wait for nobody.
    """

    def __init__(self, path, budget_s=BUDGET_S):
        self.path, self.budget_s = str(path), budget_s
        if self.path in ("", ":memory:"):
            raise ValueError(f"--db must be a file, got {self.path!r}; give a path")
        try:
            self.connection = self.connect()
            # A file that is no database ends here, one of another program below
            tables = dict(self.connection.execute("SELECT name, sql FROM sqlite_master"))
            if tables and "sunet_id" not in tables.get("users", ""):
                raise sqlite3.Error("it holds other tables")
            # The guard is held until this process ends, however it ends
            self.guard = sqlite3.connect(f"{path}.lock", timeout=0, check_same_thread=False)
            self.guard.execute("BEGIN EXCLUSIVE")
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            self.connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise ValueError(f"the database must be free and of this server, got {path}: {error}; "
                             "stop the other server or give another --db") from None
        self.turn, self.readers = threading.Lock(), queue.LifoQueue()
        self.queued = threading.Event()  # wakes a back end

    def connect(self):
        connection = sqlite3.connect(self.path, timeout=LOCK_WAIT_S, isolation_level=None,
                                     check_same_thread=False)
        connection.row_factory = sqlite3.Row
        return connection

    def close(self):
        with self.turn:
            while not self.readers.empty():
                self.readers.get().close()
            self.connection.close()
            self.guard.close()

    def write(self, function, *args):
        """function(connection, *args) inside a transaction; returns once it is on disk."""
        with self.turn, self.connection:  # commits, or rolls back what raises
            self.connection.execute("BEGIN IMMEDIATE")
            return function(self.connection, *args)

    def read(self, sql, *args):
        try:
            connection = self.readers.get_nowait()
        except queue.Empty:
            connection = self.connect()
        try:
            return connection.execute(sql, args).fetchall()
        finally:
            self.readers.put(connection)

    # ---- users and budget

    def seed_users(self, users):
        """[(id, key)] after storing [(sunet_id, key)]; a store that has other users refuses."""
        def seed(c):
            known = [tuple(row) for row in c.execute("SELECT sunet_id, key FROM users ORDER BY id")]
            if known and users not in (None, known):
                raise ValueError(f"--users must be those that {self.path} was made with, got "
                                 "others; leave it out or give another --db")
            if not known:
                c.executemany("INSERT INTO users (sunet_id, key) VALUES (?, ?)",
                              users or [("student", API_KEY)])
            return [tuple(row) for row in c.execute("SELECT id, key FROM users")]

        return self.write(seed)

    def budget(self, user, connection=None):
        """What a user has used: of a queued or running experiment all that it may use, of an ended
        one what it used, 1 s at least."""
        ((used,),) = connection.execute(USED, (user,)) if connection else self.read(USED, user)
        return {"used_seconds": used, "remaining_seconds": self.budget_s - used,
                "total_budget_seconds": self.budget_s}

    # ---- an experiment's life: queued, running, then completed or failed

    def submit(self, c, user, config):
        budget, limit = self.budget(user, c), config["max_runtime_seconds"]
        if limit > budget["remaining_seconds"]:
            raise Refusal(400, {"detail": {"message": "insufficient budget",
                                           "budget_summary": budget}})
        try:
            number = c.execute(
                "INSERT INTO experiments (user, unique_id, config, max_runtime, queued_at) "
                "VALUES (?, ?, ?, ?, ?)",
                (user, config_id(config), to_wire(config), limit, utc_now())).lastrowid
        except sqlite3.IntegrityError:
            raise Refusal(409, {"detail": "experiment already exists for this training config"}
                          ) from None
        self.queued.set()
        return {"experiment_id": number, "budget_summary": self.budget(user, c)}

    def dispatch(self, c, workers, most=None):
        """Marks what may start now as running; returns [(id, run_id, config)]."""
        started = []
        for row in c.execute(SELECT_FOR_DISPATCH, (workers,)).fetchall()[:most]:
            run_id = f"run-{row['id']}-{uuid.uuid4().hex[:12]}"
            c.execute("UPDATE experiments SET state = 'running', dispatched_at = ?, run_id = ?, "
                      "attempts = attempts + 1 WHERE id = ?", (utc_now(), run_id, row["id"]))
            started.append((row["id"], run_id, json.loads(row["config"])))
        return started

    def progress(self, c, number, run_id, val_losses):
        c.execute("UPDATE experiments SET val_losses = ? WHERE id = ? AND run_id = ? AND "
                  "state = 'running'", (to_wire(val_losses), number, run_id))

    def finish(self, c, number, run_id, end):
        """Ends an experiment that is still this run: a stale worker cannot end its successor."""
        c.execute("UPDATE experiments SET state = ?, used = ?, val_losses = ?, reason = ?, "
                  "ended_at = ? WHERE id = ? AND run_id = ? AND state = 'running'",
                  (end["state"], end["used"], to_wire(end.get("val_losses", [])),
                   to_wire(end.get("reason")), utc_now(), number, run_id))

    def recover(self, c):
        """Puts back in the queue what ran when the last server died: same id, same place, the same
        reservation, nothing charged for the lost attempt. After MAX_ATTEMPTS attempts it is failed
        instead and charged the minimum. Returns (requeued, failed)."""
        lost = c.execute("SELECT * FROM experiments WHERE state = 'running' AND attempts >= ?",
                         (MAX_ATTEMPTS,)).fetchall()
        for row in lost:
            self.finish(c, row["id"], row["run_id"], failed(
                f"ServerLost: the server ended in each of {row['attempts']} attempts"))
        return self.requeue(c), len(lost)

    def requeue(self, c, uncounted=0):
        """Puts what runs back in the queue; returns how many. uncounted: 1 when a server that stops
        in order takes its attempt back."""
        return c.execute("UPDATE experiments SET state = 'queued', dispatched_at = NULL, run_id = "
                         "NULL, val_losses = '[]', attempts = attempts - ? WHERE state = 'running'",
                         (uncounted,)).rowcount


def experiment_to_wire(row):
    """The JSON text of one experiment, keys in the contract's order; JSON is kept as it is sent."""
    state, parts = row["state"], {"queued_at": f'"{row["queued_at"]}"'}
    if state != "queued":
        parts |= {k: f'"{row[k]}"' for k in ("dispatched_at", "run_id")}
    if state in ("completed", "failed"):
        parts["used_runtime_seconds"] = to_wire(row["used"])
    if state == "failed":
        parts |= {"reason": row["reason"], "failed_at": f'"{row["ended_at"]}"'}
    elif state != "queued":
        parts["val_losses"] = row["val_losses"]
    if state == "completed":
        parts["completed_at"] = f'"{row["ended_at"]}"'
    status = ",".join(f'"{k}":{v}' for k, v in parts.items())
    return (f'{{"experiment_id":{row["id"]},"training_config":{row["config"]},'
            f'"status":{{{status},"status_type":"{state}"}}}}')


# -------------------------------------------------------------------------------------------------
# the training API: HTTP

BODY_LIMIT = 2**20  # bytes; a training config is about 1,000
CORS_ORIGINS = ("null", "http://localhost:8000", "http://127.0.0.1:8000", "http://localhost:8080",
                "http://127.0.0.1:8080", "http://hyperturing.stanford.edu:8000",
                "http://172.24.75.170:8000")
CORS_METHODS = "GET, POST, OPTIONS"
CORS_HEADERS = "Accept, Accept-Language, Content-Language, Content-Type, X-API-Key"
JSON, TEXT, HTML = "application/json", "text/plain; charset=utf-8", "text/html; charset=utf-8"


class Server(http.server.ThreadingHTTPServer):
    """The contract [1] on standard library threads; `store` holds all state."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address):
        try:
            super().__init__(address, Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"the address must be free, got {address[0]}:{address[1]} "
                             f"({error}); give another --host or --port") from None

    def attach(self, store, users=None):
        """To be called once, before serving; a start that fails earlier leaves no users behind."""
        self.store = store
        self.digests = [(user, hashlib.sha256(key.encode()).digest())
                        for user, key in store.seed_users(users)]

    def user_of(self, key):
        """The user with this key, compared in constant time with every key there is."""
        found, digest = None, hashlib.sha256(key.encode("latin-1", "replace")).digest()
        for user, known in self.digests:
            if hmac.compare_digest(known, digest):
                found = user
        return found

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # it hung up
            super().handle_error(request, client_address)


class Transport(http.server.BaseHTTPRequestHandler):
    """What every route shares: bytes, headers, CORS; a subclass has `routes`, {pattern of a path:
    {method: name of what returns (content type, text)}}."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 75  # seconds that a connection may idle

    def answer(self):
        """Every method: reads the body, finds the route, sends what it returns."""
        origin, request_id = self.headers.get("Origin"), self.headers.get("X-Request-ID")
        extra = [("X-Request-ID", request_id or uuid.uuid4().hex), ("vary", "Origin")]
        if origin in CORS_ORIGINS:
            extra.append(("access-control-allow-origin", origin))
        try:
            self.body = self.read_body()
            if self.command == "OPTIONS" and origin and self.headers.get(
                    "Access-Control-Request-Method"):
                return self.preflight(origin, extra)
            content_type, text = self.route()
            self.send(200, content_type, text.encode(), extra)
        except Refusal as refusal:
            try:
                text = "" if refusal.body is None else json.dumps(
                    refusal.body, ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                    default=bytes.decode)
                self.send(refusal.status, JSON, text.encode(), [*extra, *refusal.headers])
            except (ValueError, RecursionError):  # it echoes NaN, or bytes that are no text
                self.send(500, TEXT, b"Internal Server Error")
        except (ConnectionError, TimeoutError):  # the client went away or sends nothing
            self.close_connection = True
        except sqlite3.Error as error:  # locked by another program, or the disk is full
            print(f"serve: {self.command} {self.path[:100]!r}: {error}", file=sys.stderr)
            self.send(503, TEXT, b"Service Unavailable", extra)
        except Exception:
            traceback.print_exc()
            self.send(500, TEXT, b"Internal Server Error")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_TRACE = answer

    def send(self, status, content_type, body, headers=()):
        self.request_version = "HTTP/1.1"  # to what it takes for 0.9, TLS too, it sends no headers
        self.send_response_only(status)
        self.send_header("date", self.date_time_string())
        self.send_header("content-length", str(len(body)))
        if body:
            self.send_header("content-type", content_type)
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("connection", "close")
        self._headers_buffer.append(b"\r\n" + (b"" if self.command == "HEAD" else body))
        self.flush_headers()  # one packet

    def send_error(self, code, message=None, explain=None):  # what http.server itself refuses
        self.close_connection = True
        self.command = getattr(self, "command", None)
        self.send(code, TEXT, b"Invalid HTTP request received.")

    def log_message(self, *args):
        pass

    def read_body(self):
        """The body's bytes. A length that is missing, wrong or over the limit is refused and the
        connection closed, since what follows on it cannot be told from the body."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal(411, {"detail": "Length Required"})
        if not re.fullmatch("[0-9]+", length):
            self.close_connection = True
            raise Refusal(400, {"detail": "Content-Length must be a number"})
        if len(length) > 18 or int(length) > BODY_LIMIT:
            self.close_connection = True
            raise Refusal(413, {"detail": f"body must have at most {BODY_LIMIT} bytes"})
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client hung up")
        return body

    def preflight(self, origin, extra):
        asked = self.headers.get("Access-Control-Request-Headers", "").lower().split(",")
        allowed = {*CORS_HEADERS.lower().split(", "), ""}
        wrong = [name for name, fine in (
            ("origin", origin in CORS_ORIGINS),
            ("method", self.headers["Access-Control-Request-Method"] in CORS_METHODS.split(", ")),
            ("headers", allowed.issuperset(map(str.strip, asked)))) if not fine]
        headers = [*extra, ("access-control-allow-methods", CORS_METHODS), (
            "access-control-max-age", "600"), ("access-control-allow-headers", CORS_HEADERS)]
        if self.headers.get("Access-Control-Request-Private-Network") == "true":
            headers.append(("access-control-allow-private-network", "true"))
        text = f"Disallowed CORS {', '.join(wrong)}" if wrong else "OK"
        self.send(400 if wrong else 200, TEXT, text.encode(), headers)

    def find(self, path):
        """(methods, parts) of the route that a path names, None where there is none."""
        return next(((methods, found.groups()) for pattern, methods in self.routes.items()
                     if (found := re.fullmatch(pattern, path))), None)

    def route(self):
        """(content type, text) of what path and method name."""
        try:
            target = urllib.parse.urlsplit(self.path)
        except ValueError:
            raise Refusal(400, {"detail": "There was an error parsing the URL"}) from None
        path = urllib.parse.unquote(target.path)
        if self.requestline.split()[1].startswith("//"):  # which http.server makes one
            raise Refusal(404, {"detail": "Not Found"})
        if not (found := self.find(path)):
            if not (path.endswith("/") and self.find(path.rstrip("/"))):
                raise Refusal(404, {"detail": "Not Found"})
            host = self.headers.get("Host", "{}:{}".format(*self.server.server_address[:2]))
            place = urllib.parse.quote(path.rstrip("/")) + (target.query and f"?{target.query}")
            raise Refusal(307, None, [("location", f"http://{host}{place}")])
        methods, parts = found
        if self.command not in methods:
            raise Refusal(405, {"detail": "Method Not Allowed"}, [("allow", next(iter(methods)))])
        return getattr(self, methods[self.command])(*parts)


class Handler(Transport):
    """The contract's routes. Checks come in its order: JSON, key, schema."""

    routes = {
        "/submit": {"POST": "submit"}, "/experiments": {"GET": "list_experiments"},
        "/experiment/([^/]+)": {"GET": "get_experiment"}, "/budget": {"GET": "get_budget"},
        "/final_submission": {"POST": "save_final", "GET": "get_final"},
        "/dashboard": {"GET": "dashboard"}}

    def user(self):
        key = self.headers.get("X-API-Key")
        user = key and self.server.user_of(key)
        if not user:
            raise Refusal(401, {"detail": "invalid API key" if key else "missing X-API-Key"})
        return user

    def checked(self, parser):
        """(user, the body as `parser` has it)."""
        value, errors = self.body, []  # bytes where the type is not JSON
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        if value and re.fullmatch(r"application/([^/]+\+)?json", kind):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                add_error(errors, "json_invalid", ("body", error.pos), "JSON decode error", {},
                          {"error": error.msg})
                raise Refusal(422, {"detail": errors}) from None
            except (ValueError, RecursionError):
                raise Refusal(400, {"detail": "There was an error parsing the body"}) from None
        user = self.user()
        if value == b"":
            add_error(errors, "missing", ("body",), "Field required", None)
        else:
            value = parser(value, ("body",), errors)
        if errors:
            raise Refusal(422, {"detail": errors})
        return user, value

    def submit(self):
        store = self.server.store
        return JSON, to_wire(store.write(store.submit, *self.checked(parse_config)))

    def list_experiments(self):
        rows = self.server.store.read("SELECT * FROM experiments WHERE user = ? "
                                      "ORDER BY queued_at, id DESC", self.user())
        return JSON, "[" + ",".join(map(experiment_to_wire, rows)) + "]"

    def get_experiment(self, text):
        user, errors = self.user(), []
        number = integer(text, ("path", "experiment_id"), errors)
        if errors:
            raise Refusal(422, {"detail": errors})
        rows = self.server.store.read("SELECT * FROM experiments WHERE user = ? AND id = ?", user,
                                      number)
        if not rows:
            raise Refusal(404, {"detail": "not found"})
        return JSON, experiment_to_wire(rows[0])

    def get_budget(self):
        return JSON, to_wire(self.server.store.budget(self.user()))

    def save_final(self):
        user, final = self.checked(parse_final)
        row = (user, to_wire(final["training_config"]), final["predicted_final_loss"], utc_now())
        self.server.store.write(lambda c: c.execute(
            "INSERT OR REPLACE INTO final_submissions VALUES (?, ?, ?, ?)", row))
        return self.get_final()

    def get_final(self):
        rows = self.server.store.read("SELECT * FROM final_submissions WHERE user = ?",
                                      self.user())
        return JSON, "null" if not rows else (
            f'{{"training_config":{rows[0]["config"]},"predicted_final_loss":'
            f'{to_wire(rows[0]["loss"])},"submitted_at":"{rows[0]["submitted_at"]}"}}')

    def dashboard(self):
        return HTML, DASHBOARD


# -------------------------------------------------------------------------------------------------
# the training API: back ends


def train_all(link, data, device_name, val_tokens):
    """The process of one device: takes configs from `link` as JSON, answers with what happens."""
    def report(**message):
        link.send_bytes(json.dumps(message).encode())

    def end_with_the_server():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_server, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business
    device = lm.resolve_device(device_name)
    with contextlib.redirect_stdout(io.StringIO()):  # said before
        train_ids, valid_ids, tokenizer, _ = bpe.prepare_data(**data)
    known = tokenizer.vocab_size if tokenizer else data["vocab_size"]
    report(kind="ready")
    while True:
        config = json.loads(link.recv_bytes())
        try:
            if (asked := config["architecture_config"]["vocab_size"]) < known:
                raise ValueError(f"vocab_size must be at least {known}, which the server's "
                                 f"tokenizer has, got {asked}; raise it")
            end = TrainingRun(config, train_ids, valid_ids, device, val_tokens, report).run()
        except Exception as error:  # whatever it is, it is this run's and is reported
            end = failed(f"{type(error).__name__}: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report(kind="end", end=end)


class BackEnd(threading.Thread):
    """Takes experiments from the store, `most` at a time while fewer than `workers` run, and writes
    what `end_of` says. A write that fails because the disk is full or busy is tried again."""

    def __init__(self, store, workers, most):
        super().__init__(daemon=True)
        self.store, self.workers, self.most = store, workers, most
        self.stopping = threading.Event()

    def write(self, function, *args):
        while not self.stopping.is_set():
            try:
                return self.store.write(function, *args)
            except sqlite3.Error as error:
                print(f"serve: {error}; trying again", file=sys.stderr)
                self.stopping.wait(1)

    def run(self):
        while not self.stopping.is_set():
            started = self.ready() and self.write(self.store.dispatch, self.workers, self.most)
            for number, run_id, config in started or ():
                try:
                    end = self.end_of(number, run_id, config)  # None: the server stops first
                except Exception as error:  # it is this run's, and the others go on
                    end = failed(f"{type(error).__name__}: {error}")
                if end:
                    self.write(self.store.finish, number, run_id, end)
            if not started:
                self.store.queued.wait(0.2)
                self.store.queued.clear()

    def ready(self):
        return True

    def stop(self):
        self.stopping.set()
        self.store.queued.set()
        self.join(5)


class LawBackEnd(BackEnd):
    """Ends every queued experiment at once with what the law says."""

    def __init__(self, store, law):
        super().__init__(store, 100, 100)
        self.law = law

    def end_of(self, number, run_id, config):
        return self.law.run(config)


class TrainBackEnd(BackEnd):
    """One device of `devices`: a worker process that trains, started again when it dies."""

    def __init__(self, store, devices, device, data, val_tokens):
        super().__init__(store, devices, 1)
        self.settings, self.process = (data, device, val_tokens), None

    def ready(self):
        """Whether the worker is there, which is started if it is not."""
        if self.process is not None and self.process.is_alive():
            return True
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=train_all, args=(theirs, *self.settings), daemon=True)
        self.process.start()
        theirs.close()
        try:
            while not self.stopping.is_set():
                if self.link.poll(0.5):
                    return self.link.recv_bytes()  # it says that it is ready
        except (EOFError, OSError):
            self.process.join()
            print(f"serve: the worker of {self.settings[1]} ended at its start, exit code "
                  f"{self.process.exitcode}; trying again in 10 s", file=sys.stderr)
            self.stopping.wait(10)

    def end_of(self, number, run_id, config):
        """What the worker says. One that dies is a failed run; one that runs 10 s and 5% over its
        time, or has no first step in 30 minutes, is ended."""
        asked, began, losses = time.perf_counter(), None, []
        with contextlib.suppress(OSError):  # a worker that is dead is noticed below
            self.link.send_bytes(json.dumps(config).encode())
        while not self.stopping.is_set():
            now = time.perf_counter()
            used = now - began if began else 0.0
            if used > hard_limit(config["max_runtime_seconds"]) or (
                    not began and now - asked > 1800):
                self.process.kill()
                self.process.join()
                return out_of_time(used, losses) if began else failed("SetupError: no first step")
            try:
                if not self.link.poll(0.2):
                    continue
                message = json.loads(self.link.recv_bytes())
            except (EOFError, OSError):
                self.process.join()
                return failed("WorkerCrash: the worker process ended with exit code "
                              f"{self.process.exitcode}", used)
            if message["kind"] == "started":
                began = time.perf_counter()
            elif message["kind"] == "val_losses":
                losses = message["val_losses"]
                self.write(self.store.progress, number, run_id, losses)
            else:
                return {**message["end"], "used": message["end"]["used"] or used}

    def stop(self):
        super().stop()
        if self.process is not None:
            self.process.kill()


# -------------------------------------------------------------------------------------------------
# the training API: dashboard. What comes from the server reaches the page as text, never as HTML.

DASHBOARD = r"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<title>Scaling Experiments Dashboard</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --dim: #5d6672;
  --line: #dde1e7; --running: #2563c9; --completed: #1a7f45; --queued: #8f5b00; --failed: #c0322b }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1f26; --ink: #e8ebef;
  --dim: #9aa4b1; --line: #2d343e; --running: #6ea8ff; --completed: #4cc07d; --queued: #e0a63a;
  --failed: #ff7b72 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1100px; padding: 16px; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
header { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center }
h1 { font-size: 20px; margin: 0; flex: 1 1 auto }
input, button { font: inherit; color: inherit; background: var(--card); padding: 6px 9px;
  border: 1px solid var(--line); border-radius: 6px }
#cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin-top: 12px }
#cards div, table, dialog { background: var(--card); border: 1px solid var(--line) }
#cards div { border-radius: 8px; padding: 12px }
small, th, dt, #note { color: var(--dim) } small { display: block } #cards b { font-size: 20px }
progress { width: 100%; height: 8px; display: block; accent-color: var(--running) }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 7px 9px; border-bottom: 1px solid var(--line);
  white-space: nowrap }
tbody tr { cursor: pointer } tbody tr:hover, tbody tr:focus { background: var(--page) }
.queued { color: var(--queued) } .running { color: var(--running) }
.completed { color: var(--completed) } .failed, #note.failed { color: var(--failed) }
svg { display: block; width: 90px; height: 24px } dialog svg { width: 100%; height: 180px }
polyline { fill: none; stroke: var(--running); stroke-width: 2; vector-effect: non-scaling-stroke }
dialog { width: min(720px, 94vw); border-radius: 10px; color: var(--ink) }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px }
dd { margin: 0; overflow-wrap: anywhere } pre { font-size: 12px; overflow: auto; max-height: 40vh }
@media (max-width: 640px) { .far { display: none } th, td { padding: 7px 5px } }
</style>
<header><h1>Scaling Experiments Dashboard</h1>
<input id="key" type="password" size="12" placeholder="API key" aria-label="API key">
<label><input id="live" type="checkbox" checked> live</label></header>
<section id="cards"></section><p id="note" role="status"></p>
<div class="wide"><table><thead><tr><th>ID<th>Status<th class="far">Model<th class="far">Tokens
<th>Progress<th>Loss<th class="far">Runtime<th class="far">Curve</thead><tbody id="rows"></table>
</div><dialog id="detail"></dialog>
<script>
"use strict";
const $ = id => document.getElementById(id);
function make(tag, content, kind) {
  const node = document.createElement(tag);
  node.append(...[content ?? ""].flat());
  if (kind) node.className = kind;
  return node;
}
const losses = e => e.status.val_losses || e.status.reason?.partial_val_losses || [];
const last = e => losses(e).at(-1) ?? null, state = e => e.status.status_type;
const fixed = x => x == null ? "-" : x.toFixed(4);
const time = s => s == null ? "-" : s < 100 ? s.toFixed(1) + " s" :
  s < 7200 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(2) + " h";
const size = n => n < 1e3 ? n : n < 1e6 ? (n / 1e3).toFixed(0) + "K" :
  n < 1e9 ? (n / 1e6).toFixed(1) + "M" : (n / 1e9).toFixed(2) + "B";
function model(e) {
  const a = e.training_config.architecture_config;
  return `${a.hidden_size}h · ${a.num_hidden_layers}L · ${a.num_attention_heads}H`;
}
function bar(part, colour) {
  const node = make("progress");
  node.value = Math.max(0, Math.min(1, part));
  if (colour) node.style.accentColor = `var(--${colour})`;
  return node;
}
function curve(values) {
  const [svg, line] = ["svg", "polyline"].map(
    tag => document.createElementNS("http://www.w3.org/2000/svg", tag));
  const known = values.filter(Number.isFinite), low = Math.min(...known);
  const high = Math.max(...known) - low || 1, step = 96 / Math.max(1, values.length - 1);
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  line.setAttribute("points", values.map((v, i) => Number.isFinite(v) ?
    `${2 + i * step},${95 - 90 * (v - low) / high}` : "").join(" "));
  svg.append(line);
  return svg;
}
function cards(all, budget, final) {
  const count = (...states) => all.filter(e => states.includes(state(e))).length;
  const done = all.filter(e => state(e) == "completed" && last(e) != null);
  const best = done.sort((a, b) => last(a) - last(b))[0];
  const left = budget.remaining_seconds / budget.total_budget_seconds;
  const card = (name, value, more, ...rest) =>
    make("div", [make("small", name), make("b", String(value)), make("small", more), ...rest]);
  $("cards").replaceChildren(
    card("Experiments", all.length, `${count("queued", "running")} active, ` +
      `${count("completed")} done, ${count("failed")} failed`),
    card("Best final loss", best ? fixed(last(best)) : "-",
      best ? `experiment ${best.experiment_id}` : "none is complete"),
    card("Budget used", time(budget.used_seconds), "with reservations"),
    card("Budget remaining", time(budget.remaining_seconds),
      `${(100 * left).toFixed(1)}% of ${time(budget.total_budget_seconds)}`,
      bar(left, left < 0.1 ? "failed" : left < 0.3 ? "queued" : "completed")),
    card("Final submission", fixed(final?.predicted_final_loss),
      final ? "predicted loss" : "none yet"));
}
function row(e) {
  const seen = losses(e), evals = e.training_config.n_evals;
  const tr = make("tr", [make("td", e.experiment_id), make("td", state(e), state(e)),
    make("td", model(e), "far"), make("td", size(e.training_config.total_train_tokens), "far"),
    make("td", [`${seen.length}/${evals}`, bar(seen.length / evals)]), make("td", fixed(last(e))),
    make("td", time(e.status.used_runtime_seconds), "far"),
    make("td", seen.length > 1 ? curve(seen) : "", "far")]);
  tr.tabIndex = 0;
  tr.onclick = () => detail(e);
  tr.onkeydown = event => event.key == "Enter" && detail(e);
  return tr;
}
function detail(e) {
  const seen = losses(e), dialog = $("detail"), close = make("button", "Close (Esc)");
  close.autofocus = true;
  close.onclick = () => dialog.close();
  const facts = {status: state(e), model: model(e), queued: e.status.queued_at,
    started: e.status.dispatched_at, runtime: `${time(e.status.used_runtime_seconds)} of ` +
    time(e.training_config.max_runtime_seconds),
    reason: e.status.reason?.failure || e.status.reason?.reason,
    losses: seen.length ? `first ${fixed(seen[0])}, lowest ` +
      `${fixed(Math.min(...seen.filter(Number.isFinite)))}, last ${fixed(last(e))}` : "none yet"};
  dialog.replaceChildren(make("h3", `Experiment ${e.experiment_id}`),
    make("dl", Object.entries(facts).filter(f => f[1]).flatMap(
      ([name, text]) => [make("dt", name), make("dd", text)])),
    seen.length > 1 ? curve(seen) : "",
    make("pre", JSON.stringify(e.training_config, null, 1)), close);
  dialog.showModal();
}
async function get(path) {
  const answer = await fetch(path, {headers: {"X-API-Key": $("key").value.trim()}});
  if (!answer.ok) throw Error(`${answer.status} ${await answer.text()}`);
  return answer.json();
}
let timer;
async function refresh() {
  clearTimeout(timer);
  localStorage.setItem("expdash.apiKey", $("key").value);
  let pause = 10000;
  try {
    const [budget, all, final] = await Promise.all(
      ["budget", "experiments", "final_submission"].map(get));
    cards(all, budget, final);
    $("rows").replaceChildren(...[...all].reverse().map(row));
    $("note").textContent = `refreshed ${new Date().toLocaleTimeString()}; R refreshes`;
    $("note").className = "";
    if (all.some(e => ["queued", "running"].includes(state(e)))) pause = 2000;
  } catch (error) {
    $("note").textContent = $("key").value ? error.message : "give your API key above";
    $("note").className = "failed";
  }
  clearTimeout(timer);  // of another refresh meanwhile
  timer = setTimeout(() => $("live").checked ? refresh() : 0, pause);
}
document.onkeydown = event => event.key == "r" && event.target == document.body && refresh();
$("key").onchange = $("live").onchange = refresh;
$("key").value = localStorage.getItem("expdash.apiKey") || "";
refresh();
</script></html>
"""


# -------------------------------------------------------------------------------------------------
# the training API: client


class Client:
    """The contract's calls, with timeouts. Every call may be repeated: a submit whose answer was
    lost is refused as a duplicate (409) if it had arrived, and is then looked up."""

    def __init__(self, url, key, attempts=7):
        import requests

        if not re.fullmatch("[\x20-\x7e]*", key):
            raise ValueError("--key must be printable ASCII, got other characters; correct it")
        self.requests, self.url, self.attempts = requests, url.rstrip("/"), attempts
        self.session = requests.Session()
        self.session.headers["X-API-Key"] = key

    def call(self, method, path, body=None):
        """(status, parsed body, how often it was sent); ValueError when no answer comes."""
        for attempt in range(1, self.attempts + 1):
            try:
                answer = self.session.request(method, self.url + path, json=body, timeout=(10, 30))
                if answer.status_code < 500 and answer.status_code != 429:
                    return answer.status_code, answer.json(), attempt
                problem = f"{answer.status_code} {answer.text[:100]}"
            except (self.requests.ConnectionError, self.requests.Timeout) as error:
                problem = type(error).__name__
            except self.requests.RequestException as error:  # no such URL, or no JSON
                raise ValueError(f"the server at {self.url} must speak the training API, got "
                                 f"{type(error).__name__}; check --url") from None
            if attempt < self.attempts:
                if sys.stderr.isatty():  # elsewhere an error is one line
                    print(f"no answer from {self.url}, {problem}; trying again", file=sys.stderr)
                time.sleep(min(10, 0.25 * 2**attempt))
        raise ValueError(f"the server at {self.url} must answer, got {problem} {self.attempts} "
                         "times; check --url, or try again later: nothing is submitted twice")

    def get(self, path, read):
        """read(what the server answers to path)."""
        status, body, _ = self.call("GET", path)
        if status != 200:
            raise ValueError(f"the server must answer {path}, got {status} {json.dumps(body)[:200]}"
                             "; check --key and --url")
        try:
            return read(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the server at {self.url} must speak the training API, got another "
                             f"answer to {path} ({type(error).__name__}: {error}); check --url"
                             ) from None

    def remaining_s(self):
        return self.get("/budget", lambda budget: float(budget["remaining_seconds"]))

    def experiments(self):
        """{config_id: experiment, with its state} of this key; what our checks would refuse is
        left out."""
        def by_config(listed):
            found = {}
            for one in listed:
                one = {**one, "id": one["experiment_id"], "state": one["status"]["status_type"]}
                with contextlib.suppress(Refusal):
                    found[config_id(parse_config(one["training_config"]))] = one
            return found

        return self.get("/experiments", by_config)

    def submit(self, config):
        """(id, whether it is new) of the experiment that has this parsed config from now on.
        raises Refusal with what the server says"""
        status, body, sent = self.call("POST", "/submit", config)
        if status == 200 and "experiment_id" in body:
            return body["experiment_id"], True
        if status == 409 and (found := self.experiments().get(config_id(config))):
            return found["id"], sent > 1
        raise Refusal(status, body)


def checked_config(value, where):
    """A parsed config, or ValueError that names the place and the first thing that is wrong."""
    try:
        return parse_config(value)
    except Refusal as refusal:
        first = refusal.body["detail"][0]
        field = ".".join(map(str, first["loc"][1:]))
        raise ValueError(f"{where} must be a training config, got {field and field + ': '}"
                         f"{first['msg']}; correct it") from None


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, got {error}; correct it") from None


def read_plan(path):
    """({config_id: config}, budget in seconds) of a plan's file: a sweep, or one target's run."""
    plan = read_json(path)
    if isinstance(plan, dict) and "training_config" in plan:
        plan = {"experiments": [plan["training_config"]]}
    bodies = plan.get("experiments") if isinstance(plan, dict) else None
    if not isinstance(bodies, list) or not bodies:
        raise ValueError(f'{path} must hold {{"experiments": [...]}} with one at least, got none; '
                         "make it with plan")
    budget_s, configs = plan.get("budget_s", math.inf), {}
    if not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise ValueError(f"budget_s of {path} must be above 0, got {budget_s!r}; correct it")
    for i, body in enumerate(bodies, 1):  # of equal ones, which the server would refuse, one
        config = checked_config(body, f"experiment {i} of {path}")
        configs[config_id(config)] = config
    if sgd := sum("beta1" not in config["optimizer_config"] for config in configs.values()):
        print(f"note: {sgd} of {len(configs)} experiments train with SGD: the contract takes an "
              "optimizer_config with lr_scheduler and no AdamW field, such as weight_decay, so")
    return configs, budget_s


RESULT_START = b'{"id": '  # of result_row's lines


def read_results(path):
    """{config_id: row} of a sweep's file; half a line at its end, left by a kill, is cut off."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        rows = {config_id(parse_config(row["config"])): row
                for row in map(json.loads, whole.splitlines())}
        if not text[len(whole) :].startswith(RESULT_START[: len(text) - len(whole)]):
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold results of a sweep, got {type(error).__name__}; give "
                         "another --out") from None
    if whole != text:
        os.truncate(path, len(whole))
    return rows


@contextlib.contextmanager
def one_sweep(path):
    """Keeps other sweeps from a file of results, where the system has locks: each of two would add
    every line, and a fit count every run twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(ImportError):
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"--out must be of one sweep at a time, got {path}, which another "
                                 "writes; wait for it, or give another --out") from None
        yield


def result_row(experiment):
    """The result line of an ended experiment: parameters are those of blocks and norms, flops = 6
    parameters tokens, flops_exact model.py's count with head and attention."""
    config, status = experiment["training_config"], experiment["status"]
    shape, tokens = shape_of(config), config["total_train_tokens"]
    parameters, used = body_parameters(shape), status["used_runtime_seconds"]
    state, losses = status["status_type"], status.get("val_losses", [])
    loss = losses[-1] if state == "completed" and losses else None
    if state == "completed" and loss is None:
        state = "diverged"
    return {"id": experiment["experiment_id"], "status": state, "loss": loss,
            "parameters": parameters, "tokens": tokens, "flops": 6 * parameters * tokens,
            "flops_exact": lm.flops_per_token(shape) * tokens, "used_s": used,
            "charged_s": min(max(1.0, used), config["max_runtime_seconds"]),
            "val_losses": losses, "reason": status.get("reason"), "config": config}


class Sweep:
    """A plan's experiments on their way from waiting through active to lines of a JSONL file.

    plan: what read_plan gives
    """

    def __init__(self, client, plan, out):
        self.client, self.out = client, Path(out)
        self.waiting, self.budget_s = plan
        self.total, self.running = len(self.waiting), 0
        rows = read_results(self.out)
        self.rows = {number: rows[number] for number in self.waiting if number in rows}
        there = client.experiments()  # submitted before a kill
        if others := sum(number not in there for number in self.rows):
            print(f"note: {others} results in {out} are not of this server and key, and are not "
                  "run again; give another --out to run them here")
        left = [number for number in self.waiting if number not in self.rows]
        self.active = {number: self.waiting[number] for number in left if number in there}
        self.waiting = {number: self.waiting[number] for number in left if number not in there}

    def submit_what_fits(self):
        """Submits in the plan's order what the plan's and the server's budget can hold now."""
        if not self.waiting:
            return
        mine = sum(row["charged_s"] for row in self.rows.values())
        mine += sum(config["max_runtime_seconds"] for config in self.active.values())
        room = min(self.client.remaining_s(), self.budget_s - mine)
        for number, config in list(self.waiting.items()):
            if config["max_runtime_seconds"] > room:
                continue
            try:
                self.client.submit(config)
            except Refusal as refusal:
                if refusal.status == 400:  # another client of this key was faster
                    return
                raise
            room -= config["max_runtime_seconds"]
            self.active[number] = self.waiting.pop(number)

    def collect(self):
        """Writes the line of every active experiment that has ended; returns how many did."""
        ended, self.running = 0, 0
        start = "\r\033[K" if sys.stdout.isatty() else ""
        for number, experiment in self.client.experiments().items() if self.active else ():
            if number not in self.active:
                continue
            self.running += experiment["state"] == "running"
            if experiment["state"] in ("completed", "failed"):
                self.rows[number] = result_row(experiment)
                with open(self.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(self.rows[number]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                del self.active[number]
                ended += 1
                if (row := self.rows[number])["loss"] is None:
                    reason = row["reason"] or {"reason": "the last loss is not finite"}
                    print(f"{start}experiment {row['id']} {row['status']}: "
                          f"{reason.get('failure') or reason['reason']}")
        return ended

    def progress(self):
        rows = self.rows.values()
        best = min((f"{row['loss']:.4f}" for row in rows if row["loss"]), key=float, default="n/a")
        return (f"sweep {len(self.rows)}/{self.total} | {self.running} running | "
                f"{len(self.active) - self.running} queued | {len(self.waiting)} waiting | "
                f"{sum(row['status'] != 'completed' for row in rows)} failed | charged "
                f"{sum(row['charged_s'] for row in rows):,.0f} s | best loss {best}")

    def run(self, poll_s):
        """Until nothing waits or runs, or what waits fits no budget any more."""
        pause, shown, terminal = 0.1, None, sys.stdout.isatty()
        while True:
            self.submit_what_fits()
            ended = self.collect()
            if (line := self.progress()) != shown:
                print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n",
                      flush=True)
                shown = line
            if not self.active and (not self.waiting or not ended):
                break
            pause = 0.1 if ended else min(poll_s, pause * 1.5)
            time.sleep(pause)
        if terminal:
            print()
        if self.waiting:
            print(f"stopped before the budget ends: {len(self.waiting)} experiments were not "
                  "submitted, what is left is less than they may use")


# -------------------------------------------------------------------------------------------------
# the planner


def training_flops(shape, rule):
    """FLOPs a token: "exact" all matrix products, also the head and causal attention, or "6N"."""
    return lm.flops_per_token(shape) if rule == "exact" else 6 * body_parameters(shape)


def ladder(vocab_size):
    """ModelConfigs from 10 thousand to 800 billion weights: a block and a head for 64 of width (two
    blocks at least), d_ff 8/3 of the width to a multiple of 16. Heads are wide at every width: four
    of 16 instead of one of 64 cost a real run of width 64 1.5% of its loss, so that profiles over
    widths with heads of 64, 32 and 16 in turn zigzagged."""
    widths = (*range(16, 128, 8), *range(128, 256, 32), *range(256, 1024, 64),
              *range(1024, 2048, 128), *range(2048, 4096, 256), *range(4096, 16385, 512))
    shapes = []
    for width in widths:
        heads = max(1, round(width / 64))
        shapes.append(lm.ModelConfig(
            vocab_size=vocab_size, context_length=SEQUENCE, d_model=width, d_head=width // heads,
            num_heads=heads, num_layers=max(2, heads),
            d_ff=-(-8 * width // 48) * 16, qk_norm=True))
    return shapes


def request_body(shape, batch, tokens, lr, evals=1, limit_s=MOST_S):
    """The object for POST /submit that trains `shape`: `batch` sequences a step."""
    return {
        "architecture_config": {
            "attention_bias": False, "head_dim": shape.d_head, "hidden_size": shape.d_model,
            "intermediate_size": shape.d_ff, "num_attention_heads": shape.num_heads,
            "num_hidden_layers": shape.num_layers, "num_key_value_heads": shape.num_heads,
            "rms_norm_eps": shape.norm_eps, "rope_theta": int(shape.rope_theta),
            "tie_word_embeddings": False, "dtype": "bfloat16", "vocab_size": shape.vocab_size},
        "optimizer_config": {  # eps_root: its default 1e-8 outweighs gradients below 1e-4
            "lr_scheduler": {"peak_value": float(f"{lr:.3g}")}, "weight_decay": 0.1,
            "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "eps_root": 0.0, "grad_clip_norm": 1.0},
        "train_batch_size": batch, "val_batch_size": 64, "n_evals": evals,
        "total_train_tokens": tokens, "max_runtime_seconds": limit_s, "model_seed": 0}


def measure_speed(vocab_size, device, rule, seconds=2.0):
    """[(FLOPs a token, FLOP/s, seconds)] of real training steps of three shapes on `device`: a step
    takes `seconds` and the time for its FLOPs, from steps of one and of many sequences. A shape
    with steps over about `seconds` is left out: the one before it stands for it."""
    device, table = lm.resolve_device(device), []
    many = 4 if device.type == "cpu" else 32
    ids = np.random.default_rng(0).integers(vocab_size, size=9 * many * SEQUENCE).astype(np.uint32)
    for shape in (s for s in ladder(vocab_size) if s.d_model in (64, 256, 768)):
        flops, step_s = training_flops(shape, rule), {}
        if table and flops * many * SEQUENCE / table[-1][1] > seconds:
            break
        for batch in (1, many):
            body = request_body(shape, batch, 8 * batch * SEQUENCE, 1e-4)
            run, times = TrainingRun(parse_config(body), ids, ids, device), []
            for step in range(8):
                start = lm.time_mark(device)
                run.train_step(step)
                times.append(lm.seconds_between(start, lm.time_mark(device)))
            step_s[batch] = min(times[2:])  # the machine's, without what else it does
        sequence_s = max(step_s[many] / many / 2, (step_s[many] - step_s[1]) / (many - 1))
        table.append((flops, flops * SEQUENCE / sequence_s, max(0, step_s[1] - sequence_s)))
    return table


@dataclass(frozen=True)
class Machine:
    """How long a run takes, and what it may be."""

    speed: tuple  # ((FLOPs a token, FLOP/s, seconds a step besides),), interpolated by the first
    margin: float = 1.3  # a run may take that many times its estimate before it is cut off
    eval_tokens: int = EVAL_TOKENS
    rule: str = "exact"  # how FLOPs are counted, see training_flops
    max_tokens: int = MOST_TOKENS  # that the server has, or takes

    def seconds(self, shape, tokens, batch, evals):
        """A forward pass, of which an evaluation is made, is a third of a training step."""
        known, rates, step_s = np.array(self.speed).T
        flops = training_flops(shape, self.rule)
        at, known = math.log(flops), np.log(known)
        token_s = flops / math.exp(np.interp(at, known, np.log(rates)))
        return (token_s * (tokens + evals * self.eval_tokens / 3)
                + float(np.interp(at, known, step_s)) * tokens / (batch * SEQUENCE))


def plan_run(shape, tokens, machine, evals=1):
    """{shape, parameters, tokens, flops, seconds, body} of a run on about `tokens`: batch and
    learning rate by the Step Law, but at least LEAST_STEPS and 20 steps an evaluation; tokens
    rounded to whole steps; body is for POST /submit."""
    parameters = body_parameters(shape)
    lr, batch_tokens = step_law(parameters, tokens)
    lr = min(lr, most_lr(shape.d_model))
    most = int(tokens / SEQUENCE / max(LEAST_STEPS, 20 * evals))
    batch = max(1, min(round(batch_tokens / SEQUENCE), most))  # no power of two: losses stay even
    unit = batch * SEQUENCE * evals
    tokens = max(1, min(round(tokens / unit), machine.max_tokens // unit)) * unit
    seconds = machine.seconds(shape, tokens, batch, evals)
    limit = max(1.0, math.ceil(10 * (machine.margin * seconds + 0.5)) / 10)
    return {"shape": shape, "parameters": parameters, "tokens": tokens, "seconds": seconds,
            "flops": tokens * training_flops(shape, machine.rule),
            "body": request_body(shape, batch, tokens, lr, evals, limit)}


def plan_profile(shapes, per_token, flops, sizes, reach, machine):
    """`sizes` runs of `flops` each, from 1 / reach of to reach times the size that 20 tokens a
    weight suggest [2], where a weight is 6 of a shape's FLOPs per_token; None where shapes or text
    end before that."""
    tokens, weights = flops / per_token, np.log(per_token / 6)
    middle, reach = math.log(flops / 6 / 20) / 2, math.log(reach)
    wanted = np.linspace(middle - reach, middle + reach, sizes)
    if wanted[0] < weights[0] - 0.2 or wanted[-1] > weights[-1] + 0.2:
        return None
    chosen = sorted({int(np.abs(weights - w).argmin()) for w in wanted})
    if len(chosen) < 4 or tokens[chosen].max() > machine.max_tokens:
        return None
    return [plan_run(shapes[i], tokens[i], machine) for i in chosen]


def plan_sweep(budget, unit, vocab_size, machine):
    """(runs, cost) of IsoFLOP profiles that cost at most `budget` in `unit`, "s" or "FLOPs".

    Cost in seconds is the sum of the runs' time limits, which the API reserves: no run, however
    slow, can pass it. Of the designs below the first that fits: a wide range of budgets makes the
    extrapolation surer than more runs do, and the largest profile is most of the cost anyway.
    raises ValueError when the smallest design costs more.
    """
    shapes, cheapest = ladder(vocab_size), math.inf
    per_token = np.array([training_flops(shape, machine.rule) for shape in shapes])

    def design(top, spacing, reach, sizes):
        runs = []
        for k, count in enumerate(sizes):
            profile = plan_profile(shapes, per_token, top / spacing**k, count, reach, machine)
            if profile is None or any(r["body"]["max_runtime_seconds"] > MOST_S for r in profile):
                return None, math.inf
            runs += profile
        return runs, sum(r["body"]["max_runtime_seconds"] if unit == "s" else r["flops"]
                         for r in runs)

    for layout in ((8, 8, (5, 6, 7, 7, 7, 7)), (4, 8, (7, 9, 11, 11, 11)), (3, 6, (5, 6, 7, 7)),
                   (2, 2, (7, 7, 7, 7)), (2, 2, (4, 4, 4, 4)), (2, 2.5, (4, 5, 5))):
        for top in np.geomspace(1e26, 1e9, 681):  # 6% apart
            runs, cost = design(top, *layout)
            if cost <= budget:
                return runs, cost
            cheapest = min(cheapest, cost)
    if cheapest == math.inf:
        raise ValueError(f"three profiles of four runs must be within {machine.max_tokens:.3g} "
                         f"tokens and {MOST_S:.0f} s a run, got none that is, whatever the budget; "
                         "give more --max_tokens or --speed, or smaller --margin, --vocab_size or "
                         "--eval_tokens")
    raise ValueError("the budget must pay for three profiles of four runs within "
                     f"{machine.max_tokens:.3g} tokens and {MOST_S:.0f} s a run, got {budget:.4g} "
                     f"{unit} where the least is {cheapest:.4g}; give more, or more --max_tokens "
                     "or --speed, or smaller --margin, --vocab_size or --eval_tokens")


def fit_sweep(arrays, bootstrap):
    """The ChinchillaFit of a sweep's runs (see run_arrays), with Huber's delta at 1.345 standard
    deviations of their scatter: where that is normal, 95% as efficient as least squares."""
    table = [arrays[name] for name in ("parameters", "tokens", "loss")]
    scatter = np.median(np.abs(fit_chinchilla(*table, starts="projection").details["residuals"]))
    return fit_chinchilla(*table, bootstrap, starts="projection", flops=arrays["flops"],
                          delta=max(1e-3, 1.345 * 1.4826 * float(scatter)))


def tokens_in(shape, seconds, machine, evals):
    """About the most tokens whose run takes `seconds`, 0 where none do."""
    low, high = 0.0, math.log(machine.max_tokens)
    for _ in range(30):
        middle = (low + high) / 2
        late = plan_run(shape, math.exp(middle), machine, evals)["seconds"] > seconds
        low, high = (low, middle) if late else (middle, high)
    return min(math.exp(low), machine.max_tokens)


def plan_target(fit, vocab_size, machine, flops=None, seconds=None, evals=16):
    """The run of lowest predicted loss for `flops` or `seconds`, from plan_run, with `loss` and
    `loss_interval`: 95% of what the bootstrap's fits and the scatter of runs let one run reach."""
    best, shapes = None, ladder(vocab_size)
    for shape in shapes:
        tokens = (tokens_in(shape, seconds, machine, evals) if flops is None
                  else flops / training_flops(shape, machine.rule))
        if not 20 * evals * SEQUENCE <= tokens <= machine.max_tokens:
            continue
        loss = float(fit.predict(fit.theta, body_parameters(shape), tokens))
        if best is None or loss < best[0]:
            best = loss, shape, tokens
    asked = f"{flops:.3g} FLOPs" if flops else f"{seconds:.4g} s"
    if best is None and tokens < 20 * evals * SEQUENCE:  # of the largest shape, and of all others
        raise ValueError("the target must pay for 20 steps between evaluations of some model, got "
                         f"{asked}; raise it")
    if best is None or best[1] is shapes[-1]:
        raise ValueError(f"the best model must have at most {body_parameters(shapes[-1]):.2g} "
                         f"weights and {machine.max_tokens:.3g} tokens, got a larger one for "
                         f"{asked}; lower the target")
    run = plan_run(best[1], best[2], machine, evals)
    run["body"]["max_runtime_seconds"] = min(run["body"]["max_runtime_seconds"], MOST_S)
    run["loss"] = float(fit.predict(fit.theta, run["parameters"], run["tokens"]))
    residuals = fit.details["residuals"]
    residuals = residuals * math.sqrt(len(residuals) / (len(residuals) - 5))
    scatter = np.random.default_rng(0).choice(residuals, len(fit.samples))
    draws = fit.widened(run["loss"], fit.predict(fit.samples, run["parameters"], run["tokens"]))
    run["loss_interval"] = np.percentile(draws * np.exp(scatter), LEVEL).tolist()
    return run


# -------------------------------------------------------------------------------------------------
# which law predicts


def loss_laws(runs, profiles, theta=None):
    """{law: predict(N, D, C) -> loss} of these runs: the parametric law, fitted here unless theta
    is its fit, and a power law C^-gamma through the lowest losses of the two largest budgets, whose
    slope is the nearest to a target's whichever way the losses bend. A profile's lowest loss is its
    parabola's, or its best run's where the vertex is outside."""
    laws, lowest = {}, []
    with contextlib.suppress(ValueError):  # too few runs, or a loss that does not fall
        theta = fit_sweep(runs, 0).theta if theta is None else theta
        laws["parametric law"] = lambda N, D, C: float(ChinchillaFit.predict(theta, N, D))
    for flops, log_n, loss, _ in profiles[-2:]:
        _, value, inside = lowest_of_parabola(log_n, loss[None])
        lowest.append((flops, value[0] if inside[0] else loss.min()))
    (C1, loss1), (C2, loss2) = lowest
    gamma = math.log(loss1 / loss2) / math.log(C2 / C1)
    laws["power law"] = lambda N, D, C: float(loss2 * (C2 / C) ** gamma)
    return laws


def hold_out_errors(runs, profiles):
    """{law: root mean square of log(predicted / measured)} at the lowest runs of the two largest
    budgets, each predicted from the runs of smaller ones, of which two at least must be left."""
    errors = collections.defaultdict(list)
    for k in range(max(2, len(profiles) - 2), len(profiles)):
        flops, log_n, loss, log_d = profiles[k]
        below = runs["flops"] < math.sqrt(flops * profiles[k - 1][0])
        smaller = {name: runs[name][below] for name in ("parameters", "tokens", "flops", "loss")}
        best = loss.argmin()
        for law, predict in loss_laws(smaller, profiles[:k]).items():
            predicted = predict(math.exp(log_n[best]), math.exp(log_d[best]), flops)
            errors[law].append(math.log(predicted / loss[best]))
    return {law: math.sqrt(np.mean(np.square(values))) for law, values in errors.items()}


def choose_law(run, runs, fit):
    """Puts into `run`, from plan_target with `fit` of `runs`, `law`, the loss that it predicts,
    `laws` {law: {loss, error}}, and an interval that holds those of laws that did nearly as well.

    Small runs that cannot tell E bend in ways the parametric law has no constant for; its bootstrap
    knows nothing of that, a budget held out shows it. A law's error is that of hold_out_errors, and
    at least the scatter of the runs around the parametric fit, so that luck does not choose. A
    power law's interval is twice its error, for each step between budgets, in logs, that the target
    is beyond the largest one.
    """
    profiles = isoflop_profiles(runs)
    residuals, at = fit.details["residuals"], (run["parameters"], run["tokens"], run["flops"])
    scatter = math.sqrt(residuals @ residuals / (len(residuals) - 5))
    errors = {k: max(v, scatter) for k, v in hold_out_errors(runs, profiles).items()}
    best = min(errors, key=errors.get)  # the parametric law, which comes first, of equal ones
    laws = {law: {"loss": predict(*at), "error": errors[law]}
            for law, predict in loss_laws(runs, profiles, fit.theta).items() if law in errors}
    (first, *_), (last, *_) = profiles[-2:]
    steps, held = max(1, math.log(run["flops"] / last) / math.log(last / first)), []
    for law, row in laws.items():
        if law == "parametric law":
            bounds = run["loss_interval"]
        else:
            bounds = [row["loss"] * math.exp(s * steps * row["error"]) for s in (-2, 2)]
        held += bounds if row["error"] <= 2 * errors[best] else []
    run |= {"law": best, "laws": laws, "loss": laws[best]["loss"],
            "loss_interval": [min(held), max(held)]}


# -------------------------------------------------------------------------------------------------
# plots


def draw_law(axis, fit, name, label, flops, points=None):
    """The line of N_opt, D_opt or loss over `flops`, with its 95% band."""
    rows = [fit.at(c) for c in flops]
    axis.plot(flops, [r[name] for r in rows], color="C0")
    if all(f"{name}_interval" in row for row in rows):
        low, high = np.array([r[f"{name}_interval"] for r in rows]).T
        axis.fill_between(flops, low, high, color="C0", alpha=0.2, label="95%")
        axis.legend()
    if points:
        axis.plot(*zip(*((p["flops"], p[name]) for p in points), strict=True), "k.")
    scale = "linear" if name == "loss" else "log"  # log labels read 3.2 x 10^0
    axis.set(xscale="log", yscale=scale, xlabel="FLOPs", ylabel=label)


def plot_fit(fit, budgets, path):
    """Four panels: IsoFLOP curves, N_opt, D_opt and loss; of a parametric fit its contours and
    residuals instead of D_opt and curves."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, got none; pip install matplotlib") from None
    runs, figure = fit.runs, Figure(figsize=(12, 9), layout="constrained")
    figure.suptitle(f"{fit.details['method']}, {len(runs['loss'])} runs")
    axes = figure.subplots(2, 2).ravel()
    flops = np.geomspace(runs["flops"].min(), max([runs["flops"].max(), *budgets]), 40)
    if isinstance(fit, IsoflopFit):
        minima = fit.details["minima"]
        for i, (c, log_n, loss, _) in enumerate(fit.details["profiles"]):
            axes[0].plot(np.exp(log_n), loss, ".-", color=f"C{i % 10}", label=f"{c:.2g} FLOPs")
        axes[0].plot(*zip(*((m["parameters"], m["loss"]) for m in minima), strict=True), "k*")
        axes[0].set(xscale="log", xlabel="parameters", ylabel="loss, nats a token")
        axes[0].legend(fontsize=8)
        draw_law(axes[2], fit, "tokens", "best tokens", flops, minima)
    else:
        minima, n, d = None, runs["parameters"], runs["tokens"]
        grid_n, grid_d = np.geomspace(n.min(), n.max(), 60), np.geomspace(d.min(), d.max(), 60)
        surface = fit.predict(fit.theta, *np.meshgrid(grid_n, grid_d))
        lines = axes[0].contour(grid_n, grid_d, surface, 15, linewidths=0.8)
        axes[0].clabel(lines, fontsize=7)
        axes[0].plot(n, d, "k.", markersize=3)
        best_n, best_d, _ = np.transpose([fit.optimum(fit.theta, c, *fit.conditions)
                                          for c in flops])
        axes[0].plot(best_n, best_d, "r--")
        axes[0].set(xscale="log", yscale="log", xlabel="parameters", ylabel="tokens",
                    title="loss, runs and the best N and D", xlim=(n.min(), n.max()),
                    ylim=(d.min(), d.max()))
        axes[2].plot(runs["flops"], fit.details["residuals"], "k.", markersize=3)
        axes[2].axhline(0, linewidth=0.5)
        axes[2].set(xscale="log", xlabel="FLOPs", ylabel="log loss, predicted - measured")
    draw_law(axes[1], fit, "parameters", "best parameters", flops, minima)
    draw_law(axes[3], fit, "loss", "loss, nats a token", flops, minima)
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------
# the verbs


METHOD_FLAGS = {"isoflop": {"profile": "minimum"}, "chinchilla": {"starts": "grid"}}
BACK_END_FLAGS = {
    "law": {"law_seed": 0, "law_noise": 0.002, "law_flops": 4e14},
    "train": {"data": "python", "data_dir": "data", "vocab_size": lm.CPU_MODEL["vocab_size"],
              "tokenizer": None, "device": "auto", "val_tokens": EVAL_TOKENS}}


def fill_in(args, choice, table):
    """Gives flags their defaults from table, {value of --choice: {flag that it alone takes:
    default}}, and refuses one that is given with another value."""
    for value, flags in table.items():
        for name, default in flags.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif (given := getattr(args, choice)) != value:
                raise ValueError(f"--{name} must go with --{choice} {value}, got --{choice} "
                                 f"{given}; leave it out")


def drop_highest(runs, count, rule):
    """The runs whose loss lies strictly below the count-th highest one, as [3] drops five."""
    if not count:
        return runs
    losses = run_arrays(runs, rule)
    if count >= len(losses["loss"]):
        raise ValueError(f"--drop_worst must leave runs, got {count} of {len(losses['loss'])}; "
                         "lower it")
    limit = np.sort(losses["loss"])[-count]
    return [r for r, loss in zip(losses["rows"], losses["loss"], strict=True) if loss < limit]


def compare_methods(runs, budgets, rule):
    """{method: {a, parameters, times_the_lowest} or {refused: reason}} of all profile methods:
    N_opt at each budget, and over the lowest of the methods there."""
    result = {}
    for method in PROFILE_METHODS:
        try:
            fit = fit_isoflop(runs, method, rule=rule)
        except ValueError as reason:
            result[method] = {"refused": str(reason)}
            continue
        result[method] = {"a": fit.exponents()["a"],
                          "parameters": [fit.at(c)["parameters"] for c in budgets]}
    answers = [row for row in result.values() if "a" in row]
    lowest = np.min([row["parameters"] for row in answers], 0) if answers else None
    for row in answers:
        row["times_the_lowest"] = (row["parameters"] / lowest).tolist()
    return result


def fit_runs(args):
    """The verb fit: one table of runs in, exponents and optima out."""
    fill_in(args, "method", METHOD_FLAGS)
    table = load_runs(args.runs)
    runs = drop_highest(table, args.drop_worst, args.flops)
    if args.method == "chinchilla":
        arrays = run_arrays(runs, args.flops)
        fit = fit_chinchilla(arrays["parameters"], arrays["tokens"], arrays["loss"],
                             args.bootstrap, args.seed, args.starts, flops=arrays["flops"])
        more = {"objective": fit.details["objective"], "flops_over_6n": fit.conditions[0]}
    else:
        fit = fit_isoflop(runs, args.profile, args.bootstrap, args.seed, args.flops)
        more = {"profile": args.profile, "minima": fit.details["minima"],
                "methods": compare_methods(runs, args.budget, args.flops)}
    used = len(fit.runs["loss"])
    result = {"method": args.method, "runs": used, "left_out": len(table) - used,
              **fit.exponents(), **more, "optima": [fit.at(c) for c in args.budget]}
    if args.json:
        print(json.dumps(result))
    else:
        print_fit(result, fit, args)
    if args.plot:  # last: a path that cannot be written costs no result
        plot_fit(fit, args.budget, args.plot)


def interval_text(row, name, form):
    """"value (low to high)" of row[name]."""
    bounds = row.get(f"{name}_interval")
    text = f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else ""
    return f"{row[name]:{form}}{text}"


def print_fit(result, fit, args):
    given = "nominally 95%" if fit.samples is not None else "left out: no bootstrap or residuals"
    print(f"{result['runs']} runs, {result['left_out']} left out, {args.method}; intervals are "
          f"{given}")
    if args.method == "isoflop":
        print("minimum of each profile:")
        flops, medians = fit.runs["flops"], np.array([m["flops"] for m in result["minima"]])
        nearest = np.abs(np.log(flops[:, None] / medians)).argmin(1)
        for i, m in enumerate(result["minima"]):
            low, high = flops[nearest == i].min(), flops[nearest == i].max()
            merged = f" ({low:.3g} to {high:.3g} taken as one)" if high > 1.03 * low else ""
            print(f"  {m['flops']:.3g} FLOPs{merged} | N {m['parameters']:.4g} | "
                  f"D {m['tokens']:.4g} | loss {m['loss']:.4f}")
        print(f"N_opt ~ C^a, a = {interval_text(result, 'a', '.5f')}; D_opt ~ C^b, b = "
              f"{interval_text(result, 'b', '.5f')}")
        print(f"loss = E + K C^-gamma, E = {interval_text(result, 'E', '.4f')}, K = "
              f"{result['K']:.4g}, gamma = {interval_text(result, 'gamma', '.4f')}")
        if len(result["minima"]) < 4:
            print("note: 3 budgets cannot tell E, which is 0 here: the loss beyond them is a guess "
                  "without an interval")
    else:
        print(f"L = E + A / N^alpha + B / D^beta, sum of Huber losses {result['objective']:.8f}")
        if overhead := fit.conditions[0]:
            print("the runs' C = 6 N D (1 + {:.4g} N^-{:.4g}), and so are optima; N_opt ~ C^a and "
                  "D_opt ~ C^b are those of 6 N D".format(*overhead))
        for name, form in (("E", ".4f"), ("A", ".2f"), ("B", ".1f"), ("alpha", ".4f"),
                           ("beta", ".4f"), ("a", ".4f"), ("b", ".4f")):
            print(f"  {name} = {interval_text(result, name, form)}")
    for row in result["optima"]:
        print(f"at {row['flops']:.3g} FLOPs: N {interval_text(row, 'parameters', '.4g')} | D "
              f"{interval_text(row, 'tokens', '.4g')} | D/N "
              f"{row['tokens'] / row['parameters']:.1f} | loss {interval_text(row, 'loss', '.4f')}")
    print_methods(result.get("methods", {}), args.budget)


def print_methods(methods, budgets):
    """A line for each method of compare_methods; those refused for one reason share theirs."""
    lines = {}
    for method, row in methods.items():
        text = row.get("refused") or ", ".join([f"a {row['a']:.5f}", *(
            f"N_opt({c:.3g}) {n:.4g} ({r:.2f} times the lowest)" for c, n, r in
            zip(budgets, row["parameters"], row["times_the_lowest"], strict=True))])
        lines.setdefault(text, []).append(method)
    for text, names in lines.items():
        print(f"by {', '.join(names)}: {text}")


def make_machine(args):
    """The Machine of the flags; its speed measured here unless --speed says it."""
    if args.margin < 1:
        raise ValueError(f"--margin must be at least 1, got {args.margin}; runs would be cut off")
    if args.speed:
        table = [(1.0, args.speed, 0.0)]
    else:
        table = measure_speed(args.vocab_size, args.device or "auto", args.flops)
        print("measured: " + "; ".join(f"{speed:.3g} FLOP/s and {1e3 * step_s:.1f} ms a step at "
                                       f"{flops:.3g} FLOPs a token" for flops, speed, step_s in
                                       table), file=sys.stderr)
    return Machine(tuple(table), args.margin, args.eval_tokens, args.flops, args.max_tokens)


def plan(args):
    """The verb plan: without runs a sweep that the budget pays, with them what to train."""
    if bool(args.runs) != bool(args.target_s or args.target_flops):
        raise ValueError("--target_s and --target_flops must come with a run table, --budget_s and "
                         f"--budget_flops without, got {args.runs or 'no table'}; change that")
    if not args.runs:
        return plan_new_sweep(args)
    runs = load_runs(args.runs)
    arrays = run_arrays(runs, args.flops)
    largest = None
    with contextlib.suppress(KeyError, Refusal):  # no sweep's row
        largest = parse_config(arrays["rows"][int(arrays["flops"].argmax())]["config"])
    swept = largest and largest["architecture_config"]["vocab_size"]
    if swept and args.vocab_size not in (None, swept):
        raise ValueError(f"--vocab_size must be that of the runs, {swept}, whose losses no other "
                         f"has, got {args.vocab_size}; leave it out")
    args.vocab_size = args.vocab_size or swept or VOCAB_SIZE
    fit = fit_sweep(arrays, 1000)
    machine = make_machine(args)
    run = plan_target(fit, args.vocab_size, machine, args.target_flops, args.target_s)
    run |= {"law": "parametric law", "laws": {}}
    with contextlib.suppress(ValueError):  # the table is no IsoFLOP sweep: nothing to hold out
        choose_law(run, arrays, fit)
    schedule = run["body"]["optimizer_config"]["lr_scheduler"]
    methods = compare_methods(runs, [run["flops"]], args.flops)
    result = {"training_config": run["body"], "predicted_final_loss": run["loss"],
              "loss_interval": run["loss_interval"], "fit": fit.exponents(), "methods": methods,
              **{k: run[k] for k in ("parameters", "tokens", "flops", "seconds", "law", "laws")}}
    lm.write_json(result, args.out or "final.json")
    c, (low, high) = run["shape"], run["loss_interval"]
    print(f"fit of {len(arrays['loss'])} runs: " + ", ".join(
        f"{k} {interval_text(result['fit'], k, '.4g')}" for k in ("alpha", "beta", "E")))
    print(f"train: width {c.d_model}, {c.num_layers} layers, {c.num_heads} heads, d_ff {c.d_ff}: "
          f"{run['parameters']:,} weights without embeddings, on {run['tokens']:,} tokens")
    print(f"batch {run['body']['train_batch_size']} sequences of {SEQUENCE}, learning rate "
          f"{schedule['peak_value']:g}, {run['flops']:.3g} FLOPs, about {run['seconds']:,.0f} s")
    other = deepseek_law(run["flops"])
    print(f"by DeepSeek's law: {other['batch_tokens'] / SEQUENCE:.1f} sequences, learning rate "
          f"{other['lr']:.3g}")
    if largest:
        width = largest["architecture_config"]["hidden_size"]
        batch = power_lines_batch(run["tokens"], largest["train_batch_size"],
                                  largest["total_train_tokens"])
        rules = mup_rules(c.d_model, width, c.d_head)
        print(f"from the sweep's largest run: {batch:.1f} sequences by Power Lines; by muP from "
              f"width {width}, " + ", ".join(f"{k} {v:.4g}" for k, v in rules.items()))
    for law, row in run["laws"].items():
        print(f"by the {law}: loss {row['loss']:.4f}; off on larger budgets, or the runs' scatter: "
              f"{100 * row['error']:.2f}%")
    print(f"predicted loss {run['loss']:.4f} ({low:.4f} to {high:.4f}) by the {run['law']}, at "
          f"{run['flops'] / arrays['flops'].max():.3g} times the FLOPs of the largest run")
    if args.target_s and run["flops"] < arrays["flops"].max():
        print(f"note: {args.target_s:g} s buy less than the largest run; is the speed here that of "
              "the runs? --speed says it")
    if (tokens := fit.at(run["flops"])["tokens"]) > machine.max_tokens:
        print(f"note: {tokens:.3g} tokens would be best, a run may have {machine.max_tokens:.3g}")
    print_methods(methods, [run["flops"]])


def plan_new_sweep(args):
    """Writes --out: {"experiments": [submit bodies, cheapest first], "budget_s": ...}."""
    budget, unit = (args.budget_s, "s") if args.budget_s else (args.budget_flops, "FLOPs")
    args.vocab_size = args.vocab_size or VOCAB_SIZE
    runs, cost = plan_sweep(budget, unit, args.vocab_size, make_machine(args))
    runs.sort(key=lambda r: r["seconds"])
    limits = sum(r["body"]["max_runtime_seconds"] for r in runs)
    lm.write_json({"experiments": [r["body"] for r in runs], "budget_s": args.budget_s or limits},
                  args.out or "plan.json")
    for r in runs:
        c = r["shape"]
        print(f"{r['flops']:.3g} FLOPs | width {c.d_model} | {c.num_layers} layers | N "
              f"{r['parameters']:,} | D {r['tokens']:,} | about {r['seconds']:.1f} s")
    print(f"{len(runs)} runs cost at most {cost:.5g} of {budget:.5g} {unit}, about "
          f"{sum(r['seconds'] for r in runs):,.0f} s; written to {args.out or 'plan.json'}")


def read_users(path):
    """[(sunet_id, api_key)] of a CSV whose first row is sunet_id,api_key."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *users = [tuple(row) for row in csv.reader(file) if row] or [()]
    except (ValueError, csv.Error) as problem:
        raise ValueError(f"{path} must be CSV in UTF-8, got {problem}; correct it") from None
    if header != ("sunet_id", "api_key") or not users or any(
            len(user) != 2 or not all(user) for user in users) or any(
            len(set(column)) < len(users) for column in zip(*users, strict=True)):
        raise ValueError(f"{path} must have the row sunet_id,api_key and then one row a user, all "
                         "different, got others; correct it")
    return users


def make_back_ends(args, store):
    """The threads that end experiments, not yet started: one for a law, or one a device."""
    if args.backend == "law":
        law = Law(args.law_seed, args.law_noise, args.law_flops)
        print("law: " + ", ".join(f"{k} {v:.5g}" for k, v in ChinchillaFit.constants(law.theta
                                                                                    ).items()))
        return [LawBackEnd(store, law)]
    data = {k: getattr(args, k) for k in ("data", "vocab_size", "data_dir", "tokenizer")}
    bpe.prepare_data(**data)  # made once, before the workers ask for it
    names = args.device.split(",")
    if args.device == "auto" and torch.cuda.device_count() > 1:
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = [str(lm.resolve_device(name)) for name in names]
    return [TrainBackEnd(store, len(devices), device, data, args.val_tokens) for device in devices]


def serve(args):
    """The verb serve: until Ctrl-C or SIGTERM."""
    fill_in(args, "backend", BACK_END_FLAGS)
    users = read_users(args.users) if args.users else None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server((args.host, args.port)))  # before there are any files
        Path(args.db).parent.mkdir(parents=True, exist_ok=True)
        store = stack.enter_context(contextlib.closing(Store(args.db, args.budget_s)))
        back_ends = make_back_ends(args, store)
        server.attach(store, users)
        ((ended,),) = store.read("SELECT COUNT(*) FROM experiments WHERE ended_at IS NOT NULL")
        if ended:
            print(f"{ended} experiments in {args.db} have ended before, and stay as they are")
        requeued, lost = store.write(store.recover)
        if requeued or lost:
            print(f"runs of the server before: {requeued} queued again, {lost} failed after "
                  f"{MAX_ATTEMPTS} attempts")
        for number in (signal.SIGTERM, signal.SIGINT):  # a shell's & leaves SIGINT ignored
            signal.signal(number, signal.default_int_handler)
        for back_end in back_ends:
            back_end.start()
        print(f"training API on http://{args.host}:{server.server_port}, dashboard at /dashboard, "
              f"{'your users' if users else f'key {API_KEY}'}, {args.backend} back end, {args.db}",
              flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped: what was queued or running goes on at the next start")
        for back_end in back_ends:
            back_end.stop()
        with contextlib.suppress(sqlite3.Error):  # else it counts as a lost attempt
            store.write(store.requeue, 1)


def submit(args):
    """The verb submit: one config, or what plan --out wrote as the final submission."""
    client, content = Client(args.url, args.key), read_json(args.config)
    if isinstance(content, dict) and "training_config" in content:
        final = {k: content.get(k) for k in ("training_config", "predicted_final_loss")}
        status, body, _ = client.call("POST", "/final_submission", final)
        if status != 200:
            raise Refusal(status, body)
    else:
        number, new = client.submit(checked_config(content, args.config))
        if not new:
            raise ValueError(f"the config must be new, got that of experiment {number}; see GET "
                             f"/experiment/{number}, or change its model_seed")
        body = {"experiment_id": number, "budget_summary": client.get("/budget", dict)}
    print(json.dumps(body))


def sweep(args):
    """The verb sweep: runs a plan; what was done before is not done again."""
    client, plan = Client(args.url, args.key), read_plan(args.plan)
    with one_sweep(Path(args.out)):
        runs = Sweep(client, plan, args.out)
        runs.run(args.poll_s)
    predicted = read_json(args.plan).get("predicted_final_loss")
    for row in runs.rows.values() if predicted else ():
        if row["loss"]:
            print(f"predicted loss {predicted:.4f}, realised {row['loss']:.4f}: "
                  f"{100 * (row['loss'] / predicted - 1):+.2f}%")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, without the usage of so many flags
        self.exit(2, f"scaling.py: error: {message}; see {self.prog} --help\n")


def build_parser():
    parser = Parser(prog="scaling.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    positive, whole = lm.positive(float), lm.positive(int)
    zero_or_more, samples = lm.positive(float, zero=True), lm.positive(int, zero=True)

    def verb(function, name, meaning, **more):
        p = verbs.add_parser(name, help=meaning, **more)
        p.set_defaults(function=function)
        return p, p.add_argument

    _, add = verb(fit_runs, "fit", "exponents and optima from a table of runs")
    add("runs", help=".json, .jsonl or .csv")
    add("--method", default="isoflop", choices=METHOD_FLAGS)
    add("--profile", choices=PROFILE_METHODS,
        help="isoflop: what the best run of a budget is (default: minimum)")
    add("--starts", choices=STARTS,
        help="chinchilla: 4,500 starts or 16 of variable projection (default: grid)")
    add("--budget", type=positive, nargs="+", action="extend", default=[], metavar="C",
        help="FLOPs to extrapolate to")
    add("--bootstrap", type=samples, default=4000, help="samples (default: 4000)")
    add("--flops", default="exact", choices=("exact", "6N"),
        help="of a sweep's runs: all matrix products, or 6 N D (default: exact)")
    add("--drop_worst", type=samples, default=0, metavar="K", help="leave out the K highest losses")
    add("--seed", type=samples, default=42)
    add("--plot", metavar="PNG")
    add("--json", action="store_true", help="one JSON object")

    p, add = verb(plan, "plan", "a sweep for a budget, or what to train after it")
    add("runs", nargs="?", help="results of a sweep (default: propose the sweep)")
    one_of = p.add_mutually_exclusive_group(required=True).add_argument
    one_of("--budget_s", type=positive, help="of the sweep, seconds of one device")
    one_of("--budget_flops", type=positive)
    one_of("--target_s", type=positive, help="of the final run, instead of the next")
    one_of("--target_flops", type=positive)
    one_of = p.add_mutually_exclusive_group().add_argument
    one_of("--speed", type=positive, help="FLOP/s (default: measured here)")
    one_of("--device", help="to measure on (default: auto)")
    add("--flops", default="exact", choices=("exact", "6N"),
        help="FLOPs a token: all matrix products, or 6 N as the handout counts")
    add("--vocab_size", type=whole, help=f"(default: that of the runs, else {VOCAB_SIZE})")
    add("--eval_tokens", type=samples, default=EVAL_TOKENS, help="of one evaluation")
    add("--max_tokens", type=whole, default=MOST_TOKENS, help="of a run: what the server has")
    add("--margin", type=positive, default=1.3, help="time limit over the estimate")
    add("--out", help="file to write (default: plan.json; of a target, final.json)")

    _, add = verb(serve, "serve", "serve the training API")
    add("--backend", choices=BACK_END_FLAGS, default="law",
        help="real training, or a stated loss law (default: law)")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--db", default="data/training_api.db", help="all that is kept (default: %(default)s)")
    add("--users", help=f"CSV, first row sunet_id,api_key (default: one user, key {API_KEY})")
    add("--budget_s", type=positive, default=BUDGET_S, help="seconds a user")
    add("--law_seed", type=samples, help="0: Chinchilla's law; another: a random one")
    add("--law_noise", type=zero_or_more, help="standard deviation of log loss (default: 0.002)")
    add("--law_flops", type=positive, help="FLOP/s simulated (default: 4e14)")
    add("--data", help="text to train on, as for train.py (default: python)")
    add("--data_dir", help="where tokenizer and token files go (default: data)")
    add("--vocab_size", type=whole, help="of the tokenizer (default: train.py's)")
    add("--tokenizer", help="a tokenizer.json (default: train one)")
    add("--device", help="auto (every GPU, else the CPU), or names with commas between")
    add("--val_tokens", type=whole, help="of an evaluation (default: 2^18)")

    api = argparse.ArgumentParser(add_help=False)
    api.add_argument("--url", default=os.environ.get("A3_API_URL", "http://127.0.0.1:8000"))
    api.add_argument("--key", default=os.environ.get("A3_API_KEY", API_KEY))
    _, add = verb(submit, "submit", "one experiment, or the final submission", parents=[api])
    add("config", help="JSON: a training config, or what plan wrote for a target")
    _, add = verb(sweep, "sweep", "run a plan, or go on with it", parents=[api])
    add("--plan", required=True, help="JSON that plan wrote")
    add("--out", default="results.jsonl", help="a line a run (default: %(default)s)")
    add("--poll_s", type=positive, default=5.0, help="longest pause between looks")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    lm.print_any_text()
    try:
        return args.function(args)
    except (ValueError, OSError, sqlite3.Error) as error:
        parser.exit(2, f"scaling.py: error: {lm.first_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "scaling.py: interrupted; run it again, a sweep goes on\n")


if __name__ == "__main__":
    sys.exit(main())
