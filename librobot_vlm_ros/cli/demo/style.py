"""The report's style sheet; follows the reader's light or dark setting."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--paper:#f8fafc;--card:#fff;--ink:#0f172a;--soft:#64748b;
--rule:#e2e8f0;--good:#15803d;--bad:#b91c1c;--s1:#2563eb;--s2:#d97706;--s3:#059669;--s4:#9333ea;
--s5:#64748b}
@media (prefers-color-scheme:dark){:root{--paper:#0b1220;--card:#131c2e;--ink:#e2e8f0;
--soft:#94a3b8;--rule:#263349;--good:#4ade80;--bad:#f87171;--s1:#60a5fa;--s2:#fbbf24;--s3:#34d399;
--s4:#c084fc;--s5:#94a3b8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:30px;margin:0 0 6px}h1 span{color:var(--soft);font-weight:400}
h2{font-size:20px;margin:40px 0 10px}
header p{max-width:75ch;color:var(--soft);margin:0}
.failures{color:var(--bad);font-weight:600}
.note{color:var(--soft);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:12px;
margin-top:24px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:28px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile b small{font-size:15px;font-weight:400;color:var(--soft)}
.tile span{display:block;font-weight:600}.tile>small{color:var(--soft)}
.plot{width:100%;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.plot text{fill:var(--soft);font-size:12px;paint-order:stroke;stroke:var(--card);
stroke-width:4px}
.plot.map{max-width:760px;color:var(--s1)}
.plot .grid{stroke:var(--rule)}
.plot .level{stroke:var(--soft);stroke-dasharray:5 4}
.plot .line{fill:none;stroke:currentColor;stroke-width:1.5;opacity:.55}
.plot .dot{fill:currentColor}
.plot .mark{fill:var(--bad)}
.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:18px;padding:0;margin:0 0 8px}
.legend li::before{content:"\\25CF";margin-right:6px}
.legend .mark{color:var(--bad)}.legend .mark::before{content:"\\25B2"}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--rule);
border-radius:12px;overflow:hidden}
th,td{text-align:left;padding:7px 12px;border-top:1px solid var(--rule);vertical-align:top}
td.number{white-space:nowrap}
th{border-top:0;color:var(--soft);font-weight:600}
a{color:inherit}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:12px;
overflow:hidden}
figure:target{outline:3px solid var(--s1)}
figure svg{display:block;width:100%}
figure text{font-family:system-ui,sans-serif;font-weight:600}
figure .found,figure .asked,figure .missed{fill:#fff;fill-opacity:0}
figure .found:hover,figure .asked:hover{fill-opacity:.25}
figure .missed{stroke-dasharray:5 4}
figure .asked,figure .missed{filter:drop-shadow(0 0 1.2px #000)}
figcaption{padding:10px 14px}figcaption p{margin:2px 0}
.caption{font-weight:600}
.right{color:var(--good);font-weight:700}.wrong{color:var(--bad);font-weight:700}
.unknown{color:var(--soft)}
details{margin-top:30px}summary{cursor:pointer}
footer{margin-top:36px;color:var(--soft);font-size:13px;max-width:80ch}
"""
