"""What it costs to start: each stage's imports, DVC with nothing to do, a store.

    uv run dvc repro --pull && uv run python benchmarks/starting.py

Each is a process, timed from start to end, five times in turn; a bare Python is the first.
"""

import os
import statistics
import subprocess
import sys
import time

DVC = [sys.executable, "-m", "dvc"]
COMMANDS: dict[str, list[str]] = {
    "python": [sys.executable, "-c", ""],
    **{
        f"import athanor.{name}": [sys.executable, "-c", f"import athanor.{name}"]
        for name in ("config", "prepare", "train", "test", "fuse", "sweep")
    },
    "import mlx_lm.lora": [sys.executable, "-c", "import mlx_lm.lora"],
    "import mlflow": [sys.executable, "-c", "import mlflow"],
    "dvc repro, nothing to do": [*DVC, "repro"],
}


def main() -> None:
    env = {key: v for key, v in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(6):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            times[name].append(time.perf_counter() - start)
            if done.returncode:
                sys.exit(f"{name}\n{done.stderr}")
    for name, found in times.items():
        warm = found[1:]
        print(f"{name:<26}{statistics.median(warm):5.2f} s ({min(warm):.2f} to {max(warm):.2f})")


if __name__ == "__main__":
    main()
