"""Pieces of a page: escaped text, tables, figures, the style. The page needs no other file, no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from train.report.compare import Difference
from train.report.groups import Stat
from train.report.plots import DARK, LIGHT, NAMES

NONE = "–"  # a figure that is not there
# A browser loads nothing for the page and runs no script in it, whatever a run's files brought into it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: object) -> str:
    """Anything as escaped text; None as NONE, lone surrogates (of a file name) as question marks."""
    return NONE if value is None else escape(str(value).encode("utf-8", "replace").decode())


def name(value: str) -> str:
    """A name of a run or recipe as escaped text that may be broken after its separators."""
    return text(value).replace("_", "_<wbr>").replace("-", "-<wbr>")


def percent(found: Stat | None, digits: int = 2) -> str:
    """A mean of shares in percent, with its standard deviation."""
    return plain(None if found is None else Stat(100 * found.mean, None if found.sd is None else 100 * found.sd, found.n), digits)


def plain(found: Stat | None, digits: int = 0) -> str:
    """A mean, with its standard deviation."""
    if found is None:
        return NONE
    return f"{found.mean:,.{digits}f}" + ("" if found.sd is None else f" ± {found.sd:,.{digits}f}")


def points(found: Difference | None) -> str:
    """A difference of shares in percentage points, with half of its 95% interval."""
    if found is None:
        return NONE
    return f"{100 * found.mean:+.2f}".replace("-", "−") + ("" if found.half is None else f" ± {100 * found.half:.2f}")


def table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", left: Sequence[int] = (0,)) -> str:
    """A table that scrolls in a box of its own.

    Args:
        name: for those who cannot see it.
        heads: column heads, text.
        rows: cells, HTML; the first of a row is its head.
        caption: below the table, HTML.
        left: columns of words; all others are figures, to the right.
    """
    kind = [' class="w"' if place in left else ' class="n"' for place in range(len(heads))]
    head = "".join(f'<th scope="col"{look}>{text(words)}</th>' for words, look in zip(heads, kind))
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(
        f"<td{look}>{cell}</td>" for cell, look in zip(row[1:], kind[1:], strict=True)) + "</tr>" for row in rows)
    below = f'<p class="note">{caption}</p>' if caption else ""
    return (f'<div class="scroll" role="region" aria-label="{text(name)}" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>{below}")


def pairs(found: Iterable[tuple[str, object]]) -> str:
    """Names and values, a line each."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in found) + "</dl>"


def figure(inner: str, caption: str) -> str:
    """A chart or picture (HTML) over its caption (HTML)."""
    return f"<figure>{inner}<figcaption>{caption}</figcaption></figure>"


def image(data: bytes, alt: str, kind: str = "png", look: str = "") -> str:
    """A picture inside the page."""
    mark = f' class="{look}"' if look else ""
    return f'<img{mark} alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def section(name: str, title: str, *inner: str) -> str:
    """A part of the page, with an anchor."""
    return f'<section id="{name}"><h2>{text(title)}</h2>\n' + "\n".join(inner) + "\n</section>"


def folded(title: str, *inner: str) -> str:
    """What is shown when asked for. `title` is HTML."""
    return f"<details><summary>{title}</summary>\n" + "\n".join(inner) + "\n</details>"


def page(title: str, parts: Iterable[tuple[str, str, str]], head: str) -> str:
    """The whole page: (anchor, title, HTML of the section) of each part, under `head` (HTML)."""
    parts = list(parts)
    links = " ".join(f'<a href="#{name}">{text(words)}</a>' for name, words, _ in parts)
    body = "\n".join(inner for _, _, inner in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
{_style()}</style>
</head>
<body>
<header><h1>{text(title)}</h1>
{head}
<nav>{links}</nav></header>
<main>
{body}
</main>
</body>
</html>
"""


def _style() -> str:
    """The style sheet."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in zip(NAMES, look)) for look in (LIGHT, DARK))
    return (f":root{{color-scheme:light dark;--back:#ffffff;--box:#f4f5f6;--link:#005a9c;{light}}}\n"
            f"@media (prefers-color-scheme:dark){{:root{{--back:#17191b;--box:#222528;--link:#7cc4ff;{dark}}}}}\n{_RULES}")


_RULES = """\
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--back);color:var(--ink);font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.2em 0}
h2{font-size:1.25rem;margin:2.2em 0 .5em;padding-top:.4em;border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:1.4em 0 .3em}
h1,h2,h3,p,summary,dd,figcaption,li{overflow-wrap:anywhere}
a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin-top:.8rem}
p{max-width:50rem}
.note,figcaption{font-size:.85rem;opacity:.85}
.warn{border-left:4px solid var(--c1);padding:.3rem .7rem;background:var(--box)}
ul.warn{padding-left:1.8rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{vertical-align:bottom;background:var(--box)}
tbody th{font-weight:600;min-width:7rem;max-width:16rem;overflow-wrap:break-word;position:sticky;left:0;background:var(--back)}
td{min-width:3.5rem}
td.w{min-width:7rem}
td.w:last-child{min-width:11rem}
thead th:first-child{position:sticky;left:0}
details tbody th{background:var(--box)}
.n{text-align:right}
td.n{white-space:nowrap}
dl{display:grid;grid-template-columns:minmax(6rem,max-content) minmax(0,1fr);gap:.15rem .8rem;margin:.6em 0;font-size:.9rem}
dt{opacity:.8}
dd{margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem;align-items:start}
figure{margin:0}
svg.chart,img{display:block;width:100%;height:auto}
svg.chart *{stroke-linejoin:round;stroke-linecap:butt}
svg.chart{max-width:34rem}
img{max-width:60rem}
img.pixels{image-rendering:pixelated}
pre{overflow-x:auto;background:var(--box);padding:.6rem;font-size:.8rem;line-height:1.35}
code,.hash{font-family:ui-monospace,monospace;font-size:.85em}
details{margin:.4rem 0;padding:.3rem .6rem;background:var(--box);border-radius:.3rem}
details details{padding-left:0}
summary{cursor:pointer}
@media (max-width:600px){
td.w:last-child{min-width:18rem}
tbody th{max-width:9rem;hyphens:auto}
dl{grid-template-columns:minmax(0,1fr);gap:0}
dd{margin:0 0 .4em}
}
"""
