"""What recipes for sounds share: the column that holds them, how they are read, and how long they may be."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from accelerate import PartialState
from datasets import Audio, Dataset, DatasetDict
from transformers import PreTrainedModel

from common.files import DataArguments, holds_texts, require_columns
from hf_sparse import SparsityError

COLUMN = "set --audio_column_name"


@dataclass(frozen=True)
class SoundArguments(DataArguments):
    """`DataArguments` of sounds."""

    audio_column_name: str = field(
        default="audio",
        metadata={"help": "Column of the sounds, or of the paths to them from where the file with the column is."},
    )
    freeze_feature_encoder: bool = field(
        default=True, metadata={"help": "Do not train the convolutions that read samples, where a model has such."}
    )

    @property
    def durations(self) -> tuple[float, float]:
        """The least and the most seconds of a sound to train or to validate on."""
        return 0, float("inf")

    def sounds(self, splits: DatasetDict) -> DatasetDict:
        """Find all sounds: `audio` are their bytes or paths, and `place` says which row it is; other columns stay.

        Training and validation rows of another duration are left out, and their number is printed.

        Raises:
            SparsityError: there is no such column, something in it is no sound, or no duration is right.
        """
        require_columns(splits, [self.audio_column_name], COLUMN)
        found = {}
        for split, rows in splits.items():
            rows = rows.add_column("place", [f"row {number} of the {split} data" for number in range(1, len(rows) + 1)])
            rows = _undecoded(rows, self.audio_column_name, Path(self.files.get(split, "")).parent)
            shortest, longest = (0, float("inf")) if split == "test" else self.durations
            found[split] = rows.filter(
                lambda sound, place, least, most: least <= seconds(sound, place) <= most,
                input_columns=["audio", "place"],
                fn_kwargs={"least": shortest, "most": longest},
                num_proc=self.preprocessing_num_workers,
                desc=f"looking at the {split} sounds",
            )
            limits = f"shorter than {shortest:g} or longer than {longest:g} seconds"
            if not len(found[split]):
                raise SparsityError(f"all sounds of the {split} data are {limits}: raise --max_duration_in_seconds")
            if left_out := len(rows) - len(found[split]):
                PartialState().print(f"{left_out} of {len(rows)} rows of the {split} data are left out: {limits}")
        return DatasetDict(found)


def _undecoded(rows: Dataset, column: str, folder: Path) -> Dataset:
    """Rows with `audio`, from paths below a folder or from what datasets would decode by a package of its own."""
    if column != "audio":
        rows = rows.remove_columns([name for name in rows.column_names if name == "audio"])
        rows = rows.rename_column(column, "audio")
    feature = rows.features["audio"]
    if holds_texts(feature):
        paths = [path and str(folder / path) for path in rows["audio"]]
        rows = rows.remove_columns("audio").add_column("audio", paths)
    elif not isinstance(feature, Audio):
        raise SparsityError(f"column {column!r} holds neither sounds nor paths of files: {COLUMN}")
    return rows.cast_column("audio", Audio(decode=False))


def freeze_(model: PreTrainedModel) -> None:
    """Freeze, in place, the convolutions of a model that reads samples; one that reads spectrograms has none."""
    freeze = getattr(model, "freeze_feature_encoder", None)
    if freeze is not None:
        freeze()


def seconds(sound: dict[str, Any], place: str) -> float:
    """Read from the header of a sound how long it is.

    Raises:
        SparsityError: it is no sound, or empty.
    """
    with _opened(sound, place) as file:
        return file.frames / file.samplerate


def decoded(sound: dict[str, Any], place: str, rate: int, longest: float = float("inf")) -> np.ndarray:
    """Decode a sound, mono, shape (samples,), as float32.

    Args:
        sound: its `bytes`, or its `path`.
        place: which row it is.
        rate: samples a second.
        longest: seconds to read, somewhere in it, by torch's generator.

    Raises:
        SparsityError: it is no sound, or empty.
    """
    with _opened(sound, place) as file:
        frames = round(min(file.frames, longest * file.samplerate))
        if frames < file.frames:
            file.seek(int(torch.randint(file.frames - frames + 1, ())))
        found = file.read(frames, dtype="float32", always_2d=True).mean(axis=1)
        return found if file.samplerate == rate else soxr.resample(found, file.samplerate, rate)


@contextmanager
def _opened(sound: dict[str, Any] | None, place: str) -> Iterator[soundfile.SoundFile]:
    if sound is None or (sound["bytes"] is None and sound["path"] is None):
        raise SparsityError(f"{place} has no sound: fill or drop it")
    content, path = sound["bytes"], sound["path"]
    where = place if path is None else f"{place}, {path},"
    if content is None and not Path(path).is_file():
        raise SparsityError(f"{where} is no file that is there: paths are relative to the file that has them")
    try:
        with soundfile.SoundFile(path if content is None else io.BytesIO(content)) as file:
            if not file.frames:
                raise SparsityError(f"{where} lasts no time: drop it")
            yield file
    except soundfile.SoundFileError as error:
        raise SparsityError(
            f"{where} cannot be decoded ({str(error).rstrip('.')}): give a wav, flac, ogg or mp3 file"
        ) from None
