"""Sources of base models: a folder on this machine, or a repository of a hub at a commit.

A repository is resolved once, to a commit, and stages after `prepare` open only that commit. Only
safetensors are read, and a model that asks for its own Python code is refused.
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

# The files of a model, from the repository's top folder; none of them can be run.
PATTERNS = ["*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken"]


# Repositories as huggingface_hub takes them: letters and digits, single - . _ between them.
REPO = re.compile(r"\w+([.-]\w+)*/\w+([.-]\w+)*")


@dataclass(frozen=True)
class Source:
    """A base model at its source.

    Args:
        path: model.path of the configuration.
        revision: model.revision.
        commit: the hub's commit, None for a local folder.
        digest: the sha256 over all files that are read.
    """

    path: str
    revision: str | None
    commit: str | None
    digest: str

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Read the source that `prepare` recorded."""
        return cls(**files.read_json(path))

    def write(self, path: Path) -> None:
        """Record the source for the later stages."""
        files.write_json(path, asdict(self))

    def folder(self) -> Path:
        """Return the model's folder on this machine, with the contents that were recorded.

        Raises:
            UserError: where it is gone or, for a local folder, has changed.
        """
        if self.commit is not None:
            return _download(self.path, self.commit)
        folder = _local(self.path)
        if digest_model(folder) != self.digest:
            raise UserError("model.changed", folder=folder)
        return folder


def resolve_source(path: str, revision: str | None) -> Source:
    """Find a model by folder or by hub repository, and download it where needed.

    HF_ENDPOINT names a mirror of the hub, and HF_TOKEN opens gated repositories.

    Raises:
        UserError: where it cannot be found, reached, opened, or read without running its code.
    """
    folder = find_model(path, revision)
    return Source(path, revision, folder.name if is_hub_repo(path) else None, digest_model(folder))


def find_model(path: str, revision: str | None) -> Path:
    """Return the folder of a model, downloaded where needed.

    Raises:
        UserError: as resolve_source does.
    """
    folder = _download(path, revision) if is_hub_repo(path) else _local(path)
    _refuse_code(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError("model.no_config", folder=folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("model.config_not_json", path=path, error=error) from error
    return dict(config)


def is_quantized(config: dict[str, Any]) -> bool:
    """Return whether a config.json says that weights are quantized."""
    return "quantization" in config or "quantization_config" in config


def stated_stop_ids(config: dict[str, Any]) -> list[int]:
    """Return the end tokens that a config.json or generation_config.json states."""
    stated = config.get("eos_token_id")
    return [stated] if isinstance(stated, int) else list(stated or [])


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model, in the order of their names.

    Raises:
        UserError: where there are none.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        raise UserError("model.no_weights", folder=folder, files=names or "no files")
    return paths


def is_hub_repo(path: str) -> bool:
    """Return whether a path means a hub's owner/name: models/tinny is a typo, not a repository."""
    return bool(REPO.fullmatch(path)) and not Path(path).parent.is_dir()


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise missing_folder(path)
    return folder


def missing_folder(path: str) -> UserError:
    """Return the error of a folder that does not exist, with a similar one beside it, if any."""
    models = [str(config.parent) for config in Path(path).expanduser().parent.glob("*/config.json")]
    if close := difflib.get_close_matches(path, models, n=1):
        return UserError("model.no_folder_but_another", path=path, other=close[0])
    return UserError("model.no_folder", path=path)


def find_local_copy(path: str, revision: str | None) -> Path | None:
    """Return the model's folder if it is on this machine; never ask a network."""
    if not is_hub_repo(path):
        folder = Path(path).expanduser()
        return folder if (folder / "config.json").exists() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return Path(cached).parent if isinstance(cached, str) else None


def _download(repo: str, revision: str | None) -> Path:
    """Return the folder of a hub repository at a revision, from the cache or from the hub."""
    import httpx2
    from huggingface_hub import constants, errors, snapshot_download

    at, hub, cache = revision or "main", constants.ENDPOINT, constants.HF_HUB_CACHE
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=PATTERNS, ignore_patterns="*/*"
        )
    except errors.GatedRepoError as error:
        raise UserError("model.gated", repo=repo, revision=at, hub=hub) from error
    except errors.RevisionNotFoundError as error:
        raise UserError("model.no_revision", repo=repo, revision=at, hub=hub) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError("model.no_repository", repo=repo, revision=at, hub=hub) from error
    except (OSError, httpx2.HTTPError, errors.HfHubHTTPError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(
                "model.disk_full", repo=repo, revision=at, hub=hub, cache=cache
            ) from error
        kind = type(error).__name__
        raise UserError("model.unreachable", repo=repo, revision=at, hub=hub, error=kind) from error
    return Path(folder)


def digest_model(folder: Path) -> str:
    """Return the sha256 over all files of a model: weights, configs, tokenizer, template.

    Raises:
        UserError: where there are no safetensors.
    """
    weight_files(folder)
    return files.digest({path for pattern in PATTERNS for path in folder.glob(pattern)})


def _refuse_code(folder: Path) -> None:
    """Raise UserError where a model asks for Python code of its own."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for key in ("model_file", "auto_map"):
            if config.get(key):
                raise UserError("model.own_code", path=path, key=key, value=config[key])
