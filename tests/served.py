"""A GGUF file in llama.cpp, in this process: what it computes, one sequence at a time and in 32 bits."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class Served:
    """A file that llama.cpp has loaded.

    Args:
        path: of the file.
        context: positions.
        threads: of the engine.
        exact: whether keys and values are kept in 32 bits, and not in 16 as by default.
    """

    def __init__(self, path: Path, context: int = 128, threads: int = 1, exact: bool = True) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.warmup, params.verbosity = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def logprobs(self, tokens: list[int], first: int = 1) -> list[float]:
        """Log-probabilities of tokens, each after all that are before it, from the one at `first` on."""
        return [self._next(tokens[:place], tokens[place]) for place in range(first, len(tokens))]

    def _next(self, prompt: list[int], token: int) -> float:
        # What is reported is the probability before the bias by which the token is chosen.
        forced = {"logit_bias": [[token, 1e4]], "n_probs": 1, "n_predict": 1, "temperature": 0}
        [found] = self._completion({"prompt": prompt, **forced})["choices"][0]["logprobs"]["content"]
        assert found["id"] == token
        return found["logprob"]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow a prompt, the most probable one at each place."""
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 1}
        return [one["id"] for one in self._completion(asked)["choices"][0]["logprobs"]["content"]]

    def _completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self.server.handle_completions(asked)

    def ask(self, path: str, **asked: Any) -> Any:
        """What the server answers over HTTP."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
