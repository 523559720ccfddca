"""The training API of CS336 assignment 3, served anywhere, and its client.

    python serve_part.py serve --backend law         # answers at once, from a stated law
    python serve_part.py serve --backend train       # trains; the key is 12345678
    python serve_part.py submit config.json          # one experiment
    python serve_part.py sweep --plan plan.json      # many; results.jsonl; survives kills

Sources
[1] CS336 assignment 3 handout and its server, Stanford 2026: routes, bodies, budget, scheduling
[2] Hoffmann et al. 2022, arXiv 2203.15556; refitted by Besiroglu et al. 2024, arXiv 2404.10102
[3] Li et al. 2025, Step Law, arXiv 2503.04715: learning rate and batch size
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import hmac
import http.server
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
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import bpe
import model as lm

# -------------------------------------------------------------------------------------------------
# the training API: what a request may hold [1]

SEQ_LEN = 512  # tokens; part of the contract, not of a request
N_VAL_TOKENS = 2**18
API_BUDGET_S = 12 * 3600.0
API_BODY_LIMIT = 2**20  # bytes; a training config is about 1,000
API_KEY = "12345678"  # of the one user where --users names none
REQUIRED = object()


class TrainingAPIError(Exception):
    """An answer that is no success: HTTP status, JSON body, more headers."""

    def __init__(self, status, body, headers=()):
        super().__init__(f"{status} {body}")
        self.status, self.body, self.headers = status, body, headers


def refuse(errors, kind, loc, message, value, ctx=None):
    """Adds one entry of a 422 body; the parsers below return what this returns: None."""
    entry = {"type": kind, "loc": list(loc), "msg": message, "input": value}
    errors.append(entry if ctx is None else {**entry, "ctx": ctx})


def parse_boolean(value, loc, errors):
    if isinstance(value, str) and value.lower() in ("1", "on", "t", "true", "y", "yes"):
        return True
    if isinstance(value, str) and value.lower() in ("0", "off", "f", "false", "n", "no"):
        return False
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    whole = isinstance(value, (int, float)) and abs(value) < 2**63 and value == int(value)
    if isinstance(value, str) or whole:
        return refuse(errors, "bool_parsing", loc, "Input should be a valid boolean, unable to "
                      "interpret input", value)
    return refuse(errors, "bool_type", loc, "Input should be a valid boolean", value)


def within_bounds(value, loc, errors, given, **bounds):
    """value, or None and an entry where it breaks a bound, NaN every one: `given` is echoed."""
    for name, kind, text, holds in (
        ("le", "less_than_equal", "less than or equal to", operator.le),
        ("ge", "greater_than_equal", "greater than or equal to", operator.ge),
        ("gt", "greater_than", "greater than", operator.gt),
    ):
        if name in bounds and not holds(value, bounds[name]):
            return refuse(errors, kind, loc, f"Input should be {text} {bounds[name]:.15g}", given,
                          {name: bounds[name]})
    return value


def parse_integer(value, loc, errors, **bounds):
    """An int from an int, a bool, a whole float, or text of digits, as the reference takes them."""
    given, size = value, "Unable to parse input string as an integer, exceeded maximum size"
    if isinstance(value, float):
        if not math.isfinite(value):
            return refuse(errors, "finite_number", loc, "Input should be a finite number", value)
        if value != int(value):
            return refuse(errors, "int_from_float", loc, "Input should be a valid integer, got a "
                          "number with a fractional part", value)
        if not -2**63 <= value < 2**63:
            return refuse(errors, "int_parsing_size", loc, size, value)
    elif isinstance(value, str):
        if not re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*(\.0+)?", value.strip()):
            return refuse(errors, "int_parsing", loc, "Input should be a valid integer, unable to "
                          "parse string as an integer", value)
        if len(value) > 4300:
            return refuse(errors, "int_parsing_size", loc, size, value)
        value = value.strip().split(".")[0]
    elif not isinstance(value, int):
        return refuse(errors, "int_type", loc, "Input should be a valid integer", value)
    return within_bounds(int(value), loc, errors, given, **bounds)


def parse_number(value, loc, errors, **bounds):
    """A float from a number, a bool or text."""
    given = value
    try:
        if isinstance(value, str):
            if not value.isascii() and not value.strip().isascii():
                raise ValueError
            value = float(value.strip().replace("_.", "."))
        elif isinstance(value, (int, float)):
            value = float(value)
        else:
            raise OverflowError
    except OverflowError:
        return refuse(errors, "float_type", loc, "Input should be a valid number", given)
    except ValueError:
        return refuse(errors, "float_parsing", loc, "Input should be a valid number, unable to "
                      "parse string as a number", given)
    return within_bounds(value, loc, errors, given, **bounds)


def parse_number_or_null(value, loc, errors):
    return None if value is None else parse_number(value, loc, errors)


def parse_text(value, loc, errors):
    if isinstance(value, str):
        return value
    return refuse(errors, "string_type", loc, "Input should be a valid string", value)


def parse_text_or_null(value, loc, errors):
    return None if value is None else parse_text(value, loc, errors)


def parse_numbers(value, loc, errors):
    if isinstance(value, list):
        return [parse_number(item, (*loc, i), errors) for i, item in enumerate(value)]
    return refuse(errors, "list_type", loc, "Input should be a valid list", value)


def one_word_of(*words):
    """A parser of exactly these strings."""
    expected = " or ".join(f"'{word}'" for word in words)

    def parse(value, loc, errors):
        if isinstance(value, str) and value in words:
            return value
        return refuse(errors, "literal_error", loc, f"Input should be {expected}", value,
                      {"expected": expected})

    return parse


def record(name, **fields):
    """A parser of an object with just these fields: name=parser, or name=(parser, default)."""
    fields = {k: v if isinstance(v, tuple) else (v, REQUIRED) for k, v in fields.items()}

    def parse(value, loc, errors):
        if not isinstance(value, dict):
            return refuse(errors, "model_attributes_type", loc, "Input should be a valid dictionary"
                          " or object to extract fields from", value)
        result = {}
        for field, (parser, default) in fields.items():
            if field in value:
                result[field] = parser(value[field], (*loc, field), errors)
            elif default is REQUIRED:
                refuse(errors, "missing", (*loc, field), "Field required", value)
            else:
                result[field] = dict(default) if isinstance(default, dict) else default
        for field in value:
            if field not in fields:
                refuse(errors, "extra_forbidden", (*loc, field), "Extra inputs are not permitted",
                       value[field])
        return result

    parse.__name__ = name
    return parse


def first_that_fits(*parsers):
    """A parser that takes the first of `parsers` without an error; else it reports those of all."""
    def parse(value, loc, errors):
        found = []
        for parser in parsers:
            own = []
            result = parser(value, (*loc, parser.__name__), own)
            if not own:
                return result
            found += own
        errors += found

    return parse


def chosen_by(tag, **parsers):
    """A parser that the field `tag` of the object chooses."""
    expected = ", ".join(f"'{word}'" for word in parsers)

    def parse(value, loc, errors):
        if not isinstance(value, dict):
            return record("")(value, loc, errors)
        if tag not in value:
            return refuse(errors, "union_tag_not_found", loc, "Unable to extract tag using "
                          f"discriminator '{tag}'", value, {"discriminator": f"'{tag}'"})
        word = value[tag]
        if not isinstance(word, str) or word not in parsers:
            return refuse(errors, "union_tag_invalid", loc, f"Input tag '{word}' found using "
                          f"'{tag}' does not match any of the expected tags: {expected}", value,
                          {"discriminator": f"'{tag}'", "tag": str(word),
                           "expected_tags": expected})
        return parsers[word](value, (*loc, word), errors)

    return parse


parse_architecture = record(
    "BasicTransformerConfig", attention_bias=parse_boolean, head_dim=parse_integer,
    hidden_size=parse_integer, intermediate_size=parse_integer, num_attention_heads=parse_integer,
    num_hidden_layers=parse_integer, num_key_value_heads=parse_integer, rms_norm_eps=parse_number,
    rope_theta=parse_integer, tie_word_embeddings=parse_boolean,
    dtype=one_word_of("float32", "bfloat16"), vocab_size=parse_integer)
SCHEDULE = {"peak_value": 3e-4, "final_lr_frac": 0.1, "warmup_frac": 0.05, "init_value": 0.0}
parse_schedule = record("WarmupCosineDecay", **{k: (parse_number, v) for k, v in SCHEDULE.items()})
parse_sgd = record("SGDConfig", lr_scheduler=parse_schedule,
                   grad_clip_norm=(parse_number_or_null, 1.0))
parse_adamw = record("AdamWConfig", lr_scheduler=(parse_schedule, SCHEDULE),
                     weight_decay=(parse_number, 0.01), beta1=(parse_number, 0.9),
                     beta2=(parse_number, 0.95), eps=(parse_number, 1e-8),
                     eps_root=(parse_number, 1e-8), grad_clip_norm=(parse_number_or_null, 1.0))
above_zero = functools.partial(parse_integer, gt=0)
parse_config_fields = record(
    "TrainingConfig", architecture_config=parse_architecture,
    optimizer_config=first_that_fits(parse_sgd, parse_adamw), train_batch_size=above_zero,
    val_batch_size=above_zero, n_evals=(above_zero, 16),
    total_train_tokens=functools.partial(parse_integer, gt=0, le=500_000_000_000),
    max_runtime_seconds=functools.partial(parse_number, ge=1.0, le=43200.0),
    model_seed=(functools.partial(parse_integer, ge=0), 0))


def broken_rule(config):
    """The first rule between fields that a parsed config breaks, None if it keeps all [1]."""
    a, o = config["architecture_config"], config["optimizer_config"]
    schedule, clip = o["lr_scheduler"], o["grad_clip_norm"]
    step_tokens = SEQ_LEN * config["train_batch_size"]
    heads, kv_heads = a["num_attention_heads"], a["num_key_value_heads"]
    sizes = ("head_dim", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_hidden_layers", "num_key_value_heads", "vocab_size")
    rules = [
        (lambda: config["total_train_tokens"] % step_tokens == 0,
         "total_train_tokens must be divisible by seq_len * train_batch_size"),
        (lambda: config["total_train_tokens"] // step_tokens % config["n_evals"] == 0,
         "total optimizer steps must be divisible by n_evals"),
        (lambda: N_VAL_TOKENS % (SEQ_LEN * config["val_batch_size"]) == 0,
         "n_val_tokens must be divisible by seq_len * val_batch_size"),
        *((lambda name=name: a[name] > 0, f"{name} must be positive") for name in sizes),
        (lambda: a["hidden_size"] == heads * a["head_dim"],
         "hidden_size must equal num_attention_heads * head_dim"),
        (lambda: heads % kv_heads == 0,
         "num_attention_heads must be divisible by num_key_value_heads"),
        (lambda: heads == kv_heads,
         "num_key_value_heads must equal num_attention_heads; GQA is not supported"),
        (lambda: a["head_dim"] % 2 == 0, "head_dim must be even for RoPE"),
        (lambda: a["intermediate_size"] >= a["hidden_size"],
         "intermediate_size should usually >= hidden_size"),
        (lambda: not a["rms_norm_eps"] <= 0, "rms_norm_eps must be positive"),
        (lambda: a["rope_theta"] > 0, "rope_theta must be positive"),
        (lambda: 0 <= schedule["warmup_frac"] < 1, "warmup_frac must be in [0, 1)"),
        (lambda: 0 <= schedule["final_lr_frac"] <= 1, "final_lr_frac must be in [0, 1]"),
        (lambda: not schedule["init_value"] < 0, "initial learning rate must be nonnegative"),
        (lambda: not schedule["peak_value"] <= 0, "peak learning rate must be positive"),
        (lambda: clip is None or not clip <= 0, "grad_clip_norm must be positive or None"),
    ]
    if "beta1" in o:
        rules += [
            (lambda: not o["weight_decay"] < 0, "weight_decay must be nonnegative"),
            (lambda: 0 <= o["beta1"] < 1, "beta1 must be in [0, 1)"),
            (lambda: 0 <= o["beta2"] < 1, "beta2 must be in [0, 1)"),
            (lambda: not o["eps"] <= 0, "eps must be positive"),
            (lambda: not o["eps_root"] < 0, "eps_root must be nonnegative")]
    return next((text for holds, text in rules if not holds()), None)


def parse_config(value, loc=("body",), errors=None):
    """A training config with its defaults filled in, keys in the contract's order, from a request's
    object. Entries for a 422 go to `errors`; without it they are raised as a TrainingAPIError."""
    own = []
    config = parse_config_fields(value, loc, own)
    rule = None if own else broken_rule(config)
    if rule:
        refuse(own, "value_error", loc, f"Value error, {rule}", value, {"error": {}})
    if errors is None and own:
        raise TrainingAPIError(422, {"detail": own})
    if own:
        errors += own
    return config


TYPES = {"TrainingConfig": "training_config", "BasicTransformerConfig": "model.basic_model",
         "AdamWConfig": "optimizer", "SGDConfig": "optimizer", "WarmupCosineDecay": "optimizer"}


def config_id(config):
    """The contract's unique_id of a parsed config, 20 hex digits: equal configs are duplicates."""
    def typed(name, value):
        return {"__type__": f"cs336_scaling.training.{TYPES[name]}.{name}", "__value__": value}

    optimizer = dict(config["optimizer_config"])
    optimizer["lr_scheduler"] = typed("WarmupCosineDecay", optimizer["lr_scheduler"])
    whole = typed("TrainingConfig", {
        **config, "architecture_config": typed("BasicTransformerConfig",
                                               config["architecture_config"]),
        "optimizer_config": typed("AdamWConfig" if "beta1" in optimizer else "SGDConfig",
                                  optimizer)})
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2s(text.encode(), digest_size=10).hexdigest()


parse_final = record("FinalSubmission",
                     training_config=lambda value, loc, errors: parse_config(value, loc, errors),
                     predicted_final_loss=functools.partial(parse_number, gt=0.0))
parse_event = chosen_by(
    "log_type",
    run_started=record("", log_type=parse_text, run_id=parse_text, wandb_path=parse_text_or_null),
    validation_loss=record("", log_type=parse_text, run_id=parse_text, val_losses=parse_numbers),
    run_heartbeat=record("", log_type=parse_text, run_id=parse_text, elapsed_seconds=parse_number),
    preempted=record("", log_type=parse_text, run_id=parse_text))
parse_reason = first_that_fits(
    record("TimeoutReason", partial_val_losses=parse_numbers,
           reason=(one_word_of("timeout"), "timeout")),
    record("UnexpectedReason", failure=parse_text,
           reason=(one_word_of("unexpected"), "unexpected")))
parse_finish = first_that_fits(
    record("CompletedPayload", result_type=one_word_of("completed"),
           used_runtime_seconds=parse_number, val_losses=parse_numbers),
    record("FailedPayload", result_type=one_word_of("failed"), used_runtime_seconds=parse_number,
           reason=parse_reason))


def wire_number(x):
    """A float as the reference writes it: 30.0, 1e-6, 0.00001; null where JSON has no number."""
    if not math.isfinite(x):
        return "null"
    text = repr(x)
    if "e-05" in text:
        return np.format_float_positional(x)
    return re.sub(r"e-0(\d)", r"e-\1", text)


def to_wire(value):
    """Compact JSON text of dicts, lists, numbers, strings and None."""
    if isinstance(value, float):
        return wire_number(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{to_wire(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_wire, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@functools.lru_cache(maxsize=2**14)
def stored_to_wire(text):
    return to_wire(json.loads(text))


def utc_now():
    return datetime.now(timezone.utc).replace(tzinfo=None).isoformat() + "Z"


# -------------------------------------------------------------------------------------------------
# the training API: what is kept, and how it survives a kill

SCHEMA = """
CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, sunet_id TEXT UNIQUE, key TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS experiments (
  id INTEGER PRIMARY KEY AUTOINCREMENT, user INTEGER NOT NULL, unique_id TEXT NOT NULL,
  config TEXT NOT NULL, max_runtime REAL NOT NULL, state TEXT NOT NULL, queued_at TEXT NOT NULL,
  dispatched_at TEXT, run_id TEXT, attempts INTEGER NOT NULL DEFAULT 0, used REAL,
  val_losses TEXT NOT NULL DEFAULT '[]', reason TEXT, ended_at TEXT, UNIQUE (user, unique_id));
CREATE INDEX IF NOT EXISTS by_state ON experiments (state, user);
CREATE INDEX IF NOT EXISTS by_user ON experiments (user, state, max_runtime, used);
CREATE TABLE IF NOT EXISTS events (
  id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL, at TEXT NOT NULL, entry TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS final_submissions (
  user INTEGER PRIMARY KEY, config TEXT NOT NULL, loss REAL NOT NULL, submitted_at TEXT NOT NULL);
"""
MAX_ATTEMPTS = 3  # a run that took the server down so often is failed at start, not tried again
CHARGED = "MIN(MAX(1.0, COALESCE(used, 1.0)), max_runtime)"


class TrainingAPIStore:
    """Users, experiments, events and final submissions in one SQLite file.

    One thread writes. It takes all that waits into one transaction, a savepoint each, and answers
    after the commit has reached the disk (WAL, synchronous=FULL): what was acknowledged survives a
    kill or a power cut, budgets are read and reserved without a race, and 64 clients share one
    fsync. Readers have connections of their own and wait for nobody.
    """

    def __init__(self, path, budget_s=API_BUDGET_S):
        self.path, self.budget_s = str(path), budget_s
        try:
            self.guard = sqlite3.connect(f"{path}.lock", timeout=0, check_same_thread=False)
            self.guard.execute("BEGIN EXCLUSIVE")  # till the process ends, however it ends
        except sqlite3.Error as error:
            raise ValueError(f"the database must be free and writable, got {path}: {error}; stop "
                             "the other server or give another --db") from None
        try:
            self.connection = self.connect(timeout=5)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            self.connection.executescript(SCHEMA)
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.execute("COMMIT")
        except sqlite3.Error as error:
            self.guard.close()
            raise ValueError(f"the database must be one of this server and free, got {path}: "
                             f"{error}; give another --db") from None
        self.waiting, self.readers = queue.SimpleQueue(), queue.LifoQueue()
        self.queued = threading.Event()  # wakes a back end
        self.version, self.budgets = None, {}  # no other process writes: see the guard
        self.writer = threading.Thread(target=self.write_all, daemon=True)
        self.writer.start()

    def connect(self, timeout=30):
        connection = sqlite3.connect(self.path, timeout=timeout, isolation_level=None,
                                     check_same_thread=False)
        connection.row_factory = sqlite3.Row
        return connection

    def close(self):
        self.waiting.put(None)
        self.writer.join()
        while not self.readers.empty():
            self.readers.get().close()
        self.connection.close()
        self.guard.close()

    def write(self, function, *args):
        """function(connection, *args) inside a transaction; returns once it is on disk."""
        future = concurrent.futures.Future()
        self.waiting.put((functools.partial(function, self.connection, *args), future))
        return future.result()

    def write_all(self):
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while not self.waiting.empty() and len(batch) < 256:
                batch.append(self.waiting.get())
            jobs = [job for job in batch if job is not None]
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                results = [self.in_savepoint(job) for job, _ in jobs]
                self.connection.execute("COMMIT")
                self.version = self.connection.total_changes
            except sqlite3.Error as error:  # a full disk, a lock held too long: nobody is told "ok"
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                results = [(None, error)] * len(jobs)
            for (_, future), (value, error) in zip(jobs, results, strict=True):
                future.set_exception(error) if error else future.set_result(value)
            if None in batch:
                return

    def in_savepoint(self, job):
        self.connection.execute("SAVEPOINT job")
        try:
            result = (job(), None)
        except Exception as error:  # this request's alone; it is handed to who asked
            if not self.connection.in_transaction:  # a full disk: SQLite dropped the whole batch
                raise
            self.connection.execute("ROLLBACK TO job")
            result = (None, error)
        self.connection.execute("RELEASE job")
        return result

    @contextlib.contextmanager
    def reading(self):
        try:
            connection = self.readers.get_nowait()
        except queue.Empty:
            connection = self.connect()
        yield connection
        self.readers.put(connection)

    def read(self, sql, *args):
        with self.reading() as connection:
            return connection.execute(sql, args).fetchall()

    # ---- users and budget

    def seed_users(self, users):
        """Stores [(sunet_id, key)]; a store that has other users is refused."""
        def seed(c):
            known = c.execute("SELECT sunet_id, key FROM users ORDER BY id").fetchall()
            if known and users is not None and [tuple(row) for row in known] != users:
                raise ValueError(f"--users must be those that {self.path} was made with, got "
                                 "others; leave it out or give another --db")
            if not known:
                c.executemany("INSERT INTO users (sunet_id, key) VALUES (?, ?)",
                              users or [("student", API_KEY)])
            return [(row["id"], row["sunet_id"], row["key"])
                    for row in c.execute("SELECT * FROM users ORDER BY id")]

        return self.write(seed)

    def budget(self, user, connection=None):
        """{"used_seconds", "remaining_seconds", "total_budget_seconds"}: a queued or running
        experiment counts with all it may use, an ended one with what it used, 1 s at least."""
        if connection is None:
            before = self.version  # read first: a commit meanwhile makes what is kept stale
            kept, budget = self.budgets.get(user, (None, None))
            if kept != before:
                with self.reading() as connection:
                    budget = self.budget(user, connection)
                self.budgets[user] = (before, budget)
            return budget
        (used,), = connection.execute(
            "SELECT COALESCE(SUM(CASE WHEN state IN ('queued', 'running') THEN max_runtime "
            f"ELSE {CHARGED} END), 0.0) FROM experiments WHERE user = ?", (user,))
        return {"used_seconds": used, "remaining_seconds": self.budget_s - used,
                "total_budget_seconds": self.budget_s}

    def log(self, c, experiment, log_type, **more):
        c.execute("INSERT INTO events (experiment, at, entry) VALUES (?, ?, ?)",
                  (experiment, utc_now(), json.dumps({"log_type": log_type, **more})))

    # ---- an experiment's life: queued, running, then completed or failed

    def submit(self, c, user, config):
        budget, limit = self.budget(user, c), config["max_runtime_seconds"]
        if limit > budget["remaining_seconds"]:
            raise TrainingAPIError(400, {"detail": {"message": "insufficient budget",
                                                    "budget_summary": budget}})
        row = (user, config_id(config), json.dumps(config), limit, "queued", utc_now())
        try:
            cursor = c.execute("INSERT INTO experiments (user, unique_id, config, max_runtime, "
                               "state, queued_at) VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise TrainingAPIError(409, {"detail": "experiment already exists for this training "
                                                   "config"}) from None
        self.log(c, cursor.lastrowid, "queued")
        self.queued.set()
        return {"experiment_id": cursor.lastrowid, "budget_summary": self.budget(user, c)}

    def select_for_dispatch(self, c, max_concurrent_workers=100):
        """(rows to start, runs running, how many of the rows belong to users with none running),
        users with the fewest runs first: a queued experiment's place is its user's running count
        plus its rank among that user's queued ones, then its age. source: [1]"""
        running = collections.Counter(
            row["user"] for row in c.execute("SELECT user FROM experiments WHERE "
                                             "state = 'running'"))
        ahead, placed = collections.Counter(running), []
        for row in c.execute("SELECT * FROM experiments WHERE state = 'queued' "
                             "ORDER BY queued_at, id"):
            placed.append((ahead[row["user"]], row["queued_at"], row["id"], row))
            ahead[row["user"]] += 1
        total = sum(running.values())
        chosen = sorted(placed, key=lambda p: p[:3])[: max(max_concurrent_workers - total, 0)]
        return [p[3] for p in chosen], total, sum(p[0] == 0 for p in chosen)

    def dispatch(self, c, max_concurrent_workers, most=None):
        """Marks what may start now as running; returns [(id, run_id, config, attempt)]."""
        started = []
        for row in self.select_for_dispatch(c, max_concurrent_workers)[0][:most]:
            run_id = f"run-{row['id']}-{uuid.uuid4().hex[:12]}"
            c.execute("UPDATE experiments SET state = 'running', dispatched_at = ?, run_id = ?, "
                      "attempts = attempts + 1, val_losses = '[]' WHERE id = ?",
                      (utc_now(), run_id, row["id"]))
            self.log(c, row["id"], "dispatched", run_id=run_id)
            started.append((row["id"], run_id, json.loads(row["config"]), row["attempts"] + 1))
        return started

    def event(self, c, experiment, event):
        """Logs a worker's event; validation losses change the experiment if the run is its own."""
        if not c.execute("SELECT 1 FROM experiments WHERE id = ?", (experiment,)).fetchone():
            raise TrainingAPIError(404, {"detail": "experiment not found"})
        self.log(c, experiment, **event)
        if event["log_type"] == "validation_loss":
            c.execute("UPDATE experiments SET val_losses = ? WHERE id = ? AND state = 'running' "
                      "AND run_id = ?", (json.dumps(event["val_losses"]), experiment,
                                         event["run_id"]))

    def finish(self, c, experiment, result, run_id=None):
        """Ends a running experiment with a completed or failed payload; with `run_id`, only if it
        is still that run: a stale worker cannot end its successor."""
        row = c.execute("SELECT state, run_id FROM experiments WHERE id = ?",
                        (experiment,)).fetchone()
        if row is None:
            raise TrainingAPIError(404, {"detail": "experiment not found"})
        if row["state"] != "running" or run_id not in (None, row["run_id"]):
            raise TrainingAPIError(500, {"detail": "you can only report a finish if currrently "
                                                   "running"})
        state, reason = result["result_type"], result.get("reason")
        losses = result.get("val_losses", [])
        c.execute("UPDATE experiments SET state = ?, used = ?, val_losses = ?, reason = ?, "
                  "ended_at = ? WHERE id = ?",
                  (state, result["used_runtime_seconds"], json.dumps(losses),
                   reason and json.dumps(reason), utc_now(), experiment))
        self.log(c, experiment, state, **({"reason": reason} if reason else {}))

    def recover(self, c):
        """Puts back in the queue what ran when the last server died: same id, same place, the same
        reservation, nothing charged for the lost attempt. After MAX_ATTEMPTS attempts it is failed
        instead and charged the minimum. Returns (requeued, failed)."""
        counts = [0, 0]
        for row in c.execute("SELECT * FROM experiments WHERE state = 'running'").fetchall():
            self.log(c, row["id"], "preempted", run_id=row["run_id"])
            lost = row["attempts"] >= MAX_ATTEMPTS
            counts[lost] += 1
            if lost:
                failure = f"ServerLost: the server ended in each of {row['attempts']} attempts"
                self.finish(c, row["id"], failed(0.0, failure=failure))
            else:
                c.execute("UPDATE experiments SET state = 'queued', dispatched_at = NULL, "
                          "run_id = NULL, val_losses = '[]' WHERE id = ?", (row["id"],))
        return tuple(counts)


def failed(used_s, partial_val_losses=None, failure=None):
    """The payload of a failed run: out of time, or for `failure`."""
    reason = ({"failure": failure, "reason": "unexpected"} if failure else
              {"partial_val_losses": partial_val_losses, "reason": "timeout"})
    return {"result_type": "failed", "used_runtime_seconds": used_s, "reason": reason}


def experiment_to_wire(row):
    """The JSON text of one experiment, keys in the contract's order."""
    state, parts = row["state"], [("queued_at", json.dumps(row["queued_at"]))]
    if state != "queued":
        parts += [(k, json.dumps(row[k])) for k in ("dispatched_at", "run_id")]
    if state in ("completed", "failed"):
        used = math.nan if row["used"] is None else row["used"]
        parts.append(("used_runtime_seconds", wire_number(used)))
    if state == "failed":
        parts.append(("reason", stored_to_wire(row["reason"])))
        parts.append(("failed_at", json.dumps(row["ended_at"])))
    elif state != "queued":
        parts.append(("val_losses", stored_to_wire(row["val_losses"])))
    if state == "completed":
        parts.append(("completed_at", json.dumps(row["ended_at"])))
    parts.append(("status_type", json.dumps(state)))
    status = ",".join(f'"{k}":{v}' for k, v in parts)
    return (f'{{"experiment_id":{row["id"]},"training_config":{stored_to_wire(row["config"])},'
            f'"status":{{{status}}}}}')


# -------------------------------------------------------------------------------------------------
# the training API: HTTP

CORS_ORIGINS = ("null", "http://localhost:8000", "http://127.0.0.1:8000", "http://localhost:8080",
                "http://127.0.0.1:8080", "http://hyperturing.stanford.edu:8000",
                "http://172.24.75.170:8000")
CORS_METHODS = ("GET", "POST", "OPTIONS")
CORS_HEADERS = ("Accept", "Accept-Language", "Content-Language", "Content-Type", "X-API-Key")
JSON_TYPE = "application/json"
TEXT_TYPE, HTML_TYPE = "text/plain; charset=utf-8", "text/html; charset=utf-8"


class TrainingAPIServer(http.server.ThreadingHTTPServer):
    """The contract [1] on standard library threads; `store` holds all state."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address, store, users=None, internal_key=None):
        self.store, self.internal_key = store, internal_key
        self.users = store.seed_users(users)
        self.digests = [(user, hashlib.sha256(key.encode()).digest())
                        for user, _, key in self.users]
        try:
            super().__init__(address, TrainingAPIHandler)
        except OSError as error:
            raise ValueError(f"the address must be free, got {address[0]}:{address[1]} "
                             f"({error.strerror}); give another --port") from None

    def user_of(self, key):
        """The user with this key, compared in constant time with every key there is."""
        found, digest = None, hashlib.sha256(key.encode("latin-1", "replace")).digest()
        for user, known in self.digests:
            if hmac.compare_digest(known, digest):
                found = user
        return found

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1],
                          (ConnectionError, TimeoutError)):  # a client that hangs up is no error
            super().handle_error(request, client_address)


class TrainingAPIHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 75  # seconds that a connection may idle
    routes = {
        r"/submit": {"POST": "submit"}, r"/experiments": {"GET": "list_experiments"},
        r"/experiment/([^/]+)": {"GET": "get_experiment"}, r"/budget": {"GET": "get_budget"},
        r"/final_submission": {"POST": "save_final", "GET": "get_final"},
        r"/dashboard": {"GET": "dashboard"}, r"/openapi\.json": {"GET": "openapi"},
        r"/docs": {"GET": "docs"}, r"/redoc": {"GET": "docs"},
        r"/internal/worker/([^/]+)/event": {"POST": "worker_event"},
        r"/internal/worker/([^/]+)/finish": {"POST": "worker_finish"},
    }

    def answer(self):
        """Every method: reads the body, finds the route, sends what it returns."""
        request_id = self.headers.get("X-Request-ID") or uuid.uuid4().hex
        extra = [("X-Request-ID", request_id), ("vary", "Origin")]
        if (origin := self.headers.get("Origin")) in CORS_ORIGINS:
            extra.append(("access-control-allow-origin", origin))
        try:
            self.body = self.read_body()
            if self.command == "OPTIONS" and origin and self.headers.get(
                    "Access-Control-Request-Method"):
                return self.preflight(origin, request_id)
            status, content_type, text = self.route()
        except TrainingAPIError as error:
            status, content_type, text = error.status, JSON_TYPE, error.body
            extra += error.headers
            text = "" if text is None else self.error_text(text)
        except (ConnectionError, TimeoutError):  # the client went away or sends nothing
            self.close_connection = True
            return
        except Exception:
            traceback.print_exc()
            text = None
        if text is None:
            return self.send(500, TEXT_TYPE, b"Internal Server Error", [])
        self.send(status, content_type, text.encode(), extra)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_TRACE = answer

    def error_text(self, body):
        """JSON of an error; None where it cannot be written (NaN, bytes that are no text): 500."""
        try:
            text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                              default=bytes.decode)
            return text if text.encode() else None
        except (ValueError, RecursionError):
            return None

    def send(self, status, content_type, body, headers):
        self.send_response_only(status)
        self.send_header("date", self.date_time_string())
        if body or content_type or status not in (204,):
            self.send_header("content-length", str(len(body)))
        if body and content_type:
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
        self.send(code, TEXT_TYPE, b"Invalid HTTP request received.", [])

    def log_message(self, *args):
        pass

    def read_body(self):
        """The body's bytes. A length that is missing, wrong or over the limit is refused and the
        connection closed, since what follows on it cannot be told from the body."""
        length = self.headers.get("Content-Length", "0")
        self.close_connection |= (broken := "Transfer-Encoding" in self.headers)
        if broken:
            raise TrainingAPIError(411, {"detail": "Length Required"})
        if not re.fullmatch("[0-9]{1,18}", length) or int(length) > API_BODY_LIMIT:
            self.close_connection = True
            raise TrainingAPIError(413, {"detail": f"body must have at most {API_BODY_LIMIT} bytes"
                                         })
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client hung up")
        return body

    def preflight(self, origin, request_id):
        asked = self.headers.get("Access-Control-Request-Headers", "").split(",")
        wrong = [name for name, bad in (
            ("origin", origin not in CORS_ORIGINS),
            ("method", self.headers["Access-Control-Request-Method"] not in CORS_METHODS),
            ("headers", any(h.strip().lower() not in {a.lower() for a in CORS_HEADERS}
                            for h in asked if h.strip()))) if bad]
        headers = [("vary", "Origin"), ("access-control-allow-methods", ", ".join(CORS_METHODS)),
                   ("access-control-max-age", "600"),
                   ("access-control-allow-headers", ", ".join(CORS_HEADERS)),
                   ("X-Request-ID", request_id)]
        if origin in CORS_ORIGINS:
            headers.append(("access-control-allow-origin", origin))
        if self.headers.get("Access-Control-Request-Private-Network") == "true":
            headers.append(("access-control-allow-private-network", "true"))
        text = f"Disallowed CORS {', '.join(wrong)}" if wrong else "OK"
        self.send(400 if wrong else 200, TEXT_TYPE, text.encode(), headers)

    def route(self):
        """(status, content type, text) of the route that path and method name."""
        target = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(target.path)

        def find(path):
            return next(((m, found) for pattern, m in self.routes.items()
                         if (found := re.fullmatch(pattern, path))), (None, None))

        methods, found = find(path)
        if methods is None:
            if path.endswith("/") and find(path.rstrip("/"))[0]:
                query = f"?{target.query}" if target.query else ""
                host = self.headers.get("Host", "{}:{}".format(*self.server.server_address[:2]))
                place = urllib.parse.quote(path.rstrip("/"))
                raise TrainingAPIError(307, None,
                                       [("location", f"http://{host}{place}{query}")])
            raise TrainingAPIError(404, {"detail": "Not Found"})
        if self.command not in methods:
            raise TrainingAPIError(405, {"detail": "Method Not Allowed"},
                                   [("allow", next(iter(methods)))])
        return getattr(self, methods[self.command])(*found.groups())

    # ---- checks, in the contract's order: JSON, key, schema

    def json_body(self):
        """The parsed body; REQUIRED where there is none, bytes where its type is not JSON."""
        if not self.body:
            return REQUIRED
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        if not re.fullmatch(r"application/([^/]+\+)?json", kind):
            return self.body
        try:
            return json.loads(self.body)
        except json.JSONDecodeError as error:
            raise TrainingAPIError(422, {"detail": [
                {"type": "json_invalid", "loc": ["body", error.pos], "msg": "JSON decode error",
                 "input": {}, "ctx": {"error": error.msg}}]}) from None
        except (ValueError, RecursionError):
            raise TrainingAPIError(400, {"detail": "There was an error parsing the body"}
                                   ) from None

    def user(self):
        key = self.headers.get("X-API-Key")
        if not key:
            raise TrainingAPIError(401, {"detail": "missing X-API-Key"})
        user = self.server.user_of(key)
        if user is None:
            raise TrainingAPIError(401, {"detail": "invalid API key"})
        return user

    def parsed(self, parser, value, errors=()):
        errors = list(errors)
        if value is REQUIRED:
            refuse(errors, "missing", ("body",), "Field required", None)
        else:
            value = parser(value, ("body",), errors)
        if errors:
            raise TrainingAPIError(422, {"detail": errors})
        return value

    # ---- routes

    def submit(self):
        value = self.json_body()
        user = self.user()
        config = self.parsed(parse_config, value)
        return 200, JSON_TYPE, to_wire(self.server.store.write(self.server.store.submit, user,
                                                               config))

    def list_experiments(self):
        rows = self.server.store.read("SELECT * FROM experiments WHERE user = ? "
                                      "ORDER BY queued_at, id DESC", self.user())
        return 200, JSON_TYPE, "[" + ",".join(map(experiment_to_wire, rows)) + "]"

    def get_experiment(self, text):
        user, errors = self.user(), []
        number = parse_integer(text, ("path", "experiment_id"), errors)
        if errors:
            raise TrainingAPIError(422, {"detail": errors})
        rows = self.server.store.read("SELECT * FROM experiments WHERE user = ? AND id = ?", user,
                                      number)
        if not rows:
            raise TrainingAPIError(404, {"detail": "not found"})
        return 200, JSON_TYPE, experiment_to_wire(rows[0])

    def get_budget(self):
        return 200, JSON_TYPE, to_wire(self.server.store.budget(self.user()))

    def save_final(self):
        value = self.json_body()
        user = self.user()
        final = self.parsed(parse_final, value)
        self.server.store.write(lambda c: c.execute(
            "INSERT OR REPLACE INTO final_submissions VALUES (?, ?, ?, ?)",
            (user, json.dumps(final["training_config"]), final["predicted_final_loss"],
             utc_now())))
        return self.get_final()

    def get_final(self):
        rows = self.server.store.read("SELECT * FROM final_submissions WHERE user = ?",
                                      self.user())
        text = "null" if not rows else (
            f'{{"training_config":{stored_to_wire(rows[0]["config"])},"predicted_final_loss":'
            f'{wire_number(rows[0]["loss"])},"submitted_at":"{rows[0]["submitted_at"]}"}}')
        return 200, JSON_TYPE, text

    def worker(self, text, parser):
        """(id, payload) of a worker's report, once key, path and body are right."""
        value, key = self.json_body(), self.server.internal_key
        given = self.headers.get("X-Internal-Key", "")
        if not key or not hmac.compare_digest(given.encode(), key.encode()):
            raise TrainingAPIError(401, {"detail": "invalid internal key"})
        errors = []
        number = parse_integer(text, ("path", "experiment_id"), errors, gt=0)
        if errors:
            errors[0]["input"] = text
        return number, self.parsed(parser, value, errors)

    def worker_event(self, text):
        self.server.store.write(self.server.store.event, *self.worker(text, parse_event))
        return 204, None, ""

    def worker_finish(self, text):
        self.server.store.write(self.server.store.finish, *self.worker(text, parse_finish))
        return 204, None, ""

    def dashboard(self):
        return 200, HTML_TYPE, DASHBOARD

    def openapi(self):
        shown = [p for p in self.routes if re.match(r"/(submit|experiment|budget|final)", p)]
        paths = {p.replace("([^/]+)", "{experiment_id}"): {
            method.lower(): {"summary": name.replace("_", " ").capitalize(), "responses": {
                "200": {"description": "Successful Response"}}}
            for method, name in self.routes[p].items()} for p in shown}
        return 200, JSON_TYPE, to_wire({
            "openapi": "3.1.0", "info": {"title": "CS336 Assignment 3 Backend",
                                         "version": "0.1.0"}, "paths": paths})

    def docs(self):
        lines = "".join(f"<li><code>{' '.join(methods)} {pattern}</code>"
                        for pattern, methods in self.routes.items() if "internal" not in pattern)
        return 200, HTML_TYPE, ("<!doctype html><title>CS336 Assignment 3 Backend</title><h1>CS336 "
                                f"Assignment 3 Backend</h1><ul>{lines}</ul>")


# -------------------------------------------------------------------------------------------------
# the training API: back ends


def api_model_config(config):
    """model.py's ModelConfig of a parsed training config: QK-norm, SwiGLU, RoPE, pre-norm [1]."""
    a = config["architecture_config"]
    return lm.ModelConfig(
        vocab_size=a["vocab_size"], context_length=SEQ_LEN, d_model=a["hidden_size"],
        num_layers=a["num_hidden_layers"], num_heads=a["num_attention_heads"],
        num_kv_heads=a["num_key_value_heads"], d_head=a["head_dim"], d_ff=a["intermediate_size"],
        rope_theta=a["rope_theta"], norm_eps=a["rms_norm_eps"], qkv_bias=a["attention_bias"],
        tie_embeddings=a["tie_word_embeddings"], qk_norm=True)


def api_parameters(config):
    """(parameters of the blocks and norms, all parameters with embeddings and head)."""
    parts = lm.count_parameters(api_model_config(config))
    return parts["attention"] + parts["feed-forward"] + parts["norms"], sum(parts.values())


def api_hard_limit(max_runtime_s):
    """Seconds after which a run is ended in the middle of a chunk too. source: [1]"""
    return 1.05 * max_runtime_s + 10


class TrainingAPILaw:
    """A loss surface: N non-embedding parameters, D training tokens, b tokens a step,
    L = E + (A / N^alpha + B / D^beta) (1 + 0.05 ln^2(lr / lr*) + 0.02 ln^2(b / b*)).

    lr* = 1.79 N^-0.713 D^0.307 and b* = 0.58 D^0.571 tokens a step [3]. Seed 0 has the refitted
    Chinchilla constants [2], any other seed a random surface whose best D / N at 1e18 FLOPs lies
    between 8 and 40. A measured loss is exp(noise * z) times that, z from N(0, 1) by seed and
    config: the same run gives the same losses. A run lasts 6 N D / flops_per_s simulated seconds.
    """

    def __init__(self, seed=0, noise=0.002, flops_per_s=4e14):
        self.seed, self.noise, self.flops_per_s = seed, noise, flops_per_s
        if seed == 0:
            self.E, self.A, self.B, self.alpha, self.beta = 1.81722, 477.83, 2143.4, .34731, .36717
            return
        rng = np.random.default_rng(seed)
        self.E = rng.uniform(1.5, 2.2)
        self.alpha, self.beta = rng.uniform(0.28, 0.42, 2)
        ratio, part = math.exp(rng.uniform(math.log(8), math.log(40))), rng.uniform(0.4, 0.9)
        N = math.sqrt(1e18 / (6 * ratio))
        self.A = part * N**self.alpha  # at the optimum alpha A / N^alpha = beta B / D^beta
        self.B = part * self.alpha / self.beta * (ratio * N) ** self.beta

    def loss(self, N, D, lr=None, batch_tokens=None):
        """Loss without noise; lr and batch_tokens None for the best ones."""
        best_lr, best_batch = 1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571
        off = 0.05 * math.log((lr or best_lr) / best_lr) ** 2
        off += 0.02 * math.log((batch_tokens or best_batch) / best_batch) ** 2
        return self.E + (self.A / N**self.alpha + self.B / D**self.beta) * (1 + off)

    def optimum(self, flops):
        """(N, D, loss) of the lowest loss with 6 N D = flops. source: [2] equation 4"""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return N, flops / (6 * N), self.loss(N, flops / (6 * N))

    def run(self, config):
        """The payload that a run of this config ends with, with the contract's timeout rule."""
        N, _ = api_parameters(config)
        n, tokens = config["n_evals"], config["total_train_tokens"]
        lr = config["optimizer_config"]["lr_scheduler"]["peak_value"]
        batch_tokens = SEQ_LEN * config["train_batch_size"]
        z = np.random.default_rng([self.seed, int(config_id(config), 16)]).standard_normal(n)
        chunk_s, losses = 6 * N * tokens / self.flops_per_s / n, []
        limit = config["max_runtime_seconds"]
        for i in range(n):
            if i * chunk_s > limit:
                return failed(i * chunk_s, losses)
            if (i + 1) * chunk_s > api_hard_limit(limit):
                return failed(api_hard_limit(limit), losses)
            loss = self.loss(N, tokens * (i + 1) / n, lr, batch_tokens)
            losses.append(float(loss * math.exp(self.noise * z[i])))
        if n * chunk_s > limit:
            return failed(n * chunk_s, losses)
        return {"result_type": "completed", "used_runtime_seconds": n * chunk_s,
                "val_losses": losses}

    def describe(self):
        return (f"law: L = {self.E:.5f} + {self.A:.2f} / N^{self.alpha:.5f} + {self.B:.1f} / "
                f"D^{self.beta:.5f}, noise {self.noise:g}, {self.flops_per_s:.3g} FLOP/s")


class TrainingAPIAdamW(lm.AdamW):
    """model.py's AdamW with optax's eps_root: sqrt(v_hat + eps_root) + eps in the denominator. At
    the contract's 1e-8 it outweighs v where gradients are below 1e-4: it cannot be left out."""

    eps_root = 0.0

    def _update(self, params, t, group):
        if not self.eps_root:
            return super()._update(params, t, group)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        grads = [p.grad for p in params]
        m, v = ([self.state[p][name] for p in params] for name in "mv")
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        denominator = torch._foreach_div(v, 1 - beta2**t)
        torch._foreach_add_(denominator, self.eps_root)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, m, denominator, -lr / (1 - beta1**t))


class TrainingAPIRun:
    """One real training run of a parsed config; `run` is the loop."""

    def __init__(self, config, train_ids, valid_ids, vocab_size, device, val_tokens, report):
        self.config, self.device, self.report = config, device, report
        self.train_ids, self.valid_ids, self.val_tokens = train_ids, valid_ids, val_tokens
        shape = api_model_config(config)
        if shape.vocab_size < vocab_size:
            raise ValueError(f"vocab_size must be at least {vocab_size}, which the server's "
                             f"tokenizer has, got {shape.vocab_size}; raise it")
        if config["total_train_tokens"] >= len(train_ids):
            raise ValueError(f"total_train_tokens must be below {len(train_ids)}, which the "
                             "server's text has (no token is trained on twice), got "
                             f"{config['total_train_tokens']}; lower it")
        self.dtype = torch.float32  # bfloat16 is emulated elsewhere: slower than float32
        if device.type == "cuda":
            self.dtype, _ = lm.resolve_dtype(config["architecture_config"]["dtype"], device)
        torch.manual_seed(config["model_seed"])
        self.model = lm.TransformerLM(shape).to(device)
        o, params = config["optimizer_config"], list(self.model.parameters())
        self.optimizer = None
        if "beta1" in o:
            self.optimizer = TrainingAPIAdamW(params, 0.0, (o["beta1"], o["beta2"]), o["eps"],
                                              o["weight_decay"])  # decays all, as the contract
            self.optimizer.eps_root = o["eps_root"]
        self.steps = config["total_train_tokens"] // (SEQ_LEN * config["train_batch_size"])
        fits = lm.largest_batch(shape, 0.8 * lm.free_memory(device), dtype=self.dtype,
                                device_type=device.type)
        most = 8 if device.type == "cpu" else fits  # more does not stay in a CPU's cache
        self.micro_batch = max(1, min(config["train_batch_size"], most, fits))

    def sequences(self, step):
        """The token windows (B, SEQ_LEN + 1) of a step: the data in order, SEQ_LEN at a time,
        shuffled within chunks of 2,048 sequences by the chunk's number. source: [1]"""
        whole, size = (len(self.train_ids) - 1) // SEQ_LEN, 2048
        batch = self.config["train_batch_size"]
        place = np.arange(step * batch, (step + 1) * batch)
        starts = np.empty_like(place)
        for chunk in np.unique(place // size):
            order = np.random.default_rng(chunk).permutation(min(size, whole - chunk * size))
            inside = place // size == chunk
            starts[inside] = (chunk * size + order[place[inside] % size]) * SEQ_LEN
        windows = self.train_ids[starts[:, None] + np.arange(SEQ_LEN + 1)]
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
            (loss / (len(windows) * SEQ_LEN)).backward()
        params = list(self.model.parameters())
        clip = self.config["optimizer_config"]["grad_clip_norm"]
        if clip is not None:
            lm.clip_grad_norm_(params, clip)
        lr = self.learning_rate(step)
        if self.optimizer is None:  # SGD
            with torch.no_grad():
                torch._foreach_add_(params, [p.grad for p in params], alpha=-lr)
            return
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def run(self):
        """The payload the run ends with. The clock runs from the first step and is read before
        each of the n_evals chunks and at the end, as the contract says."""
        n, limit, losses = self.config["n_evals"], self.config["max_runtime_seconds"], []
        started = time.perf_counter()
        self.report(kind="started")
        for chunk in range(n):
            if (used := time.perf_counter() - started) > limit:
                return failed(used, losses)
            for step in range(chunk * self.steps // n, (chunk + 1) * self.steps // n):
                self.train_step(step)
            losses.append(lm.evaluate(  # waits for the device
                self.model.hidden_states, self.model, self.valid_ids, self.val_tokens,
                min(self.config["val_batch_size"], self.micro_batch), self.device, self.dtype))
            self.report(kind="val_losses", val_losses=losses)
        used = time.perf_counter() - started
        if used > limit:
            return failed(used, losses)
        return {"result_type": "completed", "used_runtime_seconds": used, "val_losses": losses}


def api_worker(link, data, device_name, val_tokens):
    """The process of one device: takes configs from `link` as JSON, answers with what happens."""
    def report(**message):
        link.send_bytes(json.dumps(message).encode())

    def end_with_the_server():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_server, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business
    device = lm.resolve_device(device_name)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # said before
        train_ids, valid_ids, tokenizer, _ = bpe.prepare_data(**data)
    vocab_size = tokenizer.vocab_size if tokenizer else data["vocab_size"]
    report(kind="ready")
    while True:
        config = json.loads(link.recv_bytes())
        try:
            run = TrainingAPIRun(config, train_ids, valid_ids, vocab_size, device, val_tokens,
                                 report)
            result = run.run()
        except Exception as error:  # whatever it is, it is this run's and is reported
            text = " ".join(str(error).split())[:500]
            result = failed(0.0, failure=f"{type(error).__name__}: {text}")
        run = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report(kind="result", result=result)


class TrainingAPIBackEnd(threading.Thread):
    """Takes experiments from the store and ends them. `store` operations that fail because the
    disk or the file is busy are tried again: a run's result is not lost to a full disk."""

    def __init__(self, store):
        super().__init__(daemon=True)
        self.store, self.stopping = store, threading.Event()

    def write(self, function, *args):
        while True:
            try:
                return self.store.write(function, *args)
            except TrainingAPIError:  # ended by someone else: nothing is left to do
                return None
            except sqlite3.Error as error:
                print(f"serve: {error}; trying again", file=sys.stderr)
                if self.stopping.wait(1):
                    return None

    def run(self):
        while not self.stopping.is_set():
            if not self.work():
                self.store.queued.wait(0.2)
                self.store.queued.clear()

    def stop(self):
        self.stopping.set()
        self.store.queued.set()
        self.join(5)


class TrainingAPILawBackEnd(TrainingAPIBackEnd):
    """Ends every queued experiment at once with what the law says."""

    def __init__(self, store, law):
        super().__init__(store)
        self.law = law

    def result(self, config):
        try:
            return self.law.run(config)
        except (ValueError, OverflowError) as error:
            return failed(0.0, failure=f"{type(error).__name__}: {error}")

    def work(self):
        started = self.write(self.store.dispatch, 100) or []
        ends = [(number, self.result(config), run_id) for number, run_id, config, _ in started]
        if ends:
            self.write(lambda c: [self.store.finish(c, *end) for end in ends])
        return started


class TrainingAPITrainBackEnd(TrainingAPIBackEnd):
    """One device: a worker process that trains, started again when it dies."""

    def __init__(self, store, devices, device, data, val_tokens):
        super().__init__(store)
        self.devices, self.device = devices, device
        self.settings, self.process = (data, device, val_tokens), None

    def start_worker(self):
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=api_worker, args=(theirs, *self.settings),
                                       daemon=True)
        self.process.start()
        theirs.close()
        while not self.link.poll(0.5):
            if self.stopping.is_set():
                return
        self.link.recv_bytes()  # ready; EOFError if it died

    def work(self):
        if self.process is None or not self.process.is_alive():
            try:
                self.start_worker()
            except (EOFError, OSError):
                self.process.join()
                print(f"serve: the worker of {self.device} ended at its start, exit code "
                      f"{self.process.exitcode}; trying again in 10 s", file=sys.stderr)
                self.stopping.wait(10)
                return True
            if self.stopping.is_set():
                return True
        started = self.write(self.store.dispatch, self.devices, 1)
        if started:
            number, run_id, config, _ = started[0]
            result = self.follow(number, run_id, config)
            if result:
                self.write(self.store.finish, number, result, run_id)
        return started

    def follow(self, number, run_id, config):
        """The payload a run ends with; None when the server stops first. A worker that dies is a
        failed run; one that runs 10 s and 5% over its time is ended."""
        limit, began, partial = config["max_runtime_seconds"], None, []
        told, setup = time.perf_counter(), time.perf_counter()
        self.link.send_bytes(json.dumps(config).encode())
        while not self.stopping.is_set():
            now = time.perf_counter()
            used = now - began if began else 0.0
            if began and now - told >= 60:
                told = now
                self.write(self.store.event, number, {
                    "log_type": "run_heartbeat", "run_id": run_id, "elapsed_seconds": used})
            if used > api_hard_limit(limit) or (not began and now - setup > 1800):
                self.process.kill()
                self.process.join()
                return failed(used, partial) if began else failed(
                    0.0, failure="SetupError: no first step within 1800 s")
            if not self.link.poll(0.2):
                continue
            try:
                message = json.loads(self.link.recv_bytes())
            except (EOFError, OSError):
                self.process.join()
                return failed(used, failure="WorkerCrash: the worker process ended with exit "
                                            f"code {self.process.exitcode}")
            if message["kind"] == "started":
                began = time.perf_counter()
                self.write(self.store.event, number, {
                    "log_type": "run_started", "run_id": run_id, "wandb_path": None})
            elif message["kind"] == "val_losses":
                partial = message["val_losses"]
                self.write(self.store.event, number, {
                    "log_type": "validation_loss", "run_id": run_id, "val_losses": partial})
            elif message["kind"] == "result":
                result = message["result"]
                if result.get("reason", {}).get("reason") == "unexpected" and began:
                    result["used_runtime_seconds"] = used
                return result

    def stop(self):
        super().stop()
        if self.process is not None:
            self.process.kill()


# -------------------------------------------------------------------------------------------------
# the training API: dashboard. Text reaches the page through textContent only.

DASHBOARD = r"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<title>Scaling Experiments Dashboard</title><style>
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f24;--dim:#5d6672;--line:#dde1e7;
--blue:#2563c9;--green:#1a7f45;--amber:#9a6200;--red:#c0322b}
@media(prefers-color-scheme:dark){:root{--bg:#111418;--card:#1a1f26;--ink:#e8ebef;--dim:#9aa4b1;
--line:#2d343e;--blue:#6ea8ff;--green:#4cc07d;--amber:#e0a63a;--red:#ff7b72}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1200px;padding:16px;background:var(--bg);
color:var(--ink);font:15px/1.45 system-ui,sans-serif}h1{font-size:20px;margin:0}
header,.row{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-bottom:12px}
header h1{flex:1 1 auto}input,select,button,textarea{font:inherit;color:inherit;
background:var(--card);border:1px solid var(--line);border-radius:6px;padding:6px 9px;min-width:0}
button{cursor:pointer}
button.main{background:var(--blue);border-color:var(--blue);color:var(--bg)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px}
.card small{color:var(--dim);display:block}.card b{font-size:20px}
.bar{height:8px;background:var(--line);border-radius:4px;overflow:hidden;margin-top:6px}
.bar i{display:block;height:100%}#note{min-height:1.5em;color:var(--dim)}
.bad{color:var(--red)!important}
.wide{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;width:100%;background:var(--card)}
th,td{text-align:left;padding:7px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:600}tbody tr{cursor:pointer}tbody tr:hover,tbody tr:focus{
outline:2px solid var(--blue);outline-offset:-2px}
.pill{border:1px solid;border-radius:9px;padding:0 8px;
font-size:13px}.completed{color:var(--green)}.failed{color:var(--red)}.running{color:var(--blue)}
.queued{color:var(--amber)}svg{display:block;width:100%}.spark{width:90px;height:22px}
dialog{width:min(760px,94vw);border:1px solid var(--line);border-radius:10px;background:var(--card);
color:var(--ink)}pre,textarea{font:12px/1.4 ui-monospace,monospace;width:100%;overflow:auto;
max-height:45vh}textarea{height:45vh}dl{display:grid;grid-template-columns:auto 1fr;gap:2px 14px}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:640px){.far{display:none}th,td{padding:7px 5px}header input{flex:1 1 40%}}
</style><header><h1>Scaling Experiments Dashboard</h1>
<input id="apiUrl" aria-label="API URL" placeholder="API URL" size="22">
<input id="apiKey" aria-label="API key" placeholder="API key" type="password" size="10">
<label><input id="autoRefresh" type="checkbox" checked> live</label>
<button id="refresh">Refresh (R)</button><button class="main" id="new">Submit</button></header>
<div class="cards" id="cards"></div><div id="note" role="status"></div>
<div class="row"><input id="search" aria-label="search" placeholder="search"><select id="status"
aria-label="status"><option value="">all states<option>queued<option>running<option>completed
<option>failed</select><select id="sort" aria-label="sort"><option>id-desc<option>id-asc
<option>loss-asc<option>runtime-desc</select></div>
<div class="wide"><table><thead><tr><th>ID<th>Status<th class="far">Model<th class="far">Tokens
<th>Progress<th>Loss<th class="far">Runtime<th class="far">Trend</thead>
<tbody id="rows"></tbody></table>
</div><dialog id="detail"></dialog><dialog id="submit"><h3>Submit a training config</h3>
<textarea id="json" spellcheck="false" aria-label="config"></textarea>
<p id="answer"></p><div class="row">
<button class="main" id="send">Submit</button><button id="example">Load example</button>
<button id="format">Format</button>
<button onclick="this.closest('dialog').close()">Close (Esc)</button>
</div></dialog><script>
"use strict";const $=i=>document.getElementById(i),S="http://www.w3.org/2000/svg";
let all=[],timer,busy=0;
const saved=["apiUrl","apiKey","autoRefresh","search","status","sort"];let logScale=false;
const EXAMPLE={architecture_config:{attention_bias:false,head_dim:64,hidden_size:448,
intermediate_size:
1280,num_attention_heads:7,num_hidden_layers:9,num_key_value_heads:7,rms_norm_eps:1e-6,
rope_theta:1000000,
tie_word_embeddings:false,dtype:"bfloat16",vocab_size:32000},optimizer_config:{weight_decay:0.01},
train_batch_size:128,val_batch_size:32,n_evals:16,total_train_tokens:8388608,
max_runtime_seconds:60,
model_seed:0};
function el(tag,text,cls,ns){const e=ns?document.createElementNS(ns,tag):document.createElement(
tag);
if(text!=null)e.textContent=text;if(cls)e.setAttribute("class",cls);return e}
function load(){for(const k of saved){const v=localStorage.getItem("expdash."+k);if(v!==null){
if($(k).type=="checkbox")$(k).checked=v=="true";else $(k).value=v}}
logScale=localStorage.getItem("expdash.logScale")=="true"}
function save(){for(const k of saved)localStorage.setItem("expdash."+k,$(k).type=="checkbox"?
$(k).checked:$(k).value)}
async function call(path,body){const r=await fetch(($("apiUrl").value.trim().replace(/\/+$/,
""))+path,{
method:body?"POST":"GET",headers:{"X-API-Key":$("apiKey").value.trim(),...(body?{"Content-Type":
"application/json"}:{})},body});const text=await r.text();if(!r.ok)throw Error(r.status+" "+text);
return text?JSON.parse(text):null}
const losses=e=>(e.status.val_losses||e.status.reason?.partial_val_losses||[]),
last=e=>losses(e).at(-1)??null,done=e=>e.status.status_type=="completed",
fix=(x,d=4)=>x==null?"-":x.toFixed(d),time=s=>s==null?"-":s<100?s.toFixed(1)+" s":s<7200?
(s/60).toFixed(1)+" min":(s/3600).toFixed(2)+" h",big=n=>n>=1e9?(n/1e9).toFixed(2)+"B":n>=1e6?
(n/1e6).toFixed(1)+"M":n>=1e3?(n/1e3).toFixed(0)+"K":n,model=e=>{
const a=e.training_config.architecture_config;
return a.hidden_size+"h · "+a.num_hidden_layers+"L · "+a.num_attention_heads+"H"};
function card(name,value,more,bar,colour){const c=el("div",null,"card");c.append(el("small",name),
el("b",value),el("small",more));if(bar!=null){const b=el("div",null,"bar"),i=el("i");
i.style.width=Math.max(0,Math.min(100,bar*100))+"%";i.style.background="var(--"+colour+")";
b.append(i);
c.append(b)}$("cards").append(c);return c}
function cards(budget,final){const by=s=>all.filter(e=>e.status.status_type==s).length;$("cards")
.replaceChildren();card("Experiments",all.length,by("queued")+by("running")+" active, "+by(
"completed")+
" done, "+by("failed")+" failed");const best=all.filter(e=>done(e)&&last(e)!=null).sort((a,
b)=>last(a)-
last(b))[0],c=card("Best final loss",best?fix(last(best)):"-",
best?"experiment "+best.experiment_id:
"no run is complete");if(best){c.style.cursor="pointer";c.onclick=()=>detail(best)}
const left=budget.remaining_seconds/budget.total_budget_seconds;card("Runtime used",
time(budget.used_seconds),"with reservations");card("Budget remaining",time(
budget.remaining_seconds),
(left*100).toFixed(1)+"% of "+time(budget.total_budget_seconds),left,
left<.1?"red":left<.3?"amber":"green");
card("Final submission",final?fix(final.predicted_final_loss):"-",final?"predicted loss, "+
final.submitted_at.slice(0,16):"none yet")}
function line(points,w,h,cls){const s=el("svg",null,cls,S);s.setAttribute("viewBox",
"0 0 "+w+" "+h);
s.setAttribute("preserveAspectRatio","none");const p=el("polyline",null,null,S);p.setAttribute(
"fill","none");
p.setAttribute("stroke","var(--blue)");p.setAttribute("stroke-width","2");p.setAttribute(
"vector-effect",
"non-scaling-stroke");const y=points.filter(Number.isFinite),lo=Math.min(...y),hi=Math.max(...y);
p.setAttribute("points",points.map((v,i)=>Number.isFinite(v)?(points.length<2?w/2:i/(
points.length-1)*
(w-4)+2)+","+(h-2-(v-lo)/((hi-lo)||1)*(h-4)):"").join(" "));s.append(p);return s}
function rows(){const q=$("search").value.toLowerCase(),st=$("status").value,key={"id-desc":e=>
-e.experiment_id,"id-asc":e=>e.experiment_id,"loss-asc":e=>last(e)??1e9,"runtime-desc":e=>
-(e.status.used_runtime_seconds??-1)}[$("sort").value];const list=all.filter(e=>(!st||
e.status.status_type==st)&&(!q||(JSON.stringify(e)+model(e)).toLowerCase().includes(q))).sort((a,
b)=>
key(a)-key(b));$("rows").replaceChildren(...list.slice(0,500).map(e=>{const tr=el("tr"),l=losses(
e),
n=e.training_config.n_evals,s=e.status.status_type;tr.tabIndex=0;const pill=el("td");pill.append(
el("span",s,"pill "+s));const p=el("td",l.length+"/"+n),b=el("div",null,"bar"),i=el("i");
i.style.width=
l.length/n*100+"%";i.style.background="var(--blue)";b.append(i);p.append(b);const t=el("td",null,
"far");
if(l.length)t.append(line(l,90,22,"spark"));tr.append(el("td",e.experiment_id),pill,el("td",model(
e),"far"),
el("td",big(e.training_config.total_train_tokens),"far"),p,el("td",fix(last(e))),el("td",
time(e.status.used_runtime_seconds),"far"),t);tr.onclick=()=>detail(e);tr.onkeydown=k=>{if(
k.key=="Enter")
detail(e)};return tr}));if(!list.length){const td=el("td",all.length?"nothing matches":
"no experiments yet: Submit starts one");td.colSpan=8;const tr=el("tr");tr.append(td);$(
"rows").append(tr)}}
function detail(e){const d=$("detail"),l=losses(e),dl=el("dl"),put=(k,v)=>dl.append(el("dt",k),el(
"dd",v));
put("status",e.status.status_type);put("model",model(e));put("tokens",big(e.training_config
.total_train_tokens));put("queued",e.status.queued_at);if(e.status.dispatched_at)put("started",
e.status.dispatched_at);if(e.status.used_runtime_seconds!=null)put("runtime",
time(e.status.used_runtime_seconds)+" of "+time(e.training_config.max_runtime_seconds));
if(e.status.reason)put("reason",e.status.reason.failure||e.status.reason.reason);
const chart=el("div"),at=el("p"," ");function draw(){chart.replaceChildren();if(!l.length)return;
const s=line(logScale?l.map(Math.log):l,600,180);s.style.height="180px";s.onmousemove=m=>{
const i=Math.round((m.offsetX/s.clientWidth)*(l.length-1));if(
l[i]!=null)at.textContent="evaluation "+(i+1)+
" of "+e.training_config.n_evals+": "+l[i].toFixed(4)};chart.append(s);at.textContent="last "+
fix(last(e))+", lowest "+fix(Math.min(...l.filter(Number.isFinite)))}draw();const r=el("div",null,
"row"),
add=(t,f)=>{const b=el("button",t);b.onclick=f;r.append(b)};add("Log y",()=>{logScale=!logScale;
localStorage.setItem("expdash.logScale",logScale);draw()});add("Use config",()=>{d.close();
$("json").value=JSON.stringify(e.training_config,null,1);$("submit").showModal()});add(
"Set as final",
async()=>{const x=parseFloat(prompt("Predicted final loss?",fix(last(e))));if(x>0)try{await call(
"/final_submission",JSON.stringify({training_config:e.training_config,predicted_final_loss:x}));
d.close();
refresh()}catch(err){at.textContent=err.message;at.className="bad"}});add("Close (Esc)",(
)=>d.close());
d.replaceChildren(el("h3","Experiment "+e.experiment_id),dl,chart,at,r,el("pre",JSON.stringify(e,
null,1)));
d.showModal()}
async function refresh(){if(busy)return;busy=1;save();try{const[b,l,f]=await Promise.all([call(
"/budget"),
call("/experiments"),call("/final_submission")]);all=l;cards(b,f);rows();$("note").className="";
$("note").textContent="refreshed "+new Date().toLocaleTimeString()}catch(err){$(
"note").className="bad";
$("note").textContent=$("apiKey").value?err.message:"give your API key above"}busy=0}
function tick(){clearInterval(timer);timer=setInterval(()=>{if($("autoRefresh").checked&&
!document.hidden)refresh()},all.some(e=>["queued","running"].includes(
e.status.status_type))?2000:10000)}
for(const k of["search","status","sort"])$(k).oninput=()=>{save();rows()};
for(const k of["apiUrl","apiKey","autoRefresh"])$(k).onchange=()=>refresh().then(tick);
$("refresh").onclick=refresh;$("new").onclick=()=>$("submit").showModal();
$("example").onclick=()=>$("json").value=JSON.stringify(EXAMPLE,null,1);
$("format").onclick=()=>{try{$("json").value=JSON.stringify(JSON.parse($("json").value),null,
1)}catch(e){
$("answer").textContent=e.message}};
$("send").onclick=async()=>{try{const a=await call("/submit",$("json").value);$(
"answer").className="";
$("answer").textContent="experiment "+a.experiment_id;refresh().then(tick)}catch(e){$(
"answer").className=
"bad";$("answer").textContent=e.message}};
document.onkeydown=e=>{if(e.key=="r"&&!e.ctrlKey&&!e.metaKey&&!/INPUT|TEXTAREA|SELECT/.test(
e.target.tagName))refresh()};
load();$("apiUrl").value=$("apiUrl").value||(location.protocol=="file:"?"http://127.0.0.1:8000":
location.origin);refresh().then(tick);</script></html>
"""


# -------------------------------------------------------------------------------------------------
# the training API: client


class TrainingAPIClient:
    """The six calls, with timeouts. Every call may be repeated: a submit whose answer was lost is
    refused by the server as a duplicate (409) if it had arrived, and is then looked up."""

    def __init__(self, url, key, attempts=7, timeout_s=30):
        import requests

        self.requests, self.url, self.attempts = requests, url.rstrip("/"), attempts
        self.timeout_s, self.session = timeout_s, requests.Session()
        self.session.headers["X-API-Key"] = key

    def call(self, method, path, body=None):
        """(status, parsed body, how often it was sent); ValueError when no answer comes."""
        for attempt in range(1, self.attempts + 1):
            try:
                response = self.session.request(method, self.url + path, json=body,
                                                timeout=(10, self.timeout_s))
                if response.status_code < 500 and response.status_code != 429:
                    return response.status_code, response.json(), attempt
                problem = f"{response.status_code} {response.text[:100]}"
            except (self.requests.ConnectionError, self.requests.Timeout) as error:
                problem = type(error).__name__
            except self.requests.RequestException as error:  # no such URL, or no JSON
                raise ValueError(f"the server at {self.url} must speak the training API, got "
                                 f"{type(error).__name__}; check --url") from None
            if attempt < self.attempts:
                time.sleep(min(10, 0.25 * 2**attempt))
        raise ValueError(f"the server at {self.url} must answer, got {problem} {self.attempts} "
                         "times; check --url, or try again later: nothing is submitted twice")

    def get(self, path):
        status, body, _ = self.call("GET", path)
        if status != 200:
            raise ValueError(f"the server must answer {path}, got {status} {json.dumps(body)[:200]}"
                             "; check --key and --url")
        return body

    def find(self, config):
        """The experiment that has this parsed config, None if there is none."""
        mine = config_id(config)
        return next((e for e in self.get("/experiments") if api_id_of(e) == mine), None)

    def submit(self, config):
        """(experiment id, budget summary or None): of the new experiment, or of the one that has
        this config already. raises TrainingAPIError with the server's refusal"""
        status, body, sent = self.call("POST", "/submit", config)
        if status == 200:
            return body["experiment_id"], body["budget_summary"]
        if status == 409 and (found := self.find(config)):
            return found["experiment_id"], None if sent == 1 else self.get("/budget")
        raise TrainingAPIError(status, body)


def api_id_of(experiment):
    """config_id of an experiment in a listing, None where ours cannot read the config."""
    try:
        return config_id(parse_config(experiment["training_config"]))
    except TrainingAPIError:
        return None


def api_charged(experiment):
    """Seconds that an experiment is charged: all it may use until it ends, then 1 s at least."""
    limit = experiment["training_config"]["max_runtime_seconds"]
    used = experiment["status"].get("used_runtime_seconds")
    return limit if used is None else min(max(1.0, used), limit)


def read_json_file(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, got {error}; correct it") from None


def checked_config(value, where):
    """A parsed config, or ValueError that names the place and the first thing that is wrong."""
    try:
        return parse_config(value)
    except TrainingAPIError as error:
        first = error.body["detail"][0]
        field = ".".join(map(str, first["loc"][1:]))
        raise ValueError(f"{where} must be a training config, got {field and field + ': '}"
                         f"{first['msg']}; correct it") from None


def sweep_row(experiment):
    """The result line of an ended experiment. parameters: of blocks and norms, parameters_total:
    all; flops = 6 parameters tokens, flops_exact: model.py's count with head and attention."""
    config, status = experiment["training_config"], experiment["status"]
    parameters, total = api_parameters(config)
    tokens, losses = config["total_train_tokens"], status.get("val_losses", [])
    state = status["status_type"]
    loss = losses[-1] if state == "completed" and losses else None
    if state == "completed" and loss is None:
        state = "diverged"
    return {"id": experiment["experiment_id"], "status": state, "loss": loss,
            "parameters": parameters, "parameters_total": total, "tokens": tokens,
            "flops": 6 * parameters * tokens,
            "flops_exact": lm.flops_per_token(api_model_config(config)) * tokens,
            "charged_s": api_charged(experiment), "used_s": status["used_runtime_seconds"],
            "val_losses": losses, "reason": status.get("reason"), "config": config}


class TrainingAPISweep:
    """A plan's experiments on their way from waiting through active to lines of a JSONL file."""

    def __init__(self, client, plan, out):
        content = read_json_file(plan)
        bodies = content.get("experiments") if isinstance(content, dict) else None
        if not isinstance(bodies, list) or not bodies:
            raise ValueError(f'{plan} must hold {{"experiments": [...]}} with one at least, got '
                             "none; make it with plan")
        self.budget_s = content.get("budget_s", math.inf)
        if not isinstance(self.budget_s, (int, float)) or not self.budget_s > 0:
            raise ValueError(f"budget_s of {plan} must be above 0, got {self.budget_s!r}; correct"
                             " it")
        self.client, self.out, self.waiting, self.rows = client, Path(out), {}, {}
        for i, body in enumerate(bodies, 1):
            config = checked_config(body, f"experiment {i} of {plan}")
            if (number := config_id(config)) in self.waiting:
                raise ValueError(f"the experiments of {plan} must differ, got number {i} as before;"
                                 " change its model_seed or leave it out")
            self.waiting[number] = config
        self.total, self.active = len(self.waiting), {}
        if sgd := sum("beta1" not in c["optimizer_config"] for c in self.waiting.values()):
            print(f"note: {sgd} of {self.total} experiments train with SGD: the contract takes an "
                  "optimizer_config with lr_scheduler and no AdamW field, such as weight_decay, so")
        for row in self.read_rows():
            number = config_id(checked_config(row.get("config"), f"a line of {out}"))
            if self.waiting.pop(number, None):
                self.rows[number] = row
        for experiment in client.get("/experiments"):  # submitted before a kill
            if (number := api_id_of(experiment)) in self.waiting:
                self.active[number] = self.waiting.pop(number)

    def read_rows(self):
        """The lines there are; half a line at the end, left by a kill, is cut off."""
        if not self.out.exists():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            return []
        text = self.out.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with lm.atomic_write(self.out) as f:
                f.write(whole)
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("other lines than objects")
            return rows
        except ValueError as error:
            raise ValueError(f"{self.out} must hold results of a sweep, got {error}; give another "
                             "--out") from None

    def submit_what_fits(self):
        """Submits in the plan's order what the plan's and the server's budget can hold now."""
        if not self.waiting:
            return
        room = self.client.get("/budget")["remaining_seconds"]
        mine = sum(row["charged_s"] for row in self.rows.values())
        mine += sum(config["max_runtime_seconds"] for config in self.active.values())
        for number, config in list(self.waiting.items()):
            need = config["max_runtime_seconds"]
            if need > room or mine + need > self.budget_s:
                continue
            try:
                self.client.submit(config)
            except TrainingAPIError as error:
                if error.status == 400:  # another client of this key was faster
                    return
                raise ValueError(f"the server must take the config, got {error.status} "
                                 f"{json.dumps(error.body)[:200]}; correct the plan") from None
            room, mine = room - need, mine + need
            self.active[number] = self.waiting.pop(number)

    def collect(self):
        """Writes the line of every active experiment that has ended; returns how many did."""
        ended, self.running = 0, 0
        if not self.active:
            return 0
        for experiment in self.client.get("/experiments"):
            number, state = api_id_of(experiment), experiment["status"]["status_type"]
            if number not in self.active:
                continue
            self.running += state == "running"
            if state in ("completed", "failed"):
                row = sweep_row(experiment)
                with open(self.out, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
                    f.flush()
                    os.fsync(f.fileno())
                self.rows[number] = row
                del self.active[number]
                ended += 1
        return ended

    def progress(self):
        rows = self.rows.values()
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        best = f"{min(losses):.4f}" if losses else "n/a"
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
            line = self.progress()
            if line != shown:
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
# the training API: verbs

LAW_FLAGS = {"law_seed": 0, "law_noise": 0.002, "law_flops": 4e14}
TRAIN_FLAGS = {"data": "python", "data_dir": "data", "vocab_size": 2048, "tokenizer": None,
               "device": "auto", "val_tokens": N_VAL_TOKENS}


def read_users(path):
    """[(sunet_id, api_key)] of a CSV whose first row is sunet_id,api_key."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.reader(f) if row]
    users = [tuple(row) for row in rows[1:]]
    if not users or rows[0] != ["sunet_id", "api_key"] or any(
            len(user) != 2 or not all(user) for user in users) or any(
            len(set(column)) < len(users) for column in zip(*users, strict=True)):
        raise ValueError(f"{path} must have the row sunet_id,api_key and then one row a user, all "
                         "different, got others; correct it")
    return users


def make_back_ends(args, store):
    """The threads that end experiments, not yet started: one for a law, one a device, or none."""
    for backend, flags in (("law", LAW_FLAGS), ("train", TRAIN_FLAGS)):
        for name, default in flags.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif args.backend != backend:
                raise ValueError(f"--{name} must go with --backend {backend}, got --backend "
                                 f"{args.backend}; leave it out")
    if args.backend == "none":
        return []
    if args.backend == "law":
        law = TrainingAPILaw(args.law_seed, args.law_noise, args.law_flops)
        print(law.describe())
        return [TrainingAPILawBackEnd(store, law)]
    data = {k: getattr(args, k) for k in ("data", "vocab_size", "data_dir", "tokenizer")}
    bpe.prepare_data(**data)  # made once, before the workers ask for it
    names = args.device.split(",")
    if args.device == "auto" and torch.cuda.device_count() > 1:
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = [str(lm.resolve_device(name)) for name in names]
    return [TrainingAPITrainBackEnd(store, len(devices), device, data, args.val_tokens)
            for device in devices]


def stop_serving(number, frame):
    raise KeyboardInterrupt


def serve(args):
    """Serves until Ctrl-C or SIGTERM."""
    users = read_users(args.users) if args.users else None
    Path(args.db).parent.mkdir(parents=True, exist_ok=True)
    store = TrainingAPIStore(args.db, args.budget_s)
    server = TrainingAPIServer((args.host, args.port), store, users,
                               os.environ.get("INTERNAL_API_KEY"))
    back_ends = make_back_ends(args, store)
    if back_ends:  # with none, the runs are at workers elsewhere and may still be going on
        requeued, lost = store.write(store.recover)
        if requeued or lost:
            print(f"runs of the server before: {requeued} queued again, {lost} failed after "
                  f"{MAX_ATTEMPTS} attempts")
    for back_end in back_ends:
        back_end.start()
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's & leaves SIGINT ignored
        signal.signal(number, stop_serving)
    host, port = server.server_address[:2]
    keys = f"key {API_KEY}" if server.users[0][2] == API_KEY else f"{len(server.users)} users"
    print(f"training API on http://{host}:{port}, dashboard at /dashboard, {keys}, {args.backend} "
          f"back end, {args.db}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped: what was queued or running goes on at the next start")
    finally:
        for back_end in back_ends:
            back_end.stop()
        server.server_close()
        store.close()


def submit(args):
    """Submits one config file and prints its id; one that is there already is named, not an error
    that loses it."""
    client = TrainingAPIClient(args.url, args.key)
    config = checked_config(read_json_file(args.config), args.config)
    try:
        number, budget = client.submit(config)
    except TrainingAPIError as error:
        raise ValueError(f"the server must take {args.config}, got {error.status} "
                         f"{json.dumps(error.body)[:300]}; correct it") from None
    if budget is None:
        raise ValueError(f"the config must be new, got that of experiment {number}; see GET "
                         f"/experiment/{number}, or change its model_seed")
    print(json.dumps({"experiment_id": number, "budget_summary": budget}))


def sweep(args):
    """Runs a plan; what was done before is not done again."""
    TrainingAPISweep(TrainingAPIClient(args.url, args.key), args.plan, args.out).run(args.poll_s)


def add_serve_parsers(subparsers):
    """Adds the verbs serve, submit and sweep; each sets `function`."""
    parser = subparsers.add_parser("serve", help="serve the training API")
    add = parser.add_argument
    add("--backend", choices=("train", "law", "none"), default="law",
        help="real training, a stated loss law, or workers elsewhere (default: law)")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--db", default="data/training_api.db", help="all that is kept (default: %(default)s)")
    add("--users", help="CSV with the first row sunet_id,api_key (default: one user, key "
        f"{API_KEY})")
    add("--budget_s", type=lm.positive(float), default=API_BUDGET_S, help="seconds a user")
    add("--law_seed", type=int, help="0: Chinchilla's constants; another: a random surface")
    add("--law_noise", type=lm.positive(float, zero=True), help="sd of log loss (default: 0.002)")
    add("--law_flops", type=lm.positive(float), help="FLOP/s simulated (default: 4e14)")
    add("--data", help="text to train on, as for train.py (default: python)")
    add("--data_dir", help="where tokenizer and token files go (default: data)")
    add("--vocab_size", type=lm.positive(int), help="of the tokenizer (default: 2048)")
    add("--tokenizer", help="a tokenizer.json (default: train one)")
    add("--device", help="auto (every GPU, else the CPU), or names with commas between")
    add("--val_tokens", type=lm.positive(int), help=f"an evaluation (default: {N_VAL_TOKENS})")
    parser.set_defaults(function=serve)
    for function, meaning in ((submit, "submit one experiment"), (sweep, "run a plan")):
        parser = subparsers.add_parser(function.__name__, help=meaning)
        add = parser.add_argument
        add("--url", default=os.environ.get("A3_API_URL", "http://127.0.0.1:8000"))
        add("--key", default=os.environ.get("A3_API_KEY", API_KEY))
        if function is submit:
            add("config", help="a JSON file with a training config")
        else:
            add("--plan", required=True, help='JSON: {"experiments": [...], "budget_s": ...}')
            add("--out", default="results.jsonl", help="one line a result (default: %(default)s)")
            add("--poll_s", type=lm.positive(float), default=5.0, help="longest pause")
        parser.set_defaults(function=function)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_serve_parsers(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args(argv)
    lm.print_any_text()
    try:
        return args.function(args)
    except (ValueError, OSError, sqlite3.Error) as error:
        parser.exit(2, f"serve_part.py: error: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, "serve_part.py: interrupted; run it again, it goes on\n")


if __name__ == "__main__":
    sys.exit(main())
