"""What a prompt makes active: the features of each token as a table, and how many there are as a heat map."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..harvest.harvester import Harvester, check_fit
from ..hub.plots import BLUE, GREY, INK, PLOT_STYLE, import_matplotlib
from ..modeling_clt import CrossLayerTranscoder
from ..sparsity import SparseFeatures, sparse_from_dense
from .evaluate import eval_mode


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_WRITTEN_CELLS = 450  # of a heat map whose numbers are written into it


@torch.no_grad()
def prompt_features(clt: CrossLayerTranscoder, harvester: Harvester, input_ids: Tensor) -> SparseFeatures:
    """
    The features that are active on one prompt, read from the language model as it is.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT; its features are computed as in eval mode.
        harvester ([`Harvester`]): Of the language model that the CLT was trained on, with its hooks.
        input_ids (`Tensor` of shape `(1, T)`): Token ids.

    Returns:
        [`SparseFeatures`]: On (1, T) tokens. None is active at position 0, on which a CLT is not trained.

    Raises:
        ValueError: If the CLT does not fit the harvester, or if there is more than one prompt.
    """
    check_fit(clt.config, harvester)
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give one prompt, (1, tokens)")
    inputs, _ = harvester(input_ids)
    with eval_mode(clt):
        acts = clt.encode(inputs.to(clt.device, torch.promote_types(clt.dtype, torch.float32)))
    acts[:, 0] = 0
    return sparse_from_dense(acts)


def top_features(
    features: SparseFeatures, tokens: list[str], count: int = 10, position: int | None = None
) -> list[dict]:
    """
    The features with the largest activations on a prompt.

    Args:
        features ([`SparseFeatures`]): On one prompt: of [`prompt_features`], of `clt.encode_sparse`, or of the output
            of a [`ReplacementModel`].
        tokens (`list[str]`): The prompt's T tokens as text.
        count (`int`): Rows at most.
        position (`int`, *optional*): Only at this position, -1 being the last; by default at all.

    Returns:
        `list[dict]`: `layer`, `position`, `token`, `feature` and `activation` each, the largest activation first; a
        `pandas.DataFrame` of it is a table.

    Raises:
        ValueError: If the number of tokens is not that of the features, or there is no such position.
    """
    num_tokens = _check_tokens(features, tokens)
    if position is not None and not -num_tokens <= position < num_tokens:
        raise ValueError(f"position={position} is outside the prompt's {num_tokens} tokens")
    rows = []
    for layer, found in enumerate(features.layers):
        active = found.values > 0
        if position is not None:
            active = active & (found.rows == position % num_tokens)
        values, best = torch.where(active, found.values, 0).topk(min(count, int(active.sum())))
        for value, place, feature in zip(
            values.tolist(), found.rows[best].tolist(), found.indices[best].tolist(), strict=True
        ):
            row = {"layer": layer, "position": place, "token": tokens[place], "feature": feature, "activation": value}
            rows.append(row)
    return sorted(rows, key=lambda row: -row["activation"])[:count]


def active_per_token(features: SparseFeatures, strength: bool = False) -> Tensor:
    """Number of active features of each layer at each token, or with `strength` the sum of activations; (L, N)."""
    totals = []
    for layer in features.layers:
        active = layer.values > 0
        values = torch.where(active, layer.values, 0) if strength else active.to(torch.float32)
        totals.append(values.new_zeros(layer.num_tokens).index_add_(0, layer.rows, values))
    return torch.stack(totals)


def plot_prompt_features(features: SparseFeatures, tokens: list[str], strength: bool = False) -> "Figure":
    """
    A heat map of a prompt, tokens from left to right and layers upwards.

    Args:
        features ([`SparseFeatures`]): On one prompt, as for [`top_features`]; (1, T) or (T,) tokens.
        tokens (`list[str]`): The prompt's T tokens as text.
        strength (`bool`): Shows the sum of the activations instead of the number of active features.

    Returns:
        `matplotlib.figure.Figure`: To be shown, or saved with `figure.savefig(path)`. A token without any feature,
        such as the first, is grey.

    Raises:
        ValueError: If the number of tokens is not that of the features.
        ImportError: matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    _check_tokens(features, tokens)
    totals = active_per_token(features, strength).cpu()
    num_layers, num_tokens = totals.shape
    empty = totals.sum(dim=0) == 0
    with matplotlib.rc_context(PLOT_STYLE | {"axes.grid": False}):
        size = (max(4.0, 1.9 + 0.52 * num_tokens), max(2.6, 1.3 + 0.19 * num_layers))
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        colours = LinearSegmentedColormap.from_list("white to blue", ["#ffffff", BLUE, "#10294a"])
        colours = colours.with_extremes(bad="#eceef1")
        shown = totals.masked_fill(empty, torch.nan)
        image = axis.imshow(
            shown.numpy(), origin="lower", aspect="auto", cmap=colours, vmin=0, interpolation="nearest"
        )
        if totals.numel() <= MAX_WRITTEN_CELLS:
            for layer in range(num_layers):
                for place in (~empty).nonzero().flatten().tolist():
                    value = totals[layer, place].item()
                    colour = "white" if value > 0.45 * totals.max() else INK
                    axis.text(place, layer, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
        names = [token.replace("\n", "\\n").strip() or repr(token)[1:-1] for token in tokens]
        names = [name.replace("$", r"\$") for name in names]  # or matplotlib reads a formula
        axis.set_xticks(range(num_tokens), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_ylabel("layer")
        axis.yaxis.set_major_locator(MaxNLocator(nbins=num_layers if num_layers <= 32 else 16, integer=True))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title("sum of activations" if strength else "active features")
        if empty.any():
            axis.set_title("grey: no features read", loc="right", color=GREY, fontsize=8, fontweight="normal")
        bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    return figure


def _check_tokens(features: SparseFeatures, tokens: list[str]) -> int:
    num_tokens = features.layers[0].num_tokens
    if len(tokens) != num_tokens:
        raise ValueError(
            f"tokens has {len(tokens)} entries, but the features are on {num_tokens} tokens; give those of one prompt"
        )
    return num_tokens
