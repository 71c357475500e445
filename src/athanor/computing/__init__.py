"""A batch through a model, without the work that has one answer: parts, losses, what is frozen."""
