"""Sources of base models: folders and a hub, and their errors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from athanor.chat.base import load_with_tokenizer
from athanor.chat.load import load_tokenizer
from athanor.config.check import model_misfits
from athanor.config.schema import ModelConfig, TrainConfig
from athanor.model.source import Source, resolve_source
from support.hub import Hub, serve
from support.refused import refused

COMMIT, LATER = "1" * 40, "2" * 40
Run = subprocess.CompletedProcess[str]


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    with serve() as running:
        running.add("team/tiny", tiny, COMMIT)
        yield running


@pytest.fixture
def prepare(repo: Path, data: Path, hub: Hub, tmp_path: Path) -> Callable[..., Run]:
    """Runs the real stages config and prepare against the hub, from a folder of their own."""
    (tmp_path / "work").mkdir()
    for part in (repo / "conf", repo / "models", data):
        (tmp_path / "work" / part.name).symlink_to(part)

    def run(*overrides: str, endpoint: str | None = None) -> Run:
        env = os.environ | {
            "HF_ENDPOINT": endpoint or hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "2",
        }
        for module, arguments in (("config", overrides), ("prepare", ())):
            done = subprocess.run(
                [sys.executable, "-m", f"athanor.{module}", *arguments],
                cwd=tmp_path / "work",
                env=env,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                break
        return done

    return run


def recorded(tmp_path: Path) -> Source:
    return Source.read(tmp_path / "work" / "artifacts" / "prepare" / "model.json")


def test_hub_repo_is_resolved_once_to_a_commit(
    prepare: Callable[..., Run], hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    done = prepare("model.path=team/tiny", "model.revision=main")
    assert done.returncode == 0, done.stderr
    source = recorded(tmp_path)
    assert (source.path, source.commit) == ("team/tiny", COMMIT)
    assert source.digest == resolve_source(str(tiny), None).digest
    # What later stages do: the same commit from the cache, whatever main has become since.
    hub.add("team/tiny", tmp_path, LATER)
    asked = len(hub.asked)
    code = (
        "from pathlib import Path; from athanor.model.source import Source; "
        "print(Source.read(Path('artifacts/prepare/model.json')).folder())"
    )
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env=env | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()).name == COMMIT, done.stderr
    assert len(hub.asked) == asked


def test_only_what_is_read_is_downloaded(
    prepare: Callable[..., Run], hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    shutil.copytree(tiny, folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('never run')")
    (folder / "consolidated.safetensors").write_bytes(b"never read")
    hub.add("team/mixed", folder, COMMIT)
    done = prepare("model.path=team/mixed", "model.revision=null")
    assert done.returncode == 0, done.stderr
    assert not [
        asked for asked in hub.asked if asked.endswith((".bin", ".py", "consolidated.safetensors"))
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=team/nothing"], "no such repository"),
        (["model.path=team/tiny", "model.revision=v9"], "no such revision"),
        (["model.path=team/closed"], "is gated"),
    ],
)
def test_a_wrong_name_is_one_clear_line(
    prepare: Callable[..., Run], hub: Hub, tiny: Path, overrides: list[str], message: str
) -> None:
    hub.add("team/closed", tiny, COMMIT)
    hub.gated.add("team/closed")
    done = prepare(*overrides)
    assert done.returncode == 1
    assert message in done.stderr
    assert hub.url in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_missing_network_is_one_clear_line(prepare: Callable[..., Run]) -> None:
    done = prepare("model.path=team/tiny", endpoint="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_broken_model_is_no_traceback(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}), "utf-8")
    with refused("model.not_loaded", folder=folder):
        load_with_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}', encoding="utf-8")
    with refused("chat.tokenizer_not_loaded", folder=folder):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "model_file", "custom.py"),
        ("config.json", "auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["tokenization.T", None]}),
    ],
)
def test_a_model_with_its_own_code_is_refused(
    tiny: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    folder = copy(tiny, tmp_path)
    settings = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(settings | {key: value}), encoding="utf-8")
    with refused("model.own_code", key=key):
        resolve_source(str(folder), None)


def test_only_safetensors_are_read(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with refused("model.no_weights") as caught:
        resolve_source(str(folder), None)
    assert "pytorch_model.bin" in caught.value.facts["files"]


def test_a_model_that_a_stage_wrote_is_refused_with_the_command_that_keeps_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fused = Path("artifacts/fuse/model")
    shutil.copytree(tiny, fused)
    train = TrainConfig(method="lora", num_layers=2, rank=8)
    Path("link").symlink_to(fused)
    Path("artifacts/mine").symlink_to(tiny)
    for path in (
        str(fused),
        f"./{fused}/",
        str(fused.resolve()),
        "link",
        "artifacts/fuse/../fuse/model",
    ):
        [problem] = model_misfits(ModelConfig(path, None), train)
        assert problem.code == "model.stage_output"
        assert "model.path=models/mine" in str(problem)
    assert not list(model_misfits(ModelConfig("artifacts/mine", None), train))


def test_a_local_model_that_changed_since_prepare_is_noticed(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    source = resolve_source(str(folder), None)
    assert source.folder() == folder
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with refused("model.changed", folder=folder):
        source.folder()
