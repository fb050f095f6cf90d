"""What a discrete VAE gives back of pictures: PSNR, SSIM, and how much of the codebook it uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle import pictures
from dalle.configs import integer
from dalle.data.augment import center_crop, to_tensor
from dalle.data.pairs import evenly_spaced, load_or_skip
from dalle.dvae.codebook import codebook_health
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.picture_size import side_for, trained_size
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.evaluate.cache import PART, in_parts, key_of
from dalle.evaluate.results import finish, png, table
from dalle.evaluate.scores import Set, start
from dalle.evaluate.sets import describe, is_pipeline, picture_hash
from dalle.memory import require_memory
from dalle.pipeline import Pipeline
from dalle.pretrained import fingerprint

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, as its authors have it
SHOWN = 12


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures (Wang et al. 2004): (B, C, H, W) -> (B,).

    A Gaussian window of 11 x 11, less in pictures under 6 pixels; borders are reflected. Mean over
    places and colours, as torchmetrics has it.

    Args:
        images, others: tensors or arrays of fractions in [0, 1], of one shape.

    Raises:
        UsageError: shapes that differ, or whole numbers.
    """
    images, others = (
        x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x)) for x in (images, others)
    )
    for x in (images, others):
        if not x.is_floating_point():
            raise UsageError(f"ssim: values must be fractions in [0, 1], got {x.dtype}")
    if images.shape != others.shape or images.dim() != 4:
        raise UsageError(
            f"ssim: both sets must have one shape (B, C, H, W), got {tuple(images.shape)} and "
            f"{tuple(others.shape)}"
        )
    a, b = images.double(), others.double()
    size = min(WINDOW, 2 * min(a.shape[2:]) - 1)
    at = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    line = torch.exp(-(at**2) / (2 * SIGMA**2))
    line = line / line.sum()
    channels = a.shape[1]
    across = line.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    down = line.view(1, 1, -1, 1).expand(channels, 1, -1, 1)

    def mean(x: Tensor) -> Tensor:
        wide = F.pad(x, (size // 2,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(wide, across, groups=channels), down, groups=channels)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    covariance = mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mu_a * mu_b + c1) * (2 * covariance + c2)
    value = value / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return value.flatten(1).mean(1)


def load_vae(owner: str, model: Any) -> tuple[DiscreteVAE, int]:
    """A dVAE from its folder or a pipeline's, and the side of the pipeline's pictures (0: none)."""
    if isinstance(model, DiscreteVAE):
        return model, 0
    if isinstance(model, Pipeline):
        return model.vae, model.image_size
    if not isinstance(model, (str, Path)):
        got = type(model).__name__
        raise UsageError(f"{owner}: model must be a path, a DiscreteVAE or a Pipeline, got {got}")
    try:
        if is_pipeline(model):
            pipeline = Pipeline.from_pretrained(model)
            return pipeline.vae, pipeline.image_size
        return DiscreteVAE.from_pretrained(model).eval(), 0
    except CheckpointError as error:
        raise CheckpointError(f"{owner}: model: {error}") from error


@torch.no_grad()
def recon(
    data: Set,
    model: str | Path | DiscreteVAE | Pipeline,
    *,
    out: Path | str | None = None,
    side: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Pictures to tokens and back (Figure 1): PSNR, SSIM, codes used.

    Args:
        data: the set.
        model: a dVAE, its folder, a pipeline or its folder.
        out: folder of recon.json, recon.md and recon.png (originals over reconstructions).
        side: pictures are cut to a centred square of that side; left out, the one that the model
            was trained on; where that is not known, `image_size` of the options, else 256, and a
            line says so.
        options: of `session.Setup`.

    Returns:
        "psnr" (dB, of the mean squared error of the set), "ssim", "codes_used", "perplexity".

    Raises:
        UsageError: a side that the dVAE's factor does not divide.
        DataError: no picture that can be used.
    """
    session, folder = start("recon", out, options)
    owner, setup = session.owner, session.setup
    vae, own = load_vae(owner, model)
    vae = vae.to(session.device)
    from_folder = Path(model) if isinstance(model, (str, Path)) else None
    if side is None:
        side = own or trained_size(vae, from_folder) or setup.image_size
    if side is None:
        side = side_for(owner, vae, from_folder, option="--side")
    side = integer(owner, "side", side, 1, 2**14)
    session.side = side
    if side % vae.factor:
        raise UsageError(f"{owner}: side must be a multiple of {vae.factor}, got {side}")
    source = session.take("data", data)
    pairs = source.pairs
    at_once = min(setup.batch_size, len(pairs))
    what = f"{at_once} pictures of {side} pixels"
    # Two sets of float32, and eight of float64 for the similarity.
    advice = "take a smaller --side or --batch-size"
    require_memory(owner, at_once * 3 * side**2 * (2 * 4 + 8 * 8), what, advice)
    description = {
        "kind": "reconstructions",
        "model": fingerprint(vae),
        "set": [picture_hash(pairs), len(pairs)],
        "side": side,
    }

    def give_back(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = vae.encode(images.to(session.device))
        return tokens.cpu(), vae.decode(tokens).float().cpu().clamp(0, 1)

    def crops(items: Sequence[int], limit: int | None = None) -> list[np.ndarray]:
        return load_or_skip(
            pairs, items, lambda image, _: center_crop(image, side), require_any=False, limit=limit
        )[0]

    def compute(items: Sequence[int], done: Callable[[int], None]) -> dict[str, Tensor]:
        counts = torch.zeros(vae.num_tokens, dtype=torch.int64, device="cpu")
        errors = [torch.empty(0, dtype=torch.float64, device="cpu")]
        similar = list(errors)
        for first in range(0, len(items), setup.batch_size):
            part = crops(items[first : first + setup.batch_size])
            if part:
                images = to_tensor(part)
                tokens, back = give_back(images)
                counts += torch.bincount(tokens.flatten(), minlength=vae.num_tokens)
                errors.append((images.double() - back.double()).square().flatten(1).mean(1))
                similar.append(ssim(images, back))
            done(min(first + setup.batch_size, len(items)))
        return {"counts": counts, "error": torch.cat(errors), "ssim": torch.cat(similar)}

    def whole(read: dict[str, Tensor], count: int) -> bool:
        wanted = {"counts", "error", "ssim"} <= set(read)
        return wanted and read["error"].shape == read["ssim"].shape and len(read["error"]) <= count

    parts, _ = in_parts(
        owner,
        Path(setup.cache) / "reconstructions" / key_of(description),
        len(pairs),
        PART,
        compute,
        name="reconstructions",
        check=whole,
    )
    counts = torch.stack([part["counts"] for part in parts]).sum(0)
    error, ssims = (torch.cat([part[key] for part in parts])[:, None] for key in ("error", "ssim"))
    if not len(error):
        raise DataError(f"{owner}: data must hold pictures that can be used, got none")
    value, mean_ssim = _decibel(error), float(ssims.mean())
    health = codebook_health(counts)
    intervals = {
        "psnr": session.interval(_decibel, [error], value)["interval"],
        "ssim": session.interval(lambda s: float(s.mean()), [ssims], mean_ssim)["interval"],
    }
    grid = tuple(vae.grid(side))
    rows = [
        ["PSNR in dB", value, intervals["psnr"]],
        ["SSIM", mean_ssim, intervals["ssim"]],
        ["codes used", f"{health.used} of {health.size}", None],
        ["perplexity of the codes", health.perplexity, None],
    ]
    result = {
        "title": f"Reconstruction: {value:.2f} dB, {health.used} of {health.size} codes",
        "command": owner,
        "psnr": value,
        "ssim": mean_ssim,
        "codes": health.size,
        "codes_used": health.used,
        "perplexity": health.perplexity,
        "intervals": intervals,
        "side": side,
        "grid": list(grid),
        "n": {"data": len(error)},
        "seed": session.seed,
        "resize": f"centred square, area to {side} x {side}",
        "model": fingerprint(vae),
        "sets": {"data": describe(source, len(error))},
        "tables": [table(["measure", "value", "95 % interval"], rows)],
    }
    if folder is None:
        return finish("recon", result, None)
    originals = to_tensor(crops(evenly_spaced(len(pairs), 4 * SHOWN).tolist(), SHOWN))
    returned = give_back(originals)[1]
    sheet = pictures.grid(
        torch.cat([originals, returned]),
        columns=len(originals),
        scale=pictures.default_scale(side),
        labels=["original"] * len(originals) + ["given back"] * len(returned),
    )
    return finish("recon", result, folder, png(sheet))


def _decibel(error: Tensor) -> float:
    """PSNR of a mean squared error over all pictures, at most 99."""
    return float(np.minimum(99.0, -10 * np.log10(max(float(error.mean()), 1e-10))))
