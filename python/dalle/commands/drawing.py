"""What `dalle sample` and `dalle edit` share: options, and a run from its folder to its page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dalle import files, pictures
from dalle.candidates import Event, Finished, Generation, RowsFinished
from dalle.commands.drawn import (
    CANDIDATES,
    PAGE,
    RECORD,
    description,
    earlier_pictures,
    find_model,
    load_pipeline,
    output_folder,
    page,
    record,
    remove_earlier,
    save_pictures,
    set_precision,
    slug,
)
from dalle.commands.picture_record import Input, Options, PictureRecord, model_hashes
from dalle.configs import integer
from dalle.devices import pick_device
from dalle.files import to_json
from dalle.pipeline import MAX_CANDIDATES
from dalle.prior.sampling import MAX_SEED, SamplingChanges
from dalle.prior.step import check_weights

Command = Literal["sample", "edit"]


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """Options of `dalle sample` and `dalle edit`.

    Args:
        model: folder of a pipeline. Left out: run/pipeline, which `dalle train` leaves, and where
            there is none, out/demo/pipeline of `dalle demo`.
        out: folder for index.html, grid PNGs, single PNGs and samples.json. Where it holds an
            earlier run, the next free one of OUT-2, OUT-3, ... is taken.
        overwrite: put the results in `out` in place of those of the earlier run.
        num_candidates: samples a caption to choose from; left out, what the pipeline says, else 64
            (the paper takes 512).
        top: how many of them to keep at most.
        seed: a caption gets the same pictures from the same seed, whatever else is drawn.
        sampling: how a code is drawn; what is left out is as the pipeline says.
        precision: in which the prior draws: fp32, bf16, or auto, which is as it was trained, but
            bf16 on a GPU for one of fp32; codes of nearly equal chance may change.
        weights: bf16 rounds the prior's matrices, and what they multiply, to bf16: faster on a CPU
            with bf16 dot products, the only place where it is offered. As with `precision`, codes
            of nearly equal chance may change.
        device: "cpu", "cuda" or "auto".
        scale: screen pixels per pixel in the grids.
        again: a PNG that this command has written: the same candidate is drawn once more, bit for
            bit, as the picture itself says. Needs the same model, and the picture that it was drawn
            from, if it was.
    """

    model: Path | None = None
    out: Path = Path("run/samples")
    overwrite: bool = False
    num_candidates: int | None = None
    top: int = 8
    seed: int = 0
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    scale: int = 2
    again: Path | None = None

    def check(self, owner: str) -> None:
        """Raises UsageError for a number out of range, before anything is read."""
        if self.num_candidates is not None:
            integer(owner, "num_candidates", self.num_candidates, 1, MAX_CANDIDATES)
        integer(owner, "top", self.top, 1)
        integer(owner, "seed", self.seed, 0, MAX_SEED)


class Run:
    """A run of `dalle sample` or `dalle edit`: its pipeline, and the folder that it fills.

    Args:
        owner: "sample" or "edit".
        config: its options.
        captions: whose pictures it draws.
        inputs: pictures that it reads, which no result may overwrite.
        device: of `config` if left out.

    Attributes:
        out: the folder.
        pipeline: on the device, still in the precision in which it was trained.
        models: its hashes.
        said: what samples.json says.

    Raises:
        DalleError: in one line; nothing is lost then.
    """

    def __init__(
        self,
        owner: Command,
        config: DrawingOptions,
        captions: Sequence[str],
        inputs: Sequence[Path],
        device: str | None = None,
    ) -> None:
        self.owner: Command = owner
        self.config = config
        self.model = find_model(owner, "model", config.model)
        self.out = output_folder(owner, config.out, config.overwrite)
        self.names = [slug(caption, i) for i, caption in enumerate(captions)]
        self.earlier: list[Path] = earlier_pictures(self.out)
        targets = [self.out / RECORD, self.out / PAGE]
        for name in self.names:
            targets += [self.out / f"{name}.png", self.out / name / "0.png"]
        files.check_targets(owner, *targets)
        for path in [*self.earlier, *targets]:
            files.check_not_input(owner, path, inputs)
        self.device = pick_device(device or config.device)
        self.pipeline = load_pipeline(self.model, self.device)
        self.said: dict[str, Any] = {
            "command": owner,
            **description(self.pipeline, self.model),
            "records": [],
        }
        self.models = model_hashes(self.said["model"]["fingerprints"])

    def options(self) -> dict[str, Any]:
        """Keywords of `Pipeline.request`; numbers that are left out are the pipeline's."""
        config, pipeline = self.config, self.pipeline
        num_candidates = config.num_candidates or pipeline.num_candidates or CANDIDATES
        return {
            "num_candidates": num_candidates,
            "top": min(config.top, num_candidates),
            "seed": config.seed,
            "sampling": config.sampling.applied(pipeline.sampling),
            "weights": config.weights,
        }

    def begin(self, options: dict[str, Any], precision: str, **more: Any) -> None:
        """Sets the precision, once the weights' hashes are taken, and says how is drawn.

        Raises:
            EnvironmentProblem: weights are bf16, which this device does not multiply.
        """
        check_weights(options["weights"], self.device)
        set_precision(self.pipeline, precision, self.device)
        how = {**options, "sampling": asdict(options["sampling"])}
        self.said |= {**how, "precision": self.pipeline.prior.config.precision, **more}

    def picture(
        self, caption: str, drawn_as: str, options: dict[str, Any], image: Input | None
    ) -> PictureRecord:
        """What the pictures of a caption say of themselves."""
        how = {name: options[name] for name in ("sampling", "num_candidates", "top", "weights")}
        precision = self.pipeline.prior.config.precision
        return PictureRecord(
            command=self.owner,
            caption=caption,
            drawn_as=drawn_as,
            seed=options["seed"],
            options=Options(**how, precision=precision, device=self.device.type, image=image),
            model=self.models,
        )

    def finish(
        self,
        caption: str,
        drawn_as: str,
        end: Finished,
        begun: RowsFinished | None,
        picture: PictureRecord,
    ) -> list[str] | None:
        """Writes what a caption's events have left, finished or not; None where there is nothing.

        Args:
            caption, drawn_as, picture: of `write`.
            end, begun: of `last_events`.
        """
        if not end.cancelled:
            return self.write(caption, drawn_as, end.generation, picture)
        more = {"finished": end.drawn, "rows": self.pipeline.grid[0]}
        if end.drawn:
            return self.write(caption, drawn_as, end.generation, picture, **more)
        if begun is None:
            return None
        generation = self.pipeline.unfinished(begun, self.said["top"])
        more["rows"] = begun.rows  # such a picture cannot be drawn again, and says nothing
        return self.write(caption, drawn_as, generation, None, **more)

    def write(
        self,
        caption: str,
        drawn_as: str,
        generation: Generation,
        picture: PictureRecord | None,
        **more: Any,
    ) -> list[str]:
        """Writes the pictures of the next caption, samples.json and the page; names of singles.

        Args:
            caption, drawn_as, generation, picture: of `save_pictures` and `record`.
            more: of the caption's entry in samples.json.
        """
        entries = self.said["records"]
        if not entries:  # until here nothing that an earlier run has left is lost
            remove_earlier(self.owner, self.out, self.earlier)
        name = self.names[len(entries)]
        singles = save_pictures(self.out, name, generation, self.config.scale, picture)
        entry = record(caption, drawn_as, self.said["seed"], generation, singles)
        entries.append(entry | more)
        pictures.save_bytes(self.out / RECORD, to_json(self.said))
        pictures.save_bytes(self.out / PAGE, page(self.said))
        return singles


def last_events(events: Iterable[Event]) -> tuple[Finished, RowsFinished | None]:
    """The end of the events of one caption, and the last row before it."""
    begun = None
    for event in events:
        if isinstance(event, RowsFinished):
            begun = event
        elif isinstance(event, Finished):
            return event, begun
    raise AssertionError("events end with Finished")
