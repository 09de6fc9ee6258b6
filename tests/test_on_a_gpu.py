"""
The way of a CLT on a GPU, beside the same way on the CPU: trained, stopped and resumed, released, loaded, evaluated,
and given to each command. Skipped without a GPU; `tests/kernels` compares the kernels themselves.
"""

import copy
import json
import shlex
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks.cases import Case
from benchmarks.measure import make_batches
from benchmarks.update import Update
from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.attribution import TokenTarget, attribute
from hf_clt.commands import main
from hf_clt.device import to_device
from hf_clt.evaluation.prompt import prompt_features
from hf_clt.evaluation.replacement import ReplacementModel
from hf_clt.harvest.harvester import Harvester, load_language_model
from tests.training.test_trainer import make_trainer, recorded, released, rows_of


DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EXACT = {"mixed_precision": "no", "model_dtype": "float32", "clt_dtype": "float32", "buffer_dtype": "float32"}
ACTIVATIONS = ["relu", "jumprelu", "topk", "batchtopk"]


@pytest.fixture(scope="module")
def on_a_gpu(tiny_gpt2, text_file, tmp_path_factory):
    """The CLT of a run with the defaults of a GPU, by the command."""
    folder = tmp_path_factory.mktemp("on-a-gpu") / "clt"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    words = ["train", "--model", tiny_gpt2, "--dataset", text_file, "--output-dir", str(folder), "--device", DEVICE]
    words += shlex.split("--num-features 96 --activation-fn batchtopk --k 6 --context-size 32 --batch-size 64")
    words += shlex.split("--training-steps 30 --eval-tokens 500 --log-interval 10 --checkpoint-interval 20")
    assert main([*words, "--eval-replacement", "--dead-feature-window", "5"]) == 0
    return folder


@pytest.mark.parametrize("activation_fn", ACTIVATIONS)
def test_a_run_learns_as_on_the_cpu(tiny_gpt2, text_file, tmp_path, activation_fn):
    """In float32, from the same weights: rounding alone differs, which Adam's first steps enlarge."""
    torch.manual_seed(0)
    config = CLTConfig(num_layers=2, d_model=64, num_features=96, activation_fn=activation_fn, k=6)
    start = CrossLayerTranscoder(config)
    rows = []
    for device in ("cpu", DEVICE):
        arguments = EXACT | {"device": device, "training_steps": 6, "dead_feature_window": 3}
        folder = tmp_path / f"run-{len(rows)}"
        make_trainer(tiny_gpt2, text_file, folder, copy.deepcopy(start), arguments).train()
        rows.append(rows_of(folder))
    for cpu, gpu in zip(*rows, strict=True):
        for name in ("loss", "nmse", "l0"):
            if name in cpu:
                assert gpu[name] == pytest.approx(cpu[name], rel=5e-3), (cpu["split"], cpu["step"], name)


@pytest.mark.parametrize("dtype, optimizer", [("float32", "adam"), ("bfloat16", "adam_compact")])
@pytest.mark.parametrize("dead", [0.0, 0.1])
@pytest.mark.parametrize("activation_fn", ["topk", "batchtopk"])
def test_an_update_waits_for_nothing(activation_fn, dead, dtype, optimizer):
    """Nor does a wait hide in the first updates alone: those compile, and make the optimizer's state."""
    shape = {"num_layers": 3, "d_model": 64, "num_features": 4096, "tokens": 256, "l0": 8}
    form = {"dtype": dtype, "optimizer": optimizer, "autocast": "bfloat16"}
    case = Case(**shape, **form, activation_fn=activation_fn, dead=dead, device=DEVICE)
    update, data = Update(case), make_batches(case, None)
    losses = [update(*next(data)) for _ in range(2)]
    batch = next(data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses.append(update(*batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("activation_fn", ["jumprelu", "batchtopk"])
@pytest.mark.parametrize("exact", [True, False])
def test_stopped_and_resumed_is_bit_for_bit_the_same(tiny_gpt2, text_file, tmp_path, activation_fn, exact):
    arguments = {"device": DEVICE, "training_steps": 8, "dead_feature_window": 3, **(EXACT if exact else {})}

    def make(**more):
        return make_trainer(tiny_gpt2, text_file, tmp_path / "run", {"activation_fn": activation_fn}, arguments | more)

    make().train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    stopped = make()
    recorded(stopped, stop_at=5)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        stopped.train()
    make(resume_from_checkpoint="latest").train()
    for name, value in released(tmp_path / "straight").items():
        assert torch.equal(released(tmp_path / "run")[name], value), name


@pytest.mark.parametrize("buffer_device", [None, "cpu"])
def test_a_batch_does_not_wait_for_the_gpu(tiny_gpt2, text_file, tmp_path, buffer_device):
    arguments = {"device": DEVICE, "buffer_device": buffer_device, "batch_size": 16}
    trainer = make_trainer(tiny_gpt2, text_file, tmp_path / "run", None, arguments)
    batches = trainer.buffer.endless()
    next(batches)
    ready = trainer.buffer.num_ready
    assert trainer.tokens.read_ahead > 0 and ready > 3
    try:
        torch.cuda.set_sync_debug_mode("error")
        device = torch.device(DEVICE)
        found = [{n: to_device(rows, device) for n, rows in next(batches).items()} for _ in range(ready)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.tokens.close()
    assert all(batch["labels"].isfinite().all() for batch in found)


def test_it_loads_straight_onto_the_gpu(on_a_gpu):
    whole = CrossLayerTranscoder.from_pretrained(on_a_gpu)
    inputs = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0))
    expected = whole(inputs).reconstruction
    for arguments in ({"device_map": DEVICE}, {"device_map": {"": torch.device(DEVICE, 0)}}, {"device_map": "auto"}):
        clt = CrossLayerTranscoder.from_pretrained(on_a_gpu, **arguments)
        assert {value.device.type for value in clt.state_dict().values()} == {DEVICE}
        for name, value in whole.state_dict().items():
            assert torch.equal(clt.state_dict()[name].cpu(), value), name
        found = clt(inputs.to(DEVICE)).reconstruction
        assert torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_its_metrics_are_those_of_the_cpu(on_a_gpu, tiny_gpt2, text_file, tmp_path):
    """In float32. Both choose the same features but for ties within rounding."""
    found = {}
    for device in ("cpu", DEVICE):
        words = ["evaluate", str(on_a_gpu), "--model", tiny_gpt2, "--dataset", text_file, "--device", device]
        words += shlex.split("--model-dtype float32 --context-size 32 --eval-tokens 500 --replacement")
        assert main([*words, "--json", str(tmp_path / f"{device}.json")]) == 0
        found[device] = json.loads((tmp_path / f"{device}.json").read_text())
    for name in ("nmse", "explained_variance", "l0", "ce_original", "ce_replaced", "kl"):
        assert found[DEVICE][name] == pytest.approx(found["cpu"][name], rel=1e-3, abs=1e-4), name


def test_each_command_takes_it(on_a_gpu, tiny_gpt2, text_file, tmp_path):
    text = ["--model", tiny_gpt2, "--dataset", text_file, "--context-size", "32", "--device", DEVICE]
    assert main(["features", str(on_a_gpu), *text, "--eval-tokens", "500", "--output", str(tmp_path / "pages")]) == 0
    assert main(["jumprelu", str(on_a_gpu), str(tmp_path / "jumprelu"), *text, "--eval-tokens", "500"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["cache", str(tmp_path / "cache"), *text, "--max-tokens", "3000", "--eval-tokens", "500"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["train", "--activation-cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "cached")]
    words += shlex.split("--num-features 96 --activation-fn jumprelu --batch-size 64 --training-steps 5 --device")
    assert main([*words, DEVICE]) == 0
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "jumprelu").config.activation_fn == "jumprelu"


def test_a_prompt_and_the_replaced_model(on_a_gpu, tiny_gpt2):
    found = {}
    for device in ("cpu", DEVICE):
        clt = CrossLayerTranscoder.from_pretrained(on_a_gpu).to(device)
        model, tokenizer = load_language_model(tiny_gpt2, dtype="float32", device=torch.device(device))
        ids = tokenizer("The return statement ends a function", return_tensors="pt").input_ids.to(device)
        harvester = Harvester(model, clt.config.feature_input_hook, clt.config.feature_output_hook)
        features = prompt_features(clt, harvester, ids)
        found[device] = features, ReplacementModel(model, clt)(ids).logits
    (cpu, cpu_logits), (gpu, gpu_logits) = found["cpu"], found[DEVICE]
    assert torch.allclose(gpu_logits.cpu(), cpu_logits, rtol=1e-3, atol=1e-3)
    assert [layer.indices.tolist() for layer in gpu.layers] == [layer.indices.tolist() for layer in cpu.layers]


def test_a_graph_is_that_of_the_cpu_and_agrees_with_the_model(on_a_gpu, tiny_gpt2):
    found = []
    for device in ("cpu", DEVICE):
        clt = CrossLayerTranscoder.from_pretrained(on_a_gpu).to(device)
        model, tokenizer = load_language_model(tiny_gpt2, dtype="float32", device=torch.device(device))
        ids = tokenizer("The return statement ends a function", return_tensors="pt").input_ids
        graph = attribute(model, clt, ids, targets=[5, TokenTarget(7, minus=9)])
        assert graph.verify(model, clt, 5)["frozen_error"] < 1e-3
        some = attribute(model, clt, ids, targets=[5], max_feature_nodes=20, rank_every=6)
        found.append((graph, some))
    for cpu, gpu in zip(*found, strict=True):
        assert torch.equal(gpu.features, cpu.features)
        assert torch.allclose(gpu.edges, cpu.edges, rtol=0, atol=1e-4 * cpu.edges.abs().max().item())
