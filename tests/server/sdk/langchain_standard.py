"""The standard chat-model tests of LangChain against a running server.

    python -m venv lc
    lc/bin/pip install langchain-tests==1.1.9 langchain-openai==1.7.4 pytest pytest-asyncio
    optiq serve --model GEMMA4 --port 8080 --alias '*'
    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none lc/bin/python -m pytest \\
        -o asyncio_mode=auto -o asyncio_default_test_loop_scope=session \\
        -o asyncio_default_fixture_loop_scope=session tests/server/sdk/langchain_standard.py

A model that is offered tools and reads images is needed. What it says is of no concern: calls and
JSON are enforced by grammars, and a bias on the tokens that end a string makes up for a model that
would never end one. Tests that need knowledge, or pictures from elsewhere, are marked with the
reason. optiq itself is not imported.
"""

import functools

import openai
import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

BIAS = 30.0

needs_knowledge = pytest.mark.xfail(
    reason="the model has to know what is asked of it; a small one calls with other values",
    strict=False,
)


@functools.cache
def ends_of_strings():
    """Tokens that end a string, in JSON and in calls of Gemma-4, with a bias."""
    found = {}
    for text in ('"', '<|"|>'):
        body = {"prompt": f"a {text}"}
        client = openai.OpenAI()
        root = str(client.base_url).rstrip("/").removesuffix("/v1")
        reply = client.post(f"{root}/tokenize", body=body, cast_to=dict[str, object])
        found[str(reply["tokens"][-1])] = BIAS
    return found


class TestOptiq(ChatModelIntegrationTests):
    """ChatOpenAI, unchanged, at our address."""

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "default_model",
            "temperature": 0,
            "max_tokens": 256,
            "max_retries": 0,
            "stream_usage": True,
            "logit_bias": ends_of_strings(),
        }

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_image_inputs(self):
        return False  # they are fetched from elsewhere by the tests

    @needs_knowledge
    def test_tool_calling(self, model):
        super().test_tool_calling(model)

    @needs_knowledge
    async def test_tool_calling_async(self, model):
        await super().test_tool_calling_async(model)

    @needs_knowledge
    def test_agent_loop(self, model):
        super().test_agent_loop(model)

    @needs_knowledge
    def test_structured_output_pydantic_2_v1(self, model):
        super().test_structured_output_pydantic_2_v1(model)

    @needs_knowledge
    def test_json_mode(self, model):
        super().test_json_mode(model)

    @needs_knowledge
    def test_unicode_tool_call_integration(self, model):
        super().test_unicode_tool_call_integration(model)


ends_of_strings()  # before a test records what is asked
