"""Conversations as tokens: what is supervised, how answers end, what pads, by many models' ways of writing a chat."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocklora.cli.console import UserError
from stocklora.instruct.rows.chat_template import (
    IGNORED,
    Encoded,
    encode,
    encode_answers,
    end_token_id,
    end_token_ids,
    fit_embeddings,
    prepare_tokenizer,
    prompt_ids,
)
from stocklora.instruct.rows.formats import Message, Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An empty chain of thought before the last answer, as Qwen3 writes it, and in the invitation if asked for.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# DeepSeek LLM chat: words for roles, and the tokenizer's end token.
PLAIN_ROLES = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }}\n\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
NO_END = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501
# The turn's end is not the tokenizer's end token (Llama 3, Gemma, Qwen's base tokenizer).
OTHER_END = CHATML.replace("<|im_end|>", "<|turn_end|>")
REASONING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def record(*contents: str, system: str | None = None) -> Record:
    messages = [Message("system", system)] if system else []
    messages += [Message("assistant" if place % 2 else "user", text) for place, text in enumerate(contents)]
    return Record(tuple(messages), {}, Path("rows.json"), 7)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return prepare_tokenizer(tiny_model)


def supervised_text(tokenizer: Any, row: Record) -> str:
    encoded = encode(tokenizer, row, None)
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "利好。<|im_end|>"),
        (PLAIN_ROLES, " 利好。<|im_end|>"),
        (NO_SYSTEM, "利好。<|im_end|>"),
        (NO_END, "利好。<|im_end|>"),
        (OTHER_END, "利好。<|turn_end|>"),
        (THINKING, "<think>\n\n</think>\n\n利好。<|im_end|>"),
    ],
)
def test_the_answer_and_its_end_are_supervised_and_nothing_else(tokenizer: Any, template: str, expected: str) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn_end|>"]})
    tokenizer.chat_template = template
    row = record("央行降准", "先说一句。", "情绪？", "利好。", system="你是分析师。")
    encoded = encode(tokenizer, row, None)
    assert supervised_text(tokenizer, row) == expected
    assert encoded.lost_tokens == 0
    # What precedes it is what the model will be asked with, and an earlier answer is context.
    asked = prompt_ids(tokenizer, row.prompt)
    assert encoded.input_ids[: len(asked)] == asked
    assert set(encoded.labels[: len(asked)]) == {IGNORED}
    assert encoded.labels[len(asked) :] == encoded.input_ids[len(asked) :]
    assert "你是分析师。" in tokenizer.decode(asked)
    assert encoded.labels[-1] in end_token_ids(tokenizer)
    assert end_token_id(tokenizer) == encoded.labels[-1]


TALK = ("央行降准", "利好。", "那金价呢？", "也是利好。", "油价？", "中性。")


def supervised_runs(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The texts that the loss is taken on, one for each run of tokens."""
    pairs = zip(encoded.labels, encoded.input_ids, strict=True)
    runs = [list(run) for kept, run in itertools.groupby(pairs, lambda pair: pair[0] != IGNORED) if kept]
    assert all(label == token for run in runs for label, token in run)
    return [tokenizer.decode([token for _, token in run]) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (PLAIN_ROLES, "<|im_end|>"), (NO_SYSTEM, "<|im_end|>"), (OTHER_END, "<|turn_end|>")],
)
def test_every_answer_of_a_conversation_is_learned_in_one_sequence(tokenizer: Any, template: str, end: str) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn_end|>"]})
    tokenizer.chat_template = template
    row = record(*TALK, system="你是分析师。")
    (whole,) = encode_answers(tokenizer, row, None)
    assert whole.input_ids == encode(tokenizer, row, None).input_ids
    assert [text.strip(" ") for text in supervised_runs(tokenizer, whole)] == [answer + end for answer in TALK[1::2]]
    # Each stands behind exactly what the model will have been asked with.
    for place in (2, 4, 6):
        asked = prompt_ids(tokenizer, row.messages[:place])
        assert whole.input_ids[: len(asked)] == asked
        assert whole.labels[len(asked) - 1] == IGNORED
        assert whole.labels[len(asked)] == whole.input_ids[len(asked)]


@pytest.mark.parametrize("template", [THINKING, NO_END])
def test_an_answer_that_is_written_otherwise_once_others_follow_gets_a_sequence_of_its_own(
    tokenizer: Any, template: str
) -> None:
    tokenizer.chat_template = template
    row = record(*TALK)
    sequences = encode_answers(tokenizer, row, None)
    thought = "<think>\n\n</think>\n\n" if template == THINKING else ""
    expected = [[f"{thought}{answer}<|im_end|>"] for answer in TALK[1::2]]
    assert [supervised_runs(tokenizer, sequence) for sequence in sequences] == expected
    for place, sequence in zip((1, 3, 5), sequences, strict=True):
        asked = prompt_ids(tokenizer, row.messages[:place])
        assert sequence.input_ids[: len(asked)] == asked


def test_a_row_of_one_answer_is_one_sequence(tokenizer: Any) -> None:
    row = record("问", "答")
    assert encode_answers(tokenizer, row, 9) == [encode(tokenizer, row, 9)]


def test_a_long_conversation_is_cut_and_what_is_left_of_it_is_learned(tokenizer: Any) -> None:
    row = record(*TALK)
    (whole,) = encode_answers(tokenizer, row, None)
    before_the_last = len(prompt_ids(tokenizer, row.prompt))
    (cut,) = encode_answers(tokenizer, row, before_the_last)
    assert cut.lost_tokens == len(whole.input_ids) - before_the_last
    assert supervised_runs(tokenizer, cut) == [f"{answer}<|im_end|>" for answer in TALK[1:4:2]]
    assert encode(tokenizer, row, before_the_last).supervised == 0


def test_a_model_asked_without_thinking_finds_itself_where_it_was_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    row = record("情绪？", "利好。")
    asked = prompt_ids(tokenizer, row.prompt, thinking=False)
    assert encode(tokenizer, row, None).input_ids[: len(asked)] == asked


@given(answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_answer_is_supervised_whole(tiny_model: Path, answer: str) -> None:
    tokenizer = CACHE.setdefault("tokenizer", prepare_tokenizer(tiny_model) if not CACHE else None)
    row = record("问", answer)
    assert supervised_text(tokenizer, row) == answer + "<|im_end|>"
    asked = prompt_ids(tokenizer, row.prompt)
    assert encode(tokenizer, row, None).input_ids[: len(asked)] == asked


CACHE: dict[str, Any] = {}


def test_a_template_that_invites_in_other_words_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = REASONING
    with pytest.raises(UserError, match=r"rows.json, row 7: the model's chat template .* take an instruct model"):
        encode(tokenizer, record("问", "答"), None)


def test_what_is_cut_is_counted(tokenizer: Any) -> None:
    row = record("问", "很长的回答" * 10)
    whole = encode(tokenizer, row, None)
    cut = encode(tokenizer, row, len(whole.input_ids) - 5)
    assert (cut.lost_tokens, len(cut.input_ids), len(cut.labels)) == (5, len(cut.labels), len(whole.labels) - 5)
    assert cut.supervised == whole.supervised - 5
    assert encode(tokenizer, row, 4).supervised == 0


def resaved(folder: Path, into: Path, **changes: Any) -> Path:
    """A copy of a model folder whose tokenizer differs."""
    shutil.copytree(folder, into)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(into)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(into)
    return into


def test_padding_is_never_the_end(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer(resaved(tiny_model, tmp_path / "m", pad_token="<|im_end|>"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in end_token_ids(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert prepare_tokenizer(tmp_path / "saved").pad_token == "<|endoftext|>"


def test_padding_is_not_the_turns_end_either(tiny_model: Path, tmp_path: Path) -> None:
    folder = resaved(
        tiny_model, tmp_path / "m", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        chat_template=CHATML.replace("<|im_end|>", "<|endoftext|>"),
    )  # fmt: skip
    tokenizer = prepare_tokenizer(folder)
    assert end_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert tokenizer.pad_token_id not in end_token_ids(tokenizer)


def test_a_token_is_added_where_there_is_none_to_spare(tiny_model: Path, tmp_path: Path) -> None:
    folder = resaved(
        tiny_model, tmp_path / "m", pad_token="<|im_end|>",
        chat_template=CHATML.replace("<|im_start|>", "<|endoftext|>").replace("<|im_end|>\n", "<|im_end|>"),
    )  # fmt: skip
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|endoftext|>", "<|role|>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = prepare_tokenizer(folder)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.get_input_embeddings().weight.shape[0]
    added = fit_embeddings(model, tokenizer)
    assert added == len(tokenizer) - before == 1
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert fit_embeddings(model, tokenizer) == 0


def test_a_model_with_rows_to_spare_is_not_resized(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert fit_embeddings(model, prepare_tokenizer(tiny_model)) == 0


def test_a_base_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    with pytest.raises(UserError, match="has no chat template.*instruct"):
        prepare_tokenizer(folder)
    with pytest.raises(UserError, match="no model folder"):
        prepare_tokenizer(tmp_path / "nowhere")
