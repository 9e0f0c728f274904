"""Rewards that a small story model can learn, for `judge.function`; none grows with the length."""

CHEERFUL = frozenset(
    {
        *(
            "happy",
            "happily",
            "smile",
            "smiled",
            "smiling",
            "laugh",
            "laughed",
            "fun",
            "play",
            "played",
            "playing",
        ),
        *(
            "love",
            "loved",
            "friend",
            "friends",
            "kind",
            "nice",
            "good",
            "best",
            "hug",
            "hugged",
            "thank",
            "thanked",
        ),
    }
)


def cheerfulness(prompt: object, completion: str) -> float:
    """The share of the words of a story that are cheerful."""
    words = [word.strip(".,!?\"'").lower() for word in completion.split()]
    return sum(word in CHEERFUL for word in words) / len(words) if words else 0.0
