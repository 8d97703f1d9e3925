"""Runs and saved classifiers on the Hugging Face hub: read by hf://OWNER/NAME, written only by
`push`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bbt_accel.errors import HubError, UsageError, first_line
from bbt_accel.io.manifests import PLANS

PREFIX = "hf://"
ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")


def fetched(path: str | Path) -> Path:
    """A local path as it is; of hf://OWNER/NAME or hf://OWNER/NAME@REVISION the folder that it is
    downloaded to.

    The prefix is required, so that a mistyped folder is not looked for on the network. Raises
    UsageError for another form, HubError where the download fails.
    """
    text = (
        str(path).replace("hf:/", PREFIX, 1)
        if str(path).startswith("hf:/") and "//" not in str(path)
        else str(path)
    )
    if not text.startswith(PREFIX):
        return Path(path)
    found = ADDRESS.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise UsageError(f"{text} is not hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    from huggingface_hub import snapshot_download

    with _hub_errors(f"cannot load {text}"):
        # Plans are programs for a GPU, which no sha256 covers: they are built again where they are
        # needed.
        plans = [f"{PLANS}/*", f"*/{PLANS}/*"]
        return Path(
            snapshot_download(found["repo"], revision=found["revision"], ignore_patterns=plans)
        )


def push_folder(folder: Path, repo: str, private: bool, files: Sequence[str] | None = None) -> str:
    """Create a repository if necessary, and replace its files by those of a folder in one commit;
    returns its address.

    files: those to upload, by their names in the folder; all unless given. The token is that of
    HF_TOKEN or of `hf auth login`. Raises UsageError for another form of name, HubError where the
    hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"{repo!r} is not a repository; give OWNER/NAME")
    from huggingface_hub import HfApi

    with _hub_errors(f"cannot push to {repo}"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise HubError(
                f"{repo} exists and is public; make it private on the hub, or choose another name"
            )
        only = None if files is None else [glob.escape(name) for name in files]
        message = "Upload with bbt-accel"
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=only,
            delete_patterns="*",
        )
        return str(done.commit_url)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # of the hub's client, of requests, and of the file system
        raise HubError(f"{what} ({type(error).__name__}: {first_line(error):.300})") from None
