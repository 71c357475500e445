"""Base models: where they come from, loading them, adapters, and their files."""
