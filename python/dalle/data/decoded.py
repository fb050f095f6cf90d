"""Code stores seen as pictures: what their dVAE makes of the tokens."""

from __future__ import annotations

import numpy as np
import torch

from dalle.data.codes import stores_of, tokens_of
from dalle.data.split import Subset
from dalle.dvae.model import DiscreteVAE

IN_MEMORY = 2 << 30  # bytes of decoded pictures that are kept


def decode_alone(vae: DiscreteVAE, tokens: torch.Tensor) -> np.ndarray:
    """(h, w) int64 tokens -> (S, S, 3) uint8, the picture of 8 bits a value."""
    decoded = vae.decode(tokens[None].to(vae.codebook().device))[0]
    image: np.ndarray = (decoded * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return image


class DecodedPairs(Subset):
    """Items of code stores, with pictures that are decoded when they are asked for.

    Everything else is the stores': to a prior's training this is the set of codes. Of several
    crops of a picture the first is decoded, and each alone, so that its bits do not depend on what
    was decoded before.

    Args:
        part: some items of code stores of one grid.
        vae: the dVAE that made their codes.
    """

    def __init__(self, part: Subset, vae: DiscreteVAE) -> None:
        super().__init__(part.pairs, part.items, part.name)
        self.vae = vae
        store = stores_of(part)[0]
        self.grid, self.image_size = store.grid, store.image_size
        self._room = IN_MEMORY // (3 * self.image_size**2)  # pictures
        self._kept: dict[int, np.ndarray] = {}

    def load(self, i: int) -> np.ndarray:
        """Picture i, (S, S, 3) uint8. Raises DataError where its shard is damaged or has gone."""
        image = self._kept.get(i)
        if image is None:
            image = decode_alone(self.vae, tokens_of(self, [i], [0]).view(self.grid))
            if len(self._kept) < self._room:
                self._kept[i] = image
        return image
