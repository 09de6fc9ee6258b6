from .dead_fraction import DeadFraction


__all__ = ["DeadFraction"]
