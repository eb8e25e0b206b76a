"""Tables of results in a notebook."""

import pytest

from biomodel.tables import html_table


def test_a_table():
    shown = html_table(("a", "b"), [(1, "x"), ("2", None)], "Title")
    assert shown == (
        "<p><b>Title</b></p><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>x</td></tr><tr><td>2</td><td>None</td></tr></tbody></table>"
    )
    assert html_table(("a",), []).startswith("<table>")


def test_text_is_escaped():
    shown = html_table(("<h>",), [("<script>",)], "a & b")
    assert "<h>" not in shown and "<script>" not in shown and "a &amp; b" in shown


def test_rows_fit_the_columns():
    with pytest.raises(ValueError, match="row of 3 cells"):
        html_table(("a", "b"), [(1, 2, 3)])
