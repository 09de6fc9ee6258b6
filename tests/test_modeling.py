"""The model against the dense float64 reference of tests/reference.py, and what holds of it whatever the settings."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch.nn.functional import linear

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.losses import norms_over_targets
from tests.reference import STATISTICS, parameters_of, random_batch, random_clt, random_statistics, reference


ACTIVATIONS = {
    "relu": {"activation_fn": "relu"},
    "jumprelu": {"activation_fn": "jumprelu", "jumprelu_bandwidth": 0.5},
    "topk": {"activation_fn": "topk"},
    "topk-token": {"activation_fn": "topk", "k_scope": "token"},
    "batchtopk": {"activation_fn": "batchtopk"},
    "batchtopk-token": {"activation_fn": "batchtopk", "k_scope": "token"},
}
TYINGS = ("none", "per_source", "per_target")
LOSSES = {"sparsity_lambda": 0.7, "sparsity_c": 1.3, "sparsity_first_layer": 0.6, "preactivation_coef": 0.2}
LOSSES |= {"aux_coef": 0.4, "aux_k": 4}
TERMS = ("reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")


def dead_mask(clt, seed=0):
    """About half of the features; none in the last layer, fewer than aux_k in the first."""
    dead = torch.rand(clt.config.num_layers, clt.config.num_features, generator=torch.Generator().manual_seed(seed))
    dead = dead < 0.5
    dead[0, :] = False
    dead[0, 3:5] = True
    dead[-1] = False
    return dead


def gradients(clt, loss):
    grads = torch.autograd.grad(loss, list(clt.parameters()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(clt.named_parameters(), grads, strict=True)
    }


def trained(**fields):
    """A float64 CLT, its running thresholds started by one batch."""
    clt = random_clt(**fields)
    if clt.config.activation_fn == "batchtopk":
        clt.train()(random_batch(clt, seed=9)[0])
    return clt


# -- fast = dense, forward and backward ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_statistics", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("reach", [1, 2, None])
@pytest.mark.parametrize("activation, tying, together", [
    (activation, tying, together)
    for activation, tying, together in itertools.product(ACTIVATIONS, TYINGS, (False, True))
    if not (together and (activation.endswith("-token") or tying == "per_target"))
])  # fmt: skip
def test_forward_and_gradients_match_the_dense_reference(
    monkeypatch, activation, tying, reach, skip, with_statistics, together
):
    """Layers one by one, and together, which are encoded in two parts here."""
    fields = {**ACTIVATIONS[activation], **LOSSES}
    clt = random_clt(decoder_tying=tying, decoder_reach=reach, skip_connection=skip, **fields)
    clt.layers_together = together
    assert len(clt._blocks(random_batch(clt)[0])) == (1 if together else 3)
    monkeypatch.setattr("hf_clt.modeling_clt.ENCODED_BYTES", 4 * 12 * 16 * 2)  # of two of three layers
    statistics = None
    if with_statistics:
        statistics = random_statistics(clt)
        clt.set_normalization(**statistics)
    inputs, labels = random_batch(clt)
    dead = dead_mask(clt)

    clt.train()
    parameters = parameters_of(clt)
    expected = reference(clt, parameters, inputs, labels, 0.6, dead, statistics)
    out = clt(inputs, labels=labels, sparsity_scale=0.6, dead=dead)
    torch.testing.assert_close(out.features.to_dense(), expected["acts"], rtol=1e-9, atol=1e-10)
    for name in (*TERMS, "loss", "reconstruction"):
        torch.testing.assert_close(getattr(out, name), expected[name], rtol=1e-9, atol=1e-10, msg=name)

    leaves = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    wanted = torch.autograd.grad(expected["loss"], list(leaves.values()), allow_unused=True)
    found = gradients(clt, out.loss)
    assert found.keys() == leaves.keys()
    for name, grad in zip(leaves, wanted, strict=True):
        assert grad is not None and grad.abs().sum() > 0, f"{name}: the comparison is empty"
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")

    # Another batch: on the first one the running threshold is the pre-activation of one feature, to the last bit.
    clt.eval()
    inputs, labels = random_batch(clt, seed=1)
    expected = reference(clt, parameters_of(clt), inputs, labels, 0.6, dead, statistics, training=False)
    with torch.no_grad():
        out = clt(inputs, labels=labels, sparsity_scale=0.6, dead=dead)
        acts = clt.encode(inputs)
    torch.testing.assert_close(acts, expected["acts"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.features.to_dense(), expected["acts"], rtol=1e-9, atol=1e-10)
    for name in (*TERMS, "loss", "reconstruction"):
        torch.testing.assert_close(getattr(out, name), expected[name], rtol=1e-9, atol=1e-10, msg=name)
    for given in (acts, clt.encode_sparse(inputs)):
        decoded = clt.decode(given, inputs if skip else None)
        torch.testing.assert_close(decoded, expected["reconstruction"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["topk", "topk-token", "batchtopk", "batchtopk-token"])
def test_without_asking_how_many_are_dead_the_same_are_revived(monkeypatch, activation, training, autocast):
    """As on a GPU: as many entries whatever is dead, of which the surplus is 0, computed again (autocast) or not."""
    clt = trained(**ACTIVATIONS[activation], **LOSSES)
    if autocast:
        clt.float()
        monkeypatch.setattr("hf_clt.kernels.encode.multiplies_bfloat16", lambda: True)
    clt.train(training)
    inputs, labels = random_batch(clt)
    dtype = torch.float32 if autocast else torch.float64
    inputs, labels, dead = inputs.to(dtype), labels.to(dtype), dead_mask(clt)
    found = []
    for on_cpu in (True, False):
        for module in ("selection", "modeling_clt"):
            monkeypatch.setattr(f"hf_clt.{module}.is_on_cpu", lambda tensor, on_cpu=on_cpu: on_cpu)
        state = copy.deepcopy(clt)  # the running threshold moves
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = state(inputs, labels=labels, dead=dead)
            nothing = state(inputs, labels=labels, dead=torch.zeros_like(dead))
        assert output.aux_loss > 0 and nothing.aux_loss == 0
        assert all(grad.count_nonzero() == 0 for grad in gradients(state, nothing.aux_loss).values())
        found.append((output, gradients(state, output.loss)))
    (output, grads), (other, other_grads) = found
    exact = {"rtol": 1e-5, "atol": 1e-6} if autocast else {"rtol": 1e-12, "atol": 1e-13}
    for name in (*TERMS, "reconstruction"):
        torch.testing.assert_close(getattr(other, name), getattr(output, name), **exact, msg=name)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, **exact, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("together", [False, True], ids=["", "together"])
@pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["matrix product", "gathered rows"])
@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_both_ways_to_decode_give_the_same_gradients(monkeypatch, activation, tying, dense_above, together):
    monkeypatch.setattr("hf_clt.kernels.rows.DENSE_ABOVE", dense_above)
    clt = random_clt(decoder_tying=tying, **ACTIVATIONS[activation], **LOSSES)
    clt.layers_together = together
    inputs, labels = random_batch(clt)
    parameters, dead = parameters_of(clt), dead_mask(clt).T.contiguous().T  # whatever its strides are
    expected = reference(clt, parameters, inputs, labels, 1.0, dead)
    found = gradients(clt, clt.train()(inputs, labels=labels, dead=dead).loss)
    leaves = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    for name, grad in zip(leaves, torch.autograd.grad(expected["loss"], list(leaves.values())), strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10, msg=name)


def test_dimensions_that_do_not_vary_are_scaled_as_the_others_of_their_layer_are():
    clt = random_clt(activation_fn="relu")
    statistics = random_statistics(clt)
    statistics["mean_in"][1, 2], statistics["std_in"][1, 2] = 300.0, 2e-4  # rounding of such a mean
    statistics["std_out"][0, 1] = 1e-9
    statistics["std_out"][2] = 0.0  # a layer without output
    inputs, labels = random_batch(clt)
    clt.set_normalization(**statistics)
    for name, layer, dimension in (("std_in", 1, 2), ("std_out", 0, 1)):
        others = statistics[name][layer][torch.arange(5) != dimension]
        statistics[name][layer, dimension] = others.median()
    statistics["std_out"][2] = 1.0
    assert all(torch.equal(getattr(clt, name), value) for name, value in statistics.items())
    expected = reference(clt, parameters_of(clt), inputs, labels, statistics=statistics)
    out = clt(inputs, labels=labels)
    torch.testing.assert_close(out.reconstruction, expected["reconstruction"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.reconstruction_loss, expected["reconstruction_loss"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_any_batch_shape(shape):
    clt = random_clt(activation_fn="relu", skip_connection=True)
    inputs, labels = random_batch(clt, num_tokens=6)
    num_tokens = torch.Size(shape).numel()
    expected = reference(clt, parameters_of(clt), inputs[:num_tokens], labels[:num_tokens])
    shaped = inputs[:num_tokens].reshape(*shape, 3, 5)
    out = clt(shaped, labels=labels[:num_tokens].reshape(*shape, 3, 5))
    assert out.reconstruction.shape == (*shape, 3, 5)
    assert out.features.to_dense().shape == clt.encode(shaped).shape == (*shape, 3, 16)
    torch.testing.assert_close(out.reconstruction, expected["reconstruction"].view(*shape, 3, 5))
    torch.testing.assert_close(clt.decode(clt.encode(shaped), shaped), out.reconstruction)
    torch.testing.assert_close(out.loss, expected["loss"])


def test_float32_agrees_with_the_reference():
    clt = random_clt(double=False, activation_fn="relu", **LOSSES)
    double = random_clt(activation_fn="relu", **LOSSES)
    inputs, labels = random_batch(double)
    expected = reference(double, parameters_of(double), inputs, labels)
    out = clt(inputs.float(), labels=labels.float())
    assert out.reconstruction.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.reconstruction.double(), expected["reconstruction"], rtol=1e-4, atol=1e-5)


# -- the loss terms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_loss_term_is_back_propagated_on_its_own(activation):
    clt = random_clt(**ACTIVATIONS[activation], **LOSSES)
    inputs, labels = random_batch(clt)
    dead = dead_mask(clt)
    parameters = parameters_of(clt)
    expected = reference(clt, parameters, inputs, labels, 0.6, dead)
    leaves = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    total = {name: torch.zeros_like(parameter) for name, parameter in leaves.items()}
    terms = [term for term in TERMS if expected[term].requires_grad]
    assert len(terms) == 3  # the pre-activation loss or the auxiliary loss
    for term in terms:
        clt.zero_grad(set_to_none=True)
        torch.autograd.backward(getattr(clt.train()(inputs, labels=labels, sparsity_scale=0.6, dead=dead), term))
        wanted = torch.autograd.grad(expected[term], list(leaves.values()), allow_unused=True, retain_graph=True)
        for (name, parameter), grad in zip(clt.named_parameters(), wanted, strict=True):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grad = torch.zeros_like(parameter) if grad is None else grad
            torch.testing.assert_close(found, grad, rtol=1e-8, atol=1e-10, msg=f"{term}: {name}")
            total[name] += found
    clt.zero_grad()
    torch.autograd.backward(clt.train()(inputs, labels=labels, sparsity_scale=0.6, dead=dead).loss)
    for name, parameter in clt.named_parameters():
        torch.testing.assert_close(parameter.grad, total[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_loss_term_that_is_absent_back_propagates_too(activation):
    """Whoever looks at one term's gradient need not know which terms this configuration has."""
    clt = random_clt(**ACTIVATIONS[activation], sparsity_lambda=0.0)
    inputs, labels = random_batch(clt)
    for term in TERMS[1:]:
        loss = getattr(clt.train()(inputs, labels=labels), term)
        assert loss == 0
        torch.autograd.backward(loss)
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in clt.parameters())


def test_the_loss_is_the_sum_of_its_terms_and_none_without_labels():
    clt = random_clt(**ACTIVATIONS["jumprelu"], **LOSSES)
    inputs, labels = random_batch(clt)
    out = clt(inputs, labels=labels, dead=dead_mask(clt))
    assert out.preactivation_loss > 0 and out.sparsity_loss > 0 and out.aux_loss == 0
    torch.testing.assert_close(out.loss, sum(getattr(out, term) for term in TERMS))
    assert out["loss"] is out.loss
    out = clt(inputs)
    assert all(getattr(out, name) is None for name in ("loss", *TERMS))
    assert out.reconstruction.shape == inputs.shape


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "topk-token"])
def test_losses_are_means_over_tokens(activation):
    clt = random_clt(**ACTIVATIONS[activation], **LOSSES)
    inputs, labels = random_batch(clt)
    once = clt(inputs, labels=labels, dead=dead_mask(clt))
    twice = clt(inputs.repeat(2, 1, 1), labels=labels.repeat(2, 1, 1), dead=dead_mask(clt))
    for term in TERMS:
        torch.testing.assert_close(getattr(once, term), getattr(twice, term), msg=term)
    once, twice = gradients(clt, once.loss), gradients(clt, twice.loss)
    for name, grad in once.items():
        torch.testing.assert_close(grad, twice[name], msg=name)


def test_the_sparsity_scale_and_lambda_multiply_the_penalty_alone():
    inputs, labels = random_batch(random_clt())
    losses = {}
    for weight, scale in itertools.product((0.5, 1.0), (0.0, 0.25, 1.0)):
        clt = random_clt(activation_fn="relu", sparsity_lambda=weight)
        out = clt(inputs, labels=labels, sparsity_scale=scale)
        losses[weight, scale] = out.sparsity_loss.item()
        torch.testing.assert_close(out.loss - out.sparsity_loss, out.reconstruction_loss)
    assert losses[1.0, 1.0] > 0
    for (weight, scale), loss in losses.items():
        assert loss == pytest.approx(weight * scale * losses[1.0, 1.0])


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_decoder_rows_of_zeros_give_finite_gradients(activation, tying):
    clt = random_clt(decoder_tying=tying, **ACTIVATIONS[activation], **LOSSES)
    with torch.no_grad():
        for decoder in clt.decoders:
            decoder.weight[::2] = 0
    inputs, labels = random_batch(clt)
    out = clt(inputs, labels=labels, dead=dead_mask(clt))
    for name, grad in gradients(clt, out.loss).items():
        assert grad.isfinite().all(), name
    squares = []
    for s, features in enumerate(out.features.layers):
        clt.decode_layer(s, features, torch.zeros_like(inputs), squares)
    for norms in norms_over_targets(torch.stack(squares), clt.config):
        assert (norms[::2] == 0).all() and (norms[1::2] > 0).all()


def test_the_gradient_of_the_sparsity_loss_reaches_the_decoder_norms():
    clt = random_clt(activation_fn="relu", **LOSSES)
    inputs, labels = random_batch(clt)
    found = gradients(clt, clt(inputs, labels=labels).sparsity_loss)
    assert all(found[f"decoders.{s}.weight"].abs().sum() > 0 for s in range(3))


@pytest.mark.parametrize("activation", ["topk", "topk-token", "batchtopk", "batchtopk-token"])
def test_the_auxiliary_gradient_touches_dead_features_alone(activation):
    clt = random_clt(**ACTIVATIONS[activation], **LOSSES)
    inputs, labels = random_batch(clt)
    dead = dead_mask(clt)
    dead[-1, :3] = True
    for name, grad in gradients(clt, clt.train()(inputs, labels=labels, dead=dead).aux_loss).items():
        module, layer, _ = name.split(".")
        if name.endswith("bias") and module == "decoders":
            assert (grad == 0).all(), name
        else:
            assert (grad[~dead[int(layer)]] == 0).all(), name
            assert grad[dead[int(layer)]].abs().sum() > 0, name


def test_aux_k_caps_the_features_per_token_and_layer_even_when_more_are_dead():
    """With one layer, one dimension and unit decoders the auxiliary loss can be summed by hand."""
    clt = random_clt(num_layers=1, d_model=1, num_features=4, activation_fn="topk", k=1, aux_coef=1.0, aux_k=2)
    with torch.no_grad():
        clt.encoders[0].weight[:] = torch.tensor([[5.0], [1.0], [2.0], [3.0]])
        clt.decoders[0].weight.fill_(1.0)
        clt.encoders[0].bias.zero_()
        clt.decoders[0].bias.zero_()
    dead = torch.tensor([[False, True, True, True]])
    # x = 1: feature 0 writes 5 of the target 8; the two largest dead ones write 2 + 3 = 5 of the residual 3.
    # x = -1: nothing is positive, so the residual 8 stays.
    out = clt(torch.tensor([1.0, -1.0]).double().view(2, 1, 1), labels=torch.full((2, 1, 1), 8.0).double(), dead=dead)
    assert out.aux_loss.item() == pytest.approx(((3 - 5) ** 2 + 8**2) / 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_of_a_step_stays_in_memory(activation):
    """Not even until the garbage collector runs: a graph that refers to itself is one that it cannot free."""
    clt = random_clt(skip_connection=True, **ACTIVATIONS[activation], **LOSSES).train()
    inputs, labels = random_batch(clt)
    gc.collect()
    gc.disable()
    try:
        out = clt(inputs, labels=labels, dead=dead_mask(clt))
        out.loss.backward()
        left = [weakref.ref(tensor) for f in out.features.layers for tensor in (f.values, f.indices, f.by_feature[0])]
        left.append(weakref.ref(out.reconstruction))
        assert all(ref() is not None for ref in left)
        del out
        assert [ref() for ref in left] == [None] * len(left)
    finally:
        gc.enable()


def test_a_wrong_shape_of_dead_is_refused():
    clt = random_clt(activation_fn="relu", **LOSSES)
    inputs, labels = random_batch(clt)
    for wrong in (torch.ones(16, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="dead"):
            clt(inputs, labels=labels, dead=wrong)


# -- jumprelu --------------------------------------------------------------------------------------------------------


def test_jumprelu_by_hand():
    """θ = 0.5, ε = 0.02, h = 0.495 (inside the window, inactive) and h = 0.505 (inside, active), h = 0.6 (outside)."""
    clt = random_clt(num_layers=1, d_model=1, num_features=1, jumprelu_bandwidth=0.02).train()
    with torch.no_grad():
        clt.encoders[0].weight.fill_(1.0)
        clt.encoders[0].bias.zero_()
        clt.thresholds[0].value.fill_(0.5).log_()
    for h, active, slope in [(0.495, 0, -25), (0.505, 1, -25), (0.6, 1, 0), (0.4, 0, 0)]:
        acts = clt.encode(torch.full((1, 1, 1), h, dtype=torch.float64))
        assert acts.item() == pytest.approx(h * active)
        grad_bias, grad_log_theta = torch.autograd.grad(acts.sum(), [clt.encoders[0].bias, clt.thresholds[0].value])
        assert grad_bias.item() == active
        assert grad_log_theta.item() == pytest.approx(slope * 0.5)  # d θ / d log θ = θ


def test_the_jumprelu_gate_is_strict():
    clt = random_clt(num_layers=1, d_model=1, num_features=1)
    with torch.no_grad():
        clt.encoders[0].weight.fill_(1.0)
        clt.encoders[0].bias.zero_()
        clt.thresholds[0].value.zero_()  # θ = 1
    inputs = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64).view(2, 1, 1)
    assert (clt.encode(inputs).flatten() > 0).tolist() == [False, True]


def test_a_threshold_of_zero_stays_zero_in_training():
    clt = CrossLayerTranscoder(
        CLTConfig(num_layers=3, d_model=5, num_features=16, jumprelu_threshold=0.0, **LOSSES)
    ).train()
    assert all((threshold.value == -torch.inf).all() for threshold in clt.thresholds)
    optimizer = torch.optim.Adam(clt.parameters(), lr=0.1)
    before = [encoder.weight.detach().clone() for encoder in clt.encoders]
    for step in range(3):
        inputs, labels = random_batch(clt, seed=step)
        clt(inputs, labels=labels, dead=dead_mask(clt)).loss.backward()
        for name, parameter in clt.named_parameters():
            assert parameter.grad.isfinite().all(), name
        torch.nn.utils.clip_grad_norm_(clt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all((threshold.value == -torch.inf).all() for threshold in clt.thresholds)
    assert all(not torch.equal(e.weight, old) for e, old in zip(clt.encoders, before, strict=True))
    inputs, _ = random_batch(clt)
    h = torch.stack([linear(inputs[:, s], encoder.weight, encoder.bias) for s, encoder in enumerate(clt.encoders)], 1)
    torch.testing.assert_close(clt.encode(inputs), h.relu())


def test_encode_gives_no_negative_or_sub_threshold_values_in_train_mode():
    clt = random_clt(jumprelu_bandwidth=10.0).train()  # everything is inside the window
    inputs, _ = random_batch(clt)
    sparse = clt.encode_sparse(inputs)
    active = (sparse.to_dense() > 0).sum(dim=0)
    assert torch.equal(sparse.active_counts(), active)
    assert 0 < active.sum() < inputs.shape[0] * 3 * 16
    torch.testing.assert_close(sparse.l0_per_layer(), active.sum(1).float() / inputs.shape[0])
    torch.testing.assert_close(sparse.to_dense(), clt.eval().encode(inputs))


# -- topk and batchtopk ----------------------------------------------------------------------------------------------


def count_of_selected(clt, inputs):
    """Selected entries per layer, before the ReLU: those that it zeroes stay listed."""
    return [layer.values.numel() for layer in clt.train()(inputs).features.layers]


def test_batchtopk_selects_exactly_k_n_before_the_relu():
    clt = random_clt(activation_fn="batchtopk", k=3)
    with torch.no_grad():
        clt.encoders[1].bias -= 3  # few positive pre-activations: the selection must reach into the negative ones
    inputs, _ = random_batch(clt)
    assert count_of_selected(clt, inputs) == [36, 36, 36]
    assert (clt.encode(inputs) > 0).sum(dim=(0, 2)).tolist()[1] < 36


def test_batchtopk_over_all_layers_selects_exactly_k_l_n():
    clt = random_clt(activation_fn="batchtopk", k_scope="token", k=3)
    with torch.no_grad():
        clt.encoders[1].bias += 2
    counts = count_of_selected(clt, random_batch(clt)[0])
    assert sum(counts) == 3 * 3 * 12
    assert counts[1] > counts[0]


@pytest.mark.parametrize("k_scope", ["layer", "token"])
def test_topk_keeps_its_budget_per_token(k_scope):
    clt = random_clt(activation_fn="topk", k_scope=k_scope, k=3)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias += 8  # everything is positive
        clt.encoders[2].bias += 4
    acts = clt.encode(random_batch(clt)[0])
    per_layer = (acts > 0).sum(dim=2)
    if k_scope == "layer":
        assert (per_layer == 3).all()
    else:
        assert (per_layer.sum(dim=1) == 9).all() and (per_layer[:, 2] > 3).any()


@pytest.mark.parametrize("k_scope", ["layer", "token"])
def test_the_running_threshold(k_scope):
    clt = random_clt(activation_fn="batchtopk", k_scope=k_scope, k=3).train()
    assert all(threshold.value.isinf().all() for threshold in clt.thresholds)
    expected = None
    for step in range(4):
        inputs, labels = random_batch(clt, seed=step)
        clt(inputs, labels=labels)
        acts = reference(clt, parameters_of(clt), inputs, labels)["acts"].detach()
        per_layer = torch.stack([acts[:, s][acts[:, s] > 0].min() for s in range(3)])
        smallest = per_layer if k_scope == "layer" else per_layer.min().expand(3)
        expected = smallest if expected is None else 0.999 * expected + 0.001 * smallest
        found = torch.stack([threshold.value for threshold in clt.thresholds]).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    if k_scope == "layer":
        assert len(set(found.tolist())) == 3


def running_thresholds(clt):
    return torch.stack([threshold.value.detach().clone() for threshold in clt.thresholds]).flatten()


def test_only_forward_in_train_mode_moves_the_running_threshold():
    clt = trained(activation_fn="batchtopk")
    before = running_thresholds(clt)
    inputs, labels = random_batch(clt, seed=1)
    clt.train()
    clt.encode(inputs)
    clt.encode_sparse(inputs)
    clt.decode(clt.encode(inputs))
    clt.eval()
    clt(inputs, labels=labels)
    assert torch.equal(running_thresholds(clt), before)
    with torch.no_grad():
        clt.train()(inputs)
    assert not torch.equal(running_thresholds(clt), before)


@pytest.mark.parametrize("started", [False, True])
def test_a_batch_without_positive_selection_leaves_the_running_threshold(started):
    clt = random_clt(activation_fn="batchtopk").train()
    inputs, _ = random_batch(clt)
    if started:
        clt(inputs)
    before = running_thresholds(clt)
    with torch.no_grad():
        clt.encoders[1].bias.fill_(-100)
    clt(random_batch(clt, seed=1)[0])
    after = running_thresholds(clt)
    assert after[1] == before[1]
    assert after[0] != before[0] and after[2] != before[2]


def test_restarted_running_thresholds_start_with_the_next_batch():
    clt = trained(activation_fn="batchtopk")
    fresh = random_clt(activation_fn="batchtopk").train()
    clt.restart_running_thresholds()
    inputs, _ = random_batch(clt)
    with pytest.raises(ValueError, match="train"):
        clt.eval().encode(inputs)
    clt.train()(inputs)
    fresh(inputs)
    assert torch.equal(running_thresholds(clt), running_thresholds(fresh))


def test_batchtopk_in_eval_mode_before_training_is_refused():
    clt = random_clt(activation_fn="batchtopk").eval()
    inputs, _ = random_batch(clt)
    for call in (clt, clt.encode, clt.encode_sparse, lambda inputs: clt.encode_layer(0, inputs[:, 0])):
        with pytest.raises(ValueError, match="train"):
            call(inputs)


def test_the_batchtopk_gate_is_strict_in_eval_mode():
    clt = random_clt(num_layers=1, d_model=1, num_features=1, activation_fn="batchtopk", k=1)
    with torch.no_grad():
        clt.encoders[0].weight.fill_(1.0)
        clt.encoders[0].bias.zero_()
    clt.train()(torch.ones(1, 1, 1).double())
    assert running_thresholds(clt).item() == 1
    inputs = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64).view(2, 1, 1)
    assert (clt.eval().encode(inputs).flatten() > 0).tolist() == [False, True]


# -- what depends on what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_eval_mode_a_token_does_not_depend_on_its_neighbours(activation):
    clt = trained(**ACTIVATIONS[activation]).eval()
    inputs, _ = random_batch(clt)
    together, acts = clt(inputs).reconstruction, clt.encode(inputs)
    for n in range(inputs.shape[0]):
        torch.testing.assert_close(clt.encode(inputs[n]), acts[n])
        torch.testing.assert_close(clt(inputs[n]).reconstruction, together[n])
    torch.testing.assert_close(clt.encode(torch.cat([inputs[:1], 100 * inputs[1:]]))[0], acts[0])


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_layer_by_layer_is_as_all_at_once_in_eval_mode(activation, tying):
    clt = trained(decoder_tying=tying, **ACTIVATIONS[activation])
    clt.set_normalization(**random_statistics(clt))
    inputs, _ = random_batch(clt)
    if activation == "topk-token":
        with pytest.raises(ValueError, match=r"layer=1.*compete"):
            clt.encode_layer(1, inputs[:, 1])
        return
    normalized = torch.stack([decoder.bias for decoder in clt.decoders]).expand(inputs.shape).clone()
    for s in range(3):
        features = clt.train().encode_layer(s, clt.normalize_inputs(inputs[:, s], s))
        assert torch.equal(features.to_dense(), clt.eval().encode(inputs)[:, s])
        normalized = clt.decode_layer(s, features, normalized)
    raw = torch.stack([clt.denormalize(normalized[:, t], t) for t in range(3)], dim=1)
    torch.testing.assert_close(raw, clt(inputs).reconstruction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("reach", [1, 2, 3, 4, None])
def test_a_target_depends_on_the_sources_within_reach_alone(reach, tying, skip):
    clt = random_clt(
        num_layers=4, activation_fn="relu", decoder_reach=reach, decoder_tying=tying, skip_connection=skip
    )
    inputs, _ = random_batch(clt)
    before = clt(inputs).reconstruction
    for source in range(4):
        changed = inputs.clone()
        changed[:, source] += 1
        moved = (clt(changed).reconstruction != before).any(dim=0).any(dim=1)
        assert moved.tolist() == [source <= t < source + (reach or 4) for t in range(4)]


@pytest.mark.parametrize("reach", [1, 2, None])
def test_parameter_shapes(reach):
    for tying in TYINGS:
        clt = random_clt(num_layers=4, decoder_reach=reach, decoder_tying=tying, skip_connection=True)
        widths = [1] * 4 if tying != "none" else [min(4 - s, reach or 4) for s in range(4)]
        assert [decoder.weight.shape for decoder in clt.decoders] == [(16, width, 5) for width in widths]


def test_initialisation():
    clt = CrossLayerTranscoder(
        CLTConfig(num_layers=4, d_model=25, num_features=64, skip_connection=True, jumprelu_threshold=0.2)
    )
    for encoder, decoder, skip, threshold in zip(clt.encoders, clt.decoders, clt.skips, clt.thresholds, strict=True):
        for weight, bound in ((encoder.weight, 1 / 8), (decoder.weight, 1 / 10)):
            assert 0.97 * bound < weight.max() <= bound and -bound <= weight.min() < -0.97 * bound
            assert weight.mean().abs() < 0.1 * bound and abs(weight.std() - bound / 3**0.5) < 0.05 * bound
        assert not (encoder.bias.any() or decoder.bias.any() or skip.weight.any())
        torch.testing.assert_close(threshold.value.exp(), torch.full((64,), 0.2))


def test_the_initial_weights_depend_on_the_seed():
    config = CLTConfig(num_layers=3, d_model=5, num_features=16, activation_fn="relu")
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(CrossLayerTranscoder(config))
    first, same, other = ([p for p in model.parameters() if p.any()] for model in models)
    assert len(first) == 6  # encoders and decoders; biases are 0
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_model_is_not_built_without_a_shape():
    with pytest.raises(ValueError, match="num_layers"):
        CrossLayerTranscoder(CLTConfig())


def test_half_precision_is_that_of_the_decoders_and_trains():
    clt = CrossLayerTranscoder._from_config(
        CLTConfig(num_layers=3, d_model=5, num_features=16, skip_connection=True, **LOSSES), dtype=torch.bfloat16
    )
    assert {decoder.weight.dtype for decoder in clt.decoders} == {clt.dtype} == {torch.bfloat16}
    others = [p for n, p in clt.named_parameters() if not (n.startswith("decoders") and n.endswith("weight"))]
    assert {p.dtype for p in others} == {torch.float32}
    inputs, labels = random_batch(random_clt(double=False))
    out = clt.train()(inputs, labels=labels, dead=dead_mask(clt))
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()
    out.loss.backward()
    for name, parameter in clt.named_parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_autocast_changes_little(activation):
    clt = random_clt(double=False, **{**ACTIVATIONS[activation], "jumprelu_bandwidth": 0.5, **LOSSES}).train()
    inputs, labels = random_batch(clt)
    plain = clt(inputs, labels=labels, dead=dead_mask(clt))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = clt(inputs, labels=labels, dead=dead_mask(clt))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, plain.loss, rtol=0.05, atol=0)
    out.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in clt.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_tokens(activation):
    clt = trained(**ACTIVATIONS[activation]).eval()
    inputs, _ = random_batch(clt)
    out = clt(inputs[:0])
    assert out.reconstruction.shape == (0, 3, 5) and out.features.to_dense().shape == (0, 3, 16)
    assert (out.features.active_counts() == 0).all() and (out.features.l0_per_layer() == 0).all()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused_by_name():
    clt = random_clt(activation_fn="relu")
    inputs, labels = random_batch(clt)
    for call in (clt, clt.encode, clt.encode_sparse):
        for wrong in (inputs[:, :2], inputs[..., :4], inputs[0, 0]):
            with pytest.raises(ValueError, match="inputs have shape"):
                call(wrong)
    with pytest.raises(ValueError, match="labels have shape"):
        clt(inputs, labels=labels[:4])
    with pytest.raises(ValueError, match="acts have shape"):
        clt.decode(torch.zeros(12, 3, 15).double())


def test_decode_needs_the_inputs_of_a_skip_connection():
    clt = random_clt(activation_fn="relu", skip_connection=True)
    inputs, _ = random_batch(clt)
    with pytest.raises(ValueError, match="skip connection"):
        clt.decode(clt.encode(inputs))


# -- normalisation ---------------------------------------------------------------------------------------------------

VARIANTS = [
    pytest.param({**ACTIVATIONS[activation], "decoder_tying": tying, "skip_connection": skip, "decoder_reach": reach})
    for activation, tying, skip, reach in [
        ("relu", "none", False, None),
        ("relu", "per_target", True, 2),
        ("jumprelu", "none", True, 2),
        ("jumprelu", "per_source", False, None),
        ("jumprelu", "per_target", False, 1),
        ("topk", "none", True, None),
        ("topk-token", "per_target", False, None),
        ("batchtopk", "none", True, 1),
        ("batchtopk", "per_source", True, None),
        ("batchtopk-token", "per_target", True, 2),
    ]
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_folding_keeps_the_function(fields):
    clt = random_clt(**fields).train()
    clt.set_normalization(**random_statistics(clt))
    clt(random_batch(clt, seed=9)[0])
    inputs, labels = random_batch(clt)
    clt.eval()
    acts, reconstruction = clt.encode(inputs), clt(inputs).reconstruction
    decoded = clt.decode(acts, inputs)
    running = [b.clone() for n, b in clt.named_buffers() if n.startswith("thresholds")]
    clt.fold_normalization()
    assert all(getattr(clt, name) is None for name in STATISTICS)
    torch.testing.assert_close(clt.encode(inputs), acts)
    torch.testing.assert_close(clt(inputs).reconstruction, reconstruction)
    torch.testing.assert_close(clt.decode(acts, inputs), decoded)
    assert all(
        torch.equal(b, old)
        for (n, b), old in zip(((n, b) for n, b in clt.named_buffers() if "thresholds" in n), running, strict=True)
    )
    clt.fold_normalization()  # nothing left to fold
    torch.testing.assert_close(clt(inputs).reconstruction, reconstruction)
    # Now the raw loss: no statistics are applied to the labels either.
    torch.testing.assert_close(
        clt(inputs, labels=labels).reconstruction_loss, (labels - reconstruction).square().sum(dim=(1, 2)).mean()
    )


@pytest.mark.parametrize("fields", VARIANTS)
def test_reparametrizing_keeps_the_function(fields):
    clt = trained(**fields).eval()
    inputs, _ = random_batch(clt)
    acts, reconstruction = clt.encode(inputs), clt(inputs).reconstruction
    same_scale = fields["decoder_tying"] == "per_source"
    for seed in (0, 1):  # the second time on top of the first
        clt.set_normalization(**random_statistics(clt, seed, same_scale), reparametrize=True)
        assert clt.mean_in is not None
        torch.testing.assert_close(clt.encode(inputs), acts)
        torch.testing.assert_close(clt(inputs).reconstruction, reconstruction)
    clt.fold_normalization()
    torch.testing.assert_close(clt.encode(inputs), acts)
    torch.testing.assert_close(clt(inputs).reconstruction, reconstruction)


def test_without_reparametrize_the_weights_stay():
    clt = random_clt(activation_fn="relu")
    before = parameters_of(clt)
    clt.set_normalization(**random_statistics(clt))
    assert all(torch.equal(parameter, before[name]) for name, parameter in clt.named_parameters())


def test_the_models_statistics_are_copies():
    clt = random_clt(activation_fn="relu")
    statistics = random_statistics(clt)
    clt.set_normalization(**statistics)
    before = clt.std_out.clone()
    statistics["std_out"].fill_(7)
    assert torch.equal(clt.std_out, before)


def test_folding_per_source_with_differing_scales_unties_the_live_model():
    clt = random_clt(activation_fn="relu", decoder_tying="per_source")
    clt.set_normalization(**random_statistics(clt))
    inputs, _ = random_batch(clt)
    reconstruction = clt(inputs).reconstruction
    clt.fold_normalization()
    assert clt.config.decoder_tying == "none" and clt.config.trained_decoder_tying == "per_source"
    assert [decoder.weight.shape[1] for decoder in clt.decoders] == [3, 2, 1]
    torch.testing.assert_close(clt(inputs).reconstruction, reconstruction)
    assert all(decoder.weight.requires_grad for decoder in clt.decoders)


def test_folding_per_source_with_one_scale_stays_tied():
    clt = random_clt(activation_fn="relu", decoder_tying="per_source")
    clt.set_normalization(**random_statistics(clt, same_scale=True))
    inputs, _ = random_batch(clt)
    reconstruction = clt(inputs).reconstruction
    clt.fold_normalization()
    assert clt.config.decoder_tying == "per_source" and clt.config.trained_decoder_tying is None
    assert all(decoder.weight.shape[1] == 1 for decoder in clt.decoders)
    torch.testing.assert_close(clt(inputs).reconstruction, reconstruction)


def test_reparametrizing_per_source_with_differing_scales_is_refused_and_changes_nothing():
    clt = random_clt(activation_fn="relu", decoder_tying="per_source")
    before = parameters_of(clt)
    with pytest.raises(ValueError, match="per_source"):
        clt.set_normalization(**random_statistics(clt), reparametrize=True)
    assert clt.mean_in is None and clt.config.decoder_tying == "per_source"
    assert all(torch.equal(parameter, before[name]) for name, parameter in clt.named_parameters())


@pytest.mark.parametrize("name", STATISTICS)
def test_unusable_statistics_are_refused_by_name(name):
    clt = random_clt(activation_fn="relu")
    statistics = random_statistics(clt)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        clt.set_normalization(**{**statistics, name: statistics[name][0]})
    for bad in (torch.nan, torch.inf):
        broken = statistics[name].clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError, match=f"{name} .*finite"):
            clt.set_normalization(**{**statistics, name: broken})
    assert clt.mean_in is None


def test_statistics_of_a_half_precision_model_are_float32():
    clt = CrossLayerTranscoder._from_config(
        CLTConfig(num_layers=3, d_model=5, num_features=16, activation_fn="relu"), dtype=torch.bfloat16
    )
    clt.set_normalization(**{name: value.float() for name, value in random_statistics(random_clt()).items()})
    assert {getattr(clt, name).dtype for name in STATISTICS} == {torch.float32}
    before = [parameter.dtype for parameter in clt.parameters()]
    clt.fold_normalization()
    assert [parameter.dtype for parameter in clt.parameters()] == before


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_a_rough_product_leaves_no_activation_below_the_gate(monkeypatch, activation, training):
    """Under autocast bfloat16 selects, and the values are computed again: some then lie below 0, or below θ."""
    monkeypatch.setattr("hf_clt.kernels.encode.multiplies_bfloat16", lambda: True)
    clt = random_clt(double=False, num_features=512, **ACTIVATIONS[activation]).train()
    inputs, labels = random_batch(clt, num_tokens=256)
    clt(inputs)  # batchtopk's running threshold
    clt.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        features = clt(inputs, labels=labels).features
    for s, layer in enumerate(features.layers):
        gate = clt.thresholds[s]().detach() if hasattr(clt, "thresholds") else torch.zeros(1)
        gate = gate.expand(512)[layer.indices] if activation == "jumprelu" or not training else 0.0
        assert ((layer.values == 0) | (layer.values > gate)).all() and (layer.values >= 0).all()


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_step_in_bfloat16_with_features_that_always_fire(activation, dead):
    """
    Their gradients are sums over 3,000 tokens, which bfloat16 could not add up: 256 + 1 is 256. Against the same
    weights in float64; what is rounded, activations and gradients of the output, is rounded to 2^-9.
    """
    torch.manual_seed(0)
    num_tokens, hot = 3000, slice(0, 3)
    config = CLTConfig(num_layers=3, d_model=16, num_features=64, **{**ACTIVATIONS[activation], **LOSSES, "k": 8})
    clt = CrossLayerTranscoder(config).train()
    with torch.no_grad():
        for encoder, decoder in zip(clt.encoders, clt.decoders, strict=True):
            encoder.bias.uniform_(-0.1, 0.1)[hot] += 2
            decoder.weight[hot] = decoder.weight[hot].abs()  # so that the sums do not cancel
    clt.cast_decoders(torch.bfloat16)
    inputs = torch.randn(num_tokens, 3, 16)
    labels = 3 + torch.randn(num_tokens, 3, 16)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[:, 40:] = dead
    wide = copy.deepcopy(clt).double()
    found = gradients(clt, clt(inputs, labels=labels, dead=mask).loss)
    wanted = gradients(wide, wide(inputs.double(), labels=labels.double(), dead=mask).loss)
    for name, grad in wanted.items():
        rows = [found[name], *([found[name][hot]] if found[name].shape[0] == 64 else [])]
        for part, exact in zip(rows, [grad, grad[hot]], strict=False):
            error = (part.double() - exact).norm() / exact.norm().clamp_min(1e-12)
            assert error < 1e-2, (name, float(error))


def test_statistics_of_a_host_go_into_a_clt_on_a_device():
    """They are estimated there and given on the CPU; on the meta device, as on a GPU, the two do not mix."""
    with torch.device("meta"):
        clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=3, num_features=4, activation_fn="relu"))
    clt.set_normalization(**{name: torch.ones(2, 3) for name in STATISTICS}, reparametrize=True)
    assert all(tensor.device.type == "meta" for tensor in clt.state_dict().values()) and clt.mean_in is not None
