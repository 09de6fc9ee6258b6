"""
Feature pages of a small CLT: every number against plain loops over dense activations, the files through a reader that
follows circuit-tracer's front end, the pages' structure, and what happens on interruption and wrong input.
"""

import base64
import gzip
import json
import math
import re
import signal
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.commands import features as script
from hf_clt.features import pages as module
from hf_clt.features.examples import ExampleSettings, sample_keys
from hf_clt.features.links import strongest_links
from hf_clt.features.pages import build_feature_pages, read_records, round_digits, token_string
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream


NUM_FEATURES, CONTEXT = 24, 32
SETTINGS = ExampleSettings(top=5, quantiles=3, per_quantile=2, before=6, after=3, seed=11)


@pytest.fixture(scope="module")
def language_model(tiny_gpt2):
    return load_language_model(tiny_gpt2)


@pytest.fixture(scope="module")
def clt(tiny_gpt2):
    """Of very different density: feature 0 never active, feature 1 always, the others in between."""
    torch.manual_seed(0)
    config = CLTConfig(
        num_layers=2, d_model=64, num_features=NUM_FEATURES, activation_fn="relu", base_model_name_or_path=tiny_gpt2
    )
    clt = CrossLayerTranscoder(config)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.weight.normal_()
            encoder.bias.copy_(torch.linspace(0, -30, NUM_FEATURES))
            encoder.bias[:2] = torch.tensor([-1e4, 1e4])
        for decoder in clt.decoders:
            decoder.weight.normal_()
    return clt.eval()


@pytest.fixture(scope="module")
def clt_folder(clt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clts") / "small <b>&clt"
    clt.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_stream(language_model, text_file):
    def open_stream(prompts=4):
        return TokenStream(
            load_text_dataset(text_file),
            language_model[1],
            context_size=CONTEXT,
            prompts_per_batch=prompts,
            heldout_tokens=900,
            heldout=True,
        )

    return open_stream


@pytest.fixture(scope="module")
def build(clt, language_model, open_stream):
    def build(output, harvester=None, examples=SETTINGS, prompts=4, **options):
        harvester = harvester or Harvester(language_model[0])
        settings = {"clt": "some/clt", "dataset": "text"}
        return build_feature_pages(
            clt, harvester, open_stream(prompts), output, settings, examples, logits=4, links=5, **options
        )

    return build


@pytest.fixture(scope="module")
def pages(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    assert build(folder).num_tokens >= 900
    return folder


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the files, read as circuit-tracer's front end reads them ---------------------------------------------------------


def read_as_front_end(folder, feature_id):
    """
    Follows `loadFeatureFromBinary` and `getFile` of the front end: Cantor's unpairing gives layer and feature, the
    index gives a file and two offsets, the range (whose end HTTP includes: one byte too many) gives the length and the
    compressed JSON.
    """
    w = (math.isqrt(8 * feature_id + 1) - 1) // 2
    feature = feature_id - (w * w + w) // 2
    layer = w - feature
    index = json.loads(gzip.decompress((folder / "features" / "index.json.gz").read_bytes()))
    entry = index[str(layer)]
    start, end = entry["offsets"][feature], entry["offsets"][feature + 1]
    content = (folder / "features" / entry["filename"]).read_bytes()[start : end + 1]
    length = content[0] | content[1] << 8 | content[2] << 16 | content[3] << 24
    return json.loads(gzip.decompress(content[4 : 4 + length]))


def record_of(folder, layer, feature):
    pair = (layer + feature) * (layer + feature + 1) // 2 + feature
    return read_as_front_end(folder, pair)


def test_index_covers_the_files(pages):
    index = json.loads(gzip.decompress((pages / "features" / "index.json.gz").read_bytes()))
    assert list(index) == ["0", "1"]
    for layer, entry in index.items():
        assert entry["filename"] == f"layer_{layer}.bin"
        assert len(entry["offsets"]) == NUM_FEATURES + 1 and entry["offsets"][0] == 0
        assert entry["offsets"][-1] == (pages / "features" / entry["filename"]).stat().st_size
    assert {path.name for path in (pages / "features").iterdir()} == {"index.json.gz", "layer_0.bin", "layer_1.bin"}


@pytest.fixture(scope="module")
def dense(clt, language_model, open_stream):
    """The text as (blocks, T), its tokens that count, and all activations (blocks, T, L, F), the plain way."""
    harvester = Harvester(language_model[0])
    ids, counted, acts = [], [], []
    with torch.no_grad():
        for batch in open_stream():
            inputs, _ = harvester(batch["input_ids"], batch["attention_mask"])
            found = clt.encode(inputs)
            found[~batch["counted"]] = 0
            acts.append(found)
            ids.append(torch.where(batch["attention_mask"] > 0, batch["input_ids"], -1))
            counted.append(batch["counted"])
    return torch.cat(ids), torch.cat(counted), torch.cat(acts)


def as_shown(tokenizer, token):
    text = tokenizer.decode([token])
    if "\ufffd" in text:  # a byte of a character: of this tokenizer, one vocabulary entry per byte
        return token_string(tokenizer, int(token))
    return text.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")


def expected_examples(dense, tokenizer, layer, feature, order, shown=()):
    """The examples at `order`, pairs of block and position."""
    ids, _, acts = dense
    examples = []
    for block, position in order:
        places = range(max(0, position - SETTINGS.before), min(CONTEXT, position + SETTINGS.after + 1))
        places = [place for place in places if ids[block, place] >= 0]
        examples.append(
            {
                "tokens": [as_shown(tokenizer, ids[block, place]) for place in places],
                "tokens_acts_list": [acts[block, place, layer, feature].item() for place in places],
                "train_token_ind": places.index(position),
                "is_repeated_datapoint": (block, position) in shown,
            }
        )
    return examples


def assert_same_examples(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("tokens", "train_token_ind", "is_repeated_datapoint"):
            assert one[name] == other[name]
        assert one["tokens_acts_list"] == pytest.approx(other["tokens_acts_list"], rel=1e-4)
        assert set(one) == set(other)


def test_every_number_against_plain_loops(pages, clt, dense, language_model):
    ids, counted, acts = dense
    model, tokenizer = language_model
    num_tokens = int(counted.sum())
    active = (acts > 0).flatten(0, 1).any(dim=0)
    feeds, reads = strongest_links(clt, active, 5)
    assert len(ids) > 25 and (ids[-1] < 0).any()  # many blocks, of which the last is padded
    for layer in range(2):
        keys = sample_keys(SETTINGS.seed, layer, NUM_FEATURES, torch.arange(len(ids)))
        for feature in range(NUM_FEATURES):
            record = record_of(pages, layer, feature)
            own = acts[:, :, layer, feature]
            peaks = {}
            for block, row in enumerate(own.tolist()):
                if max(row) > 0:
                    peaks[block, row.index(max(row))] = max(row)
            best = sorted(peaks, key=lambda place: -peaks[place])
            drawn = sorted(peaks, key=lambda place: -keys[feature, place[0]])[:6]
            drawn = sorted(sorted(drawn), key=lambda place: -peaks[place])

            assert record["transcoder_id"] == str(layer) and record["index"] == feature
            names = [quantile["quantile_name"] for quantile in record["examples_quantiles"]]
            assert names == [
                "Top",
                "66.7 % to 100 % of all peaks",
                "33.3 % to 66.7 % of all peaks",
                "0 % to 33.3 % of all peaks",
            ]
            found = [quantile["examples"] for quantile in record["examples_quantiles"]]
            assert_same_examples(found[0], expected_examples(dense, tokenizer, layer, feature, best[:5]))
            expected = expected_examples(dense, tokenizer, layer, feature, drawn, shown=best[:5])
            edges = [len(drawn) * edge // 3 for edge in range(4)]
            for part, first, last in zip(found[1:], edges, edges[1:], strict=False):
                assert_same_examples(part, expected[first:last])

            above = own[own > 0]
            count = len(above)
            smallest = above.min().item() if count == num_tokens else 0
            assert record["act_min"] == pytest.approx(smallest, rel=1e-4)
            assert record["act_max"] == pytest.approx(own.max().item(), rel=1e-4)
            assert record["activation_frequency"] == count / num_tokens
            low, upper = record["histogram_range"]
            assert low == 0
            if count:
                assert upper == 2.0 ** (math.floor(math.log2(own.max().item())) + 1)
                bins = np.histogram(above.double().numpy(), np.linspace(0, upper, 33))[0]
                assert record["histogram"] == bins.tolist()
                levels = np.quantile([peaks[place] for place in drawn], [1, 2 / 3, 1 / 3, 0])
                assert record["quantile_values"] == pytest.approx(levels, rel=1e-4)
            else:
                assert upper == 0 and record["histogram"] == [0] * 32 and record["quantile_values"] == []

            written = clt.decoders[layer].weight[feature].sum(dim=0)
            logits = (model.lm_head.weight @ written).tolist()
            order = sorted(range(len(logits)), key=lambda token: logits[token])
            for name, tokens in (("top", order[:-5:-1]), ("bottom", order[:4])):
                assert record[f"{name}_logits"] == [as_shown(tokenizer, token) for token in tokens]
                assert record[f"{name}_logit_values"] == pytest.approx([logits[t] for t in tokens], rel=1e-4)
            for name, links in (("feeds", feeds), ("reads", reads)):
                expected = [[*link[:2], pytest.approx(link[2], rel=1e-4)] for link in links.of(layer, feature)]
                assert record[name] == expected
    # What the loops saw was worth looking at.
    shares = [record_of(pages, 1, feature)["activation_frequency"] for feature in range(NUM_FEATURES)]
    assert shares[0] == 0 and shares[1] == 1 and len({round(share, 2) for share in shares}) > 8
    assert record_of(pages, 1, 1)["act_min"] > 0
    assert len(record_of(pages, 0, 5)["feeds"]) == len(record_of(pages, 1, 5)["reads"]) == 5


def test_rounded_keeps_five_digits():
    values = [0, 1.2345678, -0.00012345678, 123456.78, 1.2345678e-30, 3e20, 1 / 3]
    assert [round_digits(value) for value in values] == [0, 1.2346, -0.00012346, 123460, 1.2346e-30, 3e20, 0.33333]


def test_tokens_that_are_parts_of_characters_are_shown_as_bytes(language_model):
    tokenizer = language_model[1]
    text = " “日本”\n\tand"
    shown = [token_string(tokenizer, token) for token in tokenizer(text).input_ids]
    assert any(one.startswith("\\x") for one in shown)
    # as the front end does: each \xhh is a byte
    raw = b"".join(
        re.sub(rb"\\x([0-9a-f]{2})", lambda hexadecimal: bytes.fromhex(hexadecimal[1].decode()), one.encode())
        for one in shown
    )
    assert raw.decode() == text.replace("\n", "⏎").replace("\t", "→")


def test_tokens_of_sentencepiece_keep_their_space():
    pieces = ["<unk>", "<0xE6>", "<0x0A>", "▁the", "re", "▁"]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    bpe = Tokenizer(model)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    assert tokenizer.decode([3]) == "the"
    assert [token_string(tokenizer, i) for i in range(6)] == ["<unk>", "\\xe6", "⏎", " the", "re", " "]


# -- determinism, interruption ----------------------------------------------------------------------------------------


def test_the_same_files_whatever_the_batches(pages, build, tmp_path):
    build(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(pages)
    build(tmp_path / "other", prompts=3, batch_size=40)
    for layer in range(2):
        for feature in range(NUM_FEATURES):
            one, other = record_of(pages, layer, feature), record_of(tmp_path / "other", layer, feature)
            for name in ("activation_frequency", "histogram", "top_logits", "feeds"):
                assert one[name] == other[name]
            tokens = [
                [example["tokens"] for quantile in record["examples_quantiles"] for example in quantile["examples"]]
                for record in (one, other)
            ]
            assert tokens[0] == tokens[1]


def test_another_seed_draws_other_examples(pages, build, tmp_path):
    build(tmp_path, examples=ExampleSettings(**{**vars(SETTINGS), "seed": 12}))
    one, other = (record_of(folder, 0, 1)["examples_quantiles"] for folder in (pages, tmp_path))
    assert one[0] == other[0] and one[1:] != other[1:]


class Interrupted(Harvester):
    """A harvester during whose n-th batch someone presses Ctrl-C."""

    left = 0

    def harvest(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().harvest(*args, **kwargs)


def test_interrupted_at_any_point_it_ends_with_the_same_files(pages, build, language_model, tmp_path, monkeypatch):
    harvester = Interrupted(language_model[0])
    for batches in (1, 3, 4):  # before anything was kept, and twice in between
        harvester.left = batches
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, harvester, save_seconds=0.0)
        assert not (tmp_path / "features" / "index.json.gz").exists()

    def links_interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "strongest_links", links_interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, harvester)

    write_page, written = module.write_layer_page, []

    def page_interrupted(*args):
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt
        write_page(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_layer_page", page_interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, harvester)
    assert (tmp_path / "layer_0.html").exists() and not (tmp_path / "layer_1.html").exists()
    harvester.left = 1  # the text is not read again
    assert build(tmp_path, harvester) is not None
    assert bytes_of(tmp_path) == bytes_of(pages)
    assert build(tmp_path, harvester) is None  # it is all there


def test_only_the_batches_that_are_left_are_read(build, language_model, open_stream, tmp_path):
    harvester, batches = Interrupted(language_model[0]), len(list(open_stream()))
    harvester.left = 4
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, harvester, save_seconds=0.0)
    harvester.left = 0
    build(tmp_path, harvester)
    assert -harvester.left == batches - 3


# -- pages ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, attributes, scripts, and whether everything that was opened is closed."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts, self.words = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("id", "program")] = data
        else:
            self.words.append(data)


def test_pages_are_well_formed_and_request_nothing(pages):
    for path in pages.glob("*.html"):
        page = Page(path.read_text(encoding="utf-8"))
        assert page.elements[0] == ("html", {"lang": "en"})
        policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
        for _, attributes in page.elements:
            assert not {"src", "srcset", "action"} & set(attributes)
            assert attributes.get("href", "index.html").partition("#")[0] in {file.name for file in pages.iterdir()}
        text = path.read_text(encoding="utf-8")
        assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_a_layer_page_holds_the_records_of_the_files(pages):
    for layer in range(2):
        page = Page((pages / f"layer_{layer}.html").read_text(encoding="utf-8"))
        packed = [base64.b64decode(line) for line in page.scripts["records"].split()]
        assert packed == list(read_records(pages / "features" / f"layer_{layer}.bin"))
        summary = json.loads(page.scripts["summary"])
        assert summary["layer"] == layer and summary["layers"] == 2
        records = [json.loads(gzip.decompress(one)) for one in packed]
        shares = [count / summary["tokens"] for count in summary["counts"]]
        assert shares == [record["activation_frequency"] for record in records]
        assert summary["peaks"] == pytest.approx([record["act_max"] for record in records], rel=1e-2)
        words = " ".join(page.words)
        assert f"24 features, {sum(count > 0 for count in summary['counts'])} of them active" in words
        assert "some/clt" in words and f"Layer {layer}" in words


def test_names_are_escaped(clt_folder, options, tmp_path):
    assert script.main([str(clt_folder), *options, "--output", str(tmp_path)]) == 0
    for path in tmp_path.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "<b>&clt" not in text and "small &lt;b&gt;&amp;clt" in text
        Page(text)


# -- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(text_file):
    text = ["--dataset", text_file, "--context-size", str(CONTEXT), "--eval-tokens", "900", "--device", "cpu"]
    examples = ["--top-examples", "5", "--quantiles", "3", "--quantile-examples", "2", "--tokens-before", "6"]
    examples += ["--tokens-after", "3", "--seed", "11", "--logits", "4", "--links", "5"]
    return [*text, *examples, "--store-batch-size-prompts", "4", "--disable-progress-bar"]


def test_the_script_gives_the_same_records(pages, clt_folder, options, tmp_path, capsys):
    argv = [str(clt_folder), *options, "--output", str(tmp_path)]
    assert script.main(argv) == 0
    out = capsys.readouterr().out
    assert "features were active on" in out and str(tmp_path / "index.html") in out
    for layer in range(2):
        name = f"features/layer_{layer}.bin"
        assert (tmp_path / name).read_bytes() == (pages / name).read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert script.main(argv) == 0
    assert "finished before" in capsys.readouterr().out
    assert script.main([*argv, "--overwrite", "--seed", "12"]) == 0
    assert json.loads((tmp_path / "feature_pages.json").read_text(encoding="utf-8"))["examples_seed"] == 12


class Terminated(Harvester):
    """A harvester during whose second batch the machine is taken back."""

    batches = 0

    def harvest(self, *args, **kwargs):
        self.batches += 1
        if self.batches == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().harvest(*args, **kwargs)


def test_sigterm_ends_the_script_and_the_same_command_goes_on(
    pages, clt_folder, options, language_model, open_stream, tmp_path, capsys, monkeypatch
):
    argv, handler = [str(clt_folder), *options, "--output", str(tmp_path)], signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(script, "open_heldout", lambda *_: (Terminated(language_model[0]), open_stream()))
        assert script.main(argv) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler
    assert script.main(argv) == 0
    assert (tmp_path / "features/layer_1.bin").read_bytes() == (pages / "features/layer_1.bin").read_bytes()


@pytest.mark.parametrize(
    "changed, expected",
    [
        (["--top-examples", "0"], ["top=0"]),
        (["--quantiles", "0"], ["quantiles=0"]),
        (["--tokens-before", "-1"], ["before=-1"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--seed", "x"], ["--seed", "x"]),
        (["--logits", "0"], ["logits=0"]),
        (["--links", "-1"], ["links=-1"]),
        (["--batch-size", "0"], ["batch_size=0"]),
        (["--eval-tokens", "10000000"], ["eval_tokens", "10000000"]),
        (["--dataset", "./no/such/text.txt"], ["./no/such/text.txt", "no such file"]),
        (["--context-size", "129"], ["context_size", "129", "128"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_options_give_one_line(clt_folder, options, changed, expected, tmp_path, capsys):
    assert script.main([str(clt_folder), *options, "--output", str(tmp_path / "pages"), *changed]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]
    assert not (tmp_path / "pages").exists()


def test_a_folder_of_something_else_is_left_alone(clt_folder, clt, options, tmp_path, capsys):
    def fails(output, *more):
        assert script.main([str(clt_folder), *options, "--output", str(output), *more]) == 2
        err = capsys.readouterr().err
        assert err.count("error: ") == 1
        return err

    assert script.main([str(clt_folder), *options]) == 2
    assert "--output" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert "is a file; give a folder" in fails(tmp_path / "file")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert "holds index.html, which is not of feature pages" in fails(tmp_path / "site", *more)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"

    pages = tmp_path / "pages"
    assert script.main([str(clt_folder), *options, "--output", str(pages)]) == 0
    assert "made with examples_seed=11, now it is 12" in fails(pages, "--seed", "12")
    other = CrossLayerTranscoder.from_pretrained(clt_folder)
    with torch.no_grad():
        other.encoders[1].bias += 0.25
    other.save_pretrained(clt_folder)
    assert "made with clt_digest=" in fails(pages)
    clt.save_pretrained(clt_folder)


def test_a_file_that_ends_within_a_record_is_told(tmp_path):
    packed = struct.pack("<I", 5) + b"12345"
    (tmp_path / "whole").write_bytes(packed * 2)
    assert list(read_records(tmp_path / "whole")) == [b"12345"] * 2
    for size in (3, 8, 11):
        (tmp_path / "cut").write_bytes((packed * 2)[:size])
        with pytest.raises(ValueError, match="ends within a record"):
            list(read_records(tmp_path / "cut"))
