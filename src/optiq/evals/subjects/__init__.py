"""Models under test: a directory in process, or an OpenAI-compatible URL."""
