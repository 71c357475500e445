"""What leaves the pipeline: a fused model in the formats of other programs."""
