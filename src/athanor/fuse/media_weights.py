"""Weights of a base that mlx-lm's model leaves out: those of its towers for images and sound.

They are copied into the fused model unchanged, under the names of the base's files, and so are the
trained ones then: other programs load the fused model as they load the base.
"""

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import make_shards

from athanor import console, files
from athanor.model.folder import INDEX
from athanor.model.stored import read_weights

# In the names of such weights.
MEDIA = re.compile(r"vision|visual|audio|image|speech|multi_?modal|mm_|connector|perceiver")


def save_with_media(folder: Path, model: nn.Module, base: Path) -> bool:
    """Write a model's weights with those of the base's towers; return false where it has none.

    Nothing is written where mlx-lm would then not read its own weights again; that is reported.
    """
    stored = read_weights(base)
    if not any(MEDIA.search(name) for name in stored) or not hasattr(model, "sanitize"):
        return False
    read: dict[str, mx.array] = model.sanitize(dict(stored))
    names = {id(value): name for name, value in stored.items()}
    original = {name: names[id(value)] for name, value in read.items() if id(value) in names}
    used = set(original.values())
    media = {
        name: value
        for name, value in stored.items()
        if name not in used and MEDIA.search(name) and name not in read
    }
    if not media:
        return False
    own: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {original.get(name, name): value for name, value in own.items()} | media
    if model.sanitize(dict(weights)).keys() != own.keys():
        console.warn(
            f"{len(media)} weights for images or sound of {base} are not in the fused model, "
            f"such as {min(media)}: mlx-lm could not read it with them; its config.json still "
            "describes them"
        )
        return False
    _save(folder, weights)
    return True


def _save(folder: Path, weights: dict[str, mx.array]) -> None:
    """Write weights in files of the usual size and names, and their index."""
    size = sum(value.nbytes for value in weights.values())
    shards = make_shards(weights)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        index |= dict.fromkeys(shard, file)
    total = {"total_size": size}
    files.write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(index.items()))})
