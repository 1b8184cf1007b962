"""Started by test_fresh_processes.py: loads checkpoints, with or without the library, and compares their outputs."""

import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from transformers.utils.logging import disable_progress_bar


def tensors(output: object) -> list[torch.Tensor]:
    """The floating-point tensors of an output, but for caches, which differ where sublayers are gone."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = [value for name, value in output.items() if name != "past_key_values" and "attentions" not in name]
    return [tensor for value in output for tensor in tensors(value)] if isinstance(output, list | tuple) else []


def check(directory: Path, with_library: bool) -> None:
    config = json.loads((directory / "config.json").read_text())
    expected = torch.load(directory / "expected.pt")  # written by the test itself
    if "auto_map" in config:
        names = [name for name in config["auto_map"] if name != "AutoConfig"]
        auto, options = getattr(transformers, names[0]), {} if with_library else {"trust_remote_code": True}
        model = auto.from_pretrained(directory, **options)
        assert type(model).__name__ == "HfSparse" + config["architectures"][0].removeprefix("HfSparse")
        assert type(model).__module__.startswith("hf_sparse" if with_library else "transformers_modules")
    else:
        model = getattr(transformers, config["architectures"][0]).from_pretrained(directory)
    torch.manual_seed(0)
    with torch.no_grad():
        found = tensors(dict(model.eval()(**expected["inputs"])))
    assert len(found) == len(expected["outputs"]) > 0
    for one, other in zip(found, expected["outputs"]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def main(way: str, directories: list[str]) -> None:
    if way == "with":
        import hf_sparse  # noqa: F401  registers the pruned model types
    else:
        sys.modules["hf_sparse"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for path in directories:
        try:
            check(Path(path), way == "with")
        except Exception:
            print(f"{Path(path).name}: {traceback.format_exc(limit=-3)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
