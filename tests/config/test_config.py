"""conf/ as a person changes it: every file composes, and every mistake is named before any work."""

import ast
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from athanor.config import schema
from athanor.config.check import ConfigError
from athanor.config.compose import compose_config, load_config
from athanor.config.params_file import write_params
from athanor.config.values import flatten
from athanor.errors import UserError
from athanor.paths import Workspace


@pytest.fixture
def conf(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ beside the tiny model, in the current folder."""
    shutil.copytree(repo / "conf", tmp_path / "conf")
    (tmp_path / "models").symlink_to(repo / "models")
    monkeypatch.chdir(tmp_path)
    return Path("conf")


def every_option() -> list[str]:
    conf = Path(__file__).parents[2] / "conf"
    return [f"{path.parent.name}={path.stem}" for path in sorted(conf.glob("*/*.yaml"))]


@pytest.mark.parametrize("option", every_option())
def test_every_file_composes(conf: Path, option: str) -> None:
    composed = compose_config(conf, [option])
    assert set(flatten(composed)) == set(schema.all_keys())


def test_tutorial_run_has_the_tutorials_numbers(conf: Path) -> None:
    cfg = compose_config(conf, ["experiment=tutorial"])
    assert cfg.model.path == "Qwen/Qwen2.5-1.5B"
    assert (cfg.train.learning_rate, cfg.train.iters, cfg.train.batch_size) == (1e-4, 200, 1)
    assert cfg.train.num_layers == -1


def test_no_default_hides_in_the_dataclasses() -> None:
    for cls in schema.SECTIONS.values():
        for key in fields(cls):
            assert OmegaConf.is_missing(OmegaConf.structured(cls), key.name), key.name


def test_every_key_is_used(repo: Path) -> None:
    """A key that no code reads from its own section is dead."""
    read = set()
    for path in (repo / "src" / "athanor").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                section = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                read.add(f"{section}.{node.attr}")
    aliases = {"data": "config"}  # what reads data's rows knows no other section
    dead = []
    for key in schema.all_keys():
        section, _, leaf = key.rpartition(".")
        if f"{aliases.get(section, section or 'cfg')}.{leaf}" not in read:
            dead.append(key)
    assert dead == []


def test_all_problems_are_reported_together_with_their_places(conf: Path) -> None:
    lora = conf / "train" / "lora.yaml"
    text = lora.read_text(encoding="utf-8").replace("batch_size: 6", "batchsize: 6")
    lora.write_text(text.replace("dropout: 0.0", "dropout: 1.5"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        compose_config(
            conf,
            [
                *("train.learing_rate=1", "train.iters=abc", "model=tinny", "seed=-1"),
                "train.num_layers=99",
            ],
        )
    problems = "\n".join(caught.value.problems)
    assert f"train.batchsize ({lora}:{line(lora, 'batchsize')}): no such key" in problems
    assert "did you mean train.batch_size?" in problems
    assert f"train.dropout ({lora}:{line(lora, 'dropout')}): expected at least 0" in problems
    assert "train.batch_size: missing" in problems
    assert "did you mean train.learning_rate?" in problems
    assert "train.iters (command line: train.iters=abc): expected a whole number" in problems
    assert "conf/model/ has no tinny.yaml; did you mean tiny?" in problems
    assert "seed (command line: seed=-1): expected 0 or more, found -1" in problems
    assert "at most the model's 6 layers or -1 for all, found 99" in problems
    assert len(caught.value.problems) == 8


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=0", "train.learning_rate"),
        ("train.learning_rate=inf", "train.learning_rate"),
        ("train.learning_rate=nan", "train.learning_rate"),
        ("train.scale=0", "train.scale"),
        ("train.rank=0", "train.rank"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.iters=0", "train.iters"),
        ("train.iters=2.5", "train.iters"),
        ("train.num_layers=0", "train.num_layers"),
        ("train.num_layers=7", "at most the model's 6 layers"),
        ("train.num_layers=-2", "train.num_layers"),
        ("train.val_batches=0", "train.val_batches"),
        ("train.max_seq_length=1", "train.max_seq_length"),
        ("train.dropout=1", "train.dropout"),
        ("train.method=lara", "one of lora, dora, full"),
        ("train.mask_prompt=perhaps", "true or false"),
        ("train.steps_per_eval=0", "train.steps_per_eval"),
        ("train.grad_accumulation_steps=0", "train.grad_accumulation_steps"),
        ("train.epochs=3", r"null beside train.iters \(or a number, and train.iters=null\)"),
        ("train.iters=null", "train.epochs"),
        ("train.optimizer=adan", "one of adam, adamw, sgd, adafactor, lion, muon"),
        ("train.optimizer_config.adamw.wd=1", "no such option; adamw has betas"),
        ("train.lr_schedule=step", "one of constant, linear, cosine"),
        ("train.warmup=-1", "train.warmup"),
        ("train.max_grad_norm=0", "train.max_grad_norm"),
        ("train.keep=first", "one of best, last"),
        ("train.patience=0", "train.patience"),
        ("train.save_every=0", "train.save_every"),
        ("test.max_tokens=0", "test.max_tokens"),
        ("test.temp=-0.1", "test.temp"),
        ("test.temp=inf", "test.temp"),
        ("test.batch_size=null", "test.batch_size"),
        ("model.path=''", "model.path"),
        ("model.path=models/none/here", "there is no folder models/none/here"),
        ("model.path=models/tinny", "did you mean models/tiny?"),
        ("data.prompt_feature=''", "data.prompt_feature"),
        ("data.format=chta", "data.format .*one of auto, chat"),
        ("data.formats={a:csv}", "data.formats.a.*one of auto, chat"),
        ("data.format=template", "data.template.*a prompt and a completion, or a text"),
        ("data.template.prompt='{{ q'", "data.template.prompt.*a Jinja template"),
        ("data.template.answer=x", "data.template.answer.*no such key; there are system"),
        ("data.checks.leek=skip", "data.checks.leek.*no such check; there are unknown_file"),
        ("data.checks.leak=fix", "data.checks.leak.*expected one of stop, skip, warn"),
        ("data.clean.tidy=true", "data.clean.tidy.*no such step; there are html"),
        ("data.synonyms={a:[]}", "data.synonyms.a.*a list of other words"),
        ("data.labels=5", "data.labels.*a list of texts or null"),
        ("data.valid_size=1.5", "data.valid_size.*at least 0, at most 1"),
        ("data.valid_size=0.95", "data.valid_size.*left beside data.test_size"),
        ("data.leak_similarity=0.2", "data.leak_similarity.*at least 0.5"),
        ("data.article_tokens=0", "data.article_tokens"),
        ("data.augment_copies=-1", "data.augment_copies"),
        ("fuse.gguf=q4_0", "fuse.gguf.*one of f32, f16, bf16, q8_0, or null"),
        ("fuse.registered_model_name=a/b", "fuse.registered_model_name.*letters, digits"),
        ("train=5", "has no 5.yaml"),
        ("optimizer=adam", "optimizer"),
    ],
)
def test_impossible_values_are_refused(conf: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_config(conf, [override])


def test_a_name_in_the_registry_needs_a_model_there(conf: Path) -> None:
    assert compose_config(conf, ["fuse.log_model=false"]).fuse.registered_model_name is None
    with pytest.raises(ConfigError, match=r"fuse\.log_model.*expected true.*found False"):
        compose_config(conf, ["fuse.log_model=false", "fuse.registered_model_name=facts"])


def test_the_best_is_kept_unless_facts_are_learned_by_heart(conf: Path) -> None:
    assert compose_config(conf, []).train.keep == "last"
    assert compose_config(conf, ["experiment=tutorial"]).train.keep == "last"
    assert compose_config(conf, ["experiment=null"]).train.keep == "best"
    config = conf / "config.yaml"
    text = config.read_text(encoding="utf-8")
    assert "- experiment: facts" in text
    config.write_text(text.replace("experiment: facts", "experiment: null"), encoding="utf-8")
    assert compose_config(conf, []).train.keep == "best"


def test_seed_0_is_a_seed(conf: Path) -> None:
    assert compose_config(conf, ["seed=0"]).seed == 0
    assert compose_config(conf, ["seed=7"]).seed == 7


def test_stages_read_what_was_written_and_take_overrides(conf: Path) -> None:
    write_params(compose_config(conf, []), Workspace.here())
    cfg = load_config(["train.iters=3"])
    assert cfg.train.iters == 3
    assert flatten(load_config([])) == flatten(compose_config(conf, []))
    with pytest.raises(ConfigError, match=r"athanor\.config model=qwen3-0\.6b"):
        load_config(["model=qwen3-0.6b"])


def test_stage_without_params_says_what_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"python -m athanor\.config"):
        load_config([])


def test_hand_edited_params_are_never_overwritten(conf: Path) -> None:
    params = Path("params.yaml")
    write_params(compose_config(conf, []), Workspace.here())
    write_params(
        compose_config(conf, ["train.iters=9"]), Workspace.here()
    )  # its own words it may replace
    edited = params.read_text(encoding="utf-8").replace("iters: 9", "iters: 11")
    params.write_text(edited, encoding="utf-8")
    with pytest.raises(UserError, match=r"dvc exp run -S train\.iters=11"):
        write_params(compose_config(conf, []), Workspace.here())
    assert params.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("revision: null", "revision: v1.0", 'model.revision="v1.0"'),
        ("grad_checkpoint: false", "grad_checkpoint: true", "train.grad_checkpoint=true"),
        ("  dequantize: null", "  dequantize: null\n  dequantise: 1", "fuse.dequantise=1"),
        ("seed: 0", "seed: [0", "is not YAML"),
    ],
)
def test_whatever_was_typed_is_told(conf: Path, old: str, new: str, said: str) -> None:
    params = Path("params.yaml")
    write_params(compose_config(conf, []), Workspace.here())
    text = params.read_text(encoding="utf-8")
    assert old in text
    params.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        write_params(compose_config(conf, []), Workspace.here())


def test_dvcs_own_composition_knows_the_types(repo: Path, tmp_path: Path) -> None:
    """`dvc exp run -S` composes in DVC's process, where only the Hydra plugin can bring them."""
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import ConfigCompositionException

    def dump(*overrides: str) -> str:
        out = tmp_path / "params.yaml"
        compose_and_dump(out, str(repo / "conf"), None, "config", str(tmp_path), list(overrides))
        return out.read_text(encoding="utf-8")

    assert "learning_rate: 0.0003" in dump("train.learning_rate=3e-4")
    for wrong in ("train.learing_rate=1", "train.iters=abc"):
        with pytest.raises(ConfigCompositionException):
            dump(wrong)


def line(path: Path, text: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(i for i, content in enumerate(lines, 1) if content.startswith(text))
