"""`from_pretrained(lazy=True)`: weights that stay in their files, of which only what is touched is read."""

import ctypes
import importlib.util
import mmap
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt import release as files
from tests.reference import random_batch
from tests.test_release import ALL_VARIANTS, VARIANTS, circuit_tracer_files_alone, trained


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="lazy=True is for Linux")

LARGE = {"num_layers": 2, "d_model": 256, "num_features": 12_000}  # 61 MB in float32, W_dec_0 25 MB of it
ROWS = list(range(6_100, 12_000, 300))  # 20 features, far from each other and from the header


def load(folder, **kwargs):
    return CrossLayerTranscoder.from_pretrained(folder, lazy=True, **kwargs)


@pytest.fixture
def saved(tmp_path):
    """Saves a small trained CLT, in bfloat16 on demand; returns its folder."""

    def save(dtype=torch.float32, **fields):
        trained(**fields).to(dtype).save_pretrained(tmp_path / "clt")
        return tmp_path / "clt"

    return save


@pytest.fixture
def large(tmp_path):
    """Folder of a CLT whose decoder rows are small parts of large files."""
    CrossLayerTranscoder(CLTConfig(activation_fn="jumprelu", **LARGE)).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def active(rows):
    """Activations of one token with some features of layer 0."""
    acts = torch.zeros(1, LARGE["num_layers"], LARGE["num_features"])
    acts[0, 0, rows] = 1.0
    return acts


def mapped_bytes(path):
    """How much of a mapped file this process has touched: all of it, and what it has copied by writing."""
    touched = copied = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # a new mapping: addresses, permissions, offset, device, inode, path
            inside = line.endswith(str(path))
        elif inside and name == "Rss:":
            touched += 1024 * int(rest[0])
        elif inside and name == "Anonymous:":
            copied += 1024 * int(rest[0])
    return touched, copied


def cached_bytes(path):
    """How much of a file the kernel has read from disk and kept."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapping))
        assert ctypes.CDLL(None).mincore(address, length, pages) == 0
        del start  # or the mapping cannot be closed
        return mmap.PAGESIZE * sum(page & 1 for page in pages)


def own_memory():
    """Memory of this process that no file stands behind, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


# -- the same numbers -------------------------------------------------------------------------------------------------


def assert_equal_outputs(lazy, loaded):
    assert lazy.dtype == loaded.dtype and lazy.config.to_dict() == loaded.config.to_dict()
    gradients = []
    for clt in (lazy, loaded):
        inputs = random_batch(loaded, seed=3)[0].requires_grad_()
        out = clt(inputs)
        out.reconstruction.sum().backward()
        gradients.append(inputs.grad)
    inputs, labels = random_batch(loaded, seed=3)
    ours, expected = lazy(inputs, labels=labels), loaded(inputs, labels=labels)
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].any()
    assert torch.equal(ours.reconstruction, expected.reconstruction) and torch.equal(ours.loss, expected.loss)
    assert torch.equal(lazy.encode(inputs), loaded.encode(inputs))
    sparse = loaded.encode_sparse(inputs)
    assert torch.equal(lazy.decode(sparse, inputs), loaded.decode(sparse, inputs))
    assert torch.equal(lazy.decode(sparse.to_dense(), inputs), loaded.decode(sparse, inputs))


@ALL_VARIANTS
def test_a_lazy_clt_computes_what_a_loaded_one_does(saved, variant):
    folder = saved(**VARIANTS[variant])
    assert_equal_outputs(load(folder), CrossLayerTranscoder.from_pretrained(folder))


def test_in_bfloat16_whatever_dtype_the_configuration_names(saved):
    folder = saved(torch.bfloat16)
    loaded = CrossLayerTranscoder.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert_equal_outputs(load(folder), loaded)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float32"'))
    assert CrossLayerTranscoder.from_pretrained(folder).dtype == torch.float32
    assert load(folder).dtype == torch.bfloat16


def test_files_of_circuit_tracer_alone(saved):
    folder = circuit_tracer_files_alone(saved(torch.bfloat16, activation_fn="jumprelu", skip_connection=True))
    assert_equal_outputs(load(folder), CrossLayerTranscoder.from_pretrained(folder))


def test_through_auto_model(saved):
    folder = saved()
    lazy = AutoModel.from_pretrained(folder, lazy=True)
    assert lazy.lazy
    assert_equal_outputs(lazy, CrossLayerTranscoder.from_pretrained(folder))


def test_loading_info_and_a_dtype_that_is_the_files(saved):
    lazy, info = load(saved(torch.bfloat16), dtype=torch.bfloat16, output_loading_info=True)
    assert lazy.lazy and lazy.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]


def test_saved_over_its_own_files(saved):
    folder = saved()
    lazy, loaded = load(folder), CrossLayerTranscoder.from_pretrained(folder)
    lazy.save_pretrained(folder)
    assert_equal_outputs(lazy, loaded)
    assert_equal_outputs(load(folder), loaded)


def settled_bytes(path):
    """`cached_bytes` once nothing more is being read: the same for a tenth of a second."""
    last = None
    while (now := cached_bytes(path)) != last:
        last = now
        time.sleep(0.1)
    return now


# -- what is read -----------------------------------------------------------------------------------------------------


def test_decode_touches_the_rows_of_active_features_alone(large):
    lazy = load(large)
    path = large / "W_dec_0.safetensors"
    size = path.stat().st_size
    lazy.decode(active(ROWS[::10]))
    touched, _ = mapped_bytes(path)
    assert 0 < touched < size / 2  # two rows, the header, and what the kernel maps around them: up to 2 MiB each
    lazy.decode(torch.ones(1, LARGE["num_layers"], LARGE["num_features"]))
    touched, copied = mapped_bytes(path)
    assert touched > 0.9 * size and copied == 0


@pytest.mark.parametrize(
    ("num_features", "d_model", "rows"), [(12_000, 256, ROWS), (150, 20_000, [80, 100, 120, 149])], ids=["2k", "160k"]
)
def test_only_rows_of_active_features_are_read_from_disk(tmp_path, num_features, d_model, rows):
    config = CLTConfig(num_layers=2, d_model=d_model, num_features=num_features)
    CrossLayerTranscoder(config).save_pretrained(tmp_path)
    path = tmp_path / "W_dec_0.safetensors"
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path):
        pytest.skip("this file system keeps its files in memory")
    lazy = load(tmp_path)
    before = settled_bytes(path)  # what the kernel reads ahead while loading comes later on a busy machine
    acts = torch.zeros(50, 2, num_features)
    acts[0, 0, rows[1:]] = 1.0
    acts[1, 0, rows[:2]] = 1.0
    lazy.decode(acts)
    row_bytes = lazy.decoders[0].weight[0].nbytes
    assert len(rows) * row_bytes <= settled_bytes(path) - before <= len(rows) * (row_bytes + 2 * mmap.PAGESIZE)


def test_loading_encoding_and_decoding_take_no_memory_for_the_weights(large):
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    inputs = torch.randn(2, LARGE["num_layers"], LARGE["d_model"])
    before = own_memory()
    lazy = load(large)
    lazy.decode(lazy.encode_sparse(inputs))
    assert own_memory() - before < size / 4
    for path in large.glob("*.safetensors"):
        touched, copied = mapped_bytes(path)
        assert touched > 0 and copied == 0


def test_read_ahead_takes_rows_in_any_order_and_leaves_the_values(large):
    weight = load(large).decoders[1].weight
    expected = load_file(large / "W_dec_1.safetensors")["W_dec_1"]
    files.read_ahead(weight, torch.tensor([11_999, 0, 5, 5, 0]))
    files.read_ahead(weight, torch.tensor([], dtype=torch.int64))
    assert torch.equal(weight, expected)


def test_the_demonstration_on_a_small_clt(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "scripts" / "show_lazy_loading.py"
    spec = importlib.util.spec_from_file_location("show_lazy_loading", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, value in {"NUM_LAYERS": 3, "D_MODEL": 64, "NUM_FEATURES": 6400, "NUM_TOKENS": 4}.items():
        monkeypatch.setattr(script, name, value)
    torch.manual_seed(0)
    script.main(["make", str(tmp_path / "made")])
    script.main(["read", str(tmp_path / "made")])
    printed = capsys.readouterr().out
    # A share 0.4 % of 6400 features fires on each of 4 tokens, some of them on several.
    (active,) = re.findall(r"active: ([\d.]+) features per layer and token, 4 tokens", printed)
    (rows,) = re.findall(r"decoder rows of active features: ([\d,]+) of 19,200", printed)
    assert 15 < float(active) < 40
    assert 3 * float(active) < int(rows.replace(",", "")) <= 12.1 * float(active)
    assert re.search(r"own memory at its peak: [\d.]+ GB", printed)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_dtype_is_refused(saved):
    folder = saved(torch.bfloat16)
    for wanted in (torch.float32, "float32"):
        with pytest.raises(ValueError, match=r"dtype=.*float32.*lazy=True.*bfloat16.*leave out dtype"):
            load(folder, dtype=wanted)


@pytest.mark.parametrize("argument", ["device_map", "quantization_config", "distributed_config"])
def test_what_would_move_or_change_the_weights_is_refused(saved, argument):
    with pytest.raises(ValueError, match=rf"{argument} .*lazy=True"):
        load(saved(), **{argument: "auto"})


def test_files_of_several_dtypes_stay_as_they_are(saved):
    folder = saved()
    path = folder / "W_dec_1.safetensors"
    save_file({"W_dec_1": load_file(path)["W_dec_1"].bfloat16()}, path)
    lazy = load(folder)
    assert [decoder.weight.dtype for decoder in lazy.decoders][:2] == [torch.float32, torch.bfloat16]
    inputs, _ = random_batch(lazy, seed=3)
    expected = CrossLayerTranscoder.from_pretrained(folder)(inputs).reconstruction
    torch.testing.assert_close(lazy(inputs).reconstruction, expected, rtol=0.02, atol=0.02)


def test_weights_in_memory_of_their_own_are_told_from_mapped_ones(saved):
    lazy = load(saved())
    files.check_mapped({"encoders.0.weight": lazy.encoders[0].weight})
    with pytest.raises(RuntimeError, match=r"decoders\.2\.weight .*lazy=True"):
        files.check_mapped({"e": lazy.encoders[0].weight, "decoders.2.weight": lazy.decoders[2].weight.clone()})


def test_training_is_refused(saved):
    lazy = load(saved())
    assert not lazy.training and not any(parameter.requires_grad for parameter in lazy.parameters())
    with pytest.raises(ValueError, match=r"lazy=True.*without lazy"):
        lazy.train()
    lazy.eval()
    with pytest.raises(ValueError, match=r"lazy=True.*without lazy"):
        CLTTrainer(CLTTrainingArguments(output_dir="unused"), model=lazy)
    ones = torch.ones(lazy.config.num_layers, lazy.config.d_model)
    with pytest.raises(ValueError, match=r"lazy=True.*without lazy"):
        lazy.set_normalization(ones, ones, ones, ones)


def test_incomplete_files_are_refused_at_load(saved):
    folder = saved()
    path = folder / "W_dec_1.safetensors"
    shutil.copy(path, folder / "whole")
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"W_dec_1\.safetensors.*truncated"):
        load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"W_dec_1\.safetensors is missing"):
        load(folder)


def test_a_tie_that_does_not_hold_is_refused(saved):
    folder = saved(decoder_tying="per_target")
    weight = load_file(folder / "W_dec_0.safetensors")["W_dec_0"]
    weight[3, 2, 1] += 1e-3
    save_file({"W_dec_0": weight}, folder / "W_dec_0.safetensors")
    with pytest.raises(ValueError, match=r"decoder_tying.*W_dec_0"):
        load(folder)
