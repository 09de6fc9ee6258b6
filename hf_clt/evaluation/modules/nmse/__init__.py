from .nmse import NMSE


__all__ = ["NMSE"]
