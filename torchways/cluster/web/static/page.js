// Shows what /api/observation says, once a second. Read-only; all text is set as text, never as HTML.
"use strict";

const COLOURS = ["#2f7ed8", "#e6842a", "#2ca089", "#c44e8a", "#8c6bd1", "#b59b1d", "#5b8c2a", "#c0504d", "#4aa8c0", "#7f7f7f"];
const SVG = "http://www.w3.org/2000/svg";
const POLL_MS = 1000;
const PROGRAMS_MS = 5000;
const TIMEOUT_MS = 8000;

const byId = (id) => document.getElementById(id);
const colour = (clientId) => COLOURS[(Number(clientId) + COLOURS.length - 1) % COLOURS.length];
const percent = (part) => `${(100 * part).toFixed(1)}%`;

function size(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= scale) return `${(bytes / scale).toFixed(1)} ${unit}`;
  }
  return `${bytes} B`;
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text !== "") made.textContent = text;
  if (className) made.className = className;
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

// Columns are [title, cell of a row]; a title that begins with "<" is of text. A cell is text or an element.
function table(id, columns, rows) {
  const head = element("tr");
  for (const [title] of columns) head.append(element("th", title.replace("<", ""), title.startsWith("<") ? "text" : ""));
  const lines = rows.map((row) => {
    const line = element("tr");
    for (const [title, cell] of columns) {
      const content = cell(row);
      const made = element("td", "", title.startsWith("<") ? "text" : "");
      made.append(content instanceof Node ? content : String(content));
      line.append(made);
    }
    return line;
  });
  if (!rows.length) {
    const line = element("tr");
    const none = element("td", "none", "text none");
    none.colSpan = columns.length;
    line.append(none);
    lines.push(line);
  }
  byId(id).replaceChildren(head, ...lines);
}

function bars(parts) {
  const all = element("span");
  for (const part of parts) {
    const bar = element("span", "", "bar");
    const inner = element("span");
    inner.style.width = percent(part);
    bar.append(inner);
    all.append(bar, percent(part));
  }
  return all;
}

function clientName(client) {
  const cell = element("span");
  const swatch = element("span", "", "swatch");
  swatch.style.background = colour(client.client_id);
  cell.append(swatch, String(client.client_id));
  return cell;
}

function showTimeline(facts) {
  const chart = byId("timeline");
  const [width, height, left, bottom] = [chart.clientWidth || 900, 160, 42, 18];
  const [inner, tall] = [width - left, height - bottom - 6];
  const seconds = facts.timeline_seconds;
  const now = facts.timeline.length ? facts.timeline[facts.timeline.length - 1].time : 0;
  const x = (time) => left + inner * (1 - (now - time) / seconds);
  const drawn = [];
  for (const part of [0, 0.5, 1]) {
    const y = 6 + tall * (1 - part);
    drawn.push(shape("line", { x1: left, x2: width, y1: y, y2: y }));
    drawn.push(shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${100 * part}%`));
  }
  for (let back = 0; back <= seconds; back += 15) {
    const anchor = back === 0 ? "end" : back === seconds ? "start" : "middle";
    drawn.push(shape("text", { x: x(now - back), y: height - 3, "text-anchor": anchor }, back ? `-${back} s` : "now"));
  }
  for (const point of facts.timeline) {
    const [begin, end] = [Math.max(left, x(point.time - point.seconds)), x(point.time)];
    if (end <= left) continue;
    let below = 0;
    for (const clientId of Object.keys(point.busy).sort((a, b) => a - b)) {
      const part = Math.min(point.busy[clientId], 1 - below);
      const y = 6 + tall * (1 - below - part);
      const bar = shape("rect", { x: begin, y, width: Math.max(0.5, end - begin), height: tall * part, fill: colour(clientId) });
      bar.append(shape("title", {}, `client ${clientId}: ${percent(point.busy[clientId])}`));
      drawn.push(bar);
      below += part;
    }
  }
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.replaceChildren(...drawn);
  const seen = new Set(facts.timeline.flatMap((point) => Object.keys(point.busy)));
  const names = new Map(facts.clients.map((client) => [String(client.client_id), client.name]));
  const labels = [...seen].sort((a, b) => a - b).map((clientId) => {
    const label = element("li");
    const swatch = element("span", "", "swatch");
    swatch.style.background = colour(clientId);
    label.append(swatch, `client ${clientId} ${names.get(clientId) || ""}`.trim());
    return label;
  });
  byId("legend").replaceChildren(...(labels.length ? labels : [element("li", "no client computed", "none")]));
}

function showList(id, lines) {
  const shown = lines.slice(0, 50).map((line) => element("li", line));
  if (lines.length > 50) shown.push(element("li", `and ${lines.length - 50} more`, "none"));
  byId(id).replaceChildren(...(shown.length ? shown : [element("li", "none", "none")]));
}

function show(facts) {
  byId("address").textContent = `at ${facts.address}`;
  const at = new Date(facts.time_ns / 1e6).toLocaleTimeString("en-GB");
  const silent = facts.unreachable.map((name) => `; ${name} does not answer`).join("");
  setState(`${at}, over ${facts.seconds.toFixed(1)} s${silent}`, silent !== "");
  showTimeline(facts);
  table("islands", [
    ["island", (i) => i.island], ["<platform", (i) => i.platform], ["slices", (i) => i.num_slices],
    ["held", (i) => i.num_held], ["admitted", (i) => i.num_admitted],
    ["queue", (i) => `${(1e3 * i.queue_seconds).toFixed(1)} ms`], ["<devices", (i) => bars(i.utilisation)],
  ], facts.islands);
  table("clients", [
    ["<client", clientName], ["<name", (c) => c.name], ["weight", (c) => c.weight], ["priority", (c) => c.priority],
    ["wanted", (c) => percent(c.wanted)], ["got", (c) => percent(c.got)],
    ["device time", (c) => `${c.device_seconds.toFixed(2)} s`], ["held", (c) => c.num_held],
    ["admitted", (c) => c.num_admitted], ["runs/s", (c) => c.runs_per_second.toFixed(1)],
    ["memory", (c) => size(c.buffer_bytes)],
  ], [...facts.clients].sort((a, b) => b.got - a.got || a.client_id - b.client_id));
  table("executors", [
    ["<executor", (e) => e.executor_id], ["<devices", (e) => e.devices.join(" ")], ["memory", (e) => size(e.used_bytes)],
    ["of", (e) => (e.budget_bytes ? size(e.budget_bytes) : "no limit")], ["process", (e) => size(e.rss_bytes)],
    ["runs", (e) => e.num_runs], ["programs", (e) => e.num_programs], ["compiled", (e) => e.num_compiled],
    ["compiling", (e) => percent(e.compiling)], ["queue", (e) => e.num_compiling],
  ], facts.executors);
  showList("waits", [
    ...facts.islands.flatMap((i) => i.waits.map((line) => `island ${i.island}: ${line}`)),
    ...facts.executors.flatMap((e) => e.waits.map((line) => `executor ${e.executor_id}: ${line}`)),
  ]);
  const stalls = facts.executors.flatMap((e) => e.stalls);
  byId("stalled").hidden = !stalls.length;
  showList("stalls", stalls);
}

function setState(text, isBad) {
  byId("state").textContent = text;
  byId("state").className = isBad ? "bad" : "";
}

async function get(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), headers: { Accept: "*/*" } });
  if (answer.status === 401) location.assign("/login");
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer;
}

let programsAt = 0;

async function showPrograms() {
  if (performance.now() < programsAt) return;
  programsAt = performance.now() + PROGRAMS_MS;
  const programs = await (await get("/api/programs")).json();
  byId("with-programs").hidden = false;
  table("programs", [
    ["<program", (p) => graphButton(p)], ["client", (p) => p.client_id], ["islands", (p) => p.num_islands],
    ["instructions", (p) => p.num_instructions], ["id", (p) => p.program_id],
  ], programs.reverse());
}

function graphButton(program) {
  const button = element("button", program.name || "no name");
  button.type = "button";
  button.addEventListener("click", () => showGraph(program).catch((error) => setState(error.message, true)));
  return button;
}

async function showGraph(program) {
  const path = `/api/programs/${program.program_id}.svg`;
  const text = await (await get(path)).text();
  const image = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  byId("graph-title").textContent = `Graph of ${program.name}`;
  byId("graph-alone").href = path;
  byId("graph").replaceChildren(document.importNode(image, true));
  byId("with-graph").hidden = false;
  byId("with-graph").scrollIntoView({ block: "start" });
}

byId("graph-close").addEventListener("click", () => {
  byId("with-graph").hidden = true;
});

async function poll() {
  try {
    const facts = await (await get("/api/observation")).json();
    show(facts);
    if (facts.has_names) await showPrograms();
  } catch (error) {
    setState(`no answer: ${error.message}`, true);
  }
  setTimeout(poll, document.hidden ? 10 * POLL_MS : POLL_MS);
}

poll();
