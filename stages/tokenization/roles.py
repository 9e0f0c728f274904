"""Orders of roles for which a template has no place: a system turn, and a user turn behind a user turn.

In: a preference. Out: the preference with its system text folded, where the setting says so; the names under which such rows
are counted; the reason where the template refuses them.
"""

from dataclasses import replace
from functools import cached_property

from stages.data.messages import Message
from stages.data.source_row import BadRow
from stages.formats.contract import Preference
from stages.tokenization.turn_ends import END, START, Apply

# Names under which `align prepare` counts rows.
FOLDED = "system_text_folded_into_the_user_turn"
USERS, USERS_JOINED = "consecutive_user_turns", "consecutive_user_turns_joined_by_the_template"


class Roles:
    """What one template does with system turns and with consecutive user turns, tried once each."""

    def __init__(self, apply: Apply, folds: bool, name: str) -> None:
        """`apply` renders messages, `folds` is `prepare.system=fold`, `name` is the template's."""
        self._apply, self._folds, self._name = apply, folds, name

    def arranged(self, preference: Preference, notes: set[str]) -> Preference:
        """The preference with its system text folded; adds the names under which it is counted to `notes`."""
        turns = preference.prompt
        if not isinstance(turns, list):
            return preference
        roles = [turn["role"] for turn in turns[:2]]
        if self._folds and roles == ["system", "user"] and not self._shows_system:
            notes.add(FOLDED)
            preference = replace(preference, prompt=_folded(turns))
        if _has_consecutive_users(preference):
            notes.add(USERS_JOINED if self._between_users.isspace() else USERS)
        return preference

    def explained(self, preference: Preference, problem: BadRow) -> BadRow:
        """The problem of a row that was refused, with what to do where the order of its roles is the cause."""
        turns = preference.prompt
        if not isinstance(turns, list):
            return problem
        if turns[0]["role"] == "system" and not self._folds and not self._shows_system:
            return BadRow(
                f"system: {self._name} has no place for a system turn ({problem}). Put its text in front of the user's with --set prepare.system=fold"
            )
        if _has_consecutive_users(preference) and not self._between_users:
            return BadRow(
                f"two user turns follow each other, and {self._name} refuses that ({problem}). Join them in the data, or drop such rows with --set data.on_bad_row=skip"
            )
        return problem

    @cached_property
    def _shows_system(self) -> bool:
        try:
            return START in self._apply([{"role": "system", "content": START}, _user("a")])
        except BadRow:
            return False

    @cached_property
    def _between_users(self) -> str:
        """What the template writes between the texts of two user turns; "" where it refuses them."""
        try:
            text = self._apply([_user(f"a{START}"), _user(f"{END}b")])
        except BadRow:
            return ""
        return text.partition(START)[2].partition(END)[0]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _has_consecutive_users(preference: Preference) -> bool:
    for side in (preference.prompt, *(candidate.completion for candidate in preference.candidates)):
        before = None
        for turn in side if isinstance(side, list) else ():
            role = turn["role"]
            if role == before == "user":
                return True
            before = role
    return False


def _folded(prompt: list[Message]) -> list[Message]:
    """The prompt with its system text in front of the first user turn's, as models without system turns have it."""
    system, user, *rest = prompt
    return [{**user, "content": f"{system['content'].strip()}\n\n{user['content']}"}, *rest]
