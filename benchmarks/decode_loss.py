"""What 8-bit caches and bf16 weights cost in loss: `python -m benchmarks.decode_loss PIPELINE`.

A trained pipeline's prior reads the codes of held-out pictures one after another, as the decoder
draws them: with all as it is, with a cache of 8 bits, with bf16 weights (where the processor has
bf16 dot products) and with both. Beside them stands the uncached forward pass. `--record` writes a
dated result file; run it in the repository's root with `benchmarks/` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dalle_ext
from dalle.data.augment import load_cropped, to_tensor
from dalle.data.pairs import evenly_spaced
from dalle.data.sources import load_pairs
from dalle.data.split import hold_out
from dalle.pipeline import Pipeline
from dalle.prior.decode import Decoder
from dalle.prior.model import Prior

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
from harness import record  # noqa: E402

FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"cache_bits": 8},
    {"weights": "bf16"},
    {"weights": "bf16", "cache_bits": 8},
)
BATCH = 64


def held_out(pipeline: Pipeline, data: str, count: int) -> tuple[Tensor, Tensor]:
    """Text (n, text_len - 1) and codes (n, N) of pictures that training has not seen.

    Of `shapes` those of its split "test", of a folder those that `dalle train` holds out.
    """
    size = pipeline.image_size
    if data == "shapes":
        pairs: Any = load_pairs(data, image_size=size, split="test")
    else:
        pairs = hold_out(load_pairs(data, image_size=size), 0.1)[1]
    items = evenly_spaced(len(pairs), count).tolist()
    crops, items = load_cropped(pairs, items, size)
    images = to_tensor(crops)
    shaped = [pipeline.tokenizer.shape(pairs.captions[item]) for item in items]
    text = pipeline.tokenizer.encode(shaped, pipeline.prior.config.text_len - 1)
    with torch.no_grad():
        codes = torch.cat([pipeline.vae.encode(part) for part in images.split(BATCH)])
    return text, codes.flatten(1)


def nats(logits: Tensor, codes: Tensor) -> Tensor:
    return -logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]


@torch.no_grad()
def whole(prior: Prior, text: Tensor, codes: Tensor) -> Tensor:
    """(n, N) nats of each code by the forward pass."""
    parts = zip(text.split(BATCH), codes.split(BATCH), strict=True)
    return torch.cat([nats(prior(t, c).image_logits, c) for t, c in parts])


def decoded(prior: Prior, text: Tensor, codes: Tensor, **form: Any) -> tuple[Tensor, int]:
    """(n, N) nats of each code by the decoder, and the bytes of one candidate's cache."""
    out = []
    for t, c in zip(text.split(BATCH), codes.split(BATCH), strict=True):
        decoder = Decoder(prior, len(t), 1, **form)
        decoder.set_text(t)
        for slot in range(decoder.slots):
            logits = decoder.step(slot, c[:, slot - 1 : slot] if slot else None)
            out.append(nats(logits, c[:, slot : slot + 1]))
    parts = torch.cat(
        [torch.cat(out[i : i + decoder.slots], 1) for i in range(0, len(out), decoder.slots)]
    )
    return parts, decoder.num_bytes // decoder.batch


def measure(pipeline: Pipeline, text: Tensor, codes: Tensor) -> list[dict[str, Any]]:
    """A row for each form: mean nats a code, its difference from the first, and one's error."""
    rows: list[dict[str, Any]] = []
    plain: Tensor | None = None
    for form in FORMS:
        if form.get("weights") == "bf16" and dalle_ext.build_info()["cpu_isa"] != "v4_bf16":
            continue
        found, size = decoded(pipeline.prior, text, codes, **form)
        plain = found if plain is None else plain
        of_picture = (found - plain).mean(1)
        rows.append(
            {
                "form": ", ".join(f"{k} {v}" for k, v in form.items()) or "as it is",
                "nats": float(found.mean()),
                "difference": float(of_picture.mean()),
                "standard_error": float(of_picture.std() / math.sqrt(len(of_picture))),
                "largest_of_a_code": float((found - plain).abs().max()),
                "cache_bytes_of_a_candidate": size,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pipeline", type=Path, help="folder of a trained pipeline")
    parser.add_argument("--data", default="shapes", help="what it was trained on")
    parser.add_argument("--pictures", type=int, default=512, help="held-out pictures at most")
    parser.add_argument("--record", action="store_true", help="write a dated result file")
    given = parser.parse_args()
    pipeline = Pipeline.from_pretrained(given.pipeline)
    text, codes = held_out(pipeline, given.data, given.pictures)
    forward = float(whole(pipeline.prior, text, codes).mean())
    print(
        f"{len(codes)} pictures of {codes.shape[1]} codes; forward pass {forward:.6f} nats a code"
    )
    rows = measure(pipeline, text, codes)
    assert abs(rows[0]["nats"] - forward) < 1e-4, "the decoder must be the forward pass"
    for row in rows:
        print(
            f"{row['form']}: {row['nats']:.6f}, difference {row['difference']:+.2e} "
            f"± {row['standard_error']:.1e}, of one code at most {row['largest_of_a_code']:.1e}, "
            f"{row['cache_bytes_of_a_candidate']} bytes a candidate"
        )
    if given.record:
        data = "shapes" if given.data == "shapes" else Path(given.data).name
        c = pipeline.prior.config
        shape = {"width": c.d_model, "layers": c.num_layers, "grid": c.grid, "data": data}
        shape["kinds"] = [pattern.kind for pattern in pipeline.prior.patterns]
        more = {"pictures": len(codes), "forward_pass_nats": forward, "prior": shape}
        print(f"recorded in {record('decode_loss', rows, **more)}")


if __name__ == "__main__":
    main()
