// The console: reads the same routes as any other caller, every two seconds, and moves aliases when asked to.
// Whatever comes from requests or models is shown as text, never as HTML.
"use strict";

const POLL_MS = 2000, SLOW_POLLS = 5, POINTS = 90;
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const round = (value, digits = 3) => (Number.isFinite(value) ? Number(value.toPrecision(digits)).toString() : "–");

// ---------------------------------------------------------------- asking

async function ask(path, { method = "GET", body = null, text = false } = {}) {
  const headers = {};
  if ($("key").value) headers["X-API-Key"] = $("key").value;
  if (body !== null) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body === null ? null : JSON.stringify(body) });
  if (text && answer.ok) return answer.text();
  const found = await answer.json().catch(() => ({ detail: `${answer.status} ${answer.statusText}` }));
  if (!answer.ok) throw Object.assign(new Error(found.detail || answer.statusText), { status: answer.status });
  return found;
}

function say(error) {
  $("message").textContent = error ? error.message : "";
  $("message").hidden = !error;
}

// ---------------------------------------------------------------- traffic

// Prometheus text → [name, labels, value].
function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^([a-z_:]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]]));
    found.push([match[1], labels, Number(match[3])]);
  }
  return found;
}

function sum(all, name, fits = () => true) {
  return all.reduce((total, [n, labels, value]) => (n === name && fits(labels) ? total + value : total), 0);
}

const SCORED = (labels) => labels.route === "/v1/fraud/score" || labels.route === "/v1/recommend";

function counters(all) {
  const seen = { at: performance.now() / 1000, buckets: {} };
  seen.good = sum(all, "assay_requests_total", (l) => l.status[0] === "2");
  seen.refused = sum(all, "assay_requests_total", (l) => l.status === "503" || l.status === "429");
  seen.failed = sum(all, "assay_requests_total", (l) => l.status === "500");
  for (const kind of ["approve", "review", "decline"]) {
    seen[kind] = sum(all, "assay_fraud_decisions_total", (l) => l.decision === kind);
  }
  for (const [name, labels, value] of all) {
    if (name === "assay_request_seconds_bucket" && SCORED(labels)) {
      seen.buckets[labels.le] = (seen.buckets[labels.le] || 0) + value;
    }
  }
  seen.waiting = sum(all, "assay_requests_waiting");
  return seen;
}

// Of a histogram's difference, in milliseconds, straight within a bucket.
function quantile(now, before, share) {
  const edges = Object.keys(now).map((le) => [le === "+Inf" ? Infinity : Number(le), now[le] - (before[le] || 0)]);
  edges.sort((a, b) => a[0] - b[0]);
  const total = edges.length ? edges[edges.length - 1][1] : 0;
  if (total <= 0) return NaN;
  let low = 0, under = 0;
  for (const [edge, count] of edges) {
    if (count >= share * total) {
      if (edge === Infinity) return 1000 * low;
      return 1000 * (low + ((edge - low) * (share * total - under)) / Math.max(1e-9, count - under));
    }
    [low, under] = [edge, count];
  }
  return 1000 * low;
}

const CHARTS = [
  { title: "Requests a second", lines: [["answered", "--one"], ["refused", "--two"], ["failed", "--bad"]] },
  { title: "Latency of scores and lists, ms", lines: [["p50", "--one"], ["p99", "--two"]] },
  { title: "Requests that wait", lines: [["waiting", "--three"]] },
  { title: "Decisions a second", lines: [["approve", "--good"], ["review", "--warn"], ["decline", "--bad"]] },
];
const series = {};
let last = null;

function traffic(text) {
  const seen = counters(samples(text));
  if (last !== null) {
    const seconds = seen.at - last.at;
    const rate = (name) => Math.max(0, (seen[name] - last[name]) / seconds);
    const point = {
      answered: rate("good"), refused: rate("refused"), failed: rate("failed"), waiting: seen.waiting,
      approve: rate("approve"), review: rate("review"), decline: rate("decline"),
      p50: quantile(seen.buckets, last.buckets, 0.5), p99: quantile(seen.buckets, last.buckets, 0.99),
    };
    for (const [name, value] of Object.entries(point)) (series[name] ||= []).push(value);
    for (const values of Object.values(series)) if (values.length > POINTS) values.shift();
    draw();
  }
  last = seen;
}

function draw() {
  const figures = CHARTS.map(({ title, lines }) => {
    const all = lines.flatMap(([name]) => series[name] || []).filter(Number.isFinite);
    const top = Math.max(1, ...all) * 1.08;
    const picture = svg("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img" });
    const said = lines.map(([name]) => `${name} ${round((series[name] || []).at(-1))}`).join(", ");
    picture.setAttribute("aria-label", `${title}: ${said}`);
    for (const y of [0, 20, 40]) picture.append(svg("line", { class: "grid", x1: 0, x2: 100, y1: y, y2: y }));
    for (const [name, color] of lines) {
      const values = series[name] || [];
      let part = [];
      const parts = [part];
      values.forEach((value, i) => {
        if (!Number.isFinite(value)) parts.push((part = []));
        else part.push(`${100 - ((values.length - 1 - i) * 100) / (POINTS - 1)},${40 - (40 * value) / top}`);
      });
      for (const points of parts.filter((p) => p.length)) {
        const line = svg("polyline", { points: points.join(" ") });
        line.style.stroke = `var(${color})`;
        picture.append(line);
      }
    }
    const keys = lines.map(([name, color]) => {
      const key = el("span", { class: "key" }, `${name} `, el("b", {}, round((series[name] || []).at(-1))));
      key.style.setProperty("--color", `var(${color})`);
      return key;
    });
    return el("figure", {}, el("figcaption", {}, title, ...keys), el("span", { class: "top" }, round(top / 1.08)), picture);
  });
  $("charts").replaceChildren(...figures);
}

// ---------------------------------------------------------------- models

function models(loaded) {
  const cards = loaded.models.map((one) =>
    el("div", { class: "card" },
      el("strong", {}, `${one.application}: ${one.name} version ${one.version}`),
      el("p", {}, `answered ${one.answered} requests, failed ${one.failed}`),
      el("p", { class: "muted" }, `loaded ${new Date(one.loaded_at).toLocaleString()}`),
      one.challenger === null ? null : el("p", {}, el("span", { class: "badge challenger" }, `challenger ${one.challenger}`)),
      one.refused === null ? null
        : el("p", {}, el("span", { class: "badge alarm" }, `version ${one.refused.version} refused`), one.refused.reason)));
  $("answering").replaceChildren(...(cards.length ? cards : [el("p", { class: "muted" }, "No model answers yet.")]));
}

function versions(found) {
  const rows = found.versions.map((one) => {
    const is = (alias) => one.aliases.includes(alias);
    const shown = Object.entries(one.metrics).filter(([, v]) => typeof v === "number").slice(0, 4);
    const promote = el("button", { type: "button", on: { click: () => change(one, "promote") } }, "Promote");
    const back = el("button", { type: "button", on: { click: () => change(one, "rollback") } }, "Roll back");
    promote.setAttribute("aria-label", `Promote ${one.name} version ${one.version}`);
    back.setAttribute("aria-label", `Roll ${one.name} back to the version before ${one.version}`);
    return el("tr", {},
      el("th", { scope: "row" }, one.name), el("td", { class: "number" }, String(one.version)),
      el("td", {}, ...one.aliases.map((alias) => el("span", { class: `badge ${alias}` }, alias))),
      el("td", { class: "number" }, shown.map(([name, value]) => `${name} ${round(value, 4)}`).join(", ")),
      el("td", {}, is("champion") ? back : promote));
  });
  // What has the focus keeps it: a row is drawn again only if something changed.
  const key = JSON.stringify(found.versions);
  if ($("versions").dataset.key !== key) {
    $("versions").dataset.key = key;
    $("versions").replaceChildren(...rows);
  }
}

function audit(found) {
  const lines = found.entries.map((one) => {
    const moved = one.from_version ? `${one.from_version} → ${one.version}` : String(one.version ?? "");
    const when = new Date(one.time).toLocaleString();
    return el("li", {}, el("span", { class: "muted" }, `${when}  `),
      el("strong", {}, `${one.action} ${one.model ?? ""} ${moved}`), ` by ${one.actor}`, one.reason ? `: ${one.reason}` : "");
  });
  $("audit").replaceChildren(...lines);
}

function change(one, what) {
  const dialog = $("change");
  $("change-title").textContent = what === "promote"
    ? `Promote ${one.name} version ${one.version}` : `Roll ${one.name} back from version ${one.version}`;
  $("unchecked-label").hidden = what !== "promote";
  $("reason").value = "";
  $("unchecked").checked = false;
  dialog.returnValue = "";
  dialog.onclose = async () => {
    if (dialog.returnValue !== "ok") return;
    const body = { reason: $("reason").value };
    if (what === "promote") Object.assign(body, { version: one.version, unchecked: $("unchecked").checked });
    try {
      await ask(`/v1/admin/models/${encodeURIComponent(one.name)}/${what}`, { method: "POST", body });
      say(null);
      await slow();
    } catch (error) {
      say(error);
    }
  };
  dialog.showModal();
}

// ---------------------------------------------------------------- drift and decisions

const APPLICATIONS = ["fraud", "recommend"];

function driftOf(found) {
  const alarms = new Set(found.alarms.map((one) => one.text));
  const labels = found.label_windows ? `, ${found.label_windows} of labels` : "";
  const text = found.windows === 0
    ? `no window of ${found.window_rows} events has been looked at yet.`
    : `${found.windows} windows of ${found.window_rows} events looked at${labels}; `
      + (found.findings.length ? "the newest has:" : "the newest is as in training.");
  return [
    el("p", { class: "muted" }, `${found.model.name}: ${text}`),
    el("ul", { class: "plain" }, ...found.findings.map((one) =>
      el("li", {}, el("span", { class: `badge ${alarms.has(one.text) ? "alarm" : "review"}` },
        alarms.has(one.text) ? "alarm" : "finding"), one.text, el("span", { class: "muted" }, ` (${one.kind})`)))),
  ];
}

async function drift() {
  const parts = await Promise.all(APPLICATIONS.map((application) =>
    ask(`/v1/drift?application=${application}`).then(driftOf, (error) => {
      if (![404, 503].includes(error.status)) throw error;
      return error.status === 404 ? [el("p", { class: "muted" }, error.message)] : [];
    })));
  const shown = parts.flat();
  $("drift").replaceChildren(...(shown.length ? shown : [el("p", { class: "muted" }, "No model is loaded.")]));
}

function reasons(list) {
  const most = Math.max(1e-9, ...list.map((one) => Math.abs(one.contribution)));
  return el("ul", { class: "reasons" }, ...list.map((one) => {
    const fill = el("span");
    const share = (50 * Math.abs(one.contribution)) / most;
    fill.style.width = `${share}%`;
    fill.style.left = one.contribution >= 0 ? "50%" : `${50 - share}%`;
    fill.style.background = one.contribution >= 0 ? "var(--bad)" : "var(--good)";
    const bar = el("span", { class: "bar", role: "img", "aria-label": `${round(one.contribution)} log-odds` }, fill);
    return el("li", {}, bar, el("span", {}, one.text || one.feature));
  }));
}

function decision(one) {
  const head = [el("span", { class: `badge ${one.decision}` }, one.decision),
    `${one.id ?? "without id"}: score ${round(one.score)}, limit ${round(one.threshold)} `];
  if (one.decided_at) head.push(el("span", { class: "muted" }, new Date(1000 * one.decided_at).toLocaleTimeString()));
  const flip = one.counterfactual ? el("p", {}, one.counterfactual.text) : null;
  const why = one.reasons.length ? el("details", { open: one.open }, el("summary", {}, "Reasons"), reasons(one.reasons)) : null;
  return el(one.open ? "div" : "li", {}, ...head, why, flip);
}

function decisions(found) {
  // Nothing moves under whoever reads: as long as one is open, or has the focus, the list stays.
  const list = $("decisions");
  if (list.querySelector("details[open]") || list.contains(document.activeElement)) return;
  const lines = found.decisions.slice(0, 20).map(decision);
  $("decisions").replaceChildren(...(lines.length ? lines : [el("li", { class: "muted" }, "None since this process started.")]));
  if ($("event").value.trim() === "{}" && found.decisions.length) {
    $("event").value = JSON.stringify(found.decisions[0].event, null, 1);
  }
}

// ---------------------------------------------------------------- trying

$("try").addEventListener("change", (event) => {
  if (event.target.name !== "kind") return;
  $("ask-fraud").hidden = event.target.value !== "fraud";
  $("ask-recommend").hidden = event.target.value === "fraud";
});

$("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  const kind = new FormData($("try")).get("kind");
  try {
    const began = performance.now();
    let shown;
    if (kind === "fraud") {
      const body = { events: [JSON.parse($("event").value)], explain: true, counterfactual: $("counterfactual").checked };
      const found = await ask("/v1/fraud/score", { method: "POST", body });
      shown = [decision({ ...found.scores[0], open: true }), `by ${found.model.name} version ${found.model.version}`];
    } else {
      const body = { user_id: $("user").value, k: Number($("k").value) };
      const found = await ask("/v1/recommend", { method: "POST", body });
      const items = found.items.map((one) =>
        el("li", {}, el("strong", {}, one.title ?? one.item_id), el("span", { class: "muted" }, ` ${one.reason ?? ""}`)));
      shown = [el("ol", {}, ...items), `by ${found.model.name} version ${found.model.version}`];
    }
    const took = el("span", { class: "muted" }, `, ${Math.round(performance.now() - began)} ms`);
    $("answer").replaceChildren(...shown, took);
    say(null);
  } catch (error) {
    $("answer").replaceChildren(el("p", { role: "alert" }, error.message));
  }
});

// ---------------------------------------------------------------- all of it, again and again

const quietly = (promise, show) => promise.then(show, (error) => {
  if (![404, 503].includes(error.status)) throw error;
});

async function slow() {
  await Promise.all([
    quietly(ask("/v1/registry"), versions),
    quietly(ask("/v1/audit?last=30"), audit),
    drift(),
  ]);
}

let polls = 0;
async function poll() {
  try {
    await Promise.all([
      ask("/metrics", { text: true }).then(traffic),
      quietly(ask("/v1/models"), models),
      quietly(ask("/v1/fraud/decisions"), decisions),
      polls++ % SLOW_POLLS === 0 ? slow() : null,
    ]);
    $("health").textContent = "answers";
    $("health").className = "status good";
    say(null);
  } catch (error) {
    $("health").textContent = error.status === 401 ? "needs an API key" : "does not answer";
    $("health").className = "status bad";
    say(error);
    polls = 0;
  }
  setTimeout(poll, POLL_MS);
}

$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("key").value = sessionStorage.getItem("assay-key") || "";
$("key").addEventListener("change", () => sessionStorage.setItem("assay-key", $("key").value));
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const showTheme = () => { $("theme").textContent = isDark() ? "Light theme" : "Dark theme"; };
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
system.addEventListener("change", showTheme);
showTheme();
draw();
poll();
