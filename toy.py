"""The two toys: number walks, on which balancing pays, and stories, whose steps a PRM can judge.

    seed -> questions with gold and human solutions;   (question, response) -> is each step right

A walk goes from one number to another by a few moves, `3 > 47 :` -> `+7 10 *2 20 ...`. The base
model has read clean walks, and the human solutions are careless: one word in five is wrong, at
random. So the SFT policy's best guess is good, and its samples at T = 1 are mostly wrong. A right
answer can't be luck, and a question has dozens of them. It shows what T does to a pool.

A story is a chain of modular arithmetic in words, after iGSM ("Physics of Language Models 2.1").
The base model has read authors who misread most sentences. The human solutions are few, careful and
mostly of easy stories. An answer can be guessed, since there are only five, and every step can be
checked, so "a right answer by wrong reasoning" is a number here.

Both show the dynamics of self-training. They say nothing about how a pre-trained model reads.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import re
from dataclasses import dataclass
from pathlib import Path

from data import Query, Splits, UserError

# -- walks -----------------------------------------------------------------------------------------

TOP = 100  # the numbers are 1 to TOP
MOVES = ("+3", "-4", "*2", "/2", "+7", "-9")
WALK_WORDS = [*map(str, range(1, TOP + 1)), *MOVES, ">", ":"]
SLACK = 2  # a walk may take so many moves more than the shortest one
FARTHEST = 6  # moves between the two numbers of a question, at most
HELD_OUT = 2000  # pairs of numbers that validation and test questions come from, and no text
LONGEST_TEXT = 4  # moves of a walk that the base or the SFT policy has read, at most
CARELESS = 0.2  # share of the words of a human solution that are wrong, at random


# -- walks: numbers and moves ----------------------------------------------------------------------


def move_to(number: int, move: str) -> int | None:
    """The number that a move leads to, None where the move is not allowed.

    >>> move_to(3, "+7"), move_to(3, "/2"), move_to(60, "*2"), move_to(3, "+8")
    (10, None, None, None)
    """
    if move not in MOVES:
        return None
    by = int(move[1:])
    if move[0] == "/" and number % by:
        return None
    result = {"+": number + by, "-": number - by, "*": number * by, "/": number // by}[move[0]]
    return result if 1 <= result <= TOP else None


@functools.cache
def neighbours(number: int) -> dict[str, int]:
    """The allowed moves from a number, and the numbers that they lead to."""
    reached = {move: move_to(number, move) for move in MOVES}
    return {move: result for move, result in reached.items() if result is not None}


@functools.cache
def distances(start: int) -> dict[int, int]:
    """The least number of moves from `start` to each number, by breadth-first search."""
    least = {start: 0}
    queue = [start]
    for number in queue:
        for result in neighbours(number).values():
            if result not in least:
                least[result] = least[number] + 1
                queue.append(result)
    return least


# -- walks: the checker ----------------------------------------------------------------------------


def check_walk(text: str, response: str) -> list[bool]:
    """For each move of a walk: it and all moves before it are allowed and rightly computed.

    text is the question `START > GOAL :`; no number may occur twice. Whether the walk ends at the
    goal, and soon enough, is the answer's part, see `reaches`.

    >>> check_walk("3 > 17 :", "+7 10 *2 20 +7 27")
    [True, True, True]
    >>> check_walk("3 > 17 :", "+7 10 *2 30 +7 37"), check_walk("3 > 17 :", "+7 10 +3")
    ([True, False, False], [True, False])
    """
    number = int(text.split()[0])
    visited = {number}
    words = response.split()
    right = []
    for at in range(0, len(words), 2):
        number = neighbours(number).get(words[at])
        written = words[at + 1 : at + 2]
        if number is None or number in visited or written != [str(number)]:
            return right + [False] * len(words[at::2])
        visited.add(number)
        right.append(True)
    return right


def reaches(response: str, gold: str) -> bool:
    """1[the walk is right, ends at its goal and is short enough]; gold is `START > GOAL in MOVES`.

    >>> [reaches(walk, "3 > 20 in 3") for walk in ("+7 10 *2 20", "+7 10 *2 21", "+7 10")]
    [True, False, False]
    """
    start, _, goal, _, allowed = gold.split()
    moves = check_walk(start, response)
    return len(moves) <= int(allowed) and all(moves) and response.split()[-1:] == [goal]


# -- walks: questions and texts --------------------------------------------------------------------


def walk_query(start: int, goal: int, uid: str, solution: str = "") -> Query:
    """The question `START > GOAL :`."""
    gold = f"{start} > {goal} in {distances(start)[goal] + SLACK}"
    return Query(uid, f"{start} > {goal} :", gold, solution)


def pairs(seed: int) -> list[tuple[int, int]]:
    """All (start, goal), shuffled; the first HELD_OUT are kept from training."""
    every = [divmod(code, TOP) for code in range(TOP * TOP)]
    different = [(a + 1, b + 1) for a, b in every if a != b]
    random.Random(f"pairs {seed}").shuffle(different)
    return different


def questions(among: list[tuple[int, int]], nearest: int, split: str) -> list[Query]:
    """The questions whose goal is `nearest` to FARTHEST moves away."""
    inside = [p for p in among if nearest <= distances(p[0]).get(p[1], 0) <= FARTHEST]
    return [walk_query(start, goal, f"{split}/{i}") for i, (start, goal) in enumerate(inside)]


def random_walk(rng: random.Random) -> list[int | str]:
    """start, move, number, move, number, ...: 1 to LONGEST_TEXT moves, no number twice."""
    length = rng.randint(1, LONGEST_TEXT)
    walk: list[int | str] = [rng.randint(1, TOP)]
    while len(walk) < 2 * length + 1:
        ahead = [step for step in neighbours(walk[-1]).items() if step[1] not in walk]
        if not ahead:
            return random_walk(rng)
        walk += rng.choice(ahead)
    return walk


def careless(words: list[str], share: float, rng: random.Random) -> list[str]:
    """The words of a walk, a share of them replaced: a move by any move, a number by any number."""
    written = []
    for at, word in enumerate(words):
        other = rng.choice(MOVES) if at % 2 == 0 else str(rng.randint(1, TOP))
        written.append(other if rng.random() < share else word)
    return written


def walk_texts(seed: int, n: int, slip: float, split: str) -> list[Query]:
    """n random walks, each a solution of the question that it answers; none is held out."""
    rng = random.Random(f"{split} {seed}")
    kept_back = set(pairs(seed)[:HELD_OUT])
    texts: list[Query] = []
    while len(texts) < n:
        start, *rest = random_walk(rng)
        if (start, rest[-1]) not in kept_back:
            solution = " ".join(careless([str(word) for word in rest], slip, rng))
            texts.append(walk_query(start, rest[-1], f"{split}/{len(texts)}", solution))
    return texts


def load_walk(cfg) -> Splits:
    """A pool of training questions, a careless SFT set, held-out questions; all from the seed."""
    shuffled = pairs(cfg.seed)
    held_out = questions(shuffled[:HELD_OUT], 3, "test")
    val, test = held_out[: cfg.val_queries], held_out[cfg.val_queries :]
    train = questions(shuffled[HELD_OUT:], 2, "train")[: cfg.toy_queries]
    human = walk_texts(cfg.seed, cfg.toy_solutions, CARELESS, "human")
    return Splits(train, val, {"walk": test}, "{query}", "{query}", human)


# -- stories ---------------------------------------------------------------------------------------

NAMES = "Ann Bob Cid Dan Eve Fay Gil Hal Ida Jon Kim Leo".split()
STORY_WORDS = [*NAMES, *"0123456789", *"has plus minus times . ? = + - * ; #".split()]
MOD = 5  # few numbers: about one wrong solution in six is right by luck
SLIP = 0.85  # the share of sentences that the base model's authors took for another operation
EASY = 0.1  # human solutions are of the stories without "times", and of this share of the others

_DIGITS = {str(digit): digit for digit in range(10)}
_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_SIGNS = {word: sign for sign, word in _WORDS.items()}
_OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul}  # modulo MOD
_MISREAD = {"+": "-", "-": "*", "*": "+"}

Story = dict[str, tuple[str, ...]]  # name -> (digit,) or (a, op, b); a and b are names or digits


def parse_story(text: str) -> tuple[Story, str]:
    """The sentences of a story, and the name that it asks for.

    >>> parse_story("Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?")
    ({'Ann': ('4',), 'Bob': ('Ann', '*', '3'), 'Cid': ('Ann', '+', 'Bob')}, 'Cid')
    """
    *sentences, question = text.split(" . ")
    story = {}
    for sentence in sentences:
        name, _has, *words = sentence.split()
        story[name] = tuple(_SIGNS.get(word, word) for word in words)
    return story, question.split()[0]


def _solve(story: Story) -> dict[str, str]:
    """Name -> its step `name = a op b = x op y = r`, and "#" -> the last step `# r`."""
    values = dict(_DIGITS)
    steps = {}
    for name, (a, *rest) in story.items():
        values[name] = values[a]
        if rest:
            op, b = rest
            values[name] = _OPS[op](values[a], values[b]) % MOD
            numbers = f"{values[a]} {op} {values[b]} = {values[name]}"
            steps[name] = f"{name} = {a} {op} {b} = {numbers}"
    steps["#"] = f"# {values[name]}"
    return steps


def _draw(rng: random.Random, names: list[str]) -> Story:
    """One person has a digit, and each further one is defined by any that come before.

    In every sentence the misread operation gives another number than the right one.
    """
    first = rng.randrange(1, MOD)
    story: Story = {names[0]: (str(first),)}
    values = {**_DIGITS, names[0]: first}
    for i, name in enumerate(names[1:], 1):
        value = misread = None
        while value == misread:
            a = rng.choice(names[:i])
            op = rng.choice("++-*")
            if op == "+" and rng.random() < 0.5:
                b = rng.choice(names[:i])
            else:
                b = str(rng.randint(2 if op == "*" else 1, MOD - 1))
            value = _OPS[op](values[a], values[b]) % MOD
            misread = _OPS[_MISREAD[op]](values[a], values[b]) % MOD
        story[name] = (a, op, b)
        values[name] = value
    return story


def draw_story(rng: random.Random, max_ops: int, uid: str, slip: float = 0.0) -> Query:
    """A story that asks for its last person, and a solution in the story's order.

    The author of the solution takes each sentence, with probability `slip`, for the next operation:
    plus for minus, minus for times, times for plus. So each step of a careless solution is well
    formed, and only a look at the story tells it from a right one.

    max_ops  the story has max_ops - 2 to max_ops operations, at least 2
    """
    names = NAMES[: rng.randint(max(2, max_ops - 2), max_ops) + 1]
    operands: set[str] = set()
    while not operands.issuperset(names[:-1]):  # until everyone is needed
        story = _draw(rng, names)
        operands = {word for words in story.values() for word in words}
    sentences = []
    as_read: Story = {}
    for name, words in story.items():
        sentences.append(f"{name} has {' '.join(_WORDS.get(word, word) for word in words)} .")
        as_read[name] = words
        if len(words) > 1 and rng.random() < slip:
            a, op, b = words
            as_read[name] = (a, _MISREAD[op], b)
    text = " ".join([*sentences, f"{names[-1]} ?"])
    gold = _solve(story)["#"].removeprefix("# ")
    return Query(uid, text, gold, " ; ".join(_solve(as_read).values()))


def check_story(text: str, response: str) -> list[bool]:
    """Whether each step of a response to a story is right, exactly and with no model.

    Steps are read in the story's order. The k-th step `X = A op B = a op b = r` is right if the
    k-th sentence after the first says op, a and b are the numbers of those it names (+ and * take
    either order), the steps that these come from are right, and r is the true result. X, A and B
    are let pass: a slip there changes no number. The last step `# r` is right if r is the number of
    the person asked for and that person's step is right.

    returns  one bool a step; steps are separated by " ; "

    >>> story = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"
    >>> check_story(story, "Bob = Ann * 3 = 4 * 3 = 2 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1")
    [True, True, True]
    >>> check_story(story, "Bob = Ann + 3 = 4 + 3 = 2 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1")
    [False, False, False]
    """
    story, asked = parse_story(text)
    truth = _solve(story)
    first, *others = story
    known = {first}  # whose numbers right steps have derived
    expected = iter(others)
    right = []
    for step in re.split(r" ;(?= )", response.removesuffix(" ;")):
        words = step.split()
        if words[:1] == ["#"]:
            right.append(asked in known and " ".join(words) == truth["#"])
            continue
        name = next(expected, None)
        needed = {word for word in story.get(name, ()) if word in story}
        is_right = name is not None and needed <= known
        right.append(is_right and _is_same_step(words, truth[name].split()))
        if right[-1]:
            known.add(name)
    return right


def _is_same_step(words: list[str], truth: list[str]) -> bool:
    """Whether `X = A op B = a op b = r` is the true step but for X, A, B and the order of a, b."""
    if len(words) != len(truth):
        return False
    for name in (0, 2, 4):  # X, A, B
        words[name] = truth[name]
    if truth[7] in "+*" and (words[6], words[8]) == (truth[8], truth[6]):
        words[6], words[8] = words[8], words[6]
    return words == truth


def story_texts(max_ops: int, n: int) -> list[Query]:
    """What the base model has read: n solutions by careless authors.

    It knows the form, the numbers and both readings of a sentence, the wrong one better.
    """
    rng = random.Random(f"toy text {max_ops}")
    return [draw_story(rng, max_ops, f"text/{i}", SLIP) for i in range(n)]


def load_stories(cfg) -> Splits:
    """Stories from the seed of the data, not of the run; no question occurs twice in all splits."""
    rng = random.Random(f"toy {cfg.toy_max_ops}")
    seen: set[str] = set()
    test = _fresh(rng, cfg, "test", 500, seen)
    val = _fresh(rng, cfg, "val", cfg.val_queries, seen)
    train = _fresh(rng, cfg, "train", cfg.toy_queries, seen)
    easy = [q.id for q in train if "times" not in q.text or rng.random() < EASY]
    solved = set(easy[: cfg.toy_solutions])
    for i, query in enumerate(train):
        if query.id not in solved:
            train[i] = Query(query.id, query.text, query.gold)
    # the test set keeps its first name: the seeds of its samples are made of it
    return Splits(train, val, {"toy": test}, "{query}", "{query}")


def _fresh(rng: random.Random, cfg, split: str, n: int, seen: set[str]) -> list[Query]:
    """n stories that are not in `seen`, which they join."""
    queries: list[Query] = []
    again = 0
    while len(queries) < n:
        query = draw_story(rng, cfg.toy_max_ops, f"{split}/{len(queries)}")
        if query.text not in seen:
            again = 0
            seen.add(query.text)
            queries.append(query)
            continue
        again += 1
        if again == 1000:
            raise UserError(
                f"--toy-max-ops {cfg.toy_max_ops}: there are hardly more than {len(seen):,} such "
                f"stories, too few for 500 test questions, --val-queries {cfg.val_queries} and "
                f"--toy-queries {cfg.toy_queries}"
            )
    return queries


# -- the base models -------------------------------------------------------------------------------


@dataclass
class Base:
    """How a toy's base model is made: what it reads, in how many steps, and its size."""

    name: str  # of its folder
    seed: int
    words: list[str]  # its vocabulary
    texts: list[Query]
    layers: int
    steps: int
    batch_size: int
    lr: float


def walk_base(cfg) -> Base:
    """The base of the walks, another one for each seed."""
    texts = walk_texts(cfg.seed, cfg.toy_texts, 0.0, "text")
    name = f"walk-base-{cfg.toy_texts}-{cfg.seed}"
    return Base(name, cfg.seed, WALK_WORDS, texts, layers=3, steps=800, batch_size=64, lr=2e-3)


def story_base(cfg) -> Base:
    """The base of the stories, the same for all seeds."""
    texts = story_texts(cfg.toy_max_ops, cfg.toy_texts)
    name = f"toy-base-{cfg.toy_max_ops}-{cfg.toy_texts}"
    steps = math.ceil(len(texts) / 32)
    return Base(name, 0, STORY_WORDS, texts, layers=2, steps=steps, batch_size=32, lr=5e-3)


def make_tiny_llama(
    folder: Path, words: list[str], seed: int, width: int = 64, layers: int = 2, heads: int = 4
) -> None:
    """Writes a word-level tokenizer and a LlamaForCausalLM with random weights to `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    limits = dict(clean_up_tokenization_spaces=False, model_max_length=256)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special, **limits)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width + width // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- tables: task -> ... ---------------------------------------------------------------------------

BASES = {"walk": walk_base, "stories": story_base}  # how its base model is made
CHECKERS = {"stories": check_story}  # (question, response) -> whether each step is right
