"""An agent on the embedded trio: it looks facts up by tool calls, then answers as JSON.

    python -m cluster.demo.agent [--url http://127.0.0.1:8000] [--hops 2]      # while `make serve` runs

The tiny models were never trained on tools, so they call with any people and relations. Grammars make each call and the
answer valid all the same: this shows the form of an agent, not its wits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import httpx

from cluster.demo.task import PEOPLE, RELATIONS, fact, questions

LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks up who a person's mentor, rival, neighbour or doctor is.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"person": {"enum": list(PEOPLE)}, "relation": {"enum": list(RELATIONS)}},
            "required": ["person", "relation"],
            "additionalProperties": False,
        },
    },
}
ANSWER: dict[str, Any] = {
    "json": {
        "type": "object",
        "properties": {"person": {"enum": list(PEOPLE)}},
        "required": ["person"],
        "additionalProperties": False,
    },
    "disable_any_whitespace": True,  # models as small as these may write nothing else
}


def lookup(person: str, relation: str) -> str:
    """The person to whom a relation leads from `person`. Raises KeyError for a person or relation that is unknown."""
    return fact(relation, person).value


def run(client: httpx.Client, question: str, calls: int) -> str:
    """Answer a question after so many calls of the tool; prints each. Returns the person in the answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for _ in range(calls):
        message = _ask(client, messages, tools=[LOOKUP], tool_choice="required", parallel_tool_calls=False)
        (call,) = message["tool_calls"]
        found = lookup(**json.loads(call["function"]["arguments"]))
        print(f"lookup({call['function']['arguments']}) -> {found}")
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": found}]
    answer = json.loads(_ask(client, messages, structured_outputs=ANSWER)["content"])
    person: str = answer["person"]
    return person


def _ask(client: httpx.Client, messages: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 200, "temperature": 0, **fields}
    response = client.post("/v1/chat/completions", json=body, timeout=300).raise_for_status()
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask one question of the embedded task. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.demo.agent", description="An agent on the embedded trio.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service")
    parser.add_argument("--hops", type=int, default=2, help="relations in the question, and calls of the tool")
    options = parser.parse_args(arguments)
    (question,) = questions("held_out", options.hops, 1)
    print(question.text)
    with httpx.Client(base_url=options.url) as client:
        print(f"answer: {run(client, question.text, options.hops)}")
    print(f"(right: {question.answer}; the models were never trained on tools, so only the form is sure)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
