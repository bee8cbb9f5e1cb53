"""Words the generated text is made of: people, places, things."""

GIRLS = (
    "Mia Lily Anna Ella Ruby Nora Zoe Emma Clara Ivy Rosa Lucy Maya Alice Hana Tara Sofia Nina "
    "Greta Pia Leila Amy Jane Olga Daisy Freya Ines Kate Mina Priya Sara Wendy"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Jack Finn Oscar Hugo Noah Theo Adam Luca Omar Felix Ravi Paul Emil Jonas "
    "Kai Peter Milo Otto Ivan Ali Dan Henry Jakob Ken Louis Rafi Tim"
).split()
PET_NAMES = (
    "Tilly Pip Bramble Clover Hazel Nutmeg Biscuit Pebble Juniper Maple Rusty Dot Fern Poppy Button "
    "Willow Sunny Patch Mochi Ginger Pepper Waffle Olive Acorn Peanut Berry Cocoa Twig Misty Toffee"
).split()

# Animals that can be the hero of a story, with a place to sleep.
STORY_ANIMALS = {
    "rabbit": "a cosy burrow", "fox": "a warm den", "mouse": "a tiny house", "bear": "a big cave",
    "squirrel": "a hollow tree", "hedgehog": "a pile of soft leaves", "owl": "an old barn",
    "duck": "a nest by the pond", "cat": "a little house", "dog": "a wooden kennel",
    "turtle": "a quiet pond", "frog": "a green pond", "penguin": "an icy bay", "beaver": "a strong dam",
    "badger": "a deep burrow", "kitten": "a basket by the fire", "puppy": "a yellow farmhouse",
    "deer": "a sunny clearing", "otter": "a bend of the river", "sparrow": "a nest on the roof",
    "goat": "a barn on the hill", "pony": "a red stable", "elephant": "a wide green valley",
    "lion": "a rocky hill", "monkey": "a tall tree", "snail": "a garden wall", "dragon": "a cave in the hills",
    "robot": "a small workshop",
}

# place -> (where, spots where things are found)
PLACES = {
    "the forest": ("in the forest", ["under an old oak tree", "behind a mossy rock", "beside a fallen log"]),
    "the beach": ("at the beach", ["behind a big shell", "under a wooden boat", "in a hole in the sand"]),
    "the park": ("in the park", ["under a bench", "beside the fountain", "behind the swings"]),
    "the garden": ("in the garden", ["between the roses", "under the apple tree", "behind the watering can"]),
    "the village": ("in the village", ["by the old well", "on the steps of the bakery", "under a market stall"]),
    "the farm": ("on the farm", ["in a pile of hay", "behind the barn", "next to the chicken house"]),
    "the river": ("by the river", ["between two stones", "in the tall reeds", "under the little bridge"]),
    "the meadow": ("in the meadow", ["in the long grass", "under a bush", "among the yellow flowers"]),
    "the lake": ("by the lake", ["under the pier", "beside a rowing boat", "in the reeds"]),
    "the mountain": ("on the mountain", ["in a small cave", "behind a pine tree", "under a flat stone"]),
    "the city": ("in the city", ["in front of the library", "under a park bench", "beside a flower shop"]),
    "the island": ("on the island", ["under a palm tree", "behind a round rock", "in an old boat"]),
    "the castle": ("in the castle", ["behind a heavy curtain", "on the stone stairs", "under a long table"]),
    "the school yard": ("in the school yard", ["under the slide", "behind the big tree", "next to the fence"]),
}

TOYS = (
    "kite ball scarf hat boat drum book lantern bell basket umbrella map whistle marble key shell "
    "ribbon blanket cup flute bucket button coin feather crayon balloon toy train teddy_bear "
    "music_box paper_plane"
).replace("toy train", "toy_train").split()
TOYS = [toy.replace("_", " ") for toy in TOYS]
COLOURS = "red blue green yellow orange purple white silver golden pink brown black".split()

TRAITS = (
    "kind brave curious shy clever cheerful quiet gentle funny careful patient small hungry sleepy "
    "friendly playful honest proud happy lonely"
).split()
WEATHER = [
    "sunny", "windy", "cloudy", "cold", "warm", "rainy", "snowy", "foggy", "bright", "quiet",
]
TIMES = ["morning", "afternoon", "evening", "spring morning", "summer day", "autumn day", "winter morning"]
TREATS = [
    "warm bread", "honey cakes", "apple pie", "hot soup", "sweet berries", "pancakes", "cookies",
    "cherry jam", "hot chocolate", "roasted nuts", "a big salad", "carrot cake",
]
SYLLABLES = "ba bo da di dor fa fen ga gri ha jo ka kel la lin lo ma mo na nel pa pri ra ro sa sil ta tor va vi wen xa yo za zor".split()

FOODS = (
    "apple banana orange pear lemon cherry grape peach plum strawberry mango melon carrot potato tomato "
    "onion cucumber pepper pumpkin bean bread cheese egg rice soup cake cookie pizza salad sandwich "
    "pancake noodle mushroom olive nut"
).split()
HOBBIES = [
    "reading", "swimming", "drawing", "cooking", "dancing", "singing", "running", "painting",
    "gardening", "chess", "football", "fishing", "cycling", "skating", "writing", "hiking",
]
JOBS_SHORT = "teacher doctor baker farmer pilot nurse painter cook gardener writer singer driver".split()

# Members of a kind, for lists and for JSON arrays.
KINDS = {
    "fruits": "apple banana orange pear cherry grape peach plum mango melon lemon strawberry".split(),
    "vegetables": "carrot potato onion cucumber pumpkin bean pea cabbage spinach broccoli".split(),
    "animals": "dog cat horse lion rabbit bear elephant fox wolf tiger deer monkey".split(),
    "birds": "owl eagle sparrow duck swan robin penguin parrot crow stork".split(),
    "insects": "ant bee butterfly beetle fly ladybird dragonfly grasshopper mosquito".split(),
    "colours": "red blue green yellow orange purple white black pink brown".split(),
    "farm animals": "cow pig sheep goat horse chicken duck donkey".split(),
    "sea animals": "whale dolphin shark octopus crab seal jellyfish starfish".split(),
    "tools": "hammer saw screwdriver drill spade rake axe ruler".split(),
    "musical instruments": "piano violin guitar drum flute trumpet harp cello".split(),
    "sports": "football tennis swimming running basketball cycling hockey skiing".split(),
    "clothes": "shirt hat coat scarf sock shoe dress glove jacket".split(),
    "vehicles": "car bus train bicycle boat ship plane truck tram".split(),
    "countries": "France Spain Italy Japan Brazil Kenya Canada India Norway Egypt Peru Greece".split(),
    "cities": "Paris London Rome Tokyo Madrid Berlin Cairo Lima Oslo Athens Vienna Ottawa".split(),
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "shapes": "circle square triangle rectangle star oval pentagon hexagon".split(),
    "flowers": "rose tulip daisy lily sunflower violet daffodil orchid".split(),
    "trees": "oak pine birch maple willow beech apple tree palm".replace("apple tree ", "").split(),
    "drinks": "water milk tea coffee juice lemonade cocoa".split(),
    "body parts": "head arm leg hand foot nose ear knee finger".split(),
    "rooms": "kitchen bedroom bathroom hall cellar attic study".split(),
    "school things": "pencil book ruler eraser notebook chalk backpack".split(),
    "jobs": JOBS_SHORT,
}
ORDERED = {
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months of the year": (
        "January February March April May June July August September October November December"
    ).split(),
    "seasons": "spring summer autumn winter".split(),
    "planets in order from the sun": KINDS["planets"],
    "colours of the rainbow": "red orange yellow green blue indigo violet".split(),
    "primary colours": "red yellow blue".split(),
    "vowels": "a e i o u".split(),
    "continents": ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
    "five senses": "sight hearing smell taste touch".split(),
}
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


def person(rng):
    """A first name with its pronouns (he, him, his)."""
    if rng.random() < 0.5:
        return rng.choice(GIRLS), ("she", "her", "her")
    return rng.choice(BOYS), ("he", "him", "his")


def invented_name(rng):
    """A name that is in no list, so that copying it is the only way to get it right."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def any_name(rng):
    """Mostly a listed name, sometimes an invented one."""
    return invented_name(rng) if rng.random() < 0.2 else person(rng)[0]
