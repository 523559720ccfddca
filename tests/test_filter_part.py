"""filter_part.py: fastText's format against a second reader, trainer, language, dedup, verbs."""

import doctest
import json
import math
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import filter_part as fp

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
    return fp.train_fasttext(*toy_texts(), **{"dim": 7, "bucket": 500, "lr": 0.5, "lower": False}
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
                    push(fp.fnv(gram.encode()))
        h = fp.fnv(word)
        hashes.append(h - (1 << 32) if h >> 31 else h)
    for i in range(len(hashes)):
        h = hashes[i] % (1 << 64)
        for j in range(i + 1, min(len(hashes), i + model["word_ngrams"])):
            h = (h * 116049371 + hashes[j]) % (1 << 64)
            push(h)
    hidden = model["inputs"][ids].astype(np.float64).mean(0)
    z = model["output"].astype(np.float64) @ hidden
    if model["loss"] == fp.SOFTMAX:
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    elif model["loss"] in (fp.NS, fp.OVA):
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
    assert doctest.testmod(fp).failed == 0


@pytest.mark.parametrize("loss", [fp.HS, fp.NS, fp.SOFTMAX, fp.OVA])
@pytest.mark.parametrize("kind", ["dense", "quantised", "norms", "pruned"])
def test_predictions_of_model_files_are_those_of_the_definition(tmp_path, loss, kind):
    path = tmp_path / "model.bin"
    for seed, settings in enumerate(({}, {"word_ngrams": 1, "dim": 6}, {"maxn": 0, "minn": 0},
                                     {"minn": 1, "maxn": 3, "word_ngrams": 3, "labels": 17})):
        held = random_model(path, seed, loss, kind != "dense", kind == "norms", kind == "pruned",
                            **settings)
        model = fp.FastText.load(path)
        for text, (labels, scores) in zip(TEXTS, model.predict(TEXTS, k=-1), strict=True):
            expected, z = slow_predict(held, text)
            if loss in (fp.NS, fp.OVA) and np.abs((z * 32) % 1 - 0.5).max() > 0.49:
                continue  # on a step of the library's table
            # float32 sums of up to 30,000 rows against float64; 1e-5 is the library's own
            assert {k: v for k, v in expected.items() if v > 3e-5}.keys() <= set(labels)
            for label, score in zip(labels, scores, strict=True):
                assert abs(score - expected[label]) < 1e-4
            assert scores == sorted(scores, reverse=True)


def test_one_text_or_many_give_the_same_predictions():
    model, _ = toy_model(minn=2, maxn=3)
    together = model.predict(TEXTS)
    model.forget()
    assert together == [model.predict([text])[0] for text in TEXTS]


def test_character_ngrams_of_many_words_are_those_of_each():
    words = [w.encode() for w in ("a", "ab", "über", "日本語", "😀", "<x>", "e\u0301")]
    for minn, maxn in ((1, 1), (1, 4), (2, 3), (3, 9)):
        expected = []
        for word in words:
            marked = f"<{word.decode()}>"
            expected.append([fp.fnv(marked[i:i + n].encode()) for i in range(len(marked))
                             for n in range(minn, maxn + 1)
                             if i + n <= len(marked) and not (n == 1 and marked[i:i + n] in "<>"
                                                              and i in (0, len(marked) - 1))])
        hashes, counts = fp.character_ngram_hashes(words, minn, maxn)
        assert counts.tolist() == [len(e) for e in expected]
        assert hashes.tolist() == [h for e in expected for h in e]


def test_a_saved_model_predicts_as_before(tmp_path):
    model, counts = toy_model(minn=2, maxn=3)
    model.save(tmp_path / "m.bin", counts)
    assert fp.FastText.load(tmp_path / "m.bin").predict(TEXTS, k=-1) == model.predict(TEXTS, k=-1)
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


@pytest.mark.parametrize("settings", [{}, {"word_ngrams": 1}, {"minn": 2, "maxn": 3}])
def test_training_separates_what_can_be_separated_and_repeats_itself(settings):
    texts, labels = toy_texts()
    model, _ = toy_model(epoch=20, **settings)
    scores = [dict(zip(*p, strict=True))["up"] for p in model.predict(texts, k=-1)]
    assert fp.area_under_curve(scores, [label == "up" for label in labels]) > 0.95
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
    fp.train_step(moved_inputs, moved_output, ids, counts, 2, lr)
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
    (lambda data: data + b"x", "more"), (lambda data: data[:36] + b"\1" + data[37:], "model 1")])
def test_foreign_and_broken_model_files_are_refused_by_name(tmp_path, spoil, says):
    model, counts = toy_model()
    model.save(tmp_path / "m.bin", counts)
    path = tmp_path / "bad.bin"
    path.write_bytes(spoil((tmp_path / "m.bin").read_bytes()))
    with pytest.raises(ValueError, match=says):
        fp.FastText.load(path)


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_of_each_language_is_recognised(code):
    label, score = fp.identify_language(SENTENCES[code])
    assert label == code and 0.5 < score <= 1
    assert fp.identify_language(SENTENCES[code] * 500)[0] == code


@pytest.mark.parametrize("text", ["", "12345 !!! 67", "\0\n", "\ud800"])
def test_a_text_without_letters_has_no_language(text):
    assert fp.identify_language(text) == ("und", 0.0)


def test_a_language_that_is_not_known_scores_low():
    finnish = "Suomen kieli on yksi maailman kielistä, ja sitä puhuu noin viisi miljoonaa ihmistä."
    assert fp.identify_language(finnish)[1] < 0.6


def test_harm_and_quality_without_a_model_state_label_score_and_method():
    assert fp.classify_nsfw("free porn xxx hardcore sex videos")[0] == "nsfw"
    assert fp.classify_nsfw("the cathedral was built in 1250")[0] == "non-nsfw"
    assert fp.classify_toxic_speech("you are a stupid idiot, shut up")[0] == "toxic"
    assert fp.classify_toxic_speech("thank you for the careful edit")[0] == "non-toxic"
    prose = (SENTENCES["en"] + " ") * 20
    assert fp.classify_quality(prose)[0] == "wiki"
    assert fp.classify_quality("Home\nLogin\nCart (0)\n$ 5.99\n>> next")[0] == "cc"
    assert "list" in fp.load_classifier("nsfw").method


def test_lines_that_occur_twice_anywhere_go_all_of_them(tmp_path):
    a, b, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out"
    a.write_bytes(b"one\ntwo\nsame\ntwo\n\nlast")
    b.write_bytes(b"same\nthree\nlast\n\xff\n")
    report = fp.exact_line_deduplication([b, a], out)
    assert (out / "a.txt").read_bytes() == b"one\n\n"
    assert (out / "b.txt").read_bytes() == b"three\n\xff\n"
    assert report["lines"] == 10 and report["kept"] == 4
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "b.txt"]


def test_lines_in_many_blocks_and_slices_of_memory_give_the_same(tmp_path, monkeypatch):
    rng, outs = random.Random(1), []
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"{rng.randint(0, 4000)}\n" for _ in range(2000)))
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    counts = fp.Counter(line for f in files for line in f.read_text().split())
    for block, sort_bytes in ((1 << 24, 40), (999, 40_000)):
        monkeypatch.setattr(fp, "LINE_BLOCK_BYTES", block)
        monkeypatch.setattr(fp, "SORT_BYTES", sort_bytes)
        out = tmp_path / str(block)
        fp.exact_line_deduplication(files, out, memory_mb=1)
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
    expected = fp.minhash_reference(texts, 5, 0.6)
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": t}) + "\n\n" for t in
                                     texts[i * 40:i * 40 + 40]))
    # 64 bands of 2: a pair of similarity 0.6 shares none with probability 0.64**64 = 4e-13
    settings = {"num_hashes": 128, "num_bands": 64, "jaccard_threshold": 0.6}
    monkeypatch.setattr(fp, "CHUNK_BYTES", 3000)
    found = [fp.find_near_duplicates(files, tmp_path / "1", num_workers=1, **settings)[1]]
    monkeypatch.setattr(fp, "GROUPS_A_TASK", 5)
    monkeypatch.setattr(fp, "SORT_BYTES", 40_000)
    found.append(fp.find_near_duplicates(files[::-1], tmp_path / "2", num_workers=2, memory_mb=1,
                                         **settings)[1])
    assert [f.tolist() for f in found] == [expected, expected]
    folder = tmp_path / "3"
    for rank in (0, 1, 0):  # as machines with one folder: the links of all are there the third time
        try:
            last = fp.find_near_duplicates(files, folder, num_workers=1, rank=rank, ranks=2,
                                           **settings)[1]
        except FileNotFoundError:
            continue
    assert last.tolist() == expected


def test_whole_files_are_documents_and_the_first_of_a_cluster_stays(tmp_path):
    words = [f"word{i}" for i in range(200)]
    for name, text in (("b", " ".join(words)), ("a", " ".join(words[:-1]) + " Other."),
                       ("c", " ".join(words[::-1])), ("d", "“WORD0,  wórd1” " + " ".join(words[2:]))):
        (tmp_path / f"{name}.txt").write_text(text)
    files, out = list(tmp_path.glob("*.txt")), tmp_path / "out"
    report = fp.minhash_deduplication(files, 100, 20, 5, 0.8, out, num_workers=1)
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "c.txt"]
    assert (report["documents"], report["kept"], report["clusters"]) == (4, 2, 1)


def test_signatures_estimate_similarity_without_bias():
    minhash, rng = fp.MinHash(512, 1), np.random.default_rng(0)
    errors = []
    for _ in range(20):
        pool = rng.integers(0, 1 << 63, 300, np.uint64)
        a, b = np.unique(pool[:200]), np.unique(pool[100:])
        same = (minhash.signature(a) == minhash.signature(b)).mean()
        errors.append(same - fp.jaccard(a, b))
    assert abs(np.mean(errors)) < 4 * math.sqrt(1 / 3 * 2 / 3 / 512 / 20)  # four standard errors


def test_words_hashed_one_by_one_are_those_of_the_normalised_text():
    minhash = fp.MinHash()
    for text in (*TEXTS, "Café, -- déjà-vu! «Straße» ΣΟΦΟΣ", "a\u3000b\u2003c ©2020 1,000.5"):
        expected = [int.from_bytes(fp.hash_bytes(w.encode()), "little")
                    for w in fp.normalize_for_dedup(text).split()]
        assert minhash.word_hashes(text).tolist() == expected


def test_finished_signatures_are_used_again_and_stale_ones_are_not(tmp_path, monkeypatch):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a b c d e f"}\n{"text": "A b c d e f!"}\n')
    arguments = ([file], tmp_path / "work")
    assert fp.find_near_duplicates(*arguments, num_workers=1)[1].tolist() == [0, 0]
    monkeypatch.setattr(fp, "sign_chunk", None)
    assert fp.find_near_duplicates(*arguments, num_workers=1)[1].tolist() == [0, 0]
    monkeypatch.undo()
    file.write_text('{"text": "a b c d e f"}\n{"text": "other words than before it"}\n')
    assert fp.find_near_duplicates(*arguments, num_workers=1)[1].tolist() == [0, 1]
    signature = next((tmp_path / "work").rglob("*.sign"))
    for path in (tmp_path / "work").rglob("*.sign"):
        path.write_bytes(signature.read_bytes()[:-3])
    with pytest.raises(ValueError, match="whole records"):
        fp.find_near_duplicates(*arguments, num_workers=1)


@pytest.mark.parametrize(("command", "says"), [
    ("dedup --input {a} {b} --out_dir {out} --num_bands 7", "multiple of num_bands"),
    ("dedup --input {a} --out_dir {here}", "must not hold the inputs"),
    ("dedup --input {a} {sub} --out_dir {out} --how lines", "different names"),
    ("dedup --input {a} {b} --out_dir {out} --jaccard_threshold 80", "from 0 to 1"),
    ("dedup --input {bad} --out_dir {out}", "\"text\""),
    ("dedup --input {here}/none --out_dir {out}", "must be a file or a folder"),
    ("classify --text x --model {a}", "magic"),
    ("classify", "--text, --input or --train"),
    ("classify --train {a} {b}", "--model"),
    ("classify --train {a} {empty} --model {out}/m.bin", "two labels"),
    ("classify --train {b} {a} --model {out}/m.bin --dim 0", "dim must be at least 1"),
])
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, capsys, command, says):
    names = {name: tmp_path / f"{name}.txt" for name in ("a", "b", "empty")}
    names |= {"here": tmp_path, "out": tmp_path / "out", "bad": tmp_path / "bad.jsonl",
              "sub": tmp_path / "sub"}
    names["sub"].mkdir()
    for path, text in ((names["a"], "one\ntwo"), (names["b"], "three"), (names["empty"], ""),
                       (names["bad"], '{"words": 1}\n'), (names["sub"] / "a.txt", "x")):
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        fp.main(command.format(**names).split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and says in error and "error:" in error


def test_the_verbs_train_label_and_dedup(tmp_path, capsys):
    texts, labels = toy_texts(200)
    for name in ("up", "down"):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": t.upper()}) + "\n" for t, label in zip(texts, labels, strict=True)
            if label == name))
    model = str(tmp_path / "m.bin")
    fp.main(["classify", "--train", str(tmp_path / "up.jsonl"), str(tmp_path / "down.jsonl"),
             "--labels", "up", "down", "--model", model, "--lr", "1", "--epoch", "20",
             "--bucket", "500"])
    assert "AUC" in capsys.readouterr().out
    assert json.loads(Path(model + ".json").read_text())["auc"] > 0.9
    fp.main(["classify", "--model", model, "--text", "GOOD sunny HAPPY"])
    assert capsys.readouterr().out.startswith("up\t")
    fp.main(["dedup", "--input", str(tmp_path / "up.jsonl"), "--out_dir", str(tmp_path / "unique"),
             "--report", str(tmp_path / "gone.jsonl"), "--num_workers", "1"])
    kept = (tmp_path / "unique" / "up.jsonl").read_text().splitlines()
    assert f"{len(kept)} of 100 documents kept" in capsys.readouterr().out
    gone = (tmp_path / "gone.jsonl").read_text().splitlines()
    assert len(kept) + len(gone) == 100


def test_the_bench_checks_itself_and_ends_in_one_line_of_json(capsys):
    fp.main(["bench", "--documents", "20", "--repeats", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"fasttext_mb_s", "language_mb_s", "word_list_mb_s",
                           "minhash_documents_s"} and min(result.values()) > 0
