"""The figures of pictures: 1, 2, 3, 6, 8, 10, 11, 13 and 14."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import dalle_ext
from dalle.data.augment import to_tensor
from dalle.data.pairs import evenly_spaced
from dalle.data.shapes import parse
from dalle.data.shapes_check import MIN_SIDE, check_batch
from dalle.evaluate.drawings import Drawn
from dalle.evaluate.results import pyplot, table, with_numbers
from dalle.evaluate.sweeps import for_checker, scenes_of
from dalle.pipeline import Pipeline
from dalle.prior.config import PAD
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure

TOP = 15 / 32  # of the rows that a photo gives in image-to-image
PROMPTS = (  # of Figure 14
    "the exact same cat on the top as a sketch on the bottom",
    "the exact same photo on the top reflected upside-down on the bottom",
    "2 panel image of the exact same cat. on the top, a photo of the cat. on the bottom, an "
    "extreme close-up view of the cat in the photo.",
    "the exact same cat on the top colored red on the bottom",
    "2 panel image of the exact same cat. on the top, a photo of the cat. on the bottom, the cat "
    "with sunglasses.",
    "the exact same cat on the top as a postage stamp on the bottom",
)


@torch.no_grad()
def figure_1(context: Context) -> Figure:
    """Held-out pictures, and what the dVAE gives back."""
    count = context.sizes.shown
    items = evenly_spaced(len(context.held_out), count).tolist()
    images = context.pictures(context.held_out, items)
    vae = context.pipeline.vae
    back = vae.decode(vae.encode(images.to(context.device))).cpu().clamp(0, 1)
    error = (images - back).square().mean()
    psnr = float(-10 * error.log10())
    codes = vae.num_tokens
    labels = [[f"original {i + 1}" for i in range(len(images))], ["reconstruction"] * len(images)]
    sheet = context.sheet("figure_1.png", torch.stack([images, back]), ["", ""], labels)
    grid = vae.grid(context.side)
    shrinks = 3 * context.side**2 / (grid[0] * grid[1])
    return Figure(
        text="Above held-out pictures, below what the discrete VAE gives back from their codes.",
        ours={"psnr": psnr, "codes": codes, "grid": list(grid), "context_shrinks": shrinks},
        paper={"codes": 8192, "grid": [32, 32], "context_shrinks": 192},
        tables=[
            table(
                ["", "ours", "paper"],
                [
                    ["PSNR, dB", psnr, "not given"],
                    ["codes in the codebook", codes, 8192],
                    ["grid of codes", f"{grid[0]} x {grid[1]}", "32 x 32"],
                    ["values a picture / codes", shrinks, 192],
                ],
            )
        ],
        pictures=[sheet["file"]],
        sheets=[sheet],
        command=context.own_command("figure_1"),
        differs=f"Pictures of {context.side} pixels in place of 256, {codes} codes.",
    )


def _sheet(context: Context, name: str, made: Drawn, labels: Sequence[str]) -> dict[str, Any]:
    """A row of the pictures of each caption."""
    images = torch.stack([to_tensor(row) for row in made.images])
    return context.sheet(name, images, made.captions, [list(labels)] * len(made.captions))


def _right(made: Drawn, column: int) -> float | None:
    """The share of pictures with every fact right, where the checker of shapes reads them."""
    scenes = scenes_of(made.captions)
    if scenes is None or made.images.shape[2] < MIN_SIDE:
        return None
    found = check_batch(for_checker(made.images[:, column]), scenes)
    return sum(report.all_right for report in found) / len(scenes)


def _drawn(
    context: Context, pipeline: Pipeline, file: str, captions: Sequence[str]
) -> tuple[dict[str, Any], dict[str, float], int]:
    """The best of 1, 4 and 16 samples of each caption: sheet, shares that are right, the most."""
    most = min(16, context.sizes.candidates) if pipeline.ranker is not None else 1
    sizes = sorted({1, max(1, most // 4), most})
    made = context.draw(pipeline, list(captions), sizes)
    sheet = _sheet(context, file, made, [f"best of {size}" for size in sizes])
    shares = {f"best of {size}": _right(made, i) for i, size in enumerate(sizes)}
    return sheet, {name: share for name, share in shares.items() if share is not None}, most


PAPER_SAMPLES = {"candidates": 512, "shows": "samples chosen from 512 by the contrastive model"}


def figure_2(context: Context) -> Figure:
    """Composition of concepts that training pairs show apart, and variable binding on shapes."""
    pairs, pipeline = context.set.unseen[-1], context.pipeline
    items = evenly_spaced(len(pairs), context.sizes.shown).tolist()
    captions = [pairs.captions[i] for i in items]
    first, right, most = _drawn(context, pipeline, "figure_2.png", captions)
    unseen = context.shapes_set().unseen[-1].captions  # colour and shape never seen together
    related = [c for c in dict.fromkeys(unseen) if (scene := parse(c)) and scene.relation]
    binding = [related[i] for i in evenly_spaced(len(related), context.sizes.shown)]
    second, bound, _ = _drawn(context, context.shapes, "figure_2_binding.png", binding)
    rows = [["composition", name, share] for name, share in right.items()]
    rows += [["variable binding", name, share] for name, share in bound.items()]
    own = context.shapes is pipeline
    where = "by the same model" if own else "by a pipeline trained on shapes"
    if context.shapes_folder == context.trained_shapes:
        where += f" here in {context.trained_minutes:.1f} minutes"
    return Figure(
        text="First composition: captions whose combinations no training pair shows. Then "
        f"variable binding, {where}: of two objects each has to get its own colour, and one colour "
        "and shape stand together in no training pair. The checker of shapes reads the facts back "
        "from the pixels.",
        ours={"captions": captions, "share_right": right, "binding_captions": binding,
              "binding_share_right": bound, "candidates": most},
        paper=PAPER_SAMPLES,
        tables=[table(["", "", "every fact right"], rows)] if rows else [],
        pictures=[first["file"], second["file"]],
        sheets=[first, second],
        command=context.own_command("figure_2"),
        differs=f"Captions of {context.set.name} and of shapes in place of a tapir made of "
        "accordion and a hedgehog that walks a dog; the paper's figure does not give its "
        "temperature.",
        missing="The paper's captions need its training set: unseen combinations stand in. "
        "Rendered text (the neon sign) has no stand-in.",
    )  # fmt: skip


def figure_3(context: Context) -> Figure:
    """Samples for captions of the held-out part."""
    captions = context.captions[: context.sizes.shown]
    sheet, right, most = _drawn(context, context.pipeline, "figure_3.png", captions)
    return Figure(
        text="Samples for held-out captions.",
        ours={"captions": captions, "share_right": right, "candidates": most},
        paper=PAPER_SAMPLES,
        tables=[table(["", "every fact right"], [[n, s] for n, s in right.items()])]
        if right
        else [table(["", "ours", "paper"], [["samples of a caption", most, 512]])],
        pictures=[sheet["file"]],
        sheets=[sheet],
        command=context.own_command("figure_3"),
        differs=f"Held-out captions of {context.set.name} in place of MS-COCO's.",
        missing="No MS-COCO here: the set's own held-out captions stand in.",
    )


def figure_6(context: Context) -> Figure:
    """The best of more and more samples of one drawing."""
    made = context.best_drawing
    labels = [f"best of {size}" for size in made.sizes]
    sheet = _sheet(context, "figure_6.png", made, labels)
    scores = made.scores.mean(0).tolist()
    shares = [_right(made, i) for i in range(len(labels))]
    # Without a ranker there are no scores, and some pictures have no facts to check.
    columns = with_numbers({"mean score of the ranker": scores, "every fact right": shares})
    rows = list(zip(labels, *columns.values(), strict=True))
    return Figure(
        text="The best by the ranker of the first 1, 8, 64 and 512 samples of one drawing.",
        ours={"candidates": made.sizes, "ranker_score": scores},
        paper={"candidates": [1, 8, 64, 512]},
        tables=[table(["", *columns], rows)] if columns else [],
        pictures=[sheet["file"]],
        sheets=[sheet],
        command=context.own_command("figure_6"),
        differs=f"{len(made.captions)} captions of {context.set.name}; the ranker is ours, not "
        "CLIP.",
        missing="" if len(made.sizes) == 4 else "Without a ranker nothing chooses.",
    )


def figure_8(context: Context) -> Figure:
    """Two models beside each other for the same captions."""
    captions = context.captions[: context.sizes.shown]
    made = context.drawing
    ours = torch.stack([to_tensor(row[-1:]) for row in made.images[: len(captions)]])
    count = made.sizes[-1]
    if context.given_other is not None:
        model = context.load("other", context.given_other)
        most = count if model.ranker is not None else 1
        theirs = context.draw(model, captions, [most]).images[:, 0]
        label, stand_in = f"{context.given_other.name}, best of {most}", "the second pipeline"
    elif context.pipeline.ranker is not None:
        theirs = made.images[: len(captions), 0]
        label = "same model without its ranker: its first sample"
        stand_in = "the same model without its ranker"
    else:
        theirs = context.draw(context.pipeline, captions, [1], (context.seed + 1) % 2**63).images[
            :, 0
        ]
        label, stand_in = "same model, another sample", "another sample of the same model"
    missing = f"AttnGAN, DM-GAN and DF-GAN are not here: {stand_in} stands in"
    if context.given_other is None:
        missing += ", so the columns are not of two models; --other gives a second pipeline"
    right = to_tensor(list(theirs))
    if right.shape[-1] != ours.shape[-1]:
        right = torch.nn.functional.interpolate(right, ours.shape[-2:])
    images = torch.cat([ours, right[:, None]], 1)
    labels = [[f"ours, best of {count}", label.split(": ")[-1]]] * len(captions)
    sheet = context.sheet("figure_8.png", images, captions, labels)
    return Figure(
        text=f"For each caption left ours, the best of {count}; right: {label}.",
        ours={"captions": captions, "other": label},
        paper={"other": "AttnGAN, DM-GAN, DF-GAN", "captions": "of MS-COCO"},
        tables=[
            table(
                ["", "ours", "paper"],
                [
                    ["the other model", label, "AttnGAN, DM-GAN, DF-GAN"],
                    ["captions", f"of {context.set.name}", "of MS-COCO"],
                ],
            )
        ],
        pictures=[sheet["file"]],
        sheets=[sheet],
        command=context.own_command("figure_8"),
        differs="Captions of the pipeline's set; one opponent.",
        missing=f"{missing}.",
    )


def figure_10(context: Context) -> Figure:
    """The stream of a real caption: which embeddings are summed at each position."""
    prior, tokenizer = context.pipeline.prior.config, context.pipeline.tokenizer
    caption = context.captions[0]
    ids = tokenizer.encode([caption], prior.text_len - 1)[0]
    words = [tokenizer.decode([i]).strip() or "?" for i in ids[ids != PAD].tolist()]
    rows: list[list[Any]] = [[0, "start of text", 0, "", ""]]
    for slot in range(1, prior.text_len):
        real = slot <= len(words)
        rows.append(
            [slot, words[slot - 1] if real else f"padding {slot}", slot if real else "none", "", ""]
        )
    for place in range(min(prior.grid[1] + 2, prior.num_image_tokens)):
        token = "start of image" if place == 0 else f"code {place - 1}"
        row, column = divmod(place, prior.grid[1])
        rows.append([prior.text_len + place, token, "", row, column])
    heads = ["state", "token", "text position", "row", "column"]
    stream = _stream(context, len(words))
    return Figure(
        text=f'The input states of the prior for "{caption}", up to the second row of codes. '
        "Padding has an embedding of its own for each position, and no text position. Row and "
        "column are those of the code that a state predicts.",
        ours={"caption": caption, "words": words, "text_len": prior.text_len,
              "length": prior.length},
        paper={"text_len": 256, "length": 1280, "drawn_text_slots": 6},
        tables=[table(heads, rows)],
        pictures=[context.plot("figure_10.png", stream)],
        command=context.own_command("figure_10"),
        differs=f"{prior.text_len} text positions in place of 256, a grid of {prior.grid[0]} x "
        f"{prior.grid[1]} in place of 32 x 32. The paper draws six text slots and does not say "
        "how paddings are numbered: here by position.",
    )  # fmt: skip


def _stream(context: Context, words: int) -> Any:
    """A diagram of the whole stream: its kinds of states, and the embeddings that each sums."""
    prior = context.pipeline.prior.config
    text, (height, width) = prior.text_len, prior.grid
    parts = [  # first state, states, name, colour
        (0, 1, "start of text", "C3"),
        (1, words, "text", "C0"),
        (1 + words, text - 1 - words, "padding", "0.8"),
        (text, 1, "start of image", "C3"),
        (text + 1, height * width - 1, "codes", "C1"),
    ]
    figure, axis = pyplot(OWNER).subplots(figsize=(10, 2.6), layout="constrained")
    for first, count, name, colour in parts:
        if count > 0:
            label = name if name not in axis.get_legend_handles_labels()[1] else None
            axis.broken_barh([(first, count)], (3.05, 0.9), color=colour, label=label)
    axis.broken_barh([(0, 1 + words)], (2.05, 0.9), color="C0", alpha=0.6)
    for row in range(height):
        first = text + row * width
        axis.broken_barh([(first, width)], (1.05, 0.9), color=("C1", "C4")[row % 2], alpha=0.7)
        for column in range(width):
            axis.broken_barh([(first + column, 1)], (0.05, 0.9), color="C2",
                             alpha=0.15 + 0.7 * column / width)  # fmt: skip
    axis.set_yticks([3.5, 2.5, 1.5, 0.5], ["token", "text position", "row", "column"])
    axis.set(xlabel="state", xlim=(0, prior.length), ylim=(0, 4))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize=8, frameon=False)
    return figure


def figure_11(context: Context) -> Figure:
    """The attention masks at the figure's own size."""
    shape: dict[str, Any] = {"text_len": 6, "grid": (4, 4), "kernel_size": 3}
    kinds = {"row": "a: row", "column": "b: column", "conv": "d: convolution, 3 x 3"}
    patterns = {kind: dalle_ext.AttentionPattern(kind, **shape) for kind in kinds}
    plt = pyplot(OWNER)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    masks = {kind: pattern.mask() for kind, pattern in patterns.items()}
    number = torch.arange(22, dtype=torch.int64, device="cpu")
    order = torch.cat([number[:6], number[6:].view(4, 4).t().flatten()])
    shown = [
        (kinds["row"], masks["row"]),
        (kinds["column"], masks["column"]),
        ("c: column, transposed layout", masks["column"][order][:, order]),
        (kinds["conv"], masks["conv"]),
    ]
    for axis, (title, mask) in zip(axes, shown, strict=True):
        axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4)
        axis.set(title=title, xlabel="key", ylabel="query")
        axis.set_xticks([5.5]), axis.set_yticks([5.5])
        axis.set_xticklabels([""]), axis.set_yticklabels([""])
        axis.grid(color="0.4", lw=0.5)
    offsets = {kind: list(pattern.offsets) for kind, pattern in patterns.items()}
    stated = {"row": [0, 1, 2, 3, 4], "column": [0, 4, 8, 12], "conv": [0, 1, 3, 4, 5, 7]}
    rows = [[kinds[kind], str(offsets[kind]), str(stated[kind])] for kind in kinds]
    return Figure(
        text="Six text positions and a grid of 4 x 4, as in the paper. Blue: the query of that "
        "row attends to the key of that column.",
        ours={"offsets": offsets, "same": offsets == stated},
        paper={"offsets": stated},
        tables=[table(["mask", "distances between image positions, ours", "paper"], rows)],
        pictures=[context.plot("figure_11.png", figure)],
        command=context.own_command("figure_11"),
        differs="Nothing: the masks are the paper's, cell by cell.",
    )


def _completed(
    context: Context, key: str, captions: Sequence[str], images: torch.Tensor, text: str,
    differs: str, missing: str,
) -> Figure:  # fmt: skip
    """The upper rows of pictures are kept, the model draws the rest."""
    pipeline = context.pipeline
    rows = max(1, round(TOP * pipeline.prior.config.grid[0]))
    candidates = min(16, context.sizes.candidates) if pipeline.ranker is not None else 1
    made = []
    for caption, image in zip(captions, images, strict=True):
        found = pipeline.generate(
            caption,
            num_candidates=candidates,
            top=min(3, candidates),
            seed=context.seed,
            prime_image=image.to(context.device),
            prime_rows=rows,
        )
        made.append(torch.cat([image[None], found.images.cpu()]))
    labels = ["given", *(f"best {i + 1}" for i in range(made[0].shape[0] - 1))]
    sheet = context.sheet(f"{key}.png", torch.stack(made), captions, [labels] * len(made))
    return Figure(
        text=text,
        ours={"captions": list(captions), "rows_given": rows,
              "rows": pipeline.prior.config.grid[0]},
        paper={"rows_given": 15, "rows": 32},
        tables=[
            table(
                ["", "ours", "paper"],
                [["rows of codes given", rows, 15], ["of", pipeline.prior.config.grid[0], 32]],
            )
        ],
        pictures=[sheet["file"]],
        sheets=[sheet],
        command=context.own_command(key),
        differs=f"{rows} of {pipeline.prior.config.grid[0]} rows of codes are given (paper: 15 of "
        f"32). {differs}",
        missing=missing,
    )  # fmt: skip


def figure_13(context: Context) -> Figure:
    """The rest of held-out pictures for their own captions."""
    count = min(6, context.sizes.shown, len(context.captions))
    return _completed(
        context,
        "figure_13",
        context.captions[:count],
        context.originals[:count],
        "The upper rows of a held-out picture and its caption are given; the model draws the rest.",
        "Captions are the pictures' own.",
        "A model of this set does not know what a sketch is: completing a picture stands in for "
        "translating it.",
    )


def figure_14(context: Context) -> Figure:
    """The paper's prompts, with pictures of the pipeline's set."""
    images = context.originals[: len(PROMPTS)]
    return _completed(
        context,
        "figure_14",
        PROMPTS[: len(images)],
        images,
        "The paper's six prompts, word for word, with the upper rows of a held-out picture.",
        "The paper shows a photo of a cat.",
        f"A model of {context.set.name} has not learned the words of these prompts: the figure "
        "shows that it does not follow them.",
    )
