"""The device that an option names, on a machine with and without GPUs."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import Case
from hf_clt import CLTConfig, CLTTrainingArguments
from hf_clt.commands import cache
from hf_clt.device import Stopwatch, chosen_device, rounded_products
from hf_clt.training.setup import fill_defaults, keep_device_choices, num_decay_steps, take_device


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
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
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
    with pytest.raises(ValueError, match=r"device='cuda:1'.* 4 processes"):
        take_device("cuda:1")
    gpus(2, **launched)
    with pytest.raises(ValueError, match=r"LOCAL_WORLD_SIZE=4 .*2 GPUs"):
        take_device("cuda")
    assert take_device("cpu") == torch.device("cpu")


def test_what_is_not_there_is_refused(gpus):
    gpus(0)
    assert chosen_device(None) == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device='{name}'.*give cpu"):
            chosen_device(name)
    gpus(2)
    with pytest.raises(ValueError, match=r"device='cuda:2'.* 2,"):
        Case(device="cuda:2")


@pytest.mark.parametrize("name", ["mps", "xpu:0", "npu", "gpu", "cpu:0", "cuda:x"])
def test_other_kinds_are_refused_by_name_before_any_work(gpus, name, capsys, tmp_path):
    gpus(2)
    for option in ("device", "buffer_device"):
        with pytest.raises(ValueError, match=f"{option}='{name}'.*give cpu"):
            CLTTrainingArguments(**{option: name})
    assert cache.main([str(tmp_path / "c"), "--model", "x", "--dataset", "y", "--device", name]) == 2
    assert f"device='{name}': hf_clt runs on" in capsys.readouterr().err


def test_the_cache_is_written_on_the_gpu_that_is_asked_for(gpus, fresh_accelerate, tmp_path):
    taken = gpus(2)
    cache.main([str(tmp_path / "c"), "--model", str(tmp_path), "--dataset", "y", "--device", "cuda:1"])
    assert taken == [1]


SHAPES = {  # layers and width, and what a GPU of 80 GB makes of them with 1,024 tokens per update: prompts, batches
    "gpt2": ((12, 768), (256, 4)),
    "SmolLM2-135M": ((30, 576), (256, 2)),
    "Llama-3.2-1B": ((16, 2048), (256, 2)),
    "gemma-2-2b": ((26, 2304), (128, 2)),
    "Llama-3.1-8B": ((32, 4096), (64, 2)),
}
SETTLED = ("model_dtype", "mixed_precision", "store_batch_size_prompts", "n_batches_in_buffer")


def values(args):
    return tuple(getattr(args, name) for name in SETTLED)


@pytest.fixture
def memory(monkeypatch):
    def make(size):
        properties = SimpleNamespace(total_memory=int(size))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    make(80e9)
    return make


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_left_to_the_device(gpus, memory, name):
    gpus(1)
    (layers, width), (prompts, batches) = SHAPES[name]
    config = CLTConfig(num_layers=layers, d_model=width, num_features=8)
    on_gpu = fill_defaults(CLTTrainingArguments(), config, torch.device("cuda", 0))
    assert values(on_gpu) == ("auto", "bf16", prompts, batches)
    # Activations of a pass, and of the buffer, in bfloat16
    block = 2 * 2 * layers * width * 128
    assert prompts * block <= 80e9 / 16 and batches * prompts * block <= max(80e9 / 16, 2 * prompts * block)
    assert values(fill_defaults(CLTTrainingArguments(), config, torch.device("cpu"))) == (None, "no", 8, 32)


def test_what_was_said_is_not_left_to_the_device(gpus, memory):
    gpus(1)
    config, gpu = CLTConfig(num_layers=12, d_model=768, num_features=8), torch.device("cuda", 0)
    said = ("float32", "no", 8, 32)
    args = CLTTrainingArguments(**dict(zip(SETTLED, said, strict=True)))
    assert values(fill_defaults(args, config, gpu)) == said
    found = fill_defaults(args, config, torch.device("cpu")).non_default()
    rate = pytest.approx(4e-3 * (10 / 12) ** 0.75)
    assert found == {"model_dtype": "float32", "learning_rate": rate}
    wide = fill_defaults(CLTTrainingArguments(batch_size=200_000, store_batch_size_prompts=16), config, gpu)
    assert wide.tokens_in_buffer >= 2 * wide.batch_size
    # A run that goes on has what it had, on another device too, unless something else is said.
    before = {
        "args": fill_defaults(CLTTrainingArguments(), config, gpu).to_dict(),
        "activations": {"dtype": "torch.bfloat16"},
    }
    assert values(fill_defaults(keep_device_choices(CLTTrainingArguments(), before), config, torch.device("cpu"))) == (
        "bfloat16",
        "bf16",
        256,
        4,
    )
    assert keep_device_choices(CLTTrainingArguments(mixed_precision="no"), before).mixed_precision == "no"


def test_products_are_rounded_on_a_gpu_alone_and_only_within_the_block(gpus):
    before = torch.get_float32_matmul_precision()
    for device, allowed, expected in (("cuda", True, "high"), ("cuda", False, before), ("cpu", True, before)):
        with rounded_products(torch.device(device), allowed):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before


def test_a_stopwatch_counts_the_work_of_a_gpu_and_not_its_launch(monkeypatch):
    """On a GPU whose every piece of work takes 40 ms and which is behind: nothing is waited for before `take`."""
    waited = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            Event.clock = self.at = Event.clock + 0.02

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

        def query(self):
            return False

        def synchronize(self):
            waited.append(self)

    Event.clock = 0.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with stopwatch.running():
            Event.clock += 0.02
    assert not waited
    assert stopwatch.take() == pytest.approx(3 * 0.04) and len(waited) == 3
    assert stopwatch.take() == 0
    stopwatch = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), stopwatch.running():
        time.sleep(0.02)
        raise KeyError
    assert 0.02 <= stopwatch.take() < 1


def test_the_learning_rate_that_is_left_to_the_size():
    def rate(num_features, num_layers=2, reach=None, **given):
        config = CLTConfig(num_layers=num_layers, d_model=8, num_features=num_features, decoder_reach=reach)
        return fill_defaults(CLTTrainingArguments(**given), config, torch.device("cpu")).learning_rate

    assert [rate(F) for F in (8, 4096, 16384)] == [4e-3, 4e-3, 2e-3]
    assert rate(65536, learning_rate=3e-3) == 3e-3
    found = [rate(8, 10), rate(8, 40), rate(8, 40, reach=1), rate(16384, 40)]
    assert found == pytest.approx([4e-3, 4e-3 / 8**0.5, 4e-3, 2e-3 / 8**0.5])


def test_when_the_learning_rate_falls_by_activation_function():
    def falls_over(activation_fn, **given):
        config = CLTConfig(num_layers=2, d_model=8, num_features=8, activation_fn=activation_fn, k=2)
        return num_decay_steps(CLTTrainingArguments(**given), config)

    steps = {"training_steps": 101, "warmup_steps": 5}
    assert [falls_over(name, **steps) for name in ("relu", "jumprelu", "topk", "batchtopk")] == [51, 51, 96, 96]
    assert falls_over("jumprelu", training_steps=10, warmup_steps=8) == 2
    assert falls_over("jumprelu", decay_steps=7, **steps) == 7
    assert falls_over("topk", training_steps=10, warmup_steps=10) == 0


def test_what_a_run_was_filled_with_fits_one_of_another_length():
    """A checkpoint is released by going on from it, with its arguments, for no update."""
    config = CLTConfig(num_layers=2, d_model=8, num_features=8)
    filled = fill_defaults(CLTTrainingArguments(training_steps=100), config, torch.device("cpu"))
    assert num_decay_steps(replace(filled, training_steps=2), config) == 1


def test_a_run_that_goes_on_keeps_its_learning_rate():
    """That of a checkpoint from before the default changed, too."""
    state = {"args": CLTTrainingArguments(learning_rate=2e-3).to_dict()}
    assert keep_device_choices(CLTTrainingArguments(), state).learning_rate == 2e-3
    assert keep_device_choices(CLTTrainingArguments(learning_rate=1e-3), state).learning_rate == 1e-3
