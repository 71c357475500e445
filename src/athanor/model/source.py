"""Where base models come from: a folder on this machine, or a repository of a hub at a commit.

A repository is resolved once, to a commit, and stages after `prepare` open that commit and no
other. Only safetensors are read, and a model that asks for its own Python code is refused.
"""

import difflib
import errno
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from athanor import files
from athanor.errors import UserError

# Everything that a model needs and nothing that could be run, from the repository's top folder.
PATTERNS = ["*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken"]


# As huggingface_hub takes them: letters and digits, single - . _ between them.
REPO = re.compile(r"\w+([.-]\w+)*/\w+([.-]\w+)*")


@dataclass(frozen=True)
class Source:
    """A base model that was found.

    `path` is what the configuration said; `commit` is the hub's commit, None for a local folder;
    `digest` is the sha256 over all files that are read.
    """

    path: str
    revision: str | None
    commit: str | None
    digest: str

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Reads what `prepare` recorded."""
        return cls(**files.read_json(path))

    def write(self, path: Path) -> None:
        """Records the source for the later stages."""
        files.write_json(path, asdict(self))

    def folder(self) -> Path:
        """The model's folder on this machine, with the same contents that were recorded.

        Raises:
            UserError: where it is gone or, for a local folder, no longer the same.
        """
        if self.commit is not None:
            return _download(self.path, self.commit)
        folder = _local(self.path)
        if digest_model(folder) != self.digest:
            raise UserError(
                f"the model in {folder} is not the one that was prepared: "
                "`uv run dvc repro -f prepare` takes it as it is now"
            )
        return folder


def resolve_source(path: str, revision: str | None) -> Source:
    """Finds a model by folder or by hub repository, downloading it where needed.

    The hub is huggingface_hub's: HF_ENDPOINT names a mirror, HF_TOKEN opens gated repositories.

    Raises:
        UserError: when it can't be found, reached, opened, or read without running its code.
    """
    folder = find_model(path, revision)
    return Source(path, revision, folder.name if is_hub_repo(path) else None, digest_model(folder))


def find_model(path: str, revision: str | None) -> Path:
    """The folder of a model, which asks for no code of its own; downloaded where needed.

    Raises:
        UserError: as resolve does.
    """
    folder = _download(path, revision) if is_hub_repo(path) else _local(path)
    _refuse_code(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is no model's folder: expected config.json in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return dict(config)


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether a config.json says that weights are quantized."""
    return "quantization" in config or "quantization_config" in config


def stated_stop_ids(config: dict[str, Any]) -> list[int]:
    """The tokens that a config.json or generation_config.json says end a text."""
    stated = config.get("eos_token_id")
    return [stated] if isinstance(stated, int) else list(stated or [])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model, in the order of their names.

    Raises:
        UserError: where there are none.
    """
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        there = sorted(path.name for path in folder.iterdir() if path.is_file())
        raise UserError(
            f"{folder}: expected model*.safetensors, the only weights that are read; "
            f"found {', '.join(there) or 'nothing'}"
        )
    return found


def is_hub_repo(path: str) -> bool:
    """Whether a path can only mean a hub's owner/name: models/tinny is a slip, not a repository."""
    return bool(REPO.fullmatch(path)) and not Path(path).parent.is_dir()


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path: {describe_missing_folder(path)}, and it is no owner/name of a hub"
        )
    return folder


def describe_missing_folder(path: str) -> str:
    beside = [str(found.parent) for found in Path(path).expanduser().parent.glob("*/config.json")]
    close = difflib.get_close_matches(path, beside, n=1)
    return f"there is no folder {path} with a model in it" + (
        f" (did you mean {close[0]}?)" if close else ""
    )


def find_local_copy(path: str, revision: str | None) -> Path | None:
    """The model's folder if it is on this machine already; never asks a network."""
    if not is_hub_repo(path):
        folder = Path(path).expanduser()
        return folder if (folder / "config.json").exists() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return Path(found).parent if isinstance(found, str) else None


def _download(repo: str, revision: str | None) -> Path:
    """The folder of a hub repository at a revision, from the cache or from the hub."""
    import httpx2
    from huggingface_hub import constants, errors, snapshot_download

    where = f"{repo} at {revision or 'main'} on {constants.ENDPOINT}"
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=PATTERNS, ignore_patterns="*/*"
            )
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} is gated: ask for access on its page, then `uv run hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{where}: there is no such revision; check model.revision") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: there is no such repository, or it is private; check model.path, "
            "or `uv run hf auth login`"
        ) from error
    except (OSError, httpx2.HTTPError, errors.HfHubHTTPError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{where}: the disk is full at {constants.HF_HUB_CACHE}") from error
        raise UserError(
            f"{where} can't be reached and is not whole on this machine yet "
            f"({type(error).__name__}), and {describe_missing_folder(repo)}: check model.path and "
            "the network, or name a mirror with HF_ENDPOINT; what has arrived is kept"
        ) from error


def digest_model(folder: Path) -> str:
    """The sha256 over all files that are read of a model: weights, configs, tokenizer, template.

    Raises:
        UserError: where there are no safetensors.
    """
    weight_files(folder)
    return files.digest({path for pattern in PATTERNS for path in folder.glob(pattern)})


def _refuse_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for key in ("model_file", "auto_map"):
            if config.get(key):
                raise UserError(
                    f"{path} asks for Python code of its own ({key}: {config[key]}); "
                    "Athanor runs none: choose a model of an architecture that mlx-lm has"
                )
