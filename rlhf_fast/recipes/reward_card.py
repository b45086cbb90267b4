"""The card of a reward model, ``README.md`` and ``card.html`` in its adapter's folder: how good it is, and on what.

Both have the same sections, from templates in ``card/``.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import peft
import torch
import transformers
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

import rlhf_fast
from rlhf_fast.config import DEFAULT_MODEL, RewardConfig
from rlhf_fast.data import PairRow
from rlhf_fast.files import encode
from rlhf_fast.recipes.identity import FREE
from rlhf_fast.recipes.pairs import length_difference
from rlhf_fast.rewards.quality import Quality, buckets, wilson
from rlhf_fast.text import one_line, printable

PERCENTILES = (5, 25, 50, 75, 95)
HEALTHY = (0.7, 0.8)
MOST_SUBSETS = 50
SAME_SCORE = 0.05  # of the scores' standard deviation: up to here two scores of the same text differ by rounding alone
BUILT_IN = {DEFAULT_MODEL: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}  # where its weights come from
MARKUP = str.maketrans({mark: f"&#{ord(mark)};" for mark in "|[]`*_\\"})  # of Markdown


class HeldOut(NamedTuple):
    """Held-out pairs and their raw scores, (N, 2) each: chosen, rejected. ``half``: with each response cut to half its
    tokens. ``exchanged``: of the first pairs alone, with the sides exchanged."""

    rows: Sequence[PairRow]
    quality: Quality
    scores: torch.Tensor
    half: torch.Tensor | None = None
    exchanged: torch.Tensor | None = None


class Calibration(NamedTuple):
    """Mean and standard deviation of ``scores``, the raw scores of the SFT model's samples (N,)."""

    mean: float
    std: float
    scores: torch.Tensor


class Share(float):
    """A number from 0 to 1, which is shown in percent, on the page with a bar."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A title, paragraphs, and a table: its header and rows of texts, numbers and shares."""

    title: str
    paragraphs: list[str]
    columns: list[str] = dataclasses.field(default_factory=list)
    rows: list[list[Any]] = dataclasses.field(default_factory=list)


def write_card(
    folder: Path, *, config: RewardConfig, steps: int, found: HeldOut | None, calibration: Calibration
) -> None:
    """Writes ``README.md`` and ``card.html`` into ``folder``. ``found``: None where no pairs were held out."""
    sections = [] if found is None else of_pairs(found, config.label_noise_ceiling)
    sections += [of_scores(found, calibration), of_origin(config, steps)]
    settings = yaml.safe_dump(
        {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}, allow_unicode=True
    )
    content = {"sections": sections, "summary": summary(config, found)}
    code = Markup("\n".join(f"    {printable(line)}" for line in settings.splitlines()))  # in Markdown, by its indent
    card = MARKDOWN.get_template("card.md.jinja")
    text = card.render(**content, settings=code, front_matter=Markup(front_matter(config)))
    (folder / "README.md").write_bytes(encode(text))
    (folder / "card.html").write_bytes(
        encode(HTML.get_template("card.html.jinja").render(**content, settings=settings))
    )


# ---- what the sections say -----------------------------------------------------------------------------------------


def summary(config: RewardConfig, found: HeldOut | None) -> str:
    what = f"A Bradley-Terry reward model on {config.model_name_or_path}, trained on {config.dataset_name}."
    if found is None:
        return f"{what} No pairs were held out, so its accuracy is unknown."
    quality = found.quality
    interval = f"95% interval {quality.accuracy_low:.1%} to {quality.accuracy_high:.1%}"
    return f"{what} On {quality.pairs} held-out pairs its accuracy is {quality.accuracy:.1%} ({interval})."


def of_pairs(found: HeldOut, ceiling: float | None) -> list[Section]:
    quality, margins = found.quality, found.scores[:, 0] - found.scores[:, 1]
    lengths = torch.tensor([length_difference(row) for row in found.rows])
    right = ranked_right(found.scores)
    unequal = (lengths != 0) & (margins != 0)
    agreement = ((margins > 0) == (lengths > 0))[unequal].double().mean().item() if unequal.any() else 0.5
    figures: list[list[Any]] = [
        [
            "accuracy",
            Share(quality.accuracy),
            f"95% interval {quality.accuracy_low:.1%} to {quality.accuracy_high:.1%}",
        ],
        ["loss", f"{quality.loss:.4f}", "guessing: 0.693"],
        ["margin", f"{quality.margin:.3f}", "mean of chosen minus rejected, raw scores"],
        ["calibration error", f"{quality.calibration_error:.3f}", "expected, of the predicted probability"],
        ["length correlation", f"{quality.length_correlation:+.2f}", "of margin and difference in tokens"],
        ["length alone", Share(quality.length_accuracy), "accuracy of always choosing the longer side, or the shorter"],
        ["agreement with length", Share(agreement), f"prefers the longer side, of {int(unequal.sum())} unequal pairs"],
    ]
    reliability = [
        [Share(point["predicted"]), Share(point["observed"]), f"{point['count']}"] for point in quality.reliability
    ]
    return [
        Section("Held-out pairs", judged(quality, ceiling), ["figure", "value", "note"], figures),
        Section(
            "Reliability",
            ["Predicted: sigmoid of the size of the margin. Observed: how often the label agrees. Both are equal in a "
            f"calibrated model; the expected calibration error is {quality.calibration_error:.3f}."],
            ["predicted", "observed", "pairs"],
            reliability,
        ),
        Section(
            "By margin",
            ["Pairs by the size of the margin, in fifths. A sound model is right more often where it is surer."],
            ["size of the margin", "accuracy", "pairs"],
            [bucket(each, "{:.2f}") for each in quality.margin_buckets],
        ),
        Section(
            "By length",
            ["Pairs by the tokens that the chosen response has more than the rejected one, in fifths. A model that "
            "follows length fails in the first rows."],
            ["chosen longer by", "accuracy", "pairs"],
            [bucket(each, "{:+.0f}") for each in buckets(lengths.double(), right)],
        ),
        *of_trials(found),
        *of_subsets([row.subset for row in found.rows], right),
    ]  # fmt: skip


def judged(quality: Quality, ceiling: float | None) -> list[str]:
    """What the accuracy means."""
    low, high = HEALTHY
    if quality.accuracy_high < low:
        place = "below it: PPO would climb a noisy reward. More data, a stronger base or a higher learning rate help."
    elif quality.accuracy_low > high:
        place = "above it: look for leakage and for a shortcut, unless the labels follow a rule or have little noise."
    elif low <= quality.accuracy <= high:
        place = "within it."
    else:
        place = "outside of it, but the interval reaches into it: hold out more pairs to know."
    said = [f"A healthy model reaches {low:.0%} to {high:.0%} on human preferences. This one is {place}"]
    if ceiling is not None:
        said.append(f"The noise of the labels allows {ceiling:.1%} at most.")
    return said + [f"Warning: {line}." for line in quality.warnings(ceiling)]


def of_trials(found: HeldOut) -> list[Section]:
    """Accuracy on cut responses and on exchanged sides."""
    if found.half is None or found.exchanged is None:
        return []
    count = len(found.exchanged)
    given, exchanged = found.scores[:count], found.exchanged
    gap = (given - exchanged.flip(1)).abs().max().item()
    if gap <= SAME_SCORE * found.scores.std(correction=0).item():
        place = "does not depend on its place in the batch"
    else:
        place = "depends on its place in the batch: look at padding and at the model's attention code"
    rows = [
        ["as given", Share(found.quality.accuracy), f"{len(found.rows)}"],
        ["each response cut to half its tokens", Share(mean_accuracy(found.half)), f"{len(found.half)}"],
        ["sides exchanged", Share(mean_accuracy(exchanged)), f"{count}"],
        ["the same pairs as given", Share(mean_accuracy(given)), f"{count}"],
    ]
    said = [
        "Cut responses: how much the model knows before the end of an answer. PPO's critic starts from it.",
        "Exchanged sides: the accuracy must be 1 minus that of the same pairs as given, a tie counting as half. The "
        f"two scores of a text differ by {gap:.2g} at most: the score {place}.",
    ]
    return [Section("Other forms of the pairs", said, ["pairs", "accuracy", "count"], rows)]


def of_subsets(names: Sequence[str | None], right: torch.Tensor) -> list[Section]:
    """Accuracy by the data's ``subset`` column, the largest subsets first."""
    counts = Counter(name for name in names if name is not None)
    if not counts:
        return []
    rows = []
    for name, count in counts.most_common(MOST_SUBSETS):
        own = right[torch.tensor([other == name for other in names])]
        low, high = wilson(own.sum().item(), count)
        rows.append([name, Share(own.mean().item()), f"{low:.1%} to {high:.1%}", f"{count}"])
    said = [f"The {MOST_SUBSETS} largest of {len(counts)} subsets."] if len(counts) > MOST_SUBSETS else []
    return [Section("Subsets", said, ["subset", "accuracy", "95% interval", "pairs"], rows)]


def of_scores(found: HeldOut | None, calibration: Calibration) -> Section:
    """The distribution of calibrated scores."""
    mean, std, sampled = calibration
    groups = {"samples of the SFT model": sampled}
    if found is not None:
        groups |= {"chosen, held out": found.scores[:, 0], "rejected, held out": found.scores[:, 1]}
    rows = []
    for name, raw in groups.items():
        scores = (raw - mean) / std
        points = torch.quantile(scores, torch.tensor(PERCENTILES, dtype=scores.dtype) / 100).tolist()
        texts = [f"{value:+.2f}" for value in (scores.mean().item(), *points)]
        rows.append(
            [
                name,
                *texts[:1],
                f"{scores.std(correction=min(1, len(scores) - 1)).item():.2f}",
                *texts[1:],
                f"{len(scores)}",
            ]
        )
    said = (
        f"Scores are (raw - {mean:.4f}) / {std:.4f}: mean 0 and standard deviation 1 on the SFT model's own samples. "
        "The constants are in calibration.json; PPO applies them."
    )
    columns = ["scores", "mean", "std", *(f"{percent}%" for percent in PERCENTILES), "count"]
    return Section("Distribution of the scores", [said], columns, rows)


def of_origin(config: RewardConfig, steps: int) -> Section:
    held_out = f"{config.eval_dataset_name}, split {config.eval_dataset_split}"
    share = f"{config.eval_size:.0%} of the data" if config.eval_size < 1 else f"{config.eval_size:.0f} pairs"
    versions = {"rlhf-fast": rlhf_fast, "torch": torch, "transformers": transformers, "peft": peft}
    rows = [
        ["base", config.model_name_or_path],
        ["license of the base", base_license(config.model_name_or_path) or "not stated where the base lies"],
        ["starts from", config.sft_adapter or "the bare base"],
        ["data", f"{config.dataset_name}, split {config.dataset_split}"],
        ["held out", held_out if config.eval_dataset_name else f"{share}, by prompt"],
        ["steps", f"{steps} of {config.batch_size} pairs"],
        ["seed", f"{config.seed}"],
        ["versions", ", ".join(f"{name} {module.__version__}" for name, module in versions.items())],
    ]
    return Section("Origin", [], ["what", "value"], rows)


def ranked_right(scores: torch.Tensor) -> torch.Tensor:
    """(N, 2) scores -> (N,): 1 where chosen is above rejected, half for a tie."""
    chosen, rejected = scores.unbind(dim=1)
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def mean_accuracy(scores: torch.Tensor) -> float:
    return ranked_right(scores).mean().item()


def bucket(each: dict[str, float], form: str) -> list[Any]:
    bounds = f"{form.format(each['low'])} to {form.format(each['high'])}"
    return [bounds, Share(each["accuracy"]), f"{each['count']:.0f}"]


# ---- front matter --------------------------------------------------------------------------------------------------


def front_matter(config: RewardConfig) -> str:
    """Hugging Face's metadata of a model card. Names that are none of the hub's are left out, as it refuses them."""
    base = BUILT_IN.get(config.model_name_or_path, (hub_name(config.model_name_or_path), None))[0]
    data = hub_name(config.dataset_name.partition(":")[0])
    card = huggingface_hub.ModelCardData(
        base_model=base,
        library_name="peft",
        tags=["reward-model", "lora", "rlhf-fast"],
        datasets=[data] if data else None,
        pipeline_tag="text-classification",
    )
    return card.to_yaml()


def hub_name(name: str) -> str | None:
    """``name`` if it is one of the hub, OWNER/NAME, and no path."""
    if os.path.exists(name) or name.startswith("demo/") or name.count("/") != 1:
        return None
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        return None
    return name


def base_license(name: str) -> str | None:
    """The license that the base's own model card states, in its folder or in the hub's cache."""
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    card = os.path.join(name, "README.md") if os.path.isdir(name) else None
    if card is None and hub_name(name):
        card = huggingface_hub.try_to_load_from_cache(name, "README.md")
    if not isinstance(card, str) or not os.path.isfile(card):
        return None
    try:
        stated = huggingface_hub.ModelCard.load(card).data.license
    except (ValueError, OSError, yaml.YAMLError):  # somebody else's card, which nothing here depends on
        return None
    return one_line(str(stated), 80) if stated else None


# ---- the two forms -------------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    return f"{float(value):.1%}" if isinstance(value, Share) else str(value)


def for_markdown(value: Any) -> Any:
    """Text for Markdown, in which neither HTML nor Markdown of the data acts."""
    if isinstance(value, Markup):
        return value
    text = str(escape(one_line(cell(value)))).replace("&#39;", "'").replace("&#34;", '"')  # they act in tags alone
    return Markup(text.translate(MARKUP))


def for_html(value: Any) -> Any:
    return value if isinstance(value, Markup) else printable(cell(value))


def environment(finalize: Any) -> Environment:
    """Every value that a template inserts goes through ``finalize`` and is then escaped for HTML."""
    made = Environment(
        loader=PackageLoader("rlhf_fast.recipes", "card"),
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.tests["share"] = lambda value: isinstance(value, Share)
    return made


MARKDOWN, HTML = environment(for_markdown), environment(for_html)
