"""What the scripts that use, score and draw a tuned chat model can be told; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stocklora.cli.console import UserError
from stocklora.cli.settings import DEVICES, DTYPES, check_positive, check_range, default_of, setting

DEMO_MODES = ("interactive", "batch")
LANGUAGES = ("auto", "zh", "en")
SPLITS = ("auto", "test", "validation", "train", "all")


@dataclass(frozen=True)
class LoadSettings:
    """In which form a model is loaded."""

    base_model: Path | None = setting(
        None, "base model folder (default: the one the adapter was trained over)", section="model", metavar="FOLDER"
    )
    load_in_4bit: bool = setting(False, "quantize the base to 4 bits (nf4)", section="model")
    load_in_8bit: bool = setting(False, "quantize the base to 8 bits", section="model")
    any_base: bool = setting(
        False, "accept a base of the right shape that has another name than the adapter's", section="model"
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, section="model")
    dtype: str = setting("auto", "number format of the weights", choices=DTYPES, section="model")
    trust_remote_code: bool = setting(False, "run Python code that the base model's folder brings", section="model")

    @property
    def quantization(self) -> str:
        """``none``, ``8bit`` or ``4bit``."""
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit exclude each other; give one of them")
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else "none"


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated."""

    max_new_tokens: int = setting(256, "longest answer, in tokens", section="answers")
    temperature: float = setting(0.0, "0: the likeliest token each time; above it: sampled", section="answers")
    top_p: float = setting(1.0, "sample among the likeliest tokens that make up this share", section="answers")
    top_k: int = setting(0, "sample among so many of the likeliest tokens; 0: among all", section="answers")
    repetition_penalty: float = setting(1.0, "above 1: what was said already is less likely", section="answers")
    seed: int = setting(42, "seed of everything random", section="answers")

    def check_answers(self) -> None:
        """The limits of these settings.

        Raises:
            UserError: naming the flag.
        """
        check_range(self, max_new_tokens=(1, None), temperature=(0, 2), top_k=(0, None), seed=(0, 2**32 - 1))
        check_positive(self, "repetition_penalty")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0.0 and (self.top_p < 1.0 or self.top_k):
            name = "top_p" if self.top_p < 1.0 else "top_k"
            raise UserError(
                f"--{name} chooses among sampled tokens, and without a --temperature above 0 none is sampled: give "
                f"one, or leave it out"
            )


@dataclass(frozen=True)
class InferenceSettings(AnswerSettings, LoadSettings):
    """Settings of ``inference_lora.py``."""

    lora_model: list[str] = setting(
        [],
        "adapter folder(s), or the folder of a fully tuned model; NAME= gives an adapter a name of your own",
        section="model",
        nargs="+",
        metavar="[NAME=]FOLDER",
    )
    chat: bool = setting(False, "talk to the model in the terminal", section="what to do")
    prompt: str | None = setting(
        None, "answer this prompt; - reads it from standard input", section="what to do", metavar="TEXT"
    )
    batch: Path | None = setting(
        None,
        'answer the prompts of a file: .jsonl or .json (records of any form, or {"prompt": ...}), or lines of text',
        section="what to do",
        metavar="FILE",
    )
    output: Path | None = setting(
        None, "where --batch writes (default: FILE.answers.jsonl); a second run goes on where the first one ended",
        section="what to do",
        metavar="FILE",
    )  # fmt: skip
    merge: Path | None = setting(
        None, "merge the adapter into the unquantized base and save a plain model", section="what to do", metavar="OUT"
    )
    serve: bool = setting(False, "answer OpenAI chat requests on this machine", section="what to do")
    port: int = setting(8000, "port of --serve; 0 takes a free one", section="what to do")
    host: str = setting(
        "127.0.0.1",
        "address of --serve; where others reach it, a key is needed",
        section="what to do",
        metavar="ADDRESS",
    )
    api_key: str | None = setting(
        None, "key that requests to --serve must bring; better in the environment, as STOCKLORA_API_KEY, since others "
        "on this machine can read command lines", section="what to do", metavar="KEY",
    )  # fmt: skip
    server_names: list[str] = setting(
        [], "names by which clients call --serve, where it has others than the machine's", section="what to do",
        nargs="+", metavar="NAME",
    )  # fmt: skip
    adapter: str | None = setting(
        None, "which adapter to begin with, by name; none is the base (default: the first)", section="answers"
    )
    system: str | None = setting(None, "system message before every conversation", section="answers", metavar="TEXT")
    json_schema: str | None = setting(
        None, "answer in JSON that fits this schema: a file, or one that comes with the program (event_extraction, "
        "indicator, market_reaction, release, risk, sentiment)", section="answers", metavar="FILE|NAME",
    )  # fmt: skip
    batch_size: int = setting(8, "prompts of --batch that are answered at once", section="answers")

    def check(self) -> None:
        """What excludes each other, as far as can be told without looking at any file.

        Raises:
            UserError: naming the flags.
        """
        self.check_answers()
        names = ("chat", "prompt", "batch", "merge", "serve")
        modes = [f"--{name}" for name in names if getattr(self, name) not in (None, False)]
        if len(modes) > 1:
            raise UserError(f"{' and '.join(modes)} exclude each other; give one of them")
        if self.output is not None and self.batch is None:
            raise UserError("--output is where --batch FILE writes its answers; give that too, or leave it out")
        defaults = type(self).__dataclass_fields__
        modes_of = {
            "port": "serve",
            "host": "serve",
            "api_key": "serve",
            "server_names": "serve",
            "batch_size": "batch",
        }
        for name, mode in modes_of.items():
            if getattr(self, name) != default_of(defaults[name]) and getattr(self, mode) in (None, False):
                raise UserError(f"--{name} is for --{mode}; give that too, or leave it out")
        if self.json_schema is not None and self.serve:
            raise UserError("--json_schema: a request to the server brings its own, as response_format; leave it out")
        unused = [name for name in ("system", "json_schema") if getattr(self, name) is not None]
        if self.merge is not None and unused:
            raise UserError(f"--{unused[0]} is for answers, and --merge gives none; leave it out")
        check_range(self, batch_size=(1, None), port=(0, 65535))
        if self.merge is not None and self.quantization != "none":
            raise UserError(
                "--merge goes into the unquantized base, whatever the adapter was trained over: leave out "
                f"--load_in_{self.quantization}"
            )


@dataclass(frozen=True)
class DemoSettings(AnswerSettings, LoadSettings):
    """Settings of ``examples/demo.py``."""

    model_path: str = setting(
        "outputs", "folder that training wrote: an adapter or a whole model", section="demo", metavar="FOLDER"
    )
    mode: str = setting("interactive", "a chat, or a round of ready questions", choices=DEMO_MODES, section="demo")


@dataclass(frozen=True)
class CompareSettings(AnswerSettings, LoadSettings):
    """Settings of ``scripts/qlora/test_qlora_model.py``."""

    adapter_path: Path = setting(
        Path("models/qlora/adapter"), "folder that training wrote", section="comparison", metavar="FOLDER"
    )
    test_cases: list[str] = setting(
        [], "news items, or any other input, one each", section="comparison", nargs="+", metavar="TEXT"
    )
    cases_file: Path | None = setting(
        None, "more of them: .jsonl, .json or lines of text", section="comparison", metavar="FILE"
    )
    instruction: str = setting(
        "分析以下财经快讯对市场的影响", "what to do with each test case; \"\" puts the case alone",
        section="comparison", metavar="TEXT",
    )  # fmt: skip
    output: Path | None = setting(None, "write the answers there too (JSON)", section="comparison", metavar="FILE")

    def check(self) -> None:
        """What excludes each other.

        Raises:
            UserError: naming the flags.
        """
        self.check_answers()
        given = self.instruction != type(self).__dataclass_fields__["instruction"].default
        if given and self.cases_file is not None and not self.test_cases:
            raise UserError(
                "--instruction stands before --test_cases; lines of --cases_file are whole prompts: leave it out"
            )


@dataclass(frozen=True)
class EvaluateSettings(AnswerSettings, LoadSettings):
    """Settings of ``training/evaluate.py``."""

    model_path: Path = setting(
        Path("outputs"), "folder that training wrote: an adapter or a whole model", section="data", metavar="FOLDER"
    )
    data: list[Path] = setting(
        [], "rows to score (default: the held-out rows of what the model was trained on)", section="data",
        nargs="+", metavar="FILE",
    )  # fmt: skip
    split: str = setting(
        "auto", "which rows of the data; auto: test for training data, all for --data", choices=SPLITS, section="data"
    )
    num_samples: int | None = setting(None, "score at most so many rows, spread over the kinds", section="data")
    output_dir: Path | None = setting(
        None, "where to write (default: the model's folder)", section="data", metavar="FOLDER"
    )
    tuned_only: bool = setting(False, "leave out the base model: half the time, and no comparison", section="data")
    batch_size: int = setting(8, "rows that are answered at once", section="answers")
    constrained: bool = setting(
        False, "answer the rows whose answers are JSON a second time, held to their schema, and compare", section="data"
    )
    resamples: int = setting(2000, "bootstrap resamples for the intervals", section="answers")

    def check(self) -> None:
        """The limits of these settings.

        Raises:
            UserError: naming the flag.
        """
        self.check_answers()
        check_range(self, num_samples=(1, None), batch_size=(1, None), resamples=(100, None))
        whole = self.model_path.is_dir() and not (self.model_path / "adapter_config.json").is_file()
        if self.tuned_only and self.base_model is not None and whole:
            raise UserError("--base_model is to compare a whole model with, and --tuned_only does not; leave one out")


@dataclass(frozen=True)
class PlotSettings:
    """Settings of ``visualization/plot_results.py``."""

    model_path: Path = setting(
        Path("outputs"), "folder that training and evaluation wrote to", section="pictures", metavar="FOLDER"
    )
    output_dir: Path | None = setting(
        None, "where to put the pictures (default: the same folder)", section="pictures", metavar="FOLDER"
    )
    language: str = setting(
        "auto", "of the labels; auto: Chinese where a font has it, else English", choices=LANGUAGES, section="pictures"
    )
    font: Path | None = setting(None, "a font file to draw with", section="pictures", metavar="FILE")
