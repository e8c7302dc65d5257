"""How the report looks and answers the pointer. Everything is inline: the page asks no network for anything."""

CSS = """
:root{color-scheme:light dark;--paper:#f8f6f1;--card:#fffefb;--ink:#20242c;--soft:#5b6270;--line:#e3ded3;--accent:#1f6f78;--hue-light:46%;
--s0:#2f67a7;--s1:#c8731d;--s2:#3a8a5d;--s3:#8657a6;--s4:#bb4a4a;--s5:#2b8f9e;--s6:#9c7c14;--s7:#767b85;--shade:.16}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--card:#1b1f26;--ink:#e8e6e1;--soft:#a0a7b4;--line:#2f353f;--accent:#6fc3cc;
--hue-light:64%;
--s0:#7fb0ea;--s1:#eea55b;--s2:#72c596;--s3:#c09ddd;--s4:#ea8e8a;--s5:#6ecad7;--s6:#d9bd62;--s7:#a6abb5;--shade:.22}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main,header,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;letter-spacing:-.02em;font-weight:650;margin:0;overflow-wrap:anywhere}
h1 span{color:var(--soft);font-weight:400}
h2{font-size:1.15rem;font-weight:650;margin:3rem 0 .25rem;letter-spacing:-.005em}
p{margin:.25rem 0 1rem;max-width:46rem}
.lead,.note,.axis,footer{color:var(--soft)}
.note{font-size:.9rem}
.lead{margin:.5rem 0 1.5rem;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;overflow-wrap:anywhere}
.lead b{color:var(--ink);font-weight:550}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:1px;background:var(--line);
border:1px solid var(--line);
border-radius:10px;overflow:hidden}
.tile{background:var(--card);padding:1rem 1.15rem 1.05rem}
.tile h3{margin:0;font-size:.85rem;font-weight:500;color:var(--soft)}
.tile .big{font-size:1.75rem;font-weight:620;letter-spacing:-.02em;line-height:1.3}
.tile .big small{font-size:1rem;font-weight:400;color:var(--soft);letter-spacing:0}
.tile p{margin:0;font-size:.87rem;color:var(--soft);line-height:1.45}
.meter{height:5px;border-radius:3px;background:var(--line);margin:.45rem 0 .4rem;overflow:hidden}
.meter i{display:block;height:100%;border-radius:3px;background:var(--accent)}
.pair,.trio{display:grid;gap:1rem 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));align-items:end}
.pair>.wide{align-self:start}
.trio{grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr))}
.chart{margin:.75rem 0 0;min-width:0}
figcaption{font-size:.9rem;font-weight:550;margin-bottom:.5rem}
.chart ul{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin:.2rem 0 0;padding:0;font-weight:400;font-size:.82rem;
color:var(--soft)}
.chart li::before{content:"";display:inline-block;width:.65rem;height:.65rem;border-radius:3px;background:var(--c);margin-right:.35rem}
.plot{position:relative;height:11rem;margin-left:3.1rem;border-bottom:1px solid var(--line);touch-action:pan-y}
.tall .plot{height:min(24rem,60vh);min-height:16rem}
svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
svg path{fill:none;stroke:var(--c);stroke-width:1.75px;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
svg .faint{stroke-width:1.25px;stroke-opacity:.55}
svg .dots{stroke-width:2.25px}
svg .dot{stroke-width:7px}
svg .band{stroke:none;fill:var(--c);fill-opacity:var(--shade)}
svg .area{stroke:var(--paper);stroke-width:.6px;fill:var(--c);fill-opacity:.78}
svg .grid{stroke:var(--ink);stroke-opacity:.09;stroke-width:1px}
svg .mark{stroke:var(--soft);stroke-dasharray:3 5;stroke-width:1.25px}
.yt,.xt,.word{position:absolute;font-size:.76rem;line-height:1;color:var(--soft);white-space:nowrap}
.yt{right:100%;margin-right:.5rem;transform:translateY(50%)}
.xt{top:100%;margin-top:.4rem;transform:translateX(-50%)}
.word{left:100%;margin-left:.5rem;transform:translateY(50%);width:8.5rem;white-space:normal;line-height:1.15}
.marked .plot{margin-right:9rem}
.axis{font-size:.78rem;margin:1.45rem 0 0 3.1rem;display:flex;flex-wrap:wrap;gap:.1rem 1.25rem}
.axis em{font-style:normal;color:var(--ink)}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.tip{position:absolute;z-index:2;top:.25rem;background:var(--card);border:1px solid var(--line);border-radius:7px;padding:.4rem .6rem;
font-size:.8rem;line-height:1.4;pointer-events:none;box-shadow:0 3px 14px rgba(0,0,0,.13);white-space:nowrap;max-width:24rem}
.tip b{font-weight:600;display:block}
.tip span{display:flex;gap:.5rem;justify-content:space-between}
.tip span::before{content:"";width:.55rem;height:.55rem;border-radius:2px;background:var(--c);align-self:center}
.tip span em{font-style:normal;flex:1;overflow:hidden;text-overflow:ellipsis}
[hidden]{display:none!important}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;margin:.5rem 0;min-width:min(100%,20rem)}
th,td{text-align:right;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
th{color:var(--soft)}
th:first-child,td:first-child,.words td:last-child{text-align:left}
tbody th{color:var(--ink)}
.key::before{content:"";display:inline-block;width:.65rem;height:.65rem;border-radius:3px;background:var(--c);margin-right:.45rem}
.bar{display:flex;height:1.1rem;border-radius:5px;overflow:hidden;margin:.75rem 0}
.bar i{background:var(--c);opacity:.85}
.films{display:flex;flex-wrap:wrap;gap:1.5rem;margin-top:.75rem}
.films figure{margin:0;flex:0 1 15rem;min-width:0}
video{display:block;width:100%;max-height:26rem;background:#000;border-radius:8px}
.pictures figure{margin:.75rem 0}
.pictures img{display:block;max-width:100%;width:40rem;image-rendering:pixelated;border-radius:6px;border:1px solid var(--line)}
.films figcaption{margin:.45rem 0 0;font-weight:400;color:var(--soft)}
details{margin:.6rem 0;border-top:1px solid var(--line);padding-top:.6rem}
summary{cursor:pointer;font-weight:550;font-size:.95rem}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem;
font:.82rem/1.55 ui-monospace,Consolas,monospace}
a{color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:3px}
footer{margin-top:3rem;padding-bottom:3rem;font-size:.85rem;border-top:1px solid var(--line);padding-top:1rem}
@media (max-width:44rem){header{padding-top:1.5rem}.tiles{grid-template-columns:1fr 1fr}.tile{padding:.8rem .85rem}
.tile .big{font-size:1.4rem}
.plot,.axis{margin-left:2.7rem}.marked .plot{margin-right:0}.word{left:auto;right:0;transform:none;margin:0 0 .2rem;width:auto;
white-space:nowrap;
text-shadow:0 0 3px var(--paper),0 0 3px var(--paper),0 0 3px var(--paper)}.tall .plot{height:18rem}
.films{gap:1rem}.films figure{flex:1 1 9rem}}
@media print{body{background:#fff}details{display:none}}
"""

SCRIPT = """
"use strict";
const short = v => {
  if (v === null) return "not finite";
  const s = Math.abs(v);
  if (s >= 1e15 || (s > 0 && s < 1e-4)) return v.toExponential(2);
  return v.toLocaleString("en", {maximumFractionDigits: s >= 1000 ? 0 : s >= 100 ? 1 : s >= 1 ? 2 : 4}).replace("-", "\\u2212");
};
const nearest = (xs, x) => {
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
};
for (const chart of document.querySelectorAll("[data-chart]")) {
  const plot = chart.querySelector(".plot"), cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
  let values = null;
  const show = event => {
    values = values || JSON.parse(chart.dataset.chart);
    const box = plot.getBoundingClientRect(), [low, high] = values.r;
    const x = low + Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * (high - low);
    let best = null;
    for (const s of values.s) { const at = s.x[nearest(s.x, x)]; if (best === null || Math.abs(at - x) < Math.abs(best - x)) best = at; }
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = short(best) + " " + values.u;
    tip.append(head);
    for (const s of values.s) {
      const i = nearest(s.x, best);
      if (Math.abs(s.x[i] - best) > (high - low) / 20) continue;
      const row = document.createElement("span"), name = document.createElement("em"), text = document.createElement("i");
      row.setAttribute("style", s.c);
      name.textContent = s.n;
      const show = v => values.p && v !== null ? (v * 100).toFixed(1) + " %" : short(v);
      text.textContent = show(s.y[i]) + (s.l ? " (" + show(s.l[i]) + " to " + show(s.h[i]) + ")" : "")
        + (Math.abs(s.x[i] - best) > (high - low) / 200 ? " at " + short(s.x[i]) : "");
      text.style.fontStyle = "normal";
      row.append(name, text);
      tip.append(row);
    }
    const at = (best - low) / (high - low) * box.width;
    cursor.hidden = tip.hidden = false;
    cursor.style.left = at + "px";
    tip.style.left = Math.max(-40, at + 14 + tip.offsetWidth > box.width ? at - 14 - tip.offsetWidth : at + 14) + "px";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
"""
