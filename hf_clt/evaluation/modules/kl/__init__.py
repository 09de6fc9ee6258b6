from .kl import KL


__all__ = ["KL"]
