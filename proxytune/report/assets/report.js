// What moves in the report: tooltips of the drawings, the veil over hateful text, and the responses to choose
// from. Stands behind tokens.js. Text of models enters the page through textContent only.

// ---- tooltips: every mark of a drawing carries its text as aria-label; the arrow keys walk through them

const tip = byId("tip");
const MARK = "svg [role='graphics-symbol'][aria-label]:not([aria-roledescription='axis'])";

const showTip = (text, box) => {
  tip.textContent = text;
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = box.top - own.height - 10;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 6 ? above : box.bottom + 10}px`;
};
const hideTip = () => { tip.hidden = true; };
const tipText = (mark) => mark.getAttribute("aria-label").replaceAll("; ", "\n");

for (const drawing of document.querySelectorAll(".drawing")) {
  const marks = [...drawing.querySelectorAll(MARK)];
  let lit = null;
  const light = (mark) => {
    if (lit) lit.classList.remove("lit");
    lit = mark;
    if (!mark) return hideTip();
    mark.classList.add("lit");
    showTip(tipText(mark), mark.getBoundingClientRect());
  };
  drawing.addEventListener("pointermove", (event) => {
    const mark = event.target.closest(MARK) || nearest(marks, event);
    if (mark !== lit) light(mark);
  });
  drawing.addEventListener("pointerleave", () => light(null));
  drawing.addEventListener("blur", () => light(null));
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return light(null);
    if (!step || !marks.length) return;
    event.preventDefault();
    const next = lit ? (marks.indexOf(lit) + step + marks.length) % marks.length : 0;
    light(marks[next]);
    byId("live").textContent = marks[next].getAttribute("aria-label");
  });
}

// the mark within a finger's reach of the pointer
function nearest(marks, event) {
  let best = null, reach = 18;
  for (const mark of marks) {
    const box = mark.getBoundingClientRect();
    const x = event.clientX - (box.left + box.width / 2), y = event.clientY - (box.top + box.height / 2);
    const away = Math.hypot(x, y);
    if (away < reach) { best = mark; reach = away; }
  }
  return best;
}
addEventListener("scroll", hideTip, { passive: true });

// ---- hateful text is veiled, and out of reach of the keyboard and of screen readers, until it is asked for

for (const veiled of document.querySelectorAll(".sensitive")) {
  const button = veiled.querySelector(".unveil"), texts = veiled.querySelector(".texts");
  button.addEventListener("click", () => {
    const shown = veiled.classList.toggle("veiled");
    texts.inert = shown;
    button.setAttribute("aria-pressed", String(!shown));
    button.textContent = shown ? "Show text that is hateful by design" : "Hide this text";
  });
}

// ---- tables that are wider than their place say so

const cued = new ResizeObserver((entries) => {
  for (const { target } of entries) target.previousElementSibling.hidden = target.scrollWidth <= target.clientWidth + 1;
});
for (const box of document.querySelectorAll(".cue + .scroll")) cued.observe(box);

// ---- which section one is in

const links = [...document.querySelectorAll(".bar nav a")];
const sections = links.map((link) => byId(link.hash.slice(1)));
const mark = () => {
  const here = sections.filter((section) => section.getBoundingClientRect().top < 140).pop();
  links.forEach((link, i) => {
    if (sections[i] === here) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  });
};
addEventListener("scroll", () => requestAnimationFrame(mark), { passive: true });
mark();

// ---- the token-level view

const PAGE = 10;
const COUNT = new Intl.NumberFormat("en");
const root = byId("tokens-root");
if (root) tokensView(JSON.parse(byId("token-data").textContent), root);

function tokensView(data, root) {
  const { texts, scale, roles, answers } = data;
  const BASE = roles.indexOf("base"), PROXY = roles.indexOf("proxy");
  const state = { set: 0, outcome: "all", order: "file", words: "", page: 0, item: null, token: -1, open: false };

  // figures of one item, made when it is first needed
  const figures = (item) => {
    if (!item.shift) {
      item.shift = item.p[PROXY].map((p, i) => (p === null || item.p[BASE][i] === null ? 0 : (p - item.p[BASE][i]) / scale));
      item.changed = item.top[BASE].map((top, i) => top !== item.top[PROXY][i]);
      item.mean = item.shift.reduce((sum, one) => sum + Math.abs(one), 0) / Math.max(item.shift.length, 1);
      item.moved = item.changed.filter(Boolean).length;
    }
    return item;
  };
  const right = (item, role) => (item.answers[role] ? item.answers[role].right : null);
  const OUTCOMES = {
    all: ["All", () => true],
    right: ["Proxy right", (item) => right(item, "proxy") === true],
    wrong: ["Proxy wrong", (item) => right(item, "proxy") === false],
    mended: ["Proxy right, base wrong", (item) => right(item, "proxy") === true && right(item, "base") === false],
    broken: ["Proxy wrong, base right", (item) => right(item, "proxy") === false && right(item, "base") === true],
  };
  const ORDERS = {
    file: ["As asked", null],
    most: ["Most changed first", (a, b) => figures(b).mean - figures(a).mean],
    least: ["Least changed first", (a, b) => figures(a).mean - figures(b).mean],
    long: ["Longest first", (a, b) => b.tokens.length - a.tokens.length],
  };
  const set = () => data.sets[state.set];
  const matching = () => {
    const words = state.words.toLowerCase();
    const texts = (item) => [item.id, item.asked, ...Object.values(item.answers).map((answer) => answer.text)];
    const found = set().items.filter(
      (item) => OUTCOMES[state.outcome][1](item) && (!words || texts(item).some((text) => text.toLowerCase().includes(words))),
    );
    return ORDERS[state.order][1] ? found.sort(ORDERS[state.order][1]) : found;
  };

  // -- the tools
  const choice = (label, name, pairs) => {
    const select = make("select", { id: `tokens-${name}` }, ...pairs.map(([value, text]) => make("option", { value }, text)));
    select.addEventListener("change", () => {
      state[name] = name === "set" ? Number(select.value) : select.value;
      restart();
    });
    return make("label", {}, label, select);
  };
  const search = make("input", { type: "search", id: "tokens-words", placeholder: "question or answer" });
  search.addEventListener("input", () => { state.words = search.value; restart(); });
  const several = new Set(data.sets.map((one) => one.system)).size > 1;
  const named = data.sets.map((one, i) => [i, (several ? `${one.system}: ` : "") + one.task]);
  const tools = make(
    "div", { class: "tools", role: "search", "aria-label": "Choose responses" },
    choice("Task", "set", named),
    choice("Outcome", "outcome", Object.entries(OUTCOMES).map(([key, [text]]) => [key, text])),
    choice("Order", "order", Object.entries(ORDERS).map(([key, [text]]) => [key, text])),
    make("label", {}, "Contains", search),
  );
  const unveil = make("button", { type: "button" }, "Show text that is hateful by design");
  unveil.addEventListener("click", () => { state.open = true; restart(); });
  const status = make("p", { class: "note", role: "status", id: "tokens-status" });
  const list = make("ul", { role: "listbox", "aria-label": "Responses", id: "tokens-list" });
  const back = make("button", { type: "button", "aria-label": "Previous page" }, "‹ Back");
  const on = make("button", { type: "button", "aria-label": "Next page" }, "Next ›");
  const where = make("span");
  const chosen = make("div", { class: "chosen", id: "tokens-chosen" });
  const view = make(
    "div", { class: "tokens-view" },
    make("div", { class: "chooser" }, list, make("div", { class: "pages" }, back, where, on)),
    chosen,
  );
  back.addEventListener("click", () => { state.page -= 1; drawList(); });
  on.addEventListener("click", () => { state.page += 1; drawList(); });
  root.append(tools, unveil, status, view);

  // -- the list: one page of it is in the document
  const strip = (item) => {
    const { shift } = figures(item), cells = Math.min(shift.length, 90);
    const bar = make("div", { class: "strip", "aria-hidden": "true" });
    for (let i = 0; i < cells; i++) {
      const part = shift.slice(Math.floor((i * shift.length) / cells), Math.max(1, Math.floor(((i + 1) * shift.length) / cells)));
      const most = part.reduce((best, one) => (Math.abs(one) > Math.abs(best) ? one : best), 0);
      const cell = make("i");
      cell.style.background = shade(most, 1);
      bar.append(cell);
    }
    return bar;
  };
  const verdict = (is) => (is === null || is === undefined ? "not scored" : is ? "right" : "wrong");
  const entry = (item, selected) => {
    const first = make("div", { class: "first" },
      make("span", {}, make("bdi", {}, `#${item.id}`), ` · ${figures(item).moved} of ${item.tokens.length} changed`),
      make("span", { class: right(item, "proxy") === false ? "bad" : "good" }, right(item, "proxy") === null ? "" : verdict(right(item, "proxy"))));
    const node = make("li", { role: "option", tabindex: selected ? "0" : "-1", "aria-selected": String(selected) },
      first, make("div", { class: "question", dir: "auto" }, item.asked), strip(item));
    node.addEventListener("click", () => choose(item, node));
    node.item = item;
    return node;
  };
  const drawList = () => {
    const found = matching(), pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const shown = found.slice(state.page * PAGE, (state.page + 1) * PAGE);
    if (!shown.includes(state.item)) state.item = shown[0] || null;
    list.replaceChildren(...shown.map((item) => entry(item, item === state.item)));
    where.textContent = found.length ? `${state.page * PAGE + 1}–${state.page * PAGE + shown.length} of ${COUNT.format(found.length)}` : "none";
    back.disabled = state.page === 0;
    on.disabled = state.page >= pages - 1;
    const { items, total } = set();
    const rest = items.length < total ? ` (the first ${COUNT.format(items.length)} of ${COUNT.format(total)} examples are in this page)` : "";
    status.textContent = `${COUNT.format(found.length)} of ${COUNT.format(items.length)} responses${rest}`;
    drawChosen();
  };
  list.addEventListener("keydown", (event) => {
    const all = [...list.children], here = all.indexOf(document.activeElement);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    choose(all[to].item, all[to]);
    all[to].focus();
  });
  const choose = (item, node) => {
    state.item = item;
    for (const other of list.children) {
      other.setAttribute("aria-selected", String(other === node));
      other.tabIndex = other === node ? 0 : -1;
    }
    drawChosen();
  };

  // -- the chosen response
  const drawChosen = () => {
    const item = state.item;
    state.token = -1;
    if (!item) return chosen.replaceChildren(make("p", { class: "muted" }, "No response fits. Choose another outcome, or other words."));
    const { mean } = figures(item);
    const inspector = make("div", { class: "inspector", id: "tokens-inspector", "aria-live": "polite" });
    const response = make("div", { class: "response", role: "group", dir: "auto", id: "tokens-response", "aria-label": "Tokens of the proxy's response. The arrow keys go from token to token." });
    item.tokens.forEach((text, i) => response.append(tokenSpan(texts[text], i, item.shift[i], item.changed[i])));
    response.firstElementChild?.setAttribute("tabindex", "0");
    walkTokens(response, (i, span) => inspect(item, i, span, response, inspector));
    const cut = item.length ? `; shown and counted are the first ${COUNT.format(item.tokens.length)} of ${COUNT.format(item.length)} tokens` : "";
    const summary = `${item.moved} of ${item.tokens.length} tokens are not what the base would have chosen here; mean shift ${(100 * mean).toFixed(1)} points${cut}`;
    chosen.replaceChildren(
      make("p", { class: "asked", dir: "auto" }, item.asked),
      item.expected ? make("p", { class: "small muted" }, "Reference: ", make("bdi", {}, item.expected)) : "",
      make("h3", {}, "The proxy's response, token by token"),
      make("p", { class: "small muted" }, summary),
      response, tokenKey(), inspector,
      make("h3", {}, "The same example, answered by each role"),
      make("div", { class: "answers" }, ...answers.filter((role) => item.answers[role]).map((role) => answer(role, item.answers[role]))),
    );
    const widest = item.shift.reduce((best, one, i) => (Math.abs(one) > Math.abs(item.shift[best]) ? i : best), 0);
    if (response.children[widest]) inspect(item, widest, response.children[widest], response, inspector);
  };
  const inspect = (item, i, span, response, inspector) => {
    if (i === state.token) return;
    state.token = i;
    lightToken(response, span);
    const line = (role, r) => {
      const top = item.top[r][i], p = item.p[r][i];
      const first = top === null ? "–" : top === -1 ? "the same" : piece(texts[top]);
      return { role, p: p === null || p === undefined ? null : p / scale, top: first };
    };
    const heading = [make("b", {}, `Token ${i + 1} of ${item.tokens.length} `), piece(texts[item.tokens[i]]), moved(item.shift[i])];
    inspector.replaceChildren(...inspection(heading, roles.map(line), "its first choice"));
  };
  const answer = (role, one) => make("div", { class: `answer ${role}` },
    make("span", { class: `verdict ${one.right ? "good" : "bad"}` }, one.right === null ? "" : one.right ? "✓ right" : "✗ wrong"),
    make("div", { class: "role" }, role),
    make("p", { class: "text", dir: "auto" }, one.text.trim() || "(nothing)"),
    make("div", { class: "small muted" }, [one.n ? `${one.n} tokens` : "", one.end ? `ends by ${one.end}` : ""].filter(Boolean).join(", ")));

  const restart = () => {
    state.page = 0;
    const veiled = set().sensitive && !state.open;
    unveil.hidden = !veiled;
    view.hidden = veiled;
    search.disabled = veiled;
    if (!veiled) return drawList();
    list.replaceChildren();
    chosen.replaceChildren();
    status.textContent = `The prompts of ${set().task} are hateful by design, and what models make of them may be.`;
  };
  restart();
}
