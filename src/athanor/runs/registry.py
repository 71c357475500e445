"""A fused model as MLflow has it: a folder that answers, a run's model, a version with an alias.

`save` writes a folder that `mlflow models predict` answers with: a pyfunc whose code is served.py,
with signature, input example and pinned requirements. `log` makes such a folder the model of a run,
and `register` makes that a version in the model registry. Both are called by store.py with what a
journal says, and leave one model and one version however often they are called.
"""

import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import console, switches
from athanor.runs.outbox import link_or_copy

if TYPE_CHECKING:
    from athanor.compute.arrays import TokenizedText

ALIAS = "best"
# What a request may leave out; `mlflow.pyfunc.load_model(…, model_config=…)` gives others.
DEFAULTS = {"max_tokens": 512, "temperature": 0.0}
SECONDS_FOR_AN_UPLOAD = 600
# What MLflow's own log_model would say of a model: who made it, with what.
OF_RUN = ("mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit")


def digest_validation(rows: "list[TokenizedText]") -> str:
    """Says what a validation loss was measured on: sha256 over its tokens, and which of them count.

    Two losses can be compared where this is the same: not only the rows, but tokenizer, template,
    and where rows are cut decide what a loss per token is.
    """
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps([row.ids, row.targets(), row.supervised]).encode())
    return total.hexdigest()


def pin_requirements() -> list[str]:
    """The packages that served.py needs, pinned to the versions at work here.

    On Linux mlx needs a backend: this machine's, or the CPU's where it is no Linux.
    """
    extras = {"mlx-cuda-13": "cuda13", "mlx-cuda-12": "cuda12"}
    installed = {distribution.name for distribution in distributions()}
    backend = next((extra for name, extra in extras.items() if name in installed), "cpu")
    pinned = [f"{name}=={version(name)}" for name in ("mlflow", "mlx", "mlx-lm", "transformers")]
    return [*pinned, f"mlx[{backend}]=={version('mlx')} ; sys_platform == 'linux'"]


def write_model_folder(
    fused: Path,
    out: Path,
    *,
    name: str,
    question: str,
    pip: list[str],
    ids: dict[str, str] | None = None,
) -> None:
    """Writes a folder in MLflow's format, in which a fused model's files are linked, not copied.

    Nothing is loaded and no network is asked. `name` is what the model calls itself in its answers;
    `question` makes the input example; `ids` are MLflow's for a model that is logged
    (artifact_path, model_id, model_uuid, run_id). What was at `out` is replaced.
    """
    switches.configure_mlflow()
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    shutil.rmtree(out, ignore_errors=True)
    code = Path(__file__).with_name("served_model.py")
    save_model(
        out,
        python_model=code,
        signature=_signature(),
        input_example={"messages": [{"role": "user", "content": question}]},
        model_config={"name": name, **DEFAULTS},
        conda_env={  # with pip_requirements alone MLflow warns where pip itself is not installed
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={platform.python_version()}", "pip", {"pip": pip}],
        },
        mlflow_model=Model(**(ids or {})),
    )
    # Given to save_model, the files would be copied once or twice more.
    shutil.copytree(fused, out / "artifacts" / "model", copy_function=link_or_copy)
    model = Model.load(out)
    model.flavors["python_function"] |= {
        "artifacts": {"model": {"path": "artifacts/model", "uri": "artifacts/model"}},
        "model_code_path": code.name,  # only the name is ever used
    }
    model.model_size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    model.save(out / "MLmodel")


def log_model(
    client: Any,
    run: str,
    fused: Path,
    out: Path,
    *,
    name: str,
    digest: str,
    question: str,
    pip: list[str],
    step: int,
    tags: dict[str, str],
) -> Any:
    """Makes a fused model the model of a run; returns MLflow's LoggedModel.

    It has the run's parameters, and the run's metrics at `step`. A run has one model of a `digest`:
    one that is there already is finished, not made again. `out` is where its folder is made up,
    `name` what it calls itself in its answers.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    found = client.get_run(run)
    experiment = found.info.experiment_id
    there = client.search_logged_models(
        [experiment], f"source_run_id = '{run}' AND tags.`fused.digest` = '{digest}'"
    )
    model = next(iter(there), None) or client.create_logged_model(
        experiment,
        "fused",
        source_run_id=run,
        tags={
            **{key: found.data.tags[key] for key in OF_RUN if key in found.data.tags},
            **tags,
            "fused.digest": digest,
        },
        params=found.data.params,
    )
    if model.status == LoggedModelStatus.READY:
        return model
    outputs = found.outputs.model_outputs if found.outputs else []
    if all(output.model_id != model.model_id for output in outputs):
        client.log_outputs(run, [LoggedModelOutput(model.model_id, step)])
    client.log_batch(run, _metrics(client, found, model.model_id, step))
    ids = {"model_id": model.model_id, "model_uuid": model.model_id, "run_id": run}
    ids["artifact_path"] = model.artifact_location
    write_model_folder(fused, out, name=name, question=question, pip=pip, ids=ids)
    with switches.mlflow_timeout(SECONDS_FOR_AN_UPLOAD):
        client.log_model_artifacts(model.model_id, str(out))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _metrics(client: Any, run: Any, model_id: str, step: int) -> list[Any]:
    """A run's metrics at a step as those of its model, the losses with the rows they are of."""
    from mlflow.entities import Metric

    read = {tag.value: one.dataset for one in run.inputs.dataset_inputs for tag in one.tags}
    of = {"train_loss": read.get("training"), "val_loss": read.get("validation")}
    return [
        Metric(
            *(key, one.value, one.timestamp, step),
            model_id=model_id,
            run_id=run.info.run_id,
            dataset_name=getattr(of.get(key), "name", None),
            dataset_digest=getattr(of.get(key), "digest", None),
        )
        for key in run.data.metrics
        for one in client.get_metric_history(run.info.run_id, key)
        if one.step == step
    ]


def register_version(client: Any, name: str, model: Any, tags: dict[str, str]) -> str:
    """Makes a logged model a version of the registered model `name`; returns that in words.

    `tags` have at least `val_loss`, in nats, and `valid.digest`, which says what that was measured
    on. The version gets the alias `best` where none has it, or where the one that has it was
    measured on the same and its loss is higher.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run, digest = model.source_run_id, model.tags["fused.digest"]
    of_run = client.search_model_versions(f"name = '{name}' AND run_id = '{run}'")
    found = next((one for one in of_run if one.tags.get("fused.digest") == digest), None)
    if found is None:
        # The place itself: `models:/<id>` is looked up in MLflow's global store, not this one.
        found = client.create_model_version(
            name,
            model.artifact_location,
            run,
            tags={**tags, "fused.digest": digest},
            model_id=model.model_id,
        )
    # By this tag MLflow's UI finds the versions of a model; a server has set it already.
    tagged = client.get_logged_model(model.model_id).tags.get("mlflow.modelVersions", "[]")
    others = [one for one in json.loads(tagged) if one["name"] != name]
    versions = [*others, {"name": name, "version": str(found.version)}]
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps(versions)})
    return _alias(client, name, str(found.version), tags)


def _alias(client: Any, name: str, new: str, tags: dict[str, str]) -> str:
    """Gives a version the alias if it is the best; says who has it."""
    named = f"{name} version {new}"
    before = client.get_registered_model(name).aliases.get(ALIAS)
    if before is not None and str(before) != new:
        best = client.get_model_version(name, before).tags
        if best.get("valid.digest") != tags["valid.digest"]:
            console.warn(
                f"{named} and version {before}, which is {ALIAS}, were validated on other rows, so "
                f"their losses say nothing of each other; {ALIAS} stays. To move it: "
                f"{_how_to_move(name, new)}"
            )
            return f"{named}; {ALIAS} stays version {before}, which was validated on other rows"
        losses = f"{float(tags['val_loss']):.4f} to {float(best['val_loss']):.4f}"
        if not float(tags["val_loss"]) < float(best["val_loss"]):
            return f"{named}; {ALIAS} stays version {before} (validation loss {losses})"
        named += f", better than version {before} (validation loss {losses})"
    if str(before) != new:
        client.set_registered_model_alias(name, ALIAS, new)
    return f"{named}; {ALIAS} is this one"


def _how_to_move(name: str, new: str) -> str:
    # A store that is named may have a password in its name.
    where = "" if os.environ.get("MLFLOW_TRACKING_URI") else '"sqlite:///mlruns/mlflow.db"'
    return (
        f"uv run python -c 'from mlflow import MlflowClient; "
        f'MlflowClient({where}).set_registered_model_alias("{name}", "{ALIAS}", "{new}")\''
    )


def _signature() -> Any:
    """What served.py takes, a conversation a row, and gives: OpenAI's chat completion."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    message = Object([Property(key, DataType.string) for key in ("role", "content")])
    choice = [("index", DataType.long), ("message", message), ("finish_reason", DataType.string)]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(message), "messages"),
                ColSpec(DataType.long, "max_tokens", required=False),
                ColSpec(DataType.double, "temperature", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(DataType.string, "id"),
                ColSpec(DataType.string, "object"),
                ColSpec(DataType.long, "created"),
                ColSpec(DataType.string, "model"),
                ColSpec(Array(Object([Property(*each) for each in choice])), "choices"),
                ColSpec(Object([Property(key, DataType.long) for key in counts]), "usage"),
            ]
        ),
    )
