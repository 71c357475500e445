"""From files as people have them to rows that a model can be trained on, and what was found."""
