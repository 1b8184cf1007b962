"""Choose the checkpoint that a run resumes from: the newest one that was written completely."""

import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_sparse.config import DistillationConfig, SearchConfig
from hf_sparse.errors import SparsityError, first_line
from hf_sparse.runtime.processes import once
from hf_sparse.training.run import STATE, Run

logger = logging.get_logger(__name__)

LATEST = "latest"
"""Names the directory of DeepSpeed in a checkpoint, and is written last."""


def checkpoint_defect(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from exactly: a file is missing, cut off or damaged. None if it is whole.

    Nothing in it is unpickled. A Trainer without stages leaves no state of one.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        processes = Run.read(checkpoint).processes if (checkpoint / STATE).is_file() else 1
        for path in _weights(checkpoint):
            with safe_open(path, framework="pt") as file:
                file.keys()
        names = ["scheduler.pt", *_optimizer(checkpoint, processes)]
        names += [f"rng_state_{rank}.pth" for rank in range(processes) if processes > 1]
        named = [checkpoint / name for name in names]
        for path in named:
            if not path.is_file():
                return f"{path.name} is missing"
        for path in {*named, *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")}:
            if path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{path.name} is damaged"
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        SparsityError,
        SafetensorError,
        zipfile.BadZipFile,
    ) as error:
        return str(error).splitlines()[0]
    return None


def _weights(checkpoint: Path) -> Iterable[Path]:
    """The safetensors of a checkpoint; none where an engine keeps its shards in another form."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return [checkpoint / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    sharded = checkpoint / f"{FSDP_MODEL_NAME}_0"
    if sharded.is_dir():
        (sharded / ".metadata").stat()  # written last
        return []
    if any(checkpoint.glob(f"*/{_share(0, 'model')}")):  # of ZeRO stage 3
        return []
    return [checkpoint / SAFE_WEIGHTS_NAME]


def _optimizer(checkpoint: Path, processes: int) -> list[str]:
    """Files that an optimizer's state needs."""
    if (checkpoint / LATEST).is_file():  # of DeepSpeed
        tag = Path((checkpoint / LATEST).read_text().strip()).name
        half = "bf16_" if any((checkpoint / tag).glob("bf16_zero_*")) else ""
        parts = [f"{half}{_share(rank, 'optim')}" for rank in range(processes)]
        if (checkpoint / tag / _share(0, "model")).is_file():  # stage 3
            parts += [_share(rank, "model") for rank in range(processes)]
        else:
            parts.append("mp_rank_00_model_states.pt")
        return [f"{tag}/{name}" for name in parts]
    if (checkpoint / "optimizer_0").is_dir():
        return ["optimizer_0/.metadata"]
    return ["optimizer.bin" if (checkpoint / "optimizer.bin").is_file() else "optimizer.pt"]


def _share(rank: int, kind: str) -> str:
    """What DeepSpeed calls the share of a process."""
    return f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    numbered = [(path.name.rpartition("-")[2], path) for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [path for _, path in sorted(((int(n), path) for n, path in numbered if n.isdecimal()), reverse=True)]


def newest_whole_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed from; warns of newer ones that cannot."""
    for path in checkpoints(directory):
        reason = checkpoint_defect(path)
        if reason is None:
            return path
        logger.warning("%s is not whole (%s): going on from the one before.", path, reason)
    return None


def settings(config: SearchConfig) -> dict[str, Any]:
    """The settings that must not change when a run is resumed: those of the search, not of the distillation."""
    learning = {option.name for option in fields(DistillationConfig)}
    return {name: value for name, value in asdict(config).items() if name not in learning}


def require_same_settings(checkpoint: Path, before: Mapping[str, Any], config: SearchConfig) -> None:
    """Refuse a checkpoint of a run that searches in another way.

    Args:
        checkpoint: for the message.
        before: settings of its run.
        config: of this run.

    Raises:
        SparsityError: a setting differs.
    """
    now = settings(config)
    before = {**settings(type(config)()), **before}  # an option that its version lacked changed nothing there
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        were = ", ".join(f"{name}={before.get(name)!r} (now {now[name]!r})" for name in changed)
        raise SparsityError(f"{checkpoint} is of a run with {were}: go on with the same, or start anew")


@contextmanager
def names_in_memory(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context a model is saved with the names that its tensors have now, by which Trainer loads them.

    Otherwise transformers saves those that it has renamed while loading, such as of experts, under their older names.
    """
    own = vars(model)
    before = own.get("_weight_conversions")
    own["_weight_conversions"] = []
    try:
        yield
    finally:
        if before is None:
            del own["_weight_conversions"]
        else:
            own["_weight_conversions"] = before


def checked(wanted: Path | None, directory: Path) -> str:
    """A whole checkpoint, the newest by default; the main process chooses for all.

    Args:
        wanted: that was asked for, or None for the newest.
        directory: of the run.

    Raises:
        SparsityError: the one that was given is not whole, or none is.
    """

    def choose() -> Path | str | None:
        if wanted is None:
            return newest_whole_checkpoint(directory)
        return checkpoint_defect(wanted) or wanted

    path = once(choose)
    if path is None:
        raise SparsityError(f"no whole checkpoint in {directory}: start without resume_from_checkpoint")
    if isinstance(path, str):
        raise SparsityError(f"{wanted} is not a whole checkpoint ({path}): give another, or True for the newest")
    return str(path)


def require_all_loaded(model: nn.Module, missing: Iterable[str], unexpected: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks tensors, or has others: Trainer would go on with those that it has.

    Args:
        model: that it was loaded into.
        missing: names of its tensors that the checkpoint lacks.
        unexpected: names of those that the checkpoint has beside.

    Raises:
        SparsityError: there are some.
    """
    without = set(missing)
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in named.items() if name not in without}  # some may be tied
    lacking = sorted(name for name in without if id(named.get(name)) not in loaded)
    if lacking or unexpected:
        what = f"lacks {lacking[0]}" if lacking else f"also has {unexpected[0]}"
        raise SparsityError(f"the checkpoint is not of this model: it {what}")


@contextmanager
def writing(directory: Path, step: int, is_writer: bool) -> Iterator[None]:
    """Write a checkpoint inside this context.

    Args:
        directory: of the run.
        step: optimizer steps that are over.
        is_writer: whether this process writes it.

    Raises:
        SparsityError: it could not be written.
    """
    if is_writer:
        _order_times(checkpoints(directory))
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, SparsityError) as error:
        raise SparsityError(
            f"the checkpoint of step {step} could not be written to {directory} "
            f"({first_line(error)}): make room and resume; it goes on from the one before"
        ) from error


def _order_times(newest_first: list[Path]) -> None:
    """Trainer deletes the oldest checkpoints by their times: let a clock that was set back not make a new one old."""
    now = time.time()
    for age, path in enumerate(newest_first, start=1):
        if path.stat().st_mtime > now - age:
            os.utime(path, (now - age, now - age))
