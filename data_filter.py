"""Common Crawl to training tokens: WARC or WET files in, clean text and token files out.

    python data_filter.py run --input 'CC-*.warc.gz' --out_dir clean  # clean/clean.txt, tokens.bin
    python data_filter.py inspect --out_dir clean                     # kept and dropped, and why
    python data_filter.py extract --input page.html --mode main       # the text of one page
    python data_filter.py classify --kind language --text "Wo ist der Bahnhof?"  # de 0.99
    python data_filter.py classify --train good.jsonl bad.jsonl --model quality.bin  # its AUC
    python data_filter.py dedup --input texts/ --out_dir unique       # one of near duplicates stays

A run reads records, makes text of pages, judges each document (address, language, rules, harm,
quality), masks personal data, then over all documents drops repeated lines and near copies, and
writes text, tokens, report.json and a table whose sums close. Killed at any moment, the same
command goes on; its output is that of an undisturbed run. No model file is needed, and no network.

Sources:
    [1] ISO 28500, the WARC format, versions 1.0 and 1.1
    [2] Stanford CS336, assignment 4 (data), 2025
    [3] Rae et al. 2021, Scaling Language Models (Gopher), appendix A1.1
    [4] Raffel et al. 2020, Exploring the Limits of Transfer Learning (C4), section 2.2, and the
        thresholds of its code, tensorflow_datasets/text/c4_utils.py
    [5] WHATWG Encoding Standard and HTML Standard
    [6] Penedo et al. 2024, The FineWeb Datasets, section 3.6
    [7] Foley 2025, WCXB, web content extraction pages with labels, CC-BY-4.0
    [8] Joulin et al. 2016, Bag of Tricks for Efficient Text Classification; the files and hashes
        of fastText 1142dc4
    [9] Broder 1997, On the resemblance and containment of documents
    [10] Dietzfelbinger et al. 1997, A reliable randomized algorithm for the closest-pair problem:
        multiply-shift hashing
    [11] Soldaini et al. 2024, Dolma: labels and thresholds of its classifiers
"""

import argparse
import codecs
import filecmp
import glob
import gzip
import hashlib
import heapq
import json
import math
import mmap
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
import threading
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from html import unescape as html_unescape
from itertools import chain, compress, groupby, islice, pairwise
from pathlib import Path

import numpy as np
import regex

import bpe

# ---------------------------------------------------------------- stage 1: records

MAX_RECORD = 64 << 20  # bytes of a record that are held; larger ones are skipped, and counted
MAX_BODY = 16 << 20  # bytes of a page after its content encoding is undone
MAX_HEAD = 1 << 16  # bytes of a record's header, and of a page's
MAX_CHUNKS = 1 << 18  # of a page; one of more, byte by byte, would take seconds
INFLATE_BYTES = 1 << 16  # of compressed data given to zlib at once: what it leaves over is copied
WARC_HEAD = re.compile(rb"WARC/\d+\.\d+\r?\n")
WARC_FIELD = re.compile(rb"^(WARC-Type|WARC-Target-URI|Content-Type|Content-Length)[ \t]*:[ \t]*"
                        rb"(?:\r?\n[ \t]+)?([^\r\n]*)", re.I | re.M)
HTTP_FIELD = re.compile(rb"^(Content-Type|Content-Encoding|Transfer-Encoding)[ \t]*:[ \t]*"
                        rb"([^\r\n]*)", re.I | re.M)
CONTENT_LENGTH = re.compile(rb"^Content-Length[ \t]*:[ \t]*(\d{1,18})\s*$", re.I | re.M)
EMPTY_LINE = re.compile(rb"\n\r?\n")  # the first ends a header, whatever ends its other lines
LINE_ENDS, GZIP_MAGIC = re.compile(rb"[\r\n]+"), b"\x1f\x8b\x08"
DOCUMENT_KINDS = (b"response", b"conversion", b"resource")


@dataclass(slots=True)
class Record:
    """One document of an archive, or what is wrong with it."""

    place: tuple  # (offset of its gzip member or of itself, its number there): to go on after it
    kind: str = ""  # "response", "conversion", ...
    url: str = ""
    content_type: str = ""
    data: bytes = b""
    problem: str | None = None  # why there is no data


class Member:
    """The bytes of a gzip member, inflated as they are asked for, or of a file that is plain."""

    def __init__(self, data, offset, packed=True):
        self.data, self.end, self.problem = data, offset, None  # end: of what has been inflated
        self.held, self.at = (b"", 0) if packed else (data, offset)
        self.inflater = zlib.decompressobj(31) if packed else None  # None: all is held

    def ahead(self, size):
        """Returns whether `size` bytes are held from `at` on, or as many of them as there are."""
        pieces, found = [self.held], len(self.held) - self.at
        while found < size and self.inflater:
            window = self.data[self.end:self.end + INFLATE_BYTES]
            try:
                pieces.append(self.inflater.decompress(window, MAX_RECORD))
            except zlib.error:
                self.inflater, self.problem = None, "broken gzip member"
                break
            found += len(pieces[-1])
            left = self.inflater.unused_data or self.inflater.unconsumed_tail
            self.end += len(window) - len(left)
            if self.inflater.eof:
                self.inflater = None
            elif not window:
                self.inflater, self.problem = None, "truncated gzip member"
        if len(pieces) > 1:
            self.held, self.at = b"".join(pieces)[self.at:], 0
        return found >= size

    def skip(self, size):
        while size > 0 and self.ahead(1):
            step = min(size, len(self.held) - self.at)
            self.at, size = self.at + step, size - step

    def skip_to_record(self, start):
        """Goes to the next line from held[start] on that begins a record, or to the end."""
        while (found := self.held.find(b"\nWARC/", start)) < 0:
            self.at = max(start, len(self.held) - 5)  # where one may have begun
            if not self.ahead(6):
                self.at = len(self.held)
                return
            start = self.at
        self.at = found + 1


def next_member(data, offset):
    """Returns the offset of the next gzip member that holds a WARC record, or the file's end."""
    while (offset := data.find(GZIP_MAGIC, offset)) >= 0:
        try:
            start = zlib.decompressobj(31).decompress(data[offset:offset + 512], 64)
            if start.lstrip(b"\r\n").startswith(b"WARC/"):
                return offset
        except zlib.error:
            pass
        offset += 1
    return len(data)


def next_record(member):
    """Returns (header, body, problem) of a Member's next record, or None at its end."""
    while member.ahead(1) and (ends := LINE_ENDS.match(member.held, member.at)):
        member.at = ends.end()
    if member.at == len(member.held):
        return None
    member.ahead(MAX_HEAD)
    held, at = member.held, member.at
    gap = WARC_HEAD.match(held, at) and EMPTY_LINE.search(held, at, at + MAX_HEAD)
    length = gap and CONTENT_LENGTH.search(held, at, gap.start())
    if not length:
        member.skip_to_record(at + 1)
        return b"", b"", "no content length" if gap else "no record header"
    header, size = held[at:gap.start()], int(length[1])
    member.at = gap.end()
    if not member.ahead(min(size, MAX_RECORD) if member.inflater else size):
        member.skip_to_record(member.at)
        return header, b"", "truncated record"
    if size > MAX_RECORD:
        member.skip(size)
        return header, b"", "record too large"
    start, member.at = member.at, member.at + size
    return header, member.held[start:member.at], None


def raw_records(data, place=(0, 0)):
    """Yields (place, header, body bytes, problem) of every record of a WARC file's bytes.

    data: bytes or mmap, plain or gzip, with one record a member (as archives are written) or all
    in one; place: where to go on, as read_records gives it
    """
    offset, done = place
    if data[:3] != GZIP_MAGIC:
        member = Member(data, offset, packed=False)
        while record := next_record(member):
            yield (member.at, 0), *record
        return
    while offset < len(data):
        member, number, named = Member(data, offset), 0, False
        while record := next_record(member):
            header, body, problem = record
            if problem and member.problem and not named:  # the record that the break cuts names it
                problem, named = member.problem, True
            number += 1
            if number > done:
                yield (offset, number), header, body, problem
        if member.problem and not named and number >= done:
            yield (offset, number + 1), b"", b"", member.problem
        offset, done = next_member(data, offset + 1) if member.problem else member.end, 0


def undo_chunks(body):
    """Returns the body of a chunked HTTP message, or None if it is not one."""
    parts, at = [], 0
    while len(parts) < MAX_CHUNKS:
        end = body.find(b"\r\n", at, at + 100)
        size = body[at:end].split(b";")[0].strip()
        if end < 0 or not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
            return b"".join(parts) if parts else None  # cut by the crawler after some chunks
        size = int(size, 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2:end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)


def undo_encoding(body, encoding):
    """Returns (bytes, problem) of a body whose Content-Encoding is undone, up to MAX_BODY."""
    encoding = encoding.lower().strip()
    if body[:3] == GZIP_MAGIC:  # whatever the header says: the page is in it
        return inflate(body)
    if encoding in ("", "identity", "none", "utf-8") or encoding.startswith("text/"):
        return body, None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return b"", f"content encoding {encoding[:20]}"
    for bits in (15, -15) if encoding == "deflate" else ():
        with suppress(zlib.error):
            return zlib.decompressobj(bits).decompress(body, MAX_BODY), None
    return body, None  # some crawlers decode the body and keep the header


def inflate(body):
    """Returns (bytes, problem) of a gzip body, all its members (up to 100), up to MAX_BODY."""
    whole, at, member = b"", 0, None
    for _ in range(100):
        if len(whole) >= MAX_BODY or body[at:at + 3] != GZIP_MAGIC:
            break
        member = Member(body, at)
        member.ahead(MAX_BODY - len(whole))
        whole, at = whole + member.held, member.end if not member.problem else len(body)
    if whole[:3] == GZIP_MAGIC or not whole and member.problem:
        return b"", "broken content encoding"
    return whole[:MAX_BODY], None


def read_http(record):
    """Takes the HTTP header off a record's data: its status, type and encodings."""
    head, body = record.data[:MAX_HEAD], b""
    if gap := EMPTY_LINE.search(head):
        head, body = head[:gap.start()], record.data[gap.end():]
    head = re.sub(rb"\r?\n[ \t]+", b" ", head)  # fields that go on in the next line
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
        return not record.data[:8].startswith((b"%PDF", b"\x89PNG", b"GIF8", b"\xff\xd8", b"PK"))
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
    start = bytes(data[:64])
    if start[:3] == GZIP_MAGIC:
        with suppress(zlib.error):
            start = zlib.decompressobj(31).decompress(data[:4096], 64)
        if start[:3] == GZIP_MAGIC or not start.strip(b"\r\n"):  # broken, or empty
            start = b"WARC/" if next_member(data, 1) < len(data) else start
    if not start.lstrip(b"\r\n").startswith(b"WARC/"):
        raise ValueError(f"an input must be a WARC or WET file, got {path}, which starts with "
                         f"{start[:8]!r}; give the files that Common Crawl calls warc or wet, or "
                         "leave this one out")


def make_record(place, kind, fields, body, problem):
    """Returns the Record of one document, its HTTP header and encodings undone."""
    url = fields.get(b"warc-target-uri", b"").decode("utf-8", "replace").strip("<> \r")
    record = Record(place, kind.decode("latin-1"), url, "", body, problem)
    if problem:
        record.data = b""
        return record
    kind_of_content = fields.get(b"content-type", b"").decode("latin-1")
    if kind == b"response" and kind_of_content.lower().startswith("application/http"):
        read_http(record)
    else:
        record.content_type = kind_of_content
    if kind != b"conversion" and not record.problem and not is_text(record):
        record.problem = "content type"
    if not record.problem and not record.data.strip():
        record.problem = "empty"
    return record


# ---------------------------------------------------------------- stage 2: bytes to text

# The WHATWG Encoding Standard [5] reads these labels as what includes them, or what they come to.
ENCODING_NAMES = {
    "iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874",
    "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932",
    "euc_kr": "cp949", "big5": "big5hkscs", "utf-16": "utf-16-le",
}
# Labels of the Standard that Python does not know.
OTHER_CHARSETS = {"cp31j": "cp932", "dos-874": "cp874", "gb_2312-80": "gbk",
                  "ks_c_5601-1989": "cp949", "koi8-ru": "koi8-u", "mac-ukrainian": "mac-cyrillic"}
# How names of encodings of text start; Python has others, punycode among them.
TEXT_ENCODINGS = ("utf-8", "utf-16", "cp", "gb18030", "big5", "euc_", "iso", "koi8", "mac")
BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
META_CHARSET = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
XML_CHARSET = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]+)", re.I)
COMMENT = re.compile(rb"<!--.*?-->", re.S)
HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
META_BYTES = 4096  # where a meta tag is looked for; browsers look at 1,024
NEARLY = 1e-3  # share of the bytes that may be wrong in what is still taken for UTF-8
# Characters that each encoding's languages use, the most used before a space: read by a wrong one,
# the same bytes are other characters.
TWO_BYTES = ("euc_jp", "cp932", "cp949", "gb18030", "big5hkscs")
LATIN = ("cp1250", "cp1252", "cp1254")
KANA = "、。" + "".join(map(chr, range(0x3041, 0x30fd)))
HAN = "，。、的一不在人有我他中大上到子和你地出道也年日要以會会個个國国這这來来時时說说們们為为了是"
CYRILLIC = "оеаинтсрвлкм дпуяыьгзбчйхжшюцщэфё"
DETECTED = {
    "euc_jp": KANA, "cp932": KANA, "gb18030": HAN, "big5hkscs": HAN,
    "cp949": "이다의는에을가를한고지로하사은도기으서어자대시인리해있스아나그정수보일부라것상전제구"
             "장만과주니들마면여와게습성원했",
    "cp1251": CYRILLIC, "koi8-r": CYRILLIC, "cp1252": "éàèäöüçñáíóúãåøòùì êæõâîôûßëïÉ",
    "cp1250": "áéíóúěščřžýůąęłśż ńźőűöüă",
    "cp1253": "αοιετσνηυρπκ μλωςγδθάέήίόύώ", "cp1255": "יוהלאתרבמשנכ דעחקפגטזסצםןךףץ",
    "cp1256": "اليمونرتبةعد سفهكقحجشطصخأإ", "cp1254": "ıışğüöçİŞĞÜÖÇ",
    "cp874": "านรอกเงมยลวด ทสตะปบคหแจพชขใไโผ",
}


def python_encoding(label):
    """Returns Python's name for a charset label of the web, or None if it is not a text's."""
    label = label.strip().strip("\"'").lower().removeprefix("x-").removesuffix("-i")
    label = re.sub(r"^windows-(?=\d)", "cp", re.sub(r"^iso8859(?=\d)", "iso8859-", label))
    label = "utf-8" if label.endswith("utf-8") else OTHER_CHARSETS.get(label, label)
    try:
        name = codecs.lookup(label).name
    except (LookupError, ValueError):
        return None
    name = ENCODING_NAMES.get(name, name)
    return name if name.startswith(TEXT_ENCODINGS) else None


def decode_leniently(data, encoding):
    """Returns the text, or None if more than NEARLY of the bytes are wrong in this encoding."""
    text = data.decode(encoding, "replace")
    if not (wrong := text.count("\ufffd")) or encoding.startswith("cp12"):
        return text
    right = len(text) - wrong - len(text.encode("ascii", "ignore"))  # of what is beyond ASCII
    return text if wrong <= min(max(1, NEARLY * len(data)), right) else None


def many_zeros(sample):
    """Returns whether bytes are UTF-16's, in which ASCII is UTF-8 too, if one does not look."""
    return sample.count(0) > len(sample) // 8


def detect_encoding(data):
    """Returns the likely encoding of bytes that declare none and are no UTF-8."""
    sample = data[:1 << 16]
    if many_zeros(sample):
        return "utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", sample)]
    # Letters beyond ASCII stand alone in Latin words, and side by side in those of other scripts.
    latin = runs.count(1) > 0.5 * sum(runs)
    best, best_score = "cp1252", 0.25
    for encoding, characters in DETECTED.items():
        wide = Counter(sample.decode(encoding, "replace"))
        wide = {c: n for c, n in wide.items() if c >= "\x80" and c not in "\xa0–’“”"}
        total, wrong = max(sum(wide.values()), 1), wide.get("\ufffd", 0)
        most_used, _, used = characters.partition(" ")
        score = sum(n * ((c in most_used) + (c in used) / 3) for c, n in wide.items()) / total
        if encoding in TWO_BYTES:
            score *= 2 * total > 0.9 * sum(runs) and wrong <= 0.01 * total + 1
        elif latin != (encoding in LATIN):
            continue
        if characters is HAN:
            score *= 2  # a quarter of a text or more is of these few
        if score > best_score + 0.02:
            best, best_score = encoding, score
    return best


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
    head = COMMENT.sub(b"", data[:META_BYTES])
    declared += [found[1].decode("ascii", "replace") for found in
                 (META_CHARSET.search(head), XML_CHARSET.match(head)) if found]
    for label in declared:
        encoding = python_encoding(label)
        if encoding and encoding.startswith("utf-16") and data[:64].count(0) < 8:
            encoding = "utf-8"  # a meta tag that can be read as ASCII cannot be right about it
        if encoding and (text := decode_leniently(data, encoding)) is not None:
            return text, encoding
    if not many_zeros(data[:1 << 16]) and (text := decode_leniently(data, "utf-8")) is not None:
        return text, "utf-8"
    encoding = detect_encoding(data)
    return data.decode(encoding, "replace"), encoding


# ---------------------------------------------------------------- stage 2: HTML to blocks

MAX_HTML_CHARS = 4 << 20  # of a page; Common Crawl itself cuts pages at 1 MiB, since 2025 5 MiB
MAX_DEPTH = 256  # of open elements; deeper ones lie flat in it
MAX_TAGS = 200_000  # of a page that are read
PAGE_SECONDS = 1.2  # after which a page is cut where it has been read to
UNSEEN = re.compile(r"<!--(?:>|->|.*?(?:--!?>|\Z))|<(?:script\b(?:[^<>]*+(?<=/)>(?=\s*<)|.*?"
                    r"(?:</script\s*>|\Z))|style\b.*?(?:</style\s*>|\Z)|[!?][^<>]*>)", re.I | re.S)
# What XML ends in its own start tag, <svg/>, holds nothing: neither here nor, of scripts, above.
HELD = {name: re.compile(rf"<{name}\b[^<>]*+(?<!/)>.*?</{name}\s*>", re.I | re.S)
        for name in ("svg", "noscript", "template", "iframe", "select", "textarea", "head")}
END_OF_TAG = re.compile(r"\s*>")
# No quantifier here can be left by two ways, and none runs on past a `<`, but for a kilobyte in
# quotes: the time stays linear in the size of the page, whatever is in it.
TAG = re.compile(r"""<(/?[a-zA-Z][^\s<>/]*+)((?:[^<>"']++|"[^"<>]*+"|'[^'<>]*+'|"[^"]{0,1000}+\""""
                 r"""|'[^']{0,1000}+'|["']){0,400}+)>""")
ATTRIBUTE = re.compile(r"""(class|id|role|itemprop|style|hidden|aria-hidden)(?:\s*=\s*("[^"]*+"|"""
                       r"""'[^']*+'|[^\s"'>]++))?""", re.I)
ALT = re.compile(r"""\balt\s*=\s*("[^"]*"|'[^']*')""", re.I)
LONG_ENTITY = re.compile(r"&#\d{100,};?")
WORD_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")

INLINE, BLOCK, PARAGRAPH, SKIP, LINK, BREAK, LIST, ITEM, CELL, ROW, IMAGE, PRE, RULE = range(13)
KIND_NAMES = {
    BLOCK: "div section article main aside nav header footer body html form fieldset blockquote "
           "center dl dt dd figure figcaption address details summary table thead tbody tfoot "
           "caption dir menu hgroup label legend dialog",
    PARAGRAPH: "p h1 h2 h3 h4 h5 h6", LINK: "a", BREAK: "br", LIST: "ul ol", ITEM: "li",
    CELL: "td th", ROW: "tr", IMAGE: "img", PRE: "pre", RULE: "hr",
    SKIP: "script style select option textarea button datalist object embed canvas video audio map "
          "applet noframes iframe svg noscript template title math",
}
KINDS = {name: kind for kind, names in KIND_NAMES.items() for name in names.split()}
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
WORD_GROUPS = {word: GROUPS[name] for name, words in GROUP_WORDS.items() for word in words.split()}
BIT_TAGS = ("nav", "footer", "header", "aside", "form", "main", "article", "figure")
TAG_BITS = {name: 1 << (len(GROUPS) + bit) for bit, name in enumerate(BIT_TAGS)}
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


def end_of_last(html, name):
    """Returns where the last whole end tag of a name ends, or 0."""
    last = 0
    for start in (f"</{name}", f"</{name.upper()}"):
        at = len(html)
        while (at := html.rfind(start, last, at)) >= 0:
            if whole := END_OF_TAG.match(html, at + len(start)):
                last = whole.end()
                break
    return last


def strip_unseen(html):
    """Returns the page without comments, scripts, styles and other parts that no reader sees."""
    html = UNSEEN.sub(" ", html[:MAX_HTML_CHARS])
    for name, pattern in HELD.items():
        if end := end_of_last(html, name):
            # up to the last end tag each start tag has one: no search runs to the end in vain
            html = pattern.sub(" ", html[:end]) + html[end:]
    return html


def unescape(text):
    """Returns text with its entities as characters."""
    try:
        return html_unescape(text)
    except ValueError:  # a number with more digits than int() takes
        return html_unescape(LONG_ENTITY.sub("\ufffd", text))


class Page:
    """The blocks of a page's text, in order, and the elements that they lie in.

    texts, separators (before each: newlines or tabs), prefixes (indent and bullet), links
    (characters that are in links), nodes (the element of each block): lists of equal length.
    parents, names, own (bits of GROUPS): one entry an element, root first. forum: see is_forum.
    """

    def __init__(self):
        self.texts, self.separators, self.prefixes, self.links, self.nodes = [], [], [], [], []
        self.parents, self.names, self.own, self.forum = [0], ["html"], [0], False
        self.stack, self.node, self.too_deep = [("html", 0)], 0, 0  # open elements
        self.parts, self.link_chars, self.link_depth = [], 0, 0  # of the block that is growing
        self.newlines, self.preformatted, self.lists = 0, 0, []
        self.bullet, self.cell, self.row_has_text = "", False, False

    def end_line(self, newlines):
        """Ends the block that is growing, if it has text; the next is so many lines below."""
        if self.parts:
            text = "".join(self.parts)
            self.parts.clear()
            if "&" in text:
                text = unescape(text)
            text = text.strip("\r\n") if self.preformatted else " ".join(text.split())
            if text and not text.isspace():
                indent = "  " * (min(len(self.lists), 8) + (not self.bullet and bool(self.lists)))
                self.texts.append(text)
                self.separators.append(
                    "\t\t" if self.cell else "\n\n" if self.newlines > 1 else "\n")
                self.prefixes.append("" if self.cell and not self.bullet else indent + self.bullet)
                self.links.append(self.link_chars)
                self.nodes.append(self.node)
                self.newlines, self.bullet, self.cell = 0, "", False
            self.link_chars = 0
        self.newlines = max(self.newlines, newlines)

    def leave(self, index):
        """Closes the open elements from stack[index] on."""
        for name, _ in self.stack[index:]:
            if name in ("ul", "ol") and self.lists:
                self.lists.pop()
            elif name == "pre":
                self.preformatted -= 1
        del self.stack[index:]
        self.node = self.stack[-1][1]
        self.link_depth = 0 if self.link_depth > index else self.link_depth

    def close(self, name, kind):
        """Closes an element by its end tag, and those in it that have none."""
        if self.too_deep:
            self.too_deep -= 1
        else:
            for index in range(len(self.stack) - 1, 0, -1):
                if self.stack[index][0] == name:
                    self.leave(index)
                if self.stack[index:index + 1] == [] or name == "p":
                    break
        if kind in (ROW, BLOCK):
            self.row_has_text = self.cell = False

    def close_before(self, name):
        """Closes what a start tag closes: the item before it, a paragraph that cannot hold it."""
        if name not in CLOSED_BY:
            if self.stack[-1][0] == "p":
                self.leave(len(self.stack) - 1)
            return
        wanted, fences = CLOSED_BY[name]
        for index in range(len(self.stack) - 1, max(0, len(self.stack) - 8), -1):
            if self.stack[index][0] in (wanted, name):
                self.leave(index)
                break
            if name == "p" or self.stack[index][0] in fences:
                break

    def open(self, name, attributes, kind):
        self.close_before(name)
        if len(self.stack) >= MAX_DEPTH:
            self.too_deep += 1
            return
        own = attribute_groups(attributes) if attributes else 0
        self.own.append(own)
        self.parents.append(self.node)
        self.names.append(name)
        self.node = len(self.names) - 1
        self.stack.append((name, self.node))
        if kind == LIST:
            self.lists.append(0 if name == "ol" else None)
        elif kind == ITEM and self.lists and self.lists[-1] is not None:
            self.lists[-1] += 1
            self.bullet = f"{self.lists[-1]}. "
        elif kind == ITEM:
            self.bullet = "• "
        elif kind == CELL:
            self.cell, self.row_has_text = self.row_has_text, True
        elif kind == ROW:
            self.row_has_text = self.cell = False
        elif kind == PRE:
            self.preformatted += 1


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
    parts, skipped = page.parts, ""
    for count, (text, name, attributes) in enumerate(zip(
            pieces[0::3], [*pieces[1::3], "br"], [*pieces[2::3], ""], strict=True)):
        closing = name[0] == "/"
        if closing:
            name = name[1:]
        kind = KINDS.get(name)
        if kind is None:
            name = name.lower()
            kind = KINDS.get(name, BLOCK if "-" in name else INLINE)
        if skipped:
            if not closing or name != skipped and kind not in (BLOCK, PARAGRAPH):
                continue
            text, skipped = "", ""  # at its end tag, or at one that shows it was never closed
        if text and (parts or page.preformatted or not text.isspace()):
            parts.append(text)
            if page.link_depth:
                page.link_chars += len(" ".join(text.split()))
        if kind == INLINE:
            continue
        if kind == LINK:
            page.link_depth = 0 if closing else len(page.stack)
        elif kind == IMAGE:
            if alt_texts and (found := ALT.search(attributes)):
                parts.append(f" {found[1][1:-1]} ")
        elif kind == SKIP:
            if not closing and attributes[-1:] != "/" and name not in ("embed", "option"):
                skipped = name
        elif kind == BREAK and page.preformatted:
            parts.append("\n")
        elif kind == BREAK:
            page.end_line(1 if parts else page.newlines + 1)
        else:
            page.end_line(2 if kind == PARAGRAPH else 1)
            if closing:
                page.close(name, kind)
            elif kind != RULE and not (attributes[-1:] == "/" and "-" in name):
                page.open(name, attributes, kind)
        if not count & 4095 and time.perf_counter() > deadline:
            break
    page.end_line(0)
    return page


def read_page(html, alt_texts=True):
    """Returns the Page of an HTML text, with its <noscript> where a script would have made it."""
    page = parse_html(html, alt_texts)
    if (size := sum(map(len, page.texts))) < 500 and "<noscript" in html:
        whole = parse_html(re.sub(r"<(/?)noscript\b", r"<\1div", html), alt_texts)
        if sum(map(len, whole.texts)) > 2 * size:
            page = whole
    page.forum = is_forum(html)
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


# ---------------------------------------------------------------- stage 2: main content

MAX_BLOCKS = 20_000  # of a page that are judged; what follows is dropped in mode "main"
WORD = re.compile(r"\w+")
HEAD_CHARS = 1 << 14  # of a page, within which it names its software
FORUM_MARKS = ("DiscussionForumPosting", "QAPage", 'class="question-page')
FORUM_SOFTWARE = re.compile(r'generator"?[^<>]{0,20}?(?:phpBB|vBulletin|Discourse|XenForo|MyBB|SMF|'
                            r'Invision|Flarum|NodeBB)|id="(?:phpbb|XF|vbulletin)')
ARTICLE_BODY = re.compile(r'"articleBody"\s*:\s*"((?:[^"\\]|\\.){0,400000}+)"')
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half of a pair, which JSON can hold and text cannot
NOT_CONTENT = ("<nav>", "<footer>", "side", "comment", "share", "related", "ads", "cookie")
ALL_BITS = GROUPS | {f"<{name}>": bit for name, bit in TAG_BITS.items()}
IN_ELEMENTS = ("<nav>", "<footer>", "<header>", "<form>", "<figure>", "cookie", "hidden", "side",
               "comment")
HEADINGS, CELLS = ("h1", "h2", "h3", "h4"), ("td", "th")
LABELS = ("label", "legend", "summary", "figcaption", "caption")
# A line that starts so heads what follows an article: other articles, comments, subscriptions.
AFTER_ARTICLE = re.compile(
    r"you (?:may|might|could) (?:also )?(?:like|enjoy|be interested)|related|recommended|popular|"
    r"more (?:from|in|on|stories|articles|news|posts|great)\b|most (?:read|popular|viewed)|"
    r"trending|(?:recent|latest) (?:posts|articles|comments|news|stories|from)|"
    r"leave a (?:reply|comment)|"
    r"(?:post|add) a comment|join the (?:discussion|conversation)|\d* ?comments?\W*$|tags?:|"
    r"\d+ (?:comments|responses|replies|thoughts)|about the author|subscribe|sign up|"
    r"(?:our )?newsletter|filed under|posted in|categories|testimonials?|follow (?:us|me)|"
    r"read (?:next|more)|up next|(?:next|previous) (?:post|article|up)|what[’']s next|"
    r"(?:other|similar) (?:articles|posts|stories)|don[’']t miss|editor[’']?s? (?:picks|choice)|"
    r"keep reading|explore more|join (?:our|us)|stay (?:in touch|connected|informed|up)", re.I)
# What a short block with such words is for is seldom to tell something.
NO_PROSE = re.compile(
    r"©|\(c\) \d{4}|all rights reserved|privacy policy|terms of (?:use|service)|cookies?\b|captcha|"
    r"your email address will not|required fields|javascript|sign ?(?:up|in)|log ?in\b|subscri|"
    r"newsletter|unsubscribe|follow us|affiliate|commission|click here|share this|e-?mail address|"
    r"add to cart|(?:view|see|learn|load|show|read) (?:all|more)|advertis|sponsor|"
    r"min(?:ute)?s? read\b", re.I)


def is_forum(html):
    """Returns whether a page says, by a type of schema.org or its software, that it is a forum's:
    what is below its first text is no less content."""
    return any(mark in html for mark in FORUM_MARKS) or bool(
        FORUM_SOFTWARE.search(html, 0, HEAD_CHARS))


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
        text = layout(parse_html(unescape(text) if "&lt;" in text else text))
    return SURROGATE.sub("\ufffd", unescape(text))


def held_words(page, words):
    """Returns for each element how many of the words lie in it.  words: (blocks,) float"""
    total = np.bincount(page.nodes[:len(words)], words, len(page.parents)).tolist()
    for n in range(len(total) - 1, 0, -1):  # children come after their parents
        total[page.parents[n]] += total[n]
    return total


def telling_bits(page, good):
    """Returns the bits that each element has or inherits, but for what elements that hold most of
    the good words say of themselves: the classes of a <body> tell nothing of its parts."""
    held, bits = held_words(page, good), [0]
    for n in range(1, len(held)):
        own = page.own[n] if held[n] <= 0.8 * held[0] else page.own[n] & UNSEEN_BIT
        bits.append(bits[page.parents[n]] | own | TAG_BITS.get(page.names[n], 0))
    return np.array(bits)


def best_element(page, words):
    """Returns the lowest element that still holds most of the clean text: a bool per element,
    true for it and those below.  words: (blocks,) float, of clean text"""
    total, heaviest_below = held_words(page, words), {}
    for n in range(len(total) - 1, 0, -1):
        if total[n] >= total[heaviest_below.get(page.parents[n], n)]:
            heaviest_below[page.parents[n]] = n
    best = 0
    while (below := heaviest_below.get(best)) and total[below] >= 0.7 * total[best] > 0 \
            and page.names[below] not in ("p", "pre", "blockquote"):
        best = below
    inside = np.arange(len(total)) == best
    for n in range(best + 1, len(total)):
        inside[n] = inside[page.parents[n]]
    return inside


def block_features(page):
    """Returns {name: (blocks,) array}: what tells a page's main content from the rest of it."""
    B = min(len(page.texts), MAX_BLOCKS)
    texts, nodes, index = page.texts[:B], np.array(page.nodes[:B]), np.arange(B)
    words = np.array([text.count(" ") + 1 for text in texts], float)
    link = np.minimum(np.array(page.links[:B]) / np.array([len(text) for text in texts]), 1.0)
    ends = np.array([text[-1] in ".!?:\"”…»。" for text in texts])
    tags = [page.names[n] for n in page.nodes[:B]]
    good = words * (link < 0.3) * (words > 8) * (0.3 + 0.7 * ends)  # prose, more or less
    bits = telling_bits(page, good)[nodes]
    inside = {name: (bits & bit) > 0 for name, bit in ALL_BITS.items()}
    mostly = {name: good @ inside[name] > 0.5 * max(good.sum(), 1)
              for name in ("hidden", "comment", "related", "side")}
    unseen = (bits & UNSEEN_BIT) > 0
    bad = np.logical_or.reduce([unseen, *(inside[name] for name in NOT_CONTENT)])
    for name in ("comment", "related", "side"):  # where nearly all text is, there is the content
        bad &= ~(inside[name] & mostly[name])
    prose = (words > 12) & (link < 0.3) & np.array([text[-1] in ".!?" for text in texts])
    # what heads other articles or comments does so after most of the text, or under a title and
    # some paragraphs; the text that counts is above it
    h1, clean = tags.index("h1") if "h1" in tags else 0, good * ~bad
    told = np.cumsum(clean * prose)
    late = np.cumsum(clean) > 0.4 * clean.sum()
    if h1:
        late |= (told - told[h1] > 40) & (index > h1)
    heads = B if page.forum else next(
        (i for i in np.flatnonzero((words < 10) & late) if AFTER_ARTICLE.match(texts[i])), B)
    clean *= index <= heads
    in_best = best_element(page, clean)[nodes]
    best_end = np.flatnonzero(in_best)[-1] if in_best.any() else B
    looks = [(page.names[n], page.own[n], page.names[page.parents[n]], page.own[page.parents[n]])
             for n in page.nodes[:B]]
    looks_alike = Counter(looks)
    alike, often = np.log(np.array([looks_alike[look] for look in looks])), Counter(texts)
    return {f"in {name}": inside[name] for name in IN_ELEMENTS} | {
        "bias": np.ones(B), "words<3": words < 3, "ends": ends,
        "prose": prose,
        "p": [tag == "p" for tag in tags], "h3": [tag == "h3" for tag in tags],
        "heading": [tag in HEADINGS for tag in tags], "cell": [tag in CELLS for tag in tags],
        "label": [tag in LABELS for tag in tags], "unseen": unseen,
        "mostly hidden": inside["hidden"] & mostly["hidden"],
        "in best": in_best, "in best,bad": in_best & bad, "after best": index > best_end,
        "in best,link": in_best & (link > 0.9) & (words > 4),
        "link before": np.append(False, link[:-1] > 0.5),
        "good after": np.log1p(np.append(good[1:], 0)), "before h1": index < h1,
        "place>.75": np.cumsum(words) > 0.75 * words.sum(), "alike": alike,
        "alike,short": alike * (words < 6), "rich": np.full(B, np.log1p(clean.sum()) / 7),
        "after heads": index > heads, "after heads,link": (index > heads) & (link > 0.9),
        "often": np.log(np.array([often[text] for text in texts])),
        "no prose": [len(text) < 400 and bool(NO_PROSE.search(text)) for text in texts],
    }


# Log odds of a block to be main content, fitted to the development pages of [7] (word-F1 with a
# sigmoid for the threshold) with the features that told something in five-fold cross-validation;
# the last is set by hand.
WEIGHTS = {
    "bias": -0.1, "in <nav>": -1.86, "in <footer>": -2.84, "in <header>": -1.03, "in <form>": -1.72,
    "in <figure>": -2.05, "in cookie": -1.69, "in hidden": -1.18, "in side": -0.26,
    "in comment": -1.58, "words<3": 0.39, "ends": 0.1, "p": 0.91, "h3": 0.72, "heading": 0.71,
    "unseen": 0.59, "mostly hidden": 0.26, "in best": 2.15, "in best,bad": -1.59,
    "after best": -1.44, "link before": -0.82, "good after": 0.18, "before h1": -1.53,
    "place>.75": -0.82, "alike": 0.76, "alike,short": -0.3, "rich": -1.35, "after heads": -0.93,
    "no prose": -1.41, "prose": 0.32, "cell": 0.66, "label": -1.35, "in best,link": -1.32,
    "often": -0.68, "after heads,link": -9.0,
}
THRESHOLD = 0.0  # of the log odds: lower keeps more of the text, and more of what is around it


def main_content(page):
    """Returns a bool array: which blocks of a page are main content, by logistic regression."""
    if not page.texts:
        return np.zeros(0, bool)
    features = block_features(page)
    odds = np.array([*WEIGHTS.values()]) @ np.array([features[name] for name in WEIGHTS], float)
    keep = odds > THRESHOLD if odds.max() > THRESHOLD else odds == odds.max()
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
    if mode == "plain":
        return layout(parse_html(html))
    page = read_page(html, alt_texts=False)
    text, body = layout(page, main_content(page)), article_body(html)
    if len(body) > 400 and len(text) < 0.6 * len(body):  # a page that a script would have filled
        return body
    return text


def record_text(record, mode):
    """Returns the text of a Record: as it is in WET and plain text, of a page by its mode."""
    if record.kind == "conversion":
        return record.data.decode("utf-8", "replace")
    if record.content_type.lower().startswith("text/plain"):
        return decode_html(record.data, record.content_type)[0]
    return extract_text_from_html_bytes(record.data, mode, record.content_type)


# ---------------------------------------------------------------- stage 4: personal data

EMAIL_MASK, PHONE_MASK, IP_MASK = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"
EMAIL = re.compile(r"(?<![\w.+%@-])\w[\w.+%&'-]{0,63}@(?!\dx\.)"
                   r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}"
                   r"(?![\w@]|[-.]\w*@|:[\w~]+/)")
AT, PASSWORD = re.compile("@"), re.compile(r"://[^\s/]*:$")  # https://user:password@host
FILE_ENDINGS = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "xml", "html")
DASH = r"[-.\u2010-\u2013\u00a0 ]"
EXTENSION = r"(?: ?(?:x|ext\.?|extension) ?\d{1,6}\b)?"
# US and Canada: three, three and four digits; an area code starts with 2 to 9. A number without
# any separator is an identifier more often than a telephone, groups among others are a card's.
PHONE = re.compile(
    rf"(?<![\w.+#$€£&-])(?<!\d[,:/])(?<![^\W\d]/)(?<!//)(?:(?:\+1|\b(?:00)?1){DASH}?{DASH}?)?"
    rf"(?:[([] ?[2-9]\d\d ?[])]{DASH}?{DASH}?\d{{3}}{DASH}?\d{{4}}|[2-9]\d\d/\d{{3}}-\d{{4}}"
    rf"|[2-9]\d\d(?P<s>{DASH}|[ ][-.][ ])\d{{3}}(?:(?P=s)|-)\d{{4}}|(?P<bare>[2-9]\d\d\d{{7}}))"
    rf"{EXTENSION}"
    rf"(?![\w@]|[-=][\w|]|/[^\W\d]|\.(?:\d|(?-i:[a-z]))|(?<=[ \d]\d{{4}})[ ,:]\d{{4}}\b|%)", re.I)
MAYBE_PHONE = re.compile(rf"\d\d\d(?:{DASH}| [-.] )?\d\d\d\d")  # every match of the others has one
# What may stand before a number of groups that spaces part: its digits belong to no card.
PLACE_OR_IP = re.compile(r"(?:\b[A-Z]{2} \d{5}(?:-\d{4})?|\b(?i:suite|ste\.?|apt\.?|unit|room|box|"
                         r"floor|since|est\.?) \d{1,5}|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3})"
                         r"[ \u00a0]$")
ONE_BARE = re.compile(r"\s*\d{10}\s*$")
AFTER_DIGITS = re.compile(rf"\d{DASH}$")
UNIT = re.compile(r" ?(?:bytes|bits|[kmg]b|people|users|records|rows|items|units|votes|\w*seconds|"
                  r"k?m|miles|k?g|hz|usd|eur|cad|dollars|euros?|pounds|yen|yuan|rupees|pesos|francs|"
                  r"won)\b", re.I)
PLUS_PHONE = re.compile(rf"(?<![\w+])\+1{DASH}?(?:\([2-9]\d\d\)|[2-9]\d\d){DASH}?\d{{3}}{DASH}?"
                        rf"\d{{4}}{EXTENSION}(?!\w|[-.]\d)", re.I)
# Before a number: with separators it is a telephone's unless one of IDENTIFIERS says otherwise,
# without any it needs one of PHONE_WORDS or what BARE_BEFORE and BARE_AFTER say.
PHONE_WORDS = r"""(?:tele)?phone tel ph call(?:s|ed|ing)? cell mobile fax(?:ed)? contact dial
text(?:ed)? reach whatsapp sms ring toll desk office helpline hotline landline pager voicemail
message emergency (?:my|our|his|her|their|new|old)\snumber"""
IDENTIFIERS = r"""isbn isbn-1[03] issn (?<!to\s)order invoice ticket tracking serial sku part upc
asin doi barcode patent version build case ref reference transaction confirmation acct account
routing pp pages price batch docket document item model passport permit vin lot device sample
renumbered compute calculate"""
NUMBERED = IDENTIFIERS + """ id product member policy customer iban card ssn key article record
employee student user licen[sc]e pro job population zip ein npi tin vat mrn claim membership
reservation booking nhs medicare bug issue track"""  # before "number", "no." or "#"
VERSIONS = r"""versions? ver v released? build firmware revision rev sections? § art\.? sec\.?
chapter clause paragraph rule article figure table appendix item oid driver update
(?:up|down)graded? patch kernel sdk ec package assembly \w*version hotfix installer software app
model edition theorem lemma exercise step firefox chrome chromium safari opera edge sql\sserver"""
# Four numbers, the first and two others small, are a version or a section more often than an
# address, unless words nearby are of the net or what touches them is.
LOW_IP, SMALL = re.compile(r"(?!10\.)[12]?\d\.|3[01]\."), 32
KNOWN_IPS = ("0.0.0.0", "1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "4.2.2.2")
NET_WORDS = re.compile(r"""\b(?:address(?:es)?|addr|attack\w*|ban(?:ned)?|block(?:ed|ing|s)?|client|
connect\w*|curl|dest\w*|dig|dns|edit(?:s|ed)?|firewall|gateway|hosts?|inet|interface|ips?|ipv4|
IP_ADDRESS|localhost|log(?:s|ged|in|on)|machine|netmask|networks?|nodes?|nslookup|packets?|peers?|
ping|ports?|proxy|request(?:s|ed)?|resolver|router|scan(?:s|ned)?|servers?|src|source|ssh|subnet|
telnet|traceroute|traffic|users?|visit\w*|vpn|whois)(?:\b|(?=\|))""".replace("\n", ""), re.I)
FROM = re.compile(r"\b(?<!up )(?<!down )(?:from|via)\b", re.I)
NAME_BEFORE = re.compile(r"\b[A-Z]\w* $")


def said_before(words, gap):
    """Returns the pattern of one of some words just before the end of a text, but for a gap."""
    return re.compile(rf"(?<![A-Za-z])(?:{'|'.join(words.split())}){gap}$", re.I)


AFTER_IDENTIFIER = r"[ \t]*(?:number|no|id|code|#)?\.?[ \t]*(?:is|was|of)?[ \t]*[:#=-]*[ \t]*"
PHONE_CONTEXT = said_before(
    PHONE_WORDS, r"\b(?:(?!\b(?:about|regarding|quoting|with)\b)[^\n\d]){0,40}")
BARE_BEFORE = re.compile(r"\b(?:me|us|him|her|them|you|[A-Z]\w+) (?:at|on) $|\b[TPMFC][:.] ?$|"
                         r"\|\|\|[^\n\d]{0,30}$")
BARE_AFTER = re.compile(r"[ ,(-]*(?:cell|mobile|home|work|office|phone|fax|"
                        r"(?:call|text) (?:or|me)|if you|any ?time|ask for|after \d|"
                        r"(?:or |and )?\|\|\||for (?:details|info|more|help)|"
                        r"to (?:book|order|schedule|reserve|rsvp|register|speak))\b", re.I)
PHONE_FIELD = said_before(PHONE_WORDS, r"[\w-]*=")
IDENTIFIER_CONTEXT = said_before(IDENTIFIERS, AFTER_IDENTIFIER)
NUMBERED_CONTEXT = said_before(NUMBERED, r"[ \t]*(?:number|no|id|code|#)(?![A-Za-z])"
                               + AFTER_IDENTIFIER)
VERSION_CONTEXT = said_before(
    VERSIONS, r"[ \t]*(?:number|no\.?|is|to|from|was)?[ \t]*[:#=(\"']*[ \t]*")
VERSION_WORD = said_before(VERSIONS, r"\b[^\n]*")
VERSION_AFTER = re.compile(r" (?:alpha|beta|rc|releases?d?|update|upgrade|patch|build|version|"
                           r"driver|firmware|schema|for (?:windows|mac|linux|android|ios))\b", re.I)
PINNED_OR_DOI = re.compile(r"\w==$|\b10\.\d{4,9}/\S*$")
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Not after the epoch of a package's version (1:2.3.4.5), and no money (12.345.678.901,23); a port
# may follow as tcpdump writes it (10.1.1.7.443 > 10.1.1.9.80: ).
IP = re.compile(rf"(?<![A-Za-z0-9_.])(?<![A-Za-z][-_])(?<!(?<![\w:.])\d:)"
                rf"(?<!\d-)(?:{OCTET}\.){{3}}{OCTET}"
                r"(?![A-Za-z0-9_]|\.(?!\d{1,5}(?: >|: ))\w|-[A-Za-z]|"
                r"(?<=(?:\.\d\d\d){3}),\d\d(?![\d.,]))")
PROGRAM = re.compile(r"(?<![\w.])(?!localhost/)\w+[^\W\d]/$", re.I)  # Chrome/91.0.44.12
PORT, PORT_OR_NET = re.compile(r":\d"), re.compile(r":\d|/\d\d?\b| - - ")
LISTED = re.compile(r"\d(?:\.\d{1,5}){3}([^\n\d]{0,40})$")
MAYBE_IP = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")


def mask_lines(text, maybe, mask_once):
    """Returns (text, count) after mask_once(line) -> (line, count) found nothing more in the lines
    where `maybe` matches.

    A mask can uncover a match beside it (a number is no telephone while digits precede it).
    """
    pieces, done, total = [], 0, 0
    while found := maybe.search(text, done):
        start = text.rfind("\n", done, found.start()) + 1 or done
        end = text.find("\n", found.end())
        end = end if end >= 0 else len(text)
        line, count = text[start:end], 1
        while count:
            line, count = mask_once(line)
            total += count
        pieces += text[done:start], line
        done = end
    return "".join([*pieces, text[done:]]), total


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
    text, start = match.string, match.start()
    if text[start - 1:start] == "/" and text[max(0, start - 2):start - 1] not in "| \t\n":
        return False  # in an address of the web
    if PASSWORD.search(text[max(0, start - 60):start]):
        return False
    end = match[0].rsplit(".", 1)[1].lower()
    name = match[0].split("@")[0]
    return end not in FILE_ENDINGS and ".." not in name and name.lower() not in ("git", "npm")


def mask_emails(text):
    """Returns (text with each address as EMAIL_MASK, how many).  source: [2] mask_pii

    >>> mask_emails("write to a.b@example.com.")
    ('write to |||EMAIL_ADDRESS|||.', 1)
    """
    return mask_lines(text, AT, lambda line: mask_matches(EMAIL, line, EMAIL_MASK, is_email))


def is_phone(match, last):
    """Not among other digits that may be a card's, nor after a word of another kind of number;
    where nothing parts its digits only where something else speaks of telephones."""
    text, start = match.string, match.start()
    before, bare = text[max(0, start - 60):start], match["bare"]
    if AFTER_DIGITS.search(before) and start - 1 != last and not (
            before[-1] in " \u00a0" and (not bare and match["s"] != before[-1])
            or PLACE_OR_IP.search(before)):
        return False
    if before.endswith("=") and not PHONE_FIELD.search(before):
        return False
    if UNIT.match(text, match.end()):
        return False
    if PHONE_CONTEXT.search(before):
        return True
    if IDENTIFIER_CONTEXT.search(before) or NUMBERED_CONTEXT.search(before):
        return False
    return not bare or match.end("bare") < match.end() or bool(
        PLACE_OR_IP.search(before) or BARE_BEFORE.search(before)
        or BARE_AFTER.match(text, match.end()))


def mask_phone_numbers(text):
    """Returns (text with each US or Canadian telephone number as PHONE_MASK, how many).

    >>> mask_phone_numbers("call (283)-182-3829")
    ('call |||PHONE_NUMBER|||', 1)
    """
    alone = ONE_BARE.match(text)

    def once(line):
        line, plus = mask_matches(PLUS_PHONE, line, PHONE_MASK, lambda match, last: True)
        line, count = mask_matches(PHONE, line, PHONE_MASK,
                                   lambda match, last: alone or is_phone(match, last))
        return line, plus + count

    return mask_lines(text, MAYBE_PHONE, once)


def is_ip(match, last):
    """Not after a word of versions, a program's name and a slash (Chrome/91.0.44.12) or four
    numbers that are no address; where it looks like a version, only if more speaks of nets."""
    text, start, end = match.string, match.start(), match.end()
    line = text[max(0, start - 60):start]
    before, net = line[-30:], PORT_OR_NET.match(text, end)
    if VERSION_CONTEXT.search(before) or VERSION_AFTER.match(text, end) or (
            PINNED_OR_DOI.search(before)):
        return False
    if PROGRAM.search(before) and int(match[0].split(".")[1]) < SMALL and not PORT.match(text, end):
        return False
    if (listed := LISTED.search(line)) and start - len(listed[1]) != last and (
            not NET_WORDS.search(listed[1])):
        return False
    if not LOW_IP.match(match[0]) or match[0] in KNOWN_IPS or net or (
            sum(int(octet) < SMALL for octet in match[0].split(".")) < 3):
        return True
    if (name := NAME_BEFORE.search(before)) and not NET_WORDS.match(name[0]):
        return False
    around = line + " " + text[end:end + 30]
    return before[-2:] == "//" or before[-1:] in ("@", "[") or bool(
        NET_WORDS.search(around) or FROM.search(around) and not VERSION_WORD.search(line)
        ) or not any(map(str.isalpha, around))


def mask_ips(text):
    """Returns (text with each IPv4 address as IP_MASK, how many).

    >>> mask_ips("from 192.0.2.146, version 1.2.3.4")
    ('from |||IP_ADDRESS|||, version 1.2.3.4', 1)
    >>> mask_ips("between versions 1.2.3.4 and 5.6.7.8")
    ('between versions 1.2.3.4 and 5.6.7.8', 0)
    """
    return mask_lines(text, MAYBE_IP, lambda line: mask_matches(IP, line, IP_MASK, is_ip))


def mask_pii(text):
    """Returns (text, {"emails": how many, "phones", "ips"}) after all masks, again until none finds
    more: what one masks is no longer beside what another looks at."""
    found = Counter()
    while True:
        before = found.total()
        for name, mask in (("emails", mask_emails), ("phones", mask_phone_numbers),
                           ("ips", mask_ips)):
            text, count = mask(text)
            found[name] += count
        if found.total() == before:
            return text, found


# ---------------------------------------------------------------- stage 6: rules

LETTER, LETTER_OR_DIGIT = re.compile(r"[^\W\d_]"), re.compile(r"\w")
ELLIPSES = ("...", "…", ". . .")
BULLETS = ("•", "-", "*", "●", "‣", "▪", "◦")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
TERMINAL = (".", "?", "!", '"', "”", "’", "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"[.?!](?=\s|\"|”|$)")


class Document:
    """A text, and what several rules ask of it, counted once."""

    def __init__(self, text):
        self.text, self.words = text, text.split()
        # lines that are not blank, stripped
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]

    @cached_property
    def without_letters(self):
        return [w for w in self.words if not w[0].isalpha() and not LETTER.search(w)]

    @cached_property
    def symbols(self):
        return [w for w in self.without_letters if not LETTER_OR_DIGIT.search(w)]

    @property
    def num_words(self):
        """Words that are more than symbols."""
        return len(self.words) - len(self.symbols)

    def count_lines(self, holds):
        return sum(map(holds, self.lines))


# A rule returns whether a document stays, or the text that stays of it.

def word_count(document, *, low=50, high=100_000):
    """50 to 100,000 words.  source: [3]"""
    return low <= document.num_words <= high


def mean_word_length(document, *, low=3, high=10):
    """Words of 3 to 10 characters in the mean.  source: [3]"""
    chars = sum(map(len, document.words)) - sum(map(len, document.symbols))
    return low <= chars / max(document.num_words, 1) <= high


def ellipsis_lines(document, *, high=0.3):
    """At most 30 % of the lines end in an ellipsis.  source: [3]"""
    return document.count_lines(lambda line: line.endswith(ELLIPSES)) <= high * len(document.lines)


def words_with_a_letter(document, *, low=0.8):
    """At least 80 % of the words have a letter.  source: [3]"""
    words = len(document.words)
    return words - len(document.without_letters) >= low * words


def symbol_to_word_ratio(document, *, high=0.1):
    """At most one # and one ellipsis in ten words.  source: [3]"""
    text, most = document.text, high * max(len(document.words), 1)
    return text.count("#") <= most and text.count("...") + text.count("…") <= most


def bullet_lines(document, *, high=0.9):
    """At most 90 % of the lines start with a bullet.  source: [3]"""
    return document.count_lines(lambda line: line.startswith(BULLETS)) <= high * len(document.lines)


def stop_words(document, *, low=2):
    """At least 2 occurrences of the be to of and that have with, in any case.  source: [3]"""
    found = (word for word in document.words if word.lower() in STOP_WORDS)
    return len(list(islice(found, math.ceil(low)))) >= low


def duplicate_share(units):
    """Returns (share of the units that repeat an earlier one, their share of the characters)."""
    seen, count, chars = set(), 0, 0
    for unit in units:
        if unit in seen:
            count += 1
            chars += len(unit)
        seen.add(unit)
    return count / max(len(units), 1), chars / max(sum(map(len, units)), 1)


def duplicate_lines(document, *, high=0.3, high_chars=0.2):
    """At most 30 % of the lines, 20 % of their characters, repeat one.  source: [3]"""
    count, chars = duplicate_share(document.lines)
    return count <= high and chars <= high_chars


def duplicate_paragraphs(document, *, high=0.3, high_chars=0.2):
    """At most 30 % of the paragraphs, 20 % of their characters, repeat one.  source: [3]"""
    count, chars = duplicate_share(
        [p for p in map(str.strip, re.split(r"\n\s*\n", document.text)) if p])
    return count <= high and chars <= high_chars


def top_ngrams(document, *, high=(0.2, 0.18, 0.16)):
    """The most frequent 2-, 3- and 4-gram hold at most 20, 18, 16 % of the text.  source: [3]"""
    words, size = document.words, max(len(document.text), 1)
    for n, limit in enumerate(high, 2):
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        gram, count = max(grams.items(), default=((), 0),
                          key=lambda item: (item[1], sum(map(len, item[0]))))
        if count > 1 and count * (sum(map(len, gram)) + n - 1) > limit * size:
            return False
    return True


def duplicate_ngrams(document, *, high=(0.15, 0.14, 0.13, 0.12, 0.11, 0.1)):
    """Repeated 5- to 10-grams hold at most 15 to 10 % of the text, each place once.  source: [3]"""
    words, size = document.words, max(len(document.text), 1)
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


def c4_lines(document, *, min_words=5, max_word_chars=1000):
    """Lines with an end mark and 5 words, without policy or script; others go.  source: [4]

    datatrove and FineWeb have 3 words a line and 5 sentences a page; this is C4's own code.
    """
    kept = []
    for line in map(str.strip, CITATION.sub("", document.text).split("\n")):
        low = line.lower()
        if (line.endswith((".", "?", "!", '"', "”")) and not line.endswith("...")
                and len(line.split()) >= min_words and "javascript" not in low
                and not any(policy in low for policy in POLICY)
                and max(map(len, line.split()), default=0) <= max_word_chars):
            kept.append(line)
    return "\n".join(kept)


def c4_page(document, *, min_sentences=3):
    """At least 3 sentences, no "lorem ipsum", no curly bracket.  source: [4]"""
    text = document.text
    ends = sum(len(SENTENCE_END.findall(line)) or 1 for line in document.lines)
    return ends >= min_sentences and "{" not in text and "lorem ipsum" not in text.lower()


def fineweb_terminal_lines(document, *, low=0.12):
    """At least 12 % of the lines end in punctuation.  source: [6]"""
    return document.count_lines(lambda line: line.endswith(TERMINAL)) >= low * len(document.lines)


def fineweb_short_lines(document, *, high=0.67, chars=30):
    """At most 67 % of the lines have 30 characters or fewer.  source: [6]"""
    return document.count_lines(lambda line: len(line) <= chars) <= high * len(document.lines)


def fineweb_duplicate_lines(document, *, high=0.01):
    """At most 1 % of the characters are in repeated lines.  source: [6]"""
    return duplicate_share(document.lines)[1] <= high


def fineweb_newlines(document, *, high=0.3):
    """At most 0.3 line ends a word.  source: [6]"""
    return document.text.count("\n") <= high * max(len(document.words), 1)


GOPHER = (word_count, mean_word_length, ellipsis_lines, words_with_a_letter)
RULES = {
    "gopher": GOPHER,
    "gopher_all": (*GOPHER, symbol_to_word_ratio, bullet_lines, stop_words),
    "gopher_repetition": (duplicate_lines, duplicate_paragraphs, top_ngrams, duplicate_ngrams),
    "c4": (c4_lines, c4_page),
    "fineweb": (fineweb_terminal_lines, fineweb_short_lines, fineweb_duplicate_lines,
                fineweb_newlines),
}


def choose_rules(names, thresholds=()):
    """Returns {set: [(rule, its settings)]} of the named sets.

    thresholds: list of "word_count.low=30"; raises: ValueError for a name that is not there
    """
    if unknown := [name for name in names if name not in RULES]:
        raise ValueError(f"--rules must be of {', '.join(RULES)}, got {unknown[0]}; correct it")
    chosen = {name: [(rule, dict(rule.__kwdefaults__)) for rule in RULES[name]] for name in names}
    for threshold in thresholds:
        name, _, value = threshold.partition("=")
        name, _, key = name.partition(".")
        try:
            values = tuple(float(number) for number in value.split(","))
        except ValueError:
            values = (math.nan,)
        of_rule = [settings for rules in chosen.values() for rule, settings in rules
                   if rule.__name__ == name and np.size(settings.get(key, ())) == len(values)]
        if not of_rule or any(map(math.isnan, values)):
            raise ValueError(
                "--threshold must be like word_count.low=30, of a rule in use and as many numbers "
                f"as its default, got {threshold}; the rules in use have " + ", ".join(
                    f"{rule.__name__}.{key}={default}" for name in names for rule in RULES[name]
                    for key, default in rule.__kwdefaults__.items()))
        for settings in of_rule:
            settings[key] = values if isinstance(settings[key], tuple) else values[0]
    return chosen


def apply_rules(text, rules):
    """Returns (what stays of the text, None), or (None, the name of the rule that it failed)."""
    document = Document(text)
    for rule, settings in rules:
        answer = rule(document, **settings)
        if isinstance(answer, str):
            document = Document(answer)
        elif not answer:
            return None, rule.__name__
    return document.text, None


def gopher_quality_filter(text):
    """Returns whether the text passes the handout's four rules.  source: [2] gopher_quality_filters

    >>> gopher_quality_filter("too short")
    False
    """
    return apply_rules(text, choose_rules(["gopher"])["gopher"])[1] is None


# ---------------------------------------------------------------- models of fastText's kind

FASTTEXT_MAGIC, FASTTEXT_VERSION = 793712314, 12
HS, NS, SOFTMAX, OVA = 1, 2, 3, 4  # losses, by fastText's numbers
SUPERVISED = 3
FASTTEXT_ARGS = ("dim", "ws", "epoch", "min_count", "neg", "word_ngrams", "loss", "model",
                 "bucket", "minn", "maxn", "lr_update_rate")
END_OF_LINE = b"</s>"  # fastText's word for the end of each line
LABEL_PREFIX = b"__label__"
LOWERED_WS = 0  # "ws" of our models of lower-cased text; the library asks it of no classifier

MAX_CACHED_IDS = 1 << 23  # n-gram ids of words that a model remembers: 64 MB
BATCH_BYTES = 1 << 20  # of text that predict looks at together
# Length of an untrained label row: the larger, the sooner it learns; 1 to 4 end within 0.002 AUC.
OUTPUT_SCALE = 4
MAX_NGRAM = 255  # words or letters; a model with longer ones is damaged, and would eat the memory
BLOCK_FLOATS = 1 << 16  # of rows that are gathered at a time


class ModelFile:
    """A cursor over the bytes of a model file that says so where they end too early."""

    def __init__(self, path):
        self.path, self.at, self.size = path, 0, os.path.getsize(path)
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def skip(self, size):
        """Returns where the next `size` bytes begin, and goes to their end."""
        start, self.at = self.at, self.at + size
        if not start <= self.at <= self.size:
            raise ValueError(f"{self.path} must be a whole fastText model, got {self.size} bytes "
                             f"where {self.at} are due; copy it again")
        return start

    def numbers(self, layout):
        layout = "<" + layout
        values = struct.unpack_from(layout, self.bytes, self.skip(struct.calcsize(layout)))
        return values if len(values) > 1 else values[0]

    def array(self, dtype, count):
        start = self.skip(np.dtype(dtype).itemsize * count)
        return np.frombuffer(self.bytes, dtype, count, start) if count else np.empty(0, dtype)

    def entries(self, count):
        """Returns [(word, count, type)] of the dictionary, strings ended by a zero byte."""
        found = []
        for _ in range(count):
            word = self.bytes[self.at:self.bytes.find(b"\0", self.at)]
            self.skip(len(word) + 1)
            found.append((word, *self.numbers("qb")))
        return found

    def matrix(self, quantised):
        """Returns a matrix of float32, mapped from the file, so that it opens at once and is shared
        by processes; a quantised one of up to 64 MB is decoded once, larger ones row by row."""
        if quantised:
            matrix = QuantMatrix(self)
            return matrix if math.prod(matrix.shape) > 1 << 24 else matrix[:]
        m, n = self.numbers("qq")
        return self.array("<f4", m * n).reshape(m, n)


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

    def __getitem__(self, ids):
        codes = self.codes[ids]
        rows = np.concatenate([t[codes[:, q]] for q, t in enumerate(self.tables)], axis=1)
        return rows if self.norms is None else rows * self.norms[self.norm_codes[ids]]


def fnv(data):
    """Returns fastText's 32-bit FNV-1a hash of bytes, each sign-extended. source: [8] Dictionary

    >>> fnv(b"a")
    3826002220
    """
    h = 2166136261
    for byte in data:
        h = ((h ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
    return h


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


class Dictionary:
    """The words and labels of a fastText model: a text into the rows of the input matrix that stand
    for its words and n-grams.

    args: dict of FASTTEXT_ARGS; words: list of bytes; label_words: list of bytes, labels with
    their prefix; pruned: None, or (bucket,) int32, the row of each n-gram bucket, -1 where it was
    dropped; lower: texts are lower-cased first, of our own models only
    """

    def __init__(self, args, words, label_words, pruned=None, lower=False):
        self.args, self.words, self.pruned, self.lower = args, words, pruned, lower
        self.minn, self.maxn, self.word_ngrams, self.bucket = (
            args[name] for name in ("minn", "maxn", "word_ngrams", "bucket"))
        self.word_ids = {word: number for number, word in enumerate(words)}
        self.label_words, self.is_label = label_words, frozenset(label_words).__contains__
        self.forget()

    def forget(self):
        """Empties the memory of words: number of each, where its ids lie, its hash."""
        self.numbers, self.flat = defaultdict(), np.empty(1 << 16, np.int64)
        self.numbers.default_factory = self.numbers.__len__
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
        skipped = [self.is_label(word) or (word.startswith(LABEL_PREFIX)
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
        hashes = np.array([fnv(word) if self.word_ngrams > 1 else 0 for word in words], np.uint32)
        self.starts = np.concatenate([self.starts, starts])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.hashes = np.concatenate(  # their sign is extended
            [self.hashes, hashes.view(np.int32).astype(np.int64).view(np.uint64)])
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


class FastText:
    """A supervised fastText model in NumPy: what the library answers, without the library.

    label_counts: list of int; inputs: array or QuantMatrix, (words + buckets, dim);
    output: (labels, dim) float32
    """

    def __init__(self, dictionary, label_counts, inputs, output):
        self.dictionary, self.label_counts = dictionary, label_counts
        self.inputs, self.output, self.loss = inputs, output, dictionary.args["loss"]
        self.labels = [label.removeprefix(LABEL_PREFIX).decode("utf-8", "surrogateescape")
                       for label in dictionary.label_words]
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
        lengths = {name: args[name] for name in ("minn", "maxn", "word_ngrams")}
        if not all(0 <= length <= MAX_NGRAM for length in lengths.values()):
            raise ValueError(f"{path} must have n-grams of 0 to {MAX_NGRAM}, got {lengths}; copy "
                             "it again")
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
        inputs = file.matrix(quantised)
        output = np.ascontiguousarray(file.matrix(file.numbers("?") and quantised)[:])
        rows = n_words + (n_pruned if n_pruned >= 0 else args["bucket"])
        if file.at != file.size or inputs.shape != (rows, args["dim"]) or (
                output.shape != (n_labels, args["dim"])) or (
                n_pruned > 0 and not 0 <= pairs[:, 1].min() <= pairs[:, 1].max() < n_pruned):
            raise ValueError(f"{path} must end after matrices of {rows} and {n_labels} rows of "
                             f"{args['dim']}, got {inputs.shape}, {output.shape} and "
                             f"{file.size - file.at} bytes more; copy it again")
        words, counts = [entry[0] for entry in entries], [entry[1] for entry in entries]
        dictionary = Dictionary(args, words[:n_words], words[n_words:], pruned,
                                args["ws"] == LOWERED_WS)
        return cls(dictionary, counts[n_words:], inputs, output)

    def save(self, path, word_counts):
        """Writes a dense .bin that the library loads too."""
        words, labels, args = self.dictionary.words, self.dictionary.label_words, (
            self.dictionary.args)
        head = struct.pack("<2i12id", FASTTEXT_MAGIC, FASTTEXT_VERSION,
                           *(args[name] for name in FASTTEXT_ARGS), args["t"])
        head += struct.pack("<3i2q", len(words) + len(labels), len(words), len(labels),
                            args["ntokens"], -1)
        entries = [(word, count, 0) for word, count in zip(words, word_counts, strict=True)]
        entries += [(word, count, 1) for word, count in zip(labels, self.label_counts, strict=True)]
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(head)
                file.write(b"".join(word + b"\0" + struct.pack("<qb", count, kind)
                                    for word, count, kind in entries))
                for matrix in (self.inputs, self.output):
                    file.write(struct.pack("<?2q", False, *matrix.shape))
                    np.ascontiguousarray(matrix, "<f4").tofile(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def hidden(self, ids):
        """Returns the mean of the rows, (dim,) float32, summed one by one as the library does."""
        dim = self.output.shape[1]
        block, total = max(1, BLOCK_FLOATS // dim), np.zeros(dim, np.float32)
        for at in range(0, len(ids), block):
            rows = self.inputs[ids[at:at + block]]  # np.take copies all of what is not aligned
            rows[0] += total
            total = np.add.reduce(rows, axis=0)
        return total * np.float32(1 / len(ids))

    def scores(self, hidden, threshold=0.0):
        """Returns (log probabilities, kept), each (texts, labels). hidden: (texts, dim) float32.

        The library adds 1e-5 to a probability before the logarithm, so that it may report 1.00001.
        source: [8] loss.cc
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
            ids = self.dictionary.ids(batch)
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


def batches(items, size, size_of=len):
    """Yields lists of texts, or of other items, that together have about `size` characters."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size_of(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def huffman_paths(counts):
    """Returns for each level from the root (node, side), each (labels,): the row of the output
    matrix that decides there (-1: the path has ended) and 1 for the right-hand side.

    counts: of labels, descending. Of equal counts nodes come first, in the order in which they are
    made, then leaves from the last. source: [8] HierarchicalSoftmaxLoss::buildTree
    """
    heap = [(count, 1, -label, [label]) for label, count in enumerate(counts)]
    heapq.heapify(heap)
    paths = [[] for _ in counts]
    for node in range(len(counts) - 1):
        left, right = heapq.heappop(heap), heapq.heappop(heap)
        for side, (_, _, _, labels) in enumerate((left, right)):
            for label in labels:
                paths[label].insert(0, (node, side))
        heapq.heappush(heap, (left[0] + right[0], 0, node, left[3] + right[3]))
    depth = max(map(len, paths))
    padded = np.array([path + [(-1, 0)] * (depth - len(path)) for path in paths], np.int64)
    return [(padded[:, level, 0], padded[:, level, 1]) for level in range(depth)]


# ---------------------------------------------------------------- training such a model

def count_dictionary(documents, min_count):
    """Returns [(word, count)] that occur often enough, most frequent first, the end of line too."""
    counts = Counter(word for words in documents for word in words)
    return sorted(((word, n) for word, n in counts.items() if n >= min_count),
                  key=lambda item: (-item[1], item[0]))


def train_fasttext(texts, labels, *, dim=50, epoch=5, lr=0.1, word_ngrams=2, bucket=200_000,
                   minn=0, maxn=0, min_count=1, lower=True, seed=0, progress=False):
    """Returns (model, counts of its words): a FastText with softmax, trained one text at a time.

    texts: list of str; labels: list of str, one a text. The settings are fastText's, its defaults
    dim 100, word_ngrams 1, bucket 2,000,000, not lower-cased. Memory: the input matrix, (words +
    bucket) * dim * 4 bytes, and 16 bytes an id of the texts. source: [8], section 2
    """
    for name, value in (("dim", dim), ("epoch", epoch), ("min_count", min_count),
                        ("word_ngrams", word_ngrams), ("bucket", bucket)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; give a larger one")
    if not 0 <= minn <= maxn or not lr > 0:
        raise ValueError(f"minn, maxn and lr must be 0 <= minn <= maxn and lr > 0, got {minn}, "
                         f"{maxn}, {lr}; correct them")
    if len(set(labels)) < 2 or len(texts) != len(labels):
        raise ValueError(f"training must have texts of at least two labels, got {len(texts)} texts "
                         f"with labels {sorted(set(labels))}; add examples of the other kind")
    label_counts = Counter(labels).most_common()
    args = dict(zip(FASTTEXT_ARGS, (
        dim, LOWERED_WS if lower else 5, epoch, min_count, 5, word_ngrams, SOFTMAX, SUPERVISED,
        bucket if word_ngrams > 1 or maxn else 0, minn, maxn, 100), strict=True)) | {
            "t": 1e-4, "ntokens": 0}
    names, counts = zip(*label_counts, strict=True)
    label_words = [LABEL_PREFIX + name.encode() for name in names]
    blank = Dictionary(args, [], label_words, lower=lower)
    words = count_dictionary(map(blank.tokens, texts), min_count)
    args["ntokens"] = sum(n for _, n in words)
    rng = np.random.default_rng(seed)
    # Zero rows, random labels, the reverse of the library: what no text has trained adds no noise.
    inputs = np.zeros((len(words) + args["bucket"], dim), np.float32)
    output = rng.standard_normal((len(names), dim), np.float32)
    output *= np.float32(OUTPUT_SCALE / math.sqrt(dim))
    dictionary = Dictionary(args, [word for word, _ in words], label_words, lower=lower)
    examples = [(*np.unique(ids, return_counts=True), names.index(label))
                for batch in batches(zip(texts, labels, strict=True), 1024)
                for ids, (_, label) in zip(dictionary.ids([text for text, _ in batch]), batch,
                                           strict=True) if len(ids)]
    dictionary.forget()
    steps, done = epoch * len(examples), 0
    bar = bpe.Progress("train", steps, "texts", progress)
    for _ in range(epoch):
        for number in rng.permutation(len(examples)):
            train_step(inputs, output, *examples[number], lr * (1 - done / steps))
            done += 1
            bar.update(done)
    bar.close()
    return FastText(dictionary, counts, inputs, output), [n for _, n in words]


def train_step(inputs, output, ids, counts, label, lr):
    """One step of gradient descent on one text, in place: softmax over the mean of its rows.

    ids: (rows,) distinct, each counted `counts` times. source: [8] SoftmaxLoss::forward
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

# First words of Unicode's names of letters: the script, or the language that is alone in it.
SCRIPTS = {
    "LATIN": "latin", "CYRILLIC": "cyrillic", "ARABIC": "arabic", "CJK": "han", "HIRAGANA": "ja",
    "KATAKANA": "ja", "HALFWIDTH": "ja", "HANGUL": "ko", "GREEK": "el", "ARMENIAN": "hy",
    "HEBREW": "he", "DEVANAGARI": "hi", "BENGALI": "bn", "GURMUKHI": "pa", "GUJARATI": "gu",
    "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "SINHALA": "si",
    "THAI": "th", "LAO": "lo", "MYANMAR": "my", "GEORGIAN": "ka", "ETHIOPIC": "am", "KHMER": "km",
}
# In the order of use.
FUNCTION_WORDS = {
    "en": "the of and to in a is that for it was on with as by be at are this from or have an not "
          "but they his he you which we their has were been can will more all would there its who "
          "her had if when what so about out up she them than other",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch "
          "es an werden aus er hat dass daß sie nach wird bei einer um am sind noch wie einem "
          "über einen so zum war haben nur oder aber vor zur bis mehr durch man sein",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce "
          "il sont avec ou son aux d l qu s c n j mais comme on tout nous sa cette être fait ses "
          "leur été elle ces ont deux même vous si",
    "es": "de la que el en y a los del se las por un para con no una su al lo como más pero sus "
          "le ya o este sí porque esta entre cuando muy sin sobre también me hasta hay donde "
          "quien desde todo nos durante todos uno les ni contra otros ese eso ante ellos",
    "it": "di e il la che in a per un è del non una le i con si della da sono al dei nel alla "
          "come lo più gli ha anche delle ma o su l d dell c all nell dal se ci dalla questo "
          "questa suo sua loro essere stato tra ne mi io quando",
    "pt": "de a o que e do da em um para com não uma os no se na por mais as dos como mas ao ele "
          "das à seu sua ou quando muito nos já eu também só pelo pela até isso ela entre depois "
          "sem mesmo aos seus quem nas me esse eles você essa num",
    "nl": "de van het een en in is dat op te zijn met voor niet die aan er om ook als door maar "
          "bij uit dan nog naar of hij ze was worden werd tot wordt heeft over hebben ik je we "
          "deze meer kan geen wel zich haar al veel onder jaar wat dit zo u",
    "pl": "i w na z do nie się że o to jest od po za jak dla co ale czy tak tym jego przez są już "
          "być tego było oraz a lub przy ich tylko może który która które jej był pod ze u roku "
          "też by go mu ma bardzo gdy jako kiedy jednak więcej jeszcze",
    "tr": "ve bir bu da de için ile çok olarak daha en olan gibi ne kadar sonra var o ama ki her "
          "ya değil ise veya mi mı göre kendi diye şey nasıl hem ancak ben sen biz siz onlar bana "
          "onun olduğu oldu olduğunu yok önce iki ilk tarafından içinde üzerinde yeni büyük zaman "
          "bütün ayrıca",
    "vi": "và của là có các cho được trong không một người với những này để đã từ khi đến như "
          "cũng về ra nhiều vào thì sẽ trên tôi làm phải lại hay còn bạn nếu đó sau tại rất theo "
          "bị nhưng năm mà anh ở chỉ hơn ông việc số đi nên do đây",
    "sv": "och i att det som en på är av för med till den inte har de om ett han men var jag sig "
          "från vi så kan när man år under också efter eller nu sin där vid mot ska skulle kommer "
          "ut får finns vara hade alla andra mycket här då sedan över bara in",
    "cs": "a v se na je že s z do to o i jako k po ve pro který jsou by si jeho ale tak však za "
          "od která nebo které jen byl bylo byla jsem ze už při jsme aby když tento než další být "
          "co má také až před pouze není tedy této pak podle",
    "ru": "и в не на что я с он как это по но они мы все из у за так к же от бы для о его только "
          "мне было вы ее был она то да если уже или ни быть до когда него нет еще при меня может "
          "чтобы со этого под их ты где есть",
    "uk": "і в не на що я з він як це та до у за й але від про є для по його так було ми вони "
          "вона все або якщо їх ще щоб був бо то які який яка також при вже може під час цього "
          "коли після більше була ні мене те були лише ви",
    "ar": "في من على أن إلى عن التي الذي هذا هذه ما لا كان ذلك مع أو بعد كل قد هو هي لم ثم بين و "
          "كما حيث عند غير إن كانت لها له عليه أي قبل منذ تم بها يكون أكثر حتى خلال فيها الله بن "
          "به إذا لكن نحن يوم وقد فإن أما لن أيضا",
    "fa": "و در به از که این را با است برای آن یک خود تا کرد بر هم نیز می شود شده شد ها های ای "
          "اما یا بود دارد باید هر ما او اگر بین من چه سال وی پس بیش همه اين مي بی دیگر کند کنند "
          "هستند نمی خواهد روی مورد پیش چند بسیار",
}
# Two and three letters that tell a language from its script's others, "_" at the ends of words.
LETTERS_IN_ROW = {
    "en": "the th _th he he_ _t of_ _of f_ d_ of _o s_ ea ed_ re th_ y_ in _a _i _re _to nd_ _in "
          "ing _an _on on_ ith wit on e_ ou ed tio _w ts_ _r _f t_ it ti fro",
    "de": "ei en_ en n_ ein ch er die ich _ei sch ie er_ ge be un au ung ie_ r_ und sc _zu _di "
          "nd_ der zu hr hen nd _d fü _au ch_ che den in eh nen eit di _w uf ic",
    "fr": "s_ es_ e_ es _l nt_ t_ _le le ée _d ou les ai ur nt _à_ on le_ _à _l_ ré _de _d_ ur_ "
          "our qu tio _la oi ent ion ée_ _et ue eu une iq iqu que _ré des ns_ ti",
    "es": "s_ os_ os a_ _y_ ue o_ as_ do es as _e con ado co qu _de _co _la ad ue_ los _es el_ "
          "de_ ci _el que _l de ca las la aci dos _qu _q cin _c es_ do_ _lo _y nte",
    "it": "i_ o_ a_ di_ io ri zio e_ no_ co no on di re_ l_ la_ _c to_ ti_ ll _di ni_ tt to del "
          "ta_ ta azi ato è_ al ne _a ell le_ per zi _s io_ _è _è_ lla ne_ ino",
    "pt": "o_ a_ ão ão_ s_ os_ _a os _a_ de_ _d çã ção as_ co do_ m_ do as _e pa ra da_ _p es _e_ "
          "_de da _o_ _co de com _pa em_ ra_ lh em ca qu ia aç que _em _um",
    "nl": "ij aa n_ en_ ee en de van de_ oo _ee oor ge _va het _he t_ een er _de et_ _v an_ aan "
          "we va aar ij_ _d eer e_ he oe _aa el _we ijk jk et an naa _h _ge _w",
    "pl": "cz ow ie zy dz rz nie _w ni w_ wy _w_ _z ę_ ał ć_ ł_ sz ą_ dzi wa wi ze prz ie_ ej ię "
          "rze yc ej_ ła owa aw ych ki _wy za y_ ów cj kie _p ym_ pr",
    "tr": "ı_ ya ın _y ler lar nı _ya ay ir bir lı _b _ç la iy ak nl rı ýn ün k_ _bi aş le ka ıl "
          "bi ir_ ar il sı ır _ol _ka eri ve_ ek ý_ i_ arı dı ye _ve",
    "vi": "_đ ng_ ng nh g_ nh_ _t _c c_ _nh _ch _th _kh i_ kh th _n _ng h_ ác ó_ àn _cá ác_ hư cá "
          "các _h _ph ên_ _và và hà iệ ất ất_ à_ ch ườ n_ ôn _tr và_ ạn",
    "sv": "fö r_ ör för är _fö tt_ ör_ är_ _oc _f _ä tt å_ och sk av_ _är ån att på et er_ t_ _på "
          "rå ing på_ en_ _av vä ll år _i_ oc än nin ar_ _at n_ er om_ v_ det",
    "cs": "í_ ní ní_ ov je př _j _př ně ře ě_ ná _z _v _p že é_ _v_ _je vý vy _n _po y_ rá _č vě "
          "če po u_ je_ mě že_ ko _vy ho _ne od ké ší ů_ by ím ení",
    "ru": "_и _и_ ы_ ие е_ бы ны _бы от _он ел _н ой ие_ как ия_ ь_ ать ой_ л_ _э был мы ры ыл ых "
          "эт т_ _о _е",
    "uk": "і_ ні _і ві ін ід ні_ ці ї_ ів лі ння _і_ _ві рі _з_ від мі що є_ _як ськ ів_ _з бі іл "
          "іс ий ті ува",
    "ar": "ة_ _ال ال ي_ _أ ى_ من_ ية ية_ لم الم لي في ين _ل في_ لى لى_ _في _ا _ي لأ عل لع _ك أن "
          "الأ ين_ لا _إ",
    "fa": "ی_ ای _ک _در ین _ای ه_ _د در_ ین_ ای_ می _آ این ری در ر_ _از می_ نی های _ب _می یا از "
          "_و_ دی ست_ ده_ _گ",
}
SCRIPT_OF = {"ru": "cyrillic", "uk": "cyrillic", "ar": "arabic", "fa": "arabic"}  # the rest: latin
ACCENTED = {  # letters beyond a to z, or beyond the script's shared ones
    "en": "", "de": "äöüß", "fr": "àâæçéèêëîïôœùûÿ", "es": "áéíñóúü", "it": "àèéìòù",
    "pt": "àáâãçéêíóôõú", "nl": "ëïéö", "pl": "ąćęłńóśźż", "tr": "çğıöşüâîðþ",
    "vi": "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "sv": "åäöé", "cs": "áčďéěíňóřšťúůýž", "ru": "ыэъё", "uk": "іїєґ",
    "ar": "ةىإأكي", "fa": "پچژگکی"}
LANGUAGES, ENGLISH_WORDS = list(FUNCTION_WORDS), frozenset(FUNCTION_WORDS["en"].split())
CODES = {*LANGUAGES, *SCRIPTS.values(), "zh", "und"} - {"latin", "cyrillic", "arabic", "han"}
LETTER_RUNS = re.compile(r"[^\W\d_]+")
LANGUAGE_CHARS = 2000  # of a text that are looked at, and as many from its middle
WORD_WEIGHT, GRAM_WEIGHT, LETTER_WEIGHT = 4.0, 1.0, 2.5  # log odds: best on half of a dev set
FALL = 0.3  # of the odds, from the first of a list to its last
# Log odds a letter that all but a twentieth of sentences reach in the languages of a script.
USUAL_EVIDENCE = {"latin": 0.45, "cyrillic": 0.2, "arabic": 0.5}


@lru_cache(1 << 16)
def script_of(character):
    """Returns the script of a letter or of a mark of one, as in SCRIPTS, or None."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    return SCRIPTS.get(unicodedata.name(character, "").split(" ")[0])


def script_counts(text):
    """Returns {script or language: letters} of a text.

    >>> dict(script_counts("Straße 5, 東京"))
    {'latin': 6, 'han': 2}
    """
    counts = Counter()
    for character, n in Counter(text).items():
        if script := script_of(character):
            counts[script] += n
    return counts


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

# Whole words; * stands for any ending. Mild where it can be: a word list is the last resort. Names
# of groups, topics and organs condemn nothing by themselves, only where they are said of a reader.
NSFW_WORDS = r"""porn* xxx nudes (?<!same-)sex sexy erotic* hentai milf* blowjob* handjob* cum
cumshot* pussy pussies tits boobs anal orgasm* masturbat* bdsm hooker* slut* whore* horny gangbang*
threesome* camgirl* upskirt* creampie* deepthroat* dildo* fuck* bukkake* busty jizz
(?:big|huge|hard|my|his)\W+(?:cocks?|dicks?) xvideos pornhub onlyfans"""
TOXIC_WORDS = r"""fuck* fuk* motherfuck* shit* bullshit ass asshole* arse* bitch* bastard* cunt*
dickhead* prick cocksuck* suck sucks sucking whore* slut* fag fags faggot* homos nigg* retard*
moron* idiot* stupid* dumb* imbecile* loser* jerk* pathetic scum* crap* piss* damn* wanker* twat*
bollocks douche* pussy filthy disgusting coward* freak* noob* shut\W+up go\W+to\W+hell kill\W+your*
hate\W+you gaylord* gayest so\W+gay
(?:you|u|ur)\W+(?:\w+\W+){0,2}(?:gay|homo|nazi*|racist*|liar*|ugly|pigs?|trash|garbage|troll*)"""
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
    ended = sum(len(line) for line in lines if line.rstrip().endswith(TERMINAL[:5]))
    common = sum(w.lower().strip(string.punctuation) in ENGLISH_WORDS for w in words) / len(words)
    letters = sum(map(str.isalpha, text)) / max(1, sum(not c.isspace() for c in text))
    shares = (ended / sum(map(len, lines)), min(1, common / 0.4), min(1, len(words) / 300),
              min(1, len(words) / len(lines) / 20), min(1, max(0, (letters - 0.8) / 0.15)))
    return round(sum(shares) / len(shares), 6)


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
            raise ValueError(f"kind must be of {', '.join(CLASSIFIERS)}, got {kind!r}; choose one")
        self.kind, self.model = kind, FastText.load(model) if model else None
        if self.model:
            self.method = f"fastText model {Path(model).name}"
        elif kind == "language":
            self.method = f"built-in, {len(LANGUAGES) + 4} languages and those alone in a script"
        else:
            self.method = f"built-in {BUILT_IN[kind][3]}"

    def share_of(self, text, labels):
        """Returns the probability, from 0 to 1, that a text is of one of some labels."""
        if self.model:
            answer = zip(*self.model.predict([text], k=-1)[0], strict=True)
            return min(1.0, sum(score for label, score in answer if label in labels))
        label, score = self.predict([text])[0]
        return score if label in labels else 1 - score

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
def load_once(kind, model, written):
    return Classifier(kind, model)


def load_classifier(kind, model=None):
    """Returns the Classifier of a kind and a model's path, read anew when the file is another."""
    return load_once(kind, model, os.path.isfile(model) and os.stat(model).st_mtime_ns
                     if model else None)


def identify_language(text, model=None):
    """Returns (ISO 639-1 code, score from 0 to 1). model: path of lid.176.bin or .ftz, or None."""
    return load_classifier("language", model).predict([text])[0]


def classify_nsfw(text, model=None):
    """Returns ("nsfw" or "non-nsfw", score of that label). model: a path, such as Dolma's [11]."""
    return load_classifier("nsfw", model).predict([text])[0]


def classify_toxic_speech(text, model=None):
    """Returns ("toxic" or "non-toxic", score of it). model: a path, such as Dolma's [11]."""
    return load_classifier("toxic", model).predict([text])[0]


def classify_quality(text, model=None):
    """Returns ("wiki" or "cc", score of that label); a model's own labels where one is given."""
    return load_classifier("quality", model).predict([text])[0]


# ---------------------------------------------------------------- equal keys, in bounded memory

SORT_BYTES = 112  # of memory that sorting takes a key, measured at 10 million


def check_memory(memory_mb):
    """raises: ValueError if there is no memory to sort in."""
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}; give some to sort in")


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
        if path.suffix == ".gz":
            raise ValueError(f"an input must be read at any place, got {path}; unpack it")
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


def exact_line_deduplication(input_files, output_directory, memory_mb=1024, keep_blank=False):
    """Writes each file to output_directory without the lines that occur more than once anywhere;
    returns {"lines", "kept", "bytes", "kept_bytes"}.

    Every occurrence goes, the first too, and blank lines like any other, unless keep_blank says
    that they are ends of paragraphs. "\\n" alone ends a line and is no part of it. Lines are
    told apart by 64 bits: of n lines, a line is taken for another with probability n / 2**64. The
    hashes are on disk, 8 bytes a line, and sorted in memory_mb. source: [2] 3.1
    """
    check_memory(memory_mb)
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
                    marks = keep[at:at + len(block)]
                    if keep_blank:
                        marks = marks | [line.isspace() for line in block]
                    kept = list(compress(block, marks))
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
    words one space apart. source: [2] 3.2

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

    A mod-prime hash of 64 bits overflows in 64 bits and is then no such hash. source: [9], [10]
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
LOCATED_CHUNKS = 256  # whose offsets are held: 8 bytes a document
CACHED_SETS = 2000  # shingle sets that a worker keeps while it compares: about 20 MB


def plan_chunks(files):
    """Returns [(paths, start, end)]: ranges of bytes of .jsonl files, runs of whole other files."""
    chunks, files = [], sorted(map(str, files))
    for in_lines, group in groupby(files, lambda path: path.endswith(".jsonl")):
        paths = tuple(group)
        if in_lines:
            chunks += [((path,), at, min(at + CHUNK_BYTES, size)) for path in paths
                       for size in [os.path.getsize(path)] for at in range(0, size, CHUNK_BYTES)]
        else:
            chunks += [(paths[i:i + CHUNK_FILES], 0, None)
                       for i in range(0, len(paths), CHUNK_FILES)]
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
        self.offsets = lru_cache(LOCATED_CHUNKS)(lambda chunk: self.column(chunk, 0))

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
        return paths[0], int(self.offsets(chunk)[row])


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
    minhash, pairs = MinHash(*settings), []
    shingles = lru_cache(CACHED_SETS)(lambda document, path, offset: minhash.shingle_set(
        read_document(path, offset)))
    for group in groups:
        clusters = defaultdict(list)
        for document, root, *place in group:
            clusters[root].append((document, *place))
        merged = []
        for cluster in clusters.values():
            apart = []
            for other in merged:
                pair = next(((a[0], b[0]) for a in other for b in cluster
                             if jaccard(shingles(*a), shingles(*b)) >= threshold), None)
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


def check_jaccard_threshold(threshold):
    if not 0 <= threshold <= 1:
        raise ValueError(f"jaccard_threshold must be from 0 to 1, got {threshold}; give a share of "
                         "shingles, such as 0.8")


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
    settings stay. source: [9]; [2] 3.3
    """
    settings = num_hashes, num_bands, ngrams
    MinHash(*settings)
    check_jaccard_threshold(jaccard_threshold)
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
    """Says what the run will need, documents of .jsonl files judged by the first megabyte of each;
    raises ValueError where the disk has less."""
    check_memory(memory_mb)
    documents = 0
    for path in files:
        documents += 1
        if str(path).endswith(".jsonl"):
            with open(path, "rb") as file:
                start = file.read(1 << 20)
            documents += int(start.count(b"\n") / max(1, len(start)) * os.path.getsize(path))
    disk, memory = documents * 8 * (2 + num_bands), documents * 32
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
        dropped = defaultdict(set)
        for path, offset, *_ in duplicates:
            dropped[path].add(offset)
        for path in inputs:
            part = Path(temporary) / "output"
            if path.suffix == ".jsonl":
                copy_lines(path, part, dropped[str(path)])
            elif str(path) in dropped:
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
BLANK_LINES = re.compile(r"\n{3,}")
PAGE_LIMIT_S = 2.0  # that one document may take in one stage before it is dropped
STUCK_S = 60.0  # after which a worker that shows no progress is killed and its page is skipped
WORKER_BYTES = 4 << 30  # of address space a worker may take beyond what it starts with
CHECKPOINT_BYTES = 8 << 20  # of an input file between two points that a run goes on from
CHECKPOINT_S = 15.0
EXAMPLES = 20  # dropped documents per reason and file whose text is kept too, for `inspect`
DOCUMENT_MARK = "\x1e"  # starts the line before each document in a shard; text never holds it
STAGES = ("records", "text", "address", "language", "rules", "harm", "quality", "pii", "lines",
          "short", "copies", "contamination")
STAGES_TOGETHER = STAGES[-4:]  # over all documents of all files
HARMFUL = ("nsfw", "toxic", "1", "yes", "hate")  # labels, of Dolma's models too


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
    """Returns the text without control characters, with no special token in it, and with one blank
    line where there are more."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return BLANK_LINES.sub("\n\n", text.replace(bpe.END_OF_TEXT, "<| endoftext |>")).strip()


def host_of(url):
    """Returns the host of an address, in lower case, without "www."."""
    return re.sub(r"^[a-z]+://(?:[^/@]*@)?(?:www\.)?|[:/?#].*$", "", url.lower())


class Funnel:
    """What came into and out of each stage, and why what fell did: its sums close.

    stages: {stage: {documents_in, documents_out, characters_in, characters_out, seconds,
    reasons: {reason: {documents, characters, example}}}}, as journals and the report have it
    """

    def __init__(self, stages=None):
        self.stages, self.sample = stages or {}, None

    def stage(self, name):
        return self.stages.setdefault(name, {
            "documents_in": 0, "documents_out": 0, "characters_in": 0, "characters_out": 0,
            "seconds": 0.0, "reasons": {}})

    def count(self, name, url, text, out, reason=None, seconds=0.0):
        """Counts what became of a document. self.sample: of one that fell; its text, if few did."""
        stage, self.sample = self.stage(name), None
        stage["documents_in"] += 1
        stage["characters_in"] += len(text)
        stage["seconds"] += seconds
        if reason is None:
            stage["documents_out"] += 1
            stage["characters_out"] += len(out)
            return
        shown = text[:2000]
        shown = shown.decode("utf-8", "replace") if isinstance(shown, bytes) else shown
        entry = stage["reasons"].setdefault(reason, {
            "documents": 0, "characters": 0,
            "example": {"url": url, "text": " ".join(shown[:400].split())[:160]}})
        entry["documents"] += 1
        entry["characters"] += len(text)
        self.sample = {"url": url, "reason": f"{name}: {reason}"}
        if entry["documents"] <= EXAMPLES:
            self.sample["text"] = shown

    def add(self, stages):
        """Adds the counts of another funnel."""
        for name, other in stages.items():
            stage = self.stage(name)
            for key in stage.keys() - {"reasons"}:
                stage[key] += other[key]
            for reason, entry in other["reasons"].items():
                mine = stage["reasons"].setdefault(
                    reason, entry | {"documents": 0, "characters": 0})
                mine["documents"] += entry["documents"]
                mine["characters"] += entry["characters"]


class Judge:
    """What happens to documents, one stage after the other; the funnel counts it."""

    def __init__(self, options):
        self.options, self.funnel, self.shared = options, Funnel(), [0] * 4
        self.rules = choose_rules(options.rules, options.threshold)
        self.blocked = {entry.removeprefix("*.").removeprefix("www.") for entry in re.sub(
            r"(?m)(?:^|\s)#.*", "", Path(options.blocklist).read_text("utf-8-sig").lower()).split()
            } if options.blocklist else set()
        harmful = () if options.no_harm else HARMFUL
        wanted = {"language": options.languages, "nsfw": harmful, "toxic": harmful,
                  "quality": [options.quality_label] if options.quality_model else ()}
        if not options.language_model and (other := set(options.languages) - CODES):
            raise ValueError(f"--languages must be of {', '.join(sorted(CODES))}, got "
                             f"{', '.join(sorted(other))}; correct it, or name a --language_model")
        self.classifiers, self.methods = {}, {}  # models are read once, before workers start
        for kind, labels in wanted.items():
            judge = load_classifier(kind, getattr(options, f"{kind}_model"))
            self.classifiers[kind] = judge
            self.methods[kind] = judge.method if labels else "not judged"
            if judge.model and labels and not set(labels) & set(judge.model.labels):
                flag = {"language": "--languages", "quality": "--quality_label"}.get(kind)
                raise ValueError(
                    f"--{kind}_model must have a label of {', '.join(labels)}, got a model with "
                    f"{', '.join(sorted(judge.model.labels)[:9])}; name "
                    f"{f'one of its labels by {flag}' if flag else 'a model of harmful text'}")
        self.stages = [(name, function) for name, function, on in (
            ("address", self.check_address, self.blocked),
            ("language", self.check_language, options.languages),
            ("rules", self.check_rules, self.rules), ("harm", self.check_harm, not options.no_harm),
            ("quality", self.check_quality, options.quality_model),
            ("pii", self.mask, not options.no_pii)) if on]

    def __reduce__(self):
        return Judge, (self.options,)  # a worker that is spawned, not forked, reads models anew

    def judge(self, records):
        """Yields (record, {url, text, language, ...} or None, sample of what fell or None)."""
        opened = [(record, self.read(record), self.funnel.sample) for record in records]
        languages = self.identify([text for _, text, _ in opened if text])
        for record, text, sample in opened:
            notes = {"url": record.url} | (next(languages) if text else {})
            for name, function in self.stages if text else ():
                text = self.stage(name, record.url, text, function, notes)
                sample = self.funnel.sample
                if text is None:
                    break
            yield record, notes | {"text": text} if text else None, sample

    def stage(self, name, url, text, function, *arguments):
        """Returns what function(text, ...), of (text, None) or (None, reason), leaves of it."""
        started, self.shared[2] = time.perf_counter(), time.monotonic()
        try:
            with time_limit(PAGE_LIMIT_S):
                out, reason = function(text, *arguments)
        except TimeLimit:
            out, reason = None, "time limit"
        except MemoryError:
            out, reason = None, "memory limit"
        except Exception as error:  # whatever a page does, it costs that page: named in the report
            out, reason = None, f"error {type(error).__name__}"
        self.funnel.count(name, url, text, out, reason, time.perf_counter() - started)
        return out

    def read(self, record):
        """Returns a record's text, or None."""
        data = self.stage("records", record.url, record.data, lambda data: (
            (None, record.problem) if record.problem else (data, None)))
        return data and self.stage("text", record.url, data, self.extract, record)

    def identify(self, texts):
        """Yields {language, language_score} of each text: models are faster at many together."""
        answers, started = [None] * len(texts), time.perf_counter()
        if texts and self.options.languages:
            # on any error each is asked for by itself in its stage, and costs itself alone
            with suppress(Exception), time_limit(PAGE_LIMIT_S * len(texts)):
                answers = self.classifiers["language"].predict(texts)
            self.funnel.stage("language")["seconds"] += time.perf_counter() - started
        for answer in answers:
            yield dict(zip(("language", "language_score"), answer, strict=True)) if answer else {}

    def extract(self, data, record):
        text = clean_text(record_text(record, self.options.mode))
        return (text, None) if text else (None, "no text")

    def check_address(self, text, notes):
        host = host_of(notes["url"]).split(".")
        names = {notes["url"].lower(), *(".".join(host[i:]) for i in range(len(host)))}
        return (None, "blocklist") if names & self.blocked else (text, None)

    def check_language(self, text, notes):
        if "language" not in notes:
            notes |= next(self.identify([text]))
        code, score = notes["language"], round(float(notes["language_score"]), 4)
        notes["language_score"] = score
        if code not in self.options.languages:
            return None, f"language {code}"
        low = score < self.options.language_score
        return (None, f"language {code}, score too low") if low else (text, None)

    def check_rules(self, text, notes):
        for name, rules in self.rules.items():
            text, failed = apply_rules(text, rules)
            if failed:
                return None, f"{name} {failed}"
        # what a rule cuts out may have parted a special token
        return clean_text(text) if bpe.END_OF_TEXT in text else text, None

    def check_harm(self, text, notes):
        for kind in ("nsfw", "toxic"):
            notes[kind] = round(self.classifiers[kind].share_of(text, HARMFUL), 4)
            if notes[kind] >= self.options.harm_score:
                return None, kind
        return text, None

    def check_quality(self, text, notes):
        good = self.classifiers["quality"].share_of(text, (self.options.quality_label,))
        notes["quality"] = round(good, 4)
        return (text, None) if good >= self.options.quality_score else (None, "quality too low")

    def mask(self, text, notes):
        text, found = mask_pii(text)
        notes |= +found  # those above zero
        return text, None


# ---------------------------------------------------------------- the run: one file

class Shard:
    """The output of one input file: what is kept, why the rest is not, and a journal.

    A line of the journal says how far the input was read and how long the two others were then,
    after they had reached the disk: whatever is beyond that is cut off when a run goes on.
    """

    def __init__(self, folder, number):
        self.number, self.journal = number, folder / f"{number:05d}.journal"
        self.paths = [folder / f"{number:05d}.txt", folder / f"{number:05d}.dropped.jsonl"]
        self.state = {"place": [0, 0], "sizes": [0, 0], "stages": {}, "others": {}, "bytes": 0,
                      "done": False}
        if self.journal.exists():
            data = self.journal.read_bytes()
            whole = data[:data.rfind(b"\n") + 1]
            if len(whole) < len(data):  # killed while it wrote a line
                os.truncate(self.journal, len(whole))
            self.state |= json.loads(whole.splitlines()[-1]) if whole else {}

    def __enter__(self):
        with ExitStack() as stack:
            self.files = [stack.enter_context(open(path, "r+b" if path.exists() else "w+b"))
                          for path in self.paths]
            for file, size in zip(self.files, self.state["sizes"], strict=True):
                if (found := os.path.getsize(file.name)) < size:
                    raise ValueError(f"{file.name} must hold the {size} bytes that its journal "
                                     f"speaks of, got {found}; give --overwrite to start anew")
                file.truncate(size)
                file.seek(size)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def write(self, place, kept, sample):
        identity = f"{self.number}:{place[0]}:{place[1]}"
        if kept:
            text = kept.pop("text")
            head = json.dumps({"id": identity, **kept}, ensure_ascii=False)
            self.files[0].write(f"{DOCUMENT_MARK}{head}\n{text}\n".encode())
        elif sample:
            self.files[1].write(json.dumps({"id": identity, **sample}).encode() + b"\n")

    def checkpoint(self, **state):
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        self.state |= state | {"sizes": [file.tell() for file in self.files]}
        with open(self.journal, "ab") as file:
            file.write(json.dumps(self.state).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_shard(path):
    """Yields (notes, text) of the documents of a shard, in order."""
    head, lines = None, []
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in chain(file, [DOCUMENT_MARK]):
            if not line.startswith(DOCUMENT_MARK):
                lines.append(line)
                continue
            if head is not None:
                yield json.loads(head), BLANK_LINES.sub("\n\n", "".join(lines)).strip("\n")
            head, lines = line[1:], []


def filter_file(number, path, judge, folder, shared, skipped=(), stop=(), careful=False):
    """Judges every document of one file into its shard, from where it stopped.

    shared: [place in the file, its second number, when, documents] for whoever watches; skipped:
    places of records that killed workers; stop: a list that a signal fills; careful: one document
    at a time, so that `shared` tells exactly which one is at work
    """
    shard = Shard(folder, number)
    if shard.state["done"]:
        return
    judge.funnel, judge.shared = Funnel(shard.state["stages"]), shared
    others = Counter(shard.state["others"])
    saved_at, saved_s = shard.state["place"][0], time.monotonic()

    def watched():
        records = read_records(path, shard.state["place"], others)
        while True:
            started = time.perf_counter()
            record = next(records, None)
            judge.funnel.stage("records")["seconds"] += time.perf_counter() - started
            if record is None:
                return
            shared[:2] = record.place
            shared[3] += 1
            if list(record.place) in skipped:
                record.problem = record.problem or "killed its worker"
            yield record

    state = {"bytes": os.path.getsize(path), "stages": judge.funnel.stages, "others": others}
    with shard:
        for batch in batches(watched(), 1 if careful else BATCH_BYTES,
                             lambda record: len(record.data) + 1000):
            for record, kept, sample in judge.judge(batch):
                shard.write(record.place, kept, sample)
            state["place"], now = list(record.place), time.monotonic()
            if stop or record.place[0] - saved_at >= CHECKPOINT_BYTES or (
                    now - saved_s > CHECKPOINT_S):
                shard.checkpoint(**state)
                saved_at, saved_s = record.place[0], now
            if stop:
                return
        shard.checkpoint(**state | {"done": True})


def limit_memory(extra):
    """Lets this process take `extra` bytes more than it has, where the system can say so."""
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)


def work(number, path, judge, folder, shared, skipped, careful, errors):
    """A worker: one process filters one file. Exit code 0: done or stopped; 1: an error."""
    bpe.start_worker()
    stop = []
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fetch may end anywhere, and goes on there
        local = fetch_input(path, folder, judge.options.num_workers)
        signal.signal(signal.SIGTERM, lambda signum, frame: stop.append(signum))
        limit_memory(WORKER_BYTES + os.path.getsize(local))  # the file is mapped
        filter_file(number, local, judge, folder, shared, skipped, stop, careful)
        if local != Path(path) and not stop:
            local.unlink()
    except (ValueError, OSError) as error:
        errors.put(str(error))
        sys.exit(1)


class Workers:
    """The processes that filter a run's files, one a file; who dies or hangs is replaced."""

    def __init__(self, run):
        self.run, self.context = run, multiprocessing.get_context(bpe.START_METHOD)
        self.errors, self.active = self.context.SimpleQueue(), {}  # {file: (process, shared)}
        self.careful, self.deaths = set(), Counter()  # files with a death, deaths at each record

    def filter_files(self, files):
        """Keeps num_workers processes at work until each of the numbered files is done."""
        run, states = self.run, {n: Shard(self.run.parts, n).state for n in files}
        self.waiting = [n for n in files if not states[n]["done"]][::-1]
        done = {n: state["place"][0] for n, state in states.items()}
        documents = Counter()
        line = bpe.Progress("filter", sum(run.sizes[n] for n in files), "bytes",
                            done=sum(done.values()))
        try:
            while (self.waiting and not run.stop) or self.active:
                while self.waiting and not run.stop and len(self.active) < run.args.num_workers:
                    self.start(self.waiting.pop())
                time.sleep(0.02)
                for number, (process, shared) in list(self.active.items()):
                    done[number], documents[number, process.pid] = int(shared[0]), int(shared[3])
                    if run.stop:
                        process.terminate()
                    self.watch(number, process, shared)
                rate = documents.total() / (time.perf_counter() - line.started)
                line.name = f"filter, {documents.total():,} documents, {rate:,.0f} a second"
                line.update(sum(done.values()))
        finally:
            for process, _ in self.active.values():
                process.terminate()
            for process, _ in self.active.values():
                process.join(10)
                process.kill()
        line.close()

    def start(self, number):
        run, shared = self.run, self.context.Array("d", [0, -1, time.monotonic(), 0], lock=False)
        process = self.context.Process(target=work, args=(
            number, run.inputs[number], run.judge, run.parts, shared, self.skipped(number),
            number in self.careful, self.errors))
        process.start()
        self.active[number] = process, shared

    def skipped(self, number):
        """Returns the places of records that killed their worker, of one file."""
        path = self.run.parts / f"{number:05d}.skip"
        return json.loads(path.read_text()) if path.exists() else []

    def watch(self, number, process, shared):
        """Sees to one worker: at work, done, stuck, or dead."""
        stuck = shared[1] >= 0 and time.monotonic() - shared[2] > STUCK_S
        if process.is_alive() and not stuck:
            return
        if stuck:
            process.kill()
        process.join()
        del self.active[number]
        if process.exitcode == 1:
            message = "see above" if self.errors.empty() else self.errors.get()
            raise OSError(f"{self.run.inputs[number]}: {message}")
        if self.run.stop or process.exitcode == 0 and Shard(self.run.parts, number).state["done"]:
            return
        self.waiting.append(number)
        if process.exitcode:
            self.note_death(number, (int(shared[0]), int(shared[1])), stuck)

    def note_death(self, number, place, stuck):
        """A worker died: its file is read with care, then the record that kills again is left."""
        if number not in self.careful:
            self.careful.add(number)
            return
        self.deaths[number, place] += 2 if stuck else 1
        if self.deaths[number, place] > 1 and place[1] >= 0:
            bpe.write_atomically(self.run.parts / f"{number:05d}.skip", json.dumps(
                [*self.skipped(number), list(place)]).encode())
            print(f"{self.run.inputs[number]}: the record at {place} killed its worker; skipped",
                  flush=True)
        elif self.deaths[number, place] > 3:
            raise OSError("a worker must live, got one that died thrice before its first record of "
                          f"{self.run.inputs[number]}; see the system's log")


# ---------------------------------------------------------------- inputs

COMMON_CRAWL = "https://data.commoncrawl.org/"
DOWNLOAD_TRIES = 100
UNANSWERED_TRIES = 5  # of a server that never gave an answer


@contextmanager
def open_input(path, mode="rb", **settings):
    """A file to read, through gzip where its name ends in .gz.  raises: ValueError if it is cut"""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, mode, **settings) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file, got: {error}; copy it again") from None


def listed_paths(item):
    """Yields what a list of paths, a file or an address, names: a local copy, whole or by its last
    part beside the list, before the net is asked."""
    with (tempfile.TemporaryDirectory() as folder,
          open_input(fetch_input(item, Path(folder), 1), "rt", encoding="utf-8") as file):
        for line in filter(None, map(str.strip, file)):
            beside = [Path(line), Path(item).parent / line, Path(item).parent / Path(line).name]
            here = next((str(path) for path in beside if path.is_file()), None)
            yield here or (line if "://" in line else COMMON_CRAWL + line)


def list_inputs(inputs):
    """Returns the files that --input names: paths, patterns, folders, addresses, lists of paths.

    A list ends in .paths or .paths.gz, one path of Common Crawl a line, as in wet.paths.gz.
    raises: ValueError if one of them names none
    """
    found = []
    for item in inputs:
        before = len(found)
        is_address = re.match(r"https?://", item)
        if item.endswith((".paths", ".paths.gz")) and (is_address or os.path.isfile(item)):
            found += listed_paths(item)
        elif is_address:
            found.append(item)
        elif os.path.isdir(item):
            found += sorted(str(path) for path in Path(item).rglob("*")
                            if re.search(r"\.(?:warc|wet)(?:\.gz)?$", path.name))
        else:
            found += [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        if len(found) == before:
            raise ValueError(f"--input must name WARC or WET files, got none for {item}; check the "
                             "path, and put a pattern in quotes")
    return list(dict.fromkeys(found))


def fetch_input(path, folder, num_workers):
    """Returns the path of an input, fetched if it is an address; goes on where that stopped.

    After a refusal (403, 429, 5xx) all workers together ask at most once a second.
    raises: OSError if trying on is of no use
    """
    if "://" not in path:
        return Path(path)
    import requests

    name = hashlib.sha256(path.encode()).hexdigest()[:12] + "-" + path.rsplit("/", 1)[1]
    local, part, answered = folder / name, folder / f"{name}.part", False
    for attempt in range(DOWNLOAD_TRIES):
        if local.exists():
            break
        try:
            bpe.download_rest(requests, path, part)
            os.replace(part, local)
        except (OSError, requests.RequestException) as error:
            reply = getattr(error, "response", None)
            answered = answered or reply is not None or part.exists()
            tries = DOWNLOAD_TRIES if answered else UNANSWERED_TRIES
            if isinstance(error, ValueError) or reply is not None and (
                    400 <= reply.status_code < 500 and reply.status_code not in (403, 429)):
                tries = 0  # no address, or nothing there
            if attempt + 1 >= tries:
                raise OSError(f"{path} must be reachable, got {error}; what came is kept, run "
                              "again, or give a local copy") from None
            wait_s = min(60, num_workers * (1 + attempt))
            print(f"{path}: {error}; try {attempt + 2} of {tries} in {wait_s} s", flush=True)
            time.sleep(wait_s)
    return local


# ---------------------------------------------------------------- the run: many files

RUN_FILES = ("parts", "clean.txt", "kept.jsonl", "dropped.jsonl", "tokenizer.json", "tokens.bin",
             "tokens.json", "tokens.bin.parts", "report.json", "report.txt")  # beside plan.json
# Flags that a run may go on with others of: the stages over all documents are always done anew.
LATE_FLAGS = ("input", "out_dir", "num_workers", "overwrite", "verb", "function", "tokenizer",
              "vocab_size", "no_line_dedup", "no_copies", "num_hashes", "num_bands", "ngrams",
              "jaccard_threshold", "decontaminate", "decontaminate_ngram")


FILE_FLAGS = ("language_model", "nsfw_model", "toxic_model", "quality_model", "blocklist")


def with_digest(path):
    """Returns a path and a hash of what is in the file: under one name it may be another one."""
    with open(path, "rb") as file:
        return [path, hashlib.file_digest(file, "blake2b").hexdigest()[:16]]


class Run:
    """A run, from its inputs to its report; `run` is the order of it."""

    def __init__(self, args):
        self.args, self.started, self.stop, self.lock = args, time.monotonic(), [], None
        self.out_dir, self.parts = Path(args.out_dir), Path(args.out_dir) / "parts"
        self.rank, self.world = (int(os.environ.get(name, default)) for name, default in
                                 (("RANK", 0), ("WORLD_SIZE", 1)))
        if self.world > 1:
            threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
        self.inputs = list_inputs(args.input)
        self.sizes = [os.path.getsize(p) if "://" not in p else 0 for p in self.inputs]
        self.tokenizer = check_tokenizer(args)
        check_late_flags(args)
        for path in self.inputs:  # a foreign file is known at once
            if "://" not in path:
                next(read_records(path), None)
        self.judge, self.funnel = Judge(args), Funnel()
        self.grams = None if self.rank else contamination_grams(args.decontaminate,
                                                                args.decontaminate_ngram)

    def run(self):
        """Filters files, then all documents together; returns 0, or 128 + a signal."""
        self.prepare()
        before = [signal.signal(number, lambda number, frame: self.stop.append(number))
                  for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            Workers(self).filter_files(range(self.rank, len(self.inputs), self.world))
        finally:  # the rest may end anywhere, and is then done anew
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
        if self.stop:
            print(f"signal {self.stop[0]}: stopped; the same command goes on")
            return 128 + self.stop[0]
        self.barrier()
        self.finish()
        return 0

    def prepare(self):
        """Makes the folder, keeps others out of it, and checks that it is of the same run."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.out_dir, self.rank, self.world)
        except OSError as error:
            raise ValueError(f"--out_dir must be a folder to write into, got {self.out_dir} "
                             f"({error.strerror}); choose another") from None
        plan = json.loads(json.dumps({
            "inputs": [*zip(self.inputs, self.sizes, strict=True)],
            "flags": {k: with_digest(v) if v and k in FILE_FLAGS else v
                      for k, v in vars(self.args).items() if k not in LATE_FLAGS}}))
        self.barrier()  # until no rank of an earlier run is at work there
        if self.rank == 0:
            self.claim_folder(plan)
            self.parts.mkdir(exist_ok=True)
        self.barrier()  # the others look, and work, where the first has made room
        path = self.out_dir / "plan.json"
        old = json.loads(path.read_text()) if path.exists() else {"flags": {}}
        if old != plan:
            differs = [k for k in plan["flags"] if plan["flags"][k] != old["flags"].get(k)]
            raise ValueError(f"{self.out_dir} must be of this run, got one with other "
                             f"{', '.join(differs) or 'inputs'}; give the same, --overwrite or "
                             "another --out_dir")

    def claim_folder(self, plan):
        """Makes the folder this run's, if it is no one's; plan.json says whose files are in it."""
        path = self.out_dir / "plan.json"
        foreign = [] if path.exists() else [
            name for name in RUN_FILES if (self.out_dir / name).exists()]
        if foreign:
            raise ValueError("--out_dir must be new or a run's, which has a plan.json, got "
                             f"{self.out_dir} with a {foreign[0]} not of a run; choose another")
        if self.args.overwrite:
            remove_run(self.out_dir)
        if not path.exists():
            bpe.write_atomically(path, json.dumps(plan, indent=1).encode())

    def barrier(self):
        """Waits for the other ranks, where there are any."""
        if self.world > 1:
            import torch.distributed as dist
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(days=30))
            dist.barrier()

    # ------------------------------------------------------------ all documents together

    def finish(self):
        """The stages over all documents, their text, its tokens and the report."""
        shards = [Shard(self.parts, n) for n in range(len(self.inputs))]
        for shard in shards:
            self.funnel.add(shard.state["stages"])
        self.check_not_empty(shards)
        folder = self.parts / "documents"
        paths = [shard.paths[0] for shard in shards]
        if self.rank == 0:
            self.write_documents(paths if self.args.no_line_dedup else self.drop_lines(paths),
                                 folder)
        self.barrier()
        documents = [folder / f"{path.stem}.jsonl" for path in paths]
        survivor = None if self.args.no_copies else self.find_copies(documents)
        self.barrier()  # the first rank removes what the others compared
        if self.rank == 0:
            self.write_text(documents, survivor)
            self.check_not_empty(shards)
            tokens = self.make_tokens()
            report = self.report(shards) | {"tokens": tokens}  # its time is all that has passed
            print(write_report(report, self.out_dir))
            (self.parts / "lines" / "done").unlink(missing_ok=True)  # first, should this be killed
            for name in ("lines", "documents", "copies"):  # other forms of text that is kept
                shutil.rmtree(self.parts / name, ignore_errors=True)

    def drop_lines(self, paths):
        """Returns files without the lines that occur more than once anywhere, blank ones apart:
        those are ends of paragraphs."""
        started, folder = time.perf_counter(), self.parts / "lines"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            exact_line_deduplication(paths, folder, keep_blank=True)
            (folder / "done").touch()
        without = [folder / path.name for path in paths]
        for before, after in zip(paths, without, strict=True):
            for (notes, text), (_, left) in zip(read_shard(before), read_shard(after), strict=True):
                self.funnel.count("lines", notes["url"], text, left)
        self.funnel.stage("lines")["seconds"] = time.perf_counter() - started
        return without

    def write_documents(self, shards, folder):
        """Writes what is long enough as .jsonl files, whose lines are documents."""
        folder.mkdir(exist_ok=True)
        long_enough = [pair for rules in self.judge.rules.values() for pair in rules
                       if pair[0] is word_count][:1]
        with open(self.out_dir / "dropped.jsonl", "w", encoding="utf-8") as self.dropped:
            for shard in shards:
                path, new = folder / f"{shard.stem}.jsonl", folder / "new"
                with open_whole(new) as file:
                    for notes, text in read_shard(shard):
                        short = not text.strip() or apply_rules(text, long_enough)[1]
                        if self.stays("short", "too short without its repeated lines", short,
                                      notes, text):
                            file.write(json.dumps(notes | {"text": text}).encode() + b"\n")
                if not path.exists() or not filecmp.cmp(path, new, shallow=False):
                    os.replace(new, path)  # else it stays, with its signatures

    def find_copies(self, paths):
        """Returns for each document in order the one that stays of its near copies."""
        started, args = time.perf_counter(), self.args
        _, survivor = find_near_duplicates(
            paths, self.parts / "copies", args.num_hashes, args.num_bands, args.ngrams,
            args.jaccard_threshold, args.num_workers, rank=self.rank, ranks=self.world,
            barrier=self.barrier, progress=self.rank == 0)
        self.funnel.stage("copies")["seconds"] = time.perf_counter() - started
        return survivor

    def stays(self, stage, reason, wrong, notes, text):
        """Counts a document in a stage; returns whether nothing is wrong with it."""
        self.funnel.count(stage, notes["url"], text, text, reason if wrong else None)
        if self.funnel.sample:
            self.dropped.write(json.dumps(notes | self.funnel.sample) + "\n")
        return not wrong

    def write_text(self, paths, survivor):
        """Writes clean.txt and kept.jsonl: the documents that stay, in the order of the inputs."""
        args, grams, start = self.args, self.grams, 0
        with (open_whole(self.out_dir / "clean.txt") as clean,
              open_whole(self.out_dir / "kept.jsonl") as kept,
              open(self.out_dir / "dropped.jsonl", "a", encoding="utf-8") as self.dropped):
            for number, line in enumerate(chain.from_iterable(map(open_lines, paths))):
                notes = json.loads(line)
                text = notes.pop("text")
                if survivor is not None and not self.stays(
                        "copies", "near copy of an earlier one", survivor[number] != number, notes,
                        text):
                    continue
                if grams and not self.stays(
                        "contamination", "shares words with the validation text",
                        not grams.isdisjoint(gram_hashes(text, args.decontaminate_ngram)), notes,
                        text):
                    continue
                data = text.encode()
                clean.write(data + bpe.END_OF_TEXT.encode())
                kept.write(json.dumps(notes | {"start": start, "bytes": len(data)}).encode()
                           + b"\n")
                start += len(data) + len(bpe.END_OF_TEXT)

    def make_tokens(self):
        """Returns what write_tokens says of tokens.bin, made with a tokenizer given or trained."""
        text, tokenizer = self.out_dir / "clean.txt", self.tokenizer
        if tokenizer is None:
            vocab, merges = bpe.train_bpe(text, self.args.vocab_size, [bpe.END_OF_TEXT],
                                          self.args.num_workers)
            tokenizer = bpe.Tokenizer(vocab, merges, [bpe.END_OF_TEXT])
        tokenizer.save(self.out_dir / "tokenizer.json")
        return bpe.write_tokens([text], tokenizer, self.out_dir / "tokens.bin",
                                self.args.num_workers)

    def check_not_empty(self, shards):
        """Raises ValueError that names stage and reason if a stage dropped everything."""
        if not self.funnel.stage("records")["documents_in"]:
            others = sum((Counter(shard.state["others"]) for shard in shards), Counter())
            raise ValueError("the inputs must hold documents, got records of other kinds only "
                             f"({dict(others)}); give WARC or WET files")
        for name, stage in self.funnel.stages.items():
            if stage["documents_in"] and not stage["documents_out"]:
                worst = sorted(stage["reasons"].items(), key=lambda item: -item[1]["documents"])
                write_report(self.report(shards), self.out_dir)
                raise ValueError(
                    f"a stage must keep a document, got none of {stage['documents_in']:,} after "
                    f"{name} ("
                    + ", ".join(f"{reason}: {entry['documents']:,}" for reason, entry in worst[:3])
                    + f"); see {self.out_dir}/report.txt, loosen it, and give --overwrite")

    def report(self, shards):
        """Returns what report.json holds."""
        stages = []
        for name in STAGES:
            if (stage := self.funnel.stages.get(name)) and stage["documents_in"]:
                dropped = sum(entry["characters"] for entry in stage["reasons"].values())
                stages.append({"stage": name} | stage | {
                    "seconds": round(stage["seconds"], 3), "characters_dropped": dropped,
                    "characters_changed":
                        stage["characters_out"] - stage["characters_in"] + dropped})
        n_bytes = sum(shard.state["bytes"] for shard in shards)
        # of the files at work side by side, then of all documents together, which the clock timed
        seconds = [sum(stage["seconds"] for stage in stages if together == (
            stage["stage"] in STAGES_TOGETHER)) for together in (False, True)]
        busy_s = seconds[0] / self.args.num_workers / self.world + seconds[1]
        per_file_h = WET_BYTES * busy_s / max(n_bytes, 1) / 3600
        return {"inputs": len(self.inputs), "bytes_in": n_bytes,
                "other_records": sum((Counter(s.state["others"]) for s in shards), Counter()),
                "stages": stages, "tokens": None, "methods": self.judge.methods,
                "wall_seconds": round(time.monotonic() - self.started, 2),
                "hours": {f"{files} files of 70 MB": round(files * per_file_h, 1)
                          for files in (5000, 100_000)}}


def end_with_parent(parent):
    """Ends this process when its parent has: ranks whose torchrun was killed would wait for each
    other for ever, and keep the folder's lock."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def lock_folder(out_dir, rank, ranks=1):
    """Returns the file whose lock keeps other runs out; waits up to 20 s for the workers of a
    killed run to end, and raises ValueError if one lives. The first looks after those too of the
    ranks that a run with more of them had."""
    earlier = [path for path in out_dir.glob("lock.*") if rank == 0
               and path.suffix[1:].isdigit() and int(path.suffix[1:]) >= ranks]
    for path in (*earlier, out_dir / f"lock.{rank}"):
        file = open(path, "a")  # noqa: SIM115, it is held as long as the run lives
        try:
            import fcntl
        except ImportError:
            continue
        for _ in range(200):
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            file.close()
            raise ValueError(f"--out_dir must be of one run at a time, got {out_dir}, in which "
                             "another is at work; wait for it")
    return file


def remove_run(out_dir):
    """Removes what a run left, and nothing else; plan.json, which says that it did, last."""
    for name in (*RUN_FILES, "plan.json"):
        for path in (*out_dir.glob(f"{name}*.tmp"), out_dir / name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


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


def check_late_flags(args):
    """Raises ValueError now for what later stages would find wrong, or not at all."""
    MinHash(args.num_hashes, args.num_bands, args.ngrams)
    check_jaccard_threshold(args.jaccard_threshold)
    for name in ("language_score", "harm_score", "quality_score"):
        if not (score := getattr(args, name)) >= 0:
            raise ValueError(f"--{name} must be 0 or more, got {score}; correct it")
    if args.decontaminate and not Path(args.decontaminate).is_file():
        raise ValueError(f"--decontaminate must be a file of text, got {args.decontaminate}; check "
                         "the path")
    for name in RUN_FILES if args.decontaminate else ():
        check_output(Path(args.out_dir) / name, [args.decontaminate])
    if args.decontaminate_ngram < 1:
        raise ValueError("--decontaminate_ngram must be at least 1 word, got "
                         f"{args.decontaminate_ngram}; GPT-3 took 13")


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


def gram_hashes(text, n):
    """Yields a 64-bit hash of each n words in a row, case and punctuation aside."""
    words = WORD.findall(text.lower())
    for i in range(len(words) - n + 1):
        yield hash_bytes(" ".join(words[i:i + n]).encode())


def contamination_grams(path, n):
    """Returns the set of n-gram hashes of a validation text, or None where no path is given.
    raises: ValueError if it has none: a file of tokens, or without documents of n words"""
    if not path:
        return None
    if path.endswith((".jsonl", ".jsonl.gz")):
        texts = read_texts(path)
    else:
        with open_input(path, "rt", encoding="utf-8", errors="replace") as file:
            texts = [*documents_of(file)]
    grams = {gram for text in texts if "\0" not in text for gram in gram_hashes(text, n)}
    if not grams:
        raise ValueError(f"--decontaminate must be text with {n} words in a row, got {path} "
                         "without; name a text or .jsonl, plain or .gz")
    return grams


# ---------------------------------------------------------------- the report

WET_BYTES = 70_000_000  # of a Common Crawl WET file, gzip, about


def write_report(report, out_dir):
    """Writes report.json and report.txt; returns the text."""
    bpe.write_atomically(out_dir / "report.json",
                         json.dumps(report, indent=1, ensure_ascii=False).encode())
    table = report_table(report)
    bpe.write_atomically(out_dir / "report.txt", table.encode())
    return table


def report_table(data):
    """Returns the funnel as text: a line a stage, and under it one a reason."""
    first = data["stages"][0]["documents_in"] if data["stages"] else 1

    def row(name, documents, characters, seconds="", sign=""):
        return (f"{name[:43]:<44}{documents:>{sign}12,}{documents / first:>9.1%}"
                f"{characters:>{sign}16,}{seconds:>10}")

    lines = [f"{'stage':<44}{'documents':>12}{'share':>9}{'characters':>16}{'seconds':>10}"]
    for stage in data["stages"]:
        lines.append(row(f"{stage['stage']} in", stage["documents_in"], stage["characters_in"],
                         f"{stage['seconds']:.2f}"))
        for reason, entry in sorted(stage["reasons"].items(),
                                    key=lambda item: -item[1]["documents"]):
            lines.append(row(f"  - {reason}", -entry["documents"], -entry["characters"]))
        if stage["characters_changed"]:
            lines.append(f"{'  changed in what stays':<65}{stage['characters_changed']:>+16,}")
    if data["stages"]:
        last = data["stages"][-1]
        lines.append(row("kept", last["documents_out"], last["characters_out"]))
    if data["tokens"]:
        lines.append(f"{data['tokens']['tokens']:,} tokens of {data['tokens']['bytes']:,} bytes")
    lines.append("judged by: " + ", ".join(f"{k} {v}" for k, v in data["methods"].items()))
    lines.append("characters of records, and of what comes into text, are bytes")
    lines.append(f"{data['bytes_in']:,} bytes of {data['inputs']} files in {data['wall_seconds']}"
                 " s; by the seconds of the stages, without tokens: "
                 + ", ".join(f"{k} {v} h" for k, v in data["hours"].items())
                 + (" (most of it the start: so little says little)"
                    if data["bytes_in"] < WET_BYTES / 10 else ""))
    return "\n".join(lines)


# ---------------------------------------------------------------- verbs

def run(args):
    """WARC or WET files to clean text and tokens."""
    for idle, where, names in (
            (args.no_harm, "--no_harm", "nsfw_model toxic_model harm_score"),
            (args.languages == "any", "--languages any", "language_model language_score"),
            (not args.quality_model, "no --quality_model", "quality_label quality_score"),
            (args.no_copies, "--no_copies", "num_hashes num_bands ngrams jaccard_threshold"),
            (not args.decontaminate, "no --decontaminate", "decontaminate_ngram")):
        refuse_unused(args, where, names.split() if idle else ())
    args.languages = [code for code in re.split("[, ]+", args.languages) if code not in ("", "any")]
    args.rules = [name for name in re.split("[, ]+", args.rules) if name not in ("", "none")]
    args.num_workers = bpe.default_workers(args.num_workers)
    job = Run(args)
    try:
        return job.run()
    finally:
        if job.lock:
            job.lock.close()


def extract(args):
    """The text of HTML files, or of every page of WARC and WET files."""
    named = [path for item in args.input for path in (
        [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True)) or [item])]
    for path in bpe.list_files(named):
        if not re.search(r"\.(?:warc|wet)\b", path.name):
            with open_input(path) as file:
                print(extract_text_from_html_bytes(file.read(), args.mode))
            continue
        for record in read_records(path):
            print(f"{DOCUMENT_MARK}{record.url}\t{record.problem or ''}".rstrip())
            if not record.problem:
                print(record_text(record, args.mode))


def inspect(args):
    """Kept and dropped documents of a run, drawn by --seed, and why."""
    out_dir, rng = Path(args.out_dir), random.Random(args.seed)
    if (least := min(args.kept, args.dropped, args.chars)) < 0:
        raise ValueError(f"--kept, --dropped, --chars must be 0 or more, got {least}; correct it")
    if not (out_dir / "kept.jsonl").exists():
        raise ValueError(f"--out_dir must hold a finished run, got {out_dir}; run it first")

    def show(notes, verdict, text):
        rest = {k: v for k, v in notes.items() if k not in ("url", "text", "reason", "start", "id")}
        print(f"--- {verdict} | {notes['url']} | {json.dumps(rest)}\n{text[:args.chars]}\n")

    kept = [json.loads(line) for line in open_lines(out_dir / "kept.jsonl")]
    with open(out_dir / "clean.txt", "rb") as text:
        for notes in rng.sample(kept, min(args.kept, len(kept))):
            text.seek(notes["start"])
            show(notes, "kept", text.read(notes["bytes"]).decode())
    paths = [*sorted((out_dir / "parts").glob("*.dropped.jsonl")), out_dir / "dropped.jsonl"]
    dropped = [json.loads(line) for path in paths for line in open_lines(path)
               if b'"text": ' in line]  # of the others only the reason is kept
    dropped = [sample for sample in dropped if (args.reason or "") in sample["reason"]]
    for sample in rng.sample(dropped, min(args.dropped, len(dropped))):
        show(sample, f"dropped, {sample['reason']}", sample["text"])


def refuse_unused(args, where, names):
    """Raises ValueError if a flag that has no use there is not at its default."""
    needed = {"dedup": ["--out_dir=-", "--input=-"], "run": ["--input=-"]}.get(args.verb, [])
    defaults = build_parser().parse_args([args.verb, *needed])
    for name in names:
        if (value := getattr(args, name)) != getattr(defaults, name):
            raise ValueError(f"--{name} must have a use, got {value} with {where}; leave it out")


def check_output(output, inputs):
    """Raises ValueError if a file to write is one of those that are read."""
    if output and os.path.exists(output) and any(
            os.path.exists(path) and os.path.samefile(path, output) for path in inputs):
        raise ValueError(f"an output must not be an input, got {output} as both; name another")


TRAINING = {name: default for name, default in train_fasttext.__kwdefaults__.items()
            if name not in ("lower", "seed", "progress")}


def read_texts(path):
    """Yields the texts of a file: "text" of each line of a .jsonl(.gz), else what <|endoftext|>
    parts, as in a run's clean.txt, else its lines."""
    path = Path(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (text for _, text in bpe.read_jsonl(path, "replace"))
        return
    with open_input(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
        parted = file.seekable() and any(bpe.END_OF_TEXT in line for line in file)
        if file.seekable():
            file.seek(0)
        texts = documents_of(file) if parted else (line.rstrip("\n") for line in file)
        yield from (text for text in texts if text.strip())


def documents_of(lines):
    """Yields what <|endoftext|> parts."""
    begun = []
    for line in lines:
        *ended, rest = line.split(bpe.END_OF_TEXT)
        for part in ended:
            yield "".join(begun) + part
            begun = []
        begun.append(rest)
    yield "".join(begun)


def train_classifier(args):
    """Trains on 9 in 10 texts of two files, measures on the rest, saves model and notes."""
    started, parts = time.perf_counter(), ([], [])
    for path, label in zip(args.train, args.labels, strict=True):
        for text in read_texts(path):
            held_out = hash_bytes(text.encode("utf-8", "replace"))[0] % 10 == 0
            parts[held_out].append((text, label))
    train_texts, train_labels = zip(*parts[0], strict=True) if parts[0] else ((), ())
    settings = {name: getattr(args, name) for name in TRAINING}
    model, counts = train_fasttext(train_texts, train_labels, seed=args.seed, progress=True,
                                   lower=not args.cased, **settings)
    model.save(args.model, counts)
    answers = model.predict([text for text, _ in parts[1]], k=-1)
    scores = [dict(zip(*answer, strict=True)).get(args.labels[0], 0.5) for answer in answers]
    auc = area_under_curve(scores, [label == args.labels[0] for _, label in parts[1]])
    notes = {"lower": not args.cased, "labels": args.labels, "texts": len(parts[0]), "held_out":
             len(parts[1]), "auc": None if math.isnan(auc) else round(auc, 4), **settings}
    bpe.write_atomically(f"{args.model}.json", (json.dumps(notes) + "\n").encode())
    print(f"{args.model}: {len(parts[0]):,} texts, {len(counts):,} words | AUC {auc:.4f} on "
          f"{len(parts[1]):,} held out | {time.perf_counter() - started:.1f} s")


def classify(args):
    """Labels texts, or trains a classifier of two files of texts."""
    refuse_unused(args, *(("--train", ("kind", "text", "input", "out")) if args.train else (
        "no --train", ("labels", "cased", "seed", *TRAINING))))
    if args.text is not None and args.input:
        raise ValueError("classify must have --text or --input, got both; leave one out")
    if args.train:
        if not args.model:
            raise ValueError("classify --train must have --model, got none; name the .bin to write")
        check_output(args.model, args.train)
        return train_classifier(args)
    classifier = load_classifier(args.kind, args.model)
    if args.text is None and not args.input:
        raise ValueError("classify must have --text, --input or --train, got none; give one")
    print(f"method: {classifier.method}", file=sys.stderr)
    files = bpe.list_files(args.input) if args.input else []
    check_output(args.out, files)
    texts = [args.text] if args.text is not None else chain.from_iterable(map(read_texts, files))
    counts, seconds, n_bytes = Counter(), 0.0, 0
    with open(args.out, "w", encoding="utf-8") if args.out else nullcontext() as out:
        for batch in batches(texts, BATCH_BYTES):
            started = time.perf_counter()
            answers = classifier.predict(batch)
            seconds += time.perf_counter() - started
            n_bytes += sum(len(text.encode("utf-8", "replace")) for text in batch)
            counts.update(label for label, _ in answers)
            for text, (label, score) in zip(batch, answers, strict=True):
                print(json.dumps({"text": text, "label": label, "score": score}, ensure_ascii=False)
                      if out else f"{label}\t{score:.6f}\t{' '.join(text.split())[:60]}", file=out)
    print(f"{sum(counts.values()):,} texts: {dict(counts.most_common())} | "
          f"{n_bytes / 1e6 / max(seconds, 1e-9):.2f} MB/s", file=sys.stderr)


def dedup(args):
    """Drops lines that occur more than once, or all but one of near-duplicate documents."""
    files, started = bpe.list_files(args.input), time.perf_counter()
    check_output(args.report, files)
    if args.how == "lines":
        refuse_unused(args, "--how lines", ("num_hashes", "num_bands", "ngrams", "num_workers",
                                            "jaccard_threshold", "report", "work_dir"))
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


# ---------------------------------------------------------------- bench

def bench_texts(count, words, seed=0):
    """Returns random texts of words as frequent as in real ones: the n-th in 1 / n of places, in
    sentences of 15 words and paragraphs of 60."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = [*STOP_WORDS, *("".join(letters[(rng.random(rng.integers(2, 11)) ** 2 * 26)
                                                 .astype(int)]) for _ in range(30_000))]
    ranks = np.exp(rng.random((count, words)) * math.log(len(vocabulary))).astype(int)
    ends = ["." * (not i % 15) + ("\n\n" if not i % 60 else " ") for i in range(1, words + 1)]
    return ["".join(map(str.__add__, map(vocabulary.__getitem__, row), ends)).strip()
            for row in ranks]


def bench_page(text):
    """Returns an HTML page of a text's paragraphs, among as much markup as pages have."""
    menu = "".join(f'<li class="menu-item item-{n}"><a href="/section/{n}">Section {n}</a></li>'
                   for n in range(40))
    paragraphs = "".join(f'<p class="text">{p} <a href="/more">See <b>this</b></a>.</p>\n'
                         for p in text.split("\n\n"))
    return (f"<!doctype html><html><head><title>Title</title><style>{'p { margin: 0 } ' * 200}"
            f"</style></head><body><nav><ul>{menu}</ul></nav><main><article><h1>Title</h1>"
            f"{paragraphs}</article></main><script>{'let a = 1; ' * 800}</script>"
            f"<footer><ul>{menu}</ul></footer></body></html>").encode()


def bench_archive(path, kind, content_type, bodies):
    """Writes an archive, a gzip member for each body; returns its size in MB."""
    path.write_bytes(b"".join(gzip.compress(
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://example.com/{n}\r\nContent-Type:"
        f" {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n")
        for n, body in enumerate(bodies)))
    return path.stat().st_size / 1e6


def check_before_bench(texts, model, minhash):
    """Compares what is timed with plainer ways to the same, and with the right answers."""
    page = extract_text_from_html_bytes(bench_page(texts[0]), "main")
    assert page.count("See this") == len(texts[0].split("\n\n")) and "Section" not in page
    assert model.predict(texts[:5]) == [model.predict([text])[0] for text in texts[:5]]
    assert gopher_quality_filter(texts[0]) and not gopher_quality_filter(texts[0][:200])
    assert mask_phone_numbers(f"{texts[0]} 283-182-3829")[1] == 1
    shingles = minhash.shingle_set(texts[0])
    high = [int(shingle) >> 32 for shingle in shingles]
    assert minhash.signature(shingles).tolist() == [
        min((int(f) * x + int(o)) % 2**32 for x in high)
        for f, o in zip(minhash.factors[:, 0], minhash.offsets[:, 0], strict=True)]


def bench_jobs(texts, folder):
    """Returns {name: (amount of work, its unit a second, function)}."""
    model, _ = train_fasttext(texts[:20], ["a", "b"] * 10, dim=16, word_ngrams=1, minn=2, maxn=4)
    minhash, pages = MinHash(128, 16), [bench_page(text) for text in texts]
    check_before_bench(texts, model, minhash)
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    warc, wet = folder / "a.warc.gz", folder / "a.warc.wet.gz"
    warc_mb = bench_archive(warc, "response", "application/http", [http + page for page in pages])
    wet_mb = bench_archive(wet, "conversion", "text/plain", map(str.encode, texts))
    assert [record.data for record in read_records(warc)] == pages
    options = build_parser().parse_args(["run", "--input", "-"])
    options.languages, options.rules = LANGUAGES, ["gopher"]
    options.language_score, options.harm_score = 0.0, 2.0  # nothing falls: all stages are timed
    judge, rules = Judge(options), list(chain.from_iterable(choose_rules(RULES).values()))

    def funnel():
        with tempfile.TemporaryDirectory(dir=folder) as parts:
            filter_file(0, wet, judge, Path(parts), [0] * 4)
        assert judge.funnel.stages["pii"]["documents_out"] > 0

    text_mb, html_mb = sum(map(len, texts)) / 1e6, sum(map(len, pages)) / 1e6
    return {
        "records": (warc_mb, "MB gz/s", lambda: list(read_records(warc))),
        "text plain": (html_mb, "MB/s", lambda: [*map(extract_text_from_html_bytes, pages)]),
        "text main": (html_mb, "MB/s",
                      lambda: [extract_text_from_html_bytes(page, "main") for page in pages]),
        "language": (text_mb, "MB/s", lambda: [*map(identify_by_rules, texts)]),
        "fasttext": (text_mb, "MB/s", lambda: model.predict(texts)),
        "masks": (text_mb, "MB/s",
                  lambda: [mask_ips(mask_phone_numbers(mask_emails(t)[0])[0]) for t in texts]),
        "all rules": (text_mb, "MB/s",
                      lambda: [rule(Document(t), **s) for t in texts for rule, s in rules]),
        "word list": (text_mb, "MB/s", lambda: [word_list_score(t, TOXIC_WORDS) for t in texts]),
        "minhash": (len(texts), "documents/s", lambda: [minhash.keys(text) for text in texts]),
        "wet funnel": (wet_mb, "MB gz/s", funnel)}


def bench(args):
    """Times each stage on random texts, and the funnel on a WET file of them."""
    texts = bench_texts(args.documents, 1261)
    print(f"{len(texts)} texts of 1,261 words, one process, {args.repeats} repeats after one that "
          "fills caches; a second of CPU time")
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (amount, unit, job) in bench_jobs(texts, Path(folder)).items():
            rates = []
            for _ in range(args.repeats + 1):
                started = time.process_time()
                job()
                rates.append(amount / (time.process_time() - started))
            first, *rates = rates
            result[name] = round(float(np.median(rates)), 2)
            print(f"{name:<12}{result[name]:>10,.2f} {unit:<12} ({min(rates):,.2f} to "
                  f"{max(rates):,.2f}, first {first:,.2f})")
    print(json.dumps(result))


# ---------------------------------------------------------------- the command line

def add_run_flags(add):
    add("--input", nargs="+", required=True,
        help="files, patterns, folders, addresses, or lists of paths (wet.paths.gz)")
    add("--out_dir", default="clean")
    add("--mode", choices=("main", "plain"), default="main", help="what is taken of a page")
    add("--languages", default="en", help="codes to keep, with commas, or any")
    add("--language_model", help="a fastText file, lid.176.bin or .ftz")
    add("--language_score", type=float, default=0.5)
    add("--rules", default="gopher", help=f"of {', '.join(RULES)}, with commas, or none")
    add("--threshold", nargs="*", default=[], help="like word_count.low=30")
    add("--no_harm", action="store_true", help="keep NSFW and toxic text")
    add("--nsfw_model", help="a fastText file")
    add("--toxic_model", help="a fastText file")
    add("--harm_score", type=float, default=0.5)
    add("--quality_model", help="a fastText file, as classify --train makes")
    add("--quality_label", default="wiki", help="the model's label of good text")
    add("--quality_score", type=float, default=0.5)
    add("--no_pii", action="store_true", help="leave personal data as it is")
    add("--blocklist", help="a file of hosts and addresses to drop; # begins a remark")
    add("--no_line_dedup", action="store_true")
    add("--no_copies", action="store_true")
    add_copies_flags(add)
    add("--decontaminate", help="a validation text: documents that share words with it fall")
    add("--decontaminate_ngram", type=int, default=13)
    add("--tokenizer", help="a tokenizer.json or its folder; without, one is trained")
    add("--vocab_size", type=int, default=8192, help="of the tokenizer that is trained")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")


def add_copies_flags(add):
    add("--num_hashes", type=int, default=128)
    add("--num_bands", type=int, default=16)
    add("--ngrams", type=int, default=5, help="words of a shingle")
    add("--jaccard_threshold", type=float, default=0.8)
    add("--num_workers", type=int, help="processes; without it, one a core")


def add_extract_flags(add):
    add("--input", nargs="+", required=True)
    add("--mode", choices=("plain", "main"), default="plain")


def add_inspect_flags(add):
    add("--out_dir", default="clean")
    add("--kept", type=int, default=5)
    add("--dropped", type=int, default=5)
    add("--reason", help="only documents dropped for a reason with these words")
    add("--chars", type=int, default=600, help="shown of each document")
    add("--seed", type=int, default=0)


def add_classify_flags(add):
    add("--kind", choices=CLASSIFIERS, default="quality", help="what to tell without --model")
    add("--model", help="a .bin or .ftz file; with --train the .bin to write")
    add("--text", help="one text to label")
    add("--input", nargs="+", help="files of texts: .jsonl(.gz) with \"text\", a run's "
        "clean.txt, else a line each")
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
    add_copies_flags(add)
    add("--report", help="a .jsonl of what was dropped for what")
    add("--work_dir", help="keep signatures here; the same command goes on from them")
    add("--memory_mb", type=int, default=1024, help="to sort in")


def add_bench_flags(add):
    add("--documents", type=int, default=300)
    add("--repeats", type=int, default=5)


def build_parser():
    """Returns the argparse parser of all verbs."""
    parser = argparse.ArgumentParser(prog="data_filter.py", description=__doc__.split("\n", 1)[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, add_flags in ((run, add_run_flags), (extract, add_extract_flags),
                            (classify, add_classify_flags), (dedup, add_dedup_flags),
                            (inspect, add_inspect_flags), (bench, add_bench_flags)):
        sub = verbs.add_parser(verb.__name__, help=verb.__doc__)
        sub.set_defaults(function=verb)
        add_flags(sub.add_argument)
    return parser


def main(argv=None):
    """Runs the command line; a user's error is one line and exit status 2."""
    args = build_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # print what the terminal's encoding lacks, escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.function(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough; what is left goes nowhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"data_filter.py {args.verb}: error: {(str(error) or repr(error)).splitlines()[0]}",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"data_filter.py {args.verb}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())
