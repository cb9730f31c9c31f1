"""Compiles grammars that nobody has compiled yet, each in a process of its own with little memory and time.

    python -m actors.grammar_checker      # one JSON value a line on standard input, answers on standard output

The first line is the vocabulary (`token_table`), each further one a grammar. An answer is "" if the grammar can be
used, else a sentence. This process loads the vocabulary once, and forks for each grammar.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, TypeAlias

from actors.decoding.grammar import GrammarError, GrammarVocabulary
from actors.text.tokenizer import RoleTokenizer

CHECK_S, CHECK_BYTES = 5.0, 1 << 30  # time of a check, and memory beside what the vocabulary takes
_STEPS = 8  # tokens that are tried after the beginning

Verdict: TypeAlias = str  # "" if a grammar can be used, else what is wrong with it


def token_table(tokenizer: RoleTokenizer) -> bytes:
    """The vocabulary of a tokenizer in one line of JSON."""
    tokens = [base64.b64encode(tokenizer.token_bytes(id_)).decode() for id_ in range(tokenizer.width)]
    special = sorted({*tokenizer.special_ids, *tokenizer.added_tokens.values(), *tokenizer.eos_ids})
    return json.dumps({"tokens": tokens, "special": special, "ends": list(tokenizer.eos_ids)}).encode()


def _vocabulary(table: dict[str, Any]) -> GrammarVocabulary:
    tokens = [base64.b64decode(token) for token in table["tokens"]]
    text_ids = sorted(set(range(len(tokens))) - set(table["special"]))
    single = {tokens[id_]: id_ for id_ in text_ids if len(tokens[id_]) == 1}
    return GrammarVocabulary(
        tokens,
        table["special"],
        table["ends"],
        sorted(set(range(len(tokens))) - set(table["ends"][1:])),
        # How text is split into tokens does not decide whether a grammar can be compiled.
        lambda text: [single[text[at : at + 1]] for at in range(len(text)) if text[at : at + 1] in single],
    )


def verdict_of(vocabulary: GrammarVocabulary, grammar: str) -> Verdict:
    """What is wrong with a grammar, by compiling it and walking a few tokens into it."""
    try:
        matcher = vocabulary.matcher(grammar)
        for _ in range(_STEPS):
            if matcher.over:
                break
            legal = matcher.legal()
            at = legal.nonzero()[0]
            if not len(at):
                return "nothing satisfies it"
            word = int(at[0])
            bits = int(legal[word]) & 0xFFFFFFFF
            token = 32 * word + (bits & -bits).bit_length() - 1
            if token == vocabulary.end:
                break
            matcher.take(token)
    except GrammarError as error:
        return str(error)
    return ""


def check(vocabulary: GrammarVocabulary, grammar: str) -> Verdict:
    """The verdict of a process that ends afterwards, or that this one ends after CHECK_S."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _run(vocabulary, grammar, writing)
    os.close(writing)
    answer, until = b"", time.monotonic() + CHECK_S
    while (left := until - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            break
        answer += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and time.monotonic() >= until:
        return f"it takes longer than {CHECK_S:g} s to compile: make it simpler"
    if status or not answer.endswith(b"\n"):
        return "it takes too much memory to compile: make it simpler"
    verdict: Verdict = json.loads(answer)
    return verdict


def _run(vocabulary: GrammarVocabulary, grammar: str, writing: int) -> None:
    """Check in this process, and end it."""
    code = 1
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + CHECK_BYTES, used + CHECK_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic says nothing that an operator could use
        os.write(writing, json.dumps(verdict_of(vocabulary, grammar)).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    table = sys.stdin.readline()
    if not table:
        return
    vocabulary = _vocabulary(json.loads(table))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(check(vocabulary, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
