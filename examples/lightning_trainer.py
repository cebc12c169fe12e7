"""Lightning, saved in the background and resumed exactly: run it twice.

pip install '.[lightning]'
python examples/lightning_trainer.py [REPOSITORY] [EPOCHS]
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ckpt
from ckpt.training.lightning import CkptCheckpoint


class Adder(LightningModule):
    """A small network that learns to add."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def loss(self, numbers: Tensor) -> Tensor:
        return (self.net(numbers).squeeze(1) - numbers.sum(1)).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(repository: str, epochs: int) -> None:
    """Save after each epoch; keep the three newest versions and the best one."""
    torch.manual_seed(0)
    numbers = torch.rand(512, 2)
    with ckpt.open(repository) as repo:
        checkpoint = CkptCheckpoint(
            repo, "adder-lightning", monitor="val_loss", keep=[ckpt.Latest(3)]
        )
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=[checkpoint],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = checkpoint.resume()  # None the first time
        print(f"goes on from {start}" if start else "begins")
        trainer.fit(
            Adder(),
            DataLoader(TensorDataset(numbers[:448]), batch_size=32, shuffle=True),
            DataLoader(TensorDataset(numbers[448:]), batch_size=32),
            ckpt_path=start,
        )
        best = repo.get("adder-lightning:best")
        print(
            f"{trainer.current_epoch} epochs; best is {best}, val_loss {best.metrics['val_loss']}"
        )


if __name__ == "__main__":
    train(*(sys.argv[1:2] or ["checkpoints"]), int((sys.argv[2:3] or ["5"])[0]))
