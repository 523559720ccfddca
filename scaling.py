"""Scaling laws: fit them to runs, plan the runs, and train them behind an API with a hard budget.

    python scaling.py fit isoflops_curves.json --budget 1e23 1e24   # 72 runs: N_opt, D_opt, intervals
    python scaling.py fit chinchilla_points.csv --method chinchilla --drop_worst 5   # alpha 0.3473
    python scaling.py plan --budget_s 600 --out plan.json           # a sweep that this machine can pay
    python scaling.py plan results.jsonl --target_flops 1e18 --out final.json        # what to train

A run table is JSON (a list of objects), CSV or JSONL; a run has a loss and two of parameters N,
tokens D and FLOPs C; the third is from C = 6 N D. Losses are in nats a token.

Sources
[1] CS336 assignment 3 (scaling) handout, Stanford 2026
[2] Hoffmann et al. 2022, Chinchilla, arXiv 2203.15556
[3] Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, arXiv 2404.10102
[4] Porian et al. 2024, Resolving Discrepancies in Compute-Optimal Scaling, arXiv 2406.19146
[5] DeepSeek LLM 2024, arXiv 2401.02954
[6] Li et al. 2025, Step Law, arXiv 2503.04715
[7] Bergsma et al. 2025, Power Lines, arXiv 2505.13738
[8] Yang et al. 2022, Tensor Programs V (muP), arXiv 2203.03466
[9] Akima 1970, A New Method of Interpolation, J. ACM 17(4)

Dims: S bootstrap samples or starts, K budgets, n runs (of a profile or of a table).
"""

import argparse
import csv
import io
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import model as lm

# What run tables call a quantity; the first name is ours.
COLUMNS = {
    "parameters": ("parameters", "Model Size", "model_size", "n_params", "N"),
    "tokens": ("tokens", "tokens_trained", "Training Tokens", "D"),
    "flops": ("flops", "compute_budget", "Training FLOP", "flops_budget", "C"),
    "loss": ("loss", "final_loss", "val_loss"),
}
SAME_BUDGET = 1.1  # runs whose FLOPs differ by less are one profile [4]: real runs round their steps
LEVEL = (2.5, 97.5)  # percentiles of an interval: 95%


# -------------------------------------------------------------------------------------------------
# tables of runs


def load_runs(path):
    """The rows of a .json list, .jsonl or .csv as dicts; numbers stay as the file spells them."""
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        if Path(path).suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:  # a sweep that was killed may have left half a last line
            lines = [line for line in text.split("\n")[:-1] + [text.split("\n")[-1]] if line.strip()]
            rows = [json.loads(line) for line in lines]
    except ValueError as problem:
        raise ValueError(f"{path} must be JSON, JSONL or CSV, got {problem}; repair or remove that "
                         "line") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold one object a run, got {'none' if not rows else 'other'}"
                         "; give a table of runs")
    return rows


def run_arrays(runs):
    """{parameters, tokens, flops, loss: (n,) float64, rows: the n rows used} of a list of dicts.

    Runs whose `status` is there and not "completed" are left out. raises ValueError that names the
    row, from 1, when a number is missing, not finite or not above 0.
    """
    rows = [(i, row) for i, row in enumerate(runs, 1) if row.get("status", "completed") == "completed"]
    if not rows:
        raise ValueError(f"a run table must hold completed runs, got 0 of {len(runs)}; give one "
                         "with results")
    present = {key for _, row in rows for key in row}
    found = {name: next((c for c in names if c in present), None) for name, names in COLUMNS.items()}
    known = [name for name in ("parameters", "tokens", "flops") if found[name]]
    if not found["loss"] or len(known) < 2:
        raise ValueError("columns must give loss and two of parameters, tokens, flops, got "
                         f"{', '.join(map(str, sorted(map(str, present))))}; rename them")
    arrays = {}
    for name in (*known, "loss"):
        arrays[name] = np.empty(len(rows))
        for place, (i, row) in enumerate(rows):
            value = row.get(found[name])
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not 0 < number < math.inf:
                raise ValueError(f"{found[name]} must be a finite number above 0, got {value!r} in "
                                 f"run {i}; correct or remove it")
            arrays[name][place] = number
    if "tokens" not in arrays:
        arrays["tokens"] = arrays["flops"] / (6 * arrays["parameters"])
    elif "parameters" not in arrays:
        arrays["parameters"] = arrays["flops"] / (6 * arrays["tokens"])
    elif "flops" not in arrays:
        arrays["flops"] = 6 * arrays["parameters"] * arrays["tokens"]
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

    def at(self, flops):
        """{flops, parameters, tokens, loss} of the best run for `flops`, and *_interval, 95%."""
        result = {"flops": float(flops)}
        values = self.optimum(self.theta, float(flops))
        result |= {name: float(v) for name, v in zip(("parameters", "tokens", "loss"), values)}
        if self.samples is not None:
            for name, draws in zip(("parameters", "tokens", "loss"),
                                   self.optimum(self.samples, float(flops)), strict=True):
                result[f"{name}_interval"] = np.percentile(draws, LEVEL).tolist()
        return result

    def exponents(self):
        """{name: value} of the law's exponents and constants; with samples {name_interval: ...}."""
        result = {name: float(v) for name, v in self.constants(self.theta).items()}
        if self.samples is not None:
            result |= {f"{name}_interval": np.percentile(draws, LEVEL).tolist()
                       for name, draws in self.constants(self.samples).items()}
        return result


# -------------------------------------------------------------------------------------------------
# IsoFLOP profiles


def isoflop_profiles(runs):
    """[(flops, log N (n,), loss (n,), log D (n,))] by budget, each sorted by N; of runs of one size
    the best, so that a profile may hold a learning-rate sweep."""
    order = np.argsort(runs["flops"], kind="stable")
    cuts, first = [], None
    for i in order:
        if first is None or runs["flops"][i] > SAME_BUDGET * runs["flops"][first]:
            cuts.append([])
            first = i
        cuts[-1].append(i)
    profiles = []
    for members in cuts:
        flops = float(np.median(runs["flops"][members]))
        best = {}
        for i in sorted(members, key=lambda i: -runs["loss"][i]):
            best[runs["parameters"][i]] = i
        chosen = [best[size] for size in sorted(best)]
        if len(chosen) < 3:
            raise ValueError(f"a profile must have at least 3 model sizes, got {len(chosen)} at "
                             f"{flops:.3g} FLOPs; add runs of that budget or remove it")
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


def profile_laws(profiles, losses, method, jitter=None):
    """theta (S, 7) of IsoflopFit for losses [(S, n) a profile], and the minima (x (S, K), log D,
    loss, inside). jitter: a generator that moves a lowest run by up to half a step of the grid."""
    x, log_d, lowest, inside = [], [], [], []
    for (_, log_n, _, log_tokens), y in zip(profiles, losses, strict=True):
        place, value, ok = PROFILE_METHODS[method](log_n, y)
        if jitter is not None and method.startswith("minimum"):
            half = np.interp(place, log_n, np.gradient(log_n)) / 2
            place = place + half * jitter.uniform(-1, 1, len(place))
        slope = np.polyfit(log_n, log_tokens, 1)
        tokens = np.interp(place, log_n, log_tokens)
        outside = place - place.clip(log_n[0], log_n[-1])
        x, log_d = x + [place], log_d + [tokens + slope[0] * outside]
        lowest, inside = lowest + [value], inside + [ok]
    x, log_d, lowest, inside = (np.stack(v, 1) for v in (x, log_d, lowest, inside))
    c = np.log([p[0] for p in profiles])
    if method == "minimum_linear":
        laws = []
        for v in (x, log_d):
            scale = v.mean(1)
            _, k, exponent = fit_power(c, np.exp(v - scale[:, None]), offset=False)
            laws += [k + scale, exponent]
    else:
        laws = [*fit_line(c, x), *fit_line(c, log_d)]
    e, k, exponent = fit_power(c, lowest, offset=True)
    if len(c) < 4:
        k, exponent = fit_line(c, np.log(lowest))
        e = np.zeros_like(k)
    return np.stack([*laws, e, k, -exponent], 1), (x, log_d, lowest, inside)


def noisy_profiles(profiles, samples, rng):
    """[(S, n)] losses: a smooth curve through each profile times e^r, r drawn from the residuals of
    all profiles, widened for the constants that the curves took. None without such residuals."""
    curves, residuals, freedom = [], [], 0
    for _, log_n, loss, _ in profiles:
        degree = 3 if len(loss) >= 6 else 2
        z = (log_n - log_n.mean()) / np.ptp(log_n)
        curve = np.polyval(np.polyfit(z, np.log(loss), degree), z)
        curves.append(curve)
        residuals.append(np.log(loss) - curve)
        freedom += len(loss) - degree - 1
    residuals = np.concatenate(residuals)
    if freedom < 1:
        return None
    residuals = residuals * math.sqrt(len(residuals) / freedom)
    return [np.exp(curve + rng.choice(residuals, (samples, len(curve)))) for curve in curves]


def fit_isoflop(runs, method="minimum", bootstrap=0, seed=42):
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
    runs = run_arrays(runs)
    profiles = isoflop_profiles(runs)
    theta, minima = profile_laws(profiles, [p[2][None] for p in profiles], method)
    for (flops, log_n, _, _), inside in zip(profiles, minima[3][0], strict=True):
        if not inside:
            raise ValueError(f"a profile must have its minimum inside, got none by {method} at "
                             f"{flops:.3g} FLOPs, N {math.exp(log_n[0]):.3g} to "
                             f"{math.exp(log_n[-1]):.3g}; add smaller or larger models there")
    samples, clipped = None, 0.0
    if bootstrap:
        rng = np.random.default_rng(seed)
        losses = noisy_profiles(profiles, bootstrap, rng)
        if losses is not None:
            samples, drawn = profile_laws(profiles, losses, method, rng)
            clipped = float(1 - drawn[3].mean())
    optima = [{"flops": p[0], "parameters": math.exp(x), "tokens": math.exp(d), "loss": float(y)}
              for p, x, d, y in zip(profiles, *(m[0] for m in minima[:3]), strict=True)]
    return IsoflopFit(theta[0], samples, runs, {"method": method, "minima": optima,
                                                "profiles": profiles, "at_an_end": clipped})


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
    return np.array(list(itertools.product(large, large, np.arange(-1, 1.5, 0.5), exponent, exponent)))


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


class ChinchillaFit(Fit):
    """theta: log A, log B, log E, alpha, beta."""

    @staticmethod
    def predict(theta, parameters, tokens):
        """Loss of N parameters trained on D tokens, nats a token."""
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        return np.exp(e) + np.exp(a - alpha * np.log(parameters)) + np.exp(b - beta * np.log(tokens))

    @classmethod
    def optimum(cls, theta, flops):
        """(N, D, loss) that minimise the loss under 6 N D = flops. source: [2] equation (4)"""
        a, b, _, alpha, beta = np.moveaxis(theta, -1, 0)
        log_g = (np.log(alpha / beta) + a - b) / (alpha + beta)
        log_n = log_g + beta / (alpha + beta) * np.log(flops / 6)
        n, d = np.exp(log_n), flops / 6 / np.exp(log_n)
        return n, d, cls.predict(theta, n, d)

    @staticmethod
    def constants(theta):
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        return {"alpha": alpha, "beta": beta, "E": np.exp(e), "A": np.exp(a), "B": np.exp(b),
                "a": beta / (alpha + beta), "b": alpha / (alpha + beta)}


def fit_chinchilla(parameters, tokens, losses, bootstrap=0, seed=42, starts="grid", delta=1e-3):
    """The ChinchillaFit of n runs: parameters N, tokens D, losses in nats, each (n,).

    Minimises the sum, not the mean, of Huber losses of log L: with the mean, optimisers that stop at
    an absolute tolerance stop early, which made [2]'s printed fit [3]. starts: "grid", the 4,500 of
    [2], or "projection", 16 of variable projection. bootstrap: that many resamples of the runs, each
    fitted from the best fit. details: objective, residuals of log L. source: [2] [3]
    """
    arrays = run_arrays([dict(parameters=n, tokens=d, loss=y) for n, d, y in
                         zip(parameters, tokens, losses, strict=True)])
    log_n, log_d, target = (torch.from_numpy(np.log(arrays[k])) for k in
                            ("parameters", "tokens", "loss"))
    if len(target) < 6 or min(len(log_n.unique()), len(log_d.unique())) < 3:
        raise ValueError("five constants need at least 6 runs with 3 values of N and of D, got "
                         f"{len(target)} with {len(log_n.unique())} and {len(log_d.unique())}; "
                         "add runs")
    if starts not in ("grid", "projection"):
        raise ValueError(f"starts must be grid or projection, got {starts!r}; choose one of these")
    # The same problem around the mean of log N and log D, where A and alpha hardly interact.
    mean_n, mean_d = log_n.mean(), log_d.mean()
    log_n, log_d = log_n - mean_n, log_d - mean_d
    if starts == "grid":
        first = torch.from_numpy(grid_starts())
        first[:, 0] -= first[:, 3] * mean_n
        first[:, 1] -= first[:, 4] * mean_d
    else:
        first = projected_starts(log_n, log_d, target.exp())

    def objective(theta, weight=None):
        return huber_objective(theta, log_n, log_d, target, weight, delta)

    ends, values = minimise(objective, first)
    best = ends[values.argmin()]
    if not (best[3:] > 0).all():
        raise ValueError(f"alpha and beta must be above 0, got {best[3]:.3g} and {best[4]:.3g}: the "
                         "loss does not fall with N and D; check the table, add runs")
    samples = None
    if bootstrap:
        draws = np.random.default_rng(seed).multinomial(len(target), [1 / len(target)] * len(target),
                                                        size=bootstrap)
        samples, _ = minimise(objective, best.repeat(bootstrap, 1),
                              (torch.from_numpy(draws.astype(float)),))

    def uncentred(theta):
        theta = theta.clone()
        theta[..., 0] += theta[..., 3] * mean_n
        theta[..., 1] += theta[..., 4] * mean_d
        return theta.numpy()

    fit = ChinchillaFit(uncentred(best), None if samples is None else uncentred(samples), arrays)
    residuals = np.log(fit.predict(fit.theta, arrays["parameters"], arrays["tokens"]))
    fit.details = {"method": "chinchilla", "objective": float(values.min()),
                   "residuals": residuals - np.log(arrays["loss"])}
    return fit
