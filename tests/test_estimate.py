"""What a run needs, on paper: counted sizes against real ones, counts by hand, and rates that are found again."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import rates
from benchmarks.cases import Case
from benchmarks.measure import optimizer_bytes
from benchmarks.rates import solve_rates
from benchmarks.run import measure_in_process
from hf_clt import CLTConfig, CLTTrainingArguments, CrossLayerTranscoder, estimate, modeling_clt
from hf_clt.commands import estimate as estimate_clt
from hf_clt.estimate import SHAPES, LanguageModel, Plan, data_sheet_rates, memory, seconds, work
from hf_clt.kernels import decode, triton_layers
from hf_clt.training.optimizers import make_optimizer


def make_config(**kwargs):
    return CLTConfig(
        **{"num_layers": 3, "d_model": 8, "num_features": 16, "activation_fn": "batchtopk", "k": 4, **kwargs}
    )


LM = LanguageModel(num_layers=3, d_model=8, num_parameters=1000, flops_per_token=500.0, intermediate_size=32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adam_compact"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"activation_fn": "jumprelu"}, {"decoder_tying": "per_source"}, {"decoder_tying": "per_target"}]
    + [{"skip_connection": True}, {"decoder_reach": 1}],
    ids=str,
)
def test_the_state_is_that_of_a_real_run(kwargs, optimizer, dtype):
    plan = Plan(make_config(**kwargs), l0=4, optimizer=optimizer, clt_dtype=dtype)
    clt = CrossLayerTranscoder(plan.config)
    clt.cast_decoders(getattr(torch, dtype))
    made = make_optimizer(clt, CLTTrainingArguments(optimizer=optimizer, learning_rate=1e-3))
    clt(torch.randn(5, 3, 8), labels=torch.randn(5, 3, 8)).loss.backward()
    made.step()
    parts = memory(plan)
    assert parts["parameters"] == sum(p.nbytes for p in clt.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in clt.parameters() if p.grad is not None)
    steps = sum(4 for state in made.state.values() if "step" in state)
    assert parts["optimizer"] == optimizer_bytes(made) - steps


def test_n_processes_hold_a_share_each():
    plan = Plan(make_config(num_features=64), LM, processes=8, feature_parallel_size=1, l0=4)
    whole, quarter = memory(plan), memory(replace(plan, feature_parallel_size=4))
    biases = 3 * 8 * 4  # of the decoders: every process has them
    for name, copies in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert quarter[name] - copies * biases == (whole[name] - copies * biases) / 4
    assert quarter["language_model"] == whole["language_model"] == 2000


def test_counts_by_hand():
    # 3 layers of 16 features, width 8; targets 3 + 2 + 1; 2 processes with 10 tokens each share the features.
    plan = Plan(make_config(), LM, processes=4, feature_parallel_size=2, batch_size=10, l0=4)
    counts = work(plan)
    assert counts["products"] == 2 * 20 * 8 * 8 * 3
    assert counts["select"] == 4 * 20 * 8 * 3
    assert counts["gather"] == 20 * 2 * 6 * 8 * 4  # two of the four active features are here
    assert counts["gather_back"] == 20 * 2 * (2 * 6 + 3) * 8 * 4
    assert counts["norms"] == 0  # top-k has no sparsity loss
    parameters = 3 * 8 * 8 + 3 * 8 + 8 * 6 * 8 + 3 * 8
    assert counts["gradients"] == 4 * parameters
    assert counts["update"] == 7 * 4 * parameters
    assert counts["language_model"] == 5000  # its own tokens only
    assert counts["shared"] == 20 * 3 * 8 * (2 * 2 + 8) / 2  # from a buffer in bfloat16, as the model
    assert counts["averaged"] == 4 * parameters  # ring over 2 replicas
    one = work(replace(plan, processes=1, feature_parallel_size=1))
    assert one["shared"] == one["averaged"] == 0
    assert work(Plan(make_config(activation_fn="jumprelu"), l0=4))["norms"] == 16 * 6 * 8 * 4
    assert work(Plan(make_config(activation_fn="jumprelu", sparsity_lambda=0), l0=4))["norms"] == 0
    assert work(Plan(make_config(decoder_reach=1), batch_size=10, l0=4))["gather"] == 10 * 4 * 3 * 8 * 4


def test_dead_features_by_hand():
    # As above, on one process with 10 tokens: 3 of the dead features for each token and layer.
    plan = Plan(make_config(aux_k=3), batch_size=10, l0=4, dead=0.25)
    none, some = work(replace(plan, dead=0.0)), work(plan)
    assert some["gather"] == none["gather"] / 4 * (4 + 3)
    assert some["gather_back"] == none["gather_back"] / 4 * (4 + 3)
    assert some["select"] == 2 * none["select"]
    assert work(replace(plan, dead=0.5)) == some  # as many, however many are dead
    # All gradients and 4 numbers like the batch; with dead features the decoders' alone and 9.
    batch, encoders = 4 * 10 * 3 * 8, 4 * 3 * 16 * 8
    assert memory(replace(plan, dead=0.0))["step"] == 4 * batch + 40 * 10 * 3 * 4
    assert memory(plan)["step"] == 9 * batch - encoders + 40 * 10 * 3 * (4 + 3)
    # The encoder rows of a quarter of the features are read; zeros, these rows and their sum are written.
    plan = Plan(make_config(activation_fn="jumprelu"), batch_size=10, l0=4, dead=0.25)
    none, some = work(replace(plan, dead=0.0)), work(plan)
    assert some["gather"] - none["gather"] == encoders / 4
    assert some["gradients"] - none["gradients"] == 3 * encoders
    changed = {"gather", "gradients"}
    assert {name for name in some if some[name] != none[name]} == changed


@pytest.mark.parametrize(
    "kwargs", [{"aux_k": 0}, {"aux_coef": 0.0}, {"activation_fn": "relu", "preactivation_coef": 0.0}], ids=str
)
def test_dead_features_that_no_loss_revives_cost_nothing(kwargs):
    plan = Plan(make_config(**kwargs), l0=4, dead=0.3)
    none = replace(plan, dead=0.0)
    assert (work(plan), memory(plan)) == (work(none), memory(none))


def test_jumprelu_lists_more_than_is_active():
    plan = Plan(make_config(activation_fn="jumprelu"), l0=4)
    assert plan.listed_per_layer == 4 * estimate.WINDOW
    assert replace(plan, listed=5).listed_per_layer == 5
    assert replace(plan, l0=15).listed_per_layer == 16  # there are no more


@pytest.mark.parametrize(
    "name",
    ["A autocast", "B autocast", "A200 autocast", "A bfloat16", "B bfloat16", "A200 bfloat16", "C bfloat16"]
    + ["A autocast dead 0.3", "B autocast dead 0.3", "A200 autocast dead 0.3", "C bfloat16 dead 0.3"],
)
def test_memory_that_an_h200_took(name):
    pieces = json.loads((Path(__file__).parents[1] / "benchmarks/gpu_check_h200.json").read_text())["pieces"]
    (row,) = pieces[f"update {name}"]["rows"]
    case = Case(**{**row["case"], "device": "cpu"})
    plan = replace(rates.plan_of(case), product_dtype="bfloat16", dead=case.dead, on_gpu=True)
    tolerance = 0.035 if case.dead else 0.025
    assert memory(plan)["total"] == pytest.approx(row["ours"]["peak_bytes"], rel=tolerance)


def test_what_a_gpu_passes_by_hand():
    # As above, on one process with 10 tokens, 4 of 16 features: 960 numbers of decoder rows forward and backward, 320
    # of input rows backward, mostly from the cache; 336 encoder and 768 decoder weights and biases.
    plan = Plan(make_config(), batch_size=10, l0=4, on_gpu=True)
    sheet, entries = estimate.DEVICES["H100"], 10 * 4
    rows, inputs = entries * 6 * 8, entries * 3 * 8

    def spent(**changes):
        changed = replace(plan, **changes)
        return seconds(changed, data_sheet_rates("H100", changed)), work(changed)

    stream = 0.6 * sheet["stream"]
    found, counts = spent()
    rest = counts["products"] / (0.4 * sheet["float32"]) + 2 * counts["select"] / stream
    assert found["forward"] == pytest.approx(rest + 4 * rows / sheet["cache"])
    assert found["backward"] == pytest.approx(
        (4 * rows + 4 * inputs) / sheet["cache"] + 2 * counts["gradients"] / stream
    )
    weights = 3 * 16 * 8 + 3 * 16 + 6 * 16 * 8 + 3 * 8
    assert found["optimizer"] == pytest.approx(8 * 4 * weights / stream)
    # Where layers are worked on one by one, each decoder gathers twice.
    alone, _ = spent(config=make_config(k_scope="token"))
    assert alone["backward"] - found["backward"] == pytest.approx(4 * rows / sheet["cache"])
    # Autocast gathers gradients in bfloat16, and computes values again; rows read 2.5 times are not rounded.
    rough, _ = spent(product_dtype="bfloat16")
    assert found["backward"] - rough["backward"] == pytest.approx(2 * rows / sheet["cache"])
    rest = counts["products"] / (0.4 * sheet["bfloat16"]) + 2 * counts["select"] / stream
    assert rough["forward"] == pytest.approx(rest + (4 * rows + 4 * inputs) / sheet["cache"])
    # 40 tokens read them 10 times: 6 bytes of memory for each weight, 2 of the cache.
    often, counts = spent(product_dtype="bfloat16", batch_size=40)
    rest = counts["products"] / (0.4 * sheet["bfloat16"]) + (2 * counts["select"] + 6 * 6 * 16 * 8) / stream
    assert often["forward"] == pytest.approx(rest + (2 * 4 * rows + 4 * 4 * inputs) / sheet["cache"])


def test_numbers_that_are_kept_twice_agree():
    assert estimate.ROUND_ABOVE == decode.ROUND_ABOVE
    assert estimate.POSTING_BYTES == triton_layers.POSTING_BYTES
    assert estimate.ENCODED_BYTES == modeling_clt.ENCODED_BYTES


def test_rates_are_found_again():
    base = Case(num_layers=12, d_model=64, num_features=4096, tokens=512, l0=32, activation_fn="jumprelu")
    plans = [rates.plan_of(rates.scale(base, shares)) for shares in rates.CALIBRATION]
    true = {"products": 1e11, "select": 2e10, "gather_forward": 3e9, "norms_forward": 5e9}
    true |= {"gather_backward": 2e9, "gradients": 1e10, "norms_backward": 4e9, "update": 2e10}
    true |= {"language_model": math.inf, "shared": math.inf, "averaged": math.inf}
    measured = [seconds(plan, true) for plan in plans]
    found = solve_rates(plans, measured)
    # Not each rate: products and pre-activations to look through go together at one width.
    for phase in ("forward", "backward", "optimizer"):
        for plan, row in zip(
            [*plans, rates.plan_of(base)], [*measured, seconds(rates.plan_of(base), true)], strict=True
        ):
            assert seconds(plan, found)[phase] == pytest.approx(row[phase], rel=1e-3)
    assert found["update"] == pytest.approx(true["update"], rel=1e-6)


def test_no_work_takes_a_negative_time():
    matrix = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
    found = rates.nonnegative_least_squares(matrix, matrix @ torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert found == pytest.approx([3.0, 0.5])
    target = matrix @ torch.tensor([3.0, -0.5], dtype=torch.float64)
    found = rates.nonnegative_least_squares(matrix, target)
    assert found == pytest.approx([target.mean().item(), 0.0])  # the best without the second


@pytest.mark.parametrize("name", SHAPES)
def test_known_language_models_are_as_their_authors_say(name):
    billions = {"gpt2": 0.124, "Llama-3.2-1B": 1.236, "gemma-2-2b": 2.614, "Llama-3.1-8B": 8.030}
    model = estimate.read_language_model(name, 128)
    assert model.num_parameters / 1e9 == pytest.approx(billions[name.partition("/")[2]], abs=5e-4)


def test_operations_of_a_language_model(tiny_gpt2):
    model = estimate.read_language_model(tiny_gpt2, 32)
    config = AutoConfig.from_pretrained(tiny_gpt2)
    real = AutoModelForCausalLM.from_config(config)
    blocks = sum(p.numel() for p in real.transformer.h.parameters())
    assert model.flops_per_token == 2 * blocks + config.num_hidden_layers * 2 * config.hidden_size * 32
    assert model.num_parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.slow
def test_memory_of_a_measured_step():
    # Resident memory of a small process: allocators round, hence 15 %; docs/scale.md has larger shapes.
    case = Case(num_layers=6, d_model=256, num_features=4096, tokens=1024, l0=32, activation_fn="topk", steps=1)
    run = measure_in_process({"kind": "step", "case": case.to_dict(), "side": "ours"})
    if run["peak_bytes"] is None:
        pytest.skip("the system does not say how much memory a process takes")
    row = rates.compare_step(case, run, dict.fromkeys([n for p in estimate.PHASES.values() for n in p.values()], 1e9))
    assert row["bytes"]["error"] == pytest.approx(0, abs=0.15)


def test_the_fewest_processes_that_fit():
    plan = Plan(make_config(num_features=64), LM, processes=8, batch_size=8, l0=4)
    sizes = {n: memory(replace(plan, feature_parallel_size=n))["total"] for n in (1, 2, 4, 8)}
    assert estimate.smallest_that_fits(plan, sizes[1]).feature_parallel_size == 1
    assert estimate.smallest_that_fits(plan, sizes[1] - 1).feature_parallel_size == 2
    assert estimate.smallest_that_fits(plan, 1000) is None
    fitting = estimate.smallest_that_fits(plan, sizes[1] - 1, tokens_at_once=8)
    assert (fitting.feature_parallel_size, fitting.batch_size) == (2, 4)


def test_the_script_plans(capsys):
    argv = ["--model", "openai-community/gpt2", "--num-features", "6144", "--processes", "8"]
    assert estimate_clt.main(argv) == 0
    out = capsys.readouterr().out
    assert "12 layers, width 768, 6,144 features" in out and "modelled, not measured" in out
    assert "a CLT on 1 of them" in out and "hours for 1,000,000,000 tokens" in out
    assert "dead" not in out
    assert estimate_clt.main([*argv, "--dead", "0.3", "--aux-k", "64"]) == 0
    with_dead = capsys.readouterr().out.splitlines()
    line = with_dead.pop(-3)
    assert with_dead == out.splitlines()  # the row stands beside
    assert line.startswith("with 30% of the features dead and revived: ")
    assert estimate_clt.main(["--scale"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n| ") == len(SHAPES) * 6 and "does not fit" in out


def test_the_script_takes_measured_rates(tiny_gpt2, tmp_path, capsys):
    file = tmp_path / "rates.json"
    names = [name for parts in estimate.PHASES.values() for name in parts.values()]
    file.write_text(json.dumps({"device": "a slow one", "rates": {**dict.fromkeys(names, 1e6), "shared": None}}))
    argv = ["--model", tiny_gpt2, "--num-features", "64", "--l0", "4", "--device", "cpu", "--rates", str(file)]
    assert estimate_clt.main(argv) == 0
    assert "rates measured on a slow one" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], ["model is missing", "--scale"]),
        (["--model", "./no/such/model"], ["./no/such/model", "openai-community/gpt2"]),
        (["--model", "openai-community/gpt2", "--device", "cpu"], ["device='cpu'", "--rates"]),
        (["--model", "openai-community/gpt2", "--processes", "0"], ["processes=0"]),
        (["--model", "openai-community/gpt2", "--l0", "0"], ["l0=0"]),
        (["--model", "openai-community/gpt2", "--dead", "30"], ["dead=30", "less than 1"]),
        (["--model", "openai-community/gpt2", "--dead", "0.3", "--aux-k", "-1"], ["aux_k=-1"]),
        (["--model", "openai-community/gpt2", "--processes", "6", "--feature-parallel-size", "4"], ["4", "6"]),
        (["--model", "openai-community/gpt2", "--processes", "2", "--num-features", "15", "--l0", "3"]
         + ["--feature-parallel-size", "2"], ["num_features=15"]),
        (["--model", "meta-llama/Llama-3.1-8B"], ["processes=1", "adam_compact"]),
        (["--model", "openai-community/gpt2", "--device", "TPU"], ["--device", "TPU"]),
        (["--model", "openai-community/gpt2", "--rates", "no/such/file.json"], ["no/such/file.json"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)  # fmt: skip
def test_wrong_options_give_one_line(argv, expected, capsys):
    assert estimate_clt.main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]
