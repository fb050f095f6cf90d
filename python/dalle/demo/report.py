"""The page the demo leaves: index.html, pictures and summary.json; nothing from the network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from dalle.configs import to_dict
from dalle.console import duration
from dalle.demo import tiles
from dalle.demo.context import Demo
from dalle.demo.tiles import contact, group, load_sheet, tile
from dalle.demo.verdict import prior_losses, verdict
from dalle.demo.workspace import STAGES, Workspace
from dalle.files import to_json
from dalle.pictures import save_bytes
from dalle.version import __version__

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { image-rendering: pixelated; max-width: 100%; border: 1px solid #ddd; }
img.plot { image-rendering: auto; border: 0; }
.plots { display: grid; gap: 0 2rem; align-items: start;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.plots figure:last-child { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
.note { background: #fff6dd; padding: .5rem 1rem; }
"""
KEYS = {
    "held_out_at_1": "held-out captions whose best of 8 is nearest to its own true picture",
    "held_out_at_5": "... or has it among the nearest five",
    "held_out_at_1_single": "the same for one sample, without reranking",
    "held_out_at_5_single": "... among the nearest five",
    "held_out_at_1_oracle": "the same if the ranker always chose a right sample",
    "psnr": "dB, reconstructions of unseen pictures",
    "train_at_1": "captions of the training whose best of 8 is nearest to a right true picture",
    "train_at_1_single": "... for one sample, without reranking",
    "ranker_accuracy": "held-out captions that find their own picture among the held-out ones",
    "prior_loss": "nats a token, the prior on held-out pairs",
    "codes_used": "codes that occur in the training pictures",
    "code_share": "... as a share of the codebook",
    "psnr_train": "dB, reconstructions of training pictures",
    "reconstruction": "reconstructions of unseen pictures with every fact right",
    "reconstruction_of_true_pictures": "true pictures the checker reads right",
    "one_object_single": "zero-shot captions of one object: a sample is right in every fact",
    "one_object_best_of_8": "... the best of 8 is",
    "relation_single": "unseen captions of two objects: a sample is right in every fact",
    "relation_best_of_8": "... the best of 8 is",
    "relation_zero_best_of_8": "... with a colour and shape never seen together",
    "seconds": "in all, on the wall clock",
    "seconds_predicted": "... as foretold from the machine's pace before it began",
}


def write_report(demo: Demo, *, complete: bool) -> dict[str, Any]:
    """Writes summary.json and index.html from whatever files there are.

    Returns:
        What summary.json holds: the scores, `headline` (those that count most), `verdict`
        (sentences), `seconds`, `complete`, timings, options and recipe.
    """
    space, recipe = demo.space, demo.recipe
    scores = space.read_scores()
    timings = space.timings()
    summary: dict[str, Any] = {
        **scores,
        "headline": {key: scores[key] for key in demo.data.headline if key in scores},
        "verdict": verdict(scores, prior_losses(space), demo.data.train.name) if complete else [],
        "seconds": round(sum(entry["seconds"] for entry in timings.values()), 1),
        "seconds_predicted": round(sum(recipe.seconds.values()), 1),
        "cpu_seconds": round(sum(entry["cpu_seconds"] for entry in timings.values()), 1),
        "complete": complete,
        "timings": timings,
        "options": {**space.options, "seed": space.seed},
        "recipe": to_dict(recipe),
        "dalle_version": __version__,
    }
    save_bytes(space.out / "summary.json", to_json(summary))
    save_bytes(space.out / "index.html", page(demo, summary).encode("utf-8", "backslashreplace"))
    return summary


def page(demo: Demo, summary: dict[str, Any]) -> str:
    """The HTML of the report."""
    space = demo.space
    title = f"dalle {space.command}: {demo.data.name}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if not summary["complete"]:
        parts.append(
            "<p class=note>Stopped before the end; this page shows what there is. "
            "The same command goes on.</p>"
        )
    parts.append(_verdict(summary["verdict"]))
    size = summary["recipe"]["image_size"]
    strips = space.read(space.work / "strips.json").get("strips", [])
    parts += [
        _contact(space, summary, strips, size),
        _numbers(summary),
        _strips(space, strips, size),
    ]
    parts.append(_reconstructions(space, size))
    plots = {
        "pictures/best-of-n.png": "Choosing among N samples (the paper's figures 6 and 9c in "
        "small). Dotted: a ranker that never errs.",
        "pictures/codes.png": "How often each code of the codebook is used.",
        "pictures/losses.png": "Training.",
    }
    drawn = "".join(_figure(space, *plot, plot=True) for plot in plots.items())
    parts.append(f"<h2>Curves</h2><div class=plots>{drawn}</div>" if drawn else "")
    parts.append(_fact_tables(summary))
    if not summary["complete"]:
        parts += [_figure(space, name, f"Latest picture of {name}.") for name in _latest(space)]
    parts.append(_training(space, size))
    parts.append(_timings(summary))
    parts.append(f"<p>{escape(demo.data.credit)}</p>" if demo.data.credit else "")
    body = "\n".join(part for part in parts if part)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}{tiles.STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _verdict(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}" for sentence in sentences)
    return f"<h2>In words</h2><ul class=verdict>{items}</ul>" if items else ""


def _numbers(summary: dict[str, Any]) -> str:
    rows = [
        f"<tr><td class=number>{_number(summary[key])}<td>{escape(key)}<td>{escape(text)}"
        for key, text in KEYS.items()
        if key in summary
    ]
    return "<div class=scroll><table>\n" + "\n".join(rows) + "\n</table></div>"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _contact(
    space: Workspace, summary: dict[str, Any], strips: list[dict[str, Any]], size: int
) -> str:
    """The contact sheet: of each caption the true picture, where there is one, and the best."""
    sheet = load_sheet(space.out, "pictures/strips.png", size)
    if sheet is None or len(strips) != sheet.rows:
        return ""
    true = int(strips[0]["below"][0] == "true")
    groups = [
        group([tile(sheet, row, x, _alt_text(strip, x)) for x in range(true + 1)], strip["caption"])
        for row, strip in enumerate(strips)
    ]
    first = "Left the true picture, right what" if true else "What"
    head = (
        f"<p>{first} the model drew for a caption that no training pair contained: the best of "
        f'{summary["recipe"]["num_samples"]} by the ranker (<a href="pictures/samples.png">as one '
        "picture</a>).</p>"
    )
    return head + contact(groups, true + 1)


def _strips(space: Workspace, strips: list[dict[str, Any]], size: int) -> str:
    sheet = load_sheet(space.out, "pictures/strips.png", size)
    if sheet is None or len(strips) != sheet.rows:
        return ""
    groups = [
        group(
            [
                tile(sheet, row, x, _alt_text(strip, x), below)
                for x, below in enumerate(strip["below"])
            ],
            f"{strip['caption']} ({strip['split']})",
        )
        for row, strip in enumerate(strips)
    ]
    first = "true picture, then " if strips[0]["below"][0] == "true" else ""
    head = (
        "<h2>Captions no training pair contained</h2>"
        f"<p>Each: {first}samples with the ranker's scores, best first.</p>"
    )
    return head + contact(groups, 4)


def _alt_text(strip: dict[str, Any], column: int) -> str:
    label = strip["below"][column]
    return f"{strip['caption']}: {'true picture' if label == 'true' else 'drawn, ' + label}"


def _reconstructions(space: Workspace, size: int) -> str:
    sheet = load_sheet(space.out, "pictures/reconstructions.png", size)
    if sheet is None:
        return ""
    groups = [
        group([tile(sheet, row, x, words) for x, words in enumerate(("true", "given back"))], "")
        for row in range(sheet.rows)
    ]
    head = (
        "<h2>Reconstructions</h2><p>Unseen pictures, each with what the discrete VAE gives back of "
        "it to its right.</p>"
    )
    return head + contact(groups, 2)


def _training(space: Workspace, size: int) -> str:
    sheet = load_sheet(space.out, "pictures/training.png", size)
    captions = space.read(space.work / "training.json").get("captions", [])
    if sheet is None or len(captions) != sheet.rows:
        return ""
    groups = [group([tile(sheet, row, 0, words)], words) for row, words in enumerate(captions)]
    return "<h2>Some of the training pairs</h2>" + contact(groups, 1)


def _figure(space: Workspace, name: str, caption: str, *, plot: bool = False) -> str:
    if not (space.out / name).exists():
        return ""
    kind = " class=plot" if plot else ""
    words = escape(caption)
    return (
        f'<figure><img{kind} src="{escape(name)}" alt="{words}"><figcaption>{words}</figcaption>'
        "</figure>"
    )


def _latest(space: Workspace) -> list[str]:
    """The newest picture of each training stage, relative to the page."""
    latest = []
    for stage in ("dvae", "ranker", "prior"):
        drawn = sorted((space.folder(stage) / "pictures").glob("*.png"), key=_age)
        latest += [path.relative_to(space.out).as_posix() for path in drawn[-1:]]
    return latest


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _fact_tables(summary: dict[str, Any]) -> str:
    table = summary.get("table")
    if not table:
        return ""
    facts = list(dict.fromkeys(fact for shares in table.values() for fact in shares["single"]))
    head = "".join(f"<th>{escape(fact)}" for fact in facts)
    rows = []
    for name, shares in table.items():
        for which, text in (("single", "one sample"), ("best", "best by the ranker")):
            cells = "".join(
                f"<td class=number>{shares[which][fact]:.2f}" if fact in shares[which] else "<td>"
                for fact in facts
            )
            count = shares["captions"]
            rows.append(f"<tr><td>{escape(name)}<td>{text}<td class=number>{count}{cells}")
    return (
        "<h2>Facts, as the checker reads them</h2><div class=scroll><table>"
        "<tr><th>captions<th><th>number"
        f"{head}\n" + "\n".join(rows) + "</table></div>"
    )


def _timings(summary: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{stage}<td class=number>{duration(entry['seconds'])}"
        f"<td class=number>{entry['cpu_seconds']:.0f} s"
        for stage in STAGES
        if (entry := summary["timings"].get(stage))
    ]
    return "<h2>Time</h2><table><tr><th>stage<th>wall clock<th>CPU\n" + "\n".join(rows) + "</table>"
