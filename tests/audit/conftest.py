"""A tiny language model with held-out text, and a CLT that was trained on it for some seconds."""

from dataclasses import replace

import pytest
import torch

from hf_clt import CLTConfig, CrossLayerTranscoder, Harvester, load_language_model
from hf_clt.audit.samples import Given
from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream


def read_text(text_file, tokenizer, prompts_per_batch=4):
    return list(
        TokenStream(
            load_text_dataset(text_file),
            tokenizer,
            context_size=32,
            prompts_per_batch=prompts_per_batch,
            heldout_tokens=2000,
            heldout=True,
        )
    )


@pytest.fixture(scope="session")
def given_once(tiny_gpt2, text_file):
    model, tokenizer = load_language_model(tiny_gpt2, dtype="float32")
    heldout = read_text(text_file, tokenizer)
    return Given(model, tokenizer, Harvester(model), heldout, ["The value of a name is", "A class can be"], quick=True)


@pytest.fixture
def given(given_once):
    """Without what was found for another test."""
    return replace(given_once, shared={})


@pytest.fixture
def given_double(given_once, tiny_gpt2):
    """In float64, with what blocks find kept apart."""
    model, _ = load_language_model(tiny_gpt2, dtype="float32")
    model = model.double()
    return replace(given_once, model=model, harvester=Harvester(model), shared={})


@pytest.fixture(scope="session")
def trained(given_once):
    """A CLT that explains most of the model's MLP outputs."""
    parts = [given_once.harvester.harvest(batch) for batch in given_once.heldout]
    inputs, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clt = CrossLayerTranscoder(
            CLTConfig(num_layers=2, d_model=64, num_features=256, activation_fn="batchtopk", k=16)
        )
        clt.set_normalization(
            *(values for part in (inputs, labels) for values in (part.mean(dim=0), part.std(dim=0) + 1e-3))
        )
        optimizer = torch.optim.Adam(clt.parameters(), lr=5e-3)
        for _ in range(200):
            rows = torch.randint(len(inputs), (512,))
            optimizer.zero_grad()
            clt(inputs[rows], labels[rows]).loss.backward()
            optimizer.step()
    clt.fold_normalization()
    return clt.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def saved(trained, tmp_path_factory):
    """Folder of the trained CLT."""
    folder = tmp_path_factory.mktemp("audited") / "clt"
    trained.save_pretrained(folder)
    return folder
