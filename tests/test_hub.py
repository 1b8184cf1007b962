"""The real client of the Hub against a server on the loopback interface: what is pushed is what others load."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forking import Forks
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from launching import TESTS

from hf_sparse import load_pruned, save_pruned
from hf_sparse.cli import main
from hf_sparse.structure.example_inputs import example_inputs

WAYS = ("trainer", "model", "directory")
SHELL = """
import shlex, sys
from hf_sparse.cli import main
for line in sys.stdin:
    try:
        code = main(shlex.split(line)) or 0
    except SystemExit as stop:
        code = stop.code
    print(f"exit {code}", file=sys.stderr, flush=True)
"""


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """A user's: an own cache, no token in it, and the loopback server for a Hub."""
    return {
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user has models, and a home."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def python(server: HubServer, user: Path) -> Iterator[Forks]:
    """Runs Python for that user."""
    forks = Forks(environment(server, user / "home"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def pushed(python: Forks, user: Path) -> Path:
    """Where the models are that were pushed, one for each of the ways."""
    run = python.run(TESTS / "pushed.py", user, TOKEN)
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    return user


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the user who runs `hf-sparse`."""
    return tmp_path_factory.mktemp("home")


Shell = Callable[[str], tuple[int, str]]


@pytest.fixture(scope="module")
def shell(server: HubServer, home: Path) -> Iterator[Shell]:
    """Runs `hf-sparse` with some words, all in one process of a user who is logged in; returns exit code and output."""
    with subprocess.Popen(
        [sys.executable, "-u", "-c", SHELL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(server, home), "HF_TOKEN": TOKEN},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(words: str) -> tuple[int, str]:
            print(words, file=stdin, flush=True)
            output = ""
            for line in stdout:
                if line.startswith("exit "):
                    return int(line.split()[1]), output
                output += line
            raise AssertionError(f"the shell has ended: {output}")

        yield run
        stdin.close()


def everything_written(*directories: Path) -> bytes:
    return b"".join(path.read_bytes() for one in directories for path in one.rglob("*") if path.is_file())


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_pushed_loads_in_a_fresh_process_with_and_without_the_library(
    trusted: bool, server: HubServer, python: Forks, pushed: Path, tmp_path: Path
) -> None:
    code = (
        "import json, sys, torch\n"
        + ("sys.modules['hf_sparse'] = None\n" if trusted else "import hf_sparse\n")
        + "from huggingface_hub import snapshot_download\n"
        "from transformers import AutoConfig, AutoModelForSequenceClassification as Auto\n"
        "inputs = {name: torch.tensor(rows) for name, rows in json.loads(sys.argv[1]).items()}\n"
        f"for way in {WAYS}:\n"
        "    for place in (f'me/{way}', snapshot_download(f'me/{way}')):\n"
        f"        AutoConfig.from_pretrained(place, trust_remote_code={trusted})\n"
        f"        model = Auto.from_pretrained(place, trust_remote_code={trusted}).eval()\n"
        "        print(json.dumps(model(**inputs).logits.tolist()))\n"
    )
    inputs = example_inputs(load_pruned(pushed / "directory"))
    values = json.dumps({name: tensor.tolist() for name, tensor in inputs.items()})
    run = python.run("-c", code, values)
    assert run.returncode == 0, run.stderr
    lines = iter(run.stdout.splitlines())
    for way in WAYS:
        files = server.files[f"me/{way}"]
        (tmp_path / way).mkdir()
        for name, data in files.items():
            (tmp_path / way / name).write_bytes(data)
        expected = load_pruned(tmp_path / way).eval()(**inputs).logits
        for _ in range(2):
            torch.testing.assert_close(torch.tensor(json.loads(next(lines))), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_pushed_is_a_whole_model_and_no_secret(way: str, server: HubServer, pushed: Path) -> None:
    files = server.files[f"me/{way}"]
    assert {"README.md", "config.json", "model.safetensors", "modeling_hf_sparse.py"} <= files.keys()
    assert not any(name.endswith((".bin", ".pt")) or "/" in name for name in files)
    assert TOKEN.encode() not in b"".join(files.values()) + everything_written(pushed)


def test_the_trainer_pushes_a_card_with_all_that_it_knows(server: HubServer, pushed: Path) -> None:
    files = server.files["me/trainer"]
    card = ModelCard(files["README.md"].decode())
    report = json.loads(files["report.json"])
    assert files["structure.png"].startswith(b"\x89PNG")
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-classification" and {"hf_sparse", "tiny"} <= set(card.data.tags)
    assert [result.metric_name for result in card.data.eval_results] == ["loss"]
    assert 'from_pretrained("me/trainer", trust_remote_code=True)' in card.text and "structure.png" in card.text
    assert f"{report['speedup']:.2f} times" in card.text and report["device"] in card.text
    assert TOKEN not in report["origin"]["command"] and "pushed.py" in report["origin"]["command"]
    assert json.loads((pushed / "trainer/report.json").read_text()) == report


def test_the_recipe_pushes_with_the_flags_of_training_arguments(
    server: HubServer, python: Forks, user: Path, tmp_path: Path
) -> None:
    from test_recipe import RECIPES, tiny_model, write

    files = {"--train_file": write(tmp_path / "train.csv", 48), "--validation_file": write(tmp_path / "dev.csv", 16)}
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
    run = python.run(RECIPES / "text_classification.py", *(word for flag in flags.items() for word in flag))
    assert run.returncode == 0, run.stderr
    pushed = server.files["me/small"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "structure.png"} <= pushed.keys()
    card = ModelCard(pushed["README.md"].decode())
    names = {result.metric_name for result in card.data.eval_results}
    assert names == {"accuracy", "f1", "accuracy (dense)", "f1 (dense)"}
    assert "--hub_token ..." in card.text
    assert TOKEN not in run.stdout + run.stderr and TOKEN.encode() not in everything_written(tmp_path, user)


def test_a_failed_upload_leaves_the_model_and_says_how_to_go_on(
    server: HubServer, pushed: Path, shell: Shell, tmp_path: Path
) -> None:
    directory = tmp_path / "out"
    shutil.copytree(pushed / "directory", directory)
    model = load_pruned(directory)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)  # weights that the server does not have
    save_pruned(model, directory)
    failures: list[tuple[str, str, int | str]] = [
        ("POST", "create", 401),
        ("PUT", "upload", 403),
        ("POST", "commit", 507),  # the server's disk is full
        ("POST", "commit", "gone"),
    ]
    weights = (directory / "model.safetensors").read_bytes()
    for method, path, failure in failures:
        server.failures = {(method, path): failure}
        code, output = shell(f"push {directory} me/failed")
        assert code == 2 and f"`hf-sparse push {directory} me/failed`" in output, output
        assert output.count("error:") == 1 and "Traceback" not in output and TOKEN not in output
        assert not server.files.get("me/failed") and (directory / "model.safetensors").read_bytes() == weights
    code, output = shell(f"push {directory} me/failed --private --revision new --license mit --tags a b")
    assert "me/failed --private --revision new --license mit --tags a b`" in output
    server.failures = {}
    code, output = shell(f"push {directory} me/failed")
    assert code == 0 and "is at" in output
    assert {"config.json", "model.safetensors"} <= server.files["me/failed"].keys()


def test_files_of_an_earlier_model_go_with_it(server: HubServer, pushed: Path, shell: Shell) -> None:
    server.files["me/earlier"] = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "adapter/adapter_model.safetensors": b"old",
        "LICENSE": b"mine",
    }
    assert shell(f"push {pushed / 'directory'} me/earlier")[0] == 0
    assert sorted(server.files["me/earlier"]) == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_hf_sparse.py",
    ]


def test_an_adapter_goes_with_its_model_and_checkpoints_do_not(
    server: HubServer, pushed: Path, shell: Shell, tmp_path: Path
) -> None:
    shutil.copytree(pushed / "trainer", tmp_path / "out")
    for name in ("adapter", "checkpoint-40"):
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "adapter_config.json").write_text("{}")
    assert shell(f"push {tmp_path / 'out'} me/adapted")[0] == 0
    files = server.files["me/adapted"]
    assert [name for name in files if "/" in name] == ["adapter/adapter_config.json"]
    page = files["report.html"].decode()
    assert "load_pruned(&#34;me/adapted&#34;)" in page and "me/trainer" not in page.replace("me/trainer ", "")


@pytest.mark.usefixtures("pushed")
def test_a_repository_is_inspected_without_its_weights(shell: Shell, home: Path) -> None:
    code, printed = shell("inspect me/directory")
    assert code == 0 and "BertForSequenceClassification, model type hf_sparse_bert" in printed
    assert "bert.encoder.layer.1.attention.self" in printed
    assert not list(home.rglob("*.safetensors"))


def test_what_cannot_be_inspected_or_pushed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", "no/such model"], ["push", str(tmp_path), "me/small"], ["card", str(tmp_path)]):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_only_whole_models_are_pushed_by_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pruning import bert, rows, training_arguments

    from hf_sparse import SparseTrainer, SparsityConfig, SparsityError
    from hf_sparse.training import results

    options = {"sparsity": SparsityConfig(), "train_dataset": rows(64)}
    trainer = SparseTrainer(model=bert(), args=training_arguments(tmp_path), **options)
    trainer.args.push_to_hub, trainer.args.hub_strategy = True, "checkpoint"
    with pytest.raises(SparsityError, match="hub_strategy='checkpoint' would upload models with their gates"):
        trainer.results._prepare_hub_()
    with pytest.raises(SparsityError, match="blocking=False"):
        trainer.push_to_hub(blocking=False)
    said: list[str] = []
    monkeypatch.setattr(results.logger, "warning", said.append)
    for strategy in ("end", "every_save"):
        trainer.args.hub_strategy = strategy
        trainer.results._prepare_hub_()
    assert len(said) == 1 and said[0].startswith("hub_strategy='every_save' is taken for 'end'")
