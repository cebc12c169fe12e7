"""A training by Lightning on two processes, each with random numbers of its own.

Run as a program with a repository, the name of a run, a seed and what to resume from; each process
prints its rank, the sums of the weights, and what its generator gives next.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckpt
from ckpt.training.lightning import CkptCheckpoint


class Net(LightningModule):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = (self.net(batch[0]) - torch.rand(1)).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main(folder: str, run: str, seed: str, start: str = "") -> None:
    torch.manual_seed(int(seed) + int(os.environ.get("LOCAL_RANK", "0")))
    data = TensorDataset(torch.rand(16, 4, generator=torch.Generator().manual_seed(1)))
    with ckpt.open(folder) as repo:
        trainer = Trainer(
            max_epochs=2,
            callbacks=[CkptCheckpoint(repo, "gpt", name=run, quiet=True)],
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net = Net()
        loader = DataLoader(data, batch_size=2, shuffle=True)
        trainer.fit(net, loader, ckpt_path=start or None)
    weights = [value.double().sum().item() for value in net.state_dict().values()]
    # At once: both come here at the same time.
    sys.stdout.write(f"{trainer.global_rank} {weights} {torch.rand(2).tolist()}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
