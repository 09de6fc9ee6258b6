import pytest

from tests.training.test_trainer import make_trainer


@pytest.fixture
def make(tiny_gpt2, small_text_file, tmp_path):
    """A trainer of a tiny CLT on a tiny model; `config` holds CLTConfig's fields, the rest are arguments."""
    return lambda config=None, **arguments: make_trainer(
        tiny_gpt2, small_text_file, tmp_path / "run", config, arguments
    )
