"""The forms in which models write tool calls, and which of them a chat template belongs to.

A form is described twice: as it is written, for grammars and descriptions, and as it is read, which takes more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.config import ToolParserName

NAME_PATTERN = r"[a-zA-Z0-9_.-]{1,64}"  # names of functions
_BEGIN, _END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_ALL_BEGIN, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK = (_ALL_BEGIN, _BEGIN, _SEPARATOR, _END, _ALL_END)


@dataclass(frozen=True)
class ToolFormat:
    """One form of tool calls.

    Written: one of `openings`, calls with `separator` between them, `closing`. A call is `call` with the function's
    name in place of NAME and JSON in place of ARGUMENTS. marks: the parts of all these that may be special tokens.

    Read: a call begins with one of `begins` anywhere in the content, or with one of `bare` at its beginning, or with
    one of `again` behind another call. header: matches the text from there to the JSON, with the group `name` if the
    name stands there; otherwise the JSON has it. rest: texts behind a call that are no content.
    """

    name: ToolParserName
    call: str
    marks: tuple[str, ...] = ()
    openings: tuple[str, ...] = ("",)
    separator: str = ""
    closing: str = ""
    begins: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    header: re.Pattern[str] = re.compile(r"\s*")
    rest: tuple[str, ...] = ()

    def write(self, name: str, arguments: str) -> str:
        """One call. arguments: JSON."""
        before, after = self.call.split("ARGUMENTS")
        return before.replace("NAME", name) + arguments + after

    def write_all(self, calls: Sequence[tuple[str, str]]) -> str:
        """Several calls, each as its function's name and its arguments as JSON."""
        return self.openings[0] + self.separator.join(self.write(*call) for call in calls) + self.closing


def _named(header: str) -> re.Pattern[str]:
    return re.compile(header.replace("NAME", f"(?P<name>{NAME_PATTERN})"))


_MISTRAL_HEADER = _named(  # some models repeat the mark
    r"(?:\s*\[TOOL_CALLS\])*(?:\s*\[?\s*|\s*NAME\s*(?:\[CALL_ID\]\s*\w*)?\s*(?:\[ARGS\])?\s*)"
)
_DEEPSEEK_HEADER = _named(
    rf"\s*(?:{_BEGIN})?\s*(?:function\s*{_SEPARATOR})?\s*NAME\s*(?:{_SEPARATOR})?\s*(?:```json)?\s*"
)
_JSON_CALL = '{"name": "NAME", "arguments": ARGUMENTS}'

FORMATS: dict[ToolParserName, ToolFormat] = {
    each.name: each
    for each in (
        ToolFormat(
            "hermes",
            call=f"<tool_call>\n{_JSON_CALL}\n</tool_call>",
            marks=("<tool_call>", "</tool_call>"),
            separator="\n",
            begins=("<tool_call>",),
            rest=("</tool_call>",),
        ),
        ToolFormat(
            "llama3_json",
            call='{"name": "NAME", "parameters": ARGUMENTS}',
            marks=("<|python_tag|>",),
            separator="; ",
            begins=("<|python_tag|>",),
            bare=("{",),
            again=("{",),
            rest=(";",),
        ),
        ToolFormat(
            "mistral",
            call=_JSON_CALL,
            marks=("[TOOL_CALLS]",),
            openings=("[TOOL_CALLS] [", "[TOOL_CALLS]["),
            separator=", ",
            closing="]",
            begins=("[TOOL_CALLS]",),
            again=("{",),
            header=_MISTRAL_HEADER,
            rest=("[", "]", ","),
        ),
        ToolFormat(
            "mistral_args",
            call="[TOOL_CALLS]NAME[ARGS]ARGUMENTS",
            marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
            begins=("[TOOL_CALLS]",),
            again=("{",),
            header=_MISTRAL_HEADER,
            rest=("[", "]", ","),
        ),
        ToolFormat(
            "deepseek_v3",
            call=f"{_BEGIN}function{_SEPARATOR}NAME\n```json\nARGUMENTS\n```{_END}",
            marks=_DEEPSEEK,
            openings=(_ALL_BEGIN,),
            separator="\n",
            closing=_ALL_END,
            begins=(_ALL_BEGIN, _BEGIN),
            header=_DEEPSEEK_HEADER,
            rest=("```", _END, _ALL_END),
        ),
        ToolFormat(
            "deepseek_v31",
            call=f"{_BEGIN}NAME{_SEPARATOR}ARGUMENTS{_END}",
            marks=_DEEPSEEK,
            openings=(_ALL_BEGIN,),
            closing=_ALL_END,
            begins=(_ALL_BEGIN, _BEGIN),
            header=_DEEPSEEK_HEADER,
            rest=("```", _END, _ALL_END),
        ),
        ToolFormat(
            "json",
            call=_JSON_CALL,
            openings=("[",),
            separator=", ",
            closing="]",
            bare=("{", "["),
            again=("{",),
            header=re.compile(r"\s*\[?\s*"),
            rest=("[", "]", ","),
        ),
    )
}
_OTHER_XML = ("<function=", "<arg_key>")  # forms around <tool_call> that are not JSON


def find_format(template: str) -> ToolFormat | None:
    """The form of the calls that a chat template writes, by its text; None if it writes none that is known."""
    name: ToolParserName | None = None
    if _ALL_BEGIN in template:
        name = "deepseek_v3" if "```json" in template else "deepseek_v31"
    elif "[TOOL_CALLS]" in template:
        name = "mistral_args" if "[ARGS]" in template else "mistral"
    elif "<tool_call>" in template and not any(mark in template for mark in _OTHER_XML):
        name = "hermes"
    elif re.search(r'\{"name": .*"parameters":', template, re.DOTALL):
        name = "llama3_json"
    return FORMATS[name] if name else None
