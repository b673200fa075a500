"""engine.py: both samplers against plain loops and softmax(logits / T), and the weight canary.

    pytest tests/test_engine.py            the transformers engine
    pytest -m vllm tests/test_engine.py    vLLM, in float32 on a CPU, where it is installed

What a CPU cannot show of vLLM: sleeping and waking the GPU's memory, CUDA graphs, bfloat16.
"""

import copy
import functools
import gzip
import json
import random
import re
from collections import Counter
from importlib.util import find_spec

import bench
import numpy as np
import pytest
import torch
from conftest import ROOT, refused, tiny_llama

import engine
import rewards
import train_prm
from config import Config, parse_config
from data import Query, Sample
from engine import HFEngine, VLLMEngine
from trainer import State, load_tokenizer, save

V = 64  # vocabulary
STOPS = [2, 9]
PROMPTS = [[1, 5, 6, 7], [1, 10], [1, 11, 30, 31, 32, 33, 34], [1, 40, 41]]
QUERIES = [Query(str(i), "", "") for i in range(10)]


def prompt_of(query: Query) -> list[int]:
    return [1, 10 + int(query.id)]


def make_policy(tied: bool = False, seed: int = 0):
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # vLLM takes no less
    ids = dict(bos_token_id=1, eos_token_id=3, tie_word_embeddings=tied, initializer_range=0.2)
    return tiny_llama("llama", seed, vocab_size=V, hidden_size=64, **heads, **ids)


def greedy(policy, ids: list[int], stops: list[int], max_tokens: int) -> tuple[list[int], str]:
    """A loop without cache, padding or batch: the tokens before the stop, the finish reason."""
    out = []
    while len(out) < max_tokens:
        with torch.no_grad():
            token = policy(torch.tensor([ids + out])).logits[0, -1].argmax().item()
        if token in stops:
            return out, "stop"
        out.append(token)
    return out, "length"


class Numbers:
    """A tokenizer whose texts are the token ids."""

    eos_token_id = 2

    def batch_decode(self, rows, **_) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def make_hf(out="", **settings) -> HFEngine:
    return HFEngine(Config(max_tokens=24, out=str(out), **settings), Numbers(), prompt_of, STOPS)


def ids_of(sample: Sample) -> list[int]:
    return [int(x) for x in sample.response.split()]


def process_state() -> list:
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    return [*states, torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(kind): an engine, and whether its start left the process alone; each is built once.

    vLLM's folder holds a config, and generation settings that are not to be obeyed.
    """

    @functools.cache
    def build(kind: str):
        if kind == "hf":
            return make_hf(), True
        folder = tmp_path_factory.mktemp("model")
        make_policy(kind == "tied").config.save_pretrained(folder)
        settings = {"temperature": 0.01, "top_k": 1, "eos_token_id": 4}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        cfg = Config(max_tokens=24, max_length=230, out=str(folder))
        before = process_state()
        vllm = VLLMEngine(cfg, Numbers(), prompt_of, STOPS, folder)
        return vllm, process_state() == before and vllm.policy is None

    return build


@pytest.fixture
def sampler(request, start):
    return start(request.param)[0]


@pytest.fixture
def policy(request):
    return make_policy(request.node.callspec.params["sampler"] == "tied")


# find_spec, not importorskip: importing vLLM takes ten seconds, also where it is deselected
missing = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
VLLM = [pytest.param(kind, marks=[pytest.mark.vllm, missing]) for kind in ("untied", "tied")]
both = pytest.mark.parametrize("sampler", ["hf", *VLLM], indirect=True)
vllm_only = pytest.mark.parametrize("sampler", VLLM, indirect=True)


@both
def test_greedy_equals_a_loop_without_cache_padding_or_batch(sampler, policy):
    sampler.wake(policy)
    for prompt, [s] in zip(PROMPTS, sampler.sample(PROMPTS, 1, 0.0, seed=0)):
        assert (ids_of(s), s.finish_reason) == greedy(policy, prompt, STOPS, 24)


@both
def test_a_seed_gives_the_same_responses_and_no_random_stream_is_shared(sampler, policy):
    sampler.wake(policy)
    twins = [PROMPTS[0]] * 3  # only the random streams can differ
    a, b, c = (sum(sampler.sample(twins, 4, 1.0, seed), []) for seed in (7, 7, 8))
    assert a == b and len({s.response for s in a}) == 12
    assert not {s.response for s in a} & {s.response for s in c}  # nor by the neighbouring seed


@both
def test_only_our_stop_tokens_end_a_response_and_max_tokens_cuts_it(sampler, policy):
    sampler.wake(policy)
    samples = sum(sampler.sample(PROMPTS, 64, 1.0, seed=0), [])
    reasons = Counter(s.finish_reason for s in samples)
    assert set(reasons) == {"stop", "length"} and min(reasons.values()) > 10
    for s in samples:
        assert not set(STOPS) & set(ids_of(s))
        assert (len(ids_of(s)) == 24) == (s.finish_reason == "length")
    inside = {t for s in samples for t in ids_of(s)[:-1]}
    assert {3, 4} <= inside  # the ends that config.json and generation_config.json name


@both
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_first_tokens_follow_softmax_of_logits_over_temperature(sampler, policy, temperature):
    """Chi-square of 4,000 first tokens: the whole distribution, no top-k, no top-p, no penalty."""
    sampler.wake(policy)
    [samples] = sampler.sample([PROMPTS[0]], 4000, temperature, seed=3)
    tokens = [[*ids_of(s), STOPS[0]][0] for s in samples]  # a stop token leaves no text
    seen = np.bincount(tokens, minlength=V)
    with torch.no_grad():
        logits = policy(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    p = (logits / temperature).softmax(-1).numpy()
    p[STOPS] = p[STOPS].sum(), 0
    want = p * len(tokens)
    often = want >= 5  # for rarer ones the chi-square does not hold
    chi2, df = ((seen - want) ** 2 / want.clip(1))[often].sum(), often.sum()
    assert df > 10 and chi2 < df + 4 * (2 * df) ** 0.5


def test_a_small_budget_takes_more_calls_and_gives_all_responses():
    small, large = make_hf(sample_budget=100), make_hf()
    assert len(list(small.calls(PROMPTS, 9))) > len(PROMPTS)  # n goes over several calls
    assert len(list(large.calls(PROMPTS, 9))) == 1
    for sampler in (small, large):
        sampler.wake(make_policy())
        assert [len(group) for group in sampler.sample(PROMPTS, 9, 1.0, seed=0)] == [9] * 4
    assert small.sample(PROMPTS, 1, 0.0, seed=0) == large.sample(PROMPTS, 1, 0.0, seed=0)


def test_a_full_gpu_names_the_flag_that_makes_room():
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    sampler = make_hf()
    sampler.loop = full
    with refused("the same command with a smaller --sample-budget goes on"):
        sampler.sample([[1, 5]], 1, 1.0, seed=0)


def test_an_engine_holds_a_policy_inside_the_block_only():
    sampler = make_hf()
    with pytest.raises(ZeroDivisionError), sampler.awake(make_policy()):
        assert sampler.policy is not None
        1 / 0
    assert sampler.policy is None


def draw(sampler):
    with sampler.awake(make_policy()) as draw:
        return draw(QUERIES, 2, 1.0, "iter1.pool")


def test_chunks_are_kept_and_not_drawn_again(tmp_path, monkeypatch):
    sampler = make_hf(tmp_path, chunk=4)
    first = draw(sampler)
    assert len(list(sampler.parts.iterdir())) == 3 and [len(group) for group in first] == [2] * 10
    (sampler.parts / "iter1.pool.4.jsonl.gz").unlink()
    sizes, sample = [], sampler.sample

    def counted(prompts, *args):
        sizes.append(len(prompts))
        return sample(prompts, *args)

    monkeypatch.setattr(sampler, "sample", counted)
    assert draw(sampler) == first and sizes == [4]


def test_a_damaged_chunk_is_told_and_drawn_again(tmp_path, capsys):
    sampler = make_hf(tmp_path)
    first = draw(sampler)
    [part] = sampler.parts.iterdir()
    whole = part.read_bytes()
    engine.write_chunk(part, [group[:1] for group in first])
    another_n = part.read_bytes()
    no_deflate = whole[:10] + b"\xff" * 20 + whole[30:]
    no_groups = gzip.compress(b"null\n" * 10)
    for damaged in (whole[:-20], no_deflate, b"", b"no gzip", another_n, no_groups):
        part.write_bytes(damaged)
        assert draw(sampler) == first and part.read_bytes() == whole
    assert capsys.readouterr().err.count(f"{part}: damaged; sampled again") == 6


def test_a_chat_models_turns_end_where_its_generation_config_says(tmp_path):
    assert engine.generation_ends(tmp_path) == []
    for ids, stops in ((7, [2, 3, 7]), ([7, 2, 8], [2, 3, 7, 8])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        made = engine.make_engine(Config(engine="hf"), Numbers(), None, tmp_path, [2, 3])
        assert made.stop_ids == stops


def train_a_little(policy):
    """A real AdamW step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    ids = torch.arange(20, 40)[None]
    policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", VLLM)
def test_vllm_starts_asleep_and_leaves_the_process_as_it_was(start, kind):
    vllm, left_alone = start(kind)
    assert left_alone
    vllm.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        vllm.generate(PROMPTS, 1, seed=0)


@vllm_only
def test_waking_brings_the_trained_weights_every_time_and_leaves_the_policy_alone(sampler, policy):
    """With tied embeddings `named_parameters` lacks lm_head, and vLLM keeps the old one."""
    long = [1] + list(range(10, 60)) * 4  # cached prefixes are blocks of 128 tokens on a CPU
    for _ in range(2):
        weights = copy.deepcopy(policy.state_dict())
        sampler.wake(policy)
        for prompts in (PROMPTS, [long]):
            assert sampler.check_canary(prompts) < 1e-4
        assert all(torch.equal(x, weights[name]) for name, x in policy.state_dict().items())
        train_a_little(policy)
        assert np.mean(sampler.canary_gaps(PROMPTS)) > 0.05  # no alias: the weights from before
        sampler.sleep()
    sampler.wake(policy)
    sampler.check_canary([long])


@vllm_only
def test_the_canary_stops_a_skipped_swap_before_a_sample_is_kept(sampler, policy, monkeypatch):
    sampler.wake(policy)
    train_a_little(policy)  # and no wake
    asked = QUERIES[:1], 2, 1.0, "iter1.pool"

    def forget(policy):
        sampler.policy, sampler.checked = policy, False

    with monkeypatch.context() as m:
        m.setattr(sampler, "wake", forget)
        with pytest.raises(RuntimeError, match="does not hold the policy's weights") as error:
            with sampler.awake(policy) as draw:
                draw(*asked)
    assert "\n" not in str(error.value) and not sampler.parts.exists()
    with sampler.awake(policy) as draw:
        assert [len(group) for group in draw(*asked)] == [2]


@vllm_only
def test_a_bar_counts_responses_and_vllm_prints_none_of_its_own(sampler, policy, capsys):
    from tqdm import tqdm

    sampler.wake(policy)
    with tqdm(total=16, desc="iter3.pool") as bar:
        for seed in range(2):
            sampler.sample(PROMPTS, 2, 1.0, seed, bar)
        assert bar.n == 16
    err = capsys.readouterr().err
    assert "iter3.pool: 100%" in err and "prompts" not in err


@vllm_only
def test_more_prompt_tokens_than_one_step_takes(sampler, policy):
    """Seeded requests, read in two parts, would fail on a CPU."""
    sampler.wake(policy)
    prompts = [[1, 10 + i % 50] + [7 + i // 50] * 98 for i in range(60)]  # 6,000, none cached
    assert [len(group) for group in sampler.sample(prompts, 2, 1.0, seed=0)] == [2] * 60


def save_prm(folder) -> rewards.PRM:
    """A PRM as train_prm.py keeps it, of random weights."""
    bench.make_llama(folder, [128, 64, 128, 2, 2, 1], scale=0.2)
    cfg = parse_config(["--separator", "w9"], train_prm.PRMConfig, train_prm.PRESETS)
    prm = train_prm.new_prm(folder, load_tokenizer(folder), "{query}", cfg)
    with torch.no_grad():
        prm.model.score.bias[:] = torch.tensor([0.5, -0.5])
    save(State(0, prm.model), folder, prm.tokenizer)
    return rewards.PRM.load(folder)


@pytest.mark.vllm
@missing
def test_the_pooling_runner_scores_steps_as_we_do(tmp_path, monkeypatch):
    """The snippet of docs/prm.md; then a batch that no prefix cache or scheduler may cut short."""
    import vllm as library

    prm, question = save_prm(tmp_path), " ".join(f"w{3 + i % 60}" for i in range(200))
    rng, responses = random.Random(0), []
    for _ in range(60):
        responses.append(" ; ".join(f"w{rng.randint(10, 63)}" for _ in range(rng.randint(2, 9))))
    scores = prm.score([question] * 60, responses)
    inputs = [prm.encode(question, rewards.split_steps(r)) for r in responses]

    names = {"folder": str(tmp_path), "ids": inputs[0][0], "places": inputs[0][1]}
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    small = functools.partial(library.LLM, enforce_eager=True, kv_cache_memory_bytes=1 << 30)
    monkeypatch.setattr(library, "LLM", small)
    text = (ROOT / "docs" / "prm.md").read_text()
    with engine.process_state_kept():
        exec(re.search(r"```python\n(import vllm.*?)```", text, re.S)[1], names)
    assert names["p"].tolist() == pytest.approx(scores[0], abs=1e-5)
    asked = [{"prompt_token_ids": ids} for ids, _ in inputs]
    outputs = names["llm"].encode(asked, pooling_task="token_classify", use_tqdm=False)
    for want, output, (_, places) in zip(scores, outputs, inputs, strict=True):
        assert output.outputs.data[places, 1].tolist() == pytest.approx(want, abs=1e-5)
    assert np.std(sum(scores, [])) > 0.05
