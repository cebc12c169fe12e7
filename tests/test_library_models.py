"""Models of real libraries: a published BERT, tiny GPT-2, Llama and T5, a LoRA adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.core.errors import TrustError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the libraries' own
    import peft
    import transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

TOKENS = {
    "input_ids": torch.tensor([[1, 5, 9, 3], [2, 4, 6, 8]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return transformers.BertForSequenceClassification(config)


def frozen_bert() -> Any:
    model = bert()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    return model


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = True) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    config: Any = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def lora() -> Any:
    return peft.get_peft_model(
        llama(False), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )


def tuned(config: Any) -> Any:
    """A model for generation, which keeps a method of the model inside it."""
    return peft.get_peft_model(llama(False), config)


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (bert, TOKENS),
    "frozen bert": (frozen_bert, TOKENS),
    "gpt2": (gpt2, TOKENS),
    "llama": (llama, TOKENS),
    "t5": (t5, {**TOKENS, "labels": TOKENS["input_ids"]}),
    "lora": (lora, TOKENS),
    "lora to generate": (
        lambda: tuned(peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")),
        TOKENS,
    ),
    "prompt": (
        lambda: tuned(peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_library_model_comes_back_proven(repo: ckpt.Repository, name: str) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    net = make().eval()
    version = repo.push(net, "m", inputs=inputs)
    assert version.proof is not None
    assert (version.proof.kind, version.proof.reason) == ("fresh", "")
    loaded = repo.load("m", trust=["transformers", "peft"], require="outputs-exact")
    before, after = dict(net.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(one.requires_grad == after[key].requires_grad for key, one in before.items())
    assert net.state_dict().keys() == loaded.state_dict().keys()
    assert type(loaded) is type(net)


def test_an_adapted_model_generates_as_before_and_may_be_pushed_again(
    repo: ckpt.Repository,
) -> None:
    torch.manual_seed(0)
    net = MODELS["lora to generate"][0]().eval()
    repo.push(net, "m")
    loaded: Any = repo.load("m", trust=["transformers", "peft"])
    given = {"input_ids": TOKENS["input_ids"], "max_new_tokens": 4, "do_sample": False}
    wanted = net.generate(**given, pad_token_id=0)
    assert torch.equal(loaded.generate(**given, pad_token_id=0), wanted)
    repo.push(loaded, "again")
    assert repo.verify("again", trust=["transformers", "peft"]).verdict == "structure"


def test_ties_of_a_library_model_hold(repo: ckpt.Repository) -> None:
    repo.push(t5(), "t5")
    loaded: Any = repo.load("t5", trust=["transformers"])
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    assert loaded.shared.weight is loaded.decoder.embed_tokens.weight


def test_the_published_minilm_comes_back_proven(
    repo: ckpt.Repository, real_checkpoint: Path
) -> None:
    net = transformers.AutoModel.from_pretrained(real_checkpoint.parent)
    repo.push(net, "minilm", inputs=TOKENS)
    with pytest.raises(TrustError, match=r"trust=\[.*transformers"):
        repo.load("minilm")
    assert repo.verify("minilm", trust=["transformers"]).verdict == "outputs-exact"


def test_a_folder_that_save_pretrained_wrote_loads_again(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = bert().eval()
    net.save_pretrained(tmp_path / "bert", max_shard_size="10KB")
    assert len(list((tmp_path / "bert").glob("*.safetensors"))) > 1
    repo.push_file(tmp_path / "bert", "bert")
    repo.pull_file("bert", tmp_path / "again")
    kind: Any = transformers.BertForSequenceClassification
    again = kind.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(net(**TOKENS).logits, again(**TOKENS).logits)
    repo.load_into(bert(), "bert")
