"""Where a CLT's files are: in a folder, or on the Hub, from where they come into the cache."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .files import one_line
from .release import SMALL_FILES


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def find_folder(name: str, subfolder: str = "", layers: Iterable[int] | None = None, **hub: Any) -> Path:
    """
    The folder with a CLT's files; downloaded from the Hub, where they are not in the cache yet.

    Args:
        name: A folder, or a repository on the Hub.
        subfolder: The folder in there.
        layers: Of the Hub's files only those of these layers; None: of all.
        hub: Any of `HUB_ARGUMENTS`, for what is on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder, or it is not in the cache and the Hub cannot be reached.
        OSError: If there is no such repository or revision, or the token may not read it.
        ValueError: If `name` can be neither a folder nor a repository, or some layers are asked for where only all
            files together say what the CLT is.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise FileNotFoundError(f"{name}: there is no such folder; give a CLT's folder or its name on the Hub")
        weights = [f"W_*_{layer}.safetensors" for layer in ("*" if layers is None else layers)]
        patterns = [*SMALL_FILES, *weights]
        folder = download(name, [f"{subfolder}/{p}" if subfolder else p for p in patterns], hub)
        if layers is not None and not (folder / subfolder / "config.json").is_file():
            raise ValueError(
                f"layers={list(layers)}: {name} has no config.json, so that only all its files together say what the "
                "CLT is; leave out layers"
            )
    if not (folder / subfolder).is_dir():
        raise FileNotFoundError(f"subfolder={subfolder!r}: {name} has no CLT there; give the folder with its files")
    return folder / subfolder


def download(name: str, patterns: list[str], hub: dict) -> Path:
    """
    The cached copy of a repository with the files that fit `patterns`; `hub` and errors as for [`find_folder`].
    """
    revision = hub.get("revision") or "main"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, library_name="hf_clt", **hub))
    except HFValidationError:
        raise ValueError(f"{name} is no folder, and no repository on the Hub has such a name") from None
    except GatedRepoError as error:
        raise OSError(f"{name} is gated: ask for access on its page, and run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise OSError(f"revision={str(revision)!r} is no branch, tag or commit of {name}") from error
    except LocalEntryNotFoundError as error:
        reason = one_line(error.__cause__ or error)
        raise FileNotFoundError(
            f"{name} ({revision}) is not in the cache, or not all of it, and cannot be downloaded now ({reason})"
        ) from error
    except HfHubHTTPError as error:
        has_token = hub.get("token") or (hub.get("token") is None and get_token())
        if isinstance(error, RepositoryNotFoundError):
            private = "the token may not read it" if has_token else "there is no token (run `hf auth login`)"
            raise OSError(f"{name} is neither a folder here nor on the Hub, or it is private and {private}") from error
        if error.response.status_code == 401:
            raise OSError(f"{name}: the Hub refuses the token; run `hf auth login`, or set HF_TOKEN") from error
        raise
