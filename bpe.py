"""Raw text to tokens by byte-level BPE from scratch: train, encode, decode, write files of tokens.

    python bpe.py train  --input corpus.txt --vocab_size 10000 --out_dir tok   # tok/tokenizer.json
    python bpe.py encode --tokenizer tok --input corpus.txt --out corpus.bin   # and corpus.json
    python bpe.py decode --tokenizer tok --input corpus.bin --count 200        # the text again
    python bpe.py bench                                # speed and memory against its rivals

Text is cut into pre-tokens by a pattern, a pre-token is its UTF-8 bytes, and the pair of symbols
that occurs most often becomes a new symbol until the vocabulary is full.

Sources:
    [1] Sennrich, Haddow, Birch 2016, Neural Machine Translation of Rare Words with Subword Units
    [2] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2), 2.2
    [3] Stanford CS336, assignment 1, section 2
    [4] Hugging Face tokenizers, the file format tokenizer.json
"""

import argparse
import contextlib
import gzip
import hashlib
import heapq
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import sys
import sysconfig
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import regex

# The patterns as their models publish them. GPT-4's and Llama 3's differ in spelling only.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "llama3": LLAMA3_PATTERN,
            "qwen2": QWEN2_PATTERN}

# Where any of these lets a text be cut: behind letters, behind numbers, before a space, between
# lines. Surrogates (Cs) stand for bytes that are not understood yet.
SAFE_CUTS = (r"(?<=\p{L})(?=[^\p{L}\p{M}\p{Cs}])", r"(?<=\p{N})(?=[^\p{N}\p{M}\p{Cs}])",
             r"(?<=[^\s\p{Cs}])(?=[^\S\r\n])", r"(?<=[^\s\p{Cs}]\n)(?=[^\s\p{M}\p{Cs}])")

END_OF_TEXT = "<|endoftext|>"
PIECE_BYTES = 4 << 20  # read at a time by a worker
TASK_BYTES = 32 << 20  # counted by a worker before it hands over
MAX_DISTINCT = 1 << 18  # pre-tokens in a worker's counter before it hands over early: about 50 MB
BLOCK_CHARS = 1024  # given to one findall: short enough that most blocks of English are all ASCII
STREAM_CHARS = 1 << 13  # encoded at a time by encode_iterable
CACHE_ENTRIES = 1 << 19  # pre-tokens whose ids an encoder remembers: about 100 MB
CACHED_CHARS = 128  # longer pre-tokens are not worth remembering
LONG_BYTES = 48  # from here on a heap beats scanning for the lowest rank
NO_RANK = 1 << 62
PART_HEADER = struct.Struct("<3q")  # of text bytes, documents ended, last id
# A spawned worker imports the calling script anew, with torch seconds of it; a forked one does not.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
worker_tokenizer = None  # of this process: see start_worker


# ---------------------------------------------------------------- text into pre-tokens

def pretokens(pattern, text):
    """Yields the pre-tokens of `text` in order; what the pattern skips is a pre-token too."""
    end = 0
    for match in regex.finditer(pattern, text):
        if match.start() > end:
            yield text[end:match.start()]
        if match.end() > match.start():
            yield match.group()
        end = match.end()
    if end < len(text):
        yield text[end:]


def ascii_twin(pattern):
    """Returns the pattern for `re` that gives the same pre-tokens of ASCII text, twice as fast.

    Of the known patterns only. `re` has possessive quantifiers since Python 3.11; here the
    plain ones do, because nothing that follows them could match a shorter run.
    """
    twin = re.sub(r"\[[^]]*\]", lambda chars: chars[0].replace(r"\p{L}", "A-Za-z")
                  .replace(r"\p{N}", "0-9"), pattern)
    twin = twin.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
    return twin.replace("?+", "?").replace("++", "+")


@lru_cache
def pretokenizer(pattern):
    """Returns a function text -> iterator of lists that hold the pre-tokens of text in order.

    For a known pattern: blocks of text, each through `findall` (half the time of `finditer`),
    and through `re` where a block is ASCII. Equal to `pretokens`, which serves the others.
    """
    try:
        findall = regex.compile(pattern).findall
    except regex.error as error:
        raise ValueError(f"a pattern must be a regular expression, got {pattern!r} ({error}); "
                         "correct it") from None
    if pattern not in PATTERNS.values():
        return lambda text: [list(pretokens(pattern, text))]
    findall_ascii = re.compile(ascii_twin(pattern), re.ASCII).findall
    find_cut = cut_finder(pattern)

    def blocks(text):
        start = 0
        while start < len(text):
            end = find_cut(text, start + BLOCK_CHARS)
            block = text[start:end] if end > 0 else text[start:]
            yield findall_ascii(block) if block.isascii() else findall(block)
            start += len(block)

    return blocks


def check_special_tokens(special_tokens):
    """Returns them as a list; raises ValueError for an empty one or one given twice."""
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens must be a list, got {special_tokens!r}; put it in one")
    tokens = list(special_tokens or ())
    for token in tokens:
        if not isinstance(token, str) or not token:
            raise ValueError(f"a special token must be text that is not empty, got {token!r}; "
                             "leave it out")
        if tokens.count(token) > 1:
            raise ValueError(f"special tokens must differ, got {token!r} twice; give it once")
    return tokens


@lru_cache
def special_splitter(special_tokens):
    """Returns a function text -> [text, special, text, ..., text]; the longest special wins.

    special_tokens: tuple of str
    """
    if not special_tokens:
        return lambda text: [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split


@lru_cache
def cut_finder(pattern, special_tokens=(), nfc=False):
    """Returns a function (text, start) -> the first safe cut at or after start > 0, or -1.

    A cut is safe where encoding both sides alone gives what encoding the whole gives. In the
    known patterns a pre-token ends with its run of letters, numbers or signs (signs take line
    ends along), and nothing but white space looks ahead, which a single line end does in vain: so
    at SAFE_CUTS, none of which is before a mark; with NFC not behind a letter that it turns into
    letter and mark. In any pattern: before a special token. Never where a special token begins
    before and ends after, whether it would be matched there or not: that is known within
    `longest` characters, whatever came before.

    special_tokens: tuple of str
    """
    candidates = [f"(?={regex.escape(token)})" for token in special_tokens]
    if pattern in PATTERNS.values():
        unchanged = r"(?<!\p{NFC_QC=No})" if nfc else ""
        candidates = [unchanged + cut for cut in SAFE_CUTS] + candidates
    if not candidates:
        return lambda text, start: -1
    search = regex.compile("|".join(candidates)).search
    longest = max(map(len, special_tokens), default=0)

    def find_cut(text, start):
        while match := search(text, start):
            cut = match.start()
            if cut > len(text) - longest:
                return -1
            if not any(token in text[max(0, cut - len(token) + 1):cut + len(token) - 1]
                       for token in special_tokens):
                return cut
            start = cut + 1
        return -1

    return find_cut


# ---------------------------------------------------------------- files into pieces, processes

def plan_pieces(paths, piece_bytes, find_cut, special_tokens):
    """Returns [(path, start, end)] in bytes: the files in order, cut only where it is safe."""
    margin = 4 * max(map(len, special_tokens), default=1) + 4  # bytes of the longest, and more
    pieces = []
    for path in map(os.fspath, paths):
        start, size = 0, os.path.getsize(path)
        with open(path, "rb") as file:
            while start < size:
                end = next_cut(file, start + piece_bytes, size, find_cut, margin)
                pieces.append((path, start, end))
                start = end
    return pieces


def next_cut(file, offset, size, find_cut, margin, window_bytes=1 << 16):
    """Returns the first safe cut at or after byte `offset`, or size; reads only what it must.

    Undecodable bytes, at the ends of the window too, become surrogates and back.
    """
    while offset < size:
        begin = max(0, offset - margin)
        file.seek(begin)
        window = file.read(offset - begin + window_bytes + margin)
        before = window[:offset - begin].decode(errors="surrogateescape")
        text = window.decode(errors="surrogateescape")
        cut = find_cut(text, max(1, len(before)))
        if cut > 0:
            return begin + len(text[:cut].encode(errors="surrogateescape"))
        offset += window_bytes
    return size


def read_piece(path, start, end, errors):
    """Returns the text of bytes [start, end) of a file; raises ValueError where it is not UTF-8."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    try:
        return data.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got byte 0x{data[error.start]:02x} at position "
                         f"{start + error.start}; convert it or use --errors replace") from None


def list_files(inputs, suffixes=None):
    """Returns the files that paths name; of folders all (with these suffixes), sorted."""
    files = []
    for path in map(Path, [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs):
        if not path.exists():
            raise ValueError(f"an input must be a file or a folder, got {path}; check the path")
        files += [path] if path.is_file() else sorted(
            found for found in path.rglob("*")
            if found.is_file() and (suffixes is None or found.suffix in suffixes))
    if not files:
        raise ValueError(f"the input must hold a file, got {inputs}; name other files or folders")
    return files


def files_sha256(paths):
    """Returns the hex hash over the files' sizes and bytes, in order; names and dates are free.

    About 1 GB a second: each byte is read, so that no edit goes unseen.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(b"%d\n" % os.path.getsize(path))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def default_workers(num_workers):
    """Returns num_workers, or for None the CPU cores this process may use."""
    if num_workers is None:
        allowed = getattr(os, "sched_getaffinity", None)  # Linux only
        return len(allowed(0)) if allowed else os.cpu_count() or 1
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}; leave it out")
    return num_workers


def start_worker(tokenizer=None):
    """Leaves Ctrl-C to the parent, ends with the parent even if that is killed, keeps tokenizer."""
    global worker_tokenizer
    worker_tokenizer = tokenizer
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_tasks(function, tasks, num_workers, tokenizer=None):
    """Yields function(*task) for each task as it finishes, in any order.

    tasks: list, taken from its end; the caller may append to it while it iterates. At most one
    task waits beside those that run, so results never pile up.
    """
    if num_workers == 1:
        start_worker(tokenizer)
        while tasks:
            yield function(*tasks.pop())
        return
    context = multiprocessing.get_context(START_METHOD)
    with ProcessPoolExecutor(num_workers, context, start_worker, (tokenizer,)) as pool:
        running = set()
        try:
            while tasks or running:
                while tasks and len(running) <= num_workers:
                    running.add(pool.submit(function, *tasks.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ValueError("all workers must live to the end, got one that was killed, probably "
                             "for memory; use fewer num_workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


class Progress:
    """One line that says how far a long job is: rewritten on a terminal, else every 10 seconds."""

    def __init__(self, name, total, unit, show=True, done=0):
        self.name, self.total, self.unit, self.show, self.before = name, total, unit, show, done
        self.started = self.shown = time.perf_counter()
        self.start, self.end, self.every_s = ("\r", "\033[K", 0.1) if sys.stderr.isatty() else (
            "", "\n", 10)

    def update(self, done):
        """Shows `done` of the total, if the last showing is long enough ago."""
        now = time.perf_counter()
        if self.show and now - self.shown >= self.every_s and done > self.before:
            self.shown = now
            rate = (done - self.before) / (now - self.started)
            eta = int((self.total - done) / rate)
            print(f"{self.start}{self.name} {done:,}/{self.total:,} {self.unit} | {rate:,.0f} "
                  f"{self.unit}/s | eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}",
                  file=sys.stderr, flush=True, end=self.end)

    def close(self):
        """Says what was done in how long."""
        if self.show:
            print(f"{self.start}{self.name}: {self.total:,} {self.unit} in "
                  f"{time.perf_counter() - self.started:.2f} s{self.end.rstrip()}", file=sys.stderr)


def write_atomically(path, data):
    """Writes bytes to `path` so that it never holds a half of them; a device or pipe is written
    into."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # root could replace /dev/null
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- training

def train_bpe_reference(text, vocab_size, special_tokens, pattern=GPT2_PATTERN):
    """Returns what `train_bpe` returns for this text: the definition, recounting every time."""
    words = Counter()
    for part in special_splitter(tuple(special_tokens))(text)[::2]:
        words.update(tuple(bytes([byte]) for byte in word.encode())
                     for word in pretokens(pattern, part))
    merges = []
    while 256 + len(merges) + len(special_tokens) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged_words = Counter()
        for word, count in words.items():
            merged, i = [], 0
            while i < len(word):
                found = word[i:i + 2] == best
                merged.append(best[0] + best[1] if found else word[i])
                i += 2 if found else 1
            merged_words[tuple(merged)] += count
        words = merged_words
    return build_vocab(merges, special_tokens), merges


def build_vocab(merges, special_tokens):
    """Returns {id: bytes}: the 256 bytes, then the merges, then the special tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    return dict(enumerate(tokens + [token.encode() for token in special_tokens]))


def count_pieces(pieces, pattern, special_tokens, errors):
    """Returns (Counter of the pre-tokens, bytes read, the pieces left when it grew too large)."""
    counts, done = Counter(), 0
    blocks, split = pretokenizer(pattern), special_splitter(special_tokens)
    for index, (path, start, end) in enumerate(pieces, 1):
        for part in split(read_piece(path, start, end, errors))[::2]:
            for block in blocks(part):
                counts.update(block)
        done += end - start
        if len(counts) > MAX_DISTINCT:
            return counts, done, pieces[index:]
    return counts, done, []


def count_pretokens(paths, special_tokens, num_workers, pattern, piece_bytes, errors, progress):
    """Returns the Counter of all pre-tokens of the files, counted by `num_workers` processes."""
    find_cut = cut_finder(pattern, special_tokens)
    pieces = plan_pieces(paths, piece_bytes, find_cut, special_tokens)
    offsets = list(accumulate((end - start for _, start, end in pieces), initial=0))
    total = offsets[-1]
    if total < 2:
        raise ValueError(f"the corpus must hold at least 2 bytes, got {total}; give more text")
    if total < PIECE_BYTES:
        num_workers = 1  # starting processes would take longer
    # A task hands over one counter: few tasks, but enough of them to keep all workers busy.
    task_bytes = min(TASK_BYTES, total // (2 * num_workers) + 1)
    groups = {}
    for piece, offset in zip(pieces, offsets, strict=False):
        groups.setdefault(offset // task_bytes, []).append(piece)
    tasks = [(group, pattern, special_tokens, errors) for group in groups.values()]
    counts, done = Counter(), 0
    line = Progress("count", total, "bytes", progress)
    for part, part_bytes, rest in run_tasks(count_pieces, tasks, num_workers):
        counts.update(part)
        if rest:
            tasks.append((rest, pattern, special_tokens, errors))
        done += part_bytes
        line.update(done)
    line.close()
    return counts


def descending(token):
    """Returns a str whose ascending order is the descending order of bytes `token`.

    The end must come after every byte, for "ab" follows "abc": descending(b"a") == "\x9e\u0100"
    """
    return "".join(chr(255 - byte) for byte in token) + "\u0100"


def every_other(at, length):
    """Returns the occurrences of a pair of two equal symbols that a scan from the left merges.

    at: sorted positions; neighbours `length` apart overlap: of 0, 1, 2 and 5 stay 0, 2 and 5
    """
    index = np.arange(len(at))
    is_first = np.diff(at, prepend=-length - 1) != length
    first = np.maximum.accumulate(np.where(is_first, index, 0))
    return at[(index - first) % 2 == 0]


class PairTable:
    """All distinct pre-tokens in one array of bytes, and all pairs of symbols in them as rows.

    symbol: (N,) a symbol's id stands at its first and at its last byte; -1 before, between and
    after pre-tokens. Which pre-token a byte belongs to is in `word`, how often that occurs in
    `weight`. row_at: (N,) the row of the pair that begins here, or -1.

    A pair is born with its newer symbol, by one merge, and only loses occurrences afterwards.
    So its occurrences are one slice of an array made then (born[newer symbol]), of which those
    still count where row_at still names its row; and its count in the heap is never too low.
    """

    def __init__(self, words, weight, vocab_size):
        """words: list of bytes; weight: (len(words),) int64, how often each occurs."""
        text = np.frombuffer(b"\0" + b"\0".join(words) + b"\0", np.uint8)
        lengths = np.fromiter(map(len, words), np.int64, len(words)) + 1
        self.index = np.int32 if len(text) < 2**31 else np.int64  # half the memory where it fits
        self.weight = weight
        self.symbol = text.astype(np.int32)
        self.symbol[0] = self.symbol[np.cumsum(lengths)] = -1
        self.word = np.zeros(len(text), np.int32)
        self.word[1:] = np.repeat(np.arange(len(words), dtype=np.int32), lengths)
        self.row_at = np.full(len(text), -1, np.int32)
        self.length = np.ones(vocab_size, self.index)
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.keys = [descending(token) for token in self.tokens]
        self.num_rows = 0
        self.count = np.zeros(1 << 16, np.int64)
        self.left, self.right, self.begin, self.end = np.zeros((4, 1 << 16), self.index)
        self.heap, self.threshold = [], 1 << 62
        at = np.flatnonzero((self.symbol[:-1] >= 0) & (self.symbol[1:] >= 0)).astype(self.index)
        key = text[at].astype(np.uint16) << 8 | text[at + 1]  # 16 bits are sorted by radix
        self.born = [self.add_rows(key, 256, at)] * 256
        self.threshold = int(self.count.max()) + 1

    def add_rows(self, key, base, at):
        """Makes a row for each distinct key, left * base + right; returns `at` sorted by row."""
        if not len(at):
            return at
        order = key.argsort(kind="stable")
        key, at = key[order], at[order]
        del order
        begin = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        end = np.append(begin[1:], len(at))
        rows = slice(self.num_rows, self.num_rows + len(begin))
        while rows.stop > len(self.count):
            for name in ("count", "left", "right", "begin", "end"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self.num_rows = rows.stop
        self.left[rows], self.right[rows] = np.divmod(key[begin], base)
        self.begin[rows], self.end[rows] = begin, end
        self.row_at[at] = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), end - begin)
        self.count[rows] = np.add.reduceat(self.weight[self.word[at]], begin)
        for row in np.flatnonzero(self.count[rows] >= self.threshold).tolist():
            heapq.heappush(self.heap, self.heap_entry(rows.start + row))
        return at

    def heap_entry(self, row):
        """Returns what sorts first for the largest count, then for the greater pair of bytes."""
        return (-int(self.count[row]), self.keys[self.left[row]], self.keys[self.right[row]], row)

    def best(self):
        """Returns the row of the pair to merge next, or None when no pair is left.

        The heap holds the rows that had reached `threshold`; it is halved when they are used up,
        so that most pairs, which are rare, never become Python objects.
        """
        while True:
            while self.heap:
                count, row = int(self.count[self.heap[0][-1]]), self.heap[0][-1]
                if count == -self.heap[0][0]:
                    return row
                if count >= self.threshold:
                    heapq.heapreplace(self.heap, self.heap_entry(row))
                else:
                    heapq.heappop(self.heap)
            if self.threshold == 1:
                return None
            self.threshold //= 2
            rows = np.flatnonzero(self.count[:self.num_rows] >= self.threshold).tolist()
            self.heap = [self.heap_entry(row) for row in rows]
            heapq.heapify(self.heap)

    def merge(self, row):
        """Replaces every occurrence of the row's pair by a new symbol; returns (left, right)."""
        a, b, new = int(self.left[row]), int(self.right[row]), len(self.tokens)
        self.tokens.append(self.tokens[a] + self.tokens[b])
        self.keys.append(descending(self.tokens[new]))
        self.length[new] = len(self.tokens[new])
        at = self.born[max(a, b)][self.begin[row]:self.end[row]]
        at = at[self.row_at[at] == row]
        if a == b:
            at = every_other(np.sort(at), self.length[a])
        middle = at + self.length[a]
        end = middle + self.length[b]
        self.symbol[at] = self.symbol[end - 1] = new
        before, after = self.symbol[at - 1], self.symbol[end]
        # Where two new symbols meet, the one on the left accounts for the pair between them.
        has_before, has_after = (before >= 0) & (before != new), after >= 0
        at_before, at_after = (at - self.length[before])[has_before], at[has_after]
        at_both = np.concatenate([at_before, at_after])
        lost = np.concatenate([self.row_at[at_before], self.row_at[middle[has_after]]])
        np.subtract.at(self.count, lost, self.weight[self.word[at_both]])
        self.count[row] = 0
        self.row_at[at] = self.row_at[middle] = -1
        base = len(self.length)
        before, after = before[has_before].astype(np.int64), after[has_after].astype(np.int64)
        keys = np.concatenate([before * base + new, new * base + after])
        self.born.append(self.add_rows(keys, base, at_both))
        return a, b


def learn_merges(counts, num_merges, progress=False):
    """Returns up to num_merges pairs of bytes, the most frequent first; equal to the reference.

    counts: {pre-token: occurrences}, emptied: its memory is needed
    """
    words = [word.encode() for word in counts]
    num_merges = min(num_merges, sum(map(len, words)))  # each merge takes at least a byte away
    weight = np.fromiter(counts.values(), np.int64, len(counts))
    counts.clear()
    table = PairTable(words, weight, 256 + num_merges)
    del words
    merges = []
    line = Progress("merge", num_merges, "merges", progress)
    while len(merges) < num_merges and (row := table.best()) is not None:
        left, right = table.merge(row)
        merges.append((table.tokens[left], table.tokens[right]))
        line.update(len(merges))
    line.close()
    return merges


def train_bpe(input_path, vocab_size, special_tokens, num_workers=None, pattern=GPT2_PATTERN,
              piece_bytes=PIECE_BYTES, errors="strict", progress=False):
    """Returns (vocab: {id: bytes}, merges: [(bytes, bytes)]) learned from UTF-8 text files.

    Ids: the 256 bytes, the merges in order, the special tokens. Of pairs equally frequent the
    lexicographically greater pair of byte strings is merged first. The same for any number of
    workers, piece size and order of the files; no pre-token spans two files.

    input_path: a path or a list of paths
    num_workers: processes (None: the CPU cores); piece_bytes: read at a time by each
    errors: "strict" (ValueError for bytes that are not UTF-8) or "replace" (by U+FFFD)
    raises: ValueError when the vocabulary cannot hold the bytes and the special tokens, or is
    larger than the corpus can fill
    source: [1] algorithm 1; [2] section 2.2; [3] section 2
    """
    special_tokens = check_special_tokens(special_tokens)
    num_workers = default_workers(num_workers)
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        raise ValueError(f"vocab_size must be at least {256 + len(special_tokens)} (256 bytes and "
                         f"{len(special_tokens)} special tokens), got {vocab_size}; raise it")
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be strict or replace, got {errors!r}; choose one")
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes must be at least 1, got {piece_bytes}; raise it")
    counts = count_pretokens(list_files(input_path), tuple(special_tokens), num_workers, pattern,
                             piece_bytes, errors, progress)
    merges = learn_merges(counts, num_merges, progress)
    if len(merges) < num_merges:
        raise ValueError(f"vocab_size must be at most {vocab_size - num_merges + len(merges)} for "
                         f"this corpus, which has {len(merges)} merges, got {vocab_size}; "
                         "lower it or give more text")
    return build_vocab(merges, special_tokens), merges


# ---------------------------------------------------------------- merging one pre-token

def merge_naive(ids, ranks, merged):
    """Returns the symbols of one pre-token after all merges: the lowest rank first, leftmost first.

    ids: list of symbols, changed; ranks: {(left, right): rank}; merged: [rank] -> new symbol.
    Quadratic, and fastest below LONG_BYTES, for `min` and `index` run in C.
    """
    found = [ranks.get(pair, NO_RANK) for pair in pairwise(ids)]
    while found and (rank := min(found)) != NO_RANK:
        i = found.index(rank)
        ids[i:i + 2] = [merged[rank]]
        del found[i]
        if i > 0:
            found[i - 1] = ranks.get((ids[i - 1], ids[i]), NO_RANK)
        if i < len(found):
            found[i] = ranks.get((ids[i], ids[i + 1]), NO_RANK)
    return ids


def merge_heap(ids, ranks, merged):
    """Returns what `merge_naive` returns, in n log n: symbols in a linked list, pairs in a heap.

    An entry is rank * size + position in one integer, for tuples take twice the time; it is
    stale when the pair at its position has another rank by now.
    """
    size = len(ids)
    after, before = list(range(1, size + 1)), list(range(-1, size - 1))
    heap = [ranks[pair] * size + i for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = divmod(heapq.heappop(heap), size)
        j = after[i]
        if j == size or ranks.get((ids[i], ids[j])) != rank:
            continue
        ids[i], ids[j] = merged[rank], None
        after[i] = k = after[j]
        if k < size:
            before[k] = i
            if (right := ranks.get((ids[i], ids[k]))) is not None:
                heapq.heappush(heap, right * size + i)
        if (h := before[i]) >= 0 and (left := ranks.get((ids[h], ids[i]))) is not None:
            heapq.heappush(heap, left * size + h)
    return [symbol for symbol in ids if symbol is not None]


class PretokenCache(dict):
    """{pre-token: its ids, packed in bytes}; a missing one is encoded, and kept within bounds."""

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def __missing__(self, pretoken):
        packed = self.encode(pretoken)
        if len(pretoken) <= CACHED_CHARS:
            if len(self) >= CACHE_ENTRIES:
                self.clear()
            self[pretoken] = packed
        return packed


# ---------------------------------------------------------------- the tokenizer

class Tokenizer:
    """Encodes text to ids and decodes ids to text by byte-level BPE.

    vocab: {id: bytes}, gaps allowed; merges: [(bytes, bytes)], first rank first
    special_tokens: list of str, matched in text before all else, the longest first; those that
    the vocabulary lacks are appended with new ids
    pattern: cuts text into pre-tokens; nfc: normalize text to NFC first (Qwen2.5)
    ignore_merges: a pre-token that is a token needs no merges (Llama 3)
    shown_tokens: those special tokens that are text to a reader (Qwen3's <think>; "special": false
    in a tokenizer.json): kept for `save`, and no end to a generated text
    post_processor: kept for `save`, never applied: encode adds no begin-of-text
    raises: ValueError for contents that contradict each other
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN, *, nfc=False,
                 ignore_merges=False, shown_tokens=(), post_processor=None):
        self.vocab, self.merges = dict(vocab), [tuple(pair) for pair in merges]
        self.special_tokens, self.pattern = check_special_tokens(special_tokens), pattern
        self.nfc, self.ignore_merges, self.post_processor = nfc, ignore_merges, post_processor
        self.shown_tokens = frozenset(shown_tokens)
        if any(not isinstance(index, int) or index < 0 for index in self.vocab):
            raise ValueError("ids must be integers from 0 on, got others in vocab; correct them")
        ids = {token: index for index, token in sorted(self.vocab.items(), reverse=True)}
        self.vocab_size = max(self.vocab, default=-1) + 1
        self.special_ids = {}
        for token in self.special_tokens:
            index = ids.setdefault(token.encode(), self.vocab_size)
            self.vocab_size = max(self.vocab_size, index + 1)
            self.vocab[index] = token.encode()
            self.special_ids[token] = index
        self._ranks, self._merged = {}, []
        for rank, (left, right) in enumerate(self.merges):
            for token in (left, right, left + right):
                if token not in ids:
                    raise ValueError(f"merges must give tokens of the vocabulary, got {token!r}, "
                                     "which is none; use a vocab and merges that belong together")
            self._ranks.setdefault((ids[left], ids[right]), rank)
            self._merged.append(ids[left + right])
        self.dtype, self._letter = ((np.dtype("<u2"), "H") if self.vocab_size <= 1 << 16
                                    else (np.dtype("<u4"), "I"))
        self._bytes = [ids.get(bytes([byte])) for byte in range(256)]
        self._whole = {}  # the tokens that need no merges
        if ignore_merges:
            special = set(self.special_ids.values())
            self._whole = {token: index for token, index in ids.items() if index not in special}
        self._split = {True: special_splitter(tuple(self.special_tokens)),
                       False: special_splitter(())}
        self._pretokenize = pretokenizer(pattern)
        self._cache = PretokenCache(self._encode_pretoken)

    def __reduce__(self):
        """How a process that is spawned gets its copy: without the cache."""
        return partial(Tokenizer, nfc=self.nfc, ignore_merges=self.ignore_merges,
                       shown_tokens=self.shown_tokens, post_processor=self.post_processor), (
            self.vocab, self.merges, self.special_tokens, self.pattern)

    @cached_property
    def sha256(self):
        """The hex hash of everything that decides ids: two tokenizers that share it are one."""
        contents = [sorted((index, token.hex()) for index, token in self.vocab.items()),
                    [(left.hex(), right.hex()) for left, right in self.merges],
                    sorted(self.special_ids.items()), self.pattern, self.nfc, self.ignore_merges]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def _encode_pretoken(self, pretoken):
        data = pretoken.encode()
        if data in self._whole:
            ids = [self._whole[data]]
        else:
            ids = [self._bytes[byte] for byte in data]
            if None in ids:
                missing = data[ids.index(None)]
                raise ValueError(f"text must be made of bytes in the vocabulary, got "
                                 f"0x{missing:02x}; use a vocabulary with all 256 bytes")
            merge = merge_naive if len(ids) < LONG_BYTES else merge_heap
            ids = merge(ids, self._ranks, self._merged)
        return struct.pack(f"<{len(ids)}{self._letter}", *ids)

    def encode_packed(self, text, special=True):
        """Returns the ids of `text` as bytes in `self.dtype`; the form of a file of tokens."""
        if not text.isascii():
            text = join_surrogates(text)
        lookup = self._cache.__getitem__
        packed = []
        for i, part in enumerate(self._split[bool(special)](text)):
            if i % 2:
                packed.append(struct.pack(f"<{self._letter}", self.special_ids[part]))
                continue
            if self.nfc:
                part = unicodedata.normalize("NFC", part)
            for block in self._pretokenize(part):
                packed.append(b"".join(map(lookup, block)))
        return b"".join(packed)

    def encode(self, text, special=True):
        """Returns the list of ids of `text`.

        special: False takes special tokens in the text as plain text (for text from users).
        Lone surrogates, which UTF-8 cannot hold, are encoded as U+FFFD.
        """
        return np.frombuffer(self.encode_packed(text, special), self.dtype).tolist()

    def encode_iterable(self, iterable, special=True):
        """Yields the ids of the concatenation of strings, wherever it is cut, in constant memory.

        Constant up to the longest stretch without a safe cut (see cut_finder); with a pattern
        of your own that is the text between two special tokens.
        """
        find_cut = cut_finder(self.pattern, tuple(self.special_tokens if special else ()),
                              self.nfc)
        waiting, size, target = [], 0, 2 * STREAM_CHARS
        for chunk in iterable:
            waiting.append(chunk)
            size += len(chunk)
            if size < target:
                continue
            text, start = "".join(waiting), 0
            while (cut := find_cut(text, start + STREAM_CHARS)) > 0:
                yield from self.encode(text[start:cut], special)
                start = cut
            waiting, size = [text[start:]], len(text) - start
            target = 2 * max(STREAM_CHARS, size)  # doubled, so that no text is searched often
        yield from self.encode("".join(waiting), special)

    def encode_batch(self, texts, num_workers=None, special=True):
        """Returns the list of the ids of each text, encoded by `num_workers` processes."""
        texts = list(texts)
        offsets = list(accumulate(map(len, texts), initial=0))
        # A process gets some texts at a time; few are encoded sooner than processes start.
        num_workers = default_workers(num_workers) if offsets[-1] > PIECE_BYTES // 2 else 1
        groups = {}
        for index, offset in enumerate(offsets[:-1]):
            groups.setdefault(offset * 8 // PIECE_BYTES, []).append(index)
        tasks = [(group[0], texts[group[0]:group[-1] + 1], special) for group in groups.values()]
        result = [None] * len(texts)
        for first, encoded in run_tasks(encode_texts, tasks, num_workers, self):
            for index, packed in enumerate(encoded, first):
                result[index] = np.frombuffer(packed, self.dtype).tolist()
        return result

    def decode_bytes(self, ids):
        """Returns the bytes of ids (list, array or tensor); of an id in a gap, those of U+FFFD."""
        ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers, got {ids.dtype}; convert them")
        ids = ids.ravel()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, got {ids.min()} to "
                             f"{ids.max()}; use the tokenizer that made them")
        gap = "\ufffd".encode()
        return b"".join([self.vocab.get(index, gap) for index in ids.tolist()])

    def decode(self, ids):
        """Returns the text of ids in range, whatever they are; bytes not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None, pattern=GPT2_PATTERN):
        """Returns the tokenizer of GPT-2's pair of files, vocab.json and merges.txt."""
        spelled = read_json(vocab_path)
        foreign = ([f"{index!r:.40} for {token!r:.40}" for token, index in spelled.items()
                    if type(index) is not int or index < 0]
                   if isinstance(spelled, dict) and spelled else ["something else"])
        if foreign:
            raise ValueError(f"{vocab_path} must hold an object token: id, got {foreign[0]}; "
                             "give a GPT-2 vocab.json")
        lines = read_text(merges_path).replace("\r\n", "\n").split("\n")
        if lines[0].startswith("#version:"):
            del lines[0]
        try:
            merges = [unspell_merge(line) for line in lines if line]
            return cls({index: unspell(token) for token, index in spelled.items()}, merges,
                       special_tokens, pattern)
        except ValueError as error:
            raise ValueError(f"{vocab_path} and {merges_path}: {error}") from None

    def save_gpt2(self, folder):
        """Writes vocab.json and merges.txt into `folder`, which `from_files` reads.

        raises: ValueError, as `save`, for two ids of one token
        """
        vocab = spelled_once((spell(token), index) for index, token in sorted(self.vocab.items()))
        merges = [f"{spell(left)} {spell(right)}\n" for left, right in self.merges]
        write_atomically(Path(folder, "vocab.json"),
                         json.dumps(vocab, ensure_ascii=False).encode())
        write_atomically(Path(folder, "merges.txt"),
                         ("#version: 0.2\n" + "".join(merges)).encode())

    def save(self, path):
        """Writes one tokenizer.json (into `path` if that is a folder or has no suffix)."""
        path = Path(path)
        if path.suffix != ".json":
            path = path / "tokenizer.json"
        write_atomically(path, json.dumps(to_hugging_face(self), ensure_ascii=False,
                                          indent=1).encode())

    @classmethod
    def load(cls, path):
        """Returns the tokenizer of a tokenizer.json, or of a folder that holds one.

        raises: ValueError for anything but byte-level BPE, naming what it is
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        data = read_json(path)
        try:
            return from_hugging_face(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be a whole tokenizer.json, got one without "
                             f"{error}; save it again") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def join_surrogates(text):
    """Returns text that UTF-8 can hold: surrogate pairs joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode_texts(first, texts, special):
    """Returns (first, the packed ids of each text); runs in a worker."""
    return first, [worker_tokenizer.encode_packed(text, special) for text in texts]


# ---------------------------------------------------------------- tokenizer files

def byte_spelling():
    """Returns [byte] -> the character that spells it in GPT-2's files.

    Printable Latin-1 stands for itself, the other 68 bytes for U+0100 on: a space is "\u0120".
    source: [2], the encoder that its authors published
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_TO_CHAR = byte_spelling()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def spell(token):
    """Returns bytes in GPT-2's spelling: spell(b" the") == "\u0120the"."""
    return "".join([BYTE_TO_CHAR[byte] for byte in token])


def unspell(text):
    """Returns the bytes of a token in GPT-2's spelling; raises ValueError if it is not in it."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError:
        raise ValueError(f"tokens must be spelled in GPT-2's byte alphabet, got {text!r}; "
                         "this is no byte-level BPE") from None


def spelled_once(pairs):
    """Returns {spelling: id} of pairs of these; raises ValueError where two ids have one spelling,
    of which a file would keep the last."""
    vocab = {}
    for spelling, index in pairs:
        if (first := vocab.setdefault(spelling, index)) != index:
            raise ValueError("two tokens, special ones too, must not be spelled alike, got "
                             f"{spelling!r} as ids {first} and {index}; rename or remove one")
    return vocab


def unspell_merge(merge):
    """Returns the pair of bytes of a merge written "a b" or ["a", "b"]."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2 or not all(pair):
        raise ValueError(f"a merge must be two tokens, got {merge!r}; the file is damaged")
    return unspell(pair[0]), unspell(pair[1])


def read_text(path):
    """Returns the text of a small UTF-8 file; raises ValueError where there is none."""
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read, got: {error.strerror}; "
                         "check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got other bytes at position {error.start}; "
                         "give another file") from None


def read_json(path):
    """Returns what a JSON file holds; raises ValueError for a missing, cut or foreign file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, got an error at position {error.pos}; it is cut "
                         "off or not a tokenizer's file") from None


def to_hugging_face(tokenizer):
    """Returns the contents of tokenizer.json.

    Special tokens stand in the vocabulary too, as in GPT-2's file: there the library takes their
    ids from, whatever gaps there are.
    """
    special = tokenizer.special_ids
    plain = sorted(tokenizer.vocab.keys() - set(special.values()))
    vocab = spelled_once([(spell(tokenizer.vocab[index]), index) for index in plain]
                         + [*special.items()])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if tokenizer.pattern == GPT2_PATTERN:
        pre_tokenizer = byte_level | {"use_regex": True}
    else:
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}, byte_level | {"use_regex": False}]}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False,
                          "special": token not in tokenizer.shown_tokens}
                         for token, index in sorted(special.items(), key=lambda item: item[1])],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": pre_tokenizer, "post_processor": tokenizer.post_processor,
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": tokenizer.ignore_merges, "vocab": vocab,
                  "merges": [f"{spell(left)} {spell(right)}" for left, right in tokenizer.merges]}}


def must(hold, what, got):
    """raises ValueError unless `hold`, a truth about a tokenizer.json: other kinds are not read."""
    if not hold:
        raise ValueError(f"{what}, got {got}; it is not read")


def from_hugging_face(data):
    """Returns the Tokenizer of a tokenizer.json's contents; raises ValueError for other kinds."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError("a tokenizer.json must hold a model, got none; give another file")
    model, normalizer = data["model"], data.get("normalizer")
    kind = model.get("type", "BPE")
    must(kind == "BPE", "the model must be byte-level BPE", kind)
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                 "byte_fallback"):
        value = model.get(name)
        must(not value, "the model must be plain byte-level BPE", f"{name} {value!r}")
    if normalizer is not None:
        must(normalizer["type"] == "NFC", "the normalizer must be NFC or none", normalizer["type"])
    special, shown = {}, set()
    for added in data.get("added_tokens") or ():
        for name in ("lstrip", "rstrip", "single_word"):
            must(not added.get(name), "added tokens must be matched as they are",
                 f"{name} for {added['content']!r}")
        special[added["content"]] = added["id"]
        if not added.get("special", True):
            shown.add(added["content"])
    vocab = {index: unspell(token) for token, index in model["vocab"].items()
             if token not in special}
    vocab |= {index: token.encode() for token, index in special.items()}
    return Tokenizer(vocab, [unspell_merge(merge) for merge in model["merges"]], list(special),
                     read_pre_tokenizer(data.get("pre_tokenizer")), nfc=normalizer is not None,
                     ignore_merges=bool(model.get("ignore_merges")), shown_tokens=shown,
                     post_processor=data.get("post_processor"))


def read_pre_tokenizer(data):
    """Returns the pattern of a pre-tokenizer: ByteLevel, or a Split by regex and ByteLevel."""
    must(data is not None, "the pre-tokenizer must be ByteLevel", "none")
    parts = data["pretokenizers"] if data["type"] == "Sequence" else [data]
    kinds = [part["type"] for part in parts]
    names = " and ".join(kinds)
    must(kinds in (["ByteLevel"], ["Split", "ByteLevel"]),
         "the pre-tokenizer must be ByteLevel, or Split and ByteLevel", names)
    *splits, byte_level = parts
    must(not byte_level.get("add_prefix_space"), "ByteLevel must take text as it is",
         "add_prefix_space")
    use_regex = byte_level.get("use_regex", True)
    must(use_regex != bool(splits), "one pattern must cut the text",
         f"use_regex of ByteLevel {use_regex} in {names}")
    if not splits:
        return GPT2_PATTERN
    (split,) = splits
    must(split.get("behavior") == "Isolated" and not split.get("invert")
         and "Regex" in split["pattern"], "Split must isolate the matches of a regex", split)
    return split["pattern"]["Regex"]


# ---------------------------------------------------------------- files of tokens

def encode_piece(number, piece, parts, errors):
    """Writes part `number`: three numbers (its text bytes, documents ended, last id), then ids.

    Runs in a worker; returns the bytes read. A part that exists under its name is whole.
    """
    tokenizer = worker_tokenizer
    text = read_piece(*piece, errors)
    plain = special_splitter(tuple(tokenizer.special_tokens))(text)[::2]
    packed = tokenizer.encode_packed(text)
    ids = np.frombuffer(packed, tokenizer.dtype)
    documents = np.count_nonzero(ids == tokenizer.special_ids.get(END_OF_TEXT, -1))
    header = PART_HEADER.pack(len("".join(plain).encode()), documents, ids[-1])
    write_atomically(Path(parts, f"{number:08d}"), header + packed)
    return piece[2] - piece[1]


def check_token_path(path):
    """Returns the Path of a file of tokens to write; raises ValueError where none can be."""
    path = Path(path)
    meta_path = path.with_suffix(".json")
    if meta_path.exists() and "tokenizer_hash" not in what_was_made(meta_path):
        raise ValueError(f"{meta_path}, which describes {path.name}, must not be another file, "
                         "got one; choose another name")
    if path.suffix != ".bin" or path.is_dir():
        raise ValueError(f"a file of tokens must be called NAME.bin, got {path}"
                         f"{', a folder' * path.is_dir()}; rename it")
    return path


def write_tokens(input_paths, tokenizer, out_path, num_workers=None, piece_bytes=PIECE_BYTES,
                 errors="strict", progress=False):
    """Returns the meta of the file of tokens it makes of UTF-8 text files, in order.

    `out_path` NAME.bin: ids, little-endian, uint16 up to 65,536 ids, else uint32. NAME.json, the
    meta: vocab_size, tokenizer_hash, tokens, dtype, bytes (of UTF-8 text, special tokens not
    counted: what bits per byte divide by), documents (<|endoftext|> tokens, and files that do
    not end with one), source_hash (see files_sha256).

    Pieces are encoded in parallel into the folder NAME.bin.parts and put together at the end:
    whenever it is killed, the next call goes on with the pieces that are done, and nothing
    stands under the final name before it is whole.
    """
    paths, out_path = list_files(input_paths), check_token_path(out_path)
    meta_path = out_path.with_suffix(".json")
    num_workers = default_workers(num_workers)
    special = tuple(tokenizer.special_tokens)
    pieces = plan_pieces(paths, piece_bytes, cut_finder(tokenizer.pattern, special, tokenizer.nfc),
                         special)
    if not pieces:
        raise ValueError(f"the text to encode must hold a byte, got none in {paths[0]}; give more "
                         "text")
    meta = {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.sha256,
            "dtype": tokenizer.dtype.name, "source_hash": files_sha256(paths)}
    parts = Path(f"{out_path}.parts")
    plan = json.dumps(meta | {"errors": errors, "pieces": pieces}).encode()
    if not (parts / "plan.json").exists() or (parts / "plan.json").read_bytes() != plan:
        shutil.rmtree(parts, ignore_errors=True)
        write_atomically(parts / "plan.json", plan)
    finished = set(os.listdir(parts))
    tasks = [(number, piece, str(parts), errors) for number, piece in enumerate(pieces)
             if f"{number:08d}" not in finished][::-1]
    total = sum(end - start for _, start, end in pieces)
    done = total - sum(end - start for _, (_, start, end), *_ in tasks)
    line = Progress("encode", total, "bytes", progress, done)
    for piece_size in run_tasks(encode_piece, tasks, num_workers if total > PIECE_BYTES else 1,
                                tokenizer):
        done += piece_size
        line.update(done)
    line.close()
    meta_path.unlink(missing_ok=True)  # a kill between the two is noticed
    meta |= join_parts(parts, pieces, tokenizer, out_path)
    write_atomically(meta_path, json.dumps(meta, indent=1).encode())
    shutil.rmtree(parts)
    return meta


def join_parts(parts, pieces, tokenizer, out_path):
    """Writes the ids of all parts into out_path; returns {tokens, bytes, documents}."""
    text_bytes = documents = 0
    end_of_text = tokenizer.special_ids.get(END_OF_TEXT, -1)
    temporary = parts / "whole"
    with open(temporary, "wb") as whole:
        for number, (path, *_) in enumerate(pieces):
            with open(parts / f"{number:08d}", "rb") as part:
                size, ends, last = PART_HEADER.unpack(part.read(PART_HEADER.size))
                shutil.copyfileobj(part, whole, 1 << 20)
            ends_file = number + 1 == len(pieces) or pieces[number + 1][0] != path
            text_bytes += size
            documents += ends + (ends_file and last != end_of_text)
        tokens = whole.tell() // tokenizer.dtype.itemsize
    os.replace(temporary, out_path)
    return {"tokens": tokens, "bytes": text_bytes, "documents": documents}


def read_tokens(path, tokenizer=None, vocab_size=None):
    """Returns (np.memmap of the ids, meta) of a file that `write_tokens` made.

    tokenizer: the one it must have been made by; vocab_size: of the model that will read it.
    raises: ValueError for a missing, cut, foreign file, another tokenizer's, ids out of range
    """
    path = Path(path)
    remake = "make it again with bpe.py encode"
    if not path.exists():
        raise ValueError(f"the file of tokens must exist, got {path}; {remake}")
    meta = read_json(path.with_suffix(".json"))
    numbers, others = ("vocab_size", "tokens", "bytes", "documents"), {"tokenizer_hash", "dtype"}
    if (not isinstance(meta, dict) or not others <= meta.keys()
            or not all(isinstance(meta.get(name), int) for name in numbers)):
        raise ValueError(f"{path.with_suffix('.json')} must describe a file of tokens, got other "
                         f"contents; {remake}")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"the dtype of tokens must be uint16 or uint32, got {meta['dtype']!r} for "
                         f"{path}; {remake}")
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    if path.stat().st_size != meta["tokens"] * dtype.itemsize:
        raise ValueError(f"{path} must hold {meta['tokens'] * dtype.itemsize} bytes "
                         f"({meta['tokens']} tokens), got {path.stat().st_size}; {remake}")
    if tokenizer is not None and tokenizer.sha256 != meta["tokenizer_hash"]:
        raise ValueError(f"{path} must be made by the tokenizer {tokenizer.sha256[:12]}, got one "
                         f"made by {str(meta['tokenizer_hash'])[:12]}; {remake}")
    if not meta["tokens"]:
        raise ValueError(f"{path} must hold a token, got none; {remake} from more text")
    ids = np.memmap(path, dtype, mode="r")
    limit = meta["vocab_size"] if vocab_size is None else vocab_size
    highest = max(int(ids[i:i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
    if highest >= limit:
        raise ValueError(f"ids in {path} must be below {limit}, got {highest}; use a larger "
                         f"vocab_size or {remake}")
    return ids, meta


# ---------------------------------------------------------------- data: from a name to ids

HUB = "https://huggingface.co/datasets"
# name: {split: (address, sha256; None: the one that the server announces)}
DATASETS = {
    "tinystories": {
        "train": (f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", None),
        "valid": (f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt", None),
    },
    "owt": {
        "train": (f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz", None),
        "valid": (f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_valid.txt.gz", None),
    },
    "shakespeare": {
        "train": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                  "tinyshakespeare/input.txt",
                  "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    },
}
HELD_OUT = 20  # one document in so many is validation text
DOWNLOAD_ATTEMPTS = 5


def download(url, path, sha256=None):
    """Fetches `url` to `path`, going on by range where an earlier try stopped.

    sha256: that the file must have; None: the one that the server announces, if it does
    raises: OSError when it cannot be had (the part is kept), ValueError on a wrong checksum
    """
    import requests

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(DOWNLOAD_ATTEMPTS):
        try:
            announced = download_rest(requests, url, part)
            sha256 = sha256 or announced
            break
        except OSError as error:  # requests' own are of this class too
            reply = getattr(error, "response", None)
            final = reply is not None and 400 <= reply.status_code < 500
            if final or attempt == DOWNLOAD_ATTEMPTS - 1:
                raise OSError(f"{url} must be reachable, got {error}; try again (what came is "
                              f"kept) or put the file at {path} yourself") from None
            time.sleep(2**attempt)
    found = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    if sha256 and found.hexdigest() != sha256:
        part.unlink()
        raise ValueError(f"{url} must have sha256 {sha256}, got {found.hexdigest()}; it was "
                         "dropped, try again")
    os.replace(part, path)
    print(f"{path}: sha256 {found.hexdigest()}"
          + ("" if sha256 else " (nothing to compare it with)"))


def download_rest(requests, url, part):
    """Appends to `part` what it lacks of `url`; returns the sha256 that the server announces."""
    have = part.stat().st_size if part.exists() else 0
    # identity: a range of what the server packs for the way would not be one of the file
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
        tags = [r.headers.get("X-Linked-ETag", "").strip('"') for r in [*reply.history, reply]]
        if have and reply.status_code == 416:  # nothing is left to send
            if reply.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()  # not of this file, for all that the server says
                return download_rest(requests, url, part)
        else:
            reply.raise_for_status()
            if reply.status_code != 206:  # a server without ranges starts over
                have = 0
            total = have + int(reply.headers.get("Content-Length", 0))
            line = Progress(f"download {part.stem}", max(total, 1), "bytes")
            with open(part, "ab" if have else "wb") as file:
                for block in reply.iter_content(1 << 16):  # what a broken reply may lose
                    file.write(block)
                    line.update(file.tell())
            line.close()
            if part.stat().st_size < total:
                raise OSError(f"{part.stat().st_size} of {total} bytes")
    return next((tag for tag in tags if len(tag) == 64), None)


def fetch(name, folder):
    """Downloads a named set into `folder`; returns [train file] or [train file, valid file]."""
    texts = []
    for split, (url, sha256) in DATASETS[name].items():
        text = folder / f"raw_{split}.txt"
        texts.append(text)
        if text.exists():
            continue
        raw = folder / f"raw_{split}.txt.gz" if url.endswith(".gz") else text
        if not raw.exists():
            download(url, raw, sha256)
        if raw != text:
            try:
                with gzip.open(raw) as source, open(f"{text}.tmp", "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{raw} must be a whole gzip file, got: {error}; remove it, "
                                 "it is fetched again") from None
            os.replace(f"{text}.tmp", text)
    return texts


def what_was_made(path):
    """Returns what the JSON file at `path` says, {} where there is none that can be read."""
    try:
        made = read_json(path)
    except ValueError:
        made = None
    return made if isinstance(made, dict) else {}


def standard_library():
    """Returns (folder, .py files in it) of this Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages"}
    return root, [path for path in sorted(root.rglob("*.py"))
                  if not skip & set(path.relative_to(root).parts)]


def read_documents(paths, root, errors):
    """Yields (key, text, ended): documents, long ones in parts of which the last is `ended`.

    Documents are the files, the "text" of each line of a .jsonl(.gz), and what <|endoftext|>
    separates in a file. The key, not the text, decides what is held out.
    """
    find_cut = cut_finder(GPT2_PATTERN, (END_OF_TEXT,))
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            for number, text in read_jsonl(path, errors):
                yield f"{name}:{number}", text, True
            continue
        number, begun = 0, False
        for piece in plan_pieces([path], PIECE_BYTES, find_cut, (END_OF_TEXT,)):
            *whole, rest = read_piece(*piece, errors).split(END_OF_TEXT)
            for text, ended in [(text, True) for text in whole] + [(rest, False)]:
                if begun or text.strip():  # what is all white space is no document
                    yield f"{name}:{number}" if number else name, text, ended
                    begun = not ended
                number += ended
        if begun:
            yield f"{name}:{number}" if number else name, "", True


def read_jsonl(path, errors):
    """Yields (line number, text) of the lines of a .jsonl(.gz) that are not blank."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        text = json.loads(line.decode("utf-8", errors))["text"]
                        yield number, text.encode("utf-8", errors).decode()
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        raise ValueError(f"each line of {path} must be a JSON object with a "
                                         f"\"text\", got {type(error).__name__}: "
                                         f"{str(error)[:60]} in line {number}; correct it"
                                         ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file, got: {error}; copy it again") from None


def write_splits(data, folder, errors, hold_out=True):
    """Writes folder/train.txt and folder/valid.txt, documents ended by <|endoftext|>, from what
    `data` names; returns the two paths. Made before from the same bytes: left as they are.

    Held out are documents whose key's hash says so, one in HELD_OUT; where that comes to less
    than a fifth or more than five times the share (one long text, few files), the end of the text
    is. Without hold_out all of it goes to train.txt.
    """
    if data == "python":
        root, paths = standard_library()
        errors = "ignore"  # a few test files of the library are not UTF-8, on purpose
    else:
        paths = list_files(data)
        root = Path(data) if Path(data).is_dir() else Path(data).parent
    splits = folder / "train.txt", folder / "valid.txt"
    names = [path.relative_to(root).as_posix() for path in paths]
    source = {"sha256": files_sha256(paths), "errors": errors, "held_out": HELD_OUT * hold_out,
              "names": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    made = what_was_made(folder / "source.json")
    sizes = [path.stat().st_size if path.exists() else -1 for path in splits]
    if made == source | {"sizes": sizes}:
        return splits
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.json").unlink(missing_ok=True)  # from here on they are not what it says
    with open(splits[0], "w+b") as train_file, open(splits[1], "w+b") as valid_file:
        for key, text, ended in read_documents(paths, root, errors):
            held_out = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % HELD_OUT == 0
            file = valid_file if held_out and hold_out else train_file
            file.write((text + END_OF_TEXT * ended).encode())
        sizes = [file.tell() for file in (train_file, valid_file)]
        if hold_out and not sum(sizes) <= sizes[1] * 5 * HELD_OUT <= 25 * sum(sizes):
            valid_file.seek(0)
            shutil.copyfileobj(valid_file, train_file, 1 << 20)
            valid_file.seek(0)
            valid_file.truncate()
            sizes[0] = move_end(train_file, valid_file, sum(sizes) // HELD_OUT)
            sizes[1] = valid_file.tell()
    write_atomically(folder / "source.json", json.dumps(source | {"sizes": sizes}).encode())
    return splits


def move_end(source, target, share):
    """Moves about the last `share` bytes of one file to another, from the start of a line, or else
    of a character; returns the bytes that stay."""
    size = source.tell()
    source.seek(max(0, size - share))
    window = source.read(min(share, 1 << 20))
    skip = window.find(b"\n", 0, share // 2) + 1
    if not skip:
        while skip < len(window) and window[skip] & 0xC0 == 0x80:
            skip += 1
    stay = max(0, size - share) + skip
    source.seek(stay)
    shutil.copyfileobj(source, target, 1 << 20)
    source.truncate(stay)
    return stay


def find_texts(data, valid_data, folder, errors):
    """Returns the train and the validation text (.txt files) of what the two names mean."""
    texts = fetch(data, folder) if data in DATASETS else [Path(data)]
    if valid_data:
        if str(valid_data).endswith(".bin"):
            raise ValueError(f"valid_data must be text where data is, got {valid_data}; give text, "
                             "or a .bin as data too")
        texts = [texts[0], Path(valid_data)]
    if len(texts) == 1:
        return write_splits(texts[0] if data in DATASETS else data, folder, errors)
    return [path if path.is_file() and path.suffix == ".txt"
            else write_splits(str(path), folder / split, errors, hold_out=False)[0]
            for split, path in zip(("train", "valid"), texts, strict=True)]


def make_tokenizer(text, text_sha256, vocab_size, pattern, folder, num_workers, errors):
    """Returns the tokenizer in `folder`, trained first if it was not trained on this text."""
    source = {"text": text_sha256, "errors": errors}
    made = what_was_made(folder / "source.json")
    try:
        tokenizer = Tokenizer.load(folder)
        if made == source | {"tokenizer": tokenizer.sha256}:
            return tokenizer
    except ValueError:  # not there, or damaged since
        pass
    (folder / "source.json").unlink(missing_ok=True)
    vocab, merges = train_bpe(text, vocab_size, [END_OF_TEXT], num_workers, PATTERNS[pattern],
                              errors=errors, progress=True)
    tokenizer = Tokenizer(vocab, merges, [END_OF_TEXT], PATTERNS[pattern])
    tokenizer.save(folder)
    source["tokenizer"] = tokenizer.sha256
    write_atomically(folder / "source.json", json.dumps(source).encode())
    return tokenizer


def make_tokens(text, text_sha256, tokenizer, path, num_workers, errors):
    """Returns (ids, meta) of the file of tokens at `path`, written first if it is not of `text`."""
    meta = what_was_made(path.with_suffix(".json"))
    if (meta.get("tokenizer_hash"), meta.get("source_hash")) == (tokenizer.sha256, text_sha256):
        try:
            return read_tokens(path, tokenizer)
        except ValueError:  # damaged since: made again
            pass
    path.with_suffix(".json").unlink(missing_ok=True)
    write_tokens(text, tokenizer, path, num_workers, errors=errors, progress=True)
    return read_tokens(path, tokenizer)


@contextlib.contextmanager
def alone_with(path):
    """Waits until no other process has the lock file `path`, which is there meanwhile. Where there
    are no such locks (Windows, a disk that is read only, on which all is made) it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            for _ in range(1000):  # an end, too, where a file's number is not always the same
                file = held.enter_context(open(path, "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"waiting for another process, which holds {path}", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):  # removed by who held it: made anew
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                        break
            held.callback(lambda: os.access(path.parent, os.W_OK) and path.unlink(missing_ok=True))
        yield


def prepare_data(data, vocab_size, data_dir="data", valid_data=None, tokenizer=None,
                 pattern="gpt2", num_workers=None, errors="strict"):
    """Returns (train ids, valid ids, tokenizer, tokens per byte of the validation text).

    data: "python" (the standard library's source), a name of DATASETS, a .txt, .jsonl(.gz) or
    folder of them, or a .bin of `write_tokens`; valid_data: the validation text (a .bin where data
    is one), None to hold out one document in HELD_OUT; tokenizer: a tokenizer.json, None to train
    one. What it makes lies under data_dir and is used again while the text is the same.
    """
    if not str(data):
        raise ValueError("data must name some text, got an empty name; give a file or a folder")
    if str(data).endswith(".bin"):
        return open_token_files(data, vocab_size, valid_data, tokenizer)
    if tokenizer:
        path, tokenizer = tokenizer, Tokenizer.load(tokenizer)
        if END_OF_TEXT not in tokenizer.special_ids:
            raise ValueError(f"the tokenizer must have the special token {END_OF_TEXT}, which ends "
                             f"documents, got {path} without; leave it out or train one with it")
    name = data if data in DATASETS else Path(data).resolve().name.split(".")[0] or "data"
    folder = Path(data_dir) / name
    if Path(data).is_dir() and folder.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"data_dir must lie outside the text, got {data_dir} for {data}; give "
                         "another data_dir")
    if data not in ("python", *DATASETS):
        list_files(data)  # a name of nothing leaves no folder behind
    with alone_with(folder / "lock"):
        texts = find_texts(data, valid_data, folder, errors)
        hashes = [files_sha256([path]) for path in texts]
        if tokenizer:
            folder = folder / tokenizer.sha256[:12]
        else:
            folder = folder / f"{pattern}_{vocab_size}"
            tokenizer = make_tokenizer(texts[0], hashes[0], vocab_size, pattern, folder,
                                       num_workers, errors)
        ids = []
        for split, text, sha256 in zip(("train", "valid"), texts, hashes, strict=True):
            path = folder / f"{split}.bin"
            split_ids, meta = make_tokens(text, sha256, tokenizer, path, num_workers, errors)
            print(f"{split}: {meta['tokens']:,} tokens of {meta['bytes']:,} bytes, {path}")
            ids.append(split_ids)
        return *ids, tokenizer, meta["tokens"] / max(1, meta["bytes"])


def open_token_files(data, vocab_size, valid_data=None, tokenizer=None):
    """`prepare_data` for a .bin; without valid_data the last of HELD_OUT parts is held out.

    vocab_size: above all ids, where no tokenizer.json lies beside the file to say it
    """
    beside = Path(data).parent / "tokenizer.json"
    if tokenizer or beside.exists():
        tokenizer = Tokenizer.load(tokenizer or beside)
        vocab_size = tokenizer.vocab_size
    ids, meta = read_tokens(data, tokenizer, vocab_size)
    cut = len(ids) - len(ids) // HELD_OUT
    valid = ids[cut:]
    if valid_data:
        cut = len(ids)
        valid, meta = read_tokens(valid_data, tokenizer, vocab_size)
    return ids[:cut], valid, tokenizer, meta["tokens"] / max(1, meta["bytes"])


# ---------------------------------------------------------------- bench

BENCH_SUFFIXES = (".py", ".md", ".rst", ".txt", ".html", ".js", ".h", ".c", ".pyi")


def write_bench_corpus(inputs, megabytes, path):
    """Writes text files, <|endoftext|> between them, up to that size; each text once.

    inputs: files and folders; by default what every machine has, Python's own library and the
    packages installed beside it
    """
    inputs = inputs or {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    seen = set()
    with open(path, "wb") as corpus:
        for found in list_files(sorted(inputs), BENCH_SUFFIXES):
            text = found.read_bytes().decode(errors="ignore") + END_OF_TEXT
            if hash(text) not in seen and len(text) < 4 << 20:
                seen.add(hash(text))
                corpus.write(text.encode())
            if corpus.tell() >= megabytes * 1e6:
                break


def bench_documents(corpus):
    """Yields the documents of the bench corpus, in memory one piece at a time."""
    for piece in plan_pieces([corpus], PIECE_BYTES, cut_finder("", (END_OF_TEXT,)), (END_OF_TEXT,)):
        yield from filter(None, read_piece(*piece, "strict").split(END_OF_TEXT))


def train_ours(args):
    """Trains with this file and leaves the tokenizer in out_dir."""
    vocab, merges = train_bpe(args.corpus, args.vocab_size, [END_OF_TEXT], args.num_workers)
    Tokenizer(vocab, merges, [END_OF_TEXT]).save(args.out_dir)


def train_tokenizers(args):
    """Trains with Hugging Face tokenizers, on all cores."""
    import tokenizers
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rival = tokenizers.Tokenizer(tokenizers.models.BPE())
    rival.pre_tokenizer = byte_level
    rival.train_from_iterator(bench_documents(args.corpus), tokenizers.trainers.BpeTrainer(
        vocab_size=args.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=byte_level.alphabet()))


def train_rustbpe(args):
    """Trains with rustbpe, on all cores."""
    import rustbpe
    rustbpe.Tokenizer().train_from_iterator(bench_documents(args.corpus), args.vocab_size - 1,
                                            pattern=GPT2_PATTERN)


def seconds_of(run, *args):
    """Returns the seconds that run(*args) takes."""
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


def seconds_and_mib(trainer, args):
    """Returns (seconds, peak MiB) of a training in this process and its workers."""
    return seconds_of(trainer, args), peak_memory_mib(args.num_workers)


def show(verb, name, values, unit, note=""):
    """Prints the median and the spread of repeated measurements; returns the median."""
    median = statistics.median(values)
    print(f"{verb:<7} {name:<24} {median:8.3f} {unit} ({min(values):.3f} to {max(values):.3f}, "
          f"{len(values)} runs){note}", flush=True)
    return median


def bench_train(args):
    """Returns {trainer: (median seconds, peak MiB)}, each training in a process of its own, so
    that its memory is its own."""
    results = {}
    for name, trainer in (("ours", train_ours), ("tokenizers", train_tokenizers),
                          ("rustbpe", train_rustbpe)):
        if name != "ours" and not importlib.util.find_spec(name):
            print(f"train   {name:<24} not installed")
            continue
        runs = []
        for _ in range(args.train_repeats):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                runs.append(process.submit(seconds_and_mib, trainer, args).result())
        seconds, mib = zip(*runs, strict=True)
        results[name] = show("train", name, seconds, "s", f" | peak {max(mib):,.0f} MiB"), max(mib)
    return results


def bench_encode(tokenizer, texts, args):
    """Returns {encoder: MB/s, the median}; all give the same ids, which is checked first."""
    contenders = {"ours, 1 process": lambda: tokenizer.encode_batch(texts, 1)}
    contenders[f"ours, {args.num_workers} processes"] = (
        lambda: tokenizer.encode_batch(texts, args.num_workers))
    if importlib.util.find_spec("tokenizers"):
        from tokenizers import Tokenizer as HuggingFace
        rival = HuggingFace.from_str(json.dumps(to_hugging_face(tokenizer)))
        contenders["tokenizers, batch"] = (
            lambda: [encoding.ids for encoding in rival.encode_batch(texts)])
    if importlib.util.find_spec("tiktoken"):
        import tiktoken
        special = set(tokenizer.special_ids.values())
        ordinary = {token: index for index, token in tokenizer.vocab.items()
                    if index not in special}
        encoding = tiktoken.Encoding("bench", pat_str=tokenizer.pattern, mergeable_ranks=ordinary,
                                     special_tokens=tokenizer.special_ids)
        contenders["tiktoken, 1 thread"] = lambda: [encoding.encode(text) for text in texts]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    expected, speeds = tokenizer.encode_batch(texts, 1), {}
    for name, run in contenders.items():
        if run() != expected:
            raise ValueError(f"all encoders must give the same ids, got others from {name}; "
                             "report this with the text")
        rates = []
        for _ in range(args.repeats):
            tokenizer._cache.clear()  # each run starts cold
            rates.append(megabytes / seconds_of(run))
        speeds[name] = show("encode", name, rates, "MB/s")
    tokens = sum(map(len, expected))
    print(f"ratio   {1e6 * megabytes / tokens:.3f} bytes/token on {megabytes:.1f} MB")
    return speeds


def bench(args):
    """Correctness first, then the speed of training and encoding against what is installed."""
    with tempfile.TemporaryDirectory() as args.out_dir:
        folder = Path(args.out_dir)
        if args.corpus is None:
            args.corpus = folder / "corpus.txt"
            write_bench_corpus(args.input, args.max_mb, args.corpus)
        size = os.path.getsize(args.corpus)
        print(f"corpus  {size / 1e6:.1f} MB | vocab_size {args.vocab_size} | {args.num_workers} "
              f"workers | {os.cpu_count()} cores | {platform.platform()} | Python "
              f"{platform.python_version()}")
        small = folder / "small.txt"
        with open(args.corpus, "rb") as file:
            small.write_text(file.read(130_000).decode(errors="replace"), newline="")
        sample = small.read_bytes().decode()
        if train_bpe(small, 300, [END_OF_TEXT]) != train_bpe_reference(sample, 300, [END_OF_TEXT]):
            raise ValueError("merges must equal the reference's, got others; report this corpus")
        print(f"check   merges equal the reference's on {len(sample):,} characters")
        small_s = show("train", "ours, 130 kB, vocab 500", [
            seconds_of(train_bpe, small, 500, [END_OF_TEXT]) for _ in range(args.repeats)], "s")
        training = bench_train(args)
        if args.gpt2_dir:
            files = [next(Path(args.gpt2_dir).glob(f"*{name}"), Path(args.gpt2_dir, name))
                     for name in ("vocab.json", "merges.txt")]
            tokenizer = Tokenizer.from_files(*files, [END_OF_TEXT])
        else:
            tokenizer = Tokenizer.load(folder)
        every = max(1, int(size / 1e6 / args.encode_mb))
        texts = list(bench_documents(args.corpus))[::every]
        encoding = bench_encode(tokenizer, texts, args)
    print(json.dumps({"corpus_bytes": size, "vocab_size": args.vocab_size,
                      "num_workers": args.num_workers, "small_s": small_s,
                      "train_s": {name: result[0] for name, result in training.items()},
                      "train_mib": {name: result[1] for name, result in training.items()},
                      "encode_mb_per_s": encoding}))


# ---------------------------------------------------------------- the verbs

def peak_memory_mib(num_workers):
    """Returns a bound of the peak memory of all processes together: each at its own peak.

    nan on Windows, which has no `resource`
    """
    try:
        import resource
    except ImportError:
        return float("nan")
    own, child = (resource.getrusage(who).ru_maxrss
                  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + num_workers * child) / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def text_files(args, special_tokens, folder):
    """The files of --input, but for a .jsonl(.gz) a text file in `folder` with its documents."""
    paths = list_files(args.input)
    for number, path in enumerate(paths):
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            if END_OF_TEXT not in special_tokens:
                raise ValueError(f"{path.name} must have the special token {END_OF_TEXT} between "
                                 f"documents, got {special_tokens}; add it, or give plain text")
            paths[number], _ = write_splits(path, Path(folder, str(number)), args.errors, False)
    return paths


def train(args):
    """Text to a tokenizer.json; time, memory and longest token are printed."""
    if not args.input:
        raise ValueError("train must have --input, got none; name text files or folders")
    if os.path.isfile(args.out_dir):
        raise ValueError(f"out_dir must be a folder, got the file {args.out_dir}; rename it")
    started = time.perf_counter()
    pattern = PATTERNS[args.pattern]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = train_bpe(text_files(args, args.special_tokens, folder), args.vocab_size,
                                  args.special_tokens, args.num_workers, pattern,
                                  errors=args.errors, progress=True)
    tokenizer = Tokenizer(vocab, merges, args.special_tokens, pattern)
    tokenizer.save(Path(args.out_dir, "tokenizer.json"))
    if args.gpt2_files:
        tokenizer.save_gpt2(args.out_dir)
    longest = max((left + right for left, right in merges), key=len, default=b"")
    print(f"{len(vocab):,} tokens in {time.perf_counter() - started:.2f} s | peak memory "
          f"{peak_memory_mib(args.num_workers):,.0f} MiB, all processes | longest token "
          f"{longest.decode(errors='replace')!r} | {args.out_dir}/tokenizer.json")


def encode(args):
    """Text of the command line to ids, or files to a file of tokens."""
    tokenizer = Tokenizer.load(args.tokenizer)
    if (args.text is None) != bool(args.input) or args.text is not None and args.out:
        raise ValueError("encode must have --text alone or --input, got neither or both; give one")
    if args.text is not None:
        print(*tokenizer.encode(args.text))
        return
    args.input = list_files(args.input)  # before there is any file of our own
    with tempfile.TemporaryDirectory() as folder:
        out = check_token_path(args.out or Path(folder, "measured.bin"))
        texts = Path(f"{out}.text")  # a kill leaves it, and the next call goes on with it
        with alone_with(Path(f"{out}.lock")):
            started = time.perf_counter()
            meta = write_tokens(text_files(args, tokenizer.special_tokens, texts), tokenizer, out,
                                args.num_workers, errors=args.errors, progress=True)
            seconds = time.perf_counter() - started
            shutil.rmtree(texts, ignore_errors=True)
    print(f"{meta['tokens']:,} tokens of {meta['bytes']:,} bytes of text in {meta['documents']:,} "
          f"documents | {meta['bytes'] / max(1, meta['tokens']):.3f} bytes/token | {seconds:.2f} s "
          f"| {meta['bytes'] / 1e6 / seconds:.2f} MB/s | {args.out or 'not kept: no --out'}")


def decode(args):
    """Ids of the command line, or of a file of tokens, to text."""
    tokenizer = Tokenizer.load(args.tokenizer)
    if (args.ids is None) == (args.input is None):
        raise ValueError("decode must have --ids or --input, got neither or both; give one")
    if args.count is not None and args.count < 0:
        raise ValueError(f"count must be at least 0, got {args.count}; raise it")
    ids = args.ids if args.input is None else read_tokens(args.input, tokenizer)[0]
    print(tokenizer.decode(ids[:args.count]))


def build_parser():
    """Returns the argparse parser of all verbs."""
    parser = argparse.ArgumentParser(prog="bpe.py", description=__doc__.split("\n", 1)[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = {}
    for verb in (train, encode, decode, bench):
        sub = verbs.add_parser(verb.__name__, help=verb.__doc__.split("\n", 1)[0])
        sub.set_defaults(run=verb)
        add[verb] = sub.add_argument
    for verb in (train, encode, bench):
        add[verb]("--input", nargs="+", help="text files, .jsonl(.gz) with \"text\", folders")
        add[verb]("--num_workers", type=int, default=default_workers(None))
    for verb in (train, encode):
        add[verb]("--errors", choices=("strict", "replace"), default="strict",
                  help="what to do with bytes that are not UTF-8")
    for verb in (encode, decode):
        add[verb]("--tokenizer", required=True, help="tokenizer.json, or the folder that holds it")
    add[train]("--vocab_size", type=int, required=True)
    add[train]("--special_tokens", nargs="*", default=[END_OF_TEXT])
    add[train]("--pattern", choices=PATTERNS, default="gpt2")
    add[train]("--out_dir", required=True)
    add[train]("--gpt2_files", action="store_true", help="write vocab.json and merges.txt too")
    add[encode]("--text", help="print the ids of this text")
    add[encode]("--out", help="NAME.bin; without it the ids are only counted and timed")
    add[decode]("--ids", nargs="*", type=int)
    add[decode]("--input", help="NAME.bin")
    add[decode]("--count", type=int, help="only so many tokens from the start")
    add[bench]("--vocab_size", type=int, default=32_000)
    add[bench]("--max_mb", type=float, default=321, help="of text, at most")
    add[bench]("--corpus", help="use this text file as it is instead of --input")
    add[bench]("--gpt2_dir", help="encode with the vocab.json and merges.txt in here")
    add[bench]("--encode_mb", type=float, default=20, help="of text to encode, about")
    add[bench]("--repeats", type=int, default=5)
    add[bench]("--train_repeats", type=int, default=1)
    return parser


def main(argv=None):
    """Runs the command line; a user's error is one line and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        if hasattr(sys.stdout, "reconfigure"):  # print what the terminal's encoding lacks, escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"bpe.py {args.verb}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"bpe.py {args.verb}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
