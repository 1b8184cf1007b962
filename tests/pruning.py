"""Tiny random models, data that they can learn, short runs on both, and plans of what to prune of any model."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

from hf_sparse import (
    ModelStructure,
    PruningPlan,
    SparseTrainer,
    SparsityConfig,
    attach_gates,
    compact,
    discover,
)
from hf_sparse.structure.blocks import Block

VOCABULARY = 99


# ---- Models ----


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


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# ---- Runs ----


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


def trainer(directory: Path, model: PreTrainedModel | None = None, **options: Any) -> SparseTrainer:
    """A short run on tiny BERT; options of SparseTrainer by name, all others are TrainingArguments."""
    names = ("sparsity", "teacher", "callbacks", "compute_metrics", "train_dataset", "compute_loss_func")
    given = {name: options.pop(name) for name in names if name in options}
    defaults: dict[str, Any] = {
        "sparsity": SparsityConfig(),
        "train_dataset": rows(64),
        "eval_dataset": rows(16, seed=1),
    }
    return SparseTrainer(model=model or bert(), args=training_arguments(directory, **options), **{**defaults, **given})


def density(run: SparseTrainer) -> float:
    """The share of the prunable cost that a run has left."""
    return 1 - run.costs.removed({name: len(units) for name, units in run.plan().kept.items()})


class StopAt(TrainerCallback):
    """Saves and stops at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


# ---- Plans ----


def learnt(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Gates as training leaves them: some closed, the others of all sizes."""
    bank = attach_gates(model, SparsityConfig())
    generator = torch.Generator().manual_seed(seed)
    for group in bank.groups.values():
        group.alpha.data = 2 * torch.randn(group.alpha.shape, generator=generator)
        group.beta.data += 2.0
    return model


Blocks = tuple[Block, ...]
PLANS: dict[str, Callable[[Blocks], dict[str, tuple[int, ...]]]] = {
    "uneven": lambda blocks: {block.name: tuple(range(i % block.units + 1)) for i, block in enumerate(blocks)},
    "one": lambda blocks: {block.name: (block.units - 1,) for block in blocks},
    "some sublayers": lambda blocks: {block.name: () for block in blocks[::2]},
    "no attention": lambda blocks: {block.name: () for block in blocks if block.kind == "attention"},
    "no ffn": lambda blocks: {block.name: () for block in blocks if block.kind == "ffn"},
    "nothing left": lambda blocks: {block.name: () for block in blocks},
    "everything": lambda blocks: {},
}


def plans(model: PreTrainedModel) -> dict[str, PruningPlan]:
    """Plans with whole sublayers gone, one unit left, and different counts in every layer."""
    blocks = discover(model).blocks
    return {name: PruningPlan(kept(blocks)) for name, kept in PLANS.items()}


def uniform(model: PreTrainedModel, **keep: int) -> PruningPlan:
    """The last heads or neurons of every block, and all others."""
    blocks = [block for block in discover(model).blocks if block.kind in keep]
    return PruningPlan({block.name: tuple(range(block.units - keep[block.kind], block.units)) for block in blocks})


def random_plans(structure: ModelStructure) -> dict[str, PruningPlan]:
    """Different counts in every block, without some sublayers too; one unit left; none left in any block."""
    generator = torch.Generator().manual_seed(0)
    uneven = {}
    for block in structure.blocks:
        count = int(torch.randint(1, block.units + 1, (), generator=generator))
        uneven[block.name] = tuple(sorted(torch.randperm(block.units, generator=generator)[:count].tolist()))
    names = [block.name for block in structure.blocks]
    return {
        "some gone": PruningPlan({**uneven, **dict.fromkeys(single_sublayers(structure), ())}),
        "uneven": PruningPlan(uneven),
        "one": PruningPlan({block.name: (block.units // 2,) for block in structure.blocks}),
        "all gone": PruningPlan(dict.fromkeys(names, ())),
    }


def single_sublayers(structure: ModelStructure) -> list[str]:
    """The first attention and the last FFN of every stack of layers: what is beside them stays."""
    stacks: dict[tuple[str, str], list[str]] = {}
    for block in structure.blocks:
        if block.stand_in is not None:
            stacks.setdefault((block.kind, re.sub(r"\d+", "*", block.name)), []).append(block.name)
    return [names[0 if kind == "attention" else -1] for (kind, _), names in stacks.items()]


@torch.no_grad()
def masked(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> PreTrainedModel:
    """A copy in which what the plan drops weighs zero."""
    model = copy.deepcopy(model)
    for block in structure.blocks:
        gone = [unit for unit in range(block.units) if unit not in plan.kept[block.name]]
        weight = model.get_parameter(block.weight.parameter)
        weight.data = weight.index_fill(block.weight.dim, block.columns[gone].flatten(), 0.0)
    return model


def compact_found(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, inputs: dict) -> None:
    """Compact a model whose structure is not to be discovered again, as that of a model with gates is not."""
    if structure.blocks:
        attach_gates(model, SparsityConfig(target=0.01), inputs, structure=structure)
        compact(model, plan, inputs)
