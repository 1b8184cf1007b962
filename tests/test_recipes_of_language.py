"""The recipes for language models, for chats and for embeddings: end to end on tiny models, and what goes wrong."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import causal_lm
import masked_lm
import pytest
import sentence_embedding
import sft
import torch
from common.conversations import Conversations
from common.language import LanguageModel, blocks
from common.task import Task
from datasets import Dataset
from launching import command, environment, forks
from peft import PeftModel
from pruning import bert, llama
from recipe_runs import SHORT, files, mistake, start, words
from test_recipe import WORDS, write_json
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertForMaskedLM, EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTTrainer

from hf_sparse import PruningPlan, compact, load_pruned
from hf_sparse.cli import main
from hf_sparse.report.generation import Generation, generations

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' }}{% if message.role == 'word1' %}{% generation %}"
    "{{ message.content + ' [SEP] ' }}{% endgeneration %}{% else %}{{ message.content + ' [SEP] ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'word1 ' }}{% endif %}"
)
"""Roles are words, too, so that they can be encoded."""


def tokenizer() -> PreTrainedTokenizerFast:
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    words = [*special.values(), *WORDS[:94]]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, eos_token="[SEP]", **special)
    fast.chat_template = TEMPLATE
    return fast


def sentences(count: int, seed: int) -> list[str]:
    """Each word but the first is the one that comes after the word before."""
    generator = random.Random(seed)
    starts = [generator.randrange(5, 80) for _ in range(count)]
    return [" ".join(WORDS[start + step] for step in range(8)) for start in starts]


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"text": text} for text in sentences(count, seed)]


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    halves = [(text[: text.index(" ", 20)], text[text.index(" ", 20) + 1 :]) for text in sentences(count, seed)]
    return [{"prompt": message("word2", first), "completion": message("word1", rest)} for first, rest in halves]


def triplets(count: int, seed: int) -> list[dict[str, Any]]:
    found = zip(sentences(count, seed), sentences(count, seed + 1))
    return [{"anchor": text[:20], "positive": text[20:], "negative": other} for text, other in found]


@dataclass(frozen=True)
class Case:
    task: type[Task]
    model: PreTrainedModel
    rows: Any
    flags: dict[str, object]
    metrics: tuple[str, ...]
    tag: str


CASES = {
    "causal_lm": Case(
        causal_lm.CausalLM,
        llama(),
        texts,
        # A warm start would take fewer rows in this process than in those of a launch.
        {"--block_size": 12, "--warm_start": 0, "--num_train_epochs": 8},
        ("perplexity", "accuracy"),
        "text-generation",
    ),
    "masked_lm": Case(
        masked_lm.MaskedLM,
        BertForMaskedLM(bert().config).eval(),
        texts,
        {"--line_by_line": None, "--dense_epochs": 1, "--num_train_epochs": 6},
        ("perplexity", "accuracy"),
        "fill-mask",
    ),
    "sft": Case(
        sft.SFT,
        llama(),
        chats,
        {"--packing": None, "--max_length": 24, "--num_train_epochs": 12},
        ("perplexity", "accuracy"),
        "text-generation",
    ),
    "sentence_embedding": Case(
        sentence_embedding.SentenceEmbedding,
        bert().base_model,
        triplets,
        {"--do_predict": None},
        ("accuracy", "mrr"),
        "sentence-similarity",
    ),
}


def flags_of(name: str, directory: Path, counts: tuple[int, int, int] = (48, 17, 9)) -> dict[str, object]:
    case, source = CASES[name], directory / "tiny"
    copy.deepcopy(case.model).save_pretrained(source)
    tokenizer().save_pretrained(source)
    return {
        **SHORT,
        **files(lambda path, count: write_json(path, case.rows(count, count)), directory, counts, "json"),
        "--model_name_or_path": source,
        "--output_dir": directory / "out",
        "--per_device_train_batch_size": 8,
        "--per_device_eval_batch_size": 4,
        "--num_train_epochs": 4,
        **case.flags,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for every recipe, in which it has run."""
    directory = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patched:
        for name, case in CASES.items():
            assert start(case.task, flags_of(name, directory / name), patched) == 0
    yield directory


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_prunes_scores_and_resumes(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, case = home / name / "out", CASES[name]
    report = json.loads((out / "report.json").read_text())
    assert report["origin"]["task"] == case.tag
    assert abs(report["achieved"] - 0.5) <= 0.06 and report["max_abs_diff"] <= 1e-4
    generates = case.tag == "text-generation"
    assert [bool(report[model]["tokens_per_second"]) for model in ("dense", "pruned")] == [generates] * 2
    results = json.loads((out / "all_results.json").read_text())
    assert {f"{split}_{metric}" for split in ("eval", "predict") for metric in case.metrics} <= set(results)
    assert (out / "dense" / "model").is_dir() == ("--dense_epochs" in case.flags)
    weights = (out / "model.safetensors").read_bytes()
    # A finished run has nothing left to resume but its last checkpoint, and finds the same.
    flags = {**flags_of(name, home / name), "--resume_from_checkpoint": "auto"}
    assert start(case.task, flags, monkeypatch) == 0
    assert (out / "model.safetensors").read_bytes() == weights
    again = json.loads((out / "all_results.json").read_text())
    for metric in case.metrics:
        assert again[f"predict_{metric}"] == pytest.approx(results[f"predict_{metric}"], rel=1e-5)


def test_a_fresh_process_generates_fills_and_embeds(home: Path) -> None:
    code = (
        "import hf_sparse, json, sys\n"
        "from transformers import AutoTokenizer, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline\n"
        "home = sys.argv[1]\n"
        "found = {}\n"
        "for name in ('causal_lm', 'sft'):\n"
        "    tokenizer = AutoTokenizer.from_pretrained(f'{home}/{name}/out')\n"
        "    model = AutoModelForCausalLM.from_pretrained(f'{home}/{name}/out')\n"
        "    inputs = tokenizer('word7 word8', return_tensors='pt')\n"
        "    tokens = model.generate(inputs['input_ids'], attention_mask=inputs['attention_mask'], max_new_tokens=4,\n"
        "        min_new_tokens=4, do_sample=False)\n"
        "    found[name] = tokens[0].tolist()\n"
        "tokenizer = AutoTokenizer.from_pretrained(f'{home}/masked_lm/out')\n"
        "model = AutoModelForMaskedLM.from_pretrained(f'{home}/masked_lm/out')\n"
        "fill = pipeline('fill-mask', model=model, tokenizer=tokenizer)\n"
        "found['masked_lm'] = fill('word7 [MASK] word9')[0]['token']\n"
        "tokenizer = AutoTokenizer.from_pretrained(f'{home}/sentence_embedding/out')\n"
        "model = AutoModel.from_pretrained(f'{home}/sentence_embedding/out')\n"
        "states = model(**tokenizer('word7 word8', return_tensors='pt'))[0]\n"
        "found['sentence_embedding'] = states[0, 0, :3].tolist()\n"
        "print(json.dumps(found))\n"
    )
    fresh = forks().run("-c", code, home)
    assert fresh.returncode == 0, fresh.stderr
    found = json.loads(fresh.stdout)
    models = {name: load_pruned(home / name / "out").eval() for name in CASES}
    tokens = tokenizer()("word7 word8", return_tensors="pt")["input_ids"]
    for name in ("causal_lm", "sft"):
        here = models[name].generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        assert found[name] == here[0].tolist()
    masked = tokenizer()("word7 [MASK] word9", return_tensors="pt")
    assert found["masked_lm"] == models["masked_lm"](**masked).logits[0, 1].argmax().item()
    states = models["sentence_embedding"](input_ids=tokens)[0]
    torch.testing.assert_close(torch.tensor(found["sentence_embedding"]), states[0, 0, :3])


def test_perplexity_is_that_of_the_saved_model(home: Path) -> None:
    """By a mean over all tokens, of the causal model and of answers alone."""
    rows = blocks(tokenizer()([row["text"] for row in texts(17, 17)]), 12)["input_ids"]
    labels = [row.copy() for row in rows]
    encode = Conversations(tokenizer(), None, False, True, 24)
    said = encode({name: [row[name] for row in chats(17, 17)] for name in ("prompt", "completion")})
    for name, ids, wanted in [("causal_lm", rows, labels), ("sft", said["input_ids"], said["labels"])]:
        model, losses, right = load_pruned(home / name / "out").eval(), [], []
        for row, of_row in zip(ids, wanted):
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
            target = torch.tensor(of_row[1:])
            kept = target != -100
            losses.append(torch.nn.functional.cross_entropy(logits[kept], target[kept], reduction="none"))
            right.append(logits[kept].argmax(-1) == target[kept])
        results = json.loads((home / name / "out" / "all_results.json").read_text())
        assert results["eval_perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
        assert results["eval_accuracy"] == pytest.approx(torch.cat(right).float().mean().item(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("name", ["causal_lm", "sft"])
def test_an_adapter_is_trained_instead_of_all_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**flags_of(name, tmp_path), "--use_peft": None, "--lora_r": 2, "--keep_adapter": None, "--dense_epochs": 1}
    flags |= {"--sparsity_ramp": 0.3, "--sparsity_hold": 0.2}
    if name == "sft":
        flags |= {"--distillation_weight": 0, "--hidden_distillation_weight": 0}
    assert start(CASES[name].task, flags, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "largest difference between gated and compact outputs" in shown and "\nit goes on\n    word" in shown
    out = tmp_path / "out"
    loaded = load_pruned(out)
    adapted = PeftModel.from_pretrained(copy.deepcopy(loaded), out / "adapter")
    source, dense = load_pruned(tmp_path / "tiny"), load_pruned(out / "dense" / "model")
    assert torch.equal(source.get_input_embeddings().weight, loaded.get_input_embeddings().weight)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(source.get_parameter(first), dense.get_parameter(first))
    assert loaded.num_parameters() < dense.num_parameters()
    ids = {"input_ids": torch.arange(5, 13)[None]}
    assert not torch.allclose(adapted(**ids).logits, loaded(**ids).logits)


def test_two_processes_find_the_same_as_one(home: Path, tmp_path: Path) -> None:
    """By the command of the installed package, which `accelerate launch` starts as a module."""
    flags = {**flags_of("causal_lm", tmp_path), "--per_device_train_batch_size": 4, "--per_device_eval_batch_size": 2}
    launcher = command(2, "")[1:-1]
    run = forks().run(*launcher, "-m", "hf_sparse", "run", "causal_lm", *words(flags), env=environment(tmp_path))
    assert run.returncode == 0, run.stderr[-5000:]
    one, two = (
        json.loads((out / "all_results.json").read_text()) for out in (home / "causal_lm" / "out", tmp_path / "out")
    )
    for name in ("eval_perplexity", "predict_perplexity", "eval_samples"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)


def test_what_cannot_be_generated_from_has_no_speed() -> None:
    tokens = torch.arange(5, 13)[None]
    assert generations([llama(), llama()], {"input_ids": tokens, "moods": tokens}) == [Generation()] * 2
    assert generations([bert()], {"input_ids": tokens}) == [Generation()]


def test_a_cache_is_counted_by_the_heads_that_are_left() -> None:
    dense, pruned = llama(), llama()
    compact(pruned, PruningPlan({"model.layers.0.self_attn": (1,), "model.layers.1.self_attn": ()}))
    before, after = generations([dense, pruned], {"input_ids": torch.arange(5, 13)[None]})
    head = 2 * dense.config.head_dim * 4  # a key and a value, in float32
    assert (before.cache_bytes_per_token, after.cache_bytes_per_token) == (
        3 * 4 * head,
        (1 + 1 + 4) * head,
    )  # one for none


def test_the_command_refuses_what_is_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "cooking"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "invalid choice: 'cooking'" in said and "causal_lm" in said


def test_scores_of_tokens_do_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, 9, generator=generator), torch.randint(9, (6, 5), generator=generator)
    labels[0, 2:] = labels[3, :4] = -100
    for task, shift in ((causal_lm.CausalLM, 1), (masked_lm.MaskedLM, 0)):
        made: LanguageModel = task(task.data_arguments())
        parts = [made.scored((logits[part],), labels[part]).numpy() for part in (slice(0, 4), slice(4, 6))]
        whole = made.scored(logits, labels).numpy()
        assert (torch.tensor(parts[0]) == torch.tensor(whole[:4])).all() and whole.shape == (6, 5, 2)
        found = made.compute_metrics(EvalPrediction(whole, labels.numpy()), Dataset.from_dict({}))
        ahead, wanted = logits[:, : 5 - shift].flatten(0, 1), labels[:, shift:].flatten()
        loss = torch.nn.functional.cross_entropy(ahead, wanted)
        assert found["perplexity"] == pytest.approx(loss.exp().item())
        assert found["accuracy"] == pytest.approx((ahead.argmax(-1) == wanted)[wanted != -100].float().mean().item())


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("kind", ["prompt and completion", "messages", "text", "plain prompt and completion"])
def test_conversations_are_encoded_as_trl_does(kind: str, assistant_only: bool, tmp_path: Path) -> None:
    rows = chats(6, 0)
    if kind == "messages":
        rows = [{"messages": row["prompt"] + row["completion"] + row["prompt"] + row["completion"]} for row in rows]
    elif kind == "text":
        rows = texts(6, 0)
    elif kind != "prompt and completion":
        rows = [{name: said[0]["content"] for name, said in row.items()} for row in rows]
    if assistant_only and not isinstance(next(iter(rows[0].values())), list):
        pytest.skip("TRL refuses this")
    arguments = sft.SFTRecipeArguments(
        str(tmp_path), max_length=14, assistant_only_loss=assistant_only, eval_strategy="no", use_cpu=True
    )
    data = Dataset.from_list(rows)
    theirs = SFTTrainer(llama(), arguments, train_dataset=data, processing_class=tokenizer()).train_dataset
    ours = Conversations(tokenizer(), None, assistant_only, True, 14)(data.to_dict())
    assert ours == {name: theirs[name][:] for name in ("input_ids", "labels")}


@pytest.mark.parametrize(
    ("name", "change", "flags", "message"),
    [
        ("causal_lm", {"text": None}, {}, "column 'text' is empty in row 1 of the validation data"),
        ("causal_lm", {}, {"--text_column_name": "body"}, "has no column 'body'"),
        ("causal_lm", {}, {"--block_size": 60}, "no row is left of the validation data: it does not fill a row"),
        ("causal_lm", {}, {"--do_predict": None}, "--do_predict has no meaning here"),
        ("causal_lm", {}, {"--streaming": None}, "--streaming has no meaning here"),
        ("masked_lm", {}, {"--mlm_probability": 1.5}, "mlm_probability is 1.5"),
        ("sft", {"completion": []}, {}, "row 1 of the validation data has no prompt or no completion"),
        ("sft", {"prompt": [{"role": "word2"}]}, {}, "messages cannot be written as a chat"),
        ("sft", {}, {"--max_length": 3}, "no row is left of the train data: nothing to learn is left"),
        ("sft", {}, {"--load_in_4bit": None}, "cut out of plain weights"),
        ("sft", {}, {"--use_peft": None, "--lora_target_modules": "nothing"}, "no adapter can be put into the model"),
        ("sentence_embedding", {}, {"--text_column_names": "anchor"}, "name two columns by --text_column_names"),
        ("sentence_embedding", {}, {"--text_column_names": "anchor,other"}, "has no column 'other'"),
        ("sentence_embedding", {"anchor": None}, {}, "column 'anchor' is empty in row 1"),
        (
            "sentence_embedding",
            {},
            {"--score_column_name": "negative", "--text_column_names": "anchor,positive"},
            "not a number in row 1 of the train data",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str,
    change: dict[str, Any],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags_of(name, tmp_path, (9, 6, 3)) | flags
    if change:
        write_json(tmp_path / "validation.json", [row | change for row in CASES[name].rows(2, 0)])
    assert message in mistake(CASES[name].task, given, monkeypatch, capsys)


def test_pairs_with_scores_are_told_by_their_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {**flags_of("sentence_embedding", tmp_path), "--pooling": "cls", "--num_train_epochs": 2}
    for split, count in (("train", 32), ("validation", 9), ("test", 5)):
        rows = [
            {"sentence1": row["anchor"], "sentence2": row["positive"], "score": number % 2}
            for number, row in enumerate(triplets(count, count))
        ]
        flags[f"--{split}_file"] = write_json(tmp_path / f"{split}.json", rows)
    assert start(sentence_embedding.SentenceEmbedding, flags, monkeypatch) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {"eval_spearmanr", "predict_pearson"} <= set(results)
    model = load_pruned(tmp_path / "out").eval()
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()[1:]
    for line, row in zip(lines, triplets(5, 5), strict=True):
        said = tokenizer()([row["anchor"], row["positive"]], return_tensors="pt", padding=True)
        cosine = torch.nn.functional.cosine_similarity(*model(**said)[0][:, :1]).item()
        assert float(line.split("\t")[1]) == pytest.approx(cosine, abs=1e-4)
