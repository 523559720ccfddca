"""bpe.py: worked examples, equality with the reference, rivals as oracles, bad input, verbs."""

import gzip
import importlib
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpe
from bpe import END_OF_TEXT, PATTERNS, Tokenizer, train_bpe, train_bpe_reference

PAPER = "low " * 5 + "lower " * 2 + "widest " * 3 + "newest " * 5 + "newest"
ALPHABETS = ("ab", "abc \n", "aA's 1\r\n", "aé汉\u0301 \n.,!ſ\u2028", "<|endof text|>",
             "12²Ⅷ.,= \r\n\n", "a1' =\u0301\n\t\x1c\u3000\u00a0")


def write(path, text):
    path.write_bytes(text.encode())
    return path


def random_text(rng, size, alphabet=None):
    """Text that repeats itself, with special tokens whole, cut and overlapping."""
    pieces = list(alphabet or rng.choice(ALPHABETS)) + [END_OF_TEXT, "<|end", "'ll", "  ", "<a><a>"]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, size)))


def random_unicode(rng, size):
    """Any code points, control characters and surrogates among them."""
    ranges = (0x80, 0x80, 0x80, 0x800, 0x3100, 0xE000, 0x110000)
    return "".join(chr(rng.randrange(rng.choice(ranges))) for _ in range(rng.randint(0, size)))


def sample_text(size=60_000):
    """Real English and code, found in any checkout: this project's own sources."""
    root = Path(bpe.__file__).parent
    text = "".join(path.read_text("utf-8") for path in (root / "bpe.py", Path(__file__)))
    return (text * (size // len(text) + 1))[:size]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write(
        folder / "corpus.txt",
        sample_text() + END_OF_TEXT + "Ünïcödé 汉字 🙂, it's 12345.\r\n" * 9,
    )


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer(
        *train_bpe(corpus, 700, [END_OF_TEXT, "<a>", "<a><a>"], 1), [END_OF_TEXT, "<a>", "<a><a>"]
    )


# ---------------------------------------------------------------- pre-tokens and cuts


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_fast_pretokens_equal_the_plain_ones(pattern, monkeypatch):
    monkeypatch.setattr(bpe, "BLOCK_CHARS", 3)
    rng = random.Random(1)
    every_ascii = "".join(f"{a}{b}" for a in map(chr, range(128)) for b in "aA1 \n'.\x1c")
    for text in (
        [every_ascii]
        + [random_text(rng, 40) for _ in range(300)]
        + [random_unicode(rng, 30) for _ in range(300)]
    ):
        blocks = bpe.pretokenizer(pattern)(text)
        assert [word for block in blocks for word in block] == list(bpe.pretokens(pattern, text))


def test_pretokens_of_gpt2_and_gpt4_differ_as_published():
    text = "I'LL pay 12345!\n\n  ok"
    assert list(bpe.pretokens(PATTERNS["gpt2"], text)) == [
        "I",
        "'",
        "LL",
        " pay",
        " 12345",
        "!",
        "\n\n ",
        " ok",
    ]
    assert list(bpe.pretokens(PATTERNS["gpt4"], text)) == [
        "I",
        "'LL",
        " pay",
        " ",
        "123",
        "45",
        "!\n\n",
        " ",
        " ok",
    ]
    assert list(bpe.pretokens(PATTERNS["qwen2"], "12")) == ["1", "2"]


def test_a_pattern_that_skips_characters_or_has_groups_loses_nothing():
    assert list(bpe.pretokens(r"(\w)(\w)*", "ab, c.")) == ["ab", ", ", "c", "."]


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), r"\w+|\s"], ids=[*PATTERNS, "custom"])
@pytest.mark.parametrize("special", [(), (END_OF_TEXT, "<a>", "<a><a>", "aa"), ("d|e", "t|><|")])
def test_a_cut_anywhere_it_is_called_safe_changes_nothing(pattern, special):
    def split(text):
        parts = bpe.special_splitter(special)(text)
        return [
            word
            for i, part in enumerate(parts)
            for word in ([part] if i % 2 else bpe.pretokens(pattern, part))
        ]

    rng, cuts = random.Random(2), 0
    find_cut = bpe.cut_finder(pattern, special)
    for _ in range(400):
        text, start = random_text(rng, 20), 1
        while (cut := find_cut(text, start)) > 0:
            assert split(text[:cut]) + split(text[cut:]) == split(text), (text, cut)
            start, cuts = cut + 1, cuts + 1
    assert cuts > 100 or (pattern not in PATTERNS.values() and len(special) < 3)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_cut_is_safe_where_normalizing_takes_letters_apart_and_together(pattern):
    def split(text):
        return list(bpe.pretokens(pattern, unicodedata.normalize("NFC", text)))

    letters = "a\u00e9\u5b57\u304b\uac00\u0915\u0958\ufb1d\u212a\u1100\u1161\u11a8\u2adc"  # U+0958: two then
    rng, cuts, find_cut = random.Random(2), 0, bpe.cut_finder(pattern, (), True)
    for _ in range(400):
        text, start = random_text(rng, 20, letters + "\u0301\u093c\u3099 1.\u3002\n"), 1
        while (cut := find_cut(text, start)) > 0:
            assert split(text[:cut]) + split(text[cut:]) == split(text), ascii((text, cut))
            start, cuts = cut + 1, cuts + 1
    assert cuts > 100


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("nfc", [True, False])
@pytest.mark.parametrize(
    "line", ["\u5b57\u3002\n", "\u0915 ", "12.345,6.789\n", "=====\n", "1 2 3 ", "- ", "a"], ids=ascii
)
def test_text_without_letters_or_without_ascii_is_cut_into_pieces_too(tmp_path, pattern, nfc, line):
    path = write(tmp_path / "t", line * 3000)
    pieces = bpe.plan_pieces([path], 1000, bpe.cut_finder(pattern, (), nfc), ())
    longest = max(end - start for _, start, end in pieces)
    assert longest < 1020 or (line == "a" and len(pieces) == 1)  # a run of letters is one pre-token


# ---------------------------------------------------------------- training


def test_the_example_of_the_paper_learns_the_merges_in_the_handout(tmp_path):
    vocab, merges = train_bpe(write(tmp_path / "t", PAPER), 256 + 12, [], 1, pattern=r"\w+|\s")
    assert merges[:6] == [
        (b"s", b"t"),
        (b"e", b"st"),
        (b"o", b"w"),
        (b"l", b"ow"),
        (b"w", b"est"),
        (b"n", b"e"),
    ]
    assert vocab[256] == b"st" and vocab[261] == b"ne" and len(vocab) == 268


def test_ties_go_to_the_lexicographically_greater_pair_of_byte_strings(tmp_path):
    text = "BA ZA BA ZA"  # (B, A) and (Z, A) occur twice; so do (" ", Z) and others
    assert train_bpe(write(tmp_path / "t", text), 257, [], 1)[1] == [(b"Z", b"A")]
    assert sorted([b"ab", b"abc", b"b", b"a\xff", b""], key=bpe.descending) == [
        b"b",
        b"a\xff",
        b"abc",
        b"ab",
        b"",
    ]


def test_runs_of_one_letter_merge_from_the_left(tmp_path):
    assert bpe.every_other(np.array([0, 1, 2, 5, 6]), 1).tolist() == [0, 2, 5]
    assert train_bpe(write(tmp_path / "t", "a" * 7), 259, [], 1)[1] == [
        (b"a", b"a"),
        (b"aa", b"aa"),
        (b"aaaa", b"aa"),
    ]


def test_merges_equal_the_reference_for_random_text_patterns_and_pieces(tmp_path):
    rng, compared = random.Random(3), 0
    for _ in range(250):
        text, special = (
            random_text(rng, 300),
            rng.choice([[], [END_OF_TEXT], [END_OF_TEXT, "<a>", "aa"]]),
        )
        pattern = rng.choice([*PATTERNS.values(), r"\w+|\s", r"(?s:.+)"])
        size = 256 + len(special) + rng.randint(0, 40)
        path = write(tmp_path / "t", text)
        try:
            expected = train_bpe_reference(text, size, special, pattern)
        except ValueError:
            with pytest.raises(ValueError, match="vocab_size must be at most|at least 2 bytes"):
                train_bpe(path, size, special, 1, pattern)
            continue
        compared += 1
        assert (
            train_bpe(path, size, special, 1, pattern, piece_bytes=rng.randint(1, 60)) == expected
        )
    assert compared > 150


def test_merges_equal_the_reference_on_real_text(corpus):
    text = corpus.read_bytes().decode()
    assert train_bpe(corpus, 520, [END_OF_TEXT], 1) == train_bpe_reference(text, 520, [END_OF_TEXT])


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_merges_do_not_depend_on_workers_pieces_or_the_order_of_files(
    corpus, tmp_path, monkeypatch, start_method
):
    if start_method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    other = write(
        tmp_path / "other.txt", random_text(random.Random(4), 3000, "abc \n") + "low lower"
    )
    expected = train_bpe([corpus, other], 600, [END_OF_TEXT], 1)
    monkeypatch.setattr(bpe, "START_METHOD", start_method)
    monkeypatch.setattr(bpe, "PIECE_BYTES", 1)  # even these small files are shared out
    monkeypatch.setattr(bpe, "MAX_DISTINCT", 50)  # workers hand over often
    assert train_bpe([other, corpus], 600, [END_OF_TEXT], 2, piece_bytes=5000) == expected
    if start_method == "fork":
        assert train_bpe([corpus, other], 600, [END_OF_TEXT], 3, piece_bytes=700) == expected


def test_keys_of_pairs_do_not_overflow_32_bits():
    words = [b"abababab", b"abcabc", b"cabab"]
    table = bpe.PairTable(words, np.array([3, 2, 2]), 1 << 24)  # its keys exceed 256 << 24
    merges = [table.merge(table.best()) for _ in range(5)]
    text = " ".join(["abababab"] * 3 + ["abcabc"] * 2 + ["cabab"] * 2)
    expected = train_bpe_reference(text, 261, [], r"\w+|\s")[1]
    assert [(table.tokens[left], table.tokens[right]) for left, right in merges] == expected


def test_a_pre_token_of_a_megabyte_trains_and_encodes(tmp_path):
    vocab, merges = train_bpe(write(tmp_path / "t", "a" * (1 << 18)), 256 + 18, [], 1)
    assert max(vocab.values(), key=len) == b"a" * (1 << 18)
    small = Tokenizer(vocab, merges)
    assert small.encode("a" * (1 << 18)) == [273]


# ---------------------------------------------------------------- encoding and decoding


def test_the_heap_merges_what_the_naive_loop_merges(tokenizer):
    rng = random.Random(6)
    for _ in range(300):
        data = random_text(rng, 60).encode() if rng.random() < 0.5 else rng.randbytes(30)
        naive = bpe.merge_naive(list(data), tokenizer._ranks, tokenizer._merged)
        assert bpe.merge_heap(list(data), tokenizer._ranks, tokenizer._merged) == naive


def test_the_example_of_the_handout_encodes_as_it_says():
    vocab = dict(
        enumerate([b" ", b"a", b"c", b"e", b"h", b"t", b"th", b" c", b" a", b"the", b" at"])
    )
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    handout = Tokenizer(vocab, merges)
    assert handout.encode("the cat ate") == [9, 7, 1, 5, 10, 3]
    assert handout.decode([9, 7, 1, 5, 10, 3]) == "the cat ate"
    with pytest.raises(ValueError, match="got 0x7a"):
        handout.encode("z")


def test_any_text_comes_back_from_its_ids(tokenizer):
    rng = random.Random(7)
    for _ in range(500):
        text = random_unicode(rng, 20) + random_text(rng, 20)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == bpe.join_surrogates(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_special_tokens_are_whole_longest_first_and_plain_where_the_caller_says(tokenizer):
    end, a, aa = (tokenizer.special_ids[token] for token in (END_OF_TEXT, "<a>", "<a><a>"))
    assert tokenizer.encode(f"<a><a><a>{END_OF_TEXT}") == [aa, a, end]
    plain = tokenizer.encode(f"x{END_OF_TEXT}", special=False)
    assert end not in plain and tokenizer.decode(plain) == f"x{END_OF_TEXT}"


def test_special_tokens_that_the_vocabulary_lacks_get_new_ids():
    grown = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<s>", "a"])
    assert (
        grown.encode("<s>a") == [256, 97] and grown.vocab[256] == b"<s>" and grown.vocab_size == 257
    )


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("nfc", [True, False])
def test_a_stream_gives_the_ids_of_the_whole_however_it_is_chunked(
    tokenizer, monkeypatch, special, nfc
):
    monkeypatch.setattr(bpe, "STREAM_CHARS", 2)
    rng = random.Random(8)
    for pattern in [*PATTERNS.values(), r"\w+|\s"]:
        streamed = Tokenizer(
            tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern, nfc=nfc
        )
        for _ in range(60):
            text = random_text(rng, 30) + random_unicode(rng, 10) + "e\u0301\u0958!\r\n\r\n  x"
            chunks, start = [], 0
            while start < len(text):
                chunks.append(text[start : start + rng.randint(0, 5)])
                start += len(chunks[-1])
            assert list(streamed.encode_iterable(chunks, special)) == streamed.encode(text, special)


def test_a_stream_is_read_as_it_is_encoded(tokenizer):
    read = 0

    def lines():
        nonlocal read
        for read in range(100_000):
            yield f"line {read} of many\n"

    ids = tokenizer.encode_iterable(lines())
    next(ids)
    assert read < 10_000


def test_batches_equal_single_texts_for_any_number_of_workers(tokenizer, monkeypatch):
    monkeypatch.setattr(bpe, "PIECE_BYTES", 4096)
    rng = random.Random(9)
    texts = [random_text(rng, 200) for _ in range(100)] + ["", sample_text(3000)]
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, 1) == tokenizer.encode_batch(texts, 2) == expected
    assert tokenizer.encode_batch([], 2) == []
    monkeypatch.setattr(bpe, "START_METHOD", "spawn")  # what macOS and Windows do
    assert tokenizer.encode_batch(texts, 2) == expected


def test_decode_replaces_what_is_not_utf8_and_refuses_ids_out_of_range(tokenizer):
    assert tokenizer.decode([0xE6, 0xB1]) == "\ufffd" and tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([104, 105], np.uint16)) == "hi"
    rng = random.Random(10)
    for _ in range(200):
        tokenizer.decode([rng.randrange(tokenizer.vocab_size) for _ in range(20)])
    for wrong in ([-1], [tokenizer.vocab_size], [0.5]):
        with pytest.raises(ValueError, match="ids must be"):
            tokenizer.decode(wrong)
    assert Tokenizer({0: b"a", 5: b"b"}, []).decode([0, 3, 5]) == "a\ufffdb"


def test_the_cache_stays_within_its_bounds(tokenizer, monkeypatch):
    monkeypatch.setattr(bpe, "CACHE_ENTRIES", 10)
    tokenizer._cache.clear()
    text = sample_text(5000) + " " + "x" * 1000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(tokenizer._cache) <= 10
    assert all(len(word) <= bpe.CACHED_CHARS for word in tokenizer._cache)


def test_ids_equal_tiktoken_for_any_string(tokenizer):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    ordinary = {
        token: index
        for index, token in tokenizer.vocab.items()
        if index not in tokenizer.special_ids.values()
    }
    oracle = tiktoken.Encoding(
        "test",
        pat_str=bpe.GPT2_PATTERN,
        mergeable_ranks=ordinary,
        special_tokens=tokenizer.special_ids,
    )
    rng = random.Random(11)
    for text in [sample_text()] + [
        random_unicode(rng, 30) + random_text(rng, 30) for _ in range(2000)
    ]:
        if "<a>" not in text:  # tiktoken does not prefer the longest special token
            assert tokenizer.encode(text) == oracle.encode(text, allowed_special="all"), ascii(text)
            assert tokenizer.encode(text, special=False) == oracle.encode_ordinary(text)


# ---------------------------------------------------------------- tokenizer files


def hugging_face_layout(name, tokenizer, as_lists):
    """The tokenizer.json of that model family, with the given vocabulary and merges."""
    special = tokenizer.special_ids
    merges = [[bpe.spell(left), bpe.spell(right)] for left, right in tokenizer.merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bos = {
        "type": "TemplateProcessing",
        "pair": [],
        "single": [
            {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "special_tokens": {
            END_OF_TEXT: {"id": END_OF_TEXT, "ids": [special[END_OF_TEXT]], "tokens": [END_OF_TEXT]}
        },
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERNS.get(name)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token == END_OF_TEXT,
            }
            for token, index in special.items()
        ],
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": byte_level
        if name == "gpt2"
        else {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, bos]}
        if name == "llama3"
        else byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "" if name == "qwen2" else None,
            "end_of_word_suffix": "" if name == "qwen2" else None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name == "llama3",
            "vocab": {
                bpe.spell(token): index
                for index, token in tokenizer.vocab.items()
                if index not in special.values()
            },
            "merges": merges if as_lists else [" ".join(pair) for pair in merges],
        },
    }


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2"])
@pytest.mark.parametrize("as_lists", [True, False], ids=["lists", "strings"])
def test_files_in_the_layouts_of_known_models_load_save_and_encode_alike(
    name, as_lists, tokenizer, tmp_path
):
    data = hugging_face_layout(name, tokenizer, as_lists)
    path = write(tmp_path / "tokenizer.json", json.dumps(data))
    loaded = Tokenizer.load(path)
    assert loaded.pattern == PATTERNS[name] and loaded.nfc == (name == "qwen2")
    assert loaded.ignore_merges == (name == "llama3")
    loaded.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.sha256 == loaded.sha256 and again.post_processor == data["post_processor"]
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    rivals = [
        tokenizers.Tokenizer.from_file(str(file))
        for file in (path, tmp_path / "again" / "tokenizer.json")
    ]
    rng = random.Random(12)
    for text in [sample_text(9000)] + [random_text(rng, 40) for _ in range(200)]:
        ids = again.encode(text)
        for rival in rivals:
            assert rival.encode(text, add_special_tokens=False).ids == ids, ascii(text)
        assert rivals[1].decode(ids, skip_special_tokens=False) == again.decode(ids)


def test_ignored_merges_take_a_pre_token_that_is_a_token_as_it_is():
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abc"}
    merges = [(b"a", b"b")]  # nothing makes "abc"
    assert Tokenizer(vocab, merges).encode("abc") == [256, 99]
    assert Tokenizer(vocab, merges, ignore_merges=True).encode("abc") == [257]


def test_a_vocabulary_with_gaps_keeps_its_ids_in_files(tmp_path):
    vocab = {i + 10 * (i > 100): bytes([i]) for i in range(256)} | {900: b"ab"}
    Tokenizer(vocab, [(b"a", b"b")], ["<s>", "<ü x>"]).save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (
        loaded.encode("ab<s><ü x>") == [900, 901, 902]
        and loaded.vocab[300 - 44 - 1 + 10] == b"\xff"
    )
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    rival = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert rival.encode("ab<s><ü x>").ids == [900, 901, 902]


def test_the_pair_of_files_of_gpt2_goes_out_and_comes_in(tokenizer, tmp_path):
    tokenizer.save_gpt2(tmp_path)
    loaded = Tokenizer.from_files(
        tmp_path / "vocab.json", tmp_path / "merges.txt", tokenizer.special_tokens
    )
    assert loaded.sha256 == tokenizer.sha256
    assert bpe.spell(b" the\n") == "ĠtheĊ" and bpe.unspell("ĠtheĊ") == b" the\n"


@pytest.mark.parametrize("twice, special", [("a", ["a"]), ("ab", ["ab"]), ("a", []), ("ab", [])])
def test_two_ids_of_one_token_special_or_not_are_saved_in_neither_form(tmp_path, twice, special):
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: twice.encode()}
    tokenizer = Tokenizer(vocab, [(b"a", b"b")], special)
    for save in (tokenizer.save, tokenizer.save_gpt2):
        with pytest.raises(ValueError, match=f"must not be spelled .*, got '{twice}' as ids .*257"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_token_that_is_declared_special_keeps_its_id_in_both_forms(tmp_path):
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab"}
    tokenizer = Tokenizer(vocab, [(b"a", b"b")], ["ab"])
    tokenizer.save(tmp_path)
    tokenizer.save_gpt2(tmp_path)
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    assert Tokenizer.from_files(*files, ["ab"]).sha256 == tokenizer.sha256


def test_a_special_token_that_a_reader_is_shown_stays_so_in_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert all(added["special"] for added in data["added_tokens"])
    data["added_tokens"][1]["special"] = False  # "<a>", as Qwen3 has <think>
    write(tmp_path / "tokenizer.json", json.dumps(data))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.shown_tokens == {"<a>"} and loaded.encode("<a>") == tokenizer.encode("<a>")
    loaded.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer.json").read_text("utf-8"))
    assert [added["special"] for added in again["added_tokens"]] == [True, False, True]


def test_the_hash_tells_tokenizers_apart(tokenizer):
    fields = tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens
    hashes = {
        tokenizer.sha256,
        Tokenizer(*fields, PATTERNS["gpt4"]).sha256,
        Tokenizer(*fields, nfc=True).sha256,
        Tokenizer(*fields[:2], [END_OF_TEXT]).sha256,
        Tokenizer(fields[0], fields[1][:-1], fields[2]).sha256,
    }
    assert len(hashes) == 5 and Tokenizer(*fields).sha256 == tokenizer.sha256


# ---------------------------------------------------------------- files of tokens


@pytest.mark.parametrize("workers, piece_bytes", [(1, 100), (2, 7000), (1, 1 << 20)])
def test_a_file_of_tokens_holds_the_ids_of_the_texts_in_order(
    tokenizer, corpus, tmp_path, monkeypatch, workers, piece_bytes
):
    monkeypatch.setattr(bpe, "PIECE_BYTES", 1)
    other = write(tmp_path / "other.txt", f"two{END_OF_TEXT}three")
    meta = bpe.write_tokens(
        [corpus, other], tokenizer, tmp_path / "x.bin", workers, piece_bytes
    )
    ids, read = bpe.read_tokens(tmp_path / "x.bin", tokenizer, tokenizer.vocab_size)
    texts = [path.read_bytes().decode() for path in (corpus, other)]
    assert ids.tolist() == [index for text in texts for index in tokenizer.encode(text)]
    assert read == meta == json.loads((tmp_path / "x.json").read_text())
    assert meta["documents"] == sum(text.count(END_OF_TEXT) + 1 for text in texts)
    assert ids.dtype == np.uint16 and meta["tokens"] == len(ids)
    plain = [part for text in texts for part in tokenizer._split[True](text)[::2]]
    assert meta["bytes"] == len("".join(plain).encode())
    assert meta["source_hash"] == bpe.files_sha256([corpus, other])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "x.bin", "x.json"]


def test_more_than_65536_ids_are_written_in_32_bits(tmp_path):
    vocab = {i: bytes([i]) for i in range(256)} | {65536: b"ab"}
    wide = Tokenizer(vocab, [(b"a", b"b")])
    bpe.write_tokens(write(tmp_path / "t", "abc"), wide, tmp_path / "x.bin", 1)
    ids, meta = bpe.read_tokens(tmp_path / "x.bin", wide)
    assert ids.tolist() == [65536, 99] and meta["dtype"] == "uint32" and ids.dtype == np.uint32


def test_encoding_killed_with_minus_9_goes_on_and_gives_the_same_file(tokenizer, tmp_path):
    source = write(tmp_path / "t.txt", sample_text(400_000))
    tokenizer.save(tmp_path / "tok")
    script = (
        "import sys, time, bpe; path, tok, out = sys.argv[1:]\n"
        "write = bpe.write_atomically\n"
        "bpe.write_atomically = lambda *args: (time.sleep(0.05), write(*args))\n"
        "bpe.write_tokens(path, bpe.Tokenizer.load(tok), out, 2, piece_bytes=5000)"
    )
    out = tmp_path / "x.bin"
    process = subprocess.Popen(
        [sys.executable, "-c", script, source, tmp_path / "tok", out], cwd=Path(bpe.__file__).parent
    )
    parts = tmp_path / "x.bin.parts"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(parts.glob("0000000[3-9]")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.3)  # the workers notice and end
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("0*") if path.name.isdigit()}
    assert 3 < len(kept) < 80 and not out.exists()
    encoded = []
    real = bpe.encode_piece
    bpe.encode_piece = lambda number, *rest: (encoded.append(number), real(number, *rest))[1]
    try:
        bpe.write_tokens(source, Tokenizer.load(tmp_path / "tok"), out, 1, piece_bytes=5000)
    finally:
        bpe.encode_piece = real
    assert not {int(path.name) for path in kept} & set(encoded) and encoded
    assert bpe.read_tokens(out)[0].tolist() == tokenizer.encode(source.read_text())
    assert not parts.exists()


def test_changed_text_or_tokenizer_does_not_go_on_from_old_pieces(tokenizer, tmp_path):
    source, out = write(tmp_path / "t.txt", "old text " * 50), tmp_path / "x.bin"
    parts = tmp_path / "x.bin.parts"
    parts.mkdir()
    write(parts / "00000000", "left by another run")
    write(parts / "plan.json", "{}")
    bpe.write_tokens(source, tokenizer, out, 1)
    assert tokenizer.decode(bpe.read_tokens(out)[0]) == "old text " * 50


# ---------------------------------------------------------------- bad input


def whole(tmp_path, **changes):
    """A small tokenizer.json with these fields changed; "model.x" is a field of the model."""
    path = tmp_path / "bad.json"
    Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"ab"}, [(b"a", b"b")], ["<s>"]).save(
        path
    )
    data = json.loads(path.read_text("utf-8"))
    for name, value in changes.items():
        part = data["model"] if name.startswith("model_") else data
        part[name.removeprefix("model_")] = value
    return write(path, json.dumps(data))


@pytest.mark.parametrize(
    "text, size, special, message",
    [
        ("", 300, [], "at least 2 bytes, got 0"),
        ("a", 256, [], "at least 2 bytes, got 1"),
        ("some text", 255, [], "at least 256"),
        ("some text", 256, ["<s>"], "at least 257"),
        ("ab ab", 300, ["<s>"], "at most 259 for this corpus, which has 2 merges, got 300"),
        ("some text", 300, [""], "special token must be text that is not empty"),
        ("some text", 300, ["<s>", "<s>"], "'<s>' twice"),
    ],
)
def test_bad_training_input_is_said_in_one_line(tmp_path, text, size, special, message):
    with pytest.raises(ValueError, match=message) as error:
        train_bpe(write(tmp_path / "t", text), size, special, 1)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_named_by_position_or_replaced(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"good text " * 30 + b"\xff bad " + b"good text " * 30)
    for piece_bytes in (20, 1 << 20):
        with pytest.raises(ValueError, match=r"t must be UTF-8, got byte 0xff at position 300"):
            train_bpe(path, 270, [], 1, piece_bytes=piece_bytes)
    text = path.read_bytes().decode(errors="replace")
    assert train_bpe(path, 270, [], 1, errors="replace", piece_bytes=20) == train_bpe_reference(
        text, 270, []
    )
    with pytest.raises(ValueError, match="errors must be"):
        train_bpe(path, 270, [], 1, errors="ignore")


def test_an_error_in_a_worker_reaches_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "PIECE_BYTES", 1)
    path = tmp_path / "t"
    path.write_bytes(b"good text " * 300 + b"\xff")
    with pytest.raises(ValueError, match="position 3000"):
        train_bpe(path, 260, [], 2, piece_bytes=1000)


def test_a_pattern_that_is_no_regex_is_refused(tmp_path):
    with pytest.raises(ValueError, match="regular expression"):
        train_bpe(write(tmp_path / "t", "text text"), 260, [], 1, pattern="(")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "WordPiece"}, "got WordPiece"),
        ({"model_type": "Unigram"}, "got Unigram"),
        ({"model_byte_fallback": True}, "byte_fallback"),
        ({"model_unk_token": "<unk>"}, "unk_token '<unk>'"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "got Metaspace"),
        ({"pre_tokenizer": None}, "got none"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "use_regex"),
        ({"normalizer": {"type": "NFKC"}}, "got NFKC"),
        ({"model_vocab": {"汉": 0}}, "GPT-2's byte alphabet"),
        ({"model_merges": ["a b c"]}, "a merge must be two tokens"),
        ({"model_merges": ["x y"]}, "merges must give tokens"),
        ({"model": None}, "must hold a model"),
    ],
)
def test_tokenizer_files_of_another_kind_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(whole(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_missing_and_truncated_tokenizer_files_are_named(tokenizer, tmp_path):
    path = whole(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    for bad, message in (
        (path, "must be JSON"),
        (tmp_path / "none", "must be a file"),
        (write(tmp_path / "list.json", "[]"), "must hold a model"),
        (write(tmp_path / "model.json", '{"model": {}}'), "model.json"),
    ):
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(bad)
    tokenizer.save_gpt2(tmp_path)
    for name, text, message in (
        ("vocab.json", "[]", "vocab.json"),
        ("vocab.json", '{"a": 0, "b": [1, 2]}', r"vocab.json must hold .* got \[1, 2\] for 'b'"),
        ("vocab.json", '{"a": true}', "vocab.json must hold .* got True"),
        ("vocab.json", '{"a": -1}', "vocab.json must hold .* got -1"),
        ("vocab.json", whole(tmp_path).read_text("utf-8"), "vocab.json must hold .* got '1.0' for 'version'"),
        ("merges.txt", "a b c\n", "two tokens"),
        ("merges.txt", "q~ q~\n", "merges must give"),
    ):
        tokenizer.save_gpt2(tmp_path)
        write(tmp_path / name, text)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "must exist"),
        (lambda path: path.with_suffix(".json").unlink(), "x.json must be a file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "must hold"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "must describe"),
        (
            lambda path: path.with_suffix(".json").write_text(
                json.dumps(json.loads(path.with_suffix(".json").read_text()) | {"tokens": None})
            ),
            "must describe",
        ),
        (lambda path: path.with_suffix(".json").write_text("{"), "must be JSON"),
        (
            lambda path: path.with_suffix(".json").write_text(
                path.with_suffix(".json").read_text().replace("uint16", "float16")
            ),
            "dtype",
        ),
        (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "must be below"),
    ],
)
def test_damaged_files_of_tokens_are_refused(tokenizer, tmp_path, damage, message):
    path = tmp_path / "x.bin"
    bpe.write_tokens(write(tmp_path / "t", "some text"), tokenizer, path, 1)
    assert bpe.read_tokens(path, tokenizer)[0].tolist() == tokenizer.encode("some text")
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        bpe.read_tokens(path, tokenizer)
    assert "\n" not in str(error.value)


def test_a_file_of_tokens_must_suit_tokenizer_and_model(tokenizer, tmp_path):
    path = tmp_path / "x.bin"
    bpe.write_tokens(write(tmp_path / "t", "some text"), tokenizer, path, 1)
    with pytest.raises(ValueError, match="made by the tokenizer"):
        bpe.read_tokens(path, Tokenizer({i: bytes([i]) for i in range(256)}, []))
    with pytest.raises(ValueError, match="below 100"):
        bpe.read_tokens(path, vocab_size=100)
    with pytest.raises(ValueError, match="NAME.bin"):
        bpe.write_tokens(tmp_path / "t", tokenizer, tmp_path / "x.txt", 1)
    with pytest.raises(ValueError, match="must hold a byte, got none in .*empty"):
        bpe.write_tokens(write(tmp_path / "empty", ""), tokenizer, tmp_path / "y.bin", 1)
    assert not (tmp_path / "y.bin").exists()


# ---------------------------------------------------------------- downloads


class Reply:
    """What requests.get gives: `content`, answered by ranges as a server would."""

    history = ()

    def __init__(self, content, total, asked):
        start = int(asked[6:-1]) if asked else 0
        self.status_code = 416 if asked and start >= len(content) else 206 if asked else 200
        self.body = b"" if self.status_code == 416 else content[start:]
        self.headers = {"Content-Length": str(len(self.body))}
        if self.status_code == 416 and total:
            self.headers["Content-Range"] = f"bytes */{len(content)}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def raise_for_status(self):
        assert self.status_code < 400

    def iter_content(self, size):
        return [self.body]


@pytest.mark.parametrize(
    "part, total, requests_made",
    [(b"a longer file of old", True, 2), (b"of old", False, 2), (b"whole", True, 1), (b"wh", True, 1)],
)
def test_a_part_that_is_not_of_the_file_is_fetched_anew(tmp_path, part, total, requests_made, monkeypatch):
    import requests

    asked = []

    def get(url, headers, **_):
        asked.append(headers.get("Range"))
        return Reply(b"whole", total, asked[-1])

    monkeypatch.setattr(requests, "get", get)
    (tmp_path / "x.part").write_bytes(part)
    bpe.download("http://127.0.0.1/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"whole" and len(asked) == requests_made
    assert asked[0] == f"bytes={len(part)}-" and asked[1:] == [None] * (requests_made - 1)


# ---------------------------------------------------------------- the command line


TOKENIZER = "a folder with a tokenizer"  # which the test fills in


def test_the_verbs_train_encode_and_decode(tmp_path, capsys):
    source = write(tmp_path / "t.txt", sample_text(20_000))
    folder = tmp_path / "tok"
    bpe.main(
        [
            "train",
            "--input",
            str(source),
            "--vocab_size",
            "400",
            "--out_dir",
            str(folder),
            "--num_workers",
            "1",
            "--gpt2_files",
            "--pattern",
            "gpt4",
        ]
    )
    assert "400 tokens" in capsys.readouterr().out and (folder / "merges.txt").exists()
    bpe.main(
        [
            "encode",
            "--tokenizer",
            str(folder),
            "--input",
            str(source),
            "--out",
            str(tmp_path / "x.bin"),
            "--num_workers",
            "1",
        ]
    )
    assert "bytes/token" in capsys.readouterr().out
    bpe.main(["decode", "--tokenizer", str(folder), "--input", str(tmp_path / "x.bin")])
    assert capsys.readouterr().out == source.read_text("utf-8") + "\n"
    bpe.main(["encode", "--tokenizer", str(folder), "--text", "hi" + END_OF_TEXT])
    ids = capsys.readouterr().out.split()
    assert ids[-1] == "399"
    bpe.main(["decode", "--tokenizer", str(folder), "--ids", *ids])
    assert capsys.readouterr().out == "hi" + END_OF_TEXT + "\n"


def test_bench_checks_itself_and_ends_in_one_json_line(tmp_path, capsys):
    write(tmp_path / "t.txt", sample_text(150_000))
    bpe.main(
        [
            "bench",
            "--input",
            str(tmp_path),
            "--vocab_size",
            "600",
            "--num_workers",
            "1",
            "--repeats",
            "2",
            "--encode_mb",
            "0.1",
        ]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["train_s"]["ours"] > 0 and result["encode_mb_per_s"]["ours, 1 process"] > 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--input", "none.txt", "--vocab_size", "300", "--out_dir", "x"], "none.txt"),
        (["train", "--vocab_size", "300", "--out_dir", "x"], "--input"),
        (["train", "--input", __file__, "--vocab_size", "300", "--out_dir", __file__], "a folder"),
        (["encode", "--tokenizer", "none", "--text", "a"], "none"),
        (["decode", "--tokenizer", "none", "--ids", "1"], "none"),
        (["encode", "--tokenizer", TOKENIZER, "--text", "a", "--input", __file__], "both"),
        (["encode", "--tokenizer", TOKENIZER, "--text", "a", "--out", "x.bin"], "alone"),
        (["decode", "--tokenizer", TOKENIZER, "--ids", "1", "--input", "x.bin"], "both"),
        (["decode", "--tokenizer", TOKENIZER, "--ids", "1", "--count", "-5"], "count must be"),
        (["train", "--input", __file__, "--vocab_size", "3", "--out_dir", "x"], "at least 257"),
        (
            [
                "train",
                "--input",
                __file__,
                "--vocab_size",
                "300",
                "--out_dir",
                "x",
                "--num_workers",
                "0",
            ],
            "num_workers",
        ),
    ],
)
def test_a_user_error_is_one_line_and_exit_status_2(
    argv, message, tokenizer, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    with pytest.raises(SystemExit) as exit_status:
        bpe.main([str(folder) if word is TOKENIZER else word for word in argv])
    error = capsys.readouterr().err
    assert exit_status.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_status:
        bpe.main(
            [
                "train",
                "--vocab",
                "300",
                "--input",
                "x",
                "--out_dir",
                "x",
                "--vocab_size",
                "3",
                "--no",
            ]
        )
    assert exit_status.value.code == 2


def test_importing_does_nothing(capsys):
    importlib.reload(bpe)
    assert capsys.readouterr() == ("", "")


def test_the_texts_of_a_jsonl_file_are_documents_in_train_and_encode(tmp_path, capsys):
    texts = ["one text\nof two lines", "another \u00e9", "the third"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(
        "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))  # fmt: skip
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join([*texts, ""]), encoding="utf-8")
    for kind in ("jsonl.gz", "txt"):
        bpe.main(["train", "--input", str(tmp_path / f"a.{kind}"), "--vocab_size", "260", "--num_workers", "1",
                  "--out_dir", str(tmp_path / kind)])  # fmt: skip
        bpe.main(["encode", "--tokenizer", str(tmp_path / kind), "--input", str(tmp_path / f"a.{kind}"),
                  "--out", str(tmp_path / f"{kind[:3]}.bin"), "--num_workers", "1"])  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path / "txt")
    assert tokenizer.sha256 == Tokenizer.load(tmp_path / "jsonl.gz").sha256
    ids, meta = bpe.read_tokens(tmp_path / "jso.bin", tokenizer)
    assert ids.tolist() == bpe.read_tokens(tmp_path / "txt.bin")[0].tolist() and meta["documents"] == 3
    with pytest.raises(SystemExit):
        bpe.main(["train", "--input", str(tmp_path / "a.jsonl.gz"), "--vocab_size", "260", "--out_dir",
                  str(tmp_path / "c"), "--special_tokens", "<x>"])  # fmt: skip
    assert "must have the special token" in capsys.readouterr().err


def test_encoding_jsonl_that_is_stopped_goes_on_with_the_pieces_that_are_done(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    tokenizer.save(tmp_path / "tok")
    command = ["encode", "--tokenizer", str(tmp_path / "tok"), "--input", str(tmp_path / "a.jsonl"),
               "--out", str(tmp_path / "x.bin"), "--num_workers", "1"]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(bpe, "join_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        bpe.main(command)
    monkeypatch.setattr(bpe, "encode_piece", None)  # none is left to encode
    bpe.main(command)
    assert tokenizer.decode(bpe.read_tokens(tmp_path / "x.bin")[0]) == "some text" + END_OF_TEXT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "tok", "x.bin", "x.json"]


def test_encodings_to_one_file_at_once_wait_for_each_other(tokenizer, tmp_path):
    write(tmp_path / "t.txt", "some text " * 50_000)
    tokenizer.save(tmp_path / "tok")
    command = [sys.executable, bpe.__file__, "encode", "--tokenizer", tmp_path / "tok", "--input",
               tmp_path / "t.txt", "--out", tmp_path / "x.bin", "--num_workers", "1"]  # fmt: skip
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert bpe.read_tokens(tmp_path / "x.bin", tokenizer)[1]["bytes"] == 500_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.txt", "tok", "x.bin", "x.json"]
