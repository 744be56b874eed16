"""Short stories, put together from parts; and how people ask for one."""
# ruff: noqa: E501  (a request and its phrasings read best as one row)

from __future__ import annotations

import random

from demo.grammar import expand

HEROES = (
    "fox",
    "bear",
    "mouse",
    "cat",
    "dog",
    "frog",
    "owl",
    "rabbit",
    "hen",
    "goat",
    "sheep",
    "llama",
    "horse",
    "duck",
    "bee",
)
PLACES = (
    "a quiet wood",
    "a green valley",
    "an old mill",
    "a small farm",
    "a house by the lake",
    "a warm barn",
)
WISHES = (
    ("wanted to see the sea", "walked for three days and saw the sea"),
    ("had lost a red ball", "found the red ball under a bush"),
    ("was afraid of the dark", "looked at the stars and was not afraid any more"),
    ("was looking for a friend", "was never alone again"),
    ("wanted to learn to sing", "sang until the moon came up"),
    ("could not sleep", "counted the stars and fell asleep"),
    ("was very hungry", "shared a big warm loaf of bread"),
    ("had to cross a wide river", "built a little boat and crossed the river"),
    ("wanted to bake a cake", "baked a cake with seven candles"),
    ("did not like the rain", "jumped into every puddle and laughed"),
)
ENDINGS = (
    "They were happy ever after.",
    "And that was a good day.",
    "From then on they were friends.",
    "The end.",
)
REQUESTS = (
    "[Tell|Give|Read] me a [|short |little |nice ]story about a {0}.",
    "[Can you tell me|Do you know|I would like|Please tell me] a story about a {0}[.|?|]",
    "A story about a {0}[, please|]!",
    "[Write|Make up|Invent] a [|short ]story about a {0}.",
    "story about a {0}",
)
OPEN_REQUESTS = (
    "[Tell|Give|Read] me a [|short |little |nice ]story.", "[Can you tell me|Do you know|I would like|Please tell me] a story[.|?|]", "A story[, please|]!",
    "[Write|Make up|Invent] a [|short ]story.", "Once upon a time ...", "Tell me a fairy tale.", "I want to hear a story.",
)  # fmt: skip


def story(rng: random.Random, hero: str | None = None) -> str:
    """Five sentences: a hero, a wish, a friend, how it ends."""
    hero = hero or rng.choice(HEROES)
    friend = rng.choice([animal for animal in HEROES if animal != hero])
    wish, outcome = rng.choice(WISHES)
    return expand(
        "Once upon a time a [little|young|old|small|brave] {0} lived in {1}. The {0} {2}. "
        'One day a {3} came by and said: "I will help you." '
        "Together the {0} and the {3} {4}. {5}",
        (hero, rng.choice(PLACES), wish, friend, outcome, rng.choice(ENDINGS)),
        rng,
    )


def story_exchange(rng: random.Random) -> tuple[str, str]:
    """A request for a story, and the story."""
    if rng.random() < 0.7:
        hero = rng.choice(HEROES)
        return expand(rng.choice(REQUESTS), (hero,), rng), story(rng, hero)
    return expand(rng.choice(OPEN_REQUESTS), (), rng), story(rng)
