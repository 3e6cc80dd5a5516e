"""Style sheet and script of a report: both stand in the page itself."""

STYLE = """
:root {
  --paper: #fdfcfa; --card: #ffffff; --ink: #1d2125; --soft: #626b74; --line: #e4e1da; --line-strong: #cfcac0;
  --bar: #4573b8; --bar-soft: #dbe5f4; --limit: #c2410c; --good: #2f7d4f; --note: #fbf1dd; --note-line: #d9a441;
  --heat: 69, 115, 184; --marker: #8a3b8f; --prompt: #f6f4ef; --query: #e3ecf9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --card: #1b1f24; --ink: #e4e6e8; --soft: #9aa3ac; --line: #2c3238; --line-strong: #424a53;
    --bar: #7aa5e6; --bar-soft: #263650; --limit: #f08a52; --good: #6cc08b; --note: #2d2718; --note-line: #a67c2d;
    --heat: 122, 165, 230; --marker: #d59adb; --prompt: #1f242a; --query: #24344d;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
h4 .sampled { font-weight: 400; margin-left: 6px; }
h4 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 20px 0 6px; }
p { margin: 0 0 12px; max-width: 92ch; }
a { color: var(--bar); }
.path, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.88em; }
.path { color: var(--soft); overflow-wrap: anywhere; }
.lead, .aside { color: var(--soft); }
.aside { font-size: 13px; }
nav {
  position: sticky; top: 0; z-index: 3; margin: 24px 0 0; background: var(--paper);
  border-bottom: 1px solid var(--line);
  padding: 0 max(24px, calc((100vw - 1120px) / 2 + 24px)); overflow-x: auto; white-space: nowrap; scrollbar-width: none;
}
nav a { display: inline-block; padding: 11px 0; margin-right: 22px; font-size: 13.5px; text-decoration: none;
  color: var(--soft); }
nav a:hover { color: var(--ink); }
section { padding: 36px 0 8px; }
section + section { border-top: 1px solid var(--line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tiles b { display: block; font-size: 24px; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 0 32px; margin: 0 0 18px; }
.facts div { display: flex; gap: 12px; padding: 6px 0; border-bottom: 1px solid var(--line); font-size: 13.5px; }
.facts dt { flex: 0 0 9.5em; color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.notes { list-style: none; padding: 12px 18px; margin: 0 0 18px; background: var(--note); border-radius: 10px;
  border-left: 3px solid var(--note-line); font-size: 14px; }
.notes li { padding: 2px 0; }
.sampled { display: inline-block; font-size: 12px; color: var(--soft); border: 1px solid var(--line-strong);
  border-radius: 9px; padding: 0 8px; white-space: nowrap; }
.scroll { overflow-x: auto; margin: 0 0 18px; }
table { border-collapse: separate; border-spacing: 0; font-size: 13.5px; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th { text-align: left; vertical-align: bottom; font-weight: 600; border-bottom: 1px solid var(--line-strong);
  padding: 0; }
th button { all: unset; box-sizing: border-box; width: 100%; cursor: pointer; padding: 6px 10px; display: block;
  color: var(--soft); font-size: 12.5px; line-height: 1.3; }
th button:focus-visible { outline: 2px solid var(--bar); }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td { padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:hover td { background: color-mix(in srgb, var(--bar-soft) 35%, transparent); }
.n { text-align: right; }
td.n { white-space: nowrap; }
td.soft { color: var(--soft); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1; }
td:first-child:not(.n) { font-weight: 550; }
td.heat, tbody tr:hover td.heat { background: rgba(var(--heat), calc(0.04 + 0.5 * var(--heat-share, 0))); }
.bar { display: block; min-width: 92px; background: linear-gradient(var(--bar-soft) 0 0) left / var(--w) 100% no-repeat;
  border-radius: 3px; padding: 0 4px; }
.cards { display: grid; grid-template-columns: minmax(0, 1fr); gap: 14px; margin: 0 0 18px; }
.cards.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.card .kind { color: var(--soft); font-size: 12.5px; margin-left: 8px; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 6px 22px; }
figure { margin: 8px 0 0; min-width: 0; }
figcaption { font-size: 12.5px; color: var(--soft); }
svg { display: block; width: 100%; height: auto; max-width: 420px; }
svg text { font: 10px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--soft);
  text-anchor: middle; }
svg.lengths text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .b { fill: var(--bar); } svg .b2 { fill: var(--bar-soft); }
svg .axis { stroke: var(--line-strong); stroke-width: 1; }
svg .limit { stroke: var(--limit); stroke-width: 1.5; } svg .limit-text { fill: var(--limit); font-weight: 600; }
svg .edge { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
details { margin: 0 0 10px; }
summary { cursor: pointer; padding: 4px 0; font-size: 14px; }
.prompt { background: var(--prompt); border-radius: 8px; padding: 12px 14px; margin: 6px 0 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 12.5px; line-height: 1.5; }
.prompt .lit { color: var(--marker); font-weight: 650; }
.prompt .ask { background: var(--query); border-radius: 3px; }
.prompt .shown { color: var(--soft); }
.cut { font: 600 11px system-ui, sans-serif; color: var(--limit); border: 1px solid currentColor; border-radius: 8px;
  padding: 0 6px; margin-left: 6px; white-space: nowrap; }
.role { font-weight: 600; } .role.positive { color: var(--good); }
.long { overflow-wrap: anywhere; min-width: 260px; }
.sha { font-size: 11px; white-space: nowrap; color: var(--soft); }
.same { margin: 10px 0 0; font-size: 13.5px; }
@media (max-width: 560px) {
  header, main { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 24px; } h1 { font-size: 24px; }
  nav { padding: 0 14px; } .facts { grid-template-columns: minmax(0, 1fr); }
  .facts dt { flex-basis: 8em; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles b { font-size: 20px; }
  td:first-child:not(.n) { min-width: 9.5em; max-width: 45vw; overflow-wrap: anywhere; }
  td { padding: 5px 7px; } th button { padding: 6px 7px; }
}
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) {
  head.firstElementChild.addEventListener("click", () => {
    const table = head.closest("table"), column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const x = key(a), y = key(b), numeric = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return numeric ? x - y : x.localeCompare(y);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compare(a, b));
    table.tBodies[0].append(...rows);
  });
}
"""
