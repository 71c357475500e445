"""Base models: their sources, files and adapters."""
