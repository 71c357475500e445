"""The real llama.cpp, which xllamacpp brings, on a GGUF of ours."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

from athanor.compute import evaluation


class Llama:
    """llama.cpp's own server on a GGUF, in this process, asked over the loopback address."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.offline = True
        params.port = 0
        params.n_ctx = 1024
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = 0
        # The cache of keys and values would be float16, and the answers another's.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def ids(self, text: str, add_special: bool) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", **body)["tokens"])

    def answer(self, prompt: list[int], max_tokens: int, **body: Any) -> evaluation.Answer:
        body |= {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "return_tokens": True}
        found = self.post("/completion", **body)
        stopped = found["stop_type"] == "eos"
        return evaluation.Answer(found["tokens"][:-1] if stopped else found["tokens"], stopped)

    def logprobs(self, prompt: list[int], count: int) -> dict[int, float]:
        """The logarithm of each token's probability to come next, in nats."""
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": count}
        # There are none where the token is a part of a character.
        found = self.post("/completion", **body).get("completion_probabilities", [])
        return {top["id"]: top["logprob"] for first in found for top in first["top_logprobs"]}
