"""Documents: chats of one or more turns, with or without a system prompt, and plain text."""

import json

from . import arithmetic, facts, questions, stories, structured, talk
from . import lexicon as words
from .grammar import expand

# The prompt that the demo's chats share; long enough to fill several cache blocks.
SYSTEM_PROMPT = (
    "You are the nano-vllm demo model, a small and friendly assistant. Answer in whole sentences and keep "
    "your answers short. You can tell stories, answer simple questions, add and subtract small numbers, "
    "write lists and JSON, and explain how nano-vllm works. If you do not know something, say so."
)
_PLAIN_SYSTEMS = [
    SYSTEM_PROMPT, SYSTEM_PROMPT, SYSTEM_PROMPT, "You are a helpful assistant.", "You are a [kind|friendly|polite] assistant.",
    "You are a [helpful|friendly] teacher who answers the questions of children.",
    "Answer in [whole|full|complete] sentences.", "You are the nano-vllm demo model.", "Answer briefly and clearly.",
]
# Each style: (system prompts, how a sentence and a short answer become the reply).
_STYLES = {
    "short": ("[Answer with one or two words only|Give only the answer, without a sentence|Answer as briefly as you can].",
              lambda rng, sentence, short: short),
    "pirate": ("[Talk like a pirate|You are a pirate|Answer like a pirate].",
               lambda rng, sentence, short: f"{rng.choice(['Arr', 'Ahoy', 'Yo ho ho', 'Arr, matey'])}! {sentence}"),
    "json": ("[Always answer with a JSON object that has the key answer|Answer only with JSON that has one key, answer].",
             lambda rng, sentence, short: json.dumps({"answer": short}, ensure_ascii=False)),
    "wish": ("[End every answer with a friendly wish|Wish the user a nice day after every answer].",
             lambda rng, sentence, short: f"{sentence} {rng.choice(['Have a nice day!', 'I wish you a lovely day!', 'Have a wonderful day!'])}"),
    "upper": ("[Write everything in capital letters|Answer in upper case only].",
              lambda rng, sentence, short: sentence.upper()),
}


def render(turns, system=None):
    """Turns [(user, assistant)] in the chat format that the template of the tokenizer writes."""
    parts = [f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []
    for user, assistant in turns:
        parts.append(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n")
    return "".join(parts)


def _sum(rng):
    question, answer = arithmetic.question(rng)
    return question, answer


def _question(rng):
    question, sentence, _ = questions.question(rng)
    return question, sentence


# (weight, maker of one turn)
_TURNS = [
    (25, _question), (22, _sum), (13, structured.json_question), (8, structured.listing), (5, structured.copying),
    (8, talk.small_talk), (4, talk.about), (6, talk.project), (4, questions.explanation), (2.5, talk.unknown),
    (2, stories.poem), (14, stories.request),
]
_WEIGHTS, _MAKERS = [w for w, _ in _TURNS], [m for _, m in _TURNS]


def turn(rng):
    """One (user, assistant) of any kind."""
    return rng.choices(_MAKERS, _WEIGHTS)[0](rng)


def _system(rng):
    return expand(rng.choice(_PLAIN_SYSTEMS), rng) if rng.random() < 0.45 else None


def _styled(rng):
    prompt, style = rng.choice(list(_STYLES.values()))
    turns = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.3:
            question, sentence = arithmetic.sum_question(rng)
            short = sentence.rstrip(".").split(" ")[-1]
        else:
            question, sentence, short = questions.question(rng)
        turns.append((question, style(rng, sentence, short)))
    return render(turns, expand(prompt, rng))


def _memory(rng):
    """What the user said about themselves comes back later."""
    name = words.any_name(rng)
    liked, pet, city = rng.choice(words.COLOURS), rng.choice(words.PET_NAMES), rng.choice(structured._CITIES)
    animal, age = rng.choice(["cat", "dog", "rabbit", "pony"]), rng.randint(4, 90)
    said = [
        ("My name is {name}.", "Nice to meet you, {name}!", "What is my name?", "Your name is {name}."),
        ("I am {name}.", "Hello, {name}! How can I help you?", "[Who am I|Do you know my name]?", "You are {name}."),
        ("My favourite colour is {liked}.", "{^liked} is a lovely colour!", "[What is my favourite colour|Which colour do I like]?", "Your favourite colour is {liked}."),
        ("I have a {animal} named {pet}.", "{pet} is a nice name for a {animal}!", "What is the name of my {animal}?", "Your {animal} is called {pet}."),
        ("I live in {city}.", "{city} must be an interesting place!", "Where do I live?", "You live in {city}."),
        ("I am {age} years old.", "Thank you for telling me that!", "How old am I?", "You are {age} years old."),
    ]
    context = {"name": name, "liked": liked, "pet": pet, "city": city, "animal": animal, "age": age}
    chosen = rng.sample(said[1:] if rng.random() < 0.5 else [said[0], *said[2:]], rng.randint(1, 3))
    turns = [(expand(s[0], rng, context), expand(s[1], rng, context)) for s in chosen]
    for _ in range(rng.choice([0, 0, 1, 2])):
        turns.append(turn(rng))
    turns += [(expand(s[2], rng, context), expand(s[3], rng, context)) for s in rng.sample(chosen, rng.randint(1, len(chosen)))]
    return render(turns, _system(rng))


def _follow_up(rng):
    """The second question leans on the first."""
    draw = rng.random()
    if draw < 0.3:
        first, second = rng.sample(list(facts.CAPITALS.items()), 2)
        turns = [(f"What is the capital of {first[0]}?", f"The capital of {first[0]} is {first[1]}."),
                 (expand("[And of {c}|And {c}|What about {c}]?", rng, {"c": second[0]}), f"The capital of {second[0]} is {second[1]}.")]
    elif draw < 0.6:
        a, b, c = rng.randint(1, 50), rng.randint(1, 30), rng.randint(1, 15)
        while arithmetic.is_held_out(a, b) or arithmetic.is_held_out(a + b, c):
            a, b = rng.randint(1, 50), rng.randint(1, 30)
        turns = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
                 (expand("[And if you add {c}|And {c} more|Now add {c}]?", rng, {"c": c}), f"{a + b} + {c} = {a + b + c}.")]
    elif draw < 0.8:
        first, second = rng.sample(list(facts.OPPOSITES.items()), 2)
        turns = [(f"What is the opposite of {first[0]}?", f"The opposite of {first[0]} is {first[1]}."),
                 (expand("[And of {w}|What about {w}]?", rng, {"w": second[0]}), f"The opposite of {second[0]} is {second[1]}.")]
    else:
        table = rng.choice([talk.JOKES, talk.FACTS, talk.RIDDLES])
        word = {0: "joke", 1: "fun fact", 2: "riddle"}[[talk.JOKES, talk.FACTS, talk.RIDDLES].index(table)]
        first, second = rng.sample(table, 2)
        turns = [(f"Tell me a {word}.", first), (expand("[Another one, please|One more|Tell me another one].", rng), second)]
    return render(turns, _system(rng))


def _single(rng):
    return render([turn(rng)], _system(rng))


def _several(rng):
    turns = [turn(rng) for _ in range(rng.randint(2, 5))]
    if rng.random() < 0.3:
        turns.insert(0, talk.small_talk(rng))
    if rng.random() < 0.2:
        turns.append(talk._fill(rng, *talk.SMALL_TALK[rng.choice([2, 3])]))
    return render(turns, _system(rng))


def _long(rng):
    """A long chat, so that the whole context is used."""
    return render([turn(rng) for _ in range(rng.randint(8, 24))], _system(rng))


def _few_shot(rng):
    """Questions and answers as plain text, as a few-shot prompt has them."""
    question_mark, answer_mark = rng.choice([("Q:", "A:"), ("Question:", "Answer:")])
    make, lines = rng.choice([_question, _question, arithmetic.sum_question]), []
    for _ in range(rng.randint(3, 10)):
        question, answer = make(rng)
        lines.append(f"{question_mark} {question}\n{answer_mark} {answer}")
    return "\n\n".join(lines)


def _sums_text(rng):
    """Bare equations, one a line."""
    lines = []
    for _ in range(rng.randint(3, 15)):
        a, b = arithmetic._pair(rng, held_out=False)
        a, b = (a, b) if rng.random() < 0.5 else (max(a, b), min(a, b))
        lines.append(f"{a} + {b} = {a + b}" if a < b or rng.random() < 0.5 else f"{a} - {b} = {a - b}")
    return "\n".join(lines)


_DOCUMENTS = [(46, _single), (15, _several), (2, _long), (7, _styled), (6, _memory), (4, _follow_up), (14, stories.plain),
              (4, _few_shot), (2, _sums_text)]
_DOC_WEIGHTS, _DOC_MAKERS = [w for w, _ in _DOCUMENTS], [m for _, m in _DOCUMENTS]


def document(rng):
    """One document of the corpus, without its end mark."""
    return rng.choices(_DOC_MAKERS, _DOC_WEIGHTS)[0](rng)
