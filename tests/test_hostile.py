"""Checkpoints that were damaged or made to do harm: one clear error in bounded time and memory, or the right model."""

import contextlib
import copy
import json
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pruning import bert, llama, plans
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from zoo import ZOO

from hf_sparse import PruningPlan, SparsityError, compact, discover, inspect_checkpoint, load_pruned, save_pruned
from hf_sparse.structure.comparison import outputs
from hf_sparse.structure.example_inputs import example_inputs

SLOWEST, MOST_MEMORY = 30, 4 << 30
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def t5() -> PreTrainedModel:
    return ZOO["t5"].make()


def longformer() -> PreTrainedModel:
    """Its projections pad what they lost."""
    return ZOO["longformer"].make()


def pruned(make: Any) -> PreTrainedModel:
    model = make()
    if make in (bert, llama):
        compact(model, plans(model)["uneven"])
        compact(model, plans(model)["some sublayers"])
    else:
        kept = {block.name: tuple(range(1, block.units, 2)) for block in discover(model).blocks[:-1]}
        compact(model, PruningPlan(kept))
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any], Any, Any]]:
    """(directory to write a mutation into, config, inputs, outputs) of models with every kind of record."""
    disable_progress_bar()
    found = []
    for make in (bert, llama, t5, longformer):
        model = pruned(make).eval()
        directory = tmp_path_factory.mktemp(make.__name__)
        save_pruned(model, directory)
        config = json.loads((directory / "config.json").read_text())
        inputs = example_inputs(model)
        with torch.no_grad():
            found.append((directory, config, inputs, outputs(model, inputs)))
    records = {key for _, config, *_ in found for key, value in config["hf_sparse"].items() if value}
    assert {"shapes", "attributes", "selections", "padded", "removed", "caches", "identities"} <= records
    return found


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    """No load may take long or much memory."""

    def hang(*_: object) -> None:
        raise AssertionError(f"still at it after {SLOWEST} seconds of the processor")

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY, before[1]))
    handler = signal.signal(signal.SIGVTALRM, hang)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


@torch.no_grad()
def refused_or_right(directory: Path, inputs: Any, expected: dict[str, torch.Tensor]) -> bool:
    """Whether it was refused, by one clear error; it must compute the same if it was not."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SLOWEST)
    with contextlib.suppress(SparsityError):
        assert str(inspect_checkpoint(directory))
    try:
        model = load_pruned(directory).eval()
    except SparsityError as error:
        assert str(directory) in str(error) and len(str(error)) < 3000
        return True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    found = outputs(model, inputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    return False


# ---- Configs ----

# Entries that say what a stock model computes, and may be edited: these are believed.
FREE = {"hidden_act", "activation_function", "rope_parameters", "position_embedding_type", "feed_forward_proj"}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 5, 7, 2**31, 2**40, 10**30, -(10**9), 1.5, True])
VALUES = NUMBERS | st.sampled_from([None, "", "../../etc/passwd", "x", [], {}, [[]], [-1], [0, 0], [10**12], {"": 1}])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a JSON value is."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def sizes(config: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Where the sizes, indices, paths and names in a config are."""
    structural = ("hf_sparse", "per_layer_config", "auto_map", "architectures", "base_model_type", "base_architecture")
    whole = [place for place in places(config) if place[0] in (*structural, "model_type")]
    numbers = [(name,) for name, value in config.items() if type(value) is int and name not in FREE]
    return whole + [place for place in numbers if not place[0].endswith(("_id", "_ids", "_positions", "_distance"))]


def mutate(data: st.DataObject, config: dict[str, Any]) -> None:
    """Change one thing, in place."""
    place = data.draw(st.sampled_from(sizes(config)))
    holder: Any = config
    for key in place[:-1]:
        holder = holder[key]
    key = place[-1]
    beside = [other[-1] for other in sizes(config) if other[:-1] == place[:-1]]
    kinds = ["replace", "delete", "swap"] + (["rename", "copy"] if isinstance(holder, dict) else ["repeat"])
    kind = data.draw(st.sampled_from(kinds))
    if kind == "replace":
        holder[key] = copy.deepcopy(data.draw(VALUES))
    elif kind == "delete":
        del holder[key]
    elif kind == "swap":
        other = data.draw(st.sampled_from(beside))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "rename":
        holder[data.draw(st.sampled_from(["", "..", "/etc/passwd", "__class__", "forward", f"{key}x"]))] = holder.pop(
            key
        )
    elif kind == "copy":
        holder[data.draw(st.sampled_from(beside))] = copy.deepcopy(holder[key])
    else:
        holder.insert(key, holder[key])


@settings(max_examples=500, **COMMON)
@given(data=st.data(), which=st.integers(0, 3), count=st.integers(1, 3))
def test_a_changed_config_is_refused_or_makes_no_difference(
    checkpoints: list[Any], data: st.DataObject, which: int, count: int
) -> None:
    directory, config, inputs, expected = checkpoints[which]
    mutated = copy.deepcopy(config)
    for _ in range(count):
        mutate(data, mutated)
    (directory / "config.json").write_text(json.dumps(mutated))
    refused_or_right(directory, inputs, expected)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"model_type": 3}',
        '{"model_type": "hf_sparse_bert"}',
        '{"model_type": "hf_sparse_nothing", "hf_sparse": {}}',
        '{"model_type": "hf_sparse_bert", "hf_sparse": null}',
        "[" * 200_000,
        '{"model_type": ' * 100_000,
        '{"model_type": "hf_sparse_bert", "num_hidden_layers": 1e400}',
        "\x00\xff",
    ],
)
def test_what_is_no_config_is_refused(checkpoints: list[Any], text: str) -> None:
    directory, config, inputs, expected = checkpoints[0]
    (directory / "config.json").write_text(text)
    try:
        assert refused_or_right(directory, inputs, expected)
        with pytest.raises(SparsityError):
            inspect_checkpoint(directory)
    finally:
        (directory / "config.json").write_text(json.dumps(config))


def seal(config: dict[str, Any]) -> None:
    """As somebody would who writes a recipe of their own."""
    from hf_sparse.modeling_hf_sparse import _checksum

    config["hf_sparse"]["checksum"] = _checksum(config["hf_sparse"])


@pytest.mark.parametrize(
    ("key", "path", "value", "message"),
    [
        ("shapes", "encoder.layer.0.output.dense.weight", [32, 10**6], "larger than the stock"),
        ("shapes", "encoder.layer.0.output.dense.weight", [32], "cannot have"),
        ("shapes", "encoder.layer.9.output.dense.weight", [1, 1], "does not have"),
        ("shapes", "encoder.layer.1.output.dense.weight", [32, 1], "lack|size|mismatch"),
        ("attributes", "encoder.layer.1.attention.self", {"forward": 3}, "no such size"),
        ("attributes", "encoder.layer.1.attention.self", {"__dict__": 3}, "no such size"),
        ("attributes", "encoder.layer.1.attention.self", {"config.hidden_size.__class__": 3}, "no such size"),
        ("removed", "encoder.layer.1.attention.self", {"kind": "attention", "output": "nowhere"}, "cannot be"),
        ("identities", None, ["encoder"], "."),
        ("identities", None, [""], "not a list of paths"),
        ("sizes", "num_hidden_layers", 10**9, "no model has as many|but was"),
        ("sizes", "num_labels", 10**8, "no model has as many"),
    ],
)
def test_recipes_made_by_hand_are_checked(
    checkpoints: list[Any], key: str, path: str | None, value: Any, message: str
) -> None:
    directory, config, *_ = checkpoints[0]
    mutated = copy.deepcopy(config)
    if path is None:
        mutated["hf_sparse"][key] = value
    else:
        mutated["hf_sparse"][key][path] = value
    if key == "sizes":
        mutated[path] = value
    seal(mutated)
    (directory / "config.json").write_text(json.dumps(mutated))
    try:
        with pytest.raises(SparsityError, match=message):
            load_pruned(directory)
    finally:
        (directory / "config.json").write_text(json.dumps(config))


def test_a_model_without_end_is_not_begun(checkpoints: list[Any]) -> None:
    directory, config, inputs, expected = checkpoints[0]
    for name, size in (("num_hidden_layers", 9_999), ("hidden_size", 32 * 10**6)):
        mutated = copy.deepcopy(config)
        mutated[name] = mutated["hf_sparse"]["sizes"][name] = size
        seal(mutated)
        (directory / "config.json").write_text(json.dumps(mutated))
        assert refused_or_right(directory, inputs, expected), name
    (directory / "config.json").write_text(json.dumps(config))


# ---- Weights ----


@settings(max_examples=250, **COMMON)
@given(data=st.data(), which=st.integers(0, 3))
def test_changed_weight_files_are_refused(checkpoints: list[Any], data: st.DataObject, which: int) -> None:
    directory, _, inputs, expected = checkpoints[which]
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["cut", "byte", "length", "drop", "rename", "shape", "add", "swap"]))
    if kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    elif kind == "byte":
        at = data.draw(st.integers(0, header - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    elif kind == "length":
        size = data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        path.write_bytes(size.to_bytes(8, "little") + whole[8:])
    elif kind == "swap":
        path.write_bytes((checkpoints[(which + 1) % 4][0] / "model.safetensors").read_bytes())
    else:
        tensor = tensors[name]
        if kind in ("drop", "rename"):
            del tensors[name]
        if kind == "rename":
            tensors[f"{name}x"] = tensor
        elif kind == "add":
            tensors[f"{name}.more"] = tensor.clone()
        elif kind == "shape":
            tensors[name] = torch.cat([tensor, tensor])
        save_file(tensors, path, {"format": "pt"})
    try:
        refused_or_right(directory, inputs, expected)
    finally:
        path.write_bytes(whole)


class Harmful:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_not_read(checkpoints: list[Any], name: str, tmp_path: Path) -> None:
    directory, *_ = checkpoints[0]
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    try:
        for load in (load_pruned, AutoModelForSequenceClassification.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises((ValueError, OSError)):
                load(directory)
        with pytest.raises(SparsityError, match="no whole weights as safetensors"):
            inspect_checkpoint(directory)
        assert not (tmp_path / "harm").exists()
    finally:
        (directory / name).unlink()
        (directory / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize(
    "index",
    [
        "[" * 100_000,
        "{}",
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "missing.safetensors"}}',
    ],
)
def test_an_index_names_only_files_beside_it(checkpoints: list[Any], index: str) -> None:
    directory, *_ = checkpoints[0]
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(index)
    try:
        for look in (load_pruned, inspect_checkpoint):
            with pytest.raises(SparsityError):
                look(directory)
    finally:
        (directory / "model.safetensors.index.json").unlink()
        (directory / "model.safetensors").write_bytes(whole)
