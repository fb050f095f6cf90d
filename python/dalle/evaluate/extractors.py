"""Networks that turn pictures into features, behind one protocol, each with the name of its metric.

Only features of the Inception network of the FID paper (`inception-tf`) give what is called FID.
Of any other network the distance is named after it, e.g. FD-ranker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dalle.captions import clean
from dalle.configs import did_you_mean
from dalle.data.augment import center_crop, to_tensor
from dalle.devices import pick_device
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.files import read_json
from dalle.pretrained import fingerprint
from dalle.ranker.model import ContrastiveRanker, TransformersCLIP, load_ranker

PIPELINES = (Path("run/pipeline"), Path("out/demo/pipeline"))  # of `dalle train`, of `dalle demo`
MAX_CLASSES = 1000  # captions that stand for classes where a network has none


@runtime_checkable
class Extractor(Protocol):
    """What every measure needs of a network.

    Attributes:
        name: of the extractor, e.g. "ranker".
        distance, kernel, score: names of the Fréchet distance, the kernel distance and the score
            over classes that these features give, e.g. "FD-ranker".
        resize: in words, what is done to a picture first.
        classes: in words, what the classes of `probabilities` are.
        dimensions: d.
        fingerprint: hash of the weights.
    """

    name: str
    distance: str
    kernel: str
    score: str
    resize: str
    classes: str
    dimensions: int
    fingerprint: str

    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        """n pictures, (H, W, 3) uint8 of any sizes -> (n, d) float32 on the CPU."""
        ...

    def probabilities(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """(n, d) features -> (n, classes) float64, each row a distribution over classes.

        Args:
            features: of `features`.
            captions: stand for classes where the network has none of its own.
        """
        ...


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """An extractor whose features share their space with those of captions."""

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """n captions -> (n, d) float32 of length 1."""
        ...


def as_classes(captions: Sequence[str]) -> list[str]:
    """Up to `MAX_CLASSES` different captions, evenly spaced over all of them in order."""
    distinct = sorted(set(filter(None, captions)))
    if not distinct:
        raise DataError("eval: captions must be there to stand for classes, got none")
    rows = np.linspace(0, len(distinct) - 1, min(len(distinct), MAX_CLASSES)).astype(int)
    return [distinct[i] for i in rows]


class RankerExtractor:
    """The pictures' side of a `ContrastiveRanker`: unit vectors.

    Args:
        ranker: in evaluation mode, on the device to use.
    """

    name, distance, kernel, score = "ranker", "FD-ranker", "KD-ranker", "IS-ranker"
    classes = "softmax of the ranker over captions"

    def __init__(self, ranker: ContrastiveRanker) -> None:
        self.ranker = ranker
        self.dimensions = ranker.config.embed_dim
        self.fingerprint = fingerprint(ranker)
        self.size = ranker.config.image_size
        self.resize = f"centred square, area to {self.size} x {self.size}"

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        batch = to_tensor([center_crop(image, self.size) for image in images])
        return self.ranker.encode_images(batch.to(self.ranker.log_scale.device)).cpu()

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        ranker, parts = self.ranker, []
        for start in range(0, len(captions), 256):
            part = list(captions[start : start + 256])
            text = ranker.tokenizer.encode(part, ranker.config.text_len)
            parts.append(ranker.encode_text(text.to(ranker.log_scale.device)).cpu())
        return torch.cat(parts)

    def probabilities(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        cosines = features.double() @ self.text_features(as_classes(captions)).double().T
        return (cosines * float(self.ranker.scale.detach())).softmax(1)


class ClipExtractor:
    """The pictures' side of a CLIP of transformers, from a local folder: unit vectors.

    Args:
        clip: on the device to use.
    """

    name, distance, kernel, score = "clip", "FD-clip", "KD-clip", "IS-clip"
    resize = "by the folder's own image processor"
    classes = "softmax of the CLIP over captions"

    def __init__(self, clip: TransformersCLIP) -> None:
        self.clip = clip
        self.fingerprint = fingerprint(clip.model)
        self.dimensions = self.features([np.zeros((8, 8, 3), np.uint8)]).shape[1]

    @torch.no_grad()
    def _embeds(self, captions: Sequence[str], images: Sequence[np.ndarray]) -> Any:
        inputs: Any = self.clip.processor(
            text=[clean(caption) for caption in captions],
            images=[to_tensor([image])[0] for image in images],
            return_tensors="pt",
            padding=True,
            truncation=True,
            do_rescale=False,
        )
        return self.clip.model(**inputs.to(self.clip.device))

    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        embeds: Tensor = self._embeds(["a"], images).image_embeds
        return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu()

    def text_features(self, captions: Sequence[str]) -> Tensor:
        blank, parts = np.zeros((8, 8, 3), np.uint8), []
        for start in range(0, len(captions), 64):
            embeds = self._embeds(captions[start : start + 64], [blank]).text_embeds
            parts.append(torch.nn.functional.normalize(embeds.float(), dim=-1).cpu())
        return torch.cat(parts)

    def probabilities(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        cosines = features.double() @ self.text_features(as_classes(captions)).double().T
        scale = float(self.clip.model.logit_scale.detach().exp())
        return (cosines * scale).softmax(1)


def _ranker_folder(owner: str, weights: Path | None) -> Path:
    """The folder given, or the ranker inside it where it is a pipeline; else the first found.

    Raises:
        DataError: nothing was given, and there is none.
    """
    if weights is None:
        found = [p / "ranker" for p in PIPELINES if (p / "ranker/config.json").exists()]
        if not found:
            places = " nor in ".join(str(p / "ranker") for p in PIPELINES)
            raise DataError(
                f"{owner}: weights must be the folder of a ranker or of a pipeline with one, "
                f"got nothing, and there is none in {places}"
            )
        return found[0]
    head = read_json(weights / "config.json", CheckpointError) if weights.is_dir() else None
    if isinstance(head, dict) and head.get("class") == "Pipeline":
        if not head.get("ranker"):
            raise CheckpointError(f"{owner}: weights must hold a ranker, got a pipeline without")
        return weights / "ranker"
    return weights


def _ranker(owner: str, weights: Path | None, device: torch.device) -> Extractor:
    folder = _ranker_folder(owner, weights)
    ranker = load_ranker(folder)
    if not isinstance(ranker, ContrastiveRanker):
        raise CheckpointError(
            f"{owner}: weights must be a ranker of dalle, got a CLIP folder: take --extractor clip"
        )
    return RankerExtractor(ranker.to(device).eval())


def _clip(owner: str, weights: Path | None, device: torch.device) -> Extractor:
    if weights is None:
        raise UsageError(
            f"{owner}: weights must be a folder with a CLIP of transformers (config.json, weights, "
            "processor), which you fetch yourself, got nothing"
        )
    return ClipExtractor(TransformersCLIP(weights, device))


def _inception_tf(owner: str, weights: Path | None, device: torch.device) -> Extractor:
    from dalle.evaluate.inception import InceptionTF

    return InceptionTF.load(owner, weights, device)


def _inception_torchvision(owner: str, weights: Path | None, device: torch.device) -> Extractor:
    from dalle.evaluate.inception import InceptionTorchvision

    return InceptionTorchvision.load(owner, weights, device)


Loader = Callable[[str, Path | None, torch.device], Extractor]
EXTRACTORS: Mapping[str, Loader] = {
    "ranker": _ranker,
    "clip": _clip,
    "inception-tf": _inception_tf,
    "inception-torchvision": _inception_torchvision,
}


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Which network the features are of.

    Attributes:
        extractor: ranker, clip, inception-tf (the network of FID) or inception-torchvision (that of
            the paper's evaluation code).
        weights: its weights: a folder for ranker (a pipeline's too) and clip, a safetensors file
            for the others. Nothing is downloaded. Left out with ranker: that of a pipeline which
            draws, of run/pipeline, or of out/demo/pipeline.
    """

    extractor: str = "ranker"
    weights: Path | None = None


def load_extractor(
    name: str | Extractor,
    weights: Path | str | None = None,
    *,
    device: torch.device | str = "cpu",
    owner: str = "eval",
) -> Extractor:
    """An extractor by name, or the one given.

    Args:
        name: a key of `EXTRACTORS`, or an object that follows `Extractor`.
        weights: see `ExtractorConfig`.
        device: where it runs.
        owner: begins the line of an error.

    Raises:
        UsageError: unknown name, or weights that must be given.
        CheckpointError: weights that are damaged or of another network.
        EnvironmentProblem: a package is missing.
    """
    if not isinstance(name, str):
        if not isinstance(name, Extractor):
            got = type(name).__name__
            raise UsageError(f"{owner}: extractor must be a name or an Extractor, got {got}")
        return name
    if name not in EXTRACTORS:
        hint = did_you_mean(name, EXTRACTORS)
        choices = ", ".join(EXTRACTORS)
        raise UsageError(f"{owner}: extractor must be one of {choices}, got {name!r}{hint}")
    if weights is not None and not isinstance(weights, (str, Path)):
        raise UsageError(f"{owner}: weights must be a path, got {type(weights).__name__}")
    path = None if weights is None else Path(weights)
    if path is not None and not path.exists():
        raise CheckpointError(f"{owner}: weights must be there, got no such path: {path}")
    try:
        return EXTRACTORS[name](owner, path, pick_device(str(device)))
    except CheckpointError as error:
        if str(error).startswith(owner):
            raise
        raise CheckpointError(f"{owner}: weights: {error}") from error
