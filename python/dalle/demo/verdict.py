"""What the scores of a run mean, in sentences that say what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle.demo.workspace import Workspace
from dalle.train.metrics import read_metrics

BLURRED, SOFT = 20.0, 22.0  # dB; the emoji of the demo have 22.9 and are drawn well
KNOWS = 0.5  # of the captions drawn right, below which the prior needs more updates
RISE = 1.02  # of the lowest held-out loss, above which it counts as risen
STILL_FALLS = 0.97  # of the loss after two thirds of the training


def prior_losses(space: Workspace) -> list[tuple[int, float]]:
    """(updates, held-out loss) during the prior's training."""
    path = space.folder("prior") / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return [(r["step"], r["val_loss"]) for r in records if isinstance(r.get("val_loss"), float)]


def verdict(
    scores: Mapping[str, Any],
    losses: list[tuple[int, float]],
    name: str,
    command: str = "train",
    *,
    own_dvae: bool = True,
) -> list[str]:
    """Sentences on reconstructions, codebook, prior, ranker and drawings, the weakest part first.

    Args:
        scores: of the run.
        losses: of `prior_losses`.
        name: of the data set.
        command: "train", or "demo", whose sizes are fixed.
        own_dvae: whether the run trained its dVAE, which else is not to be improved here.
    """
    pairs = scores.get("data", {}).get("pairs", 0)
    drawn_right = scores.get("train_at_1", 1.0) >= KNOWS
    sentences = [
        *(_reconstructions(scores) if own_dvae else []),
        *_prior(pairs, losses, drawn_right),
        *_ranker(scores),
        *_drawings(scores, name),
    ]
    if command == "demo" and any("--" in sentence for sentence in sentences):
        sentences.append(f"These are options of dalle train --data {name}.")
    return sentences


def _reconstructions(scores: Mapping[str, Any]) -> list[str]:
    sentences = []
    psnr, train, share = (scores.get(key) for key in ("psnr", "psnr_train", "code_share"))
    if psnr is not None and psnr < SOFT:
        how = "blurred" if psnr < BLURRED else "soft"
        sentences.append(
            f"Reconstructions are {how} ({psnr:.1f} dB on held-out pictures): give the dVAE more "
            "--codes, a smaller --patch or more --dvae-steps."
        )
    if psnr is not None and train is not None and train - psnr > 2:
        sentences.append(
            f"The dVAE gives training pictures back {train - psnr:.1f} dB better than held-out "
            "ones: more pictures would help most."
        )
    if share is not None and share < 0.5:
        sentences.append(f"Only {share:.0%} of the codes are in use: half the --codes would do.")
    return sentences


def _prior(pairs: int, losses: list[tuple[int, float]], drawn_right: bool) -> list[str]:
    """`drawn_right`: whether captions of the training are; else nothing is memorised yet."""
    if len(losses) < 4:
        return []
    step, lowest = min(losses, key=lambda point: point[1])
    last_step, last = losses[-1]
    if last > RISE * lowest and step < last_step and drawn_right:
        return [
            f"The prior memorises: {pairs} pictures, its held-out loss rises after step {step} "
            f"({lowest:.2f}, at the end {last:.2f}). That suits captions of the training; for new "
            f"ones take more pictures, or --prior-steps {step}."
        ]
    if last < STILL_FALLS * losses[len(losses) * 2 // 3][1]:
        return [
            f"The prior's held-out loss still falls ({last:.2f}): a longer training would help "
            "(--time hour, or more --prior-steps)."
        ]
    return []


def _ranker(scores: Mapping[str, Any]) -> list[str]:
    accuracy, choices = scores.get("ranker_accuracy"), scores.get("ranker_choices")
    if accuracy is None or not choices or choices < 8 or accuracy >= 3 / choices:
        return []
    return [
        f"The ranker finds {accuracy:.0%} of the held-out captions' pictures among {choices:.0f}, "
        "hardly more than by chance: its order says little for new captions."
    ]


def _drawings(scores: Mapping[str, Any], name: str) -> list[str]:
    train, held_out = scores.get("train_at_1"), scores.get("held_out_at_1")
    shares = {"captions of the training": train, "held-out captions": held_out}
    cases = [(words, share) for words, share in shares.items() if share is not None]
    if not cases:
        return []
    captions = scores.get("captions_drawn", 1)
    chance = 1 / max(1, scores.get("true_pictures", captions))
    (words, share), *more = cases
    sentence = (
        f"Drawn for {words}, the best of {scores.get('samples', 8 * captions) // captions} is "
        f"nearest to a right picture of {name} in {share:.0%} of the cases (chance: {chance:.1%})"
    )
    for words, share in more:
        sentence += f", for {words} in {share:.0%}"
    if cases[0][1] < KNOWS:
        sentence += ": the prior needs more updates (--time hour, or --prior-steps)"
    return [sentence + "."]
