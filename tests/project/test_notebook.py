"""The Colab notebook, cell by cell, with a tiny model on the CPU."""

from __future__ import annotations

import ast
import json
import re
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from source_tree import REPO_ROOT

NOTEBOOK = REPO_ROOT / "notebooks" / "qlora_colab.ipynb"
CELLS = ["check-gpu", "install", "dataset", "train", "verify", "compare", "download"]


def read_notebook() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def output_of(notebook: nbformat.NotebookNode, name: str) -> str:
    cell = next(cell for cell in notebook.cells if cell["id"] == name)
    return "".join(output.get("text", "") for output in cell["outputs"])


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}})  # type: ignore[no-untyped-call]
    client.execute()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """An empty folder, and variables by which the notebook touches nothing else."""
    settings = {
        "STOCKLORA_ROOT": REPO_ROOT,
        "STOCKLORA_BASE_MODEL": tiny_model,
        "STOCKLORA_DATA": tmp_path / "rows.jsonl",
        "STOCKLORA_SAMPLES": "24",
        "STOCKLORA_OUTPUT": tmp_path / "out",
        # a byte-level vocabulary needs three tokens for a Chinese character
        "STOCKLORA_TRAIN_ARGS": "--device cpu --max_steps 2 --batch_size 2 --max_length 1600 --eval_steps 1",
        "STOCKLORA_TEST_ARGS": "--device cpu --max_new_tokens 8",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_the_notebook_is_clean_and_has_the_documents_seven_cells() -> None:
    notebook = read_notebook()
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code] == CELLS
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for cell in code:
        ast.parse(cell["source"])  # plain Python: no shell magic, so it runs outside Colab
        assert re.match(r"# \d\. ", cell["source"])
    named = set(re.findall(r"STOCKLORA_\w+", "".join(cell["source"] for cell in code)))
    assert named - {"STOCKLORA_INSTALL"} <= set(re.findall(r"STOCKLORA_\w+", notebook.cells[0]["source"]))


def test_the_notebook_runs_from_end_to_end(workplace: Path) -> None:
    notebook = read_notebook()
    execute(notebook, workplace)
    assert "24" in output_of(notebook, "dataset")
    assert "no faults" in output_of(notebook, "dataset")
    assert "adapter_model.safetensors" in output_of(notebook, "verify")
    answers = json.loads((workplace / "out" / "answers.json").read_text(encoding="utf-8"))
    assert "美联储宣布加息25个基点" in json.dumps(answers, ensure_ascii=False)
    assert "美联储宣布加息25个基点" in output_of(notebook, "compare")
    with zipfile.ZipFile(workplace / "qlora_weights.zip") as archive:
        assert {"adapter_config.json", "adapter_model.safetensors", "training_info.json"} <= set(archive.namelist())
        assert archive.testzip() is None
    # once more: everything is there already and nothing is trained twice
    before = (workplace / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    again = read_notebook()
    again.cells = [cell for cell in again.cells if cell["id"] in CELLS[:5]]
    execute(again, workplace)
    assert "trained already" in output_of(again, "train")
    assert (workplace / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_failing_step_stops_the_notebook(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKLORA_DB", str(workplace / "none.db"))
    notebook = read_notebook()
    with pytest.raises(CellExecutionError, match="build_instruction_dataset.py"):
        execute(notebook, workplace)
    assert "no database" in output_of(notebook, "dataset")
    assert not (workplace / "out").exists()
