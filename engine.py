"""Who samples: vLLM inside this process with sleep-mode weight swaps, or a short PyTorch loop over the policy itself."""
from __future__ import annotations

import gzip
import io
import json
import os
import random
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np

import data
from config import Config
from data import Query, Sample, UserError
from trainer import autocast, beside, device, memory_by, n_parameters, needs, seed_of, token_nll, write


class HFEngine:
    """Samples from the policy itself, in plain PyTorch on a transformers cache: no start-up, no copy of the weights, nothing to go stale."""

    def __init__(self, tokenizer, stop_ids: list[int], budget: int):
        self.tokenizer, self.stop_ids, self.budget, self.policy = tokenizer, stop_ids, budget, None

    def wake(self, policy) -> None:
        """Takes the policy to sample from."""
        self.policy = policy.eval()

    def sleep(self) -> None:
        """Lets go of the policy."""
        self.policy = None

    @memory_by("a smaller --sample-budget")
    def sample(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int, bar=None) -> list[list[Sample]]:
        """n responses to each prompt (token ids) from the whole distribution at `temperature`; 0 = greedy. The same seed, the same samples."""
        groups: list[list[Sample]] = [[] for _ in prompts]
        for call, (rows, copies) in enumerate(self._calls(prompts, n, max_tokens)):
            responses = self._generate([prompts[i] for i in rows], copies, temperature, max_tokens, seed + call)
            for k, s in enumerate(responses):
                groups[rows[k // copies]].append(s)
            if bar is not None:
                bar.update(len(responses))
        return groups

    def _calls(self, prompts: list[list[int]], n: int, max_tokens: int) -> Iterator[tuple[list[int], int]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))        # longest first, little padding
        while order:
            fit = max(1, self.budget // (len(prompts[order[0]]) + max_tokens))     # sequences held at once
            rows, order = order[:max(1, fit // n)], order[max(1, fit // n):]
            for done in range(0, n, fit):
                yield rows, min(fit, n - done)

    def _generate(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int) -> list[Sample]:
        """One batch. Two things `generate` does not do make it 2-3 times faster: a prompt is read once for its n responses, and
        responses that have ended leave the batch."""
        import torch
        from transformers import DynamicCache
        L, dev, inner = max(map(len, prompts)), self.policy.device, self.policy.base_model
        ids = torch.tensor([[0] * (L - len(p)) + p for p in prompts], device=dev)                               # (B, L)
        mask = torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompts], device=dev)
        tokens = torch.full((len(prompts) * n, max_tokens), self.stop_ids[0], device=dev)                       # (B n, max_tokens)
        stops, live, cache = torch.tensor(self.stop_ids, device=dev), torch.arange(len(tokens), device=dev), DynamicCache(config=self.policy.config)
        generator = torch.Generator(dev).manual_seed(seed)
        with torch.inference_mode(), autocast(cache=True):
            hidden = inner(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
                           use_cache=True).last_hidden_state[:, -1].repeat_interleave(n, 0)
            cache.batch_repeat_interleave(n)
            mask, ended = mask.repeat_interleave(n, 0), torch.zeros(len(tokens), dtype=torch.bool, device=dev)
            for step in range(max_tokens):
                logits = self.policy.get_output_embeddings()(hidden).float()                                    # (rows, vocabulary)
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0] if temperature else logits.argmax(-1)
                tokens[live, step] = torch.where(ended, self.stop_ids[0], token)
                ended = ended | torch.isin(token, stops)
                if ended.float().mean() > 0.2 or step + 1 == max_tokens:                                        # not every step: a copy costs
                    stay = (~ended).nonzero()[:, 0]
                    live, token, mask, ended = live[stay], token[stay], mask[stay], ended[stay]
                    if not len(stay) or step + 1 == max_tokens:
                        break
                    cache.batch_select_indices(stay)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                hidden = inner(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache,
                               use_cache=True).last_hidden_state[:, -1]
        cut_off, rows = set(live.tolist()), [r[:next((i for i, t in enumerate(r) if t in self.stop_ids), None)] for r in tokens.tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Sample(text, "length" if i in cut_off else "stop") for i, text in enumerate(texts)]


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undoes what starting vLLM does to the whole process: it reseeds python, numpy and torch; on a CPU it also changes the thread count,
    replaces torch.set_num_threads by a stub and sets LD_PRELOAD for children."""
    import torch
    states, cuda = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.cuda.is_available() and torch.cuda.get_rng_state_all()
    threads, set_num_threads, preload = torch.get_num_threads(), torch.set_num_threads, os.environ.get("LD_PRELOAD")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        os.environ.pop("LD_PRELOAD", None) if preload is None else os.environ.update(LD_PRELOAD=preload)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class Draft(NamedTuple):
    """One response as vLLM returns it: ids without the stop token, "stop" or "length", log-probabilities where asked for."""
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None


class VLLMEngine:
    """vLLM inside this process: weights pass by reference, nothing goes through disk. Built before the trainer, it starts asleep and empty.

    model_dir         only its config.json is read: no weights, no tokenizer
    dtype             "bfloat16" on a GPU; "float32" on a CPU, where sleep frees nothing
    stop_ids          the only tokens that end a response, whatever (generation_)config.json says
    gpu_memory        share of the GPU's whole memory; must be free now and at every `wake`
    cpu_kv_gib        KV cache on a CPU; VLLM_CPU_KVCACHE_SPACE (whole GiB) overrides it
    """

    def __init__(self, model_dir, tokenizer, *, dtype: str, seed: int, stop_ids: list[int], max_model_len: int, gpu_memory: float = 0.9,
                 max_num_seqs: int = 1024, cpu_kv_gib: int = 2):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                          # the engine lives in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.tokenizer, self.dtype, self.stop_ids, self.gpu = tokenizer, dtype, list(stop_ids), device() == "cuda"
        memory = (dict(enable_sleep_mode=True, gpu_memory_utilization=gpu_memory, max_num_seqs=max_num_seqs, max_cudagraph_capture_size=max_num_seqs)
                  if self.gpu else dict(enforce_eager=True, kv_cache_memory_bytes=cpu_kv_gib << 30,
                                        # a prompt read in two parts rewinds its generator, which torch's CPU generators can't
                                        enable_chunked_prefill=False, max_num_batched_tokens=max(4096, max_model_len)))
        with process_state_kept():
            from vllm import LLM
            self.llm = LLM(str(model_dir), load_format="dummy", skip_tokenizer_init=True, seed=seed, dtype=dtype, max_model_len=max_model_len,
                           generation_config="vllm", **memory)
        self.awake = True
        self.sleep()

    @memory_by("a smaller --gpu-memory")
    def wake(self, policy) -> None:
        """Memory for the weights, the policy's weights into it, memory for the KV cache: in this order the peak is lowest.

        The weights are state_dict's: named_parameters would name tied embeddings once and leave lm_head stale.
        """
        if self.gpu and not self.awake:
            import torch
            torch.cuda.empty_cache()                                               # vLLM's memory is not torch's: what training has freed goes back first
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(policy.state_dict().items())})
        if self.gpu and not self.awake:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()                                              # no cached prefix outlives the weights that made it
        self.awake = True

    def sleep(self) -> None:
        """Frees the GPU of weights and KV cache (level 2: nothing is kept, so nothing stale can be sampled)."""
        if self.gpu and self.awake:
            self.llm.sleep(level=2)
        self.awake = False

    def generate(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int, bar=None, logprobs: bool = False
                 ) -> list[list[Draft]]:
        """n responses a prompt (token ids) from the whole distribution; no two of them, nor calls of different seeds, share a random stream.

        temperature 0 is greedy, with n = 1; logprobs are those at temperature 1. raises RuntimeError between sleep and wake
        """
        if not self.awake:
            raise RuntimeError("the sampling engine is asleep and holds no policy: call engine.wake(policy) first")
        from vllm import SamplingParams
        first = int(np.random.SeedSequence(seed).generate_state(1)[0])             # child j of prompt i draws from seed first + i n + j
        params = [SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens, seed=first + i * n, stop_token_ids=self.stop_ids,
                                 ignore_eos=True, detokenize=False, logprobs=0 if logprobs else None) for i in range(len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False if bar is None else forward_to(bar))
        return [[self._draft(o) for o in output.outputs] for output in outputs]

    def _draft(self, output) -> Draft:
        tokens = list(output.token_ids)[:-1 if output.finish_reason == "stop" else None]       # vLLM leaves the stop token in
        return Draft(tokens, output.finish_reason, output.logprobs and [row[t].logprob for row, t in zip(output.logprobs, tokens)])

    def sample(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int, bar=None) -> list[list[Sample]]:
        """As HFEngine.sample: n responses to each prompt, as text."""
        return [[Sample(self.tokenizer.decode(d.tokens, skip_special_tokens=True), d.finish_reason) for d in drafts]
                for drafts in self.generate(prompts, n, temperature, max_tokens, seed, bar)]


def forward_to(bar):
    """What vLLM takes for use_tqdm, moving our own bar: its bar over prompts being read is left out, its bar over responses prints nowhere."""
    from tqdm import tqdm

    class Forward(tqdm):
        def update(self, n=1):
            bar.update(n)
            return super().update(n)
    return lambda *args, **kwargs: args[0] if args else Forward(**{**kwargs, "file": io.StringIO(), "dynamic_ncols": False})


CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}   # mean nats a token; with the right weights 1e-6 and 0.007 were measured on a CPU


def canary_gap(engine: VLLMEngine, policy, prompts: list[list[int]], seed: int) -> tuple[float, float]:
    """(mean, max) over tokens of |log p_engine - log p_policy|, on one short response a prompt."""
    import torch
    training, gaps = policy.training, []
    policy.eval()
    for prompt, [d] in zip(prompts, engine.generate(prompts, 1, 1.0, 16, seed, logprobs=True)):
        if d.tokens:
            with torch.no_grad():
                logp = -token_nll(policy, [prompt + d.tokens], [len(prompt)]).cpu()            # (response,)
            gaps += (logp - torch.tensor(d.logprobs)).abs().tolist()
    policy.train(training)
    return (float(np.mean(gaps)), float(np.max(gaps))) if gaps else (0.0, 0.0)


def check_canary(engine: VLLMEngine, policy, prompts: list[list[int]], seed: int) -> float:
    """Stops a run whose engine does not hold this very policy: sampling from stale weights is silent otherwise.

    returns the mean gap in nats a token; raises RuntimeError above CANARY_TOLERANCE
    """
    mean, worst = canary_gap(engine, policy, prompts, seed)
    if not mean <= CANARY_TOLERANCE[engine.dtype]:                                 # NaN included
        raise RuntimeError(f"the sampling engine does not hold the policy's weights: log-probabilities of its samples differ by {mean:.3g} nats "
                           f"a token (max {worst:.3g}), {CANARY_TOLERANCE[engine.dtype]:g} is allowed")
    return mean


def stop_ids(tokenizer, model: str | Path) -> list[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation config (chat models end turns with another)."""
    from transformers import GenerationConfig
    try:
        more = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        more = None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def gpu_share(cfg: Config, model: str | Path) -> float:
    """What the trainer leaves of the GPU while vLLM is awake: its weights, its optimizer (see `beside`) and 8 GiB stay."""
    import torch
    n, total = n_parameters(str(model)), torch.cuda.get_device_properties(0).total_memory if device() == "cuda" else 0
    if not total or n is None:
        return 0.4
    need = needs(cfg, n, None, True)
    held = beside(cfg, need)
    share = (total - held - 2**33) / total
    if share * total < 2.5 * n:
        raise UserError(f"--model {model}: beside {held / 2**30:.0f} GiB of weights and optimizer vLLM has no room on a GPU of {total / 2**30:.0f} GiB; "
                        f"take a larger GPU, {'--offload-optimizer, ' * (held > need['weights'])}a smaller --model, or --engine hf")
    return round(share, 3)


def make_engine(cfg: Config, tokenizer, model: str | Path):
    """The sampler. vLLM is built before the trainer takes memory, and put to sleep at once   [README, "vLLM and the swap"]"""
    stops = stop_ids(tokenizer, model)
    if cfg.engine == "hf" or cfg.engine == "auto" and not (device() == "cuda" and find_spec("vllm")):
        return HFEngine(tokenizer, stops, cfg.sample_budget)
    return VLLMEngine(model, tokenizer, dtype="bfloat16" if device() == "cuda" or cfg.optim == "adamw8bit" else "float32", seed=cfg.seed, stop_ids=stops,
                      max_model_len=cfg.max_length + cfg.max_tokens, gpu_memory=cfg.gpu_memory or gpu_share(cfg, model))


class Job(NamedTuple):
    """One batch of sampling: n responses to each query at a temperature, kept under parts/NAME until the iteration is written."""
    name: str
    queries: list[Query]
    n: int
    temperature: float


def sample(engine, policy, jobs: Sequence[Job], prompt: Callable[[Query], list[int]], cfg: Config, parts: Path, desc: str) -> list[list[list[Sample]]]:
    """Wakes the engine with the policy's weights, runs the jobs in chunks that survive a kill, puts the engine to sleep.

    returns  for each job, for each of its queries, n Samples (text and finish_reason)
    """
    if not jobs:
        return []
    bar = data.progress(sum(len(j.queries) * j.n for j in jobs), desc)
    engine.wake(policy)
    if isinstance(engine, VLLMEngine):             # it holds a copy of the weights, and a copy can be stale
        check_canary(engine, policy, [prompt(q) for q in jobs[0].queries[:4]], cfg.seed)
    results = []
    for job in jobs:
        groups: list[list[Sample]] = []
        for k in range(0, len(job.queries), cfg.chunk):
            queries, part = job.queries[k:k + cfg.chunk], parts / f"{job.name}.{k}.jsonl.gz"
            if part.exists():
                chunk = [[Sample(**s) for s in json.loads(line)] for line in gzip.decompress(part.read_bytes()).decode().splitlines()]
                bar.update(len(queries) * job.n)
            else:
                with data.unbroken():
                    chunk = engine.sample([prompt(q) for q in queries], job.n, job.temperature, cfg.max_tokens, seed_of(cfg.seed, job.name, k), bar)
                    lines = (json.dumps([{"response": s.response, "finish_reason": s.finish_reason} for s in g]) for g in chunk)
                    write(part, gzip.compress("\n".join(lines).encode(), 3, mtime=0))
            groups += chunk
        results.append(groups)
    engine.sleep()
    bar.close()
    return results
