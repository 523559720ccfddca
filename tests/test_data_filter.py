"""data_filter.py: records, text, personal data, rules, and runs that are killed, stopped, refused."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
import data_filter
from data_filter import (
    EMAIL_MASK,
    IP_MASK,
    PHONE_MASK,
    extract_text_from_html_bytes,
    gopher_quality_filter,
    mask_emails,
    mask_ips,
    mask_phone_numbers,
    read_records,
)

ROOT = Path(data_filter.__file__).parent
NOUNS = (
    "river house garden teacher story winter market engine village letter doctor music "
).split()
VERBS = (
    "finds leaves watches builds carries remembers paints follows repairs describes "
).split()
ENDS = ("before the rain", "in the old town", "with a friend", "for many years", "near the sea")


def prose(seed, sentences=12):
    """English that no rule drops, different for each seed."""
    rng = random.Random(seed)
    return " ".join(
        f"The {rng.choice(NOUNS)} of {seed} that you have seen {rng.choice(VERBS)} the "
        f"{rng.choice(NOUNS)} {rng.choice(ENDS)} and it is to be {rng.randint(1, 99)} times better."
        for _ in range(sentences))


def page(seed, sentences=12):
    paragraphs = "".join(f"<p>{prose(f'{seed}{part}', sentences)}</p>" for part in "abc")
    return (f"<html><head><title>Page {seed}</title></head><body><nav><a href=/>Home</a></nav>"
            f"<article><h1>Page {seed}</h1>{paragraphs}</article></body></html>").encode()


def record(kind, body, url="http://example.com/", content_type="application/http; msgtype=response"):
    return (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n").encode() \
        + body + b"\r\n\r\n"


def response(html, headers="Content-Type: text/html", url="http://example.com/", status="200 OK"):
    return record("response", f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + html, url)


def write_warc(path, records, members=True):
    """members: a gzip member for each record, as archives are written; None: no gzip."""
    if members is None:
        path.write_bytes(b"".join(records))
    else:
        path.write_bytes(b"".join(map(gzip.compress, records)) if members
                         else gzip.compress(b"".join(records)))
    return path


@pytest.fixture
def warc(tmp_path):
    records = [record("warcinfo", b"software: test", content_type="application/warc-fields")]
    records += [response(page(n), url=f"http://example.com/{n}") for n in range(8)]
    return write_warc(tmp_path / "a.warc.gz", records)


# ---------------------------------------------------------------- records

@pytest.mark.parametrize("members", [True, False, None])
def test_records_are_the_same_however_the_archive_is_packed(tmp_path, members):
    records = [record("warcinfo", b"x", content_type="application/warc-fields"),
               record("request", b"GET / HTTP/1.0\r\n\r\n"),
               response(b"<p>one</p>", url="http://a/"), response(b"<p>two</p>", url="http://b/")]
    others = Counter()
    found = list(read_records(write_warc(tmp_path / "x.warc", records, members), others=others))
    assert [(r.url, r.data, r.problem) for r in found] == [
        ("http://a/", b"<p>one</p>", None), ("http://b/", b"<p>two</p>", None)]
    assert others == {"warcinfo": 1, "request": 1}


@pytest.mark.parametrize("members", [True, False, None])
def test_reading_goes_on_after_any_record(tmp_path, members):
    records = [response(f"<p>{n}</p>".encode()) for n in range(5)]
    path = write_warc(tmp_path / "x.warc", records, members)
    all_records = list(read_records(path))
    for n, before in enumerate(all_records):
        after = [r.data for r in read_records(path, before.place)]
        assert after == [r.data for r in all_records[n + 1:]]


def test_chunks_and_content_encodings_are_undone(tmp_path):
    html = b"<p>" + b"word " * 300 + b"</p>"
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(html[i:i + 99]), html[i:i + 99])
                       for i in range(0, len(html), 99)) + b"0\r\n\r\n"
    deflate = zlib.compressobj(wbits=-15)
    bodies = [("Transfer-Encoding: chunked", chunked),
              ("Content-Encoding: gzip", gzip.compress(html)),
              ("Content-Encoding: gzip", html),  # decoded already, header kept
              ("Content-Encoding: deflate", zlib.compress(html)),
              ("Content-Encoding: deflate", deflate.compress(html) + deflate.flush()),
              ("Transfer-Encoding: chunked", html)]
    path = write_warc(tmp_path / "x.warc.gz", [
        response(body, f"Content-Type: text/html\r\n{header}") for header, body in bodies])
    assert [r.data for r in read_records(path)] == [html] * len(bodies)


def test_broken_and_truncated_members_cost_only_themselves(tmp_path):
    members = [gzip.compress(response(page(n), url=f"http://{n}/")) for n in range(5)]
    broken = bytearray(members[1])
    broken[40:60] = bytes(20)
    path = tmp_path / "x.warc.gz"
    path.write_bytes(members[0] + bytes(broken) + members[2] + members[3][:200] + members[4]
                     + members[0][:-30])
    found = list(read_records(path))
    assert [r.url for r in found if not r.problem] == ["http://0/", "http://2/", "http://4/"]
    assert [r.problem for r in found if r.problem] == [
        "broken gzip member", "broken gzip member", "truncated gzip member"]


def test_broken_records_without_gzip_cost_only_themselves(tmp_path):
    path = tmp_path / "x.warc"
    path.write_bytes(response(b"<p>1</p>") + b"\nnonsense\n" + response(b"<p>2</p>")
                     + response(b"<p>3</p>")[:-20])
    found = list(read_records(path))
    assert [r.data for r in found if not r.problem] == [b"<p>1</p>", b"<p>2</p>"]
    assert [r.problem for r in found if r.problem] == ["no record header", "truncated record"]


def test_what_is_no_page_is_named(tmp_path):
    path = write_warc(tmp_path / "x.warc.gz", [
        response(b"\x89PNG", "Content-Type: image/png"), response(b"gone", status="404 Not Found"),
        response(b"x", "Content-Type: text/html\r\nContent-Encoding: br"), response(b"")])
    assert [r.problem for r in read_records(path)] == [
        "content type", "HTTP status not 2xx", "content encoding br", "empty"]


def test_a_record_too_large_to_hold_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(data_filter, "MAX_RECORD", 10_000)
    records = [response(b"<p>1</p>"), response(b"x" * 50_000), response(b"<p>2</p>")]
    for members in (True, False, None):
        found = list(read_records(write_warc(tmp_path / "x.warc", records, members)))
        assert [r.data for r in found if not r.problem] == [b"<p>1</p>", b"<p>2</p>"], members
        assert [r.problem for r in found if r.problem] == ["record too large"], members


@pytest.mark.parametrize("data", [b"", b"<html></html>", gzip.compress(b"<html>"), b"\x1f\x8b\x08x"])
def test_a_file_that_is_no_warc_is_refused(tmp_path, data):
    (tmp_path / "x.warc.gz").write_bytes(data)
    with pytest.raises(ValueError, match="x.warc.gz"):
        list(read_records(tmp_path / "x.warc.gz"))


# ---------------------------------------------------------------- text

@pytest.mark.parametrize(("data", "content_type", "text"), [
    ("\ufeffé".encode("utf-16-le"), None, "é"),
    ("<p>é".encode("cp1252"), "text/html; charset=ISO-8859-1", "é"),
    ("<meta charset=koi8-r><p>Москва".encode("koi8-r"), None, "Москва"),
    ("<meta charset=koi8-r><p>Москва".encode(), "text/html; charset=utf-8", "Москва"),
    ("<p>“é”".encode(), None, "“é”"),
    (b"<p>" + "é".encode() * 3000 + b"\xff", None, "é" * 3000 + "\ufffd"),
    ("<meta http-equiv=Content-Type content='text/html; charset=gb2312'><p>中文".encode("gb18030"),
     None, "中文"),
    ("<meta charset=utf-8><p>café déjà".encode("cp1252"), None, "café déjà"),
    ("<p>Это обычный русский текст о погоде и о том, что было вчера".encode("cp1251"), None,
     "Это обычный русский текст о погоде и о том, что было вчера"),
    ("<p>これは日本語の文章です。とてもおもしろい。".encode("euc_jp"), None,
     "これは日本語の文章です。とてもおもしろい。"),
    ("<p>これは日本語の文章です。とてもおもしろい。".encode("cp932"), None,
     "これは日本語の文章です。とてもおもしろい。"),
])
def test_the_encoding_is_found_in_the_order_of_the_standard(data, content_type, text):
    assert extract_text_from_html_bytes(data, content_type=content_type) == text


@pytest.mark.parametrize(("html", "text"), [
    ("<h1>Hi</h1><div><p>One <b>two</b>.</p><p>Three</p></div>", "Hi\n\nOne two.\n\nThree"),
    ("<div>a</div><div>b</div>c<br>d", "a\nb\nc\nd"),
    ("<ul><li>a</li><li>b<ul><li>n</li></ul></li></ul><ol><li>x<li>y</ol>z",
     "  • a\n  • b\n    • n\n  1. x\n  2. y\nz"),
    ("<table><tr><th>A<th>B<tr><td>1<td>2</table>after", "A\t\tB\n1\t\t2\nafter"),
    ("<pre>a  b\n  c</pre>x", "a  b\n  c\nx"),
    ("<p>a<br><br>b</p>", "a\n\nb"),
    ("a<script>if (a < b) x()</script><style>p {}</style><!-- c --> &amp; b", "a & b"),
    ("<p title='a > b'>x</p><a href=\"javascript:'>'\">y</a>", "x\n\ny"),
    ("<p>a<noscript>no</noscript><template>t</template><svg><text>s</text></svg> b", "a b"),
    ("", ""), ("<", "<"), ("a < b > c", "a < b > c"),
])
def test_plain_text_has_the_layout_that_a_reader_sees(html, text):
    assert extract_text_from_html_bytes(html.encode()) == text


def test_main_text_is_without_menus_banners_and_footers():
    html = f"""<body><div class="cookie-banner">We use cookies to improve.</div>
        <nav><ul><li><a href=/>Home</a><li><a href=/b>Blog</a></ul></nav>
        <article class="post-content"><h1>A walk</h1><p>{prose('a')}</p><p>{prose('b')}</p></article>
        <div class="related-posts"><a href=/c>Another story</a><a href=/d>One more</a></div>
        <footer>Copyright 2024 Example Inc. All rights reserved.</footer></body>"""
    text = extract_text_from_html_bytes(html.encode(), "main")
    assert prose("a") in text and prose("b") in text
    for other in ("cookies", "Home", "Another story", "Copyright"):
        assert other not in text


def test_an_article_that_only_json_ld_has_is_found():
    body = json.dumps({"articleBody": prose("a", 20)})
    html = f"<script type='application/ld+json'>{body}</script><div id=app>Loading page</div>"
    assert extract_text_from_html_bytes(html.encode(), "main") == prose("a", 20)


@pytest.mark.parametrize("mode", ["plain", "main"])
@pytest.mark.parametrize("html", [
    "<div>" * 20_000 + "x", "<a '" * 50_000, "<p \"" * 50_000, '<a "<a" ' * 30_000, "<" * 200_000,
    "<!--" * 50_000, "<svg>" * 50_000 + "</svg>", "<table><tr><td colspan=9007199254740991>x",
    "&#1114112;&#x110000;&lt" * 1000, "</p>" * 100_000, "<ul><li>" * 20_000 + "x", "\0" * 1000,
    "<select>" * 1000 + "x", "<script " * 50_000, "<!" * 50_000, "<svg " * 50_000 + "</svg>", "<td>" * 50_000, "<p>x" * 30_000])
def test_hostile_pages_end(html, mode):
    assert isinstance(extract_text_from_html_bytes(html.encode(), mode), str)


def test_random_bytes_and_cut_pages_never_raise():
    rng = random.Random(0)
    whole = page(1)
    tags = [b"<p>", b"</", b"<li>", b"<td", b">", b"'", b'"', b"&amp", b"<a href=", b"x ", b"<!--"]
    for _ in range(300):
        for data in (rng.randbytes(50), whole[:rng.randrange(len(whole))],
                     b"".join(rng.choices(tags, k=40))):
            for mode in ("plain", "main"):
                extract_text_from_html_bytes(data, mode)


# ---------------------------------------------------------------- personal data

@pytest.mark.parametrize(("text", "masked"), [
    ("a.b+c@sub.example.co.uk", EMAIL_MASK), ("write to x@y.org.", f"write to {EMAIL_MASK}."),
    ("logo@2x.png", None), ("@name", None), ("a@b", None), ("git@github.com:a/b.git", None),
    ("pip install x@1.2.3", None)])
def test_emails_are_masked(text, masked):
    assert mask_emails(text) == (masked or text, int(masked is not None))


@pytest.mark.parametrize("number", [
    "2831823829", "(283)-182-3829", "(283) 182-3829", "283-182-3829", "283.182.3829",
    "+1 283 182 3829", "+12831823829", "1-800-555-0199", "283 182 3829", "(283)182-3829",
    "416-555-0123 ext. 44", "345-899-3560x4587"])
def test_us_and_canadian_numbers_are_masked(number):
    text = "Feel free to contact me at {} if you have any questions."
    assert mask_phone_numbers(text.format(number)) == (text.format(PHONE_MASK), 1)


@pytest.mark.parametrize("trap", [
    "4532 1234 5678 9012", "378282246310005", "3782 822463 10005", "2021-03-04", "ISBN 0306406152",
    "order 4155552671", "123-45-6789", "id=4155552671", "550e8400-e29b-41d4-a716-446655440000",
    "10.1000/182", "$4155552671", "5105105105105100", "1616161616", "v2.345.678.9012",
    "tracking number 4155552671", "GB29 NWBK 6016 1331 9268 19"])
def test_other_numbers_are_no_telephones(trap):
    assert mask_phone_numbers(f"See {trap} there.") == (f"See {trap} there.", 0)


@pytest.mark.parametrize(("text", "masked"), [
    ("192.0.2.146", IP_MASK), ("http://10.0.0.1:80/", f"http://{IP_MASK}:80/"),
    ("10.0.0.0/24", f"{IP_MASK}/24"), ("from 8.8.8.8.", f"from {IP_MASK}."), ("256.1.1.1", None),
    ("1.2.3.4.5", None), ("v1.2.3.4", None), ("version 1.2.3.4", None), ("Chrome/91.0.44.12", None),
    ("01.02.03.04", None), ("tool-1.2.3.4", None)])
def test_addresses_of_the_net_are_masked(text, masked):
    assert mask_ips(text) == (masked or text, int(masked is not None))


def test_masked_text_is_stable():
    rng = random.Random(1)
    pieces = ["283-182-3829", "2831823829", "a@b.com", "1.2.3.4", " ", "-", ".", "/", "x", "1", "@",
              "+1", "(283) ", "|", "\n"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=6))
        for mask in (mask_emails, mask_phone_numbers, mask_ips):
            text, _ = mask(text)
            assert mask(text) == (text, 0)


# ---------------------------------------------------------------- rules

@pytest.mark.parametrize(("text", "passes"), [
    ("The string you are reading is a short snippet of text.", False),
    ("The string you are reading. " * 10, True), ("word " * 100_001, False),
    ("the be " * 100, False), ("antidisestablishmentarianism " * 100, False),
    ("A line here is an example of an end...\n" * 40, False),
    ("A line here is an example of an end.\n" * 40, True), ("1234 " * 30 + "text " * 70, False)])
def test_the_rules_of_the_handout(text, passes):
    assert gopher_quality_filter(text) is passes


@pytest.mark.parametrize(("name", "text"), [
    ("symbol_to_word_ratio", "word # " * 50), ("bullet_lines", "- a line here\n" * 20),
    ("stop_words", "cat dog " * 50), ("duplicate_lines", "one line\n" * 10),
    ("duplicate_paragraphs", "one line\n\n" * 10), ("top_ngrams", "same words " * 50),
    ("duplicate_ngrams", prose(1, 3) * 3), ("c4_page", "lorem ipsum dolor. A. B. C."),
    ("c4_page", "a { b. c. d. e."), ("fineweb_terminal_lines", "no end\n" * 10),
    ("fineweb_short_lines", "short.\n" * 10), ("fineweb_duplicate_lines", "a line.\n" * 3),
    ("fineweb_newlines", "a\nb\nc\n")])
def test_each_rule_drops_its_example_and_keeps_prose(name, text):
    rule = getattr(data_filter, name)
    assert not rule(data_filter.Document(text))
    license_text = (ROOT / "LICENSE").read_text()
    assert rule(data_filter.Document(license_text if "ngrams" in name else "\n\n".join(
        prose(n, 3) for n in range(5))))


def test_c4_keeps_whole_sentences_only():
    text = "This line is a whole sentence.\nMenu\nPlease enable javascript in your browser.\nEnds..."
    assert data_filter.clean_c4_lines(text + "[1]") == "This line is a whole sentence."


# ---------------------------------------------------------------- runs

def run(warc, out_dir, *flags):
    return data_filter.main(["run", "--input", str(warc), "--out_dir", str(out_dir), "--num_workers",
                             "2", "--vocab_size", "300", *flags])


def digest(out_dir):
    return [hashlib.sha256((out_dir / name).read_bytes()).hexdigest()
            for name in ("clean.txt", "kept.jsonl", "tokens.bin", "dropped.jsonl")]


def test_a_run_gives_text_tokens_and_a_report_whose_sums_close(warc, tmp_path, capsys):
    out = tmp_path / "out"
    more = [response(page(9)), response(page(9), url="http://example.com/copy"),
            response(page("pii").replace(b"<p>", b"<p>Write to me@example.org, <|endoftext|> or ")),
            response(b"<p>Kurzer Text</p>"), response(b"x", "Content-Type: image/png")]
    write_warc(tmp_path / "b.warc.gz", more)
    assert run(tmp_path / "*.warc.gz", out, "--no_line_dedup") == 0
    documents = (out / "clean.txt").read_text().split(bpe.END_OF_TEXT)
    assert documents.pop() == "" and len(documents) == 10
    assert sum(EMAIL_MASK in text for text in documents) == 1
    ids, meta = bpe.read_tokens(out / "tokens.bin", bpe.Tokenizer.load(out / "tokenizer.json"))
    assert meta["documents"] == 10 and meta["dtype"] == "uint16" and len(ids) == meta["tokens"]
    report = json.loads((out / "report.json").read_text())
    came = None
    for stage in report["stages"]:
        assert came in (None, stage["documents_in"])
        came = stage["documents_out"]
        dropped = sum(reason["documents"] for reason in stage["reasons"].values())
        assert stage["documents_in"] - dropped == stage["documents_out"]
        assert stage["characters_in"] - stage["characters_dropped"] + stage["characters_changed"] \
            == stage["characters_out"]
    assert came == 10 and {s["stage"] for s in report["stages"]} >= {"records", "rules", "copies"}
    capsys.readouterr()
    assert data_filter.main(["inspect", "--out_dir", str(out), "--kept", "2", "--dropped", "3"]) is None
    shown = capsys.readouterr().out
    assert shown.count("--- kept") == 2 and shown.count("--- dropped") == 3


def test_lines_that_occur_twice_are_dropped_everywhere(warc, tmp_path):
    assert run(warc, tmp_path / "out", "--no_copies") == 0
    text = (tmp_path / "out" / "clean.txt").read_text()
    lines = text.replace(bpe.END_OF_TEXT, "\n").strip().split("\n")
    assert len(lines) == len(set(lines)) > 8


def test_the_result_does_not_depend_on_the_number_of_workers(warc, tmp_path):
    write_warc(tmp_path / "b.warc.gz", [response(page(n)) for n in range(20, 25)])
    for workers in "13":
        run(tmp_path / "*.warc.gz", tmp_path / workers, "--num_workers", workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "3")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo and torchrun, tried on Linux only")
def test_two_ranks_give_what_one_gives(warc, tmp_path):
    write_warc(tmp_path / "b.warc.gz", [response(page(n)) for n in (1, 2, 30, 31)])
    run(tmp_path / "*.warc.gz", tmp_path / "one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                    "2", str(ROOT / "data_filter.py"), "run", "--input", str(tmp_path / "*.warc.gz"),
                    "--out_dir", str(tmp_path / "two"), "--num_workers", "1", "--vocab_size", "300"],
                   check=True, timeout=300, capture_output=True)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


DRIVER = """
import os, sys, time
import data_filter
data_filter.CHECKPOINT_BYTES = 2000
judge = data_filter.Judge.judge
def slow(self, record):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return judge(self, record)
data_filter.Judge.judge = slow
sys.exit(data_filter.main(sys.argv[1:]))
"""


def start(inputs, out, slow=0.0, driver=DRIVER):
    return subprocess.Popen(
        [sys.executable, "-c", driver, "run", "--input", str(inputs), "--out_dir", str(out),
         "--num_workers", "2", "--vocab_size", "300"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"SLOW": str(slow)})


def children(pid):
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")
def test_killed_at_random_times_a_run_goes_on_to_the_same_output(tmp_path):
    rng = random.Random(5)
    for name in "abc":
        write_warc(tmp_path / f"{name}.warc.gz", [
            response(page(f"{name}{n}", 4), url=f"http://{name}/{n}") for n in range(60)])
    inputs = tmp_path / "*.warc.gz"
    process = start(inputs, tmp_path / "whole")
    assert process.wait(120) == 0, process.stdout.read()
    kills = 0
    for who in ("worker", "parent", "both", "worker", "parent", "both", "parent"):
        process = start(inputs, tmp_path / "killed", slow=0.05)  # 4.5 s of work, whatever the machine
        time.sleep(rng.uniform(0.4, 0.9))
        workers = children(process.pid)
        for pid in (workers[:1] if who == "worker" else
                    [process.pid] if who == "parent" else [process.pid, *workers]):
            kills += process.poll() is None
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if who == "worker":
            process.terminate()
        process.wait(60)
    process = start(inputs, tmp_path / "killed")
    assert process.wait(120) == 0, process.stdout.read()
    assert kills > 3
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_page_that_hangs_kills_or_eats_memory_costs_that_page(tmp_path, monkeypatch, capsys):
    write_warc(tmp_path / "a.warc.gz", [response(page(n), url=f"http://x/{n}") for n in range(8)])
    plain = data_filter.extract_text_from_html_bytes

    def extract(data, mode, content_type):
        if b"Page 2" in data:
            while True:
                pass
        if b"Page 3" in data:
            return "x" * (1 << 40)
        if b"Page 6" in data:
            raise IndexError
        if b"Page 4" in data:
            os.kill(os.getpid(), signal.SIGKILL)
        if b"Page 5" in data:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            time.sleep(1000)
        return plain(data, mode, content_type)

    monkeypatch.setattr(data_filter, "extract_text_from_html_bytes", extract)
    monkeypatch.setattr(data_filter, "PAGE_LIMIT_S", 0.3)
    monkeypatch.setattr(data_filter, "STUCK_S", 2)
    assert run(tmp_path / "a.warc.gz", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {r: v["documents"] for stage in report["stages"] for r, v in stage["reasons"].items()}
    assert reasons == {"time limit": 1, "memory limit": 1, "killed its worker": 2,
                       "error IndexError": 1}
    assert report["stages"][-1]["documents_out"] == 3


def test_sigterm_stops_a_run_that_then_goes_on(tmp_path):
    write_warc(tmp_path / "a.warc.gz", [response(page(n, 4)) for n in range(150)])
    process = start(tmp_path / "a.warc.gz", tmp_path / "out", slow=0.02)
    while not list((tmp_path / "out").glob("parts/*.journal")) and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "goes on" in output
    assert run(tmp_path / "a.warc.gz", tmp_path / "out") == 0


def test_a_full_disk_stops_a_run_that_then_goes_on(warc, tmp_path, monkeypatch, capsys):
    def full(self, which, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data_filter.Shard, "write", full)
        with pytest.raises(SystemExit) as stop:
            run(warc, tmp_path / "out")
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert run(warc, tmp_path / "out") == 0


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        data_filter.main(list(map(str, arguments)))
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("data_filter.py: error: ")
    return message


def test_bad_input_is_refused_in_one_line(warc, tmp_path, capsys):
    empty = tmp_path / "empty.warc"
    empty.touch()
    out = ["--out_dir", tmp_path / "out"]
    assert "empty file" in refused(capsys, "run", "--input", empty, *out)
    assert "WARC" in refused(capsys, "run", "--input", tmp_path / "none*", *out)
    (tmp_path / "folder").mkdir()
    assert "WARC" in refused(capsys, "run", "--input", tmp_path / "folder", *out)
    assert "--rules" in refused(capsys, "run", "--input", warc, "--rules", "golfer", *out)
    assert "--threshold" in refused(capsys, "run", "--input", warc, "--threshold", "a.b=1", *out)
    assert "65,536" in refused(capsys, "run", "--input", warc, "--vocab_size", "70000", *out)
    assert "write into" in refused(capsys, "run", "--input", warc, "--out_dir", empty)
    foreign = tmp_path / "model.bin"
    foreign.write_bytes(b"not a model" * 10)
    assert "model.bin" in refused(capsys, "run", "--input", warc, "--language_model", foreign, *out)
    assert "inspect" not in refused(capsys, "inspect", "--out_dir", tmp_path)


def test_thresholds_that_drop_everything_are_named(warc, tmp_path, capsys):
    message = refused(capsys, "run", "--input", warc, "--out_dir", tmp_path / "out", "--threshold",
                      "word_count.low=5000")
    assert "word_count: 8" in message and (tmp_path / "out" / "report.json").exists()
    message = refused(capsys, "run", "--input", warc, "--out_dir", tmp_path / "out")
    assert "threshold" in message
    assert run(warc, tmp_path / "out", "--overwrite") == 0


def test_blocklist_and_decontamination_drop_their_documents(warc, tmp_path):
    write_warc(tmp_path / "b.warc.gz", [response(page("b"), url="https://www.bad.example/x")])
    (tmp_path / "block").write_text("bad.example\n")
    (tmp_path / "valid.txt").write_text(prose("3b"))
    run(tmp_path / "*.warc.gz", tmp_path / "out", "--blocklist", str(tmp_path / "block"),
        "--decontaminate", str(tmp_path / "valid.txt"), "--decontaminate_ngram", "60")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {r: v["documents"] for stage in report["stages"] for r, v in stage["reasons"].items()}
    assert reasons == {"blocklist": 1, "shares words with the validation text": 1}


def test_a_list_of_paths_takes_local_copies(warc, tmp_path):
    paths = tmp_path / "wet.paths.gz"
    paths.write_bytes(gzip.compress(f"crawl-data/x/{warc.name}\ncrawl-data/y.wet.gz\n".encode()))
    assert data_filter.list_inputs([str(paths)]) == [
        str(warc), "https://data.commoncrawl.org/crawl-data/y.wet.gz"]


def test_wet_records_are_taken_as_they_are(tmp_path):
    texts = [f"A title\n{prose(n)}" for n in range(4)]
    write_warc(tmp_path / "a.warc.wet.gz", [
        record("conversion", text.encode(), f"http://x/{n}", "text/plain")
        for n, text in enumerate(texts)])
    run(tmp_path / "a.warc.wet.gz", tmp_path / "out", "--no_line_dedup", "--no_copies")
    assert (tmp_path / "out" / "clean.txt").read_text() == "".join(
        f"{text}{bpe.END_OF_TEXT}" for text in texts)


def test_extract_prints_the_text_of_a_page(tmp_path, capsys):
    (tmp_path / "x.html").write_bytes(b"<h1>Moby</h1><p>Call me Ishmael.</p>")
    data_filter.main(["extract", "--input", str(tmp_path / "x.html")])
    assert capsys.readouterr().out == "Moby\n\nCall me Ishmael.\n"
