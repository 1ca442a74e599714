"""inference_lora.py, examples/demo.py and scripts/qlora/test_qlora_model.py as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_models import make_adapter, read_jsonl, user, write_jsonl
from source_tree import RunScript

import inference_lora
from stocklora.cli.console import UserError
from stocklora.instruct.chat.batch import read_prompts
from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.chat.model import ChatModel

FAST = ["--max_new_tokens", "6", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_model, folder / name, seed) for seed, name in enumerate(["news", "reports"])}


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, adapters: dict[str, Path]) -> ChatModel:
    return load_chat_model(tiny_model, adapters, dtype="float32", device="cpu")


def run_main(*arguments: object) -> int:
    return inference_lora.main([*map(str, arguments), *FAST])


@pytest.fixture
def piped(call_script: RunScript, tmp_path: Path) -> Callable[..., str]:
    """Stdout of a script that reads ``text`` from a pipe."""

    def run(text: str | bytes, *arguments: object, script: str = "inference_lora.py") -> str:
        given = text.encode() if isinstance(text, str) else text
        result = call_script(script, *arguments, *FAST, cwd=tmp_path, text=given)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    return run


# ------------------------------------------------------------------------------------------------------- the modes


def test_without_a_mode_it_answers_questions_of_its_own(tiny_model, adapters, tmp_path, call_script: RunScript) -> None:
    result = call_script(
        "inference_lora.py", "--base_model", tiny_model, "--lora_model", adapters["news"], *FAST, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "[1/5]" in result.stdout
    assert "[5/5]" in result.stdout
    assert "cut at 6 tokens" in result.stdout


def test_a_prompt_is_answered_as_the_model_answers(chat_model, adapters, capsys) -> None:
    assert run_main("--lora_model", adapters["news"], "--prompt", "央行降准") == 0
    expected = chat_model.reply(user("央行降准"), adapter="news", max_new_tokens=6)
    assert capsys.readouterr().out.startswith(expected)
    assert run_main("--lora_model", adapters["news"], "--prompt", "央行降准", "--adapter", "none") == 0
    assert capsys.readouterr().out.startswith(chat_model.reply(user("央行降准"), adapter="none", max_new_tokens=6))


def test_a_pipe_is_a_prompt(chat_model, adapters, call_script: RunScript, tmp_path) -> None:
    text = "央行降准\n".encode()
    result = call_script("inference_lora.py", "--lora_model", adapters["news"], *FAST, cwd=tmp_path, text=text)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(chat_model.reply(user("央行降准"), adapter="news", max_new_tokens=6))


def test_a_chat_remembers_resets_and_changes_adapters(chat_model, adapters, piped) -> None:
    lines = [
        "你好",
        "再说",
        "/reset",
        "再说",
        "/adapters",
        "/adapter reports",
        "再说",
        "/adapter nobody",
        "/nonsense",
        "/exit",
        "no",
    ]
    folders = [f"{name}={folder}" for name, folder in adapters.items()]
    out = piped("\n".join(lines), "--lora_model", *folders, "--chat")
    parts = out.split("\nyou> ")
    assert len(parts) == 1 + lines.index("/exit") + 1

    def reply(*texts: str, adapter: str = "news") -> str:
        return chat_model.reply(user(*texts), adapter=adapter, max_new_tokens=6)

    first = reply("你好")
    assert parts[1].startswith(first)
    assert parts[2].startswith(reply("你好", first.strip(), "再说"))
    again = reply("再说")
    assert parts[4].startswith(again)
    assert parts[5].split() == ["*", "news", "reports", "none"]
    assert parts[7].startswith(reply("再说", again.strip(), "再说", adapter="reports"))
    assert "no adapter 'nobody'; there are: news, reports, none" in parts[8]
    assert "/adapter NAME" in parts[9]


def test_a_merged_model_says_the_same(tiny_model, adapters, chat_model, tmp_path, capsys) -> None:
    merged = tmp_path / "merged"
    assert run_main("--lora_model", adapters["news"], "--merge", merged) == 0
    out = capsys.readouterr().out
    gap, base_gap = (float(text) for text in re.findall(r"(?:disk|scale) +([\d.e-]+)", out))
    assert gap < 1e-3 < base_gap
    assert "5 of 5" in out
    alone = load_chat_model(merged, dtype="float32", device="cpu")
    assert alone.reply(user("央行降准"), max_new_tokens=12) == chat_model.reply(
        user("央行降准"), adapter="news", max_new_tokens=12
    )
    info = json.loads((merged / "training_info.json").read_text(encoding="utf-8"))
    assert info["merged_from"]["adapter"] == "news"
    assert not (merged / "adapter_config.json").exists()
    assert run_main("--lora_model", adapters["news"], "--merge", merged) == 2
    assert "is there already" in capsys.readouterr().err
    assert run_main("--lora_model", merged, "--prompt", "央行降准") == 0  # a whole model needs no base


def test_an_adapter_over_quantized_weights_is_merged_into_the_unquantized_base(tiny_model, tmp_path, capsys) -> None:
    info = {"base_model": {"path": str(tiny_model)}, "quantization": "4bit"}
    adapter = make_adapter(tiny_model, tmp_path / "a", info=info)
    assert run_main("--lora_model", adapter, "--prompt", "hi") == 0
    assert "was trained over 4-bit weights; --load_in_4bit" in capsys.readouterr().out
    assert run_main("--lora_model", adapter, "--prompt", "hi", "--load_in_4bit") == 0
    assert "note:" not in capsys.readouterr().out
    assert run_main("--lora_model", adapter, "--merge", tmp_path / "m") == 0
    assert "into the unquantized" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_untied_where_an_adapter_changes_one(tiny_model, tmp_path, capsys, target: str) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "a", target_modules=[target])
    assert run_main("--lora_model", adapter, "--merge", tmp_path / "m") == 0
    assert re.search(r"disk +\S+ +5 of 5", capsys.readouterr().out)
    assert json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    asked, tuned = user("央行降准"), load_chat_model(tiny_model, {"a": adapter}, dtype="float32", device="cpu")
    merged = load_chat_model(tmp_path / "m", dtype="float32", device="cpu")
    assert merged.reply(asked, max_new_tokens=12) == tuned.reply(asked, max_new_tokens=12)


def test_a_merge_that_changes_the_model_is_not_kept(adapters, tmp_path, capsys, monkeypatch) -> None:
    import peft

    def merged_wrongly(self, **_: object):  # type: ignore[no-untyped-def]
        return self.unload()  # the base, without what was trained

    monkeypatch.setattr(peft.tuners.tuners_utils.BaseTuner, "merge_and_unload", merged_wrongly)
    assert run_main("--lora_model", adapters["news"], "--merge", tmp_path / "m") == 2
    assert "is another than the adapter: logits differ by up to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chat", "--serve"], "--chat and --serve exclude each other"),
        (["--output", "x"], "--batch FILE"),
        (["--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--merge", "x", "--load_in_8bit"], "leave out --load_in_8bit"),
        (["--temperature", "9"], "--temperature must be from 0 to 2"),
        (["--batch", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--adapter", "nobody", "--prompt", "x"], "no adapter 'nobody'"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", "\udcff"], "bytes that are not UTF-8"),
        (["--prompt", "x", "--top_p", "0.5"], "without a --temperature above 0"),
        (["--prompt", "x", "--top_k", "5"], "--top_k chooses among sampled tokens"),
        (["--prompt", "x", "--port", "81"], "--port is for --serve"),
        (["--merge", "x", "--system", "y"], "--system is for answers, and --merge gives none"),
        (["--prompt", "x", "--seed", "-1"], "--seed must be from 0 to"),
    ],
)
def test_mistakes_are_one_line(adapters, in_folder, capsys, arguments: list[str], words: str) -> None:
    assert inference_lora.main(["--lora_model", str(adapters["news"]), *arguments, "--device", "cpu"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert words in errors[0]
    assert list(in_folder.iterdir()) == []


def test_a_wrong_base_is_one_line(tiny_models, tmp_path, call_script: RunScript) -> None:
    adapter = make_adapter(tiny_models["qwen3"], tmp_path / "a")
    result = call_script(
        "inference_lora.py", "--base_model", tiny_models["gpt2"], "--lora_model", adapter, "--chat", cwd=tmp_path
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "was trained over qwen3" in result.stderr


def test_bytes_that_are_no_text_cost_the_question_and_not_the_chat(chat_model, adapters, piped) -> None:
    out = piped(b"\xd1\xeb\xd0\xd0\n" + "央行降准\n".encode(), "--lora_model", adapters["news"], "--chat")
    assert "bytes that are not UTF-8" in out
    assert f"you> {chat_model.reply(user('央行降准'), adapter='news', max_new_tokens=6)}" in out


def test_a_temperature_next_to_nothing_is_greedy(adapters, capsys) -> None:
    said = []
    for temperature in ("1e-40", "0"):
        assert run_main("--lora_model", adapters["news"], "--prompt", "x", "--temperature", temperature) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


# ------------------------------------------------------------------------------------------------------------ batch

ROWS = [
    {"prompt": "央行降准"},
    {"instruction": "判断情绪", "input": "美联储加息", "output": "情绪：利空", "kind": "sentiment"},
    {"conversations": [{"from": "human", "value": "什么是降准？"}], "id": "q3"},
    {"messages": [{"role": "system", "content": "简短"}, {"role": "user", "content": "CPI 3.2%"}]},
    {"prompt": "央行降准"},
]


def test_a_batch_answers_every_row_of_any_form(chat_model, adapters, in_folder: Path, capsys) -> None:
    write_jsonl(in_folder / "rows.jsonl", ROWS)
    assert run_main("--lora_model", adapters["news"], "--batch", "rows.jsonl", "--batch_size", "2") == 0
    rows = read_jsonl(in_folder / "rows.answers.jsonl")
    assert [row["prompt"] for row in rows] == [
        "央行降准",
        "判断情绪\n美联储加息",
        "什么是降准？",
        "CPI 3.2%",
        "央行降准",
    ]
    assert len({row["key"] for row in rows}) == 5
    assert rows[2]["key"] == "q3"
    assert rows[1]["expected"] == "情绪：利空"
    assert rows[1]["kind"] == "sentiment"
    assert "expected" not in rows[2]
    for row in rows[:3]:
        alone = chat_model.reply(user(row["prompt"]), adapter="news", max_new_tokens=6)
        assert row["answer"] == alone.strip()
    assert "5 of 5 answers were cut" in capsys.readouterr().err


def test_a_batch_that_was_cut_short_goes_on_where_it_ended(adapters, in_folder: Path, capsys) -> None:
    write_jsonl(in_folder / "rows.jsonl", ROWS)
    command = ["--lora_model", adapters["news"], "--batch", "rows.jsonl", "--output", "out/answers.jsonl"]
    assert run_main(*command) == 0
    output = in_folder / "out" / "answers.jsonl"
    whole = read_jsonl(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:25])  # killed in the middle of a line, inside a character
    capsys.readouterr()
    assert run_main(*command) == 0
    assert "half written" in capsys.readouterr().err
    again = read_jsonl(output)
    assert [(row["key"], row["answer"]) for row in again] == [(row["key"], row["answer"]) for row in whole]
    before = output.read_bytes()
    assert run_main(*command) == 0
    assert "5 of 5 prompts are answered" in capsys.readouterr().out
    assert output.read_bytes() == before
    write_jsonl(in_folder / "rows.jsonl", [*ROWS, {"prompt": "新的"}])
    assert run_main(*command) == 0
    assert len(read_jsonl(output)) == 6


def test_answers_of_two_models_do_not_end_up_in_one_file(adapters, in_folder: Path, capsys) -> None:
    (in_folder / "p.txt").write_text("央行降准\n\n什么是CPI\n", encoding="utf-8")
    assert run_main("--lora_model", adapters["news"], "--batch", "p.txt") == 0
    before = (in_folder / "p.answers.jsonl").read_bytes()
    assert run_main("--lora_model", adapters["reports"], "--batch", "p.txt") == 2
    assert "made otherwise (adapter, weights)" in capsys.readouterr().err
    assert run_main("--lora_model", adapters["news"], "--batch", "p.txt", "--output", "p.txt") == 2
    assert "is the file of prompts" in capsys.readouterr().err
    assert (in_folder / "p.answers.jsonl").read_bytes() == before


def test_a_batch_goes_on_with_the_same_model_and_prompts_alone(tiny_model, in_folder: Path, capsys) -> None:
    adapter = make_adapter(tiny_model, in_folder / "a")
    write_jsonl(in_folder / "rows.jsonl", [{"id": 7, "prompt": "央行降准"}])
    command = ["--lora_model", adapter, "--batch", "rows.jsonl"]
    assert run_main(*command) == 0
    before = (in_folder / "rows.answers.jsonl").read_bytes()
    assert run_main(*command, "--load_in_8bit") == 2
    assert "made otherwise (quantization)" in capsys.readouterr().err
    write_jsonl(in_folder / "rows.jsonl", [{"id": 7, "prompt": "央行加息"}])
    assert run_main(*command) == 2
    assert "answers another prompt under the key '7' than rows.jsonl, row 1, asks" in capsys.readouterr().err
    write_jsonl(in_folder / "rows.jsonl", [{"id": 7, "prompt": "央行降准"}])
    make_adapter(tiny_model, adapter, seed=1)  # trained anew
    assert run_main(*command) == 2
    assert "made otherwise (weights)" in capsys.readouterr().err
    (in_folder / "rows.answers.jsonl").write_text('{"key": 7, "prompt": "x", "made_by": "me"}\n', encoding="utf-8")
    assert run_main(*command) == 2
    assert "line 1 is no answer of --batch" in capsys.readouterr().err
    (in_folder / "rows.answers.jsonl").write_bytes(before)
    make_adapter(tiny_model, adapter)
    assert run_main(*command) == 0


def test_a_prompt_that_does_not_fit_is_told_before_any_is_answered(adapters, in_folder: Path, capsys) -> None:
    write_jsonl(in_folder / "rows.jsonl", [{"prompt": "x"}, {"prompt": "x" * 6000}])
    assert run_main("--lora_model", adapters["news"], "--batch", "rows.jsonl", "--batch_size", "1") == 2
    assert "rows.jsonl, row 2: the prompt has" in capsys.readouterr().err
    assert not (in_folder / "rows.answers.jsonl").exists()


def test_a_row_says_what_of_it_was_left_out_and_keeps_odd_text(adapters, in_folder: Path) -> None:
    turns = [{"role": ("user", "assistant")[index % 2], "content": "问" * 700} for index in range(5)]
    rows = [{"messages": turns}, {"prompt": "x", "note": "\ud800"}]
    (in_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run_main("--lora_model", adapters["news"], "--batch", "rows.jsonl") == 0
    first, second = read_jsonl(in_folder / "rows.answers.jsonl")
    assert first["dropped_messages"] > 0
    assert "dropped_messages" not in second
    assert second["note"] == "\ud800"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', "row 2, prompt"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "row 1, prompt: holds half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000 + "\n", "row 1: not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}\n', "row 2"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', "row 2: not valid JSON"),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}\n', "messages"),
        ("a.jsonl", '{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n', "'1' stands there twice"),
        ("a.json", '"x"', "must hold a list"),
        ("a.txt", "\n\n", "has no prompts"),
    ],
)
def test_a_bad_batch_file_is_told_by_row(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(words)):
        read_prompts(tmp_path / name)


def test_a_line_separator_inside_text_does_not_cut_a_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "一\u2028二"}])
    assert [prompt.messages[-1].content for prompt in read_prompts(tmp_path / "a.jsonl")] == ["一\u2028二"]


# -------------------------------------------------------------------------------------------------- the other scripts


def script_main(repo_root: Path, name: str):  # type: ignore[no-untyped-def]
    """``main`` of a script that is no module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, repo_root / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_demo_answers_a_round_of_questions(adapters, repo_root, capsys) -> None:
    main = script_main(repo_root, "examples/demo.py")
    assert main(["--model_path", str(adapters["news"]), "--mode", "batch", *FAST]) == 0
    assert "[5/5]" in capsys.readouterr().out


def test_the_demo_talks(chat_model, adapters, piped) -> None:
    out = piped("央行降准\n", "--model_path", adapters["news"], "--mode", "interactive", script="examples/demo.py")
    assert f"you> {chat_model.reply(user('央行降准'), adapter='news', max_new_tokens=6)}" in out


def test_base_and_tuned_stand_side_by_side(chat_model, adapters, repo_root, in_folder, capsys) -> None:
    (in_folder / "cases.txt").write_text("什么是CPI\n", encoding="utf-8")
    command = ["--adapter_path", str(adapters["news"]), "--test_cases", "美联储宣布加息25个基点"]
    command += ["--cases_file", "cases.txt", "--output", "answers.json", *FAST]
    assert script_main(repo_root, "scripts/qlora/test_qlora_model.py")(command) == 0
    out = capsys.readouterr().out
    assert "[1/2] 美联储宣布加息25个基点" in out
    assert "base: qwen3" in out
    assert f"tuned:{adapters['news']}" in "".join(out.split())  # a long path is folded
    answers = json.loads((in_folder / "answers.json").read_text(encoding="utf-8"))["answers"]
    asked = [user("分析以下财经快讯对市场的影响\n美联储宣布加息25个基点"), user("什么是CPI")]
    for answer, conversation in zip(answers, asked, strict=True):
        assert answer["base"] == chat_model.reply(conversation, adapter="none", max_new_tokens=6).strip()
        assert answer["tuned"] == chat_model.reply(conversation, adapter="news", max_new_tokens=6).strip()


def test_a_terminal_is_not_told_what_to_do_by_an_answer(capsys) -> None:
    from stocklora.instruct.chat.model import Answer
    from stocklora.instruct.chat.terminal import print_answers

    said = {"base": "c\x1b]0;t\x07d", "tuned": "e\x9bf"}
    print_answers("a\x1b[2Jb", {name: Answer(text, "stop", 1, 1, 1.0) for name, text in said.items()})
    out = capsys.readouterr().out
    assert {"\x1b", "\x07", "\x9b"}.isdisjoint(out)
    assert "a\ufffd[2Jb" in out


@pytest.mark.parametrize(
    ("script", "flag"),
    [("examples/demo.py", "--model_path"), ("scripts/qlora/test_qlora_model.py", "--adapter_path")],
)
def test_a_missing_adapter_names_the_command_that_makes_one(repo_root, in_folder, capsys, script, flag) -> None:
    assert script_main(repo_root, script)([flag, "models/qlora/adapter"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "models/qlora/adapter" in errors[0]
    assert re.search(r"python \S+\.py", errors[0])
