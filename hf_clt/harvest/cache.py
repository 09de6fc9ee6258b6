"""
Activations on disk: harvested once, trained on many times.

A cache is a folder. A shard is a safetensors file of whole extraction batches of a [`TokenStream`], each with its
tokens and with the activations of those that count, so that the batches can be read in any order. While a cache is
written, `rank-<r>.json` has the shards of process r and its place in the text; `manifest.json` is written last, so a
folder that has one is complete.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..device import Stopwatch
from ..files import read_json, replacing, write_json
from .harvester import ActivationError, Harvester
from .normalization import warn_if_lost
from .tokens import TokenStream


MANIFEST = "manifest.json"
FORMAT = "hf_clt activation cache 1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SPLITS = ("heldout", "train")
TOKENS = ("input_ids", "attention_mask", "counted", "documents")
SHARD_BYTES = 500 * 10**6  # of activations that are held in memory until their shard is written


# -- numbers on disk --------------------------------------------------------------------------------------------------


def to_stored(values: Tensor, name: str, dtype: str) -> dict[str, Tensor]:
    """
    Activations (N, L, D) as they are stored. In int8 each dimension of each layer has 255 levels between its smallest
    and its largest value in the extraction batch: one with outliers does not cost the others precision.
    """
    if dtype != "int8":
        return {name: values.to(DTYPES[dtype])}
    values = values.float()
    low, high = (values.amin(dim=0), values.amax(dim=0)) if len(values) else (values.sum(dim=0), values.sum(dim=0))
    middle, step = (low + high) / 2, (high - low) / 254
    levels = torch.where(step > 0, (values - middle) / step, 0).round().clamp(-127, 127)
    return {name: levels.to(torch.int8), f"{name}.middle": middle, f"{name}.step": step}


def from_stored(stored: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The activations that [`to_stored`] stored, in `dtype`."""
    values = stored[name]
    if values.dtype != torch.int8:
        return values.to(dtype)
    return (values.float() * stored[f"{name}.step"] + stored[f"{name}.middle"]).to(dtype)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_cache(
    folder: str | Path,
    harvester: Harvester,
    streams: dict[str, TokenStream],
    described: dict,
    *,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> dict:
    """
    Harvests text into a cache. A cache that was begun with the same settings is continued after its last shard.

    Args:
        folder: Where to; made if missing.
        harvester: Runs the language model.
        streams: The [`TokenStream`] of each split, `train` and perhaps `heldout`, of this process.
        described: What the activations depend on besides the harvester, JSON-able: the language model and the text.
        dtype: `"bfloat16"`, `"float32"`, or `"int8"` with a scale for each dimension.
        max_tokens: Counted training tokens to harvest, over all processes; at least, since batches are whole. None:
            all of the text.
        shard_bytes: Least size of a shard, but for the last.
        rank, world_size: This process, and how many write a share of the text each.
        wait: Waits for all processes.
        progress: Whether to show a progress bar.

    Returns:
        The manifest.

    Raises:
        ValueError: If the folder holds something else, or a cache with other settings.
        [`ActivationError`]: If an activation is not finite.
    """
    folder = Path(folder).expanduser()
    settings = {
        "format": FORMAT,
        "num_layers": harvester.num_layers,
        "d_model": harvester.d_model,
        "feature_input_hook": harvester.input_hook,
        "feature_output_hook": harvester.output_hook,
        "dtype": dtype,
        "store_batch_size_prompts": streams["train"].prompts_per_batch,
        "context_size": streams["train"].context_size,
        "prepend_bos": streams["train"].prepend_bos,
        "num_processes": world_size,
        "max_tokens": max_tokens,
        **described,
    }
    settings = json.loads(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    own = _read_started(folder, rank, settings)
    for split in SPLITS:
        state = own["splits"].setdefault(split, {"shards": [], "text": None, "done": False})
        limit = -(-max_tokens // world_size) if split == "train" and max_tokens is not None else None
        if split in streams and not state["done"]:
            _write_split(folder, rank, own, split, harvester, streams[split], limit, shard_bytes, progress)
    wait()
    if rank == 0:
        _write_manifest(folder, settings, world_size)
    wait()
    return read_json(folder / MANIFEST)


def _read_started(folder: Path, rank: int, settings: dict) -> dict:
    """What this process has written so far."""
    own_path = folder / f"rank-{rank}.json"
    if own_path.exists():
        own = read_json(own_path)
        for name in sorted(set(settings) | set(own["settings"])):
            now, before = settings.get(name), own["settings"].get(name)
            if now != before:
                raise ValueError(
                    f"{name}={now!r}, but the cache in {str(folder)!r} was begun with {name}={before!r}; give another "
                    "folder, or the same settings to continue it"
                )
        return own
    others = [path.name for path in folder.iterdir() if not path.name.startswith(("rank-", ".", "heldout-", "train-"))]
    if others:
        raise ValueError(f"{str(folder)!r} is not empty ({others[0]}) and holds no cache; give another folder")
    return {"settings": settings, "splits": {}}


def _write_split(folder, rank, own, split, harvester, stream, limit, shard_bytes, progress) -> None:
    """Harvests a split from where its last shard ended; `own` is updated and written with each shard."""
    state, dtype = own["splits"][split], own["settings"]["dtype"]
    if state["text"] is not None:
        stream.load_state_dict(state["text"])
    written = sum(shard["tokens"] for shard in state["shards"])
    batches, size = [], 0  # of the next shard

    def write_shard():
        if batches:
            path = folder / f"{split}-{rank}-{len(state['shards']):05d}.safetensors"
            with replacing(path) as temporary:
                save_file(
                    {f"{n}.{name}": x for n, batch in enumerate(batches) for name, x in batch.items()}, temporary
                )
                digest, num_bytes = sha256(temporary), temporary.stat().st_size
            tokens = sum(len(batch["inputs"]) for batch in batches)
            shard = {"file": path.name, "batches": len(batches), "tokens": tokens, "bytes": num_bytes}
            state["shards"].append({**shard, "sha256": digest})
        state["text"] = stream.state_dict()
        write_json(folder / f"rank-{rank}.json", own)

    title = f"Caching {'held-out text' if split == 'heldout' else 'text'}"
    total = stream.heldout_tokens if split == "heldout" else limit
    with tqdm(total=total, initial=written, desc=title, unit="token", unit_scale=True, disable=not progress) as bar:
        for batch in stream:
            inputs, labels = harvester.harvest(batch)
            if written == 0 and len(inputs) > 1 and dtype == "bfloat16" and harvester.dtype != torch.bfloat16:
                for rows in (inputs, labels):
                    warn_if_lost(rows.mean(dim=0), rows.std(dim=0), torch.bfloat16, "--dtype")
            stored = {**to_stored(inputs.cpu(), "inputs", dtype), **to_stored(labels.cpu(), "labels", dtype)}
            stored = {name: x.contiguous() for name, x in (stored | {name: batch[name] for name in TOKENS}).items()}
            batches.append(stored)
            size += sum(tensor.nbytes for tensor in stored.values())
            written += len(inputs)
            bar.update(len(inputs))
            if limit is not None and written >= limit:
                break
            if size >= shard_bytes:
                write_shard()
                batches, size = [], 0
    state["done"] = True
    write_shard()


def _write_manifest(folder: Path, settings: dict, world_size: int) -> None:
    """Joins what the processes wrote."""
    ranks = [read_json(folder / f"rank-{rank}.json") for rank in range(world_size)]
    splits = {}
    for split in SPLITS:
        shards = [rank["splits"][split]["shards"] for rank in ranks]
        splits[split] = {"tokens": sum(shard["tokens"] for own in shards for shard in own), "shards": shards}
    if splits["train"]["tokens"] == 0:
        raise ValueError("dataset: no token counts for training; give more text or allow special tokens")
    write_json(folder / MANIFEST, {**settings, "splits": splits})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict:
    """
    What is in a cache: the settings of [`write_cache`], and in `splits` the number of tokens and the shards of each
    process.

    Raises:
        ValueError: If the folder holds no complete cache, or one of another version.
    """
    path = Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"activation_cache={str(folder)!r} holds no complete activation cache; write one with `hf-clt cache`, or "
            "run the command that began it again"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"activation_cache={str(folder)!r} has the format {manifest.get('format')!r}, and this version reads "
            f"{FORMAT!r}; write it again"
        )
    return manifest


class ActivationCache:
    """
    A cache, in the place of a [`Harvester`]: what the language model gave on an extraction batch of a
    [`CachedTokens`].

    Args:
        folder: The folder of a complete cache.

    Attributes:
        manifest (`dict`): What is cached; see [`read_manifest`].
        num_layers, d_model (`int`), input_hook, output_hook (`str`): As of the harvester that wrote it.
        dtype (`torch.dtype`): In which all stored activations can be told apart.
        batches (`dict`): For each split, where its extraction batches are: the file and the number in it, in the order
            in which as many processes as wrote them read them.
        stopwatch ([`Stopwatch`]): As a harvester's; reading from a disk is not counted.

    Raises:
        ValueError: If there is no complete cache in the folder, or a shard of it is missing or has another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(folder)
        self.num_layers, self.d_model = self.manifest["num_layers"], self.manifest["d_model"]
        self.input_hook, self.output_hook = (self.manifest[f"feature_{side}_hook"] for side in ("input", "output"))
        self.device = torch.device("cpu")
        self.dtype = torch.bfloat16 if self.manifest["dtype"] == "bfloat16" else torch.float32
        self.stopwatch = Stopwatch(self.device)
        for shard in self._shards():
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise ValueError(
                    f"activation_cache: {path} has {size} bytes, and the manifest says {shard['bytes']}; copy the "
                    "cache again, or write it again"
                )
        self.batches = {split: self._batches(split) for split in SPLITS}

    def _shards(self) -> list[dict]:
        return [shard for split in SPLITS for own in self.manifest["splits"][split]["shards"] for shard in own]

    def _batches(self, split: str) -> list[tuple[str, int]]:
        by_writer = [
            [(shard["file"], number) for shard in shards for number in range(shard["batches"])]
            for shards in self.manifest["splits"][split]["shards"]
        ]
        return [batch for turn in zip_longest(*by_writer) for batch in turn if batch is not None]

    def fingerprint(self) -> str:
        """What tells the cache from another: the manifest, which has the checksums of all shards."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def has_fingerprint(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint()

    def tokens(self, split: str, number: int) -> dict[str, Tensor]:
        """The tokens of a batch, as a [`TokenStream`] gives them, and `cached`, which says where it is."""
        tokens = self._stored(split, number, TOKENS)
        return {**tokens, "cached": torch.tensor([SPLITS.index(split), number])}

    def read(self, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """As [`Harvester.read`]."""
        split, number = batch["cached"].tolist()
        names = ("inputs", "labels", "counted")
        if self.manifest["dtype"] == "int8":
            names += ("inputs.middle", "inputs.step", "labels.middle", "labels.step")
        stored = self._stored(SPLITS[split], number, names)
        inputs, labels = (from_stored(stored, name, dtype) for name in ("inputs", "labels"))
        counted = batch["counted"][stored["counted"]]  # fewer than are stored, where some were trained on before
        if not counted.all():
            inputs, labels = inputs[counted], labels[counted]
        return inputs, labels, inputs.sum(dtype=torch.float32) + labels.sum(dtype=torch.float32)

    def check(self, batch: dict[str, Tensor], inputs: Tensor, labels: Tensor, total: Tensor) -> None:
        """As [`Harvester.check`]; what was written is finite, unless the files were changed since."""
        if not torch.isfinite(total) and not (inputs.isfinite().all() and labels.isfinite().all()):
            split, number = batch["cached"].tolist()
            file, _ = self.batches[SPLITS[split]][number]
            raise ActivationError(f"activations in {self.folder / file} are not finite; write the cache again")

    def harvest(
        self, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32, skip_bad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As [`Harvester.harvest`]; there is nothing to skip, since only finite activations are written."""
        inputs, labels, total = self.read(batch, dtype)
        self.check(batch, inputs, labels, total)
        return inputs, labels

    def _stored(self, split: str, number: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        file, place = self.batches[split][number]
        path = self.folder / file
        try:
            with safe_open(path, "pt") as tensors:
                return {name: tensors.get_tensor(f"{place}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}); write the cache again") from error

    def verify(self, progress: bool = False) -> None:
        """
        Reads all shards and compares their checksums with the manifest.

        Raises:
            ValueError: For the first shard that differs.
        """
        for shard in tqdm(self._shards(), desc="Verifying", unit="shard", disable=not progress):
            path = self.folder / shard["file"]
            if sha256(path) != shard["sha256"]:
                raise ValueError(f"{path} has changed since it was written; copy the cache again, or write it again")


class CachedTokens:
    """
    The extraction batches of a split of an [`ActivationCache`], in the place of a [`TokenStream`].

    Args:
        cache: The cache.
        split: `"train"` or `"heldout"`.
        rank, world_size: This process, and how many share the batches.
        seed: Of the order of the batches, a new one in each epoch, over all shards. None: as they were harvested, so
            that a run is the one that the language model would have given.

    Raises:
        ValueError: If there are fewer batches than processes to train on.
    """

    is_reading = False  # as of a TokenStream: never for long

    def __init__(
        self, cache: ActivationCache, split: str, rank: int = 0, world_size: int = 1, seed: int | None = None
    ):
        manifest = cache.manifest
        self.cache, self.split, self.rank, self.world_size, self.seed = cache, split, rank, world_size, seed
        self.prompts_per_batch, self.context_size = manifest["store_batch_size_prompts"], manifest["context_size"]
        self.prepend_bos = manifest["prepend_bos"]
        self.num_batches = len(cache.batches[split])
        if split == "train" and self.num_batches < world_size:
            raise ValueError(
                f"the activation cache has {self.num_batches} extraction batches for {world_size} processes; cache "
                "more text, or run fewer processes"
            )
        self.epoch = self.position = 0

    def _order(self) -> list[int]:
        """Numbers of this epoch's batches."""
        order = np.arange(self.num_batches)
        if self.seed is not None:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        return order[self.rank :: self.world_size].tolist()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self._order()
        while self.position < len(order):
            batch = self.cache.tokens(self.split, order[self.position])
            self.position += 1  # only now: what cannot be read is not passed over
            yield batch
        self.rewind()
        self.epoch += 1

    def rewind(self) -> None:
        """Goes back to the start of the epoch."""
        self.position = 0

    def close(self) -> None:
        """Nothing is read ahead."""

    def state_dict(self) -> dict:
        """Where the stream stands, ready for `json.dump`."""
        names = ("split", "rank", "world_size", "seed", "num_batches")
        settings = {name: getattr(self, name) for name in names}
        return {"settings": settings, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Goes to where another stream on the same cache stood; raises ValueError for other settings."""
        now = self.state_dict()["settings"]
        if state.get("settings") != now:
            raise ValueError(
                f"the saved position {state.get('settings')} does not fit this cache, {now}; resume with the cache "
                "and the settings of the run"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def continue_after(self, states: list[dict]) -> None:
        """Continues after the batches that all of another number of processes had read, from their `state_dict`s."""
        for state in states:
            own = {**state.get("settings", {}), "rank": self.rank, "world_size": self.world_size}
            self.load_state_dict({**state, "settings": own})
        read = min(s["position"] * s["settings"]["world_size"] + s["settings"]["rank"] for s in states)
        self.position = max(0, -(-(read - self.rank) // self.world_size))
