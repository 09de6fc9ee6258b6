"""The device that an option names, on a machine with and without GPUs."""

import pytest
import torch

from hf_clt import CLTTrainingArguments
from hf_clt.benchmark.cases import Case
from hf_clt.commands import cache
from hf_clt.device import chosen_device
from hf_clt.training.setup import take_device


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are GPUs; a list of what becomes torch's current one, which has to have a number."""
    taken = []

    def set_device(device):
        if torch.device(device).index is None:  # as torch does
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {device}")
        taken.append(torch.device(device).index)

    def make(count, **environment):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return taken

    return make


@pytest.mark.parametrize("name, index", [(None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_number_and_becomes_the_current_one(gpus, name, index):
    taken = gpus(2)
    assert take_device(name) == chosen_device(name) == torch.device("cuda", index)
    assert taken == [index]


def test_each_process_has_a_gpu_of_its_own(gpus):
    launched = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}
    gpus(4, **launched)
    for name in (None, "cuda"):
        assert take_device(name) == torch.device("cuda", 3)
    with pytest.raises(ValueError, match="device='cuda:1' is one GPU for 4 processes"):
        take_device("cuda:1")
    gpus(2, **launched)
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE=4 processes on this machine, which has 2 GPUs"):
        take_device("cuda")
    assert take_device("cpu") == torch.device("cpu")


def test_what_is_not_there_is_refused(gpus):
    gpus(0)
    assert chosen_device(None) == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device='{name}', but no GPU is available"):
            chosen_device(name)
    gpus(2)
    with pytest.raises(ValueError, match="device='cuda:2' is GPU 2, but there are 2, numbered from 0"):
        Case(device="cuda:2")


@pytest.mark.parametrize("name", ["mps", "xpu:0", "npu", "gpu", "cpu:0", "cuda:x"])
def test_other_kinds_are_refused_by_name_before_any_work(gpus, name, capsys, tmp_path):
    gpus(2)
    for option in ("device", "buffer_device"):
        with pytest.raises(ValueError, match=f"{option}='{name}': hf_clt runs on CPUs and NVIDIA GPUs"):
            CLTTrainingArguments(**{option: name})
    assert cache.main([str(tmp_path / "c"), "--model", "x", "--dataset", "y", "--device", name]) == 2
    assert f"device='{name}': hf_clt runs on" in capsys.readouterr().err


def test_the_cache_is_written_on_the_gpu_that_is_asked_for(gpus, fresh_accelerate, tmp_path):
    taken = gpus(2)
    cache.main([str(tmp_path / "c"), "--model", str(tmp_path), "--dataset", "y", "--device", "cuda:1"])
    assert taken == [1]
