"""Finding and loading the base: folders, built-in names, hub names without a network, what is refused and why."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import save_model, settings, tiny_model
from transformers import AutoConfig, PreTrainedModel

from rlhf_fast import hub
from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, builtin, load_pretrained, pretrained
from rlhf_fast.rollout import generate

CPU = torch.device("cpu")


def load(folder: str | Path, **changes: Any) -> tuple[PreTrainedModel, Any]:
    return load_pretrained(settings(model_name_or_path=str(folder), **changes), CPU)


def located(name: str) -> Path:
    with pretrained.located(name) as source:
        return Path(source)


def refusal(folder: str | Path, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        load(folder, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return save_model(tmp_path / "llama-tiny", tokenizer_folder, "llama")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_loads_frozen_in_eval_mode_and_in_the_dtype_asked_for(folder: Path) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model, tokenizer = load(folder, dtype=name)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert tokenizer.eos_token_id == 1
    assert torch.equal(load(folder, dtype="float32")[0].lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure a peak")
def test_converting_takes_no_more_memory_than_the_converted_weights(tmp_path: Path, tokenizer_folder: Path) -> None:
    sizes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 4096}
    large = save_model(tmp_path / "large", tokenizer_folder, "llama", **sizes)
    half = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    model, _ = load(large, dtype="bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert resident("VmHWM") - before < 2 * half  # a mapped file makes it 3


def resident(kind: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies})
    assert load(folder, dtype="auto")[0].dtype == dtype


def test_a_missing_folder_is_named_with_the_nearest_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "(did you mean 'llama-tiny'?)" in refusal(tmp_path / "llama-tiyn")
    assert refusal(tmp_path / "x" / "y").startswith(f"no model folder {tmp_path / 'x' / 'y'}")
    monkeypatch.chdir(tmp_path)
    assert refusal("./llama-tin") == "no model folder ./llama-tin (did you mean 'llama-tiny'?)"
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert refusal("models/smal") == "no model folder models/smal (did you mean 'small'?)"


def test_a_folder_that_holds_no_model_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is a folder without config.json" in refusal(tmp_path / "empty")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    assert "damaged" in refusal(folder)
    weights.unlink()
    assert f"no *.safetensors in {folder}" in refusal(folder)
    weights.write_bytes(content)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert f"no tokenizer in {folder}" in refusal(folder)


def test_pickle_weights_load_only_when_allowed(folder: Path) -> None:
    torch.save(load(folder)[0].state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "--allow_pickle_weights" in refusal(folder)
    model, _ = load(folder, allow_pickle_weights=True)
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_allowing_pickle_weights_does_no_harm_where_safetensors_are_there(folder: Path) -> None:
    model, _ = load(folder, allow_pickle_weights=True)
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_code_that_comes_with_a_model_runs_only_when_trusted(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    change_json(
        folder / "config.json",
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )
    assert "--trust_remote_code" in refusal(folder)
    assert not ran.exists()
    model, _ = load(folder, trust_remote_code=True)
    assert ran.exists() and type(model).__name__ == "OwnModel"


def test_a_model_that_writes_no_text_is_refused(folder: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(folder)
    assert "no causal language model" in refusal(folder)


def test_nothing_of_the_folders_generation_config_but_its_stop_tokens_is_used(folder: Path) -> None:
    """min_new_tokens, penalties or a top_k would make the sampled distribution differ from the trained one."""

    def sampled() -> list[list[int]]:
        base = SharedBase(*load(folder), settings())
        row = PromptRow(1, base.tokenizer("hello").input_ids, "hello", {}, "hello")
        torch.manual_seed(0)
        return [r.token_ids for r in generate(base, None, [row] * 4, response_length=12, temperature=1.0, batch_size=4)]

    change_json(folder / "generation_config.json", eos_token_id=[0, 1])
    expected = sampled()
    change_json(
        folder / "generation_config.json",
        do_sample=False,
        top_k=5,
        top_p=0.3,
        temperature=0.1,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        min_new_tokens=11,
        min_p=0.5,
        typical_p=0.5,
        bad_words_ids=[[token] for token in range(2, 200)],
        suppress_tokens=list(range(2, 200)),
        max_new_tokens=3,
    )
    assert sampled() == expected
    assert SharedBase(*load(folder), settings()).stop_ids == [0, 1]


# ---- weights and config --------------------------------------------------------------------------------------------


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_missing_is_named(folder: Path, name: str) -> None:
    rewrite_weights(folder, lambda tensors: tensors.pop(name))
    assert f"no weights for {name}, which would be random" in refusal(folder)


def test_a_whole_layer_that_is_missing_is_counted(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=5)
    assert "and 6 more, which would be random" in refusal(folder)


def test_weights_that_are_tied_or_made_anew_are_not_missing(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Tied heads and the buffers of rotary positions are not in the file."""
    tied = save_model(tmp_path / "tied", tokenizer_folder, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    model, tokenizer = load(tied)
    assert torch.equal(model.lm_head.weight, tiny_model("llama", tie_word_embeddings=True).lm_head.weight)
    assert SharedBase(model, tokenizer, settings()).notes == []


def test_weights_that_the_model_has_no_place_for_are_said(folder: Path) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update({"vision.weight": torch.zeros(2)}))
    notes = SharedBase(*load(folder), settings()).notes
    assert len(notes) == 1 and "a LlamaForCausalLM has no place for are not used: vision.weight" in notes[0]


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}))
    assert "model.norm.weight is (5,) there and must be (32,)" in refusal(folder)


def test_what_the_config_shows_is_said_before_any_weight_is_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"broken")
    change_json(folder / "config.json", vocab_size=200)
    assert "tokens beyond the 200 rows of the model's embedding" in refusal(folder)
    AutoConfig.for_model("t5").save_pretrained(folder)
    assert "it is no causal language model: a t5 is an encoder with a decoder" in refusal(folder)
    AutoConfig.for_model("vit").save_pretrained(folder)
    assert "it is no causal language model: the config of a vit has no vocab_size" in refusal(folder)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("quantization", [None, {"quant_method": "nope"}])
def test_quantised_weights_that_nothing_says_how_to_read_are_refused(
    folder: Path, dtype: Any, quantization: Any
) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    change_json(folder / "config.json", **({"quantization_config": quantization} if quantization else {}))
    assert f"it holds quantised weights ({Q} (" in refusal(folder)


@pytest.mark.parametrize("name", ["_scale_inv", "_scale", ".absmax"])
def test_scales_without_a_place_are_refused(folder: Path, name: str) -> None:
    rewrite_weights(folder, lambda tensors: tensors.update({Q + name: torch.ones(1)}))
    assert f"it holds quantised weights ({Q}{name})" in refusal(folder)


def test_what_only_looks_like_quantised_weights_is_said_and_no_more(folder: Path) -> None:
    extra = {"vision.logit_scale": torch.ones(1), "vision.layers.9.position_ids": torch.arange(3)}
    rewrite_weights(folder, lambda tensors: tensors.update({**extra, Q: tensors[Q].to(torch.float16)}))
    notes = SharedBase(*load(folder), settings()).notes
    assert len(notes) == 1 and "vision.layers.9.position_ids, vision.logit_scale" in notes[0]


def test_a_config_with_fewer_layers_than_the_weights_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=2)
    assert "it holds weights of model.layers.2, beyond those of its config.json" in refusal(folder)
    change_json(folder / "config.json", num_nextn_predict_layers=2)
    assert any("model.layers.2" in note for note in SharedBase(*load(folder), settings()).notes)


@pytest.mark.parametrize("content", ["null", "[]", '"x"', "", "{", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "special_tokens_map.json"])
def test_a_json_file_that_holds_no_object_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_bytes(content.encode("latin1"))
    assert refusal(folder).startswith(f"{folder / name}: ")


def test_an_index_is_read_where_there_are_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    load(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert f"{index}: expected a weight_map" in refusal(folder)
    index.unlink()
    assert "model.safetensors.index.json is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "4"}, "'num_hidden_layers' expected int, got str"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be 1 or more; got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be 1 or more; got -1"),
        ({"vocab_size": -5}, "vocab_size must be 1 or more; got -5"),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"rope_parameters": []}, "config.json: "),
        ({"pad_token_id": 999}, "Padding_idx must be within num_embeddings"),
        ({"id2label": 3}, "config.json: "),
        ({"quantization_config": "x"}, "config.json: "),
        ({"hidden_act": "nope"}, "a name that transformers does not know: 'nope'"),
    ],
)
def test_a_value_in_the_config_that_cannot_be_is_told(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_json(folder / "config.json", **changes)
    told = refusal(folder)
    assert told.startswith(f"cannot load the model {folder}: ") and message in told


# ---- built-in models -----------------------------------------------------------------------------------------------


def test_the_tiny_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "cache"))
    first = located("tiny-random")
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    monkeypatch.setattr(builtin, "_make_tiny", lambda folder: pytest.fail("made a second time"))
    assert located("tiny-random") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == stamps
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    model, tokenizer = load("tiny-random")
    assert model.config.vocab_size > len(tokenizer) and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_making_the_tiny_model_leaves_the_random_numbers_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    builtin.tiny_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_half_made_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "_make_tiny", fail)
        with pytest.raises(UserError, match=f"cannot write the model to {tmp_path}.*No space left"):
            builtin.tiny_model()
    assert not list(tmp_path.iterdir())
    assert (builtin.tiny_model() / "model.safetensors").is_file()


# ---- hub names -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def offline_setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Independent of the setting on this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's address is a closed port of this machine; its cache is empty."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    message = refusal("someone/some-model")
    assert time.monotonic() - began < 10
    assert "the hub can't be reached" in message and "'someone/some-model'" in message
    assert "(did you mean 'tiny-random'?)" in refusal("tiny-randon")


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert "the hub can't be reached" in refusal("someone/some-model")
    assert time.monotonic() - began < 10 * 0.2


def test_a_name_that_the_hub_does_not_know_is_said_so(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: Any, name: str, **kwargs: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    message = refusal("smollm2-135m-instrct")
    assert "nor a public model of the hub" in message and "(did you mean 'smollm2-135m-instruct'?)" in message


def test_a_gated_model_says_what_to_do(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(self: Any, name: str, **kwargs: Any) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
    assert refusal("someone/secret") == (
        "someone/secret: a gated model; ask for access on its page, then run `hf auth login`"
    )


@pytest.mark.usefixtures("no_hub")
def test_a_name_that_no_hub_model_can_have_is_refused() -> None:
    assert "nor a public model of the hub" in refusal("no spaces allowed")


@pytest.mark.usefixtures("no_hub")
def test_a_cached_model_loads_without_the_hub(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / ("a" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    began = time.monotonic()
    model, tokenizer = load("someone/some-model")
    assert time.monotonic() - began < 10
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight) and len(tokenizer) == 258
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # the next name is asked for again
