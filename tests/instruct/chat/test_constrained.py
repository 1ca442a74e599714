"""Answers in a form that cannot be wrong: random models, which know nothing of JSON, answer in it all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chat_models import make_adapter, read_jsonl, user, write_jsonl

import inference_lora
from stocklora.cli.console import UserError
from stocklora.instruct.chat.constrained import form_of_schema, read_schema, schema_names
from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.chat.model import ChatModel, Question, Sampling
from stocklora.instruct.chat.tool_calls import call_format
from stocklora.instruct.evaluation.scoring import parse_object
from stocklora.instruct.news.dataset import InstructionSettings, build_dataset

NESTED = {
    "type": "object",
    "properties": {
        "事件": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "名称": {"type": "string", "minLength": 2},
                    "方向": {"enum": ["上涨", "下跌", "持平"]},
                    "幅度": {"type": "number"},
                    "备注": {"type": ["string", "null"]},
                },
                "required": ["名称", "方向", "幅度", "备注"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["事件"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "children"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: dict[str, dict[str, Any]] = {"nested": NESTED, "tree": TREE, "any object": {"type": "object"}} | {
    name: read_schema(name) for name in schema_names()
}


@pytest.fixture(scope="module")
def chat_model(tiny_models: dict[str, Path]) -> ChatModel:
    return load_chat_model(tiny_models["shallow_qwen3"], device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 0.0) for name in SCHEMAS), ("nested", 1.5), ("tree", 1.5), ("risk", 1.0)]
)
def test_every_answer_parses_and_fits_its_schema_wherever_it_is_cut(
    chat_model: ChatModel, name: str, temperature: float
) -> None:
    schema, form = SCHEMAS[name], form_of_schema(SCHEMAS[name])
    asked = [Question(user(text), form=form) for text in ("美联储宣布加息25个基点", "{" * 50)]
    for most in (180, 260):
        sampling = Sampling(max_new_tokens=most, temperature=temperature, seed=most)
        for answer in chat_model.answers(asked, sampling=sampling):
            jsonschema.validate(json.loads(answer.text), schema)
            assert answer.finish == "stop"
            assert answer.new_tokens <= most


def test_a_limit_that_no_answer_of_the_form_meets_is_told(chat_model: ChatModel) -> None:
    with pytest.raises(UserError, match="does not fit into 24 tokens"):
        chat_model.answer(Question(user("x"), form=form_of_schema(NESTED)), sampling=Sampling(max_new_tokens=24))


def test_one_answer_is_that_of_the_batch_and_free_ones_beside_it_stay_free(chat_model: ChatModel) -> None:
    form, sampling = form_of_schema(NESTED), Sampling(max_new_tokens=120)
    held, free = Question(user("央行降准"), form=form), Question(user("央行降准"))
    both = chat_model.answers([held, free], sampling=sampling)
    assert both[0].text == chat_model.answer(held, sampling=sampling).text
    assert both[1].text == chat_model.answer(free, sampling=sampling).text
    assert parse_object(both[0].text) is not None
    assert parse_object(both[1].text) is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"$ref": "https://example.com/s.json"}, "does not fetch"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        form_of_schema(schema)


def test_the_answers_of_the_data_sets_fit_the_shipped_schemas() -> None:
    of_kind = {"extraction": "market_reaction", "release_extraction": "release"}
    labels = {"sentiment": ("sentiment", "情绪"), "risk": ("risk", "风险等级"), "indicator": ("indicator", "结果")}
    seen = set()
    for record in build_dataset(InstructionSettings()).records:
        kind = record.meta["kind"]
        if kind in of_kind:
            jsonschema.validate(json.loads(record.answer), SCHEMAS[of_kind[kind]])
        elif kind in labels:
            name, field = labels[kind]
            assert record.meta["label"] in SCHEMAS[name]["properties"][field]["enum"]
        seen.add(kind)
    assert {*of_kind, *labels} <= seen


def test_the_script_answers_prompts_and_files_in_the_form(tiny_model: Path, tmp_path: Path, capsys) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(NESTED), encoding="utf-8")
    model = ["--base_model", str(tiny_model), "--lora_model", str(adapter), "--device", "cpu", "--dtype", "float32"]
    assert inference_lora.main([*model, "--prompt", "央行降准", "--json_schema", str(schema)]) == 0
    said = capsys.readouterr().out
    jsonschema.validate(json.loads(said[said.index("{") : said.rindex("}") + 1]), NESTED)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("加息", "降准", "停火")])
    batch = [*model, "--batch", str(prompts), "--output", str(tmp_path / "answers.jsonl"), "--batch_size", "2"]
    assert inference_lora.main([*batch, "--json_schema", "risk"]) == 0
    rows = read_jsonl(tmp_path / "answers.jsonl")
    for row in rows:
        jsonschema.validate(json.loads(row["answer"]), SCHEMAS["risk"])
    capsys.readouterr()
    # Answers of another form do not end up in the same file.
    assert inference_lora.main([*batch, "--json_schema", "sentiment"]) == 2
    assert "made otherwise (json_schema)" in capsys.readouterr().err
    assert inference_lora.main([*batch, "--json_schema", "nothing"]) == 2
    assert "no schema nothing; give a file, or one of: event_extraction" in capsys.readouterr().err


def test_a_template_tells_how_it_writes_calls(chat_model: ChatModel, tiny_model: Path) -> None:
    from stocklora.instruct.rows.chat_template import prepare_tokenizer

    tokenizer = prepare_tokenizer(tiny_model)
    with pytest.raises(UserError, match="no place for tools"):
        call_format(tokenizer)
    head = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    tail = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for written, before, after, key in [
        ('<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>',
         "<tool_call>\n", "\n</tool_call>", "arguments"),
        ('{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}', "", "", "parameters"),
    ]:  # fmt: skip
        calls = "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + written + "{% endfor %}"
        tokenizer.chat_template = head + "{{ m.content }}" + calls + tail
        found = call_format(tokenizer)
        assert (found.before, found.after, found.arguments_key) == (before, after, key)


def test_text_stays_free_until_it_begins_a_call_and_then_the_call_is_held(tiny_model: Path) -> None:
    import torch

    from stocklora.instruct.chat.constrained import FormProcessor
    from stocklora.instruct.chat.tool_calls import calls_in, form_of_calls
    from stocklora.instruct.rows.chat_template import prepare_tokenizer

    tokenizer = prepare_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    parameters = {
        "type": "object", "properties": {"n": {"enum": [7, 8]}}, "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "price", "parameters": parameters}}]
    form = form_of_calls(tokenizer, tools, None, free=True)
    assert form is not None
    rows = len(tokenizer)
    holder = FormProcessor([form], tokenizer, rows=rows, prompt=0, room=200, draws=True)
    draw = torch.Generator().manual_seed(0)
    said = tokenizer("好，查一下：<tool_call>", add_special_tokens=False)["input_ids"]
    ids = torch.empty((1, 0), dtype=torch.long)
    ends: set[int] = set(holder.rows[0].tokens.ends)
    while ids.shape[1] < 200 and not (ids.shape[1] and int(ids[0, -1]) in ends):
        scores = torch.rand((1, rows), generator=draw)
        held = holder(ids, scores)
        place = ids.shape[1]
        if place < len(said):
            assert torch.equal(held, scores)  # free so far
            token = said[place]
        else:
            token = int(held[0].argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    text, (call,) = calls_in(tokenizer.decode(ids[0], skip_special_tokens=True), tokenizer, tools)
    assert text == "好，查一下："
    assert call["function"]["name"] == "price"
    assert json.loads(call["function"]["arguments"])["n"] in (7, 8)
