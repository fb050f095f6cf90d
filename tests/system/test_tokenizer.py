"""Tokenizer: round trips, dropout and its statistics, golden ids, files (R24)."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from dalle.data.shapes import captions
from dalle.errors import CheckpointError, DataError, EnvironmentProblem, UsageError
from dalle.tokenizer import Tokenizer, _cut_long_words, lower


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(captions("train"))


def generated(count, seed=0):
    """Captions of all kinds: words, other alphabets, emoji, control characters, white space."""
    rng = random.Random(seed)
    pools = [
        "abcdefghijklmnopqrstuvwxyz    ",
        "ABCDEFÄÖÜßĲİΣς ",
        "0123456789.,;:!?'\"-_()[]{}<>@#$%^&*+=/\\|~` ",
        "日本語中文한국어 ру́сский عربى עברית हिन्दी",
        "😀👩🏽‍🚒🏳️‍🌈\u200d\ufe0f",
        "\t\n\r\x00\x1f\u2028\u00a0\u3000\ufeff ",
    ]
    words = " ".join(captions("train")[:50]).split()
    for _ in range(count):
        if rng.random() < 0.3:
            yield " ".join(rng.choices(words, k=rng.randint(1, 20)))
        else:
            alphabet = "".join(rng.sample(pools, rng.randint(1, 3)))
            yield "".join(rng.choices(alphabet, k=rng.randint(0, 60)))


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_round_trip(tokenizer, dropout):
    texts = list(generated(10_000 if dropout == 0 else 500))
    ids = tokenizer.encode(texts, 400, dropout=dropout, seed=7)
    for text, row in zip(texts, ids, strict=True):
        assert tokenizer.decode(row) == lower(text)
        if text.isprintable():  # nothing to clean but runs of spaces
            assert lower(text) == unicodedata.normalize("NFC", " ".join(text.lower().split()))


def test_vocabulary_holds_the_bytes_and_stops_where_the_captions_end(tokenizer):
    assert 256 < tokenizer.vocab_size < 16384
    small = Tokenizer.train(captions("train"), vocab_size=300)
    assert small.vocab_size == 300
    assert Tokenizer.train(["aa"], vocab_size=256).vocab_size == 256


def test_encode_pads_and_lower_cases(tokenizer):
    ids = tokenizer.encode(["A RED circle on a white background", ""], 12)
    assert ids.dtype == torch.int64 and ids.shape == (2, 12)
    assert ids[0].equal(tokenizer.encode(["a red circle on a white background"], 12)[0])
    assert (ids[1] == Tokenizer.PAD).all() and Tokenizer.PAD == -1
    used = (ids[0] >= 0).sum()
    assert (ids[0, :used] >= 0).all() and (ids[0, used:] == -1).all()


def test_long_captions_are_cut_and_counted(tokenizer):
    tokenizer.truncated = 0
    caption = "a red circle left of a blue square on a white background"
    full = tokenizer.encode([caption], 20)[0]
    used = int((full >= 0).sum())
    cut = tokenizer.encode([caption, "a red", caption], used - 1)
    assert tokenizer.truncated == 2
    assert cut[0].equal(full[: used - 1])
    tokenizer.encode([caption], used)
    assert tokenizer.truncated == 2


def test_merging_here_equals_the_library(tokenizer):
    texts = list(generated(2000, seed=1)) + captions("test")
    rows = tokenizer.encode(texts, 400)
    for text, row in zip(texts, rows, strict=True):
        own = tokenizer._encode_with_dropout(lower(text), 0.0, random.Random(0))
        assert row[row >= 0].tolist() == own


def test_dropout_is_a_pure_function_of_the_seed(tokenizer):
    texts = captions("train")[:200]
    first = tokenizer.encode(texts, 128, dropout=0.1, seed=3)
    random.seed(99)
    assert tokenizer.encode(texts, 128, dropout=0.1, seed=3).equal(first)
    assert not tokenizer.encode(texts, 128, dropout=0.1, seed=4).equal(first)
    alike = tokenizer.encode([texts[0]] * 50, 128, dropout=0.1, seed=3)
    assert len({tuple(row.tolist()) for row in alike}) > 10
    assert tokenizer.encode(texts, 128, seed=1).equal(tokenizer.encode(texts, 128, seed=2))


@pytest.mark.parametrize(("word", "chances"), [("ab", 1), ("abc", 2), ("abcd", 3)])
def test_dropout_statistics(word, chances):
    # Merges ab, abc, abcd in that order: at each step exactly one merge is possible, and the word
    # stays whole with probability 0.9 ** (steps).
    own = Tokenizer.train(["ab"] * 9 + ["abc"] * 6 + ["abcd"] * 3, vocab_size=259)
    assert int((own.encode(["abcd"], 4) >= 0).sum()) == 1
    trials, dropout = 10_000, 0.1
    rows = own.encode([word] * trials, 4, dropout=dropout, seed=11)
    whole = int(((rows >= 0).sum(1) == 1).sum())
    expected = (1 - dropout) ** chances
    sigma = math.sqrt(trials * expected * (1 - expected))
    assert abs(whole - trials * expected) < 3 * sigma


class Script:
    """A random source whose answers are given; beyond them every merge is dropped."""

    def __init__(self, kept):
        self.kept, self.asked = kept, 0

    def random(self):
        self.asked += 1
        return 1.0 if self.asked <= len(self.kept) and self.kept[self.asked - 1] else 0.0


def chances(tokenizer, word, dropout):
    """What `_merge` makes of a word, with the chance of each, over all that can be drawn."""
    found = Counter()
    open_ends = [()]
    while open_ends:
        kept = open_ends.pop()
        source = Script(kept)
        symbols = tuple(tokenizer._merge(list(word), dropout, source))
        if source.asked > len(kept):
            open_ends += [(*kept, True), (*kept, False)]
        else:
            found[symbols] += math.prod(1 - dropout if keep else dropout for keep in kept)
    return found


def defined(tokenizer, word, dropout):
    """The same by definition: at each merge all possible ones are dropped by chance, then the
    lowest rank of those left is applied, the leftmost of equals; none left ends it."""
    found = Counter()
    ranked = []
    for position, pair in enumerate(zip(word, word[1:], strict=False)):
        if pair in tokenizer._merges:
            ranked.append((tokenizer._merges[pair][0], position, tokenizer._merges[pair][1]))
    for place, (_, position, merged) in enumerate(sorted(ranked)):
        after = (*word[:position], merged, *word[position + 2 :])
        for symbols, chance in defined(tokenizer, after, dropout).items():
            found[symbols] += dropout**place * (1 - dropout) * chance
    found[word] += dropout ** len(ranked)
    return found


@pytest.mark.parametrize("word", ["abcd", "aaaaa", "ababc", "bcabcd", "banana"])
def test_dropout_is_distributed_as_defined(word):
    own = Tokenizer.train("ab bc cd abc bcd aa aaa ba an na ana nan".split() * 3, vocab_size=290)
    ids = tuple(own.encode([word], 9, dropout=1.0)[0, : len(word)].tolist())
    for dropout in (0.1, 0.6):
        found, wanted = chances(own, ids, dropout), defined(own, ids, dropout)
        assert len(wanted) > 3 and sum(wanted.values()) == pytest.approx(1)
        assert found == pytest.approx(wanted, abs=1e-12)


def test_long_words_take_no_longer_than_their_length_says():
    """16 times the letters, where every merge is possible everywhere: far from 256 times."""
    own = Tokenizer.train(["ab", "abab", "aaaa", "bbbb", "\u6c34\u6c34"] * 5, vocab_size=280)
    seconds = []
    for size in (2_000, 32_000):
        words = ["ab" * (size // 2), "a" * size, "\u6c34" * (size // 3)]
        begin = time.process_time()
        rows = own.encode(words, size, dropout=0.1, seed=1)
        seconds.append(time.process_time() - begin)
        for word, row in zip(words, rows, strict=True):
            assert own.decode(row) == word
    assert seconds[1] < 60 * seconds[0], seconds


def test_long_words_are_learned_from_in_pieces():
    """A caption without a space: 8 s for 63 KB at 2,000 ids where the library sees whole words."""
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(20_000))
    begin = time.process_time()
    own = Tokenizer.train([text], vocab_size=1500)
    assert time.process_time() - begin < 1.5
    assert own.vocab_size == 1500 and own.decode(own.encode([text], 60_000)[0]) == text
    assert _cut_long_words("a" * 600 + " b " + "c" * 256) == [
        "a" * 256, "a" * 256, "a" * 88 + " b " + "c" * 256]  # fmt: skip
    assert _cut_long_words("") == [""]


def test_full_dropout_leaves_the_bytes(tokenizer):
    ids = tokenizer.encode(["a red circle"], 32, dropout=1.0)
    assert int((ids >= 0).sum()) == len("a red circle")


def test_what_differs_in_white_space_or_composition_only_is_the_same(tokenizer):
    wanted = tokenizer.encode(["a red caf\u00e9 circle"], 32)
    for other in (
        "\ufeffA RED cafe\u0301  circle\n",
        "a\u2028red\u00a0cafe\u0301\u200b\u3000circle\u0085",
    ):
        assert tokenizer.encode([other], 32).equal(wanted)
    dropped = tokenizer.encode(["a red circle"], 32, dropout=0.5, seed=3)
    assert tokenizer.encode(["\u2003a\tred\x00circle"], 32, dropout=0.5, seed=3).equal(dropped)


def test_golden_ids():
    """Ids of record: a change here breaks every saved model that conditions on them."""
    own = Tokenizer.train(captions("train"))
    ids = own.encode(["a red circle left of a blue square on a white background"], 16)[0].tolist()
    assert ids == GOLDEN


GOLDEN = [64, 304, 297, 327, 283, 256, 312, 296, 269, 256, 282, 271, -1, -1, -1, -1]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    again = Tokenizer.from_pretrained(tmp_path / "tok")
    texts = list(generated(200, seed=5))
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(texts, 300).equal(tokenizer.encode(texts, 300))
    dropped = {"dropout": 0.2, "seed": 5}
    assert again.encode(texts, 300, **dropped).equal(tokenizer.encode(texts, 300, **dropped))


def test_damaged_folders_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    data, head = (tmp_path / "tokenizer.json").read_bytes(), tmp_path / "config.json"
    config = json.loads(head.read_text())
    for at in range(0, len(data), max(1, len(data) // 40)):
        (tmp_path / "tokenizer.json").write_bytes(data[:at])
        with pytest.raises(CheckpointError, match="content must match the hash"):
            Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="must be a readable file"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(data)
    for key, value, words in [
        ("class", "Prior", "class must be Tokenizer, got Prior"),
        ("format_version", 99, "format_version must be 1, got 99"),
    ]:
        head.write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=words):
            Tokenizer.from_pretrained(tmp_path)
    head.write_text("{")
    with pytest.raises(CheckpointError, match="must be JSON"):
        Tokenizer.from_pretrained(tmp_path)


def load_as(tokenizer, folder, content):
    """Loads `content` as the tokenizer.json of a folder whose hash fits it."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["tokenizer_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(content)
    return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"model": {"type": "WordPiece"}}', b"\xff", b'{"model": 3}']
)
def test_foreign_tokenizer_files_are_refused(tokenizer, tmp_path, content):
    with pytest.raises(CheckpointError, match="must be a byte-level BPE that dalle wrote, got: "):
        load_as(tokenizer, tmp_path, content)


TRIMMED = {"direction": "Right", "max_length": 2**63, "strategy": "LongestFirst", "stride": 2**63}
PADDED = {
    "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "x",
}  # fmt: skip
ADDED = {
    "id": 2**32 - 1, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False, "special": True,
}  # fmt: skip
TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
UNLIKE = {
    "an id of its 260 tokens is none of 0 to 259": [
        (("model", "vocab", "a"), value) for value in (2**32 - 1, 260, -1, 64.0, True, "64", None)
    ],
    "two of its tokens have the same id": [(("model", "vocab", "a"), 0)],
    "its tokens are not the 256 bytes": [
        (("model", "vocab", token), 260) for token in ("", "<>x ")
    ],
    "it lacks a vocabulary": [(("model", "vocab"), []), (("model", "merges"), None)],
    "a merge is not of two tokens that make": [
        (("model", "merges", 0), value) for value in (["zz", "b"], "zz b", ["a", "z"], ["a"], [])
    ],
    "a merge is not of two tokens$": [(("model", "merges", 0), value) for value in ([[], 1], 1)],
    "a merge stands there twice": [(("model", "merges", 0), ["i", "ct"])],
    "truncation of the file is": [(("truncation",), TRIMMED)],
    "padding of the file is": [(("padding",), PADDED)],
    "added_tokens of the file is": [(("added_tokens",), [ADDED])],
    "normalizer of the file is": [(("normalizer",), {"type": "Prepend", "prepend": "x" * 9999})],
    "post_processor of the file is": [(("post_processor",), TEMPLATE)],
    "dropout of model is 0.5": [(("model", "dropout"), 0.5)],
    "unk_token of model is": [(("model", "unk_token"), "a")],
    "continuing_subword_prefix of model": [(("model", "continuing_subword_prefix"), "##")],
    "add_prefix_space of pre_tokenizer": [(("pre_tokenizer", "add_prefix_space"), True)],
    "use_regex of pre_tokenizer is false": [(("pre_tokenizer", "use_regex"), False)],
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_the_library_gets_no_file_that_could_end_the_process(tmp_path, reason):
    """An id of 2^32 - 1 made it take memory for as many tokens, and abort."""
    small = Tokenizer.train(["picture number one"], vocab_size=260)
    for (*before, last), value in UNLIKE[reason]:
        content = holder = json.loads(small._bpe.to_str())
        for key in before:
            holder = holder[key]
        holder[last] = value
        with pytest.raises(CheckpointError, match=reason):
            load_as(small, tmp_path, json.dumps(content).encode())


def test_merges_as_older_versions_wrote_them_are_read(tokenizer, tmp_path):
    content = json.loads(tokenizer._bpe.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    again = load_as(tokenizer, tmp_path, json.dumps(content).encode())
    assert again.fingerprint() == tokenizer.fingerprint()
    again.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "first")
    files = [tmp_path / name / "tokenizer.json" for name in ("again", "first")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bad_input(tokenizer):
    with pytest.raises(DataError, match="captions must hold text, got 2 empty captions"):
        Tokenizer.train(["", "  "])
    with pytest.raises(UsageError, match="vocab_size must be 256 to 1048576, got 100"):
        Tokenizer.train(["a"], vocab_size=100)
    with pytest.raises(UsageError, match="must be a sequence of strings, got one string"):
        tokenizer.encode("a red circle", 8)
    with pytest.raises(UsageError, match="length must be at least 1, got 0"):
        tokenizer.encode(["a"], 0)
    with pytest.raises(UsageError, match=r"dropout must be in \[0, 1\], got 1.5"):
        tokenizer.encode(["a"], 4, dropout=1.5)
    with pytest.raises(UsageError, match="ids must be below"):
        tokenizer.decode([10**6])
    with pytest.raises(UsageError, match="ids must have one axis"):
        tokenizer.decode(torch.zeros(2, 2, dtype=torch.int64))
    for given in ([5], [None], b"ab", 5, None):
        with pytest.raises(UsageError, match="^tokenizer: captions must be "):
            tokenizer.encode(given, 8)
        with pytest.raises(UsageError, match="^tokenizer: captions must be "):
            Tokenizer.train(given)
    with pytest.raises(UsageError, match="must be a sequence of strings, got one string"):
        Tokenizer.train("a red circle")
    for positions in ([0], [0, 1, 2], [0, -1], [0, 1.5], ["0", "1"], 2, "01"):
        with pytest.raises(UsageError, match="^tokenizer: positions must be "):
            tokenizer.encode(["a", "b"], 8, dropout=0.1, positions=positions)
    for dropout in ("0.1", None, math.nan):
        with pytest.raises(UsageError, match="^tokenizer: dropout must be "):
            tokenizer.encode(["a"], 8, dropout=dropout)
    for ids in ([1.9], ["1"], "12", [None], [True], torch.ones(2), np.ones(2), [[1]], 5, None):
        with pytest.raises(UsageError, match="^tokenizer: ids must "):
            tokenizer.decode(ids)
    with pytest.raises(EnvironmentProblem, match="^tokenizer: memory must hold"):
        tokenizer.encode(["a"], 10**14)
    assert tokenizer.decode(np.array([64, 65], np.uint8)) == tokenizer.decode([64, 65])
    assert tokenizer.decode(tokenizer.encode(["\ud800x"], 8)[0]) == "\ufffdx"
