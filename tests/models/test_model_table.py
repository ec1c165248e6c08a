"""README.md's table of families is the registry's."""

from scripts.model_table import README, with_table


def test_the_readme_lists_every_architecture_as_it_is() -> None:
    text = README.read_text()
    assert with_table(text) == text, "run python -m scripts.model_table"
