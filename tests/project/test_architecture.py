"""The rules of docs/architecture.md, held by walking the syntax trees."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from source_tree import LEAVES, REPO_ROOT, imports_of, project_files, python_files, scripts, tree_of

HEAVY = {
    "accelerate", "akshare", "arch", "bitsandbytes", "exchange_calendars", "fracast", "gguf", "huggingface_hub",
    "matplotlib", "modelscope", "numpy", "pandas", "peft", "psutil", "pyarrow", "rich", "safetensors", "scipy",
    "statsforecast", "statsmodels", "tokenizers", "torch", "transformers", "yaml", "yfinance",
    "datasets", "fastapi", "pydantic", "rouge_chinese", "sacrebleu", "starlette", "tensorboard", "trl", "uvicorn",
    "wandb",
}  # fmt: skip
# Who may import which of our own modules; every other file may import the library and the leaves.
ALLOWED = {"lora": set(), "llm_model": {"lora"}, "setup": set()}
SCRIPT_STEMS = {name.removesuffix(".py") for name in scripts()}
# Folders of later scripts are as little a library as the top-level scripts are.
SCRIPT_FOLDERS = {"data", "training", "visualization", "examples", "scripts", "bench", "setup"}

FORBIDDEN = {
    "a machine's own path": r"/root/|/home/\w|/Users/\w|/work/|/opt/",
    "a package registry's host": r"pypi\.org|pythonhosted\.org|download\.pytorch\.org",
}


def own_imports(path: Path) -> list[tuple[str, int]]:
    return sorted(imports_of(tree_of(path)))


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_imports_go_one_way(path: Path) -> None:
    ours = {"stocklora", *LEAVES, *SCRIPT_STEMS, *SCRIPT_FOLDERS}
    allowed = ALLOWED.get(path.stem if len(path.parts) == 1 else "", {"stocklora", *LEAVES})
    for module, line in own_imports(path):
        root = module.split(".")[0]
        if path.parts[0] == "bench" and root == "bench":
            continue  # benches may share helpers among themselves
        if path.parts[0] == "tests" and root in SCRIPT_STEMS:
            continue  # a test may call a script's main in its own process
        assert not module.startswith("."), f"{path}:{line}: relative import"
        assert root not in ours or root in allowed, f"{path}:{line}: {path} must not import {module}"


def test_lora_stands_on_torch_alone() -> None:
    standard = sys.stdlib_module_names
    tree = tree_of(Path("lora.py"))
    at_top = {module.split(".")[0] for module, _ in imports_of(tree, top_level_only=True)} - standard
    anywhere = {module.split(".")[0] for module, _ in imports_of(tree)} - standard
    assert at_top == {"torch"}
    # only where a file of that kind, or a layer of theirs, is met
    assert anywhere <= {"torch", "safetensors", "transformers", "bitsandbytes"}


@pytest.mark.parametrize("name", scripts())
def test_scripts_have_one_shape(name: str) -> None:
    tree = tree_of(Path(name))
    docstring = ast.get_docstring(tree) or ""
    assert f"python {name}" in docstring, f"{name}: the docstring has no command to copy"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "build_parser" in functions
    main = functions["main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert [ast.unparse(default) for default in main.args.defaults] == ["None"]
    assert ast.unparse(main.returns or ast.Constant(None)) == "int"
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    sys.exit(main())"


@pytest.mark.parametrize("name", scripts())
def test_scripts_import_nothing_heavy_at_the_top(name: str) -> None:
    for module, line in imports_of(tree_of(Path(name)), top_level_only=True):
        assert module.split(".")[0] not in HEAVY, f"{name}:{line}: import {module} inside main"


def test_every_script_is_packaged() -> None:
    for node in tree_of(Path("setup.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCRIPTS":
            assert sorted(ast.literal_eval(node.value)) == sorted(SCRIPT_STEMS)
            return
    pytest.fail("setup.py has no SCRIPTS")


def test_no_file_names_this_machine_or_a_registry() -> None:
    found = []
    for path in project_files():
        data = (REPO_ROOT / path).read_bytes()
        if b"\0" in data or path.name == Path(__file__).name:  # this file has to write them down
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            found += [
                f"{path}:{number}: {what}: {line.strip()[:100]}"
                for what, pattern in FORBIDDEN.items()
                if re.search(pattern, line)
            ]
    assert not found, "\n".join(found)


def test_the_walk_sees_what_it_should() -> None:
    source = (
        "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import t\nelse:\n    import e\n"
        "def f():\n    import inside\nclass C:\n    import body\n"
        "try:\n    import tried\nexcept ImportError:\n    pass\nfrom . import rel\n"
    )
    tree = ast.parse(source)
    everything = {name for name, _ in imports_of(tree)}
    assert everything == {"a.b", "typing", "e", "inside", "body", "tried", "."}
    assert everything - {name for name, _ in imports_of(tree, top_level_only=True)} == {"inside"}
