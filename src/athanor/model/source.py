"""Sources of base models: a folder on this machine, or a repository of a hub at a commit.

A repository is resolved once, to a commit, and stages after `prepare` open only that commit.
folder.py looks at a model's files before anything reads them.
"""

import difflib
import errno
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from athanor import files
from athanor.errors import UserError
from athanor.model.folder import PATTERNS, inspect_folder
from athanor.model.weight_files import weight_files
from athanor.paths import Workspace

# Repositories as huggingface_hub takes them: letters and digits, single - . _ between them.
REPO = re.compile(r"\w+([.-]\w+)*/\w+([.-]\w+)*")
LONGEST_REPO = 96
# Bytes of a path and of each of its parts, as Linux and macOS take them.
LONGEST_PATH, LONGEST_NAME = 1023, 255
REVISION = re.compile(r"\w(?!.*\.\.)[\w./+-]{0,254}")


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
            return inspect_folder(_download(self.path, self.commit)).path
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
    refuse_name(path, revision)
    folder = _download(path, revision) if is_hub_repo(path) else _local(path)
    return inspect_folder(folder).path


def refuse_name(path: str, revision: str | None) -> None:
    """Raise UserError for a text that names neither a folder nor a repository at a revision."""
    shown = path if len(path) <= 80 else f"{path[:80]}… ({len(path):,} characters)"
    if not path.strip() or not path.isprintable():
        raise UserError("model.no_name", path=path)
    if len(os.fsencode(path)) > LONGEST_PATH or any(
        len(os.fsencode(part)) > LONGEST_NAME for part in Path(path).parts
    ):
        raise UserError("model.name_too_long", path=shown, limit=LONGEST_NAME)
    try:
        is_repo = is_hub_repo(path)
        Path(path).expanduser().resolve().is_dir()
    except (OSError, RuntimeError) as error:
        raise UserError("model.no_path", path=shown, error=error) from error
    if is_repo and len(path) > LONGEST_REPO:
        raise UserError("model.repository_too_long", path=shown, limit=LONGEST_REPO)
    if revision is not None and not REVISION.fullmatch(revision):
        raise UserError("model.no_revision_name", revision=revision[:80])


def is_hub_repo(path: str) -> bool:
    """Return whether a path means a hub's owner/name: models/tinny is a typo, not a repository."""
    return bool(REPO.fullmatch(path)) and not Path(path).parent.is_dir()


def refuse_stage_output(path: str) -> None:
    """Raise UserError for a folder that a stage writes: DVC removes it when the stage runs again.

    Links and absolute paths are followed.
    """
    here = Workspace.here()
    owned = [here.prepared, here.trained, here.tested, here.fused]
    places = [(root / place).resolve() for root in (here.root, here.home) for place in owned]
    folder = Path(path).expanduser().resolve()
    if not is_hub_repo(path) and any(folder.is_relative_to(place) for place in places):
        name = "mine" if folder.name == "model" else folder.name
        raise UserError("model.stage_output", path=path, copy=f"models/{name}")


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise missing_folder(path)
    return folder


def missing_folder(path: str) -> UserError:
    """Return the error of a folder that does not exist, with a similar one beside it, if any."""
    if Path(path).expanduser().exists():
        return UserError("model.file_for_folder", path=path, folder=Path(path).parent)
    models = [str(config.parent) for config in Path(path).expanduser().parent.glob("*/config.json")]
    if close := difflib.get_close_matches(path, models, n=1):
        return UserError("model.no_folder_but_another", path=path, other=close[0])
    return UserError("model.no_folder", path=path)


def find_local_copy(path: str, revision: str | None) -> Path | None:
    """Return the model's folder if it is on this machine; never ask a network."""
    if not is_hub_repo(path):
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
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
        UserError: where the folder is no model, or has no safetensors.
    """
    inspect_folder(folder)
    weight_files(folder)
    return files.digest({path for pattern in PATTERNS for path in folder.glob(pattern)})
