"""Cards, summaries and exports of saved models."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from launching import forks
from pruning import bart, bert, learnt, llama, plans, uniform
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_sparse import (
    CardFields,
    PruningPlan,
    SparsityConfig,
    SparsityError,
    compact,
    discover,
    export_anymodel,
    inspect_checkpoint,
    save_pruned,
)
from hf_sparse.cli import main
from hf_sparse.costs.table import parameter_costs
from hf_sparse.report.pictures import plot_structure
from hf_sparse.report.report import Origin, Report, command_line, hub_id, make_report
from hf_sparse.structure.blocks import LayerSizes
from hf_sparse.structure.example_inputs import example_inputs


def pruned_with_report(origin: Origin, make: Callable[[], PreTrainedModel] = bert) -> tuple[PreTrainedModel, Report]:
    dense, model = make(), make()
    structure = discover(model)
    compaction = compact(model, plans(model)["uneven"])
    metrics = ({"test": {"accuracy": 0.875}}, {"test": {"accuracy": 0.75}})
    inputs = example_inputs(dense)
    sparsity = SparsityConfig(p=0.4)
    costs = parameter_costs(structure, sparsity)
    return model, make_report(dense, model, structure, compaction, costs, sparsity, inputs, metrics, origin, seed=7)


CARD = """---
base_model: google-bert/bert-base-uncased
datasets: stanfordnlp/sst2
library_name: transformers
license: apache-2.0
metrics:
- accuracy
pipeline_tag: text-classification
tags:
- hf_sparse
- pruning
- structured-sparsity
- arxiv:1910.03201
model-index:
- name: tiny
  results:
  - task:
      type: text-classification
    dataset:
      name: SST-2
      type: stanfordnlp/sst2
      split: test
    metrics:
    - type: accuracy
      value: 0.75
      name: accuracy
    - type: accuracy
      value: 0.875
      name: accuracy (dense)
---
<!-- Written by hf_sparse; delete this line to keep your own text when the model is saved again. -->

# tiny

[google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased), made smaller while it was
fine-tuned on SST-2: 11,432 of 20,434 parameters are left.
Attention heads and FFN neurons that training drove to exactly zero by gradient descent
([arXiv:1910.03201](https://arxiv.org/abs/1910.03201)) are cut out of the weights.

## Use

With hf_sparse installed:

```python
import hf_sparse
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("me/tiny")
```

Without it, by the one file of code that comes with the model:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("me/tiny", trust_remote_code=True)
```

## Results

| | dense | pruned |
|---|---:|---:|
| accuracy, test | 0.8750 | 0.7500 |
| parameters | 20,434 | 11,432 |
| size of the weights | 0.1 MB | 0.0 MB |
| multiply-accumulates, 2 x 16 tokens | 0.00 G | 0.00 G |
| latency, 2 x 16 tokens | 40.1 ms | 32.5 ms |

66.3% of the prunable parameters was removed (asked for: 50%). It is 1.23 times
as fast on an abacus. The outputs of the gated model and of this one differ by at most
2.5e-07 on a batch of real data.

## Structure

![Heads and neurons kept in every layer](structure.png)

| sublayer | kind | kept | of |
|---|---|---:|---:|
| `bert.encoder.layer.0.attention.self` | attention | 1 | 4 |
| `bert.encoder.layer.0.intermediate` | ffn | 2 | 40 |
| `bert.encoder.layer.1.attention.self` | attention | 3 | 4 |
| `bert.encoder.layer.1.intermediate` | ffn | 4 | 40 |

## Training

```
python recipe.py --target 0.5
```

Seed 7; torch 3.1, transformers 6.0. Settings that differ from the defaults: `p=0.4`.
"""


PRINTED = """\
66.3% of the prunable parameters removed (target: 50.0%)
1.23 times as fast on an abacus
outputs differ from those of the gated model by at most 2.5e-07

                                       dense   pruned
parameters                            20,434   11,432
size of the weights                   0.1 MB   0.0 MB
multiply-accumulates, 2 x 16 tokens   0.00 G   0.00 G
latency, 2 x 16 tokens               40.1 ms  32.5 ms
test accuracy                         0.8750   0.7500

kind       sublayers  kept  of  removed as a whole
attention          2     4   8                   0
ffn                2     6  80                   0"""


def test_the_whole_card(tmp_path: Path) -> None:
    origin = Origin(
        base_model="google-bert/bert-base-uncased",
        task="text-classification",
        dataset="SST-2",
        dataset_id="stanfordnlp/sst2",
        command="python recipe.py --target 0.5",
    )
    model, report = pruned_with_report(origin)
    measured = {"speedup": 1.234, "device": "an abacus", "versions": {"torch": "3.1", "transformers": "6.0"}}
    dense, pruned = replace(report.dense, latency_ms=40.12), replace(report.pruned, latency_ms=32.5)
    report = replace(report, **measured, max_abs_diff=2.5e-7, dense=dense, pruned=pruned)
    save_pruned(model, tmp_path, report=report, about=CardFields("me/tiny", license="apache-2.0"))
    assert (tmp_path / "README.md").read_text() == CARD
    assert Report.read(tmp_path / "report.json") == report
    assert str(report) == PRINTED
    assert repr(report) == "Report(66.3% of the prunable parameters removed, 1.23 times as fast)"


def test_the_code_in_a_card_runs(tmp_path: Path) -> None:
    model, report = pruned_with_report(Origin())
    save_pruned(model, tmp_path / "pruned", report=report)
    stock = bert()
    compact(stock, uniform(stock, ffn=5))
    save_pruned(stock, tmp_path / "stock")
    for name, count in (("pruned", 2), ("stock", 1)):
        snippets = re.findall(r"```python\n(.*?)```", (tmp_path / name / "README.md").read_text(), re.DOTALL)
        assert len(snippets) == count
        for snippet in snippets:
            code = f"{snippet}\nprint(sum(p.numel() for p in model.parameters()))"
            run = forks().run("-c", code, cwd=tmp_path)
            assert run.returncode == 0, run.stderr
            assert int(run.stdout) == (model if name == "pruned" else stock).num_parameters()


def test_buffers_in_the_weights_do_not_cost_the_card_its_report(tmp_path: Path) -> None:
    model, report = pruned_with_report(Origin(), bart)
    save_pruned(model, tmp_path, report=report)
    assert report.pruned.parameters < inspect_checkpoint(tmp_path).parameters  # final_logits_bias
    assert "structure.png" in (tmp_path / "README.md").read_text()


def test_a_model_that_lost_neurons_of_experts_alone_has_a_picture(tmp_path: Path) -> None:
    plot_structure([LayerSizes("layers.0.mlp", "experts", 0, 10, 5)], "half", tmp_path / "structure.png")
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")


def test_a_sublayer_whose_bias_stays_is_not_exported(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "attention_bias": True}))
    attention, ffn = (
        next(block for block in discover(model).blocks if block.kind == kind) for kind in ("attention", "ffn")
    )
    compact(model, PruningPlan({attention.name: (), ffn.name: (1, 2)}))
    save_pruned(model, tmp_path / "pruned")
    with pytest.raises(SparsityError, match="keeps the bias of a removed sublayer"):
        export_anymodel(tmp_path / "pruned", tmp_path / "out")


def test_a_card_that_was_edited_stays(tmp_path: Path) -> None:
    model, report = pruned_with_report(Origin())
    save_pruned(model, tmp_path, report=report)
    main(["card", str(tmp_path), "--model_id", "me/other", "--license", "mit", "--tags", "small", "fast"])
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "mit" and {"small", "fast"} <= set(data.tags)
    save_pruned(model, tmp_path, report=report)  # what is not said again is kept
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "mit" and {"small", "fast"} <= set(data.tags)
    main(["card", str(tmp_path), "--model_id", "me/other"])
    assert 'from_pretrained("me/other")' in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My own\n")
    save_pruned(model, tmp_path, report=report)
    assert (tmp_path / "README.md").read_text() == "# My own\n"


def test_a_report_of_another_model_is_not_believed(tmp_path: Path) -> None:
    model, report = pruned_with_report(Origin(command="python recipe.py"))
    save_pruned(model, tmp_path, report=report)
    other = bert()
    compact(other, plans(other)["one"])
    save_pruned(other, tmp_path)
    assert "python recipe.py" not in (tmp_path / "README.md").read_text()
    for text in ("", "[]", "{}", '{"dense": 3}', "[" * 100_000):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(SparsityError, match="is not a report"):
            Report.read(tmp_path / "report.json")


def test_tokens_and_paths_stay_out_of_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = "hf_" + "a1" * 17
    words = ["/home/me/run.py", "--hub_token", "secret", f"--hub_token={token}", "--x", token, "--tokenizer", "a b"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command_line() == "python run.py --hub_token ... --hub_token=... --x ... --tokenizer 'a b'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line().startswith("accelerate launch run.py")
    model = bert()
    for name, expected in (("me/model", "me/model"), ("bert-base", "bert-base"), (str(tmp_path), None), ("", None)):
        model.config._name_or_path = name
        assert hub_id(model) == expected


def test_a_summary_is_read_off_the_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = learnt(llama())
    dense = llama().num_parameters()
    plan = compact(model).plan
    save_pruned(model.to(torch.bfloat16), tmp_path, max_shard_size="10KB")
    summary = inspect_checkpoint(tmp_path)
    assert summary.files > 1 and summary.dtypes == {"BF16": model.num_parameters()}
    assert (summary.parameters, summary.dense_parameters) == (model.num_parameters(), dense)
    assert summary.architecture == "LlamaForCausalLM" and summary.auto_class == "AutoModelForCausalLM"
    kept = {layer.block: layer.kept for layer in summary.layers}
    assert kept == {name: len(units) * (2 if "attn" in name else 1) for name, units in plan.kept.items()}
    main(["inspect", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"{model.num_parameters():,} of {dense:,} parameters" in shown and "model.layers.2.mlp" in shown
    compact(model, plans(model)["one"])
    save_pruned(model, tmp_path)
    again = inspect_checkpoint(tmp_path)
    assert [layer.units for layer in again.layers] == [layer.units for layer in summary.layers]


def test_a_decoder_is_rewritten_for_engines_with_layers_of_all_sizes(tmp_path: Path) -> None:
    model = llama()
    plan = {"model.layers.0.self_attn": (), "model.layers.1.self_attn": (0, 2), "model.layers.1.mlp": (1, 2, 3)}
    compact(model, PruningPlan({**plan, "model.layers.2.mlp": ()}))
    save_pruned(model, tmp_path / "in")
    (tmp_path / "in" / "report.html").write_text("load it with transformers")
    main(["anymodel", str(tmp_path / "in"), str(tmp_path / "out")])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["AnyModel"])
    assert config["base_architecture"] == "LlamaForCausalLM" and config["head_dim"] == 4
    assert config["block_configs"] == [
        {"attention": {"no_op": True}, "ffn": {"no_op": False, "intermediate_size": 40}},
        {
            "attention": {"no_op": False, "num_attention_heads": 4, "num_key_value_heads": 2},
            "ffn": {"no_op": False, "intermediate_size": 3},
        },
        {
            "attention": {"no_op": False, "num_attention_heads": 8, "num_key_value_heads": 4},
            "ffn": {"no_op": True},
        },
    ]
    assert not {"hf_sparse", "auto_map", "per_layer_config"} & config.keys()
    assert not list((tmp_path / "out").glob("*.py")) and not (tmp_path / "out" / "report.html").exists()
    weights = load_file(tmp_path / "out/model.safetensors")
    for index, block in enumerate(config["block_configs"]):
        heads, width = block["attention"].get("num_attention_heads"), block["ffn"].get("intermediate_size")
        query, up = f"model.layers.{index}.self_attn.q_proj.weight", f"model.layers.{index}.mlp.up_proj.weight"
        assert (heads is None) == (query not in weights) and (heads is None or weights[query].shape == (4 * heads, 32))
        assert (width is None) == (up not in weights) and (width is None or weights[up].shape == (width, 32))


def test_what_an_engine_could_not_serve_is_refused(tmp_path: Path) -> None:
    cases = [
        (bert(), plans(bert())["uneven"], "not an architecture that AnyModel has"),
        (llama(), uniform(llama(), attention=2), "a stock checkpoint"),
        (llama(), PruningPlan({"model.layers.0.mlp": ()}), "only lost whole sublayers"),
    ]
    for number, (model, plan, message) in enumerate(cases):
        compact(model, plan)
        save_pruned(model, tmp_path / str(number))
        with pytest.raises(SparsityError, match=message):
            export_anymodel(tmp_path / str(number), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reports_are_frozen_and_survive_json(tmp_path: Path) -> None:
    _, report = pruned_with_report(Origin())
    changed = replace(report, seed=8)
    changed.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == changed != report
