"""The bodies of /tokenize and /detokenize: texts to tokens of a served model, and back."""

from __future__ import annotations

from typing import Any

from actors.api.generation import Role
from actors.config import ServiceConfig
from router.backend import BadRequest
from router.chat import Tokenizers, chat_prompt, text_prompt
from router.context import max_model_len
from router.request_planning import primary_role, resolve_model
from router.responses import Json
from router.schema import DetokenizeRequest, TokenizeChat, TokenizeText, parse
from router.tools import tool_use


def tokenize(body: Any, service: ServiceConfig, tokenizers: Tokenizers) -> Json:
    """Tokens of raw text, or of the prompt of a chat request with these messages. Raises ApiError."""
    request: TokenizeChat | TokenizeText
    if isinstance(body, dict) and "messages" in body:
        request = parse(TokenizeChat, body)
        name, role = _model(request.model, service)
        tools = tool_use(request, service.models.role(role), tokenizers[role])
        ids = chat_prompt(request, (role,), tokenizers, service.thinking, tools=tools).ids[role]
    else:
        request = parse(TokenizeText, body)
        name, role = _model(request.model, service)
        ids = text_prompt(request.prompt, (role,), tokenizers, special=request.add_special_tokens).ids[role]
    return {
        "count": len(ids),
        "max_model_len": max_model_len(service, tokenizers, name),
        "tokens": ids,
        "token_strs": tokenizers[role].pieces(ids) if request.return_token_strs else None,
    }


def detokenize(body: Any, service: ServiceConfig, tokenizers: Tokenizers) -> Json:
    """Text of tokens, special ones included. Raises ApiError."""
    request = parse(DetokenizeRequest, body)
    own = tokenizers[_model(request.model, service)[1]]
    for id_ in request.tokens:
        if not 0 <= id_ < own.width:
            raise BadRequest(f"token id {id_} is outside the vocabulary of {own.width} ids", param="tokens")
    return {"prompt": own.decode(request.tokens, skip_special=False)}


def _model(requested: str | None, service: ServiceConfig) -> tuple[str, Role]:
    name = requested or service.name
    return name, primary_role(resolve_model(service, name))
