"""`dalle reproduce`: every figure and table of the paper at the scale of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle.configs import check_numbers, require
from dalle.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Makes every figure and table of the paper with a pipeline, ours beside the paper's numbers.

    Writes index.html and figures.json. The same command goes on where it was stopped.

    Args:
        model: folder of the pipeline, such as that of `dalle demo`.
        out: folder of the page.
        quick: minutes on two cores; the default.
        full: hours: more captions, candidates, larger trainings.
        only: figures to make, such as figure_9 or table_1; left out, all.
        data: the set that the pipeline was trained on: shapes, emoji or a folder. Left out, what
            the run around the pipeline says, else the set whose captions its tokenizer knows.
        shapes: folder of a pipeline of the set shapes, for the figures that need one; left out, the
            model itself, else one that is trained here.
        other: folder of a second pipeline, for the figures that compare two models.
        seed: for everything random.
        device: "cpu", "cuda" or "auto".
    """

    model: Path = Path("out/demo/pipeline")
    out: Path = Path("out/paper")
    quick: bool = False
    full: bool = False
    only: tuple[str, ...] = ()
    data: str | None = None
    shapes: Path | None = None
    other: Path | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_numbers("reproduce", self)
        require("reproduce", self, "0 or more", lambda x: x >= 0, "seed")
        if self.quick and self.full:
            raise UsageError("reproduce: full must be off with quick, got both")


def reproduce(config: ReproduceConfig) -> None:
    """Makes the figures and prints where the page is."""
    from dalle.commands.training import require_one_process
    from dalle.console import printable
    from dalle.devices import pick_device
    from dalle.files import make_folder, real_path
    from dalle.reproduce import run
    from dalle.reproduce.context import Context
    from dalle.reproduce.sizes import FULL, QUICK

    require_one_process("reproduce")
    run.chosen(config.only)
    folders = {"model": config.model, "shapes": config.shapes, "other": config.other}
    out = real_path(config.out)
    for option, folder in folders.items():
        if folder is not None and out.is_relative_to(real_path(folder)):
            raise UsageError(f"reproduce: out must be outside {option}, got {config.out}")
        beside = folder is not None and out == real_path(folder).parent
        if beside and (out / "work").is_dir():  # its page would be replaced by this one
            raise UsageError(
                f"reproduce: out must be another folder than the run of {option}, got {config.out}"
            )
    if config.other is not None and real_path(config.other) == real_path(config.model):
        raise UsageError(
            f"reproduce: other must be another pipeline than model, got {config.other}"
        )
    device = pick_device(config.device)
    context = Context(
        config.model,
        config.out,
        sizes=FULL if config.full else QUICK,
        seed=config.seed,
        device=device,
        data=config.data,
        shapes=config.shapes,
        other=config.other,
    )
    make_folder(config.out, "reproduce")
    made = run.reproduce(context, config.only)
    lacking = [k for k, figure in made.items() if figure["missing"].startswith(run.NOT_MADE)]
    there = sum(not figure["missing"].startswith("Not made") for figure in made.values())
    figures = "figure" if there == 1 else "figures"
    print(f"reproduce: {there} {figures}: {printable(str(config.out / run.PAGE))}")
    if lacking:
        print(f"reproduce: not made: {', '.join(lacking)}")
