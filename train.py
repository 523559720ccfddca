"""Raw text in, trained language model and sample out, on one device.

    python train.py                                     # Python's own source, 5 minutes on 2 cores
    python train.py --data shakespeare --out_dir out_s  # or a .txt, .jsonl(.gz), folder or .bin
    python train.py --resume                            # goes on where a run was killed
    python train.py --plot out*/log.jsonl               # learning curves of runs, curves.png

The run, in order: find the text and hold some out, train a tokenizer, write token files (all under
data/, used again while the text is the same), train, evaluate, save and sample (under out/).
Source: CS336 assignment 1 (basics) handout, Stanford 2025 and 2026, sections 5 to 7
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import model as lm
from bpe import alone_with


def loss_and_gradient(hidden_states, model, batch, micro_batch_size, grad_clip, context):
    """Leaves the clipped gradient of batch (x, y), each (B, T) int64, in the parameters; returns
    the tensor (loss, gradient norm before clipping). The loss is the mean over all tokens, however
    the batch is cut into micro-batches; optimizer.step() makes a training step of it."""
    x, y = batch
    loss_sum = torch.zeros((), device=x.device)
    for p in model.parameters():
        p.grad = None
    for x_part, y_part in zip(x.split(micro_batch_size), y.split(micro_batch_size), strict=True):
        with context():
            hidden = hidden_states(x_part)
            loss = lm.linear_cross_entropy(hidden, model.lm_head.weight, y_part, reduction="sum")
        loss = loss / y.numel()
        loss.backward()
        loss_sum += loss.detach()
    return torch.stack((loss_sum, lm.clip_grad_norm_(model.parameters(), grad_clip)))


class Trainer:
    """The state of a run and what happens to it; `run` is the loop."""

    def __init__(self, args):
        self.args, self.started = args, time.perf_counter()
        self.device = lm.resolve_device(args.device)
        self.out_dir = Path(args.out_dir)
        self.checkpoint = self.out_dir / "checkpoint.pt"
        lm.check_out_dir(args)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        lm.check_recompute_flags(args)
        self.min_lr = lm.last_rate(args)
        precision = lm.optimizer_precision(args)
        narrow = args.param_dtype == "bfloat16"  # then all is computed in it
        self.dtype, reason = lm.resolve_dtype("bfloat16" if narrow else args.dtype, self.device)
        problem = lm.compile_problem(self.device)
        compiled = problem is None if args.compile is None else args.compile
        for note in filter(None, (reason, problem if args.compile is None else None)):
            print(note)
        if args.attention == "flash":  # said before the data is made ready
            lm.load_flash_attention(self.device)
        (self.config, self.train_ids, self.valid_ids, self.tokenizer,
         self.tokens_per_byte) = lm.prepare_run(args)
        config = self.config
        self.tokenizer_hash = self.tokenizer.sha256 if self.tokenizer else None
        self.micro_batch_size, self.sequences = args.batch_size, args.batch_size * args.grad_accum
        self.fit_to_memory()
        torch.manual_seed(args.seed)
        self.model = lm.TransformerLM(config).to(self.device, getattr(torch, args.param_dtype))
        self.model.checkpoint_every = args.checkpoint_every
        self.model.recompute(self.levels)
        groups = lm.optimizer_groups(self.model, args.weight_decay)
        self.optimizer = lm.AdamW(groups, args.lr, (args.beta1, args.beta2), **precision)
        self.generator = torch.Generator().manual_seed(args.seed)  # the place in the data
        hidden = self.model.hidden_states
        self.hidden_states = torch.compile(hidden) if compiled else hidden
        self.step, self.saved = 0, None
        if args.resume:
            self.load()
        if args.overwrite:
            lm.clear_run(self.out_dir)
        if self.tokenizer:  # of this run, whatever becomes of data_dir
            self.tokenizer.save(self.out_dir / "tokenizer.json")
        self.log = self.open_log()
        self.pending = None  # the newest step: its numbers are read while the next one runs
        self.eta_from = None  # (step, time) of the first step: it may compile, and is not counted
        self.signals = []
        print(f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.device}, "
              f"{str(self.dtype)[6:]}{', compiled in the first step' if compiled else ''}")

    def fit_to_memory(self):
        """Says what memory a step will need; halves the micro-batch until that is free."""
        args, device, free = self.args, self.device, lm.free_memory(self.device)

        def bytes_with(levels):
            return sum(lm.memory_of_flags(args, self.config, self.micro_batch_size, self.dtype,
                                          device, levels).values())

        while True:
            self.levels = lm.choose_recomputation(args, self.config.num_layers, bytes_with, free)
            need = bytes_with(self.levels)
            print(f"memory: about {need / 2**30:.2f} of {free / 2**30:.1f} GiB free on {device}"
                  f"{lm.levels_in_words(self.levels)}")
            if need <= free or self.micro_batch_size % 2:
                return lm.refuse_hopeless(need / free, self.micro_batch_size)
            self.halve_batch()

    def halve_batch(self):
        self.micro_batch_size //= 2
        print(f"not enough memory: batch_size halved to {self.micro_batch_size}, grad_accum doubled"
              f" to {self.sequences // self.micro_batch_size}, the same update")

    def open_log(self):
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else str(self.device)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        first = {"flags": self.flags(), "versions": versions, "device": card}
        validates = self.step % self.args.eval_every == 0 or self.step >= self.args.max_steps
        return lm.open_log(self.out_dir / "log.jsonl", self.step, first, validates)

    def record(self, **entry):
        entry["elapsed_s"] = round(time.perf_counter() - self.started, 3)
        self.log.write(json.dumps(entry) + "\n")
        self.log.flush()

    def flags(self):
        skip = ("model_defaults", "plot", "plot_file", "resume", "overwrite")
        return {name: value for name, value in vars(self.args).items() if name not in skip}

    def save(self):
        lm.save_checkpoint(
            self.model, self.optimizer, self.step, self.checkpoint, config=asdict(self.config),
            flags=self.flags(), generator=self.generator.get_state(),
            elapsed_s=time.perf_counter() - self.started,
            micro_batch_size=self.micro_batch_size, tokenizer_hash=self.tokenizer_hash,
            train_tokens=len(self.train_ids),
        )
        self.saved = self.step

    def load(self):
        try:
            saved = lm.read_checkpoint(self.checkpoint)
        except FileNotFoundError:
            print(f"no checkpoint in {self.out_dir} yet: starting from the beginning")
            return
        if saved.get("tokenizer_hash", "") != self.tokenizer_hash:
            raise ValueError(f"{self.checkpoint} must be of a run with this tokenizer, got another"
                             f"; give the same text, or --tokenizer {self.out_dir}/tokenizer.json")
        saved["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]  # flags
        lm.restore(saved, self.model, self.optimizer)
        self.generator.set_state(saved["generator"])
        if saved["flags"]["batch_size"] == self.args.batch_size:  # halved, if so, for good reason
            self.micro_batch_size = min(self.micro_batch_size, saved["micro_batch_size"])
        self.step = self.saved = saved["iteration"]
        self.started -= saved["elapsed_s"]
        print(f"resumed {self.checkpoint} at step {self.step}")
        if (before := saved.get("train_tokens", len(self.train_ids))) != len(self.train_ids):
            print(f"on other data than before: {len(self.train_ids):,} training tokens, then "
                  f"{before:,}")

    def settle(self):
        """Waits for the pending step, checks its numbers, and logs them when it is time."""
        if self.pending is None:
            return
        (step, stats, done, drawn_from, lr), self.pending = self.pending, None
        seconds = lm.seconds_between(self.step_began, done)  # waits for the step
        self.step_began, now = done, time.perf_counter()
        loss, norm = stats.tolist()
        entry = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            lm.stop_on_non_finite(entry, drawn_from, len(self.train_ids)
                                  - self.config.context_length, self.sequences, self.saved)
        self.eta_from = self.eta_from or (step, now)
        args, tokens = self.args, self.sequences * self.config.context_length
        if step % args.log_every and step not in (1, args.max_steps):
            return
        rate, peak = tokens / seconds, lm.peak_flops(self.device)
        mfu = peak and rate * lm.flops_per_token(self.config) / peak
        mean_s = (now - self.eta_from[1]) / max(1, step - self.eta_from[0]) or seconds
        entry.update(step_ms=seconds * 1e3, tokens_per_s=rate, **({"mfu": mfu} if mfu else {}))
        if self.device.type == "cuda":
            entry["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(lm.log_line(entry, args.max_steps, mfu, mean_s * (args.max_steps - step)), flush=True)
        self.record(**entry)

    def validate(self, num_tokens):
        loss = lm.evaluate(self.hidden_states, self.model, self.valid_ids, num_tokens,
                           self.micro_batch_size, self.device, self.dtype)
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
            lr = lm.lr_cosine_schedule(self.step + 1, args.lr, self.min_lr, args.warmup_steps,
                                       args.max_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            drawn_from = self.generator.get_state()
            batch = lm.get_batch(self.train_ids, self.sequences, T, self.device, self.generator)
            stats = self.step_within_memory(batch)
            self.settle()
            self.step += 1
            on_cuda = self.device.type == "cuda"  # its copy waits for its turn, the host does not
            stats = stats.to("cpu", non_blocking=on_cuda)
            self.pending = (self.step, stats, lm.time_mark(self.device), drawn_from, lr)
            if not on_cuda:
                self.settle()
            saving = self.step % args.save_every == 0 or self.step == args.max_steps or self.signals
            if saving:
                self.settle()
                self.save()
                if self.signals:
                    print(f"signal {self.signals[0]}: saved at step {self.step}, --resume goes on")
                    return 128 + self.signals[0]
                self.step_began = lm.time_mark(self.device)
        self.finish(time.perf_counter() - loop_started)
        return 0

    def step_within_memory(self, batch):
        """One training step; out of memory, its gradient again in halved micro-batches."""
        while True:
            try:
                stats = loss_and_gradient(
                    self.hidden_states, self.model, batch, self.micro_batch_size,
                    self.args.grad_clip, lambda: lm.compute_context(self.device, self.dtype),
                )
                break
            except RuntimeError as error:
                if not lm.is_out_of_memory(error):
                    raise
                if self.micro_batch_size % 2:
                    raise torch.OutOfMemoryError(str(error)) from None
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.halve_batch()
        self.optimizer.step()
        return stats

    def finish(self, loop_s):
        """Last validation, Hugging Face folder, sample, times."""
        self.validate(4 * self.args.eval_tokens)
        lm.export_and_sample(self.model, self.tokenizer, self.out_dir, self.args.prompt,
                             self.args.sample_tokens, self.args.seed)
        print(f"time: {time.perf_counter() - self.started:.0f} s, {loop_s:.0f} s of it in steps")


def read_log(path):
    """The records of a log.jsonl, without a line that a full disk or a kill cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must be the log.jsonl of a run, got something else; give another")
    return records


def plot(logs, out):
    """Draws the losses in each log.jsonl against steps and wall clock into the picture `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, got none; pip install matplotlib") from None
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    curves = (("loss", "training", {"alpha": 0.35}), ("valid_loss", "validation", {"marker": "."}))
    runs = [(path.parent.name, read_log(path)) for path in map(Path, logs)]
    losses = [[r[key] for r in records for key, *_ in curves if key in r] for _, records in runs]
    every, top = sum(losses, []), 1.5 * max((of_run[0] for of_run in losses if of_run), default=0)
    if not every:
        raise ValueError(f"one log must hold a loss, got none in {', '.join(logs)}; give others")
    for axis, x, scale, unit in zip(figure.subplots(1, 2, sharey=True), ("step", "elapsed_s"),
                                     (1, 60), ("step", "minutes"), strict=True):
        for color, (run, records) in enumerate(runs):
            for key, name, style in curves:
                points = [(r[x] / scale, r[key]) for r in records if key in r and x in r]
                axis.plot(*zip(*points, strict=True), color=f"C{color}", label=f"{run} {name}",
                          **style)
        axis.set(xlabel=unit, ylabel="loss, nats a token")
        if min(every) > 0 and max(every) > top:  # one diverged: at its scale others would be flat
            axis.set_ylim(0.95 * min(every), top)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


def build_parser():
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    lm.add_training_flags(parser)
    parser.add_argument("--plot", nargs="+", metavar="LOG", help="draw these log.jsonl and stop")
    parser.add_argument("--plot_file", default="curves.png")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    lm.print_any_text()
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        parser.error("train.py is for one device; use torchrun with ddp.py train")
    try:
        if args.plot:
            return plot(args.plot, args.plot_file)
        if args.resume:  # the run's own flags, and over them those given now
            parser.set_defaults(**{**lm.saved_flags(args.out_dir, args), "out_dir": args.out_dir})
            args = parser.parse_args(argv)
        lm.check_out_dir(args)
        with alone_with(Path(args.out_dir, "run.lock")):  # two runs would mix their files
            trainer = Trainer(args)
            with lm.stop_politely(trainer.signals):
                return trainer.run()
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        parser.exit(2, f"train.py: error: {lm.first_line(error)}\n")
    except KeyboardInterrupt:  # before the first step: later ones are saved, see lm.stop_politely
        parser.exit(130, "train.py: interrupted; run it again, it uses what was made so far\n")


if __name__ == "__main__":
    sys.exit(main())
