"""The metadata block of cards, and licences."""

import pytest

from optiq.metadata import block, license_of, read_block


def test_a_block_is_read_back(tmp_path):
    fields = {"base_model": "org/x", "license": "mit", "tags": ["mlx", "yes"], "name": "ü: #"}
    card = tmp_path / "README.md"
    card.write_text(f"---\n{block(fields | {'empty': None})}\n---\n\n# x\n---\nnot: this\n")
    assert read_block(card) == fields


@pytest.mark.parametrize(
    "text",
    [
        "# no block\n---\na: 1\n---\n",
        "---\n: : [\n---\n",
        "---\n- a\n---\n",
        "---\nopen: true\n",
        "",
        "---\n!!python/object/apply:os.getcwd []\n---\n",
    ],
)
def test_what_is_no_block_is_empty(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_block(tmp_path / "README.md") == {}
    assert license_of(tmp_path) == {}


def test_no_card_at_all(tmp_path):
    assert read_block(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_bytes(b"---\n\xff\xfe\n---\n")
    assert read_block(tmp_path / "README.md") == {}


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")
    assert license_of(tmp_path) == {"license": "mit"}


def test_the_card_wins_over_the_file(tmp_path):
    (tmp_path / "LICENSE").write_text("MIT License\n\nCopyright (c) 2026\n")
    assert license_of(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: en\n---\n"
    )
    assert license_of(tmp_path) == {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
    }


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("\n      Apache License\n   Version 2.0, January 2004\n http://", "apache-2.0"),
        ("MIT License\n\nPermission is hereby granted, free of charge", "mit"),
        ("Gemma Terms of Use\n\nLast modified", "gemma"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2", "llama3.2"),
        ("This is not the MIT License\nCopyright", None),
        ("Some terms of our own", None),
    ],
)
def test_licences_known_by_their_first_words(tmp_path, text, name):
    (tmp_path / "LICENSE.txt").write_text(text)
    assert license_of(tmp_path) == ({"license": name} if name else {})
