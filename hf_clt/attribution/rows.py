"""
Rows and columns of the graph. A row, what all sources give to one target, is one pass from the target down through
the transposed maps of the [`FrozenModel`]; a column, what one source gives to everything, one pass up.

For a target with vector e at the read point of layer l_t and position p_t, going down:

    r(m_l) = r(x_(l+1)) + readᵀ W_skipᵀ g_l + e (at l = l_t)
    r(x_l) = r(m_l) + N_1ᵀ O_lᵀ r(m_l)              g_l = r(x_(l+1)), or N_postᵀ r(x_(l+1))

where g_l is the gradient at what the MLP of layer l writes. Then

    A[t, feature s] = a_s Σ_(l < l_t) W_dec[s -> l] · g_l[p_s]
    A[t, error (l, p)] = e[l, p] · g_l[p]            A[t, token p] = embedding[p] · r(x_0)[p]

and what is left of the target's value are constants, [`RESTS`]. In parallel blocks the read point is x_l, behind the
step of the attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling_clt import CrossLayerTranscoder
from ..release import read_ahead
from .frozen import Block, FrozenModel


# Constants that belong to no node: b_dec; biases of attention, values and norms; position embeddings; MLP outputs at
# positions without nodes; the target's own bias (b_enc, or that of the last norm).
RESTS = ("decoder biases", "model biases", "position embeddings", "MLP outputs without nodes", "own bias")


@dataclass
class Sources:
    """
    What rows end in, on P tokens.

    Args:
        features (`Tensor` of shape `(n, 3)`, int64): Layer, position, feature, ascending.
        activations (`Tensor` of shape `(n,)`).
        errors (`Tensor` of shape `(L, P, D)`): What the MLPs wrote and the CLT does not give; 0 at `cleared`.
        cleared (`Tensor` of shape `(P,)`, bool): Positions without features and errors.
        rows (`list[Tensor]`): Per source layer the decoder rows of its active features, (u, J, D), J target layers.
        places (`Tensor` of shape `(n,)`, int64): Row of each feature node in that of its layer.
        biases (`Tensor` of shape `(L, D)`): b_dec.
        skips (`list[Tensor]`, *optional*): W_skip.
    """

    features: Tensor
    activations: Tensor
    errors: Tensor
    cleared: Tensor
    rows: list[Tensor]
    places: Tensor
    biases: Tensor
    skips: list[Tensor] | None

    def nodes_at(self) -> list[list[tuple[int, int]]]:
        """First node, and the node after the last, of each layer and position."""
        num_layers, length = len(self.rows), len(self.cleared)
        keys = self.features[:, 0] * length + self.features[:, 1]
        ends = torch.searchsorted(keys, torch.arange(num_layers * length + 1, device=keys.device)).tolist()
        return [[(ends[s * length + p], ends[s * length + p + 1]) for p in range(length)] for s in range(num_layers)]


@dataclass
class Seeds:
    """
    Where rows begin, B of them.

    Args:
        layers, positions (`Tensor` of shape `(B,)`, int64): Layer L is the output of the last.
        vectors (`Tensor` of shape `(B, D)`): At the read point of the layer, in the stream.
        own (`Tensor` of shape `(B,)`): The target's own bias.
    """

    layers: Tensor
    positions: Tensor
    vectors: Tensor
    own: Tensor

    def take(self, which: Tensor) -> "Seeds":
        return Seeds(self.layers[which], self.positions[which], self.vectors[which], self.own[which])


def decoder_rows(clt: CrossLayerTranscoder, layer: int, features: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that some features of a source layer write to its J target layers, (u, J, D), whatever the tying."""
    count, tying = clt.config.num_targets(layer), clt.config.decoder_tying
    owners = range(layer, layer + count) if tying == "per_target" else [layer]
    found = []
    for owner in owners:
        decoder = clt.decoders[owner]
        if decoder.in_file:
            read_ahead(decoder.weight, features)
        found.append(decoder.weight[features].to(dtype))
    rows = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    return rows.expand(-1, count, -1) if tying == "per_source" else rows


@torch.no_grad()
def find_sources(
    clt: CrossLayerTranscoder, frozen: FrozenModel, cleared: Tensor, dtype: torch.dtype = torch.float32
) -> Sources:
    """
    The active features of a prompt, read from the language model as it is, and the errors of the CLT there, which has
    no normalisation apart (see [`folded`]). What it gives is computed from its rows in `dtype`: nothing is lost between
    these and the errors.
    """
    device = frozen.tokens.device
    written = torch.stack([block.written for block in frozen.blocks])
    biases = torch.stack([decoder.bias.to(written) for decoder in clt.decoders])
    given = biases[:, None].expand_as(written).clone()
    nodes, activations, rows, places = [], [], [], []
    for s, block in enumerate(frozen.blocks):
        found = clt.encode_layer(s, block.read.to(clt.device))  # as in eval mode, whatever the CLT is in
        kept = ((found.values > 0) & ~cleared.to(clt.device)[found.tokens]).nonzero().squeeze(1)
        unique, place = found.indices[kept].unique(return_inverse=True)
        tokens, values = found.tokens[kept].to(device), found.values[kept].to(written)
        nodes.append(torch.stack([torch.full_like(tokens, s), tokens, found.indices[kept].to(device)], dim=1))
        activations.append(values)
        rows.append(decoder_rows(clt, s, unique, dtype).to(device))
        places.append(place.to(device))
        if len(values):
            at = torch.sparse_coo_tensor(torch.stack([tokens, places[s]]), values, (len(cleared), len(unique)))
            for target in range(rows[s].shape[1]):
                given[s + target] += torch.sparse.mm(at, rows[s][:, target])
    skips = [skip.weight.to(written) for skip in clt.skips] if clt.config.skip_connection else None
    for layer in range(len(given)) if skips else ():
        given[layer] += frozen.blocks[layer].read @ skips[layer]
    return Sources(
        features=torch.cat(nodes),
        activations=torch.cat(activations),
        errors=(written - given).masked_fill(cleared[None, :, None], 0),
        cleared=cleared,
        rows=rows,
        places=torch.cat(places),
        biases=biases,
        skips=skips,
    )


@torch.no_grad()
def feature_seeds(clt: CrossLayerTranscoder, frozen: FrozenModel, features: Tensor) -> Seeds:
    """Of the pre-activations of features (B, 3): their encoder rows, behind N_2ᵀ where they read behind that norm."""
    layers, positions, indices = features.unbind(1)
    vectors = frozen.tokens.new_empty(len(features), frozen.tokens.shape[1])
    own = vectors.new_empty(len(features))
    for s in layers.unique().tolist():
        at = layers == s
        encoder = clt.encoders[s]
        which = indices[at].to(encoder.weight.device)
        rows, bias = encoder.weight[which].to(vectors), encoder.bias[which].to(vectors)
        norm = frozen.blocks[s].read_norm
        if norm is not None:
            bias = bias + rows @ norm.bias
            rows = norm.at(positions[at]).transposed(rows)
        vectors[at], own[at] = rows, bias
    return Seeds(layers, positions, vectors, own)


@torch.no_grad()
def logit_seeds(frozen: FrozenModel, tokens: list[int], minus: list[int | None], positions: list[int]) -> Seeds:
    """Of logits less their mean over the vocabulary, or less that of another token; without the head's bias."""
    mean = frozen.unembedding.mean(dim=0)
    others = [mean if other is None else frozen.unembedding[other] for other in minus]
    vectors = frozen.unembedding[tokens] - torch.stack(others)
    where = torch.tensor(positions, device=vectors.device)
    own = vectors @ frozen.final.bias
    layers = torch.full_like(where, len(frozen.blocks))
    return Seeds(layers, where, frozen.final.at(where).transposed(vectors), own)


@torch.no_grad()
def pull(frozen: FrozenModel, sources: Sources, seeds: Seeds) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Rows of the graph.

    Args:
        seeds ([`Seeds`]): B targets; those of like layers and positions together take less work.

    Returns:
        A, (B, n + L·P + P), and of each of [`RESTS`] (B,).
    """
    num_layers, batch = len(frozen.blocks), len(seeds.layers)
    length, top = int(seeds.positions.max()) + 1, min(int(seeds.layers.max()), num_layers)
    rests = {name: seeds.own.new_zeros(batch) for name in RESTS}
    rests["own bias"] += seeds.own
    r = seeds.vectors.new_zeros(batch, length, seeds.vectors.shape[1])
    gradients = r.new_empty(length, batch, top, r.shape[2])  # g_l, by position: each is then one matrix product
    inject(r, seeds, num_layers)
    for layer in reversed(range(min(top + 1, num_layers))):
        block = frozen.blocks[layer]
        through = 0
        if layer < top:
            g = r if block.post is None else block.post.transposed(r)
            gradients[:, :, layer] = g.transpose(0, 1)
            through = pull_constants(block, sources, layer, r, g, rests)
        if not block.is_parallel:
            r += through
            inject(r, seeds, layer)
        rests["model biases"] += torch.einsum("bpd,pd->b", r, block.constant[:length])
        r = r + block.pre.transposed(block.attention.transposed(r))
        if block.is_parallel:
            r += through
            inject(r, seeds, layer)
    rests["position embeddings"] += torch.einsum("bpd,pd->b", r, frozen.positions[:length])
    return contract(frozen, sources, gradients, r), rests


def inject(r: Tensor, seeds: Seeds, layer: int) -> None:
    """Adds the vectors of the targets that read at this layer to r, (B, P, D), in place."""
    rows = (seeds.layers == layer).nonzero().squeeze(1)
    r[rows, seeds.positions[rows]] += seeds.vectors[rows]


def pull_constants(
    block: Block, sources: Sources, layer: int, r: Tensor, g: Tensor, rests: dict[str, Tensor]
) -> Tensor | int:
    """
    Adds what the constants of one MLP give to B targets to their rests, in place. Gives what goes on through the skip
    connection to the read point, (B, P, D), or 0.
    """
    length = g.shape[1]
    kept = (~sources.cleared[:length])[:, None].to(g.dtype)
    rests["decoder biases"] += (g * kept).sum(dim=1) @ sources.biases[layer]
    rests["MLP outputs without nodes"] += torch.einsum("bpd,pd->b", g, block.written[:length] * (1 - kept))
    if block.post is not None:
        rests["model biases"] += r.sum(dim=1) @ block.post.bias
    if sources.skips is None:
        return 0
    through = (g * kept) @ sources.skips[layer].T
    if block.read_norm is None:
        return through
    rests["model biases"] += through.sum(dim=1) @ block.read_norm.bias
    return block.read_norm.transposed(through)


def contract(frozen: FrozenModel, sources: Sources, gradients: Tensor, r: Tensor) -> Tensor:
    """Edges (B, n + L·P + P) from g_l, (P', B, L', D), and r(x_0), (B, P', D), at the first P' positions."""
    length, batch, top, _ = gradients.shape
    num_features, (num_layers, all_tokens) = len(sources.features), sources.errors.shape[:2]
    edges = r.new_zeros(batch, num_features + (num_layers + 1) * all_tokens)
    for s, nodes in enumerate(sources.nodes_at()[:top]):
        count = min(top - s, sources.rows[s].shape[1])
        for p, (first, end) in enumerate(nodes[:length]):
            if first < end:
                rows = sources.rows[s][sources.places[first:end], :count]
                written = gradients[p, :, s : s + count].flatten(1) @ rows.flatten(1).T
                edges[:, first:end] = written * sources.activations[first:end]
    errors = edges[:, num_features : num_features + num_layers * all_tokens].view(batch, num_layers, all_tokens)
    errors[:, :top, :length] = torch.einsum("pbld,lpd->blp", gradients, sources.errors[:top, :length])
    edges[:, -all_tokens:][:, :length] = torch.einsum("bpd,pd->bp", r, frozen.tokens[:length])
    return edges


@dataclass
class Change:
    """What a change of the CLT's outputs does downstream, (K, P, D) each and, but for the last, one per layer."""

    starts: list[Tensor]  # of x_l
    reads: list[Tensor]  # of what features read
    added: list[Tensor]  # of what the MLP adds
    final: Tensor  # of what the head reads


@torch.no_grad()
def push(frozen: FrozenModel, sources: Sources, written: Tensor) -> Change:
    """
    Columns of the graph: what changes of what the CLT writes, (K, L, P, D), do downstream, everything frozen. A
    feature's pre-activation changes by its encoder row times that of what it reads.
    """
    x = torch.zeros_like(written[:, 0])
    kept = (~sources.cleared)[:, None].to(x.dtype)
    change = Change([], [], [], x)
    for layer, block in enumerate(frozen.blocks):
        attended = block.attention.linear(block.pre.linear(x))
        stream = x if block.is_parallel else x + attended
        read = stream if block.read_norm is None else block.read_norm.linear(stream)
        y = written[:, layer]
        if sources.skips is not None:
            y = y + (read * kept) @ sources.skips[layer]
        y = y if block.post is None else block.post.linear(y)
        for name, value in (("starts", x), ("reads", read), ("added", y)):
            getattr(change, name).append(value)
        x = x + attended + y
    change.final = frozen.final.linear(x)
    return change


@torch.no_grad()
def head_loadings(frozen: FrozenModel, sources: Sources, node: int, seed: Seeds) -> tuple[Tensor, Tensor]:
    """
    An edge, split by the attention head that brings it to the target's position last.

    Args:
        node (`int`): The source, a feature.
        seed ([`Seeds`]): One target.

    Returns:
        By layer and head, (L, H); and what comes without attention, (L,), by the layer whose MLP writes it. The sum of
        both is A[t, s].
    """
    change = push(frozen, sources, writes_of(sources, torch.tensor([node])))
    layer, position, vector = int(seed.layers), int(seed.positions), seed.vectors[0]
    heads = vector.new_zeros(len(frozen.blocks), frozen.blocks[0].attention.num_heads)
    direct = vector.new_zeros(len(frozen.blocks))
    for at, block in enumerate(frozen.blocks):
        attention = block.attention
        if at < layer:
            direct[at] = change.added[at][0, position] @ vector
        if at < layer or (at == layer and not block.is_parallel):
            taken = attention.by_head(block.pre.linear(change.starts[at]))[0, position]  # (H, d_head)
            post = None if attention.post is None else attention.post.at(torch.tensor([position]))
            read = vector if post is None else post.transposed(vector[None])[0]
            heads[at] = (taken * (read @ attention.output).view_as(taken)).sum(dim=1)
    return heads, direct


def writes_of(sources: Sources, nodes: Tensor, factors: Tensor | None = None) -> Tensor:
    """What feature nodes (K,) write, times `factors` (K,) (by default all of it), (K, L, P, D)."""
    num_layers, length, width = sources.errors.shape
    written = sources.errors.new_zeros(len(nodes), num_layers, length, width)
    for k, node in enumerate(nodes.tolist()):
        layer, position, _ = sources.features[node].tolist()
        rows = sources.rows[layer][sources.places[node]] * sources.activations[node]
        written[k, layer : layer + len(rows), position] = rows if factors is None else rows * factors[k]
    return written


__all__ = [
    "RESTS",
    "Change",
    "Seeds",
    "Sources",
    "feature_seeds",
    "find_sources",
    "head_loadings",
    "logit_seeds",
    "pull",
    "push",
    "writes_of",
]
