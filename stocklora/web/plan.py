"""The memory that a training run would take, as one types: the arithmetic of ``train_lora.py``'s own table.

torch and the model's configuration take seconds to load, so a process of its own keeps them: a line of settings in, a
line of the plan out. It ends with the server.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stocklora.cli.console import PROJECT, UserError
from stocklora.finetune.settings import TrainLoraSettings
from stocklora.web.scripts import settings_of
from stocklora.web.workspace import Workspace

STARTER = "import sys; sys.path[0] = sys.argv[1]; from stocklora.web.plan import answer; answer(*sys.argv[2:])"


class Planner:
    """Asks the process that plans, which is started when it is first asked.

    Args:
        workspace: that paths belong to.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def plan(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``plan_of``.

        Raises:
            UserError: settings that make no run, or a base model that cannot be read.
        """
        settings_of("train_lora", values, self.workspace)
        with self._turn:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-c", STARTER, str(PROJECT), str(self.workspace.root), str(self.workspace.models)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                    encoding="utf-8", cwd=self.workspace.root, start_new_session=True,
                )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(dict(values)) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
        answer = json.loads(line) if line else {"error": "the memory plan could not be made"}
        if "error" in answer:
            raise UserError(answer["error"])
        plan: dict[str, Any] = answer
        return plan

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()


def answer(root: str, models: str) -> None:
    """Answer lines on standard input until it ends; what libraries print goes nowhere."""
    out, sys.stdout = sys.stdout, sys.stderr
    workspace = Workspace(Path(root), Path(models))
    for line in sys.stdin:
        try:
            result = plan_of(settings_of("train_lora", json.loads(line), workspace), workspace)
        except UserError as error:
            result = {"error": str(error)}
        except Exception as error:  # a configuration that no library understands must not end the planner
            result = {"error": f"the memory plan could not be made: {type(error).__name__}: {error}"[:300]}
        print(json.dumps(result), file=out, flush=True)


def plan_of(settings: TrainLoraSettings, workspace: Workspace) -> dict[str, Any]:
    """What a run is expected to take, with sequences as long as the token budget allows: its data is not read.

    Returns:
        ``tokens`` of a pass, ``free_mb`` (None where unknown), ``parameters``, ``parts`` (MB by name), ``trainable``,
        and ``advice`` where it would not fit.
    """
    from llm_model import facts_of, padded_tokens
    from stocklora.base_models.folders import check_model_folder
    from stocklora.base_models.loading import backbone_config
    from stocklora.base_models.memory import WARN_AT, free_memory_mb
    from stocklora.finetune.memory import Setup, advice, cost_of, shape_of, tokens_of_a_step
    from stocklora.runtime.machine import choose_device, choose_dtype

    settings = replace(settings, model_path=workspace.root / settings.model_path)
    check_model_folder(settings.model_path)
    config = backbone_config(settings.model_path, None, settings.trust_remote_code)
    shape = shape_of(settings, config)
    device = choose_device(settings.device)
    longest = padded_tokens(min(settings.max_tokens_per_sequence, facts_of(config).context_tokens))
    tokens = tokens_of_a_step(settings, device.type, longest, settings.batch_size)
    setup = Setup(
        settings.method, settings.quantization, settings.gradient_checkpointing, settings.lora_rank, settings.use_dora,
        choose_dtype(settings.dtype, device).itemsize, tokens, longest, device.type == "cpu",
        (shape.hidden + 1) * settings.horizon * 9,
    )  # fmt: skip
    cost, free = cost_of(shape, setup), free_memory_mb(device)
    parts = {
        "weights": cost.weights_mb, "state": cost.state_mb, "activations": cost.activations_mb,
        "program": cost.program_mb,
    }  # fmt: skip
    fits = free is None or cost.total_mb <= WARN_AT * free
    return {
        "tokens": tokens, "free_mb": None if free is None else round(free), "parameters": shape.parameters,
        "trainable": cost.trainable, "total_mb": round(cost.total_mb),
        "parts": {name: round(value) for name, value in parts.items()},
        "advice": None if fits else advice(shape, setup, free or 0.0),
    }  # fmt: skip
