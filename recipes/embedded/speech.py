"""The embedded default speech: digits to classify, and short phrases to recognize, by English voices of eSpeak NG.

They are made at run time by the library inside of the package espeakng-loader, whose own code is not imported. eSpeak
NG is under the GPL, version 3, so nothing made with it is stored with this project.
"""

import ctypes
import io
import itertools
import random
import shutil
import sys
import tempfile
import wave
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

from embedded.installed import installed_file
from embedded.splits import split
from hf_sparse import SparsityError

PACKAGE = "espeakng-loader==0.2.4"
LIBRARY = {"linux": "libespeak-ng.so", "darwin": "libespeak-ng.dylib"}.get(sys.platform, "espeak-ng.dll")
RATE = 16_000  # samples a second
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-029")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASE = (  # one word of each
    ("bring", "find", "hide", "move", "wash"),
    ("two", "three", "five", "seven", "nine"),
    ("black", "blue", "green", "red", "white"),
    ("books", "cups", "keys", "pens", "shoes"),
    ("again", "here", "later", "now", "outside"),
)


def spoken_digits(seed: int, speakers: int | None = None) -> DatasetDict:
    """Make splits with columns `audio`, `label` and `speaker`: every digit in every accent, by so many or all speakers.

    All are 92; they say 3,680 digits, 23 minutes, which takes ten seconds. No speaker of test is in train.
    The same seed gives the same rows. `audio` has WAV files of 16 kHz as bytes, not decoded: datasets would need
    torchcodec for that.

    Raises:
        SparsityError: the package is not installed.
    """
    generator = random.Random(seed)
    lines = {}
    for part, names in split(_speakers(generator)[:speakers]).items():
        lines[part] = [(digit, accent, name) for digit in DIGITS for accent in ACCENTS for name in names]
        generator.shuffle(lines[part])
    return _said(lines, "label", ClassLabel(names=list(DIGITS)))


def spoken_phrases(seed: int, count: int = 1000) -> DatasetDict:
    """Make splits with columns `audio`, `text` and `speaker`: so many of the 3,125 phrases of PHRASE, each said once.

    The default is 25 minutes of sound, which takes ten seconds. No phrase and no speaker of test is in train; else all
    is as in `spoken_digits`.

    Raises:
        SparsityError: the package is not installed.
    """
    generator = random.Random(seed)
    names = split(_speakers(generator))
    phrases = generator.sample([" ".join(words) for words in itertools.product(*PHRASE)], count)
    lines = {
        part: [(phrase, generator.choice(ACCENTS), generator.choice(names[part])) for phrase in chosen]
        for part, chosen in split(phrases).items()
    }
    return _said(lines, "text", Value("string"))


def _speakers(generator: random.Random) -> list[str]:
    """Names of eSpeak's variants of voices, shuffled; without those whose breath is random, which no seed fixes."""
    variants = installed_file(PACKAGE, "espeak-ng-data/voices/!v").iterdir()
    names = sorted(path.name for path in variants if b"breath" not in path.read_bytes())
    return generator.sample(names, len(names))


def _said(parts: dict[str, list[tuple[str, str, str]]], target: str, kind: ClassLabel | Value) -> DatasetDict:
    """Rows of texts, each said in an accent by a speaker; the texts are in a column of this name and kind."""
    espeak, made = Espeak(), {}
    features = Features({"audio": Audio(RATE, decode=False), target: kind, "speaker": Value("string")})
    for part, lines in parts.items():
        rows = {
            "audio": [{"bytes": espeak.say(text, f"{accent}+{name}"), "path": None} for text, accent, name in lines],
            target: [kind.encode_example(text) for text, _, _ in lines],
            "speaker": [name for _, _, name in lines],
        }
        made[part] = Dataset(pa.table(rows, schema=features.arrow_schema))  # from_dict would need torchcodec
    return DatasetDict(made)


class Espeak:
    """The library, in memory on its own.

    Raises:
        SparsityError: the package is not installed.
    """

    def __init__(self) -> None:
        path = installed_file(PACKAGE, LIBRARY)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            # How something sounds depends on what was said before. A copy of the library has said nothing yet.
            self._library = ctypes.CDLL(shutil.copy(path, directory))
        self._rate = self._library.espeak_Initialize(2, 0, str(path.parent).encode(), 0)  # 2: say nothing aloud, wait
        self._heard: list[np.ndarray] = []
        self._listener = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
            self._listen
        )
        self._library.espeak_SetSynthCallback(self._listener)

    def say(self, text: str, voice: str) -> bytes:
        """Say a text by a voice, such as en-us+f1; returns a WAV file of RATE samples a second, 16 bits each.

        Raises:
            SparsityError: there is no such voice.
        """
        self._heard.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SparsityError(f"eSpeak NG has no voice {voice}: install {PACKAGE}")
        self._library.espeak_Synth(text.encode(), ctypes.c_size_t(0), 0, 1, 0, 1, None, None)  # all of a text in UTF-8
        sound = np.concatenate(self._heard)
        times = np.arange(0, len(sound), self._rate / RATE)
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, RATE, 0, "NONE", ""))
            writer.writeframes(np.interp(times, np.arange(len(sound)), sound).astype("<i2").tobytes())
        return file.getvalue()

    def _listen(self, samples: Any, count: int, _: Any) -> int:
        if count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0
