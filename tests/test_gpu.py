"""A GPU node as far as a CPU shows it: memory, vLLM's settings and errors, tests/gpu.py.

Some tests run the vLLM engine on a stub of vLLM, which records what it is given.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, refused, tiny_llama, torchao

import config
import engine
import runs
import trainer
from config import Config, parse_config


def small_llama(dtype=torch.float32):
    """A Llama whose matrices are large enough for torchao's 8-bit moments."""
    return tiny_llama(vocab_size=128, hidden_size=64, intermediate_size=128).to(dtype)


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


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, id="adamw8bit", marks=torchao)]
)
def test_moments_exist_before_the_first_step_and_change_no_bit(dtype):
    policy, other = small_llama(dtype), small_llama(dtype)
    optimizer, lazy = trainer.adamw(policy, 1e-3), trainer.adamw(other, 1e-3)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert len(moments) == len(list(policy.parameters()))
    lazy.state.clear()  # it makes its own at the first step
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
    others = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    monkeypatch.setattr(os, "environ", others)
    stub = SimpleNamespace(LLM=StubLLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setattr(trainer, "device", lambda: "cuda")
    total = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: total)


def start_engine(tmp_path, **settings):
    """A VLLMEngine on the stub, with the folder of a tiny model."""
    policy = small_llama()
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
    with refused("memory.*is kept.*--gpu-memory goes on$"):
        if moment == "__init__":
            start_engine(tmp_path)
        with sampler.awake(policy):
            sampler.sample([[1, 5]], 1, 1.0, seed=0)


def test_vllm_gets_what_the_trainer_leaves_of_a_gpu(gpu):
    def share(**settings):
        return engine.gpu_share(Config(task="math", **settings), "x/Mistral-7B")

    with refused("beside 78 GiB of weights .* no room .*, --offload-optimi"):
        share()
    assert share(offload_optimizer=True) == share(method="iterative-rft") == 0.524
    assert share(optim="adamw8bit") == 0.521
    assert share(optim="adamw8bit", offload_optimizer=True) == 0.687


def test_torch_has_vllms_threads_while_vllm_samples_and_no_longer(gpu, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler, policy = start_engine(tmp_path)
        sampler.llm.calls.clear()
        with sampler.awake(policy) as draw:
            assert draw([], 3, 1.0, "nothing asked") == []  # nor is the canary
            groups = sampler.sample([[1, 5], [1, 6]], 3, 1.0, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    wake = ["wake weights", "reload_weights", "wake kv_cache"]
    assert sampler.llm.calls == [*wake, "generate on 1", "sleep"]
    assert [len(group) for group in groups] == [3, 3] and groups[0][0].response == "text"
    assert sampler.tokenizer.calls == 2  # the responses to a prompt are decoded together


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
    monkeypatch.setattr(config, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 50))
    trainer.model_config.cache_clear()

    def call(card: int, flags: str, host: int) -> str:
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
BITS = f"{MATH} --model hub/Other-7B --optim adamw8bit"
CODE = "--task code --unsafe-code --model hub/Llama-8B"
SMALL = "--K 16 --queries-per-iter 4000 --steps-per-iter 125 --balance-queries 150 --eval-samples 8"
BITS_NEED = "weights 13 GiB, gradients 13 GiB, optimizer 13.2 GiB, context 4 GiB"
FITS = [
    (139, 200, MATH, ["7.24B parameters", "activations 7.7", "context 4.6"]),
    (200, 200, f"{MATH} --model hub/Other-7B", ["7B parameters"]),  # no network
    (139, 200, CODE, ["training 13"]),
    (80, 200, BITS, [BITS_NEED, "training 43.3 GiB of 80 GiB"]),
    (139, 200, f"{MATH} --gpu-memory 0.38", []),
    (139, 200, f"{MATH} --gpu-memory 0.7 --offload-optimizer", []),
    (139, 40, MATH, ["host 35 GiB"]),
    (139, 200, MATH, ["estimated: 6.5 an iteration (balance 1.6, pool 3.6, training"]),
    (139, 200, f"{MATH} {SMALL}", [", 7 for 9\n"]),
    (139, 200, f"{MATH} --preflight --tokens-per-second 6900", ["balance 3.2, pool 7.2, training"]),
    # with its PRM, as in the paper
    (139, 200, "--task math --model hub/Mistral-7B", ["scoring 4.4", "host 48.5 GiB"]),
]
REFUSED = [
    (139, 200, f"{CODE} --token-budget 8192", "needs 142 GiB of 139 GiB; lower --token-budget"),
    (80, 200, f"{MATH} --model hub/Other-7B", "104 GiB of 80 GiB; take a larger GPU"),
    (139, 200, f"{MATH} --gpu-memory 0.4", "0.4: beside 81 GiB .* at most 0.39 of the"),
    (139, 30, MATH, "host needs 35 GiB of 30 GiB; take a larger"),
    (139, 40, f"{MATH} --offload-optimizer", "needs 88.9 GiB .*leave --offload-optimizer out"),
]


@pytest.mark.parametrize("card, host, flags, parts", FITS)
def test_the_preflight_says_what_fits(preflight_on, card, host, flags, parts):
    line = preflight_on(card, flags, host)
    assert all(part in line for part in parts), line
    assert ("activations" in line) == ("Other" not in flags)


@pytest.mark.parametrize("card, host, flags, message", REFUSED)
def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    preflight_on, card, host, flags, message
):
    with refused(message):
        preflight_on(card, flags, host)


def test_a_gated_model_says_what_to_do(monkeypatch):
    def gated(model):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with refused("^--model hub/gated: .*accept the terms .* `hf auth login`"):
        trainer.model_config("hub/gated")


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_nodes_proof_ends_ready(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), "--quick"]
    p = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert p.stdout.splitlines()[-1:] == ["ready"], p.stdout + p.stderr[-3000:]
    for what in ("canary's gap", "greedy tokens", "stops", "adamw, with", "checkpoint", "goes on"):
        assert what in p.stdout
