"""The compact Adam: its formula, its memory, its checkpoints, and what it does to a CLT beside Adam."""

import copy
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.training import optimizers
from hf_clt.training.checkpoints import list_checkpoints, load_optimizer_tensors, optimizer_tensors
from hf_clt.training.optimizers import CompactAdam, WideAdam, clip_grad_norm, make_optimizer


SHAPES = ((5, 3, 4), (6, 4), (7,))
HALF_EPS = 2.0**-11  # relative rounding error of float16


def gradients(shapes, steps, dtype=torch.float64):
    """Gradients of very different sizes; each feature is silent on about half of the steps."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield [
            (
                torch.randn(shape, generator=generator, dtype=torch.float64)
                * (torch.rand(shape[0], generator=generator) < 0.5).view(-1, *[1] * (len(shape) - 1))
                * 10.0 ** torch.linspace(-6, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
            ).to(dtype)
            for shape in shapes
        ]


def formula(weight, history, learning_rates, beta1, beta2, eps, weight_decay):
    """The class's formulas, feature by feature in Python's floats, nothing rounded to half."""
    weight = weight.clone()
    for feature in range(len(weight)):
        w, v = weight[feature], 0.0
        m = torch.zeros_like(w)
        for t, (gradient, lr) in enumerate(zip(history, learning_rates, strict=True), start=1):
            g = gradient[feature]
            v = beta2 * v + (1 - beta2) * float(g.square().mean())
            m = beta1 * m + (1 - beta1) * g
            step = m / (1 - beta1**t) / (math.sqrt(v / (1 - beta2**t)) + eps)
            w = w - lr * weight_decay * w - lr * step
        weight[feature] = w
    return weight


def train(optimizer, parameters, history, learning_rates=None):
    for index, step in enumerate(history):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        if learning_rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[index]
        optimizer.step()


def parameters_of(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


# The formula


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_computes_its_formula(beta1, weight_decay):
    history, rates = list(gradients(SHAPES, 12)), [0.01 * (12 - t) for t in range(12)]
    parameters = parameters_of(SHAPES)
    before = [parameter.detach().clone() for parameter in parameters]
    settings = {"betas": (beta1, 0.99), "eps": 1e-5, "weight_decay": weight_decay}
    train(CompactAdam(parameters, lr=1.0, **settings), parameters, history, rates)
    for index, parameter in enumerate(parameters):
        expected = formula(before[index], [g[index] for g in history], rates, beta1, 0.99, 1e-5, weight_decay)
        moved = (parameter - before[index]).abs().max()
        assert moved > 0.01
        # What is rounded to half, if anything, is m of the step before, once per step.
        exact = beta1 == 0 or parameter.dim() == 1
        tolerance = 1e-7 if exact else 5 * HALF_EPS * 0.01 * 12
        assert (parameter - expected).abs().max() < tolerance
        assert exact or not torch.equal(parameter, expected)


def test_one_step_is_exact():
    """Nothing is stored yet, so nothing is rounded: all elements of a feature move by g / rms(g) times the rate."""
    (parameter,) = parameters_of([(5, 3, 4)])
    before = parameter.detach().clone()
    ((gradient,),) = gradients([(5, 3, 4)], 1)
    gradient += 1e-9
    parameter.grad = gradient
    CompactAdam([parameter], lr=0.1, eps=0.0).step()
    rms = gradient.square().mean(dim=(1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(parameter.detach(), before - 0.1 * gradient / rms, rtol=0, atol=1e-8)


def test_of_single_elements_it_is_adam():
    """Biases and thresholds, and a matrix of one column up to the rounding of its first moment."""
    shapes = [(7,), (7, 1)]
    history = list(gradients(shapes, 20, torch.float32))
    ours, adams = parameters_of(shapes, torch.float32), parameters_of(shapes, torch.float32)
    train(CompactAdam(ours, lr=0.01), ours, history)
    train(torch.optim.Adam(adams, lr=0.01), adams, history)
    torch.testing.assert_close(ours[0], adams[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], adams[1], rtol=1e-3, atol=1e-3)


def test_blocks_change_nothing(monkeypatch):
    shapes = [(11, 3, 4), (9, 5)]
    history = list(gradients(shapes, 5, torch.float32))
    results = []
    for block in (2**17, 24, 1):  # all rows, two rows and one row at a time
        monkeypatch.setattr(optimizers, "CPU_BLOCK", block)
        parameters = parameters_of(shapes, torch.float32)
        train(CompactAdam(parameters), parameters, history)
        results.append(parameters)
    for parameters in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(parameters, results[0], strict=True))


def test_a_feature_that_never_fired_stays():
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    before = parameter.detach().clone()
    gradient = torch.ones(3, 4)
    gradient[1] = 0
    optimizer = CompactAdam([parameter], lr=0.1)
    train(optimizer, [parameter], [[gradient]] * 3)
    assert torch.equal(parameter[1], before[1])
    assert (parameter[[0, 2]] < 0.8).all()


def test_a_feature_that_fires_again_with_a_huge_gradient():
    """The largest u: nothing for long, while v is forgotten, and then all of the gradient in one dimension."""
    parameter = torch.nn.Parameter(torch.zeros(1, 4096))
    optimizer = CompactAdam([parameter], lr=1.0)
    spike = torch.zeros(1, 4096)
    spike[0, 0] = 1e12
    train(optimizer, [parameter], [[torch.full((1, 4096), 1e-12)]] + [[torch.zeros(1, 4096)]] * 20 + [[spike]] * 3)
    update = optimizer.state[parameter]["update"]
    assert update.isfinite().all() and parameter.isfinite().all()
    assert update.abs().max() > 1000


def test_decays_that_could_overflow_are_refused():
    weight = torch.nn.Parameter(torch.zeros(2, 4096))
    with pytest.raises(ValueError, match="let updates of a feature of 4096 weights exceed float16"):
        CompactAdam([weight], betas=(0.9, 0.9999999))
    with pytest.raises(ValueError, match="exceed float16"):
        CompactAdam([weight], betas=(0.9, 0.5))
    CompactAdam([weight], betas=(0.0, 0.5))
    for settings, message in (
        ({"lr": -1.0}, "lr=-1.0 is negative"),
        ({"betas": (1.0, 0.5)}, "beta1=1.0 is out of range"),
        ({"betas": (0.5, 1.0)}, "beta2=1.0 is out of range"),
        ({"eps": -1.0}, "eps=-1.0 is negative"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            CompactAdam([weight], **settings)


# The memory


def make_model(dtype=torch.float32, **config):
    torch.manual_seed(0)
    defaults = {"num_layers": 3, "d_model": 64, "num_features": 128, "jumprelu_threshold": 0.01}
    model = CrossLayerTranscoder(CLTConfig(**(defaults | config)))
    for part in (model.encoders, model.decoders):
        part.to(dtype)  # as the trainer does; thresholds stay in float32
    return model


def make_compact(model, **arguments):
    return make_optimizer(model, CLTTrainingArguments(optimizer="adam_compact", learning_rate=0.01, **arguments))


def make_steps(model, optimizer, seeds):
    for seed in seeds:
        inputs, labels = torch.randn(2, 32, 3, 64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(inputs, labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta1", "most"), [(0.9, 2.25), (0.0, 0.25)])
def test_bytes_per_parameter(dtype, beta1, most):
    """The rest above 2 and 0 is per feature and in biases and thresholds; here with few dimensions per feature."""
    model = make_model(dtype)
    optimizer = make_compact(model, adam_beta1=beta1)
    make_steps(model, optimizer, [0])
    held = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    assert len(optimizer.state) == len(list(model.parameters()))
    assert held <= most * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_formats(dtype):
    model = make_model(dtype)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_compact(model)
    make_steps(model, optimizer, range(3))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("thresholds") else dtype)
        assert not torch.equal(parameter, before[name])
        state = optimizer.state[parameter]
        assert state["update"].dtype == (torch.float16 if parameter.dim() > 1 else torch.float32)
        assert {state[entry].dtype for entry in ("step", "second_moment", "denominator")} == {torch.float32}


def test_weight_decay_is_for_matrices_alone():
    model = make_model()
    optimizer = make_compact(model, weight_decay=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        expected = 1 - 0.01 * 0.1 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_saved_and_restored_bit_for_bit(tmp_path, fresh_accelerate, dtype, beta1):
    model = make_model(dtype)
    optimizer = make_compact(model, adam_beta1=beta1)
    make_steps(model, optimizer, range(3))
    save_file(optimizer_tensors(model, optimizer), tmp_path / "optimizer.safetensors")

    other = make_model(dtype)
    other.load_state_dict(model.state_dict())
    resumed = make_compact(other, adam_beta1=beta1)
    load_optimizer_tensors(other, resumed, load_file(tmp_path / "optimizer.safetensors"))
    # accelerate puts every optimizer's state through load_state_dict; torch's changes number formats there.
    other, resumed = Accelerator(cpu=True).prepare(other, resumed)
    before, after = optimizer_tensors(model, optimizer), optimizer_tensors(other, resumed)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
    make_steps(model, optimizer, (3, 4))
    make_steps(other, resumed, (3, 4))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_load_state_dict_copies_by_position():
    one, two = parameters_of(SHAPES, torch.bfloat16), parameters_of(SHAPES, torch.bfloat16)
    optimizers_ = [CompactAdam([{"params": p[:1]}, {"params": p[1:]}], lr=0.01) for p in (one, two)]
    history = list(gradients(SHAPES, 6, torch.bfloat16))
    train(optimizers_[0], one, history[:3])
    with torch.no_grad():
        for source, target in zip(one, two, strict=True):
            target.copy_(source)
    optimizers_[1].load_state_dict(copy.deepcopy(optimizers_[0].state_dict()))
    for pair in zip((one, two), optimizers_, strict=True):
        train(pair[1], pair[0], history[3:])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("other", [{"optimizer": "adam"}, {"optimizer": "adam_compact", "adam_beta1": 0.0}])
def test_the_state_of_another_optimizer_is_refused(other):
    model = make_model()
    optimizer = make_compact(model)
    make_steps(model, optimizer, [0])
    tensors = optimizer_tensors(model, optimizer)
    with pytest.raises(ValueError, match="resume with the same --optimizer and --adam-beta1"):
        other = make_optimizer(model, CLTTrainingArguments(learning_rate=1e-3, **other))
        load_optimizer_tensors(model, other, tensors)


# In the trainer


@pytest.mark.parametrize("clt_dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_is_bit_for_bit_the_same(tiny_gpt2, small_text_file, tmp_path, fresh_accelerate, clt_dtype):
    """And two runs that are not interrupted are the same."""

    def run(stop_at=None, **more):
        args = CLTTrainingArguments(
            optimizer="adam_compact",
            weight_decay=0.01,
            clt_dtype=clt_dtype,
            training_steps=6,
            learning_rate=3e-3,
            gradient_accumulation_steps=2,
            model=tiny_gpt2,
            dataset=small_text_file,
            context_size=32,
            n_batches_in_buffer=2,
            batch_size=64,
            eval_tokens=0,
            checkpoint_interval=0,
            disable_progress_bar=True,
            output_dir=str(tmp_path),
            **more,
        )
        trainer = CLTTrainer(args, CLTConfig(num_layers=2, d_model=64, num_features=96, activation_fn="jumprelu"))
        batches = trainer.buffer.endless

        def interrupting():
            for number, batch in enumerate(batches(), start=1):
                if number == stop_at:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        trainer.buffer.endless = interrupting
        trainer.train()
        return {k: v for path in tmp_path.glob("W_*.safetensors") for k, v in load_file(path).items()}

    results = [run(), run(overwrite_output_dir=True)]
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        run(stop_at=5, overwrite_output_dir=True)
    (checkpoint,) = list_checkpoints(tmp_path)
    halves = [value for value in load_file(checkpoint / "optimizer.safetensors").values() if value.dim() > 1]
    assert len(halves) == 4 and {value.dtype for value in halves} == {torch.float16}
    results.append(run(resume_from_checkpoint="latest"))
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())


def test_it_learns_as_adam_does():
    """A made dictionary, topk: the loss that is left after 80 steps, beside Adam's."""
    losses = {}
    for name, settings in {
        "adam": {"optimizer": "adam"},
        "compact": {"optimizer": "adam_compact"},
        "without first moment": {"optimizer": "adam_compact", "adam_beta1": 0.0},
    }.items():
        model = make_model(activation_fn="topk", k=8)
        optimizer = make_optimizer(model, CLTTrainingArguments(learning_rate=1e-2, **settings))
        generator = torch.Generator().manual_seed(0)
        atoms = torch.randn(200, 3, 64, generator=generator)
        for step in range(80):
            codes = (torch.rand(64, 200, generator=generator) < 0.03) * torch.rand(64, 200, generator=generator)
            inputs = torch.einsum("na,ald->nld", codes, atoms)
            labels = torch.einsum("na,ald->nld", codes, atoms.roll(1, dims=2))
            loss = model(inputs, labels).loss
            if step == 0:
                first = loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["adam"] < 0.6 * first
    assert losses["compact"] < 1.1 * losses["adam"]
    assert losses["without first moment"] < 1.1 * losses["adam"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"optimizer='adam8bit'.*adam, adamw, adam_compact"):
        CLTTrainingArguments(optimizer="adam8bit")


# Clipping


@pytest.mark.parametrize("name", ["adam", "adam_compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_within_a_step_is_that_of_torch(name, dtype):
    """With a large epsilon, so that the size of gradients matters; norms above and below the largest, in turn."""
    models = make_model(dtype), make_model(dtype)
    arguments = {"optimizer": name, "learning_rate": 1.0, "adam_epsilon": 1.0}
    optimizers_ = [make_optimizer(model, CLTTrainingArguments(**arguments)) for model in models]
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-6, 0.1):
        for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator).mul_(size).to(ours.dtype)
            plain.grad = ours.grad.clone()
        clip_grad_norm(models[0], optimizers_[0], 0.5)
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
        for optimizer in optimizers_:
            optimizer.step()
    for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # torch rounds the norm of gradients in bfloat16, and the clipped ones.
        eps = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.detach(), plain.detach(), rtol=eps, atol=eps / 10)


@pytest.mark.parametrize("name", ["adam", "adam_compact"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_go_to_the_weights(name, value):
    model = make_model()
    optimizer = make_optimizer(model, CLTTrainingArguments(optimizer=name, learning_rate=2e-3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.encoders[0].weight.grad[3, 5] = value
    clip_grad_norm(model, optimizer, 1.0)
    optimizer.step()
    assert model.encoders[0].weight[3, 5].isnan()


@pytest.mark.parametrize("name", ["adam", "adam_compact"])
def test_with_a_scaler_for_float16(name):
    """A step with infinite gradients is left out, and its factor is of no other step."""
    weights = []
    for scaled in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, CLTTrainingArguments(optimizer=name, learning_rate=2e-3, adam_epsilon=1.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for number in range(3):
            if number == 1 and not scaled:
                continue
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = scaler.scale(torch.randn(parameter.shape, generator=generator))
                if number == 1:
                    parameter.grad.fill_(torch.inf)
            scaler.unscale_(optimizer)
            clip_grad_norm(model, optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
        weights.append(list(model.parameters()))
    assert all(map(torch.equal, *weights))


# Adam for weights in bfloat16


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adams_second_moment_falls_in_bfloat16(name):
    """Of torch's own it stays for ever: 0.999 v rounds back to v."""
    model = make_model(torch.bfloat16)
    optimizer = make_optimizer(model, CLTTrainingArguments(optimizer=name, learning_rate=2e-3))
    for step in range(1001):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(step == 0))
        optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32 and state["step"] == 1001
        expected = torch.full_like(state["exp_avg_sq"], 0.001 * 0.999**1000)
        torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("block", [pytest.param(7, marks=pytest.mark.slow), 2**20])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_bfloat16_it_is_a_step_of_float32_rounded(monkeypatch, weight_decay, block):
    monkeypatch.setattr(optimizers, "CPU_BLOCK", block)
    model = make_model(torch.bfloat16)
    optimizer = WideAdam(model.parameters(), lr=0.01, weight_decay=weight_decay)
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    reference = torch.optim.AdamW(wide, lr=0.01, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameter, other in zip(model.parameters(), wide, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            other.grad = parameter.grad.float()
        optimizer.step()
        reference.step()
        for parameter, other in zip(model.parameters(), wide, strict=True):
            torch.testing.assert_close(parameter.detach(), other.detach().to(parameter.dtype), rtol=2**-7, atol=1e-6)
            other.data.copy_(parameter)  # a step begins at the rounded weights


def test_adam_in_bfloat16_is_saved_and_restored_bit_for_bit(tmp_path, fresh_accelerate):
    def make():
        model = make_model(torch.bfloat16)
        return model, make_optimizer(model, CLTTrainingArguments(learning_rate=2e-3))

    (model, optimizer), (other, resumed) = make(), make()
    make_steps(model, optimizer, range(3))
    save_file(optimizer_tensors(model, optimizer), tmp_path / "optimizer.safetensors")
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(other, resumed, load_file(tmp_path / "optimizer.safetensors"))
    other, resumed = Accelerator(cpu=True).prepare(other, resumed)
    make_steps(model, optimizer, (3, 4))
    make_steps(other, resumed, (3, 4))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    before, after = optimizer_tensors(model, optimizer), optimizer_tensors(other, resumed)
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())


def test_moments_that_an_older_version_kept_in_bfloat16_are_widened():
    model = make_model(torch.bfloat16)
    old = torch.optim.Adam(model.parameters(), fused=True)
    make_steps(model, old, range(2))
    optimizer = make_optimizer(model, CLTTrainingArguments(learning_rate=2e-3))
    load_optimizer_tensors(model, optimizer, optimizer_tensors(model, old))
    make_steps(model, optimizer, (2,))
    assert {state["exp_avg_sq"].dtype for state in optimizer.state.values()} == {torch.float32}
