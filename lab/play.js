"use strict";
const $ = id => document.getElementById(id);
const LABELS = {ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Space: "space"};
const NAMES = {truth: "The world", simulated: "Simulator", screen: "Screen", map: "Map", difference: "Difference"};
const STEPS_SHOWN = 240, LOW = 10, HIGH = 50;
let hello = null, facts = null, waiting = null, drawn = false;
const panels = new Map(), points = [], arrivals = [], held = [];
const socket = new WebSocket(`ws://${location.host}/play`);
socket.binaryType = "arraybuffer";
const say = said => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(said)); };
const number = (value, digits) => value.toLocaleString("en", {maximumFractionDigits: digits, signDisplay: "negative"}).replace("-", "−");
const signed = value => (value > 0 ? "+" : "") + number(value, 2);
const label = key => LABELS[key] || key.replace(/^(Key|Digit)/, "");

/* What the server says */

socket.onmessage = event => {
  if (typeof event.data !== "string") {
    const length = new DataView(event.data).getUint32(0, true);
    const next = JSON.parse(new TextDecoder().decode(new Uint8Array(event.data, 4, length)));
    let at = 4 + length;
    for (const picture of next.pictures) {
      const size = picture.height * picture.width * picture.channels;
      picture.pixels = new Uint8Array(event.data, at, size);
      at += size;
    }
    note(next);
    waiting = next;
    if (!drawn) { drawn = true; requestAnimationFrame(draw); }
    return;
  }
  const said = JSON.parse(event.data);
  if (said.hello) greet(said.hello);
  if (said.mistake) tell(said.mistake, "mistake");
  if (said.error) { tell(said.error, "mistake"); document.body.classList.add("lost"); socket.ended = true; }
};
socket.onclose = () => {
  if (!socket.ended) tell("The connection is lost: does job=play still run? Reload to try again.", "mistake");
  document.body.classList.add("lost");
};

function greet(told) {
  hello = told;
  const simulators = told.simulators.length, one = told.simulators[0];
  const beside = simulators && `beside ${simulators > 1 ? `${simulators} simulators` : one.label}`;
  const rest = [told.player && `${told.player.label} plays`, beside];
  const title = document.createElement("span");
  title.textContent = " " + (rest.filter(Boolean).join(" ") || "played by you");
  $("title").replaceChildren(told.world, title);
  const parts = [["protocol", told.protocol], ["a step is", `${told.frames_per_step} frame${told.frames_per_step > 1 ? "s" : ""}`],
    ["random actions", told.player && told.player.epsilon ? `${number(100 * told.player.epsilon, 2)} %` : null]];
  $("facts").replaceChildren(...parts.filter(part => part[1]).map(([name, value]) => {
    const fact = document.createElement("span"), bold = document.createElement("b");
    bold.textContent = value;
    fact.append(name + " ", bold);
    return fact;
  }));
  $("meter").hidden = !simulators;
  for (const part of document.querySelectorAll(".simulated")) part.hidden = !simulators;
  $("simulator").replaceChildren(...told.simulators.map((simulator, index) => new Option(simulator.label, index)));
  if (simulators < 2) $("simulator").closest("label").hidden = true;
  $("rate").max = told.most_rate;
  $("sync").max = told.most_sync;
  $("player").hidden = !told.player;
  $("show-beside").hidden = !told.beside;
  $("show-beside").lastElementChild.textContent = told.beside === "map" ? "map" : "whole screen";
  $("show-beside").firstElementChild.checked = !(simulators && told.beside === "screen");
  listKeys();
}

function note(next) {
  const now = performance.now(), simulator = next.simulator;
  const fresh = !facts || next.step !== facts.step || next.episode !== facts.episode;
  if (fresh) {
    arrivals.push(now);
    while (arrivals.length > 1 && now - arrivals[0] > 2000) arrivals.shift();
  }
  if (simulator) {
    const before = facts && facts.simulator;
    const opened = facts && next.episode !== facts.episode;
    const switched = before && simulator.index !== before.index;
    const looked = before && simulator.ahead !== null && before.ahead !== null;
    const synced = looked && (simulator.ahead < before.ahead || (fresh && simulator.ahead === before.ahead));
    if (fresh || opened || switched || synced) {
      points.push({y: fresh ? simulator.psnr : null, mark: opened || switched ? "opened" : synced ? "synced" : ""});
      if (points.length > STEPS_SHOWN) points.shift();
    }
  }
  facts = next;
}

/* Pictures */

function panel(name) {
  if (!panels.has(name)) {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    const title = document.createElement("b"), told = document.createElement("span");
    figure.dataset.name = name;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", NAMES[name]);
    const alone = hello.beside === "screen" && !hello.simulators.length;
    title.textContent = alone && name === "truth" ? "As an agent sees it" : alone && name === "screen" ? "The world" : NAMES[name];
    caption.append(title, told);
    figure.append(canvas, caption);
    panels.set(name, {figure, canvas, title, told});
    const order = alone ? ["screen", "truth"] : ["truth", "simulated", "difference", "screen", "map"];
    const after = [...$("stage").children].find(other => order.indexOf(other.dataset.name) > order.indexOf(name));
    $("stage").insertBefore(figure, after || null);
  }
  return panels.get(name);
}

function paint(name, height, width, colour) {
  const {canvas} = panel(name);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; lay(); }
  const context = canvas.getContext("2d"), image = context.createImageData(width, height), to = image.data;
  for (let i = 0, j = 0; j < to.length; i++, j += 4) { colour(i, to, j); to[j + 3] = 255; }
  context.putImageData(image, 0, 0);
}

const copy = picture => picture.channels === 1
  ? (i, to, j) => { to[j] = to[j + 1] = to[j + 2] = picture.pixels[i]; }
  : (i, to, j) => { to[j] = picture.pixels[3 * i]; to[j + 1] = picture.pixels[3 * i + 1]; to[j + 2] = picture.pixels[3 * i + 2]; };

function draw() {
  drawn = false;
  const shown = waiting, simulator = shown.simulator, pictures = Object.fromEntries(shown.pictures.map(one => [one.name, one]));
  const visible = showing(pictures);
  for (const [name, {figure}] of panels) figure.hidden = !visible.includes(name);
  for (const name of visible) {
    const fresh = !panels.has(name), source = pictures[name] || pictures.truth;
    if (panel(name).figure.hidden || fresh) { panel(name).figure.hidden = false; }
    if (name !== "difference") paint(name, source.height, source.width, copy(source));
    else {
      const a = pictures.truth.pixels, b = pictures.simulated.pixels, c = source.channels;
      paint(name, source.height, source.width, (i, to, j) => {
        for (let k = 0; k < 3; k++) { const at = c === 1 ? i : 3 * i + k; to[j + k] = Math.abs(a[at] - b[at]); }
      });
    }
  }
  if (visible.join() !== draw.last) { draw.last = visible.join(); lay(); }
  caption(shown, simulator);
  state(shown, simulator);
  reflect(shown, simulator);
  if (simulator) { reading(simulator); chart(); }
}

function showing(pictures) {
  const beside = hello.beside && $("show-beside").firstElementChild.checked;
  const names = ["truth"];
  if (pictures.simulated) names.push("simulated");
  if (pictures.simulated && $("show-off").firstElementChild.checked) names.push("difference");
  if (beside && pictures[hello.beside]) names.push(hello.beside);
  return names;
}

/* Every pixel of a picture becomes a square of whole pixels of the screen. */
function lay() {
  const figures = [...panels.values()].filter(one => !one.figure.hidden && one.canvas.width);
  if (!figures.length) return;
  const style = getComputedStyle($("stage")), dots = window.devicePixelRatio || 1, gap = parseFloat(style.columnGap);
  const room = $("stage").clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const narrow = room < 480, across = narrow ? Math.min(2, figures.length) : figures.length;
  const wide = (room - gap * (across - 1)) / across, high = Math.max(160, Math.min(window.innerHeight * .58, 460));
  for (const {figure, canvas} of figures) {
    const zoom = Math.max(1, Math.floor(Math.min(wide * dots / canvas.width, high * dots / canvas.height)));
    const fits = zoom * canvas.width / dots <= wide + 1;
    canvas.style.width = (fits ? zoom * canvas.width / dots : wide) + "px";
    canvas.style.height = (fits ? zoom * canvas.height / dots : wide * canvas.height / canvas.width) + "px";
    figure.style.width = `max(${canvas.style.width}, min(9.4rem, ${wide}px))`;
  }
}

function caption(shown, simulator) {
  const first = $("stage").querySelector("figure:not([hidden])").dataset.name;
  for (const one of panels.values()) if (one !== panels.get("simulated")) one.told.textContent = "";
  const rewarded = shown.reward ? ` · reward ${signed(shown.reward)}` : "";
  panel(first).told.textContent = `step ${number(shown.step, 0)} · return ${number(shown.return, 2)}${rewarded}`;
  if (!simulator) return;
  const {figure, title, told} = panel("simulated"), name = hello.simulators[simulator.index].label;
  figure.classList.toggle("still", simulator.ahead === null);
  title.textContent = name;
  const foretold = simulator.reward !== null && Math.abs(simulator.reward) >= .05 ? ` · reward ${signed(simulator.reward)}` : "";
  const returned = simulator.return === null ? "not finite" : number(simulator.return, 1);
  told.textContent = simulator.ahead === null ? `looks on, ${simulator.known} of ${simulator.needs}` : `return ${returned}${foretold}`;
}

/* Words and numbers */

function tell(text, kind) {
  const line = $("state");
  if (line.textContent !== text) line.textContent = text;
  line.className = "state " + (kind || "");
  tell.until = kind === "mistake" ? performance.now() + 4000 : 0;
}

function state(shown, simulator) {
  if (performance.now() < (tell.until || 0)) return;
  const name = simulator && hello.simulators[simulator.index].label;
  const next = shown.goes_on ? "The next one opens by itself." : "R opens the next one.";
  if (shown.last) {
    const both = simulator && simulator.over ? ` ${name} says so, too.` : "";
    tell(`The episode is over: return ${number(shown.return, 2)} after ${number(shown.step, 0)} steps.${both} ${next}`, "over");
  } else if (simulator && simulator.over) {
    tell(`${name} says that the episode is over; the world goes on. T sets it to the truth, R opens the next episode.`, "over");
  } else if (shown.paused) tell("Paused. N takes one step.");
  else if (shown.lost_life) tell("A life is lost.");
  else if (simulator && simulator.lost_life) tell(`${name} says that a life is lost, or all.`);
  else if (shown.watching) tell(`${hello.player.label} plays.`);
  else if (!shown.running) tell("Time stands still until a key is held.");
  else if (simulator && simulator.ahead === null) tell(`${name} looks on: ${simulator.known} of ${simulator.needs} frames.`);
  else tell("You play.");
}

function reading(simulator) {
  const value = simulator.psnr;
  $("psnr").textContent = value === null ? "—" : value >= 99.9 ? "no difference" : `${value.toFixed(1)} dB`;
  $("psnr").style.fontSize = value !== null && value >= 99.9 ? "1.15rem" : "";
  const steps = simulator.ahead;
  const since = `PSNR, ${steps} step${steps > 1 ? "s" : ""} after the truth`;
  $("ahead").textContent = steps === null ? "looking on" : steps === 0 ? "at the truth" : since;
}

function reflect(shown, simulator) {
  $("pause").setAttribute("aria-pressed", shown.paused);
  set("rate", shown.rate);
  $("rate-told").textContent = `${shown.rate} steps a second`;
  $("goes-on").checked = shown.goes_on;
  if (simulator) {
    set("sync", simulator.sync_every);
    const every = simulator.sync_every === 1 ? "every step" : `every ${simulator.sync_every} steps`;
    $("sync-told").textContent = simulator.sync_every ? every : "never by itself";
    if (document.activeElement !== $("simulator")) $("simulator").value = simulator.index;
  }
  if (hello.player) {
    const key = document.createElement("kbd");
    key.textContent = "G";
    $("player").replaceChildren(shown.watching ? "Play yourself " : "Let it play ", key);
  }
  $("keys").querySelectorAll("button").forEach((row, index) => row.classList.toggle("now", index === shown.action));
}

const set = (id, value) => { if (document.activeElement !== $(id) || !$(id).matches(":active")) $(id).value = value; };

setInterval(() => {
  const now = performance.now(), recent = arrivals.filter(at => now - at < 2000);
  const span = recent.length > 1 ? (recent[recent.length - 1] - recent[0]) / 1000 : 0;
  $("pace").textContent = span ? `${((recent.length - 1) / span).toFixed(1)} steps a second arrive.` : "";
  $("pace").dataset.pace = span ? (recent.length - 1) / span : 0;
}, 500);

function chart() {
  const canvas = $("chart"), dots = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * dots)) canvas.width = Math.round(width * dots);
  if (canvas.height !== Math.round(height * dots)) canvas.height = Math.round(height * dots);
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), left = 30;
  const colour = name => style.getPropertyValue(name).trim();
  const x = i => left + (i + .5 + STEPS_SHOWN - points.length) * (width - left - 4) / STEPS_SHOWN;
  const y = value => 6 + (HIGH - Math.min(HIGH, Math.max(LOW, value))) / (HIGH - LOW) * (height - 14);
  context.setTransform(dots, 0, 0, dots, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (let level = LOW; level <= HIGH; level += 10) {
    context.fillStyle = colour("--soft");
    context.fillText(level === HIGH ? "dB" : level, left - 7, y(level));
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(left, Math.round(y(level)) + .5);
    context.lineTo(width, Math.round(y(level)) + .5);
    context.stroke();
  }
  points.forEach((point, i) => {
    if (!point.mark) return;
    context.strokeStyle = colour("--soft");
    context.globalAlpha = point.mark === "opened" ? .8 : .35;
    context.setLineDash(point.mark === "opened" ? [] : [2, 4]);
    context.beginPath();
    context.moveTo(x(i), y(HIGH));
    context.lineTo(x(i), y(LOW));
    context.stroke();
  });
  context.globalAlpha = 1;
  context.setLineDash([]);
  context.strokeStyle = colour("--accent");
  context.fillStyle = colour("--accent");
  context.lineWidth = 1.75;
  context.lineJoin = "round";
  context.beginPath();
  points.forEach((point, i) => {
    if (point.y === null) return;
    const before = i && points[i - 1].y !== null && !point.mark;
    if (before) context.lineTo(x(i), y(point.y)); else context.moveTo(x(i), y(point.y));
  });
  context.stroke();
  const last = points[points.length - 1];
  if (last && last.y !== null) {
    context.beginPath();
    context.arc(x(points.length - 1), y(last.y), 3, 0, 7);
    context.fill();
  }
}

/* What the person says */

const DEEDS = {
  KeyR: () => say({do: "reset"}),
  KeyP: () => say({paused: !facts.paused}),
  KeyN: () => say({do: "step"}),
  KeyT: () => hello.simulators.length && say({do: "sync"}),
  KeyM: () => hello.simulators.length > 1 && say({simulator: (facts.simulator.index + 1) % hello.simulators.length}),
  KeyG: () => hello.player && say({watching: !facts.watching}),
  KeyX: () => hello.simulators.length && $("show-off").firstElementChild.click(),
};

function hold(keys, down) {
  const before = held.join();
  for (const key of keys) {
    const at = held.indexOf(key);
    if (down && at < 0) held.push(key);
    if (!down && at >= 0) held.splice(at, 1);
  }
  if (held.join() !== before) say({keys: held});
}

document.addEventListener("keydown", event => {
  if (!facts || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=range],select")) return;
  if (event.code === "Space" && event.target.matches("button,input")) return;
  if (hello.keys.includes(event.code)) { event.preventDefault(); hold([event.code], true); }
  else if (DEEDS[event.code] && !event.repeat) { event.preventDefault(); DEEDS[event.code](); }
});
document.addEventListener("keyup", event => hold([event.code], false));
window.addEventListener("blur", () => hold([...held], false));
/* Whoever clicks goes on with the keyboard, so a click leaves no focus behind. */
document.addEventListener("click", event => {
  if (event.detail && event.target.closest("button,input[type=checkbox]")) document.activeElement.blur();
});
for (const id of ["rate", "sync"]) $(id).addEventListener("pointerup", () => $(id).blur());
for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", () => say({do: button.dataset.do}));
$("pause").addEventListener("click", () => DEEDS.KeyP());
$("player").addEventListener("click", () => DEEDS.KeyG());
$("rate").addEventListener("input", () => say({rate: Number($("rate").value)}));
$("sync").addEventListener("input", () => say({sync_every: Number($("sync").value)}));
$("simulator").addEventListener("change", () => { say({simulator: Number($("simulator").value)}); $("simulator").blur(); });
$("goes-on").addEventListener("change", () => say({goes_on: $("goes-on").checked}));
for (const id of ["show-beside", "show-off"]) $(id).addEventListener("change", () => waiting && draw());
window.addEventListener("resize", () => { lay(); if (facts && facts.simulator) chart(); });
matchMedia("(prefers-color-scheme:dark)").addEventListener("change", () => facts && facts.simulator && chart());

function listKeys() {
  $("keys").replaceChildren(...hello.actions.map(action => {
    const row = document.createElement("button"), name = document.createElement("span"), keys = document.createElement("span");
    row.type = "button";
    row.tabIndex = -1;
    name.textContent = action.words;
    keys.append(...(action.keys || []).map(key => {
      const cap = document.createElement("kbd");
      cap.textContent = label(key);
      return cap;
    }));
    if (action.keys && !action.keys.length) keys.textContent = "no key";
    if (action.keys === null) row.disabled = true;
    row.append(name, keys);
    const chord = action.keys || [];
    row.addEventListener("pointerdown", event => { row.setPointerCapture(event.pointerId); hold(chord, true); });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) row.addEventListener(end, () => hold(chord, false));
    return row;
  }));
  $("keys-note").textContent = hello.waits
    ? "No action of this world rests: it waits for a key. Rows can be held with the pointer, too."
    : "Rows can be held with the pointer, too.";
}
