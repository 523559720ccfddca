"""scaling.py: fits against published and exact answers, the planner's promises, the command line."""

import csv
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import model as lm
import scaling

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).resolve().parents[2] / "shared/data/scaling"
# [3]: the constants that the surfaces here are made of, and the best N and D by its closed form
E, A, B, ALPHA, BETA = 1.8172, 477.83, 2143.4, 0.3473, 0.3672
THETA = np.array([math.log(A), math.log(B), math.log(E), ALPHA, BETA])
A_EXPONENT = BETA / (ALPHA + BETA)


def needs(name):
    path = DATA / name
    return pytest.param(path, marks=pytest.mark.skipif(
        not path.exists(), reason=f"the published runs are not in this repository: {path.name}"))  # fmt: skip


def surface(budgets=5, sizes=8, span=4.0, noise=0.0, seed=0, lowest=1e18, highest=1e21):
    """Runs of the law above: `sizes` around the best N at each budget, span times to either side."""
    rng, runs = np.random.default_rng(seed), []
    for flops in np.geomspace(lowest, highest, budgets):
        g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
        best = g * (flops / 6) ** A_EXPONENT
        for n in best * np.geomspace(1 / span, span, sizes):
            d = flops / 6 / n
            loss = (E + A / n**ALPHA + B / d**BETA) * math.exp(noise * rng.standard_normal())
            runs.append({"parameters": n, "tokens": d, "flops": flops, "loss": loss})
    return runs


def columns(runs):
    return [np.array([r[k] for r in runs]) for k in ("parameters", "tokens", "loss")]


def fails(capsys, argv, *patterns):
    """main(argv) exits with 2 and one line on stderr that has all patterns."""
    with pytest.raises(SystemExit) as stop:
        scaling.main([str(a) for a in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    for pattern in patterns:
        assert re.search(pattern, lines[-1]), lines[-1]


def printed(capsys, argv):
    scaling.main([str(a) for a in argv])
    return json.loads(capsys.readouterr().out)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -------------------------------------------------------------------------------------------------
# the published runs


@pytest.mark.parametrize("path", [needs("isoflops_curves.json")])
def test_isoflop_by_minimum_on_the_handouts_runs_and_how_far_methods_disagree(path, capsys):
    result = printed(capsys, ["fit", path, "--json", "--budget", "1e23", "1e24", "--bootstrap", "200"])
    assert result["a"] == pytest.approx(0.46868, abs=5e-6)
    assert result["b"] == pytest.approx(0.53132, abs=5e-6)
    for row, n, d in zip(result["optima"], (7.005e10, 2.061e11), (2.379e11, 8.086e11), strict=True):
        assert row["parameters"] == pytest.approx(n, rel=3e-4)  # as printed, four digits
        assert row["tokens"] == pytest.approx(d, rel=3e-4)
        low, high = row["parameters_interval"]
        assert low < row["parameters"] < high
    methods = result["methods"]
    assert methods["parabola"]["a"] == pytest.approx(0.51458, abs=5e-6)
    assert methods["parabola"]["parameters"] == pytest.approx([9.114e10, 2.981e11], rel=3e-4)
    assert methods["minimum_linear"]["parameters"] == pytest.approx([5.00e10, 1.268e11], rel=1e-3)
    assert methods["parabola"]["times_the_lowest"][1] == pytest.approx(2.35, abs=0.005)


@pytest.mark.parametrize("path", [needs("chinchilla_points.csv")])
@pytest.mark.parametrize("starts", ["grid", "projection"])
def test_chinchilla_fit_of_the_240_published_runs(path, starts, capsys):
    result = printed(capsys, ["fit", path, "--method", "chinchilla", "--drop_worst", "5", "--json",
                              "--bootstrap", "0", "--starts", starts, "--budget", "5.76e23"])  # fmt: skip
    assert result["runs"] == 240 and result["objective"] <= 0.00101828
    assert result["alpha"] == pytest.approx(0.3473, abs=5e-4)
    assert result["beta"] == pytest.approx(0.3672, abs=5e-4)
    assert result["E"] == pytest.approx(1.8172, abs=5e-4)
    assert result["A"] == pytest.approx(477.83, rel=1e-4)
    assert result["B"] == pytest.approx(2143.4, rel=1e-4)
    assert result["optima"][0]["parameters"] == pytest.approx(73.2e9, rel=1e-3)
    assert "alpha_interval" not in result


@pytest.mark.parametrize("path", [needs("chinchilla_points.csv")])
def test_bootstrap_of_the_published_runs_agrees_with_the_published_intervals(path):
    runs = scaling.drop_highest(scaling.load_runs(path), 5, "exact")
    found = scaling.run_arrays(runs)
    fit = scaling.fit_chinchilla(found["parameters"], found["tokens"], found["loss"], 4000,
                                 starts="projection", resample="runs").exponents()  # fmt: skip
    # [3]'s notebook; other random numbers move the ends of 4,000 samples by about 2% of the width
    for name, low, high in (("alpha", 0.317, 0.373), ("beta", 0.331, 0.415), ("E", 1.769, 1.871)):
        assert fit[f"{name}_interval"] == pytest.approx([low, high], abs=0.1 * (high - low))


# -------------------------------------------------------------------------------------------------
# surfaces whose answer is known


@pytest.mark.parametrize("starts", ["grid", "projection"])
def test_without_noise_the_parametric_fit_returns_the_constants(starts):
    fit = scaling.fit_chinchilla(*columns(surface()), starts=starts)
    found = fit.exponents()
    for name, value in (("alpha", ALPHA), ("beta", BETA), ("a", A_EXPONENT), ("E", E)):
        assert found[name] == pytest.approx(value, abs=1e-5)
    n, d, loss = scaling.ChinchillaFit.optimum(THETA, 1e24)
    at = fit.at(1e24)
    assert [at["parameters"], at["tokens"], at["loss"]] == pytest.approx([n, d, loss], rel=1e-4)


@pytest.mark.parametrize("method", list(scaling.PROFILE_METHODS))
def test_without_noise_every_profile_method_returns_the_exponents(method):
    # sizes at equal distances around each optimum: all profiles have one shape, so exponents are
    # exact whatever shape a method assumes; minimum_linear needs the odd size in the middle
    fit = scaling.fit_isoflop(surface(5, 9), method)
    found = fit.exponents()
    assert found["a"] == pytest.approx(A_EXPONENT, abs=1e-5)
    assert found["b"] == pytest.approx(1 - A_EXPONENT, abs=1e-5)
    expected = ALPHA * BETA / (ALPHA + BETA)
    assert found["gamma"] == pytest.approx(expected, abs=1e-5)
    assert found["E"] == pytest.approx(E, rel=0.02)  # a parabola's vertex is not on the curve


def test_the_closed_form_is_the_best_of_all_splits_of_the_budget():
    n = np.geomspace(1e8, 1e11, 100_001)
    losses = scaling.ChinchillaFit.predict(THETA, n, 1e22 / 6 / n)
    best, tokens, loss = scaling.ChinchillaFit.optimum(THETA, 1e22)
    assert best == pytest.approx(n[losses.argmin()], rel=1e-4)
    assert 6 * best * tokens == pytest.approx(1e22) and loss <= losses.min() + 1e-12


def covered(fits, truth):
    """The share of intervals that hold the truth, by name."""
    return {name: np.mean([f[f"{name}_interval"][0] <= value <= f[f"{name}_interval"][1] for f in fits])
            for name, value in truth.items()}  # fmt: skip


@pytest.mark.parametrize("method", ["minimum", "parabola", "akima"])
def test_isoflop_intervals_cover_the_truth_as_often_as_they_say(method):
    fits = [scaling.fit_isoflop(surface(6, 9, 6.0, 0.01, seed), method, 300, seed).exponents()
            for seed in range(100)]  # fmt: skip
    share = covered(fits, {"a": A_EXPONENT})
    assert 0.90 <= share["a"] <= 0.98, share


def test_parametric_intervals_cover_the_truth_as_often_as_they_say():
    fits = [scaling.fit_chinchilla(*columns(surface(6, 10, noise=0.01, seed=seed)), 200, seed,
                                   "projection").exponents() for seed in range(100)]  # fmt: skip
    share = covered(fits, {"alpha": ALPHA, "beta": BETA, "a": A_EXPONENT})
    assert all(0.90 <= value <= 0.98 for value in share.values()), share


# -------------------------------------------------------------------------------------------------
# parts against plain versions


def test_the_objective_is_the_sum_of_huber_losses_and_its_gradient_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    log_n, log_d, target = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    theta = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    plain = 0
    for i, (n, d, y) in enumerate(zip(log_n, log_d, target, strict=True)):
        a, b, e, alpha, beta = theta.unbind(1)
        error = torch.logsumexp(torch.stack([a - alpha * n, b - beta * d, e]), 0) - y
        huber = torch.where(error.abs() <= 0.3, error**2 / 2, 0.3 * (error.abs() - 0.15))
        plain = plain + weight[:, i] * huber
    gradient = torch.autograd.grad(plain.sum(), theta)[0]
    value, mine = scaling.huber_objective(theta.detach(), log_n, log_d, target, weight, 0.3)
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(mine, gradient)


def test_the_minimiser_ends_every_row_of_a_batch_where_it_would_end_alone():
    def rosenbrock(x, scale):
        u, v = x[:, 1] - x[:, 0] ** 2, 1 - x[:, 0]
        gradient = torch.stack([-4 * scale * x[:, 0] * u - 2 * v, 2 * scale * u], 1)
        return scale * u**2 + v**2, gradient

    x = torch.tensor([[-1.2, 1.0], [3.0, -2.0], [0.5, 0.5]], dtype=torch.float64)
    scale = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    ends, _ = scaling.minimise(rosenbrock, x, (scale,))
    torch.testing.assert_close(ends, torch.ones_like(ends), rtol=0, atol=1e-6)
    alone = [scaling.minimise(rosenbrock, x[i : i + 1], (scale[i : i + 1],))[0] for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), ends, rtol=0, atol=1e-9)


def test_akima_goes_through_its_points_and_finds_the_lowest_point_between_them():
    x = np.array([0.0, 1.0, 2.5, 3.0, 4.5, 6.0])
    y = np.array([[5.0, 2.0, 1.0, 1.2, 3.0, 7.0]])
    slopes = scaling.akima_slopes(x, y)[0]

    def curve(at):  # a cubic from its ends and slopes there: Hermite's basis
        i = min(np.searchsorted(x, at, "right") - 1, len(x) - 2)
        h, t = x[i + 1] - x[i], (at - x[i]) / (x[i + 1] - x[i])
        return (y[0, i] * (1 + 2 * t) * (1 - t) ** 2 + h * slopes[i] * t * (1 - t) ** 2
                + y[0, i + 1] * t * t * (3 - 2 * t) + h * slopes[i + 1] * t * t * (t - 1))  # fmt: skip

    dense = np.linspace(0, 6, 60_001)
    values = np.array([curve(at) for at in dense])
    place, value, inside = scaling.lowest_of_akima(x, y)
    assert place[0] == pytest.approx(dense[values.argmin()], abs=1e-4) and inside[0]
    assert value[0] == pytest.approx(values.min(), abs=1e-8)
    # [9]: the weighted mean of the two slopes beside a point; at x = 2.5 by hand
    m = np.diff(y[0]) / np.diff(x)
    left, right = abs(m[3] - m[2]), abs(m[1] - m[0])
    assert slopes[2] == pytest.approx((left * m[1] + right * m[2]) / (left + right))
    line = scaling.akima_slopes(x, 2 * x[None])
    np.testing.assert_allclose(line, 2)


def test_a_saturating_power_law_is_found_and_its_floor_is_never_negative():
    x = np.log(np.geomspace(1e18, 1e22, 6))
    e, log_k, exponent = scaling.fit_power(x, 1.7 + np.exp(8 - 0.2 * x)[None], offset=True)
    assert [e[0], log_k[0], exponent[0]] == pytest.approx([1.7, 8, -0.2], abs=1e-5)
    e, _, exponent = scaling.fit_power(x, np.exp(8 - 0.2 * x)[None] - 0.1, offset=True)
    assert e[0] == 0 and exponent[0] < -0.2


def test_the_grid_has_the_papers_4500_starts():
    grid = scaling.grid_starts()
    assert grid.shape == (4500, 5) and len(np.unique(grid, axis=0)) == 4500
    assert [len(np.unique(c)) for c in grid.T] == [6, 6, 5, 5, 5]


# -------------------------------------------------------------------------------------------------
# laws


def test_laws_give_the_papers_figures():
    # DeepSeek LLM, 7B and 67B: batch and learning rate near those of the paper's own runs
    law = scaling.deepseek_law(1e20)
    assert law["tokens"] * law["flops_per_token"] == pytest.approx(1e20, rel=0.001)
    lr, batch = scaling.step_law(1e9, 1e11)
    assert lr == pytest.approx(1.79 * 10 ** (9 * -0.713 + 11 * 0.307))
    assert batch == pytest.approx(0.58 * 10 ** (11 * 0.571))
    assert scaling.power_lines_batch(8e9, 256, 1e9) == pytest.approx(256 * 8**0.383)
    rules = scaling.mup_rules(1024, 256, 64)
    assert rules["hidden_lr"] == rules["output_multiplier"] == 0.25 and rules["hidden_std"] == 0.5
    assert rules["embedding_lr"] == 1 and rules["attention_scale"] == 1 / 64


# -------------------------------------------------------------------------------------------------
# the planner


def machine(rule="6N", speed=4e14, **other):
    return scaling.Machine(((1.0, speed),), **{"overhead_s": 0, "margin": 1.3, "eval_tokens": 0,
                                              "rule": rule, **other})  # fmt: skip


def allowed(body):
    """The rules of the API about a submit body that a plan could break."""
    a, o = body["architecture_config"], body["optimizer_config"]
    steps, rest = divmod(body["total_train_tokens"], 512 * body["train_batch_size"])
    assert rest == 0 and steps > 0 and steps % body["n_evals"] == 0
    assert 2**18 % (512 * body["val_batch_size"]) == 0
    assert a["hidden_size"] == a["num_attention_heads"] * a["head_dim"] and a["head_dim"] % 2 == 0
    assert a["num_key_value_heads"] == a["num_attention_heads"]
    assert a["intermediate_size"] >= a["hidden_size"] and isinstance(a["rope_theta"], int)
    assert o["lr_scheduler"]["peak_value"] > 0
    assert 1 <= body["max_runtime_seconds"] <= 43_200
    assert 0 < body["total_train_tokens"] <= 500_000_000_000
    return True


@pytest.mark.parametrize("budget_s, speed", [(43_200, 4e14), (600, 4e14), (7200, 1e11), (3e6, 4e14)])
def test_a_sweep_spends_at_most_its_budget_and_keeps_the_apis_rules(budget_s, speed):
    runs, cost = scaling.plan_sweep(budget_s, "s", 2048, machine("exact", speed))
    limits = [r["body"]["max_runtime_seconds"] for r in runs]
    assert cost == pytest.approx(sum(limits)) and cost <= budget_s
    assert cost > 0.3 * budget_s or max(limits) > 0.9 * 43_200  # the most that one run may take
    assert all(allowed(r["body"]) for r in runs)
    assert len({json.dumps(r["body"]) for r in runs}) == len(runs)  # else the API answers 409
    for run, limit in zip(runs, limits, strict=True):
        assert run["seconds"] < limit
        c = run["config"]
        assert run["flops"] == pytest.approx(lm.flops_per_token(c) * run["tokens"])
    profiles = scaling.isoflop_profiles(scaling.run_arrays([{**r, "loss": 3.0} for r in runs]))
    assert len(profiles) >= 3 and min(len(p[1]) for p in profiles) >= 4


def test_a_budget_in_flops_is_kept_and_one_too_small_is_refused_with_the_least():
    runs, cost = scaling.plan_sweep(1e18, "FLOPs", 2048, machine())
    assert cost == pytest.approx(sum(r["flops"] for r in runs)) and cost <= 1e18
    with pytest.raises(ValueError, match="must pay for three profiles.*got 10 s; give at least"):
        scaling.plan_sweep(10, "s", 2048, machine("exact", 1e10))


def random_law(seed):
    """A surface whose best D / N at 1e18 FLOPs lies between 8 and 40."""
    rng = np.random.default_rng(seed)
    e, (alpha, beta) = rng.uniform(1.5, 2.2), rng.uniform(0.28, 0.42, 2)
    ratio, part = math.exp(rng.uniform(math.log(8), math.log(40))), rng.uniform(0.4, 0.9)
    n = math.sqrt(1e18 / (6 * ratio))
    b = part * alpha / beta * (ratio * n) ** beta  # at the optimum alpha A / N^alpha = beta B / D^beta
    return np.array([math.log(part * n**alpha), math.log(b), math.log(e), alpha, beta])


def test_twelve_hours_of_sweep_on_random_surfaces_predict_a_run_of_48_hours():
    """Realised loss within 1% of the optimum, prediction within 0.5%, on 20 surfaces."""
    own = machine()
    runs, _ = scaling.plan_sweep(43_200, "s", 32_000, own)
    n, d = (np.array([r[k] for r in runs], float) for k in ("parameters", "tokens"))
    flops, worst = 4 * 43_200 * 4e14, [0.0, 0.0]
    for seed in range(1, 21):
        law, rng = random_law(seed), np.random.default_rng([seed, 1])
        losses = scaling.ChinchillaFit.predict(law, n, d) * np.exp(0.002 * rng.standard_normal(len(n)))
        fit = scaling.fit_chinchilla(n, d, losses, 20, starts="projection")
        run = scaling.plan_target(fit, 32_000, own, flops)
        assert run["flops"] == pytest.approx(flops, rel=0.01)
        realised = scaling.ChinchillaFit.predict(law, run["parameters"], run["tokens"])
        best = scaling.ChinchillaFit.optimum(law, flops)[2]
        worst = [max(worst[0], realised / best - 1), max(worst[1], abs(run["loss"] / realised - 1))]
    assert worst[0] < 0.01 and worst[1] < 0.005, worst


def test_measured_speed_is_interpolated_between_shapes():
    table = ((1e6, 1e10), (1e8, 1e12))
    own = scaling.Machine(table, 1.0, 1.3, 3000, "exact")
    config = lm.ModelConfig(vocab_size=512, context_length=512, d_model=128, num_layers=2, num_heads=2)
    flops = lm.flops_per_token(config)
    assert 1e6 < flops < 1e8
    speed = 1e10 * (flops / 1e6)  # slope one in logs
    assert own.seconds(config, 10_000, evals=2) == pytest.approx((10_000 + 2000) * flops / speed + 1)
    assert own.tokens_in(config, own.seconds(config, 777)) == pytest.approx(777)


# -------------------------------------------------------------------------------------------------
# the command line


def test_fit_reads_json_csv_and_jsonl_alike(tmp_path, capsys):
    runs = surface(4, 5)
    (tmp_path / "a.json").write_text(json.dumps(
        [{"parameters": r["parameters"], "compute_budget": r["flops"], "final_loss": r["loss"]} for r in runs]))
    with open(tmp_path / "b.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["x", "Model Size", "Training FLOP", "loss"])
        out.writerows([["?", r["parameters"], r["flops"], r["loss"]] for r in runs])
    failed = {"status": "failed", "parameters": 5, "tokens": 5, "flops": 150, "loss": None}
    done = [{"status": "completed", "id": 7, "config": {}, **r} for r in runs]
    write(tmp_path / "c.jsonl", [failed, *done])
    results = [printed(capsys, ["fit", tmp_path / name, "--json", "--budget", "1e22", "--bootstrap", "0"])
               for name in ("a.json", "b.csv", "c.jsonl")]  # fmt: skip
    assert results[0] == results[1]
    for key in ("a", "b", "E", "gamma"):
        assert results[2][key] == pytest.approx(results[0][key], rel=1e-9)
    assert results[2]["runs"] == len(runs) and results[2]["left_out"] == 1


def test_fit_prints_a_table_for_people_and_draws(tmp_path, capsys):
    table = write(tmp_path / "runs.jsonl", surface(4, 7, noise=0.002))
    argv = ["fit", str(table), "--budget", "1e22", "--bootstrap", "50"]
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    for extra in ([], ["--method", "chinchilla", "--starts", "projection"]):
        picture = tmp_path / "plot.png"
        scaling.main([*argv, *extra, "--plot", str(picture)])
        out = capsys.readouterr().out
        assert "28 runs" in out and "at 1e+22 FLOPs: N " in out
        assert picture.read_bytes()[:4] == b"\x89PNG"
        picture.unlink()
    scaling.main(argv)
    assert "by akima: a 0." in capsys.readouterr().out


def test_plan_then_fit_then_target(tmp_path, capsys):
    plan = tmp_path / "plan.json"
    flags = ["--speed", "4e14", "--flops", "6N", "--eval_tokens", "0", "--vocab_size", "2048"]
    out = printed(capsys, ["plan", "--budget_s", "3600", "--out", plan, "--json", *flags])
    saved = json.loads(plan.read_text())
    assert saved["experiments"] == out["experiments"] and saved["budget_s"] == 3600
    assert sum(b["max_runtime_seconds"] for b in saved["experiments"]) <= 3600
    rows = []
    for body in saved["experiments"]:
        shape = body["architecture_config"]
        config = next(c for c in scaling.ladder(2048) if c.d_model == shape["hidden_size"])
        n, d = scaling.body_parameters(config), body["total_train_tokens"]
        rows.append({"parameters": n, "tokens": d, "flops": 6 * n * d, "flops_exact": 1.0, "status": "completed",
                     "config": body, "loss": float(scaling.ChinchillaFit.predict(THETA, n, d))})  # fmt: skip
    table = write(tmp_path / "results.jsonl", rows)
    final = tmp_path / "final.json"
    result = printed(capsys, ["plan", table, "--target_s", "14400", "--out", final, "--json", *flags])
    body = json.loads(final.read_text())
    assert body["training_config"] == result["training_config"] and allowed(result["training_config"])
    law = scaling.ChinchillaFit.predict(THETA, result["parameters"], result["tokens"])
    assert body["predicted_final_loss"] == pytest.approx(law, rel=1e-5)
    low, high = result["loss_interval"]
    assert low <= result["predicted_final_loss"] * (1 + 1e-9) and high >= low
    assert result["tokens"] * 6 * result["parameters"] == pytest.approx(14_400 * 4e14, rel=0.01)
    scaling.main(["plan", str(table), "--target_flops", "1e19", *flags])
    assert "predicted loss" in capsys.readouterr().out


def test_the_plan_measures_this_machine(tmp_path, capsys):
    table = scaling.measure_speed(64, "cpu", torch.float32, seconds=0.2)
    assert 1 <= len(table) <= 3 and all(f > 1e5 and s > 1e7 for f, s in table)


def bad(runs, **changes):
    return [{**runs[0], **changes}, *runs[1:]]


CASES = [
    ([], "one object a run, got none"),
    ([1, 2], "one object a run, got other"),
    (bad(surface(), loss=float("nan")), "loss must be a finite number above 0, got nan in run 1"),
    (bad(surface(), loss=-1.0), "loss must be .* above 0, got -1.0 in run 1"),
    (bad(surface(), parameters="many"), "parameters must be .*'many' in run 1"),
    (bad(surface(), loss=None), "loss must be .*None in run 1"),
    ([{"size": 1, "loss": 2}], "columns must give loss and two of .* got loss, size; rename"),
    ([{**r, "status": "failed"} for r in surface()], "completed runs, got 0 of 40"),
    (surface(1), "at least 3 compute budgets, got 1"),
    (surface(2), "at least 3 compute budgets, got 2"),
    (surface(3, 2), "at least 3 model sizes, got 2 at 1e\\+18 FLOPs"),
    (surface(3, 9)[:9] + surface(3, 9)[13:],  # from the best size of the second profile on
     "minimum inside, got none by minimum at 3.16e\\+19 FLOPs, N .* add smaller or larger"),
]  # fmt: skip


@pytest.mark.parametrize("runs, message", CASES)
def test_a_bad_table_is_one_line(runs, message, tmp_path, capsys):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(runs))
    fails(capsys, ["fit", path], message)


def test_other_bad_input_is_one_line(tmp_path, capsys):
    table = write(tmp_path / "runs.jsonl", surface())
    fails(capsys, ["fit", tmp_path / "none.json"], "No such file")
    (tmp_path / "bad.jsonl").write_text('{"loss": 1}\n{"loss": ')
    fails(capsys, ["fit", tmp_path / "bad.jsonl"], "must be JSON, JSONL or CSV, got .*; repair")
    fails(capsys, ["fit", table, "--drop_worst", "40"], "--drop_worst must leave runs, got 40 of 40")
    fails(capsys, ["fit", table, "--budget", "-1"], "must be above 0, got -1")
    few = write(tmp_path / "few.jsonl", surface()[:5])
    fails(capsys, ["fit", few, "--method", "chinchilla"], "at least 6 runs .*, got 5 with 5 and 5")
    up = [{**r, "loss": 10 / r["loss"]} for r in surface()]  # rises with N and D
    fails(capsys, ["fit", write(tmp_path / "up.jsonl", up), "--method", "chinchilla", "--starts",
                   "projection"], "must fall with N and D")  # fmt: skip
    fails(capsys, ["plan"], "plan needs one budget, got none")
    fails(capsys, ["plan", "--budget_s", "9", "--budget_flops", "9"], "got two")
    fails(capsys, ["plan", table], "a table alone")
    fails(capsys, ["plan", "--budget_s", "9", "--margin", "0.5"], "--margin must be at least 1")
    fails(capsys, ["plan", "--target_s", "60"], "a target alone")
    fails(capsys, ["plan", "--budget_s", "1", "--speed", "1e9"], "must pay for three profiles")
    fails(capsys, ["plan", table, "--target_s", "1", "--speed", "1e5"], "must pay for 20 steps")
    with pytest.raises(ValueError, match="method must be one of minimum, .*, got 'best'"):
        scaling.fit_isoflop(surface(), "best")
    with pytest.raises(ValueError, match="starts must be grid or projection"):
        scaling.fit_chinchilla(*columns(surface()), starts="one")


def test_a_missing_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    table = write(tmp_path / "runs.jsonl", surface())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fails(capsys, ["fit", table, "--bootstrap", "0", "--plot", tmp_path / "x.png"], "matplotlib")


def test_runs_of_one_size_at_a_budget_count_by_the_best_of_them():
    runs = surface(4, 5)
    worse = [{**r, "loss": r["loss"] + 0.3} for r in runs]  # the same sizes, a bad learning rate
    mixed = list(itertools.chain(*zip(worse, runs, strict=True)))
    assert scaling.fit_isoflop(mixed, "parabola").at(1e22) == scaling.fit_isoflop(runs, "parabola").at(1e22)
