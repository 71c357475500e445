"""Tokenizers of the kinds that models come with, made after their published behaviour.

kinds/kinds.json says which tokens each has beyond its vocabulary (a leading - for one that is not
special), which its tokenizer, config.json and generation_config.json end with; kinds/*.jinja is its
chat template. The vocabulary itself is the tiny model's: nothing here depends on it.
"""

import json
from pathlib import Path

from athanor import files

HERE = Path(__file__).parent / "kinds"
KINDS = files.read_json(HERE / "kinds.json")


def build(kind: str, tiny: Path, folder: Path) -> Path:
    """Writes a folder with the tokenizer, the template and the configs of a kind; no weights."""
    about = KINDS[kind]
    tokenizer = files.read_json(tiny / "tokenizer.json")
    like = tokenizer["added_tokens"][0]
    first = min(token["id"] for token in tokenizer["added_tokens"])
    for token in tokenizer["added_tokens"]:
        tokenizer["model"]["vocab"].pop(token["content"], None)
    ids = {name.removeprefix("-"): first + i for i, name in enumerate(about["added"])}
    tokenizer["added_tokens"] = [
        like
        | {"id": ids[name.removeprefix("-")], "content": name.removeprefix("-")}
        | {"special": not name.startswith("-")}
        for name in about["added"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    files.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        | {f"{role}_token": about[role] for role in ("bos", "eos", "pad") if role in about},
    )
    for name, key in (("config.json", "config"), ("generation_config.json", "generation")):
        ends = [ids[token] for token in about[key]]
        model = {"model_type": "qwen2"} if key == "config" else {}
        files.write_json(
            folder / name, model | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        )
    template = HERE / f"{kind}.jinja"
    if template.exists():
        text = template.read_text(encoding="utf-8").removesuffix("\n")
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder
