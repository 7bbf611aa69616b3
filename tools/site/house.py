"""The extension of griffe, which reads the code for mkdocstrings: docstrings as docstrings.py makes them, and the
fields of a NamedTuple as a list, each with the comment behind it."""

from __future__ import annotations

import griffe

from tools.site.docstrings import fenced, filled


class House(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = fenced(filled(text) if obj.path == "fastdpo.preference.preference_loss" else text)
        if obj.is_class and any("NamedTuple" in str(base) for base in obj.bases):
            fields = [f"    {field.name}: {self.comment(field)}" for field in obj.attributes.values()]
            text = "\n".join((text, "", "Attributes:", *fields))
        obj.docstring.value = text

    @staticmethod
    def comment(field) -> str:
        line = field.lines_collection[field.filepath][field.lineno - 1]
        return line.partition("  # ")[2].replace("[]", "`[]`") or "as above."
