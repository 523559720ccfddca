"""Scaling laws: fit them to runs, plan the runs, and train them behind an API with a hard budget.

    python scaling.py fit isoflops_curves.json --budget 1e23 1e24    # N_opt, D_opt, how sure
    python scaling.py fit chinchilla_points.csv --method chinchilla --drop_worst 5  # alpha 0.3473
    python scaling.py plan --budget_s 7200 --out plan.json           # a sweep this machine can pay
    python scaling.py plan results.jsonl --target_s 3600 --out final.json    # what to train then

A run table is JSON (a list of objects), CSV or JSONL; a run has a loss and two of parameters N,
tokens D and FLOPs C; the third is from C = 6 N D. Losses are in nats a token. N is what the table
says; sweeps and plans count the weights of blocks and norms, without embeddings and head.

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

Dims: S bootstrap samples or starts, K budgets, n runs of a profile or of a table, P constants.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

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
STARTS, RESAMPLE = ("grid", "projection"), ("smooth", "runs")  # of a parametric fit


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
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as problem:
        raise ValueError(f"{path} must be JSON, JSONL or CSV, got {problem}; repair or remove that "
                         "line") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold one object a run, got {'none' if not rows else 'other'}"
                         "; give a table of runs")
    return rows


def run_arrays(runs, rule="exact"):
    """{parameters, tokens, flops, loss: (n,) float64, rows: the n rows used} of a list of dicts.

    Runs whose `status` is there and not "completed" are left out. rule: "6N" passes over a column
    flops_exact, which counts head and attention. raises ValueError that names the
    row, from 1, when a number is missing, not finite or not above 0.
    """
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
        return {"flops": float(flops)} | self.summary(lambda theta: dict(
            zip(("parameters", "tokens", "loss"), self.optimum(theta, float(flops)), strict=True)))

    def exponents(self):
        """{name: value} of the law's exponents and constants; with samples {name_interval: ...}."""
        return self.summary(self.constants)

    def summary(self, quantities):
        """{name: float} of quantities(theta), and with samples {name_interval: [low, high]}."""
        result = {name: float(value) for name, value in quantities(self.theta).items()}
        if self.samples is not None:
            result |= {f"{name}_interval": np.percentile(draws, LEVEL).tolist()
                       for name, draws in quantities(self.samples).items()}
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


def profile_minima(profiles, losses, method, jitter=None):
    """(log N, log D, loss, inside), each (S, K): where profiles are lowest, for losses [(S, n)].
    jitter: a generator that moves a lowest run by up to half a step of its grid."""
    found = []
    for (_, log_n, _, log_tokens), y in zip(profiles, losses, strict=True):
        place, value, inside = PROFILE_METHODS[method](log_n, y)
        if jitter is not None and method.startswith("minimum"):
            place = place + np.interp(place, log_n, np.gradient(log_n)) * jitter.uniform(
                -0.5, 0.5, len(place))
        tokens = np.interp(place, log_n, log_tokens)
        found.append((place, tokens, value, inside))
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
    """(shifts of log N, log D and log loss of the minima, each (S, K); share of them at an end).

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
    x, d, loss, inside = profile_minima(profiles, noisy, method, rng)
    x0, d0, loss0, _ = profile_minima(profiles, [np.exp(curve)[None] for curve in curves], method)
    return x - x0, d - d0, np.log(loss / loss0), float(1 - inside.mean())


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
    theta, samples, at_an_end = laws_through(budgets, x, d, loss, method)[0], None, 0.0
    if bootstrap and (shifts := bootstrap_minima(profiles, method, bootstrap, seed)):
        dx, dd, dloss, at_an_end = shifts
        samples = laws_through(budgets, x + dx, d + dd, loss * np.exp(dloss), method)
    minima = [{"flops": c, "parameters": math.exp(n), "tokens": math.exp(t), "loss": float(y)}
              for c, n, t, y in zip(budgets, x[0], d[0], loss[0], strict=True)]
    return IsoflopFit(theta, samples, runs, {"method": method, "minima": minima,
                                             "profiles": profiles, "at_an_end": at_an_end})


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


class ChinchillaFit(Fit):
    """theta: log A, log B, log E, alpha, beta."""

    @staticmethod
    def predict(theta, parameters, tokens):
        """Loss of N parameters trained on D tokens, nats a token."""
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        log_n, log_d = np.log(parameters), np.log(tokens)
        return np.exp(e) + np.exp(a - alpha * log_n) + np.exp(b - beta * log_d)

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


@contextlib.contextmanager
def one_thread():
    """Rows of a few hundred numbers: a second thread gains less than it costs others to wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw_weights(rng, samples, n, resample):
    """((samples, n) weights of runs, factor on the deviations of what is fitted with them).

    "runs" draws n runs with replacement, as [3] does. A fit that is nearly one of least absolute
    errors rests on few runs, and leaving these out moves it too far: its 95% intervals held the
    truth 97 to 100% of the time on 30 to 108 runs. "smooth" weights, from a gamma distribution of
    mean 1 and variance 1/4, leave none out; deviations are doubled to make up for the variance.
    """
    if resample == "runs":
        return rng.multinomial(n, np.full(n, 1 / n), samples).astype(float), 1.0
    return rng.gamma(4, 1 / 4, (samples, n)), 2.0


def fit_chinchilla(parameters, tokens, losses, bootstrap=0, seed=42, starts="grid", delta=1e-3,
                   resample="smooth"):
    """The ChinchillaFit of n runs: parameters N, tokens D, losses in nats, each (n,).

    Minimises the sum, not the mean, of Huber losses of log L: with the mean, an optimiser that
    stops at an absolute tolerance stops early, which made [2]'s printed fit [3].
    starts: "grid", the 4,500 of [2], or "projection", 16 of variable projection.
    bootstrap: samples, each fitted from the best fit. resample: see draw_weights.
    details: objective, residuals (n,) of log L, predicted - measured.
    raises ValueError below 6 runs or 3 values of N or D, or when the loss does not fall with both.
    source: [2] equation (3), [3]
    """
    for name, value, known in (("starts", starts, STARTS), ("resample", resample, RESAMPLE)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}; choose one")
    arrays = run_arrays([{"parameters": n, "tokens": d, "loss": y} for n, d, y in
                         zip(parameters, tokens, losses, strict=True)])
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

    with one_thread():
        ends, values = minimise(objective, first)
        best, samples = ends[values.argmin()], None
        if not (best[3:] > 0).all():
            raise ValueError("the loss must fall with N and D, got exponents "
                             f"{best[3]:.3g} and {best[4]:.3g}; check the table or add runs")
        if bootstrap:
            weights, factor = draw_weights(np.random.default_rng(seed), bootstrap, len(target),
                                           resample)
            ends, _ = minimise(objective, best.repeat(bootstrap, 1), (torch.from_numpy(weights),))
            samples = best + factor * (ends - best)
            samples[:, 3:].clamp_(min=1e-3)  # with less no optimum exists
            samples = (samples - samples @ centre).numpy()
    theta = (best - best @ centre).numpy()
    predicted = ChinchillaFit.predict(theta, arrays["parameters"], arrays["tokens"])
    return ChinchillaFit(theta, samples, arrays, {
        "method": "chinchilla", "objective": float(values.min()),
        "residuals": np.log(predicted / arrays["loss"])})


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


# -------------------------------------------------------------------------------------------------
# the planner

SEQUENCE, EVAL_TOKENS = 512, 2**18  # tokens: of a sequence, and of one evaluation by the API
MOST_S, MOST_TOKENS = 43_200, 500_000_000_000  # what the API accepts for a run


def body_parameters(config):
    """N: the weights of the blocks and norms, without embeddings and head."""
    parts = lm.count_parameters(config)
    return parts["attention"] + parts["feed-forward"] + parts["norms"]


def training_flops(config, rule):
    """FLOPs a token: "exact" all matrix products, also the head and causal attention, or "6N"."""
    return lm.flops_per_token(config) if rule == "exact" else 6 * body_parameters(config)


def ladder(vocab_size):
    """ModelConfigs from 10 thousand to 10 billion weights: a block for 64 of width, at least two,
    heads of 64 where they fit, d_ff 8/3 of the width to a multiple of 16."""
    widths = (*range(16, 128, 16), *range(128, 256, 32), *range(256, 1024, 64),
              *range(1024, 2048, 128), *range(2048, 4097, 256))
    configs = []
    for width in widths:
        d_head = next(d for d in (64, 32, 16) if width % d == 0)
        configs.append(lm.ModelConfig(
            vocab_size=vocab_size, context_length=SEQUENCE, d_model=width, d_head=d_head,
            num_heads=width // d_head, num_layers=max(2, round(width / 64)),
            d_ff=-(-8 * width // 48) * 16, qk_norm=True))
    return configs


def measure_speed(vocab_size, device, dtype, seconds=2.0):
    """[(FLOPs a token, FLOP/s)] of training steps of three shapes, uncompiled, on `device`. A shape
    whose steps would take longer than `seconds` is left out: the one before it stands for it."""
    device, table = lm.resolve_device(device), []
    batch = 4 if device.type == "cpu" else 32
    for config in (c for c in ladder(vocab_size) if c.d_model in (64, 256, 768)):
        step_flops = lm.flops_per_token(config) * batch * SEQUENCE
        if table and step_flops / table[-1][1] > seconds:
            break
        model = lm.TransformerLM(config).to(device)
        optimizer = lm.AdamW(model.parameters(), 1e-4)
        tokens = torch.randint(vocab_size, (batch, SEQUENCE + 1), device=device)
        times = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < 20):
            start = lm.time_mark(device)
            with lm.compute_context(device, dtype):
                loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(lm.seconds_between(start, lm.time_mark(device)))
        table.append((lm.flops_per_token(config), step_flops / float(np.median(times[1:]))))
    return table


@dataclass(frozen=True)
class Machine:
    """How long a run takes: speed is [(FLOPs a token, FLOP/s)], interpolated in logs."""

    speed: tuple
    overhead_s: float  # of a run, beside steps and evaluations
    margin: float  # a run may take that many times its estimate before it is cut off
    eval_tokens: int
    rule: str  # how FLOPs are counted, see training_flops
    max_lr: float = 0.05  # the Step Law is of larger models; it would ask 0.2 of 20,000 weights

    def rate(self, config):
        """Tokens a second in training."""
        x, y = np.log(self.speed).T
        flops = training_flops(config, self.rule)
        return float(np.exp(np.interp(np.log(flops), x, y))) / flops

    def seconds(self, config, tokens, evals=1):
        return (tokens + evals * self.eval_tokens / 3) / self.rate(config) + self.overhead_s

    def tokens_in(self, config, seconds, evals=1):
        return (seconds - self.overhead_s) * self.rate(config) - evals * self.eval_tokens / 3


def plan_run(config, tokens, machine, evals=1):
    """{config, parameters, tokens, flops, seconds, body} of a run on about `tokens`: batch and
    learning rate by the Step Law, tokens rounded to whole steps; body is for POST /submit."""
    parameters = body_parameters(config)
    lr, batch_tokens = step_law(parameters, tokens)
    lr = min(lr, machine.max_lr)
    sequences = 2 ** max(0, round(math.log2(batch_tokens / SEQUENCE)))
    while sequences > 1 and tokens < 20 * evals * sequences * SEQUENCE:  # at least 20 steps each
        sequences //= 2
    unit = sequences * SEQUENCE * evals
    tokens = max(1, round(tokens / unit)) * unit
    seconds = machine.seconds(config, tokens, evals)
    c, limit = config, max(1.0, math.ceil(10 * (machine.margin * seconds + 0.5)) / 10)
    body = {
        "architecture_config": {
            "attention_bias": False, "head_dim": c.d_head, "hidden_size": c.d_model,
            "intermediate_size": c.d_ff, "num_attention_heads": c.num_heads,
            "num_hidden_layers": c.num_layers, "num_key_value_heads": c.num_heads,
            "rms_norm_eps": c.norm_eps, "rope_theta": int(c.rope_theta),
            "tie_word_embeddings": False, "dtype": "bfloat16", "vocab_size": c.vocab_size},
        "optimizer_config": {  # eps_root: its default 1e-8 outweighs gradients below 1e-4
            "lr_scheduler": {"peak_value": float(f"{lr:.3g}")}, "weight_decay": 0.1,
            "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "eps_root": 0.0, "grad_clip_norm": 1.0},
        "train_batch_size": sequences, "val_batch_size": 64, "n_evals": evals,
        "total_train_tokens": tokens, "max_runtime_seconds": limit, "model_seed": 0}
    return {"config": config, "parameters": parameters, "tokens": tokens, "seconds": seconds,
            "flops": tokens * training_flops(config, machine.rule), "body": body}


def plan_profile(configs, flops, sizes, reach, machine):
    """`sizes` runs of `flops` each, from 1 / reach of to reach times the size that 20 tokens a
    weight suggest [2], where a weight is 6 FLOPs; None where `configs` end before that."""
    per_token = np.array([training_flops(c, machine.rule) for c in configs])
    tokens, weights = flops / per_token, np.log(per_token / 6)
    middle, reach = math.log(flops / 6 / 20) / 2, math.log(reach)
    wanted = np.linspace(middle - reach, middle + reach, sizes)
    if wanted[0] < weights[0] - 0.2 or wanted[-1] > weights[-1] + 0.2:
        return None
    chosen = sorted({int(np.abs(weights - w).argmin()) for w in wanted})
    if len(chosen) < 4:
        return None
    return [plan_run(configs[i], tokens[i], machine) for i in chosen]


def plan_sweep(budget, unit, vocab_size, machine):
    """(runs, cost) of IsoFLOP profiles that cost at most `budget` in `unit`, "s" or "FLOPs".

    Cost in seconds is the sum of the runs' time limits, which the API reserves: no run, however
    slow, can pass it. Of the designs below the first that fits: a wide range of budgets makes the
    extrapolation surer than more runs do, and the largest profile is most of the cost anyway.
    raises ValueError when the smallest design costs more.
    """
    configs, cheapest = ladder(vocab_size), math.inf

    def design(top, spacing, reach, sizes):
        runs = []
        for k, count in enumerate(sizes):
            profile = plan_profile(configs, top / spacing**k, count, reach, machine)
            if profile is None:
                return None, math.inf
            runs += profile
        if any(r["body"]["max_runtime_seconds"] > MOST_S or r["tokens"] > MOST_TOKENS
               for r in runs):
            return None, math.inf
        cost = (r["body"]["max_runtime_seconds"] if unit == "s" else r["flops"] for r in runs)
        return runs, sum(cost)

    for shape in ((8, 8, (5, 6, 7, 7, 7, 7)), (4, 8, (5, 6, 7, 7, 7)), (3, 6, (5, 6, 7, 7)),
                  (2, 4, (5, 6, 7)), (2, 2.5, (4, 5, 5))):
        for top in np.geomspace(1e26, 1e9, 681):  # 6% apart
            runs, cost = design(top, *shape)
            if cost <= budget:
                return runs, cost
            cheapest = min(cheapest, cost)
    raise ValueError(f"the budget must pay for three profiles of four runs, got {budget:.4g} "
                     f"{unit}; give at least {cheapest:.4g}, or smaller --vocab_size and "
                     "--eval_tokens")


def plan_target(fit, vocab_size, machine, flops=None, seconds=None, evals=16):
    """The run of lowest predicted loss for `flops` or `seconds`, from plan_run, with `loss` and
    `loss_interval`: 95% of what the bootstrap's fits and the scatter of runs let one run reach."""
    best = None
    for config in ladder(vocab_size):
        if flops is not None:
            tokens = flops / training_flops(config, machine.rule)
        else:
            tokens = machine.tokens_in(config, seconds, evals)
        if not 20 * evals * SEQUENCE <= tokens <= MOST_TOKENS:
            continue
        loss = float(fit.predict(fit.theta, body_parameters(config), tokens))
        if best is None or loss < best[0]:
            best = loss, config, tokens
    if best is None:
        raise ValueError("the target must pay for 20 steps between evaluations of some model, got "
                         f"{f'{flops:.3g} FLOPs' if flops else f'{seconds:.4g} s'}; raise it")
    run = plan_run(best[1], best[2], machine, evals)
    run["body"]["max_runtime_seconds"] = min(run["body"]["max_runtime_seconds"], float(MOST_S))
    run["loss"] = float(fit.predict(fit.theta, run["parameters"], run["tokens"]))
    residuals = fit.details["residuals"]
    residuals = residuals * math.sqrt(len(residuals) / (len(residuals) - 5))
    scatter = np.random.default_rng(0).choice(residuals, len(fit.samples))
    draws = fit.predict(fit.samples, run["parameters"], run["tokens"]) * np.exp(scatter)
    run["loss_interval"] = np.percentile(draws, LEVEL).tolist()
    return run


# -------------------------------------------------------------------------------------------------
# plots


def new_figure(title):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, got none; pip install matplotlib") from None
    figure = Figure(figsize=(12, 9), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(2, 2).ravel()


def draw_law(axis, fit, name, label, flops, points=None):
    """The line of N_opt, D_opt or loss over `flops`, with its 95% band."""
    rows = [fit.at(c) for c in flops]
    axis.plot(flops, [r[name] for r in rows], color="C0")
    if fit.samples is not None:
        low, high = np.array([r[f"{name}_interval"] for r in rows]).T
        axis.fill_between(flops, low, high, color="C0", alpha=0.2, label="95%")
        axis.legend()
    if points:
        axis.plot(*zip(*((p["flops"], p[name]) for p in points), strict=True), "k.")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel=label)


def plot_fit(fit, budgets, path):
    """Four panels: IsoFLOP curves, N_opt, D_opt and loss; of a parametric fit its contours and
    residuals instead of D_opt and curves."""
    runs, method = fit.runs, fit.details["method"]
    flops = np.geomspace(runs["flops"].min(), max([runs["flops"].max(), *budgets]), 40)
    figure, axes = new_figure(f"{method}, {len(runs['loss'])} runs")
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
        best = [fit.at(c) for c in flops]
        axes[0].plot([b["parameters"] for b in best], [b["tokens"] for b in best], "r--")
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
# the verbs fit and plan


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
    table = load_runs(args.runs)
    runs = drop_highest(table, args.drop_worst, args.flops)
    if args.method == "chinchilla":
        arrays = run_arrays(runs, args.flops)
        fit = fit_chinchilla(arrays["parameters"], arrays["tokens"], arrays["loss"],
                             args.bootstrap, args.seed, args.starts, resample=args.resample)
        fit.runs = arrays
    else:
        fit = fit_isoflop(runs, args.profile, args.bootstrap, args.seed, args.flops)
    used = len(fit.runs["loss"])
    result = {"method": args.method, "runs": used, "left_out": len(table) - used,
              **fit.exponents()}
    if args.method == "isoflop":
        result["profile"], result["minima"] = args.profile, fit.details["minima"]
        result["methods"] = compare_methods(runs, args.budget, args.flops)
    else:
        result["objective"] = fit.details["objective"]
    result["optima"] = [fit.at(c) for c in args.budget]
    if args.plot:
        plot_fit(fit, args.budget, args.plot)
    if args.json:
        print(json.dumps(result))
    else:
        print_fit(result, fit, args)


def interval_text(row, name, form):
    """"value (low to high)" of row[name]."""
    bounds = row.get(f"{name}_interval")
    text = f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else ""
    return f"{row[name]:{form}}{text}"


def print_fit(result, fit, args):
    print(f"{result['runs']} runs, {result['left_out']} left out, {args.method}; intervals are 95%"
          f"{'' if fit.samples is not None else ': none, no bootstrap or no residuals'}")
    if args.method == "isoflop":
        print("minimum of each profile:")
        for m in result["minima"]:
            print(f"  {m['flops']:.3g} FLOPs | N {m['parameters']:.4g} | D {m['tokens']:.4g} | "
                  f"loss {m['loss']:.4f}")
        print(f"N_opt ~ C^a, a = {interval_text(result, 'a', '.5f')}; D_opt ~ C^b, b = "
              f"{interval_text(result, 'b', '.5f')}")
        print(f"loss = E + K C^-gamma, E = {interval_text(result, 'E', '.4f')}, K = "
              f"{result['K']:.4g}, gamma = {interval_text(result, 'gamma', '.4f')}")
    else:
        print(f"L = E + A / N^alpha + B / D^beta, sum of Huber losses {result['objective']:.8f}")
        for name, form in (("E", ".4f"), ("A", ".2f"), ("B", ".1f"), ("alpha", ".4f"),
                           ("beta", ".4f"), ("a", ".4f"), ("b", ".4f")):
            print(f"  {name} = {interval_text(result, name, form)}")
    for row in result["optima"]:
        print(f"at {row['flops']:.3g} FLOPs: N {interval_text(row, 'parameters', '.4g')} | D "
              f"{interval_text(row, 'tokens', '.4g')} | D/N "
              f"{row['tokens'] / row['parameters']:.1f} | loss {interval_text(row, 'loss', '.4f')}")
    for method, row in result.get("methods", {}).items():
        print(f"by {method}: " + (row.get("refused") or ", ".join(
            [f"a {row['a']:.5f}", *(
                f"N_opt({c:.3g}) {n:.4g} ({r:.2f} times the lowest)" for c, n, r in
                zip(args.budget, row["parameters"], row["times_the_lowest"], strict=True))])))


def make_machine(args):
    """The Machine of the flags; its speed measured here unless --speed says it."""
    if args.margin < 1:
        raise ValueError(f"--margin must be at least 1, got {args.margin}; runs would be cut off")
    if args.speed is not None:
        table = [(1.0, args.speed)]
    else:
        device = lm.resolve_device(args.device)
        dtype, _ = lm.resolve_dtype("auto", device)
        table = measure_speed(args.vocab_size, args.device, dtype)
        shown = ", ".join(f"{speed:.3g} at {flops:.3g} a token" for flops, speed in table)
        print(f"FLOP/s on {device}: {shown}", file=sys.stderr)
    return Machine(tuple(table), args.overhead_s, args.margin, args.eval_tokens, args.flops,
                   args.max_lr)


def plan(args):
    """The verb plan: without runs a sweep that the budget pays, with them what to train."""
    if (args.runs is None) != (args.target_flops is None and args.target_s is None):
        raise ValueError("plan needs a budget, or a run table and a target, got a "
                         f"{'table' if args.runs else 'target'} alone; give both, or --budget_s")
    if args.runs is None:
        return plan_new_sweep(args)
    runs = load_runs(args.runs)
    arrays = run_arrays(runs, args.flops)
    table = [arrays[name] for name in ("parameters", "tokens", "loss")]
    scatter = np.median(np.abs(fit_chinchilla(*table, starts="projection").details["residuals"]))
    # 1.345 standard deviations: with normal scatter 95% as efficient as least squares
    fit = fit_chinchilla(*table, args.bootstrap, starts="projection",
                         delta=max(1e-3, 1.345 * 1.4826 * float(scatter)))
    machine = make_machine(args)
    run = plan_target(fit, args.vocab_size, machine, args.target_flops, args.target_s)
    schedule = run["body"]["optimizer_config"]["lr_scheduler"]
    result = {"training_config": run["body"], "predicted_final_loss": run["loss"],
              "loss_interval": run["loss_interval"], "fit": fit.exponents(),
              **{k: run[k] for k in ("parameters", "tokens", "flops", "seconds")},
              "methods": compare_methods(runs, [run["flops"]], args.flops)}
    if args.out:
        final = {k: result[k] for k in ("training_config", "predicted_final_loss")}
        Path(args.out).write_text(json.dumps(final, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result))
        return
    c, (low, high) = run["config"], run["loss_interval"]
    print(f"fit of {len(arrays['loss'])} runs: " + ", ".join(
        f"{k} {interval_text(result['fit'], k, '.4g')}" for k in ("alpha", "beta", "E")))
    print(f"train: width {c.d_model}, {c.num_layers} layers, {c.num_heads} heads, d_ff {c.d_ff}: "
          f"{run['parameters']:,} weights without embeddings, on {run['tokens']:,} tokens")
    print(f"batch {run['body']['train_batch_size']} sequences of {SEQUENCE}, learning rate "
          f"{schedule['peak_value']:g}, {run['flops']:.3g} FLOPs, about {run['seconds']:,.0f} s")
    print(f"predicted loss {run['loss']:.4f} ({low:.4f} to {high:.4f}), at "
          f"{run['flops'] / arrays['flops'].max():.1f} times the FLOPs of the largest run")
    for method, row in result["methods"].items():
        print(f"by {method}: {row.get('refused') or 'N_opt {:.4g}'.format(row['parameters'][0])}")


def plan_new_sweep(args):
    """Writes --out: {"experiments": [submit bodies, cheapest first], "budget_s": ...}."""
    if (args.budget_s is None) == (args.budget_flops is None):
        raise ValueError("plan needs one budget, got "
                         f"{'none' if args.budget_s is None else 'two'}; give --budget_s or "
                         "--budget_flops")
    budget, unit = ((args.budget_s, "s") if args.budget_s is not None else
                    (args.budget_flops, "FLOPs"))
    runs, cost = plan_sweep(budget, unit, args.vocab_size, make_machine(args))
    runs.sort(key=lambda r: r["seconds"])
    limits = sum(r["body"]["max_runtime_seconds"] for r in runs)
    result = {"experiments": [r["body"] for r in runs],
              "budget_s": args.budget_s if args.budget_s is not None else limits}
    Path(args.out or "plan.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps({"cost": cost, "unit": unit, **result}))
        return
    for r in runs:
        c = r["config"]
        print(f"{r['flops']:.3g} FLOPs | width {c.d_model} | {c.num_layers} layers | N "
              f"{r['parameters']:,} | D {r['tokens']:,} | about {r['seconds']:.1f} s")
    print(f"{len(runs)} runs cost at most {cost:.5g} of {budget:.5g} {unit}, about "
          f"{sum(r['seconds'] for r in runs):,.0f} s; written to {args.out or 'plan.json'}")


def build_parser():
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    positive, count = lm.positive(float), lm.positive(int, zero=True)

    p = verbs.add_parser("fit", help="exponents and optima from a table of runs")
    p.set_defaults(function=fit_runs)
    p.add_argument("runs", help=".json, .jsonl or .csv")
    p.add_argument("--method", default="isoflop", choices=("isoflop", "chinchilla"))
    p.add_argument("--profile", default="minimum", choices=PROFILE_METHODS,
                   help="isoflop: what the best run of a budget is (default: minimum)")
    p.add_argument("--starts", default="grid", choices=STARTS,
                   help="chinchilla: 4,500 starts or 16 of variable projection (default: grid)")
    p.add_argument("--budget", type=positive, nargs="+", action="extend", default=[], metavar="C",
                   help="FLOPs to extrapolate to")
    p.add_argument("--bootstrap", type=count, default=4000, help="samples (default: 4000)")
    p.add_argument("--resample", default="smooth", choices=RESAMPLE,
                   help="chinchilla: bootstrap with smooth weights or whole runs (default: smooth)")
    p.add_argument("--flops", default="exact", choices=("exact", "6N"),
                   help="of a sweep's runs: all matrix products, or 6 N D (default: exact)")
    p.add_argument("--drop_worst", type=count, default=0, metavar="K",
                   help="leave out the K highest losses")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--plot", metavar="PNG")
    p.add_argument("--json", action="store_true", help="one JSON object")

    p = verbs.add_parser("plan", help="a sweep for a budget, or what to train after it")
    p.set_defaults(function=plan)
    p.add_argument("runs", nargs="?", help="results of a sweep (default: propose the sweep)")
    p.add_argument("--budget_s", type=positive, help="of the sweep, seconds of one device")
    p.add_argument("--budget_flops", type=positive)
    target = p.add_mutually_exclusive_group()
    target.add_argument("--target_s", type=positive, help="of the final run")
    target.add_argument("--target_flops", type=positive)
    p.add_argument("--speed", type=positive, help="FLOP/s (default: measured here)")
    p.add_argument("--flops", default="exact", choices=("exact", "6N"),
                   help="FLOPs a token: all matrix products, or 6 N as the handout counts")
    p.add_argument("--vocab_size", type=lm.positive(int), default=32_000)
    p.add_argument("--eval_tokens", type=count, default=EVAL_TOKENS, help="of one evaluation")
    p.add_argument("--overhead_s", type=lm.positive(float, zero=True), default=0.0, help="of a run")
    p.add_argument("--max_lr", type=positive, default=Machine.max_lr,
                   help="where the Step Law asks for more (default: %(default)s)")
    p.add_argument("--margin", type=positive, default=1.3, help="time limit over the estimate")
    p.add_argument("--bootstrap", type=lm.positive(int), default=1000, help="samples")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", help="file to write (default for a sweep: plan.json)")
    p.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    lm.print_any_text()
    try:
        return args.function(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"scaling.py: error: {str(error).splitlines()[0]}\n")


if __name__ == "__main__":
    sys.exit(main())
