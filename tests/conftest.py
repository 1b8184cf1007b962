"""Tiny random models of every supported layout, and data that a tiny model can learn."""

import gc
import os

# Before transformers and datasets are imported: nothing may be fetched, and tokenizers must not fork threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

import hf_sparse  # noqa: F401  registers the pruned model types

VOCABULARY = 99


def bert(layers: int = 2, **sizes: int) -> BertForSequenceClassification:
    defaults = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **{**defaults, **sizes})
    return _initialized(BertForSequenceClassification(config))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=40,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _initialized(GPT2LMHeadModel(config))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    return _initialized(LlamaForCausalLM(config))


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _initialized(BartForConditionalGeneration(config))


def _initialized(model: PreTrainedModel) -> PreTrainedModel:
    """Weights and biases large enough that dropping anything shows in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.weight.add_(1.0)
    return model.eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "bart": bart}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of a group follow each other: what they share is made once."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        groups.setdefault(mark.args[0] if mark else item.nodeid, []).append(item)
    items[:] = [item for group in groups.values() for item in group]


def pytest_collection_finish() -> None:
    """Keep what is imported out of all later collections of garbage: every start of a Trainer makes some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def rows(count: int, seed: int = 0, length: int = 8) -> Dataset:
    """Sequences labelled by whether their first token is below 50: learnt within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] < 50).long().tolist()})


def training_arguments(directory: Path, **options: object) -> TrainingArguments:
    defaults: dict[str, object] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


class StopAt(TrainerCallback):
    """Saves and stops at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
