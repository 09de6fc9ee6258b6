"""The end-to-end finish: its KL and gradients against plain forward hooks in float64, and what it leaves alone."""

import pytest
import torch

from hf_clt.evaluation import ReplacementModel, replacement_metrics
from hf_clt.training.end_to_end import finish_end_to_end, mean_kl
from tests.evaluation.test_replacement import VARIANTS, build, clt_for, hooked, padded, tokens
from tests.reference import parameters_of


VARIANTS = [fields for fields in VARIANTS if fields.get("k_scope") != "token" or fields["activation_fn"] != "topk"]


def batch_of(seed=1, rows=2, length=9):
    ids = tokens(rows, length, seed)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[0, 3] = False
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "counted": counted}


def padded_batch():
    ids, mask = padded("right")
    return {"input_ids": ids, "attention_mask": mask, "counted": mask.bool()}


@pytest.mark.parametrize("batch", [batch_of(), padded_batch()], ids=["excluded", "padded"])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_kl_and_gradients_equal_plain_hooks(fields, statistics, batch):
    """float64: 1e-9 is the rounding of sums in another order, through three layers."""
    model, clt = build("llama").requires_grad_(False), clt_for("llama", statistics, **fields)
    kl = mean_kl(ReplacementModel(model, clt), batch)
    kl.backward()

    parameters = parameters_of(clt)
    ids, mask, counted = batch["input_ids"], batch["attention_mask"], batch["counted"].clone()
    counted[:, 0] = False  # the first position is never replaced
    logits, _ = hooked("llama", model, clt, ids, mask, counted, parameters=parameters)
    log_p = model(input_ids=ids, attention_mask=mask).logits[counted].log_softmax(dim=1)
    log_q = logits[counted].log_softmax(dim=1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    expected.backward()
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in clt.named_parameters():
        if name.startswith("decoders"):
            torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-9, msg=name)
            assert parameter.grad.abs().max() > 0


def test_lowers_the_kl_and_leaves_the_features():
    model, clt = build("llama"), clt_for("llama", statistics=True, activation_fn="jumprelu").eval()
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    batches = [batch_of(seed, rows=8) for seed in range(40)]
    measured = replacement_metrics(model, clt, batches)
    found = finish_end_to_end(clt, model, batches, steps=40, learning_rate=1e-2)
    assert len(found) == 40
    assert replacement_metrics(model, clt, batches)["kl"] < 0.8 * measured["kl"]
    for name, value in clt.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("decoders")), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in clt.parameters())


def test_a_text_that_ends_ends_it():
    model, clt = build("llama"), clt_for("llama", activation_fn="jumprelu").eval()
    assert len(finish_end_to_end(clt, model, [batch_of()], steps=5, learning_rate=1e-3)) == 1
    with pytest.raises(ValueError, match=r"dataset: .*no text"):
        finish_end_to_end(clt, model, [], steps=5, learning_rate=1e-3)


def test_what_is_not_finite_stops_it():
    model, clt = build("llama"), clt_for("llama", activation_fn="jumprelu").eval()
    with torch.no_grad():
        clt.decoders[1].weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"update 0.*learning_rate=0\.001"):
        finish_end_to_end(clt, model, [batch_of()], steps=1, learning_rate=1e-3)
