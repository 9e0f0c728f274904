"""Names of files that come from elsewhere: they stay below the folder they are meant for."""

import re

from cache.errors import CorruptError

# One folder or file: no separator of any system, no control character, neither hidden nor `.` or `..`, as short as file systems allow.
PART = re.compile(r"[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*")
LONGEST = 255


def check_name(name: object, where: str) -> None:
    """Raise `CorruptError` unless `name` is a relative path of plain names, separated by `/`."""
    parts = name.split("/") if isinstance(name, str) else [""]
    for part in parts:
        try:
            is_plain = PART.fullmatch(part) is not None and len(part.encode()) <= LONGEST
        except UnicodeEncodeError:  # half a character
            is_plain = False
        if not is_plain:
            raise CorruptError(
                f"{where} names {str(name)[:80]!r}, which is no file inside of a folder. Nothing was written there."
            )
