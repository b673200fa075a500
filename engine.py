"""Who samples: vLLM inside this process with sleep-mode weight swaps, or a short PyTorch loop.

with engine.awake(policy) as draw:                       # weights in, KV cache up
    groups = draw(queries, n, temperature, name)         # n responses to each query
                                                         # both dropped again: the trainer's turn
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import sys
import warnings
import zlib
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

import data
import ranks
from config import Config
from data import Query, Sample, UserError
from trainer import (
    CONTEXT,
    autocast,
    beside,
    body,
    device,
    memory_by,
    model_config,
    n_parameters,
    needs,
    seed_of,
    token_nll,
    tolerance,
    write,
)


class Engine:
    """What both engines share: prompts, and chunks of samples that survive a kill."""

    def __init__(self, cfg: Config, tokenizer, prompt: Callable, stop_ids: list[int]):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.prompt = prompt  # query -> ids
        self.stop_ids = stop_ids  # the only tokens that end a response
        self.parts = Path(cfg.out) / "parts"  # sampled chunks, until their iteration is written

    @contextmanager
    def awake(self, policy) -> Iterator[Callable[..., list[list[Sample]]]]:
        """Holds the policy's weights inside the block; hands out `draw`."""
        self.wake(policy)
        try:
            yield self.draw
        finally:
            self.sleep()

    def draw(
        self,
        queries: list[Query],
        n: int,
        temperature: float,
        name: str,
        prompt: Callable | None = None,
    ) -> list[list[Sample]]:
        """n responses to each query from the whole distribution; temperature 0 is greedy.

        The same seed, name and policy give the same responses. Every --chunk queries are kept in
        parts/NAME until the iteration is written, so that a kill loses one chunk at most. Several
        processes sample a chunk each in turn, and read the others' chunks there.
        """
        prompt = prompt or self.prompt
        self.check([prompt(q) for q in queries[:4]])
        bar = data.progress(len(queries) * n, name)
        chunks = {}
        for turn, k in enumerate(range(0, len(queries), self.cfg.chunk)):
            part = self.parts / f"{name}.{k}.jsonl.gz"
            asked = queries[k : k + self.cfg.chunk]
            chunks[part] = whole_chunk(part, len(asked), n)
            if chunks[part] is None and turn % ranks.WORLD == ranks.RANK:
                prompts = [prompt(q) for q in asked]
                seed = seed_of(self.cfg.seed, name, k)
                chunks[part] = self.sample(prompts, n, temperature, seed, bar)
                write_chunk(part, chunks[part])
            else:
                bar.update(len(asked) * n)
        bar.close()
        ranks.wait()
        groups = []
        for part, chunk in chunks.items():
            groups += read_chunk(part) if chunk is None else chunk
        return groups

    def check(self, prompts: list[list[int]]) -> None:
        """Stops the run where the engine does not hold the policy's weights."""


def write_chunk(part: Path, groups: list[list[Sample]]) -> None:
    """One line a query: [response, finish_reason] of each sample."""
    lines = [json.dumps([[s.response, s.finish_reason] for s in group]) for group in groups]
    write(part, gzip.compress("\n".join(lines).encode(), 3, mtime=0))


def read_chunk(part: Path) -> list[list[Sample]]:
    """The samples that write_chunk wrote."""
    lines = gzip.decompress(part.read_bytes()).decode().splitlines()
    return [[Sample(*pair) for pair in json.loads(line)] for line in lines]


def whole_chunk(part: Path, n_queries: int, n: int) -> list[list[Sample]] | None:
    """n samples of each of n_queries, None where the file is missing or is not that."""
    if not part.exists():
        return None
    try:
        groups = read_chunk(part)
        if [len(group) for group in groups] == [n] * n_queries:
            return groups
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        pass
    print(f"{part}: damaged; sampled again", file=sys.stderr)
    return None


# -- transformers ---------------------------------------------------------------------------------


class HFEngine(Engine):
    """Samples from the policy itself: no start-up, no copy of the weights, nothing to go stale."""

    kind = loop = None  # the class of the last policy, and the loop that samples from it

    def wake(self, policy) -> None:
        """Takes the policy to sample from; the first of its kind chooses the loop."""
        self.policy = ranks.replica(policy).eval()
        if type(self.policy) is not self.kind:
            self.kind, self.loop = type(self.policy), self.choose_loop()

    def sleep(self) -> None:
        """Lets go of the policy."""
        self.policy = None

    @memory_by("a smaller --sample-budget")
    def sample(self, prompts: list[list[int]], n: int, temperature: float, seed: int, bar=None):
        """n Samples of each prompt."""
        groups: list[list[Sample]] = [[] for _ in prompts]
        for call, (rows, copies) in enumerate(self.calls(prompts, n)):
            asked = [prompts[i] for i in rows]
            responses = self.generate(asked, copies, temperature, seed + call)
            for k, response in enumerate(responses):
                groups[rows[k // copies]].append(response)
            if bar is not None:
                bar.update(len(responses))
        return groups

    def calls(self, prompts: list[list[int]], n: int) -> Iterator[tuple[list[int], int]]:
        """(prompts, copies of each) of every batch: what --sample-budget holds, longest first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]]) + self.cfg.max_tokens
            fit = max(1, self.cfg.sample_budget // longest)  # sequences held at once
            n_rows = max(1, fit // n)
            rows, order = order[:n_rows], order[n_rows:]
            for start in range(0, n, fit):
                yield rows, min(fit, n - start)

    def generate(self, prompts: list[list[int]], n: int, temperature: float, seed: int):
        """One batch of n responses to each prompt, as Samples."""
        tokens = self.loop(prompts, n, temperature, seed, self.cfg.max_tokens)
        rows = [up_to_stop(row, self.stop_ids) for row in tokens.tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        reasons = ["stop" if len(row) < self.cfg.max_tokens else "length" for row in rows]
        return [Sample(text, reason) for text, reason in zip(texts, reasons)]

    def own_loop(self, prompts, n: int, temperature: float, seed: int, max_tokens: int):
        """Tokens (B n, max_tokens); those after a stop token mean nothing.

        Two things that `model.generate` does not do make it 2-3 times faster: a prompt is read once
        for its n responses, and responses that have ended leave the batch.
        """
        import torch

        batch = Batch(self.policy, prompts, n, max_tokens, self.stop_ids)
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        with torch.inference_mode(), autocast(cache=True):
            hidden = batch.read_prompts()
            for step in range(max_tokens):
                logits = self.policy.get_output_embeddings()(hidden).float()  # (rows, vocabulary)
                if temperature:
                    p = (logits / temperature).softmax(-1)
                    token = torch.multinomial(p, 1, generator=generator)[:, 0]
                else:
                    token = logits.argmax(-1)
                token = batch.append(step, token)
                if len(token) == 0 or step + 1 == max_tokens:
                    break
                hidden = batch.read(token)
        return batch.tokens

    def model_loop(self, prompts, n: int, temperature: float, seed: int, max_tokens: int):
        """The same by the model's own generate, for caches that our loop can't repeat."""
        import torch
        from transformers import GenerationConfig

        ids, mask = left_padded(prompts, self.policy.device)
        settings = GenerationConfig(
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=0,
            max_new_tokens=max_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
        )
        ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        own_settings = self.policy.generation_config
        self.policy.generation_config = GenerationConfig()  # else its penalties are added
        with torch.random.fork_rng(), torch.inference_mode(), autocast(cache=True):
            torch.manual_seed(seed)  # generate takes no torch.Generator
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
                        print(
                            f"{name}: sampled by its own generate, slower: {reason}",
                            file=sys.stderr,
                        )
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

        prompts = [list(range(3, end)) for end in (11, 5, 8, 4)]
        tokens = loop(prompts, 2, 0.0, 0, 4)[1::2]  # (4, 4)
        for prompt, row in zip(prompts, tokens.tolist()):
            row = row[: len(up_to_stop(row, self.stop_ids)) + 1]
            ids = torch.tensor([prompt + row], device=self.policy.device)
            with torch.inference_mode(), autocast(cache=True):
                logits = self.policy(ids).logits[0, len(prompt) - 1 : -1].float()  # (new, V)
            picked, best = logits[range(len(row)), row], logits.amax(-1)
            if (picked < best - tolerance(self.policy) * logits.abs().amax(-1)).any():
                return False
        return True


def left_padded(prompts: list[list[int]], device):
    """ids (B, L) and the mask (B, L) of their tokens."""
    import torch

    L = max(map(len, prompts))
    ids = [[0] * (L - len(p)) + p for p in prompts]
    mask = [[0] * (L - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Batch:
    """The rows of one `generate` call; those that have ended leave the cache, not `tokens`."""

    def __init__(self, policy, prompts, n: int, max_tokens: int, stop_ids: list[int]):
        import torch
        from transformers import DynamicCache

        device = policy.device
        self.ids, self.mask = left_padded(prompts, device)  # (B, L), (rows, read so far)
        self.body, self.n = body(policy), n
        self.cache = DynamicCache(config=policy.config)
        self.stops = torch.tensor(stop_ids, device=device)
        size = (len(prompts) * n, max_tokens)
        self.tokens = torch.full(size, stop_ids[0], device=device)  # (B n, max_tokens)
        self.live = torch.arange(len(self.tokens), device=device)  # rows still in the cache
        self.ended = torch.zeros(len(self.tokens), dtype=torch.bool, device=device)

    def forward(self, ids, position):
        """Hidden states (rows, width) at the last position of ids."""
        out = self.body(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    def read_prompts(self):
        """Reads each prompt once, then repeats it for its n responses."""
        hidden = self.forward(self.ids, (self.mask.cumsum(1) - 1).clamp(min=0))
        return hidden[self.take(self.live // self.n)]

    def take(self, rows):
        """Takes rows of mask and cache, each as often as it is named; returns rows."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)  # every kind of cache has it
        return rows

    def append(self, step: int, token):
        """Keeps the tokens (rows,) of a step; returns those of the rows that stay."""
        import torch

        self.tokens[self.live, step] = torch.where(self.ended, self.stops[0], token)
        self.ended = self.ended | torch.isin(token, self.stops)
        if self.ended.float().mean() > 0.2:  # not at every step: a copy of the cache costs
            stay = (~self.ended).nonzero()[:, 0]
            self.live, self.ended, token = self.live[stay], self.ended[stay], token[stay]
            self.take(stay)
        return token

    def read(self, token):
        """Reads one more token (rows,) of each row."""
        import torch

        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self.forward(token[:, None], self.mask.sum(1, keepdim=True) - 1)


def up_to_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """The tokens before the first stop token."""
    for i, token in enumerate(row):
        if token in stop_ids:
            return row[:i]
    return row


# -- vLLM -----------------------------------------------------------------------------------------


class VLLMEngine(Engine):
    """vLLM inside this process: weights pass by reference, nothing goes through disk.

    Built before the trainer takes memory; it starts asleep and empty. Only the model folder's
    config.json is read: with load_format="dummy" a forgotten load is noise, not the base model.
    """

    # Weight canary, mean nats a token; the right weights gave 1e-6 and 0.007 on a CPU.
    TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

    def __init__(self, cfg: Config, tokenizer, prompt: Callable, stop_ids: list[int], model):
        import torch

        super().__init__(cfg, tokenizer, prompt, stop_ids)
        self.gpu = device() == "cuda"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
        # on a GPU a weight that was not loaded is a warning; the CPU build warns of much else
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if self.gpu else "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # FlashInfer's sampler is compiled with nvcc at the start; it is for top-k and top-p alone
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        self.dtype = "bfloat16" if self.gpu or cfg.optim == "adamw8bit" else "float32"
        with process_state_kept():
            self.llm = self.start(model)
            self.threads = torch.get_num_threads()  # what vLLM compiled its code for
        self.policy = None
        if self.gpu:
            self.llm.sleep(level=2)

    @memory_by("another --gpu-memory")
    def start(self, model: str | Path):
        """vLLM's LLM, with random weights."""
        from vllm import LLM

        cfg, more = self.cfg, {}
        if ranks.WORLD > 1:  # vLLM's own name for an engine that each of torchrun's processes has
            more = {"distributed_executor_backend": "external_launcher"}
        return LLM(
            str(model),
            load_format="dummy",
            config_format="hf",  # Mistral's folders hold their own format, too
            skip_tokenizer_init=True,
            seed=cfg.seed,
            dtype=self.dtype,
            max_model_len=cfg.max_length + cfg.max_tokens,
            generation_config="vllm",
            **self.memory(model),
            **more,
        )

    def memory(self, model: str | Path) -> dict:
        """vLLM's settings of memory, for a GPU or a CPU."""
        if self.gpu:
            share = gpu_share(self.cfg, model)
            n = 1024  # sequences at once
            return dict(
                enable_sleep_mode=True,
                gpu_memory_utilization=share,
                max_num_seqs=n,
                max_cudagraph_capture_size=n,
            )
        # a prompt read in two parts would rewind its generator, which a CPU's can't
        batched = max(4096, self.cfg.max_length + self.cfg.max_tokens)
        return dict(
            enforce_eager=True,
            kv_cache_memory_bytes=2 << 30,
            enable_chunked_prefill=False,
            max_num_batched_tokens=batched,
        )

    @memory_by("a smaller --gpu-memory")
    def wake(self, policy) -> None:
        """Weight memory, the policy's weights, then the KV cache: in this order the peak is lowest.

        state_dict, not named_parameters: that names tied embeddings once and leaves lm_head stale.
        """
        import torch

        if self.gpu:
            torch.cuda.empty_cache()  # vLLM's memory is not torch's: what training freed goes first
            self.llm.wake_up(tags=["weights"])
        # of several processes each takes every weight, one at a time
        weights = ((name, ranks.full(x)) for name, x in policy.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # no cached prefix outlives the weights that made it
        self.policy = policy.eval()
        self.checked = False
        if self.gpu:
            self.outside = torch.get_num_threads()
            torch.set_num_threads(self.threads)

    def check(self, prompts: list[list[int]]) -> None:
        """Checks the weight canary, once after a swap."""
        if not self.checked:
            self.check_canary(prompts)
            self.checked = True

    def sleep(self) -> None:
        """Level 2: nothing is kept, so nothing stale can be sampled."""
        import torch

        self.policy = None
        if self.gpu:
            torch.set_num_threads(self.outside)
            self.llm.sleep(level=2)

    @memory_by("a smaller --gpu-memory")
    def sample(self, prompts: list[list[int]], n: int, temperature: float, seed: int, bar=None):
        """n Samples of each prompt."""
        outputs = self.generate(prompts, n, temperature, self.cfg.max_tokens, seed, bar=bar)
        return [self.as_samples(output.outputs) for output in outputs]

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        temperature: float,
        max_tokens: int,
        seed: int,
        **options,
    ):
        """vLLM's outputs, n of each prompt; no two of them share a random stream.

        options  bar (a progress bar), logprobs (0: those of the sampled tokens, at temperature 1)
        raises   RuntimeError  between sleep and wake
        """
        if self.policy is None:
            raise RuntimeError("the engine is asleep and holds no policy: use engine.awake(policy)")
        from vllm import SamplingParams

        # child j of prompt i draws from seed first + i n + j
        first = int(np.random.SeedSequence(seed).generate_state(1)[0])
        params = [
            SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=max_tokens,
                seed=first + i * n,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,
                detokenize=False,
                logprobs=options.get("logprobs"),
            )
            for i in range(len(prompts))
        ]
        bar = options.get("bar")
        shown = False if bar is None else forward_to(bar)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, params, use_tqdm=shown)

    def as_samples(self, outputs: list) -> list[Sample]:
        """vLLM's outputs of one prompt, which end with their stop token, as text."""
        rows = [up_to_stop(list(o.token_ids), self.stop_ids) for o in outputs]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Sample(text, o.finish_reason) for text, o in zip(texts, outputs)]

    def canary_gaps(self, prompts: list[list[int]]) -> list[float]:
        """|log p_engine - log p_policy| of every token of one short response to each prompt."""
        import torch

        rows, theirs = [], []
        outputs = self.generate(prompts, 1, 1.0, 16, self.cfg.seed, logprobs=0)
        for prompt, output in zip(prompts, outputs):
            [response] = output.outputs
            tokens = up_to_stop(list(response.token_ids), self.stop_ids)
            rows.append(prompt + tokens)
            theirs += [row[t].logprob for row, t in zip(response.logprobs, tokens)]
        with torch.no_grad():  # in one pass: several processes make as many
            nll = token_nll(self.policy, rows, list(map(len, prompts)))  # (tokens of all rows,)
        return (-nll.cpu() - torch.tensor(theirs)).abs().tolist()

    def check_canary(self, prompts: list[list[int]]) -> float:
        """Stops a run whose engine does not hold this very policy: stale weights are silent.

        returns  the mean gap in nats a token
        raises   RuntimeError  where it is above TOLERANCE
        """
        gaps = self.canary_gaps(prompts)
        gap = float(np.mean(gaps)) if gaps else 0.0
        allowed = self.TOLERANCE[self.dtype]
        if not gap <= allowed:  # NaN included
            raise RuntimeError(
                "the sampling engine does not hold the policy's weights: log-probabilities of its "
                f"samples differ by {gap:.3g} nats a token, {allowed:g} is allowed"
            )
        return gap


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undoes what starting vLLM does to the whole process.

    It reseeds python, numpy and torch. On a CPU it also changes the thread count, replaces
    torch.set_num_threads by a stub, and sets LD_PRELOAD for children.
    """
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    preload = os.environ.get("LD_PRELOAD")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def forward_to(bar) -> Callable:
    """What vLLM takes for use_tqdm, so that our own bar moves.

    Its bar over prompts being read is left out; its bar over responses prints nowhere.
    """
    from tqdm import tqdm

    class Forward(tqdm):
        def update(self, n=1):
            bar.update(n)
            return super().update(n)

    def make(*args, **kwargs):
        if args:
            return args[0]
        return Forward(**{**kwargs, "file": io.StringIO(), "dynamic_ncols": False})

    return make


# -- which one ------------------------------------------------------------------------------------


def make_engine(
    cfg: Config, tokenizer, prompt: Callable, model: str | Path, end_ids: list[int]
) -> Engine:
    """The sampler. vLLM is built before the trainer takes memory, and put to sleep at once.

    end_ids  the tokens that end a response, see data.end_ids; the model's own are added
    """
    stops = list(dict.fromkeys([*end_ids, *generation_ends(model)]))
    vllm_fits = device() == "cuda" and find_spec("vllm") is not None
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
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def gpu_share(cfg: Config, model: str | Path) -> float:
    """vLLM's share of the GPU: --gpu-memory, or what the trainer and 12 GiB leave.

    raises  UserError  where the trainer does not leave that much
    """
    import torch

    n = n_parameters(str(model), model_config(str(model)))
    if device() != "cuda" or n is None:
        return cfg.gpu_memory or 0.4
    total = torch.cuda.get_device_properties(0).total_memory
    needed = needs(cfg, n, None, True)
    held = beside(cfg, needed)
    most = (total - held - CONTEXT) / total
    share = cfg.gpu_memory or (total - held - (12 << 30)) / total
    offload = "--offload-optimizer, " if held > needed["weights"] else ""
    if cfg.gpu_memory > most > 0:
        raise UserError(
            f"--gpu-memory {cfg.gpu_memory}: beside {held / 2**30:.0f} GiB of weights and "
            f"optimizer at most {most:.2f} of the GPU is left; take {offload}or a lower share"
        )
    if share * total < 2.5 * n:
        raise UserError(
            f"--model {model}: beside {held / 2**30:.0f} GiB of weights and optimizer vLLM has no "
            f"room on a GPU of {total / 2**30:.0f} GiB; take a larger GPU, {offload}"
            "a smaller --model, or --engine hf"
        )
    return math.floor(1000 * share) / 1000
