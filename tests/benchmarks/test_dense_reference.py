"""
The parts of the dense reference, by their formulas, and in other number formats. That the model computes the same is
tested in tests/test_modeling.py.
"""

from functools import partial

import pytest
import torch

from benchmarks.dense_reference import AddDecoded, JumpReLU, dense_losses_of, keep_largest
from tests.reference import random_batch, random_clt


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_gradients(clt, inputs, labels):
    clt.zero_grad()
    loss = dense_losses_of(clt, inputs, labels)["loss"]
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in clt.named_parameters()}


def test_jumprelu_has_the_straight_through_gradient():
    """1[h > θ] to h and -(θ/ε) · 1[|h - θ| < ε/2] to θ."""
    h, theta, bandwidth = random_tensor(50, 6), random_tensor(6, seed=1).exp(), 0.8
    leaves = h.clone().requires_grad_(), theta.clone().requires_grad_()
    acts = JumpReLU.apply(*leaves, bandwidth)
    assert torch.equal(acts, h * (h > theta))
    weights = random_tensor(50, 6, seed=2)
    found = torch.autograd.grad((acts * weights).sum(), leaves)
    inside = (h - theta).abs() < bandwidth / 2
    assert inside.sum() > 20
    torch.testing.assert_close(found[0], weights * (h > theta))
    torch.testing.assert_close(found[1], (weights * -(theta / bandwidth) * inside).sum(dim=0))


@pytest.mark.parametrize("activation_fn", ["topk", "batchtopk"])
def test_the_largest_are_kept(activation_fn):
    h, k = random_tensor(7, 12), 4
    groups = [[row] for row in range(7)] if activation_fn == "topk" else [range(7)]  # in which k·N are kept
    kept = keep_largest(h, activation_fn, k)
    for rows in map(list, groups):
        least = h[rows].flatten().sort(descending=True).values[k * len(rows) - 1]
        assert torch.equal(kept[rows], torch.where(h[rows] >= least, h[rows], 0).clamp(min=0))


@pytest.mark.parametrize("with_norms", [False, True])
def test_decoding_adds_a_product_and_its_gradients_are_those_of_finite_differences(with_norms):
    start, acts, weight = random_tensor(4, 3, 2), random_tensor(4, 5, seed=1), random_tensor(5, 2, 2, seed=2)
    found, norms = AddDecoded.apply(start.clone(), acts, weight, 1, with_norms)
    expected = start.clone()
    expected[:, 1:] += torch.einsum("nf,fjd->njd", acts, weight)
    torch.testing.assert_close(found, expected)
    if with_norms:
        torch.testing.assert_close(norms, weight.flatten(1).norm(dim=1))
    leaves = [tensor.clone().requires_grad_() for tensor in (start, acts, weight)]

    def decode(start, acts, weight):
        out, norms = AddDecoded.apply(start.clone(), acts, weight, 1, with_norms)
        return (out, norms) if with_norms else out

    assert torch.autograd.gradcheck(decode, leaves)


def test_a_decoder_row_of_zeros_has_a_finite_gradient():
    weight = torch.zeros(3, 2, 4, requires_grad=True)
    out, norms = AddDecoded.apply(torch.zeros(5, 2, 4), torch.ones(5, 3), weight, 0, True)
    (out.sum() + norms.sum()).backward()
    assert torch.equal(weight.grad, torch.full((3, 2, 4), 5.0))


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_autocast_computes_in_bfloat16_and_is_near(activation_fn):
    clt = random_clt(double=False, activation_fn=activation_fn, jumprelu_bandwidth=1.0)
    inputs, labels = random_batch(clt, num_tokens=17)
    exact, expected = step_gradients(clt, inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dense_losses_of(clt, inputs, labels)["loss"]
    clt.zero_grad()
    loss.backward()  # outside of the context, as a training loop does it
    assert loss.dtype == torch.float32
    assert loss != exact  # float32 products would give the same
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for name, parameter in clt.named_parameters():
        assert parameter.grad.dtype == torch.float32
        # A feature at the edge of the selection may fall on either side, so not every entry agrees.
        similarity = torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.9, name


def test_bfloat16_parameters():
    clt = random_clt(double=False).train()
    inputs, labels = random_batch(clt, num_tokens=17)
    for part in (clt.encoders, clt.decoders):
        part.to(torch.bfloat16)
    near = partial(torch.testing.assert_close, rtol=0.02, atol=0)
    losses, output = dense_losses_of(clt, inputs, labels), clt(inputs, labels)
    near(losses["reconstruction_loss"], output.reconstruction_loss)
    near(losses["sparsity_loss"], output.sparsity_loss)
    _, gradients = step_gradients(clt, inputs, labels)
    assert gradients["decoders.0.weight"].dtype == torch.bfloat16
    assert gradients["thresholds.0.value"].dtype == torch.float32
