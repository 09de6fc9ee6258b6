"""From topk and batchtopk to jumprelu: thresholds against sorted float64 pre-activations, L0, NMSE, and what stays."""

import logging

import pytest
import torch

from benchmarks.dense_reference import activations, pre_activations
from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.evaluation import format_calibration
from hf_clt.evaluation.calibration import (
    L0_TOLERANCE,
    LEADING_BITS,
    MARGIN,
    NMSE_TOLERANCE,
    OTHER_BITS,
    bin_of_rank,
    positive_bits,
    threshold_in_bin,
)
from tests.reference import parameters_of, random_batch, random_clt, random_statistics


ORIGINALS = {
    "topk": {"activation_fn": "topk"},
    "topk-token": {"activation_fn": "topk", "k_scope": "token"},
    "batchtopk": {"activation_fn": "batchtopk"},
    "batchtopk-token": {"activation_fn": "batchtopk", "k_scope": "token"},
}


def original(normalised=False, **fields):
    """A float32 topk or batchtopk CLT with random weights; its running thresholds were moved by a few batches."""
    clt = random_clt(double=False, **fields)
    if normalised:
        clt.set_normalization(**random_statistics(clt))
    if clt.config.activation_fn == "batchtopk":
        for seed in range(3):
            clt.train()(random_batch(clt, seed=20 + seed)[0])
    return clt.eval()


def heldout(clt, num_tokens=90, batch_size=32):
    inputs, labels = random_batch(clt, num_tokens, seed=5)
    parts = range(0, num_tokens, batch_size)
    return [{"inputs": inputs[i : i + batch_size], "labels": labels[i : i + batch_size]} for i in parts]


def dense_reference(clt, batches):
    """h and the original's activations on all tokens, (N, L, F) each, in float64."""
    parameters = {name: value.double() for name, value in parameters_of(clt).items()}
    x = torch.cat([batch["inputs"] for batch in batches]).double()
    if clt.mean_in is not None:
        x = (x - clt.mean_in.double()) / clt.std_in.double()
    h = pre_activations(clt.config, parameters, x)
    acts = activations(clt.config, parameters, h, training=False)
    return torch.stack(h, dim=1).detach(), torch.stack(acts, dim=1).detach()


def threshold_of(clt, layer):
    return clt.thresholds[layer]().detach()


# -- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_as_active_as_before_and_between_two_order_statistics(name, normalised):
    clt = original(normalised, **ORIGINALS[name])
    batches = heldout(clt)
    h, acts = dense_reference(clt, batches)
    counts = (acts > 0).sum(dim=0)  # (L, F)
    result, figures = clt.to_jumprelu(batches)
    assert result.config.activation_fn == "jumprelu" and not result.training

    after = torch.cat([result.encode(batch["inputs"]) for batch in batches]).detach()
    assert (after > 0).sum(dim=(0, 2)).tolist() == counts.sum(dim=1).tolist()
    l0 = (counts.sum(dim=1).double() / len(h)).tolist()
    assert figures["before"]["l0_per_layer"] == figures["after"]["l0_per_layer"] == pytest.approx(l0, rel=1e-12)
    assert figures["l0_change_per_layer"] == [0.0] * 3 and figures["l0_kept"]
    assert figures["num_tokens"] == 90

    for layer in range(3):
        (theta,) = threshold_of(result, layer).double().unique().tolist()
        count = int(counts[layer].sum())
        ordered = h[:, layer].flatten().sort(descending=True).values
        value, below = ordered[count - 1].item(), ordered[count].clamp(min=0).item()
        assert 0 <= below * (1 - 1e-5) <= theta < value
        if clt.config.activation_fn == "topk":
            assert theta == pytest.approx((value + below) / 2, rel=1e-5)


def test_what_never_fires_does_not_start_to():
    clt = original(activation_fn="topk")
    with torch.no_grad():
        clt.encoders[1].bias.fill_(-50)  # a layer without a positive pre-activation: topk selects nothing that counts
    result, figures = clt.to_jumprelu(heldout(clt))
    assert figures["after"]["l0_per_layer"] == figures["before"]["l0_per_layer"]
    assert figures["after"]["l0_per_layer"][1] == 0 and figures["l0_kept"]
    assert (threshold_of(result, 1) == 0).all()


def test_thresholds_do_not_depend_on_the_batches():
    clt = original(activation_fn="topk", k_scope="token")
    first, _ = clt.to_jumprelu(heldout(clt))
    for batch_size in (7, 90):
        again, _ = clt.to_jumprelu(heldout(clt, batch_size=batch_size))
        for layer in range(3):
            torch.testing.assert_close(threshold_of(again, layer), threshold_of(first, layer), rtol=1e-5, atol=0)


def test_the_bits_find_the_order_statistic_exactly():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, 3, generator=generator) * 10.0 ** torch.randint(-30, 30, (400, 3), generator=generator)
    h[:50, 1] = h[0, 1].abs()  # ties
    h[:5, 2] = torch.tensor([1.0, torch.finfo(torch.float32).max, 1e-30, 2.0, 2.0])
    ordered = h[h > 0].sort(descending=True).values
    bits = positive_bits(h)
    for rank in (1, len(ordered) // 3, len(ordered)):  # the largest, one in between, the smallest that is positive
        leading, larger = bin_of_rank(torch.bincount(bits >> OTHER_BITS, minlength=2**LEADING_BITS), rank)
        inside = bits[bits >> OTHER_BITS == leading] & (2**OTHER_BITS - 1)
        place, larger_inside = bin_of_rank(torch.bincount(inside, minlength=2**OTHER_BITS), rank - larger)
        value = torch.tensor([(leading << OTHER_BITS) + place], dtype=torch.int32).view(torch.float32)
        assert value == ordered[rank - 1]
        assert larger + larger_inside == (ordered > value).sum()


def test_a_threshold_by_hand():
    two = int(torch.tensor([2.0]).view(torch.int32))
    leading, place = two >> OTHER_BITS, two & (2**OTHER_BITS - 1)

    def threshold(below, count, greater, equal, smaller_inside=None):
        histogram = torch.zeros(2**OTHER_BITS, dtype=torch.int64)
        histogram[place] = equal
        value = leading
        if smaller_inside is not None:  # a number in the same bin as the last that passes, which is a bit above 2
            histogram[place + 64], histogram[place] = equal, smaller_inside
        return threshold_in_bin(histogram, value, greater, count, below)

    assert threshold(1.0, 5, 4, 1) == 1.5
    assert threshold(0.0, 5, 4, 1) == 1.0  # θ is never below 0
    above_two = torch.tensor([two + 64], dtype=torch.int32).view(torch.float32).item()
    assert threshold(1.0, 5, 4, 1, smaller_inside=3) == (2.0 + above_two) / 2
    # Four are larger than 2 and three are equal; five shall pass: four is nearer than seven.
    assert threshold(1.0, 5, 4, 3) == pytest.approx(2 * (1 + MARGIN), rel=1e-9)
    assert threshold(1.0, 6, 4, 3) == 1.5
    assert threshold(0.0, 0, 0, 0) == 0 and 7 < threshold(7.0, 0, 0, 0) < 7.001  # a layer that never fires


def test_bfloat16_weights():
    clt = random_clt(double=False, activation_fn="topk", k=8, num_features=256, d_model=32).bfloat16().eval()
    inputs, labels = random_batch(clt, 512)
    h = inputs[:, 0] @ clt.encoders[0].weight.T
    assert len(h.unique()) < h.numel() / 20  # most pre-activations have equals
    result, figures = clt.to_jumprelu([{"inputs": inputs, "labels": labels}])
    assert result.dtype == torch.bfloat16 and result.thresholds[0].value.dtype == torch.float32
    assert figures["l0_kept"] and max(map(abs, figures["l0_change_per_layer"])) <= L0_TOLERANCE


def test_what_no_threshold_can_do_is_said(caplog):
    clt = original(activation_fn="topk")
    with torch.no_grad():
        clt.encoders[0].weight.zero_()
        clt.encoders[0].bias.fill_(1.0)  # all pre-activations are equal, topk selects 3 of 16
    with caplog.at_level(logging.WARNING):
        _, figures = clt.to_jumprelu(heldout(clt))
    assert not figures["l0_kept"]
    assert figures["l0_change_per_layer"] == [-1.0, 0.0, 0.0]
    assert "-100.0 %" in caplog.text and "float32" in caplog.text
    assert "L0: NOT within 1% in every layer (largest change -100.00%)" in format_calibration(figures)


# -- quality ----------------------------------------------------------------------------------------------------------


def a_little_trained(steps=150, **fields):
    """A CLT trained on made activations: a sparse mixture of directions, and a random map of it as target."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 48, 16, generator=generator)
    maps = torch.randn(2, 16, 16, generator=generator) / 4

    def sample(num_tokens):
        active = torch.rand(num_tokens, 2, 48, generator=generator) < 0.06
        codes = active * torch.rand(num_tokens, 2, 48, generator=generator).add(0.5)
        inputs = torch.einsum("nlf,lfd->nld", codes, directions)
        inputs = inputs + 0.05 * torch.randn(inputs.shape, generator=generator)
        return inputs, torch.einsum("nld,lde->nle", inputs, maps)

    torch.manual_seed(0)
    clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=16, num_features=64, k=6, **fields)).train()
    optimizer = torch.optim.Adam(clt.parameters(), lr=1e-2)
    for _ in range(steps):
        clt(*sample(64)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, labels = sample(2000)
    batches = [{"inputs": inputs[i : i + 500], "labels": labels[i : i + 500]} for i in range(0, 2000, 500)]
    return clt, batches


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_trained_clt_keeps_its_nmse(name):
    clt, batches = a_little_trained(**ORIGINALS[name])
    _, figures = clt.to_jumprelu(batches)
    assert figures["before"]["nmse"] < 0.3  # trained
    assert max(map(abs, figures["l0_change_per_layer"])) <= L0_TOLERANCE and figures["l0_kept"]
    change = figures["after"]["nmse"] / figures["before"]["nmse"] - 1
    assert figures["nmse_change"] == pytest.approx(change)
    assert figures["nmse_kept"] == (change <= NMSE_TOLERANCE)
    # Where topk fills up k features of every layer whatever the token, no threshold does the same: on this made
    # dictionary, where few are needed, the error rises, and that is said.
    assert figures["nmse_kept"] == (name != "topk")
    assert clt.training


# -- the new CLT and the old one --------------------------------------------------------------------------------------


def test_batchtopk_is_the_same_function():
    clt = original(normalised=True, activation_fn="batchtopk", skip_connection=True)
    result, figures = clt.to_jumprelu(heldout(clt))
    inputs, _ = random_batch(clt, 64, seed=77)  # other tokens
    assert torch.equal(result.encode(inputs), clt.encode(inputs))
    assert torch.equal(result(inputs).reconstruction, clt(inputs).reconstruction)
    assert figures["nmse_change"] == 0


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
def test_the_original_stays_and_the_new_one_saves_and_loads(tying, tmp_path):
    clt = original(
        normalised=True, activation_fn="topk", decoder_tying=tying, decoder_reach=2, sparsity_lambda=0.3, aux_k=7
    )
    clt.train()
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    config = clt.config.to_dict()
    result, _ = clt.to_jumprelu(heldout(clt))
    assert clt.training and clt.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in clt.state_dict().items())

    after = result.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # statistics included
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0)  # no shared storage
        result.encoders[0].weight.mul_(2)
        assert torch.equal(clt.encoders[0].weight, before["encoders.0.weight"])
        result.encoders[0].weight.div_(2)

    fresh = CLTConfig(num_layers=3, d_model=5, num_features=16, activation_fn="jumprelu")
    for name in ("jumprelu_bandwidth", "sparsity_lambda", "aux_coef", "aux_k"):
        assert getattr(result.config, name) == getattr(fresh, name)
    assert (result.config.decoder_tying, result.config.decoder_reach, result.config.k) == (tying, 2, 3)
    mean = torch.stack([threshold_of(result, layer) for layer in range(3)]).double().mean().item()
    assert result.config.jumprelu_threshold == pytest.approx(mean, rel=1e-6)

    result.save_pretrained(tmp_path)
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    inputs, labels = random_batch(clt, 64, seed=77)
    torch.testing.assert_close(loaded.encode(inputs), result.encode(inputs), rtol=1e-4, atol=1e-5)
    result.train()(inputs, labels).loss.backward()  # it can be trained on
    assert result.thresholds[0].value.grad is not None


def test_batches_may_come_from_a_function_and_have_any_shape():
    clt = original(activation_fn="topk")
    batches = heldout(clt, batch_size=90)
    expected, _ = clt.to_jumprelu(batches)

    def generator():
        for batch in batches:
            yield {name: rows.view(6, 15, 3, 5) for name, rows in batch.items()}

    result, figures = clt.to_jumprelu(generator)
    assert figures["num_tokens"] == 90
    assert torch.equal(threshold_of(result, 1), threshold_of(expected, 1))


def test_the_table():
    clt = original(activation_fn="topk")
    _, figures = clt.to_jumprelu(heldout(clt))
    lines = format_calibration(figures).splitlines()
    assert lines[0].split() == ["layer", "NMSE", "before", "after", "L0", "before", "after", "change"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[6].split()[0] == "all" and lines[6].split()[-1] == "+0.00%"
    assert "L0: within 1% in every layer (largest change +0.00%)" in lines
    assert f"({figures['nmse_change']:+.2%})" in lines[-2]
    assert "90 held-out tokens" in lines[-1]


def test_wrong_input_gives_one_clear_line(tmp_path):
    clt = original(activation_fn="topk")
    batches = heldout(clt)
    jumprelu = random_clt(double=False)
    with pytest.raises(ValueError, match="activation_fn='jumprelu'"):
        jumprelu.to_jumprelu(batches)
    with pytest.raises(ValueError, match="can be read only once"):
        clt.to_jumprelu(iter(batches))
    once = iter(batches)
    with pytest.raises(ValueError, match=r"90 tokens.* 0 in"):
        clt.to_jumprelu(lambda: once)
    with pytest.raises(ValueError, match="gave no tokens"):
        clt.to_jumprelu([])
    with pytest.raises(ValueError, match=r"\['inputs'\].*inputs and labels"):
        clt.to_jumprelu([{"inputs": batches[0]["inputs"]}])
    with pytest.raises(ValueError, match=r"tuple.*dicts"):
        clt.to_jumprelu([(batches[0]["inputs"], batches[0]["labels"])])
    with pytest.raises(ValueError, match=r"inputs have shape .*num_layers=3"):
        clt.to_jumprelu([{name: rows.transpose(1, 2) for name, rows in batches[0].items()}])
    with pytest.raises(ValueError, match="no running threshold yet"):
        random_clt(double=False, activation_fn="batchtopk").to_jumprelu(batches)
    clt.save_pretrained(tmp_path)
    lazy = CrossLayerTranscoder.from_pretrained(tmp_path, lazy=True)
    with pytest.raises(ValueError, match="lazy=True"):
        lazy.to_jumprelu(batches)
