"""Real clients against the server: typed answers, tool calls, many at once. Those not installed are skipped."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import uvicorn
from pydantic import BaseModel

from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.chat.model import Sampling
from stocklora.instruct.chat.server import make_app
from stocklora.runtime.machine import HOST, listen

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED: Any = [{"role": "user", "content": "央行降准50个基点"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"enum": ["A", "B"]}},
                "required": [key],
                "additionalProperties": False,
            },
        },
    }
    for name, key in (("price", "ticker"), ("news", "topic"))
]


class Reading(BaseModel):
    """What a news item says."""

    sentiment: Literal["利好", "利空", "中性"]
    rate_hike: bool
    basis_points: int


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a thread, of a random model whose chat template writes calls as Qwen's does."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    model = load_chat_model(folder, device="cpu", dtype="float32")
    listener = listen(0)
    server = uvicorn.Server(uvicorn.Config(make_app(model, Sampling(max_new_tokens=200)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://{HOST}:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=60)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of the client, which gives back its own `parsed`
def test_openai_parses_a_typed_answer(client: openai.OpenAI) -> None:
    for temperature in (0.0, 1.5):
        parsed = client.chat.completions.parse(
            model="tiny", messages=ASKED, response_format=Reading, temperature=temperature, seed=1
        )
        assert isinstance(parsed.choices[0].message.parsed, Reading)
    answer = client.chat.completions.create(model="tiny", messages=ASKED, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    # An answer that comes back as it was given, and the schema where llama.cpp has it.
    again = [*ASKED, parsed.choices[0].message, *ASKED]
    as_object: Any = {"type": "json_object", "schema": Reading.model_json_schema()}
    answer = client.chat.completions.create(model="tiny", messages=again, response_format=as_object)
    Reading.model_validate_json(answer.choices[0].message.content)
    guided = client.chat.completions.create(
        model="tiny", messages=ASKED, extra_body={"guided_json": Reading.model_json_schema(), "top_k": 5}
    )
    Reading.model_validate_json(guided.choices[0].message.content)


def test_an_answer_that_was_closed_at_its_limit_says_so(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string", "minLength": 20}}, "required": ["text"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=ASKED, response_format=form, max_tokens=60)
    json.loads(answer.choices[0].message.content)
    assert answer.choices[0].model_extra["closed_at_limit"] is True
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="tiny", messages=ASKED, response_format=form, max_tokens=60, stream=True
        )
    )
    assert streamed == answer.choices[0].message.content


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"price", "news"}), ({"type": "function", "function": {"name": "news"}}, {"news"})],
)
def test_tools_are_called_with_arguments_that_fit(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, tool_choice=choice)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name in names
    assert set(json.loads(call.function.arguments).values()) <= {"A", "B"}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, tool_choice=choice, stream=True)
    )
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert [delta.function.arguments for delta in deltas] == [call.function.arguments]
    # The function's result goes back, and is answered in words.
    talk = [*ASKED, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "101.5"}]
    said = client.chat.completions.create(model="tiny", messages=talk, tools=TOOLS, tool_choice="none", max_tokens=5)
    assert said.choices[0].message.tool_calls is None


def test_leading_system_messages_are_one_and_names_of_no_tool_are_refused(client: openai.OpenAI) -> None:
    two: Any = [{"role": "system", "content": "甲"}, {"role": "developer", "content": "乙"}, *ASKED]
    one: Any = [{"role": "system", "content": "甲\n\n乙"}, *ASKED]
    texts = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message.content
        for messages in (two, one)
    ]
    assert texts[0] == texts[1]
    with pytest.raises(openai.BadRequestError, match="name one of tools: price, news"):
        client.chat.completions.create(
            model="tiny", messages=ASKED, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}
        )


def test_eight_clients_forty_requests_some_leaving_midway(url: str, client: openai.OpenAI) -> None:
    """Nothing lost, nothing crossed: each answer is the one that its question gets alone."""
    questions = [f"第{number}条：{'降准' * (number % 5 + 1)}" for number in range(40)]

    def ask(number: int) -> str | None:
        messages: Any = [{"role": "user", "content": questions[number]}]
        if number % 5 == 4:  # leaves after the first piece
            with client.chat.completions.create(model="tiny", messages=messages, max_tokens=200, stream=True) as stream:
                next(iter(stream))
            return None
        if number % 2:
            stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert answers.count(None) == 8
    for number, answer in enumerate(answers):
        if answer is not None:
            assert answer == ask(number)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and httpx.get(url.replace("/v1", "/health")).status_code != 200:
        time.sleep(0.1)
    assert ask(0) == answers[0]  # those that left hold nothing up


def test_langchain_gets_structured_answers_and_calls(url: str) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(base_url=url, api_key="-", model="tiny", temperature=0, max_retries=0)
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Reading, method=method).invoke("央行降准"), Reading)
    called = model.bind_tools(TOOLS, tool_choice="price").invoke("央行降准")
    assert called.tool_calls[0]["name"] == "price"


NODE = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2], apiKey: "-", maxRetries: 0});
const schema = {type: "object", properties: {n: {type: "integer"}}, required: ["n"], additionalProperties: false};
const messages = [{role: "user", content: "央行降准"}];
const form = {type: "json_schema", json_schema: {name: "x", schema}};
const one = await client.chat.completions.create({model: "tiny", messages, response_format: form});
let text = "";
for await (const chunk of await client.chat.completions.create({model: "tiny", messages, max_tokens: 8, stream: true}))
  text += chunk.choices[0]?.delta?.content ?? "";
const whole = await client.chat.completions.create({model: "tiny", messages, max_tokens: 8});
console.log(JSON.stringify({whole: Number.isInteger(JSON.parse(one.choices[0].message.content).n),
                            same: text === whole.choices[0].message.content}));
"""


@pytest.mark.slow
def test_the_javascript_client_reads_answers_and_streams(url: str, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node is not here")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai"]
    try:
        done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install openai within two minutes")
    if done.returncode:
        pytest.skip(f"npm cannot install openai: {done.stderr.strip()[-120:]}")
    (tmp_path / "ask.mjs").write_text(NODE, encoding="utf-8")
    ran = subprocess.run(
        [node, "ask.mjs", url], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"whole": True, "same": True}
