"""
The client's side of the Hub tests, in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.

Each `check_*` is a case of the protocol, told by its docstring. For each that passed, a line of JSON says what it
took; test_push.py looks for the names, protocol_table.py makes the table of docs/hub.md of the figures. Names after
the working folder select some cases, which run in the order of this file, since some need what others pushed.
"""

import contextlib
import gzip
import hashlib
import importlib
import io
import json
import logging
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModel

import hf_clt.commands.evaluate
from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.hub import BackgroundPush, check_push_access, push_folder, push_to_hub, save_model_card
from hf_clt.hub.card import card_from_folder
from hf_clt.training.parser import parse_train_args
from tests.hub.test_card import tiny_language_model


TOKEN, OTHERS_TOKEN, READ_TOKEN = "hf_loopback", "hf_other", "hf_readonly"
API, OTHERS_API = HfApi(token=TOKEN), HfApi(token=OTHERS_TOKEN)
METRICS = {"nmse": 0.25, "l0": 8.0, "num_tokens": 1000}
PER_LAYER = METRICS | {"nmse_per_layer": [0.25, 0.25, 0.25], "l0_per_layer": [2.0, 3.0, 3.0]}
LARGE = {"d_model": 64, "num_features": 1024}  # 2.4 MB in 6 files with 3 layers
ROOT = Path(__file__).parents[2]
SAID = io.StringIO()  # what was logged and what the scripts printed


def make_clt(num_layers=3, seed=0, **changes):
    torch.manual_seed(seed)
    values = {"d_model": 4, "num_features": 8, "activation_fn": "jumprelu", **changes}
    return CrossLayerTranscoder(CLTConfig(num_layers=num_layers, **values)).eval()


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir() if path.is_file()
    }


def same_encoder(loaded, clt):
    return torch.equal(loaded.state_dict()["encoders.0.weight"], clt.state_dict()["encoders.0.weight"])


def pull(name, work, **kwargs):
    return CrossLayerTranscoder.from_pretrained(name, cache_dir=work / "cache", **kwargs)


def ask(what, **spec):
    """Has the loopback Hub do something to the next requests."""
    request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/_test/{what}", json.dumps(spec).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def run_command(name, *arguments):
    """The exit status of a command of `hf-clt`, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = importlib.import_module(f"hf_clt.commands.{name}").main([str(word) for word in arguments])
    SAID.write(printed.getvalue())
    return status, printed.getvalue()


def run_python(code, *arguments, **environment):
    """Runs a program in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextlib.contextmanager
def logged_in(token=TOKEN):
    os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        del os.environ["HF_TOKEN"]


# -- push -------------------------------------------------------------------------------------------------------------


def check_push_and_pull(work):
    """push, pull: one commit, and the same bytes come back"""
    clt = make_clt()
    info = push_to_hub(clt, "tester/first", token=TOKEN, metrics=METRICS, commit_message="A first CLT")
    assert info.oid == API.model_info("tester/first").sha
    titles = [commit.title for commit in API.list_repo_commits("tester/first")]
    assert titles == ["A first CLT", "initial commit"]  # one commit of ours
    names = {f"W_{kind}_{layer}.safetensors" for kind in ("enc", "dec") for layer in range(3)}
    names |= {"config.json", "config.yaml", "model.safetensors.index.json", "README.md", ".gitattributes"}
    names |= {"metrics.json"}
    assert set(API.list_repo_files("tester/first")) == names

    clt.save_pretrained(work / "local")
    for name, digest in digests(work / "local").items():
        if name != "README.md":
            pulled = hf_hub_download("tester/first", name, cache_dir=work / "cache")
            assert hashlib.sha256(Path(pulled).read_bytes()).hexdigest() == digest, name
    inputs = torch.randn(5, 3, 4)
    loaded = pull("tester/first", work)
    torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-5, atol=1e-6)
    data = ModelCard.load("tester/first").data
    assert data.library_name == "hf_clt"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"nmse": 0.25, "l0": 8.0}


def check_a_larger_one(work):
    """push and pull 12 layers in 24 files, 94 MB"""
    clt = make_clt(num_layers=12, seed=9, d_model=128, num_features=2048)
    push_to_hub(clt, "tester/larger", token=TOKEN)
    loaded = pull("tester/larger", work).state_dict()
    weights = [name for name in loaded if name.endswith("weight")]
    assert len(weights) == 24 and all(torch.equal(loaded[name], clt.state_dict()[name]) for name in weights)


def check_the_same_again_is_no_commit(work):
    """push what is there already: no weight is sent, no commit made"""
    clt = make_clt(seed=7, **LARGE)
    first = push_to_hub(clt, "tester/same", token=TOKEN)
    before = ask("traffic")["received"]
    assert push_to_hub(clt, "tester/same", token=TOKEN).oid == first.oid
    assert ask("traffic")["received"] - before < 20_000


def check_private(work):
    """private: pulled with the owner's token; nothing there (404) for others and without a token"""
    clt = make_clt()
    info = clt.push_to_hub("tester/private", token=TOKEN, private=True)
    assert info.oid == API.model_info("tester/private").sha
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("tester/private")
    for token, message in ((False, "there is no token"), (OTHERS_TOKEN, "the token may not read it")):
        with pytest.raises(OSError, match=f"tester/private is neither .* or it is private and {message}"):
            CrossLayerTranscoder.from_pretrained("tester/private", cache_dir=work / "none", token=token)
    assert same_encoder(pull("tester/private", work, token=TOKEN), clt)
    with pytest.raises(ValueError, match=r"private=True.*tester/first"):
        push_to_hub(clt, "tester/first", token=TOKEN, private=True)


def check_only_the_release_is_pushed_and_the_folder_unchanged(work):
    """push a run's folder: no checkpoint, optimizer state or log goes along; the folder is unchanged"""
    folder = work / "run"
    make_clt().save_pretrained(folder)
    save_model_card(folder, make_clt().config, METRICS)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.safetensors").write_bytes(b"state")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "features").mkdir()
    (folder / "features" / "layer_0.bin").write_bytes(b"pages")
    (folder / "W_enc_9.safetensors").write_bytes(b"of another run")
    before = digests(folder)
    push_folder(folder, "tester/run", token=TOKEN)
    pushed = API.list_repo_files("tester/run")
    assert not [name for name in pushed if "checkpoint" in name or name in ("metrics.jsonl", "W_enc_9.safetensors")]
    assert not [name for name in pushed if name.startswith("features/")]
    assert digests(folder) == before
    card = ModelCard.load("tester/run").content
    assert 'CrossLayerTranscoder.from_pretrained("tester/run")' in card and "0.2500" in card


def check_no_stale_weights(work):
    """sharded, then with fewer layers: the commit removes the files of the old layers, and nothing else"""
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
    assert pull("tester/shrinking", work).config.num_layers == 2


def check_another_model_is_not_replaced(work):
    """push to the repository of a language model: refused, and nothing of it is removed"""
    API.create_repo("tester/lm")
    for name, content in (("config.json", b'{"model_type": "gpt2"}'), ("model.safetensors", b"x")):
        API.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="tester/lm")
    with pytest.raises(ValueError, match="'tester/lm'"):
        push_to_hub(make_clt(), "tester/lm", token=TOKEN)
    assert {"config.json", "model.safetensors"} <= set(API.list_repo_files("tester/lm"))


def check_arguments_of_transformers(work):
    """push_to_hub with transformers' arguments: tags are in the card, those about the files change nothing"""
    clt = make_clt()
    clt.push_to_hub(
        "tester/arguments", token=TOKEN, tags=["mine"], commit_description="why", max_shard_size="1GB",
        safe_serialization=True,
    )  # fmt: skip
    assert "mine" in ModelCard.load("tester/arguments").data.tags
    with pytest.raises(ValueError, match="safe_serialization=False"):
        clt.push_to_hub("tester/arguments", token=TOKEN, safe_serialization=False)


def check_plots_and_what_the_card_is_made_from(work):
    """card: its plots show, with metrics.json; those that the next release has not are removed, others' files stay"""
    clt = make_clt()
    push_to_hub(clt, "tester/plots", token=TOKEN, metrics=PER_LAYER, license="mit")
    card = ModelCard.load("tester/plots")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", card.content)
    assert shown == ["plots/metrics_per_layer.png"] and card.data.license == "mit"
    folder = Path(API.snapshot_download("tester/plots", cache_dir=work / "cache"))
    assert (folder / shown[0]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["nmse_per_layer"] == [0.25, 0.25, 0.25]
    # the downloaded folder gives the same card again, and pushing it changes nothing
    assert card_from_folder(folder, name="tester/plots") == (folder / "README.md").read_text()
    before = API.model_info("tester/plots").sha
    assert push_folder(folder, "tester/plots", token=TOKEN).oid == before

    with logged_in():
        assert run_command("push", folder, "tester/plots", "--license", "apache-2.0")[0] == 0
        status, said = run_command("push", folder, "tester/plots", "--license", "none of these")
    assert status == 2 and "is not a licence name" in said
    assert ModelCard.load("tester/plots").data.license == "apache-2.0"
    facts = hf_hub_download("tester/plots", "metrics.json", cache_dir=work / "cache")
    assert json.loads(Path(facts).read_text())["license"] == "apache-2.0"

    API.upload_file(path_or_fileobj=b"mine", path_in_repo="plots/mine.png", repo_id="tester/plots")
    push_to_hub(clt, "tester/plots", token=TOKEN)
    left = [name for name in API.list_repo_files("tester/plots") if "plots/" in name or name == "metrics.json"]
    assert left == ["plots/mine.png"]
    assert "](plots/" not in ModelCard.load("tester/plots").content


def check_a_humans_card_is_kept_and_a_generated_one_replaced(work):
    """card: a generated one is replaced, one that a human edited is kept"""
    clt = make_clt()
    push_to_hub(clt, "tester/card", token=TOKEN, metrics={"nmse": 0.75})
    push_to_hub(clt, "tester/card", token=TOKEN, metrics={"nmse": 0.25})
    generated = ModelCard.load("tester/card").content
    assert "0.2500" in generated and "0.7500" not in generated
    edited = generated.replace("## Limitations", "## Limitations\n\n- Seen by a human.")
    API.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="tester/card")
    push_to_hub(make_clt(seed=1), "tester/card", token=TOKEN, metrics={"nmse": 0.5})
    assert Path(hf_hub_download("tester/card", "README.md", cache_dir=work / "cache")).read_text() == edited
    assert "edited by hand" in SAID.getvalue()
    assert same_encoder(pull("tester/card", work), make_clt(seed=1))


def check_branch(work):
    """branch: made by the first push to it, main stays; pulled with revision="""
    push_to_hub(make_clt(seed=0), "tester/branches", token=TOKEN)
    main = API.model_info("tester/branches").sha
    for seed in (1, 2):  # made by the first push, reused by the second
        push_to_hub(make_clt(seed=seed), "tester/branches", token=TOKEN, revision="half/trained")
    assert API.model_info("tester/branches").sha == main
    assert same_encoder(pull("tester/branches", work, revision="half/trained"), make_clt(seed=2))
    assert same_encoder(pull("tester/branches", work), make_clt(seed=0))
    assert same_encoder(pull("tester/branches", work, revision=main), make_clt(seed=0))


def check_tag(work):
    """tag: names the commit, and stays when main goes on; a second one of the same name is refused first"""
    push_to_hub(make_clt(seed=0), "tester/tagged", token=TOKEN, tag="v1")
    push_to_hub(make_clt(seed=1), "tester/tagged", token=TOKEN)
    assert same_encoder(pull("tester/tagged", work, revision="v1"), make_clt(seed=0))
    main = API.model_info("tester/tagged").sha
    with pytest.raises(ValueError, match=r"tag='v1'.*tester/tagged"):
        push_to_hub(make_clt(seed=2), "tester/tagged", token=TOKEN, tag="v1")
    assert API.model_info("tester/tagged").sha == main


def check_pull_request(work):
    """pull request to someone else's repository: main stays; pulled with revision="refs/pr/1", then added to"""
    push_to_hub(make_clt(seed=0), "other/clt", token=OTHERS_TOKEN)
    main = API.model_info("other/clt").sha
    info = push_to_hub(make_clt(seed=1), "other/clt", token=TOKEN, create_pr=True)
    assert info.pr_revision == "refs/pr/1" and info.pr_url.endswith("/other/clt/discussions/1")
    assert same_encoder(pull("other/clt", work, revision="refs/pr/1"), make_clt(seed=1))
    push_to_hub(make_clt(seed=2), "other/clt", token=TOKEN, revision="refs/pr/1")
    assert same_encoder(pull("other/clt", work, revision="refs/pr/1"), make_clt(seed=2))
    refs = API.list_repo_refs("other/clt", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert API.model_info("other/clt").sha == main
    assert same_encoder(pull("other/clt", work), make_clt(seed=0))


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


def check_two_pushes_at_once(work):
    """two pushes at once: both are made, and the result is one of the two, whole"""
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
    assert len(API.list_repo_commits("tester/busy")) == 4
    loaded = pull("tester/busy", work).state_dict()
    weights = [name for name in loaded if name.endswith("weight")]
    # one of the two, whole: never the encoder of one and the decoder of the other
    assert any(all(torch.equal(loaded[name], clt.state_dict()[name]) for name in weights) for clt in clts)


def check_a_commit_in_between_is_looked_at_again(work):
    """someone commits a card during the push (412): the push is made on top, their card kept"""
    push_to_hub(make_clt(), "tester/raced", token=TOKEN)
    ask("overtake", path="README.md", text="# Written meanwhile\n")
    push_to_hub(make_clt(seed=1), "tester/raced", token=TOKEN)
    card = Path(hf_hub_download("tester/raced", "README.md", cache_dir=work / "cache")).read_text()
    assert card == "# Written meanwhile\n"
    assert same_encoder(pull("tester/raced", work), make_clt(seed=1))
    titles = [commit.title for commit in API.list_repo_commits("tester/raced")]
    assert titles[:2] == ["Upload CLT", "Meanwhile"]


def check_someone_changes_a_weight_in_between(work):
    """someone replaces a weight during the push (412): the result is the pushed CLT, whole"""
    clt = make_clt()
    push_to_hub(clt, "tester/mixed", token=TOKEN)
    ask("overtake", path="W_enc_0.safetensors", text="another encoder")
    clt.decoders[0].weight.data += 1  # the encoder is unchanged and would be left out of the commit
    push_to_hub(clt, "tester/mixed", token=TOKEN)
    assert same_encoder(pull("tester/mixed", work), clt)


def check_a_connection_cut_now_and_then(work):
    """connection cut in the middle of two uploads: the client sends these again, nobody notices"""
    clt = make_clt(seed=8, **LARGE)
    ask("cut", after=2, times=2)
    push_to_hub(clt, "tester/shaky", token=TOKEN)
    assert len(API.list_repo_commits("tester/shaky")) == 2
    assert same_encoder(pull("tester/shaky", work), clt)


def check_a_connection_cut_for_good_and_the_push_resumed(work):
    """connection cut for good in the middle: repository and folder are as before; the next push sends the rest only"""
    folder = work / "cut"
    make_clt(seed=5, **LARGE).save_pretrained(folder)
    before, size = digests(folder), sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    push_to_hub(make_clt(seed=6), "tester/cut", token=TOKEN)
    main = API.model_info("tester/cut").sha
    ask("cut", after=4, times=-1)
    try:
        with pytest.raises(ConnectionError, match="not sent again"):
            push_folder(folder, "tester/cut", token=TOKEN)
    finally:
        ask("cut", times=0)
    assert API.model_info("tester/cut").sha == main
    assert digests(folder) == before
    start = ask("traffic")["received"]
    push_folder(folder, "tester/cut", token=TOKEN)
    resent = ask("traffic")["received"] - start
    assert resent < 0.7 * size, (resent, size)
    assert same_encoder(pull("tester/cut", work), make_clt(seed=5, **LARGE))


def check_the_answer_to_the_commit_is_lost(work):
    """connection cut after the commit was made: found to be there, no second one"""
    push_to_hub(make_clt(), "tester/lost", token=TOKEN)
    ask("cut_commit", times=1)
    info = push_to_hub(make_clt(seed=1), "tester/lost", token=TOKEN)
    commits = API.list_repo_commits("tester/lost")
    assert len(commits) == 3 and commits[0].commit_id == info.oid
    assert same_encoder(pull("tester/lost", work), make_clt(seed=1))


def check_a_pull_request_is_never_opened_twice(work):
    """the same with a pull request: an error, since it would be opened twice"""
    push_to_hub(make_clt(), "tester/proposed", token=TOKEN)
    ask("cut_commit", times=1)
    with pytest.raises(ConnectionError):
        push_to_hub(make_clt(seed=1), "tester/proposed", token=TOKEN, create_pr=True)
    refs = API.list_repo_refs("tester/proposed", include_pull_requests=True)
    assert len(refs.pull_requests) == 1


def check_refusals(work):
    """push with a missing, wrong (401) or read-only token, or to others' (403): one line, nothing made"""
    with pytest.raises(ValueError, match=r"'someone-else/clt'.*token"):
        push_to_hub(make_clt(), "someone-else/clt", token=TOKEN)
    with pytest.raises(ValueError, match=r"'other/clt'.*token"):
        push_to_hub(make_clt(), "other/clt", token=TOKEN)
    with pytest.raises(ValueError, match="the one given is refused"):
        push_to_hub(make_clt(), "tester/clt", token="hf_wrong")
    assert not API.repo_exists("tester/clt")
    with pytest.raises(ValueError, match="leave one of them out"):
        push_folder(work / "local", "tester/clt", token=TOKEN, revision="branch", create_pr=True)
    with pytest.raises(ValueError, match="only proposed"):
        push_folder(work / "local", "tester/clt", token=TOKEN, tag="v1", create_pr=True)
    with pytest.raises(ValueError, match=r"revision='refs/pr/7'.*tester/first"):
        push_folder(work / "local", "tester/first", token=TOKEN, revision="refs/pr/7")

    assert check_push_access(token=TOKEN) == check_push_access("tester/probed", token=TOKEN) == "tester"
    assert API.list_repo_files("tester/probed") == [".gitattributes"]
    with pytest.raises(ValueError, match="the one given is refused"):
        check_push_access(token="hf_wrong")
    with pytest.raises(ValueError, match="there is none"):
        check_push_access()  # none in the environment of this process either
    assert check_push_access(token=READ_TOKEN) == "tester"  # who one is says nothing of what one may do
    for repo_id, token in (("tester/x", READ_TOKEN), ("tester/first", READ_TOKEN), ("other/clt", TOKEN)):
        with pytest.raises(ValueError, match=f"'{repo_id}'.*token"):
            check_push_access(repo_id, token=token)


def check_an_incomplete_folder_is_refused_before_anything_is_sent(work):
    """push an incomplete folder: refused before a repository is made"""
    broken = work / "broken"
    shutil.copytree(work / "local", broken)
    (broken / "W_dec_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks W_dec_1\.safetensors"):
        push_folder(broken, "tester/broken", token=TOKEN)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        push_folder(work, "tester/broken", token=TOKEN)
    index = broken / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("W_dec_1.safetensors", "W_dec_1.bin"))
    with pytest.raises(ValueError, match=r"W_dec_1\.bin .*safetensors"):
        push_folder(broken, "tester/broken", token=TOKEN)
    assert not API.repo_exists("tester/broken")


def check_background_push(work):
    """push in the background: while it runs there is no second; what fails is logged and stops nothing"""
    background = BackgroundPush("tester/background", token=TOKEN)
    background.start(work / "local", "Step 1")
    with contextlib.suppress(RuntimeError):  # unless it is through already
        background.start(work / "local", "Step 2")
    background.wait()
    assert not background.is_running
    assert API.list_repo_commits("tester/background")[0].title in ("Step 1", "Step 2")
    failing = BackgroundPush("someone-else/background", token=TOKEN)
    failing.start(work / "local", "Step 3")
    failing.wait()
    assert "pushing 'Step 3' failed, training goes on (repository 'someone-else/background'" in SAID.getvalue()


# -- pull -------------------------------------------------------------------------------------------------------------


def check_pull_with_options(work):
    """pull: subfolder, dtype, device_map, lazy, and AutoModel with a revision"""
    clt = make_clt(seed=3)
    clt.save_pretrained(work / "sub")
    API.create_repo("tester/folders")
    API.upload_folder(repo_id="tester/folders", folder_path=work / "sub", path_in_repo="clts/a", revision="main")
    API.create_branch("tester/folders", branch="old")
    for loaded in (
        pull("tester/folders", work, subfolder="clts/a"),
        pull("tester/folders", work, subfolder="clts/a", device_map="auto"),
        pull("tester/folders", work, subfolder="clts/a", lazy=True),
        AutoModel.from_pretrained("tester/folders", subfolder="clts/a", revision="old", cache_dir=work / "auto"),
    ):
        assert type(loaded) is CrossLayerTranscoder and same_encoder(loaded, clt)
        assert loaded.device.type == "cpu" and loaded.name_or_path == "tester/folders"
    half = pull("tester/folders", work, subfolder="clts/a", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.thresholds[0].value.dtype == torch.float32
    half = AutoModel.from_pretrained("tester/first", dtype="bfloat16", cache_dir=work / "auto")
    assert half.dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"subfolder='clts/b'.*tester/folders"):
        pull("tester/folders", work, subfolder="clts/b")


def check_pull_refusals(work):
    """pull what is not there (404), without a token, with a wrong one (401): one line that says what to do"""
    for name, kwargs, message in (
        ("tester/absent", {}, "tester/absent .*folder"),
        ("tester/first", {"revision": "absent"}, "revision='absent' .*tester/first"),
        ("tester/first", {"token": "hf_wrong"}, "tester/first.*token"),
    ):
        with pytest.raises(OSError, match=message):
            CrossLayerTranscoder.from_pretrained(name, cache_dir=work / "none", **kwargs)
    with pytest.raises(ValueError, match=r"a/b/c .*no repository"):
        CrossLayerTranscoder.from_pretrained("a/b/c")


def check_some_layers(work):
    """pull layers=[0, 3] of 4: their files alone are downloaded, their features are those of the whole CLT"""
    clt = make_clt(num_layers=4, activation_fn="batchtopk", k=32, skip_connection=True, **LARGE)
    clt.train()(torch.randn(6, 4, 64))  # starts the running thresholds
    inputs = torch.randn(6, 4, 64)
    clt.eval()
    push_to_hub(clt, "tester/layers", token=TOKEN)
    size = sum(file.size for file in API.list_repo_tree("tester/layers"))
    before = ask("traffic")["sent"]
    part = pull("tester/layers", work, layers=[0, 3])
    downloaded = ask("traffic")["sent"] - before
    wanted = ("config", "model.", "W_enc_0", "W_dec_0", "W_enc_3", "W_dec_3")
    files = [file for file in API.list_repo_tree("tester/layers") if file.path.startswith(wanted)]
    assert sum(file.size for file in files) < downloaded < 0.75 * size

    whole = clt.encode(inputs)
    torch.testing.assert_close(part.encode(inputs)[:, [0, 3]], whole[:, [0, 3]])
    assert whole[:, [0, 3]].count_nonzero() > 0 and part.encode(inputs)[:, [1, 2]].count_nonzero() == 0
    rest = AutoModel.from_pretrained("tester/layers", layers=[1, 2], cache_dir=work / "auto")
    parts = [some.decode(some.encode_sparse(inputs), inputs) for some in (part, rest)]
    torch.testing.assert_close(sum(parts), clt.decode(whole, inputs), rtol=1e-4, atol=1e-5)
    for layers, message in (([0, 4], "from 0 to 3"), ([], "give different ones")):
        with pytest.raises(ValueError, match=message):
            pull("tester/layers", work, layers=layers)
    with pytest.raises(ValueError, match=r"loaded with layers=\[0, 3\]"):
        part(inputs)
    with pytest.raises(ValueError, match=r"layer 1, .*load"):
        part.decode(whole, inputs)


def check_circuit_tracer_files_alone(work):
    """pull a repository with circuit-tracer's files alone"""
    clt, folder = make_clt(seed=4), work / "tracer"
    clt.save_pretrained(folder)
    for name in ("config.json", "model.safetensors.index.json", "README.md"):
        (folder / name).unlink()
    API.create_repo("tester/tracer")
    API.upload_folder(repo_id="tester/tracer", folder_path=folder)
    with pytest.raises(ValueError, match=r"tester/tracer has no config\.json"):
        pull("tester/tracer", work, layers=[0])
    assert same_encoder(pull("tester/tracer", work), clt)


def check_features(work):
    """--features: circuit-tracer's files of the pages go along and replace those there, which else stay"""
    clt = make_clt(3)
    clt.save_pretrained(work / "described")
    for layers, pages in ((3, work / "pages"), (2, work / "fewer-pages")):
        (pages / "features").mkdir(parents=True)
        for layer in range(layers):
            (pages / "features" / f"layer_{layer}.bin").write_bytes(bytes([layers]) * (100 + layer))
        index = {str(layer): {"filename": f"layer_{layer}.bin", "offsets": [0, 100]} for layer in range(layers)}
        (pages / "features" / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
        (pages / "index.html").write_text("not for the Hub")

    def files():
        return {name for name in API.list_repo_files("tester/described") if "features" in name or "html" in name}

    with logged_in():
        assert run_command("push", work / "described", "tester/described", "--features", work / "pages")[0] == 0
        assert files() == {"features/index.json.gz", *(f"features/layer_{layer}.bin" for layer in range(3))}
        assert len(API.list_repo_commits("tester/described")) == 2  # the first is the empty repository
        said = len(SAID.getvalue())
        assert run_command("push", work / "described", "tester/described")[0] == 0
        assert len(files()) == 4 and "features/ of tester/described stay" in SAID.getvalue()[said:]
        push_folder(work / "described", "tester/described", features=work / "fewer-pages")
        assert files() == {"features/index.json.gz", "features/layer_0.bin", "features/layer_1.bin"}
        assert same_encoder(pull("tester/described", work), clt)
        pulled = hf_hub_download("tester/described", "features/layer_1.bin", cache_dir=work / "cache")
        assert Path(pulled).read_bytes() == bytes([2]) * 101
        (work / "fewer-pages" / "features" / "layer_1.bin").unlink()
        for pages, what in (
            (work / "fewer-pages", r"lacks layer_1\.bin"),
            (work / "described", "no finished features/"),
        ):
            with pytest.raises(ValueError, match=what):
                push_folder(work / "described", "tester/never-made", features=pages)
    with pytest.raises(RepositoryNotFoundError):
        API.model_info("tester/never-made")


def check_info(work):
    """hf-clt info REPO: shape, size, metrics and files without the weights; of circuit-tracer's files alone too"""
    large = make_clt(**LARGE, seed=7)
    with logged_in():
        push_to_hub(large, "tester/informed", metrics=METRICS, tag="v1")
        large.save_pretrained(work / "bare")
        for name in ("config.json", "model.safetensors.index.json"):
            (work / "bare" / name).unlink()
        API.create_repo("tester/bare")
        API.upload_folder(repo_id="tester/bare", folder_path=work / "bare", path_in_repo="clt")
        before = ask("traffic")["sent"]
        printed = {}
        for words in (
            ["tester/informed"],
            ["tester/informed", "--revision", "v1"],
            ["tester/bare", "--subfolder", "clt"],
        ):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert hf_clt.commands.main(["info", *words]) == 0
            printed[words[0]] = out.getvalue()
        sent = ask("traffic")["sent"] - before
    for text in printed.values():
        assert "jumprelu CLT of" in text and "3 layers, width 64, 1,024 features per layer" in text
        assert "W_dec_N.safetensors, N = 0 to 2" in text and "2.4 MB in 6 files" in text
    assert "nmse" in printed["tester/informed"].lower() and "0.2500" in printed["tester/informed"]
    assert "No metrics" in printed["tester/bare"]
    assert sent < 300_000  # the weights are 2.4 MB; of two files the first 100 kB are read
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert hf_clt.commands.main(["info", "tester/nothing-there"]) == 2
    assert error.getvalue().count("\n") == 1 and "neither a folder here nor on the Hub" in error.getvalue()


OFFLINE = """
import sys
import torch
from transformers import AutoModel
from hf_clt import CrossLayerTranscoder

cache = sys.argv[1]
loaded = CrossLayerTranscoder.from_pretrained("tester/first", cache_dir=cache)
automatic = AutoModel.from_pretrained("tester/first", cache_dir=cache)
assert torch.equal(automatic.encoders[0].weight, loaded.encoders[0].weight)
assert CrossLayerTranscoder.from_pretrained("tester/branches", revision="half/trained", cache_dir=cache)
try:
    CrossLayerTranscoder.from_pretrained("tester/unseen", cache_dir=cache)
except FileNotFoundError as error:
    print(error)
"""


def check_offline(work):
    """offline: from the cache, with a revision and AutoModel, in a new process that makes no request"""
    requests = ask("traffic")["requests"]
    said = run_python(OFFLINE, work / "cache", HF_HUB_OFFLINE="1")
    assert ask("traffic")["requests"] == requests
    assert "tester/unseen (main) is not in the cache" in said and said.count("\n") == 1
    assert pull("tester/first", work, local_files_only=True).config.num_layers == 3
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        pull("tester/layers", work, local_files_only=True)  # of which two layers are


# -- training and the scripts -----------------------------------------------------------------------------------------


def training_options(work):
    """What a short run on a tiny language model needs."""
    folder, text = work / "language-model", work / "text.txt"
    if not text.exists():
        tiny_language_model(folder)
        words, chosen = ["The", "capital", "of", "France", "is", *(f"word{i}" for i in range(64))], random.Random(0)
        text.write_text("\n".join(" ".join(chosen.choices(words, k=20)) for _ in range(300)))
    return {
        "model": str(folder),
        "dataset": str(text),
        "context_size": 16,
        "batch_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
        "normalization_estimation_batches": 4,
        "eval_tokens": 60,
        "disable_progress_bar": True,
    }


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def check_training_pushes(work):
    """training with a push every 2 updates: pushed beside training and at the end, release files only"""
    options = training_options(work) | {"training_steps": 6, "checkpoint_interval": 2}
    args = CLTTrainingArguments(
        **options,
        output_dir=str(work / "trained"),
        push_to_hub=True,
        hub_model_id="tester/trained",
        hub_private=True,
        hub_push_interval=2,
    )
    config = CLTConfig(num_layers=2, d_model=8, num_features=16, activation_fn="batchtopk", k=4)
    with logged_in():
        trainer = CLTTrainer(args, config)
        clt = trainer.train()
        commits = API.list_repo_commits("tester/trained")
        titles = [commit.title for commit in commits]
        assert titles[0] == "Upload CLT" and titles[-2:] == ["Step 2", "initial commit"], titles
        plots = {"plots/training_curves.png", "plots/metrics_per_layer.png", "plots/feature_density.png"}
        for commit, expected in ((commits[0], plots), (commits[-2], {"plots/training_curves.png"})):
            files = API.list_repo_files("tester/trained", revision=commit.commit_id)
            assert {name for name in files if "/" in name} == expected  # at step 2 nothing was measured
            assert "metrics.json" in files and "metrics.jsonl" not in files
            card = hf_hub_download("tester/trained", "README.md", revision=commit.commit_id, cache_dir=work / "cache")
            assert set(re.findall(r"\]\((plots/.*?)\)", Path(card).read_text())) == expected
        assert API.model_info("tester/trained").private
        inputs = torch.randn(4, 2, 8)
        loaded, early = (pull("tester/trained", work, revision=c.commit_id) for c in (commits[0], commits[-2]))
        torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-4, atol=1e-5)
        assert not same_encoder(early, loaded)
        card = ModelCard.load("tester/trained").content
        assert f"Measured on {trainer.evaluate()['num_tokens']:,} held-out tokens" in card
        assert trainer.push_to_hub(tag="final").oid == commits[0].commit_id  # nothing new: no commit, but a tag
    alone = CLTTrainingArguments(**options, output_dir=str(work / "alone"))  # pushing changes nothing of the training
    same = CLTTrainer(alone, CLTConfig.from_dict({**config.to_dict(), "base_model_name_or_path": None})).train()
    assert all(torch.equal(value, clt.state_dict()[name]) for name, value in same.state_dict().items())
    assert not (work / "trained" / ".pushing.tmp").exists()
    assert {path.name for path in (work / "trained").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def check_two_processes_push_one_clt(work):
    """training on two processes that share the features, with pushes: the first one pushes the CLT, whole"""
    folder = work / "shared"
    options = training_options(work) | {"training_steps": 4, "num_features": 16, "output_dir": folder}
    options |= {"feature_parallel_size": 2, "activation_fn": "jumprelu", "hub_push_interval": 2}
    del options["disable_progress_bar"]
    words = [*flags(options), "--disable-progress-bar", "--push-to-hub", "--hub-model-id", "tester/shared"]
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    script = str(ROOT / "scripts" / "train_clt.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--dynamo_backend", "no", script, *words]
    with logged_in():
        alone = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=work, env=alone, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    titles = [commit.title for commit in API.list_repo_commits("tester/shared")]
    assert titles == ["Upload CLT", "Step 2", "initial commit"]
    loaded, local = pull("tester/shared", work), CrossLayerTranscoder.from_pretrained(folder)
    assert all(torch.equal(tensor, local.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.num_held == 16


def check_a_bad_token_is_found_before_training(work):
    """training with a missing, wrong or read-only token, or to others' repository: refused before anything is read"""
    options = training_options(work) | {"training_steps": 2, "num_features": 16, "output_dir": work / "refused"}
    options["model"] = work / "language-model"
    pushing = [*flags(options), "--push-to-hub", "--hub-model-id"]
    for token, repo_id, message in (
        (None, "tester/x", "pushing needs a Hub token, and there is none"),
        ("hf_wrong", "tester/x", "the one given is refused"),
        (READ_TOKEN, "tester/x", "the Hub token may not write there"),
        (TOKEN, "other/clt", "the Hub token may not write there"),
    ):
        with contextlib.ExitStack() as stack:
            if token is not None:
                stack.enter_context(logged_in(token))
            status, said = run_command("train", *pushing, repo_id)
        assert status == 2 and message in said and "error: " in said, said
        assert not (work / "refused").exists()


def check_a_push_that_fails_at_the_end_of_training(work):
    """Hub out of service (503) when a training ends: the CLT is in its folder; the error says how to push it later"""
    folder = work / "kept"
    options = training_options(work) | {"training_steps": 2, "output_dir": str(folder)}
    args = CLTTrainingArguments(**options, push_to_hub=True, hub_model_id="tester/kept")
    config = CLTConfig(num_layers=2, d_model=8, num_features=16, activation_fn="topk", k=4)
    with logged_in():
        trainer = CLTTrainer(args, config)
        ask("unavailable", times=-1)
        try:
            with pytest.raises(HfHubHTTPError, match="503") as failed:
                trainer.train()
        finally:
            ask("unavailable", times=0)
        assert f"push it with `hf-clt push {folder} tester/kept`" in failed.value.__notes__[0]
        assert API.list_repo_files("tester/kept") == [".gitattributes"]
        status, said = run_command("push", folder, "tester/kept", "--branch", "dev", "--tag", "v1", "--message", "It")
    assert status == 0 and API.list_repo_commits("tester/kept", revision="dev")[0].title == "It", said
    assert "topk" in pull("tester/kept", work, revision="v1").config.activation_fn


def check_going_on_with_a_published_clt(work):
    """--init-from REPO, pushed over it again; evaluate_clt.py REPO"""
    text = training_options(work)
    options = text | {"training_steps": 3, "output_dir": work / "more", "init_from": "tester/trained"}
    del options["model"]  # the CLT names it
    with logged_in():
        before = pull("tester/trained", work)
        words = [*flags(options), "--push-to-hub", "--hub-model-id", "tester/trained"]
        status, said = run_command("train", *words)
        assert status == 0, said
        after = pull("tester/trained", work)
        assert after.config.activation_fn == "batchtopk" and not same_encoder(after, before)
        figures = work / "figures.json"
        words = ["--dataset", text["dataset"], "--context-size", 16, "--eval-tokens", 60, "--json", figures]
        status, said = run_command("evaluate", "tester/trained", *words)
        assert status == 0, said
        measured = json.loads(figures.read_text())
    card = ModelCard.load("tester/trained", token=TOKEN)
    pushed = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert f"Measured on {measured['num_tokens']:,} held-out tokens" in card.content
    assert measured["nmse"] == pytest.approx(pushed["nmse"], rel=1e-3)


def check_the_documentation(work):
    """every Python snippet of docs/hub.md, one after another; its commands are understood"""
    text = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8").replace("user/", "tester/docs-")
    text = text.replace("num_layers=12, d_model=768, num_features=6144", "num_layers=4, d_model=8, num_features=16")
    text = text.replace("12, 768)", "4, 8)")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {}
    with logged_in(), contextlib.chdir(work), contextlib.redirect_stdout(SAID):
        make_clt().save_pretrained("clt-gpt2")
        for kind, block in blocks:
            if kind == "python":
                exec(compile(block, "docs/hub.md", "exec"), names)
                continue
            for line in block.replace("\\\n", " ").splitlines():
                program, name, *words = shlex.split(line)
                if (program, name) == ("hf-clt", "push"):
                    assert run_command("push", *words)[0] == 0
                elif name == "scripts/train_clt.py":
                    args, _ = parse_train_args(words)
                    assert args.push_to_hub or args.init_from
                else:
                    assert (program, name) == ("hf-clt", "evaluate")
                    assert hf_clt.commands.evaluate.make_parser().parse_args(words).dataset
    assert names["acts"][..., [0, 3], :].count_nonzero() and names["written"].shape == names["inputs"].shape
    assert names["lazy"].lazy and type(names["clt"]).__module__ == "hf_clt.modeling_clt"


def check_no_token_was_written_anywhere(work):
    """the tokens stand in no file, log, output, card or repository"""
    words = [token.encode() for token in (TOKEN, OTHERS_TOKEN, READ_TOKEN, "hf_wrong")]
    said = SAID.getvalue().encode()
    assert len(said) > 1000
    assert not [word for word in words if word in said]
    files = [path for path in work.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if any(word in path.read_bytes() for word in words)]


def main():
    work = Path(sys.argv[1])
    logging.basicConfig(stream=SAID, level=logging.DEBUG)
    failed = False
    for name, check in list(globals().items()):
        if not name.startswith("check_") or name == "check_push_access" or name not in (sys.argv[2:] or [name]):
            continue
        before, start = ask("traffic"), time.perf_counter()
        try:
            check(work)
        except BaseException:
            failed = True
            print(f"{name}\n{traceback.format_exc()}", file=sys.stderr)
            continue
        seconds, after = time.perf_counter() - start, ask("traffic")
        moved = {"pushed": after["received"] - before["received"], "pulled": after["sent"] - before["sent"]}
        requests = after["requests"] - before["requests"]
        row = {"check": name, "case": check.__doc__, "seconds": seconds, "requests": requests, **moved}
        print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
