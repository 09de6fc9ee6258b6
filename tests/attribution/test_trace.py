"""`hf-clt trace`, end to end on a tiny model: its files, its figures, and one line for whatever is wrong."""

import json
import re
import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hf_clt import CLTConfig, CrossLayerTranscoder, attribute
from hf_clt.attribution import AttributionGraph, FeatureTarget, TokenTarget
from hf_clt.attribution.contrast import contrast, described_edges, described_nodes, of_targets
from hf_clt.attribution.cost import estimate_cost
from hf_clt.attribution.request import prompt_tokens, read_prompts, single_token, slug_of
from hf_clt.commands import main
from hf_clt.harvest.harvester import load_language_model


PROMPT = "The value of the object is"
FIRST, SECOND = " the", " a"


@pytest.fixture(scope="module")
def clt_folder(tiny_gpt2, tmp_path_factory):
    """A random CLT that names its language model, some of whose features are active."""
    torch.manual_seed(0)
    config = CLTConfig(
        num_layers=2,
        d_model=64,
        num_features=48,
        activation_fn="jumprelu",
        jumprelu_threshold=1.0,
        base_model_name_or_path=tiny_gpt2,
    )
    clt = CrossLayerTranscoder(config)
    for encoder in clt.encoders:
        encoder.weight.data.normal_(std=0.2)
    for decoder in clt.decoders:
        decoder.weight.data.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("clt")
    clt.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parts(tiny_gpt2, clt_folder):
    return *load_language_model(tiny_gpt2), CrossLayerTranscoder.from_pretrained(clt_folder).eval()


@pytest.fixture
def trace(clt_folder, tmp_path, capsys):
    """Runs the command; gives its output folder and what it printed."""

    def run(*words, prompt=("--prompt", PROMPT), output=("--output", str(tmp_path / "out"))):
        words = ["trace", clt_folder, *prompt, *output, "--disable-progress-bar", *map(str, words)]
        status = main(words)
        said = capsys.readouterr()
        assert status == 0, said.err
        return tmp_path / "out", said.out

    return run


@pytest.fixture
def refused(clt_folder, tmp_path, capsys):
    """Runs the command with wrong options; gives the one line."""

    def run(*words, prompt=("--prompt", PROMPT), clt=clt_folder):
        output = [] if "--output" in words else ["--output", tmp_path / "out"]
        assert main(["trace", clt, *map(str, [*prompt, *output, "--disable-progress-bar", *words])]) == 2
        lines = capsys.readouterr().err.splitlines()  # bars of loading weights, and at the end the error
        (line,) = [line for line in lines if line and "Loading weights" not in line]
        assert line.startswith("error: ") and not list(tmp_path.glob("out/**/*.json"))
        return line

    return run


def test_files_and_figures(trace, parts):
    model, tokenizer, clt = parts
    out, said = trace("--verify", 3)
    slug = slug_of(PROMPT)
    assert {file.name for file in out.iterdir()} == {
        "graph.safetensors",
        "graph.json",
        f"{slug}.json",
        "index.html",
    }
    ids = tokenizer(PROMPT).input_ids
    assert all(f"{position} {tokenizer.decode([token])!r}" in said for position, token in enumerate(ids))
    probability, token = model(torch.tensor([ids])).logits[0, -1].softmax(0).max(0)
    assert f"Next token: {tokenizer.decode([token])!r} {probability:.1%}" in said

    expected = attribute(model, clt, torch.tensor(ids), tokenizer=tokenizer)
    graph = AttributionGraph.load(out)
    assert torch.equal(graph.features, expected.features)
    torch.testing.assert_close(graph.edges, expected.edges)
    scores = expected.scores()
    assert f"Replacement {scores['replacement']:.3f}, completeness {scores['completeness']:.3f}" in said
    assert f"Belongs to no node: {sum(expected.outside().values()):.1%} (" in said
    assert expected.table().splitlines()[1] in said
    assert f"Spearman {graph.info['verified']['spearman']:.2f}" in said and graph.info["verified"]["count"] == 3
    assert re.search(r"Time: language model .*rows \d.*checking \d", said) and "Peak memory " in said
    assert str(out / "index.html") in said and said.splitlines()[-1].startswith("Next: hf-clt trace ")

    written = json.loads((out / f"{slug}.json").read_text())
    assert written["metadata"]["slug"] == slug and len(written["links"]) > 0
    assert sum(node["feature_type"] == "cross layer transcoder" for node in written["nodes"]) > 0


def test_labels_are_in_the_graph_the_json_and_the_table(trace, text_file):
    words = ["--examples", text_file, "--example-tokens", 600, "--context-size", 32, "--verify", 2]
    out, said = trace(*words)
    graph = AttributionGraph.load(out)
    pruned = graph.prune()
    own = {tuple(key) for key in pruned.features[:, [0, 2]].tolist()}
    assert set(graph.labels) == set(graph.details) == own
    strongest = tuple(graph.features[graph.influence()[: graph.num_features].argmax()].tolist())
    assert graph.labels[strongest[0], strongest[2]] in said
    written = json.loads((out / f"{slug_of(PROMPT)}.json").read_text())
    clerps = {node["clerp"] for node in written["nodes"]}
    assert all(any(label in clerp for clerp in clerps) for label in graph.labels.values())
    assert said.splitlines()[-1].startswith("Next: hf-clt features ")


def test_labels_from_feature_pages(trace, clt_folder, text_file, tmp_path, capsys):
    text = ["--context-size", "32", "--disable-progress-bar"]
    pages = str(tmp_path / "pages")
    assert (
        main(["features", clt_folder, "--dataset", text_file, "--eval-tokens", "600", "--output", pages, *text]) == 0
    )
    capsys.readouterr()
    trace("--feature-pages", pages)
    from_pages = AttributionGraph.load(tmp_path / "out").labels
    trace("--examples", text_file, "--example-tokens", 600, "--context-size", 32, "--overwrite")
    assert from_pages == AttributionGraph.load(tmp_path / "out").labels and from_pages


def test_prompts_of_a_file(trace, tmp_path, parts):
    _, tokenizer, _ = parts
    lines = [{"prompt": PROMPT}, {"prompt": "A class is", "slug": "class", "targets": [FIRST]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    out, said = trace("--targets", SECOND, "--dtype", "float64", prompt=("--prompts", str(file)))
    graphs = [AttributionGraph.load(out / slug) for slug in (f"01-{slug_of(PROMPT)}", "class")]
    tokens = [single_token(tokenizer, word) for word in (SECOND, FIRST)]
    assert [[target.token for target in graph.targets] for graph in graphs] == [[token] for token in tokens]
    assert (out / "class" / "class.json").is_file() and repr("A class is") in said
    assert graphs[0].edges.dtype == torch.float64


def test_a_feature_is_a_target(trace, parts):
    out, said = trace("--feature", 1, -1, 5, "--max-feature-nodes", 7, "--rank-every", 2)
    graph = AttributionGraph.load(out)
    assert graph.targets == [FeatureTarget(1, len(graph.tokens) - 1, 5)] and graph.num_features == 7
    assert "as circuit-tracer counts: " in said and "7 of " in said


def test_contrast(trace, parts):
    _, tokenizer, _ = parts
    out, said = trace("--contrast", FIRST, SECOND)
    first, second = (single_token(tokenizer, word) for word in (FIRST, SECOND))
    difference = AttributionGraph.load(out)
    assert [(target.token, target.minus) for target in difference.targets] == [(first, second)]
    sides = [AttributionGraph.load(out / name) for name in ("1-the", "2-a")]
    assert [side.targets for side in sides] == [[TokenTarget(first, 5)], [TokenTarget(second, 5)]]
    n = difference.num_features
    torch.testing.assert_close(difference.edges[n:], sides[0].edges[n:] - sides[1].edges[n:], rtol=1e-4, atol=1e-5)

    found = json.loads((out / "contrast.json").read_text())
    pruned = [side.prune() for side in sides]

    def plainly(graph):
        """Nodes and edges by the place of the feature, error or token."""
        names = [tuple(feature) for feature in graph.features.tolist()]
        names += [("error", *divmod(k, len(graph.tokens))) for k in range(graph.num_layers * len(graph.tokens))]
        names += [("token", p) for p in range(len(graph.tokens))] + ["target"]
        matrix = graph.adjacency()
        edges = {(names[s], names[t]) for t, s in matrix.nonzero().tolist()}
        return {name for edge in edges for name in edge} - {"target"}, edges

    (nodes, edges), (other_nodes, other_edges) = map(plainly, pruned)
    for kind, left, right in (("nodes", nodes, other_nodes), ("edges", edges, other_edges)):
        sizes = len(left - right), len(right - left), len(left & right)
        assert (len(found[kind]["only_first"]), len(found[kind]["only_second"]), found[kind]["both"]) == sizes
        assert f"{sizes[0]} {kind}" in said
        for side in ("only_first", "only_second"):
            influences = [record["influence"] for record in found[kind][side]]
            assert influences == sorted(influences, reverse=True) and all(0 < value < 1 for value in influences)
    assert "In both: " in said


def test_edges_carry_the_influence_of_their_sources(parts):
    model, tokenizer, clt = parts
    graph = attribute(model, clt, torch.tensor(tokenizer(PROMPT).input_ids), [3], dtype=torch.float64).prune()
    nodes, total = described_nodes(graph), {}
    for edge in described_edges(graph).values():
        total[edge["source"]] = total.get(edge["source"], 0) + edge["influence"]
    assert total == pytest.approx({key: node["influence"] for key, node in nodes.items()}, rel=1e-9)


def test_bfloat16_shows_its_error(trace):
    out, said = trace("--dtype", "bfloat16")
    assert AttributionGraph.load(out).edges.dtype == torch.bfloat16
    assert "Computed in bfloat16; the largest error of a step beyond rounding is " in said


def test_an_overwritten_folder_has_nothing_of_the_graph_before(trace):
    out, _ = trace("--contrast", FIRST, SECOND)
    (out / "mine.json").write_text("{}")
    trace("--overwrite", prompt=("--prompt", "A class is"))
    files = {file.name for file in out.glob("*.*")}
    assert files == {"graph.safetensors", "graph.json", "a-class-is.json", "index.html", "mine.json"}


def test_graphs_of_two_prompts_are_not_contrasted(parts):
    model, tokenizer, clt = parts
    graphs = [attribute(model, clt, torch.tensor(tokenizer(text).input_ids)) for text in (PROMPT, "A class is")]
    with pytest.raises(ValueError, match="two prompts"):
        contrast(*graphs)


def test_a_target_alone_is_its_own_graph(parts):
    model, tokenizer, clt = parts
    ids = torch.tensor(tokenizer(PROMPT).input_ids)
    both, alone = (attribute(model, clt, ids, targets) for targets in ([3, 9], [9]))
    found = of_targets(both, [1])
    torch.testing.assert_close(found.edges, alone.edges)
    assert found.targets == alone.targets and found.scores() == pytest.approx(alone.scores(), rel=1e-5)
    assert found.outside() == pytest.approx(alone.outside(), rel=1e-4)


def test_dry_run_writes_nothing_and_counts(trace, parts, tmp_path):
    model, tokenizer, clt = parts
    _, said = trace("--dry-run", output=())
    assert list(tmp_path.iterdir()) == []
    graph = attribute(model, clt, torch.tensor(tokenizer(PROMPT).input_ids))
    rows, columns = graph.edges.shape
    assert f"{graph.num_features:,} active features; {rows:,} rows of {columns:,} columns" in said
    assert re.search(r"GFLOP, about \d+ s", said) and "Memory " in said
    trace("--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_cost_is_counted(parts):
    """FLOPs against a plain sum over rows and the sources that each has."""
    model, tokenizer, clt = parts
    ids = torch.tensor(tokenizer(PROMPT).input_ids)
    found, graph = estimate_cost(model, clt, ids), attribute(model, clt, ids)
    assert found["edges"] == graph.edges.nbytes and found["columns"] == graph.edges.shape[1]
    rows = [*graph.features[:, :2].tolist(), *([2, target.position] for target in graph.targets)]
    total, d = 0, 64
    for layer, position in rows:
        seen = position + 1  # positions; attention is two maps of (D, D) each, and patterns
        total += layer * (2 * seen * d * d + seen * seen * d + seen * d)
        total += sum((layer - s) * d for s, p, _ in graph.features.tolist() if s < layer and p <= position)
    assert found["flops"] == pytest.approx(2 * total)
    fewer = estimate_cost(model, clt, ids, max_feature_nodes=3)
    assert fewer["rows"] == 3 + len(graph.targets) and fewer["flops"] < found["flops"]
    assert found["clt"] > 0 and found["seconds"] > 0


def test_a_lazy_clt_gives_the_same_graph(trace):
    out, _ = trace()
    whole = AttributionGraph.load(out)
    trace("--lazy", "--overwrite")
    lazy = AttributionGraph.load(out)
    assert torch.equal(lazy.features, whole.features)
    torch.testing.assert_close(lazy.edges, whole.edges)


def test_special_tokens(tiny_gpt2):
    """Of a tokenizer that puts one in front: as it would; none with `raw`; in a chat that of the template."""
    model, tokenizer = load_language_model(tiny_gpt2)
    bos = tokenizer.bos_token, tokenizer.bos_token_id
    template = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.chat_template = "{% for m in messages %}" + bos[0] + "{{ m.content }}{% endfor %}:"
    ids = prompt_tokens(tokenizer, "A word", model.config).tolist()
    assert ids[0] == bos[1] and prompt_tokens(tokenizer, "A word", model.config, raw=True).tolist() == ids[1:]
    chat = prompt_tokens(tokenizer, "A word", model.config, chat=True).tolist()
    assert chat == [*ids, *tokenizer(":", add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", " object class"], r"target ' object class' is \d+ tokens \('"),
        (["--contrast", FIRST, FIRST], "same token"),
        (["--contrast", FIRST, SECOND, "--targets", FIRST], "contrast has targets of its own"),
        (["--feature", 0, 1, 999], "feature 999 is outside 0 to 47"),
        (["--feature", 9, 1, 0], "layer 9 is outside"),
        (["--feature", 0, 99, 0], "position 99 is outside"),
        (["--cleared", 77], "position 77 is outside"),
        (["--max-feature-nodes", 0], "max_feature_nodes=0"),
        (["--cleared", 0, 77, "--dry-run"], "position 77 is outside"),
        (["--rank-every", 0], "rank_every=0"),
        (["--batch-size", 0], "batch_size=0"),
        (["--node-threshold", 0], "node_threshold=0"),
        (["--edge-threshold", 1.5], "edge_threshold=1.5"),
        (["--verify", 0], "verify=0"),
        (["--chat"], "no chat template"),
        (["--chat", "--raw"], "not allowed with"),
        (["--dtype", "int8"], "invalid choice"),
        (["--model", "nowhere/at-all"], "model 'nowhere/at-all' cannot be loaded"),
        (["--examples", "absent.txt"], "no such file"),
        (["--examples", "absent.txt", "--example-tokens", 0], "example_tokens=0"),
        (["--feature-pages", "absent"], "feature_pages='absent'"),
        (["--revision", "r", "--device", "tpu"], "device='tpu'"),
    ],
)
def test_wrong_options_are_one_line(refused, words, said):
    assert re.search(said, refused(*words))


def test_files_without_groups_are_refused(refused, tmp_path):
    saved = tmp_path / "page.json"
    assert "no such file" in refused("--verify", 1, "--groups", saved)
    assert "no such file" in refused(prompt=("--prompts", tmp_path / "none.jsonl"))
    saved.touch()
    assert "verify" in refused("--groups", saved)
    for text, said in (("{}", "has no supernodes"), ('{"supernodes": [["a", "E_4_1"]]}', "has no group")):
        saved.write_text(text)
        assert said in refused("--verify", 1, "--groups", saved)


def test_the_scores_of_a_contrast_are_those_of_each_graph(trace):
    out, _ = trace("--contrast", FIRST, SECOND)
    for folder in (out, *(path for path in out.iterdir() if path.is_dir())):
        graph = AttributionGraph.load(folder)
        assert graph.info["scores"] == pytest.approx(graph.scores())
        assert graph.info["outside"] == pytest.approx(graph.outside())


def test_groups_of_the_page_are_checked_together(trace, tmp_path):
    out, _ = trace("--verify", 3)
    graph = AttributionGraph.load(out)
    ids = [f"{layer}_{feature}_{position}" for layer, position, feature in graph.features[:2].tolist()]
    others = [f"{graph.num_layers + 1}_5_3", "0_-1_2", "E_4_1"]  # a target, an error, a token
    saved = tmp_path / "page.json"
    saved.write_text(json.dumps({"supernodes": [["mine", *ids, *others], ["errors", "0_-1_2"]]}))
    out, _ = trace("--verify", 3, "--groups", saved, "--overwrite")
    verified = AttributionGraph.load(out).info["verified"]
    assert verified["groups"] == [ids] and "group_0" in verified["nodes"] and len(verified["nodes"]) == 4


def test_several_processes_are_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2" in refused()


def test_wrong_prompts_are_one_line(refused, tmp_path):
    assert "has 1 tokens" in refused(prompt=("--prompt", "a"))
    assert re.search(r"has \d+ tokens; give one of 2 to 128", refused(prompt=("--prompt", "word " * 200)))
    assert "one of the arguments --prompt --prompts is required" in refused(prompt=())
    file = tmp_path / "prompts.jsonl"
    for text, said in (
        ("\n", "is empty"),
        ("{", "line 1 is not JSON"),
        ('{"text": "a"}', 'line 1 has no text "prompt"'),
        ('\n{"prompt": "a b", "slug": "a/b"}', "line 2: slug='a/b'"),
        ('{"prompt": "a b", "slug": "graph"}', "slug='graph'"),
        ('{"prompt": "a b", "slug": "c"}\n{"prompt": "a b", "slug": "c"}', "line 2: slug='c' was there before"),
        ('{"prompt": "a b", "targets": " the"}', "no list of texts"),
        ('{"prompt": "a b"}\n{"prompt": "b"}', "prompt 'b' has 1 tokens"),
    ):
        file.write_text(text)
        assert said in refused(prompt=("--prompts", file))


def test_output_that_is_there_is_refused(refused, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in refused("--output", tmp_path / "full")
    assert "is a file" in refused("--output", tmp_path / "full" / "mine.txt")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert main(["trace", "clt", "--prompt", PROMPT]) == 2
    assert capsys.readouterr().err.startswith("error: output is missing")


def test_clts_that_do_not_fit_are_refused(refused, clt_folder, tmp_path):
    assert "cannot be loaded" in refused(clt=str(tmp_path / "nothing"))
    shutil.copytree(clt_folder, tmp_path / "unnamed")
    config = json.loads((tmp_path / "unnamed" / "config.json").read_text())
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "model is missing" in refused(clt=str(tmp_path / "unnamed"))
    three = CLTConfig(
        num_layers=3, d_model=64, num_features=8, base_model_name_or_path=config["base_model_name_or_path"]
    )
    CrossLayerTranscoder(three).save_pretrained(tmp_path / "three")
    assert "num_layers=3 does not fit" in refused(clt=str(tmp_path / "three"))
    shared = {"activation_fn": "topk", "k_scope": "token", "k": 8}
    shared = CLTConfig(**{**three.to_dict(), **shared, "num_layers": 2})
    CrossLayerTranscoder(shared).save_pretrained(tmp_path / "shared")
    assert "k_scope='token'" in refused(clt=str(tmp_path / "shared"))


def test_names_of_files():
    assert slug_of("<|im_start|>The capital of France is!") == "the-capital-of-france-is"
    assert slug_of("The capital of the state containing Dallas is") == "the-capital-of-the-state-containing"
    assert slug_of("x" * 50) == "x" * 40 and slug_of("x" * 40) == "x" * 40
    assert slug_of("graph") == "a-graph" and slug_of("…") == "prompt"


def test_prompts_without_their_own_take_the_targets_of_all(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "three", "slug": "x", "targets": ["b"]}\n')
    first, second = read_prompts(tmp_path / "a.jsonl", ["a"])
    assert (first.slug, first.targets) == ("01-one-two", ["a"]) and (second.slug, second.targets) == ("x", ["b"])
