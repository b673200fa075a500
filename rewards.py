"""Rewards: r of every response (Eq. 1), the steps of a solution, and the model that scores them.

    queries, responses -> correct -> steps -> a score for each step -> r

A reward is one function in `REWARDS`. Whether the answer is right is for grader.py to say.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ranks
from data import Query, Sample, UserError, check_hub, hub_reason, micro_batches, progress, text_ids
from grader import extract_answer, grade
from toy import CHECKERS, LUCKY, STEPS

# -- the reward ------------------------------------------------------------------------------------


def answer(queries: list[Query], responses: list[Sample]) -> list[float]:
    """r = 1[a^ = a*], the first term of Eq. 1 alone   [Sec. 2.3, "w/o RM"]"""
    return [float(s.correct) for s in responses]


def answer_and_steps(queries: list[Query], responses: list[Sample]) -> list[float]:
    """r = 1[a^ = a*] + r_prm(x, y^), in [-1, 2]   [Eq. 1, Sec. 2.3]

    >>> answer_and_steps([], [Sample("", "stop", correct=True, r_prm=-0.5)])
    [0.5]
    """
    return [s.correct + s.r_prm for s in responses]


# name -> r of each response, from pred, correct, steps and r_prm of the Samples
REWARDS: dict[str, Callable[[list[Query], list[Sample]], list[float]]] = {
    "answer": answer,
    "tests": answer,
    "answer+prm": answer_and_steps,
    "answer+oracle": answer_and_steps,
}


def r_prm(steps: list[float]) -> float:
    """r_prm = 2 min_j p_j - 1, in [-1, 1], of the worst step   [Sec. 2.3, App. A]

    >>> r_prm([1.0, 0.25, 0.5])
    -0.5
    """
    return 2 * min(steps) - 1


def score(
    queries: list[Query], groups: list[list[Sample]], task: str, reward: str, prm: PRM | None = None
) -> None:
    """Fills pred, correct, sound, steps, r_prm and reward of every sample   [Eq. 1, Sec. 2.3]

    groups  one list of samples a query
    task    says how an answer is read, and how its steps are checked where that can be exact
    reward  a name of `REWARDS`
    """
    asked, responses = [], []
    for query, group in zip(queries, groups, strict=True):
        asked += [query] * len(group)
        responses += group
    bar = progress(len(responses), "score")
    with prm.on_gpu() if prm else nullcontext():  # once for the whole pool
        # in parts, so that the bar moves; in large ones, so that rows of like length share a batch
        for k in range(0, len(responses), 10_000):
            part = slice(k, k + 10_000)
            judge(asked[part], responses[part], task, reward, prm)
            bar.update(len(responses[part]))
    bar.close()


def judge(
    queries: list[Query], responses: list[Sample], task: str, reward: str, prm: PRM | None
) -> None:
    """`score` on one flat part: a query for each response. A cut-off response keeps r = -inf."""
    texts = [s.response for s in responses]
    golds = [q.gold for q in queries]
    questions = [q.text for q in queries]

    def right(texts, golds, questions) -> list[bool]:
        return grade(texts, golds, task, questions)

    correct = ranks.dealt(right, texts, golds, questions)
    scores = prm.score(questions, texts) if prm else [[] for _ in texts]
    for s, question, ok, steps in zip(responses, questions, correct, scores, strict=True):
        # extracted again, as grade gives verdicts alone; the answer is for the reader of samples/
        s.pred = extract_answer(s.response, task)
        s.correct = ok
        if task in LUCKY or reward == "answer+oracle":
            verdicts = CHECKERS[task](question, s.response)
        if task in LUCKY:
            s.sound = ok and all(verdicts)
        if reward == "answer+oracle":  # in a PRM's place: the ceiling to compare one with
            steps = list(map(float, verdicts))
        s.steps = steps
        s.r_prm = r_prm(steps) if steps else None

    r = REWARDS[reward](queries, responses)
    for s, value in zip(responses, r, strict=True):
        if s.finish_reason == "stop":
            s.reward = value


# -- steps -----------------------------------------------------------------------------------------

# A step never ends inside one of these. Lengths are bounded, so that an opening alone costs little.
FORMULAS = [
    r"\\[$\\](?![\[(])",  # no formula: an escaped dollar, a line break
    r"\$\$(?:(?!\$\$).){0,4000}\$\$",
    r"\$[^$\n]+\$",
    # over several lines only where no amount of money opens it
    r"\$(?!<|\d[\d,.]*+(?!\s*[=+\-*/^\\(<>]))[^$]{1,1000}\$",
    r"\\\[(?:(?!\\\[).){0,4000}?\\\]",
    r"\\\((?:(?!\\\().){0,4000}?\\\)",
    r"\\begin\{(\w+\*?)\}(?:(?!\\begin\{\1\}).){0,8000}?\\end\{\1\}",
    r"\[asy\](?:(?!\[asy\]).){0,8000}?\[/asy\]",
]
ENDS = [
    # a new line, unless a small letter or a displayed formula goes on with the sentence; white
    # space is read from its start alone and never again, or the time would be cubic
    r"(?<!\s)[^\S\n]*+\n\s*+(?![a-z]|\\\[|\\begin|\$\$)",
    r"(?<=[.!?])(?= +[A-Z$\\])",
    r"(?<=[.!?][$)])(?= +[A-Z$\\])",
    r" ;(?= )",  # the stories'
]
# formulas come first: a match of one steps over the ends inside it
STEP_END = re.compile(f"{'|'.join(FORMULAS)}|(?P<end>{'|'.join(ENDS)})", re.S)


def step_ends(text: str, task: str = "") -> list[int]:
    r"""Where each step of a solution ends: a new line, a sentence's end, stories' " ;"   [App. A]

    A formula ($, $$, \[ \], \( \), \begin \end, [asy]) is never cut; the last step ends the text.
    The tasks of toy.STEPS have a rule of their own.
    """
    if task in STEPS:
        return [step.end() for step in STEPS[task].finditer(text)]
    cuts, start = [], 0
    for match in STEP_END.finditer(text):
        if match["end"] is not None:
            if text[start : match.end()].strip():
                cuts.append(match.end())
            start = match.end()
    last = cuts[-1] if cuts else 0
    if text[last:].strip():
        cuts.append(len(text))
    elif cuts:
        # white space is left: the last step takes it, so that the last prefix is the whole text
        cuts[-1] = len(text)
    return cuts


def split_steps(text: str, task: str = "") -> list[str]:
    r"""The steps of a solution, without the white space and " ;" between them   [App. A]

    >>> split_steps("3 boxes hold $1.5. X$ each. So $x = 4.5$.\n#### 4.5")
    ['3 boxes hold $1.5. X$ each.', 'So $x = 4.5$.', '#### 4.5']
    >>> split_steps("Cid = Ida * 6 = 5 * 6 = 0 ; # 0")
    ['Cid = Ida * 6 = 5 * 6 = 0', '# 0']
    >>> split_steps("+7 10 *2 20", "walk")
    ['+7 10', '*2 20', '']
    """
    ends = step_ends(text, task)
    return [text[a:b].strip().removesuffix(" ;") for a, b in zip([0, *ends], ends)]


# -- the process reward model ----------------------------------------------------------------------
#
# Text goes between policy and PRM, never token ids, so their tokenizers may differ. A format says
# how a solution becomes the PRM's input: its ids, and the place of each step's score among them.


def tokens(tokenizer, text: str) -> list[int]:
    """The ids of a mark of ours, which may be a special token."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def in_context(tokenizer, word: str) -> int:
    """The id of a word after another: alone, some tokenizers prepend a space mark to it."""
    return tokens(tokenizer, f"a {word}")[-1]


def own_input(tokenizer, query: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """train_prm.py's and TRL's: a separator after each step, the score at its last token.

    `step_separator` and `prompt_template` stand in tokenizer_config.json.
    """
    template = tokenizer.init_kwargs.get("prompt_template", "{query}")
    separator = tokens(tokenizer, tokenizer.init_kwargs.get("step_separator", "\n"))
    # replace, not format: a template from the hub may hold braces of its own
    ids = text_ids(tokenizer, template.replace("{query}", query))
    # by its id: in the template's text it would be read as letters
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    places = []
    for step in steps:
        ids += text_ids(tokenizer, step) + separator
        places.append(len(ids) - 1)
    return ids, places


def shepherd_input(tokenizer, query: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Math-Shepherd's: numbered lines, the score at the tag after each."""
    tag = "ки"
    # a tag in the text itself would be one more place for a score
    query, *steps = [text.replace(tag, " ") for text in (query, *steps)]
    lines = [f"Step {j}: {step} {tag}" for j, step in enumerate(steps, 1)]
    # one text, since pieces of it would be cut into other tokens; it may name no special token
    ids = tokenizer(query + " " + "\n".join(lines), split_special_tokens=True)["input_ids"]
    mark = in_context(tokenizer, tag)
    return ids, [i for i, token in enumerate(ids) if token == mark]


def qwen_input(tokenizer, query: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Qwen2.5-Math-PRM's: a chat, the score at the tag after each step."""
    tag = "<extra_0>"
    query, *steps = [text.replace(tag, " ") for text in (query, *steps)]
    system = r"Please reason step by step, and put your final answer within \boxed{}."
    chat = [
        {"role": "system", "content": system},
        {"role": "user", "content": tag},
        {"role": "assistant", "content": tag},
    ]
    # only the template and the tag may name special tokens
    first, second, last = tokenizer.apply_chat_template(chat, tokenize=False).split(tag)
    ids = tokens(tokenizer, first) + text_ids(tokenizer, query) + tokens(tokenizer, second)
    for step in steps:
        ids += text_ids(tokenizer, step) + tokens(tokenizer, tag)
    ids += tokens(tokenizer, last)
    mark = tokens(tokenizer, tag)[-1]
    return ids, [i for i, token in enumerate(ids) if token == mark]


def two_labels(model, tokenizer, hidden):
    """The model's own head: label 1 is right."""
    return model.score(hidden)


def two_signs(model, tokenizer, hidden):
    """The next token's logits of - and +."""
    import torch

    # the order of the other head's labels: wrong, right
    signs = [in_context(tokenizer, sign) for sign in "-+"]
    return torch.nn.functional.linear(hidden, model.get_output_embeddings().weight[signs])


def qwen_model():
    """The layout of the released weights, so that no code from the hub has to run."""
    import torch
    from transformers import Qwen2Model, Qwen2PreTrainedModel

    class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            width = config.hidden_size
            first, last = torch.nn.Linear(width, width), torch.nn.Linear(width, 2)
            self.model = Qwen2Model(config)
            self.score = torch.nn.Sequential(first, torch.nn.ReLU(), last)
            self.post_init()

    return Qwen2ForProcessRewardModel


class Format(NamedTuple):
    """How a kind of PRM is made, fed and read."""

    model: str  # a class of transformers, or qwen_model's
    encode: Callable  # (tokenizer, query, steps) -> ids (L,), places (steps,)
    head: Callable  # (model, tokenizer, hidden (steps, width)) -> logits (steps, 2)


PRM_FORMATS = {
    "own": Format("AutoModelForTokenClassification", own_input, two_labels),
    "shepherd": Format("AutoModelForCausalLM", shepherd_input, two_signs),
    "qwen": Format("Qwen2ForProcessRewardModel", qwen_input, two_labels),
}


class PRM:
    """A process reward model: p_j = P(steps 1..j are right | query)   [Sec. 2.3, App. A]"""

    def __init__(
        self, model, tokenizer, kind: str = "own", token_budget: int = 16384, task: str = ""
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.format = PRM_FORMATS[kind]
        self.budget = token_budget
        self.task = task  # whose steps it scores
        # some tokenizers name no limit (1e30), some configs none: the lesser of what is known
        longest = getattr(model.config, "max_position_embeddings", 1 << 30)
        self.limit = min(longest, tokenizer.model_max_length)

    @classmethod
    def load(
        cls, path: str | Path, kind: str = "own", token_budget: int = 16384, task: str = ""
    ) -> PRM:
        """A PRM from a folder or the hub, bfloat16 on a GPU; raises UserError where it is none."""
        import torch
        import transformers

        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        form = PRM_FORMATS[kind]
        maker = getattr(transformers, form.model, None) or qwen_model()
        check_hub(path)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            # a trial before the weights are read: two steps must have two places
            _, places = form.encode(tokenizer, "1 + 1 = ?", ["1 + 1 = 2", "# 2"])
            model, info = maker.from_pretrained(path, dtype=dtype, output_loading_info=True)
        except Exception as e:  # missing, torn, of an unknown kind: a dozen exception types
            raise UserError(f"--prm {path}: {hub_reason(e)}") from None
        # BERT, which looks ahead, and GPT-2 call their heads otherwise
        no_score = kind == "own" and (model.config.num_labels != 2 or not hasattr(model, "score"))
        fault = ""
        if len(places) != 2:
            fault = f"its tokenizer does not keep the tags of --prm-format {kind} apart"
        if info["missing_keys"] or no_score:
            fault = f"it has no two-label head of --prm-format {kind}"
        if fault:
            raise UserError(f"--prm {path}: {fault}; the formats are {', '.join(PRM_FORMATS)}")
        return cls(model, tokenizer, kind, token_budget, task)

    def encode(self, query: str, steps: list[str]) -> tuple[list[int], list[int]]:
        """ids (L,) of query and steps, and the place of each step's score."""
        return self.format.encode(self.tokenizer, query, steps)

    def logits(self, rows: list[list[int]], places: list[list[int]]):
        """(steps of all rows, 2) for wrong and right, float32.

        The head runs at the steps' places only; causal attention needs no mask for padding.
        """
        import torch

        def at_places(ids):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            of_rows = [hidden[b, where] for b, where in enumerate(places)]  # (steps, width) each
            return self.format.head(self.model, self.tokenizer, torch.cat(of_rows))

        tensors = [torch.tensor(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)  # (B, L)
        return ranks.inside(self.model, at_places, ids.to(self.model.device)).float()

    @contextmanager
    def on_gpu(self) -> Iterator[None]:
        """On the GPU, where there is one, inside the block; nested blocks move nothing."""
        import torch

        home = self.model.device
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        try:
            yield
        finally:
            self.model.to(home)

    def score(self, queries: list[str], responses: list[str]) -> list[list[float]]:
        """Probabilities in [0, 1], one a step of each response; equal pairs are read once.

        What the PRM can't read it does not vouch for: a response without any step is one step of 0,
        steps beyond the longest input it takes are 0, and so are a score that is not a number and
        the steps of a response that has more or fewer places for scores than steps.
        """
        scores, rows, n_mixed = {}, [], 0  # the lists in scores are filled in below
        for query, response in dict.fromkeys(zip(queries, responses, strict=True)):
            steps = split_steps(response, self.task)
            ids, places = self.encode(query, steps)
            # 0 stands where nothing is written later; without a step there is one, for r_prm's min
            of_steps = scores[query, response] = [0.0] * max(1, len(steps))
            if len(places) == len(steps):
                readable = [i for i in places if i < self.limit]
                rows.append((ids[: self.limit], (of_steps, readable)))
            else:
                n_mixed += 1
        if n_mixed:
            print(f"PRM: {n_mixed} responses mix up its tags and count as 0", file=sys.stderr)

        # whole batches are dealt: the processes then compute the bits that one alone would
        batches = list(micro_batches(rows, self.budget))
        n_odd = 0
        for (_, of_batch), read in zip(batches, ranks.dealt(self.read, batches)):
            for (of_steps, _), p in zip(of_batch, read):
                # p is shorter than the steps where the PRM's input ends before them
                of_steps[: len(p)] = np.nan_to_num(p).tolist()
                n_odd += int(np.isnan(p).sum())
        if n_odd:
            print(f"PRM: {n_odd} step scores are not a number and count as 0", file=sys.stderr)
        return [scores[pair] for pair in zip(queries, responses)]

    def read(self, batches: list) -> list[list[list[float]]]:
        """The score at each readable place of each row of each batch."""
        import torch

        scores = []
        # again, for callers of `score` outside of rewards.score: nested, it moves nothing
        with self.on_gpu(), torch.inference_mode():
            for rows, of_batch in batches:
                places = [readable for _, readable in of_batch]
                p = self.logits(rows, places).softmax(-1)[:, 1]  # (steps of the batch,)
                of_rows = p.split(list(map(len, places)))
                scores.append([of_row.tolist() for of_row in of_rows])
        return scores
