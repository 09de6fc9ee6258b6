"""What a run is made of before it starts: processes, output folder, optimizer, and the checks on them."""

import ctypes
import logging
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm.auto import tqdm

from ..configuration_clt import TOPK_FAMILY, CLTConfig
from ..device import chosen_device, prompts_by_memory, total_memory, usual_model_dtype
from ..kernels.encode import multiplies_bfloat16
from ..modeling_clt import CrossLayerTranscoder
from ..sharding import FeatureShard
from .arguments import CPU_DEFAULTS, CLTTrainingArguments
from .checkpoints import find_checkpoint, read_state
from .processes import connect_hosts


logger = logging.getLogger(__name__)

# How launchers and MPI say how many processes they started.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCH_REMEDY = (
    "for several processes launch with `accelerate launch --multi_gpu --num_processes N --num_machines 1 "
    "--mixed_precision no --dynamo_backend no` (on CPU too) or torchrun, see docs/launching.md"
)


def make_accelerator(args: CLTTrainingArguments) -> Accelerator:
    """
    The Accelerator of the run.

    Raises:
        ValueError: If the processes that were launched do not know of each other, see [`check_launch`].
    """
    device = take_device(args.device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=args.mixed_precision or usual_precision(device),
        log_with=args.report_to or None,  # it warns of an empty list
        project_config=ProjectConfiguration(logging_dir=Path(args.output_dir) / "tensorboard"),
    )
    check_num_processes(accelerator.num_processes)
    connect_hosts(accelerator)
    return accelerator


def take_device(name: str | None) -> torch.device:
    """
    The device of this process, see [`chosen_device`]; a GPU becomes torch's current one, which Accelerate takes.

    Raises:
        ValueError: If it is not there, as [`check_launch`], and for more processes on a machine than it has GPUs.
    """
    check_launch()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name != "cpu" and torch.cuda.is_available():
        check_gpus(local_processes, torch.cuda.device_count())
    if local_processes > 1 and name is not None and ":" in name:
        raise ValueError(f"device={name!r} is one GPU for {local_processes} processes; give cuda, one for each")
    device = chosen_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_device_choices(args: CLTTrainingArguments, state: dict) -> CLTTrainingArguments:
    """
    The arguments of a run that goes on: what is left to the device, and the learning rate if it is, are as they were
    when the checkpoint was written, whose `state.json` is given, on whatever device and with whatever defaults.
    """
    before = state.get("args", {})
    if before.get("activation_cache") is None:
        dtype = (state.get("activations") or {}).get("dtype")  # as it came out of None or auto
        before = {**before, "model_dtype": dtype and dtype.removeprefix("torch.")}
    names = (*CPU_DEFAULTS, "model_dtype", "learning_rate")
    found = {name: before.get(name) for name in names if getattr(args, name) is None}
    return replace(args, **found)


def fill_defaults(args: CLTTrainingArguments, config: CLTConfig, device: torch.device) -> CLTTrainingArguments:
    """The arguments with a value for what was left to the CLT's size and the device that it is on."""
    defaults = {**CPU_DEFAULTS}
    if device.type == "cuda":
        defaults = gpu_defaults(args, config.num_layers, config.d_model, total_memory(device))
        defaults["mixed_precision"] = usual_precision(device)
        if args.activation_cache is not None:  # no language model runs
            del defaults["model_dtype"]
    defaults["learning_rate"] = usual_learning_rate(config)
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def usual_learning_rate(config: CLTConfig) -> float:
    """
    What `learning_rate=None` means: 4e-3 up to 10 source layers per target and 4,096 features, and less with more: the
    steps of all that writes to a target layer add up. docs/defaults.md has what was measured.
    """
    return 4e-3 * min(1.0, 10 / config.reach) ** 0.75 * min(1.0, 4096 / config.num_features) ** 0.5


def num_decay_steps(args: CLTTrainingArguments, config: CLTConfig) -> int:
    """
    `decay_steps`, or what None means: half of training for relu and jumprelu, all after the warm-up for topk and
    batchtopk, by what was measured (docs/defaults.md). Not kept in the arguments: a run that goes on may be longer.
    """
    longest = args.training_steps - args.num_warmup_steps
    usual = longest if config.activation_fn in TOPK_FAMILY else min(longest, -(-args.training_steps // 2))
    return args.decay_steps or usual


def prepare_device(args: CLTTrainingArguments, accelerator: Accelerator, progress: bool) -> None:
    """On a CPU, prepares it, and warns of a precision that it does not have; on a GPU, says what was chosen for it."""
    if accelerator.device.type == "cpu":
        prepare_cpu()
        if args.mixed_precision != "no" and not multiplies_bfloat16() and accelerator.is_main_process:
            logger.warning(
                "mixed_precision=%r: this CPU has no instructions for half precision and would take several times "
                "as long, so the matrix products stay float32",
                args.mixed_precision,
            )
    elif progress:
        tqdm.write(
            f"on a GPU: mixed_precision={args.mixed_precision} for products (and TF32, unless it is no), "
            f"model_dtype={args.model_dtype}, store_batch_size_prompts={args.store_batch_size_prompts}, "
            f"n_batches_in_buffer={args.n_batches_in_buffer}"
        )


def usual_precision(device: torch.device) -> str:
    """What `mixed_precision=None` means."""
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "no"


def gpu_defaults(args: CLTTrainingArguments, num_layers: int, d_model: int, memory: int) -> dict[str, str | int]:
    """What else `None` means on a GPU of `memory` bytes; the language model's activations are counted in bfloat16."""
    block_bytes = 2 * 2 * num_layers * d_model * args.context_size  # inputs and labels
    prompts = args.store_batch_size_prompts or prompts_by_memory(block_bytes, memory)
    batches = min(32, max(2, memory // 16 // (prompts * block_bytes)))
    enough = -(-2 * args.batch_size // (prompts * (args.context_size - 1)))
    return {
        "model_dtype": usual_model_dtype(torch.device("cuda")),
        "store_batch_size_prompts": prompts,
        "n_batches_in_buffer": max(batches, enough),
    }


def launched_processes() -> int:
    """How many processes were started together, by what launchers and MPI leave in the environment."""
    return max(int(os.environ.get(name) or 1) for name in WORLD_SIZES)


def check_launch() -> None:
    """
    Refuses what would make several processes train alone and overwrite each other, or one do the work of several.

    Raises:
        ValueError: If processes were started that cannot find each other, or one where several were asked for:
            `accelerate launch` with neither `--multi_gpu` nor a config file of that type starts one process, whatever
            `--num_processes` is; it sets an address for them and, unlike torchrun and MPI, no number.
    """
    launched = launched_processes()
    if launched > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE={launched}, but MASTER_ADDR is not set: unset WORLD_SIZE for one process; {LAUNCH_REMEDY}"
        )
    numbered = any(name in os.environ for name in WORLD_SIZES)
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and not numbered:
        raise ValueError(
            "accelerate launch was asked for several processes (it has set MASTER_ADDR) and has started one, as it "
            f"does without --multi_gpu: for one process give --num_processes 1; {LAUNCH_REMEDY}"
        )


def check_num_processes(num_processes: int) -> None:
    """Refuses processes that know of fewer than were launched."""
    launched = launched_processes()
    if launched != num_processes:
        raise ValueError(
            f"WORLD_SIZE={launched}, but this process knows of {num_processes}: the processes would each train alone "
            f"and overwrite each other; {LAUNCH_REMEDY}"
        )


def check_gpus(local_processes: int, num_gpus: int) -> None:
    """Refuses more processes on a machine than it has GPUs: two on one GPU cannot exchange anything."""
    if local_processes > num_gpus:
        raise ValueError(
            f"LOCAL_WORLD_SIZE={local_processes} processes on this machine, which has {num_gpus} GPUs; start at most "
            "one per GPU, or give --device cpu"
        )


@dataclass(frozen=True)
class Layout:
    """
    How a CLT lies on the processes of a run. With n = `feature_parallel_size`, process r = d · n + f holds slice f of
    the features in replica d: a group of n consecutive processes holds a CLT and works on the same tokens; processes
    with the same f hold the same features and average their gradients.

    Args:
        shard ([`FeatureShard`] or None): The slice of this process; None: all features, n = 1.
        replica (`int`): d.
        replicas (`ProcessGroup` or None): The processes with the same f, for DistributedDataParallel; None if there is
            one.
    """

    shard: FeatureShard | None = None
    replica: int = 0
    replicas: dist.ProcessGroup | None = None


def make_layout(accelerator: Accelerator, feature_parallel_size: int) -> Layout:
    """
    Groups the processes of a run; all of them call this.

    Raises:
        ValueError: If the number of processes is no multiple of `feature_parallel_size`.
    """
    rank, num_processes, size = accelerator.process_index, accelerator.num_processes, feature_parallel_size
    if num_processes % size:
        raise ValueError(
            f"feature_parallel_size={size} does not divide the number of processes, {num_processes}; start a multiple "
            f"of {size} with accelerate launch --num_processes"
        )
    num_replicas = num_processes // size
    if size == 1:
        return Layout(None, rank, dist.group.WORLD if num_replicas > 1 else None)
    # Every process takes part in making every group, those of others too.
    groups = [dist.new_group(range(d * size, (d + 1) * size)) for d in range(num_replicas)]
    replicas = [dist.new_group(range(f, num_processes, size)) for f in range(size)] if num_replicas > 1 else None
    shard = FeatureShard(rank % size, size, groups[rank // size])
    return Layout(shard, rank // size, replicas[shard.rank] if replicas else None)


def check_shard(config: CLTConfig, size: int, model: CrossLayerTranscoder | None) -> None:
    """Refuses features that cannot be split evenly, and a CLT that holds another slice than the run needs."""
    FeatureShard(0, size).rows(config.num_features)
    held = 1 if model is None or model.shard is None else model.shard.size
    if model is not None and held != size:
        raise ValueError(
            f"feature_parallel_size={size}, but each process has 1/{held} of the model's features; load it with "
            "hf_clt.training.setup.load_initial_clt"
        )


def load_initial_clt(args: CLTTrainingArguments, config_kwargs: dict) -> CrossLayerTranscoder:
    """The CLT of `--init-from`; where several processes share its features, the slice of this one."""
    shard = None
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir))
        args = keep_device_choices(args, read_state(checkpoint))
    if args.feature_parallel_size > 1:
        shard = make_layout(make_accelerator(args), args.feature_parallel_size).shard
    device = take_device(args.device)
    if shard is None and device.type == "cuda":  # straight there, not by way of each process's host memory
        config_kwargs = {**config_kwargs, "device_map": device}
    return CrossLayerTranscoder.from_pretrained(args.init_from, shard=shard, **config_kwargs)


def prepare_cpu() -> None:
    """
    Settings of this process without which training on a CPU is several times slower. Call it before the first large
    operation: threads take over the setting for denormal numbers when they start.

    Numbers too small for a normal float (below 1e-38) count as 0. The first moment of a feature that no longer fires
    becomes such a number after some 750 steps and stays one, and a CPU takes 4 to 10 times as long for it.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """
    Makes glibc keep large blocks that are freed instead of handing them back to the kernel.

    Gradients of gigabytes are allocated and freed at every update. Handed back, their pages are cleared by the kernel
    and faulted in one by one each time: measured on 2 cores, a fifth to three quarters of a CPU step.

    Returns:
        Whether the C library took it: not on other systems than Linux with glibc, where nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


def check_target_l0(config: CLTConfig, target_l0: float | None) -> None:
    """Refuses an L0 that λ cannot be steered to."""
    if target_l0 is None:
        return
    given = f"target_l0={target_l0:g}"
    if config.activation_fn in TOPK_FAMILY:
        raise ValueError(
            f"{given} does not go with activation_fn={config.activation_fn!r}, whose L0 is k; give k={target_l0:.0f}"
        )
    if target_l0 > config.num_features:
        raise ValueError(f"{given} is above num_features={config.num_features}; give fewer, for example 32")
    if config.sparsity_lambda == 0:
        raise ValueError(f"{given} is reached by a factor on sparsity_lambda=0; leave sparsity_lambda out")


def check_initial_k(config: CLTConfig, initial_k: int | None) -> None:
    """Refuses a k to anneal from that is below k or above the number of features, or that nothing would use."""
    if initial_k is None:
        return
    if config.activation_fn not in TOPK_FAMILY:
        raise ValueError(
            f"initial_k={initial_k} has no effect with activation_fn={config.activation_fn!r}; leave it out"
        )
    if not config.k <= initial_k <= config.num_features:
        raise ValueError(
            f"initial_k={initial_k} is outside k={config.k} to num_features={config.num_features}; give one between"
        )


def check_reach_growth(config: CLTConfig, share: float, is_new: bool) -> None:
    """Refuses a growing reach that would do nothing, or away with decoders that there are."""
    given = f"reach_growth={share:g}"
    if share > 0 and not is_new:
        raise ValueError(f"{given} begins with decoders that reach one layer, and init_from has more; leave it out")
    if share > 0 and config.decoder_tying != "none":
        raise ValueError(f"{given} does not go with decoder_tying={config.decoder_tying!r}; leave it out")
    if share > 0 and config.reach == 1:
        raise ValueError(f"{given} has no effect with a reach of one layer; leave it out, or raise decoder_reach")
