"""Tables of plain text."""

from fastdpo.commands.table import aligned


def test_columns():
    assert aligned([["", "MiB", "b"], ["eager", "12", ""], ["x", "1234", "7"]]) == [
        "        MiB  b",
        "-----  ----  -",
        "eager    12",
        "x      1234  7",
    ]
