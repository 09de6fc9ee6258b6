"""
The model card in a folder: the README.md beside a released CLT, the `metrics.json` that it is made from, and the plots
that it shows. Besides config.json it is made from `metrics.json` alone (card_facts.py), so that it can be made again.
"""

import functools
import logging
import os
from importlib.util import find_spec
from pathlib import Path

from ..configuration_clt import CLTConfig
from ..files import write_text
from .card_facts import (
    FACTS_FILE,
    PLOTS,
    PLOTS_FOLDER,
    as_curves,
    as_history,
    make_facts,
    read_facts,
    write_facts,
)
from .model_card import SCALARS, build_model_card, is_hub_name, is_human_edited


logger = logging.getLogger(__name__)


def save_model_card(
    folder: str | Path,
    config,
    metrics: dict | None = None,
    training: dict | None = None,
    command: str | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
    evaluation: dict | None = None,
    note: str | None = None,
    tags: list[str] | None = None,
    history: list[dict] | None = None,
) -> Path:
    """
    Write the model card to `folder/README.md`, what it is made from to `folder/metrics.json`, and its plots to
    `folder/plots`, where matplotlib is installed; each whole or not at all. A README.md that a human edited or wrote
    stays.

    Args:
        folder (`str` or `Path`): Folder of the released CLT; if relative, the loading snippet names it by default.
        config, metrics, training, command, name, license, evaluation, note, tags: See [`build_model_card`].
        history (`list[dict]`, *optional*): The lines of the run's `metrics.jsonl`, for the training curves.

    Returns:
        `Path` of the README.md.
    """
    facts = make_facts(
        note=note,
        license=license,
        tags=tags,
        command=command,
        metrics=metrics,
        evaluation=_told_where(evaluation),
        training=_told_where(training),
        history=as_curves(history or []),
    )
    if facts != make_facts():  # what the CLT is needs no second file
        base = config.base_model_name_or_path
        named = None if name is None or os.path.isabs(name) else name
        facts |= make_facts(name=named, base_model=base if is_hub_name(base) else None)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return write_card(folder, config, facts, name=name)


def write_card(folder: str | Path, config, facts: dict, name: str | None = None) -> Path:
    """Writes `metrics.json`, plots and README.md of a folder from its facts; see [`save_model_card`]."""
    folder = Path(folder)
    path = folder / "README.md"
    draw_plots(folder, facts)
    write_facts(folder, facts)
    if path.exists() and is_human_edited(path.read_text(encoding="utf-8")):
        _warn_kept(path.absolute())
        return path
    write_text(path, _card(folder, config, facts, name))
    return path


def card_from_folder(folder: str | Path, *, name: str | None = None, license: str | None = None) -> str:
    """
    The card of a released CLT, from the `config.json` and the `metrics.json` in its folder, and nothing else but which
    plots are there.

    Args:
        folder (`str` or `Path`): The folder; where there is no metrics.json, the card says what the CLT is.
        name (`str`, *optional*): For the loading snippet; by default the one in metrics.json, or the folder.
        license (`str`, *optional*): In place of the one in metrics.json.
    """
    facts = read_facts(folder) or make_facts()
    if license is not None:
        facts["license"] = license
    return _card(Path(folder), CLTConfig.from_pretrained(folder), facts, name)


def _card(folder: Path, config, facts: dict, name: str | None) -> str:
    name = name or facts.get("name")
    if name is None and not folder.is_absolute():  # an absolute path would publish the names of a user's folders
        name = folder.as_posix()
    rest = {key: facts.get(key) for key in ("metrics", "training", "command", "license", "evaluation", "note", "tags")}
    # Without any fact, the base model of CLTs that were never trained here has to be judged by its name.
    base_model = facts.get("base_model", "" if set(facts) > {"format"} else None)
    plots = [file for file, _, _ in PLOTS if (folder / PLOTS_FOLDER / file).is_file()]
    return build_model_card(config, **rest, name=name, base_model=base_model, plots=plots)


def draw_plots(folder: str | Path, facts: dict) -> None:
    """
    The plots of a card from its facts, in `folder/plots`; those of ours that it does not give are removed. Without
    matplotlib (the extra `plots`) there are none.
    """
    plots = Path(folder) / PLOTS_FOLDER
    written = []
    metrics, history = facts.get("metrics"), as_history(facts.get("history") or {})
    if (metrics or history) and find_spec("matplotlib") is not None:
        from ..evaluation.report import plot_metrics

        written = [path.name for path in plot_metrics(metrics, history, plots)]
    for file, _, _ in PLOTS:
        still_true = file == "training_curves.png" and history and find_spec("matplotlib") is None
        if file not in written and not still_true:
            (plots / file).unlink(missing_ok=True)


def check_update(folder: str | Path, evaluation: dict) -> None:
    """
    Whether [`update_card`] could put the metrics of this evaluation on the card, before they are measured.

    Raises:
        `ValueError`: There is no such folder, its card says more than its `metrics.json` could give again, or training
            held out fewer tokens of that text than are evaluated on.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"update_card: {str(folder)!r} is no folder with a config.json; download a CLT of the Hub into a folder, "
            "update its card there, and push it with hf-clt push"
        )
    facts, readme = read_facts(folder), folder / "README.md"
    if facts is None and readme.is_file():
        card = readme.read_text(encoding="utf-8")
        if not is_human_edited(card) and ("\n## Training\n" in card or "\nThe command" in card):
            raise ValueError(
                f"update_card: {readme} tells of a training that {FACTS_FILE} does not tell, which is missing; delete "
                "the README.md to have one with the new metrics alone"
            )
    training = (facts or {}).get("training") or {}
    same = all(training.get(key) == evaluation.get(key) for key in ("dataset_config", "dataset_split"))
    same = same and Path(training.get("dataset") or "").name == Path(evaluation["dataset"]).name
    held_out = training.get("eval_tokens")
    if same and held_out is not None and evaluation["eval_tokens"] > held_out:
        raise ValueError(
            f"eval_tokens={evaluation['eval_tokens']}, but training held out {held_out} tokens of this text and "
            f"went over the rest; give --eval-tokens {held_out} or less"
            if held_out
            else "training held nothing of this text out; give another text as dataset"
        )


def update_card(folder: str | Path, metrics: dict, evaluation: dict) -> list[str]:
    """
    Puts newly measured metrics in place of those in `metrics.json`, and makes the plots and the card anew. A card that
    a human edited stays.

    Args:
        folder (`str` or `Path`): Folder of a released CLT.
        metrics (`dict`): What [`evaluate_clt`] returned.
        evaluation (`dict`): The settings of that evaluation, see [`build_model_card`].

    Returns:
        `list[str]`: Lines that say what was done.

    Raises:
        `ValueError`: As [`check_update`].
    """
    check_update(folder, evaluation)
    folder = Path(folder)
    config = CLTConfig.from_pretrained(folder)
    facts = read_facts(folder)
    if facts is None:
        base = config.base_model_name_or_path
        facts = make_facts(base_model=base if is_hub_name(base) else None)
    # where the CLT lies is no setting of the evaluation
    evaluation = {key: value for key, value in evaluation.items() if key not in ("clt", "revision")}
    new = make_facts(metrics=metrics, evaluation=_told_where(evaluation))
    gone = [name for name, _, _ in SCALARS if name in facts.get("metrics", {}) and name not in new["metrics"]]
    path = write_card(folder, config, facts | new)
    kept = is_human_edited(path.read_text(encoding="utf-8"))
    lines = [f"The metrics are in {folder / FACTS_FILE}, the plots in {folder / PLOTS_FOLDER}"]
    lines.append(f"{path} was edited by hand and is kept" if kept else f"The card is {path}")
    if gone:
        lines.append(f"Not measured again and left out: {', '.join(gone)}")
    return lines


def _told_where(text: dict | None) -> dict | None:
    """The facts of a text with whether it is on the Hub, which nobody can see from its name later and elsewhere."""
    if not text or text.get("dataset") is None or text.get("dataset_on_hub") is not None:
        return text
    return {**text, "dataset_on_hub": is_hub_name(text["dataset"])}


@functools.cache  # once per card: a run saves its release more than once
def _warn_kept(path):
    logger.warning("%s was edited by hand and is kept; delete it to have it generated anew", path)


__all__ = ["card_from_folder", "check_update", "draw_plots", "save_model_card", "update_card", "write_card"]
