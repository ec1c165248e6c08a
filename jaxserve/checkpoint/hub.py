"""Models of HuggingFace's hub, downloaded once into its cache."""

import re
from pathlib import Path

from jaxserve.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = "*.safetensors"
_BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights once more, in other formats


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like `owner/model`."""
    return _HUB_ID.fullmatch(name) is not None


def download(hub_id: str, revision: str | None, *, with_weights: bool) -> Path:
    """The directory of `owner/model` in HuggingFace's cache, completed from the hub where it can be reached.

    Weights are fetched only where they are wanted. `revision` is a branch, a tag or a commit; a commit stays what it
    is. `InputError` for what is not to be had.
    """
    from huggingface_hub import errors, snapshot_download  # on demand: its import takes a moment

    at = f" at revision {revision!r}" if revision else ""
    wanted = [_WEIGHTS] * with_weights + _BESIDE_WEIGHTS
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"there is no directory {hub_id}, and HuggingFace's hub, which may have a model of that name, cannot be "
            f"reached and its cache on this machine does not hold it{at}; connect, or give a directory"
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"the hub shows {hub_id} to those only who have accepted its terms; accept them on its page, then log in "
            "with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a directory {hub_id} nor a model of that name on HuggingFace's hub; correct the name, "
            "or log in with 'hf auth login' if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"the hub has no revision {revision!r} of {hub_id}; correct it or leave it out") from error
    except OSError as error:  # the network's errors, and a full disk
        raise InputError(f"cannot download {hub_id}{at} ({str(error).splitlines()[0]}); try again") from error
