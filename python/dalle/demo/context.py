"""State that the demo's stages share: the folder, the recipe, data and models loaded so far."""

from __future__ import annotations

from functools import cached_property

import torch

from dalle.demo.sets import DataSet
from dalle.demo.workspace import Workspace
from dalle.devices import default_precision
from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError
from dalle.pipeline import Pipeline
from dalle.recipes import DemoRecipe
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.held_out import save_better
from dalle.train.loop import train
from dalle.train.task import Task

SHOWN = 24  # captions, or pictures, in each part of the report


class Demo:
    """State that the stages share: options, recipe, folder, data and models loaded so far.

    Args:
        space: the folder.
        recipe: sizes and numbers of updates.
        data: the data set.
        device: where to compute.
    """

    def __init__(
        self, space: Workspace, recipe: DemoRecipe, data: DataSet, device: torch.device
    ) -> None:
        self.space, self.recipe, self.data, self.device = space, recipe, data, device
        self.seed = space.seed

    @cached_property
    def precision(self) -> str:
        """Of all trainings: that of the first run's device, since the checkpoints hold it."""
        path = self.space.work / "precision.json"
        begun = self.space.read(path)
        if not begun:
            begun = {"all": default_precision(self.device)}
            self.space.write(path, begun)
        return str(begun["all"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_pretrained(self.space.pipeline / "tokenizer")

    @cached_property
    def vae(self) -> DiscreteVAE:
        vae = DiscreteVAE.from_pretrained(self.space.pipeline / "vae")
        return vae.to(self.device).eval()

    @cached_property
    def pipeline(self) -> Pipeline:
        pipeline = Pipeline.from_pretrained(self.space.pipeline)
        for part in (pipeline.vae, pipeline.prior, pipeline.ranker):
            assert isinstance(part, torch.nn.Module)
            part.to(self.device)
        if pipeline.prior.config.precision != "fp32":  # 16 bits, once and not at every code
            pipeline.prior.compute_in_(pipeline.prior.config.precision)
        return pipeline

    def train(self, task: Task, steps: int) -> dict[str, float]:
        """The common loop, resuming where it was stopped; then saves the better weights.

        Returns:
            Their scores on the held-out part.
        """
        loop = LoopConfig(
            out=self.space.folder(task.name),
            steps=steps,
            log_every=max(1, min(20, steps // 10)),
            checkpoint_every=max(50, steps // 8),
            keep=1,
            picture_every=max(1, steps // 3),
            validate_every=max(1, steps // 12),
            seed=self.seed,
        )
        command = self.space.command
        try:
            train(task, loop)
        except CheckpointError as problem:
            cause = problem.__cause__ if isinstance(problem.__cause__, CheckpointError) else problem
            raise CheckpointError(
                f"{command}: {cause}; remove {loop.out} to train this part again"
            ) from problem
        task.model.eval()
        folder = self.space.pipeline / ("vae" if task.name == "dvae" else task.name)
        return save_better(command, task, folder, steps, others=loop.out / "weights")
