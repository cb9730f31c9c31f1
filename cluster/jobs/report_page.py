"""A report as one HTML page that loads nothing: styles, plots and texts are in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cluster.jobs.contrasts import Contrast
from cluster.jobs.plots import over_alpha, over_tokens
from cluster.jobs.sample import Sample
from cluster.jobs.summary import Summary, Variant
from cluster.jobs.tables import Table, completeness, tables, verdict

LONGEST = 6_000  # characters of an answer that are shown; of a longer one both ends

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --paper: #fff; --line: #d8dee4; --band: #f6f8fa;
  --right: #1a7f37; --wrong: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --paper: #0d1117; --line: #30363d;
  --band: #151b23; --right: #3fb950; --wrong: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
figure { margin: 0; max-width: 100%; }
.verdict { font-size: 1.05rem; max-width: 60rem; }
.dim, .notes { color: var(--dim); font-size: .85rem; max-width: 60rem; }
.notes p { margin: .3rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.first td { border-top: 2px solid var(--line); }
tr.guided td { background: var(--band); }
.plots { display: flex; flex-wrap: wrap; column-gap: 3rem; }
svg { max-width: 100%; height: auto; color: var(--ink); }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { padding: .5rem .8rem; cursor: pointer; }
details > div { padding: 0 .8rem .8rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; }
.sides h3 { font-size: .9rem; margin: .4rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--band); border-radius: 6px; padding: .7rem;
  margin: 0; max-height: 28rem; overflow-y: auto; font: 12.5px/1.45 ui-monospace, monospace; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
"""


def page(name: str, summary: Summary, differing: Sequence[Contrast]) -> str:
    """The whole page of a run."""
    accuracy, *others = tables(summary)
    plots = [("Accuracy against alpha", over_alpha(summary)), ("Accuracy against tokens", over_tokens(summary))]
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="verdict">{escape(verdict(summary))}</p>',
        f'<p class="dim">{escape(completeness(summary))}</p>',
        _table(accuracy),
        '<div class="plots">',
        *(f"<figure><h2>{title}</h2>\n{svg}</figure>" for title, svg in plots if svg),
        "</div>",
        *(_table(table) for table in others),
        _contrasts(differing),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows, task = [], None
    for row in table.rows:
        kinds = ["first"] * (row[0] != task) + ["guided"] * row[1].startswith("guided")
        cells = ("" if row[0] == task else row[0], *row[1:])
        task = row[0]
        rows.append(f'<tr class="{" ".join(kinds)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f'\n</tbody></table></div>\n<div class="notes">{notes}</div>'
    )


def _contrasts(differing: Sequence[Contrast]) -> str:
    if not differing:
        return ""
    return "<h2>Where guidance changed the verdict</h2>\n" + "\n".join(_contrast(contrast) for contrast in differing)


def _contrast(contrast: Contrast) -> str:
    row = contrast.problem
    outcome = '<b class="right">gained</b>' if contrast.gained else '<b class="wrong">lost</b>'
    sides = "".join(_side(variant, sample) for variant, sample in contrast.answers.items())
    return (
        f"<details><summary>{outcome} {escape(row.task)} {escape(row.problem)}</summary><div>\n"
        f"<pre>{escape(row.question)}</pre><p>Right: <b>{escape(row.answer)}</b></p>\n"
        f'<div class="sides">{sides}</div></div></details>'
    )


def _side(variant: Variant, sample: Sample) -> str:
    answer = "no answer found" if sample.extracted is None else sample.extracted
    kind = "right" if sample.right else "wrong"
    length = f"{sample.tokens:,} tokens" + (", truncated" if sample.finish == "length" else "")
    return (
        f'<section><h3>{escape(str(variant))}: <span class="{kind}">{escape(answer)}, {kind}</span> '
        f'<span class="dim">{length}</span></h3><pre>{escape(ends(sample.text))}</pre></section>'
    )


def ends(text: str, longest: int = LONGEST) -> str:
    """A text that is too long without its middle, which is said to be missing."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"
