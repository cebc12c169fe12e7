"""The Trainer of Hugging Face, its checkpoints pushed and resumed exactly: run it twice.

pip install '.[huggingface]'
python examples/huggingface_trainer.py [REPOSITORY] [STEPS]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import ckpt
from ckpt.training.huggingface import CkptCallback

# Whether a sequence begins with an even number.
SEQUENCES = torch.randint(0, 100, (256, 16), generator=torch.Generator().manual_seed(0))
EXAMPLES = [{"input_ids": one, "labels": (one[0] + 1) % 2} for one in SEQUENCES]


def train(repository: str, steps: int) -> None:
    """Train a tiny BERT from scratch. The trainer's own folders may go: the versions stay."""
    set_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    with ckpt.open(repository) as repo, tempfile.TemporaryDirectory() as outputs:
        checkpoint = CkptCallback(repo, "tiny-bert", keep=[ckpt.Latest(3)])
        trainer = Trainer(
            BertForSequenceClassification(config),
            TrainingArguments(
                outputs,
                max_steps=steps,
                save_steps=10,
                logging_steps=10,
                save_total_limit=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=EXAMPLES,
            callbacks=[checkpoint],
        )
        start = checkpoint.resume()  # None the first time
        trainer.train(resume_from_checkpoint=start)
        newest = repo.get("tiny-bert")
        print(f"{'went on' if start else 'began'}; {newest} has step {newest.step}")


if __name__ == "__main__":
    train(*(sys.argv[1:2] or ["checkpoints"]), int((sys.argv[2:3] or ["20"])[0]))
