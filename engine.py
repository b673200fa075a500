"""Who samples: vLLM inside this process with sleep-mode weight swaps, or a short PyTorch loop.

with engine.awake(policy) as draw:                       # weights in, KV cache up
    groups = draw(queries, n, temperature, name)         # n responses to each query
                                                         # both dropped again: the trainer's turn
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import os
import random
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import data
import ranks
import trainer
from config import Config
from data import Query, Sample, UserError


class Engine:
    """What both engines share: prompts, and chunks of samples that survive a kill.

    An engine has three more methods: wake(policy) takes the weights, sleep() lets go of them,
    sample(prompts, n, temperature, seed, bar) returns n Samples of each prompt.
    """

    checked = True  # False after a swap that the canary has not tried

    def __init__(self, cfg: Config, tokenizer, prompt: Callable, stop_ids: list[int]):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.prompt = prompt  # query -> ids
        self.stop_ids = stop_ids  # the only tokens that end a response
        # sampled chunks, until their iteration is written
        self.parts = Path(cfg.out) / "parts"

    @contextmanager
    def awake(self, policy) -> Iterator[Callable[..., list[list[Sample]]]]:
        """Holds the policy's weights inside the block; hands out `draw`."""
        self.wake(policy)
        try:
            yield self.draw
        finally:
            self.sleep()

    def draw(
        self, queries: list[Query], n: int, temperature: float, name: str, prompt=None
    ) -> list[list[Sample]]:
        """n responses to each query from the whole distribution; temperature 0 is greedy.

        The same seed, name and policy give the same responses. Every --chunk queries are kept in
        parts/NAME until the iteration is written, so that a kill loses one chunk at most. Several
        processes sample a chunk each in turn, and all read all chunks there.

        prompt  query -> ids, where it is not the engine's own
        """
        prompt = prompt or self.prompt
        # once a swap, on real prompts, before the first response is kept
        if queries and not self.checked:
            self.check_canary([prompt(q) for q in queries[:4]])
            self.checked = True
        bar, parts = data.progress(len(queries) * n, name), []
        for turn, k in enumerate(range(0, len(queries), self.cfg.chunk)):
            asked = queries[k : k + self.cfg.chunk]
            parts.append(self.parts / f"{name}.{k}.jsonl.gz")
            if turn % ranks.WORLD != ranks.RANK or is_whole(parts[-1], len(asked), n):
                bar.update(len(asked) * n)
                continue
            # a seed of the chunk's own: chunks drawn before a kill have no say in those after it
            seed = trainer.seed_of(self.cfg.seed, name, k)
            groups = self.sample([prompt(q) for q in asked], n, temperature, seed, bar)
            write_chunk(parts[-1], groups)
        bar.close()
        ranks.wait()
        groups = []
        # all are read back, also those just written: a run that goes on takes the same path
        for part in parts:
            groups += read_chunk(part)
        return groups

    def as_samples(self, rows: list[list[int]]) -> list[Sample]:
        """Sampled tokens as text; a row without a stop token was cut off."""
        ended = [up_to_stop(row, self.stop_ids) for row in rows]
        # nothing was cut off behind a stop token, so there was none
        reasons = ["length" if short == row else "stop" for short, row in zip(ended, rows)]
        texts = self.tokenizer.batch_decode(ended, skip_special_tokens=True)
        return [Sample(text, reason) for text, reason in zip(texts, reasons)]


def up_to_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, row))


def write_chunk(part: Path, groups: list[list[Sample]]) -> None:
    """One line a query: [response, finish_reason] of each sample."""
    rows = []
    for group in groups:
        rows.append([[s.response, s.finish_reason] for s in group])
    trainer.write_rows(part, rows)


def read_chunk(part: Path) -> list[list[Sample]]:
    """The samples that write_chunk wrote."""
    groups = []
    for line in gzip.decompress(part.read_bytes()).splitlines():
        groups.append([Sample(*pair) for pair in json.loads(line)])
    return groups


def is_whole(part: Path, n_queries: int, n: int) -> bool:
    """True if a chunk holds n samples of each of n_queries; says so where it holds less."""
    try:
        sizes = [len(group) for group in read_chunk(part)]
    except FileNotFoundError:
        return False
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        sizes = []
    if sizes != [n] * n_queries:
        print(f"{part}: damaged; sampled again", file=sys.stderr)
    return sizes == [n] * n_queries


# -- transformers ---------------------------------------------------------------------------------


class HFEngine(Engine):
    """Samples from the policy itself: no start-up, no copy of the weights, nothing to go stale."""

    # the class of the last policy, and the loop that can sample from such a one
    kind = loop = None

    def wake(self, policy) -> None:
        """Takes the policy to sample from; the first of its kind chooses the loop."""
        # of a policy in shares it is a whole copy, which `sleep` lets go of
        self.policy = ranks.replica(policy).eval()
        # the self-test is of the model's code, not of its weights: once is enough
        if type(self.policy) is not self.kind:
            self.kind, self.loop = type(self.policy), self.choose_loop()

    def sleep(self) -> None:
        """Lets go of the policy."""
        self.policy = None

    @trainer.memory_by("a smaller --sample-budget")
    def sample(self, prompts: list[list[int]], n: int, temperature: float, seed: int, bar=None):
        """n Samples of each prompt."""
        groups: list[list[Sample]] = [[] for _ in prompts]
        for call, (rows, copies) in enumerate(self.calls(prompts, n)):
            asked = [prompts[i] for i in rows]
            # a call's own seed: with one for all, prompts of two calls would get the same draws
            tokens = self.loop(asked, copies, temperature, seed + call, self.cfg.max_tokens)
            samples = self.as_samples(tokens.tolist())
            for k, i in enumerate(rows):
                groups[i] += samples[k * copies : (k + 1) * copies]
            if bar is not None:
                bar.update(len(samples))
        return groups

    def calls(self, prompts: list[list[int]], n: int) -> Iterator[tuple[list[int], int]]:
        """(prompts, copies of each) of every batch that --sample-budget holds.

        The longest come first: what is too large fails at once, and rows are padded little.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]]) + self.cfg.max_tokens
            fit = max(1, self.cfg.sample_budget // longest)  # sequences held at once
            n_rows = max(1, fit // n)
            rows, order = order[:n_rows], order[n_rows:]
            for start in range(0, n, fit):
                yield rows, min(fit, n - start)

    def own_loop(self, prompts, n: int, temperature: float, seed: int, max_tokens: int):
        """Tokens (B n, max_tokens); those after a stop token mean nothing.

        Two things that `model.generate` does not do make it 2-3 times faster: a prompt is read once
        for its n responses, and responses that have ended leave the batch.
        """
        import torch
        from transformers import DynamicCache

        policy, where = self.policy, self.policy.device
        head, cache = policy.get_output_embeddings(), DynamicCache(config=policy.config)
        generator = torch.Generator(where).manual_seed(seed)
        stops = torch.tensor(self.stop_ids, device=where)
        tokens = torch.full((len(prompts) * n, max_tokens), self.stop_ids[0], device=where)
        live = torch.arange(len(tokens), device=where)  # (rows,) those of tokens still in the cache
        ended = torch.zeros_like(live, dtype=torch.bool)  # (rows,)
        ids, mask = left_padded(prompts, where)  # (B, L), then (rows, read so far)
        with torch.inference_mode(), trainer.autocast(cache=True):
            hidden, rows = forward(policy, cache, ids, mask), live // n
            # every kind of cache can reorder its rows, which is to repeat and to drop them, too
            cache.reorder_cache(rows)
            hidden, mask = hidden[rows], mask[rows]
            for step in range(max_tokens):
                token = pick(head(hidden).float(), temperature, generator)  # (rows,)
                tokens[live, step] = token
                ended |= torch.isin(token, stops)
                if ended.all() or step + 1 == max_tokens:
                    break
                # not at every step: what stays in the cache is copied
                if ended.float().mean() > 0.2:
                    rows = (~ended).nonzero()[:, 0]
                    cache.reorder_cache(rows)
                    live, ended, token, mask = live[rows], ended[rows], token[rows], mask[rows]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                hidden = forward(policy, cache, token[:, None], mask)
        return tokens

    def model_loop(self, prompts, n: int, temperature: float, seed: int, max_tokens: int):
        """The same by the model's own generate, for caches that our loop can't repeat."""
        import torch
        from transformers import GenerationConfig

        ids, mask = left_padded(prompts, self.policy.device)
        settings = GenerationConfig(
            do_sample=temperature > 0,
            # do_sample alone makes it greedy; of a temperature of 0 generate warns
            temperature=temperature or 1.0,
            # else generate's own default of 50
            top_k=0,
            max_new_tokens=max_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
        )
        ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        # what ours leaves open is filled from the model's own: top_p, penalties, a least length
        own_settings = self.policy.generation_config
        self.policy.generation_config = GenerationConfig()
        # generate takes no torch.Generator, so the global one is seeded and put back
        with torch.random.fork_rng(), torch.inference_mode(), trainer.autocast(cache=True):
            torch.manual_seed(seed)
            out = self.policy.generate(ids, attention_mask=mask, generation_config=settings)
        self.policy.generation_config = own_settings
        return out[:, ids.shape[1] :]

    def choose_loop(self) -> Callable:
        """The first loop that passes the self-test; raises UserError where neither does."""
        name, reason = type(self.policy).__name__, ""
        for loop in (self.own_loop, self.model_loop):
            try:
                if self.is_greedy(loop):
                    if reason:
                        slower = f"{name}: sampled by its own generate, slower: {reason}"
                        print(slower, file=sys.stderr)
                    return loop
                reason = "greedy tokens are not the model's own"
            except Exception as e:  # an unknown kind of cache: any exception type
                reason = f"{type(e).__name__}: {data.hub_reason(e)}"
        raise UserError(
            f"{name} can't be sampled from with --engine hf ({reason}); "
            "take --engine vllm, or a Llama, Mistral or Qwen"
        )

    def is_greedy(self, loop: Callable) -> bool:
        """The self-test: a loop's greedy tokens are those of passes without cache or padding."""
        import torch

        # ids that every vocabulary has, and lengths that need padding
        prompts = [list(range(3, end)) for end in (11, 5, 8, 4)]
        # the second copies: the first would not show a wrong repeat of the cache
        tokens = loop(prompts, 2, 0.0, 0, 4)[1::2]  # (4, 4)
        for prompt, row in zip(prompts, tokens.tolist()):
            row = row[: len(up_to_stop(row, self.stop_ids)) + 1]
            ids = torch.tensor([prompt + row], device=self.policy.device)
            with torch.inference_mode(), trainer.autocast(cache=True):
                logits = self.policy(ids).logits[0, len(prompt) - 1 : -1].float()  # (new, V)
            picked, best = logits[range(len(row)), row], logits.amax(-1)
            # near ties may fall either way
            if (picked < best - trainer.tolerance(self.policy) * logits.abs().amax(-1)).any():
                return False
        return True


def left_padded(prompts: list[list[int]], device):
    """ids (B, L) and the mask (B, L) of their tokens."""
    import torch

    L = max(map(len, prompts))
    # on the left, so that the last position of every row is its prompt's end
    ids = [[0] * (L - len(p)) + p for p in prompts]
    mask = [[0] * (L - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def forward(policy, cache, ids, mask):
    """Reads ids (rows, new) into the cache; returns the last position's hidden states (rows, d)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = trainer.body(policy)(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


def pick(logits, temperature: float, generator):
    """Tokens (rows,) drawn from softmax(logits / T), the greatest where T is 0."""
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)  # (rows, V)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# -- vLLM -----------------------------------------------------------------------------------------


class VLLMEngine(Engine):
    """vLLM inside this process: weights pass by reference, nothing goes through disk.

    Sampler and trainer share one GPU, so one sleeps while the other works. The engine is built
    before the trainer takes memory, and starts asleep and empty. Only the model folder's
    config.json is read: with load_format="dummy" a forgotten load is noise, not the base model.
    """

    # The canary's limit, mean nats a token; the right weights gave 1e-6 and 0.007 on a CPU.
    TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

    def __init__(self, cfg: Config, tokenizer, prompt: Callable, stop_ids: list[int], model):
        import torch

        super().__init__(cfg, tokenizer, prompt, stop_ids)
        self.gpu = trainer.device() == "cuda"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
        # on a GPU a weight that was not loaded is a warning; the CPU build warns of much else
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if self.gpu else "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # FlashInfer's sampler is compiled with nvcc at the start; it is for top-k and top-p alone
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        # float32 on a CPU, where the canary's limit can be a thousand times tighter
        self.dtype = "bfloat16" if self.gpu or cfg.optim == "adamw8bit" else "float32"
        self.trainers_threads = torch.get_num_threads()
        with process_state_kept():
            self.llm = self.start(model)
            self.threads = torch.get_num_threads()  # what vLLM compiled its code for
        self.sleep()

    @trainer.memory_by("another --gpu-memory")
    def start(self, model: str | Path):
        """vLLM's LLM, with random weights."""
        from vllm import LLM

        longest = self.cfg.max_length + self.cfg.max_tokens
        settings = dict(
            load_format="dummy",
            config_format="hf",  # Mistral's folders hold their own format, too
            generation_config="vllm",  # a model's own temperature and top_k have no say
            skip_tokenizer_init=True,
            seed=self.cfg.seed,
            dtype=self.dtype,
            max_model_len=longest,
        )
        if self.gpu:
            # in sleep mode vLLM can give its memory back to the GPU and take it again
            settings |= dict(enable_sleep_mode=True)
            settings |= dict(gpu_memory_utilization=gpu_share(self.cfg, model))
            settings |= dict(max_num_seqs=1024, max_cudagraph_capture_size=1024)
        else:
            settings |= dict(enforce_eager=True, kv_cache_memory_bytes=2 << 30)
            # a prompt read in two parts would rewind its generator, which a CPU's can't
            settings |= dict(enable_chunked_prefill=False)
            settings |= dict(max_num_batched_tokens=max(4096, longest))
        if ranks.WORLD > 1:  # vLLM's own name for an engine that each of torchrun's processes has
            settings["distributed_executor_backend"] = "external_launcher"
        return LLM(str(model), **settings)

    @trainer.memory_by("a smaller --gpu-memory")
    def wake(self, policy) -> None:
        """Weight memory, the policy's weights, then the KV cache: in this order the peak is lowest.

        state_dict, not named_parameters: that names tied embeddings once and leaves lm_head stale.
        """
        import torch

        if self.gpu:
            # vLLM's memory is not torch's: what training freed must go back to the driver first
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        # of several processes each takes every weight, one at a time
        weights = ((name, ranks.full(x)) for name, x in policy.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.gpu:
            self.llm.wake_up(tags=["kv_cache"])
            torch.set_num_threads(self.threads)
        # no cached prefix outlives the weights that made it
        self.llm.reset_prefix_cache()
        self.policy, self.checked = policy.eval(), False

    def sleep(self) -> None:
        """Level 2 keeps nothing; level 1 would keep weights that are stale by the next wake."""
        import torch

        self.policy = None
        if self.gpu:
            torch.set_num_threads(self.trainers_threads)
            self.llm.sleep(level=2)

    @trainer.memory_by("a smaller --gpu-memory")
    def sample(self, prompts: list[list[int]], n: int, temperature: float, seed: int, bar=None):
        """n Samples of each prompt."""
        settings = dict(temperature=temperature, max_tokens=self.cfg.max_tokens)
        groups = []
        for output in self.generate(prompts, n, seed, bar, **settings):
            groups.append(self.as_samples([list(x.token_ids) for x in output.outputs]))
        return groups

    def generate(self, prompts: list[list[int]], n: int, seed: int, bar=None, **settings) -> list:
        """vLLM's outputs, n of each prompt; no two of them share a random stream.

        settings  of SamplingParams: temperature, max_tokens, logprobs
        raises    RuntimeError  between sleep and wake
        """
        if self.policy is None:
            raise RuntimeError("the engine is asleep and holds no policy: use engine.awake(policy)")
        from vllm import SamplingParams

        # vLLM gives child j of a prompt the seed + j, so prompts' seeds are n apart; ignore_eos, as
        # the end that the model's config.json names need not be ours
        first = int(np.random.SeedSequence(seed).generate_state(1)[0])
        settings |= dict(n=n, stop_token_ids=self.stop_ids, ignore_eos=True, detokenize=False)
        params = [SamplingParams(seed=first + i * n, **settings) for i in range(len(prompts))]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, params, use_tqdm=bar is not None and forward_to(bar))

    def check_canary(self, prompts: list[list[int]]) -> float:
        """Stops a run whose engine does not hold this very policy.

        Stale weights fail nowhere: they give fluent responses, off-policy by an iteration. So after
        each swap engine and trainer say how likely they find the same tokens.

        returns  the mean gap in nats a token
        raises   RuntimeError  where it is above TOLERANCE
        """
        gap = float(np.mean(self.canary_gaps(prompts)))
        allowed = self.TOLERANCE[self.dtype]
        if not gap <= allowed:  # NaN included
            raise RuntimeError(
                "the sampling engine does not hold the policy's weights: log-probabilities of its "
                f"samples differ by {gap:.3g} nats a token, {allowed:g} is allowed"
            )
        return gap

    def canary_gaps(self, prompts: list[list[int]]) -> list[float]:
        """|log p_engine - log p_policy| of every token of one short response to each prompt."""
        import torch

        settings = dict(temperature=1.0, max_tokens=16, logprobs=0)  # 0: of the sampled tokens
        rows, theirs = [], []
        for prompt, output in zip(prompts, self.generate(prompts, 1, self.cfg.seed, **settings)):
            [response] = output.outputs
            rows.append(prompt + list(response.token_ids))
            theirs += [row[t].logprob for row, t in zip(response.logprobs, response.token_ids)]
        n_prompts = [len(prompt) for prompt in prompts]
        # in one pass whatever their lengths: several processes must make as many
        with torch.no_grad():
            nll = trainer.token_nll(self.policy, rows, n_prompts)  # (tokens of all rows,)
        return (-nll.cpu() - torch.tensor(theirs)).abs().tolist()


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undoes what starting vLLM does to the whole process.

    It reseeds python, numpy and torch. On a CPU it also changes the thread count, replaces
    torch.set_num_threads by a stub, and sets LD_PRELOAD for children.
    """
    import torch

    states = random.getstate(), np.random.get_state()
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    preload = os.environ.get("LD_PRELOAD", "")
    try:
        # the fork puts back torch's generators, those of all GPUs included
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        os.environ["LD_PRELOAD"] = preload
        random.setstate(states[0])
        np.random.set_state(states[1])


def forward_to(bar) -> Callable:
    """What vLLM takes for use_tqdm: its bar over responses moves ours, and prints nowhere."""
    from tqdm import tqdm

    class Forward(tqdm):
        def update(self, n=1):
            bar.update(n)

    def make(*prompts, **settings):
        if prompts:  # its bar over prompts being read is left out
            return prompts[0]
        return Forward(file=io.StringIO())

    return make


# -- which one ------------------------------------------------------------------------------------


def make_engine(
    cfg: Config, tokenizer, prompt: Callable, model: str | Path, end_ids: list[int]
) -> Engine:
    """The sampler. vLLM is built before the trainer takes memory, and put to sleep at once.

    end_ids  the tokens that end a response, see data.end_ids; the model's own are added
    """
    # an instruct model may end its turns by a token that only its generation config names
    stops = list(dict.fromkeys([*end_ids, *generation_ends(model)]))
    vllm_fits = trainer.device() == "cuda" and find_spec("vllm") is not None
    if cfg.engine == "hf" or (cfg.engine == "auto" and not vllm_fits):
        return HFEngine(cfg, tokenizer, prompt, stops)
    return VLLMEngine(cfg, tokenizer, prompt, stops, model)


def generation_ends(model: str | Path) -> list[int]:
    """The tokens that end a response by the model's generation config."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return []
    if isinstance(ends, int):
        return [ends]
    return ends or []


def gpu_share(cfg: Config, model: str | Path) -> float:
    """vLLM's share of the GPU: --gpu-memory, or what the trainer and 12 GiB leave.

    raises  UserError  where the trainer does not leave that much
    """
    import torch

    n = trainer.n_parameters(str(model), trainer.model_config(str(model)))
    if n is None:
        return cfg.gpu_memory or 0.4
    total = torch.cuda.get_device_properties(0).total_memory
    needed = trainer.needs(cfg, n, None, True)
    held = trainer.beside(cfg, needed)
    beside_it = f"beside {held / 2**30:.0f} GiB of weights and optimizer"
    offload = "--offload-optimizer, " if held > needed["weights"] else ""
    most = (total - held - trainer.CONTEXT) / total
    # where nothing is left at all, a lower share is no way out, and the next message fits
    if cfg.gpu_memory > most > 0:
        raise UserError(
            f"--gpu-memory {cfg.gpu_memory}: {beside_it} at most {most:.2f} of the GPU is left; "
            f"take {offload}or a lower share"
        )
    share = cfg.gpu_memory or (total - held - (12 << 30)) / total
    if share * total < 2.5 * n:  # bf16 weights, and a KV cache worth having
        raise UserError(
            f"--model {model}: {beside_it} vLLM has no room on a GPU of {total / 2**30:.0f} GiB; "
            f"take a larger GPU, {offload}a smaller --model, or --engine hf"
        )
    # rounded down: to the nearest might be more than is left
    return math.floor(1000 * share) / 1000
