"""Plain PyTorch: load a policy, fine-tune it with AdamW, save it, find it again.

    examples [(ids, n_prompt)] -> micro-batches -> token_nll -> AdamW steps -> a Hugging Face folder

A checkpoint is a folder that appears whole or not at all: it is written under another name, flushed
and renamed, and holds a fingerprint of each of its files. So whoever is killed starts the same
command again, and loses at most the phase in hand.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock

import data
import ranks
from config import METHODS, Config
from data import UserError

# SFT checkpoints, PRMs and the toy's base: methods and rewards share them
CACHE = Path("runs/cache")


@dataclass
class State:
    """M_t, and what goes with it."""

    t: int
    policy: object
    optimizer: object = None
    log: dict = field(default_factory=dict)  # of the training that made it


@dataclass
class Phase:
    """A stretch of training on a learning-rate schedule: linear warm-up, then a cosine.

    >>> phase = Phase("train", 0, range(10), 10, peak=1.0, end=0.1, warmup=0.1)
    >>> [round(phase.rate(step), 3) for step in (0, 1, 5, 9)]
    [1.0, 0.973, 0.472, 0.1]
    """

    name: str
    seed: int
    steps: range  # their numbers on the schedule
    horizon: int  # steps of the whole schedule
    peak: float
    end: float
    warmup: float  # share of the horizon

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rise = max(1, round(self.warmup * self.horizon))
        if step < rise:
            return self.peak * (step + 1) / rise
        progress = min(1.0, (step + 1 - rise) / max(1, self.horizon - rise))
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * progress)) / 2


def seed_of(*key) -> int:
    """A 31-bit seed from a key such as (seed, iteration, phase).

    No generator's state has to be saved, and no two phases share a stream.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


# -- load -----------------------------------------------------------------------------------------


def device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_dtype(cfg: Config):
    """float32, or bf16 for adamw8bit, which rounds stochastically.

    Plain bf16 weights would lose most updates at a learning rate of 5e-6 to rounding.
    """
    import torch

    return torch.bfloat16 if cfg.optim == "adamw8bit" else torch.float32


def autocast(cache: bool = False):
    """bf16 arithmetic over float32 weights on a GPU; nothing on a CPU.

    Its cache is a second copy of the model: only worth it in sampling.
    """
    import torch

    enabled = torch.cuda.is_available()
    return torch.autocast("cuda", torch.bfloat16, enabled=enabled, cache_enabled=cache)


def load_policy(cfg: Config, model: str | Path, where: str = ""):
    """The policy, whole on `where`, else on the device, where several processes share it.

    raises  UserError  where it can't be read or trained
    """
    import transformers

    try:
        policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=weights_dtype(cfg))
    except Exception as e:  # missing, truncated, of an unknown kind: a dozen exception types
        raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    if cfg.gradient_checkpointing:
        # the reentrant kind wants inputs with a gradient, and token ids have none
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if where:
        return policy.to(where)
    policy = ranks.shard(policy, device())
    # our own checkpoints are made of models that were tested
    if not (Path(model) / "complete.json").exists():
        check_loss(policy, model)
    return policy


def check_loss(policy, model: str | Path) -> None:
    """The self-test of token_nll, on one short row, and on half of it with padding behind.

    raises  UserError  where it is not the model's own loss, or later tokens change a token's loss
    """
    import torch

    row = list(range(3, 11))
    ids = torch.tensor([row], device=policy.device)
    fault = "its own loss is not the one here: it caps or scales logits, or reads later tokens"
    try:
        # a cap on logits shows on small random weights, too, where the logits are loud
        head = policy.get_output_embeddings()
        # both ways to the loss run through the head, so both see the loud logits
        hook = head.register_forward_hook(lambda head, inputs, logits: 1000 * logits)
        with torch.no_grad(), autocast():
            nll = token_nll(policy, [row, row[:5]], [1, 1])
            # its labels are shifted inside, so row predicts its last 7 ids here, too
            own = policy(input_ids=ids, labels=ids, use_cache=False).loss.item()
        hook.remove()
        loss = nll[:7].mean().item()
        allowed = tolerance(policy) * abs(loss)
        if abs(loss - own) <= allowed and (nll[:4] - nll[7:]).abs().max() <= allowed:
            return
    except Exception as e:  # an unknown kind of model: any exception type
        fault = f"its loss ends in {type(e).__name__}: {data.hub_reason(e)}"
    raise UserError(f"--model {model}: {fault}; take a decoder such as Llama, Mistral or Qwen")


def tolerance(policy) -> float:
    """The relative error that a self-test allows: of float32, or of bf16."""
    exact = policy.dtype.itemsize == 4 and policy.device.type == "cpu"
    return 1e-3 if exact else 0.05


def load_tokenizer(model: str | Path):
    """The tokenizer of a model folder or hub name; raises UserError where there is none."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {model}: its tokenizer has no end token; no response could end")
    return tokenizer


def adamw(policy, lr: float):
    """Fused AdamW; over bf16 weights torchao's, with 8-bit moments and stochastic rounding.

    No weight decay: the paper names none.
    """
    import torch

    bf16 = policy.dtype == torch.bfloat16
    if bf16:
        from torchao.optim import AdamW8bit

        # torchao's tensors warn of a cache of compiled code
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
        settings = dict(weight_decay=0.0, bf16_stochastic_round=True)
        optimizer = AdamW8bit(policy.parameters(), lr=lr, **settings)
    else:
        optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)

    # Both would make their state in the first step, between gradients and activations. From there
    # moments keep whole segments of torch's memory from going back to vLLM, so they are made now.
    for p in policy.parameters():
        if bf16:
            step = torch.tensor(0.0)
            first, second = optimizer._new_buffer(p, True), optimizer._new_buffer(p, False)
        else:
            step = torch.tensor(0.0, device=p.device)
            first, second = torch.zeros_like(p), torch.zeros_like(p)
        optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return optimizer


def place(optimizer, where) -> None:
    """Moves the moments to a device; the step counts stay where torch wants them."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if value.dim() > 0:
                state[name] = value.to(where)


# -- train ----------------------------------------------------------------------------------------


def body(policy):
    """The layers below the head; Llama 4 calls them neither base_model nor decoder."""
    return policy.model if policy.base_model is policy else policy.base_model


def token_nll(policy, rows: list[list[int]], n_prompts: list[int]):
    """-log p(y_t | x, y_<t) of every response token, flat   [Eq. 3, App. B]

    rows       (B, l_i) ids of prompt and response
    n_prompts  (B,) tokens of each prompt
    returns    (sum of response lengths,) float32
    """
    import torch

    # padding stands on the right, where causal attention never looks: no mask is needed
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    ids = ids.to(policy.device)  # (B, L)

    # responses are told by length, not by a pad token: that is often the end token, too
    target = torch.arange(1, ids.shape[1])  # the token that a position predicts
    first = torch.tensor(n_prompts)[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    is_response = ((target >= first) & (target < end)).to(policy.device)  # (B, L-1)

    with autocast():
        logits = ranks.inside(policy, logits_at, policy, ids[:, :-1], is_response)
    targets = ids[:, 1:][is_response]  # (tokens,)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def logits_at(policy, ids, places):
    """Logits (tokens, vocabulary) at the places (B, L) of ids (B, L)."""
    hidden = body(policy)(input_ids=ids, use_cache=False).last_hidden_state
    # the head at these places alone: (B, L, vocabulary) would be the largest tensor of all
    return policy.get_output_embeddings()(hidden[places])


def accumulate(policy, batch: list[tuple[list[int], int]], token_budget: int) -> float:
    """Adds the gradient of the mean over *all* response tokens of a global batch.

    returns  that mean, whatever the micro-batches
    """
    n_tokens = sum(len(ids) - n_prompt for ids, n_prompt in batch)
    mean = 0.0
    # cut by tokens, not rows: memory goes by tokens, and rows differ in length by a factor of ten
    # nothing=len: a prompt as long as the row has no token that counts
    for rows, n_prompts in ranks.micro_batches(batch, token_budget, nothing=len):
        # a mean of the micro-batches' means would depend on where they were cut
        loss = token_nll(policy, rows, n_prompts).sum() / n_tokens
        loss.backward()
        mean += loss.item()
    return sum(ranks.gathered(mean))


def batches(n_examples: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of indices without end; every example comes once before any comes again."""
    order = np.zeros(0, dtype=int)
    while True:
        # the last batch of a round is filled from the next, so that every step is of one size
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(n_examples)])
        yield order[:batch_size]
        order = order[batch_size:]


def set_rate(optimizer, lr: float) -> None:
    """Sets the learning rate; torchao keeps it as a tensor."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr) if torch.is_tensor(group["lr"]) else lr


# vLLM's allocator and profiler raise RuntimeError and ValueError, not torch's OutOfMemoryError
OUT_OF_MEMORY = re.compile(
    "out of memory|Free memory on device|No available memory|available KV cache memory"
)


@contextmanager
def memory_by(flags: str) -> Iterator[None]:
    """A GPU that runs out of memory is one line that names the flags to change (config.MEMORY)."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        if not OUT_OF_MEMORY.search(str(e)):
            raise
        reason = ". ".join(" ".join(str(e).split()).split(". ")[:2]).removesuffix(".")
        raise UserError(
            f"{reason}; what was complete is kept, the same command with {flags} goes on"
        ) from None


@memory_by("a smaller --token-budget, or with --gradient-checkpointing,")
def train(
    policy, optimizer, examples: list, phase: Phase, cfg: Config, accumulate: Callable = accumulate
) -> dict:
    """The optimizer steps of one phase.

    examples  (ids, n_prompt) pairs
    returns   loss and grad_norm (before clipping), means over the phase; skipped, the steps whose
              loss or gradient was not finite
    raises    UserError  after three such steps in a row
    """
    import torch

    losses, norms, in_a_row = [], [], 0
    order = batches(len(examples), cfg.batch_size, np.random.default_rng(phase.seed))
    policy.train()
    bar = data.progress(len(phase.steps), phase.name)
    for i, step in enumerate(phase.steps):
        # stochastic rounding and dropout draw from it, and a kill may have come before
        torch.manual_seed(seed_of(phase.seed, i))
        # set at each step, not by a scheduler: there is no state of it to save and to load
        set_rate(optimizer, phase.rate(step))
        batch = [examples[j] for j in next(order)]
        loss = accumulate(policy, batch, cfg.token_budget)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip)
        norm = ranks.full(norm).item()
        in_a_row += 1
        if math.isfinite(loss + norm):
            optimizer.step()
            losses.append(loss)
            norms.append(norm)
            in_a_row = 0
        else:
            skip(f"{phase.name}: loss {loss:g}, gradient norm {norm:g} at step {step}", in_a_row)
        optimizer.zero_grad(set_to_none=True)
        bar.update()
    bar.close()
    log = {"loss": None, "grad_norm": None, "skipped": len(phase.steps) - len(losses)}
    if losses:
        log |= {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms))}
    return log


def skip(reason: str, in_a_row: int) -> None:
    """Says that a step was skipped; raises UserError at the third in a row.

    One bad batch is no reason to end a run of days; three in a row are a policy that is lost.
    """
    print(f"{reason}, which is skipped", file=sys.stderr)
    if in_a_row == 3:
        raise UserError(
            f"{reason}: three steps in a row without a finite loss and gradient; "
            "the last checkpoint is kept, lower --lr and --sft-lr"
        )


def as_examples(pairs: list, setup, cfg: Config, name: str) -> list[tuple[list[int], int]]:
    """(query, response) pairs as training examples; over-long ones are counted and left out.

    setup  a runs.Setup: its tokenizer, prompts, and the token that ends a response
    """
    examples = []
    for query, text in pairs:
        prompt, end = setup.prompt(query), setup.end_ids[0]
        examples.append(data.example(setup.tokenizer, prompt, text, cfg.max_length, end))
    fit = [e for e in examples if e is not None]
    if len(fit) < len(examples):
        lost = f"{len(examples) - len(fit)} of {len(examples)}"
        limit = f"--max-length {cfg.max_length} tokens"
        print(f"{name}: {lost} are longer than {limit} and left out", file=sys.stderr)
    return fit


# -- the start ------------------------------------------------------------------------------------


def sft(cfg: Config, base: str, examples: list, tokenizer, stages: int = 0) -> list[Path | str]:
    """Fine-tunes base on the human solutions, one cosine over sft_epochs   [App. A; Eq. 3]

    Cached under what it depends on, so that methods and rewards share it.

    stages   checkpoints wanted, one every start_epoch epochs; 0: what cfg.method needs
    returns  their folders; [0] is iteration 0's policy
    """
    if cfg.start_epoch == 0:
        return [base]
    if not examples:
        raise UserError(
            "no human solutions to fine-tune on; --start-epoch 0 starts from the model as it is"
        )
    if stages == 0:  # the baseline evaluates every stage
        stages = 1 if METHODS[cfg.method].iterate else cfg.last_iter + 1
    folder = CACHE / f"sft-{cfg.task}-{sft_key(cfg, base, examples)}"
    paths = [folder / f"epoch_{(i + 1) * cfg.start_epoch}" for i in range(stages)]
    n_steps = cfg.start_epoch * math.ceil(len(examples) / cfg.batch_size)  # a stage
    # of all epochs, also where only the first is trained: M_0 is a point on the SFT's own schedule
    horizon = n_steps * cfg.sft_epochs // cfg.start_epoch
    with one_at_a_time(folder):
        missing = [i for i, path in enumerate(paths) if not is_complete(path)]
        if not missing:
            return paths
        # behind base all paths are one place on: this is the stage before the first missing one
        start = [base, *paths][missing[0]]
        policy = load_policy(cfg, start)
        optimizer = adamw(policy, cfg.sft_lr)
        if start != base:
            load_trainer(start, optimizer)
        schedule = dict(horizon=horizon, peak=cfg.sft_lr, end=cfg.lr_end, warmup=cfg.warmup)
        for i in range(missing[0], stages):
            name, seed = f"SFT to {paths[i].name}", seed_of(cfg.seed, "sft", i)
            phase = Phase(name, seed, range(i * n_steps, (i + 1) * n_steps), **schedule)
            log = train(policy, optimizer, examples, phase, cfg)
            save(State(0, policy, optimizer, log), paths[i], tokenizer)
    return paths


def sft_key(cfg: Config, base: str, examples: list) -> str:
    """Names an SFT by base model, examples and settings."""
    # a folder may be trained further under the same name; a name on the hub is taken at its word
    files = sorted(Path(base).iterdir()) if Path(base).is_dir() else []
    # sizes and times stand for the content: hashing 14 GB at each start would take a minute
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    names = "seed sft_epochs start_epoch sft_lr lr_end warmup clip batch_size optim".split()
    settings = [getattr(cfg, name) for name in names]
    return hashlib.sha256(repr((base, stats, examples, settings)).encode()).hexdigest()[:12]


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Runs that share a cached folder wait for the one that makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    with nullcontext() if ranks.RANK else lock:
        ranks.wait()  # for the first process, which has the lock
        yield


# -- save, and find again -------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # with the process's number: two runs may write the same cached file
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_rows(path: Path, rows: list) -> None:
    """JSON lines, gzipped, as a file that appears whole or not at all."""
    lines = "\n".join(map(json.dumps, rows))
    # without the time in its head, the file is the same bits every time
    write(path, gzip.compress(lines.encode(), 5, mtime=0))


def save(M: State, folder: Path, tokenizer) -> None:
    """folder/ = a Hugging Face model (vLLM, transformers and lm-eval load it) and trainer.pt.

    complete.json comes last, with the fingerprint of every file.
    """
    # files hold tied weights once, under the other name
    tied = M.policy.all_tied_weights_keys
    weights = {name: x for name, x in M.policy.state_dict().items() if name not in tied}
    weights = ranks.whole(weights)
    optimizer = ranks.whole(M.optimizer and M.optimizer.state_dict())
    write_checkpoint(M, weights, optimizer, folder, tokenizer)


@ranks.by_first
def write_checkpoint(M: State, weights: dict, optimizer, folder: Path, tokenizer) -> None:
    """`save`, of whole state_dicts."""
    import torch

    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    M.policy.save_pretrained(tmp, state_dict=weights)
    tokenizer.save_pretrained(tmp)
    torch.save({"optimizer": optimizer, "log": M.log}, tmp / "trainer.pt")
    files = [f for f in tmp.rglob("*") if f.is_file()]
    # else a power cut may leave the new name, and holes where the content was still in memory
    for f in files:
        with open(f, "rb") as handle:
            os.fsync(handle.fileno())
    marks = {str(f.relative_to(tmp)): fingerprint(f) for f in files}
    write(tmp / "complete.json", json.dumps(marks).encode())
    shutil.rmtree(folder, ignore_errors=True)  # an incomplete one, or one that came after such
    os.replace(tmp, folder)


def fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file.

    Above 64 MiB the CRC is of 64 blocks of 1 MiB, spread from its start to its end: seconds, not
    minutes, at 7B.
    """
    size, crc = path.stat().st_size, 0
    starts = range(0, size, 1 << 20)
    if size > 1 << 26:
        starts = [(size - (1 << 20)) * i // 63 for i in range(64)]
    with open(path, "rb") as f:
        for start in starts:
            f.seek(start)
            crc = zlib.crc32(f.read(1 << 20), crc)
    return [size, crc]


def is_complete(folder: Path) -> bool:
    """True if a checkpoint holds every file as it was written."""
    try:
        marks = json.loads((folder / "complete.json").read_text())
        return all(fingerprint(folder / name) == mark for name, mark in marks.items())
    except (OSError, ValueError, AttributeError):
        return False


def load_trainer(folder: Path, optimizer=None) -> dict:
    """trainer.pt's log, after its state has gone into the optimizer where one is given."""
    import torch

    path = folder / "trainer.pt"
    # mapped, not read: at 7B the moments alone are 54 GB of a host's memory
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if optimizer is not None and saved["optimizer"]:
        # else both sets of moments are on the device for a moment
        optimizer.state.clear()
        ranks.load_moments(optimizer, saved["optimizer"])
    return saved["log"]


def resume(cfg: Config, out: Path, start: Path | str, n_done: int) -> State:
    """M_t of the newest complete checkpoint, M_0 where there is none.

    A checkpoint is at most one ahead of the n_done iterations in the metrics. Where one is broken,
    the run steps back and says so.
    """
    folders = [start, *(out / "checkpoints" / f"iter_{i}" for i in range(1, n_done + 1))]
    t = n_done
    # M_0's folder is not tried here: where it is broken, sft has made it again
    while t > 0 and not is_complete(folders[t]):
        t -= 1
    folder = folders[t]
    if t < n_done - 1:
        lost = folders[n_done - 1]
        print(f"{lost} is missing or broken: going on from {folder}", file=sys.stderr)
    M = State(t, load_policy(cfg, folder))
    if t > 0:
        if METHODS[cfg.method].inherit:
            M.optimizer = adamw(M.policy, cfg.lr)
        M.log = load_trainer(folder, M.optimizer)
        if cfg.offload_optimizer:
            place(M.optimizer, "cpu")
    return M


# -- memory ---------------------------------------------------------------------------------------

# bytes of CUDA's context, vLLM's graphs and what it keeps asleep: an estimate
CONTEXT = 4 << 30


@functools.cache
def model_config(model: str):
    """The config of a folder or hub name, a few kB; None where the hub can't be reached.

    raises  UserError  where it is no model, or a gated one
    """
    import transformers

    data.check_hub(model)
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as e:
        reason = data.hub_reason(e)
        if "hub can't be reached" in reason:
            return None
        raise UserError(f"--model {model}: {reason}") from None


def n_parameters(model: str, shape) -> int | None:
    """Parameters of a model: by its config, else by its name ("Mistral-7B"), else None."""
    if shape is not None:
        import torch
        import transformers

        # on "meta" a model has shapes and no memory
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(shape).num_parameters()
    # without the hub: "Mistral-7B-v0.1" still says enough to stop a hopeless run
    size = re.search(r"(\d+(?:\.\d+)?)\s*([BbMm])(?![a-z])", model)
    if size is None:
        return None
    return int(float(size[1]) * {"B": 1e9, "M": 1e6}[size[2].upper()])


def needs(cfg: Config, n: int, shape, gpu: bool) -> dict[str, int]:
    """Bytes that a run of n parameters holds at its peaks, from the model's config alone.

    shape    the model's config; None leaves out activations and KV cache
    returns  weights, gradients, optimizer, activations, context (of a GPU), KV cache; disk, cache
    """
    bf16 = cfg.optim == "adamw8bit"
    # 8-bit moments have a float32 scale for each 256 numbers
    number, moments = (2, 2 + 8 / 256) if bf16 else (4, 8)
    needed = {"weights": number * n, "gradients": number * n, "optimizer": int(moments * n)}
    needed |= {"activations": 0, "context": 0, "KV cache": 0}
    stages = min(1, cfg.start_epoch)
    if cfg.method == "sft" or (cfg.reward == "answer+prm" and not cfg.prm):
        stages = cfg.sft_epochs // max(1, cfg.start_epoch)
    checkpoint = needed["weights"] + needed["optimizer"]
    needed["disk"] = 4 * checkpoint  # the last two, the best, one in writing
    needed["cache"] = stages * checkpoint  # the SFT's
    for name in ("weights", "gradients", "optimizer"):
        needed[name] //= ranks.LOCAL_WORLD  # each process keeps a share
    if shape is not None:
        needed |= at_work(cfg, n, shape, gpu)
    if gpu:  # CUDA, vLLM asleep and its graphs; torch's segments that are not full
        needed["context"] = CONTEXT + int(0.08 * needed["activations"])
    return needed


def at_work(cfg: Config, n: int, shape, gpu: bool) -> dict[str, int]:
    """Bytes that a micro-batch keeps for its backward pass, and those of the hf engine's cache.

    `python tests/bench.py --memory` sets them beside real peaks on a CPU; nobody has compared them
    on a GPU.
    """
    bf16 = cfg.optim == "adamw8bit"
    mixed = gpu and not bf16  # autocast: a float32 residual stream, bf16 matrices
    number = 2 if gpu or bf16 else 4  # bytes of a matrix's input
    h, i, V = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    heads = getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    head_dim = getattr(shape, "head_dim", None) or h // shape.num_attention_heads
    keys = heads * head_dim  # numbers of a token's keys in one layer

    # a layer keeps the inputs of its matrices, and of its norms in float32
    layer = number * (8 * h + 2 * keys + 4 * i) + (14 * mixed + 4 * bf16) * h
    head = 12 * V + 16 * h
    working = 3 * number * i  # of the layer whose backward pass runs
    layers = shape.num_hidden_layers
    a_token, cast = layers * layer + max(head, working), n
    if cfg.gradient_checkpointing:  # the layers' inputs, and one layer
        residual = weights_dtype(cfg).itemsize * h
        a_token, cast = layers * residual + max(head, layer + working), V * h
    buffers = 3 * 2**23 + bf16 * 2**27  # the second is torch's compiler, which adamw8bit runs
    kept = max(cfg.token_budget, cfg.max_length) * a_token + mixed * 2 * cast + buffers

    # one layer of the cache is there twice while rows leave it; autocast keeps copies of weights
    sampled = max(cfg.sample_budget, cfg.max_tokens) * 2 * (layers + 1) * keys
    return {"activations": kept, "KV cache": number * sampled + mixed * 2 * n}


def beside(cfg: Config, needed: dict[str, int]) -> int:
    """Bytes of the trainer that stay on the device while the engine samples."""
    stays = METHODS[cfg.method].inherit and not cfg.offload_optimizer
    return needed["weights"] + (needed["optimizer"] if stays else 0)
