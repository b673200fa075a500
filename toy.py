"""The toy: chains of modular arithmetic in words, after iGSM ("Physics of Language Models 2.1"), and an exact check of every step.

Its base model has read authors who misread most sentences, its human solutions are few, careful and mostly of easy stories, its answers can
be guessed (there are only five), and its steps can all be checked (`check_toy`): "right answer by wrong reasoning" is a number here and not
a worry. It shows the dynamics of self-training; it says nothing about how a pre-trained model reads English.
"""
from __future__ import annotations

import random
import re
from pathlib import Path

from data import Query, Splits, UserError

NAMES = "Ann Bob Cid Dan Eve Fay Gil Hal Ida Jon Kim Leo".split()
TOY_WORDS = [*NAMES, *"0123456789", *"has plus minus times . ? = + - * ; #".split()]
MOD = 5                                    # few numbers: about one wrong solution in six is right by luck
SLIP = 0.85                                # of the sentences that the base's authors had before them, so many were taken for another operation
EASY = 0.1                                 # human solutions: of stories without "times", and of so many of those with it
_DIGITS = {str(d): d for d in range(10)}
_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_MISREAD = {"+": "-", "-": "*", "*": "+"}
_OPS = {"+": lambda a, b: (a + b) % MOD, "-": lambda a, b: (a - b) % MOD, "*": lambda a, b: (a * b) % MOD}


def parse_toy(text: str) -> tuple[dict[str, tuple[str, ...]], str]:
    """A story -> ({name: (digit,) or (a, op, b)}, the name asked for).

    >>> parse_toy("Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?")
    ({'Ann': ('4',), 'Bob': ('Ann', '*', '3'), 'Cid': ('Ann', '+', 'Bob')}, 'Cid')
    """
    *sentences, question = text.split(" . ")
    ops = {word: op for op, word in _WORDS.items()}
    return {name: tuple(ops.get(w, w) for w in said) for name, _has, *said in map(str.split, sentences)}, question.split()[0]


def _solve(defs: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """name -> its step `name = a op b = x op y = r`, and "#" -> the last one's `# r`; operands are known before they are used."""
    values, steps = {**_DIGITS}, {}
    for name, (a, *rest) in defs.items():
        values[name] = values[a]
        if rest:
            op, b = rest
            values[name] = _OPS[op](values[a], values[b])
            steps[name] = f"{name} = {a} {op} {b} = {values[a]} {op} {values[b]} = {values[name]}"
    return {**steps, "#": f"# {values[name]}"}


def toy_query(rng: random.Random, max_ops: int, uid: str, slip: float = 0.0) -> Query:
    """A story of max_ops - 2 to max_ops people after the first (at least 2), each defined by anyone before, and a solution in the story's order.

    The last one is asked for, and everyone is needed. The author of the solution takes each sentence, with probability `slip`, for the next
    operation: plus for minus, minus for times, times for plus, and in every story that is another number. So each step of a careless
    solution is well formed, and only a look at the story tells it from a right one.
    """
    names = NAMES[:rng.randint(max(2, max_ops - 2), max_ops) + 1]
    while True:
        defs: dict[str, tuple[str, ...]] = {names[0]: (str(rng.randrange(1, MOD)),)}
        values, needed = {**_DIGITS, names[0]: int(defs[names[0]][0])}, set()
        for i, name in enumerate(names[1:], 1):
            result = misread = None
            while result == misread:
                a, op = rng.choice(names[:i]), rng.choice("++-*")
                b = rng.choice(names[:i]) if op == "+" and rng.random() < 0.5 else str(rng.randint(2 if op == "*" else 1, MOD - 1))
                result, misread = (_OPS[o](values[a], values[b]) for o in (op, _MISREAD[op]))
            defs[name], values[name] = (a, op, b), result
            needed |= {a, b}
        if needed.issuperset(names[:-1]):
            break
    story = " ".join(f"{name} has {' '.join(_WORDS.get(x, x) for x in d)} ." for name, d in defs.items())
    read = {name: (d[0], _MISREAD[d[1]], d[2]) if len(d) > 1 and rng.random() < slip else d for name, d in defs.items()}
    return Query(uid, f"{story} {names[-1]} ?", str(values[names[-1]]), " ; ".join(_solve(read).values()))


def check_toy(text: str, response: str) -> list[bool]:
    """Is each step of a toy response right?  One bool a ` ; `-separated step, exact, with no model.

    Steps are read in the story's order: the k-th step `X = A op B = a op b = r` is right if the k-th sentence after the first says op, a and
    b are the numbers of those whom it says it of (either order for + and *), all steps that they come from are right, and r is the true
    result. X, A and B say whose the numbers are; a slip there changes no number and is let pass. The last step `# r` is right if r is the
    number of the person asked about and its step is right. So a lucky answer after a wrong step is a right answer with a wrong step.

    >>> story = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"
    >>> check_toy(story, "Bob = Ann * 3 = 4 * 3 = 2 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1")
    [True, True, True]
    >>> check_toy(story, "Bob = Ann + 3 = 4 + 3 = 2 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1")
    [False, False, False]
    """
    defs, asked = parse_toy(text)
    truth, told, known, right = _solve(defs), iter([*defs][1:]), {next(iter(defs))}, []
    numbers = lambda t: [t[i] for i in (1, 3, *range(5, 11))] if len(t) == 11 else None
    for step in re.split(r" ;(?= )", response.removesuffix(" ;")):
        t = step.split()
        if t[:1] == ["#"]:
            right.append(asked in known and " ".join(t) == truth["#"])
            continue
        name = next(told, "")
        want, needed = truth.get(name, "").split(), [x for x in defs.get(name, ()) if x in defs]
        if len(t) == 11 and t[7] in "+*" and [t[8], t[6]] == [*want[6:7], *want[8:9]]:
            t[6], t[8] = t[8], t[6]
        right.append(bool(want) and known.issuperset(needed) and numbers(t) == numbers(want))
        if right[-1]:
            known.add(name)
    return right


def toy_text(max_ops: int, n: int) -> list[Query]:
    """What the toy's base model has read: n solutions by careless authors. It knows the form, the numbers and both readings of a sentence, the wrong one better."""
    rng = random.Random(f"toy text {max_ops}")
    return [toy_query(rng, max_ops, f"text/{i}", SLIP) for i in range(n)]


def load_toy(cfg) -> Splits:
    """Stories from the seed of the *data* (not of the run): no question occurs twice, within or across the splits."""
    rng, seen = random.Random(f"toy {cfg.toy_max_ops}"), set()

    def fresh(split: str, n: int) -> list[Query]:
        out, again = [], 0
        while len(out) < n:
            q = toy_query(rng, cfg.toy_max_ops, f"{split}/{len(out)}")
            again = again + 1 if q.text in seen else 0
            if again == 1000:
                raise UserError(f"--toy-max-ops {cfg.toy_max_ops}: there are hardly more than {len(seen):,} such stories, too few for 500 test questions, "
                                f"--val-queries {cfg.val_queries} and --toy-queries {cfg.toy_queries}")
            if not again:
                seen.add(q.text)
                out.append(q)
        return out
    test, val, train = fresh("test", 500), fresh("val", cfg.val_queries), fresh("train", cfg.toy_queries)
    # few human solutions, all careful but mostly of easy stories; many questions
    easy = [q for q in train if "times" not in q.text or rng.random() < EASY][:cfg.toy_solutions]
    shown = {q.id for q in easy}
    train = [q if q.id in shown else Query(q.id, q.text, q.gold) for q in train]
    return Splits(train, val, {"toy": test}, "{query}", "{query}")


def make_toy_model(folder: Path, seed: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
    """Writes a base model to `folder`: a word-level tokenizer and a tiny LlamaForCausalLM with random weights, as Hugging Face keeps them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + TOY_WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk = special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk,
                                        clean_up_tokenization_spaces=False, model_max_length=256)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width + width // 2, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256, initializer_range=0.06,
                         tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
