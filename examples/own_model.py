"""A model of your own: sparse attention, a gradient scale a branch, AdamW16, torch.compile.

`python examples/own_model.py` learns striped pictures from captions of four tokens, in fp16.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dalle_ext
from dalle.precision import BlockEnds, ResblockScaler

TEXT, GRID, VOCAB, WIDTH, HEADS = 4, (4, 8), 16, 64, 4


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.pattern = dalle_ext.AttentionPattern(kind, text_len=TEXT, grid=GRID)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(
            dalle_ext.sparse_attention(q, k, v, self.pattern).transpose(1, 2).flatten(2)
        )


class Branch(nn.Module):
    """x + f(norm(x)), where the scaler's ends surround the branch; x stays fp32."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), f
        self.ends: BlockEnds

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.ends.enter(x)
        return x + self.ends.leave(self.f(self.norm(y)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.positions = nn.Embedding(TEXT + GRID[0] * GRID[1], WIDTH)
        self.branches = nn.ModuleList()
        for kind in ("row", "column"):
            mlp = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            self.branches += [Branch(Attention(kind)), Branch(nn.Sequential(*mlp))]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        for branch in self.branches:
            x = branch(x)
        logits = self.head(x[:, TEXT - 1 : -1])  # a position predicts the next one
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, TEXT:].flatten())


def scale_branches(model: Model, replicas: int = 1) -> ResblockScaler:
    blocks = {str(i): branch for i, branch in enumerate(model.branches)}
    scaler = ResblockScaler(blocks, replicas=replicas)
    for name, branch in blocks.items():
        branch.ends = scaler[name]
    return scaler


def batch(draw: torch.Generator, size: int = 8) -> Tensor:
    """(size, 36) tokens: row r of the picture repeats token r of the caption."""
    text = torch.randint(VOCAB, (size, TEXT), generator=draw)
    return torch.cat([text, text.repeat_interleave(GRID[1], 1)], 1)


def main(steps: int = 60, backend: str = "inductor") -> float:
    """The loss of the last step, in nats a token."""
    torch.manual_seed(0)
    model, draw = Model(), torch.Generator().manual_seed(0)
    scaler = scale_branches(model)
    optimizer = dalle_ext.AdamW16(model.parameters(), lr=3e-3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(steps):
        with torch.autocast("cpu", torch.float16):
            loss = compiled(batch(draw))
        loss.backward()
        norm = scaler.step(optimizer, clip_norm=1.0).norm
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    main(**vars(parser.parse_args()))
