"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes to artifacts/fuse/ model/, a
folder in Hugging Face's format that mlx_lm.generate --model and transformers read, what is exported
from it (a GGUF, Modelfiles, the adapters in PEFT's format), and fused.json, which says how it was
fused and what parity.py found; adds the model to the training's MLflow run. A model that is not the
trained one is not written.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice

from athanor import console, files
from athanor.chat.contract import Contract
from athanor.chat.model_check import refuse_model_misfits
from athanor.chat.templates import Message
from athanor.config.compose import load_config
from athanor.config.schema import FuseConfig
from athanor.config.values import to_dataclass
from athanor.fuse import weights
from athanor.fuse.export import export_all
from athanor.fuse.log_model import log_model
from athanor.model.source import Source, digest_model
from athanor.paths import Workspace
from athanor.runs.run import resume_run

# Questions of the training rows that both models are asked, beside parity's own.
QUESTIONS = 8


def main() -> None:
    workspace = Workspace.here()
    cfg = load_config(sys.argv[1:])
    trained = files.read_json(workspace.trained / "run.json")
    for left in workspace.fused.parent.glob(
        f".{workspace.fused.name}.*"
    ):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with resume_run(trained["run"], trained["run_id"]) as run:
        source = Source.read(workspace.prepared / "model.json")
        base, adapters = source.folder(), workspace.trained / "adapters"
        refuse_model_misfits(cfg, base)  # what is exported may have changed since the training
        rows = list(islice(files.lines_of_jsonl(workspace.rows("train")), QUESTIONS))
        config: FuseConfig = to_dataclass(cfg.fuse)
        if config.modelfile and config.system is None:
            config.system = _said_by_all(files.lines_of_jsonl(workspace.rows("train")))
        with files.whole_folder(workspace.fused) as folder:
            report, dequantized = weights.fuse_and_compare(
                base,
                adapters,
                folder / "model",
                rows,
                end=Contract.read(workspace.prepared / "chat.json").end,
                dequantize=cfg.fuse.dequantize,
                max_difference=cfg.fuse.max_difference,
            )
            digest = digest_model(folder / "model")
            wrote = export_all(folder, adapters, base, source.path, config, workspace.fused)
            files.write_json(
                folder / "fused.json",
                {
                    "digest": digest,
                    "base": source.path,
                    "dequantized": dequantized,
                    "parity": asdict(report),
                },
            )
        run.set_tags({"fused.digest": digest, "fused.dequantized": str(dequantized).lower()})
        figures = {"fuse_max_logit_difference": report.difference}
        if report.share_lost is not None:
            figures["fuse_share_lost"] = report.share_lost
        run.log_metrics(trained["iteration"], figures)
        for name in ("fused.json", "Modelfile"):
            if (workspace.fused / name).exists():
                run.log_artifact(workspace.fused / name, "fuse")
        if cfg.fuse.log_model:
            log_model(workspace, run, cfg, source, base, digest, rows, trained["iteration"])
    size = sum(path.stat().st_size for path in (workspace.fused / "model").iterdir()) / 1e6
    facts = {
        "model": f"{workspace.fused / 'model'}, {size:.1f} MB"
        + (", dequantized" if dequantized else ""),
        "parity": report.summary(),
        **{what: f"{workspace.fused}/{file}" for what, file in wrote.items()},
        "digest": digest[:12],
    }
    if cfg.fuse.log_model and cfg.fuse.registered_model_name is not None:
        facts["registered"] = run.describe_version()
    facts["ask it"] = f'uv run mlx_lm.generate --model {workspace.fused / "model"} --prompt "…"'
    console.print_facts("fuse", facts)


def _said_by_all(rows: Iterable[Message]) -> str | None:
    """The system message that all rows have, if they have one; read up to where two differ."""
    told: set[str | None] = set()
    for row in rows:
        if "messages" in row:
            told.add(next((m["content"] for m in row["messages"] if m["role"] == "system"), None))
            if len(told) > 1:
                return None
    return told.pop() if told else None


if __name__ == "__main__":
    console.run_command(main)
