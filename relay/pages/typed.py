"""What somebody typed into a form that was refused: the page comes again, filled in, and says what is wrong.

Passwords are not sent back, neither is anything else that people do not type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Fields whose content no page shows again.
SECRET = frozenset({"form_token", "password", "again", "current", "key", "credential", "mark"})


@dataclass(frozen=True)
class Typed:
    """One refused form; without arguments, none. ``form`` is its name on the page."""

    form: str = ""
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)
    problem: str = ""

    @classmethod
    def of(cls, form: str, fields: Mapping[str, str], problem: str) -> Typed:
        """A refused form as its page may show it."""
        return cls(form, {name: value for name, value in fields.items() if name not in SECRET}, problem)

    def text(self, form: str, name: str, before: str | None = "") -> str:
        """What stands in a field: what was typed if it is this form's, else what was there before."""
        return self.fields.get(name, "") if form == self.form else before or ""

    def ticked(self, form: str, name: str, before: bool = False) -> bool:
        """Whether a box is ticked."""
        return name in self.fields if form == self.form else before


NOTHING_TYPED = Typed()
