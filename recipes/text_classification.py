"""Fine-tune and prune a text classifier; with no flags, MiniLM on docstrings of installed libraries.

    python recipes/text_classification.py
    accelerate launch recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased \\
        --train_file train.csv --validation_file dev.csv --target 0.5 --output_dir runs/mine

A model without a trained head is fine-tuned first, dense. The dense model is the teacher of the pruned one. The output
directory then has the smaller model and its tokenizer, its card, report.json and structure.png; --push_to_hub uploads
them (--hub_model_id me/my-model, --hub_private_repo, --hub_token). --do_predict also writes predict_results.txt, the
classes of the test data, which then may lack labels; training and evaluation need no flag.
"""

import copy
import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from common import (
    RecipeArguments,
    RecipeParser,
    check_hub,
    check_output_dir,
    checkpoint_to_resume,
    classification_metrics,
    clear_output_dir,
    predicted_classes,
    run_recipe,
    scores,
    summary,
)
from datasets import Dataset, DatasetDict
from minilm import REPO, minilm
from text_data import DataArguments, TextData, load_text_data
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config

from hf_sparse import (
    DenseTrainer,
    Origin,
    SparseTrainer,
    SparsityConfig,
    SparsityError,
    attach_gates,
    detach_gates,
    discover,
    load_pruned,
    save_pruned,
)

MEASURED_BATCH = 32
PREDICTIONS = "predict_results.txt"
EMBEDDED_DEFAULTS = {"output_dir": "runs/quickstart", "learning_rate": 2e-4, "sparsity_ramp": 0.24}
"""Used with the embedded data unless flags say otherwise: there is little of it, and gates need steps to close."""


@dataclass(frozen=True)
class ModelArguments:
    """Which model is pruned, and which one teaches it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to prune, from the Hub or a directory. Default: all-MiniLM-L6-v2."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models are kept."})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tuned teacher. Default: the dense model, before pruning."}
    )


def main() -> None:
    model_arguments, data_arguments, sparsity, arguments = _parse()
    unset_hf_deepspeed_config()  # ZeRO stage 3 would shard weights while they are loaded, which are copied here
    check_output_dir(arguments)
    check_hub(arguments)
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="reading the data"):
        data = load_text_data(data_arguments, arguments.seed)
    _check_test(data, data_arguments, arguments)
    source = model_arguments.model_name_or_path or minilm()
    tokenizer = _tokenizer(source, model_arguments)
    dense, has_head = _model(source, model_arguments, data, tokenizer)
    with arguments.main_process_first(desc="tokenizing"):
        splits = _tokenize(data, tokenizer, data_arguments.max_seq_length)

    # Before hours are spent: is there the teacher, is there something to prune, and can the target be met?
    other_teacher = None
    if model_arguments.teacher_name_or_path is not None:
        source = model_arguments.teacher_name_or_path
        other_teacher, knows_labels = _model(
            source, dataclasses.replace(model_arguments, model_revision="main"), data, tokenizer
        )
        if not knows_labels:
            raise SparsityError(
                f"the teacher {source} has no head that was trained for {', '.join(data.labels[:10])}: fine-tune it on "
                "these data first, with these names in its config"
            )
    nn.Module.to(dense, arguments.device)  # where latencies are measured, if that is the cost
    attach_gates(dense, sparsity, _batch(splits["validation"], tokenizer, dense), structure=discover(dense))
    detach_gates(dense)
    if arguments.process_index == 0:
        clear_output_dir(arguments)
    if not has_head:
        if arguments.process_index == 0:
            print(f"{source} has no head that was trained for {', '.join(data.labels[:10])}: it is fine-tuned first")
        dense = _fine_tune(dense, splits, tokenizer, arguments)
    teacher = other_teacher or copy.deepcopy(dense)

    trainer = SparseTrainer(
        model=copy.deepcopy(dense),
        args=arguments,
        sparsity=sparsity,
        teacher=teacher,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=classification_metrics(),
    )
    evaluated = {split: rows for split, rows in splits.items() if split != "train" and "label" in rows.column_names}
    dense_metrics = _evaluate(dense, evaluated, tokenizer, arguments)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments, Path(str(arguments.output_dir))))
    trainer.compact()
    pruned_metrics = {split: scores(trainer.evaluate(rows)) for split, rows in evaluated.items()}
    predicted = predicted_classes(trainer.predict(splits["test"]).predictions) if arguments.do_predict else None
    if not trainer.is_world_process_zero():
        return

    name = model_arguments.model_name_or_path or REPO
    report = trainer.measure(
        _batch(splits["validation"], tokenizer, dense),
        (dense_metrics, pruned_metrics),
        Origin(
            base_model=None if Path(name).exists() else name,
            task="text-classification",
            dataset=data.name,
            dataset_id=data_arguments.dataset_name,
        ),
    )
    # Where --push_to_hub is given, this uploads it, too.
    trainer.save_model()
    output = Path(str(arguments.output_dir))
    print(f"\n{summary(report)}\n\nthe model, its card, report.json and structure.png are in {output}")
    if predicted is not None:
        lines = ["index\tprediction", *(f"{index}\t{data.labels[found]}" for index, found in enumerate(predicted))]
        (output / PREDICTIONS).write_text("\n".join(lines) + "\n")
        print(f"what it says of the test data is in {output / PREDICTIONS}")
    family = output / "family.md"
    if sparsity.targets is not None and family.is_file():
        print(f"\n{family.read_text()}\nthese models and family.png are in {output}")


def _parse() -> tuple[ModelArguments, DataArguments, SparsityConfig, RecipeArguments]:
    parser = RecipeParser((ModelArguments, DataArguments, SparsityConfig, RecipeArguments), __doc__)
    model, data, sparsity, arguments = parser.parse()
    if data.embedded:
        parser.set_defaults(**EMBEDDED_DEFAULTS)
        model, data, sparsity, arguments = parser.parse()
    if not arguments.output_dir:
        raise SparsityError("--output_dir is missing: say where the model goes, such as runs/mine")
    return model, data, sparsity, arguments


def _check_test(data: TextData, files: DataArguments, arguments: RecipeArguments) -> None:
    """Refuse --do_predict without test data, and a test file that is for nothing else."""
    if arguments.do_predict and "test" not in data.splits:
        raise SparsityError("--do_predict needs texts to classify: give --test_file")
    if files.test_file is not None and not arguments.do_predict and "label" not in data.splits["test"].column_names:
        raise SparsityError(
            f"--test_file {files.test_file} has no labels in a column {files.label_column_name!r}: give --do_predict "
            "for predictions, or set --label_column_name"
        )


def _tokenizer(source: str, arguments: ModelArguments) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=arguments.model_revision, cache_dir=arguments.cache_dir
        )
    except (OSError, ValueError) as error:
        raise SparsityError(f"cannot load the tokenizer of {source}: {str(error).splitlines()[0]}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there is none
        raise SparsityError(f"{source} has no tokenizer, so all words would look the same: save one beside the model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(
    source: str, arguments: ModelArguments, data: TextData, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, bool]:
    """The classifier, and whether its head is trained for these labels."""
    kwargs = {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    try:
        config = AutoConfig.from_pretrained(source, **kwargs)
        same_labels = tuple(config.id2label[i] for i in range(config.num_labels)) == data.labels
        config.id2label = dict(enumerate(data.labels))
        config.label2id = {label: index for index, label in enumerate(data.labels)}
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError) as error:
        raise SparsityError(f"cannot load the model {source}: {str(error).splitlines()[0]}") from None
    return model, same_labels and not loading["missing_keys"] and not loading["mismatched_keys"]


def _tokenize(data: TextData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    max_length = min(max_length, tokenizer.model_max_length)
    return data.splits.map(
        lambda rows: tokenizer(*(rows[column] for column in data.text_columns), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=list(data.text_columns),
        desc="tokenizing",
    )


def _fine_tune(
    model: PreTrainedModel, splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: RecipeArguments
) -> PreTrainedModel:
    """The dense model, fine-tuned; with --resume_from_checkpoint, the one that an earlier start has finished."""
    directory = Path(str(arguments.output_dir)) / "dense"
    finished = directory / "model"
    if arguments.resume_from_checkpoint is not None and finished.is_dir():
        return load_pruned(finished)
    dense = dataclasses.replace(
        arguments,
        output_dir=str(directory),
        num_train_epochs=arguments.dense_epochs,
        max_steps=-1,
        push_to_hub=False,
        hub_token=None,
        load_best_model_at_end=False,
        resume_from_checkpoint="auto" if arguments.resume_from_checkpoint else None,
    )
    trainer = DenseTrainer(
        model=model,
        args=dense,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=classification_metrics(),
    )
    arguments.deepspeed_plugin = None  # accelerate takes one for the first Trainer of a process, and keeps it
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(dense, directory))
    trainer.make_whole_()
    if trainer.is_world_process_zero():
        save_pruned(model, finished, tokenizer)
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    return model


def _evaluate(
    model: PreTrainedModel, splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, arguments: RecipeArguments
) -> dict[str, dict[str, float]]:
    changed = dataclasses.replace(
        arguments,
        report_to=[],
        push_to_hub=False,
        eval_strategy="no",
        save_strategy="no",
        lr_scheduler_type="linear",  # which, unlike others, asks for nothing
    )
    changed.deepspeed_plugin = None  # that of the first Trainer
    evaluator = DenseTrainer(
        model=model, args=changed, processing_class=tokenizer, compute_metrics=classification_metrics()
    )
    return {split: scores(evaluator.evaluate(rows)) for split, rows in splits.items()}


def _batch(rows: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Tensor]:
    """The first rows as one padded batch, for measuring."""
    features = [
        {name: value for name, value in row.items() if name != "label"}
        for row in rows.select(range(min(MEASURED_BATCH, len(rows))))
    ]
    batch = DataCollatorWithPadding(tokenizer)(features)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    run_recipe(main)
