"""Prints docs/server/openai-parameters.md, which a test compares with the code."""

from optiq.server.openai.tables import markdown

if __name__ == "__main__":
    print(markdown(), end="")
