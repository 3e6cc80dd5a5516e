"""The hub's repositories: what is in them, files fetched and compared with its checksums, its errors in plain words.

huggingface_hub is imported where it is used: it takes a moment.
"""

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import file_sha256

SPARE_BYTES = 1 << 28  # on the disk, beside what is fetched


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub describes it."""

    name: str
    num_bytes: int
    sha256: str  # of large files; "": the hub tells git's checksum only
    git_sha1: str


def keep_cache_in(root: Path) -> None:
    """Raw files of data sets go to FOLDER/.cache unless HF_HOME or HF_HUB_CACHE says else: homes are small."""
    if not any(name in os.environ for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")):
        os.environ["HF_HUB_CACHE"] = str(root / ".cache" / "hub")  # read when huggingface_hub is imported


def read_listing(name: str, revision: str, kind: str) -> tuple[str, dict[str, HubFile]]:
    """(commit of a revision, its files by name) of a model or dataset."""
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    info = ask(name, revision=revision or None, files_metadata=True, timeout=60)
    files = [
        HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else "", "" if s.lfs else s.blob_id or "")
        for s in info.siblings or []
    ]
    return str(info.sha), {file.name: file for file in files}


def fetch_files(name: str, kind: str, commit: str, files: Sequence[HubFile], folder: Path | None, root: Path) -> None:
    """Fetch files into a folder (None: the hub's cache), but for those that are there whole, and check them.

    Raises:
        ValueError: a file came damaged, or the disk has too little space.
    """
    from huggingface_hub import snapshot_download

    for place in (folder, root / ".cache"):
        for part in place.rglob("*.incomplete") if place else ():  # of a call that was cut off: nobody goes on with it
            part.unlink()
    missing = [file for file in files if not (folder and _has_size(folder / file.name, file.num_bytes))]
    if folder is not None:
        for file in missing:  # the library takes a file for whole that it has once written
            (folder / file.name).unlink(missing_ok=True)
        require_space(root, sum(file.num_bytes for file in missing))
    patterns = [glob.escape(file.name) for file in files]
    found = snapshot_download(name, repo_type=kind, revision=commit, local_dir=folder, allow_patterns=patterns)
    for file in files:
        check_file(Path(found) / file.name, file)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def check_file(path: Path, file: HubFile) -> None:
    """Compare a file with the hub's checksum; ValueError, and the file is removed, if it has another."""
    if file.sha256:
        found, wanted = file_sha256(path), file.sha256
    else:
        data = path.read_bytes()
        found, wanted = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), file.git_sha1
    if wanted and found != wanted:
        path.resolve().unlink()
        raise ValueError(
            f"{file.name} came damaged (checksum {found[:12]}, the hub says {wanted[:12]}) and was removed; run the "
            "same command again"
        )


def require_space(root: Path, num_bytes: int) -> None:
    """ValueError if the disk has no room for so many bytes."""
    free = shutil.disk_usage(root).free
    if num_bytes and num_bytes + SPARE_BYTES > free:
        raise ValueError(
            f"{size_text(num_bytes)} are to come, and the disk of {root} has {size_text(free)} free; make room, or "
            "name another folder with --to"
        )


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that fits: `14.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


@contextmanager
def explained(what: str, revision: str, root: Path) -> Iterator[None]:
    """Turn what the hub's libraries raise into ValueErrors that name the setting and the remedy."""
    try:
        yield
    except Exception as error:
        reason = _reason(what, error, revision, root)
        if not reason:
            raise
        raise ValueError(reason) from error


def _reason(what: str, error: Exception, revision: str, root: Path) -> str:
    """What is wrong and how to mend it; "" for an error of the code."""
    from huggingface_hub import constants, errors

    hub, chain = constants.ENDPOINT, _causes(error)
    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        return (
            f"{what}: the disk is full ({full.strerror}: {full.filename or root}); make room and run the same command "
            "again: files that are whole are kept"
        )
    if _any(chain, errors.GatedRepoError):
        return (
            f"{what} is gated: accept its terms on its page at {hub}, log in with `hf auth login`, and run the same "
            "command again"
        )
    if _any(chain, errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}; name a branch, a tag or a commit"
    if _any(chain, errors.RepositoryNotFoundError):
        return (
            f"{what}: there is none of this name at {hub}, or it is private (then: `hf auth login`); a folder's name "
            "begins with ./ or /"
        )
    if _any(chain, errors.OfflineModeIsEnabled):
        return f"{what}: HF_HUB_OFFLINE is set, and it is not here yet; unset HF_HUB_OFFLINE"
    answers = [e.response for e in chain if isinstance(e, errors.HfHubHTTPError) and e.response is not None]
    if answers and answers[0].status_code != 404:  # a file that is not there is for the others to explain
        return f"{what}: {hub} answers {answers[0].status_code}; run the same command later"
    if _any(chain, errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return (
            f"{what}: {hub} cannot be reached ({_first_line(chain[-1])}); run this on a machine with a network (a "
            "login node), set HTTPS_PROXY if it needs one, or HF_ENDPOINT to a mirror"
        )
    if isinstance(error, (ValueError, OSError, RuntimeError)) or type(error).__module__.startswith("datasets."):
        return f"{what}: {_first_line(error)}"
    return ""


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and what it came from."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return chain


def _any(chain: Sequence[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in chain)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
