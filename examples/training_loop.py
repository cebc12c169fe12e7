"""A training loop that saves in the background and goes on where it was: run it twice.

python examples/training_loop.py [REPOSITORY] [STEPS]
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import ckpt


def train(repository: str, total: int) -> None:
    """Learn to add, and keep the three newest states, the best one, and each hundredth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    keep = [ckpt.Latest(3), ckpt.Best("loss", mode="min"), ckpt.Every(steps=100)]
    with ckpt.open(repository) as repo, ckpt.Run(repo, "adder", keep=keep) as run:
        start = run.track(model=model, optimizer=optimizer, schedule=schedule).resume()
        for step in range(start, total):
            numbers = torch.rand(32, 2)
            loss = (model(numbers).squeeze(1) - numbers.sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == total - 1:
                run.save(step, metrics={"loss": loss})
    if start == total:
        print(f"all {total} steps are done; give a larger number to go on")
    else:
        print(f"steps {start} to {total - 1}, loss {loss.item():.4f}")


if __name__ == "__main__":
    train(*(sys.argv[1:2] or ["checkpoints"]), int((sys.argv[2:3] or ["200"])[0]))
