"""The chat contract: prompts, ends of answers, and the tokens that are learned."""
