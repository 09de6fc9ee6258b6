"""What several tests share: a tiny language model, real text, and no network."""

import os


# Before any import that reads them. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pydoc_data.topics import topics

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


# Opening a local file makes datasets tell the Hub so, which takes seconds where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

TEXT_CHARACTERS = 120_000


@pytest.fixture(autouse=True)
def known_start() -> None:
    """
    Whatever ran before in this process: the same random numbers, and denormal ones (a training on a CPU flushes them
    to 0, in its process for good).
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def text() -> str:
    """English text: the topics of Python's own help, about 1,000 paragraphs."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))[:TEXT_CHARACTERS]


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory) -> str:
    """Path of a .txt file of that text; each paragraph is a document."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def small_text_file(text, tmp_path_factory) -> str:
    """Path of a .txt file of about 1,700 tokens: a few steps read it more than once."""
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(text[:4000].rpartition("\n\n")[0], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny_gpt2(text, tmp_path_factory) -> str:
    """Folder of a randomly initialised GPT-2: 2 layers, width 64, 128 positions, a tokenizer trained on the text."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Weights larger than GPT-2's at first, so that the MLPs do something that is worth reconstructing.
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=128,
                n_embd=64,
                n_layer=2,
                n_head=2,
                initializer_range=0.15,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def without_plots(monkeypatch):
    """Drawing the plots of the card takes longer than a tiny run."""
    monkeypatch.setattr("hf_clt.hub.card.draw_plots", lambda *arguments: None)


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate_in_each_file():
    """Files that share a process must not see what the one before left."""
    reset_accelerate()


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state per process: without it, a test could not choose device or precision."""
    reset_accelerate()
    yield
    reset_accelerate()
