"""toy.py: stories and their checker, against readings of our own; the tiny Llama's tokenizer."""

import random

import pytest

import toy
from config import parse_config
from data import UserError
from trainer import load_tokenizer


def load(*flags: str):
    return toy.load_stories(parse_config(["--task", "stories", *flags]))


def test_solutions_are_right_and_splits_disjoint():
    splits = load("--toy-queries", "600", "--toy-solutions", "200")
    solved = [q for q in splits.train if q.solution]
    assert len(solved) == 200 and len(splits.train) == 600
    for q in solved:
        assert all(toy.check_story(q.text, q.solution))
        assert q.solution.endswith(f"# {q.gold}")
    questions = [q.text for q in splits.train + splits.val + splits.tests["toy"]]
    assert len(set(questions)) == len(questions)
    assert splits.train == load("--toy-queries", "600", "--toy-solutions", "200").train


def substituted(text: str) -> int:
    """The answer by a second reading of a story: names are replaced until none is left."""
    words = {"plus": "+", "minus": "-", "times": "*"}
    story = {}
    for sentence in text.split(" . ")[:-1]:
        name, _, *said = sentence.split()
        story[name] = " ".join(words.get(word, word) for word in said)
    answer = f"( {text.split()[-2]} )"
    while any(name in answer.split() for name in story):
        answer = " ".join(f"( {story[w]} )" if w in story else w for w in answer.split())
    return eval(answer) % toy.MOD  # our own story, no model's text


def test_answers_against_substitution():
    rng = random.Random()
    for i in range(300):
        q = toy.draw_story(rng, 6, str(i))
        assert int(q.gold) == substituted(q.text), q


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


def test_a_misread_sentence_is_another_number_and_a_wrong_step():
    rng = random.Random()
    misread = lucky = 0
    for i in range(500):
        q = toy.draw_story(rng, 5, str(i), slip=0.5)
        right = toy.check_story(q.text, q.solution)
        if all(right):
            continue
        misread += 1
        lucky += q.solution.split()[-1] == q.gold
        wrong = q.solution.split(" ; ")[right.index(False)].split()  # the first wrong step
        asked = q.text.replace(f"{q.text.split()[-2]} ?", f"{wrong[0]} ?")
        assert int(wrong[-1]) != substituted(asked), q
    assert misread > 300 and 0.05 < lucky / misread < 0.3


def test_human_solutions_are_mostly_of_easy_stories():
    train = load("--toy-queries", "4000", "--toy-solutions", "1500").train
    shown = [q for q in train if q.solution]
    hard = [q for q in shown if "times" in q.text]
    assert len(shown) == 1500 and 0.05 < len(hard) / 1500 < 0.2


def test_too_few_different_stories_are_one_line():
    message = "--toy-max-ops 2: there are hardly more than 5.. such stories, too few for 500 test"
    with pytest.raises(UserError, match=message):
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
        ("; ; ;", [False]),
        ("# 1 # 1", [False]),
        ("Cid = = = = = = = = = 1", [False]),
        ("Ann = 4 ; # 1", [False, False]),
    ],
)
def test_check_story(response, right):
    story = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"
    assert toy.check_story(story, response) == right


def test_the_tokenizer_gives_every_text_back(tmp_path):
    toy.make_tiny_llama(tmp_path, toy.STORY_WORDS, seed=0)
    tokenizer = load_tokenizer(tmp_path)
    q = toy.draw_story(random.Random(), 6, "x")
    for text in (q.text, q.solution):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
