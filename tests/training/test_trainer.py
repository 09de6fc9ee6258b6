"""
The trainer on a tiny language model: what it learns, writes, measures and restores, against independent computations.
"""

import json
import logging
import math
import os
import shutil
import signal
from importlib.util import find_spec

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, GPT2LMHeadModel

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.evaluation.replacement import replacement_metrics
from hf_clt.harvest.harvester import ActivationError
from hf_clt.hub.card import card_from_folder
from hf_clt.hub.facts import read_facts
from hf_clt.kernels import encode
from hf_clt.training import setup
from hf_clt.training.checkpoints import list_checkpoints
from hf_clt.training.optimizers import make_optimizer
from hf_clt.training.output_folder import lock_folder
from hf_clt.training.reporting import command_line
from hf_clt.training.schedules import initial_steering, learning_rate_scale, steer_sparsity


ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
STATISTICS = ("mean_in", "std_in", "mean_out", "std_out")
SCALARS = ("nmse", "explained_variance", "l0", "dead_fraction")
LOSSES = ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")
FROZEN = 1e-12  # a learning rate that changes no weight that matters


def make_trainer(model, text, output_dir, config, arguments):
    # One process may have one Accelerator; a test may want another precision than the one before.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    defaults = {
        "model": model,
        "dataset": text,
        "context_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,  # 496 tokens of about 1,300
        "batch_size": 64,
        "eval_tokens": 300,
        "normalization_estimation_batches": 4,
        "training_steps": 4,
        "log_interval": 1,
        "eval_interval": 0,
        "checkpoint_interval": 0,
        "disable_progress_bar": True,
        "output_dir": str(output_dir),
    }
    args = CLTTrainingArguments(**(defaults | arguments))
    if isinstance(config, CrossLayerTranscoder):
        return CLTTrainer(args, model=config)
    return CLTTrainer(
        args, CLTConfig(**({"num_layers": 2, "d_model": 64, "num_features": 96, "k": 6} | (config or {})))
    )


def rows_of(folder, split=None):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if split is None or row["split"] == split]


def recorded(trainer, stop_at=None):
    """A list that will hold the batches the trainer trains on; Ctrl-C comes while it works on batch `stop_at`."""
    endless, batches = trainer.buffer.endless, []

    def recording():
        for batch in endless():
            batches.append({name: rows.clone() for name, rows in batch.items()})
            if len(batches) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    trainer.buffer.endless = recording
    return batches


def released(folder):
    return {name: value for path in sorted(folder.glob("W_*.safetensors")) for name, value in load_file(path).items()}


def harvest_all(trainer, tokens):
    """Inputs and labels of all counted tokens of a stream, by plain forward hooks on the language model."""
    model = trainer.harvester.model
    caught, inputs, labels = {}, [], []
    handles = [
        handle
        for layer, block in enumerate(model.transformer.h)
        for handle in (
            block.ln_2.register_forward_pre_hook(lambda m, args, i=layer: caught.update({("in", i): args[0]})),
            block.mlp.register_forward_hook(lambda m, args, out, i=layer: caught.update({("out", i): out})),
        )
    ]
    with torch.no_grad():
        for batch in tokens:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for side, rows in (("in", inputs), ("out", labels)):
                rows.append(torch.stack([caught[side, layer] for layer in range(2)], dim=2)[batch["counted"]])
    for handle in handles:
        handle.remove()
    return torch.cat(inputs), torch.cat(labels)


def float64_clt(folder, inputs):
    """Features (N, L, F) and reconstruction (N, L, D) in float64, by the formulas of the released files."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: value.double() for name, value in released(folder).items()}
    features = []
    for s in range(2):
        h = inputs[:, s].double() @ weights[f"W_enc_{s}"].T + weights[f"b_enc_{s}"]
        if config["activation_fn"] == "relu":
            acts = h.clamp(min=0)
        elif config["activation_fn"] == "topk":
            smallest = h.topk(config["k"], dim=1).values[:, -1:]
            acts = torch.where(h >= smallest, h, 0).clamp(min=0)
        else:
            acts = torch.where(h > weights[f"threshold_{s}"], h, 0)
        features.append(acts)
    reconstruction = torch.stack([weights[f"b_dec_{t}"].expand(len(inputs), -1) for t in range(2)], dim=1)
    for s in range(2):
        for t in range(s, 2):
            reconstruction[:, t] += features[s] @ weights[f"W_dec_{s}"][:, t - s]
    return torch.stack(features, dim=1), reconstruction


# One run for each activation function, looked at from several sides


@pytest.fixture(scope="module", params=ACTIVATIONS)
def run(request, tiny_gpt2, small_text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(
        tiny_gpt2,
        small_text_file,
        folder,
        {"activation_fn": request.param, "sparsity_lambda": 0.1 if "relu" in request.param else None},
        {"training_steps": 40, "learning_rate": 1e-2, "batch_size": 128, "log_interval": 5, "eval_interval": 20},
    )
    trainer.heldout_before = list(trainer.heldout)
    clt = trainer.train()
    return trainer, clt, folder


def test_it_learns(run):
    _, _, folder = run
    train, heldout = rows_of(folder, "train"), rows_of(folder, "heldout")
    # The first row is of tokens that the decoders at the start were fitted to.
    assert train[-1]["reconstruction_loss"] < 0.9 * train[1]["reconstruction_loss"]
    assert train[-1]["nmse"] < 0.9 * train[1]["nmse"]
    assert heldout[-1]["nmse"] < heldout[0]["nmse"] < 1
    assert all(value > 0.1 for value in heldout[-1]["explained_variance_per_layer"])


def test_nothing_of_the_trainer_stays_on_what_it_returns(run):
    assert not {"forward", "_original_forward", "threshold_decay"} & vars(run[1]).keys()


def test_the_files_of_a_release(run):
    _, clt, folder = run
    names = {path.name for path in folder.iterdir()}
    layers = {f"W_{kind}_{layer}.safetensors" for kind in ("enc", "dec") for layer in range(2)}
    assert names >= layers | {
        "config.json",
        "config.yaml",
        "model.safetensors.index.json",
        "README.md",
        "metrics.jsonl",
    }
    assert not any(name.startswith(".") or name.endswith((".pt", ".bin", ".pkl")) for name in names)
    has_threshold = clt.config.activation_fn in ("jumprelu", "batchtopk")
    for layer in range(2):
        encoder = load_file(folder / f"W_enc_{layer}.safetensors")
        shapes = {"W_enc": (96, 64), "b_enc": (96,), "b_dec": (64,)} | ({"threshold": (96,)} if has_threshold else {})
        assert {name: tuple(value.shape) for name, value in encoder.items()} == {
            f"{name}_{layer}": shape for name, shape in shapes.items()
        }
        assert load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"].shape == (96, 2 - layer, 64)


def test_what_is_loaded_computes_what_was_trained(run):
    trainer, clt, folder = run
    assert not clt.training
    assert clt.mean_in is not None  # statistics stay in the live model
    inputs, _ = harvest_all(trainer, trainer.heldout)
    for loaded in (CrossLayerTranscoder.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert loaded.mean_in is None
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, atol=2e-4, rtol=2e-4)
            active, expected = loaded.encode(inputs) > 0, clt.encode(inputs) > 0
        assert (active == expected).float().mean() > 0.9999


def test_the_metrics_are_those_of_a_float64_computation(run):
    trainer, _, folder = run
    metrics = trainer.evaluate()
    assert rows_of(folder, "heldout")[-1] == {"step": 40, "split": "heldout", **metrics}
    inputs, labels = harvest_all(trainer, trainer.heldout)
    assert metrics["num_tokens"] == len(labels) >= 300
    features, reconstruction = float64_clt(folder, inputs)
    labels = labels.double()
    error = (labels - reconstruction).square().sum(dim=(0, 2))
    deviation = (labels - labels.mean(dim=0)).square().sum(dim=(0, 2))
    active = features > 0
    expected = {
        "nmse": error / deviation,
        "explained_variance": 1 - error / deviation,
        "l0": active.sum(dim=(0, 2)) / len(labels),
        "dead_fraction": (~active.any(dim=0)).double().mean(dim=1),
    }
    for name, per_layer in expected.items():
        # A pre-activation within rounding of its threshold may fall on either side.
        tolerance = {"abs": 0.02} if name in ("l0", "dead_fraction") else {"abs": 2e-4}
        assert metrics[f"{name}_per_layer"] == pytest.approx(per_layer.tolist(), **tolerance)
        total = per_layer.sum() if name == "l0" else per_layer.mean()
        assert metrics[name] == pytest.approx(total.item(), **tolerance)


def test_the_lines_of_metrics(run):
    trainer, clt, folder = run
    rows = rows_of(folder)
    train, heldout = rows_of(folder, "train"), rows_of(folder, "heldout")
    assert [row["step"] for row in train] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [row["step"] for row in heldout] == [20, 40]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for row in rows:
        for name in SCALARS:
            assert name in row and f"{name}_per_layer" in row
            if row[name] is not None:
                assert math.isfinite(row[name])
                assert len(row[f"{name}_per_layer"]) == 2
    for row in train:
        terms = sum(row[name] for name in LOSSES[1:])
        assert row["loss"] == pytest.approx(terms, rel=1e-5)
        assert row["l0"] == pytest.approx(sum(row["l0_per_layer"]))
        warmup, decay = trainer.args.num_warmup_steps, trainer.num_decay_steps
        scale = learning_rate_scale(row["step"] - 1, 40, warmup, "linear", decay)
        assert row["learning_rate"] == pytest.approx(1e-2 * scale)
        assert row["sparsity_scale"] == pytest.approx(row["step"] / 40)
        assert row["tokens_per_second"] > 0
    if clt.config.activation_fn == "topk":
        assert train[-1]["l0"] <= 12
    if clt.config.activation_fn == "batchtopk":
        assert train[-1]["l0"] == pytest.approx(12, abs=0.2)
        assert heldout[-1]["l0"] == pytest.approx(12, rel=0.5)


@pytest.mark.parametrize(
    "activation_fn, given, target",
    [("jumprelu", None, 12.0), pytest.param("relu", 0.02, 5.0, marks=pytest.mark.slow)],
)
def test_l0_is_steered_to_the_target(make, tmp_path, activation_fn, given, target):
    """From below and from above, with λ's default and with one that is far from what is needed."""
    config = {"activation_fn": activation_fn, "sparsity_lambda": given}
    trainer = make(config, training_steps=200, target_l0=target, batch_size=240, eval_tokens=0, learning_rate=5e-3)
    trainer.train()
    rows = rows_of(tmp_path / "run", "train")
    assert rows[0]["sparsity_scale"] == 1
    assert sum(row["l0"] / 2 for row in rows[-10:]) / 10 == pytest.approx(target, rel=0.05)
    # The factor is the feedback on what was measured, in every update.
    state = initial_steering()
    for row in rows:
        assert row["sparsity_scale"] == pytest.approx(state[0].exp().item(), rel=1e-4)
        state = steer_sparsity(state, torch.tensor(row["l0"] / 2), row["step"] - 1, 200, target)
    assert read_facts(tmp_path / "run")["training"]["settings"]["target_l0"] == target


def test_a_target_l0_that_cannot_be_reached_is_refused(make):
    for config, target, message in [
        ({"activation_fn": "topk"}, 9, "target_l0=9 .*activation_fn='topk'.* k=9$"),
        ({"activation_fn": "batchtopk"}, 9, "target_l0=9 .*activation_fn='batchtopk'.* k=9$"),
        ({}, 97, "target_l0=97 .*num_features=96; give"),
        ({"activation_fn": "relu", "sparsity_lambda": 0.0}, 9, "target_l0=9 .*sparsity_lambda=0; leave"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(config, target_l0=target)


@pytest.mark.parametrize("k_scope", ["layer", "token"])
@pytest.mark.parametrize("activation_fn", ["topk", "batchtopk"])
def test_k_is_annealed(make, tmp_path, activation_fn, k_scope):
    """Selected entries come down with the schedule; evaluation and release have the k of the configuration."""
    run = {"training_steps": 6, "initial_k": 9, "k_anneal_steps": 3, "initial_weights": "random"}
    trainer = make({"activation_fn": activation_fn, "k": 3, "k_scope": k_scope}, **run)
    selected, forward = [], trainer.model.forward

    def counted(inputs, *args, **kwargs):
        output = forward(inputs, *args, **kwargs)
        if trainer.model.training:
            selected.append(sum(layer.indices.numel() for layer in output.features.layers) / len(inputs) / 2)
        return output

    trainer.model.forward = counted
    clt = trainer.train()
    assert selected[:6] == [9, 7, 5, 3, 3, 3]
    assert CLTConfig.from_pretrained(tmp_path / "run").k == clt.config.k == 3
    if activation_fn == "topk":
        assert trainer.evaluate()["l0"] <= 6


def test_reach_grows(make):
    """Of two layers, over 0.8 of ten updates: the second from the fourth update on, and none before, not even once."""
    trainer = make({"activation_fn": "relu"}, training_steps=10, reach_growth=0.8)
    second, step = [], trainer._update

    def seen(*args):
        result = step(*args)
        second.append(trainer.model.decoders[0].weight[:, 1].abs().max().item())
        return result

    trainer._update = seen
    clt = trainer.train()
    assert second[:3] == [0, 0, 0] and min(second[3:]) > 0
    assert clt.decoders[0].weight[:, 1].abs().max() > 0


def test_a_growing_reach_that_does_not_fit_is_refused(make):
    for config, message in [
        ({"decoder_reach": 1}, r"reach_growth=0\.5 has no effect with a reach of one layer"),
        ({"decoder_tying": "per_source"}, r"reach_growth=0\.5 does not go with decoder_tying='per_source'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make({"activation_fn": "relu", **config}, reach_growth=0.5)
    with pytest.raises(ValueError, match=r"reach_growth=1\.5 is out of range"):
        make({"activation_fn": "relu"}, reach_growth=1.5)


def test_an_initial_k_that_does_not_fit_is_refused(make):
    for config, initial_k, message in [
        ({"activation_fn": "relu"}, 9, "initial_k=9 .*activation_fn='relu'"),
        ({"activation_fn": "topk", "k": 4}, 3, "initial_k=3 .*k=4 "),
        ({"activation_fn": "topk", "k": 4}, 10**6, "initial_k=1000000 .*num_features="),
    ]:
        with pytest.raises(ValueError, match=message):
            make(config, initial_k=initial_k)


def test_the_card_tells_what_was_measured(run):
    trainer, clt, folder = run
    card = (folder / "README.md").read_text(encoding="utf-8")
    metrics = trainer.evaluate()
    assert "library_name: hf_clt" in card
    assert "from_pretrained" in card
    assert clt.config.activation_fn in card
    assert f"{metrics['nmse']:.4f}" in card


def test_what_the_card_is_made_from_is_beside_it(run):
    trainer, _, folder = run
    assert card_from_folder(folder) == (folder / "README.md").read_text(encoding="utf-8")
    facts, metrics = read_facts(folder), trainer.evaluate()
    assert facts["metrics"]["nmse_per_layer"] == metrics["nmse_per_layer"]
    assert facts["metrics"]["feature_density"] == metrics["feature_density"]
    assert facts["training"]["steps"] == 40 and facts["training"]["eval_tokens"] == 300
    assert facts["history"]["train"]["step"] == [row["step"] for row in rows_of(folder, "train")]
    assert facts["history"]["heldout"]["step"] == [20, 40]
    assert str(folder.parent) not in (folder / "metrics.json").read_text(encoding="utf-8")
    if find_spec("matplotlib") is not None:
        names = {path.name for path in (folder / "plots").iterdir()}
        assert names == {"training_curves.png", "metrics_per_layer.png", "feature_density.png"}


def test_the_card_has_the_replacement_metrics_where_asked_for(make, tmp_path):
    trainer = make({"activation_fn": "topk"}, eval_replacement=True, eval_interval=2, license="cc-by-4.0")
    trainer.train()
    first, last = rows_of(tmp_path / "run", "heldout")
    assert "kl" not in first and last["num_predictions"] <= last["num_tokens"]
    expected = replacement_metrics(trainer.harvester.model, trainer.model, list(trainer.heldout))
    # Statistics are folded in what was measured and not here: rounding, which ce_recovered, a ratio of small
    # differences, makes larger.
    assert {name: last[name] for name in expected if name != "num_tokens"} == pytest.approx(
        {name: value for name, value in expected.items() if name != "num_tokens"}, rel=1e-4
    )
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "cc-by-4.0"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["kl"] == last["kl"] and found["ce_recovered"] == last["ce_recovered"]


def test_replacement_metrics_that_cannot_be_had_are_refused(make):
    with pytest.raises(ValueError, match=r"eval_replacement=True .*eval_tokens=0"):
        make(eval_replacement=True, eval_tokens=0)
    with pytest.raises(ValueError, match=r"eval_replacement=True .*feature_parallel_size=.* --update-card"):
        make(eval_replacement=True, feature_parallel_size=2)
    with pytest.raises(ValueError, match=r"eval_replacement=True .*k_scope='layer'"):
        make({"activation_fn": "topk", "k_scope": "token"}, eval_replacement=True)


def test_the_card_is_of_the_release_and_not_of_the_live_model(make, tmp_path):
    """Statistics untie a decoder that is tied over its targets."""
    make({"activation_fn": "topk", "decoder_tying": "per_source"}).train()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| decoder tying in training | `per_source`" in card and "| decoder tying | " not in card
    assert card_from_folder(tmp_path / "run") == card


def test_the_command_is_the_one_to_type_again(monkeypatch):
    for argv, num_processes, expected in (
        (["/x/scripts/train_clt.py", "--k", "4"], 1, "python scripts/train_clt.py --k 4"),
        (["mine.py", "--resume-from-checkpoint", "latest", "--k", "4"], 1, "python mine.py --k 4"),
        (["mine.py", "--resume_from_checkpoint=latest"], 1, "python mine.py"),
        (["hf-clt train", "--k", "4"], 1, "hf-clt train --k 4"),
        (["hf-clt train", "--k", "4"], 2, "torchrun --standalone --nproc-per-node 2 -m hf_clt train --k 4"),
        (["scripts/train_clt.py"], 2, "torchrun --standalone --nproc-per-node 2 scripts/train_clt.py"),
        (["/x/ipykernel_launcher.py", "-f", "x.json"], 1, None),
        (["/x/pytest/__main__.py"], 1, None),
        (["-c"], 1, None),
    ):
        monkeypatch.setattr("sys.argv", argv)
        assert command_line(num_processes) == expected


def test_the_time_is_accounted_for(run):
    shares = run[0].time_shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in shares.values())


def test_the_heldout_text_does_not_change(run):
    trainer = run[0]
    after = list(trainer.heldout)
    assert len(after) == len(trainer.heldout_before)
    for one, two in zip(after, trainer.heldout_before, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


# What it trains on


def test_held_out_documents_are_never_trained_on(make):
    trainer = make(training_steps=30)
    harvester, harvested = trainer.buffer.harvester, []

    class Recording:
        num_layers, d_model = harvester.num_layers, harvester.d_model

        check = harvester.check

        def read(self, batch, dtype):
            harvested.extend(batch["documents"][batch["counted"]].tolist())
            return harvester.read(batch, dtype)

    trainer.buffer.harvester = Recording()
    heldout = {int(d) for batch in trainer.heldout for d in batch["documents"][batch["counted"]]}
    trainer.train()
    assert len(heldout) >= 3
    assert trainer.buffer.epoch >= 1
    assert heldout.isdisjoint(harvested)
    everything = set(range(max(harvested) + 1))
    assert everything == heldout | set(harvested)


def test_the_tokens_it_counts_are_those_it_trains_on(make, tmp_path):
    trainer = make(training_steps=30, log_interval=7, gradient_accumulation_steps=2)
    batches = recorded(trainer)
    trainer.train()
    assert len(batches) == 60
    sizes = [len(batch["inputs"]) for batch in batches]
    assert min(sizes) < 64  # some are the end of an epoch
    for row in rows_of(tmp_path / "run", "train"):
        assert row["tokens"] == sum(sizes[: 2 * row["step"]])
    assert trainer.buffer.epoch >= 2


def test_the_seed_decides(make, tmp_path):
    weights = []
    for seed in (1, 1, 2):
        make(seed=seed, overwrite_output_dir=True).train()
        weights.append(released(tmp_path / "run"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["W_enc_0"], weights[2]["W_enc_0"])


# Losses and counters, by hand


def test_losses_are_means_since_the_line_before(make, tmp_path):
    """With weights that stand still, each line is the mean over its batches of the losses of docs/concepts.md."""
    trainer = make(
        {"activation_fn": "relu", "sparsity_lambda": 0.5},
        training_steps=7,
        log_interval=3,
        learning_rate=FROZEN,
        sparsity_schedule="constant",
    )
    batches = recorded(trainer)
    clt = trainer.train()
    reconstruction, sparsity = [], []
    with torch.no_grad():
        for batch in batches:
            x = (batch["inputs"].double() - clt.mean_in) / clt.std_in
            y = (batch["labels"].double() - clt.mean_out) / clt.std_out
            acts = [
                (x[:, s] @ clt.encoders[s].weight.double().T + clt.encoders[s].bias).clamp(min=0) for s in range(2)
            ]
            norms = [clt.decoders[s].weight.double().square().sum(dim=(1, 2)).sqrt() for s in range(2)]
            found = [clt.decoders[t].bias.double().expand(len(x), -1) for t in range(2)]
            for s in range(2):
                for t in range(s, 2):
                    found[t] = found[t] + acts[s] @ clt.decoders[s].weight[:, t - s].double()
            reconstruction.append(sum((y[:, t] - found[t]).square().sum(dim=1).mean() for t in range(2)).item())
            sparsity.append(0.5 * sum((norms[s] * acts[s]).tanh().sum(dim=1).mean() for s in range(2)).item())
    rows = rows_of(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    for row, part in zip(rows, (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 7)), strict=True):
        mean = {"reconstruction_loss": reconstruction[part], "sparsity_loss": sparsity[part]}
        for name, values in mean.items():
            assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert row["preactivation_loss"] == row["aux_loss"] == 0


@pytest.mark.parametrize("activation_fn", ["jumprelu", "topk"])
def test_dead_features_by_hand(make, tmp_path, activation_fn):
    trainer = make(
        {"activation_fn": activation_fn, "k": 2},
        training_steps=8,
        batch_size=16,
        learning_rate=FROZEN,
        dead_feature_window=3,
        initial_feature_rate=0.02 if activation_fn == "jumprelu" else None,
        gradient_accumulation_steps=2,
    )
    batches = recorded(trainer)
    clt = trainer.train()
    since = torch.zeros(2, 96, dtype=torch.int64)
    rows = rows_of(tmp_path / "run", "train")
    seen = set()
    for step, row in enumerate(rows, start=1):
        both = torch.cat([batches[2 * step - 2]["inputs"], batches[2 * step - 1]["inputs"]])
        revived = step > 3 and bool((since >= 3).any())  # what the losses of this update see
        fired = (clt.encode(both) > 0).any(dim=0)
        since = torch.where(fired, 0, since + 1)
        dead = since >= 3
        if step < 3:
            assert row["dead_fraction"] is None
        else:
            assert row["dead_fraction"] == pytest.approx(dead.float().mean().item())
            assert row["dead_fraction_per_layer"] == pytest.approx(dead.float().mean(dim=1).tolist())
            seen.add(row["dead_fraction"])
        assert (row["aux_loss" if activation_fn == "topk" else "preactivation_loss"] > 0) is revived
    assert torch.equal(trainer.steps_since_fired, since)
    assert len(seen) > 1 and 0 < max(seen) < 1  # else nothing was shown


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk"])
def test_accumulated_halves_equal_the_whole(make, tmp_path, activation_fn):
    """All the text fits into the buffer, so both runs read the same tokens in the same order."""
    weights, rows = [], []
    for batch_size, accumulation in ((32, 1), (16, 2)):
        trainer = make(
            {"activation_fn": activation_fn},
            n_batches_in_buffer=40,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            training_steps=10,
            adam_epsilon=1e-3,  # a gradient of nearly zero must not become a step of full size in either direction
            overwrite_output_dir=True,
        )
        batches = recorded(trainer)
        trainer.train()
        weights.append((torch.cat([batch["inputs"] for batch in batches]), released(tmp_path / "run")))
        rows.append(rows_of(tmp_path / "run", "train"))
    assert torch.equal(weights[0][0], weights[1][0])
    for name, value in weights[0][1].items():
        torch.testing.assert_close(weights[1][1][name], value, atol=2e-5, rtol=1e-3)
    for one, two in zip(*rows, strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_a_dense_clt_is_warned_of(make, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_clt.training.reporting"):
        make({"activation_fn": "relu", "sparsity_lambda": 0}, training_steps=8, initial_feature_rate=0.0).train()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "hf_clt.training.reporting"]
    assert message.startswith("step 2: ")  # a quarter of training; once
    assert "of 96 features per layer are active on a token, more than a tenth" in message
    assert "raise sparsity_lambda" in message


def test_a_sparse_clt_is_not_warned_of(make, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_clt.training.reporting"):
        make({"activation_fn": "topk"}, training_steps=8).train()
    assert not [record for record in caplog.records if record.name == "hf_clt.training.reporting"]


@pytest.mark.parametrize("bandwidth, warned", [(4.0, True), (0.01, False)])
def test_a_wide_jumprelu_window_is_warned_of(make, caplog, bandwidth, warned):
    with caplog.at_level(logging.WARNING, logger="hf_clt.training.reporting"):
        make({"activation_fn": "jumprelu", "jumprelu_bandwidth": bandwidth}, training_steps=2).train()
    messages = [record.getMessage() for record in caplog.records if "inside the jumprelu window" in record.message]
    assert len(messages) == warned
    assert all(f"jumprelu_bandwidth={bandwidth:g}" in message for message in messages)


@pytest.mark.parametrize("activation_fn, rate", [("relu", 0.02), ("jumprelu", 0.02), ("relu", 0.3)])
def test_features_fire_at_the_initial_rate(make, activation_fn, rate):
    given = {} if rate == 0.02 else {"initial_feature_rate": rate}  # 0.02 is the default at 96 features
    trainer = make(
        {"activation_fn": activation_fn}, training_steps=1, learning_rate=FROZEN, n_batches_in_buffer=40, **given
    )
    clt = trainer.train()
    inputs, _ = harvest_all(trainer, trainer.tokens)
    found = (clt.encode(inputs) > 0).float().mean(dim=0)
    # The same token at the start of two blocks has the same activations, and both fire or neither.
    assert (found - rate).abs().max() < 5 / len(inputs)
    assert (found - rate).abs().median() < 1 / len(inputs)


# Normalisation


def test_estimated_statistics_are_those_of_the_first_batches(make):
    trainer = make(training_steps=1)
    batches = list(trainer.tokens)[:4]
    inputs, labels = harvest_all(trainer, batches)
    assert_statistics(trainer.train(), inputs, labels)


def test_mean_std_is_over_all_the_text(make):
    trainer = make(training_steps=1, normalization_method="mean_std")
    inputs, labels = harvest_all(trainer, trainer.tokens)
    assert len(inputs) > 2 * 4 * 4 * 31  # more than the default's batches
    assert_statistics(trainer.train(), inputs, labels)


def assert_statistics(clt, inputs, labels):
    for side, rows in (("in", inputs.double()), ("out", labels.double())):
        torch.testing.assert_close(getattr(clt, f"mean_{side}").double(), rows.mean(dim=0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            getattr(clt, f"std_{side}").double(), rows.std(dim=0, correction=0), atol=1e-5, rtol=1e-5
        )


def test_statistics_of_a_file(make, tmp_path):
    statistics = {name: torch.rand(2, 64) + 0.5 for name in STATISTICS}
    save_file(statistics, tmp_path / "statistics.safetensors")
    trainer = make(
        training_steps=2, normalization_method="mean_std", normalization_file=str(tmp_path / "statistics.safetensors")
    )
    clt = trainer.train()
    for name in STATISTICS:
        assert torch.equal(getattr(clt, name), statistics[name])
    inputs, _ = harvest_all(trainer, trainer.heldout)
    found = float64_clt(tmp_path / "run", inputs)[1]  # folded into what was released
    torch.testing.assert_close(clt(inputs).reconstruction.double(), found, atol=1e-4, rtol=1e-4)


def test_without_statistics_the_output_bias_starts_at_the_mean(make):
    trainer = make(training_steps=1, normalization_method="none", learning_rate=FROZEN, n_batches_in_buffer=40)
    clt = trainer.train()
    assert all(getattr(clt, name) is None for name in STATISTICS)
    _, labels = harvest_all(trainer, trainer.tokens)
    bias = torch.stack([decoder.bias for decoder in clt.decoders])
    torch.testing.assert_close(bias, labels.mean(dim=0), atol=1e-5, rtol=1e-4)


# Number formats and optimizers


def test_bfloat16_is_the_format_of_the_decoders(make, tmp_path):
    trainer = make(clt_dtype="bfloat16", training_steps=6)
    clt = trainer.train()
    decoders = {"decoders.0.weight", "decoders.1.weight"}
    for name, parameter in clt.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in decoders else torch.float32)
    assert trainer.buffer.inputs.dtype == torch.float32  # as the language model gives them
    files = released(tmp_path / "run")
    assert {name for name, value in files.items() if value.dtype == torch.bfloat16} == {"W_dec_0", "W_dec_1"}
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "run")
    assert loaded.dtype == torch.bfloat16 and loaded.encoders[0].weight.dtype == torch.float32
    assert all(math.isfinite(row["loss"]) for row in rows_of(tmp_path / "run", "train"))


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_stays_in_float32_says_so(make, monkeypatch, caplog, fast):
    monkeypatch.setattr(setup, "multiplies_bfloat16", lambda: fast)
    make(mixed_precision="bf16")
    assert ("the matrix products stay float32" in caplog.text) is not fast


def test_mixed_precision_computes_in_bfloat16_on_float32_weights(make, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "multiplies_bfloat16", lambda: True)  # elsewhere autocast computes in float32
    losses = {}
    for precision in ("no", "bf16"):
        # A rough product selects other features now and then; with jumprelu it would hardly change a loss.
        config = {"activation_fn": "batchtopk"}
        trainer = make(config, mixed_precision=precision, training_steps=6, overwrite_output_dir=True)
        clt = trainer.train()
        assert {parameter.dtype for parameter in clt.parameters()} == {torch.float32}
        losses[precision] = [row["loss"] for row in rows_of(tmp_path / "run")[:6]]
        assert math.isfinite(trainer.evaluate()["nmse"])
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)
    assert losses["bf16"] != losses["no"]


@pytest.mark.parametrize("activation_fn", ["jumprelu", "topk"])
def test_weight_decay_is_for_matrices_alone(activation_fn):
    clt = CrossLayerTranscoder(
        CLTConfig(num_layers=2, d_model=6, num_features=8, k=2, activation_fn=activation_fn, skip_connection=True)
    )
    args = CLTTrainingArguments(optimizer="adamw", weight_decay=0.1, learning_rate=0.01)
    optimizer = make_optimizer(clt, args)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.uniform_(0.5, 1)
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in clt.named_parameters()}
    optimizer.step()
    decayed = set()
    for name, parameter in clt.named_parameters():
        if not torch.equal(parameter, before[name]):
            torch.testing.assert_close(parameter, before[name] * (1 - 0.01 * 0.1))
            decayed.add(name)
    assert decayed == {f"{part}.{layer}.weight" for part in ("encoders", "decoders", "skips") for layer in range(2)}


def test_adamw_in_a_run(make, tmp_path):
    norms = []
    for decay in (0.0, 50.0):
        make(optimizer="adamw", weight_decay=decay, training_steps=5, overwrite_output_dir=True).train()
        norms.append(released(tmp_path / "run")["W_dec_0"].norm())
    assert norms[1] < 0.9 * norms[0]


def test_gradients_are_clipped(make, tmp_path):
    """Adam does not see the scale of the gradients, but with a large epsilon it does."""
    moved = []
    for norm in (0.0, 1e-3):
        run = {"training_steps": 1, "adam_epsilon": 1e3, "learning_rate": 1.0, "overwrite_output_dir": True}
        trainer = make(max_grad_norm=norm, initial_weights="random", **run)
        start = trainer.model.encoders[0].weight.clone()
        clt = trainer.train()
        moved.append((clt.encoders[0].weight - start).norm().item())
    assert 0 < moved[1] < 0.1 * moved[0]


def test_a_loss_that_is_not_finite_stops_the_run(make):
    with pytest.raises(FloatingPointError, match=r"loss .*step \d.*learning_rate"):
        make({"activation_fn": "relu"}, learning_rate=1e30, training_steps=20, max_grad_norm=0).train()


@pytest.mark.parametrize("run", ["relu", "jumprelu", "topk"], indirect=True)
def test_going_on_with_a_clt_starts_at_its_function(run, make):
    trainer, _, folder = run
    before = CrossLayerTranscoder.from_pretrained(folder)
    inputs, _ = harvest_all(trainer, trainer.heldout)
    trainer = make(CrossLayerTranscoder.from_pretrained(folder), training_steps=1, learning_rate=FROZEN)
    after = trainer.train()
    assert after.mean_in is not None
    with torch.no_grad():
        torch.testing.assert_close(after(inputs).reconstruction, before(inputs).reconstruction, atol=5e-4, rtol=5e-4)


def test_the_language_model_is_known_from_the_clt(make, tmp_path, tiny_gpt2):
    make(training_steps=1).train()
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "run")
    assert clt.config.base_model_name_or_path == tiny_gpt2
    assert make(clt, model=None, overwrite_output_dir=True).harvester.num_layers == 2


# Evaluation and output


def test_without_evaluation(make, tmp_path):
    trainer = make(eval_tokens=0)
    trainer.train()
    assert rows_of(tmp_path / "run", "heldout") == []
    assert not (tmp_path / "run" / "eval_results.json").exists()
    with pytest.raises(ValueError, match="eval_tokens=0"):
        trainer.evaluate()


def test_evaluation_does_not_disturb_training(make, tmp_path):
    weights = []
    for interval in (0, 1):
        make(
            {"activation_fn": "batchtopk"}, eval_interval=interval, training_steps=5, overwrite_output_dir=True
        ).train()
        weights.append(released(tmp_path / "run"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_output_folder_with_a_run_is_refused_and_left_alone(make, tmp_path):
    folder = tmp_path / "run"
    make(training_steps=4, checkpoint_interval=2).train()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"output_dir='.*--overwrite-output-dir"):
        make()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # also where there is a checkpoint alone
    shutil.move(folder / "checkpoint-2", tmp_path / "kept")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"output_dir=.*\(checkpoint-2\)"):
        make()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such locks")
def test_a_folder_that_another_run_writes_to_is_left_alone(make, tmp_path):
    """As when `srun` starts two processes that do not know of each other."""
    make(training_steps=3, checkpoint_interval=1).train()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    held = lock_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="another run; give another folder"):
        make(overwrite_output_dir=True).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    os.close(held)
    make(overwrite_output_dir=True).train()


def test_overwriting_leaves_nothing_of_the_run_before_but_what_is_not_its_own(make, tmp_path):
    folder = tmp_path / "run"
    make({"activation_fn": "topk"}, training_steps=6, checkpoint_interval=2).train()
    (folder / "notes.txt").write_text("mine")
    make({"activation_fn": "relu"}, training_steps=3, overwrite_output_dir=True).train()
    assert list_checkpoints(folder) == []
    assert [row["step"] for row in rows_of(folder, "train")] == [1, 2, 3]
    assert json.loads((folder / "config.json").read_text())["activation_fn"] == "relu"
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_facts(folder)["history"]["train"]["step"] == [1, 2, 3]


def test_a_mistake_found_while_overwriting_costs_nothing(make, tmp_path):
    """The old run is removed only when the new one is sure to start."""
    make(training_steps=2).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    save_file({"mean_in": torch.zeros(2, 64)}, tmp_path / "statistics.safetensors")
    with pytest.raises(ValueError, match="std_in"):
        make(
            overwrite_output_dir=True,
            normalization_method="mean_std",
            normalization_file=str(tmp_path / "statistics.safetensors"),
        ).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


# What cannot be done


def test_either_a_configuration_or_a_model(make, tiny_gpt2):
    args = CLTTrainingArguments(model=tiny_gpt2, dataset="text.txt")
    config = CLTConfig(num_layers=2, d_model=64, num_features=8)
    for given in ({}, {"config": config, "model": CrossLayerTranscoder(config)}):
        with pytest.raises(ValueError, match=r"config .*model"):
            CLTTrainer(args, **given)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ({"num_layers": 3}, {}, r"num_layers=3 .*give num_layers=2"),
        ({"d_model": 32}, {}, r"d_model=32 .*give d_model=64"),
        ({}, {"context_size": 256}, r"context_size is 256.*at most 128"),
        (
            {},
            {"eval_tokens": 100_000},
            r"eval_tokens.*100000.* \d+ tokens",
        ),
        ({}, {"dataset": None}, r"dataset=None"),
        ({}, {"model": None}, r"model=None"),
        ({}, {"device": "cuda"}, r"device='cuda'.*give cpu"),
    ],
)
def test_misfits_are_found_before_any_work(make, tmp_path, config, arguments, message):
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        make(config, **arguments)
    assert not (tmp_path / "run").exists()


def test_activations_that_are_not_finite_stop_with_the_layer(make, tiny_gpt2, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    with pytest.raises(ActivationError, match=r"not finite.*layer 1, hook_mlp_out, document \d+"):
        make(model=str(tmp_path / "broken")).train()
