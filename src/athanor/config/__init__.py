"""Stage `config`: compose conf/ into params.yaml, and check every value."""
