"""Byte-level BPE over lower-cased captions, with dropout of merges that a seed decides.

Paper section 2.2: captions are lower-cased and BPE-encoded with a vocabulary of 16,384; in training
10 % of the merges are dropped (Provilkov et al. 2020). Captions and prompts pass one rule here that
cleans them; byte-level, so that every text then has a spelling and decodes back to itself. Training
and plain encoding are those of the library `tokenizers`; its dropout takes no seed, so merging with
dropout is done here.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dalle.captions import clean, marks, without_marks
from dalle.configs import integer, integers
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.files import parse_json, read_bytes, to_json, write_atomic
from dalle.memory import require_memory
from dalle.pretrained import CONFIG_FILE, FORMAT_VERSION, read_head
from dalle.version import __version__
from dalle_ext._checks import real

TOKENIZER_FILE = "tokenizer.json"
MAX_FILE_BYTES = 64 << 20
NUM_BYTES = 256
LONG_WORD = re.compile(r"\S{256}(?=\S)")
MERGED = -2  # replaces a symbol that was merged into the one before it
LARGE = 1 << 30  # bytes of ids above which free memory is checked first
MAX_VOCAB = 1 << 20  # the trainer allocates memory for all of them


def lower(caption: str) -> str:
    """The caption as the vocabulary sees it: clean (`dalle.captions`), in lower case, NFC."""
    return unicodedata.normalize("NFC", clean(caption).lower())


class Tokenizer:
    """Captions to token ids and back.

    Made by `Tokenizer.train` or `Tokenizer.from_pretrained`.

    Attributes:
        vocab_size: number of ids, 256 bytes and one a merge.
        truncated: captions cut by `encode` since construction, because they had more tokens than
            slots.
    """

    PAD = -1

    def __init__(self, bpe: tokenizers.Tokenizer, marks: str | None = None) -> None:
        self.marks = marks
        self._bpe = bpe
        self.vocab_size: int = bpe.get_vocab_size()
        self.truncated = 0
        vocab: dict[str, int] = bpe.get_vocab()
        merges = json.loads(bpe.to_str())["model"]["merges"]
        # (left id, right id) -> (rank, merged id)
        self._merges = {
            (vocab[left], vocab[right]): (rank, vocab[left + right])
            for rank, (left, right) in enumerate(merges)
        }
        self._symbols = {token: i for token, i in vocab.items() if len(token) == 1}
        self._byte_ids: dict[str, tuple[int, ...]] = {}  # word -> ids of its bytes

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16384) -> Tokenizer:
        """Learns merges from captions.

        Args:
            captions: cleaned and lower-cased here.
            vocab_size: 256 (the bytes) to 2^20; fewer come out of captions with fewer pairs.

        Raises:
            DataError: no caption with a visible character.
            UsageError: captions that are no strings, vocab_size out of range.
        """
        vocab_size = integer("tokenizer", "vocab_size", vocab_size)
        if not NUM_BYTES <= vocab_size <= MAX_VOCAB:
            limits = f"{NUM_BYTES} to {MAX_VOCAB}"
            raise UsageError(f"tokenizer: vocab_size must be {limits}, got {vocab_size}")
        texts = [lower(caption) for caption in _strings(captions)]
        if not any(texts):
            raise DataError(f"tokenizer: captions must hold text, got {len(texts)} empty captions")
        # The library scans a full word for each of its merges.
        texts = [piece for text in texts for piece in _cut_long_words(text)]
        bpe = _byte_level({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=sorted(_bytes()),
        )
        bpe.train_from_iterator(texts, trainer, length=len(texts))
        return cls(bpe, marks(texts))

    def encode(
        self,
        captions: Sequence[str],
        length: int,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Encodes captions into slots.

        Args:
            captions: B strings; cleaned and lower-cased here.
            length: slots a caption, at least 1; longer captions lose their end and are counted in
                `truncated`.
            dropout: probability in [0, 1] that a possible merge is skipped, drawn anew at each
                merge; 0.1 in the paper's training, 0 for sampling.
            seed: decides a caption's dropout together with its position; unused without dropout.
            positions: of the captions in their batch, B numbers of 0 or more; 0, 1, ... by default.

        Returns:
            (B, length) int64, unused slots hold PAD = -1.

        Raises:
            UsageError: captions that are no strings, bad length, dropout, seed or positions.
            EnvironmentProblem: (B, length) numbers fit no memory.
        """
        texts = [lower(caption) for caption in _strings(captions)]
        length, seed = integer("tokenizer", "length", length), integer("tokenizer", "seed", seed)
        if length < 1:
            raise UsageError(f"tokenizer: length must be at least 1, got {length}")
        if not 0 <= real(dropout) <= 1:
            raise UsageError(f"tokenizer: dropout must be in [0, 1], got {dropout}")
        if positions is None:
            positions = range(len(texts))
        positions = integers("tokenizer", "positions", positions, 0)
        if len(positions) != len(texts):
            raise UsageError(
                f"tokenizer: positions must be as many as captions, got {len(positions)} for "
                f"{len(texts)}"
            )
        size = 8 * len(texts) * length
        if size > LARGE:
            require_memory("tokenizer", size, f"{len(texts)} x {length} ids", "ask for fewer slots")
        if dropout == 0:
            rows = [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]
        else:
            rows = [
                self._encode_with_dropout(text, dropout, random.Random(f"{seed}/{i}"))
                for i, text in zip(positions, texts, strict=True)
            ]
        ids = torch.full((len(rows), length), self.PAD, dtype=torch.int64, device="cpu")
        for i, row in enumerate(rows):
            self.truncated += len(row) > length
            ids[i, : len(row)] = torch.tensor(row[:length], dtype=torch.int64, device="cpu")
        return ids

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one caption's ids; PAD is skipped, broken UTF-8 becomes U+FFFD.

        Raises:
            UsageError: not one axis, not whole numbers, or an id outside the vocabulary.
        """
        values = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids
        if not isinstance(values, Iterable) or any(isinstance(v, list) for v in values):
            raise UsageError("tokenizer: ids must have one axis, got another number of axes")
        values = [integer("tokenizer", "ids", value) for value in values]
        tokens = [value for value in values if value != self.PAD]
        for value in tokens:
            if not 0 <= value < self.vocab_size:
                raise UsageError(
                    f"tokenizer: ids must be below {self.vocab_size} or PAD = -1, got {value}"
                )
        return str(self._bpe.decode(tokens, skip_special_tokens=False))

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes tokenizer.json (readable by the library `tokenizers`) and config.json.

        Raises:
            OSError: the folder cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        data = self._bpe.to_str(pretty=True).encode()
        write_atomic(directory / TOKENIZER_FILE, data)
        head = {
            "format_version": FORMAT_VERSION,
            "class": "Tokenizer",
            "dalle_version": __version__,
            "config": {"vocab_size": self.vocab_size, "lower_case": True, "marks": self.marks},
            "tokenizer_sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(directory / CONFIG_FILE, to_json(head))

    def shape(self, prompt: str) -> str:
        """A prompt cleaned, and without punctuation that no caption of the training has."""
        text = clean(prompt)
        return text if self.marks is None else without_marks(text, self.marks)

    def fingerprint(self) -> str:
        """A hash of the vocabulary and its merges, the same with any version of `tokenizers`."""
        content = repr((sorted(self._symbols.items()), sorted(self._merges.items())))
        return f"SHA-256 {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> Tokenizer:
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing, damaged, or of something else.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        head = read_head(directory, "Tokenizer")
        try:
            data = read_bytes(path, MAX_FILE_BYTES)
        except OSError as problem:
            raise CheckpointError(
                f"{path}: must be a readable file, got: {problem.strerror}"
            ) from problem
        if hashlib.sha256(data).hexdigest() != head.get("tokenizer_sha256"):
            raise CheckpointError(
                f"{path}: content must match the hash in {CONFIG_FILE}, got another"
            )
        config = head.get("config")
        known = config.get("marks") if isinstance(config, dict) else None
        try:
            return cls(_from_json(data), known if isinstance(known, str) else None)
        except ValueError as problem:
            raise CheckpointError(
                f"{path}: must be a byte-level BPE that dalle wrote, got: {problem}"
            ) from problem

    def _encode_with_dropout(self, text: str, dropout: float, rng: random.Random) -> list[int]:
        ids: list[int] = []
        for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text):
            symbols = self._byte_ids.get(word)
            if symbols is None:
                symbols = tuple(self._symbols[char] for char in word)
                if len(word) <= 64 and len(self._byte_ids) < 100_000:
                    self._byte_ids[word] = symbols
            ids += self._merge(list(symbols), dropout, rng)
        return ids

    def _merge(self, symbols: list[int], dropout: float, rng: random.Random) -> list[int]:
        """Applies merges to one word, lowest rank first, the leftmost of equals.

        At each merge every possible one is dropped by chance; where all are, the word stays as it
        is. Those behind the one that is taken need no draw, so a word of n symbols takes
        O(n log n / (1 - dropout)) in place of n draws a merge.
        """
        size = len(symbols)
        after, before = list(range(1, size + 1)), list(range(-1, size - 1))
        # (rank, position of the left symbol, left id, right id, merged id); an entry is stale if
        # the symbols at its position have other ids by now.
        heap: list[tuple[int, int, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < size:
                pair = symbols[left], symbols[right]
                merge = self._merges.get(pair)
                if merge is not None:
                    heapq.heappush(heap, (merge[0], left, *pair, merge[1]))

        for position in range(size - 1):
            consider(position, position + 1)
        while heap:
            dropped = []
            while heap:
                entry = heapq.heappop(heap)
                _, left, left_id, right_id, merged = entry
                right = after[left]
                if symbols[left] != left_id or right >= size or symbols[right] != right_id:
                    continue
                if not dropout or rng.random() >= dropout:
                    symbols[left], symbols[right] = merged, MERGED
                    after[left] = after[right]
                    if after[left] < size:
                        before[after[left]] = left
                    consider(before[left], left)
                    consider(left, after[left])
                    break
                dropped.append(entry)
            else:  # all were dropped
                break
            for entry in dropped:
                heapq.heappush(heap, entry)
        return [symbol for symbol in symbols if symbol != MERGED]


def _strings(captions: Any) -> Iterable[str]:
    """`captions`, where they are strings and not one string. Raises UsageError."""
    if isinstance(captions, (str, bytes)) or not isinstance(captions, Iterable):
        kind = "one string" if isinstance(captions, str) else type(captions).__name__
        raise UsageError(f"tokenizer: captions must be a sequence of strings, got {kind}")
    for caption in captions:
        if not isinstance(caption, str):
            raise UsageError(f"tokenizer: captions must be strings, got {caption!r}")
        yield caption


def _cut_long_words(text: str) -> list[str]:
    """The text in pieces, cut inside words of more than 256 characters, else whole."""
    ends = [0, *(match.end() for match in LONG_WORD.finditer(text)), len(text)]
    return [text[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def _bytes() -> set[str]:
    """The 256 characters that stand for bytes."""
    return set(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges) if vocab else models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _from_json(data: bytes) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, which must be of the one kind that `train` makes.

    The library takes memory by the largest id and aborts where that fails, so it gets the
    vocabulary and the merges after they were checked, and never the file.

    Raises:
        ValueError: saying what must be otherwise.
    """
    content: Any = parse_json(data)
    parts = content if isinstance(content, dict) else {}
    kinds = [
        part.get("type") if isinstance(part := parts.get(key), dict) else None
        for key in ("model", "pre_tokenizer", "decoder")
    ]
    if kinds != ["BPE", "ByteLevel", "ByteLevel"]:
        raise ValueError(f"its parts are {kinds!r:.200}, not BPE, ByteLevel and ByteLevel")
    model = parts["model"]
    bpe = _byte_level(*_checked(model.get("vocab"), model.get("merges")))
    rebuilt = json.loads(bpe.to_str())
    # Further keys that other versions of the library write must be empty or off.
    for name, ours, theirs in (
        ("the file", rebuilt, parts),
        *((name, rebuilt[name], parts[name]) for name in ("model", "pre_tokenizer", "decoder")),
    ):
        for key, value in theirs.items():
            if isinstance(ours.get(key), (dict, str)) or (name, key) == ("model", "merges"):
                continue
            if (value or None) != (ours.get(key) or None):
                raise ValueError(f"{key} of {name} is {json.dumps(value)[:80]}")
    return bpe


def _checked(vocab: Any, merges: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a tokenizer.json. Raises ValueError as `_from_json`."""
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("it lacks a vocabulary, or the list of merges")
    size, letters = len(vocab), _bytes()
    if not all(type(i) is int and 0 <= i < size for i in vocab.values()):
        raise ValueError(f"an id of its {size} tokens is none of 0 to {size - 1}")
    if len(set(vocab.values())) < size:
        raise ValueError("two of its tokens have the same id")
    if not letters <= vocab.keys() or not all(token and letters >= set(token) for token in vocab):
        raise ValueError("its tokens are not the 256 bytes and strings of them")
    pairs = []
    for merge in merges:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if not isinstance(pair, (list, tuple)) or not all(isinstance(part, str) for part in pair):
            raise ValueError("a merge is not of two tokens")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError("a merge is not of two tokens that make a third")
        pairs.append((pair[0], pair[1]))
    if len(set(pairs)) < len(pairs):
        raise ValueError("a merge stands there twice")
    return vocab, pairs
