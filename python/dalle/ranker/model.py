"""Scores of picture against caption, to keep the best of many samples (paper 2.6).

The paper reranks with a pretrained CLIP; which one it does not say. Here anything that follows
`ImageTextRanker` does: `ContrastiveRanker`, small enough to train beside the prior on the same
pairs, or `TransformersCLIP` around weights the user has.

Shape letters: N pairs, B captions or pictures, L text slots, H = W side of a picture in pixels,
E width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from dalle.captions import clean
from dalle.configs import integer
from dalle.devices import autocast, without_autocast
from dalle.errors import CheckpointError, EnvironmentProblem, UsageError
from dalle.files import check_regular, read_json
from dalle.optional import prepare_torchvision
from dalle.pretrained import Pretrained, from_presets
from dalle.ranker.blocks import PRESETS, ImageTower, RankerConfig, TextTower
from dalle.tokenizer import Tokenizer

MAX_LOGIT_SCALE = 100.0  # as CLIP clips its temperature
ROWS = 16  # of a product whose rows have the same bits among any others (docs/sampling.md)


@runtime_checkable
class ImageTextRanker(Protocol):
    """Anything that says how well a picture fits a caption."""

    def scores(self, captions: Sequence[str], images: torch.Tensor) -> torch.Tensor:
        """N captions, their N pictures (N, 3, H, W) in [0, 1] -> (N,) float32, higher is better."""
        ...


class ContrastiveRanker(Pretrained[RankerConfig]):
    """Two towers into one space, trained so that a picture is nearest to its own caption (InfoNCE).

    Args:
        config: sizes.
        tokenizer: turns captions into ids; saved beside the weights.

    Attributes:
        train_precision: "fp32" or "bf16", of the towers' products while in training mode. Scores
            always are of fp32.

    Raises:
        UsageError: the tokenizer has more ids than `config.vocab_size`.
    """

    config_type = RankerConfig
    train_precision: str = "fp32"

    def __init__(self, config: RankerConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                f"ranker: vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
                f"got {config.vocab_size}"
            )
        self.tokenizer = tokenizer
        self.image = ImageTower(config)
        self.text = TextTower(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float32))

    @classmethod
    def from_preset(
        cls, name: str, *, tokenizer: Tokenizer, image_size: int, **overrides: int
    ) -> Self:
        """A fresh ranker: "tiny" (the demo's), "small" or "base"; `overrides` are config fields.

        Raises:
            UsageError: unknown preset or field, or pictures that the preset's grid does not divide.
        """
        image_size = integer("ranker", "image_size", image_size, 1)
        if name in PRESETS and "grid" not in overrides and image_size % PRESETS[name].grid:
            raise UsageError(
                f"ranker: image_size must be a multiple of {PRESETS[name].grid} for preset {name}, "
                f"got {image_size}"
            )
        sizes = {"vocab_size": tokenizer.vocab_size, "image_size": image_size, **overrides}
        return cls(from_presets("ranker", PRESETS, name, **sizes), tokenizer)

    @classmethod
    def min_parameters(cls, config: RankerConfig) -> int:
        """The token table, the largest matrices of both towers, and the net over all positions."""
        c = config
        blocks = c.depth * (10 + 8) * c.width**2
        head = c.width // 2 * (c.grid // 2) ** 2 * c.embed_dim
        return c.vocab_size * c.width + blocks + head + c.text_len * c.width

    @property
    def scale(self) -> torch.Tensor:
        """What cosines are multiplied with before the softmax: 1 / temperature, at most 100."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """(B, L) int64, padded with -1 -> (B, E) of length 1."""
        with self._precision():
            features = self.text(text)
        return F.normalize(features.float(), dim=-1)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, E) of length 1.

        Raises:
            UsageError: the side is not `config.image_size`.
        """
        size = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise UsageError(
                f"ranker: images must be (N, 3, {size}, {size}), got {tuple(images.shape)}"
            )
        with self._precision():
            features = self.image(images.float())
        return F.normalize(features.float(), dim=-1)

    def _precision(self) -> AbstractContextManager[object]:
        precision = self.train_precision if self.training else "fp32"
        return autocast(self.log_scale.device, precision)

    @torch.no_grad()
    def scores(self, captions: Sequence[str], images: torch.Tensor) -> torch.Tensor:
        """Cosine of each caption with its picture; see `ImageTextRanker`."""
        _check_pairs(captions, images)
        device = self.log_scale.device
        cosines = []
        for start in range(0, len(captions), 256):
            part = captions[start : start + 256]
            unique = sorted(set(part))
            text = self.tokenizer.encode(unique, self.config.text_len)
            rows = torch.tensor(
                [unique.index(caption) for caption in part], device=device, dtype=torch.int64
            )
            pictures = _padded(images[start : start + 256]).to(device)
            with without_autocast(pictures):
                vectors = self.encode_text(_padded(text).to(device))[rows]
                cosines.append((vectors * self.encode_images(pictures)[: len(part)]).sum(1))
        return (
            torch.cat(cosines).float().cpu()
            if cosines
            else torch.zeros(0, dtype=torch.float32, device="cpu")
        )

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes config, weights, and the tokenizer into its own subfolder."""
        self.tokenizer.save_pretrained(Path(directory) / "tokenizer")
        super().save_pretrained(directory)

    @classmethod
    def _with_parts(cls, config: RankerConfig, directory: Path) -> Self:
        tokenizer = Tokenizer.from_pretrained(directory / "tokenizer")
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{directory}: tokenizer must have at most {config.vocab_size} ids, "
                f"got {tokenizer.vocab_size}"
            )
        return cls(config, tokenizer)


class TransformersCLIP:
    """A CLIP that `transformers` loads from a local folder, behind `ImageTextRanker`.

    Args:
        directory: folder with the model's and its processor's files; nothing is fetched.
        device: where it runs.

    Raises:
        EnvironmentProblem: the extra `clip` is not installed.
        CheckpointError: the folder holds no such model.
    """

    def __init__(self, directory: Path | str, device: torch.device | str = "cpu") -> None:
        prepare_torchvision()  # which transformers imports where it is installed
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise EnvironmentProblem(
                "ranker: transformers must be installed for a CLIP, got no such package; "
                "type: pip install 'dalle-ext[clip]'"
            ) from error
        try:
            for file in Path(directory).glob("*"):
                if not file.is_dir():
                    check_regular(file)
            model = CLIPModel.from_pretrained(str(directory), local_files_only=True)
            self.processor = CLIPProcessor.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # a damaged file may raise any class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"ranker: {directory} must be a CLIP folder of transformers, got: {reason}"
            ) from error
        self.model = model.eval()
        self.to(device)

    def to(self, device: torch.device | str) -> TransformersCLIP:
        """Moves the model, as `nn.Module.to`."""
        self.device = device
        self.model = self.model.to(device)
        return self

    @torch.no_grad()
    def scores(self, captions: Sequence[str], images: torch.Tensor) -> torch.Tensor:
        """Cosine of each caption with its picture; see `ImageTextRanker`."""
        _check_pairs(captions, images)
        cosines = []
        for start in range(0, len(captions), 64):
            inputs: Any = self.processor(
                text=[clean(caption) for caption in captions[start : start + 64]],
                images=[image.clamp(0, 1) for image in images[start : start + 64].cpu()],
                return_tensors="pt",
                padding=True,
                truncation=True,
                do_rescale=False,
            )
            out = self.model(**inputs.to(self.device))
            similarity = F.cosine_similarity(out.text_embeds, out.image_embeds, dim=-1)
            cosines.append(similarity.float().cpu())
        return torch.cat(cosines) if cosines else torch.zeros(0, dtype=torch.float32, device="cpu")


def _padded(batch: torch.Tensor) -> torch.Tensor:
    """Copies of the last item behind a batch, to a multiple of `ROWS`.

    Then products give each row the same bits, and a picture the same score, whatever stands beside
    it (docs/sampling.md).
    """
    missing = -len(batch) % ROWS
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch


def load_ranker(directory: Path | str) -> ImageTextRanker:
    """A ranker from its folder: ours, or a CLIP of transformers where config.json says so.

    Raises:
        CheckpointError: neither.
    """
    head = read_json(Path(directory) / "config.json", CheckpointError)
    if isinstance(head, dict) and head.get("model_type") == "clip":
        return TransformersCLIP(directory)
    return ContrastiveRanker.from_pretrained(directory)


def _check_pairs(captions: Sequence[str], images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor) or images.dim() != 4:
        raise UsageError("ranker: images must be a tensor (N, 3, H, W), got another value")
    if isinstance(captions, (str, bytes)) or not isinstance(captions, Sequence):
        got = type(captions).__name__
        raise UsageError(f"ranker: captions must be a list of strings, got {got}")
    if len(captions) != len(images):
        raise UsageError(
            f"ranker: captions must be as many as images = {len(images)}, got {len(captions)}"
        )
