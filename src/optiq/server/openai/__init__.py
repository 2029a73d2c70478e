"""OpenAI's protocol: chat, completions, embeddings, models; and vLLM's tokenize and detokenize."""

from fastapi import APIRouter

from optiq.server.openai import chat, completions, embeddings, models, tokens
from optiq.server.openai.errors import error_body
from optiq.server.openai.tables import tables

__all__ = ["error_body", "router", "tables"]

router = APIRouter()
for _part in (chat, completions, embeddings, models, tokens):
    router.include_router(_part.router)
