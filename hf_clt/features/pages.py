"""
Feature pages: what each feature of a CLT is, as files that front ends read and as pages that people read.

| file | holds |
|---|---|
| `features/layer_{l}.bin` | the records of its features: length (4 bytes, little-endian), then JSON in gzip |
| `features/index.json.gz` | `{"0": {"filename": "layer_0.bin", "offsets": [...]}, ...}`, F + 1 offsets per layer |
| `index.html`, `layer_{l}.html` | the same records as pages that need no server and request nothing |
| `feature_pages.json` | the settings that everything was made with |

The two `features/` files are those that circuit-tracer's front end reads from a CLT's repository by byte ranges
(`init-feature-examples.js` and `util.js` in its assets); what a record holds is in `docs/feature_pages.md`.
"""

import base64
import gzip
import importlib.resources
import json
import re
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..files import replacing, write_text
from ..harvest.harvester import Harvester
from ..harvest.tokens import TokenStream
from ..modeling_clt import CrossLayerTranscoder
from .examples import Examples, ExampleSettings, FeatureActivity, collect_activity
from .links import Links, logit_extremes, strongest_links


SETTINGS_FILE = "feature_pages.json"
INDEX_FILE = "features/index.json.gz"
ACTIVITY_FILE = ".feature_activity.safetensors"  # what an interrupted run goes on from
LINKS_FILE = ".feature_links.safetensors"
TOP_NAME = "Top"  # quantile_name of the examples with the highest peaks, as in published feature files
DIGITS = 5  # significant digits of the activations in the files
# What cannot be seen in a line of text, as circuit-tracer shows it.
VISIBLE = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # of GPT-2's byte-level vocabulary


# -- records ----------------------------------------------------------------------------------------------------------


def feature_record(
    activity: FeatureActivity,
    logits: tuple[Tensor, ...],
    links: tuple[Links, Links],
    text: Tensor,
    strings: dict[int, str],
    layer: int,
    feature: int,
) -> dict:
    """
    What the files say of one feature; `docs/feature_pages.md` describes each entry.

    Args:
        activity ([`FeatureActivity`]): Of one pass over the text.
        logits (`tuple[Tensor, ...]`): Of this layer, what [`logit_extremes`] returns.
        links (`tuple[Links, Links]`): Of all layers, what [`strongest_links`] returns.
        text (`Tensor` of shape (blocks, T), int32): Token ids of the whole text, -1 where there is none.
        strings (`dict[int, str]`): How each token is shown.
        layer, feature (`int`): Which feature.
    """
    settings, found = activity.settings, activity.layers[layer]
    (top_ids, top_logits, bottom_ids, bottom_logits), (feeds, reads) = (part[feature] for part in logits), links
    count = int(found.counts[feature])
    top = shown_examples(found.top, feature, text, strings, settings)
    # From the highest peak to the lowest; of equal peaks the earlier block first.
    order = sample_order(found.sample, feature)
    sampled = shown_examples(found.sample, feature, text, strings, settings, order)
    shown = set(found.top.places[feature].tolist())
    for example, place in zip(sampled, found.sample.places[feature, order].tolist(), strict=True):
        example["is_repeated_datapoint"] = place in shown
    peaks = found.sample.peaks[feature, order].double()
    levels = torch.linspace(1, 0, settings.quantiles + 1, dtype=torch.float64)
    upper = 2.0 ** int(found.exponents[feature]) if count else 0.0
    return {
        "transcoder_id": str(layer),
        "index": feature,
        "examples_quantiles": [
            {"quantile_name": TOP_NAME, "examples": top},
            *quantile_bands(sampled, settings.quantiles),
        ],
        "top_logits": [strings[token] for token in top_ids.tolist()],
        "bottom_logits": [strings[token] for token in bottom_ids.tolist()],
        "act_min": rounded(found.smallest[feature]).item() if 0 < count == activity.num_tokens else 0.0,
        "act_max": rounded(found.largest[feature]).item(),
        "quantile_values": rounded(torch.quantile(peaks, levels)).tolist() if len(peaks) else [],
        "histogram": found.histogram[feature].tolist(),
        "activation_frequency": count / activity.num_tokens,
        # What readers of the format do not ask for, and our pages show.
        "histogram_range": [0.0, upper],
        "top_logit_values": rounded(top_logits).tolist(),
        "bottom_logit_values": rounded(bottom_logits).tolist(),
        "feeds": shown_links(feeds.of(layer, feature)),
        "reads": shown_links(reads.of(layer, feature)),
    }


def shown_links(links: list[tuple[int, int, float]]) -> list[list]:
    """Layer, feature and weight of each link, as the files hold them."""
    weights = rounded([weight for _, _, weight in links]).tolist()
    return [[layer, feature, weight] for (layer, feature, _), weight in zip(links, weights, strict=True)]


def sample_order(sample: Examples, feature: int) -> Tensor:
    """The order of a feature's sampled examples from the highest peak down, of equal ones the earlier text first."""
    places, peaks = sample.places[feature], sample.peaks[feature]
    earliest = places.argsort(stable=True)
    earliest = earliest[places[earliest] >= 0]
    return earliest[peaks[earliest].argsort(descending=True, stable=True)]


def shown_examples(
    examples: Examples,
    feature: int,
    text: Tensor,
    strings: dict[int, str],
    settings: ExampleSettings,
    order: Tensor | None = None,
) -> list[dict]:
    """
    The examples of one feature as the files hold them, in the order in which they are kept, or in another one. A
    window ends where its block or the text does.
    """
    context_size = text.shape[1]
    places = examples.places[feature] if order is None else examples.places[feature, order]
    windows = rounded(examples.windows[feature] if order is None else examples.windows[feature, order])
    shown = []
    for place, window in zip(places.tolist(), windows, strict=True):
        if place < 0:
            continue
        block, position = divmod(place, context_size)
        first, last = max(0, position - settings.before), min(context_size, position + settings.after + 1)
        ids = [token for token in text[block, first:last].tolist() if token >= 0]  # padding is at the end
        offset = first - (position - settings.before)
        shown.append(
            {
                "tokens": [strings[token] for token in ids],
                "tokens_acts_list": window[offset : offset + len(ids)].tolist(),
                "train_token_ind": position - first,
                "is_repeated_datapoint": False,
            }
        )
    return shown


def quantile_bands(sampled: list[dict], quantiles: int) -> list[dict]:
    """Examples from the highest peak down, cut into equal parts; one that is smaller where they do not divide."""
    bands = []
    for number in range(quantiles):
        first, last = (len(sampled) * edge // quantiles for edge in (number, number + 1))
        upper, lower = (100 * (quantiles - edge) / quantiles for edge in (number, number + 1))
        name = f"{lower:.3g} % to {upper:.3g} % of all peaks"
        bands.append({"quantile_name": name, "examples": sampled[first:last]})
    return bands


def rounded(values) -> np.ndarray:
    """Values as float64 with 5 significant digits, so that they are short when written."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore"):
        digits = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
    # Beyond 1e22 a power of ten is no float64 of its own, and numbers of that size are as good as zero or infinite.
    digits = np.clip(np.where(np.isfinite(digits), digits, 0), -22, 22)
    up, down = 10.0 ** np.maximum(digits, 0), 10.0 ** np.maximum(-digits, 0)
    return np.rint(values / down * up) / up * down


def token_string(tokenizer, token: int) -> str:
    r"""
    How a token is shown: its text, with the space in front of a word, and with line ends and tabs made visible. Bytes
    that are only a part of a character are written as `\xe2`, which circuit-tracer's front end puts together again.
    """
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" in text and (raw := piece_bytes(piece)) is not None:
        text = raw.decode("utf-8", errors="backslashreplace")
    elif piece.startswith("▁") and not text.startswith(" "):  # SentencePiece's space, dropped at the start of a text
        text = " " + text
    return text.translate(VISIBLE)


def piece_bytes(piece: str) -> bytes | None:
    """The bytes that a vocabulary entry stands for, as byte-level BPE or SentencePiece write them; None of others."""
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(fallback[1])
    if all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece)
    return None


def shown_name(value) -> str:
    """A name for readers: of a local file or folder only its last part."""
    path = Path(str(value)).expanduser()
    return path.absolute().name if path.exists() else str(value)


# -- the files that front ends read -----------------------------------------------------------------------------------


def pack_record(record: dict) -> bytes:
    """A record as it lies in a `.bin` file, without the length in front: the same bytes for the same record."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def read_records(path: Path) -> Iterator[bytes]:
    """
    The packed records of a `.bin` file, in order.

    Raises:
        ValueError: If the file ends within a record.
    """
    with open(path, "rb") as file:
        while prefix := file.read(4):
            length = struct.unpack("<I", prefix)[0] if len(prefix) == 4 else -1
            packed = file.read(length) if length >= 0 else b""
            if len(packed) != length:
                raise ValueError(f"{path} ends within a record; make it anew")
            yield packed


def write_index(folder: Path, num_layers: int) -> None:
    """Writes `index.json.gz` from the lengths in the `.bin` files beside it."""
    index = {}
    for layer in range(num_layers):
        offsets = [0]
        for packed in read_records(folder / f"layer_{layer}.bin"):
            offsets.append(offsets[-1] + 4 + len(packed))
        index[str(layer)] = {"filename": f"layer_{layer}.bin", "offsets": offsets}
    with replacing(folder / "index.json.gz") as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(index, separators=(",", ":")).encode(), mtime=0))


# -- pages for people -------------------------------------------------------------------------------------------------


def write_page(path: Path, **values) -> None:
    """Fills in `page.html`, piece by piece, so that the records of a layer are never in memory at once."""
    text = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(text)
    with replacing(path) as temporary:
        template.stream(**values).dump(str(temporary), encoding="utf-8")


def write_layer_page(path: Path, records: Iterator[bytes], activity: FeatureActivity, layer: int, clt: str) -> None:
    """
    Writes the page of one layer: a list of its features, and their `records`, JSON in gzip. They are in the page in
    base64, and it unpacks the one that is looked at; `clt` is the name of the CLT.
    """
    found, num_tokens = activity.layers[layer], activity.num_tokens
    summary = {
        "layer": layer,
        "layers": len(activity.layers),
        "tokens": num_tokens,
        "counts": found.counts.tolist(),
        "peaks": [float(f"{peak:.3g}") for peak in found.largest.tolist()],
    }
    write_page(
        path,
        title=f"Layer {layer}: features of {clt}",
        clt=clt,
        layer=layer,
        num_layers=len(activity.layers),
        facts=f"{len(found.counts):,} features, {int((found.counts > 0).sum()):,} of them active on {num_tokens:,} "
        f"tokens; L0 {found.counts.sum().item() / num_tokens:.1f}",
        summary=summary,
        records=(base64.b64encode(packed).decode("ascii") for packed in records),
    )


def write_index_page(path: Path, activity: FeatureActivity, made_with: dict[str, str], clt: str) -> None:
    """Writes the page that leads to the layers, with the settings that everything was made with."""
    write_page(
        path,
        title=f"Features of {clt}",
        facts=f"{activity.num_tokens:,} tokens in {activity.num_blocks:,} blocks were looked at.",
        layers=[
            (
                layer.counts.sum().item() / activity.num_tokens,
                (layer.counts == 0).double().mean().item(),
                layer.largest.max().item(),
            )
            for layer in activity.layers
        ],
        made_with=made_with,
    )


# -- everything, in order ---------------------------------------------------------------------------------------------


def settings_digest(clt: CrossLayerTranscoder) -> str:
    """A short name for the weights, from biases and thresholds alone, so that two CLTs of one name are told apart."""
    digest = sha256()
    for layer in range(clt.config.num_layers):
        for name, tensor in sorted(clt.released_layer(layer).items()):
            if tensor.dim() == 1:
                digest.update(name.encode() + tensor.double().numpy().tobytes())
    return digest.hexdigest()[:16]


def prepare_output(output: Path, settings: dict, overwrite: bool = False) -> bool:
    """
    Makes the folder ready: nothing of another run is in it.

    Args:
        output (`Path`): The folder; made if absent.
        settings (`dict`): What the pages are made with; what JSON can hold.
        overwrite (`bool`, *optional*, defaults to `False`): Remove feature pages that are there.

    Returns:
        `bool`: Whether everything is there already.

    Raises:
        ValueError: If the folder holds pages made with other settings, or files of these names of unknown origin.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; give a folder")
    path = output / SETTINGS_FILE
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:  # it is then refused as a file of something else
        old = {}
    names = [SETTINGS_FILE, INDEX_FILE, "index.html", ACTIVITY_FILE, LINKS_FILE]
    present = [output / name for name in names if (output / name).exists()]
    present += [*output.glob("layer_*.html"), *output.glob("features/layer_*.bin")]
    if present and "clt_digest" not in old:
        raise ValueError(
            f"output={str(output)!r} holds {present[0].name}, which is not of feature pages; give another folder"
        )
    if present and not overwrite:
        settings = json.loads(json.dumps(settings))
        for name in [*settings, *old]:
            if old.get(name) != settings.get(name):
                raise ValueError(
                    f"output={str(output)!r} holds feature pages made with {name}={old.get(name)!r}, now it is "
                    f"{settings.get(name)!r}; give another folder, or --overwrite"
                )
        return (output / INDEX_FILE).exists()
    for file in reversed(present):  # the settings last: until then the rest is known to be ours
        file.unlink()
    (output / "features").mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return False


@torch.no_grad()
def build_feature_pages(
    clt: CrossLayerTranscoder,
    harvester: Harvester,
    tokens: TokenStream,
    output: str | Path,
    settings: dict,
    examples: ExampleSettings | None = None,
    *,
    logits: int = 10,
    links: int = 8,
    batch_size: int = 1024,
    save_seconds: float = 60.0,
    overwrite: bool = False,
    progress: bool = False,
) -> FeatureActivity | None:
    """
    Makes the feature pages of a CLT. Interrupted, it goes on where it stood when it is called again.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT.
        harvester ([`Harvester`]): Runs the language model, at the CLT's hooks. It must have its output embeddings.
        tokens ([`TokenStream`]): The text, with its tokenizer.
        output (`str` or `Path`): Folder to write to.
        settings (`dict`): What names the CLT, the language model and the text (`clt`, `model`, ...), for the record: a
            run goes on from an earlier one only where they agree.
        examples ([`ExampleSettings`], *optional*): What is kept per feature.
        logits (`int`, *optional*, defaults to 10): Tokens at each end of the logits.
        links (`int`, *optional*, defaults to 8): Features per feature that it feeds, and that it reads; 0 = none,
            which leaves out the virtual weights.
        batch_size (`int`, *optional*, defaults to 1024): Most tokens that the CLT sees at a time.
        save_seconds (`float`, *optional*, defaults to 60): Seconds between two writes of the state.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to remove feature pages that are in `output`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        [`FeatureActivity`], or None if everything was there already.

    Raises:
        ValueError: If an argument does not fit, the language model has no unembedding, or `output` holds something
            else.
    """
    examples = ExampleSettings() if examples is None else examples
    for name, value, smallest in (("logits", logits, 1), ("links", links, 0), ("batch_size", batch_size, 1)):
        if value < smallest:
            raise ValueError(f"{name}={value} is below {smallest}; give {smallest} or more")
    head = harvester.model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError("the language model has no unembedding (output embeddings); load it as a causal LM")
    output = Path(output).expanduser()
    title = shown_name(settings.get("clt") or clt.config.name_or_path or "a CLT")
    kept = {f"examples_{name}": value for name, value in vars(examples).items()}
    settings = {**settings, **kept, "logits": logits, "links": links, "clt_digest": settings_digest(clt)}
    if prepare_output(output, settings, overwrite):
        return None

    activity = collect_activity(
        clt,
        harvester,
        tokens,
        examples,
        batch_size,
        file=output / ACTIVITY_FILE,
        save_seconds=save_seconds,
        progress=progress,
    )
    strongest = strongest_links(clt, activity.active(), links, file=output / LINKS_FILE, progress=progress)
    text = torch.cat(activity.text)
    # Rows beyond the tokenizer's entries, with which some models fill their vocabulary up, name no token.
    unembedding = head.weight[: len(tokens.tokenizer)]
    ids = {*text[text >= 0].unique().tolist(), *range(len(unembedding))}
    strings = {token: token_string(tokens.tokenizer, token) for token in ids}
    total = clt.config.num_layers * clt.config.num_features
    with tqdm(total=total, desc="Writing", unit="feature", disable=not progress, leave=False) as bar:
        for layer in range(clt.config.num_layers):
            bar.set_postfix_str(f"layer {layer}")
            binary = output / "features" / f"layer_{layer}.bin"
            if not binary.exists():
                decoder = clt.released_layer(layer)[f"W_dec_{layer}"]
                extremes = logit_extremes(decoder, unembedding, logits)
                with replacing(binary) as temporary, open(temporary, "wb") as file:
                    for feature in range(clt.config.num_features):
                        packed = pack_record(
                            feature_record(activity, extremes, strongest, text, strings, layer, feature)
                        )
                        file.write(struct.pack("<I", len(packed)) + packed)
                        bar.update()
            write_layer_page(output / f"layer_{layer}.html", read_records(binary), activity, layer, title)
            bar.update((layer + 1) * clt.config.num_features - bar.n)
    made_with = {name: shown_name(value) for name, value in settings.items() if value is not None}
    write_index_page(output / "index.html", activity, made_with, title)
    write_index(output / "features", clt.config.num_layers)  # last: where it is, everything is
    for name in (ACTIVITY_FILE, LINKS_FILE):
        (output / name).unlink(missing_ok=True)
    return activity


__all__ = [
    "build_feature_pages",
    "feature_record",
    "pack_record",
    "prepare_output",
    "read_records",
    "rounded",
    "token_string",
    "write_index",
]
