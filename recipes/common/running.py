"""`run`: what a recipe does, whatever its task.

Parse, check, load, encode, fine-tune where needed, prune, evaluate, measure, save, push, print.
"""

import copy
import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput

from common.adapters import with_adapter
from common.arguments import ModelArguments, RecipeArguments, RecipeParser
from common.files import DataArguments
from common.loading import load_model
from common.output import check_hub, check_output_dir, checkpoint_to_resume, clear_output_dir, closing_table
from common.task import Data, Encoder, Task
from hf_sparse import (
    Origin,
    SparsityConfig,
    SparsityError,
    attach_gates,
    detach_gates,
    discover,
    load_pruned,
    save_pruned,
)

MEASURED_BATCH = 32
DENSE_EPOCHS = 3.0
"""Of a model without a trained head, unless --dense_epochs says something else."""


def run(task_class: type[Task], description: str | None) -> None:
    """Run a recipe from the command line; what the user can mend becomes one line and exit code 2."""
    transformers.logging.set_verbosity_warning()
    try:
        _run(task_class, description)
    except SparsityError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _run(task_class: type[Task], description: str | None) -> None:
    access, flags, sparsity, arguments = _parse(task_class, description)
    unset_hf_deepspeed_config()  # ZeRO stage 3 would shard weights while they are loaded, which are copied here
    check_output_dir(arguments)
    check_hub(arguments)
    set_seed(arguments.seed)
    task = task_class(flags)
    task.arrange_(arguments)
    if task.encoded_when_read:
        arguments.remove_unused_columns = False  # which would leave the encoder without its rows
    _check_order(task, arguments)
    with arguments.main_process_first(desc="reading the data"):
        data = load_data(task, arguments.seed, access)
        source = access.model_name_or_path or task.embedded_model()
    _check_test(data, flags, arguments)
    for metric in task.metrics:
        if arguments.metric_for_best_model in (metric.name, f"eval_{metric.name}"):
            arguments.greater_is_better = metric.higher_is_better  # transformers knows this of losses only
    processor = task.find_processor(source, access, data)
    dense, has_head = _load_model(source, access, task, data, processor)
    with arguments.main_process_first(desc="encoding"):
        splits = encode(task, data, processor)

    # Before hours are spent: is there the teacher, is there something to prune, can the target be met, and so on?
    other_teacher = None
    if access.teacher_name_or_path is not None:
        source = access.teacher_name_or_path
        of_teacher = dataclasses.replace(access, model_revision="main", config_name=None)
        other_teacher, knows_labels = _load_model(source, of_teacher, task, data, processor)
        if not knows_labels:
            raise SparsityError(
                f"the teacher {source} has no head that was trained for {_aim(data)}: fine-tune it on these data "
                "first, with these names in its config"
            )
    if access.use_peft:
        with_adapter(copy.deepcopy(dense), access)
    nn.Module.to(dense, arguments.device)  # where latencies are measured, if that is the cost
    attach_gates(dense, sparsity, _batch(splits["validation"], task, processor, dense), structure=discover(dense))
    detach_gates(dense)
    if arguments.process_index == 0:
        clear_output_dir(arguments)
    if arguments.dense_epochs is None and not has_head and arguments.process_index == 0:
        print(f"{source} has no head that was trained for {_aim(data)}: it is fine-tuned first")
    epochs = arguments.dense_epochs if arguments.dense_epochs is not None else 0 if has_head else DENSE_EPOCHS
    if epochs > 0:
        dense = _fine_tune(dense, access, epochs, splits, task, processor, arguments)

    evaluated = {split: splits[split] for split in _labelled(data) if split != "train"}
    taught = sparsity.distillation_weight > 0 or sparsity.hidden_distillation_weight > 0
    alone = access.use_peft and not taught  # a device may have room for one model, so the dense one becomes the other
    dense_scores = _evaluate_dense(dense, splits, evaluated, task, processor, arguments) if alone else {}
    trainer = task.sparse_trainer(
        model=with_adapter(dense if alone else copy.deepcopy(dense), access),
        args=arguments,
        sparsity=sparsity,
        teacher=other_teacher or (copy.deepcopy(dense) if taught else None),
        **_training(task, splits, processor),
    )
    if not alone:
        dense_scores = _evaluate_dense(dense, splits, evaluated, task, processor, arguments)
    trained = trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments, Path(str(arguments.output_dir))))
    trainer.compact()
    pruned_scores = _evaluate(trainer, evaluated, task)
    predicted = _predict(trainer, splits["test"]) if arguments.do_predict else None
    if not trainer.is_world_process_zero():
        return

    name = access.model_name_or_path or task.embedded_model_id
    report = trainer.measure(
        _batch(splits["validation"], task, processor, dense),
        (_own(dense_scores, task), _own(pruned_scores, task)),
        Origin(
            base_model=None if name is None or Path(name).exists() else name,
            task=task.pipeline_tag,
            dataset=_name(task),
            dataset_id=flags.on_hub[0],
        ),
    )
    # Where --push_to_hub is given, this uploads it, too.
    trainer.save_model()
    _write_results(trainer, trained.metrics, pruned_scores, splits)
    output = Path(str(arguments.output_dir))
    print(f"\n{closing_table(report, task.metrics)}")
    shown = task.example(trainer.bare_model, splits["validation"], processor)
    if shown is not None:
        print(f"\n{shown}")
    print(f"\nthe model, its card, report.json and structure.png are in {output}; look at {output / 'report.html'}")
    if predicted is not None:
        print(f"what it says of the test data is in {task.write_predictions(predicted, splits['test'], data, output)}")
    family = output / "family.md"
    if sparsity.targets is not None and family.is_file():
        print(f"\n{family.read_text()}\nthese models and family.png are in {output}")


# ---- Before ----


def _parse(
    task_class: type[Task], description: str | None
) -> tuple[ModelArguments, Any, SparsityConfig, RecipeArguments]:
    classes = (ModelArguments, task_class.data_arguments, SparsityConfig, task_class.training_arguments)
    parser = RecipeParser(classes, description)
    access, flags, sparsity, arguments = parser.parse()
    if flags.embedded:
        parser.set_defaults(**task_class.embedded_defaults)
        access, flags, sparsity, arguments = parser.parse()
    if not arguments.output_dir:
        raise SparsityError("--output_dir is missing: say where the model goes, such as runs/mine")
    return access, flags, sparsity, arguments


def _check_order(task: Task, arguments: RecipeArguments) -> None:
    if task.rows_in_order and arguments.train_sampling_strategy == "group_by_length":
        raise SparsityError(
            "--train_sampling_strategy group_by_length also reorders the rows of evaluations, and what is predicted "
            "for one would be taken for another's: leave it out"
        )


def load_data(task: Task, seed: int, access: ModelArguments | None = None) -> Data:
    """Read and check the data of a task: those that its flags name, or the embedded ones.

    Raises:
        SparsityError: a file, column or label is missing, a split is empty, or labels do not fit.
    """
    access = access or ModelArguments()
    flags = task.arguments
    flags.check()
    splits = task.embedded_data(seed) if flags.embedded else flags.read(seed, access.cache_dir, access.token)
    data = task.load(splits)
    return dataclasses.replace(data, splits=flags.limited(data.splits))


def _check_test(data: Data, flags: DataArguments, arguments: RecipeArguments) -> None:
    """Refuse --do_predict without test data, and a test file that is for nothing else."""
    if arguments.do_predict and "test" not in data.splits:
        raise SparsityError("--do_predict needs test data: give --test_file")
    if "test" in flags.files and not arguments.do_predict and not data.test_is_labelled:
        raise SparsityError(
            f"the test data {flags.files['test']} has no labels in a column {data.label_column!r}: give --do_predict "
            "for predictions, or name the column"
        )


def _load_model(
    source: str, access: ModelArguments, task: Task, data: Data, processor: Any
) -> tuple[PreTrainedModel, bool]:
    loaded = load_model(source, access, task.auto_class, lambda config: task.configure_(config, data), processor)
    task.prepare_(loaded[0], processor)
    return loaded


class _Reader:
    """Encodes rows when they are read; datasets, which would hash all that an encoder refers to, sees nothing of it.

    That takes minutes where a recipe is a script, whose classes and functions are hashed by their code, and may fail.
    """

    def __init__(self, encoder: Encoder | None) -> None:
        self._encoder = encoder

    def __call__(self, rows: dict[str, list[Any]]) -> Mapping[str, Any]:
        assert self._encoder is not None  # processes that load data are forked
        return self._encoder(rows)

    def __reduce__(self) -> tuple[type["_Reader"], tuple[None]]:
        return _Reader, (None,)

    def __deepcopy__(self, _: dict[int, Any]) -> "_Reader":
        return self


def encode(task: Task, data: Data, processor: Any) -> DatasetDict:
    """Encode all rows, now or each time they are read.

    Raises:
        SparsityError: rows cannot be encoded, or none is left.
    """
    flags, encoders = task.arguments, dict.fromkeys(data.splits, task.encoder(data, processor))
    encoders["train"] = task.training_encoder(data, processor)
    if task.encoded_when_read:
        return DatasetDict(
            {split: rows.with_transform(_Reader(encoders[split])) for split, rows in data.splits.items()}
        )
    encoded = DatasetDict(
        {
            split: rows.map(
                encoders[split],
                batched=True,
                remove_columns=rows.column_names,
                num_proc=flags.preprocessing_num_workers,
                load_from_cache_file=not flags.overwrite_cache,
                desc=f"encoding the {split} data",
            )
            for split, rows in data.splits.items()
        }
    )
    for split, rows in encoded.items():
        if not len(rows):
            raise SparsityError(f"no row is left of the {split} data: {task.why_rows_are_left_out}")
    return encoded


def _batch(rows: Dataset, task: Task, processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """The first rows as one batch without labels, for measuring."""
    first = [rows[row] for row in range(min(MEASURED_BATCH, len(rows)))]
    return {name: tensor.to(model.device) for name, tensor in task.measured(first, processor, model).items()}


def _labelled(data: Data) -> list[str]:
    return [split for split in data.splits if split != "test" or data.test_is_labelled]


def _aim(data: Data) -> str:
    """What a head is trained for, in words."""
    return ", ".join(data.labels[:10]) or "this task"


def _name(task: Task) -> str:
    flags = task.arguments
    name, config = flags.on_hub
    if name is not None:
        return name if config is None else f"{name} ({config})"
    return Path(flags.files["train"]).stem if flags.files else task.embedded_name


# ---- Training and evaluating ----


def _training(task: Task, splits: DatasetDict, processor: Any) -> dict[str, Any]:
    return {
        "train_dataset": splits["train"],
        "eval_dataset": splits["validation"],
        "processing_class": processor,
        "data_collator": task.collator(processor),
        "compute_metrics": functools.partial(task.compute_metrics, rows=splits["validation"]),
        **task.trainer_options(processor),
    }


def _fine_tune(
    model: PreTrainedModel,
    access: ModelArguments,
    epochs: float,
    splits: DatasetDict,
    task: Task,
    processor: Any,
    arguments: RecipeArguments,
) -> PreTrainedModel:
    """The dense model, fine-tuned; with --resume_from_checkpoint, the one that an earlier start has finished."""
    directory = Path(str(arguments.output_dir)) / "dense"
    finished = directory / "model"
    if arguments.resume_from_checkpoint is not None and finished.is_dir():
        model = load_pruned(finished)
        task.prepare_(model, processor)
        return model
    dense = dataclasses.replace(
        arguments,
        output_dir=str(directory),
        num_train_epochs=epochs,
        max_steps=-1,
        push_to_hub=False,
        hub_token=None,
        load_best_model_at_end=False,
        resume_from_checkpoint="auto" if arguments.resume_from_checkpoint else None,
    )
    trainer = task.dense_trainer(model=with_adapter(model, access), args=dense, **_training(task, splits, processor))
    arguments.deepspeed_plugin = None  # accelerate takes one for the first Trainer of a process, and keeps it
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(dense, directory))
    trainer.make_whole_()
    if trainer.is_world_process_zero():
        save_pruned(model, finished, processor)
        for checkpoint in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    return model


def _evaluate_dense(
    model: PreTrainedModel,
    splits: DatasetDict,
    evaluated: Mapping[str, Dataset],
    task: Task,
    processor: Any,
    arguments: RecipeArguments,
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
    # It does not train, but not all Trainers do without training data.
    return _evaluate(
        task.dense_trainer(model=model, args=changed, **_training(task, splits, processor)), evaluated, task
    )


def _evaluate(trainer: Trainer, splits: Mapping[str, Dataset], task: Task) -> dict[str, dict[str, float]]:
    """What a Trainer finds of its model, by split."""
    trainer.args.dataloader_persistent_workers = False  # which would go on with the rows of another split
    trainer.data_collator = task.collator(trainer.processing_class)  # others may join rows, which are counted here
    found = {}
    for split, rows in splits.items():
        trainer.compute_metrics = functools.partial(task.compute_metrics, rows=rows)
        found[split] = trainer.evaluate(rows)
    return found


def _predict(trainer: Trainer, rows: Dataset) -> PredictionOutput:
    trainer.args.train_sampling_strategy = "random"  # Trainer would sort rows by length here, too
    trainer.compute_metrics = None
    return trainer.predict(rows)


# ---- After ----


def _own(found: Mapping[str, Mapping[str, float]], task: Task) -> dict[str, dict[str, float]]:
    """The task's metrics among what Trainer returns, by split."""
    return {
        split: {metric.name: float(values[f"eval_{metric.name}"]) for metric in task.metrics}
        for split, values in found.items()
    }


def _write_results(
    trainer: Trainer, trained: dict[str, float], found: Mapping[str, dict[str, float]], splits: DatasetDict
) -> None:
    """Write what transformers' examples write: results by split, all of them, and the Trainer's state."""
    results = {"train": trained, "eval": found["validation"]}
    if "test" in found:
        results["predict"] = {name.replace("eval_", "predict_", 1): value for name, value in found["test"].items()}
    for (name, values), split in zip(results.items(), ("train", "validation", "test")):
        trainer.save_metrics(name, {**values, f"{name}_samples": len(splits[split])})
    trainer.save_state()
