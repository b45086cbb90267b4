"""Checks of several stages together: what one stage trains on and another holds out, and settings that must agree."""

from collections.abc import Mapping

from rlhf_fast.config import PPOConfig, RewardConfig
from rlhf_fast.data import PairRow, PromptRow
from rlhf_fast.doctor.findings import Check, Finding, note, ok, share, warning
from rlhf_fast.doctor.rows import asked
from rlhf_fast.doctor.subject import StageData

Run = Mapping[str, StageData]
MOST_LONGER = 0.2  # share of the data's answers that are longer than response_length


def leakage_between_stages(run: Run) -> Finding | None:
    """Held-out prompts of a stage that an earlier stage trains on."""
    if len(run) < 2:
        return None
    texts = {name: {asked(data, row) for row in data.rows} for name, data in run.items()}
    found, of_ppo = [], False
    for name, data in run.items():
        for earlier in list(run)[: list(run).index(name)]:
            seen = [row for row in data.held_out if asked(data, row) in texts[earlier]]
            if seen:
                of_ppo = of_ppo or name == "ppo"
                found.append(
                    f"{share(len(seen), len(data.held_out))} held-out prompts of {name} are trained on by {earlier} "
                    f"(first: row {seen[0].index})"
                )
    if not found:
        return ok(f"no stage holds out what an earlier one trains on ({', '.join(run)})")
    why = "The later stage starts from a model that has seen these prompts: its held-out figures are too good."
    change = "Hold the same prompts out of every stage (--eval_dataset_name)."
    return warning("; ".join(found), why, change) if of_ppo else note("; ".join(found), why, change)


def prompt_form(run: Run) -> Finding | None:
    """Whether all stages write prompts in the same form."""
    if len(run) < 2:
        return None
    forms = {name: max(data.report.forms, key=data.report.forms.__getitem__) for name, data in run.items()}
    templates = {str(data.tokenizer.chat_template) for data in run.values()}
    bases = {data.config.model_name_or_path for data in run.values()}
    listed = "; ".join(f"{name}: {form}" for name, form in forms.items())
    if len(set(forms.values())) == 1 and len(templates) == 1 and len(bases) == 1:
        return ok(f"every stage has the same base and writes prompts alike: {next(iter(forms.values()))}")
    what = "bases" if len(bases) > 1 else "chat templates" if len(templates) > 1 else "forms of prompts"
    why = "A later stage starts from adapters that have learnt the other form; the KL penalty holds it there."
    return warning(f"the stages have different {what}: {listed}", why, "Use one base, template and format of data.")


def response_length(run: Run) -> Finding | None:
    """The longest response that is sampled, against the answers in the data."""
    answers = sorted(length for data in run.values() for row in data.rows if (length := answer_length(row)) is not None)
    sampled = {name: data.config for name, data in run.items() if isinstance(data.config, PPOConfig | RewardConfig)}
    if not answers or not sampled:
        return None
    parts, bad = [], False
    for name, config in sampled.items():
        longer = sum(length > config.response_length for length in answers)
        bad = bad or longer > MOST_LONGER * len(answers)
        parts.append(
            f"{name}: --response_length {config.response_length}; {share(longer, len(answers))} answers of the data "
            "are longer"
        )
    middle, high = answers[len(answers) // 2], answers[len(answers) * 9 // 10]
    found = f"{'; '.join(parts)}; their median is {middle} tokens, nine in ten have {high} at most"
    why = "Sampled answers are cut before they end, are scored unfinished and get the missing-EOS penalty."
    return warning(found, why, f"Raise --response_length to about {high}.") if bad else ok(found)


def answer_length(row: object) -> int | None:
    if isinstance(row, PairRow):
        return row.chosen_response_length
    return None if isinstance(row, PromptRow) else sum(row.response_mask)  # type: ignore[attr-defined]


def calibration(run: Run) -> Finding | None:
    """Whether the reward model is calibrated on samples like those of PPO."""
    if not {"reward", "ppo"} <= run.keys():
        return None
    reward, ppo = run["reward"].config, run["ppo"].config
    names = ("temperature", "response_length")
    values = [f"--{name} {getattr(reward, name):g} and {getattr(ppo, name):g}" for name in names]
    found = f"samples of the reward stage's calibration and of PPO: {', '.join(values)}"
    if all(getattr(reward, name) == getattr(ppo, name) for name in names):
        return ok(found)
    why = "Scores have mean 0 and deviation 1 on samples like those of the calibration alone."
    return warning(found, why, "Give both stages the same --temperature and --response_length.")


CHECKS: list[Check] = [leakage_between_stages, prompt_form, response_length, calibration]
