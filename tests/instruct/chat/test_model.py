"""Chat models: adapters by name, answers alike however they are made, stops, history, and what does not fit."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from chat_models import make_adapter, user

from stocklora.cli.console import UserError
from stocklora.instruct.chat.load import load_chat_model
from stocklora.instruct.chat.model import ChatModel, ContextError, Sampling
from stocklora.instruct.chat.sources import BASE, find_sources
from stocklora.instruct.chat.text_stream import TextStream, without_reasoning
from stocklora.instruct.rows.chat_template import end_token_id
from stocklora.instruct.rows.formats import Message

SHORT = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def chat_model(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory) -> ChatModel:
    base, folder = tiny_models[request.param], tmp_path_factory.mktemp(request.param)
    adapters = {name: make_adapter(base, folder / str(seed), seed) for seed, name in enumerate(["新闻", "v1.5"])}
    return load_chat_model(base, adapters, dtype="float32", device="cpu")


def test_each_adapter_speaks_for_itself_and_none_is_the_base(chat_model: ChatModel, tiny_models) -> None:
    asked = user("央行降准50个基点")
    answers = {name: chat_model.reply(asked, adapter=name, max_new_tokens=16) for name in ["新闻", "v1.5", BASE]}
    assert len(set(answers.values())) == 3
    assert chat_model.reply(asked, max_new_tokens=16) == answers["新闻"]  # the first is the default
    alone = load_chat_model(tiny_models[chat_model.base_name], dtype="float32", device="cpu")
    assert alone.reply(asked, max_new_tokens=16) == answers[BASE]
    # In any order, so that none leaves a trace.
    for name in ["v1.5", BASE, "新闻", "v1.5"]:
        assert chat_model.reply(asked, adapter=name, max_new_tokens=16) == answers[name]


def test_the_pieces_of_an_answer_are_the_answer(chat_model: ChatModel) -> None:
    asked = user("美联储加息")
    for name in ("新闻", BASE):
        pieces: list[str] = []
        chat_model.answer(asked, adapter=name, sampling=SHORT, on_text=pieces.append)
        assert "".join(pieces) == chat_model.reply(asked, adapter=name, max_new_tokens=16)
        assert all(pieces)


def test_batched_greedy_answers_are_those_of_single_questions(chat_model: ChatModel) -> None:
    conversations = [user("x"), user("什么是降准？" * 8), user("CPI 3.2%", "好", "再说一遍"), user("hello there")]
    single = [chat_model.answer(conversation, sampling=SHORT) for conversation in conversations]
    together = chat_model.answers(conversations, sampling=SHORT)
    for one, other in zip(single, together, strict=True):
        assert (one.text, one.finish, one.new_tokens, one.prompt_tokens) == (
            other.text, other.finish, other.new_tokens, other.prompt_tokens,
        )  # fmt: skip


def test_a_long_question_does_not_cut_the_answers_beside_it(chat_model: ChatModel) -> None:
    long = user("x" * (chat_model.context_tokens - 40))
    conversations = [user("x"), long, user("hello there")]
    asked = Sampling(max_new_tokens=60)
    together = chat_model.answers(conversations, sampling=asked)
    single = [chat_model.answer(conversation, sampling=asked) for conversation in conversations]
    assert [item.text for item in together] == [item.text for item in single]
    assert together[1].new_tokens < 40


def test_an_answer_ends_at_the_end_token_and_does_not_show_it(chat_model: ChatModel) -> None:
    tokenizer = chat_model.tokenizer()
    end = end_token_id(tokenizer)
    head = chat_model.model.get_output_embeddings()
    calls = iter(range(1000))

    def say_two_then_end(module, inputs, output):  # type: ignore[no-untyped-def]
        token = 70 if next(calls) < 2 else end
        forced = torch.full_like(output, -1e4)
        forced[..., token] = 0.0
        return forced

    hook = head.register_forward_hook(say_two_then_end)
    try:
        answer = chat_model.answer(user("hi"), sampling=SHORT)
        calls = iter(range(1000))
        batched = chat_model.answers([user("hi"), user("hello")], sampling=SHORT)
    finally:
        hook.remove()
    assert answer.finish == "stop"
    assert answer.new_tokens == 3
    assert answer.text == tokenizer.decode([70, 70])
    assert [item.text for item in batched] == [answer.text] * 2
    assert [item.finish for item in batched] == ["stop"] * 2


def test_cancelling_ends_an_answer_soon(chat_model: ChatModel) -> None:
    seen: list[str] = []
    answer = chat_model.answer(
        user("hi"), sampling=Sampling(max_new_tokens=500), on_text=seen.append, cancelled=lambda: len(seen) >= 2
    )
    assert answer.finish == "cancelled"
    assert answer.new_tokens < 60


def test_seeds_repeat_samples_and_leave_other_random_numbers_alone(chat_model: ChatModel) -> None:
    def sampled(seed: int) -> str:
        return chat_model.reply(user("hi"), temperature=1.5, seed=seed, max_new_tokens=12)

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = sampled(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sampled(3) == first
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_threads_do_not_mix_adapters(chat_model: ChatModel) -> None:
    names = ["新闻", "v1.5", BASE]
    alone = {name: chat_model.reply(user("hi"), adapter=name, max_new_tokens=8) for name in names}
    found: list[tuple[str, str]] = []
    threads = [
        threading.Thread(
            target=lambda name=name: found.append((name, chat_model.reply(user("hi"), adapter=name, max_new_tokens=8)))
        )
        for name in names * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(text == alone[name] for name, text in found)


def test_the_oldest_turns_make_room_and_the_system_message_stays(chat_model: ChatModel) -> None:
    tokenizer = chat_model.tokenizer()
    turns = user(*[f"{'问' if index % 2 == 0 else '答'}{index:03d}" * 40 for index in range(41)])
    messages = [Message("system", "只用中文回答"), *turns]
    ids, dropped, room = chat_model.fitted(messages, tokenizer, 100)
    assert room == 100
    assert len(ids) + room <= chat_model.context_tokens
    assert dropped > 0
    assert dropped % 2 == 0  # whole turns, so that a question comes first
    text = tokenizer.decode(ids)
    assert "只用中文回答" in text
    assert turns[-1].content in text
    assert turns[dropped].content in text
    assert dropped == 0 or turns[dropped - 1].content not in text
    assert chat_model.answer(messages, sampling=Sampling(max_new_tokens=2)).dropped_messages > 0
    with pytest.raises(ContextError, match="context"):
        chat_model.fitted(messages, tokenizer, 100_000, cut_history=False)
    with pytest.raises(ContextError, match="shorten"):
        chat_model.reply(user("x" * 20_000))


def test_a_question_that_leaves_little_room_gets_a_short_answer(chat_model: ChatModel) -> None:
    asked = user("x" * (chat_model.context_tokens - 40))
    ids, _, room = chat_model.fitted(asked, chat_model.tokenizer(), 500)
    assert 0 < room < 40
    assert len(ids) + room == chat_model.context_tokens
    assert chat_model.answer(asked, sampling=Sampling(max_new_tokens=500)).new_tokens <= room


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapters_work_over_a_quantized_base(tiny_model: Path, tmp_path: Path, quantization: str) -> None:
    adapters = {str(seed): make_adapter(tiny_model, tmp_path / str(seed), seed) for seed in range(2)}
    model = load_chat_model(tiny_model, adapters, quantization=quantization, dtype="float32", device="cpu")
    answers = [model.reply(user("你好"), adapter=name, max_new_tokens=12) for name in ["0", "1", BASE, "0"]]
    assert len(set(answers)) == 3
    assert answers[0] == answers[3]
    batched = model.answers([user("你好"), user("什么是降准？" * 5)], adapter="0", sampling=Sampling(max_new_tokens=12))
    assert batched[0].text == answers[0]


def test_an_adapter_of_another_shape_is_one_line(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny_models["gpt2"], tmp_path / "a")
    with pytest.raises(UserError, match="'a' in .* does not fit the base"):
        load_chat_model(tiny_models["llama"], {"a": adapter})


def test_an_adapter_of_a_smaller_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model)
    config.num_hidden_layers = 3
    config.layer_types = [*config.layer_types, config.layer_types[-1]]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deeper")
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, tmp_path / "deeper")
    shutil.copy(tiny_model / "chat_template.jinja", tmp_path / "deeper")
    # By suffix, so that the third layer's modules match as well, and their weights are missing.
    adapter = make_adapter(tiny_model, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match="no counterpart"):
        load_chat_model(tmp_path / "deeper", {"a": adapter})


# ------------------------------------------------------------------------------------------------------ which folders


def test_an_adapter_names_its_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "a", info={"base_model": {"path": str(tiny_model), "name": "qwen3"}})
    sources = find_sources(None, [str(adapter)])
    assert sources.base == tiny_model
    assert list(sources.adapters) == ["a"]
    checkpoint = make_adapter(tiny_model, adapter / "checkpoint-5")
    assert find_sources(None, [str(checkpoint)]).base == tiny_model
    (adapter / "training_info.json").unlink()
    assert find_sources(None, [f"mine={adapter}"]).base == tiny_model  # PEFT noted it as well


def test_a_base_under_another_name_is_refused_unless_told(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_models["qwen3"]
    info = {"base_model": {"path": "elsewhere/Qwen2.5-0.5B-Instruct", "name": "Qwen/Qwen2.5-0.5B-Instruct"}}
    adapter = make_adapter(base, tmp_path / "a", info=info)
    with pytest.raises(UserError, match=r"trained over Qwen/Qwen2.5-0.5B-Instruct, and .* add --any_base"):
        find_sources(base, [str(adapter)])
    assert find_sources(base, [str(adapter)], any_base=True).base == base
    with pytest.raises(UserError, match="is not here; give --base_model"):
        find_sources(None, [str(adapter)])


def test_a_base_that_is_not_here_is_fetched_by_its_hub_name(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "deepseek-ai/deepseek-llm-7b-chat"
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="download_model.py --model deepseek-ai/deepseek-llm-7b-chat --save_dir models"):
        find_sources(None, [str(adapter)])


def test_an_adapter_in_the_older_file_format_loads(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    new = make_adapter(tiny_model, tmp_path / "new")
    old = make_adapter(tiny_model, tmp_path / "old", seed=1)
    (old / "adapter_model.safetensors").unlink()
    torch.save(load_file(new / "adapter_model.safetensors"), old / "adapter_model.bin")
    answers = [
        load_chat_model(find_sources(None, [str(folder)]).base, {"a": folder}, dtype="float32").reply(
            user("你好"), max_new_tokens=12
        )
        for folder in (new, old)
    ]
    assert answers[0] == answers[1]


def test_a_base_is_known_by_its_last_name_on_any_system(tiny_model: Path, tmp_path: Path) -> None:
    info = {"base_model": {"path": "C:\\models\\qwen3"}}
    adapter = make_adapter(tiny_model, tmp_path / "a", info=info)
    assert find_sources(tiny_model, [str(adapter)]).base == tiny_model


def test_a_base_of_another_configuration_is_refused_in_any_case(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from stocklora.base_models.folders import describe_model

    info = {"base_model": {"path": str(tiny_models["qwen3"]), **describe_model(tiny_models["qwen3"])}}
    adapter = make_adapter(tiny_models["qwen3"], tmp_path / "a", info=info)
    with pytest.raises(UserError, match="another model"):
        find_sources(tiny_models["llama"], [str(adapter)], any_base=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nowhere"], "no adapter folder nowhere; train one"),
        (["{a}", "{a}"], "two adapters are called 'a'"),
        (["none={a}"], "is what the base model is called"),
        (["{a}", "{model}"], "is a whole model, not an adapter"),
        (["{empty}"], "neither an adapter .* nor a model"),
        (["{half}"], "no adapter_model.safetensors"),
        (["{cut}"], "the adapter in .*cut is not whole: adapter_model.safetensors has"),
        (["{parent}"], "there is a checkpoint in it: .*checkpoint-12"),
    ],
)
def test_wrong_folders_are_told(tiny_model: Path, tmp_path: Path, given: list[str], words: str) -> None:
    names = {name: tmp_path / name for name in ("a", "empty", "half", "parent", "cut")}
    make_adapter(tiny_model, names["a"])
    weights = make_adapter(tiny_model, names["cut"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    names["empty"].mkdir()
    names["half"].mkdir()
    (names["half"] / "adapter_config.json").write_text("{}")
    for step in (4, 12):
        (names["parent"] / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        find_sources(None, [text.format(model=tiny_model, **names) for text in given])


def test_a_whole_model_needs_no_base(tiny_model: Path) -> None:
    assert find_sources(None, [str(tiny_model)]).adapters == {}
    assert find_sources(tiny_model, [str(tiny_model)]).base == tiny_model
    assert find_sources(tiny_model, []).base_name == tiny_model.name
    with pytest.raises(UserError, match="give --lora_model FOLDER, --base_model FOLDER, or both"):
        find_sources(None, [])
    with pytest.raises(UserError, match=r"no model at nowhere; run: python download_model.py"):
        find_sources(Path("nowhere"), [])


def test_weights_of_other_shapes_than_the_configuration_says_are_one_line(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"hidden_size": 16}), encoding="utf-8")
    with pytest.raises(UserError, match="cannot load the weights of the base model in"):
        load_chat_model(tmp_path / "m", dtype="float32", device="cpu")


def test_a_damaged_adapter_in_the_older_format_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"no weights")
    with pytest.raises(UserError, match="'a' in"):
        load_chat_model(tiny_model, {"a": adapter}, dtype="float32", device="cpu")


# ------------------------------------------------------------------------------------------------------------- text


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("stops", [[], ["止"], ["价格", "格局"]])
@pytest.mark.parametrize(
    "text", ["情绪：利好。💹 ok", "股票价值与价格止步", "价", "", "<think>\n\n</think>\n\n利好", "<think>a</think>利好"]
)
def test_text_comes_in_whole_characters_and_stops_before_a_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(Letters(), stops)
    pieces = [stream.push(byte) for byte in text.encode()] + [stream.finish()]
    assert "\ufffd" not in "".join(pieces)
    expected = text.removeprefix("<think>\n\n</think>\n\n")
    places = [expected.find(stop) for stop in stops if stop in expected]
    assert "".join(pieces) == stream.text == (expected[: min(places)] if places else expected)


def test_half_a_character_at_the_end_is_not_lost_silently() -> None:
    stream = TextStream(Letters())
    for byte in "利好".encode()[:-1]:
        stream.push(byte)
    stream.finish()
    assert stream.text == "利\ufffd"


def test_reasoning_is_no_part_of_an_answer() -> None:
    assert without_reasoning("<think>先想\n想</think>\n\n情绪：利好 ") == "情绪：利好"
    assert without_reasoning("情绪：利好") == "情绪：利好"


# ------------------------------------------------------------------------------------------------------- a real model


@pytest.mark.slow
def test_smollm2_answers_and_stops_by_itself(smollm2: Path) -> None:
    model = load_chat_model(smollm2, dtype="float32", device="cpu")
    asked = [user("What is the capital of France? Answer in one word."), user("Say hello to Anna and nothing else.")]
    single = [model.answer(conversation, sampling=Sampling(max_new_tokens=40)) for conversation in asked]
    assert "Paris" in single[0].text
    assert single[0].finish == "stop"
    assert [item.text for item in model.answers(asked, sampling=Sampling(max_new_tokens=40))] == [
        item.text for item in single
    ]
