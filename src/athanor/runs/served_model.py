"""The code of a fused model in MLflow, which answers chats with mlx-lm.

MLflow keeps a copy of this file beside the model and runs it wherever the model is loaded, also
without Athanor: it imports only mlx-lm and what MLflow brings. The input is a row for each
conversation: `messages`, and optionally `max_tokens` and `temperature`. The output has the shape of
OpenAI's chat completions. The defaults are the model's config in the file MLmodel.
"""

import ctypes
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class FusedModel(PythonModel):
    """A model that answers one conversation at a time."""

    def load_context(self, context: Any) -> None:
        """Load the folder `model`, and compute as in its test."""
        if sys.platform == "linux" and os.environ.get("ATHANOR_BLAS") != "wheel":
            with suppress(OSError):  # faster than the BLAS in mlx's wheel, if loaded before mlx
                ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        import mlx.core as mx
        from mlx_lm import load

        cpu = mx.default_device() == mx.Device(mx.cpu)
        if cpu:  # half precision is slow there, and compiling needs a C++ compiler
            mx.disable_compile()
        # Its end tokens are those of generation_config.json and the tokenizer's own.
        self.model, self.tokenizer = load(context.artifacts["model"])
        if cpu:
            self.model.set_dtype(mx.float32)
            mx.eval(self.model.parameters())
        self.lock = threading.Lock()

    def predict(
        self, context: Any, model_input: pd.DataFrame
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return a completion for one conversation, a list of them for several."""
        completions = []
        for row in model_input.to_dict(orient="records"):
            messages = list(row.pop("messages"))
            # A value is missing if only other rows have it.
            options = {key: value for key, value in row.items() if not pd.isna(value)}
            completions.append(self._complete(messages, **{**context.model_config, **options}))
        return completions[0] if len(completions) == 1 else completions

    def _complete(
        self,
        messages: list[dict[str, Any]],
        *,
        name: str,
        max_tokens: int,
        temperature: float,
        merge_system: bool = False,
        template_opening: str = "",
    ) -> dict[str, Any]:
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        messages = put_system_into_questions(messages) if merge_system else messages
        prompt = self._prompt(messages, template_opening)
        sampler = make_sampler(temp=float(temperature))  # 0 is greedy
        ids, finish = [], "length"
        with self.lock:
            for step in stream_generate(
                self.model, self.tokenizer, prompt, max_tokens=int(max_tokens), sampler=sampler
            ):
                ids.append(step.token)
                finish = step.finish_reason or finish
        used = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        if finish == "stop":
            ids.pop()  # the end token
        # With special tokens, so that a stray one shows.
        content = self.tokenizer.decode(ids, skip_special_tokens=False)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": finish,
                }
            ],
            "usage": {**used, "total_tokens": sum(used.values())},
        }

    def _prompt(self, messages: list[dict[str, Any]], opening: str) -> list[int]:
        if not self.tokenizer.has_chat_template:  # a model of plain texts continues the last one
            return list(self.tokenizer.encode(messages[-1]["content"]))
        # The opening fixes the date that the template writes, as in the training.
        dated = {"chat_template": opening + self.tokenizer.get_chat_template()} if opening else {}
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **dated
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def put_system_into_questions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which each system message opens the question after it, as trained."""
    merged: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user":
            content = "\n\n".join([*waiting, message["content"]])
            merged.append({**message, "content": content})
            waiting = []
        else:
            merged.append(message)
    return [*merged, *({"role": "user", "content": text} for text in waiting)]


set_model(FusedModel())
