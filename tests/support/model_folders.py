"""Copies of a model's folder, with one thing in them changed as downloads and disks change them."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]


def copy_model(model: Path, folder: Path) -> Path:
    """Copy a model's folder; files are shared where the disk allows it, and never changed."""
    folder.mkdir(parents=True)
    for path in model.iterdir():
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    return folder


def put(name: str, content: bytes | str) -> Change:
    """Put a file with this content in the place of another."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def setting(name: str, **values: Any) -> Change:
    """Change keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        put(name, json.dumps(known | values))(folder)

    return change


def kind(name: str, of: str) -> Change:
    """Put a folder, a pipe, a socket or a link in the place of a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if of == "folder":
            path.mkdir()
        elif of == "pipe":
            os.mkfifo(path)
        elif of == "socket":
            here = Path.cwd()
            os.chdir(folder)  # a socket's path has at most 107 bytes
            try:
                socket.socket(socket.AF_UNIX).bind(name)
            finally:
                os.chdir(here)
        else:
            path.symlink_to(of)

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of the weights, and nothing after it."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        put(path.name, struct.pack("<Q", len(text)) + text + content[8 + length :])(folder)

    return edit


def weights(change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of the weights' file."""
    return lambda folder: put(
        "model.safetensors", change((folder / "model.safetensors").read_bytes())
    )(folder)


def shards(places: dict[str, str] | None = None, keep: int = 2) -> Change:
    """Cut the weights into two files with an index, of which `keep` are left.

    `places` are entries of the index to change.
    """

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        entries.pop("__metadata__", None)
        values, index = content[8 + length :], {}
        names = sorted(entries, key=lambda name: entries[name]["data_offsets"][0])
        for number, part in enumerate((names[:20], names[20:]), start=1):
            file = f"model-{number:05}-of-00002.safetensors"
            first, last = (entries[part[at]]["data_offsets"][at] for at in (0, -1))
            for name in part:
                offsets = [offset - first for offset in entries[name]["data_offsets"]]
                entries[name]["data_offsets"] = offsets
                index[name] = file
            text = json.dumps({name: entries[name] for name in part}).encode()
            if number <= keep:
                put(file, struct.pack("<Q", len(text)) + text + values[first:last])(folder)
        path.unlink()
        index |= places or {}
        put("model.safetensors.index.json", json.dumps({"weight_map": index}))(folder)

    return change


def together(*changes: Change) -> Change:
    """Make several changes."""
    return lambda folder: [change(folder) for change in changes]
