"""The recipe end to end on a tiny model, and everything that a user may get wrong."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from common import running
from common.arguments import INSTEAD
from launching import command, environment, forks, free_port
from pruning import bert
from recipe_runs import start, words
from text_classification import Arguments, TextClassification
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_sparse import SparsityError, load_pruned
from hf_sparse.training.resume import checkpoint_defect

RECIPES = Path(__file__).parents[1] / "recipes"
ABSENT = "this flag is not given"
SHORT = {"--learning_rate": 1e-3, "--per_device_train_batch_size": 4, "--dense_epochs": 2, "--report_to": "none"}
WORDS = [f"word{index}" for index in range(95)]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny")


def tiny_model(directory: Path) -> Path:
    """A tiny BERT with its tokenizer, saved."""
    bert(layers=2, hidden_size=32, num_attention_heads=8, intermediate_size=64).base_model.save_pretrained(directory)
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    fast.save_pretrained(directory)
    return directory


def write(path: Path, count: int, separator: str = ",", labels: str = "ab", seed: int = 0) -> Path:
    """Sentences labelled by whether their first word comes early in the vocabulary."""
    generator = random.Random(seed)
    lines = [f"sentence{separator}label"]
    for _ in range(count):
        words = generator.choices(WORDS, k=6)
        lines.append(" ".join(words) + separator + labels[int(words[0].removeprefix("word")) // 48])
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    return {
        "--train_file": str(write(tmp_path / "train.csv", 48)),
        "--validation_file": str(write(tmp_path / "dev.csv", 16, seed=1)),
    }


Run = Callable[[dict[str, object]], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> Run:
    """Runs the recipe in this process with flags over these defaults; returns its exit code."""

    def run(flags: dict[str, object]) -> int:
        defaults: dict[str, object] = {
            "--model_name_or_path": tiny,
            "--output_dir": tmp_path / "out",
            "--learning_rate": 1e-3,
            "--per_device_train_batch_size": 8,
            "--dense_epochs": 2,
            "--num_train_epochs": 4,
            "--report_to": "none",
            "--use_cpu": True,
            "--dataloader_pin_memory": False,
        }
        given = {flag: value for flag, value in {**defaults, **flags}.items() if value != ABSENT}
        monkeypatch.chdir(tmp_path)
        return start(TextClassification, given, monkeypatch)

    return run


def test_the_recipe_leaves_a_small_model_a_report_and_a_picture(
    run: Run, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write(tmp_path / "test.csv", 24, seed=2)
    assert run({**data, "--test_file": test, "--target": 0.5, "--cost": "macs"}) == 0
    out = tmp_path / "out"
    shown = capsys.readouterr().out
    assert "test accuracy" in shown and "speedup" not in shown and "x faster on cpu" in shown
    report = json.loads((out / "report.json").read_text())
    assert {"target", "achieved", "cost", "max_abs_diff", "dense", "pruned", "speedup", "layers", "versions"} <= set(
        report
    )
    for model in ("dense", "pruned"):
        assert set(report[model]) == {
            "parameters",
            "weight_bytes",
            "macs",
            "latency_ms",
            "metrics",
            "tokens_per_second",
            "prefill_tokens_per_second",
            "cache_bytes_per_token",
        }
        assert set(report[model]["metrics"]) == {"validation", "test"}
        assert set(report[model]["metrics"]["test"]) == {"accuracy", "f1"}
    assert report["cost"] == "macs" and abs(report["achieved"] - 0.5) <= 0.04 and report["max_abs_diff"] <= 1e-4
    assert report["pruned"]["parameters"] < report["dense"]["parameters"]
    assert report["pruned"]["macs"] < report["dense"]["macs"]
    assert report["pruned"]["weight_bytes"] < report["dense"]["weight_bytes"]
    card = (out / "README.md").read_text()
    assert "text_classification.py --train_file" not in card and "--cost macs" in card and "accuracy (dense)" in card
    assert (out / "structure.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.num_parameters() == report["pruned"]["parameters"] and model.config.id2label == {0: "a", 1: "b"}
    assert AutoTokenizer.from_pretrained(out)("word3")["input_ids"] == [7]
    kept = {(layer["layer"], layer["kind"]): layer["kept"] for layer in report["layers"]}
    for layer in range(2):
        assert model.config.per_layer_config[layer].num_attention_heads == max(kept[layer, "attention"], 1)

    # The directory holds a run now, and a finished one has nothing left to resume but its last checkpoint.
    assert run({**data, "--test_file": test}) == 2
    assert "holds another run: go on with --resume_from_checkpoint auto" in capsys.readouterr().err
    weights = (out / "model.safetensors").read_bytes()
    assert run({**data, "--test_file": test, "--cost": "macs", "--resume_from_checkpoint": "auto"}) == 0
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"--max_train_samples": 0}, "give a number above 0"),
        ({"--train_file": ABSENT, "--validation_file": ABSENT, "--test_file": "test.csv"}, "goes with --train_file"),
        ({"--dataset_name": "me/data"}, "leave one of them out"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(
    flags: dict[str, object], reason: str, run: Run, data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({**data, **flags}) == 2
    assert reason in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_said_before_any_work(
    run: Run,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert run({**data, "--push_to_hub": None, "--hub_token": "hf_x"}) == 2
    assert "--push_to_hub: the Hub does not say who you are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_text_is_said_with_its_row(
    run: Run, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "dev.csv").open("a") as file:
        file.write(",a\n")
    assert run(dict(data)) == 2
    assert "column 'sentence' is empty in row 17 of the validation data" in capsys.readouterr().err


def test_a_teacher_without_a_head_for_the_labels_is_refused(
    run: Run, data: dict[str, str], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({**data, "--teacher_name_or_path": tiny}) == 2
    assert "has no head that was trained for a, b" in capsys.readouterr().err


def test_several_targets_leave_a_family(
    run: Run, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {"--targets": "0.3", "0.6": None, "--num_train_epochs": 10}
    assert run({**data, **targets}) == 0
    shown = capsys.readouterr().out
    assert "| removed-0.3 |" in shown and "| removed-0.6 |" in shown and "evaluation accuracy" in shown
    sizes = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name).num_parameters()
        for name in ("removed-0.3", "removed-0.6", "")
    ]
    assert sizes[0] > sizes[1] == sizes[2]


def test_a_uniform_layout_leaves_a_stock_model(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    assert run({**data, "--layout": "uniform", "--target": 0.5}) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "bert" and config["intermediate_size"] < 64
    assert "a stock BertForSequenceClassification" in (tmp_path / "out/README.md").read_text()
    assert "trust_remote_code" not in (tmp_path / "out/README.md").read_text()


def test_a_broken_newest_checkpoint_is_passed_over(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    assert run(data) == 0
    out = tmp_path / "out"
    weights = (out / "model.safetensors").read_bytes()
    newest = out / "checkpoint-24"
    (newest / "trainer_state.json").unlink()
    assert checkpoint_defect(out / "checkpoint-18") is None and checkpoint_defect(newest) is not None
    assert run({**data, "--resume_from_checkpoint": "auto"}) == 0
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_trained_head_is_not_trained_again_unless_asked_for(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    assert run(data) == 0
    trained = {**data, "--model_name_or_path": tmp_path / "out/dense/model", "--num_train_epochs": 1}
    assert run({**trained, "--output_dir": tmp_path / "more", "--dense_epochs": ABSENT}) == 0
    assert not (tmp_path / "more/dense").exists()
    assert run({**trained, "--output_dir": tmp_path / "again", "--dense_epochs": 1}) == 0
    assert (tmp_path / "again/dense/model").is_dir()


@pytest.mark.parametrize(("suffix", "separator"), [(".tsv", "\t"), (".json", "")])
def test_other_files_and_columns(run: Run, tmp_path: Path, suffix: str, separator: str) -> None:
    files = {}
    for split, count in (("train", 48), ("validation", 16)):
        csv = write(tmp_path / f"{split}.csv", count, separator="\t")
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".json":
            rows = [line.split("\t") for line in csv.read_text().splitlines()[1:]]
            path.write_text("\n".join(json.dumps({"text": text, "class": label}) for text, label in rows))
        else:
            path.write_text(csv.read_text())
        files[f"--{split}_file"] = path
    columns = {"--text_column_name": "text", "--label_column_name": "class"} if suffix == ".json" else {}
    unlabelled = tmp_path / "unlabelled.csv"
    unlabelled.write_text("\n".join([columns.get("--text_column_name", "sentence"), *WORDS[:9]]) + "\n")
    files |= {"--test_file": unlabelled, "--do_predict": None}
    assert run({**files, **columns, "--num_train_epochs": 1, "--dense_epochs": 1}) == 0
    header, *lines = (tmp_path / "out/predict_results.txt").read_text().splitlines()
    assert header == "index\tprediction"
    classify = pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    assert lines == [f"{index}\t{classify(word)[0]['label']}" for index, word in enumerate(WORDS[:9])]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--target": 0}, "target is 0.0: give a number between 0 and 1"),
        ({"--target": 1.5}, "target is 1.5: give a number between 0 and 1"),
        ({"--target": "half"}, "argument --target: invalid float value: 'half'"),
        ({"--target": 0.9999}, "target 0.9999 would remove everything"),
        ({"--gate": "soft"}, "argument --gate: invalid choice: 'soft'"),
        ({"--cost": "euros"}, "argument --cost: invalid choice: 'euros'"),
        ({"--group": "all"}, "argument --group: invalid choice: 'all'"),
        ({"--train_file": "nowhere.csv"}, "nowhere.csv: there is no such file"),
        ({"--train_file": "data.parquet"}, "give a .csv, .tsv, .json or .jsonl file"),
        ({"--validation_file": ABSENT}, "--validation_file is missing"),
        ({"--text_column_name": "review"}, "has no column 'review', only sentence, label"),
        ({"--label_column_name": "stars"}, "has no column 'stars', only sentence, label"),
        ({"--validation_file": "other.csv"}, "labels that the training data lacks: z"),
        ({"--train_file": "empty.csv"}, "the train data is empty"),
        ({"--validation_file": "bytes.csv"}, "the validation data is empty"),
        ({"--train_file": "same.csv"}, "one label only"),
        ({"--validation_file": "gap.csv"}, "rows without a label in column 'label'"),
        ({"--do_predict": None}, "--do_predict needs test data"),
        ({"--test_file": "bare.csv"}, "has no labels in a column 'label'"),
        ({"--train_file": "broken.json"}, "cannot be read as json"),
        ({"--output_dir": "a_file"}, "is a file: give a directory"),
        ({"--output_dir": "a_file/out"}, "cannot be written"),
        ({"--output_dir": "full"}, "holds another run"),
        ({"--output_dir": None}, "expected one argument"),
        ({"--output_dir": ABSENT}, "--output_dir is missing"),
        ({"--model_name_or_path": "unprunable"}, "has no attention heads or FFN neurons"),
        ({"--model_name_or_path": "untold"}, "untold has no tokenizer"),
        ({"--model_name_or_path": "no/such_model"}, "cannot load the"),
        ({"--teacher_name_or_path": "no/such_teacher"}, "cannot load the model no/such_teacher"),
        ({"--resume_from_checkpoint": "checkpoint-7"}, "is not a whole checkpoint"),
        ({"--load_best_model_at_end": None, "--save_strategy": "no"}, "requires the save and eval strategy to match"),
        ({"--no_such_flag": 1}, "unknown flag --no_such_flag"),
        ({"--prediction_loss_only": True}, "--prediction_loss_only would leave out"),
        ({"--batch_eval_metrics": True}, "--batch_eval_metrics would leave out"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    run: Run,
    data: dict[str, str],
    tiny: Path,
    tmp_path: Path,
    flags: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "other.csv", 8, labels="az", seed=3)
    write(tmp_path / "empty.csv", 0)
    write(tmp_path / "same.csv", 8, labels="aa")
    (tmp_path / "gap.csv").write_text("sentence,label\nword1 word2,a\nword3 word4,\n")
    (tmp_path / "bare.csv").write_text("sentence\nword1 word2\n")
    (tmp_path / "bytes.csv").write_text("")
    (tmp_path / "broken.json").write_text('{"sentence": ')
    (tmp_path / "a_file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").write_text("mine")
    config = DistilBertConfig(vocab_size=99, dim=8, n_heads=1, n_layers=0, hidden_dim=8)
    if flags.get("--model_name_or_path") == "unprunable":
        DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "unprunable")
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "unprunable")
    bert().save_pretrained(tmp_path / "untold")
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert run({**data, **flags}) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert sorted(path for path in tmp_path.rglob("*")) == before


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def pairs(count: int, seed: int, label: Callable[[int], object]) -> list[dict[str, Any]]:
    """Pairs of sentences labelled by the number of the word that the first begins with."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = generator.choices(WORDS, k=6), generator.choices(WORDS, k=4)
        number = int(first[0].removeprefix("word"))
        rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": label(number)})
    return rows


KINDS: dict[str, tuple[Callable[[int], object], dict[str, object], set[str]]] = {
    "regression": (lambda n: n / 95, {"--task_name": "stsb"}, {"pearson", "spearmanr"}),
    "several": (lambda n: ["a"] * (n < 70) + ["b"] * (n > 30), {}, {"f1", "accuracy"}),
    "cola": (lambda n: n % 2, {"--task_name": "cola", "--text_column_names": "sentence1"}, {"matthews_correlation"}),
    "mrpc": (lambda n: n // 48, {"--task_name": "mrpc", "--pad_to_max_length": None}, {"accuracy", "f1"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_numbers_and_several_labels(kind: str, run: Run, tmp_path: Path) -> None:
    label, flags, names = KINDS[kind]
    files = {
        f"--{split}_file": write_json(tmp_path / f"{split}.json", pairs(count, count, label))
        for split, count in (("train", 48), ("validation", 16), ("test", 9))
    }
    short = {"--num_train_epochs": 1, "--dense_epochs": 1, "--do_train": None, "--do_eval": None, "--do_predict": None}
    assert run({**files, **flags, **short}) == 0
    out = tmp_path / "out"
    found = json.loads((out / "eval_results.json").read_text())
    assert {f"eval_{name}" for name in names} | {"eval_samples", "eval_loss"} <= set(found)
    everything = json.loads((out / "all_results.json").read_text())
    assert found.items() <= everything.items() and everything["train_samples"] == 48
    assert everything.keys() >= json.loads((out / "train_results.json").read_text()).keys()
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6
    lines = (out / "predict_results.txt").read_text().splitlines()[1:]
    model, tokenizer = load_pruned(out).eval(), AutoTokenizer.from_pretrained(out)
    for line, row in zip(lines, pairs(9, 9, label), strict=True):
        texts = [row[name] for name in ("sentence1", "sentence2")[: 1 if kind == "cola" else 2]]
        logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0].tolist()
        said = line.split("\t")[1]
        if kind == "regression":
            assert float(said) == pytest.approx(logits[0], abs=2e-3)
        elif kind == "several":
            assert said == ", ".join(name for name, logit in zip("ab", logits) if logit > 0)
        else:
            assert said == str(int(logits[1] > logits[0]))


def test_flags_come_from_one_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "flags.yaml"
    yaml.write_text(
        "output_dir: out\ntargets: [0.3, 0.6]\nuse_cpu: true\ntrain_file: nowhere.csv\nvalidation_file: x.csv\n"
    )
    (tmp_path / "flags.json").write_text(
        json.dumps({"output_dir": "out", "targets": [0.3, 0.6], "use_cpu": True, "no_such_flag": 1})
    )
    (tmp_path / "list.yaml").write_text("- 1")
    for name, said in (
        ("flags.yaml", "--train_file nowhere.csv: there is no such file"),
        ("flags.json", "unknown flag --no_such_flag"),
        ("list.yaml", "holds no flags"),
        ("absent.yml", "absent.yml cannot be read"),
    ):
        monkeypatch.setattr(sys, "argv", ["text_classification.py", str(tmp_path / name)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            running.run(TextClassification, None)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_flag_without_a_meaning_is_named_with_what_to_do(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, said in INSTEAD.items():
        assert run({f"--{flag}": "True"}) == 2
        assert f"error: --{flag} has no meaning here: {said}" in capsys.readouterr().err


def test_data_under_a_field_and_splits_of_other_names_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"version": "1", "data": rows}, indent=1))
    flags = Arguments(train_file=str(whole), validation_file=str(whole))
    assert running.load_data(TextClassification(flags), seed=0).splits["train"]["label"][:] == [0, 1]
    assert Arguments(task_name="mnli").split_names["validation"] == "validation_matched"
    assert Arguments(task_name="mnli").on_hub == ("nyu-mll/glue", "mnli")
    assert Arguments(task_name="mnli", train_file="a").on_hub == (None, None)
    assert Arguments(validation_split_name="dev").split_names == {"train": "train", "validation": "dev", "test": "test"}


def test_predictions_are_in_the_order_of_the_rows(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    lines = [" ".join(WORDS[start : start + 1 + 5 * (start % 2)]) for start in range(40)]
    (tmp_path / "test.csv").write_text("\n".join(["sentence", *lines]) + "\n")
    flags = {"--train_sampling_strategy": "group_by_length", "--num_train_epochs": 1, "--per_device_eval_batch_size": 2}
    assert run({**data, **flags, "--test_file": "test.csv", "--do_predict": None}) == 0
    classify = pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    said = [line.split("\t")[1] for line in (tmp_path / "out/predict_results.txt").read_text().splitlines()[1:]]
    assert said == [classify(line)[0]["label"] for line in lines]


def test_a_loss_that_becomes_nan_is_one_line_too(
    run: Run, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({**data, "--learning_rate": 1e30, "--max_grad_norm": 0}) == 2
    assert "error: weights became NaN or infinite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("report.json")) and not (tmp_path / "out/model.safetensors").exists()


def test_help_teaches(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run({"--help": None}) == 0
    shown = capsys.readouterr().out
    for part in (
        "Fine-tune and prune a text classifier",
        "--target",
        "--teacher_name_or_path",
        "Share of the prunable",
    ):
        assert part in shown


# ---- Engines ----


@pytest.mark.parametrize("engine", [{"fsdp": "SHARDED_STATE_DICT"}, {"zero": 3}], ids=str)
def test_the_recipe_runs_sharded(engine: dict[str, Any], tiny: Path, data: dict[str, str], tmp_path: Path) -> None:
    flags = {**data, "--model_name_or_path": tiny, "--output_dir": tmp_path / "out", **SHORT}
    few = {"--max_train_samples": 32, "--max_eval_samples": 8, "--dense_epochs": 1, "--num_train_epochs": 5}
    switches = ("--use_cpu", "--bf16", "--gradient_checkpointing", "--targets", 0.3, 0.6)
    launch = command(2, "launched_recipe.py", *words(flags | few), *switches, **engine)
    run = forks("zero" in engine).run(*launch[1:], env=environment(tmp_path, engine.get("zero")))
    assert run.returncode == 0, run.stderr[-5000:]
    assert "of the prunable parameters removed (target 60%)" in run.stdout
    for member in (".", "removed-0.3", "removed-0.6", "dense/model"):
        assert load_pruned(tmp_path / "out" / member).num_parameters() > 0


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and config.num_processes >= 1
    if path.stem == "fsdp":
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    if path.stem == "zero2":
        assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == 2


def test_words_and_quotes_in_files_are_what_they_look_like(tmp_path: Path) -> None:
    lines = ['"so it begins\tNA', "null\tother", "plain\tNA", 'it ends"\tother']
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    files = {"train_file": str(tmp_path / "train.tsv"), "validation_file": str(tmp_path / "dev.tsv")}
    data = running.load_data(TextClassification(Arguments(**files)), seed=0)
    assert data.labels == ("NA", "other")
    assert data.splits["train"]["sentence"][:] == [line.split("\t")[0] for line in lines]
    (tmp_path / "several.json").write_text(json.dumps({"sentence": "a", "label": ["x", "y"]}))
    with pytest.raises(SparsityError, match="several labels in a row"):
        running.load_data(
            TextClassification(Arguments(**{**files, "train_file": str(tmp_path / "several.json")})), seed=0
        )
