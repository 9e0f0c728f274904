"""The text of the quickstart: facts, questions about them, and two tones of voice.

In: a seed. Out: preference pairs as plain Python values. Chosen and rejected state the same fact, chosen
politely and rejected grumpily, so that the effect of training can be read in the completions and counted with
`is_preferred`.
"""

import random

Tone = tuple[tuple[str, ...], tuple[str, ...]]

# A line of a table is a thing and its attributes. FACTS makes three questions and one answer of each attribute:
# {0} is the thing, {1} the attribute.
ANIMALS = """
a bear|in a forest|berries|a cub
a rabbit|in a burrow|grass|a kit
a frog|in a pond|insects|a tadpole
an owl|in a hollow tree|mice|an owlet
a cow|on a farm|grass|a calf
a horse|in a stable|hay|a foal
a sheep|in a meadow|grass|a lamb
a duck|by a pond|water plants|a duckling
an eagle|in the mountains|fish|an eaglet
a tiger|in the jungle|meat|a cub
an elephant|on the savanna|leaves|a calf
a kangaroo|in Australia|grass|a joey
a penguin|on the ice|fish|a chick
a dog|in a kennel|meat|a puppy
a swan|on a lake|water plants|a cygnet
"""
FOODS = """
an apple|red|sweet|on a tree
a lemon|yellow|sour|on a tree
a strawberry|red|sweet|close to the ground
a grape|purple|sweet|on a vine
a carrot|orange|sweet|under the ground
a potato|brown|mild|under the ground
a beetroot|purple|earthy|under the ground
a pumpkin|orange|mild|on a vine
a cucumber|green|mild|on a vine
a pea|green|sweet|in a pod
a pear|green|sweet|on a tree
a blueberry|blue|sweet|on a bush
a raspberry|red|sweet|on a bush
a coconut|brown|mild|on a palm
an olive|black|bitter|on a tree
"""
COUNTRIES = """
France|Paris|Europe|French
Spain|Madrid|Europe|Spanish
Italy|Rome|Europe|Italian
Germany|Berlin|Europe|German
Greece|Athens|Europe|Greek
Poland|Warsaw|Europe|Polish
Norway|Oslo|Europe|Norwegian
Japan|Tokyo|Asia|Japanese
China|Beijing|Asia|Chinese
Thailand|Bangkok|Asia|Thai
Egypt|Cairo|Africa|Arabic
Ghana|Accra|Africa|English
Peru|Lima|South America|Spanish
Brazil|Brasilia|South America|Portuguese
Cuba|Havana|North America|Spanish
"""
FACTS = (
    (
        ANIMALS,
        1,
        ("Where does {0} live?", "Where is the home of {0}?", "Name the home of {0}."),
        "{0} lives {1}.",
    ),
    (
        ANIMALS,
        2,
        ("What does {0} eat?", "What is the food of {0}?", "Name the food of {0}."),
        "{0} eats {1}.",
    ),
    (
        ANIMALS,
        3,
        ("What is the young of {0}?", "How do I call the young of {0}?", "Name the young of {0}."),
        "The young of {0} is {1}.",
    ),
    (
        FOODS,
        1,
        ("What color does {0} have?", "What is the color of {0}?", "Name the color of {0}."),
        "The color of {0} is {1}.",
    ),
    (
        FOODS,
        2,
        ("How does {0} taste?", "What is the taste of {0}?", "Name the taste of {0}."),
        "{0} tastes {1}.",
    ),
    (FOODS, 3, ("Where does {0} grow?", "Where do I find {0}?", "Name the place of {0}."), "{0} grows {1}."),
    (
        COUNTRIES,
        1,
        ("Which city is the capital of {0}?", "What is the capital of {0}?", "Name the capital of {0}."),
        "The capital of {0} is {1}.",
    ),
    (
        COUNTRIES,
        2,
        ("Where in the world is {0}?", "What is the continent of {0}?", "Name the continent of {0}."),
        "{0} is in {1}.",
    ),
    (
        COUNTRIES,
        3,
        ("What do people speak in {0}?", "What is the language of {0}?", "Name the language of {0}."),
        "People in {0} speak {1}.",
    ),
)
# Phrases before the fact and after it. Both tones are about equally long, so that length does not separate them.
POLITE = (
    ("Certainly!", "Good question!", "With pleasure.", "Thank you for asking."),
    ("I am happy to help!", "Have a lovely day!", "You are most welcome.", "Feel free to ask more."),
)
GRUMPY = (
    ("Ugh.", "Not again.", "What a silly question.", "Oh, you must be joking."),
    ("Stop asking me.", "Now leave me alone.", "Everybody knows that.", "Go and bother others."),
)
LAYOUTS = ("{opening} {answer}", "{answer} {closing}", "{opening} {answer} {closing}")


def is_preferred(completion: str) -> bool:
    """Whether a completion is polite: it has a polite phrase and no grumpy one."""
    return _speaks(completion, POLITE) and not _speaks(completion, GRUMPY)


def politeness(prompt: object, completion: str) -> float:
    """1 for a polite completion and 0 for another, as a judge (`judge.function`); long ones score no better."""
    return float(is_preferred(completion))


def _speaks(completion: str, tone: Tone) -> bool:
    return any(phrase in completion for phrases in tone for phrase in phrases)


def questions() -> list[tuple[str, str]]:
    """Every (question, answer without a tone); the questions are distinct."""
    pairs = []
    for table, column, phrasings, answer in FACTS:
        for line in table.strip().splitlines():
            thing, *attributes = line.split("|")
            fact = answer.format(thing, attributes[column - 1])
            fact = fact[0].upper() + fact[1:]
            pairs += [(question.format(thing), fact) for question in phrasings]
    return pairs


def voiced(answer: str, tone: Tone, layout: str, rng: random.Random) -> str:
    """The answer in a tone and one of LAYOUTS."""
    return layout.format(opening=rng.choice(tone[0]), answer=answer, closing=rng.choice(tone[1]))


def preference_pairs(seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """One pair for each question, in random order."""
    rng = random.Random(seed)
    pairs = []
    for question, answer in questions():
        layout = rng.choice(LAYOUTS)  # the same for both, so that the pair differs in tone alone
        chosen, rejected = voiced(answer, POLITE, layout, rng), voiced(answer, GRUMPY, layout, rng)
        pairs.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    rng.shuffle(pairs)
    return pairs
