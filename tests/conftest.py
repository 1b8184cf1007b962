"""What holds for all tests: nothing is fetched, one thread, and in which order they run."""

import gc
import os
from typing import Any

# Before transformers and datasets are imported: nothing may be fetched, and tokenizers must not fork threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from pruning import MODELS
from transformers import PreTrainedModel

import hf_sparse  # noqa: F401  registers the pruned model types
from hf_sparse.training import search

search.SENSITIVITY_ROWS = 16  # with as many as there are, searches here would begin with more forwards than they take


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


def scope(nodeid: str) -> str:
    """What runs in one process since its tests share something: a file, or of the zoo a species."""
    file, _, test = nodeid.partition("::")
    return test[test.find("[") :] if file.endswith("test_zoo.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scopes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return Scopes(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of a scope follow each other: what they share is made once."""
    scopes: dict[str, list[pytest.Item]] = {}
    for item in items:
        scopes.setdefault(scope(item.nodeid), []).append(item)
    items[:] = [item for members in scopes.values() for item in members]


def pytest_collection_finish() -> None:
    """Keep what is imported out of all later collections of garbage: every start of a Trainer makes some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
