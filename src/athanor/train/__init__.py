"""Stage `train`: fine-tune the base model."""
