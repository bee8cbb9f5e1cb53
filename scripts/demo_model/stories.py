"""Short stories, and requests for them that the story then honours."""

from . import lexicon as words
from .grammar import article, expand
from .plots import ENDINGS, OPENINGS, PLOTS

_FEARS = ["the dark", "thunder", "deep water", "high places", "big dogs", "loud noises", "the old bridge"]
_PROJECTS = ["tree house", "raft", "bird house", "bridge", "little cart", "snow castle", "swing", "windmill"]
_SMALL = ["ant", "bee", "beetle", "little bird", "butterfly", "ladybird", "tiny mouse"]
_PLANTS = ["sunflower as tall as a house", "rose bush", "little apple tree", "big round pumpkin", "blue flower"]
_GIRL, _BOY = ("she", "her", "her"), ("he", "him", "his")


def _character(rng, kind=None):
    """(name, kind, pronouns, home)"""
    if kind is None:
        kind = rng.choice(["girl", "boy"]) if rng.random() < 0.3 else rng.choice(list(words.STORY_ANIMALS))
    if kind == "girl":
        return rng.choice(words.GIRLS), kind, _GIRL, "a small house"
    if kind == "boy":
        return rng.choice(words.BOYS), kind, _BOY, "a small house"
    name = words.invented_name(rng) if rng.random() < 0.03 else rng.choice(words.PET_NAMES)
    return name, kind, _GIRL if rng.random() < 0.5 else _BOY, words.STORY_ANIMALS[kind]


def make_context(rng):
    """Who, where and what: every slot that a plot may name."""
    hero, kind, (he, him, his), home = _character(rng)
    while True:
        friend, fkind, (fhe, fhim, fhis), _ = _character(rng)
        if friend != hero and fkind != kind:
            break
    place = rng.choice(list(words.PLACES))
    where, spots = words.PLACES[place]
    toy, colour, trait = rng.choice(words.TOYS), rng.choice(words.COLOURS), rng.choice(words.TRAITS)
    project, small = rng.choice(_PROJECTS), rng.choice(_SMALL)
    return {
        "hero": hero, "kind": kind, "he": he, "him": him, "his": his, "home": home, "trait": trait,
        "friend": friend, "fkind": fkind, "fhe": fhe, "fhim": fhim, "fhis": fhis,
        "a_kind": article(kind), "a_fkind": article(fkind), "a_trait_kind": article(f"{trait} {kind}"),
        "place": place, "where": where, "spot": rng.choice(spots), "toy": toy, "colour": colour,
        "thing": f"{colour} {toy}", "a_thing": article(f"{colour} {toy}"), "a_toy": article(toy),
        "weather": rng.choice(words.WEATHER), "time": rng.choice(words.TIMES), "treat": rng.choice(words.TREATS),
        "parent": rng.choice([f"{his} mother", f"{his} father", f"{his} grandmother", f"{his} grandfather"]),
        "fear": rng.choice(_FEARS), "project": project, "a_project": article(project),
        "the_project": f"the {project}", "small": small, "a_small": article(small),
        "a_plant": article(rng.choice(_PLANTS)), "they_not": rng.choice(["it was not", "nobody knew it"]),
    }


def write(rng, context, plot):
    """The story of `plot` with everything in `context`."""
    _, paragraphs, morals = PLOTS[plot]
    moral = rng.choice(morals)
    context = dict(context, moral=moral, moral_low=moral[0].lower() + moral[1:])
    texts = [" ".join(expand(sentence, rng, context) for sentence in paragraph) for paragraph in paragraphs]
    texts[0] = f"{expand(rng.choice(OPENINGS), rng, context)} {texts[0]}"
    ending = expand(rng.choice(ENDINGS), rng, context)
    if ending:
        texts[-1] = f"{texts[-1]} {ending}"
    return ("\n\n" if rng.random() < 0.7 else " ").join(texts)


def plain(rng):
    """A story as plain text, for completions; some have a title."""
    plot = rng.choice(list(PLOTS))
    context = make_context(rng)
    story = write(rng, context, plot)
    if rng.random() < 0.2:
        title = expand("[{hero} and {friend}|{hero} the {kind}|The {kind} and the {fkind}|{hero}'s {time}]", rng, context)
        story = f"{title.title()}\n\n{story}".replace("'S ", "'s ")
    return story


# Which request may go with which plots: a story about a toy needs a plot that has one.
_WITH_TOY = ["lost", "share", "return", "honest", "newcomer", "rain"]
_ANY_REQUESTS = [
    "{ask} a [short |little |]story about {a_kind}.",
    "{ask} a [short |little |]story about {a_kind} named {hero}.",
    "{ask} a [short |]story about {hero} the {kind}.",
    "{ask} a story about {a_kind} and {a_fkind}.",
    "{ask} a story about {hero} and {friend}.",
    "{ask} a story about {a_trait_kind}[ named {hero}|].",
    "{ask} a story [that happens|set] {where}.",
    "{ask} a story about {a_kind} {where}.",
    "{ask} a story.",
    "{ask} a story about {hero} the {kind} and {friend} the {fkind}.",
]
_TOY_REQUESTS = [
    "{ask} a story about {a_kind} and {a_thing}.",
    "{ask} a story with {a_toy} in it.",
    "{ask} a story about {hero} the {kind} and {a_thing}.",
    "{ask} a story about {a_thing}.",
]
_ASK = "[Tell me|Please tell me|Write|Write me|Can you tell me|I would like|Could you write|Make up]"


def request(rng):
    """(what the user asks, the story that answers it)"""
    context = make_context(rng)
    ask = expand(_ASK, rng)
    question = ask.startswith(("Can", "Could"))
    context["ask"] = ask
    draw = rng.random()
    if draw < 0.2:
        plot = rng.choice(_WITH_TOY)
        template = rng.choice(_TOY_REQUESTS)
    elif draw < 0.4:
        plot = rng.choice(list(PLOTS))
        template = "{ask} a story about " + rng.choice(PLOTS[plot][0]) + "."
        if rng.random() < 0.3:
            template = template[:-1] + " with {a_kind}."
        if plot == "sleep" and rng.random() < 0.5:
            template = "{ask} a bedtime story[| about {a_kind}]."
    else:
        plot = rng.choice(list(PLOTS))
        template = rng.choice(_ANY_REQUESTS)
    text = expand(template, rng, context)
    if question:
        text = text[:-1] + "?"
    elif rng.random() < 0.08:
        text = text[:-1]
    return text, write(rng, context, plot)


def poem(rng):
    """(request, four rhyming lines)"""
    subject, lines = rng.choice(_POEMS)
    text = expand(f"[Write|Tell me|Can you write|I would like] a [short |little |]poem about {subject}.", rng)
    if text.startswith("Can"):
        text = text[:-1] + "?"
    return text, "\n".join(expand(line, rng) for line in lines)


_POEMS = [
    ("the rain", ["The rain comes [down upon|dancing on|down along] the street,", "it [taps|drums] a song with tiny feet.",
                  "It fills the [pond|stream], it wakes the [tree|grass],", "and writes its name [upon the glass|on window glass]."]),
    ("the moon", ["The moon looks [down|in] with silver light,", "and keeps us company at night.",
                  "It [sails|drifts] above the [sleeping|quiet] hill,", "and all the world is [soft and|calm and] still."]),
    ("a cat", ["My [little|sleepy] cat lies in the sun,", "[her work|the day] is short, her play is done.",
               "She [dreams|thinks] of [fish|milk] and [dreams|thinks] of me,", "as happy as a cat can be."]),
    ("spring", ["The [snow|ice] is gone, the [birds|larks] are here,", "the [sweetest|brightest] time of all the year.",
                "The [flowers|meadows] wake, the skies are blue,", "and every [leaf|day] is [fresh|bright] and new."]),
    ("the sea", ["The sea is wide, the sea is deep,", "it [sings|rocks] the little [boats|fish] to sleep.",
                 "The waves roll in, the waves roll out,", "and [gulls|white birds] fly [up and round|round and round] about."]),
    ("the sun", ["The sun gets up and paints the sky,", "it [smiles|shines] on [all|clouds] that [wander|travel] by.",
                 "It warms the [field|stone], it warms the sea,", "and then it [shines|smiles] on you and me."]),
    ("a tree", ["A tree stands [tall|still] beside the lane,", "it drinks the sun, it drinks the rain.",
                "It gives the [birds|owls] a [home|place] to stay,", "and whispers [softly|gently] through the day."]),
    ("a friend", ["A friend is [someone|somebody] [good|kind] and true,", "who [laughs|walks] and [cries|sings] along with you.",
                  "When days are dark, when days are long,", "a friend can turn them to a song."]),
    ("the stars", ["The stars come out when day is done,", "I count them slowly, one by one.",
                   "They [shine|glow] above the [roofs|trees] so high,", "like little lanterns in the sky."]),
    ("winter", ["The winter [comes|walks] on quiet feet,", "and lays its white on every street.",
                "The [children|foxes] play, the [windows|candles] glow,", "and all is hushed beneath the snow."]),
]
