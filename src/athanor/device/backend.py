"""The device that mlx computes on: its kind, its memory, its compiler."""

import sys

from athanor.device import blas


def compile_kernels(on: bool) -> None:
    """Turn mlx's compiler on or off for the process; without it Linux's CPU gets a faster SiLU.

    mlx-lm's models look nn.silu up at each call. With the compiler mlx's own is put back: functions
    that are compiled for any shape can't hold a custom gradient.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.nn.layers import activations

    from athanor.device.silu import silu

    nn.silu = silu if sys.platform == "linux" and not on else activations.silu
    if on:
        mx.enable_compile()
    else:
        mx.disable_compile()


def on_cpu() -> bool:
    """Return whether mlx computes on the CPU."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def describe_device() -> str:
    """Describe the device for the record: its name, and the BLAS and its threads on Linux's CPU."""
    import platform

    import mlx.core as mx

    if on_cpu():
        name = "Accelerate" if platform.system() == "Darwin" else blas.version()
        if (count := blas_threads()) is not None:
            name += f", {count} thread{'s' if count > 1 else ''}"
        return f"cpu {platform.machine()} ({name})"
    return f"gpu {mx.device_info().get('device_name', '')}".strip()


def blas_threads() -> int | None:
    """Return how many threads OpenBLAS computes with, None where mlx does not use it."""
    return blas.threads() if on_cpu() else None


def memory_limit() -> int:
    """Return the bytes that a model may use: Metal's recommendation, or mlx's own limit."""
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or mx.get_memory_limit())
