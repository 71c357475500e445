"""Logits by transformers on torch's CPU, in float32: what test_torch.py runs where torch is.

    python torch_logits.py PROMPTS OUT BASE [ADAPTERS]

Reads conversations (JSON), a model's folder and perhaps PEFT adapters; writes to OUT (.npz), for
each conversation i, `ids{i}` (tokens,) and `logits{i}` (tokens, vocabulary). Anything that PEFT or
transformers warns of while loading is an error.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch  # type: ignore[import-not-found]
from peft import PeftModel  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(prompts: str, out: str, base: str, adapters: str | None = None) -> None:
    warnings.simplefilter("error", UserWarning)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model, loading = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: found for kind, found in loading.items() if found}
    if wrong:
        sys.exit(f"{base}: not loaded as it is: {wrong}")
    if adapters is not None:
        model = PeftModel.from_pretrained(model, adapters)
    model.eval()
    found = {}
    for i, messages in enumerate(json.loads(Path(prompts).read_text(encoding="utf-8"))):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            found[f"logits{i}"] = model(ids).logits[0].numpy()
        found[f"ids{i}"] = ids[0].numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
