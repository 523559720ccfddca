"""train.py and the data it trains on, in runs of a few seconds on a corpus made here."""

import gzip
import hashlib
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import bpe
import model as lm
import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--vocab_size 300 --context_length 16 --d_model 16 --num_layers 1 --num_heads 2 --batch_size 4 "
        "--max_steps 8 --warmup_steps 2 --eval_every 4 --eval_tokens 64 --save_every 3 --log_every 1 "
        "--sample_tokens 8 --num_workers 1 --device cpu").split()  # fmt: skip


def make_corpus(folder, files=30, seed=0):
    """A folder of small Python-like files, always the same for a seed."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    names = "alpha beta gamma delta value index result count item name".split()
    for i in range(files):
        lines = [f"def {rng.choice(names)}_{i}({rng.choice(names)}):\n    return {rng.choice(names)} + {j}\n"
                 for j in range(12)]  # fmt: skip
        (folder / f"file_{i:02d}.py").write_text("".join(lines))
    return folder


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")


def flags(tmp_path, corpus, *more, out="out"):
    return [*TINY, "--data", str(corpus), "--data_dir", str(tmp_path / "data"), "--out_dir",
            str(tmp_path / out), *more]  # fmt: skip


def records(tmp_path, out="out"):
    return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]


def losses(tmp_path, out="out"):
    """{step: training loss}, exact."""
    return {r["step"]: r["loss"] for r in records(tmp_path, out) if "loss" in r}


def fails(capsys, argv, *patterns):
    """main(argv) exits with 2 and one line on stderr that has all patterns."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for pattern in patterns:
        assert re.search(pattern, error), error
    return error


# -------------------------------------------------------------------------------------------------
# the run


def test_a_run_learns_and_leaves_log_checkpoint_and_model(tmp_path, corpus, capsys):
    assert train.main(flags(tmp_path, corpus, "--max_steps", "40", "--lr", "0.02")) == 0
    out = capsys.readouterr().out
    first, *rest = records(tmp_path)
    assert first["flags"]["max_steps"] == 40 and first["versions"]["torch"] == torch.__version__
    by_step = losses(tmp_path)
    assert list(by_step) == list(range(1, 41))
    assert abs(by_step[1] - np.log(300)) < 0.3  # an untrained model knows nothing: ln V
    assert by_step[40] < by_step[1] - 1
    last = rest[-1]
    assert last["step"] == 40 and last["valid_loss"] < np.log(300) - 1
    assert last["perplexity"] == pytest.approx(np.exp(last["valid_loss"]))
    assert "--- sample\ndef read" in out and "eta 0:00:00" in out
    assert out.strip().splitlines()[-1].startswith("time: ")
    model = lm.from_pretrained(tmp_path / "out" / "model")
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved["model"][name], rtol=0, atol=0)
    assert bpe.Tokenizer.load(tmp_path / "out" / "model").vocab_size == 300


def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes_of_the_text(tmp_path, corpus):
    train.main(flags(tmp_path, corpus))
    last = records(tmp_path)[-1]
    meta = json.loads((tmp_path / "data/corpus/gpt2_300/valid.json").read_text())
    expected = last["valid_loss"] / np.log(2) * meta["tokens"] / meta["bytes"]
    assert last["bits_per_byte"] == pytest.approx(expected)


def test_a_batch_in_micro_batches_gives_the_same_update_as_whole():
    config = lm.ModelConfig(vocab_size=50, context_length=8, d_model=16, num_layers=1, num_heads=2)
    batch = torch.randint(50, (2, 6, 8), generator=torch.Generator().manual_seed(0)).unbind()
    results = []
    for micro in (6, 3, 4):  # 4: the last micro-batch is smaller, its tokens weigh no more
        torch.manual_seed(0)
        model = lm.TransformerLM(config)
        context = lambda: lm.compute_context(torch.device("cpu"), torch.float32)  # noqa: E731
        stats = train.loss_and_gradient(model.hidden_states, model, batch, micro, 1.0, context)
        results.append((stats, [p.grad.clone() for p in model.parameters()]))
        plain = lm.cross_entropy(model(batch[0]), batch[1])
        torch.testing.assert_close(stats[0], plain.detach(), rtol=1e-5, atol=1e-6)
    for stats, grads in results[1:]:
        torch.testing.assert_close(stats, results[0][0], rtol=1e-5, atol=1e-6)  # float32 sums reordered
        for g, expected in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-6)


def test_the_logged_loss_is_that_of_the_whole_batch_before_the_update(tmp_path, corpus):
    train.main(flags(tmp_path, corpus, "--grad_accum", "3", "--max_steps", "1"))
    torch.manual_seed(0)
    ids, _ = bpe.read_tokens(tmp_path / "data/corpus/gpt2_300/train.bin")
    config = lm.ModelConfig(**torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["config"])
    model = lm.TransformerLM(config)
    x, y = lm.get_batch(ids, 12, 16, "cpu", torch.Generator().manual_seed(0))
    assert losses(tmp_path)[1] == pytest.approx(lm.cross_entropy(model(x), y).item(), rel=1e-5)


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path, corpus):
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train.main(flags(tmp_path, corpus, "--seed", seed, out=out))
    assert losses(tmp_path, "a") == losses(tmp_path, "b") != losses(tmp_path, "c")


@pytest.mark.parametrize("more", [["--norm", "post"], ["--norm", "none"], ["--pos", "none"], ["--ffn", "silu"],
                                  ["--attention", "eager"], ["--checkpoint_every", "1"],
                                  ["--num_kv_heads", "1", "--qk_norm", "--no-tie_embeddings"]])  # fmt: skip
def test_every_ablation_trains(tmp_path, corpus, capsys, more):
    train.main(flags(tmp_path, corpus, "--max_steps", "3", *more))
    assert len(losses(tmp_path)) == 3
    exported = (tmp_path / "out/model/config.json").exists()
    unsupported = more[0] in ("--norm", "--pos", "--ffn")
    assert exported != unsupported
    assert ("was not written" in capsys.readouterr().out) == unsupported


def test_under_torchrun_it_points_to_ddp(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(capsys, flags(tmp_path, corpus), "torchrun with ddp.py")


def test_plot_draws_the_curves_of_several_runs(tmp_path, corpus):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    train.main(flags(tmp_path, corpus))
    picture, log = tmp_path / "curves.png", tmp_path / "out/log.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 12, "lo')  # the disk was full
    train.main(["--plot", str(log), "--plot_file", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_does_not_press_the_others_flat(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="plots need matplotlib").Figure
    for name, losses in (("good", (7, 5, 4)), ("bad", (7, 2500, 70)), ("killed", ())):
        (tmp_path / name).mkdir()
        lines = [{"flags": {}}, *({"step": i, "elapsed_s": i, "loss": x} for i, x in enumerate(losses))]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    limits = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: limits.append(self.axes[0].get_ylim()))
    for runs in (("good", "killed"), ("good", "bad", "killed")):
        train.main(["--plot", *(str(tmp_path / run / "log.jsonl") for run in runs)])
    (low, high), (_, clipped) = limits
    assert low > 3 and high < 8 and clipped == 1.5 * 7


def test_losses_about_zero_are_drawn_whole_and_logs_without_one_are_an_error(tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure", reason="plots need matplotlib").Figure
    log, limits = tmp_path / "log.jsonl", []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: limits.append(self.axes[0].get_ylim()))
    records = [{"flags": {}}, *({"step": i, "elapsed_s": i, "loss": x} for i, x in enumerate((-0.01, -0.5, 0.5)))]
    log.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"loss": 0.1}]))
    train.main(["--plot", str(log)])
    assert limits[0][0] <= -0.5 and limits[0][1] >= 0.5
    for other, message in (('{"flags": {}}\n', "must hold a loss"), ("{}\n5\n", "must be the log.jsonl")):
        log.write_text(other)
        with pytest.raises(SystemExit):
            train.main(["--plot", str(log)])
        assert message in capsys.readouterr().err


def test_a_plot_of_what_is_no_log_is_one_line_that_names_it(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    (tmp_path / "notes.txt").write_text("no records\n")
    with pytest.raises(SystemExit) as stop:
        train.main(["--plot", str(tmp_path / "notes.txt")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "notes.txt must be the log.jsonl" in error and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------
# nothing is lost


def start(argv):
    return subprocess.Popen([sys.executable, "-u", ROOT / "train.py", *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_a_second_start_in_the_same_folder_waits_and_then_finds_a_run(tmp_path, corpus):
    processes = [start(flags(tmp_path, corpus)) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert sum("holds a run" in output for output in outputs) == 1
    assert not (tmp_path / "out/run.lock").exists()


def test_a_resume_on_an_edited_text_says_so(tmp_path, corpus, capsys):
    train.main(flags(tmp_path, corpus))
    own = ["--tokenizer", str(tmp_path / "out/tokenizer.json"), "--resume", "--max_steps"]
    train.main(flags(tmp_path, corpus, *own, "13"))
    assert "on other data" not in capsys.readouterr().out
    edited = tmp_path / "edited.txt"
    edited.write_bytes(b"".join(path.read_bytes()[:-50] for path in sorted(corpus.glob("**/*.*"))))
    train.main(flags(tmp_path, edited, *own, "14"))
    assert "on other data than before" in capsys.readouterr().out


def kill_at(argv, step, number):
    """Runs train.py and sends it a signal once it has logged `step`; returns exit code and output."""
    process = start(argv)
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"step {step}/") and "validation" not in line:
            process.send_signal(number)
            break
    seen += process.communicate(timeout=60)[0]
    return process.returncode, seen


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_a_run_killed_at_random_steps_resumes_bit_for_bit(tmp_path, corpus):
    argv = flags(tmp_path, corpus, "--max_steps", "200", "--save_every", "7", "--grad_accum", "2")
    train.main([*argv, "--out_dir", str(tmp_path / "whole")])
    rng = random.Random(time.time_ns())
    steps = sorted(rng.sample(range(1, 150), 3))
    code, _ = kill_at(argv, steps[0], signal.SIGKILL)
    assert code == -signal.SIGKILL
    for step in steps[1:]:
        code, seen = kill_at(["--resume", "--out_dir", str(tmp_path / "out")], step, signal.SIGKILL)
        assert code == -signal.SIGKILL, seen
    process = start(["--resume", "--out_dir", str(tmp_path / "out")])
    seen = process.communicate(timeout=120)[0]
    assert process.returncode == 0, seen
    assert losses(tmp_path) == losses(tmp_path, "whole"), f"killed at steps {steps}"
    both = [torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("out", "whole")]
    for name, tensor in both[0]["model"].items():
        assert torch.equal(tensor, both[1]["model"][name]), name


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_the_step_and_says_how_to_go_on(tmp_path, corpus, number):
    argv = flags(tmp_path, corpus, "--max_steps", "5000", "--save_every", "5000")
    code, seen = kill_at(argv, 3, number)
    assert code == 128 + number and "--resume" in seen.splitlines()[-1]
    saved = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["iteration"]
    assert saved >= 3 and f"saved at step {saved}" in seen


def test_bfloat16_weights_train_and_resume_bit_for_bit(tmp_path, corpus):
    narrow = ("--param_dtype", "bfloat16", "--moment_dtype", "float32", "--stochastic_rounding")
    train.main(flags(tmp_path, corpus, *narrow))
    path = tmp_path / "out/checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    assert {w.dtype for w in whole["model"].values()} == {torch.bfloat16}
    assert whole["optimizer"]["state"][0]["v"].dtype == torch.float32
    path.write_bytes(path.read_bytes()[:1000])  # it goes on from the one before
    train.main(["--resume", "--out_dir", str(tmp_path / "out")])
    again = torch.load(path, weights_only=True)
    assert all(torch.equal(w, again["model"][name]) for name, w in whole["model"].items())


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_a_run_killed_before_its_first_checkpoint_resumes_with_its_own_flags(tmp_path, corpus):
    argv = flags(tmp_path, corpus, "--max_steps", "60", "--save_every", "60")
    train.main([*argv, "--out_dir", str(tmp_path / "whole")])
    kill_at(argv, 2, signal.SIGKILL)
    assert not (tmp_path / "out/checkpoint.pt").exists()
    assert train.main(["--resume", "--out_dir", str(tmp_path / "out")]) == 0
    assert losses(tmp_path) == losses(tmp_path, "whole")


def test_a_resumed_run_takes_new_flags_and_another_place(tmp_path, corpus):
    train.main(flags(tmp_path, corpus))
    (tmp_path / "out").rename(tmp_path / "moved")
    argv = ["--resume", "--out_dir", str(tmp_path / "moved"), "--max_steps", "12", "--weight_decay", "0.5"]
    assert train.main(argv) == 0
    assert list(losses(tmp_path, "moved")) == list(range(1, 13)) and not (tmp_path / "out").exists()
    groups = torch.load(tmp_path / "moved/checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]


def test_a_resumed_run_takes_a_new_micro_batch_and_a_new_dtype_of_moments(tmp_path, corpus, monkeypatch):
    train.main(flags(tmp_path, corpus))
    real_step, sizes = train.loss_and_gradient, []

    def step(hidden_states, model, batch, micro_batch_size, *rest):
        sizes.append(micro_batch_size)
        return real_step(hidden_states, model, batch, micro_batch_size, *rest)

    monkeypatch.setattr(train, "loss_and_gradient", step)
    more = ("--max_steps", "10", "--batch_size", "6", "--moment_dtype", "bfloat16")
    train.main(flags(tmp_path, corpus, "--resume", *more))
    assert sizes == [6, 6]
    state = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert {s[key].dtype for s in state.values() for key in ("m", "v")} == {torch.bfloat16}


def test_the_logged_share_of_the_peak_is_that_of_the_logged_rate(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(lm, "peak_flops", lambda device: 1e10)
    train.main(flags(tmp_path, corpus, "--max_steps", "2"))
    config = lm.ModelConfig(**torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["config"])
    last = [r for r in records(tmp_path) if "loss" in r][-1]
    assert last["mfu"] == pytest.approx(last["tokens_per_s"] * lm.flops_per_token(config) / 1e10, rel=1e-9)
    assert f"mfu {last['mfu']:.1%}" in capsys.readouterr().out


def test_resuming_on_another_tokenizer_is_refused(tmp_path, corpus, capsys):
    train.main(flags(tmp_path, corpus))
    (corpus / "new.py").write_text("something entirely different\n" * 300)
    fails(capsys, flags(tmp_path, corpus, "--resume"), "tokenizer", "out/tokenizer.json")
    own = str(tmp_path / "out/tokenizer.json")
    assert train.main(flags(tmp_path, corpus, "--resume", "--tokenizer", own, "--max_steps", "9")) == 0


def test_a_disk_that_is_full_is_one_line(tmp_path, corpus, capsys, monkeypatch):
    def save(content, file):  # PyTorch's own writer raises this, not an OSError
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    fails(capsys, flags(tmp_path, corpus), "could not be written")


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, corpus, capsys, monkeypatch):
    whole = flags(tmp_path, corpus, out="whole")
    train.main(whole)
    real_save, calls = torch.save, []

    def save(content, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        real_save(content, file)

    monkeypatch.setattr(torch, "save", save)
    fails(capsys, flags(tmp_path, corpus), "No space left")
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["iteration"] == 3
    train.main(flags(tmp_path, corpus, "--resume"))
    assert losses(tmp_path) == losses(tmp_path, "whole")


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, corpus, capsys):
    train.main(flags(tmp_path, corpus))
    path = tmp_path / "out/checkpoint.pt"
    before = losses(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    train.main(flags(tmp_path, corpus, "--resume"))
    shown = capsys.readouterr()
    assert "checkpoint.pt.prev" in shown.err and "at step 6" in shown.out
    assert losses(tmp_path) == before


def test_a_last_rate_follows_a_new_rate_and_is_none_above_it(tmp_path, corpus, capsys):
    train.main(flags(tmp_path, corpus, "--lr", "1e-2", "--max_steps", "4"))
    train.main(flags(tmp_path, corpus, "--resume", "--lr", "1e-5", "--max_steps", "9"))
    rates = [r["lr"] for r in records(tmp_path) if r.get("step", 0) > 4 and "lr" in r]
    assert rates and max(rates) <= 1e-5
    fails(capsys, flags(tmp_path, corpus, "--min_lr", "1", out="other"), "min_lr must be at most lr")


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(tmp_path, corpus, capsys):
    assert train.main(flags(tmp_path, corpus, "--resume")) == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_a_step_far_beyond_memory_is_refused_before_it_kills_the_process(
    tmp_path, corpus, capsys, monkeypatch
):
    monkeypatch.setattr(train.lm, "free_memory", lambda device: 1000)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(tmp_path, corpus, "--batch_size", "6"))
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert "batch_size halved to 3" in said.out
    assert "with batch_size 3, which cannot be halved; lower --batch_size" in said.err


@pytest.mark.parametrize("error", [  # a CPU's has no class of its own
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str)
def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_update(
    tmp_path, corpus, capsys, monkeypatch, error
):
    train.main(flags(tmp_path, corpus, out="whole"))
    real_step, calls = train.loss_and_gradient, []

    def step(hidden_states, model, batch, micro_batch_size, *rest):
        calls.append(micro_batch_size)
        if len(calls) == 3:
            raise error
        return real_step(hidden_states, model, batch, micro_batch_size, *rest)

    monkeypatch.setattr(train, "loss_and_gradient", step)
    train.main(flags(tmp_path, corpus))
    assert calls == [4, 4, 4] + [2] * 6
    assert capsys.readouterr().out.count("batch_size halved to 2, grad_accum doubled to 2") == 1
    for step, loss in losses(tmp_path).items():
        assert loss == pytest.approx(losses(tmp_path, "whole")[step], rel=1e-4)  # sums in another order


def test_a_loss_that_is_not_finite_stops_with_step_and_batch(tmp_path, corpus, capsys, monkeypatch):
    real_step, calls = train.loss_and_gradient, []

    def step(hidden_states, model, *rest):
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                model.layers[0].ffn.w2.weight[0, 0] = float("nan")
        return real_step(hidden_states, model, *rest)

    monkeypatch.setattr(train, "loss_and_gradient", step)
    error = fails(capsys, flags(tmp_path, corpus), "at step 5", r"training tokens \d+", "is of step 3")
    starts = [int(n) for n in re.findall(r"tokens ([\d, ]+) ", error)[0].split(",")]
    ids, _ = bpe.read_tokens(tmp_path / "data/corpus/gpt2_300/train.bin")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, _ = lm.get_batch(ids, 4, 16, "cpu", generator)
    assert [ids[s : s + 16].tolist() for s in starts] == x.tolist()  # the batch named is the batch drawn
    assert torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["iteration"] == 3
    calls.clear()
    fails(capsys, flags(tmp_path, corpus, "--save_every", "6", out="none"), "at step 5", "no checkpoint was saved")


# -------------------------------------------------------------------------------------------------
# data


def test_held_out_files_do_not_depend_on_the_others(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", files=200)
    first = bpe.write_splits(str(corpus), tmp_path / "a", "strict")
    held_out = first[1].read_text().split(bpe.END_OF_TEXT)
    assert 3 <= len(held_out) - 1 <= 25  # 200 / 20, give or take four standard deviations
    for path in sorted(corpus.iterdir())[::2]:
        if path.read_text() not in held_out:
            path.unlink()
    second = bpe.write_splits(str(corpus), tmp_path / "b", "strict")
    assert second[1].read_text() == first[1].read_text()


def test_the_default_data_is_this_pythons_own_library():
    root, paths = bpe.standard_library()
    names = {p.relative_to(root).as_posix() for p in paths}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)


def test_tokenizer_and_token_files_are_made_once_and_again_when_the_text_changes(tmp_path, corpus):
    def times():
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data/corpus/gpt2_300").iterdir()}

    prepare = lambda: bpe.prepare_data(str(corpus), 300, tmp_path / "data", num_workers=1)  # noqa: E731
    prepare()
    before = times()
    prepare()
    assert times() == before
    (corpus / "file_00.py").write_text("something = 'else'\n" * 50)
    prepare()
    assert all(times()[name] > before[name] for name in before)


def test_runs_that_start_together_make_their_data_one_after_the_other(tmp_path, corpus, monkeypatch):
    pytest.importorskip("fcntl")
    inside, most, make_tokens = [], [], bpe.make_tokens

    def watched(*args):
        inside.append(args)
        most.append(len(inside))
        time.sleep(0.05)  # room for another to come in between
        try:
            return make_tokens(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(bpe, "make_tokens", watched)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(bpe.prepare_data, str(corpus), 300, tmp_path / "data", num_workers=1)
                for _ in range(3)]  # fmt: skip
    first, *others = (run.result()[0].tolist() for run in runs)
    assert set(most) == {1} and len(most) == 6 and others == [first, first]


def test_damaged_files_under_data_are_made_again(tmp_path, corpus):
    def prepare():
        train_ids, valid_ids, tokenizer, _ = bpe.prepare_data(
            str(corpus), 300, tmp_path / "data", num_workers=1
        )
        return train_ids.tolist(), valid_ids.tolist(), tokenizer.sha256

    whole = prepare()
    folder = tmp_path / "data/corpus"
    for name in ("train.txt", "gpt2_300/train.bin", "gpt2_300/tokenizer.json", "gpt2_300/valid.json"):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert prepare() == whole, name
        path.unlink()
        assert prepare() == whole, name


@pytest.mark.parametrize("name", ["verse.txt", "corpus.txt", "alice.txt"])  # the last two hash to held out
@pytest.mark.parametrize("text", ["".join(f"line {i}\n" for i in range(2000)), "ü" * 20_001])
def test_a_single_text_of_any_name_and_form_is_split_at_its_end(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    splits = bpe.write_splits(str(tmp_path / name), tmp_path / "data", "strict")
    train_text, valid_text = (path.read_text(encoding="utf-8") for path in splits)
    assert train_text + valid_text == text + bpe.END_OF_TEXT
    assert 0.02 < len(valid_text) / len(text) < 0.08


def test_validation_data_of_any_kind_is_what_is_validated_on(tmp_path, corpus, capsys):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out words " * 50}) + "\n\n")
    _, valid_ids, tokenizer, _ = bpe.prepare_data(
        str(corpus), 300, tmp_path / "data", valid_data=str(tmp_path / "held.jsonl"), num_workers=1
    )
    assert tokenizer.decode(valid_ids.tolist()) == "held out words " * 50 + bpe.END_OF_TEXT
    fails(capsys, flags(tmp_path, corpus, "--valid_data", "no/such.txt"), "no/such.txt")
    fails(capsys, flags(tmp_path, corpus, "--valid_data", "some.bin"), "must be text")


def test_prepared_files_are_not_put_among_the_text(tmp_path, corpus):
    with pytest.raises(ValueError, match="must lie outside the text"):
        bpe.prepare_data(str(corpus), 300, corpus.parent, num_workers=1)


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_documents_become_texts_ended_by_end_of_text(tmp_path, packed):
    path = tmp_path / ("lines.jsonl.gz" if packed else "lines.jsonl")
    lines = "".join(json.dumps({"text": f"document {i}\nügly", "id": i}) + "\n" for i in range(100))
    with (gzip.open if packed else open)(path, "wb") as f:
        f.write(lines.encode())
    splits = bpe.write_splits(str(path), tmp_path / "data", "strict")
    documents = [p.read_text(encoding="utf-8").split(bpe.END_OF_TEXT)[:-1] for p in splits]
    assert sorted(documents[0] + documents[1]) == sorted(f"document {i}\nügly" for i in range(100))
    assert documents[1]


def test_prepared_token_files_train_too(tmp_path, corpus):
    train_ids, _, tokenizer, _ = bpe.prepare_data(str(corpus), 300, tmp_path / "data", num_workers=1)
    file = tmp_path / "data/corpus/gpt2_300/train.bin"
    train.main([*TINY, "--data", str(file), "--out_dir", str(tmp_path / "out")])
    assert len(losses(tmp_path)) == 8
    assert bpe.Tokenizer.load(tmp_path / "out/model").sha256 == tokenizer.sha256


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges; drops the connection after `break_after` bytes, once."""

    content, break_after, ranges, tag = b"", None, True, None
    asked = []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        first = int(asked[6:-1]) if asked and self.ranges else 0
        body = self.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        if self.tag:
            self.send_header("X-Linked-ETag", f'"{self.tag}"')
        self.end_headers()
        if type(self).break_after is not None:
            body, type(self).break_after = body[: self.break_after], None
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Files,), {"asked": [], "content": random.Random(0).randbytes(300_000)})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{httpd.server_port}/file.txt"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path, server, monkeypatch, ranges):
    handler, url = server
    handler.break_after, handler.ranges = 100_000, ranges
    monkeypatch.setattr(bpe.time, "sleep", lambda seconds: None)
    sha256 = hashlib.sha256(handler.content).hexdigest()
    bpe.download(url, tmp_path / "file.txt", sha256)
    assert (tmp_path / "file.txt").read_bytes() == handler.content
    assert handler.asked[0] is None and re.fullmatch(r"bytes=\d+-", handler.asked[1])


@pytest.mark.parametrize("announced", [False, True])
def test_a_download_with_another_checksum_is_dropped(tmp_path, server, announced):
    handler, url = server
    handler.tag = "0" * 64 if announced else None
    with pytest.raises(ValueError, match="must have sha256 0000"):
        bpe.download(url, tmp_path / "file.txt", None if announced else "0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_named_set_is_fetched_unpacked_and_prepared(tmp_path, server, monkeypatch):
    handler, url = server
    handler.content = gzip.compress(("one story about a dog\n" * 40 + bpe.END_OF_TEXT).encode() * 30)
    monkeypatch.setitem(bpe.DATASETS, "stories", {s: (url + ".gz", None) for s in ("train", "valid")})
    train_ids, valid_ids, tokenizer, _ = bpe.prepare_data("stories", 270, tmp_path, num_workers=1)
    assert tokenizer.decode(train_ids.tolist()).startswith("one story about a dog\n")
    assert len(train_ids) == len(valid_ids)
    asked = len(handler.asked)
    bpe.prepare_data("stories", 270, tmp_path, num_workers=1)
    assert len(handler.asked) == asked  # nothing is fetched twice


# -------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("content, patterns", [
    (b"", ["must hold"]),
    (b"a", ["must"]),
    (b"text \xff more" * 100, ["UTF-8", "position 5", "--errors replace"]),
])  # fmt: skip
def test_bad_text_is_one_line(tmp_path, capsys, content, patterns):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    fails(capsys, flags(tmp_path, path), *patterns)
    assert not (tmp_path / "out/log.jsonl").exists()


def test_a_tokenizer_that_cannot_end_documents_is_one_line(tmp_path, corpus, capsys):
    bpe.Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|end_of_text|>"]).save(tmp_path / "tok")
    fails(capsys, flags(tmp_path, corpus, "--tokenizer", str(tmp_path / "tok")),
          "must have the special token <|endoftext|>")  # fmt: skip


def test_replaced_bytes_train(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"some text \xff and more words of it\n" * 300)
    assert train.main(flags(tmp_path, path, "--errors", "replace", "--vocab_size", "270")) == 0


@pytest.mark.parametrize("more, patterns", [
    (["--vocab_size", "200"], ["at least 257"]),
    (["--vocab_size", "30000"], ["at most", "30000"]),
    (["--context_length", "100000"], ["context_length", "100000"]),
    (["--d_model", "15", "--num_heads", "2"], ["multiple of num_heads"]),
    (["--num_heads", "16"], ["d_head must be even"]),
    (["--batch_size", "0"], ["batch_size", "above 0"]),
    (["--lr", "-1"], ["lr", "above 0"]),
    (["--checkpoint_every", "0"], ["above 0"]),
    (["--stochastic_rounding"], ["needs bfloat16 weights", "--param_dtype bfloat16"]),
    (["--param_dtype", "bfloat16", "--dtype", "float32"], ["dtype must be bfloat16"]),
    (["--resume", "--overwrite"], ["not allowed"]),
    (["--recompute", "ffn", "--checkpoint_every", "1", "--data", "no/such"], ["got both"]),
    (["--device", "cuda:99"], ["device"]),
    (["--data", "no/such/file.txt"], ["no/such/file.txt"]),
    (["--tokenizer", "no/such/tokenizer.json"], ["no/such"]),
    (["--no_such_flag", "1"], ["unrecognized arguments"]),
    (["--preset", "gpt5"], ["invalid choice"]),
])  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, corpus, capsys, more, patterns):
    fails(capsys, flags(tmp_path, corpus, *more), *patterns)
    assert not (tmp_path / "out/log.jsonl").exists()


def test_flash_attention_without_a_gpu_is_one_line_before_any_work(tmp_path, corpus):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    argv = flags(tmp_path, corpus, "--attention", "flash", "--device", "cpu")
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert re.search(r"error: (flash attention needs a CUDA GPU|triton must be)", done.stderr)
    assert not (tmp_path / "out/log.jsonl").exists() and "encode:" not in done.stdout


def test_an_out_dir_that_holds_a_run_is_kept_unless_told(tmp_path, corpus, capsys):
    train.main(flags(tmp_path, corpus))
    before = (tmp_path / "out/log.jsonl").read_text()
    fails(capsys, flags(tmp_path, corpus), "holds a run", "--resume", "--overwrite")
    assert (tmp_path / "out/log.jsonl").read_text() == before
    assert (tmp_path / "out/model/model.safetensors").exists()
    assert train.main(flags(tmp_path, corpus, "--overwrite", "--max_steps", "2", "--norm", "post")) == 0
    assert len(losses(tmp_path)) == 2
    assert all(None not in record.values() for record in records(tmp_path)[1:])
    assert not [*(tmp_path / "out/model").iterdir()]  # what has no such folder keeps none of another
    (tmp_path / "notes").write_text("a file")
    fails(capsys, flags(tmp_path, corpus, out="notes"), "out_dir must be a folder")


def test_of_an_overwritten_run_nothing_stays_that_could_pass_for_the_new_one(tmp_path, corpus):
    train.main(flags(tmp_path, corpus))
    bpe.write_tokens(corpus, bpe.Tokenizer.load(tmp_path / "out"), tmp_path / "x.bin", num_workers=1)
    argv = [*TINY, "--data", str(tmp_path / "x.bin"), "--out_dir", str(tmp_path / "out"), "--overwrite"]
    train.main([*argv, "--norm", "post"])  # has neither a tokenizer nor a Hugging Face folder
    assert sorted(p.name for p in tmp_path.glob("out/*")) == [
        "checkpoint.pt", "checkpoint.pt.prev", "log.jsonl", "model"]  # fmt: skip
    assert not [*tmp_path.glob("out/model/*")] and lm.load_model(tmp_path / "out")[1] is None
    train.main(argv)  # a folder, but no tokenizer in it
    assert lm.load_model(tmp_path / "out")[1] is None
    assert lm.main(["export", "--model", str(tmp_path / "out"), "--out_dir", str(tmp_path / "hf")]) is None
    assert (tmp_path / "hf/model.safetensors").exists()


def test_a_checkpoint_of_another_shape_is_named(tmp_path, corpus, capsys):
    train.main(flags(tmp_path, corpus))
    fails(capsys, flags(tmp_path, corpus, "--resume", "--d_model", "32"), "shape", r"16", r"32")


@pytest.mark.parametrize("damage, pattern", [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "must hold"),
    (lambda p: p.with_suffix(".json").unlink(), "json"),
    (lambda p: p.with_suffix(".json").write_text("{}"), "must describe"),
    (lambda p: p.with_name("tokenizer.json").write_text("{"), "JSON"),
    (lambda p: bpe.Tokenizer({i: bytes([i]) for i in range(256)}, [], [bpe.END_OF_TEXT]).save(p.parent),
     "made by the tokenizer|made by"),
])  # fmt: skip
def test_damaged_and_foreign_token_files_are_one_line(tmp_path, corpus, capsys, damage, pattern):
    bpe.prepare_data(str(corpus), 300, tmp_path / "data", num_workers=1)
    file = tmp_path / "data/corpus/gpt2_300/train.bin"
    damage(file)
    fails(capsys, [*TINY, "--data", str(file), "--out_dir", str(tmp_path / "out")], pattern)


def test_ids_beyond_the_vocabulary_are_found_before_the_first_step(tmp_path, capsys):
    ids = np.arange(1000, dtype="<u2")
    ids.tofile(tmp_path / "x.bin")
    meta = dict(vocab_size=1000, tokenizer_hash="", tokens=1000, dtype="uint16", bytes=4000, documents=1)
    (tmp_path / "x.json").write_text(json.dumps(meta))
    fails(capsys, [*TINY, "--data", str(tmp_path / "x.bin"), "--out_dir", str(tmp_path / "out")],
          "must be below 300, got 999")  # fmt: skip
