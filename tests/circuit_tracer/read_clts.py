"""
The half of the check that runs in circuit-tracer's environment: reads what check.py wrote and pushed with
circuit-tracer's and SAELens' own loaders, and compares. Imports nothing of hf_clt, which needs another transformers.

    HF_ENDPOINT=... .venv-circuit-tracer/bin/python tests/circuit_tracer/read_clts.py FOLDER

For each comparison a line of JSON: `what`, `how`, `difference` (the largest, relative to the largest entry of what is
compared; absent where an error is expected), `tolerance`, `passed`.
"""

import contextlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import attribute_clt  # noqa: E402
from attribute_clt import in_old_form, load_transcoders  # noqa: E402


CPU = torch.device("cpu")
# Both sides compute the same sums in another order; entries are sums of some tens of products.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
LOADING = {
    "eager": {"lazy_encoder": False, "lazy_decoder": False},
    "lazy decoder": {"lazy_encoder": False, "lazy_decoder": True},
    "lazy": {"lazy_encoder": True, "lazy_decoder": True},
}
failed = []


def tell(what: str, how: str, passed: bool, **figures) -> None:
    passed = bool(passed)
    if not passed:
        failed.append(what)
    print(json.dumps({"what": what, "how": how, **figures, "passed": passed}), flush=True)


def compare(what: str, how: str, pairs: dict[str, tuple], tolerance: float) -> None:
    """Tells the largest difference of each pair (found, expected), relative to the largest expected entry."""
    for name, (found, expected) in pairs.items():
        if found.shape != expected.shape:
            tell(f"{what}: {name}", how, False, shapes=[list(found.shape), list(expected.shape)])
            continue
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        tell(f"{what}: {name}", how, difference <= tolerance, difference=difference, tolerance=tolerance)


def expect_error(what: str, how: str, call, *errors) -> None:
    try:
        call()
    except errors as error:
        tell(what, how, True, raised=f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
    else:
        tell(what, how, False, raised=None)


def without_first(acts: torch.Tensor) -> torch.Tensor:
    acts = acts.clone()
    acts[:, 0] = 0
    return acts


# -- encode and reconstruction ----------------------------------------------------------------------------------------


@torch.no_grad()
def compare_clt(clt, name: str, how: str, expected: dict, dtype: torch.dtype) -> None:
    """Dense encode at all positions; features and reconstruction as for attribution, without position 0."""
    bits = str(dtype).removeprefix("torch.")
    inputs, acts = expected["inputs"].to(dtype), expected[f"acts_{bits}"]
    found = clt.encode(inputs)
    components = clt.compute_attribution_components(inputs)
    sparse = components["activation_matrix"].to_dense()
    pairs = {
        "encode": (found, acts),
        "features for attribution": (sparse, without_first(acts)),
        "reconstruction for attribution": (components["reconstruction"], expected[f"reconstruction_{bits}"]),
    }
    compare(name, f"{how}, {bits}", pairs, TOLERANCE[dtype])
    if dtype == torch.float64:  # in float32, rounding may move a pre-activation over its threshold
        same = torch.equal(found != 0, acts != 0)
        tell(f"{name}: which features are active", f"{how}, {bits}", same, active=int((acts != 0).sum()))


def check_same(work: Path, name: str, expected: dict) -> None:
    for how, lazy in LOADING.items():
        for dtype in (torch.float64, torch.float32):
            clt = load_clt(str(work / "clts" / name), device=CPU, dtype=dtype, **lazy)
            compare_clt(clt, name, f"folder, {how}", expected, dtype)
        clt, described = load_transcoder_from_hub(f"tester/{name}", device=CPU, dtype=torch.float64, **lazy)
        compare_clt(clt, name, f"Hub, {how}", expected, torch.float64)
    read = [described[key] for key in ("feature_input_hook", "feature_output_hook")]
    tell(f"{name}: hooks", "Hub", read == ["hook_resid_mid", "hook_mlp_out"], read=read)


# -- what it cannot express -------------------------------------------------------------------------------------------


@torch.no_grad()
def check_topk(work: Path, expected: dict) -> None:
    """It reads no k: every positive pre-activation is a feature."""
    clt = load_clt(str(work / "clts" / "topk"), device=CPU, dtype=torch.float64)
    found, ours = clt.encode(expected["inputs"].double()), expected["acts_float64"]
    kept = ours != 0
    compare("topk: the k largest", "folder", {"encode": (found[kept], ours[kept])}, TOLERANCE[torch.float64])
    more = int((found != 0).sum())
    tell(
        "topk: read as a ReLU, without an error", "folder", more > 2 * int(kept.sum()), ours=int(kept.sum()), its=more
    )


@torch.no_grad()
def check_reach(work: Path, name: str, expected: dict) -> None:
    """It takes every decoder to reach the last layer."""
    folder, inputs = str(work / "clts" / name), expected["inputs"].double()
    expect_error(f"{name}: refused", "eager", lambda: load_clt(folder, lazy_decoder=False), RuntimeError)
    clt = load_clt(folder, device=CPU, dtype=torch.float64)
    compare(name, "lazy decoder", {"encode": (clt.encode(inputs), expected["acts_float64"])}, 1e-12)
    expect_error(
        f"{name}: reconstruction refused", "lazy", lambda: clt.compute_attribution_components(inputs), RuntimeError
    )


@torch.no_grad()
def check_skip(work: Path, expected: dict) -> None:
    """Its loader leaves the tensor out."""
    clt = load_clt(str(work / "clts" / "skip"), device=CPU, dtype=torch.float64)
    found = clt.compute_attribution_components(expected["inputs"].double())["reconstruction"]
    pairs = {"reconstruction less x W_skip": (found, expected["reconstruction_float64"] - expected["skip"])}
    compare("skip: left out, without an error", "folder", pairs, TOLERANCE[torch.float64])


@torch.no_grad()
def check_plt(work: Path, name: str, expected: dict) -> None:
    """A CLT of reach 1 that hf-clt convert wrote as per-layer transcoders."""
    for dtype in (torch.float64, torch.float32):
        for lazy in (True, False):
            transcoders = load_transcoders(str(work / "clts" / name), dtype, lazy)
            compare_clt(transcoders, name, "lazy decoder" if lazy else "eager", expected, dtype)


@torch.no_grad()
def check_silent_end(work: Path, expected: dict) -> None:
    """Known of 0.5.0: it counts the positions by the last one that has an active feature."""
    clt = load_clt(str(work / "clts" / "silent_end"), device=CPU, dtype=torch.float64)
    found = clt.compute_attribution_components(expected["inputs"].double())["reconstruction"]
    shapes = [list(found.shape), list(expected["inputs"].shape)]
    tell(
        "no feature at the last position: one position is missing",
        "folder",
        found.shape[1] < shapes[1][1],
        shapes=shapes,
    )


# -- attribution ------------------------------------------------------------------------------------------------------


def check_attribution(work: Path, name: str, expected: dict) -> None:
    """On the tiny language model that transformers 5 saved: its own activations, through its own hooks."""
    old = work / "old-form" / name
    old.mkdir(parents=True)
    model = ReplacementModel.from_pretrained(
        in_old_form(work / "language-model", old), f"tester/{name}", backend="nnsight", device=CPU, dtype=torch.float32
    )
    tokens = expected["tokens"].tolist()
    with torch.no_grad():
        context = model.setup_attribution(model.ensure_tokenized(tokens))
    error = without_first(expected["labels"] - expected["reconstruction_float32"])
    compare(
        f"{name}: from the language model on",
        "Hub, nnsight, float32",
        {
            "features": (context.activation_matrix.to_dense(), without_first(expected["acts_float32"])),
            "errors of the reconstruction": (context.error_vectors, error),
            "logits": (context.logits.squeeze(0), expected["logits"]),
        },
        10 * TOLERANCE[torch.float32],  # through a language model of three layers as well
    )
    graph = attribute(tokens, model, batch_size=32)
    layers, positions, features = graph.active_features.T
    values = expected["acts_float32"][layers, positions, features]
    compare(
        f"{name}: attribute()", "Hub, nnsight", {"activations in the graph": (graph.activation_values, values)}, 1e-4
    )
    scores = dict(zip(("replacement_score", "completeness_score"), compute_graph_scores(graph), strict=True))
    complete = len(graph.active_features) == int((without_first(expected["acts_float32"]) != 0).sum())
    within = all(0 < score < 1 for score in scores.values())
    tell(f"{name}: attribute()", "Hub, nnsight", complete and within, features=len(graph.active_features), **scores)


def check_language_model(work: Path, expected: dict) -> None:
    """Why the language model is given in the old form."""
    saved = work / "language-model"
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(saved)(expected["tokens"][None]).logits[0]
    away = ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
    tell(
        "saved by transformers 5: rope_theta is not read, without an error",
        "folder",
        away > 1e-3,
        logits_differ_by=away,
    )
    expect_error(
        "saved by transformers 5: the tokenizer", "folder", lambda: AutoTokenizer.from_pretrained(saved), ValueError
    )


def check_script(work: Path) -> None:
    """scripts/attribute_clt.py on folders: a CLT, and per-layer transcoders."""
    written = work / "scores.json"
    for name in ("jumprelu", "reach_1_plt"):
        words = [str(work / "clts" / name), "--model", str(work / "language-model"), "--json", str(written)]
        with contextlib.redirect_stdout(sys.stderr):
            status = attribute_clt.main([*words, "--prompt", "The capital of France is", "--max-feature-nodes", "40"])
        (row,) = json.loads(written.read_text())[words[0]]["prompts"]
        scores = {key: row[key] for key in ("replacement_score", "completeness_score", "feature_nodes")}
        right = status == 0 and row["feature_nodes"] == 40 and 0 < row["replacement_score"] < 1
        tell(f"scripts/attribute_clt.py: {name}", "folder", right, **scores)

    for name in ("topk", "reach_1", "reach_2", "skip"):
        folder = str(work / "clts" / name)
        expect_error(f"scripts/attribute_clt.py: {name}", "folder", partial(load_transcoders, folder), ValueError)


def check_documentation(work: Path) -> None:
    """Every Python snippet of docs/circuit_tracer.md that is for this environment, one after another."""
    text = (ROOT / "docs" / "circuit_tracer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "circuit_tracer" in block or "sae_lens" in block]
    old = work / "old-form" / "documentation"
    old.mkdir(parents=True)
    model = in_old_form(work / "language-model", old)
    names, before = {}, Path.cwd()
    os.chdir(old)
    for block in blocks:
        block = block.replace("HuggingFaceTB/SmolLM2-135M", model).replace("user/clt-smollm2", "tester/batchtopk")
        exec(compile(block, "docs/circuit_tracer.md", "exec"), names)
    os.chdir(before)
    done = len(blocks) >= 2 and 0 < names["completeness"] < 1 and list((old / "graphs").glob("*.json"))
    tell("docs/circuit_tracer.md: its snippets", "run one after another", done, snippets=len(blocks))


# -- SAELens ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_saelens(work: Path, name: str, expected: dict) -> None:
    """SAELens' loader of one layer of a CLT, which knows no threshold and sums the decoders."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import mntss_clt_layer_huggingface_loader

    layers = expected["inputs"].shape[0]
    found = []
    for layer in range(layers):
        sae = SAE.from_pretrained(f"tester/{name}", str(layer), converter=mntss_clt_layer_huggingface_loader)
        found.append(sae.encode(expected["inputs"][layer]))
    found, ours = torch.stack(found), expected["acts_float32"]
    how = f"Hub, SAELens, {layers} layers"
    if name == "relu":
        compare(f"SAELens, {name}", how, {"encode": (found, ours)}, TOLERANCE[torch.float32])
        last = layers - 1
        decoder = load_file(work / "clts" / name / f"W_dec_{last}.safetensors")[f"W_dec_{last}"]
        compare(
            f"SAELens, {name}",
            how,
            {"W_dec, summed over targets": (sae.W_dec, decoder.sum(1))},
            TOLERANCE[torch.float32],
        )
        return
    kept = ours != 0
    pairs = {"encode, above the threshold": (found[kept], ours[kept])}
    compare(f"SAELens, {name}", how, pairs, TOLERANCE[torch.float32])
    below = int((found != 0).sum()) - int(kept.sum())
    tell(
        f"SAELens, {name}: its threshold is not read", how, below > 0, ours=int(kept.sum()), below_the_threshold=below
    )


def main() -> int:
    work = Path(sys.argv[1])
    cases = json.loads((work / "cases.json").read_text())
    expected = {name: load_file(work / "expected" / f"{name}.safetensors") for name in cases}
    for name, kind in cases.items():
        if kind == "same":
            check_same(work, name, expected[name])
    check_topk(work, expected["topk"])
    for name in ("reach_1", "reach_2"):
        check_reach(work, name, expected[name])
    check_plt(work, "reach_1_plt", expected["reach_1_plt"])
    check_skip(work, expected["skip"])
    check_silent_end(work, expected["silent_end"])
    for name in ("relu", "jumprelu", "batchtopk"):
        check_attribution(work, name, expected[name])
        check_saelens(work, name, expected[name])
    check_language_model(work, expected["relu"])
    check_script(work)
    check_documentation(work)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
