"""The built-in corpora: a parser written on its own reads every factor back, so no two sentences are the same."""

import itertools
import math
import random
import re

import pytest

from latentlm.data import FACTORS, GRAMMAR_SIZE, python_docs, render, sentences, stories
from latentlm.data.builtin import _PAST, SHARED_ACTIONS, STORY_FACTORS, TIMES, TOPICS, _unwrap
from latentlm.errors import InputError

IRREGULAR = {"fishermen": "fisherman", "ploughmen": "ploughman", "midwives": "midwife"}
IRREGULAR |= {"fisherwomen": "fisherwoman", "saleswomen": "saleswoman", "waitresses": "waitress"}


def parse(sentence: str) -> dict[str, str]:
    """Factors from the words alone, by position and closed word lists; knows nothing of how `render` works."""
    words = " ".join(sentence.removesuffix(" .").split())
    found: dict[str, str] = {}
    for time in FACTORS["time"]:
        for position, pattern in (("front", f"^{time} "), ("end", f" {time}$")):
            if re.search(pattern, words):
                assert "time" not in found
                found |= {"time": time, "time_position": position}
                words = re.sub(pattern, "", words)
    found["tense"] = next(tense for tense, times in TIMES.items() if found["time"] in times)

    found["company"] = "none"
    if match := re.search(r" by (himself|herself|themselves)$", words):
        found["company"] = "alone"
    elif match := re.search(r" with (?:his|her|their) (\w+)$", words):
        found["company"] = match[1]
    words = words[: match.start()] if match else words

    found["place"] = next(place for place in FACTORS["place"] if words.endswith(" " + place))
    words = words.removesuffix(" " + found["place"])
    words, found["manner"] = words.rsplit(" ", 1)
    subject_part, found["object"] = words.removeprefix("the ").rsplit(" the ", 1)

    found["origin"] = "none"
    for origin in FACTORS["origin"][1:]:
        if f" {origin} " in subject_part:
            found["origin"] = origin
            subject_part = subject_part.replace(f" {origin}", "")
    *before, verb = subject_part.split()
    found["negation"] = "negative" if "not" in before else "affirmative"
    before = [word for word in before if word not in ("will", "did", "do", "does", "not")]
    found["adjective"] = before[0] if len(before) == 2 else "none"
    noun = before[-1]
    found["number"] = "singular" if noun in FACTORS["subject"] else "plural"
    if found["number"] == "plural":
        noun = IRREGULAR.get(noun, noun.removesuffix("s"))
    found["subject"] = noun
    found["topic"] = next(n for n, t in TOPICS.items() if noun in [entry.split("/")[0] for entry in t.subjects])
    forms = {form: base for base in FACTORS["verb"] for form in verb_forms(base)}
    found["verb"] = forms[verb]
    return found


def verb_forms(base: str) -> set[str]:
    stem = base[:-1] + "i" if base.endswith("y") and base[-2] not in "aeiou" else base
    past = {_PAST.get(base, stem + ("d" if base.endswith("e") else "ed"))}
    return {base, base + "s", base + "es", stem + "es"} | past


def combinations(topic: str):
    """Every valid choice of what belongs to a topic."""
    actions = {**TOPICS[topic].actions, **SHARED_ACTIONS}
    pairs = [(verb, thing) for verb, things in actions.items() for thing in things.split()]
    subjects = [entry.split("/")[0] for entry in TOPICS[topic].subjects]
    for subject, (verb, thing), place in itertools.product(subjects, pairs, TOPICS[topic].places):
        yield {"topic": topic, "subject": subject, "verb": verb, "object": thing, "place": place}


def test_size_is_the_number_of_valid_combinations():
    cores = sum(1 for topic in TOPICS for _ in combinations(topic))
    free = math.prod(
        len(FACTORS[name])
        for name in ("number", "adjective", "origin", "negation", "manner", "company", "time", "time_position")
    )
    assert GRAMMAR_SIZE == cores * free > 10**6


def test_every_core_and_every_shell_reads_back():
    rng = random.Random(0)
    free = ("number", "adjective", "origin", "negation", "manner", "company", "time_position")
    for topic in TOPICS:
        for core in rng.sample(list(combinations(topic)), 200):
            tense = rng.choice(FACTORS["tense"])
            shell = {name: rng.choice(FACTORS[name]) for name in free}
            factors = {**core, **shell, "tense": tense, "time": rng.choice(TIMES[tense])}
            assert parse(render(factors)) == factors


@pytest.mark.parametrize("verb", FACTORS["verb"])
def test_every_verb_form_reads_back(verb):
    # The collisions to fear: "cut" and "read" are their own past, and a plural verb looks like a base form.
    core = next(core for topic in TOPICS for core in combinations(topic) if core["verb"] == verb)
    names = ("number", "negation", "company", "time", "time_position")
    seen = {}
    for values in itertools.product(*(FACTORS[name] for name in names)):
        shell = dict(zip(names, values, strict=True))
        tense = next(tense for tense, times in TIMES.items() if shell["time"] in times)
        factors = {**core, **shell, "tense": tense, "adjective": "none", "origin": "none", "manner": "slowly"}
        assert seen.setdefault(render(factors), factors) is factors
    for sentence in random.Random(1).sample(list(seen), 10):
        assert parse(sentence) == seen[sentence]


def test_sentences_are_distinct_reproducible_and_well_formed():
    documents = list(sentences(8_000, seed=3))
    texts = [document.text for document in documents]
    assert len(set(texts)) == 8_000
    assert texts[:50] == [document.text for document in sentences(50, seed=3)]
    assert texts[:50] != [document.text for document in sentences(50, seed=4)]
    assert all(render(document.factors) == document.text for document in documents[:500])
    assert all(parse(document.text) == dict(document.factors) for document in documents[:500])
    assert all(8 <= len(text.split()) - 1 <= 20 and text.endswith(" .") and text == text.lower() for text in texts)
    types = {word for text in texts for word in text.split()}
    assert 250 <= len(types) <= 450
    for name, values in FACTORS.items():
        assert {document.factors[name] for document in documents} == set(values)


def test_first_sentence_is_the_same_on_every_platform():
    assert next(sentences()).text == (
        "the clever nurse from the city does not count the bags happily in the ward by himself most days ."
    )


def test_words_far_apart_agree():
    for document in sentences(3000):
        factors, words = document.factors, f" {document.text} "
        if factors["number"] == "plural":
            assert not re.search(r" (his|her|himself|herself) ", words)
        else:
            assert " their " not in words and " themselves " not in words
        assert (" will " in words) == (factors["time"] in TIMES["future"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"place": "on the farm"}, "place='on the farm' does not go"),
        ({"object": "cows"}, "object='cows' does not go"),
        ({"time": "tomorrow"}, "time='tomorrow' does not go"),
        ({"subject": "emperor"}, "subject='emperor' is unknown"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_render_refuses(change, message):
    document = next(d for d in sentences() if d.factors["topic"] == "sea" and d.factors["tense"] == "past")
    with pytest.raises(InputError, match=re.escape(message)):
        render({**document.factors, **change})


@pytest.mark.parametrize("count", [0, -1, GRAMMAR_SIZE + 1])
def test_impossible_counts(count):
    with pytest.raises(InputError, match="count="):
        sentences(count)


def test_python_docs():
    from pydoc_data.topics import topics

    documents = list(python_docs())
    assert len(documents) == len(topics)
    # Only white space and line ends may change (a word broken at its hyphen is joined), nothing else.
    for document, (_, text) in zip(documents, sorted(topics.items()), strict=True):
        assert "".join(document.text.split()) == "".join(text.split())
        assert document.text == document.text.strip()


def test_unwrap_joins_prose_and_keeps_code():
    prose = "Assert statements are a convenient way to insert debugging assertions\ninto a program, which is good."
    assert _unwrap(prose) == prose.replace("\n", " ")
    hyphen = "For other presentation types, this option is an error; the decimal-\npoint character is written."
    assert _unwrap(hyphen) == hyphen.replace("\n", "")
    code = "   if __debug__:\n       if not expression: raise AssertionError\n   x = 1\n   y = 2"
    assert _unwrap(code) == code
    item = "* an item of a list that is long enough to be broken at the margin of\n  seventy columns"
    assert _unwrap(item) == item.replace("\n ", "")
    heading = "A title that is nearly as long as a line of text\n" + "*" * 48
    assert _unwrap(heading) == heading


def test_stories_keep_their_factors_through_three_sentences():
    documents = list(stories(300, seed=3))
    assert len({document.text for document in documents}) == 300
    for document in documents:
        lines = document.text.split(" . ")
        assert len(lines) == 3
        factors = document.factors
        assert factors is not None and set(factors) == set(STORY_FACTORS)
        for line in lines:
            assert f"the {factors['adjective']} " in line
            assert factors["manner"] in line and factors["place"] in line
            assert (" will " in line) == (factors["tense"] == "future")


def test_stories_repeat_with_their_seed():
    assert [d.text for d in stories(20, seed=1)] == [d.text for d in stories(40, seed=1)][:20]
    assert [d.text for d in stories(20, seed=1)] != [d.text for d in stories(20, seed=2)]


def test_stories_refuse_an_impossible_count():
    with pytest.raises(InputError, match="count=0"):
        stories(0)
