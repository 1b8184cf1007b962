"""The documents are true: their code runs, their links lead somewhere, their commands and flags exist."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from common.arguments import ModelArguments, RecipeArguments
from common.task import Task
from pruning import bert, rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_sparse import PruningPlan, SparsityConfig, compact, discover, save_pruned
from hf_sparse.cli import main

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", "hf_sparse/README.md", "model_cards/README.md"]
GUIDES += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("recipes/**/README.md"))]
CARDS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("model_cards/*/README.md"))]
WITH_COMMANDS = [
    *GUIDES,
    *(str(path.relative_to(ROOT)) for kind in ("py", "yaml") for path in ROOT.glob(f"recipes/**/*.{kind}")),
]

PROGRAM = (
    r"(?:accelerate launch(?P<launch>[^`\n]*?) )?(?P<program>recipes/[\w/]+\.py|\bhf-sparse \w+)(?P<given>[^`#\n]*)"
)


def text(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str) -> list[str]:
    """The Python code of a document, each block with as many empty lines above it as there are lines."""
    found = re.finditer(r"^```python\n(.*?)^```", text(document), re.DOTALL | re.MULTILINE)
    return ["\n" * text(document)[: block.start(1)].count("\n") + block[1] for block in found]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "isclass": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # without a GPU, which TrainingArguments ask for
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("document", [document for document in GUIDES if blocks(document)])
def test_the_code_of_a_document_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bert(layers=1).save_pretrained("my-fine-tuned-model")
    small = bert()
    compact(small, PruningPlan({discover(small).blocks[0].name: (0,)}))
    save_pruned(small, "out/pruned", tokenizer())
    given = {"train_dataset": rows(48), "eval_dataset": rows(16, seed=1), "tokenizer": tokenizer()}
    namespace: dict[str, Any] = {"__name__": "__main__", **given}
    words = "own.py --model_name_or_path out/pruned --num_train_epochs 1 --report_to none --use_cpu --target 0.3"
    monkeypatch.setattr(sys, "argv", words.split())
    for block in blocks(document):
        exec(compile(block, str(ROOT / document), "exec"), namespace)


def test_the_readme_is_short_and_its_example_ends_in_an_assertion() -> None:
    assert len(text("README.md").encode()) <= 6000
    assert blocks("README.md")[-1].splitlines()[-1].startswith("assert ")


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*GUIDES, *CARDS])
def test_links_lead_to_files_and_headings(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not heading or heading in anchors(target if target.is_file() else target / "README.md"), link


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_files_and_targets_of_make_exist(document: str) -> None:
    for path in re.findall(r"(?<![\w/.])(?:recipes|tests|hf_sparse|model_cards)/[\w/]+\.\w+", text(document)):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"(?:`|^    )make (\w+)", text(document), re.MULTILINE):
        assert re.search(rf"^{target}:", text("Makefile"), re.MULTILINE), target


class Helps:
    """The flags of programs, from what they print at --help."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys, self.known = monkeypatch, capsys, dict[str, set[str]]()

    def flags(self, program: str) -> set[str]:
        if program not in self.known:
            self.capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                self._run(program)
            assert stop.value.code == 0, program
            self.known[program] = set(re.findall(r"--\w+", self.capsys.readouterr().out))
        return self.known[program]

    def _run(self, program: str) -> None:
        if program.startswith("hf-sparse"):
            main([program.split()[1], "--help"])
        self.monkeypatch.syspath_prepend(ROOT / "recipes")
        self.monkeypatch.syspath_prepend((ROOT / program).parent)
        self.monkeypatch.setattr(sys, "argv", [program, "--help"])
        runpy.run_path(str(ROOT / program), run_name="__main__")


def test_commands_give_flags_that_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    helps = Helps(monkeypatch, capsys)
    launcher = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    commands = [
        (document, found)
        for document in WITH_COMMANDS
        for found in re.finditer(PROGRAM, re.sub(r"\\+\n[# ]*", "", text(document)))
    ]
    for document, found in commands:
        assert set(re.findall(r"--\w+", found["launch"] or "")) <= launcher, (document, found[0])
        given = set(re.findall(r"--\w+", found["given"]))
        assert given <= helps.flags(found["program"]), (document, found[0])
    assert {"hf-sparse estimate", "recipes/text_classification.py", "recipes/benchmark/compare.py"} <= set(helps.known)

    # The guide to the recipes names all flags that are their own, and no other.
    kinds: list[Any] = [ModelArguments, SparsityConfig, RecipeArguments]
    for recipe in ROOT.glob("recipes/*.py"):
        helps.flags(str(recipe.relative_to(ROOT)))
        found = runpy.run_path(str(recipe), run_name=recipe.stem).values()
        kinds += [
            one.data_arguments
            for one in found
            if isinstance(one, type) and issubclass(one, Task) and one.__module__ == recipe.stem
        ]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    names -= {field.name for field in dataclasses.fields(TrainingArguments)}
    named = set(re.findall(r"--\w+", text("recipes/README.md")))
    assert {f"--{name}" for name in names} <= named
    assert named <= set().union(*helps.known.values()) | {"--help"}
