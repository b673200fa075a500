"""The vLLM engine, run for real on a CPU in float32 with tiny Llamas made on the spot (no download, no GPU).

    pytest -m vllm tests/test_vllm.py        # needs vLLM, e.g. the CPU build; half a minute on two free cores

What a CPU cannot show: sleeping and waking the GPU's memory, CUDA graphs, bfloat16 speed."""
import collections
import copy
import importlib.util
import json
import random

import numpy as np
import pytest
import torch

# find_spec, not importorskip: importing vLLM takes ten seconds, also where these tests are deselected
pytestmark = [pytest.mark.vllm,
              pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")]

V = 64                                  # vocabulary
STOPS = [2, 9]
PROMPTS = [[1, 5, 6, 7], [1, 10], [1, 11, 30, 31, 32, 33, 34], [1, 40, 41]]


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, V)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_policy(tied, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
                         tie_word_embeddings=tied, initializer_range=0.2,
                         bos_token_id=1, eos_token_id=3, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def make_engine(tmp_path, tied):
    """From a folder of two files: a config, and a generation_config that must not be obeyed."""
    from bstar import VLLMEngine
    make_policy(tied).config.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.01, "top_k": 1, "eos_token_id": 4}))
    return VLLMEngine(tmp_path, make_tokenizer(), dtype="float32", seed=0, stop_ids=STOPS,
                      max_model_len=256, cpu_kv_gib=1)


def process_state():
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype())


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def started(request, tmp_path_factory):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = process_state()
    engine = make_engine(tmp_path_factory.mktemp("model"), request.param)
    return engine, request.param, before == process_state(), engine.awake


@pytest.fixture
def engine(started):
    return started[0]


@pytest.fixture
def policy(started):
    return make_policy(started[1])


def train_a_little(policy, steps=5, lr=3e-3):
    """Really train: a few AdamW steps on one repeated sentence."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    ids = torch.arange(20, 40)[None]
    policy.train()
    for _ in range(steps):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


def texts(samples):
    return [tuple(s.tokens) for row in samples for s in row]


def test_start_leaves_the_process_as_it_was(started):
    assert started[2], "random states, thread count, set_num_threads or default dtype changed"


def test_asleep_until_woken(started, engine, policy):
    assert not started[3]
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(PROMPTS, 1, 1.0, 4, seed=0)
    engine.wake(policy)
    assert len(engine.generate(PROMPTS, 1, 1.0, 4, seed=0)) == len(PROMPTS)


def test_greedy_equals_transformers_token_for_token(engine, policy):
    engine.wake(policy)
    for prompt, [s] in zip(PROMPTS, engine.generate(PROMPTS, 1, 0, 24, seed=0)):
        out = policy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=STOPS)
        want = out[0, len(prompt):].tolist()
        assert s.tokens == [t for t in want if t not in STOPS]
        assert s.finish_reason == ("stop" if want[-1] in STOPS else "length")


def test_wake_brings_the_trained_weights(engine, policy):
    from bstar import canary_gap
    engine.wake(policy)
    assert canary_gap(engine, policy, PROMPTS, seed=0)[1] < 1e-3
    for _ in range(2):                  # twice: a second swap must work like the first
        train_a_little(policy)
        assert canary_gap(engine, policy, PROMPTS, seed=0)[0] > 0.05      # still the weights from before
        engine.sleep()
        engine.wake(policy)
        assert canary_gap(engine, policy, PROMPTS, seed=0)[1] < 1e-3


def test_waking_does_not_touch_or_alias_the_policy(engine, policy):
    before = copy.deepcopy(policy.state_dict())
    engine.wake(policy)
    samples = engine.generate(PROMPTS, 2, 1.0, 8, seed=0, logprobs=True)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
    again = engine.generate(PROMPTS, 2, 1.0, 8, seed=0, logprobs=True)
    assert texts(again) == texts(samples)


def test_a_new_policy_does_not_meet_the_old_ones_prefix_cache(started, engine, policy):
    from bstar import canary_gap
    prompts = [[1] + list(range(10, 60)) * 4]      # longer than one cache block, which on a CPU is 128 tokens
    engine.wake(policy)
    engine.generate(prompts, 4, 1.0, 4, seed=0)
    other = make_policy(started[1], seed=1)
    engine.wake(other)
    assert canary_gap(engine, other, prompts, seed=0)[1] < 1e-3


def test_seeds(engine, policy):
    engine.wake(policy)
    twins = [PROMPTS[0]] * 3            # the same prompt thrice: only the random streams can differ
    a, b, c = (texts(engine.generate(twins, 4, 1.0, 16, seed)) for seed in (7, 7, 8))
    assert a == b
    assert len(set(a)) == 12            # streams are spaced: none is shared within or between prompts
    assert not set(a) & set(c)          # nor by the neighbouring seed


def test_a_stop_token_ends_a_response_and_max_tokens_cuts_it(engine, policy):
    engine.wake(policy)
    samples = [s for row in engine.generate(PROMPTS, 64, 1.0, 24, seed=0) for s in row]
    reasons = collections.Counter(s.finish_reason for s in samples)
    assert set(reasons) == {"stop", "length"} and min(reasons.values()) > 10
    for s in samples:
        assert not set(STOPS) & set(s.tokens)
        assert len(s.tokens) == 24 if s.finish_reason == "length" else len(s.tokens) < 24
        assert s.logprobs is None
    texts_ = [s for row in engine.sample(PROMPTS, 64, 1.0, 24, seed=0) for s in row]      # the same draws, as the loop sees them
    assert [t.response for t in texts_] == [engine.tokenizer.decode(s.tokens, skip_special_tokens=True) for s in samples]
    assert [t.finish_reason for t in texts_] == [s.finish_reason for s in samples]
    seen = {t for s in samples for t in s.tokens[:-1]}
    assert {3, 4} <= seen               # eos of config.json and generation_config.json: not ours, so they end nothing


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_models_distribution(engine, policy, temperature):
    """Chi-square of 4,000 first tokens against softmax(logits / T): the whole distribution, no top-k, no top-p."""
    engine.wake(policy)
    n = 4000
    [row] = engine.generate([PROMPTS[0]], n, temperature, 1, seed=0)
    with torch.no_grad():
        p = (policy(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1).double().numpy()
    seen = np.zeros(V)
    for s in row:                       # a stop token as first token leaves no token: count both in one cell
        seen[s.tokens[0] if s.tokens else STOPS[0]] += 1
    p[STOPS[0]] += p[STOPS[1]]
    p[STOPS[1]] = 0
    rare = n * p < 5
    seen, want = np.append(seen[~rare], seen[rare].sum()), n * np.append(p[~rare], p[rare].sum())
    chi2, df = ((seen - want) ** 2 / want.clip(1)).sum(), len(want) - 1
    assert df > 10 and chi2 < df + 4 * (2 * df) ** 0.5


def test_logprobs_are_the_policys_at_temperature_1(engine, policy):
    engine.wake(policy)
    samples = engine.generate(PROMPTS, 2, 0.5, 8, seed=0, logprobs=True)
    for prompt, row in zip(PROMPTS, samples):
        for s in row:
            with torch.no_grad():
                logp = policy(input_ids=torch.tensor([prompt + s.tokens])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            want = [logp[i, t].item() for i, t in enumerate(s.tokens)]
            assert s.logprobs == pytest.approx(want, abs=1e-3)


def test_canary_passes_the_right_weights_and_stops_a_skipped_swap(engine, policy):
    from bstar import check_canary
    engine.wake(policy)
    assert check_canary(engine, policy, PROMPTS, seed=0) < 1e-4
    train_a_little(policy, steps=1)     # one optimizer step later, and no wake
    with pytest.raises(RuntimeError, match="does not hold the policy's weights") as error:
        check_canary(engine, policy, PROMPTS, seed=0)
    assert "\n" not in str(error.value)


def test_canary_stops_a_stale_head(started, engine, policy):
    """With tied embeddings `named_parameters` lacks lm_head, and vLLM keeps the old one: only a log line says so."""
    from bstar import check_canary
    if not started[1]:
        pytest.skip("untied embeddings name lm_head")
    engine.wake(policy)
    other = make_policy(tied=True, seed=1)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(other.named_parameters())})
    engine.llm.reset_prefix_cache()
    with pytest.raises(RuntimeError, match="does not hold the policy's weights"):
        check_canary(engine, other, PROMPTS, seed=0)
    engine.wake(other)
    check_canary(engine, other, PROMPTS, seed=0)


def test_a_run_whose_swap_is_skipped_stops_before_it_keeps_a_sample(engine, policy, tmp_path, monkeypatch):
    """`bstar.sample` itself, with an engine that wakes up and reloads nothing."""
    import bstar
    from data import Query
    engine.wake(policy)
    train_a_little(policy, steps=1)
    job = bstar.Job("iter1.pool", [Query("0", "", "")], 2, 1.0)
    run = lambda: bstar.sample(engine, policy, [job], lambda q: PROMPTS[0], bstar.parse_config(["--max-tokens", "4"]), tmp_path, "x")
    with monkeypatch.context() as m:
        m.setattr(engine, "wake", lambda policy: None)
        with pytest.raises(RuntimeError, match="does not hold the policy's weights"):
            run()
    assert not list(tmp_path.iterdir()) and len(run()[0][0]) == 2


def test_canary_leaves_the_policys_mode_alone(engine, policy):
    from bstar import canary_gap
    policy.train()
    engine.wake(policy)
    canary_gap(engine, policy, PROMPTS, seed=0)
    assert policy.training


def test_a_bar_counts_responses_and_vllm_prints_none_of_its_own(engine, policy, capsys):
    from tqdm import tqdm
    engine.wake(policy)
    with tqdm(total=16, desc="iter 3 gen") as bar:
        for seed in range(2):
            engine.generate(PROMPTS, 2, 1.0, 4, seed, bar)
        assert bar.n == 16
    err = capsys.readouterr().err
    assert "iter 3 gen: 100%" in err and "prompts" not in err


def test_more_prompt_tokens_than_one_step_takes(engine, policy):
    """Seeded requests whose prompts overflow a scheduler step: read in two parts they would fail on a CPU."""
    engine.wake(policy)
    prompts = [[1, 10 + i % 50] + [7 + i // 50] * 98 for i in range(60)]      # 6,000 tokens, none cached before
    assert [len(g) for g in engine.sample(prompts, 2, 1.0, 4, seed=0)] == [2] * 60


def test_the_pooling_runner_scores_steps_as_we_do(tmp_path, monkeypatch):
    """README's snippet on a folder that train_prm.py writes; then a batch with one long question, which no prefix cache or scheduler step may cut short."""
    import functools, re
    from pathlib import Path
    import vllm
    import bstar, rewards, train_prm
    make_policy(False).save_pretrained(tmp_path / "base")
    cfg = bstar.parse_config(["--separator", "w9"], train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)
    prm = train_prm.new_prm(tmp_path / "base", make_tokenizer(), "{query}", cfg)
    with torch.no_grad():
        prm.model.score.bias[:] = torch.tensor([0.5, -0.5])
    bstar.save_checkpoint(tmp_path / "prm", prm.model, prm.tokenizer, None, {})
    names = {"folder": str(tmp_path / "prm"), "question": "w10 w11", "response": "w12 w13 ; w14"}
    ours = rewards.PRM.load(names["folder"])
    names["ids"], names["places"] = ours.encode(names["question"], rewards.split_steps(names["response"]))
    for key, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_NO_USAGE_STATS", "1")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, enforce_eager=True, kv_cache_memory_bytes=1 << 30))
    with bstar.process_state_kept():
        exec(re.search(r"```python\n(import vllm.*?)```", (Path(bstar.__file__).parent / "README.md").read_text(), re.S)[1], names)
    assert names["p"].tolist() == pytest.approx(ours.score([names["question"]], [names["response"]])[0], abs=1e-5) and len(names["p"]) == 2
    rng, long = random.Random(0), " ".join(f"w{3 + i % 60}" for i in range(200))
    responses = [" ; ".join(f"w{rng.randint(3, 63)} w{rng.randint(3, 63)}" for _ in range(rng.randint(1, 6))) for _ in range(60)]
    inputs = [ours.encode(long, rewards.split_steps(r)) for r in responses]
    outputs = names["llm"].encode([{"prompt_token_ids": ids} for ids, _ in inputs], pooling_task="token_classify", use_tqdm=False)
    for want, o, (_, places) in zip(ours.score([long] * 60, responses), outputs, inputs, strict=True):
        assert o.outputs.data[places, 1].tolist() == pytest.approx(want, abs=1e-5)
    assert 0.05 < np.std([x for s in ours.score([long] * 60, responses) for x in s])
