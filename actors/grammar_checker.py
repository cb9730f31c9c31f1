"""Compiles grammars for a trial, each in a short-lived process with bounded memory and time.

    python -m actors.grammar_checker      # one JSON value a line on standard input, answers on standard output

The first line is the vocabulary (`token_table`), each further one a grammar. An answer is "" if the grammar can be
used, else a sentence. This process loads the vocabulary once, and forks for each grammar. It ends when its standard
input does.

llguidance does most of its work when a mask is computed or a token is taken, so a grammar is not only compiled: random
answers are walked into it, always the same ones.
"""

from __future__ import annotations

import base64
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import threading
import time
from typing import Any, TypeAlias

import numpy as np

from actors.decoding.grammar import GrammarError, GrammarMatcher, GrammarVocabulary
from actors.text.tokenizer import RoleTokenizer

CHECK_S, CHECK_BYTES = 5.0, 1 << 30  # time of a check, and memory beside what the vocabulary takes
# Half the stack of the threads that compute masks in a coordinator, an eighth of one that compiles there.
_STACK_BYTES = 1 << 20
_WALKS, _STEPS = 2, 32  # answers that are tried, and the tokens of each

Verdict: TypeAlias = str  # "" if a grammar can be used, else what is wrong with it


def token_table(tokenizer: RoleTokenizer) -> bytes:
    """The vocabulary of a tokenizer in one line of JSON."""
    tokens = [base64.b64encode(tokenizer.token_bytes(id_)).decode() for id_ in range(tokenizer.width)]
    special = sorted(tokenizer.ids_beside_text)
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
    """The fault of a grammar, found by compiling it and walking random answers into it."""
    try:
        for seed in range(_WALKS):
            fault = _walk(vocabulary, vocabulary.matcher(grammar), random.Random(seed))
            if fault:
                return fault
    except GrammarError as error:
        return str(error)
    return ""


def _walk(vocabulary: GrammarVocabulary, matcher: GrammarMatcher, chance: random.Random) -> Verdict:
    """The fault that an answer of at most _STEPS random tokens finds. The end is taken only if it must be."""
    for _ in range(_STEPS):
        if matcher.over:
            break
        ids = np.flatnonzero(np.unpackbits(matcher.legal().view(np.uint8), bitorder="little")).tolist()
        if not ids:
            return matcher.error or "nothing satisfies it"
        token = chance.choice(ids)
        if token == vocabulary.end:
            if len(ids) == 1:
                break
            token = chance.choice([id_ for id_ in ids if id_ != vocabulary.end])
        matcher.take(token)
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
    late = not answer and time.monotonic() >= until
    if late:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if late:
        return f"it takes longer than {CHECK_S:g} s to compile: make it simpler"
    if status or not answer.endswith(b"\n"):
        deep = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
        return f"it {'is nested too deeply' if deep else 'takes too much memory'} to compile: make it simpler"
    verdict: Verdict = json.loads(answer)
    return verdict


def _run(vocabulary: GrammarVocabulary, grammar: str, writing: int) -> None:
    """Check in this process, and end it."""
    code = 1
    try:
        signal.alarm(int(CHECK_S) + 1)  # its parent may be killed before it
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):  # a panic says nothing that an operator could use, and pipes end with their process
            os.dup2(nowhere, standard)
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory()
        threading.stack_size(_STACK_BYTES)
        found: list[Verdict] = []
        thread = threading.Thread(target=lambda: found.append(verdict_of(vocabulary, grammar)))
        thread.start()
        thread.join()
        os.write(writing, json.dumps(found[0]).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _limit_memory() -> None:
    """Give this process CHECK_BYTES more than it has. Linux alone can do that."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + CHECK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


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
