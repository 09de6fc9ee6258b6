#!/usr/bin/env python
"""
Shows that a CLT larger than memory can be analysed: encode and decode of one prompt, read from cold files.

    python scripts/show_lazy_loading.py make FOLDER     # 21 GB of random weights; delete them afterwards
    python scripts/show_lazy_loading.py read FOLDER

`own memory` is what no file stands behind and must stay; the rest are clean pages of the files, which the kernel drops
where memory is short. For a hard limit on both: `systemd-run --scope -p MemoryMax=4G python ...`.
"""

import argparse
import os
import threading
import time
from pathlib import Path

import torch

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.release import write_release


NUM_LAYERS, D_MODEL, NUM_FEATURES = 26, 2304, 12288  # Gemma 2 2B
NUM_TOKENS = 32
THRESHOLD = 2.65  # of pre-activations with standard deviation 1: about 50 of 12,288 features fire


def forget(folder: Path) -> None:
    """Writes a folder's weight files out and makes the kernel forget them, so that they are read from disk again."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(folder: Path) -> None:
    """Writes a jumprelu CLT of random weights in bfloat16, layer by layer."""
    config = CLTConfig(
        num_layers=NUM_LAYERS, d_model=D_MODEL, num_features=NUM_FEATURES, activation_fn="jumprelu", dtype="bfloat16"
    )

    def layers():
        for layer in range(NUM_LAYERS):
            decoder = torch.randn(NUM_FEATURES // 64, config.num_targets(layer), D_MODEL).bfloat16()
            yield {
                f"W_enc_{layer}": (torch.randn(NUM_FEATURES, D_MODEL) * D_MODEL**-0.5).bfloat16(),
                f"b_enc_{layer}": torch.zeros(NUM_FEATURES, dtype=torch.bfloat16),
                f"b_dec_{layer}": torch.zeros(D_MODEL, dtype=torch.bfloat16),
                f"threshold_{layer}": torch.full((NUM_FEATURES,), THRESHOLD),
                f"W_dec_{layer}": decoder.repeat(64, 1, 1),
            }
            forget(folder)

    write_release(folder, config, layers())


def proc(file: str, field: str) -> int:
    """A number in this process's /proc/self/`file`; memory in kB."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/{file} has no {field}")


def watch_own_memory(peak: list[int], stop: threading.Event) -> None:
    """Raises peak[0] to the most own memory in kB that it sees until `stop`, looking every millisecond."""
    while not stop.wait(0.001):
        peak[0] = max(peak[0], proc("status", "RssAnon"))


def read(folder: Path) -> None:
    """Loads the CLT lazily, encodes and decodes one made prompt, and prints what each step took."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    forget(folder)
    # The tokens of a prompt share features: half of the variance is common to all of them.
    inputs = (torch.randn(1, NUM_LAYERS, D_MODEL) + torch.randn(NUM_TOKENS, NUM_LAYERS, D_MODEL)) * 0.5**0.5
    steps = {}
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=watch_own_memory, args=(peak, stop))
    watcher.start()

    def timed(name, work):
        start, read_before = time.perf_counter(), proc("io", "read_bytes")
        result = work()
        steps[name] = time.perf_counter() - start, (proc("io", "read_bytes") - read_before) / 1e9
        return result

    print(f"own memory before loading: {proc('status', 'RssAnon') / 1e6:.2f} GB")
    with torch.no_grad():
        clt = timed("load", lambda: CrossLayerTranscoder.from_pretrained(folder, lazy=True))
        features = timed("encode", lambda: clt.encode_sparse(inputs))
        timed("decode", lambda: clt.decode(features))
        timed("decode again", lambda: clt.decode(features))
    stop.set()
    watcher.join()
    rows = [layer.indices.unique().numel() for layer in features.layers]
    row_bytes = [decoder.weight[0].nbytes for decoder in clt.decoders]
    touched = sum(n * size for n, size in zip(rows, row_bytes, strict=True))
    print(f"files: {size / 1e9:.2f} GB, decoders {sum(d.weight.nbytes for d in clt.decoders) / 1e9:.2f} GB of them")
    print(f"active: {features.l0_per_layer().mean():.1f} features per layer and token, {NUM_TOKENS} tokens")
    print(f"decoder rows of active features: {sum(rows):,} of {NUM_LAYERS * NUM_FEATURES:,}, {touched / 1e9:.2f} GB")
    for name, (seconds, gigabytes) in steps.items():
        print(f"{name}: {seconds:.2f} s, {gigabytes:.2f} GB read from disk")
    print(f"own memory at its peak: {peak[0] / 1e6:.2f} GB")
    print(f"resident at its peak, clean pages of the files included: {proc('status', 'VmHWM') / 1e6:.2f} GB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "read"])
    parser.add_argument("folder", type=Path, help="where the made CLT is, on a disk and not in memory")
    arguments = parser.parse_args(argv)
    {"make": make, "read": read}[arguments.command](arguments.folder)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
