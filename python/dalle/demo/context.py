"""State that the demo's stages share: the folder, the recipe, data and models loaded so far."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from dalle.data.pairs import Pairs
from dalle.data.shapes import split_scenes
from dalle.data.shapes_pairs import ShapesPairs
from dalle.data.sources import load_pairs
from dalle.demo.config import Workspace
from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError
from dalle.files import saving
from dalle.pipeline import Pipeline
from dalle.pretrained import Pretrained
from dalle.recipes import DemoRecipe
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.task import Task

SHOWN = 24  # captions, or pictures, in each part of the report


class Demo:
    """State that the stages share: options, recipe, folder, data and models loaded so far.

    Args:
        space: the folder.
        recipe: sizes and numbers of updates.
        device: where to compute.
    """

    def __init__(self, space: Workspace, recipe: DemoRecipe, device: torch.device) -> None:
        self.space, self.recipe, self.device = space, recipe, device
        self.data, self.seed = space.config.data, space.config.seed

    @cached_property
    def train_pairs(self) -> Pairs:
        """The training pairs of all stages."""
        size = self.recipe.image_size
        if self.data == "shapes":
            return ShapesPairs("train", image_size=size, seed=self.seed, size=self.recipe.items)
        return load_pairs("emoji", image_size=size, split="train")

    @cached_property
    def unseen(self) -> list[Pairs]:
        """Pictures with captions that are in no training pair."""
        size = self.recipe.image_size
        if self.data == "shapes":
            count = self.recipe.unseen_items
            return [
                ShapesPairs(split, image_size=size, seed=self.seed, size=count)
                for split in ("test", "zero")
            ]
        return [load_pairs("emoji", image_size=size, split="heldout")]

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
        return pipeline

    def train(self, task: Task, steps: int) -> None:
        """The common loop, resuming where it was stopped; then saves the averaged model."""
        loop = LoopConfig(
            out=self.space.folder(task.name),
            steps=steps,
            log_every=max(1, min(20, steps // 10)),
            checkpoint_every=max(50, steps // 8),
            keep=1,
            picture_every=max(1, steps // 3),
            seed=self.seed,
        )
        try:
            train(task, loop)
        except CheckpointError as problem:
            cause = problem.__cause__ if isinstance(problem.__cause__, CheckpointError) else problem
            raise CheckpointError(
                f"demo: {cause}; remove {loop.out} to train this part again"
            ) from problem
        if task.average is not None:
            with task.average.applied():
                task.model.eval()
                self.save(task)
        else:
            task.model.eval()
            self.save(task)

    def save(self, task: Task) -> None:
        part = "vae" if task.name == "dvae" else task.name
        with saving("demo", self.space.pipeline / part):
            assert isinstance(task.model, Pretrained)
            task.model.save_pretrained(self.space.pipeline / part)


def captions_to_draw(demo: Demo) -> dict[str, list[Any]]:
    """Captions to sample: "caption", "split" and "target" (emoji: index of the true picture)."""
    if demo.data == "emoji":
        captions = list(demo.unseen[0].captions)[: demo.recipe.num_captions]
        count = len(captions)
        return {"caption": captions, "split": ["heldout"] * count, "target": list(range(count))}
    rng = np.random.default_rng(demo.seed)
    captions, splits = [], []
    for split in ("zero", "test", "train"):
        scenes = split_scenes(split)
        for related in (False, True):
            group = [scene.caption for scene in scenes if bool(scene.relation) == related]
            quota = demo.recipe.num_captions // (2 if split == "train" else 1)
            rounds = [group[i] for _ in range(4) for i in rng.permutation(len(group))]
            captions += rounds[:quota]
            splits += [split] * len(rounds[:quota])
    return {"caption": captions, "split": splits, "target": [-1] * len(captions)}
