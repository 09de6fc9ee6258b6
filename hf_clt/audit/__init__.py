"""Whether a CLT can be trusted: what it explains, and whether its circuits are those of the language model."""
