"""The replacement model and its metrics, against plain forward hooks and the dense equations of tests/reference.py."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from benchmarks.dense_reference import STATISTICS, activations, written_decoder
from hf_clt import CrossLayerTranscoder
from hf_clt.evaluation import ReplacementModel, replacement_metrics
from hf_clt.evaluation import replacement as replacement_module
from hf_clt.evaluation.replacement import LayerwiseReconstruction, prediction_sums
from tests.reference import parameters_of, random_batch, random_clt, random_statistics


L, D, FEATURES, VOCABULARY = 3, 16, 24, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
RESID_MID, MLP_IN = ("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")

# name: model_type, its further options, hooks, list of blocks, module whose input is read, module whose output is set
ARCHITECTURES = {
    "gpt2": ("gpt2", {}, RESID_MID, "transformer.h", "ln_2", "mlp"),
    "gpt_neox": ("gpt_neox", {}, RESID_MID, "gpt_neox.layers", "post_attention_layernorm", "mlp"),
    "llama": ("llama", {}, RESID_MID, "model.layers", "post_attention_layernorm", "mlp"),
    "gemma2": (
        "gemma2",
        {"head_dim": 8},
        RESID_MID,
        "model.layers",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 4},
        RESID_MID,
        "model.layers",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "gemma2, MLP alone": ("gemma2", {"head_dim": 8}, MLP_IN, "model.layers", "mlp", "mlp"),
    "qwen3": ("qwen3", {"head_dim": 8}, MLP_IN, "model.layers", "mlp", "mlp"),
    "phi": ("phi", {}, RESID_MID, "model.layers", "input_layernorm", "mlp"),
    "gptj, by inspection": ("gptj", {"rotary_dim": 4}, RESID_MID, "transformer.h", "ln_1", "mlp"),
}
VARIANTS = [
    {"activation_fn": "relu"},
    {"activation_fn": "jumprelu"},
    {"activation_fn": "topk"},
    {"activation_fn": "batchtopk"},
    {"activation_fn": "batchtopk", "k_scope": "token"},
    {"activation_fn": "jumprelu", "skip_connection": True},
    {"activation_fn": "topk", "decoder_reach": 1, "skip_connection": True},
    {"activation_fn": "relu", "decoder_reach": 2, "decoder_tying": "per_source"},
    {"activation_fn": "jumprelu", "decoder_reach": 2, "decoder_tying": "per_target"},
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operations as small as these wait longer for a second thread than they run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name="gpt2", auto=AutoModelForCausalLM):
    """A tiny language model in float64, always the same; norms of ones and biases of zeros would hide mistakes."""
    model_type, options = ARCHITECTURES[name][:2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options})).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.4 * torch.randn(parameter.shape, dtype=torch.float64))
    return model.eval()


def clt_for(name="gpt2", statistics=False, **fields):
    """A CLT in float64 for one of these models, in train mode like one that a trainer holds."""
    hooks = dict(zip(("feature_input_hook", "feature_output_hook"), ARCHITECTURES[name][2], strict=True))
    clt = random_clt(**{"num_layers": L, "d_model": D, "num_features": FEATURES, **hooks, **fields})
    if clt.config.activation_fn == "batchtopk":
        with torch.no_grad():
            for layer, threshold in enumerate(clt.thresholds):
                threshold.value.fill_(0.5 if clt.config.k_scope == "token" else 0.3 * (layer + 1))
    if statistics:
        clt.set_normalization(**random_statistics(clt))
    return clt


def tokens(rows=2, length=9, seed=1):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side, lengths=(9, 5, 2)):
    """Prompts of several lengths, padded on a side: token ids and attention mask, (P, T) each."""
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), None
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, place], mask[row, place] = tokens(1, length, seed=10 + row)[0], 1
    return ids, mask


def hooked(name, model, clt, input_ids, mask=None, counted=None, layers=range(L), interventions=(), parameters=None):
    """
    Logits (P, T, V) and activations (P, T, L, F) of the replacement model, by plain forward hooks; differentiable in
    `parameters`, where they are given in the place of the CLT's own.
    """
    _, _, _, blocks, reads, writes = ARCHITECTURES[name]
    config, gradients = clt.config, parameters is not None
    parameters = parameters if gradients else parameters_of(clt)
    decoders = [written_decoder(config, parameters, source) for source in range(L)]
    zero, one = torch.zeros(L, D, dtype=torch.float64), torch.ones(L, D, dtype=torch.float64)
    mean_in, std_in, mean_out, std_out = (getattr(clt, statistic) for statistic in STATISTICS)
    if mean_in is None:
        mean_in, std_in, mean_out, std_out = zero, one, zero, one
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions = mask.cumsum(1) - 1
    replaced = mask.bool() & (positions != 0) & (torch.ones_like(mask).bool() if counted is None else counted)
    seen, acts = {}, {}

    def replace(layer, output):
        x = (seen[layer] - mean_in[layer]) / std_in[layer]
        h = x @ parameters[f"encoders.{layer}.weight"].T + parameters[f"encoders.{layer}.bias"]
        a = activations(config, parameters, [h.flatten(0, 1)] * L, training=False)[layer].view(h.shape)
        a = a * replaced[..., None]
        for source, position, feature, value in interventions:
            for row, column in itertools.product(*map(range, input_ids.shape)):
                here = position is None or positions[row, column] == position
                if source == layer and here and replaced[row, column]:
                    a[row, column, feature] = value
        acts[layer] = a
        y = parameters[f"decoders.{layer}.bias"]
        for source in range(layer + 1):
            if layer - source < decoders[source].shape[1]:
                y = y + acts[source] @ decoders[source][:, layer - source]
        if config.skip_connection:
            y = y + x @ parameters[f"skips.{layer}.weight"]
        y = y * std_out[layer] + mean_out[layer]
        return torch.where(replaced[..., None], y, output) if layer in layers else output

    handles = []
    for layer, block in enumerate(model.get_submodule(blocks)):
        handles += [
            getattr(block, reads).register_forward_pre_hook(
                lambda _, args, layer=layer: seen.update({layer: args[0]})
            ),
            getattr(block, writes).register_forward_hook(lambda _, args, out, layer=layer: replace(layer, out)),
        ]
    with torch.set_grad_enabled(gradients):
        logits = model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions.clamp(min=0), use_cache=False
        ).logits
    for handle in handles:
        handle.remove()
    return logits, torch.stack([acts[layer] for layer in range(L)], dim=2).detach()


def assert_same(found, expected):
    logits, acts = expected
    torch.testing.assert_close(found.logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.features.to_dense(), acts, rtol=1e-9, atol=1e-9)


# -- layer by layer ---


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_layer_by_layer_equals_the_clt(fields, statistics):
    clt = clt_for(statistics=statistics, **fields)
    inputs, _ = random_batch(clt)
    found = LayerwiseReconstruction(clt, len(inputs))
    outputs = torch.stack([found(layer, inputs[:, layer]) for layer in range(L)], dim=1)
    with torch.no_grad():
        expected = clt.eval()(inputs)
    torch.testing.assert_close(outputs, expected.reconstruction, rtol=1e-12, atol=1e-12)
    for features, others in zip(found.features, expected.features.layers, strict=True):
        assert torch.equal(features.to_dense(), others.to_dense())


def test_layers_are_given_in_order():
    found = LayerwiseReconstruction(clt_for(), 2)
    with pytest.raises(ValueError, match=r"layer=1 .*in order"):
        found(1, torch.zeros(2, D).double())


# -- a forward pass ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_plain_hooks(name):
    model, clt = build(name), clt_for(name)
    found = ReplacementModel(model, clt)(tokens())
    expected = hooked(name, model, clt, tokens())
    assert_same(found, expected)
    with torch.no_grad():
        original = model(tokens()).logits
    # position 0 is not replaced, the others are, and differ
    torch.testing.assert_close(found.logits[:, 0], original[:, 0], rtol=1e-12, atol=1e-12)
    assert ((found.logits - original).abs().amax(dim=2)[:, 1:] > 1e-3).all()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_variants_equal_plain_hooks(fields, statistics):
    model, clt = build(), clt_for(statistics=statistics, **fields)
    assert_same(ReplacementModel(model, clt)(tokens()), hooked("gpt2", model, clt, tokens()))


def test_lazily_loaded_clt(tmp_path):
    clt = clt_for()
    clt.save_pretrained(tmp_path)
    lazy = CrossLayerTranscoder.from_pretrained(tmp_path, lazy=True)
    assert_same(ReplacementModel(build(), lazy)(tokens()), hooked("gpt2", build(), lazy, tokens()))


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], (1, 2)])
@pytest.mark.parametrize("fields", [{}, {"decoder_reach": 2, "skip_connection": True}])
def test_subset_of_layers(layers, fields):
    model, clt = build("llama"), clt_for("llama", **fields)
    found = ReplacementModel(model, clt, layers=layers)(tokens())
    assert_same(found, hooked("llama", model, clt, tokens(), layers=layers))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model, clt = build(name), clt_for(name)
    replaced = ReplacementModel(model, clt)
    ids, mask = padded(side)
    interventions = [(0, 1, 3, 2.5), (1, 4, 7, 1.5)]
    found = replaced(ids, mask, interventions=interventions)
    acts = found.features.to_dense()
    for row in range(len(ids)):
        here = mask[row].bool()
        fitting = [given for given in interventions if given[1] < mask[row].sum()]
        alone = replaced(ids[row][here][None], interventions=fitting)
        torch.testing.assert_close(found.logits[row][here], alone.logits[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(acts[row][here], alone.features.to_dense()[0], rtol=1e-9, atol=1e-9)
        assert not acts[row][~here].any()
    logits, expected = hooked(name, model, clt, ids, mask, interventions=interventions)
    torch.testing.assert_close(found.logits[mask.bool()], logits[mask.bool()], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(acts, expected, rtol=1e-9, atol=1e-9)


def test_excluded_positions_keep_their_mlp_outputs():
    model, clt = build(), clt_for(skip_connection=True)
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[0, 3] = counted[1, 4:6] = False
    replaced = ReplacementModel(model, clt)
    found = replaced(tokens(), counted=counted)
    assert_same(found, hooked("gpt2", model, clt, tokens(), counted=counted))
    assert not torch.allclose(found.logits, replaced(tokens()).logits)
    assert not found.features.to_dense()[~counted].any()
    # what nothing is replaced in is the language model itself
    for ids, mask in [(tokens(2, 1), None), (tokens(), torch.zeros(2, 9, dtype=torch.bool))]:
        found = replaced(ids, counted=mask)
        with torch.no_grad():
            assert torch.equal(found.logits, model(ids).logits)
        assert found.features.to_dense().shape == (*ids.shape, L, FEATURES)
        assert not found.features.to_dense().any()


def test_position_0_and_padding_are_excluded_whatever_counted_says():
    ids, mask = padded("left")
    replaced = ReplacementModel(build(), clt_for())
    found = replaced(ids, mask, counted=torch.ones_like(mask).bool())
    assert torch.equal(found.logits, replaced(ids, mask).logits)
    assert not found.features.to_dense()[mask.cumsum(1) <= 1].any()


def test_float32_model_with_a_clt_of_another_dtype():
    """Like for like: everything in float32 agrees with float64 to float32's rounding, the CLT in bfloat16 roughly."""
    model, clt = build("llama"), clt_for("llama", activation_fn="relu")
    expected = ReplacementModel(model, clt)(tokens()).logits
    model.float()
    for dtype, tolerance in [(torch.float64, 1e-3), (torch.float32, 1e-3), (torch.bfloat16, 0.3)]:
        found = ReplacementModel(model, clt.to(dtype))(tokens()).logits
        assert found.dtype == torch.float32
        assert (found - expected).norm() < tolerance * expected.norm()


def test_language_model_is_left_as_it_was():
    model, clt = build(), clt_for()
    with torch.no_grad():
        before = model(tokens()).logits
    replaced = ReplacementModel(model, clt)
    first = replaced(tokens())
    assert not first.logits.requires_grad
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)
    with pytest.raises(ValueError, match="value nan is not finite"):
        replaced(tokens(), interventions=[(0, 1, 0, math.nan)])
    other = ReplacementModel(model, clt, layers=[1])(tokens()).logits
    assert torch.equal(replaced(tokens()).logits, first.logits)
    assert not torch.allclose(other, first.logits)
    assert all(threshold.grad is None for threshold in clt.parameters())


# -- interventions ---


@pytest.mark.parametrize(
    "fields", [{}, {"activation_fn": "topk", "decoder_reach": 2}, {"decoder_tying": "per_target"}]
)
@pytest.mark.parametrize(
    "interventions",
    [
        [(0, 3, 5, 4.0)],
        [(1, None, feature, 0.0) for feature in range(12)],
        [(1, 2, 7, -1.0), (2, None, 0, 2.0), (1, None, 8, 3.0)],
        [(0, None, 5, 4.0), (0, 8, 5, 0.5)],
    ],
)
def test_interventions_equal_plain_hooks(fields, interventions):
    model, clt = build("gpt_neox"), clt_for("gpt_neox", **fields)
    replaced = ReplacementModel(model, clt)
    found = replaced(tokens(), interventions=interventions)
    assert_same(found, hooked("gpt_neox", model, clt, tokens(), interventions=interventions))
    assert not torch.allclose(found.logits, replaced(tokens()).logits)


def test_ablation_of_all_active_features_leaves_the_bias():
    """By hand: a layer whose features are all ablated writes b_dec, here 0, and its MLP is gone."""
    model, clt = build(), clt_for(num_layers=L)
    with torch.no_grad():
        for decoder in clt.decoders:
            decoder.bias.zero_()
    replaced = ReplacementModel(model, clt, layers=[0])
    acts = replaced(tokens()).features.to_dense()[:, :, 0]
    active = acts.flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
    found = replaced(tokens(), interventions=[(0, None, feature, 0) for feature in active])
    gone = ReplacementModel(model, lambda layer, inputs, outputs: torch.zeros(1).double(), layers=[0])
    torch.testing.assert_close(found.logits, gone(tokens()).logits, rtol=1e-12, atol=1e-12)
    assert not found.features.to_dense()[:, :, 0].any()


def test_intervention_on_a_layer_that_is_not_replaced_acts_on_later_ones():
    model, clt = build(), clt_for()
    found = ReplacementModel(model, clt, layers=[2])(tokens(), interventions=[(0, 4, 1, 6.0)])
    assert_same(found, hooked("gpt2", model, clt, tokens(), layers=[2], interventions=[(0, 4, 1, 6.0)]))


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        ((3, 1, 0, 1.0), r"interventions\[1\]=\(3, 1, 0, 1.0\): layer 3 .*0 to 2"),
        ((-1, 1, 0, 1.0), "layer -1 .*0 to 2"),
        ((0, 1, 24, 1.0), "feature 24 .*0 to 23"),
        ((0, 1, 0, math.inf), "value inf "),
        ((0, 1, 0), r"\(layer, position, feature, value\)"),
        ((0, 1.5, 0, 1.0), r"\(layer, position, feature, value\)"),
        ((0, 0, 0, 1.0), "no row .*replaced"),
        ((0, 9, 0, 1.0), "no row"),
        ((0, -1, 0, 1.0), "no row"),
        ((2, 1, 0, 1.0), r"layer 2 .*layers=\[0, 1\]"),
    ],
)
def test_interventions_that_cannot_work_are_refused(intervention, message):
    replaced = ReplacementModel(build(), clt_for(), layers=[0, 1])
    with pytest.raises(ValueError, match=message):
        replaced(tokens(), interventions=[(0, 1, 0, 1.0), intervention])


# -- generation ---


def continued(name, model, clt, ids, mask, steps, interventions=()):
    """Greedy decoding by full forward passes with plain hooks."""
    for _ in range(steps):
        logits, _ = hooked(name, model, clt, ids, mask, interventions=interventions)
        ids = torch.cat([ids, logits[:, -1].argmax(dim=1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("interventions", [(), [(0, None, 3, 5.0), (1, 6, 2, 9.0), (0, 10, 7, -8.0), (1, 2, 4, 6.0)]])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma3"])
def test_generate_equals_full_forward_passes(name, interventions, use_cache):
    model, clt = build(name), clt_for(name)
    ids, mask = padded("left", (7, 3, 1))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ReplacementModel(model, clt).generate(ids, mask, interventions=interventions, **options)
    assert not [warning for warning in caught if "loop" in str(warning.message)]
    assert torch.equal(found, continued(name, model, clt, ids, mask, 8, interventions))
    with torch.no_grad():
        assert not torch.equal(found, model.generate(ids, attention_mask=mask, **options))


def test_generate_steers():
    model, clt = build(), clt_for()
    replaced = ReplacementModel(model, clt)
    plain = replaced.generate(tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    # the last prompt position alone: what was generated before it cannot have changed
    steered = replaced.generate(
        tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None, interventions=[(0, 11, 3, 40.0)]
    )
    assert torch.equal(plain[:, :12], steered[:, :12])
    assert not torch.equal(plain, steered)
    with pytest.raises(ValueError, match="no row"):
        replaced.generate(tokens(), max_new_tokens=2, interventions=[(0, 0, 3, 40.0)])


def test_generate_with_excluded_positions():
    model, clt = build(), clt_for()
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[:, 2:7] = False
    found = ReplacementModel(model, clt).generate(
        tokens(), counted=counted, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    ids = tokens()
    for _ in range(4):
        logits, _ = hooked("gpt2", model, clt, ids, counted=counted)
        ids = torch.cat([ids, logits[:, -1].argmax(dim=1, keepdim=True)], dim=1)
        counted = torch.cat([counted, torch.ones(2, 1, dtype=torch.bool)], dim=1)
    assert torch.equal(found, ids)


def test_generate_stops_at_eos_and_passes_options_on():
    model, clt = build(), clt_for()
    replaced = ReplacementModel(model, clt)
    greedy = {"do_sample": False, "max_new_tokens": 6}
    everything = replaced.generate(tokens(1), eos_token_id=None, **greedy)
    stop = int(everything[0, 10])
    found = replaced.generate(tokens(1), eos_token_id=stop, return_dict_in_generate=True, output_logits=True, **greedy)
    end = 1 + int((everything[0, 9:] == stop).nonzero()[0])
    assert torch.equal(found.sequences, everything[:, : 9 + end])
    assert len(found.logits) == end


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_generate_with_several_rows_per_prompt(options):
    """Rows of the same prompt share its padding; without a cache each step computes the whole rows again."""
    ids, mask = padded("left", (6, 3))
    replaced = ReplacementModel(build(), clt_for())
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        given = {"max_new_tokens": 5, "eos_token_id": None, "use_cache": use_cache, "interventions": [(1, 4, 2, 9.0)]}
        found.append(replaced.generate(ids, mask, **given, **options))
    assert torch.equal(*found)
    assert len(found[0]) == (2 if "num_beams" in options else 6)


def test_generate_needs_padding_on_the_left():
    with pytest.raises(ValueError, match="pad on the left"):
        ReplacementModel(build(), clt_for()).generate(*padded("right"), max_new_tokens=1)


# -- what is refused ---


def test_clts_that_cannot_be_read_layer_by_layer_are_refused():
    with pytest.raises(ValueError, match=r"k_scope='token'.*k_scope='layer'"):
        ReplacementModel(build(), clt_for(activation_fn="topk", k_scope="token"))
    clt = clt_for(activation_fn="batchtopk")
    clt.restart_running_thresholds()
    with pytest.raises(ValueError, match="no running threshold yet"):
        ReplacementModel(build(), clt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 2}, "num_layers=2 .*num_layers=3"),
        ({"d_model": 8}, "d_model=8 .*d_model=16"),
    ],
)
def test_clt_of_another_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ReplacementModel(build(), clt_for(**fields))


@pytest.mark.parametrize("layers", [[], [3], [-1, 0]])
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers=.* 0 to 2; leave it out"):
        ReplacementModel(build(), clt_for(), layers=layers)


def test_what_is_no_clt_or_has_no_head_is_refused():
    with pytest.raises(ValueError, match=r"clt is a str.*CrossLayerTranscoder"):
        ReplacementModel(build(), "user/clt-gpt2")
    with pytest.raises(ValueError, match=r"GPT2Model.*AutoModelForCausalLM"):
        ReplacementModel(build(auto=AutoModel), clt_for())


def test_tokens_that_do_not_fit_are_refused():
    model = build()
    replaced = ReplacementModel(model, clt_for())
    with pytest.raises(ValueError, match=r"counted .*\(2, 8\).*\(2, 9\)"):
        replaced(tokens(), counted=torch.ones(2, 8).bool())
    with pytest.raises(ValueError, match=r"attention_mask .*\(9,\)"):
        replaced(tokens(), attention_mask=torch.ones(9))
    with pytest.raises(ValueError, match=r"input_ids .*\(9,\).*\(prompts, tokens\)"):
        replaced(tokens()[0])
    with pytest.raises(ValueError, match=f"to {VOCABULARY} do not fit"):
        replaced(tokens() + VOCABULARY - tokens().max())
    with pytest.raises(ValueError, match="context_size is 33"):
        replaced(tokens(1, 33))
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        replaced(tokens())


def test_function_has_no_features():
    replaced = ReplacementModel(build(), lambda layer, inputs, outputs: outputs)
    assert replaced(tokens()).features is None
    with pytest.raises(ValueError, match="a function stands in"):
        replaced(tokens(), interventions=[(0, 1, 0, 1.0)])


def test_a_function_reads_at_the_hooks_that_are_given():
    model, seen = build(), {}
    for hook in ("hook_resid_mid", "mlp.hook_in"):
        read = []
        replaced = ReplacementModel(
            model, lambda layer, x, y, read=read: read.append(x) or y, hooks=(hook, "hook_mlp_out")
        )
        replaced(tokens())
        seen[hook] = read
    norm = model.transformer.h[0].ln_2
    torch.testing.assert_close(norm(seen["hook_resid_mid"][0]), seen["mlp.hook_in"][0])
    with pytest.raises(ValueError, match=r"hooks=.* are given for a CLT"):
        ReplacementModel(model, clt_for(), hooks=("mlp.hook_in", "hook_mlp_out"))


# -- metrics ---


def batch_of(ids, mask, excluded=()):
    """A batch as a TokenStream gives it."""
    counted = (mask.cumsum(1) > 1) & mask.bool()
    for row, column in excluded:
        counted[row, column] = False
    documents = torch.where(mask.bool(), torch.arange(len(ids))[:, None], -1)
    return {"input_ids": ids, "attention_mask": mask, "counted": counted, "documents": documents}


def rows_of(batch, *rows):
    return {name: values[list(rows)] for name, values in batch.items()}


def expected_metrics(name, model, clt, batch, layers=range(L)):
    """The definitions, one prediction at a time."""
    ids, mask, counted = batch["input_ids"], batch["attention_mask"], batch["counted"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    blocks, writes = model.get_submodule(ARCHITECTURES[name][3]), ARCHITECTURES[name][5]
    outputs = {}
    handles = [
        getattr(block, writes).register_forward_hook(lambda _, args, out, layer=layer: outputs.update({layer: out}))
        for layer, block in enumerate(blocks)
    ]
    with torch.no_grad():
        original = model(**given).logits
    for handle in handles:
        handle.remove()
    means = [outputs[layer][counted].mean(dim=0) for layer in range(L)]
    handles = [
        getattr(blocks[layer], writes).register_forward_hook(
            lambda _, args, out, layer=layer: torch.where(counted[..., None], means[layer], out)
        )
        for layer in layers
    ]
    with torch.no_grad():
        ablated = model(**given).logits
    for handle in handles:
        handle.remove()
    replaced, _ = hooked(name, model, clt, ids, mask, counted, layers)

    rows = []
    for row, column in itertools.product(range(ids.shape[0]), range(ids.shape[1] - 1)):
        if counted[row, column] and mask[row, column + 1]:
            target = ids[row, column + 1]
            logits = [values[row, column] for values in (original, replaced, ablated)]
            p, q = logits[0].softmax(0), logits[1].softmax(0)
            rows.append(
                [F.cross_entropy(values, target) for values in logits]
                + [(p * (p / q).log()).sum(), (p.argmax() == q.argmax()).double()]
            )
    values = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    metrics = dict(zip(("ce_original", "ce_replaced", "ce_ablated", "kl", "top1_agreement"), values, strict=True))
    metrics["ce_recovered"] = (values[2] - values[1]) / (values[2] - values[0])
    return {**metrics, "num_predictions": len(rows)}


@pytest.mark.parametrize(
    ("name", "side"),
    # Gemma 2's attention of padding on the left is NaN in float64, in the language model itself
    [("gpt2", "left"), ("gpt_neox", "right"), ("llama", "right"), ("qwen3", "left"), ("gemma2", "right")],
)
def test_metrics_equal_their_definitions(name, side, monkeypatch):
    monkeypatch.setattr(replacement_module, "PREDICTIONS_AT_A_TIME", 4)
    model, clt = build(name), clt_for(name)
    batch = batch_of(*padded(side), excluded=[(0, 5)])
    found = replacement_metrics(model, clt, [batch])
    assert found == pytest.approx(expected_metrics(name, model, clt, batch), rel=1e-9, abs=1e-12)
    # by hand: of 9, 5 and 2 tokens, the first predicts at an excluded place and the last has nothing to predict;
    # column 5 is a token's in row 0 on either side
    assert found["num_predictions"] == (7 - 1) + 3 + 0


def test_metrics_with_a_subset_of_layers():
    model, clt = build(), clt_for(skip_connection=True, statistics=True)
    batch = batch_of(*padded("right"))
    found = replacement_metrics(model, clt, [batch], layers=[0, 2])
    assert found == pytest.approx(expected_metrics("gpt2", model, clt, batch, layers=[0, 2]), rel=1e-9, abs=1e-12)


def test_metrics_do_not_depend_on_the_batch_size():
    model, clt = build(), clt_for()
    batch = batch_of(*padded("right", (9, 5, 2, 7)), excluded=[(3, 2)])
    found = replacement_metrics(model, clt, [batch])
    nothing = {**rows_of(batch, 0), "counted": torch.zeros(1, 9, dtype=torch.bool)}
    for batches in ([rows_of(batch, row) for row in range(4)], [rows_of(batch, 2, 1), nothing, rows_of(batch, 3, 0)]):
        assert replacement_metrics(model, clt, batches) == pytest.approx(found, rel=1e-9)


def test_metrics_over_two_processes():
    """Processes in lockstep: each sees at every reduction the sum of what both gave."""
    model, clt = build(), clt_for()
    batch = batch_of(*padded("right", (9, 5, 2, 7)))
    parts = [[rows_of(batch, 0)], [rows_of(batch, 1, 2), rows_of(batch, 3)]]
    known = []  # the sums of the reductions that both processes have reached
    for _ in range(3):
        given, found = [[], []], []
        for process, part in enumerate(parts):

            def reduce(tensor, mine=given[process]):
                mine.append(tensor)
                return known[len(mine) - 1].clone() if len(mine) <= len(known) else tensor

            found.append(replacement_metrics(model, clt, part, reduce=reduce))
        assert len(given[0]) == len(given[1]) == 2
        known.append(given[0][len(known)] + given[1][len(known)]) if len(known) < 2 else None
    assert found[0] == found[1]
    assert found[0] == pytest.approx(replacement_metrics(model, clt, [batch]), rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3", "phi"])
def test_exact_mlps_in_place_of_the_clt(name):
    """The language model's own MLPs, computed from what the features would read: nothing changes."""
    model = build(name)
    blocks, reads = model.get_submodule(ARCHITECTURES[name][3]), ARCHITECTURES[name][4]

    def exact(layer, inputs, outputs):
        block = blocks[layer]
        written = block.mlp(inputs if reads == "mlp" else getattr(block, reads)(inputs))
        if reads == "pre_feedforward_layernorm":
            written = block.post_feedforward_layernorm(written)
        torch.testing.assert_close(written, outputs, rtol=1e-9, atol=1e-9)
        return written

    found = replacement_metrics(model, exact, [batch_of(*padded("right"))])
    assert found["kl"] == pytest.approx(0, abs=1e-12)
    assert found["top1_agreement"] == 1
    assert found["ce_replaced"] == pytest.approx(found["ce_original"], rel=1e-12)
    assert found["ce_recovered"] == pytest.approx(1, rel=1e-9)
    assert found["ce_ablated"] != pytest.approx(found["ce_original"], rel=1e-6)


def test_outputs_given_back_change_no_bit():
    found = replacement_metrics(build(), lambda layer, inputs, outputs: outputs, [batch_of(*padded("right"))])
    assert (found["kl"], found["top1_agreement"], found["ce_recovered"]) == (0, 1, 1)


def test_uniform_predictions_by_hand():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = replacement_metrics(model, clt_for("llama"), [batch_of(tokens(), torch.ones(2, 9, dtype=torch.long))])
    for name in ("ce_original", "ce_replaced", "ce_ablated"):
        assert found[name] == pytest.approx(math.log(VOCABULARY), rel=1e-12)
    assert (found["kl"], found["top1_agreement"], found["num_predictions"]) == (0, 1, 14)
    assert found["ce_recovered"] is None


def test_sums_by_hand():
    """p = (3/4, 1/4), q = (1/4, 3/4): KL = 3/4·ln 3 - 1/4·ln 3; the ablation is uniform; twice, with other targets."""
    three = math.log(3)
    original, replaced, ablated = (torch.tensor([row, row]) for row in ([three, 0.0], [0.0, three], [1.0, 1.0]))
    sums = prediction_sums(original, replaced, ablated, torch.tensor([0, 1]))
    ce = math.log(4 / 3) + math.log(4)
    assert sums.tolist() == pytest.approx([ce, ce, 2 * math.log(2), three, 0, 2], rel=1e-6)
    sums = prediction_sums(original[:1], original[:1], ablated[:1], torch.tensor([0]))
    assert sums.tolist() == pytest.approx([math.log(4 / 3), math.log(4 / 3), math.log(2), 0, 1, 1], rel=1e-6)


def test_batches_that_can_be_read_once_are_refused():
    batch = batch_of(*padded("right"))
    with pytest.raises(ValueError, match=r"batches .*list\(batches\)"):
        replacement_metrics(build(), clt_for(), iter([batch]))


def test_no_prediction():
    with pytest.raises(ValueError, match=r"no prediction.*eval_tokens"):
        replacement_metrics(build(), clt_for(), [batch_of(*padded("right", (2, 2)))])
