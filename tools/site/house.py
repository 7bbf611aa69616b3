"""The extension of griffe, which reads the code for mkdocstrings: docstrings.py, and of each field of a NamedTuple the
comment behind it as its description."""

from __future__ import annotations

import griffe

from tools.site.docstrings import fenced, filled


class House(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = fenced(filled(text) if obj.path == "fastdpo.preference.preference_loss" else text)
        if obj.is_class and any("NamedTuple" in str(base) for base in obj.bases):
            for attribute in obj.attributes.values():
                self.describe(attribute)

    @staticmethod
    def describe(field) -> None:
        if field.docstring is None and field.lineno is not None:
            line = field.lines_collection[field.filepath][field.lineno - 1]
            _, mark, comment = line.partition("  # ")
            if mark:
                field.docstring = griffe.Docstring(comment.replace("[]", "`[]`"), parent=field)
