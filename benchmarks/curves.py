"""
Where fast training ends: a CLT trained from the same initial weights, on the same batches in the same order, once per
variant of the step; and how far each variant is from the dense reference, at every step and at the end.

In exact arithmetic "ours" and "dense" are one training run. In floating point every sum rounds, top-k selection turns
a rounding error into another feature now and then, and training amplifies both. How much of that is rounding alone is
measured by the variant "dense_reversed": the dense reference, with every sum taken in reverse order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from hf_clt.configuration_clt import TOPK_FAMILY, CLTConfig
from hf_clt.evaluation.metrics import MetricSums
from hf_clt.folding import MIN_STD, STATISTICS
from hf_clt.harvest.buffer import ActivationBuffer
from hf_clt.harvest.harvester import Harvester, check_context_size, load_language_model
from hf_clt.harvest.normalization import estimate_statistics, set_firing_rate
from hf_clt.harvest.tokens import open_text
from hf_clt.hub.plots import BLUE, GREEN, GREY, INK, ORANGE, VIOLET
from hf_clt.kernels.encode import multiplies_bfloat16
from hf_clt.modeling_clt import CrossLayerTranscoder
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.optimizers import make_optimizer
from hf_clt.training.schedules import learning_rate_scale, sparsity_scale
from hf_clt.training.setup import fill_defaults, num_decay_steps, prepare_cpu

from .dense_reference import dense_losses_of
from .machine import device_name, versions
from .measure import RATE_SAMPLE
from .output import align, draw_figure


THRESHOLD_BATCHES = 8  # on which batchtopk's threshold for the evaluation is set
EARLY_STEPS = 10  # of which the difference is stated beside that of all


@dataclass(frozen=True)
class Variant:
    """
    One way to make the training step.

    Args:
        label: What it is, for people.
        dense: The dense reference instead of the model's own forward pass.
        reverse: Every sum over tokens, features and dimensions in reverse order.
        autocast: Forward under `torch.autocast` in bfloat16.
        optimizer: Fields of [`CLTTrainingArguments`] in place of fused Adam's.
    """

    label: str
    dense: bool = False
    reverse: bool = False
    autocast: bool = False
    optimizer: dict = field(default_factory=dict)


VARIANTS = {
    "dense": Variant("dense", dense=True),
    "dense_reversed": Variant("dense, sums in reverse order", dense=True, reverse=True),
    "ours": Variant("ours"),
    "autocast": Variant("ours, autocast bfloat16", autocast=True),
    "adam_compact": Variant("ours, adam_compact", optimizer={"optimizer": "adam_compact"}),
    "adam_compact_beta1_0": Variant(
        "ours, adam_compact, beta1 0", optimizer={"optimizer": "adam_compact", "adam_beta1": 0.0}
    ),
}
STYLES = {  # colour, line style, width: what may lie on top of each other differs in all three
    "dense": ("#c9ced4", "-", 5.0),
    "dense_reversed": (INK, (0, (1, 2)), 1.6),
    "ours": (BLUE, "-", 1.4),
    "autocast": (ORANGE, (0, (5, 2)), 1.3),
    "adam_compact": (GREEN, "-.", 1.3),
    "adam_compact_beta1_0": (VIOLET, (0, (1, 1)), 1.3),
}


def compare(
    args: CLTTrainingArguments,
    config: CLTConfig,
    names: list[str],
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict], None] = lambda record: None,
) -> dict:
    """
    Harvests once, then trains and evaluates every variant.

    Args:
        args: Of these the language model, the text, the buffer, learning rate and schedule, clipping, `seed`,
            `training_steps`, `batch_size` and `eval_tokens` are used.
        config: The CLT.
        names: Keys of `VARIANTS`; "dense" comes first, whatever its place, since the others are compared with it.
        say: Gets a line now and then.
        keep: Gets what there is to return after each variant: a long run that is stopped has its first ones.

    Returns:
        `dict`: `settings`; `device` and `versions`; and `variants`, by name what [`train`] returned with `label`,
        `heldout` ([`evaluate`]), `loss_difference` (each step's |loss - dense| / dense) and `parameter_difference`:
        the distance of the final parameters from dense's, over the distance that dense moved from the start.

    Raises:
        ValueError: For a variant that does not exist, without "dense", or without held-out tokens; and what is wrong
            with the language model or the text.
        FloatingPointError: If a loss is not finite.
    """
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variants: {name!r} is unknown; choose from {', '.join(VARIANTS)}")
    if "dense" not in names:
        raise ValueError("variants: 'dense', which the others are compared with, is missing; add it")
    if args.eval_tokens == 0:
        raise ValueError("eval_tokens=0 leaves no tokens to compare on; give for example 4096")
    device = torch.device(args.device or "cpu")
    args = fill_defaults(args, config, device)
    if device.type == "cpu":
        prepare_cpu()  # as the trainer does
    say("harvesting")
    statistics, batches, heldout = harvest(args, config, device)

    def start() -> CrossLayerTranscoder:
        return make_clt(config, args, statistics, batches, device)

    record = {
        "settings": {**args.non_default(), **shape(config)},
        "device": device_name(str(device)),
        "versions": versions(),
        "variants": {},
    }
    reference = None  # the dense variant's final parameters
    for name in ["dense", *[name for name in dict.fromkeys(names) if name != "dense"]]:
        clt = start()
        result = {"label": VARIANTS[name].label}
        if VARIANTS[name].autocast and device.type == "cpu" and not multiplies_bfloat16():
            result["label"] += " (float32 on this CPU)"
        result |= train(VARIANTS[name], clt, args, batches, lambda text, name=name: say(f"{name}: {text}"))
        result["heldout"] = evaluate(clt, args, batches, heldout)
        say(f"{name}: held-out nmse {result['heldout']['nmse']:.4f}, {result['seconds']:.0f} s")
        if name == "dense":
            reference = [p.detach() for p in clt.parameters()]
            moved = distance(reference, start().parameters())
            losses = result["loss"]
        result["loss_difference"] = [abs(a - b) / abs(b) for a, b in zip(result["loss"], losses, strict=True)]
        result["parameter_difference"] = distance(reference, clt.parameters()) / moved
        record["variants"][name] = result
        keep(record)
        del clt
    return record


def shape(config: CLTConfig) -> dict:
    """What the record says about the CLT."""
    names = ["num_layers", "d_model", "num_features", "activation_fn"]
    if config.activation_fn in TOPK_FAMILY:
        names += ["k", "k_scope"]
    else:
        names += ["sparsity_lambda", "sparsity_c"]
    if config.activation_fn == "jumprelu":
        names += ["jumprelu_threshold", "jumprelu_bandwidth"]
    return {name: getattr(config, name) for name in [*names, "decoder_reach"]}


def harvest(
    args: CLTTrainingArguments, config: CLTConfig, device: torch.device
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """
    Statistics, training batches and held-out batches, as the trainer takes them from the same arguments.

    Returns:
        `tuple`: `mean_in`, `std_in`, `mean_out`, `std_out` (L, D); `training_steps` batches of `inputs` and `labels`
        (N, L, D), in `buffer_dtype`; and batches of held-out tokens.
    """
    model, tokenizer = load_language_model(
        args.model,
        revision=args.model_revision,
        dtype=args.model_dtype,
        trust_remote_code=args.trust_remote_code,
        device=device,
    )
    check_context_size(model.config, args.context_size)
    harvester = Harvester(model, config.feature_input_hook, config.feature_output_hook)
    streams = [open_text(args, tokenizer, heldout=heldout) for heldout in (False, True)]
    statistics = estimate_statistics(streams[0], harvester, args.normalization_estimation_batches, progress=False)
    dtype = getattr(torch, args.buffer_dtype or "float32")
    buffer = ActivationBuffer(
        streams[0],
        harvester,
        n_batches=args.n_batches_in_buffer,
        batch_size=args.batch_size,
        dtype=dtype,
        device="cpu",
        seed=args.seed,
    )
    batches = list(islice(buffer.endless(), args.training_steps))
    heldout = []
    for batch in streams[1]:
        inputs, labels = harvester.harvest(batch, dtype=dtype)
        heldout.append({"inputs": inputs.cpu(), "labels": labels.cpu()})
    return statistics, batches, heldout


def make_clt(
    config: CLTConfig,
    args: CLTTrainingArguments,
    statistics: dict[str, Tensor],
    batches: list[dict[str, Tensor]],
    device: torch.device,
) -> CrossLayerTranscoder:
    """The CLT that every variant starts from, the same at every call: what the trainer makes of seed and data."""
    torch.manual_seed(args.seed)
    clt = CrossLayerTranscoder(config).to(device).train()
    clt.set_normalization(**statistics)
    if config.activation_fn not in TOPK_FAMILY:
        some = batches[: max(1, RATE_SAMPLE // args.batch_size)]
        inputs = torch.cat([batch["inputs"] for batch in some]).to(device, torch.float32)
        set_firing_rate(clt, inputs, rate=min(0.02, 64 / config.num_features))
    return clt


def train(
    variant: Variant,
    clt: CrossLayerTranscoder,
    args: CLTTrainingArguments,
    batches: list[dict[str, Tensor]],
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """
    Trains a CLT in place, one update per batch, without losses on dead features, which the dense reference lacks.

    Args:
        variant: How the step is made.
        clt: In train mode, with statistics; its dtype is computed in.
        args: Gives learning rate, schedules, clipping and Adam's settings.
        batches: `inputs` and `labels`, (N, L, D) each, raw.
        say: Gets a line every tenth of the steps.

    Returns:
        `dict`: per step `loss`, and `nmse`, the reconstruction loss over the summed variance of the batch's normalised
        targets, all layers together; `seconds` for all steps.
    """
    device, dtype = clt.device, clt.encoders[0].weight.dtype
    optimizer = make_optimizer(clt, replace(args, **variant.optimizer))
    if variant.reverse:
        reverse(clt)
    decay_steps = num_decay_steps(args, clt.config)
    result = {"loss": [], "nmse": []}
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        inputs, labels = (batch[name].to(device, dtype) for name in ("inputs", "labels"))
        if variant.reverse:
            inputs, labels = inputs.flip(0, 2), labels.flip(0, 2)
        for group in optimizer.param_groups:
            scale = learning_rate_scale(step, len(batches), args.num_warmup_steps, args.lr_scheduler, decay_steps)
            group["lr"] = args.learning_rate * scale
        scale = sparsity_scale(step, len(batches), args.sparsity_schedule, args.sparsity_delay_steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.autocast):
            if variant.dense:
                losses = dense_losses_of(clt, inputs, labels, sparsity_scale=scale)
                error, loss = losses["reconstruction_loss"], losses["loss"]
            else:
                output = clt(inputs, labels, sparsity_scale=scale)
                error, loss = output.reconstruction_loss, output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clt.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if not loss.isfinite():
            raise FloatingPointError(
                f"{variant.label}: the loss is not finite at step {step + 1}; lower learning_rate"
            )
        result["loss"].append(loss.item())
        result["nmse"].append(error.item() / variance(labels, clt).item())
        if (step + 1) % max(1, len(batches) // 10) == 0:
            say(f"step {step + 1} of {len(batches)}, loss {loss.item():.1f}, {time.perf_counter() - start:.0f} s")
    result["seconds"] = time.perf_counter() - start
    if variant.reverse:
        reverse(clt)
    return result


@torch.no_grad()
def reverse(clt: CrossLayerTranscoder) -> None:
    """
    Reverses the order of features and dimensions in place, so that the same sums are taken in reverse order (with the
    batch flipped likewise). Done twice it changes nothing.
    """
    for parameter in clt.parameters():
        # (F, D), (F, J, D), (F,) and (D,): all but the target layers
        parameter.copy_(parameter.flip([dim for dim in range(parameter.dim()) if (parameter.dim(), dim) != (3, 1)]))
    for name in STATISTICS:
        setattr(clt, name, getattr(clt, name).flip(1))


def variance(labels: Tensor, clt: CrossLayerTranscoder) -> Tensor:
    """Σ over layers and dimensions of the variance over tokens of the normalised targets (N, L, D)."""
    return (labels.var(dim=0, correction=0) / clt.std_out.clamp_min(MIN_STD).square()).sum()


@torch.no_grad()
def evaluate(
    clt: CrossLayerTranscoder,
    args: CLTTrainingArguments,
    batches: list[dict[str, Tensor]],
    heldout: list[dict[str, Tensor]],
) -> dict:
    """
    The metrics on held-out tokens, in eval mode and without autocast, through the model's own forward pass for every
    variant. The dense reference keeps no running threshold, so for batchtopk it is started anew and moved over the
    last training batches, with the final weights.

    Returns:
        `dict`: `nmse` and `l0` as in [`MetricSums`], `nmse_per_layer`, `dead_fraction`, `num_tokens`.
    """
    config, dtype = clt.config, clt.encoders[0].weight.dtype
    clt.train()
    if config.activation_fn == "batchtopk":
        clt.restart_running_thresholds()
        for batch in batches[-THRESHOLD_BATCHES:]:
            clt(batch["inputs"].to(clt.device, dtype))
    clt.eval()
    sums = MetricSums(config.num_layers, config.d_model, config.num_features, clt.device)
    for batch in heldout:
        for rows in torch.arange(len(batch["inputs"])).split(args.batch_size):
            output = clt(batch["inputs"][rows].to(clt.device, dtype))
            sums.update(batch["labels"][rows], output.reconstruction, output.features)
    metrics = sums.compute()
    return {name: metrics[name] for name in ("nmse", "l0", "dead_fraction", "num_tokens", "nmse_per_layer")}


@torch.no_grad()
def distance(first, second) -> float:
    """Euclidean distance of two lists of tensors, summed in float64."""
    squares = [
        torch.linalg.vector_norm(a - b, dtype=torch.float64).square() for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(squares).sum().sqrt().item()


# -- table and plot ---------------------------------------------------------------------------------------------------


def format_comparison(record: dict) -> str:
    """
    The variants as an aligned table, with the largest relative differences from dense.

    Args:
        record: What [`compare`] returned.
    """
    dense = record["variants"]["dense"]
    titles = ["", "last loss", "held-out NMSE", "from dense", "L0", "loss: first step", f"first {EARLY_STEPS}"]
    table = [[*titles, "all steps", "parameters"]]
    for name, result in record["variants"].items():
        nmse, differences = result["heldout"]["nmse"], result["loss_difference"]
        cells = [result["label"], f"{result['loss'][-1]:,.1f}", f"{nmse:.5f}"]
        cells += ["", f"{result['heldout']['l0']:,.1f}", *[""] * 4]
        if name != "dense":
            cells[3] = f"{100 * (nmse / dense['heldout']['nmse'] - 1):+.2f} %"
            cells[5:] = [f"{v:.1e}" for v in (differences[0], max(differences[:EARLY_STEPS]), max(differences))]
            cells.append(f"{result['parameter_difference']:.1e}")
        table.append(cells)
    return align([table[0], None, *table[1:]])


def plot_comparison(record: dict, path: Path) -> None:
    """
    Draws the training curves of all variants, how far each is from dense at every step, and where each ends.

    Args:
        record: What [`compare`] returned.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    results = record["variants"]
    dense = results["dense"]
    steps = range(1, len(dense["loss"]) + 1)
    others = [name for name in results if name != "dense"]
    with draw_figure(path, (12.6, 4.6)) as figure:
        curves, differences, ends = figure.subplots(1, 3, width_ratios=(4, 4, 3))
        for name, result in results.items():
            colour, style, width = STYLES[name]
            line = {"color": colour, "linestyle": style, "linewidth": width, "label": result["label"]}
            curves.plot(steps, result["nmse"], **line)
            if name != "dense":
                # Two losses may be equal to the last bit, which a logarithmic axis cannot show.
                shown = [value if value > 0 else float("nan") for value in result["loss_difference"]]
                differences.plot(steps, shown, **line)
        curves.set_title("training batches")
        curves.set_ylabel("NMSE of the batch (normalised, all layers)")
        curves.set_ylim(0, None)
        differences.set_title("distance from dense")
        differences.set_ylabel("|loss − dense loss| / dense loss")
        differences.set_yscale("log")
        for panel in (curves, differences):
            panel.set_xlabel("step")
        for row, name in enumerate(others):
            change = 100 * (results[name]["heldout"]["nmse"] / dense["heldout"]["nmse"] - 1)
            ends.plot([0, change], [row, row], color=STYLES[name][0], linewidth=2)
            ends.plot([change], [row], "o", color=STYLES[name][0])
            ends.annotate(
                f"{results[name]['heldout']['nmse']:.4f} ({change:+.2f} %)",
                (change, row),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        ends.axvline(0, color=GREY, linewidth=1)
        ends.set_yticks(range(len(others)), [results[name]["label"].replace(", ", "\n", 1) for name in others])
        ends.set_ylim(len(others) - 0.4, -0.7)
        ends.margins(x=0.35)
        ends.grid(axis="y", visible=False)
        ends.set_title(f"held-out NMSE; dense {dense['heldout']['nmse']:.4f}")
        ends.set_xlabel("% above dense")
        handles, labels = curves.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), handlelength=4)


__all__ = [
    "VARIANTS",
    "Variant",
    "compare",
    "evaluate",
    "format_comparison",
    "harvest",
    "make_clt",
    "plot_comparison",
    "reverse",
    "train",
]
