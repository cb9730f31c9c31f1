"""Addresses of vLLM's server that this service does not offer, and what to use instead."""

from __future__ import annotations

_CHAT = "use POST /v1/chat/completions"
_BATCH = "send one POST /v1/chat/completions for each conversation, at the same time"
_TOKENIZE = "POST /tokenize returns a prompt's tokens, and POST /v1/completions takes them as prompt"
_DETOKENIZE = "POST /detokenize returns the text of tokens"
_PROMPT_LOGPROBS = "POST /v1/completions with echo, logprobs and max_tokens: 0 scores texts"
_TEXT_ONLY = "the models generate text only; use a model that is made for this"
_OPERATOR = "this is the operator's work: see docs/operations.md"
_CONFIG = "models and adapters are set in ray_config.yaml"

# Also for the addresses below each one.
NOT_OFFERED: dict[str, str] = {
    "/v1/responses": _CHAT,
    "/v1/messages": _CHAT,
    "/v1/messages/count_tokens": "POST /tokenize returns the count of a conversation's tokens",
    "/v1/messages/render": _TOKENIZE,
    "/v1/chat/completions/batch": _BATCH,
    "/v1/chat/completions/render": _TOKENIZE,
    "/v1/chat/completions/derender": _DETOKENIZE,
    "/v1/completions/render": _TOKENIZE,
    "/v1/completions/derender": _DETOKENIZE,
    "/v2/chat": _CHAT,
    "/invocations": "use POST /v1/chat/completions or POST /v1/completions",
    "/ping": "use GET /health",
    "/load": "GET /metrics has the load",
    "/inference/v1/generate": "POST /v1/completions takes tokens, and with return_token_ids returns tokens",
    "/generative_scoring": _PROMPT_LOGPROBS,
    "/tokenizer_info": "POST /tokenize and POST /detokenize use the tokenizer",
    "/score": _PROMPT_LOGPROBS,
    "/v1/score": _PROMPT_LOGPROBS,
    "/rerank": _TEXT_ONLY,
    "/v1/rerank": _TEXT_ONLY,
    "/v2/rerank": _TEXT_ONLY,
    "/v1/embeddings": _TEXT_ONLY,
    "/v2/embed": _TEXT_ONLY,
    "/pooling": _TEXT_ONLY,
    "/classify": _TEXT_ONLY,
    "/v1/audio": _TEXT_ONLY,
    "/v1/realtime": _TEXT_ONLY,
    "/v1/load_lora_adapter": _CONFIG,
    "/v1/unload_lora_adapter": _CONFIG,
    "/docs": "GET /openapi.json describes the API",
    "/redoc": "GET /openapi.json describes the API",
    "/abort_requests": "close a request's connection to end it",
    "/server_info": _OPERATOR,
    "/start_profile": _OPERATOR,
    "/stop_profile": _OPERATOR,
    "/reset_prefix_cache": _OPERATOR,
    "/reset_mm_cache": _OPERATOR,
    "/reset_encoder_cache": _OPERATOR,
    "/sleep": _OPERATOR,
    "/wake_up": _OPERATOR,
    "/is_sleeping": _OPERATOR,
    "/pause": _OPERATOR,
    "/resume": _OPERATOR,
    "/is_paused": _OPERATOR,
    "/collective_rpc": _OPERATOR,
    "/scale_elastic_ep": _OPERATOR,
    "/is_scaling_elastic_ep": _OPERATOR,
    "/fault_tolerance": _OPERATOR,
    "/init_weight_transfer_engine": _CONFIG,
    "/start_weight_update": _CONFIG,
    "/start_draft_weight_update": _CONFIG,
    "/update_weights": _CONFIG,
    "/finish_weight_update": _CONFIG,
    "/update_weight_version": _CONFIG,
    "/weight_info": _CONFIG,
    "/get_world_size": _OPERATOR,
}


def advice(path: str) -> str:
    """Advice that names the address to use instead of one that does not exist."""
    parts = path.split("/")
    for length in range(len(parts), 1, -1):
        if (above := "/".join(parts[:length])) in NOT_OFFERED:
            return NOT_OFFERED[above]
    return "GET /openapi.json lists the addresses"
