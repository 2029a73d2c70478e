"""docs/protocols.md says what the bodies say. As a script, it writes that page."""

from pathlib import Path

from optiq.server.tables import BODIES, markdown

PAGE = Path(__file__).parents[2] / "docs" / "protocols.md"


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text() == markdown()


def test_every_parameter_is_on_it():
    text = PAGE.read_text()
    for kind in BODIES.values():
        for name in [*kind.model_fields, *kind.without_effect, *kind.refused]:
            assert f"`{name}`" in text


if __name__ == "__main__":
    PAGE.write_text(markdown())
