"""Engines and their settings with which gates would not be exact."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from pruning import bert, rows, training_arguments
from torch import distributed, nn
from torch.distributed.tensor import distribute_tensor
from transformers import TrainingArguments

from hf_sparse import SparseTrainer, SparsityConfig, SparsityError, attach_gates
from hf_sparse.engines.base import Engine
from hf_sparse.engines.choose import engine_of
from hf_sparse.engines.ddp import DDP
from hf_sparse.engines.fsdp import FSDP2, begin_states_
from hf_sparse.engines.zero import ZeRO
from hf_sparse.engines.zero3 import ZeRO3


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    arguments: TrainingArguments = training_arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(SparsityError, match="accelerate launch"):
        SparseTrainer(model=bert(), args=arguments, sparsity=SparsityConfig(), train_dataset=rows(8))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage 0 is plain DDP"),
        ({"optimizer": {"type": "AdamW", "params": {}}}, "a section 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "a section 'scheduler'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"fp16": {"enabled": True}}, "use bf16"),
        ({"dynamo": DynamoBackend.EAGER}, "torch.compile and DeepSpeed"),
    ],
)
def test_settings_of_deepspeed_that_would_not_be_exact_are_refused(config: dict[str, Any], reason: str) -> None:
    dynamo = SimpleNamespace(backend=config.pop("dynamo", DynamoBackend.NO))
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, **config}
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    with pytest.raises(SparsityError, match=reason):
        state = SimpleNamespace(deepspeed_plugin=plugin, dynamo_plugin=dynamo)
        ZeRO(cast(Any, SimpleNamespace(state=state))).check_()


def test_the_engine_is_the_one_that_accelerate_trains_with() -> None:
    def chosen(kind: str, **plugins: Any) -> type[Engine]:
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(**plugins), distributed_type=kind)
        return type(engine_of(accelerator))

    assert chosen(DistributedType.NO) is Engine and chosen(DistributedType.MULTI_CPU) is DDP
    assert chosen(DistributedType.FSDP, fsdp_plugin=SimpleNamespace()) is FSDP2
    for stage, kind in ((1, ZeRO), (2, ZeRO), (3, ZeRO3)):
        assert chosen(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=stage)) is kind


def test_deepspeed_refuses_a_model_of_which_only_gates_would_train() -> None:
    model = bert().requires_grad_(False)
    attach_gates(model, SparsityConfig())
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(SparsityError, match="by DDP"), ZeRO(accelerator).preparing(model):
        pass


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fsdp_version": 1}, "set fsdp_version to 2"),
        ({"cpu_ram_efficient_loading": True}, "set it to false"),
        ({"ignored_modules": [nn.Linear(1, 1)]}, "give their names"),
        ({"activation_checkpointing": True}, "give activation_checkpointing to TrainingArguments"),
        ({"cpu_offload": True}, "fsdp_offload_params"),
        ({"dynamo": DynamoBackend.EAGER}, "torch.compile and FSDP"),
    ],
)
def test_settings_of_fsdp_that_would_not_be_exact_are_refused(settings: dict[str, Any], reason: str) -> None:
    dynamo = SimpleNamespace(backend=settings.pop("dynamo", DynamoBackend.NO))
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **settings})
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=dynamo)
    accelerator: Any = SimpleNamespace(state=state, is_fsdp2=settings.get("fsdp_version") != 1)
    with pytest.raises(SparsityError, match=reason):
        FSDP2(accelerator).check_()


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    ],
)
def test_a_state_that_has_begun_changes_no_step(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def learnt(begins: bool) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = make(parameters[:1])
        for step in range(4):
            if step == 2:  # one comes late, as after a shrink
                optimizer.add_param_group({"params": parameters[1:]})
                if begins:
                    begin_states_(optimizer)
                    assert all(parameter in optimizer.state for parameter in parameters)
            sum((parameter**2).sum() for parameter in parameters[: 1 + (step > 1)]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in parameters]

    assert all(map(torch.equal, learnt(begins=True), learnt(begins=False)))


def test_a_model_in_shards_is_refused(tmp_path: Path) -> None:
    model = bert()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model.classifier.weight = nn.Parameter(distribute_tensor(model.classifier.weight.detach(), mesh))
        with pytest.raises(SparsityError, match="load it whole"):
            SparseTrainer(model=model, args=training_arguments(tmp_path), sparsity=SparsityConfig())
    finally:
        distributed.destroy_process_group()


def test_fp16_without_clipping_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = training_arguments(tmp_path, max_grad_norm=0.0)
    arguments.fp16 = True
    with pytest.raises(SparsityError, match="max_grad_norm"):
        SparseTrainer(model=bert(), args=arguments, sparsity=SparsityConfig(), train_dataset=rows(8))
