"""The device that an option names."""

import os
import re

import torch


DEVICES = r"cpu|cuda(:\d+)?"


def chosen_device(name: str | None, option: str = "device") -> torch.device:
    """
    The device that an option names, a GPU with its number; `None` and `"cuda"` are the GPU of this process, and `None`
    is the CPU where there is no GPU.

    Raises:
        ValueError: For a device that is not there, or not of a kind that hf_clt runs on.
    """
    has_gpu = torch.cuda.is_available()
    if name is None:
        name = "cuda" if has_gpu else "cpu"
    check_kind(name, option)
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not has_gpu:
        raise ValueError(f"{option}={name!r}, but no GPU is available; leave {option} out or give cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"{option}={name!r} is GPU {index}, but there are {count}, numbered from 0; give another")
    return torch.device("cuda", index)


def check_kind(name: str, option: str = "device") -> None:
    """Raises ValueError for a device of a kind that hf_clt does not run on, whether this machine has it or not."""
    if not re.fullmatch(DEVICES, name):
        raise ValueError(f"{option}={name!r}: hf_clt runs on CPUs and NVIDIA GPUs; give cpu, cuda or cuda:0")


def values_at_hand(tensor: torch.Tensor) -> bool:
    """Whether it costs nothing to look at values, on which sizes may then depend: a GPU would be waited for."""
    return tensor.device.type == "cpu"


__all__ = ["check_kind", "chosen_device", "values_at_hand"]
