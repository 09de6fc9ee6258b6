"""Each loss term by hand and against plain loops."""

import math

import pytest
import torch

from hf_clt.losses import preactivation_loss, reconstruction_loss, safe_sqrt, sparsity_loss
from hf_clt.sparsity import features_at
from tests.reference import random_clt


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_safe_sqrt_has_gradient_zero_at_zero():
    squares = torch.tensor([0.0, 4.0, 1e-30, 9.0], dtype=torch.float64, requires_grad=True)
    roots = safe_sqrt(squares)
    torch.testing.assert_close(roots, torch.tensor([0.0, 2.0, 1e-15, 3.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(roots.sum(), squares)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1 / 4, 0.5e15, 1 / 6], dtype=torch.float64))


def test_reconstruction_loss_sums_over_layers_and_dimensions_and_averages_over_tokens():
    targets = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[2.0, 4.0], [1.0, 1.0]]])
    reconstruction = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 3.0], [1.0, 4.0]]])
    assert reconstruction_loss(targets, reconstruction).item() == ((1 + 1) + (1 + 1) + 9) / 2


def test_sparsity_loss_by_hand():
    acts = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    norms = [torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)]
    features = [features_at(acts, acts > 0), features_at(acts, acts > 1)]
    expected = (math.tanh(0.1 * 2) + math.tanh(0.1 * 2 * 0.5) + math.tanh(0.1 * 3 * 2) + math.tanh(0.1 * 2)) / 2
    assert sparsity_loss(features, norms, 0.1).item() == pytest.approx(expected)


def test_sparsity_loss_of_nothing_is_zero():
    acts = torch.zeros(3, 4)
    assert sparsity_loss([features_at(acts, acts > 0)], [torch.ones(4)], 1.0).item() == 0


def test_sparsity_loss_gradients():
    acts = randn(4, 5).abs() + 0.1
    support = randn(4, 5, seed=1) > 0
    norms = randn(5, seed=2).abs().requires_grad_()
    values = acts[support].clone().requires_grad_()
    features = features_at(acts, support)

    def function(values, norms):
        features.values = values
        return sparsity_loss([features], [norms], 0.7)

    assert torch.autograd.gradcheck(function, (values, norms))


def preactivation(h, theta, norms, dead):
    """The loss from all h (N, F), differentiable in it, of which entries above θ are listed, and a few below."""
    entries = features_at(h, h.detach() > theta.detach() - 0.1)
    return preactivation_loss([entries], [h[:, dead].sum(dim=0)], [theta], [norms], [dead])


def test_preactivation_loss_by_hand():
    h = torch.tensor([[0.2, -1.0, 3.0], [0.6, -2.0, 3.0]], dtype=torch.float64)
    theta, norms = torch.tensor([0.5, 0.5, 0.5]).double(), torch.tensor([2.0, 1.0, 1.0]).double()
    dead = torch.tensor([0, 1])
    expected = (0.3 * 2 + 0 + 1.5 + 2.5) / 2
    assert preactivation(h, theta, norms, dead).item() == pytest.approx(expected)
    assert preactivation(h, theta, norms, torch.zeros(0, dtype=torch.int64)).item() == 0
    # θ = 0 is relu's: only the negative pre-activations are missing something.
    assert preactivation(h, torch.zeros(3).double(), norms, dead).item() == pytest.approx((1 + 2) / 2)


def test_preactivation_loss_is_the_formula_and_flows_through_h_threshold_and_norm():
    h, theta, norms = randn(40, 6), randn(6, seed=1).abs(), randn(6, seed=2).abs()
    dead = torch.tensor([0, 2, 3, 5])
    leaves = [tensor.requires_grad_() for tensor in (h, theta, norms)]
    loss = preactivation(*leaves, dead)
    expected = (torch.relu(theta[dead] - h[:, dead]) * norms[dead]).sum() / 40
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    grads = torch.autograd.grad(loss, leaves)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)
    for grad in grads[1:]:
        assert (grad[[1, 4]] == 0).all() and (grad[dead] != 0).any()


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("dead", [False, True])
def test_the_losses_of_no_tokens_are_zero(activation_fn, dead):
    clt = random_clt(activation_fn=activation_fn, sparsity_lambda=0.1, aux_coef=0.1, aux_k=2).train()
    nothing = torch.zeros(0, clt.config.num_layers, clt.config.d_model, dtype=torch.float64)
    mask = torch.ones(clt.config.num_layers, clt.config.num_features, dtype=torch.bool) if dead else None
    output = clt(nothing, labels=nothing, dead=mask)
    for name in ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss"):
        assert float(getattr(output, name).detach()) == 0, name
