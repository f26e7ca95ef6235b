// The playground: settings <-> link, one stream per role, and the token that is looked at. Stands behind
// tokens.js. Text of models enters the page through textContent only.

const { models, alpha: usual, examples } = JSON.parse(byId("playground-data").textContent);
const DEFAULTS = { prompt: examples[0].prompt, alpha: usual, seed: "0", temperature: "0", tokens: "96", format: "chat", system: "" };
const SETTLED = 250; // milliseconds without a move of the slider, before the proxy answers anew
const WHAT = {
  base: "the large model alone", proxy: "the large model, steered", expert: "small and tuned",
  antiexpert: "small, before its tuning", tuned: "the large model, tuned itself: the ceiling",
};
const touch = matchMedia("(pointer: coarse)").matches;

// ---- settings: their fields, and the link that reproduces what is shown

const fields = Object.fromEntries(["prompt", "seed", "temperature", "tokens", "format", "system"].map((name) => [name, byId(name)]));
fields.alpha = byId("alpha-text");
const slider = byId("alpha"), status = byId("status");

const settings = () => Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));
const setAlpha = (text) => {
  fields.alpha.value = text;
  const number = Number(text);
  if (text.trim() && Number.isFinite(number)) slider.value = number;
};
const fill = (values) => {
  for (const [name, field] of Object.entries(fields)) field.value = values[name];
  setAlpha(values.alpha);
  showExample();
};
const fromLink = () => {
  const found = new URLSearchParams(location.hash.slice(1));
  if (!found.has("prompt")) return null;
  return Object.fromEntries(Object.entries(DEFAULTS).map(([name, usually]) => [name, found.get(name) ?? usually]));
};
const writeLink = (now) => {
  const always = ["prompt", "alpha", "seed"];
  const kept = Object.entries(now).filter(([name, value]) => always.includes(name) || value !== DEFAULTS[name]);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
};

// ---- a role's answer

class Panel {
  constructor(role, model) {
    Object.assign(this, { role, model, tokens: [], control: null });
    this.response = make("div", { class: "response", role: "group", dir: "auto", "aria-label": `Tokens of the answer of the ${role}. The arrow keys go from token to token.` });
    this.end = make("p", { class: "end" });
    this.node = make("section", { class: `panel ${role} stale`, "aria-labelledby": `name-${role}` },
      make("h2", { id: `name-${role}` }, role), make("span", { class: "what" }, WHAT[role]), this.response, this.end);
    walkTokens(this.response, (i, span) => look(this, i, span, true));
  }
  get busy() { return this.control !== null; }
  stop() {
    this.control?.abort();
    this.control = null;
    this.node.classList.remove("busy");
  }
  begin() {
    this.stop();
    this.tokens = [];
    this.response.replaceChildren();
    this.end.textContent = "";
    this.end.classList.remove("wrong");
    this.node.classList.remove("stale");
    this.node.classList.add("busy");
    if (looked.panel === this) forget();
    return (this.control = new AbortController());
  }
  fail(message) {
    this.end.textContent = visible(message);
    this.end.classList.add("wrong");
  }
  push(record) {
    const i = this.tokens.length, { text, end, probability, top } = record;
    const known = this.role === "proxy" && "base" in probability;
    record.shift = known ? probability.proxy - probability.base : 0;
    record.changed = known && top.base.length > 0 && top.base[0].id !== record.id;
    record.text = visible(text);
    this.tokens.push(record);
    const span = tokenSpan(end ? "end" : record.text, i, record.shift, record.changed);
    if (end) span.classList.add("over");
    if (i === 0) span.tabIndex = 0;
    this.response.append(span);
    if (this.role === "proxy") lookAtWidest(this, i, span);
  }
  finish(reason) {
    const own = this.tokens.filter((token) => !token.end);
    const why = { length: ", cut at the limit", stop: "" }[reason] ?? "";
    this.end.textContent = `${own.length} tokens${why}`;
    if (!own.length) this.end.textContent = "nothing: it ends at once";
  }
}

// one answer, streamed into a panel -> whether it came to its end
async function answer(panel, now) {
  const control = panel.begin();
  const mine = () => panel.control === control;
  try {
    const [path, body] = asked(panel, now);
    const headers = { "content-type": "application/json" };
    if (byId("key").value) headers.authorization = `Bearer ${byId("key").value}`;
    const found = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: control.signal });
    if (!found.ok) {
      if (found.status === 401) byId("key-field").hidden = false;
      const said = await found.json().catch(() => null);
      throw new Error(said?.error?.message ?? `the server answers with ${found.status}`);
    }
    for await (const event of events(found.body)) {
      if (!mine()) return false;
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        for (const record of choice.proxytune_trace ?? []) panel.push(record);
        if (choice.finish_reason) panel.finish(choice.finish_reason);
      }
    }
    return mine();
  } catch (error) {
    if (!mine() || error.name === "AbortError") return false;
    const lost = error instanceof TypeError; // what fetch throws where there is no connection
    panel.fail(lost ? "the server does not answer: is it still running?" : error.message);
    return false;
  } finally {
    if (mine()) panel.stop();
  }
}

// path and body of the request for a role
function asked(panel, now) {
  const body = {
    model: panel.model, stream: true, proxytune_trace: true,
    temperature: Number(now.temperature), seed: Number(now.seed), max_tokens: Number(now.tokens),
  };
  if (panel.role === "proxy") body.alpha = Number.isFinite(Number(now.alpha)) && now.alpha.trim() ? Number(now.alpha) : now.alpha.trim();
  if (now.format === "plain") return ["/v1/completions", { ...body, prompt: now.prompt }];
  const messages = [{ role: "user", content: now.prompt }];
  if (now.system.trim()) messages.unshift({ role: "system", content: now.system });
  return ["/v1/chat/completions", { ...body, messages }];
}

// server-sent events of a body, as objects
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const text = part.replace(/^data: /, "");
        if (part.startsWith("data: ") && text !== "[DONE]") yield JSON.parse(text);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- the token that is looked at

const looked = { panel: null, i: -1, byHand: false };
const inspector = make("div", { class: "inspector" });
const forget = () => {
  Object.assign(looked, { panel: null, i: -1, byHand: false });
  inspector.replaceChildren(make("p", { class: "muted" }, "Point at a token, or go through the tokens with the arrow keys: how probable did each role find it?"));
};
const lookAtWidest = (panel, i, span) => {
  const shown = looked.panel === panel ? panel.tokens[looked.i] : null;
  if (!looked.byHand && !panel.tokens[i].end && (!shown || Math.abs(panel.tokens[i].shift) > Math.abs(shown.shift))) look(panel, i, span, false);
};
function look(panel, i, span, byHand) {
  if (looked.panel === panel && looked.i === i) return;
  looked.panel?.response.querySelector(".on")?.classList.remove("on");
  Object.assign(looked, { panel, i, byHand: byHand || looked.byHand });
  lightToken(panel.response, span);
  const token = panel.tokens[i];
  const order = ["base", "expert", "antiexpert", "proxy"];
  const roles = Object.keys(token.probability).sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const tops = (role) => make("div", { class: "tops" }, ...(token.top[role] ?? []).map((one) =>
    make("span", { class: one.id === token.id ? "one chosen-one" : "one" }, piece(visible(one.text)), make("span", { class: "p" }, percent(one.probability)))));
  const heading = [
    make("b", {}, `Token ${i + 1} of the ${panel.role} `), piece(token.text),
    panel.role === "proxy" ? moved(token.shift) : "", token.end ? " · here the answer ends" : "",
  ];
  inspector.replaceChildren(...inspection(heading, roles.map((role) => ({ role, p: token.probability[role], top: tops(role) })), "its most probable tokens"));
}

// ---- the page

const panels = models.map(({ role, model }) => new Panel(role, model));
const proxy = panels.find((panel) => panel.role === "proxy");
const small = panels.filter((panel) => panel.role !== "base" && panel.role !== "proxy");
for (const panel of small) if (small.length < 3) panel.node.classList.add(small.length === 1 ? "alone" : "half");
if (panels.length - small.length === 1) panels.find((panel) => !small.includes(panel)).node.classList.add("alone");
const at = panels.findIndex((panel) => small.includes(panel));
const nodes = panels.map((panel) => panel.node);
nodes.splice(at < 0 ? nodes.length : at, 0, make("section", { class: "looking", "aria-label": "One token under each role" }, tokenKey(), inspector));
byId("answers").append(...nodes);
if (!proxy) { slider.disabled = true; fields.alpha.disabled = true; }

const showStatus = (text, wrong = false) => {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
};
const sum = () => {
  if (!proxy) return "";
  const own = proxy.tokens.filter((token) => !token.end), changed = own.filter((token) => token.changed).length;
  if (!own.length) return "";
  return `${changed} of ${own.length} tokens of the proxy are not what the base would have chosen there.`;
};
const busy = () => panels.some((panel) => panel.busy);
const buttons = () => {
  byId("stop").disabled = !busy();
  byId("answers").setAttribute("aria-busy", String(busy()));
};

let hasRun = false, finished = 0;
async function run(who) {
  const now = settings();
  if (!now.prompt.trim()) return showStatus("Write a prompt first.", true);
  if (!byId("ask").checkValidity()) return byId("ask").reportValidity();
  hasRun = true;
  writeLink(now);
  showStatus("");
  const going = who.map((panel) => answer(panel, now));
  buttons();
  const ended = await Promise.all(going);
  buttons();
  if (busy()) return;
  byId("answers").dataset.finished = String((finished += 1));
  if (proxy && ended[who.indexOf(proxy)]) showStatus(sum());
}
const stop = () => {
  for (const panel of panels) {
    if (!panel.busy) continue;
    panel.stop();
    panel.end.textContent = `stopped after ${panel.tokens.length} tokens`;
  }
  buttons();
};

let soon = 0;
const alphaMoved = () => {
  clearTimeout(soon);
  if (hasRun && proxy) soon = setTimeout(() => run([proxy]), SETTLED);
};
slider.addEventListener("input", () => { fields.alpha.value = String(Number(slider.value)); alphaMoved(); });
fields.alpha.addEventListener("change", () => { setAlpha(fields.alpha.value); alphaMoved(); });

const showExample = () => {
  const shown = examples.findIndex((example) => example.prompt === fields.prompt.value);
  [...byId("examples").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === shown)));
  const expected = shown < 0 ? "" : examples[shown].expected;
  byId("expected").hidden = !expected;
  byId("expected").textContent = expected ? `The right answer: ${visible(expected)}` : "";
};
if (examples.length > 1) byId("examples").append(...examples.map((example, i) => {
  const button = make("button", { type: "button", title: visible(example.prompt) }, `Example ${i + 1}`);
  button.addEventListener("click", () => { fields.prompt.value = example.prompt; showExample(); run(panels); });
  return button;
}));
fields.prompt.addEventListener("input", showExample);

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); run(panels); });
fields.prompt.addEventListener("keydown", (event) => {
  const asks = event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || (!touch && !event.shiftKey));
  if (!asks) return;
  event.preventDefault();
  run(panels);
});
byId("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
byId("keys").textContent = touch ? "" : "Enter runs, Shift+Enter makes a new line";
byId("link").addEventListener("click", async () => {
  writeLink(settings());
  try {
    await navigator.clipboard.writeText(location.href);
    showStatus("The link is copied: it reproduces prompt, alpha, seed and the other settings.");
  } catch {
    showStatus("The link is in the address bar: it reproduces prompt, alpha, seed and the other settings.");
  }
});

const open = () => {
  const linked = fromLink();
  fill(linked ?? DEFAULTS);
  if (linked) run(panels);
};
addEventListener("hashchange", open);
forget();
showStatus(`${touch ? "Press Run" : "Press Enter"}: every role answers the same prompt. Then move alpha, and watch the proxy change.`);
open();
if (!touch) fields.prompt.focus();
