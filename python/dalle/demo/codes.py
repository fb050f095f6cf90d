"""`dalle train` on code stores: the dVAE is ready, and pictures are what it makes of the tokens."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dalle.data.codes import HEAD_FILE, CodePairs, check_codes, stores_of
from dalle.data.decoded import IN_MEMORY, DecodedPairs
from dalle.data.pairs import Pairs, evenly_spaced
from dalle.data.split import Subset
from dalle.demo.pace import DECODE, SLOW, Pace
from dalle.demo.sets import POOL, FolderSet, varied
from dalle.demo.sizing import SizesConfig
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.files import read_object
from dalle.pretrained import fingerprint

SHARE = 0.1  # of the time, for pictures that are decoded for the ranker and for comparison
FEWEST = 128  # pictures of the training that are decoded, however long that takes


def ready_vae(
    folder: Path | None, stores: Sequence[CodePairs], device: torch.device
) -> DiscreteVAE:
    """The dVAE that made all codes of a training.

    Args:
        folder: `--vae`.
        stores: that are trained on, at least one.
        device: where to put it.

    Raises:
        UsageError: none is given, another one, or pictures of several sizes or of an odd one.
        CheckpointError: the folder holds no dVAE.
    """
    first = stores[0]
    if folder is None:
        raise UsageError(
            f"train: vae must be the dVAE that made the codes of {first.folder} ({first.vae}), "
            f"got none; add --vae {_vae_of(first)}"
        )
    for store in stores:
        if store.image_size != first.image_size:
            raise UsageError(
                f"train: codes must be of pictures of one size, got {first.image_size} in "
                f"{first.folder} and {store.image_size} in {store.folder}"
            )
    vae = DiscreteVAE.from_pretrained(folder)
    size, digest = first.image_size, fingerprint(vae)
    check_codes("train", stores, digest, first.grid, size)  # another dVAE may have no such grid
    check_codes("train", stores, digest, vae.grid(size), size)
    if size % 2:
        other = size + vae.factor
        raise UsageError(
            f"train: image_size must be even for the ranker, got {size} in {first.folder}; encode "
            f"it at another, such as --image-size {other}"
        )
    return vae.to(device).eval()


def _vae_of(store: CodePairs) -> str:
    """The dVAE's folder, as the store says where it was, where it is still there."""
    said = read_object(store.folder / HEAD_FILE, DataError).get("made_from")
    folder = said.get("vae") if isinstance(said, dict) else None
    if isinstance(folder, str) and os.path.isfile(os.path.join(folder, "config.json")):
        return shlex.quote(folder)
    return "FOLDER, that of `dalle data encode --vae`"


def with_store(given: SizesConfig, store: CodePairs, vae: DiscreteVAE) -> SizesConfig:
    """The sizes asked for, with those that the codes fix.

    Raises:
        UsageError: one that contradicts them, or one of the training of a dVAE.
    """
    for name in ("dvae_width", "dvae_steps"):
        if getattr(given, name) is not None:
            raise UsageError(
                f"train: {name} must be left out with codes, whose dVAE is ready, "
                f"got {getattr(given, name)}"
            )
    fixed = {"image_size": store.image_size, "patch": vae.factor, "codes": vae.num_tokens}
    for name, value in fixed.items():
        if getattr(given, name) not in (None, value):
            raise UsageError(
                f"train: {name} must be {value} for the codes of {store.folder}, "
                f"got {getattr(given, name)}"
            )
    return replace(given, **fixed)


class CodesSet(FolderSet):
    """Code stores, a part of them held out.

    Args:
        train, held_out: the two parts.
        vae: the dVAE that made the codes.

    Attributes:
        limit: training pictures that are decoded at most.
    """

    headline = tuple(name for name in FolderSet.headline if name != "psnr")
    true, true_words = "decoded", "the picture as its tokens give it back"

    def __init__(self, train: Subset, held_out: Subset, vae: DiscreteVAE) -> None:
        stores = stores_of(train)
        super().__init__(train, held_out, stores[0].image_size)
        self.vae = vae
        self._decoded = DecodedPairs(train, vae), DecodedPairs(held_out, vae)
        self.limit = max(FEWEST, IN_MEMORY // (3 * self.image_size**2))
        self.splice_codes = True
        self.augment = "paper" if any(store.crops > 1 for store in stores) else "none"

    @cached_property
    def train(self) -> Pairs:
        return self._decoded[0]

    @cached_property
    def unseen(self) -> list[Pairs]:
        return [self._decoded[1]]

    def bounded(self, pace: Mapping[str, Pace], minutes: float, captions: int) -> dict[str, Pace]:
        """The pace of the stages, once it is settled how many pictures are decoded.

        Args:
            pace: measured, with the seconds of a picture that is decoded.
            minutes: how long the run may take.
            captions: of which pictures are drawn.
        """
        stages, decode = dict(pace), pace[DECODE].update
        del stages[DECODE]
        self.limit = max(FEWEST, min(self.limit, int(SHARE * 60 * minutes / max(decode, 1e-6))))
        self.splice_codes = decode <= SLOW
        pictures = sum(len(self._items(split)) for split in ("train", "heldout"))
        ranker, samples = stages["ranker"], stages["samples"]
        stages["ranker"] = ranker._replace(fixed=ranker.fixed + decode * pictures)
        stages["samples"] = samples._replace(fixed=samples.fixed + decode * captions)
        return stages

    def _items(self, split: str) -> np.ndarray:
        """The items of a part whose pictures the ranker sees and drawn ones are compared with."""
        limit = self.limit if split == "train" else max(FEWEST // 4, self.limit // 4)
        return varied(self._part(split), limit)

    @property
    def for_ranker(self) -> tuple[Pairs, Pairs]:
        parts = []
        for split in ("train", "heldout"):
            pairs, items = self._part(split), self._items(split)
            parts.append(pairs if len(items) == len(pairs) else Subset(pairs, items))
        return parts[0], parts[1]

    def _compared(self, split: str) -> np.ndarray:
        items = self._items(split)
        chosen: np.ndarray = items[evenly_spaced(len(items), POOL // 2)]
        return chosen

    @property
    def note(self) -> str:
        """How this run differs from one on pictures."""
        few, all_ = len(self._items("train")), len(self.train)
        some = f"all {all_:,}" if few == all_ else f"{few:,} of {all_:,}"
        return (
            f"Trained on codes: the dVAE was ready and was not trained here. A code store holds no "
            f"pictures, so those called decoded are what the dVAE makes of the tokens. The prior "
            f"learned from the tokens, the ranker from the decoded pictures of {some} pairs, and "
            f"drawn pictures are compared with decoded ones."
        )
