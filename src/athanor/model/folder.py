"""The look at a model's folder before anything else reads it: others wrote what is in it.

Only regular files are opened. A link is followed inside the folder, and into the caches that make
such links: the hub's and DVC's.
"""

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from athanor.errors import UserError
from athanor.model.config_values import (
    check_against_weights,
    check_config,
    check_end_tokens,
    refuse_code,
)
from athanor.model.json_files import read_object, read_text, refuse_irregular
from athanor.model.safetensors import read_header
from athanor.model.tokenizer_files import check_tokenizer
from athanor.model.weight_files import StoredWeight, list_names

# The files of a model, from the repository's top folder; none of them can be run.
PATTERNS = ["*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken"]
# Files that transformers opens besides them, and a folder with templates.
ALSO_READ = ("*.model",)
TEMPLATES = "additional_chat_templates"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# The end of a file's path in DVC's cache.
IN_DVC_CACHE = re.compile(r"/[0-9a-f]{2}/[0-9a-f]{30}$")


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder that has been looked at.

    Args:
        config: its config.json.
        weights: the weights in its safetensors by name, none where it has no safetensors.
        rows: the number of tokens that the embedding has rows for; None if unknown.
        without_rows: ids of special tokens that the embedding has no row for, by their texts.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, StoredWeight] = field(repr=False)
    rows: int | None
    without_rows: dict[str, int]


def inspect_folder(folder: Path) -> ModelFolder:
    """Look at a model's folder: the kinds of its files, its JSON, and the headers of its weights.

    No weight is read. A folder whose files have not changed since is not looked at again.

    Raises:
        UserError: for the first fault, with the name of its file.
    """
    files = list_files(folder)
    return _inspect(folder, tuple(_signature(name, path) for name, path in sorted(files.items())))


def _signature(name: str, path: Path) -> tuple[str, int, int, int]:
    state = path.stat()
    return name, state.st_ino, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=8)
def _inspect(folder: Path, signatures: tuple[tuple[str, int, int, int], ...]) -> ModelFolder:
    files = {name: folder / name for name, *_ in signatures}
    config = read_config(folder)
    ends = stated_stop_ids(config)
    if path := files.get("generation_config.json"):
        generation = read_object(path)
        check_end_tokens(path, generation)
        ends = stated_stop_ids(generation) or ends
    if path := files.get("hf_quant_config.json"):
        read_object(path)
    weights = _read_weights(folder, files)
    rows = check_against_weights(folder / "config.json", config, weights) if weights else None
    for name, path in files.items():
        if name.endswith(".jinja"):
            read_text(path)
    without_rows = check_tokenizer(files, rows, ends, folder)
    return ModelFolder(folder, config, weights, rows, without_rows)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model.

    Raises:
        UserError: where there is none, or none that a model can be built from.
    """
    path = folder / "config.json"
    if not path.exists() and not path.is_symlink():
        names = list_names(folder)
        if "adapter_config.json" in names:
            raise UserError("model.adapters_folder", folder=folder)
        raise UserError("model.no_config", folder=folder, files=names or "no files")
    _refuse_link_outside(folder, path)
    config = read_object(path)
    refuse_code(path, config)
    check_config(path, config)
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        refuse_code(settings, read_object(settings))
    return config


def stated_stop_ids(config: dict[str, Any]) -> list[int]:
    """Return the end tokens that a config.json or generation_config.json states."""
    stated = config.get("eos_token_id")
    return [stated] if isinstance(stated, int) else [id for id in stated or [] if id is not None]


def list_files(folder: Path) -> dict[str, Path]:
    """Return the files of a model that anything reads, by their names; none is opened.

    Raises:
        UserError: for one that is no regular file, or a link to elsewhere.
    """
    if not folder.is_dir():
        raise UserError("model.no_such_folder", folder=folder)
    try:
        names = sorted(
            {path.name for pattern in (*PATTERNS, *ALSO_READ) for path in folder.glob(pattern)}
        )
        os.scandir(folder).close()
    except OSError as error:
        raise UserError("model.unreadable", path=folder, error=error.strerror) from error
    templates = folder / TEMPLATES
    if templates.is_dir():
        _refuse_link_outside(folder, templates)
        names += sorted(f"{TEMPLATES}/{path.name}" for path in templates.glob("*.jinja"))
    files = {name: folder / name for name in names}
    for path in files.values():
        _refuse_link_outside(folder, path)
        refuse_irregular(path)
    return files


def _refuse_link_outside(folder: Path, path: Path) -> None:
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError("model.dangling_link", path=path, target=path.readlink()) from error
    top = folder.resolve()
    if not any(target.is_relative_to(place) for place in _link_places(top)) and not (
        IN_DVC_CACHE.search(target.as_posix())
    ):
        raise UserError("model.link_outside", path=path, target=target, folder=folder)


def _link_places(folder: Path) -> list[Path]:
    """Return the folders that links of a model's folder may point into."""
    places = [folder]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
        from huggingface_hub import constants

        places.append(Path(constants.HF_HUB_CACHE).resolve())
    return places


def _read_weights(folder: Path, files: dict[str, Path]) -> dict[str, StoredWeight]:
    """Return all weights of a folder by name, from the headers of its files.

    Raises:
        UserError: for a damaged or missing file, a weight that two files have, or an index that
            does not describe the files.
    """
    paths = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    if paths and re.search(r"[*?\[]", str(folder)):
        raise UserError("model.pattern_in_path", folder=folder)
    weights: dict[str, StoredWeight] = {}
    for path in paths.values():
        header = read_header(path)
        if both := weights.keys() & header.keys():
            name = min(both)
            raise UserError(
                "model.weight_twice",
                name=name,
                path=path,
                other=weights[name].file,
                count=len(both),
            )
        weights |= header
    shards = [match for name in paths if (match := SHARD.fullmatch(name))]
    for total in {match[2] for match in shards}:
        there = {int(match[1]) for match in shards if match[2] == total}
        if missing := sorted({*range(1, int(total) + 1)} - there):
            name = f"model-{missing[0]:05}-of-{total}.safetensors"
            raise UserError("model.missing_shard", path=folder / name, count=len(missing))
    if index := files.get(INDEX):
        _check_index(index, paths, weights)
    return weights


def _check_index(index: Path, files: dict[str, Path], weights: dict[str, StoredWeight]) -> None:
    places = read_object(index, unique=True).get("weight_map")
    if not isinstance(places, dict):
        raise UserError("model.index_without_map", path=index)
    for name, file in places.items():
        if not isinstance(file, str) or not re.fullmatch(r"model[^/\\]*\.safetensors", file):
            raise UserError("model.index_outside", path=index, name=name, file=file)
        if file not in files:
            raise UserError("model.missing_shard", path=index.parent / file, count=1)
        stored = weights.get(name)
        if stored is None or stored.file.name != file:
            raise UserError("model.index_misfits", path=index, name=name, file=file)
