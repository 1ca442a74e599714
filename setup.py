"""Packaging: ``pip install .`` brings the scripts as modules and as ``stocklora-*`` console commands."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent

# One line a script: the module `train_lora` becomes the command `stocklora-train-lora`.
SCRIPTS = [
    "download",
    "download_model",
    "train",
    "framework",
    "train_lora",
    "framework_llm",
    "merge_lora",
    "backtest",
    "ledger",
    "fine_tune_qwen",
    "inference_lora",
    "quick_start",
    "web",
]
LEAVES = ["lora", "llm_model"]


def requirements(name: str) -> list[str]:
    """The entries of a requirements file, without comments."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line for line in (raw.split("#", 1)[0].strip() for raw in lines) if line]


def version() -> str:
    text = (HERE / "stocklora" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("stocklora/__init__.py states no __version__")
    return match.group(1)


def packages() -> list[str]:
    """``stocklora`` and every package below it, in dotted form."""
    found = sorted((HERE / "stocklora").rglob("__init__.py"))
    return [".".join(path.parent.relative_to(HERE).parts) for path in found]


readme = HERE / "README.md"

setup(
    name="stocklora",
    version=version(),
    description="Fine-tune a language model with LoRA to forecast a stock's next three closes, with honest error bars",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="stocklora contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["stock prediction", "LoRA", "QLoRA", "LLM", "Qwen", "PyTorch", "time series", "forecasting"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Financial and Insurance Industry",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    py_modules=SCRIPTS + LEAVES,
    # The bundled prices live in data/sample/ in the checkout and in stocklora/_sample/ once installed.
    packages=[*packages(), "stocklora._sample"],
    package_dir={"stocklora._sample": "data/sample"},
    package_data={
        "stocklora._sample": ["*"],
        "stocklora.volatility": ["prior.json"],
        "stocklora.instruct.chat": ["schemas/*.json"],
        "stocklora.web": ["static/*", "static/js/*", "static/vendor/*"],
    },
    entry_points={"console_scripts": [f"stocklora-{name.replace('_', '-')} = {name}:main" for name in SCRIPTS]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "modelscope": ["modelscope>=1.20,<2"],
        "akshare": ["akshare>=1.16,<2"],
        # statsforecast 2.1 wants pandas below 3
        "peers": ["statsforecast>=2.0,<3", "pyarrow>=18"],
        "fracast": ["fracast>=0.1"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.20"],
        "dev": requirements("requirements-dev.txt"),
    },
    zip_safe=False,
)
