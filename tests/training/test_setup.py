"""What the set-up of a run changes in the process."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hf_clt.training.output_folder import check_output_dir, lock_folder
from hf_clt.training.setup import check_gpus, check_launch, check_num_processes


COUNT_FAULTS = """
import resource
import torch
from hf_clt.training.setup import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
faults()  # takes the memory that is kept from now on
print(before, faults())
"""


FLUSH = """
import torch
from hf_clt.training.setup import prepare_cpu

prepare_cpu()
torch.set_num_threads(2)
tiny = torch.full((1 << 22,), 2.0**-130)
print(int((tiny * 0.5).count_nonzero()))
"""


@pytest.mark.slow
def test_no_thread_computes_with_denormal_numbers():
    done = subprocess.run([sys.executable, "-c", FLUSH], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.slow
def test_freed_memory_is_kept():
    """Counted in page faults: 200 MB are 50,000 small pages or 100 huge ones, each time that they come anew."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before >= 100
    assert after < before / 10


def test_a_folder_that_is_read_only_is_refused(tmp_path):
    """In a process without the rights of root, to whom no folder is read-only."""
    folder = Path(tempfile.mkdtemp())  # pytest's own can be entered by its user alone
    folder.chmod(0o555)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            check_output_dir(folder / "a" / "run", overwrite=True, goes_on=False)
        except ValueError as error:
            expected = f"output_dir={str(folder / 'a' / 'run')!r} cannot be written to ({str(folder)!r} is read-only)"
            status = 0 if str(error).startswith(expected) else 2
        finally:
            os._exit(status)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        folder.chmod(0o755)
        folder.rmdir()
    check_output_dir(tmp_path / "a" / "run", overwrite=False, goes_on=False)


# What launchers leave in the environment, as found by running them without a GPU.
ACCELERATE_ONE = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ENVIRONMENTS = {
    "python": ({}, 1, None),
    "accelerate launch": (ACCELERATE_ONE, 1, None),
    "python where an address is set": (ADDRESS, 1, None),
    "torchrun with 1": ({**ADDRESS, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1, None),
    "torchrun with 2": ({**ADDRESS, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, 2, None),
    "mpirun with an address": ({**ADDRESS, "OMPI_COMM_WORLD_SIZE": "2"}, 2, None),
    "accelerate launch --cpu --num_processes 2": ({**ACCELERATE_ONE, **ADDRESS}, 1, "has started one, as it does"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "WORLD_SIZE=2, but MASTER_ADDR is not set"),
    "processes that are not found": ({**ADDRESS, "WORLD_SIZE": "2"}, 1, "WORLD_SIZE=2, but this process knows of 1"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_processes_that_would_train_alone_are_refused(name, monkeypatch):
    environment, num_processes, refused = ENVIRONMENTS[name]
    for variable in list(os.environ):
        if variable.startswith(("ACCELERATE_", "MASTER_", "PMI_", "OMPI_", "MV2_", "WORLD_SIZE", "RANK", "LOCAL_")):
            monkeypatch.delenv(variable)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if refused is None:
        check_launch()
        check_num_processes(num_processes)
        return
    with pytest.raises(ValueError, match=refused) as caught:
        check_launch()
        check_num_processes(num_processes)
    assert "accelerate launch --multi_gpu --num_processes N" in str(caught.value)


def test_more_processes_than_gpus_are_refused():
    check_gpus(4, 4)
    with pytest.raises(ValueError, match=r"LOCAL_WORLD_SIZE=3 .*2 GPUs"):
        check_gpus(3, 2)


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such locks")
def test_a_folder_is_written_to_by_one_run(tmp_path):
    held = lock_folder(tmp_path)
    with pytest.raises(ValueError, match="another run; give another folder"):
        lock_folder(tmp_path)
    os.close(held)
    os.close(lock_folder(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_connections_end_with_the_model_that_holds_them():
    """Else a thread of gloo may abort a process at its exit."""
    code = """
import weakref, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hf_clt.training.processes import disconnect

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = DistributedDataParallel(torch.nn.Linear(2, 2))
model.cycle = [model]
found = weakref.ref(model)
del model
assert found() is not None
disconnect()
assert found() is None and not dist.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
