// A response token by token, and the inspector of one of its tokens: what the report, notebooks and the
// playground share. Text of models enters a page through textContent only.
"use strict";

const make = (tag, attributes = {}, ...inside) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...inside.filter((part) => part !== null && part !== undefined));
  return node;
};
const byId = (id) => document.getElementById(id);

// what controls, reorders or hides the text around it, written out as `visible` of proxytune.terminal does
const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) =>
  "\n\t\u200c\u200d".includes(char) ? char : `‹U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);

// how far a probability moved, from -1 to 1, as a colour
const shade = (shift, most = 0.8) => {
  const strength = Math.min(1, Math.abs(shift)) ** 0.7 * most;
  return strength < 0.02 ? "" : `rgba(var(--${shift > 0 ? "more" : "less"}), ${strength.toFixed(3)})`;
};
const printed = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
const piece = (text) => make("span", { class: "piece", dir: "auto" }, printed(text).replaceAll(" ", "␣") || "∅");
const percent = (p) => {
  if (p === null || p === undefined) return "–";
  const value = 100 * p;
  return value < 0.005 ? "< 0.01%" : value >= 99.995 ? "100%" : `${value.toFixed(value < 1 ? 2 : 1)}%`;
};

// one token of a response; `changed`: the base's first choice was another one
const tokenSpan = (text, i, shift, changed) => {
  const span = make("span", { "data-i": i, tabindex: "-1", class: changed ? "changed" : null });
  span.textContent = printed(text) || "∅";
  span.style.background = shade(shift);
  return span;
};
const tokenKey = () => make("div", { class: "key" },
  make("span", {}, "less likely than under the base", make("span", { class: "ramp", "aria-hidden": "true" }), "more likely"),
  make("span", {}, make("span", { class: "line", "aria-hidden": "true" }), "the base's first choice was another token"));

// `inspect(i, span)` is called for the token that is pointed at, clicked, or reached by the arrow keys
function walkTokens(response, inspect) {
  const look = (event) => {
    const span = event.target.closest("span[data-i]");
    if (span) inspect(Number(span.dataset.i), span);
  };
  for (const kind of ["pointerover", "focusin", "click"]) response.addEventListener(kind, look);
  response.addEventListener("keydown", (event) => {
    const here = [...response.children].indexOf(document.activeElement), last = response.children.length - 1;
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last }[event.key];
    if (to === undefined || !response.children[to]) return;
    event.preventDefault();
    response.children[to].focus();
  });
}
// the token that is looked at, which is the one that the tab key reaches
function lightToken(response, span) {
  for (const other of response.querySelectorAll(".on")) other.classList.remove("on");
  for (const other of response.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  span.tabIndex = 0;
  span.classList.add("on");
}
// a token's probability under each role: lines of { role, p, top }, whose `top` is a node
const inspection = (heading, lines, topName) => [
  make("p", {}, ...heading),
  make("table", {},
    make("thead", {}, make("tr", {}, ...["role", "probability of this token", "", topName].map((name, at) => make("th", { scope: "col", class: at === 1 ? "number" : null }, name)))),
    make("tbody", {}, ...lines.map(({ role, p, top }) => {
      const fill = make("i");
      fill.style.width = `${100 * (p || 0)}%`;
      return make("tr", {},
        make("th", { scope: "row", class: role }, role),
        make("td", { class: "number" }, percent(p)),
        make("td", {}, make("span", { class: `meter ${role}`, "aria-hidden": "true" }, fill)),
        make("td", {}, top));
    }))),
];
const moved = (shift) => ` · moved by ${shift > 0 ? "+" : ""}${(100 * shift).toFixed(1)} points`;
