"""The dense baseline computes the same losses and gradients as the model."""

import pytest
import torch

from benchmarks.dense_reference import dense_losses
from hf_clt import CLTConfig, CrossLayerTranscoder


VARIANTS = {
    "relu": {"activation_fn": "relu"},
    "relu, no sparsity loss": {"activation_fn": "relu", "sparsity_lambda": 0.0},
    "jumprelu": {"activation_fn": "jumprelu", "jumprelu_bandwidth": 0.5},
    "jumprelu, reach 2": {"activation_fn": "jumprelu", "decoder_reach": 2, "sparsity_c": 2.0},
    "jumprelu, reach 1": {"activation_fn": "jumprelu", "decoder_reach": 1, "sparsity_lambda": 0.0},
    "topk": {"activation_fn": "topk"},
    "topk over the token, sparsity loss": {"activation_fn": "topk", "k_scope": "token", "sparsity_lambda": 0.5},
    "batchtopk": {"activation_fn": "batchtopk"},
    "batchtopk over the token": {"activation_fn": "batchtopk", "k_scope": "token", "sparsity_lambda": 0.5},
}
SIZES = {"num_layers": 4, "d_model": 6, "num_features": 24, "k": 5}


def make_clt(dtype=torch.float64, **fields):
    """A CLT with random biases and thresholds as well, so that no gradient is there by chance."""
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(CLTConfig(**{**SIZES, **fields})).to(dtype).train()
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return clt


def make_batch(dtype=torch.float64, num_tokens=17):
    generator = torch.Generator().manual_seed(1)
    shape = (num_tokens, SIZES["num_layers"], SIZES["d_model"])
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def gradients(clt, loss):
    clt.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in clt.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_losses_and_gradients_are_those_of_the_model(fields):
    clt, (inputs, labels) = make_clt(**fields), make_batch()
    error, penalty = dense_losses(clt, inputs, labels)
    output = clt(inputs, labels)
    torch.testing.assert_close(error, output.reconstruction_loss)
    torch.testing.assert_close(penalty, output.sparsity_loss)
    assert (penalty > 0) == (clt.config.sparsity_lambda > 0)

    found, expected = gradients(clt, error + penalty), gradients(clt, output.loss)
    assert found.keys() == expected.keys() == dict(clt.named_parameters()).keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_normalisation_is_applied():
    clt, (inputs, labels) = make_clt(), make_batch()
    generator = torch.Generator().manual_seed(2)
    shape = (SIZES["num_layers"], SIZES["d_model"])
    mean_in, std_in, mean_out, std_out = (torch.rand(shape, generator=generator) + 0.5 for _ in range(4))
    clt.set_normalization(mean_in, std_in, mean_out, std_out)
    error, penalty = dense_losses(clt, inputs, labels)
    torch.testing.assert_close(error + penalty, clt(inputs, labels).loss)


def test_a_decoder_row_of_zeros_has_a_finite_gradient():
    clt, (inputs, labels) = make_clt(), make_batch()
    with torch.no_grad():
        clt.decoders[1].weight[3] = 0
    found = gradients(clt, sum(dense_losses(clt, inputs, labels)))
    expected = gradients(clt, clt(inputs, labels).loss)
    torch.testing.assert_close(found["decoders.1.weight"], expected["decoders.1.weight"])


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_autocast_computes_in_bfloat16_and_is_near(activation_fn):
    clt, (inputs, labels) = (
        make_clt(torch.float32, activation_fn=activation_fn, jumprelu_bandwidth=1.0),
        make_batch(torch.float32),
    )
    exact = sum(dense_losses(clt, inputs, labels))
    expected = gradients(clt, exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(dense_losses(clt, inputs, labels))
    found = gradients(clt, loss)  # outside of the context, as a training loop does it
    assert loss.dtype == torch.float32
    assert loss != exact  # float32 products would give the same
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for name in expected:
        assert found[name].dtype == torch.float32
        # A feature at the edge of the selection may fall on either side, so not every entry agrees.
        similarity = torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.9, name


def test_bfloat16_parameters():
    clt = make_clt(torch.float32)
    for part in (clt.encoders, clt.decoders):
        part.to(torch.bfloat16)
    inputs, labels = make_batch(torch.float32)
    error, penalty = dense_losses(clt, inputs, labels)
    output = clt(inputs, labels)
    torch.testing.assert_close(error, output.reconstruction_loss, rtol=0.02, atol=0)
    torch.testing.assert_close(penalty, output.sparsity_loss, rtol=0.02, atol=0)
    found = gradients(clt, error + penalty)
    assert found["decoders.0.weight"].dtype == torch.bfloat16
    assert found["thresholds.0.value"].dtype == torch.float32


@pytest.mark.parametrize("fields", [{"decoder_tying": "per_source"}, {"skip_connection": True}])
def test_what_it_cannot_compute_is_refused(fields):
    with pytest.raises(ValueError, match=r"decoder_tying='none' and skip_connection=False"):
        dense_losses(make_clt(**fields), *make_batch())
