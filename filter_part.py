"""Language, harm, quality and duplicates of text: models of fastText's kind, MinHash, no library.

    python filter_part.py classify --kind language --text "Wo ist der Bahnhof?"     # de
    python filter_part.py classify --train good.jsonl bad.jsonl --model quality.bin # and its AUC
    python filter_part.py dedup --input texts/ --out_dir unique/                    # near duplicates

Sources:
    [1] Joulin et al. 2016, Bag of Tricks for Efficient Text Classification; fastText 1142dc4's
        format of files
    [2] Broder 1997, On the resemblance and containment of documents
    [3] Stanford CS336, assignment 4 (data), 2025
    [4] Dietzfelbinger et al. 1997, multiply-shift hashing
    [5] Soldaini et al. 2024, Dolma: labels and thresholds of its classifiers
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import string
import struct
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from itertools import compress, islice, pairwise
from pathlib import Path

import numpy as np
import regex

import bpe

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
KINDS = ("language", *BUILT_IN)


class Classifier:
    """Labels texts by a model file, or without one by what is written here; `method` says which.

    predict: list of str -> list of (label, score from 0 to 1): of the label given.
    """

    def __init__(self, kind, model=None):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}; choose one")
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


# ---------------------------------------------------------------- the verbs

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
    """Returns the argparse parser of all verbs."""
    parser = argparse.ArgumentParser(prog="filter_part.py", description=__doc__.split("\n", 1)[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = {}
    for verb in (classify, dedup, bench):
        sub = verbs.add_parser(verb.__name__, help=verb.__doc__)
        sub.set_defaults(run=verb)
        add[verb] = sub.add_argument
    add_classify_flags(add[classify])
    add_dedup_flags(add[dedup])
    add[bench]("--documents", type=int, default=300)
    add[bench]("--repeats", type=int, default=5)
    return parser


def add_classify_flags(add):
    add("--kind", choices=KINDS, default="quality", help="what to tell, where --model is not given")
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


def main(argv=None):
    """Runs the command line; a user's error is one line and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"filter_part.py {args.verb}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"filter_part.py {args.verb}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
