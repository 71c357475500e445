"""The exports of a fused model: a GGUF, Modelfiles for Ollama, the adapters for PEFT."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from athanor import console, files
from athanor.chat.conversation import Conversation, read_line
from athanor.chat.rendering import Rendering
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.fuse.export_gguf import write_gguf
from athanor.fuse.export_ollama import build_modelfile
from athanor.fuse.export_peft import write_peft
from athanor.paths import Workspace


def export_all(
    folder: Path,
    workspace: Workspace,
    base: Path,
    name: str,
    cfg: Config,
    rendering: Rendering | None = None,
) -> dict[str, str]:
    """Write the exports that cfg.fuse asks for to `folder`, beside model/, the fused model.

    Args:
        folder: the temporary folder that becomes workspace.fused.
        base: the base model's folder.
        name: the base model's name, after which the GGUF is called.
        rendering: how the template wrote the rows of the training.

    Returns:
        By the form of the export, the file or folder that it is in, from `folder`.
    """
    model = folder / "model"
    exports = {}
    if cfg.fuse.gguf is not None:
        gguf = folder / f"{Path(name).name}-{cfg.fuse.gguf}.gguf"
        write_gguf(model, gguf, cfg.fuse.gguf, rendering)
        exports["gguf"] = f"{gguf.name}, {gguf.stat().st_size / 1e6:.1f} MB"
    if cfg.fuse.modelfile:
        system = cfg.fuse.system
        if system is None:
            system = common_system_message(files.iterate_jsonl(workspace.rows("train"), read_line))
        options: dict[str, Any] = {"system": system, "rendering": rendering}
        try:
            if cfg.fuse.gguf is not None:
                text = build_modelfile(model, f"./{gguf.name}", **options)
                files.write_text(folder / "Modelfile", text)
            text = build_modelfile(model, ".", **options)
            files.write_text(model / "Modelfile", text)
            exports["ollama"] = "Modelfile" if cfg.fuse.gguf is not None else "model/Modelfile"
        except UserError as error:
            error.rename(folder, workspace.fused)
            console.warn(f"no Modelfile was written: {error}")
    if cfg.fuse.peft:
        try:
            write_peft(workspace.trained / "adapters", folder / "peft", base=name, model=base)
            exports["peft"] = "peft/"
        except UserError as error:
            console.warn(f"no adapters were written in PEFT's format: {error}")
    return exports


def common_system_message(rows: Iterable[Conversation]) -> str | None:
    """Return the system message that all conversations have, None where two differ."""
    systems: set[str | None] = set()
    for row in rows:
        if row.turns:
            system = (turn.content for turn in row.turns if turn.role == "system")
            systems.add(next(system, None))
            if len(systems) > 1:
                return None
    return systems.pop() if systems else None
