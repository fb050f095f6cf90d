"""The two Inception networks of the literature, from files that the user has.

`inception-tf` is the graph of the FID paper (TTUR), as torch-fidelity has it: the network behind
every published FID. `inception-torchvision` is what the paper's evaluation code (DM-GAN) used for
Figure 9: torchvision's ImageNet weights; its values differ from FID for the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.data.augment import to_tensor
from dalle.errors import CheckpointError, UsageError
from dalle.optional import load_module
from dalle.pretrained import fingerprint, read_tensors, tensors_from_bytes

FOLDER = Path("weights")  # where a file is looked for that is not given
SIDE = 299
MAX_BYTES = 256 << 20  # of a weights file; these have about 100 MB
BATCH = 16  # pictures at once, about 1 GB
PICKLES = {".pkl", ".pt", ".pth", ".bin", ".ckpt"}


def read_weights(owner: str, weights: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UsageError: a pickle, which is never read.
        CheckpointError: no whole safetensors file.
    """
    if weights.suffix.lower() in PICKLES:
        raise UsageError(
            f"{owner}: weights must be a safetensors file, got {weights}, which may run code when "
            "read; docs/evaluation.md says how to convert it"
        )
    return tensors_from_bytes(read_tensors(weights, MAX_BYTES), weights)


class _Inception:
    """What both share: 2048 features of the last pool, logits from the last layer's matrix."""

    name: str
    distance: str
    kernel: str
    score: str
    resize: str
    classes: str
    source: str  # where the weights come from
    dimensions = 2048

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device
        self.matrix = self.network.fc.weight.detach().double().cpu()
        self.fingerprint = fingerprint(self.network)

    @classmethod
    def load(cls, owner: str, weights: Path | None, device: torch.device) -> Self:
        """The network with the weights of a file.

        Args:
            owner: begins the line of an error.
            weights: the file; `FOLDER`/NAME.safetensors if left out.
            device: where it runs.

        Raises:
            UsageError: no file; the line says what to fetch and where to put it.
            CheckpointError: weights of another network.
        """
        place = FOLDER / f"{cls.name}.safetensors"
        if weights is None and place.exists():
            weights = place
        if weights is None:
            raise UsageError(
                f"{owner}: weights must be a safetensors file for {cls.name}, got none: fetch "
                f"{cls.source}, convert it (docs/evaluation.md), and put it at {place} or pass its "
                "path as --weights"
            )
        tensors = read_weights(owner, weights)
        try:
            network = cls.build(owner, tensors)
        except RuntimeError as problem:
            first = " ".join(str(problem).split())[:200]
            raise CheckpointError(
                f"{owner}: weights must be those of {cls.name}, got {weights}: {first}"
            ) from problem
        finite = all(bool(t.isfinite().all()) for t in network.state_dict().values())
        if not finite:
            raise CheckpointError(f"{owner}: weights must be finite, got NaN or infinity")
        return cls(network, device)

    @classmethod
    def build(cls, owner: str, tensors: dict[str, Tensor]) -> Any:
        """The network with these weights. Raises RuntimeError where they are another's."""
        raise NotImplementedError


class InceptionTF(_Inception):
    """The TensorFlow graph of 2015-12-05, through torch-fidelity; its own bilinear resize."""

    name, distance, kernel, score = "inception-tf", "FID", "KID", "IS"
    resize = "whole picture to 299 x 299, bilinear as TensorFlow 1"
    classes = "1008 classes, pool times the last matrix without bias"
    source = (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    )

    @classmethod
    def build(cls, owner: str, tensors: dict[str, Tensor]) -> Any:
        module = load_module("torch_fidelity.feature_extractor_inceptionv3", owner, "eval")
        # The class reads a file with pickle, or fetches one. It gets these tensors instead of the
        # download.
        fetch: Callable[..., object] = module.load_state_dict_from_url
        module.load_state_dict_from_url = lambda *_, **__: tensors
        try:
            return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        finally:
            module.load_state_dict_from_url = fetch

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        result = torch.empty(len(images), self.dimensions, dtype=torch.float32, device="cpu")
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            shapes.setdefault(image.shape, []).append(i)
        for rows in shapes.values():
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                batch = torch.from_numpy(np.stack([images[i] for i in part])).movedim(3, 1)
                result[part] = self.network(batch.to(self.device))[0].float().cpu()
        return result

    def probabilities(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        return torch.softmax(features.double() @ self.matrix.T, 1)


class InceptionTorchvision(_Inception):
    """torchvision's network with ImageNet weights, resized and scaled as DM-GAN's code does."""

    name, distance = "inception-torchvision", "FID (torchvision weights)"
    kernel, score = "KID (torchvision weights)", "IS (torchvision weights)"
    resize = "whole picture to 299 x 299, bilinear of PIL, DM-GAN's affine"
    classes = "1000 classes of ImageNet"
    source = "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"

    @classmethod
    def build(cls, owner: str, tensors: dict[str, Tensor]) -> Any:
        models = load_module("torchvision.models", owner, "eval")
        network = models.inception_v3(
            weights=None, aux_logits=True, init_weights=False, transform_input=False
        )
        network.load_state_dict(tensors)
        return network

    def __init__(self, network: Any, device: torch.device) -> None:
        super().__init__(network, device)
        self.bias = network.fc.bias.detach().double().cpu()
        network.fc = torch.nn.Identity()

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        parts = []
        deviation = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32, device="cpu")
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32, device="cpu")
        scale, shift = deviation.view(3, 1, 1) / 0.5, (mean.view(3, 1, 1) - 0.5) / 0.5
        for start in range(0, len(images), BATCH):
            part = [
                np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
                for image in images[start : start + BATCH]
            ]
            batch = to_tensor(part) * scale + shift
            parts.append(self.network(batch.to(self.device)).float().cpu())
        return torch.cat(parts)

    def probabilities(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        return torch.softmax(features.double() @ self.matrix.T + self.bias, 1)
