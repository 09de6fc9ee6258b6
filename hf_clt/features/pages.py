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
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..files import replacing, write_json
from ..harvest.harvester import Harvester
from ..harvest.tokens import TokenStream
from ..modeling_clt import CrossLayerTranscoder
from .examples import Examples, ExampleSettings, FeatureActivity, collect_activity
from .links import Links, logit_extremes, strongest_links


SETTINGS_FILE = "feature_pages.json"
INDEX_FILE = "features/index.json.gz"
ACTIVITY_FILE = ".feature_activity.safetensors"  # what an interrupted run goes on from
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
    best = (found.top.places[feature] >= 0).nonzero().squeeze(1)
    top = format_examples(found.top, feature, best, text, strings, settings)
    order = sample_order(found.sample, feature)
    shown = set(found.top.places[feature].tolist())
    sampled = format_examples(found.sample, feature, order, text, strings, settings, shown)
    peaks = found.sample.peaks[feature, order].double()
    levels = torch.linspace(1, 0, settings.quantiles + 1, dtype=torch.float64)
    return {
        "transcoder_id": str(layer),
        "index": feature,
        "examples_quantiles": [
            {"quantile_name": TOP_NAME, "examples": top},
            *quantile_bands(sampled, settings.quantiles),
        ],
        "top_logits": [strings[token] for token in top_ids.tolist()],
        "bottom_logits": [strings[token] for token in bottom_ids.tolist()],
        "act_min": round_digits(found.smallest[feature].item()) if 0 < count == activity.num_tokens else 0.0,
        "act_max": round_digits(found.largest[feature].item()),
        "quantile_values": round_all(torch.quantile(peaks, levels)) if len(peaks) else [],
        "histogram": found.histogram[feature].tolist(),
        "activation_frequency": count / activity.num_tokens,
        # What readers of the format do not ask for, and our pages show.
        "histogram_range": [0.0, 2.0 ** int(found.exponents[feature]) if count else 0.0],
        "top_logit_values": round_all(top_logits),
        "bottom_logit_values": round_all(bottom_logits),
        "feeds": [[*partner, round_digits(weight)] for *partner, weight in feeds.of(layer, feature)],
        "reads": [[*partner, round_digits(weight)] for *partner, weight in reads.of(layer, feature)],
    }


def sample_order(sample: Examples, feature: int) -> Tensor:
    """The order of a feature's sampled examples from the highest peak down, of equal ones the earlier text first."""
    places, peaks = sample.places[feature], sample.peaks[feature]
    earliest = places.argsort(stable=True)
    earliest = earliest[places[earliest] >= 0]
    return earliest[peaks[earliest].argsort(descending=True, stable=True)]


def format_examples(
    examples: Examples,
    feature: int,
    order: Tensor,
    text: Tensor,
    strings: dict[int, str],
    settings: ExampleSettings,
    shown: Collection[int] = (),
) -> list[dict]:
    """
    The examples of one feature at `order` as the files hold them; `shown` are the places of those that were shown
    before. A window ends where its block or the text does.
    """
    context_size, formatted = text.shape[1], []
    for place, window in zip(examples.places[feature, order].tolist(), examples.windows[feature, order], strict=True):
        block, position = divmod(place, context_size)
        start = position - settings.before
        first, last = max(0, start), min(context_size, start + settings.width)
        ids = [token for token in text[block, first:last].tolist() if token >= 0]  # padding is at the end
        formatted.append(
            {
                "tokens": [strings[token] for token in ids],
                "tokens_acts_list": round_all(window[first - start : first - start + len(ids)]),
                "train_token_ind": position - first,
                "is_repeated_datapoint": place in shown,
            }
        )
    return formatted


def quantile_bands(sampled: list[dict], quantiles: int) -> list[dict]:
    """Examples from the highest peak down, cut into equal parts; one that is smaller where they do not divide."""
    bands = []
    for number in range(quantiles):
        first, last = (len(sampled) * edge // quantiles for edge in (number, number + 1))
        upper, lower = (100 * (quantiles - edge) / quantiles for edge in (number, number + 1))
        name = f"{lower:.3g} % to {upper:.3g} % of all peaks"
        bands.append({"quantile_name": name, "examples": sampled[first:last]})
    return bands


def round_digits(value: float) -> float:
    """A number with 5 significant digits, so that it is short when written."""
    return float(f"{value:.{DIGITS}g}")


def round_all(values: Tensor) -> list[float]:
    return [round_digits(value) for value in values.tolist()]


def token_string(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
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


def short_name(value: object) -> str:
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


def write_page(path: Path, **values: Any) -> None:
    """Fills in `page.html`, piece by piece, so that the records of a layer are never in memory at once."""
    text = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(text)
    with replacing(path) as temporary:
        template.stream(**values).dump(str(temporary), encoding="utf-8")


def write_layer_page(path: Path, records: Iterator[bytes], activity: FeatureActivity, layer: int, clt: str) -> None:
    """
    Writes the page of one layer of the CLT named `clt`: a list of its features, and their packed `records` in base64,
    of which it unpacks the one that is looked at.
    """
    found = activity.layers[layer]
    summary = {
        "layer": layer,
        "layers": len(activity.layers),
        "tokens": activity.num_tokens,
        "counts": found.counts.tolist(),
        "peaks": [float(f"{peak:.3g}") for peak in found.largest.tolist()],
    }
    write_page(
        path,
        clt=clt,
        layer=layer,
        num_active=int((found.counts > 0).sum()),
        l0=found.counts.sum().item() / activity.num_tokens,
        summary=summary,
        records=(base64.b64encode(packed).decode("ascii") for packed in records),
    )


def write_index_page(path: Path, activity: FeatureActivity, made_with: dict[str, str], clt: str) -> None:
    """Writes the page that leads to the layers, with the settings that everything was made with."""
    layers = [
        {
            "l0": layer.counts.sum().item() / activity.num_tokens,
            "never_active": (layer.counts == 0).double().mean().item(),
            "largest": layer.largest.max().item(),
        }
        for layer in activity.layers
    ]
    write_page(
        path, clt=clt, tokens=activity.num_tokens, blocks=activity.num_blocks, layers=layers, made_with=made_with
    )


# -- everything, in order ---------------------------------------------------------------------------------------------


def weights_digest(clt: CrossLayerTranscoder) -> str:
    """A short name for the weights, from biases and thresholds alone, so that two CLTs of one name are told apart."""
    digest = sha256()
    for layer in range(clt.config.num_layers):
        for name, tensor in sorted(clt.released_layer(layer).items()):
            if tensor.dim() == 1:
                digest.update(name.encode() + tensor.double().numpy().tobytes())
    return digest.hexdigest()[:16]


def prepare_output(output: Path, settings: dict, overwrite: bool = False) -> bool:
    """
    Makes the folder ready, so that no files of other settings are in it, and writes the settings.

    Args:
        output (`Path`): The folder; made if absent.
        settings (`dict`): What the pages are made with; what JSON can hold.
        overwrite (`bool`, *optional*, defaults to `False`): Remove feature pages that are there.

    Returns:
        `bool`: Whether the pages are finished already.

    Raises:
        ValueError: If the folder holds pages made with other settings, or files of these names of unknown origin.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; give a folder")
    path = output / SETTINGS_FILE
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:  # refused below, as a file of something else
        old = {}
    names = (SETTINGS_FILE, INDEX_FILE, "index.html", ACTIVITY_FILE, "layer_*.html", "features/layer_*.bin")
    present = [file for name in names for file in output.glob(name)]
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
    write_json(path, settings)
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
    examples = examples or ExampleSettings()
    for name, value, smallest in (("logits", logits, 1), ("links", links, 0), ("batch_size", batch_size, 1)):
        if value < smallest:
            raise ValueError(f"{name}={value} is below {smallest}; give {smallest} or more")
    head = harvester.model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError("the language model has no unembedding (output embeddings); load it as a causal LM")
    output = Path(output).expanduser()
    name = short_name(settings.get("clt") or clt.config.name_or_path or "a CLT")
    kept = {f"examples_{name}": value for name, value in vars(examples).items()}
    settings = {**settings, **kept, "logits": logits, "links": links, "clt_digest": weights_digest(clt)}
    if prepare_output(output, settings, overwrite):
        return None

    file = output / ACTIVITY_FILE
    activity = collect_activity(
        clt, harvester, tokens, examples, file, batch_size, save_seconds=save_seconds, progress=progress
    )
    strongest = strongest_links(clt, activity.active(), links, progress=progress)
    text = torch.cat(activity.text)
    # Rows beyond the tokenizer's entries, with which some models fill their vocabulary up, name no token.
    unembedding = head.weight[: len(tokens.tokenizer)]
    ids = {*text[text >= 0].unique().tolist(), *range(len(unembedding))}
    strings = {token: token_string(tokens.tokenizer, token) for token in ids}
    config = clt.config
    for layer in range(config.num_layers):
        binary = output / "features" / f"layer_{layer}.bin"
        features = tqdm(
            range(config.num_features), f"Writing layer {layer}", unit="feature", disable=not progress, leave=False
        )
        if not binary.exists():
            extremes = logit_extremes(clt.released_layer(layer)[f"W_dec_{layer}"], unembedding, logits)
            with replacing(binary) as temporary, open(temporary, "wb") as opened:
                for feature in features:
                    record = feature_record(activity, extremes, strongest, text, strings, layer, feature)
                    packed = pack_record(record)
                    opened.write(struct.pack("<I", len(packed)) + packed)
        write_layer_page(output / f"layer_{layer}.html", read_records(binary), activity, layer, name)
    made_with = {name: short_name(value) for name, value in settings.items() if value is not None}
    write_index_page(output / "index.html", activity, made_with, name)
    write_index(output / "features", config.num_layers)  # last: where it is, everything is
    file.unlink(missing_ok=True)
    return activity
