"""The model as loss and gradient, with nothing computed twice."""
