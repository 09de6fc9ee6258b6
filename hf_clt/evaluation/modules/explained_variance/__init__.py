from .explained_variance import ExplainedVariance


__all__ = ["ExplainedVariance"]
