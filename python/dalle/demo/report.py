"""The page the demo leaves: index.html, pictures and summary.json; nothing from the network."""

from __future__ import annotations

import re
import shlex
from html import escape
from pathlib import Path
from typing import Any

from dalle.configs import to_dict
from dalle.console import duration
from dalle.demo.context import Demo
from dalle.demo.sets import DataSet
from dalle.demo.tiles import load_sheet, tile
from dalle.demo.verdict import prior_losses, verdict
from dalle.demo.workspace import STAGES, Workspace
from dalle.files import to_json
from dalle.pages import REPORT_STYLE, command, contact, figure, group, html_page
from dalle.pictures import save_bytes
from dalle.version import __version__

KEYS = {  # key of summary.json -> unit, and what it says without the lines around it
    "held_out_at_1": ("", "of held-out captions have the best of 8 nearest to their own picture"),
    "held_out_at_5": ("", "of held-out captions have their own among its five nearest pictures"),
    "held_out_at_1_single": ("", "nearest to its own, for one sample without reranking"),
    "held_out_at_5_single": ("", "among the nearest five, for one sample without reranking"),
    "held_out_at_1_oracle": ("", "nearest to its own, if the ranker always chose a right sample"),
    "psnr": ("dB", "PSNR of reconstructions of unseen pictures"),
    "train_at_1": ("", "of training captions have the best of 8 nearest to a right picture"),
    "train_at_1_single": ("", "of training captions, for one sample without reranking"),
    "ranker_accuracy": (
        "",
        "of held-out captions find their own of all held-out pictures (ranker)",
    ),
    "prior_loss": ("nats", "a token, loss of the prior on held-out pairs"),
    "codes_used": ("codes", "occur in the training pictures"),
    "code_share": ("", "of the codebook occurs in the training pictures"),
    "psnr_train": ("dB", "PSNR of reconstructions of training pictures"),
    "reconstruction": ("", "of reconstructions of unseen pictures show every fact right"),
    "reconstruction_of_true_pictures": ("", "of true pictures the checker reads right"),
    "one_object_single": ("", "right in every fact: one sample, one object, zero-shot captions"),
    "one_object_best_of_8": ("", "right in every fact: best of 8, one object, zero-shot captions"),
    "relation_single": ("", "right in every fact: one sample, two objects, unseen captions"),
    "relation_best_of_8": ("", "right in every fact: best of 8, two objects, unseen captions"),
    "relation_zero_best_of_8": ("", "right in every fact: best of 8, two objects, zero-shot"),
    "seconds": ("s", "in all, on the wall clock"),
    "seconds_predicted": ("s", "in all, as predicted from the machine's pace before it began"),
}
SPLITS = {
    "train": "training captions",
    "test": "unseen captions",
    "zero": "zero-shot captions (colour and shape never seen together)",
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
        "verdict": verdict(
            scores,
            prior_losses(space),
            demo.data.name,
            space.command,
            own_dvae=demo.data.vae is None,
        )
        if complete
        else [],
        "seconds": round(sum(entry["seconds"] for entry in timings.values()), 1),
        "seconds_predicted": round(sum(recipe.seconds.values()), 1),
        "cpu_seconds": round(sum(entry["cpu_seconds"] for entry in timings.values()), 1),
        "note": demo.data.note,
        "complete": complete,
        "timings": timings,
        "command": space.command,
        "options": {**space.options, "seed": space.seed},
        "recipe": to_dict(recipe),
        "dalle_version": __version__,
    }
    save_bytes(space.out / "summary.json", to_json(summary))
    save_bytes(space.out / "index.html", page(demo, summary))
    return summary


def page(demo: Demo, summary: dict[str, Any]) -> bytes:
    """The HTML of the report."""
    space, parts = demo.space, []
    if not summary["complete"]:
        parts.append(
            "<p class=note>Stopped before the end; this page shows what there is. "
            "The same command goes on.</p>"
        )
    parts.append(f"<p class=note>{escape(demo.data.note)}</p>" if demo.data.note else "")
    parts.append(_verdict(summary["verdict"]))
    size = summary["recipe"]["image_size"]
    strips = space.read(space.work / "strips.json").get("strips", [])
    parts += [
        _contact(demo, summary, strips, size),
        _draw_your_own(space, strips),
        _numbers(summary),
        _strips(demo, strips, size),
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
    return html_page(f"dalle {space.command}: {demo.data.name}", parts, REPORT_STYLE)


def _draw_your_own(space: Workspace, strips: list[dict[str, Any]]) -> str:
    """The command that draws from the trained pipeline, whole, to be copied."""
    if not (space.pipeline / "config.json").exists():
        return ""
    caption = strips[0]["caption"] if strips else "A CAPTION"
    model = space.pipeline.absolute()
    words = ["dalle", "sample", caption, "--model", str(model)]
    return "<h2>Draw your own</h2>" + command(shlex.join(words))


def _verdict(sentences: list[str]) -> str:
    options = re.compile(r"--[\w-]+(?: (?:hour|\d+))?")  # kept on one line
    texts = [options.sub(r"<code>\g<0></code>", escape(sentence)) for sentence in sentences]
    items = "".join(f"<li>{text}" for text in texts)
    return f"<h2>In words</h2><ul class=verdict>{items}</ul>" if items else ""


def _numbers(summary: dict[str, Any]) -> str:
    """A row a number: how much, of what in words, and its key in summary.json."""
    rows = [
        f"<tr><td class=number>{_number(summary[key], unit)}"
        f"<td>{escape(_of(words, summary))} <code>{escape(key)}</code>"
        for key, (unit, words) in KEYS.items()
        if key in summary
    ]
    return "<h2>In numbers</h2><table>\n" + "\n".join(rows) + "\n</table>" if rows else ""


def in_words(summary: dict[str, Any], key: str) -> str:
    """A score as a line of text: how much, and of what."""
    unit, words = KEYS[key]
    number = _number(summary[key], unit).replace("&nbsp;", " ")
    return f"{number} {_of(words, summary)}"


def _of(words: str, summary: dict[str, Any]) -> str:
    return words.replace("best of 8", f"best of {summary['recipe']['num_samples']}")


def _number(value: float, unit: str) -> str:
    """A share as per cent, a count whole, all else with four digits."""
    if not unit:
        return f"{100 * value:.1f}&nbsp;%"
    return f"{value if isinstance(value, int) else format(value, '.4g')}&nbsp;{unit}"


KNOWN, NEW = "Captions of the training", "Captions no training pair contained"


def _parts(strips: list[dict[str, Any]]) -> list[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """(heading, rows of the sheet with their strips), new captions first."""
    rows = list(enumerate(strips))
    parts = [(NEW, [r for r in rows if r[1]["split"] != "train"])]
    parts.append((KNOWN, [r for r in rows if r[1]["split"] == "train"]))
    return [part for part in parts if part[1]]


def _contact(demo: Demo, summary: dict[str, Any], strips: list[dict[str, Any]], size: int) -> str:
    """The contact sheet: of each caption the true picture, where there is one, and the best."""
    sheet = load_sheet(demo.space.out, "pictures/strips.png", size)
    if sheet is None or len(strips) != sheet.rows:
        return ""
    data = demo.data
    true = int(strips[0]["below"][0] == data.true)
    first = f"Left {data.true_words}, right what" if true else "What"
    html = (
        f"<p>{first} the model drew: the best of {summary['recipe']['num_samples']} by the ranker "
        '(<a href="pictures/samples.png">as one picture</a>).</p>'
    )
    for heading, rows in _parts(strips):
        groups = [
            group([tile(sheet, y, x, _alt_text(data, s, x)) for x in range(true + 1)], s["caption"])
            for y, s in rows
        ]
        html += f"<h2>{heading}</h2>" + contact(groups, true + 1)
    return html


def _strips(demo: Demo, strips: list[dict[str, Any]], size: int) -> str:
    sheet = load_sheet(demo.space.out, "pictures/strips.png", size)
    if sheet is None or len(strips) != sheet.rows:
        return ""
    data = demo.data
    first = f"{data.true_words}, then " if strips[0]["below"][0] == data.true else ""
    html = f"<h2>Every sample</h2><p>Each: {first}samples with the ranker's scores, best first.</p>"
    for _, rows in _parts(strips):
        groups = [
            group(
                [tile(sheet, y, x, _alt_text(data, s, x), b) for x, b in enumerate(s["below"])],
                f"{s['caption']} ({s['split']})",
            )
            for y, s in rows
        ]
        html += contact(groups, 4)
    return html


def _alt_text(data: DataSet, strip: dict[str, Any], column: int) -> str:
    label = strip["below"][column]
    return f"{strip['caption']}: {data.true_words if label == data.true else 'drawn, ' + label}"


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
    return figure(name, caption, plot=plot) if (space.out / name).exists() else ""


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
    tables = []
    for name, shares in table.items():
        split, _, kind = name.partition("/")
        title = f"{shares['captions']} {SPLITS.get(split, split)}, {kind.replace('_', ' ')}"
        rows = [
            f"<tr><td>{escape(fact.replace('_', ' '))}<td class=number>{_number(share, '')}"
            f"<td class=number>{_number(shares['best'][fact], '')}"
            for fact, share in shares["single"].items()
        ]
        head = "<tr><th>right<th class=number>one sample<th class=number>best by the ranker\n"
        tables.append(
            f"<table><caption>{escape(title)}</caption>{head}" + "\n".join(rows) + "</table>"
        )
    return (
        "<h2>Facts, as the checker reads them</h2><div class=facts>\n"
        + "\n".join(tables)
        + "\n</div>"
    )


def _timings(summary: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{stage}<td class=number>{duration(entry['seconds'])}"
        f"<td class=number>{entry['cpu_seconds']:.0f} s"
        for stage in STAGES
        if (entry := summary["timings"].get(stage))
    ]
    return "<h2>Time</h2><table><tr><th>stage<th>wall clock<th>CPU\n" + "\n".join(rows) + "</table>"
