from .top1_agreement import Top1Agreement


__all__ = ["Top1Agreement"]
