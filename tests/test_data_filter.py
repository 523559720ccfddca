"""data_filter.py: records, text, personal data, rules, and runs that are killed, stopped, refused."""

import contextlib
import doctest
import gzip
import hashlib
import http.server
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
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
    mask_pii,
    read_records,
)

ROOT = Path(data_filter.__file__).parent
NOUNS = ["river", "house", "garden", "teacher", "story", "winter", "market", "engine", "village",
         "letter", "doctor", "music"]
VERBS = ["finds", "leaves", "watches", "builds", "carries", "remembers", "paints", "follows",
         "repairs", "describes"]
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

FIRST, SECOND = response(b"<p>a", url="http://a/"), response(b"<p>b", url="http://b/")


@pytest.mark.parametrize("data", [
    b"\r\n\r\n" + FIRST + SECOND, gzip.compress(b"\n" + FIRST) + gzip.compress(SECOND),
    gzip.compress(b"") + gzip.compress(FIRST) + gzip.compress(SECOND),
    gzip.compress(b"") + gzip.compress(b"\r\n" + FIRST) + gzip.compress(SECOND),
    (FIRST + SECOND).replace(b"URI: ", b"URI:\r\n ")], ids=["blank", "blank.gz", "empty", "both", "folded"])
def test_blank_lines_and_an_empty_member_before_records_and_folded_fields_are_legal(tmp_path, data):
    (tmp_path / "a.warc").write_bytes(data)
    assert [(r.url, r.data, r.problem) for r in read_records(tmp_path / "a.warc")] == [
        ("http://a/", b"<p>a", None), ("http://b/", b"<p>b", None)]


@pytest.mark.parametrize(("pack", "header", "problem"), [
    (lambda b: gzip.compress(b[:9]) + gzip.compress(b[9:]), "Content-Encoding: gzip", None),
    (gzip.compress, "Transfer-Encoding: gzip, chunked", None),
    (gzip.compress, "Content-Encoding: gzip\r\nContent-Encoding: identity", None),
    (lambda b: b, "Content-Encoding: gzip", None),
    (lambda b: gzip.compress(gzip.compress(b)), "Content-Encoding: gzip", "broken content encoding")])
def test_a_gzip_body_is_unpacked_whatever_its_header_says(tmp_path, pack, header, problem):
    path = write_warc(tmp_path / "a.warc", [response(pack(page(1)), f"Content-Type: text/html\r\n{header}")])
    found, = read_records(path)
    assert (found.data, found.problem) == (b"" if problem else page(1), problem)


def test_chunks_without_end_are_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(data_filter, "MAX_CHUNKS", 3)
    assert data_filter.undo_chunks(b"1\r\na\r\n" * 9) == b"aaa"


@pytest.mark.parametrize(("label", "name"), [
    ("windows-874", "cp874"), ("Windows-31J", "cp932"), ("windows-949", "cp949"),
    ("iso88592", "iso8859-2"), ("x-mac-ukrainian", "mac-cyrillic"), ("windows-1252", "cp1252")])
def test_labels_of_the_encoding_standard_are_known(label, name):
    assert data_filter.python_encoding(label) == name


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


def damaged(data, seed):
    """Bytes that are whole (seed 0), cut, flipped, missing in the middle, or with junk among them."""
    rng, data = random.Random(seed), bytearray(data)
    at = rng.randrange(400, len(data) - 20)
    kind = (lambda: None, lambda: data.__delitem__(slice(at, None)),
            lambda: data.__setitem__(at, data[at] ^ 1 << rng.randrange(8)),
            lambda: data.__delitem__(slice(at, at + rng.randint(1, 60))),
            lambda: data.__setitem__(slice(at, at), rng.randbytes(rng.randint(1, 200))))
    kind[seed % len(kind)]()
    return bytes(data)


@pytest.mark.parametrize("members", [True, False, None])
def test_reading_goes_on_after_any_record_as_a_full_reading_does(tmp_path, members, monkeypatch):
    monkeypatch.setattr(data_filter, "MAX_RECORD", 10_000)
    records = [response(prose(n).encode(), url=f"http://{n}/") for n in range(6)]
    records[1] = records[1].replace(b"Content-Length: ", b"Content-Length: 9")  # far beyond its end
    records[3] = records[3].replace(b"Content-Length: ", b"Content-Length: x")
    records[4] = response(bytes(30_000))
    records.insert(2, record("request", b"GET / HTTP/1.0\r\n\r\n"))
    if members:  # several in one member, too
        records[4:6] = [b"".join(records[4:6])]
    path = tmp_path / "x.warc"
    whole = write_warc(path, records, members).read_bytes()
    for seed in range(40):
        path.write_bytes(damaged(whole, seed))
        full_others, others = Counter(), Counter()
        full = list(read_records(path, others=full_others))
        assert len({r.place for r in full}) == len(full)
        for n, before in enumerate(full):
            assert list(read_records(path, before.place)) == full[n + 1:], (seed, before.place)
        if len(full) > 3:
            list(islice(read_records(path, others=others), 3))
            list(read_records(path, full[2].place, others))
            assert others == full_others


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


def test_a_header_ends_at_its_first_empty_line_and_may_be_folded(tmp_path):
    bodies = [b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n<p>one</p>\r\n\r\n<p>two</p>",
              b"HTTP/1.1 200 OK\r\nContent-Type:\r\n text/html\r\n\r\n<p>one</p>"]
    path = write_warc(tmp_path / "x.warc.gz", [
        record("response", body, content_type="Application/HTTP").replace(b"\r\n", end, 6)
        for body in bodies for end in (b"\r\n", b"\n")])
    found = [r.data for r in read_records(path)]
    assert found == [body[-24:] for body in bodies[:1] * 2] + [b"<p>one</p>"] * 2


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
    ("<p>孩子们在花园里玩，因为今天的天气非常好。".encode("gb18030"), None, "孩子们在花园里玩，因为今天的天气非常好。"),
    ("<p>孩子們在花園裡玩，因為今天的天氣非常好。".encode("big5"), None, "孩子們在花園裡玩，因為今天的天氣非常好。"),
    ("<p>Il treno è partito con dieci minuti di ritardo".encode("cp1252"), None,
     "Il treno è partito con dieci minuti di ritardo"),
    ("<p>It is UTF-16 that nobody declares".encode("utf-16-be"), None, "It is UTF-16 that nobody declares"),
    ("<!-- <meta charset=koi8-r> --><meta charset=cp1251><p>Москва".encode("cp1251"), None, "Москва"),
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
    ("a<!-- c --!>b<!-- d -->", "a b"),
    ("<p title='a > b'>x</p><a href=\"javascript:'>'\">y</a>", "x\n\ny"),
    ("<p>a<noscript>no</noscript><template>t</template><svg><text>s</text></svg> b", "a b"),
    ("", ""), ("<", "<"), ("a < b > c", "a < b > c"),
    ("<html><head><title>t</title><meta name=x><body>a<p>b</p><p>c</p>", "a\n\nb\n\nc"),  # no </head>
    ("<script src='a.js'/><title/><p>a <svg class=i/>b</p><script src=b.js></script><svg><path/></svg>c",
     "a b\n\nc"),
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


def test_the_whole_article_is_taken_and_nothing_around_it():
    """A news page as they are: kicker, share bar, inline teasers, lists, quote, table, comments."""
    parts = [prose(n, 2) for n in range(6)]
    teaser = "<article class=card><a href=/x><h3>Storm warning issued for the coast</h3></a></article>"
    share = "<ul class=share-bar><li><a href=#>Share on Facebook</a><li><a href=#>Copy link</a></ul>"
    html = f"""<header><nav><ul><li><a href=/n>News</a><li><a href=/w>Weather</a></ul></nav></header>
        <main><article><h1>City approves bridge</h1>{share}<div class=body><p>{parts[0]}</p>
        <aside class=related><h4>Read more</h4><a href=/1>What the toll means for drivers</a></aside>
        <h2>What happens next</h2><p>{parts[1]}</p><blockquote><p>{parts[2]}</p></blockquote>
        <ul><li>{parts[3]}<li>{parts[4]}</ul><table><tr><th>Year<th>Vehicles<tr><td>2019<td>7130
        </table><p>{parts[5]}</p></div>{share}</article>
        <section><h2>Most read</h2>{teaser * 6}</section>
        <section class=comments><h2>Comments (2)</h2><p>I do not agree with any of this at all.</p>
        </section></main><footer>© 2024 The Post. All rights reserved.</footer>"""
    text = extract_text_from_html_bytes(html.encode(), "main")
    for wanted in (*parts, "What happens next", "Vehicles", "7130"):
        assert wanted in text
    for other in ("Weather", "Share", "toll", "Most read", "Storm", "Comments", "agree", "rights"):
        assert other not in text


def test_classes_of_a_whole_page_say_nothing_of_its_parts():
    html = f"""<body class="no-cookies share-hidden"><nav><ul><li><a href=/>Home</a></ul></nav><h1>A title</h1>
        <div><p>{prose("a", 3)}</p><p>{prose("b", 3)}</p></div><div class=cookies><p>{prose("c")}</p></div></body>"""
    features = data_filter.block_features(data_filter.read_page(html))
    assert list(features["in cookie"]) == [False] * 4 + [True]
    assert list(features["in best"]) == [False, False, True, True, False]


def test_replies_of_a_forum_stay_and_comments_under_an_article_go():
    replies = "".join(f"<div class=post><p>{prose(n, 2)}</p></div>" for n in range(3))
    html = ("{}<main><h1>How do I boil an egg?</h1><div class=post><p>" + prose("a", 6) + "</p></div>"
            "<h2>3 replies</h2>" + replies + "</main>")
    forum = html.format("<meta name=generator content='Discourse 3.2'>")
    assert all(prose(n, 2) in extract_text_from_html_bytes(forum.encode(), "main") for n in range(3))
    assert prose(0, 2) not in extract_text_from_html_bytes(html.format("").encode(), "main")


def test_spaces_between_tags_are_no_text_of_a_link():
    page = data_filter.parse_html("<p><a href=/>\n   " + "go\n      " * 3 + "</a> and some more text</p>")
    assert page.links == [len("go go go")]


def test_a_page_that_only_noscript_holds_is_found():
    html = f"<div id=app></div><noscript><h1>Topic</h1><p>{prose('a')}</p></noscript>"
    assert prose("a") in extract_text_from_html_bytes(html.encode(), "main")


def test_an_article_that_only_json_ld_has_is_found():
    body = json.dumps({"articleBody": prose("a", 20)})
    html = f"<script type='application/ld+json'>{body}</script><div id=app>Loading page</div>"
    assert extract_text_from_html_bytes(html.encode(), "main") == prose("a", 20)


@pytest.mark.parametrize("mode", ["plain", "main"])
@pytest.mark.parametrize("html", [
    "<div>" * 20_000 + "x", "<a '" * 50_000, "<p \"" * 50_000, '<a "<a" ' * 30_000, "<" * 200_000,
    "<!--" * 50_000, "<svg>" * 50_000 + "</svg>", "<table><tr><td colspan=9007199254740991>x",
    "&#1114112;&#x110000;&lt" * 1000, "</p>" * 100_000, "<ul><li>" * 20_000 + "x", "\0" * 1000,
    "<select>" * 1000 + "x", "<script " * 50_000, "<!" * 50_000, "<svg " * 50_000 + "</svg>",
    "<td>" * 50_000, "<p>x" * 30_000, "<svg>" * 200_000 + "</svg x>", "<select>" * 200_000 + "</select",
    "<p>&#" + "9" * 5000 + ";", '<script>{"articleBody": "' + "abc \\ud83d x. " * 100 + '"}</script>'])
def test_hostile_pages_end(html, mode):
    assert isinstance(extract_text_from_html_bytes(html.encode(), mode).encode(), bytes)


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
    ("pip install x@1.2.3", None), ("ssh://user@host.com/x", None),
    ("https://user:password@host.com/x", None), ("|a@b.com|", f"|{EMAIL_MASK}|")])
def test_emails_are_masked(text, masked):
    assert mask_emails(text) == (masked or text, int(masked is not None))


@pytest.mark.parametrize("number", [
    "2831823829", "(283)-182-3829", "(283) 182-3829", "283-182-3829", "283.182.3829",
    "+1 283 182 3829", "+12831823829", "1-800-555-0199", "283 182 3829", "(283)182-3829",
    "416-555-0123 ext. 44", "345-899-3560x4587"])
def test_us_and_canadian_numbers_are_masked(number):
    text = "Feel free to contact me at {} if you have any questions."
    assert mask_phone_numbers(text.format(number)) == (text.format(PHONE_MASK), 1)


@pytest.mark.parametrize("text", [
    "Springfield, IL 62704 {}", "NY 10001 (212) 555-1234", "Suite 200 {}", "Hours 9-5 {}", "Est. 1999 {}",
    "Suite 4 217 555 1234", "Open since 1998 2175551234",
    "IL 62704-1234 217 555 1234", "TX 75001 2175551234", "DOB 1990-01-01 {}", "To order: {}", "phone={}",
    "student phone number {}", "my number is {}", "Contact no. {}", "For invoice no. 7 call {}",
    "Reservations {} 2024", "001-415-555-2671", "415/555-2671", "( 283 ) 182-3829", "my number is 2831823829",
    "2831823829", f"{EMAIL_MASK}, 2831823829", "2831823829 (cell)", "Joy, 2831823829 (call or text)",
    "Reserve: 828 . 370 . 1175", "get him at 2831823829",
    "+1 416 555 0113 ext 44"])
def test_a_telephone_after_other_numbers_or_words_is_masked(text):
    assert mask_phone_numbers(text.format("415-555-2671"))[1] == 1


@pytest.mark.parametrize("trap", [
    "4532 1234 5678 9012", "378282246310005", "3782 822463 10005", "2021-03-04", "ISBN 0306406152",
    "order 4155552671", "123-45-6789", "id=4155552671", "550e8400-e29b-41d4-a716-446655440000",
    "10.1000/182", "$4155552671", "5105105105105100", "1616161616", "v2.345.678.9012",
    "212 555 1234 5678", "1234 212 555 1234", "4111-212-555-1234", "7 4155552671", "2155551234 bytes",
    "pp. 200 201-2023", "?id=415-555-2671", "USD 4155552671", "416.555.0199 yen", "200-400-8000 Hz",
    "price 415.555.2671", "300-400 500-6000",
    "IL 6270 2175551234",
    "policy number 604-555-0177", "Item no. 604-555-0177", "student ID: 604-555-0177", "batch 604-555-0177",
    "MRN 4155552671", "track 2125550143.mp3",
    "my order number is 4155552671", "tracking number 4155552671", "GB29 NWBK 6016 1331 9268 19",
    "Population rose from 2125550143 to", "2^32 is 4294967296 and", "Call about invoice 4155552671 now",
    "450-600-1200 units", "NHS number 943 476 5919", "212.555.0143 rupees", "8566104588\nSocks",
    "Document 705.555.0162", "PRO number 448-330-7719"])
def test_other_numbers_are_no_telephones(trap):
    assert mask_phone_numbers(f"See {trap} there.") == (f"See {trap} there.", 0)


@pytest.mark.parametrize(("text", "masked"), [
    ("192.0.2.146", IP_MASK), ("http://10.0.0.1:80/", f"http://{IP_MASK}:80/"),
    ("10.0.0.0/24", f"{IP_MASK}/24"), ("from 8.8.8.8.", f"from {IP_MASK}."), ("256.1.1.1", None),
    ("1.2.3.4.5", None), ("v1.2.3.4", None), ("version 1.2.3.4", None), ("Chrome/91.0.44.12", None),
    ("01.02.03.04", None), ("tool-1.2.3.4", None), ("ip,10.0.0.1,200", f"ip,{IP_MASK},200"),
    ("IPv4:10.0.0.1.", f"IPv4:{IP_MASK}."), ("80/10.0.0.1", f"80/{IP_MASK}"), ("1:2.3.4.5", None),
    ("localhost/127.0.0.1", f"localhost/{IP_MASK}"), ("api: 10.0.0.1", f"api: {IP_MASK}"),
    ("01:10:01:10.0.0.1", f"01:10:01:{IP_MASK}"), ("Firefox 1.2.3.4", None),
    ("nginx 1.2.3.4", None), ("EC 3.4.21.4", None), ("x==31.2.3.4", None),
    ('AssemblyVersion("31.0.0.0")', None), ("doi 10.1000/182.255.10.1", None), ("31.0.1.2 for Windows", None),
    ("Ping 8.8.8.8", f"Ping {IP_MASK}"), ("DNS: 1.1.1.1, 9.9.9.9", f"DNS: {IP_MASK}, {IP_MASK}"),
    ("12.145.178.101,23", None), ("The 4.8.1.2 update fails; 4.8.1.3 does not.", None),
    ("Downgrade foo from 6.5.0.1 to 6.4.2.9 now", None), ("1.3.2.1 Scope of this document", None),
    ("objectClass ( 2.5.6.0 NAME 'top' )", None), ("Router model 3.1.4.1 is old", None), ("12.5.3.1 schema", None),
    ("5.6.7.8 - - [10/Oct/2000:13:55:36]", f"{IP_MASK} - - [10/Oct/2000:13:55:36]"), ("1.2.3.4", IP_MASK),
    ("from 1.2.3.4 to 5.6.7.8", f"from {IP_MASK} to {IP_MASK}"), ("v1 of 5.9.8.7:80", f"v1 of {IP_MASK}:80"),
    ("blocked 5.9.88.7 twice", f"blocked {IP_MASK} twice"), ("服务器119.29.29.29在线", f"服务器{IP_MASK}在线"),
    ("12.134.56.178 again", f"{IP_MASK} again"), ("Art. 4.3.2.1, lit. b", None),
    ("s/10.0.5.17/10.0.5.71/g", f"s/{IP_MASK}/{IP_MASK}/g"), ("app/10.0.5.17", None),
    ("HIER_DIRECT/23.215.0.136", f"HIER_DIRECT/{IP_MASK}"), ("/a.lan/10.7.0.53", f"/a.lan/{IP_MASK}")])
def test_addresses_of_the_net_are_masked(text, masked):
    assert mask_ips(text) == (masked or text, (masked or "").count(IP_MASK))


def test_masked_text_is_stable():
    rng = random.Random(1)
    pieces = ["283-182-3829", "2831823829", "a@b.com", "1.2.3.4", " ", "-", ".", "/", "x", "1", "@",
              "+1", "(283) ", "|", "\n", "ip ", " and ", "version ", " update", "call "]
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=6))
        masked, _ = mask_pii(text)
        assert mask_pii(masked) == (masked, dict(emails=0, phones=0, ips=0))
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
    assert data_filter.c4_lines(data_filter.Document(text + "[1]")) == "This line is a whole sentence."
    assert data_filter.c4_lines(data_filter.Document("a    b.\none two\tthree\tfour five.")) == (
        "one two\tthree\tfour five.")


# ---------------------------------------------------------------- runs

def run(warc, out_dir, *flags):
    return data_filter.main(["run", "--input", str(warc), "--out_dir", str(out_dir), "--num_workers",
                             "2", "--vocab_size", "300", *flags])


def digest(out_dir):
    return [hashlib.sha256((out_dir / name).read_bytes()).hexdigest()
            for name in ("clean.txt", "kept.jsonl", "tokens.bin", "dropped.jsonl")]


def test_a_run_gives_text_tokens_and_a_report_whose_sums_close(warc, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_filter, "EXAMPLES", 1)
    out = tmp_path / "out"
    more = [response(page(9).replace(b"</p>", b"</p><pre>a\n\n\n\nb</pre>", 1)), response(page(9), url="http://example.com/copy"),
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
    came, characters = None, None
    for stage in report["stages"]:
        assert came in (None, stage["documents_in"]) and characters in (None, stage["characters_in"])
        came, characters = stage["documents_out"], stage["characters_out"]
        dropped = sum(reason["documents"] for reason in stage["reasons"].values())
        assert stage["documents_in"] - dropped == stage["documents_out"]
        assert stage["characters_in"] - stage["characters_dropped"] + stage["characters_changed"] \
            == stage["characters_out"]
    assert characters == sum(map(len, documents))
    assert came == 10 and {s["stage"] for s in report["stages"]} >= {"records", "rules", "copies"}
    files = [*out.glob("parts/*.dropped.jsonl"), out / "dropped.jsonl"]
    recorded = Counter(json.loads(line)["reason"] for path in files for line in path.read_text().splitlines())
    assert recorded == {f"{stage['stage']}: {reason}": entry["documents"]
                        for stage in report["stages"] for reason, entry in stage["reasons"].items()}
    capsys.readouterr()
    assert data_filter.main(["inspect", "--out_dir", str(out), "--kept", "2", "--dropped", "3"]) is None
    shown = capsys.readouterr().out
    assert shown.count("--- kept") == 2 and shown.count("--- dropped") == 3


def test_the_seconds_of_a_report_hold_those_of_the_tokens(warc, tmp_path, monkeypatch):
    make_tokens, passed = data_filter.Run.make_tokens, []

    def timed(job):
        tokens = make_tokens(job)
        passed.append(round(time.monotonic() - job.started, 2))
        return tokens

    monkeypatch.setattr(data_filter.Run, "make_tokens", timed)
    assert run(warc, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["wall_seconds"] >= passed[0]


def test_a_blocklist_that_has_changed_is_another_run(warc, tmp_path, capsys):
    (tmp_path / "blocked").write_text("none.org\n")
    for _ in range(2):
        assert run(warc, tmp_path / "out", "--blocklist", str(tmp_path / "blocked")) == 0
    (tmp_path / "blocked").write_text("example.com\n")
    assert "other blocklist" in refused(capsys, "run", "--input", warc, "--out_dir", tmp_path / "out",
                                        "--vocab_size", 300, "--blocklist", tmp_path / "blocked")


def test_lines_that_occur_twice_are_dropped_everywhere_and_paragraphs_stay(warc, tmp_path):
    assert run(warc, tmp_path / "out", "--no_copies") == 0
    text = (tmp_path / "out" / "clean.txt").read_text()
    lines = [line for line in text.replace(bpe.END_OF_TEXT, "\n").split("\n") if line]
    assert len(lines) == len(set(lines)) > 8
    assert text.count("\n\n") >= 16 and "\n\n\n" not in text


def test_the_result_does_not_depend_on_the_number_of_workers(warc, tmp_path):
    write_warc(tmp_path / "b.warc.gz", [response(page(n)) for n in range(20, 25)])
    for workers in "13":
        run(tmp_path / "*.warc.gz", tmp_path / workers, "--num_workers", workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "3")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo and torchrun, tried on Linux only")
def test_two_ranks_give_what_one_gives(warc, tmp_path):
    write_warc(tmp_path / "b.warc.gz", [response(page(n)) for n in (1, 2, 30, 31)])
    run(tmp_path / "*.warc.gz", tmp_path / "one")
    run(tmp_path / "*.warc.gz", tmp_path / "two", "--mode", "plain")  # of which nothing may stay
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                    "2", str(ROOT / "data_filter.py"), "run", "--input", str(tmp_path / "*.warc.gz"),
                    "--out_dir", str(tmp_path / "two"), "--num_workers", "1", "--vocab_size", "300",
                    "--overwrite"],
                   check=True, timeout=300, capture_output=True)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo, tried on Linux only")
def test_a_rank_whose_launcher_is_killed_ends_and_leaves_the_folder(warc, tmp_path):
    command = [sys.executable, str(ROOT / "data_filter.py"), "run", "--input", str(warc), "--out_dir",
               str(tmp_path / "out")]
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {
            "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    while not (tmp_path / "out" / "lock.1").exists():  # it waits for the other rank, which never comes
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.kill()
    launcher.wait(60)
    data_filter.lock_folder(tmp_path / "out", 1).close()


@pytest.mark.skipif(sys.platform != "linux", reason="locks, tried on Linux only")
def test_a_rank_that_a_run_of_more_ranks_left_keeps_the_folder(tmp_path, monkeypatch):
    with data_filter.lock_folder(tmp_path, 1, 2):
        monkeypatch.setattr(data_filter.time, "sleep", lambda seconds: None)
        data_filter.lock_folder(tmp_path, 0, 2).close()  # each of two has its own
        with pytest.raises(ValueError, match="one run at a time"):
            data_filter.lock_folder(tmp_path, 0, 1)
    data_filter.lock_folder(tmp_path, 0, 1).close()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, Linux only")
def test_a_worker_reads_a_file_that_is_larger_than_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data_filter, "WORKER_BYTES", 1 << 29)
    with open(tmp_path / "a.warc", "wb") as file:
        file.write(response(page(1)))
        file.write(record("resource", b"", content_type="video/mp4").replace(
            b"Length: 0", b"Length: %d" % (1 << 30))[:-4])
        file.seek(1 << 30, os.SEEK_CUR)
        file.write(b"\r\n\r\n" + response(page(2)))
    assert run(tmp_path / "a.warc", tmp_path / "out") == 0
    assert len((tmp_path / "out" / "kept.jsonl").read_text().splitlines()) == 2


DRIVER = """
import os, sys, time
import data_filter
data_filter.CHECKPOINT_BYTES = 2000
data_filter.BATCH_BYTES = 3000
read = data_filter.Judge.read
def slow(self, record):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return read(self, record)
data_filter.Judge.read = slow
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
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if who == "worker":
            process.terminate()
        process.wait(60)
    process = start(inputs, tmp_path / "killed")
    assert process.wait(120) == 0, process.stdout.read()
    assert kills > 3
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_judge_reaches_workers_that_are_not_forked(tmp_path):
    args = data_filter.build_parser().parse_args(["run", "--input", "x"])
    args.languages, args.rules = ["en"], ["gopher"]
    judge = pickle.loads(pickle.dumps(data_filter.Judge(args)))
    records = [data_filter.Record((0, 1), "conversion", "http://x/", "text/plain", prose(1).encode())]
    assert [kept["text"] for _, kept, _ in judge.judge(records)] == [prose(1)]


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
    def full(self, *document):
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
    assert message.startswith(f"data_filter.py {arguments[0]}: error: ")
    return message


def test_bad_input_is_refused_in_one_line(warc, tmp_path, capsys):
    empty = tmp_path / "empty.warc"
    empty.touch()
    out = ["--out_dir", tmp_path / "out"]
    assert "empty file" in refused(capsys, "run", "--input", empty, *out)
    assert "WARC" in refused(capsys, "run", "--input", tmp_path / "none*", *out)
    (tmp_path / "folder").mkdir()
    assert "WARC" in refused(capsys, "run", "--input", tmp_path / "folder", *out)
    assert "typo.warc" in refused(capsys, "run", "--input", warc, tmp_path / "typo.warc", *out)
    assert "--rules" in refused(capsys, "run", "--input", warc, "--rules", "golfer", *out)
    for threshold in ("a.b=1", "word_count.low=30,40", "word_count.low=nan"):
        assert "--threshold" in refused(capsys, "run", "--input", warc, "--threshold", threshold, *out)
    assert "numbers as its default" in refused(capsys, "run", "--input", warc, "--rules", "gopher_repetition",
                                  "--threshold", "top_ngrams.high=0.5", *out)
    for flag, value in (("num_hashes", 100), ("jaccard_threshold", 2), ("decontaminate_ngram", 0),
                        ("decontaminate", tmp_path / "none"), ("language_score", "nan"), ("harm_score", -1)):
        assert flag in refused(capsys, "run", "--input", warc, f"--{flag}", value, *out)
    assert "got eng, fre" in refused(capsys, "run", "--input", warc, "--languages", "en,eng,fre", *out)
    assert not (tmp_path / "out").exists()  # nothing began
    info = write_warc(tmp_path / "i.warc.gz", [record("warcinfo", b"x"), record("request", b"x")])
    assert "'warcinfo': 1" in refused(capsys, "run", "--input", info, "--out_dir", tmp_path / "i")
    assert "65,536" in refused(capsys, "run", "--input", warc, "--vocab_size", "70000", *out)
    assert "write into" in refused(capsys, "run", "--input", warc, "--out_dir", empty)
    foreign = tmp_path / "model.bin"
    foreign.write_bytes(b"not a model" * 10)
    assert "model.bin" in refused(capsys, "run", "--input", warc, "--language_model", foreign, *out)
    assert "finished run" in refused(capsys, "inspect", "--out_dir", tmp_path)
    for flag in ("--kept", "--dropped", "--chars"):
        assert "0 or more, got -1" in refused(capsys, "inspect", flag, -1, "--out_dir", tmp_path)


def test_an_output_that_is_an_input_is_refused_and_the_file_stays(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(text := json.dumps({"text": "Where is the station?"}) + "\n")
    for arguments in (["classify", "--kind", "language", "--input", path, "--out", path],
                      ["classify", "--train", path, path, "--model", path],
                      ["dedup", "--input", path, "--out_dir", tmp_path / "out", "--report", path]):
        assert "must not be an input" in refused(capsys, *arguments) and path.read_text() == text


def test_thresholds_that_drop_everything_are_named(warc, tmp_path, capsys):
    message = refused(capsys, "run", "--input", warc, "--out_dir", tmp_path / "out", "--threshold",
                      "word_count.low=5000")
    assert "word_count: 8" in message and (tmp_path / "out" / "report.json").exists()
    message = refused(capsys, "run", "--input", warc, "--out_dir", tmp_path / "out")
    assert "threshold" in message
    assert run(warc, tmp_path / "out", "--overwrite") == 0


def test_flags_of_the_last_stages_may_change_and_others_not(warc, tmp_path, capsys):
    write_warc(tmp_path / "b.warc.gz", [response(page(1).replace(b"river", b"lake"))])
    out = tmp_path / "out"
    for flags in (["--no_line_dedup"], ["--no_line_dedup", "--jaccard_threshold", "0.3"]):
        assert run(tmp_path / "*.warc.gz", out, *flags) == 0
        run(tmp_path / "*.warc.gz", tmp_path / flags[-1], *flags)
        assert digest(out) == digest(tmp_path / flags[-1])
    assert not {"lines", "documents", "copies"} & set(os.listdir(out / "parts"))
    assert "other mode" in refused(capsys, "run", "--input", tmp_path / "*.warc.gz", "--out_dir", out,
                                   "--mode", "plain")


@pytest.mark.parametrize("name", ["parts/00000.txt", "clean.txt", "report.json"])
def test_a_folder_with_other_files_of_a_runs_names_is_left_alone(warc, tmp_path, capsys, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    for flags in ([], ["--overwrite"]):
        assert name[:5] in refused(capsys, "run", "--input", warc, "--out_dir", tmp_path / "out", *flags)
    assert path.read_text() == "mine"


def test_files_that_no_run_made_outlive_runs(warc, tmp_path):
    mine = [tmp_path / "out" / name for name in
            ("documents/a", "lines/a", "copies/a", "report.pdf", "tokens.txt", "my.tmp")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for flags in ([], ["--overwrite", "--mode", "plain"]):
        assert run(warc, tmp_path / "out", *flags) == 0
    assert {path.read_text() for path in mine} == {"mine"}


def test_blocklist_and_decontamination_drop_their_documents(warc, tmp_path):
    write_warc(tmp_path / "b.warc.gz", [response(page("b"), url="https://www.bad.example/x")])
    (tmp_path / "block").write_text("bad.example\n")
    (tmp_path / "valid.txt").write_text(prose("3b"))
    run(tmp_path / "*.warc.gz", tmp_path / "out", "--blocklist", str(tmp_path / "block"),
        "--decontaminate", str(tmp_path / "valid.txt"), "--decontaminate_ngram", "60")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {r: v["documents"] for stage in report["stages"] for r, v in stage["reasons"].items()}
    assert reasons == {"blocklist": 1, "shares words with the validation text": 1}


@pytest.mark.parametrize("name", ["valid.txt.gz", "valid.jsonl"])
def test_a_validation_text_may_be_packed_or_json(warc, tmp_path, name):
    text = prose(3) if ".txt" in name else json.dumps({"text": prose(3)})
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if ".gz" in name else text.encode())
    run(warc, tmp_path / "out", "--decontaminate", str(tmp_path / name))
    assert "shares words with the validation text" in (tmp_path / "out" / "report.txt").read_text()


def test_a_validation_text_without_words_or_of_the_run_itself_is_refused(warc, tmp_path, capsys):
    np.arange(999, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    command = "run", "--input", warc, "--out_dir", tmp_path / "out", "--overwrite", "--decontaminate"
    assert "must be text with 13 words" in refused(capsys, *command, tmp_path / "tokens.bin")
    assert run(warc, tmp_path / "out") == 0
    assert "must not be an input" in refused(capsys, *command, tmp_path / "out" / "clean.txt")
    assert (tmp_path / "out" / "clean.txt").read_text()


def test_a_blocklist_may_have_remarks(tmp_path):
    hosts = ("http://a.example/#top", "http://b.example/", "http://c.example/")
    write_warc(tmp_path / "a.warc", [response(page(n), url=url) for n, url in enumerate(hosts)])
    (tmp_path / "block").write_text("# no example\nhttp://a.example/#top # yes\n*.b.example\n")
    run(tmp_path / "a.warc", tmp_path / "out", "--blocklist", str(tmp_path / "block"))
    kept = (tmp_path / "out" / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line)["url"] for line in kept] == [hosts[2]]


def test_a_blocklist_may_have_www_and_capitals(tmp_path):
    hosts = ("http://www.a.example/", "https://b.example/Page?Q=1", "http://c.example/")
    write_warc(tmp_path / "a.warc", [response(page(n), url=url) for n, url in enumerate(hosts)])
    (tmp_path / "block").write_text("\ufeffwww.a.example\nhttps://b.example/Page?Q=1\n", "utf-8")
    run(tmp_path / "a.warc", tmp_path / "out", "--blocklist", str(tmp_path / "block"))
    kept = (tmp_path / "out" / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line)["url"] for line in kept] == [hosts[2]]


def test_no_rule_makes_a_special_token_of_what_it_leaves(tmp_path):
    text = prose(1).replace(". ", ".\n").replace("times", "<|endof[1]text|>", 1)
    write_warc(tmp_path / "a.wet", [record("conversion", text.encode(), content_type="text/plain")])
    run(tmp_path / "a.wet", tmp_path / "out", "--rules", "gopher, c4", "--languages", "de, en")
    assert (tmp_path / "out" / "clean.txt").read_text().count("<|endoftext|>") == 1


@pytest.mark.parametrize("lower", [True, False])
def test_a_model_knows_by_itself_whether_it_lowers_texts(tmp_path, lower):
    model, counts = data_filter.train_fasttext(*toy_texts(), dim=7, bucket=500, lr=0.5, lower=lower)
    model.save(tmp_path / "m.bin", counts)
    loaded = data_filter.FastText.load(tmp_path / "m.bin")  # with no notes beside it
    for text in ("The GOOD sunny Day", "the BAD rainy Day"):
        assert loaded.predict([text]) == model.predict([text])
        assert (loaded.predict([text]) == loaded.predict([text.lower()])) == lower


def test_a_model_of_three_labels_scores_by_the_one_that_is_asked_for(tmp_path):
    texts, labels = ["aa bb"] * 9 + ["cc dd"] * 9 + ["ee ff"] * 9, ["wiki"] * 9 + ["cc"] * 9 + ["yes"] * 9
    for order in (labels, labels[::-1]):  # the second takes the place of the first
        model, counts = data_filter.train_fasttext(texts, order, dim=8, bucket=100)
        model.save(tmp_path / "m.bin", counts)
        judge = data_filter.load_classifier("quality", str(tmp_path / "m.bin"))
        probabilities = dict(zip(*model.predict(["bb cc ff"], k=-1)[0], strict=True))
        for label in set(labels):
            assert judge.share_of("bb cc ff", (label,)) == pytest.approx(probabilities[label])
        assert judge.predict(["aa bb"])[0][0] == order[0]
    judge.model.dictionary.word_ids.clear()  # nothing is known of any text
    judge.model.dictionary.word_ngrams = 1
    judge.model.dictionary.forget()
    assert judge.predict(["zz"]) == [("und", 0.0)] and judge.share_of("zz", ("wiki",)) == 0


def test_a_list_of_paths_takes_local_copies(warc, tmp_path):
    paths = tmp_path / "wet.paths.gz"
    paths.write_bytes(gzip.compress(f"crawl-data/x/{warc.name}\ncrawl-data/y.wet.gz\n".encode()))
    assert data_filter.list_inputs([str(paths)]) == [
        str(warc), "https://data.commoncrawl.org/crawl-data/y.wet.gz"]


def test_a_list_of_paths_may_be_an_address(warc, tmp_path, monkeypatch):
    monkeypatch.setattr(data_filter, "fetch_input", lambda path, folder, num_workers: shutil.copy(
        tmp_path / "got", folder / path.rsplit("/")[-1]))
    (tmp_path / "got").write_bytes(gzip.compress(f"{warc}\ncrawl-data/y.wet.gz\n".encode()))
    assert data_filter.list_inputs(["https://example.com/wet.paths.gz", "https://example.com/a.warc.gz"]) == [
        str(warc), "https://data.commoncrawl.org/crawl-data/y.wet.gz", "https://example.com/a.warc.gz"]


def test_an_address_is_fetched_with_patience_and_once(tmp_path, monkeypatch):
    asked, slept, data = [], [], random.Random(0).randbytes(300_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            start = int(asked[-1][6:-1]) if asked[-1] else 0
            self.send_response(503 if len(asked) == 1 else 206 if start else 200)
            self.send_header("Content-Length", 0 if len(asked) == 1 else len(data) - start)
            self.end_headers()
            if len(asked) == 2:  # breaks off
                self.wfile.write(data[:150_000])
            elif len(asked) > 2:
                self.wfile.write(data[start:])

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(data_filter.time, "sleep", slept.append)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.warc.gz"
        local = data_filter.fetch_input(url, tmp_path, 4)
        assert data_filter.fetch_input(url, tmp_path, 4) == local
        server.shutdown()
    assert local.read_bytes() == data and slept == [4, 8]  # of 4 workers, one a second at most
    assert asked[:2] == [None, None] and asked[2].startswith("bytes=") and len(asked) == 3


@pytest.mark.parametrize(("address", "tries"), [
    ("http://127.0.0.1:9/a.warc.gz", data_filter.UNANSWERED_TRIES), ("s3://bucket/a.warc.gz", 1)])
def test_an_address_that_never_answers_is_given_up_soon(tmp_path, monkeypatch, capsys, address, tries):
    slept = []
    monkeypatch.setattr(data_filter.time, "sleep", slept.append)
    with pytest.raises(OSError, match="must be reachable"):
        data_filter.fetch_input(address, tmp_path, 1)
    assert len(slept) == tries - 1 == capsys.readouterr().out.count(f"of {tries} in")


def test_sigterm_stops_a_run_that_fetches(tmp_path):
    process = start("http://127.0.0.1:9/a.warc.gz", tmp_path / "out")
    assert any("try 2 of" in line for line in process.stdout)  # it waits to try again
    process.terminate()
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, out


def test_models_that_are_named_judge_and_are_named_in_the_report(warc, tmp_path):
    model, counts = toy_model(minn=2, maxn=3)
    model.save(tmp_path / "m.bin", counts)
    path = str(tmp_path / "m.bin")
    assert run(warc, tmp_path / "out", "--language_model", path, "--languages", "up,down",
               "--language_score", "0", "--quality_model", path, "--quality_label", "up",
               "--quality_score", "0") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["methods"]["language"] == report["methods"]["quality"] == "fastText model m.bin"
    text = (tmp_path / "out" / "clean.txt").read_bytes()
    for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines():
        notes = json.loads(line)
        assert notes["language"] in ("up", "down") and 0 <= notes["quality"] <= 1
        assert text[notes["start"] + notes["bytes"]:].startswith(bpe.END_OF_TEXT.encode())


@pytest.mark.parametrize(("flags", "says"), [
    ("--quality_model", "--quality_label"), ("--nsfw_model", "harmful"), ("--toxic_model", "harmful"),
    ("--language_model", "--languages")])
def test_a_model_without_the_labels_that_are_asked_for_is_refused(warc, tmp_path, capsys, flags, says):
    model, counts = toy_model()
    model.save(tmp_path / "m.bin", counts)
    error = refused(capsys, "run", "--input", str(warc), "--out_dir", str(tmp_path / "out"), flags,
                    str(tmp_path / "m.bin"))
    assert "down, up" in error and says in error


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
    data_filter.main(["extract", "--input", str(tmp_path / "?.html")])
    assert capsys.readouterr().out == "Moby\n\nCall me Ishmael.\n"


def test_extract_leaves_plain_text_as_it_is(tmp_path, capsys):
    code = "if a <b and c> d:\n  indented"
    write_warc(tmp_path / "a.warc.gz", [response(code.encode(), "Content-Type: text/plain")])
    data_filter.main(["extract", "--input", str(tmp_path / "a.warc.gz")])
    assert capsys.readouterr().out.endswith(f"\n{code}\n")


def test_extract_ends_without_a_word_where_its_reader_does(tmp_path):
    (tmp_path / "x.html").write_bytes(b"<p>whale " * 99_999)
    with subprocess.Popen([sys.executable, "data_filter.py", "extract", "--input", tmp_path / "x.html"],
                          cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        job.stdout.read(5)
        job.stdout.close()
        assert job.stderr.read() == b""


# ---------------------------------------------------------------- models, language, duplicates

SENTENCES = {
    "en": "The committee said that it would publish the results before the end of the year.",
    "de": "Die Ergebnisse der Untersuchung werden erst im nächsten Jahr veröffentlicht werden.",
    "fr": "Les enfants jouent dans le jardin pendant que leur mère prépare le dîner.",
    "es": "La biblioteca estará cerrada mañana porque los trabajadores tienen una reunión.",
    "it": "Il treno per Milano è partito con dieci minuti di ritardo dalla stazione.",
    "pt": "A reunião não foi marcada porque o diretor ainda está em viagem.",
    "nl": "De kinderen spelen buiten in de tuin omdat het weer eindelijk mooi is.",
    "pl": "Nie wiem, czy zdążymy na pociąg, który odjeżdża o szóstej rano.",
    "tr": "Çocuklar bahçede oynuyor ve anneleri onlar için yemek hazırlıyor.",
    "vi": "Tôi không biết ngày mai trời có mưa hay không, nhưng chúng ta sẽ đi.",
    "sv": "Barnen leker i trädgården och det är mycket varmt för att vara i maj.",
    "cs": "Nevím, jestli stihneme vlak, který odjíždí v šest hodin ráno.",
    "ru": "Дети играют в саду, потому что сегодня очень хорошая погода.",
    "uk": "Діти граються в саду, тому що сьогодні дуже гарна погода і тепло.",
    "ar": "يلعب الأطفال في الحديقة لأن الطقس جميل جدا هذا اليوم.",
    "fa": "بچه‌ها در باغ بازی می‌کنند و مادر برای آن‌ها غذا درست می‌کند.",
    "zh": "孩子们在花园里玩，因为今天的天气非常好。",
    "ja": "子どもたちは庭で遊んでいます。今日はとても天気がいいです。",
    "ko": "아이들이 정원에서 놀고 있습니다. 오늘은 날씨가 아주 좋습니다.",
    "hi": "बच्चे बगीचे में खेल रहे हैं क्योंकि आज मौसम बहुत अच्छा है।",
}
TEXTS = [*SENTENCES.values(), "", "a", "\u00a0", "x\0y z", "good </s> morning sunny",
         "__label__up sunny", "__label__other day", "e\u0301a 😀😀 < > <", "\t tab\x0bvt\rcr",
         "the cat " * 3000, "wort" * 2000, "sunny good fine day"]


def toy_texts(n=120):
    rng = random.Random(0)
    up, down = ("good", "fine", "sunny", "happy"), ("bad", "awful", "rainy", "sad")
    both = ("the", "day", "was", "a", "and", "in", "it", "über", "日本")
    texts = [" ".join(rng.choice((up, down)[i % 2] if rng.random() < 0.3 else both)
                      for _ in range(rng.randint(4, 12))) for i in range(n)]
    return texts, [("up", "down")[i % 2] for i in range(n)]


def toy_model(**settings):
    return data_filter.train_fasttext(*toy_texts(), **{"dim": 7, "bucket": 500, "lr": 0.5, "lower": False}
                             | settings)


def write_matrix(rng, matrix, quantise, qnorm):
    """The bytes of a matrix; quantised, with random centroids, and what it then decodes to."""
    m, n = matrix.shape
    if not quantise:
        return struct.pack("<2q", m, n) + matrix.astype("<f4").tobytes(), matrix
    parts, width = math.ceil(n / 2), 2
    last = n % width or width
    centroids = rng.normal(size=n * 256).astype("<f4")
    codes = rng.integers(0, 256, (m, parts), np.uint8)
    rows = np.empty((m, n), np.float32)
    for q in range(parts):
        size = width if q < parts - 1 else last
        for r in range(m):
            at = q * 256 * width + int(codes[r, q]) * size
            rows[r, q * width:q * width + size] = centroids[at:at + size]
    data = struct.pack("<?2qi", qnorm, m, n, codes.size) + codes.tobytes()
    data += struct.pack("<4i", n, parts, width, last) + centroids.tobytes()
    if qnorm:
        norms, norm_codes = rng.normal(size=256).astype("<f4"), rng.integers(0, 256, m, np.uint8)
        data += norm_codes.tobytes() + struct.pack("<4i", 1, 1, 1, 1) + norms.tobytes()
        rows *= norms[norm_codes][:, None]
    return data, rows


def random_model(path, seed, loss, quantise, qnorm=False, pruned=False, labels=5, **args):
    """Writes a model file of random numbers, independently of the reader; returns what it holds."""
    rng = np.random.default_rng(seed)
    args = {"dim": 5, "word_ngrams": 2, "minn": 2, "maxn": 4, "bucket": 300} | args
    words = ["</s>", "the", "day", "sunny", "cat", "日本", "de", "в", "и", "не", "w\u0301"]
    names, counts = [f"l{i}" for i in range(labels)], sorted(rng.integers(1, 50, labels))[::-1]
    pairs = {int(b): i for i, b in enumerate(rng.permutation(args["bucket"])[:90])}
    n_rows = len(words) + (len(pairs) if pruned else args["bucket"])
    inputs = rng.normal(size=(n_rows, args["dim"])).astype(np.float32)
    output = rng.normal(size=(labels, args["dim"])).astype(np.float32)
    data = struct.pack("<2i12id", 793712314, 12, args["dim"], 5, 5, 1, 5, args["word_ngrams"], loss,
                       3, args["bucket"], args["minn"], args["maxn"], 100, 1e-4)
    data += struct.pack("<3i2q", len(words) + labels, len(words), labels, 99,
                        len(pairs) if pruned else -1)
    for word in words:
        data += word.encode() + b"\0" + struct.pack("<qb", 9, 0)
    for name, count in zip(names, counts, strict=True):
        data += b"__label__" + name.encode() + b"\0" + struct.pack("<qb", count, 1)
    for pair in pairs.items() if pruned else ():
        data += struct.pack("<2i", *pair)
    in_bytes, inputs = write_matrix(rng, inputs, quantise, qnorm)
    out_bytes, output = write_matrix(rng, output, quantise and qnorm, qnorm)
    path.write_bytes(data + struct.pack("<?", quantise) + in_bytes
                     + struct.pack("<?", quantise and qnorm) + out_bytes)
    return {"words": words, "names": names, "counts": [int(c) for c in counts], "inputs": inputs,
            "output": output, "pairs": pairs if pruned else None, "loss": loss, **args}


def slow_predict(model, text):
    """The definition, one n-gram at a time in Python's own numbers: {label: probability}."""
    n_words, ids, hashes = len(model["words"]), [], []

    def push(value):
        row = value % model["bucket"]
        if model["pairs"] is not None:
            row = model["pairs"].get(row)
        if row is not None:
            ids.append(n_words + row)

    words = text.replace("\0", " ").encode().split()
    words = words[:words.index(b"</s>")] if b"</s>" in words else words
    for word in [*words, b"</s>"]:
        name = word.decode()
        if name.startswith("__label__"):
            continue
        if name in model["words"]:
            ids.append(model["words"].index(name))
        marked = f"<{name}>"
        for start in range(len(marked) if word != b"</s>" and model["maxn"] else 0):
            for n in range(max(1, model["minn"]), model["maxn"] + 1):
                gram = marked[start:start + n]
                if len(gram) == n and not (n == 1 and start in (0, len(marked) - 1)):
                    push(data_filter.fnv(gram.encode()))
        h = data_filter.fnv(word)
        hashes.append(h - (1 << 32) if h >> 31 else h)
    for i in range(len(hashes)):
        h = hashes[i] % (1 << 64)
        for j in range(i + 1, min(len(hashes), i + model["word_ngrams"])):
            h = (h * 116049371 + hashes[j]) % (1 << 64)
            push(h)
    hidden = model["inputs"][ids].astype(np.float64).mean(0)
    z = model["output"].astype(np.float64) @ hidden
    if model["loss"] == data_filter.SOFTMAX:
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    elif model["loss"] in (data_filter.NS, data_filter.OVA):
        p = 1 / (1 + np.exp(-(np.trunc((np.clip(z, -8, 8) + 8) * 32) / 32 - 8)))
        p = np.where(z < -8, 0, np.where(z > 8, 1, p))
    else:
        heap = [(count, -i, i) for i, count in enumerate(model["counts"])]
        p = slow_tree(heap, 1 / (1 + np.exp(-z)), len(model["names"]))
    return dict(zip(model["names"], p, strict=True)), z


def slow_tree(leaves, sigmoid, n):
    """Probabilities of a Huffman tree's leaves: repeatedly the two smallest, nodes before equal
    leaves, later leaves and earlier nodes first."""
    nodes = [(count, 1, -i, {i: 1.0}) for count, _, i in leaves]
    for new in range(n - 1):
        nodes.sort(key=lambda node: node[:3])
        left, right, *nodes = nodes
        joined = {i: p * (1 - sigmoid[new]) for i, p in left[3].items()}
        joined |= {i: p * sigmoid[new] for i, p in right[3].items()}
        nodes.append((left[0] + right[0], 0, new, joined))
    return [nodes[0][3][i] for i in range(n)]


def test_examples_in_docstrings_are_right():
    assert doctest.testmod(data_filter).failed == 0


@pytest.mark.parametrize("loss", [data_filter.HS, data_filter.NS, data_filter.SOFTMAX, data_filter.OVA])
@pytest.mark.parametrize("kind", ["dense", "quantised", "norms", "pruned"])
def test_predictions_of_model_files_are_those_of_the_definition(tmp_path, loss, kind):
    path = tmp_path / "model.bin"
    for seed, settings in enumerate(({}, {"word_ngrams": 1, "dim": 6}, {"maxn": 0, "minn": 0},
                                     {"minn": 1, "maxn": 3, "word_ngrams": 3, "labels": 17})):
        held = random_model(path, seed, loss, kind != "dense", kind == "norms", kind == "pruned",
                            **settings)
        model = data_filter.FastText.load(path)
        for text, (labels, scores) in zip(TEXTS, model.predict(TEXTS, k=-1), strict=True):
            expected, z = slow_predict(held, text)
            if loss in (data_filter.NS, data_filter.OVA) and np.abs((z * 32) % 1 - 0.5).max() > 0.49:
                continue  # on a step of the library's table
            # float32 sums of up to 30,000 rows against float64; 1e-5 is the library's own
            assert {k: v for k, v in expected.items() if v > 3e-5}.keys() <= set(labels)
            for label, score in zip(labels, scores, strict=True):
                assert abs(score - expected[label]) < 1e-4
            assert scores == sorted(scores, reverse=True)


def test_one_text_or_many_give_the_same_predictions():
    model, _ = toy_model(minn=2, maxn=3)
    together = model.predict(TEXTS)
    model.dictionary.forget()
    assert together == [model.predict([text])[0] for text in TEXTS]


def test_character_ngrams_of_many_words_are_those_of_each():
    words = [w.encode() for w in ("a", "ab", "über", "日本語", "😀", "<x>", "e\u0301")]
    for minn, maxn in ((1, 1), (1, 4), (2, 3), (3, 9)):
        expected = []
        for word in words:
            marked = f"<{word.decode()}>"
            expected.append([data_filter.fnv(marked[i:i + n].encode()) for i in range(len(marked))
                             for n in range(minn, maxn + 1)
                             if i + n <= len(marked) and not (n == 1 and marked[i:i + n] in "<>"
                                                              and i in (0, len(marked) - 1))])
        hashes, counts = data_filter.character_ngram_hashes(words, minn, maxn)
        assert counts.tolist() == [len(e) for e in expected]
        assert hashes.tolist() == [h for e in expected for h in e]


def test_a_saved_model_predicts_as_before(tmp_path):
    model, counts = toy_model(minn=2, maxn=3)
    model.save(tmp_path / "m.bin", counts)
    assert data_filter.FastText.load(tmp_path / "m.bin").predict(TEXTS, k=-1) == model.predict(TEXTS, k=-1)
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


@pytest.mark.parametrize("settings", [{}, {"word_ngrams": 1}, {"minn": 2, "maxn": 3}])
def test_training_separates_what_can_be_separated_and_repeats_itself(settings):
    texts, labels = toy_texts()
    model, _ = toy_model(epoch=20, **settings)
    scores = [dict(zip(*p, strict=True))["up"] for p in model.predict(texts, k=-1)]
    assert data_filter.area_under_curve(scores, [label == "up" for label in labels]) > 0.95
    again, _ = toy_model(epoch=20, **settings)
    assert np.array_equal(again.output, model.output)


def test_a_training_step_follows_the_gradient():
    rng = np.random.default_rng(0)
    inputs, output = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    ids, counts, lr = np.array([1, 4]), np.array([2, 1]), 1e-6

    def loss(inputs, output):
        z = output @ (inputs[[1, 1, 4]].mean(0))
        return np.log(np.exp(z).sum()) - z[2]

    moved_inputs, moved_output = inputs.copy(), output.copy()
    data_filter.train_step(moved_inputs, moved_output, ids, counts, 2, lr)
    for matrix, moved, at in ((inputs, moved_inputs, (1, 2)), (output, moved_output, (0, 3))):
        kept, eps = matrix[at], 1e-6
        matrix[at] = kept + eps
        up = loss(inputs, output)
        matrix[at] = kept - eps
        slope = (up - loss(inputs, output)) / (2 * eps)
        matrix[at] = kept
        # the division of the mean's gradient is by ids, and its share counts each repeat: float32
        assert math.isclose((moved - matrix)[at], -lr * slope, rel_tol=1e-4)


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda data: b"GIF89a" + data, "magic"), (lambda data: data[:200], "whole"),
    (lambda data: data[:4] + b"\x0d\0\0\0" + data[8:], "version 13"), (lambda data: b"", "magic 0"),
    (lambda data: data[:28] + b"\0\0\1\0" + data[32:], "n-grams of"),
    (lambda data: data + b"x", "more"), (lambda data: data[:36] + b"\1" + data[37:], "model 1")])
def test_foreign_and_broken_model_files_are_refused_by_name(tmp_path, spoil, says):
    model, counts = toy_model()
    model.save(tmp_path / "m.bin", counts)
    path = tmp_path / "bad.bin"
    path.write_bytes(spoil((tmp_path / "m.bin").read_bytes()))
    with pytest.raises(ValueError, match=says):
        data_filter.FastText.load(path)


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_of_each_language_is_recognised(code):
    label, score = data_filter.identify_language(SENTENCES[code])
    assert label == code and 0.5 < score <= 1
    assert data_filter.identify_language(SENTENCES[code] * 500)[0] == code


@pytest.mark.parametrize("text", ["", "12345 !!! 67", "\0\n", "\ud800"])
def test_a_text_without_letters_has_no_language(text):
    assert data_filter.identify_language(text) == ("und", 0.0)


def test_a_language_that_is_not_known_scores_low():
    finnish = "Suomen kieli on yksi maailman kielistä, ja sitä puhuu noin viisi miljoonaa ihmistä."
    assert data_filter.identify_language(finnish)[1] < 0.6


def test_harm_and_quality_without_a_model_state_label_score_and_method():
    assert data_filter.classify_nsfw("free porn xxx hardcore sex videos")[0] == "nsfw"
    assert data_filter.classify_nsfw("the cathedral was built in 1250")[0] == "non-nsfw"
    assert data_filter.classify_toxic_speech("you are a stupid idiot, shut up")[0] == "toxic"
    assert data_filter.classify_toxic_speech("you are so gay, you racist")[0] == "toxic"
    for text in ("Gay and lesbian couples may marry; same-sex couples adopt.", "I am a gay man and a lesbian's son.",
                 "The Nazis passed racist laws against Jews and Roma.", "Homo sapiens and Homo erectus are hominins.",
                 "Penis and vagina are organs; a cock is a bird, Dick Cheney a man."):
        assert data_filter.classify_toxic_speech(text)[0] == "non-toxic"
        assert data_filter.classify_nsfw(text)[0] == "non-nsfw"
    assert data_filter.classify_toxic_speech("thank you for the careful edit")[0] == "non-toxic"
    prose = (SENTENCES["en"] + " ") * 20
    assert data_filter.classify_quality(prose)[0] == "wiki"
    assert data_filter.classify_quality("Home\nLogin\nCart (0)\n$ 5.99\n>> next")[0] == "cc"
    assert "list" in data_filter.load_classifier("nsfw").method


def test_lines_that_occur_twice_anywhere_go_all_of_them(tmp_path):
    a, b, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out"
    a.write_bytes(b"one\ntwo\nsame\ntwo\n\nlast")
    b.write_bytes(b"same\nthree\nlast\n\xff\n")
    report = data_filter.exact_line_deduplication([b, a], out)
    assert (out / "a.txt").read_bytes() == b"one\n\n"
    assert (out / "b.txt").read_bytes() == b"three\n\xff\n"
    assert report["lines"] == 10 and report["kept"] == 4
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "b.txt"]


def test_lines_in_many_blocks_and_slices_of_memory_give_the_same(tmp_path, monkeypatch):
    rng, outs = random.Random(1), []
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"{rng.randint(0, 4000)}\n" for _ in range(2000)))
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    counts = data_filter.Counter(line for f in files for line in f.read_text().split())
    for block, sort_bytes in ((1 << 24, 40), (999, 40_000)):
        monkeypatch.setattr(data_filter, "LINE_BLOCK_BYTES", block)
        monkeypatch.setattr(data_filter, "SORT_BYTES", sort_bytes)
        out = tmp_path / str(block)
        data_filter.exact_line_deduplication(files, out, memory_mb=1)
        outs.append([(out / f.name).read_text() for f in files])
    assert outs[0] == outs[1] == ["".join(line + "\n" for line in f.read_text().split()
                                          if counts[line] == 1) for f in files]


def near_copies(seed, n=120):
    rng = random.Random(seed)
    vocabulary, texts = [f"w{i}" for i in range(300)], []
    for _ in range(n):
        if texts and rng.random() < 0.6:
            words = rng.choice(texts).split()
            for _ in range(rng.choice((0, 1, 2, 3, 5))):
                if words:
                    words[rng.randrange(len(words))] = rng.choice(vocabulary)
        else:
            words = rng.choices(vocabulary, k=rng.choice((0, 2, 4, 5, 30, 60, 100)))
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_all_pairs_for_any_workers_order_memory_and_ranks(
        tmp_path, monkeypatch, seed):
    texts = near_copies(seed)
    expected = data_filter.minhash_reference(texts, 5, 0.6)
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": t}) + "\n\n" for t in
                                     texts[i * 40:i * 40 + 40]))
    # 64 bands of 2: a pair of similarity 0.6 shares none with probability 0.64**64 = 4e-13
    settings = {"num_hashes": 128, "num_bands": 64, "jaccard_threshold": 0.6}
    monkeypatch.setattr(data_filter, "CHUNK_BYTES", 3000)
    found = [data_filter.find_near_duplicates(files, tmp_path / "1", num_workers=1, **settings)[1]]
    monkeypatch.setattr(data_filter, "GROUPS_A_TASK", 5)
    monkeypatch.setattr(data_filter, "SORT_BYTES", 40_000)
    found.append(data_filter.find_near_duplicates(files[::-1], tmp_path / "2", num_workers=2, memory_mb=1,
                                         **settings)[1])
    assert [f.tolist() for f in found] == [expected, expected]
    folder = tmp_path / "3"
    for rank in (0, 1, 0):  # as machines with one folder: the links of all are there the third time
        try:
            last = data_filter.find_near_duplicates(files, folder, num_workers=1, rank=rank, ranks=2,
                                           **settings)[1]
        except FileNotFoundError:
            continue
    assert last.tolist() == expected


def test_the_first_of_a_cluster_stays_whatever_kind_its_file_is(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1))
    for name in ("b.jsonl", "z.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": prose(1)}) + "\n")
    (tmp_path / "out").mkdir()
    paths = sorted(tmp_path.glob("*.*"))
    report = data_filter.minhash_deduplication(paths[::-1], 32, 8, 3, 0.8, tmp_path / "out", 1)
    assert report["duplicates"] == [(str(path), 0, str(paths[0]), None) for path in paths[1:]]


def test_whole_files_are_documents_and_the_first_of_a_cluster_stays(tmp_path):
    words = [f"word{i}" for i in range(200)]
    for name, text in (("b", " ".join(words)), ("a", " ".join(words[:-1]) + " Other."),
                       ("c", " ".join(words[::-1])), ("d", "“WORD0,  wórd1” " + " ".join(words[2:]))):
        (tmp_path / f"{name}.txt").write_text(text)
    files, out = list(tmp_path.glob("*.txt")), tmp_path / "out"
    report = data_filter.minhash_deduplication(files, 100, 20, 5, 0.8, out, num_workers=1)
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "c.txt"]
    assert (report["documents"], report["kept"], report["clusters"]) == (4, 2, 1)


def test_signatures_estimate_similarity_without_bias():
    minhash, rng = data_filter.MinHash(512, 1), np.random.default_rng(0)
    errors = []
    for _ in range(20):
        pool = rng.integers(0, 1 << 63, 300, np.uint64)
        a, b = np.unique(pool[:200]), np.unique(pool[100:])
        same = (minhash.signature(a) == minhash.signature(b)).mean()
        errors.append(same - data_filter.jaccard(a, b))
    assert abs(np.mean(errors)) < 4 * math.sqrt(1 / 3 * 2 / 3 / 512 / 20)  # four standard errors


def test_words_hashed_one_by_one_are_those_of_the_normalised_text():
    minhash = data_filter.MinHash()
    for text in (*TEXTS, "Café, -- déjà-vu! «Straße» ΣΟΦΟΣ", "a\u3000b\u2003c ©2020 1,000.5"):
        expected = [int.from_bytes(data_filter.hash_bytes(w.encode()), "little")
                    for w in data_filter.normalize_for_dedup(text).split()]
        assert minhash.word_hashes(text).tolist() == expected


def test_finished_signatures_are_used_again_and_stale_ones_are_not(tmp_path, monkeypatch):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a b c d e f"}\n{"text": "A b c d e f!"}\n')
    arguments = ([file], tmp_path / "work")
    assert data_filter.find_near_duplicates(*arguments, num_workers=1)[1].tolist() == [0, 0]
    monkeypatch.setattr(data_filter, "sign_chunk", None)
    assert data_filter.find_near_duplicates(*arguments, num_workers=1)[1].tolist() == [0, 0]
    monkeypatch.undo()
    file.write_text('{"text": "a b c d e f"}\n{"text": "other words than before it"}\n')
    assert data_filter.find_near_duplicates(*arguments, num_workers=1)[1].tolist() == [0, 1]
    signature = next((tmp_path / "work").rglob("*.sign"))
    for path in (tmp_path / "work").rglob("*.sign"):
        path.write_bytes(signature.read_bytes()[:-3])
    with pytest.raises(ValueError, match="whole records"):
        data_filter.find_near_duplicates(*arguments, num_workers=1)


@pytest.mark.parametrize(("command", "says"), [
    ("dedup --input {a} {b} --out_dir {out} --num_bands 7", "multiple of num_bands"),
    ("dedup --input {a} --out_dir {here}", "must not hold the inputs"),
    ("dedup --input {a} {sub} --out_dir {out} --how lines", "different names"),
    ("dedup --input {a} --out_dir {out} --how lines --report r.jsonl", "--report must have a use"),
    ("dedup --input {a} --out_dir {out} --how lines --ngrams 3", "--ngrams must have a use"),
    ("dedup --input {cut} --out_dir {out} --how lines", "unpack it"),
    ("run --input {a} --no_harm --harm_score 0.9", "--harm_score must have a use"),
    ("run --input {a} --quality_label x", "--quality_label must have a use"),
    ("classify --text x --input {a}", "got both"),
    ("classify --text x --epoch 9", "--epoch must have a use"),
    ("classify --train {a} {b} --model {out}/m.bin --text x", "--text must have a use"),
    ("dedup --input {a} {b} --out_dir {out} --jaccard_threshold 80", "from 0 to 1"),
    ("dedup --input {bad} --out_dir {out}", "\"text\""),
    ("dedup --input {here}/none --out_dir {out}", "must be a file or a folder"),
    ("dedup --input {a} --out_dir {out} --memory_mb 0", "memory_mb must be at least 1"),
    ("dedup --input {a} --out_dir {out} --memory_mb 0 --how lines", "memory_mb must be at least 1"),
    ("extract --input {cut}", "whole gzip"), ("classify --input {cut}", "whole gzip"),
    ("run --input {paths} --out_dir {out}", "whole gzip"),
    ("classify --text x --model {a}", "magic"),
    ("classify", "--text, --input or --train"),
    ("classify --train {a} {b}", "--model"),
    ("classify --train {a} {empty} --model {out}/m.bin", "two labels"),
    ("classify --train {b} {a} --model {out}/m.bin --dim 0", "dim must be at least 1"),
])
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, capsys, command, says):
    names = {name: tmp_path / f"{name}.txt" for name in ("a", "b", "empty")}
    names |= {"here": tmp_path, "out": tmp_path / "out", "bad": tmp_path / "bad.jsonl",
              "sub": tmp_path / "sub", "cut": tmp_path / "x.html.gz", "paths": tmp_path / "x.paths.gz"}
    names["sub"].mkdir()
    for name in ("cut", "paths"):
        names[name].write_bytes(gzip.compress(b"word " * 99)[:-9])
    for path, text in ((names["a"], "one\ntwo"), (names["b"], "three"), (names["empty"], ""),
                       (names["bad"], '{"words": 1}\n'), (names["sub"] / "a.txt", "x")):
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        data_filter.main(command.format(**names).split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and says in error and "error:" in error


def test_the_verbs_train_label_and_dedup(tmp_path, capsys):
    texts, labels = toy_texts(200)
    for name in ("up", "down"):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": t.upper()}) + "\n" for t, label in zip(texts, labels, strict=True)
            if label == name))
    model = str(tmp_path / "m.bin")
    data_filter.main(["classify", "--train", str(tmp_path / "up.jsonl"), str(tmp_path / "down.jsonl"),
             "--labels", "up", "down", "--model", model, "--lr", "1", "--epoch", "20",
             "--bucket", "500"])
    assert "AUC" in capsys.readouterr().out
    assert json.loads(Path(model + ".json").read_text())["auc"] > 0.9
    data_filter.main(["classify", "--model", model, "--text", "GOOD sunny HAPPY"])
    assert capsys.readouterr().out.startswith("up\t")
    data_filter.main(["dedup", "--input", str(tmp_path / "up.jsonl"), "--out_dir", str(tmp_path / "unique"),
             "--report", str(tmp_path / "gone.jsonl"), "--num_workers", "1"])
    kept = (tmp_path / "unique" / "up.jsonl").read_text().splitlines()
    assert f"{len(kept)} of 100 documents kept" in capsys.readouterr().out
    gone = (tmp_path / "gone.jsonl").read_text().splitlines()
    assert len(kept) + len(gone) == 100


def test_a_classifier_takes_documents_as_a_run_leaves_them(tmp_path, capsys):
    clean = tmp_path / "clean.txt"
    clean.write_text("one\n\nof lines\n<|endoftext|>\ntwo<|endoftext|>\n\n<|endoftext|>\nlast")
    assert [" ".join(text.split()) for text in data_filter.read_texts(clean)] == ["one of lines", "two", "last"]
    clean.write_text("a line\n\nanother\n")
    assert [*data_filter.read_texts(clean)] == ["a line", "another"]
    archive = tmp_path / "x.warc"
    page = b"<p>The cat sat on the mat and the dog did not.</p><p>It was a good day for all of them.</p>"
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    archive.write_bytes(b"".join(
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.org/%d\r\n"
        b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
        % (i, len(body), body) for i in range(3)))  # fmt: skip
    data_filter.main(["run", "--input", str(archive), "--out_dir", str(tmp_path / "out"), "--languages", "any",
                      "--rules", "none", "--no_line_dedup", "--no_copies", "--vocab_size", "257"])  # fmt: skip
    capsys.readouterr()
    data_filter.main(["classify", "--kind", "language", "--input", str(tmp_path / "out/clean.txt")])
    assert capsys.readouterr().out.count("en\t") == 3


def test_the_bench_checks_itself_and_ends_in_one_line_of_json(capsys):
    data_filter.main(["bench", "--documents", "20", "--repeats", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"records", "text main", "all rules", "fasttext", "minhash", "wet funnel"} <= set(result)
    assert min(result.values()) > 0
