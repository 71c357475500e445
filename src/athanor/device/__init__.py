"""The device that computes here: its backend, its BLAS, its memory."""
