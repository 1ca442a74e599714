"""Use a tuned chat model: a chat, single prompts, whole files, a merged model, or an OpenAI-compatible server.

    python inference_lora.py --base_model ./models/Qwen2.5-0.5B-Instruct --lora_model ./output_qwen_lora
    python inference_lora.py --base_model ./models/Qwen2.5-0.5B-Instruct --lora_model ./output_qwen_qlora --load_in_4bit
    python inference_lora.py --base_model ./models/Qwen2.5-0.5B-Instruct --lora_model ./output_qwen_lora --chat
    python inference_lora.py --lora_model news=./output_news reports=./output_reports --chat
    python inference_lora.py --lora_model ./output_qwen_lora --prompt "美联储宣布加息25个基点，影响如何？"
    python inference_lora.py --lora_model ./output_qwen_lora --batch prompts.jsonl --output answers.jsonl
    python inference_lora.py --lora_model ./output_qwen_lora --prompt "美联储宣布加息25个基点" --json_schema sentiment
    python inference_lora.py --lora_model ./output_qwen_lora --merge ./merged
    python inference_lora.py --lora_model ./output_qwen_lora --serve --port 8000

Without --chat, --prompt, --batch, --merge or --serve it answers a few questions of its own, or what comes through a
pipe. --base_model may be left out: an adapter names the base that it was trained over. Folders of fully tuned models
are given to --lora_model as well. In a chat /adapter NAME changes the adapter, and /adapter none asks the base.
Answers are greedy, so the same each time, unless --temperature is above 0. With --json_schema every answer is JSON that
fits the schema, whatever the model would have said.
"""

from __future__ import annotations

import os
import sys

from stocklora.cli.console import UserError
from stocklora.cli.settings import SERVER, SettingsParser, check_installed
from stocklora.instruct.chat.settings import InferenceSettings


def build_parser() -> SettingsParser:
    return SettingsParser("inference_lora.py", __doc__, InferenceSettings)


def main(argv: list[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(settings: InferenceSettings) -> None:
    settings.check()
    from stocklora.instruct.chat.sources import find_sources

    sources = find_sources(settings.base_model, settings.lora_model, settings.any_base)  # before seconds of imports
    if settings.batch is not None and not settings.batch.is_file():
        raise UserError(f"no file {settings.batch} with prompts; write one a line, or JSON lines with a prompt each")
    if settings.merge is not None:
        from stocklora.instruct.chat.merge import merge_adapter

        merge_adapter(sources, settings)
        return
    schema = None
    if settings.json_schema is not None:
        from stocklora.instruct.chat.constrained import form_of_schema, read_schema

        schema = read_schema(settings.json_schema)
        form_of_schema(schema, f"--json_schema {settings.json_schema}")  # refused before the model is loaded
    listener = None
    if settings.serve:
        from stocklora.runtime.machine import listen

        check_installed(SERVER, "--serve")
        from stocklora.instruct.chat.door import Entrance, check_entrance

        key = settings.api_key or os.environ.get("STOCKLORA_API_KEY") or None
        check_entrance(settings.host, key)
        entrance = Entrance(settings.host, key, tuple(settings.server_names))
        listener = listen(settings.port, settings.host)

    from stocklora.instruct.chat.load import load_sources
    from stocklora.instruct.chat.model import Sampling

    model = load_sources(sources, settings)
    adapter, sampling = model.adapter_or_base(settings.adapter), Sampling.of(settings)
    if listener is not None:
        from stocklora.instruct.chat.server import serve

        serve(model, listener, sampling, adapter, settings.system, entrance)
    elif settings.batch is not None:
        from stocklora.instruct.chat.batch import run_batch

        run_batch(model, settings, adapter, sampling, schema)
    else:
        from stocklora.instruct.chat.terminal import talk

        talk(model, settings, adapter, sampling, schema)


if __name__ == "__main__":
    sys.exit(main())
