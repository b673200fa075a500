"""A GPU node as far as a CPU shows it: memory, vLLM's settings and errors, tests/gpu.py.

Some tests run the vLLM engine on a stub of vLLM, which records what it is given.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import engine
import runs
import trainer
from config import Config, parse_config
from data import UserError

ROOT = Path(trainer.__file__).parent
torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
DTYPES = [
    pytest.param(torch.float32, id="adamw"),
    pytest.param(torch.bfloat16, id="adamw8bit", marks=torchao),
]


def tiny_llama(seed: int = 0, dtype=torch.float32):
    """A Llama whose matrices are large enough for torchao's 8-bit moments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype)


def five_steps(policy, optimizer) -> None:
    """AdamW steps on one sentence."""
    for i in range(5):
        torch.manual_seed(i)
        trainer.accumulate(policy, [(list(range(3, 40)), 4)], 4096)
        optimizer.step()
        optimizer.zero_grad()


def plain(x: torch.Tensor) -> torch.Tensor:
    """A tensor, or the numbers that torchao's 8-bit one stands for."""
    return x.dequantize() if hasattr(x, "codes") else x


# -- AdamW's moments -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_exist_before_the_first_step_and_change_no_bit(dtype):
    policy, other = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    optimizer, lazy = trainer.adamw(policy, 1e-3), trainer.adamw(other, 1e-3)
    states = list(optimizer.state.values())
    assert len(states) == len(list(policy.parameters()))
    lazy.state.clear()  # it makes its own at the first step
    moments = [state["exp_avg"] for state in states]
    five_steps(policy, optimizer)
    five_steps(other, lazy)
    for made, own in zip(optimizer.state.values(), lazy.state.values(), strict=True):
        assert made.keys() == own.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in made:
            assert type(made[key]) is type(own[key]) and made[key].dtype == own[key].dtype
            assert torch.equal(plain(made[key]), plain(own[key]))
    assert all(a is state["exp_avg"] for a, state in zip(moments, optimizer.state.values()))
    for p, q in zip(policy.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_brings_its_moments_after_the_new_ones_have_gone(dtype, tmp_path):
    policy = tiny_llama(dtype=dtype)
    optimizer = trainer.adamw(policy, 1e-3)
    five_steps(policy, optimizer)
    torch.save({"optimizer": optimizer.state_dict(), "log": {"loss": 1.5}}, tmp_path / "trainer.pt")

    again = tiny_llama(dtype=dtype)
    again.load_state_dict(policy.state_dict())
    fresh = trainer.adamw(again, 1e-3)
    seen = []

    def before(optimizer, saved):
        seen.append((len(optimizer.state), "trainer.pt" in Path("/proc/self/maps").read_text()))

    fresh.register_load_state_dict_pre_hook(before)
    assert trainer.load_trainer(tmp_path, fresh) == {"loss": 1.5}
    assert seen == [(0, True)]  # the file is mapped, not read into the host's memory
    five_steps(policy, optimizer)
    five_steps(again, fresh)
    for p, q in zip(policy.parameters(), again.parameters()):
        assert torch.equal(p, q)


# -- vLLM, as it is on a GPU ----------------------------------------------------------------------


class StubLLM:
    """Stands in for vllm.LLM on a GPU: keeps its settings, the environment and the calls."""

    def __init__(self, model, **settings):
        self.settings = settings
        self.env = dict(os.environ)
        self.calls = []
        torch.set_num_threads(1)  # as vLLM's GPU worker does

    def sleep(self, level):
        self.calls.append("sleep")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, name, kwargs):
        self.calls.append(name)

    def reset_prefix_cache(self):
        pass

    def generate(self, inputs, params, use_tqdm):
        self.calls.append(f"generate on {torch.get_num_threads()}")
        output = SimpleNamespace(token_ids=[5, 2], finish_reason="stop", logprobs=[])
        return [SimpleNamespace(outputs=[output] * p.n) for p in params]


class StubTokenizer:
    """Counts how often text is made."""

    calls = 0

    def batch_decode(self, rows, skip_special_tokens):
        self.calls += 1
        return ["text"] * len(rows)


@pytest.fixture
def gpu(monkeypatch):
    """An environment in which a GPU of 80 GiB and vLLM seem to be there."""
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    stub = SimpleNamespace(
        LLM=StubLLM, SamplingParams=lambda **settings: SimpleNamespace(**settings)
    )
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setattr(engine, "device", lambda: "cuda")
    monkeypatch.setattr(trainer, "device", lambda: "cuda")
    total = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: total)
    yield stub
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            del os.environ[name]


def start_engine(tmp_path, **settings):
    """A VLLMEngine on the stub, with the folder of a tiny model."""
    policy = tiny_llama()
    policy.config.save_pretrained(tmp_path)
    cfg = dataclasses.replace(Config(), out=str(tmp_path), **settings)
    return engine.VLLMEngine(cfg, StubTokenizer(), None, [2], tmp_path), policy


def test_vllms_settings_on_a_gpu(gpu, tmp_path):
    llm = start_engine(tmp_path)[0].llm
    assert llm.env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"  # compiled with nvcc, which may be missing
    assert llm.env["VLLM_LOGGING_LEVEL"] == "WARNING"  # of weights that were not loaded
    assert llm.settings["config_format"] == "hf"  # the config that the trainer reads
    assert llm.settings["enable_sleep_mode"] and llm.settings["load_format"] == "dummy"


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB free."),
    RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"),
    ValueError("Free memory on device cuda:0 (3/79 GiB) on startup is less than desired. Decrease"),
    ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
]


@pytest.mark.parametrize("error", NO_MEMORY)
@pytest.mark.parametrize("moment", ["__init__", "wake_up", "generate"])
def test_every_out_of_memory_is_one_line_with_the_flag(gpu, tmp_path, monkeypatch, error, moment):
    def fails(self, *args, **settings):
        raise error

    if moment != "__init__":
        sampler, policy = start_engine(tmp_path)
    monkeypatch.setattr(StubLLM, moment, fails)
    with pytest.raises(UserError, match="memory.*--gpu-memory goes on$") as caught:
        if moment == "__init__":
            start_engine(tmp_path)
        with sampler.awake(policy):
            sampler.sample([[1, 5]], 1, 1.0, seed=0)
    assert "\n" not in str(caught.value) and "is kept" in str(caught.value)


def test_an_error_of_another_kind_stays_what_it_is(gpu, tmp_path, monkeypatch):
    sampler, policy = start_engine(tmp_path)
    monkeypatch.setattr(StubLLM, "generate", lambda self, *args, **settings: 1 // 0)
    with pytest.raises(ZeroDivisionError), sampler.awake(policy):
        sampler.sample([[1, 5]], 1, 1.0, seed=0)


def test_torch_has_vllms_threads_while_vllm_samples_and_no_longer(gpu, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler, policy = start_engine(tmp_path)
        sampler.llm.calls.clear()
        with sampler.awake(policy):
            sampler.generate([[1, 5]], 2, 1.0, 4, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    wake = ["wake weights", "reload_weights", "wake kv_cache"]
    assert sampler.llm.calls == [*wake, "generate on 1", "sleep"]


def test_the_responses_to_a_prompt_are_decoded_together(gpu, tmp_path):
    sampler, policy = start_engine(tmp_path)
    with sampler.awake(policy):
        sampler.checked = True
        groups = sampler.sample([[1, 5], [1, 6]], 3, 1.0, seed=0)
    assert [len(group) for group in groups] == [3, 3] and groups[0][0].response == "text"
    assert sampler.tokenizer.calls == 2


# -- will it fit ----------------------------------------------------------------------------------

HUB = {
    "hub/Mistral-7B": dict(model_type="mistral", vocab_size=32000),
    "hub/Llama-8B": dict(model_type="llama", vocab_size=128256),
}


def of_the_hub(model):
    """AutoConfig.from_pretrained of two models that are too large to be made here."""
    if model not in HUB:
        raise OSError("We couldn't connect to the hub")
    shape = dict(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8)
    return transformers.AutoConfig.for_model(**shape, **HUB[model])


@pytest.fixture
def preflight_on(monkeypatch, capsys):
    """preflight_on(GiB of GPU, flags, GiB of host): its line, on a GPU that is not there."""
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", of_the_hub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 50))
    trainer.model_config.cache_clear()

    def call(card: int, flags: str, host: int = 200) -> str:
        total = SimpleNamespace(total_memory=card << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: total)
        monkeypatch.setattr(runs, "host_memory", lambda: host << 30)
        cfg = parse_config(flags.split())
        cfg.preflight = True
        with pytest.raises(SystemExit):
            runs.preflight(cfg)
        return capsys.readouterr().out

    yield call
    trainer.model_config.cache_clear()


MATH = "--task math --reward answer --model hub/Mistral-7B"


def test_a_hub_models_size_and_activations_come_from_its_config(preflight_on):
    line = preflight_on(139, MATH)
    assert "7.24B parameters" in line and "activations 7.7" in line and "context 4.6" in line
    line = preflight_on(200, "--task math --reward answer --model hub/Other-7B")  # no network
    assert "7B parameters" in line and "activations" not in line


def test_code_fits_141_gb_at_its_defaults_and_not_with_twice_the_tokens(preflight_on):
    code = "--task code --unsafe-code --model hub/Llama-8B"
    assert "training 13" in preflight_on(139, code)
    with pytest.raises(UserError, match="training needs 142 GiB of 139 GiB; lower --token-budget"):
        preflight_on(139, f"{code} --token-budget 8192")


def test_a_share_above_what_is_left_is_refused_before_a_weight_is_read(preflight_on):
    preflight_on(139, f"{MATH} --gpu-memory 0.38")
    with pytest.raises(UserError, match="--gpu-memory 0.4: beside 81 GiB .* at most 0.39 of the"):
        preflight_on(139, f"{MATH} --gpu-memory 0.4")
    preflight_on(139, f"{MATH} --gpu-memory 0.7 --offload-optimizer")


def test_the_hosts_memory_is_checked(preflight_on):
    assert "host 35 GiB" in preflight_on(139, MATH, host=40)
    with pytest.raises(UserError, match="host's memory is 30 GiB, and 35 GiB are needed"):
        preflight_on(139, MATH, host=30)
    with pytest.raises(UserError, match="88.9 GiB are needed.*leave --offload-optimizer out"):
        preflight_on(139, f"{MATH} --offload-optimizer", host=40)


def test_preflight_says_the_hours_of_the_papers_run_and_of_a_smaller_one(preflight_on):
    line = preflight_on(139, MATH)
    assert "hours on one H200, estimated: 6.5 an iteration (balance 1.6, pool 3.6, training" in line
    small = "--K 16 --queries-per-iter 4000 --steps-per-iter 125 --balance-queries 150"
    line = preflight_on(139, f"{MATH} {small} --eval-samples 8")
    assert line.rstrip().endswith(", 7 for 9")
    with_prm = preflight_on(139, "--task math --model hub/Mistral-7B")  # the default, as the paper
    assert "scoring 4.4" in with_prm and "host 48.5 GiB" in with_prm


def test_a_gated_model_says_what_to_do(monkeypatch):
    def gated(model):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with pytest.raises(
        UserError, match="^--model hub/gated: .*accept the terms .* `hf auth login`"
    ):
        trainer.model_config("hub/gated")


# -- the node -------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_nodes_proof_ends_ready(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), "--quick"]
    p = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert p.stdout.splitlines()[-1:] == ["ready"], p.stdout + p.stderr[-3000:]
    for what in ("canary's gap", "greedy tokens", "stops", "adamw, with", "checkpoint", "goes on"):
        assert what in p.stdout
