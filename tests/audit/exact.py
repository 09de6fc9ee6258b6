"""
A language model whose CLT is right by construction: GPT-2 with relu, whose neurons are the features; and the same CLT
with its decoder rows in another order, which is wrong.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.audit.samples import Given
from hf_clt.harvest.harvester import Harvester
from tests.attribution.cases import make_model


PROMPTS = ["w5 w9 w30 w7 w11 w41", "w8 w8 w23 w51 w17", "w60 w33 w4 w12 w29 w35 w3", "w21 w22 w37 w38 w6"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of 64 words; any other is w0."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def exact_clt(model) -> CrossLayerTranscoder:
    """The CLT of such a model, in its number format."""
    config = CLTConfig(
        num_layers=model.config.n_layer, d_model=model.config.n_embd, activation_fn="relu", decoder_reach=1,
        num_features=model.transformer.h[0].mlp.c_fc.weight.shape[1],
        feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out",
    )  # fmt: skip
    clt = CrossLayerTranscoder(config).to(model.dtype).eval().requires_grad_(False)
    for block, encoder, decoder in zip(model.transformer.h, clt.encoders, clt.decoders, strict=True):
        encoder.weight.copy_(block.mlp.c_fc.weight.T)
        encoder.bias.copy_(block.mlp.c_fc.bias)
        decoder.weight[:, 0] = block.mlp.c_proj.weight
        decoder.bias.copy_(block.mlp.c_proj.bias)
    return clt


def make_exact(dtype: torch.dtype = torch.float64) -> tuple[CrossLayerTranscoder, Given]:
    """The CLT, and what blocks are given with it; of new objects each time, which share no graphs."""
    model = make_model("gpt2", dtype, activation_function="relu").requires_grad_(False)
    return exact_clt(model), Given(
        model, make_tokenizer(), Harvester(model, "mlp.hook_in", "mlp.hook_out"), [], PROMPTS
    )


def shuffle(clt: CrossLayerTranscoder, seed: int = 0) -> None:
    """Each feature writes what another one did, in place."""
    generator = torch.Generator().manual_seed(seed)
    for decoder in clt.decoders:
        decoder.weight.copy_(decoder.weight[torch.randperm(len(decoder.weight), generator=generator)])


def make_shuffled() -> tuple[CrossLayerTranscoder, Given]:
    clt, given = make_exact()
    shuffle(clt)
    return clt, given
