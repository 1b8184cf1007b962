"""The real client of the Hub against a server on the loopback interface: what is pushed is what others load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard

from hf_sparse import load_pruned
from hf_sparse.cli import main
from hf_sparse.inputs import example_inputs

TESTS = Path(__file__).parent


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """A user's: an own cache, no token in it, and the loopback server for a Hub."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def push(server: HubServer, way: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "pushed.py", way, directory, TOKEN]
    home = directory.parent / "home"
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(server, home))


def python(server: HubServer, home: Path, code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment(server, home)
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def everything_written(*directories: Path) -> bytes:
    return b"".join(path.read_bytes() for one in directories for path in one.rglob("*") if path.is_file())


@pytest.mark.parametrize("way", ["trainer", "model", "directory"])
def test_what_is_pushed_loads_in_a_fresh_process_with_and_without_the_library(way: str, tmp_path: Path) -> None:
    with HubServer() as server:
        run = push(server, way, tmp_path / "out")
        assert run.returncode == 0, run.stderr
        files = server.files["me/small"]
        assert {"README.md", "config.json", "model.safetensors", "modeling_hf_sparse.py"} <= files.keys()
        assert not any(name.endswith((".bin", ".pt")) or "/" in name for name in files)
        assert TOKEN.encode() not in b"".join(files.values()) + everything_written(tmp_path)
        assert TOKEN not in run.stdout + run.stderr
        for name, data in files.items():
            (tmp_path / "pushed").mkdir(exist_ok=True)
            (tmp_path / "pushed" / name).write_bytes(data)
        model = load_pruned(tmp_path / "pushed").eval()
        inputs = example_inputs(model)
        expected = model(**inputs).logits
        values = {name: tensor.tolist() for name, tensor in inputs.items()}
        blocked = "sys.modules['hf_sparse'] = None"
        for number, (prelude, trust) in enumerate((("import hf_sparse", False), (blocked, True))):
            code = (
                f"import json, sys, torch\n{prelude}\n"
                "from huggingface_hub import snapshot_download\n"
                "from transformers import AutoConfig, AutoModelForSequenceClassification as Auto\n"
                f"inputs = {{name: torch.tensor(rows) for name, rows in {values!r}.items()}}\n"
                f"for place in ('me/small', snapshot_download('me/small')):\n"
                f"    model = Auto.from_pretrained(place, trust_remote_code={trust}).eval()\n"
                f"    AutoConfig.from_pretrained(place, trust_remote_code={trust})\n"
                "    print(json.dumps(model(**inputs).logits.tolist()))\n"
            )
            for line in python(server, tmp_path / f"home{number}", code).splitlines():
                torch.testing.assert_close(torch.tensor(json.loads(line)), expected, rtol=1e-6, atol=1e-6)


def test_the_trainer_pushes_a_card_with_all_that_it_knows(tmp_path: Path) -> None:
    with HubServer() as server:
        assert push(server, "trainer", tmp_path / "out").returncode == 0
        files = server.files["me/small"]
    card = ModelCard(files["README.md"].decode())
    report = json.loads(files["report.json"])
    assert files["structure.png"].startswith(b"\x89PNG")
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-classification" and {"hf_sparse", "tiny"} <= set(card.data.tags)
    assert [result.metric_name for result in card.data.eval_results] == ["loss"]
    assert 'from_pretrained("me/small", trust_remote_code=True)' in card.text and "structure.png" in card.text
    assert f"{report['speedup']:.2f} times" in card.text and report["device"] in card.text
    assert TOKEN not in report["origin"]["command"] and "pushed.py trainer" in report["origin"]["command"]
    local = json.loads((tmp_path / "out/report.json").read_text())
    assert local == report


def test_the_recipe_pushes_with_the_flags_of_training_arguments(tmp_path: Path) -> None:
    from test_recipe import RECIPES, tiny_model, write

    files = {"--train_file": write(tmp_path / "train.csv", 96), "--validation_file": write(tmp_path / "dev.csv", 32)}
    flags: dict[str, object] = {
        "--model_name_or_path": tiny_model(tmp_path / "tiny"),
        **files,
        "--output_dir": tmp_path / "out",
        "--num_train_epochs": 4,
        "--dense_epochs": 1,
        "--report_to": "none",
        "--use_cpu": True,
        "--push_to_hub": True,
        "--hub_model_id": "me/small",
        "--hub_token": TOKEN,
    }
    command = [
        sys.executable,
        RECIPES / "text_classification.py",
        *(str(word) for flag in flags.items() for word in flag),
    ]
    with HubServer() as server:
        options = environment(server, tmp_path / "home")
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=options)
        assert run.returncode == 0, run.stderr
        pushed = server.files["me/small"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "structure.png"} <= pushed.keys()
    card = ModelCard(pushed["README.md"].decode())
    names = {result.metric_name for result in card.data.eval_results}
    assert names == {"accuracy", "f1", "accuracy (dense)", "f1 (dense)"}
    assert "--hub_token ..." in card.text
    assert TOKEN not in run.stdout + run.stderr and TOKEN.encode() not in everything_written(tmp_path)


@pytest.mark.parametrize(
    ("request_", "failure"),
    [
        (("POST", "create"), 401),
        (("PUT", "upload"), 403),
        (("POST", "commit"), 507),  # the server's disk is full
        (("POST", "commit"), "gone"),
    ],
)
def test_a_failed_upload_leaves_the_model_and_says_how_to_go_on(
    request_: tuple[str, str], failure: int | str, tmp_path: Path
) -> None:
    directory = tmp_path / "out"
    with HubServer({request_: failure}) as server:
        run = push(server, "directory", directory)
        assert run.returncode == 2 and f"`hf-sparse push {directory} me/small`" in run.stderr
        assert run.stderr.count("error:") == 1 and "Traceback" not in run.stderr and TOKEN not in run.stderr
        assert not server.files.get("me/small")
        model = load_pruned(directory)
        server.failures.clear()
        again = [Path(sys.executable).parent / "hf-sparse", "push", directory, "me/small"]
        options = {**environment(server, tmp_path / "home"), "HF_TOKEN": TOKEN}
        done = subprocess.run(again, capture_output=True, text=True, timeout=120, env=options)
        assert done.returncode == 0 and "is at" in done.stdout, done.stderr
        assert {"config.json", "model.safetensors"} <= server.files["me/small"].keys()
    assert model.num_parameters() == load_pruned(directory).num_parameters()


def test_files_of_an_earlier_model_go_with_it(tmp_path: Path) -> None:
    with HubServer() as server:
        server.files["me/small"] = {
            "model-00001-of-00002.safetensors": b"old",
            "model.safetensors.index.json": b"{}",
            "LICENSE": b"mine",
        }
        assert push(server, "directory", tmp_path / "out").returncode == 0
        assert sorted(server.files["me/small"]) == [
            "LICENSE",
            "README.md",
            "config.json",
            "model.safetensors",
            "modeling_hf_sparse.py",
        ]


def test_a_repository_is_inspected_without_its_weights(tmp_path: Path) -> None:
    with HubServer() as server:
        assert push(server, "directory", tmp_path / "out").returncode == 0
        server.requests.clear()
        code = "from hf_sparse.cli import main; main(['inspect', 'me/small'])"
        printed = python(server, tmp_path / "home2", code)
        assert "BertForSequenceClassification, model type hf_sparse_bert" in printed
        assert "bert.encoder.layer.1.attention.self" in printed
        assert not list((tmp_path / "home2").rglob("*.safetensors"))


def test_what_cannot_be_inspected_or_pushed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", "no/such model"], ["push", str(tmp_path), "me/small"], ["card", str(tmp_path)]):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_only_whole_models_are_pushed_by_a_trainer(tmp_path: Path) -> None:
    from conftest import bert, rows, training_arguments

    from hf_sparse import SparseTrainer, SparsityConfig, SparsityError

    options = {"sparsity": SparsityConfig(), "train_dataset": rows(64)}
    trainer = SparseTrainer(model=bert(), args=training_arguments(tmp_path), **options)
    trainer.args.push_to_hub, trainer.args.hub_strategy = True, "checkpoint"
    with pytest.raises(SparsityError, match="hub_strategy='checkpoint' would upload models with their gates"):
        trainer._prepare_hub()
    with pytest.raises(SparsityError, match="blocking=False"):
        trainer.push_to_hub(blocking=False)
