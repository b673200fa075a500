"""Plain PyTorch: load a policy, fine-tune it with AdamW, save it whole or not at all; and what memory that takes."""
from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np

import data
from config import METHODS, Config
from data import Query, UserError


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it appears complete or not at all: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def seed_of(*key) -> int:
    """A 31-bit seed from a key such as (seed, iteration, phase): no generator's state has to be saved, no two phases share a stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def device() -> str:
    """"cuda" where there is a GPU, else "cpu"."""
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_dtype(cfg: Config):
    """float32 (plain bf16 weights lose most updates at lr 5e-6 to rounding), or bf16 for adamw8bit, which rounds stochastically."""
    import torch
    return torch.bfloat16 if cfg.optim == "adamw8bit" else torch.float32


def load_policy(cfg: Config, model: str | Path, where: str = ""):
    """The policy, on the device or `where`."""
    import transformers
    try:
        policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=weights_dtype(cfg))
    except Exception as e:                         # missing, truncated, of an unknown kind: a dozen exception types, one way out
        raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    for scaled in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(policy.config, scaled, None) not in (None, 1.0):
            raise UserError(f"--model {model}: its head has {scaled}, which the loss here leaves out; take a Llama, Mistral or Qwen")
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.to(where or device())


def load_tokenizer(model: str | Path):
    """The tokenizer of a model folder or hub name; raises UserError where there is none."""
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {model}: its tokenizer has no end-of-text token, so no response could end")
    return tokenizer


def adamw(policy, lr: float):
    """AdamW, fused; over bf16 weights torchao's, with moments of 8 bits and stochastic rounding. No weight decay (the paper names none)."""
    import torch
    if policy.dtype == torch.bfloat16:
        from torchao.optim import AdamW8bit
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")      # of a cache of compiled code, from torchao's tensors
        return AdamW8bit(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, bf16_stochastic_round=True)
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def place(optimizer, where) -> None:
    """Moves the moments to a device; the step counts, which torch and torchao keep where each wants them, stay."""
    for state in optimizer.state.values():
        state.update({k: v.to(where) for k, v in state.items() if v.dim()})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that fills up is one line; it reaches us as OSError, RuntimeError or SafetensorError."""
    try:
        yield
    except Exception as e:
        free = shutil.disk_usage(path.parent).free >> 20
        raise UserError(f"{path}: can't be written ({str(e).splitlines()[0]}; {free} MiB free on the disk); "
                        "what was complete is kept, the same command goes on") from None


@data.unbroken()
def save_checkpoint(folder: Path, policy, tokenizer, optimizer, log: dict) -> None:
    """folder/ = a Hugging Face model (vLLM, transformers and lm-eval load it) + trainer.pt, and last complete.json with every file's `fingerprint`."""
    import torch
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    with writing(folder):
        policy.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        torch.save({"optimizer": optimizer and optimizer.state_dict(), "log": log}, tmp / "trainer.pt")
    files = [f for f in tmp.rglob("*") if f.is_file()]
    for f in files:
        with open(f, "rb") as handle:
            os.fsync(handle.fileno())
    write(tmp / "complete.json", json.dumps({str(f.relative_to(tmp)): fingerprint(f) for f in files}).encode())
    shutil.rmtree(folder, ignore_errors=True)      # only ever an incomplete one
    os.replace(tmp, folder)


def fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file; above 64 MiB the CRC is of 64 blocks of 1 MiB, spread from its start to its end (seconds, not minutes, at 7B)."""
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as f:
        for at in range(0, size, 1 << 20) if size <= 1 << 26 else [(size - (1 << 20)) * i // 63 for i in range(64)]:
            f.seek(at)
            crc = zlib.crc32(f.read(1 << 20), crc)
    return [size, crc]


def is_complete(folder: Path) -> bool:
    """Does a checkpoint hold every file as it was written?"""
    try:
        return all(fingerprint(folder / name) == mark for name, mark in json.loads((folder / "complete.json").read_text()).items())
    except (OSError, ValueError):
        return False


def load_trainer(folder: Path, optimizer=None) -> dict:
    """trainer.pt's log, after its state has gone into the optimizer where one is given."""
    import torch
    saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    if optimizer is not None and saved["optimizer"]:
        optimizer.load_state_dict(saved["optimizer"])
    return saved["log"]


def prune(out: Path, starts: Sequence[Path | str], t: int, best: int) -> None:
    """Keeps the last two checkpoints and the best; policy and best are links to the newest and to the best on validation."""
    folder = out / "checkpoints"
    for old in folder.glob("iter_*"):
        if int(old.name[5:]) not in (t, t - 1, best):
            shutil.rmtree(old)
    for name, i in (("policy", t), ("best", best)):
        target = folder / f"iter_{i}" if (folder / f"iter_{i}").exists() else Path(starts[min(i, len(starts) - 1)])
        if target.exists():                        # not where the start is a model on the hub
            link = out / f".{name}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, out))
            os.replace(link, out / name)


def n_parameters(model: str) -> int | None:
    """Parameters of a local model from its config alone, of a hub name from the name ("Mistral-7B"); None where neither says."""
    if Path(model).is_dir():
        import torch
        import transformers
        try:
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model)).num_parameters()
        except (OSError, ValueError) as e:
            raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    named = re.search(r"(\d+(?:\.\d+)?)\s*([BbMm])(?![a-z])", model)
    return int(float(named[1]) * {"b": 1e9, "m": 1e6}[named[2].lower()]) if named else None


def needs(cfg: Config, n: int, shape, gpu: bool) -> dict[str, int]:
    """Bytes that a run of n parameters holds at its peaks, from the model's config alone (`shape`; None: activations and KV cache are left out).

    A layer keeps 8 h + 2 kv + 4 i numbers a token for its backward pass (h hidden, i intermediate, kv = key heads x head size), of 4 bytes; in bf16
    of 2, and 4 h bytes as its norms are float32, 14 h under autocast, where the residual stream is float32, each matrix casts its own input, and
    the casts of the weights stay, too. The backward pass of the layer at work holds 3 i more, or the head 12 bytes a vocabulary entry, whichever is
    more. Gradient checkpointing keeps the layers' inputs alone, and one layer. Sampling holds the cache, one layer of it twice, and under
    autocast the weights' casts. 24 MiB are buffers, 128 MiB torch's compiler, which adamw8bit runs.
    `python tests/bench.py --memory` sets this beside real peaks on a CPU; on a GPU it has not been compared.
    """
    bf16 = cfg.optim == "adamw8bit"
    size, mixed = 2 if bf16 else 4, gpu and not bf16
    stages = cfg.sft_epochs // max(1, cfg.start_epoch) if cfg.method == "sft" or cfg.reward == "answer+prm" and not cfg.prm else min(1, cfg.start_epoch)
    found = {"weights": size * n, "gradients": size * n, "optimizer": int(2 * n * (1 + 4 / 256)) if bf16 else 8 * n, "activations": 0, "KV cache": 0}
    found["disk"] = (found["weights"] + found["optimizer"]) * (5 + stages)          # the last two checkpoints, the best, one in writing, one paused; the SFT's
    if shape is not None:
        h, i, L, V, number = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.vocab_size, 2 if gpu or bf16 else 4
        kv = getattr(shape, "num_key_value_heads", shape.num_attention_heads) * (getattr(shape, "head_dim", None) or h // shape.num_attention_heads)
        layer = number * (8 * h + 2 * kv + 4 * i) + (14 * mixed + 4 * bf16) * h
        last = 12 * V + 16 * h
        kept = L * size * h + max(last, layer + 3 * number * i) if cfg.gradient_checkpointing else L * layer + max(last, 3 * number * i)
        casts = mixed * 2 * (V * h if cfg.gradient_checkpointing else n)
        found["activations"] = max(cfg.token_budget, cfg.max_length) * kept + casts + 3 * 2**23 + bf16 * 2**27
        found["KV cache"] = number * max(cfg.sample_budget, cfg.max_tokens) * 2 * (L + 1) * kv + mixed * 2 * n
    return found


def beside(cfg: Config, need: dict[str, int]) -> int:
    """Bytes of the trainer that stay on the device while the engine samples: the weights, and where the method inherits it the optimizer."""
    return need["weights"] + need["optimizer"] * (METHODS[cfg.method].inherit and not cfg.offload_optimizer)


@contextmanager
def memory_by(flags: str) -> Iterator[None]:
    """A GPU that runs out of memory is one line that names the flags to change; the run then goes on (see MEMORY)."""
    import torch
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise UserError(f"{'. '.join(str(e).split('. ')[:2])}; what was complete is kept, the same command with {flags} goes on") from None


def autocast(cache: bool = False):
    """bf16 arithmetic over float32 weights on a GPU; nothing on a CPU. Its cache is a second copy of the model: only worth it in sampling."""
    import torch
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available(), cache_enabled=cache)


def token_nll(policy, rows: Sequence[Sequence[int]], n_prompts: Sequence[int]):
    """-log p(y_t | x, y_<t) of every response token, flat   [Eq. 3, App. B]

    rows (B, l_i) ids of prompt and response, n_prompts (B,). Padding stands on the right, where causal attention never looks back from,
    so no mask is needed; the head runs at response positions only, and no (B, L, vocabulary) tensor exists.
    returns (sum of response lengths,) float32
    """
    import torch
    lengths, L = torch.tensor([len(r) for r in rows]), max(map(len, rows))
    ids = torch.tensor([list(r) + [0] * (L - len(r)) for r in rows], device=policy.device)                      # (B, L)
    place = torch.arange(1, L)
    at = ((place >= torch.tensor(n_prompts)[:, None]) & (place < lengths[:, None])).to(policy.device)          # (B, L-1) response tokens
    with autocast():
        hidden = policy.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[at]               # (tokens, width)
        logits = policy.get_output_embeddings()(hidden)                                                        # (tokens, vocabulary)
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][at], reduction="none")


def accumulate(policy, batch: list[tuple[list[int], int]], token_budget: int) -> float:
    """Adds to .grad the gradient of the mean over *all* response tokens of a global batch, whatever the micro-batches; returns that mean."""
    total = sum(len(ids) - n for ids, n in batch)
    mean = 0.0
    for rows, n_prompts in data.micro_batches(batch, token_budget):
        loss = token_nll(policy, rows, n_prompts).sum() / total
        loss.backward()
        mean += loss.item()
    return mean


def cosine(step: int, horizon: int, peak: float, end: float, warmup: float) -> float:
    """Learning rate of a step: linear warm-up over a share of the horizon, then a cosine from peak to end.

    >>> [round(cosine(s, 10, 1.0, 0.1, 0.1), 3) for s in (0, 1, 5, 9)]
    [1.0, 0.973, 0.472, 0.1]
    """
    rise = max(1, round(warmup * horizon))
    if step < rise:
        return peak * (step + 1) / rise
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, (step + 1 - rise) / max(1, horizon - rise)))) / 2


@memory_by("a smaller --token-budget, or with --gradient-checkpointing,")
def train(policy, optimizer, examples: list[tuple[list[int], int]], steps: range, rate: Callable[[int], float], cfg: Config, seed: int,
          desc: str, accumulate: Callable = accumulate) -> dict:
    """The optimizer steps of one phase; every example once before any comes again. Ctrl-C ends after a step, which the same command goes on from.

    examples  (ids, n_prompt) pairs; steps numbers them on the schedule `rate`
    returns   {"loss": mean over the phase's tokens-weighted steps, "grad_norm": mean before clipping, "skipped": steps whose loss or gradient was not finite}
    raises    UserError  after three such steps in a row
    """
    import torch
    rng, order, log = np.random.default_rng(seed), np.zeros(0, dtype=int), {"done": 0, "loss": [], "grad_norm": [], "skipped": 0, "in_a_row": 0}
    paused = Path(cfg.out or "runs/cache") / f"paused-{seed_of(desc, seed, steps, len(examples))}.pt"
    if paused.exists():
        saved = torch.load(paused, map_location="cpu", weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
    policy.train()
    bar = data.progress(len(steps), desc)
    bar.update(log["done"])
    for i, step in enumerate(steps):
        while len(order) < cfg.batch_size:
            order = np.concatenate([order, rng.permutation(len(examples))])
        batch, order = [examples[j] for j in order[:cfg.batch_size]], order[cfg.batch_size:]
        if i < log["done"]:
            continue
        with data.unbroken() as asked:
            torch.manual_seed(seed_of(seed, i))    # stochastic rounding and dropout draw from it: a step draws the same, however the run came to it
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(rate(step)) if torch.is_tensor(group["lr"]) else rate(step)
            loss = accumulate(policy, batch, cfg.token_budget)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip).item()
            if math.isfinite(loss + norm):
                optimizer.step()
                log["loss"].append(loss)
                log["grad_norm"].append(norm)
                log["in_a_row"] = 0
            else:
                log["skipped"], log["in_a_row"] = log["skipped"] + 1, log["in_a_row"] + 1
                print(f"{desc}: loss {loss:g}, gradient norm {norm:g} at step {step}, which is skipped", file=sys.stderr)
            optimizer.zero_grad(set_to_none=True)
            log["done"] += 1
            bar.update()
            if log["in_a_row"] == 3:
                raise UserError(f"{desc}: three steps in a row without a finite loss and gradient; the last checkpoint is kept, lower --lr and --sft-lr")
            if asked:
                with writing(paused):
                    torch.save({"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, tmp := paused.with_suffix(".tmp"))
                    os.replace(tmp, paused)
    bar.close()
    paused.unlink(missing_ok=True)
    return {**{k: float(np.mean(log[k])) if log[k] else None for k in ("loss", "grad_norm")}, "skipped": log["skipped"]}


def encode(pairs: Sequence[tuple[Query, str]], prompt: Callable[[Query], list[int]], tokenizer, cfg: Config, name: str) -> list[tuple[list[int], int]]:
    """(query, response) pairs as training examples; over-long ones are dropped and counted on stderr."""
    encoded = [data.example(tokenizer, prompt(q), response, cfg.max_length) for q, response in pairs]
    fit = [e for e in encoded if e is not None]
    if len(fit) < len(encoded):
        print(f"{name}: {len(encoded) - len(fit)} of {len(encoded)} are longer than --max-length {cfg.max_length} tokens and left out", file=sys.stderr)
    return fit


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Runs that share a cached folder wait for the one that makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def sft(cfg: Config, base: str, examples: list[tuple[list[int], int]], tokenizer, stages: int) -> list[Path | str]:
    """Fine-tunes base on the human solutions, one cosine over sft_epochs, and keeps every start_epoch-th epoch   [App. A; Eq. 3]

    Cached under what it is made of (settings, base, examples), so methods and rewards share it.
    returns the first `stages` checkpoints; [0] is iteration 0's policy
    """
    if not cfg.start_epoch:
        return [base]
    if not examples:
        raise UserError("no human solutions to fine-tune on; --start-epoch 0 starts from the model as it is")
    parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(base).iterdir())] if Path(base).is_dir() else []
    made_of = (base, parts, examples, [getattr(cfg, n) for n in "seed sft_epochs start_epoch sft_lr lr_end warmup clip batch_size optim".split()])
    folder = Path("runs/cache") / f"sft-{cfg.task}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"
    paths = [folder / f"epoch_{(i + 1) * cfg.start_epoch}" for i in range(stages)]
    per_stage = cfg.start_epoch * math.ceil(len(examples) / cfg.batch_size)
    rate = lambda s: cosine(s, per_stage * cfg.sft_epochs // cfg.start_epoch, cfg.sft_lr, cfg.lr_end, cfg.warmup)
    with one_at_a_time(folder):
        first = next((i for i, p in enumerate(paths) if not is_complete(p)), stages)
        if first < stages:
            policy = load_policy(cfg, paths[first - 1] if first else base)
            optimizer = adamw(policy, cfg.sft_lr)
            if first:
                load_trainer(paths[first - 1], optimizer)
        for i in range(first, stages):
            log = train(policy, optimizer, examples, range(i * per_stage, (i + 1) * per_stage), rate, cfg, seed_of(cfg.seed, "sft", i), f"SFT to {paths[i].name}")
            save_checkpoint(paths[i], policy, tokenizer, optimizer, log)
    return paths
