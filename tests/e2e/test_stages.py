"""The stages by hand, as `python -m athanor.<stage>` runs them, for each method of training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from athanor import files
from athanor.chat import templates
from athanor.chat.base import load_with_tokenizer
from athanor.chat.contract import Contract
from athanor.chat.conversation import Conversation, read_line
from athanor.chat.load import load_tokenizer
from athanor.chat.tokens import tokenize_rows
from athanor.compute import evaluation
from athanor.device import backend
from athanor.errors import UserError
from athanor.model import load
from athanor.model.source import digest_model
from athanor.model.stored import read_dtypes
from athanor.runs import registry
from athanor.train import build, fit
from support import mlflow_store
from support.refused import refused, refused_keys
from support.stages import Stages


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store elsewhere than mlruns/, for all tests of this file."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/runs.db"


@pytest.fixture(scope="module")
def four_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("models"), bits=4)


@pytest.fixture(scope="module")
def eight_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("models"), bits=8)


def quantized(tiny: Path, parent: Path, bits: int) -> Path:
    """A copy of the tiny base with so many bits a weight, as mlx_lm.convert would write it."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    folder = parent / f"tiny-{bits}bit"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model, settings = load_model(tiny)
    model, settings = quantize_model(model, settings, group_size=64, bits=bits)
    save_model(folder, model)
    save_config(settings, folder / "config.json")
    return folder


def fused_answers() -> list[str]:
    """What the fused model says to the training questions; … where it did not stop."""
    model, tokenizer = load_with_tokenizer(Path("artifacts/fuse/model"))
    rows = files.read_jsonl(Path("artifacts/prepare/train.jsonl"), read_line)
    prompts = [templates.encode_prompt(row, tokenizer) for row in rows]
    given = evaluation.generate_answers(model, tokenizer, prompts, max_tokens=64, batch_size=6)
    return [templates.decode_answer(a.ids, tokenizer) + ("" if a.stopped else "…") for a in given]


def references() -> list[str]:
    rows = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))
    return [row["messages"][-1]["content"] for row in rows]


def last_run(store: str) -> Any:
    return mlflow_store.list_runs(store)[0]


def logged_model(store: str) -> Any:
    [output] = last_run(store).outputs.model_outputs
    return mlflow_store.connect(store).get_logged_model(output.model_id)


@pytest.mark.parametrize("chosen", [("train=dora",), ("train=full",), ("train=lora", "4bit")])
def test_every_method_trains_tests_and_fuses(
    stages: Stages, four_bits: Path, chosen: tuple[str, ...]
) -> None:
    model = (f"model.path={four_bits}",) if "4bit" in chosen else ()
    # Half of the recipe's iterations: the facts are known from iteration 11 at the latest.
    stages("config", overrides=(chosen[0], "train.iters=20", *model))
    stages("prepare", "train", "test", "fuse")
    metrics = files.read_json(Path("artifacts/test/metrics.json"))
    assert metrics["test_train_exact_match"] == 1
    assert metrics["test_train_stop_rate"] == 1
    assert metrics["test_train_base_exact_match"] == 0
    assert fused_answers() == references()
    fused = files.read_json(Path("artifacts/fuse/fused.json"))
    assert fused["dequantized"] == ("4bit" in chosen)
    assert fused["parity"]["share_lost"] < 0.01
    assert "quantization" not in files.read_json(Path("artifacts/fuse/model/config.json"))


def test_quantized_base_is_fused_into_its_bits_where_little_is_lost(
    stages: Stages, eight_bits: Path, store: str
) -> None:
    stages("config", overrides=(f"model.path={eight_bits}", "train.iters=2"))
    stages("prepare", "train", "fuse")
    settings = files.read_json(Path("artifacts/fuse/model/config.json"))
    assert settings["quantization"]["bits"] == 8
    assert all(answer for answer in fused_answers())
    base = (eight_bits / "model.safetensors").stat().st_size
    assert Path("artifacts/fuse/model/model.safetensors").stat().st_size < 1.1 * base
    parity = files.read_json(Path("artifacts/fuse/fused.json"))["parity"]
    run = last_run(store)
    assert run.data.tags["fused.dequantized"] == "false"
    assert run.data.metrics["fuse_max_logit_difference"] == parity["difference"]
    assert 0 < run.data.metrics["fuse_share_lost"] == parity["share_lost"] < 0.05


def test_fused_model_that_lost_the_training_is_not_written(
    stages: Stages, four_bits: Path, store: str
) -> None:
    stages("config", overrides=(f"model.path={four_bits}", "train.iters=2"))
    stages("prepare", "train")
    for earlier in (False, True):
        with refused("fuse.lost_in_bits"):
            stages("fuse", overrides=("fuse.dequantize=false",))
        assert Path("artifacts/fuse/model").exists() == earlier
        if not earlier:
            stages("fuse")
    fused = files.read_json(Path("artifacts/fuse/fused.json"))
    assert digest_model(Path("artifacts/fuse/model")) == fused["digest"]
    run = last_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.tags["fused.digest"] == fused["digest"]


def test_what_cant_be_exported_is_said_before_it_is_fused(stages: Stages, tmp_path: Path) -> None:
    """Also where the training went without: what is asked for may have changed since."""
    base = Path("turned")
    shutil.copytree(tmp_path / "models/tiny", base)
    files.write_json(
        base / "config.json", files.read_json(base / "config.json") | {"rope_traditional": True}
    )
    stages("config", overrides=(f"model.path={base}", "train.iters=1"))
    with refused_keys(("chat.no_gguf", "fuse.gguf")):
        stages("prepare")
    assert not Path("artifacts/prepare").exists()  # no row was read for nothing
    stages("config", overrides=(f"model.path={base}", "train.iters=1", "fuse.gguf=null"))
    stages("prepare", "train", "fuse")
    fused = Path("artifacts/fuse/fused.json").stat().st_ino
    with refused_keys(("chat.no_gguf", "fuse.gguf")):
        stages("fuse", overrides=("fuse.gguf=f16",))
    assert Path("artifacts/fuse/fused.json").stat().st_ino == fused


def test_full_training_of_a_quantized_base_is_refused(stages: Stages, four_bits: Path) -> None:
    with refused_keys(("config.quantized", "train.method")):
        stages("config", overrides=("train=full", f"model.path={four_bits}"))


def test_fused_weights_keep_the_bases_dtypes(stages: Stages, tiny: Path) -> None:
    stages("config", overrides=("train.iters=1",))
    stages("prepare", "train", "fuse")
    fused = Path("artifacts/fuse/model")
    assert read_dtypes(fused) == read_dtypes(tiny)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (fused / name).read_bytes() == (tiny / name).read_bytes()


def test_chats_and_plain_texts_go_all_the_way(stages: Stages, store: str, tiny: Path) -> None:
    chats = [
        {"messages": [{"role": "system", "content": "短答"}, *row["messages"]]}
        for row in (
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in (("一", "二"), ("三", "四"), ("五", "六"))
        )
    ]
    texts = [{"text": "春眠不觉晓"}, {"text": "处处闻啼鸟"}]
    for split, found in (("train", chats), ("valid", texts)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        Path(f"data/{split}.jsonl").write_text(lines, encoding="utf-8")
    Path("data/test.jsonl").unlink()
    stages("config", overrides=("train.iters=2", "train.batch_size=2", "train.end_token=base"))
    left = Path("artifacts/.fuse.killed/model")
    left.mkdir(parents=True)
    stages("prepare", "train", "test", "fuse")
    assert not left.exists()
    metrics = files.read_json(Path("artifacts/test/metrics.json"))
    assert metrics["test_valid_loss"] > 0
    assert "test_valid_exact_match" not in metrics
    assert "test_loss" not in metrics
    assert 'SYSTEM "短答"\n' in Path("artifacts/fuse/Modelfile").read_text(encoding="utf-8")
    # Texts end with the tokenizer's own token, whatever answers end with: that was validated on.
    end = Contract.read(Path("artifacts/prepare/chat.json")).end
    tokenizer = load_tokenizer(tiny)
    assert end != tokenizer.eos_token_id
    valid = tokenize_rows([Conversation.of(row) for row in texts], tokenizer, True, 2048, end)
    model = logged_model(store)
    assert model.tags["valid.digest"] == registry.digest_validation(valid)
    folder = Path(model.artifact_location.removeprefix("file://"))
    example = files.read_json(folder / "input_example.json")
    assert example["messages"] == [{"role": "user", "content": "一"}]


def test_every_figure_is_of_base_and_tuned_and_recorded(
    stages: Stages, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Figures by hand from predictions.jsonl; MLflow has them, and the answers as a table."""
    stages("config", overrides=("train.iters=20",))
    stages("prepare", "train", "test")
    metrics = files.read_json(Path("artifacts/test/metrics.json"))
    of_answers = ("exact_match", "stop_rate", "cer", "chrf", "mean_length", "repetition_rate")
    assert set(metrics) == {
        f"test_{split}{who}{figure}"
        for split in ("", "valid_", "train_")
        for who in ("", "base_")
        for figure in ("loss", "perplexity", *of_answers)
    }
    assert (metrics["test_train_cer"], metrics["test_train_chrf"]) == (0, 100)
    assert metrics["test_train_base_cer"] > 0.5
    assert metrics["test_train_base_chrf"] < 50
    _, tokenizer = load_with_tokenizer(Path("models/tiny"))
    lines = files.read_jsonl(Path("artifacts/test/predictions.jsonl"))
    lengths = [
        len(tokenizer.encode(line["reference"], add_special_tokens=False))
        for line in lines
        if line["split"] == "train"
    ]
    assert metrics["test_train_mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    printed = capfd.readouterr().out
    assert "train, tuned   0.0" in printed
    assert max(map(len, printed.splitlines())) <= 100

    run = last_run(store)
    assert {key: run.data.metrics[key] for key in metrics} == pytest.approx(metrics)
    # Asked a second time, the stage says what its answers are now, and does not add to the table.
    stages("test", overrides=("test.max_tokens=2",))
    again = files.read_jsonl(Path("artifacts/test/predictions.jsonl"))
    assert again != lines
    table = mlflow_store.connect(store).load_table(
        run.info.experiment_id, "test/answers.json", run_ids=[run.info.run_id]
    )
    assert table.to_dict("records") == [
        {
            "split": line["split"],
            "prompt": line["prompt"][0]["content"],
            "reference": line["reference"],
            "base": line["base"]["text"],
            "tuned": line["tuned"]["text"],
            "base_stopped": line["base"]["stopped"],
            "tuned_stopped": line["tuned"]["stopped"],
        }
        for line in again
    ]


def test_sampled_answers_are_the_seeds(stages: Stages) -> None:
    stages("config", overrides=("train.iters=1",))
    stages("prepare", "train")

    def answers(*overrides: str) -> list[Any]:
        stages("test", overrides=("test.max_tokens=8", *overrides))
        return files.read_jsonl(Path("artifacts/test/predictions.jsonl"))

    sampled = ("test.temp=1.0",)
    first = answers(*sampled)
    assert answers(*sampled) == first
    assert answers(*sampled, "seed=1") != first
    greedy = answers()
    assert greedy != first
    assert answers("seed=1") == greedy


def test_progress_is_told_while_answers_are_long(tiny: Path) -> None:
    model, tokenizer = load_with_tokenizer(tiny)
    prompts = [tokenizer.encode(text) for text in ("月亮", "太阳和月亮", "一")]
    told: list[float] = []
    evaluation.generate_answers(
        model, tokenizer, prompts, max_tokens=4, batch_size=2, on_step=told.append
    )
    assert told == sorted(told)
    assert told[0] == 2 * 1 / 4
    assert told[-1] == 3


def test_a_model_without_a_chat_template_has_losses(
    stages: Stages, store: str, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "texts"))
    (folder / "chat_template.jinja").unlink()
    for split in ("train", "valid", "test"):
        files.write_jsonl(Path(f"data/{split}.jsonl"), [{"text": f"春眠不觉晓{split}"}])
    stages("config", overrides=(f"model.path={folder}", "train.iters=1"))
    stages("prepare", "train", "test")
    metrics = files.read_json(Path("artifacts/test/metrics.json"))
    assert {key.rpartition("_")[2] for key in metrics} == {"loss", "perplexity"}
    assert len(metrics) == 12
    run = files.read_json(Path("artifacts/train/run.json"))["run_id"]
    kept = {file.path for file in mlflow_store.connect(store).list_artifacts(run, "test")}
    assert kept == {"test/predictions.jsonl", "test/params.yaml"}
    with refused("generate.cannot_ask"):
        stages("generate", overrides=("春眠不觉晓", "--system", "短答"))


def test_stage_refuses_what_was_prepared_for_another_model(
    stages: Stages, tiny: Path, tmp_path: Path
) -> None:
    stages("config", overrides=("train.iters=1",))
    stages("prepare")
    other = shutil.copytree(tiny, tmp_path / "other")
    with pytest.raises(UserError, match="dvc repro prepare"):
        stages("train", overrides=(f"model.path={other}",))


def test_failed_training_ends_its_run_failed(stages: Stages, store: str) -> None:
    stages("config")
    stages("prepare")
    with refused("train.loss_diverged", rate=1e20):
        stages("train", overrides=("train.learning_rate=1e20", "train.iters=20"))
    last = last_run(store)
    assert last.info.status == "FAILED"
    assert "diverged" in last.data.tags["failure"]


def test_unreachable_store_costs_the_record_not_the_training(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    stages("config", overrides=("train.iters=2",))
    stages("prepare", "train", "test")
    assert Path("artifacts/train/history.csv").read_text(encoding="utf-8").startswith("iteration,")
    assert files.read_json(Path("artifacts/test/metrics.json"))["test_loss"] > 0
    said = capfd.readouterr().err
    assert "took no record" in said
    assert "secret" not in said


def test_failed_test_stage_leaves_the_trainings_record_alone(stages: Stages, store: str) -> None:
    stages("config", overrides=("train.iters=1",))
    stages("prepare", "train")
    Path("artifacts/prepare/test.jsonl").unlink()
    with refused("files.absent", stage="prepare"):
        stages("test")
    run = last_run(store)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_base_that_does_not_stop_at_its_templates_end_does_when_tuned(
    stages: Stages, tiny: Path, tmp_path: Path
) -> None:
    """Like Qwen2.5's bases: texts end with one token, the template's turns with another."""
    folder = Path(shutil.copytree(tiny, tmp_path / "texts-end"))
    (folder / "generation_config.json").unlink()
    usual = load_tokenizer(tiny)
    text_end, turn_end = map(usual.convert_tokens_to_ids, ("<|endoftext|>", "<|im_end|>"))
    for name, key, value in (
        ("config.json", "eos_token_id", text_end),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        settings = files.read_json(folder / name)
        files.write_json(folder / name, settings | {key: value})
    stages("config", overrides=(f"model.path={folder}", "train.iters=20"))
    stages("prepare", "train", "test", "fuse")
    lines = files.read_jsonl(Path("artifacts/test/predictions.jsonl"))
    tuned = [line["tuned"] for line in lines if line["split"] == "train"]
    assert tuned == [{"text": text, "stopped": True} for text in references()]
    for name in ("config.json", "generation_config.json"):
        ends = files.read_json(Path("artifacts/fuse/model") / name)["eos_token_id"]
        assert ends == [turn_end, text_end]
    tokenizer = files.read_json(Path("artifacts/fuse/model/tokenizer_config.json"))
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert fused_answers() == references()


def test_run_keeps_the_configuration_that_it_ran(stages: Stages, store: str) -> None:
    stages("config")
    stages("prepare")
    stages("train", overrides=("train.iters=1", "train.learning_rate=7e-4"))
    run = last_run(store)
    assert run.data.params["train.learning_rate"] == "0.0007"
    kept = mlflow_store.fetch_artifact(store, run.info.run_id, "params.yaml")
    assert "learning_rate: 0.0007" in kept.read_text(encoding="utf-8")


def test_stages_out_of_order_say_which_comes_first(stages: Stages) -> None:
    stages("config")
    for stage, first in (("train", "prepare"), ("test", "train"), ("fuse", "train")):
        with pytest.raises(UserError, match=f"`uv run dvc repro {first}`"):
            stages(stage)


def test_what_cannot_become_a_gguf_is_named_before_training(
    stages: Stages, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"model_type": "olmo2"})
    stages("config", overrides=(f"model.path={folder}",))
    with refused_keys(("chat.no_gguf", "fuse.gguf")):
        stages("prepare")
    stages("config", overrides=(f"model.path={folder}", "fuse.gguf=null"))
    stages("prepare")
    with refused_keys(("chat.no_gguf", "fuse.gguf")):
        stages("train", overrides=("fuse.gguf=f16",))


def test_rows_with_nothing_to_learn_stop_before_training(stages: Stages) -> None:
    stages("config", overrides=("train.max_seq_length=5",))
    with pytest.raises(UserError, match=r"train: too_few_rows: .* 12 nothing_to_learn"):
        stages("prepare")


def test_rows_that_a_template_refuses_are_named(stages: Stages, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "strict"))
    template = folder / "chat_template.jinja"
    refusal = (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    )
    template.write_text(refusal + template.read_text(encoding="utf-8"), encoding="utf-8")
    lines = Path("data/train.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [
        {
            "messages": [
                *([{"role": "system", "content": "短答"}] if number == 3 else []),
                {"role": "user", "content": json.loads(line)["prompt"]},
                {"role": "assistant", "content": json.loads(line)["completion"]},
            ]
        }
        for number, line in enumerate(lines, 1)
    ]
    files.write_jsonl(Path("data/train.jsonl"), chats)
    stages("config", overrides=(f"model.path={folder}",))
    with pytest.raises(UserError, match=r"train\.jsonl:3: .*no system"):
        stages("prepare")


def test_full_training_is_float32_where_the_base_is_not(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the base stays float16, in which Adam's second moment would round to 0."""
    for module in (backend, load, build):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    stages("config", overrides=("train=full", "train.iters=4", "train.num_layers=2"))
    stages("prepare", "train", "fuse")
    assert files.read_json(Path("artifacts/train/metrics.json"))["train_loss"] > 0
    fused = read_dtypes(Path("artifacts/fuse/model"))
    assert set(map(str, fused.values())) == {"mlx.core.float16"}


def test_a_line_separator_in_a_row_is_no_new_row(stages: Stages) -> None:
    for split, answer in (("train", "段\u2029落"), ("valid", "另\u2029外")):
        row = {"prompt": f"{split}行\u2028分", "completion": answer}
        text = json.dumps(row, ensure_ascii=False)
        Path(f"data/{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    stages("config", overrides=("train.iters=1",))
    stages("prepare", "train")
    assert len(files.read_jsonl(Path("artifacts/prepare/train.jsonl"))) == 1


def test_rows_with_nothing_left_to_learn_are_named_and_left_out(
    stages: Stages, capfd: pytest.CaptureFixture[str]
) -> None:
    stages("config")
    stages("prepare")
    row = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))
    row[1]["messages"][0]["content"] *= 9
    files.write_jsonl(Path("artifacts/prepare/train.jsonl"), row)
    stages("train", overrides=("train.iters=1", "train.max_seq_length=40"))
    said = " ".join(capfd.readouterr().err.split())
    assert "1 of 6 rows of train have no token left to learn and are left out" in said
    assert "artifacts/prepare/train.jsonl:2" in said
    with refused("train.no_targets", split="train", length=3):
        stages("train", overrides=("train.iters=1", "train.max_seq_length=3"))


def test_a_batch_that_will_not_fit_is_said_before_it_is_tried(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fit, "memory_limit", lambda: 10_000_000)
    stages("config", overrides=("train.iters=1",))
    stages("prepare", "train")
    said = capfd.readouterr()
    assert "the longest batch will not fit" in " ".join(said.err.split())
    assert "train.grad_checkpoint=true" in said.err
    printed = " ".join(said.out.split())
    assert printed.index("the longest batch needs about") < printed.index("iteration 1 ")


def test_epochs_and_the_best_adapters(stages: Stages) -> None:
    """Two epochs of six rows, two at a time; what train hands on is what it says it is."""
    given = ("train.iters=null", "train.epochs=2", "train.batch_size=2", "train.keep=best")
    stages("config", overrides=(*given, "train.steps_per_eval=1"))
    stages("prepare", "train", "test")
    metrics = files.read_json(Path("artifacts/train/metrics.json"))
    lines = Path("artifacts/train/history.csv").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("6,")
    losses = {int(line.split(",")[0]): float(line.split(",")[1]) for line in lines[2:]}
    best = min(losses, key=lambda iteration: losses[iteration])
    assert metrics["kept_iteration"] == metrics["best_iteration"] == best
    for folder, iteration in (("adapters", best), ("other_adapters", 6)):
        settings = files.read_json(Path("artifacts/train") / folder / "adapter_config.json")
        assert settings["iteration"] == iteration
    # The test stage measures the kept adapters: on the validation rows it finds their loss again.
    tested = files.read_json(Path("artifacts/test/metrics.json"))
    assert tested["test_valid_loss"] == pytest.approx(metrics["best_val_loss"], abs=1e-5)
