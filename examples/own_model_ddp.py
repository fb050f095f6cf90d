"""The model of own_model.py on several processes: DDP, with gradients compressed by PowerSGD.

`torchrun --nproc-per-node 2 examples/own_model_ddp.py`
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dalle_ext
from dalle.distributed import PowerSGD
from own_model import Model, batch, scale_branches


def main(steps: int = 60, backend: str = "inductor") -> tuple[float, float]:
    """The last loss, mean over the processes, and by how much PowerSGD shrank the gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, draw = Model(), torch.Generator().manual_seed(rank)  # each process has its own pictures
    scaler = scale_branches(model, replicas=world)
    optimizer = dalle_ext.AdamW16(model.parameters(), lr=3e-3)
    model.compile(backend=backend, fullgraph=True)
    ddp = DistributedDataParallel(model)
    psgd = PowerSGD(rank=8, scaler=scaler, exclude=model.head.parameters())
    psgd.attach(ddp)
    for step in range(steps):
        with torch.autocast("cpu", torch.float16):
            loss = ddp(batch(draw))
        loss.backward()
        scaler.step(optimizer, clip_norm=1.0, sync_norm=psgd.broadcast_norm_)
        optimizer.zero_grad()
        if step % 20 == 19:
            dist.all_reduce(mean := loss.detach().clone())
            mean /= world
            if rank == 0:
                print(f"step {step + 1}: loss {mean:.4f}; {psgd.report()['advice']}")
    return mean.item(), psgd.report()["compression"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    main(**vars(options))
    dist.destroy_process_group()
