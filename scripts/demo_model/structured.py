"""Answers with a form: JSON, lists, and copies of what the user wrote."""

import json

from . import facts
from . import lexicon as words
from .grammar import expand, join_words

_CITIES = [city for city in facts.CAPITALS.values() if "," not in city]

# field -> a value for it
_FIELDS = {
    "name": words.any_name,
    "age": lambda rng: rng.randint(1, 99),
    "city": lambda rng: rng.choice(_CITIES),
    "country": lambda rng: rng.choice(list(facts.CAPITALS)).replace("the ", ""),
    "job": lambda rng: rng.choice(words.JOBS_SHORT),
    "colour": lambda rng: rng.choice(words.COLOURS),
    "animal": lambda rng: rng.choice(list(words.STORY_ANIMALS)),
    "hobby": lambda rng: rng.choice(words.HOBBIES),
    "food": lambda rng: rng.choice(words.FOODS),
    "item": lambda rng: rng.choice(words.TOYS),
    "price": lambda rng: rng.randint(1, 99),
    "quantity": lambda rng: rng.randint(1, 20),
    "day": lambda rng: rng.choice(words.ORDERED["days of the week"]),
    "month": lambda rng: rng.choice(words.ORDERED["months of the year"]),
    "happy": lambda rng: rng.random() < 0.5,
    "active": lambda rng: rng.random() < 0.5,
    "score": lambda rng: rng.randint(0, 100),
    "id": lambda rng: rng.randint(1, 999),
}
_GROUPS = [
    ("a person", ["name", "age", "city", "country", "job", "hobby", "happy"]),
    ("an order", ["item", "price", "quantity", "day", "id"]),
    ("a pet", ["name", "animal", "age", "colour", "food"]),
    ("a player", ["name", "score", "active", "country"]),
    ("a product", ["item", "colour", "price", "id"]),
]


def _dump(value, rng):
    return json.dumps(value, ensure_ascii=False, indent=2 if rng.random() < 0.05 else None)


def _object(rng, at_most=4):
    group, fields = rng.choice(_GROUPS)
    chosen = rng.sample(fields, rng.randint(2, min(at_most, len(fields))))
    if "name" in chosen:
        chosen.sort(key=lambda field: field != "name")
    return group, {field: _FIELDS[field](rng) for field in chosen}


def json_invented(rng):
    """Only the field names are given."""
    group, value = _object(rng)
    context = {"fields": join_words(value), "group": group, "of": rng.choice([f" for {group}", f" that describes {group}", ""])}
    return expand("[Give me|Write|Make|Create|Return|I need] [a JSON object|JSON|a small JSON object]{of} with [the fields |the keys |]{fields}.",
                  rng, context), _dump(value, rng)


def json_given(rng):
    """Fields and values are given and have to be copied."""
    _, value = _object(rng)
    pairs = [f"{field} {str(given).lower() if isinstance(given, bool) else given}" for field, given in value.items()]
    return expand("[Give me|Write|Make|Create|Return] [a JSON object|JSON] with {pairs}.", rng, {"pairs": join_words(pairs)}), _dump(value, rng)


def json_extracted(rng):
    """The values stand in a sentence."""
    name, (he, _, his) = words.person(rng)
    if rng.random() < 0.25:
        name = words.invented_name(rng)
    context = {"name": name, "he": he, "his": his, **{f: make(rng) for f, make in _FIELDS.items() if f != "name"}}
    sentence, fields = rng.choice([
        ("{name} is {age} years old and lives in {city}.", ["name", "age", "city"]),
        ("{name} lives in {city} and works as a {job}.", ["name", "city", "job"]),
        ("{name}, who is {age}, likes {hobby}.", ["name", "age", "hobby"]),
        ("My name is {name} and I am {age} years old.", ["name", "age"]),
        ("{name} bought {quantity} of the {colour} [balls|hats|cups] for {price} euros.", ["name", "quantity", "colour", "price"]),
        ("On {day}, {name} [goes|travels] to {city}.", ["day", "name", "city"]),
        ("{name} has a {animal} and {his} favourite colour is {colour}.", ["name", "animal", "colour"]),
        ("{name} from {city} has {score} points.", ["name", "city", "score"]),
    ])
    context["sentence"] = expand(sentence, rng, context)
    if rng.random() < 0.3:
        fields = rng.sample(fields, 2)
    context["fields"] = join_words(fields)
    request = expand("[Extract {fields} as JSON|Turn this into JSON with {fields}|Give me {fields} as JSON|Write {fields} as a JSON object]: {sentence}", rng, context)
    return request, _dump({field: context[field] for field in fields}, rng)


def json_array(rng):
    kind = rng.choice(list(words.KINDS))
    number = rng.randint(2, 5)
    members = rng.sample(words.KINDS[kind], number)
    if rng.random() < 0.2:
        key = kind.split()[-1]
        return expand("Give me a JSON object with the key {key} and {n} {kind} in an array.", rng,
                      {"key": key, "n": words.NUMBER_WORDS[number], "kind": kind}), _dump({key: members}, rng)
    context = {"n": rng.choice([words.NUMBER_WORDS[number], number]), "kind": kind}
    return expand("[Give me|Write|Return|I need] a JSON [array|list] [of|with] {n} {kind}.", rng, context), json.dumps(members)


def json_people(rng):
    number = rng.randint(2, 3)
    people = [{"name": words.any_name(rng), "age": rng.randint(1, 99)} for _ in range(number)]
    return expand("[Give me|Write|Make] a JSON array [of|with] {n} people, each with name and age.", rng,
                  {"n": words.NUMBER_WORDS[number]}), json.dumps(people)


def listing(rng):
    """Some members of a kind, in the form that was asked for."""
    if rng.random() < 0.3:
        kind, members = rng.choice(list(words.ORDERED.items()))
        request = expand("[List|Name|What are|Tell me] the {kind}", rng, {"kind": kind})
    else:
        kind = rng.choice(list(words.KINDS))
        number = rng.randint(2, min(7, len(words.KINDS[kind])))
        members = rng.sample(words.KINDS[kind], number)
        context = {"n": words.NUMBER_WORDS[number] if rng.random() < 0.7 else number, "kind": kind}
        request = expand("[List|Name|Give me|Tell me|Can you name|Write down] {n} {kind}", rng, context)
    end = "?" if request.startswith(("What", "Can")) else "."
    form = rng.random()
    if form < 0.35:
        numbered = "\n".join(f"{i}. {member}" for i, member in enumerate(members, 1))
        return request + expand("[ as a numbered list| in a numbered list|, numbered]", rng) + end, numbered
    if form < 0.55:
        return request + expand("[ as a bullet list| with bullets| as bullet points]", rng) + end, "\n".join(f"- {m}" for m in members)
    if form < 0.7:
        return request + expand("[, separated by commas| separated by commas| in one line with commas]", rng) + end, ", ".join(members)
    text = join_words(members)
    return request + end, f"{text[0].upper()}{text[1:]}."


def copying(rng):
    """Repeat, count out or rearrange the user's own words."""
    pool = words.FOODS + words.TOYS + words.COLOURS + list(facts.ANIMALS)
    chosen = rng.sample(pool, rng.randint(2, 5))
    if rng.random() < 0.3:
        chosen[0] = words.invented_name(rng).lower()
    shown, times = " ".join(chosen[:3]), rng.randint(2, 5)
    context = {"s": shown, "w": chosen[0], "n": words.NUMBER_WORDS[times], "l": ", ".join(chosen)}
    request, answer = rng.choice([
        ("[Repeat after me|Say this|Please repeat]: {s}", shown),
        ("[Say|Write] {w} {n} times.", " ".join([chosen[0]] * times)),
        ("[Reverse this list|Write this list backwards]: {l}", ", ".join(reversed(chosen))),
        ("[Sort these words by the alphabet|Put these words in alphabetical order]: {l}", ", ".join(sorted(chosen))),
        ("[What is the first word of|Which word comes first in]: {s}?", f"The first word is {chosen[0]}."),
        ("[What is the last word of|Which word comes last in]: {s}?", f"The last word is {chosen[:3][-1]}."),
        ("How many words are in this list: {l}?", f"There are {len(chosen)} words in the list."),
        ("[Write in capital letters|Write in upper case]: {s}", shown.upper()),
    ])
    return expand(request, rng, context), answer


_JSON = [json_invented, json_invented, json_given, json_given, json_extracted, json_extracted, json_array, json_people]


def json_question(rng):
    """(request, valid JSON)"""
    return rng.choice(_JSON)(rng)
