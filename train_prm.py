"""The process reward model: annotate steps by completing them, train, evaluate   [Sec. 2.3, App. A]

    python train_prm.py                     the stories'; `bstar.py --task stories` makes it, too
    python train_prm.py --task gsm8k --model DIR --train-file train.jsonl --test-file test.jsonl
    python train_prm.py --task math --annotations peiyi9979/Math-Shepherd     ready labels

    queries -> solutions -> steps -> completions of every prefix -> labels -> PRM

A step is good if a completion of the solution up to it reaches the gold answer (--labels hard), or
by the share that do (soft). Solutions that share a prefix share its completions. A prefix that no
completion saves is lost, and so is all behind it: none of it is completed, all its labels are 0.

--out gets prm/ (for AutoModelForTokenClassification), annotations.jsonl.gz (in the layout of TRL's
PRMTrainer) and prm.json (what was measured). Whoever kills it starts the same command again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
import data
import metrics
import ranks
import rewards
import runs
import trainer
from config import Config, opt
from data import Query, UserError
from rewards import PRM
from runs import Setup
from toy import CHECKERS, STEPS


@dataclass
class PRMConfig(Config):
    """The PRM's settings, beside those that it shares with the run   [App. A]"""

    task: str = opt("stories", "whose questions", one_of=config.LOADERS)
    labels: str = opt("hard", "any completion is right; or their share", one_of=("hard", "soft"))
    annotations: str = opt("", "ready labels: file or hub name, Math-Shepherd's, PRM800K's or ours")
    prm_queries: int = opt(0, "training questions to annotate; 0: all", low=0)
    solutions: int = opt(15, "sampled a question, by each solver", low=1)
    completions: int = opt(8, "of every step's prefix, by the last epoch's SFT model", low=1)
    prm_epochs: int = opt(2, "over the annotated solutions", low=1)
    prm_lr: float = opt(2e-6, "peak learning rate", low=1e-12)
    solvers: str = opt("first", "SFT checkpoints that solve questions", one_of=("first", "all"))
    separator: str = opt("\n", "what stands after each step in the PRM's input")


# A toy's first checkpoint hardly ever solves a question in earnest, and a PRM that has seen its
# solutions alone calls every sound end unlikely: so all checkpoints solve. A walk's step is good as
# long as anything can follow, which the SFT model seldom finds: so it tries often, and cool.
TOYS = {
    "walk": dict(
        solvers="all", solutions=2, completions=64, prm_lr=1e-3, separator=":", temperature=0.7
    ),
    "stories": dict(
        solvers="all", prm_queries=2000, solutions=2, completions=4, prm_lr=2e-3, separator=";"
    ),
}
PRESETS = config.PRESETS | {task: {**config.PRESETS[task], **TOYS[task]} for task in TOYS}

# no flags here
OF_THE_LOOP = """method reward prm prm_format offload_optimizer num_iters queries_per_iter K
steps_per_iter lr tau temperatures taus balance_queries eval_queries
eval_samples S probe max_repeats""".split()
# of the others, what the PRM depends on beside its own settings
SHARED = "seed task temperature max_tokens max_length batch_size warmup clip chat optim".split()


# of several processes the first writes, and removes what none reads any more
write, write_rows = map(ranks.by_first, (trainer.write, trainer.write_rows))
remove = ranks.by_first(shutil.rmtree)


# -- annotate --------------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """The first steps of a solution: what the completer goes on from."""

    query: Query
    text: str


def annotate(
    setup: Setup, starts: list, queries: list[Query], cfg: PRMConfig, out: Path
) -> list[dict]:
    """Solutions with the share of right completions after each step   [App. A]

    starts   the SFT checkpoints: the first or all of them solve, the last one completes
    returns  rows {query, prompt, completions (the steps), share (a step), labels (hard), correct}
    """
    path = out / "annotations.jsonl.gz"
    if path.exists():
        return [row for _, row in data.read_rows(str(path))]
    solutions = solve(setup, starts, queries, cfg)
    share = complete(setup, starts[-1], solutions, cfg, out)
    correct = right([prefixes[-1] for prefixes in solutions], cfg.task)
    rows = []
    for prefixes, ok in zip(solutions, correct):
        query, text = prefixes[-1]
        shares = [share.get(prefix, 0.0) for prefix in prefixes[:-1]]
        shares.append(float(ok and all(shares)))  # a whole solution is right or not
        steps = rewards.split_steps(text, cfg.task)
        row = {"query": query.id, "prompt": query.text, "completions": steps}
        row |= {"share": shares, "labels": [x > 0 for x in shares], "correct": ok}
        rows.append(row)
    write_rows(path, rows)
    return rows


def right(solutions: list[Prefix], task: str) -> list[bool]:
    """Whether each whole solution has the right answer."""
    texts = [s.text for s in solutions]
    golds = [s.query.gold for s in solutions]
    questions = [s.query.text for s in solutions]
    return rewards.grade(texts, golds, task, questions)


def solve(setup: Setup, starts: list, queries: list[Query], cfg: PRMConfig) -> list[list[Prefix]]:
    """Distinct finished solutions in the order of drawing, each as its prefixes, the whole last."""
    if cfg.solvers == "first":
        starts = starts[:1]
    whole: dict[Prefix, None] = {}
    for i, start in enumerate(starts):
        with setup.engine.awake(trainer.load_policy(cfg, start)) as draw:
            groups = draw(queries, cfg.solutions, cfg.temperature or 1.0, f"solutions{i}")
        for query, group in zip(queries, groups):
            for s in group:
                if s.finish_reason == "stop" and s.response.strip():
                    # a dict keeps the order of drawing: a set's differs between processes
                    whole[Prefix(query, s.response)] = None
    return [steps_of(query, text, cfg.task) for query, text in whole]


def steps_of(query: Query, text: str, task: str = "") -> list[Prefix]:
    """A solution up to the end of each step."""
    return [Prefix(query, text[:end]) for end in rewards.step_ends(text, task)]


def complete(
    setup: Setup, completer: Path | str, solutions: list[list[Prefix]], cfg: PRMConfig, out: Path
) -> dict[Prefix, float]:
    """The share of each prefix's completions that reach the gold answer, depth by depth.

    Lost prefixes have a share of 0; those behind them, and those that fill --max-length, have none.
    completions.json says how many completions that took, and how many it would have taken.
    """
    share: dict[Prefix, float] = {}
    T = cfg.temperature or 1.0

    def prompt(prefix: Prefix) -> list[int]:
        return setup.prompt(prefix.query) + data.text_ids(setup.tokenizer, prefix.text)

    alive = solutions
    with setup.engine.awake(trainer.load_policy(cfg, completer)) as draw:
        for depth in itertools.count():
            # the last prefix is the whole solution, which its own answer labels
            alive = [prefixes for prefixes in alive if len(prefixes) > depth + 1]
            shared = dict.fromkeys(prefixes[depth] for prefixes in alive)  # each once, in order
            # the engine takes no longer prompts: vLLM's max_model_len counts on it
            todo = [prefix for prefix in shared if len(prompt(prefix)) < cfg.max_length]
            if not todo:
                break
            groups = draw(todo, cfg.completions, T, f"step{depth + 1}", prompt)
            for prefix, group in zip(todo, groups):
                # decoding may drop the first blank of a completion; graders fold white space
                whole = [Prefix(prefix.query, f"{prefix.text} {s.response}") for s in group]
                ended = [s.finish_reason == "stop" for s in group]
                good = np.logical_and(right(whole, cfg.task), ended)
                share[prefix] = float(good.mean())
            # neither 0, lost, nor None, not asked, is gone on from
            alive = [prefixes for prefixes in alive if share.get(prefixes[depth])]

    every = []
    for prefixes in solutions:
        every += prefixes[:-1]
    counts = {
        "without sharing": cfg.completions * len(every),
        "without the lost": cfg.completions * len(set(every)),
        "done": cfg.completions * len(share),
    }
    write(out / "completions.json", json.dumps(counts).encode())
    return share


# -- ready labels ----------------------------------------------------------------------------------


def read_annotations(name: str) -> list[dict]:
    """Rows {prompt, completions, labels} of a file or of a data set on the hub.

    Each row is of our layout, Math-Shepherd's or PRM800K's; a label None is not trained on. Broken
    rows are counted on stderr and left out.

    raises  UserError where no row is left
    """
    endings = (".jsonl", ".json", ".gz", ".parquet")  # names on the hub may have dots, too
    if name.endswith(endings) or Path(name).is_file():
        rows = data.read_rows(name)
    else:
        rows = data.hub_rows(name, None, "train")
    annotated, broken, n = [], [], 0
    for n, (where, row) in enumerate(rows, 1):
        try:
            columns = [column for column in LAYOUTS if column in row]
            if not columns:
                raise ValueError(f"none of the columns {', '.join(LAYOUTS)}")
            annotated += LAYOUTS[columns[0]](row)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as e:
            broken.append(f"{where}, {type(e).__name__}: {e}")
    if not annotated:
        first = "; ".join(broken[:1])
        raise UserError(f"--annotations {name}: none of its {n} rows can be used ({first})")
    if broken:
        lost = f"{len(broken)} of {n} rows are broken and left out (first: {broken[0]})"
        print(f"annotations: {lost}", file=sys.stderr)
    return annotated


def from_shepherd(row: dict) -> list[dict]:
    """`input` has a tag after each step, `label` + or - in its place."""
    # the two texts are read side by side, as the tags' places hold the marks in the second one
    *steps, rest = row["input"].split("ки")
    same_text = "([+-])".join(map(re.escape, [*steps, ""]))
    marks = re.match(same_text, row["label"])
    if not steps or rest.strip() or not marks:
        raise ValueError("input and label don't say the same")
    shapes = [r"(.*)Step 1:(.*)"] + [r"(\s*)Step \d+:(.*)"] * (len(steps) - 1)
    parts = [re.fullmatch(shape, step, re.S) for shape, step in zip(shapes, steps)]
    if not all(parts):
        raise ValueError("a step without its 'Step N:'")
    row = {
        "prompt": parts[0][1].strip(),
        "completions": [part[2].strip() for part in parts],
        "labels": [float(mark == "+") for mark in marks.groups()],
    }
    return [row]


def from_prm800k(row: dict) -> list[dict]:
    """One row for the steps that were gone on from, and one for each other candidate.

    A candidate's last step alone is rated. A neutral rating (0) is right.
    """
    label_of = {1: 1.0, 0: 1.0, -1: 0.0, None: None}
    prompt = row["question"]["problem"]
    # one row for each path of steps, since a PRM reads whole prefixes
    rows, chain, labels = [], [], []
    for step in row["label"]["steps"]:
        chosen = step["chosen_completion"]
        candidates = step["completions"] or []
        for k, candidate in enumerate(candidates):
            if k != chosen and candidate["rating"] is not None:
                steps = [*chain, candidate["text"]]
                rated = [None] * len(chain) + [label_of[candidate["rating"]]]
                rows.append({"prompt": prompt, "completions": steps, "labels": rated})
        if chosen is not None:
            following = candidates[chosen]
            label = label_of[following["rating"]]
        else:  # no candidate was any good, so a person wrote the step, or gave up
            following = step["human_completion"]
            label = 1.0
        if following is None:
            break
        chain.append(following["text"])
        labels.append(label)
    if chain:
        rows.append({"prompt": prompt, "completions": chain, "labels": labels})
    return rows


def from_ours(row: dict) -> list[dict]:
    """`prompt`, `completions` and as many `labels`, as annotations.jsonl.gz and TRL have them."""
    columns = ("prompt", "completions", "labels", "share")
    # columns of other names would make the hash in `ready` depend on what nothing reads
    ours = {name: row[name] for name in columns if name in row}
    steps, labels = ours["completions"], ours["labels"]
    share = ours.get("share", labels)
    texts = isinstance(steps, list) and all(isinstance(x, str) for x in (ours["prompt"], *steps))
    as_many = len(steps) == len(labels) == len(share) > 0
    if not (texts and as_many and all(0 <= x <= 1 for x in (*labels, *share))):
        raise ValueError("expected prompt, completions (texts) and as many labels from 0 to 1")
    return [ours]


# the column that tells a layout from the others
LAYOUTS = {"input": from_shepherd, "question": from_prm800k, "prompt": from_ours}


# -- train -----------------------------------------------------------------------------------------

# a solution as the PRM reads it: ids, and (places of the step scores, their labels)
Rated = tuple[list[int], tuple[list[int], list[float]]]


def as_examples(prm: PRM, rows: list[dict], cfg: PRMConfig) -> list[Rated]:
    """Annotated solutions as examples; those without a label and over-long ones are left out."""
    examples = []
    for row in rows:
        ids, places = prm.encode(row["prompt"], row["completions"])
        labels = row["labels"]
        if cfg.labels == "soft":
            labels = row.get("share", labels)
        rated = [i for i, y in zip(places, labels) if y is not None]
        labels = [float(y) for y in labels if y is not None]
        if len(ids) <= cfg.max_length and rated:
            examples.append((ids, (rated, labels)))
    limit = f"--max-length {cfg.max_length}"
    n_lost = len(rows) - len(examples)
    if not examples:
        raise UserError(f"none of {n_lost} annotated solutions has a label and fits {limit}")
    if n_lost:
        lost = f"{n_lost} of {len(rows)} have no label or are longer than {limit} and left out"
        print(f"annotations: {lost}", file=sys.stderr)
    return examples


def accumulate(prm: PRM, _, batch: list[Rated], token_budget: int) -> float:
    """Adds to .grad that of the mean cross-entropy of a global batch's steps; returns that mean."""
    import torch

    n_steps = sum(len(labels) for _, (_, labels) in batch)
    mean = 0.0
    parts = ranks.micro_batches(batch, token_budget, nothing=lambda ids: ([], []))
    for rows, rated in parts:
        places, labels = [], []
        for row_places, row_labels in rated:
            places.append(row_places)
            labels += row_labels
        with trainer.autocast():
            log_p = prm.logits(rows, places).log_softmax(-1)  # (steps, 2): wrong, right
        y = torch.tensor(labels, device=log_p.device)
        log_likelihood = y * log_p[:, 1] + (1 - y) * log_p[:, 0]
        loss = -log_likelihood.sum() / n_steps
        loss.backward()
        mean += loss.item()
    return sum(ranks.gathered(mean))


def count(rows: list[dict]) -> dict:
    """Solutions, steps, and the share of labelled ones that are good; says if none or all are."""
    steps = []
    for row in rows:
        steps += row["labels"]
    labels = [y for y in steps if y is not None]
    good = float(np.mean(labels)) if labels else 0.0
    if good in (0.0, 1.0):
        alike = f"{100 * good:.0f} % of the {len(labels)} labelled steps are good"
        print(f"PRM: {alike}, so it can't learn to tell steps apart", file=sys.stderr)
    return {"solutions": len(rows), "steps": len(steps), "good": round(good, 4)}


def new_prm(start: Path | str, tokenizer, template: str, cfg: PRMConfig) -> PRM:
    """An untrained PRM: the start's body, two labels, a random head.

    Separator and template are kept with the tokenizer.
    """
    import torch
    import transformers

    # the head is drawn while the model loads
    torch.manual_seed(trainer.seed_of(cfg.seed, "prm head"))
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        start, dtype=trainer.weights_dtype(cfg), num_labels=2, id2label={0: "-", 1: "+"}
    )
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # they are saved with it, so that whoever loads the folder feeds the PRM as here
    tokenizer.init_kwargs.update(step_separator=cfg.separator, prompt_template=template)
    return PRM(ranks.shard(model, trainer.device()), tokenizer, "own", cfg.token_budget)


def fit(setup: Setup, rows: list[dict], cfg: PRMConfig, out: Path) -> None:
    """prm_epochs over the annotations, a checkpoint after each; the last is the PRM, out/prm."""
    folders = [out / "checkpoints" / f"epoch_{e}" for e in range(1, cfg.prm_epochs)]
    folders.append(out / "prm")
    done, start = 0, setup.base
    for e, folder in enumerate(folders, 1):
        if trainer.is_complete(folder):
            done, start = e, folder
    # a tokenizer of its own: the policy's must not be saved with the PRM's settings
    prm = new_prm(start, trainer.load_tokenizer(setup.base), setup.splits.base, cfg)
    optimizer = trainer.adamw(prm.model, cfg.prm_lr)
    if done:
        trainer.load_trainer(start, optimizer)

    examples = as_examples(prm, rows, cfg)
    n = math.ceil(len(examples) / cfg.batch_size)  # steps an epoch
    # trainer.train hands over a model, and a PRM is more than that
    backward = functools.partial(accumulate, prm)
    for e in range(done, cfg.prm_epochs):
        phase = trainer.Phase(
            name=f"PRM epoch {e + 1}",
            seed=trainer.seed_of(cfg.seed, "prm", e),
            steps=range(e * n, (e + 1) * n),
            horizon=cfg.prm_epochs * n,
            peak=cfg.prm_lr,
            end=cfg.prm_lr / 10,
            warmup=cfg.warmup,
        )
        log = trainer.train(prm.model, optimizer, examples, phase, cfg, backward)
        if e + 1 == cfg.prm_epochs:
            optimizer = None  # the PRM is kept without it
        state = trainer.State(e + 1, prm.model, optimizer, log)
        trainer.save(state, folders[e], prm.tokenizer)
    remove(out / "checkpoints", ignore_errors=True)


# -- evaluate --------------------------------------------------------------------------------------


def evaluate(
    setup: Setup, start: Path | str, queries: list[Query], cfg: PRMConfig, prm: PRM
) -> dict:
    """What the PRM is worth on fresh solutions of questions that it was not trained on."""
    with setup.engine.awake(trainer.load_policy(cfg, start)) as draw:
        groups = draw(queries, 4, cfg.temperature or 1.0, "fresh")
    rewards.score(queries, groups, cfg.task, "answer+prm", prm)
    # tau 1 admits right answers whose lowest step has p > 1/2, as r = 2 p there
    watched = metrics.watch_prm(queries, groups, 1.0, CHECKERS.get(cfg.task))
    watched.pop("prm/wrong_admitted", None)  # at tau 1 none can be
    return {key.removeprefix("prm/"): value for key, value in watched.items()}


def labels_worth(rows: list[dict], check, joint: str = " ; ") -> dict:
    """labels_agree: how many hard labels equal the exact truth; labels_auc: the share's AUC."""
    hard, share, truth = [], [], []
    for row in rows:
        right = check(row["prompt"], joint.join(row["completions"]))
        hard += row["labels"]
        share += row["share"]
        truth += metrics.step_truth(right, len(row["labels"]))
    agree = float(np.equal(hard, truth).mean())
    return {"labels_agree": round(agree, 4), "labels_auc": metrics.auc(share, truth)}


def line(row: dict) -> str:
    """prm.json in one line."""
    good = f"{100 * row['good']:.0f} % good"
    parts = [f"PRM | {row['solutions']} solutions, {row['steps']} steps, {good}"]
    if counts := row.get("completions"):
        done, total = counts["done"], counts["without sharing"]
        saved = 100 - 100 * done / max(1, total)
        parts.append(f"completions {done} of {total} ({saved:.0f} % saved)")
    for key in ("auc", "auc_sound", "step_auc", "labels_agree", "ece"):
        if row.get(key) is not None:
            parts.append(f"{key} {row[key]:.3f}")
    return " | ".join(parts)


# -- the whole -------------------------------------------------------------------------------------

MARK = "inputs.sha256"  # names what the PRM in a folder is made from


def given(cfg: Config) -> PRM | None:
    """The PRM of --prm; raises UserError where it can't be read as --prm-format says."""
    if cfg.prm:
        return PRM.load(cfg.prm, cfg.prm_format, cfg.token_budget, cfg.task)
    return None


def own(cfg: Config, setup: Setup) -> PRM:
    """The task's own PRM, which is made now where there is none."""
    return PRM.load(ready(cfg, setup), "own", cfg.token_budget, cfg.task)


def ready(
    cfg: Config, setup: Setup, out: Path | None = None, rows: list[dict] | None = None
) -> Path:
    """The folder of the task's PRM, made now where it is missing.

    It is cached under a hash of all that it is made from, so methods share it.

    rows  ready labels, which need the first stage of the SFT alone
    """
    if not isinstance(cfg, PRMConfig):
        # the run's own flags stay, the PRM's settings come from the task
        preset = {k: v for k, v in PRESETS[cfg.task].items() if k not in vars(cfg)}
        preset["temperature"] = PRESETS[cfg.task].get("temperature")  # not the run's
        cfg = PRMConfig(**{**vars(cfg), **preset})
    # ready labels need no completer, which is the last stage
    stages = 1 if rows else cfg.sft_epochs // max(1, cfg.start_epoch)
    starts = trainer.sft(cfg, setup.base, setup.human, setup.tokenizer, stages)

    questions = [(q.text, q.gold) for q in setup.splits.train]
    # a class's __annotations__ leave out those it inherits; SHARED names some of them
    names = [*PRMConfig.__annotations__, *SHARED]
    settings = [getattr(cfg, name) for name in names]
    # an SFT folder's name holds a hash of all that it is made from, so the name is enough
    inputs = repr([*map(str, starts), questions, *(rows or []), *settings])
    key = hashlib.sha256(inputs.encode()).hexdigest()[:12]
    out = out or trainer.CACHE / f"prm-{cfg.task}-{key}"
    with trainer.one_at_a_time(out):
        mark = out / MARK
        if mark.exists() and mark.read_text() != key:
            reason = "holds a PRM made from other settings, data or SFT checkpoints"
            raise UserError(f"--out {out} {reason}; choose another --out")
        write(mark, key.encode())
        # prm.json comes last: without it the evaluation is still to be done
        if not trainer.is_complete(out / "prm") or not (out / "prm.json").exists():
            make(setup, starts, rows, cfg, out)
    return out / "prm"


def make(setup: Setup, starts: list, rows: list[dict] | None, cfg: PRMConfig, out: Path) -> None:
    """Annotate, train, evaluate; a part that is done is left as it is."""
    run_parts = setup.engine.parts
    setup.engine.parts = out / "parts"  # sampled chunks are kept here, not in the run's folder
    queries = setup.splits.train
    rng = random.Random(trainer.seed_of(cfg.seed, "prm"))
    picked = rng.sample(queries, len(queries))  # in random order
    # questions that no label comes from, or the PRM would be judged by what it has seen
    held_out = min(200, len(queries) // 10)
    n = len(queries) - held_out
    if cfg.prm_queries:
        n = min(n, cfg.prm_queries)
    if rows is None:
        rows = annotate(setup, starts, picked[:n], cfg, out)
    row = count(rows)
    if not trainer.is_complete(out / "prm"):
        fit(setup, rows, cfg, out)

    if (out / "completions.json").exists():
        row["completions"] = json.loads((out / "completions.json").read_text())
    # from the folder, so that what is measured is what a run will load
    prm = PRM.load(out / "prm", "own", cfg.token_budget, cfg.task)
    row |= evaluate(setup, starts[0], picked[n : n + 200], cfg, prm)
    if cfg.task in CHECKERS and not cfg.annotations:  # ready labels may be of any questions
        row |= labels_worth(rows, CHECKERS[cfg.task], " " if cfg.task in STEPS else " ; ")
    write(out / "prm.json", (json.dumps(row) + "\n").encode())
    remove(out / "parts", ignore_errors=True)
    setup.engine.parts = run_parts
    print(line(row), file=sys.stderr)


def open_out(folder: str) -> Path:
    """--out, made where it is missing; raises UserError where it holds what is not ours."""
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None
    files = [f for f in out.iterdir() if not f.name.startswith(".")]
    if files and not (out / MARK).exists():
        raise UserError(f"--out {out}: it is not empty and holds no PRM of ours; choose another")
    return out


@ranks.together
def main(argv: list[str] | None = None) -> None:
    """Makes the PRM, or takes up where one is; prints what was measured, and its folder."""
    cfg = config.parse_config(argv, PRMConfig, PRESETS, OF_THE_LOOP, __doc__)
    if config.PRESETS[cfg.task].get("reward") == "tests":
        raise UserError(f"--task {cfg.task}: its reward is unit tests, which no PRM joins")
    out = open_out(cfg.out) if cfg.out else None
    rows = read_annotations(cfg.annotations) if cfg.annotations else None
    folder = ready(cfg, runs.set_up(cfg), out, rows)
    measured = json.loads((folder.parent / "prm.json").read_text())
    print(f"{line(measured)}\n{folder}")


if __name__ == "__main__":
    data.run(main)
