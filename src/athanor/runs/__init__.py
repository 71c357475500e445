"""Runs in MLflow: recording, lineage, comparison."""
