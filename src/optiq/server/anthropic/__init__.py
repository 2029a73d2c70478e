"""Anthropic's protocol: `/v1/messages` and `/v1/messages/count_tokens`."""

from optiq.server.anthropic.errors import error_body
from optiq.server.anthropic.routes import router

__all__ = ["error_body", "router"]
