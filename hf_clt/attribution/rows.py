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
from functools import cached_property

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
        rows (`list[Tensor]`): Per source layer the decoder rows of its active features, (u, J, D), J target layers;
            views of `written`.
        places (`Tensor` of shape `(n,)`, int64): Row of each feature node in that of its layer.
        biases (`Tensor` of shape `(L, D)`): b_dec.
        skips (`list[Tensor]`, *optional*): W_skip.
        written (`Tensor` of shape `(W, D)`): What the features of a prompt write, for all nodes with a feature once.
        starts (`Tensor` of shape `(n,)`, int64): Where in it is what each feature node writes to its own layer. What
            it writes to the next layers stands behind that; of decoders tied per source it is the same.
    """

    features: Tensor
    activations: Tensor
    errors: Tensor
    cleared: Tensor
    rows: list[Tensor]
    places: Tensor
    biases: Tensor
    skips: list[Tensor] | None
    written: Tensor
    starts: Tensor

    @cached_property
    def by_position(self) -> Tensor:
        """The feature nodes by position, layer, feature, (n,): what writes to a layer at a position is one piece."""
        return (self.features[:, 1] * len(self.rows) + self.features[:, 0]).argsort(stable=True)

    @cached_property
    def ends(self) -> list[list[int]]:
        """In that order, by position: where the nodes of each layer begin, and where those of the last one end."""
        num_layers, length = len(self.rows), len(self.cleared)
        keys = self.features[:, 1] * num_layers + self.features[:, 0]
        counts = keys.bincount(minlength=length * num_layers).cumsum(0).tolist()
        return [[0, *counts][p * num_layers : (p + 1) * num_layers + 1] for p in range(length)]

    def writing_to(self, layer: int) -> Tensor:
        """In that order, where in `written` is what each node writes to a layer, (n,); of nodes that reach it."""
        step = int(self.rows[0].stride(1) > 0)
        return (self.starts + step * (layer - self.features[:, 0]))[self.by_position]


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
        return Seeds(*(values[which] for values in vars(self).values()))

    @staticmethod
    def joined(parts: list["Seeds"]) -> "Seeds":
        return Seeds(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


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


def read_decoders(
    clt: CrossLayerTranscoder, unique: list[Tensor], places: list[Tensor], like: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of the features (u,) of each layer, and the nodes' places among them: `rows`, `written`, `starts`."""
    tied = clt.config.decoder_tying == "per_source"
    targets = [clt.config.num_targets(s) for s in range(len(unique))]
    stored = [1 if tied else count for count in targets]
    sizes = [len(features) * count for features, count in zip(unique, stored, strict=True)]
    written, rows, starts, end = like.new_empty(sum(sizes), like.shape[-1]), [], [], 0
    for s, features in enumerate(unique):
        part = written[end : end + sizes[s]].view(len(features), stored[s], like.shape[-1])
        part.copy_(decoder_rows(clt, s, features, like.dtype)[:, : stored[s]])
        rows.append(part.expand(-1, targets[s], -1))
        starts.append(end + places[s] * stored[s])
        end += sizes[s]
    return rows, written, torch.cat(starts).to(like.device)


@torch.no_grad()
def find_sources(
    clt: CrossLayerTranscoder, frozen: FrozenModel, cleared: Tensor, dtype: torch.dtype = torch.float32
) -> Sources:
    """
    The active features of a prompt, read from the language model as it is, and the errors of the CLT there, which has
    no normalisation apart (see [`folded`]). What it gives is computed from its rows in `dtype`: nothing is lost
    between these and the errors.
    """
    device = frozen.tokens.device
    outputs = torch.stack([block.written for block in frozen.blocks])
    biases = torch.stack([decoder.bias.to(outputs) for decoder in clt.decoders])
    nodes, activations, unique, places = [], [], [], []
    for s, block in enumerate(frozen.blocks):
        found = clt.encode_layer(s, block.read.to(clt.device))  # as in eval mode, whatever the CLT is in
        kept = ((found.values > 0) & ~cleared.to(clt.device)[found.rows]).nonzero().squeeze(1)
        features, place = found.indices[kept].unique(return_inverse=True)
        tokens = found.rows[kept].to(device)
        nodes.append(torch.stack([torch.full_like(tokens, s), tokens, found.indices[kept].to(device)], dim=1))
        activations.append(found.values[kept].to(outputs))
        unique.append(features)
        places.append(place)
    rows, written, starts = read_decoders(clt, unique, places, outputs)
    given = biases[:, None].expand_as(outputs).clone()
    for s, values in enumerate(activations):
        at = torch.stack([nodes[s][:, 1], places[s].to(device)])
        at = torch.sparse_coo_tensor(at, values, (len(cleared), len(unique[s])))
        for target in range(rows[s].shape[1] if len(values) else 0):
            given[s + target] += torch.sparse.mm(at, rows[s][:, target])
    skips = [skip.weight.to(outputs) for skip in clt.skips] if clt.config.skip_connection else None
    for layer in range(len(given)) if skips else ():
        given[layer] += frozen.blocks[layer].read @ skips[layer]
    return Sources(
        features=torch.cat(nodes),
        activations=torch.cat(activations),
        errors=(outputs - given).masked_fill(cleared[None, :, None], 0),
        cleared=cleared,
        rows=rows,
        places=torch.cat(places).to(device),
        biases=biases,
        skips=skips,
        written=written,
        starts=starts,
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
        seeds ([`Seeds`]): B targets; those of like positions together take less work.

    Returns:
        A, (B, n + L·P + P), and of each of [`RESTS`] (B,).
    """
    # The highest first: each step down is one of the first rows, of those that have begun.
    order = seeds.layers.argsort(descending=True)
    seeds = seeds.take(order)
    (num_layers, all_tokens, width), num_features = sources.errors.shape, len(sources.features)
    batch, length = len(order), int(seeds.positions.max()) + 1
    rests = {name: seeds.own.new_zeros(batch) for name in RESTS}
    rests["own bias"] += seeds.own
    r = seeds.vectors.new_zeros(batch, length, width)
    features = r.new_zeros(batch, num_features)  # by position
    edges = r.new_zeros(batch, num_features + (num_layers + 1) * all_tokens)
    errors = edges[:, num_features:-all_tokens].view(batch, num_layers, all_tokens)
    inject(r, seeds, num_layers)
    for layer in reversed(range(min(int(seeds.layers[0]) + 1, num_layers))):
        block = frozen.blocks[layer]
        above = int((seeds.layers > layer).sum())
        through = 0
        if above:
            g = r[:above] if block.post is None else block.post.transposed(r[:above])
            pull_features(sources, layer, g, features[:above])
            errors[:above, layer, :length] = torch.einsum("bpd,pd->bp", g, sources.errors[layer, :length])
            of_these = {name: values[:above] for name, values in rests.items()}
            through = pull_constants(block, sources, layer, r[:above], g, of_these)
        if not block.is_parallel:
            r[:above] += through
            inject(r, seeds, layer)
        begun = above if block.is_parallel else int((seeds.layers >= layer).sum())
        rests["model biases"][:begun] += torch.einsum("bpd,pd->b", r[:begun], block.constant[:length])
        r[:begun] += block.pre.transposed(block.attention.transposed(r[:begun]))
        if block.is_parallel:
            r[:above] += through
            inject(r, seeds, layer)
    rests["position embeddings"] += torch.einsum("bpd,pd->b", r, frozen.positions[:length])
    edges[:, -all_tokens:][:, :length] = torch.einsum("bpd,pd->bp", r, frozen.tokens[:length])
    edges[:, :num_features] = features[:, sources.by_position.argsort()] * sources.activations
    back = order.argsort()
    return edges[back], {name: values[back] for name, values in rests.items()}


def pull_features(sources: Sources, layer: int, g: Tensor, features: Tensor) -> None:
    """Adds what features write to a layer, times the gradients g (B, P', D) there, to (B, n), in place."""
    places, lowest = sources.writing_to(layer), max(0, layer + 1 - sources.rows[0].shape[1])
    for position in range(g.shape[1]):
        first, end = sources.ends[position][lowest], sources.ends[position][layer + 1]
        if first < end:
            features[:, first:end].addmm_(g[:, position], sources.written.index_select(0, places[first:end]).T)


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
    blank = sources.cleared[:length].nonzero().squeeze(1)
    at_blank = g[:, blank]
    rests["decoder biases"] += (g.sum(dim=1) - at_blank.sum(dim=1)) @ sources.biases[layer]
    rests["MLP outputs without nodes"] += torch.einsum("bpd,pd->b", at_blank, block.written[blank])
    if block.post is not None:
        rests["model biases"] += r.sum(dim=1) @ block.post.bias
    if sources.skips is None:
        return 0
    through = (g @ sources.skips[layer].T).index_fill_(1, blank, 0)
    if block.read_norm is None:
        return through
    rests["model biases"] += through.sum(dim=1) @ block.read_norm.bias
    return block.read_norm.transposed(through)


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
