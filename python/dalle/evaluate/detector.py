"""A detector of copies (paper 3.2): a picture is to be nearest to its own transformed copy.

A small residual net, anti-aliased, with weight norm and GELU as the paper's ResNet-50, trained with
InfoNCE at temperature 0.07. The copy is turned, cropped, stretched, scaled down and up, recoloured
and compressed; its twin is the whole picture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import dalle_ext
from dalle.configs import check_numbers, require
from dalle.console import progress_shown, say
from dalle.data.augment import to_tensor
from dalle.data.pairs import evenly_spaced, load_or_skip
from dalle.errors import CheckpointError, DataError
from dalle.evaluate.cache import key_of
from dalle.evaluate.sets import Source, picture_hash
from dalle.files import read_bytes, read_json, saving, write_atomic
from dalle.memory import require_memory
from dalle.pretrained import (
    Pretrained,
    check_tensors,
    fingerprint,
    tensors_from_bytes,
    tensors_to_bytes,
)

TEMPERATURE = 0.07
MOST_TRAINED = 10_000  # pictures held in memory to learn from
KEEP_EVERY = 100  # steps after which a training is kept
STATE = "training.safetensors"
SCALINGS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes of a `CopyDetector`.

    Attributes:
        image_size: side of its pictures in pixels, a multiple of 8.
        width: channels of the first stage; the others have 2, 4 and 4 times as many.
        dimensions: of a feature.
    """

    image_size: int = 48
    width: int = 24
    dimensions: int = 128

    def __post_init__(self) -> None:
        check_numbers("detector", self)
        requirement = "a multiple of 8 from 16 to 512"
        fits = lambda x: x in range(16, 513, 8)  # noqa: E731
        require("detector", self, requirement, fits, "image_size")
        require("detector", self, "4 to 512", lambda x: 4 <= x <= 512, "width")
        require("detector", self, "8 to 4096", lambda x: 8 <= x <= 4096, "dimensions")


class _Stage(nn.Module):
    """A step to more channels, one residual block, and a blurred halving of the side."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.enter = weight_norm(nn.Conv2d(before, after, 3, padding=1, dtype=torch.float32))
        self.block = weight_norm(nn.Conv2d(after, after, 3, padding=1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.enter(x))
        # Blurred by (1, 2, 1) / 4 while it is halved, so that a shift by a pixel changes little.
        x = F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 0, 1, 0), mode="replicate"), 2, 1), 2, 2)
        return x + F.gelu(self.block(x))


class CopyDetector(Pretrained[DetectorConfig]):
    """(B, 3, S, S) in [0, 1] -> (B, d) of length 1.

    Args:
        config: sizes.
    """

    config_type = DetectorConfig

    def __init__(self, config: DetectorConfig | None = None) -> None:
        config = config or DetectorConfig()
        super().__init__(config)
        w = config.width
        widths = (3, w, 2 * w, 4 * w)
        self.stages = nn.ModuleList(_Stage(a, b) for a, b in zip(widths, widths[1:], strict=False))
        # Where things are tells pictures apart: the head sees a 2 x 2 grid beside the whole.
        self.head = weight_norm(nn.Linear(4 * w * 6, config.dimensions, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        # Colours side by side: the convolutions of so few channels take half the time so.
        x = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
        pooled = [x.mean((2, 3)), x.amax((2, 3)), F.adaptive_avg_pool2d(x, 2).flatten(1)]
        return F.normalize(self.head(torch.cat(pooled, 1)), dim=-1)


def transformed(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A copy as somebody might have made it: (H, W, 3) uint8 -> (size, size, 3) uint8.

    A turn of up to 10 degrees; a crop of 40 to 100 % of the area, stretched by up to 3 : 4; a
    scaling down and up; another hue, saturation and brightness; JPEG of quality 15 to 95. The
    scalings are by an interpolation drawn each time.

    Args:
        image: the picture.
        size: side of the copy.
        rng: all randomness.
    """
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        fill = tuple(int(x) for x in image.mean((0, 1)))
        picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR, fillcolor=fill)
    width, height = picture.size
    area, stretch = rng.uniform(0.4, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    w = max(1.0, min(width, width * area**0.5 * stretch))
    h = max(1.0, min(height, height * area**0.5 / stretch))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    picture = picture.resize((size, size), _scaling(rng), box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        small = max(8, round(size * rng.uniform(0.3, 1)))
        picture = picture.resize((small, small), _scaling(rng)).resize((size, size), _scaling(rng))
    if rng.random() < 0.8:
        hsv = np.asarray(picture.convert("HSV")).astype(np.float32)
        hsv[..., 0] = (hsv[..., 0] + 255 * rng.uniform(-0.1, 0.1)) % 256
        hsv[..., 1:] *= rng.uniform(0.6, 1.4, 2)
        picture = Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")
    if rng.random() < 0.7:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(15, 95)))
        picture = Image.open(buffer).convert("RGB")
    return np.asarray(picture)


def _scaling(rng: np.random.Generator) -> Image.Resampling:
    return SCALINGS[int(rng.integers(len(SCALINGS)))]


def whole(image: np.ndarray, size: int) -> np.ndarray:
    """The whole picture, stretched to a square: a crop of it may have any proportions."""
    resized = image if image.shape[:2] == (size, size) else dalle_ext.area_resize(image, size, size)
    return np.asarray(resized)


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Mean loss of finding row i of one among the rows of the other, both ways; unit rows."""
    logits = a @ b.T / TEMPERATURE
    target = torch.arange(len(a), dtype=torch.int64, device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def load_pictures(owner: str, source: Source, side: int) -> np.ndarray:
    """Up to `MOST_TRAINED` pictures of a set, evenly spaced: (n, side, side, 3) uint8.

    Raises:
        DataError: fewer than 2 can be used.
    """
    items = evenly_spaced(len(source), min(len(source), MOST_TRAINED))
    require_memory(owner, len(items) * 3 * side * side, f"{len(items)} pictures", "take fewer")
    images: list[np.ndarray] = []
    with progress_shown("pictures to learn from") as show:
        for start in range(0, len(items), 256):
            part = items[start : start + 256]
            images += load_or_skip(
                source.pairs, part, lambda image, _: whole(image, side), require_any=False
            )[0]
            show(start + len(part), len(items))
    if len(images) < 2:
        raise DataError(
            f"{owner}: train must hold 2 or more pictures that can be used, got {len(images)} "
            f"in {source.spec}"
        )
    return np.stack(images)


def train_detector(
    owner: str,
    source: Source,
    *,
    config: DetectorConfig,
    steps: int,
    batch_size: int,
    seed: int,
    cache: Path,
    device: torch.device,
) -> tuple[CopyDetector, dict[str, Any]]:
    """A detector that learns from a set, or the one that an earlier call has trained.

    Args:
        owner: begins the line of an error.
        source: the set.
        config: sizes.
        steps, batch_size: of the training; a batch is at most the set.
        seed: of weights, batches and copies. Step k depends on seed and k only.
        cache: folder; a stopped training goes on from its last hundred steps.
        device: to train on.

    Returns:
        The detector in evaluation mode, and its record: "steps", "share_matched" (of the copies of
        the last batches, how many were nearest to their picture), "folder".
    """
    description = {
        "kind": "copy-detector",
        "set": [picture_hash(source.pairs), len(source)],
        "training": [steps, batch_size, seed, config.image_size, config.width, config.dimensions],
    }
    folder = Path(cache) / "detectors" / key_of(description)
    record = {"trained_on": source.spec, "steps": steps, "folder": str(folder)}
    if (folder / "config.json").is_file():
        try:
            model = CopyDetector.from_pretrained(folder)
            matched = read_json(folder / "matched.json", CheckpointError)
            return model.to(device), {**record, "share_matched": matched}
        except CheckpointError:
            say(f"{owner}: {folder} is damaged and is trained again")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model = CopyDetector(config)
    model.to(device).train()
    images = load_pictures(owner, source, 2 * config.image_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    begin = _resume(owner, folder / STATE, model, optimizer)
    batch, hits = min(batch_size, len(images)), [0, 0]
    size = config.image_size
    with saving(owner, folder), progress_shown("copy detector") as show:
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(begin, steps):
            rng = np.random.default_rng((seed, step))
            rows = rng.choice(len(images), batch, replace=False)
            plain = to_tensor([whole(images[i], size) for i in rows]).to(device)
            copies = to_tensor([transformed(images[i], size, rng) for i in rows]).to(device)
            rate = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * rate
            both = model(torch.cat([plain, copies]))
            loss = info_nce(both[:batch], both[batch:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= steps - 10:
                nearest = (both[batch:] @ both[:batch].T).argmax(1).cpu()
                target = torch.arange(batch, dtype=torch.int64, device="cpu")
                hits[0] += int((nearest == target).sum())
                hits[1] += batch
            if (step + 1) % KEEP_EVERY == 0 and step + 1 < steps:
                write_atomic(folder / STATE, _state(model, optimizer, step + 1))
            show(step + 1, steps)
        matched = hits[0] / max(1, hits[1])
        write_atomic(folder / "matched.json", f"{matched}\n".encode())
        model.eval().save_pretrained(folder)
        (folder / STATE).unlink(missing_ok=True)
    return model, {**record, "share_matched": matched}


def _state(model: CopyDetector, optimizer: torch.optim.Optimizer, step: int) -> bytes:
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{key}.{number}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    return tensors_to_bytes(
        {**tensors, "step": torch.tensor(step, dtype=torch.int64, device="cpu")}
    )


def _resume(owner: str, path: Path, model: CopyDetector, optimizer: torch.optim.Optimizer) -> int:
    """The step from which a kept training goes on; 0 where there is none that is whole."""
    if not path.exists():
        return 0
    try:
        tensors = tensors_from_bytes(read_bytes(path, 4 << 30), path)
        weights = {n[6:]: t for n, t in tensors.items() if n.startswith("model.")}
        check_tensors(model, weights, str(path))
        state = {
            number: {key: tensors[f"{key}.{number}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            for number in range(len(list(model.parameters())))
        }
        step = int(tensors["step"])
    except (OSError, CheckpointError, KeyError):
        say(f"{owner}: {path} is damaged; the detector is trained anew")
        return 0
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def is_detector(source: object) -> bool:
    """Whether a path is the folder of a saved `CopyDetector`."""
    if not isinstance(source, (str, Path)) or not (Path(source) / "config.json").is_file():
        return False
    try:
        head = read_json(Path(source) / "config.json", CheckpointError)
    except CheckpointError:
        return False
    return isinstance(head, dict) and head.get("class") == "CopyDetector"


VIEWS = 6


def views(image: np.ndarray) -> list[np.ndarray]:
    """The whole picture, its four corners and its middle: a copy may show a part of it.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        `VIEWS` pictures; the crops have 4/5 of its sides.
    """
    height, width = image.shape[:2]
    h, w = max(1, round(0.8 * height)), max(1, round(0.8 * width))
    down, right = height - h, width - w
    places = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
    return [image, *(image[y : y + h, x : x + w] for y, x in places)]


class DetectorExtractor:
    """A `CopyDetector` as an extractor of unit vectors; it has no classes.

    Args:
        model: in evaluation mode, on the device to use.
        cropped: whether a picture gives the vectors of all its `views`, one after the other.
    """

    name, distance, kernel, score = "copy-detector", "FD-copies", "KD-copies", "none"
    classes = "none"

    def __init__(self, model: CopyDetector, *, cropped: bool = False) -> None:
        self.model, self.size, self.cropped = model, model.config.image_size, cropped
        self.dimensions = model.config.dimensions * (VIEWS if cropped else 1)
        self.fingerprint = fingerprint(model)
        what = "whole picture and five crops of 4/5" if cropped else "whole picture"
        self.resize = f"{what}, area to {self.size} x {self.size}"

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        """n pictures, (H, W, 3) uint8 of any sizes -> (n, dimensions) float32 on the CPU."""
        shown = [v for image in images for v in (views(image) if self.cropped else [image])]
        batch = to_tensor([whole(image, self.size) for image in shown])
        device = next(self.model.parameters()).device
        features: Tensor = self.model(batch.to(device))
        return features.cpu().reshape(len(images), self.dimensions)

    def probabilities(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Refused: a detector of copies has no classes."""
        raise DataError("eval overlap: a copy detector has no classes")
