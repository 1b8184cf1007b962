"""A GGUF file in llama.cpp, in this process: what it computes, one sequence at a time, and how fast."""

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

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Log-probabilities of tokens of whole characters, each after all that are before it, from the second on."""
        return [self._next(tokens[:place], tokens[place]) for place in range(1, len(tokens))]

    def _next(self, prompt: list[int], token: int) -> float:
        # What is reported is the probability before the bias by which the token is chosen.
        answer = self._answer(prompt, 1, logit_bias=[[token, 1e4]], n_probs=1)
        [found] = answer["choices"][0]["logprobs"]["content"]
        assert found["id"] == token
        return float(found["logprob"])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Generate the most probable token after a prompt, and after that one, until there are `count` or the end."""
        answer = self._answer(prompt, count, n_probs=1)
        return [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]

    def speeds(self, prompt: list[int], count: int) -> dict[str, float]:
        """Measure tokens per second: of a prompt that is new to the engine, and of `count` that follow it."""
        timings = self._answer(prompt, count, cache_prompt=False, ignore_eos=True)["timings"]
        return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}

    def _answer(self, prompt: list[int], count: int, **options: Any) -> Any:
        return self.server.handle_completions({"prompt": prompt, "n_predict": count, "temperature": 0, **options})

    def ask(self, path: str, **asked: Any) -> Any:
        """Ask the server something over HTTP."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
