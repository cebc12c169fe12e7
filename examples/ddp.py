"""Training on several processes (DDP) that goes on where it was: run it twice.

torchrun --standalone --nproc-per-node 2 examples/ddp.py [REPOSITORY] [STEPS]
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckpt


def train(repository: str, total: int) -> None:
    """Learn to add; every process draws numbers of its own. All of them make the same calls:
    rank 0 saves, with the random states of all, and all resume from the same version."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    with ckpt.open(repository) as repo, ckpt.Run(repo, "ddp", keep=[ckpt.Latest(3)]) as run:
        # The module inside, so that the weights have the same names without DDP.
        start = run.track(model=model.module, optimizer=optimizer).resume()
        for step in range(start, total):
            numbers = torch.rand(16, 2)
            loss = (model(numbers).squeeze(1) - numbers.sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0 or step == total - 1:
                run.save(step, metrics={"loss": loss})
    if dist.get_rank() == 0:
        print(f"steps {start} to {total - 1}, world size {dist.get_world_size()}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(*(sys.argv[1:2] or ["checkpoints"]), int((sys.argv[2:3] or ["100"])[0]))
    dist.destroy_process_group()
