"""Which examples are turns of one conversation, found from their prompts alone.

In: the rows of a split, and the ids that end a turn.  Out: a number for each example, equal within a conversation.
"""

from collections.abc import Sequence

import numpy as np

from stages.data.rows import RowSet


def conversations(rows: RowSet, turn_ends: Sequence[int]) -> np.ndarray:
    """The number of each example's conversation: (examples,) int64.

    A conversation is a prompt and all prompts that begin with its turns, itself among them: later turns, other
    branches, other completions of the same prompt.
    """
    # Of equal length in bytes for each token, so one begins with another where its tokens do.
    prompts = [_turns(rows.prompt(start), turn_ends).tobytes() for start in rows.starts]
    found = np.zeros(len(prompts), np.int64)
    number, first = -1, None
    # Sorted, all that begin with a prompt follow it.
    for example in sorted(range(len(prompts)), key=prompts.__getitem__):
        if first is None or not prompts[example].startswith(first):
            number, first = number + 1, prompts[example]
        found[example] = number
    return found


def _turns(prompt: np.ndarray, turn_ends: Sequence[int]) -> np.ndarray:
    """The prompt up to the end of its last turn, where that can be told.

    What follows it opens the turn that is answered, and templates write that otherwise once the answer is there: without
    an empty block of thoughts, for example.
    """
    # The first token ends no turn: it may be the token that begins every text, which is often that which ends it.
    ends = np.flatnonzero(np.isin(prompt[1:], turn_ends))
    return prompt[: ends[-1] + 2] if len(ends) else prompt
