"""Estimates of memory against what torch allocates."""

from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from launching import command, environment, forks
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, T5Config, T5ForConditionalGeneration

from hf_sparse import PruningPlan, SparsityError, compact, discover
from hf_sparse.cli import main
from hf_sparse.costs.memory import Engine, estimate_memory

GIB = 2**30
BERT = BertConfig(
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    intermediate_size=1024,
    vocab_size=8000,
    architectures=["BertForSequenceClassification"],
)
LLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=64,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    architectures=["LlamaForCausalLM"],
)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("zero", "batch", "settings"),
    [
        (None, 16, {}),
        (None, 16, {"gradient_checkpointing": True}),
        (3, 2, {"bf16": True}),  # bf16 is slow on processors
        (None, 16, {"lora_r": 4}),
        (None, 16, {"lora_r": 4, "gradient_checkpointing": True}),
    ],
)
def test_the_estimate_is_the_peak_of_a_step_or_a_little_more(
    zero: int | None, batch: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    BERT.save_pretrained(tmp_path)
    engine: Engine = "single" if zero is None else cast(Engine, f"zero{zero}")
    processes = 1 if zero is None else 2
    given = [(f"--{name}",) if value is True else (f"--{name}", value) for name, value in settings.items()]
    flags = ("--batch", batch, "--length", 128, *chain.from_iterable(given))
    script = command(processes, "trained_for_memory.py", tmp_path, *flags, zero=zero)
    run = forks(zero is not None).run(*script[1:], env=environment(tmp_path, zero))
    assert run.returncode == 0, run.stderr[-3000:]
    [peak] = [int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("peak: ")]
    renamed = {{"lora_r": "adapter_rank"}.get(name, name): value for name, value in settings.items()}
    estimate = estimate_memory(BERT, engine, processes, batch_size=batch, sequence_length=128, **renamed)
    bucket = estimate.parts.get("bucket of gradients", 0)  # larger by far than all else here
    assert 0.9 <= (estimate.training - bucket) / (peak - bucket) <= 1.2


def test_units_of_a_twin_are_those_of_the_model() -> None:
    t5 = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=4, num_heads=4, vocab_size=100,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    for config, architecture in ((BERT, BertForSequenceClassification), (t5, T5ForConditionalGeneration)):
        blocks = discover(architecture(config).eval()).blocks
        assert estimate_memory(config, sequence_length=16).units == sum(block.units for block in blocks)


def test_a_large_model_is_planned_without_its_memory() -> None:
    given = {"processes": 8, "batch_size": 1, "bf16": True, "gradient_checkpointing": True}
    sharded = estimate_memory(LLAMA, "fsdp", **given)
    copied = estimate_memory(LLAMA, "ddp", **given)
    assert sharded.units == copied.units == 64 * (8 + 8192)
    for name in ("weights", "gradients", "optimizer"):
        assert sharded.parts[name] == copied.parts[name] // 8
    assert sharded.parts["gates and their optimizer"] < 0.02 * GIB
    assert sharded.training < 12 * GIB < 80 * GIB < copied.training
    # To shrink it FSDP puts the whole model together, on the host.
    assert sharded.training < 12 * GIB < sharded.host and sharded.shrinking < 12 * GIB < copied.shrinking
    assert copied.host == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
def test_an_8b_model_with_an_adapter_fits_24_gb() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    given = {"batch_size": 1, "sequence_length": 2048, "bf16": True, "gradient_checkpointing": True}
    adapted, whole = estimate_memory(config, **given, adapter_rank=16), estimate_memory(config, **given)
    assert adapted.parts["weights"] == whole.parts["weights"] > 14 * GIB
    assert 1.1 * max(adapted.training, adapted.shrinking) < 24e9 < whole.training
    assert adapted.host > 2 * adapted.parts["weights"]


def test_zero_shares_the_optimizer_and_from_stage_2_the_gradients() -> None:
    one, two = (estimate_memory(BERT, engine, 4, bf16=True).parts for engine in ("zero1", "zero2"))
    total = one["weights"] // 2
    assert one["optimizer"] == two["optimizer"] == 8 * total // 4
    assert one["optimizer's weights in float32"] == total
    assert one["gradients"] == 2 * total == 4 * two["gradients"]


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BERT.save_pretrained(tmp_path)
    given = ["--engine", "fsdp", "--num_processes", "4", "--bf16", "--teacher_name_or_path", str(tmp_path)]
    main(["estimate", str(tmp_path), *given])
    printed = capsys.readouterr().out
    assert "teacher" in printed and "peak of a step" in printed and "3,096 heads and neurons" in printed
    with pytest.raises(SystemExit) as raised:
        main(["estimate", str(tmp_path / "missing")])
    assert raised.value.code == 2 and "cannot read the config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"processes": 0}, "give numbers of at least 1"),
        ({"target": 5.0}, "a target between 0 and 1"),
        ({"engine": "fsdp", "adapter_rank": 4}, "an adapter of rank 4 with fsdp"),
        ({"sequence_length": 1000}, "cannot be run on 1000 tokens"),
    ],
)
def test_what_cannot_be_estimated_is_said(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(SparsityError, match=reason):
        estimate_memory(BERT, **options)


def test_a_pruned_model_is_not_estimated(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BERT)
    [first, *_] = discover(model).blocks
    compact(model, PruningPlan({first.name: (0, 3)}))
    with pytest.raises(SparsityError, match="pruned already"):
        estimate_memory(model.config)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(SparsityError, match="names BertForNothing"):
        estimate_memory(BertConfig(architectures=["BertForNothing"]))
