"""Figures 7 and 9, and the overlap of 3.2: measures of `dalle eval` on the shared drawing.

Nothing here is a published FID: features are of the pipeline's own ranker, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.data.pairs import Pairs, evenly_spaced
from dalle.data.split import Subset
from dalle.evaluate import paper
from dalle.evaluate.ballots import QUESTIONS
from dalle.evaluate.data_overlap import overlap as measure_overlap
from dalle.evaluate.preference import votes
from dalle.evaluate.sweeps import blur, rerank, scenes_of
from dalle.files import make_folder, read_bytes
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure

NO_WEIGHTS = (
    "No Inception weights come with any package: features are of the pipeline's own ranker, and "
    "the distance is FD-ranker, not FID. With weights: dalle eval blur --extractor "
    "inception-torchvision --weights FILE."
)
SAME_MODEL = (
    "No DF-GAN here: the same model without its ranker stands in (--other gives a second pipeline)"
)
CHECKER = "The checker of shapes reads the facts of a caption back from the pixels. "
NO_COCO = "No MS-COCO, CUB or DF-GAN here: the held-out pictures of {name} stand in."


def _options(context: Context) -> dict[str, Any]:
    """Of every measure."""
    return {
        "weights": context.model,
        "seed": context.seed,
        "cache": context.cache,
        "device": context.device.type,
        "bootstrap": context.sizes.scores.bootstrap,
    }


def _folder(context: Context, name: str) -> Path:
    return make_folder(context.cache / "evaluate" / name, OWNER)


def _picture(context: Context, folder: Path, measure: str, name: str) -> str:
    """The diagram of a measure, beside index.html."""
    return context.save(name, read_bytes(folder / f"{measure}.png"))


def _part(pairs: Pairs, count: int) -> Pairs:
    """At most `count` pairs, evenly spaced."""
    return pairs if count >= len(pairs) else Subset(pairs, evenly_spaced(len(pairs), count))


def _no_ranker(context: Context, key: str, stated: Mapping[str, Any]) -> Figure | None:
    """What stands in place of a figure that needs features, for a pipeline without a ranker."""
    if context.pipeline.ranker is not None:
        return None
    return Figure(
        paper=stated,
        command=context.own_command(key),
        missing="The pipeline has no ranker: there is nothing that chooses among samples, and no "
        "network for features. dalle ranker train makes one, dalle pipeline make adds it.",
    )


def _titled(result: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    """The tables of a result, the first with a title of its own."""
    first, *rest = result["tables"]
    return [{**first, "title": title}, *rest]


def figure_7(context: Context) -> Figure:
    """Votes of an automatic judge between two models, beside the votes of people in the paper."""
    stated = {"majority": dict(paper.FIGURE_7_MAJORITY), "split": dict(paper.FIGURE_7_SPLIT)}
    lacking = _no_ranker(context, "figure_7", stated)
    if lacking is not None:
        return lacking
    made = context.drawing
    most, count = made.sizes[-1], len(set(made.captions))
    ours = made.set_of(most)
    theirs, opponent = made.set_of(1), "the same model without its ranker (its first sample)"
    stand_in = f"{SAME_MODEL}, so the votes say what the ranker buys, not which model is better"
    if context.given_other is not None:
        other = context.load("other", context.given_other)
        most_of_it = most if other.ranker is not None else 1
        theirs = context.draw(other, made.captions, [most_of_it]).set_of(most_of_it)
        opponent = f"{context.given_other.name}, best of {most_of_it}"
        stand_in = "No DF-GAN here: the second pipeline stands in"
    # The ranker has chosen our samples, so it judges only where there is no other judge.
    judges = ["checker", "ranker"] if scenes_of(made.captions) is not None else ["ranker"]
    results, tables, pictures = {}, [], []
    for judge in judges:
        folder = _folder(context, f"figure_7_{judge}")
        found = votes(ours, theirs, out=folder, judge=judge, **_options(context))
        results[judge] = found
        count = found["n"]["tasks"]
        tables += _titled(found, f"Judged by the {judge}, not by people: {count} captions")
        pictures.append(_picture(context, folder, "votes", f"figure_7_{judge}.png"))
    rows = {
        judge: {
            QUESTIONS[question]: {
                answer: {"share": one["share"], "interval": one["interval"]}
                for answer, one in counted["majority"].items()
            }
            for question, counted in found["questions"].items()
        }
        for judge, found in results.items()
    }
    return Figure(
        text=f"For the same captions: ours, the best of {most} by the ranker, against {opponent}. "
        "One automatic vote a caption on which picture matches it better, or neither; equal ones "
        "are a tie. Bars below in grey are the paper's, five people a caption. Black lines are "
        "95 % intervals (Wilson).",
        ours={"captions": count, "candidates": most, "theirs": opponent, "judges": rows},
        paper=stated,
        tables=tables,
        pictures=pictures,
        command=context.own_command("figure_7"),
        differs=f"{count} different captions of {context.set.name} in place of 1,000 of MS-COCO; "
        f"{opponent} in place of DF-GAN; one automatic vote in place of five people's. "
        + (CHECKER if "checker" in judges else "")
        + "The ranker judges samples that it chose itself, which favours them.",
        missing=f"{stand_in}. No people voted: dalle eval votes --serve asks them. So no votes on "
        "which picture is more realistic, where the paper has 90.0 % for DALL-E.",
    )


def figure_9(context: Context) -> Figure:
    """Distance and score against blur (a, b), and against the number of candidates (c)."""
    stated = {
        "a": {
            "radius": list(paper.RADII),
            "fid": _lists(paper.FIGURE_9A_FID),
            "is": _lists(paper.FIGURE_9A_IS),
        },
        "b": {
            "radius": list(paper.RADII),
            "fid": _lists(paper.FIGURE_9B_FID),
            "is": _lists(paper.FIGURE_9B_IS),
        },
        "c": {
            "candidates": list(paper.CANDIDATES),
            "fid": list(paper.FIGURE_9C_FID),
            "is": list(paper.FIGURE_9C_IS),
        },
    }
    lacking = _no_ranker(context, "figure_9", stated)
    if lacking is not None:
        return lacking
    sizes, made, options = context.sizes.scores, context.drawing, _options(context)
    real = _part(context.held_out, sizes.real)
    most = made.sizes[-1]
    folder = _folder(context, "figure_9a")
    first = blur(real, made.set_of(most), out=folder, **options)
    pictures = [_picture(context, folder, "blur", "figure_9a.png")]
    tables = _titled(first, "a: blur of both sides, held-out captions; the paper's MS-COCO")
    ours: dict[str, Any] = {"a": _points(first)}
    missing = [NO_WEIGHTS, NO_COCO.format(name=context.set.name)]
    if len(context.set.unseen) > 1:
        pairs = context.set.unseen[1]
        items = evenly_spaced(len(pairs), sizes.zero).tolist()
        zero = context.draw(
            context.pipeline, [pairs.captions[i] for i in items], [sizes.zero_candidates]
        )
        folder = _folder(context, "figure_9b")
        second = blur(
            _part(pairs, sizes.real),
            zero.set_of(sizes.zero_candidates),
            out=folder,
            beside="CUB",
            **options,
        )
        pictures.append(_picture(context, folder, "blur", "figure_9b.png"))
        title = "b: the same for facts that no training pair combines; the paper's curves are CUB's"
        tables += _titled(second, title)
        ours["b"] = _points(second)
        missing.append("b: CUB is a set far from the training pairs; zero-shot captions stand in.")
    else:
        missing.append(
            f"b: the set {context.set.name} has no second held-out part that could stand in for "
            "CUB."
        )
    folder = _folder(context, "figure_9c")
    third = rerank(
        Subset(context.held_out, context.held_out_items),
        context.pipeline,
        out=folder,
        num_candidates=most,
        draw_seed=context.seed,
        **options,
    )
    pictures.append(_picture(context, folder, "rerank", "figure_9c.png"))
    tables += _titled(third, f"c: the best of 1 to {most} of one drawing")
    ours["c"] = _points(third)
    ours["metrics"] = first["metrics"]
    few = len(made.captions)
    return Figure(
        text="Distance and score of the samples against held-out pictures. a and b: after a "
        "Gaussian blur of both sides. c: the best of n samples by the ranker, the first n of one "
        "drawing. Grey: the paper's curves, with an axis of "
        "their own; only the forms compare.",
        ours=ours,
        paper=stated,
        tables=tables,
        pictures=pictures,
        command=context.own_command("figure_9"),
        differs=f"{few} captions, best of {most}, in place of 30,000 captions, best of 512; "
        f"pictures of {context.side} pixels, of which a blur of radius 8 leaves little (paper: "
        f"256). {first['metrics']['distance']} and "
        f"{first['metrics']['score']} have another scale than FID and IS, and at {few} pictures a "
        "large bias. The ranker both chooses the samples and gives the features, which favours "
        "its choice.",
        missing=" ".join(missing),
    )


def _points(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the page's numbers need of a sweep."""
    names = ("radius", "candidates", "distance", "distance_interval", "score", "score_interval",
             "checker_share", "checker_interval")  # fmt: skip
    return [{n: point[n] for n in names if n in point} for point in result["points"]]


def _lists(curves: paper.Curves) -> dict[str, list[float]]:
    return {name: list(values) for name, values in curves.items()}


def overlap(context: Context) -> Figure:
    """Which held-out pictures have a near copy among the training pictures (3.2)."""
    stated = {"coco": 0.21, "cub": 0.12, "effect": "no significant change in results"}
    lacking = _no_ranker(context, "overlap", stated)
    if lacking is not None:
        return lacking
    sizes, folder = context.sizes.scores, _folder(context, "overlap")
    made = context.drawing
    threshold = 0.9
    found = measure_overlap(
        _part(context.held_out, sizes.real),
        made.set_of(made.sizes[-1]),
        seen=_part(context.train, sizes.seen),
        threshold=threshold,
        out=folder,
        radii=(0,),
        steps=sizes.steps,
        train_batch=sizes.batch,
        **_options(context),
    )
    point = found["points"][0] if found["points"] else {}
    rows = [
        ["share of held-out pictures with a copy", found["share"], "0.21 (MS-COCO), 0.12 (CUB)"],
        [f"{found['metric']}, all", point.get("distance"), "28.4 (FID)"],
        [f"{found['metric']}, without copies", point.get("without"), "27.5 (FID)"],
    ]
    heads = ["", "ours", "paper"]
    pictures = [
        _picture(context, folder, "overlap", "overlap.png"),
        context.save("overlap_sheet.png", read_bytes(folder / "overlap-sheet.png")),
    ]
    return Figure(
        text="For each held-out picture the nearest training picture, by a detector that learned "
        "to match a picture with its own transformed copy. The sheet has the closest pairs.",
        ours={
            "share": found["share"],
            "threshold": threshold,
            "real": found["n"]["real"],
            "seen": found["n"]["seen"],
            "metric": found["metric"],
            "distance": point.get("distance"),
            "without": point.get("without"),
        },
        paper=stated,
        tables=[{"title": "", "columns": heads, "rows": rows}],
        pictures=pictures,
        command=context.own_command("overlap"),
        differs=f"{found['n']['seen']} training pictures are searched for copies of "
        f"{found['n']['real']}; a small detector, {sizes.steps} updates of {sizes.batch}, in place "
        "of a ResNet-50 trained on 30 million pictures; the threshold of "
        f"{threshold:g} is fixed and not chosen by eye. A set whose pictures differ in little more "
        "than place and colour, as shapes, overlaps with itself at any threshold.",
        missing=f"{NO_COCO.format(name=context.set.name)} {NO_WEIGHTS}",
    )
