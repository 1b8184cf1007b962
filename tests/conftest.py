"""What holds for all tests: nothing is fetched, one thread, and in which order they run."""

import gc
import os

# Before transformers and datasets are imported: nothing may be fetched, and tokenizers must not fork threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from pruning import MODELS
from transformers import PreTrainedModel

import hf_sparse  # noqa: F401  registers the pruned model types


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of a group follow each other: what they share is made once."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        groups.setdefault(mark.args[0] if mark else item.nodeid, []).append(item)
    items[:] = [item for group in groups.values() for item in group]


def pytest_collection_finish() -> None:
    """Keep what is imported out of all later collections of garbage: every start of a Trainer makes some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
