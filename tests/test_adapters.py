"""Adapters of peft train beside the gates, and are merged where weights have to be plain."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from pruning import MODELS, StopAt, rows, trainer, without_dropout
from torch import nn
from transformers import PreTrainedModel

from hf_sparse import DenseTrainer, SparseTrainer, SparsityConfig, SparsityError, load_pruned
from hf_sparse.gates.row_slopes import batched_sensitivities
from hf_sparse.gates.sensitivity import sensitivities
from hf_sparse.structure.example_inputs import example_inputs
from hf_sparse.structure.prunable import adapters
from hf_sparse.training.adapters import Adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft's, on GPT-2's transposed weights
]

LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}),
    "beside the gates only": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "with a head": ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "dora": ("llama", {"target_modules": ["o_proj", "down_proj"], "use_dora": True}),
}
SHORT = SparsityConfig(round_to=1, sparsity_ramp=0.4, sparsity_hold=0.2)


@pytest.fixture(params=LORA)
def adapted(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Makes a model of peft whose adapters change what it computes."""
    name, options = LORA[request.param]

    def make() -> Any:
        torch.manual_seed(0)
        model = without_dropout(MODELS[name]())
        made = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options)).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return made

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.eval()(**example_inputs(base)).logits


def texts(model: nn.Module, count: int = 64) -> Dataset:
    """Rows with labels that the model has a loss for."""
    data = rows(count)
    if "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        data = data.map(lambda row: {"labels": row["input_ids"]})
    return data


def run_of(directory: Path, model: Any, **options: Any) -> SparseTrainer:
    base = model.get_base_model()
    run = trainer(directory, model, **{"sparsity": SHORT, "train_dataset": texts(base), **options})
    run.eval_dataset = texts(base, 16)
    return run


def close_some_(run: SparseTrainer) -> None:
    generator = torch.Generator().manual_seed(1)
    for group in run.bank.groups.values():
        group.alpha.data = 2 * torch.randn(group.alpha.shape, generator=generator)
        group.beta.data += 2.0


def test_open_gates_change_nothing(adapted: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted()
    before = logits(model)
    run = run_of(tmp_path, model)
    assert run.model is model.get_base_model()
    assert torch.equal(logits(run.model), before)


def test_gates_scale_weights_and_their_adapters_alike(adapted: Callable[[], Any], tmp_path: Path) -> None:
    run = run_of(tmp_path, adapted())
    close_some_(run)
    gated = logits(run.model)
    run.compact()
    assert not adapters(run.model)
    torch.testing.assert_close(logits(run.model), gated, rtol=1e-4, atol=1e-5)


def test_adapters_step_aside_and_come_back(adapted: Callable[[], Any], tmp_path: Path) -> None:
    model, own = Adapters.of(adapted())
    before, weights = logits(model), [parameter.clone() for parameter in model.parameters()]
    with own.aside(model):
        assert not adapters(model)
        assert not torch.allclose(logits(model), before)
    with own.merged(model):
        assert not adapters(model)
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)
    assert all(map(torch.equal, model.parameters(), weights))


def test_sensitivities_are_those_of_the_merged_model(adapted: Callable[[], Any], tmp_path: Path) -> None:
    run = run_of(tmp_path, adapted())
    model, bank, data = run.bare_model, run.bank, texts(run.bare_model, 8).with_format("torch")

    def loss_of(batch: Any) -> torch.Tensor:
        return model(**batch).loss

    batches = [data[:4], data[4:]]
    single = [data[row : row + 1] for row in range(8)]
    together = batched_sensitivities(model, bank, batches, [single[0], single[3]], loss_of)
    alone = sensitivities(bank, single, loss_of)
    assert together is not None
    run.stages.adapters.merge_(model)
    assert not bank.scales_inputs
    merged = sensitivities(bank, single, loss_of)
    for name in merged:
        torch.testing.assert_close(alone[name], merged[name], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(together[name], merged[name], rtol=1e-3, atol=1e-7)


def test_gates_and_adapters_train_and_nothing_else(adapted: Callable[[], Any], tmp_path: Path) -> None:
    run = run_of(tmp_path, adapted(), max_steps=5)
    base = {name: value for name, value in run.bare_model.named_parameters() if not value.requires_grad}
    before = {name: value.clone() for name, value in base.items()}
    run.train()
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in base.items())
    trained = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert not trained & set(map(id, base.values()))
    assert {id(parameter) for parameter in run.bank.parameters()} <= trained


@pytest.mark.parametrize("keep_adapter", [False, True])
def test_what_is_saved_is_what_was_trained(adapted: Callable[[], Any], keep_adapter: bool, tmp_path: Path) -> None:
    model = adapted()
    teacher = copy.deepcopy(model).merge_and_unload()
    sparsity = SparsityConfig(round_to=1, sparsity_ramp=0.4, sparsity_hold=0.2, keep_adapter=keep_adapter)
    run = run_of(tmp_path, model, teacher=teacher, sparsity=sparsity)
    run.train()
    assert run.search.in_last_form
    assert adapters(run.model)
    trained = logits(run.model)
    run.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(run.model), trained)
    loaded: Any = load_pruned(tmp_path / "saved")
    assert loaded.num_parameters() < teacher.num_parameters()
    if keep_adapter:
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "saved" / "adapter").eval()
        assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    run.compact()
    assert bool(adapters(run.model)) == keep_adapter


@pytest.mark.parametrize("step", [10, 35])
def test_it_goes_on_where_it_stopped(adapted: Callable[[], Any], step: int, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", adapted())
    whole.train()
    stopped = run_of(tmp_path / "run", adapted(), callbacks=[StopAt(step)])
    stopped.train()
    resumed = run_of(tmp_path / "run", adapted())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plan() == whole.plan()
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=1e-5, atol=1e-6)


def test_several_targets(adapted: Callable[[], Any], tmp_path: Path) -> None:
    sparsity = SparsityConfig(targets=[0.3, 0.6], round_to=1, sparsity_ramp=0.4, sparsity_hold=0.2)
    run = run_of(tmp_path, adapted(), sparsity=sparsity, max_steps=80)
    run.train()
    sizes = [load_pruned(tmp_path / f"removed-{target}").num_parameters() for target in (0.3, 0.6)]
    assert sizes[1] < sizes[0]


def test_half_precision_is_kept_and_adapters_are_not_rounded(tmp_path: Path) -> None:
    model = MODELS["llama"]().bfloat16()
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))  # adapters are in float32
    run = run_of(tmp_path, made, bf16=True)
    run.train()
    dtypes = {value.requires_grad: value.dtype for value in run.bare_model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    run.save_model(str(tmp_path / "saved"))
    assert load_pruned(tmp_path / "saved").dtype == torch.bfloat16


def test_a_dense_model_is_trained_by_adapters_too(adapted: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted()
    base: PreTrainedModel = model.get_base_model()
    arguments = run_of(tmp_path, adapted(), max_steps=5).args
    dense = DenseTrainer(model=model, args=arguments, train_dataset=texts(base))
    dense.train()
    trained = logits(base)
    dense.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(logits(load_pruned(tmp_path / "saved")), trained, rtol=1e-4, atol=1e-5)
    dense.make_whole_()
    assert not adapters(base)
    torch.testing.assert_close(logits(base), trained, rtol=1e-4, atol=1e-5)


def _two(model: PreTrainedModel) -> Any:
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    made.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    return made


def _frozen(model: PreTrainedModel) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).requires_grad_(False)


def _prompt(model: PreTrainedModel) -> Any:
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_two, "has 2 adapters, around"), (_prompt, "around 0 layers"), (_frozen, "load them with is_trainable=True")],
)
def test_what_cannot_be_merged_is_refused(make: Callable[[Any], Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=reason):
        run_of(tmp_path, make(MODELS["llama"]()))
