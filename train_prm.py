"""The process reward model: annotate steps by completing them, train, evaluate   [Sec. 2.3, App. A; Math-Shepherd, Wang et al. 2024b]

    python train_prm.py                                 the toy's, in a few minutes; `python bstar.py` does this itself when there is none
    python train_prm.py --task gsm8k --model DIR --train-file train.jsonl --test-file test.jsonl
    python train_prm.py --task math --annotations peiyi9979/Math-Shepherd          ready labels: Math-Shepherd's, PRM800K's or ours

    queries -> [SFT's first epoch] 15 solutions each -> steps -> [SFT's last epoch] 8 completions of every prefix -> labels -> PRM

A step is good if a completion of the solution up to it reaches the gold answer (`--labels hard`), or by the share that do (`soft`).
Solutions that share a prefix share its completions. A prefix that no completion saves is lost, and all that follows it with it:
nothing of it is completed again, all its labels are 0. A whole solution needs no completion: it is right or not.

It is written to the folder that `--out` names: a model for AutoModelForTokenClassification, annotations.jsonl.gz (one solution a line,
in the layout of TRL's PRMTrainer: prompt, completions, labels), prm.json (what was measured). Whoever kills it starts the same command again.
"""
from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import config
import data
import engine
import metrics
import rewards
import runs
import trainer
from config import Config
from data import Query, UserError
from engine import Job
from rewards import PRM
from runs import Setup
from toy import check_toy


@dataclass
class PRMConfig(Config):
    """The PRM's settings, beside those that it shares with the run   [App. A]"""
    labels: str = "hard"                   # hard: any completion is right | soft: the share that is
    annotations: str = ""                  # ready labels instead of ours: a file or hub name, Math-Shepherd's or PRM800K's layout or ours
    prm_queries: int = 0                   # training questions to annotate; 0 = all
    solutions: int = 15                    # sampled a question, by each solver
    completions: int = 8                   # of every step's prefix, by the SFT model of the last epoch
    prm_epochs: int = 2                    # over the annotated solutions
    prm_lr: float = 2e-6                   # peak learning rate
    solvers: str = "first"                 # first | all: the SFT checkpoints that solve the questions; the last one always completes
    separator: str = "\n"                  # what stands after each step in the PRM's input; kept in its tokenizer's config


# the toy's first checkpoint hardly ever solves a story in earnest: a PRM that has seen its solutions alone calls every sound end unlikely
TOY = dict(solvers="all", prm_queries=2000, solutions=2, completions=4, prm_lr=2e-3, separator=";")
PRESETS = {**config.PRESETS, "toy": {**config.PRESETS["toy"], **TOY}}
OF_THE_LOOP = ("method reward prm prm_format offload_optimizer num_iters queries_per_iter K steps_per_iter lr tau temperatures taus balance_queries eval_queries "
               "eval_samples S").split()


# ---------------------------------------------------------------------------------------------------------------------
# Annotate

class Prefix(NamedTuple):
    """The first steps of a solution: what the completer goes on from."""
    query: Query
    text: str


def annotate(have: Setup, starts: Sequence[Path | str], queries: list[Query], cfg: PRMConfig, out: Path) -> list[dict]:
    """Solutions with the share of right completions after each step; annotations.jsonl.gz and what was saved go to `out`   [App. A]

    returns  rows {query, prompt, completions (the steps), share (a step), labels (hard), correct}
    """
    path = out / "annotations.jsonl.gz"
    if path.exists():
        return [row for _, row in data.read_rows(str(path))]
    T = cfg.temperature or 1.0
    found: dict[tuple[Query, str], None] = {}
    for i, start in enumerate(starts if cfg.solvers == "all" else starts[:1]):
        [groups] = engine.sample(have.engine, trainer.load_policy(cfg, start), [Job(f"solutions{i}", queries, cfg.solutions, T)], have.prompt, cfg, out / "parts",
                                f"solutions {i + 1}")
        found.update(((q, s.response), None) for q, g in zip(queries, groups) for s in g if s.finish_reason == "stop" and s.response.strip())
    solutions = [(q, text, rewards.step_ends(text)) for q, text in found]
    share = complete(have, starts[-1], solutions, cfg, out, T)
    correct = rewards.grade([text for _, text, _ in solutions], [q.gold for q, *_ in solutions], cfg.task, [q.text for q, *_ in solutions])
    rows = []
    for (q, text, ends), ok in zip(solutions, correct):
        shares = [share.get((q, text[:e]), 0.0) for e in ends[:-1]]
        shares.append(float(ok and all(shares)))
        rows.append({"query": q.id, "prompt": q.text, "completions": rewards.split_steps(text), "share": shares, "labels": [x > 0 for x in shares], "correct": ok})
    trainer.write(path, gzip.compress("\n".join(map(json.dumps, rows)).encode(), 5, mtime=0))
    return rows


def complete(have: Setup, completer: Path | str, solutions: list[tuple[Query, str, list[int]]], cfg: PRMConfig, out: Path, T: float) -> dict:
    """(query, prefix) -> share of its completions that reach the gold answer, depth by depth; lost prefixes and those behind them are left out."""
    policy, share, done = trainer.load_policy(cfg, completer), {}, 0
    prompt = lambda p: have.prompt(p.query) + have.tokenizer(p.text, add_special_tokens=False)["input_ids"]
    for depth in range(max((len(ends) for *_, ends in solutions), default=0) - 1):
        alive = [Prefix(q, text[:ends[depth]]) for q, text, ends in solutions
                 if len(ends) > depth + 1 and (depth == 0 or share.get((q, text[:ends[depth - 1]]), 0.0) > 0)]
        todo = [p for p in dict.fromkeys(alive) if len(prompt(p)) < cfg.max_length]
        if not todo:
            break
        [groups] = engine.sample(have.engine, policy, [Job(f"step{depth + 1}", todo, cfg.completions, T)], prompt, cfg, out / "parts", f"complete step {depth + 1}")
        flat = [(p, s) for p, g in zip(todo, groups) for s in g]
        right = rewards.grade([f"{p.text} {s.response}" for p, s in flat], [p.query.gold for p, _ in flat], cfg.task, [p.query.text for p, _ in flat])
        ended = np.array([ok and s.finish_reason == "stop" for ok, (_, s) in zip(right, flat)]).reshape(len(todo), cfg.completions)
        share.update(zip(todo, ended.mean(axis=1).tolist()))
        done += ended.size
    total = cfg.completions * sum(len(ends) - 1 for *_, ends in solutions)
    shared = cfg.completions * len({(q, text[:e]) for q, text, ends in solutions for e in ends[:-1]})
    trainer.write(out / "completions.json", json.dumps({"without sharing": total, "without the lost": shared, "done": done}).encode())
    return share


# ---------------------------------------------------------------------------------------------------------------------
# Ready labels

def read_annotations(name: str) -> Iterator[dict]:
    """Rows {prompt, completions, labels} of a file, of the hub or of a folder of its kind: ours, Math-Shepherd's or PRM800K's; a label None is not trained on.

    raises UserError  naming file and line of a row that is none of these
    """
    is_file = name.endswith((".jsonl", ".json", ".gz", ".parquet")) or Path(name).is_file()   # a name on the hub may have dots in it
    rows = data.read_rows(name) if is_file else data.hub_rows(name, None, "train", "--annotations")
    for where, row in rows:
        try:
            found = [*_shepherd(row)] if "input" in row else [*_prm800k(row)] if "question" in row else [_ours(row)]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise UserError(f"--annotations {where}: a broken row ({type(e).__name__}: {e})") from None
        yield from found


def _ours(row: dict) -> dict:
    prompt, steps, labels = row["prompt"], row["completions"], [float(x) for x in row["labels"]]
    share = [float(x) for x in row.get("share", labels)]
    if not (isinstance(prompt, str) and isinstance(steps, list) and len(steps) == len(labels) == len(share) > 0 and all(isinstance(s, str) for s in steps)
            and all(0 <= x <= 1 for x in labels + share)):
        raise ValueError("expected prompt, completions (texts) and as many labels from 0 to 1")
    return {"prompt": prompt, "completions": steps, "labels": labels, **({"share": share} if "share" in row else {})}


def _shepherd(row: dict) -> Iterator[dict]:
    """`input` has the tag after each step, `label` + or - in its place."""
    *steps, rest = row["input"].split("ки")
    at, labels = 0, []
    for step in steps:
        at += len(step)
        labels.append({"+": 1.0, "-": 0.0}[row["label"][at]])
        at += 1
    if not labels or rest.strip() or row["label"][:len(steps[0])] != steps[0]:
        raise ValueError("input and label don't say the same")
    question, first, text = steps[0].rpartition("Step 1:")
    if not first:
        raise ValueError("no 'Step 1:'")
    texts = [text, *(s.lstrip().partition(":")[2] for s in steps[1:])]
    yield {"prompt": question.strip(), "completions": [t.strip() for t in texts], "labels": labels}


def _prm800k(row: dict) -> Iterator[dict]:
    """One row for the steps that were gone on from, and one for each other candidate, whose last step alone is rated; neutral is right."""
    prompt, chain, labels = row["question"]["problem"], [], []
    for step in row["label"]["steps"]:
        chosen, ratings = step["chosen_completion"], step["completions"] or []
        for k, c in enumerate(ratings):
            if k != chosen and c["rating"] is not None:
                yield {"prompt": prompt, "completions": [*chain, c["text"]], "labels": [None] * len(chain) + [float(c["rating"] >= 0)]}
        following = ratings[chosen] if chosen is not None else step["human_completion"]
        if following is None:
            break
        rating = following.get("rating")
        chain.append(following["text"])
        labels.append(1.0 if chosen is None else None if rating is None else float(rating >= 0))
    if chain:
        yield {"prompt": prompt, "completions": chain, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# Train

class Example(NamedTuple):
    """One solution as the PRM reads it; the first two fields are what data.micro_batches needs."""
    ids: list[int]
    at: tuple[list[int], list[float]]      # places of the step scores, and their labels


def encode(prm: PRM, rows: Iterable[dict], cfg: PRMConfig) -> list[Example]:
    """Annotated solutions as training examples; over-long ones, and those without a label, are dropped and counted on stderr."""
    found, total = [], 0
    for total, row in enumerate(rows, 1):
        ids, places = prm.encode(row["prompt"], row["completions"])
        labels = row["share"] if cfg.labels == "soft" and "share" in row else row["labels"]
        kept = [(i, float(y)) for i, y in zip(places, labels) if y is not None]
        if len(ids) <= cfg.max_length and kept:
            found.append(Example(ids, tuple(map(list, zip(*kept)))))
    if not found:
        raise UserError(f"none of {total} annotated solutions has a label and fits --max-length {cfg.max_length}: nothing to train the PRM on")
    if len(found) < total:
        print(f"annotations: {total - len(found)} of {total} have no label or are longer than --max-length {cfg.max_length} and left out", file=sys.stderr)
    return found


def accumulate(prm: PRM, batch: list[Example], token_budget: int) -> float:
    """Adds to .grad the gradient of the mean cross-entropy of a global batch's steps against their labels in [0, 1]; returns that mean."""
    import torch
    total, mean = sum(len(e.at[0]) for e in batch), 0.0
    for rows, at in data.micro_batches(batch, token_budget):
        with trainer.autocast():
            log_p = prm.logits(rows, [places for places, _ in at]).log_softmax(-1)
        y = torch.tensor([x for _, labels in at for x in labels], device=log_p.device)
        loss = -(y * log_p[:, 1] + (1 - y) * log_p[:, 0]).sum() / total
        loss.backward()
        mean += loss.item()
    return mean


def new_prm(start: Path | str, tokenizer, template: str, cfg: PRMConfig) -> PRM:
    """An untrained PRM: the start's body, two labels, a random head; separator and template are kept with the tokenizer."""
    import torch
    import transformers
    torch.manual_seed(trainer.seed_of(cfg.seed, "prm head"))
    model = transformers.AutoModelForTokenClassification.from_pretrained(start, dtype=trainer.weights_dtype(cfg), num_labels=2, id2label={0: "-", 1: "+"})
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokenizer.init_kwargs.update(step_separator=cfg.separator, prompt_template=template)
    return PRM(model.to(trainer.device()), tokenizer, "own", cfg.token_budget)


def train(start: Path | str, tokenizer, template: str, rows: list[dict], cfg: PRMConfig, out: Path) -> None:
    """prm_epochs over the annotations, a checkpoint after each; the last one is the PRM in out/prm."""
    folder = lambda e: out / "checkpoints" / f"epoch_{e}"
    done = next((e for e in range(cfg.prm_epochs - 1, 0, -1) if trainer.is_complete(folder(e))), 0)
    prm = new_prm(folder(done) if done else start, tokenizer, template, cfg)
    optimizer, examples = trainer.adamw(prm.model, cfg.prm_lr), encode(prm, rows, cfg)
    log = trainer.load_trainer(folder(done), optimizer) if done else {}
    per_epoch = math.ceil(len(examples) / cfg.batch_size)
    rate = lambda s: trainer.cosine(s, cfg.prm_epochs * per_epoch, cfg.prm_lr, cfg.prm_lr / 10, cfg.warmup)
    for e in range(done, cfg.prm_epochs):
        log = trainer.train(prm.model, optimizer, examples, range(e * per_epoch, (e + 1) * per_epoch), rate, cfg, trainer.seed_of(cfg.seed, "prm", e),
                          f"PRM epoch {e + 1}", lambda _, batch, budget: accumulate(prm, batch, budget))
        last = e + 1 == cfg.prm_epochs
        trainer.save_checkpoint(out / "prm" if last else folder(e + 1), prm.model, tokenizer, None if last else optimizer, log)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate

def evaluate(have: Setup, policy: Path | str, queries: list[Query], rows: list[dict], cfg: PRMConfig, out: Path) -> dict:
    """What the PRM is worth on fresh solutions of questions that it was not trained on; on the toy also the labels' and its own truth.

    returns  auc (solution score against the right answer), calibration, and on the toy step_auc and auc_sound against exact truth,
             labels_agree (hard labels equal to exact truth), labels_auc (the share's AUC)
    """
    [groups] = engine.sample(have.engine, trainer.load_policy(cfg, policy), [Job("fresh", queries, 4, cfg.temperature or 1.0)], have.prompt, cfg, out / "parts", "fresh")
    rewards.score(queries, groups, dataclasses.replace(cfg, reward="answer+prm"), PRM.load(out / "prm", "own", cfg.token_budget), "score fresh")
    row = {k.removeprefix("prm/"): v for k, v in metrics.watch_prm(queries, groups, 1.0).items()}
    if cfg.task == "toy" and "share" in rows[0]:
        pairs = []
        for r in rows:
            ok = check_toy(r["prompt"], " ; ".join(r["completions"]))
            pairs += [(y, x, all(ok[:j + 1])) for j, (y, x) in enumerate(zip(r["labels"], r["share"]))]
        hard, share, truth = map(np.array, zip(*pairs))
        row.update(labels_agree=round(float((hard == truth).mean()), 4), labels_auc=round(metrics.auc(share, truth), 4))
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The whole

def ready(cfg: Config, have: Setup, out: Path | None = None) -> Path:
    """The folder of the task's PRM, made now where it is missing; cached under what it is made of, so that methods share it."""
    if not isinstance(cfg, PRMConfig):
        cfg = PRMConfig(**{**dataclasses.asdict(cfg), **{k: v for k, v in PRESETS[cfg.task].items() if k not in vars(cfg)}, "temperature": None})
    if out:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {out}: {e.strerror}") from None
    ready_labels, queries = [*read_annotations(cfg.annotations)] if cfg.annotations else None, have.splits.train   # before hours of SFT
    starts = trainer.sft(cfg, have.base, have.human, have.tokenizer, 1 if cfg.annotations else cfg.sft_epochs // max(1, cfg.start_epoch))
    mine = [f.name for f in dataclasses.fields(PRMConfig) if f.name not in {g.name for g in dataclasses.fields(Config)}]
    made_of = [*map(str, starts), [(q.text, q.gold) for q in queries], *(ready_labels or []), *(getattr(cfg, n) for n in
               [*mine, *"seed task temperature max_tokens max_length batch_size token_budget warmup clip chat optim".split()])]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    out = out or Path("runs/cache") / f"prm-{cfg.task}-{key}"
    with trainer.one_at_a_time(out):
        if (out / "made_of").exists() and (out / "made_of").read_text() != key:
            raise UserError(f"--out {out} holds a PRM made of other settings, data or SFT checkpoints; choose another --out")
        trainer.write(out / "made_of", key.encode())
        if not trainer.is_complete(out / "prm") or not (out / "prm.json").exists():
            make(have, starts, queries, ready_labels, cfg, out)
    return out / "prm"


def make(have: Setup, starts: Sequence[Path | str], queries: list[Query], rows: list[dict] | None, cfg: PRMConfig, out: Path) -> None:
    """Annotate, train, evaluate; each part is left as it is where it is done."""
    picked = random.Random(trainer.seed_of(cfg.seed, "prm")).sample(queries, len(queries))
    n = min(cfg.prm_queries or len(queries), len(queries) - min(200, len(queries) // 10))
    rows = rows if cfg.annotations else annotate(have, starts, picked[:n], cfg, out)
    if not trainer.is_complete(out / "prm"):
        train(have.base, trainer.load_tokenizer(have.base), have.splits.base, rows, cfg, out)
    row = {"solutions": len(rows), "steps": sum(len(r["labels"]) for r in rows), "good": round(float(np.mean([y or 0 for r in rows for y in r["labels"]])), 4)}
    if (out / "completions.json").exists():
        row["completions"] = json.loads((out / "completions.json").read_text())
    row.update(evaluate(have, starts[0], picked[n:n + 200], rows, cfg, out))
    trainer.write(out / "prm.json", (json.dumps(row) + "\n").encode())
    shutil.rmtree(out / "parts", ignore_errors=True)
    print(line(row), file=sys.stderr)


def line(row: dict) -> str:
    """prm.json in one line."""
    said = [f"PRM | {row['solutions']} solutions, {row['steps']} steps, {100 * row['good']:.0f} % good"]
    if c := row.get("completions"):
        said.append(f"completions {c['done']} of {c['without sharing']} ({100 - 100 * c['done'] / max(1, c['without sharing']):.0f} % saved)")
    said += [f"{k} {row[k]:.3f}" for k in ("auc", "auc_sound", "step_auc", "labels_agree", "ece") if row.get(k) is not None]
    return " | ".join(said)


def main(argv: Sequence[str] | None = None) -> None:
    """python train_prm.py"""
    cfg = config.parse_config(argv, PRMConfig, PRESETS, OF_THE_LOOP, __doc__)
    for flag, value, allowed in (("labels", cfg.labels, ("hard", "soft")), ("solvers", cfg.solvers, ("first", "all"))):
        config.one_of(flag, value, allowed)
    if config.PRESETS[cfg.task].get("reward") == "tests":
        raise UserError(f"--task {cfg.task}: its reward is unit tests, which no PRM joins, and a program can't be labelled step by step")
    for name, low in dict(prm_queries=0, solutions=1, completions=1, prm_epochs=1, prm_lr=1e-12).items():
        if not getattr(cfg, name) >= low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected at least {low:g}")
    path = ready(cfg, runs.set_up(cfg), Path(cfg.out) if cfg.out else None)
    print(f"{line(json.loads((path.parent / 'prm.json').read_text()))}\n{path}")


if __name__ == "__main__":
    data.run(main)
