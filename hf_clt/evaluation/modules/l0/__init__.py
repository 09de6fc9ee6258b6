from .l0 import L0


__all__ = ["L0"]
