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
import time
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

import bpe

# ---------------------------------------------------------------- models of fastText's kind

FASTTEXT_MAGIC, FASTTEXT_VERSION = 793712314, 12
HS, NS, SOFTMAX, OVA = 1, 2, 3, 4  # losses, by fastText's numbers
SUPERVISED = 3
FASTTEXT_ARGS = ("dim", "ws", "epoch", "min_count", "neg", "word_ngrams", "loss", "model",
                 "bucket", "minn", "maxn", "lr_update_rate")
END_OF_LINE = b"</s>"  # fastText's word for the end of each line
LABEL_PREFIX = b"__label__"
MAX_CACHED_IDS = 1 << 23  # n-gram ids of words that a model remembers: 64 MB
BATCH_BYTES = 1 << 20  # of text that predict looks at together
BLOCK_FLOATS = 1 << 20  # of rows that are gathered at a time


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
                window, size = bytes(self.bytes[self.at:self.at + (1 << 20)]), len(window)
                start = self.at
                end = window.find(b"\0")
                if end < 0 or end + 10 > len(window):
                    self.array(np.uint8, self.size)  # says what is wrong
            found.append((window[self.at - start:end], *ENTRY.unpack_from(window, end + 1)))
            self.at = start + end + 10
        return found


ENTRY = struct.Struct("<qb")


class DenseMatrix:
    """(m, n) float32, mapped from the file: opened at once, shared by processes."""

    def __init__(self, file):
        m, n = file.numbers("qq")
        self.values = file.array("<f4", m * n).reshape(m, n)
        self.shape = m, n

    def rows(self, ids):
        return self.values[ids]


class QuantMatrix:
    """Rows put together from 256 centroids for each few columns; norms apart where qnorm says."""

    def __init__(self, file):
        qnorm = file.numbers("?")
        m, n = self.shape = file.numbers("qq")
        codes = file.array(np.uint8, file.numbers("i"))
        self.tables = self.read_centroids(file)
        self.codes = codes.reshape(m, len(self.tables))
        self.norm_codes = file.array(np.uint8, m) if qnorm else None
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


class FastText:
    """A supervised fastText model in NumPy: what the library answers, without the library.

    args: dict of FASTTEXT_ARGS; words: list of bytes; labels, label_counts: lists by index;
    inputs: matrix with `rows`, (words + buckets, dim); output: (labels, dim) float32.
    pruned: None, or (bucket,) int32, the row of each n-gram bucket, -1 where it was dropped.
    """

    def __init__(self, args, words, labels, label_counts, inputs, output, pruned=None):
        self.__dict__.update(args)
        self.args, self.words, self.labels, self.label_counts = args, words, labels, label_counts
        self.inputs, self.output, self.pruned = inputs, output, pruned
        self.word_ids = {word: number for number, word in enumerate(words)}
        self.label_words = {LABEL_PREFIX + label.encode("utf-8", "surrogateescape")
                            for label in labels}
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
            pruned[pairs[:, 0]] = pairs[:, 1]
        quantised = file.numbers("?")
        inputs = read_matrix(file, quantised)
        output = read_matrix(file, file.numbers("?") and quantised)
        output = np.ascontiguousarray(output.rows(np.arange(output.shape[0])))
        if file.at != file.size:
            raise ValueError(f"{path} must end after its matrices, got {file.size - file.at} bytes "
                             "more; copy it again")
        labels = [entry[0].removeprefix(LABEL_PREFIX).decode("utf-8", "surrogateescape")
                  for entry in entries[n_words:]]
        model = cls(args, [entry[0] for entry in entries[:n_words]], labels,
                    [entry[1] for entry in entries[n_words:]], inputs, output, pruned)
        notes = Path(f"{path}.json")
        model.lower = notes.exists() and json.loads(notes.read_text("utf-8")).get("lower", False)
        return model

    def save(self, path, word_counts):
        """Writes a dense .bin that the library loads too."""
        args = struct.pack("<2i12id", FASTTEXT_MAGIC, FASTTEXT_VERSION,
                           *(self.args[name] for name in FASTTEXT_ARGS), self.args["t"])
        entries = [(word, count, 0) for word, count in zip(self.words, word_counts, strict=True)]
        entries += [(LABEL_PREFIX + label.encode("utf-8", "surrogateescape"), count, 1)
                    for label, count in zip(self.labels, self.label_counts, strict=True)]
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
        self.numbers, self.flat = {}, np.empty(1 << 16, np.int64)
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
        skipped = [word in self.label_words or (word not in self.word_ids
                                                and word.startswith(LABEL_PREFIX))
                   for word in words]
        own = np.array([-1 if skip else self.word_ids.get(word, -1)
                        for word, skip in zip(words, skipped, strict=True)])
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
        first = len(self.numbers)
        self.numbers.update((word, first + i) for i, word in enumerate(words))
        hashes = np.array([fnv(word) for word in words] if self.word_ngrams > 1 else
                          [0] * len(words), np.uint32).view(np.int32).astype(np.int64)
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
        new = list(dict.fromkeys(word for words in documents for word in words
                                 if word not in self.numbers))
        if new:
            self.learn_words(new)
        found = []
        for words in documents:
            numbers = np.fromiter(map(self.numbers.__getitem__, words), np.int64, len(words))
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
            p = np.exp(z - z.max(1, keepdims=True))
            p = p / p.sum(1, keepdims=True, dtype=np.float32)
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
