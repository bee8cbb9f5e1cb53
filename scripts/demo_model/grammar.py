"""Text templates with choices: the whole corpus is written in this small notation.

    [a|b|c]   one of the alternatives, nested as deep as wanted; `[a|]` may be empty
    {name}    a value of the context; `{^name}` starts with a capital letter

Everything else is literal text.
"""

from functools import lru_cache

_VOWELS = "aeiou"
_SOUNDS_LIKE_CONSONANT = ("uni", "use", "one", "euro", "ukulele")
_SILENT_H = ("honest", "hour")


@lru_cache(maxsize=None)
def _parse(template):
    """Template to a tuple of parts: a string, ("slot", name, capital) or ("choice", options)."""
    parts, rest = _parse_until(template, 0, closing=False)
    if rest != len(template):
        raise ValueError(f"unbalanced ] at {rest} in template {template!r}")
    return parts


def _parse_until(text, at, closing):
    parts, literal = [], []

    def flush():
        if literal:
            parts.append("".join(literal))
            literal.clear()

    while at < len(text):
        char = text[at]
        if closing and char in "|]":
            break
        if char == "[":
            flush()
            options, at = [], at + 1
            while True:
                option, at = _parse_until(text, at, closing=True)
                options.append(option)
                if at >= len(text):
                    raise ValueError(f"missing ] in template {text!r}")
                at += 1
                if text[at - 1] == "]":
                    break
            parts.append(("choice", tuple(options)))
        elif char == "{":
            flush()
            end = text.index("}", at)
            name = text[at + 1 : end]
            parts.append(("slot", name.lstrip("^"), name.startswith("^")))
            at = end + 1
        elif char == "]":
            break
        else:
            literal.append(char)
            at += 1
    flush()
    return tuple(parts), at


def _emit(parts, context, rng, out):
    for part in parts:
        if part.__class__ is str:
            out.append(part)
        elif part[0] == "slot":
            value = str(context[part[1]])
            out.append(value[0].upper() + value[1:] if part[2] and value else value)
        else:
            options = part[1]
            _emit(options[int(rng.random() * len(options))], context, rng, out)


def expand(template, rng, context=None):
    """One text of the template: every choice drawn from `rng`, every slot from `context`."""
    out = []
    _emit(_parse(template), context or {}, rng, out)
    return "".join(out)


def article(noun):
    """`noun` with its indefinite article: an owl, a unicorn."""
    lower = noun.lower()
    vowel = lower[0] in _VOWELS and not lower.startswith(_SOUNDS_LIKE_CONSONANT) or lower.startswith(_SILENT_H)
    return f"{'an' if vowel else 'a'} {noun}"


def join_words(words, last="and"):
    """a, b and c."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
