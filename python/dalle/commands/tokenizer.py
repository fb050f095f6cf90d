"""`dalle tokenizer train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle.commands.report import next_command
from dalle.commands.training import check_not_taken
from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.data.pairs import all_captions
from dalle.data.sources import load_pairs
from dalle.files import make_folder, saving
from dalle.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Learns a byte-level BPE from the captions of a data set.

    Attributes:
        data: shapes, emoji, or a folder of pictures with .txt captions.
        out: folder to write tokenizer.json and config.json to.
        vocab_size: at most so many tokens; 16,384 in the paper.
    """

    data: str
    out: Path = Path("run/tokenizer")
    vocab_size: int = 16384


def train(config: TokenizerTrainConfig) -> None:
    """Trains, saves, and prints what came out."""
    pairs = load_pairs(config.data, image_size=32)
    captions = list(dict.fromkeys(all_captions(pairs)))
    make_folder(config.out, "tokenizer train")
    check_not_taken("tokenizer train", config.out, Tokenizer)
    tokenizer = Tokenizer.train(captions, config.vocab_size)
    with saving("tokenizer train", config.out):
        tokenizer.save_pretrained(config.out)
    lengths = (tokenizer.encode(captions, 256) != Tokenizer.PAD).sum(1)
    print(f"{tokenizer.vocab_size} tokens from {len(captions)} different captions: {config.out}")
    write_resolved(config, config.out / CONFIG_NAME, owner="tokenizer train")
    print(f"tokens a caption: mean {lengths.float().mean():.1f}, longest {int(lengths.max())}")
    then = next_command(config.data, "tiny", config.out.parent, tokenizer=config.out)
    print(f"tokenizer train: next: {then}")
