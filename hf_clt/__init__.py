"""Cross-layer transcoders, the Hugging Face way: a `PreTrainedModel`, an Accelerate loop, safetensors on the Hub."""

import importlib.metadata

from transformers import AutoConfig, AutoModel

from .configuration_clt import CLTConfig
from .harvest.buffer import ActivationBuffer
from .modeling_clt import CLTOutput, CrossLayerTranscoder
from .training.arguments import CLTTrainingArguments
from .training.trainer import CLTTrainer


AutoConfig.register(CLTConfig.model_type, CLTConfig)
AutoModel.register(CLTConfig, CrossLayerTranscoder)

__version__ = importlib.metadata.version("hf_clt")

__all__ = [
    "__version__",
    "ActivationBuffer",
    "CLTConfig",
    "CLTOutput",
    "CLTTrainer",
    "CLTTrainingArguments",
    "CrossLayerTranscoder",
]
