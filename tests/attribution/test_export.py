"""Attribution graphs in the format of circuit-tracer's front end, and in networkx."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_clt.attribution.export import cantor_pair, check_json, cumulative_shares, to_json, to_networkx
from hf_clt.attribution.graph import AttributionGraph, FeatureTarget, TokenTarget


ROOT = Path(__file__).parents[2]
CIRCUIT_TRACER = ROOT / ".venv-circuit-tracer/bin/python"


@pytest.fixture
def graph():
    """
    Layers 0 and 1, positions 0 to 2: two features of layer 0, the second at the place that circuit-tracer's id of the
    error of layer 1, position 2 would have, and one of layer 1 that nothing leads to or from.
    """
    features = torch.tensor([[0, 1, 4], [0, 2, 1], [1, 2, 3]])
    targets = [TokenTarget(7, 2), TokenTarget(8, -1, minus=7), FeatureTarget(1, 2, 3)]
    edges = torch.zeros(6, 3 + 6 + 3)
    edges[0, 3 + 6 + 1] = 2.0  # token 1 to the first feature
    edges[1, 3 + 6 + 2] = -1.0
    edges[3, 0], edges[3, 1] = 0.5, -0.25
    edges[3, 3 + 3 + 2] = 0.75  # the error of layer 1, position 2
    edges[4, 1] = 3.0
    edges[5, 0] = -2.0
    return AttributionGraph(
        input_ids=torch.tensor([11, 12, 13]),
        tokens=["<s>", "</script><b>", "\n"],
        features=features,
        activations=torch.tensor([1.5, 2.5, 3.5]),
        targets=targets,
        target_weights=torch.tensor([0.5, 1.0, 1.0]),
        edges=edges,
        rest={},
        dropped=torch.zeros(6),
        num_layers=2,
        info={"target_words": {"7": ' "Pa(p=ris', "8": " London"}, "node_threshold": 0.8, "scan": "some-model"},
        labels={(0, 4): "cities"},
    )


@pytest.fixture
def data(graph, tmp_path):
    to_json(graph, tmp_path / "graph.json", slug="a.graph_1-x")
    assert os.listdir(tmp_path) == ["graph.json"]
    return json.loads((tmp_path / "graph.json").read_text(encoding="utf-8"))


def test_ids_types_and_numbers(data):
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert list(nodes) == ["0_4_1", "0_1_2", "1_-1_2", "E_11_0", "E_12_1", "E_13_2", "3_7_2", "3_8-7_2", "3_F1-3_2"]
    assert nodes["0_4_1"]["feature"] == cantor_pair(0, 4) == 14 and cantor_pair(3, 5) == 41
    assert (nodes["0_4_1"]["clerp"], nodes["0_1_2"]["clerp"]) == ("cities", "")
    assert (nodes["0_4_1"]["layer"], nodes["0_4_1"]["ctx_idx"], nodes["0_4_1"]["activation"]) == ("0", 1, 1.5)
    assert (nodes["1_-1_2"]["layer"], nodes["1_-1_2"]["feature"]) == ("1", -1)
    kinds = {name: node["feature_type"] for name, node in nodes.items()}
    assert kinds["1_-1_2"] == "mlp reconstruction error" and kinds["E_11_0"] == "embedding"
    assert kinds["0_4_1"] == "cross layer transcoder" and kinds["3_8-7_2"] == kinds["3_F1-3_2"] == "logit"
    targets = [node for node in data["nodes"] if node["feature_type"] == "logit"]
    assert [node["is_target_logit"] for node in targets] == [True, False, False]
    assert [node["token_prob"] for node in targets] == [0.5, 1.0, 1.0]
    assert targets[0]["feature"] == 7 and len({node["feature"] for node in targets}) == 3
    # The front end takes the probability from the label like this, and fails where it is not there.
    assert [node["clerp"].split("(p=")[1].split(")")[0] for node in targets] == ["0.500", "1.000", "1.000"]
    assert data["metadata"]["prompt_tokens"] == ["<s>", "</script><b>", "\n"]
    assert data["metadata"]["scan"] == "some-model" and data["metadata"]["schema_version"] == 1


def test_links_are_the_edges(data):
    links = {(link["source"], link["target"]): link["weight"] for link in data["links"]}
    assert links == {
        ("E_12_1", "0_4_1"): 2.0,
        ("E_13_2", "0_1_2"): -1.0,
        ("0_4_1", "3_7_2"): 0.5,
        ("0_1_2", "3_7_2"): -0.25,
        ("1_-1_2", "3_7_2"): 0.75,
        ("0_1_2", "3_8-7_2"): 3.0,
        ("0_4_1", "3_F1-3_2"): -2.0,
    }


def test_influence_is_the_cumulative_share_of_the_graph_before_pruning(graph, data):
    # By hand: of target 7 (weight 0.5) a third, a sixth and a half; all of the other two.
    through = {"0_4_1": 1 + 0.5 / 3, "0_1_2": 1 + 0.5 / 6, "1_-1_2": 0.25}
    through |= {"E_12_1": through["0_4_1"], "E_13_2": through["0_1_2"], "E_11_0": 0.0}
    total, found = sum(through.values()), {node["node_id"]: node["influence"] for node in data["nodes"]}
    for name, value in through.items():
        stronger = sum(other for other in through.values() if other > value + 1e-9)
        ties = sum(other for other in through.values() if abs(other - value) < 1e-9)
        assert 0.8 * stronger / total - 1e-6 <= found[name] <= 0.8 * (stronger + ties) / total + 1e-6
        assert found[name] > 0.8 * stronger / total - 1e-6
    assert max(value for value in found.values() if value is not None) == pytest.approx(0.8)
    assert found["3_7_2"] is None


def test_cumulative_shares():
    scores = torch.tensor([[0.1, 0.4], [0.0, 0.5]])
    expected = torch.tensor([[1.0, 0.9], [1.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(cumulative_shares(scores), expected, rtol=1e-6, atol=1e-6)
    assert cumulative_shares(torch.zeros(3)).tolist() == [0, 0, 0]


def test_groups_and_pins_of_a_page(graph, tmp_path):
    path = tmp_path / "graph.json"
    to_json(graph, path, "slug", pinned=["0_4_1"], supernodes=[["say Paris", "0_4_1", "1_-1_2"]])
    params = json.loads(path.read_text(encoding="utf-8"))["qParams"]
    assert params["pinnedIds"] == ["0_4_1"] and params["supernodes"] == [["say Paris", "0_4_1", "1_-1_2"]]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"qParams.supernodes\[0\]='9_9_9' is the id of no node"):
        to_json(graph, path, "slug", supernodes=[["x", "9_9_9"]])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["graph.json"]


@pytest.mark.parametrize("value", ["", "a b", "a/b", "ä", "a\n", None, 3])
@pytest.mark.parametrize("field", ["slug", "scan"])
def test_names_that_neuronpedia_does_not_take(graph, tmp_path, field, value):
    graph.info.pop("scan")
    with pytest.raises(ValueError, match=f"^{field}={value!r}".replace("\\", "\\\\")):
        to_json(graph, tmp_path / "graph.json", **({"slug": "a", "scan": "b"} | {field: value}))
    assert not os.listdir(tmp_path)


def test_a_graph_with_what_is_not_finite_is_refused(graph, tmp_path):
    graph.edges[0, 10] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        to_json(graph, tmp_path / "graph.json", "slug")


@pytest.mark.parametrize(
    "place, value, expected",
    [
        (("metadata", "slug"), "a b", "metadata.slug='a b'"),
        (("metadata", "prompt_tokens"), ["a", 1, "b"], "metadata.prompt_tokens holds 1"),
        (("metadata", "info"), None, "metadata.info=None must be dict"),
        (("qParams", "clickedId"), "x", "qParams.clickedId='x'"),
        (("qParams", "pinnedIds"), [["x"]], r"qParams.pinnedIds=\['x'\]"),
        (("qParams", "supernodes"), [["x"]], r"qParams.supernodes\[0\]"),
        (("nodes",), {}, "data.nodes={} must be list"),
        (("nodes", 0, "layer"), 0, r"nodes\[0\].layer=0 must be str"),
        (("nodes", 0, "layer"), "1", r"nodes\[0\].node_id='0_4_1' does not fit"),
        (("nodes", 0, "node_id"), "0_4", r"nodes\[0\].node_id='0_4' does not fit"),
        (("nodes", 0, "ctx_idx"), True, r"nodes\[0\].ctx_idx=True must be int"),
        (("nodes", 1, "node_id"), "0_4_2", None),
        (("nodes", 1, "jsNodeId"), "0_4-1", r"nodes\[1\].jsNodeId='0_4-1' is not unique"),
        (("nodes", 2, "node_id"), "0_1_2", r"nodes\[2\].node_id='0_1_2' does not fit"),
        (("nodes", 2, "feature_type"), "lorsa", r"nodes\[2\].feature_type='lorsa'"),
        (("nodes", 6, "clerp"), "Paris", r"nodes\[6\].clerp='Paris'"),
        (("nodes", 0, "influence"), float("inf"), r"nodes\[0\].influence=inf is not finite"),
        (("links", 0, "source"), "0_4_2", r"links\[0\].source='0_4_2'"),
        (("links", 0, "weight"), "1", r"links\[0\].weight='1' must be float"),
        (("links", 1), {"source": "E_12_1", "target": "0_4_1", "weight": 1}, r"links\[1\].source, target"),
        (("links", 1), 3, r"links\[1\] is int"),
    ],
)
def test_what_the_check_finds(data, place, value, expected):
    check_json(data)
    broken = copy.deepcopy(data)
    *way, last = place
    part = broken
    for step in way:
        part = part[step]
    part[last] = value
    with pytest.raises(ValueError, match=expected or "is the id of no node"):
        check_json(broken)


def test_missing_fields_and_sizes(data):
    for part in ("metadata", "qParams"):
        for field in data[part]:
            broken = data | {part: {name: value for name, value in data[part].items() if name != field}}
            with pytest.raises(ValueError, match=f"{part}.{field} is missing"):
                check_json(broken)
    for field in data["nodes"][3]:
        nodes = copy.deepcopy(data["nodes"])
        del nodes[3][field]
        with pytest.raises(ValueError, match=rf"nodes\[3\].{field} is missing"):
            check_json(data | {"nodes": nodes})
    for size in (2**10 - 1, 200 * 2**20 + 1):
        with pytest.raises(ValueError, match=f"{size:,} bytes"):
            check_json(data, size)
    with pytest.raises(ValueError, match="data is list"):
        check_json([])


def test_networkx_has_the_same_nodes_and_edges(graph, data):
    found = to_networkx(graph)
    assert list(found.nodes) == [node["node_id"] for node in data["nodes"]]
    weights = {(source, target): weight for source, target, weight in found.edges(data="weight")}
    assert weights == {(link["source"], link["target"]): link["weight"] for link in data["links"]}
    assert found.nodes["0_4_1"]["label"] == "cities" and found.nodes["1_-1_2"]["kind"] == "error"


def test_without_networkx_it_says_so(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="pip install networkx"):
        to_networkx(graph)


@pytest.mark.slow
@pytest.mark.skipif(not CIRCUIT_TRACER.exists(), reason="no circuit-tracer here; `make circuit-tracer` installs it")
def test_circuit_tracer_serves_it(data, tmp_path):
    """Its data model takes every field, and its server gives the graph to its page."""
    to = tmp_path / "served"
    to.mkdir()
    shutil.copy(tmp_path / "graph.json", to)
    program = """
import json, sys, urllib.request
from circuit_tracer.frontend.graph_models import Link, Model, Node
from circuit_tracer.frontend.local_server import serve
from circuit_tracer.frontend.utils import add_graph_metadata
data = json.load(open(sys.argv[1] + "/graph.json"))
model = Model(**data)
assert [node.model_dump() for node in model.nodes] == data["nodes"]
assert [Link(**link).model_dump() for link in model.links] == data["links"]
add_graph_metadata(model.metadata.model_dump(), sys.argv[1])
server = serve(sys.argv[1], port=0)
port = server.httpd.server_address[1]
answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/graph_data/graph.json").read()
assert json.loads(answer) == data
server.stop()
"""
    done = subprocess.run([CIRCUIT_TRACER, "-c", program, to], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
