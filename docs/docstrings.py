"""Turns the little reStructuredText in docstrings into Markdown, for the documentation site only."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LINK = re.compile(r"`([^`<]+?)\s+<(https?://[^>]+)>`_")  # `title <address>`_
_ROLE = re.compile(r":(?:attr|class|func|meth):(?=`)")  # :meth:`clip_`
_LONE = re.compile(r"(?<!`)`(\w+)`(?!`)")  # `GradientClipper`, but not ``code``


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package after it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of a package and link the public names in them."""
        public = {name.strip("'\"") for name in map(str, pkg.exports or ())}
        self._rewrite(pkg, public, pkg.path)

    def _rewrite(self, thing: griffe.Object, public: set[str], root: str) -> None:
        if thing.docstring is not None:
            text = _ROLE.sub("", _LINK.sub(r"[\1](\2)", thing.docstring.value))
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the name that griffe knows
            others = public - {thing.name}
            thing.docstring.value = _LONE.sub(
                lambda found: f"[{found[0]}][{root}.{found[1]}]" if found[1] in others else found[0], text
            )
        for member in thing.members.values():
            if not member.is_alias:
                self._rewrite(member, public, root)
