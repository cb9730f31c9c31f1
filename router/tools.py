"""The tools that a request offers, and what it asks of their calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.config import ModelConfig
from actors.text.chat_template import function_tool
from actors.text.tokenizer import RoleTokenizer
from actors.text.tool_formats import ToolFormat
from router.backend import BadRequest
from router.schema import AllowedToolChoice, ChatRequest, Conversation, FunctionBody, NamedTool
from router.tool_parser import ToolParser

MAX_BYTES = 64 << 10  # of all tools of a request as JSON


@dataclass(frozen=True)
class ToolUse:
    """The functions of a request, and how they may be called.

    required: the answer must be calls. named: the one function that must be called. parallel: the answer may have
    several calls. form: how the model that answers writes calls.
    """

    functions: tuple[FunctionBody, ...]
    form: ToolFormat
    required: bool = False
    named: str | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[FunctionBody, ...]:
        """The functions that may be called."""
        return tuple(function for function in self.functions if self.named in (None, function.name))

    def shown(self) -> list[dict[str, Any]]:
        """The functions as chat templates read them."""
        return [function_tool(one.name, one.description or "", one.parameters) for one in self.functions]

    def parser(self) -> ToolParser:
        """A parser of one answer."""
        most = None if self.parallel and not self.named else 1
        return ToolParser(self.form, [function.name for function in self.callable], most)

    def marks(self, tokenizer: RoleTokenizer) -> tuple[int, ...]:
        """Ids of the special tokens that belong to calls."""
        return tuple(tokenizer.added_tokens[mark] for mark in self.form.marks if mark in tokenizer.added_tokens)


def tool_use(request: Conversation, model: ModelConfig, tokenizer: RoleTokenizer) -> ToolUse | None:
    """The tools that a request offers to a model; None if it offers none, or if none may be called.

    Raises BadRequest.
    """
    functions, choice = [tool.function for tool in request.tools or ()], request.tool_choice
    _check(functions)
    if not functions and choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice asks for a call, and there are no tools: send tools", param="tool_choice")
    if not functions or choice == "none":
        return None
    required, named = choice == "required", None
    if isinstance(choice, NamedTool):
        required, named = True, choice.function.name
        _require_names([named], functions)
    elif isinstance(choice, AllowedToolChoice):
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        _require_names(sorted(allowed), functions)
        functions = [function for function in functions if function.name in allowed]
        required = choice.allowed_tools.mode == "required"
    parallel = request.parallel_tool_calls if isinstance(request, ChatRequest) else True
    return ToolUse(tuple(functions), tokenizer.tool_format(model.tool_parser), required, named, parallel)


def _check(functions: Sequence[FunctionBody]) -> None:
    names = [function.name for function in functions]
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise BadRequest(f"two tools have the name {twice}: give each its own", param="tools")
    size = sum(len(json.dumps(function.model_dump())) for function in functions)
    if size > MAX_BYTES:
        raise BadRequest(f"the tools have {size} bytes, at most {MAX_BYTES} are taken", param="tools")


def _require_names(names: Sequence[str], functions: Sequence[FunctionBody]) -> None:
    known = {function.name for function in functions}
    if missing := [name for name in names if name not in known]:
        raise BadRequest(f"tool_choice names {missing[0]}, which is not among the tools", param="tool_choice")
