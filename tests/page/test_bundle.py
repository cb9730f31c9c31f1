"""ES modules are joined into one script by a rule, and whatever breaks the rule is refused by name."""

from __future__ import annotations

import pytest

from cluster.page.bundle import BundleError, bundle

LEAF = "const hidden = 1;\nexport const shown = hidden;\n"


def test_importers_come_after_what_they_import() -> None:
    modules = {
        "a.js": 'import { b } from "./b.js";\nimport "./c.js";\n',
        "b.js": "export function b() {}\n",
        "c.js": "",
    }
    script = bundle(modules, "a.js")
    assert script.index("const $b ") < script.index("const $a ")
    assert script.index("const $c ") < script.index("const $a ")
    assert "const { b } = $b;" in script
    assert "return { b };" in script


def test_every_kind_of_export_is_returned() -> None:
    kinds = ("const a = 1;", "class b {}", "function c() {}", "async function d() {}", "function* e() {}")
    script = bundle({"a.js": "\n".join(f"export {kind}" for kind in kinds)}, "a.js")
    assert "return { a, b, c, d, e };" in script
    assert "export" not in script


def test_a_module_that_is_not_imported_is_left_out() -> None:
    assert "hidden" not in bundle({"a.js": "", "leaf.js": LEAF}, "a.js")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ('import { shown as other } from "./leaf.js";', "import { shown as other }"),
        ('import leaf from "./leaf.js";', "import leaf"),
        ('const leaf = await import("./leaf.js");', "import("),
        ("const here = import.meta.url;", "import.meta.url"),
        ("export default 1;", "export default"),
        ("export let moving = 1;", "export let"),
        ("const a = 1;\nexport { a };", "export { a }"),
        ('import { missing } from "./leaf.js";', "imports missing, which leaf.js does not export"),
        ('import { a } from "./absent.js";', "absent.js"),
        ('import "./a.js";', "a.js -> a.js"),
    ],
)
def test_a_module_that_breaks_the_rule_is_refused_by_name(source: str, named: str) -> None:
    with pytest.raises(BundleError, match=r"a\.js|absent\.js") as refused:
        bundle({"a.js": source, "leaf.js": LEAF}, "a.js")
    assert named in str(refused.value)
