import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from launching import TESTS, forks
from pruning import PLANS, bert, learnt, llama, plans
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
)

from hf_sparse import SparsityError, compact, load_pruned, modeling_hf_sparse, save_pruned
from hf_sparse.structure.example_inputs import example_inputs


def outputs(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**example_inputs(model)).logits


@pytest.mark.parametrize("kind", PLANS)
def test_saving_and_loading_is_identity(model: PreTrainedModel, kind: str, tmp_path: Path) -> None:
    compact(model, plans(model)[kind])
    save_pruned(model, tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    assert torch.equal(outputs(loaded), outputs(model))
    save_pruned(loaded, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_learnt_models_load_through_the_auto_classes(tmp_path: Path) -> None:
    for make, auto in ((bert, AutoModelForSequenceClassification), (llama, AutoModelForCausalLM)):
        model = make()
        compact(learnt(model))
        model.save_pretrained(tmp_path / make.__name__)
        loaded = auto.from_pretrained(tmp_path / make.__name__)
        assert torch.equal(outputs(loaded), outputs(model))
        base = AutoModel.from_pretrained(tmp_path / make.__name__)
        assert base.num_parameters() <= model.base_model.num_parameters()


def test_twice_pruned_models_load(model: PreTrainedModel, tmp_path: Path) -> None:
    compact(model, plans(model)["uneven"])
    compact(model, plans(model)["some sublayers"] if len(plans(model)["some sublayers"].kept) else None)
    save_pruned(model, tmp_path / "out")
    assert torch.equal(outputs(load_pruned(tmp_path / "out")), outputs(model))


def test_with_neither_the_library_nor_trust_the_error_and_the_card_say_what_to_do(tmp_path: Path) -> None:
    model = bert()
    compact(learnt(model))
    save_pruned(model, tmp_path / "out")
    code = (
        "import sys\nsys.modules['hf_sparse'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"Auto.from_pretrained({str(tmp_path / 'out')!r})\n"
    )
    run = forks().run("-c", code)
    assert run.returncode == 1
    # The error is transformers' own: it names one way, and the place where the card names both.
    error = run.stderr[run.stderr.rindex("ValueError") :]
    assert "trust_remote_code=True" in error and str(tmp_path / "out") in error
    card = (tmp_path / "out/README.md").read_text()
    assert "import hf_sparse" in card and "trust_remote_code=True" in card


def test_the_checkpoint_has_stock_names_and_a_size_for_every_layer(tmp_path: Path) -> None:
    model = llama()
    stock = set(model.state_dict())
    compact(model, plans(model)["some sublayers"])
    save_pruned(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_hf_sparse.py",
    ]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "hf_sparse_llama" and config["base_model_type"] == "llama"
    assert config["base_architecture"] == "LlamaForCausalLM"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_sparse.HfSparseLlamaForCausalLM"
    assert config["per_layer_config"]["0"]["skip"] == ["attention"]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert set(file.keys()) < stock


def test_a_config_alone_gives_an_initialised_model() -> None:
    model = bert()
    compact(learnt(model))
    torch.manual_seed(0)
    one = AutoModelForSequenceClassification.from_config(model.config)
    torch.manual_seed(0)
    two = AutoModelForSequenceClassification.from_config(model.config)
    assert torch.equal(outputs(one), outputs(two)) and torch.isfinite(outputs(one)).all()
    assert {name: p.shape for name, p in one.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_pruned_model_is_fine_tuned_by_the_plain_trainer(tmp_path: Path) -> None:
    from pruning import rows, training_arguments

    model = bert()
    compact(learnt(model))
    save_pruned(model, tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")
    trainer = Trainer(model=loaded, args=training_arguments(tmp_path / "run"), train_dataset=rows(32))
    assert trainer.train().global_step == 40
    trainer.save_model(str(tmp_path / "again"))
    assert torch.equal(outputs(load_pruned(tmp_path / "again")), outputs(loaded))


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="still has gates"):
        save_pruned(learnt(bert()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SparsityError, match="no checkpoint at"):
        load_pruned(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsityError, match="cannot write"):
        save_pruned(bert(), tmp_path / "file" / "out")


def test_a_checkpoint_that_no_recipe_explains_is_refused_with_the_sizes_that_differ(tmp_path: Path) -> None:
    model = llama()
    stock = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    compact(learnt(model))
    for entries, message in (
        (stock, r"not made by hf_sparse.*tensors have other sizes .*proj.weight has \[\d+, \d+\] for \[\d+, \d+\]"),
        (stock | {"model_type": "hf_sparse_llama"}, "no recipe in hf_sparse: hf_sparse did not make it"),
    ):
        save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(entries))
        with pytest.raises(SparsityError, match=message):
            load_pruned(tmp_path)


def test_weights_that_do_not_fit_are_said_with_their_sizes_and_what_to_do(tmp_path: Path) -> None:
    model = bert()
    compact(learnt(model))
    save_pruned(model, tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"classifier\.bias has \[2\] for \[5\].* give ignore_mismatched_sizes=True"):
        load(tmp_path, num_labels=5)
    assert load(tmp_path, num_labels=5, ignore_mismatched_sizes=True).classifier.out_features == 5
    tied = LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "tie_word_embeddings": True}))
    compact(learnt(tied))
    save_pruned(tied, tmp_path / "tied")
    with pytest.raises(ValueError, match=r"have lm_head\.weight as the same tensor as the embeddings"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)


@pytest.mark.parametrize("exchanged", [True, False])
def test_an_adapter_of_an_earlier_model_is_not_applied(
    exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = {"adapter_config.json": "{}", "adapter_model.safetensors": "", "custom_generate/generate.py": ""}
    others = {"notes.txt": "", "tokenizer.json": "{}"}
    for name, text in (earlier | others).items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    if not exchanged:
        monkeypatch.setattr("hf_sparse.runtime.files._exchange", lambda one, other: False)
    save_pruned(bert(), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert others.keys() < left and not {name.split("/")[0] for name in earlier} & left


@pytest.mark.parametrize("broken", ["version", "name"])
def test_the_file_that_travels_says_which_version_it_needs(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "version":
        monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.3")
    else:
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", ModuleType("transformers.pytorch_utils"))
    with pytest.raises(ImportError, match=r"hf_sparse has pruned load with transformers 5\.14 or later"):
        runpy.run_path(modeling_hf_sparse.__file__)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 99, "update hf_sparse"),
        ("shapes", {"encoder.layer.0.output.dense.weight": [32, -1]}, "cannot be"),
        ("shapes", {"encoder.layer.0.output.dense.weight": [32, 10**12]}, "cannot be"),
        ("shapes", {"encoder.layer.0.output.dense.weight": [32, 10**6]}, "changed since"),
        ("attributes", {"encoder.layer.0.attention.self": {"num_attention_heads": -3}}, "cannot be"),
        ("sizes", {"num_attention_heads": 2}, "has num_attention_heads 4, but was 2 when it was pruned"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    model = bert()
    compact(learnt(model))
    save_pruned(model, tmp_path / "out")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["hf_sparse"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path / "out")


def test_a_kill_while_saving_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    done = forks().run(TESTS / "killed_while_saving.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "25 kills, 2 of 2 models seen" in done.stdout


def test_where_directories_cannot_be_swapped_files_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_sparse.runtime.files as directories

    monkeypatch.setattr(directories, "_exchange", lambda one, other: False)
    model = bert()
    save_pruned(model, tmp_path / "out")
    (tmp_path / "out/report.json").write_text("mine")
    compact(model, plans(model)["uneven"])
    save_pruned(model, tmp_path / "out")
    assert torch.equal(outputs(load_pruned(tmp_path / "out")), outputs(model))
    assert (tmp_path / "out/report.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    model = bert()
    save_pruned(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code = (
        "import resource, signal, sys\n"
        "from pruning import bert\n"
        "from hf_sparse import SparsityError, save_pruned\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model = bert(3)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "try:\n"
        f"    save_pruned(model, {str(tmp_path / 'out')!r})\n"
        "except SparsityError as error:\n"
        "    print(error)\n"
    )
    run = forks().run("-c", code, cwd=TESTS)
    assert run.returncode == 0 and run.stdout.startswith(f"cannot write {tmp_path / 'out'}"), run.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everybody_may_read_what_was_saved(tmp_path: Path) -> None:
    save_pruned(bert(), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
