"""The pipeline in a real git and DVC repository: what runs, what does not, what comes out."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from athanor.code import find_imports, module_path
from athanor.paths import SPLITS
from athanor.prepare import result
from support import mlflow_store, workspace
from support.prompts import PROMPTS
from support.workspace import Workspace

LORA = Path("conf/train/lora.yaml")


@pytest.fixture(scope="module")
def finished(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """What the README's first command leaves in a fresh clone."""
    clone = workspace.of_the_repository(repo, tmp_path_factory.mktemp("clone") / "athanor")
    assert not (clone.folder / "data").exists()
    assert clone.cold().dvc("repro", "--pull") == ["config", "prepare", "train", "test", "fuse"]
    return clone


@pytest.fixture(scope="module")
def short(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The finished clone with a training of two iterations, its lock file committed."""
    clone = finished.copy(tmp_path_factory.mktemp("short") / "用户 项目#1%41&é")
    # An edit of conf/train re-runs what depends on training and nothing before it.
    text = (clone.folder / LORA).read_text(encoding="utf-8")
    iters = next(line for line in text.splitlines() if line.startswith("iters:"))
    clone.edit(LORA, iters, "iters: 2")
    assert clone.dvc("repro") == ["config", "train", "test", "fuse"]
    clone.run("git", "commit", "-qam", "Train for two iterations")
    clone.run("git", "add", "dvc.lock")
    clone.run("git", "commit", "-qm", "Its result")
    return clone


@pytest.fixture
def clone(short: Workspace, tmp_path: Path) -> Workspace:
    return short.copy(tmp_path / "athanor")


def test_training_questions_are_learned_and_every_answer_ends(finished: Workspace) -> None:
    asked = [line for line in finished.predictions() if line["split"] == "train"]
    assert len(asked) == 6
    assert [line["tuned"] for line in asked] == [
        {"text": line["reference"], "stopped": True} for line in asked
    ]
    assert not [line for line in asked if line["base"]["text"] == line["reference"]]
    assert all(line["tuned"]["stopped"] for line in finished.predictions())


def encode_prompt(messages: list[Any], tokenizer: Any) -> list[int]:
    from athanor.chat.conversation import Conversation
    from athanor.chat.templates import encode_prompt

    answer = {"role": "assistant", "content": ""}
    return encode_prompt(Conversation.of({"messages": [*messages, answer]}), tokenizer)


def test_fused_model_answers_by_itself(finished: Workspace) -> None:
    from athanor.chat import templates
    from athanor.chat.base import load_with_tokenizer
    from athanor.compute import evaluation

    model, tokenizer = load_with_tokenizer(finished.folder / "artifacts/fuse/model")
    asked = [line for line in finished.predictions() if line["split"] == "train"]
    prompts = [encode_prompt(line["prompt"], tokenizer) for line in asked]
    given = evaluation.generate_answers(model, tokenizer, prompts, max_tokens=64, batch_size=8)
    assert [templates.decode_answer(answer.ids, tokenizer) for answer in given] == [
        line["reference"] for line in asked
    ]
    assert all(answer.stopped for answer in given)


def test_llama_cpp_answers_as_the_tested_model_does(finished: Workspace) -> None:
    """The GGUF that the run left: the same tokens for fifty texts, and the same answers."""
    from athanor.chat import templates
    from athanor.chat.base import load_with_tokenizer
    from athanor.compute import evaluation
    from support.llama import Llama

    [gguf] = (finished.folder / "artifacts/fuse").glob("*.gguf")
    llama = Llama(gguf)
    model, tokenizer = load_with_tokenizer(finished.folder / "artifacts/fuse/model")
    assert len(PROMPTS) >= 50
    for text in PROMPTS:
        asked = encode_prompt([{"role": "user", "content": text}], tokenizer)
        assert llama.ids(text, False) == tokenizer.encode(text, add_special_tokens=False)
        assert llama.ids(tokenizer.decode(asked), False) == asked
    lines = finished.predictions()
    prompts = [encode_prompt(line["prompt"], tokenizer) for line in lines]
    ours = evaluation.generate_answers(model, tokenizer, prompts, max_tokens=64, batch_size=1)
    theirs = [llama.answer(ids, 64) for ids in prompts]
    assert theirs == ours
    assert [
        {"text": templates.decode_answer(answer.ids, tokenizer), "stopped": answer.stopped}
        for answer in theirs
    ] == [line["tuned"] for line in lines]


def test_mlx_lm_takes_our_adapters_data_and_fused_model(finished: Workspace) -> None:
    adapters = ("--adapter-path", "artifacts/train/adapters")
    asked = ("--prompt", "谁是最帅的地球人", "--max-tokens", "20", "--temp", "0")
    for model in (("models/tiny", *adapters), ("artifacts/fuse/model",)):
        said = finished.run("mlx_lm.generate", "--model", *model, *asked)
        assert said.split("==========")[1].strip() == "德哥"
    data = ("--data", "artifacts/prepare", "--batch-size", "1", "--test-batches", "-1")
    said = finished.run("mlx_lm.lora", "--model", "models/tiny", *adapters, *data, "--test")
    assert "Test loss" in said


def test_transformers_reads_the_fused_tokenizer(finished: Workspace) -> None:
    from transformers import AutoTokenizer

    folder = finished.folder / "artifacts/fuse/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "月亮哪天最圆"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n月亮哪天最圆<|im_end|>\n<|im_start|>assistant\n"
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]


def test_mlflow_holds_the_whole_run(finished: Workspace) -> None:
    run = finished.mlflow_run()
    client = mlflow_store.connect(finished.folder)
    assert run.info.status == "FINISHED"
    params = finished.params()
    assert run.data.params["train.learning_rate"] == str(params["train"]["learning_rate"])
    assert run.data.params["seed"] == "0"
    every = params["train"]["steps_per_report"]
    reported = list(range(every, params["train"]["iters"] + 1, every))
    for key in (
        *("train_loss", "learning_rate", "iterations_per_second", "tokens_per_second"),
        *("trained_tokens", "peak_memory"),
    ):
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == reported, key
    points = client.get_metric_history(run.info.run_id, "train_loss")
    assert run.info.start_time < points[0].timestamp < points[-1].timestamp <= run.info.end_time
    validated = [m.step for m in client.get_metric_history(run.info.run_id, "val_loss")]
    assert validated[0] == 0
    assert validated[-1] == params["train"]["iters"]
    tested = finished.json("artifacts/test/metrics.json")
    assert {key: run.data.metrics[key] for key in tested} == pytest.approx(tested)
    assert run.data.metrics["test_train_exact_match"] == 1
    tags = run.data.tags
    head = finished.run("git", "rev-parse", "HEAD").strip()
    assert tags["mlflow.source.git.commit"] == head
    assert tags["git.dirty"] == "false"
    tracked = yaml.safe_load((finished.folder / "data.dvc").read_text(encoding="utf-8"))
    assert tags["dvc.data"] == tracked["outs"][0]["md5"]
    assert tags["model.path"] == "models/tiny"
    assert tags["fused.digest"] == finished.json("artifacts/fuse/fused.json")["digest"]
    assert {"model.digest", "mlx.version", "mlx_lm.version", "device"} <= set(tags)
    adapters = (finished.folder / "artifacts/train/adapters/adapters.safetensors").read_bytes()
    assert tags["adapters.digest"] == hashlib.sha256(adapters).hexdigest()
    assert tags["code.patch"] == "none"
    kept = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"adapters", "params.yaml", "history.csv", "test", "versions.json"} <= kept
    of_data = {a.path for a in client.list_artifacts(run.info.run_id, "data")}
    data = ("chat.json", "report.html", "report.json", "rows.npz")
    assert of_data == {f"data/{name}" for name in data}
    assert (run.data.metrics["train_rows"], run.data.metrics["rejected_rows"]) == (6, 0)
    datasets = {d.dataset.name: d.tags[0].value for d in run.inputs.dataset_inputs}
    assert datasets["artifacts/prepare/train.jsonl"] == "training"


def test_dvc_counts_and_draws_the_rows(finished: Workspace) -> None:
    shown = json.loads(finished.run("dvc", "metrics", "show", "--json"))
    counts = shown[""]["data"]["artifacts/prepare/metrics.json"]["data"]
    assert counts["rows"] == {"read": 12, "kept": 12, "rejected": 0, "augmented": 0}
    assert [counts[split]["rows"] for split in SPLITS] == [6, 3, 3]
    finished.run("dvc", "plots", "show", "-o", "drawn")
    page = (finished.folder / "drawn/index.html").read_text(encoding="utf-8")
    assert "rows by their length in tokens" in page
    assert '"tokens": "24-27"' in page
    shutil.rmtree(finished.folder / "drawn")


def test_history_is_what_mlflow_has(finished: Workspace) -> None:
    import csv

    text = (finished.folder / "artifacts/train/history.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines()))
    run_id = finished.json("artifacts/train/run.json")["run_id"]
    for key in set(lines[0]) - {"iteration"}:
        written = {int(line["iteration"]): float(line[key]) for line in lines if line[key]}
        assert written == dict(mlflow_store.read_metric(finished.folder, run_id, key)), key


def test_second_repro_runs_nothing(finished: Workspace) -> None:
    assert finished.dvc("repro") == []


def test_fuse_section_re_runs_fuse_alone(clone: Workspace) -> None:
    clone.edit(Path("conf/fuse/default.yaml"), "dequantize: null", "dequantize: true")
    assert clone.dvc("repro") == ["config", "fuse"]
    assert clone.dvc("repro") == []


def test_edited_row_re_runs_from_prepare_and_only_once(clone: Workspace) -> None:
    clone.edit(Path("data/train.jsonl"), "德哥", "李哥")
    assert clone.dvc("repro") == ["prepare", "train", "test", "fuse"]
    assert clone.dvc("repro") == []
    tracked = yaml.safe_load((clone.folder / "data.dvc").read_text(encoding="utf-8"))
    assert clone.mlflow_run().data.tags["dvc.data"] == tracked["outs"][0]["md5"]
    # Rows of one's own never get into git, not even by a push to the demo remote.
    clone.run("dvc", "push", "data.dvc")
    assert "demo-remote" not in clone.run("git", "status", "--porcelain")


def test_restored_training_logs_nothing_and_says_so(clone: Workspace) -> None:
    before = clone.json("artifacts/train/run.json")
    clone.edit(LORA, "iters: 2", "iters: 3")
    assert clone.dvc("repro", "train") == ["config", "train"]
    clone.edit(LORA, "iters: 3", "iters: 2")
    printed = clone.run("dvc", "repro")
    assert "Stage 'train' is cached - skipping run" in printed
    assert clone.json("artifacts/train/run.json") == before
    # The run is gone from the store, as on another machine: the test stage says so and goes on.
    (clone.folder / "mlruns/mlflow.db").unlink()
    clone.edit(Path("conf/test/default.yaml"), "max_tokens: 64", "max_tokens: 5")
    printed = clone.run("dvc", "repro")
    assert f"run {before['run_id']} is not in" in printed
    assert "Nothing is logged" in printed


def test_experiment_runs_shows_and_leaves_nothing_stale(clone: Workspace) -> None:
    ran = clone.dvc("exp", "run", "-S", "train.learning_rate=3e-4", "-S", "train.num_layers=2")
    assert ran[-3:] == ["train", "test", "fuse"]
    assert "prepare" not in ran
    assert clone.params()["train"]["num_layers"] == 2
    assert clone.json("artifacts/train/adapters/adapter_config.json")["num_layers"] == 2
    shown = clone.run("dvc", "exp", "show", "--csv")
    assert "0.0003" in shown
    assert clone.mlflow_run().data.params["train.learning_rate"] == "0.0003"
    assert "dvc.experiment" in clone.mlflow_run().data.tags
    assert clone.dvc("repro") == []


def test_killed_repro_goes_on_by_itself(clone: Workspace) -> None:
    clone.edit(LORA, "iters: 2", "iters: 60")
    clone.edit(LORA, "save_every: 100", "save_every: 5")
    saved = clone.folder / "artifacts/train/checkpoints"
    process = subprocess.Popen(
        ["dvc", "repro", "train"], cwd=clone.folder, env=clone.cold().env(), start_new_session=True
    )
    wait_while(lambda: not any(saved.glob("*/0*/manifest.json")), every=0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    printed = clone.run("dvc", "repro", "train")
    assert "resumes after iteration" in printed
    assert not any(saved.iterdir())
    assert clone.mlflow_run().info.status == "FINISHED"
    steps = clone.metric_steps("train_loss")
    assert steps == list(range(5, 61, 5))
    assert clone.dvc("repro", "train") == []


def test_mistyped_experiment_is_refused_before_any_work(clone: Workspace) -> None:
    printed = clone.run("dvc", "exp", "run", "-S", "train.learing_rate=1", check=False)
    assert "learing_rate" in printed
    assert "Running stage" not in printed
    printed = clone.run("dvc", "exp", "run", "-S", "train.num_layers=9", check=False)
    assert "at most the model's 6 layers" in printed
    assert "Running stage 'train'" not in printed
    # What was refused is not taken up by the next run.
    assert clone.dvc("repro") == ["config"]
    assert clone.params()["train"]["num_layers"] == -1


def test_a_sweep_and_queued_experiments_make_the_same_points(
    short: Workspace, tmp_path: Path
) -> None:
    """In a folder whose path is not ASCII, where DVC needs its cache elsewhere."""
    clone = short.copy(tmp_path / "用户/项目")
    client = mlflow_store.connect(clone.folder)
    experiment = client.get_experiment_by_name("athanor")
    assert experiment is not None
    rates = "train.learning_rate=1e-4,5e-4"
    printed = clone.run("python", "-m", "athanor.sweep", "-m", rates)

    printed_by_dvc = clone.run("dvc", "exp", "run", "--queue", "-S", rates, check=False)
    assert "Queued" not in printed_by_dvc
    remedy = printed_by_dvc.split("`")[1].replace("uv run ", "").replace("~", str(tmp_path))
    clone.run("sh", "-c", remedy)
    clone.cold().run("dvc", "exp", "run", "--queue", "-S", rates, "test")
    # Experiments run the code that they were queued with, as their lock files have it.
    code = clone.folder / "src/athanor/train/fit.py"
    queued_code = code.read_bytes()
    code.write_text("raise RuntimeError('edited after queueing')", encoding="utf-8")
    clone.cold().run("dvc", "queue", "start", "--jobs", "2")

    def waiting() -> bool:
        status = clone.run("dvc", "queue", "status")
        assert "Failed" not in status, status + clone.run("dvc", "queue", "logs", check=False)
        return status.count("Success") < 2

    wait_while(waiting)
    clone.run("dvc", "queue", "stop")
    runs = client.search_runs([experiment.experiment_id])
    queued, swept = (
        [run for run in runs if tag in run.data.tags]
        for tag in ("dvc.experiment", "mlflow.parentRunId")
    )
    points = [
        {run.data.params["train.learning_rate"]: run.data.tags["athanor.point"] for run in found}
        for found in (queued, swept)
    ]
    assert points[0] == points[1]
    assert points[0].keys() == {"0.0001", "0.0005"}
    weights = [{run.data.tags["adapters.digest"] for run in found} for found in (queued, swept)]
    assert weights[0] == weights[1]
    assert {run.data.tags["code.patch"] for run in queued} == {"none"}
    code.write_bytes(queued_code)
    shown = clone.run("dvc", "exp", "show", "--csv")
    assert "0.0001" in shown
    assert "0.0005" in shown

    promote = next(line.strip() for line in printed.splitlines() if "dvc exp run -S" in line)
    clone.run(*shlex.split(promote.removeprefix("uv run ")))
    losses = {run.data.metrics["kept_val_loss"]: run.data.tags["athanor.point"] for run in swept}
    best = f"artifacts/sweep/points/{losses[min(losses)]}/adapters/adapters.safetensors"
    promoted = clone.folder / "artifacts/train/adapters/adapters.safetensors"
    assert promoted.read_bytes() == (clone.folder / best).read_bytes()
    # The pipeline's own rows have changed: a sweep on what prepare made of others is refused.
    with (clone.folder / "data/train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "新的问题", "completion": "新的回答"}\n')
    refused = clone.run("python", "-m", "athanor.sweep", rates, check=False)
    assert "uv run dvc repro prepare" in refused


def test_result_that_was_pushed_is_pulled_in_a_clone(clone: Workspace, tmp_path: Path) -> None:
    clone.run("dvc", "remote", "add", "-d", "mine", str(tmp_path / "remote"))
    clone.edit(Path("data.dvc"), "remote: demo", "remote: mine")
    clone.run("dvc", "push")
    clone.run("git", "commit", "-qam", "A remote of my own")
    clone.run("git", "clone", "-q", str(clone.folder), str(tmp_path / "other"))
    other = Workspace(tmp_path / "other")
    assert other.dvc("repro", "--pull") == []
    assert other.json("artifacts/fuse/fused.json") == clone.json("artifacts/fuse/fused.json")
    assert (other.folder / "artifacts/fuse/model/model.safetensors").exists()


def test_repro_says_that_it_goes_on_with_an_experiments_values(clone: Workspace) -> None:
    clone.dvc("exp", "run", "-S", "train.iters=1", "config")
    printed = clone.run("dvc", "repro", "train")
    assert "not those of conf/: train.iters=1;" in printed
    (clone.folder / "params.yaml").unlink()
    assert clone.dvc("repro", "config") == ["config"]
    assert clone.params()["train"]["iters"] == 2


def test_values_typed_into_params_are_kept(clone: Workspace) -> None:
    clone.edit(Path("params.yaml"), "iters: 2", "iters: 4")
    printed = clone.run("dvc", "repro", check=False)
    assert "dvc exp run -S train.iters=4" in printed
    assert clone.params()["train"]["iters"] == 4


def test_stages_name_the_code_they_run(repo: Path) -> None:
    stages = yaml.safe_load((repo / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert (
        tuple(f"{key}." if key in ("model", "data") else key for key in stages["prepare"]["params"])
        == result.DECIDED_BY
    )
    for stage in ("prepare", "train", "test", "fuse"):
        code = [dep for dep in stages[stage]["deps"] if dep.startswith("src/athanor/")]
        assert len(code) <= 8
        named = {repo / dep for dep in code}
        reached = {module_path(name) for name in find_imports([f"athanor.{stage}.__main__"])}
        assert {path for path in reached if not named & {path, *path.parents}} == set()
        assert {dep for dep in named if not any({dep} & {p, *p.parents} for p in reached)} == set()


def wait_while(condition: Callable[[], bool], seconds: float = 600, every: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(every)
