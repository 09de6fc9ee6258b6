"""Cross-layer transcoders, the Hugging Face way: a `PreTrainedModel`, an Accelerate loop, safetensors on the Hub."""

import importlib
import os


# On a busy machine OpenMP's threads would spin at each barrier for one that is not running, and a step take seven
# times as long. libgomp reads these when torch loads it; what the environment already says stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from transformers import AutoConfig

from .configuration_clt import CLTConfig


AutoConfig.register(CLTConfig.model_type, CLTConfig)

# The rest is imported when it is first asked for, so that a command answers at once.
_ORIGIN = {
    "ActivationBuffer": "harvest.buffer",
    "CLTOutput": "modeling_clt",
    "CLTTrainer": "training.trainer",
    "CLTTrainingArguments": "training.arguments",
    "CrossLayerTranscoder": "modeling_clt",
}


def __getattr__(name: str):
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ORIGIN[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "__version__",
    "ActivationBuffer",
    "CLTConfig",
    "CLTOutput",
    "CLTTrainer",
    "CLTTrainingArguments",
    "CrossLayerTranscoder",
]
