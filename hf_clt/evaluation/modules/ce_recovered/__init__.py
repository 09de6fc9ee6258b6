from .ce_recovered import CERecovered


__all__ = ["CERecovered"]
