"""
The trainer on a tiny language model: what it learns, writes, measures and restores, against independent computations.
"""

import errno
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
from hf_clt.harvest.text import StreamError
from hf_clt.hub.card import card_from_folder
from hf_clt.hub.facts import read_facts
from hf_clt.kernels import encode
from hf_clt.training import checkpoints, publishing, setup
from hf_clt.training import trainer as trainer_module
from hf_clt.training.checkpoints import CheckpointError, list_checkpoints
from hf_clt.training.optimizers import make_optimizer
from hf_clt.training.output_folder import lock_folder
from hf_clt.training.reporting import command_line
from hf_clt.training.schedules import learning_rate_scale


ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
STATISTICS = ("mean_in", "std_in", "mean_out", "std_out")
SCALARS = ("nmse", "explained_variance", "l0", "dead_fraction")
LOSSES = ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")
FROZEN = 1e-12  # a learning rate that changes no weight that matters


@pytest.fixture
def make(tiny_gpt2, small_text_file, tmp_path):
    """A trainer of a tiny CLT on a tiny model; `config` holds CLTConfig's fields, the rest are arguments."""
    return lambda config=None, **arguments: make_trainer(
        tiny_gpt2, small_text_file, tmp_path / "run", config, arguments
    )


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
    assert train[-1]["reconstruction_loss"] < 0.9 * train[0]["reconstruction_loss"]
    assert train[-1]["nmse"] < 0.9 * train[0]["nmse"]
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
        warmup = trainer.args.num_warmup_steps
        assert row["learning_rate"] == pytest.approx(1e-2 * learning_rate_scale(row["step"] - 1, 40, warmup, "linear"))
        assert row["sparsity_scale"] == pytest.approx(row["step"] / 40)
        assert row["tokens_per_second"] > 0
    if clt.config.activation_fn == "topk":
        assert train[-1]["l0"] <= 12
    if clt.config.activation_fn == "batchtopk":
        assert train[-1]["l0"] == pytest.approx(12, abs=0.2)
        assert heldout[-1]["l0"] == pytest.approx(12, rel=0.5)


@pytest.mark.parametrize("k_scope", ["layer", "token"])
@pytest.mark.parametrize("activation_fn", ["topk", "batchtopk"])
def test_k_is_annealed(make, tmp_path, activation_fn, k_scope):
    """Selected entries come down with the schedule; evaluation and release have the k of the configuration."""
    trainer = make(
        {"activation_fn": activation_fn, "k": 3, "k_scope": k_scope}, training_steps=6, initial_k=9, k_anneal_steps=3
    )
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


def test_an_initial_k_that_does_not_fit_is_refused(make):
    for config, initial_k, message in [
        ({"activation_fn": "relu"}, 9, "initial_k=9 has no effect with activation_fn='relu'"),
        ({"activation_fn": "topk", "k": 4}, 3, "initial_k=3 is outside k=4 to num_features="),
        ({"activation_fn": "topk", "k": 4}, 10**6, "initial_k=1000000 is outside k=4 to num_features="),
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
    assert {name: last[name] for name in expected if name != "num_tokens"} == pytest.approx(
        {name: value for name, value in expected.items() if name != "num_tokens"}
    )
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "cc-by-4.0"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["kl"] == last["kl"] and found["ce_recovered"] == last["ce_recovered"]


def test_replacement_metrics_that_cannot_be_had_are_refused(make):
    with pytest.raises(ValueError, match="eval_replacement=True has no effect with eval_tokens=0"):
        make(eval_replacement=True, eval_tokens=0)
    with pytest.raises(ValueError, match=r"eval_replacement=True needs the whole CLT .* --replacement --update-card"):
        make(eval_replacement=True, feature_parallel_size=2)
    with pytest.raises(ValueError, match="depend on later layers"):
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
        trainer = make(
            max_grad_norm=norm, training_steps=1, adam_epsilon=1e3, learning_rate=1.0, overwrite_output_dir=True
        )
        start = trainer.model.encoders[0].weight.clone()
        clt = trainer.train()
        moved.append((clt.encoders[0].weight - start).norm().item())
    assert 0 < moved[1] < 0.1 * moved[0]


def test_a_loss_that_is_not_finite_stops_the_run(make):
    with pytest.raises(FloatingPointError, match=r"the loss is not finite at step \d.*lower learning_rate"):
        make({"activation_fn": "relu"}, learning_rate=1e30, training_steps=20, max_grad_norm=0).train()


# Stopping and resuming


WITHOUT_TIME = {"tokens_per_second"}


def assert_same_metrics(one, two):
    one, two = rows_of(one), rows_of(two)
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        assert {k: v for k, v in left.items() if k not in WITHOUT_TIME} == {
            k: v for k, v in right.items() if k not in WITHOUT_TIME
        }


@pytest.mark.parametrize("activation_fn", ["jumprelu", "batchtopk"])
@pytest.mark.parametrize("stop_at", [2, 6])
def test_killed_and_resumed_is_bit_for_bit_the_same(make, tmp_path, activation_fn, stop_at):
    """Twelve steps over a text of about five, and a buffer of two: many refills, and checkpoints in several epochs."""
    config = {"activation_fn": activation_fn}
    arguments = {
        "training_steps": 12,
        "batch_size": 250,
        "log_interval": 2,
        "eval_interval": 4,
        "dead_feature_window": 3,
        "learning_rate": 3e-3,
    }
    if activation_fn == "batchtopk":
        arguments |= {"initial_k": 12, "k_anneal_steps": 8}
    straight = make(config, **arguments)
    straight.train()
    assert straight.buffer.epoch == 2
    shutil.move(tmp_path / "run", tmp_path / "straight")

    # Harvesting ahead changes nothing either, nor does keeping the activations.
    arguments["overlap_harvest"] = activation_fn == "batchtopk"
    arguments["checkpoint_activations"] = stop_at == 6
    stopped = make(config, **arguments)
    recorded(stopped, stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {stop_at}"):
        stopped.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{stop_at}"]
    own = load_file(tmp_path / "run" / f"checkpoint-{stop_at}" / "rank-0.safetensors")
    assert ("inputs" in own) == (stop_at == 6)
    assert not (tmp_path / "run" / "config.json").exists()  # nothing is released half trained
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")][-1] == stop_at
    torch.manual_seed(999)

    resumed = make(config, **arguments, resume_from_checkpoint="latest")
    resumed.train()
    assert resumed.step == 12
    for name, value in released(tmp_path / "straight").items():
        assert torch.equal(released(tmp_path / "run")[name], value), name
    assert torch.equal(resumed.steps_since_fired, straight.steps_since_fired)
    assert_same_metrics(tmp_path / "straight", tmp_path / "run")


def test_what_a_stopped_push_left_is_removed(make, tmp_path):
    stopped = make(training_steps=4)
    recorded(stopped, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    (tmp_path / "run" / ".pushing.tmp").mkdir()
    (tmp_path / "run" / ".pushing.tmp" / "W_enc_0.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "notes").mkdir()
    make(training_steps=4, resume_from_checkpoint="latest").train()
    assert not (tmp_path / "run" / ".pushing.tmp").exists() and (tmp_path / "run" / "notes").exists()


def test_a_line_of_metrics_that_spans_a_resume(make, tmp_path):
    """Stopped between two lines, the line after it still tells of all the steps and tokens since the line before."""
    arguments = {"training_steps": 8, "log_interval": 4}
    make(**arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    stopped = make(**arguments)
    recorded(stopped, stop_at=6)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_metrics(tmp_path / "straight", tmp_path / "run")


def test_lines_after_the_checkpoint_are_dropped(make, tmp_path):
    """A run that is killed without a checkpoint leaves lines that the resumed run writes again."""
    arguments = {"training_steps": 9, "checkpoint_interval": 3, "save_total_limit": None}
    make(**arguments).train()
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "spl')  # the power went
    make(**arguments, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")).train()
    assert_same_metrics(tmp_path / "straight", tmp_path / "run")
    assert all(
        torch.equal(value, released(tmp_path / "straight")[name]) for name, value in released(tmp_path / "run").items()
    )


def test_checkpoints_come_when_due_and_old_ones_go(make, tmp_path):
    make(training_steps=8, checkpoint_interval=2, save_total_limit=2).train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    tensors = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert set(STATISTICS) <= tensors.keys()  # not folded
    assert (tmp_path / "run" / "config.json").is_file()


def test_after_a_resume_from_an_older_checkpoint_the_newest_is_the_one_written_last(make, tmp_path):
    """Going back to step 2 leaves checkpoint-6 of a past that did not happen; "latest" must not return to it."""
    arguments = {"training_steps": 8, "save_total_limit": 2}
    make(**arguments, checkpoint_interval=2).train()  # leaves 4 and 6
    resumed = make(**arguments, checkpoint_interval=0, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    recorded(resumed, stop_at=1)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        resumed.train()
    again = make(**arguments, checkpoint_interval=0, resume_from_checkpoint="latest")
    assert again.resume_from.name == "checkpoint-5"


def test_a_resume_with_another_configuration_is_refused(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    for config, message in (
        ({"num_features": 80}, "num_features=80, but checkpoint-2 was trained with num_features=96"),
        (
            {"activation_fn": "topk"},
            "activation_fn='topk', but checkpoint-2 was trained with activation_fn='jumprelu'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make(config, resume_from_checkpoint="latest").train()
    with pytest.raises(
        ValueError, match="the checkpoint's buffer holds 496 tokens, this one 620; resume with the same"
    ):
        make(resume_from_checkpoint="latest", n_batches_in_buffer=5).train()


def test_a_resume_from_elsewhere_does_not_write_into_another_run(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="already holds a run"):
        make(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))


def test_the_clock_goes_on_over_a_resume(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    before = state["seconds"]
    assert set(before) == {"language_model", "clt", "total"}
    resumed = make(training_steps=4, resume_from_checkpoint="latest")
    resumed.train()
    assert all(resumed.seconds[name] > before[name] > 0 for name in before)


# Failures: of the text, of the language model, of the disk


def failing_from(stream, number):
    """From its call `number` on, reading text fails."""
    next_batch, calls = stream._next_batch, []

    def fail():
        calls.append(None)
        if len(calls) >= number:
            raise ConnectionError("no route to host")
        return next_batch()

    stream._next_batch = fail


def assert_same_end(one, two):
    for name, value in released(one).items():
        assert torch.equal(released(two)[name], value), name
    assert_same_metrics(one, two)


@pytest.mark.parametrize(
    "accumulation, overlap",
    [
        (1, False),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
    ],
)
def test_text_that_fails_for_good_stops_with_a_checkpoint(make, tmp_path, accumulation, overlap):
    """Whichever batch fails, also in the middle of an update, the run that goes on ends as if nothing had been."""
    config = {"activation_fn": "batchtopk"}
    arguments = {
        "training_steps": 12,
        "batch_size": 240 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "overlap_harvest": overlap,
        "stream_retries": 0,
    }
    make(config, **arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    in_an_update = 0
    for number in (10, 12, 15, 17, 19):  # 4 batches for the statistics, 4 for the first fill
        trainer = make(config, **arguments)
        failing_from(trainer.tokens, number)
        with pytest.raises(StreamError, match=r"the text cannot be read, .*=0 \(ConnectionError: no") as info:
            trainer.train()
        in_an_update += trainer.tokens_since_log > 0
        assert trainer.step > 0
        name = f"checkpoint-{trainer.step}"
        assert info.value.__notes__ == [f"{name} is whole: continue with --resume-from-checkpoint latest"]
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == [name]
        make(config, **arguments, resume_from_checkpoint="latest").train()
        assert_same_end(tmp_path / "straight", tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert (in_an_update > 0) is (accumulation > 1)


def test_text_that_fails_before_the_first_update(make, tmp_path):
    trainer = make(stream_retries=0)
    failing_from(trainer.tokens, 6)  # in the first fill
    with pytest.raises(StreamError):
        trainer.train()
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("step", [4, 12])
def test_an_evaluation_that_fails_is_made_up_for(make, tmp_path, step):
    """In training, and after the last update."""
    arguments = {"training_steps": 12, "eval_interval": 4, "stream_retries": 0}
    make(**arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    trainer = make(**arguments)
    evaluate = trainer.evaluate

    def fail():
        if trainer.step == step:
            failing_from(trainer.heldout, 1)
        return evaluate()

    trainer.evaluate = fail
    with pytest.raises(StreamError) as info:
        trainer.train()
    assert info.value.__notes__[0].startswith(f"checkpoint-{step} is whole")
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")


def test_a_release_that_fails_costs_no_training(make, tmp_path, monkeypatch):
    make(training_steps=6).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "save_model_card", full)
        with pytest.raises(OSError, match="No space left"):
            make(training_steps=6).train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    resumed = make(training_steps=6, resume_from_checkpoint="latest")
    resumed.train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")
    assert "nmse" in resumed.evaluate()


def test_a_disk_that_is_full_at_a_checkpoint(make, tmp_path, monkeypatch):
    arguments = {"training_steps": 9, "checkpoint_interval": 3}
    make(**arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    write = checkpoints._write_tensors

    def full(path, tensors):
        if "checkpoint-6" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_write_tensors", full)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-6 cannot be written to .*No space.*checkpoint-3 is whole"
        ):
            make(**arguments).train()
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-3"]
    (tmp_path / "run" / ".checkpoint-9.tmp").mkdir()  # as a killed process leaves
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")
    assert list((tmp_path / "run").glob(".*")) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full_at_a_line_of_metrics(make, tmp_path, monkeypatch):
    trainer = make(training_steps=9, checkpoint_interval=2)
    write = trainer_module.write_row

    def full(trainer, row):
        if row["step"] == 5:
            (tmp_path / "run" / "metrics.jsonl").unlink()
            (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
        write(trainer, row)

    monkeypatch.setattr(trainer_module, "write_row", full)
    with pytest.raises(OSError, match=r"^metrics.jsonl cannot be written to .*No space left.*; checkpoint-4 is whole"):
        trainer.train()


@pytest.fixture
def broken_gpt2(make, tiny_gpt2, tmp_path):
    """The tiny model, giving NaN for one block in the second half of the training text; and that block's size."""
    blocks = []
    trainer = make(overwrite_output_dir=True)
    for batch in trainer.tokens:
        blocks += zip(batch["input_ids"].tolist(), batch["counted"].sum(dim=1).tolist(), strict=True)
    elsewhere = {token for batch in trainer.heldout for token in batch["input_ids"].flatten().tolist()}
    where = {}
    for number, (ids, _) in enumerate(blocks):
        for token in set(ids):
            where.setdefault(token, []).append(number)
    token, number = next(
        (token, numbers[0])
        for token, numbers in where.items()
        if len(numbers) == 1 and numbers[0] > len(blocks) / 2 and token not in elsewhere
    )
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.wte.weight[token] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    return str(tmp_path / "broken"), blocks[number][1]


def test_blocks_that_are_not_finite_are_skipped_and_a_resumed_run_skips_the_same(make, tmp_path, broken_gpt2, caplog):
    model, size = broken_gpt2
    arguments = {"model": model, "on_bad_activations": "skip", "training_steps": 30, "log_interval": 3}
    trainer = make(**arguments)
    trainer.train()
    rows = rows_of(tmp_path / "run", "train")
    skipped = [row["skipped_tokens"] for row in rows]
    assert skipped == sorted(skipped) and skipped[0] == 0 and skipped[-1] == trainer.buffer.skipped_tokens >= size
    assert {count % size for count in skipped} == {0}
    assert all(math.isfinite(row["loss"]) for row in rows)
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(messages) == 2  # the first time, and at the end
    assert f"{size} tokens are skipped, and from now on all such: activations of the language model" in messages[0]
    assert messages[1].startswith(f"{skipped[-1]} tokens were skipped")
    shutil.move(tmp_path / "run", tmp_path / "straight")

    stopped = make(**arguments)
    recorded(stopped, stop_at=14)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")


def test_activations_that_are_not_finite_stop_with_a_checkpoint_to_skip_them_from(make, tmp_path, broken_gpt2):
    arguments = {"model": broken_gpt2[0], "training_steps": 30}
    make(**arguments, on_bad_activations="skip").train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    stopped = make(**arguments)
    with pytest.raises(ActivationError, match="not finite") as info:
        stopped.train()
    assert 0 < stopped.step < 30
    assert info.value.__notes__[0].startswith(f"checkpoint-{stopped.step} is whole")
    again = make(**arguments, resume_from_checkpoint="latest")
    with pytest.raises(ActivationError, match="not finite"):
        again.train()
    make(**arguments, resume_from_checkpoint="latest", on_bad_activations="skip").train()
    for name, value in released(tmp_path / "straight").items():
        assert torch.equal(released(tmp_path / "run")[name], value), name


# Going on with a CLT


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
    with pytest.raises(ValueError, match="eval_tokens=0: there is no held-out text; give eval_tokens"):
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
    with pytest.raises(ValueError, match=r"output_dir='.*' already holds a run .*--overwrite-output-dir"):
        make()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # also where there is a checkpoint alone
    shutil.move(folder / "checkpoint-2", tmp_path / "kept")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint-2\)"):
        make()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such locks")
def test_a_folder_that_another_run_writes_to_is_left_alone(make, tmp_path):
    """As when `srun` starts two processes that do not know of each other."""
    make(training_steps=3, checkpoint_interval=1).train()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    held = lock_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="is being written to by another run"):
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
    with pytest.raises(ValueError, match="has no tensor std_in"):
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
        with pytest.raises(ValueError, match="CLTTrainer needs either config"):
            CLTTrainer(args, **given)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ({"num_layers": 3}, {}, r"num_layers=3 does not fit .*, which has 2; give num_layers=2"),
        ({"d_model": 32}, {}, r"d_model=32 does not fit .*, which has 64; give d_model=64"),
        ({}, {"context_size": 256}, r"context_size is 256, and the language model has 128 positions: use at most 128"),
        (
            {},
            {"eval_tokens": 100_000},
            r"too small: heldout_tokens \(eval_tokens\) is 100000, and all its text gives \d+",
        ),
        ({}, {"dataset": None}, r"dataset=None: give a Hub name or a local"),
        ({}, {"model": None}, r"model=None: give the Hub name or folder"),
        ({}, {"device": "cuda"}, r"device='cuda', but no GPU is available"),
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
