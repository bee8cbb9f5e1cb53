"""Arithmetic with right answers. A twentieth of all pairs of numbers is kept out of training."""

from .grammar import expand
from .lexicon import FOODS, NUMBER_WORDS, person

HELD_OUT_ONE_IN = 20


def is_held_out(a, b):
    """Whether sums and differences of the pair, in either order, are for the test only."""
    low, high = min(a, b), max(a, b)
    return (low * 7919 + high * 104729) % HELD_OUT_ONE_IN == 0


def _pair(rng, held_out, top=99):
    while True:
        small = rng.random() < 0.25
        a, b = rng.randint(0, 12 if small else top), rng.randint(0, 12 if small or rng.random() < 0.2 else top)
        if is_held_out(a, b) == held_out:
            return a, b


def sum_question(rng, held_out=False):
    """(question, answer) for one addition or subtraction."""
    a, b = _pair(rng, held_out)
    if rng.random() < 0.55:
        context = {"a": a, "b": b, "c": a + b}
        question = "[What is|How much is|What's|Calculate|Compute|Please add|] {a} [+|plus] {b}"
        if rng.random() < 0.15:
            question = "[Add {a} and {b}|Can you add {a} and {b}|What is the sum of {a} and {b}]"
        answer = "[{a} + {b} = {c}.|{a} + {b} = {c}.|{a} + {b} = {c}.|The answer is {c}.|{a} plus {b} is {c}.]"
    else:
        a, b = max(a, b), min(a, b)
        context = {"a": a, "b": b, "c": a - b}
        question = "[What is|How much is|What's|Calculate|Compute|] {a} [-|minus] {b}"
        if rng.random() < 0.15:
            question = "[Take {b} away from {a}|Subtract {b} from {a}|What is left if you take {b} from {a}]"
        answer = "[{a} - {b} = {c}.|{a} - {b} = {c}.|{a} - {b} = {c}.|The answer is {c}.|{a} minus {b} is {c}.]"
    text = expand(question, rng, context).strip()
    return text + ("?" if text.startswith(("What", "How", "Can")) else rng.choice([".", "?", "", " ="])), expand(answer, rng, context)


def compare_question(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if a == b:
        b = a + 1
    context = {"a": a, "b": b, "high": max(a, b), "low": min(a, b)}
    return rng.choice([
        ("Which [number |]is [larger|bigger|greater][,|:] {a} or {b}?", "{high} is [larger|bigger|greater] than {low}."),
        ("Which [number |]is smaller[,|:] {a} or {b}?", "{low} is smaller than {high}."),
        ("Is {a} [larger|bigger|greater] than {b}?", "Yes, {a} is larger than {b}." if a > b else "No, {a} is smaller than {b}."),
        ("Is {a} smaller than {b}?", "Yes, {a} is smaller than {b}." if a < b else "No, {a} is larger than {b}."),
    ]), context


def times_question(rng):
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return ("[What is|How much is|What's] {a} [times|x|*] {b}?", "{a} [times {b} is|x {b} =] {c}."), {"a": a, "b": b, "c": a * b}


def number_question(rng):
    """Parity, neighbours, doubles, halves, number words."""
    n = rng.randint(1, 98)
    context = {"n": n, "after": n + 1, "before": n - 1, "twice": 2 * n, "even": 2 * (n // 2) or 2}
    context["half"] = context["even"] // 2
    if n <= 20:
        context["word"] = NUMBER_WORDS[n]
        if rng.random() < 0.4:
            return ("[Write the number {n} as a word|How do you write {n} in words].", "{n} is written {word}."), context
    parity = "even" if n % 2 == 0 else "odd"
    return rng.choice([
        ("Is {n} [even or odd|odd or even]?", "{n} is " + parity + "."),
        ("Is {n} an even number?", "Yes, {n} is even." if n % 2 == 0 else "No, {n} is odd."),
        ("Is {n} an odd number?", "Yes, {n} is odd." if n % 2 else "No, {n} is even."),
        ("[What|Which] number comes after {n}?", "The number after {n} is {after}."),
        ("[What|Which] number comes before {n}?", "The number before {n} is {before}."),
        ("What is [twice|double] {n}?", "Twice {n} is {twice}."),
        ("What is half of {even}?", "Half of {even} is {half}."),
    ]), context


def list_question(rng):
    numbers = rng.sample(range(1, 60), rng.randint(3, 4))
    shown = ", ".join(map(str, numbers))
    context = {"list": shown, "up": ", ".join(map(str, sorted(numbers))), "high": max(numbers), "low": min(numbers),
               "down": ", ".join(map(str, sorted(numbers, reverse=True)))}
    return rng.choice([
        ("[Sort these numbers|Put these numbers in order]: {list}.", "{up}"),
        ("Sort [these numbers |]from largest to smallest: {list}.", "{down}"),
        ("[Which|What] is the largest of {list}?", "The largest is {high}."),
        ("[Which|What] is the smallest of {list}?", "The smallest is {low}."),
    ]), context


def counting_question(rng):
    start, length = rng.randint(1, 20) if rng.random() < 0.6 else 1, rng.randint(3, 12)
    step = rng.choice([1, 1, 1, 2, 5, 10])
    if step > 1:
        start = step
    up = [start + step * i for i in range(length)]
    by = {1: "", 2: " by twos", 5: " by fives", 10: " by tens"}[step]
    if rng.random() < 0.25 and step == 1:
        return ("[Count|Please count|Can you count] [down|backwards] from {b} to {a}.", "{down}"), {
            "a": up[0], "b": up[-1], "down": ", ".join(map(str, reversed(up)))}
    return ("[Count|Please count|Can you count]{by} from {a} to {b}.", "{up}"), {
        "by": by, "a": up[0], "b": up[-1], "up": ", ".join(map(str, up))}


def word_problem(rng):
    name, (he, _, _) = person(rng)
    other, _ = person(rng)
    a, b = rng.randint(2, 20), rng.randint(1, 12)
    while is_held_out(a, b):
        a = rng.randint(2, 20)
    if rng.random() < 0.5:
        a, b = max(a, b), min(a, b)
    food = rng.choice(FOODS[:10]) if rng.random() < 0.5 else rng.choice(["book", "coin", "ball", "shell", "marble", "flower", "star"])
    plural = {"cherry": "cherries", "strawberry": "strawberries", "peach": "peaches"}.get(food, food + "s")
    context = {"name": name, "he": he, "other": other, "a": a, "b": b, "things": plural, "thing": food, "sum": a + b, "rest": a - b}
    if a <= b or rng.random() < 0.5:
        context["noun"] = plural
        return ("{name} has {a} {things} and [gets|finds|buys] {b} more. How many {things} does {name} have[ now|]?",
                "{a} + {b} = {sum}, so {name} has {sum} {noun}."), context
    context["noun"] = food if a - b == 1 else plural
    return ("{name} has {a} {things} and [gives {b} to {other}|loses {b}|gives away {b}]. How many {things} [are left|does {name} have now]?",
            "{a} - {b} = {rest}, so {name} has {rest} {noun} left."), context


_TEMPLATED = [compare_question, times_question, number_question, list_question, counting_question, word_problem, word_problem]


def question(rng, held_out=False):
    """(question, answer) of any kind; sums are about half of them."""
    if rng.random() < 0.5:
        return sum_question(rng, held_out)
    (ask, answer), context = rng.choice(_TEMPLATED)(rng)
    return expand(ask, rng, context), expand(answer, rng, context)
