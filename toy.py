"""The two toys: number walks, on which balancing pays, and stories, where answers can be luck.

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
import itertools
import math
import operator
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from data import Query, Splits, UserError, progress

# -- walks -----------------------------------------------------------------------------------------

TOP = 100  # the numbers are 1 to TOP
MOVES = ("+3", "-4", "*2", "/2", "+7", "-9")
WALK_WORDS = [*map(str, range(1, TOP + 1)), *MOVES, ">", ":"]
SLACK = 2  # a walk may take so many moves more than the shortest one
FARTHEST = 6  # moves between the two numbers of a question, at most
HELD_OUT = 2000  # pairs of numbers that validation and test questions come from, and no text
LONGEST_TEXT = 4  # moves of a walk that the base or the SFT policy has read, at most
CARELESS = 0.2  # share of the words of a human solution that are wrong, at random


@functools.cache
def neighbours(number: int) -> dict[str, int]:
    """The allowed moves from a number, and the numbers that they lead to.

    >>> neighbours(3), neighbours(60)
    ({'+3': 6, '*2': 6, '+7': 10}, {'+3': 63, '-4': 56, '/2': 30, '+7': 67, '-9': 51})
    """
    reached = {}
    for move in MOVES:
        by = int(move[1:])
        results = {"+": number + by, "-": number - by, "*": number * by, "/": number // by}
        result = results[move[0]]
        is_whole = move[0] != "/" or number % by == 0
        if is_whole and 1 <= result <= TOP:
            reached[move] = result
    return reached


@functools.cache
def distances(start: int) -> dict[int, int]:
    """The least number of moves from `start` to each number, by breadth-first search."""
    least = {start: 0}
    # it grows while it is read
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
            # behind a wrong move nothing can be right, as the walk is no longer where it says
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


def check_route(text: str, response: str) -> list[bool]:
    """For each step of a walk, that is each move and the end: whether it can become a right answer.

    A move has to be right, and the goal within reach in time; a right end is at the goal.

    >>> check_route("3 > 17 :", "+7 10 +3 13 +3 16 *2 32")  # 4 moves at most; 26 would lead there
    [True, True, False, False, False]
    """
    start, _, goal, _ = text.split()
    number, goal = int(start), int(goal)
    left = distances(number)[goal] + SLACK
    visited = {number}
    steps = check_walk(text, response)
    for at, written in enumerate(response.split()[1::2]):
        if not steps[at]:
            break
        number = int(written)
        visited.add(number)
        steps[at] = can_reach(number, goal, left - at - 1, visited)
    steps.append(all(steps) and number == goal)
    return steps


def can_reach(number: int, goal: int, left: int, visited: set[int]) -> bool:
    """Whether at most `left` moves lead from a number to the goal, and no number occurs twice."""
    if number == goal:
        return left >= 0
    # the distance prunes: without it each move would multiply the paths by up to six
    if goal in visited or distances(number).get(goal, TOP) > left:
        return False
    fresh = [result for result in neighbours(number).values() if result not in visited]
    return any(can_reach(result, goal, left - 1, visited | {result}) for result in fresh)


# -- walks: questions and texts --------------------------------------------------------------------


def walk_query(start: int, goal: int, uid: str, solution: str = "") -> Query:
    """The question `START > GOAL :`."""
    # a grader sees the gold alone, so all that makes a walk right stands in it
    gold = f"{start} > {goal} in {distances(start)[goal] + SLACK}"
    return Query(uid, f"{start} > {goal} :", gold, solution)


def pairs(seed: int) -> list[tuple[int, int]]:
    """All (start, goal), shuffled; the first HELD_OUT are kept from training."""
    # by the seed alone, so that a text for the base can tell which pairs are held out
    different = list(itertools.permutations(range(1, TOP + 1), 2))
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
        # a dead end: all is drawn anew, as a shorter walk would make short texts more frequent
        if not ahead:
            return random_walk(rng)
        walk += rng.choice(ahead)
    return walk


def careless(words: list[str], share: float, rng: random.Random) -> list[str]:
    """The words of a walk, a share of them replaced: a move by any move, a number by any number."""
    written = []
    for at, word in enumerate(words):
        # drawn for every word, so that another share changes no other word
        other = rng.choice(MOVES) if at % 2 == 0 else str(rng.randint(1, TOP))
        written.append(other if rng.random() < share else word)
    return written


def walk_texts(seed: int, n: int, slip: float, split: str) -> list[Query]:
    """n random walks, each a solution of the question that it answers; none is held out."""
    # a generator of its own for each split: more base texts change no human solution
    rng = random.Random(f"{split} {seed}")
    # a text would show the answer to a held-out question
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
    if cfg.val_queries >= len(held_out):
        held = f"there are {len(held_out):,} held-out questions, and some must be left to test on"
        raise UserError(f"--val-queries {cfg.val_queries}: {held}")
    val, test = held_out[: cfg.val_queries], held_out[cfg.val_queries :]
    train = questions(shuffled[HELD_OUT:], 2, "train")
    if cfg.toy_queries > len(train):
        raise UserError(f"--toy-queries {cfg.toy_queries}: there are {len(train):,} questions")
    human = walk_texts(cfg.seed, cfg.toy_solutions, CARELESS, "human")
    pool = train[: cfg.toy_queries]
    return Splits(pool, val, {"walk": test}, "{query}", "{query}", human)


# -- stories ---------------------------------------------------------------------------------------

NAMES = "Ann Bob Cid Dan Eve Fay Gil Hal Ida Jon Kim Leo".split()
STORY_WORDS = [*NAMES, *"0123456789", *"has plus minus times . ? = + - * ; #".split()]
MOD = 5  # few numbers: about one wrong solution in six is right by luck
SLIP = 0.85  # the share of sentences that the base model's authors took for another operation
EASY = 0.1  # human solutions are of the stories without "times", and of this share of the others

_DIGITS = {str(digit): digit for digit in range(10)}
_SIGNS = {"plus": "+", "minus": "-", "times": "*"}
_OPS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}  # modulo MOD
_MISREAD = {"plus": "minus", "minus": "times", "times": "plus"}

Story = dict[str, tuple[str, ...]]  # name -> (digit,) or (a, op, b); a and b are names or digits


def parse_story(text: str) -> tuple[Story, str]:
    """The sentences of a story, and the name that it asks for.

    >>> parse_story("Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?")
    ({'Ann': ('4',), 'Bob': ('Ann', 'times', '3'), 'Cid': ('Ann', 'plus', 'Bob')}, 'Cid')
    """
    *sentences, question = text.split(" . ")
    story = {}
    for sentence in sentences:
        name, _has, *words = sentence.split()
        story[name] = tuple(words)
    return story, question.split()[0]


def _solve(story: Story) -> dict[str, str]:
    """Name -> its step `name = a op b = x op y = r`, and "#" -> the last step `# r`."""
    values = dict(_DIGITS)
    steps = {}
    for name, (a, *rest) in story.items():
        values[name] = values[a]
        if rest:
            op, b = rest
            sign = _SIGNS[op]
            values[name] = _OPS[op](values[a], values[b]) % MOD
            numbers = f"{values[a]} {sign} {values[b]} = {values[name]}"
            steps[name] = f"{name} = {a} {sign} {b} = {numbers}"
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
        # else a careless author would be right by luck
        while value == misread:
            a = rng.choice(names[:i])
            op = rng.choice(["plus", "plus", "minus", "times"])
            if op == "plus" and rng.random() < 0.5:
                b = rng.choice(names[:i])
            else:
                # times 1 and plus 0 would leave the number as it is
                b = str(rng.randint(2 if op == "times" else 1, MOD - 1))
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
    # until everyone is needed, so that no step of a solution is idle
    while not operands.issuperset(names[:-1]):
        story = _draw(rng, names)
        operands = set().union(*story.values())
    as_read = dict(story)
    for name in names[1:]:
        if rng.random() < slip:
            a, op, b = story[name]
            as_read[name] = (a, _MISREAD[op], b)
    sentences = [f"{name} has {' '.join(words)} ." for name, words in story.items()]
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
    known = {first, *_DIGITS, *_OPS}  # words that a right step may build on
    expected = iter(others)
    right = []
    for step in re.split(r" ;(?= )", response.removesuffix(" ;")):
        words = step.split()
        if words[:1] == ["#"]:
            # a right number behind a wrong step is luck, and what this toy counts
            is_right = asked in known and words == truth["#"].split()
        else:
            # a wrong step uses its sentence up: a second try would make guessing pay
            name = next(expected, None)
            is_right = name is not None and known.issuperset(story[name])
            is_right = is_right and _is_same_step(words, truth[name].split())
            if is_right:
                known.add(name)
        right.append(is_right)
    return right


def _is_same_step(words: list[str], truth: list[str]) -> bool:
    """Whether `X = A op B = a op b = r` is the true step but for X, A, B and the order of a, b."""
    a, op, b = truth[6:9]
    numbers = [truth[5:]]
    if op in "+*":
        numbers.append(["=", b, op, a, *truth[9:]])
    return words[1:4:2] == truth[1:4:2] and words[5:] in numbers


def story_texts(max_ops: int, n: int) -> list[Query]:
    """What the base model has read: n solutions by careless authors.

    It knows the form, the numbers and both readings of a sentence, the wrong one better.
    """
    rng = random.Random(f"toy text {max_ops}")
    texts = []
    bar = progress(n, "stories to read", delay=3)
    for i in range(n):
        texts.append(draw_story(rng, max_ops, f"text/{i}", SLIP))
        bar.update()
    bar.close()
    return texts


def load_stories(cfg) -> Splits:
    """Stories from the seed of the data, not of the run; no question occurs twice in all splits."""
    rng = random.Random(f"toy {cfg.toy_max_ops}")
    seen: set[str] = set()
    test = _fresh(rng, cfg, "test", 500, seen)
    val = _fresh(rng, cfg, "val", cfg.val_queries, seen)
    train = _fresh(rng, cfg, "train", cfg.toy_queries, seen)
    # hard stories are left for self-training to solve
    easy = [q.id for q in train if "times" not in q.text or rng.random() < EASY]
    solved = set(easy[: cfg.toy_solutions])
    train = [q if q.id in solved else replace(q, solution="") for q in train]
    # the test set keeps its first name: the seeds of its samples are made of it
    return Splits(train, val, {"toy": test}, "{query}", "{query}")


def _fresh(rng: random.Random, cfg, split: str, n: int, seen: set[str]) -> list[Query]:
    """n stories that are not in `seen`, which they join."""
    queries: list[Query] = []
    bar = progress(n, f"{split} stories", delay=3)
    while len(queries) < n:
        # of short stories there are a few hundred only
        for _ in range(1000):
            query = draw_story(rng, cfg.toy_max_ops, f"{split}/{len(queries)}")
            if query.text not in seen:
                break
        else:
            raise UserError(
                f"--toy-max-ops {cfg.toy_max_ops}: there are hardly more than {len(seen):,} such "
                "stories, too few for 500 test questions, --val-queries and --toy-queries"
            )
        seen.add(query.text)
        queries.append(query)
        bar.update()
    bar.close()
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


def make_tiny_llama(folder: Path, words: list[str], seed: int, layers: int = 2) -> None:
    """Writes a word-level tokenizer and a LlamaForCausalLM with random weights to `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # a word a token, so that a move or a number is drawn in one step
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    limits = dict(clean_up_tokenization_spaces=False, model_max_length=256)
    PreTrainedTokenizerFast(tokenizer_object=raw, **special, **limits).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,
        pad_token_id=0,
    )
    # transformers draws weights from the default generator
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


# -- tables: task -> ... ---------------------------------------------------------------------------

BASES = {"walk": walk_base, "stories": story_base}  # how its base model is made

# One step of a solution, where the general rule doesn't fit. A walk's are each move with its
# number, and the end: without it, a walk that stops too soon reads like one that goes on.
STEPS = {"walk": re.compile(r"\S+(?:\s+\S+)?|(?<=\S)\s*$")}

# (question, response) -> whether each step is right
CHECKERS = {"walk": check_route, "stories": check_story}
LUCKY = {"stories"}  # an answer can be right and a step of it wrong; no walk can
