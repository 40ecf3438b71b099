"""Two corpora that need no download: Python's own documentation, and sentences of a small grammar.

The grammar is a world of eight topics. Its sentences look like

    last week the kind sailors from the village did not mend the nets carefully near the island with their sisters .
    [time]        [adjective] [origin]   [tense, negation]  [object] [manner]   [place]          [company] [time]

and are built so that words far apart depend on each other: the time, at either end, goes with the tense of the verb;
the possessive or reflexive near the end goes with the number and the gender of the subject, which every noun of this
world has; the place goes with the topic of the subject, also across verbs and objects that all topics share. What a
short window sees between the two leaves these words open.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import NamedTuple

from latentlm.data.corpora import Document
from latentlm.errors import InputError

DEFAULT_SENTENCES = 100_000
_WRAP_WIDTH = 70


class Topic(NamedTuple):
    """What one topic has to say. Every subject may do every thing to its objects at every place."""

    subjects: tuple[str, ...]  # singular/plural/possessive of the singular; no noun belongs to two topics
    actions: Mapping[str, str]  # verb -> its objects, separated by blanks
    places: tuple[str, ...]


# Verbs that every topic has: here nothing between the subject and the place tells the topic.
SHARED_ACTIONS = {
    "carry": "boxes bags baskets lamps",
    "clean": "lamps bags baskets boots",
    "collect": "keys coins letters gloves",
    "count": "coins boxes bags letters",
    "hide": "keys coins letters gifts",
    "open": "boxes bags letters gifts",
}
TOPICS = {
    "sea": Topic(
        ("sailor/sailors/his", "captain/captains/her", "diver/divers/her", "pirate/pirates/his",
         "fisherman/fishermen/his", "fisherwoman/fisherwomen/her"),
        {"steer": "boat ship", "paint": "boat ship mast", "scrub": "deck boat anchor", "pull": "ropes nets anchor",
         "catch": "crabs salmon eels", "mend": "nets sails ropes"},
        ("in the harbour", "near the island", "near the lighthouse", "in the bay", "near the shore"),
    ),
    "kitchen": Topic(
        ("cook/cooks/his", "baker/bakers/her", "chef/chefs/her", "waiter/waiters/his", "waitress/waitresses/her",
         "butler/butlers/his"),
        {"cut": "bread onions carrots cheese", "boil": "eggs potatoes carrots", "fry": "eggs onions mushrooms potatoes",
         "bake": "bread cake pies cookies", "stir": "soup sauce", "taste": "soup sauce cake cheese pies"},
        ("in the kitchen", "near the stove", "in the restaurant", "at the inn", "near the fireplace"),
    ),
    "farm": Topic(
        ("farmer/farmers/her", "shepherd/shepherds/his", "milkmaid/milkmaids/her", "ploughman/ploughmen/his",
         "rancher/ranchers/her", "gardener/gardeners/his"),
        {"feed": "cows goats sheep horses chickens pigs", "brush": "horses goats cows",
         "harvest": "wheat corn barley pumpkins", "plant": "corn barley beans pumpkins", "chase": "pigs chickens goats",
         "water": "beans corn pumpkins"},
        ("on the farm", "in the field", "near the barn", "behind the stable", "on the hill"),
    ),
    "school": Topic(
        ("teacher/teachers/her", "pupil/pupils/his", "schoolgirl/schoolgirls/her", "schoolboy/schoolboys/his",
         "librarian/librarians/her", "tutor/tutors/his"),
        {"read": "books poems stories essays", "write": "essays poems stories rules",
         "study": "maps lesson riddle rules", "explain": "lesson riddle rules maps",
         "copy": "maps poems rules essays", "recite": "poems alphabet stories"},
        ("in the classroom", "in the library", "at the school", "near the blackboard", "in the hall"),
    ),
    "workshop": Topic(
        ("carpenter/carpenters/her", "blacksmith/blacksmiths/his", "mechanic/mechanics/her",
         "apprentice/apprentices/his", "engineer/engineers/her", "welder/welders/his"),
        {"build": "shelf cabinet bench ladder wagon", "sharpen": "knives saws axes", "bend": "pipes wires rods",
         "polish": "bench cabinet knives shelf", "measure": "planks pipes shelf ladder", "hammer": "nails rods planks"},
        ("in the workshop", "in the garage", "in the shed", "at the factory", "behind the mill"),
    ),
    "music": Topic(
        ("singer/singers/her", "drummer/drummers/his", "pianist/pianists/her", "violinist/violinists/his",
         "composer/composers/her", "organist/organists/his"),
        {"play": "violin piano flute melody waltz", "tune": "violin piano guitar harp", "sing": "song hymn duet",
         "practise": "melody waltz song sonata duet", "hum": "melody song hymn", "rehearse": "duet waltz sonata opera"},
        ("on the stage", "in the theatre", "at the festival", "in the studio", "in the chapel"),
    ),
    "hospital": Topic(
        ("doctor/doctors/her", "nurse/nurses/his", "surgeon/surgeons/her", "dentist/dentists/his",
         "midwife/midwives/her", "medic/medics/his"),
        {"examine": "patients wounds eyes", "treat": "patients wounds burns", "bandage": "wounds arms knees burns",
         "comfort": "patients visitors babies", "wake": "patients babies visitors", "wash": "babies wounds arms knees"},
        ("in the hospital", "at the clinic", "in the ward", "in the ambulance", "near the entrance"),
    ),
    "market": Topic(
        ("merchant/merchants/his", "grocer/grocers/her", "butcher/butchers/his", "florist/florists/her",
         "saleswoman/saleswomen/her", "trader/traders/his"),
        {"sell": "apples roses spices candles hats carpets", "buy": "apples roses spices candles hats carpets",
         "weigh": "apples spices grapes nuts", "wrap": "roses candles hats", "unpack": "spices hats candles carpets",
         "arrange": "roses hats candles apples carpets"},
        ("at the market", "in the shop", "in the square", "at the fair", "near the fountain"),
    ),
}  # fmt: skip
TIMES = {
    "past": ("yesterday", "last week", "last month", "last summer", "last monday"),
    "present": ("every day", "every week", "on sundays", "most days", "these days"),
    "future": ("tomorrow", "next week", "next month", "next summer", "next monday"),
}
_PAST = {
    "bend": "bent", "build": "built", "buy": "bought", "catch": "caught", "cut": "cut", "feed": "fed", "hide": "hid",
    "read": "read", "sell": "sold", "sing": "sang", "wake": "woke", "write": "wrote",
    "hum": "hummed", "scrub": "scrubbed", "stir": "stirred", "wrap": "wrapped",
}  # fmt: skip

_SUBJECTS = {  # singular -> plural, possessive of the singular, topic
    entry.split("/")[0]: (*entry.split("/")[1:], name) for name, topic in TOPICS.items() for entry in topic.subjects
}
_ACTIONS = {
    name: {verb: tuple(objects.split()) for verb, objects in {**topic.actions, **SHARED_ACTIONS}.items()}
    for name, topic in TOPICS.items()
}


def _distinct(values: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


# Every factor of a sentence and the values that it takes. `render` says which values go together.
FACTORS: dict[str, tuple[str, ...]] = {
    "topic": tuple(TOPICS),
    "subject": tuple(_SUBJECTS),
    "number": ("singular", "plural"),
    "adjective": ("none", "kind", "tall", "tired", "clever", "brave", "busy", "friendly", "shy"),
    "origin": ("none", "from the village", "from the city", "from the north", "from the mountains"),
    "tense": tuple(TIMES),
    "negation": ("affirmative", "negative"),
    "verb": _distinct(verb for actions in _ACTIONS.values() for verb in actions),
    "object": _distinct(thing for actions in _ACTIONS.values() for things in actions.values() for thing in things),
    "manner": ("carefully", "slowly", "quickly", "quietly", "happily", "patiently", "calmly", "proudly"),
    "place": _distinct(place for topic in TOPICS.values() for place in topic.places),
    "company": ("none", "alone", "friends", "cousins", "neighbours", "brothers", "sisters"),
    "time": _distinct(time for times in TIMES.values() for time in times),
    "time_position": ("front", "end"),
}
_FREE = ("number", "adjective", "origin", "negation", "manner", "company", "time_position")  # go with everything


def _grammar_size() -> int:
    size = 0
    for name, topic in TOPICS.items():
        size += len(topic.subjects) * sum(map(len, _ACTIONS[name].values())) * len(topic.places)
    for factor in (*_FREE, "time"):  # a time has exactly one tense, so the two count once
        size *= len(FACTORS[factor])
    return size


# The exact number of sentences: `render` gives every valid combination of factors a sentence of its own.
GRAMMAR_SIZE = _grammar_size()


def render(factors: Mapping[str, str]) -> str:
    """The sentence of one combination of factors: lower-case words separated by single blanks, " ." at the end.

    Args:
        factors: one value for each name in `FACTORS`. The subject and the place belong to the topic, the verb is one
            of the topic's, the object is one of the verb's, the time is one of the tense's.

    Raises:
        InputError: a factor is missing, unknown, or does not go with the others.
    """
    _validate(factors)
    return _words(factors)


def _words(factors: Mapping[str, str]) -> str:
    plural_noun, possessive, _ = _SUBJECTS[factors["subject"]]
    plural = factors["number"] == "plural"
    noun, possessive = (plural_noun, "their") if plural else (factors["subject"], possessive)
    reflexive = {"his": "himself", "her": "herself", "their": "themselves"}[possessive]
    companions = f"with {possessive} {factors['company']}"
    parts = (
        factors["time"] if factors["time_position"] == "front" else "",
        "the",
        factors["adjective"].replace("none", ""),
        noun,
        factors["origin"].replace("none", ""),
        _verb_phrase(factors["verb"], factors["tense"], plural, factors["negation"] == "negative"),
        "the",
        factors["object"],
        factors["manner"],
        factors["place"],
        {"none": "", "alone": f"by {reflexive}"}.get(factors["company"], companions),
        factors["time"] if factors["time_position"] == "end" else "",
        ".",
    )
    return " ".join(part for part in parts if part)


def _validate(factors: Mapping[str, str]) -> None:
    if factors.keys() != FACTORS.keys():
        names = ", ".join(sorted(factors.keys() ^ FACTORS.keys()))
        raise InputError(f"factors are missing or unknown ({names}): give a value for each of {', '.join(FACTORS)}")
    for name, value in factors.items():
        if value not in FACTORS[name]:
            raise InputError(f"{name}={value!r} is unknown: give one of {', '.join(FACTORS[name])}")
    topic, verb = factors["topic"], factors["verb"]
    fits = {
        "subject": tuple(noun for noun, (_, _, of) in _SUBJECTS.items() if of == topic),
        "verb": tuple(_ACTIONS[topic]),
        "object": _ACTIONS[topic].get(verb, ()),
        "place": TOPICS[topic].places,
        "time": TIMES[factors["tense"]],
    }
    for name, values in fits.items():
        if factors[name] not in values:
            known = ", ".join(values)
            raise InputError(f"{name}={factors[name]!r} does not go with the other factors: give one of {known}")


@cache
def _verb_phrase(verb: str, tense: str, plural: bool, negative: bool) -> str:
    if tense == "future":
        return f"will not {verb}" if negative else f"will {verb}"
    if negative:
        auxiliary = "did" if tense == "past" else "do" if plural else "does"
        return f"{auxiliary} not {verb}"
    if tense == "past":
        regular = verb + "d" if verb.endswith("e") else re.sub(r"([^aeiou])y$", r"\1i", verb) + "ed"
        return _PAST.get(verb, regular)
    if plural:
        return verb
    third = re.sub(r"([^aeiou])y$", r"\1ie", verb)
    return third + ("es" if re.search(r"(s|x|z|ch|sh)$", third) else "s")


def sentences(count: int | None = None, seed: int = 0) -> Iterator[Document]:
    """Distinct sentences of the grammar with their factors, drawn at random (topic first, all choices uniform).

    The draws use nothing but `random.Random(seed).random()`, whose sequence Python keeps over versions and platforms.

    Args:
        count: how many, by default 100,000; there are `GRAMMAR_SIZE`.
        seed: another seed gives other sentences; the same one gives the same, and a smaller count their beginning.
    """
    count = DEFAULT_SENTENCES if count is None else count
    if not 0 < count <= GRAMMAR_SIZE:
        raise InputError(f"count={count} is impossible: give a number of sentences from 1 to {GRAMMAR_SIZE}")
    return islice(_draw_distinct(random.Random(seed)), count)


def _draw_distinct(rng: random.Random) -> Iterator[Document]:
    def choose(values: tuple[str, ...]) -> str:
        return values[int(rng.random() * len(values))]

    seen = set()
    while True:
        topic = choose(FACTORS["topic"])
        verb = choose(tuple(_ACTIONS[topic]))
        tense = choose(FACTORS["tense"])
        drawn = {
            "topic": topic,
            "subject": choose(TOPICS[topic].subjects).split("/")[0],
            "verb": verb,
            "object": choose(_ACTIONS[topic][verb]),
            "place": choose(TOPICS[topic].places),
            "tense": tense,
            "time": choose(TIMES[tense]),
        }
        drawn |= {name: choose(FACTORS[name]) for name in _FREE}
        factors = {name: drawn[name] for name in FACTORS}
        text = _words(factors)  # valid as drawn
        if text not in seen:
            seen.add(text)
            yield Document(text, factors)


def stories(count: int | None = None, seed: int = 0) -> Iterator[Document]:
    """Distinct stories of three sentences about one subject, with the factors that hold through the story.

    Subject, number, adjective, manner, place and tense return in each sentence, further apart than a short attention
    window reaches, so a model with one has something to gain from a latent. Drawn as `sentences` are.

    Args:
        count: how many, by default 100,000.
        seed: another seed gives other stories.
    """
    count = DEFAULT_SENTENCES if count is None else count
    if count < 1:
        raise InputError(f"count={count} is impossible: give a number of stories, at least 1")
    return islice(_draw_stories(random.Random(seed)), count)


STORY_FACTORS = ("topic", "subject", "number", "adjective", "manner", "place", "tense", "company")


def _draw_stories(rng: random.Random) -> Iterator[Document]:
    def choose(values: tuple[str, ...]) -> str:
        return values[int(rng.random() * len(values))]

    def named(name: str) -> str:
        return choose(tuple(value for value in FACTORS[name] if value != "none"))

    seen = set()
    while True:
        topic, tense = choose(FACTORS["topic"]), choose(FACTORS["tense"])
        story = {
            "topic": topic,
            "subject": choose(TOPICS[topic].subjects).split("/")[0],
            "place": choose(TOPICS[topic].places),
            "tense": tense,
            "negation": "affirmative",
            "time_position": "front",
        }
        story |= {name: choose(FACTORS[name]) for name in ("number", "manner")}
        story |= {name: named(name) for name in ("adjective", "origin", "company")}
        openings = (
            {"time": choose(TIMES[tense]), "company": "none"},
            {"time": "then", "origin": "none", "company": "none"},
            {"time": "later", "origin": "none"},
        )
        lines = []
        for opening in openings:
            verb = choose(tuple(_ACTIONS[topic]))
            lines.append(_words(story | opening | {"verb": verb, "object": choose(_ACTIONS[topic][verb])}))
        text = " ".join(lines)
        if text not in seen:
            seen.add(text)
            yield Document(text, {name: story[name] for name in STORY_FACTORS})


def python_docs() -> Iterator[Document]:
    """The language reference that `help("topics")` shows: about 80 documents, half a million characters.

    It comes with Python, so its text depends on the version of Python. Lines of prose are joined to one line per
    paragraph; code, tables and headings keep their lines.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError("this Python comes without its documentation: give a file instead of python-docs") from error
    return (Document(_unwrap(text).strip()) for _, text in sorted(topics.items()) if text.strip())


def _unwrap(text: str) -> str:
    """Joins lines that were broken because the next word did not fit into 70 columns.

    Only such a break says that the line is prose: lines of code and of grammar rules end before the margin.
    """
    joined: list[str] = []
    previous, margin = "", 0
    for line in text.split("\n"):
        bullet = re.match(r" *(?:[*+-] |\d+\. )? *", line)
        body = line.strip()
        indent = len(line) - len(line.lstrip())
        next_word = re.match(r"[^\s-]*-(?=\w)|\S*", body)
        assert bullet and next_word  # both patterns match every line
        is_table = body.startswith(("|", "+--", "+==")) or (body and not re.search(r"\w", body))
        fits = len(previous.rstrip()) + 1 + len(next_word[0]) <= _WRAP_WIDTH
        if body and previous.strip() and indent == margin and not fits and not is_table:
            # A word broken at its own hyphen is put together again.
            joined[-1] += body if re.search(r"\w-$", joined[-1]) else " " + body
        else:
            joined.append(line.rstrip())
            margin = len(bullet[0])
        previous = "" if is_table else line
    return "\n".join(joined)


BUILTIN: dict[str, Callable[[], Iterator[Document]]] = {
    "python-docs": python_docs,
    "sentences": sentences,
    "stories": stories,
}
