"""The colours of losses: a lower loss is darker, so that no two differ in their hue alone."""

import math
from collections.abc import Iterable
from statistics import median

MAP = "GnBu_r"  # matplotlib's


def loss_range(losses: Iterable[float]) -> tuple[float, float]:
    """Return the losses that the colours run over, without those of trainings that went astray.

    From the lowest to the highest of those that are at most three times as far above the median as
    the lowest is below it.
    """
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite:
        return 0.0, 1.0
    middle = median(finite)
    near = [loss for loss in finite if loss <= middle + 3 * (middle - finite[0])]
    return finite[0], near[-1] if near[-1] > finite[0] else finite[-1]


def shade(loss: float, low: float, high: float) -> str:
    """Return the colour of a loss, as #rrggbb."""
    from matplotlib import colormaps, colors

    return colors.to_hex(colormaps[MAP](float(colors.Normalize(low, high, clip=True)(loss))))


def text_on(colour: str) -> str:
    """Return black or white, whichever has the better contrast on a colour (WCAG 2, 1.4.3)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"
