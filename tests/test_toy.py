"""toy.py: stories and their checker, against readings of our own; walks; the tiny Llama."""

import random

import pytest
from conftest import refused

import toy
from config import parse_config
from trainer import load_tokenizer


def load(*flags: str):
    return toy.load_stories(parse_config(["--task", "stories", *flags]))


def test_solutions_are_right_mostly_of_easy_stories_and_splits_disjoint():
    flags = ("--toy-queries", "2000", "--toy-solutions", "800")
    splits = load(*flags)
    solved = [q for q in splits.train if q.solution]
    assert len(solved) == 800 and len(splits.train) == 2000
    for q in solved:
        assert all(toy.check_story(q.text, q.solution)) and q.solution.endswith(f"# {q.gold}")
    hard = [q for q in solved if "times" in q.text]
    assert 0.05 < len(hard) / 800 < 0.2
    questions = [q.text for q in splits.train + splits.val + splits.tests["toy"]]
    assert len(set(questions)) == len(questions)
    assert splits == load(*flags)


def substituted(text: str) -> int:
    """The answer by a second reading of a story: names are replaced until none is left."""
    words = {"plus": "+", "minus": "-", "times": "*"}
    story = {}
    for sentence in text.split(" . ")[:-1]:
        name, _, *terms = sentence.split()
        story[name] = " ".join(words.get(word, word) for word in terms)
    answer = f"( {text.split()[-2]} )"
    while any(name in answer.split() for name in story):
        answer = " ".join(f"( {story[w]} )" if w in story else w for w in answer.split())
    return eval(answer) % toy.MOD  # our own story, no model's text


def test_a_change_of_one_token_breaks_a_step_unless_it_is_a_name():
    """In `X = A op B = a op b = r` the names X, A and B are let pass, and nothing else is."""
    rng = random.Random()
    for i in range(20):
        q = toy.draw_story(rng, 5, str(i))
        tokens = q.solution.split()
        for k in range(len(tokens)):
            others = [word for word in toy.STORY_WORDS if word not in (tokens[k], ";", "#")]
            changed = " ".join([*tokens[:k], rng.choice(others), *tokens[k + 1 :]])
            is_name = k % 12 in (0, 2, 4) and k < len(tokens) - 2  # 12 tokens a step and its ";"
            assert all(toy.check_story(q.text, changed)) == is_name, (q, changed)


def test_answers_are_right_and_a_misread_sentence_is_another_number_and_a_wrong_step():
    rng = random.Random()
    misread = lucky = 0
    for i in range(500):
        q = toy.draw_story(rng, 5, str(i), slip=0.5)
        assert int(q.gold) == substituted(q.text), q
        right = toy.check_story(q.text, q.solution)
        if all(right):
            continue
        misread += 1
        lucky += q.solution.split()[-1] == q.gold
        wrong = q.solution.split(" ; ")[right.index(False)].split()  # the first wrong step
        asked = q.text.replace(f"{q.text.split()[-2]} ?", f"{wrong[0]} ?")
        assert int(wrong[-1]) != substituted(asked), q
    assert misread > 300 and 0.05 < lucky / misread < 0.3


def test_too_few_different_stories_are_one_line():
    with refused("--toy-max-ops 2: there are hardly more than 5.. such stories, too few for 500"):
        load("--toy-max-ops", "2")


@pytest.mark.parametrize(
    "response, right",
    [
        # either order of + and *
        ("Bob = 3 * Ann = 3 * 4 = 2 ; Cid = Bob + Ann = 2 + 4 = 1 ; # 1", [True, True, True]),
        # Bob was never derived
        ("Cid = Ann + Bob = 4 + 2 = 1 ; # 1", [False, False]),
        # the right answer without reasoning, and after a right step
        ("# 1", [False]),
        ("Bob = Ann * 3 = 4 * 3 = 2 ; # 1", [True, False]),
        # a second try at the same sentence comes too late
        ("Bob = Ann * 3 = 4 * 3 = 1 ; Bob = Ann * 3 = 4 * 3 = 2 ; # 1", [False, False, False]),
        # a right number from a wrong one
        ("Bob = Ann * 3 = 4 * 3 = 1 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1", [False, False, False]),
        ("", [False]),
        ("# 1 # 1", [False]),
        ("Cid = = = = = = = = = 1", [False]),
        ("Ann = 4 ; # 1", [False, False]),
    ],
)
def test_check_story(response, right):
    story = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"
    assert toy.check_story(story, response) == right


def test_walks_held_out_are_in_no_text_and_one_word_in_five_of_a_solution_is_wrong():
    cfg = parse_config(["--task", "walk", "--toy-texts", "2000"])
    splits, texts = toy.load_walk(cfg), toy.walk_base(cfg).texts
    assert all(all(toy.check_walk(q.text, q.solution)) for q in texts)
    held_out = {q.text for q in splits.val + splits.tests["walk"]}
    assert held_out.isdisjoint(q.text for q in [*splits.train, *splits.human, *texts])
    right = [all(toy.check_walk(q.text, q.solution)) for q in splits.human]
    # a walk of 1 to 4 moves has 2 to 8 words: 0.8^2 to 0.8^8 of them are whole
    assert 0.25 < sum(right) / len(right) < 0.5


def test_walks_say_where_there_are_too_few_questions():
    for flags, there in (("--val-queries 1604", "1,604 held"), ("--toy-queries 8000", "7,521 q")):
        with refused(f"{flags}: there are {there}"):
            toy.load_walk(parse_config(["--task", "walk", *flags.split()]))


def test_the_tokenizer_gives_every_text_back(tmp_path):
    toy.make_tiny_llama(tmp_path, toy.STORY_WORDS, seed=0)
    tokenizer = load_tokenizer(tmp_path)
    q = toy.draw_story(random.Random(), 6, "x")
    for text in (q.text, q.solution):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def completable(walk: str, gold: str, left: int) -> bool:
    """Whether any words put behind a walk make it right, each tried; by `reaches` alone."""
    if toy.reaches(walk, gold):
        return True
    number = int(walk.split()[-1])
    steps = [f"{walk} {move} {result}" for move, result in toy.neighbours(number).items()]
    return left > 0 and any(completable(longer, gold, left - 1) for longer in steps)


def test_the_steps_of_a_walk_against_all_completions():
    """Wrong words, ways that are too long, and ways through the goal come up by themselves."""
    rng = random.Random(0)
    counts = {True: 0, False: 0}
    for i in range(300):
        start, *rest = toy.random_walk(rng)
        words = toy.careless([str(word) for word in rest], 0.1, rng)
        goal = rng.choice([rest[-1], *toy.distances(start)])
        if goal == start or toy.distances(start)[goal] > 2:
            continue
        query = toy.walk_query(start, goal, str(i))
        allowed = toy.distances(start)[goal] + toy.SLACK
        verdicts = toy.check_route(query.text, " ".join(words))
        assert len(verdicts) == len(words) // 2 + 1
        assert verdicts[-1] == toy.reaches(" ".join(words), query.gold)
        for n, verdict in enumerate(verdicts[:-1], 1):
            prefix = " ".join(words[: 2 * n])
            right = all(toy.check_walk(query.text, prefix))
            completed = right and completable(prefix, query.gold, allowed - n)
            assert verdict == completed, (query, words)
            counts[verdict] += 1
    assert min(counts.values()) > 20


@pytest.mark.parametrize(
    "walk, verdicts",
    [
        ("", [False]),
        ("+7 10", [True, False]),
        ("+7 10 *2", [True, False, False]),
        ("+7 10 +7 17", [True, True, True]),
        ("+7 10 +7 17 +3 20", [True, True, False, False]),  # nothing leads back to the goal
        ("> > > >", [False, False, False]),
    ],
)
def test_check_route(walk, verdicts):
    assert toy.check_route("3 > 17 :", walk) == verdicts
