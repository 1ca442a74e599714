"""Silence of libraries, so that a run shows our own lines alone. Standard library only at the top."""

from __future__ import annotations

import logging
import warnings


def quiet_transformers() -> None:
    """No loading bars, no advice on kernels for 4-bit inference alone, no notices about names of the future."""
    # bitsandbytes speaks while it is imported, so its logger is told before.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
