"""Every replaced function of TRL against TRL's own and float64, and whole training runs with and without the patch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils as utils
from conftest import llama, no_further
from datasets import Dataset
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fast.integrations import trl as integration

# In a namespace: a patch rebinds names of modules, so these stay TRL's own.
THEIRS = SimpleNamespace(
    head=utils._ChunkedLogProbFunction,
    selective_log_softmax=utils.selective_log_softmax,
    both=utils.selective_log_softmax_and_entropy,
    entropy_from_logits=utils.entropy_from_logits,
)
OUTPUTS = integration.OUTPUTS


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    integration.unpatch()


# ---- the head -------------------------------------------------------------------------------------------------------


class Case:
    """37 rows of 203 logits in TRL's tiles of 64. Two rows of the weight are equal, and the target of the first token
    ties with an earlier one for the largest logit."""

    def __init__(self, dtype: torch.dtype, head: torch.dtype, bias: bool = False, trained: bool = True) -> None:
        make = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(37, 24, generator=make).to(dtype).requires_grad_()
        weight = torch.randn(203, 24, generator=make)
        weight[70] = weight[3] = 3 * self.hidden[0].detach()
        self.weight = weight.to(head).requires_grad_(trained)
        self.bias = torch.randn(203, generator=make).to(head).requires_grad_(trained) if bias else None
        if self.bias is not None:
            with torch.no_grad():
                self.bias[70] = self.bias[3]
        self.targets = torch.randint(0, 203, (37,), generator=make)
        self.targets[0] = 70
        self.slopes = torch.randn(2, 37, generator=make)

    def of(self, function: Callable[..., Any], *options: Any) -> dict[str, Tensor]:
        """The outputs of ``function``, and the gradients of log-probs and entropy."""
        outputs = function(self.hidden, self.weight, self.bias, self.targets, *options)
        return self.named(outputs, outputs[0].dtype)

    def truth(
        self, temperature: float, softcap: float | None, scale: float, asked: tuple[str, ...]
    ) -> dict[str, Tensor]:
        logits = self.hidden.double() @ self.weight.double().T
        logits = scale * (logits if self.bias is None else logits + self.bias.double())
        logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, self.targets[:, None])[:, 0]
        entropy, squares, mean = (
            -(logp.exp() * logp).sum(-1),
            (2 * logp).logsumexp(-1).detach(),
            logits.mean(-1).detach(),
        )
        top = logits.gather(-1, self.targets[:, None])[:, 0] >= logits.amax(-1)
        every = zip(OUTPUTS, (entropy, squares, mean, top), strict=True)
        return self.named((chosen, *(each if name in asked else None for name, each in every)), torch.float64)

    def named(self, outputs: tuple[Tensor | None, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        found = {name: each for name, each in zip(("log_probs", *OUTPUTS), outputs, strict=True) if each is not None}
        differentiable = [found[name] for name in ("log_probs", "entropy") if name in found]
        loss = sum((slope.to(dtype) * each).sum() for slope, each in zip(self.slopes, differentiable, strict=False))
        inputs = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        trained = {name: each for name, each in inputs.items() if each is not None and each.requires_grad}
        grads = torch.autograd.grad(loss, list(trained.values()))
        for name, grad in zip(trained, grads, strict=True):
            assert grad.dtype == trained[name].dtype and grad.shape == trained[name].shape
            found[f"d {name}"] = grad
        for name, each in found.items():
            if name in ("log_sum_sq_probs", "mean_logits", "is_top1"):
                assert not each.requires_grad
        return found


FLOAT, HALF = torch.float32, torch.bfloat16
CASES = {
    "plain": (FLOAT, FLOAT, {}, (1.0, None, 1.0)),
    "all options": (FLOAT, FLOAT, {"bias": True}, (0.7, 5.0, 0.5)),
    "frozen": (FLOAT, FLOAT, {"trained": False}, (1.3, None, 0.25)),
    "bfloat16": (HALF, HALF, {}, (1.0, None, 1.0)),
    "bfloat16, all options": (HALF, HALF, {"bias": True}, (0.7, 5.0, 0.5)),
    "bfloat16, frozen": (HALF, HALF, {"trained": False}, (1.0, None, 1.0)),
    "float32 states, bfloat16 head": (FLOAT, HALF, {}, (1.0, None, 1.0)),
    "bfloat16 states, float32 head": (HALF, FLOAT, {}, (1.0, None, 1.0)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("outputs", [(), ("entropy",), OUTPUTS], ids=["log_probs", "entropy", "all"])
@pytest.mark.parametrize("name", CASES)
def test_head(name: str, outputs: tuple[str, ...], autocast: bool) -> None:
    dtype, head, options, (temperature, softcap, scale) = CASES[name]
    case = Case(dtype, head, **options)
    true = case.truth(temperature, softcap, scale, outputs)
    with torch.autocast("cpu", HALF) if autocast else contextlib.nullcontext():
        given = (temperature, 64, softcap, scale, outputs)
        theirs = case.of(THEIRS.head.apply, *given)
        with integration.patched() as report:
            ours = case.of(utils._ChunkedLogProbFunction.apply, *given)
    assert report.calls == {"chunked_log_probs": 1}
    assert ours.keys() == theirs.keys() == true.keys()
    for key, each in ours.items():
        if not key.startswith("d "):
            assert each.dtype == theirs[key].dtype
        if key == "is_top1":
            exact = FLOAT == dtype == head and not autocast
            assert torch.equal(each[1:], theirs[key][1:]) or not exact
            # ours counts a tie; TRL takes the first of the largest
            assert each[0] and not theirs[key][0]
            continue
        rounding = 1e-6
        if key == "mean_logits":
            rounding = 1e-5  # the logits are up to a hundred times as large as their mean
        elif autocast and key.startswith("d "):
            rounding = 4e-3 if key == "d hidden" else 1e-6  # d hidden is rounded to bfloat16, as F.linear's is
        no_further(each, theirs[key], true[key], key, rounding)


def test_head_without_rows_and_with_a_scale_that_is_no_temperature() -> None:
    case = Case(FLOAT, FLOAT)
    hidden = case.hidden[:0]
    outputs = integration.chunked_log_probs(hidden, case.weight, None, case.targets[:0], 1.0, 64)
    assert all(each is not None and each.shape == (0,) for each in outputs)
    (grad,) = torch.autograd.grad(outputs[0].sum(), case.weight)
    assert not grad.any()
    with pytest.raises(ValueError, match="chunked_log_probs: logit_scale must be > 0; got 0"):
        integration.chunked_log_probs(case.hidden, case.weight, None, case.targets, 1.0, 64, None, 0.0)


def test_a_weight_that_zero_3_takes_away_after_the_forward() -> None:
    case = Case(FLOAT, FLOAT)
    true = case.of(integration.chunked_log_probs, 1.0, 64)
    weight = torch.nn.Parameter(case.weight.detach().clone())
    weight.ds_id = 0
    outputs = integration.chunked_log_probs(case.hidden, weight, None, case.targets, 1.0, 64)
    whole, weight.data = weight.data, torch.empty(0)
    loss = (case.slopes[0] * outputs[0]).sum() + (case.slopes[1] * outputs[1]).sum()
    hidden, head = torch.autograd.grad(loss, (case.hidden, weight))
    assert torch.equal(hidden, true["d hidden"]) and torch.equal(head, true["d weight"]) and len(whole)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied head"])
def test_a_model_with_masked_labels(
    tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the patch TRL leaves the positions without a label out of the head; the results are 0 there for both."""
    torch.manual_seed(1)
    ids = torch.randint(0, 250, (3, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    rows: list[int] = []
    operation = integration.linear_logprobs

    def spy(hidden: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(hidden.shape[0])
        return operation(hidden, *args, **options)

    monkeypatch.setattr(integration, "linear_logprobs", spy)

    def run(patched: bool, labels: Tensor = labels) -> dict[str, Tensor]:
        model = llama(tokenizer, **changes)
        utils.add_fused_lm_head(model, outputs=("log_probs", *OUTPUTS))
        with integration.patched() if patched else contextlib.nullcontext():
            output = model(input_ids=ids, labels=labels, fused_lm_head=True)
            (output.loss + output.entropy.sum()).backward()
        found = {f"d {name}": each.grad for name, each in model.named_parameters()}
        return found | {name: each for name, each in output.items() if each is not None}

    ours, theirs = run(True), run(False)
    assert rows == [int((labels[:, 1:] != -100).sum())]
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        torch.testing.assert_close(ours[name], each, rtol=1e-5, atol=1e-5)
    nothing = run(True, labels.new_full(labels.shape, -100))
    assert not any(each.any() for each in nothing.values())


# ---- the functions of logits ----------------------------------------------------------------------------------------


def double_logp(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    logp = (logits.double() / temperature).log_softmax(-1)
    return logp.gather(-1, index if index.dim() == logits.dim() else index[..., None]).reshape(index.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("several", "temperature"), [(0, 1.0), (0, 0.6), (3, 1.0), (3, 0.6)])
def test_selective_log_softmax(dtype: torch.dtype, masked: bool, several: int, temperature: float) -> None:
    make = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 7, 211, generator=make)).to(dtype).requires_grad_()
    index = torch.randint(0, 211, (4, 7, several) if several else (4, 7), generator=make)
    mask = torch.randint(0, 2, index.shape, generator=make) if masked else None
    slopes = torch.randn(index.shape, generator=make)

    def gradient(outputs: Tensor) -> Tensor:
        return torch.autograd.grad((slopes * outputs).sum(), logits)[0]

    true = double_logp(logits, index, temperature)
    true = true if mask is None else true.masked_fill(mask == 0, 0.0)
    theirs = THEIRS.selective_log_softmax(logits, index, temperature, mask)
    with integration.patched() as report:
        ours = utils.selective_log_softmax(logits, index, temperature, mask)
    assert report.calls == {"selective_log_softmax": 1}
    assert ours.shape == index.shape and ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    no_further(ours, theirs, true, "log-probs")
    no_further(gradient(ours), gradient(theirs), gradient(true).double(), "gradient")
    if mask is not None:
        assert not ours[mask == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 4.0, 30.0])
def test_entropy(dtype: torch.dtype, spread: float) -> None:
    make = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(4, 7, 211, generator=make)).to(dtype).requires_grad_()
    index = torch.randint(0, 211, (4, 7), generator=make)
    mask = torch.randint(0, 2, (4, 7), generator=make)
    logp = logits.double().log_softmax(-1)
    true = -(logp.exp() * logp).sum(-1)
    theirs = THEIRS.entropy_from_logits(logits)
    with integration.patched() as report:
        alone = utils.entropy_from_logits(logits)
        logprobs, entropy = utils.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
        detached = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False, temperature=0.5)
    assert report.calls == {"entropy_from_logits": 1, "selective_log_softmax_and_entropy": 2}
    no_further(alone, theirs, true, "entropy")
    no_further(entropy, theirs * mask, true * mask, "entropy beside log-probs")
    no_further(logprobs, THEIRS.both(logits, index, row_mask=mask)[0], double_logp(logits, index, 1.0) * mask, "logp")
    assert logprobs.requires_grad and entropy.requires_grad and not detached[1].requires_grad
    no_further(detached[1], THEIRS.both(logits, index, False, 0.5)[1], tempered(logits), "entropy, temperature")
    if spread == 4.0:
        slopes = [torch.autograd.grad(each.double().sum(), logits)[0] for each in (alone, theirs, true)]
        no_further(slopes[0], slopes[1], slopes[2].double(), "gradient")


def tempered(logits: Tensor) -> Tensor:
    logp = (logits.double() / 0.5).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# ---- training runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From which TRL loads the reference."""
    folder = tmp_path_factory.mktemp("model")
    llama(tokenizer).save_pretrained(folder)
    return folder


TEXTS = [
    "the cat sat",
    "a dog ran far away",
    "birds sing",
    "fish swim in the sea",
    "we read books",
    "it rains",
    "ok",
    "no",
]
PAIRS = {
    "prompt": [f"{text}? " for text in TEXTS],
    "chosen": [f"yes, {text} " for text in TEXTS],
    "rejected": [f"no {text[::-1]}" for text in TEXTS],
}
ROWS: dict[str, dict[str, list[Any]]] = {
    "SFT": {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]},
    "DPO": PAIRS,
    "KTO": {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [i % 2 == 0 for i in range(8)]},
    "GRPO": {"prompt": PAIRS["prompt"]},
    "RLOO": {"prompt": PAIRS["prompt"]},
    "Reward": PAIRS,
}
SAMPLING = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "temperature": 0.9}
OPTIONS: dict[str, dict[str, Any]] = {
    "DPO": {"use_weighting": True},
    "GRPO": {**SAMPLING, "num_iterations": 2},
    "RLOO": SAMPLING,
}


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(text.count, "aeiou"))) + 0.1 * len(text) for text in completions]


def run(
    kind: str, bf16: bool, folder: Path, tokenizer: PreTrainedTokenizerFast, model: Path, rows: int = 4
) -> list[dict[str, float]]:
    """What the trainer logs in three steps of ``rows`` rows."""
    import trl

    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        bf16=bf16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_steps=3,
        per_device_train_batch_size=rows,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **OPTIONS.get(kind, {}),
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=llama(tokenizer, labels=1) if kind == "Reward" else LlamaForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=Dataset.from_dict(ROWS[kind]),
        processing_class=tokenizer,
        **({"reward_funcs": letters} if kind in ("GRPO", "RLOO") else {}),
    )
    trainer.train()
    clocks = ("time", "runtime", "per_second", "mfu", "flos", "tps")
    return [
        {name: value for name, value in line.items() if not any(clock in name for clock in clocks)}
        for line in trainer.state.log_history
    ]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ROWS)
def test_training(
    kind: str, bf16: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    theirs = run(kind, bf16, tmp_path, tokenizer, model_folder)
    with integration.patched(strict=True) as report:
        ours = run(kind, bf16, tmp_path, tokenizer, model_folder)
    assert len(ours) == len(theirs) == 4 and ours[0]["grad_norm"] > 0
    close = {"rel": 5e-2, "abs": 1e-2} if bf16 else {"rel": 1e-4, "abs": 1e-5}
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our == pytest.approx(their, **close), step
    assert (report.calls["chunked_log_probs"] >= 3) is (kind != "Reward")


def test_strict_raises_where_the_head_is_not_reached(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    with integration.patched(strict=True), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", THEIRS.head)
        with pytest.raises(RuntimeError, match="a training step of SFTTrainer did not call chunked_log_probs"):
            run("SFT", False, tmp_path, tokenizer, model_folder)


def test_patch_and_unpatch() -> None:
    import trl.kernels
    from trl.experimental.cpo import cpo_trainer

    began = time.perf_counter()
    report = integration.patch()
    assert time.perf_counter() - began < 1
    heads = [utils._ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction]
    assert heads[0] is heads[1] is not THEIRS.head
    assert cpo_trainer.selective_log_softmax is utils.selective_log_softmax is not THEIRS.selective_log_softmax
    assert set(report.replaced) >= {"chunked_log_probs", "selective_log_softmax", "entropy_from_logits"}
    integration.unpatch()
    assert utils._ChunkedLogProbFunction is trl.kernels.ChunkedLogProbFunction is THEIRS.head
    assert cpo_trainer.selective_log_softmax is THEIRS.selective_log_softmax


def test_compiled_without_a_graph_break_and_once() -> None:
    torch._dynamo.reset()
    integration.patch()
    compiled = torch.compile(
        lambda logits: utils.selective_log_softmax(logits, torch.zeros(3, dtype=torch.long)),
        backend=(graphs := CompileCounter()),
        fullgraph=True,
    )
    for _ in range(3):
        compiled(torch.randn(3, 11))
    assert graphs.frame_count == 1 and integration.report().calls == {"selective_log_softmax": 1}
