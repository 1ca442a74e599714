"""How the backtest's page writes names and numbers, and its style sheet.

Light and dark screens and paper share one set of variables, which the charts' colours refer to as well. Everything
is told without a file, font or address from elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stocklora.metrics.scores import FORECASTERS

NAMES = {
    **FORECASTERS,
    "llm": "language model",
    "simple": "simple baseline",
    "garch": "GARCH(1,1)-t",
    "autoarima": "AutoARIMA",
    "autoets": "AutoETS",
    "autotheta": "AutoTheta",
}
DASH = "–"  # what has no meaning


def name_of(model: str) -> str:
    """A model's name in words; one that is not known keeps its key."""
    return NAMES.get(model, model)


def as_float(value: Any) -> float:
    """NaN for what is missing or has no finite value."""
    number = float("nan") if value is None else float(value)
    return number if math.isfinite(number) else float("nan")


def formatted(value: Any, decimals: int) -> str:
    """With separators of thousands and a true minus sign, never a negative zero; a dash for what is missing."""
    number = as_float(value)
    if math.isnan(number):
        return DASH
    return f"{number:z,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: Any) -> str:
    """Three decimals, as far as they tell anything."""
    return "<0.001" if as_float(value) < 0.0005 else formatted(value, 3)


def iso_date(value: Any) -> str:
    """``2025-10-31``, of anything numpy takes for a date."""
    return str(np.datetime64(value, "D"))


def days_ahead(day: int) -> str:
    """``1 day ahead``, ``2 days ahead``."""
    return f"{day} day{'s' if day > 1 else ''} ahead"


STYLE = """
:root{--ink:#1f2933;--muted:#5d6978;--grid:#e4e7eb;--rule:#cbd2d9;--paper:#fff;--shade:#f5f7fa;--model:#2f5d9b;
--walk:#9aa5b1;--down:#d1495b;--warn:#b7791f;--warn-shade:#fdf6e7}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e4e8ed;--muted:#9ba7b5;--grid:#29313a;--rule:#3c4752;
--paper:#14181d;--shade:#1b2128;--model:#77a7e6;--walk:#66727f;--down:#f2808e;--warn:#e0b25a;--warn-shade:#272116}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;max-width:1168px;padding:40px 24px 72px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.9rem;line-height:1.2;font-weight:600;letter-spacing:-.015em;margin:0 0 .4em;text-wrap:balance}
h2{font-size:1.3rem;line-height:1.3;font-weight:600;letter-spacing:-.008em;margin:0 0 .8em}
h3{font-size:1rem;font-weight:600;margin:2em 0 .7em}
h4{font-size:.83rem;font-weight:600;margin:0 0 .2em}
p,ul,dl{margin:0 0 1em}
h1,h2,h3,h4,dd,li,.lead{overflow-wrap:anywhere}
a{color:var(--model);text-underline-offset:.15em}
section{margin-top:56px}
.lead{font-size:1.06rem;color:var(--muted);max-width:54em}
.date{white-space:nowrap}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:2px 32px;
font-size:.87rem;border-top:1px solid var(--grid);padding-top:12px;margin:20px 0}
.facts div{display:flex;gap:12px;padding:2px 0}
.facts dt{flex:0 0 8.5em;color:var(--muted)}
.facts dd{margin:0;min-width:0}
.notes{background:var(--warn-shade);border-left:4px solid var(--warn);border-radius:0 6px 6px 0;padding:14px 20px;
margin:24px 0}
.notes h2{font-size:1rem;margin:0 0 .3em}
.notes ul{margin:0;padding-left:1.15em}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:.87rem;margin-top:20px}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
#verdict{margin-top:28px}
.verdict{border-left:4px solid var(--model);border-radius:0 6px 6px 0;background:var(--shade);padding:14px 20px;
margin-bottom:20px;font-size:1.06rem}
.verdict b{color:var(--model)}
.verdict ul{margin:.3em 0 0;padding-left:1.15em}
.verdict li+li{margin-top:.25em}
.verdicts{list-style:none;padding:0;font-size:.93rem;max-width:64em}
.verdicts li{padding-left:24px;margin-bottom:.8em}
.scroll{overflow-x:auto;margin:0 0 24px}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--model);outline-offset:2px}
table{border-collapse:collapse;font-size:.81rem;line-height:1.35;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;font-size:.95rem;font-weight:600;padding:0 0 .5em}
caption span{display:inline-block;position:sticky;left:0;max-width:calc(100vw - 40px)}
th,td{padding:6px 7px;text-align:right;vertical-align:top;white-space:nowrap}
th{font-weight:600}
thead th{vertical-align:bottom;color:var(--muted);white-space:normal}
thead tr:last-child th{border-bottom:1px solid var(--rule)}
thead th[rowspan]{border-bottom:1px solid var(--rule)}
th[scope=colgroup]{text-align:left;padding-left:14px;color:var(--ink)}
tbody tr{border-bottom:1px solid var(--grid)}
tbody tr:hover{background:var(--shade)}
tbody th,thead tr:first-child th:first-child{position:sticky;left:0;z-index:1;text-align:left;background:var(--paper);
padding-left:0}
tbody tr:hover th{background:var(--shade)}
.scores tbody th{min-width:9.5em;max-width:13em;white-space:normal;overflow-wrap:anywhere}
.first{padding-left:14px}
td small,th small{display:block;font-size:.88em;font-weight:400;color:var(--muted)}
td b{font-weight:700}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.92em}
abbr{text-decoration:underline dotted var(--walk);text-underline-offset:.25em;cursor:help}
tr.reference th,tr.reference td{color:var(--muted)}
tr.focus th{color:var(--model);box-shadow:inset 3px 0 var(--model);padding-left:10px}
tr.gap td{text-align:center;color:var(--muted);padding:10px}
.worst th:nth-child(-n+3),.worst td:nth-child(-n+3){text-align:left}
.hint,.empty,figcaption{font-size:.87rem;color:var(--muted);max-width:62em}
figure{margin:0 0 8px}
figcaption{margin-top:8px}
.panels,.small{display:grid;gap:20px 28px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,200px),1fr));gap:16px 20px}
.panel{min-width:0;display:flex;flex-direction:column;justify-content:flex-end}
svg{display:block;width:100%;height:auto;overflow:visible}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
.panels .panel{max-width:460px}
.small .panel{max-width:300px}
.wide svg{min-width:720px}
.wide .scroll{margin:0}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:8px 0 0;font-size:.83rem;
color:var(--muted)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--ink);margin-right:7px}
.legend .band{border-radius:2px;width:16px;background:var(--model)}
.legend .median{border-radius:0;width:16px;height:2px;background:var(--model);vertical-align:middle}
.legend .missed{background:var(--down)}
details{border-top:1px solid var(--grid);padding:8px 0}
summary{cursor:pointer;font-size:.9rem;font-weight:600}
details .scroll,details>p{margin-top:14px}
.terms{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:12px 40px;font-size:.87rem}
.terms dt{font-weight:600}
.terms dd{margin:0;color:var(--muted)}
.sources{font-size:.83rem;color:var(--muted);padding-left:1.15em}
#reading>p{max-width:62em}
@media (max-width:640px){body{padding:24px 16px 48px}h1{font-size:1.55rem}section{margin-top:44px}
.facts dt{flex-basis:7em}.scores tbody th{min-width:7.5em;max-width:8.5em}}
@media print{@page{size:landscape;margin:12mm}body{max-width:none;padding:0;font-size:10pt}nav{display:none}
.scroll{overflow:visible}table{font-size:7pt}th,td{padding:3px 4px}.scores tbody th{min-width:0}
tr,figure,.panel,.notes,.verdict,.verdicts li{break-inside:avoid}h2,h3,caption{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.wide svg{min-width:0}
.panels{grid-template-columns:repeat(3,1fr)}.small{grid-template-columns:repeat(5,1fr)}section{margin-top:28px}}
"""
