"""Common Crawl to training tokens: WARC or WET files in, clean text and token files out.

    python data_filter.py run --input 'CC-*.warc.gz' --out_dir clean  # clean/clean.txt, tokens.bin
    python data_filter.py extract --input page.html --mode main       # the text of one page
    python data_filter.py inspect --out_dir clean                     # kept and dropped, and why

A run reads records, makes text of pages, judges each document (address, language, rules, harm,
quality), masks personal data, then over all documents drops repeated lines and near copies, and
writes text, tokens, report.json and a table whose sums close. Killed at any moment, the same
command goes on; its output is that of an undisturbed run.

Sources:
    [1] ISO 28500, the WARC format, versions 1.0 and 1.1
    [2] Stanford CS336, assignment 4
    [3] Rae et al. 2021, Scaling Language Models (Gopher), appendix A1.1
    [4] Raffel et al. 2020, Exploring the Limits of Transfer Learning (C4), section 2.2, and the
        thresholds of its code, tensorflow_datasets/text/c4_utils.py
    [5] WHATWG Encoding Standard and HTML Standard
    [6] Penedo et al. 2024, The FineWeb Datasets, section 3.6
    [7] Foley 2025, WCXB, web content extraction pages with labels, CC-BY-4.0
"""

import argparse
import codecs
import glob
import gzip
import hashlib
import json
import mmap
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import struct
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from html import unescape as html_unescape
from itertools import compress, islice, pairwise
from pathlib import Path

import numpy as np
import regex

import bpe

# ---------------------------------------------------------------- stage 1: records

MAX_RECORD = 64 << 20  # bytes of a record that are held; larger ones are skipped, and counted
MAX_BODY = 16 << 20  # bytes of a page after its content encoding is undone
INFLATE_BYTES = 1 << 16  # of compressed data given to zlib at once: what it leaves over is copied
WARC_HEAD = re.compile(rb"WARC/\d+\.\d+\r?\n")
WARC_FIELD = re.compile(rb"^(WARC-Type|WARC-Target-URI|Content-Type|Content-Length)[ \t]*:[ \t]*"
                        rb"([^\r\n]*)", re.I | re.M)
HTTP_FIELD = re.compile(rb"^(Content-Type|Content-Encoding|Transfer-Encoding)[ \t]*:[ \t]*"
                        rb"([^\r\n]*)", re.I | re.M)
GZIP_MAGIC = b"\x1f\x8b\x08"
DOCUMENT_KINDS = (b"response", b"conversion", b"resource")


class Record:
    """One document of an archive, or what is wrong with it.

    place: (offset of the gzip member or of the record, number of the record in it), from which
    reading goes on after it; kind: "response", "conversion", ...; problem: None or the reason why
    there is no data
    """

    __slots__ = ("place", "kind", "url", "content_type", "data", "problem")

    def __init__(self, place, kind="", url="", content_type="", data=b"", problem=None):
        self.place, self.kind, self.url = place, kind, url
        self.content_type, self.data, self.problem = content_type, data, problem


def inflate_member(data, offset, held=b"", inflater=None):
    """Returns (bytes, end offset, inflater, problem) of the gzip member at `offset`.

    inflater: None where the member is whole; else it goes on at the end offset, after MAX_RECORD
    """
    inflater = inflater or zlib.decompressobj(31)
    pieces, size = [held], len(held)
    while not inflater.eof:
        window = data[offset:offset + INFLATE_BYTES]
        if not window:
            return b"".join(pieces), offset, None, "truncated gzip member"
        try:
            piece = inflater.decompress(window, MAX_RECORD)
        except zlib.error:
            return b"".join(pieces), offset, None, "broken gzip member"
        left = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        offset += len(window) - len(left)
        pieces.append(piece)
        size += len(piece)
        if size > MAX_RECORD and not inflater.eof:
            return b"".join(pieces), offset, inflater, None
    return b"".join(pieces), offset, None, None


def next_member(data, offset):
    """Returns the offset of the next gzip member that holds a WARC record, or the file's end."""
    while (offset := data.find(GZIP_MAGIC, offset)) >= 0:
        try:
            if zlib.decompressobj(31).decompress(data[offset:offset + 512], 5) == b"WARC/":
                return offset
        except zlib.error:
            pass
        offset += 1
    return len(data)


def split_records(data, at, whole=True):
    """Yields (start, header, body start, body end, problem) of the records in data[at:].

    whole: nothing follows data; else the last tuple has header None and where the rest starts
    """
    size = len(data)
    while at < size:
        while data[at:at + 1] in (b"\r", b"\n"):
            at += 1
        if at >= size:
            return
        head = WARC_HEAD.match(data, at)
        end = data.find(b"\r\n\r\n", at, at + (1 << 16)) if head else -1
        gap = 4
        if head and end < 0:
            end, gap = data.find(b"\n\n", at, at + (1 << 16)), 2
        if end < 0:
            if not whole and size - at < 1 << 16:
                yield at, None, 0, 0, None
                return
            after = data.find(b"\nWARC/", at + 1)
            yield at, b"", 0, 0, "no record header"
            at = after + 1 if after >= 0 else size
            continue
        fields = data[at:end]
        length = re.search(rb"(?im)^Content-Length[ \t]*:[ \t]*(\d{1,18})\s*$", fields)
        if not length:
            after = data.find(b"\nWARC/", end)
            yield at, fields, 0, 0, "no content length"
            at = after + 1 if after >= 0 else size
            continue
        body, stop = end + gap, end + gap + int(length[1])
        if stop > size and not whole:
            yield at, None, 0, stop - at, None
            return
        yield at, fields, body, stop, "truncated record" if stop > size else None
        if stop > size and (after := data.find(b"\nWARC/", body)) >= 0:
            stop = after + 1
        at = stop


def raw_records(data, place=(0, 0)):
    """Yields (place, header, body bytes, problem) of every record of a WARC file's bytes.

    data: bytes or mmap, plain or gzip, with one record a member (as archives are written) or all
    in one; place: where to go on, as read_records gives it
    """
    offset, skip = place
    if data[:3] != GZIP_MAGIC:
        for start, fields, body, stop, problem in split_records(data, offset):
            large = stop - body > MAX_RECORD
            yield ((min(stop, len(data)) if stop else start + 1, 0), fields,
                   b"" if large or problem else data[body:stop],
                   problem or ("record too large" if large else None))
        return
    while offset < len(data):
        start, number, held, inflater, discard = offset, 0, b"", None, 0
        while True:
            held, offset, inflater, problem = inflate_member(data, offset, held, inflater)
            if discard:  # inside a record that is too large to hold
                discard, held = max(0, discard - len(held)), held[discard:]
            rest = len(held)
            for at, fields, body, stop, wrong in split_records(held, 0, whole=inflater is None):
                if fields is None:
                    rest = at
                    if stop > MAX_RECORD:
                        number += 1
                        yield (start, number), b"", b"", "record too large"
                        discard, rest = stop - (len(held) - at), len(held)
                    break
                number += 1
                if number > skip:
                    wrong = (problem or wrong) if wrong else None
                    yield (start, number), fields, held[body:stop], wrong
                    problem = None if wrong else problem
            if inflater is None:
                break
            held = held[rest:]
        if problem:
            if number + 1 > skip:
                yield (start, number + 1), b"", b"", problem
            offset = next_member(data, start + 1)
        skip = 0


def undo_chunks(body):
    """Returns the body of a chunked HTTP message, or None if it is not one."""
    parts, at = [], 0
    while True:
        end = body.find(b"\r\n", at, at + 100)
        size = body[at:end].split(b";")[0].strip()
        if end < 0 or not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
            return b"".join(parts) if parts else None  # cut by the crawler after some chunks
        size = int(size, 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2:end + 2 + size])
        at = end + 2 + size + 2


def undo_encoding(body, encoding):
    """Returns (bytes, problem) of a body whose Content-Encoding is undone, up to MAX_BODY."""
    encoding = encoding.lower().strip()
    if encoding in ("", "identity", "none", "utf-8") or encoding.startswith("text/"):
        return body, None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return b"", f"content encoding {encoding[:20]}"
    if encoding != "deflate" and body[:2] != GZIP_MAGIC[:2]:
        return body, None  # some crawlers decode the body and keep the header
    for bits in ((15, -15) if encoding == "deflate" else (31,)):
        inflater, parts, size = zlib.decompressobj(bits), [], 0
        try:
            for at in range(0, len(body), INFLATE_BYTES):  # what comes before an error is kept
                parts.append(inflater.decompress(body[at:at + INFLATE_BYTES], MAX_BODY - size))
                size += len(parts[-1])
                if inflater.eof or size >= MAX_BODY:
                    break
        except zlib.error:
            pass
        if size:
            return b"".join(parts), None
    return (body, None) if encoding == "deflate" else (b"", "broken content encoding")


def read_http(record):
    """Takes the HTTP header off a record's data: its status, type and encodings."""
    head, gap, body = record.data.partition(b"\r\n\r\n")
    if not gap:
        head, _, body = record.data.partition(b"\n\n")
    if not head.startswith(b"HTTP/"):
        record.problem = "no HTTP header"
        return
    status = head[:20].split(b" ", 2)[1:2]
    fields = {name.lower(): value.decode("latin-1").strip()
              for name, value in HTTP_FIELD.findall(head)}
    record.content_type = fields.get(b"content-type", "")
    if "chunked" in fields.get(b"transfer-encoding", "").lower():
        body = undo_chunks(body) or body
    record.data = body
    if not status or status[0][:1] != b"2":
        record.problem = "HTTP status not 2xx"
        return
    record.data, record.problem = undo_encoding(body, fields.get(b"content-encoding", ""))


def is_text(record):
    """Returns whether a record is a page or plain text, by its type or else its first bytes."""
    kind = record.content_type.split(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml", "text/plain"):
        return not record.data[:8].startswith((b"%PDF", b"\x89PNG", b"GIF8", b"\xff\xd8\xff", b"PK"))
    start = record.data[:1024].lstrip().lower()
    return kind in ("", "unk", "application/octet-stream") and (
        start.startswith((b"<!doctype html", b"<html")) or b"<body" in start or b"<head" in start)


def read_records(path, place=(0, 0), others=None):
    """Yields the documents of a WARC or WET file as Records, in order; broken ones with a problem.

    place: of the last record that was read, to go on after it; others: a Counter of the kinds of
    the records that are no documents.  source: [1]
    raises: ValueError if the file is no WARC
    """
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            raise ValueError(f"an input must hold WARC records, got an empty file, {path}; leave "
                             "it out, or fetch it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            check_warc(path, data)
            for where, fields, body, problem in raw_records(data, tuple(place)):
                found = {name.lower(): value for name, value in WARC_FIELD.findall(fields)}
                kind = found.get(b"warc-type", b"")
                if kind not in DOCUMENT_KINDS and not problem:
                    if others is not None:
                        others[kind.decode("latin-1") or "no type"] += 1
                    continue
                yield make_record(where, kind, found, body, problem)


def check_warc(path, data):
    """Raises ValueError unless the bytes are a WARC file's, plain or gzip."""
    start = bytes(data[:8])
    if start[:3] == GZIP_MAGIC:
        try:
            start = zlib.decompressobj(31).decompress(data[:4096], 8)
        except zlib.error:
            start = b"WARC/" if next_member(data, 1) < len(data) else b"\x1f\x8b\x08"
    if not start.startswith(b"WARC/"):
        raise ValueError(f"an input must be a WARC or WET file, got {path}, which starts with "
                         f"{start!r}; give the files that Common Crawl calls warc or wet, or "
                         "leave this one out")


def make_record(place, kind, fields, body, problem):
    """Returns the Record of one document, its HTTP header and encodings undone."""
    url = fields.get(b"warc-target-uri", b"").decode("utf-8", "replace").strip("<> \r")
    record = Record(place, kind.decode("latin-1"), url, "", body, problem)
    if problem:
        record.data = b""
        return record
    kind_of_content = fields.get(b"content-type", b"").decode("latin-1")
    if kind == b"response" and kind_of_content.replace(" ", "").startswith("application/http"):
        read_http(record)
    else:
        record.content_type = kind_of_content
    if kind != b"conversion" and not record.problem and not is_text(record):
        record.problem = "content type"
    if not record.problem and not record.data.strip():
        record.problem = "empty"
    return record


# ---------------------------------------------------------------- stage 2: bytes to text

# Labels of the WHATWG Encoding Standard [5] that Python reads otherwise, or not at all.
ENCODING_NAMES = {
    "iso-8859-1": "cp1252", "latin1": "cp1252", "latin-1": "cp1252", "us-ascii": "cp1252",
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso-8859-9": "cp1254", "gb2312": "gb18030",
    "gbk": "gb18030", "gb_2312-80": "gb18030", "x-gbk": "gb18030", "shift_jis": "cp932",
    "shift-jis": "cp932", "x-sjis": "cp932", "sjis": "cp932", "ks_c_5601-1987": "cp949",
    "euc-kr": "cp949", "big5": "big5hkscs", "tis-620": "cp874", "iso-8859-11": "cp874",
    "x-cp1251": "cp1251", "x-mac-roman": "mac_roman", "macintosh": "mac_roman", "utf8": "utf-8",
    "iso-8859-8-i": "iso-8859-8", "unicode-1-1-utf-8": "utf-8",
}
TEXT_ENCODINGS = frozenset(
    "utf-8 utf-16 utf-16-le utf-16-be cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258"
    " cp866 cp874 cp932 cp949 gb18030 big5hkscs euc_jp iso2022_jp iso8859-2 iso8859-3 iso8859-4"
    " iso8859-5 iso8859-6 iso8859-7 iso8859-8 iso8859-10 iso8859-13 iso8859-14 iso8859-15"
    " iso8859-16 koi8-r koi8-u mac-roman mac_roman mac-cyrillic".split())
BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
META_CHARSET = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
XML_CHARSET = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]+)", re.I)
HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
META_BYTES = 4096  # where a meta tag is looked for; browsers look at 1,024
NEARLY = 1e-3  # share of the bytes that may be wrong in what is still taken for UTF-8
# Letters of each code page's language in order of use: a wrong code page gives other characters.
DETECTED = {
    "cp1251": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфё", "koi8-r": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфё",
    "cp1250": "áéíóúěščřžýůąęłńśźżőűöüă", "cp1253": "αοιετσνηυρπκμλωςγδθάέήίόύώ",
    "cp1255": "יוהלאתרבמשנכדעחקפגטזסצםןךףץ", "cp1256": "اليمونرتبةعدسفهكقحجشطصخأإ",
    "cp1254": "ıışğüöçİŞĞÜÖÇ", "cp874": "านรอกเงมยลวดทสตะปบคหแจพชขใไโผ", "cp1252": "éàèäöüçñáíóúêâîôûåøæßëï’“”–",
}


def python_encoding(label):
    """Returns Python's name for a charset label of the web, or None if it is not a text's."""
    label = label.strip().strip("\"'").lower()
    label = ENCODING_NAMES.get(label, label)
    try:
        name = codecs.lookup(label).name
    except (LookupError, ValueError):
        return None
    name = {"iso8859-1": "cp1252", "ascii": "cp1252", "utf-16": "utf-16-le"}.get(name, name)
    return name if name in TEXT_ENCODINGS else None


def decode_leniently(data, encoding):
    """Returns the text, or None if more than NEARLY of the bytes are wrong in this encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    limit = max(1, NEARLY * len(data)) if not encoding.startswith("cp12") else len(data)
    return text if text.count("\ufffd") <= limit else None


def detect_encoding(data):
    """Returns the likely encoding of bytes that declare none and are no UTF-8."""
    sample = data[:1 << 16]
    if sample.count(0) > len(sample) // 8:
        return "utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"
    high = sum(map(len, re.findall(rb"[\x80-\xff]+", sample)))
    if b"\x1b$" in sample:
        return "iso2022_jp"
    best, best_score = "cp1252", 0.25
    for encoding in ("euc_jp", "cp932", "gb18030", "cp949", "big5hkscs"):
        text = sample.decode(encoding, "replace")
        wide = [c for c in text if c >= "\x80"]
        if not wide or wide.count("\ufffd") > 0.01 * len(wide) + 1:
            continue
        common = len(EAST_ASIAN[encoding].findall(text))
        score = common / len(wide) * (2 * len(wide) / max(high, 1) > 0.9)
        if score > best_score:
            best, best_score = encoding, score
    # Letters beyond ASCII stand alone in Latin words, and side by side in those of other scripts.
    beside = sum(map(len, re.findall(rb"[\x80-\xff]{2,}", sample)))
    latin = beside < 0.5 * high
    for encoding, letters in DETECTED.items():
        if latin != (encoding in ("cp1250", "cp1252", "cp1254")):
            continue
        text = sample.decode(encoding, "replace")
        wide = [c for c in text if c >= "\x80" and c not in "\xa0\u2013\u2019\u201c\u201d"]
        head = set(letters[:12] if len(letters) > 20 else letters)
        score = sum((c in head) + 0.5 * (c in letters) for c in wide) / max(len(wide), 1) / 1.5
        if score > best_score + 0.02:
            best, best_score = encoding, score
    return best


# Characters that are common in the script that an encoding is for, and rare in what it misreads.
EAST_ASIAN = {
    "euc_jp": re.compile("[ぁ-んァ-ヶー、。]"), "cp932": re.compile("[ぁ-んァ-ヶー、。]"),
    "gb18030": re.compile("[的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下，。、]"),
    "cp949": re.compile("[이다의는에을가를한고지로하사은도기으서어자대시인리해있스아나그정수보일부"
                        "라것상전제구장만과주니들마면여와게습기유성원했]"),
    "big5hkscs": re.compile("[的一是不了在人有我他這中大來上國個到說們為子和你地出道也時年得就那要下，。、]"),
}


def decode_html(data, content_type=None):
    """Returns (text, encoding) of a page's bytes.

    In this order: byte order mark, charset of the HTTP header, of a meta tag, strict UTF-8,
    UTF-8 with at most NEARLY of the bytes wrong, a detector. A declared encoding that the bytes
    contradict is passed over.  source: [5] section 8, WHATWG HTML section 13.2.3
    content_type: the value of the HTTP header, such as "text/html; charset=koi8-r"
    """
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return data[len(mark):].decode(encoding, "replace"), encoding
    declared = []
    if content_type and (found := HEADER_CHARSET.search(content_type)):
        declared.append(found[1])
    head = data[:META_BYTES]
    declared += [found[1].decode("ascii", "replace") for found in
                 (META_CHARSET.search(head), XML_CHARSET.match(head)) if found]
    for place, label in enumerate(declared):
        encoding = python_encoding(label)
        if encoding and encoding.startswith("utf-16") and data[:64].count(0) < 8:
            encoding = "utf-8"  # a meta tag that can be read as ASCII cannot be right about it
        if encoding and (text := decode_leniently(data, encoding)) is not None:
            return text, encoding
    if (text := decode_leniently(data, "utf-8")) is not None:
        return text, "utf-8"
    encoding = detect_encoding(data)
    return data.decode(encoding, "replace"), encoding


# ---------------------------------------------------------------- stage 2: HTML to blocks

MAX_HTML_CHARS = 4 << 20  # of a page; Common Crawl itself cuts pages at 1 MiB, since 2025 5 MiB
MAX_DEPTH = 256  # of open elements; deeper ones lie flat in it
MAX_TAGS = 200_000  # of a page that are read
PAGE_SECONDS = 1.2  # after which a page is cut where it has been read to
UNSEEN = re.compile(r"<!--(?:>|->|.*?(?:-->|\Z))|<(?:script\b.*?(?:</script\s*>|\Z)|style\b.*?"
                    r"(?:</style\s*>|\Z)|[!?][^<>]*>)", re.I | re.S)
HELD = {name: re.compile(rf"<{name}\b[^<>]*+>.*?</{name}\s*>", re.I | re.S)
        for name in ("svg", "noscript", "template", "iframe", "select", "textarea", "head")}
# No quantifier here can be left by two ways, and none runs on past a `<`, but for a kilobyte in
# quotes: the time stays linear in the size of the page, whatever is in it.
TAG = re.compile(r"""<(/?[a-zA-Z][^\s<>/]*+)((?:[^<>"']++|"[^"<>]*+"|'[^'<>]*+'|"[^"]{0,1000}+\""""
                 r"""|'[^']{0,1000}+'|["']){0,400}+)>""")
ATTRIBUTE = re.compile(r"""(class|id|role|itemprop|style|hidden|aria-hidden)(?:\s*=\s*("[^"]*+"|"""
                       r"""'[^']*+'|[^\s"'>]++))?""", re.I)
ALT = re.compile(r"""\balt\s*=\s*("[^"]*"|'[^']*')""", re.I)
WORD_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")

INLINE, BLOCK, PARAGRAPH, SKIP, LINK, BREAK, LIST, ITEM, CELL, ROW, IMAGE, PRE, RULE = range(13)
KINDS = dict.fromkeys(
    "div section article main aside nav header footer body html form fieldset blockquote center dl "
    "dt dd figure figcaption address details summary table thead tbody tfoot caption dir menu "
    "hgroup label legend dialog".split(), BLOCK)
KINDS |= dict.fromkeys("p h1 h2 h3 h4 h5 h6".split(), PARAGRAPH)
KINDS |= dict.fromkeys("script style select option textarea button datalist object embed canvas "
                       "video audio map applet noframes iframe svg noscript template head title "
                       "math".split(), SKIP)
KINDS |= {"a": LINK, "br": BREAK, "ul": LIST, "ol": LIST, "li": ITEM, "td": CELL, "th": CELL,
          "tr": ROW, "img": IMAGE, "pre": PRE, "hr": RULE}
CLOSED_BY = {"li": ("li", ("ul", "ol", "menu")), "td": ("td", ("table",)), "th": ("th", ("table",)),
             "tr": ("tr", ("table",)), "dt": ("dd", ("dl",)), "dd": ("dt", ("dl",)),
             "p": ("p", ())}

# What the words of class, id and role say about an element; names of groups are features below.
GROUP_WORDS = {
    "nav": "nav navbar navigation menu menus breadcrumb breadcrumbs toc topbar toolbar tabs tab "
           "pagination pager paging skip subnav submenu megamenu dropdown sitemap",
    "footer": "footer foot bottom copyright colophon legal",
    "side": "sidebar aside side rail widget widgets secondary complementary",
    "comment": "comment comments disqus respond reply replies discussion commentlist",
    "share": "share sharing social facebook twitter addthis follow likes pinterest sharedaddy "
             "sns bookmark whatsapp",
    "related": "related recommended recommend recommendations similar more also popular trending "
               "latest recent teaser teasers carousel slider promo promoted readmore upsell next "
               "prev previous",
    "ads": "ad ads advert advertisement sponsor sponsored outbrain taboola dfp adsense",
    "cookie": "cookie cookies consent gdpr onetrust popup modal overlay lightbox dialog newsletter "
              "subscribe subscription signup optin paywall notification alert toast",
    "hidden": "hidden hide sr screenreader visually tooltip placeholder offscreen noprint",
    "content": "content article post entry body story main text description prose markdown copy "
               "rich wysiwyg articlebody rte",
    "item": "item card grid list listing product products result results tile row col",
}
GROUPS = {name: 1 << bit for bit, name in enumerate(GROUP_WORDS)}
WORD_GROUPS = {}
for group_name, group_words in GROUP_WORDS.items():
    for group_word in group_words.split():
        WORD_GROUPS[group_word] = WORD_GROUPS.get(group_word, 0) | GROUPS[group_name]
TAG_BITS = {name: 1 << (len(GROUPS) + bit) for bit, name in enumerate(
    "nav footer header aside form main article figure table ul section dl".split())}
TAG_BITS["ol"] = TAG_BITS["ul"]
UNSEEN_BIT = 1 << (len(GROUPS) + len(TAG_BITS))


@lru_cache(maxsize=1 << 15)
def attribute_groups(attributes):
    """Returns the bits of GROUPS that an element's class, id, role and style speak of."""
    bits = 0
    for name, value in ATTRIBUTE.findall(attributes[:2000]):
        name, value = name.lower(), value.strip("\"'")
        if name == "style":
            squeezed = value.replace(" ", "").lower()
            if "display:none" in squeezed or "visibility:hidden" in squeezed:
                bits |= GROUPS["hidden"] | UNSEEN_BIT
        elif name == "hidden" and not value:
            bits |= GROUPS["hidden"] | UNSEEN_BIT
        elif name == "aria-hidden":
            bits |= GROUPS["hidden"] * (value.lower() == "true")
        else:
            for word in WORD_PARTS.findall(value[:400]):
                bits |= WORD_GROUPS.get(word.lower(), 0)
    return bits


def strip_unseen(html):
    """Returns the page without comments, scripts, styles and other parts that no reader sees."""
    html = UNSEEN.sub(" ", html[:MAX_HTML_CHARS])
    for name, pattern in HELD.items():
        end = max(html.rfind(f"</{name}"), html.rfind(f"</{name.upper()}"))
        if end >= 0:  # up to the last end tag each start tag has one: no search runs to the end
            end = html.find(">", end) + 1 or len(html)
            html = pattern.sub(" ", html[:end]) + html[end:]
    return html


class Page:
    """The blocks of a page's text, in order, and the elements that they lie in.

    texts, separators (before each: newlines or tabs), prefixes (indent and bullet), links
    (characters that are in links), nodes (the element of each block): lists of equal length.
    parents, names, own, inherited (bits of GROUPS, TAG_BITS): one entry an element, root first.
    """

    def __init__(self):
        self.texts, self.separators, self.prefixes, self.links, self.nodes = [], [], [], [], []
        self.parents, self.names, self.own, self.inherited = [0], ["html"], [0], [0]


def parse_html(html, alt_texts=True):
    """Returns the Page of an HTML text; cuts what is beyond the limits above.

    Not a browser's tree: elements that only style text are no elements here, and of the rules
    for missing end tags those are kept that change which text is whose.
    alt_texts: take images' alternative texts for text
    """
    page, deadline = Page(), time.perf_counter() + PAGE_SECONDS
    pieces = TAG.split(strip_unseen(html), MAX_TAGS)
    if len(pieces) == 3 * MAX_TAGS + 1:
        pieces[-1] = ""  # it holds the rest, tags and all
    stack, node, too_deep = [("html", 0)], 0, 0
    parts, link_chars, link_depth, newlines, preformatted = [], 0, 0, 0, 0
    lists, bullet, cell = [], "", False

    def flush():
        nonlocal parts, link_chars, newlines, bullet, cell
        text = "".join(parts)
        if "&" in text:
            text = html_unescape(text)
        text = text.strip("\r\n") if preformatted else " ".join(text.split())
        parts = []
        if text and not text.isspace():
            page.texts.append(text)
            page.separators.append("\t\t" if cell else "\n\n" if newlines > 1 else "\n")
            depth = min(len(lists), 8)
            page.prefixes.append("  " * depth + bullet if bullet else
                                 "  " * depth + "  " * bool(lists) if not cell else "")
            page.links.append(link_chars)
            page.nodes.append(node)
            newlines, bullet, cell = 0, "", False
        link_chars = 0

    def leave(index):
        nonlocal node, preformatted, link_depth
        for name, _ in stack[index:]:
            if name in ("ul", "ol") and lists:
                lists.pop()
            elif name == "pre":
                preformatted -= 1
        del stack[index:]
        node = stack[-1][1]
        link_depth = 0 if link_depth > index else link_depth

    skipped, row_has_text = "", False
    for count, (text, name, attributes) in enumerate(zip(
            pieces[0::3], [*pieces[1::3], "br"], [*pieces[2::3], ""], strict=True)):
        if skipped:
            if name[0] == "/" and name[1:].lower() == skipped:
                skipped = ""
            elif not (name[0] == "/" and KINDS.get(name[1:].lower()) in (BLOCK, PARAGRAPH)):
                continue
            else:
                skipped = ""  # it was never closed
            if KINDS.get(name[1:].lower()) == SKIP:
                continue
            text = ""
        if text and (parts or preformatted or not text.isspace()):
            parts.append(text)
            if link_depth:
                link_chars += len(text)
        closing = name[0] == "/"
        if closing:
            name = name[1:]
        kind = KINDS.get(name)
        if kind is None:
            name = name.lower()
            kind = KINDS.get(name, BLOCK if "-" in name else INLINE)
        if kind == INLINE:
            continue
        if kind == LINK:
            link_depth = 0 if closing else len(stack)
        elif kind == BREAK:
            if preformatted:
                parts.append("\n")
            elif parts:
                flush()
                newlines = max(newlines, 1)
            else:
                newlines += 1
        elif kind == IMAGE:
            if alt_texts and (found := ALT.search(attributes)):
                parts.append(f" {found[1][1:-1]} ")
        elif kind == SKIP:
            if not closing and attributes[-1:] != "/" and name not in ("embed", "option"):
                skipped = name
        elif closing:
            if parts:
                flush()
            newlines = max(newlines, 2 if kind == PARAGRAPH else 1)
            if too_deep:
                too_deep -= 1
            else:
                for index in range(len(stack) - 1, 0, -1):
                    if stack[index][0] == name:
                        leave(index)
                        break
                    if name == "p" and stack[index][0] != "p":
                        break
        else:
            if parts:
                flush()
            newlines = max(newlines, 2 if kind == PARAGRAPH else 1)
            if kind == RULE or attributes[-1:] == "/" and "-" in name:
                continue
            if name in CLOSED_BY:
                wanted, fences = CLOSED_BY[name]
                for index in range(len(stack) - 1, max(0, len(stack) - 8), -1):
                    if stack[index][0] in fences:
                        break
                    if stack[index][0] in (wanted, name):
                        leave(index)
                        break
                    if name == "p":
                        break
            elif stack[-1][0] == "p":
                leave(len(stack) - 1)
            if len(stack) >= MAX_DEPTH:
                too_deep += 1
                continue
            own = attribute_groups(attributes) if attributes else 0
            page.own.append(own)
            page.inherited.append(page.inherited[node] | own | TAG_BITS.get(name, 0))
            page.parents.append(node)
            page.names.append(name)
            node = len(page.names) - 1
            stack.append((name, node))
            if kind == LIST:
                lists.append(0 if name == "ol" else None)
            elif kind == ITEM:
                if lists and lists[-1] is not None:
                    lists[-1] += 1
                    bullet = f"{lists[-1]}. "
                else:
                    bullet = "• "
            elif kind == CELL:
                cell, row_has_text = row_has_text, True
            elif kind == ROW:
                row_has_text = cell = False
            elif kind == PRE:
                preformatted += 1
        if closing and kind in (ROW, BLOCK):
            row_has_text = cell = False
        if not count & 4095 and time.perf_counter() > deadline:
            break
    flush()
    return page


def layout(page, keep=None):
    """Returns the text of a page's blocks (those that `keep` marks) with its line breaks."""
    out, separator = [], ""
    for index, text in enumerate(page.texts):
        if keep is not None and not keep[index]:
            separator = max(separator, page.separators[index].replace("\t", "\n")[:2], key=len)
            continue
        if out:
            gap = page.separators[index]
            out.append("\n\n" if separator == "\n\n" and gap != "\t\t" else gap)
        separator = ""
        out.append(page.prefixes[index] + text)
    return "".join(out).strip("\n")


MAX_BLOCKS = 20_000  # of a page that are judged; what follows is dropped in mode "main"
WORD = re.compile(r"\w+")
ARTICLE_BODY = re.compile(r'"articleBody"\s*:\s*"((?:[^"\\]|\\.){0,400000}+)"')
HEADINGS = ("h1", "h2", "h3", "h4")
NOT_CONTENT = ("<nav>", "<footer>", "side", "comment", "share", "related", "ads", "cookie")
ALL_BITS = GROUPS | {f"<{name}>": bit for name, bit in TAG_BITS.items()}


def article_body(html):
    """Returns the articleBody that a page's JSON-LD gives, or ""."""
    found = ARTICLE_BODY.search(html) if "articleBody" in html else None
    if not found:
        return ""
    try:
        text = json.loads(f'"{found[1]}"', strict=False)
    except ValueError:
        return ""
    if "<" in text:
        text = layout(parse_html(html_unescape(text) if "&lt;" in text else text))
    return html_unescape(text)


def neighbours(values, offsets):
    """Returns values shifted by each offset, with zeros beyond the ends, summed."""
    out = np.zeros(len(values))
    for offset in offsets:
        if offset > 0:
            out[:-offset] += values[offset:]
        else:
            out[-offset:] += values[:offset]
    return out


def text_below(page, words):
    """Returns the words of each element and all below it. words: of the blocks, a float array"""
    total = np.zeros(len(page.parents))
    np.add.at(total, page.nodes[:len(words)], words)
    total = total.tolist()
    for n in range(len(total) - 1, 0, -1):  # children come after their parents
        total[page.parents[n]] += total[n]
    return total


def best_element(page, words):
    """Returns the lowest element that still holds most of the clean text, as a bool per element
    (it and those below), and the share of the text that each element holds."""
    total = text_below(page, words)
    heaviest, children = 0, {}
    for n in range(1, len(total)):
        if total[n] > total[children.get(page.parents[n], 0)] or page.parents[n] not in children:
            children[page.parents[n]] = n
    while (below := children.get(heaviest)) and total[below] >= 0.7 * total[heaviest] > 0 \
            and page.names[below] not in ("p", "pre", "blockquote"):
        heaviest = below
    inside = [n == heaviest for n in range(len(total))]
    for n in range(heaviest + 1, len(total)):
        inside[n] = inside[page.parents[n]]
    return np.array(inside), np.array(total) / max(total[0], 1)


def block_features(page):
    """Returns {name: (blocks,) array}: what tells a page's main content from the rest of it."""
    B = min(len(page.texts), MAX_BLOCKS)
    texts, nodes, parents = page.texts[:B], np.array(page.nodes[:B]), np.array(page.parents)
    words = np.array([text.count(" ") + 1 for text in texts], float)
    chars = np.array([len(text) for text in texts], float)
    link = np.minimum(np.array(page.links[:B]) / chars, 1.0)
    ends = np.array([text[-1] in ".!?:\"”…»。" for text in texts])
    tags = [page.names[n] for n in page.nodes[:B]]
    bits = np.array(page.inherited)[nodes]
    features = {f"in {name}": (bits & ALL_BITS[name]) > 0 for name in IN_ELEMENTS}
    good = words * (link < 0.3) * (words > 8) * (0.3 + 0.7 * ends)  # prose, more or less
    mostly = {name: (good * features[f"in {name}"]).sum() > 0.5 * max(good.sum(), 1)
              for name in ("item", "hidden", "comment", "related", "side")}
    unseen = (bits & UNSEEN_BIT) > 0
    bad = np.logical_or.reduce([features[f"in {name}"] for name in NOT_CONTENT]) | unseen
    for name in ("comment", "related", "side"):  # where nearly all text is, it is the content
        if mostly[name]:
            bad &= ~features[f"in {name}"]
    clean = good * ~bad
    inside, share = best_element(page, clean)
    inside = inside[nodes]
    index, places = np.arange(B), np.cumsum(words) / words.sum()
    last = np.flatnonzero(inside)[-1:]
    h1 = tags.index("h1") if "h1" in tags else 0
    texts_alike = Counter(texts)
    looks = [(page.names[n], page.own[n], page.names[page.parents[n]], page.own[page.parents[n]])
             for n in page.nodes[:B]]
    looks_alike = Counter(looks)
    alike = np.log(np.array([looks_alike[look] for look in looks]))
    return features | {
        "bias": np.ones(B), "words<3": words < 3, "words 41-80": (words > 40) & (words <= 80),
        "link>.9": link > 0.9, "link<.2": (link > 0) & (link <= 0.2), "ends": ends,
        "ends,long": ends & (words > 10), "p": [tag == "p" for tag in tags],
        "h3": [tag == "h3" for tag in tags], "div": [tag == "div" for tag in tags],
        "heading": [tag in HEADINGS for tag in tags], "unseen": unseen, "bad": bad,
        "mostly item,out": ~features["in item"] & mostly["item"],
        "mostly hidden": features["in hidden"] & mostly["hidden"],
        "in best": inside, "in best,bad": inside & bad,
        "after best": index > last[0] if len(last) else np.zeros(B),
        "share above": share[parents[parents[nodes]]],
        "link before": neighbours(link > 0.5, (-1,)), "good after": np.log1p(neighbours(good, (1,))),
        "before h1": index < h1, "place>.75": places > 0.75, "place>.9": places > 0.9,
        "repeated": [texts_alike[text] > 1 for text in texts], "alike": alike,
        "alike,short": alike * (words < 6), "rich": np.full(B, np.log1p(clean.sum()) / 7),
    }


IN_ELEMENTS = ("<nav>", "<footer>", "<header>", "<form>", "<main>", "<figure>", "<ul>", "cookie",
               "hidden", "content", "item", "side", "comment", "share", "related", "ads")


# Log odds of a block to be main content, fitted by logistic regression to half the pages of [7]
# (those with an even place in the development set), without the features that hardly told.
WEIGHTS = {
    "bias": 0.49, "in <nav>": -0.56, "in <footer>": -0.86, "in <header>": -0.73, "in <form>": -1.23,
    "in <main>": 0.28, "in <figure>": -1.36, "in <ul>": 0.37, "in cookie": -0.87,
    "in hidden": -0.89, "in content": 0.52, "in item": -0.47, "in side": -0.36, "in comment": -0.64,
    "words<3": 0.56, "words 41-80": 0.7, "link>.9": -0.47, "link<.2": -0.66, "ends": 0.44,
    "ends,long": 0.49, "p": -0.32, "h3": 0.53, "div": -0.51, "heading": 0.68, "unseen": 0.77,
    "bad": -0.35, "mostly item,out": -0.54, "mostly hidden": 0.99, "in best": 0.89,
    "in best,bad": -0.94, "after best": -1.27, "share above": 1.07, "link before": -0.42,
    "good after": 0.18, "before h1": -1.17, "place>.75": -0.58, "place>.9": -0.47, "repeated": 0.37,
    "alike": 0.38, "alike,short": -0.15, "rich": -1.6,
}
THRESHOLD = -0.25  # of the log odds: text that is missed costs more than text too much


def main_content(page):
    """Returns a bool array: which blocks of a page are main content."""
    if not page.texts:
        return np.zeros(0, bool)
    features = block_features(page)
    odds = np.array(list(WEIGHTS.values())) @ np.array([features[name] for name in WEIGHTS], float)
    keep = odds > THRESHOLD
    if not keep.any():
        keep = odds >= odds.max()
    return np.concatenate([keep, np.zeros(len(page.texts) - len(keep), bool)])


def extract_text_from_html_bytes(html_bytes, mode="plain", content_type=None):
    """Returns the text of a page.  source: [2] extract_text

    mode: "plain", all that a reader sees, laid out; "main", without menus, advertisements,
    banners and comments; content_type: the value of the HTTP header, for its charset

    >>> extract_text_from_html_bytes(b"<h1>Moby</h1><ul><li>a whale</ul>")
    'Moby\\n\\n  • a whale'
    """
    if mode not in ("plain", "main"):
        raise ValueError(f"mode must be plain or main, got {mode!r}; choose one")
    html, _ = decode_html(html_bytes, content_type)
    page = parse_html(html, alt_texts=mode == "plain")
    if mode == "plain":
        return layout(page)
    body = article_body(html)
    text = layout(page, main_content(page))
    if len(body) > 400 and len(text) < 0.6 * len(body):  # a page that a script would have filled
        return body
    return text


# ---------------------------------------------------------------- stage 4: personal data

EMAIL_MASK, PHONE_MASK, IP_MASK = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"
EMAIL = re.compile(r"(?<![\w.+%@/|-])\w[\w.+%&'-]{0,63}@(?!\dx\.)"
                   r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w@]|[-.]\w*@|:[\w~]+/)")
FILE_ENDINGS = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "xml", "html")
DASH = r"[-.\u2010-\u2013\u00a0 ]"
# US and Canada: three, three and four digits; an area code starts with 2 to 9. A number without
# any separator and one that follows digits are identifiers more often than telephones.
PHONE = re.compile(
    rf"(?<![\w.+#$€£=&-])(?<!\d[,:/])(?<![^\W\d]/)(?<!//)(?:(?:\+1|\b1){DASH}?{DASH}?)?"
    rf"(?:\([2-9]\d\d\){DASH}?{DASH}?\d{{3}}{DASH}?\d{{4}}"
    rf"|[2-9]\d\d(?P<s>{DASH}|[ ]-[ ])\d{{3}}(?:(?P=s)|-)\d{{4}}|(?P<bare>[2-9]\d\d\d{{7}}))"
    rf"(?:(?: ?x| ?ext\.? ?| ?extension ?)\d{{1,6}})?"
    rf"(?![\w@]|[-=]\w|/[^\W\d]|\.\d|[ ,:]\d{{4}}\b|%)", re.I)
MAYBE_PHONE = re.compile(rf"\d\d\d(?:{DASH}| - )?\d\d\d\d")  # every match of the others has one
AFTER_DIGIT = re.compile(DASH)
PLUS_PHONE = re.compile(rf"(?<![\w+])\+1{DASH}?(?:\([2-9]\d\d\)|[2-9]\d\d){DASH}?\d{{3}}{DASH}?\d{{4}}"
                        rf"(?!\w|[-.]\d)")
PHONE_CONTEXT = re.compile(r"\b(?:phone|telephone|tel|call|cell|mobile|fax|contact|text|dial|reach|"
                           r"whatsapp|sms|ring|toll|desk|office|helpline|hotline)\b[^\n]{0,40}$", re.I)
# Before a number: with separators it is a telephone's unless one of the first list says otherwise.
IDENTIFIER = (r"isbn(?:-1[03])?|issn|order|invoice|ticket|tracking|serial|sku|part|upc|asin|doi|barcode|"
              r"patent|version|build|case|ref|reference|transaction|confirmation|acct|account|routing")
BARE_IDENTIFIER = IDENTIFIER + (
    r"|id|item|product|model|member|policy|customer|number|no|nr|pmid|timestamp|iban|card|ssn|code|key|"
    r"hash|article|document|record|employee|student|user|passport|licen[sc]e|permit|vin|lot|batch|job|"
    r"seed|population|total|zip|ein|npi|tin|vat|uid|pid|epoch|bytes|size|value|sum")
AFTER_IDENTIFIER = (r"[ \t]*(?:number|no|id|code|#)?\.?[ \t]*(?:is|was|of)?[ \t]*[:#=-]*[ \t]*$")
IDENTIFIER_CONTEXT = re.compile(rf"(?<![A-Za-z])(?:{IDENTIFIER}){AFTER_IDENTIFIER}", re.I)
BARE_CONTEXT = re.compile(rf"(?<![A-Za-z])(?:{BARE_IDENTIFIER}){AFTER_IDENTIFIER}", re.I)
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IP = re.compile(rf"(?<![\w.])(?<![A-Za-z][-/_])(?<!\d[,:/-])(?:{OCTET}\.){{3}}{OCTET}"
                rf"(?!\w|\.\w|-[A-Za-z]|,\d)")
MAYBE_IP = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")
VERSION_CONTEXT = re.compile(
    r"(?<![A-Za-z])(?:version|versions|ver|v|release|released|build|firmware|revision|rev|section|sections|§|chapter|"
    r"clause|paragraph|rule|article|figure|table|appendix|item|oid|driver|update|upgrade[d]?|patch|"
    r"kernel|sdk|api|package|assembly|hotfix|installer|software|app|theorem|lemma|exercise|step)"
    r"[ \t]*(?:number|no\.?|is|to|from|was)?[ \t]*[:#=(]*[ \t]*$", re.I)


def mask_until_stable(text, mask_once):
    """Returns (text, count) after mask_once(text) -> (text, count) found nothing more.

    A mask can uncover a match beside it (a number is no telephone while digits precede it).
    """
    total = 0
    while True:
        text, count = mask_once(text)
        total += count
        if not count:
            return text, total


def mask_matches(pattern, text, mask, accept):
    """Returns (text, count) with the matches that accept(match, end of the last) takes masked."""
    count, end = 0, -2

    def replace(match):
        nonlocal count, end
        if not accept(match, end):
            return match[0]
        count, end = count + 1, match.end()
        return mask

    return pattern.sub(replace, text), count


def is_email(match, last):
    end = match[0].rsplit(".", 1)[1].lower()
    name = match[0].split("@")[0]
    return end not in FILE_ENDINGS and ".." not in name and name.lower() not in ("git", "npm")


def mask_emails(text):
    """Returns (text with each address as EMAIL_MASK, how many).  source: [2] mask_pii

    >>> mask_emails("write to a.b@example.com.")
    ('write to |||EMAIL_ADDRESS|||.', 1)
    """
    if "@" not in text:
        return text, 0
    return mask_until_stable(text, lambda t: mask_matches(EMAIL, t, EMAIL_MASK, is_email))


def is_phone(match, last):
    """Not after other digits (a card's), nor after a word that speaks of another kind of number."""
    text, start = match.string, match.start()
    if start > 1 and text[start - 2].isdigit() and start - 1 != last and AFTER_DIGIT.match(
            text[start - 1]):
        return False
    before, bare = text[max(0, start - 60):start], match["bare"]
    context = BARE_CONTEXT if bare else IDENTIFIER_CONTEXT
    if context.search(before) and not PHONE_CONTEXT.search(before):
        return False
    return not bare or len(set(bare)) > 2 and bare not in "01234567890123456789"


def mask_phone_numbers(text):
    """Returns (text with each US or Canadian telephone number as PHONE_MASK, how many).

    >>> mask_phone_numbers("call (283)-182-3829")
    ('call |||PHONE_NUMBER|||', 1)
    """
    if not MAYBE_PHONE.search(text):
        return text, 0

    def once(text):
        plus = 0
        if "+1" in text:
            text, plus = mask_matches(PLUS_PHONE, text, PHONE_MASK, lambda match, last: True)
        text, count = mask_matches(PHONE, text, PHONE_MASK, is_phone)
        return text, plus + count

    return mask_until_stable(text, once)


def is_ip(match, last):
    before = match.string[max(0, match.start() - 30):match.start()]
    return not VERSION_CONTEXT.search(before)


def mask_ips(text):
    """Returns (text with each IPv4 address as IP_MASK, how many).

    >>> mask_ips("from 192.0.2.146, version 1.2.3.4")
    ('from |||IP_ADDRESS|||, version 1.2.3.4', 1)
    """
    if not MAYBE_IP.search(text):
        return text, 0
    return mask_until_stable(text, lambda t: mask_matches(IP, t, IP_MASK, is_ip))


# ---------------------------------------------------------------- stage 6: rules

LETTER, LETTER_OR_DIGIT = re.compile(r"[^\W\d_]"), re.compile(r"\w")
ELLIPSES = ("...", "…", ". . .")
BULLETS = ("•", "-", "*", "●", "‣", "▪", "◦")
STOP_WORDS = frozenset("the be to of and that have with".split())
TERMINAL = (".", "?", "!", '"', "”", "’", "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


class Document:
    """A text, and what several rules ask of it, counted once."""

    def __init__(self, text):
        self.text = text

    @cached_property
    def all_words(self):
        return self.text.split()

    @cached_property
    def num_words(self):
        """Words that are more than symbols."""
        return len(self.all_words) - len(self.symbols)

    @cached_property
    def without_letters(self):
        return [w for w in self.all_words if not w.isalpha() and not LETTER.search(w)]

    @cached_property
    def symbols(self):
        return [w for w in self.without_letters if not LETTER_OR_DIGIT.search(w)]

    @cached_property
    def lines(self):
        """Lines that are not blank, stripped."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self):
        return [p for p in map(str.strip, re.split(r"\n\s*\n", self.text)) if p]


def word_count(document, low=50, high=100_000):
    """50 to 100,000 words.  source: [3]"""
    return low <= document.num_words <= high


def mean_word_length(document, low=3, high=10):
    """Words of 3 to 10 characters in the mean.  source: [3]"""
    chars = len("".join(document.all_words)) - sum(map(len, document.symbols))
    return low <= chars / max(document.num_words, 1) <= high


def ellipsis_lines(document, high=0.3):
    """At most 30 % of the lines end in an ellipsis.  source: [3]"""
    ending = sum(line.endswith(ELLIPSES) for line in document.lines)
    return ending <= high * len(document.lines)


def words_with_a_letter(document, low=0.8):
    """At least 80 % of the words have a letter.  source: [3]"""
    words = len(document.all_words)
    return words - len(document.without_letters) >= low * words


def symbol_to_word_ratio(document, high=0.1):
    """At most one # and one ellipsis in ten words.  source: [3]"""
    text, words = document.text, max(len(document.all_words), 1)
    ellipses = text.count("...") + text.count("…")
    return text.count("#") <= high * words and ellipses <= high * words


def bullet_lines(document, high=0.9):
    """At most 90 % of the lines start with a bullet.  source: [3]"""
    bullets = sum(line.startswith(BULLETS) for line in document.lines)
    return bullets <= high * len(document.lines)


def stop_words(document, low=2):
    """At least 2 occurrences of the be to of and that have with, in any case.  source: [3]"""
    count = 0
    for word in document.all_words:
        if word.lower() in STOP_WORDS:
            count += 1
            if count >= low:
                return True
    return count >= low


def duplicate_share(units):
    """Returns (share of the units that repeat an earlier one, their share of the characters)."""
    seen, count, chars = set(), 0, 0
    for unit in units:
        if unit in seen:
            count += 1
            chars += len(unit)
        seen.add(unit)
    return count / max(len(units), 1), chars / max(sum(map(len, units)), 1)


def duplicate_lines(document, high=0.3, high_chars=0.2):
    """At most 30 % of the lines, 20 % of their characters, repeat one.  source: [3]"""
    count, chars = duplicate_share(document.lines)
    return count <= high and chars <= high_chars


def duplicate_paragraphs(document, high=0.3, high_chars=0.2):
    """At most 30 % of the paragraphs, 20 % of their characters, repeat one.  source: [3]"""
    count, chars = duplicate_share(document.paragraphs)
    return count <= high and chars <= high_chars


def top_ngrams(document, high=(0.2, 0.18, 0.16)):
    """The most frequent 2-, 3- and 4-gram hold at most 20, 18, 16 % of the text.  source: [3]"""
    words = document.all_words
    size = max(len(document.text), 1)
    for n, limit in enumerate(high, 2):
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        if not grams:
            return True
        gram, count = max(grams.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
        if count > 1 and count * (sum(map(len, gram)) + n - 1) > limit * size:
            return False
    return True


def duplicate_ngrams(document, high=(0.15, 0.14, 0.13, 0.12, 0.11, 0.1)):
    """Repeated 5- to 10-grams hold at most 15 to 10 % of the text, each place once.  source: [3]"""
    words = document.all_words
    size = max(len(document.text), 1)
    for n, limit in enumerate(high, 5):
        seen, chars, i = set(), 0, 0
        while i + n <= len(words):
            gram = tuple(words[i:i + n])
            if gram in seen:
                chars += sum(map(len, gram)) + n - 1
                i += n
            else:
                seen.add(gram)
                i += 1
        if chars > limit * size:
            return False
    return True


def c4_page(document, min_sentences=3):
    """At least 3 sentences, no "lorem ipsum", no curly bracket.  source: [4]"""
    text = document.text
    ends = sum(len(re.findall(r"[.?!](?=\s|\"|”|$)", line)) or 1 for line in document.lines)
    return ends >= min_sentences and "{" not in text and "lorem ipsum" not in text.lower()


def clean_c4_lines(text, min_words=5, max_word_chars=1000):
    """Returns the text with the lines that C4 keeps: end marks, 5 words, no policy, no script.

    datatrove and FineWeb have 3 words a line and 5 sentences a page.  source: [4]
    """
    kept = []
    for line in CITATION.sub("", text).split("\n"):
        line = line.strip()
        low = line.lower()
        if (line.endswith((".", "?", "!", '"', "”")) and not line.endswith("...")
                and line.count(" ") + 1 >= min_words and "javascript" not in low
                and not any(policy in low for policy in POLICY)
                and max(map(len, line.split()), default=0) <= max_word_chars):
            kept.append(line)
    return "\n".join(kept)


def fineweb_terminal_lines(document, low=0.12):
    """At least 12 % of the lines end in punctuation.  source: [6]"""
    return sum(line.endswith(TERMINAL) for line in document.lines) >= low * len(document.lines)


def fineweb_short_lines(document, high=0.67, chars=30):
    """At most 67 % of the lines have 30 characters or fewer.  source: [6]"""
    return sum(len(line) <= chars for line in document.lines) <= high * len(document.lines)


def fineweb_duplicate_lines(document, high=0.01):
    """At most 1 % of the characters are in repeated lines.  source: [6]"""
    return duplicate_share(document.lines)[1] <= high


def fineweb_newlines(document, high=0.3):
    """At most 0.3 line ends a word.  source: [6]"""
    return document.text.count("\n") <= high * max(len(document.all_words), 1)


GOPHER = (word_count, mean_word_length, ellipsis_lines, words_with_a_letter)
RULES = {
    "gopher": GOPHER,
    "gopher_all": (*GOPHER, symbol_to_word_ratio, bullet_lines, stop_words),
    "gopher_repetition": (duplicate_lines, duplicate_paragraphs, top_ngrams, duplicate_ngrams),
    "c4": (c4_page,),
    "fineweb": (fineweb_terminal_lines, fineweb_short_lines, fineweb_duplicate_lines,
                fineweb_newlines),
}


def gopher_quality_filter(text):
    """Returns whether the text passes the handout's four rules.  source: [2] gopher_quality_filters

    >>> gopher_quality_filter("too short")
    False
    """
    return failed_rule(Document(text), GOPHER) is None


def failed_rule(document, rules):
    """Returns the name of the first of the rules that the document fails, or None."""
    for rule in rules:
        if not rule(document):
            return rule.__name__ if hasattr(rule, "__name__") else rule.func.__name__
    return None


def rules_with_thresholds(names, settings):
    """Returns {set: rules} of the named sets, with settings like "word_count.low=30" made.

    raises: ValueError for a name that is not there
    """
    unknown = [name for name in names if name not in RULES]
    if unknown:
        raise ValueError(f"--rules must be of {', '.join(RULES)}, got {unknown[0]}; correct it")
    chosen = {name: list(RULES[name]) for name in names}
    for setting in settings:
        found = re.fullmatch(r"(\w+)\.(\w+)=([-\d.,]+)", setting)
        try:
            value = [float(number) for number in found[3].split(",")]
        except (TypeError, ValueError):
            raise ValueError("--threshold must be like word_count.low=30, got "
                             f"{setting}; correct it") from None
        value = value[0] if len(value) == 1 else tuple(value)
        done = False
        for rules in chosen.values():
            for at, rule in enumerate(rules):
                function = rule.func if isinstance(rule, partial) else rule
                names_of = function.__code__.co_varnames[1:function.__code__.co_argcount]
                if function.__name__ == found[1] and found[2] in names_of:
                    before = rule.keywords if isinstance(rule, partial) else {}
                    rules[at], done = partial(function, **before, **{found[2]: value}), True
        if not done:
            raise ValueError(f"--threshold must name a rule in use and its setting, got {setting}; "
                             f"the rules are {', '.join(r.__name__ for s in names for r in RULES[s])}")
    return chosen


# ---------------------------------------------------------------- models of fastText's kind

FASTTEXT_MAGIC, FASTTEXT_VERSION = 793712314, 12
HS, NS, SOFTMAX, OVA = 1, 2, 3, 4  # losses, by fastText's numbers
SUPERVISED = 3
FASTTEXT_ARGS = ("dim", "ws", "epoch", "min_count", "neg", "word_ngrams", "loss", "model",
                 "bucket", "minn", "maxn", "lr_update_rate")
END_OF_LINE = b"</s>"  # fastText's word for the end of each line
LABEL_PREFIX = b"__label__"
ENTRY = struct.Struct("<qb")  # after a word and its zero byte: its count, 0 a word or 1 a label
MAX_CACHED_IDS = 1 << 23  # n-gram ids of words that a model remembers: 64 MB
BATCH_BYTES = 1 << 20  # of text that predict looks at together
# Length of an untrained label row: the larger, the sooner it learns; 1 to 4 end within 0.002 AUC.
OUTPUT_SCALE = 4
BLOCK_FLOATS = 1 << 16  # of rows that are gathered at a time


class ModelFile:
    """A cursor over the bytes of a model file that says so where they end too early."""

    def __init__(self, path):
        self.path, self.at = path, 0
        self.size = os.path.getsize(path)
        self.bytes = np.memmap(path, np.uint8, "r") if self.size else b""

    def numbers(self, layout):
        size = struct.calcsize("<" + layout)
        values = struct.unpack("<" + layout, self.array(np.uint8, size).tobytes())
        return values if len(values) > 1 else values[0]

    def array(self, dtype, count):
        end = self.at + np.dtype(dtype).itemsize * count
        if count < 0 or end > self.size:
            raise ValueError(f"{self.path} must be a whole fastText model, got {self.size} bytes "
                             f"where {end} are due; copy it again")
        part = np.frombuffer(self.bytes, dtype, count, self.at) if count else np.empty(0, dtype)
        self.at = end
        return part

    def entries(self, count):
        """Returns [(word, count, type)] of the dictionary, strings ended by a zero byte."""
        found, start, window = [], self.at, b""
        while len(found) < count:
            end = window.find(b"\0", self.at - start)
            if end < 0 or end + 10 > len(window):
                window, start = bytes(self.bytes[self.at:self.at + (1 << 20)]), self.at
                end = window.find(b"\0")
                if end < 0 or end + 10 > len(window):
                    self.array(np.uint8, self.size)  # says what is wrong
            found.append((window[self.at - start:end], *ENTRY.unpack_from(window, end + 1)))
            self.at = start + end + 10
        return found


class DenseMatrix:
    """(m, n) float32, mapped from the file: opened at once, shared by processes."""

    def __init__(self, file):
        m, n = file.numbers("qq")
        self.values = file.array("<f4", m * n).reshape(m, n)
        self.shape = m, n

    def rows(self, ids):
        return self.values[ids]  # not np.take, which copies all of what a file has not aligned


class QuantMatrix:
    """Rows put together from 256 centroids for each few columns; norms apart where qnorm says."""

    def __init__(self, file):
        qnorm = file.numbers("?")
        self.shape = file.numbers("qq")
        codes = file.array(np.uint8, file.numbers("i"))
        self.tables = self.read_centroids(file)
        self.codes = codes.reshape(self.shape[0], len(self.tables))
        self.norm_codes = file.array(np.uint8, self.shape[0]) if qnorm else None
        self.norms = self.read_centroids(file)[0] if qnorm else None

    @staticmethod
    def read_centroids(file):
        dim, parts, width, last = file.numbers("4i")
        flat = file.array("<f4", dim * 256)
        return [flat[q * 256 * width:][:256 * (width if q < parts - 1 else last)].reshape(256, -1)
                for q in range(parts)]

    def rows(self, ids):
        codes = self.codes[ids]
        rows = np.concatenate([t[codes[:, q]] for q, t in enumerate(self.tables)], axis=1)
        return rows if self.norms is None else rows * self.norms[self.norm_codes[ids]]


def read_matrix(file, quantised):
    """Returns a matrix with `rows`; a quantised one of up to 64 MB is decoded once."""
    matrix = QuantMatrix(file) if quantised else DenseMatrix(file)
    m, n = matrix.shape
    if not quantised or m * n > 1 << 24:
        return matrix
    dense = object.__new__(DenseMatrix)
    dense.shape, dense.values = matrix.shape, matrix.rows(np.arange(m))
    return dense


def fnv(data):
    """Returns fastText's 32-bit FNV-1a hash of bytes, each sign-extended. Source: [1] Dictionary

    >>> fnv(b"a")
    3826002220
    """
    h = 2166136261
    for byte in data:
        h = ((h ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
    return h


def fnv_of_words(words):
    """Returns `fnv` of each word, (words,) uint32: those of up to 64 bytes a byte at a time of all
    of them."""
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    data = np.frombuffer(b"".join(words), np.int8).astype(np.int32).view(np.uint32)
    starts = np.cumsum(lengths) - lengths
    hashes = np.full(len(words), 2166136261, np.uint32)
    live = np.flatnonzero(lengths <= 64)
    for k in range(64):
        live = live[lengths[live] > k]
        hashes[live] = (hashes[live] ^ data[starts[live] + k]) * np.uint32(16777619)
    for i in np.flatnonzero(lengths > 64):
        hashes[i] = fnv(words[i])
    return hashes


def character_ngram_hashes(words, minn, maxn):
    """Returns (hashes, counts): uint32 hashes of the character n-grams of "<word>", all words' in
    a row, and how many each word has. Valid UTF-8 only.

    The states of all n-grams of all words advance one character at a time: about 30 times as fast
    as `fnv` of each n-gram, which a test compares it with.
    """
    text = np.frombuffer(b"<" + b"><".join(words) + b">", np.uint8)
    lengths = np.fromiter(map(len, words), np.int64, len(words)) + 2
    starts = np.flatnonzero((text & 0xC0) != 0x80)
    word = np.repeat(np.arange(len(words)), lengths)[starts]
    size = np.diff(starts, append=len(text))
    signed = text.astype(np.int8).astype(np.int32).view(np.uint32)
    steps = [(signed[np.minimum(starts + k, len(text) - 1)], size > k) for k in range(size.max())]
    n_chars = len(starts)
    state = np.full(n_chars, 2166136261, np.uint32)
    ends_word = np.append(word[1:] != word[:-1], True)
    starts_word = np.append(True, ends_word[:-1])
    hashes = np.zeros((n_chars, maxn - minn + 1), np.uint32)
    kept = np.zeros(hashes.shape, bool)
    prime = np.uint32(16777619)
    for n in range(1, min(maxn, n_chars) + 1):
        live = n_chars - n + 1  # n-grams that start here or before end within the text
        for k, (byte, there) in enumerate(steps):
            moved = (state[:live] ^ byte[n - 1:]) * prime
            state[:live] = moved if k == 0 else np.where(there[n - 1:], moved, state[:live])
        if n >= minn:
            hashes[:live, n - minn] = state[:live]
            kept[:live, n - minn] = word[:live] == word[n - 1:]
            if n == 1:
                kept[:, 0] &= ~(starts_word | ends_word)
    counts = np.bincount(word, kept.sum(1), len(words)).astype(np.int64)
    return hashes[kept], counts


def expand(starts, lengths):
    """Returns the indexes start, start + 1, ... of each (start, length), all in a row.

    >>> expand(np.array([5, 0]), np.array([2, 1])).tolist()
    [5, 6, 0]
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


class WordNumbers(dict):
    """{word: its number}, in the order in which they are first asked for."""

    def __missing__(self, word):
        self[word] = number = len(self)
        return number


class FastText:
    """A supervised fastText model in NumPy: what the library answers, without the library.

    args: dict of FASTTEXT_ARGS; words: list of bytes; label_words: list of bytes, labels with
    their prefix; label_counts: list of int;
    inputs: matrix with `rows`, (words + buckets, dim); output: (labels, dim) float32.
    pruned: None, or (bucket,) int32, the row of each n-gram bucket, -1 where it was dropped.
    """

    def __init__(self, args, words, label_words, label_counts, inputs, output, pruned=None):
        self.__dict__.update(args)
        self.args, self.words, self.label_counts = args, words, label_counts
        self.inputs, self.output, self.pruned = inputs, output, pruned
        self.word_ids = {word: number for number, word in enumerate(words)}
        self.label_words = dict.fromkeys(label_words)
        self.labels = [label.removeprefix(LABEL_PREFIX).decode("utf-8", "surrogateescape")
                       for label in label_words]
        self.lower = False  # text is to be lower-cased first: of our own models only
        self.forget()
        if self.loss == HS:
            self.paths = huffman_paths(label_counts)

    @classmethod
    def load(cls, path):
        """Returns the model in a .bin or .ftz file. raises: ValueError, with magic and version."""
        if not os.path.isfile(path):
            raise ValueError(f"a model must be a file, got {path}; check the path")
        file = ModelFile(path)
        magic, version = file.numbers("ii") if file.size >= 8 else (0, 0)
        if magic != FASTTEXT_MAGIC or not 11 <= version <= FASTTEXT_VERSION:
            raise ValueError(f"{path} must be a fastText model of version 11 or 12 with magic "
                             f"{FASTTEXT_MAGIC}, got magic {magic}, version {version}; name a .bin "
                             "or .ftz file that fastText or `classify --train` wrote")
        args = dict(zip(FASTTEXT_ARGS, file.numbers("12i"), strict=True)) | {
            "t": file.numbers("d")}
        if args["model"] != SUPERVISED or args["loss"] not in (HS, NS, SOFTMAX, OVA):
            raise ValueError(f"{path} must be a supervised model (3) with a loss from 1 to 4, got "
                             f"model {args['model']}, loss {args['loss']}; name a classifier")
        args["maxn"] = 0 if version == 11 else args["maxn"]
        size, n_words, n_labels = file.numbers("3i")
        args["ntokens"], n_pruned = file.numbers("qq")
        entries = file.entries(size)
        if n_words + n_labels != size or any(e[2] != (i >= n_words) for i, e in enumerate(entries)):
            raise ValueError(f"{path} must hold its words before its labels, got {n_words} words "
                             f"and {n_labels} labels in {size} entries; copy it again")
        pruned = None
        if n_pruned >= 0:
            pruned = np.full(args["bucket"], -1, np.int32)
            pairs = file.array("<i4", 2 * n_pruned).reshape(-1, 2)
            pruned[pairs[:, 0] % max(1, args["bucket"])] = pairs[:, 1]
        quantised = file.numbers("?")
        inputs = read_matrix(file, quantised)
        output = read_matrix(file, file.numbers("?") and quantised)
        output = np.ascontiguousarray(output.rows(np.arange(output.shape[0])))
        rows = n_words + (n_pruned if n_pruned >= 0 else args["bucket"])
        if file.at != file.size or inputs.shape != (rows, args["dim"]) or (
                output.shape != (n_labels, args["dim"])) or (
                n_pruned > 0 and not 0 <= pairs[:, 1].min() <= pairs[:, 1].max() < n_pruned):
            raise ValueError(f"{path} must end after matrices of {rows} and {n_labels} rows of "
                             f"{args['dim']}, got {inputs.shape}, {output.shape} and "
                             f"{file.size - file.at} bytes more; copy it again")
        words, counts = [entry[0] for entry in entries], [entry[1] for entry in entries]
        model = cls(args, words[:n_words], words[n_words:], counts[n_words:], inputs, output,
                    pruned)
        notes = Path(f"{path}.json")
        model.lower = notes.exists() and json.loads(notes.read_text("utf-8")).get("lower", False)
        return model

    def save(self, path, word_counts):
        """Writes a dense .bin that the library loads too."""
        args = struct.pack("<2i12id", FASTTEXT_MAGIC, FASTTEXT_VERSION,
                           *(self.args[name] for name in FASTTEXT_ARGS), self.args["t"])
        entries = [(word, count, 0) for word, count in zip(self.words, word_counts, strict=True)]
        entries += [(label, count, 1)
                    for label, count in zip(self.label_words, self.label_counts, strict=True)]
        sizes = struct.pack("<3i2q", len(entries), len(self.words), len(self.labels),
                            self.args["ntokens"], -1)
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(args + sizes)
                file.write(b"".join(word + b"\0" + ENTRY.pack(count, kind)
                                    for word, count, kind in entries))
                for matrix in (self.inputs.values, self.output):
                    file.write(struct.pack("<?2q", False, *matrix.shape))
                    np.ascontiguousarray(matrix, "<f4").tofile(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    # ------------------------------------------------------------ text into ids of rows

    def forget(self):
        """Empties the memory of words: number of each, where its ids lie, its hash."""
        self.numbers, self.flat = WordNumbers(), np.empty(1 << 16, np.int64)
        self.starts, self.lengths = np.empty(0, np.int64), np.empty(0, np.int64)
        self.hashes, self.is_word = np.empty(0, np.uint64), np.empty(0, bool)
        self.used = 0

    def tokens(self, text):
        """Returns the words of a text as bytes, a line's end after the last, as the library does:
        white space and NUL separate, and a literal </s> ends the text."""
        text = text.lower() if self.lower else text
        words = text.encode("utf-8", "replace").replace(b"\0", b" ").split()
        if END_OF_LINE in words:
            del words[words.index(END_OF_LINE):]
        words.append(END_OF_LINE)
        return words

    def learn_words(self, words):
        """Remembers the ids of new words: its own, if it has one, then those of its n-grams."""
        own = np.array([self.word_ids.get(word, -1) for word in words])
        skipped = [word in self.label_words or (word.startswith(LABEL_PREFIX)
                                                and word not in self.word_ids) for word in words]
        rows, counts = np.empty(0, np.int64), np.zeros(len(words), np.int64)
        whole = [i for i, word in enumerate(words) if not skipped[i] and word != END_OF_LINE]
        if self.maxn > 0 and whole and self.bucket:
            minn = max(1, self.minn)
            hashes, count = character_ngram_hashes([words[i] for i in whole], minn,
                                                   max(minn, self.maxn))
            rows, kept = self.bucket_rows(hashes)
            counts[whole] = np.bincount(np.repeat(np.arange(len(whole)), count)[kept],
                                        minlength=len(whole))
        has = own >= 0
        lengths = counts + has
        flat, is_own = np.empty(lengths.sum(), np.int64), np.zeros(lengths.sum(), bool)
        is_own[(np.cumsum(lengths) - lengths)[has]] = True
        flat[is_own], flat[~is_own] = own[has], rows
        while self.used + len(flat) > len(self.flat):
            self.flat = np.concatenate([self.flat, np.empty_like(self.flat)])
        self.flat[self.used:self.used + len(flat)] = flat
        starts = self.used + np.cumsum(lengths) - lengths
        self.used += len(flat)
        hashes = (fnv_of_words(words) if self.word_ngrams > 1 else
                  np.zeros(len(words), np.uint32)).view(np.int32).astype(np.int64)
        self.starts = np.concatenate([self.starts, starts])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.hashes = np.concatenate([self.hashes, hashes.view(np.uint64)])
        self.is_word = np.concatenate([self.is_word, ~np.array(skipped)])

    def bucket_rows(self, hashes):
        """Returns (rows, kept): the rows of n-gram hashes in the input matrix, pruned ones out."""
        rows = (hashes % hashes.dtype.type(self.bucket)).astype(np.int64)
        kept = np.ones(len(rows), bool)
        if self.pruned is not None:
            rows = self.pruned[rows].astype(np.int64)
            kept = rows >= 0
        return rows[kept] + len(self.words), kept

    def word_ngram_rows(self, hashes):
        """Returns the rows of the word n-grams of a text. hashes: (words,) uint64."""
        n = len(hashes)
        grams = np.zeros((n, self.word_ngrams - 1), np.uint64)
        state = hashes.copy()
        for j in range(1, min(self.word_ngrams, n)):
            state = state[:-1] * np.uint64(116049371) + hashes[j:]
            grams[:n - j, j - 1] = state
        there = np.arange(1, self.word_ngrams) < np.arange(n, 0, -1)[:, None]
        return self.bucket_rows(grams[there])[0]

    def ids(self, texts):
        """Returns for each text the ids of its rows, (ids,) int64, in the library's order."""
        documents = [self.tokens(text) for text in texts]
        if self.used > MAX_CACHED_IDS:
            self.forget()
        numbered = [np.fromiter(map(self.numbers.__getitem__, words), np.int64, len(words))
                    for words in documents]
        if new := list(islice(self.numbers, len(self.starts), None)):
            self.learn_words(new)
        found = []
        for numbers in numbered:
            ids = self.flat[expand(self.starts[numbers], self.lengths[numbers])]
            if self.word_ngrams > 1 and self.bucket:
                hashes = self.hashes[numbers[self.is_word[numbers]]]
                ids = np.concatenate([ids, self.word_ngram_rows(hashes)])
            found.append(ids)
        return found

    # ------------------------------------------------------------ ids into probabilities

    def hidden(self, ids):
        """Returns the mean of the rows, (dim,) float32, summed one by one as the library does."""
        block, total = max(1, BLOCK_FLOATS // self.dim), np.zeros(self.dim, np.float32)
        for at in range(0, len(ids), block):
            rows = self.inputs.rows(ids[at:at + block])
            rows[0] += total
            total = np.add.reduce(rows, axis=0)
        return total * np.float32(1 / len(ids))

    def scores(self, hidden, threshold=0.0):
        """Returns (log probabilities, kept), each (texts, labels). hidden: (texts, dim) float32.

        The library adds 1e-5 to a probability before the logarithm, so that it may report 1.00001.
        Source: [1] loss.cc
        """
        z = np.zeros((len(hidden), len(self.output)), np.float32)
        for h, column in zip(hidden.T, self.output.T, strict=True):
            z += np.multiply.outer(h, column)  # in the library's order: @ differs in the 6th digit
        if self.loss == HS:
            return self.tree_scores(z, threshold)
        if self.loss == SOFTMAX:
            p = np.exp((z - z.max(1, keepdims=True)).astype(np.float64)).astype(np.float32)
            p = p / np.cumsum(p, axis=1)[:, -1:]  # a sum from left to right
        else:  # a table of 512 steps from -8 to 8, as the library has it
            x = np.arange(513, dtype=np.float64) * 16 / 512 - 8
            table = (1 / (1 + np.exp(-x))).astype(np.float32)
            step = ((np.clip(z, -8, 8) + np.float32(8)) * np.float32(512) / 8 / 2).astype(np.int64)
            p = np.where(z < -8, 0, np.where(z > 8, 1, table[step])).astype(np.float32)
        return np.log(p.astype(np.float64) + 1e-5).astype(np.float32), p >= threshold

    def tree_scores(self, z, threshold):
        """The scores of hierarchical softmax: sums of log probabilities along paths from the root;
        a path that falls below the threshold anywhere is cut."""
        f = (1 / (1 + np.exp(-z.astype(np.float64)))).astype(np.float32)
        right = np.log(f + 1e-5, dtype=np.float64).astype(np.float32)
        left = np.log(np.float32(1) - f + 1e-5, dtype=np.float64).astype(np.float32)
        steps = np.concatenate([left, right, np.zeros_like(z[:, :1])], axis=1)
        score = np.zeros((len(z), len(self.labels)), np.float32)
        kept = np.ones(score.shape, bool)
        width = z.shape[1]
        for node, side in self.paths:  # level by level, each (labels,)
            score += steps[:, np.where(node < 0, 2 * width, node + side * width)]
            kept &= score >= math.log(threshold + 1e-5)
        return score, kept

    def predict(self, texts, k=1, threshold=0.0):
        """Returns for each text ([labels], [probabilities]), the k most probable first (-1: all).

        Line breaks count as spaces, where the library refuses them; labels come without their
        prefix. A text without any known part has ([], []). Ties go to the last label, as in the
        library.
        """
        answers = []
        k = len(self.labels) if k == -1 else k
        for batch in batches(texts, BATCH_BYTES):
            ids = self.ids(batch)
            known = [i for i, found in enumerate(ids) if len(found)]
            batch_answers = [([], [])] * len(batch)
            if known:
                hidden = np.stack([self.hidden(ids[i]) for i in known])
                scores, kept = self.scores(hidden, threshold)
                scores, kept = scores[:, ::-1], kept[:, ::-1]
                order = np.argsort(-scores, axis=1, kind="stable")
                last = len(self.labels) - 1
                for row, i in enumerate(known):
                    top = list(islice((y for y in order[row] if kept[row, y]), k))
                    batch_answers[i] = ([self.labels[last - y] for y in top],
                                        [float(np.exp(scores[row, y])) for y in top])
            answers += batch_answers
        return answers


def batches(texts, size):
    """Yields lists of texts that together have about `size` characters."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def huffman_paths(counts):
    """Returns for each level from the root (node, side), each (labels,): the row of the output
    matrix that decides there (-1: the path has ended) and 1 for the right-hand side.

    counts: of labels, descending. Two queues, leaves from the end and nodes as they are made; each
    takes the smaller, of equals the node. Source: [1] HierarchicalSoftmaxLoss::buildTree
    """
    n = len(counts)
    weight = list(counts) + [10 ** 15] * (n - 1)
    parent, side = [-1] * (2 * n - 1), [0] * (2 * n - 1)
    leaf, node = n - 1, n
    for new in range(n, 2 * n - 1):
        total = 0
        for right in (0, 1):
            if leaf >= 0 and weight[leaf] < weight[node]:
                taken, leaf = leaf, leaf - 1
            else:
                taken, node = node, node + 1
            parent[taken], side[taken] = new, right
            total += weight[taken]
        weight[new] = total
    paths = []
    for label in range(n):
        path, at = [], label
        while parent[at] >= 0:
            path.append((parent[at] - n, side[at]))
            at = parent[at]
        paths.append(path[::-1])
    depth = max(map(len, paths))
    padded = np.array([path + [(-1, 0)] * (depth - len(path)) for path in paths], np.int64)
    return [(padded[:, level, 0], padded[:, level, 1]) for level in range(depth)]


# ---------------------------------------------------------------- training such a model

def count_dictionary(documents, min_count):
    """Returns [(word, count)] that occur often enough, most frequent first, the end of line too."""
    counts = Counter(word for words in documents for word in words)
    return sorted(((word, n) for word, n in counts.items() if n >= min_count),
                  key=lambda item: (-item[1], item[0]))


def train_fasttext(texts, labels, dim=50, epoch=5, lr=0.1, word_ngrams=2, bucket=200_000, minn=0,
                   maxn=0, min_count=1, lower=True, seed=0, progress=False):
    """Returns (model, counts of its words): a FastText with softmax, trained one text at a time.

    texts: list of str; labels: list of str, one a text. The settings are fastText's, its defaults
    dim 100, word_ngrams 1, bucket 2,000,000, not lower-cased. Memory: the input matrix, (words +
    bucket) * dim * 4 bytes, and 16 bytes an id of the texts. Source: [1], section 2
    """
    for name, value, least in (("dim", dim, 1), ("epoch", epoch, 1), ("min_count", min_count, 1),
                               ("word_ngrams", word_ngrams, 1), ("bucket", bucket, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}; give a larger one")
    if not 0 <= minn <= maxn or not lr > 0:
        raise ValueError(f"minn, maxn and lr must be 0 <= minn <= maxn and lr > 0, got {minn}, "
                         f"{maxn}, {lr}; correct them")
    if len(set(labels)) < 2 or len(texts) != len(labels):
        raise ValueError(f"training must have texts of at least two labels, got {len(texts)} texts "
                         f"with labels {sorted(set(labels))}; add examples of the other kind")
    label_counts = Counter(labels).most_common()
    args = dict(zip(FASTTEXT_ARGS, (dim, 5, epoch, min_count, 5, word_ngrams, SOFTMAX, SUPERVISED,
                                    bucket if word_ngrams > 1 or maxn else 0, minn, maxn, 100),
                    strict=True)) | {"t": 1e-4, "ntokens": 0}
    names, counts = zip(*label_counts, strict=True)
    label_words = [LABEL_PREFIX + name.encode() for name in names]
    blank = FastText(args, [], label_words, counts, None, None)
    blank.lower = lower
    words = count_dictionary(map(blank.tokens, texts), min_count)
    args["ntokens"] = sum(n for _, n in words)
    rng = np.random.default_rng(seed)
    inputs = object.__new__(DenseMatrix)
    inputs.shape = len(words) + args["bucket"], dim
    # Zero rows and random labels, the reverse of the library: what no text has trained adds no noise.
    inputs.values = np.zeros(inputs.shape, np.float32)
    output = rng.standard_normal((len(names), dim), np.float32) * np.float32(OUTPUT_SCALE / math.sqrt(dim))
    model = FastText(args, [word for word, _ in words], label_words, counts, inputs, output)
    model.lower = lower
    examples = [(*np.unique(ids, return_counts=True), names.index(label))
                for batch in batches(zip(texts, labels, strict=True), 1024)
                for ids, (_, label) in zip(model.ids([text for text, _ in batch]), batch,
                                           strict=True) if len(ids)]
    model.forget()
    steps, done = epoch * len(examples), 0
    bar = bpe.Progress("train", steps, "texts", progress)
    for _ in range(epoch):
        for number in rng.permutation(len(examples)):
            train_step(inputs.values, output, *examples[number], lr * (1 - done / steps))
            done += 1
            bar.update(done)
    bar.close()
    return model, [n for _, n in words]


def train_step(inputs, output, ids, counts, label, lr):
    """One step of gradient descent on one text, in place: softmax over the mean of its rows.

    ids: (rows,) distinct, each counted `counts` times. Source: [1] SoftmaxLoss::forward
    """
    rows, share = inputs[ids], (counts / counts.sum()).astype(np.float32)
    hidden = share @ rows
    z = output @ hidden
    p = np.exp(z - z.max())
    error = -p / p.sum()
    error[label] += 1
    error *= np.float32(lr)
    # the library divides the gradient of the mean by the number of ids: so does each row's count
    gradient = error @ output
    output += np.multiply.outer(error, hidden)
    inputs[ids] = rows + np.multiply.outer(share, gradient)


def area_under_curve(scores, positive):
    """Returns the probability that a positive scores above a negative, ties half.

    >>> area_under_curve([0.9, 0.4, 0.4], [True, True, False])
    0.75
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    n, m = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else math.nan


# ---------------------------------------------------------------- language without a model

# Where scripts begin, and the language of those that have only one, or one by far.
SCRIPTS = [  # (first, last code point, script)
    (0x41, 0x5A, "latin"), (0x61, 0x7A, "latin"), (0xC0, 0x24F, "latin"), (0x1E00, 0x1EFF, "latin"),
    (0x370, 0x3FF, "el"), (0x1F00, 0x1FFF, "el"), (0x400, 0x52F, "cyrillic"), (0x531, 0x58F, "hy"),
    (0x5D0, 0x5EA, "he"), (0x620, 0x6FF, "arabic"), (0x750, 0x77F, "arabic"), (0x900, 0x963, "hi"),
    (0x980, 0x9FE, "bn"), (0xA00, 0xA7F, "pa"), (0xA80, 0xAFF, "gu"), (0xB80, 0xBFF, "ta"),
    (0xC00, 0xC7F, "te"), (0xC80, 0xCFF, "kn"), (0xD00, 0xD7F, "ml"), (0xD80, 0xDFF, "si"),
    (0xE00, 0xE4E, "th"), (0xE80, 0xEDF, "lo"), (0x1000, 0x109F, "my"), (0x10A0, 0x10FF, "ka"),
    (0x1100, 0x11FF, "ko"), (0x1200, 0x137F, "am"), (0x1780, 0x17D3, "km"), (0x3041, 0x309F, "ja"),
    (0x30A1, 0x30FA, "ja"), (0x3400, 0x4DBF, "han"), (0x4E00, 0x9FFF, "han"),
    (0xAC00, 0xD7AF, "ko"), (0xF900, 0xFAFF, "han"), (0xFB50, 0xFDFF, "arabic"),
    (0xFE70, 0xFEFC, "arabic"), (0xFF66, 0xFF9D, "ja"), (0x20000, 0x3134F, "han"),
]
SCRIPT_NAMES = ["none"] + sorted({name for *_, name in SCRIPTS})
SCRIPT_EDGES = np.array([edge for first, last, _ in SCRIPTS for edge in (first, last + 1)])
SCRIPT_NUMBERS = np.array([0] + [n for *_, name in SCRIPTS for n in (SCRIPT_NAMES.index(name), 0)])
FUNCTION_WORDS = {
    "en": "the of and to in a is that for it was on with as by be at are this from or have an not "
          "but they his he you which we their has were been can will more all would there its who "
          "her had if when what so about out up she them than other into some our your my i me do "
          "no only also one may these after over how most should here because between where new",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es "
          "an werden aus er hat dass daß sie nach wird bei einer um am sind noch wie einem über "
          "einen so zum war haben nur oder aber vor zur bis mehr durch man sein wurde sei ich wir "
          "ihr kann wenn hier unter alle gegen ihre uns wieder schon sehr diese dieser eines beim",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il "
          "sont avec la ou son aux d l qu s c n j mais comme on tout nous sa cette être fait ses "
          "leur été elle ces ont deux même vous si je peut entre aussi ils bien sans encore très "
          "où après dont était non leurs notre votre y donc chez vers lors depuis",
    "es": "de la que el en y a los del se las por un para con no una su al lo como más pero sus le "
          "ya o este sí porque esta entre cuando muy sin sobre también me hasta hay donde quien "
          "desde todo nos durante todos uno les ni contra otros ese eso ante ellos e esto antes "
          "algunos unos yo otro otras es son fue ha ser era está han tiene mi si está puede nuestra",
    "it": "di e il la che in a per un è del non una le i con si della da sono al dei nel alla come "
          "lo più gli ha anche delle ma o su l d dell c all nell dal se ci dalla questo questa suo "
          "sua loro essere stato tra ne mi io quando tutti cui fra dopo molto dove solo sulla nella "
          "degli alle ai anni prima hanno era fatto ed chi perché ancora già noi sul",
    "pt": "de a o que e do da em um para com não uma os no se na por mais as dos como mas ao ele das "
          "à seu sua ou quando muito nos já eu também só pelo pela até isso ela entre depois sem "
          "mesmo aos seus quem nas me esse eles você essa num nem suas meu às minha numa pelos é são "
          "foi ser está tem há vai ter este esta onde nós pode sobre ainda",
    "nl": "de van het een en in is dat op te zijn met voor niet die aan er om ook als door maar bij "
          "uit dan nog naar of hij ze was worden werd tot wordt heeft over hebben ik je we deze meer "
          "kan geen wel zich haar al veel onder jaar ook wat dit zo u moet waar na kunnen mijn hun "
          "men toch tegen waren had zal alle tussen omdat zou daar eerste hem ons via",
    "pl": "i w na z do nie się że o to jest od po za jak dla co ale czy tak tym jego przez są już być "
          "tego było oraz a lub przy ich tylko może który która które jej był pod ze u roku też by "
          "go mu ma bardzo gdy jako kiedy jednak więcej jeszcze bez nad przed była jeśli można mi ja "
          "ten ta te tej tych sobie gdzie we jestem mnie nas został między",
    "tr": "ve bir bu da de için ile çok olarak daha en olan gibi ne kadar sonra var o ama ki her ya "
          "değil ise veya mi mı göre kendi diye şey nasıl hem ancak ben sen biz siz onlar bana onun "
          "olduğu oldu olduğunu yok önce iki ilk tarafından içinde üzerinde yeni büyük zaman bütün "
          "ayrıca şekilde arasında ayni aynı böyle fakat hiç çünkü eden etti etmek yapılan edilen",
    "vi": "và của là có các cho được trong không một người với những này để đã từ khi đến như cũng "
          "về ra nhiều vào thì sẽ trên tôi làm phải lại hay còn bạn nếu đó sau tại rất theo bị nhưng "
          "năm mà anh ở chỉ hơn ông việc số đi nên do đây vì hai mình cả trước thể học sự nhất gì "
          "đang bằng cùng thành qua nào công chúng",
    "sv": "och i att det som en på är av för med till den inte har de om ett han men var jag sig från "
          "vi så kan när man år under också efter eller nu sin där vid mot ska skulle kommer ut får "
          "finns vara hade alla andra mycket här då sedan över bara in blir upp även vad få två vill "
          "ha många hur mer än detta sina oss dem hon denna varit utan mellan era du",
    "cs": "a v se na je že s z do to o i jako k po ve pro který jsou by si jeho ale tak však za od "
          "která nebo které jen byl bylo byla jsem ze už při jsme aby když tento než další být co má "
          "také až před pouze není tedy této pak této podle mezi kde ještě již ke jak proto nás ani "
          "být mi může jejich bude velmi jej tím pod svou byly ně vám",
    "ru": "и в не на что я с он как это по но они мы все из у за так к же от бы для о его только мне "
          "было вы ее был она то да если уже или ни быть до когда него нет еще при меня может чтобы "
          "со этого под их ты где есть там были вот этом эти после тоже кто этот потому который "
          "которые себя том была более также",
    "uk": "і в не на що я з він як це та до у за й але від про є для по його так було ми вони вона "
          "все або якщо їх ще щоб був бо то які який яка також при вже може під час цього коли після "
          "більше була ні мене те їх були лише ви із зі де тільки має себе ж би через цей бути "
          "дуже нас якого інших її нього",
    "ar": "في من على أن إلى عن التي الذي هذا هذه ما لا كان ذلك مع أو بعد كل قد هو هي لم ثم بين و كما "
          "حيث عند غير إن كانت لها له عليه أي قبل منذ تم بها يكون أكثر حتى خلال فيها الله بن به إذا "
          "لكن نحن يوم وقد فإن أما لن أيضا عام عليها وهو الى",
    "fa": "و در به از که این را با است برای آن یک خود تا کرد بر هم نیز می شود شده شد ها های ای اما یا "
          "بود دارد باید هر ما او اگر بین من چه سال وی پس بیش همه اين مي بی دیگر کند کنند هستند نمی "
          "خواهد روی مورد پیش چند بسیار اند تنها توان کنید شما هیچ",
}
LETTERS_IN_ROW = {  # two and three letters that tell a language from its script's others, "_" at word ends
    "en": (
        "the th _th he he_ _t of_ _of f_ d_ of _o s_ ea ed_ re th_ y_ in _a _i _re _to nd_ _in "
        "ing _an _on on_ ith wit on e_ ou ed tio _w ts_ _r _f t_ it ti fro fo _wi tha and rom "
        "in_ ion nt ha hat at ear rea ry_ to_ ct"),
    "de": (
        "ei en_ en n_ ein ch er die ich _ei sch ie er_ ge be un au ung ie_ r_ und sc _zu _di "
        "nd_ der zu hr hen nd _d fü _au ch_ che den in eh nen eit di _w uf ic _un ine auf t_ ne "
        "tz gen ht cht de we _be ben lic bei von"),
    "fr": (
        "s_ es_ e_ es _l nt_ t_ _le le ée _d ou les ai ur nt _à_ on le_ _à _l_ ré _de _d_ ur_ "
        "our qu tio _la oi ent ion ée_ _et ue eu une iq iqu que _ré des ns_ ti dé ne_ re la_ "
        "on_ té _é _e ér de ati pou au à_ és re_"),
    "es": (
        "s_ os_ os a_ _y_ ue o_ as_ do es as _e con ado co qu _de _co _la ad ue_ los _es el_ "
        "de_ ci _el que _l de ca las la aci dos _qu _q cin _c es_ do_ _lo _y nte ra_ cu nt _a "
        "ra la_ l_ lo ac ndo ica ta cad _un _en id"),
    "it": (
        "i_ o_ a_ di_ io ri zio e_ no_ co no on di re_ l_ la_ _c to_ ti_ ll _di ni_ tt to del "
        "ta_ ta azi ato è_ al ne _a ell le_ per zi _s io_ _è _è_ lla ne_ ino ggi _ri re _e_ _co "
        "ion one tto ari gi _i _pe gg tà_ mar _al"),
    "pt": (
        "o_ a_ ão ão_ s_ os_ _a os _a_ de_ _d çã ção as_ co do_ m_ do as _e pa ra da_ _p es _e_ "
        "_de da _o_ _co de com _pa em_ ra_ lh em ca qu ia aç que _em _um e_ nt nto ue_ ss _ao "
        "açã ma _qu _q ma_ par ad to_ ue to"),
    "nl": (
        "ij aa n_ en_ ee en de van de_ oo _ee oor ge _va het _he t_ een er _de et_ _v an_ aan "
        "we va aar ij_ _d eer e_ he oe _aa el _we ijk jk et an naa _h _ge _w erd ijd rd te lij "
        "doo zij cht _op voo _is _ui rij wer ke ver"),
    "pl": (
        "cz ow ie zy dz rz nie _w ni w_ wy _w_ _z ę_ ał ć_ ł_ sz ą_ dzi wa wi ze prz ie_ ej ię "
        "rze yc ej_ ła owa aw ych ki _wy za y_ ów cj kie _p ym_ pr ał_ ty ski oś ów_ ło j_ ny "
        "_z_ go_ _za czy rzy się ym _na"),
    "tr": (
        "ı_ ya ın _y ler lar nı _ya ay ir bir lı _b _ç la iy ak nl rı ýn ün k_ _bi aş le ka ıl "
        "bi ir_ ar il sı ır _ol _ka eri ve_ ek ý_ i_ arı dı ye _ve iş ını _ö _k ile ası tı ýl "
        "ış ey ği ür _ü ma nı_ şt"),
    "vi": (
        "_đ ng_ ng nh g_ nh_ _t _c c_ _nh _ch _th _kh i_ kh th _n _ng h_ ác ó_ àn _cá ác_ hư cá "
        "các _h _ph ên_ _và và hà iệ ất ất_ à_ ch ườ n_ ôn _tr và_ ạn ới ới_ p_ _có có_ ên ông "
        "ượ ph có _v ể_ _gi hàn ết ết_"),
    "sv": (
        "fö r_ ör för är _fö tt_ ör_ är_ _oc _f _ä tt å_ och sk av_ _är ån att på et er_ t_ _på "
        "rå ing på_ en_ _av vä ll år _i_ oc än nin ar_ _at n_ er om_ v_ det äl til ka lä frå "
        "_sk år_ ska ll_ av nä at rån ån_ ill ns"),
    "cs": (
        "í_ ní ní_ ov je př _j _př ně ře ě_ ná _z _v _p že é_ _v_ _je vý vy _n _po y_ rá _č vě "
        "če po u_ je_ mě že_ ko _vy ho _ne od ké ší ů_ by ím ení ně_ ého ho_ vá cí ří né _k éh "
        "dn v_ pře _js _vý _ž byl"),
    "ru": (
        "_и _и_ ы_ ие е_ бы ны _бы от _он ел _н ой ие_ как ия_ ь_ ать ой_ л_ _э был мы ры ыл ых "
        "эт т_ _о _е"),
    "uk": (
        "і_ ні _і ві ін ід ні_ ці ї_ ів лі ння _і_ _ві рі _з_ від мі що є_ _як ськ ів_ _з бі іл "
        "іс ий ті ува"),
    "ar": (
        "ة_ _ال ال ي_ _أ ى_ من_ ية ية_ لم الم لي في ين _ل في_ لى لى_ _في _ا _ي لأ عل لع _ك أن "
        "الأ ين_ لا _إ"),
    "fa": (
        "ی_ ای _ک _در ین _ای ه_ _د در_ ین_ ای_ می _آ این ری در ر_ _از می_ نی های _ب _می یا از "
        "_و_ دی ست_ ده_ _گ"),
}
SCRIPT_OF = {"ru": "cyrillic", "uk": "cyrillic", "ar": "arabic", "fa": "arabic"}  # the rest: latin
ACCENTED = {  # letters beyond a to z, or beyond the script's shared ones
    "en": "", "de": "äöüß", "fr": "àâæçéèêëîïôœùûÿ", "es": "áéíñóúü", "it": "àèéìòù",
    "pt": "àáâãçéêíóôõú", "nl": "ëïéö", "pl": "ąćęłńóśźż", "tr": "çğıöşüâîðþ",
    "vi": "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "sv": "åäöé", "cs": "áčďéěíňóřšťúůýž", "ru": "ыэъё", "uk": "іїєґ",
    "ar": "ةىإأكي", "fa": "پچژگکی"}
LANGUAGES = list(FUNCTION_WORDS)
LETTER_RUNS = re.compile(r"[^\W\d_]+")
LANGUAGE_CHARS = 2000  # of a text that are looked at, and as many from its middle
WORD_WEIGHT, GRAM_WEIGHT, LETTER_WEIGHT = 4.0, 1.0, 2.5  # log odds: best on half of a dev set
FALL = 0.3  # of the odds, from the first of a list to its last
# Log odds a letter that all but a twentieth of sentences reach in the languages of a script.
USUAL_EVIDENCE = {"latin": 0.45, "cyrillic": 0.2, "arabic": 0.5}


def script_counts(text):
    """Returns {script or language: letters} of a text, scripts as in SCRIPTS.

    >>> script_counts("Straße 5, 東京")
    {'han': 2, 'latin': 6}
    """
    points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    numbers = SCRIPT_NUMBERS[np.searchsorted(SCRIPT_EDGES, points, side="right")]
    counts = np.bincount(numbers, minlength=len(SCRIPT_NAMES))
    return {name: int(n) for name, n in zip(SCRIPT_NAMES[1:], counts[1:], strict=True) if n}


@lru_cache(1)
def language_tables():
    """Returns (words, grams, letters): dicts to arrays of log odds, (languages,) float32."""
    tables = []
    sources = ({k: v.split() for k, v in FUNCTION_WORDS.items()},
               {k: v.split() for k, v in LETTERS_IN_ROW.items()},
               {k: list(v) for k, v in ACCENTED.items()})
    for source, weight in zip(sources, (WORD_WEIGHT, GRAM_WEIGHT, LETTER_WEIGHT), strict=True):
        table = {}
        for language, keys in source.items():
            for rank, key in enumerate(dict.fromkeys(keys)):
                row = table.setdefault(key, np.zeros(len(LANGUAGES), np.float32))
                row[LANGUAGES.index(language)] = weight * (1 - FALL * rank / len(keys))
        tables.append(table)
    return tables


@lru_cache(1 << 17)
def word_evidence(word):
    """Returns the log odds that a lower-case word gives each language, (languages,) float32."""
    words, grams, letters = language_tables()
    total = np.zeros(len(LANGUAGES), np.float32)
    if word in words:
        total += words[word]
    spelled = f"_{word}_"
    for n in (2, 3):
        for i in range(len(spelled) - n + 1):
            if (row := grams.get(spelled[i:i + n])) is not None:
                total += row
    for letter in word:
        if (row := letters.get(letter)) is not None:
            total += row
    return total


def identify_by_rules(text):
    """Returns (language code, score from 0 to 1): by script, letters in a row, function words.

    ("und", 0.0) where a text has no letters. The score is the posterior among the script's
    LANGUAGES, less where there is little evidence: of another language, or no language at all.
    """
    if len(text) > 2 * LANGUAGE_CHARS:
        middle = len(text) // 2
        text = f"{text[:LANGUAGE_CHARS]} {text[middle:middle + LANGUAGE_CHARS]}"
    counts = script_counts(text)
    if not counts:
        return "und", 0.0
    # a Han or kana character is worth about three letters
    weights = {name: n * (3 if name in ("han", "ja", "ko") else 1) for name, n in counts.items()}
    script = max(sorted(weights), key=weights.get)
    share = weights[script] / sum(weights.values())
    if script in ("han", "ja"):
        east = counts.get("han", 0) + counts.get("ja", 0)
        kana = counts.get("ja", 0) / east
        share = (weights.get("han", 0) + weights.get("ja", 0)) / sum(weights.values())
        return ("ja" if kana > 0.05 else "zh"), round(share, 6)
    if script not in ("latin", "cyrillic", "arabic"):
        return script, round(share, 6)
    words = LETTER_RUNS.findall(text.lower())
    total = np.sum([word_evidence(word) for word in words], axis=0, dtype=np.float64)
    own = np.array([SCRIPT_OF.get(language, "latin") == script for language in LANGUAGES])
    odds = np.where(own, total, -np.inf)
    best = int(odds.argmax())
    p = 1 / np.exp(odds - odds[best]).sum()
    usual = sum(map(len, words)) * USUAL_EVIDENCE[script]
    return LANGUAGES[best], round(float(share * p * np.clip(odds[best] / usual, 0, 1)), 6)


# ---------------------------------------------------------------- harm and quality without a model

# Whole words; * stands for any ending. Mild where it can be: a word list is the last resort.
NSFW_WORDS = """porn* xxx nude* naked sex sexy sexual* erotic* hentai milf* blowjob* handjob* cum
cumshot* cock cocks dick dicks pussy pussies tits boobs anal orgasm* masturbat* fetish* bdsm
escort* hooker* slut* whore* horny lesbian* gangbang* threesome* camgirl* webcam* upskirt*
creampie* deepthroat* dildo* vagina* penis* nipple* hardcore strip* fuck* bukkake* busty jizz
xvideos pornhub onlyfans"""
TOXIC_WORDS = """fuck* fuk* motherfuck* shit* bullshit ass asses asshole* arse* bitch* bastard*
cunt* dick dickhead* prick cock cocksuck* suck sucks sucking whore* slut* fag* homo nigg* retard*
moron* idiot* stupid* dumb* imbecile* loser* jerk* pathetic scum* crap* piss* damn* hell hate*
kill die dumbass wanker* twat* bollocks douche* pussy gay* nazi* racist* ugly filthy disgusting
coward* liar* pig pigs trash garbage shut freak* troll* vandal* u ur noob* faggot* balls penis"""
WORDS_TO_HALF = 0.02  # share of listed words in a text that makes a score of one half


@lru_cache
def word_list_pattern(words):
    return re.compile(r"\b(?:" + "|".join(word.replace("*", r"\w*") for word in words.split())
                      + r")\b")


def word_list_score(text, words):
    """Returns the score from 0 to 1 of a text by the share of its words that are listed.

    >>> word_list_score("what a sunny day", TOXIC_WORDS)
    0.0
    """
    text = text.lower()
    found = len(word_list_pattern(words).findall(text))
    share = found / (len(text.split()) + 5)  # one word in a short line is not yet a verdict
    return round(share / (share + WORDS_TO_HALF), 6)


def prose_score(text):
    """Returns from 0 to 1 how much a text looks like edited prose: whole sentences, long lines,
    function words, few links and symbols. The mean of five shares, each from 0 to 1."""
    lines = [line for line in text.splitlines() if line.strip()]
    words = text.split()
    if not words:
        return 0.0
    ended = sum(len(line) for line in lines if line.rstrip().endswith((".", "!", "?", '"', "\u201d")))
    listed = english_function_words()
    common = sum(word.lower().strip(string.punctuation) in listed for word in words) / len(words)
    letters = sum(map(str.isalpha, text)) / max(1, sum(not c.isspace() for c in text))
    shares = (ended / sum(map(len, lines)), min(1, common / 0.4), min(1, len(words) / 300),
              min(1, len(words) / len(lines) / 20), min(1, max(0, (letters - 0.8) / 0.15)))
    return round(sum(shares) / len(shares), 6)


@lru_cache(1)
def english_function_words():
    return frozenset(FUNCTION_WORDS["en"].split())


# ---------------------------------------------------------------- classifiers, one manner for all

# kind: (label at a score of one half and above, label below, what scores without a model, its name)
BUILT_IN = {
    "nsfw": ("nsfw", "non-nsfw", lambda text: word_list_score(text, NSFW_WORDS),
             f"list of {len(NSFW_WORDS.split())} words"),
    "toxic": ("toxic", "non-toxic", lambda text: word_list_score(text, TOXIC_WORDS),
              f"list of {len(TOXIC_WORDS.split())} words"),
    "quality": ("wiki", "cc", prose_score, "shares of whole sentences and function words"),
}
CLASSIFIERS = ("language", *BUILT_IN)


class Classifier:
    """Labels texts by a model file, or without one by what is written here; `method` says which.

    predict: list of str -> list of (label, score from 0 to 1): of the label given.
    """

    def __init__(self, kind, model=None):
        if kind not in CLASSIFIERS:
            raise ValueError(f"kind must be one of {', '.join(CLASSIFIERS)}, got {kind!r}; choose one")
        self.kind, self.model = kind, FastText.load(model) if model else None
        if self.model:
            self.method = f"fastText model {Path(model).name}"
        elif kind == "language":
            self.method = f"built-in, {len(LANGUAGES) + 4} languages and those alone in a script"
        else:
            self.method = f"built-in {BUILT_IN[kind][3]}"

    def predict(self, texts):
        texts = list(texts)
        if self.model:  # the library adds 1e-5: no score is above 1 here
            return [(labels[0], min(1.0, scores[0])) if labels else ("und", 0.0)
                    for labels, scores in self.model.predict(texts)]
        if self.kind == "language":
            return [identify_by_rules(text) for text in texts]
        high, low, score, _ = BUILT_IN[self.kind]
        scores = [score(text) for text in texts]
        return [(high, s) if s >= 0.5 else (low, round(1 - s, 6)) for s in scores]


@lru_cache(8)
def load_classifier(kind, model=None):
    """Returns the Classifier of a kind and a model's path, made once in a process."""
    return Classifier(kind, model)


def identify_language(text, model=None):
    """Returns (ISO 639-1 code, score from 0 to 1). model: path of lid.176.bin or .ftz, or None."""
    return load_classifier("language", model).predict([text])[0]


def classify_nsfw(text, model=None):
    """Returns ("nsfw" or "non-nsfw", score of that label). model: a path, such as Dolma's [5]."""
    return load_classifier("nsfw", model).predict([text])[0]


def classify_toxic_speech(text, model=None):
    """Returns ("toxic" or "non-toxic", score of that label). model: a path, such as Dolma's [5]."""
    return load_classifier("toxic", model).predict([text])[0]


def classify_quality(text, model=None):
    """Returns ("wiki" or "cc", score of that label); a model's own labels where one is given."""
    return load_classifier("quality", model).predict([text])[0]


# ---------------------------------------------------------------- equal keys, in bounded memory

SORT_BYTES = 112  # of memory that sorting takes a key, measured at 10 million


def sorted_slices(blocks, count, memory_bytes):
    """Yields (keys, places) sorted by key, equal keys by place: the keys of one slice of their
    range at a time, so that each fits the memory.

    blocks: function that yields (place of the first, (n,) uint64 keys) anew at each call;
    count: of all keys.
    """
    n_slices = max(1, math.ceil(count * SORT_BYTES / memory_bytes))
    edges = [(1 << 64) * i // n_slices for i in range(n_slices + 1)]
    for low, high in pairwise(edges):
        parts = []
        for first, keys in blocks():
            inside = np.flatnonzero((keys >= np.uint64(low)) & (keys <= np.uint64(high - 1)))
            parts.append((keys[inside], inside + first))
        if parts:
            keys, places = (np.concatenate(part) for part in zip(*parts, strict=True))
            order = np.argsort(keys, kind="stable")
            yield keys[order], places[order]


def equal_runs(keys):
    """Returns (starts, ends) of the runs of two and more equal keys in a sorted array.

    >>> [a.tolist() for a in equal_runs(np.array([3, 4, 4, 4, 5]))]
    [[1], [4]]
    """
    edges = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1], [True])))
    long = np.diff(edges) > 1
    return edges[:-1][long], edges[1:][long]


def hash_bytes(data):
    """Returns eight bytes of blake2b, the same in every process, unlike Python's hash."""
    return hashlib.blake2b(data, digest_size=8).digest()


def output_paths(input_files, output_directory):
    """Returns (sorted inputs, {input: output of the same name}), checked before any work."""
    inputs = sorted(map(Path, input_files))
    if not inputs:
        raise ValueError("deduplication must have input files, got none; name some")
    for path in inputs:
        if not path.is_file():
            raise ValueError(f"an input must be a file, got {path}; check the path")
    outputs = {path: Path(output_directory) / path.name for path in inputs}
    if len(set(outputs.values())) < len(inputs):
        twice = [name for name, n in Counter(path.name for path in inputs).items() if n > 1]
        raise ValueError(f"input files must have different names, got {twice[0]} more than once; "
                         "rename it, or leave out the repeated path")
    for path, output in outputs.items():
        if output.exists() and output.samefile(path):
            raise ValueError(f"output_directory must not hold the inputs, got {path}; name another")
    Path(output_directory).mkdir(parents=True, exist_ok=True)
    return inputs, outputs


# ---------------------------------------------------------------- equal lines

LINE_BLOCK_BYTES = 1 << 24


def line_blocks(path):
    """Yields lists of a file's lines, as bytes with their ends."""
    with open(path, "rb") as file:
        while lines := file.readlines(LINE_BLOCK_BYTES):
            yield lines


def exact_line_deduplication(input_files, output_directory, memory_mb=1024):
    """Writes each file to output_directory without the lines that occur more than once anywhere;
    returns {"lines", "kept", "bytes", "kept_bytes"}.

    Every occurrence goes, the first too; "\\n" alone ends a line and is no part of it. Lines are
    told apart by 64 bits: of n lines, a line is taken for another with probability n / 2**64. The
    hashes are on disk, 8 bytes a line, and sorted in memory_mb. Source: [3] 3.1
    """
    inputs, outputs = output_paths(input_files, output_directory)
    with tempfile.TemporaryDirectory(prefix=".lines-", dir=output_directory) as folder:
        sizes, lines = hash_lines(inputs, folder)
        report = Counter(lines=lines, kept=0, bytes=0, kept_bytes=0)
        if lines:
            keep = np.memmap(f"{folder}/keep", bool, "r+", shape=(lines,))
            mark_repeated_lines(folder, sizes, keep, memory_mb << 20)
        at = 0
        for path in inputs:
            temporary = Path(folder) / path.name
            with open(temporary, "wb") as file:
                for block in line_blocks(path):
                    if at + len(block) > lines:
                        raise ValueError(f"{path} must not change while it is read, got more lines "
                                         "than before; run it again")
                    kept = list(compress(block, keep[at:at + len(block)]))
                    file.writelines(kept)
                    report.update(kept=len(kept), bytes=sum(map(len, block)),
                                  kept_bytes=sum(map(len, kept)))
                    at += len(block)
            os.replace(temporary, outputs[path])
    return dict(report)


def hash_lines(inputs, folder):
    """Writes folder/keys, the distinct hashes of each block of lines; folder/places, the first
    line of each; folder/keep, False where a block has the line twice. Returns (distinct hashes of
    each block, lines). A line that occurs everywhere costs one key a block."""
    sizes, lines = [], 0
    with (open(f"{folder}/keys", "wb") as keys, open(f"{folder}/places", "wb") as places,
          open(f"{folder}/keep", "wb") as keep):
        for path in inputs:
            for block in line_blocks(path):
                digests = b"".join([hash_bytes(line.removesuffix(b"\n")) for line in block])
                found, first, inverse, count = np.unique(
                    np.frombuffer(digests, "<u8"), return_index=True, return_inverse=True,
                    return_counts=True)
                found.tofile(keys)
                (first + lines).astype(np.int64).tofile(places)
                (count == 1)[inverse].tofile(keep)
                sizes.append(len(found))
                lines += len(block)
    return sizes, lines


def mark_repeated_lines(folder, sizes, keep, memory_bytes):
    """Sets keep to False at the lines whose hash more than one block has."""
    keys = np.memmap(f"{folder}/keys", "<u8", "r")
    lines = np.memmap(f"{folder}/places", np.int64, "r")
    starts = np.cumsum([0, *sizes])

    def blocks():
        for start, end in pairwise(starts):
            yield start, keys[start:end]

    for found, places in sorted_slices(blocks, len(keys), memory_bytes):
        starts_of_runs, ends = equal_runs(found)
        keep[lines[places[expand(starts_of_runs, ends - starts_of_runs)]]] = False
    keep.flush()


# ---------------------------------------------------------------- MinHash of one document

PUNCTUATION = str.maketrans("", "", string.punctuation)
MARKS = regex.compile(r"[\p{Mn}\p{P}\p{S}]+")
MAX_WORD_HASHES = 1 << 20  # remembered by a process: about 150 MB
SIGNATURE_BLOCK = 2048  # shingles at a time: 128 hashes of them are 1 MB


def normalize_for_dedup(text):
    """Returns a text lower-cased, in NFD without accents, without punctuation and symbols, its
    words one space apart. Source: [3] 3.2

    >>> normalize_for_dedup("  Café,  déjà-vu!")
    'cafe dejavu'
    """
    text = text.lower()
    if text.isascii():
        text = text.translate(PUNCTUATION)
    else:
        text = MARKS.sub("", unicodedata.normalize("NFD", text))
    return " ".join(text.split())


def fixed_numbers(name, count, dtype):
    """Returns random numbers that are the same everywhere and always: SHAKE-128 of a name."""
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(size), dtype)


class WordHashes(dict):
    """{word as it is in a text: 64-bit hash of it normalised, 0 where nothing is left of it},
    filled as words come: what normalize_for_dedup does to a text, once a word."""

    def __missing__(self, word):
        plain = word.lower()
        if not (plain.isascii() and plain.isalnum()):  # else nothing more is done to it
            plain = normalize_for_dedup(plain)
        data = plain.encode("utf-8", "surrogatepass")
        self[word] = value = int.from_bytes(hash_bytes(data), "little") if data else 0
        return value


class MinHash:
    """Shingles and signatures by multiply-shift, in uint32 whose wrap-around is the definition.

    A mod-prime hash of 64 bits overflows in 64 bits and is then no such hash. Source: [2], [4]
    """

    def __init__(self, num_hashes=128, num_bands=16, ngrams=5):
        if num_bands < 1 or num_hashes < 1 or num_hashes % num_bands or ngrams < 1:
            raise ValueError("num_hashes must be a multiple of num_bands, both and ngrams at least "
                             f"1, got {num_hashes}, {num_bands} and {ngrams}; change one")
        self.num_bands, self.ngrams, self.words = num_bands, ngrams, WordHashes()
        self.place_factors = fixed_numbers("shingle", ngrams, "<u8") | np.uint64(1)
        self.factors = (fixed_numbers("factor", num_hashes, "<u4") | np.uint32(1))[:, None]
        self.offsets = fixed_numbers("offset", num_hashes, "<u4")[:, None]
        self.band_factors = fixed_numbers("band", num_hashes // num_bands, "<u8") | np.uint64(1)

    def word_hashes(self, text):
        """Returns the hashes of a text's normalised words, (words,) uint64."""
        words = text.split()
        if len(self.words) > MAX_WORD_HASHES:
            self.words.clear()
        hashes = np.fromiter(map(self.words.__getitem__, words), np.uint64, len(words))
        return hashes[hashes != 0]

    def shingles(self, hashes):
        """Returns the hashes, (shingles,) uint64, of all runs of `ngrams` words, in order,
        repeated ones too; of a shorter text one, of all its words."""
        count = max(1, len(hashes) - self.ngrams + 1)
        total = np.zeros(count, np.uint64)
        for place, factor in enumerate(self.place_factors[:len(hashes)]):
            total += hashes[place:place + count] * factor
        return total

    def signature(self, shingles):
        """Returns the least hash of the shingles for each hash function, (num_hashes,) uint32."""
        x = (shingles >> np.uint64(32)).astype(np.uint32)
        least = np.full(len(self.factors), 0xFFFFFFFF, np.uint32)
        for at in range(0, len(x), SIGNATURE_BLOCK):
            hashes = self.factors * x[at:at + SIGNATURE_BLOCK]
            hashes += self.offsets
            np.minimum(least, hashes.min(axis=1), out=least)
        return least

    def keys(self, text):
        """Returns (1 + num_bands,) uint64: a hash of all the normalised words, then one of each
        band of the signature."""
        hashes = self.word_hashes(text)
        whole = np.frombuffer(hash_bytes(hashes.tobytes()), "<u8")
        bands = self.signature(self.shingles(hashes)).reshape(self.num_bands, -1)
        return np.concatenate([whole, (bands * self.band_factors).sum(1, dtype=np.uint64)])

    def shingle_set(self, text):
        return np.unique(self.shingles(self.word_hashes(text)))


def jaccard(a, b):
    """Returns the shared part of two sorted arrays without repeats: |a and b| / |a or b|."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def minhash_reference(texts, ngrams, jaccard_threshold):
    """Returns the cluster of each text, named by its first: the definition, over all pairs and
    with sets of strings, to compare with."""
    sets = []
    for text in texts:
        words = normalize_for_dedup(text).split(" ")
        count = max(1, len(words) - ngrams + 1)
        sets.append({tuple(words[i:i + ngrams]) for i in range(count)})
    cluster = list(range(len(texts)))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[:i]):
            if cluster[i] != cluster[j] and len(a & b) >= jaccard_threshold * len(a | b):
                low, high = sorted((cluster[i], cluster[j]))
                cluster = [low if c == high else c for c in cluster]
    return cluster


# ---------------------------------------------------------------- near duplicates of many documents

CHUNK_BYTES = 64 << 20  # of a .jsonl file that a worker signs at a time
CHUNK_FILES = 512  # of whole files that it signs at a time
GROUPS_A_TASK = 256
CACHED_SETS = 2000  # shingle sets that a worker keeps while it compares: about 20 MB


def plan_chunks(files):
    """Returns [(paths, start, end)]: ranges of bytes of .jsonl files, runs of whole other files."""
    chunks, whole = [], []
    for path in sorted(map(str, files)):
        if path.endswith(".gz"):
            raise ValueError(f"documents must be read at any place, got {path}; unpack it")
        if path.endswith(".jsonl"):
            size = os.path.getsize(path)
            chunks += [((path,), at, min(at + CHUNK_BYTES, size))
                       for at in range(0, size, CHUNK_BYTES)]
        else:
            whole.append(path)
    chunks += [(tuple(whole[i:i + CHUNK_FILES]), 0, None)
               for i in range(0, len(whole), CHUNK_FILES)]
    return chunks


def chunk_documents(chunk):
    """Yields (offset, text) of each document of a chunk: its lines that begin there, or files."""
    paths, start, end = chunk
    if end is None:
        for path in paths:
            yield 0, Path(path).read_text("utf-8", "replace")
        return
    with open(paths[0], "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (at := file.tell()) < end and (line := file.readline()):
            if line.strip():
                yield at, line_text(line, paths[0], at)


def line_text(line, path, at):
    """Returns the "text" of one line of a .jsonl file."""
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str):
            return text
        problem = f"\"text\" of type {type(text).__name__}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {str(error)[:60]}"
    raise ValueError(f"each line of {path} must be a JSON object with a \"text\", got {problem} at "
                     f"byte {at}; correct it")


def sign_chunk(number, chunk, folder, settings):
    """Writes folder/NUMBER.sign: per document its offset, then the column of each key, int64 and
    uint64 of (2 + num_bands, documents). Returns (documents)."""
    minhash = MinHash(*settings)
    signed = [(at, minhash.keys(text)) for at, text in chunk_documents(chunk)]
    columns = np.zeros((2 + minhash.num_bands, len(signed)), "<u8")
    if signed:
        columns[0] = [at for at, _ in signed]
        columns[1:] = np.stack([keys for _, keys in signed]).T
    bpe.write_atomically(f"{folder}/{number:06d}.sign", columns.tobytes())
    return len(signed)


class Signed:
    """The signatures of all documents, on disk. Document numbers go through chunks in order."""

    def __init__(self, chunks, folder, num_bands):
        self.chunks, self.folder, self.rows = chunks, folder, 2 + num_bands
        sizes = [os.path.getsize(self.path(i)) for i in range(len(chunks))]
        if wrong := [i for i, size in enumerate(sizes) if size % (8 * self.rows)]:
            raise ValueError(f"{self.path(wrong[0])} must hold whole records of {8 * self.rows} "
                             f"bytes, got {sizes[wrong[0]]} bytes; delete the folder, run it again")
        self.starts = np.cumsum([0] + [size // (8 * self.rows) for size in sizes])
        self.count = int(self.starts[-1])

    def path(self, chunk):
        return f"{self.folder}/{chunk:06d}.sign"

    def column(self, chunk, row):
        n = int(self.starts[chunk + 1] - self.starts[chunk])
        return np.fromfile(self.path(chunk), "<u8", n, offset=8 * n * row)

    def blocks(self, row):
        for chunk in range(len(self.chunks)):
            yield int(self.starts[chunk]), self.column(chunk, row)

    def locate(self, document):
        """Returns (path, offset or None where the file is the document)."""
        chunk = int(np.searchsorted(self.starts, document, side="right")) - 1
        paths, _, end = self.chunks[chunk]
        row = int(document - self.starts[chunk])
        if end is None:
            return paths[row], None
        return paths[0], int(np.fromfile(self.path(chunk), "<u8", 1, offset=8 * row)[0])


def read_document(path, offset):
    if offset is None:
        return Path(path).read_text("utf-8", "replace")
    with open(path, "rb") as file:
        file.seek(offset)
        return line_text(file.readline(), path, offset)


def roots_of(parent):
    """Returns the root of every document, and leaves `parent` pointing there."""
    while not np.array_equal(up := parent[parent], parent):
        parent[:] = up
    return parent


def join(parent, a, b):
    """Joins two clusters under the lower of their roots: the survivor does not hang on order."""
    while parent[a] != a:
        a = parent[a]
    while parent[b] != b:
        b = parent[b]
    parent[max(a, b)] = min(a, b)


def verify_groups(groups, settings, threshold):
    """Returns the pairs (i, j) of documents that join clusters, each found by true Jaccard.

    groups: [[(document, root of its cluster, path, offset)]], each a group that shares a band. A
    pair within one cluster is not looked at; every other pair is, until its clusters are one.
    """
    minhash, sets, pairs = MinHash(*settings), {}, []

    def shingle_set(document, path, offset):
        if document not in sets:
            if len(sets) >= CACHED_SETS:
                sets.clear()
            sets[document] = minhash.shingle_set(read_document(path, offset))
        return sets[document]

    for group in groups:
        clusters = {}
        for document, root, *place in group:
            clusters.setdefault(root, []).append((document, *place))
        merged = []
        for cluster in clusters.values():
            apart = []
            for other in merged:
                pair = next(((a[0], b[0]) for a in other for b in cluster
                             if jaccard(shingle_set(*a), shingle_set(*b)) >= threshold), None)
                if pair is None:
                    apart.append(other)
                else:
                    pairs.append(pair)
                    cluster = other + cluster
            merged = [*apart, cluster]
    return pairs


def candidate_groups(signed, row, parent, same, memory_bytes, share):
    """Yields the groups of documents of different clusters that have one band's key in common.

    same: (documents,) the first document with the same words, which stands for all of them;
    share: (rank, ranks): only the groups whose first document is this rank's.
    """
    rank, ranks = share
    for keys, places in sorted_slices(lambda: signed.blocks(row), signed.count, memory_bytes):
        firsts = same[places] == places  # copies are in their first one's cluster already
        keys, places = keys[firsts], places[firsts]
        starts, ends = equal_runs(keys)
        if not len(starts):
            continue
        inside = expand(starts, ends - starts)
        roots, cuts = parent[places[inside]], np.cumsum(ends - starts) - (ends - starts)
        several = np.minimum.reduceat(roots, cuts) != np.maximum.reduceat(roots, cuts)
        for start, end in zip(starts[several], ends[several], strict=True):
            group = places[start:end]
            if group[0] % ranks == rank and len(set(map(parent.__getitem__, group))) > 1:
                yield [(int(d), int(parent[d]), *signed.locate(d)) for d in group]


def predict_needs(files, num_bands):
    """Returns (documents, bytes of disk, bytes of memory) that find_near_duplicates will need,
    documents of .jsonl files judged by the first megabyte of each."""
    documents = 0
    for path in files:
        documents += 1
        if str(path).endswith(".jsonl"):
            with open(path, "rb") as file:
                start = file.read(1 << 20)
            documents += int(start.count(b"\n") / max(1, len(start)) * os.path.getsize(path))
    return documents, documents * 8 * (2 + num_bands), documents * 32


def find_near_duplicates(files, work_dir, num_hashes=128, num_bands=16, ngrams=5,
                         jaccard_threshold=0.8, num_workers=None, memory_mb=1024, rank=0, ranks=1,
                         barrier=None, progress=False):
    """Returns (signed, survivor): survivor[i], (documents,) int64, is the document that stays of
    i's cluster, the first of it in the order of paths and lines; i itself where i stays.

    Documents are linked where they share a band and their true Jaccard similarity is at least the
    threshold, or where their normalised words are the same; clusters are what links connect. The
    result is the same for any number of workers, ranks and order of files. Of ranks (machines with
    one shared work_dir), each signs every Nth chunk and compares its share of each band's groups;
    `barrier` waits for all. Finished signatures in work_dir are used again while the files and
    settings stay. Source: [2]; [3] 3.3
    """
    settings = num_hashes, num_bands, ngrams
    MinHash(*settings)
    if not 0 <= jaccard_threshold <= 1:
        raise ValueError(f"jaccard_threshold must be from 0 to 1, got {jaccard_threshold}; give a "
                         "share of shingles, such as 0.8")
    chunks, wait_for_all = plan_chunks(files), barrier or (lambda: None)
    num_workers = bpe.default_workers(num_workers)
    check_needs(files, num_bands, work_dir, memory_mb, progress)
    stamp = hashlib.sha256(json.dumps([settings, chunks, [
        (os.path.getsize(path), os.stat(path).st_mtime_ns) for path in sorted(map(str, files))]]
    ).encode()).hexdigest()[:16]
    folder = Path(work_dir) / f"signed-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(i, chunk, str(folder), settings) for i, chunk in enumerate(chunks)
             if i % ranks == rank and not (folder / f"{i:06d}.sign").exists()]
    bar = bpe.Progress("sign", len(tasks), "chunks", progress)
    for done, _ in enumerate(bpe.run_tasks(sign_chunk, tasks[::-1],
                                           min(num_workers, max(1, len(tasks)))), 1):
        bar.update(done)
    bar.close()
    wait_for_all()
    signed = Signed(chunks, str(folder), num_bands)
    parent = link_copies(signed, memory_mb << 20)
    same = parent.copy()
    bar = bpe.Progress("compare", num_bands, "bands", progress)
    links = []
    for band in range(num_bands):
        groups = candidate_groups(signed, 2 + band, roots_of(parent), same, memory_mb << 20,
                                  (rank, ranks))
        for pairs in verified(groups, settings, jaccard_threshold, num_workers):
            links += pairs
            for pair in pairs:
                join(parent, *pair)
        bar.update(band + 1)
    bar.close()
    if ranks > 1:
        bpe.write_atomically(folder / f"{rank:04d}of{ranks:04d}.links",
                             np.array(links, "<i8").reshape(-1, 2).tobytes())
        wait_for_all()
        for other in range(ranks):
            for pair in np.fromfile(folder / f"{other:04d}of{ranks:04d}.links",
                                    "<i8").reshape(-1, 2):
                join(parent, *pair)
    return signed, roots_of(parent)


def check_needs(files, num_bands, work_dir, memory_mb, progress):
    """Says what the run will need; raises ValueError where the disk has less."""
    documents, disk, memory = predict_needs(files, num_bands)
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work_dir).free
    if progress:
        print(f"about {documents:,} documents: {disk / 2**20:,.0f} MiB of disk in {work_dir} "
              f"({free / 2**20:,.0f} free), {memory / 2**20:,.0f} MiB of memory and up to "
              f"{memory_mb:,} to sort in", flush=True)
    if disk > free:
        raise ValueError(f"{work_dir} must have {disk:,} bytes free for signatures, got {free:,}; "
                         "name a larger disk, or fewer bands")


def link_copies(signed, memory_bytes):
    """Returns (documents,) int64: the first document with the same normalised words."""
    parent = np.arange(signed.count)
    for keys, places in sorted_slices(lambda: signed.blocks(1), signed.count, memory_bytes):
        starts, ends = equal_runs(keys)
        inside = expand(starts, ends - starts)
        parent[places[inside]] = np.repeat(places[starts], ends - starts)
    return parent


def verified(groups, settings, threshold, num_workers):
    """Yields lists of verified pairs; small numbers of groups are compared in this process."""
    groups = iter(groups)
    while round_of_groups := list(islice(groups, GROUPS_A_TASK * num_workers * 4)):
        tasks = [(round_of_groups[i:i + GROUPS_A_TASK], settings, threshold)
                 for i in range(0, len(round_of_groups), GROUPS_A_TASK)]
        if len(tasks) == 1:
            yield verify_groups(*tasks[0])
        else:
            yield from bpe.run_tasks(verify_groups, tasks, num_workers)


def minhash_deduplication(input_files, num_hashes, num_bands, ngrams, jaccard_threshold,
                          output_directory, num_workers=None, memory_mb=1024, work_dir=None,
                          progress=False):
    """Writes the documents that stay to output_directory; returns {"documents", "kept",
    "clusters"} and "duplicates": [(path, offset, path, offset)] of what went and what stayed.

    A file is a document, and stays or goes whole; of a .jsonl file each line with a "text" is one.
    """
    inputs, outputs = output_paths(input_files, output_directory)
    with tempfile.TemporaryDirectory(prefix=".minhash-", dir=output_directory) as temporary:
        signed, survivor = find_near_duplicates(
            inputs, work_dir or temporary, num_hashes, num_bands, ngrams, jaccard_threshold,
            num_workers, memory_mb, progress=progress)
        gone = np.flatnonzero(survivor != np.arange(len(survivor)))
        duplicates = [(*signed.locate(i), *signed.locate(survivor[i])) for i in gone]
        dropped = {(path, offset) for path, offset, *_ in duplicates}
        for path in inputs:
            part = Path(temporary) / "output"
            if path.suffix == ".jsonl":
                copy_lines(path, part, {at for name, at in dropped if name == str(path)})
            elif (str(path), None) in dropped:
                outputs[path].unlink(missing_ok=True)  # of an earlier run
                continue
            else:
                shutil.copyfile(path, part)
            os.replace(part, outputs[path])
    return {"documents": len(survivor), "kept": len(survivor) - len(gone),
            "clusters": len(set(survivor[gone].tolist())), "duplicates": duplicates}


def copy_lines(path, target, dropped):
    """Copies a file without the lines at the given offsets."""
    with open(path, "rb") as source, open(target, "wb") as file:
        at = 0
        for line in source:
            if at not in dropped:
                file.write(line)
            at += len(line)


# ---------------------------------------------------------------- the run: one document

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
PAGE_LIMIT_S = 2.0  # that one document may take in one stage before it is dropped
STUCK_S = 60.0  # after which a worker that shows no progress is killed and its page is skipped
WORKER_BYTES = 4 << 30  # of address space a worker may take beyond what it starts with
CHECKPOINT_BYTES = 8 << 20  # of an input file between two points that a run goes on from
CHECKPOINT_S = 15.0
EXAMPLES = 20  # dropped documents kept per reason and file, for `inspect`
DOCUMENT_MARK = "\x1e"  # starts the line before each document in a shard; text never holds it
STAGES = ("records", "text", "address", "language", "rules", "harm", "quality", "pii", "lines",
          "short", "copies", "contamination")


class TimeLimit(Exception):
    """A document took longer than it may."""


@contextmanager
def time_limit(seconds):
    """Raises TimeLimit in the block after so many seconds (in a main thread, not on Windows)."""
    def stop(number, frame):
        raise TimeLimit
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clean_text(text):
    """Returns the text without control characters, and with no special token in it."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.replace(bpe.END_OF_TEXT, "<| endoftext |>").strip()


def host_of(url):
    """Returns the host of an address, in lower case, without "www."."""
    return re.sub(r"^[a-z]+://(?:[^/@]*@)?(?:www\.)?|[:/?#].*$", "", url.lower())


class Judge:
    """What happens to a document: `judge(record)` says what is kept, or where and why it fell.

    counts: {stage: [documents in, characters in, documents out, characters out, seconds]};
    reasons: {"stage: reason": [documents, characters, example]}
    """

    def __init__(self, options):
        self.options = options
        self.rules = rules_with_thresholds(options.rules, options.threshold)
        self.blocked = set(Path(options.blocklist).read_text("utf-8").lower().split()) \
            if options.blocklist else set()
        for kind in ("language", "nsfw", "toxic", "quality"):  # read once, before workers start
            if path := getattr(options, f"{kind}_model"):
                load_classifier(kind, path)
        self.reset()

    def reset(self, counts=None, reasons=None):
        self.counts = {stage: [0, 0, 0, 0, 0.0] for stage in STAGES} | (counts or {})
        self.reasons = dict(reasons or {})

    def stage(self, name, text, url, function, *arguments):
        """Returns function(text, ...), which gives (text, None) or (None, reason); counts it."""
        count, started = self.counts[name], time.perf_counter()
        count[0] += 1
        count[1] += len(text)
        try:
            with time_limit(PAGE_LIMIT_S):
                out, reason = function(text, *arguments)
        except TimeLimit:
            out, reason = None, "time limit"
        except MemoryError:
            out, reason = None, "memory limit"
        except Exception as error:  # whatever a page does, it costs that page: named in the report
            out, reason = None, f"error {type(error).__name__}"
        count[4] += time.perf_counter() - started
        if reason is None:
            count[2] += 1
            count[3] += len(out)
            return out
        self.drop(name, reason, text, url)
        return None

    def drop(self, stage, reason, text, url):
        entry = self.reasons.setdefault(f"{stage}: {reason}", [0, 0, None])
        entry[0] += 1
        entry[1] += len(text)
        if isinstance(text, bytes):
            text = text[:1000].decode("utf-8", "replace")
        if entry[2] is None:
            entry[2] = {"url": url, "text": " ".join(text[:400].split())[:160]}
        self.dropped = (f"{stage}: {reason}", entry[0], text)

    def judge(self, record):
        """Returns {text, language, ...} of a document that is kept, or None; see self.dropped."""
        url, notes = record.url, {}
        self.dropped = None
        data = self.stage("records", record.data, url, lambda data: (data, record.problem))
        text = data and self.stage("text", data, url, self.extract, record)
        if text and self.blocked:
            text = self.stage("address", text, url, self.check_address, url)
        for name, function, on in (("language", self.check_language, self.options.languages),
                                   ("rules", self.check_rules, self.rules),
                                   ("harm", self.check_harm, not self.options.no_harm),
                                   ("quality", self.check_quality, self.options.quality_model),
                                   ("pii", self.mask, not self.options.no_pii)):
            if text and on:
                text = self.stage(name, text, url, function, notes)
        return {"url": url, **notes, "text": text} if text else None

    def extract(self, data, record):
        if record.kind == "conversion":
            text = data.decode("utf-8", "replace")
        elif record.content_type.lower().startswith("text/plain"):
            text = decode_html(data, record.content_type)[0]
        else:
            text = extract_text_from_html_bytes(data, self.options.mode, record.content_type)
        text = clean_text(text)
        return (text, None) if text else (None, "no text")

    def check_address(self, text, url):
        host = host_of(url).split(".")
        ends = {".".join(host[i:]) for i in range(len(host))}
        return (None, "blocklist") if ends & self.blocked or url in self.blocked else (text, None)

    def check_language(self, text, notes):
        code, score = identify_language(text, self.options.language_model)
        notes["language"], notes["language_score"] = code, round(float(score), 4)
        if code not in self.options.languages:
            return None, f"language {code}"
        if score < self.options.language_score:
            return None, f"language {code}, score too low"
        return text, None

    def check_rules(self, text, notes):
        for name, rules in self.rules.items():
            if name == "c4":
                text = clean_c4_lines(text)
            if reason := failed_rule(Document(text), rules):
                return None, f"{name} {reason}"
        return text, None

    def check_harm(self, text, notes):
        for name, classify, model in (
                ("nsfw", classify_nsfw, self.options.nsfw_model),
                ("toxic", classify_toxic_speech, self.options.toxic_model)):
            label, score = classify(text, model)
            notes[name] = round(float(score), 4)
            if label in HARMFUL and score >= self.options.harm_score:
                return None, name
        return text, None

    def check_quality(self, text, notes):
        label, score = classify_quality(text, self.options.quality_model)
        good = score if label == self.options.quality_label else 1 - score
        notes["quality"] = round(float(good), 4)
        return (text, None) if good >= self.options.quality_score else (None, "quality too low")

    def mask(self, text, notes):
        for name, function in (("emails", mask_emails), ("phones", mask_phone_numbers),
                               ("ips", mask_ips)):
            text, found = function(text)
            if found:
                notes[name] = found
        return text, None


HARMFUL = ("nsfw", "toxic", "1", "yes", "hate")


# ---------------------------------------------------------------- the run: one file

def read_last(journal):
    """Returns the last whole line of a journal as a dict, or None; cuts half a line off."""
    if not journal.exists():
        return None
    data = journal.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(journal, "r+b") as file:
            file.truncate(len(whole))
    return json.loads(whole.splitlines()[-1]) if whole else None


class Shard:
    """The output of one input file: what is kept, samples of what is not, and a journal.

    A line of the journal says how far the input was read and how long the two others were then,
    after they had reached the disk: whatever is beyond that is cut off when a run goes on.
    """

    def __init__(self, folder, number):
        self.journal = folder / f"{number:05d}.journal"
        self.paths = [folder / f"{number:05d}.txt", folder / f"{number:05d}.dropped.jsonl"]
        self.state = read_last(self.journal) or {"place": [0, 0], "sizes": [0, 0], "counts": None,
                                                 "reasons": None, "others": {}, "done": False}
        self.files = None

    def open(self):
        self.files = []
        for path, size in zip(self.paths, self.state["sizes"], strict=True):
            file = open(path, "r+b" if path.exists() else "w+b")
            if os.path.getsize(path) < size:
                raise ValueError(f"{path} must hold the {size} bytes that its journal speaks of, "
                                 f"got {os.path.getsize(path)}; give --overwrite to start anew")
            file.truncate(size)
            file.seek(size)
            self.files.append(file)
        return self

    def write(self, which, text):
        self.files[which].write(text.encode())

    def checkpoint(self, place, judge, others, done=False):
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        self.state = {"place": list(place), "sizes": [f.tell() for f in self.files],
                      "counts": judge.counts, "reasons": judge.reasons, "others": dict(others),
                      "done": done}
        with open(self.journal, "ab") as file:
            file.write(json.dumps(self.state).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        for file in self.files or ():
            file.close()


def filter_file(number, path, judge, folder, shared, skipped, stop):
    """Judges every document of one file into its shard, from where it stopped.

    shared: [records read, seconds since when, place in the file] for whoever watches; skipped:
    the records that killed workers; stop: a list that a signal fills
    """
    shard = Shard(folder, number)
    if shard.state["done"]:
        return
    shard.open()
    judge.reset(shard.state["counts"], shard.state["reasons"])
    others, place = Counter(shard.state["others"]), shard.state["place"]
    saved_at, saved_s = place[0], time.monotonic()
    try:
        for record in read_records(path, place, others):
            place = record.place
            shared[0], shared[1], shared[2], shared[3] = place[0], time.monotonic(), place[1], \
                judge.counts["records"][0]
            if list(place) in skipped:
                record.problem = record.problem or "killed its worker"
            kept = judge.judge(record)
            identity = f"{number}:{place[0]}:{place[1]}"
            if kept:
                text = kept.pop("text")
                head = json.dumps({"id": identity, **kept}, ensure_ascii=False)
                shard.write(0, f"{DOCUMENT_MARK}{head}\n{text}\n")
            elif judge.dropped and judge.dropped[1] <= EXAMPLES:
                reason, _, text = judge.dropped
                sample = {"id": identity, "url": record.url, "reason": reason, "text": text[:2000]}
                shard.write(1, json.dumps(sample) + "\n")
            now = time.monotonic()
            if stop or abs(place[0] - saved_at) >= CHECKPOINT_BYTES or now - saved_s > CHECKPOINT_S:
                shard.checkpoint(place, judge, others)
                saved_at, saved_s = place[0], now
                if stop:
                    return
        shard.checkpoint(place, judge, others, done=True)
    finally:
        shard.close()


def limit_memory(extra):
    """Lets this process take `extra` bytes more than it has, where the system can say so."""
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)


def work(number, path, options, folder, shared, skipped, errors):
    """A worker: one process filters one file. Exit code 0: done or stopped; 1: an error."""
    bpe.start_worker()
    stop = []
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.append(signum))
    limit_memory(WORKER_BYTES)
    try:
        local, fetched = fetch_input(path, folder, options)
        filter_file(number, local, options.judge or Judge(options), folder, shared, skipped, stop)
        if fetched and not stop:
            local.unlink()
    except (ValueError, OSError) as error:
        errors.put((number, str(error)))
        sys.exit(1)


# ---------------------------------------------------------------- inputs

COMMON_CRAWL = "https://data.commoncrawl.org/"
DOWNLOAD_TRIES = 100


def list_inputs(inputs):
    """Returns the files that --input names: paths, patterns, folders, addresses, lists of paths.

    A list is a file that ends in .paths or .paths.gz, one path of Common Crawl a line, as in
    wet.paths.gz; a path that exists here, whole or by its last part beside the list, is taken
    before the net is asked.
    raises: ValueError if there is none
    """
    found = []
    for item in inputs:
        if re.match(r"https?://", item):
            found.append(item)
        elif item.endswith((".paths", ".paths.gz")) and os.path.exists(item):
            opener = gzip.open if item.endswith(".gz") else open
            with opener(item, "rt", encoding="utf-8") as file:
                for line in filter(None, map(str.strip, file)):
                    beside = [Path(line), Path(item).parent / line,
                              Path(item).parent / Path(line).name]
                    here = next((str(path) for path in beside if path.is_file()), None)
                    found.append(here or (line if "://" in line else COMMON_CRAWL + line))
        elif os.path.isdir(item):
            found += sorted(str(path) for path in Path(item).rglob("*")
                            if re.search(r"\.(?:warc|wet)(?:\.gz)?$", path.name))
        elif os.path.exists(item):
            found.append(item)
        else:
            found += sorted(glob.glob(item, recursive=True))
    if not found:
        raise ValueError(f"--input must name WARC or WET files, got none for {' '.join(inputs)}; "
                         "check the path, and put a pattern in quotes")
    return list(dict.fromkeys(found))


def fetch_input(path, folder, options):
    """Returns (local path, whether it was fetched); goes on where a download stopped.

    After a refusal (403, 429, 5xx) all workers together ask at most once a second.
    """
    if "://" not in path:
        return Path(path), False
    import requests

    name = hashlib.sha256(path.encode()).hexdigest()[:12] + "-" + path.rsplit("/", 1)[1]
    local, part = folder / name, folder / f"{name}.part"
    for attempt in range(DOWNLOAD_TRIES):
        if local.exists():
            return local, True
        try:
            bpe.download_rest(requests, path, part)
            os.replace(part, local)
        except (OSError, requests.RequestException) as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if attempt == DOWNLOAD_TRIES - 1 or 400 <= status < 500 and status not in (403, 429):
                raise OSError(f"{path} must be reachable, got {error}; what came is kept, run "
                              "again, or give a local copy") from None
            time.sleep(min(60, options.num_workers * (1 + attempt)))
    return local, True


# ---------------------------------------------------------------- the run: many files

class Run:
    """All of a run; `run` is its order."""

    def __init__(self, args):
        self.args, self.started = args, time.monotonic()
        self.out_dir, self.parts = Path(args.out_dir), Path(args.out_dir) / "parts"
        self.rank, self.world = (int(os.environ.get(name, default)) for name, default in
                                 (("RANK", 0), ("WORLD_SIZE", 1)))
        self.inputs = list_inputs(args.input)
        self.tokenizer = check_tokenizer(args)
        for path in self.inputs:
            if "://" not in path:
                for _ in read_records(path):  # the first record: a foreign file is known at once
                    break
        self.judge = Judge(args)
        self.args.judge = self.judge
        self.stop, self.lock = [], None

    def prepare(self):
        """Makes the folder, keeps others out of it, and checks that it is of the same run."""
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out_dir / f"lock.{self.rank}", "w")
        except OSError as error:
            raise ValueError(f"--out_dir must be a folder to write into, got {self.out_dir} "
                             f"({error.strerror}); choose another") from None
        lock_file(self.lock, self.out_dir)
        ignore = ("input", "out_dir", "num_workers", "overwrite", "judge", "verb", "function",
                  "tokenizer", "vocab_size")  # the last step is always done anew
        plan = {"inputs": [[path, os.path.getsize(path) if "://" not in path else None]
                           for path in self.inputs],
                "flags": {k: v for k, v in vars(self.args).items() if k not in ignore}}
        path = self.out_dir / "plan.json"
        if self.args.overwrite and self.rank == 0:
            remove_run(self.out_dir)
        if path.exists() and (old := json.loads(path.read_text())) != json.loads(json.dumps(plan)):
            differs = [k for k in plan["flags"] if plan["flags"][k] != old["flags"].get(k)]
            raise ValueError(f"{self.out_dir} must be of this run, got one with other "
                             f"{', '.join(differs) or 'inputs'}; give the same, --overwrite or "
                             "another --out_dir")
        if self.rank == 0:
            bpe.write_atomically(path, json.dumps(plan, indent=1).encode())

    def run(self):
        """Filters files, then all documents together; returns 0, or 128 + a signal."""
        self.prepare()
        before = [signal.signal(number, lambda number, frame: self.stop.append(number))
                  for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            self.filter_files()
            if self.stop:
                print(f"signal {self.stop[0]}: stopped; the same command goes on")
                return 128 + self.stop[0]
            signal.signal(signal.SIGTERM, before[0])  # the rest ends anywhere and is done anew
            signal.signal(signal.SIGINT, before[1])
            self.barrier()
            self.finish()
        finally:
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
        return 0

    def filter_files(self):
        """Keeps num_workers processes at work until each of this rank's files is done."""
        waiting = [n for n in range(len(self.inputs)) if n % self.world == self.rank
                   and not Shard(self.parts, n).state["done"]][::-1]
        context = multiprocessing.get_context(bpe.START_METHOD)
        errors, active, deaths = context.SimpleQueue(), {}, Counter()
        line = ProgressLine(self)
        try:
            while (waiting and not self.stop) or active:
                while waiting and not self.stop and len(active) < self.args.num_workers:
                    number = waiting.pop()
                    active[number] = self.start_worker(context, number, errors)
                time.sleep(0.02)
                for number, (process, shared) in list(active.items()):
                    self.watch(number, process, shared, active, waiting, deaths, errors)
                if self.stop:
                    for process, _ in active.values():
                        process.terminate()
                line.update(active)
        finally:
            for process, _ in active.values():
                process.terminate()
            for process, _ in active.values():
                process.join(10)
                if process.is_alive():
                    process.kill()
        line.close()

    def start_worker(self, context, number, errors):
        skip = self.parts / f"{number:05d}.skip"
        skipped = json.loads(skip.read_text()) if skip.exists() else []
        shared = context.Array("d", [0, time.monotonic(), -1, 0], lock=False)
        process = context.Process(target=work, args=(
            number, self.inputs[number], self.args, self.parts, shared, skipped, errors))
        process.start()
        return process, shared

    def watch(self, number, process, shared, active, waiting, deaths, errors):
        """Sees to one worker: done, stuck, or dead."""
        place = (number, int(shared[0]), int(shared[2]))
        if process.is_alive():
            if shared[2] >= 0 and time.monotonic() - shared[1] > STUCK_S:
                process.kill()
                process.join()
                deaths[place] += 1  # stuck is certain: once is enough
            else:
                return
        process.join()
        del active[number]
        if self.stop or process.exitcode == 0 and Shard(self.parts, number).state["done"]:
            return
        if process.exitcode == 0:  # someone else stopped it
            waiting.append(number)
            return
        if process.exitcode == 1:
            number, message = errors.get() if not errors.empty() else (number, "see above")
            raise OSError(f"{self.inputs[number]}: {message}")
        deaths[place] += 1
        if deaths[place] > 1 and shared[2] >= 0:  # twice at one record: it is the record
            skip = self.parts / f"{number:05d}.skip"
            skipped = json.loads(skip.read_text()) if skip.exists() else []
            bpe.write_atomically(skip, json.dumps([*skipped, list(place[1:])]).encode())
            print(f"{self.inputs[number]}: the record at {place[1:]} killed its worker; skipped",
                  flush=True)
        elif deaths[place] > 3:
            raise OSError(f"a worker must live, got one killed {deaths[place]} times before its "
                          f"first record of {self.inputs[number]}; see the system's log")
        waiting.append(number)

    def barrier(self):
        """Waits for the other ranks, where there are any."""
        if self.world == 1:
            return
        import torch.distributed as dist
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()

    def finish(self):
        """The stages over all documents, the text, its tokens and the report."""
        shards = [Shard(self.parts, n) for n in range(len(self.inputs))]
        report = Report(self, shards)
        report.check_not_empty("records", "text", "address", "language", "rules", "harm",
                               "quality", "pii")
        finish = Finish(self, [shard.paths[0] for shard in shards], report)
        finish.run()
        if self.rank:
            return
        report.check_not_empty("lines", "short", "copies", "contamination")
        report.tokens = self.make_tokens()
        report.write()

    def make_tokens(self):
        """Returns what write_tokens says of tokens.bin, made with a tokenizer given or trained."""
        text, path = self.out_dir / "clean.txt", self.out_dir / "tokenizer.json"
        tokenizer = self.tokenizer
        if tokenizer is None:
            vocab, merges = bpe.train_bpe(text, self.args.vocab_size, [bpe.END_OF_TEXT],
                                          self.args.num_workers)
            tokenizer = bpe.Tokenizer(vocab, merges, [bpe.END_OF_TEXT])
        tokenizer.save(path)
        return bpe.write_tokens([text], tokenizer, self.out_dir / "tokens.bin",
                                self.args.num_workers)


def lock_file(file, out_dir):
    """Waits up to 20 s for the workers of a killed run to end; raises ValueError if one lives."""
    try:
        import fcntl
    except ImportError:
        return
    for _ in range(200):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(0.1)
    raise ValueError(f"--out_dir must be of one run at a time, got {out_dir}, in which another is "
                     "at work; wait for it")


def remove_run(out_dir):
    """Removes what a run left, and nothing else."""
    for pattern in ("parts/*", "lines", "documents", "copies", "plan.json", "clean.txt", "kept.jsonl", "tokens.*",
                    "tokenizer.json", "report.*", "dropped.jsonl", "*.tmp"):
        for path in out_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_tokenizer(args):
    """Returns the Tokenizer of --tokenizer, or None; raises ValueError if it is not for uint16."""
    if not args.tokenizer:
        if not 257 <= args.vocab_size <= 1 << 16:
            raise ValueError("--vocab_size must be 257 to 65,536, for tokens of uint16, got "
                             f"{args.vocab_size}; choose another")
        return None
    path = Path(args.tokenizer)
    tokenizer = bpe.Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path)
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError("--tokenizer must have at most 65,536 ids, for tokens of uint16, got "
                         f"{tokenizer.vocab_size:,}; use a smaller one")
    if bpe.END_OF_TEXT not in tokenizer.special_ids:
        raise ValueError(f"--tokenizer must have the special token {bpe.END_OF_TEXT}, got "
                         f"{args.tokenizer} without; train it with bpe.py")
    return tokenizer


class ProgressLine:
    """Says documents and bytes a second and what is left: one line, rewritten on a terminal."""

    def __init__(self, run):
        self.run, self.shown, self.terminal = run, time.monotonic(), sys.stderr.isatty()
        self.sizes = [os.path.getsize(p) if "://" not in p else 0 for p in run.inputs]
        self.done, self.documents = self.count({})
        self.start = (time.monotonic(), self.done, self.documents)

    def count(self, active):
        done = documents = 0
        for number in range(self.run.rank, len(self.sizes), self.run.world):
            if number in active and active[number][1][2] >= 0:
                shared = active[number][1]
                done, documents = done + shared[0], documents + shared[3]
                continue
            state = Shard(self.run.parts, number).state
            done += self.sizes[number] if state["done"] else state["place"][0]
            documents += (state["counts"] or {"records": [0]})["records"][0]
        return done, documents

    def update(self, active, last=False):
        now = time.monotonic()
        if not last and now - self.shown < (0.5 if self.terminal else 10):
            return
        self.shown = now
        done, documents = self.count(active)
        seconds = max(now - self.start[0], 1e-9)
        rate = (done - self.start[1]) / seconds
        total = sum(self.sizes[self.run.rank::self.run.world])
        eta = int(max(0, total - done) / rate) if rate > 0 else 0
        end = "\n" if last or not self.terminal else "\r"
        print(f"filter {done / 1e6:,.1f}/{total / 1e6:,.1f} MB | {documents:,.0f} documents | "
              f"{(documents - self.start[2]) / seconds:,.0f} documents/s | {rate / 1e6:.2f} MB/s | "
              f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}", file=sys.stderr, end=end,
              flush=True)

    def close(self):
        self.update({}, last=True)


# ---------------------------------------------------------------- the run: all documents together

def read_shard(path):
    """Yields (notes, text) of the documents of a shard, in order."""
    head, lines = None, []
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.startswith(DOCUMENT_MARK):
                if head is not None:
                    yield json.loads(head), "".join(lines).strip("\n")
                head, lines = line[1:], []
            else:
                lines.append(line)
    if head is not None:
        yield json.loads(head), "".join(lines).strip("\n")


class Finish:
    """Repeated lines, near copies, contamination; then the text in the order of the inputs."""

    def __init__(self, run, shards, report):
        self.args, self.out_dir, self.barrier = run.args, run.out_dir, run.barrier
        self.rank, self.world = run.rank, run.world
        self.shards, self.report = shards, report

    def run(self):
        folder = self.out_dir / "documents"
        if self.rank == 0:
            if not self.args.no_line_dedup:
                self.shards = self.drop_lines()
            self.write_documents(folder)
        self.barrier()
        paths = [folder / f"{path.stem}.jsonl" for path in self.shards]
        survivor = None if self.args.no_copies else self.find_copies(paths)
        if self.rank == 0:
            self.write(paths, survivor)
            shutil.rmtree(folder)

    def drop_lines(self):
        """Returns shards without the lines that occur more than once anywhere."""
        started, folder = time.perf_counter(), self.out_dir / "lines"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            exact_line_deduplication([str(path) for path in self.shards], str(folder))
            (folder / "done").touch()
        shards = [folder / path.name for path in self.shards]
        before, after = ([len(text) for path in paths for _, text in read_shard(path)]
                         for paths in (self.shards, shards))
        self.report.counts["lines"] = [len(before), sum(before), len(after), sum(after),
                                       time.perf_counter() - started]
        return shards

    def write_documents(self, folder):
        """Writes what is long enough as .jsonl files, whose lines are documents."""
        folder.mkdir(exist_ok=True)
        with open(self.out_dir / "dropped.jsonl", "w", encoding="utf-8") as self.dropped:
            for shard in self.shards:
                lines = []
                for notes, text in read_shard(shard):
                    wrong = self.too_short(text) and "too short without its repeated lines"
                    if self.passes("short", wrong, notes, text):
                        lines.append(json.dumps(notes | {"text": text}) + "\n")
                write_if_new(folder / f"{shard.stem}.jsonl", "".join(lines).encode())

    def find_copies(self, paths):
        """Returns for each document in order the one that stays of its near copies."""
        started, args = time.perf_counter(), self.args
        _, survivor = find_near_duplicates(
            [str(path) for path in paths], str(self.out_dir / "copies"), args.num_hashes,
            args.num_bands, args.ngrams, args.jaccard_threshold, args.num_workers, rank=self.rank,
            ranks=self.world, barrier=self.barrier)
        self.report.seconds["copies"] = time.perf_counter() - started
        return survivor

    def too_short(self, text):
        """Whether the first rule, the number of words, no longer holds after lines went."""
        rules = [rule for rules in self.report.run.judge.rules.values() for rule in rules]
        rule = next((r for r in rules if getattr(r, "func", r) is word_count), None)
        return not text.strip() or bool(rule) and not rule(Document(text))

    def passes(self, stage, wrong, notes, text):
        """Counts a document in a stage; returns whether it stays, with nothing wrong."""
        count = self.report.counts[stage]
        count[0] += 1
        count[1] += len(text)
        if not wrong:
            count[2] += 1
            count[3] += len(text)
            return True
        if self.report.drop(f"{stage}: {wrong}", text, notes["url"]) <= EXAMPLES:
            sample = notes | {"reason": f"{stage}: {wrong}", "text": text[:2000]}
            self.dropped.write(json.dumps(sample) + "\n")
        return False

    def write(self, paths, survivor):
        """Writes clean.txt and kept.jsonl: the documents that stay, in the order of the inputs."""
        grams = contamination_grams(self.args)
        number = start = 0
        with (open_whole(self.out_dir / "clean.txt") as clean,
              open_whole(self.out_dir / "kept.jsonl") as kept,
              open(self.out_dir / "dropped.jsonl", "a", encoding="utf-8") as self.dropped):
            for path in paths:
                for line in open_lines(path):
                    notes = json.loads(line)
                    text = notes.pop("text")
                    copy = survivor is not None and survivor[number] != number
                    number += 1
                    if survivor is not None and not self.passes(
                            "copies", copy and "near copy of an earlier one", notes, text):
                        continue
                    if grams and not self.passes(
                            "contamination", shares_gram(text, grams, self.args.decontaminate_ngram)
                            and "shares words with the validation text", notes, text):
                        continue
                    data = text.encode()
                    clean.write(data + bpe.END_OF_TEXT.encode())
                    kept.write(json.dumps(notes | {"start": start, "bytes": len(data)}).encode()
                               + b"\n")
                    start += len(data) + len(bpe.END_OF_TEXT)


@contextmanager
def open_whole(path):
    """A file to write that stands under its name only when all of it has reached the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def open_lines(path):
    with open(path, "rb") as file:
        yield from file


def write_if_new(path, data):
    """Writes bytes unless the file has them: what was made from it stays newer."""
    if not path.exists() or path.read_bytes() != data:
        bpe.write_atomically(path, data)


def gram_hashes(text, n):
    """Yields a 64-bit hash of each n words in a row, case and punctuation aside."""
    words = WORD.findall(text.lower())
    for i in range(len(words) - n + 1):
        yield hashlib.blake2b(" ".join(words[i:i + n]).encode(), digest_size=8).digest()


def contamination_grams(args):
    """Returns the set of n-gram hashes of the validation text, or None."""
    if not args.decontaminate:
        return None
    text = Path(args.decontaminate).read_text("utf-8", errors="replace")
    return {gram for document in text.split(bpe.END_OF_TEXT)
            for gram in gram_hashes(document, args.decontaminate_ngram)}


def shares_gram(text, grams, n):
    return any(gram in grams for gram in gram_hashes(text, n))


# ---------------------------------------------------------------- the run: its report

class Report:
    """What came into and out of every stage, and why what fell did; its sums close."""

    def __init__(self, run, shards):
        self.run, self.tokens = run, None
        self.counts = {stage: [0, 0, 0, 0, 0.0] for stage in STAGES}
        self.reasons, self.others, self.seconds = {}, Counter(), {}
        for shard in shards:
            self.others.update(shard.state["others"])
            for stage, count in shard.state["counts"].items():
                self.counts[stage] = [a + b for a, b in zip(self.counts[stage], count, strict=True)]
            for reason, (documents, chars, example) in shard.state["reasons"].items():
                entry = self.reasons.setdefault(reason, [0, 0, example])
                entry[0] += documents
                entry[1] += chars

    def drop(self, reason, text, url):
        """Counts a document that fell; returns how many did for this reason."""
        entry = self.reasons.setdefault(reason, [0, 0, {
            "url": url, "text": " ".join(text[:400].split())[:160]}])
        entry[0] += 1
        entry[1] += len(text)
        return entry[0]

    def check_not_empty(self, *stages):
        """Raises ValueError that names stage and reason if one of the stages dropped everything."""
        for stage in stages:
            came, left = self.counts[stage][0], self.counts[stage][2]
            if came and not left:
                reasons = sorted(((entry[0], reason) for reason, entry in self.reasons.items()
                                  if reason.startswith(f"{stage}: ")), reverse=True)
                self.write()
                raise ValueError(
                    f"a stage must keep a document, got none of {came:,} after {stage} ("
                    + ", ".join(f"{reason}: {n:,}" for n, reason in reasons[:3])
                    + f"); see {self.run.out_dir}/report.txt, loosen it, and give --overwrite")
        if not self.counts["records"][0]:
            raise ValueError("the inputs must hold documents, got records of other kinds only "
                             f"({dict(self.others)}); give WARC or WET files")

    def as_dict(self):
        stages = []
        for name in STAGES:
            came, chars_in, left, chars_out, seconds = self.counts[name]
            if not came:
                continue
            reasons = {reason.split(": ", 1)[1]: {"documents": n, "characters": chars,
                                                 "example": example}
                       for reason, (n, chars, example) in sorted(self.reasons.items())
                       if reason.startswith(f"{name}: ")}
            dropped = sum(r["characters"] for r in reasons.values())
            stages.append({"stage": name, "documents_in": came, "documents_out": left,
                           "characters_in": chars_in, "characters_dropped": dropped,
                           "characters_changed": chars_out - chars_in + dropped,
                           "characters_out": chars_out, "reasons": reasons,
                           "seconds": round(self.seconds.get(name, seconds), 3)})
        sizes = [os.path.getsize(p) if "://" not in p else 0 for p in self.run.inputs]
        return {"inputs": len(self.run.inputs), "bytes_in": sum(sizes),
                "other_records": dict(self.others), "stages": stages, "tokens": self.tokens,
                "wall_seconds": round(time.monotonic() - self.run.started, 2),
                "methods": methods(self.run.args),
                "hours": self.hours(sizes)}

    def hours(self, sizes):
        """What 5,000 and 100,000 WET files would take at this run's processor time a byte."""
        busy = sum(count[4] for count in self.counts.values())
        per_byte = busy / max(sum(sizes), 1)
        return {f"{files} WET files": round(files * WET_BYTES * per_byte
                                            / 3600 / self.run.args.num_workers, 1)
                for files in (5000, 100_000)}

    def write(self):
        data = self.as_dict()
        bpe.write_atomically(self.run.out_dir / "report.json",
                             json.dumps(data, indent=1, ensure_ascii=False).encode())
        table = report_table(data)
        bpe.write_atomically(self.run.out_dir / "report.txt", table.encode())
        print(table)


WET_BYTES = 70_000_000  # of a Common Crawl WET file, gzip, about


def methods(args):
    """Returns how language, harm and quality were judged, for the report."""
    used = {"language": bool(args.languages), "nsfw": not args.no_harm, "toxic": not args.no_harm,
            "quality": bool(args.quality_model)}
    return {kind: load_classifier(kind, getattr(args, f"{kind}_model")).method if on
            else "not judged" for kind, on in used.items()}


def report_table(data):
    """Returns the funnel as text: a line a stage, and under it one a reason."""
    lines = [f"{'stage':<44}{'documents':>12}{'share':>9}{'characters':>16}{'seconds':>10}"]
    first = data["stages"][0]["documents_in"] if data["stages"] else 1
    for stage in data["stages"]:
        lines.append(f"{stage['stage'] + ' in':<44}{stage['documents_in']:>12,}"
                     f"{stage['documents_in'] / first:>9.1%}{stage['characters_in']:>16,}"
                     f"{stage['seconds']:>10.2f}")
        for reason, entry in sorted(stage["reasons"].items(),
                                    key=lambda item: -item[1]["documents"]):
            lines.append(f"  - {reason[:40]:<40}{-entry['documents']:>12,}"
                         f"{-entry['documents'] / first:>9.1%}{-entry['characters']:>16,}")
        if stage["characters_changed"]:
            lines.append(f"  {'changed in what stays':<42}{'':>12}{'':>9}"
                         f"{stage['characters_changed']:>+16,}")
    last = data["stages"][-1] if data["stages"] else None
    if last:
        lines.append(f"{'kept':<44}{last['documents_out']:>12,}"
                     f"{last['documents_out'] / first:>9.1%}{last['characters_out']:>16,}")
    if data["tokens"]:
        lines.append(f"{data['tokens']['tokens']:,} tokens of {data['tokens']['bytes']:,} bytes")
    lines.append("judged by: " + ", ".join(f"{k} {v}" for k, v in data["methods"].items()))
    lines.append(f"{data['bytes_in']:,} bytes of {data['inputs']} files in {data['wall_seconds']} s;"
                 " at this rate " + ", ".join(f"{k} {v} h" for k, v in data["hours"].items()))
    return "\n".join(lines)


# ---------------------------------------------------------------- verbs

def run(args):
    args.languages = [code for code in args.languages.split(",") if code not in ("", "any")]
    args.rules = [name for name in args.rules.split(",") if name not in ("", "none")]
    args.num_workers = bpe.default_workers(args.num_workers)
    job = Run(args)
    try:
        return job.run()
    finally:
        if job.lock:
            job.lock.close()


def extract(args):
    """Prints the text of pages: HTML files, or every page of WARC files."""
    for path in bpe.list_files(args.input):
        opener = gzip.open if path.suffix == ".gz" and ".warc" not in path.name else open
        if ".warc" in path.name:
            for record in read_records(path):
                if record.problem:
                    print(f"{DOCUMENT_MARK}{record.url}\t{record.problem}")
                    continue
                text = record.data.decode("utf-8", "replace") if record.kind == "conversion" else \
                    extract_text_from_html_bytes(record.data, args.mode, record.content_type)
                print(f"{DOCUMENT_MARK}{record.url}\n{text}")
            continue
        with opener(path, "rb") as file:
            print(extract_text_from_html_bytes(file.read(), args.mode))


def inspect(args):
    """Prints kept and dropped documents of a run, drawn by --seed, and the reasons."""
    out_dir, rng = Path(args.out_dir), random.Random(args.seed)
    if not (out_dir / "kept.jsonl").exists():
        raise ValueError(f"--out_dir must hold a finished run, got {out_dir}; run it first")
    with open(out_dir / "kept.jsonl", encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
    with open(out_dir / "clean.txt", "rb") as text:
        for notes in rng.sample(kept, min(args.kept, len(kept))):
            text.seek(notes["start"])
            show(notes, "kept", text.read(notes["bytes"]).decode(), args.chars)
    dropped = []
    for path in [*sorted((out_dir / "parts").glob("*.dropped.jsonl")), out_dir / "dropped.jsonl"]:
        dropped += [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if args.reason:
        dropped = [sample for sample in dropped if args.reason in sample["reason"]]
    for sample in rng.sample(dropped, min(args.dropped, len(dropped))):
        show(sample, f"dropped, {sample['reason']}", sample["text"], args.chars)


def show(notes, verdict, text, chars):
    rest = {k: v for k, v in notes.items() if k not in ("url", "text", "reason", "start", "id")}
    print(f"--- {verdict} | {notes['url']} | {json.dumps(rest)}\n{text[:chars]}\n")


def read_texts(path):
    """Yields the texts of a file: "text" of each line of a .jsonl(.gz), else its lines."""
    path = Path(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (text for _, text in bpe.read_jsonl(path, "replace"))
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line.rstrip("\n") for line in file if line.strip())


def train_classifier(args):
    """Trains on 9 in 10 texts of two files, measures on the rest, saves model and notes."""
    texts, labels = [], []
    for path, label in zip(args.train, args.labels, strict=True):
        texts += read_texts(path)
        labels += [label] * (len(texts) - len(labels))
    started = time.perf_counter()
    held = [hash_bytes(text.encode("utf-8", "replace"))[0] % 10 == 0 for text in texts]
    parts = [[pair for pair, out in zip(zip(texts, labels, strict=True), held, strict=True)
              if out == wanted] for wanted in (False, True)]
    settings = {name: getattr(args, name) for name in TRAINING}
    train_texts, train_labels = zip(*parts[0], strict=True) if parts[0] else ((), ())
    model, counts = train_fasttext(train_texts, train_labels, seed=args.seed, progress=True,
                                   lower=not args.cased, **settings)
    model.save(args.model, counts)
    answers = model.predict([text for text, _ in parts[1]], k=-1)
    scores = [dict(zip(*answer, strict=True)).get(args.labels[0], 0.5) for answer in answers]
    auc = area_under_curve(scores, [label == args.labels[0] for _, label in parts[1]])
    notes = {"lower": model.lower, "labels": args.labels, "texts": len(parts[0]), "held_out":
             len(parts[1]), "auc": None if math.isnan(auc) else round(auc, 4), **settings}
    bpe.write_atomically(f"{args.model}.json", (json.dumps(notes) + "\n").encode())
    print(f"{args.model}: {len(parts[0]):,} texts, {len(model.words):,} words | AUC {auc:.4f} on "
          f"{len(parts[1]):,} held out | {time.perf_counter() - started:.1f} s")


def classify(args):
    """Trains a classifier of two files of texts, or labels texts with one."""
    if args.train:
        if not args.model:
            raise ValueError("classify --train must have --model, got none; name the .bin to write")
        return train_classifier(args)
    classifier = load_classifier(args.kind, args.model)
    if args.text is None and not args.input:
        raise ValueError("classify must have --text, --input or --train, got none; give one")
    print(f"method: {classifier.method}", file=sys.stderr)
    texts = iter([args.text]) if args.text is not None else (
        text for path in bpe.list_files(args.input) for text in read_texts(path))
    counts, seconds, n_bytes = Counter(), 0.0, 0
    with open(args.out, "w", encoding="utf-8") if args.out else nullcontext() as out:
        for batch in batches(texts, BATCH_BYTES):
            started = time.perf_counter()
            answers = classifier.predict(batch)
            seconds += time.perf_counter() - started
            n_bytes += sum(len(text.encode("utf-8", "replace")) for text in batch)
            counts.update(label for label, _ in answers)
            for text, (label, score) in zip(batch, answers, strict=True):
                if out:
                    out.write(json.dumps({"text": text, "label": label, "score": score},
                                         ensure_ascii=False) + "\n")
                else:
                    print(f"{label}\t{score:.6f}\t{' '.join(text.split())[:60]}")
    print(f"{sum(counts.values()):,} texts: {dict(counts.most_common())} | "
          f"{n_bytes / 1e6 / max(seconds, 1e-9):.2f} MB/s", file=sys.stderr)


def dedup(args):
    """Drops lines that occur more than once, or all but one of near-duplicate documents."""
    files = bpe.list_files(args.input)
    started = time.perf_counter()
    if args.how == "lines":
        report = exact_line_deduplication(files, args.out_dir, args.memory_mb)
        print(f"{report['kept']:,} of {report['lines']:,} lines kept, {report['kept_bytes']:,} of "
              f"{report['bytes']:,} bytes | {time.perf_counter() - started:.1f} s")
        return
    report = minhash_deduplication(
        files, args.num_hashes, args.num_bands, args.ngrams, args.jaccard_threshold, args.out_dir,
        args.num_workers, args.memory_mb, args.work_dir, progress=True)
    if args.report:
        names = ("dropped", "at", "kept", "kept_at")
        bpe.write_atomically(args.report, "".join(
            json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in report["duplicates"]
        ).encode())
    seconds = time.perf_counter() - started
    print(f"{report['kept']:,} of {report['documents']:,} documents kept, {report['clusters']:,} "
          f"clusters | {report['documents'] / seconds:,.0f} documents/s | {seconds:.1f} s")


def bench_texts(count, words, seed=0):
    """Returns random texts of words as frequent as in real ones: the n-th in 1 / n of places."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = ["".join(letters[(rng.random(rng.integers(2, 11)) ** 2 * 26).astype(int)])
                  for _ in range(30_000)]
    ranks = np.exp(rng.random((count, words)) * math.log(len(vocabulary))).astype(int)
    return [" ".join(map(vocabulary.__getitem__, row)) for row in ranks]


def bench(args):
    """Times what is written here, on random texts: language, models, lines, signatures."""
    texts = bench_texts(args.documents, 1261)
    n_bytes = sum(map(len, texts))
    model, _ = train_fasttext(texts[:20], ["a", "b"] * 10, dim=16, word_ngrams=1, minn=2, maxn=4)
    assert model.predict(texts[:5]) == [model.predict([text])[0] for text in texts[:5]]
    minhash = MinHash(128, 16)
    a, b = (minhash.shingle_set(text) for text in texts[:2])
    x = [int(s) >> 32 for s in a]
    assert minhash.signature(a).tolist() == [
        min((int(f) * v + int(o)) % 2**32 for v in x)
        for f, o in zip(minhash.factors[:, 0], minhash.offsets[:, 0], strict=True)]
    assert jaccard(a, b) == len(set(a) & set(b)) / len(set(a) | set(b))
    jobs = {"fasttext_mb_s": lambda: model.predict(texts),
            "language_mb_s": lambda: [identify_by_rules(text) for text in texts],
            "word_list_mb_s": lambda: [word_list_score(text, TOXIC_WORDS) for text in texts],
            "minhash_documents_s": lambda: [minhash.keys(text) for text in texts]}
    print(f"{len(texts)} texts of 1,261 words, {n_bytes / 1e6:.1f} MB, one process, "
          f"{args.repeats} repeats after one that fills caches; of CPU time")
    result = {}
    for name, job in jobs.items():
        amount, times = len(texts) if name.endswith("documents_s") else n_bytes / 1e6, []
        for _ in range(args.repeats + 1):
            started = time.process_time()
            job()
            times.append(time.process_time() - started)
        rates = sorted(amount / t for t in times[1:])
        result[name] = round(float(np.median(rates)), 2)
        print(f"{name:<22}{result[name]:>10,.2f}  ({rates[0]:,.2f} to {rates[-1]:,.2f}, first "
              f"{amount / times[0]:,.2f})")
    print(json.dumps(result))


TRAINING = {"dim": 50, "epoch": 5, "lr": 0.1, "word_ngrams": 2, "bucket": 200_000, "minn": 0,
            "maxn": 0, "min_count": 1}


def build_parser():
    parser = argparse.ArgumentParser(prog="data_filter.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_run_flags(verbs.add_parser("run", help="WARC or WET files to clean text and tokens"))
    verb = verbs.add_parser("extract", help="the text of HTML or WARC files")
    verb.add_argument("--input", nargs="+", required=True)
    verb.add_argument("--mode", choices=("plain", "main"), default="plain")
    verb.set_defaults(function=extract)
    verb = verbs.add_parser("inspect", help="kept and dropped documents of a run")
    verb.add_argument("--out_dir", default="clean")
    verb.add_argument("--kept", type=int, default=5)
    verb.add_argument("--dropped", type=int, default=5)
    verb.add_argument("--reason", help="only documents dropped for a reason with these words")
    verb.add_argument("--chars", type=int, default=600, help="shown of each document")
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(function=inspect)
    verb = verbs.add_parser("classify", help=classify.__doc__)
    add_classify_flags(verb.add_argument)
    verb.set_defaults(function=classify)
    verb = verbs.add_parser("dedup", help=dedup.__doc__)
    add_dedup_flags(verb.add_argument)
    verb.set_defaults(function=dedup)
    verb = verbs.add_parser("bench", help=bench.__doc__)
    verb.add_argument("--documents", type=int, default=300)
    verb.add_argument("--repeats", type=int, default=5)
    verb.set_defaults(function=bench)
    return parser


def add_classify_flags(add):
    add("--kind", choices=CLASSIFIERS, default="quality", help="what to tell, where --model is not given")
    add("--model", help="a .bin or .ftz file; with --train the .bin to write")
    add("--text", help="one text to label")
    add("--input", nargs="+", help="files of texts: .jsonl(.gz) with \"text\", else a line each")
    add("--out", help="a .jsonl of texts, labels and scores, instead of the screen")
    add("--train", nargs=2, metavar=("POSITIVE", "NEGATIVE"), help="files of texts of two labels")
    add("--labels", nargs=2, default=["wiki", "cc"], help="of the two files")
    add("--cased", action="store_true", help="do not lower-case texts when training")
    add("--seed", type=int, default=0)
    for name, default in TRAINING.items():
        add(f"--{name}", type=type(default), default=default, help="of training")


def add_dedup_flags(add):
    add("--input", nargs="+", required=True, help="files and folders; each file is a document, "
        "but each line of a .jsonl")
    add("--out_dir", required=True)
    add("--how", choices=("minhash", "lines"), default="minhash")
    add("--num_hashes", type=int, default=128)
    add("--num_bands", type=int, default=16)
    add("--ngrams", type=int, default=5, help="words in a shingle")
    add("--jaccard_threshold", type=float, default=0.8)
    add("--report", help="a .jsonl of what was dropped for what")
    add("--work_dir", help="keep signatures here; the same command goes on from them")
    add("--memory_mb", type=int, default=1024, help="to sort in")
    add("--num_workers", type=int, default=bpe.default_workers(None))


def add_run_flags(verb):
    flag = verb.add_argument
    flag("--input", nargs="+", required=True,
         help="files, patterns, folders, addresses, or lists of paths (wet.paths.gz)")
    flag("--out_dir", default="clean")
    flag("--mode", choices=("main", "plain"), default="main", help="what is taken of a page")
    flag("--languages", default="en", help="codes to keep, with commas, or any")
    flag("--language_model", help="a fastText file, lid.176.bin or .ftz")
    flag("--language_score", type=float, default=0.5)
    flag("--rules", default="gopher", help=f"of {', '.join(RULES)}, with commas, or none")
    flag("--threshold", nargs="*", default=[], help="like word_count.low=30")
    flag("--no_harm", action="store_true", help="keep NSFW and toxic text")
    flag("--nsfw_model", help="a fastText file")
    flag("--toxic_model", help="a fastText file")
    flag("--harm_score", type=float, default=0.5)
    flag("--quality_model", help="a fastText file, as classify --train makes")
    flag("--quality_label", default="wiki", help="the model's label of good text")
    flag("--quality_score", type=float, default=0.5)
    flag("--no_pii", action="store_true", help="leave personal data as it is")
    flag("--blocklist", help="a file of hosts and addresses to drop")
    flag("--no_line_dedup", action="store_true")
    flag("--no_copies", action="store_true")
    flag("--num_hashes", type=int, default=128)
    flag("--num_bands", type=int, default=16)
    flag("--ngrams", type=int, default=5, help="words of a shingle")
    flag("--jaccard_threshold", type=float, default=0.8)
    flag("--decontaminate", help="a validation text: documents that share words with it fall")
    flag("--decontaminate_ngram", type=int, default=13)
    flag("--tokenizer", help="a tokenizer.json or its folder; without, one is trained")
    flag("--vocab_size", type=int, default=8192, help="of the tokenizer that is trained")
    flag("--num_workers", type=int)
    flag("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    verb.set_defaults(function=run)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return args.function(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data_filter.py: error: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, "data_filter.py: interrupted; the same command goes on\n")


if __name__ == "__main__":
    sys.exit(main())
