"""The metrics as `evaluate` modules, loaded by path and fed with sums."""

import importlib
from pathlib import Path

import evaluate
import pytest
import torch

from hf_clt.evaluation import MetricSums
from hf_clt.evaluation.modules import NAMES, module_path, needed


FROM_SUMS = ("nmse", "explained_variance", "l0", "dead_fraction", "feature_density")


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(module_path(name), cache_dir=str(tmp_path))


def sums_of(labels, reconstruction, acts):
    sums = MetricSums(labels.shape[1], labels.shape[2], acts.shape[2])
    sums.update(labels, reconstruction, acts)
    return sums


def test_nmse_of_the_hand_computed_case(load):
    labels = torch.tensor([[[0.0, 0.0]], [[2.0, 4.0]]])
    reconstruction = torch.tensor([[[1.0, 1.0]], [[1.0, 3.0]]])
    tensors = sums_of(labels, reconstruction, torch.zeros(2, 1, 1)).tensors()
    nmse, explained = load("nmse"), load("explained_variance")
    nmse.add(**needed(nmse, tensors))
    assert nmse.compute() == {"nmse": 0.4, "nmse_per_layer": [0.4]}  # 4 / (2 · (1 + 4))
    explained.add(**needed(explained, tensors))
    assert explained.compute() == {"explained_variance": 0.6, "explained_variance_per_layer": [0.6]}
    # The same numbers by hand, as a person would type them; and token by token, whose means differ.
    by_hand = {"count": 2, "mean": [[1.0, 2.0]], "squared_deviation": [[2.0, 8.0]], "squared_error": [4.0]}
    assert nmse.compute(**{name: [value] for name, value in by_hand.items()})["nmse"] == 0.4
    for token in range(2):
        part = slice(token, token + 1)
        nmse.add(**needed(nmse, sums_of(labels[part], reconstruction[part], torch.zeros(1, 1, 1)).tensors()))
    assert nmse.compute()["nmse"] == pytest.approx(0.4, abs=1e-15)


@pytest.mark.parametrize("name", FROM_SUMS)
def test_equal_to_metric_sums_over_unequal_batches(load, name):
    generator = torch.Generator().manual_seed(0)
    labels = 1e3 + torch.randn(50, 3, 4, generator=generator)
    reconstruction = labels + 0.5 * torch.randn(50, 3, 4, generator=generator)
    acts = torch.randn(50, 3, 20, generator=generator).sub(1.5).relu()
    module = load(name)
    for start, stop in ((0, 1), (1, 30), (30, 50)):
        part = slice(start, stop)
        module.add(**needed(module, sums_of(labels[part], reconstruction[part], acts[part]).tensors()))
    result = module.compute()
    whole = sums_of(labels, reconstruction, acts).compute()
    assert set(result) >= {name}
    for key, value in result.items():
        assert value == whole[key] if key == "feature_density" else value == pytest.approx(whole[key], rel=1e-9)
    assert module.name == name and module.description.strip() and "active" in module.inputs_description + "active"


def test_all_at_once(load):
    acts = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.0]], [[3.0, 0.0]]])
    labels = torch.arange(4.0).reshape(4, 1, 1)
    modules = evaluate.combine([load(name) for name in FROM_SUMS])
    modules.add(**sums_of(labels, labels, acts).tensors())
    result = modules.compute()
    assert (result["nmse"], result["explained_variance"], result["l0"]) == (0.0, 1.0, 0.75)
    assert (result["dead_fraction"], result["num_tokens"]) == (0.5, 4)
    assert sum(result["feature_density"]["counts"]) == 2


def test_replacement_metrics_by_hand(load):
    ce, kl, agreement = load("ce_recovered"), load("kl"), load("top1_agreement")
    ce.add(count=1, ce_original=1.0, ce_replaced=2.0, ce_ablated=7.0)
    ce.add(count=3, ce_original=7.0, ce_replaced=8.0, ce_ablated=11.0)
    assert ce.compute() == {"ce_original": 2.0, "ce_replaced": 2.5, "ce_ablated": 4.5, "ce_recovered": 0.8}
    ce.add(count=2, ce_original=3.0, ce_replaced=4.0, ce_ablated=3.0)
    assert ce.compute()["ce_recovered"] is None
    kl.add(count=1, kl=0.5)
    kl.add(count=3, kl=0.5)
    assert kl.compute() == {"kl": 0.25}
    agreement.add(count=8, top1_agreement=6)
    assert agreement.compute() == {"top1_agreement": 0.75}
    kl.add(count=0, kl=0.0)
    with pytest.raises(ValueError, match="count=0"):
        kl.compute()


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_as_file_and_as_part_of_the_package(load, name):
    assert load(name).name == name
    module = importlib.import_module(f"hf_clt.evaluation.modules.{name}")
    assert len([each for each in vars(module).values() if hasattr(each, "_compute")]) == 1


def test_every_file_is_named():
    assert {path.stem for path in Path(module_path("nmse")).parent.glob("[!_]*.py")} == set(NAMES)


def test_wrong_input_is_refused(load):
    with pytest.raises(ValueError, match=r"name='mse'.*nmse"):
        module_path("mse")
    nmse = load("nmse")
    with pytest.raises(ValueError, match=r"Bad inputs .*'active_counts'"):
        nmse.add(**sums_of(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)).tensors())
    for num_layers in (1, 2):
        shape = (3, num_layers, 2)
        nmse.add(**needed(nmse, sums_of(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)).tensors()))
    with pytest.raises(ValueError, match="same CLT"):
        nmse.compute()
    l0 = load("l0")
    l0.add(count=0, active_counts=[[0, 0]])
    with pytest.raises(ValueError, match="eval_tokens"):
        l0.compute()
