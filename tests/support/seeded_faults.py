"""Applies known faults to a copy of the repository, one at a time, and reports which test tier catches each.

    python -m tests.support.seeded_faults [--only NAME ...]

Each fault replaces one piece of code. `tests` names the modules that are run against it, first those of the gate
(`make test`), then those of the second tier (`make test-all`). A fault is caught when a test fails, or hangs for 90 s.
The command exits with 1 unless every fault is caught, and the gate alone catches at least GATE_CATCHES.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GATE_CATCHES = 24
DEADLINE_S = 900  # one run of the tests named by a fault


@dataclass(frozen=True, slots=True)
class SeededFault:
    """One replacement of `code` by `fault` in a file of the product, and the tests that should notice it."""

    name: str
    file: str
    code: str
    fault: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Change the file under `root`. Raises ValueError unless `code` stands there exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.code) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.code)} places with {self.code!r}, not 1")
        path.write_text(text.replace(self.code, self.fault), encoding="utf-8")


def fault(name: str, file: str, code: str, changed: str, *tests: str) -> SeededFault:
    return SeededFault(name, file, code, changed, tests)


FAULTS = (
    # The method.
    fault(
        "guidance-has-the-wrong-sign",
        "actors/decoding/kernels.py",
        "delta = logits[1, row, place] - logits[2, row, place]",
        "delta = logits[2, row, place] - logits[1, row, place]",
        "tests/decoding",
    ),
    fault(
        "a-missing-id-gets-no-neutral-delta",
        "actors/decoding/kernels.py",
        "delta = sums[1, row] - sums[2, row]",
        "delta = 0.0",
        "tests/decoding",
    ),
    fault(
        "warm-up-lasts-one-token-longer",
        "actors/api/guidance.py",
        "generated < self.warmup_tokens",
        "generated <= self.warmup_tokens",
        "tests/api",
    ),
    fault(
        "negative-logits-are-divided-by-the-repetition-penalty",
        "actors/decoding/kernels.py",
        "if z[place] > 0 else z[place] * spec.repetition",
        "if z[place] > 0 else z[place] / spec.repetition",
        "tests/decoding",
    ),
    fault(
        "top-p-drops-the-token-that-reaches-it",
        "actors/decoding/kernels.py",
        "stays = rank < kept and (before < spec.top_p * lower",
        "stays = rank < kept and (reached < spec.top_p * lower",
        "tests/decoding",
    ),
    fault(
        "noise-ignores-the-position",
        "actors/decoding/kernels.py",
        "(np.uint64(position) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))",
        "(np.uint64(0) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))",
        "tests/decoding",
    ),
    fault(
        "a-stop-text-is-shown-before-it-is-complete",
        "actors/decoding/answer.py",
        "default=1) - 1",
        "default=1) - 2",
        "tests/decoding",
    ),
    fault(
        "a-replaced-tail-counts-as-held",
        "actors/decoding/stream.py",
        "self.held = min(self.held, keep)",
        "self.held = min(self.held, len(self.tokens) + length)",
        "tests/decoding",
    ),
    fault(
        "retokenized-text-keeps-one-token-too-few",
        "actors/decoding/cross_vocab/retokenizer.py",
        "return before - kept, self._since(kept)",
        "return before - kept, self._since(kept)[1:]",
        "tests/decoding",
    ),
    # The coordinator.
    fault(
        "a-row-behind-a-rejected-draft-is-used",
        "actors/coordinator/session.py",
        "if len(stream) != length or stream.hash_before(length) != self.hashes[role][read]:",
        "if len(stream) != length:",
        "tests/coordinator/test_speculation.py",
    ),
    fault(
        "rows-are-never-widened",
        "actors/coordinator/verification.py",
        "if max_unseen_mass < 1:",
        "if False:",
        "tests/coordinator/test_states.py",
        "tests/benchmarks/test_fidelity.py",
    ),
    fault(
        "a-lost-cache-is-not-sent-again",
        "actors/coordinator/exchange.py",
        "stream.lose(min(held, len(stream) - 1))",
        "stream.lose(len(stream) - 1)",
        "tests/coordinator/test_recovery.py",
    ),
    fault(
        "the-admission-queue-has-no-limit",
        "actors/coordinator/admission.py",
        "return len(self._queue) >= config.max_waiting + places",
        "return len(self._queue) >= 100 * config.max_waiting + places",
        "tests/coordinator/test_admission.py",
    ),
    fault(
        "a-full-cache-takes-one-more-session",
        "actors/coordinator/cache_budget.py",
        "or tokens <= self.free(replica)",
        "or self.free(replica) < tokens or tokens <= self.free(replica)",
        "tests/coordinator/test_cache_budget.py",
    ),
    # The replica and its engine.
    fault(
        "the-eldest-session-is-evicted-first",
        "actors/engine/sessions.py",
        "sorted(younger, reverse=True)",
        "sorted(younger)",
        "tests/engine/test_step_engine.py",
    ),
    fault(
        "a-token-attends-to-the-one-after-it",
        "actors/engine/backends.py",
        "mask = position <= last[..., None]",
        "mask = position <= last[..., None] + 1",
        "tests/engine/test_backends.py",
        "tests/engine/test_step_engine.py",
    ),
    fault(
        "a-fork-copies-one-token-too-few",
        "actors/engine/kv_pool.py",
        "self._copy(self.start(source), self.start(session), length)",
        "self._copy(self.start(source), self.start(session), length - 1)",
        "tests/engine/test_kv_pool.py",
    ),
    fault(
        "equal-logits-at-the-edge-are-taken-in-any-order",
        "actors/engine/rows.py",
        "for row in ambiguous.nonzero().flatten().tolist():",
        "for row in ambiguous.nonzero().flatten().tolist()[:0]:",
        "tests/engine/test_rows.py",
    ),
    fault(
        "an-old-epoch-keeps-its-lease",
        "actors/replica/leases.py",
        "if item.epoch < lease.epoch:",
        "if item.epoch < lease.epoch - 1:",
        "tests/replica",
    ),
    fault(
        "the-youngest-prompt-is-prefilled-first",
        "actors/replica/scheduler.py",
        "key=lambda scheduled: scheduled.item.age)",
        "key=lambda scheduled: -scheduled.item.age)",
        "tests/replica",
    ),
    # The wire.
    fault(
        "a-frame-that-was-altered-is-taken",
        "actors/wire/framing.py",
        "if not hmac.compare_digest(self.seal(body), frame[-MAC_BYTES:]):",
        "if self.seal(body) is None:",
        "tests/wire",
    ),
    fault(
        "a-stranger-needs-no-proof",
        "actors/wire/handshake.py",
        "if not hmac.compare_digest(expected, proof.proof):",
        "if not expected:",
        "tests/wire",
    ),
    # The service.
    fault(
        "a-silent-replica-is-never-forgotten",
        "actors/directory.py",
        "oldest = self._clock() - EXPIRY_S",
        "oldest = self._clock() - 100 * EXPIRY_S",
        "tests/test_directory.py",
    ),
    fault(
        "a-stopped-model-replica-does-not-drain",
        "actors/serve/model.py",
        "if self._heartbeats is None:",
        'if not hasattr(self, "_beat"):',
        "tests/serve/test_model_shell.py",
    ),
    fault(
        "a-model-role-is-scaled-down-at-once",
        "actors/serve/autoscaling.py",
        "min(now, _rounded_up(needed / FEWER_AT))",
        "min(now, _rounded_up(needed))",
        "tests/serve/test_autoscaling.py",
    ),
    fault(
        "an-unknown-configuration-key-is-ignored",
        "actors/config.py",
        'model_config = ConfigDict(extra="forbid", frozen=True)',
        'model_config = ConfigDict(extra="ignore", frozen=True)',
        "tests/test_config.py",
    ),
    fault(
        "a-resumed-answer-forgets-its-tokens",
        "router/failover.py",
        "+= delta.choices",
        "+= delta.choices[1:]",
        "tests/router/test_failover.py",
    ),
    fault(
        "any-key-is-let-in",
        "router/keys.py",
        "if hmac.compare_digest(key.digest, digest):",
        "if key.digest:",
        "tests/router/test_keys.py",
        "tests/router/test_auth.py",
    ),
    fault(
        "a-stream-ends-without-done",
        "router/sse.py",
        '_encode_event(last)) + b"data: [DONE]\\n\\n"',
        "_encode_event(last))",
        "tests/router/test_api.py",
        "tests/router/test_clients.py",
    ),
    # Evaluations and training.
    fault(
        "a-sample-is-kept-twice",
        "cluster/jobs/results.py",
        "if sample.key in self._done:",
        "if sample.key is None:",
        "tests/jobs/test_results.py",
    ),
    fault(
        "many-comparisons-are-not-corrected-for",
        "cluster/jobs/statistics.py",
        "ps[place] * (len(ps) - rank)",
        "ps[place]",
        "tests/jobs/test_statistics.py",
    ),
    fault(
        "spaces-in-an-exact-answer-count",
        "cluster/jobs/grading.py",
        '"exact": _same_words,',
        '"exact": str.__eq__,',
        "tests/jobs/test_grading.py",
    ),
    # Grammars.
    fault(
        "a-mask-behind-a-draft-is-stale",
        "actors/decoding/grammar.py",
        "if self._drafts and self._drafts[0] == token:",
        "if self._drafts:",
        "tests/decoding/test_grammar.py",
    ),
    fault(
        "a-grammar-begins-with-the-thinking",
        "actors/decoding/session.py",
        "return None if self._answer.thinking else self._grammar",
        "return self._grammar",
        "tests/coordinator/test_grammars.py",
    ),
    fault(
        "few-legal-ids-cost-a-whole-row",
        "actors/coordinator/verification.py",
        "few = grammar.few(MAX_LEGAL) if",
        "few = grammar.few(1) if",
        "tests/coordinator/test_grammars.py",
    ),
    fault(
        "drafts-are-not-cut-by-the-grammar",
        "actors/coordinator/exchange.py",
        "drafts = drafts[: grammar.legal_length(drafts[:before_end])]",
        "drafts = drafts[:before_end]",
        "tests/coordinator/test_grammars.py",
    ),
    fault(
        "text-of-users-becomes-special-tokens",
        "router/chat.py",
        "found[0][0] + cut + found[0][1:]",
        "found[0]",
        "tests/router/test_chat.py",
    ),
)


def copy_of_the_repository(folder: Path) -> Path:
    """The tracked files as they are in the working tree, beside a link to this virtual environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def fails(root: Path, tests: Sequence[str], tier: str) -> bool:
    """True if a test of the tier ("not slow" or "slow") among `tests` fails in the copy; False if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", tier, "--timeout", "90", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=DEADLINE_S
    )
    if done.returncode in (0, 5):  # 5: the tier has none of these tests
        return False
    if done.returncode in (1, 2):  # 2: a module could not even be imported
        return True
    raise RuntimeError(f"pytest ended with {done.returncode}: {' '.join(command)}")


def caught_by(seeded: SeededFault) -> str:
    """ "gate", "second tier" or "nothing"."""
    with tempfile.TemporaryDirectory() as folder:
        root = copy_of_the_repository(Path(folder))
        seeded.apply(root)
        if fails(root, seeded.tests, "not slow"):
            return "gate"
        return "second tier" if fails(root, seeded.tests, "slow") else "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[each.name for each in FAULTS])
    chosen = parser.parse_args().only
    results = {}
    for seeded in FAULTS:
        if seeded.name in chosen:
            results[seeded.name] = caught_by(seeded)
            print(f"{results[seeded.name]:12} {seeded.name}", flush=True)
    counts = {tier: list(results.values()).count(tier) for tier in ("gate", "second tier", "nothing")}
    print(json.dumps(counts))
    enough = counts["gate"] >= min(GATE_CATCHES, len(results))
    return 0 if enough and not counts["nothing"] else 1


if __name__ == "__main__":
    sys.exit(main())
