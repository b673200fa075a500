"""Architectures: right, refused with one line, or sampled through the model's own generate."""

import pytest
import torch
import transformers
from conftest import refused, tiny_llama
from test_engine import STOPS, Numbers, greedy, ids_of

import trainer
from config import Config
from engine import HFEngine
from trainer import State, load_policy, save

# of unequal lengths: padded on the left, and some rows end early
PROMPTS = [[4, 30, 7, 19, 5, 28], [8, 40], [33, 12, 3], [6], [5, 31, 22, 17]]
LOUD = dict(initializer_range=0.3, bos_token_id=1, eos_token_id=3, pad_token_id=0)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
MLA |= dict(n_group=1, topk_group=1)
EXPERTS = dict(moe_intermediate_size=32, num_experts_per_tok=2)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_value_heads=4)
HYBRID = dict(num_hidden_layers=4, linear_num_key_heads=2, **LINEAR)
MAMBA = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=4)
RIGHT = dict.fromkeys("llama mixtral qwen2 gpt2 gpt_neox phi3 granite".split(), {}) | {
    "mistral": dict(sliding_window=4),
    "qwen3": dict(head_dim=8),
    "qwen3_5_text": dict(head_dim=16, **HYBRID),
    "qwen3_next": dict(head_dim=16, num_experts=4, **HYBRID, **EXPERTS),
    "deepseek_v3": dict(num_key_value_heads=4, n_routed_experts=4, **MLA, **EXPERTS),
    "llama4_text": dict(intermediate_size_mlp=64, head_dim=8, num_local_experts=2),
    "falcon_h1": MAMBA,
    "gemma": dict(head_dim=8),
    "gemma3_text": dict(head_dim=8),
}
BY_GENERATE = {
    "mamba": dict(state_size=8),
    "deepseek_v4": dict(num_key_value_heads=4, n_routed_experts=4, **MLA, **EXPERTS),
    "minimax": dict(head_dim=8, block_size=4),
    "openai-gpt": {},
}
# xmod wants to know the language
WRONG = dict.fromkeys("cohere modernbert-decoder bert bert-generation roberta xmod".split(), {}) | {
    "gemma2": dict(head_dim=8, initializer_range=0.02),
    "granite": dict(logits_scaling=8.0),
    "falcon_h1": dict(lm_head_multiplier=0.5, **MAMBA),
    "inkling_text": dict(n_routed_experts=4, head_dim=8, **EXPERTS),
    "recurrent_gemma": dict(lru_width=32, attention_window_size=8),
    "bart": dict(d_model=32, decoder_attention_heads=4, decoder_layers=2),
}


def load(folder, kind: str, settings: dict):
    """A model of random weights, as a run would load it."""
    tiny_llama(kind, **{**LOUD, **settings}).save_pretrained(folder)
    return load_policy(Config(), folder)


def sampler_of(policy) -> HFEngine:
    sampler = HFEngine(Config(max_tokens=16), Numbers(), None, STOPS)
    sampler.wake(policy)
    return sampler


def check_greedy(sampler: HFEngine) -> None:
    for prompt, [s] in zip(PROMPTS, sampler.sample(PROMPTS, 1, 0.0, seed=0)):
        assert (ids_of(s), s.finish_reason) == greedy(sampler.policy, prompt, STOPS, 16)


@pytest.mark.parametrize("kind", [*RIGHT, *BY_GENERATE])
def test_loss_and_samples_are_those_of_the_plainest_code(tmp_path, kind, capsys):
    policy = load(tmp_path, kind, {**RIGHT, **BY_GENERATE}[kind])
    row = [4, 30, 7, 19, 5, 28, 41, 9]
    with torch.no_grad():
        logp = policy(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        nll = trainer.token_nll(policy, [row, row[:4]], [2, 1])
    want = [-logp[i - 1, row[i]].item() for i in [2, 3, 4, 5, 6, 7, 1, 2, 3]]
    assert nll.tolist() == pytest.approx(want, abs=1e-3)

    sampler = sampler_of(policy)
    loops = {True: sampler.model_loop, False: sampler.own_loop}
    assert sampler.loop == loops[kind in BY_GENERATE]
    slower = f"{type(policy).__name__}: sampled by its own generate, slower: "
    assert (slower in capsys.readouterr().err) == (kind in BY_GENERATE)
    check_greedy(sampler)
    state = torch.get_rng_state()
    a, b, c = (sampler.sample(PROMPTS, 4, 1.0, seed) for seed in (7, 7, 8))
    assert a == b != c and [len(group) for group in a] == [4] * len(PROMPTS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_models_are_refused_in_one_line(tmp_path, kind):
    reason = "its own loss is not the one here|its loss ends in ValueError: Input language"
    with refused(f"--model .*: ({reason}).*; take a decoder such as"):
        load(tmp_path, kind, WRONG[kind])


def test_generate_samples_the_whole_distribution_whatever_the_model_prefers():
    policy = tiny_llama(vocab_size=200, **LOUD)  # generate's own top_k is 50
    policy.generation_config = transformers.GenerationConfig(top_k=2, repetition_penalty=9.0)
    sampler = sampler_of(policy)
    logits = policy(torch.tensor(PROMPTS[:1])).logits[0, -1]
    for T in (0.5, 2.0):
        tokens = sampler.model_loop(PROMPTS[:1], 4000, T, seed=0, max_tokens=1)[:, 0]
        share = torch.bincount(tokens, minlength=200) / 4000
        assert (share - (logits / T).softmax(-1)).abs().sum() < 0.3
    sampler.loop = sampler.model_loop
    check_greedy(sampler)
    assert policy.generation_config.repetition_penalty == 9.0


def test_a_model_that_neither_loop_samples_right_is_refused(tmp_path):
    policy = load(tmp_path, "rwkv", {})  # it reads padding like any token
    with refused("RwkvForCausalLM can't be sampled .* take --engine vllm"):
        sampler_of(policy)


def test_the_self_tests_run_once_and_not_at_a_checkpoint(toy, tmp_path, monkeypatch):
    losses, loops = [], []
    monkeypatch.setattr(trainer, "check_loss", lambda policy, model: losses.append(model))
    policy = load_policy(toy.cfg, toy.start)
    policy.save_pretrained(tmp_path / "foreign")
    save(State(1, policy), tmp_path / "ours", toy.setup.tokenizer)
    for name in ("foreign", "ours"):
        load_policy(toy.cfg, tmp_path / name)
    assert losses == [tmp_path / "foreign"]

    monkeypatch.setattr(HFEngine, "is_greedy", lambda self, loop: loops.append(loop) or True)
    sampler = sampler_of(policy)
    sampler.wake(toy.policy())
    assert len(loops) == 1
