"""Questions about scenes: answers are true, options are not, names are unambiguous, and the words alone say nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from llava.mini.captions import COUNT_WORDS, PLURALS, caption_references, dense_caption
from llava.mini.forms import FORMS, PAIR_FORMS, TEXT_FORMS, Fact
from llava.mini.forms.counting import COUNT_SHARES, countable_kinds
from llava.mini.forms.knowledge import CORNERS, FRUITS
from llava.mini.questions import (
    DESCRIBE,
    as_choice,
    sample_pair_questions,
    sample_questions,
    sample_text_questions,
)
from llava.mini.scenes import CATEGORIES, COLORS, NUMBERS, SHAPES, SIZES, WORDS, Scene, SceneObject, sample_scene
from llava.mini.seeded_random import SeededRandom

N_SCENES = 1500


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed, "train") for seed in range(N_SCENES)]


@pytest.fixture(scope="module")
def facts(scenes) -> dict[str, list[tuple[Scene, Fact]]]:
    """Form -> facts, one try a scene."""
    found = defaultdict(list)
    for scene in scenes:
        rng = SeededRandom("facts", scene.seed)
        for form, state in FORMS.items():
            fact = state(scene, rng)
            if fact is not None:
                found[form].append((scene, fact))
    return found


def meant(scene: Scene, phrase: str) -> list[SceneObject]:
    """All objects that an English speaker could mean by the phrase: the tests' own reading of it."""
    phrase, _, place = re.sub(r"^the ", "", phrase).partition(" shape ")
    if place:
        place = re.sub(r"^(in|at|on) the ", "", place)
        return [o for o in scene.shapes if o.place == place]
    phrase, _, text = phrase.partition(" that says ")
    *adjectives, noun = phrase.split()
    kin = [o for o in scene.objects if noun == o.shape or (noun == "shape" and not o.is_sign)]
    kin = [o for o in kin if not text or o.text == text]
    return [o for o in kin if all(word in (o.color, o.size) for word in adjectives)]


def the_one(scene: Scene, phrase: str) -> SceneObject:
    # "shape in the top left" begins with the noun; the other phrases end with it.
    objects = meant(scene, f" {phrase}" if phrase.startswith("shape ") else phrase)
    assert len(objects) == 1, (scene.seed, phrase, objects)
    return objects[0]


def parsed(facts, form: str, pattern: str) -> Iterator[tuple[Scene, Fact, tuple[str, ...]]]:
    """The form's facts whose questions match the pattern, with its groups; there are some."""
    matches = [(scene, fact, re.fullmatch(pattern, fact.question)) for scene, fact in facts[form]]
    matches = [(scene, fact, match.groups()) for scene, fact, match in matches if match]
    assert len(matches) > 15, f"no {form} question reads {pattern}"
    yield from matches


def test_every_form_finds_scenes(facts):
    assert set(facts) == set(FORMS)
    assert all(len(found) >= 20 for found in facts.values())


def test_wrong_answers_are_different_from_the_right_one(facts):
    for form, found in facts.items():
        for _, fact in found:
            assert fact.form == form
            assert len({fact.answer, *fact.wrong}) == 1 + len(fact.wrong)


@pytest.mark.parametrize(
    ("form", "pattern", "names"),
    [
        ("color", r"What color is the (.+)\?", COLORS),
        ("shape", r"What shape is the (.+)\?", SHAPES),
        ("size", r"How big is the (.+)\?", SIZES),
        ("place", r"Where in the image is the (.+)\?", ()),
    ],
)
def test_questions_about_an_attribute(facts, form, pattern, names):
    for scene, fact, (phrase,) in parsed(facts, form, pattern):
        assert getattr(the_one(scene, phrase), form) == fact.answer
        assert not set(phrase.split()) & set(names), "the question gives the answer away"


def test_existence_questions(facts):
    for scene, fact, (phrase,) in parsed(facts, "exists", r"Is there an? (.+?)(?: in .+)?\?"):
        assert bool(meant(scene, phrase)) == (fact.answer == "yes")


def test_counting_questions(facts):
    singular = {plural: shape for shape, plural in PLURALS.items()} | {"shapes": "shape"}
    for scene, fact, (phrase,) in parsed(facts, "count", r"How many (.+?)(?: are .+)\?"):
        *adjectives, noun = phrase.split()
        one = " ".join([*adjectives, singular.get(noun, noun)])
        counted = len(scene.objects) if noun == "objects" else len(meant(scene, one))
        assert str(counted) == fact.answer


def test_statements_of_numbers(facts):
    for scene, fact, (number, kind) in parsed(facts, "is_count", r"Are there(?: exactly)? (\w+) (.+) in .+\?"):
        kinds = {k: n for sort in countable_kinds(scene).values() for k, n in sort.items()}
        assert (kinds[kind] == COUNT_WORDS.index(number)) == (fact.answer == "yes")


def test_relations(facts):
    pattern = r"Is the (.+) (to the left of|to the right of|above|below) the (.+)\?"
    for scene, fact, (first, relation, second) in parsed(facts, "relation", pattern):
        if " or " in fact.question:
            continue
        (x1, y1), (x2, y2) = the_one(scene, first).center, the_one(scene, second).center
        gain = {"to the left of": x2 - x1, "to the right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[relation]
        assert abs(gain) >= 42, "too close to call"
        assert (gain > 0) == (fact.answer == "yes")


def test_what_is_beside_something(facts):
    pattern = r"What color is the object (to the left of|to the right of|above|below) the (.+)\?"
    for scene, fact, (relation, phrase) in parsed(facts, "related", pattern):
        anchor = the_one(scene, phrase)
        axis, sign = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
        there = [o for o in scene.objects if sign * (o.center[axis] - anchor.center[axis]) > 0]
        assert [o.color for o in there] == [fact.answer]


def test_sides(facts):
    for scene, fact, (phrase,) in parsed(facts, "side", r"On which side of the image is the (.+)\?"):
        assert (the_one(scene, phrase).center[0] < 168) == (fact.answer == "left")


def test_reading(facts):
    for scene, fact, (phrase,) in parsed(facts, "read", r"What is written on the (.+)\?"):
        assert the_one(scene, phrase).text == fact.answer
        alphabet = WORDS if fact.answer in WORDS else NUMBERS
        assert {fact.answer, *fact.wrong} == set(alphabet)


def test_larger_and_smaller(facts):
    for scene, fact, (word, first, second) in parsed(
        facts, "larger", r"Which is (larger|smaller), the (.+) or the (.+)\?"
    ):
        by_size = sorted((first, second), key=lambda phrase: the_one(scene, phrase).width)
        assert fact.answer == by_size[word == "larger"]


def test_same_colors(facts):
    for scene, fact, (first, second) in parsed(facts, "same_color", r"Are the (.+) and the (.+) the same color\?"):
        assert (the_one(scene, first).color == the_one(scene, second).color) == (fact.answer == "yes")


def test_directions_on_a_map(facts):
    pattern = r"In which direction is the (.+) from the (.+)\?"
    for scene, fact, (first, second) in parsed(facts, "compass", pattern):
        (x1, y1), (x2, y2) = the_one(scene, first).center, the_one(scene, second).center
        ahead = {"east": x1 - x2, "west": x2 - x1, "south": y1 - y2, "north": y2 - y1}
        assert max(ahead, key=ahead.get) == fact.answer


def test_knowledge(facts):
    for scene, fact, (phrase,) in parsed(facts, "fruit", r"Which fruit has the color of the (.+)\?"):
        assert FRUITS[the_one(scene, phrase).color] == fact.answer
    for scene, fact, (phrase,) in parsed(facts, "corners", r"How many corners does the (.+) have\?"):
        assert str(CORNERS[the_one(scene, phrase).shape]) == fact.answer
    for scene, fact in facts["category"]:
        (word,) = [o.text for o in scene.signs if o.text in WORDS]
        assert word in CATEGORIES[fact.answer]
    for scene, fact, (added,) in parsed(facts, "sum", r"What is the number in the image plus (\d)\?"):
        (number,) = [int(o.text) for o in scene.signs if o.text in NUMBERS]
        assert str(number + int(added)) == fact.answer


def test_yes_and_no_are_equally_frequent():
    answers = defaultdict(Counter)
    yes_no_forms = [form for form in FORMS if form.startswith("is_")] + ["exists", "both", "same_color", "relation"]
    for seed in range(3000):
        scene, rng = sample_scene(seed, "validation"), SeededRandom("balance", seed)
        for form in yes_no_forms:
            fact = FORMS[form](scene, rng)
            if fact is not None and fact.answer in ("yes", "no"):
                answers[form][fact.answer] += 1
    assert len(answers) == len(yes_no_forms)
    for form, given in answers.items():
        n = given.total()
        # Four standard deviations of a fair coin, and one percent for what the world's own frequencies leave over.
        assert abs(given["yes"] - n / 2) < 4 * (n / 4) ** 0.5 + n / 100, (form, given)


def test_a_stated_number_says_nothing_about_whether_it_is_true():
    answers = defaultdict(Counter)
    for seed in range(8000):
        fact = FORMS["is_count"](sample_scene(seed, "validation"), SeededRandom("stated", seed))
        if fact is not None:
            stated = next(word for word in fact.question.split() if word in COUNT_WORDS)
            answers[stated][fact.answer] += 1
    for stated, given in answers.items():
        n = given.total()
        assert abs(given["yes"] - n / 2) < 4 * (n / 4) ** 0.5 + n / 50, (stated, given)


def test_count_shares_are_those_of_the_world(scenes):
    counted = defaultdict(Counter)
    for scene in scenes:
        for sort, kinds in countable_kinds(scene).items():
            counted[sort].update(n for n in kinds.values() if n)
    for sort, shares in COUNT_SHARES.items():
        total = counted[sort].total()
        for n, share in enumerate(shares, start=1):
            p = share / 1000
            # Five standard deviations, with room for the rounding to a thousandth.
            assert abs(counted[sort][n] / total - p) < 5 * (p * (1 - p) / total) ** 0.5 + 0.005, (sort, n)


def test_every_letter_is_right_equally_often(scenes):
    letters = defaultdict(Counter)
    for scene in scenes:
        for qa in sample_questions(scene, SeededRandom("letters", scene.seed), 8, choice_percent=100):
            if qa.choices:
                letters[len(qa.choices)][qa.answer] += 1
    for n, given in letters.items():
        expected = given.total() / n
        assert sorted(given) == list("ABCD"[:n])
        assert all(abs(count - expected) < 4 * expected**0.5 for count in given.values()), given


def test_options_hold_the_answer_and_wrong_ones():
    fact = Fact("shape", "Which?", "star", ("ring", "cross", "heart", "circle"))
    for seed in range(20):
        qa = as_choice(fact, SeededRandom(seed), "mmmu")
        assert qa.answer_text == "star"
        assert len(set(qa.choices)) == 4 and set(qa.choices) <= {"star", *fact.wrong}


def test_a_fact_without_enough_wrong_answers_gets_no_options():
    with pytest.raises(ValueError, match="a fact with 1 wrong answers has no 2 options in the style seedbench"):
        as_choice(Fact("is_color", "Is it red?", "yes", ("no",)), SeededRandom(0), "seedbench")


def test_sampled_questions_are_different_and_repeatable(scenes):
    asked = sample_questions(scenes[3], SeededRandom("q", 3), 10)
    assert asked == sample_questions(scenes[3], SeededRandom("q", 3), 10)
    assert len({qa.question for qa in asked}) == len(asked) == 10


def test_questions_about_two_images(scenes):
    seen = Counter()
    for first, second in zip(scenes[:200:2], scenes[1:200:2], strict=True):
        for qa in sample_pair_questions(first, second, SeededRandom("pair", first.seed), 3):
            seen[qa.form] += 1
            assert qa.question.startswith("<image 1> <image 2> Which image")
            right, wrong = (first, second) if qa.answer_text == "the first image" else (second, first)
            if qa.form == "pair_read":
                text = re.search(r"says (\w+)\?", qa.question)[1]
                assert text in {o.text for o in right.signs} and text not in {o.text for o in wrong.signs}
            if qa.form == "pair_exists":
                kind = re.search(r"shows an? (.+)\?", qa.question)[1]
                assert meant(right, kind) and not meant(wrong, kind)
            if qa.form == "pair_background":
                assert right.background in qa.question and right.background != wrong.background
            if qa.form == "pair_more":
                assert len(right.objects) > len(wrong.objects)
    assert set(seen) == set(PAIR_FORMS)


def test_questions_without_an_image():
    asked = sample_text_questions(SeededRandom("text"), 200)
    assert len(asked) == 200 and {qa.form for qa in asked} == set(TEXT_FORMS)
    for qa in asked:
        if qa.form == "text_sum":
            a, b = map(int, re.findall(r"\d+", qa.question))
            assert qa.answer_text == str(a + b)
        if "of these" in qa.question:
            assert qa.choices


def test_captions_are_several_and_different(scenes):
    for scene in scenes[:300]:
        captions = caption_references(scene)
        assert 8 <= len(set(captions)) == len(captions) <= 10
        assert all(re.fullmatch(r"[A-Z][a-z0-9, ]+\.", caption) for caption in captions)
        assert not any("  " in caption or " ." in caption for caption in captions)


def test_captions_name_what_covers_most_of_the_image(scenes):
    for scene in scenes[:300]:
        groups = Counter()
        for o in scene.objects:
            groups[o.shape, o.color, o.text] += o.width * o.height
        (shape, color, _), _ = groups.most_common(1)[0]
        captions = caption_references(scene)
        named = [color in caption and (shape in caption or PLURALS[shape] in caption) for caption in captions]
        # One caption tells where the next thing is when the first is in several places.
        assert sum(named) >= len(captions) - 1, captions


def test_dense_captions_name_everything_in_order(scenes):
    for scene in scenes[:100]:
        *parts, background = dense_caption(scene).removesuffix(".").split("; ")
        assert background == f"{scene.texture} {scene.background} background"
        assert len(parts) == len(scene.objects)
        for part, o in zip(parts, scene.objects, strict=True):
            assert part.startswith(f"{o.place}: a {o.size} {o.color} {o.shape}")
            assert part.endswith(f" that says {o.text}") or not o.is_sign


def test_plain_questions_are_asked_as_people_ask(scenes):
    asked = [
        qa
        for n, scene in enumerate(scenes[:20])
        for qa in sample_questions(scene, SeededRandom("plain", n), 8, None, 0, 100)
    ]
    open_ones = [qa for qa in asked if not qa.choices]
    assert open_ones and {qa.style for qa in open_ones} == {"plain"}
    assert all(qa.prompt == qa.question and qa.prompt.endswith(("?", ".")) for qa in open_ones)
    described = {qa.prompt for qa in open_ones if qa.form == "caption"}
    assert described <= set(DESCRIBE) and len(described) > 1
