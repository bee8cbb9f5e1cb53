"""Simple questions and answers: (question, answer in a whole sentence, answer in a word or two)."""

from . import facts
from . import lexicon as words
from .grammar import article, expand, join_words

_DAYS, _MONTHS = words.ORDERED["days of the week"], words.ORDERED["months of the year"]


def _pick(rng, table):
    key = rng.choice(list(table))
    return key, table[key]


def _fill(rng, question, answer, short, **context):
    return expand(question, rng, context), expand(answer, rng, context), expand(str(short), rng, context)


def capital(rng):
    country, city = _pick(rng, facts.CAPITALS)
    if rng.random() < 0.75:
        return _fill(rng, "[What is the capital of {c}|Which city is the capital of {c}|What's the capital of {c}|Tell me the capital of {c}|Name the capital of {c}]?",
                     "The capital of {c} is {x}.", "{x}", c=country, x=city.rstrip("."))
    return _fill(rng, "[{x} is the capital of which country|Which country has the capital {x}]?", "{x} is the capital of {c}.", "{c}", c=country, x=city)


def continent(rng):
    name, countries = _pick(rng, facts.CONTINENTS)
    country = rng.choice(countries)
    return _fill(rng, "[On which continent is {c}|Where is {c}|Which continent is {c} on]?", "{^c} is in {k}.", "{k}", c=country, k=name)


def animal(rng):
    name, (sound, young, legs, home, food, group) = _pick(rng, facts.ANIMALS)
    context = {"x": name, "a": article(name)}
    many = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "fox": "foxes"}.get(name, name + "s")
    question, answer, short = rng.choice([
        ("[What sound does {a} make|What does {a} say|How does {a} sound]?", "{^a} says \"{s}\".", "{s}"),
        ("[What is a baby {x} called|What do you call a young {x}|What do we call a baby {x}]?", "A baby {x} is called {y}.", "{z}"),
        ("[How many legs does {a} have|How many legs has {a}]?", "{^a} has {n} legs.", "{n}"),
        ("Where [do {m} live|does {a} live]?", "{^m} live {h}.", "{h}"),
        ("What [do {m} eat|does {a} eat]?", "{^m} eat {f}.", "{f}"),
        ("[What kind of animal is {a}|Is {a} a mammal, a bird or something else]?", "{^a} is {g}.", "{k}"),
    ])
    return _fill(rng, question, answer, short, m=many, s=sound, y=article(young), z=young, n=legs if legs != "0" else "no",
                 h=home, f=food, g=article(group), k=group, **context)


def ability(rng):
    name, (fly, swim, legs) = _pick(rng, facts.ABILITIES)
    a, draw = article(name), rng.random()
    if draw < 0.4:
        return _fill(rng, "Can {a} fly?", "Yes, {a} can fly." if fly else "No, {a} cannot fly.", "Yes" if fly else "No", a=a)
    if draw < 0.7:
        return _fill(rng, "Can {a} swim?", "Yes, {a} can swim[ very well|]." if swim else "No, {a} does not live in water.",
                     "Yes" if swim else "No", a=a)
    return _fill(rng, "How many legs does {a} have?", "{^a} has {n} legs.", "{n}", a=a, n=legs or "no")


def scale(rng):
    table, more, less = rng.choice([(facts.SIZES, "bigger", "smaller"), (facts.SPEEDS, "faster", "slower")])
    i, j = rng.sample(range(len(table)), 2)
    context = {"p": table[i], "q": table[j], "hi": table[max(i, j)], "lo": table[min(i, j)], "more": more, "less": less}
    if rng.random() < 0.5:
        return _fill(rng, "[Which|What] is {more}, {p} or {q}?", "{^hi} is {more} than {lo}.", "{hi}", **context)
    if rng.random() < 0.5:
        return _fill(rng, "Is {p} {more} than {q}?", "Yes, {p} is {more} than {q}." if i > j else "No, {p} is {less} than {q}.",
                     "Yes" if i > j else "No", **context)
    return _fill(rng, "[Which|What] is {less}, {p} or {q}?", "{^lo} is {less} than {hi}.", "{lo}", **context)


def colour(rng):
    if rng.random() < 0.3:
        (a, b), mixed = _pick(rng, facts.MIXES)
        if rng.random() < 0.5:
            a, b = b, a
        return _fill(rng, "[What colour do you get if you mix {a} and {b}|What do {a} and {b} make|Which colour do {a} and {b} make together]?",
                     "{^a} and {b} make {c}.", "{c}", a=a, b=b, c=mixed)
    thing, tint = _pick(rng, facts.COLOURS_OF)
    return _fill(rng, "[What|Which] [colour|color] is {t}?", "{^t} is {c}.", "{c}", t=thing, c=tint)


def calendar(rng):
    names = _DAYS if rng.random() < 0.5 else _MONTHS
    unit = "day" if names is _DAYS else "month"
    i = rng.randrange(len(names))
    context = {"d": names[i], "next": names[(i + 1) % len(names)], "prev": names[i - 1], "unit": unit}
    draw = rng.random()
    if draw < 0.4:
        return _fill(rng, "[What|Which] {unit} comes after {d}?", "{next} comes after {d}.", "{next}", **context)
    if draw < 0.7:
        return _fill(rng, "[What|Which] {unit} comes before {d}?", "{prev} comes before {d}.", "{prev}", **context)
    if names is _DAYS:
        if draw < 0.85:
            return _fill(rng, "If today is {d}, what day is tomorrow?", "If today is {d}, tomorrow is {next}.", "{next}", **context)
        return _fill(rng, "Is {d} a weekday?", "No, {d} is part of the weekend." if i > 4 else "Yes, {d} is a weekday.",
                     "No" if i > 4 else "Yes", **context)
    season = words.ORDERED["seasons"][((i - 2) % 12) // 3]
    return _fill(rng, "[In which|What] season is {d}[| in the north]?", "In the north, {d} is in {s}.", "{s}", s=season, **context)


def vocabulary(rng):
    draw = rng.random()
    if draw < 0.5:
        a, b = _pick(rng, facts.OPPOSITES)
        return _fill(rng, "[What is the opposite of {a}|What's the opposite of {a}|Give me the opposite of {a}|Name the opposite of \"{a}\"]?",
                     "The opposite of {a} is {b}.", "{b}", a=a, b=b)
    if draw < 0.66:
        a, b = _pick(rng, facts.SYNONYMS)
        return _fill(rng, "[What is another word for {a}|Give me another word for {a}|What is a synonym of {a}]?",
                     "Another word for {a} is {b}.", "{b}", a=a, b=b)
    if draw < 0.83:
        a, b = _pick(rng, facts.PLURALS)
        return _fill(rng, "[What is the plural of {a}|Give me the plural of {a}]?", "The plural of {a} is {b}.", "{b}", a=a, b=b)
    a, b = _pick(rng, facts.PASTS)
    return _fill(rng, "[What is the past tense of {a}|What is the past of \"{a}\"]?", "The past tense of {a} is {b}.", "{b}", a=a, b=b)


def quantity(rng):
    if rng.random() < 0.2:
        shape, sides = _pick(rng, facts.SHAPES)
        return _fill(rng, "How many [sides|corners] does {a} have?", "{^a} has {n} sides and {n} corners.", "{n}", a=article(shape), n=sides)
    many, whole, number = rng.choice(facts.UNITS)
    return _fill(rng, "How many {m} [are there in|are in] {w}?", "There are {n} {m} in {w}.", "{n}",
                 m=many, w=whole, n=number)


def translation(rng):
    language, table = _pick(rng, facts.TRANSLATIONS)
    english, foreign = _pick(rng, table)
    return _fill(rng, "[How do you say \"{e}\" in {l}|What is \"{e}\" in {l}|Translate \"{e}\" into {l}|What is the {l} word for {e}]?",
                 "In {l}, \"{e}\" is \"{f}\".", "{f}", e=english, l=language, f=foreign)


def emoji(rng):
    thing, sign = _pick(rng, facts.EMOJI)
    return _fill(rng, "[Show me|Give me|Write] [the|a] {t} emoji.", "[Here is {a}: {s}|Here you are: {s}]", "{s}", t=thing, s=sign, a=article(thing))


def letters(rng):
    word = rng.choice(words.FOODS + words.TOYS[:20] + list(facts.ANIMALS))
    context = {"w": word, "f": word[0], "l": word[-1], "n": len(word), "s": "-".join(word)}
    return _fill(rng, *rng.choice([
        ("[How do you spell {w}|Spell the word {w}|Spell \"{w}\"]?", "{^w} is spelled {s}.", "{s}"),
        ("[What|Which] is the first letter of {w}?", "The first letter of {w} is {f}.", "{f}"),
        ("[What|Which] is the last letter of {w}?", "The last letter of {w} is {l}.", "{l}"),
        ("How many letters are [there |]in the word {w}?", "The word {w} has {n} letters.", "{n}"),
    ]), **context)


_SINGULAR = {"fruits": "a fruit", "vegetables": "a vegetable", "birds": "a bird", "insects": "an insect", "tools": "a tool",
             "vehicles": "a vehicle", "flowers": "a flower", "musical instruments": "a musical instrument"}


def membership(rng):
    kind, other = rng.sample(list(_SINGULAR), 2)
    a = article(rng.choice(words.KINDS[kind]))
    if rng.random() < 0.5:
        return _fill(rng, "Is {a} {k}?", "Yes, {a} is {k}.", "Yes", a=a, k=_SINGULAR[kind])
    return _fill(rng, "Is {a} {w}?", "No, {a} is {k}.", "No", a=a, k=_SINGULAR[kind], w=_SINGULAR[other])


def odd_one_out(rng):
    kind, other = rng.sample(["fruits", "birds", "tools", "musical instruments", "vehicles", "clothes", "drinks"], 2)
    group, odd = rng.sample(words.KINDS[kind], 3), rng.choice(words.KINDS[other])
    shown = group + [odd]
    rng.shuffle(shown)
    return _fill(rng, "[Which word does not belong|Which is the odd one out]: {s}?", "{^o} does not belong, because the others are {k}.", "{o}",
                 s=join_words(shown), o=odd, k=kind)


def plain(rng):
    question, answer = rng.choice(facts.PLAIN)
    return _fill(rng, question, answer, answer)


def explanation(rng):
    """(question, two or three sentences)"""
    question, answer = rng.choice(facts.EXPLANATIONS)
    return expand(question, rng), answer


_KINDS = [capital, capital, continent, animal, animal, ability, scale, colour, calendar, calendar, vocabulary, vocabulary,
          quantity, translation, emoji, letters, membership, odd_one_out, plain, plain]


def question(rng):
    """(question, sentence, word or two)"""
    asked, sentence, short = rng.choice(_KINDS)(rng)
    if asked.startswith(("Tell", "Name", "Give", "Translate", "Spell")) and asked.endswith("?"):
        asked = asked[:-1] + "."
    if rng.random() < 0.05:
        asked = asked[0].lower() + asked[1:]
    if rng.random() < 0.05:
        asked = asked.rstrip("?.")
    return asked, sentence, short
