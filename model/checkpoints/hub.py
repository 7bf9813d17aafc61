"""Checkpoints by their names on the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from .layout import COMPANIONS

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = re.compile(r".+\.(npz|safetensors|json|model)")
_SMALL_FILES = ("config.json", "adapter_config.json", *COMPANIONS, "chat_template.*", "LICENSE*", "NOTICE*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def local_path(
    path_or_name: str | os.PathLike[str],
    *,
    weights: bool,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the path of a checkpoint on this machine. Download it first if its name is that of a repository on the hub.

    Only the files that are needed are downloaded, into the hub's cache. After an interruption, files that are complete are not
    downloaded again. Later calls work without a network.

    Args:
        path_or_name: a path, or "organisation/name". An existing path comes first.
        weights: whether the safetensors are needed besides the configuration, tokenizer, image settings and mask decoder.
        revision: branch, tag or commit; default: main.
        token: access token; True or None take the one of `hf auth login`, False sends none.
        cache_dir: folder of the downloads; default: the hub's cache, which the variable HF_HUB_CACHE moves.
        local_files_only: use the cache without asking the hub.

    Raises:
        ValueError: a `revision` for a path.
        FileNotFoundError: no such repository or revision; not in the cache, and the hub cannot be reached.
        PermissionError: the repository is gated, and its licence is not accepted yet.
        OSError: the disk is full, or the hub answers with another error.
    """
    path, name = Path(path_or_name), os.fspath(path_or_name)
    if path.exists() or not _NAME.fullmatch(name) or _FILES.fullmatch(name):
        if revision is not None:
            raise ValueError(f"revision: {name} is a path; only a repository on the hub has revisions")
        return path
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*_SMALL_FILES, *(_WEIGHTS if weights else ())]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=wanted,
            )
        )
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{name}"
        raise PermissionError(
            f"{name}: the repository is gated; accept its licence at {page} and log in by `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: the repository has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: neither a path on this machine nor a repository on the hub; for a private one log in by `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        cache = cache_dir or constants.HF_HUB_CACHE
        if isinstance(error.__cause__, HfHubHTTPError):
            reason = f"the hub answers {error.__cause__.response.status_code}"
        else:
            reason = "the hub was not asked" if local_files_only else "the hub cannot be reached"
        raise FileNotFoundError(
            f"{name}: no path on this machine, not complete in the cache {cache}, and {reason}; check the name and the network"
        ) from error
    except HfHubHTTPError as error:
        raise OSError(
            f"{name}: the hub answers {error.response.status_code}: {error.server_message or error}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            cache = cache_dir or constants.HF_HUB_CACHE
            raise OSError(f"{name}: the disk of the cache {cache} is full; HF_HUB_CACHE moves the cache") from error
        raise
