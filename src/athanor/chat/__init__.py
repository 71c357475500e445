"""The chat contract: how a model is asked, what ends an answer, which tokens are learned."""
