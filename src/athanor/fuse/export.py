"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes to artifacts/fuse/ model/, a
folder in Hugging Face's format that mlx_lm.generate --model and transformers read, what is exported
from it (a GGUF, Modelfiles, the adapters in PEFT's format), and fused.json, which says how it was
fused and what parity.py found; adds the model to the training's MLflow run. A model that is not the
trained one is not written.
"""

from pathlib import Path

from athanor import console, files
from athanor.config.schema import FuseConfig
from athanor.errors import UserError
from athanor.fuse import export_ollama, export_peft
from athanor.fuse.export_gguf import write_gguf


def export_all(
    folder: Path, adapters: Path, base: Path, name: str, fuse: FuseConfig, shown: Path
) -> dict[str, str]:
    """Writes what is asked for beside `folder`/model, the fused model; says what it wrote.

    `name` is the base's, after which the GGUF is called; `base` is its folder.
    """
    model = folder / "model"
    wrote = {}
    if fuse.gguf is not None:
        gguf = folder / f"{Path(name).name}-{fuse.gguf}.gguf"
        write_gguf(model, gguf, fuse.gguf)
        wrote["gguf"] = f"{gguf.name}, {gguf.stat().st_size / 1e6:.1f} MB"
    if fuse.modelfile:
        try:
            if fuse.gguf is not None:
                text = export_ollama.modelfile(model, f"./{gguf.name}", system=fuse.system)
                files.write_text(folder / "Modelfile", text)
            text = export_ollama.modelfile(model, ".", system=fuse.system)
            files.write_text(model / "Modelfile", text)
            wrote["ollama"] = "Modelfile" if fuse.gguf is not None else "model/Modelfile"
        except UserError as error:
            console.warn(f"no Modelfile was written: {error}".replace(str(folder), str(shown)))
    if fuse.peft:
        try:
            export_peft.write(adapters, folder / "peft", base=name, model=base)
            wrote["peft"] = "peft/"
        except UserError as error:
            console.warn(f"no adapters in PEFT's format: {error}")
    return wrote
