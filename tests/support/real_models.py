"""The folders of real models, where `python -m cluster.real --fetch` has brought them.

They are looked for when this module is imported: tests run with a cache folder of their own.
"""

from __future__ import annotations

from cluster.real.models import GEMMA3, SMOLLM2, fetched

SMOLLM2_FOLDER, GEMMA3_FOLDER = fetched(SMOLLM2), fetched(GEMMA3)
NOT_FETCHED = "the real models are not here: python -m cluster.real --fetch"
