"""Stage `fuse`: merge the adapters into the base model and export the result."""
