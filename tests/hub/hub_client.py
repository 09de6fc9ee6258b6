"""
The client's side of the push tests, in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.

Each `check_*` prints its name when it passed; test_push.py starts this file against a loopback Hub and looks for the
names.
"""

import hashlib
import io
import json
import logging
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.hub import check_push_access, push_folder, push_to_hub, save_model_card


TOKEN, OTHERS_TOKEN = "hf_loopback", "hf_other"
API = HfApi(token=TOKEN)
METRICS = {"nmse": 0.25, "l0": 8.0, "num_tokens": 1000}


def make_clt(num_layers=3, seed=0, **changes):
    torch.manual_seed(seed)
    values = {"d_model": 4, "num_features": 8, "activation_fn": "jumprelu", **changes}
    return CrossLayerTranscoder(CLTConfig(num_layers=num_layers, **values))


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir() if path.is_file()
    }


def check_push_and_pull(work):
    clt = make_clt()
    info = push_to_hub(clt, "tester/first", token=TOKEN, metrics=METRICS, commit_message="A first CLT")
    assert info.oid == API.model_info("tester/first").sha
    titles = [commit.title for commit in API.list_repo_commits("tester/first")]
    assert titles == ["A first CLT", "initial commit"]  # one commit of ours
    names = {f"W_{kind}_{layer}.safetensors" for kind in ("enc", "dec") for layer in range(3)}
    names |= {"config.json", "config.yaml", "model.safetensors.index.json", "README.md", ".gitattributes"}
    assert set(API.list_repo_files("tester/first")) == names

    clt.save_pretrained(work / "local")
    for name, digest in digests(work / "local").items():
        if name != "README.md":
            pulled = hf_hub_download("tester/first", name, cache_dir=work / "cache")
            assert hashlib.sha256(Path(pulled).read_bytes()).hexdigest() == digest, name
    loaded = CrossLayerTranscoder.from_pretrained("tester/first", cache_dir=work / "cache")
    inputs = torch.randn(5, 3, 4)
    torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-5, atol=1e-6)
    data = ModelCard.load("tester/first").data
    assert data.library_name == "hf_clt"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"nmse": 0.25, "l0": 8.0}


def check_the_method_of_the_model(work):
    info = make_clt().push_to_hub("tester/method", token=TOKEN, private=True)
    assert info.oid == API.model_info("tester/method").sha
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("tester/method")


def check_only_the_release_is_pushed_and_the_folder_unchanged(work):
    folder = work / "run"
    make_clt().save_pretrained(folder)
    save_model_card(folder, make_clt().config, METRICS)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.safetensors").write_bytes(b"state")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "W_enc_9.safetensors").write_bytes(b"of another run")
    before = digests(folder)
    push_folder(folder, "tester/run", token=TOKEN)
    pushed = API.list_repo_files("tester/run")
    assert not [name for name in pushed if "checkpoint" in name or name in ("metrics.jsonl", "W_enc_9.safetensors")]
    assert digests(folder) == before
    card = ModelCard.load("tester/run").content
    assert 'CrossLayerTranscoder.from_pretrained("tester/run")' in card and "0.2500" in card


def check_no_stale_weights(work):
    push_to_hub(make_clt(num_layers=4), "tester/shrinking", token=TOKEN)
    API.upload_file(path_or_fileobj=b"x", path_in_repo="model-00001-of-00001.safetensors", repo_id="tester/shrinking")
    API.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="tester/shrinking")
    API.upload_file(path_or_fileobj=b"{}", path_in_repo="other/model.index.json", repo_id="tester/shrinking")
    push_to_hub(make_clt(num_layers=2), "tester/shrinking", token=TOKEN)
    weights = [name for name in API.list_repo_files("tester/shrinking") if name.endswith(".safetensors")]
    ours = [f"W_{kind}_{layer}.safetensors" for kind in ("dec", "enc") for layer in range(2)]
    assert sorted(weights) == ours
    kept = {"notes.txt", "other/model.index.json"}  # what is not ours to replace stays
    assert kept <= set(API.list_repo_files("tester/shrinking"))
    assert CrossLayerTranscoder.from_pretrained("tester/shrinking", cache_dir=work / "cache").config.num_layers == 2


def check_a_humans_card_is_kept_and_a_generated_one_replaced(work):
    clt = make_clt()
    push_to_hub(clt, "tester/card", token=TOKEN, metrics={"nmse": 0.75})
    push_to_hub(clt, "tester/card", token=TOKEN, metrics={"nmse": 0.25})
    generated = ModelCard.load("tester/card").content
    assert "0.2500" in generated and "0.7500" not in generated
    edited = generated.replace("## Limitations", "## Limitations\n\n- Seen by a human.")
    API.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="tester/card")
    push_to_hub(make_clt(seed=1), "tester/card", token=TOKEN, metrics={"nmse": 0.5})
    assert Path(hf_hub_download("tester/card", "README.md", cache_dir=work / "cache")).read_text() == edited
    loaded = CrossLayerTranscoder.from_pretrained("tester/card", cache_dir=work / "cache")
    assert torch.equal(loaded.state_dict()["encoders.0.weight"], make_clt(seed=1).state_dict()["encoders.0.weight"])


def check_branch(work):
    push_to_hub(make_clt(seed=0), "tester/branches", token=TOKEN)
    main = API.model_info("tester/branches").sha
    for seed in (1, 2):  # made by the first push, reused by the second
        push_to_hub(make_clt(seed=seed), "tester/branches", token=TOKEN, revision="half-trained")
    assert API.model_info("tester/branches").sha == main
    loaded = CrossLayerTranscoder.from_pretrained("tester/branches", revision="half-trained", cache_dir=work / "cache")
    assert torch.equal(loaded.state_dict()["encoders.0.weight"], make_clt(seed=2).state_dict()["encoders.0.weight"])


def check_two_pushes_at_once(work):
    push_to_hub(make_clt(seed=0), "tester/busy", token=TOKEN)
    clts, failed = [make_clt(seed=seed) for seed in (1, 2)], []

    def push(clt):
        try:
            push_to_hub(clt, "tester/busy", token=TOKEN)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=push, args=(clt,)) for clt in clts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    loaded = CrossLayerTranscoder.from_pretrained("tester/busy", cache_dir=work / "cache").state_dict()
    weights = [name for name in loaded if name.endswith("weight")]
    # one of the two, whole: never the encoder of one and the decoder of the other
    assert any(all(torch.equal(loaded[name], clt.state_dict()[name]) for name in weights) for clt in clts)


def check_a_commit_in_between_is_looked_at_again(work):
    push_to_hub(make_clt(), "tester/raced", token=TOKEN)
    commit, calls = HfApi.create_commit, []

    def someone_is_faster(self, *args, **kwargs):
        calls.append(kwargs["parent_commit"])
        if len(calls) == 1:
            operation = CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=b"# Written meanwhile\n")
            commit(API, "tester/raced", [operation], commit_message="Meanwhile")
        return commit(self, *args, **kwargs)

    HfApi.create_commit = someone_is_faster
    try:
        push_to_hub(make_clt(seed=1), "tester/raced", token=TOKEN)
    finally:
        HfApi.create_commit = commit
    assert len(calls) == 2 and calls[0] != calls[1]
    assert (
        Path(hf_hub_download("tester/raced", "README.md", cache_dir=work / "cache")).read_text()
        == "# Written meanwhile\n"
    )


def check_refusals(work):
    with pytest.raises(HfHubHTTPError) as forbidden:
        push_to_hub(make_clt(), "someone-else/clt", token=TOKEN)
    assert forbidden.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as unauthorized:
        push_to_hub(make_clt(), "tester/clt", token="hf_wrong")
    assert unauthorized.value.response.status_code == 401
    assert check_push_access(TOKEN) == "tester"
    with pytest.raises(ValueError, match="the one given is refused"):
        check_push_access("hf_wrong")
    with pytest.raises(ValueError, match="there is none"):
        check_push_access()  # none in the environment of this process either
    with pytest.raises(ValueError, match="leave one of them out"):
        push_folder(work / "local", "tester/clt", token=TOKEN, revision="branch", create_pr=True)


def check_an_incomplete_folder_is_refused_before_anything_is_sent(work):
    broken = work / "broken"
    shutil.copytree(work / "local", broken)
    (broken / "W_dec_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks W_dec_1\.safetensors"):
        push_folder(broken, "tester/broken", token=TOKEN)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        push_folder(work, "tester/broken", token=TOKEN)
    assert not API.repo_exists("tester/broken")


def main():
    work = Path(sys.argv[1])
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.DEBUG)
    for name, check in list(globals().items()):
        if name.startswith("check_") and name != "check_push_access":
            check(work)
            print(json.dumps(name), flush=True)
    assert "edited by hand" in log.getvalue()
    assert TOKEN not in log.getvalue() and "hf_wrong" not in log.getvalue()


if __name__ == "__main__":
    main()
