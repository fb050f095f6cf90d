"""A task small enough to train thousands of times, and what the loop's tests look at."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from dalle.distributed.world import Solo
from dalle.dtensor import local_part
from dalle.train.averaging import IterateAverage
from dalle.train.checkpoint import task_state
from dalle.train.config import LoopConfig
from dalle.train.schedules import PlateauHalving, linear_warmup
from dalle.train.seeds import step_seed
from dalle.train.tree import pack_tree
from dalle.train.update import update


class TinyTask:
    """Two layers and dropout (global generator), AdamW with two groups, averaging, a plateau."""

    name = "tiny"

    def __init__(self, *, seed=0, width=4, before=None):
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(3, width), nn.Dropout(0.2), nn.BatchNorm1d(width), nn.Linear(width, 1)
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(generator=generator)
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.96))
        self.average = IterateAverage(self.model, 0.9, every=2)
        self.world = Solo()
        self.plateau = PlateauHalving(window=2, patience=1, min_delta=0.01)
        self.seed, self.width, self.before, self.batches = seed, width, before, []

    def describe(self):
        return {"width": self.width, "optimizer": {"betas": (0.9, 0.96), "seed": self.seed}}

    def train_step(self, step):
        if self.before is not None:
            self.before(self, step)
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        x = torch.randn(8, 3, generator=generator)
        self.batches.append(hashlib.sha256(x.numpy().tobytes()).hexdigest())
        loss = (self.model(x).squeeze(1) - x.sum(1)).square().mean()
        lr = linear_warmup(step, 0.05, 4) * self.plateau.factor
        norm = update(self, loss, step, lr=lr, clip_norm=4.0)
        self.plateau.update(float(loss.detach()))
        return {"loss": loss.detach(), "grad_norm": norm, "images": 8}

    def pictures(self, step):
        return {"noise": torch.full((3, 4, 6), 0.5)}

    def state(self):
        return {"plateau": self.plateau.state_dict()}

    def load_state(self, state):
        self.plateau.load_state_dict(state["plateau"])


def config(out, **changes):
    values = {"steps": 20, "checkpoint_every": 5, "log_every": 2, "picture_every": 0} | changes
    return LoopConfig(out=Path(out), **values)


def state_hash(task):
    """SHA-256 over everything a task holds: weights, optimizer, average, RNG, own state."""
    tensors = {}
    tree = pack_tree({"model": dict(task.model.state_dict()), **task_state(task)}, tensors, "all")
    digest = hashlib.sha256(json.dumps(tree).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + str(tensors[name].dtype).encode())
        part = local_part(tensors[name].detach())
        digest.update(part.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
