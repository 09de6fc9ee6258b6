"""Figures and their intervals against plain loops; the text that figures are measured on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_clt.audit.samples import BlockSkipped, figure, figures, output_means, ratio_figure, ratio_figures, sequences
from tests.audit.conftest import read_text


VALUES = np.random.default_rng(1).normal(3.0, 1.0, size=(40, 2))


def test_a_figure_is_the_mean_and_the_percentiles_of_resampled_means():
    numbers = np.random.default_rng(7)
    means = [VALUES[numbers.integers(40, size=40), 0].mean() for _ in range(1000)]
    found = figure(VALUES[:, 0], 7)
    assert found["value"] == pytest.approx(VALUES[:, 0].mean())
    assert found["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert found["samples"] == 40
    assert found == figure(torch.tensor(VALUES[:, 0]), 7) != figure(VALUES[:, 0], 8)


def test_a_quotient_is_of_sums_and_its_samples_are_drawn_with_both_numbers():
    above, below = VALUES.T
    found = ratio_figure(above, below, 0)
    assert found["value"] == pytest.approx(above.sum() / below.sum())
    assert ratio_figure(2 * below, below, 0)["interval"] == pytest.approx([2, 2])


def test_columns_are_drawn_together_and_their_mean_leaves_out_what_has_no_value():
    below = np.stack([np.ones(40), np.zeros(40)], axis=1)
    first, second = ratio_figures(VALUES, below, 3)
    assert first["interval"] == pytest.approx(figure(VALUES[:, 0], 3)["interval"])
    assert second == {"value": None, "interval": [None, None], "samples": 40}
    assert ratio_figure(VALUES, below, 3) == first
    assert figures(VALUES, 3)[1]["interval"] == pytest.approx(figure(VALUES[:, 1], 3)["interval"])
    assert ratio_figure(VALUES, np.ones((40, 2)), 3)["value"] == pytest.approx(VALUES.mean())


@pytest.mark.parametrize("values, message", [([], "no sample"), ([1.0, np.nan], "not finite")])
def test_samples_that_give_no_figure_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        figure(values, 0)


def test_sequences_do_not_depend_on_how_the_text_was_cut(given, text_file):
    other = replace(given, heldout=read_text(text_file, given.tokenizer, prompts_per_batch=3))
    pairs = list(zip(sequences(given, 7), sequences(other, 7), strict=True))
    assert [len(batch["input_ids"]) for batch, _ in pairs] == [2, 2, 2, 1]
    for batch, same in pairs:
        assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_too_little_text_is_skipped(given):
    few = replace(given, heldout=[{name: values[:3] for name, values in given.heldout[0].items()}])
    with pytest.raises(BlockSkipped, match="3 sequences of held-out text, and 4 are needed"):
        sequences(few, 8)


def test_output_means_are_those_of_the_counted_tokens(given):
    outputs = torch.cat([given.harvester.harvest(batch)[1] for batch in sequences(given, 8)])
    assert torch.allclose(output_means(given, given.harvester, 8), outputs.double().mean(dim=0))
