"""
Publishing a CLT: one commit with the files of a release, safetensors only, and a card that keeps what people wrote.

`HfApi.upload_folder` may cut a large folder into several commits, between which the repository holds half of one CLT
and half of another; here everything goes into one `create_commit` on top of the commit that was looked at. Weights
that reached the Hub before a connection was cut are not sent again by the next attempt.
"""

import json
import logging
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from ..checkpoint_format import CIRCUIT_TRACER_FILE, INDEX_FILE
from .model_card import is_human_edited, save_model_card, set_loading_name


logger = logging.getLogger(__name__)

# weights and indices at the top of the repository that a new release replaces, whatever layers or shards it has
WEIGHT_PATTERNS = ("W_enc_*.safetensors", "W_dec_*.safetensors", "model*.safetensors", "*.index.json")
ATTEMPTS = 3


def check_push_access(token: str | None = None) -> str:
    """
    Ask the Hub who we are, so that a missing or refused token is found before the work and not after it.

    Returns:
        `str`: The user's name.

    Raises:
        `ValueError`: There is no token, or the Hub refuses it.
    """
    try:
        return HfApi(token=token, library_name="hf_clt").whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status not in (401, 403):
            raise
        raise ValueError(
            f"pushing needs a Hub token, and {'the one given is refused' if status else 'there is none'}; run"
            " `hf auth login`, or set HF_TOKEN to a token with write access"
        ) from error


def release_files(folder: str | Path) -> list[Path]:
    """
    The files of a release, and nothing else of its folder (training checkpoints, logs).

    Raises:
        `ValueError`: The folder is no release, or a file that its index names is missing.
    """
    folder = Path(folder)
    for required in ("config.json", INDEX_FILE):
        if not (folder / required).is_file():
            raise ValueError(
                f"{folder} has no {required}; give a folder that CrossLayerTranscoder.save_pretrained wrote"
            )
    weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    names = ["config.json", INDEX_FILE, *sorted(set(weight_map.values()))]
    if (folder / CIRCUIT_TRACER_FILE).is_file():
        names.append(CIRCUIT_TRACER_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX_FILE} names; save the CLT again")
    return [folder / name for name in names]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Push a released CLT to the Hub in one commit. The folder is not changed.

    Weights in the repository that are not part of this release are removed by the same commit. A README.md in the
    repository that a human edited stays; else the folder's own is pushed, with the repository's name in its loading
    snippet.

    Args:
        folder (`str` or `Path`): What `save_pretrained` wrote, with its README.md; further files in it are not pushed.
        repo_id (`str`): `"user/name"`, or `"name"` for one's own; created if absent.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): Defaults to the stored one.
        revision (`str`, *optional*): Branch to push to, made from `main` if absent.
        commit_message (`str`, *optional*): Defaults to `"Upload CLT"`.
        create_pr (`bool`, *optional*): Open a pull request against `main` instead of pushing to it.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        `ValueError`: The folder is not a complete release, or `create_pr` comes with a `revision`.
        [`~huggingface_hub.errors.HfHubHTTPError`]: The Hub refuses.
    """
    folder = Path(folder)
    files = release_files(folder)
    if create_pr and revision is not None:
        raise ValueError(
            f"create_pr=True opens a pull request against main, but revision={revision!r}; leave one of them out"
        )
    api = HfApi(token=token, library_name="hf_clt")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    uploads = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    readme = folder / "README.md"
    if readme.is_file():
        card = set_loading_name(readme.read_text(encoding="utf-8"), repo_id).encode()
        uploads.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card))
    uploaded = {operation.path_in_repo for operation in uploads}

    for attempt in range(ATTEMPTS):
        head = api.model_info(repo_id, revision=revision)
        present = [sibling.rfilename for sibling in head.siblings]
        operations = list(uploads)
        if "README.md" in present and "README.md" in uploaded and _readme_is_edited(api, repo_id, head.sha):
            if attempt == 0:
                logger.warning("the README.md of %s was edited by hand and is kept", repo_id)
            operations = [operation for operation in operations if operation.path_in_repo != "README.md"]
        operations += [
            CommitOperationDelete(path_in_repo=name, is_folder=False)
            for name in present
            if name not in uploaded
            and "/" not in name
            and any(fnmatchcase(name, pattern) for pattern in WEIGHT_PATTERNS)
        ]
        try:
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or "Upload CLT",
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )
        except HfHubHTTPError as error:
            # 412: someone else committed since we looked; look again, the weights themselves are on the Hub by now
            if error.response.status_code != 412 or attempt == ATTEMPTS - 1:
                raise


def _readme_is_edited(api, repo_id, sha):
    with tempfile.TemporaryDirectory() as folder:  # not the user's cache: this is no use of the model
        path = api.hf_hub_download(repo_id, "README.md", revision=sha, local_dir=folder)
        return is_human_edited(Path(path).read_text(encoding="utf-8"))


def push_to_hub(
    clt,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    metrics: dict | None = None,
    training: dict | None = None,
    command: str | None = None,
    license: str | None = None,
) -> CommitInfo:
    """
    Save a CLT with a generated card into a temporary folder and push that; see [`push_folder`] and, for `metrics`,
    `training`, `command` and `license`, [`build_model_card`]. The card holds no metrics unless they are given: to
    publish a folder with the measured card that training wrote, use [`push_folder`].
    """
    with tempfile.TemporaryDirectory() as folder:
        clt.save_pretrained(folder)
        # the live config of a CLT with statistics may differ from that of its release: read the one that was written
        config = type(clt.config).from_pretrained(folder)
        save_model_card(folder, config, metrics, training, command, name=repo_id, license=license)
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


__all__ = ["check_push_access", "push_folder", "push_to_hub", "release_files"]
