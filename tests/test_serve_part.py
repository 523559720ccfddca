"""The training API: contract, store, kills, back ends, client. Servers listen on free local ports."""

import copy
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

import model as lm
import serve_part as api

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
needs_sigkill = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
ARCHITECTURE = dict(attention_bias=False, head_dim=64, hidden_size=448, intermediate_size=1280,
                    num_attention_heads=7, num_hidden_layers=9, num_key_value_heads=7,
                    rms_norm_eps=1e-6, rope_theta=1_000_000, tie_word_embeddings=False,
                    dtype="bfloat16", vocab_size=32_000)  # fmt: skip
TINY = dict(ARCHITECTURE, head_dim=8, hidden_size=16, intermediate_size=32, num_attention_heads=2,
            num_key_value_heads=2, num_hidden_layers=1, vocab_size=300)  # fmt: skip
KEY = {"X-API-Key": api.API_KEY}


def body(architecture=None, **changes):
    """The handout's example as a request's object, with changes; None leaves a field out."""
    whole = dict(architecture_config={**ARCHITECTURE, **(architecture or {})}, optimizer_config={},
                 train_batch_size=128, val_batch_size=32, total_train_tokens=16 * 2**16,
                 max_runtime_seconds=30, model_seed=0)  # fmt: skip
    whole.update(changes)
    return {k: v for k, v in whole.items() if v is not None}


def tiny(**changes):
    """A run of 4 steps of one sequence, a second or so on a CPU."""
    changes = {"train_batch_size": 1, "n_evals": 2, "total_train_tokens": 4 * 512, **changes}
    return body(TINY, **changes)


class InProcess:
    """A server in a thread of this process, without a back end unless a law is given."""

    def __init__(self, path, law=None, users=None, **more):
        self.store = api.TrainingAPIStore(path, **more)
        self.server = api.TrainingAPIServer(("127.0.0.1", 0), self.store, users, "internal")
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.back_end = api.TrainingAPILawBackEnd(self.store, law) if law else None
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        if self.back_end:
            self.back_end.start()

    def ask(self, method, path, value=None, key=api.API_KEY, **headers):
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        if key is not None:
            headers["X-API-Key"] = key
        data = None
        if value is not None:
            data = value if isinstance(value, bytes) else json.dumps(value)
            headers.setdefault("Content-Type", "application/json")
        return requests.request(method, self.url + path, data=data, headers=headers, timeout=30,
                                allow_redirects=False)

    def report(self, number, kind, **payload):
        return self.ask("POST", f"/internal/worker/{number}/{kind}", payload, X_Internal_Key="internal")

    def close(self):
        if self.back_end:
            self.back_end.stop()
        self.server.shutdown()
        self.server.server_close()
        self.store.close()


@pytest.fixture
def serving(tmp_path):
    servers = []

    def start(name="api.db", **more):
        servers.append(InProcess(tmp_path / name, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def api_server(serving):
    return serving()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """`serve` in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, db, *flags):
        self.db, self.port, self.flags = db, free_port(), flags
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-u", str(ROOT / "serve_part.py"), "serve", "--db", str(self.db), "--port",
                   str(self.port), *self.flags]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})  # as one_thread
        self.seen = ""
        for line in self.process.stdout:
            self.seen += line
            if line.startswith("training API on"):
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return
        raise RuntimeError(self.seen)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def get(self, path):
        answer = requests.get(self.url + path, headers=KEY, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, value):
        answer = requests.post(self.url + "/submit", json=value, headers=KEY, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["experiment_id"]

    def wait_for(self, number, *states, seconds=300):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.get(f"/experiment/{number}")["status"]
            if status["status_type"] in states:
                return status
            time.sleep(0.05)
        raise AssertionError(f"experiment {number} is {status} after {seconds} s")


@pytest.fixture
def processes():
    started = []

    def start(db, *flags):
        started.append(Process(db, *flags))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


# -------------------------------------------------------------------------------------------------
# what a request may hold


@pytest.mark.parametrize("changes, architecture, expected", [
    ({}, {}, "f4f2366951d3d154db4f"),
    ({"model_seed": 1}, {}, "b4e6cf5e8a0f84da5d7a"),
    ({"optimizer_config": {"lr_scheduler": {}}}, {}, "11b235745f7852dbcee0"),
    ({"max_runtime_seconds": 60}, {}, "be55f085608bf3bdea78"),
    ({}, {"tie_word_embeddings": True}, "3a0015c8ab26d3e653ac"),
    ({"optimizer_config": {"grad_clip_norm": None}}, {}, "a9803a72206fb78b0794"),
])  # fmt: skip
def test_the_id_of_a_config_is_the_references(changes, architecture, expected):
    assert api.config_id(api.parse_config(body(architecture, **changes))) == expected


@pytest.mark.parametrize("optimizer, is_sgd", [
    ({}, False), ({"grad_clip_norm": None}, False), ({"lr_scheduler": {}}, True),
    ({"lr_scheduler": {"peak_value": 1e-3}, "grad_clip_norm": 0.5}, True),
    *(({"lr_scheduler": {}, name: 0.5}, False)
      for name in ("weight_decay", "beta1", "beta2", "eps", "eps_root")),
])  # fmt: skip
def test_the_optimizer_is_chosen_as_the_reference_chooses(optimizer, is_sgd):
    parsed = api.parse_config(body(optimizer_config=optimizer))["optimizer_config"]
    assert ("beta1" not in parsed) == is_sgd


def test_values_are_coerced_and_defaults_are_filled_in_the_contracts_order():
    changes = dict(max_runtime_seconds="30", train_batch_size="128", model_seed=True, total_train_tokens=1048576.0)
    parsed = api.parse_config(body({"attention_bias": "false", "rope_theta": 1e6}, **changes))
    assert api.to_wire(parsed) == (
        '{"architecture_config":{"attention_bias":false,"head_dim":64,"hidden_size":448,"intermediate_size":1280,'
        '"num_attention_heads":7,"num_hidden_layers":9,"num_key_value_heads":7,"rms_norm_eps":1e-6,'
        '"rope_theta":1000000,"tie_word_embeddings":false,"dtype":"bfloat16","vocab_size":32000},'
        '"optimizer_config":{"lr_scheduler":{"peak_value":0.0003,"final_lr_frac":0.1,"warmup_frac":0.05,'
        '"init_value":0.0},"weight_decay":0.01,"beta1":0.9,"beta2":0.95,"eps":1e-8,"eps_root":1e-8,'
        '"grad_clip_norm":1.0},"train_batch_size":128,"val_batch_size":32,"n_evals":16,'
        '"total_train_tokens":1048576,"max_runtime_seconds":30.0,"model_seed":1}')  # fmt: skip


@pytest.mark.parametrize("number, text", [
    (30.0, "30.0"), (1e-6, "1e-6"), (1e-5, "0.00001"), (1.5e-5, "0.000015"), (1e-7, "1e-7"), (1e16, "1e+16"),
    (1e-10, "1e-10"), (0.1 + 0.2, "0.30000000000000004"), (-0.0, "-0.0"), (math.inf, "null"), (math.nan, "null"),
])  # fmt: skip
def test_numbers_are_written_as_pydantic_writes_them(number, text):
    assert api.wire_number(number) == text


def errors_of(value):
    with pytest.raises(api.TrainingAPIError) as caught:
        api.parse_config(value)
    assert caught.value.status == 422
    return caught.value.body["detail"]


ADAM = {"weight_decay": 0.1}
RULES = [  # one broken by each change, in the contract's order
    (dict(total_train_tokens=16 * 2**16 + 512), {}, "total_train_tokens must be divisible by seq_len * train_batch_size"),
    (dict(n_evals=3), {}, "total optimizer steps must be divisible by n_evals"),
    (dict(val_batch_size=3), {}, "n_val_tokens must be divisible by seq_len * val_batch_size"),
    *(({}, {name: 0}, f"{name} must be positive") for name in
      ("head_dim", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
       "num_key_value_heads", "vocab_size")),
    ({}, dict(hidden_size=449), "hidden_size must equal num_attention_heads * head_dim"),
    ({}, dict(num_key_value_heads=2), "num_attention_heads must be divisible by num_key_value_heads"),
    ({}, dict(num_key_value_heads=1), "num_key_value_heads must equal num_attention_heads; GQA is not supported"),
    ({}, dict(head_dim=1, hidden_size=7), "head_dim must be even for RoPE"),
    ({}, dict(intermediate_size=447), "intermediate_size should usually >= hidden_size"),
    ({}, dict(rms_norm_eps=0), "rms_norm_eps must be positive"),
    ({}, dict(rope_theta=0), "rope_theta must be positive"),
    *((dict(optimizer_config={"lr_scheduler": {name: value}}), {}, text) for name, value, text in (
        ("warmup_frac", 1, "warmup_frac must be in [0, 1)"), ("final_lr_frac", 1.5, "final_lr_frac must be in [0, 1]"),
        ("init_value", -1, "initial learning rate must be nonnegative"),
        ("peak_value", 0, "peak learning rate must be positive"))),
    (dict(optimizer_config={"grad_clip_norm": 0}), {}, "grad_clip_norm must be positive or None"),
    *((dict(optimizer_config={name: value}), {}, text) for name, value, text in (
        ("weight_decay", -1, "weight_decay must be nonnegative"), ("beta1", 1, "beta1 must be in [0, 1)"),
        ("beta2", -0.1, "beta2 must be in [0, 1)"), ("eps", 0, "eps must be positive"),
        ("eps_root", -1, "eps_root must be nonnegative"))),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(RULES)))
def test_the_first_broken_rule_between_fields_is_the_only_one_reported(place):
    changes, architecture, text = RULES[place]
    value = body(architecture, **changes)
    assert errors_of(value) == [{"type": "value_error", "loc": ["body"], "msg": f"Value error, {text}",
                                 "input": value, "ctx": {"error": {}}}]  # fmt: skip
    if place > 2:  # and an earlier one goes before it
        assert "n_evals" in errors_of({**value, "n_evals": 3})[0]["msg"]


def test_errors_of_fields_have_the_contracts_shapes():
    value = body({"dtype": "float16", "head_dim": 1.5, "more": 1}, train_batch_size=None, val_batch_size="x",
                 n_evals=0, total_train_tokens=500_000_000_001, max_runtime_seconds=43201, model_seed=-1)  # fmt: skip
    place = ["body", "architecture_config"]
    assert errors_of(value) == [
        {"type": "int_from_float", "loc": [*place, "head_dim"], "input": 1.5,
         "msg": "Input should be a valid integer, got a number with a fractional part"},
        {"type": "literal_error", "loc": [*place, "dtype"], "msg": "Input should be 'float32' or 'bfloat16'",
         "input": "float16", "ctx": {"expected": "'float32' or 'bfloat16'"}},
        {"type": "extra_forbidden", "loc": [*place, "more"], "msg": "Extra inputs are not permitted", "input": 1},
        {"type": "missing", "loc": ["body", "train_batch_size"], "msg": "Field required", "input": value},
        {"type": "int_parsing", "loc": ["body", "val_batch_size"], "input": "x",
         "msg": "Input should be a valid integer, unable to parse string as an integer"},
        {"type": "greater_than", "loc": ["body", "n_evals"], "msg": "Input should be greater than 0", "input": 0,
         "ctx": {"gt": 0}},
        {"type": "less_than_equal", "loc": ["body", "total_train_tokens"], "input": 500_000_000_001,
         "msg": "Input should be less than or equal to 500000000000", "ctx": {"le": 500_000_000_000}},
        {"type": "less_than_equal", "loc": ["body", "max_runtime_seconds"], "input": 43201,
         "msg": "Input should be less than or equal to 43200", "ctx": {"le": 43200.0}},
        {"type": "greater_than_equal", "loc": ["body", "model_seed"], "input": -1,
         "msg": "Input should be greater than or equal to 0", "ctx": {"ge": 0}},
    ]  # fmt: skip
    assert json.dumps(errors_of(body(max_runtime_seconds=0))[0]["ctx"]) == '{"ge": 1.0}'


def test_errors_inside_the_optimizer_are_reported_for_both_kinds():
    found = errors_of(body(optimizer_config={"beta3": 1}))
    assert [(e["type"], e["loc"][2:]) for e in found] == [
        ("missing", ["SGDConfig", "lr_scheduler"]), ("extra_forbidden", ["SGDConfig", "beta3"]),
        ("extra_forbidden", ["AdamWConfig", "beta3"])]  # fmt: skip


def pydantic_config():
    """The contract's tables as pydantic models, the reference's own checker."""
    pydantic = pytest.importorskip("pydantic", reason="the oracle is pydantic")
    from typing import Literal

    strict = pydantic.ConfigDict(extra="forbid")

    def make(name, **fields):
        return pydantic.create_model(name, __config__=strict, **{
            k: v if isinstance(v, tuple) else (v, ...) for k, v in fields.items()})  # fmt: skip

    bounded = pydantic.Field
    schedule = make("WarmupCosineDecay", **{k: (float, v) for k, v in api.SCHEDULE.items()})
    sgd = make("SGDConfig", lr_scheduler=schedule, grad_clip_norm=(float | None, 1.0))
    adamw = make("AdamWConfig", lr_scheduler=(schedule, bounded(default_factory=schedule)), weight_decay=(float, 0.01),
                 beta1=(float, 0.9), beta2=(float, 0.95), eps=(float, 1e-8), eps_root=(float, 1e-8),
                 grad_clip_norm=(float | None, 1.0))  # fmt: skip
    kinds = {bool: bool, int: int, float: float, str: Literal["float32", "bfloat16"]}
    architecture = make("BasicTransformerConfig", **{k: kinds[type(v)] for k, v in ARCHITECTURE.items()})
    return pydantic, make(
        "TrainingConfig", architecture_config=architecture, optimizer_config=sgd | adamw,
        train_batch_size=(int, bounded(gt=0)), val_batch_size=(int, bounded(gt=0)), n_evals=(int, bounded(16, gt=0)),
        total_train_tokens=(int, bounded(gt=0, le=500_000_000_000)),
        max_runtime_seconds=(float, bounded(ge=1, le=43200)), model_seed=(int, bounded(0, ge=0)))  # fmt: skip


ODD_VALUES = [None, True, False, 0, 1, 2, -1, 0.0, 1.0, 0.5, -0.0, 1e300, 1e18, 1e19, 10**30, 10**400, math.inf,
              math.nan, -math.inf, "1", "1.0", "1.5", "x", "", "true", "Off", " 1 ", "1_0", "+5", "nan", "1e3",
              "float32", "1_.0", "5.", [], {}, [1], {"a": 1}, "ü\u2028", 43200, 43200.5, 5e11]  # fmt: skip


def test_checks_of_fields_agree_with_pydantic_on_random_damage():
    pydantic, reference = pydantic_config()
    rng = random.Random(0)
    for _ in range(3000):
        value = body(optimizer_config=rng.choice([{}, {"lr_scheduler": {}}, dict(ADAM), {"grad_clip_norm": None}]))
        value = copy.deepcopy(value)
        for _ in range(rng.randrange(4)):
            place = rng.choice([value, *(v for v in value.values() if isinstance(v, dict))])
            name = rng.choice([*place, "more"])
            if rng.random() < 0.2:
                place.pop(name, None)
            else:
                place[name] = copy.deepcopy(rng.choice(ODD_VALUES))
        ours = []
        parsed = api.parse_config_fields(value, ("body",), ours)
        try:
            theirs, text = [], reference.model_validate(value, from_attributes=True).model_dump_json()
        except pydantic.ValidationError as error:
            theirs = [{**{k: e[k] for k in ("type", "loc", "msg", "input", "ctx") if k in e},
                       "loc": ["body", *e["loc"]]} for e in error.errors(include_url=False)]  # fmt: skip
        assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True), value
        if not ours:
            assert api.to_wire(parsed) == text


# -------------------------------------------------------------------------------------------------
# HTTP


def test_unknown_paths_methods_and_slashes(api_server):
    ask = api_server.ask
    assert (ask("GET", "/nope").status_code, ask("GET", "/nope").text) == (404, '{"detail":"Not Found"}')
    for method, path, allowed in (("GET", "/submit", "POST"), ("PUT", "/final_submission", "POST"),
                                  ("DELETE", "/experiment/1", "GET"), ("OPTIONS", "/budget", "GET")):  # fmt: skip
        answer = ask(method, path)
        assert (answer.status_code, answer.text) == (405, '{"detail":"Method Not Allowed"}')
        assert answer.headers["Allow"] == allowed
    assert ask("HEAD", "/budget").status_code == 405
    answer = ask("GET", "/budget/?a=1&b=%20")
    assert (answer.status_code, answer.text) == (307, "")
    assert answer.headers["Location"] == f"{api_server.url}/budget?a=1&b=%20"
    assert ask("GET", "/experiment/").status_code == 404


def test_every_answer_has_a_request_id_and_json_its_type(api_server):
    for method, path in (("GET", "/budget"), ("GET", "/nope"), ("PUT", "/submit"), ("GET", "/budget/"),
                         ("POST", "/submit")):  # fmt: skip
        answer = api_server.ask(method, path)
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])
        assert api_server.ask(method, path, X_Request_ID="mine").headers["X-Request-ID"] == "mine"
        assert answer.headers.get("Content-Type", "application/json") == "application/json"
    assert "X-Request-ID" in api_server.ask("GET", "/budget", key=None).headers


def test_keys_are_checked(api_server):
    for path in ("/budget", "/experiments", "/experiment/1", "/experiment/x", "/final_submission"):
        for key in (None, ""):
            answer = api_server.ask("GET", path, key=key)
            assert (answer.status_code, answer.text) == (401, '{"detail":"missing X-API-Key"}')
        answer = api_server.ask("GET", path, key="87654321")
        assert (answer.status_code, answer.text) == (401, '{"detail":"invalid API key"}')


def test_checks_come_in_the_contracts_order(api_server):
    ask = api_server.ask
    answer = ask("POST", "/submit", b"{x", key=None)  # malformed goes before the key
    assert answer.status_code == 422 and answer.text == (
        '{"detail":[{"type":"json_invalid","loc":["body",1],"msg":"JSON decode error","input":{},'
        '"ctx":{"error":"Expecting property name enclosed in double quotes"}}]}')  # fmt: skip
    assert ask("POST", "/submit", {}, key=None).status_code == 401  # the key before the schema
    big = body(max_runtime_seconds=43200)
    assert ask("POST", "/submit", {**big, "n_evals": 3}).status_code == 422  # the schema before the budget
    assert ask("POST", "/submit", body()).status_code == 200
    assert ask("POST", "/submit", big).status_code == 400
    assert ask("POST", "/submit", body()).status_code == 409
    ask("POST", "/submit", body(max_runtime_seconds=43170))
    assert ask("POST", "/submit", body()).status_code == 400  # the budget before the duplicate
    assert ask("POST", "/submit").json()["detail"] == [
        {"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}]  # fmt: skip
    for value, kind in ((b"{}", "text/plain"), (b"[1]", "application/json")):
        (entry,) = ask("POST", "/submit", value, Content_Type=kind).json()["detail"]
        assert (entry["type"], entry["loc"]) == ("model_attributes_type", ["body"])
    assert ask("POST", "/submit", b'{"a":"\xff"}').json() == {"detail": "There was an error parsing the body"}
    assert ask("POST", "/submit", b'{"a":NaN}').text == "Internal Server Error"  # JSON cannot echo it


def test_too_large_a_body_is_refused_unread(api_server):
    with socket.create_connection(api_server.server.server_address) as s:
        s.sendall(b"POST /submit HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        answer = s.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer
    assert api_server.ask("GET", "/budget").status_code == 200


def test_garbage_on_the_socket_hurts_nobody(api_server):
    rng = random.Random(0)
    for text in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"G" * 70_000, rng.randbytes(500),
                 b"POST /submit HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                 b"POST /submit HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                 b"POST /submit HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):  # fmt: skip
        with socket.create_connection(api_server.server.server_address) as s:
            s.sendall(text)
            s.shutdown(socket.SHUT_WR)
            while s.recv(10_000):
                pass
    assert api_server.ask("GET", "/budget").status_code == 200


def test_cross_origin_requests(api_server):
    origin = "http://localhost:8000"
    good = api_server.ask("OPTIONS", "/submit", key=None, Origin=origin, Access_Control_Request_Method="POST",
                          Access_Control_Request_Headers="x-api-key,content-type",
                          Access_Control_Request_Private_Network="true")  # fmt: skip
    assert (good.status_code, good.text, good.headers["vary"]) == (200, "OK", "Origin")
    allowed = {name: good.headers[f"access-control-{name}"] for name in
               ("allow-origin", "allow-methods", "allow-headers", "allow-private-network", "max-age")}  # fmt: skip
    assert allowed == {"allow-origin": origin, "allow-methods": "GET, POST, OPTIONS", "max-age": "600",
                       "allow-headers": "Accept, Accept-Language, Content-Language, Content-Type, X-API-Key",
                       "allow-private-network": "true"}  # fmt: skip
    bad = api_server.ask("OPTIONS", "/submit", key=None, Origin="http://evil", Access_Control_Request_Method="POST")
    assert (bad.status_code, bad.text) == (400, "Disallowed CORS origin")
    assert api_server.ask("GET", "/budget", Origin=origin).headers["access-control-allow-origin"] == origin
    assert "access-control-allow-origin" not in api_server.ask("GET", "/budget", Origin="http://evil").headers


def test_the_pages_load_nothing_from_elsewhere(api_server):
    page = api_server.ask("GET", "/dashboard", key=None)
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    assert "Scaling Experiments Dashboard" in page.text
    assert not re.findall(r"""(?:src|href)=(?!"data:)|@import|innerHTML|eval\(""", page.text)
    schema = api_server.ask("GET", "/openapi.json", key=None).json()
    assert (schema["openapi"], schema["info"]) == ("3.1.0", {"title": "CS336 Assignment 3 Backend", "version": "0.1.0"})
    assert list(schema["paths"]) == ["/submit", "/experiments", "/experiment/{experiment_id}", "/budget",
                                     "/final_submission"]  # fmt: skip
    assert api_server.ask("GET", "/docs", key=None).status_code == 200


# -------------------------------------------------------------------------------------------------
# budget, experiments, scheduling


def test_submits_accumulate_and_are_listed_in_order(api_server):
    ask, used = api_server.ask, 0.0
    assert ask("GET", "/budget").text == (
        '{"used_seconds":0.0,"remaining_seconds":43200.0,"total_budget_seconds":43200.0}')  # fmt: skip
    for number, seconds in enumerate((10, 30, 20), 1):
        used += seconds
        answer = ask("POST", "/submit", body(max_runtime_seconds=seconds))
        assert answer.text == (f'{{"experiment_id":{number},"budget_summary":{{"used_seconds":{used},'
                               f'"remaining_seconds":{43200 - used},"total_budget_seconds":43200.0}}}}')  # fmt: skip
        assert ask("GET", "/budget").json() == answer.json()["budget_summary"]
    listed = ask("GET", "/experiments").json()
    assert [e["experiment_id"] for e in listed] == [1, 2, 3]
    assert ask("GET", "/experiment/1").json() == listed[0]
    assert list(listed[0]["status"]) == ["queued_at", "status_type"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", listed[0]["status"]["queued_at"])


def test_a_budget_may_be_spent_to_its_last_second_and_no_further(api_server):
    assert api_server.ask("POST", "/submit", body(max_runtime_seconds=43199)).status_code == 200
    answer = api_server.ask("POST", "/submit", body(max_runtime_seconds=1.5))
    assert answer.text == ('{"detail":{"message":"insufficient budget","budget_summary":{"used_seconds":43199.0,'
                           '"remaining_seconds":1.0,"total_budget_seconds":43200.0}}}')  # fmt: skip
    assert answer.status_code == 400
    assert api_server.ask("POST", "/submit", body(max_runtime_seconds=1)).status_code == 200


def test_a_duplicate_is_refused_in_any_state_and_costs_nothing(api_server):
    api_server.ask("POST", "/submit", body())
    before = api_server.ask("GET", "/budget").json()
    again = api_server.ask("POST", "/submit", body(max_runtime_seconds="30.0", n_evals=16))
    assert (again.status_code, again.reason) == (409, "Conflict")
    assert again.text == '{"detail":"experiment already exists for this training config"}'
    assert api_server.ask("GET", "/budget").json() == before
    api_server.store.write(api_server.store.dispatch, 1)
    api_server.report(1, "finish", result_type="failed", used_runtime_seconds=3.0,
                      reason={"failure": "ValueError: x", "reason": "unexpected"})  # fmt: skip
    assert api_server.ask("POST", "/submit", body()).status_code == 409
    assert api_server.ask("POST", "/submit", body(max_runtime_seconds=31)).json()["experiment_id"] == 2


@pytest.mark.parametrize("used, limit, charged", [(12.5, 30, 12.5), (0.25, 30, 1.0), (115.0, 100, 100.0), (0.0, 9, 1.0)])
def test_an_ended_run_is_charged_what_it_used_within_its_bounds(api_server, used, limit, charged):
    api_server.ask("POST", "/submit", body(max_runtime_seconds=limit))
    assert api_server.report(1, "finish", result_type="completed", used_runtime_seconds=used, val_losses=[]
                             ).status_code == 500  # fmt: skip
    api_server.store.write(api_server.store.dispatch, 1)
    assert api_server.ask("GET", "/budget").json()["used_seconds"] == limit
    answer = api_server.report(1, "finish", result_type="completed", used_runtime_seconds=used, val_losses=[3, 2.5])
    assert (answer.status_code, answer.text, "content-length" in answer.headers) == (204, "", False)
    assert api_server.ask("GET", "/budget").json()["used_seconds"] == charged
    status = api_server.ask("GET", "/experiment/1").json()["status"]
    assert status["used_runtime_seconds"] == used  # stored as reported
    again = api_server.report(1, "finish", result_type="completed", used_runtime_seconds=1, val_losses=[])
    assert (again.status_code, again.text) == (500, '{"detail":"you can only report a finish if currrently running"}')


def test_statuses_have_the_contracts_keys_in_order(api_server):
    for seed in range(3):
        api_server.ask("POST", "/submit", body(model_seed=seed))
    (_, run_id, *_), *_ = api_server.store.write(api_server.store.dispatch, 3)
    api_server.report(1, "event", log_type="validation_loss", run_id="another", val_losses=[9.0])
    status = api_server.ask("GET", "/experiment/1").json()["status"]
    assert list(status) == ["queued_at", "dispatched_at", "run_id", "val_losses", "status_type"]
    assert (status["val_losses"], status["run_id"]) == ([], run_id)
    for event in (dict(log_type="run_started", run_id=run_id, wandb_path=None),
                  dict(log_type="validation_loss", run_id=run_id, val_losses=[4, 3.5]),
                  dict(log_type="run_heartbeat", run_id=run_id, elapsed_seconds=2),
                  dict(log_type="preempted", run_id=run_id)):  # fmt: skip
        assert api_server.report(1, "event", **event).status_code == 204
    assert '"val_losses":[4.0,3.5],"status_type":"running"' in api_server.ask("GET", "/experiment/1").text
    api_server.report(1, "finish", result_type="completed", used_runtime_seconds=2, val_losses=[4, 3.5])
    api_server.report(2, "finish", result_type="failed", used_runtime_seconds=31,
                      reason={"partial_val_losses": [4], "reason": "timeout"})  # fmt: skip
    text = re.sub(r'"(queued_at|dispatched_at|run_id|\w+ed_at)":"[^"]*"', r'"\1"', api_server.ask("GET", "/experiment/1").text)
    assert text.endswith('"status":{"queued_at","dispatched_at","run_id","used_runtime_seconds":2.0,'
                         '"val_losses":[4.0,3.5],"completed_at","status_type":"completed"}}')  # fmt: skip
    text = re.sub(r'"(queued_at|dispatched_at|run_id|\w+ed_at)":"[^"]*"', r'"\1"', api_server.ask("GET", "/experiment/2").text)
    assert text.endswith('"status":{"queued_at","dispatched_at","run_id","used_runtime_seconds":31.0,'
                         '"reason":{"partial_val_losses":[4.0],"reason":"timeout"},"failed_at","status_type":"failed"}}')  # fmt: skip
    logged = [json.loads(r["entry"])["log_type"] for r in
              api_server.store.read("SELECT entry FROM events WHERE experiment = 1 ORDER BY id")]  # fmt: skip
    assert logged == ["queued", "dispatched", "validation_loss", "run_started", "validation_loss", "run_heartbeat",
                      "preempted", "completed"]  # fmt: skip


def test_worker_reports_are_checked(api_server):
    finish = dict(result_type="completed", used_runtime_seconds=1, val_losses=[])
    assert api_server.ask("POST", "/internal/worker/1/finish", finish).json() == {"detail": "invalid internal key"}
    answer = api_server.report(7, "event", log_type="preempted", run_id="a")
    assert (answer.status_code, answer.json()) == (404, {"detail": "experiment not found"})
    zero, tag = api_server.report(0, "event", log_type="queued").json()["detail"]
    assert (zero["type"], zero["loc"], zero["input"]) == ("greater_than", ["path", "experiment_id"], "0")
    assert tag["msg"] == ("Input tag 'queued' found using 'log_type' does not match any of the expected tags: "
                          "'run_started', 'validation_loss', 'run_heartbeat', 'preempted'")  # fmt: skip
    places = {e["loc"][1] for e in api_server.report(1, "finish").json()["detail"]}
    assert places == {"CompletedPayload", "FailedPayload"}


def test_users_do_not_see_each_other_and_ids_are_global(serving):
    server = serving(users=[("a", "11111111"), ("b", "22222222")])
    for i, key in enumerate(("11111111", "22222222", "11111111")):
        answer = server.ask("POST", "/submit", body(model_seed=i // 2), key=key)
        assert answer.json()["experiment_id"] == i + 1
    assert [e["experiment_id"] for e in server.ask("GET", "/experiments", key="11111111").json()] == [1, 3]
    answer = server.ask("GET", "/experiment/2", key="11111111")
    assert (answer.status_code, answer.text) == (404, '{"detail":"not found"}')
    assert server.ask("GET", "/budget", key="22222222").json()["used_seconds"] == 30
    (entry,) = server.ask("GET", "/experiment/x", key="11111111").json()["detail"]
    assert (entry["loc"], entry["input"]) == (["path", "experiment_id"], "x")
    assert server.ask("GET", f"/experiment/{2**63}", key="11111111").text == "Internal Server Error"


def test_the_final_submission_is_the_latest(api_server):
    assert api_server.ask("GET", "/final_submission").text == "null"
    for loss, shown in ((3.5, "3.5"), (math.inf, "null")):
        value = {"training_config": body(), "predicted_final_loss": loss}
        answer = api_server.ask("POST", "/final_submission", value)
        assert f'"predicted_final_loss":{shown},"submitted_at":"' in answer.text
        assert answer.text == api_server.ask("GET", "/final_submission").text
        assert list(answer.json()) == ["training_config", "predicted_final_loss", "submitted_at"]
    bad = {"training_config": body(n_evals=3), "predicted_final_loss": 1}
    (entry,) = api_server.ask("POST", "/final_submission", bad).json()["detail"]
    assert (entry["loc"], entry["input"]) == (["body", "training_config"], bad["training_config"])
    assert api_server.ask("GET", "/budget").json()["used_seconds"] == 0


def test_dispatch_is_fair_between_users(api_server):
    """The reference's own scheduler test: users 2 and 3 have two runs each, three users queue."""
    config, place = json.dumps(api.parse_config(body())), 0

    def add(c, user, state, minute):
        nonlocal place
        place += 1
        c.execute("INSERT INTO experiments (user, unique_id, config, max_runtime, state, queued_at) VALUES "
                  "(?, ?, ?, 30, ?, ?)", (user, str(place), config, state, f"2026-01-01T{minute // 60:02d}:{minute % 60:02d}:00Z"))  # fmt: skip

    def fill(c):
        for user in (2, 2, 3, 3):
            add(c, user, "running", 0)
        for i in range(10):
            for user, minutes in ((1, 10), (2, 19), (3, 9)):
                add(c, user, "queued", i + minutes)
        rows, running, new = api_server.store.select_for_dispatch(c, 9)
        assert ([(r["id"], r["user"]) for r in rows], running, new) == (
            [(5, 1), (8, 1), (7, 3), (11, 1), (6, 2)], 4, 1)  # fmt: skip
        assert api_server.store.select_for_dispatch(c, 4) == ([], 4, 0)

    api_server.store.write(fill)


def test_64_clients_at_once_never_reserve_more_than_the_budget(serving):
    server = serving(users=[("a", "11111111"), ("b", "22222222")])
    answers, gate = [], threading.Barrier(64)

    def client(i):
        with requests.Session() as session:
            gate.wait()
            for j in range(8):
                value = body(model_seed=100 * (i // 2) + j, max_runtime_seconds=400)
                key = ("11111111", "22222222")[i % 2]
                answer = session.post(server.url + "/submit", json=value, headers={"X-API-Key": key}, timeout=60)
                answers.append((key, answer.status_code, answer.json()))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 512
    for key in ("11111111", "22222222"):
        taken = [a for k, code, a in answers if k == key and code == 200]
        assert len(taken) == 108  # 43,200 / 400
        assert {a["budget_summary"]["used_seconds"] for a in taken} == {400.0 * n for n in range(1, 109)}
        assert server.ask("GET", "/budget", key=key).json()["remaining_seconds"] == 0
    assert {code for _, code, _ in answers} == {200, 400}
    assert sorted(a["experiment_id"] for _, code, a in answers if code == 200) == list(range(1, 217))


# -------------------------------------------------------------------------------------------------
# kills


def submit_until_it_dies(url, first_seed, acknowledged, sent):
    seed = first_seed
    with requests.Session() as session:
        while True:
            sent.append(seed)
            try:
                answer = session.post(url + "/submit", json=body(model_seed=seed, max_runtime_seconds=2), headers=KEY,
                                      timeout=30)  # fmt: skip
            except requests.RequestException:
                return
            assert answer.status_code == 200
            acknowledged.append((seed, answer.json()["experiment_id"]))
            seed += 1


@needs_sigkill
@pytest.mark.parametrize("backend", ["none", "law"])
def test_a_server_killed_under_load_keeps_every_acknowledged_submit_and_charges_once(tmp_path, processes, backend):
    rng = random.Random(time.time_ns())
    server = processes(tmp_path / "api.db", "--backend", backend)
    acknowledged, sent = [], []
    for life in range(4):
        threads = [threading.Thread(target=submit_until_it_dies, args=(
            server.url, 10**6 * (8 * life + i), acknowledged, sent)) for i in range(8)]  # fmt: skip
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.1, 1.0))
        server.kill()
        for thread in threads:
            thread.join()
        server.start()
        listed = server.get("/experiments")
        by_seed = {e["training_config"]["model_seed"]: e for e in listed}
        assert len(by_seed) == len(listed)  # none twice
        assert {seed: by_seed[seed]["experiment_id"] for seed, _ in acknowledged} == dict(acknowledged)
        assert set(by_seed) <= set(sent)  # and none from nowhere
        for seed in rng.sample(sorted(by_seed), min(5, len(by_seed))):  # what the client would send again
            again = requests.post(server.url + "/submit", json=body(model_seed=seed, max_runtime_seconds=2),
                                  headers=KEY, timeout=30)  # fmt: skip
            assert again.status_code == 409
    assert len(acknowledged) > 50
    if backend == "law":
        for e in listed:
            assert server.wait_for(e["experiment_id"], "completed")["used_runtime_seconds"] < 1  # charged 1 s
    expected = len(listed) * (1.0 if backend == "law" else 2.0)
    assert server.get("/budget")["used_seconds"] == expected
    with sqlite3.connect(tmp_path / "api.db") as c:
        assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        ends = c.execute("SELECT experiment, COUNT(*) FROM events WHERE entry LIKE '%\"completed\"%' "
                         "GROUP BY experiment HAVING COUNT(*) > 1").fetchall()  # fmt: skip
        assert ends == []


@needs_sigkill
def test_a_run_that_outlives_its_server_is_queued_again_and_failed_after_three_attempts(tmp_path):
    def life():
        store = api.TrainingAPIStore(tmp_path / "api.db")
        store.seed_users(None)
        return store

    store = life()
    store.write(store.submit, 1, api.parse_config(body()))
    for attempt in range(1, 4):
        ((number, run_id, config, counted),) = store.write(store.dispatch, 1)
        assert (number, counted, config) == (1, attempt, api.parse_config(body()))
        store.write(store.event, 1, dict(log_type="validation_loss", run_id=run_id, val_losses=[5.0]))
        store.close()  # the row stays as a kill leaves it: running
        store = life()
        assert store.write(store.recover) == ((1, 0) if attempt < 3 else (0, 1))
        state, used = ("queued", 30.0) if attempt < 3 else ("failed", 1.0)
        (row,) = store.read("SELECT * FROM experiments")
        assert (row["state"], row["val_losses"]) == (state, "[]")
        assert store.budget(1)["used_seconds"] == used  # reserved once, in the end charged the minimum
        with pytest.raises(api.TrainingAPIError, match="currrently"):  # a worker of the dead server
            store.write(store.finish, 1, api.failed(9.0, []), run_id)
    assert "ServerLost" in row["reason"]
    assert store.write(store.dispatch, 1) == []
    store.close()


def test_an_error_in_one_request_of_a_batch_leaves_the_others_whole(tmp_path):
    store = api.TrainingAPIStore(tmp_path / "api.db")
    store.seed_users(None)
    results, gate = [], threading.Barrier(20)

    def work(i):
        def job(c):
            number = store.submit(c, 1, api.parse_config(body(model_seed=i)))
            if i % 2:
                raise RuntimeError("after the insert")
            return number

        gate.wait()
        try:
            results.append(store.write(job)["experiment_id"])
        except RuntimeError:
            results.append(None)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(filter(None, results)) == list(range(1, 11)) and results.count(None) == 10
    assert store.budget(1)["used_seconds"] == 300
    store.close()


def test_a_disk_that_refuses_the_commit_acknowledges_nothing(tmp_path):
    store = api.TrainingAPIStore(tmp_path / "api.db")
    store.seed_users(None)
    store.write(lambda c: c.execute("PRAGMA user_version").fetchone())
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk
    accepted = 0
    with pytest.raises(sqlite3.Error, match="full"):
        for seed in range(1000):
            store.write(store.submit, 1, api.parse_config(body(model_seed=seed)))
            accepted += 1
    store.connection.execute("PRAGMA max_page_count = 1000000")
    assert len(store.read("SELECT 1 FROM experiments")) == accepted
    assert store.write(store.submit, 1, api.parse_config(body(model_seed=5000)))["experiment_id"] == accepted + 1
    store.close()


# -------------------------------------------------------------------------------------------------
# the law


def test_the_law_answers_at_once_and_always_the_same(serving):
    server = serving(law=api.TrainingAPILaw())
    assert server.ask("POST", "/submit", body()).status_code == 200
    end = time.monotonic() + 20
    while (status := server.ask("GET", "/experiment/1").json()["status"])["status_type"] != "completed":
        assert time.monotonic() < end
    assert status["val_losses"] == api.TrainingAPILaw().run(api.parse_config(body()))["val_losses"]
    assert len(status["val_losses"]) == 16
    assert api.TrainingAPILaw(1).run(api.parse_config(body()))["val_losses"] != status["val_losses"]


def test_the_laws_optimum_is_the_lowest_loss_at_its_flops():
    for seed in range(21):
        law = api.TrainingAPILaw(seed)
        for flops in (1e16, 1e18, 1e21):
            N, D, loss = law.optimum(flops)
            assert 6 * N * D == pytest.approx(flops)
            assert loss < min(law.loss(N * f, D / f) for f in (0.5, 0.99, 1.01, 2))
        N, D, _ = law.optimum(1e18)
        assert seed == 0 or 8 <= D / N <= 40
        best_lr = 1.79 * N**-0.713 * D**0.307
        assert law.loss(N, D) == law.loss(N, D, best_lr) < law.loss(N, D, 2 * best_lr)


def test_a_simulated_run_stops_at_the_first_chunk_past_its_time():
    config = api.parse_config(body(max_runtime_seconds=1))
    N, _ = api.api_parameters(config)
    law = api.TrainingAPILaw(flops_per_s=6 * N * 2**20 / 10)  # the whole run takes 10 s, a chunk 0.625
    result = law.run(config)
    assert result["used_runtime_seconds"] == pytest.approx(1.25)  # 2 chunks: before the third it is late
    assert result["reason"]["reason"] == "timeout" and len(result["reason"]["partial_val_losses"]) == 2


def test_parameters_are_counted_as_the_model_has_them():
    config = api.parse_config(tiny())
    model = lm.TransformerLM(api.api_model_config(config))
    blocks, total = api.api_parameters(config)
    assert total == sum(p.numel() for p in model.parameters())
    assert blocks == total - 2 * 300 * 16


# -------------------------------------------------------------------------------------------------
# real training


def make_run(tokens=40_000, **changes):
    ids = np.random.default_rng(0).integers(0, 300, tokens).astype(np.uint16)
    config = api.parse_config(tiny(**changes))
    return api.TrainingAPIRun(config, ids, ids[:5000], 300, torch.device("cpu"), 2048, lambda **message: None)


def test_adamw_with_eps_root_follows_optax():
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    optimizer = api.TrainingAPIAdamW([p], 0.1, (0.9, 0.95), 1e-8, 0.01)
    optimizer.eps_root = 1e-3
    x, m, v = np.array([[1.0, -2.0]]), 0.0, 0.0
    for t, g in enumerate(np.random.default_rng(0).normal(size=(5, 1, 2)) / 50, 1):
        p.grad = torch.tensor(g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2  # optax.adamw written out
        update = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t) + 1e-3) + 1e-8)
        x = x - 0.1 * (update + 0.01 * x)
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)


def test_the_learning_rate_warms_up_from_its_first_value_and_ends_near_its_last():
    run = make_run(total_train_tokens=512 * 40, optimizer_config={"lr_scheduler": {
        "peak_value": 1.0, "final_lr_frac": 0.1, "warmup_frac": 0.25, "init_value": 0.5}, "eps": 1e-8})  # fmt: skip
    rates = [run.learning_rate(step) for step in range(41)]
    np.testing.assert_allclose(rates[:11], np.linspace(0.5, 1, 11))
    np.testing.assert_allclose(rates[10:], 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(31) / 30)))


def test_training_reads_each_sequence_once_in_an_order_that_batches_do_not_change():
    ids = np.arange(2048 * 512 + 700 * 512 + 1, dtype=np.uint32)
    orders = []
    for batch in (4, 229):
        config = dict(api.parse_config(tiny()), train_batch_size=batch)
        run = object.__new__(api.TrainingAPIRun)
        run.train_ids, run.config, run.device = ids, config, torch.device("cpu")
        firsts = np.concatenate([run.sequences(s)[:, 0].numpy() for s in range(2748 // batch)])
        orders.append(firsts)
    assert len(orders[0]) == 2748 and np.array_equal(np.sort(orders[0]), np.arange(2748) * 512)
    assert np.array_equal(orders[1], orders[0][: len(orders[1])])
    assert np.array_equal(orders[0][:2048], np.random.default_rng(0).permutation(2048) * 512)


def test_a_run_learns_and_two_with_one_seed_are_equal():
    text = np.tile(np.arange(100, dtype=np.uint16), 400)  # each token tells the next
    optimizer = {"lr_scheduler": {"peak_value": 0.02}, "weight_decay": 0.0}
    config = api.parse_config(tiny(total_train_tokens=512 * 32, n_evals=4, train_batch_size=2, optimizer_config=optimizer))
    results = [api.TrainingAPIRun(config, text, text[:5000], 300, torch.device("cpu"), 2048, lambda **m: None).run()
               for _ in range(2)]  # fmt: skip
    losses = results[0]["val_losses"]
    assert losses == results[1]["val_losses"] and len(losses) == 4
    assert losses[0] > losses[-1] and losses[-1] < math.log(300)


def test_sgd_trains_too():
    run = make_run(optimizer_config={"lr_scheduler": {"peak_value": 0.1}})
    before = [p.detach().clone() for p in run.model.parameters()]
    assert run.optimizer is None and run.run()["result_type"] == "completed"
    assert all(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_a_run_out_of_time_ends_before_its_next_chunk(monkeypatch):
    run = make_run(max_runtime_seconds=1)
    clock = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(api.time, "perf_counter", lambda: next(clock))
    result = run.run()
    assert result["used_runtime_seconds"] == 1.5 and len(result["reason"]["partial_val_losses"]) == 1


def test_a_worker_that_hangs_is_ended_and_its_run_failed_as_late(api_server, monkeypatch):
    monkeypatch.setattr(api, "api_hard_limit", lambda limit: 0.5)
    api_server.ask("POST", "/submit", body())
    ((number, run_id, config, _),) = api_server.store.write(api_server.store.dispatch, 1)
    back_end = api.TrainingAPITrainBackEnd(api_server.store, 1, "cpu", {}, 1)
    back_end.link, worker = multiprocessing.Pipe()
    back_end.process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    back_end.process.start()
    for message in ({"kind": "started"}, {"kind": "val_losses", "val_losses": [4.0]}):
        worker.send_bytes(json.dumps(message).encode())
    result = back_end.follow(number, run_id, config)
    assert result["reason"] == {"partial_val_losses": [4.0], "reason": "timeout"}
    assert result["used_runtime_seconds"] > 0.5 and not back_end.process.is_alive()
    assert api_server.ask("GET", "/experiment/1").json()["status"]["val_losses"] == [4.0]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text about {i % 7} things\n" for i in range(20_000)))
    return ["--backend", "train", "--data", str(tmp_path / "text.txt"), "--data_dir", str(tmp_path / "data"),
            "--vocab_size", "300", "--val_tokens", "1024", "--device", "cpu"]  # fmt: skip


LONG = dict(total_train_tokens=512 * 90, n_evals=30, max_runtime_seconds=3600)


@needs_sigkill
def test_real_runs_through_crashes_of_worker_and_server(tmp_path, processes, corpus):
    server = processes(tmp_path / "api.db", *corpus)
    done = server.wait_for(server.submit(tiny()), "completed")
    assert len(done["val_losses"]) == 2 and 0 < done["used_runtime_seconds"] < 60
    small = server.wait_for(server.submit(body({**TINY, "vocab_size": 200})), "failed")
    assert re.match("ValueError: vocab_size must be at least 300", small["reason"]["failure"])
    much = server.wait_for(server.submit(body(TINY, total_train_tokens=2**30)), "failed")
    assert "no token is trained on twice" in much["reason"]["failure"]
    assert server.get("/budget")["used_seconds"] == 2 + max(1, done["used_runtime_seconds"])

    number = server.submit(tiny(model_seed=1, **LONG))  # its worker is killed
    while not server.wait_for(number, "running")["val_losses"]:
        pass
    workers = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True,
                             text=True).stdout.splitlines()  # fmt: skip
    (worker,) = [int(line.split()[0]) for line in workers if "spawn_main" in line]
    os.kill(worker, signal.SIGKILL)
    crashed = server.wait_for(number, "failed")
    assert crashed["reason"] == {"failure": "WorkerCrash: the worker process ended with exit code -9",
                                 "reason": "unexpected"}  # fmt: skip

    number = server.submit(tiny(model_seed=2, **LONG))  # the server is killed
    while not server.wait_for(number, "running")["val_losses"]:
        pass
    before = server.get("/budget")["used_seconds"]
    (worker,) = [int(line.split()[0]) for line in subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True, text=True
    ).stdout.splitlines() if "spawn_main" in line]  # fmt: skip
    server.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the worker outlived its server"
        time.sleep(0.1)
    server.start()
    assert "1 queued again" in server.seen
    assert server.get("/budget")["used_seconds"] == before
    assert len(server.wait_for(number, "completed", seconds=600)["val_losses"]) == 30
    with sqlite3.connect(tmp_path / "api.db") as c:
        logged = [json.loads(e)["log_type"] for (e,) in
                  c.execute("SELECT entry FROM events WHERE experiment = ? ORDER BY id", (number,))]  # fmt: skip
    assert logged.count("dispatched") == 2 and logged.count("completed") == 1 and "preempted" in logged


# -------------------------------------------------------------------------------------------------
# the client


def handout_client_submit(url, value):
    """What the handout's client does with an error, which learners' notebooks match."""
    response = requests.post(f"{url}/submit", json=value, headers=KEY, timeout=30)
    try:
        response.raise_for_status()
    except requests.HTTPError as exc:
        raise RuntimeError(f"{exc}\n{response.text}") from exc
    return response.json()


def test_the_handouts_client_finds_its_words_in_a_duplicates_error(api_server):
    handout_client_submit(api_server.url, body())
    with pytest.raises(RuntimeError, match="409 Client Error: Conflict") as caught:
        handout_client_submit(api_server.url, body())
    assert "experiment already exists" in str(caught.value)


class LosesAnswers(api.TrainingAPIHandler):
    """Does the work of every second POST and hangs up without an answer."""

    count = 0

    def send(self, *args):
        if self.command == "POST":
            type(self).count += 1
            if self.count % 2:
                self.close_connection = True
                return
        super().send(*args)


def test_a_submit_whose_answer_is_lost_is_found_not_sent_twice(api_server, monkeypatch):
    api_server.server.RequestHandlerClass = LosesAnswers
    monkeypatch.setattr(api.time, "sleep", lambda seconds: None)
    client = api.TrainingAPIClient(api_server.url, api.API_KEY)
    for seed in range(5):
        number, budget = client.submit(api.parse_config(body(model_seed=seed)))
        assert number == seed + 1 and budget["used_seconds"] == 30 * number
    assert len(api_server.ask("GET", "/experiments").json()) == 5


def write_plan(tmp_path, count, **more):
    plan = {"experiments": [body(model_seed=i, max_runtime_seconds=100) for i in range(count)], **more}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return ["sweep", "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "results.jsonl")]


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_a_sweep_writes_one_line_a_run_and_does_nothing_twice(tmp_path, serving, capsys):
    server = serving(law=api.TrainingAPILaw())
    argv = [*write_plan(tmp_path, 6), "--url", server.url]
    api.main(argv)
    rows = rows_of(tmp_path)
    assert sorted(row["id"] for row in rows) == list(range(1, 7))
    blocks, total = api.api_parameters(api.parse_config(body()))
    for row in rows:
        assert (row["parameters"], row["parameters_total"], row["tokens"]) == (blocks, total, 2**20)
        assert row["flops"] == 6 * blocks * 2**20 and row["status"] == "completed" and row["charged_s"] == 1.0
        assert row["loss"] == row["val_losses"][-1]
    assert "sweep 6/6" in capsys.readouterr().out
    text = (tmp_path / "results.jsonl").read_text()
    api.main(argv)
    assert (tmp_path / "results.jsonl").read_text() == text
    (tmp_path / "results.jsonl").write_text(text[: len(text) // 2])  # cut in the middle of a line
    api.main(argv)
    assert sorted(row["id"] for row in rows_of(tmp_path)) == list(range(1, 7))
    assert len(server.ask("GET", "/experiments").json()) == 6


def test_a_sweep_says_when_the_contract_makes_sgd_of_a_config(tmp_path, serving, capsys):
    server = serving(law=api.TrainingAPILaw())
    plan = [body(), body(optimizer_config={"lr_scheduler": {"peak_value": 0.01}})]
    (tmp_path / "plan.json").write_text(json.dumps({"experiments": plan}))
    api.main(["sweep", "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "r.jsonl"), "--url", server.url])
    assert "note: 1 of 2 experiments train with SGD" in capsys.readouterr().out


def test_a_sweep_stays_within_the_plans_budget_and_says_what_it_left(tmp_path, serving, capsys):
    server = serving(law=api.TrainingAPILaw())
    api.main([*write_plan(tmp_path, 5, budget_s=102.5), "--url", server.url])  # one at a time, 1 s each
    assert len(rows_of(tmp_path)) == 3
    assert "2 experiments were not submitted" in capsys.readouterr().out
    assert server.ask("GET", "/budget").json()["used_seconds"] == 3


@needs_sigkill
def test_a_sweep_through_kills_of_server_and_client_submits_and_records_each_once(tmp_path, processes):
    server, rng = processes(tmp_path / "api.db", "--backend", "law"), random.Random(time.time_ns())
    argv = [sys.executable, str(ROOT / "serve_part.py"), *write_plan(tmp_path, 150), "--url", server.url]
    for life in range(4):
        client = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        for line in client.stdout:  # has begun
            break
        time.sleep(rng.uniform(0, 0.5))
        if life % 2:
            client.kill()
        server.kill()
        client.wait(20) if life % 2 else None
        server.start()
        client.communicate(timeout=120)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows, listed = rows_of(tmp_path), server.get("/experiments")
    assert sorted(row["config"]["model_seed"] for row in rows) == list(range(150))
    assert len(listed) == 150 and server.get("/budget")["used_seconds"] == 150


def test_submit_prints_the_answer_and_names_the_experiment_that_is_there(tmp_path, api_server, capsys):
    (tmp_path / "config.json").write_text(json.dumps(body()))
    argv = ["submit", str(tmp_path / "config.json"), "--url", api_server.url]
    api.main(argv)
    assert json.loads(capsys.readouterr().out)["experiment_id"] == 1
    assert "got that of experiment 1" in fails(capsys, argv)


# -------------------------------------------------------------------------------------------------
# bad input


def fails(capsys, argv, pattern=""):
    with pytest.raises(SystemExit) as stop:
        api.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(pattern, error), error
    return error


def test_a_port_or_database_in_use_is_one_line(tmp_path, api_server, capsys):
    argv = ["serve", "--db", str(tmp_path / "other.db"), "--port", str(api_server.server.server_port)]
    fails(capsys, argv, "address must be free")
    fails(capsys, ["serve", "--db", str(tmp_path / "api.db"), "--port", "0"], "stop the other server")
    c = sqlite3.connect(tmp_path / "locked.db")
    c.execute("CREATE TABLE t (a)")
    c.execute("BEGIN EXCLUSIVE")
    fails(capsys, ["serve", "--db", str(tmp_path / "locked.db"), "--port", "0"], "database is locked")
    c.close()
    (tmp_path / "text.db").write_text("no database at all, but long enough to be one " * 100)
    fails(capsys, ["serve", "--db", str(tmp_path / "text.db"), "--port", "0"], "not a database")


@pytest.mark.parametrize("text, pattern", [
    ("", "sunet_id,api_key"), ("name,key\na,1\n", "sunet_id"), ("sunet_id,api_key\n", "one row a user"),
    ("sunet_id,api_key\na,1\nb,1\n", "different"), ("sunet_id,api_key\na\n", "one row"),
])  # fmt: skip
def test_bad_users_are_one_line(tmp_path, capsys, text, pattern):
    (tmp_path / "users.csv").write_text(text)
    fails(capsys, ["serve", "--db", str(tmp_path / "a.db"), "--users", str(tmp_path / "users.csv")], pattern)


def test_other_users_than_the_database_has_are_refused(tmp_path, capsys):
    for name, key in (("a", "1"), ("b", "2")):
        (tmp_path / f"{name}.csv").write_text(f"sunet_id,api_key\n{name},{key}\n")
    store = api.TrainingAPIStore(tmp_path / "api.db")
    store.seed_users(api.read_users(tmp_path / "a.csv"))
    assert store.seed_users(None) == store.seed_users([("a", "1")]) == [(1, "a", "1")]
    store.close()
    argv = ["serve", "--db", str(tmp_path / "api.db"), "--port", "0", "--users", str(tmp_path / "b.csv")]
    fails(capsys, argv, "made with")


@pytest.mark.parametrize("more, pattern", [
    (["--law_seed", "1", "--backend", "none"], "--law_seed must go with --backend law"),
    (["--data", "x"], "--data must go with --backend train"),
    (["--backend", "train", "--data", "no/such.txt"], "no/such.txt"),
])  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, capsys, more, pattern):
    fails(capsys, ["serve", "--db", str(tmp_path / "a.db"), "--port", "0", *more], pattern)


@pytest.mark.parametrize("text, pattern", [
    ("", "must hold JSON"), ("[]", "experiments"), ('{"experiments": []}', "one at least"),
    ('{"experiments": [{}]}', "experiment 1 of .* architecture_config: Field required"),
    (json.dumps({"experiments": [body(), body(n_evals=3)]}), "experiment 2 .*divisible by n_evals"),
    (json.dumps({"experiments": [body(), body()]}), "must differ, got number 2"),
    (json.dumps({"experiments": [body()], "budget_s": -1}), "budget_s"),
    (json.dumps({"experiments": [body()], "budget_s": float("nan")}), "budget_s"),
])  # fmt: skip
def test_bad_plans_are_one_line(tmp_path, api_server, capsys, text, pattern):
    (tmp_path / "plan.json").write_text(text)
    fails(capsys, ["sweep", "--plan", str(tmp_path / "plan.json"), "--url", api_server.url, "--out",
                   str(tmp_path / "r.jsonl")], pattern)  # fmt: skip


def test_a_wrong_key_a_wrong_url_and_a_wrong_results_file_are_one_line(tmp_path, api_server, capsys, monkeypatch):
    monkeypatch.setattr(api.time, "sleep", lambda seconds: None)
    argv = write_plan(tmp_path, 1)
    fails(capsys, [*argv, "--url", api_server.url, "--key", "0"], "401 .*check --key")
    fails(capsys, [*argv, "--url", f"http://127.0.0.1:{free_port()}"], "must answer, got ConnectionError")
    fails(capsys, [*argv, "--url", "nonsense"], "check --url")
    (tmp_path / "results.jsonl").write_text("not json\n")
    fails(capsys, [*argv, "--url", api_server.url], "results of a sweep")
