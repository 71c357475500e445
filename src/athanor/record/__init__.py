"""What a run says of itself, on its way into MLflow, and how it is read again."""
