"""Cross-layer transcoders, the Hugging Face way: a `PreTrainedModel`, an Accelerate loop, safetensors on the Hub."""

import importlib.metadata
import os


# On a busy machine OpenMP's threads spin at each barrier for one that is not running, and a step takes three to seven
# times as long. A short spin costs little there, and hardly anything elsewhere (benchmarks/contention.py). libgomp
# reads these when torch loads it; what the environment already says stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "6000")

from transformers import AutoConfig

from .configuration_clt import CLTConfig
from .lazy import lazy_names


AutoConfig.register(CLTConfig.model_type, CLTConfig)

try:
    __version__ = importlib.metadata.version("hf_clt")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path, and no installation
    __version__ = "0+checkout"

__getattr__, __dir__, _lazy = lazy_names(
    __name__,
    {
        "ActivationBuffer": "harvest.buffer",
        "CLTOutput": "modeling_clt",
        "CLTTrainer": "training.trainer",
        "CLTTrainingArguments": "training.arguments",
        "CrossLayerTranscoder": "modeling_clt",
        "Harvester": "harvest.harvester",
        "ReplacementModel": "evaluation.replacement",
        "attribute": "attribution.tracing",
        "evaluate_clt": "evaluation.evaluate",
        "import_clt": "importers",
        "load_language_model": "harvest.harvester",
    },
)

__all__ = ["__version__", "CLTConfig", *_lazy]
