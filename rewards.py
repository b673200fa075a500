"""Rewards: are the steps right (the process reward model), and Eq. 1; whether the answer is right is grader.py's."""
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Sequence

from data import Query, Sample, UserError, hub_reason, micro_batches, progress
from grader import extract_answer, grade
from toy import check_toy



# ---------------------------------------------------------------------------------------------------------------------
# 3. Steps, and the process reward model
#
# Text goes between policy and PRM, never token ids, so their tokenizers may differ. A PRM reads
# query, step, separator, step, separator, ... and says at each separator how likely the steps so far are right.

_FORMULA = (r"\\[$\\](?![\[(])|\$\$(?:(?!\$\$).){0,4000}\$\$|\$[^$\n]+\$|\$(?!<|\d[\d,.]*+(?!\s*[=+\-*/^\\(<>]))[^$]{1,1000}\$|\\\[(?:(?!\\\[).){0,4000}?\\\]|\\\((?:(?!\\\().){0,4000}?\\\)|"
            r"\\begin\{(\w+\*?)\}(?:(?!\\begin\{\1\}).){0,8000}?\\end\{\1\}|\[asy\](?:(?!\[asy\]).){0,8000}?\[/asy\]")
_STEP_END = re.compile(rf"{_FORMULA}|(?P<end>\s*\n\s*(?![a-z\s]|\\\[|\\begin|\$\$)|(?<=[.!?])(?= +[A-Z$\\])|(?<=[.!?][$)])(?= +[A-Z$\\])| ;(?= ))",
                       re.S)


def step_ends(text: str) -> list[int]:
    r"""Where each step of a solution ends: at a new line, at the end of a sentence, or at the toy's " ;", never inside a formula.

    A formula is what stands in $, $$, \[ \], \( \), \begin \end or [asy]. A line that goes on with a small letter or a displayed formula is the
    same step still.
    """
    ends = [m.end() for m in _STEP_END.finditer(text) if m["end"] is not None]
    cuts = [e for a, e in zip([0, *ends], ends) if text[a:e].strip()]
    last = cuts[-1] if cuts else 0
    return [*cuts, len(text)] if text[last:].strip() else [*cuts[:-1], len(text)] if cuts else []


def split_steps(text: str) -> list[str]:
    r"""The steps of a solution, as `step_ends` cuts them, without the white space and " ;" between them   [App. A]

    >>> split_steps("3 boxes hold $1.5. X$ each. So $x = 4.5$.\n#### 4.5")
    ['3 boxes hold $1.5. X$ each.', 'So $x = 4.5$.', '#### 4.5']
    >>> split_steps("Cid = Ida * 6 = 5 * 6 = 0 ; # 0")
    ['Cid = Ida * 6 = 5 * 6 = 0', '# 0']
    """
    ends = step_ends(text)
    return [text[a:e].strip().removesuffix(" ;") for a, e in zip([0, *ends], ends)]


PRM_FORMATS = ("own", "shepherd", "qwen")


class PRM:
    """A process reward model: p_j = P(steps 1..j are right | query), in [0, 1]   [Sec. 2.3, App. A]

    own       AutoModelForTokenClassification with two labels, 1 = right, read at the end of the separator after each step: what train_prm.py
              and TRL's PRMTrainer write. `step_separator` and `prompt_template` stand in tokenizer_config.json ("\\n" and "{query}" if not).
    shepherd  Math-Shepherd's: a causal model whose next token at the tag is + or -.
    qwen      Qwen2.5-Math-PRM's: a two-class head at <extra_0>, in a chat.
    """

    def __init__(self, model, tokenizer, kind: str = "own", token_budget: int = 16384):
        self.model, self.tokenizer, self.kind, self.budget = model.eval(), tokenizer, kind, token_budget
        self.separator = tokenizer.init_kwargs.get("step_separator", "\n")
        self.template = tokenizer.init_kwargs.get("prompt_template", "{query}")
        self.limit = min(getattr(model.config, "max_position_embeddings", 1 << 30), tokenizer.model_max_length)

    @classmethod
    def load(cls, path: str | Path, kind: str = "own", token_budget: int = 16384) -> "PRM":
        """A PRM from a folder or the hub, bfloat16 on a GPU; raises UserError where it can't be read or is of another kind"""
        import torch
        import transformers
        maker = {"own": transformers.AutoModelForTokenClassification, "shepherd": transformers.AutoModelForCausalLM, "qwen": _qwen_prm()}[kind]
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model, info = maker.from_pretrained(path, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32, output_loading_info=True)
        except Exception as e:  # missing, torn, of an unknown kind: many exception types, one way out
            raise UserError(f"--prm {path}: {hub_reason(e)}") from None
        if info["missing_keys"] or kind == "own" and (model.config.num_labels != 2 or not hasattr(model, "score")):  # BERT's and GPT-2's heads have other names
            raise UserError(f"--prm {path}: it has no two-label head of --prm-format {kind}; the formats are {', '.join(PRM_FORMATS)}")
        return cls(model, tokenizer, kind, token_budget)

    def encode(self, query: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """ids (L,) of query and steps, and the place of each step's score"""
        ask = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.kind == "own":
            ids = [self.tokenizer.bos_token_id] * (self.tokenizer.bos_token_id is not None) + ask(self.template.replace("{query}", query))
            separator, places = ask(self.separator), []
            for step in steps:
                ids = ids + ask(step) + separator
                places.append(len(ids) - 1)
            return ids, places
        tag = {"shepherd": "ки", "qwen": "<extra_0>"}[self.kind]
        steps = [s.replace(tag, "") for s in steps]
        if self.kind == "shepherd":
            text = query.replace(tag, "") + " " + "\n".join(f"Step {j}: {s} {tag}" for j, s in enumerate(steps, 1))
            ids = self.tokenizer(text)["input_ids"]
        else:
            turns = zip(("system", "user", "assistant"), (r"Please reason step by step, and put your final answer within \boxed{}.",
                                                          query.replace(tag, ""), tag.join([*steps, ""])))
            ids = self.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=True, return_dict=False)
        mark = ask(f" {tag}" if self.kind == "shepherd" else tag)[-1]
        return ids, [i for i, t in enumerate(ids) if t == mark]

    def logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]):
        """(steps of all rows, 2) for wrong and right; the head runs at the steps' places only, and causal attention needs no mask for padding"""
        import torch
        L, dev = max(map(len, rows)), self.model.device
        ids = torch.tensor([list(r) + [0] * (L - len(r)) for r in rows], device=dev)                # (B, L)
        row = torch.tensor([b for b, at in enumerate(places) for _ in at], dtype=torch.long, device=dev)
        column = torch.tensor([i for at in places for i in at], dtype=torch.long, device=dev)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[row, column]   # (steps, width)
        if self.kind != "shepherd":
            return self.model.score(hidden).float()
        signs = [self.tokenizer(f" {sign}", add_special_tokens=False)["input_ids"][-1] for sign in "-+"]
        return torch.nn.functional.linear(hidden, self.model.get_output_embeddings().weight[signs]).float()

    def score(self, queries: Sequence[str], responses: Sequence[str]) -> list[list[float]]:
        """Probabilities in [0, 1], one a step of each response; equal pairs are read once, batches are of equal length and a token budget

        What the PRM can't read it does not vouch for: a response without any step is one step of 0, steps beyond the longest
        input it takes are 0, and so is a score that is not a number (said on stderr).
        """
        import torch
        pairs, found, odd = list(dict.fromkeys(zip(queries, responses, strict=True))), {}, 0
        inputs = [self.encode(q, split_steps(r)) for q, r in pairs]
        home, gpu = self.model.device, "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(gpu)
        with torch.inference_mode():
            for rows, which in micro_batches([(ids[:self.limit], k) for k, (ids, _) in enumerate(inputs) if ids], self.budget):
                places = [[i for i in inputs[k][1] if i < self.limit] for k in which]
                p = self.logits(rows, places).softmax(-1)[:, 1].tolist()
                odd += sum(x != x for x in p)
                for k, at in zip(which, places):
                    mine, p = p[:len(at)], p[len(at):]
                    found[k] = [x if x == x else 0.0 for x in mine] + [0.0] * (len(inputs[k][1]) - len(at)) or [0.0]
        self.model.to(home)
        if odd:
            print(f"PRM: {odd} step scores are not a number and count as 0", file=sys.stderr)
        scores = {pair: found.get(k, [0.0]) for k, pair in enumerate(pairs)}
        return [scores[pair] for pair in zip(queries, responses)]


def _qwen_prm():
    import torch
    from transformers import Qwen2Model, Qwen2PreTrainedModel

    class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
        """The layout of the released weights, so that no code from the hub has to run"""
        def __init__(self, config):
            super().__init__(config)
            self.model, width = Qwen2Model(config), config.hidden_size
            self.score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
            self.post_init()
    return Qwen2ForProcessRewardModel


# ---------------------------------------------------------------------------------------------------------------------
# 4. The reward

REWARDS = {"answer": (0.0, 1.0), "tests": (0.0, 1.0), "answer+prm": (-1.0, 2.0), "answer+oracle": (-1.0, 2.0)}   # name -> the least and the greatest r


def step_scores(queries: Sequence[str], responses: Sequence[str], reward: str, prm: PRM | None = None) -> list[list[float]]:
    """The process scores of each response, one in [0, 1] a step; empty lists where the reward has no process part.

    answer+oracle is the toy's exact step checker in the place of a perfect PRM: the ceiling to compare a learned one with.
    """
    if reward == "answer+oracle":
        return [[float(ok) for ok in check_toy(q, r)] for q, r in zip(queries, responses, strict=True)]
    return prm.score(queries, responses) if reward == "answer+prm" else [[] for _ in responses]


def r_prm(steps: Sequence[float]) -> float:
    """r_prm = 2 min_j p_j - 1, in [-1, 1]: a solution is as good as its worst step   [Sec. 2.3, App. A]

    >>> r_prm([1.0, 0.25, 0.5])
    -0.5
    """
    return 2 * min(steps) - 1


def combine(correct: bool, steps: Sequence[float]) -> float:
    """r = 1[a^ = a*] + r_prm(x, y^)   [Eq. 1, Sec. 2.3]; without step scores the first term alone

    >>> combine(True, []), combine(True, [0.9, 0.5]), combine(False, [0.9, 0.5])
    (1.0, 1.0, 0.0)
    """
    return float(correct) + (r_prm(steps) if steps else 0.0)


def score(queries: Sequence[Query], groups: Sequence[Sequence[Sample]], cfg, prm: PRM | None = None, desc: str = "score") -> None:
    """Fills pred, correct, sound, steps, r_prm and reward of every sample (Eq. 1); a cut-off response keeps r = -inf.   [Sec. 2.3]"""
    flat = [(q, s) for q, g in zip(queries, groups, strict=True) for s in g]
    bar = progress(len(flat), desc)
    for k in range(0, len(flat), 10_000):
        part = flat[k:k + 10_000]
        questions, responses = [q.text for q, _ in part], [s.response for _, s in part]
        correct = grade(responses, [q.gold for q, _ in part], cfg.task, questions)
        steps = step_scores(questions, responses, cfg.reward, prm)
        for (q, s), ok, p in zip(part, correct, steps, strict=True):
            s.pred, s.correct, s.steps = extract_answer(s.response, cfg.task), ok, p
            s.r_prm = r_prm(p) if p else None
            if cfg.task == "toy":
                s.sound = ok and all(check_toy(q.text, s.response))
            if s.finish_reason == "stop":
                s.reward = combine(ok, p)
        bar.update(len(part))
    bar.close()
