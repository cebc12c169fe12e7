"""Sharded training (FSDP2), saved shard by shard from every process: run it twice, and the second
time on another number of processes.

torchrun --standalone --nproc-per-node 2 examples/fsdp2_dcp.py [REPOSITORY] [STEPS]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt

MODEL = "sharded"


def resumed(repo: ckpt.Repository, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest version, and return the step after it; 0 when there is none."""
    if MODEL not in {known.name for known in repo.models()}:
        return 0
    newest = repo.get(MODEL)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, storage_reader=ckpt.dcp_reader(repo, newest))
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return (newest.step or 0) + 1


def save(
    repo: ckpt.Repository,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    loss: float,
) -> None:
    """Every process stores its own shards; when all have, there is one version of them."""
    weights, moments = get_state_dict(model, optimizer)
    writer = ckpt.dcp_writer(repo, MODEL, step=step, metrics={"loss": loss})
    dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)


def train(repository: str, total: int) -> None:
    """Learn to add, with weights and moments spread over the processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with ckpt.open(repository) as repo:
        start = resumed(repo, model, optimizer)
        for step in range(start, total):
            numbers = torch.rand(16, 2)
            loss = (model(numbers).squeeze(1) - numbers.sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0 or step == total - 1:
                save(repo, model, optimizer, step, loss.item())
    if dist.get_rank() == 0:
        print(f"steps {start} to {total - 1}, world size {dist.get_world_size()}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(*(sys.argv[1:2] or ["checkpoints"]), int((sys.argv[2:3] or ["100"])[0]))
    dist.destroy_process_group()
