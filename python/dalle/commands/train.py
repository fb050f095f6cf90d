"""`dalle train`: from a folder of pictures to a model that draws."""

from __future__ import annotations

from dalle.demo.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Trains everything and prints the scores, what they mean, and what to type next."""
    from dalle.commands.training import require_one_process
    from dalle.demo.run import closing_lines
    from dalle.demo.train import run_train

    require_one_process("train")
    print(closing_lines(config.out, "train", run_train(config)))
