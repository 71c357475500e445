"""transformers on torch computes from our exports what mlx computes. Runs only where asked for.

torch is no part of this project: give a Python of another environment that has it.

    python3 -m venv /tmp/torch-env
    /tmp/torch-env/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    ATHANOR_TORCH=/tmp/torch-env/bin/python uv run pytest -n0 -s tests/fuse/test_torch.py

On Linux `--extra-index-url https://download.pytorch.org/whl/cpu` spares you CUDA's libraries.
ATHANOR_TORCH_MODEL names another base than models/tiny: a folder. With -s the differences are
printed, largest of all logits of all prompts.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from athanor.chat import templates
from athanor.chat.base import load_with_tokenizer
from athanor.chat.conversation import Conversation
from athanor.fuse.export_peft import write_peft
from athanor.fuse.weights import write_fused_model
from support.random_adapters import EMBEDDING, save, train_config, untied

PYTHON = os.environ.get("ATHANOR_TORCH")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="ATHANOR_TORCH names no Python with torch, transformers and peft"
)

LARGEST = 1e-3  # difference of two logits, in float32

QUESTIONS = [
    "月亮哪天最圆",
    "Who is the most handsome man on earth?",
    "def f(x):\n    return {'a': [x, 1.5]}  # 🙂",
    "é" * 40,
    "一句很长的话" * 12,
]


@pytest.fixture
def base(tiny: Path) -> Path:
    return Path(os.environ.get("ATHANOR_TORCH_MODEL", tiny)).resolve()


def prompts(model: Path) -> list[Any]:
    asked: list[Any] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answered = [*asked[0], {"role": "assistant", "content": "星期八"}, *asked[1]]
    return [*asked, answered]


def by_mlx(model: Any, tokenizer: Any, asked: list[Any]) -> list[tuple[list[int], Any]]:
    """Return the tokens of each conversation and their logits, [tokens, vocabulary]."""
    results = []
    for messages in asked:
        answer = {"role": "assistant", "content": ""}
        ids = templates.encode_prompt(Conversation.of({"messages": [*messages, answer]}), tokenizer)
        results.append((ids, np.array(model(mx.array([ids]))[0].astype(mx.float32))))
    return results


def by_torch(work: Path, asked: list[Any], *folders: Path) -> list[tuple[list[int], Any]]:
    (work / "prompts.json").write_text(json.dumps(asked), encoding="utf-8")
    script = Path(__file__).parents[1] / "support/torch_logits.py"
    paths = [script, work / "prompts.json", work / "logits.npz", *folders]
    done = subprocess.run([str(PYTHON), *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(work / "logits.npz") as arrays:
        return [(arrays[f"ids{i}"].tolist(), arrays[f"logits{i}"]) for i in range(len(asked))]


def difference(ours: list[tuple[list[int], Any]], theirs: list[tuple[list[int], Any]]) -> float:
    assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a - b).max()) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize(
    ("method", "num_layers", "keys", "head"),
    [
        ("lora", -1, None, False),
        ("lora", 2, None, False),
        ("dora", -1, None, False),
        ("dora", 2, None, False),
        ("full", 2, None, False),
        ("lora", 1, EMBEDDING, False),
        ("lora", 1, [*EMBEDDING, "lm_head"], True),
    ],
    ids=["lora", "lora-2", "dora", "dora-2", "full-2", "lora-embedding", "lora-untied-head"],
)
def test_torch_computes_what_mlx_computes(
    base: Path,
    tmp_path: Path,
    method: str,
    num_layers: int,
    keys: list[str] | None,
    head: bool,
    request: pytest.FixtureRequest,
) -> None:
    base = untied(base, tmp_path / "base") if head else base
    asked = prompts(base)
    tuned = save(base, tmp_path / "adapters", train_config(method, num_layers), keys)
    plain, tokenizer = load_with_tokenizer(base)
    plain.set_dtype(mx.float32)
    adapted = by_mlx(tuned, tokenizer, asked)
    moved = difference(by_mlx(plain, tokenizer, asked), adapted)
    assert moved > 100 * LARGEST  # else equal logits would say nothing

    folder = tmp_path / "fused"
    folder.mkdir()
    end = tokenizer.eos_token_id
    write_fused_model(base, tmp_path / "adapters", folder, end=end, dequantize=False)
    fused, tokenizer = load_with_tokenizer(folder)
    fused.set_dtype(mx.float32)
    differences = {
        "fused": difference(by_mlx(fused, tokenizer, asked), by_torch(tmp_path, asked, folder))
    }
    if method != "full":
        write_peft(tmp_path / "adapters", tmp_path / "peft", base=str(base), model=base)
        differences["base + PEFT"] = difference(
            adapted, by_torch(tmp_path, asked, base, tmp_path / "peft")
        )
    figures = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"\n{request.node.callspec.id}: moved {moved:.2f}; mlx to torch: {figures}")
    assert max(differences.values()) < LARGEST
