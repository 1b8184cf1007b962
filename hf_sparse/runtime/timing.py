"""Measure times: calls take turns in random order, so that disturbances meet all of them alike."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WARMUP = 2
LONGEST = 60  # seconds
HEAP, PIECE = 256 << 20, 64 << 10  # bytes


def shortest_ms(runs: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> list[float]:
    """Measure the shortest of `repeats` times of each call in milliseconds; the first rounds, not counted, warm up.

    In a fixed order a disturbance in the same rhythm would always meet the same call. Disturbances only add time, so
    the shortest time has the least of them. Of what takes long, there are as many rounds as fit in a minute.
    """
    shortest, draw, began = [float("inf")] * len(runs), random.Random(0), time.perf_counter()
    with _kept_heap(device):
        for repeat in range(repeats + WARMUP):
            if repeat > WARMUP and time.perf_counter() - began > LONGEST:
                break
            for index in draw.sample(range(len(runs)), len(runs)):
                _synchronize(device)
                start = time.perf_counter()
                runs[index]()
                _synchronize(device)
                if repeat >= WARMUP:
                    shortest[index] = min(shortest[index], 1000 * (time.perf_counter() - start))
    return shortest


@contextmanager
def _kept_heap(device: torch.device) -> Iterator[None]:
    """Keep malloc from giving free memory at the end of the heap back to the system.

    It does so when much is free there, which depends on what the process has done before. The activations of the larger
    models that are compared then take page faults in every forward, up to a fifth of the time; those of others do not.
    """
    pieces = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(HEAP // PIECE)] if device.type == "cpu" else []
    del pieces[:-1]  # what is free now has something behind it
    yield


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name a device as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "1 thread"
    return ", ".join(filter(None, [device.type, _processor() if device.type == "cpu" else "", threads]))


def _processor() -> str:
    """What Linux calls the processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
