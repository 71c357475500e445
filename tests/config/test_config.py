"""The configuration: every file of conf/ composes, and every mistake is named before any work."""

import ast
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from athanor.config import schema
from athanor.config.compose import compose_config, load_config
from athanor.config.overrides import parse_override
from athanor.config.params_file import write_params
from athanor.config.rules import ConfigError
from athanor.config.values import flatten
from athanor.paths import Workspace
from support.refused import refused, refused_keys


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
    # The code that reads rows has the section `data` alone, as its `config`.
    keys = [key if "." in key else f"cfg.{key}" for key in schema.all_keys()]
    assert [key for key in keys if not {key, key.replace("data.", "config.")} & read] == []


def test_all_problems_are_reported_together_with_their_places(conf: Path) -> None:
    lora = conf / "train" / "lora.yaml"
    text = lora.read_text(encoding="utf-8").replace("batch_size: 6", "batchsize: 6")
    lora.write_text(text.replace("dropout: 0.0", "dropout: 1.5"), encoding="utf-8")
    overrides = ["train.learing_rate=1", "train.iters=abc", "model=tinny", "seed=-1"]
    with pytest.raises(ConfigError) as caught:
        compose_config(conf, [*overrides, "train.num_layers=99"])
    problems = {problem.key: problem for problem in caught.value.problems}
    assert {(problem.code, key, problem.place) for key, problem in problems.items()} == {
        ("config.unknown_option", "model=tinny", "command line"),
        ("config.unknown_key", "train.batchsize", f"{lora}:{line(lora, 'batchsize')}"),
        ("config.unknown_key", "train.learing_rate", f"command line: {overrides[0]}"),
        ("config.wrong_type", "train.iters", "command line: train.iters=abc"),
        ("config.missing_key", "train.batch_size", None),
        ("config.too_large", "train.dropout", f"{lora}:{line(lora, 'dropout')}"),
        ("config.too_small", "seed", "command line: seed=-1"),
        ("config.too_many_layers", "train.num_layers", "command line: train.num_layers=99"),
    }
    assert problems["model=tinny"].facts["candidates"] == ["tiny"]
    assert problems["train.batchsize"].facts["candidates"] == ["train.batch_size"]
    assert problems["train.learing_rate"].facts["candidates"] == ["train.learning_rate"]
    assert problems["train.num_layers"].facts["layers"] == 6
    text = str(caught.value)
    assert text.startswith("config: 8 problems; nothing was run\n  ")
    assert "\n  seed (command line: seed=-1): expected 0 or more, got -1" in text


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("train.learning_rate=0", "not_positive", "train.learning_rate"),
        ("train.learning_rate=inf", "not_positive", "train.learning_rate"),
        ("train.learning_rate=nan", "not_positive", "train.learning_rate"),
        ("train.scale=0", "not_positive", "train.scale"),
        ("train.rank=0", "too_small", "train.rank"),
        ("train.batch_size=0", "too_small", "train.batch_size"),
        ("train.iters=0", "too_small", "train.iters"),
        ("train.iters=2.5", "wrong_type", "train.iters"),
        ("train.num_layers=0", "no_count", "train.num_layers"),
        ("train.num_layers=7", "too_many_layers", "train.num_layers"),
        ("train.num_layers=-2", "no_count", "train.num_layers"),
        ("train.val_batches=0", "no_count", "train.val_batches"),
        ("train.max_seq_length=1", "too_small", "train.max_seq_length"),
        ("train.dropout=1", "too_large", "train.dropout"),
        ("train.method=lara", "not_an_option", "train.method"),
        ("train.mask_prompt=perhaps", "wrong_type", "train.mask_prompt"),
        ("train.steps_per_eval=0", "too_small", "train.steps_per_eval"),
        ("train.grad_accumulation_steps=0", "too_small", "train.grad_accumulation_steps"),
        ("train.epochs=3", "two_lengths", "train.epochs"),
        ("train.iters=null", "no_length", "train.epochs"),
        ("train.optimizer=adan", "not_an_option", "train.optimizer"),
        ("train.optimizer_config.adamw.wd=1", "unknown_key", "train.optimizer_config.adamw.wd"),
        ("train.lr_schedule=step", "not_an_option", "train.lr_schedule"),
        ("train.warmup=-1", "too_small", "train.warmup"),
        ("train.max_grad_norm=0", "not_positive", "train.max_grad_norm"),
        ("train.keep=first", "not_an_option", "train.keep"),
        ("train.patience=0", "too_small", "train.patience"),
        ("train.save_every=0", "too_small", "train.save_every"),
        ("test.max_tokens=0", "too_small", "test.max_tokens"),
        ("test.temp=-0.1", "negative", "test.temp"),
        ("test.temp=inf", "negative", "test.temp"),
        ("test.batch_size=null", "wrong_type", "test.batch_size"),
        ("model.path=''", "empty_text", "model.path"),
        ("model.path=models/none/here", "model.no_folder", "model.path"),
        ("model.path=models/tinny", "model.no_folder_but_another", "model.path"),
        ("data.prompt_feature=''", "empty_text", "data.prompt_feature"),
        ("data.format=chta", "not_an_option", "data.format"),
        ("data.formats={a:csv}", "not_an_option", "data.formats.a"),
        ("data.format=template", "empty_template", "data.template"),
        ("data.template.prompt='{{ q'", "no_template", "data.template.prompt"),
        ("data.template.answer=x", "unknown_key", "data.template.answer"),
        ("data.checks.leek=skip", "unknown_key", "data.checks.leek"),
        ("data.checks.leak=fix", "not_an_option", "data.checks.leak"),
        ("data.clean.tidy=true", "unknown_key", "data.clean.tidy"),
        ("data.synonyms={a:[]}", "no_synonyms", "data.synonyms.a"),
        ("data.labels=5", "wrong_type", "data.labels"),
        ("data.valid_size=1.5", "no_share", "data.valid_size"),
        ("data.valid_size=0.95", "no_rows_left", "data.valid_size"),
        ("data.date=2026-02-30", "no_date", "data.date"),
        ("data.date=20260731", "no_date", "data.date"),
        ("data.system=drop", "not_an_option", "data.system"),
        ("data.leak_similarity=0.2", "leak_similarity", "data.leak_similarity"),
        ("data.article_tokens=0", "too_small", "data.article_tokens"),
        ("data.augment_copies=-1", "too_small", "data.augment_copies"),
        ("fuse.gguf=q4_0", "not_an_option", "fuse.gguf"),
        ("fuse.registered_model_name=a/b", "registered_name", "fuse.registered_model_name"),
        ("train=5", "unknown_option", "train=5"),
        ("optimizer=adam", "unknown_key", "optimizer"),
        ("train.rank=???", "missing_key", "train.rank"),
        ("data.checks.leak=???", "missing_key", "data.checks.leak"),
        ("~train", "no_deletion", "~train"),
        ("~train=lora", "no_deletion", "~train=lora"),
        ("train=null", "no_deletion", "train=null"),
        ("~train.rank", "no_deletion", "~train.rank"),
        ("~seed", "no_deletion", "~seed"),
        ("~experiment=facts", "not_selected", "~experiment=facts"),
        ("train=lora,dora", "several_values", "train=lora,dora"),
        ("train.rank=range(1,9)", "several_values", "train.rank=range(1,9)"),
        ("seed=18446744073709551616", "over_64_bits", "seed"),
        ("train.warmup=100000000000000000000", "over_64_bits", "train.warmup"),
        ("train.warmup=2147483648", "beyond", "train.warmup"),
        ("train.warmup=1e20", "wrong_type", "train.warmup"),
        (f"train.warmup={'9' * 5000}", "no_override", f"train.warmup={'9' * 5000}"),
        ("train.activations_memory=1e300", "beyond", "train.activations_memory"),
        ("train.scale=1e-300", "below_float32", "train.scale"),
        ("train.rank=193", "rank_above_width", "train.rank"),
        ("train.rank=1000000000", "rank_above_width", "train.rank"),
        ("train.rank=[8]", "wrong_type", "train.rank"),
        ("train.rank.x=1", "unknown_key", "train.rank.x"),
        ("train.rank=${seeds}", "no_interpolation", "train.rank"),
        ("train.rank=${train}", "no_interpolation", "train.rank"),
        ("train.rank=${oc.env:NO_SUCH_NAME}", "no_interpolation", "train.rank"),
        ("data.min_quality=inf", "not_finite", "data.min_quality"),
        ("data.augment_copies=1001", "beyond", "data.augment_copies"),
        ("data.checks.leak=5", "not_an_option", "data.checks.leak"),
        ("data.clean.html=maybe", "wrong_type", "data.clean.html"),
        ("data.synonyms.高兴=5", "wrong_type", "data.synonyms.高兴"),
        (f"data.label_prompt='{'{{' + '(' * 300}'", "no_template", "data.label_prompt"),
        (f"model.path={'x' * 5000}", "path_too_long", "model.path"),
        (f"data.dataset=x/{'x' * 256}", "path_too_long", "data.dataset"),
        (f"model.path=x/{'x' * 200}", "model.repository_too_long", "model.path"),
        (
            f"fuse.registered_model_name={'x' * 251}",
            "registered_name",
            "fuse.registered_model_name",
        ),
        ("hydra.run.dir=x", "only_in_a_sweep", "hydra.run.dir=x"),
        ("model@data=tiny", "changed_package", "model@data=tiny"),
        ("--dry-run", "unknown_flag", "--dry-run"),
        ("-m", "unknown_flag", "-m"),
        ("train.rank", "no_override", "train.rank"),
        ("=5", "no_override", "=5"),
        ("train.rank=[[[", "no_override", "train.rank=[[["),
        (f"train.rank={'[' * 3000}", "no_override", f"train.rank={'[' * 3000}"),
        ("fuse.system=\udcff", "unreadable_text", "fuse.system"),
    ],
)
def test_impossible_values_are_refused(conf: Path, override: str, code: str, key: str) -> None:
    with refused_keys((code if "." in code else f"config.{code}", key)):
        compose_config(conf, [override])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.prompt_feature=问题", "data.prompt_feature", "问题"),
        ("data.prompt_feature=ｆｕｌｌ", "data.prompt_feature", "ｆｕｌｌ"),
        ("data.prompt_feature=Größe", "data.prompt_feature", "Größe"),
        ("data.prompt_feature=🙂", "data.prompt_feature", "🙂"),
        ("data.prompt_feature=我的 问题", "data.prompt_feature", "我的 问题"),
        ("data.prompt_feature='问题'", "data.prompt_feature", "问题"),
        ("data.labels=[是, 否, 5]", "data.labels", ["是", "否", "5"]),
        ("data.synonyms={高兴: [快乐, 开心]}", "data.synonyms", {"高兴": ["快乐", "开心"]}),
        ("data.synonyms.高兴=[快乐, 开心]", "data.synonyms", {"高兴": ["快乐", "开心"]}),
        ("fuse.system=你好，世界。", "fuse.system", "你好，世界。"),
        ("train.rank='9'", "train.rank", 9),
        ("seed=18446744073709551615", "seed", 2**64 - 1),
        ("train.rank=192", "train.rank", 192),
        ("train.lr_end=${train.learning_rate}", "train.lr_end", 2e-4),
        ("data.checks.leak=stop", "data.leak_similarity", 0.7),
    ],
)
def test_values_in_any_script_are_taken(conf: Path, override: str, key: str, value: object) -> None:
    assert flatten(compose_config(conf, [override]))[key] == value


def test_values_of_several_scripts_are_swept() -> None:
    override = parse_override("train.resume=适配器/a,b c")
    assert list(override.sweep_string_iterator()) == ["'适配器/a'", "b\\ c"]
    hydras = OverridesParser.create().parse_override(str(override.input_line))
    assert list(hydras.sweep_string_iterator()) == list(override.sweep_string_iterator())


def test_a_name_in_the_registry_needs_a_model_there(conf: Path) -> None:
    assert compose_config(conf, ["fuse.log_model=false"]).fuse.registered_model_name is None
    with refused_keys(("config.name_without_model", "fuse.log_model")):
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
    with refused_keys(("config.option_of_section", "model=qwen3-0.6b")):
        load_config(["model=qwen3-0.6b"])


def test_a_stage_without_params_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("config.no_params", params=Path("params.yaml")):
        load_config([])


def test_hand_edited_params_are_never_overwritten(conf: Path) -> None:
    params = Path("params.yaml")
    write_params(compose_config(conf, []), Workspace.here())
    write_params(compose_config(conf, ["train.iters=9"]), Workspace.here())  # it wrote them
    edited = params.read_text(encoding="utf-8").replace("iters: 9", "iters: 11")
    params.write_text(edited, encoding="utf-8")
    with refused("config.edited_params", options="-S train.iters=11"):
        write_params(compose_config(conf, []), Workspace.here())
    assert params.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize(
    ("old", "new", "option"),
    [
        ("revision: null", "revision: v1.0", 'model.revision="v1.0"'),
        ("grad_checkpoint: false", "grad_checkpoint: true", "train.grad_checkpoint=true"),
        ("  system: null\n  peft", "  system: 短答\n  peft", 'fuse.system="短答"'),
        ("  dequantize: null", "  dequantize: null\n  dequantise: 1", "fuse.dequantise=1"),
    ],
)
def test_edited_values_are_overrides_of_the_command(
    conf: Path, old: str, new: str, option: str
) -> None:
    params = Path("params.yaml")
    write_params(compose_config(conf, []), Workspace.here())
    text = params.read_text(encoding="utf-8")
    assert old in text
    params.write_text(text.replace(old, new), encoding="utf-8")
    with refused("config.edited_params", params=params) as caught:
        write_params(compose_config(conf, []), Workspace.here())
    assert f"-S {shlex.quote(option)}" in caught.value.facts["options"]


def test_params_that_are_no_yaml_are_refused(conf: Path) -> None:
    params = Path("params.yaml")
    params.write_text("seed: [0", encoding="utf-8")
    with refused("config.invalid_params", params=params):
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
