"""Sweeps: many trainings on the same rows, compared."""
