"""Sweeps: points trained side by side, compared, and the best of them promoted."""
