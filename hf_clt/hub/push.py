"""
Publishing a CLT: one commit with the files of a release and its card, which is left out where a human edited the one
in the repository.

`HfApi.upload_folder` may split a large folder into several commits, between which the repository holds half of one CLT
and half of another; here everything goes into one `create_commit` with the parent that was looked at. Weights that
reached the Hub before a connection was cut are not sent again by the next attempt.
"""

import gzip
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..files import as_json, read_json
from ..release import CIRCUIT_TRACER_FILE, INDEX_FILE, is_release_file
from .card import card_from_folder, is_human_edited, save_model_card, set_loading_name, tells_unknown_training
from .facts import FACTS_FILE, check_license, make_facts, read_facts
from .plots import PLOTS, PLOTS_FOLDER


if TYPE_CHECKING:
    from ..modeling_clt import CrossLayerTranscoder


logger = logging.getLogger(__name__)

PLOT_PATHS = tuple(f"{PLOTS_FOLDER}/{file}" for file, _, _ in PLOTS)
# what a new release replaces: weights and indices at the top of the repository, of any layers or shards, and what the
# card shows and is made from
REPLACED = re.compile(r"W_(enc|dec)_[^/]*\.safetensors|model[^/]*\.safetensors|[^/]*\.index\.json")
FEATURES_FOLDER, FEATURE_FILE = "features", re.compile(r"features/layer_[^/]*\.bin")  # for circuit-tracer's front end
ATTEMPTS = 3
SERVER_ERRORS = (500, 502, 503, 504)


def check_push_access(
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Checks the token, so that a missing or refused one is found before the work and not after it, and with a `repo_id`
    whether it may push there. The repository and its branch are made if they are absent.

    Args:
        repo_id, private, revision, token: As for [`push_folder`].

    Returns:
        `str`: The user's name.

    Raises:
        `ValueError`: There is no token, the Hub refuses it, or it may not write to the repository.
        `ConnectionError`: The Hub cannot be reached.
    """
    api = HfApi(token=token, library_name="hf_clt")
    with _clear_errors(repo_id, token, revision):
        user = api.whoami()["name"]
        if repo_id is not None:
            repo_id = _open_repo(api, repo_id, private, revision)
            # Asks how a file would have to be sent, which needs write access, and sends nothing.
            probe = CommitOperationAdd(path_in_repo="config.json", path_or_fileobj=b"{}")
            api.preupload_lfs_files(repo_id, [probe], revision=revision)
    return user


def release_files(folder: str | Path) -> list[Path]:
    """
    The files of a release but for its card: weights, configuration, `metrics.json` and plots. Other files of the
    folder (training checkpoints, logs, feature pages) are left out.

    Raises:
        `ValueError`: The folder is not a release, a file that its index names is missing or not a safetensors file, or
            its `metrics.json` is another than the one that is written with a card.
    """
    folder = Path(folder).expanduser()
    for required in ("config.json", INDEX_FILE):
        if not (folder / required).is_file():
            raise ValueError(
                f"{folder} has no {required}; give a folder that CrossLayerTranscoder.save_pretrained wrote"
            )
    weights = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
    if others := [name for name in weights if not name.endswith(".safetensors")]:
        raise ValueError(f"{others[0]} in {folder} is not a safetensors file; save the CLT again")
    if missing := [name for name in weights if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX_FILE} names; save the CLT again")
    read_facts(folder)
    optional = [name for name in (CIRCUIT_TRACER_FILE, FACTS_FILE, *PLOT_PATHS) if (folder / name).is_file()]
    return [folder / name for name in ("config.json", INDEX_FILE, *weights, *optional)]


def feature_files(pages: str | Path) -> list[Path]:
    """
    The files for circuit-tracer's front end in a folder of feature pages.

    Raises:
        `ValueError`: They are not there, or not all of them.
    """
    folder = Path(pages).expanduser() / FEATURES_FOLDER
    index = folder / "index.json.gz"
    if not index.is_file():
        raise ValueError(
            f"features={str(pages)!r} has no finished features/; give a folder that `hf-clt features` wrote"
        )
    named = [entry["filename"] for entry in json.loads(gzip.decompress(index.read_bytes())).values()]
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise ValueError(f"features={str(pages)!r} lacks {', '.join(missing)}, which its index names; make it anew")
    return [index, *(folder / name for name in named)]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    license: str | None = None,
    features: str | Path | None = None,
) -> CommitInfo:
    """
    Push a released CLT to the Hub in one commit. The folder is not changed.

    Weights, plots and `metrics.json` in the repository that are not part of this release are removed by the same
    commit. A README.md in the repository that a human edited stays; else the folder's own is pushed, with the
    repository's name in its loading snippet, or one made from the folder where it has none. After an error the
    repository is unchanged, and the same call can be repeated: weights that reached the Hub are not sent again.

    Args:
        folder (`str` or `Path`): What `save_pretrained` wrote, with its README.md; further files in it are not pushed.
        repo_id (`str`): `"user/name"`, or `"name"` for one's own; created if absent.
        private (`bool`, *optional*): Whether a new repository is private. True refuses one that is public already.
        token (`str`, *optional*): Defaults to the stored one.
        revision (`str`, *optional*): Branch to push to, made from `main` if absent; or a pull request that is open
            already, such as `"refs/pr/1"`.
        commit_message, commit_description (`str`, *optional*): Of the commit, `"Upload CLT"` by default.
        create_pr (`bool`, *optional*): Open a pull request against `main` instead of pushing to it.
        tag (`str`, *optional*): Name for the new commit, such as `"v1"`.
        license (`str`, *optional*): Licence for the card, as the Hub spells it, such as `"mit"`; by default the one
            that the card in the folder has, if any.
        features (`str` or `Path`, *optional*): Folder of feature pages that `hf-clt features` wrote for this CLT: its
            `features/`, which circuit-tracer's front end reads, is pushed as well. None: what is in the repository
            stays, with a warning.

    Returns:
        [`~huggingface_hub.CommitInfo`]; its `pr_url` says where a pull request is.

    Raises:
        `ValueError`: The folder or `features` is incomplete; arguments contradict each other or the repository; a
            licence is given for a card that was not made from `metrics.json`; there is no token, the Hub refuses it,
            or it may not write there.
        `ConnectionError`: The connection was cut, in each of several attempts.
        [`~huggingface_hub.errors.HfHubHTTPError`]: The Hub refuses for another reason.
    """
    folder = Path(folder).expanduser()
    release_files(folder)
    if features is not None:
        feature_files(features)
    if license is not None:
        check_license(license)
        _check_card_takes_license(folder, license)
    if create_pr and revision is not None:
        raise ValueError(
            f"create_pr=True opens a pull request against main, but revision={revision!r}; leave one of them out"
        )
    if create_pr and tag is not None:
        raise ValueError(f"tag={tag!r} would name what is only proposed with create_pr=True; leave one of them out")
    api = HfApi(token=token, library_name="hf_clt")
    with _clear_errors(repo_id, token, revision):
        repo_id = _open_repo(api, repo_id, private, revision)
        if tag is not None and any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags):
            raise ValueError(f"tag={tag!r} is in {repo_id} already; give another name")
        message = {"commit_message": commit_message or "Upload CLT", "commit_description": commit_description}
        target = {"revision": revision, "create_pr": create_pr}
        info = _commit(api, repo_id, lambda: _uploads(folder, repo_id, license, features), message, target)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=info.oid)
    return info


def _open_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes the repository and the branch if they are absent; returns the repository's full name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"private=True, but {repo_id} is public; make it private on its page, or give another name")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _check_card_takes_license(folder: Path, license: str) -> None:
    readme = folder / "README.md"
    if not readme.is_file():
        return
    if is_human_edited(readme.read_text(encoding="utf-8")) or tells_unknown_training(folder):
        raise ValueError(
            f"license={license!r}: {readme} was not made from {FACTS_FILE} and is pushed as it is; write `license: "
            f"{license}` into its header, and leave the option out"
        )


def _uploads(folder: Path, repo_id: str, license: str | None, features: str | Path | None) -> list[CommitOperationAdd]:
    """The files of the release as they will be in the repository."""
    contents = {file.relative_to(folder).as_posix(): file for file in release_files(folder)}
    readme = folder / "README.md"
    if license is not None or not readme.is_file():
        card = card_from_folder(folder, name=repo_id, license=license)
    else:
        card = readme.read_text(encoding="utf-8")
    contents["README.md"] = set_loading_name(card, repo_id).encode()
    if license is not None:
        facts = (read_facts(folder) or make_facts()) | {"license": license}
        contents[FACTS_FILE] = as_json(facts).encode()
    if features is not None:
        contents |= {f"{FEATURES_FOLDER}/{file.name}": file for file in feature_files(features)}
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]


def _commit(
    api: HfApi, repo_id: str, make_uploads: Callable[[], list[CommitOperationAdd]], message: dict, target: dict
) -> CommitInfo:
    """The one commit, on top of the commit that was looked at; looks again if someone else committed meanwhile."""
    for attempt in range(ATTEMPTS):
        head = api.model_info(repo_id, revision=target["revision"])
        # New for each attempt: what the client finds to be unchanged since it looked, it leaves out of the commit.
        uploads = make_uploads()
        api.preupload_lfs_files(repo_id, uploads, **target)
        try:
            operations = _operations(api, repo_id, head, uploads)
            return api.create_commit(repo_id, operations, **message, **target, parent_commit=head.sha)
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            is_raced = status == 412  # someone else committed since we looked
            # A commit may have been made though its answer was lost, which the next attempt finds; a pull request
            # would be opened twice.
            is_lost = (status is None or status in SERVER_ERRORS) and not target["create_pr"]
            if attempt == ATTEMPTS - 1 or not (is_raced or is_lost):
                raise
            time.sleep(0 if is_raced else 2**attempt)


def _operations(api: HfApi, repo_id: str, head: ModelInfo, uploads: list[CommitOperationAdd]) -> list:
    """What the commit does: adds `uploads`, but for a card that a human edited, and removes what they replace."""
    present = [sibling.rfilename for sibling in head.siblings]
    with tempfile.TemporaryDirectory() as folder:  # not the user's cache: this is not a use of the model
        found = {
            name: Path(api.hf_hub_download(repo_id, name, revision=head.sha, local_dir=folder))
            for name in ("config.json", "README.md")
            if name in present
        }
        if "config.json" in found and not is_release_file(found["config.json"]):
            raise ValueError(
                f"repository {repo_id!r} holds another model than a CLT (config.json), which the push would "
                "replace; give another repository"
            )
        keeps_card = "README.md" in found and is_human_edited(found["README.md"].read_text(encoding="utf-8"))
    uploaded = {operation.path_in_repo for operation in uploads}
    if keeps_card:
        logger.warning(
            "the README.md of %s was edited by hand and is kept; to replace it: hf upload %s README.md",
            repo_id,
            repo_id,
        )
        uploads = [operation for operation in uploads if operation.path_in_repo != "README.md"]
    replaced = [name for name in present if REPLACED.fullmatch(name) or name in (FACTS_FILE, *PLOT_PATHS)]
    features = [name for name in present if FEATURE_FILE.fullmatch(name)]
    if any(map(FEATURE_FILE.fullmatch, uploaded)):
        replaced += features
    elif features:
        logger.warning(
            "the features/ of %s stay as they are; if they are of another CLT, push again with those of this one "
            "(--features), or delete them on its page",
            repo_id,
        )
    removed = [name for name in replaced if name not in uploaded]
    return [*uploads, *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed)]


@contextmanager
def _clear_errors(repo_id: str | None, token: str | None, revision: str | None):
    """Says in one line what is wrong with the token, the repository or the connection."""
    refused = "pushing needs a Hub token, and {}; run `hf auth login`, or set HF_TOKEN to a token with write access"
    none = "there is none" if token is None and get_token() is None else "the one given is refused"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(refused.format("there is none")) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"revision={revision!r} is not in {repo_id}; give a branch, or leave it out") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError(refused.format(none)) from error
        if status == 403 or isinstance(error, RepositoryNotFoundError):
            raise ValueError(
                f"repository {repo_id!r}: the Hub token may not write there; give a repository of your own, or a token"
                " with write access, or propose the change to a public one with create_pr=True (--pull-request)"
            ) from error
        raise
    except (HTTPError, RuntimeError) as error:
        # The client wraps what cuts an upload into a RuntimeError; that of Xet storage raises one itself.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise ConnectionError(
            f"the Hub cannot be reached, or the connection was cut ({type(reason).__name__}: {reason}); try again:"
            " what reached the Hub is not sent again"
        ) from error


def push_to_hub(
    clt: "CrossLayerTranscoder",
    repo_id: str,
    *,
    metrics: dict | None = None,
    training: dict | None = None,
    command: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """
    Saves a CLT with a generated card into a temporary folder and pushes that. To publish a folder with the measured
    card that training wrote, use [`push_folder`].

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT; it is left as it is.
        repo_id (`str`): `"user/name"`, or `"name"` for one's own; created if absent.
        metrics, training, command, license, tags: See [`build_model_card`].
        kwargs: As for [`push_folder`], also for what is returned and raised. Those of transformers about the files
            (`max_shard_size`, `safe_serialization`, `variant`) as for `save_pretrained`.
    """
    about_files = ("max_shard_size", "safe_serialization", "variant")
    about_files = {name: kwargs.pop(name) for name in about_files if name in kwargs}
    if license is not None:
        check_license(license)
    with tempfile.TemporaryDirectory() as folder:
        clt.save_pretrained(folder, **about_files)
        # the live config of a CLT with statistics may differ from that of its release: read the one that was written
        config = type(clt.config).from_pretrained(folder)
        save_model_card(folder, config, metrics, training, command, name=repo_id, license=license, tags=tags)
        return push_folder(folder, repo_id, **kwargs)
