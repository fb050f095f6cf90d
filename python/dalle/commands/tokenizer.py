"""`dalle tokenizer train`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle.commands.report import next_command
from dalle.commands.training import check_not_taken
from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.console import say
from dalle.data.pairs import Pairs, captions_of, each_caption, evenly_spaced
from dalle.data.sources import load_pairs
from dalle.files import make_folder, saving
from dalle.tokenizer import Tokenizer

MAX_PAIRS = 1_000_000  # whose captions are read


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Learns a byte-level BPE from the captions of a data set.

    Attributes:
        data: shapes, emoji, a folder of pictures with .txt captions or of tar shards, or a table
            (docs/data.md); several by weights: --data a=0.7 --data b=0.3.
        out: folder to write tokenizer.json and config.json to.
        vocab_size: at most so many tokens; 16,384 in the paper.
    """

    data: str
    out: Path = Path("run/tokenizer")
    vocab_size: int = 16384


def _captions(pairs: Pairs) -> Iterator[str]:
    """The captions to learn from: all, or those of a million pairs, evenly spaced."""
    if len(pairs) <= MAX_PAIRS:
        yield from each_caption(pairs)
        return
    say(f"tokenizer train: {MAX_PAIRS:,} of {len(pairs):,} pairs are read, evenly spaced")
    for item in evenly_spaced(len(pairs), MAX_PAIRS):
        yield from captions_of(pairs, int(item))


def train(config: TokenizerTrainConfig) -> None:
    """Trains, saves, and prints what came out."""
    pairs = load_pairs(config.data, image_size=32)
    captions = list(dict.fromkeys(_captions(pairs)))
    make_folder(config.out, "tokenizer train")
    check_not_taken("tokenizer train", config.out, Tokenizer)
    tokenizer = Tokenizer.train(captions, config.vocab_size)
    with saving("tokenizer train", config.out):
        tokenizer.save_pretrained(config.out)
    parts = (captions[i : i + 4096] for i in range(0, len(captions), 4096))
    lengths = torch.cat([(tokenizer.encode(p, 256) != Tokenizer.PAD).sum(1) for p in parts])
    print(f"{tokenizer.vocab_size} tokens from {len(captions)} different captions: {config.out}")
    write_resolved(config, config.out / CONFIG_NAME, owner="tokenizer train")
    print(f"tokens a caption: mean {lengths.float().mean():.1f}, longest {int(lengths.max())}")
    then = next_command(config.data, "tiny", config.out.parent, tokenizer=config.out)
    print(f"tokenizer train: next: {then}")
